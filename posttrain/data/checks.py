"""
Checking a block: which records each rule finds, and what that means for them.

What can be counted is counted for the whole block (kernels.py); a heuristic is called only for the records that hold
one of the phrases that it needs. tests/test_oracle.py holds the outcome to rules.RULES applied one record at a time.
"""

import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from posttrain.data import compiled, decontaminate, kernels, pii
from posttrain.data.catalogue import Source
from posttrain.data.masking import arguments, masked
from posttrain.data.rules import DIGITS, RULES, SCRIPTS, View
from posttrain.data.shape import Texts, turns_of
from posttrain.data_blocks import Rules
from posttrain.records import fault_in
from posttrain.text import has_lone_surrogate
from posttrain.words import Words, load_list

COUNTED = ("too_short", "too_long", "other_language", "odd_symbols", "repetition")


class Tools(NamedTuple):
    """What a process needs to check the blocks of a task."""

    phrases: Words | None
    """What rules need, and the words of the lists."""
    wanted_by: list[list[str]]
    """Of each phrase: the rules that need it; `keywords` for the words of a list."""
    keywords: Words | None
    topics: list[str]
    """Of each keyword."""
    blacklist: list[re.Pattern]
    benchmarks: Any
    min_coverage: float
    tokenizer: Any


class Found(NamedTuple):
    """What the rules found in the records of a block."""

    reasons: list[tuple[str, str] | None]
    """Per record: (reason, detail) of the first rule that drops it."""
    flags: dict[int, list[tuple[str, str]]]
    """Record -> (rule, detail) of those that flag it."""
    masked: set[int]
    """Records in which personal data was replaced."""
    chars: np.ndarray
    tokens: np.ndarray
    turns: np.ndarray
    languages: np.ndarray


@functools.lru_cache(2)
def tools_for(active: frozenset[str], words: tuple[tuple[str, Path], ...], blacklist: tuple[str, ...],
              benchmarks: Path | None, min_coverage: float, tokenizer: Path | None) -> Tools:  # fmt: skip
    """Built once per process and task, for the rules that are on in some source."""
    wanted: dict[str, list[str]] = {}
    for rule in RULES:
        for phrase in rule.needs if rule.name in active else ():
            if phrase not in (DIGITS, SCRIPTS):
                wanted.setdefault(phrase, []).append(rule.name)
    lists = words if "keywords" in active else ()
    listed = [(word, topic) for topic, path in lists for word in load_list(path)]
    for word, _ in listed:
        wanted.setdefault(word, []).append("keywords")
    encoder = None
    if tokenizer:
        from tokenizers import Tokenizer

        encoder = Tokenizer.from_file(str(tokenizer))
    return Tools(Words(list(wanted)) if wanted else None, list(wanted.values()),
                 Words([word for word, _ in listed]) if listed else None, [topic for _, topic in listed],
                 [re.compile(pattern) for pattern in blacklist],
                 decontaminate.load(benchmarks) if benchmarks else None, min_coverage, encoder)  # fmt: skip


def active_rules(sources: Iterable[Source]) -> frozenset[str]:
    """The rules that some source flags, drops or masks by."""
    return frozenset(name for source in sources for name, value in source.rules.model_dump().items()
                     if value in ("flag", "drop", "mask"))  # fmt: skip


def check(texts: Texts, rules: Rules, tools: Tools) -> Found:
    """Apply every rule, in this order: a record has the reason of the first that drops it."""
    verdicts = Verdicts(len(texts.records), rules)
    _broken(texts, verdicts)
    per_text = kernels.Counts(texts.folded)
    whole = per_text.per_record(texts.bounds)
    chars, languages = char_counts(texts, per_text, whole), kernels.languages(whole, rules.min_cn_ratio)
    for number, record in enumerate(texts.records):
        if said := record["meta"].get("lang"):
            languages[number] = kernels.LANGUAGES.index(said) if said in kernels.LANGUAGES else 3
    _counted(texts, verdicts, whole, chars, languages)
    found = _with_phrases(texts, tools)
    found[SCRIPTS] = _in_two_scripts(texts, per_text)
    found[DIGITS] = _marked(texts, compiled.LONG_DIGITS)
    _heuristics(texts, verdicts, found)
    _keywords(texts, verdicts, found, tools)
    _blacklist(texts, verdicts, tools)
    _pii(texts, verdicts, found)
    _contaminated(texts, verdicts, tools)
    tokens = _tokens(texts, verdicts, tools)
    asked = np.array([turn.get("role") == "user" for record in texts.records for turn in turns_of(record)], np.int64)
    before = np.concatenate(([0], np.cumsum(asked)))
    turns = before[texts.bounds[1:]] - before[texts.bounds[:-1]]
    return Found(verdicts.reasons, verdicts.flags, verdicts.masked, chars, tokens, turns, languages)


