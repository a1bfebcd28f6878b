"""
The panel: prompts whose answers are checked by code for their format, and scored by a person on a blind sheet.

A row of the sheet is one answer under a code that does not tell its model; sheet_key.json, beside it, does. Scoring the
filled sheet joins the two again and compares the models prompt by prompt.
"""

import csv
import hashlib
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from posttrain import refusals, significance
from posttrain.config import shown
from posttrain.errors import UserFault, faults_in
from posttrain.runs import read_json, sha256, write_json
from posttrain.text import folded_text, language

CHECKS = {"json_keys": list, "items": int, "lines": int, "min_chars": int, "max_chars": int, "includes": list,
          "excludes": list, "regex": str}  # fmt: skip
FAILURES = ("off_topic", "factual_error", "verbose", "format", "refusal", "repetition", "other_language", "empty",
            "other")  # fmt: skip
COLUMNS = ("code", "topic", "prompt", "answer", "found_by_code", "adherence", "failure_type", "comment")
_ITEM = re.compile(r"^\s*(?:[-*+•]|\d{1,2}[.、．)）]|[（(]\d{1,2}[)）]|[一二三四五六七八九十]{1,2}[、.])\s*\S")
_FENCE = re.compile(r"^\s*```\w*\n(.*?)\n?```\s*$", re.S)
REPEATS = 0.6  # share of repeated 4-grams, as the cleaning rule `repetition` has it
LONGEST_MATCHED = 10_000  # characters; a longer answer keeps no regex, which might take hours to find that out
VERBOSE = 2.0  # times the longest answer that was asked for


# ------------------------------------------------------------------ checks by code


def fault_in_checks(checks: Any) -> str | None:
    """Why the checks of a prompt cannot be used, or None."""
    if not isinstance(checks, dict):
        return "checks: not a mapping"
    for name, value in checks.items():
        if name not in CHECKS:
            return f"checks.{name}: unknown; choose from {', '.join(CHECKS)}"
        if not isinstance(value, CHECKS[name]) or isinstance(value, bool):
            return f"checks.{name}: expected {CHECKS[name].__name__}, got {value!r}"
        if CHECKS[name] is list and not all(isinstance(one, str) and one for one in value):
            return f"checks.{name}: expected a list of texts (quote numbers), got {value!r}"
    try:
        re.compile(checks.get("regex", ""))
    except re.error as error:
        return f"checks.regex: {error}"
    return None


def broken(text: str, checks: dict[str, Any]) -> list[str]:
    """The names of the checks that an answer does not keep."""
    answer = text.strip()
    lines = [line for line in answer.splitlines() if line.strip()]
    kept = {
        "json_keys": lambda keys: _has_keys(answer, keys),
        "items": lambda count: sum(bool(_ITEM.match(line)) for line in lines) == count,
        "lines": lambda count: len(lines) == count,
        "min_chars": lambda count: len(answer) >= count,
        "max_chars": lambda count: 0 < len(answer) <= count,
        "includes": lambda words: all(word.casefold() in answer.casefold() for word in words),
        "excludes": lambda words: bool(answer) and not any(word.casefold() in answer.casefold() for word in words),
        "regex": lambda pattern: len(answer) <= LONGEST_MATCHED and re.fullmatch(pattern, answer) is not None,
    }
    return [name for name, value in checks.items() if not kept[name](value)]


def _has_keys(answer: str, keys: list[str]) -> bool:
    """Whether an answer is one JSON object (a code fence around it is forgiven) that has these keys."""
    fenced = _FENCE.match(answer)
    try:
        found = json.loads(fenced[1] if fenced else answer)
    except (json.JSONDecodeError, RecursionError):
        return False
    return isinstance(found, dict) and set(keys) <= set(found)


def repetition(text: str) -> float:
    """1 - different / all 4-grams of characters; 0 for less than 20 characters."""
    folded = folded_text(text)
    grams = [folded[i : i + 4] for i in range(len(folded) - 3)]
    return 1 - len(set(grams)) / len(grams) if len(folded) >= 20 else 0.0


