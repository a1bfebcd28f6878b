"""Decontamination: every layout of a benchmark is read; leaks are found however they are wrapped, and nothing else."""

import json
import random
from collections import defaultdict

import pytest
from conftest import shared

from posttrain.data import decontaminate
from posttrain.data.benchmarks import UNIT, Item, benchmark_paths, read_benchmarks
from posttrain.data.decontaminate import build, index_of, leaks, load, save
from posttrain.errors import UserFault
from posttrain.text import folded_text

CANAL = Item("geo", "test.csv:2", ("下列关于北方古老运河的叙述中，哪一项与史书的记载并不相符？",),
             ("它在元代改道经过山东", "漕粮每年三月起运北上", "沿岸设有十三处大闸",
              "清末因铁路兴起而衰落"))  # fmt: skip
EGGS = Item("maths", "test.jsonl:1", (
    "A farmer packs eggs into boxes of twelve. On Monday her hens lay forty one eggs, on Tuesday thirty seven, and on "
    "Wednesday she drops a basket and loses nineteen. How many full boxes can she sell at the market on Thursday?",
))  # fmt: skip
PEAK = Item("quiz", "q.txt:3", ("哪座山峰最高？",))


def said(record: str, *items: Item, min_coverage: float = 0.5) -> str | None:
    """What is said of a record of one turn."""
    return leaks(index_of(list(items)), [[folded_text(record)]], min_coverage)[0]


def quoted(item: Item) -> str:
    lettered = [f"{letter}. {text}" for letter, text in zip("ABCD", item.options, strict=False)]
    return "\n".join([*item.question, *lettered])


# ------------------------------------------------------------------ leaks


@pytest.mark.parametrize("item", [CANAL, EGGS, PEAK], ids=["zh", "en", "short"])
def test_a_quoted_item_is_a_leak_and_named(item):
    assert said(quoted(item), item) == f"{item.task} {item.place}, 100% of it"


@pytest.mark.parametrize("wrapped", [
    lambda text: f"请先想一想，再回答：\n\n{text}\n\n只写答案。",
    lambda text: json.dumps({"q": text, "n": 1}, ensure_ascii=False),
    lambda text: "\n".join("> " + line for line in text.split("\n")).upper(),
    lambda text: text.replace("，", ",").replace("？", "?").replace(". ", "．"),
    lambda text: "我昨天读到一段话，很有意思。" * 20 + "\n" + text,
    lambda text: " \n".join(UNIT.findall(text)),
], ids=["instruction", "json", "quote", "width", "appended", "one unit a line"])  # fmt: skip
@pytest.mark.parametrize("item", [CANAL, EGGS], ids=["zh", "en"])
def test_what_stands_around_an_item_does_not_hide_it(item, wrapped):
    assert said(wrapped(quoted(item)), item)


def test_the_order_and_letters_of_options_do_not_matter():
    short = Item("geo", "1", ("运河的起点是",), ("杭州的拱宸桥", "北京的通州", "苏州的枫桥", "扬州的瓜洲"))
    for item in (CANAL, short):
        turned = f"{item.question[0]} " + "  ".join(f"（{i}）{text}" for i, text in enumerate(item.options[::-1], 1))
        assert said(turned, item).endswith("100% of it")
    assert said("运河的起点是 A、扬州的瓜洲 B、北京的通州 C、苏州的枫桥", short)  # one line, one option missing


