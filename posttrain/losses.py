"""
Losses over token log-probabilities that never hold batch x length x vocabulary.

With Qwen's vocabulary of 151,936 one row of 2,048 tokens has 1.2 GB of float32 logits, and a plain loss keeps several
copies. Here the head is applied to the positions that are scored, a block of the vocabulary at a time.
"""

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.chat import IGNORED
from posttrain.errors import UserFault

# float32 logits alive at a time. On a processor they stay in its cache; a card wants few, large kernels.
BLOCK_BYTES = {"cpu": 8 * 2**20, "cuda": 128 * 2**20}


class _TokenLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[label] per row, over blocks of the vocabulary.

    The largest logit so far and the sum of exponentials to it are carried from block to block and rescaled when a
    larger logit turns up (online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3).

    With a frozen head (LoRA) the slope of each log-probability with respect to its hidden state is carried along, as
    flash attention carries its output: the backward pass only scales it, so the head costs two matrix products instead
    of three. Where the head is trained too, the logits are computed again in the backward pass.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, block: int) -> Tensor:
        count, dtype = len(hidden), hidden.dtype
        ctx.block, ctx.frozen = block, not ctx.needs_input_grad[1]
        sloped = ctx.frozen and ctx.needs_input_grad[0]
        top = torch.full((count, 1), -torch.inf, device=hidden.device)
        others, label_logit = torch.zeros_like(top), torch.zeros_like(top)
        slope = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if sloped else None
        buffer = torch.empty(count * min(block, len(weight)), dtype=dtype, device=hidden.device)
        for start in range(0, len(weight), block):
            part = weight[start : start + block].to(dtype)
            logits = buffer[: count * len(part)].view(count, len(part))
            logits = torch.mm(hidden, part.T, out=logits).float()
            here, column = _labels_of(labels, start, len(part))
            label_logit += torch.where(here, logits.gather(1, column), 0.0)
            larger = torch.maximum(top, logits.amax(1, keepdim=True))
            shrink, top = torch.exp(top - larger), larger
            # Without the label's own term, so that nothing cancels where its probability is nearly 1.
            logits.sub_(top).exp_().scatter_(1, column, logits.gather(1, column).masked_fill_(here, 0.0))
            others.mul_(shrink).add_(logits.sum(1, keepdim=True))
            if sloped:
                slope.mul_(shrink)
                slope = slope.addmm_(logits, part) if dtype == torch.float32 else slope.add_(logits.to(dtype) @ part)
        total = others + torch.exp(label_logit - top)
        logps = (label_logit - top - total.log())[:, 0]
        if sloped:  # d logp / d hidden = (1 - p) weight[label] - sum over the others of p weight
            slope.neg_().add_(weight[labels].to(dtype) * others).div_(total)
        if ctx.frozen:
            ctx.save_for_backward(*([slope.to(dtype)] if sloped else []))
        else:
            ctx.save_for_backward(hidden, weight, labels, top + total.log())
        return logps

    @staticmethod
    def backward(ctx, grad: Tensor):
        if ctx.frozen:
            (slope,) = ctx.saved_tensors
            return (slope * grad[:, None]).to(slope.dtype), None, None, None
        hidden, weight, labels, logsumexp = ctx.saved_tensors
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        grad_weight = torch.empty_like(weight)
        for start in range(0, len(weight), ctx.block):
            part = weight[start : start + ctx.block].to(hidden.dtype)
            here, column = _labels_of(labels, start, len(part))
            slope = (hidden @ part.T).float().sub_(logsumexp).exp_().neg_()
            slope = slope.scatter_add_(1, column, here.float()).mul_(grad[:, None]).to(hidden.dtype)
            grad_hidden += slope @ part
            grad_weight[start : start + ctx.block] = slope.T @ hidden
        return grad_hidden.to(hidden.dtype) if ctx.needs_input_grad[0] else None, grad_weight, None, None


def _labels_of(labels: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """(whether each row's label lies in this block of the vocabulary, its column there or 0), each (rows, 1)."""
    column = labels[:, None] - start
    here = (column >= 0) & (column < width)
    return here, torch.where(here, column, 0)


def token_logps(hidden: Tensor, weight: Tensor, labels: Tensor, block: int | None = None) -> Tensor:
    """Log-probability of each label.

    hidden: (batch, length, width), the last hidden state at the position that predicts the label.
    weight: (vocabulary, width) of the output head.
    labels: (batch, length), IGNORED where nothing is scored.
    block: columns of the vocabulary at a time; None takes as many as BLOCK_BYTES of float32 logits hold.
    Returns (batch, length) float32, 0 where the label is IGNORED.
    """
    scored = labels != IGNORED
    out = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
    rows, device = hidden[scored], hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    rows = rows.to(torch.get_autocast_dtype(device) if autocast else weight.dtype)
    if block is None:  # a multiple of 256: matrix products of odd widths are a third slower
        block = max(256, BLOCK_BYTES.get(device, 2**27) // (4 * max(1, len(rows))) // 256 * 256)
    with torch.autocast(device, enabled=False):
        return out.masked_scatter(scored, _TokenLogps.apply(rows, weight, labels[scored], block))


def causal_lm(model: nn.Module) -> nn.Module:
    """The bare causal LM inside DDP and PEFT wrappers."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _logps_forward(self, labels: Tensor, **inputs: Any) -> dict[str, Tensor]:
    """A causal LM's forward that returns log-probabilities of the labels instead of logits."""
    given = {name: value for name, value in inputs.items() if value is not None}  # PEFT passes what nobody gave as None
    hidden = self.get_decoder()(**given | {"use_cache": False}).last_hidden_state
    return {"logps": self.get_output_embeddings()(hidden[:, :-1], labels[:, 1:])}


def _head_forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
    """An output head that scores labels where they are given. It is called as a module, so that what FSDP2 and ZeRO-3
    hang on modules gathers its weight first, in the forward and in the backward pass."""
    return F.linear(hidden, self.weight, self.bias) if labels is None else token_logps(hidden, self.weight, labels)


def return_logps(model: nn.Module) -> None:
    """Make model(input_ids, attention_mask, labels) return {"logps": (batch, length - 1)}.

    It replaces the inner forward, so that wrappers (DDP's gradient hooks, FSDP's gathering) still see a forward pass.
    """
    inner = causal_lm(model)
    head = inner.get_output_embeddings()
    if hasattr(head, "lora_A"):
        raise UserFault("lora.target_modules: no adapter on lm_head; the losses read its weight directly")
    inner.forward = types.MethodType(_logps_forward, inner)
    head.forward = types.MethodType(_head_forward, head)


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
