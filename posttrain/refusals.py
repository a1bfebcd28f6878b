"""
Refusals: the words by which an assistant refuses, or speaks of itself as a program, in Chinese and English.

Both functions read folded text (text.folded_text). What stands in quotation marks, in code or in <think> is not what
the answer says and does not count. A refusal counts only where an answer opens: "I cannot" inside a story or a list of
causes is none. These are patterns, not understanding: docs/rules_measured.md says how often they are wrong.
"""

import re

OPENING = 240  # characters of an answer, without quotations, in which a refusal is looked for
_SET_APART = re.compile(
    r'```.*?(?:```|\Z)|`[^`\n]*`|"[^"\n]{1,400}"|“[^”\n]{1,400}”|「[^」\n]{1,400}」|『[^』\n]{1,400}』|<think>.*?</think>',
    re.DOTALL,
)
_CLAUSE = r"(?:^|[.!?,;:。…~\n\x01] ?|\b(?:but|however|and|so|that) )"  # where a clause begins


def one_of(words: list[str]) -> str:
    """A pattern of any of these words."""
    return f"(?:{'|'.join(words)})"


def one_word_of(words: list[str]) -> str:
    """A pattern of any of these English words as a whole word, also where Chinese characters touch it."""
    return f"(?<![a-z]){one_of(words)}(?![a-z])"


# ------------------------------------------------------------------ refusing

_I_CANNOT = (
    r"\bi(?: can't| cannot| can not|(?: won't| will not)(?! keep| bother)| must decline| have to decline| refuse|"
    r"(?:'m| am) (?:unable|not (?:able|allowed|permitted|going|programmed|designed|capable|comfortable|willing))"
    r"|(?: don't| do not) have (?:the (?:ability|capability|capacity)|access|permission|real-time|enough information))"
)
_HELP = one_of(
    """
    assist provid answer fulfil comply shar support recommend offer discuss creat generat writ engag participat access
    brows perform respond advis encourag condon promot reveal disclos predict determin execut process summari view
    search
""".split()
    + [r"help(?! but)", r"do (?:that|this)\b", "look up", "order", "give (?!up)", "tell you (?!how )"]
)
_CANNOT_ZH = """
    无法 不能 没办法 没有办法 没法 不可以 不可能 不会 不愿 拒绝 没有能力 没有权限 没有足够 不具备 不被允许 不提供
    不支持
""".split()
_ADVERB_ZH = ["", *"目前 暂时 现在 确实 恐怕 也 还 并 实在 是".split()]
_I_CANNOT_ZH = f"我{one_of(_ADVERB_ZH)}{one_of(_CANNOT_ZH)}"
_HELP_ZH = one_of(
    """
    提供 回答 协助 帮 满足 完成 生成 执行 访问 浏览 查看 查询 检索 给出 讨论 参与 推荐 处理 播放 打开 发送 预订 订购
    显示 绘制 画 创建 撰写 编写 分享 透露 预测 支持 鼓励 获取 读取 下载 评价 判断
""".split()
)
_SORRY_ZH = r"(?:抱歉|对不起|不好意思)"
_REFUSAL = re.compile(
    "|".join(
        (
            rf"\b(?:sorry|apologize|apologise|unfortunately|i'm afraid)\b[^.?!\n\x01]{{0,80}}?{_I_CANNOT}",
            rf"\bsorry, (?:but )?(?:can't|cannot|unable to) {_HELP}",
            r"\bsorry,? (?:but )?i don't think (?:that's appropriate|i (?:can|should))",
            rf"{_CLAUSE}{_I_CANNOT[2:]}(?: to| of| for)? (?:\w+ )?{_HELP}",
            r"\b(?:not |in)appropriate for me to\b|\bagainst my (?:programming|guidelines|policy)\b",
            rf"{_SORRY_ZH}[^。!?\n\x01]{{0,40}}?{_I_CANNOT_ZH}",
            rf"{_SORRY_ZH}[,。!: ]{{0,2}}{one_of(_CANNOT_ZH)}[^。,!?\n\x01]{{0,4}}?{_HELP_ZH}",
            rf"{_CLAUSE}(?:由于|因为|但是?|所以)?{_I_CANNOT_ZH}[^。,!?\n\x01]{{0,8}}?{_HELP_ZH}",
        )
    )
)
# ------------------------------------------------------------------ speaking of itself