class Verdicts:
    """Reasons and flags as they come."""

    def __init__(self, count: int, rules: Rules):
        self.rules, self.reasons, self.flags, self.masked = rules, [None] * count, {}, set()

    def looks(self, name: str) -> bool:
        """Whether a rule is on at all."""
        return getattr(self.rules, name) != "keep"

    def says(self, number: int, name: str, detail: str) -> None:
        """A rule found something in a record."""
        if self.reasons[number] is not None:
            return
        if getattr(self.rules, name) == "drop":
            self.reasons[number] = (name, detail)
        elif all(flag != name for flag, _ in self.flags.get(number, ())):
            self.flags.setdefault(number, []).append((name, detail))

    def alive(self, numbers) -> list[int]:
        """Those of the records that no rule dropped yet, in order."""
        return [number for number in sorted(numbers) if self.reasons[number] is None]


def view_of(texts: Texts, number: int) -> View:
    """A record as rules see it."""
    record = texts.records[number]
    said = texts.folded.texts(*texts.bounds[number : number + 2].tolist())
    return View([turn.get("role", "text") for turn in turns_of(record)], said, record)


def _owners(texts: Texts, numbers: np.ndarray) -> set[int]:
    """The records that hold these texts."""
    return set(np.searchsorted(texts.bounds[1:], numbers, "right").tolist())


def _marked(texts: Texts, mark: int) -> set[int]:
    """The records with a text that has this mark."""
    return _owners(texts, np.flatnonzero(texts.folded.marks & mark))


# ------------------------------------------------------------------ what is counted


def _broken(texts: Texts, verdicts: Verdicts) -> None:
    """Records that are none any more once their text is written (records.fault_in), and half characters in tools."""
    suspects = _owners(texts, np.flatnonzero(np.diff(texts.folded.starts) == 0))
    for number, record in enumerate(texts.records):
        if "tools" in record or "chosen" in record or number in texts.calling:
            suspects.add(number)
    for number in sorted(suspects):
        record = texts.records[number]
        calls = [[turn.get("tool_calls") for turn in turns_of(record)], record.get("tools")]
        text = json.dumps(calls, ensure_ascii=False, default=str)
        fault = "lone_surrogate" if has_lone_surrogate(text) else fault_in(record)
        if fault:
            verdicts.reasons[number] = (fault, "")


def char_counts(texts: Texts, per_text: kernels.Counts, whole: kernels.Counts) -> np.ndarray:
    """Characters of a record: its turns joined by line ends; of a pair its prompt and the longer answer."""
    turns = np.diff(texts.bounds)
    chars = whole.chars + turns - 1
    if texts.records and "chosen" in texts.records[0]:
        last = texts.bounds[1:] - 1
        chars -= np.minimum(per_text.chars[last], per_text.chars[last - 1]) + 1
    return chars


def _counted(texts: Texts, verdicts: Verdicts, whole: kernels.Counts, chars: np.ndarray, languages: np.ndarray) -> None:
    rules = verdicts.rules
    not_wanted = languages == 3
    if not rules.allow_english_fallback:
        not_wanted |= languages == 2
    shares = whole.ordinary / np.maximum(whole.visible, 1)
    answers = texts.bounds[1:] - (2 if texts.records and "chosen" in texts.records[0] else 1)
    repeated = np.zeros(0)
    if verdicts.looks("repetition"):
        repeated = kernels.repetition(texts.folded, answers, rules.max_repetition)
    found = {
        "too_short": (chars < rules.min_chars, lambda n: f"{chars[n]} characters"),
        "too_long": (chars > rules.max_chars, lambda n: f"{chars[n]} characters"),
        "other_language": (not_wanted, lambda n: kernels.LANGUAGES[languages[n]]),
        "odd_symbols": ((shares < rules.min_ordinary) & (whole.visible > 0), lambda n: f"{shares[n]:.0%} ordinary"),
        "repetition": (repeated > rules.max_repetition, lambda n: f"{repeated[n]:.0%} of the 4-grams repeat"),
    }  # fmt: skip
    for name, (mask, detail) in found.items():
        if verdicts.looks(name):
            for number in np.flatnonzero(mask).tolist():
                verdicts.says(number, name, detail(number))


def _in_two_scripts(texts: Texts, per_text: kernels.Counts) -> set[int]:
    """Records with a turn in Chinese and one in English."""
    languages = kernels.languages(per_text, 0.3)  # text.language's own default, which the rule takes
    return _owners(texts, np.flatnonzero(languages == 1)) & _owners(texts, np.flatnonzero(languages == 2))


# ------------------------------------------------------------------ what is looked for


