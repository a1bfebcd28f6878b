"""
lm-eval's built-in tasks, pointed at files of your own instead of the hub.

Lay the files into data_dir (data_raw/eval by default) as their authors publish them:

    cmmlu/        dev/<subject>.csv  test/<subject>.csv              Question, A, B, C, D, Answer
    ceval-valid/  dev/<subject>_dev.csv  val/<subject>_val.csv       question, A, B, C, D, answer
    gsm8k/        train.jsonl  test.jsonl                            question, answer (ends in "#### n")
    hellaswag/    hellaswag_train.jsonl  hellaswag_val.jsonl         activity_label, ctx_a, ctx_b, endings, label
    winogrande/   train_xl.jsonl  dev.jsonl                          sentence (with "_"), option1, option2, answer

The first file of a line holds the few-shot examples; without few-shot it may be absent. One subject alone is asked for
by lm-eval's own name (cmmlu_anatomy, ceval-valid_law). The rows are checked and written as JSON lines next to a small
task YAML that includes lm-eval's own, so that prompts, metrics and versions stay lm-eval's, and
`lm-eval run --include_path <output_dir>/tasks` measures the very same items.
"""

import csv
import io
import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import yaml

from posttrain.config import shown
from posttrain.errors import UserFault, faults_in
from posttrain.records import json_object, lines_of, write_jsonl
from posttrain.text import has_lone_surrogate


@dataclass(frozen=True)
class Family:
    """How a benchmark's published files are called, and what its rows hold."""

    folder: str  # under lm_eval/tasks/
    examples: tuple[str, tuple[str, ...]]  # split of the few-shot examples, and its file names; {} is the subject
    scored: tuple[str, tuple[str, ...]]  # split that is scored, likewise
    columns: tuple[str, ...]
    gold: str  # column with the right answer


