"""
What an export has to pass.

Bounds on a merged model: the mean absolute logit difference in standard deviations of the adapter-on logits (over the
vocabulary), and the share of positions with the same most likely token. They go by the coarser of the run's and the
export's precision. Measured on a random 25.6M Qwen3 (near ties everywhere, so a trained model does better): fp32
1e-5 at most and 1.00, bf16 0.011 and 0.965, dequantised nf4 merged in bf16 0.014 and 0.97. An adapter merged into
weights that it was not trained on (a 4-bit run into the unquantised base) is off by the quantisation error itself,
0.28 and 0.56 there, so that its bound says little more than "the same model".
"""

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from posttrain.agreement import Agreement
from posttrain.config import shown
from posttrain.errors import CheckFailed
from posttrain.runs import sha256
from posttrain.stages import ExportLora

PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
BOUNDS = {"fp32": (1e-3, 0.99), "fp16": (0.02, 0.95), "bf16": (0.05, 0.90)}  # mean difference in deviations, top-1
OTHER_WEIGHTS = (0.6, 0.5)
QUANTIZED = {"nf4": (0.5, 0.5), "fp4": (0.5, 0.5), "int8": (0.1, 0.85)}
"""Of quantised weights around the merged ones, in the same units. Measured against bf16: a trained 1M model nf4 0.12
and 0.90, fp4 0.15 and 0.90, int8 0.017 and 0.985; a random 23M Qwen3, where all is a near tie, 0.28 and 0.39, 0.37 and
0.33, 0.033 and 0.93. A bound for "the same model in 4 bit", no promise of quality: measure that with eval_harness."""
KEPT = (0.5, 1.5)  # share of the adapter's change that merged weights must hold


def tensors_on_disk(directory: Path) -> dict[str, int]:
    """Name -> elements of all tensors in a directory's safetensors files, read from their headers. A file without a
    header is passed by: check_weights names it."""
    found = {}
    for file in directory.glob("*.safetensors"):
        try:
            with open(file, "rb") as f:
                header = json.loads(f.read(min(struct.unpack("<Q", f.read(8))[0], file.stat().st_size)))
        except (struct.error, ValueError):
            continue
        found |= {name: prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"}
    return found


def check_weights(run: Path, manifest: dict[str, Any]) -> None:
    """Look at the run's weights alone: CheckFailed if one is NaN or infinite, if an adapter is zero and so does
    nothing, or if they are not the files that the run wrote."""
    files = sorted(run.glob("*.safetensors"))
    if not files:
        raise CheckFailed(f"{shown(run)}: its weights are gone; put them back, or train again")
    for file in files:
        _check_file(file, manifest)


def _check_file(file: Path, manifest: dict[str, Any]) -> None:
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            broken = [name for name in names if not torch.isfinite(tensors.get_tensor(name)).all()]
            # LoRA's update is B @ A, and B begins at zero; DoRA's lengths begin as those of the base's weights.
            tells = [name for name in names if ".lora_A." not in name and "lora_magnitude_vector" not in name]
            acts = any(tensors.get_tensor(name).any() for name in tells)
    except SafetensorError as error:
        raise CheckFailed(f"{shown(file)}: cut short or damaged ({error}); put the file back, or train again") from None
    if broken:
        raise CheckFailed(f"{shown(file)}: {len(broken)} of {len(names)} tensors hold NaN or infinite values, first "
                          f"{broken[0]}\n  train again with a lower trainer.learning_rate; an earlier checkpoint-N of "
                          "the run may still be sound")  # fmt: skip
    if not acts:
        raise CheckFailed(f"{shown(file)}: the adapter does nothing (every B matrix is zero): merged weights would be "
                          "the base's. Train it first")  # fmt: skip
    written = [e["sha256"] for e in manifest["outputs"] if Path(e["path"]).name == file.name]
    if written and sha256(file) not in written:
        raise CheckFailed(f"{shown(file)}: not the file that the run wrote (another SHA-256 stands in its manifest); "
                          "put the file back, or train again")  # fmt: skip


@dataclass(frozen=True)
class Merged:
    """Merged weights, reloaded from disk, against the trained model (drift), against the bare base, and the share of
    the adapter's change that they hold."""

    drift: Agreement
    to_base: Agreement
    kept: float


def bounds(cfg: ExportLora, weights: str, precision: str, dtype: str, spread: float) -> tuple[float, float]:
    """(mean absolute logit difference at most, top-1 agreement at least) for a merged model."""
    # Whatever the precision asked for, bitsandbytes multiplies 4-bit weights in bf16 on CPUs that can.
    used = [precision, PRECISIONS[dtype], *(["bf16"] if weights == "dequantized" else [])]
    coarser = max(used, key=lambda name: BOUNDS[name][0])
    deviations, top1 = OTHER_WEIGHTS if weights == "unquantized" else BOUNDS[coarser]
    if cfg.quantization != "none":  # bounds of one's own are then those of the quantised weights
        return deviations * spread, top1
    return (cfg.max_logit_diff or deviations * spread), (top1 if cfg.min_top1 is None else cfg.min_top1)


def judge(found: Merged, effect: Agreement, bound: tuple[float, float], dtype: str) -> None:
    """CheckFailed if a merged model is the base, does not hold what the adapter changes, or leaves its bound."""
    drift = found.drift
    ways = "  choose: --set export.dtype=float32, --set export.mode=adapter, or "
    if found.to_base.max_abs == 0:
        raise CheckFailed(f"the merged model equals the base: the adapter was lost in the merge\n{ways}train longer")
    if not KEPT[0] <= found.kept <= KEPT[1]:
        raise CheckFailed(
            f"the merged model does not hold what the adapter changes (mean logit difference {effect.mean_abs:.3g}): "
            f"the share {found.kept:.2f} is in it, 1 is all of it; {dtype} itself is off by {drift.mean_abs:.3g}\n"
            f"{ways}train longer"
        )
    judge_drift(drift, bound, "--set export.dtype=float32, --set export.mode=adapter")


def bounds_of_quantized(cfg: ExportLora, spread: float) -> tuple[float, float]:
    """The same for quantised weights around the merged ones."""
    deviations, top1 = QUANTIZED[cfg.quantization]
    return (cfg.max_logit_diff or deviations * spread), (top1 if cfg.min_top1 is None else cfg.min_top1)


def judge_drift(drift: Agreement, bound: tuple[float, float], ways: str) -> None:
    """CheckFailed if an exported model leaves its bound around the trained one; `ways` names what else to choose."""
    if drift.mean_abs > bound[0] or drift.top1 < bound[1]:
        raise CheckFailed(
            f"the exported model differs from the trained one: mean logit difference {drift.mean_abs:.3g} (bound "
            f"{bound[0]:.3g}), top-1 agreement {drift.top1:.3f} (bound {bound[1]:.3f}) on {drift.positions} positions\n"
            f"  choose: {ways}, or bounds of your own (export.max_logit_diff, export.min_top1)"
        )