def failure(answer: dict[str, Any], row: dict[str, Any]) -> str:
    """The failure that code can see in an answer, the gravest first, or "". Off topic and wrong are for a person."""
    text, checks = answer["text"], row["checks"]
    if not text.strip():
        return "empty"
    if refusals.refusal(folded_text(text)):
        return "refusal"
    if repetition(text) > REPEATS:
        return "repetition"
    asked = next(turn["content"] for turn in reversed(row["prompt"]) if turn["role"] == "user")
    if language(asked) == "zh" and language(text) == "en" and not ({"json_keys", "includes"} & set(checks)):
        return "other_language"
    if not answer["stopped"] or len(text.strip()) > VERBOSE * checks.get("max_chars", float("inf")):
        return "verbose"
    return "format" if broken(text, checks) else ""


def summarise(rows: list[dict[str, Any]], models: list[str]) -> dict[str, Any]:
    """{model: {n, format_correct, low, high, mean_characters, repetition, failures, topics}}, of rows with checks."""
    checked = [row for row in rows if row["checks"]]
    summary = {}
    for model in models:
        answers = [row["answers"][model] for row in checked]
        right = [not broken(a["text"], row["checks"]) for a, row in zip(answers, checked, strict=True)]
        low, high = significance.wilson(sum(right), len(right))
        topics: dict[str, list[int]] = {}
        for row, is_right in zip(checked, right, strict=True):
            counts = topics.setdefault(row["group"], [0, 0])
            counts[0], counts[1] = counts[0] + is_right, counts[1] + 1
        found = Counter(failure(a, row) for a, row in zip(answers, checked, strict=True))
        summary[model] = {
            "n": len(right), "format_correct": sum(right), "low": low, "high": high, "topics": topics,
            "mean_characters": sum(len(a["text"].strip()) for a in answers) / len(answers),
            "repetition": sum(repetition(a["text"]) for a in answers) / len(answers),
            "failures": {name: count for name, count in found.items() if name},
        }  # fmt: skip
    return summary


def lines(summary: dict[str, Any]) -> list[str]:
    """For the terminal: a line per model."""
    return [
        f"{model}: format right {s['format_correct']}/{s['n']} [{s['low']:.0%}, {s['high']:.0%}], "
        f"{s['mean_characters']:.0f} characters an answer, {s['repetition']:.0%} repeated 4-grams"
        + (f", failures: {', '.join(f'{k} {n}' for k, n in sorted(s['failures'].items()))}" if s["failures"] else "")
        for model, s in summary.items()
    ]


# ------------------------------------------------------------------ the sheet


def code_of(prompt_id: str, model: str, seed: int) -> str:
    """The name of an answer on the sheet, and its place: 8 hex digits that do not tell the model."""
    return hashlib.sha256(f"{seed}:{prompt_id}:{model}".encode()).hexdigest()[:8]


def write_sheet(directory: Path, rows: list[dict[str, Any]], models: list[str], seed: int) -> Path:
    """sheet.csv (UTF-8 with a mark, so that Excel and WPS read it) and sheet_key.json. Answers to a prompt stand
    together in an order of their own. A sheet that a person began to fill in is never written over."""
    path, key, lines = directory / "sheet.csv", {}, []
    if path.exists() and any(row["adherence"].strip() for row in _sheet_rows(path)):
        raise UserFault(f"{shown(path)}: scores stand in it already; score it, or move it away, then run again")
    for row in rows:
        asked = "\n".join(f"[{turn['role']}] {turn['content']}" for turn in row["prompt"])
        for model in sorted(models, key=lambda model: code_of(row["id"], model, seed)):
            code, answer = code_of(row["id"], model, seed), row["answers"][model]
            key[code] = {"prompt": row["id"], "model": model}
            found = failure(answer, row) if row["checks"] else ""
            lines.append([code, row["group"], asked, answer["text"], found, "", "", ""])
    with open(path, "w", encoding="utf-8-sig", newline="") as out:
        csv.writer(out).writerows([COLUMNS, *([_quiet(cell) for cell in line] for line in lines)])
    write_json(directory / "sheet_key.json", {"models": models, "codes": key})
    return path


def _quiet(cell: str) -> str:
    """A cell that a spreadsheet would run as a formula, as text."""
    return f"'{cell}" if cell[:1] in ("=", "+", "-", "@") else cell


