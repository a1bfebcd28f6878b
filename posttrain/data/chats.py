"""
Chat formats: a row of a public instruction set -> conversations, as drafts {messages, tools?, meta?}.

Each function reads one layout and raises Unusable for a row of it that cannot be used. Which function reads which row
is decided in sources.py.
"""

import re
from typing import Any

from posttrain.data.turns import (
    Unusable,
    earlier_turns,
    excerpt,
    from_json,
    joined_question,
    messages,
    system_turn,
    text_in,
    tools_of,
    with_reasoning,
)

QUESTIONS = ("instruction", "prompt", "question", "query", "problem", "input")
ANSWERS = ("output", "response", "completion", "answer", "target", "std_answer", "solution")
CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog")
_MORE_COLUMNS = frozenset(("system", "system_prompt", "history", "context", "reasoning", "reasoning_content",
                           "thinking", "tools", "functions"))  # fmt: skip
_MOSS_MARK = re.compile(r"^\s*<\|[A-Za-z ]+\|>:\s*|\s*<eo[a-z]>\s*$")


def first_of(row: dict, names: tuple[str, ...]) -> str | None:
    """The first of these columns that the row has and that is not null."""
    for name in names:
        if row.get(name) is not None:
            return name
    return None


def turns(question: list[dict] | str, answer: str) -> list[dict]:
    """A question (its turns, or one text) and its answer as a conversation."""
    asked = [{"role": "user", "content": question}] if isinstance(question, str) else question
    return [*asked, {"role": "assistant", "content": answer}]


def question_turns(row: dict) -> list[dict]:
    """System turn, history and question of a row with a column for the question, `input` and `context` joined to it.

    A question that is itself a list of messages is taken as that list.
    """
    name = first_of(row, QUESTIONS)
    if name is None:
        raise Unusable("missing_column", f"no question: none of {', '.join(QUESTIONS)} in {sorted(map(str, row))}")
    if isinstance(row[name], list) and not all(isinstance(part, dict) and "type" in part for part in row[name]):
        return messages(row[name], name)
    asked = row[name]
    for extra in ("input", "context"):
        if extra != name and row.get(extra) is not None:
            asked = joined_question(asked, row[extra])
    return [*earlier_turns(row), {"role": "user", "content": text_in(asked, name)}]


def alpaca(row: dict, options: dict) -> list[dict]:
    """instruction, input, output, with system and history; prompt/completion, prompt/response, question/answer and the
    like. A `reasoning` column goes before the answer between think tags."""
    asked, answer = row.get("instruction"), row.get("output")
    if type(asked) is str and type(answer) is str and _MORE_COLUMNS.isdisjoint(row):  # the plain case, for speed
        return [{"messages": [{"role": "user", "content": joined_question(asked, row.get("input"))},
                              {"role": "assistant", "content": answer}]}]  # fmt: skip
    name = first_of(row, ANSWERS if first_of(row, QUESTIONS) != "input" else ANSWERS[1:] + ANSWERS[:1])
    if name is None:
        raise Unusable("missing_column", f"no answer: none of {', '.join(ANSWERS)} in {sorted(map(str, row))}")
    asked = question_turns(row)
    if isinstance(row[name], list) and not all(isinstance(part, dict) and "type" in part for part in row[name]):
        return [{"messages": asked + messages(row[name], name), "tools": tools_of(row)}]
    answer = text_in(row[name], name)
    reasoning = row.get(first_of(row, ("reasoning", "reasoning_content", "thinking")))
    answer = with_reasoning(reasoning, answer) if isinstance(reasoning, str) else answer
    return [{"messages": turns(asked, answer), "tools": tools_of(row)}]