LETTERS = ("A", "B", "C", "D")
FAMILIES = {
    "cmmlu": Family(
        "cmmlu", ("dev", ("dev/{}.csv",)), ("test", ("test/{}.csv",)), ("Question", *LETTERS, "Answer"), "Answer"
    ),
    "ceval-valid": Family(
        "ceval", ("dev", ("dev/{}_dev.csv", "dev/{}.csv")), ("val", ("val/{}_val.csv", "val/{}.csv")),
        ("question", *LETTERS, "answer"), "answer",
    ),
    "gsm8k": Family("gsm8k", ("train", ("train.jsonl",)), ("test", ("test.jsonl",)), ("question", "answer"), "answer"),
    "hellaswag": Family(
        "hellaswag", ("train", ("hellaswag_train.jsonl", "train.jsonl")),
        ("validation", ("hellaswag_val.jsonl", "validation.jsonl")),
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"), "label",
    ),
    "winogrande": Family(
        "winogrande", ("train", ("train_xl.jsonl", "train.jsonl")), ("validation", ("dev.jsonl", "validation.jsonl")),
        ("sentence", "option1", "option2", "answer"), "answer",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class LocalTask:
    """One leaf task of lm-eval and the local files that stand for its splits."""

    name: str
    family: str
    include: Path  # lm-eval's own YAML
    files: dict[str, Path]  # split -> file

    @property
    def scored(self) -> Path:
        return self.files[FAMILIES[self.family].scored[0]]


def tasks_root() -> Path:
    """lm-eval's own task YAMLs, found without importing lm_eval."""
    return Path(find_spec("lm_eval").origin).parent / "tasks"


def family_of(name: str) -> str | None:
    """`cmmlu` and `cmmlu_anatomy` -> `cmmlu`; None for a task that is not one of FAMILIES."""
    return next((f for f in FAMILIES if name == f or name in leaf_names(f)), None)


@cache
def leaf_names(family: str) -> dict[str, Path]:
    """Name of each leaf task of a family -> lm-eval's YAML of it."""
    folder = tasks_root() / FAMILIES[family].folder
    if (folder / f"{family}.yaml").is_file() or not any(folder.glob(f"{family}_*.yaml")):
        files = [folder / f"{family}.yaml", folder / "default.yaml"]
        return {family: next(f for f in files if f.is_file())}
    return {f.stem: f for f in sorted(folder.glob(f"{family}_*.yaml"))}


def local_tasks(name: str, data_dir: Path) -> list[LocalTask]:
    """The leaf tasks of `name` whose scored file is in data_dir; [] if there is none, or no such family."""
    family = family_of(name)
    if family is None:
        return []
    about, found = FAMILIES[family], []
    for leaf, include in leaf_names(family).items():
        if name not in (family, leaf):
            continue
        files = {}
        for split, patterns in (about.examples, about.scored):
            paths = (data_dir / family / p.format(leaf.removeprefix(f"{family}_")) for p in patterns)
            if path := next(filter(Path.is_file, paths), None):
                files[split] = path
        if about.scored[0] in files:
            found.append(LocalTask(leaf, family, include, files))
    return found


def expected_files(name: str, data_dir: Path) -> str:
    """Which files would make a task local, as one line for a message."""
    family = family_of(name)
    about = FAMILIES[family]
    subject = "<subject>" if len(leaf_names(family)) > 1 else ""
    files = " and ".join(about_split[1][0].format(subject) for about_split in (about.examples, about.scored))
    return f"{shown(data_dir / family)}/: {files} (columns {', '.join(about.columns)})"


def read_rows(task: LocalTask, path: Path) -> list[dict]:
    """Rows of one published file, checked. UserFault names file, lines and what is wrong with them.

    Everything in a CSV stays text: pandas would turn a choice `0.50` into 0.5 and `NA` into nothing.
    """
    about = FAMILIES[task.family]
    rows, faults = [], []
    for line, row in _csv_rows(path) if path.suffix == ".csv" else _json_rows(path):
        if fault := row if isinstance(row, str) else _row_fault(task.family, row):
            faults.append(f"{shown(path)}:{line}: {fault}")
        else:
            rows.append({column: row[column] for column in about.columns})
    if faults:
        data_dir = next(folder.parent for folder in path.parents if folder.name == task.family)
        expected = f"expected in {expected_files(task.name, data_dir)}"
        raise faults_in(f"task {task.name}: rows that cannot be used: {len(faults)}; {expected}", faults)
    if not rows:
        raise UserFault(f"{shown(path)}: no rows")
    return rows


def _row_fault(family: str, row: dict) -> str | None:
    """Why a row cannot be used, or None."""
    about = FAMILIES[family]
    if lacking := [column for column in about.columns if row.get(column) is None]:
        return f"not a row of {family}: no {', '.join(lacking)} (there: {', '.join(row)})"
    texts = {column: row[column] for column in about.columns if column not in ("endings", about.gold)}
    if wrong := next((column for column, text in texts.items() if not isinstance(text, str)), None):
        return f"{wrong}: expected text, got {row[wrong]!r}"
    endings = row.get("endings", [])
    if not (isinstance(endings, list) and all(isinstance(one, str) for one in endings)):
        return "endings: expected a list of texts"
    if any(map(has_lone_surrogate, [*texts.values(), *endings, str(row[about.gold])])):
        return "holds half of a character (a lone surrogate)"
    fault = _gold_fault(family, row)
    return f"{fault} (got {row[about.gold]!r})" if fault else None


def _gold_fault(family: str, row: dict) -> str | None:
    """Why the right answer of a row cannot be used, or None."""
    gold = row[FAMILIES[family].gold]
    if family in ("cmmlu", "ceval-valid"):
        return None if gold in LETTERS else "the answer is not one of A, B, C, D"
    if family == "gsm8k":
        right = isinstance(gold, str) and re.search(r"#### -?[\d.,]+", gold)
        return None if right else "the answer does not end in '#### n'"
    if family == "hellaswag":
        right = str(gold).isdigit() and int(gold) < len(row["endings"])
        return None if right else "the label is not the index of an ending"
    right = gold in ("1", "2") and "_" in row["sentence"]
    return None if right else "the answer is not '1' or '2', or the sentence has no '_'"


def _csv_rows(path: Path):
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = path.read_text(encoding="gb18030", errors="replace")  # as Excel saves Chinese CSV files
    reader = csv.DictReader(io.StringIO(text, newline=""), restval=None)
    csv.field_size_limit(2**30)  # of the whole process; others set it as well, and a file must read alike in any order
    try:
        for row in reader:
            yield reader.line_num, {key: value for key, value in row.items() if key}
    except csv.Error as error:
        raise UserFault(f"{shown(path)}:{reader.line_num + 1}: not CSV ({error})") from None


def _json_rows(path: Path):
    """(line, row or what is wrong with it)."""
    yield from ((number, json_object(line)) for number, line in enumerate(lines_of(path), 1) if line)


def some_rows(path: Path, most: int) -> list[dict]:
    """The first rows of a JSONL file. UserFault names a line that is not a JSON object."""
    rows = []
    for number, row in islice(_json_rows(path), most):
        if isinstance(row, str):
            raise UserFault(f"{shown(path)}:{number}: {row}")
        rows.append(row)
    return rows


def write_task(task: LocalTask, folder: Path) -> None:
    """Write <folder>/<task>.yaml and the rows that it reads."""
    about = FAMILIES[task.family]
    files = {}
    for split, path in task.files.items():
        files[split] = str(folder / f"{task.name}.{split}.jsonl")
        write_jsonl(Path(files[split]), read_rows(task, path))
    content = {
        "include": str(task.include), "task": task.name, "dataset_path": "json", "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
    }  # fmt: skip
    if about.examples[0] not in task.files:  # lm-eval loads the examples also where none are shown
        content |= {"training_split": None, "fewshot_split": None}
    _write_yaml(folder / f"{task.name}.yaml", content)


def write_group(family: str, leaves: list[LocalTask], folder: Path) -> None:
    """Write <folder>/<family>.yaml: lm-eval's own group over the subjects that are here."""
    own = tasks_root() / FAMILIES[family].folder / f"_{family}.yaml"
    group = yaml.safe_load(own.read_text(encoding="utf-8"))
    _write_yaml(folder / f"_{family}.yaml", group | {"task": [leaf.name for leaf in leaves]})


def _write_yaml(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False), encoding="utf-8")


# ------------------------------------------------------------------ names

_NAMED = re.compile(r'^["\']?(?:task|group)["\']?:[ ]*["\']?([^\s"\'#\[]+)["\']?[ ]*$', re.M)


def known_names(folder: Path) -> dict[str, Path]:
    """Name of each task and group under a folder of task YAMLs -> the file that names it.

    Reads names only (1 s for lm-eval's 14,000 files, where its own index takes 7); tags are not among them.
    """
    names = {}
    for path in sorted(folder.glob("**/*.yaml")):
        for name in _NAMED.findall(path.read_text(encoding="utf-8", errors="replace")):
            names.setdefault(name, path)
    return names


def all_names(folders: list[Path]) -> list[str]:
    """Every name that lm-eval's own index knows, tags included; for a name that known_names() does not have."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[str(folder) for folder in folders]).all_tasks


def nearest(name: str, names: list[str]) -> str:
    """`did you mean` for a task name, as the end of a message."""
    close = get_close_matches(name, names, 3, 0.6)
    close = close or [n for n in sorted(names, key=len) if name.lower() in n.lower()][:3]
    return f" -- did you mean {', '.join(close)}?" if close else ""
