"""ORPO and DPO against TRL's own, on the same batch; what the length penalty and the step's size do."""

import pytest
import torch
from conftest import pairs
from transformers import AutoModelForCausalLM, TrainingArguments

from posttrain import blocks, chat, model
from posttrain.losses import dpo_loss, orpo_odds_loss
from posttrain.preference import PairCollator, PreferenceTrainer, add_reference, answer_sums
from posttrain.stages import TrainDpo, TrainOrpo


@pytest.fixture
def tokenizer(base):
    return model.load_tokenizer(base)


def lora_model(base, dropout=0.0, seed=0):
    """A base with an adapter that already does something (B is zero at birth)."""
    torch.manual_seed(seed)
    peft_model = model.new_adapter(model.load_base(base), blocks.Lora(r=4, dropout=dropout))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return peft_model


def trainer_for(cfg, lm, rows, tokenizer, tmp_path, score_prompts=False, micro=4, accumulation=1, steps=1):
    args = TrainingArguments(str(tmp_path / "run"), per_device_train_batch_size=micro, max_steps=steps, use_cpu=True,
                             gradient_accumulation_steps=accumulation, bf16=False, report_to=[], logging_steps=1,
                             remove_unused_columns=False, learning_rate=1e-2, lr_scheduler_type="constant",
                             save_strategy="no", disable_tqdm=True, optim="sgd")  # fmt: skip
    return PreferenceTrainer(cfg, model=lm, args=args, train_dataset=rows, processing_class=tokenizer,
                             data_collator=PairCollator(tokenizer, score_prompts))  # fmt: skip


def gradients(lm) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in lm.parameters() if p.grad is not None])


def test_orpo_equals_trl(base, tokenizer, tmp_path):
    """nll_on all and no length penalty: TRL's loss within 1e-5 and its gradients within 1e-4, on the same batch."""
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    rows = chat.encode_pairs(tokenizer, pairs(4), 128, "drop").rows
    cfg = TrainOrpo(beta=0.2, length_penalty=0.0, nll_on="all")
    ours = trainer_for(cfg, lora_model(base), rows, tokenizer, tmp_path, score_prompts=True)
    batch = PairCollator(tokenizer, True)(rows)
    loss = ours.compute_loss(ours.model, batch)
    loss.backward()

    reference = lora_model(base)
    args = ORPOConfig(str(tmp_path / "trl"), beta=0.2, use_cpu=True, bf16=False, report_to=[], max_length=256)
    example = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    theirs = ORPOTrainer(model=reference, args=args, train_dataset=example, processing_class=tokenizer)
    half, answers = len(rows), torch.nn.functional.pad(batch["answer_mask"], (1, 0))
    their_batch = {}
    for side, part in (("chosen", slice(0, half)), ("rejected", slice(half, None))):
        their_batch[f"{side}_input_ids"] = batch["input_ids"][part]
        their_batch[f"{side}_attention_mask"] = batch["attention_mask"][part]
        their_batch[f"{side}_labels"] = batch["input_ids"][part].masked_fill(~answers[part], -100)
    their_loss, _ = theirs.get_batch_loss_metrics(reference, their_batch)
    their_loss.backward()

    assert abs(loss.item() - their_loss.item()) < 1e-5
    mine, trls = gradients(ours.model), gradients(reference)
    assert trls.norm() > 1e-3
    assert (mine - trls).norm() / trls.norm() < 1e-4


