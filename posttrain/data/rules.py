"""
Rules: what a record must not be. A rule is one function of (view, bounds) and its line in RULES; its name is a field of
data_blocks.Rules (keep | flag | drop) and the reason in the accounts.

The functions say what a rule means, record by record. data/block.py calls them only where something cheap that a rule
`needs` is there (a phrase, a run of digits); what it counts for whole blocks at once (lengths, scripts, repetition) is
held to these functions by tests/test_oracle.py. docs/rules_measured.md says how often the heuristic ones are right.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from posttrain import refusals
from posttrain.data import answer_words, grounding, mojibake, question_words
from posttrain.data_blocks import Rules
from posttrain.text import HAN, han_count, language


class View(NamedTuple):
    """A record as rules see it: its turns in order (of a pair: prompt, chosen, rejected), each text folded."""

    roles: list[str]
    """Of each turn."""
    texts: list[str]
    """text.folded_text of each turn: NFKC, white space folded, case kept."""
    record: dict
    """The record itself, with its training text."""


class Rule(NamedTuple):
    """One rule of cleaning."""

    name: str
    """Field of data_blocks.Rules, and the reason in the accounts."""
    finds: Callable[[View, Rules], str | None]
    """What is wrong (a short detail for people), or None."""
    needs: tuple[str, ...] = ()
    """Lower-case phrases, without any of which `finds` cannot find anything; or DIGITS, SCRIPTS."""


DIGITS = "<eleven digits>"  # at least 11 digits with at most 4 spaces, dots or hyphens between them
SCRIPTS = "<two scripts>"  # a question and an answer of the record whose languages (text.language) differ

GRAM = 4  # characters
REPETITION_FROM = 20  # characters: shorter answers are not looked at for repetition
ANSWER_LETTERS = 12  # letters that an answer must have for its language to be told
_NOT_ORDINARY = re.compile(f"[^0-9A-Za-z{HAN}]+")
_NOT_LETTER = re.compile(r"[\W\d_]+")


def is_pair(view: View) -> bool:
    """Whether the record is a preference pair: its last two turns are the better and the worse answer."""
    return "chosen" in view.record


def last_answer(view: View) -> str:
    """The text that is trained on: a conversation's last assistant turn, the better answer of a pair, a plain text."""
    if "text" in view.record:
        return view.texts[-1]
    return view.texts[-2] if is_pair(view) else next(iter(_last_first(view, "assistant")), "")


def last_question(view: View) -> str:
    """The last user turn; "" where there is none."""
    return next(iter(_last_first(view, "user")), "")


def _last_first(view: View, role: str) -> list[str]:
    return [text for its, text in zip(reversed(view.roles), reversed(view.texts), strict=True) if its == role]


def view_language(view: View, bounds: Rules) -> str:
    """zh, en, other or none (no letters): text.language of all turns together, on the key text."""
    return language("".join("".join(view.texts).lower().split()), bounds.min_cn_ratio)


# ------------------------------------------------------------------ counted; data/block.py counts them for whole blocks


def char_count(view: View) -> int:
    """Characters of all turns joined by one line end each; of a pair, of its prompt and the longer answer."""
    if is_pair(view):
        lengths = [len(text) for text in view.texts]
        return sum(lengths[:-2]) + max(lengths[-2:]) + len(lengths) - 2
    return sum(len(text) for text in view.texts) + len(view.texts) - 1


def too_short(view: View, bounds: Rules) -> str | None:
    """Fewer than min_chars characters (char_count)."""
    count = char_count(view)
    return f"{count} characters" if count < bounds.min_chars else None


def too_long(view: View, bounds: Rules) -> str | None:
    """More than max_chars characters (char_count)."""
    count = char_count(view)
    return f"{count} characters" if count > bounds.max_chars else None


def other_language(view: View, bounds: Rules) -> str | None:
    """view_language is neither zh nor none (no letters), nor en where allow_english_fallback."""
    found = view_language(view, bounds)
    return None if found in ("zh", "none") or found == "en" and bounds.allow_english_fallback else found


def odd_symbols(view: View, bounds: Rules) -> str | None:
    """Of the characters of all turns that are not white space, less than min_ordinary are ASCII letters, ASCII digits
    or Han characters (text.HAN). Nothing to find in a record of white space only."""
    text = "".join("".join(view.texts).split())
    ordinary = len(_NOT_ORDINARY.sub("", text))
    return f"{ordinary} of {len(text)} characters are ordinary" if ordinary < bounds.min_ordinary * len(text) else None


