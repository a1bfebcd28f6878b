"""The analytic forecast against traced steps, real parameter counts and 4-bit weights; every hardware file fits."""

import pytest
import torch

from posttrain.config import ROOT, hardware_values, merge, pick_hardware, read_yaml
from posttrain.forecast.memory import (
    adapter_elements,
    architecture,
    estimate,
    four_bit_bytes,
    of_config,
    parameter_counts,
)
from posttrain.stages import TRAINING_STAGES, EvalHarness, InferCompare

HARDWARE = sorted(p.stem for p in (ROOT / "configs/hardware").glob("*.yaml"))
CPU_GIB = 8  # what configs/hardware/cpu.yaml is meant to run in

# Peaks in GiB of a traced training step (fake tensors, no dropout, r 16 on all linear layers, 2 steps so that AdamW's
# states exist, bf16 adapters on 4-bit bases, no CUDA context). masked: a padded batch.
TRACED = [
    ("Qwen2.5-7B-Instruct", {}, 15.77),
    ("Qwen2.5-7B-Instruct", {"micro_batch": 4, "max_length": 4096}, 23.65),
    ("Qwen2.5-7B-Instruct", {"quantization": "nf4"}, 6.39),
    ("Qwen2.5-7B-Instruct", {"quantization": "nf4", "gradient_checkpointing": False}, 16.86),
    ("Qwen2.5-7B-Instruct", {"quantization": "nf4", "stage": "dpo"}, 7.28),
    ("Qwen2.5-7B-Instruct", {"quantization": "nf4", "micro_batch": 4, "flash": False}, 9.31),
    ("Qwen2.5-3B-Instruct", {"quantization": "nf4"}, 2.69),
    ("Qwen3-4B-Instruct-2507", {"quantization": "nf4"}, 3.39),
    ("Qwen2.5-1.5B-Instruct", {}, 3.59),
    ("Qwen2.5-0.5B-Instruct", {}, 1.29),
]


@pytest.mark.parametrize(("base", "settings", "traced"), TRACED)
def test_forecast_meets_the_traced_peak(base, settings, traced):
    forecast = estimate(architecture(base), **{"lora_dropout": 0.0, "flash": True, "on_card": False, **settings})
    assert forecast.total == pytest.approx(traced, rel=0.03)


@pytest.mark.parametrize("base", sorted(p.stem for p in (ROOT / "configs/models").glob("*.json")))
def test_parameter_counts_are_those_of_the_real_architecture(base):
    from transformers import AutoConfig, AutoModelForCausalLM

    arch = architecture(base)
    with torch.device("meta"):
        config = AutoConfig.for_model(**{k: v for k, v in arch.items() if k not in ("id", "architectures")})
        model = AutoModelForCausalLM.from_config(config)
    linear, other = parameter_counts(arch)
    assert sum(linear) + other == sum(p.numel() for p in model.parameters())

    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj", "down_proj"]
    with torch.device("meta"):
        adapted = get_peft_model(model, LoraConfig(r=8, target_modules=targets))
    assert adapter_elements(arch, 8, targets) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_published_sizes():
    """Parameters as the hub states them for the published weights."""
    published = {"Qwen2.5-7B-Instruct": 7_615_616_512, "Qwen2.5-0.5B-Instruct": 494_032_768,
                 "Qwen3-4B-Instruct-2507": 4_022_468_096, "Qwen3-0.6B": 596_049_920}  # fmt: skip
    for base, count in published.items():
        linear, other = parameter_counts(architecture(base))
        assert sum(linear) + other == count


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (96, 130), (256, 1024)])
def test_four_bit_bytes_are_those_of_bitsandbytes(shape, double_quant):
    import bitsandbytes as bnb

    weight = bnb.nn.Params4bit(torch.randn(shape), False, quant_type="nf4", compress_statistics=double_quant).to("cpu")
    state = weight.quant_state
    tensors = [weight.data, state.absmax, state.code]
    if double_quant:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    real = sum(t.numel() * t.element_size() for t in tensors)
    assert four_bit_bytes(shape[0] * shape[1], double_quant) == real


def test_verdict_covers_the_error_both_ways():
    arch = architecture("Qwen2.5-7B-Instruct")
    total = estimate(arch).total
    verdicts = [estimate(arch, vram_gib=total * x).verdict for x in (1.16, 1.0, 0.84)]
    assert verdicts == ["FITS", "TIGHT", "NO"]
    assert estimate(arch).verdict is None
    text = "\n".join(estimate(arch, vram_gib=8.0).lines())
    assert "NO" in text and "+/- 15 %" in text and "max_length" in text


