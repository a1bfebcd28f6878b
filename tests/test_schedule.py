"""Arithmetic of steps, and what transformers makes of the same numbers."""

import pytest

from posttrain.blocks import SftTrainer, Trainer
from posttrain.errors import UserFault
from posttrain.schedule import draw, draw_chinese_share, hold_out, plan_steps


@pytest.mark.parametrize("rows, micro, per_step, epochs", [
    (100, 4, 8, 1), (101, 4, 8, 1.5), (7, 2, 4, 3), (1000, 1, 32, 1.5), (33, 3, 3, 0.5),
])  # fmt: skip
def test_steps_are_those_of_transformers(rows, micro, per_step, epochs, tmp_path):
    import torch
    from transformers import Trainer as HfTrainer
    from transformers import TrainingArguments

    planned = plan_steps(Trainer(per_device_train_batch_size=micro, sequences_per_step=per_step, min_steps=1,
                                 num_train_epochs=epochs), rows)  # fmt: skip
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=micro, num_train_epochs=epochs, use_cpu=True,
                             gradient_accumulation_steps=planned.accumulation, bf16=False, report_to=[],
                             save_strategy="no", learning_rate=0.0, disable_tqdm=True)  # fmt: skip

    class Nothing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return {"loss": self.weight.sum()}

    trainer = HfTrainer(Nothing(), args, train_dataset=[{"x": 0.0}] * rows)
    trainer.train()
    assert trainer.state.global_step == planned.steps


def test_packed_steps_count_tokens():
    """Half the length, twice the rows: the same tokens a step on another card."""
    long = plan_steps(SftTrainer(max_length=4096, tokens_per_step=65536, min_steps=1), 1000)
    short = plan_steps(SftTrainer(max_length=2048, tokens_per_step=65536, min_steps=1), 2000)
    assert (long.accumulation, short.accumulation) == (16, 32) and long.steps == short.steps


def test_a_step_that_does_not_divide_names_the_neighbours():
    with pytest.raises(UserFault, match="trainer.sequences_per_step=30 or 33"):
        plan_steps(Trainer(per_device_train_batch_size=3, sequences_per_step=32), 100)


def test_few_rows_still_give_enough_steps_and_it_is_said():
    schedule = plan_steps(Trainer(per_device_train_batch_size=2, sequences_per_step=32, num_train_epochs=3), 60)
    assert schedule.steps >= 20 and schedule.rows_per_step < 32
    assert any("trainer.min_steps" in line for line in schedule.lines("rows"))


def test_hold_out_keeps_a_question_on_one_side():
    """Two answers to one question are both trained or both held out; seeded; at least one, never all."""
    rows = [pair(f"问题{i // 2}") for i in range(50)]
    train, val = hold_out(rows, 0.1, 7)
    assert len(train) + len(val) == 50 and 5 <= len(val) <= 6 and (train, val) == hold_out(rows, 0.1, 7)
    assert not {p["prompt"][0]["content"] for p in train} & {p["prompt"][0]["content"] for p in val}
    assert hold_out(rows[:1], 0.5, 7) == (rows[:1], []) and hold_out(rows, 0.0, 7) == (rows, [])
    numbers = list(range(50))
    assert draw(numbers, 5, 1) == draw(numbers, 5, 1) != draw(numbers, 5, 2)


def pair(text):
    return {"prompt": [{"role": "user", "content": text}]}


@pytest.mark.parametrize("share, chinese, others", [
    (0.7, 28, 12), (0.5, 12, 12), (1.0, 28, 0), (0.0, 0, 12), (None, 28, 12),
])  # fmt: skip
def test_chinese_share(share, chinese, others):
    rows = [pair("这是一个中文问题")] * 28 + [pair("An English question")] * 12
    kept, line = draw_chinese_share(rows, share, 0)
    found = sum(index < 28 for index in kept)
    assert (found, len(kept) - found) == (chinese, others)
    assert str(chinese) in line and kept == sorted(set(kept))


def test_a_short_run_is_validated_five_times():
    schedule = plan_steps(Trainer(per_device_train_batch_size=1, sequences_per_step=1), 100)
    assert (schedule.every(1000), schedule.every(30)) == (20, 30)
