"""Personal data: what is found, what is not, and what is put in its place. Numbers are invented or of a standard."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.pii import KINDS, NEEDED, PLACEHOLDERS, find_pii, identity_ok, luhn_ok, masked

IDENTITY = "11010519491231002X"  # the example of GB 11643-1999
CARD = "6222020200012345670"  # 19 digits, a valid Luhn digit


def found(text: str) -> list[tuple[str, str]]:
    return [(kind, text[start:end]) for kind, start, end in find_pii(text)]


@pytest.mark.parametrize(
    ("text", "kind", "piece"),
    [
        ("电话13812345678。", "mobile", "13812345678"),
        ("电话:138-1234-5678", "mobile", "138-1234-5678"),
        ("Call +86 138 1234 5678 now", "mobile", "+86 138 1234 5678"),
        ("008613812345678", "mobile", "008613812345678"),
        ("8619912345678", "mobile", "8619912345678"),
        ("电话１３８１２３４５６７８！", "mobile", "１３８１２３４５６７８"),
        ("tel=13812345678", "mobile", "13812345678"),
        (f"身份证{IDENTITY}，", "identity_card", IDENTITY),
        ("11010519491231002x", "identity_card", "11010519491231002x"),
        ("110105 19491231 002X", "identity_card", "110105 19491231 002X"),
        ("身份证号：110105491231002", "identity_card", "110105491231002"),
        (f"卡号{CARD}", "bank_card", CARD),
        ("4111 1111 1111 1111", "bank_card", "4111 1111 1111 1111"),
        ("4111-1111-1111-1111", "bank_card", "4111-1111-1111-1111"),
        ("6222 0202 0001 2345 670", "bank_card", "6222 0202 0001 2345 670"),
        ("邮箱:zhang.san_1@mail.sohu.com。", "email", "zhang.san_1@mail.sohu.com"),
        ("[x](mailto:a-b@qq.com)", "email", "a-b@qq.com"),
        ("邮箱ｚ１＠qq.com", "email", "ｚ１＠qq.com"),
    ],
)
def test_found(text, kind, piece):
    assert found(text) == [(kind, piece)]


@pytest.mark.parametrize(
    "text",
    [
        "12812345678", "138123456789", "1381234567", "0.13812345678", "13812345678.5", "订单A13812345678",
        "1381 2345 678",
        "138-12345678", "+13812345678", "13812345678元", "13812345678 km", "15 + 1 = 13812345678", "13812345678*2",
        "13812345678.jpg", "13812345678_01", "8f-13812345678-ab", "https://a.cn/p/13812345678?x=1",
        "138 1234 5678 9012",
        "400-810-8888", "800 810 8888", "10086", "95588", "010-62345678", "020 8765 4321", "1-555-123-4567",
        "110105194912310021", "110105194902310021", "990105194912310029", "订单110105491231002", "A" + IDENTITY,
        "统一社会信用代码914200006155710107", "6222020200012345671", "9111111111111111", "0.4111111111111111",
        "4111 1111 1111 1111 1111", "1700000000000", "1700000000", "ISBN 978-7-111-40701-0", "9787111407010",
        "192.168.100.254", "2024-01-02 13:14:15.123456", "20240102131415123456", "3.14159265358979323846",
        "a@example.com", "b@mail.example.org", "your_name@qq.com", "icon@2x.png", "react@17.0.2", "@app.route",
        "git@github.com:a/b.git", "https://user:secret@db.host.com/x", "https://medium.com/@someone.else",
        "老板@公司.com",
        "user@localhost", "a@b",
    ],
)  # fmt: skip
def test_not_found(text):
    assert found(text) == []


def test_several_in_a_row():
    assert found("13812345678,13912345678 17712345678、a1@qq.com;b2@qq.com") == [
        ("mobile", "13812345678"), ("mobile", "13912345678"), ("mobile", "17712345678"), ("email", "a1@qq.com"),
        ("email", "b2@qq.com")]  # fmt: skip


def test_masks_follow_the_language_around():
    text = f"我的手机是13812345678，身份证{IDENTITY}。" + "." * 50 + " Mail me: a1@qq.com or pay 4111111111111111"
    hidden, counts = masked(text)
    assert hidden == "我的手机是[手机号]，身份证[身份证号]。" + "." * 50 + " Mail me: [EMAIL] or pay [BANK_CARD]"
    assert counts == {"mobile": 1, "identity_card": 1, "email": 1, "bank_card": 1}
    assert masked(hidden) == (hidden, {}) and set(PLACEHOLDERS) == set(KINDS)


@pytest.mark.parametrize("number", ["79927398713", "4111111111111111", "5500005555555559", CARD])
def test_luhn(number):
    assert luhn_ok(number)
    wrong = [number[:-1] + digit for digit in "0123456789" if digit != number[-1]]
    assert not any(luhn_ok(other) for other in wrong)


def test_the_check_character_finds_every_wrong_digit():
    """The weights of the standard, written out."""
    weights = [7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2]
    draw = random.Random(0)
    for _ in range(200):
        body = f"3301{draw.randrange(10, 99)}19{draw.randrange(10, 99)}0{draw.randrange(1, 9)}1{draw.randrange(0, 9)}"
        body += f"{draw.randrange(1000):03}"
        number = body + "10X98765432"[sum(int(d) * w for d, w in zip(body, weights, strict=True)) % 11]
        assert identity_ok(number) and found(f"证件{number}") == [("identity_card", number)]
        at = draw.randrange(14, 17)
        assert not identity_ok(number[:at] + str((int(number[at]) + draw.randrange(1, 10)) % 10) + number[at + 1 :])


SEEDS = ["13812345678", "138 1234 5678", "+86-138-1234-5678", IDENTITY, "110105 19491231 002X", "4111 1111 1111 1111",
         "6222 0202 0001 2345 670", "身份证110105491231002", "a@qq.com"]  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from([*SEEDS, "字", "，", " ", "-", ".", "1", "86", "@", "x", "\n"]), max_size=8),
       st.integers(0, 80), st.integers(0, 80))  # fmt: skip
def test_the_prefilter_loses_nothing(pieces, start, length):
    """Data only where there is an @ or 11 digits with at most 4 separators in all; whatever is cut out of a text."""
    text = "".join(pieces)[start : start + length]
    wide = text.translate({ord(digit): chr(ord(digit) + 0xFEE0) for digit in "0123456789@"})
    spans = [(kind, begin, end) for kind, begin, end in find_pii(text)]
    assert spans == sorted(spans, key=lambda one: one[1]) and [tuple(one) for one in find_pii(wide)] == spans
    if spans:
        runs = [run[1] for run in re.finditer(r"(?=([0-9](?:[ -]?[0-9]){10}))", text)]
        assert "@" in text or any(len(run) <= 15 for run in runs)
        assert NEEDED.search(text)
    hidden, counts = masked(text)
    assert sum(counts.values()) == len(spans) and (hidden == text) == (not spans)
