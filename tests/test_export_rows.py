"""Prepared records -> Alpaca, ShareGPT and messages, and back: nothing changes on the way, nothing is lost."""

import json

import pytest
from conftest import chats, pairs, run_command, shared, write_rows

from posttrain.data.export_rows import FORMS, export_rows
from posttrain.data.sources import read_training_file
from posttrain.errors import UserFault
from posttrain.records import read_jsonl

USER, GOOD = {"role": "user", "content": "北京天气？"}, {"role": "assistant", "content": "晴，25 度。"}
SYSTEM = {"role": "system", "content": "你是助手。"}
WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [WEATHER]}
RESULT = {"role": "tool", "content": '{"t": 25}'}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def chat(number, messages, **more):
    return {"id": f"c{number}", "source": "own", "messages": messages, **more, "meta": {"lang": "zh"}}


def pair(number, prompt, chosen, rejected, **more):
    return {"id": f"p{number}", "source": "own", "prompt": prompt, "chosen": [chosen], "rejected": [rejected], **more,
            "meta": {}}  # fmt: skip


CHATS = [
    *chats(3),
    chat(1, [SYSTEM, USER, GOOD, {"role": "user", "content": "明天\n呢？"}, {"role": "assistant", "content": "雨。"}]),
    chat(2, [USER, CALLED, RESULT, GOOD], tools=TOOLS),
    chat(3, [USER, CALLED | {"tool_calls": [WEATHER, WEATHER]}, RESULT, RESULT, GOOD]),
    chat(4, [USER, CALLED | {"content": "我查一下。"}, RESULT, GOOD], tools=TOOLS),
    chat(5, [USER, GOOD], tools=TOOLS),
]
PAIRS = [
    *pairs(3),
    pair(1, [SYSTEM, USER, GOOD, USER], GOOD, {"role": "assistant", "content": "不知道"}),
    pair(2, [USER], CALLED, GOOD, tools=TOOLS),
    pair(3, [USER], CALLED | {"content": "查。"}, GOOD, tools=TOOLS),
]  # fmt: skip


def said(records, kind):
    parts = ("messages", "tools") if kind == "sft" else ("prompt", "chosen", "rejected", "tools")
    return [{name: record[name] for name in parts if name in record} for record in records]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kind", "records"), [("sft", CHATS), ("pref", PAIRS)])
def test_what_is_exported_comes_back_the_same(tmp_path, form, kind, records):
    path = write_rows(tmp_path / f"{kind}_train.jsonl", records)
    counts = export_rows([path], form, tmp_path / "out")[path.name]
    lost = tmp_path / f"out/{kind}_train_not_exported.jsonl"
    lost = [row["record"]["id"] for row in read_jsonl(lost)] if lost.exists() else []
    assert counts["read"] == len(records) == counts["written"] + len(lost) == counts["written"] + sum(
        counts["not_exported"].values())  # fmt: skip
    back, reasons, _ = read_training_file(tmp_path / f"out/{kind}_train_{form}.jsonl", kind, 0.0)
    assert not reasons and said(back, kind) == said([r for r in records if r["id"] not in lost], kind)
    expected = {("sft", "alpaca"): {"tool_calls": 3, "tools": 1}, ("pref", "alpaca"): {"tool_calls": 2},
                ("pref", "sharegpt"): {"words_before_a_call": 1}}  # fmt: skip
    assert counts["not_exported"] == expected.get((kind, form), {})


