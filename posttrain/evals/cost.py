"""What an answer costs, from the rows that latency.py measured: time to the first token and in all, tokens per second,
peak memory."""

from typing import Any

import numpy as np


def summarise(measured: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """{device, precision, cpus, load, prompts, models: {model: {n, first_token_median, first_token_p95, latency_median,
    latency_p95, decode_tokens_per_second, mean_tokens, mean_characters, peak_gib, batch, batched_tokens_per_second,
    batched_peak_gib}}} of the rows of cost.jsonl; times in seconds.

    Decoding is counted from the first token to the end, over all answers: steps after the first / seconds after it.
    What was not measured, or did not fit, is None.
    """
    return {
        **{key: ", ".join(dict.fromkeys(row[key] for row in measured)) for key in ("device", "precision")},
        **{key: max((row[key] for row in measured if row.get(key)), default=0) for key in ("cpus", "load")},
        "prompts": len({row["prompt"] for row in measured if row["prompt"] is not None}),
        "models": {name: _of_model([row for row in measured if row["model"] == name]) for name in names},
    }


def _of_model(rows: list[dict[str, Any]]) -> dict[str, Any]:
    alone = [row for row in rows if row["prompt"] is not None]
    together = [row for row in rows if row["prompt"] is None]
    decoding = sum(row["seconds"] - row["first_seconds"] for row in alone)
    return {
        "n": len(alone),
        **{f"first_token_{name}": value for name, value in _middle_and_tail(alone, "first_seconds")},
        **{f"latency_{name}": value for name, value in _middle_and_tail(alone, "seconds")},
        "decode_tokens_per_second": _ratio(sum(row["steps"] - 1 for row in alone), decoding),
        "mean_tokens": _ratio(sum(row["tokens"] for row in alone), len(alone)),
        "mean_characters": _ratio(sum(row["characters"] for row in alone), len(alone)),
        "peak_gib": _highest(alone),
        "batch": max((row["batch"] for row in together), default=None),
        "batched_tokens_per_second": _ratio(sum(row["steps"] for row in together),
                                            sum(row["seconds"] for row in together)),
        "batched_peak_gib": _highest(together),
    }  # fmt: skip


def _middle_and_tail(rows: list[dict[str, Any]], key: str) -> list[tuple[str, float | None]]:
    values = [row[key] for row in rows]
    return [(name, float(np.quantile(values, q)) if values else None) for name, q in (("median", 0.5), ("p95", 0.95))]


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _highest(rows: list[dict[str, Any]]) -> float | None:
    return max((row["peak_gib"] for row in rows if row["peak_gib"] is not None), default=None)


MEASURES = {
    "first_token_median": ("first token, median ms", 1000), "first_token_p95": ("first token, p95 ms", 1000),
    "latency_median": ("whole answer, median ms", 1000), "latency_p95": ("whole answer, p95 ms", 1000),
    "decode_tokens_per_second": ("tokens/s after the first", 1), "mean_tokens": ("tokens an answer", 1),
    "mean_characters": ("characters an answer", 1), "peak_gib": ("peak memory GiB", 1),
    "batched_tokens_per_second": ("tokens/s in batches", 1), "batched_peak_gib": ("peak memory in batches, GiB", 1),
}  # fmt: skip


BUSY = "the machine was busy with other work"


def is_busy(found: dict[str, Any]) -> bool:
    """Whether other work ran while this was measured: the load of the minute before was more than the cores, and the
    one of this process besides."""
    return found["load"] > found["cpus"] + 1


def lines(found: dict[str, Any]) -> list[str]:
    """For the terminal: what was measured where, and a line per measure."""
    of, first = found["models"], next(iter(found["models"].values()))
    batches = f", then in batches of {first['batch']}" if first["batch"] else ""
    busy = f"; {BUSY}: load {found['load']} on {found['cpus']} cores" if is_busy(found) else ""
    said = [f"cost on {found['device']}, {found['precision']}: {found['prompts']} prompts one at a time{batches}; "
            f"other machines differ{busy}"]  # fmt: skip
    cells = [["", *of]]
    for key, (words, scale) in MEASURES.items():
        values = [model[key] for model in of.values()]
        cells.append([words, *("not measured" if value is None else f"{scale * value:.4g}" for value in values)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return said + ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
