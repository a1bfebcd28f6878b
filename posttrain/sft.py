"""TRL's SFTTrainer with the chunked head of losses.py."""

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
        return (loss, {}) if return_outputs else loss