def test_the_rows_have_the_columns_of_the_form(tmp_path):
    sft, pref = write_rows(tmp_path / "sft_train.jsonl", CHATS), write_rows(tmp_path / "pref_train.jsonl", PAIRS)
    for form in FORMS:
        export_rows([sft, pref], form, tmp_path / form)
    alpaca = list(read_jsonl(tmp_path / "alpaca/sft_train_alpaca.jsonl"))[3]
    assert alpaca == {"id": "c1", "source": "own", "instruction": "明天\n呢？", "input": "", "output": "雨。",
                      "system": "你是助手。", "history": [["北京天气？", "晴，25 度。"]]}  # fmt: skip
    called = list(read_jsonl(tmp_path / "sharegpt/sft_train_sharegpt.jsonl"))[4]
    assert [turn["from"] for turn in called["conversations"]] == ["human", "function_call", "observation", "gpt"]
    assert json.loads(called["conversations"][1]["value"]) == {"name": "weather", "arguments": {"city": "北京"}}
    assert json.loads(called["tools"]) == [{"name": "weather", "parameters": {"type": "object"}}]
    ranked = next(iter(read_jsonl(tmp_path / "sharegpt/pref_train_sharegpt.jsonl")))
    assert (ranked["chosen"]["from"], ranked["conversations"][-1]["from"]) == ("gpt", "human")
    info = json.loads((tmp_path / "sharegpt/dataset_info.json").read_text(encoding="utf-8"))
    assert info["pref_train_sharegpt"]["ranking"] and info["sft_train_sharegpt"]["file_name"] in {
        p.name for p in (tmp_path / "sharegpt").iterdir()}  # fmt: skip


def test_a_text_that_reads_as_something_else_is_not_written(tmp_path):
    record = pair(1, [{"role": "user", "content": "Human: hi\n\nAssistant: x"}], GOOD, GOOD | {"content": "?"})
    path = write_rows(tmp_path / "pref_val.jsonl", [record])
    assert export_rows([path], "alpaca", tmp_path)["pref_val.jsonl"]["not_exported"] == {"is_read_back_otherwise": 1}
    assert export_rows([path], "messages", tmp_path)["pref_val.jsonl"]["written"] == 1


def test_text_and_what_cannot_be_exported(tmp_path):
    text = write_rows(tmp_path / "text_train.jsonl", [{"id": "t", "source": "own", "text": "一段话。", "meta": {}}])
    assert export_rows([text], "sharegpt", tmp_path)["text_train.jsonl"]["written"] == 1
    other = write_rows(tmp_path / "rows.jsonl", [CHATS[0], {"instruction": "问"}])
    for paths, form, message in (([text], "vicuna", "choices: alpaca, sharegpt, messages"),
                                 ([other], "alpaca", "rows.jsonl:2: not a record"),
                                 ([tmp_path / "none.jsonl"], "alpaca", "no such file"),
                                 ([text, tmp_path / "x" / text.name], "alpaca", "two files of one name")):  # fmt: skip
        with pytest.raises(UserFault, match=message):
            export_rows(paths, form, tmp_path / "out")


@pytest.mark.parametrize("name", ["glaive_toolcall_zh_demo.json", "reason_tool_use_demo_50.jsonl", "identity.json"])
def test_real_records_come_back(tmp_path, name):
    records, _, _ = read_training_file(shared(f"data/llamafactory_demo/{name}"), "sft", 0.01)
    path = write_rows(tmp_path / "sft_train.jsonl", records)
    for form in ("sharegpt", "messages"):
        counts = export_rows([path], form, tmp_path / form)[path.name]
        assert counts["written"] >= 0.98 * counts["read"], counts
        back, _, _ = read_training_file(tmp_path / form / f"sft_train_{form}.jsonl", "sft", 0.0)
        if counts["written"] == counts["read"]:
            assert said(back, "sft") == said(records, "sft")


def test_the_command(tmp_path):
    write_rows(tmp_path / "sft_train.jsonl", CHATS)
    run = run_command("-m", "scripts.prepare_data", "--export", "sharegpt", "--set", f"output_dir={tmp_path}")
    assert run.returncode == 0, run.stderr
    assert "sft_train.jsonl: 8 read, 8 written" in run.stdout
    assert (tmp_path / "export_sharegpt/sft_train_sharegpt.jsonl").is_file()
    run = run_command("-m", "scripts.prepare_data", "--export", "vicuna", "--set", f"output_dir={tmp_path}")
    assert run.returncode == 2 and "choices: alpaca, sharegpt, messages" in run.stderr
