"""Latency, throughput and memory: what is measured, how it is counted up, and that report --verify can do it again."""

from types import SimpleNamespace

import pytest
from conftest import make_adapter

from posttrain.evals import cost, latency, models, recompute
from posttrain.records import write_jsonl
from posttrain.stages import InferCompare

PROMPTS = [{"id": f"p{i}", "prompt": [{"role": "user", "content": "好" * (1 + 7 * i)}]} for i in range(3)]


@pytest.fixture(scope="module")
def measured(base, tmp_path_factory) -> list[dict]:
    lineup = models.line_up({"SFT": make_adapter(base, tmp_path_factory.mktemp("cost") / "one", 1)})
    cfg = InferCompare(precision="fp32", batch_size=2, generation={"max_new_tokens": 6, "temperature": 0})
    return latency.measure(cfg, lineup, ["base", "SFT"], PROMPTS)


def test_models_take_turns_and_every_prompt_is_asked_alone_once(measured):
    turns = list(dict.fromkeys((row["round"], row["model"]) for row in measured))
    assert turns == [(0, "base"), (0, "SFT"), (1, "SFT"), (1, "base")]
    for model in ("base", "SFT"):
        own = [row for row in measured if row["model"] == model]
        assert sorted(row["prompt"] for row in own if row["prompt"]) == ["p0", "p1", "p2"]
        assert [row["batch"] for row in own if row["prompt"] is None] == [2, 1, 2, 1]  # the last one is a batch too


def test_the_first_token_comes_before_the_last(measured):
    assert all(0 < row["first_seconds"] < row["seconds"] and row["peak_gib"] > 0.05 for row in measured)
    assert all(row["steps"] == 6 * row["batch"] or row["steps"] > row["tokens"] for row in measured)


def test_counted_by_hand():
    def row(prompt, batch, first, seconds, steps, gib):
        return {"model": "m", "device": "card", "precision": "float32", "cpus": 2, "load": 3.5, "round": 0,
                "prompt": prompt, "batch": batch, "first_seconds": first, "seconds": seconds, "steps": steps,
                "tokens": steps - batch, "characters": 3 * batch, "peak_gib": gib}  # fmt: skip

    rows = [row("a", 1, 0.1, 1.1, 11, 2.0), row("b", 1, 0.3, 2.3, 21, 2.5), row(None, 2, 0.5, 4.0, 32, 3.0)]
    found = cost.summarise(rows, ["m"])
    assert (found["device"], found["precision"], found["prompts"]) == ("card", "float32", 2)
    assert found["models"]["m"] == pytest.approx({
        "n": 2, "first_token_median": 0.2, "first_token_p95": 0.29, "latency_median": 1.7, "latency_p95": 2.24,
        "decode_tokens_per_second": 30 / 3, "mean_tokens": 15, "mean_characters": 3, "peak_gib": 2.5,
        "batch": 2, "batched_tokens_per_second": 8.0, "batched_peak_gib": 3.0,
    })  # fmt: skip
    assert "the machine was busy with other work: load 3.5 on 2 cores" in cost.lines(found)[0]
    assert "not measured" not in "".join(cost.lines(found)) and cost.lines(found)[2].split()[-1] == "200"


def test_what_did_not_fit_is_not_measured(measured):
    alone = [row for row in measured if row["prompt"]]
    found = cost.summarise(alone, ["base", "SFT"])
    assert found["models"]["SFT"]["batched_tokens_per_second"] is None and found["models"]["SFT"]["batch"] is None
    assert [line for line in cost.lines(found) if line.startswith("tokens/s in batches")][0].count("not measured") == 2


def test_a_batch_that_does_not_fit_leaves_no_row(monkeypatch):
    import torch

    def full(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(latency.generate, "check_lengths", lambda *args: [[1]])
    monkeypatch.setattr(latency.generate, "generate_batch", full)
    assert latency.ask(SimpleNamespace(), None, PROMPTS[:1], InferCompare().generation) is None


def test_recorded_costs_are_recomputed_from_their_file(measured, tmp_path):
    write_jsonl(tmp_path / "cost.jsonl", measured)
    write_jsonl(tmp_path / "answers.jsonl", [{"group": "g", "expected": None, "answers": {
        name: {"text": "a", "tokens": 1, "stopped": True, "seconds": 1.0} for name in ("base", "SFT")}}])  # fmt: skip
    answers = {"groups": {}, "speed": {}, "models": ["base", "SFT"]}
    manifest = {"results": answers | {"cost": cost.summarise(measured, ["base", "SFT"])}}
    assert all(before == pytest.approx(now) for _, before, now in recompute.comparison(tmp_path, manifest))
    manifest["results"]["cost"]["models"]["SFT"]["latency_p95"] *= 1.01
    drifted = [name for name, before, now in recompute.comparison(tmp_path, manifest) if before != pytest.approx(now)]
    assert drifted == ["cost.models.SFT.latency_p95"]
