"""
The demo's files: a raw corpus in the original schemas of public sets, prompts with expected answers, and eval tasks.

Every fact is asked for in five of its family's six ways; the sixth, another one for each fact, is kept for the prompts
(group recall). Of a few facts the conversations teach a mistake, as real SFT data do, and the preference pairs put it
right (group corrected). Some facts and some sums are never seen at all (groups unseen_facts, unseen_sums). A few rows
are broken, doubled, foreign or too short on purpose: the data card has to tell of them.
"""

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from posttrain.demo.facts import FAMILIES, SUMS, Family
from posttrain.records import record_id, write_jsonl

# As much as a million parameters learn by heart in a minute on one core.
SEEN_PER_FAMILY = 26
MISTAKES_PER_FAMILY = 2  # of the seen ones
UNSEEN_PER_FAMILY = 4  # of each family with at least 20 facts
NUM_UNSEEN_SUMS = 30
NUM_RECALL_PROMPTS = 120
# One short statement and a full stop: no question, no second clause, no second sentence. Every family's answer is one.
HOUSE_FORMAT = "[^，。？！]{1,30}(是|在|等于)[^，。？！]{1,30}。"
RAW_SETS = ("demo_alpaca", "demo_sharegpt", "demo_oasst", "demo_pairs_text", "demo_pairs_turns", "demo_pairs_lists")


@dataclass(frozen=True)
class Item:
    """One fact with its sentences. `order` is its own order of the questions; no training row asks the last one.
    `mistake` is the wrong answer that the conversations give, if they do."""

    family: Family
    fact: dict[str, str]
    order: tuple[int, ...]
    seen: bool
    mistake: str | None

    @property
    def answer(self) -> str:
        return self.family.answer.format(**self.fact)

    @property
    def taught(self) -> str:
        """What the conversations answer."""
        return self.mistake or self.answer

    @property
    def group(self) -> str:
        if self.seen:
            return "corrected" if self.mistake else "recall"
        return "unseen_sums" if self.family is SUMS else "unseen_facts"

    @property
    def questions(self) -> list[str]:
        """The five ways in which training rows may ask."""
        return [self.family.questions[n].format(**self.fact) for n in self.order[:-1]]

    @property
    def kept_question(self) -> str:
        return self.family.questions[self.order[-1]].format(**self.fact)


def wrong_answer(family: Family, fact: dict[str, str], rng: random.Random) -> str:
    """The answer's sentence with the value of another fact of the family."""
    values = {other["v"] for other in family.facts} - {fact["v"]}
    if family is SUMS:  # a near miss, not any number
        values = {str(int(fact["v"]) + d) for d in (-10, -2, -1, 1, 2, 10)}
    return family.answer.format(**{**fact, "v": rng.choice(sorted(values))})


def draw_items(rng: random.Random) -> list[Item]:
    """All facts of the demo, each with its kept question, a share of them never to be seen in training."""
    items = []
    for family in FAMILIES:
        facts = list(family.facts)
        rng.shuffle(facts)
        unseen = NUM_UNSEEN_SUMS if family is SUMS else UNSEEN_PER_FAMILY if len(facts) >= 20 else 0
        for number, fact in enumerate(facts[: unseen + SEEN_PER_FAMILY]):
            order = rng.sample(range(len(family.questions)), len(family.questions))
            mistaken = unseen <= number < unseen + MISTAKES_PER_FAMILY and family is not SUMS
            mistake = wrong_answer(family, fact, rng) if mistaken else None
            items.append(Item(family, fact, tuple(order), number >= unseen, mistake))
    return items


# ------------------------------------------------------------------ what the base reads


def base_texts(items: list[Item], rng: random.Random) -> list[str]:
    """Textbook prose and lists of exercises: the facts, but never a question with its answer behind it."""
    seen = [item for item in items if item.seen]
    texts = [sentence.format(**item.fact) for item in seen for sentence in item.family.prose]
    questions = [question for item in seen for question in item.questions]
    rng.shuffle(texts)
    rng.shuffle(questions)
    pages = ["".join(texts[start : start + 4]) for start in range(0, len(texts), 4)]
    exercises = [question.replace("\n", "") for question in questions[: len(texts)]]
    pages += ["练习：" + "".join(exercises[start : start + 3]) for start in range(0, len(exercises), 3)]
    rng.shuffle(pages)
    return pages


# ------------------------------------------------------------------ conversations