def test_dpo_equals_trl(base, tokenizer, tmp_path):
    """The same loss and gradients as TRL's DPOTrainer with the bare base as reference."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = chat.encode_pairs(tokenizer, pairs(4), 128, "drop").rows
    cfg, bare = TrainDpo(beta=0.3), AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    add_reference(cfg, bare, tokenizer, rows, 2, tmp_path / "reference.json")
    ours = trainer_for(cfg, lora_model(base), rows, tokenizer, tmp_path)
    batch = PairCollator(tokenizer, False)(rows)
    loss = ours.compute_loss(ours.model, batch)
    loss.backward()

    reference = lora_model(base)
    args = DPOConfig(str(tmp_path / "trl"), beta=0.3, use_cpu=True, bf16=False, report_to=[])
    example = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    theirs = DPOTrainer(model=reference, ref_model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
                        args=args, train_dataset=example, processing_class=tokenizer)  # fmt: skip
    completion = torch.nn.functional.pad(batch["answer_mask"], (1, 0)).long()
    their_loss = theirs.compute_loss(reference, {"input_ids": batch["input_ids"], "completion_mask": completion,
                                                 "attention_mask": batch["attention_mask"]})  # fmt: skip
    their_loss.backward()

    assert abs(loss.item() - their_loss.item()) < 1e-5
    assert (gradients(ours.model) - gradients(reference)).norm() / gradients(reference).norm() < 1e-4


def test_first_dpo_step_has_no_margin(base, tokenizer, tmp_path):
    """The reference is the policy at the start: margin 0, loss ln 2."""
    rows = chat.encode_pairs(tokenizer, pairs(6), 128, "drop").rows
    lm, cfg = lora_model(base), TrainDpo()
    add_reference(cfg, lm, tokenizer, rows, 4, tmp_path / "reference.json")
    ours = trainer_for(cfg, lm, rows, tokenizer, tmp_path)
    loss = ours.compute_loss(ours.model, PairCollator(tokenizer, False)(rows))
    assert loss.item() == pytest.approx(0.6931472, abs=1e-5)
    assert len({row["ref_chosen"] for row in rows}) > 1


def test_reference_free_has_a_uniform_reference(base, tokenizer, tmp_path):
    rows = chat.encode_pairs(tokenizer, pairs(3), 128, "drop").rows
    cfg = TrainDpo(reference_free=True, beta=0.1)
    add_reference(cfg, None, tokenizer, rows, 4, tmp_path / "none.json")
    lm = lora_model(base)
    ours = trainer_for(cfg, lm, rows, tokenizer, tmp_path)
    batch = PairCollator(tokenizer, False)(rows)
    chosen, rejected = answer_sums(ours.model, batch)[0].chunk(2)
    expected = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
    assert ours.compute_loss(ours.model, batch).item() == pytest.approx(expected.item(), abs=1e-6)
    assert not (tmp_path / "none.json").exists()


def test_accumulation_does_not_change_the_step(base, tokenizer, tmp_path):
    """Micro-batch 1 x accumulation 6 gives the adapter of micro-batch 6 x 1, the likelihood term included."""
    adapters = []
    for micro, accumulation in ((6, 1), (1, 6)):
        rows = chat.encode_pairs(tokenizer, pairs(6), 128, "drop").rows
        lm = lora_model(base)
        trainer_for(TrainOrpo(), lm, rows, tokenizer, tmp_path, micro=micro, accumulation=accumulation).train()
        adapters.append(torch.cat([p.detach().flatten() for p in lm.parameters() if p.requires_grad]))
    before = torch.cat([p.detach().flatten() for p in lora_model(base).parameters() if p.requires_grad])
    assert (adapters[0] - before).norm() > 1e-3
    assert (adapters[0] - adapters[1]).abs().max() < 1e-5


def test_length_penalty_takes_length_out_of_the_gradient():
    """A pair whose chosen answer is only longer pulls less with the penalty; one whose chosen is shorter pulls more."""
    for chosen_len, weaker in ((90.0, True), (30.0, False)):
        pull = []
        for penalty in (0.0, 2.0):
            chosen = torch.tensor([-1.0], requires_grad=True)
            lengths = torch.tensor([chosen_len]), torch.tensor([60.0])
            orpo_odds_loss(chosen, torch.tensor([-1.0]), *lengths, penalty)[0].sum().backward()
            pull.append(abs(chosen.grad.item()))
        assert (pull[1] < pull[0]) == weaker


def test_dpo_loss_by_hand():
    losses, chosen, rejected = dpo_loss(*(torch.tensor([x]) for x in (-5.0, -9.0, -6.0, -8.0)), beta=0.5)
    assert (chosen.item(), rejected.item()) == (0.5, -0.5)
    assert losses.item() == pytest.approx(0.3132617, abs=1e-6)  # -log sigmoid(1)
