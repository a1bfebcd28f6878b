"""
Peak memory of a LoRA training step, from the architecture alone: no model, no GPU, no torch.

Parameters, adapters, gradients and optimiser states are counted exactly. The working memory of a layer is a formula in
tokens, MLP width and hidden width; its coefficients were fitted by least squares to 95 traced steps (five Qwen shapes
of 0.5B to 7B, 4, 16 and 32 bit, 512 to 8,192 tokens, with and without dropout, mask and checkpointing) and meet the
traced peaks to 4 %. What a card adds is larger than that: the caching allocator holds more than is allocated, and
kernels take room of their own; against real cards, forecasts of this kind were mostly low, by 15 % at worst. So that
is the error stated.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from posttrain.blocks import Training
from posttrain.config import ROOT
from posttrain.runs import read_json

GIB = 2**30
ERROR_SHARE = 0.15
CONTEXT_GIB = 0.53  # CUDA context and cuBLAS workspace; 0.14 was measured on a T4, newer cards take more
LOSS_CHUNK_BYTES = 128 * 2**20  # float32 logits alive at a time in losses.py
FUSED_TILE = (4096, 32768)  # tokens x vocabulary of the fused head that TRL puts on an SFT model
PER_LAYER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Numbers of (tokens x MLP width, tokens x hidden width) tensors alive: with checkpointing at the peak of one layer's
# backward pass, without it kept per layer until then. Key: (weights, dropout on the adapter's input).
WORKING = {
    ("4bit", False): (3.2, 23.8), ("4bit", True): (2.8, 40.5),
    ("16bit", False): (3.3, 38.5), ("16bit", True): (7.0, 53.0),
    ("32bit", False): (5.3, 13.0), ("32bit", True): (5.3, 26.0),
}  # fmt: skip
KEPT = {
    ("4bit", False): (5.5, 1.0), ("4bit", True): (6.6, 10.6),
    ("16bit", False): (5.1, 7.8), ("16bit", True): (7.0, 20.4),
    ("32bit", False): (4.4, 5.4), ("32bit", True): (6.0, 12.0),
}  # fmt: skip


# ------------------------------------------------------------------ parameters


def architecture(name: str, directory: Path | None = None) -> dict[str, Any] | None:
    """The config of a base: its own config.json where it is on disk, else configs/models/<name>.json, else None."""
    if directory is not None and (directory / "config.json").is_file():
        return read_json(directory / "config.json")
    return read_json(ROOT / f"configs/models/{name.rpartition('/')[2]}.json")


def linear_shapes(arch: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear layers of one block."""
    hidden, inner, heads = arch["hidden_size"], arch["intermediate_size"], arch["num_attention_heads"]
    head = arch.get("head_dim") or hidden // heads
    queries, keys = heads * head, arch.get("num_key_value_heads", heads) * head
    return {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden),
            "o_proj": (hidden, queries), "gate_proj": (inner, hidden), "up_proj": (inner, hidden),
            "down_proj": (hidden, inner)}  # fmt: skip


def parameter_counts(arch: dict[str, Any]) -> tuple[list[int], int]:
    """(elements of each linear layer that is quantised, all other elements): exact for Qwen2, Qwen3 and Llama."""
    shapes, layers, hidden = linear_shapes(arch), arch["num_hidden_layers"], arch["hidden_size"]
    linear = [out * into for out, into in shapes.values()] * layers
    family = arch.get("model_type", "")
    biases = sum(shapes[name][0] for name in ("q_proj", "k_proj", "v_proj")) if family == "qwen2" else 0
    head_norms = 2 * arch.get("head_dim", 0) if family.startswith("qwen3") else 0
    embeddings = arch["vocab_size"] * hidden * (1 if arch.get("tie_word_embeddings") else 2)
    return linear, embeddings + layers * (biases + head_norms + 2 * hidden) + hidden


