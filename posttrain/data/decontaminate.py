"""
Decontamination: which records hold an item of a benchmark.

Texts are compared by their *units* (units.py): Han characters, runs of other letters, runs of digits; case,
punctuation, white space and line ends do not count. So 13 units are 13 characters of Chinese, 13 words of English.
Of an item,

- a part (the question, an option, a passage, a solution) of 13 units or more is *found* as far as it is covered by
  13-grams that stand in the record, in one turn;
- a shorter option is found if its units stand anywhere in the record; a shorter question only if it stands there as a
  whole, between the turn's ends, line ends or punctuation other than commas, and if it is not shorter than SHORT;
- 13-grams and short parts that more than COMMON items share are boilerplate, and their units do not count.

The *coverage* is the share of an item's units that is found (Llama 2's study of contamination counts tokens so; half
a question never holds half of its 13-grams). A record leaks an item of which it holds at least `min_coverage`, a
13-gram or the short question among it. Where QUESTION_ALONE units or more of a question count, its options do not.

The index holds a 64-bit hash of each 13-gram; two different ones share a hash with probability about 1e-19.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from posttrain.data.benchmarks import UNIT, Item, read_benchmarks
from posttrain.data.kernels import ranges
from posttrain.data.units import Units, units_of
from posttrain.text import folded_text, han_count

N = 13
SHORT, SHORT_CHARS = 3, 8  # units, and letters and digits, of which a Han character counts for two
COMMON = 8
QUESTION_ALONE = 26
BATCH = 1 << 17  # characters looked at together: what stays in a core's cache


class Benchmarks(NamedTuple):
    """The index. `keys` are hashes of 13-grams and of short questions."""

    keys: np.ndarray
    """uint64, sorted."""
    filter: np.ndarray
    """bool: a Bloom filter of the keys."""
    items_of: np.ndarray
    """int32: items with key k are items_of[items_at[k] : items_at[k + 1]]."""
    items_at: np.ndarray
    grams: np.ndarray
    """int32: per unit of the long parts of item i, grams[grams_at[i] : grams_at[i + 1]], the key of the 13-gram that
    begins there; -1 where none does or it is boilerplate."""
    grams_at: np.ndarray
    short: np.ndarray
    """SHORT_PART: the short parts of item i are short[short_at[i] : short_at[i + 1]]; boilerplate is left out."""
    short_at: np.ndarray
    short_units: np.ndarray
    """int64 per item: units of its short parts."""
    counted: np.ndarray
    """int32 per item: units that count; 0 of an item that cannot be looked for."""
    names: list[str]
    """`task file:line` of each item."""
    notes: list[str]
    """What is not looked for and why, for people."""


SHORT_PART = np.dtype([("hash", "u8"), ("units", "i4"), ("key", "i4")])  # key: -1 of an option


# ------------------------------------------------------------------ building the index


def build(paths: list[Path]) -> Benchmarks:
    """The index of the benchmarks in some directories and files (benchmarks.benchmark_paths).

    Raises UserFault for a damaged file.
    """
    return index_of(*read_benchmarks(paths))


def index_of(items: list[Item], notes: list[str] = ()) -> Benchmarks:
    """The index of some items; one that stands in several files counts once, under its first name."""
    different = {}
    for item in items:
        question, options = (tuple(map(folded_text, texts)) for texts in (item.question, item.options))
        different.setdefault((question, frozenset(options)), f"{item.task} {item.place}")
    names = list(different.values())
    parts = [(owner, kind, text) for owner, texts in enumerate(different) for kind in (0, 1) for text in texts[kind]]
    owner = np.array([part[0] for part in parts], np.int64)
    is_option = np.array([part[1] for part in parts], bool)
    units = units_of([part[2] for part in parts])
    first, length = units.first[:-1], np.diff(units.first)

    # Every 13-gram of the long parts: its hash, its part, where it begins in the part's item.
    long, brief = np.flatnonzero(length >= N), np.flatnonzero((length > 0) & (length < N))
    where, offsets = ranges(first[long], length[long] - N + 1)
    part = np.repeat(long, np.diff(offsets))
    hashes, brief_hashes = units.hashes_at(where, N), units.hashes_at(first[brief], length[brief])
    common = _common(np.append(hashes, brief_hashes), np.append(owner[part], owner[brief]))
    rare, rare_brief = ~np.isin(hashes, common), ~np.isin(brief_hashes, common)
    counted = _units_in(where[rare], part[rare], len(parts))
    counted[brief[rare_brief]] = length[brief[rare_brief]]

    asked = np.bincount(owner, counted * ~is_option, len(names))
    used = ~is_option | (asked[owner] < QUESTION_ALONE)
    rare, rare_brief = rare & used[part], rare_brief & used[brief]
    chars = np.array([han_count(parts[i][2]) + len("".join(UNIT.findall(parts[i][2]))) for i in brief], int)
    asks = ~is_option[brief] & (length[brief] >= SHORT) & (chars >= SHORT_CHARS)
    rare_brief &= asks | is_option[brief]

    hash_of = np.append(hashes[rare], brief_hashes[asks])
    owner_of = np.append(owner[part[rare]], owner[brief[asks]])
    keys = np.unique(hash_of)
    grams_at = np.append(0, np.cumsum(np.bincount(owner[long], length[long], len(names)).astype(np.int64)))
    grams = np.full(grams_at[-1], -1, np.int32)
    slots, _ = ranges(np.cumsum(length[long]) - length[long], length[long] - N + 1)  # parts are in the order of items
    grams[slots[rare]] = np.searchsorted(keys, hashes[rare])
    short = np.zeros(rare_brief.sum(), SHORT_PART)
    short["hash"], short["units"] = brief_hashes[rare_brief], length[brief[rare_brief]]
    short["key"] = np.where(asks[rare_brief], np.searchsorted(keys, short["hash"]), -1)
    short_at = np.searchsorted(owner[brief[rare_brief]], np.arange(len(names) + 1))
    short_units = np.bincount(owner[brief[rare_brief]], short["units"], len(names)).astype(np.int64)
    looked_at = used & (length >= N)
    looked_at[brief[rare_brief]] = True
    total = np.bincount(owner, counted * looked_at, len(names)).astype(np.int32)
    total[~np.isin(np.arange(len(names)), owner_of)] = 0
    lost = int((total == 0).sum())
    notes = [*notes] + ([f"{lost} items are too short or too common to be looked for"] if lost else [])
    items_of, items_at = _by_key(keys, hash_of, owner_of, total)
    return Benchmarks(keys, _filter(keys), items_of, items_at, grams, grams_at, short, short_at, short_units, total,
                      names, notes)  # fmt: skip


def _units_in(begins: np.ndarray, part: np.ndarray, parts: int) -> np.ndarray:
    """int64 per part: the units that stand in its 13-grams which begin at `begins`, as _covered of each."""
    length = np.full(len(begins), N)
    inner = np.flatnonzero(part[1:] == part[:-1])
    length[inner] = np.minimum(begins[inner + 1] - begins[inner], N)
    return np.bincount(part, length, parts).astype(np.int64)


def _common(hashes: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Hashes that stand in more than COMMON items."""
    pairs = np.unique(np.rec.fromarrays([hashes, owners]))
    values, counts = np.unique(pairs.f0, return_counts=True)
    return values[counts > COMMON]


