"""
ORPO and DPO on pairs, over chunked log-probabilities.

TRL 1.16 keeps ORPO only in its experimental part, with full logits and without a length option, and its DPO has no
reference-free form, scores prompt positions too and leaves a second adapter behind; so both stand here, held to TRL's
losses by tests/test_preference.py.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer

from posttrain import losses, model, runs
from posttrain.blocks import PreferenceTraining
from posttrain.chat import IGNORED, pair_length
from posttrain.errors import CheckFailed
from posttrain.stages import TrainDpo, TrainOrpo


class PairCollator:
    """Pairs to one batch of 2 x pairs rows, chosen first, padded on the right.

    Gives input_ids, attention_mask, labels (2 x pairs, length), answer_mask (2 x pairs, length - 1) on the positions
    that predict the answer, and for DPO ref_logps (2 x pairs,). `labels` cover the chosen prompts too if score_prompts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, score_prompts: bool):
        self.pad, self.score_prompts = tokenizer.pad_token_id, score_prompts

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        sides = [(r["prompt_ids"], r["chosen_ids"], self.score_prompts) for r in rows]
        sides += [(r["prompt_ids"], r["rejected_ids"], False) for r in rows]
        if not all(answer for _, answer, _ in sides):
            raise CheckFailed("a pair of this batch has an answer without tokens: there is nothing to learn from it, "
                              "and its mean log-probability is not a number")  # fmt: skip
        width = max(len(prompt) + len(answer) for prompt, answer, _ in sides)
        ids = torch.full((len(sides), width), self.pad)
        labels = torch.full((len(sides), width), IGNORED)
        answers = torch.zeros((len(sides), width), dtype=torch.bool)
        for i, (prompt, answer, score_prompt) in enumerate(sides):
            row, start, end = torch.tensor(prompt + answer), len(prompt), len(prompt) + len(answer)
            ids[i, :end] = row
            labels[i, 0 if score_prompt else start : end] = row[0 if score_prompt else start :]
            answers[i, start:end] = True
        lengths = torch.tensor([len(p) + len(a) for p, a, _ in sides])
        mask = (torch.arange(width)[None] < lengths[:, None]).long()
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "answer_mask": answers[:, 1:]}
        if "ref_chosen" in rows[0]:
            batch["ref_logps"] = torch.tensor([r["ref_chosen"] for r in rows] + [r["ref_rejected"] for r in rows])
        return batch


def answer_sums(
    lm: torch.nn.Module, batch: dict[str, Tensor], ld_alpha: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(summed answer log-probability, answer tokens, log-probability per position) of each row of a batch.

    With ld_alpha the sum is LD-DPO's: tokens beyond the shorter answer of the pair count ld_alpha."""
    logps = lm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])["logps"]
    mask = batch["answer_mask"]
    weights = mask if ld_alpha is None else losses.ld_weights(mask, ld_alpha)
    return (logps * weights).sum(1), mask.sum(1), logps


