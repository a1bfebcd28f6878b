"""Several processes through the real launch commands: equal to one process, or refused where they are not as asked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, chats, pairs, run_command, write_rows

from posttrain import launch
from posttrain.errors import UserFault

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


def settings(stage: str, base: Path, output: Path, **values) -> list[str]:
    """A tiny run without dropout, so that two processes differ from one in nothing but the order of sums."""
    kind = "sft" if stage == "sft" else "pref"
    data = output.parent / "data"
    if not data.exists():
        write_rows(data / "sft_train.jsonl", chats(60))
        write_rows(data / "pref_train.jsonl", pairs(60))
    values = {
        "hardware": "cpu", "model.base": base, "output_dir": output, "data.train_files": f"[{data}/{kind}_train.jsonl]",
        "data.val_files": "[]", "trainer.max_length": 96, "trainer.logging_steps": 1, "trainer.max_steps": 6,
        "trainer.per_device_train_batch_size": 1, "trainer.learning_rate": 5e-3, "tracking": "none",
        "trainer.sequences_per_step": 4, "lora.dropout": 0.0,
        **({"trainer.packing": "false"} if stage == "sft" else {"sft_run": "null"}), **values,
    }  # fmt: skip
    return ["-m", f"scripts.train_{stage}", *(x for k, v in values.items() for x in ("--set", f"{k}={v}"))]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_two_processes_equal_one(stage, base, tmp_path):
    """DDP over gloo through accelerate launch with ddp.yaml: same loss at every step, same adapter."""
    from safetensors.torch import load_file

    one = run_command(*settings(stage, base, tmp_path / "one"))
    assert one.returncode == 0, one.stderr
    ddp = [*ACCELERATE[1:], "--config_file", "configs/accelerate/ddp.yaml", "--main_process_port", "0"]
    two = run_command(*ddp, *settings(stage, base, tmp_path / "two"), ACCELERATE_USE_CPU="true")
    assert two.returncode == 0, two.stderr
    assert json.loads((tmp_path / "two/manifest.json").read_text())["schedule"]["world"] == 2
    curves = [[line["loss"] for line in map(json.loads, (tmp_path / d / "metrics.jsonl").read_text().splitlines())
               if "loss" in line] for d in ("one", "two")]  # fmt: skip
    assert len(curves[0]) == 6 and curves[1] == pytest.approx(curves[0], abs=2e-5)
    a, b = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("one", "two"))
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-4


@pytest.mark.parametrize("args, asked, found", [
    pytest.param(["--cpu", "--num_processes", "2"], "2 processes, no sharding", "1 process", id="alone, not two"),
    pytest.param(["--config_file", "configs/accelerate/fsdp2.yaml"], "2 processes, FSDP", "no card", id="DDP, no FSDP2",
                 marks=pytest.mark.slow),
])  # fmt: skip
def test_a_launch_that_silently_does_something_else_is_refused(args, asked, found, base, tmp_path):
    """Both go on without a word in accelerate 1.15: alone, and without sharding."""
    command = [*ACCELERATE, *args, *settings("sft", base, tmp_path / "sft"), "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    said = done.stdout + done.stderr
    assert done.returncode == 1, said  # accelerate makes 1 of our 2
    assert f"asked for {asked}" in said and f"there is {found}" in said and "choose:" in said
    assert "accelerate.commands.launch" in said and not (tmp_path / "sft").exists()


@pytest.mark.parametrize("command, asked", [
    ("accelerate launch --config_file configs/accelerate/ddp.yaml -m scripts.train_sft", (2, "ddp", 0)),
    ("accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes 4 x.py", (4, "ddp", 0)),
    ("accelerate launch --config_file configs/accelerate/ddp_multinode.yaml --machine_rank 1 x.py", (16, "ddp", 0)),
    ("accelerate launch --config_file configs/accelerate/zero3.yaml x.py", (2, "deepspeed", 3)),
    ("accelerate launch --config_file configs/accelerate/single.yaml x.py", (1, "none", 0)),
    ("accelerate launch --use_fsdp --fsdp_version 2 --num-processes 8 x.py", (8, "fsdp", 0)),
    ("python -m accelerate.commands.launch --multi_gpu --num_processes 3 x.py --num_processes 5", (3, "ddp", 0)),
])  # fmt: skip
def test_what_a_command_line_asks_for(command, asked, monkeypatch):
    monkeypatch.setattr(launch, "launcher_command", lambda: ["/usr/bin/python", *command.split()])
    wish = launch.asked()
    assert (wish.processes, wish.sharding, wish.zero_stage) == asked


def test_torchrun_is_compared_with_the_process_group(monkeypatch):
    """WORLD_SIZE is what torchrun was asked for; the trainer must have come up with as many."""
    class Accelerator:
        num_processes, distributed_type = 1, "DistributedType.NO"

    class Trainer:
        accelerator = Accelerator()

    monkeypatch.setattr(launch, "launcher_command", lambda: [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    launch.check_processes()
    with pytest.raises(UserFault, match="asked for 2 processes, no sharding, and there is 1 process, NO"):
        launch.check_trainer(Trainer)


def test_four_bits_are_not_cut_over_processes(monkeypatch):
    from posttrain.blocks import Model, Training

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    launch.check_together(Training())
    with pytest.raises(UserFault, match="model.quantization: nf4 .* ddp.yaml"):
        launch.check_together(Training(model=Model(quantization="nf4")))


def test_machines_without_a_shared_disk_are_refused(monkeypatch):
    """Process 1 sees no checkpoint: it would start anew beside a process that goes on."""
    group = torch.distributed
    monkeypatch.setattr(group, "is_initialized", lambda: True)
    monkeypatch.setattr(group, "get_world_size", lambda: 2)
    monkeypatch.setattr(group, "all_gather_object", lambda out, own: out.__setitem__(slice(None), [own, other]))
    other = "checkpoint-8"
    launch.check_same_start(Path("run/checkpoint-8"))
    other = "the beginning"
    with pytest.raises(UserFault, match="process 0: checkpoint-8, process 1: the beginning.* disk that all machines"):
        launch.check_same_start(Path("run/checkpoint-8"))
