"""
One block, from raw rows to a part on disk: the map of prepare_data, a pure function of a block and a task.

A part is five files: the clean records as JSON lines, their columns (what mixing and splitting need), their MinHash
bands, their keys (what near duplicates are verified by), the dropped rows; and a summary, written last: its presence
means that the part is whole.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import orjson
import zstandard

from posttrain.config import shown
from posttrain.data import checks, kernels
from posttrain.data.blocks import Block, rows_of
from posttrain.data.catalogue import Source
from posttrain.data.jsonfiles import Fault
from posttrain.data.mix import unit_hash
from posttrain.data.reading import Item, Tally, items_in
from posttrain.data.shape import Texts, gathered, has_calls, replace_text, turns_of
from posttrain.data.telling import readable
from posttrain.data_blocks import Rules
from posttrain.runs import write_json
from posttrain.text import has_lone_surrogate
from posttrain.text_forms import MARKUP, about_markup, written

SAMPLES = 3  # of each reason, per part
COLUMNS = np.dtype([
    ("digest", "u8", 2), ("order", "u8"), ("prompt", "u8"), ("answer", "u8"), ("other", "u8"), ("opening", "u8"),
    ("group", "u8"), ("chars", "u4"), ("tokens", "u4"), ("bytes", "u4"), ("key_bytes", "u4"), ("flags", "u4"),
    ("source", "u2"), ("turns", "u2"), ("lang", "u1"),
])  # fmt: skip
# Per record, 97 bytes. digest: of the whole key; order, prompt: mix.unit_hash of id and question; answer, other: of
# the answer (of a pair: chosen and rejected); opening: of its first 12 characters; group: of meta.post; flags: bits
# of FLAGS.
FLAGS = tuple(name for name, field in Rules.model_fields.items() if "flag" in get_args(field.annotation))


class Task(NamedTuple):
    """What the blocks of one set have in common."""

    kind: str
    """sft, pref or text."""
    directory: Path
    """Where the parts go."""
    sources: list[Source]
    """In the order of the mix."""
    text_form: str
    strip_html: bool
    seed: int
    words: tuple[tuple[str, Path], ...]
    """(topic, word list)."""
    blacklist: tuple[str, ...]
    benchmarks: Path | None
    """The index that decontaminate.build wrote, or None."""
    min_coverage: float
    tokenizer: Path | None
    """A tokenizer.json."""


# ------------------------------------------------------------------ the map


def process(block: Block, task: Task) -> dict:
    """Make a block's part and return its summary; a part that is whole already is not made again."""
    summary_path = part_path(task.directory, block.number, "json")
    if summary_path.is_file():
        return json.loads(summary_path.read_text(encoding="utf-8"))
    done = cleaned(block, task)
    summary = write_part(block, task, done) | {
        "block": block.number, "source": block.source, "read": done.read, "dropped": dict(done.dropped.reasons),
        "samples": done.dropped.samples,
        "tallies": [[shown(file), t.rows, t.used, t.bad, t.shown] for file, t in done.tallies.items()],
    }  # fmt: skip
    write_json(summary_path, summary)
    return summary


class Cleaned(NamedTuple):
    """A block after its rules."""

    read: int
    """Records, and rows that gave none."""
    tallies: dict[Path, Tally]
    items: list[Item]
    """Of the records, those that are dropped among them."""
    texts: Texts
    found: checks.Found
    kept: np.ndarray
    """Numbers of the records that stay."""
    dropped: "Dropped"


def cleaned(block: Block, task: Task) -> Cleaned:
    """Read a block, write its training text, apply the rules. Nothing is put on disk: the dry run shows this much."""
    source, tallies = task.sources[block.source], dict(block.tallies or {})
    items = block.items
    if items is None:
        tally = tallies[block.file] = Tally()
        items = list(items_in(rows_of(block), block.file, source, task.kind, tally))
    dropped, records, kept = Dropped(source.key), [], []
    for item in items:
        if isinstance(item.result, Fault):
            dropped.add(*item.result, item, item.raw)
        else:
            records.append(item)
    texts = gathered([item.result for item in records])
    write_training_text(texts, task)
    tools = checks.tools_for(task.words, task.blacklist, task.benchmarks, task.min_coverage, task.tokenizer)
    found = checks.check(texts, source.rules, tools)
    for number, (item, reason) in enumerate(zip(records, found.reasons, strict=True)):
        if reason:
            dropped.add(*reason, item, item.result)
        else:
            kept.append(number)
    return Cleaned(len(items), tallies, records, texts, found, np.array(kept, np.int64), dropped)


