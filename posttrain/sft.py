"""TRL's SFTTrainer with the chunked head of losses.py."""

import torch
from trl import SFTConfig, SFTTrainer

from posttrain import arguments, kl, losses
from posttrain.chat import IGNORED
from posttrain.errors import CheckFailed
from posttrain.ewc import EwcPenalty
from posttrain.forgetting_blocks import KlToBase
from posttrain.packed_attention import attend_by_document
from posttrain.replay import HeldCollator
from posttrain.schedule import Schedule
from posttrain.stages import TrainCpt, TrainSft
from posttrain.training import Start
from posttrain.training_data import Rows


class SomethingLearned:
    """A collator whose batches have a trained token: without one the loss would be 0 or a NaN, and nobody would know.

    Encoding drops rows without trained tokens, so such a batch is a fault of the rows. Raises CheckFailed."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, rows):
        batch = self.collate(rows)
        if not (batch["labels"][:, 1:] != IGNORED).any():
            raise CheckFailed(f"a batch of {len(rows)} rows has no trained token; the first begins with the ids "
                              f"{list(rows[0]['input_ids'][:16])}")  # fmt: skip
        return batch


def sft_trainer(cfg: TrainSft | TrainCpt, start: Start, lm: torch.nn.Module, rows: Rows, schedule: Schedule,
                penalty: EwcPenalty | None = None) -> "ChunkedSFTTrainer":  # fmt: skip
    """The trainer of a run on conversations or on plain text, its rows encoded and packed already."""
    attend_by_document(lm)
    return ChunkedSFTTrainer(
        model=lm,
        kl_to_base=getattr(cfg, "kl_to_base", None),
        penalty=penalty,
        args=arguments.arguments(
            SFTConfig, cfg, schedule, bool(rows.val), packing=cfg.trainer.packing, eval_packing=False,
            max_length=cfg.trainer.max_length, dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=rows.train,
        eval_dataset=rows.val if len(rows.val) else None,
        processing_class=start.tokenizer,
    )  # fmt: skip


class ChunkedSFTTrainer(SFTTrainer):
    """The loss of TRL's trainer, over log-probabilities that are taken only where something is learned.

    TRL's fused head scores masked positions too when it runs on a CPU, and keeps four float32 temporaries there
    (bench/head.py, docs/LOG.md). Everything else, packing and collation included, is TRL's.
    """

    def __init__(self, *args, kl_to_base: KlToBase | None = None, penalty: EwcPenalty | None = None, **kwargs):
        """kl_to_base: hold the tokens that the collator marks (replay.HeldCollator), or all trained ones, to the base.
        penalty: added to the loss once in each optimiser step."""
        trained = {name: p.dtype for name, p in kwargs["model"].named_parameters() if p.requires_grad}
        super().__init__(*args, **kwargs)
        # TRL makes the adapter of a 4-bit base bfloat16 whatever the precision is; the loss scaler of fp16 (a T4) has
        # no kernel for bfloat16 gradients. training.load_trainable chose the dtypes.
        for name, parameter in self.model.named_parameters():
            if name in trained:
                parameter.data = parameter.data.to(trained[name])
        if kl_to_base:
            kl.return_logps_and_kl(self.model, kl_to_base.direction)
            self.data_collator = HeldCollator(self.data_collator)
        else:
            losses.return_logps(self.model)
        self.data_collator = SomethingLearned(self.data_collator)
        self.beta, self.penalty = kl_to_base.beta if kl_to_base else 0.0, penalty
        self.held = {"kl_to_base": [], "ewc": []}  # since the last log line: nats per held token; the penalty
        self.eval_sums = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean negative log-likelihood over the trained tokens of the whole optimiser step, on all processes."""
        outputs = model(**inputs)
        logps = outputs["logps"]
        trained = (inputs["labels"][:, 1:] != IGNORED).sum()
        count = trained if num_items_in_batch is None else num_items_in_batch
        loss = -logps.sum() / count.clamp(min=1)
        if "kl" in outputs:
            loss = loss + self.beta * outputs["kl"].sum() / count.clamp(min=1)
            self.held["kl_to_base"].append(outputs["kl"].detach().sum() / outputs["held"].clamp(min=1))
        if num_items_in_batch is not None:  # DDP averages gradients over processes, and the count is of all of them
            loss = loss * self.accelerator.num_processes
        if self.penalty and self.model.training and self.accelerator.sync_gradients:  # once a step, on every process
            penalty = self.penalty()
            loss = loss + penalty
            self.held["ewc"].append(penalty.detach())
        if self.model.training:
            tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else trained * 0 + logps.shape[1] + 1
            self._total_train_tokens += self.accelerator.gather_for_metrics(tokens).sum().item()
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        else:
            self.eval_sums += torch.stack([-logps.detach().sum(), trained.float()])
        return (loss, {}) if return_outputs else loss

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """The loss per trained token of the whole set: a mean of batch means would depend on the batch size."""
        self.eval_sums = torch.zeros(2, device=self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        nll, count = self.accelerator.reduce(self.eval_sums, "sum").tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = nll / max(count, 1)
        return output

    def create_model_card(self, *args, **kwargs) -> None:
        """No README.md: TRL's names neither base, data nor licence of a run. An export has one, of model_card.py."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {name: round(torch.stack(values).mean().item(), 6) for name, values in self.held.items() if values}
            self.held = {name: [] for name in self.held}
        super().log(logs, start_time)
