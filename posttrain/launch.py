"""What a launch asked for (processes, machines, sharding) against what it got: a difference ends the run (2).

accelerate 1.15 and torch 2.13 go on without a word where `accelerate launch --cpu --num_processes 2` starts one
process, where `fsdp2.yaml` without a card gives plain DDP, or where two processes each train the whole model alone.
"""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import TrainerCallback

from posttrain.blocks import Training
from posttrain.config import in_project, read_yaml
from posttrain.errors import UserFault

KINDS = {"MULTI_GPU": "ddp", "MULTI_CPU": "ddp", "FSDP": "fsdp", "DEEPSPEED": "deepspeed", "NO": "none"}


@dataclass(frozen=True)
class Asked:
    """What the launch asked for. None where it left the choice to accelerate."""

    processes: int | None
    sharding: str  # none | ddp | fsdp | deepspeed
    zero_stage: int
    command: str = ""

    def __str__(self) -> str:
        kind = {"none": "no sharding", "ddp": "DDP", "fsdp": "FSDP", "deepspeed": f"ZeRO-{self.zero_stage}"}
        count = "any number of" if self.processes is None else self.processes
        return f"{count} process{'' if self.processes == 1 else 'es'}, {kind[self.sharding]}"


def asked() -> Asked:
    """Read from the command line of the launcher above this process, and from what it left in the environment."""
    command = launcher_command()
    by_command = _of_accelerate(command) if _launch_at(command) else Asked(None, "none", 0)
    processes, sharding, stage = by_command.processes, by_command.sharding, by_command.zero_stage
    if "WORLD_SIZE" in os.environ:  # torchrun, or a launcher that is not above us on this machine
        processes = processes or int(os.environ["WORLD_SIZE"])
    if _is_on("ACCELERATE_USE_FSDP"):
        sharding = "fsdp"
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        sharding, stage = "deepspeed", int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage))
    return Asked(processes, sharding, stage, " ".join(command))


def sharded() -> bool:
    """Whether the base is to be cut over the processes (FSDP, ZeRO-3), so that none should hold it whole."""
    wish = asked()
    return wish.sharding == "fsdp" or (wish.sharding == "deepspeed" and wish.zero_stage == 3)


