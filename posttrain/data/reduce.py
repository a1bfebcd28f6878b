"""
The reduce of prepare_data: from the columns of all parts to the fate of every record.

Only columns are held in memory (about 0.1 KB a record); lines are read where they are written. A fate is 0 (a
candidate) or the number of its reason in REASONS.
"""

import os
import resource
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from posttrain.data.block import part_path
from posttrain.data.catalogue import Source
from posttrain.data.columns import COLUMNS, FLAGS
from posttrain.data.executor import Map
from posttrain.data.near import KeyFile, clusters

REASONS = ("", "exact_duplicate", "near_duplicate", "repeated_answer", "repeated_opening", "post_limit", "quota")
OPENINGS_AT_LEAST = 50
READ_AT_ONCE = 8192  # lines


class Parts:
    """The clean records of all parts, numbered through in the order of the blocks."""

    def __init__(self, directory: Path, summaries: list[dict]):
        self.directory = directory
        self.numbers = [summary["block"] for summary in summaries if summary["records"]]
        sizes = [summary["records"] for summary in summaries if summary["records"]]
        self.begins = np.cumsum([0, *sizes])
        self.columns = np.empty(self.begins[-1], COLUMNS)
        for index, number in enumerate(self.numbers):
            own = np.fromfile(part_path(directory, number, "columns"), COLUMNS)
            self.columns[self.begins[index] : self.begins[index + 1]] = own
        ends = np.cumsum(self.columns["bytes"], dtype=np.int64)
        self.offsets = ends - self.columns["bytes"]  # of each line in its part
        for begin, end in zip(self.begins, self.begins[1:], strict=False):
            self.offsets[begin:end] -= self.offsets[begin]
        self._open = lru_cache(files_open_at_most())(self._opened)

    def __len__(self) -> int:
        return len(self.columns)

    def key_files(self) -> list[KeyFile]:
        """For near.clusters."""
        return [
            KeyFile(part_path(self.directory, number, "keys"), part_path(self.directory, number, "bands"),
                    self.columns["key_bytes"][self.begins[index] : self.begins[index + 1]])
            for index, number in enumerate(self.numbers)
        ]  # fmt: skip

    def _opened(self, index: int) -> BinaryIO:
        return open(part_path(self.directory, self.numbers[index], "jsonl"), "rb")  # noqa: SIM115 (closed when evicted)

    def lines(self, numbers: np.ndarray) -> Iterator[bytes]:
        """The lines of these records, in this order."""
        for at in range(0, len(numbers), READ_AT_ONCE):  # these many in the order of the files, for the sake of disks
            some = numbers[at : at + READ_AT_ONCE]
            order = np.argsort(some, kind="stable")
            ranked = some[order]
            parts = np.searchsorted(self.begins, ranked, "right") - 1
            places = (parts.tolist(), self.columns["bytes"][ranked].tolist(), self.offsets[ranked].tolist())
            found = [b""] * len(some)
            for place, part, length, offset in zip(order.tolist(), *places, strict=True):
                found[place] = os.pread(self._open(part).fileno(), length, offset)
            yield from found


