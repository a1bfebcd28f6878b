"""The trainers' own arguments from our config; `trainer.extra` checked against their classes."""

import dataclasses
import sys
import typing
from difflib import get_close_matches
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from posttrain.light_bitsandbytes import import_bitsandbytes

import_bitsandbytes()  # before PEFT does, which the next line imports

from transformers import TrainingArguments  # noqa: E402

from posttrain import model, tracking  # noqa: E402
from posttrain.blocks import Training  # noqa: E402
from posttrain.errors import UserFault  # noqa: E402
from posttrain.schedule import Schedule  # noqa: E402


def arguments(cls: type[TrainingArguments], cfg: Training, schedule: Schedule, validates: bool, **more: Any):
    """The trainer's own arguments from our config. `cls` is TRL's SFTConfig or transformers' TrainingArguments."""
    trainer, dtype = cfg.trainer, model.dtype_of(cfg.trainer.precision)
    on_card = torch.cuda.is_available()
    values = dict(
        output_dir=str(cfg.output_dir), seed=trainer.seed, data_seed=trainer.seed,
        per_device_train_batch_size=schedule.micro_batch, per_device_eval_batch_size=trainer.per_device_eval_batch_size,
        gradient_accumulation_steps=schedule.accumulation, learning_rate=trainer.learning_rate,
        lr_scheduler_type=trainer.lr_scheduler_type, warmup_steps=int(schedule.steps * trainer.warmup_ratio),
        weight_decay=trainer.weight_decay, num_train_epochs=trainer.num_train_epochs, max_steps=trainer.max_steps,
        max_grad_norm=trainer.max_grad_norm, optim=trainer.optim, neftune_noise_alpha=trainer.neftune_noise_alpha,
        bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16 and on_card, use_cpu=not on_card,
        gradient_checkpointing=trainer.gradient_checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=min(trainer.logging_steps, max(1, schedule.steps // 10)), logging_first_step=True,
        logging_nan_inf_filter=False, save_steps=schedule.every(trainer.save_steps),
        save_strategy="steps", eval_strategy="steps" if validates else "no",
        eval_steps=schedule.every(trainer.save_steps), save_total_limit=trainer.save_total_limit,
        metric_for_best_model="eval_loss" if validates else None,
        greater_is_better=False if validates else None, dataloader_num_workers=trainer.dataloader_num_workers,
        report_to=tracking.prepare(cfg.tracking, cfg.output_dir), run_name=cfg.output_dir.name,
        project=tracking.PROJECT, remove_unused_columns=False,
        restore_callback_states_from_checkpoint=trainer.early_stopping_patience > 0,
        ddp_find_unused_parameters=False if schedule.world > 1 else None, disable_tqdm=not sys.stderr.isatty(),
    )  # fmt: skip
    return cls(**{**values, **more, **check_extra(cls, trainer.extra)})


# Fields of the arguments classes that a run sets itself: trainer.extra must not undo them behind the manifest's back.
OWNED = {
    "output_dir", "seed", "data_seed", "per_device_train_batch_size", "per_device_eval_batch_size", "max_steps",
    "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim",
    "num_train_epochs", "max_grad_norm", "bf16", "fp16", "use_cpu", "gradient_checkpointing", "logging_steps",
    "logging_strategy", "logging_first_step", "logging_nan_inf_filter", "save_steps", "save_strategy", "eval_strategy",
    "eval_steps", "save_total_limit", "metric_for_best_model", "greater_is_better", "dataloader_num_workers",
    "report_to", "remove_unused_columns", "disable_tqdm", "packing", "eval_packing", "max_length", "dataset_kwargs",
    "save_only_model", "load_best_model_at_end", "resume_from_checkpoint", "assistant_only_loss", "loss_type",
    "restore_callback_states_from_checkpoint", "completion_only_loss", "padding_free", "packing_strategy",
    "prediction_loss_only", "label_smoothing_factor", "push_to_hub", "neftune_noise_alpha",
}  # fmt: skip


def check_extra(cls: type, extra: dict[str, Any]) -> dict[str, Any]:
    """`trainer.extra` against the field names and types of the trainer's own arguments class. All faults at once."""
    hints, faults, checked = typing.get_type_hints(cls), [], {}
    fields = {field.name for field in dataclasses.fields(cls)}
    for key, value in extra.items():
        if key.endswith("_token"):
            faults.append(f"trainer.extra.{key}: a config is written beside every output, so no token stands in it; "
                          "use `hf auth login`")  # fmt: skip
            continue
        if key in OWNED:
            faults.append(f"trainer.extra.{key}: set by this project; use the key of its own under `trainer`")
            continue
        if key not in fields:
            close = get_close_matches(key, fields, 1)
            faults.append(f"trainer.extra.{key}: not a field of {cls.__name__}"
                          + (f" -- did you mean '{close[0]}'?" if close else ""))  # fmt: skip
            continue
        try:
            checked[key] = TypeAdapter(hints[key], config={"arbitrary_types_allowed": True}).validate_python(value)
        except ValidationError as error:
            faults.append(f"trainer.extra.{key}: {error.errors()[0]['msg']} (got {value!r})")
    if faults:
        raise UserFault("\n".join(faults))
    return checked


def arguments_class(kind: str) -> type[TrainingArguments]:
    """The arguments class that `trainer.extra` is checked against: TRL's SFTConfig for text and
    conversations, transformers' own for pairs."""
    if kind == "pref":
        return TrainingArguments
    from trl import SFTConfig

    return SFTConfig
