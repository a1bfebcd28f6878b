"""Raw rows of every layout -> records. Rows here are our own, in the published columns."""

import json

import pytest
from conftest import chats, pairs, shared, write_rows

from posttrain.data.jsonfiles import Fault
from posttrain.data.oasst import conversations, flat_messages
from posttrain.data.sources import detect, read_training_file, to_records
from posttrain.errors import UserFault

Q, A, B = "什么是蒸发？", "液体变成气体。", "不知道。"
USER = {"role": "user", "content": Q}
GOOD, BAD = {"role": "assistant", "content": A}, {"role": "assistant", "content": B}
SYSTEM = {"role": "system", "content": "你是老师。"}
HUMAN, GPT, GPT_BAD = {"from": "human", "value": Q}, {"from": "gpt", "value": A}, {"from": "gpt", "value": B}
ALPACA = {"instruction": Q, "input": "", "output": A}
CALL = '{"name": "weather", "arguments": {"city": "北京"}}'
CALLS = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}]
CALLED = {"role": "assistant", "content": "", "tool_calls": CALLS}


def one(row, kind, **more):
    """The single record or Fault of a row."""
    found = to_records(row, "test", kind, **more)
    assert len(found) == 1
    return found[0]


CHATS = {
    "alpaca": ({"instruction": "什么是", "input": "蒸发？", "output": A}, "alpaca", None),
    "alpaca null input": ({"instruction": Q, "input": None, "output": A}, "alpaca", None),
    "alpaca system, history": (
        {"instruction": Q, "input": "", "output": A, "system": "你是老师。", "history": [["一", "二"]]}, "alpaca",
        [SYSTEM, {"role": "user", "content": "一"}, {"role": "assistant", "content": "二"}, USER, GOOD]),
    "prompt completion": ({"prompt": Q, "completion": A}, "prompt_response", None),
    "prompt response": ({"id": 3, "prompt": Q, "response": A}, "prompt_response", None),
    "trl prompt completion": ({"prompt": [USER], "completion": [GOOD]}, "prompt_response", None),
    "firefly 1.1M": ({"kind": "QA", "input": Q, "target": A}, "prompt_response", None),
    "question answer": ({"question": Q, "answer": A}, "prompt_response", None),
    "reasoning": ({"prompt": Q, "reasoning": "想", "response": A}, "prompt_response",
                  [USER, {"role": "assistant", "content": f"<think>\n想\n</think>\n\n{A}"}]),
    "sharegpt": ({"id": "x", "conversations": [HUMAN, GPT]}, "sharegpt", None),
    "sharegpt roles": ({"conversations": [{"from": "user", "value": Q}, {"from": "chatgpt", "value": A}]},
                       "sharegpt", None),
    "sharegpt system": ({"conversations": [HUMAN, GPT], "system": "你是老师。"}, "sharegpt", [SYSTEM, USER, GOOD]),
    "firefly": ({"conversation_id": 1, "conversation": [{"human": Q, "assistant": A}]}, "sharegpt", None),
    "lima": ({"conversations": [Q, A], "source": "s"}, "sharegpt", None),
    "xtuner": ({"conversation": [{"system": "你是老师。", "input": Q, "output": A}]}, "sharegpt", [SYSTEM, USER, GOOD]),
    "messages": ({"messages": [USER, GOOD]}, "messages", None),
    "messages as text": ({"messages": json.dumps([USER, GOOD])}, "messages", None),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": Q}]},
                            {"role": "assistant", "content": [{"type": "text", "value": A}]}]}, "messages", None),
    "bare list": ([{"role": "client", "content": Q}, {"role": "counselor", "content": A}], "turn_list", None),
    "strings": ([Q, A], "turn_list", None),
    "coig exam": ({"textbox_q_instruction": "什么是", "textbox_q_context": "", "textbox_question": "蒸发？",
                   "textbox_answer": A, "textbox_answer_analysis": ""}, "exam", None),
    "coig translated": ({"instruction": "x", "input": "", "output": "y", "trans_instruction": Q, "trans_input": "",
                         "trans_output": A}, "translated", None),
    "coig rounds": ({"round_0": {"response": json.dumps({"Q": Q, "A": A})}}, "rounds", None),
    "moss": ({"chat": {"turn_1": {"Human": f"<|Human|>: {Q}<eoh>\n", "MOSS": f"<|MOSS|>: {A}<eom>\n",
                                  "Commands": "<|Commands|>: None<eoc>\n"}}}, "moss", None),
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_chat_layouts(name):
    row, layout, messages = CHATS[name]
    assert detect(row) == layout
    record = one(row, "sft")
    expected = messages or [USER, GOOD]
    if name.startswith("alpaca") and messages is None and row["input"]:
        expected = [{"role": "user", "content": "什么是\n蒸发？"}, GOOD]
    if name == "coig exam":
        expected = [{"role": "user", "content": "什么是\n蒸发？"}, GOOD]
    assert record["messages"] == expected
    assert record["source"] == "test" and len(record["id"]) == 16


