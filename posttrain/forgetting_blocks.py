"""Config keys against forgetting: replay, kl_to_base, ewc, slow_start. docs/forgetting.md compares them."""

from typing import Literal

from pydantic import Field

from posttrain.config import Block, ProjectPath


class Replay(Block):
    """General conversations mixed into a domain run."""

    files: list[ProjectPath] = Field(min_length=1)
    """Files of general conversations, in any form that data.train_files may have."""
    share: float = Field(0.1, ge=0, le=0.5)
    """Replayed conversations among all trained ones: with 0.1, 1,000 conversations of the domain get 111 general ones,
    drawn by trainer.seed from those that can be used, the same ones in every epoch. If there are too few, the run takes
    what there is and says so. 0 trains none of them; then only `ewc` reads them."""
    sources: list[str] | None = None
    """Take only records of these sources (the `source` that prepare_data writes into a record); null takes all."""


class KlToBase(Block):
    """A penalty on the distance between the tuned model and its base, token by token (LoRA only)."""

    beta: float = Field(gt=0, allow_inf_nan=False)
    """Each held token costs -log p + beta x KL, in nats. More holds closer, and learns less of the domain. Start with
    1 on replayed rows, 0.3 on all."""
    on: Literal["auto", "all"] = "auto"
    """auto: the trained tokens of the replayed rows, or of all rows where replay trains none; all: of all rows."""
    direction: Literal["forward", "reverse"] = "forward"
    """forward: KL(base || model): what the base may say stays likely. It is what learning without forgetting distils
    (Li and Hoiem 2016, arXiv 1606.09282), and the measure by which forgetting was predicted (Shenfeld et al. 2025,
    arXiv 2509.04259). reverse: KL(model || base), the penalty of RLHF (Ziegler et al. 2019, arXiv 1909.08593), which
    lets the model drop answers of the base. Cost of both: one more forward pass without gradients for each micro-batch
    that holds such tokens (about a third more time where all do), one more last hidden state in memory, and float32
    logits of a chunk of tokens at a time, never of a whole row."""


class Ewc(Block):
    """Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796) of the adapted matrices (LoRA only)."""

    weight: float = Field(gt=0, allow_inf_nan=False)
    """lambda: weight / 2 x sum of F x dW^2 is added to the loss of each step. dW is the change of an adapted matrix
    (alpha / r x B A), F the mean squared slope of a token's log-probability on replay data, answers drawn from the base
    itself. With the whole Fisher matrix, a weight of 1 would cost what a beta of 1 in kl_to_base costs (to the second
    order); its diagonal sees only a part of that, so more is needed. Try 30, and watch the loss of the domain."""
    num_samples: int = Field(100, ge=1)
    """Replay conversations that F is estimated on, one forward and one backward pass each before the first step; kept
    in fisher.safetensors beside the run, so that a resumed run reads the same F."""
    fisher: Literal["factored", "full"] = "factored"
    """full: one float32 per adapted weight (1.4 GB for Qwen2.5-0.5B, 26 GB for a 7B) on the card. factored: the row and
    column sums of the same diagonal, whose product stands for it (Adafactor's form: Shazeer and Stern 2018, arXiv
    1804.04235): 10 MB for a 7B, and dW is never formed. Either works over 4-bit weights: only A, B and F are read."""


class SlowStart(Block):
    """A slow first pass: the first steps at a small constant learning rate, then the normal schedule."""

    share: float = Field(0.1, gt=0, lt=1)
    """Share of all optimiser steps that are slow; the normal schedule, warm-up included, takes the rest. Against
    forgetting a share of 0.1 did nothing that five seeds could show, 0.33 did (docs/forgetting.md)."""
    factor: float = Field(0.1, gt=0, le=1)
    """Learning rate of the slow steps, relative to trainer.learning_rate. The warm-up goes on from there."""
