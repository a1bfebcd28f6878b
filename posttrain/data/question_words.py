"""
Words of questions that nobody can answer from the record alone: a text, picture or link that is not there, and things
that change with the day. Both functions read a folded question in lower case; docs/rules_measured.md says how often
they are wrong.
"""

import re
from itertools import product

from posttrain.refusals import one_of, one_word_of

SHORT = 150  # characters: a longer question may well hold what it speaks of
ASKED_IN = 160  # characters: in a longer question words of the day stand in a text that it gives


def _both_apostrophes(phrases: list[str]) -> list[str]:
    return [*phrases, *(phrase.replace("'", "’") for phrase in phrases if "'" in phrase)]


# ------------------------------------------------------------------ a text, picture or link that is not there

_THE_ZH = "以下 下面 下列 下述 上述 上面 给定 所给 所提供 所附 下方 上方".split()
_TEXT_ZH = """
    文字 文章 文本 段落 句子 短文 图片 图像 照片 图表 截图 链接 网址 视频 音频 代码 邮件 表格 数据 材料 对话 新闻
    报道 诗 漫画 评论 推文 故事 摘录 片段 内容 问题 题目 语句 短语 单词 词语 信息 陈述 主题 话题 情境 场景
    图案 歌词
""".split()
_THIS_ZH = list("这该此那")
_PIECE_ZH = """
    段文字 段文本 段话 段代码 段对话 段视频 段录音 篇文章 篇短文 篇论文 篇报道 篇新闻 张图 张照片 张表 幅画 幅图
    幅漫画 首诗 首歌 封邮件 封信 个链接 个网址 条推文 个视频 则新闻 份文件 份报告
""".split()
_SHOWN_ZH = "如图 下图 上图 图中所示".split()
_THE_EN = "following above given provided attached below".split()
_TEXT_EN = """
    sentence passage paragraph text article story stories poem quote quotation image picture photo figure diagram
    table chart graph link url code snippet words word statement question email letter review conversation dialogue
    tweet headline document essay excerpt phrase topic problem equation scenario situation options numbers items
    information instructions recipe song lyrics argument list
""".split()
_PIECE_EN = """
    passage paragraph excerpt article image picture photo screenshot diagram link url attachment quote tweet email
    poem painting document spreadsheet chart graph table
""".split()
_SHOWN_EN = [
    "as shown above", "as shown below", "shown in the figure", "shown in the picture", "shown in the image",
    "passage above", "text above", "article above", "passage below", "text below", "article below", "image below",
    "picture below", "attached file", "attached image", "attached document",
]  # fmt: skip
VAGUE_NEEDS = (
    *map("".join, product(_THE_ZH, ("", "的"), _TEXT_ZH)),
    *map("".join, product(_THIS_ZH, _PIECE_ZH)),
    *(f"the {which} {text}" for which, text in product(_THE_EN, _TEXT_EN)),
    *(f"this {piece}" for piece in _PIECE_EN),
    *_SHOWN_ZH,
    *_SHOWN_EN,
)
_REFERENCE = re.compile(
    f"{one_of(_THE_ZH)}的?{one_of(_TEXT_ZH)}(?!集)|{one_of(_THIS_ZH)}{one_of(_PIECE_ZH)}|{one_of(_SHOWN_ZH)}|"
    rf"\bthe {one_of(_THE_EN)} {one_of(_TEXT_EN)}s?\b|\bthis {one_of(_PIECE_EN)}\b|\b{one_of(_SHOWN_EN)}\b"
)
# Something that may be what is spoken of; or a program to be written, whose "given list" is a parameter.
_PROGRAM = "function program algorithm script python java javascript sql regex class method model dataset".split()
_IS_THERE = re.compile(
    r'["“”「《`<|{=\[]|https?:|www\.|\.com\b|\d\s*[,+*/=-]\s*\d|(?<!\w)\'\w[^\']+\'|:\s*\S|c\+\+|'
    rf"{one_word_of(_PROGRAM)}|模型|函数|程序|算法|脚本|\S [一-龥]|写.{{0,6}}代码"
)
_SENTENCE_END = re.compile(r"[。!?;]|[.](?!\d)|\n")


def missing_text(question: str) -> str | None:
    """The reference to a text, picture or link that the question (folded, lower case) does not hold, or None.

    Only questions of one line and at most SHORT characters, without quotation, link, list, or a colon and text behind
    it; and only where no other sentence stands before or after the one with the reference."""
    if len(question) > SHORT or "\n" in question or not (found := _REFERENCE.search(question)):
        return None
    if _IS_THERE.search(question) or _SENTENCE_END.search(question, 0, found.start()):
        return None
    end = _SENTENCE_END.search(question, found.end())
    return None if end and question[end.end() :].strip(" .?!。") else found[0]


# ------------------------------------------------------------------ things that change with the day

