"""`prepare_data --why`: every record's story, from the files of a finished set."""

import io
import json

import pytest
import yaml
import zstandard
from conftest import run_command, write_rows

from posttrain.config import load_config
from posttrain.data import telling, why
from posttrain.errors import UserFault
from posttrain.stages import PrepareData

LONG = "这首诗写的是秋天的山和水，也写了作者离开家乡以后的心情，读起来并不难，可是要讲明白就得从头说起。"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A set with kept, repaired, flagged and dropped records, made by the real command, and its config."""
    place = tmp_path_factory.mktemp("why")
    rows = [{"instruction": f"请说说第{i}课讲了什么道理？", "output": f"第{i}课说的是第{i * 3}个道理，要记住{i}。"}
            for i in range(80)]  # fmt: skip
    rows += [
        rows[3],  # row 81: the same row again
        {"instruction": "请讲讲这首诗", "output": LONG},
        {"instruction": "请讲讲这首诗吧", "output": LONG},  # row 83: nearly the same
        {"instruction": "你叫什么？", "output": "抱歉，作为一个人工智能语言模型，我没有名字。"},  # row 84: a refusal
        {"instruction": "怎样给老师写信？", "output": "请写到 laoshi@san-zhong.cn 这个地址去。"},  # row 85: masked
        {"instruction": "短", "output": "好"},
        {"instruction": "没有回答", "output": ""},
        {"instruction": "长", "output": "很长很长的回答，" + "".join(map(str, range(2000)))},
    ]
    write_rows(place / "raw/own/a.jsonl", rows)
    sets = {"own": {"kind": "sft", "rules": {"max_chars": 700}}}
    (place / "sets.yaml").write_text(yaml.safe_dump(sets), encoding="utf-8")
    config = {"raw_dir": f"{place}/raw", "output_dir": f"{place}/proc", "hub": "none", "workers": 1,
              "max_bad_rows": 0.1, "catalogue": f"{place}/sets.yaml", "sft": {"mix": {"own": 1}}}  # fmt: skip
    path = place / "data.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    done = run_command("-m", "scripts.prepare_data", "--config", str(path))
    assert done.returncode == 0, done.stderr
    return load_config(PrepareData, path)


def kept(loaded) -> list[dict]:
    files = (loaded.config.output_dir / f"sft_{side}.jsonl" for side in ("train", "val", "test"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def dropped(loaded) -> dict[str, dict]:
    """Reason -> the last entry that has it."""
    with open(loaded.config.output_dir / "sft_dropped.jsonl.zst", "rb") as packed:
        lines = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True))
        return {entry["reason"]: entry for entry in map(json.loads, lines)}


def test_every_record_and_row_has_a_story(loaded):
    for record in kept(loaded):
        told = why.tell(loaded, record["id"])
        assert told.startswith(f"{record['id']}: kept, ") and f"a.jsonl:{record['meta']['line']}\n" in told
        assert record["messages"][0]["content"] in told
    for row in range(1, 89):
        assert f"a.jsonl:{row}\n" in why.tell(loaded, f"own/a.jsonl:{row}")


def test_a_dropped_record_tells_rule_and_bound(loaded):
    """The bound is the source's own, not the config's; what dropped it is said with its number."""
    entry = dropped(loaded)["too_long"]
    told = why.tell(loaded, entry["record"]["id"])
    assert "dropped, too_long" in told and entry["detail"] in told and "sft_dropped.jsonl.zst, line " in told
    assert 'rules.too_long="drop", rules.max_chars=700, rules.max_tokens=null' in told
    assert telling.meaning("too_long") in told and "more characters)" in told, "a long text is cut, and that is said"
    told = why.tell(loaded, "a.jsonl:87")
    assert told.startswith("a raw row: dropped, empty_turn") and "没有回答" in told


def test_a_duplicate_stands_beside_what_it_repeats(loaded):
    entry = dropped(loaded)["near_duplicate"]
    first = entry["detail"].removeprefix("of ")
    told = why.tell(loaded, entry["record"]["id"])
    assert f"it repeats {first}" in told and "the first one of its cluster: kept" in told
    sides = [line.split("|") for line in told.splitlines() if line.startswith("user:")]
    assert [part.split()[-1] for part in sides[0]] == ["请讲讲这首诗吧", "请讲讲这首诗"]
    score = float(told.split("shingles: ")[1].split()[0])
    one, other = ("请讲讲这首诗吧" + LONG, "请讲讲这首诗" + LONG)
    sets = [{text[i : i + 5] for i in range(len(text) - 4)} for text in (one, other)]
    assert score == pytest.approx(len(sets[0] & sets[1]) / len(sets[0] | sets[1]), abs=0.001) and score >= 0.8


def test_equal_rows_have_one_id_and_two_fates(loaded):
    entry = dropped(loaded)["exact_duplicate"]
    told = why.tell(loaded, entry["record"]["id"])
    assert told.count(entry["record"]["id"] + ": ") == 2
    assert ": kept, " in told and ": dropped, exact_duplicate" in told and "character shingles: 1.000" in told


def test_flags_and_repairs_are_told(loaded):
    told = why.tell(loaded, "a.jsonl:84")
    assert "flagged     refusal (" in told and 'rules.refusal="flag"' in told
    told = why.tell(loaded, "a.jsonl:85")
    assert "repaired    masked_email" in told and "laoshi@san-zhong.cn" not in told


def test_what_is_not_there_is_answered_with_what_is_near(loaded):
    known = kept(loaded)[5]["id"]
    wrong = known[:-1] + ("0" if known[-1] != "0" else "1")
    with pytest.raises(UserFault, match="the nearest of") as fault:
        why.tell(loaded, wrong)
    assert str(fault.value).split("ids: ")[1].startswith(known)
    for what, answer in (("nonsense!", "give an id"), ("a.jsonl:5000", "was read; no record stands under row 5000"),
                         ("b.jsonl:1", "files that were read: ")):  # fmt: skip
        with pytest.raises(UserFault, match=answer):
            why.tell(loaded, what)


def test_a_prefix_is_enough_where_it_is_of_one(loaded):
    ids = {record["id"] for record in kept(loaded)}
    one = sorted(ids)[0]
    assert why.tell(loaded, one[:9]).startswith(f"{one}: ")
    some = why.at_place(loaded.config.output_dir, ["sft"], "a.jsonl", 1)
    assert next(some).record["messages"][0]["content"].startswith("请说说第0课")


def test_many_that_fit_are_listed(loaded, monkeypatch):
    found = list(why.with_id(loaded.config.output_dir, ["sft"], ""))
    monkeypatch.setattr(why, "with_id", lambda *_: iter(found))
    told = why.tell(loaded, "abcd").splitlines()
    assert told[0].startswith(f"{len(found)} records and rows fit") and told[-1] == f"  and {len(found) - 20} more"


def test_without_a_finished_set_the_next_command_is_named(loaded, tmp_path):
    elsewhere = loaded.model_copy(update={"config": loaded.config.model_copy(update={"output_dir": tmp_path})})
    with pytest.raises(UserFault, match="no finished set in .*\n  next: python -m scripts.prepare_data --config"):
        why.tell(elsewhere, "abcd")


def test_chinese_lines_are_as_wide_as_they_are_shown():
    assert telling.width("中a。") == 5
    lines = telling.wrapped("一二三四五六七八 abc def\n\n短", 11)
    assert lines == ["一二三四五", "六七八 abc", "def", "", "短"] and all(telling.width(line) <= 11 for line in lines)
    assert telling.wrapped("x" * 25, 10) == ["x" * 10, "x" * 10, "x" * 5]
    assert telling.readable({"messages": [{"role": "user", "content": "abcdef"}, {"role": "assistant", "content": "g"}],
                             "id": "1", "source": "s", "meta": {}}, 4) == "user: abcd ...\n..."  # fmt: skip


@pytest.mark.parametrize("row", [
    None, 5, [], {}, {"messages": 3}, {"messages": [{"role": 1}]}, {"chosen": "a"}, [[1], {}], {"a": "\ud800"},
    {"id": "x", "source": "y", "text": 3, "meta": 0},
])  # fmt: skip
def test_anything_can_be_shown(row):
    assert telling.readable(row).encode() and [line.encode() for line in telling.told(row)]
    assert telling.side_by_side(row, {"b": "c"}, 40) and why.record_id(row) == ""