def four_bit_bytes(elements: int, double_quant: bool) -> int:
    """Bytes of one 4-bit weight of bitsandbytes with its scales (blocks of 64; scales of scales in blocks of 256).
    Equal to the real `Params4bit` of bitsandbytes 0.50 byte by byte."""
    scales = -(-elements // 64)
    state = scales + 4 * -(-scales // 256) + 1024 + 4 if double_quant else 4 * scales
    return (elements + 1) // 2 + state + 64


def weight_bytes(arch: dict[str, Any], quantization: str = "none", double_quant: bool = True, width: int = 2) -> int:
    """Bytes of the frozen base; `width` is the bytes of an element that is not quantised."""
    linear, other = parameter_counts(arch)
    if quantization == "none":
        return (sum(linear) + other) * width
    return sum(four_bit_bytes(elements, double_quant) for elements in linear) + other * width


def adapter_elements(arch: dict[str, Any], r: int, target_modules: list[str] = PER_LAYER) -> int:
    """Elements of A (r x in) and B (out x r) over all layers."""
    shapes = linear_shapes(arch)
    return arch["num_hidden_layers"] * sum(r * sum(shapes[name]) for name in target_modules if name in shapes)


# ------------------------------------------------------------------ the forecast


@dataclass(frozen=True)
class Forecast:
    """Peak memory in GiB, by what takes it. `activations` and `logits` have each their time: the larger counts."""

    weights: float
    adapters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    context: float
    capacity: float | None
    error_share: float = ERROR_SHARE

    @property
    def total(self) -> float:
        fixed = self.weights + self.adapters + self.optimizer + self.context
        return fixed + max(self.activations, self.logits, 2 * self.gradients)

    @property
    def verdict(self) -> Literal["FITS", "TIGHT", "NO"] | None:
        """FITS and NO hold to the far end of the error; between them it is TIGHT. None without a card to fit."""
        if self.capacity is None:
            return None
        if self.total * (1 + self.error_share) <= self.capacity:
            return "FITS"
        return "TIGHT" if self.total * (1 - self.error_share) <= self.capacity else "NO"

    def lines(self) -> list[str]:
        """For the dry run: what takes the memory, the verdict, and how far to trust it."""
        parts = {"weights": self.weights, "adapter": self.adapters, "optimiser": self.optimizer,
                 "activations": self.activations, "loss": self.logits, "CUDA context": self.context}  # fmt: skip
        low, high = self.total * (1 - self.error_share), self.total * (1 + self.error_share)
        against = f" of {self.capacity:.1f} GiB: {self.verdict}" if self.capacity else ""
        listed = ", ".join(f"{name} {size:.2f}" for name, size in parts.items() if size)
        lines = [f"peak about {self.total:.1f} GiB ({low:.1f} to {high:.1f}){against}",
                 f"{listed} GiB (of activations and loss, the larger counts)",
                 f"analytic, +/- {self.error_share * 100:.0f} %; traced forecast: not yet"]  # fmt: skip
        if self.verdict == "TIGHT":
            lines.append("TIGHT: it depends on the allocator; set PYTORCH_ALLOC_CONF=expandable_segments:True")
        if self.verdict in ("TIGHT", "NO"):
            lines.append("to need less: trainer.per_device_train_batch_size=1, a shorter trainer.max_length, "
                         "model.quantization=nf4, gradient_checkpointing=true, a smaller model.base")  # fmt: skip
        return lines


def estimate(arch: dict[str, Any], *, quantization: str = "none", double_quant: bool = True, precision: str = "bf16",
             lora_r: int = 16, target_modules: list[str] = PER_LAYER, lora_dropout: float = 0.05,
             max_length: int = 2048, micro_batch: int = 1, gradient_checkpointing: bool = True, packing: bool = True,
             flash: bool = False, optim: str = "adamw_torch", stage: Literal["sft", "orpo", "dpo"] = "sft",
             on_card: bool = True, vram_gib: float | None = None) -> Forecast:  # fmt: skip
    """Peak of one training step with `micro_batch` rows (pairs for orpo and dpo) of `max_length` tokens.

    Every row is taken to be full and every linear layer to have an adapter: fewer targets or shorter rows need less.
    DPO's reference is computed before training, so it takes nothing here.
    flash: attention without a mask (flash attention 2); sdpa gets a mask with packing or with more than one row.
    """
    width = 4 if precision == "fp32" else 2
    kind = "4bit" if quantization != "none" else "32bit" if width == 4 else "16bit"
    layers, hidden, inner = arch["num_hidden_layers"], arch["hidden_size"], arch["intermediate_size"]
    sequences = micro_batch * (1 if stage == "sft" else 2)
    tokens = sequences * max_length
    masked = not flash and (packing or sequences > 1)

    trained = adapter_elements(arch, lora_r, target_modules)
    adapter = trained * (2 if kind == "4bit" and precision in ("bf16", "auto") else 4)  # as load_trainable makes it
    state = 2 * trained if optim in ("adamw_8bit", "paged_adamw_8bit") else 2 * adapter

    key = (kind, lora_dropout > 0)
    of_inner, of_hidden = (WORKING if gradient_checkpointing else KEPT)[key]
    layer = tokens * width * (of_inner * inner + of_hidden * hidden)
    dequantised = 2 * hidden * inner if kind == "4bit" else 0
    mask = 3 * sequences * max_length**2 if masked else 0  # booleans, and the kernel's 16-bit copy
    saved = layers * tokens * hidden * width  # the input of every layer
    if gradient_checkpointing:
        activations = saved + layer + dequantised + mask
    else:
        heads_kept = 2 * tokens * linear_shapes(arch)["q_proj"][0] * width if masked else 0  # keys, values repeated
        saved = layers * (layer + heads_kept)
        activations = saved + dequantised + mask
    loss = _loss_bytes(arch, stage, tokens, width)
    return Forecast(
        weights=weight_bytes(arch, quantization, double_quant, width) / GIB, adapters=adapter / GIB,
        gradients=adapter / GIB, optimizer=state / GIB, activations=activations / GIB, logits=(saved + loss) / GIB,
        context=CONTEXT_GIB if on_card else 0.0, capacity=vram_gib,
    )  # fmt: skip


def _loss_bytes(arch: dict[str, Any], stage: str, tokens: int, width: int) -> int:
    """The head and the loss: no logits of a whole row exist. TRL's fused head works in tiles (SFT); losses.py holds
    one chunk in float32, in the weights' width, and as slopes."""
    states = round(6.4 * tokens * arch["hidden_size"] * width)
    if stage == "sft":
        return min(tokens, FUSED_TILE[0]) * min(arch["vocab_size"], FUSED_TILE[1]) * width + states
    return 3 * LOSS_CHUNK_BYTES + states


def machine_gib() -> float:
    """Memory of this machine in GiB: what a run without a card has to fit."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def of_config(config: Training, stage: Literal["sft", "orpo", "dpo"], arch: dict[str, Any], vram_gib: float | None,
              **of_the_run: Any) -> Forecast:  # fmt: skip
    """The forecast of a training config. `vram_gib` is what the hardware file says; 0 is a CPU, measured against the
    machine's memory; None is a card of unknown size. `of_the_run` are arguments of estimate() that a continued SFT run
    decides instead of the config: quantization, double_quant, lora_r, target_modules."""
    trainer, on_card = config.trainer, vram_gib != 0
    settings = dict(
        quantization=config.model.quantization, double_quant=config.model.double_quant, optim=trainer.optim,
        precision=trainer.precision if trainer.precision != "auto" else "bf16" if on_card else "fp32",
        lora_r=config.lora.r, target_modules=config.lora.target_modules, lora_dropout=config.lora.dropout,
        max_length=trainer.max_length, micro_batch=trainer.per_device_train_batch_size, stage=stage,
        packing=getattr(trainer, "packing", False), gradient_checkpointing=trainer.gradient_checkpointing,
        on_card=on_card, vram_gib=vram_gib if on_card else machine_gib(),
    )  # fmt: skip
    return estimate(arch, **{**settings, **of_the_run})
