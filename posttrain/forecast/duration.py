"""
Tokens, FLOPs, time and cost of a training run, without a GPU.

Time is FLOPs over the speed of the card. A forecast speed is a share of the card's published peak; a measured one,
which every run stores after its first 20 steps (posttrain/calibration.py), replaces it.

Peaks are the vendor's figures for dense matrix products with 32-bit sums, in TFLOP/s: T4 datasheet (2019); A100
datasheet (2021); H100 and H200 datasheets (2023, 2024: half of the figures with sparsity); Ada GPU architecture
whitepaper (2022), appendix A, for the 4090; RTX Blackwell architecture whitepaper (2025), appendix, for the 5090. For
the RTX 3050 NVIDIA states shader TFLOPS only; tensor cores of that generation make twice as many with 32-bit sums
(GA102 whitepaper, 2021, table of the RTX 3080). The 4 GB laptop card's clock depends on the laptop: a middle value.

Shares of the peak are of all FLOPs done, recomputation counted (HFU of PaLM, arXiv 2204.02311, appendix B). They follow
from published speeds of LoRA runs: A100 39 to 48 % (Qwen-7B, 1,024 to 8,192 tokens; LLaMA-Factory), 25 % at 256
tokens, 32 % in 4 bit; T4 18 % in 4 bit. They spread by 25 to 30 %. For other cards nothing was found: a factor of 2.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.forecast.memory import adapter_elements, linear_shapes
from posttrain.runs import read_json, write_json

# Part of the card's name -> (16 bit with tensor cores, 32 bit) in TFLOP/s. The first that is found counts.
PEAKS = {
    "Tesla T4": (65, 8.1), "A100": (312, 19.5), "H100 PCIe": (756, 51), "H100": (989, 67), "H200": (989, 67),
    "4090": (165.2, 82.6), "5090": (209.5, 104.8), "3050 4 GB": (10, 5), "3050 6 GB": (13.5, 6.8), "3050": (18.2, 9.1),
}  # fmt: skip
# Share of the peak that is reached in 16 (or 32) bit and over 4-bit weights, and the factor either way.
SHARES = {"A100": (0.43, 0.32, 1.3), "Tesla T4": (0.24, 0.18, 1.3)}
OTHER_CARDS = (0.40, 0.30, 2.0)
SHORT_PASS = 1024  # tokens; a pass of fewer was seen to run at about half the speed
MEASURED_SPREAD = 1.1  # of a speed measured on the same card, base, stage and form of weights
SPEEDS_FILE = ".calibration.json"
SAME_SPEED = ("card", "base", "stage", "finetuning_type", "quantization", "precision", "processes")


# ------------------------------------------------------------------ work


@dataclass(frozen=True)
class Work:
    """What a run computes. `tokens` are those of all training steps, padding counted; flops of all processes."""

    steps: int
    tokens: int
    train_flops: float
    validation_flops: float = 0.0
    reference_flops: float = 0.0

    @property
    def flops(self) -> float:
        return self.train_flops + self.validation_flops + self.reference_flops

    @property
    def flops_per_step(self) -> float:
        return self.train_flops / max(1, self.steps)

    def times(self, factor: float) -> "Work":
        """The same run with all FLOPs multiplied: where a trace counted more or fewer than the formula."""
        return replace(self, train_flops=self.train_flops * factor, validation_flops=self.validation_flops * factor,
                       reference_flops=self.reference_flops * factor)  # fmt: skip


def flops(arch: dict[str, Any], tokens: float, squares: float, scored: float, *, mode: str = "lora", lora_r: int = 0,
          target_modules: Sequence[str] = (), gradient_checkpointing: bool = False) -> float:  # fmt: skip
    """FLOPs on sequences of `tokens` tokens in all, whose squared lengths add up to `squares`; `scored` tokens meet the
    head.

    mode: "forward"; "lora" (frozen weights: the backward pass makes the gradients of activations only); "full".
    A matrix of N weights takes 2N a token forward, 2N for the gradient of what went in, 2N for its own (Kaplan et al.
    2020, arXiv 2001.08361, section 2.1); attention 4 x layers x width x length a token forward and twice that back
    (PaLM, appendix B: not halved for the causal mask). Checkpointing repeats the forward pass of the layers. The head
    is that of losses.py: logits and slope at scored tokens, and for a trained head both a second time.
    """
    shapes, layers = linear_shapes(arch), arch["num_hidden_layers"]
    weights = layers * sum(out * into for out, into in shapes.values())
    adapter = adapter_elements(arch, lora_r, list(target_modules)) if mode == "lora" else 0
    attention = 4 * layers * shapes["q_proj"][0] * squares
    forward = 2 * (weights + adapter) * tokens + attention
    head = arch["vocab_size"] * arch["hidden_size"] * scored
    if mode == "forward":
        return forward + 2 * head
    back = 2 * forward if mode == "full" else forward + 2 * adapter * tokens + attention
    return forward * (2 if gradient_checkpointing else 1) + back + head * (8 if mode == "full" else 4)


def padded(widths: Sequence[int], rows_per_pass: int, seed: int = 0) -> list[int]:
    """Widths of rows as they are computed: each as wide as the widest of its micro-batch, for a random order."""
    if rows_per_pass == 1:
        return list(widths)
    order = random.Random(seed).sample(list(widths), len(widths))
    passes = [order[i : i + rows_per_pass] for i in range(0, len(order), rows_per_pass)]
    return [max(some) for some in passes for _ in some]


def work(arch: dict[str, Any], *, stage: str, steps: int, epochs: float, widths: Sequence[int], scored: int,
         rows_per_pass: int, packing: bool, val_widths: Sequence[int] = (), validations: int = 0,
         reference: bool = False, mode: str = "lora", lora_r: int = 16, target_modules: Sequence[str] = (),
         gradient_checkpointing: bool = True) -> Work:  # fmt: skip
    """The work of a run of `steps` steps over `epochs` passes.

    widths: tokens of each training row (of a pair: of its longer side, both sides are padded to it); val_widths: of
    the validation rows, which are seen `validations` times. scored: trained tokens of one epoch.
    reference: DPO's pass over all pairs before training.
    """
    sides = 2 if stage in ("orpo", "dpo") else 1

    def sums(some: Sequence[int], per_pass: int) -> tuple[float, float]:
        wide = some if packing else padded(some, per_pass)
        return sides * sum(wide), sides * sum(width * width for width in wide)

    tokens, squares = sums(widths, rows_per_pass)
    val_tokens, val_squares = sums(val_widths, 1)
    scored_share = scored / max(1, tokens)
    train = flops(arch, epochs * tokens, epochs * squares, epochs * scored, mode=mode, lora_r=lora_r,
                  target_modules=target_modules, gradient_checkpointing=gradient_checkpointing)  # fmt: skip
    seen = validations + bool(reference)
    val = flops(arch, seen * val_tokens, seen * val_squares, seen * val_tokens * scored_share, mode="forward")
    ref = flops(arch, tokens, squares, scored, mode="forward") if reference else 0.0
    return Work(steps, round(epochs * tokens), train, val, ref)


# ------------------------------------------------------------------ speed


@dataclass(frozen=True)
class Speed:
    """FLOP/s of all processes together, slowest and fastest, and where that is from."""

    slow: float
    fast: float
    source: str


def peak_flops(card: str, precision: str) -> float | None:
    """The card's published peak in FLOP/s, or None."""
    name = next((part for part in PEAKS if part in card), None)
    return PEAKS[name][1 if precision == "fp32" else 0] * 1e12 if name else None


