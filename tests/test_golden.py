"""Golden conversations at every hand-over: a changed template or tokenizer stops whatever comes after training (4)."""

import json
import shutil
from functools import partial

import pytest
from conftest import chats, pairs, run_here, write_rows

from posttrain import export_plan
from posttrain.errors import CheckFailed
from posttrain.runs import read_json


@pytest.fixture(scope="module")
def work(base, tmp_path_factory):
    """A finished SFT run, and rows for what follows."""
    from scripts import train_sft

    work = tmp_path_factory.mktemp("golden")
    write_rows(work / "sft_train.jsonl", chats(40))
    write_rows(work / "pref_train.jsonl", pairs(20))
    values = {"model.base": base, "data.train_files": f"[{work}/sft_train.jsonl]", "trainer.tokens_per_step": 192,
              "trainer.max_steps": 2, "output_dir": work / "sft", **COMMON}  # fmt: skip
    done = run_here(train_sft.TrainSft, train_sft.plan, train_sft.main, *sets(values), "--config", "configs/sft.yaml")
    assert done.returncode == 0, done.stderr
    return work


COMMON = {"hardware": "cpu", "data.val_files": "[]", "data.val_share": 0, "trainer.max_length": 96, "tracking": "none",
          "trainer.per_device_train_batch_size": 1}  # fmt: skip


def sets(values: dict) -> list[str]:
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def changed(work, how: str):
    """A copy of the run whose template or tokenizer is not the one that it was trained with."""
    copy = work / f"sft_{how}"
    if not copy.exists():
        shutil.copytree(work / "sft", copy)
        if how == "template":
            file = copy / "chat_template.jinja"
            file.write_text(file.read_text().replace("<|im_start|>", "<|im_start|> "))
        else:
            facts = json.loads((copy / "tokenizer.json").read_text())
            (copy / "tokenizer.json").write_text(json.dumps(facts | {"normalizer": {"type": "NFKC"}}))
    return copy


def command(caller: str, work, run):
    """(stage class, plan, main, arguments) of what comes after training."""
    import importlib

    script = importlib.import_module(f"scripts.{caller}")
    stage = next(getattr(script, name) for name in ("TrainOrpo", "TrainDpo", "EvalHarness", "InferCompare", "Training")
                 if hasattr(script, name))  # fmt: skip
    values = {
        "train_orpo": {"sft_run": run, "data.train_files": f"[{work}/pref_train.jsonl]", "output_dir": work / "o",
                       "trainer.sequences_per_step": 2, "trainer.max_steps": 1, **COMMON},
        "eval_harness": {"peft_adapter": f"[{run}]", "tasks": "[]", "sft_test": work / "sft_train.jsonl",
                         "pref_test": "null", "output_dir": work / "e", "hardware": "cpu"},
        "infer_compare": {"adapters": f"{{SFT: {run}}}", "output_dir": work / "c", "hardware": "cpu"},
        "export_lora": {"output_dir": run, "export.output_dir": work / "x"},
    }  # fmt: skip
    values["train_dpo"] = values["train_orpo"]
    config = {"train_orpo": "orpo", "train_dpo": "dpo", "eval_harness": "eval", "infer_compare": "compare",
              "export_lora": "sft"}[caller]  # fmt: skip
    more = {"chat": None} if caller == "infer_compare" else {}  # its --chat is read before the config
    return (stage, partial(script.plan, **more), partial(script.main, **more),
            [*sets(values[caller]), "--config", f"configs/{config}.yaml"])  # fmt: skip


@pytest.mark.parametrize("how", ["template", "tokenizer"])
@pytest.mark.parametrize("caller", ["train_orpo", "train_dpo", "eval_harness", "infer_compare", "export_lora"])
def test_every_later_stage_stops_at_the_first_differing_token(work, caller, how):
    stage, plan, main, arguments = command(caller, work, changed(work, how))
    more = {"name": "export_lora", "choose": export_plan.training_class} if caller == "export_lora" else {}
    done = run_here(stage, plan, main, *arguments, **more)
    assert done.returncode == 4, done.stdout[-2000:] + done.stderr
    for needle in ("template or tokenizer differ from training", "7 (one turn), token", "training had", "now it is",
                   "train again"):  # fmt: skip
        assert needle in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unchanged_run_passes(work):
    from posttrain import chat, model

    recorded = read_json(work / "sft/manifest.json")["template"]["golden"]
    assert len(recorded) >= 7 and all(probe["ids"] for probe in recorded)
    chat.check_golden(model.load_tokenizer(work / "sft"), recorded)
    recorded[3]["ids"][5] += 1
    with pytest.raises(CheckFailed, match="conversation 4 of 7 \\(several turns\\), token 5"):
        chat.check_golden(model.load_tokenizer(work / "sft"), recorded)