PAIRS = {
    "strings": {"prompt": Q, "chosen": A, "rejected": B},
    "alpaca": {"instruction": Q, "input": "", "chosen": A, "rejected": B},
    "old dpo_en_zh": {"system": "", "history": [], "question": Q, "response_chosen": A, "response_rejected": B},
    "sharegpt objects": {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT_BAD},
    "sharegpt strings": {"conversations": [HUMAN], "chosen": A, "rejected": B},
    "full lists": {"prompt": Q, "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD],
                   "score_chosen": 8.0, "score_rejected": 5.0},
    "implicit prompt": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "explicit lists": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "messages aliases": {"chosen_messages": [USER, GOOD], "rejected_messages": [USER, BAD]},
    "chosen_response": {"prompt": Q, "chosen_response": A, "rejected_response": B},
    "openai": {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
    "transcripts": {"chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}", "rejected": f"\n\nHuman: {Q}\n\nAssistant: {B}"},
    "transcript prompt": {"prompt": f"\n\nHuman: {Q}\n\nAssistant:", "chosen": A, "rejected": B},
    "saferlhf": {"prompt": Q, "response_0": B, "response_1": A, "better_response_id": 1, "safer_response_id": 0},
    "shp": {"history": Q, "human_ref_A": A, "human_ref_B": B, "labels": 1},
    "label a b": {"question": Q, "response_a": A, "response_b": B, "label": 0},
    "winner": {"prompt": Q, "response_a": B, "response_b": A, "winner": "model_b"},
    "auto-j": {"prompt": Q, "response 1": B, "response 2": A, "label": 1},
    "alpaca_eval": {"instruction": Q, "output_1": B, "output_2": A, "preference": 1.9},
    "helpsteer": {"prompt": Q, "response_1": A, "response_2": B, "preference_strength": -2},
    "ranked": {"instruction": Q, "input": "", "output": [A, "水汽。", B], "history": []},
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_pair_layouts(name):
    record = one(PAIRS[name], "pref")
    assert (record["prompt"], record["chosen"], record["rejected"]) == ([USER], [GOOD], [BAD])


def test_several_rejected_answers_give_several_pairs():
    found = to_records({"prompt": Q, "chosen": A, "rejected": [B, "嗯。"]}, "test", "pref")
    assert [r["rejected"][0]["content"] for r in found] == [B, "嗯。"] and found[0]["id"] != found[1]["id"]


def test_prefer_decides_between_better_and_safer():
    row = PAIRS["saferlhf"]
    assert one(row, "pref", options={"prefer": "better"})["chosen"] == [GOOD]
    assert one(row, "pref", options={"prefer": "safer"})["chosen"] == [BAD]
    assert one(row, "pref", options={"prefer": "agree"}).reason == "labels_disagree"


def test_shp_label_one_means_the_first():
    assert one(PAIRS["shp"] | {"labels": 0}, "pref")["chosen"] == [BAD]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (PAIRS["full lists"] | {"score_rejected": 8.0}, "equal_scores"),
        (PAIRS["full lists"] | {"score_rejected": 9.0}, "scores_contradict_order"),
        (PAIRS["strings"] | {"rejected": A}, "chosen_equals_rejected"),
        (PAIRS["strings"] | {"rejected": " "}, "empty_turn"),
        (PAIRS["strings"] | {"rejected": None}, "missing_column"),
        (PAIRS["strings"] | {"rejected": 5}, "content_is_not_text"),
        ({"chosen": A, "rejected": B}, "missing_column"),
        (PAIRS["auto-j"] | {"label": 2}, "tie"),
        (PAIRS["auto-j"] | {"label": 7}, "label_unknown"),
        (PAIRS["alpaca_eval"] | {"preference": None}, "missing_column"),
        (PAIRS["ranked"] | {"output": [A]}, "one_answer_only"),
        ({"chosen": f"\n\nHuman: {Q}\n\nAssistant: 一\n\nHuman: 甲\n\nAssistant: 二",
          "rejected": f"\n\nHuman: {Q}\n\nAssistant: 三\n\nHuman: 甲\n\nAssistant: 四"}, "differs_before_last_turn"),
        (CHATS["alpaca"][0], "is_sft_not_pref"),
    ],
)  # fmt: skip
def test_pairs_that_cannot_be_used(row, reason):
    assert one(row, "pref").reason == reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (3, "row_is_not_a_mapping"),
        ("text", "row_is_not_a_mapping"),
        (None, "row_is_not_a_mapping"),
        ({}, "missing_column"),
        ({"instruction": Q}, "missing_column"),
        ({"instruction": Q, "output": None}, "missing_column"),
        ({"instruction": Q, "output": 42}, "content_is_not_text"),
        ({"instruction": Q, "output": {"a": 1}}, "content_is_not_text"),
        ({"instruction": 42, "output": A}, "content_is_not_text"),
        ({"instruction": "", "input": "", "output": A}, "empty_turn"),
        ({"instruction": Q, "output": "  \n"}, "empty_turn"),
        ({"instruction": Q, "output": A, "history": [["一"]]}, "history_is_not_in_pairs"),
        ({"instruction": Q, "output": A, "history": "x"}, "history_is_not_json"),
        ({"messages": [[USER]]}, "turn_is_not_a_mapping"),
        ({"messages": []}, "no_turns"),
        ({"messages": 5}, "messages_is_not_a_list"),
        ({"messages": [USER, {"role": "robot", "content": A}]}, "unknown_role"),
        ({"messages": [USER, {"role": ["assistant"], "content": A}]}, "unknown_role"),
        ({"messages": [USER, {"role": "assistant", "content": 7}]}, "content_is_not_text"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "missing_column"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "image_url"}]}]}, "part_is_not_text"),
        ({"conversations": [HUMAN]}, "last_turn_is_not_assistant"),
        ({"conversations": [GPT, HUMAN, GPT]}, "does_not_begin_with_user"),
        ({"conversations": [HUMAN, HUMAN, GPT]}, "roles_out_of_order"),
        ({"conversations": [HUMAN, GPT], "tools": "[not json"}, "tools_is_not_json"),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "not json"}]}, "tool_calls_is_not_json"),
        ({"messages": [USER, BAD], "label": False}, "labelled_undesirable"),
        ({"text": "一段文字"}, "is_text_not_sft"),
        (PAIRS["strings"], "is_pref_not_sft"),
    ],
)
def test_chats_that_cannot_be_used(row, reason):
    fault = one(row, "sft")
    assert isinstance(fault, Fault) and fault.reason == reason