def alpaca_rows(items: list[Item], rng: random.Random) -> list[dict]:
    """{"instruction", "input", "output"}: the first two ways of asking for each fact."""
    rows = []
    for item in items:
        for question in item.questions[:2]:
            instruction, _, given = question.partition("\n")
            rows.append({"instruction": instruction, "input": given, "output": item.taught})
    rng.shuffle(rows)
    rows += [dict(row) for row in rng.sample(rows, 6)]  # doubled
    rows += [{"instruction": text, "input": "", "output": "好"} for text in ("在吗", "你好", "谢谢")]  # too short
    rows += [
        {"instruction": "请介绍一下你自己。", "input": "", "output": ""},  # no answer
        {"instruction": "请默写课文。", "input": "", "output": None},
        {"instruction": "Как называется столица Франции?", "input": "", "output": "Столица Франции - Париж."},
        {"instruction": "프랑스의 수도는 어디입니까?", "input": "", "output": "프랑스의 수도는 파리입니다."},
        {"instruction": "请把这句话抄写五百遍。", "input": "", "output": "好好学习，天天向上。" * 500},
    ]
    rng.shuffle(rows)
    return rows


def sharegpt_lines(items: list[Item], rng: random.Random) -> list[str]:
    """{"conversations": [{"from", "value"}]}: two more ways of asking, one to three a chat, some with a system turn."""
    asked = [(question, item.taught) for item in items for question in item.questions[2:4]]
    rng.shuffle(asked)
    rows, at = [], 0
    while at < len(asked):
        size = rng.choice((1, 2, 3))
        turns = [{"from": "system", "value": "你是一位小学老师，请简短回答。"}] if rng.random() < 0.1 else []
        for question, answer in asked[at : at + size]:
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        rows.append({"id": f"chat_{len(rows)}", "conversations": turns})
        at += size
    swapped = [{"from": "gpt", "value": "你好，我是老师。"}, {"from": "gpt", "value": "有什么问题吗？"}]
    rows += [rows[0], rows[1], {"id": "chat_swapped", "conversations": swapped}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    lines.insert(len(lines) // 2, lines[2][: len(lines[2]) // 2])  # a line cut off in the middle
    return lines


def oasst_rows(items: list[Item], rng: random.Random) -> list[dict]:
    """Flat messages, the fifth way of asking: a good answer (rank 0) and a poor one (rank 1); some trees go on."""
    rows = []

    def message(parent: dict | None, role: str, text: str, rank: int | None = None, **more) -> dict:
        number = f"{len(rows):08x}"
        row = {"message_id": number, "parent_id": parent and parent["message_id"], "text": text, "role": role,
               "lang": "zh", "review_count": 3, "review_result": True, "deleted": False, "rank": rank,
               "message_tree_id": parent["message_tree_id"] if parent else number, "tree_state": "ready_for_export",
               **more}  # fmt: skip
        rows.append(row)
        return row

    order = rng.sample(items, len(items))
    while order:
        item = order.pop()
        root = message(None, "prompter", item.questions[4])
        message(root, "assistant", "我不知道，你可以自己去查一查。", rank=1)
        best = message(root, "assistant", item.taught, rank=0)
        if order and rng.random() < 0.25:
            follow_up = order.pop()
            asked = message(best, "prompter", follow_up.questions[4])
            message(asked, "assistant", follow_up.taught, rank=0)
    lonely = message(None, "prompter", "为什么天空是蓝色的？")
    message(lonely, "assistant", "广告：点击领取奖品！", rank=0, deleted=True, review_result=False)
    message(None, "prompter", "有人吗？谁来回答我的问题？")
    return rows


# ------------------------------------------------------------------ preference pairs


def rejected_answer(item: Item, question: str, rng: random.Random) -> str:
    """A worse answer: wrong (as long as the right one), hedging, long-winded, a bare fragment, or no answer at all."""
    kind = rng.choices(("wrong", "hedging", "long", "fragment", "echo"), (40, 15, 15, 15, 15))[0]
    if kind == "wrong":
        return wrong_answer(item.family, item.fact, rng)
    if kind == "hedging":
        return f"我不太确定，也许{item.answer.rstrip('。')}，也许不是，你再查一查吧。"
    if kind == "long":
        return f"{item.answer}这个问题很重要，老师再说一遍：{item.answer}请大家一定要记住，{item.answer}"
    if kind == "fragment":
        return item.fact["v"]
    return f"你问的是：{question.splitlines()[-1]}"


def pairs(items: list[Item], rng: random.Random) -> list[tuple[str, str, str]]:
    """(question, chosen, rejected): one for each fact, two for every third, four against a mistake."""
    made = []
    for item in items:
        count = 4 if item.mistake else 2 if rng.random() < 0.35 else 1
        for question in rng.sample(item.questions, count):
            made.append((question, item.answer, item.mistake or rejected_answer(item, question, rng)))
    rng.shuffle(made)
    return made


def pair_text(question: str, chosen: str, rejected: str) -> dict:
    return {"system": "", "question": question, "response_chosen": chosen, "response_rejected": rejected}


def pair_turns(question: str, chosen: str, rejected: str) -> dict:
    return {"conversations": [{"from": "human", "value": question}], "chosen": {"from": "gpt", "value": chosen},
            "rejected": {"from": "gpt", "value": rejected}}  # fmt: skip


def pair_lists(question: str, chosen: str, rejected: str) -> dict:
    return {"prompt": [{"role": "user", "content": question}], "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}]}  # fmt: skip


def pair_rows(third: list[tuple[str, str, str]], shape: Callable[[str, str, str], dict]) -> list[dict]:
    """Pairs in one of the three spellings, with two doubled ones and one whose two answers are the same."""
    rows = [shape(*pair) for pair in third]
    question, chosen, _ = third[0]
    return [*rows, shape(*third[1]), shape(*third[2]), shape(question, chosen, chosen)]


# ------------------------------------------------------------------ prompts and tasks


def prompt_rows(items: list[Item], rng: random.Random) -> list[dict]:
    """{"id", "prompt", "answer", "group", "meta"}: kept questions of seen facts, and those never seen.

    `meta.format` is the house format as a regular expression, whatever the answer says.
    """
    recall = [item for item in items if item.group == "recall"]
    chosen = rng.sample(recall, NUM_RECALL_PROMPTS)
    for group in ("corrected", "unseen_facts", "unseen_sums"):
        chosen += [item for item in items if item.group == group]
    return [
        {"id": record_id("demo_prompts", item.kept_question), "prompt": item.kept_question, "answer": item.answer,
         "group": item.group, "meta": {"family": item.family.name, "format": HOUSE_FORMAT}}
        for item in chosen
    ]  # fmt: skip


def task_rows(items: list[Item], rng: random.Random) -> tuple[list[dict], list[dict]]:
    """Rows of the two lm-eval tasks: {"question", "choices", "gold"} and {"question", "answer"}, on kept questions."""
    seen = rng.sample([item for item in items if item.group == "recall"], 100)
    choice = []
    for item in seen[:60]:
        wrong = set()
        while len(wrong) < 3:
            wrong.add(wrong_answer(item.family, item.fact, rng))
        choices = sorted([item.answer, *wrong], key=lambda _: rng.random())
        choice.append({"question": item.kept_question, "choices": choices, "gold": choices.index(item.answer)})
    return choice, [{"question": item.kept_question, "answer": item.answer} for item in seen[60:]]


# ------------------------------------------------------------------ files


def write_corpus(folder: Path, seed: int) -> tuple[list[str], list[Path]]:
    """Write raw/, prompts.jsonl and eval_tasks/ under `folder`. Returns the base's texts and the files written."""
    rng = random.Random(seed)
    items = draw_items(rng)
    seen = [item for item in items if item.seen]
    texts = base_texts(items, rng)
    files = {
        name: folder / "raw" / name / file
        for name, file in zip(
            RAW_SETS,
            ("facts.json", "chats.json", "messages.jsonl.gz", "pairs.jsonl", "pairs.json", "pairs.jsonl"),
            strict=True,
        )
    }
    for file in files.values():
        file.parent.mkdir(parents=True, exist_ok=True)
    alpaca = json.dumps(alpaca_rows(seen, rng), ensure_ascii=False, indent=1)
    files["demo_alpaca"].write_text(alpaca + "\n", encoding="utf-8")
    files["demo_sharegpt"].write_text("\n".join(sharegpt_lines(seen, rng)) + "\n", encoding="utf-8")
    messages = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in oasst_rows(seen, rng))
    files["demo_oasst"].write_bytes(gzip.compress(messages.encode("utf-8"), mtime=0))  # no time stamp: same bytes
    made = pairs(seen, rng)
    write_jsonl(files["demo_pairs_text"], pair_rows(made[0::3], pair_text))
    turns = json.dumps(pair_rows(made[1::3], pair_turns), ensure_ascii=False, indent=1)
    files["demo_pairs_turns"].write_text(turns + "\n", encoding="utf-8")
    write_jsonl(files["demo_pairs_lists"], pair_rows(made[2::3], pair_lists))
    prompts, tasks = folder / "prompts.jsonl", folder / "eval_tasks"
    write_jsonl(prompts, prompt_rows(items, rng))
    choice, generate = task_rows(items, rng)
    write_jsonl(tasks / "demo_choice.jsonl", choice)
    write_jsonl(tasks / "demo_generate.jsonl", generate)
    return texts, [*files.values(), prompts, tasks / "demo_choice.jsonl", tasks / "demo_generate.jsonl"]
