"""ORPO and DPO against TRL's own, on the same batch; what length control and the step's size do."""

import math

import pytest
import torch
from conftest import pairs, questions
from transformers import AutoModelForCausalLM, TrainingArguments

from posttrain import blocks, chat, model
from posttrain.config import ROOT, load_config
from posttrain.errors import CheckFailed, UserFault
from posttrain.losses import dpo_loss, ld_weights, orpo_odds_loss
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


def trainer_for(cfg, lm, rows, tokenizer, tmp_path, score_prompts=False, micro=4, accumulation=1, steps=1,
                optim="sgd", learning_rate=1e-2):  # fmt: skip
    args = TrainingArguments(str(tmp_path / "run"), per_device_train_batch_size=micro, max_steps=steps, use_cpu=True,
                             gradient_accumulation_steps=accumulation, bf16=False, report_to=[], logging_steps=1,
                             remove_unused_columns=False, learning_rate=learning_rate, lr_scheduler_type="constant",
                             save_strategy="no", disable_tqdm=True, optim=optim)  # fmt: skip
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


@pytest.mark.parametrize("options", [{}, {"ld_alpha": 0.0}, {"ld_alpha": 0.4}, {"loss_type": "sigmoid_norm"}], ids=str)
def test_dpo_equals_trl(base, tokenizer, tmp_path, options):
    """The same loss and gradients as TRL's DPOTrainer with the bare base as reference, length control included."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    records = pairs(4)
    records[1] |= {"chosen": records[1]["rejected"], "rejected": records[1]["chosen"]}
    rows = chat.encode_pairs(tokenizer, records, 128, "drop").rows
    gaps = [len(row["chosen_ids"]) - len(row["rejected_ids"]) for row in rows]
    assert min(gaps) < 0 < max(gaps)
    cfg, bare = TrainDpo(beta=0.3, **options), AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows = add_reference(cfg, bare, tokenizer, rows, 2, tmp_path / "reference.json")
    ours = trainer_for(cfg, lora_model(base), rows, tokenizer, tmp_path)
    batch = PairCollator(tokenizer, False)(rows)
    loss = ours.compute_loss(ours.model, batch)
    loss.backward()

    reference = lora_model(base)
    args = DPOConfig(str(tmp_path / "trl"), beta=0.3, use_cpu=True, bf16=False, report_to=[], **options)
    example = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    theirs = DPOTrainer(model=reference, ref_model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
                        args=args, train_dataset=example, processing_class=tokenizer)  # fmt: skip
    completion = torch.nn.functional.pad(batch["answer_mask"], (1, 0)).long()
    their_loss = theirs.compute_loss(reference, {"input_ids": batch["input_ids"], "completion_mask": completion,
                                                 "attention_mask": batch["attention_mask"]})  # fmt: skip
    their_loss.backward()

    assert abs(loss.item() - their_loss.item()) < 1e-5
    assert gradients(reference).norm() > 1e-3
    assert (gradients(ours.model) - gradients(reference)).norm() / gradients(reference).norm() < 1e-4


def test_first_dpo_step_has_no_margin(base, tokenizer, tmp_path):
    """The reference is the policy at the start: margin 0, loss ln 2."""
    rows = chat.encode_pairs(tokenizer, pairs(6), 128, "drop").rows
    lm, cfg = lora_model(base), TrainDpo()
    rows = add_reference(cfg, lm, tokenizer, rows, 4, tmp_path / "reference.json")
    ours = trainer_for(cfg, lm, rows, tokenizer, tmp_path)
    loss = ours.compute_loss(ours.model, PairCollator(tokenizer, False)(rows))
    assert loss.item() == pytest.approx(0.6931472, abs=1e-5)
    assert len({row["ref_chosen"] for row in rows}) > 1


def test_an_answer_without_tokens_is_an_error(tokenizer):
    rows = chat.encode_pairs(tokenizer, pairs(2), 128, "drop").rows
    with pytest.raises(CheckFailed, match="without tokens"):
        PairCollator(tokenizer, False)([rows[0], {**rows[1], "rejected_ids": []}])


def test_reference_free_has_a_uniform_reference(base, tokenizer, tmp_path):
    rows = chat.encode_pairs(tokenizer, pairs(3), 128, "drop").rows
    cfg = TrainDpo(reference_free=True, beta=0.1)
    rows = add_reference(cfg, None, tokenizer, rows, 4, tmp_path / "none.json")
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


def answered(tokenizer, answers: list[tuple[str, str]], prompts: list[str]) -> list[dict]:
    """A row for each prompt and each (chosen, rejected)."""
    records = [{"id": f"{i}-{q}", "source": "made", "meta": {}, "prompt": [{"role": "user", "content": q}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}]}
               for i, (chosen, rejected) in enumerate(answers) for q in prompts]  # fmt: skip
    return chat.encode_pairs(tokenizer, records, 128, "drop").rows


LONG, SHORT, GOOD, BAD = "cd" * 6, "cd", "aaaa", "bbbb"  # a token a letter: LONG has 10 more than SHORT


def length_margins(stage, cls, sets, base, tokenizer, tmp_path) -> tuple[float, float, float]:
    """Train with a stage's YAML and `sets` on prompts with LONG over SHORT three times, SHORT over LONG once, and GOOD
    over BAD once. Returns the logit of LONG over SHORT on other prompts before and after, and of GOOD over BAD after.
    """
    cfg = load_config(cls, ROOT / f"configs/{stage}.yaml", ["hardware=cpu", *sets]).config
    seen, unseen = ([question for question, _ in questions(5, seed)] for seed in (1, 2))
    train = answered(tokenizer, [(LONG, SHORT)] * 3 + [(SHORT, LONG), (GOOD, BAD)], seen)
    length, content = answered(tokenizer, [(LONG, SHORT)], unseen), answered(tokenizer, [(GOOD, BAD)], unseen)
    assert len(length[0]["chosen_ids"]) - len(length[0]["rejected_ids"]) == 10
    torch.manual_seed(0)
    plain = model.load_base(base)
    plain.get_input_embeddings().weight.data *= 5  # the tied head of a new base is too flat for a preference
    lm = model.new_adapter(plain, blocks.Lora(r=4, dropout=0.0))
    if stage == "dpo":
        train, length, content = (add_reference(cfg, lm, tokenizer, part, 8, tmp_path / "reference.json")
                                  for part in (train, length, content))  # fmt: skip
    trainer = trainer_for(cfg, lm, train, tokenizer, tmp_path, micro=len(train), steps=60, optim="adamw_torch",
                          learning_rate=3e-3)  # fmt: skip
    logit = "eval_rewards/margins" if stage == "dpo" else "eval_log_odds"
    before = trainer.evaluate(length)[logit]
    trainer.train()
    return before, trainer.evaluate(length)[logit], trainer.evaluate(content)[logit]


@pytest.mark.parametrize(("stage", "cls", "beta", "penalty"), [
    ("dpo", TrainDpo, 0.2, math.log(3) / 10),  # a token
    ("orpo", TrainOrpo, 20, math.log(3) * 13 / 10),  # x the relative difference; beta: the odds term, not likelihood
])  # fmt: skip
def test_a_length_only_preference_is_not_learned(base, tokenizer, tmp_path, stage, cls, beta, penalty):
    """Without a penalty the policy learns the log-odds of the data, ln 3; with the penalty that explains them (the rule
    in the docstring of dpo's length_penalty) nothing of length, and content all the same."""
    (_, learned, content), (before, held, content_held) = (
        length_margins(stage, cls, [f"beta={beta}", f"length_penalty={x}"], base, tokenizer, tmp_path)
        for x in (0.0, penalty)
    )
    assert learned == pytest.approx(math.log(3), abs=0.2) and learned > before + 0.5
    assert abs(held) < 0.3 * learned  # 0.05 to 0.21 by the last bits of the loss: 60 steps at a constant rate
    assert content_held > 0.7 * content > 1


def test_r_dpo_grants_length_what_the_data_give_it():
    """Three pairs prefer the longer answer and one the shorter, by 20 tokens: at the reference the plain loss pulls
    towards length, and with ln(3) / 20 a token the pulls cancel. The rewards do not hold the length term."""
    for penalty, pull in ((0.0, -0.25), (math.log(3) / 20, 0.0)):
        margin = torch.zeros(1, requires_grad=True)  # log-ratio of the longer answer over the shorter one
        chosen, zero = margin * torch.tensor([1.0, 1.0, 1.0, -1.0]), torch.zeros(4)
        losses, reward, _ = dpo_loss(chosen, zero, zero, zero, 1.0, torch.tensor([20, 20, 20, -20]), penalty)
        losses.mean().backward()
        assert margin.grad.item() == pytest.approx(pull, abs=1e-6) and not reward.any()


def test_ld_weights_by_hand():
    """Prompt of two, then answers of four (chosen) and two tokens; the second pair the other way round."""
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0]]).bool()
    expected = [[0, 0, 1, 1, 0.25, 0.25], [0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 1, 0.25, 0.25, 0, 0]]
    assert ld_weights(mask, 0.25).tolist() == expected
    assert (ld_weights(mask, 1.0) == mask).all()


