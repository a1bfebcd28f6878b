"""
Word lists and phrases, found in one pass by Aho-Corasick (ahocorasick_rs).

What is searched is the lower-cased folded text (text.folded_text, then str.lower), and every position is one of that
text. A word that begins or ends with a letter of a script that puts spaces between its words (Latin, Greek, Cyrillic
...) or with a digit counts only at a word's border there: "ass" is not in "class", but "sex" is in "用sex来". Chinese,
Japanese and Korean words count anywhere.
"""

import codecs
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ahocorasick_rs import BytesAhoCorasick, Implementation

from posttrain.errors import UserFault
from posttrain.text import folded_text

DFA_CHARS = 20_000  # patterns of more characters get the smaller, slower automaton: a DFA of 100,000 words takes 1 GB


class Words:
    """An automaton over patterns, which are numbered as given and are to be in lower-case folded form already.

    An empty pattern is a ValueError. Building takes milliseconds; do it once per process."""

    def __init__(self, patterns: Sequence[str]):
        self.patterns = list(patterns)
        dense = sum(map(len, self.patterns)) <= DFA_CHARS
        kind = Implementation.DFA if dense else Implementation.ContiguousNFA
        # Over bytes: the automaton over str spends three quarters of its time on a table of all character offsets.
        self._automaton = BytesAhoCorasick([word.encode() for word in self.patterns], implementation=kind)
        self._spaced = [(is_spaced(word[0]), is_spaced(word[-1])) for word in self.patterns]

    def hits(self, blob: str) -> tuple[np.ndarray, np.ndarray]:
        """(numbers of patterns, offsets of their first characters in `blob`), int64, of every occurrence, overlapping
        ones too, by where they end. Borders are not looked at (`find` does)."""
        data = blob.encode("utf-8", "surrogatepass")
        numbers, starts = self.byte_hits(data)
        return numbers, starts if blob.isascii() else _in_characters(data, starts)

    def byte_hits(self, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        """`hits` in UTF-8, and offsets in it."""
        found = np.array(self._automaton.find_matches_as_indexes(data, overlapping=True), dtype=np.int64)
        return tuple(found.reshape(-1, 3)[:, :2].T)

    def find(self, text: str) -> list[tuple[int, int, int]]:
        """(number, start, end) of every pattern at word borders, in lower-case folded `text`."""
        pairs = zip(*(each.tolist() for each in self.hits(text)), strict=True)
        return [(n, start, start + len(self.patterns[n])) for n, start in pairs if self._stands(text, n, start)]

    def _stands(self, text: str, number: int, start: int) -> bool:
        """Whether a hit is no part of a longer word."""
        left, right = self._spaced[number]
        end = start + len(self.patterns[number])
        return not (left and start and is_spaced(text[start - 1])) and not (
            right and end < len(text) and is_spaced(text[end])
        )


def _in_characters(data: bytes, starts: np.ndarray) -> np.ndarray:
    """Offsets in UTF-8 bytes, each at the beginning of a character, as offsets in characters."""
    places, which = np.unique(starts, return_inverse=True)
    counts = np.empty(len(places), dtype=np.int64)
    before = chars = 0
    for n, place in enumerate(places.tolist()):
        chars += len(data[before:place].decode("utf-8", "surrogatepass"))
        before, counts[n] = place, chars
    return counts[which]


def is_spaced(char: str) -> bool:
    """A letter or digit of a script that puts spaces between words (those before U+2E80), or an underscore."""
    return char < "\u2e80" and (char.isalnum() or char == "_")


def keyword_topics(text: str, words: Words, topics: Sequence[str]) -> dict[str, list[str]]:
    """Topic -> its words that are in the text, each once, sorted. `topics` names the topic of each pattern."""
    found = {(topics[number], words.patterns[number]) for number, _, _ in words.find(folded_text(text).lower())}
    return {topic: sorted(word for its, word in found if its == topic) for topic in sorted({its for its, _ in found})}


def load_list(path: Path) -> list[str]:
    """The words of a list, each once, as they are searched: UTF-8, one per line, lines that begin with # are comments.

    UserFault if the file cannot be read, is in another encoding, or holds no word."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserFault(f"{path}: this word list cannot be read ({error.strerror}); put a UTF-8 file there, one word "
                        "per line, or take its key out of `keywords`") from None  # fmt: skip
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserFault(_not_utf8(path, "UTF-16"))
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserFault(_not_utf8(path, "GB18030" if _is_gb18030(data) else "?", line)) from None
    words = [folded_text(line).lower() for line in lines if not line.lstrip().startswith("#")]
    words = list(dict.fromkeys(word for word in words if word))
    if not words:
        raise UserFault(f"{path}: this word list holds no word; write one per line, # begins a comment")
    return words


def _is_gb18030(data: bytes) -> bool:
    try:
        data.decode("gb18030")
    except UnicodeDecodeError:
        return False
    return True


def _not_utf8(path: Path, encoding: str, line: int = 1) -> str:
    """The message for a list in another encoding."""
    if encoding == "?":
        return f"{path}, line {line}: this word list is not UTF-8; save it as UTF-8"
    return (f"{path}, line {line}: this word list is not UTF-8 but looks like {encoding}; convert it: "
            f"iconv -f {encoding} -t UTF-8 {path} > {path}.utf8")  # fmt: skip
