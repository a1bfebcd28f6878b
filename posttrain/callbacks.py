"""What happens around the trainer's steps: metrics, checkpoints by the clock, complete checkpoints, clean stops."""

import json
import math
import os
import resource
import shutil
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
from transformers import TrainerCallback

from posttrain import model as models
from posttrain.errors import CheckFailed
from posttrain.runs import main_process, write_json

COMPLETE = "complete.json"  # written into a checkpoint when everything else is there


class Metrics(TrainerCallback):
    """metrics.jsonl and one printed line per logging step and per validation, whatever else tracks the run."""

    def __init__(self, path: Path):
        self.path = path
        self.began = self.since = time.time()
        self.tokens, self.first_step = 0, 0

    def on_train_begin(self, args, state, control, **_):
        """A resumed run repeats the steps after its checkpoint: their old lines go."""
        if main_process():
            written = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
            whole = [line for line in written if line.endswith("}\n")]  # a kill can cut the last line
            kept = [line for line in whole if json.loads(line)["step"] <= state.global_step]
            self.path.write_text("".join(kept))
        self.began = self.since = time.time()
        self.first_step = state.global_step

    def on_log(self, args, state, control, logs=None, **_):
        if not main_process() or not logs or "train_runtime" in logs:
            return
        line = {"step": state.global_step, "epoch": round(state.epoch or 0, 4)}
        line |= {k: round(v, 6) if isinstance(v, float) else v for k, v in logs.items() if k != "epoch"}
        if "num_tokens" in logs and "loss" in logs:
            now = time.time()
            line["tokens_per_second"] = round((logs["num_tokens"] - self.tokens) / max(now - self.since, 1e-9), 1)
            self.since, self.tokens = now, logs["num_tokens"]
        line |= peak_memory()
        with open(self.path, "a") as out:
            out.write(json.dumps(line) + "\n")
        print(self._shown(line, state.max_steps), flush=True)

    def _shown(self, line: dict, steps: int) -> str:
        """A line for the terminal: where the run is, how it learns, how fast, how much memory, how long still."""
        at = f"step {line['step']:>{len(str(steps))}}/{steps}"
        prefix = "eval_" if "eval_loss" in line else ""
        names = {"loss": "loss", "rewards/accuracies": "pref acc", "rewards/margins": "margin", "grad_norm": "grad"}
        parts = [f"{'validation ' if prefix and name == 'loss' else ''}{text} {line[prefix + name]:.4g}"
                 for name, text in names.items() if prefix + name in line]  # fmt: skip
        if not prefix:
            done = line["step"] - self.first_step
            left = (time.time() - self.began) / max(done, 1) * (steps - line["step"])
            memory = line.get("reserved_gib", line["rss_gib"])
            parts += [f"lr {line.get('learning_rate', 0):.2e}", f"{line.get('tokens_per_second', 0):,.0f} tok/s",
                      f"{memory:.1f} GiB", f"left {timedelta(seconds=round(left))}"]  # fmt: skip
        return f"  {at}  " + "  ".join(parts)


class Checkpoints(TrainerCallback):
    """Saves by the clock, and marks a checkpoint as complete only when it is."""

    def __init__(self, minutes: float, model):
        self.minutes, self.model, self.last = minutes, model, time.time()

    def on_step_end(self, args, state, control, **_):
        # A save by the clock is for resuming only: it is not evaluated, so timing never decides which one is best.
        if time.time() - self.last > 60 * self.minutes:
            control.should_save = True

    def on_evaluate(self, args, state, control, **_):
        models.release_4bit(self.model)

    def on_save(self, args, state, control, **_):
        self.last = time.time()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if main_process() and folder.is_dir():
            sizes = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.name != COMPLETE}
            write_json(folder / COMPLETE, {"step": state.global_step, "files": sizes})


class CleanStop(TrainerCallback):
    """Ctrl-C and SIGTERM end the run at the next step with a checkpoint; a second one ends it at once."""

    def __init__(self):
        self.asked = False

    def on_train_begin(self, args, state, control, **_):
        def ask(signum, frame):
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            print("\nstopping: the current step is finished and saved first (again to stop at once)", flush=True)

        self.previous = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def on_step_end(self, args, state, control, **_):
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class StopOnNan(TrainerCallback):
    """A loss, gradient or weight that is not a number ends the run (4); no such checkpoint counts as complete."""

    causes = "usual causes: fp16 (set trainer.precision=bf16 or fp32), a learning rate too high"

    def on_log(self, args, state, control, logs=None, **_):
        # With fp16 the loss scaler finds its scale by steps whose gradients overflow: those it skips by itself.
        names = ("loss", "eval_loss") if args.fp16 else ("loss", "eval_loss", "grad_norm")
        watched = {k: v for k, v in (logs or {}).items() if k in names}
        bad = ", ".join(f"{k} is {v}" for k, v in watched.items() if not math.isfinite(v))
        if bad:
            raise CheckFailed(f"step {state.global_step}: {bad}; the checkpoints before it are kept\n  {self.causes}")

    def on_save(self, args, state, control, model=None, **_):
        weights = [p for p in model.parameters() if p.requires_grad]
        if not all(torch.isfinite(p).all() for p in weights):
            raise CheckFailed(f"step {state.global_step}: the adapter holds nan or inf; the checkpoints before it are "
                              f"kept\n  {self.causes}")  # fmt: skip


def peak_memory() -> dict[str, float]:
    """Peak GiB so far: of the process, and of the card as the allocator counts it."""
    peak = {"rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)}
    if torch.cuda.is_available():
        peak["allocated_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        peak["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
    return peak


def newest_complete(output_dir: Path) -> Path | None:
    """The newest checkpoint that was written to its end. Newer ones that were not are removed, and said."""
    found = sorted((int(p.name.rpartition("-")[2]), p) for p in output_dir.glob("checkpoint-*")
                   if p.is_dir() and p.name.rpartition("-")[2].isdigit())  # fmt: skip
    for _, folder in reversed(found):
        if is_complete(folder):
            return folder
        if main_process():
            print(f"{folder.name}: not written to its end, left out", flush=True)
            shutil.rmtree(folder)
    return None


def is_complete(folder: Path) -> bool:
    """Whether every file named in the checkpoint's mark is there with its size, optimiser state included."""
    try:
        files = json.loads((folder / COMPLETE).read_text())["files"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return False
    state = {"optimizer.pt", "scheduler.pt", "trainer_state.json"}
    return state <= set(files) and all(
        (folder / name).is_file() and os.path.getsize(folder / name) == size for name, size in files.items()
    )