def _with_phrases(texts: Texts, tools: Tools) -> dict[str, set[int]]:
    """Rule -> the records that hold one of its phrases, `keywords` among them."""
    found: dict[str, set[int]] = {}
    if tools.phrases is None:
        return found
    blob, starts = kernels.utf8(texts.folded.codes, texts.folded.starts)
    patterns, places = tools.phrases.byte_hits(blob)
    lengths = np.array([len(phrase.encode()) for phrase in tools.phrases.patterns])
    numbers = np.searchsorted(starts[1:], places, "right")
    inside = places + lengths[patterns] <= starts[numbers + 1]  # not over the border of two texts
    owners = np.searchsorted(texts.bounds[1:], numbers[inside], "right")
    pairs = np.unique(np.stack((patterns[inside], owners)), axis=1) if len(owners) else np.zeros((2, 0), np.int64)
    for pattern, owner in zip(*pairs.tolist(), strict=True):
        for name in tools.wanted_by[pattern]:
            found.setdefault(name, set()).add(owner)
    return found


def _heuristics(texts: Texts, verdicts: Verdicts, found: dict[str, set[int]]) -> None:
    for rule in RULES:
        if rule.name in COUNTED or not verdicts.looks(rule.name):
            continue
        suspects = range(len(texts.records)) if not rule.needs else set().union(
            *(found.get(need, ()) for need in (SCRIPTS, DIGITS) if need in rule.needs), found.get(rule.name, ()))
        for number in verdicts.alive(suspects):
            if detail := rule.finds(view_of(texts, number), verdicts.rules):
                verdicts.says(number, rule.name, detail)


def _keywords(texts: Texts, verdicts: Verdicts, found: dict[str, set[int]], tools: Tools) -> None:
    """`keywords`: a word of one of the lists, Latin words as whole words. Sources with safety_filter false pass."""
    if not (tools.keywords and verdicts.looks("keywords") and verdicts.rules.safety_filter):
        return
    for number in verdicts.alive(found.get("keywords", ())):
        said = "\n".join(view_of(texts, number).texts).lower()
        found_words = {f"{tools.topics[n]}: {tools.keywords.patterns[n]}" for n, *_ in tools.keywords.find(said)}
        if found_words:
            verdicts.says(number, "keywords", "; ".join(sorted(found_words)[:5]))


def _blacklist(texts: Texts, verdicts: Verdicts, tools: Tools) -> None:
    """`blacklist`: one of the configured regular expressions matches in the folded text of a turn."""
    if not (tools.blacklist and verdicts.looks("blacklist")):
        return
    for number in verdicts.alive(range(len(texts.records))):
        for text in view_of(texts, number).texts:
            if match := next((m for pattern in tools.blacklist if (m := pattern.search(text))), None):
                verdicts.says(number, "blacklist", f"{match.re.pattern} matches {match.group()[:60]!r}")
                break


def _pii(texts: Texts, verdicts: Verdicts, found: dict[str, set[int]]) -> None:
    """`pii`: personal data by pattern and checksum. Masked in the training text; what cannot be masked is dropped."""
    if not verdicts.looks("pii"):
        return
    for number in verdicts.alive(found[DIGITS] | texts.calling | _marked(texts, compiled.MAIL)):
        said = [*view_of(texts, number).texts, *arguments(texts.records[number])]
        kinds = sorted({kind for text in said for kind, *_ in pii.find_pii(text)})
        if not kinds:
            continue
        if verdicts.rules.pii != "mask":
            verdicts.says(number, "pii", ", ".join(kinds))
        elif masked(texts.records[number]):
            verdicts.masked.add(number)
        else:
            verdicts.reasons[number] = ("pii", f"{', '.join(kinds)}: cannot be masked")


def _contaminated(texts: Texts, verdicts: Verdicts, tools: Tools) -> None:
    """`contaminated`: an item of a benchmark stands in the record (decontaminate.leaks)."""
    if tools.benchmarks is None or not verdicts.looks("contaminated"):
        return
    numbers = verdicts.alive(range(len(texts.records)))
    said, bounds = texts.folded.texts(), texts.bounds.tolist()
    bodies = [said[bounds[n] : bounds[n + 1]] for n in numbers]
    for number, detail in zip(numbers, decontaminate.leaks(tools.benchmarks, bodies, tools.min_coverage), strict=True):
        if detail:
            verdicts.says(number, "contaminated", detail)


def _tokens(texts: Texts, verdicts: Verdicts, tools: Tools) -> np.ndarray:
    """Tokens of a record's training text without chat marks (of a pair: prompt and the longer answer); 0 where not
    counted. More than max_tokens is `too_long`."""
    tokens = np.zeros(len(texts.records), np.int64)
    if tools.tokenizer is None:
        return tokens
    numbers = verdicts.alive(range(len(texts.records)))
    turns = [[t.get("content", t.get("text")) for t in turns_of(texts.records[n])] for n in numbers]
    encoded = iter(tools.tokenizer.encode_batch_fast([t for some in turns for t in some], add_special_tokens=False))
    for number, some in zip(numbers, turns, strict=True):
        lengths = [len(next(encoded)) for _ in some]
        tokens[number] = sum(lengths) - (min(lengths[-2:]) if "chosen" in texts.records[number] else 0)
        limit = verdicts.rules.max_tokens
        if limit and tokens[number] > limit and verdicts.looks("too_long"):
            verdicts.says(number, "too_long", f"{tokens[number]} tokens")
    return tokens