def test_half_of_a_long_item_is_a_leak_and_less_is_not():
    words = EGGS.question[0].split()
    assert said(" ".join(words[: len(words) // 2 + 1]), EGGS)
    assert said(" ".join(words[len(words) // 2 - 1 :]), EGGS)
    assert not said(" ".join(words[: len(words) // 2 - 4]), EGGS)
    assert said(" ".join(words[: len(words) // 2 - 4]), EGGS, min_coverage=0.3)


def test_a_long_question_is_a_leak_without_its_options_a_stub_is_not():
    options = ("它在元代改道经过山东而不再绕行河南的洛阳城", "漕粮每年三月起运北上并在秋收之前到达通州仓库")
    assert said(CANAL.question[0], CANAL._replace(options=options))
    stub = Item("geo", "1", ("关于这条运河，正确的说法是",), options)
    assert said("关于这条运河，正确的说法是：它没有尽头。", stub) is None
    assert said(quoted(stub), stub)


# ------------------------------------------------------------------ no leaks


@pytest.mark.parametrize("record", [
    "大运河在元代改道以后，漕粮北上要经过山东，沿岸的水闸由官府管理，清末才渐渐衰落。",
    "、".join(CANAL.options),  # options alone are short: each could stand anywhere
    "A farmer packs eggs into boxes. How many full boxes can she sell if her hens lay eighty eggs on Monday?",
    "我想知道世界上哪座山峰最高的时候天气怎么样",
    "",
    "？！……",
], ids=["topic", "options", "same kind", "short, inside a sentence", "empty", "no units"])  # fmt: skip
def test_what_is_alike_is_no_leak(record):
    assert said(record, CANAL, EGGS, PEAK) is None


def test_a_13_gram_lies_in_one_turn_of_one_record():
    text = folded_text(EGGS.question[0])
    at = len(" ".join(text.split()[:12]))
    index = index_of([Item("t", "1", (" ".join(text.split()[:24]),))])
    pieces = [text[:at], text[at : len(" ".join(text.split()[:24]))]]
    assert leaks(index, [pieces, pieces[:1], pieces[1:]], 0.5) == [None] * 3
    assert leaks(index, [[pieces[0] + pieces[1], "ok"]], 0.5) == ["t 1, 100% of it"]


def test_boilerplate_of_many_items_is_ignored():
    stem = "请根据题目给出的材料选择最符合题意的一个选项并说明理由"
    facts = ["铜的熔点比铁低", "海带属于藻类植物", "光年是长度的单位", "蝙蝠不是鸟类动物", "雪线随纬度而变化",
             "竹子是禾本科植物", "水银在常温下流动", "月球没有大气保护", "磁极不能单独存在",
             "酵母菌是一种真菌"]  # fmt: skip
    items = [Item("exam", str(i), (f"{stem}：{fact}，这句话对吗？",)) for i, fact in enumerate(facts)]
    assert said(stem + "：世界上最大的湖是哪一个？", items[0])  # in one item it is its text,
    assert said(stem + "：世界上最大的湖是哪一个？", *items) is None  # in ten it says nothing
    assert said(f"{stem}：{facts[6]}，这句话对吗？", *items) == "exam 6, 100% of it"


def test_items_that_are_too_short_are_counted_not_looked_for():
    index = index_of([Item("t", "1", ("苹果",)), Item("t", "2", ("Why?",)), EGGS])
    assert index.notes == ["2 items are too short or too common to be looked for"]
    assert leaks(index, [["苹果"], ["why?"]], 0.5) == [None, None]


def test_one_item_in_several_files_counts_once():
    copies = [EGGS._replace(place=f"copy{i}.jsonl:1") for i in range(20)]
    assert said(EGGS.question[0], *copies) == "maths copy0.jsonl:1, 100% of it"


def test_winogrande_is_found_with_its_gap_filled(tmp_path):
    row = {"sentence": "The vase would not fit in the cupboard next to the tall jars because the _ was far too wide.",
           "option1": "vase", "option2": "cupboard", "answer": "1"}  # fmt: skip
    (tmp_path / "dev.jsonl").write_text(json.dumps(row))
    assert leaks(build([tmp_path]), [[row["sentence"].replace("_", "vase").lower()]], 0.9)[0].endswith("100% of it")


# ------------------------------------------------------------------ the index equals its definition


def plain_leaks(items: list[Item], texts: list[list[str]], min_coverage: float) -> list[str | None]:
    """decontaminate's docstring, word for word, on Python strings."""

    def units(text):
        text = text.replace("\\n", "\n\n").lower()
        found = list(UNIT.finditer(text))
        ends = [0, *(match.end() for match in found)]
        gaps = [text[end : match.start()] for end, match in zip(ends, found, strict=False)] + [text[ends[-1] :]]
        apart = [i in (0, len(found)) or bool(set(gap) - set(" ,")) for i, gap in enumerate(gaps)]
        plain = [match[0] for match in found]
        lettered = [i < len(plain) and plain[i] in list("abcdefgh") and apart[i + 1] for i in range(len(apart))]
        return plain, [one or other for one, other in zip(apart, lettered, strict=True)]

    def runs(words, length):
        return [(length, "".join(words[i : i + length])) for i in range(len(words) - length + 1)]

    def covered(places):
        return len({place + i for place in places for i in range(13)})

    names, owners = {}, defaultdict(set)
    for item in items:
        key = tuple(map(folded_text, item.question)), frozenset(map(folded_text, item.options))
        names.setdefault(key, (f"{item.task} {item.place}", item))
    parts = []
    for number, (_, item) in enumerate(names.values()):
        mine = [(units(folded_text(text))[0], asks) for asks, some in ((True, item.question), (False, item.options))
                for text in some]  # fmt: skip
        parts.append([(words, asks) for words, asks in mine if words])
        for words, _ in parts[-1]:
            for run in runs(words, min(13, len(words))):
                owners[run].add(number)
    counts = {run for run, of in owners.items() if len(of) <= decontaminate.COMMON}

    def value(words):
        if len(words) < 13:
            return len(words) * (runs(words, len(words))[0] in counts)
        return covered([i for i, run in enumerate(runs(words, 13)) if run in counts])

    def coverage(number, record):
        mine = parts[number]
        if sum(value(words) for words, asks in mine if asks) >= decontaminate.QUESTION_ALONE:
            mine = [part for part in mine if part[1]]
        total = held = 0
        anchored = False
        for words, asks in mine:
            there = [run for text, _ in record for run in runs(text, min(13, len(words)))]
            if len(words) >= 13:
                found = [i for i, run in enumerate(runs(words, 13)) if run in counts and run in there]
                total, held, anchored = total + value(words), held + covered(found), anchored or bool(found)
                continue
            run = runs(words, len(words))[0]
            letters = sum(len(word) * (1 + ("一" <= word[0] <= "鿿")) for word in words)
            if asks and (len(words) < decontaminate.SHORT or letters < decontaminate.SHORT_CHARS):
                continue
            whole = [(len(words), "".join(text[i : i + len(words)])) for text, apart in record
                     for i in range(len(text) - len(words) + 1) if apart[i] and apart[i + len(words)]]  # fmt: skip
            anchored = anchored or asks and run in whole
            total, held = total + value(words), held + value(words) * (run in (whole if asks else there))
        return held / total if total and anchored else 0

    said = []
    for turns in texts:
        record = [units(text) for text in turns]
        best = max(range(len(parts)), key=lambda number: coverage(number, record), default=None)
        share = coverage(best, record) if best is not None else 0
        name = list(names.values())[best][0] if share and share >= min_coverage - 1e-9 else None
        said.append(f"{name}, {share:.0%} of it" if name else None)
    return said


def test_the_index_equals_the_plain_definition():
    dice = random.Random(7)
    words = list("天地玄黄宇宙洪") + ["a", "b", "We", "went", "12", "7"]
    gaps = ["", "", "", " ", " ", ", ", "。", "\n", "? ", "\\n"]

    def text(length):
        return "".join(dice.choice(words) + dice.choice(gaps) for _ in range(length))

    found = 0
    for _ in range(60):
        items = []
        for number in range(dice.randrange(0, 14)):
            stem = items[-1].question[0] if items and dice.random() < 0.3 else ""
            question = tuple(stem + text(dice.choice((2, 5, 9, 14, 20, 40))) for _ in range(dice.choice((1, 1, 2))))
            options = tuple(text(dice.choice((1, 2, 6, 15))) for _ in range(dice.choice((0, 0, 2, 4))))
            items.append(Item("t", str(number), question, options))
        texts = []
        for _ in range(12):
            turns = []
            for _ in range(dice.choice((1, 1, 2))):
                pieces = [piece for item in items for piece in (*item.question, *item.options)] or ["x"]
                taken = [dice.choice((text(6), dice.choice(pieces))) for _ in range(dice.randrange(5))]
                whole = dice.choice(("\n", " ", "")).join(taken)
                at = dice.randrange(len(whole) // 2 + 1) if dice.random() < 0.4 else 0
                turns.append(folded_text(whole[at:]))
            texts.append(turns)
        expected = plain_leaks(items, texts, 0.5)
        assert leaks(index_of(items), texts, 0.5) == expected
        found += sum(detail is not None for detail in expected)
    assert 100 < found < 600  # neither none nor all of 720


def test_batches_and_a_saved_index_change_nothing(tmp_path, monkeypatch):
    index = index_of([CANAL, EGGS, PEAK], ["a note"])
    texts = [["好的"], [folded_text(quoted(CANAL))], [], ["", folded_text(EGGS.question[0])], ["问：哪座山峰最高?"]] * 3
    expected = leaks(index, texts, 0.5)
    assert [detail and detail.split()[0] for detail in expected[:5]] == [None, "geo", None, "maths", "quiz"]
    monkeypatch.setattr(decontaminate, "BATCH", 20)
    save(index, tmp_path / "index")
    loaded = load(tmp_path / "index")
    assert leaks(loaded, texts, 0.5) == expected
    assert loaded.notes == ["a note"] and loaded.names == index.names


# ------------------------------------------------------------------ reading


def as_json(*rows) -> str:
    return json.dumps(rows, ensure_ascii=False)


COUNTED = "She has " + "one more " * 13
TOWER = {"title": "塔", "paragraphs": [{"context": "塔高九层。", "qas": [
    {"question": "塔有几层？", "id": "1", "answers": [{"text": "九层"}]}, {"question": "什么高？"}]}]}  # fmt: skip
FOX = {"article": "A fox.", "question": "Who?", "options": ["fox", "owl"], "answer": "A"}
ROWS = {"ind": 4, "activity_label": "Rowing", "ctx_a": "He rows.", "ctx_b": "he", "ctx": "He rows. he", "label": 1,
        "endings": ["stops.", "sings."]}  # fmt: skip
CHAT = [{"role": "system", "content": "Short."}, {"role": "user", "content": "Hi?"}]
LAYOUTS = {
    "cmmlu.csv": (",Question,A,B,C,D,Answer\n0,哪一个是海,黄河,渤海,长江,西湖,B\n",
                  [(("哪一个是海",), ("黄河", "渤海", "长江", "西湖"))]),
    "gsm8k.jsonl": (json.dumps({"question": "How many?", "answer": COUNTED + "<<1+1=2>>2.\n#### 2"}),
                    [(("How many?",), ()), ((COUNTED + "<<1+1=2>>2.\n#### 2",), ()), ((COUNTED + "2.\n#### 2",), ())]),
    "thucnews.txt": ("球队昨夜客场取胜\t7\n\n新房价格继续走低\t1\n",
                     [(("球队昨夜客场取胜",), ()), (("新房价格继续走低",), ())]),
    "squad.json": (json.dumps({"data": [TOWER]}), [(("塔高九层。",), ("塔有几层？", "什么高？"))]),
    "race.json": (as_json(FOX, FOX | {"question": "What?", "options": ["run", "eat"]}),
                  [(("A fox.",), ("Who?", "fox", "owl", "What?", "run", "eat"))]),
    "mosaic.jsonl": (json.dumps({"context_options": ["Ann so Ann", "Ann so Bea"], "continuation": "left.", "gold": 0}),
                     [(("Ann so Ann left.",), ()), (("Ann so Bea left.",), ())]),
    "safety.json": (as_json({"id": 1, "options": ["是", "否"], "category": "Bias", "question": "冒犯吗？"}),
                    [(("冒犯吗？",), ("是", "否"))]),
    "turns.jsonl": (json.dumps({"question_id": 1, "category": "writing", "turns": ["Write.", "Rewrite."]}),
                    [(("Write.",), ()), (("Rewrite.",), ())]),
    "hellaswag.jsonl": (json.dumps(ROWS), [(("He rows. he",), ("stops.", "sings."))]),
    "arc.json": (as_json({"id": "x", "question": "Hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}}),
                 [(("Hot?",), ("ice", "fire"))]),
    "lettered.csv": ('system,prompt,answer\nReply.,"Who?\n\nA. Ann\nB. Bea",B\n',
                     [(("Who?\n\n",), (" Ann\n", " Bea"))]),
    "dialogue.json": (as_json({"question": "A: 你好\nB: 你好\n这样回答好吗？", "options": ["好"]}),
                      [(("A: 你好\nB: 你好\n这样回答好吗？",), ("好",))]),
    "chat.json": (as_json({"messages": CHAT}), [(("Hi?",), ())]),
    "panel.yaml": ("prompts:\n  - id: story-1\n    topic: story\n    prompt: 讲一个故事\n    checks: {lines: 3}\n"
                   "  - id: talk-1\n    turns: [第一问, 第二问]\n",
                   [((asked,), ()) for asked in ("讲一个故事", "第一问", "第二问")]),
    "unknown.csv": ("nr,aufgabe,art\n1,Wie viele Eier legt das Huhn in einer Woche?,leicht\n",
                    [(("Wie viele Eier legt das Huhn in einer Woche?",), ())]),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_layouts(tmp_path, name):
    text, expected = LAYOUTS[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    items, notes = read_benchmarks([tmp_path / name])
    assert [(item.question, item.options) for item in items] == expected
    assert {item.task for item in items} == {name.split(".")[0]} and not notes
    assert all(item.place.startswith(f"{name}:") for item in items)


def test_a_directory_is_a_task_and_what_is_left_out_is_said(tmp_path):
    folder = tmp_path / "eval"
    for name, text in {"geo/test/rivers.csv": "question,A,B\n哪条河最长,黄河,长江\n", "geo/README.md": "x",
                       "geo/train.jsonl": '{"question": "哪条河"}', "geo/answers.json": '{"2": {"answer": 1}}',
                       "geo/class.txt": "sport\n", "lone.txt": "一行一题\n"}.items():  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    more = tmp_path / "panel.yaml"
    more.write_text("- prompt: 写一封短信\n", encoding="utf-8")
    items, notes = read_benchmarks(benchmark_paths(folder, [more]))
    assert [(item.task, item.place) for item in items] == [
        ("geo", "test/rivers.csv:2"), ("lone", "lone.txt:1"), ("panel", "panel.yaml:1")]  # fmt: skip
    assert notes == ["geo answers.json: no question in its rows, not looked for",
                     "geo train.jsonl: a train split, not looked for"]  # fmt: skip


def test_nothing_laid_there_finds_nothing(tmp_path):
    assert benchmark_paths(tmp_path / "absent", []) == []
    index = build([])
    save(index, tmp_path / "index")
    assert leaks(load(tmp_path / "index"), [["任何文字"], []], 0.5) == [None, None]
    with pytest.raises(UserFault, match="absent.json"):
        benchmark_paths(tmp_path, [tmp_path / "absent.json"])


@pytest.mark.parametrize(("name", "content"), [
    ("cut.json", b'[{"question": "a"}, {"quest'),
    ("cut.jsonl", b'{"question": "a"}\n{"question": '),
    ("open.csv", 'question,A\n"没有结尾的引号,x\n'.encode()),
    ("gb.txt", "一行中文\n".encode("gb18030")),
    ("bad.yaml", b"a: [1, 2"),
    ("cells.csv", b"question,A\nq,1,2\n"),
])  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserFault, match=name):
        build([tmp_path / name])


# ------------------------------------------------------------------ real benchmarks


def test_every_published_cmmlu_question_is_found_in_its_own_words():
    index = build([shared("data/cmmlu")])
    items, _ = read_benchmarks([shared("data/cmmlu")])
    texts = [[folded_text(quoted(item))] for item in items]
    missed = [item.place for item, detail in zip(items, leaks(index, texts, 0.5), strict=True) if not detail]
    assert len(items) > 5000 and len(missed) < 0.01 * len(items), missed[:10]
