"""What a run says when memory ends: what the allocator held, what was forecast, and what to change."""

import gc
import resource
import traceback
from dataclasses import dataclass, replace

import psutil
import torch

from posttrain.callbacks import GIB, context_gib
from posttrain.forecast.ladder import Ladder
from posttrain.forecast.memory import Forecast
from posttrain.sizing import Sizing

TOO_LOW = 1.05  # a forecast that memory has refuted is taken to be at least this much too low


@dataclass(frozen=True)
class Held:
    """GiB at the moment of the error. `limit`: what the run could have had at most."""

    lines: tuple[str, ...]
    limit: float | None


def message(error: BaseException, sizing: Sizing) -> str:
    """The whole message. Never raises: where even the forecast cannot be made, it says why."""
    where, held, said = _where(sizing), _held(sizing), _first_line(error)
    place = "the card" if torch.cuda.is_available() else "the machine"
    lines = [f"{place} is out of memory {where}: {said}", *held.lines]
    _let_go(error)
    try:
        lines += _forecast_lines(sizing, held)
    except Exception as second:  # memory may be too short for it; the first error is the one to show
        lines.append(f"no forecast: {_first_line(second)}")
    return "\n  ".join(lines)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _where(sizing: Sizing) -> str:
    """What the run was doing."""
    trainer = sizing.trainer
    if trainer is None or not trainer.state.max_steps:
        return "before the first step (loading, or DPO's reference)"
    at = f"step {trainer.state.global_step + 1} of {trainer.state.max_steps}"
    if sizing.at:
        return f"with {sizing.at}"
    return f"in {at}" if trainer.model.training else f"in the validation before {at}"


def _held(sizing: Sizing) -> Held:
    """What the allocator and the system count now, while the tensors are still there."""
    if not torch.cuda.is_available():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        machine = psutil.virtual_memory()
        text = (f"the process held {peak:.2f} GiB at its peak ({sizing.rss_before:.2f} before the model); of the "
                f"machine's {machine.total / GIB:.1f} GiB {machine.available / GIB:.1f} are free")  # fmt: skip
        return Held((text,), peak)
    free, total = torch.cuda.mem_get_info()
    context = context_gib()
    lines = [f"allocated {torch.cuda.memory_allocated() / GIB:.2f} GiB (peak "
             f"{torch.cuda.max_memory_allocated() / GIB:.2f}), reserved {torch.cuda.memory_reserved() / GIB:.2f}, "
             f"context and other programs {context:.2f}, free {free / GIB:.2f}, of {total / GIB:.2f} GiB"]  # fmt: skip
    if context > 1.5:
        lines.append("that is more than a context takes: close what else uses the card (nvidia-smi)")
    return Held(tuple(lines), total / GIB)


def _let_go(error: BaseException) -> None:
    """Free what the failed step still holds: its frames hang on the error."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _forecast_lines(sizing: Sizing, held: Held) -> list[str]:
    forecast = sizing.forecast()
    against = f" of {forecast.capacity:.1f} GiB: {forecast.verdict}" if forecast.capacity else ""
    lines = [f"forecast: {forecast.total:.2f} GiB at the peak, in the {forecast.phase}{against}"]
    limit = min(filter(None, (held.limit, forecast.capacity)), default=None)
    if limit is None:
        return lines
    factor = max(1.0, TOO_LOW * limit / forecast.total)
    if factor > 1 and forecast.verdict == "FITS":
        lines.append(f"the forecast was too low here; below it is taken as {factor:.2f} times as much")
    made = corrected(sizing, limit, factor)
    lines += sizing.ladder_lines(made)
    if torch.cuda.is_available():
        lines.append("PYTORCH_ALLOC_CONF=expandable_segments:True helps where much is reserved and less allocated")
    return [*lines, "--suggest writes the best config that fits by the forecast"]


def corrected(sizing: Sizing, limit: float, factor: float) -> Ladder:
    """The ladder where `limit` GiB can be had and everything takes `factor` times what is forecast."""

    def predict(cfg) -> Forecast:
        return replace(sizing.predict(cfg), capacity=limit / factor)

    return sizing.ladder(predict)