def _is_on(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def launcher_command() -> list[str]:
    """The command line of the nearest `accelerate launch` or torchrun above this process; [] if there is none."""
    try:
        parents = psutil.Process().parents()
    except psutil.Error:
        return []
    for parent in parents:
        try:
            words = parent.cmdline()
        except psutil.Error:
            continue
        names = [os.path.basename(word) for word in words[:3]]
        of_accelerate = "accelerate" in names and "launch" in words[:4] or "accelerate.commands.launch" in words[:4]
        if of_accelerate or "torchrun" in names or "torch.distributed.run" in words[:4]:
            return words
    return []


def _launch_at(command: list[str]) -> int:
    """Where the arguments of `accelerate launch` begin in a command line; 0 if it is none."""
    found = (i + 1 for i, word in enumerate(command[:4]) if word in ("launch", "accelerate.commands.launch"))
    return next(found, 0)


def _of_accelerate(command: list[str]) -> Asked:
    """What `accelerate launch ...` asked for, by accelerate's own parser and the config file that it takes."""
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command_parser

    given, _ = launch_command_parser().parse_known_args(command[_launch_at(command) :])
    file = given.config_file or (default_config_file if os.path.isfile(default_config_file) and not given.cpu else None)
    try:
        config = read_yaml(in_project(Path(file))) if file else {}
    except UserFault:
        config = {}  # accelerate has read it; what it made of it stands in the environment
    flags = {"ddp": given.multi_gpu, "fsdp": given.use_fsdp, "deepspeed": given.use_deepspeed}
    sharding = next((kind for kind, on in flags.items() if on), None)
    sharding = sharding or KINDS.get(str(config.get("distributed_type", "NO")), "none")
    processes = given.num_processes or config.get("num_processes")
    stage = given.zero_stage or (config.get("deepspeed_config") or {}).get("zero_stage") or 2
    return Asked(processes, sharding, int(stage) if sharding == "deepspeed" else 0)


# ------------------------------------------------------------------ the checks


def check_processes() -> None:
    """UserFault where the launch asked for another number of processes than there are. Needs no process group, so it
    stands before everything slow, in the dry run too."""
    wish, found = asked(), int(os.environ.get("WORLD_SIZE", "1"))
    if wish.processes not in (None, 0, found):
        raise UserFault(_difference(wish, f"{found} process{'es' if found > 1 else ''}"))
    if wish.sharding == "fsdp" and not torch.cuda.is_available():
        raise UserFault(_difference(wish, "no card; accelerate would go on with plain DDP"))
    if wish.sharding == "deepspeed" and not find_spec("deepspeed"):
        raise UserFault(_difference(wish, "no package deepspeed: pip install -r requirements-zero3.txt"))


def check_together(cfg: Training) -> None:
    """UserFault for what does not go with a base that is cut over processes. All faults at once."""
    if not sharded():
        return
    kind, faults = asked(), []
    if cfg.model.quantization != "none":
        faults.append(f"model.quantization: {cfg.model.quantization} weights are not cut over processes here ({kind}); "
                      "choose model.quantization=none, or ddp.yaml (a 4-bit base on each card)")  # fmt: skip
    for name in ("kl_to_base", "ewc"):
        if getattr(cfg, name, None):
            faults.append(f"{name}: reads weights of the whole base, which no process has ({kind}); choose "
                          f"{name}=null, or ddp.yaml")  # fmt: skip
    if faults:
        raise UserFault("\n".join(faults))


def check_trainer(trainer) -> None:
    """UserFault where the trainer's accelerator has other processes or another sharding than the launch asked for."""
    wish, accelerator = asked(), trainer.accelerator
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    found = f"{accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''}, {kind}"
    if wish.processes not in (None, 0, accelerator.num_processes):
        raise UserFault(_difference(wish, found))
    if wish.sharding in ("fsdp", "deepspeed") and KINDS.get(kind) != wish.sharding:
        raise UserFault(_difference(wish, found))


def check_same_start(checkpoint: Path | None) -> None:
    """UserFault where the processes would go on from different checkpoints: machines without a shared disk. DDP would
    start all from the weights of the first, with other optimiser states and other rows."""
    if not torch.distributed.is_initialized():
        return
    seen: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(seen, checkpoint.name if checkpoint else "the beginning")
    if len(set(seen)) > 1:
        listed = ", ".join(f"process {rank}: {start}" for rank, start in enumerate(seen))
        raise UserFault(f"output_dir: the processes do not see the same checkpoints ({listed}); put it on a disk that "
                        "all machines share, under the same path")  # fmt: skip


class CheckSharding(TrainerCallback):
    """Before the first step: whether each process really holds only its share of the weights."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **_):
        here, whole = held(self.trainer.model_wrapped)
        processes = self.trainer.accelerator.num_processes
        # Parameters too small to cut (ZeRO-3 keeps those under a threshold) and padding: half as much again is allowed.
        if sharded() and processes > 1 and here > 1.5 * whole / processes:
            raise UserFault(_difference(asked(), f"{processes} processes, each with {here / whole:.0%} of the weights"))
        if sharded() and args.process_index == 0:
            print(f"sharding: this process holds {here / whole:.0%} of {whole:,} weights", flush=True)


def held(model: nn.Module) -> tuple[int, int]:
    """(weights that this process holds, weights of the model), counted in elements, under fully_shard and ZeRO-3."""
    here = whole = 0
    for parameter in model.parameters():
        if hasattr(parameter, "ds_numel"):  # ZeRO-3
            whole, here = whole + parameter.ds_numel, here + parameter.ds_tensor.numel()
        else:
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            whole, here = whole + parameter.numel(), here + local.numel()
    return here, whole


def _difference(wish: Asked, found: str) -> str:
    remedy = ("without a card only DDP works: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 "
              "-m scripts.train_sft ...; or plain python for one process") if not torch.cuda.is_available() else (
              "see configs/accelerate/: ddp.yaml, fsdp2.yaml, zero3.yaml with num_processes = the number of cards; "
              "or plain python for one process")  # fmt: skip
    launched = f"\n    command: {wish.command}" if wish.command else ""
    return (f"the launch asked for {wish}, and there is {found}: training on would not be what was asked for{launched}"
            f"\n    choose: {remedy}")  # fmt: skip
