"""The KL to the base: equal to full logits, over the right tokens, and without a trace of the base's pass."""

import pytest
import torch
from conftest import chats

from posttrain import blocks, chat, kl, losses, model
from posttrain.chat import IGNORED


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("chunk", [1, 7, None])
@pytest.mark.parametrize("share_held", [1.0, 0.3, 0.0])
def test_equal_to_full_logits(share_held, chunk, direction):
    """Within 1e-5 per token and 1e-4 relative in the gradient."""
    torch.manual_seed(1)
    hidden, base_hidden = torch.randn(3, 50, 32, requires_grad=True), torch.randn(3, 50, 32)
    weight, held = torch.randn(500, 32), torch.rand(3, 50) < share_held
    ours = kl.token_kl(hidden, base_hidden, weight, held, direction, chunk)
    policy, base = ((h @ weight.T).log_softmax(-1) for h in (hidden, base_hidden))
    first, second = (base, policy) if direction == "forward" else (policy, base)
    full = torch.where(held, (first.exp() * (first - second)).sum(-1), 0.0)
    assert (ours - full).abs().max() < 1e-5 * max(1.0, full.max().item())
    upstream = torch.randn_like(full)
    (mine,), (true,) = (torch.autograd.grad(x, hidden, upstream, allow_unused=True) for x in (ours, full))
    assert (mine - true).norm() <= 1e-4 * true.norm().clamp(min=1e-12)
    if share_held:
        assert full.max() > 0.1


def test_only_a_chunk_of_logits_is_there_at_a_time():
    """The autograd graph keeps nothing of the vocabulary's width."""
    kept = []
    hidden, base_hidden = torch.randn(1, 64, 16, requires_grad=True), torch.randn(1, 64, 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        held, head = torch.ones(1, 64, dtype=torch.bool), torch.randn(999, 16)
        kl.token_kl(hidden, base_hidden, head, held, chunk=8).sum().backward()
    assert kept and all(999 not in shape for shape in kept)


@pytest.fixture
def tuned(base):
    """(PEFT model whose adapter changes it, a padded batch of two conversations)."""
    torch.manual_seed(0)
    lm = model.new_adapter(model.load_base(base), blocks.Lora(r=4, dropout=0.1))
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    rows = chat.encode_chats(model.load_tokenizer(base), chats(2), 96, "assistant", "drop").rows
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    labels = torch.tensor([row["labels"] + [IGNORED] * (width - len(row["labels"])) for row in rows])
    return lm, {"input_ids": ids, "labels": labels}


def test_it_is_the_distance_to_the_bare_base(tuned):
    """Against PEFT's own disable_adapter and full logits; the marked tokens alone; none in evaluation mode."""
    lm, batch = tuned
    lm.train()
    for module in lm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        policy = lm(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
        with lm.disable_adapter():
            base = lm(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    trained = batch["labels"][:, 1:] != IGNORED
    full = torch.where(trained, (base.exp() * (base - policy)).sum(-1), 0.0)
    kl.return_logps_and_kl(lm, "forward")
    out = lm(**batch)
    assert full.max() > 0.005 and (out["kl"] - full).abs().max() < 1e-5 and out["held"] == trained.sum()
    held = torch.zeros_like(batch["labels"], dtype=torch.bool)
    held[1] = True
    second = lm(**batch, held=held)
    assert (second["kl"][0] == 0).all() and (second["kl"][1] - full[1]).abs().max() < 1e-5
    assert "kl" not in lm(**batch, held=torch.zeros_like(held))
    lm.eval()
    assert "kl" not in lm(**batch)


def test_the_base_pass_leaves_no_trace(tuned):
    """Adapters on, their weights trainable, the same random numbers drawn: the likelihood term is that without KL."""
    lm, batch = tuned
    lm.train()

    def step(direction) -> tuple[torch.Tensor, torch.Tensor]:
        lm.zero_grad()
        torch.manual_seed(3)
        (losses.return_logps(lm) if direction is None else kl.return_logps_and_kl(lm, direction))
        logps = lm(**batch)["logps"]
        logps.sum().backward()
        return logps.detach(), torch.cat([p.grad.flatten() for n, p in lm.named_parameters() if "lora" in n])

    plain, held = step(None), step("forward")
    assert torch.equal(plain[0], held[0]) and torch.equal(plain[1], held[1])
