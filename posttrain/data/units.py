"""
Units: what texts are compared by when a benchmark's items are looked for, of many texts at once.

A unit is a Han character, a run of other letters or a run of digits, lower case; benchmarks.UNIT is the same as a
regular expression. Punctuation, white space and line ends part units and do not count. Runs of units are compared by a
polynomial of their characters modulo 2^64, from prefix sums, so that every length costs the same.
"""

import functools
from typing import NamedTuple

import numpy as np

from posttrain.data.compiled import DIGIT, HAN_BIT, LETTER, SPACE
from posttrain.data.folding import tables
from posttrain.data.kernels import mixed

_ROOT = 0x9E3779B97F4A7C15 | 1  # of the polynomial; odd, hence with an inverse modulo 2^64
_BLANK, _DIGITS, _LETTERS, _HAN = (np.uint32(kind << 24) for kind in (1, 2, 3, 4))
_TABLE = 1 << 17  # powers of the root that are always at hand


class Units(NamedTuple):
    """The units of some texts, one text after the other."""

    first: np.ndarray
    """int64: number of the first unit of each text, and the number of units."""
    sums: np.ndarray
    """uint64: of all characters before each unit, the sum of character x root^position; one more than units."""
    inverse: np.ndarray
    """uint64: root^-position of each unit."""
    apart: np.ndarray
    """bool, one more than units: it is the letter of an option, or punctuation (no comma), a line end or the end of a
    text stands before it."""

    def hashes(self, length: int) -> np.ndarray:
        """uint64 hash of each `length` units in a row."""
        return _hashed(self.sums[length:] - self.sums[:-length], self.inverse[: len(self.sums) - length], length)

    def hashes_at(self, places: np.ndarray, lengths) -> np.ndarray:
        """The same at some places only."""
        return _hashed(self.sums[places + lengths] - self.sums[places], self.inverse[places], lengths)


def _hashed(difference: np.ndarray, inverse: np.ndarray, length) -> np.ndarray:
    difference *= inverse
    difference += np.asarray(length).astype(np.uint64)  # so that one word is not two others, written together
    return mixed(difference)


@functools.cache
def _characters() -> np.ndarray:
    """uint32 per code point: its lower case, and above it its kind: 0 of what divides, _BLANK (commas too), _DIGITS,
    _LETTERS, _HAN."""
    bits, lower = tables().bits, tables().lower
    kinds = np.zeros(len(bits), np.uint32)
    for bit, kind in ((SPACE, _BLANK), (DIGIT, _DIGITS), (LETTER, _LETTERS), (HAN_BIT, _HAN)):
        kinds[(bits & bit) != 0] = kind
    kinds[ord(",")] = _BLANK
    return kinds | lower


@functools.lru_cache(maxsize=2)
def _powers(length: int) -> tuple[np.ndarray, np.ndarray]:
    """root^0, root^1, ... and their inverses, modulo 2^64."""
    both = []
    for base in (_ROOT, pow(_ROOT, -1, 1 << 64)):
        powers = np.full(length, base, np.uint64)
        powers[0] = 1
        both.append(np.multiply.accumulate(powers))
    return tuple(both)


def units_of(texts: list[str]) -> Units:
    """The units of folded texts (text.folded_text)."""
    blob = "\n".join([*texts, ""]).replace("\\n", "\n\n")  # a line end that is written as JSON does
    codes = _characters()[np.frombuffer(blob.encode("utf-32-le", "surrogatepass"), "<u4")]
    is_unit = codes >= _DIGITS
    places, between = np.flatnonzero(is_unit), np.flatnonzero(~is_unit)
    codes_kept = codes[places]
    kinds = codes_kept & np.uint32(0xFF000000)
    begins = np.ones(len(places), bool)
    begins[1:] = (kinds[1:] != kinds[:-1]) | (kinds[1:] == _HAN) | (np.diff(places) > 1)
    begin = np.append(np.flatnonzero(begins), len(places))
    root, inverse = _powers(1 << max(_TABLE, len(places) + 1).bit_length())
    sums = np.zeros(len(places) + 1, np.uint64)
    np.cumsum(codes_kept * root[: len(places)], out=sums[1:])
    divided = np.zeros(len(places) + 1, bool)
    divided[(between - np.arange(len(between)))[codes[between] < _BLANK]] = True
    divided[0] = True
    first_letters = codes_kept[begin[:-1]] - (_LETTERS | np.uint32(ord("a")))
    apart = divided[begin]
    apart[:-1] |= (first_letters < 8) & (np.diff(begin) == 1) & apart[1:]  # the A. of an option
    ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)) + 1)
    first = np.append(0, np.searchsorted(begin[:-1], np.searchsorted(places, ends)))
    return Units(first, sums[begin], inverse[begin[:-1]], apart)
