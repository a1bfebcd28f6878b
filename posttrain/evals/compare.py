"""Prompts in, answers side by side out: reading the prompts file, counting, and showing it to a person."""

import re
import unicodedata
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from posttrain.config import shown
from posttrain.errors import UserFault, faults_in
from posttrain.evals import panel
from posttrain.plan import Plan
from posttrain.records import fault_in_turns, json_object, lines_of, record_id, text_of
from posttrain.stages import InferCompare

NO_GROUP = "all"
PRINTED = 2000  # characters of an answer on the terminal
READ_KEYS = ("id", "source", "prompt", "answer", "group", "topic", "checks", "meta")


def read_prompts(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """([{id, group, prompt: [messages], expected, checks}], notes) of a prompts file.

    JSONL rows {"prompt": text or [messages], "answer"?: text, "group"?: text, "checks"?: {}}, a YAML list of the same
    (`topic` may stand for `group`), Prompt records, or a .txt with a prompt a line. UserFault with every unusable row
    and why.
    """
    rows, faults, unread = [], [], Counter()
    for number, row in enumerate(_raw_prompts(path), 1):
        if row is None:
            continue
        row = _prompt(row) if isinstance(row, dict) else row
        if isinstance(row, str):
            faults.append(f"{shown(path)}:{number}: {row}")
            continue
        unread.update(row.pop("unread"))
        rows.append(row)
    if faults:
        raise faults_in(f"prompts: {len(faults)} unusable lines", faults)
    if not rows:
        raise UserFault(f"prompts: {shown(path)} is empty; write a row {{\"prompt\": \"...\"}} a line")
    return rows, [f"prompts: the key '{key}' is not read ({count} rows)" for key, count in unread.items()]


def _raw_prompts(path: Path) -> list[dict | str | None]:
    """The rows of a file as they stand there; a text instead of one says what is wrong, None is an empty line."""
    if path.suffix not in (".jsonl", ".txt", ".yaml", ".yml"):
        raise UserFault(f"prompts: {shown(path)} is none of .jsonl (a row a prompt), .txt (a line a prompt), .yaml (a "
                        "list)")  # fmt: skip
    if path.suffix in (".yaml", ".yml"):
        try:
            rows = yaml.safe_load(text_of(path))
        except yaml.YAMLError as error:
            raise UserFault(f"prompts: {shown(path)} is no YAML ({' '.join(str(error).split())})") from None
        if not isinstance(rows, list):
            raise UserFault(f"prompts: {shown(path)} is no YAML list; write `- prompt: ...` for each")
        return [row if isinstance(row, dict) else "not a mapping; expected prompt: ..." for row in rows]
    of_line = (lambda line: {"prompt": line}) if path.suffix == ".txt" else json_object
    return [of_line(line) if line else None for line in lines_of(path)]


def _prompt(row: dict) -> dict[str, Any] | str:
    """One prompt, or why the row cannot be used."""
    prompt, expected, group = row.get("prompt"), row.get("answer"), row.get("group", row.get("topic", NO_GROUP))
    checks = row.get("checks") or {}
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if prompt is None:
        return f"no 'prompt' (keys there: {', '.join(row) or 'none'})"
    if fault := fault_in_turns(messages, ends_in="user"):
        return f"prompt: {fault.replace('_', ' ')}"
    if not isinstance(expected, str | None) or not isinstance(group, str):
        return "answer and group must be text"
    if fault := panel.fault_in_checks(checks):
        return fault
    return {
        "id": str(row.get("id") or record_id("prompt", messages)), "group": group, "prompt": messages,
        "expected": expected, "checks": checks, "unread": [key for key in row if key not in READ_KEYS],
    }  # fmt: skip


def plan_prompts(plan: Plan, cfg: InferCompare, lineup) -> None:
    """State the prompts file in a plan: how many, in which groups, and the first one as the models see it."""
    if not plan.need("prompts", cfg.prompts, otherwise='Write one: a row {"prompt": "..."} a line, or plain text.'):
        return
    try:
        rows, notes = read_prompts(cfg.prompts)
    except UserFault as fault:
        plan.faults.append(str(fault))
        return
    expected = sum(row["expected"] is not None for row in rows)
    groups = ", ".join(dict.fromkeys(row["group"] for row in rows))
    plan.fact("data", f"{len(rows)} prompts in the groups {groups}; {expected} of them with an expected answer")
    how, answers = cfg.generation, len(rows) * (len(cfg.adapters) + cfg.include_base)
    sampling = f"temperature {how.temperature}, top_p {how.top_p}" if how.temperature else "greedy"
    plan.fact("schedule", f"{answers} answers of {how.max_new_tokens} tokens at most, {sampling}; batches of "
                          f"{cfg.batch_size} prompts")  # fmt: skip
    if cfg.cost_prompts:
        plan.fact("schedule", f"cost: latency and memory on {min(cfg.cost_prompts, len(rows))} of the prompts, models "
                              "taking turns (cost_prompts=0 leaves it out)")  # fmt: skip
    if lineup and plan.dry_run:
        from posttrain import chat

        text = lineup.tokenizer.decode(chat.prompt_ids(lineup.tokenizer, rows[0]["prompt"]))
        for line in text.splitlines():
            plan.fact("example", f"| {line}")
    for note in notes:
        plan.fact("notes", note)


# ------------------------------------------------------------------ counting


def normalised(text: str) -> str:
    """Unicode NFKC, runs of white space as one blank, none at the ends."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip()


def exact(text: str, expected: str) -> bool:
    return normalised(text) == normalised(expected)


def summarise(rows: list[dict[str, Any]], models: list[str]) -> dict[str, Any]:
    """{"groups": {group: {model: {n, expected, exact, stopped}}}, "speed": {model: {...}}} of answered rows.

    n: prompts; expected: those with an expected answer; exact: of these, matched; stopped: answers that ended by
    themselves. A group without expected answers has exact None.
    """
    groups: dict[str, dict[str, Any]] = {}
    for row in rows:
        for model in models:
            counts = groups.setdefault(row["group"], {}).setdefault(
                model, {"n": 0, "expected": 0, "exact": None, "stopped": 0}
            )
            answer = row["answers"][model]
            counts["n"] += 1
            counts["stopped"] += answer["stopped"]
            if row["expected"] is not None:
                counts["expected"] += 1
                counts["exact"] = (counts["exact"] or 0) + exact(answer["text"], row["expected"])
    speed = {}
    for model in models:
        answers = [row["answers"][model] for row in rows]
        tokens, seconds = sum(a["tokens"] for a in answers), sum(a["seconds"] for a in answers)
        speed[model] = {"tokens": tokens, "seconds": round(seconds, 3), "mean_tokens": tokens / len(rows),
                        "mean_characters": sum(len(a["text"]) for a in answers) / len(rows),
                        "tokens_per_second": tokens / seconds if seconds else None}  # fmt: skip
    return {"groups": groups, "speed": speed}


# ------------------------------------------------------------------ showing


def width(text: str) -> int:
    """Columns on a terminal: a Chinese character takes two."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.combining(char) > 0 for char in text)


def padded(text: str, columns: int) -> str:
    return text + " " * (columns - width(text))


def spread(rows: list[dict[str, Any]], most: int = 16) -> list[dict[str, Any]]:
    """At most `most` rows, as many of each group as of the others, in file order."""
    groups = {row["group"]: [i for i, r in enumerate(rows) if r["group"] == row["group"]] for row in rows}
    in_turn = [i for places in zip_longest(*groups.values()) for i in places if i is not None]
    return [rows[i] for i in sorted(in_turn[:most])]


def side_by_side(row: dict[str, Any], models: list[str], columns: int = 100) -> str:
    """One prompt with every model's answer under it, the names in a column of their own."""
    indent = max(map(width, (*models, "expected"))) + 2
    asked = " / ".join(f"{turn['role']}: {turn['content']}" for turn in row["prompt"])
    asked = row["prompt"][0]["content"] if len(row["prompt"]) == 1 else asked
    lines = ["─" * columns, *_wrapped(asked, columns)]
    if row["expected"] is not None:
        lines.append(padded("expected", indent) + row["expected"])
    for model in models:
        answer = row["answers"][model]
        mark = "" if row["expected"] is None else "✓ " if exact(answer["text"], row["expected"]) else "✗ "
        end = "" if answer["stopped"] else " [cut off]"
        more = len(answer["text"]) - PRINTED
        end = f" [{more:,} more characters in answers.jsonl]" if more > 0 else end
        wrapped = _wrapped(f"{mark}{answer['text'][:PRINTED]}{end}", columns - indent)
        lines.append(padded(model, indent) + wrapped[0])
        lines += [" " * indent + line for line in wrapped[1:]]
    return "\n".join(lines)


def _wrapped(text: str, columns: int) -> list[str]:
    """Lines of at most `columns` columns; breaks anywhere between Chinese characters."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        visible = "".join(char if char.isprintable() else "·" for char in paragraph)  # no control codes to a terminal
        for piece in re.findall(r"[!-~]+|.", visible):
            if width(line + piece) > columns and line:
                lines.append(line)
                line = ""
            line += piece
        lines.append(line)
    return lines


def table(summary: dict[str, Any], models: list[str]) -> str:
    """Before and after, a line per group: exact matches and answers that ended by themselves, then the speed."""
    lines = [["group", "", *models]]
    for group, counts in summary["groups"].items():
        if counts[models[0]]["exact"] is not None:
            lines.append([group, "exact match", *(f"{counts[m]['exact']}/{counts[m]['expected']}" for m in models)])
        lines.append([group, "ended by itself", *(f"{counts[m]['stopped']}/{counts[m]['n']}" for m in models)])
    measures = {"tokens_per_second": "tokens/s", "mean_tokens": "tokens an answer",
                "mean_characters": "characters an answer"}  # fmt: skip
    for key, words in measures.items():
        if not (key == "tokens_per_second" and "cost" in summary):  # measured better there
            lines.append(["all", words, *(_number(summary["speed"][m][key]) for m in models)])
    widths = [max(width(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(padded(cell, w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "-" * max(map(width, text)), *text[1:]])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
