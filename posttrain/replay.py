"""General conversations mixed into a domain run, and the batches that know which tokens are theirs."""

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from posttrain import chat
from posttrain.config import shown
from posttrain.errors import UserFault
from posttrain.stages import TrainSft
from posttrain.training import Start
from posttrain.training_data import Records


@dataclass
class Replayed:
    """What replay adds to a run. `trained` are rows to mix in; `fisher` those that ewc estimates its F on."""

    trained: list[dict] = field(default_factory=list)
    fisher: list[dict] = field(default_factory=list)
    fates: Counter = field(default_factory=Counter)
    dropped: list[dict[str, str]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def draw_replay(cfg: TrainSft, start: Start, records: Records, domain: list[dict]) -> Replayed:
    """As many encoded replay rows as stand in replay.share of all trained conversations beside the `domain` rows.

    Drawn by trainer.seed from the records that fit, whatever else is in the files. With too few the run takes what
    there is and says so; UserFault where there is none. A row over trainer.max_length is never an error here: another
    one is drawn instead.
    """
    out, share = Replayed(fates=Counter(records.replay_fates)), cfg.replay.share
    wanted = max(1, round(share / (1 - share) * len(domain))) if share else 0
    for_ewc = cfg.ewc.num_samples if cfg.ewc else 0
    order = list(records.replay)
    random.Random(cfg.trainer.seed).shuffle(order)
    rule = "drop" if cfg.data.on_too_long == "error" else cfg.data.on_too_long
    rows, fates, tried = [], [], 0
    while len(rows) < max(wanted, for_ewc) and tried < len(order):
        one = chat.encode_chats(start.tokenizer, order[tried : tried + 1], cfg.trainer.max_length, start.loss_on, rule)
        rows, fates, tried = rows + one.rows, fates + one.row_fates, tried + 1
        out.dropped += one.dropped
        out.fates.update(row["reason"] for row in one.dropped)
    out.trained, out.fisher = rows[:wanted], rows[:for_ewc]
    out.fates.update(fates[:wanted])
    out.fates.update({"for_ewc_only": len(rows[wanted:]), "not_drawn": len(order) - tried})
    out.fates = +out.fates
    if not rows:
        why = _counts(out.fates) or "the files are empty"
        raise UserFault(f"replay: no usable conversation in {_files(cfg)} ({why}); name other replay.files, or set "
                        "replay=null")  # fmt: skip
    _describe(cfg, out, wanted, len(domain))
    return out


def _describe(cfg: TrainSft, out: Replayed, wanted: int, domain: int) -> None:
    """Fill in the facts for the manifest and the notes for the plan."""
    count = len(out.trained)
    share = count / max(1, count + domain)
    tokens = sum(len(row["input_ids"]) for row in out.trained)
    trained = sum(label != chat.IGNORED for row in out.trained for label in row["labels"])
    out.facts = {"asked_share": cfg.replay.share, "share": round(share, 6), "conversations": count, "tokens": tokens,
                 "trained_tokens": trained, "fates": dict(out.fates)}  # fmt: skip
    out.notes.append(f"replay: {count} of {count + domain} trained conversations ({share:.1%}) come from {_files(cfg)}:"
                     f" {tokens} tokens, {trained} of them trained; its records: {_counts(out.fates)}")  # fmt: skip
    if count < wanted:
        out.notes.append(f"replay: {wanted} conversations were asked for (replay.share {cfg.replay.share:g}), only "
                         f"{count} can be used")  # fmt: skip
    if cfg.ewc:
        short = f" ({cfg.ewc.num_samples} were asked for)" if len(out.fisher) < cfg.ewc.num_samples else ""
        out.notes.append(f"ewc: F from {len(out.fisher)} replay conversations{short}, {cfg.ewc.fisher}")


def _files(cfg: TrainSft) -> str:
    sources = f" (sources {', '.join(cfg.replay.sources)})" if cfg.replay.sources else ""
    return ", ".join(shown(file) for file in cfg.replay.files) + sources


def _counts(fates: Counter) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(fates.items()))


# ------------------------------------------------------------------ which tokens are replayed


def mark(domain: list[dict], replayed: list[dict]) -> None:
    """Give every row a column `replay`, 1 on each token of a replayed row: packing carries it along."""
    for rows, value in ((domain, 0), (replayed, 1)):
        for row in rows:
            row["replay"] = [value] * len(row["input_ids"])


class HeldCollator:
    """The trainer's own collator, and {"held": (batch, length) bool} of the tokens that `mark` marked."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(rows)
        if "replay" in rows[0]:
            marks = [torch.tensor(row["replay"], dtype=torch.bool) for row in rows]
            if len(batch["labels"]) != len(rows):  # packed rows are laid end to end
                marks = [torch.cat(marks)]
            held = torch.zeros_like(batch["labels"], dtype=torch.bool)
            for line, marked in zip(held, marks, strict=True):
                line[: len(marked)] = marked
            batch["held"] = held
        return batch
