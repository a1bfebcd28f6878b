"""Attention of a packed row, conversation by conversation, where there is no flash attention: on a CPU."""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from posttrain import losses

NAME = "sdpa_by_document"


def attend_by_document(model: nn.Module) -> None:
    """Let a model that computes on a CPU with PyTorch's sdpa attend within each packed conversation only.

    transformers hides the others by a mask of length x length and computes them all the same: with conversations of 107
    tokens in 2,048 that is 19 times the work. Same result (tests/test_sft.py). A card keeps sdpa as it is, or has flash
    attention, which does the same by itself: many small kernels there were not measured.
    """
    inner = losses.causal_lm(model)
    on_cpu = next(inner.parameters()).device.type == "cpu" and not torch.cuda.is_available()
    if on_cpu and inner.config._attn_implementation == "sdpa":
        inner.set_attn_implementation(NAME)


def _by_document(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                 cu_seq_lens_q: Tensor | None = None, sliding_window: int | None = None, **more):  # fmt: skip
    """sdpa on each document of a row of shape (1, heads, tokens, width). cu_seq_lens_q: where documents begin and the
    last ends, from TRL's collator; without it, and where a window may cut a document, the mask decides."""
    lengths = [] if cu_seq_lens_q is None else cu_seq_lens_q.diff().tolist()
    if len(query) != 1 or sum(lengths) != query.shape[2] or (sliding_window and max(lengths) > sliding_window):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    documents = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    return torch.cat([sdpa_attention_forward(module, *one, None, **more)[0] for one in documents], 1), None


AttentionInterface.register(NAME, _by_document)
AttentionMaskInterface.register(NAME, sdpa_mask)
