"""
Splitting: train, val or test for each record.

A unit is what must stay together: records with one prompt hash, records of one cluster of near duplicates, and
whatever those join. Its side follows from the smallest prompt hash in it alone, so another source moves no record but
those of units that it joins. That hash is stirred once more before it decides (`place`): the smallest of several lies
low, and large units would crowd into the side that comes first.
"""

from typing import NamedTuple

import numpy as np

from posttrain.data.kernels import mixed
from posttrain.data.near import joined
from posttrain.errors import UserFault

SIDES = ("train", "val", "test")
TRAIN, VAL, TEST = range(3)


class Split(NamedTuple):
    """The sides of all records."""

    side: np.ndarray
    """uint8 per record: 0 train, 1 val, 2 test."""
    joined: np.ndarray
    """bool per record: its side is not that of its own prompt hash, because its unit has a smaller one. Only with
    shares; with counts nobody. For the manifest."""
    moved: np.ndarray
    """bool per record: its unit was moved so that no side with a positive share is empty."""
    units: int
    """Among the taken records."""
    counts: tuple[int, int, int]
    """Taken records in train, val, test."""


def anchors(prompt: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    """The smallest prompt hash of each record's unit (uint64): equal for two records if and only if they are one unit.

    Units are connected components; only clusters with several prompts join anything, so the graph holds only those.
    """
    by_cluster = np.argsort(cluster, kind="stable")
    one, two = prompt[by_cluster[:-1]], prompt[by_cluster[1:]]
    together = (cluster[by_cluster[:-1]] == cluster[by_cluster[1:]]) & (one != two)
    one, two = one[together], two[together]
    if not len(one):
        return prompt.copy()
    nodes, ends = np.unique(np.concatenate([one, two]), return_inverse=True)
    first = joined(np.arange(len(nodes)), ends.reshape(2, -1).T)
    number = np.minimum(np.searchsorted(nodes, prompt), len(nodes) - 1)
    return np.where(nodes[number] == prompt, nodes[first[number]], prompt)


def place(hashes: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, one to one (kernels.mixed): the smallest of several hashes lies low, its place anywhere."""
    return mixed(hashes.copy())


def sides_of(places: np.ndarray, shares: tuple[float, float, float]) -> np.ndarray:
    """uint8: where each place falls in [0, 2**64) cut by the shares (they are scaled to sum to 1)."""
    side = np.searchsorted(np.cumsum(shares), places / 2.0**64 * sum(shares), side="right")
    return np.minimum(side, max(i for i, share in enumerate(shares) if share > 0)).astype(np.uint8)


def split(prompt: np.ndarray, cluster: np.ndarray, shares: tuple[float, float, float],
          counts: tuple[int, int] | None = None, taken: np.ndarray | None = None) -> Split:  # fmt: skip
    """The side of every record.

    prompt, cluster: columns of all candidates, not only of those taken: so units do not hang on the quotas. taken:
    bool per record (None: all); only those count for `counts`, and for the rescue of a set so small that a side with
    a positive share would stay empty: that side borrows, train first, the unit of the fullest side whose place lies
    nearest.

    counts: (val, test) records instead of shares. Test, then val, is filled with the units of the lowest places that
    still fit: never more than asked, fewer where only larger units are left (Split.counts tells). The sides then hang
    on how much data there is. UserFault if they would leave no record for train.
    """
    taken = np.ones(len(prompt), bool) if taken is None else taken
    unit = place(anchors(prompt, cluster))
    units, sizes = np.unique(unit[taken], return_counts=True)  # rising
    if counts is None:
        side = sides_of(unit, shares)
        joined = side != sides_of(place(prompt), shares)
        moves = _rescued(units, sides_of(units, shares), shares)
    else:
        if taken.any() and sum(counts) >= taken.sum():
            raise UserFault(
                f"split_counts: {counts[0]} for val and {counts[1]} for test leave nothing for train: there are "
                f"{taken.sum()} records\n  choices: smaller counts, or null and shares (split: [0.8, 0.1, 0.1])"
            )
        of_unit = _counted(sizes, counts)
        side = np.zeros(len(prompt), np.uint8)
        if len(units):
            number = np.minimum(np.searchsorted(units, unit), len(units) - 1)
            side = np.where(units[number] == unit, of_unit[number], side).astype(np.uint8)
        joined, moves = np.zeros(len(prompt), bool), {}
    moved = np.zeros(len(prompt), bool)
    for borrowed, to in moves.items():
        moved |= unit == borrowed
        side[unit == borrowed] = to
    there = np.bincount(side[taken], minlength=3)
    return Split(side, joined, moved, len(units), (int(there[0]), int(there[1]), int(there[2])))


def _rescued(units: np.ndarray, side: np.ndarray, shares: tuple[float, float, float]) -> dict[np.uint64, int]:
    """Unit -> the side that borrows it. `units` rise, and so do their sides."""
    side, moves = side.copy(), {}
    for number in (TRAIN, VAL, TEST):
        there = np.bincount(side, minlength=3)
        fullest = int(there.argmax())
        if shares[number] == 0 or there[number] or there[fullest] < (1 if number == TRAIN else 2):
            continue
        candidates = np.flatnonzero(side == fullest)
        nearest = candidates[-1] if fullest < number else candidates[0]
        side[nearest] = number
        moves[units[nearest]] = number
    return moves


def _counted(sizes: np.ndarray, counts: tuple[int, int]) -> np.ndarray:
    """The side of each unit, the units in the order of their places."""
    side = np.zeros(len(sizes), np.uint8)
    for number, room in ((TEST, counts[1]), (VAL, counts[0])):
        fit = np.flatnonzero((side == TRAIN) & (sizes <= room))
        while room and len(fit):
            filled = np.cumsum(sizes[fit])
            some = int(np.searchsorted(filled, room, side="right"))  # at least 1: each fits by itself
            side[fit[:some]] = number
            room -= int(filled[some - 1])
            fit = fit[some:]
            fit = fit[sizes[fit] <= room]
    return side
