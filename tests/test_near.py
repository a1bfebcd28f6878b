"""Near duplicates: what is called one is one, hardly any is missed, and the first of a cluster stays."""

import random

import numpy as np
import pytest

from posttrain.data import kernels, near
from posttrain.data.folding import fold
from posttrain.errors import WontFit


def jaccard(a: str, b: str) -> float:
    one, two = ({text[i : i + 5] for i in range(max(1, len(text) - 4))} for text in (a, b))
    return len(one & two) / len(one | two)


def part(tmp_path, number, texts):
    """Keys and bands of texts that are their own keys, as block.py writes them."""
    codes, starts = kernels.keys(fold(texts))
    keys, bands = tmp_path / f"{number}.keys", tmp_path / f"{number}.bands"
    keys.write_bytes("".join(texts).encode())
    bands.write_bytes(kernels.band_hashes(codes, starts).tobytes())
    return near.KeyFile(keys, bands, np.array([len(text.encode()) for text in texts]))


def in_process(function, jobs):
    return (function(*job) for job in jobs)


@pytest.fixture
def texts():
    """400 texts of 30 to 300 characters, half of them edited copies of others."""
    rng = random.Random(3)
    alphabet = "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里"
    made = ["".join(rng.choices(alphabet, k=rng.randint(30, 300))) for _ in range(200)]
    for _ in range(200):
        chars = list(rng.choice(made))
        for _ in range(rng.choice((0, 1, 1, 2, 4, 8))):
            chars[rng.randrange(len(chars))] = rng.choice(alphabet)
        made.append("".join(chars))
    rng.shuffle(made)
    return [*made, "短", "短", "四个字啊"]


def test_clusters_are_those_of_all_pairs(tmp_path, texts):
    parts = [part(tmp_path, 0, texts[:150]), part(tmp_path, 1, texts[150:])]
    found = near.clusters(parts, np.arange(len(texts)), 0.8, in_process)
    parent = list(range(len(texts)))
    pairs = [(a, b) for b in range(len(texts)) for a in range(b) if jaccard(texts[a], texts[b]) >= 0.8]
    for a, b in pairs:  # the smallest number stands for all
        low, high = sorted((parent[a], parent[b]))
        parent = [low if p == high else p for p in parent]
    assert len(pairs) > 60
    assert found.tolist() == parent


def test_only_the_candidates_count(tmp_path, texts):
    parts = [part(tmp_path, 0, texts)]
    candidates = np.arange(0, len(texts), 2)
    found = near.clusters(parts, candidates, 0.8, in_process)
    alone = [part(tmp_path, 1, [texts[n] for n in candidates])]
    whole = near.clusters(alone, np.arange(len(candidates)), 0.8, in_process)
    assert found.tolist() == whole.tolist()


def test_the_threshold_is_exact(tmp_path):
    base = "".join(chr(0x4E00 + 37 * n) for n in range(60))
    other = base[:-3] + "甲乙丙"
    similarity = jaccard(base, other)
    parts = [part(tmp_path, 0, [base, other])]
    for bound, together in ((similarity - 1e-6, True), (similarity + 1e-6, False)):
        job = near._job(parts, np.array([0, 2]), np.array([[0, 1]]), bound)
        assert near.verified(*job).tolist() == [together]


def test_nothing_to_compare(tmp_path):
    assert near.clusters([], np.zeros(0, np.int64), 0.8, in_process).tolist() == []


def test_more_records_than_a_pair_of_numbers_can_hold(monkeypatch):
    monkeypatch.setattr(near, "MOST", 3)
    with pytest.raises(WontFit, match="4 records to compare: more than 3 .*\n.*near_duplicate=keep"):
        near.clusters([], np.arange(4), 0.85, in_process)
