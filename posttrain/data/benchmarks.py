"""
Benchmarks: the files of data_raw/eval/<task>/, of any published layout, -> the items that must not be trained on.

An item is what one would recognise a leak by: a question with its options (kept apart, so that their order does not
matter), a passage with its questions, one turn of a prompt, a worked solution. Labels and scores are left out.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from posttrain.config import shown
from posttrain.data.files import data_files, inner_suffix, is_data, open_plain, read_rows
from posttrain.data.jsonfiles import Fault
from posttrain.errors import UserFault
from posttrain.text import HAN

# Column names, lower case. The first of a line of alternatives that is there is taken.
CONTEXT = ("context", "context_text", "passage", "article", "paragraph", "story", "document", "background")
QUESTION = (
    ("question", "question_zh", "query", "query_text", "prompt", "problem", "goal", "stem", "ctx"),
    ("ctx_a",), ("ctx_b",), ("instruction",), ("input",), ("premise",), ("hypothesis",), ("sentence",), ("sentence1",),
    ("sentence2",),
)  # fmt: skip
PLAIN = ("title", "text", "content")  # where there is no question
TURNS = ("turns", "messages", "conversations", "conversation", "prompts", "questions")
OPTION = re.compile(r"[a-h]|options?|choices?|endings|candidates|option_?[1-9a-h]|op[a-h]|sol[12]|mc[12]_targets|"
                    r"(best|correct|incorrect)_answers?|distractor_?[1-9]")  # fmt: skip
ANSWER = ("answer", "solution", "reference", "std_answer", "target", "output", "explanation", "rationale",
          "canonical_solution", "code")  # fmt: skip
LABELS = ("id", "label", "labels", "key", "lang", "role", "from", "type")  # beside the text in nested cells
UNIT = re.compile(f"[{HAN}]|[^\\W\\d_{HAN}]+|[0-9]+")
SOLUTION_UNITS = 26  # a shorter answer says nothing by itself
_TRAIN = re.compile(r"(^|[/_.-])train([/_.-]|$)")
_LETTERED = re.compile(r"(?<![A-Za-z])[(（]?([A-H])\s*[.．、:：)）]")
_CALCULATION = re.compile(r"<<[^<>]*>>")  # gsm8k's notes to a calculator


class Item(NamedTuple):
    """One thing to look for."""

    task: str
    place: str
    """`file:line`, the file relative to its task."""
    question: tuple[str, ...]
    """The texts that make it what it is: the question, a passage, a solution."""
    options: tuple[str, ...] = ()
    """The texts that go with it, in any order: options, the questions of a passage."""


def benchmark_paths(eval_dir: Path, more: list[Path]) -> list[Path]:
    """What is searched: each directory and file in `eval_dir` (which may be absent), then `more`.

    Raises UserFault if one of `more` is not there.
    """
    missing = [shown(path) for path in more if not path.exists()]
    if missing:
        raise UserFault(f"decontaminate.benchmarks: not there: {', '.join(missing)}")
    inside = sorted(p for p in eval_dir.iterdir() if not p.name.startswith(".")) if eval_dir.is_dir() else []
    laid = [path for path in inside if path.is_dir() or is_data(Path(path.name))]
    return laid + [path for path in more if path not in laid]


def read_benchmarks(paths: list[Path]) -> tuple[list[Item], list[str]]:
    """(items, what was not read and why, for people). A directory is a task, named after it; so is a single file.

    The train split of a benchmark holds its few-shot examples, and may be trained on: it is left out, and said.
    Raises UserFault, with file and line, for a damaged file or a row that is not JSON.
    """
    items, notes = [], []
    for path in paths:
        if not _files(path):
            notes.append(f"{path.name}: holds no data files, not looked for")
        for file in _files(path):
            name = str(file.relative_to(path)) if path.is_dir() else file.name
            task = path.name if path.is_dir() else path.name.split(".")[0]
            if _TRAIN.search(name.lower()):
                notes.append(f"{task} {name}: a train split, not looked for")
                continue
            found = list(_file_items(file, task, name))
            items += found
            if not found:
                notes.append(f"{task} {name}: no question in its rows, not looked for")
    return items, notes


def _files(path: Path) -> list[Path]:
    """The files of a task. Those named one by one are read whatever they are called."""
    return [path] if path.is_file() else data_files(path)


def _file_items(file: Path, task: str, name: str) -> Iterator[Item]:
    """The items of one file; rows with the same passage are one item."""
    suffix, passages = inner_suffix(file), {}
    rows = {".txt": _text_rows, ".yaml": _yaml_rows, ".yml": _yaml_rows}.get(suffix, read_rows)(file)
    for number, (line, row) in enumerate(rows, 1):
        place = f"{name}:{line}" if line > 1 or number == 1 else f"{name}:{line}#{number}"
        if isinstance(row, Fault):
            raise UserFault(f"{shown(file)}:{line}: {row.reason}: {row.detail}\n  a benchmark must be whole to be "
                            "looked for: mend the line, or get the file again")  # fmt: skip
        for passage, question, options in _texts(row):
            if passage:
                passages.setdefault(passage, (place, []))[1].extend(question + options)
            else:
                yield Item(task, place, tuple(question), tuple(options))
    for passage, (place, asked) in passages.items():
        yield Item(task, place, passage, tuple(asked))


def _text_rows(file: Path) -> Iterator[tuple[int, str]]:
    """The longest cell of each line: a label stands behind a tab (thucnews)."""
    with open_plain(file) as stream:
        for number, line in enumerate(stream, 1):
            try:
                cell = max(line.decode("utf-8-sig").split("\t"), key=len).strip()
            except UnicodeDecodeError as error:
                raise UserFault(f"{shown(file)}:{number}: not UTF-8 ({error.reason})") from None
            if cell:
                yield number, cell


def _yaml_rows(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        yield 1, yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserFault(f"{shown(file)}: not readable as YAML: {error}") from None


# ------------------------------------------------------------------ one row

Texts = tuple[tuple[str, ...], list[str], list[str]]  # passage, question, options


def texts_of(row: Any) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """(question, options) of each item of a row, as Item has them; a passage is what its questions go with."""
    for passage, question, options in _texts(row):
        yield (passage, (*question, *options)) if passage else (tuple(question), tuple(options))


def _texts(row: Any) -> Iterator[Texts]:
    """(passage, question, options) of each item of a row, whatever its layout."""
    if isinstance(row, str):
        yield (), [row], []
    elif isinstance(row, list):
        for value in row:
            if isinstance(value, dict | list):
                yield from _texts(value)
    elif isinstance(row, dict):
        yield from _row_texts({str(key).strip().lower(): value for key, value in row.items()}, row)


def _row_texts(cells: dict[str, Any], row: dict) -> Iterator[Texts]:
    passage = next((tuple(_strings(cells[c])) for c in CONTEXT if cells.get(c)), ())
    present = [next((cells[c] for c in names if c in cells), None) for names in _columns(cells)]
    question = [text for value in present for text in _strings(value)]
    options = [text for name, value in cells.items() if OPTION.fullmatch(name) for text in _strings(value)]
    filled = list(_filled(cells))
    turns = next((cells[name] for name in TURNS if _is_talk(cells.get(name))), [])
    inner = () if question or filled or turns else row.values()
    nested = [texts for value in inner if isinstance(value, dict | list) for texts in _texts(value)]
    if passage:
        yield passage, question + [text for _, asked, offered in nested for text in asked + offered], options
    elif question or filled:
        yield from (((), text, []) for text in filled)
        asked, offered = _split_options(question)
        if asked:
            yield (), asked, offered + options
    elif turns:
        yield from (((), [text], []) for turn in turns if _asks(turn) for text in _strings(turn))
    elif nested:
        yield from nested
    else:
        told = [v for k, v in cells.items() if isinstance(v, str) and (k in PLAIN or len(UNIT.findall(v)) >= 8)]
        yield from [((), told, [])] if told else []
    for name in ANSWER:
        if isinstance(cells.get(name), str) and len(UNIT.findall(cells[name])) >= SOLUTION_UNITS:
            yield (), [cells[name]], []
            if _CALCULATION.search(cells[name]):
                yield (), [_CALCULATION.sub("", cells[name])], []


def _columns(cells: dict[str, Any]) -> tuple:
    """The columns that make up the question; hellaswag's ctx is ctx_a and ctx_b."""
    return tuple(names for names in QUESTION if not ("ctx" in cells and names[0] in ("ctx_a", "ctx_b")))


