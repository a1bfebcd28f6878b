"""Contamination of an evaluation: items found in training files by the data stage's code, scores without them."""

import json

import pytest
from conftest import write_rows

from posttrain.data.overlap import items_in_files
from posttrain.evals import clean
from posttrain.runs import describe_file

QUESTIONS = [
    "在标准大气压下把两千克冰从零下十摄氏度加热到沸腾一共需要吸收多少焦耳的热量",
    "某商店第一天卖出货物的三分之一第二天卖出余下的一半还剩四十八件问原来有多少件",
    "下列关于细胞膜结构和功能的叙述中哪一项与流动镶嵌模型的内容不相符合",
    "唐代安史之乱以后地方节度使逐渐掌握财政权力的主要原因是什么",
]  # fmt: skip
ROWS = {
    "exam": [{"Question": q, "A": "甲", "B": "乙", "C": "丙", "D": "丁", "Answer": "A"} for q in QUESTIONS],
    "word_problems": [{"question": "Natalia picked forty eight apples in April and then half as many in May, how many "
                                   "apples did she pick altogether in both months?", "answer": "#### 72"}],
}  # fmt: skip


@pytest.fixture
def files(tmp_path):
    """Two questions of the exam in one SFT record, re-wrapped; the English one in a preference record."""
    both = f"第一题：{QUESTIONS[1][:15]}，\n{QUESTIONS[1][15:]}？第二题：{QUESTIONS[3]}？"
    chat = {"id": "1", "source": "s", "meta": {}, "messages": [{"role": "user", "content": both},
                                                               {"role": "assistant", "content": "见下。"}]}  # fmt: skip
    asked = ROWS["word_problems"][0]["question"].upper()
    right, wrong = ([{"role": "assistant", "content": text}] for text in ("72", "?"))
    pair = {"id": "2", "source": "s", "meta": {}, "prompt": [{"role": "user", "content": asked}], "chosen": right,
            "rejected": wrong}  # fmt: skip
    return write_rows(tmp_path / "sft.jsonl", [chat]), write_rows(tmp_path / "pref.jsonl", [pair])


def test_every_item_of_a_record_is_found_and_no_other(files):
    assert items_in_files(ROWS, [files[0]]) == {"exam": {1, 3}, "word_problems": set()}
    assert items_in_files(ROWS, list(files)) == {"exam": {1, 3}, "word_problems": {0}}
    twice = {**ROWS, "copy": ROWS["exam"][3:]}
    assert items_in_files(twice, [files[0]])["copy"] == {0}, "an item that stands in two tasks is found in both"


def test_items_are_found_in_files_of_ones_own(tmp_path):
    question = QUESTIONS[1]
    alpaca = write_rows(tmp_path / "own.jsonl", [{"instruction": question, "input": "", "output": "一百四十四件"}])
    array = tmp_path / "array.json"
    array.write_text(json.dumps([{"conversations": [{"from": "human", "value": question},
                                                    {"from": "gpt", "value": "见下"}]}]), encoding="utf-8")  # fmt: skip
    strings = write_rows(tmp_path / "pairs.jsonl", [{"prompt": question, "chosen": "甲", "rejected": "乙"}])
    book = tmp_path / "book.txt"
    book.write_text(f"练习\n{question}。\n", encoding="utf-8")
    for file in (alpaca, array, strings, book):
        assert items_in_files(ROWS, [file]) == {"exam": {1}, "word_problems": set()}, file.name


def test_training_files_of_the_whole_chain(files, tmp_path):
    from posttrain.runs import write_json

    sft, pref = files
    write_json(tmp_path / "manifest.json", {"inputs": {"train:a": describe_file(sft)}, "parents": {}})
    aligned = {"inputs": {"train:b": describe_file(pref), "base": {"id": "x"}},
               "parents": {"data": {"path": "nowhere"}, "sft": {"path": str(tmp_path / "manifest.json")}}}  # fmt: skip
    assert clean.training_files(aligned) == ([pref, sft], [])
    on_whole = {"inputs": {"train:b": describe_file(pref)}, "parents": {}, "base": {"path": str(tmp_path)}}
    assert clean.training_files(on_whole) == ([pref, sft], []), "a full run as the base"
    pref.write_text("", encoding="utf-8")
    sft.unlink()
    found, notes = clean.training_files(aligned)
    assert found == [] and "has changed" in notes[0] and "is gone" in notes[1]
    assert "no manifest" in clean.training_files(None)[1][0]


def test_clean_scores(files):
    manifest = {"inputs": {"train:a": describe_file(files[0])}, "parents": {}}
    found = clean.contamination({"a": manifest, "foreign": None}, ROWS, items_in_files)
    assert found["a"]["items"] == {"exam": [1, 3]} and found["foreign"]["files"] == []
    items = {"exam": [1.0, 1.0, 0.0, 1.0], "word_problems": [1.0]}
    scores = {m: {task: {"items": {"acc,none": own}} for task, own in items.items()} for m in ("base", "a")}
    table = [{"task": "all", "metric": "acc", "scores": {m: {"value": 0.8} for m in scores}},
             {"task": "exam", "metric": "other", "scores": {"a": {"value": 1.0}}}]  # fmt: skip
    clean.add_clean_scores(table, {"all": ["exam", "word_problems"]}, scores, {}, found)
    assert table[0]["scores"]["a"]["clean"] == {"value": pytest.approx(2 / 3), "n": 3}
    assert "clean" not in table[0]["scores"]["base"] and table[1]["scores"]["a"]["clean"]["value"] is None
    said = "\n".join(clean.lines(table, found))
    assert "acc 0.8000, 0.6667 on the other 3" in said and "no score without them" in said and "foreign" in said
