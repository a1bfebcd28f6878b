"""SFT on the chunked head: the loss and gradients of plain TRL, packed or not."""

import pytest
import torch
from conftest import chats, make_base
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from posttrain import blocks, chat, losses, model
from posttrain.errors import CheckFailed
from posttrain.packed_attention import attend_by_document
from posttrain.rows import pack
from posttrain.sft import ChunkedSFTTrainer


def trainer_of(cls, base, tokenizer, rows, tmp_path, packing, **more):
    torch.manual_seed(0)
    lm = model.new_adapter(model.load_base(base), blocks.Lora(r=4, dropout=0.0))
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    settings = dict(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], packing=packing, max_length=96, max_steps=1,
        eval_packing=False, gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True}, optim="sgd",
        learning_rate=1.0, lr_scheduler_type="constant", save_strategy="no", disable_tqdm=True, max_grad_norm=0.0,
    )  # fmt: skip
    return cls(model=lm, args=SFTConfig(**{**settings, **more}), train_dataset=Dataset.from_list(rows),
               processing_class=tokenizer)  # fmt: skip


def gradients(trainer, rows) -> tuple[float, torch.Tensor]:
    """Loss and gradients of one batch."""
    batch = trainer.data_collator([dict(row) for row in rows])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("packing", [True, False])
def test_loss_and_gradients_are_those_of_trl(base, tmp_path, packing):
    tokenizer = model.load_tokenizer(base)
    rows = chat.encode_chats(tokenizer, chats(12), 96, "assistant", "drop").rows
    rows = pack(rows, 96) if packing else rows
    (ours, mine), (theirs, trls) = (
        gradients(trainer_of(cls, base, tokenizer, rows, tmp_path, packing), rows)
        for cls in (ChunkedSFTTrainer, SFTTrainer)
    )
    assert abs(ours - theirs) < 1e-5
    assert trls.norm() > 1e-3 and (mine - trls).norm() / trls.norm() < 1e-4


@pytest.mark.parametrize("by_document", [False, True])
def test_packed_equals_unpacked(base, tmp_path, by_document):
    """Nothing leaks between the conversations of a packed row, whether a mask or the kernel keeps them apart: loss and
    gradients are those of padded rows, and no other function than the asked one attends."""
    tokenizer = model.load_tokenizer(base)
    rows = chat.encode_chats(tokenizer, chats(12), 96, "assistant", "drop").rows
    packed = pack(rows, 96)
    assert len(packed) < len(rows) and any(len(row["seq_lengths"]) > 1 for row in packed)
    together = trainer_of(ChunkedSFTTrainer, base, tokenizer, packed, tmp_path, True)
    if by_document:
        attend_by_document(together.model)
        assert losses.causal_lm(together.model).config._attn_implementation == "sdpa_by_document"
    one = gradients(together, packed)
    apart = gradients(trainer_of(ChunkedSFTTrainer, base, tokenizer, rows, tmp_path, False), rows)
    assert abs(one[0] - apart[0]) < 1e-5
    assert (one[1] - apart[1]).norm() / apart[1].norm() < 1e-4


def test_accumulation_does_not_change_the_step(base, tmp_path):
    tokenizer = model.load_tokenizer(base)
    rows = chat.encode_chats(tokenizer, chats(8), 96, "assistant", "drop").rows
    adapters = []
    for micro, accumulation in ((8, 1), (1, 8)):
        trainer = trainer_of(ChunkedSFTTrainer, base, tokenizer, rows, tmp_path, False,
                             per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation)  # fmt: skip
        before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters() if p.requires_grad])
        trainer.train()
        adapters.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]))
    assert (adapters[0] - before).norm() > 1e-3
    assert (adapters[0] - adapters[1]).abs().max() < 1e-5


def test_a_batch_without_trained_tokens_is_an_error(base, tmp_path):
    tokenizer = model.load_tokenizer(base)
    rows = chat.encode_chats(tokenizer, chats(4), 96, "assistant", "drop").rows
    trainer = trainer_of(ChunkedSFTTrainer, base, tokenizer, rows, tmp_path, False)
    trainer.data_collator([dict(row) for row in rows])
    unlearned = [{**row, "labels": [chat.IGNORED] * len(row["labels"])} for row in rows]
    with pytest.raises(CheckFailed, match="no trained token"):
        trainer.data_collator(unlearned)


def test_adapters_of_a_4bit_base_keep_the_dtype_that_was_chosen(tmp_path):
    """TRL casts them to bfloat16, whose gradients the loss scaler of fp16 cannot unscale (a T4)."""
    path = make_base(tmp_path / "base", hidden=64)
    lm = model.new_adapter(model.load_base(path, "fp32", "nf4"), blocks.Lora(r=4))
    rows = chat.encode_chats(model.load_tokenizer(path), chats(4), 96, "assistant", "drop").rows
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_length=96,
                     dataset_kwargs={"skip_prepare_dataset": True})  # fmt: skip
    kept = {}
    for cls in (SFTTrainer, ChunkedSFTTrainer):
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        trainer = cls(model=lm, args=args, train_dataset=Dataset.from_list(rows),
                      processing_class=model.load_tokenizer(path))  # fmt: skip
        kept[cls] = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    assert kept == {SFTTrainer: {torch.bfloat16}, ChunkedSFTTrainer: {torch.float32}}