def repetition(view: View, bounds: Rules) -> str | None:
    """Of the answer's (last_answer's) 4-grams of characters, spaces and case as they are, a share of more than
    max_repetition repeats another one: 1 - distinct/all. Answers of REPETITION_FROM characters and more."""
    answer = last_answer(view)
    count = len(answer) - GRAM + 1
    if len(answer) < REPETITION_FROM:
        return None
    repeated = 1 - len({answer[i : i + GRAM] for i in range(count)}) / count
    return f"{repeated:.0%} of its 4-grams repeat others" if repeated > bounds.max_repetition else None


# ------------------------------------------------------------------ heuristics, each measured


def has_mojibake(view: View, bounds: Rules) -> str | None:
    """A turn holds one of mojibake.PHRASES: U+FFFD, UTF-8 read as Latin-1, Windows-1252 or GBK, GBK read as Latin-1, or
    what is known by name. Accented letters of whole text are none of them."""
    return next((found for text in view.texts if (found := mojibake.mojibake(text.lower()))), None)


def refusal(view: View, bounds: Rules) -> str | None:
    """The answer opens with a refusal (refusals.refusal), or speaks of itself as a program anywhere in it
    (refusals.self_description). Quotations, code and letters or dialogues written for others do not count."""
    answer = last_answer(view)
    return refusals.refusal(answer) or refusals.self_description(answer)


def answer_language(view: View, bounds: Rules) -> str | None:
    """The last question is Chinese and its answer English, or the other way round (text.language of the key texts).

    Not where an earlier turn is in the answer's language; nor where a turn before the answer names a language, a
    translation or code; nor where the question holds some of
    the other language (three Latin words in a row, two Han characters); nor for an answer with fewer than
    ANSWER_LETTERS letters, or of which half is code; and English only where it is prose, not a list of names.
    """
    answer, question = last_answer(view), last_question(view)
    spoken = answer_words.without_code(answer)
    if len(_NOT_LETTER.sub("", spoken)) < ANSWER_LETTERS or len(spoken) < len(answer) / 2:
        return None
    asked, given = (language("".join(text.lower().split())) for text in (question, answer))
    if {asked, given} != {"zh", "en"} or language(answer_words.without_code(question)) != asked:
        return None
    if asked == "zh" and answer_words.has_latin_words(question.lower()) or asked == "en" and han_count(question) >= 2:
        return None
    if asked == "zh" and not answer_words.is_english_prose(spoken.lower()):
        return None
    before = view.texts[: -2 if is_pair(view) else -1]
    if any(answer_words.asks_for_language(text.lower()) or language(text) == given for text in before):
        return None
    return f"{asked} -> {given}"


def vague_reference(view: View, bounds: Rules) -> str | None:
    """The first question speaks of a text, picture or link that is not there (question_words.missing_text), and nothing
    stands before it but a system turn of at most question_words.SHORT characters."""
    if "user" not in view.roles or sum(map(len, view.texts[: view.roles.index("user")])) > question_words.SHORT:
        return None
    return question_words.missing_text(view.texts[view.roles.index("user")].lower())


def time_bound(view: View, bounds: Rules) -> str | None:
    """The last question asks for what changes with the day (question_words.changes_with_the_day), and the record has no
    tools that could tell."""
    return None if view.record.get("tools") else question_words.changes_with_the_day(last_question(view).lower())


def self_contradiction(view: View, bounds: Rules) -> str | None:
    """The answer takes back what it said, though the last question pointed no fault out (answer_words.takes_back)."""
    return answer_words.takes_back(last_answer(view), last_question(view))


def ungrounded_number(view: View, bounds: Rules) -> str | None:
    """The last question gives a text, and the answer has a number that is not in it (grounding.ungrounded)."""
    return grounding.ungrounded(last_question(view), last_answer(view))


RULES = (
    Rule("too_short", too_short),
    Rule("too_long", too_long),
    Rule("other_language", other_language),
    Rule("odd_symbols", odd_symbols),
    Rule("repetition", repetition),
    Rule("mojibake", has_mojibake, mojibake.PHRASES),
    Rule("refusal", refusal, refusals.NEEDS),
    Rule("answer_language", answer_language, (SCRIPTS,)),
    Rule("vague_reference", vague_reference, question_words.VAGUE_NEEDS),
    Rule("time_bound", time_bound, question_words.TIME_NEEDS),
    Rule("self_contradiction", self_contradiction, answer_words.CONTRADICTION_NEEDS),
    Rule("ungrounded_number", ungrounded_number, grounding.NEEDS),
)
"""In the order in which they are asked."""
