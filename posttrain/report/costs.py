"""What an answer costs, from comparisons: latency, throughput, length and memory of each model, and on what machine."""

from typing import Any

from posttrain.report.content import column_key
from posttrain.report.lineage import Lineage
from posttrain.report.words import Pair

# measure -> (what it is, scale, decimals)
MEASURES: dict[str, tuple[Pair, float, int]] = {
    "first_token_median": (("首个 token，中位数（毫秒）", "first token, median, ms"), 1000, 0),
    "first_token_p95": (("首个 token，p95（毫秒）", "first token, p95, ms"), 1000, 0),
    "latency_median": (("整条回答，中位数（毫秒）", "whole answer, median, ms"), 1000, 0),
    "latency_p95": (("整条回答，p95（毫秒）", "whole answer, p95, ms"), 1000, 0),
    "decode_tokens_per_second": (("逐条生成，每秒 token", "one at a time, tokens a second"), 1, 1),
    "batched_tokens_per_second": (("成批生成，每秒 token", "in batches, tokens a second"), 1, 1),
    "mean_tokens": (("平均长度（token）", "mean length, tokens"), 1, 1),
    "mean_characters": (("平均长度（字符）", "mean length, characters"), 1, 1),
    "peak_gib": (("内存峰值，逐条（GiB）", "peak memory, one at a time, GiB"), 1, 2),
    "batched_peak_gib": (("内存峰值，成批（GiB）", "peak memory, in batches, GiB"), 1, 2),
}


def costs(lineage: Lineage) -> list[dict[str, Any]]:
    """{run, device, precision, prompts, load, cpus, busy, batch, models: [key of its column],
    rows: [(Pair, [text or None])]} of each comparison that measured it."""
    blocks = []
    for run in lineage.of("infer_compare"):
        if found := run.manifest["results"].get("cost"):
            models = found["models"]
            rows = [(name, [None if of[key] is None else f"{scale * of[key]:,.{places}f}" for of in models.values()])
                    for key, (name, scale, places) in MEASURES.items()]  # fmt: skip
            batch = max((of["batch"] for of in models.values() if of["batch"]), default=None)
            facts = {key: found.get(key, 0) for key in ("device", "precision", "prompts", "load", "cpus")}
            facts["busy"] = facts["load"] > facts["cpus"] + 1  # as evals/cost.py has it
            keys = [column_key(run, name) for name in models]
            blocks.append({"run": run.name, **facts, "batch": batch, "models": keys, "rows": rows})
    return blocks