_OF_A_JOB = """
    engineer research expert scien ethic special consult enthus start compan product teach practition art field stud
    developer development profess trainer training tool
""".split()
_OF_A_JOB_ZH = """
    工程 领域 专家 研究 科学 技术 专业 公司 算法 产品 从业 学习者 爱好 行业 产业 教师 顾问 开发 训练师 系的 课 时代
    的子 的一个 的重要 的分支 的核心 的应用 的发展 的创始
""".split()
_PROGRAM = (  # begins with the space before it
    r"(?:[ -](?:ai|artificial intelligence|machine learning|large|\w+ful|ethical|responsible|text-based)){0,3}[ -]"
    rf"(?:ai(?! {one_of(_OF_A_JOB)})[ ,.']|"
    f"(?:artificial intelligence|language model|chatbot|computer program|virtual assistant)(?! {one_of(_OF_A_JOB)}))"
)
_PROGRAM_ZH = (
    "(?:语言模型|人工智能|智能助[手理]|虚拟助[手理]|聊天机器人|对话机器人|计算机程序|电脑程序|"
    "[为个名款种位的是] ?ai(?![a-z]))"
    f"(?! ?(?:语言模型|助手|模型)?{one_of(_OF_A_JOB_ZH)})"
)
# Each alternative begins with a letter, which lets `re` skip; what must stand before it is asked for after it.
_SELF = re.compile(
    "|".join(
        (
            rf"as(?<!\w as)(?<!\was) an?{_PROGRAM}[^.?!\n\x01]{{0,60}}?\b(?:i|my|me)\b",
            rf"(?:but|however|and|so|that) as an?{_PROGRAM}[^.?!\n\x01]{{0,60}}?\b(?:i|my|me)\b",
            rf"i(?<!\wi)(?:'m| am) (?:just |only |merely |simply |actually )?an?{_PROGRAM}",
            r"i(?<!\wi)(?: was|'m| am) (?:trained|developed|created|built) by (?:openai|anthropic|google|meta)\b",
            r"my(?<!\wmy) (?:knowledge cut-?off|training data|last knowledge update)\b",
            rf"作(?=为)[^。,!?\n\x01]{{0,24}}?{_PROGRAM_ZH}[^。!?\n\x01]{{0,30}}?我(?!们|国)",
            rf"身(?=为)[^。,!?\n\x01]{{0,24}}?{_PROGRAM_ZH}[^。!?\n\x01]{{0,30}}?我(?!们|国)",
            rf"我(?!们)[^。,!?\n\x01]{{0,4}}(?:作|身)(?=为)[^。,!?\n\x01]{{0,24}}?{_PROGRAM_ZH}",
            rf"我(?:只|仅|仅仅|其实|本身|就)?(?=是)[^。,!?\n\x01]{{0,24}}?{_PROGRAM_ZH}",
            rf"我[是叫][^。,!?\n\x01]{{0,20}},[是一][^。,!?\n\x01]{{0,30}}?{_PROGRAM_ZH}",
            rf"像我这(?=样的)[^。,!?\n\x01]{{0,8}}?{_PROGRAM_ZH}",
        )
    )
)
# Lower-case phrases, one of which stands in every folded text in which either function finds something.
NEEDS = tuple(
    spelling
    for phrase in (
        "sorry", "apologize", "apologise", "unfortunately", "i'm afraid", "i can't", "i cannot", "i can not", "i won't",
        "i will not", "i must decline", "i have to decline", "i refuse", "i'm unable", "i am unable", "i'm not ",
        "i am not ", "i don't have ", "i do not have ", "appropriate for me to", "against my programming",
        "against my guidelines", "against my policy", " ai ", " ai,", " ai.", " ai'", "-ai ", "-ai,", "-ai.", "-ai'",
        "artificial intelligence", "language model", "chatbot", "computer program", "virtual assistant", "by openai",
        "by anthropic", "by google", "by meta", "my knowledge cut", "my training data",
        "my last knowledge update", "抱歉", "对不起", "不好意思", "语言模型", "人工智能", "智能助手", "智能助理",
        "虚拟助手", "虚拟助理", "聊天机器人", "对话机器人", "计算机程序", "电脑程序",
        *("我" + adverb + cannot for adverb in _ADVERB_ZH for cannot in _CANNOT_ZH),
        *(mark + space + "ai" for mark in "为个名款种位的是" for space in ("", " ")),
    )
    for spelling in dict.fromkeys((phrase, phrase.replace("'", "’")))
)  # fmt: skip


# An answer that opens so is a letter or a dialogue: what it refuses, it refuses in somebody else's name.
_FOR_OTHERS = re.compile(
    r"(?:dear |subject: |尊敬的|亲爱的|主题:|"
    r"(?!(?:ai|assistant|answer|response|output|回答|答|回复)\b)[^\W\d_]{1,12} ?: ?\w)"
)


def own_words(answer: str) -> str:
    """An answer (folded) in lower case and with plain apostrophes; a control character for what it sets apart."""
    return _SET_APART.sub("\x01", answer.lower().replace("’", "'")).strip(" \n")


def refusal(answer: str) -> str | None:
    """The words by which an answer (folded) refuses in its first OPENING characters, or None."""
    opening = own_words(answer)[:OPENING]
    found = None if _FOR_OTHERS.match(opening) else _REFUSAL.search(opening)
    return found[0].strip(" \n\x01") if found else None


def self_description(answer: str) -> str | None:
    """The words by which an answer (folded) speaks of itself as a program, anywhere in it, or None."""
    found = _SELF.search(own_words(answer))
    return found[0].strip(" \n\x01") if found else None
