"""Where curves go beside metrics.jsonl, and what the card does meanwhile.

Settings of a tracker are its own environment variables (WANDB_PROJECT, MLFLOW_TRACKING_URI ...), which win over the
defaults here; so are its tokens, which never stand in a config.
"""

import os
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import TrainingArguments

from posttrain import hub
from posttrain.config import ROOT
from posttrain.errors import UserFault

PROJECT = "posttrain"
# As tried with transformers 5.23 (tensorboard is among the requirements).
TRIED = {"mlflow": "3.17.2", "wandb": "0.31.0", "swanlab": "0.10.3", "trackio": "0.43.0"}


def check_packages(trackers: list[str]) -> None:
    """UserFault with the pip command for trackers whose package is not installed. All of them at once."""
    missing = [name for name in trackers if name != "none" and not find_spec(name)]
    if missing:
        install = " ".join(f"{name}=={TRIED[name]}" if name in TRIED else name for name in missing)
        raise UserFault(f"tracking: {', '.join(missing)} not installed\n    choose: pip install {install}, "
                        "or tracking=tensorboard or none; metrics.jsonl is written in any case")  # fmt: skip


def prepare(trackers: list[str], output_dir: Path) -> list[str]:
    """The names for transformers' report_to, after the environment has got the defaults that nobody set.

    Everything lies below outputs/. Nothing goes over a network with HF_HUB_OFFLINE=1, or where there is no login; a
    later `wandb sync` or `swanlab sync` brings it up. Trackio and MLflow (SQLite) are local unless their own variables
    name a server.
    """
    check_packages(trackers)
    home = Path.home()
    netrc = next((f.read_text(errors="replace") for f in (home / ".netrc", home / "_netrc") if f.is_file()), "")
    wandb_login = os.environ.get("WANDB_API_KEY") or "api.wandb.ai" in netrc
    defaults = {
        "mlflow": {"MLFLOW_TRACKING_URI": f"sqlite:///{ROOT / 'outputs' / 'mlflow.db'}",
                   "MLFLOW_EXPERIMENT_NAME": PROJECT},
        "wandb": {"WANDB_PROJECT": PROJECT, "WANDB_DIR": str(output_dir),
                  "WANDB_MODE": "online" if wandb_login and not hub.offline() else "offline"},
        "trackio": {"TRACKIO_DIR": str(ROOT / "outputs" / "trackio")},
    }  # fmt: skip
    for name in trackers:
        for key, value in defaults.get(name, {}).items():
            os.environ.setdefault(key, value)
    return [name for name in trackers if name != "none"]


def begin(args: TrainingArguments) -> None:
    """Start SwanLab before transformers does: its callback asks for a run that may not be there, which SwanLab 0.10
    answers with an error. The other trackers are started by their callbacks."""
    if "swanlab" in args.report_to and args.process_index == 0:
        import swanlab

        login = os.environ.get("SWANLAB_API_KEY") or (Path.home() / ".swanlab").is_dir()
        mode = os.environ.get("SWANLAB_MODE") or ("online" if login and not hub.offline() else "offline")
        logs = os.environ.get("SWANLAB_LOG_DIR") or f"{args.output_dir}/swanlog"
        swanlab.init(project=args.project, name=args.run_name, log_dir=logs, mode=mode)


# ------------------------------------------------------------------ the card


class CardSampler:
    """Utilisation and memory of this process's card, sampled once a second in a thread of its own.

    `read` gives (share of the last second in which a kernel ran, bytes in use on the card by all programs); None where
    there is no card or nvidia-ml-py cannot read it.
    """

    def __init__(self, read: Callable[[], tuple[float, int]] | None, seconds: float = 1.0):
        self.read, self.seconds = read, seconds
        self.samples: list[tuple[float, int]] = []
        self.ended = threading.Event()
        if read:
            threading.Thread(target=self._sample, name="card", daemon=True).start()

    def _sample(self) -> None:
        while not self.ended.wait(self.seconds):
            try:
                self.samples.append(self.read())
            except Exception:  # the driver is gone, or the card fell off the bus: the training will say so itself
                return

    def since_last(self) -> dict[str, float]:
        """{gpu_utilization: mean share 0 to 1, gpu_used_gib: largest} since the last call; {} without samples."""
        samples, self.samples = self.samples, []
        if not samples:
            return {}
        return {"gpu_utilization": round(sum(share for share, _ in samples) / len(samples), 3),
                "gpu_used_gib": round(max(used for _, used in samples) / 2**30, 3)}  # fmt: skip

    def end(self) -> None:
        self.ended.set()


def card_reader() -> Callable[[], tuple[float, int]] | None:
    """Reads the card of this process through NVML; None where there is none, or no nvidia-ml-py."""
    if not torch.cuda.is_available():
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        # By its UUID: NVML counts all cards of the machine, torch only those of CUDA_VISIBLE_DEVICES.
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

        def read() -> tuple[float, int]:
            return pynvml.nvmlDeviceGetUtilizationRates(card).gpu / 100, pynvml.nvmlDeviceGetMemoryInfo(card).used

        read()
    except Exception:  # NVMLError of many kinds: no rights, a slice of a card (MIG), an old driver
        return None
    return read
