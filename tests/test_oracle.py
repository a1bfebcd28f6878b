"""The block engine gives what plain programs give record by record: rules.RULES one by one, and tests/reference.py."""

import gzip
import json
import random
from pathlib import Path

import pytest
import reference
import yaml
from conftest import ROOT, run_command, shared
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data import checks
from posttrain.data.block import Task, write_training_text
from posttrain.data.files import read_rows
from posttrain.data.jsonfiles import Fault
from posttrain.data.rules import RULES, View
from posttrain.data.shape import gathered, turns_of
from posttrain.data.sources import to_records
from posttrain.data_blocks import Rules
from posttrain.records import fault_in, read_jsonl
from posttrain.text import folded_text

ALL = frozenset(Rules.model_fields)
TASK = Task("sft", Path(), [], "zh_safe", True, 0, frozenset(), (), (), None, 0.5, None)
PIECES = [
    "请问", "什么是水？", "水是液体。", "抱歉，我无法回答。", "作为一个人工智能语言模型，",
    "As an AI language model", "I'm sorry, but I can't", "根据以下文章回答", "今天天气如何？", "如下图所示",
    "What is this?", "The answer is 42.", " 1234567", "，", "\n", "ä¸\xadæ–‡", "锟斤拷", "更正：",
    "对不起，我之前说错了。", "3.14", "Ответ", "~~~###", "哈哈哈哈哈哈", "translate to English", "latest news",
    "x", " ",
]  # fmt: skip
said = st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map("".join)


def one_by_one(record, rules):
    """(reason, flags) by fault_in and by every rule's own function."""
    if fault := fault_in(record):
        return fault, []
    turns = turns_of(record)
    view = View([turn["role"] for turn in turns], [folded_text(turn["content"]) for turn in turns], record)
    flags = []
    for rule in RULES:
        action = getattr(rules, rule.name)
        if action != "keep" and rule.finds(view, rules):
            if action == "drop":
                return rule.name, []
            flags.append(rule.name)
    return None, flags


def assert_alike(records, rules):
    texts = gathered(records)
    write_training_text(texts, TASK)
    found = checks.check(texts, rules, checks.tools_for(ALL, (), (), None, 0.5, None))
    for number, record in enumerate(texts.records):
        reason, flags = one_by_one(record, rules)
        assert (found.reasons[number] or (None,))[0] == reason, record
        if reason is None:
            assert [name for name, _ in found.flags.get(number, ())] == flags, record


def chat(texts):
    roles = ("user", "assistant")
    return {"id": "x", "source": "s", "meta": {},
            "messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]}  # fmt: skip


chats = st.lists(said, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0).map(chat)
rule_sets = st.builds(
    Rules, min_chars=st.integers(0, 30), max_chars=st.integers(30, 200), min_cn_ratio=st.floats(0, 1),
    allow_english_fallback=st.booleans(), min_ordinary=st.floats(0, 1), max_repetition=st.floats(0, 1),
    pii=st.just("keep"), **{rule.name: st.sampled_from(("keep", "flag", "drop")) for rule in RULES},
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(chats, min_size=1, max_size=8), rule_sets)
def test_a_block_is_checked_as_its_records_are(records, rules):
    assert_alike(records, rules)


@pytest.mark.parametrize("kind", ["sft", "pref"])
def test_real_records_are_checked_alike(kind):
    file = shared(f"bench/{'sft_zh_en' if kind == 'sft' else 'pref_pairs'}.jsonl.gz")
    step = 40 if kind == "sft" else 10
    rows = [row for number, row in read_rows(file) if number % step == 0]
    records = [r for row in rows for r in to_records(row, "bench", kind) if not isinstance(r, Fault)]
    assert len(records) > 400
    assert_alike(records, Rules(pii="keep", max_chars=1500))


# ------------------------------------------------------------------ the plain reference, on the whole stage


REFERENCE_RULES = {
    "min_chars": reference.MIN_CHARS, "max_chars": reference.MAX_CHARS, "pii": "drop", "keywords": "drop",
    **dict.fromkeys((rule.name for rule in RULES[5:]), "keep"), "other_language": "keep", "repeated_answer": "keep",
    "repeated_opening": "keep", "contaminated": "keep",
}  # fmt: skip


def engine(tmp_path, kind, rows, near):
    """Lines of the rows that the stage keeps with the reference's rules."""
    (tmp_path / "raw/rows").mkdir(parents=True, exist_ok=True)
    (tmp_path / "raw/rows/rows.jsonl").write_bytes(b"".join(rows))
    words = tmp_path / "words.txt"
    words.write_text("\n".join(reference.keywords()), encoding="utf-8")
    none = tmp_path / "none.txt"
    none.write_text("没有这个词没有这个词\n", encoding="utf-8")
    config = {
        "stage": kind, "raw_dir": str(tmp_path / "raw"), "output_dir": str(tmp_path / f"proc_{near}"), "hub": "none",
        kind: {"mix": {"rows": 1}, "max_samples": 10**7}, "split": [1, 0, 0], "max_bad_rows": 1, "workers": 1,
        "rules": REFERENCE_RULES | {"near_duplicate": near},
        "keywords": {"own": str(words)} | {name.stem: str(none) for name in (ROOT / "configs/keywords").glob("*.txt")},
    }  # fmt: skip
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    run = run_command("-m", "scripts.prepare_data", "--config", str(path))
    assert run.returncode == 0, run.stderr
    return {record["meta"]["line"] for record in read_jsonl(tmp_path / f"proc_{near}/{kind}_train.jsonl")}


@pytest.mark.parametrize(("kind", "count"), [("sft", 4000), ("pref", 1500)])
def test_the_stage_keeps_what_the_reference_keeps(tmp_path, kind, count):
    pytest.importorskip("datasketch")
    with gzip.open(shared(f"bench/{'sft_zh_en' if kind == 'sft' else 'pref_pairs'}.jsonl.gz")) as lines:
        rows = random.Random(5).sample(list(lines), count)
    again = [json.dumps(json.loads(row) | {"n": 1}).encode() + b"\n" for row in rows[:50]]  # exact duplicates
    result_path = tmp_path / "rows.jsonl"
    result_path.write_bytes(b"".join(rows + again))
    expected = reference.run([result_path])
    before = {int(place.rsplit(":", 1)[1]) for place in expected["before_near_duplicates"]}
    assert engine(tmp_path, kind, rows + again, "keep") == before
    after = {int(place.rsplit(":", 1)[1]) for place in expected["kept"]}
    assert expected["dropped"]["near_duplicate"] > 10 and expected["dropped"]["exact_duplicate"] >= 45
    assert len(engine(tmp_path, kind, rows + again, "drop") ^ after) <= 0.0005 * count
