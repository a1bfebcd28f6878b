"""
Times and memory of answers, measured on this machine: rows of cost.jsonl, which cost.py counts up.

Every model answers the same prompts, one at a time (latency) and then in batches (throughput). The models take turns,
the second round in reverse order, so that other work on the machine and a card that grows warm hit all of them alike.
Each turn begins with an answer that is not counted: the first one pays for kernels and buffers.
"""

import contextlib
import os
import re
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor

from posttrain.blocks import Generation
from posttrain.evals import generate, models
from posttrain.evals.models import Lineup
from posttrain.stages import InferCompare

ROUNDS = 2  # A B C, then C B A: a steady drift of the machine's speed cancels out
WARM_UP_TOKENS = 8
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class FirstScores(LogitsProcessor):
    """Notes when the scores of the first token are there. Not a streamer: transformers 5.23 hands tokens to a streamer
    one step late where there is a card, so that the host need not wait for it."""

    def __init__(self):
        self.at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.at is None:
            if scores.is_cuda:
                torch.cuda.synchronize()
            self.at = time.perf_counter()
        return scores


def measure(cfg: InferCompare, lineup: Lineup, names: list[str], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of cost.jsonl: {model, device, precision, cpus, load, round, prompt, batch, first_seconds, seconds, steps,
    tokens, characters, peak_gib}.

    rows: the prompts. Asked alone they are dealt to the rounds in turn; in batches (`prompt` is then None) all are
    asked in every round. steps: tokens and end of turn. A batch that does not fit the card leaves no row.
    """
    order = [name for turn in range(ROUNDS) for name in (names if turn % 2 == 0 else names[::-1])]
    warm_up = cfg.generation.model_copy(update={"max_new_tokens": WARM_UP_TOKENS})
    size = min(cfg.batch_size, len(rows))
    batches = [rows[i : i + size] for i in range(0, len(rows), size)] if size > 1 else []
    measured: list[dict[str, Any]] = []
    device, load = device_name(), round(os.getloadavg()[0], 1)  # load: of the minute before
    for place, (name, lm) in enumerate(models.each_model(lineup, order, cfg.precision)):
        turn, precision = place // len(names), str(lm.dtype).removeprefix("torch.")
        release()
        ask(lm, lineup.tokenizer, rows[:1], warm_up)
        alone = [(row["id"], [row]) for row in rows[turn::ROUNDS]]
        for prompt, some in alone + [(None, batch) for batch in batches]:
            if found := ask(lm, lineup.tokenizer, some, cfg.generation):
                of = {"model": name, "device": device, "precision": precision, "cpus": os.cpu_count(), "load": load}
                measured.append(of | {"round": turn, "prompt": prompt} | found)
    return measured


def ask(lm, tokenizer, rows: list[dict[str, Any]], how: Generation) -> dict[str, Any] | None:
    """One measured batch, as measure() tells it; None if it does not fit the card."""
    prompts, clock = [row["prompt"] for row in rows], FirstScores()
    encoded = generate.check_lengths(lm, tokenizer, prompts, how)
    seeds = [generate.seed_of(how.seed, prompt) for prompt in prompts]
    reset_peak()
    began = time.perf_counter()
    try:
        answers = generate.generate_batch(lm, tokenizer, encoded, seeds, how, [clock])
    except torch.OutOfMemoryError:
        release()
        return None
    return {
        "batch": len(rows), "first_seconds": clock.at - began, "seconds": time.perf_counter() - began,
        "steps": sum(a.tokens + a.stopped for a in answers), "tokens": sum(a.tokens for a in answers),
        "characters": sum(len(a.text) for a in answers), "peak_gib": peak_gib(),
    }  # fmt: skip


# ------------------------------------------------------------------ the machine


def device_name() -> str:
    """The card's name, or the processor's and how many threads torch uses on it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        named = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        named = None
    return f"{named[1].strip() if named else 'CPU'} ({torch.get_num_threads()} threads)"


def release() -> None:
    """Give back what torch's allocator keeps of the model before."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak() -> None:
    """Begin a new high-water mark of memory: of the card, else of the process, where Linux lets it be reset."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR.exists():
        with contextlib.suppress(OSError):  # some containers forbid it: the mark is then the highest so far
            CLEAR.write_text("5")


def peak_gib() -> float | None:
    """The mark in GiB: what torch's allocator reserved on the card, or the process's resident memory; None where
    neither can be read."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_reserved() / 2**30, 4)
    mark = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text()) if STATUS.exists() else None
    return round(int(mark[1]) / 2**20, 4) if mark else None
