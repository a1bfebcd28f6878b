"""Curves of a training run as one inline picture."""

import base64
import io
import math
from typing import Any

COLORS = {"train": "#2f6db5", "validation": "#d1622b", "line": "#3d4650"}
# Panel title -> (key of metrics.jsonl, line's name) pairs.
PANELS = {
    "loss": (("loss", "train"), ("eval_loss", "validation")),
    "learning rate": (("learning_rate", "line"),),
    "gradient norm": (("grad_norm", "line"),),
    "preference accuracy": (("rewards/accuracies", "train"), ("eval_rewards/accuracies", "validation")),
    "margin": (("rewards/margins", "train"), ("eval_rewards/margins", "validation")),
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
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    style = {
        "font.size": 9, "font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False,
        "axes.edgecolor": "#9aa3ad", "axes.labelcolor": "#59636e", "xtick.color": "#59636e", "ytick.color": "#59636e",
        "axes.grid": True, "grid.color": "#e6e9ec", "grid.linewidth": 0.7, "axes.titlesize": 9.5,
        "axes.titlecolor": "#1d242b", "axes.titlelocation": "left", "svg.hashsalt": "posttrain",
    }  # fmt: skip
    with plt.rc_context(style):
        rows, abreast = math.ceil(len(panels) / 3), min(3, len(panels))
        size = (3.4 * abreast, 2.4 * rows)
        figure, axes = plt.subplots(rows, abreast, figsize=size, layout="constrained", squeeze=False)
        for ax, (title, lines) in zip(axes.flat, panels.items(), strict=False):
            _panel(ax, title, lines, kept_step)
        for ax in axes.flat[len(panels) :]:
            ax.axis("off")
        out = io.BytesIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode(), abreast


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
