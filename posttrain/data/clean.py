"""
Cleaning: a record -> the same with its training text, then rules: record -> None (keep) or the reason to drop it.

A rule is one function of (record, bounds) in RULES, with its exact meaning in its docstring and a test.
"""

import json

from posttrain.records import fault_in
from posttrain.stages import Rules
from posttrain.text import has_lone_surrogate, key_text, language, training_text

PARTS = ("messages", "prompt", "chosen", "rejected")


def normalised(record: dict) -> dict:
    """The record with text.training_text in every turn; tool calls and tools are left as they are."""
    parts = {part: [turn | {"content": training_text(turn["content"])} for turn in record[part]]
             for part in PARTS if part in record}  # fmt: skip
    return record | parts


def texts(record: dict) -> list[str]:
    """The contents of all turns, in order."""
    return [turn["content"] for part in PARTS for turn in record.get(part, [])]


def char_count(record: dict) -> int:
    """Characters of all turns of a conversation; of a pair, of its prompt and the longer answer: what one sequence of
    training holds. Tool calls and tool lists do not count."""
    if "messages" in record:
        return sum(len(turn["content"]) for turn in record["messages"])
    answers = [len(record[side][0]["content"]) for side in ("chosen", "rejected")]
    return sum(len(turn["content"]) for turn in record["prompt"]) + max(answers)


def record_language(record: dict, bounds: Rules) -> str:
    """zh, en, other or none (no letters): text.language of all turns together, on the key text."""
    return language(key_text("\n".join(texts(record))), bounds.min_cn_ratio)


def usable(record: dict, bounds: Rules) -> str | None:
    """Still a whole record after normalisation: no turn that held only invisible characters, no pair made equal by it
    (the reasons of records.fault_in); and no half of a character in tools or tool calls (`lone_surrogate`)."""
    calls = [turn["tool_calls"] for part in PARTS for turn in record.get(part, []) if "tool_calls" in turn]
    if calls or "tools" in record:
        text = json.dumps([calls, record.get("tools")], ensure_ascii=False)
        return "lone_surrogate" if has_lone_surrogate(text) else fault_in(record)
    return fault_in(record)


def long_enough(record: dict, bounds: Rules) -> str | None:
    """`too_short`: fewer than min_chars characters (char_count)."""
    return "too_short" if char_count(record) < bounds.min_chars else None


def short_enough(record: dict, bounds: Rules) -> str | None:
    """`too_long`: more than max_chars characters (char_count)."""
    return "too_long" if char_count(record) > bounds.max_chars else None


def in_language(record: dict, bounds: Rules) -> str | None:
    """Chinese (share of Han letters >= min_cn_ratio) stays. English stays if allow_english_fallback, else
    `not_chinese`. Any other script or too mixed a text is `other_language`. Without a letter (numbers) it stays."""
    found = record["meta"].get("lang") or record_language(record, bounds)
    if found == "en":
        return None if bounds.allow_english_fallback else "not_chinese"
    return "other_language" if found == "other" else None


RULES = (usable, long_enough, short_enough, in_language)


def clean(record: dict, bounds: Rules) -> tuple[dict, str | None]:
    """(the record with its training text, language and length in meta; the reason to drop it or None)."""
    record = normalised(record)
    record["meta"] = record["meta"] | {"lang": record_language(record, bounds), "chars": char_count(record)}
    return record, next((reason for rule in RULES if (reason := rule(record, bounds))), None)
