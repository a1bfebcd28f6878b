"""Arithmetic of a training run: which rows, how many steps, how they fall into micro-batches. No torch."""

import math
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from posttrain.blocks import SftTrainer, Trainer
from posttrain.errors import UserFault
from posttrain.text import chinese_ratio

Row = TypeVar("Row")


@dataclass(frozen=True)
class Schedule:
    """How `rows` become optimiser steps. A row is a conversation, a pack of conversations, or a pair."""

    rows: int
    micro_batch: int
    world: int
    accumulation: int
    steps: int
    epochs: float
    asked_rows_per_step: int

    @property
    def rows_per_step(self) -> int:
        return self.micro_batch * self.accumulation * self.world

    def every(self, save_steps: int) -> int:
        """Steps between two validated checkpoints: save_steps, or a fifth of a run that is shorter."""
        return save_steps if save_steps < self.steps else max(1, self.steps // 5)

    def facts(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        return asdict(self) | {"rows_per_step": self.rows_per_step}

    def lines(self, unit: str) -> list[str]:
        """For the plan."""
        lines = [
            f"{self.steps} optimiser steps = {self.epochs:g} epochs of {self.rows} {unit}",
            f"{self.rows_per_step} {unit} a step = micro-batch {self.micro_batch} x accumulation {self.accumulation} "
            f"x {self.world} process{'es' if self.world > 1 else ''}",
        ]
        if self.rows_per_step != self.asked_rows_per_step:
            lines.append(f"with so few rows a step takes {self.rows_per_step} instead of {self.asked_rows_per_step}, "
                         "so that there are enough steps to learn in (trainer.min_steps)")  # fmt: skip
        return lines


def world_size() -> int:
    """Processes of this launch; 1 in a plain dry run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def plan_steps(trainer: Trainer, rows: int) -> Schedule:
    """Derive accumulation and steps. UserFault where the wanted step does not divide by what one pass holds."""
    world, micro = world_size(), trainer.per_device_train_batch_size
    packed = isinstance(trainer, SftTrainer) and trainer.packing
    if packed:
        per_pass = micro * world * trainer.max_length
        wanted, key, unit = trainer.tokens_per_step, "trainer.tokens_per_step", "tokens"
    else:
        per_pass = micro * world
        wanted, key, unit = trainer.sequences_per_step, "trainer.sequences_per_step", "rows"
    if wanted % per_pass:
        near = sorted({max(1, wanted // per_pass) * per_pass, (wanted // per_pass + 1) * per_pass})
        size = f"{micro} rows x {world} processes" + (f" x {trainer.max_length} tokens" if packed else "")
        raise UserFault(f"{key}: {wanted} {unit} do not divide by one pass ({size} = {per_pass} {unit})\n"
                        f"    choose: {key}={' or '.join(map(str, near))}, or another "
                        "trainer.per_device_train_batch_size")  # fmt: skip
    accumulation = asked = wanted // per_pass
    if trainer.max_steps > 0:
        steps = trainer.max_steps
    else:
        steps = _steps(rows, micro * world, accumulation, trainer.num_train_epochs)
        while accumulation > 1 and steps < trainer.min_steps:
            accumulation -= 1
            steps = _steps(rows, micro * world, accumulation, trainer.num_train_epochs)
    epochs = trainer.num_train_epochs
    if trainer.max_steps > 0:
        epochs = steps / max(1, _steps(rows, micro * world, accumulation, 1.0))
    return Schedule(rows, micro, world, accumulation, steps, round(epochs, 4), asked * micro * world)


def _steps(rows: int, rows_per_pass: int, accumulation: int, epochs: float) -> int:
    """Optimiser steps as transformers' Trainer counts them: a rest at the end of an epoch is a step of its own."""
    return math.ceil(math.ceil(math.ceil(rows / rows_per_pass) / accumulation) * epochs)


def draw(rows: Sequence[Row], count: int | None, seed: int) -> list[Row]:
    """A seeded draw of `count` rows in their order, or all."""
    if count is None or count >= len(rows):
        return list(rows)
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), count))]


def question(record: dict) -> str:
    """The last question of a record: what a pair is judged by, and what must not stand on both sides of a split. Of
    plain text the whole document."""
    if "text" in record:
        return record["text"]
    turns = record.get("prompt") or record["messages"]
    return next((turn["content"] for turn in reversed(turns) if turn["role"] == "user"), "")


def hold_out(records: list[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """(train, validation) by a seeded draw of questions, so that none stands on both sides. Where share > 0 and there
    are two questions, at least one is held out."""
    questions = sorted({question(record) for record in records})
    random.Random(seed).shuffle(questions)
    held, count = set(), 0
    of_question = Counter(question(record) for record in records)
    while share and len(held) < len(questions) - 1 and count < max(1, round(len(records) * share)):
        held.add(questions[len(held)])
        count += of_question[questions[len(held) - 1]]
    return ([r for r in records if question(r) not in held], [r for r in records if question(r) in held])


def is_chinese(pair: dict) -> bool:
    """Whether a pair counts as Chinese: 30 % of the letters of its last question are."""
    return chinese_ratio(question(pair)) >= 0.3


def draw_chinese_share(pairs: list[dict], share: float | None, seed: int) -> tuple[list[int], str]:
    """(indices of as many pairs as can stand in the given share of Chinese ones, a sentence on what that leaves)."""
    chinese = [i for i, pair in enumerate(pairs) if is_chinese(pair)]
    others = sorted(set(range(len(pairs))) - set(chinese))
    counts = f"{len(pairs)} pairs ({len(chinese)} Chinese, {len(others)} other)"
    if share is None or not pairs:
        return list(range(len(pairs))), f"{counts} as they are"
    limits = [len(chinese) / share] if share > 0 else []
    limits += [len(others) / (1 - share)] if share < 1 else []
    total = int(min(limits) + 1e-9)
    kept = draw(chinese, round(total * share), seed) + draw(others, total - round(total * share), seed)
    return sorted(kept), (f"{counts} drawn to {share:.0%} Chinese leave {len(kept)}: {round(total * share)} + "
                          f"{total - round(total * share)}")  # fmt: skip
