"""Curves of a training run, and distributions of a set of data, each as one inline picture."""

import base64
import contextlib
import io
import math
from collections.abc import Iterator
from typing import Any

COLORS = {"train": "#2f6db5", "validation": "#d1622b", "line": "#3d4650", "process": "#3d4650", "card": "#3c8c86"}
LANGUAGES = {"zh": "#3c8c86", "en": "#d0a13a", "other": "#8b949e", "none": "#c9d0d7"}
STYLE = {
    "font.size": 9, "font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#9aa3ad", "axes.labelcolor": "#59636e", "xtick.color": "#59636e", "ytick.color": "#59636e",
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e6e9ec", "grid.linewidth": 0.7, "axes.titlesize": 9.5,
    "axes.titlecolor": "#1d242b", "axes.titlelocation": "left", "svg.hashsalt": "posttrain",
}  # fmt: skip
# Panel title -> (key of metrics.jsonl, line's name) pairs.
PANELS = {
    "loss": (("loss", "train"), ("eval_loss", "validation")),
    "learning rate": (("learning_rate", "line"),),
    "gradient norm": (("grad_norm", "line"),),
    "preference accuracy": (("rewards/accuracies", "train"), ("eval_rewards/accuracies", "validation")),
    "margin": (("rewards/margins", "train"), ("eval_rewards/margins", "validation")),
    "peak memory, GiB": (("rss_gib", "process"), ("reserved_gib", "card")),
    "tokens a second": (("tokens_per_second", "line"),),
    "GPU utilisation": (("gpu_utilization", "line"),),
}


def series(metrics: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of one key, where it was logged."""
    points = [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
    return [x for x, _ in points], [y for _, y in points]


def curves(metrics: list[dict[str, Any]], kept_step: int | None) -> tuple[str, int] | None:
    """(data URI of an SVG with a panel for each group of curves that was logged, panels abreast: 1 to 3), or None."""
    panels = {title: [(name, *series(metrics, key)) for key, name in keys] for title, keys in PANELS.items()}
    panels = {title: lines for title, lines in panels.items() if any(xs for _, xs, _ in lines)}
    if not panels:
        return None
    abreast = min(3, len(panels))
    with _figure(math.ceil(len(panels) / 3), abreast, 2.4) as (axes, saved):
        for ax, (title, lines) in zip(axes.flat, panels.items(), strict=False):
            _panel(ax, title, lines, kept_step)
        for ax in axes.flat[len(panels) :]:
            ax.axis("off")
    return saved[0], abreast


def distributions(histograms: dict[str, dict]) -> tuple[str, int] | None:
    """(data URI of an SVG with a panel for characters, tokens and questions each, panels abreast), or None. A bar is a
    bin, its languages one above the other."""
    panels = {unit: histogram for unit, histogram in histograms.items() if histogram["edges"]}
    if not panels:
        return None
    with _figure(1, len(panels), 2.5) as (axes, saved):
        for ax, (unit, histogram) in zip(axes.flat, panels.items(), strict=True):
            _bars(ax, {"turns": "questions"}.get(unit, unit), histogram)
    return saved[0], len(panels)


@contextlib.contextmanager
def _figure(rows: int, abreast: int, height: float) -> Iterator[tuple[Any, list[str]]]:
    """(axes, a list that holds the picture's data URI once the block has ended)."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    saved: list[str] = []
    with plt.rc_context(STYLE):
        size = (3.4 * abreast, height * rows)
        figure, axes = plt.subplots(rows, abreast, figsize=size, layout="constrained", squeeze=False)
        yield axes, saved
        out = io.BytesIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    saved.append("data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode())


def _bars(ax, title: str, histogram: dict) -> None:
    """One histogram. The bins stand side by side, whatever their width: two to an octave for lengths."""
    edges = histogram["edges"]
    below = [0] * len(edges)
    for language, counts in histogram["counts"].items():
        ax.bar(range(len(edges)), counts, 0.86, bottom=below, color=LANGUAGES[language], label=language)
        below = [a + b for a, b in zip(below, counts, strict=True)]
    # A bin is named by where it begins; at most eight names, so that they stay apart.
    shown = range(0, len(edges), math.ceil(len(edges) / 8))
    ax.set_xticks([at - 0.43 for at in shown], [f"{edges[at]:,}" for at in shown])
    ax.grid(axis="x", visible=False)
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    ax.set_title(f"records by {title}")
    ax.legend(frameon=False, fontsize=8, loc="best", handlelength=1.0)


def _panel(ax, title: str, lines: list[tuple[str, list, list]], kept_step: int | None) -> None:
    """One panel: its curves, and on the loss a mark at the checkpoint that became the adapter."""
    lines = [line for line in lines if line[1]]
    for name, xs, ys in lines:
        few = len(xs) <= 12
        ax.plot(xs, ys, color=COLORS[name], linewidth=1.5, marker="o" if few else None, markersize=3, label=name)
    if title == "loss" and kept_step:
        ax.axvline(kept_step, color="#9aa3ad", linewidth=0.9, linestyle=(0, (3, 2)), label=f"kept: {kept_step}")
    if title == "learning rate":
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:.1e}".replace(".0e", "e").replace("e-0", "e-") if y else "0")
    if title == "preference accuracy":
        ax.set_ylim(min(0.45, *(y for _, _, ys in lines for y in ys)) - 0.05, 1.03)
    if title == "loss" or len(lines) > 1:
        ax.legend(frameon=False, fontsize=8, loc="best", handlelength=1.4)
    ax.set_title(title)
    ax.set_xlabel("step")
    ax.margins(x=0.02)
