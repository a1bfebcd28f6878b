"""The distance of a tuned model to its base, token by token, without batch x length x vocabulary."""

import contextlib
import types
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from posttrain import losses
from posttrain.chat import IGNORED
from posttrain.errors import UserFault

CHUNK_BYTES = 128 * 2**20  # float32 logits of one model alive at a time; about three times as much with temporaries


class _ChunkedKl(torch.autograd.Function):
    """KL of two next-token distributions per row. The head is frozen, so the slope of each row with respect to the
    policy's hidden state is taken while its logits are there, and the backward pass only scales it."""

    @staticmethod
    def forward(ctx, hidden: Tensor, base_hidden: Tensor, weight: Tensor, chunk: int, reverse: bool) -> Tensor:
        kls, slopes = [], []
        for rows, base_rows in zip(hidden.split(chunk), base_hidden.split(chunk), strict=True):
            policy = (rows @ weight.T).float().log_softmax(-1)
            base = (base_rows @ weight.T).float().log_softmax(-1)
            if reverse:
                gap, slope = policy - base, policy.exp()
                kls.append((slope * gap).sum(-1))
                slope.mul_(gap.sub_(kls[-1][:, None]))  # d KL(p || b) / d logits = p (log p - log b - KL)
            else:
                gap, likely = base - policy, base.exp_()
                kls.append(gap.mul_(likely).sum(-1))
                slope = policy.exp_().sub_(likely)  # d KL(b || p) / d logits = p - b
            if ctx.needs_input_grad[0]:
                slopes.append(slope.to(weight.dtype) @ weight)
        ctx.save_for_backward(*([torch.cat(slopes)] if slopes else []))
        return torch.cat(kls) if kls else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad: Tensor):
        slopes = ctx.saved_tensors
        return (slopes[0] * grad[:, None]).to(slopes[0].dtype) if slopes else None, None, None, None, None


def token_kl(hidden: Tensor, base_hidden: Tensor, weight: Tensor, held: Tensor,
             direction: Literal["forward", "reverse"] = "forward", chunk: int | None = None) -> Tensor:  # fmt: skip
    """KL divergence in nats between base and policy at each held position; gradients reach `hidden` alone.

    hidden, base_hidden: (batch, length, width), the last hidden states of policy and base.
    weight: (vocabulary, width) of the output head that both share, frozen.
    held: (batch, length) bool.
    direction: forward is KL(base || policy), reverse KL(policy || base).
    chunk: positions whose logits are there at a time; None takes as many as CHUNK_BYTES hold.
    Returns (batch, length) float32, 0 where not held.
    """
    out = torch.zeros(held.shape, dtype=torch.float32, device=hidden.device)
    device, chunk = hidden.device.type, chunk or max(16, CHUNK_BYTES // (4 * weight.shape[0]))
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    rows, base_rows, weight = hidden[held].to(dtype), base_hidden[held].to(dtype), weight.detach().to(dtype)
    with torch.autocast(device, enabled=False):
        return out.masked_scatter(held, _ChunkedKl.apply(rows, base_rows, weight, chunk, direction == "reverse"))


@contextlib.contextmanager
def without_adapter(layers: list[nn.Module]) -> Iterator[None]:
    """The bare base. As PEFT's disable_adapter(), which walks over every module of the model at each call."""
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def adapter_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The adapted layers of the causal LM inside a PEFT model, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    named = losses.causal_lm(model).named_modules()
    return {name: module for name, module in named if isinstance(module, BaseTunerLayer)}


def only_these_are_trained(model: nn.Module, names: tuple[str, ...], key: str) -> None:
    """UserFault if something else is trained, as a continued adapter may ask for: then the base is not held by it."""
    others = [n for n, p in model.named_parameters() if p.requires_grad and not any(name in n for name in names)]
    if others:
        raise UserFault(f"{key}: the continued adapter trains {others[0]} too (biases, or DoRA with ewc), which {key} "
                        f"cannot hold; train a new adapter, or set {key}=null")  # fmt: skip


def return_logps_and_kl(model: nn.Module, direction: Literal["forward", "reverse"]) -> None:
    """As losses.return_logps, and while training also {"kl": (batch, length - 1), "held": how many tokens it covers}.

    Held are the trained tokens, or those of them that `held` (batch, length) names. The base's pass comes first, so
    that the adapters are on when the backward pass recomputes a checkpointed layer. It stays in training mode: in
    evaluation mode bitsandbytes repacks 4-bit weights on some CPUs (model.release_4bit). NEFTune's noise is left out.
    """
    only_these_are_trained(model, ("lora_",), "kl_to_base")
    losses.return_logps(model)
    inner, layers = losses.causal_lm(model), list(adapter_layers(model).values())

    def forward(self, labels: Tensor, held: Tensor | None = None, **inputs: Any) -> dict[str, Tensor]:
        given = {name: value for name, value in inputs.items() if value is not None} | {"use_cache": False}
        counted = (labels != IGNORED if held is None else held & (labels != IGNORED))[:, 1:]
        holds = self.training and (held is None or bool(counted.any()))
        if holds:
            embeddings = self.get_input_embeddings().eval()
            with torch.no_grad(), without_adapter(layers):
                base_hidden = self.get_decoder()(**given).last_hidden_state
            embeddings.train()
        hidden = self.get_decoder()(**given).last_hidden_state
        head = self.get_output_embeddings().weight
        out = {"logps": losses.token_logps(hidden[:, :-1], head, labels[:, 1:])}
        if holds:
            out["kl"] = token_kl(hidden[:, :-1], base_hidden[:, :-1], head, counted, direction)
            out["held"] = counted.sum()
        return out

    inner.forward = types.MethodType(forward, inner)
