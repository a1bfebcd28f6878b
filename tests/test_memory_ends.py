"""Out of memory, provoked inside real runs of a tiny model; the longest batch first, with the same bits at the end."""

import json
import random

import numpy as np
import pytest
import torch
from conftest import chats, pairs, run_here, write_rows

from posttrain import callbacks, cli, longest_batch, losses, out_of_memory, sizing
from posttrain.runs import sha256
from posttrain.stages import TrainDpo, TrainSft
from scripts import train_dpo, train_sft


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = chats(40) + [{**row, "messages": row["messages"] * 2} for row in chats(3, seed=5)]
    write_rows(folder / "sft_train.jsonl", rows)
    write_rows(folder / "sft_val.jsonl", chats(6, seed=1))
    write_rows(folder / "pref_train.jsonl", pairs(20))
    write_rows(folder / "pref_val.jsonl", pairs(6, seed=1))
    return folder


def run(stage: str, data, base, output, **values):
    """The stage's real command in this process: 4 steps, validated twice, with dropout."""
    kind, module, cls = ("sft", train_sft, TrainSft) if stage == "sft" else ("pref", train_dpo, TrainDpo)
    values = {"model.base": base, "hardware": "cpu", "output_dir": output, "tracking": "none",
              "data.train_files": f"[{data}/{kind}_train.jsonl]", "data.val_files": f"[{data}/{kind}_val.jsonl]",
              "trainer.max_length": 96, "trainer.per_device_train_batch_size": 2, "trainer.max_steps": 4,
              "trainer.logging_steps": 1, "trainer.save_steps": 2, "lora.dropout": 0.1, **values}  # fmt: skip
    step = {"trainer.packing": "false", "trainer.sequences_per_step": 4}
    values |= step if stage == "sft" else {"sft_run": "null", "trainer.sequences_per_step": 4}
    args = [x for k, v in values.items() for x in ("--set", f"{k}={v}")]
    return run_here(cls, module.plan, module.main, "--config", f"configs/{stage}.yaml", *args)


# ------------------------------------------------------------------ out of memory

ERRORS = {
    "the CPU allocator": lambda: torch.empty(2**55),
    "the card": lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")),
    "Python": lambda: (_ for _ in ()).throw(MemoryError()),
}


def fails_at(monkeypatch, number: int, error) -> None:
    """The head's call of this number makes the error instead."""
    calls, real = [], losses.token_logps

    def token_logps(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            error()
        return real(*args, **kwargs)

    monkeypatch.setattr(losses, "token_logps", token_logps)


def test_memory_that_ends_in_training_is_explained(data, base, tmp_path, monkeypatch):
    """With the traced forecast."""
    fails_at(monkeypatch, 4, ERRORS["the CPU allocator"])  # two micro-batches a step: the second step's second one
    done = run("sft", data, base, tmp_path / "sft")
    said = done.stderr
    assert done.returncode == 3 and "Traceback" not in said, said
    assert "out of memory in step 2 of 4" in said and "can't allocate memory" in said and "the process held" in said
    assert "forecast: " in said and "in this order" in said and "per_device_train_batch_size: 2 -> 1" in said, said
    status = json.loads((tmp_path / "sft/status.json").read_text())
    assert status["state"] == "failed" and status["exit_code"] == 3 and "forecast: " in status["message"]


@pytest.mark.parametrize("source", ["the card", "Python"])
def test_even_without_a_forecast(source, data, base, tmp_path, monkeypatch):
    def predict(*_, **__):
        raise MemoryError

    monkeypatch.setattr("posttrain.training_forecast.predict", predict)
    fails_at(monkeypatch, 1, ERRORS[source])
    done = run("sft", data, base, tmp_path / "sft")
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    assert "out of memory in step 1 of 4" in done.stderr and "no forecast: MemoryError" in done.stderr


def test_memory_that_ends_in_validation_says_so_and_the_longest_first_says_it_early(data, base, tmp_path, monkeypatch):
    real = losses.token_logps

    def fails(*args, **kwargs):
        return real(*args, **kwargs) if torch.is_grad_enabled() else torch.empty(2**55)

    monkeypatch.setattr(losses, "token_logps", fails)
    monkeypatch.setattr("posttrain.training_forecast.predict", lambda *_, **__: 1 / 0)
    done = run("sft", data, base, tmp_path / "sft")
    assert done.returncode == 3 and "out of memory in the validation before step 3 of 4" in done.stderr, done.stderr
    early = run("sft", data, base, tmp_path / "early", **{"trainer.probe_longest": "true"})
    assert early.returncode == 3 and "the longest validation batch" in early.stderr, early.stderr
    assert "step 1/4" not in early.stdout, "before the first step, not after an hour"


def test_what_counts_as_out_of_memory():
    try:
        torch.empty(2**55)
    except RuntimeError as error:
        assert cli.is_out_of_memory(error)
    assert cli.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert cli.is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not cli.is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not cli.is_out_of_memory(ValueError("out of memory"))


@pytest.fixture
def card(monkeypatch):
    """What a card of 8 GiB would tell: 6 allocated, 6.5 reserved, 0.3 of context, 1.2 free."""
    gib = 2**30
    for name, value in {"is_available": True, "mem_get_info": (int(1.2 * gib), 8 * gib), "memory_allocated": 6 * gib,
                        "max_memory_allocated": 6.25 * gib, "memory_reserved": int(6.5 * gib),
                        "max_memory_reserved": 6.75 * gib}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)


