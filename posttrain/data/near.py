"""
Near duplicates: MinHash bands give candidates, and a candidate is one only if its exact Jaccard similarity says so.

Band by band: records whose band hashes are equal are candidates (each with the first of its bucket, and with the one
before it); pairs that are connected or rejected already are skipped; the rest is verified in chunks, which the workers
share. The order of the input decides which of a cluster stays: the first.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

from posttrain.data import kernels
from posttrain.data.executor import Map

CHUNK = 8192  # pairs, for one worker
STEP = 1024  # pairs held in memory at once


def clusters(parts: list["KeyFile"], candidates: np.ndarray, min_jaccard: float, mapped: Map) -> np.ndarray:
    """For each of the candidates (ascending numbers of records) the position of its cluster's first one.

    parts: the files of the records' keys and bands in order; a record's number counts through all of them.
    """
    count = len(candidates)
    labels = np.arange(count)
    rejected = np.zeros(0, np.int64)
    begins = np.cumsum([0, *(part.records for part in parts)])
    for band in range(kernels.BANDS):
        pairs = _in_one_bucket(_band(parts, begins, candidates, band))
        codes = pairs[:, 0] * count + pairs[:, 1]
        fresh = (labels[pairs[:, 0]] != labels[pairs[:, 1]]) & ~np.isin(codes, rejected)
        pairs, codes = pairs[fresh], codes[fresh]
        if not len(pairs):
            continue
        jobs = ((_places(parts, begins, candidates[pairs[at : at + CHUNK]]), min_jaccard)
                for at in range(0, len(pairs), CHUNK))  # fmt: skip
        similar = np.concatenate(list(mapped(verified, jobs)))
        rejected = np.union1d(rejected, codes[~similar])
        labels = joined(labels, pairs[similar])
    return labels


def joined(labels: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Labels (each the smallest member of its cluster) after the clusters of these pairs became one: the smaller label
    is handed on until nothing changes."""
    labels = labels.copy()
    while len(pairs := pairs[labels[pairs[:, 0]] != labels[pairs[:, 1]]]):
        ends = labels[pairs]
        np.minimum.at(labels, ends.max(1), ends.min(1))
        while (jumped := labels[labels] != labels).any():
            labels[jumped] = labels[labels[jumped]]
    return labels


class KeyFile:
    """The keys and bands of one part."""

    def __init__(self, keys: Path, bands: Path, key_bytes: np.ndarray):
        self.keys, self.bands, self.records = keys, bands, len(key_bytes)
        self.ends = np.cumsum(key_bytes, dtype=np.int64)


def _band(parts: list[KeyFile], begins: np.ndarray, candidates: np.ndarray, band: int) -> np.ndarray:
    """One band's hashes of all candidates."""
    values = np.empty(len(candidates), np.uint64)
    at = np.searchsorted(candidates, begins)
    for number, part in enumerate(parts):
        if at[number] < at[number + 1]:
            own = candidates[at[number] : at[number + 1]] - begins[number]
            values[at[number] : at[number + 1]] = np.load(part.bands, mmap_mode="r")[band][own]
    return values


def _in_one_bucket(values: np.ndarray) -> np.ndarray:
    """int64 [pairs, 2]: each record with the first of its bucket, and with the one before it in the bucket."""
    order = np.argsort(values, kind="stable")
    equal = values[order[1:]] == values[order[:-1]]
    later = np.flatnonzero(equal) + 1
    if not len(later):
        return np.zeros((0, 2), np.int64)
    begin = np.ones(len(order), bool)
    begin[1:] = ~equal
    leader = order[np.maximum.accumulate(np.where(begin, np.arange(len(order)), 0))]
    pairs = np.concatenate((np.stack((leader[later], order[later]), 1), np.stack((order[later - 1], order[later]), 1)))
    return np.unique(pairs, axis=0)


def _places(parts: list[KeyFile], begins: np.ndarray, numbers: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Where the keys of these pairs of records are: (files, int64 [pairs, 2, (file, offset, bytes)])."""
    which = np.searchsorted(begins, numbers, "right") - 1
    used = np.unique(which)
    places = np.zeros((*numbers.shape, 3), np.int64)
    for number, index in enumerate(used.tolist()):
        mine = which == index
        own = numbers[mine] - begins[index]
        ends = parts[index].ends
        offset = np.where(own > 0, ends[own - 1], 0)
        places[mine] = np.stack((np.full(len(own), number), offset, ends[own] - offset), 1)
    return [str(parts[index].keys) for index in used.tolist()], places


def verified(where: tuple[list[str], np.ndarray], min_jaccard: float) -> np.ndarray:
    """bool per pair: whether the sets of 5-character shingles have a Jaccard similarity of at least min_jaccard."""
    files, places = where
    flat, pairs = np.unique(places.reshape(-1, 3), axis=0, return_inverse=True)
    pairs = pairs.reshape(-1, 2)
    shingles, offsets = _distinct_shingles(list(_read(files, flat)))
    sizes = np.diff(offsets)
    a, b = sizes[pairs[:, 0]], sizes[pairs[:, 1]]
    possible = np.flatnonzero(np.minimum(a, b) >= min_jaccard * np.maximum(a, b) - 1e-9)
    common = np.zeros(len(pairs), np.int64)
    rows = csr_array((np.ones(len(shingles), np.int8), shingles, offsets), shape=(len(sizes), 1 << 44))
    for at in range(0, len(possible), STEP):
        some = possible[at : at + STEP]
        both = rows[pairs[some, 0]].multiply(rows[pairs[some, 1]])  # merges sorted rows
        common[some] = np.diff(both.tocsr().indptr)
    return common / np.maximum(a + b - common, 1) >= min_jaccard


def _read(files: list[str], places: np.ndarray) -> Iterator[str]:
    """The keys at these places, which stand in the order of the files: one file is open at a time."""
    for number, file in enumerate(files):
        with open(file, "rb") as keys:
            for offset, length in places[places[:, 0] == number][:, 1:].tolist():
                yield os.pread(keys.fileno(), length, offset).decode()


def _distinct_shingles(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(the different shingle hashes of each text, 44 bits, sorted; where each text's begin)."""
    starts = np.zeros(len(texts) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)), out=starts[1:])
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), "<u4")
    hashes, offsets = kernels.shingle_hashes(codes, starts)
    values = (np.repeat(np.arange(len(texts), dtype=np.uint64), np.diff(offsets)) << np.uint64(44)) | (
        hashes >> np.uint64(20))  # fmt: skip
    values.sort()
    distinct = np.ones(len(values), bool)
    distinct[1:] = values[1:] != values[:-1]
    values = values[distinct]
    begins = np.searchsorted(values >> np.uint64(44), np.arange(len(texts) + 1).astype(np.uint64))
    return (values & np.uint64((1 << 44) - 1)).astype(np.int64), begins
