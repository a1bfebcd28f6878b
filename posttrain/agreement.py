"""Two models on the same token rows: how far their logits agree."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from posttrain.errors import CheckFailed

MAX_TOKENS, MAX_POSITIONS = 512, 64  # of one row: read, and compared (its last; bounds the logits in memory)


@dataclass(frozen=True)
class Agreement:
    """Logits of a model against those of another on the same positions. `kl` is KL(other || model) in nats."""

    max_abs: float
    mean_abs: float
    top1: float
    kl: float
    positions: int


def logits_of(model, rows: list[list[int]]) -> Iterator[Any]:
    """Float32 logits (positions, vocabulary) of each row's last positions, on the CPU. CheckFailed if not finite."""
    import torch

    for row in rows:
        with torch.inference_mode():
            ids = torch.tensor([row], device=model.device)
            keep = min(len(row), MAX_POSITIONS)
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0].float().cpu()
        if not torch.isfinite(logits).all():
            raise CheckFailed("the model's logits contain NaN or infinite values")
        yield logits


def agreement(found: Iterable[Any], wanted: Iterable[Any]) -> Agreement:
    """Compare logits row by row."""
    worst = total = same = divergence = 0.0
    cells = positions = 0
    for a, b in zip(found, wanted, strict=True):
        difference = (a - b).abs()
        worst = max(worst, difference.max().item())
        total, cells = total + difference.double().sum().item(), cells + a.numel()
        same += (a.argmax(-1) == b.argmax(-1)).sum().item()
        p, q = b.log_softmax(-1), a.log_softmax(-1)
        divergence += (p.exp() * (p - q)).sum().item()
        positions += len(a)
    return Agreement(worst, total / cells, same / positions, max(0.0, divergence / positions), positions)


def kept_share(found: Iterable[Any], on: Iterable[Any], off: Iterable[Any]) -> float:
    """How much of what the adapter changes (on - off) is in `found`: 1 all of it, 0 nothing. The projection of
    found - off on it, so that rounding, which has no direction, hardly counts."""
    along = length = 0.0
    for x, a, b in zip(found, on, off, strict=True):
        change = (a - b).double()
        along += ((x - b).double() * change).sum().item()
        length += (change * change).sum().item()
    return along / length


def table(effect: Agreement | None, found: dict[str, Agreement], bound: tuple[float, float]) -> None:
    """Print the comparison: a row per model, and the bounds on mean difference and top-1. effect: of the adapter
    against the base; None for a whole model."""
    rows = {"adapter vs base": effect, **found} if effect else found
    heading = f"on {next(iter(rows.values())).positions} positions"
    print(f"\n{heading:<34}{'max |dlogit|':>14}{'mean |dlogit|':>15}{'top-1':>8}{'KL':>11}")
    for name, row in rows.items():
        print(f"{name:<34}{row.max_abs:>14.3g}{row.mean_abs:>15.3g}{row.top1:>8.3f}{row.kl:>11.3g}")
    print(f"{'bound':<34}{'':>14}{bound[0]:>15.3g}{bound[1]:>8.3f}\n", flush=True)
