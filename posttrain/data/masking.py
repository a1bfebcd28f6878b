"""Personal data in a record: placeholders in its text and in the arguments of its tool calls."""

import json
from collections import Counter
from typing import Any

from posttrain.data import pii
from posttrain.data.shape import PARTS, replace_text, turns_of


def arguments(record: dict) -> list[str]:
    """The arguments of a record's tool calls, each as JSON."""
    return [json.dumps(call, ensure_ascii=False) for turn in turns_of(record) for call in turn.get("tool_calls") or ()]


def masked(record: dict) -> bool:
    """Put placeholders into a record's text and tool calls, in place; False if nothing could be replaced."""
    before = Counter()
    for turn, content in enumerate([t.get("content", t.get("text")) for t in turns_of(record)]):
        text, kinds = pii.masked(content)
        if kinds:
            replace_text(record, turn, text)
            before.update(kinds)
    for part in PARTS:
        if any(turn.get("tool_calls") for turn in record.get(part, ())):
            record[part] = [turn | {"tool_calls": _masked_value(turn["tool_calls"], before)} if turn.get("tool_calls")
                            else turn for turn in record[part]]  # fmt: skip
    if before:
        repairs = [f"masked_{kind}" for kind in before]
        record["meta"]["repairs"] = [*record["meta"].get("repairs", []), *repairs]
    return bool(before)


def _masked_value(value: Any, counted: Counter) -> Any:
    """A JSON value with placeholders in its texts."""
    if isinstance(value, str):
        text, kinds = pii.masked(value)
        counted.update(kinds)
        return text
    if isinstance(value, dict):
        return {name: _masked_value(inner, counted) for name, inner in value.items()}
    return [_masked_value(inner, counted) for inner in value] if isinstance(value, list) else value
