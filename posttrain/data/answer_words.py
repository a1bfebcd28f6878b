"""
Words of answers and of the questions before them: an answer that takes back what it said, and a question that asks for
another language. Both read folded text; docs/rules_measured.md says how often they are wrong.
"""

import re
from itertools import product

from posttrain.refusals import one_of, one_word_of, own_words
from posttrain.text import chinese_ratio

# ------------------------------------------------------------------ taking back

_BEFORE_ZH = "之前 刚才 刚刚 前面 上面 先前 上一个 上述".split()
_SAY_ZH = "说 写 算 搞 弄 答 理解 记 看 讲".split()
_SAID_ZH = "回答 答案 说法 计算 解释 回复 推理 陈述".split()
_WRONG_ZH = "有误 有错 错误 错了 不正确 不准确 不对 存在错误 有问题 是错误的".split()
_HALT_ZH = "等等 等一下 哦不 不对 噢不".split()
_HALT_EN = "oh oops hmm actually no wait".split()
_FAULTS_EN = "mistake error oversight miscalculation".split()
_SAID_EN = [*map(" ".join, product("previous earlier above last initial".split(),
                                   "answer response statement calculation explanation reply".split()))]  # fmt: skip
_TAKES_BACK = re.compile(
    "|".join(
        (
            rf"\b{one_of(_HALT_EN)},? wait\b|\bwait,? (?:no|that's (?:not|wrong)|i made|let me (?:correct|re))\b",
            r"\bactually, (?:i made|i was wrong|that's (?:wrong|incorrect|not (?:right|correct)))",
            r"\bi(?:'ve| have)? made an? (?:mistake|error) (?:in|with|earlier|above|there|when i)\b",
            rf"\bfor (?:the|my) (?:earlier |previous )?{one_of(_FAULTS_EN)} (?:in|above|earlier)\b",
            rf"\b(?:apologize|apologise|apologies|sorry) for (?:the|my) (?:earlier |previous )?{one_of(_FAULTS_EN)}",
            r"\blet me correct (?:myself|that|my)|\bi (?:misspoke|stand corrected)\b|\bscratch that(?=[,.:;!\n])",
            rf"\bmy {one_of(_SAID_EN)} (?:was|is|contained) (?:wrong|incorrect|inaccurate|mistaken|an error|a mistake)",
            r"(?:^|[.!?\n] ?)correction: ",
            rf"(?:抱歉|对不起|不好意思)[^。!?\n们他她]{{0,8}}{one_of(_SAY_ZH)}错了",
            rf"(?<!如果)(?<!若)我{one_of(_BEFORE_ZH)}的?[^。,!?\n]{{0,4}}{one_of(_SAID_ZH)}{one_of(_WRONG_ZH)}(?!导)",
            rf"(?<!如果)(?<!若)我{one_of(_BEFORE_ZH)}[^。,!?\n]{{0,6}}{one_of(_SAY_ZH)}错",
            rf"(?:让我|我来|我需要)(?:更正|纠正)(?:一下|我的|{'|'.join(_BEFORE_ZH)})",
            r"(?:^|[。!?\n])更正(?:一下)?[:,]",
            rf"(?:^|[。!?\n]){one_of(_HALT_ZH)},(?:不|我|应该|让我|重新|这|上面|前面|答案)",
        )
    )
)
CONTRADICTION_NEEDS = (
    *map("".join, product(_HALT_EN, (" wait", ", wait"))),
    *map("".join, product(("wait ", "wait, "), ("no", "that's ", "that’s ", "i made", "let me "))),
    "actually, i made", "actually, i was", "actually, that", "made a mistake ", "made an error ", "made a error ",
    "made an mistake ", *(f"{which} {fault}" for which, fault in product(
        ("for the", "for my", "earlier", "previous"), _FAULTS_EN)),
    "let me correct", "i misspoke", "scratch that", "i stand corrected", *(f"my {said} " for said in _SAID_EN),
    "correction: ", *(f"{say}错" for say in _SAY_ZH), *map("".join, product(_SAID_ZH, _WRONG_ZH)), "更正",
    "纠正一下", "纠正我的", *(f"纠正{before}" for before in _BEFORE_ZH), *(f"{halt}," for halt in _HALT_ZH),
)  # fmt: skip
_DOUBT_ZH = "错 不对 不是 不正确 有误 确定吗 真的吗 可是 但是 矛盾 明明 检查 纠正 更正 道歉 重新 重复 难道".split()
_DOUBT_EN = """
    wrong incorrect mistake error but no nope correct really check again apologize apology fix didn't isn't doesn't
    sure
""".split()
_THANKS = r"thanks? (?:you )?for (?:the|your|pointing)|you(?:'re| are) (?:absolutely |quite )?(?:right|correct)"
_THANKS_ZH = r"[你您](?:说得|说的|是)(?:很|完全|非常)?(?:对|正确)|(?:谢谢|感谢)[^。]{0,6}(?:指正|提醒|纠正|指出)"
_POINTED_OUT = re.compile(rf"{one_of(_DOUBT_ZH)}|{one_word_of(_DOUBT_EN)}|\bnot (?:right|true)\b")
_THANKED = re.compile(rf"{_THANKS}|{_THANKS_ZH}")
_INVENTED_ZH = "故事 小说 剧本 对话 台词 角色 扮演 续写 信 邮件 小红书 歌词 诗".split()
_INVENTED_EN = """
    story stories dialog dialogue conversation script novel poem lyrics letter email role-play roleplay scene play
    character joke fiction screenplay continue summary summarize
""".split()
_INVENTED = re.compile(f"{one_of(_INVENTED_ZH)}|{one_word_of(_INVENTED_EN)}")


