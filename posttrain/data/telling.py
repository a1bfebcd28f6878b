"""Records and reasons as people read them: for the data card and for `--why`."""

import json
import unicodedata
from difflib import SequenceMatcher
from itertools import zip_longest
from typing import Any, get_args

from posttrain.config import shown
from posttrain.data import pii
from posttrain.data.rules import RULES
from posttrain.data.sources import BY_CHOICE
from posttrain.data_blocks import Rules

ACTIONS = tuple(name for name, field in Rules.model_fields.items() if "keep" in get_args(field.annotation))
"""The fields of Rules that are rules; those that follow one are its bounds."""
CHOSEN_LATER = {
    "quota": "A good record that the mix has no room for: of its source, language, number of turns and length others "
             "with a smaller hash were taken.",
    "post_limit": "More pairs of one post than the source's option max_pairs_per_post.",
}  # fmt: skip

# ------------------------------------------------------------------ reasons


def meaning(reason: str) -> str:
    """What a reason or flag stands for, in a sentence or two."""
    if reason in ACTIONS:
        return " ".join(Rules.model_fields[reason].description.split())
    if reason in CHOSEN_LATER:
        return CHOSEN_LATER[reason]
    if reason in BY_CHOICE:
        return "Left out by choice: the row is whole, but its format's options or the task have no use for it."
    return "The row cannot be used as a record of this kind."


def exact_meaning(reason: str) -> str:
    """What the rule's function says of itself; "" for reasons without one."""
    rule = next((rule for rule in RULES if rule.name == reason), None)
    return " ".join((rule.finds.__doc__ or "").split()) if rule else ""


def bounds_of(reason: str, rules: Rules, min_coverage: float) -> dict[str, Any]:
    """The values in force that decide a rule: its action, and the fields that stand after it in Rules."""
    if reason not in ACTIONS:
        return {}
    names = list(Rules.model_fields)
    at = names.index(reason) + 1
    end = next((n for n in range(at, len(names)) if names[n] in ACTIONS), len(names))
    found = {f"rules.{name}": getattr(rules, name) for name in (reason, *names[at:end])}
    return found | ({"decontaminate.min_coverage": min_coverage} if reason == "contaminated" else {})


# ------------------------------------------------------------------ records


def turns(record: Any) -> list[tuple[str, str]]:
    """(who, text) of every turn of a record; of a raw row its columns; of anything else its JSON."""
    try:
        if "messages" in record:
            return [_turn(turn) for turn in record["messages"]]
        if "chosen" in record:
            sides = [(side, _turn(turn)[1]) for side in ("chosen", "rejected") for turn in record[side]]
            return [_turn(turn) for turn in record["prompt"]] + sides
        if "id" in record and "source" in record:
            return [("text", _text(record["text"]))]
    except (TypeError, KeyError, AttributeError):
        pass
    record = record[0] if isinstance(record, list) and len(record) == 1 else record
    columns = record.items() if isinstance(record, dict) and record else [("raw", record)]
    return [(str(name), value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
            for name, value in columns]  # fmt: skip


def _turn(turn: dict) -> tuple[str, str]:
    calls = turn.get("tool_calls")
    said = _text(turn["content"]) + (f"\n{json.dumps(calls, ensure_ascii=False)}" if calls else "")
    return _text(turn["role"]), said


def _text(value: Any) -> str:
    """A raw row may have anything where text belongs: then it is shown whole, as JSON."""
    if not isinstance(value, str):
        raise TypeError
    return value


def readable(record: Any, length: int = 400) -> str:
    """The beginning of each turn of a record, `length` characters in all: a line `who: text` each."""
    said, left = [], length
    for who, text in turns(record):
        if left <= 0:
            said.append("...")
            break
        said.append(f"{who}: {text[:left]}" + (" ..." if len(text) > left else ""))
        left -= len(text)
    return encodable(pii.masked("\n".join(said))[0])  # samples are shown around


def encodable(text: str) -> str:
    """Lone surrogates as \\udXXX, so that the text can be written."""
    return text.encode("utf-8", "backslashreplace").decode()


def place_of(meta: dict) -> str:
    """Where a record was read: file and row, both from 1, as `--why` takes it."""
    return f"{shown(meta['file'])}:{meta['line']}"


# ------------------------------------------------------------------ lines


def width(text: str) -> int:
    """Columns of a terminal that a text takes: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def wrapped(text: str, columns: int) -> list[str]:
    """The lines of a text, none wider than `columns`, broken after a space where there is one in the last third."""
    lines = []
    for line in encodable(text).expandtabs(4).split("\n"):
        while width(line) > columns:
            end = taken = 0
            while taken + (step := width(line[end])) <= columns:
                end, taken = end + 1, taken + step
            space = line.rfind(" ", end * 2 // 3, end + 1)
            end = space + 1 if space > 0 else end
            lines.append(line[:end].rstrip())
            line = line[end:]
        lines.append(line)
    return lines


def told(record: Any, columns: int = 112, length: int = 4000) -> list[str]:
    """A record turn by turn, as lines: who speaks, then what is said."""
    return [line for who, text in turns(record) for line in _spoken(who, text, columns, length)]


def _spoken(who: str, text: str, columns: int, length: int) -> list[str]:
    text = text if len(text) <= length else f"{text[:length]} ... ({len(text) - length} more characters)"
    first, *more = wrapped(text, max(20, columns - 11))
    return [f"{encodable(who) + ': ':<11}{first}".rstrip(), *(f"{'':<11}{line}" for line in more)]


def side_by_side(one: Any, other: Any, columns: int, length: int = 2000) -> list[str]:
    """Two records abreast, each `columns` wide, turn beside turn; a bar marks the lines that differ."""
    lines = []
    for pair in zip_longest(turns(one), turns(other)):
        left, right = (_spoken(*turn, columns, length) if turn else [] for turn in pair)
        for _, a, b, c, d in SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
            lines += [abreast(x, y, columns) for x, y in zip_longest(left[a:b], right[c:d], fillvalue="")]
    return lines


def abreast(left: str, right: str, columns: int) -> str:
    """Two lines as one."""
    return f"{left}{' ' * (columns - width(left))} {' ' if left == right else '|'} {right}".rstrip()
