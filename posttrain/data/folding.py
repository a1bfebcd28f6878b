"""
Folding a block of texts at once: text.folded_text by table look-up on code points.

A text without characters that NFKC composes or spreads over several becomes its NFKC form character by character; the
few others go through text.folded_text itself. tests/test_folding.py holds both to the same result.
"""

import functools
import unicodedata
from typing import NamedTuple

import numpy as np

from posttrain.text import HAN, folded_text

HAN_BIT, ALNUM, DIGIT, LETTER, SPACE, LINE_END, DROPPED, SLOW, REWRITTEN, SAFE = (1 << bit for bit in range(10))
_UNIFIED = ((0x3400, 0x4DC0), (0x4E00, 0xA000), (0x20000, 0x2A6E0), (0x2A700, 0x2EBE1), (0x30000, 0x323B0))
_HANGUL = (0xAC00, 0xD7A4)
_SPACES = {0x20, 0x09, 0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000}
_LINE_ENDS = {0x0A, 0x0B, 0x0C, 0x0D, 0x85, 0x2028, 0x2029}
_INVISIBLE = {*range(0x00, 0x09), *range(0x0E, 0x20), *range(0x7F, 0x85), *range(0x86, 0xA0), 0xAD,
              *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2065), *range(0x2066, 0x2070), 0xFEFF,
              *range(0xD800, 0xE000), 0xFFFE, 0xFFFF}  # fmt: skip
# What text.training_text may rewrite, beside white space: full-width letters and digits; and markup.
_WIDE = {*range(0xFF10, 0xFF1A), *range(0xFF21, 0xFF3B), *range(0xFF41, 0xFF5B)}


class Tables(NamedTuple):
    """One entry per code point."""

    folded: np.ndarray
    """uint32: the character it becomes."""
    bits: np.ndarray
    """uint16: HAN_BIT ... of what it becomes; SLOW, DROPPED, REWRITTEN and SAFE of what it is."""
    lower: np.ndarray
    """uint32: lower case, where that is one character."""


@functools.cache
def tables() -> Tables:
    """Built from unicodedata in about 0.2 s, once per process."""
    size = 0x110000
    folded, lower = np.arange(size, dtype=np.uint32), np.arange(size, dtype=np.uint32)
    bits = np.zeros(size, np.uint16)
    for first, end in _UNIFIED:
        bits[first:end] = HAN_BIT | LETTER
    bits[slice(*_HANGUL)] = LETTER
    listed = _listed()
    after = _second_characters(listed)
    han = [(ord(HAN[i]), ord(HAN[i + 2]) + 1) for i in range(1, len(HAN) - 2) if HAN[i + 1] == "-"]
    for code in listed:
        if code in _INVISIBLE:
            bits[code] = DROPPED
            continue
        char = chr(code)
        form = unicodedata.normalize("NFKC", char)
        if len(form) != 1 or ord(form) in after or unicodedata.combining(char) or code in after or (
            unicodedata.combining(form)):  # fmt: skip
            bits[code] = SLOW | REWRITTEN | _kind(char, han)
            continue
        if ord(form) in _LINE_ENDS:
            form = "\n"
        elif ord(form) in _SPACES:
            form = " "
        folded[code] = ord(form)
        rewritten = code in _WIDE or form in " \n" and char not in " \n" or char in "<&" or not (
            unicodedata.is_normalized("NFC", char))  # fmt: skip
        safe = code in _WIDE or form in " \n"  # folded in the training text too
        bits[code] = _kind(form, han) | (REWRITTEN if rewritten else 0) | (SAFE if safe else 0)
        if len(small := form.lower()) == 1:
            lower[ord(form)] = ord(small)
    bits[0xD800:0xE000] = DROPPED
    return Tables(folded, bits, lower)


def _listed() -> list[int]:
    """The assigned code points that must be looked at one by one: not the large blocks in which all are alike."""
    alike = sorted([*_UNIFIED, _HANGUL, (0xD800, 0xF900), (0x33480, 0xE0000)])
    starts, ends = [0, *(end for _, end in alike)], [*(first for first, _ in alike), 0xE01F0]
    return [code for start, end in zip(starts, ends, strict=True) for code in range(start, end)]


def _second_characters(codes: list[int]) -> set[int]:
    """Characters that may melt into the one before them (NFC composition)."""
    pairs = (unicodedata.decomposition(chr(code)).split() for code in codes)
    second = {int(pair[1], 16) for pair in pairs if len(pair) == 2 and pair[0][0] != "<"}
    return second | set(range(0x1161, 0x1176)) | set(range(0x11A8, 0x11C3))


def _kind(char: str, han: list[tuple[int, int]]) -> int:
    code = ord(char)
    kind = HAN_BIT if code == 0x3007 or any(first <= code < end for first, end in han) else 0
    kind |= ALNUM if char.isascii() and char.isalnum() else 0
    kind |= DIGIT if "0" <= char <= "9" else 0
    kind |= LETTER if char.isalnum() and not char.isdecimal() else 0
    return kind | (SPACE if char == " " else LINE_END if char == "\n" else 0)