def _by_key(keys: np.ndarray, hashes: np.ndarray, owners: np.ndarray, counted: np.ndarray) -> tuple:
    """(items_of, items_at)."""
    findable = counted[owners] > 0
    pairs = np.unique(np.searchsorted(keys, hashes[findable]) * len(counted) + owners[findable])
    key, item = np.divmod(pairs, max(1, len(counted)))
    return item.astype(np.int32), np.searchsorted(key, np.arange(len(keys) + 1))


def _filter(keys: np.ndarray) -> np.ndarray:
    """A Bloom filter of 16 to 32 places for each key, two of them set: at most 1.4 % of other hashes pass."""
    places = np.zeros(1 << max(10, (len(keys) * 16).bit_length()), bool)
    for slots in _slots:
        places[slots(keys, len(places))] = True
    return places


_slots = (
    lambda hashes, size: hashes & np.uint64(size - 1),
    lambda hashes, size: hashes >> np.uint64(65 - size.bit_length()),
)


def save(benchmarks: Benchmarks, directory: Path) -> None:
    """Write the index into a directory, which may exist."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in benchmarks._asdict().items():
        if isinstance(value, np.ndarray):
            np.save(directory / f"{name}.npy", value)
        else:
            (directory / f"{name}.json").write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def load(directory: Path) -> Benchmarks:
    """The index that `save` wrote. Its arrays stay on disk and are shared by all processes that load them."""
    values = {}
    for name in Benchmarks._fields:
        if (array := directory / f"{name}.npy").is_file():
            values[name] = np.asarray(np.load(array, mmap_mode="r"))
        else:
            values[name] = json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))
    return Benchmarks(**values)


# ------------------------------------------------------------------ searching


def leaks(benchmarks: Benchmarks, texts: list[list[str]], min_coverage: float) -> list[str | None]:
    """Per record (the folded texts of its turns): None, or the item it holds most of, and how much of that."""
    found, best = [None] * len(texts), [0.0] * len(texts)
    for record, item, coverage in items_in(benchmarks, texts, min_coverage):
        if coverage > best[record]:
            found[record], best[record] = f"{benchmarks.names[item]}, {coverage:.0%} of it", coverage
    return found


def items_in(benchmarks: Benchmarks, texts: list[list[str]], min_coverage: float) -> Iterator[tuple[int, int, float]]:
    """(record, item, coverage) of every item that a record (the folded texts of its turns) leaks."""
    if len(benchmarks.keys):
        for start, end in _batches(texts):
            for record, item, coverage in _items_in(benchmarks, texts[start:end], min_coverage):
                yield start + record, item, coverage


def _batches(texts: list[list[str]]) -> Iterator[tuple[int, int]]:
    """(first, end) of records that have BATCH characters together, or a little more."""
    start = chars = 0
    for number, turns in enumerate(texts):
        chars += sum(map(len, turns))
        if chars >= BATCH:
            yield start, number + 1
            start, chars = number + 1, 0
    if start < len(texts):
        yield start, len(texts)


def _items_in(benchmarks: Benchmarks, texts: list[list[str]], min_coverage: float) -> Iterator[tuple]:
    """items_in, for texts that are looked at together."""
    units = units_of([text for turns in texts for text in turns])
    places, keys = _hits(benchmarks, units)
    if not len(places):
        return
    bounds = units.first[np.append(0, np.cumsum([len(turns) for turns in texts]))]  # first unit of each record
    records = np.searchsorted(bounds, places, "right") - 1
    records, keys = np.divmod(np.unique(records * len(benchmarks.keys) + keys), len(benchmarks.keys))
    at = benchmarks.items_at[keys]
    number = benchmarks.items_at[keys + 1] - at
    items = benchmarks.items_of[ranges(at, number)[0]]
    pairs, hits = np.unique(np.repeat(records, number) * len(benchmarks.counted) + items, return_counts=True)
    pair_record, pair_item = np.divmod(pairs, len(benchmarks.counted))
    wanted = min_coverage * benchmarks.counted[pair_item] - 1e-9
    for i in np.flatnonzero(hits * N + benchmarks.short_units[pair_item] >= wanted).tolist():
        record, item = int(pair_record[i]), int(pair_item[i])
        there = keys[slice(*np.searchsorted(records, (record, record + 1)))]
        units_found = _units_found(benchmarks, item, there, units, *bounds[record : record + 2].tolist())
        coverage = units_found / int(benchmarks.counted[item])
        if units_found >= wanted[i]:
            yield record, item, coverage


def _hits(benchmarks: Benchmarks, units: Units) -> tuple[np.ndarray, np.ndarray]:
    """(unit, key) wherever a 13-gram or a short question of the benchmarks begins, inside one text."""
    found = []
    starts = np.flatnonzero(units.apart[:-1])
    for length in range(SHORT, N + 1):
        if len(units.sums) <= length:
            break
        if length == N:
            places, hashes = None, units.hashes(N)
        else:
            places = starts[: np.searchsorted(starts, len(units.sums) - length)]
            places = places[units.apart[places + length]]
            hashes = units.hashes_at(places, length)
        for slots in _slots:
            maybe = np.flatnonzero(benchmarks.filter[slots(hashes, len(benchmarks.filter))])
            hashes, places = hashes[maybe], maybe if places is None else places[maybe]
        keys = np.minimum(np.searchsorted(benchmarks.keys, hashes), len(benchmarks.keys) - 1)
        real = benchmarks.keys[keys] == hashes
        places, keys = places[real], keys[real]
        inside = places + length <= units.first[np.searchsorted(units.first, places, "right")]
        found.append((places[inside], keys[inside]))
    return tuple(np.concatenate(arrays) for arrays in zip(*found, strict=True)) if found else (np.zeros(0, int),) * 2


def _units_found(benchmarks: Benchmarks, item: int, keys: np.ndarray, units: Units, first: int, end: int) -> int:
    """Units of an item that a record holds, whose hits are `keys` and whose units are first .. end."""
    grams = benchmarks.grams[benchmarks.grams_at[item] : benchmarks.grams_at[item + 1]]
    total = _covered(np.isin(grams, keys))
    for part in benchmarks.short[benchmarks.short_at[item] : benchmarks.short_at[item + 1]]:
        if part["key"] >= 0:
            total += int(part["units"]) * bool(np.isin(part["key"], keys))
        else:
            total += int(part["units"]) * _stands_in(units, part["hash"], int(part["units"]), first, end)
    return total


def _stands_in(units: Units, hashed: np.uint64, length: int, first: int, end: int) -> bool:
    """Whether an option's units stand in one of the texts that have the units first .. end."""
    places = np.arange(first, end - length + 1)
    places = places[units.hashes_at(places, length) == hashed]
    return bool(np.any(places + length <= units.first[np.searchsorted(units.first, places, "right")]))


def _covered(begins: np.ndarray) -> int:
    """Units that stand in the 13-grams which begin at the true places."""
    places = np.flatnonzero(begins)
    return int(np.minimum(np.diff(places), N).sum()) + N if len(places) else 0
