"""Words at borders, overlapping phrases, lists on disk."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.config import ROOT
from posttrain.errors import UserFault
from posttrain.text import folded_text
from posttrain.words import Words, is_spaced, keyword_topics, load_list


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("in class", []),
        ("an ass, an ass_", ["ass"]),
        ("用ass来", ["ass"]),
        ("ass", ["ass"]),
        ("première classe", []),
        ("éass", []),
        ("一个炸弹人", ["炸弹", "炸弹人", "弹人"]),
        ("a bomb-ass", ["a bomb", "bomb", "ass"]),
        ("3ass", []),
    ],
)
def test_find(text, found):
    words = Words(["ass", "炸弹", "炸弹人", "弹人", "bomb", "a bomb"])
    assert sorted(words.patterns[number] for number, _, _ in words.find(text)) == sorted(found)
    for number, start, end in words.find(text):
        assert text[start:end] == words.patterns[number]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.text("ab中文é_", min_size=1, max_size=3), min_size=1, max_size=8, unique=True),
       st.text("ab中文é_ \x00😀\ud800", max_size=60))  # fmt: skip
def test_all_hits_and_their_borders(patterns, text):
    """Against a search for every pattern at every place."""
    words = Words(patterns)
    numbers, starts = words.hits(text)
    everywhere = {(n, at) for n, word in enumerate(patterns) for at in range(len(text)) if text.startswith(word, at)}
    assert sorted(zip(numbers.tolist(), starts.tolist(), strict=True)) == sorted(everywhere)
    kept = {(n, at) for n, at in everywhere if not inside_a_word(text, at, at + len(patterns[n]))}
    assert {(n, start) for n, start, _ in words.find(text)} == kept


def inside_a_word(text: str, start: int, end: int) -> bool:
    def joined(at: int) -> bool:
        return 0 < at < len(text) and is_spaced(text[at - 1]) and is_spaced(text[at])

    return joined(start) or joined(end)


def test_many_patterns_give_the_same_hits():
    few = ["甲乙", "乙丙", "word"]
    many = few + [f"无关的词{n}号" for n in range(5000)]  # beyond the size of a DFA
    text = "甲乙丙 word words 无关的词77号" * 3
    one, other = Words(few).hits(text), Words(many).hits(text)
    assert np.array_equal(one[0], other[0][other[0] < 3]) and np.array_equal(one[1], other[1][other[0] < 3])


def test_topics_of_a_text():
    words = Words(["炸弹", "bomb", "隐私"])
    assert keyword_topics("ＢＯＭＢ 和炸\u200b弹，炸弹", words, ["a", "a", "b"]) == {"a": ["bomb", "炸弹"]}
    assert keyword_topics("bombs", words, ["a", "a", "b"]) == {}


def test_a_list_on_disk(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeff# 说明\r\n炸弹\r\n\r\n  ＢＯＭＢ \nbomb\n\u200b\n炸弹\nc#\n".encode())
    assert load_list(path) == ["炸弹", "bomb", "c#"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("# 说明\n一二三\n".encode("gb18030"), ["line 1", "GB18030", "iconv"]),
        (b"abc\n\xff\xff\n", ["line 2", "UTF-8"]),
        ("词".encode("utf-16"), ["UTF-16", "iconv"]),
        (b"# nothing\n\n", ["no word"]),
        (None, ["cannot be read"]),
    ],
)
def test_lists_that_cannot_be_used(tmp_path, data, says):
    path = tmp_path / "list.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserFault) as fault:
        load_list(path)
    assert all(part in str(fault.value) for part in [str(path), *says])


@pytest.mark.parametrize("topic", ["violence", "explicit", "privacy"])
def test_the_lists_of_the_project(topic):
    path = ROOT / "configs" / "keywords" / f"{topic}.txt"
    words = load_list(path)
    written = [line for line in path.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    assert written == words == [folded_text(word).lower() for word in words]  # no duplicate, nothing left to fold
    assert any(word.isascii() for word in words) and not all(word.isascii() for word in words)
    assert min(len(word) for word in words) > 1
