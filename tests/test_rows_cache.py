"""Rows kept on disk are the rows that were made, with every fact, and are made anew when anything changes."""

import errno
import os
import subprocess
import sys
from collections import Counter
from dataclasses import fields

import pytest
from conftest import chats, pairs, write_rows

from posttrain import rows as rows_of
from posttrain import rows_cache, training, training_data
from posttrain.config import ROOT, load_config
from posttrain.data import sources
from posttrain.stages import TrainOrpo, TrainSft


def config(base, tmp_path, cls=TrainSft, sets=()):
    """A config over a file with a duplicate, an empty answer and a row that is too long."""
    kind = "sft" if cls is TrainSft else "pref"
    rows = chats(30) if kind == "sft" else pairs(30)
    answer = (rows[4]["messages"] if kind == "sft" else rows[4]["chosen"])[-1]
    answer["content"] = "很长的回答" * 60
    if not (tmp_path / "rows.jsonl").exists():
        write_rows(tmp_path / "rows.jsonl", [*rows, {**rows[3], "id": "again"}])
    given = [f"model.base={base}", f"data.train_files=[{tmp_path}/rows.jsonl]", "data.val_files=[]", "hardware=cpu",
             f"output_dir={tmp_path}/run", "trainer.max_length=96", "data.val_share=0.1", *sets]  # fmt: skip
    if kind == "sft":
        given.append("trainer.tokens_per_step=96")
    else:
        given.append("sft_run=null")
    return load_config(cls, ROOT / f"configs/{cls.name.removeprefix('train_')}.yaml", given).config


def cached(cfg, build=None, writes=True):
    """(rows, how often they were made) of a start with this config."""
    kind = "sft" if isinstance(cfg, TrainSft) else "pref"
    make = rows_of.sft_rows if kind == "sft" else rows_of.preference_rows
    start, made = training.start_of(cfg), []

    def counted():
        made.append(1)
        return make(cfg, start, training_data.read_records(cfg, kind, sources.read_training_file))

    rows = rows_cache.rows_of_run(cfg, start, training.run_inputs(cfg, start), build or counted, writes)
    return rows, len(made)


@pytest.mark.parametrize("cls", [TrainSft, TrainOrpo])
def test_what_is_kept_is_what_was_made(base, tmp_path, cls):
    """Rows and facts, field by field: those made without a cache, those of the first start, those of the second."""
    cfg = config(base, tmp_path, cls)
    plain, _ = cached(cfg, writes=False)
    assert not (tmp_path / ".cache").exists(), "a dry run writes nothing"
    (first, made), (second, again), (read, dry) = cached(cfg), cached(cfg), cached(cfg, writes=False)
    assert (made, again, dry) == (1, 0, 0)
    assert plain.fates["exact_duplicate"] == 1 and plain.fates["longer_than_max_length"] == 1
    for rows in (first, second, read):
        for field in fields(rows):
            mine, theirs = getattr(rows, field.name), getattr(plain, field.name)
            if field.name in rows_cache.TABLES:
                mine, theirs = list(mine), list(theirs)
            assert mine == theirs and type(mine) is type(theirs), field.name
        assert rows.facts() == plain.facts() and isinstance(rows.fates, Counter)
    assert second.train.cache_files, "mapped from disk, not held in memory"


@pytest.mark.parametrize("changed", [
    "trainer.max_length=80", "trainer.packing=false", "trainer.seed=7", "loss_on=all", "data.max_train_rows=20",
    "data.on_too_long=truncate_left_turns", "data.val_share=0.2", "data.max_bad_rows=0.2", "model.chat_template=qwen2",
])  # fmt: skip
def test_a_key_that_decides_rows_makes_them_anew(base, tmp_path, changed):
    cached(config(base, tmp_path))
    more = ["trainer.tokens_per_step=80"] if "max_length" in changed else []
    assert cached(config(base, tmp_path, sets=[changed, *more]))[1] == 1


@pytest.mark.parametrize("changed", ["trainer.learning_rate=1e-5", "lora.r=4", "tracking=none", "trainer.max_steps=3"])
def test_a_key_that_does_not_touch_rows_leaves_them(base, tmp_path, changed):
    cached(config(base, tmp_path))
    assert cached(config(base, tmp_path, sets=[changed]))[1] == 0


def test_other_content_tokenizer_and_code_make_rows_anew(base, tmp_path, monkeypatch):
    cfg = config(base, tmp_path)
    cached(cfg)
    file = tmp_path / "rows.jsonl"
    file.write_text(file.read_text().replace("加", "减", 1))
    assert cached(cfg)[1] == 1
    file.write_text(file.read_text().replace("减", "加", 1))
    assert cached(cfg)[1] == 0, "the first set is still there"
    monkeypatch.setattr(rows_cache, "_code", lambda: "another version")
    assert cached(cfg)[1] == 1
    monkeypatch.undo()
    start = training.start_of(cfg)
    inputs = training.run_inputs(cfg, start)
    key = rows_cache.key_of(cfg, start, inputs)
    assert rows_cache.key_of(cfg, start, inputs | {"tokenizer": {"sha256": "another"}}) != key
    start.tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    assert rows_cache.key_of(cfg, start, inputs) != key


def test_half_written_and_damaged_sets_are_not_read(base, tmp_path):
    cfg = config(base, tmp_path)
    cached(cfg)
    (train,) = (tmp_path / ".cache/rows").glob("*/train.arrow")
    os.truncate(train, train.stat().st_size - 1)
    assert cached(cfg)[1] == 1
    cached(cfg)
    train.with_name(rows_cache.FACTS).unlink()
    assert cached(cfg)[1] == 1
    assert cached(cfg)[1] == 0, "what was not whole has been replaced"
    with open(train, "r+b") as file:  # a wrong token: the size is right
        file.seek(train.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    assert cached(cfg)[1] == 1 and cached(cfg)[1] == 0


def test_a_full_disk_is_said_and_the_run_goes_on(base, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(rows_cache, "_write", full)
    rows, made = cached(config(base, tmp_path))
    assert len(rows.train) and made == 1
    assert "No space left" in capsys.readouterr().out
    assert not list((tmp_path / ".cache/rows").glob("*/*")) and not list((tmp_path / ".cache/rows").glob(".*"))


def test_old_sets_go_when_there_are_too_many(base, tmp_path, monkeypatch):
    monkeypatch.setattr(rows_cache, "LIMIT_BYTES", 0)
    for seed in (1, 2):
        rows, _ = cached(config(base, tmp_path, sets=[f"trainer.seed={seed}"]))
    assert len(list((tmp_path / ".cache/rows").glob(f"*/{rows_cache.FACTS}"))) == 1
    assert len(rows.train[0]["input_ids"])


@pytest.mark.slow
def test_of_several_processes_one_makes_the_rows(base, tmp_path):
    """Three at once: each says whether it made them, and all have the same."""
    config(base, tmp_path)
    command = (
        "import sys; sys.path[:0] = ['tests']; from pathlib import Path; import test_rows_cache as t; "
        f"rows, made = t.cached(t.config(Path({str(base)!r}), Path({str(tmp_path)!r}))); "
        "print('made', made, sum(map(sum, rows.train['input_ids'])))"
    )
    running = [subprocess.Popen([sys.executable, "-c", command], cwd=ROOT, text=True, stdout=subprocess.PIPE)
               for _ in range(3)]  # fmt: skip
    said = [process.communicate(timeout=300)[0].split()[-3:] for process in running]
    assert sorted(made for _, made, _ in said) == ["0", "0", "1"]
    assert len({total for *_, total in said}) == 1
