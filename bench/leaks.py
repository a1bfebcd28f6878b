"""
How well decontamination finds leaks: benchmark items planted into 40,000 real conversations by a seeded generator.

    python -m bench.leaks                  # the final benchmarks: used for nothing else
    python -m bench.leaks --set tuning     # those that the constants of data/decontaminate.py were chosen on
    python -m bench.leaks --set seen       # those whose first run showed faults, which were mended
    python -m bench.leaks --show           # also what was flagged without being planted, and the leaks that were missed

Needs ../shared (data and bench). Half of each benchmark's rows, drawn by the seed, is indexed; leaks are planted from
it: exact; re-wrapped; options shuffled and lettered anew; the first or last half alone. The other half is planted as
it is: questions of the same kind that are not in the index. Items with every number changed are planted too and
shown apart: whether such a copy is a leak is a matter of taste. Everything else in the records stays real.
"""

import argparse
import gzip
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from posttrain.data.benchmarks import UNIT, read_benchmarks
from posttrain.data.decontaminate import index_of, leaks
from posttrain.data.files import read_rows
from posttrain.data.folding import fold
from posttrain.text import key_text

SHARED = Path(__file__).resolve().parents[2] / "shared"
SETS = {
    "tuning": ("cmmlu", "gsm8k", "thucnews", "belle_eval"),
    "seen": ("safetybench", "alignbench", "cmrc2018", "mt_bench_zh", "mt_bench_en", "xstest", "do_not_answer",
             "truthfulqa_mobileaibench", "followbench_zh", "winogrande_mosaic"),
    "final": ("advbench", "criskeval_zh", "cvalues_responsibility", "alpaca_eval_pairs", "autoj_pairwise", "coig_cqia"),
}  # fmt: skip
EXAMS = "*multi*choice*", "exam__law*"  # of coig_cqia: exam questions with options, taken as a benchmark
KINDS = ("exact", "re-wrapped", "shuffled", "half")
HARD = ("sibling", "numbers changed")
PER_KIND = 60  # of each kind and benchmark at most
# Lines of sft_zh_en.jsonl.gz that hold a benchmark's item by themselves: each was read.
REAL_LEAKS = {5556, *range(27047, 27053), 27054, 27779, 27875, 27891, 28048, 28103, 28583}
LONG = 52  # units; half of such a question is two 13-grams long


class Row(NamedTuple):
    """A benchmark's row as people would quote it; read here without data/benchmarks.py."""

    question: str
    options: tuple[str, ...] = ()
    cells: tuple[str, ...] = ()
    """The texts that tell its items, where those are not the question."""
    group: str = ""
    """Rows of one group are variants: they are indexed together or not at all. Default: the question."""

    def groups(self) -> str:
        return key_text(self.group or self.question)


def paths_of(task: str) -> list[Path]:
    """What is looked for of a benchmark in ../shared/data."""
    folder = SHARED / "data" / task
    return [file for pattern in EXAMS for file in sorted(folder.glob(pattern))] if task == "coig_cqia" else [folder]


def rows_of(task: str) -> list[Row]:
    """The rows of one benchmark."""
    found = []
    for file in sorted(p for path in paths_of(task) for p in ([path] if path.is_file() else path.rglob("*"))):
        if not file.is_file():
            continue
        if task == "thucnews":
            lines = file.read_text(encoding="utf-8").splitlines()
            found += [Row(line.split("\t")[0]) for line in lines if "\t" in line]
        elif task == "cmrc2018" and file.name.startswith("flat"):
            for passage in json.loads(file.read_text(encoding="utf-8")):
                text = passage["context_text"]
                found += [Row(f"{text}\n{asked['query_text']}", (), (text,), text) for asked in passage["qas"]]
        elif task not in ("thucnews", "cmrc2018") and "train." not in file.name and "answers" not in file.name:
            found += [quoted(task, row) for _, row in read_rows(file)]
    return list(dict.fromkeys(row for row in found if len(UNIT.findall(row.question)) > 1))


def quoted(task: str, row: dict) -> Row:
    """One row's question and options."""
    if task == "cmmlu":
        return Row(row["Question"], tuple(row[letter] for letter in "ABCD"))
    if task == "safetybench":
        return Row(row["question"], tuple(row["options"]))
    if task.startswith("mt_bench"):
        return Row(row["turns"][0])
    if task == "winogrande_mosaic":
        both = tuple(f"{text} {row['continuation']}" for text in row["context_options"])
        return Row(both[row["gold"]], (), both)
    if task == "coig_cqia":
        text = "\n".join((row["instruction"], row["input"])).strip()
        question, *options = re.split(r"\s*(?<![A-Za-z])[A-F] ?[.．、:：]", text)
        return Row(question, tuple(options))
    if task == "truthfulqa_mobileaibench":
        question, *options = re.split(r"\n+[A-Z]\. ", row["prompt"])
        return Row(question, tuple(options))
    if task == "followbench_zh":
        return Row(row["instruction"], group=f"{row['category']} {row['example_id']}")
    names = ("question", "question_zh", "prompt", "goal", "instruction")
    return Row(next(row[name] for name in names if row.get(name)))