def forecast_speed(card: str, *, quantization: str, precision: str, tokens_per_pass: int, processes: int = 1,
                   ) -> Speed | None:  # fmt: skip
    """What a card of this name should reach; None for a card (or CPU) whose peak is not in the table."""
    name = next((part for part in PEAKS if part in card), None)
    if name is None:
        return None
    peak = PEAKS[name][1 if precision == "fp32" else 0]
    in_16, in_4, factor = SHARES.get(name, OTHER_CARDS)
    share = in_4 if quantization != "none" else in_16
    slow, fast = share / factor, min(share * factor, 0.7)
    slow /= 2 if tokens_per_pass < SHORT_PASS else 1
    known = "published speeds of this card" if name in SHARES else "no speed of this card is known yet"
    source = f"{100 * slow:.0f} to {100 * fast:.0f} % of its {peak:g} TFLOP/s; {known}"
    return Speed(slow * peak * 1e12 * processes, fast * peak * 1e12 * processes, source)


def conditions(**facts: Any) -> dict[str, Any]:
    """What two runs must share so that the speed of one holds for the other; on a CPU also the machine."""
    missing = set(SAME_SPEED) - set(facts)
    if missing:
        raise KeyError(f"conditions of a speed: {sorted(missing)} not given")
    return {key: facts[key] for key in SAME_SPEED} | ({"host": facts["host"]} if facts["card"] == "CPU" else {})