def takes_back(answer: str, question: str) -> str | None:
    """The words by which an answer (folded) takes back what it said, or None.

    None where the question before it pointed a fault out, or the answer gives thanks for that. Quotations, code and
    <think> do not count, nor do stories and dialogues, known by their question."""
    own, asked = own_words(answer), question.lower().replace("’", "'")
    found = _TAKES_BACK.search(own)
    if not found or _POINTED_OUT.search(asked) or _INVENTED.search(asked) or _THANKED.search(own):
        return None
    return found[0].strip(" \n\x01")


# ------------------------------------------------------------------ languages

_LANGUAGE_ZH = """
    翻译 译 英 中文 汉语 双语 语言 外语 日语 日文 韩语 法语 德语 西班牙语 拉丁 单词 词汇 拼写 语法 缩写 代码 编程 编写
    函数 脚本 程序 公式 变量 正则 命令 提示词 歌词 一词 例句 算法 循环 查询
""".split()
_LANGUAGE_EN = """
    translate translated translation translating chinese english mandarin cantonese pinyin language bilingual french
    spanish german japanese korean code python java javascript sql html css json xml function script prompt program
    latex regex api
""".split()
_ASKS_FOR_LANGUAGE = re.compile(f"{one_of(_LANGUAGE_ZH)}|{one_word_of(_LANGUAGE_EN)}")
_LATIN_WORDS = re.compile(r"(?<![a-z])[a-z]+(?:[ ,.'’-]+[a-z]+){2,}")
_CODE_BLOCK = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_CODE_LINE = re.compile(r"[;:{})\]]$|^(?:#|//|import |return |print)| = |\w\(\w*\)")
_LINK = re.compile(r"https?://[!-~]+")
_LATIN_WORD = re.compile(r"[a-z']+")
_COMMONEST = frozenset("the a an of and to is in that for with are it on as be was by or this you your can".split())


def without_code(text: str) -> str:
    """Text without fenced code and links."""
    return _LINK.sub("", _CODE_BLOCK.sub("", text))


def asks_for_language(question: str) -> bool:
    """Whether a question (folded, lower case) names a language, a translation or code."""
    return _ASKS_FOR_LANGUAGE.search(question) is not None


def has_latin_words(text: str) -> bool:
    """Three words in Latin letters in a row (lower case): more than a name inside Chinese."""
    return _LATIN_WORDS.search(text) is not None


def is_english_prose(text: str) -> bool:
    """Sentences in English, not names, code or formulas: of its Latin words (at least 8, lower case) a fifth are among
    the two dozen commonest of English, Han characters are at most a tenth of its letters, and fewer than half of its
    lines look like a program's."""
    words = _LATIN_WORD.findall(text)
    common = sum(word in _COMMONEST for word in words)
    if len(words) < 8 or common < len(words) / 5 or chinese_ratio(text) > 0.1:
        return False
    lines = text.split("\n")
    return sum(_CODE_LINE.search(line) is not None for line in lines) < len(lines) / 2
