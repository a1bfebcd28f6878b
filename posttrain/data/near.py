"""
Near duplicates: MinHash bands give candidates, and a candidate is one only if its exact Jaccard similarity says so.

Band by band: records whose band hashes are equal are candidates (each with the first of its bucket, and with the one
before it); pairs that are connected or rejected already are skipped; the rest is verified in chunks, which the workers
share. The order of the input decides which of a cluster stays: the first.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from posttrain.data import compiled
from posttrain.data.executor import Map
from posttrain.data.folding import code_points
from posttrain.errors import WontFit

MOST = 3_000_000_000  # records: a pair of them is one number of 64 bits
CHUNK = 2048  # pairs, for one worker: about 50 MiB of shingles


def clusters(parts: list["KeyFile"], candidates: np.ndarray, min_jaccard: float, mapped: Map) -> np.ndarray:
    """For each of the candidates (ascending numbers of records) the position of its cluster's first one.

    parts: the files of the records' keys and bands in order; a record's number counts through all of them.
    """
    count = len(candidates)
    if count > MOST:
        raise WontFit(f"{count} records to compare: more than {MOST} are too many for one run\n  several runs, each "
                      "over some sources and into an output_dir of its own; or --set rules.near_duplicate=keep")
    labels = np.arange(count)
    rejected = np.zeros(0, np.int64)
    begins = np.cumsum([0, *(part.records for part in parts)])
    for band in range(compiled.BANDS):
        pairs = _in_one_bucket(_band(parts, begins, candidates, band))
        pairs = pairs[labels[pairs[:, 0]] != labels[pairs[:, 1]]]
        codes = np.setdiff1d(pairs[:, 0] * count + pairs[:, 1], rejected)
        if not len(codes):
            continue
        pairs = np.stack(np.divmod(codes, count), 1)
        jobs = (_job(parts, begins, candidates[pairs[at : at + CHUNK]], min_jaccard)
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
            whole = np.fromfile(part.bands, np.uint64, part.records, offset=8 * part.records * band)
            values[at[number] : at[number + 1]] = whole[own]
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
    return np.concatenate((np.stack((leader[later], order[later]), 1), np.stack((order[later - 1], order[later]), 1)))


class Job(NamedTuple):
    """Pairs of records for one worker to verify."""

    files: list[str]
    places: np.ndarray
    """int64 [records, (file, offset, bytes)]: where the keys of these records are."""
    pairs: np.ndarray
    """int64 [pairs, 2]: which of these records."""


def _job(parts: list[KeyFile], begins: np.ndarray, pairs: np.ndarray, min_jaccard: float) -> tuple[Job, float]:
    """The job of verifying pairs of records, which are numbered through all parts."""
    records, which = np.unique(pairs, return_inverse=True)
    files, places = [], np.zeros((len(records), 3), np.int64)
    at = np.searchsorted(records, begins)
    for index in np.flatnonzero(np.diff(at)).tolist():
        own = records[at[index] : at[index + 1]] - begins[index]
        ends = parts[index].ends
        offset = np.where(own > 0, ends[own - 1], 0)
        places[at[index] : at[index + 1]] = np.stack((np.full(len(own), len(files)), offset, ends[own] - offset), 1)
        files.append(str(parts[index].keys))
    return Job(files, places, which.reshape(pairs.shape)), min_jaccard


def verified(job: Job, min_jaccard: float) -> np.ndarray:
    """bool per pair: whether the sets of 5-character shingles have a Jaccard similarity of at least min_jaccard."""
    codes, starts = code_points(list(_read(job.files, job.places)))
    return compiled.similar(*compiled.shingles(codes, starts), job.pairs, min_jaccard)


def _read(files: list[str], places: np.ndarray) -> Iterator[str]:
    """The keys at these places, which stand in the order of the files: one file is open at a time."""
    for number, file in enumerate(files):
        with open(file, "rb") as keys:
            for offset, length in places[places[:, 0] == number][:, 1:].tolist():
                yield os.pread(keys.fileno(), length, offset).decode()