def test_trailing_user_turn_is_cut_and_said():
    record = one({"conversations": [HUMAN, GPT, HUMAN]}, "sft")
    assert record["messages"] == [USER, GOOD] and record["meta"]["repairs"] == ["trailing_user_turn_cut"]


@pytest.mark.parametrize("tools", [[{"name": "weather", "parameters": {}}], '[{"name": "weather", "parameters": {}}]'])
def test_tool_calls_and_tools_are_kept(tools):
    record = one({"conversations": [HUMAN, {"from": "gpt", "value": ""}, {"from": "function_call", "value": CALL},
                                    {"from": "observation", "value": "晴"}, GPT], "tools": tools}, "sft")  # fmt: skip
    assert record["messages"] == [USER, CALLED, {"role": "tool", "content": "晴"}, GOOD]
    assert record["tools"] == [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def test_openai_tool_call_arguments_as_text():
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert one({"messages": [USER, calling, {"role": "tool", "content": "晴"}, GOOD]}, "sft")["messages"][1] == CALLED


def test_reasoning_and_tool_call_parts():
    parts = [{"type": "reasoning", "value": "想"}, {"type": "tool_call", "value": CALL}]
    record = one({"messages": [USER, {"role": "assistant", "content": parts}]}, "sft")
    assert record["messages"][1] == CALLED | {"content": "<think>\n想\n</think>\n\n"}


def test_columns_of_a_set_with_names_of_its_own():
    columns = {"instruction": "zh_question", "output": "zh_answer"}
    assert one({"zh_question": Q, "zh_answer": A}, "sft", columns=columns)["messages"] == [USER, GOOD]


# ------------------------------------------------------------------ Open Assistant


def said(own, parent, role, text="话", **more):
    return {"message_id": own, "parent_id": parent, "role": role, "text": text, **more}


TREE = [
    said("q", None, "prompter"), said("bad", "q", "assistant", rank=1), said("good", "q", "assistant", rank=0),
    said("q2", "good", "prompter"), said("a2", "q2", "assistant"), said("q3", "good", "prompter"),
    said("under bad", "bad", "prompter"),
]  # fmt: skip


def names(rows, paths):
    return [[rows[i]["message_id"] for i in path] for path in paths]


def test_best_path_and_all_paths():
    paths, faults = conversations(TREE, "best")
    assert names(TREE, paths) == [["q", "good", "q2", "a2"]]
    reasons = {TREE[i]["message_id"]: fault.reason for i, fault in faults.items()}
    worse = "lower_ranked_answer"
    assert reasons == {"bad": worse, "under bad": worse, "q3": "question_without_answer"}
    paths, faults = conversations(TREE, "all")
    assert sorted(names(TREE, paths)) == [["q", "bad"], ["q", "good", "q2", "a2"]]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ([said("x", "nowhere", "assistant")], "orphaned"),
        ([said("x", "y", "assistant"), said("y", "x", "prompter")], "orphaned"),
        ([said("x", "q", "assistant", deleted=True)], "deleted"),
        ([said("x", "q", "assistant", review_result=False)], "review_failed"),
        ([said("x", "q", "assistant", review_result=None)], "not_reviewed"),
        ([said("x", None, "prompter", tree_state="aborted_low_grade")], "tree_not_ready"),
        ([said("q", None, "prompter")], "duplicate_message_id"),
        ([said("x", "q", "robot")], "unknown_role"),
        ([said("x", "q", "assistant", text=5)], "content_is_not_text"),
        ([said(None, "q", "assistant")], "missing_column"),
    ],
)
def test_messages_that_are_in_no_conversation(more, reason):
    rows = TREE + more
    paths, faults = conversations(rows)
    assert names(rows, paths) == [["q", "good", "q2", "a2"]]
    assert faults[len(TREE)].reason == reason
    assert {i for path in paths for i in path} | set(faults) == set(range(len(rows)))