def _sheet_rows(path: Path) -> list[dict[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = path.read_text(encoding="gb18030", errors="replace")  # as Excel saves Chinese CSV files
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))  # a cell may hold more than the 128 KiB allowed
    rows = list(csv.DictReader(io.StringIO(text), restval=""))  # splitlines would also cut at U+2028 and the like
    lacking = [name for name in ("code", "adherence", "failure_type") if rows and name not in rows[0]]
    if not rows or lacking:
        why = f"no column {', '.join(lacking)}" if lacking else "no rows"
        raise UserFault(f"{shown(path)}: not a sheet of the panel ({why})")
    return rows


def read_scores(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """{model: {prompt: {adherence, failure_type, comment}}} of a filled sheet. UserFault with every unusable line."""
    key = read_json(path.with_name("sheet_key.json"))
    if key is None:
        raise UserFault(f"{shown(path)}: its sheet_key.json is not beside it; score it in the directory of its run")
    scores: dict[str, dict[str, dict[str, Any]]] = {model: {} for model in key["models"]}
    faults = []
    for number, row in enumerate(_sheet_rows(path), 2):
        code, given, kind = row["code"].strip(), row["adherence"].strip(), row["failure_type"].strip()
        if code not in key["codes"]:
            faults.append(f"row {number}: the code {code!r} is not of this run")
        elif given and given not in {"0", "1", "2", "3", "4", "5"}:
            faults.append(f"row {number}: adherence is {given!r}; write 0 to 5")
        elif kind and kind not in FAILURES:
            faults.append(f"row {number}: failure_type is {kind!r}; choose from {', '.join(FAILURES)}, or nothing")
        elif given:
            place = key["codes"][code]
            scores[place["model"]][place["prompt"]] = {
                "adherence": int(given), "failure_type": kind, "comment": (row.get("comment") or "").strip()
            }  # fmt: skip
    if faults:
        raise faults_in(f"{shown(path)}: {len(faults)} rows cannot be read", faults, 10)
    if not any(scores.values()):
        raise UserFault(f"{shown(path)}: no row has a score; write 0 to 5 under `adherence`")
    return scores


def score(path: Path) -> dict[str, Any]:
    """The filled sheet as numbers, written to scores.json beside it.

    {sheet_sha256, models: {model: {n, mean, low, high, failures}},
    differences: [{ours, theirs, n, value, low, high, p, p_holm}]}: every two models, over the prompts scored for both.
    """
    scores = read_scores(path)
    result: dict[str, Any] = {"sheet_sha256": sha256(path), "models": {}, "differences": []}
    for model, given in scores.items():
        values = [one["adherence"] for one in given.values()]
        if values:
            low, high = significance.mean_interval(values) or (None, None)
            failures = Counter(one["failure_type"] for one in given.values() if one["failure_type"])
            result["models"][model] = {"n": len(values), "mean": sum(values) / len(values), "low": low, "high": high,
                                       "failures": dict(failures)}  # fmt: skip
    names = list(result["models"])
    for i, theirs in enumerate(names):
        for ours in names[i + 1 :]:
            both = sorted(scores[ours].keys() & scores[theirs].keys())
            if both:
                a, b = ([scores[m][prompt]["adherence"] for prompt in both] for m in (ours, theirs))
                found = significance.paired(a, b)
                result["differences"].append({"ours": ours, "theirs": theirs, "n": len(both), **found})
    for row, p in zip(result["differences"], significance.holm([r["p"] for r in result["differences"]]), strict=True):
        row["p_holm"] = p
    write_json(path.with_name("scores.json"), result)
    return result


def score_lines(result: dict[str, Any]) -> list[str]:
    """For the terminal."""
    said = []
    for model, s in result["models"].items():
        spread = f" [{s['low']:.2f}, {s['high']:.2f}]" if s["low"] is not None else ""
        failures = ", ".join(f"{name} {count}" for name, count in sorted(s["failures"].items()))
        said.append(f"{model}: adherence {s['mean']:.2f}{spread} of 5 over {s['n']} answers"
                    + (f"; failures: {failures}" if failures else ""))  # fmt: skip
    for d in result["differences"]:
        said.append(f"{d['ours']} - {d['theirs']}: {d['value']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}], p "
                    f"{d['p_holm']:.3f} after Holm, {d['n']} prompts")  # fmt: skip
    return said
