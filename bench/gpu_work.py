"""
The work of bench/gpu.py, in a process of its own: jobs come in as JSON lines, results go out as JSON lines.

Ours goes through the stages' own main(): config, rows, template, base from disk, trainer, callbacks, checkpoints,
manifest. TRL gets the same base and adapter, rows, arguments and kernels. Rows are chats of random digits, each of them
one token of the tokenizer, so that every row is exactly as long as it should be.
"""

import gc
import json
import os
import random
import shutil
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from posttrain.config import ROOT

TINY = {"model_type": "qwen3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 2048,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024,
        "tie_word_embeddings": True}  # fmt: skip
REJECTED = 0.9  # length of a rejected row, of the chosen one's


def architecture(shape: str) -> dict[str, Any]:
    """The config.json of a shape: `tiny`, or the name of a file in configs/models/."""
    return TINY if shape == "tiny" else json.loads((ROOT / f"configs/models/{shape}.json").read_text())


# ------------------------------------------------------------------ base and rows


def make_base(shape: str, directory: Path) -> Path:
    """A base of random weights in bfloat16 with a tokenizer whose digits are one token each; made once."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from posttrain.demo.base import make_tokenizer

    if (directory / "config.json").is_file():
        return directory
    tokenizer = make_tokenizer(["0123456789 random digits, and what ChatML needs"])
    facts = {k: v for k, v in architecture(shape).items() if k not in ("id", "model_type", "torch_dtype")}
    config = AutoConfig.for_model(architecture(shape)["model_type"], **facts)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    return directory


def conversation(rng: random.Random, tokens: int, header: int) -> list[dict[str, str]]:
    """A question and an answer that are `tokens` long together; 3 of 5 tokens are the answer's."""
    digits = tokens - header
    asked = digits * 2 // 5
    return [{"role": role, "content": "".join(rng.choices("0123456789", k=count))}
            for role, count in (("user", asked), ("assistant", digits - asked))]  # fmt: skip


