"""
Mixing and splitting. Both follow from the content and the seed alone: not from the order of files, nor from each other.
"""

import hashlib
from collections import Counter

from posttrain.text import key_text

SIDES = ("train", "val", "test")


def unit_hash(seed: int, text: str) -> int:
    """A number in [0, 2**64) that follows from seed and text."""
    digest = hashlib.sha256(f"{seed}:{text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def prompt_hash(record: dict, seed: int) -> int:
    """Hash of the key text of the first user turn. Records with one first question share it, in conversations as in
    pairs, so that they stand on the same side of every split."""
    first = next(turn for turn in record.get("messages", record.get("prompt")) if turn["role"] == "user")
    return unit_hash(seed, key_text(first["content"]))


def side_of(prompt: int, shares: tuple[float, float, float]) -> str:
    """train, val or test: where the hash falls in [0, 1) cut by the shares (they are scaled to sum to 1)."""
    place, upper = prompt / 2**64 * sum(shares), 0.0
    for side, share in zip(SIDES, shares, strict=True):
        upper += share
        if place < upper:
            return side
    return SIDES[max(i for i, share in enumerate(shares) if share > 0)]


def split(prompts: list[int], shares: tuple[float, float, float]) -> tuple[dict[int, str], list[int]]:
    """(prompt hash -> side, the prompts that were moved).

    A set so small that a side with a positive share would stay empty: that side borrows, train first, the prompt of
    the fullest side whose hash lies nearest. Only then can a prompt stand on another side here than in the other set.
    """
    sides = {prompt: side_of(prompt, shares) for prompt in prompts}
    counts, moved = Counter(sides.values()), []
    for number, side in enumerate(SIDES):
        if shares[number] == 0 or counts[side] or not sides:
            continue
        fullest = max(SIDES, key=lambda s: counts[s])
        if counts[fullest] < 2 and side != "train":
            continue
        nearest = max if SIDES.index(fullest) < number else min
        prompt = nearest(p for p, where in sides.items() if where == fullest)
        sides[prompt] = side
        counts[fullest] -= 1
        counts[side] += 1
        moved.append(prompt)
    return sides, moved


def quotas(available: dict[str, int], weights: dict[str, float], max_samples: int) -> dict[str, int]:
    """How many records to take of each source: max_samples shared out by weight.

    A source that has less than its share gives all it has, and the others share what it lacks by their weights; so
    the shares of the result are the weights where there is enough of each, and nothing is left lying unused otherwise.
    """
    taken = dict.fromkeys(available, 0)
    room = min(max_samples, sum(available.values()))
    short = {key for key in available if available[key]}
    while short and room > 0:
        total = sum(weights[key] for key in short)
        exhausted = {key for key in short if available[key] <= room * weights[key] / total}
        if not exhausted:
            parts = {key: room * weights[key] / total for key in short}
            taken |= {key: int(part) for key, part in parts.items()}
            # The last few go to the largest remainders.
            left = room - sum(int(part) for part in parts.values())
            for key in sorted(parts, key=lambda k: (int(parts[k]) - parts[k], k))[:left]:
                taken[key] += 1
            return taken
        for key in exhausted:
            taken[key] = available[key]
            room -= available[key]
        short -= exhausted
    return taken
