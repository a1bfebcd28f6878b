"""TRL's SFTTrainer with the chunked head of losses.py."""

import torch
from trl import SFTTrainer

from posttrain import losses
from posttrain.chat import IGNORED


class ChunkedSFTTrainer(SFTTrainer):
    """The loss of TRL's trainer, over log-probabilities that are taken only where something is learned.

    TRL's fused head scores masked positions too when it runs on a CPU, and keeps four float32 temporaries there
    (bench/head.py, docs/LOG.md). Everything else, packing and collation included, is TRL's.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        losses.return_logps(self.model)
        self.eval_sums = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean negative log-likelihood over the trained tokens of the whole optimiser step, on all processes."""
        logps = model(**inputs)["logps"]
        trained = (inputs["labels"][:, 1:] != IGNORED).sum()
        count = trained if num_items_in_batch is None else num_items_in_batch
        loss = -logps.sum() / count.clamp(min=1)
        if num_items_in_batch is not None:  # DDP averages gradients over processes, and the count is of all of them
            loss = loss * self.accelerator.num_processes
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