# ------------------------------------------------------------------ planting


LETTERS = ("{}. ", "{}．", "({}) ", "（{}）", "{}: ", "{}、")
WRAPPINGS = (
    "请回答下面的问题：\n{}", "{}\n请给出解题过程。", "下面是一道考题，请作答。\n\n{}\n\n答案：", "问：{}\n答：",
    "【题目】{}", "Answer the following question.\n{}", "Question: {}\nAnswer:",
    "Here is a task:\n\n{}\n\nThink step by step.",
    "**{}**", "## Task\n\n{}\n", "<question>{}</question>", "```\n{}\n```",
)  # fmt: skip
WIDE = str.maketrans("，！？：；（）", ",!?:;()")
NARROW = {ord(b): a for a, b in zip("，！？：；", ",!?:;", strict=True)}


def written(row: Row, dice: random.Random, order: list[int] | None = None, label: str = "{}. ", gap: str = "\n") -> str:
    """Question and lettered options."""
    options = [row.options[i] for i in order or range(len(row.options))]
    return gap.join([row.question] + [label.format("ABCDEFGHIJKLM"[i]) + text for i, text in enumerate(options)])


def rewrapped(row: Row, dice: random.Random, around: str) -> str:
    """The same words with other things around them: instructions, mark-up, JSON, line breaks, punctuation of another
    width, other letters of the options, other text in front or behind."""
    text = written(row, dice, None, dice.choice(LETTERS), dice.choice(("\n", "\n\n", "  ")))
    way = dice.randrange(6)
    if way == 0:
        return dice.choice(WRAPPINGS).format(text)
    if way == 1:
        return text.translate(WIDE) if dice.random() < 0.5 else text.translate(NARROW)
    if way == 2:
        return broken_lines(text, dice.randrange(18, 60))
    if way == 3:
        cells = {"id": dice.randrange(999), "question": row.question, "choices": row.options}
        return json.dumps(cells, ensure_ascii=False)
    if way == 4:
        return "\n".join(f"> {line}" for line in text.split("\n"))
    return f"{around}\n\n{text}" if dice.random() < 0.5 else f"{text}\n\n{around}"


def broken_lines(text: str, width: int) -> str:
    """Lines of about `width` characters, broken at spaces or between Chinese characters."""
    lines, line = [], ""
    for piece in re.findall(r"[一-鿿]|[^\s一-鿿]+|\s", text):
        line += piece
        if len(line) >= width:
            lines.append(line.rstrip(" "))
            line = ""
    return "\n".join([*lines, line])


