"""
One block, from raw rows to a part on disk: the map of prepare_data, a pure function of a block and a task.

A part is five files: the clean records as JSON lines, their columns (what mixing and splitting need), their MinHash
bands, their keys (what near duplicates are verified by), the dropped rows; and a summary, written last: its presence
means that the part is whole.
"""

import hashlib
import json
from collections import Counter
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
from posttrain.data.mix import unit_digest
from posttrain.data.reading import Item, Tally, items_in
from posttrain.data.shape import Texts, gathered, has_calls, replace_text, turns_of
from posttrain.data.telling import readable
from posttrain.data_blocks import Rules
from posttrain.runs import write_json
from posttrain.text import has_lone_surrogate
from posttrain.text_forms import about_markup, written

SAMPLES = 3  # of each reason, per part
COLUMNS = np.dtype([
    ("digest", "u8", 2), ("order", "u8"), ("prompt", "u8"), ("answer", "u8"), ("other", "u8"), ("opening", "u8"),
    ("group", "u8"), ("chars", "u4"), ("tokens", "u4"), ("bytes", "u4"), ("key_bytes", "u4"), ("flags", "u4"),
    ("source", "u2"), ("turns", "u2"), ("lang", "u1"),
])  # fmt: skip
# Per record, 89 bytes. digest: of the whole key; order, prompt: mix.unit_hash of id and question; answer, other: of
# the answer (of a pair: chosen and rejected); opening: of its first 12 characters; group: of meta.post; flags: bits
# of FLAGS.
HASHED = ("digest", "order", "prompt", "answer", "other", "opening", "group")
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
    active: frozenset[str]
    """Rules that are on in some source."""
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
    tools = checks.tools_for(task.active, task.words, task.blacklist, task.benchmarks, task.min_coverage,
                             task.tokenizer)  # fmt: skip
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
        for number, text in texts.folded.training.items():
            owner = int(np.searchsorted(texts.bounds[1:], number, "right"))
            replace_text(texts.records[owner], number - int(texts.bounds[owner]), text)
        by_hand = ~texts.folded.as_written
        by_hand[list(texts.folded.training)] = False
        changed = np.flatnonzero(by_hand)
    else:
        changed = np.arange(len(texts.originals))
    owners = np.searchsorted(texts.bounds[1:], changed, "right")
    for number, owner in zip(changed.tolist(), owners.tolist(), strict=True):
        before, first = texts.originals[number], int(texts.bounds[owner])
        after = written(before, task.text_form, False)
        if task.strip_html and ("<" in before or "&" in before):
            stripped = written(before, task.text_form, True)
            # Markup is left where any turn of the record speaks of it.
            if stripped != after and not any(map(about_markup, texts.originals[first : texts.bounds[owner + 1]])):
                after = stripped
        if after != before:
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
    hashed: dict[str, list[bytes]] = {name: [] for name in HASHED}
    keys, flags, nothing = [], [], bytes(8)
    for number in kept.tolist():
        record, first, last = texts.records[number], bounds[number], bounds[number + 1] - 1
        keys.append(key := whole[ends[first] : ends[last + 1]].encode())
        hashed["digest"].append(digest(key + calls_of(record), 16))
        asked = first + question_of(record)
        question = whole[ends[asked] : ends[asked + 1]]
        answered = last - ("chosen" in record)
        answer = whole[ends[answered] : ends[answered + 1]]
        group = record["meta"].get("post")
        hashed["order"].append(unit_digest(task.seed, record["id"]))
        hashed["prompt"].append(unit_digest(task.seed, question[:64] if "text" in record else question))
        hashed["answer"].append(digest(answer.encode()))
        hashed["other"].append(digest(whole[ends[last] : ends[last + 1]].encode()) if "chosen" in record else nothing)
        hashed["opening"].append(digest(answer[:12].encode()))
        hashed["group"].append(nothing if group is None else digest(str(group).encode()))
        flagged = found.flags.get(number)
        flags.append(sum(1 << FLAGS.index(name) for name, _ in flagged) if flagged else 0)
    for name, values in hashed.items():
        columns[name] = np.frombuffer(b"".join(values), ">u8").reshape(columns[name].shape)
    columns["flags"] = flags
    columns["chars"], columns["tokens"] = found.chars[kept], found.tokens[kept]
    columns["bytes"], columns["key_bytes"] = [len(line) for line in lines], [len(key) for key in keys]
    columns["source"], columns["lang"] = block.source, found.languages[kept]
    columns["turns"] = np.minimum(found.turns[kept], 65535)
    bands = kernels.band_hashes(*kernels.shingle_hashes(codes, starts[texts.bounds])) if len(kept) else np.zeros((0, 0))
    return columns, keys, np.ascontiguousarray(bands[:, kept])


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


def digest(data: bytes, length: int = 8) -> bytes:
    """The first bytes of SHA-256."""
    return hashlib.sha256(data).digest()[:length]