class PreferenceTrainer(Trainer):
    """transformers' Trainer with the ORPO or DPO loss.

    Sums are divided by the pairs (and answer tokens) of the whole optimiser step, so that micro-batch x accumulation
    and the number of processes do not change the loss.
    """

    def __init__(self, cfg: PreferenceTraining, **kwargs):
        super().__init__(**kwargs)
        self.cfg = cfg
        self.model_accepts_loss_kwargs = True  # the loss is already divided by the step's items: do not divide again
        self.sums: dict[str, dict[str, float]] = {"train": {}, "eval": {}}
        self.num_tokens = self.num_cells = 0  # cells: tokens and padding
        losses.return_logps(self.model)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """(pairs, scored tokens of the chosen rows) of all micro-batches of a step, over all processes."""
        items = self._count_items(batch_samples, device)
        return self.accelerator.reduce(items, "sum") if self.args.world_size > 1 else items

    def _count_items(self, batch_samples: list, device: torch.device) -> Tensor:
        pairs = sum(len(batch["labels"]) // 2 for batch in batch_samples)
        tokens = sum((b["labels"][: len(b["labels"]) // 2, 1:] != IGNORED).sum() for b in batch_samples)
        return torch.tensor([pairs, int(tokens)], device=device, dtype=torch.float32)

    def compute_loss(self, lm, inputs, return_outputs=False, num_items_in_batch=None):
        items = num_items_in_batch
        if items is None:  # in a validation: this batch alone, on this process alone
            items = self._count_items([inputs], self.args.device)
        orpo = isinstance(self.cfg, TrainOrpo)
        sums, lengths, logps = answer_sums(lm, inputs, None if orpo else self.cfg.ld_alpha)
        nll, pairs, facts = self._orpo(logps, sums, lengths) if orpo else self._dpo(inputs["ref_logps"], sums, lengths)
        loss = pairs / items[0] + nll / items[1]
        if not lm.training:
            self.eval_sums += torch.stack([pairs.detach(), nll.detach(), items[0], items[1]])
        self._note("train" if lm.training else "eval", facts, inputs)
        if num_items_in_batch is not None:  # DDP averages gradients over processes, and the items are of all of them
            loss = loss * self.args.world_size
        return (loss, {}) if return_outputs else loss

    def _orpo(self, logps, sums, lengths):
        """(likelihood term summed over tokens, odds term summed over pairs, facts per pair)."""
        (mean_chosen, mean_rejected), (chosen_len, rejected_len) = (sums / lengths).chunk(2), lengths.chunk(2)
        odds_loss, log_odds = losses.orpo_odds_loss(
            mean_chosen, mean_rejected, chosen_len, rejected_len, self.cfg.length_penalty
        )
        nll, odds = -logps[: len(mean_chosen)].sum(), self.cfg.beta * odds_loss.sum()
        margin = self.cfg.beta * (mean_chosen - mean_rejected).detach()
        return nll, odds, {"rewards/margins": margin, "rewards/accuracies": (margin > 0).float(),
                           "log_odds": log_odds.detach(), "nll_loss": (-mean_chosen).detach()}  # fmt: skip

    def _dpo(self, ref_logps, sums, lengths):
        """(0, loss summed over pairs, facts per pair). With sigmoid_norm the rewards are per token, as the loss is."""
        chosen_len, rejected_len = lengths.chunk(2)
        if self.cfg.loss_type == "sigmoid_norm":
            sums, ref_logps = sums / lengths, ref_logps / lengths
        loss, chosen_reward, rejected_reward = losses.dpo_loss(
            *sums.chunk(2), *ref_logps.chunk(2), self.cfg.beta, chosen_len - rejected_len, self.cfg.length_penalty
        )
        margin = (chosen_reward - rejected_reward).detach()
        return loss.new_zeros(()), loss.sum(), {
            "rewards/margins": margin, "rewards/accuracies": (margin > 0).float(),
            "rewards/chosen": chosen_reward.detach(), "rewards/rejected": rejected_reward.detach(),
        }  # fmt: skip

    def prediction_step(self, lm, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(lm, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """The loss over the whole set: a mean of batch means would depend on the batch size."""
        self.eval_sums = torch.zeros(4, device=self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        pairs, nll, num_pairs, num_tokens = self.accelerator.reduce(self.eval_sums, "sum").tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = pairs / max(num_pairs, 1) + nll / max(num_tokens, 1)
        return output

    def _note(self, mode: str, facts: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
        """Add the pairs of a micro-batch to the running means that the next log line shows."""
        sums = self.sums[mode]
        for key, values in {**facts, "pairs": torch.ones(len(inputs["labels"]) // 2)}.items():
            sums[key] = sums.get(key, 0.0) + float(values.sum())
        if mode == "train":
            self.num_tokens += int(inputs["attention_mask"].sum())
            self.num_cells += inputs["attention_mask"].numel()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode, prefix = ("eval", "eval_") if "eval_loss" in logs else ("train", "")
        sums = self.sums[mode]
        if sums.get("pairs") and "train_runtime" not in logs:
            logs |= {prefix + k: round(v / sums["pairs"], 6) for k, v in sums.items() if k != "pairs"}
            logs |= {"num_tokens": self.num_tokens, "num_cells": self.num_cells} if mode == "train" else {}
            self.sums[mode] = {}
        super().log(logs, start_time)


# ------------------------------------------------------------------ the reference of DPO


@dataclass
class Referenced:
    """Rows with ref_chosen and ref_rejected, put in as a row is asked for: the rows themselves stay where they lie."""

    rows: Sequence[dict[str, Any]]
    logps: list[tuple[float, float]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        chosen, rejected = self.logps[index]
        return {**self.rows[index], "ref_chosen": chosen, "ref_rejected": rejected}


def add_reference(cfg: TrainDpo, lm, tokenizer, rows: Sequence[dict], batch_size: int, store: Path) -> Referenced:
    """The rows with ref_chosen and ref_rejected, the summed answer log-probabilities of the model before training.

    Taken once, before the first step, when the policy still is the reference: one pass instead of one per epoch, and no
    second set of weights. Kept in `store`, so that a resumed run has the very same reference. With reference_free: 0;
    with ld_alpha: weighted as the policy's.
    """
    if cfg.reference_free:
        return Referenced(rows, [(0.0, 0.0)] * len(rows))
    content = _content(cfg, rows)
    stored = runs.read_json(store)
    if stored is None or stored["content"] != content:
        stored = {"content": content, "logps": _reference_logps(cfg, lm, tokenizer, rows, batch_size)}
        if runs.main_process():
            store.parent.mkdir(parents=True, exist_ok=True)
            runs.write_json(store, stored)
    return Referenced(rows, stored["logps"])


def _content(cfg: TrainDpo, rows: Sequence[dict]) -> str:
    """SHA-256 of what a reference is taken on."""
    digest = hashlib.sha256(json.dumps(cfg.ld_alpha).encode())
    for row in rows:
        parts = [row[part] for part in ("prompt_ids", "chosen_ids", "rejected_ids")]
        digest.update(np.array([len(part) for part in parts] + [i for part in parts for i in part], np.int32).tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _reference_logps(cfg: TrainDpo, lm, tokenizer, rows: Sequence[dict], batch_size: int) -> list[tuple[float, float]]:
    from tqdm import tqdm

    collate, where = PairCollator(tokenizer, False), model.device()
    lm = lm.to(where) if not getattr(lm, "is_loaded_in_4bit", False) else lm
    was_training = lm.training
    lm.eval()
    inner = losses.causal_lm(lm)
    plain_forward = inner.forward
    losses.return_logps(lm)
    dtype = model.dtype_of(cfg.trainer.precision)  # of the policy's steps; the weights may be wider (full fine-tuning)
    autocast = torch.autocast(where.type, dtype, enabled=dtype != torch.float32)
    lengths = [pair_length(row) for row in rows]
    by_length = sorted(range(len(rows)), key=lambda i: -lengths[i])
    logps: list[Any] = [None] * len(rows)
    for start in tqdm(range(0, len(rows), batch_size), "reference", disable=None if runs.main_process() else True):
        some = by_length[start : start + batch_size]
        batch = {k: v.to(where) for k, v in collate([rows[i] for i in some]).items()}
        with autocast:
            chosen, rejected = answer_sums(lm, batch, cfg.ld_alpha)[0].float().chunk(2)
        for i, pair in zip(some, zip(chosen.tolist(), rejected.tolist(), strict=True), strict=True):
            logps[i] = pair
    inner.forward = plain_forward
    lm.train(was_training)
    model.release_4bit(lm)
    return logps