def _filled(cells: dict[str, Any]) -> Iterator[list[str]]:
    """winogrande's sentence with each of the two words in its gap (or each beginning with the end that follows)."""
    sentence, beginnings, end = (cells.get(name) for name in ("sentence", "context_options", "continuation"))
    if isinstance(beginnings, list) and isinstance(end, str):
        yield from ([f"{text} {end}"] for text in _strings(beginnings))
    if isinstance(sentence, str) and sentence.count("_") == 1:
        words = (cells.get("option1"), cells.get("option2"))
        yield from ([sentence.replace("_", word)] for word in words if isinstance(word, str))


def _split_options(question: list[str]) -> tuple[list[str], list[str]]:
    """Question and options of a question that ends in `A. ... B. ...`, on lines or in one."""
    asked, options = [], []
    for text in question:
        marks = []
        for mark in _LETTERED.finditer(text):
            if mark[1] == "ABCDEFGH"[len(marks) : len(marks) + 1]:
                marks.append(mark)
        dialogue = any(mark[0][-1] in ":：" for mark in marks[:2])  # A: and B: may speak in turn
        if len(marks) < 2 + dialogue:
            asked.append(text)
            continue
        asked.append(text[: marks[0].start()])
        ends = [mark.start() for mark in marks[1:]] + [len(text)]
        options += [text[mark.end() : end] for mark, end in zip(marks, ends, strict=True)]
    return asked, options


def _is_talk(value: Any) -> bool:
    """Whether a cell holds turns: strings or messages."""
    return isinstance(value, list) and all(
        isinstance(turn, str) or isinstance(turn, dict) and {"content", "value"} & turn.keys() for turn in value
    )


def _asks(turn: Any) -> bool:
    """Whether a turn is the asking side's; one without a role is."""
    role = (turn.get("role") or turn.get("from") or "user") if isinstance(turn, dict) else "user"
    return role in ("user", "human", "prompter")


def _strings(value: Any) -> list[str]:
    """The texts in a cell: a string, or those of a list or mapping, labels left out. Numbers are text where they stand
    in a list of options."""
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, list):
        return [text for part in value for text in ([str(part)] if type(part) in (int, float) else _strings(part))]
    if isinstance(value, dict):
        return [text for key, part in value.items() if str(key).lower() not in LABELS for text in _strings(part)]
    return []
