"""Key text, training text and the script of a text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.text import (
    TOUCHED,
    chinese_ratio,
    fenced,
    folded_text,
    han_count,
    has_lone_surrogate,
    key_text,
    language,
    touched,
    training_text,
)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("你好，世界！", "你好,世界!"),  # NFKC makes Chinese punctuation ASCII
        ("ＡＢＣ １２３", "abc123"),
        ("第 一\n\n行", "第一行"),
        ("\ufeff零\u200b宽", "零宽"),
        ("x²", "x2"),
    ],
)
def test_equal_keys(one, other):
    assert key_text(one) == key_text(other)


def test_keys_of_different_texts_differ():
    assert key_text("三加二") != key_text("三加四")


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("你好，世界！（对吗？）", "你好，世界！（对吗？）"),  # punctuation stays Chinese
        ("x² + H₂O", "x² + H₂O"),
        ("ＡＢｃ１２", "ABc12"),
        ("　　首行缩进", "首行缩进"),
        ("甲　乙", "甲 乙"),
        ("a\u00a0\u2003b  c", "a b c"),
        ("\ufeff甲\u200b乙\u2060丙\x00\x07", "甲乙丙"),
        ("一\r\n二\r三\u2028四", "一\n二\n三\n四"),
        ("一\n\n\n\n二", "一\n\n二"),
        ("行尾空格   \n下一行", "行尾空格\n下一行"),
        ("e\u0301", "é"),
        ("\ud800坏\udfff", "坏"),
        ("\U0001f468\u200d\U0001f469\u200d\U0001f467 a\u200db", "\U0001f468\u200d\U0001f469\u200d\U0001f467 ab"),
    ],
)
def test_training_text(raw, clean):
    assert training_text(raw) == clean


def test_training_text_leaves_code_and_indentation():
    text = "看：\n```python\nx  =  １   # 两\u3000格\n\n\n\ny = 2\n```\n- 一\n    - 二  三\n\n    a  =  b"
    assert training_text(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "　Ａ  b\n\n\n\n```\nc  d\n```\n\t e  f \x00",
        "e\u200b\u0301 ｅ\u0301",  # to be composed only once something is dropped or folded
        "甲\n\u3000```\na  b\n```",  # a fence behind wide spaces is one at once, not at the second time
        "甲\n\xa0\xa0\xa0\xa0```\na  b",
        " \t```\na  b",
        "\u1680```\na  b",
    ],
)
def test_training_text_is_stable(text):
    assert training_text(training_text(text)) == training_text(text)


@settings(max_examples=800, deadline=None)
@given(st.text(st.sampled_from("a中Ｚ 　\t\n\r\xa0\u1680\u2003`~\u200b\u200d\u0301e😀\x00\ud800"), max_size=30))
def test_training_text_of_any_text(text):
    once = training_text(text)
    assert training_text(once) == once
    if "\u0301" not in text:  # behind a dropped character it is composed in the training text, not in the folded one
        assert key_text(once) == key_text(text) and folded_text(folded_text(text)) == folded_text(text)
    assert touched(text) == (TOUCHED.search(text) is not None) and (touched(text) or once == text)
    assert "".join(piece for _, piece in fenced(text)) == text


@pytest.mark.parametrize("char", "\u4e00 \u3400 \U00020000 \U0002a700 \U00030000 \U00031350 \uf900 〇".split())
def test_han_covers_the_extensions(char):
    assert han_count(char) == 1


@pytest.mark.parametrize("char", ["あ", "カ", "한", "a", "，", "1", "　"])
def test_not_han(char):
    assert han_count(char) == 0


def test_ratio_counts_letters_only():
    assert chinese_ratio("你好ab") == 0.5
    assert chinese_ratio("你好，123 +-*/") == 1.0
    assert chinese_ratio("12 + 3 = 15") == 0.0


@pytest.mark.parametrize(
    ("text", "found"),
    [("什么是LoRA？", "zh"), ("What is LoRA?", "en"), ("Привет", "other"), ("1 + 1 = 2", "none"), ("안녕", "other")],
)
def test_language(text, found):
    assert language(text, 0.3) == found


def test_lone_surrogate():
    assert has_lone_surrogate("a\ud800") and not has_lone_surrogate("a\U0001f600")
