"""What the trainers share: where a run starts, its identity, training with resume, and its manifest."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback

from posttrain import callbacks, chat, model, runs, templates
from posttrain.blocks import Training
from posttrain.config import Loaded, in_project, shown
from posttrain.errors import Interrupted, UserFault
from posttrain.records import write_jsonl
from posttrain.schedule import Schedule, world_size
from posttrain.training_data import Rows


@dataclass
class Start:
    """Where a training run begins: its base, tokenizer, and the adapter that it continues, if any."""

    base: model.Base
    tokenizer: Any
    template: templates.Template
    loss_on: str | None
    adapter_dir: Path | None
    quantization: str
    double_quant: bool
    lora: dict[str, Any]


def start_from_base(cfg: Training, loss_on: str | None = None) -> Start:
    """Begin on the bare base: resolve it (downloading if need be) and lock its template."""
    base = model.resolve_base(cfg.model)
    return _start(cfg, base, loss_on, None, cfg.model.quantization, cfg.model.double_quant)


def start_from_run(cfg: Training, sft_run: Path) -> Start:
    """Begin on the adapter of an SFT run: its base, template and quantisation, all checked against its manifest."""
    facts = model.check_same_base([model.adapter_facts(sft_run)])
    if facts.manifest is None:
        raise UserFault(f"sft_run: {shown(sft_run)} is an adapter without a manifest; train it here, or sft_run=null")
    base = model.Base(facts.base_id, facts.base_path, facts.base_fingerprint)
    start = _start(cfg, base, None, sft_run, facts.quantization, facts.double_quant)
    chat.check_golden(start.tokenizer, facts.manifest["template"]["golden"])
    return start


def _start(cfg, base, loss_on, adapter_dir, quantization, double_quant) -> Start:
    source = adapter_dir or base.path
    asked = "auto" if adapter_dir else cfg.model.chat_template
    tokenizer = model.read_tokenizer(source, cfg.model.trust_remote_code)
    template = templates.choose_template(tokenizer, asked)
    tokenizer = model.load_tokenizer(source, asked, cfg.model.trust_remote_code)
    if loss_on:
        loss_on = templates.learnable(template, loss_on)
    lora = cfg.lora.model_dump()
    if adapter_dir:
        settings = runs.read_json(adapter_dir / "adapter_config.json")
        lora = {"r": settings["r"], "alpha": settings["lora_alpha"], "dropout": settings["lora_dropout"],
                "bias": settings["bias"], "target_modules": sorted(settings["target_modules"])}  # fmt: skip
    return Start(base, tokenizer, template, loss_on, adapter_dir, quantization, double_quant, lora)


def load_trainable(cfg: Training, start: Start):
    """Base and adapter, ready to train. Adapter weights are float32 over a 16-bit base, bfloat16 over a 4-bit one
    (QLoRA's recommendation, as TRL does)."""
    import torch
    from transformers import set_seed

    set_seed(cfg.trainer.seed)
    base = model.load_base(
        start.base.path, cfg.trainer.precision, start.quantization, start.double_quant,
        cfg.model.attn_implementation, cfg.model.trust_remote_code,
    )  # fmt: skip
    if start.adapter_dir:
        peft_model = model.load_adapter(base, start.adapter_dir, trainable=True)
    else:
        peft_model = model.new_adapter(base, cfg.lora)
    if start.quantization != "none" and model.dtype_of(cfg.trainer.precision) == torch.bfloat16:
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    return peft_model


# ------------------------------------------------------------------ the run


def run_inputs(cfg: Training, start: Start) -> dict[str, Any]:
    """The inputs that make a run what it is: data files, base, template, the adapter continued."""
    inputs = {f"train:{shown(p)}": runs.describe_file(p) for p in cfg.data.train_files}
    inputs |= {f"val:{shown(p)}": runs.describe_file(p) for p in cfg.data.validation_files}
    inputs["base"] = start.base.facts()
    inputs["template"] = {"name": start.template.name, "sha256": templates.template_sha(start.template.text)}
    inputs["tokenizer"] = {"sha256": model.tokenizer_sha(start.adapter_dir or start.base.path)}
    if start.adapter_dir:
        inputs["sft"] = runs.describe_file(start.adapter_dir / "adapter_model.safetensors")
    return inputs


def identity(cfg: Training) -> dict[str, Any]:
    """What else decides a run's result: the processes, and what `auto` means on this machine."""
    return {"processes": world_size(), "precision": str(model.dtype_of(cfg.trainer.precision)),
            "attention": model.attention(cfg.model.attn_implementation)}  # fmt: skip


def train(trainer, run: runs.Run, minutes: float, patience: int) -> Path:
    """Train, resuming from the newest complete checkpoint. Returns the checkpoint that becomes the adapter."""
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    stop = callbacks.CleanStop()
    if patience and trainer.args.eval_strategy == "no":
        raise UserFault("trainer.early_stopping_patience: there is no validation to judge by; set data.val_files or "
                        "data.val_share, or 0 here")  # fmt: skip
    if patience:
        trainer.add_callback(EarlyStoppingCallback(patience))
    trainer.add_callback(callbacks.StopOnNan())
    trainer.add_callback(callbacks.Metrics(run.dir / "metrics.jsonl"))
    trainer.add_callback(callbacks.Checkpoints(minutes, trainer.model))
    trainer.add_callback(stop)
    checkpoint = callbacks.newest_complete(run.dir) if run.resumed else None
    if checkpoint and runs.main_process():
        print(f"going on from {shown(checkpoint)}", flush=True)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.asked and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(f"interrupted at step {trainer.state.global_step} of {trainer.state.max_steps}, state saved; "
                          "the same command goes on from there")  # fmt: skip
    best = trainer.state.best_model_checkpoint
    return Path(best) if best else callbacks.newest_complete(run.dir)


def finish(cfg: Training, loaded: Loaded, run: runs.Run, trainer, start: Start, rows: Rows, schedule: Schedule,
           inputs: dict[str, Any], checkpoint: Path, parents: dict[str, Path]) -> None:  # fmt: skip
    """Put the adapter and its tokenizer at the root of the run, then the manifest."""
    if not runs.main_process():
        return
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy2(checkpoint / name, cfg.output_dir / name)
    name_base(cfg.output_dir, start.base)
    start.tokenizer.save_pretrained(str(cfg.output_dir))
    write_jsonl(cfg.output_dir / "dropped.jsonl", rows.dropped)
    state = trainer.state
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    evals = {entry["step"]: entry for entry in state.log_history if "eval_loss" in entry}
    step = int(checkpoint.name.rpartition("-")[2])
    results = {
        "steps": state.global_step, "kept": "best" if state.best_model_checkpoint else "last", "kept_step": step,
        "first_loss": losses[0] if losses else None, "last_loss": losses[-1] if losses else None,
        "best_eval_loss": state.best_metric, "total_flos": state.total_flos,
        **{k: v for k, v in evals.get(step, {}).items() if k.startswith("eval_rewards")},
    }  # fmt: skip
    run.finish(
        "adapter", inputs, [cfg.output_dir / "adapter_model.safetensors", cfg.output_dir / "metrics.jsonl",
                            cfg.output_dir / "dropped.jsonl"], parents, results,
        base=start.base.facts(), template={"name": start.template.name, "injects": start.template.injects,
        "sha256": templates.template_sha(start.template.text), "golden": chat.golden(start.tokenizer)},
        quantization={"type": start.quantization, "double_quant": start.double_quant},
        lora=start.lora, data=rows.facts(), schedule=schedule.facts(), seeds={"seed": cfg.trainer.seed},
        peak_memory=callbacks.peak_memory(), precision=str(model.dtype_of(cfg.trainer.precision)),
    )  # fmt: skip
    kept = "the last: there is no validation"
    if results["kept"] == "best":
        kept = "the best by validation loss" if len(evals) > 1 else "validated once"
    print(f"{cfg.name}: done, {state.global_step} steps. {shown(cfg.output_dir)} holds the adapter of step {step} "
          f"({kept})")  # fmt: skip


def name_base(directory: Path, base: model.Base) -> None:
    """Name the base in adapter_config.json as the user named it, not as the path of this machine's cache."""
    settings = runs.read_json(directory / "adapter_config.json")
    local = in_project(Path(base.id))
    settings["base_model_name_or_path"] = str(local) if local.is_dir() else base.id
    runs.write_json(directory / "adapter_config.json", settings)


def say(rows: Rows, schedule: Schedule, cfg: Training) -> None:
    """What a run is about to do, in three lines."""
    if runs.main_process():
        fates = ", ".join(f"{reason} {count}" for reason, count in sorted(rows.fates.items()))
        print(f"{cfg.name}: {fates}; {rows.tokens} tokens, {rows.trained_tokens} of them trained", flush=True)
        for line in [*rows.notes, *schedule.lines("rows")]:
            print(f"  {line}", flush=True)
