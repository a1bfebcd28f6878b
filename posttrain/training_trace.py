"""
Optimiser steps of a training stage, traced: the real model class, adapter, loss, trainer and training loop, on tensors
that have shapes and no bytes. It runs over real tensors as well (`real`), which is how tests hold the one to the other.
"""

import os
import random
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

from posttrain import arguments, losses, model, training
from posttrain.blocks import Training
from posttrain.errors import UserFault
from posttrain.forecast import stand_ins, unroll
from posttrain.forecast.allocations import AllocationLog, TracedLog
from posttrain.schedule import Schedule
from posttrain.training_watch import Steps

TOKEN = 2  # any id: only shapes count


@dataclass(frozen=True)
class Batch:
    """The shape of a micro-batch: rows (or pairs) of `longest` tokens (of a pair: prompt and longer answer), and how
    often a step accumulates. on_card: as a CUDA card would run it; flash: whether it has flash attention kernels.
    coarse_head: trace the head's hundreds of small blocks on a CPU as 64 larger ones."""

    rows: int
    longest: int
    accumulation: int = 1
    eval_rows: int = 0
    eval_longest: int = 0
    on_card: bool = True
    flash: bool = True
    coarse_head: bool = False


# ------------------------------------------------------------------ the model


def with_layers(arch: dict[str, Any], layers: int) -> dict[str, Any]:
    """The config of a base with fewer decoder layers."""
    cut = {**arch, "num_hidden_layers": layers}
    if "layer_types" in arch:
        cut["layer_types"] = arch["layer_types"][:layers]
    return cut


def empty_base(arch: dict[str, Any], dtype: torch.dtype, quantization: str, double_quant: bool, attn: str) -> nn.Module:
    """The base on torch's meta device: the class that from_pretrained would make, without weights. UserFault for an
    architecture that transformers does not know by itself."""
    known = {k: v for k, v in arch.items() if k not in ("id", "architectures", "torch_dtype", "dtype", "auto_map")}
    try:
        config = AutoConfig.for_model(**known)
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn)
    except (ValueError, KeyError, ImportError) as error:
        raise UserFault(f"no forecast: {str(error).splitlines()[0]}") from error
    base.tie_weights()
    if quantization != "none":
        stand_ins.to_four_bits(base, quantization, double_quant)
    return base.eval()


def give_storages(lm: nn.Module) -> None:
    """Meta parameters and buffers become CPU ones, ties kept: fake ones inside a FakeTensorMode."""
    made: dict[int, torch.Tensor] = {}
    for module in lm.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or tensor.device.type != "meta":
                    continue
                if id(tensor) not in made:
                    new = torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
                tensors[name] = made[id(tensor)]


def trainable(cfg: Training, arch: dict[str, Any], quantization: str, double_quant: bool, attn: str) -> nn.Module:
    """What training.load_trainable gives for this config, on the meta device. float16 is traced as bfloat16, which is
    as wide and which a CPU's autocast has."""

    def load_base(path, precision, *_, **__):
        dtype = model.dtype_of(precision)
        return empty_base(arch, torch.bfloat16 if dtype == torch.float16 else dtype, quantization, double_quant, attn)

    start = SimpleNamespace(base=SimpleNamespace(path=None), adapter_dir=None, quantization=quantization,
                            double_quant=double_quant)  # fmt: skip
    with stand_ins.replaced("posttrain.model", "load_base", load_base):
        return training.load_trainable(cfg, start)


