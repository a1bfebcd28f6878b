"""Whether a GGUF file is the merged model: its vocabulary and template, its weights, and what llama.cpp makes of it."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from posttrain.agreement import MAX_POSITIONS, agreement
from posttrain.config import shown
from posttrain.errors import CheckFailed
from posttrain.export_folder import in_fresh_process
from posttrain.export_gguf import Gguf, read_gguf

# Layers that the converter copies as they are (of some families it reorders queries and keys), by llama.cpp's names.
COPIED = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
          "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}  # fmt: skip
# Error of a copied layer at most, as a share of its weights' root mean square: twice the rounding step of the type (of
# q8_0: half a step of the largest of 32 weights in 127, 0.5 % measured).
ROUNDING = {"f32": 1e-6, "f16": 1e-3, "bf16": 8e-3, "q8_0": 0.02}
# Mean logit difference in standard deviations, and top-1: q8_0 rounds what goes into a layer to 8 bit as well.
BOUNDS = {"f32": (0.02, 0.95), "f16": (0.02, 0.95), "bf16": (0.05, 0.90), "q8_0": (0.1, 0.85)}


def check_gguf(file: Path, outtype: str, model: Path, tokenizer) -> dict[str, Any]:
    """Read `file` back and hold it against the merged weights in `model` and the tokenizer as it is served. Returns
    {tokens, compared_layers, weight_error}. CheckFailed at the first difference."""
    found = read_gguf(file)
    _check_vocabulary(found, tokenizer)
    layers, error = _weight_error(found, model)
    if error > ROUNDING[outtype]:
        raise CheckFailed(f"{shown(file)}: its weights are not the merged ones: a layer is off by {error:.2g} of its "
                          f"size, rounding to {outtype} by {ROUNDING[outtype]:.2g} at most")  # fmt: skip
    tokens = len(found.metadata["tokenizer.ggml.tokens"])
    return {"tokens": tokens, "compared_layers": layers, "weight_error": error}


def _check_vocabulary(found: Gguf, tokenizer) -> None:
    """Template, end of turn, and (of byte-level BPE, which is stored as it is) every token by its id."""
    said = found.metadata
    tokens = said.get("tokenizer.ggml.tokens", [])
    if said.get("tokenizer.chat_template") != tokenizer.chat_template:
        raise CheckFailed(f"{shown(found.path)}: another chat template than the one that was trained")
    if said.get("tokenizer.ggml.eos_token_id") != tokenizer.eos_token_id:
        raise CheckFailed(f"{shown(found.path)}: ends its answers with token {said.get('tokenizer.ggml.eos_token_id')},"
                          f" training did with {tokenizer.eos_token_id} ({tokenizer.eos_token})")  # fmt: skip
    if len(tokens) < len(tokenizer):
        raise CheckFailed(f"{shown(found.path)}: {len(tokens)} tokens, the tokenizer has {len(tokenizer)}")
    if said.get("tokenizer.ggml.model") == "gpt2":
        wrong = [number for token, number in tokenizer.get_vocab().items() if tokens[number] != token]
        if wrong:
            raise CheckFailed(f"{shown(found.path)}: {len(wrong)} tokens differ from the tokenizer, first {wrong[0]}: "
                              f"{tokens[wrong[0]]!r}")  # fmt: skip


def _weight_error(found: Gguf, model: Path) -> tuple[int, float]:
    """(layers compared, error of the worst as a share of its root mean square)."""
    import torch
    from safetensors import safe_open

    layers, worst, missing = 0, 0.0, []
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                place = re.fullmatch(r"model\.layers\.(\d+)\.([a-z_.]+)\.weight", name)
                if place is None or place[2] not in COPIED:
                    continue
                theirs = f"blk.{place[1]}.{COPIED[place[2]]}.weight"
                if theirs not in found.tensors:
                    missing.append(theirs)
                    continue
                wanted = tensors.get_tensor(name).float()
                if found.tensors[theirs][1] != tuple(wanted.shape):
                    raise CheckFailed(f"{shown(found.path)}: {theirs} has the shape {found.tensors[theirs][1]}, the "
                                      f"merged {name} {tuple(wanted.shape)}")  # fmt: skip
                gap = torch.from_numpy(found.values(theirs)) - wanted
                layers, worst = layers + 1, max(worst, (gap.norm() / wanted.norm()).item())
    if layers and missing:  # where there is none at all, llama.cpp calls this family's layers otherwise
        raise CheckFailed(f"{shown(found.path)}: lacks {len(missing)} layers, first {missing[0]}")
    return layers, worst


# ------------------------------------------------------------------ llama.cpp itself


def ask_llama_cpp(file: Path, tokenizer, texts: list[str], rows: list[list[int]], merged: list[Any], outtype: str,
                  spread: float) -> dict[str, Any]:  # fmt: skip
    """Have llama.cpp encode `texts` (the golden and check conversations, as served) and read the check rows, where its
    package is installed. Returns {encoded, drift, bound}: the number of texts, the
    logits against those of the merged weights; both None without the package. CheckFailed where an id differs.

    merged: logits of the merged weights on the rows; spread: their standard deviation, the unit of the bound."""
    if not find_spec("llama_cpp"):
        return {"encoded": None, "drift": None}
    import torch

    ids, logits = in_fresh_process(_llama_cpp, file, texts, rows)
    for text, theirs in zip(texts, ids, strict=True):
        ours = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
            raise CheckFailed(f"{shown(file)}: llama.cpp encodes {text!r} otherwise than training did, from token {at} "
                              f"on: {theirs[at : at + 3]}, training {ours[at : at + 3]}")  # fmt: skip
    drift = agreement([torch.from_numpy(found)[:, : merged[0].shape[-1]] for found in logits], merged)
    return {"encoded": len(texts), "drift": drift,
            "bound": (BOUNDS[outtype][0] * spread, BOUNDS[outtype][1])}  # fmt: skip


def _llama_cpp(file: Path, texts: list[str], rows: list[list[int]]):
    """(ids of each text, logits of each row's last positions) by llama.cpp. In a process of its own: it may abort."""
    from llama_cpp import Llama

    length = max(map(len, rows))
    model = Llama(str(file), n_ctx=length + 8, n_batch=length, logits_all=True, n_gpu_layers=0, verbose=False)
    ids = [model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
    logits = []
    for row in rows:
        model.reset()
        model.eval(row)
        logits.append(model.scores[max(0, len(row) - MAX_POSITIONS) : len(row)].copy())
    return ids, logits
