"""The longest batch first: an out-of-memory error that would come late in a run comes before its first step."""

import copy
import heapq
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import TrainerCallback

from posttrain import model as models
from posttrain.runs import main_process
from posttrain.sizing import Sizing, widths_of

# What our trainers and TRL's count while they compute a loss: the probe must not be counted.
COUNTERS = ("sums", "num_tokens", "num_cells", "eval_sums", "_metrics", "_total_train_tokens")


class LongestFirst(TrainerCallback):
    """Before the first step: forward and backward of the longest micro-batch, then validation of the longest rows.

    Its gradients are thrown away and the random state is put back, so that the run's result is the same bits with and
    without it (tests/test_memory_ends.py; two processes under DDP gave the same bits too, docs/LOG.md). Room for the
    optimiser's states, which the first step will make, is held meanwhile.
    """

    def __init__(self, trainer, sizing: Sizing):
        self.trainer, self.sizing = trainer, sizing

    def on_train_begin(self, args, state, control, **_):
        trainer = self.trainer
        if trainer.is_deepspeed_enabled:  # its engine keeps gradients of its own, which cannot be thrown away from here
            print("  longest first: left out under DeepSpeed", flush=True)
            return
        rows = longest(trainer.train_dataset, args.per_device_train_batch_size)
        val = longest(trainer.eval_dataset or [], args.per_device_eval_batch_size)
        widest, widest_val = max(widths_of(rows)), max(widths_of(val), default=0)
        with _nothing_happened(trainer):
            self.sizing.at = f"the longest batch ({widest} tokens), before the first step"
            states = _room_for_states(trainer)
            _train(trainer, rows)
            del states
            if val:
                self.sizing.at = f"the longest validation batch ({widest_val} tokens), before the first step"
                trainer.evaluation_loop(trainer.get_eval_dataloader(val), "longest", prediction_loss_only=True)
                models.release_4bit(trainer.model)
        self.sizing.at = ""
        if main_process():
            also = f", and in validation one of {widest_val}" if val else ""
            print(f"  longest first: a batch of {len(rows)} x {widest} tokens went through{also}", flush=True)


def wanted(probe_longest: bool | str) -> bool:
    """`auto` is on where a card is: on a CPU it would cost a step's time."""
    return torch.cuda.is_available() if probe_longest == "auto" else bool(probe_longest)


def longest(rows, count: int) -> list[dict]:
    """The `count` longest rows of a list or a datasets.Dataset."""
    widths = widths_of(rows)
    return [rows[i] for i in heapq.nlargest(count, range(len(widths)), key=widths.__getitem__)]


def _train(trainer, rows: list[dict]) -> None:
    """One micro-batch through the trainer's own step."""
    batch = trainer.data_collator(rows)
    inputs = trainer._prepare_inputs(batch)
    items = trainer._get_num_items_in_batch([inputs], trainer.args.device)
    trainer.training_step(trainer.model_wrapped, inputs, items)
    trainer.model_wrapped.zero_grad(set_to_none=True)


def _room_for_states(trainer) -> torch.Tensor | None:
    """Memory as large as the optimiser's states will be, while they are not made. Paged states can leave the card."""
    name = str(trainer.args.optim)
    if "paged" in name or not torch.cuda.is_available() or (trainer.optimizer and trainer.optimizer.state):
        return None
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    size = sum(p.numel() * (2 if "8bit" in name else 2 * p.element_size()) for p in trained)
    return torch.empty(size, dtype=torch.uint8, device=trainer.args.device)


@contextmanager
def _nothing_happened(trainer) -> Iterator[None]:
    """Put back the random states of all generators, the trainer's counters and the model's mode."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cards = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    counters = {name: copy.deepcopy(getattr(trainer, name)) for name in COUNTERS if hasattr(trainer, name)}
    training = trainer.model.training
    yield  # an error ends the run: there is nothing to put back for
    for name, value in counters.items():
        setattr(trainer, name, value)
    trainer.model.train(training)
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cards:
        torch.cuda.set_rng_state_all(cards)
        torch.cuda.empty_cache()
