"""Elastic weight consolidation: F is the mean squared slope, the penalty the plain formula, F kept with the run."""

import pytest
import torch
from conftest import chats

from posttrain import blocks, chat, ewc, kl, model
from posttrain.chat import IGNORED
from posttrain.errors import UserFault
from posttrain.forgetting_blocks import Ewc

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture
def lm(base):
    torch.manual_seed(0)
    return model.new_adapter(model.load_base(base), blocks.Lora(r=4, alpha=12, dropout=0.1, target_modules=TARGETS))


@pytest.fixture
def rows(base):
    return chat.encode_chats(model.load_tokenizer(base), chats(6), 96, "assistant", "drop").rows


def layers(lm) -> dict:
    return kl.adapter_layers(lm)


def test_f_is_the_mean_squared_slope_of_drawn_answers(lm, rows, monkeypatch):
    """Against autograd on the base's own weights, with the same answers drawn."""
    drawn = []
    draw = ewc._draw
    monkeypatch.setattr(ewc, "_draw", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    lm.train()
    full = ewc.fisher_diagonal(lm, rows, "full", seed=5)
    weights = {name: layer.get_base_layer().weight for name, layer in layers(lm).items()}
    sums, tokens = {name: 0.0 for name in weights}, 0
    for row, answers in zip(rows, drawn, strict=True):
        for weight in weights.values():
            weight.requires_grad_(True)
        with lm.disable_adapter():
            logits = lm(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        trained = torch.tensor(row["labels"][1:]) != IGNORED
        logps = logits.log_softmax(-1)[trained].gather(1, answers[:, None])
        for (name, weight), slope in zip(weights.items(), torch.autograd.grad(logps.sum(), list(weights.values())),
                                         strict=True):  # fmt: skip
            sums[name] = sums[name] + slope**2
            weight.requires_grad_(False)
        tokens += int(trained.sum())
    assert len(full) == len(weights) == 4
    for name in weights:
        assert torch.allclose(full[f"{name}.full"], sums[name] / tokens, rtol=1e-3, atol=1e-9)
    factored = ewc.fisher_diagonal(lm, rows, "factored", seed=5)
    for name in weights:
        outer = factored[f"{name}.rows"][:, None] * factored[f"{name}.columns"]
        assert torch.allclose(outer.sum(0), full[f"{name}.full"].sum(0), rtol=1e-3, atol=1e-9)
        assert torch.allclose(outer.sum(1), full[f"{name}.full"].sum(1), rtol=1e-3, atol=1e-9)
    assert all(p.requires_grad == ("lora" in n) for n, p in lm.named_parameters())


@pytest.mark.parametrize("kind", ["full", "factored"])
def test_penalty_and_slopes_are_those_of_the_plain_formula(kind, lm):
    """weight / 2 x sum of F x (alpha / r x B A)^2."""
    fisher = {}
    for name, layer in layers(lm).items():
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        out, inner = layer.get_base_layer().weight.shape
        parts = {"full": torch.rand(out, inner)} if kind == "full" else {"rows": torch.rand(out),
                                                                        "columns": torch.rand(inner)}  # fmt: skip
        fisher |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    plain = 0.0
    for name, layer in layers(lm).items():
        f = fisher[f"{name}.full"] if kind == "full" else fisher[f"{name}.rows"][:, None] * fisher[f"{name}.columns"]
        change = 12 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        plain = plain + 0.7 / 2 * (f * change**2).sum()
    ours = ewc.EwcPenalty(lm, fisher, 0.7)()
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5) and ours > 1
    weights = [p for n, p in lm.named_parameters() if "lora" in n]
    for mine, true in zip(torch.autograd.grad(ours, weights), torch.autograd.grad(plain, weights), strict=True):
        assert (mine - true).norm() <= 1e-4 * true.norm()


def test_at_the_start_nothing_is_held_and_a_has_no_fisher_information(lm, rows):
    """B is 0: no change of the weights yet, and no slope with respect to A, which is why F is of the matrices."""
    assert ewc.EwcPenalty(lm, ewc.fisher_diagonal(lm.train(), rows, "factored", 0), 1.0)().item() == 0.0
    ids = torch.tensor([rows[0]["input_ids"]])
    lm(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.abs().max() == 0 for n, p in lm.named_parameters() if "lora_A" in n)
    assert all(p.grad.abs().max() > 0 for n, p in lm.named_parameters() if "lora_B" in n)


def test_checkpointed_layers_give_the_same_f_and_a_stored_one_is_read(lm, rows, tmp_path, monkeypatch):
    store = tmp_path / "fisher.safetensors"
    asked = Ewc(weight=1.0, num_samples=6)
    plain = ewc.stored_fisher(lm, rows, asked, 0, False, tmp_path / "other.safetensors")
    first = ewc.stored_fisher(lm, rows, asked, 0, True, store)
    assert first.keys() == plain.keys() and all(torch.allclose(first[k], plain[k], rtol=1e-4) for k in plain)
    kept = store.read_bytes()
    monkeypatch.setattr(ewc, "fisher_diagonal", lambda *_: pytest.fail("estimated again"))
    again = ewc.stored_fisher(lm, rows, asked, 0, True, store)
    assert all(torch.equal(again[k], first[k]) for k in first) and store.read_bytes() == kept
    with pytest.raises(pytest.fail.Exception):
        ewc.stored_fisher(lm, rows[:3], asked, 0, True, store)
    store.write_bytes(kept[:100])
    with pytest.raises(pytest.fail.Exception):
        ewc.stored_fisher(lm, rows, asked, 0, True, store)


def test_what_is_trained_beside_the_matrices_is_refused(base, rows, tmp_path):
    """DoRA's lengths: a continued adapter may have them, whatever the config says."""
    lora = blocks.Lora(r=4, target_modules=TARGETS, use_dora=True)
    with pytest.raises(UserFault, match="lora_magnitude_vector"):
        lm = model.new_adapter(model.load_base(base), lora)
        ewc.stored_fisher(lm, rows, Ewc(weight=1.0), 0, False, tmp_path / "f")


@pytest.mark.parametrize("kind", ["full", "factored"])
def test_the_memory_that_the_plan_names_is_that_of_the_tensors(kind, lm, rows, base):
    fisher = ewc.fisher_diagonal(lm.train(), rows[:1], kind, 0)
    planned = ewc.memory_bytes(kind, model.skeleton(base), TARGETS)
    assert planned == sum(tensor.numel() * tensor.element_size() for tensor in fisher.values()) > 0
