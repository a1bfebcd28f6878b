"""The forms of a text, tags that are markup and tags that are the subject, and what cannot change."""

import gzip
import json
import random
import unicodedata

import pytest
from conftest import shared
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import text as texts
from posttrain import text_forms
from posttrain.text_forms import about_markup, chinese_punctuation, without_html, written

# Pieces that make work for each other: fences, odd spaces, halves of tags, references, combining marks, both styles.
PIECES = st.sampled_from(
    ["中", "文字", "a", "word ", "Ｚ", "５", "1", " ", "  ", "    ", "\t", "\u3000", "\xa0", "\u2003", "\u1680",
     "\n", "\n\n\n", "\r\n", "\u2028", "\x00", "\x85", "\u200b", "\u200d", "\ufeff", "\ud800", "😀", "e",
     "\u0301", "ｅ", "Å", "\uf900", "각", "\u1161", "```", "~~~", "`", "~", "｀", "～", "<", ">", "/", "b", "br",
     "<br>", "<p>", "</p>", "<b>", "</b>", "&", "&amp;", "nbsp;", "&nbsp;", "&#160;", "&#x200B;", "&quot;", "&lt;",
     "#60;", ",", ".", "...", ":", "?!", "(", ")", "（", "）", '"', "“", "$", "\\(", "\\)", "http://a.cn/", "。",
     "，", "一", "[", "](", "*", "-", "{", ";"]
)  # fmt: skip
TEXTS = st.lists(PIECES, max_size=24).map("".join) | st.text(max_size=40)
FORMS = ["zh_safe", "nfkc", "zh_punct", "raw"]


@settings(max_examples=600, deadline=None)
@given(TEXTS, st.sampled_from(FORMS), st.booleans())
def test_every_form_is_stable_and_can_be_encoded(text, form, strip_html):
    once = written(text, form, strip_html)
    assert written(once, form, strip_html) == once
    once.encode()


@settings(max_examples=600, deadline=None)
@given(TEXTS)
def test_what_is_not_touched_does_not_change(text):
    touched = text_forms.TOUCHED.search(text) is not None
    assert touched or written(text, "zh_safe", True) == text
    assert text_forms.touched(text) == touched
    assert texts.touched(text) == (texts.TOUCHED.search(text) is not None)


def test_every_character_that_may_change_is_named():
    """Hence NFC leaves a text of others alone (UAX #15): none combines, none is composed or decomposed."""
    named = texts.TOUCHED.search
    others = [char for char in map(chr, range(0x110000)) if not named(f"字{char}字")]
    assert len(others) > 900_000
    for char in others:
        assert not unicodedata.combining(char), hex(ord(char))
        assert unicodedata.normalize("NFC", f"e{char}") == f"e{char}", hex(ord(char))
        assert char not in "０Ｚａ\u3000\xa0\u2003\r\x85\u2028\x00\xad\u200b\ufeff\ud800"


@pytest.fixture(scope="module")
def real_texts() -> list[str]:
    """4,000 turns of the bench rows, those with odd characters in front."""
    with gzip.open(shared("bench/sft_zh_en.jsonl.gz"), "rt", encoding="utf-8") as rows:
        found = [value for row in rows for value in json.loads(row).values() if isinstance(value, str)]
    odd = [text for text in found if "<" in text or "&" in text or "  " in text]
    return random.Random(0).sample(odd, 2000) + random.Random(1).sample(found, 2000)


def test_real_texts(real_texts):
    for text in real_texts:
        for form in FORMS[:3]:
            once = written(text, form)
            assert written(once, form) == once
        safe = written(text)
        assert text_forms.touched(text) or safe == text
        assert texts.key_text(safe) == texts.key_text(text) or without_html(texts.training_text(text)) != text


