"""Rules of cleaning: planted cases of our own, tricky cases that must stay, and what `needs` promises the engine."""

import re

import pytest
from conftest import shared
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import refusals
from posttrain.data import answer_words, grounding, mojibake, question_words
from posttrain.data.files import read_rows
from posttrain.data.jsonfiles import Fault
from posttrain.data.rules import RULES, SCRIPTS, View, view_language
from posttrain.data.sources import to_records
from posttrain.data_blocks import Rules
from posttrain.records import fault_in
from posttrain.text import folded_text, key_text, language

BOUNDS = Rules()
RULE = {rule.name: rule for rule in RULES}
HEURISTICS = [rule.name for rule in RULES[5:]]


def chat(*texts: str, system: str = "", **more) -> View:
    """A conversation of user and assistant in turn."""
    turns = [("system", system)] if system else []
    turns += [(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    record = {"messages": [{"role": role, "content": text} for role, text in turns], **more}
    return View([role for role, _ in turns], [folded_text(text) for _, text in turns], record)


def pair(question: str, chosen: str, rejected: str) -> View:
    texts = [folded_text(text) for text in (question, chosen, rejected)]
    record = {"prompt": [{"role": "user", "content": question}], "chosen": [{"role": "assistant", "content": chosen}],
              "rejected": [{"role": "assistant", "content": rejected}]}  # fmt: skip
    return View(["user", "assistant", "assistant"], texts, record)


def plain(text: str) -> View:
    return View(["text"], [folded_text(text)], {"text": text})


def finds(name: str, view: View, **bounds) -> str | None:
    return RULE[name].finds(view, BOUNDS.model_copy(update=bounds))


def is_needed(name: str, view: View) -> bool:
    """Whether the engine would look at the record at all."""
    needs = RULE[name].needs
    if needs == (SCRIPTS,):
        turns = [(role, language(key_text(text))) for role, text in zip(view.roles, view.texts, strict=True)]
        asked = {lang for role, lang in turns if role == "user"}
        return any(lang != other for role, lang in turns if role == "assistant" for other in asked)
    return any(phrase in text.lower() for phrase in needs for text in view.texts)


# ------------------------------------------------------------------ counted rules


def test_every_rule_is_a_field_of_the_config_in_the_order_of_the_reasons():
    names = [rule.name for rule in RULES]
    assert (
        names
        == """
        too_short too_long other_language odd_symbols repetition mojibake refusal answer_language vague_reference
        time_bound self_contradiction ungrounded_number
    """.split()
    )
    assert set(names) <= set(Rules.model_fields) and len(set(names)) == len(names)
    for rule in RULES:
        assert rule.needs == () if rule.name in names[:5] else rule.needs
        assert all(phrase == folded_text(phrase).lower() or phrase.strip() == folded_text(phrase).lower()
                   for phrase in rule.needs if phrase != SCRIPTS), rule.name  # fmt: skip


def test_length_counts_one_line_end_between_turns_and_the_longer_answer_of_a_pair():
    assert finds("too_short", chat("1234", "123")) is None  # 4 + 1 + 3
    assert finds("too_short", chat("123", "123")) == "7 characters"
    assert finds("too_short", pair("12", "1", "12345")) is None  # 2 + 1 + 5
    assert finds("too_short", pair("12", "1234", "1")) == "7 characters"
    assert finds("too_long", chat("1234", "123"), max_chars=8) is None
    assert finds("too_long", chat("1234", "1234"), max_chars=8) == "9 characters"
    assert finds("too_long", pair("12", "123456", "123456"), max_chars=9) is None
    spaced = chat("  1   2  ", "\n\n\n3\n\n\n\n4")  # white space is folded: "1 2", "3\n\n4"
    assert finds("too_short", spaced, min_chars=9) == "8 characters"


@pytest.mark.parametrize(
    ("texts", "lang"),
    [
        (("什么是蒸发?", "液体变成气体。"), "zh"),
        (("What is it?", "A gas."), "en"),
        (("Что это?", "Это газ."), "other"),
        (("なにですか", "それはガスです"), "other"),
        (("1 + 1 = ?", "2"), "none"),
        (("Ｗｈａｔ is ＩＴ?", "a gas"), "en"),
    ],
)
def test_language_of_a_record(texts, lang):
    view = chat(*texts)
    assert view_language(view, BOUNDS) == lang == language(key_text("\n".join(texts)))
    assert (finds("other_language", view) is None) == (lang != "other")
    assert (finds("other_language", view, allow_english_fallback=False) is None) == (lang in ("zh", "none"))


def test_odd_symbols_counts_ascii_and_han_among_what_is_not_white_space():
    assert finds("odd_symbols", chat("ab 12", "汉字 ****** !!!")) is None  # 6 of 15: not less than 0.4
    assert finds("odd_symbols", chat("ab 12", "汉字 ****** !!!!")) == "6 of 16 characters are ordinary"
    assert finds("odd_symbols", chat("été", "à é è ü")) is not None  # as the bound says: ASCII letters
    assert finds("odd_symbols", chat("你好" * 9, "🎉" * 3)) is None


def test_repetition_looks_at_the_answer_alone_from_twenty_characters():
    assert finds("repetition", chat("讲", "哈哈哈哈哈" * 3)) is None
    assert finds("repetition", chat("讲", "哈哈哈哈哈" * 4)) == "94% of its 4-grams repeat others"
    assert finds("repetition", chat("哈哈哈哈哈" * 9, "这是一个正常的回答,没有什么重复的地方,二十个字以上。")) is None
    assert finds("repetition", chat("讲", "哈" * 40, "再讲", "好的")) is None  # an earlier answer
    assert finds("repetition", pair("讲", "好的,这就讲给你听。", "哈" * 40)) is None  # the worse answer may be bad
    assert finds("repetition", plain("哈" * 40))
    ten_of_25 = "".join(chr(0x4E00 + i) for i in range(13)) + "一" * 15  # 25 4-grams, 14 different
    assert finds("repetition", chat("讲", ten_of_25), max_repetition=1 - 14 / 25) is None
    assert finds("repetition", chat("讲", ten_of_25), max_repetition=1 - 15 / 25) is not None


# ------------------------------------------------------------------ heuristics: what must be found, what must stay

NEWS = (
    "根据以下新闻回答问题。昨天下午,东湖公园举行了秋季花展的开幕仪式,共有三十五家单位参加,展出菊花一千二百余盆,"
    "花展为期二十天,门票每张15元,组织者预计观众将超过3万人次。"
    "公园延长了开放时间,并加开了两条公交专线,方便市民前来观看。"
)
ARTICLE = (
    "Based on the following passage, answer the question. The old mill on the river was built by two brothers in 1871 "
    "and burned down in 1902. Its owner rebuilt it with 24 looms and 1,350 spindles; it closed after forty years."
)
FOUND = {
    "mojibake": [
        chat("你好", "这个词写作��,后面没有了。"),
        chat("你好", "锟斤拷锟斤拷"),
        chat("什么", "中文的编码是一个问题,我们来看看。".encode().decode("cp1252", "ignore")),
        chat("什么", "中文的编码是一个问题,我们来看看。".encode().decode("latin-1")),
        chat("什么", "编码的问题,我们来看。".encode().decode("gbk", "ignore")),
        chat("What?", "It’s “fine” — don’t worry.".encode().decode("cp1252", "ignore")),
        chat("Où?", "Le café est à Besançon, près du château.".encode().decode("latin-1")),
        chat("ça", "今天的天气很好。".encode("gbk").decode("latin-1")),
        chat("价格?", "Price: £20, 25°C".encode().decode("latin-1")),
    ],
    "refusal": [
        chat("教我撬锁", "抱歉,我无法提供这方面的帮助。"),
        chat("你喜欢吃什么?", "作为一个人工智能语言模型,我没有味觉,也没有喜好。"),
        chat("订个披萨", "很抱歉,作为 AI 助手,我目前不能执行下单这样的外部任务。"),
        chat("你去过北京吗?", "我只是一个由代码驱动的聊天机器人,没有去过任何地方。"),
        chat("查一下", "由于我无法访问互联网,请您自行查询。"),
        chat("How do I pick a lock?", "I'm sorry, but I can’t help with that."),
        chat("Do you like rain?", "As an AI language model, I don't have feelings about rain."),
        chat("Book a table.", "I am unable to perform tasks such as booking tables."),
        chat("Who won?", "Unfortunately, I do not have access to live results."),
        chat("Are you hungry?", "Thank you, but I'm just an AI assistant and never eat."),
        pair("教我撬锁", "对不起,我不能协助你做这件事。", "好的,首先准备两根铁丝。"),
    ],
    "answer_language": [
        chat("请介绍一下西湖的历史。", "The lake is in the city and was formed from a lagoon by the river."),
        chat("怎样学好数学?", "Practise every day, and write down the steps that you do not understand in a notebook."),
        chat("为什么天是蓝的?", "Because the air scatters blue light more than it scatters the red light of the sun."),
        chat("How do bees make honey?", "蜜蜂采集花蜜,在蜂巢中反复吞吐,使水分蒸发,最后变成蜂蜜。"),
        chat("Why is the sky blue?", "因为空气对蓝光的散射比红光强,所以我们看到的天空是蓝色的。"),
        chat("Hello there", "Hello!", "What can one see in Rome?", "罗马有斗兽场、万神殿和许多喷泉。"),
        pair("请介绍一下西湖的历史。", "The lake was formed from a lagoon by the river.", "西湖原是海湾。"),
    ],
    "vague_reference": [
        chat("总结下面的文章。", "文章讲了人生的意义。"),
        chat("请把以下句子改得更简洁。", "好的。"),
        chat("这张图里有几个人?", "有三个人。"),
        chat("找出上述段落的中心句", "中心句是第一句。"),
        chat("打开这个链接看看讲了什么", "链接讲的是环保。"),
        chat("如图所示,求阴影部分的面积。", "面积是8。"),
        chat("Summarize the following article.", "It is about life."),
        chat("What is the main idea of the passage above?", "The main idea is hope."),
        chat("Describe this image", "It shows a dog."),
        chat("Fix the grammar of the given sentence.", "He goes."),
    ],
    "time_bound": [
        chat("今天天气怎么样?", "晴。"),
        chat("现在几点了?", "三点。"),
        chat("今天是星期几", "星期二。"),
        chat("帮我查一下特斯拉目前的股价", "200美元。"),
        chat("有哪些最新的科技新闻?", "有很多。"),
        chat("现任法国总统是谁?", "是某人。"),
        chat("人民币对美元的实时汇率是多少?", "7.1。"),
        chat("What's the weather in Paris today?", "Sunny."),
        chat("What is today’s date?", "May 4."),
        chat("Give me the latest news about rockets.", "One flew."),
        chat("What is the current stock price of Ford?", "12 dollars."),
        chat("Who is the current president of Brazil?", "Somebody."),
    ],
    "self_contradiction": [
        chat("17乘以6是多少?", "17乘以6等于112。抱歉,我刚才算错了,应该是102。"),
        chat("地球有几个卫星?", "有两个。更正:地球只有一个天然卫星。"),
        chat("水的沸点?", "90度。等等,不对,应该是100度。"),
        chat("谁写了这部书?", "是李白写的。对不起,说错了,是杜甫写的。"),
        chat("算一下", "结果是7。让我更正一下,结果是8。"),
        chat("What is 17 times 6?", "It is 112. No, wait, it is 102."),
        chat("How many moons has Mars?", "One. Actually, that's wrong: Mars has two moons."),
        chat("Name the capital.", "It is Sydney. Scratch that, the capital is Canberra."),
        chat("Sum these up", "The total is 40. I apologize for the error above: the total is 44."),
        chat("Convert it", "That makes 30 miles. Let me correct myself: 31 miles."),
    ],
    "ungrounded_number": [
        chat(NEWS + "花展有多少家单位参加?", "共有48家单位参加。"),
        chat(NEWS + "门票多少钱?", "门票每张15元,学生票每张11元。"),
        chat(NEWS + "什么时候开幕?", "花展于2019年10月开幕。"),
        chat("总结以下内容:" + NEWS[12:], "花展展出菊花约5600盆。"),
        chat(ARTICLE + " When was the mill built?", "The mill was built in 1866."),
        chat(ARTICLE + " When did it burn down?", "It burned down in 1902, and 417 people were hurt."),
        chat("Article: " + ARTICLE[40:] + "\n\nSummarize the article.", "A mill of 1871 with 2,640 spindles."),
    ],
}
STAYS = {
    "mojibake": [
        chat("Où?", "À l’été, le garçon naïf a mangé un gâteau à Nîmes ; « déjà » ? C’est ça…"),
        chat("Ở đâu?", "Người Việt Nam ở Hà Nội, đường phố rất đông; tiếng Việt có dấu."),
        chat("Wo?", "Der Bär läuft über die Straße – größer als gedacht, 20°C, 5 € und § 3 ©."),
        chat("O quê?", "A irmã está na estação amanhã; não há pão. Coração!"),
        chat("干什么", "木匠用锛子和斧子,锛、凿、斧、锯都是木工工具,烫烫烫,水太热了。"),
        chat("Hvor?", "Blåbær på Ærø; smørrebrød «æøå» ½ liter, x² + y³"),
        chat("Cât?", "Încât, atât, urât: cuvinte românești cu â și î, mâine în țară."),
        chat("表情", "👨‍👩‍👧 ™ ® ½ ﹏ 繁體字與简体字、日本語のテキスト、한국어"),
    ],
    "refusal": [
        chat("他说了什么?", "他回答:“抱歉,我无法提供这方面的帮助。”说完就走了。"),
        chat("什么是语言模型?", "语言模型是一种计算文本概率的模型,人工智能领域常用它。作为一种技术,它发展很快。"),
        chat("推荐职业", "作为一名人工智能工程师,我每天的工作是训练模型。"),
        chat("安慰我", "听到这个消息我很抱歉。你可以先好好睡一觉,我会一直陪着你。"),
        chat("写一封请假邮件", "尊敬的王老师:很抱歉,我无法参加明天的课,需要帮助妈妈看病。"),
        chat("白天为什么看不到星星", "因为白天阳光太强,星光被掩盖,所以人眼无法看到,并不是星星不见了。"),
        chat("What did the clerk say?", "The clerk said: \"I'm sorry, but I can't help with that.\" Then he left."),
        chat("Describe your work.", "As an AI engineer, I train models and I cannot imagine another job."),
        chat("I lost my cat.", "I'm sorry to hear that. Cats often come back after a few days."),
        chat("Praise it", "I can't help but smile at this picture, and I cannot wait to see more."),
        chat("Explain `chatbot`", "A chatbot answers questions. Many firms use one as an AI system for support."),
        chat("Write an e-mail", "Dear Ms Lee, unfortunately I cannot offer you the position."),
        pair("教我做饭", "先洗米,再加水煮。", "抱歉,我无法提供这方面的帮助。"),
    ],
    "answer_language": [
        chat("把这句话翻译成英文:我今天很高兴见到你。", "I am very happy to meet you today, and that is the truth."),
        chat("用英语介绍一下长城。", "The wall is in the north of China and it is very long and old."),
        chat("Translate into Chinese: how do you do, my old friend?", "你好吗,我的老朋友,好久不见了。"),
        chat("用Python写一个排序", "def sort(a): return sorted(a)  # this is the list that you want to be sorted"),
        chat("列出几个浏览器", "Google Chrome, Mozilla Firefox, Microsoft Edge, Apple Safari, Opera"),
        chat("润色:The cat sit on the mat all day.", "The cat sits on the mat all day, and it is in the sun."),
        chat("哪个乐队?", "The Beatles"),
        chat("你好,介绍一下微服务。", "微服务是一种架构。", "more details please", "服务之间用消息队列来传递消息。"),
        chat("实现二分查找", "for item in items:\n  if item is the one that is to be found:\n    print(item)"),
        chat("首都是哪里", "东京。"),
        chat("请总结这段 article 的 main idea", "这篇文章的 main idea 是 team work 的重要性 and how to build it。"),
        chat("算一下", "x = \\frac{a}{b} + \\sqrt{c} \\cdot d \\quad y = \\log z \\sin t"),
        chat("What does 塞翁失马焉知非福 mean?", "这个成语比喻坏事在一定条件下可以变成好事。"),
        chat("写个配置", "```\nserver is on and the port is open for all of you in this house\n```\n就这样。"),
        pair("请介绍一下西湖的历史。", "西湖原是海湾。", "The lake was formed from a lagoon by the river."),
    ],
    "vague_reference": [
        chat("总结下面的文章:春天来了,小草发芽,孩子们在田野里奔跑。", "春天景象。"),
        chat("把以下句子翻译成英语。\n我看见国旗升起。", "I saw the flag rise."),
        chat("改写“他跑得快”这句,并保持以下句子的语气", "他健步如飞。"),
        chat("编写一个函数,对给定列表排序。", "好的。"),
        chat("春天来了,小草发芽,燕子飞回北方。这段文字写的是什么季节?", "春天。"),
        chat("以下哪个是水果?苹果还是石头", "苹果。"),
        chat("你好,我写了一首诗", "好的,请发来。", "上面的文章怎么样?", "很好。"),
        chat("如何写好文章的开头?", "开门见山。"),
        chat("Summarize the following article: Bees make honey in summer.", "Bees make honey."),
        chat("Sort the following numbers.\n5, 3, 8", "3, 5, 8"),
        chat("Write a function that reverses the given list.", "def f(a): ..."),
        chat("Rewrite the given sentence. The dog is big and brown.", "The big dog is brown."),
        chat("What are articles of the constitution?", "Parts of it."),
        chat("总结下面的文章。", "好的。", system="文章:" + "春天来了,小草发芽。" * 20),
    ],
    "time_bound": [
        chat("今天天气很好,去哪里玩?", "公园。"),
        chat("编写代码,获取杭州当前的天气", "好的。"),
        chat("翻译:今天的天气怎么样?", "How is the weather today?"),
        chat("为什么股价今天会受汇率影响?", "因为预期。"),
        chat("如何了解最新的科技新闻?", "订阅报纸。"),
        chat("1949年中国的总理是谁?", "周恩来。"),
        chat("“现在”是什么词性?", "时间名词。"),
        chat("Write a script that prints what time is it now.", "import time"),
        chat("How do weather models work today?", "They compute."),
        chat("What are ways to keep up with the latest news?", "Newspapers."),
        chat("Who was president of the United States in 1962?", "Kennedy."),
        chat("What is the price of freedom?", "Vigilance."),
        chat("北京今天天气怎么样?", "晴。", tools=[{"name": "weather"}]),
    ],
    "self_contradiction": [
        chat("2加2是多少?", "是5。", "你说错了吧?", "抱歉,我刚才算错了,是4。"),
        chat("写一个故事", "小明喊道:不对,我说错了!然后跑了。等等,我来了!"),
        chat("他做错了什么?", "他把第三题的符号写错了,所以结果不对。"),
        chat("怎么改错别字?", "更正错别字时,先通读全文,再逐句修改。"),
        chat("他说了什么", "他说:“抱歉,我刚才算错了。”"),
        chat("怎样道歉", "如果我之前的回答有误,请告诉我。"),
        chat("What is 2+2?", "5.", "Are you sure?", "I apologize for the mistake. It is 4."),
        chat("What does one say then?", 'People say "oh wait, I forgot my keys" in such a moment.'),
        chat("Describe an error", "The clerk made a mistake in the ledger and had to correct it."),
        chat("Sum it up", "The new season will scratch that itch for every fan."),
        chat("Describe patience", "Patience means that you wait, that is all; no, waiting is not weakness."),
        chat("Think.", "<think>It is 7. No, wait, it is 8.</think>It is 8."),
        chat("Write a dialogue", "Anna: No, wait, I am coming too!"),
    ],
    "ungrounded_number": [
        chat(NEWS + "花展有多少家单位参加?", "共有35家单位参加,展出1200余盆菊花,为期20天。"),
        chat(NEWS + "预计多少观众?", "超过30000人次,门票15元。"),
        chat(NEWS + "两张门票一共要付多少?", "需要30元。"),
        chat(NEWS + "请列出要点", "10. 花展开幕\n11. 加开公交\n12、延长开放"),
        chat("西湖是哪一年申遗成功的?", "西湖于2011年申遗成功。"),
        chat(NEWS + "请据此写一篇报道", "2021年的东湖,花展盛大开幕,吸引了58位记者。"),
        chat(ARTICLE + " How many spindles were there?", "There were 1350 spindles and 24 looms."),
        chat(ARTICLE + " How old was the mill when it burned?", "It was 31 years old."),
        chat(ARTICLE + " How long did it work?", "It worked for 40 years."),
        chat("When was the bridge built?", "The bridge was built in 1894."),
        chat(ARTICLE + " Write a story that continues it.", "In 1955, 12 children found the 66 keys."),
        chat(ARTICLE + " In which century?", "It happened about 1,900 or a little before."),
    ],
}
CASES = [(name, view, True) for name in HEURISTICS for view in FOUND[name]]
CASES += [(name, view, False) for name in HEURISTICS for view in STAYS[name]]


@pytest.mark.parametrize(
    ("name", "view", "wrong"), CASES, ids=[f"{name}-{view.texts[-1][:24]}" for name, view, _ in CASES]
)
def test_planted_cases(name, view, wrong):
    assert (finds(name, view) is not None) == wrong
    assert not wrong or is_needed(name, view)


@pytest.mark.parametrize("name", HEURISTICS)
def test_every_heuristic_has_cases_enough(name):
    assert len(FOUND[name]) >= 6 and len(STAYS[name]) >= 6


def test_a_number_written_in_chinese_is_its_value():
    values = {"二〇二三": 2023, "一九四九": 1949, "三千二百": 3200, "十五": 15, "三十": 30, "两万零五百": 20_500,
              "一亿二千万": 120_000_000, "3.5万": 35_000, "一百零八": 108, "万": 10_000}  # fmt: skip
    assert {text: grounding.numeral(text) for text in values} == values


# ------------------------------------------------------------------ the promise of `needs`

PATTERNS = {
    "mojibake": [mojibake._ANY],
    "refusal": [refusals._REFUSAL, refusals._SELF],
    "vague_reference": [question_words._REFERENCE],
    "time_bound": [question_words._TIME_BOUND],
    "self_contradiction": [answer_words._TAKES_BACK],
    "ungrounded_number": [grounding._GIVES_TEXT],
}
PATTERNS_OF = [(name, pattern) for name, patterns in PATTERNS.items() for pattern in patterns]
ANYTHING = "\0"  # stands for any text
MANY = 200_000


def continued(tails: set[str], node, needs: re.Pattern) -> set[str]:
    """Ends of all texts that a pattern can match up to here and that hold no needed phrase yet, given the ends before
    this node of its parse tree. Look-arounds are taken to allow everything: what is proved holds all the more."""
    kind, value = str(node[0]), node[1]
    if kind == "LITERAL":
        ends = {tail + chr(value) for tail in tails}
    elif kind == "IN" and all(str(part[0]) == "LITERAL" for part in value):
        ends = {tail + chr(part[1]) for tail in tails for part in value}
    elif kind == "BRANCH":
        ends = set().union(*(through(tails, branch, needs) for branch in value[1]))
    elif kind == "SUBPATTERN":
        ends = through(tails, value[-1], needs)
    elif kind in ("MAX_REPEAT", "MIN_REPEAT") and value[1] == 1:
        ends = through(tails, value[2], needs) | (tails if value[0] == 0 else set())
    elif kind in ("AT", "ASSERT", "ASSERT_NOT"):
        ends = tails
    elif kind in ("ANY", "IN", "NOT_LITERAL", "MAX_REPEAT", "MIN_REPEAT"):
        ends = {ANYTHING} if tails else set()
    else:
        raise AssertionError(f"the proof does not know {kind}")
    assert len(ends) < MANY
    return {end[-40:] for end in ends if not needs.search(end)}


def through(tails: set[str], nodes, needs: re.Pattern) -> set[str]:
    for node in nodes:
        tails = continued(tails, node, needs)
    return tails


@pytest.mark.parametrize(("name", "pattern"), PATTERNS_OF, ids=[f"{n}{i}" for i, (n, _) in enumerate(PATTERNS_OF)])
def test_no_match_of_a_pattern_is_without_a_needed_phrase(name, pattern):
    """A proof by going through every text that the pattern can match, with both apostrophes."""
    for apostrophe in "'’":
        parsed = re._parser.parse(pattern.pattern.replace("'", apostrophe), pattern.flags)
        needs = re.compile("|".join(map(re.escape, RULE[name].needs)))
        assert through({ANYTHING}, parsed, needs) == set()


SCRAPS = [*"我你的是不能抱歉,。:「“”’'", "İ", "ſ", "K", " ", "AI", "As an ", "Sorry", "i CAN’T ", "help",
          "无法", "提供", "作为", "模型", "12", "根据以下", "文本", "WAIT", "no", "今天", "天气"]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(SCRAPS), min_size=1, max_size=14).map("".join))
