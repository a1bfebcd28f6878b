"""The forecast of a training stage: what one step of this config takes on this card."""

from typing import Any

from posttrain.blocks import Training
from posttrain.forecast import memory
from posttrain.forecast.memory import Forecast


def predict(cfg: Training, arch: dict[str, Any], vram_gib: float | None, **of_the_run: Any) -> Forecast:
    """Peak memory of a training step of `cfg`.

    arch: the content of the base's config.json. vram_gib: as in the hardware file; 0 is a CPU, held against the
    machine's memory; None is a card of unknown size. of_the_run: what a continued SFT run decides instead of the
    config: quantization, double_quant, lora_r, target_modules.
    """
    return memory.of_config(cfg, cfg.stage, arch, vram_gib, **of_the_run)