_DAY_ZH = """
    今天 今日 今晚 明天 明日 后天 昨天 本周 这周 下周 这周末 这个周末 现在 目前 当前 此刻 实时 最近 近期 最新 未来
""".split()
_RATE_ZH = "股价 汇率 金价 油价 房价 币价 市值 行情".split()
_PRICE_ZH = "价格 票价 多少钱".split()
_NEWS_ZH = "新闻 头条 资讯 热搜 赛果 比分 疫情".split()
_OFFICE_ZH = "总统 首相 总理 主席 ceo 首席执行官 市长 国王 教皇".split()
_ASKED_ZH = "是谁 叫什么 是哪".split()
_NOW_ZH = """
    今天几号 今天是几号 今天几月几 今天是几月几 今天星期几 今天是星期几 今天周几 今天是周几 今天的日期 今天日期
    今天是什么日子 现在几点 现在是几点 几点了 现在的时间 当前时间 现在时间 最新消息 最新动态
""".split()
_WEATHER_ZH = "天气怎 天气如何 天气咋 天气预报 天气情况 天气状况 的天气 气温".split()
_WEATHER_TODAY_ZH = "今天天气 今日天气 明天天气 明日天气 最近天气".split()
_IS_SAID_ZH = "(?!很|真|不错|好|晴|非常|这么|太|比较|变)"  # "it is fine today" asks nothing
_NOW_EN = [
    "what time is it", "what day is it", "what is today's date", "what's today's date", "what is the date today",
    "what's the date today", "what is the current date", "what is the current time", "what's the current time",
    "what year is it", "tell me the current time", "tell me today's date",
]  # fmt: skip
_RATE_EN = ["stock price", "share price", "exchange rate", "price of", "stock market"]
_NEWS_EN = ["latest news", "recent news", "breaking news", "current news", "today's news", "news today",
            "latest headlines", "today's headlines", "latest current events"]  # fmt: skip
_OFFICE_EN = ["president", "prime minister", "ceo", "mayor", "king"]
TIME_NEEDS = (
    *_RATE_ZH, *_PRICE_ZH, *_NEWS_ZH, *_NOW_ZH, *_WEATHER_ZH, *_WEATHER_TODAY_ZH,
    *map("".join, product(_OFFICE_ZH, _ASKED_ZH)),
    *_both_apostrophes(_NOW_EN), *_RATE_EN, *_both_apostrophes(_NEWS_EN), "weather", "current price",
    *(f"the current {office}" for office in _OFFICE_EN), "the current population",
)  # fmt: skip
_TIME_BOUND = re.compile(
    "|".join(
        (
            "|".join(_NOW_ZH),
            rf"{one_of(_DAY_ZH)}[^,。:\n]{{0,10}}{one_of(_WEATHER_ZH)}{_IS_SAID_ZH}",
            f"{one_of(_WEATHER_TODAY_ZH)}{_IS_SAID_ZH}",
            r"天气(?:怎么?样|如何|咋样?|预报)(?=[^,。]{0,3}[?。]?$)",
            rf"{one_of(_DAY_ZH)}[^,。:\n]{{0,10}}{one_of(_NEWS_ZH)}",
            rf"{one_of(_DAY_ZH)}[^,。:\n]{{0,12}}{one_of(_RATE_ZH)}",
            rf"(?:最新|实时|当前|今天|今日)[^,。:\n]{{0,8}}{one_of(_PRICE_ZH)}",
            rf"(?:现任|当前|现在|目前)[^,。:\n]{{0,6}}{one_of(_OFFICE_ZH)}{one_of(_ASKED_ZH)}",
            rf"\b(?:{'|'.join(_NOW_EN)})\b",
            r"\bweather (?:like )?(?:forecast )?(?:\w+ ){0,4}?(?:today|tomorrow|right now|now|currently|this week)\b",
            r"\b(?:today|tomorrow|current|this week(?:end)?)(?:'s)? weather\b|\b(?:what|how)(?:'s| is) the weather\b",
            r"\bstock market (?:doing )?(?:today|right now|now)\b",
            rf"\b(?:{'|'.join(_NEWS_EN)})\b",
            r"\b(?:current|latest|today's|live) (?:\w+ ){0,3}?(?:stock price|share price|price of|exchange rate)\b",
            r"\bcurrent price\b",
            r"\b(?:stock price|share price|exchange rate|price of)\b[^.?\n]{0,40}?\b(?:today|right now|now)\b",
            rf"\bwho is the current {one_of(_OFFICE_EN)}\b|\bwhat is the current population\b",
        )
    )
)
# The day does not matter where a program, a translation, a sentence, a reason or a way to keep informed is asked for.
_NAMES_IT_ZH = """
    代码 脚本 函数 程序 翻译 译成 改写 重写 造句 句子 文本 对话 故事 诗 作文 写一篇 模型 影响 因素 为什么 为何 原因
    撰写 生成 设计 根据 短信 珍惜 气候 假设 看新闻 分类 预计 描述 如何获取 如何了解 如何跟上 如何预测 如何分析 看待 方法
    方式 类似 示例 例子 标题
""".split()
_NAMES_IT_EN = """
    app apps code script function program python javascript java api sql html css class translate sentence story poem
    essay rewrite write dialogue conversation paragraph affect impact influence factors why predict website difference
    example describe if sentiment headline headlines classify statement following
""".split()
_ONLY_NAMES_IT = re.compile(
    rf"{one_of(_NAMES_IT_ZH)}|现在是(?!几).{{0,16}}点|\d ?月|{one_word_of(_NAMES_IT_EN)}|\bways? to\b|"
    r"\bhow (?:do|can|does|did|to)\b|\b(?:keep|stay) up"
)


def changes_with_the_day(question: str) -> str | None:
    """What a question (folded, lower case) asks for that is true today and not tomorrow, or None. Questions of more
    than ASKED_IN characters, and requests for programs, translations, texts, reasons and ways, are left alone."""
    question = question.replace("’", "'")
    if len(question) > ASKED_IN or _ONLY_NAMES_IT.search(question):
        return None
    found = _TIME_BOUND.search(question)
    return found[0] if found else None