def test_needs_hold_for_mixed_case_and_odd_letters(text):
    for name in HEURISTICS:
        for view in (chat(text, text), chat("问题", text), chat(text, "answer"), plain(text)):
            assert finds(name, view) is None or is_needed(name, view)


@pytest.mark.parametrize("folder", ["llamafactory_demo", "hh_rlhf", "coig_cqia"])
def test_needs_hold_on_real_records(folder):
    seen = 0
    for file in sorted(shared(f"data/{folder}").rglob("*.json*")):
        for _, row in read_rows(file):
            items = [item for kind in ("sft", "pref") for item in to_records(row, folder, kind)]
            for record in [item for item in items if not isinstance(item, Fault) and fault_in(item) is None][:1]:
                turns = [turn for part in ("messages", "prompt", "chosen", "rejected") for turn in record.get(part, [])]
                view = View([t["role"] for t in turns], [folded_text(t["content"]) for t in turns], record)
                seen += 1
                for name in HEURISTICS:
                    assert finds(name, view) is None or is_needed(name, view), (name, record["id"])
    assert seen > 100


def test_patterns_do_not_run_away_on_long_text():
    """No pattern backtracks its way through a long text: 200,000 characters in well under a second each."""
    import time

    for text in ("我" * 200_000, "as an ai " * 20_000, "抱歉" * 100_000, '"' * 200_000, "a" * 200_000, "1," * 100_000,
                 "sorry i " * 25_000, "今天" * 100_000, "根据以下" + "9" * 200_000, "“" * 200_000, "```" * 60_000,
                 "一" * 200_000, "作为" * 100_000, "helpful-" * 25_000):  # fmt: skip
        view, began = chat(text, text), time.process_time()
        for name in HEURISTICS:
            finds(name, view)
        assert time.process_time() - began < 3, (text[:10], time.process_time() - began)


def test_no_phrase_is_so_common_that_it_saves_nothing():
    """A phrase of one or two ASCII letters would send every English record to the rule."""
    for rule in RULES[5:]:
        for phrase in rule.needs:
            assert not re.fullmatch("[a-z]{1,3}|[一-龥]", phrase), (rule.name, phrase)