@pytest.mark.parametrize(
    ("raw", "form", "wanted"),
    [
        ("你好，世界（x²）！", "nfkc", "你好,世界(x2)!"),
        ("```\nＡ  ＝  １\n```", "nfkc", "```\nA  =  1\n```"),  # NFKC in code too; its spaces stay
        ("  Ａ\u200b，\n\n\n\n<br>", "raw", "  Ａ\u200b，\n\n\n\n<br>"),
        ("坏\ud800字", "raw", "坏字"),
        ("你好, 世界!你呢?", "zh_punct", "你好，世界！你呢？"),
    ],
)
def test_forms(raw, form, wanted):
    assert written(raw, form) == wanted


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("前一段的话说完了。<br>后一段的话开始。", "前一段的话说完了。\n后一段的话开始。"),
        ("A good film, I think.<br /><br />But the end drags.", "A good film, I think.\n\nBut the end drags."),
        ('他在<span style="color:red">一九三一年</span>回到故乡，再没走。', "他在一九三一年回到故乡，再没走。"),
        ("均价14800元&nbsp;起，&ldquo;精装&rdquo;交付", "均价14800元 起，“精装”交付"),
        ("领秀&#8226;慧谷，Earth&#x27;s crust", "领秀•慧谷，Earth's crust"),
        ("D&amp;D, R&amp;amp;B", "D&D, R&amp;amp;B"),
        ("果实成熟时深褐色，不自裂。</div>", "果实成熟时深褐色，不自裂。"),
    ],
)  # fmt: skip
def test_tags_that_are_markup(raw, clean):
    assert written(raw) == clean
    assert written(raw, strip_html=False) == texts.training_text(raw)


@pytest.mark.parametrize(
    "text",
    [
        "段落用<p>表示，HTML 里换行是<br>。",
        "请去掉这段文字里的标签：<p>今天天气很好，我们去公园玩了一整天。</p>",
        "<p>今天天气很好。</p>",
        "```\n<p>一段很长很长的文字</p>\n```",
        "用 `<br>` 就可以了，很简单的一件事情",
        "if a <b and c> d: 这里比较了四个数",
        "if x <b> y 就停下来，不再继续往下走",
        "List<String> 和 Vec<P>、Map<K, V> 都是泛型",
        "<think>先想一想再说</think>答案是三<br>对吧",
        "<|im_start|>user 你好<br>再见",
        "你好<name>，<br>欢迎来到这里",
        "面积是 70 m<sup>2</sup>，<br>长是 10 m",
        "| 甲 | 乙 |\n| --- | --- |\n| 一<br>二 | 三四五六 |",
        '他写下了"<br>"这几个字，然后就走开了',
        "1 < 2 && 3 > 2 &c; &str; A&M;",
        "&lt;strong&gt; 说的是什么",
        '$a = $b . "甲乙丙<br>";\necho $a;\n',
    ],
)
def test_tags_that_are_the_subject(text):
    assert without_html(text) == text


def test_about_markup():
    assert about_markup("怎么写一个网页") and about_markup("fix my HTML") and not about_markup("今天天气如何")


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ("他说:今天是3.14,对吗?对!", "他说：今天是3.14，对吗？对！"),
        ("卫生组织(WHO)成立于1948年.", "卫生组织（WHO）成立于1948年。"),
        ("第一句话. 下一句是约翰.史密斯 1.5倍.", "第一句话。下一句是约翰.史密斯 1.5倍。"),
        ("先学Python, 然后学Java; 最后休息...", "先学Python，然后学Java；最后休息……"),
        ("共1,000人,在12:30到达(大约).", "共1,000人，在12:30到达（大约）。"),
        ('他说"你好",然后走了', "他说“你好”，然后走了"),
        ("看`a,b`, 再看 https://x.cn/a,b?c=1, 完了.", "看`a,b`，再看 https://x.cn/a,b?c=1, 完了。"),
        ("公式$f(x), y$, 其中元素(甲(乙)丙)", "公式$f(x), y$，其中元素（甲（乙）丙）"),
        ("点(1,2)和f(x)不变", "点(1,2)和f(x)不变"),
        ("(你好）", "（你好）"),
        ("一. 引言\n二. 结论", "一. 引言\n二. 结论"),
        ("```\n打印, 完.\n```\n打印, 完.", "```\n打印, 完.\n```\n打印，完。"),
        ('{"名称": "张三, 李四"}', '{"名称": "张三, 李四"}'),
        ("He said 你好, and left the room.", "He said 你好, and left the room."),
        ("[链接](甲,乙)说明:见图", "[链接](甲,乙)说明：见图"),
        ("真开心:)", "真开心:)"),
    ],
)
def test_chinese_punctuation(raw, wanted):
    assert written(raw, "zh_punct", False) == wanted


def test_english_keeps_its_punctuation():
    text = 'Hello, "world": (yes) ... no?'
    assert chinese_punctuation(text) == text
