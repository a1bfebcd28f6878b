"""The page of an evaluation: one table with all models, differences to the first one, and what stands out."""

from typing import Any


def render(results: dict[str, Any]) -> str:
    """The whole page as text: benchmark rows, then held-out rows, then drops and truncations."""
    models = results["models"]
    header = ["task", "metric", "n", "shots", models[0], *(f"{m} (difference to {models[0]})" for m in models[1:])]
    lines = [header]
    for row in results["tasks"]:
        cells = [_score(row["scores"][m], row["differences"].get(m)) for m in models]
        shots = "" if row["n_shot"] is None else str(row["n_shot"])
        lines.append([row["task"], row["metric"], str(row["n"]), shots, *cells])
    lines += _held_out(results, models)
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "-" * max(map(len, text)))
    return "\n".join([*text, *_notes(results)])


def _score(score: dict[str, Any], difference: dict[str, Any] | None) -> str:
    if difference is None:
        error = f" ±{score['stderr']:.4f}" if score["stderr"] is not None else ""
        return f"{score['value']:.4f}{error}"
    error = f" ±{difference['stderr']:.4f}" if difference["stderr"] is not None else ""
    flag = " DROP" if difference.get("flag") == "drop" else ""
    return f"{score['value']:.4f} ({difference['value']:+.4f}{error}){flag}"


def _held_out(results: dict[str, Any], models: list[str]) -> list[list[str]]:
    lines = []
    if sft := results.get("sft_test"):
        cells = [_score({"value": sft["loss"][m], "stderr": None}, sft["differences"].get(m)) for m in models]
        lines.append(["sft_test", "loss per token", str(sft["rows"]), "", *cells])
    if pref := results.get("pref_test"):
        for kind in ("accuracy", "accuracy_per_token", "margin"):
            cells = []
            for m in models:
                score = {"value": pref[kind][m], "stderr": pref["stderr"][kind][m]}
                difference = pref["differences"].get(m) if kind == "accuracy" else None
                cells.append(_score(score, difference))
            lines.append(["pref_test", kind.replace("_", " "), str(pref["rows"]), "", *cells])
    return lines


def _notes(results: dict[str, Any]) -> list[str]:
    """What a reader must not overlook."""
    baseline, notes = results["models"][0], ["± is one standard error; of a difference: paired, over the same items"]
    for row in results["tasks"]:
        for model, difference in row["differences"].items():
            if difference["flag"] == "drop":
                notes.append(f"forgetting: {model} is below {baseline} on {row['task']} ({row['metric']}) by "
                             f"{abs(difference['value']):.4f}, more than two standard errors")  # fmt: skip
    for name in ("sft_test", "pref_test"):
        dropped = (results.get(name) or {}).get("dropped")
        if dropped:
            notes.append(f"{name}: not scored: " + ", ".join(f"{why} {n}" for why, n in sorted(dropped.items())))
    for task, texts in results["warnings"].items():
        notes += [f"{task}: {text} ({times} times)" for text, times in texts.items()]
    return ["", *notes]