def write_rows(job: dict[str, Any], base: Path, file: Path) -> None:
    """Rows for 4 micro-batches that are full: SFT conversations of 1/2, 1/4 and 1/4 of the length, which pack without a
    gap; pairs whose chosen row is as long as allowed."""
    from posttrain import chat, model

    probe = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    header = len(chat.chat_ids(model.load_tokenizer(base), probe)[0]) - 2
    rng, length, rows = random.Random(0), job["length"], []
    for _ in range(4 * job["micro"]):
        if job["stage"] == "sft":
            rows += [{"messages": conversation(rng, length // part, header)} for part in (2, 4, 4)]
            continue
        user, chosen = conversation(rng, length, header)
        rejected = chosen["content"][: len(chosen["content"]) - round((1 - REJECTED) * length)][::-1]
        rows.append({"prompt": user["content"], "chosen": chosen["content"], "rejected": rejected})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings(job: dict[str, Any], base: Path, rows: Path, output: Path) -> dict[str, Any]:
    """The stage's config of a job."""
    trainer = {
        "max_length": job["length"], "per_device_train_batch_size": job["micro"], "per_device_eval_batch_size": 1,
        "gradient_checkpointing": job.get("checkpointing", True), "max_steps": job["steps"], "min_steps": 1,
        "precision": job["precision"], "logging_steps": 1, "save_steps": 1000, "optim": "adamw_torch",
        "learning_rate": 1e-4, "sequences_per_step": job["micro"],
    }  # fmt: skip
    values = {
        "stage": job["stage"], "output_dir": str(output), "tracking": "none",
        "model": {"base": str(base), "fallback": [], "quantization": job["quantization"],
                  "attn_implementation": "sdpa"},
        "data": {"train_files": [str(rows)], "val_files": [], "val_share": 0, "on_too_long": "error"},
        "trainer": trainer,
    }  # fmt: skip
    if job["stage"] == "sft":
        trainer |= {"packing": True, "tokens_per_step": job["micro"] * job["length"]}
    else:
        values |= {"sft_run": None, "prefer_chinese_ratio": None}
    return values


def loaded_config(job: dict[str, Any], work: Path):
    """The config of a job as the stage loads it; base and rows are made first."""
    import yaml

    from posttrain.config import load_config
    from posttrain.stages import TRAINING_STAGES

    base, place = make_base(job["shape"], work / job["shape"]), work / job["name"]
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    write_rows(job, base, place / "rows.jsonl")
    values = settings(job, base, place / "rows.jsonl", place / "run")
    (place / f"{job['stage']}.yaml").write_text(yaml.safe_dump(values))
    return load_config(TRAINING_STAGES[job["stage"]], place / f"{job['stage']}.yaml")


# ------------------------------------------------------------------ measuring


def timed_metrics():
    """callbacks.Metrics that also keeps the seconds of every step."""
    import torch

    from posttrain import callbacks

    class Timed(callbacks.Metrics):
        seconds: list[float] = []

        def now(self) -> float:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter()

        def on_step_begin(self, *args, **kwargs):
            super().on_step_begin(*args, **kwargs)
            self.began_step = self.now()

        def on_step_end(self, *args, **kwargs):
            Timed.seconds.append(self.now() - self.began_step)
            super().on_step_end(*args, **kwargs)

    return Timed


def measure(job: dict[str, Any], work: Path) -> dict[str, Any]:
    """Run a job with ours or with TRL's trainer: peak GiB (of the card; on a CPU, what the process grows by), tokens/s,
    losses. The median step after the first two counts: they choose kernels and fill the allocator.
    """
    import torch

    from bench.head import peak_mib
    from posttrain import callbacks

    loaded, on_card = loaded_config(job, work), torch.cuda.is_available()
    timed, plain = timed_metrics(), callbacks.Metrics
    callbacks.Metrics = timed
    gc.collect()
    if on_card:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = 0 if on_card else peak_mib(reset=True)
    try:
        (with_trl if job["trainer"] == "trl" else with_ours)(job, loaded, timed)
    finally:
        callbacks.Metrics = plain
    if on_card:
        peak = {"allocated": torch.cuda.max_memory_allocated() / 2**30,
                "reserved": torch.cuda.max_memory_reserved() / 2**30}  # fmt: skip
    else:
        peak = {"allocated": (peak_mib() - before) / 1024, "reserved": None}
    lines = [json.loads(line) for line in (loaded.config.output_dir / "metrics.jsonl").read_text().splitlines()]
    step = statistics.median(timed.seconds[2:])
    return peak | {"step_seconds": step, "tokens_per_second": tokens_per_step(job) / step,
                   "losses": [line["loss"] for line in lines if "loss" in line]}  # fmt: skip


def tokens_per_step(job: dict[str, Any]) -> int:
    """Tokens that one micro-batch holds, padding left out."""
    sides = 1 if job["stage"] == "sft" else 1 + REJECTED
    return round(job["micro"] * job["length"] * sides)


def with_ours(job: dict[str, Any], loaded, timed) -> None:
    import importlib

    importlib.import_module(f"scripts.train_{job['stage']}").main(loaded)


def with_trl(job: dict[str, Any], loaded, timed) -> None:
    """TRL's own trainer on the model, rows and arguments that ours gets."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from posttrain import arguments, rows, training, training_data
    from posttrain.data import sources
    from posttrain.schedule import plan_steps

    class Encoded(DPOTrainer):
        """The rows are token ids already."""

        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

    cfg, sft = loaded.config, job["stage"] == "sft"
    start = training.start_of(cfg)
    records = training_data.read_records(cfg, "sft" if sft else "pref", sources.read_training_file)
    made = (rows.sft_rows if sft else rows.preference_rows)(cfg, start, records)
    schedule, length = plan_steps(cfg.trainer, len(made.train)), cfg.trainer.max_length
    more = {"packing": True, "dataset_kwargs": {"skip_prepare_dataset": True}} if sft else {
        "beta": cfg.beta, "precompute_ref_log_probs": True}  # fmt: skip
    trainer = (SFTTrainer if sft else Encoded)(
        model=training.load_trainable(cfg, start),
        args=arguments.arguments(SFTConfig if sft else DPOConfig, cfg, schedule, False, max_length=length, **more),
        train_dataset=Dataset.from_list(made.train), processing_class=start.tokenizer,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.callback_handler.callbacks.insert(0, timed(cfg.output_dir / "metrics.jsonl", trainer))  # as ours has it
    trainer.train()


def matmul_rate() -> dict[str, float]:
    """bf16 matrix products of 8192: what this card reaches at best, in TFLOP/s."""
    import torch

    on_card = torch.cuda.is_available()
    size = 8192 if on_card else 512
    a = torch.randn(size, size, dtype=torch.bfloat16, device="cuda" if on_card else "cpu")
    for rounds in (5, 50 if on_card else 5):
        began = time.perf_counter()
        for _ in range(rounds):
            a @ a
        if on_card:
            torch.cuda.synchronize()
    return {"tflops": 2 * size**3 * rounds / (time.perf_counter() - began) / 1e12}


def machine() -> dict[str, Any]:
    """Card, driver, versions: what the figures hold for."""
    import platform
    import subprocess
    from importlib import metadata

    import torch

    facts = {"python": platform.python_version(), "cuda": torch.version.cuda, "cpu_threads": torch.get_num_threads()}
    facts |= {name: metadata.version(name) for name in ("torch", "transformers", "trl", "peft", "bitsandbytes")}
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        free, total = torch.cuda.mem_get_info()
        facts |= {"card": torch.cuda.get_device_name(0), "vram_gib": total / 2**30, "free_gib": free / 2**30,
                  "driver": subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()[0]}
    return facts


def predicted(job: dict[str, Any], vram_gib: float) -> dict[str, Any]:
    """The forecast of a job, on the CPU: bench/gpu.py asks for it in other processes while the card works."""
    from posttrain import training_forecast
    from posttrain.stages import TRAINING_STAGES

    nowhere = Path("/nowhere")
    cfg = TRAINING_STAGES[job["stage"]].model_validate(settings(job, nowhere, nowhere / "rows.jsonl", nowhere / "run"))
    began = time.perf_counter()
    forecast = training_forecast.predict(cfg, architecture(job["shape"]), vram_gib)
    return {"allocated": forecast.allocated, "reserved": forecast.reserved, "total": forecast.total,
            "error_share": forecast.error_share, "seconds": time.perf_counter() - began}  # fmt: skip


# ------------------------------------------------------------------ jobs in, results out


def answer(job: dict[str, Any], work: Path) -> dict[str, Any]:
    """The result of one job; {"error"} for one that failed. What it left on the card is freed."""
    import torch

    try:
        if job["do"] == "base":
            began = time.perf_counter()
            make_base(job["shape"], work / job["shape"])
            return {"seconds": time.perf_counter() - began}
        return {"machine": machine, "matmul": matmul_rate}.get(job["do"], lambda: measure(job, work))()
    except BaseException as error:  # a job that fails is a row of the table, not the end of the bench
        traceback.print_exc()
        said = (str(error) or type(error).__name__).splitlines()[0][:200]
        return {"error": "out of memory" if isinstance(error, torch.OutOfMemoryError) else said}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main() -> None:
    """Answer the jobs on standard input until it ends. argv: the working directory."""
    import torch

    work, results = Path(sys.argv[1]), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what trainers and libraries print goes to the log
    for line in sys.stdin:
        result = answer(json.loads(line), work)
        held = torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        results.write(json.dumps(result | {"ends": held > 0.1}) + "\n")
        results.flush()
        if held > 0.1:  # the next job would be measured on top of it
            return


if __name__ == "__main__":
    main()
