"""The shapes on disk: validity, ids, reading and writing."""

import json

import pytest

from posttrain.errors import UserFault
from posttrain.records import fault_in, read_jsonl, record_id, write_jsonl


def turn(role, content="好", **more):
    return {"role": role, "content": content, **more}


CALL = [{"type": "function", "function": {"name": "f", "arguments": {}}}]


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([turn("user"), turn("assistant")], None),
        ([turn("system"), turn("user"), turn("assistant")], None),
        ([turn("user"), turn("assistant", "", tool_calls=CALL), turn("tool"), turn("assistant")], None),
        ([], "no_turns"),
        ("text", "no_turns"),
        ([turn("user")], "last_turn_is_not_assistant"),
        ([turn("assistant"), turn("user"), turn("assistant")], "does_not_begin_with_user"),
        ([turn("user"), turn("user"), turn("assistant")], "roles_out_of_order"),
        ([turn("user"), turn("system"), turn("assistant")], "system_not_first"),
        ([turn("user"), turn("assistant", "  ")], "empty_turn"),
        ([turn("user"), turn("assistant", 3)], "content_is_not_text"),
        ([turn("user"), turn("robot")], "unknown_role"),
        ([turn("system")], "does_not_begin_with_user"),
    ],
)
def test_fault_in_chat(messages, fault):
    assert fault_in({"messages": messages}) == fault


def test_fault_in_pair():
    pair = {"prompt": [turn("user")], "chosen": [turn("assistant", "甲")], "rejected": [turn("assistant", "乙")]}
    assert fault_in(pair) is None
    assert fault_in(pair | {"rejected": pair["chosen"]}) == "chosen_equals_rejected"
    assert fault_in(pair | {"prompt": [turn("user"), turn("assistant")]}) == "prompt_ends_in_assistant"
    assert fault_in(pair | {"chosen": [turn("user")]}) is not None
    assert fault_in({"nothing": 1}) == "not_a_record"


def test_record_id_follows_from_source_and_content():
    assert record_id("a", {"x": 1, "y": 2}) == record_id("a", {"y": 2, "x": 1})
    assert record_id("a", {"x": 1}) != record_id("b", {"x": 1})
    assert len(record_id("a", "\ud800")) == 16  # half a character has an id too


def test_write_and_read(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    rows = [{"id": "1", "text": "你好\n世界"}, {"id": "2"}]
    assert write_jsonl(path, rows) == 2
    assert list(read_jsonl(path)) == rows
    assert not list(path.parent.glob(".*"))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"id": "old"}])

    def rows():
        yield {"id": "new"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(path, rows())
    assert [row["id"] for row in read_jsonl(path)] == ["old"]


def test_a_damaged_file_names_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": 1}) + "\n{broken\n", encoding="utf-8")
    with pytest.raises(UserFault, match="rows.jsonl:2: not JSON"):
        list(read_jsonl(path))
