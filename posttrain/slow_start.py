"""A slow first pass: the learning rate of the first steps, before the trainer's own schedule begins."""

from collections.abc import Callable

import torch
import transformers
from torch.optim.lr_scheduler import LambdaLR

from posttrain.blocks import Trainer
from posttrain.forgetting_blocks import SlowStart


def multiplier(normal: Callable[[int], float], slow_steps: int, factor: float, warmup: int) -> Callable[[int], float]:
    """Step -> share of the peak learning rate: `factor` for slow_steps, then `normal` from its own step 0 on. Its
    warm-up, which begins at 0, takes over where it passes `factor`."""

    def of_step(step: int) -> float:
        if step < slow_steps:
            return factor
        step -= slow_steps
        return max(factor, normal(step)) if step < warmup else normal(step)

    return of_step


def apply_slow_start(trainer: transformers.Trainer, slow: SlowStart | None) -> None:
    """Give the trainer a LambdaLR with the slow steps in front, where the config asks for them.

    It is made where the trainer makes its own, and depends on nothing but the step, so a resumed run goes on at the
    very same rate.
    """
    if slow is None:
        return

    def create_scheduler(num_training_steps: int, optimizer=None) -> LambdaLR:
        if trainer.lr_scheduler is None:
            slow_steps, args = int(slow.share * num_training_steps), trainer.args
            warmup = args.get_warmup_steps(num_training_steps)
            unused = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # a scheduler sets the rate of the optimiser it is given
            normal = transformers.get_scheduler(args.lr_scheduler_type, unused, warmup, num_training_steps - slow_steps)
            of_step = multiplier(normal.lr_lambdas[0], slow_steps, slow.factor, warmup)
            trainer.lr_scheduler = LambdaLR(optimizer or trainer.optimizer, of_step)
            trainer._created_lr_scheduler = True  # as transformers marks its own
        return trainer.lr_scheduler

    trainer.create_scheduler = create_scheduler


def lines(knobs: Trainer, steps: int) -> list[str]:
    """For the plan and the run's first lines."""
    slow = knobs.slow_start
    if slow is None:
        return []
    slow_steps = int(slow.share * steps)
    if not slow_steps:
        return [f"trainer.slow_start: {slow.share:g} of {steps} steps is less than one, so no step is slow"]
    return [f"learning rate {knobs.learning_rate * slow.factor:.3g} in the first {slow_steps} steps "
            f"(trainer.slow_start), then up to {knobs.learning_rate:.3g} and the {knobs.lr_scheduler_type} schedule "
            f"over the other {steps - slow_steps}"]  # fmt: skip