def test_what_a_card_holds_is_logged_and_told(card):
    peak = callbacks.peak_memory()
    assert peak["allocated_gib"] == 6.25 and peak["reserved_gib"] == 6.75 and peak["context_gib"] == 0.3
    held = out_of_memory._held(None)
    assert held.limit == 8.0 and len(held.lines) == 1
    for number in ("allocated 6.00", "peak 6.25", "reserved 6.50", "other programs 0.30", "free 1.20", "of 8.00 GiB"):
        assert number in held.lines[0]


def test_other_programs_on_the_card_are_pointed_at(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 4 * 2**30)
    assert "nvidia-smi" in out_of_memory._held(None).lines[1]


# ------------------------------------------------------------------ the longest batch first


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_adapter_is_the_same_bits_with_and_without(stage, data, base, tmp_path):
    hashes, lines = [], []
    for probe in ("true", "auto"):
        output = tmp_path / probe
        done = run(stage, data, base, output, **{"trainer.probe_longest": probe})
        assert done.returncode == 0, done.stderr
        assert ("longest first: a batch of 2 x" in done.stdout) == (probe == "true"), "on a CPU auto is off"
        hashes.append(sha256(output / "adapter_model.safetensors"))
        logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        lines.append([{k: v for k, v in line.items() if k in ("step", "loss", "eval_loss", "grad_norm", "num_tokens")}
                      for line in logged])  # fmt: skip
    assert hashes[0] == hashes[1] and lines[0] == lines[1]


def test_the_longest_rows_are_found():
    from datasets import Dataset

    rows = [{"input_ids": [0] * n, "seq_lengths": [n - 1, 1]} for n in (3, 9, 4, 7)]
    for some in (rows, Dataset.from_list(rows)):
        assert sizing.widths_of(longest_batch.longest(some, 2)) == [9, 7]
        assert sizing.conversations_of(some) == [2, 1, 8, 1, 3, 1, 6, 1]
    two = [{"prompt_ids": [0] * p, "chosen_ids": [0] * c, "rejected_ids": [0] * r}
           for p, c, r in ((1, 1, 1), (4, 1, 5))]  # fmt: skip
    assert sizing.widths_of(Dataset.from_list(two)) == sizing.widths_of(two) == [2, 9]
    assert longest_batch.wanted(True) and not longest_batch.wanted(False)
    assert longest_batch.longest([], 4) == [] == sizing.widths_of(Dataset.from_list([]))


def test_random_states_counters_and_mode_are_put_back():
    class Trainer:
        model, _metrics, num_tokens = torch.nn.Linear(2, 2), {"train": [1]}, 7

    trainer = Trainer()
    trainer.model.eval()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with longest_batch._nothing_happened(trainer):
        torch.rand(3), random.random(), np.random.rand(3)
        trainer._metrics["train"].append(2)
        trainer.num_tokens += 5
        trainer.model.train()
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
    assert trainer._metrics == {"train": [1]} and trainer.num_tokens == 7 and not trainer.model.training