def test_less_memory_where_less_is_asked():
    arch = architecture("Qwen3-4B-Instruct-2507")
    plain = estimate(arch, micro_batch=2).total
    for less in ({"quantization": "nf4"}, {"max_length": 1024}, {"micro_batch": 1}, {"optim": "adamw_8bit"},
                 {"lora_r": 4}, {"lora_dropout": 0.0}):  # fmt: skip
        assert estimate(arch, **{"micro_batch": 2, **less}).total < plain
    assert estimate(arch, micro_batch=2, gradient_checkpointing=False).total > plain
    assert estimate(arch, micro_batch=2, stage="orpo").total > plain


def test_unknown_base_has_no_forecast():
    assert architecture("someone/unknown-13b") is None


# ------------------------------------------------------------------ hardware files


def configured(hardware: str, stage: str, **over):
    """(config, facts of the card) of a training stage on a hardware file, with the stage's defaults elsewhere."""
    cls = TRAINING_STAGES[stage]
    values, facts = hardware_values(hardware, cls.name)
    blocks = {name: getattr(cls(), name).model_dump(exclude_unset=True) for name in ("model", "trainer")}
    return cls.model_validate(merge(merge(blocks, values), over)), facts


@pytest.mark.parametrize("stage", sorted(TRAINING_STAGES))
@pytest.mark.parametrize("hardware", HARDWARE)
def test_every_hardware_file_fits_its_own_card(hardware, stage):
    config, facts = configured(hardware, stage)
    for base in (config.model.base, *config.model.fallback):
        forecast = of_config(config, stage, architecture(base), facts["vram_gib"])
        if hardware == "cpu":
            assert forecast.total * (1 + forecast.error_share) <= CPU_GIB
        else:
            assert forecast.verdict == "FITS", f"{base} on {hardware}: {forecast.lines()}"


def test_a_continued_run_decides_what_is_its_own():
    config, facts = configured("4090", "orpo")
    arch = architecture(config.model.base)
    plain = of_config(config, "orpo", arch, facts["vram_gib"])
    quantised = of_config(config, "orpo", arch, facts["vram_gib"], quantization="nf4", lora_r=4)
    assert quantised.weights < plain.weights / 2 and quantised.adapters < plain.adapters
    assert plain.capacity == 23.5 and of_config(config, "orpo", arch, 0).capacity != 23.5


@pytest.mark.parametrize("hardware", HARDWARE)
def test_hardware_files_hold_only_what_is_read(hardware):
    content = read_yaml(ROOT / f"configs/hardware/{hardware}.yaml")
    stages = {"all_training", "eval_harness", "infer_compare", *(cls.name for cls in TRAINING_STAGES.values())}
    assert {"card", "name_contains", "vram_gib"} <= set(content) <= {"card", "name_contains", "vram_gib"} | stages
    for cls in (EvalHarness, InferCompare):
        cls.model_validate(hardware_values(hardware, cls.name)[0])


@pytest.mark.parametrize("stage", sorted(TRAINING_STAGES))
def test_micro_batches_divide_a_step(stage):
    """So that the same rows go into a step on every card."""
    for hardware in HARDWARE:
        trainer = configured(hardware, stage)[0].trainer
        rows = trainer.tokens_per_step // trainer.max_length if stage == "sft" else trainer.sequences_per_step
        assert rows % trainer.per_device_train_batch_size == 0


def test_cards_find_their_files():
    found = {"NVIDIA GeForce RTX 4090": (24.0, "4090"), "NVIDIA GeForce RTX 5090": (31.8, "5090"),
             "Tesla T4": (15.0, "t4"), "NVIDIA H200": (140.4, "h200"), "NVIDIA A100-SXM4-80GB": (80.0, "5090"),
             "NVIDIA GeForce GTX 1050": (2.0, "3050_4gb")}  # fmt: skip
    for name, (gib, hardware) in found.items():
        assert pick_hardware((name, gib)) == hardware
    for gib, hardware in ((8.0, "3050"), (6.0, "3050_6gb"), (4.0, "3050_4gb")):
        assert pick_hardware(("NVIDIA GeForce RTX 3050", gib)) == hardware
    assert pick_hardware(None) == "cpu"