def files_open_at_most() -> int:
    """Half of what the system allows this process, after asking for up to 8,192."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8192 if hard == resource.RLIM_INFINITY else min(hard, 8192)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(soft, wanted) // 2


class Fates:
    """What becomes of each record: its reason, the record it is a duplicate of, the flags that the reduce adds."""

    def __init__(self, parts: Parts, sources: list[Source]):
        self.parts, self.sources = parts, sources
        self.source = parts.columns["source"]
        self.reason = np.zeros(len(parts), np.uint8)
        self.like = np.full(len(parts), -1, np.int64)
        self.flags = parts.columns["flags"].copy()

    def actions(self, name: str) -> list[str]:
        """keep, flag or drop, per source."""
        return [getattr(source.rules, name) for source in self.sources]

    def apply(self, name: str, numbers: np.ndarray, like: np.ndarray | None = None) -> None:
        """A rule found these records; `like`: the earlier ones that they repeat."""
        actions = np.array(self.actions(name))[self.source[numbers]]
        if like is not None:
            self.like[numbers] = np.where(actions == "keep", self.like[numbers], like)
        self.reason[numbers[actions == "drop"]] = REASONS.index(name)
        self.flags[numbers[actions == "flag"]] |= np.uint32(1 << FLAGS.index(name))

    def alive(self) -> np.ndarray:
        """The numbers of the candidates, ascending."""
        return np.flatnonzero(self.reason == 0)


def decide(parts: Parts, sources: list[Source], mapped: Map) -> tuple[Fates, np.ndarray]:
    """Duplicates and repeated answers. Returns the fates and for every record the first one of its cluster."""
    fates = Fates(parts, sources)
    columns = parts.columns
    cluster = np.arange(len(parts))
    later, first = _repeats(columns["digest"][:, 0], columns["digest"][:, 1])
    fates.apply("exact_duplicate", later, first)
    cluster[later] = first
    if set(fates.actions("near_duplicate")) != {"keep"}:
        alive = fates.alive()
        similarity = sources[0].rules.min_jaccard
        cluster[alive] = alive[clusters(parts.key_files(), alive, similarity, mapped)]
        near = alive[cluster[alive] != alive]
        fates.apply("near_duplicate", near, cluster[near])
        cluster[later] = cluster[first]
    alive = fates.alive()
    allowed = np.array([source.rules.max_same_answers for source in sources])[fates.source[alive]]
    fates.apply("repeated_answer", alive[_rank(columns["answer"][alive]) >= allowed])
    alive = fates.alive()
    share = np.array([source.rules.max_same_openings for source in sources])[fates.source[alive]]
    allowed = np.maximum(OPENINGS_AT_LEAST, share * len(alive))
    fates.apply("repeated_opening", alive[_rank(columns["opening"][alive]) >= allowed])
    _limit_posts(fates)
    return fates, cluster


def _limit_posts(fates: Fates) -> None:
    """`post_limit`: more pairs of one post than the source's option max_pairs_per_post (SHP); the first ones by their
    hash stay."""
    limits = [source.options.get("max_pairs_per_post") for source in fates.sources]
    if not any(limits):
        return
    alive = fates.alive()
    alive = alive[fates.parts.columns["group"][alive] != 0]
    by_hash = alive[np.argsort(fates.parts.columns["order"][alive], kind="stable")]
    allowed = np.array([limit or np.iinfo(np.int64).max for limit in limits])[fates.source[by_hash]]
    over = by_hash[_rank(fates.parts.columns["group"][by_hash]) >= allowed]
    fates.reason[over] = REASONS.index("post_limit")


def _repeats(*keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the positions of all values that stood before, the first position of each)."""
    order = np.lexsort(keys)  # stable: equal values stay in their order
    equal = np.ones(max(0, len(order) - 1), bool)
    for key in keys:
        equal &= key[order[1:]] == key[order[:-1]]
    begin = np.ones(len(order), bool)
    begin[1:] = ~equal
    leader = order[np.maximum.accumulate(np.where(begin, np.arange(len(order)), 0))] if len(order) else order
    return order[~begin], leader[~begin]


def _rank(values: np.ndarray) -> np.ndarray:
    """How many equal values stand before each."""
    order = np.argsort(values, kind="stable")
    begin = np.ones(len(order), bool)
    begin[1:] = values[order[1:]] != values[order[:-1]]
    place = np.arange(len(order))
    rank = np.empty(len(order), np.int64)
    rank[order] = place - np.maximum.accumulate(np.where(begin, place, 0)) if len(order) else place
    return rank


def conflicts(parts: Parts, numbers: np.ndarray, kind: str) -> dict[str, int]:
    """What contradicts itself: of pairs, two answers to one prompt that are preferred in both orders; of conversations,
    questions with different answers (which may all be right)."""
    prompt, answer, other = (parts.columns[name][numbers] for name in ("prompt", "answer", "other"))
    if kind == "pref":
        ordered = _distinct(prompt, np.minimum(answer, other), np.maximum(answer, other), answer)
        once = _distinct(*ordered[:3])  # one pair can stand in two orders, no more
        return {"pairs_preferred_both_ways": len(ordered[0]) - len(once[0])}
    _, counts = np.unique(_distinct(prompt, answer)[0], return_counts=True)
    return {"questions_with_different_answers": int((counts > 1).sum())}


def _distinct(*keys: np.ndarray) -> list[np.ndarray]:
    """The rows of these columns, each once. np.unique over rows needs three times their memory."""
    once = np.ones(len(keys[0]), bool)
    once[_repeats(*keys)[0]] = False
    return [key[once] for key in keys]
