"""
Grounding: numbers of an answer that are not in the text that its question gives.

Only questions count that give a text and ask for what is in it; requests to calculate, to write on, to invent or to
translate do not. docs/rules_measured.md says how often this is wrong.
"""

import re
from itertools import product

from posttrain.refusals import one_of, one_word_of

CONTEXT = 80  # characters that a question must have beside the words that point to the text
ENDS = 120  # characters at both ends of a question in which these words are looked for
FEW = 12  # numbers of a question up to which sums, differences and ratios of two of them count as in it

_USE_ZH = "根据 阅读 基于 依据 参考 总结 概括".split()
_DO_ZH = [*_USE_ZH, *"归纳 提取 摘要 从 为 对 将 把 在".split()]
_THE_ZH = "以下 下面 下列 下述 上述 上面 给定 所给 提供的 给出的 以上".split()
_TEXT_ZH = """
    文章 文本 文字 段落 短文 原文 新闻 报道 摘要 上下文 资料 正文 文档 内容 背景 信息 阅读理解 片段 文献 公告
""".split()
_TEXT_EN = """
    passage paragraph text article document documents context excerpt report story review post information
    conversation dialogue abstract news
""".split()
_USE_EN = ["based on", "according to", "read", "summarize", "summarise", "from", "given", "using"]
_THE_EN = ["the", "this", *(f"the {which}" for which in "following above given provided below".split())]
NEEDS = (
    *map("".join, product(_DO_ZH, _THE_ZH)),
    *map("".join, product(_USE_ZH, _TEXT_ZH)),
    *map("".join, product([*_TEXT_ZH, *_TEXT_EN], ":")),
    *map(" ".join, product(_USE_EN, _THE_EN, _TEXT_EN)),
)


_GIVES_TEXT = re.compile(
    f"{one_of(_DO_ZH)}{one_of(_THE_ZH)}|{one_of(_USE_ZH)}{one_of(_TEXT_ZH)}|{one_of(_TEXT_ZH)}:|"
    rf"\b{one_of(_TEXT_EN)}:|\b{one_of(_USE_EN)} {one_of(_THE_EN)} {one_of(_TEXT_EN)}\b"
)
_GOES_BEYOND_ZH = """
    计算 方程 求解 算出 估计 预测 续写 扩写 改写 重写 编写 创作 写一 撰写 写出 设计 生成 创建 建议 推荐 翻译 代码 函数
    程序 排序 编辑 扩展 制定 想象 举例 解释 添加 补充 评价 分析 转换 所学 选择 选项
""".split()
_GOES_BEYOND_EN = """
    calculat comput solv estimat predict continu expand rewrit invent imagin suggest recommend translat creat design
    edit add generat compos write draft develop propos explain describ equation function code python headline title
    elaborat analys analyz pretend simulat help reply respon listener next choose options
""".split()
_GOES_BEYOND = re.compile(
    rf"{one_of(_GOES_BEYOND_ZH)}|\b(?:{'|'.join(_GOES_BEYOND_EN)}|how many|how much|step by step)"
)
_TWO_DIGITS = re.compile("[0-9][0-9]")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_SEPARATOR = re.compile("(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_LIST_NUMBER = re.compile(
    r"(?:^|\n)[ *#>-]*\(?\d{1,3}[.,)、:](?!\d)|第\d+|\[\d+\]|(?<!\d)\d{1,4}/\d{1,4}|100%|24小时|24 hours"
)
_NUMERAL_ZH = re.compile("[零〇一二三四五六七八九两十百千万亿]{1,20}|(?<![0-9.])[0-9.]{1,20}[百千万亿]{1,3}")
_DIGIT = {c: i for i, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_UNIT = {"亿": 100_000_000, "万": 10_000, "千": 1000, "百": 100, "十": 10}
_NUMERALS_EN = """
    ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty
    seventy eighty ninety hundred hundreds thousand thousands million billion dozen dozens half third quarter decade
    decades century centuries
""".split()
_NUMERAL_EN = re.compile(one_word_of(_NUMERALS_EN))


def numeral(text: str) -> float:
    """The value of a Chinese numeral: 二〇二三 is 2023, 三千二百 is 3200, 3.5万 is 35000."""
    if text[0] in "0123456789.":
        digits = text.rstrip("百千万亿")
        value = float(digits) if _NUMBER.fullmatch(digits) else 0.0
        for unit in text[len(digits) :]:
            value *= _UNIT[unit]
        return value
    if len(text) > 1 and all(c in _DIGIT for c in text):
        return float("".join(str(_DIGIT[c]) for c in text))
    for unit, size in _UNIT.items():
        before, found, after = text.partition(unit)
        if found:
            return (numeral(before) if before else 1) * size + (numeral(after) if after else 0)
    return float(_DIGIT[text])


def _values(text: str) -> set[float]:
    """The values of the numbers of a text without thousands separators, Chinese numerals included."""
    found = {float(n) for n in _NUMBER.findall(text)}
    return found | {numeral(n) for n in _NUMERAL_ZH.findall(text)}


def _follows(value: float, decimals: int, given: set[float]) -> bool:
    """Whether a value is one of the given ones, as a percentage, or less exact (a round number within a tenth); or, of
    few, the sum, difference, product or ratio of two of them."""
    near = 0.51 * 10.0**-decimals
    if value >= 100 and value % 10 == 0 and any(abs(value - g) <= 0.1 * g for g in given):
        return True  # "more than 500" of 530
    if any(abs(value - g) < near or abs(value - 100 * g) < near or abs(value - (100 - g)) < near for g in given):
        return True
    if len(given) > FEW:
        return False
    for a, b in product(given, given):
        results = (a + b, a - b, a * b, a / b if b else a, 100 * a / b if b else a, a - b + 1)
        if any(abs(value - result) < near for result in results):
            return True
    return abs(value - sum(given)) < near


def ungrounded(question: str, answer: str) -> str | None:
    """The first number of two or more digits in an answer that its question's text does not give, or None.

    Both folded. The question must point to a text (NEEDS) in its first or last ENDS characters, have CONTEXT characters
    beside these words, and not ask for more than is in the text. A number is given if it stands there (also inside a
    longer one, with other separators, as a Chinese numeral, or less exactly), or follows from two numbers there
    (_follows). Below 100, and for whole thousands, English numerals in the text are taken to hold it. The numbering of
    lists and steps does not count, nor does code.
    """
    if "```" in answer or len(question) < CONTEXT or not _TWO_DIGITS.search(answer):
        return None
    question = question.lower()
    first, last = question[:ENDS], question[-ENDS:]
    if not any((p := _GIVES_TEXT.search(end)) and len(question) - len(p[0]) >= CONTEXT for end in (first, last)):
        return None
    if _GOES_BEYOND.search(first) or _GOES_BEYOND.search(last[-60:]):
        return None
    question, answer = _SEPARATOR.sub("", question), _LIST_NUMBER.sub(" ", _SEPARATOR.sub("", answer))
    wanted = [n for n in _NUMBER.findall(answer) if len(n.partition(".")[0].lstrip("0")) >= 2 and n not in question]
    if not wanted:
        return None
    given, written_out = _values(question), _NUMERAL_EN.search(question) is not None
    for number in wanted:
        value, decimals = float(number), len(number.partition(".")[2])
        if not _follows(value, decimals, given) and not (written_out and (value < 100 or value % 1000 == 0)):
            return number
    return None