def test_what_hangs_below_a_deleted_message():
    rows = [said("q", None, "prompter", deleted=True), said("a", "q", "assistant"), said("q2", "a", "prompter")]
    paths, faults = conversations(rows)
    below = "below_dropped_message"
    assert not paths and [faults[i].reason for i in range(3)] == ["deleted", below, below]


def test_a_very_long_thread():
    rows = [said(i, i - 1 if i else None, "assistant" if i % 2 else "prompter") for i in range(6000)]
    paths, faults = conversations(rows)
    assert [len(path) for path in paths] == [6000] and not faults


def test_tree_export_equals_the_flat_one():
    answer = {"message_id": "a", "parent_id": "q", "role": "assistant", "text": A, "rank": 0, "replies": []}
    root = {"message_id": "q", "role": "prompter", "text": Q, "replies": [answer]}
    tree = {"message_tree_id": "q", "tree_state": "ready_for_export", "prompt": root}
    assert [m["message_id"] for m in flat_messages(tree)] == ["q", "a"]
    assert one(tree, "sft")["messages"] == [USER, GOOD]


# ------------------------------------------------------------------ a user's own training file


def test_prepared_records_pass_through(tmp_path):
    records, reasons, faults = read_training_file(write_rows(tmp_path / "sft.jsonl", chats(5)), "sft", 0.01)
    assert records == chats(5) and not reasons and not faults
    records, _, _ = read_training_file(write_rows(tmp_path / "pref.jsonl", pairs(5)), "pref", 0.01)
    assert records == pairs(5)