def store_speed(directory: Path, entry: dict[str, Any]) -> None:
    """Put a measured speed into <directory>/.calibration.json, in place of an older one of the same conditions."""
    file = directory / SPEEDS_FILE
    same = conditions(**entry)
    others = [old for old in (read_json(file) or {}).get("speeds", []) if conditions(**old) != same]
    write_json(file, {"speeds": [*others, entry]})


def measured_speed(directory: Path, same: dict[str, Any]) -> Speed | None:
    """The speed that an earlier run beside this one measured under the same conditions, if any."""
    for entry in (read_json(directory / SPEEDS_FILE) or {}).get("speeds", []):
        if conditions(**entry) == same:
            rate = entry["flops_per_second"]
            return Speed(rate / MEASURED_SPREAD, rate * MEASURED_SPREAD,
                         f"measured on {entry['time'][:10]} by {entry['run']}: {rate / 1e12:.3g} TFLOP/s")  # fmt: skip
    return None


# ------------------------------------------------------------------ what it comes to


@dataclass(frozen=True)
class Duration:
    """Seconds of a run, fastest and slowest. Both None where nothing is known of the card's speed."""

    work: Work
    speed: Speed | None
    card: str
    price_per_hour: float | None = None

    @property
    def seconds(self) -> tuple[float, float] | None:
        return (self.work.flops / self.speed.fast, self.work.flops / self.speed.slow) if self.speed else None

    @property
    def cost(self) -> tuple[float, float] | None:
        if not self.seconds or self.price_per_hour is None:
            return None
        return tuple(seconds / 3600 * self.price_per_hour for seconds in self.seconds)

    def facts(self) -> dict[str, Any]:
        """As they stand in a manifest."""
        return {"seconds": self.seconds and [round(s, 1) for s in self.seconds], "flops": self.work.flops,
                "tokens": self.work.tokens, "card": self.card, "cost": self.cost and [round(c, 2) for c in self.cost],
                "source": self.speed.source if self.speed else "the speed of this card is not known"}  # fmt: skip

    def lines(self) -> list[str]:
        """For the dry run."""
        parts = {"validation": self.work.validation_flops, "reference": self.work.reference_flops}
        extra = ", ".join(f"{name} {size:.2g}" for name, size in parts.items() if size)
        lines = [f"{self.work.tokens:,} tokens computed, {self.work.flops:.3g} FLOP{f' ({extra})' if extra else ''}"]
        if self.seconds is None:
            return [*lines, f"time on {self.card}: not known beforehand; the first 20 steps of a run measure it, and "
                            "the next dry run says"]  # fmt: skip
        fast, slow = self.seconds
        lines.append(f"time: about {clock(fast)} to {clock(slow)} on {self.card}, without loading "
                     f"({self.speed.source})")  # fmt: skip
        if self.cost:
            low, high = self.cost
            lines.append(f"cost: {low:,.2f} to {high:,.2f}, at price_per_hour {self.price_per_hour:g}")
        return lines


def clock(seconds: float) -> str:
    """A duration as a person says it: 40 s, 12 min, 3.4 h, 2.1 days."""
    for limit, unit, size in ((90, "s", 1), (90 * 60, "min", 60), (48 * 3600, "h", 3600)):
        if seconds < limit:
            value = seconds / size
            return f"{value:.1f} {unit}" if unit == "h" or value < 10 else f"{value:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"