# ------------------------------------------------------------------ rows and trainer


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of two tokens: trainers ask it for the padding token and nothing else."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def rows_of(cfg: Training, longest: int, packed: bool, count: int) -> list[dict[str, Any]]:
    """`count` rows as the stage encodes them, every token trained: the first is the longest, the others are a little
    shorter, so that a batch of several is padded."""
    lengths = [longest - (0 if at == 0 or packed else 1) for at in range(count)]
    if cfg.stage in ("orpo", "dpo"):
        return [{"prompt_ids": [TOKEN] * 2, "chosen_ids": [TOKEN] * (n - 2), "rejected_ids": [TOKEN] * (n - 3),
                 "ref_chosen": -1.0, "ref_rejected": -1.0} for n in lengths]  # fmt: skip
    rows = [{"input_ids": [TOKEN] * n, "labels": [TOKEN] * n} for n in lengths]
    if packed:
        rows = [row | {"seq_lengths": [n // 2, n - n // 2]} for row, n in zip(rows, lengths, strict=True)]
    return rows


def make_trainer(cfg: Training, lm: nn.Module, batch: Batch, directory: str) -> Trainer:
    """The stage's own trainer with its own arguments, on the CPU, writing nothing, for one step of one micro-batch."""
    schedule = Schedule(batch.rows, batch.rows, 1, 1, 1, 1.0, batch.rows)
    more = dict(output_dir=directory, use_cpu=True, fp16=False, save_strategy="no", report_to=[], max_steps=1,
                disable_tqdm=True, log_level="error")  # fmt: skip
    packed = getattr(cfg.trainer, "packing", False)
    rows = rows_of(cfg, batch.longest, packed, batch.rows)
    if cfg.stage in ("orpo", "dpo"):
        from posttrain.preference import PairCollator, PreferenceTrainer

        score_prompts = getattr(cfg, "nll_on", "response") == "all"
        trainer = PreferenceTrainer(
            cfg, model=lm, args=arguments.arguments(TrainingArguments, cfg, schedule, False, **more),
            data_collator=PairCollator(tokenizer(), score_prompts), train_dataset=rows, processing_class=tokenizer(),
        )  # fmt: skip
    else:
        from datasets import Dataset
        from trl import SFTConfig

        from posttrain.sft import ChunkedSFTTrainer

        args = arguments.arguments(
            SFTConfig, cfg, schedule, False, packing=packed, eval_packing=False, max_length=cfg.trainer.max_length,
            dataset_kwargs={"skip_prepare_dataset": True}, **more,
        )  # fmt: skip
        held = {"kl_to_base": cfg.kl_to_base} if getattr(cfg, "kl_to_base", None) else {}
        trainer = ChunkedSFTTrainer(model=lm, args=args, train_dataset=Dataset.from_list(rows),
                                    processing_class=tokenizer(), **held)  # fmt: skip
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    micro_batch = trainer.data_collator(rows)
    trainer.get_train_dataloader = lambda: DataLoader([micro_batch], batch_size=None)
    return trainer


# ------------------------------------------------------------------ the trace


def watched_steps(cfg: Training, trainer: Trainer, log: AllocationLog, batch: Batch) -> None:
    """The trainer's own train() inside the log, then a validation batch. Call with the log's modes not yet open."""
    trainer.add_callback(Steps(log, trainer, batch.accumulation > 1))
    trainer.accelerator.free_memory = lambda *args: None  # train() begins with it: nothing is there yet
    with log:
        log.name_model(trainer.model)
        trainer.train()
        if batch.eval_rows:
            trainer.eval_sums = torch.zeros(4 if cfg.stage in ("orpo", "dpo") else 2)
            rows = rows_of(cfg, batch.eval_longest or batch.longest, False, batch.eval_rows)
            trainer.model.eval()
            trainer.prediction_step(trainer.model, trainer.data_collator(rows), prediction_loss_only=True)


@contextmanager
def _apart() -> Iterator[None]:
    """Keep the trace from this process's random numbers, accelerate state, launch and log levels: a run may be going on
    in it."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    seeded = random.getstate(), np.random.get_state()
    states = (AcceleratorState, GradientState, PartialState)
    shared = [dict(state._shared_state) for state in states]
    launch = {k: v for k, v in os.environ.items() if k.startswith(("ACCELERATE_", "FSDP_")) or k in LAUNCH}
    level = logging.get_verbosity()
    for state in states:
        state._shared_state.clear()
    for key in launch:
        del os.environ[key]
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            logging.set_verbosity_error()
            yield
    finally:
        random.setstate(seeded[0])
        np.random.set_state(seeded[1])
        for state, kept in zip(states, shared, strict=True):
            state._shared_state.clear()
            state._shared_state.update(kept)
        os.environ.update(launch)
        logging.set_verbosity(level)


LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def trace(cfg: Training, arch: dict[str, Any], batch: Batch, quantization: str = "none", double_quant: bool = True,
          attn: str = "sdpa", real: bool = False) -> AllocationLog:  # fmt: skip
    """The log of a micro-batch, an optimiser step and a validation batch of `cfg`, without computing them.

    cfg.trainer.precision: bf16, fp16 or fp32. attn: sdpa, eager or flash_attention_2. real: compute them on this CPU
    all the same, with weights of zero; then the log counts true tensors.
    """
    as_traced = cfg
    if cfg.trainer.precision == "fp16":
        as_traced = cfg.model_copy(update={"trainer": cfg.trainer.model_copy(update={"precision": "bf16"})})
    with ExitStack() as stack:
        stack.enter_context(_apart())
        stack.enter_context(stand_ins.dora_dequantises())
        adapted = trainable(cfg, arch, quantization, double_quant, "sdpa" if attn == "flash_attention_2" else attn)
        adapted.to = lambda *args, **kwargs: adapted  # a trainer moves its model to its device: nothing to move
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        trainer = make_trainer(as_traced, adapted, batch, directory)
        if not real:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        give_storages(adapted)
        if batch.on_card:
            stack.enter_context(stand_ins.gpu_kernels(batch.flash, cfg.trainer.precision == "fp16"))
            if attn == "flash_attention_2":
                stack.enter_context(stand_ins.no_mask())
            log = TracedLog(512, stand_ins.workspace, host_scalars=False)
        else:
            log = AllocationLog(64) if real else TracedLog(64)
        if not real:
            blocks = {"cpu": _head_block_bytes(arch, batch, 2 if cfg.stage in ("orpo", "dpo") else 1)}
            stack.enter_context(stand_ins.replaced("posttrain.losses", "BLOCK_BYTES", blocks))
        if "8bit" in cfg.trainer.optim or cfg.trainer.optim == "paged_adamw_32bit":
            trained = [p for p in adapted.parameters() if p.requires_grad]
            bits = 32 if "32" in cfg.trainer.optim else 8
            trainer.optimizer = stand_ins.EightBitAdamW(trained, bits, lr=cfg.trainer.learning_rate)
        watched_steps(as_traced, trainer, log, batch)
    return log


def _head_block_bytes(arch: dict[str, Any], batch: Batch, sides: int) -> int:
    """losses.BLOCK_BYTES of the machine that is traced for."""
    if batch.on_card:
        return losses.BLOCK_BYTES["cuda"]
    all_logits = 4 * arch["vocab_size"] * batch.rows * sides * batch.longest
    return max(losses.BLOCK_BYTES["cpu"], all_logits // 64 if batch.coarse_head else 0)


def trace_whole(cfg: Training, arch: dict[str, Any], batch: Batch, quantization: str, double_quant: bool,
                attn: str) -> tuple[AllocationLog, list[unroll.Event]]:  # fmt: skip
    """(log, events in full depth): from a trace of three decoder layers where that is enough, else of all of them."""
    layers = arch["num_hidden_layers"]
    if layers > unroll.TRACED_LAYERS and len(set(arch.get("layer_types", []))) < 2:
        log = trace(cfg, with_layers(arch, unroll.TRACED_LAYERS), batch, quantization, double_quant, attn)
        try:
            return log, unroll.events(log, layers)
        except unroll.LayersDiffer:
            pass  # then all of them are traced
    log = trace(cfg, arch, batch, quantization, double_quant, attn)
    return log, unroll.as_traced(log)


def flops_of_micro_batch(log: AllocationLog, arch: dict[str, Any]) -> float:
    """FLOPs of the forward and backward pass of the traced micro-batch."""
    return unroll.flops(log, arch["num_hidden_layers"], ("forward", "loss", "backward"))