def part_path(directory: Path, number: int, ending: str) -> Path:
    """A file of a part: 000012.jsonl."""
    return directory / f"{number:06d}.{ending}"


def write_training_text(texts: Texts, task: Task) -> None:
    """Put the text that is trained on into the records, in place. Most texts are as they should be and stay."""
    if task.text_form == "raw":
        changed = np.flatnonzero([has_lone_surrogate(text) for text in texts.originals])
    elif task.text_form == "zh_safe":
        changed = np.flatnonzero(~texts.folded.as_written)
    else:
        changed = np.arange(len(texts.originals))
    owners = np.searchsorted(texts.bounds[1:], changed, "right")
    for number, owner in zip(changed.tolist(), owners.tolist(), strict=True):
        before, first = texts.originals[number], int(texts.bounds[owner])
        strip = task.strip_html and ("<" in before or "&" in before) and MARKUP.search(before) is not None
        # Markup is left where any turn of the record speaks of it.
        strip = strip and not any(map(about_markup, texts.originals[first : texts.bounds[owner + 1]]))
        if (after := written(before, task.text_form, strip)) != before:
            replace_text(texts.records[owner], number - first, after)


# ------------------------------------------------------------------ the part


class Dropped:
    """The rows and records of a block that are left out, as lines, counted by reason, with a few samples."""

    def __init__(self, source: str):
        self.source, self.lines, self.reasons, self.samples = source, [], Counter(), {}

    def add(self, reason: str, detail: str, item: Item, record: Any) -> None:
        self.reasons[reason] += 1
        entry = {"reason": reason, "detail": detail, "source": self.source, "file": shown(item.file), "line": item.line,
                 "record": record}  # fmt: skip
        self.lines.append(as_line(entry))
        samples = self.samples.setdefault(reason, [])
        if len(samples) < SAMPLES:
            samples.append({"source": self.source, "place": f"{shown(item.file)}:{item.line}", "detail": detail[:400],
                            "record": readable(record)})  # fmt: skip


def as_line(value: Any) -> bytes:
    """A JSON line. A lone surrogate cannot be encoded; written as \\udXXX it is the JSON escape that it came from."""
    try:
        return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:
        return (json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str) + "\n").encode(
            "utf-8", "backslashreplace")  # fmt: skip


def write_part(block: Block, task: Task, done: Cleaned) -> dict:
    """Write everything but the summary; returns what it adds to it."""
    items, found, kept = done.items, done.found, done.kept
    flags, repairs, flagged_samples, lines = Counter(), Counter(), {}, []
    names = {file: shown(file) for file in {item.file for item in items}}
    for number in kept.tolist():
        item, flagged = items[number], found.flags.get(number)
        record = item.result
        meta = record["meta"] | {"lang": kernels.LANGUAGES[found.languages[number]], "chars": int(found.chars[number]),
                                 "file": names[item.file], "line": item.line}  # fmt: skip
        repairs.update(meta.get("repairs", ()))
        if flagged:
            meta["flags"] = [name for name, _ in flagged]
            for name, detail in flagged:
                flags[name] += 1
                samples = flagged_samples.setdefault(name, [])
                if len(samples) < SAMPLES:
                    samples.append({"source": record["source"], "place": f"{meta['file']}:{meta['line']}",
                                    "detail": detail[:400], "record": readable(record)})  # fmt: skip
        lines.append(as_line(record | {"meta": meta}))
    columns, keys, bands = columns_of(block, task, done.texts, kept, found, lines)
    for ending, content in (("jsonl", lines), ("keys", keys)):
        with open(part_path(task.directory, block.number, ending), "wb") as out:
            out.writelines(content)
    np.save(part_path(task.directory, block.number, "columns.npy"), columns)
    np.save(part_path(task.directory, block.number, "bands.npy"), bands)
    packed = b"".join(done.dropped.lines)
    packed = zstandard.ZstdCompressor(level=3).compress(packed) if packed else b""
    part_path(task.directory, block.number, "dropped.zst").write_bytes(packed)
    return {"records": len(kept), "flagged": dict(flags), "flagged_samples": flagged_samples, "repairs": dict(repairs)}