@pytest.mark.parametrize("rows", [[ALPACA], [{"conversations": [HUMAN, GPT]}], TREE])
def test_own_files_of_any_layout(tmp_path, rows):
    records, _, _ = read_training_file(write_rows(tmp_path / "own.jsonl", rows), "sft", 0.01)
    assert records and all(record["source"] == "own" for record in records)


def test_bad_rows_of_an_own_file(tmp_path):
    path, half = tmp_path / "own.jsonl", {"instruction": "问", "output": "\ud800"}
    path.write_text("\n".join(json.dumps(row) for row in [*[ALPACA] * 3, half, {"x": 1}]))
    with pytest.raises(UserFault, match=r"2 of 5 rows cannot be used(.|\n)*own.jsonl:5: missing_column"):
        read_training_file(path, "sft", 0.01)
    records, reasons, faults = read_training_file(path, "sft", 0.5)
    assert len(records) == 3 and reasons == {"lone_surrogate": 1, "missing_column": 1} and len(faults) == 2


# ------------------------------------------------------------------ real records

REAL = {
    "llamafactory_demo/alpaca_zh_demo.json": ("sft", 594),
    "llamafactory_demo/glaive_toolcall_zh_demo.json": ("sft", 153),
    "llamafactory_demo/v1_sft_demo.jsonl": ("sft", 231), "llamafactory_demo/reason_tool_use_demo_50.jsonl": ("sft", 24),
    "belle_1k/Belle_open_source_1k.json": ("sft", 583), "lima/lima.json": ("sft", 226),
    "sharegpt_zh_1k/sharegpt_zh_1K.json": ("sft", 387), "firefly/dummy_data.jsonl": ("sft", 19),
    "smilechat/0.json": ("sft", 1), "oasst_zh_llamafactory/oaast_sft_zh.json": ("sft", 314),
    "dpo_en_zh_20k/dpo_zh.jsonl": ("pref", 243), "dpo_en_zh_20k/dpo_zh_500.jsonl": ("pref", 196),
    "llamafactory_demo/dpo_zh_demo.json": ("pref", 172), "llamafactory_demo/v1_dpo_demo.jsonl": ("pref", 4),
    "hh_rlhf/test.jsonl.gz": ("pref", 1146), "ultrafeedback_binarized/dummy_dpo.jsonl": ("pref", 10),
    "medical_reward/test.json": ("pref", 53), "toolcall_dpo_zh/toolcall_dpo_zh_demo.jsonl": ("pref", 9),
    "autoj_pairwise/testdata_pairwise.jsonl": ("pref", 116),
    "alpaca_eval_pairs/claude-2.annotations.json": ("pref", 126),
    "oasst_zh_llamafactory/oaast_rm_zh.json": ("pref", 333),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_files(name):
    kind, count = REAL[name]
    records, _, _ = read_training_file(shared(f"data/{name}"), kind, 0.01)
    assert len(records) == count
