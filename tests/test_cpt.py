"""Continued pre-training: documents to pieces, and the stage through its real command, alone and under SFT."""

import json
import subprocess
from pathlib import Path

import pytest
from conftest import chats, questions, run_here, write_rows
from safetensors.torch import load_file

from posttrain import documents, model, runs
from posttrain.stages import TrainCpt, TrainSft
from scripts import export_lora, train_cpt, train_sft


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Documents in four forms, one of them longer than a row, and conversations."""
    folder = tmp_path_factory.mktemp("cpt")
    said = [q + a for q, a in questions(60)]
    rows = [{"text": "".join(said[i : i + 2])} for i in range(0, 40, 2)]
    write_rows(folder / "text_train.jsonl", [{"text": "".join(said)}, *rows])
    write_rows(folder / "text_val.jsonl", [{"text": "".join(said[40:44])}, {"text": said[50]}])
    (folder / "book.md").write_text("# 一\n\n" + said[3] + "\n\n" + said[4], encoding="utf-8")
    (folder / "note.txt").write_text("<|im_end|>" + said[5], encoding="utf-8")
    write_rows(folder / "sft_train.jsonl", chats(40))
    return folder


def run(stage: str, place: Path, output: str, *flags: str, **values) -> subprocess.CompletedProcess:
    """A stage's command in this process: 6 steps, a checkpoint every 2."""
    files = {"cpt": "text_train.jsonl,book.md,note.txt", "sft": "sft_train.jsonl"}[stage]
    listed = ",".join(f"{place}/{name}" for name in files.split(","))
    settings = {
        "hardware": "cpu", "output_dir": place / output, "data.train_files": f"[{listed}]", "trainer.max_length": 96,
        "trainer.logging_steps": 1, "trainer.save_steps": 2, "tracking": "none", "trainer.max_steps": 6,
        "trainer.per_device_train_batch_size": 1, "trainer.learning_rate": 5e-3, "trainer.tokens_per_step": 192,
        **({"data.val_files": "[]"} if stage == "sft" else {}), **values,
    }  # fmt: skip
    script, cls = {"cpt": (train_cpt, TrainCpt), "sft": (train_sft, TrainSft)}[stage]
    sets = [x for k, v in settings.items() for x in ("--set", f"{k}={v}")]
    return run_here(cls, script.plan, script.main, "--config", f"configs/{stage}.yaml", *sets, *flags)


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 19, 20, 28, 29])
def test_pieces_learn_each_token_once(count):
    """Every token but the document's first is a label exactly once, after the tokens that stand before it."""
    ids = list(range(100, 100 + count))
    cut = documents.pieces(ids, 10)
    assert all(len(piece["input_ids"]) <= 10 for piece in cut)
    assert all(len(piece["input_ids"]) == 10 for piece in cut[:-1])
    learned = [label for piece in cut for label in piece["labels"] if label != documents.IGNORED]
    assert learned == ids[1:]
    for piece in cut:
        assert piece["labels"][0] == documents.IGNORED and piece["labels"][1:] == piece["input_ids"][1:]


def test_documents_end_with_the_end_of_text_and_keep_their_words(base):
    tokenizer = model.load_tokenizer(base)
    assert tokenizer.eos_token == "<|im_end|>" and documents.end_of_text(tokenizer) == "<|endoftext|>"
    text = "1加2<|im_end|>等于3"
    (ids,) = documents.document_ids(tokenizer, [text])
    assert tokenizer.decode(ids) == text + "<|endoftext|>"
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids


@pytest.fixture(scope="module")
def cpt(base, place) -> Path:
    done = run("cpt", place, "cpt", **{"model.base": base, "lora.r": 8, "data.val_files": f"[{place}/text_val.jsonl]"})
    assert done.returncode == 0, done.stderr
    return place / "cpt"


