"""lm-eval's wrapper around a loaded model, with the size of its batches taken from the free memory at every task."""

from lm_eval.models.huggingface import HFLM

from posttrain import chat
from posttrain.evals.batch_size import BatchSizes

LONGEST = 8  # texts that are tokenised to find the longest one: those with the most characters


class SizedLM(HFLM):
    """HFLM, which sets `batch_size_per_gpu` before it scores or generates. Scores are HFLM's own."""

    sizes: BatchSizes

    def _loglikelihood_tokens(self, requests, *args, **kwargs):
        tokens = max((len(context) + len(answer) for _, context, answer in requests), default=1)
        self.batch_size_per_gpu = self.sizes.of(self.model, min(tokens, self.max_length))
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def loglikelihood_rolling(self, requests, *args, **kwargs):
        self.batch_size_per_gpu = self.sizes.of(self.model, self.max_length)  # its windows are that long
        return super().loglikelihood_rolling(requests, *args, **kwargs)

    def generate_until(self, requests, *args, **kwargs):
        texts = sorted((request.args[0] for request in requests), key=len)[-LONGEST:]
        tokens = max((len(self.tok_encode(text)) for text in texts), default=1)
        new = max((request.args[1].get("max_gen_toks", self.max_gen_toks) for request in requests), default=1)
        self.batch_size_per_gpu = self.sizes.of(self.model, tokens, new, logits=False)
        return super().generate_until(requests, *args, **kwargs)

    def size_for_answers(self, prompts: list[list[dict]], new_tokens: int) -> int:
        """Prompts that are answered at once by evals.generate."""
        longest = sorted(prompts, key=lambda turns: sum(len(turn["content"]) for turn in turns))[-LONGEST:]
        tokens = max((len(chat.prompt_ids(self.tokenizer, turns)) for turns in longest), default=1)
        return self.sizes.of(self.model, tokens, new_tokens, logits=False)

    def size_for_rows(self, rows: list[dict[str, list[int]]]) -> int:
        """Rows whose log-probabilities evals.heldout takes at once, without logits over the whole vocabulary."""
        return self.sizes.of(self.model, max(len(row["input_ids"]) for row in rows), logits=False)