def chat(row: dict, options: dict) -> list[dict]:
    """messages or conversations: ShareGPT, OpenAI, Firefly, LIMA, XTuner, with tools and a system column."""
    name = first_of(row, CHATS)
    found = messages(row.get(name), name or "messages")
    if not found:
        raise Unusable("no_turns", f"{name} is {excerpt(row.get(name))}")
    if found[0]["role"] != "system":
        found = system_turn(row) + found
    # COIG and some ShareGPT dumps: an instruction that stands over the whole chat
    if isinstance(row.get("instruction"), str) and row["instruction"].strip() and found[0]["role"] == "user":
        found[0]["content"] = joined_question(row["instruction"], found[0]["content"])
    return [{"messages": found, "tools": tools_of(row)}]


def turn_list(row: Any, options: dict) -> list[dict]:
    """A row that is itself a list: of turns (SMILE), or of strings in turn."""
    return [{"messages": messages(row, "the row")}]


def exam(row: dict, options: dict) -> list[dict]:
    """COIG exam and value questions: textbox_q_instruction, _q_context, _question, _answer, _answer_analysis."""
    names = ("textbox_q_instruction", "textbox_q_context", "textbox_question")
    asked = [text_in(row[name], name).strip() for name in names if row.get(name)]
    answer = text_in(row.get("textbox_answer"), "textbox_answer").strip()
    analysis = text_in(row.get("textbox_answer_analysis") or "", "textbox_answer_analysis").strip()
    # The analysis argues to the answer; where it does not name it, the answer is put first.
    answer = analysis if analysis and answer in analysis else "\n".join(part for part in (answer, analysis) if part)
    return [{"messages": turns("\n".join(part for part in asked if part), answer)}]


def translated(row: dict, options: dict) -> list[dict]:
    """COIG translated instructions: trans_instruction, trans_input, trans_output beside the English original."""
    asked = joined_question(row.get("trans_instruction"), row.get("trans_input"))
    return [{"messages": turns(asked, text_in(row.get("trans_output"), "trans_output"))}]


def rounds(row: dict, options: dict) -> list[dict]:
    """COIG counterfactual chats: round_0 ... with `response` holding {"Q": ..., "A": ...} as JSON text."""
    found = []
    for number in range(len(row)):
        said = row.get(f"round_{number}")
        if not said:
            break
        pair = from_json(said.get("response") if isinstance(said, dict) else said, "round")
        if not isinstance(pair, dict):
            raise Unusable("round_is_not_a_mapping", excerpt(said))
        found += turns(text_in(pair.get("Q"), "Q"), text_in(pair.get("A"), "A"))
    return [{"messages": found}]


def moss(row: dict, options: dict) -> list[dict]:
    """MOSS: chat {turn_1: {Human, MOSS, ...}}, the marks of each turn taken off; plug-in turns are refused."""
    found = []
    chat_of = row["chat"]
    for number in range(1, len(chat_of) + 1):
        turn = chat_of.get(f"turn_{number}")
        if not isinstance(turn, dict):
            raise Unusable("turn_is_not_a_mapping", f"turn_{number} is {excerpt(turn)}")
        commands = _MOSS_MARK.sub("", _MOSS_MARK.sub("", str(turn.get("Commands") or "None")))
        if commands.strip().rstrip("\n") not in ("None", "无", ""):
            raise Unusable("plugin_turn", excerpt(commands))
        human, answer = (text_in(turn.get(key), key) for key in ("Human", "MOSS"))
        found += turns(*(_MOSS_MARK.sub("", _MOSS_MARK.sub("", text)) for text in (human, answer)))
    return [{"messages": found}]


def instances(row: dict, options: dict) -> list[dict]:
    """Self-Instruct seeds: an instruction with several {input, output} instances, each a conversation."""
    listed = row["instances"]
    if not isinstance(listed, list) or not listed:
        raise Unusable("no_turns", f"instances is {excerpt(listed)}")
    drafts = []
    for one in listed:
        if not isinstance(one, dict):
            raise Unusable("instance_is_not_a_mapping", excerpt(one))
        asked = joined_question(row.get("instruction"), one.get("input"))
        drafts.append({"messages": turns(asked, text_in(one.get("output"), "output"))})
    return drafts
