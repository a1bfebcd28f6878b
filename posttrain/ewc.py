"""
Elastic weight consolidation over the matrices that a LoRA adapter changes (Kirkpatrick et al. 2017, arXiv 1612.00796).

The weights that move are W + dW with dW = scale x B A, so they are what is held: weight / 2 x sum of F x dW^2 (eq. 3,
with the base as the old task's optimum). Not A and B themselves: at the start B is 0, so the slope of every
log-probability with respect to A, and with it A's Fisher information, is 0, and that of B depends on a random A.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from posttrain import kl, losses, model, runs
from posttrain.chat import IGNORED
from posttrain.forgetting_blocks import Ewc

Fisher = dict[str, Tensor]  # "<layer>.full", or "<layer>.rows" and "<layer>.columns"


class _Tap(torch.autograd.Function):
    """Hands a layer's input and the slope at its output to `take`. An autograd function, so that a checkpointed layer's
    input is recomputed like everything else."""

    @staticmethod
    def forward(ctx, output: Tensor, entered: Tensor, take):
        ctx.save_for_backward(entered)
        ctx.take = take
        return output.view_as(output)

    @staticmethod
    def backward(ctx, slope: Tensor):
        ctx.take(ctx.saved_tensors[0], slope)
        return slope, None, None


def fisher_diagonal(lm: nn.Module, rows: list[dict], kind: Literal["factored", "full"], seed: int) -> Fisher:
    """Diagonal of the Fisher information of the base's adapted matrices, per trained token of `rows`.

    rows: {"input_ids", "labels"}. A row's answers are drawn anew from the base at every trained position (with the
    row's own text before it): the Fisher information is an expectation under the model, and with the answers of the
    data it would be another matrix (Kunstner et al. 2019, arXiv 1905.12558). The draws of a row are independent given
    its text, so the square of its summed slope has the sum of its tokens' F as its mean.

    full: (out, in) of each layer. factored: rows (out,) and columns (in,), whose outer product has the row sums and
    column sums of the full one (Shazeer and Stern 2018, arXiv 1804.04235, section 3). One (out, in) float32 matrix is
    alive at a time. Leaves the model as it was.
    """
    from tqdm import tqdm

    inner, layers = losses.causal_lm(lm), kl.adapter_layers(lm)
    where = next(lm.parameters()).device
    sums: dict[str, list[Tensor]] = {}
    scale = 1024.0 if inner.dtype == torch.float16 else 1.0  # small slopes would be 0 in float16

    def tap(name: str):
        def take(entered: Tensor, slope: Tensor) -> None:
            square = (slope.flatten(0, -2).float().T @ entered.flatten(0, -2).float()).square_()
            parts = [square] if kind == "full" else [square.sum(1), square.sum(0)]
            for total, part in zip(sums.setdefault(name, [torch.zeros_like(p) for p in parts]), parts, strict=True):
                total += part

        return lambda _, given, output: _Tap.apply(output, given[0], take)

    hooks = [layer.get_base_layer().register_forward_hook(tap(name)) for name, layer in layers.items()]
    hooks.append(inner.get_input_embeddings().register_forward_hook(lambda *args: args[2].requires_grad_()))
    generator = torch.Generator(where).manual_seed(seed)
    autocast = torch.autocast(where.type, inner.dtype, enabled=inner.dtype != torch.float32)
    tokens, head = 0, inner.get_output_embeddings().weight
    try:
        with kl.without_adapter(list(layers.values())), torch.enable_grad():
            for row in tqdm(rows, "fisher", disable=None if runs.main_process() else True):
                ids, labels = (torch.tensor([row[key]], device=where) for key in ("input_ids", "labels"))
                with autocast:
                    hidden = inner.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
                    trained = labels[:, 1:] != IGNORED
                    drawn = torch.full_like(labels[:, 1:], IGNORED)
                    drawn[trained] = _draw(hidden.detach()[trained], head, generator)
                    logps = losses.token_logps(hidden, head, drawn)
                (scale * logps.sum()).backward()
                tokens += int(trained.sum())
    finally:
        for hook in hooks:
            hook.remove()
    return _per_token(sums, tokens * scale**2)


def _draw(hidden: Tensor, head: Tensor, generator: torch.Generator) -> Tensor:
    """A next token for each row of `hidden`, from the model's own distribution."""
    chunk = max(16, kl.CHUNK_BYTES // (4 * head.shape[0]))
    drawn = [torch.multinomial((part.to(head.dtype) @ head.T).float().softmax(-1), 1, generator=generator)[:, 0]
             for part in hidden.split(chunk)]  # fmt: skip
    return torch.cat(drawn)


def _per_token(sums: dict[str, list[Tensor]], tokens: float) -> Fisher:
    fisher = {}
    for name, parts in sums.items():
        if len(parts) == 1:
            fisher[f"{name}.full"] = (parts[0] / tokens).cpu()
        else:  # F is about rows x columns / total
            fisher[f"{name}.rows"] = (parts[0] / tokens).cpu()
            fisher[f"{name}.columns"] = (parts[1] / parts[1].sum().clamp(min=1e-30)).cpu()
    return fisher


def stored_fisher(lm: nn.Module, rows: list[dict], ewc: Ewc, seed: int, checkpointing: bool, store: Path) -> Fisher:
    """fisher_diagonal, kept in `store` so that a resumed run has the very same one. `rows` are the replay rows to
    estimate it on. Raises UserFault for a run that trains more than B and A."""
    kl.only_these_are_trained(lm, ("lora_A", "lora_B"), "ewc")
    asked = [ewc.fisher, seed, [[row["input_ids"], row["labels"]] for row in rows]]
    content = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    fisher = _read(store, content)
    if fisher is None:
        if not getattr(lm, "is_loaded_in_4bit", False):
            lm.to(model.device())
        was_training, inner = lm.training, losses.causal_lm(lm)
        lm.train()  # in evaluation mode bitsandbytes repacks 4-bit weights on some CPUs, and nothing is checkpointed
        if checkpointing:
            inner.gradient_checkpointing_enable({"use_reentrant": False})
        fisher = fisher_diagonal(lm, rows, ewc.fisher, seed)
        if checkpointing:
            inner.gradient_checkpointing_disable()
        lm.train(was_training)
        if runs.main_process():
            store.parent.mkdir(parents=True, exist_ok=True)
            part = store.with_name(f".{store.name}.part")
            save_file(fisher, part, {"content": content})
            os.replace(part, store)
    return fisher


def _read(store: Path, content: str) -> Fisher | None:
    """The stored diagonal, or None if there is none, it is damaged, or it is of other rows."""
    try:
        with safe_open(store, "pt") as file:
            if (file.metadata() or {}).get("content") != content:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except (OSError, SafetensorError):
        return None


def memory_bytes(fisher: Literal["factored", "full"], skeleton: nn.Module, target_modules: list[str]) -> int:
    """What the diagonal takes on the card: 4 bytes for each adapted weight, or for each row and column."""
    shapes = [module.weight.shape for name, module in skeleton.named_modules()
              if isinstance(module, nn.Linear) and name.rpartition(".")[2] in target_modules]  # fmt: skip
    return 4 * sum(shape.numel() if fisher == "full" else sum(shape) for shape in shapes)


class _FullPenalty(torch.autograd.Function):
    """sum of F x (scale B A)^2. Both slopes are taken at once, so that no change of a matrix outlives its layer."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, fisher: Tensor, scale: float) -> Tensor:
        change = (b @ a).mul_(scale)
        held = fisher * change
        ctx.save_for_backward(2 * scale * (b.T @ held), 2 * scale * (held @ a.T))
        return held.mul_(change).sum()

    @staticmethod
    def backward(ctx, grad: Tensor):
        slope_a, slope_b = ctx.saved_tensors
        return grad * slope_a, grad * slope_b, None, None


class EwcPenalty:
    """weight / 2 x sum of F x dW^2 of an adapted model as it stands, in float32.

    With the factored diagonal dW is not formed: sum_ij u_i v_j (s B A)_ij^2 = s^2 sum of (B' diag(u) B) x
    (A diag(v) A'), element by element, and both are r x r.
    """

    def __init__(self, lm: nn.Module, fisher: Fisher, weight: float):
        self.weight, self.layers = weight, kl.adapter_layers(lm)
        self.fisher = {name: tensor.to(model.device()) for name, tensor in fisher.items()}

    def __call__(self) -> Tensor:
        with torch.autocast(model.device().type, enabled=False):
            return self.weight / 2 * sum(self._of(name, layer) for name, layer in self.layers.items())

    def _of(self, name: str, layer: nn.Module) -> Tensor:
        adapter = layer.active_adapters[0]
        a, b = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()
        scale = layer.scaling[adapter]
        if f"{name}.full" in self.fisher:
            return _FullPenalty.apply(a, b, self.fisher[f"{name}.full"], scale)
        u, v = self.fisher[f"{name}.rows"], self.fisher[f"{name}.columns"]
        return scale**2 * ((b.T @ (u[:, None] * b)) * ((a * v) @ a.T)).sum()
