"""Numbers of a finished set for its manifest and card: spreads, histograms, what each source gave, the funnel."""

from typing import Any

import numpy as np

from posttrain.data.catalogue import Source
from posttrain.data.kernels import LANGUAGES
from posttrain.data.telling import ACTIONS

DUPLICATES = ("exact_duplicate", "near_duplicate")
LATER = (*DUPLICATES, "repeated_answer", "repeated_opening", "post_limit", "quota")  # decided over all records
EDGES = [1, *(edge for power in range(1, 22) for edge in (2**power, 3 * 2 ** (power - 1)))]
"""Where the bins of lengths begin, two to an octave, the same for every set: 1, 2, 3, 4, 6, 8, 12 ..."""


def spread(values: np.ndarray) -> dict[str, float]:
    """Total, mean and percentiles of some numbers."""
    if not len(values):
        return {}
    ordered = np.sort(values)
    at = {f"p{p}": int(ordered[min(len(ordered) - 1, len(ordered) * p // 100)]) for p in (5, 50, 95, 99)}
    total = int(values.sum(dtype=np.int64))
    return {"total": total, "mean": round(total / len(values), 1), "min": int(ordered[0]), **at,
            "max": int(ordered[-1])}  # fmt: skip


def histograms(columns: np.ndarray, tokens: bool) -> dict[str, dict]:
    """Of what was taken (columns as block.COLUMNS): chars, tokens and turns (questions of a record), each as
    {edges, counts: {language: [...]}}; bin i holds edges[i] <= value < edges[i + 1], the last one all from its edge."""
    found = {}
    for name in ("chars", "tokens", "turns")[:: 1 if tokens else 2]:
        edges = np.array(EDGES if name != "turns" else range(17))
        bins = np.searchsorted(edges, columns[name], "right") - 1
        counts = {language: np.bincount(bins[columns["lang"] == number].clip(0), minlength=len(edges))
                  for number, language in enumerate(LANGUAGES)}  # fmt: skip
        used = np.flatnonzero(sum(counts.values()))
        some = slice(used[0], used[-1] + 1) if len(used) else slice(0)
        found[name] = {"edges": edges[some].tolist(),
                       "counts": {name: c[some].tolist() for name, c in counts.items() if c.any()}}  # fmt: skip
    return found


def by_source(columns: np.ndarray, sources: list[Source]) -> dict[str, dict]:
    """Of what was taken, per source: records, their languages, characters (median, 95 % at most), and the share with
    more than one question."""
    found = {}
    for number, source in enumerate(sources):
        own = columns[columns["source"] == number]
        languages = np.bincount(own["lang"], minlength=len(LANGUAGES)).tolist()
        chars = spread(own["chars"])
        found[source.key] = {
            "records": len(own), "languages": {n: c for n, c in zip(LANGUAGES, languages, strict=True) if c},
            "chars": {p: chars[p] for p in ("p50", "p95")} if chars else {},
            "multi_turn": round(float((own["turns"] > 1).mean()), 4) if len(own) else 0.0,
        }  # fmt: skip
    return found


def changed_rules(sources: list[Source], config: Any) -> dict[str, dict]:
    """Source -> the cleaning rules that are others there than in the stage's config."""
    general = config.rules.model_dump()
    changed = {s.key: {k: v for k, v in s.rules.model_dump().items() if v != general[k]} for s in sources}
    return {key: rules for key, rules in changed.items() if rules}


def funnel(results: dict) -> dict[str, dict[str, int]]:
    """Source -> how many are left after each step: rows of the raw files; read (records, and rows that gave none);
    usable (records); clean (after the rules); different (after duplicates); kept (after repeats, post limits, mix)."""
    steps = {}
    for key, account in results["sources"].items():
        dropped = account["dropped"]
        unusable = sum(n for reason, n in dropped.items() if reason not in (*ACTIONS, *LATER))
        copies = sum(dropped.get(reason, 0) for reason in DUPLICATES)
        steps[key] = {"rows": account["rows"], "read": account["read"], "usable": account["read"] - unusable,
                      "clean": account["available"], "different": account["available"] - copies,
                      "kept": account["kept"]}  # fmt: skip
    return steps
