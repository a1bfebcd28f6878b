"""
Losses over token log-probabilities that never hold batch x length x vocabulary.

With Qwen's vocabulary of 151,936 one row of 2,048 tokens has 1.2 GB of float32 logits, and a plain loss keeps several
copies. Here the head is applied to the positions that are scored, a chunk at a time.
"""

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.chat import IGNORED
from posttrain.errors import UserFault

CHUNK_BYTES = 128 * 2**20  # float32 logits alive at a time; larger was not faster on a CPU, smaller was slower


class _ChunkedLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[label] per row.

    With a frozen head (LoRA) the slope of each row with respect to its hidden state is taken while its logits are
    there: the backward pass only scales it, so the head costs two matrix products instead of three. Where the head is
    trained too, the logits are computed again in the backward pass.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        ctx.chunk, ctx.frozen = chunk, not ctx.needs_input_grad[1]
        logps, logsumexps, slopes = [], [], []
        for rows, targets in zip(hidden.split(chunk), labels.split(chunk), strict=True):
            logits = (rows @ weight.T).float()
            logsumexp = logits.logsumexp(-1)
            logps.append(logits.gather(1, targets[:, None])[:, 0] - logsumexp)
            logsumexps.append(logsumexp)
            if ctx.frozen and ctx.needs_input_grad[0]:
                slopes.append(_slope(logits, logsumexp, targets, weight) @ weight)
        if ctx.frozen:
            ctx.save_for_backward(*([torch.cat(slopes)] if slopes else []))
        else:
            ctx.save_for_backward(hidden, weight, labels, torch.cat(logsumexps))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad: Tensor):
        if ctx.frozen:
            (slopes,) = ctx.saved_tensors
            return (slopes * grad[:, None]).to(slopes.dtype), None, None, None
        hidden, weight, labels, logsumexps = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(labels), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = (hidden[part] @ weight.T).float()
            slope = _slope(logits, logsumexps[part], labels[part], weight) * grad[part, None].to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = (slope @ weight).to(hidden.dtype)
            grad_weight += (slope.T @ hidden[part].to(weight.dtype)).float()
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def _slope(logits: Tensor, logsumexp: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """d log-probability / d logits = onehot(target) - softmax, in place of the logits."""
    slope = logits.sub_(logsumexp[:, None]).exp_().neg_()
    return slope.scatter_add_(1, targets[:, None], torch.ones_like(slope[:, :1])).to(weight.dtype)


def token_logps(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None) -> Tensor:
    """Log-probability of each label.

    hidden: (batch, length, width), the last hidden state at the position that predicts the label.
    weight: (vocabulary, width) of the output head.
    labels: (batch, length), IGNORED where nothing is scored.
    Returns (batch, length) float32, 0 where the label is IGNORED.
    """
    scored = labels != IGNORED
    out = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
    chunk = chunk or max(16, CHUNK_BYTES // (4 * weight.shape[0]))
    rows = hidden[scored]
    if torch.is_autocast_enabled(rows.device.type):
        rows = rows.to(torch.get_autocast_dtype(rows.device.type))
    return out.masked_scatter(scored, _ChunkedLogps.apply(rows.to(weight.dtype), weight, labels[scored], chunk))


def causal_lm(model: nn.Module) -> nn.Module:
    """The bare causal LM inside DDP and PEFT wrappers."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _logps_forward(self, labels: Tensor, **inputs: Any) -> dict[str, Tensor]:
    """A causal LM's forward that returns log-probabilities of the labels instead of logits."""
    given = {name: value for name, value in inputs.items() if value is not None}  # PEFT passes what nobody gave as None
    hidden = self.get_decoder()(**given | {"use_cache": False}).last_hidden_state
    return {"logps": token_logps(hidden[:, :-1], self.get_output_embeddings().weight, labels[:, 1:])}


def return_logps(model: nn.Module) -> None:
    """Make model(input_ids, attention_mask, labels) return {"logps": (batch, length - 1)}.

    It replaces the inner forward, so that wrappers (DDP's gradient hooks, FSDP's gathering) still see a forward pass.
    """
    inner = causal_lm(model)
    head = inner.get_output_embeddings()
    if hasattr(head, "lora_A"):
        raise UserFault("lora.target_modules: no adapter on lm_head; the losses read its weight directly")
    inner.forward = types.MethodType(_logps_forward, inner)


# ------------------------------------------------------------------ preference losses


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, in the form that keeps precision (Maechler 2012, Rmpfr note, eq. 7)."""
    near_zero = x > -0.6931472
    safe = torch.where(near_zero, x, torch.full_like(x, -1.0))
    return torch.where(near_zero, (-torch.expm1(safe)).log(), torch.log1p(-torch.where(near_zero, -1.0, x).exp()))


def orpo_odds_loss(chosen: Tensor, rejected: Tensor, chosen_len: Tensor, rejected_len: Tensor,
                   length_penalty: float = 0.0) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-log sigmoid of the log odds ratio (Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7), and the log odds ratio.

    chosen, rejected: (pairs,) mean log-probability per answer token; *_len: (pairs,) answer lengths in tokens.

    With a penalty, length_penalty * (chosen_len - rejected_len) / max(both) is added inside the sigmoid: the part of a
    preference that length alone explains is taken as given, so it is not learned. The sign is R-DPO's (Park et al.
    2024, arXiv 2403.19159): the implicit reward of a length-regularised optimum is log-ratio + alpha * length.
    Normalising by the longer answer keeps the term in [-penalty, penalty].
    """
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    by_length = (chosen_len - rejected_len) / torch.maximum(chosen_len, rejected_len)
    return -F.logsigmoid(log_odds + length_penalty * by_length), log_odds


def ld_weights(answer_mask: Tensor, ld_alpha: float) -> Tensor:
    """Weight of each position's log-probability under LD-DPO (Liu et al. 2024, arXiv 2409.06411), as in TRL.

    answer_mask: (2 x pairs, positions), chosen rows first. 1 on the answer tokens that both answers of a pair are long
    enough to have (the first min(len chosen, len rejected) of each), ld_alpha on the longer one's rest, 0 elsewhere.
    """
    lengths = answer_mask.sum(1)
    shared = lengths.view(2, -1).amin(0).repeat(2)
    beyond = answer_mask.cumsum(1) > shared[:, None]
    return answer_mask * torch.where(beyond, ld_alpha, 1.0)


def dpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float,
    length_gap: Tensor | float = 0.0, length_penalty: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7). All (pairs,): answer log-probabilities of policy and
    reference (zeros for a uniform reference), summed, or per token for TRL's sigmoid_norm. Returns (losses, chosen
    rewards, rejected rewards); the rewards are beta x log-ratio, without the length term.

    length_gap: answer tokens of chosen - rejected. R-DPO (Park et al. 2024, arXiv 2403.19159) maximises
    reward(y) - length_penalty * len(y) - beta * KL(policy, reference). The optimum is policy(y) = reference(y) *
    exp((reward(y) - length_penalty * len(y)) / beta) / Z, so reward(y) = beta * log-ratio(y) + length_penalty * len(y)
    + beta * log Z, and in Bradley and Terry's sigmoid(reward chosen - reward rejected) stands
    beta * (log-ratio chosen - log-ratio rejected) + length_penalty * length_gap. The sign is plus: what a longer
    chosen answer owes to its length is granted to it from outside, and the policy has the less to learn.
    """
    chosen_reward, rejected_reward = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    margin = chosen_reward - rejected_reward + length_penalty * length_gap
    return -F.logsigmoid(margin), chosen_reward, rejected_reward