def half(row: Row, dice: random.Random) -> str:
    """The first or the last half of the text, in units."""
    text = written(row, dice)
    places = [match.start() for match in UNIT.finditer(text)]
    middle = places[(len(places) + 1) // 2]
    return text[:middle] if dice.random() < 0.5 else text[places[len(places) // 2] :]


def other_numbers(row: Row, dice: random.Random) -> str | None:
    """The text with each number changed; None without numbers."""
    text = written(row, dice)
    changed = re.sub(r"\d+", lambda m: str(int(m[0]) + dice.randrange(1, 9 * 10 ** (len(m[0]) - 1) + 1)), row.question)
    return text.replace(row.question, changed, 1) if changed != row.question else None


def planted_text(kind: str, row: Row, dice: random.Random, around: str) -> str | None:
    """What stands in the record, or None if a row cannot be planted in this way."""
    if kind == "re-wrapped":
        return rewrapped(row, dice, around)
    if kind == "shuffled":
        order = list(range(len(row.options)))
        dice.shuffle(order)
        return written(row, dice, order) if len(order) > 1 and order != sorted(order) else None
    makers: dict[str, Callable] = {"half": half, "numbers changed": other_numbers}
    return makers.get(kind, written)(row, dice)


def real_records(tasks: tuple[str, ...]) -> list[list[str]]:
    """The turns of each record of the bench corpus; its rows of belle_eval and coig_cqia are left out where those are
    the benchmarks."""
    found = []
    with gzip.open(SHARED / "bench" / "sft_zh_en.jsonl.gz", "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if row["source"] in tasks:
                continue
            if "conversations" in row:
                found.append([turn["value"] for turn in row["conversations"]])
            else:
                history = [text for pair in row.get("history") or [] for text in pair]
                asked = "\n".join(text for text in (row["instruction"], row["input"]) if text)
                found.append([*history, asked, row["output"]])
    return found


def plants(rows: list[Row], indexed: set[str], dice: random.Random) -> Iterator[tuple[str, Row]]:
    """(kind, row) of what is planted of one benchmark."""
    for kind in (*KINDS, *HARD):
        wanted = [row for row in rows if (row.groups() in indexed) == (kind != "sibling")]
        if kind == "shuffled":
            wanted = [row for row in wanted if len(row.options) > 1]
        elif kind == "numbers changed":
            wanted = [row for row in wanted if re.search(r"\d", row.question)]
        yield from ((kind, row) for row in dice.sample(wanted, min(PER_KIND, len(wanted))))


# ------------------------------------------------------------------ the figures


def wilson(hits: int, of: int) -> str:
    """Share and its 95 % interval (Wilson 1927)."""
    if not of:
        return "-"
    z, p = 1.96, hits / of
    middle, spread = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    low, high = ((middle + sign * spread) / (1 + z * z / of) for sign in (-1, 1))
    return f"{p:.3f} [{low:.3f}, {high:.3f}] of {of}"


def report(found: list[str | None], planted: dict[int, tuple], tasks: tuple[str, ...], show: bool, texts: list) -> None:
    """Print the table. A planted record counts as found if any item is named."""
    count = Counter((kind, task, bool(found[n])) for n, (kind, task, _) in planted.items())
    print(f"\n{'share found':>26} " + " ".join(f"{kind:>15}" for kind in (*KINDS, *HARD)))
    for task in tasks:
        cells = [(count[kind, task, True], count[kind, task, False]) for kind in (*KINDS, *HARD)]
        print(f"{task:>26} " + " ".join(f"{f'{a} of {a + b}' if a + b else '-':>15}" for a, b in cells))
    totals = {kind: [sum(count[kind, t, hit] for t in tasks) for hit in (True, False)] for kind in (*KINDS, *HARD)}
    for kind, (hits, misses) in totals.items():
        print(f"  {kind:>15}: {wilson(hits, hits + misses)}")
    long = [bool(found[n]) for n, (kind, _, row) in planted.items()
            if kind == "half" and len(UNIT.findall(row.question)) >= LONG]  # fmt: skip
    print(f"  {'half of long':>15}: {wilson(sum(long), len(long))}")
    flagged = [n for n, detail in enumerate(found) if detail and n not in planted]
    wrong = [n for n in flagged if n + 1 not in REAL_LEAKS]
    right = sum(totals[kind][0] for kind in KINDS) + len(flagged) - len(wrong)
    print(f"  {len(flagged)} real records flagged, {len(flagged) - len(wrong)} of them leaks by reading")
    for name, false in (("siblings count as false", totals["sibling"][0]),
                        ("changed numbers too", totals["sibling"][0] + totals["numbers changed"][0])):  # fmt: skip
        print(f"  precision, {name}: {wilson(right, right + len(wrong) + false)}")
    if show:
        for n, detail in enumerate(found):
            kind = planted[n][0] if n in planted else "real"
            if (detail and (kind == "real" or kind in HARD)) or (not detail and kind in KINDS[:3]):
                print(f"\n{'FOUND' if detail else 'MISSED'} {kind} {n + 1} {detail or planted[n][1]}\n    "
                      + " | ".join(texts[n])[:400].replace("\n", "/"))  # fmt: skip


def main() -> None:
    """Print recall by kind and benchmark, and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, default="final")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--min-coverage", type=float, default=0.5)
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()
    if not SHARED.is_dir():
        raise SystemExit(f"{SHARED} is not there: nothing to measure on")
    dice, tasks = random.Random(args.seed), SETS[args.set]
    records, items, planted = real_records(tasks), [], {}
    targets = iter(dice.sample([n for n in range(len(records)) if n + 1 not in REAL_LEAKS], len(records) // 2))
    for task in tasks:
        rows = rows_of(task)
        groups = sorted({row.groups() for row in rows})
        indexed = set(dice.sample(groups, len(groups) // 2))
        left_out = {key_text(text) for row in rows if row.groups() not in indexed
                    for text in row.cells or (row.question,)}  # fmt: skip
        found, _ = read_benchmarks(paths_of(task))
        items += [item for item in found if not any(key_text(text) in left_out for text in item.question)]
        for kind, row in plants(rows, indexed, dice):
            number = next(targets)
            if text := planted_text(kind, row, dice, records[number][0]):
                records[number] = [text, *records[number][1:]]
                planted[number] = kind, task, row
    began = time.process_time()
    index = index_of(items)
    print(f"{len(items)} items of {len(tasks)} benchmarks, {len(index.keys)} keys: {time.process_time() - began:.1f} s")
    folded = iter(fold([text for turns in records for text in turns]).texts())
    texts = [[next(folded) for _ in turns] for turns in records]
    began = time.process_time()
    found = []
    for at in range(0, len(texts), 2700):  # about a block of 4 MiB
        found += leaks(index, texts[at : at + 2700], args.min_coverage)
    chars = sum(len(text) for turns in texts for text in turns)
    print(f"{len(texts)} records, {chars / 1e6:.1f} M characters: {time.process_time() - began:.2f} CPU s")
    report(found, planted, tasks, args.show, texts)


if __name__ == "__main__":
    main()
