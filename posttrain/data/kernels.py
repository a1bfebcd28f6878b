"""Counting and hashing over a block of folded texts at once, in numpy; MinHash by rensa."""

import numpy as np
from rensa import RMinHash

from posttrain.data.folding import ALNUM, DIGIT, HAN_BIT, LETTER, LINE_END, SPACE, Folded, tables

SHINGLE = 5  # characters
BANDS, ROWS = 21, 6  # of 126 MinHash values: a pair at Jaccard 0.8 is missed with (1 - 0.8 ** 6) ** 21 = 0.0017
_M1, _M2, _M3 = (np.uint64(m) for m in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, in place (Steele, Lea and Flood 2014): every bit depends on every other."""
    values ^= values >> np.uint64(30)
    values *= _M2
    values ^= values >> np.uint64(27)
    values *= _M3
    values ^= values >> np.uint64(31)
    return values


def window_hashes(codes: np.ndarray, length: int) -> np.ndarray:
    """uint64 hash of every `length` characters in a row; len(codes) - length + 1 of them."""
    return mixed(_polynomials(codes, length))


def _polynomials(codes: np.ndarray, length: int) -> np.ndarray:
    """uint64 of every `length` characters in a row, well spread in the high bits only."""
    count = max(0, len(codes) - length + 1)
    hashes = codes[:count].astype(np.uint64)
    for offset in range(1, length):
        hashes *= _M1
        hashes += codes[offset : offset + count]
    hashes *= _M2
    return hashes


def ranges(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the indices starts[i] .. starts[i] + lengths[i] - 1 of all i in a row, where those of each i begin)."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths), offsets


class Counts:
    """Per text: characters, Han characters, letters, ASCII letters, ordinary ones (Han, ASCII letters and digits), and
    those that are not white space (int64 arrays)."""

    def __init__(self, folded: Folded):
        self.chars = np.diff(folded.starts)
        white, self.han, self.letters, ordinary, digits = (
            _per_text(folded, bit) for bit in (SPACE | LINE_END, HAN_BIT, LETTER, ALNUM, DIGIT)
        )
        self.ascii_letters, self.visible = ordinary - digits, self.chars - white
        self.ordinary = ordinary + self.han

    def per_record(self, records: np.ndarray) -> "Counts":
        """The same per record; records: where the texts of each begin, and the end."""
        sums = object.__new__(Counts)
        for name, values in vars(self).items():
            total = np.zeros(len(values) + 1, np.int64)
            np.cumsum(values, out=total[1:])
            setattr(sums, name, total[records[1:]] - total[records[:-1]])
        return sums


def _per_text(folded: Folded, bit: int) -> np.ndarray:
    before = np.zeros(len(folded.bits) + 1, np.int32)
    np.cumsum((folded.bits & np.uint16(bit)) != 0, dtype=np.int32, out=before[1:])
    return np.diff(before[folded.starts]).astype(np.int64)


LANGUAGES = ("none", "zh", "en", "other")


def languages(counts: Counts, min_cn_ratio: np.ndarray | float) -> np.ndarray:
    """text.language as an index into LANGUAGES."""
    zh = counts.han >= min_cn_ratio * counts.letters
    en = counts.ascii_letters >= 0.7 * counts.letters
    return np.where(counts.letters == 0, 0, np.where(zh, 1, np.where(en, 2, 3))).astype(np.uint8)


def repetition(folded: Folded, texts: np.ndarray, most: float) -> np.ndarray:
    """1 - different / all 4-grams of characters of the texts with these numbers, where it is more than `most`; else 0,
    as for texts under 20 characters.

    A text with n windows sets n flags at hashed places: as many as are set are different at least. Only texts that
    this does not clear are counted exactly.
    """
    share = np.zeros(len(texts))
    lengths = folded.starts[texts + 1] - folded.starts[texts]
    long = np.flatnonzero(lengths >= 20)
    if not len(long):
        return share
    windows = lengths[long] - 3
    offsets = np.concatenate(([0], np.cumsum(windows)))
    border = np.zeros(len(folded.codes) + 1, np.int8)
    begins = folded.starts[texts[long]]
    border[begins] += 1
    border[begins + windows] -= 1
    inside = np.cumsum(border[: len(folded.codes) - 3], dtype=np.int8).view(bool)
    hashes = _polynomials(folded.codes, 4)[inside]
    slots = (hashes >> np.uint64(32)) * np.repeat(windows.astype(np.uint64), windows) >> np.uint64(32)
    flags = np.zeros(offsets[-1], np.uint8)
    flags[slots.astype(np.int64) + np.repeat(offsets[:-1], windows)] = 1
    set_flags = np.add.reduceat(flags, offsets[:-1], dtype=np.int64)
    for number in np.flatnonzero(1 - set_flags / windows > most).tolist():
        different = len(np.unique(hashes[offsets[number] : offsets[number + 1]]))
        if (found := 1 - different / windows[number]) > most:
            share[long[number]] = found
    return share


def has_long_digits(folded: Folded) -> np.ndarray:
    """The places in `codes` where 11 digits begin that have at most 4 other characters between them."""
    places = np.flatnonzero(folded.bits & np.uint16(DIGIT))
    if len(places) < 11:
        return places[:0]
    return places[:-10][places[10:] - places[:-10] <= 14]


def texts_of(folded: Folded, places: np.ndarray) -> np.ndarray:
    """The numbers of the texts that hold these places."""
    return np.searchsorted(folded.starts[1:], places, "right")


# ------------------------------------------------------------------ keys and their MinHash


def keys(folded: Folded, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(code points, starts) of the records' key texts: lower case, no white space, their texts joined."""
    white = (folded.bits & np.uint16(SPACE | LINE_END)) != 0
    before = np.searchsorted(np.flatnonzero(white), folded.starts[records])
    return tables().lower[folded.codes[~white]], folded.starts[records] - before


def shingle_hashes(codes: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(hashes, offsets) of the 5-character shingles of every key; a shorter key is one shingle, padded with zeros."""
    lengths = np.diff(starts)
    short = np.flatnonzero(lengths < SHINGLE)
    if len(short):  # make each of them 5 long
        padding = np.repeat(starts[short + 1], SHINGLE - lengths[short])
        codes = np.insert(codes, padding, 0)
        lengths = np.maximum(lengths, SHINGLE)
        starts = np.concatenate(([0], np.cumsum(lengths)))
    hashes = window_hashes(codes, SHINGLE)
    inside = np.ones(len(hashes), bool)  # not over the border of two keys
    for back in range(1, SHINGLE):
        inside[starts[1:-1] - back] = False
    return hashes[inside], np.concatenate(([0], np.cumsum(lengths - SHINGLE + 1)))


def band_hashes(hashes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """uint64 [BANDS, documents]: equal in a band where all its ROWS MinHash values are equal (Broder 1997; bands as in
    Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4)."""
    if len(offsets) == 1:
        return np.zeros((BANDS, 0), np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets.astype(np.uint64), BANDS * ROWS, 1)
    values = np.array(matrix.to_rows(), np.uint64).reshape(-1, BANDS, ROWS)
    combined = values[:, :, 0].copy()
    for row in range(1, ROWS):
        combined *= _M1
        combined += values[:, :, row]
    return np.ascontiguousarray(mixed(combined).T)
