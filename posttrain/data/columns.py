"""
Columns: what the reduce knows of each record, 89 bytes and its MinHash bands.

What is compared is what will be trained on: with placeholders for personal data, without tags, and with tool calls.
"""

import hashlib
from typing import NamedTuple, get_args

import numpy as np
import orjson

from posttrain.data import checks, kernels
from posttrain.data.mix import unit_digest
from posttrain.data.shape import PARTS, Texts, gathered
from posttrain.data_blocks import Rules

COLUMNS = np.dtype([
    ("digest", "u8", 2), ("order", "u8"), ("prompt", "u8"), ("answer", "u8"), ("other", "u8"), ("opening", "u8"),
    ("group", "u8"), ("chars", "u4"), ("tokens", "u4"), ("bytes", "u4"), ("key_bytes", "u4"), ("flags", "u4"),
    ("source", "u2"), ("turns", "u2"), ("lang", "u1"),
])  # fmt: skip
# Per record, 89 bytes. digest: of the whole key; order, prompt: mix.unit_digest of id and question; answer, other: of
# the answer (of a pair: chosen and rejected); opening: of its first 12 characters; group: of meta.post; flags: bits
# of FLAGS.
HASHED = ("digest", "order", "prompt", "answer", "other", "opening", "group")
FLAGS = tuple(name for name, field in Rules.model_fields.items() if "flag" in get_args(field.annotation))


class Keys(NamedTuple):
    """The key texts of records, turn by turn."""

    text: str
    """Of all turns."""
    codes: np.ndarray
    """The same as code points."""
    turns: list[int]
    """Where each turn begins in it, and the end."""
    records: list[int]
    """Which turn each record begins with, and the end."""

    def of(self, first: int, last: int) -> str:
        """The key of these turns, last included."""
        return self.text[self.turns[first] : self.turns[last + 1]]

    def bands(self) -> np.ndarray:
        """kernels.band_hashes of the records."""
        starts = np.array([self.turns[turn] for turn in self.records], np.int64)
        return kernels.band_hashes(*kernels.shingle_hashes(self.codes, starts))


def keys_of(texts: Texts) -> Keys:
    """text.key_text of every turn."""
    codes, starts = kernels.keys(texts.folded, np.arange(len(texts.originals) + 1))
    return Keys(codes.tobytes().decode("utf-32-le"), codes, starts.tolist(), texts.bounds.tolist())


def columns_of(source: int, seed: int, texts: Texts, kept: np.ndarray, found: checks.Found,
               lines: list[bytes]) -> tuple:  # fmt: skip
    """(columns, keys as UTF-8, band hashes) of the records that stay. source: their place in the mix; lines: as they
    are written."""
    columns = np.zeros(len(kept), COLUMNS)
    hashed: dict[str, list[bytes]] = {name: [] for name in HASHED}
    # What is compared is what will be trained on: placeholders instead of personal data, and tool calls.
    other = [n for n in kept.tolist() if n in found.masked or n in texts.calling]
    place = {number: at for at, number in enumerate(other)}
    common, own = keys_of(texts), keys_of(gathered([with_calls(texts.records[n]) for n in other]))
    keys, flags, nothing = [], [], bytes(8)
    for number in kept.tolist():
        record, at = texts.records[number], place.get(number)
        said, at = (common, number) if at is None else (own, at)
        first, last = said.records[at], said.records[at + 1] - 1
        keys.append(key := said.of(first, last).encode())
        hashed["digest"].append(digest(key + tools_of(record), 16))
        asked, answered = first + question_of(record), last - ("chosen" in record)
        question, answer, group = said.of(asked, asked), said.of(answered, answered), record["meta"].get("post")
        hashed["order"].append(unit_digest(seed, record["id"]))
        hashed["prompt"].append(unit_digest(seed, question[:64] if "text" in record else question))
        hashed["answer"].append(digest(answer.encode()))
        hashed["other"].append(digest(said.of(last, last).encode()) if "chosen" in record else nothing)
        hashed["opening"].append(digest(answer[:12].encode()))
        hashed["group"].append(nothing if group is None else digest(str(group).encode()))
        flagged = found.flags.get(number)
        flags.append(sum(1 << FLAGS.index(name) for name, _ in flagged) if flagged else 0)
    for name, values in hashed.items():
        columns[name] = np.frombuffer(b"".join(values), ">u8").reshape(columns[name].shape)
    columns["flags"] = flags
    columns["chars"], columns["tokens"] = found.chars[kept], found.tokens[kept]
    columns["bytes"], columns["key_bytes"] = [len(line) for line in lines], [len(key) for key in keys]
    columns["source"], columns["lang"] = source, found.languages[kept]
    columns["turns"] = np.minimum(found.turns[kept], 65535)
    bands = common.bands()
    if other:
        bands[:, other] = own.bands()
    return columns, keys, np.ascontiguousarray(bands[:, kept])


def with_calls(record: dict) -> dict:
    """A copy in which each tool call is part of what its turn says."""
    copy = dict(record)
    for part in PARTS:
        for number, turn in enumerate(record.get(part, ())):
            if calls := turn.get("tool_calls"):
                said = turn["content"] + orjson.dumps(calls, option=orjson.OPT_SORT_KEYS).decode()
                copy[part] = [*copy[part][:number], turn | {"content": said}, *copy[part][number + 1 :]]
    return copy


def tools_of(record: dict) -> bytes:
    """The tools on offer, which tell records apart that say the same."""
    return orjson.dumps(record["tools"], option=orjson.OPT_SORT_KEYS) if "tools" in record else b""


def question_of(record: dict) -> int:
    """Which turn is the first question. Records that share it, conversations and pairs alike, stand on one side of a
    split by shares in which near duplicates are dropped; a unit of several prompts, or fixed counts, may put a prompt
    elsewhere in one set than in the other."""
    turns = record.get("messages") or record.get("prompt") or [record]
    return 1 if turns[0].get("role") == "system" else 0  # records.fault_in: a system turn, then the question


def digest(data: bytes, length: int = 8) -> bytes:
    """The first bytes of SHA-256."""
    return hashlib.sha256(data).digest()[:length]
