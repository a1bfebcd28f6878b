"""Chunked log-probabilities are exact."""

import pytest
import torch

from posttrain.chat import IGNORED
from posttrain.losses import log1mexp, token_logps


@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("hidden", "weight")], ids="+".join)
@pytest.mark.parametrize("block", [1, 7, 64, None])
@pytest.mark.parametrize("masked", [0.0, 0.7, 1.0])
def test_equal_to_full_logits(block, masked, trained):
    """Within 1e-5 per token and 1e-4 relative in every gradient, whatever the block, the share of masked labels, and
    what is trained (a frozen head takes another way)."""
    torch.manual_seed(1)
    hidden = torch.randn(3, 50, 32, requires_grad="hidden" in trained)
    weight = torch.randn(500, 32, requires_grad="weight" in trained)
    leaves = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
    labels = torch.randint(0, 500, (3, 50)).masked_fill(torch.rand(3, 50) < masked, IGNORED)
    ours = token_logps(hidden, weight, labels, block)
    full = (hidden @ weight.T).log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    full = full.masked_fill(labels == IGNORED, 0.0)
    assert (ours - full).abs().max() < 1e-5
    upstream = torch.randn_like(full)
    for mine, true in zip(*(torch.autograd.grad(x, leaves, upstream) for x in (ours, full)), strict=True):
        assert (mine - true).norm() <= 1e-4 * true.norm().clamp(min=1e-12)


def test_bfloat16_head_is_near_float32():
    torch.manual_seed(1)
    hidden, weight, labels = torch.randn(1, 20, 64), torch.randn(300, 64) / 8, torch.randint(0, 300, (1, 20))
    exact = token_logps(hidden, weight, labels)
    rounded = token_logps(hidden.bfloat16(), weight.bfloat16(), labels)
    assert (exact - rounded).abs().max() < 0.1


def test_log1mexp():
    x = torch.tensor([-1e-9, -1e-3, -0.5, -0.7, -5.0, -50.0], dtype=torch.float64)
    assert torch.allclose(log1mexp(x), torch.log(-torch.expm1(x)), atol=1e-12)
    near = torch.tensor([-1e-4, -10.0], requires_grad=True)
    log1mexp(near).sum().backward()
    assert torch.isfinite(near.grad).all()