def test_a_stored_reference_of_another_ld_alpha_is_not_used(base, tokenizer, tmp_path):
    lm, taken = lora_model(base), []
    for ld_alpha in (None, 0.5, None):
        rows = chat.encode_pairs(tokenizer, pairs(3), 128, "drop").rows
        rows = add_reference(TrainDpo(ld_alpha=ld_alpha), lm, tokenizer, rows, 4, tmp_path / "reference.json")
        taken.append([(row["ref_chosen"], row["ref_rejected"]) for row in rows])
    assert taken[0] != taken[1] and taken[0] == taken[2]


def test_two_length_controls_are_refused_beside_every_other_fault():
    sets = ["hardware=cpu", "beta=-1", "loss_type=sigmoid_norm", "length_penalty=0.01", "ld_alpha=0.5"]
    with pytest.raises(UserFault) as fault:
        load_config(TrainDpo, ROOT / "configs/dpo.yaml", sets)
    lines = str(fault.value).splitlines()
    assert "3 faults" in lines[0] and any(line.strip().startswith("beta:") for line in lines)
    for key in ("length_penalty", "ld_alpha"):
        assert any(f"{key}: not together with loss_type: sigmoid_norm" in line for line in lines)
    with pytest.raises(UserFault, match="ld_alpha: not together with length_penalty"):
        load_config(TrainDpo, ROOT / "configs/dpo.yaml", ["hardware=cpu", "length_penalty=0.01", "ld_alpha=0"])
    load_config(TrainDpo, ROOT / "configs/dpo.yaml", ["hardware=cpu", "length_penalty=0", "ld_alpha=0"])


def test_dpo_loss_by_hand():
    losses, chosen, rejected = dpo_loss(*(torch.tensor([x]) for x in (-5.0, -9.0, -6.0, -8.0)), beta=0.5)
    assert (chosen.item(), rejected.item()) == (0.5, -0.5)
    assert losses.item() == pytest.approx(0.3132617, abs=1e-6)  # -log sigmoid(1)