def columns_of(block: Block, task: Task, texts: Texts, kept: np.ndarray, found: checks.Found,
               lines: list[bytes]) -> tuple:  # fmt: skip
    """(columns, keys as UTF-8, band hashes) of the records that stay."""
    columns = np.zeros(len(kept), COLUMNS)
    codes, starts = kernels.keys(texts.folded, np.arange(len(texts.originals) + 1))  # of each turn
    whole, ends, bounds = codes.tobytes().decode("utf-32-le"), starts.tolist(), texts.bounds.tolist()
    hashed: dict[str, list[int]] = {name: [] for name in ("order", "prompt", "answer", "other", "opening", "group")}
    keys, digests, flags = [], [], []
    for number in kept.tolist():
        record, first, last = texts.records[number], bounds[number], bounds[number + 1] - 1
        keys.append(key := whole[ends[first] : ends[last + 1]].encode())
        digests.append(hashlib.sha256(key + calls_of(record)).digest()[:16])
        asked = first + question_of(record)
        question = whole[ends[asked] : ends[asked + 1]]
        answered = last - ("chosen" in record)
        answer = whole[ends[answered] : ends[answered + 1]]
        hashed["order"].append(unit_hash(task.seed, record["id"]))
        hashed["prompt"].append(unit_hash(task.seed, question[:64] if "text" in record else question))
        hashed["answer"].append(hash64(answer))
        hashed["other"].append(hash64(whole[ends[last] : ends[last + 1]]) if "chosen" in record else 0)
        hashed["opening"].append(hash64(answer[:12]))
        group = record["meta"].get("post")
        hashed["group"].append(0 if group is None else hash64(str(group)))
        flagged = found.flags.get(number)
        flags.append(sum(1 << FLAGS.index(name) for name, _ in flagged) if flagged else 0)
    if keys:
        columns["digest"] = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
    for name, values in hashed.items():
        columns[name] = values
    columns["flags"] = flags
    columns["chars"], columns["tokens"] = found.chars[kept], found.tokens[kept]
    columns["bytes"], columns["key_bytes"] = [len(line) for line in lines], [len(key) for key in keys]
    columns["source"], columns["lang"] = block.source, found.languages[kept]
    columns["turns"] = np.minimum(found.turns[kept], 65535)
    starts = starts[texts.bounds]
    inside, offsets = kernels.ranges(starts[kept], np.diff(starts)[kept])
    return columns, keys, kernels.band_hashes(*kernels.shingle_hashes(codes[inside], offsets))


def calls_of(record: dict) -> bytes:
    """Tools and tool calls, which tell records apart that say the same."""
    if "tools" not in record and not has_calls(record):
        return b""
    calls = [turn["tool_calls"] for turn in turns_of(record) if "tool_calls" in turn]
    return orjson.dumps([calls, record.get("tools")], option=orjson.OPT_SORT_KEYS)


def question_of(record: dict) -> int:
    """Which turn is the first question: records that share it stand on one side of every split."""
    turns = record.get("messages") or record.get("prompt") or [record]
    return 1 if turns[0].get("role") == "system" else 0  # records.fault_in: a system turn, then the question


def hash64(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def kept_lines(directory: Path, number: int) -> Iterator[bytes]:
    """The clean records of a part, as lines."""
    with open(part_path(directory, number, "jsonl"), "rb") as lines:
        yield from lines
