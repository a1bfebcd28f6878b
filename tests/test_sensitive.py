"""Sensitive words in a stream: none leaks over a border of pieces, and the pieces do not change the outcome."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.sensitive import SensitiveWords, Stream

FILTER = SensitiveWords(["敏感词", "敏感", "坏人", "bad word", "ass", "國家機密", "Ｘ計劃"])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("这是敏感词。", "这是***。"), ("敏 感*词", "*****"), ("敏\u200b感🙂词", "*****"),
        ("国家机密与國家機密", "****与****"),
        ("ＢＡＤ　ＷＯＲＤ!", "********!"), ("badword", "*******"), ("class as soon ass", "class as soon ***"),
        ("a.s.s", "*****"), ("x计划", "***"), ("敏" + " " * 9 + "感", "敏" + " " * 9 + "感"),
        ("坏蛋", "坏蛋"), ("", ""),
    ],
)  # fmt: skip
def test_disguises(text, shown):
    assert FILTER.filter(text) == shown


def test_actions():
    assert FILTER.filter("他是坏人吗", "replace", "某人") == "他是某人吗"
    stream = Stream(FILTER, "block")
    assert stream.feed("他是坏人吗") + stream.feed("。") + stream.end() == "他是" and stream.blocked
    assert [(hit.word, hit.start, hit.end) for hit in stream.hits] == [("坏人", 2, 4)]
    with pytest.raises(ValueError, match="no letter or digit"):
        SensitiveWords(["。。"])
    assert SensitiveWords([]).filter("什么都可以") == "什么都可以"


LETTERS = "敏感词坏人國国ab ass bad word*,🙂"
ACTIONS = st.sampled_from(["mask", "replace", "block"])


@settings(max_examples=300, deadline=None)
@given(st.text(LETTERS, max_size=40), st.lists(st.integers(0, 40), max_size=8), ACTIONS)
def test_pieces_do_not_change_the_outcome(text, cuts, action):
    stream, shown, at = Stream(FILTER, action), "", 0
    for cut in [*sorted(cuts), len(text)]:
        shown += stream.feed(text[at:cut])
        at = max(at, cut)
    shown += stream.end()
    assert shown == FILTER.filter(text, action)


def test_none_of_a_thousand_words_leaks_over_a_border():
    """Words of 2 to 8 characters, disguised at random, cut at every place: what is shown holds none of them."""
    rng = random.Random(11)
    chars = [chr(code) for code in range(0x4E00, 0x5200)]
    words = list({"".join(rng.choices(chars, k=rng.randrange(2, 9))) for _ in range(1200)})[:1000]
    found, leaked, pieces, seconds = SensitiveWords(words), 0, 0, 0.0
    for word in words:
        disguised = "".join(char + rng.choice(["", "", " ", "*", "\u200b", "··"]) for char in word).rstrip(" *\u200b·")
        text = f"前文{disguised}后文"
        for cut in range(3, 2 + len(disguised)):
            stream = Stream(found)
            shown = ""
            for piece in (text[:cut], text[cut:]):
                began = time.process_time()
                shown += stream.feed(piece)
                pieces, seconds = pieces + 1, seconds + time.process_time() - began
            shown += stream.end()
            leaked += shown != f"前文{'*' * len(disguised)}后文" or stream.hits[0].word not in words
    assert leaked == 0
    print(f"{1000 * seconds / pieces:.3f} ms a piece")


def test_little_is_held_back():
    """Text that cannot become a word is shown at once."""
    stream = Stream(FILTER)
    assert stream.feed("今天天气很好，敏") == "今天天气很好，" and stream.feed("捷") == "敏捷"
    assert stream.feed("坏") == "" and stream.feed(" " * 9) == "坏" + " " * 9


def test_in_a_conversation(base, tmp_path, monkeypatch, capsys):
    """The words are treated in what is printed and in what the model is told that it said."""
    import io

    from conftest import make_adapter

    from posttrain.blocks import Generation
    from posttrain.evals import models, talk
    from posttrain.evaluation_blocks import SensitiveFilter

    lineup = models.line_up({"one": make_adapter(base, tmp_path / "one", 1)})
    how = Generation(max_new_tokens=12, temperature=0)
    said = []
    for guard in (None, [char for char in "abcdefghijklmnopqrstuvwxyz0123456789一二三四五六七八九十"]):
        if guard:
            (tmp_path / "words.txt").write_text("\n".join(guard), encoding="utf-8")
            guard = SensitiveFilter(files=[tmp_path / "words.txt"], by="█")
        monkeypatch.setattr("sys.stdin", io.StringIO("1加1等于多少？\n"))
        talk.talk(lineup, "one", "fp32", how, guard)
        said.append(capsys.readouterr().out.splitlines()[1:])
    words = SensitiveWords("abcdefghijklmnopqrstuvwxyz0123456789一二三四五六七八九十")
    assert said[1] == [words.filter(line, by="█") for line in said[0]]
