"""The linter: every rule fires on what it is about, and stays silent on the shipped configs and on plain data."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import chats, make_base, pairs, run_here, write_rows

from posttrain import training, training_lint
from posttrain.config import ROOT, load_config
from posttrain.plan import Plan
from posttrain.stages import TRAINING_STAGES, TrainCpt, TrainDpo, TrainOrpo, TrainSft
from posttrain.training_data import Records, Rows
from posttrain.training_lint import config_notes, record_notes, row_notes, template_notes

CLASSES = {"cpt": TrainCpt, "sft": TrainSft, "orpo": TrainOrpo, "dpo": TrainDpo}


def rules(notes) -> list[str]:
    return [note.rule for note in notes]


def config(stage: str, **values):
    sets = [f"{key}={value}" for key, value in values.items()]
    return load_config(CLASSES[stage], Path(f"configs/{stage}.yaml"), ["hardware=4090", *sets]).config


# What the shipped configs are told: nothing, but where they do on purpose what their comments say. The demo's base has
# a million parameters, which take larger steps and more passes; labels need few weights.
SHIPPED = {
    "cpt": [], "sft": [], "orpo": [], "dpo": [], "recipes/own_rows": [], "recipes/small_card": [],
    "recipes/dpo_paper": [], "recipes/classification_qa": ["target_modules"],
    "demo/sft": ["learning_rate", "epochs"], "demo/orpo": [], "demo/dpo": ["learning_rate"],
}  # fmt: skip


@pytest.mark.parametrize("hardware", ["cpu", "3050", "4090"])
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs(name, hardware):
    path = ROOT / f"configs/{name}.yaml"
    stage = next(line.split()[1] for line in path.read_text().splitlines() if line.startswith("stage:"))
    cfg = load_config(TRAINING_STAGES[stage], path, [f"hardware={hardware}"]).config
    assert rules(config_notes(cfg)) == SHIPPED[name]


FIRES = {
    "lora too fast": ("sft", {"trainer.learning_rate": 6e-4}, "learning_rate"),
    "full too fast": ("sft", {"finetuning_type": "full", "model.quantization": "none", "trainer.learning_rate": 6e-5},
                      "learning_rate"),
    "cpt too fast": ("cpt", {"trainer.learning_rate": 1e-3}, "learning_rate"),
    "dpo too fast": ("dpo", {"trainer.learning_rate": 2e-4}, "learning_rate"),
    "dpo too slow": ("dpo", {"trainer.learning_rate": 1e-7}, "learning_rate"),
    "orpo too slow": ("orpo", {"trainer.learning_rate": 8e-7}, "learning_rate"),
    "four passes": ("sft", {"trainer.num_train_epochs": 4}, "epochs"),
    "q and v": ("sft", {"lora.target_modules": "[q_proj, v_proj]"}, "target_modules"),
    "no warm-up": ("sft", {"trainer.warmup_ratio": 0}, "warmup"),
    "long warm-up": ("sft", {"trainer.warmup_ratio": 0.2}, "warmup"),
    "dpo beta": ("dpo", {"beta": 0.8}, "beta"),
    "dpo per token": ("dpo", {"beta": 0.1, "loss_type": "sigmoid_norm"}, "beta"),
    "orpo beta": ("orpo", {"beta": 2}, "beta"),
}  # fmt: skip


@pytest.mark.parametrize("case", FIRES)
def test_a_config_rule_fires(case):
    stage, values, rule = FIRES[case]
    notes = config_notes(config(stage, **values))
    assert rules(notes) == [rule]
    assert len(notes[0].text) > 40


@pytest.mark.parametrize("values", [
    {"trainer.num_train_epochs": 8, "trainer.early_stopping_patience": 3},
    {"finetuning_type": "full", "model.quantization": "none", "lora.target_modules": "[q_proj]",
     "trainer.learning_rate": 2e-5},
    {"trainer.warmup_ratio": 0, "trainer.lr_scheduler_type": "constant"},
    {"lora.target_modules": "[q_proj, v_proj, o_proj]"},
])  # fmt: skip
def test_a_config_rule_knows_its_exceptions(values):
    assert config_notes(config("sft", **values)) == []


def records(train: list[dict], val: list[dict] = ()) -> Records:
    return Records(list(train), list(val), Counter(), Counter(), [], [])


def answering(answer: str, count: int, source: str = "coig") -> list[dict]:
    rows = chats(count, seed=3)
    for row in rows:
        row["source"] = source
        row["messages"][1]["content"] = answer.format(row["messages"][0]["content"])
    return rows


PLAIN = answering("{}这道题先把两个数写成一列，再从个位加起，满十进一，最后得到结果。请你照样算一遍。", 40)


def test_plain_records_are_told_nothing():
    assert record_notes(config("sft"), "sft", records(PLAIN)) == []
    chinese = [pair for pair in pairs(54) if "please" not in pair["prompt"][0]["content"]]
    for pair in chinese[::2]:
        pair["rejected"][0]["content"] += "我真的不知道这道题的答案是多少。"
    assert record_notes(config("dpo"), "pref", records(chinese[:30], chinese[30:])) == []
    assert record_notes(config("cpt"), "text", records([{"text": "一"}] * 30)) == []


def test_a_domain_alone():
    own = answering("{}答", 5, source="my")
    assert rules(record_notes(config("sft"), "sft", records(own))) == ["general_data"]
    with_replay = config("sft", replay="{files: [general.jsonl], share: 0.1}")
    assert record_notes(with_replay, "sft", records(own)) == []
    assert record_notes(config("sft"), "sft", records([*own, *PLAIN])) == []


def test_refusals():
    refusing = answering("抱歉，我无法回答这个问题，请您咨询专业人士。{}", 2)
    assert rules(record_notes(config("sft"), "sft", records([*PLAIN, *refusing]))) == ["refusals"]
    assert record_notes(config("sft"), "sft", records([*PLAIN, *PLAIN, *refusing[:1]])) == []


def test_one_opening():
    polite = answering("当然可以！下面我为您详细解答这个问题，请您耐心看完下面的每一步，谢谢您的理解：{}", 10)
    notes = record_notes(config("sft"), "sft", records([*PLAIN, *polite]))
    assert rules(notes) == ["opening"] and "10 of 50" in notes[0].text and "当然可以！下面我" in notes[0].text
    labels = answering("正面", 60)  # short answers are labels, not openings
    assert record_notes(config("sft"), "sft", records([*PLAIN, *labels])) == []


def test_longer_chosen_answers():
    longer = pairs(30)
    for number, pair in enumerate(longer):
        pair["chosen"][0]["content"] = f"{number}" + "很长的回答，" * 9
    (note,) = [n for n in record_notes(config("dpo"), "pref", records(longer)) if n.rule == "length_bias"]
    assert "length_penalty: 0.004" in note.text and "100%" in note.text
    assert "length_bias" in rules(record_notes(config("orpo"), "pref", records(longer)))
    assert "length_bias" not in rules(record_notes(config("dpo"), "pref", records(longer[:10])))


@pytest.mark.parametrize("change", [lambda q: q, lambda q: q.replace("加", "加上", 1) + "？"])
def test_the_same_question_on_both_sides(change):
    """Word for word, and nearly; a frame that all questions share is not a likeness."""
    frame = "请做下面这道两位数的加法题，先写出过程，再把结果写成一句完整的话："
    sums = [row["messages"][0]["content"] for row in chats(180, seed=5)]
    asked = [frame + "".join(sums[i : i + 6]) for i in range(0, 180, 6)]
    rows = [{"id": str(i), "source": "coig", "meta": {}, "messages": [
        {"role": "user", "content": question}, {"role": "assistant", "content": "好"}]}
        for i, question in enumerate(asked)]  # fmt: skip
    train, val = rows[:15], rows[15:]
    assert record_notes(config("sft"), "sft", records(train, val)) == []
    twin = {**train[0], "messages": [{"role": "user", "content": change(asked[0])}, train[0]["messages"][1]]}
    assert rules(record_notes(config("sft"), "sft", records(train, [*val, twin]))) == ["overlap"]


def rows(kept: int, trained: int, **fates) -> Rows:
    return Rows([], [], Counter({"kept": kept, **fates}), Counter(), [], trained, trained, [])


def test_rows():
    schedule = SimpleNamespace(epochs=1.5, steps=100)
    assert row_notes(config("sft"), rows(5000, 2_000_000, longer_than_max_length=100), schedule) == []
    assert rules(row_notes(config("sft"), rows(5000, 2_000_000, longer_than_max_length=400), schedule)) == ["too_long"]
    assert rules(row_notes(config("sft"), rows(5000, 30_000), schedule)) == ["tokens_per_step"]
    many = SimpleNamespace(epochs=6, steps=10)
    assert rules(row_notes(config("sft"), rows(400, 2_000_000), many)) == ["few_rows"]


def test_a_template_that_the_base_does_not_have(base, tmp_path):
    for where, template, found in ((base, "chatml", []), (base, "qwen2.5", ["template"]), (base, "auto", []),
                                   (make_base(tmp_path / "bare", template=None), "chatml", [])):  # fmt: skip
        cfg = config("sft", **{"model.base": where, "model.chat_template": template})
        assert rules(template_notes(cfg, training.start_from_base(cfg, "assistant"))) == found


def test_the_dry_run_shows_its_advice(base, tmp_path):
    from scripts import train_sft

    file = write_rows(tmp_path / "own.jsonl", chats(60))
    sets = {"hardware": "cpu", "model.base": base, "output_dir": tmp_path / "out", "data.train_files": f"[{file}]",
            "data.val_files": "[]", "trainer.max_length": 96, "trainer.tokens_per_step": 192,
            "trainer.learning_rate": 0.01}  # fmt: skip
    done = run_here(TrainSft, train_sft.plan, train_sft.main, "--config", "configs/sft.yaml", "--dry-run",
                    *(x for k, v in sets.items() for x in ("--set", f"{k}={v}")))  # fmt: skip
    assert done.returncode == 0, done.stdout
    advice = done.stdout.split("\nadvice\n")[1].split("\n\n")[0]
    assert "learning_rate: trainer.learning_rate 0.01 is above 0.0005" in advice
    assert "general_data: every row is of" in advice and "tokens_per_step: about" in advice


def test_every_advice_has_a_place_in_a_plan():
    assert "advice" in Plan.__dataclass_fields__["facts"].default_factory()
    assert training_lint.MAX_EPOCHS == 3