class Folded(NamedTuple):
    """The folded texts of a block, one after the other without anything between them."""

    texts: list[str]
    codes: np.ndarray
    """uint32 code points of all texts."""
    bits: np.ndarray
    """uint16, tables().bits of each."""
    starts: np.ndarray
    """int64, where each text begins in `codes`, and the end: one more than texts."""
    as_written: np.ndarray
    """bool per text: text.training_text and HTML stripping leave the original as it is."""
    training: dict[int, str]
    """The training text of those of the others that need nothing but white space, widths and invisible characters
    folded; what holds indentation, code blocks, markup or characters that compose goes through text_forms.written."""


def fold(originals: list[str]) -> Folded:
    """text.folded_text of every text."""
    table = tables()
    texts, codes, starts = _joined([text.replace("…", "...") if "…" in text else text for text in originals])
    slow = np.flatnonzero(table.bits[codes] & SLOW)
    rewritten, by_hand = np.zeros(len(texts), bool), np.zeros(len(texts), bool)
    if len(slow):
        _mark(by_hand, starts, slow)
        for number in np.flatnonzero(by_hand).tolist():
            texts[number] = folded_text(texts[number])
        texts, codes, starts = _joined(texts)
    rewritten |= by_hand
    bits = table.bits[codes]
    _mark(rewritten, starts, np.flatnonzero(bits & REWRITTEN))
    _mark(by_hand, starts, np.flatnonzero((codes == ord("<")) | (codes == ord("&")) | (codes == 0x200D)))
    dropped = (bits & DROPPED) != 0
    returns = np.flatnonzero(codes == 13)
    if len(returns):  # \r\n is one line end
        after = returns[returns + 1 < len(codes)] + 1
        after = after[codes[after] == 10]
        dropped[after[~np.isin(after, starts)]] = True
    codes, safe = table.folded[codes], np.where(bits & SAFE, table.folded[codes], codes)
    if dropped.any():
        _mark(rewritten, starts, np.flatnonzero(dropped))
        codes, safe, bits, starts = _without(dropped, starts, codes, safe, bits)
    codes, safe, bits, starts = _with_white_space_folded(codes, safe, bits, starts, rewritten, by_hand)
    whole, ends = codes.tobytes().decode("utf-32-le"), starts.tolist()
    training = {}
    for number in np.flatnonzero(rewritten & ~by_hand).tolist():
        if not any(mark in originals[number] for mark in ("…", "```", "~~~")):
            training[number] = safe[ends[number] : ends[number + 1]].tobytes().decode("utf-32-le")
    return Folded([whole[a:b] for a, b in zip(ends, ends[1:], strict=False)], codes, bits, starts, ~rewritten, training)


def _joined(texts: list[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), "<u4")
    starts = np.zeros(len(texts) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)), out=starts[1:])
    return texts, codes, starts


def _mark(marks: np.ndarray, starts: np.ndarray, places: np.ndarray) -> None:
    """Set the mark of every text that holds one of the places."""
    if len(places):
        marks[np.searchsorted(starts[1:], places, "right")] = True


def _without(dropped: np.ndarray, starts: np.ndarray, *arrays: np.ndarray) -> tuple:
    before = np.searchsorted(np.flatnonzero(dropped), starts)
    kept = ~dropped
    return *(array[kept] for array in arrays), starts - before


def _with_white_space_folded(codes, safe, bits, starts, rewritten, by_hand) -> tuple:
    """Each run of white space in a text becomes ' ', '\\n' or '\\n\\n' by its number of line ends; at its ends nothing.

    Marks in `rewritten` the texts in which this, or training_text's folding of the same places, changes something; in
    `by_hand` those with an indentation, which training_text keeps.
    """
    white = (bits & np.uint16(SPACE | LINE_END)) != 0
    at_start = np.zeros(len(codes) + 1, bool)
    at_start[starts] = True
    # Only white space beside other white space, or at the end of a text, can change: a small part of it.
    beside = at_start[:-1] | at_start[1:]
    beside[1:] |= white[:-1]
    beside[:-1] |= white[1:]
    places = np.flatnonzero(white & beside)
    if not len(places):
        return codes, safe, bits, starts
    begins = np.ones(len(places), bool)
    begins[1:] = (places[1:] != places[:-1] + 1) | at_start[places[1:]]
    runs = np.flatnonzero(begins)
    first, last = places[runs], places[np.append(runs[1:], len(places)) - 1]
    line_ends = np.add.reduceat((bits[places] & LINE_END) != 0, runs, dtype=np.int64)
    outer = at_start[first] | at_start[last + 1]
    length = last - first + 1
    _mark(rewritten, starts, first[outer | (length > 2) | ((length == 2) & (line_ends < 2))])
    _mark(by_hand, starts, first[((bits[last] & SPACE) != 0) & ((line_ends > 0) | at_start[first])])
    kept = np.where(outer, 0, np.minimum(np.maximum(line_ends, 1), 2))
    dropped = np.zeros(len(codes), bool)
    dropped[places] = True
    dropped[first[kept >= 1]] = False
    dropped[first[kept == 2] + 1] = False
    single = kept == 1
    for array in (codes, safe):
        array[first[single]] = np.where(line_ends[single] > 0, 10, 32)
        for offset in (0, 1):
            array[first[kept == 2] + offset] = 10
    bits[first[single]] = np.where(line_ends[single] > 0, LINE_END, SPACE)
    for offset in (0, 1):
        bits[first[kept == 2] + offset] = LINE_END
    return _without(dropped, starts, codes, safe, bits) if dropped.any() else (codes, safe, bits, starts)