def test_a_run_on_files_of_three_forms(cpt, base, place):
    facts = manifest(cpt)
    assert facts["stage"] == "train_cpt" and facts["kind"] == "adapter"
    data = facts["data"]
    assert data["fates"] == {"kept": 22, "kept_in_pieces": 1}
    tokenizer = model.load_tokenizer(base)
    texts = [json.loads(line)["text"] for line in (place / "text_train.jsonl").read_text().splitlines()]
    texts += [(place / name).read_text() for name in ("book.md", "note.txt")]
    counts = [len(ids) for ids in documents.document_ids(tokenizer, texts)]
    assert data["trained_tokens"] == sum(counts) - len(counts)
    assert any("cut into" in note for note in data["notes"])
    assert data["tokens"] > 0.9 * 96 * data["train_rows"]  # the rows are full
    found = losses(cpt)
    assert found[-1] < found[0] - 0.1 and facts["results"]["kept"] == "best"


def test_the_dry_run_shows_documents_and_writes_nothing(base, place):
    done = run("cpt", place, "planned", "--dry-run", **{"model.base": base, "data.val_files": "[]"})
    assert done.returncode == 0, done.stdout
    for said in ("kept_in_pieces 1", "each document ended by <|endoftext|>", "optimiser steps"):
        assert said in done.stdout
    assert not (place / "planned").exists()
    wrong = run("cpt", place, "planned", "--dry-run", **{"model.base": base, "data.on_too_long": "drop"})
    assert wrong.returncode == 2 and "data.on_too_long" in wrong.stderr and "split" in wrong.stderr


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit(cpt, base, place, monkeypatch):
    from posttrain import callbacks

    def stop(self, args, state, control, **_):
        if state.global_step == 3:
            raise KeyboardInterrupt

    values = {"model.base": base, "lora.r": 8, "data.val_files": f"[{place}/text_val.jsonl]"}
    with monkeypatch.context() as patched:
        patched.setattr(callbacks.StopOnNan, "on_step_end", stop, raising=False)
        assert run("cpt", place, "cut", **values).returncode == 130
    again = run("cpt", place, "cut", **values)
    assert again.returncode == 0 and "going on from" in again.stdout, again.stderr
    assert runs.sha256(place / "cut/adapter_model.safetensors") == runs.sha256(cpt / "adapter_model.safetensors")


def test_sft_goes_on_from_it(cpt, base, place):
    """With its adapter, whose shape counts; from a full run as a base; and not with a base of another name."""
    done = run("sft", place, "sft", cpt_run=cpt)
    assert done.returncode == 0, done.stderr
    facts = manifest(place / "sft")
    assert facts["lora"]["r"] == 8 and facts["base"]["fingerprint"] == runs.fingerprint(base)
    assert facts["parents"]["cpt"]["path"].endswith("cpt/manifest.json")
    assert facts["inputs"]["cpt"]["sha256"] == runs.sha256(cpt / "adapter_model.safetensors")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (cpt, place / "sft"))
    assert before.keys() == after.keys() and any((before[name] != after[name]).any() for name in before)
    plan = run("sft", place, "planned", "--dry-run", cpt_run=cpt)
    assert plan.returncode == 0 and f"from {cpt}" in plan.stdout, plan.stdout + plan.stderr
    wrong = run("sft", place, "never", cpt_run=cpt, finetuning_type="full")
    assert wrong.returncode == 2 and "cpt_run: null and model.base:" in wrong.stderr
    full = run("cpt", place, "full", **{"model.base": base, "finetuning_type": "full", "trainer.max_steps": 2,
                                        "trainer.learning_rate": 1e-3})  # fmt: skip
    assert full.returncode == 0 and manifest(place / "full")["kind"] == "model", full.stderr
    done = run("sft", place, "sft_on_full", **{"model.base": place / "full", "trainer.max_steps": 1})
    assert done.returncode == 0, done.stderr
    assert manifest(place / "sft_on_full")["base"]["fingerprint"] == runs.fingerprint(place / "full")


def test_it_is_exported_and_checked_on_its_text(cpt, base, place):
    config = place / "export.yaml"
    config.write_text(f"stage: cpt\nhardware: cpu\noutput_dir: {cpt}\nmodel: {{base: {base}}}\nexport: {{mode: merged,"
                      f" dtype: float32, output_dir: {place}/merged}}\n")  # fmt: skip
    done = run_here(TrainCpt, export_lora.plan, export_lora.main, "--config", str(config))
    assert done.returncode == 0, done.stderr
    results = manifest(place / "merged")["results"]
    assert results["check_source"].endswith("text_val.jsonl") and results["merged_vs_adapter"]["mean_abs"] < 1e-5
