"""
Sensitive words at inference: found in a stream of text however it is cut into pieces, masked, replaced, or blocked.

The words are the user's own files (words.load_list). Text and words are compared in a searched form: NFKC and case
folded, traditional characters as simplified ones (OpenCC), and without noise: up to NOISE characters in a row that are
neither letters nor digits do not count, so `敏*感 詞` is `敏感词`. A Latin word counts only at word borders, and no
white space may stand inside it that the word does not have itself: `ass` is neither in `class` nor in `as soon`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, NamedTuple
from unicodedata import normalize

from posttrain.words import Words, is_spaced

NOISE = 8  # characters; more of them in a row end a word


@cache
def searched(char: str) -> str:
    """What a character is compared as: one or more letters or digits, or "" for noise."""
    import opencc

    folded = _simplified(opencc).convert(normalize("NFKC", char)).casefold()
    return "".join(one for one in folded if one.isalnum())


@cache
def _simplified(opencc):
    return opencc.OpenCC("t2s")


class Hit(NamedTuple):
    """A word as the user wrote it, and where it stands in the whole text."""

    word: str
    start: int
    end: int


class SensitiveWords:
    """The automaton, built once. Raises ValueError for a word without any letter or digit."""

    def __init__(self, words: Iterable[str]):
        self.words = list(dict.fromkeys(words))
        forms = ["".join(map(searched, word)) for word in self.words]
        if bad := [word for word, form in zip(self.words, forms, strict=True) if not form]:
            raise ValueError(f"not a word to look for: {bad[0]!r} (it holds no letter or digit)")
        self.automaton = Words(forms)
        self.prefixes = {form[:end] for form in forms for end in range(1, len(form) + 1)}
        self.longest = max(map(len, forms), default=0)
        self.blanks = [_blanks(word, *_form(word)) for word in self.words]

    def filter(self, text: str, action: Literal["mask", "replace", "block"] = "mask", by: str = "*") -> str:
        """A whole text without its sensitive words."""
        stream = Stream(self, action, by)
        return stream.feed(text) + stream.end()


@dataclass
class Stream:
    """One text as it comes, piece by piece. What could still become a word is held back, at most the longest word and
    the noise inside it.

    mask: every character of a word becomes `by`; replace: the word becomes `by`; block: the text ends before the word,
    and `blocked` is set. `hits` are all words found so far.
    """

    words: SensitiveWords
    action: Literal["mask", "replace", "block"] = "mask"
    by: str = "*"
    hits: list[Hit] = field(default_factory=list)
    blocked: bool = False
    _held: str = ""
    _before: str = ""  # the character before what is held
    _passed: int = 0  # characters of the text before what is held

    def feed(self, piece: str) -> str:
        """What can be shown after this piece came."""
        return "" if self.blocked else self._advance(self._held + piece, False)

    def end(self) -> str:
        """What is left to show."""
        return "" if self.blocked else self._advance(self._held, True)

    def _advance(self, text: str, ended: bool) -> str:
        form, places = _form(text)
        keep = len(text) if ended else self._safe_until(form, places, text)
        spans = sorted(self._found(text, form, places))
        while cut := [span for span in spans if span[0] < keep < span[1]]:  # words that overlap are shown together
            keep = min(start for start, _, _ in cut)
        shown = self._shown(text, keep, [span for span in spans if span[1] <= keep])
        self._held, self._before = text[keep:], text[keep - 1 : keep] or self._before
        self._passed += keep
        return shown

    def _safe_until(self, form: str, places: list[int], text: str) -> int:
        """The place in `text` from which on it could still become a word, or a word could still lose its border."""
        if form and len(text) - places[-1] - 1 > NOISE:
            return len(text)
        for start in range(max(0, len(form) - self.words.longest), len(form)):
            if form[start:] in self.words.prefixes:
                return places[start]
        return len(text)

    def _found(self, text: str, form: str, places: list[int]) -> list[tuple[int, int, int]]:
        """(start, end, number) in `text` of the words that stand in it."""
        found = []
        for number, start in zip(*(each.tolist() for each in self.words.automaton.hits(form)), strict=True):
            pattern = self.words.automaton.patterns[number]
            last = start + len(pattern) - 1
            first_place, end_place = places[start], places[last] + 1
            own = places[start : last + 1]
            noise = max((b - a - 1 for a, b in zip(own, own[1:], strict=False)), default=0)
            before = text[first_place - 1] if first_place else self._before
            after = text[end_place] if end_place < len(text) else ""
            borders = not (is_spaced(pattern[0]) and before and is_spaced(before)) and not (
                is_spaced(pattern[-1]) and after and is_spaced(after)
            )
            if borders and noise <= NOISE and _blanks(text, pattern, own) <= self.words.blanks[number]:
                found.append((first_place, end_place, number))
        return found

    def _shown(self, text: str, keep: int, spans: list[tuple[int, int, int]]) -> str:
        """text[:keep] with its words treated; overlapping ones are one."""
        self.hits += [Hit(self.words.words[n], self._passed + a, self._passed + b) for a, b, n in spans]
        out, at = [], 0
        for start, end, _ in spans:
            if self.action == "block":
                self.blocked = True
                return text[:start]
            if end <= at:
                continue
            overlaps = start < at
            start = max(start, at)
            out.append(text[at:start])
            out.append(self.by * (end - start) if self.action == "mask" else "" if overlaps else self.by)
            at = end
        return "".join([*out, text[at:keep]])


def _blanks(text: str, form: str, places: list[int]) -> int:
    """White space in a text that stands between two Latin letters or digits of a word in it."""
    between = zip(form, form[1:], places, places[1:], strict=False)
    return sum(char.isspace() for left, right, a, b in between if is_spaced(left) and is_spaced(right)
               for char in text[a + 1 : b])  # fmt: skip


def _form(text: str) -> tuple[str, list[int]]:
    """(the searched form of a text, the place in the text of each of its characters)."""
    form, places = [], []
    for place, char in enumerate(text):
        for one in searched(char):
            form.append(one)
            places.append(place)
    return "".join(form), places
