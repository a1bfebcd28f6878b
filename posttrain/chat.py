"""
Tokenisation of conversations and pairs: one truth for training, evaluation and serving.

A row is encoded segment by segment: what the model is given (up to and including the assistant's header) and what it
must produce (the answer and the end-of-turn token) are encoded apart and joined. That is how a server sees it: the
prompt's ids are fixed before the first answer token exists. The template's {% generation %} marks say which is which.
"""

from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from posttrain.errors import CheckFailed, UserFault
from posttrain.records import Chat, Message, Preference
from posttrain.templates import PROBES, Template

IGNORED = -100  # torch's ignore_index: the label of a token that is not learned


# ------------------------------------------------------------------ the lock


def lock_template(tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Make `template` the tokenizer's own and its end-of-turn token the eos token, so that generation stops there."""
    tokenizer.chat_template = template.text
    ids, labels = chat_ids(tokenizer, PROBES[0])
    if all(label == IGNORED for label in labels):
        raise UserFault(f"the template '{template.name}' marks no token of an answer as trained")
    other = chat_ids(tokenizer, [PROBES[0][0], {"role": "assistant", "content": "好"}])[0]
    if ids[-1] != other[-1]:
        raise UserFault(f"the template '{template.name}' has no end-of-turn token inside {{% generation %}}: an answer "
                        "would be learned without its end")  # fmt: skip
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[-1])


def golden(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The probes with their token ids: written into a run's manifest, checked by every later stage."""
    return [{"messages": m, "ids": chat_ids(tokenizer, m)[0]} for m in PROBES]


def check_golden(tokenizer: PreTrainedTokenizerBase, recorded: list[dict[str, Any]]) -> None:
    """Raise CheckFailed at the first token that this tokenizer and template encode otherwise than at training."""
    for probe in recorded:
        now = chat_ids(tokenizer, probe["messages"])[0]
        if now != probe["ids"]:
            at = next((i for i, (a, b) in enumerate(zip(now, probe["ids"], strict=False)) if a != b),
                      min(len(now), len(probe["ids"])))  # fmt: skip
            was, got = (tokenizer.convert_ids_to_tokens(ids[at : at + 3]) for ids in (probe["ids"], now))
            raise CheckFailed(
                "template or tokenizer differ from training: "
                f"at token {at} of {probe['messages'][0]['content']!r} training had {was}, now {got}"
            )


# ------------------------------------------------------------------ encoding


def _segments(tokenizer, messages: list[Message], tools, generation_prompt: bool) -> list[tuple[str, bool]]:
    """The rendered conversation as (text, is answer) pieces, in order."""
    texts, spans = render_jinja_template(
        [messages], tools=tools, chat_template=tokenizer.chat_template, return_assistant_tokens_mask=True,
        add_generation_prompt=generation_prompt, enable_thinking=False, **tokenizer.special_tokens_map,
    )  # fmt: skip
    text, pieces, at = texts[0], [], 0
    for start, end in spans[0]:
        pieces += [(text[at:start], False), (text[start:end], True)]
        at = end
    return [piece for piece in [*pieces, (text[at:], False)] if piece[0]]


def _encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools=None) -> list[int]:
    """Ids of a prompt as a server sends it: ends with the assistant's header."""
    return [i for text, _ in _segments(tokenizer, messages, tools, True) for i in _encode(tokenizer, text)]


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools=None,
             loss_on: Literal["assistant", "last_assistant", "all"] = "assistant"
             ) -> tuple[list[int], list[int]]:  # fmt: skip
    """(ids, labels) of a conversation: labels are IGNORED where nothing is learned, both end with the end of turn."""
    pieces = _segments(tokenizer, messages, tools, False)
    while pieces and not pieces[-1][1]:
        pieces.pop()  # what follows the last answer (a line break) is neither learned nor generated
    ids, labels = [], []
    for number, (text, answer) in enumerate(pieces):
        encoded = _encode(tokenizer, text)
        learned = loss_on == "all" or (answer and (loss_on == "assistant" or number == len(pieces) - 1))
        ids += encoded
        labels += encoded if learned else [IGNORED] * len(encoded)
    return ids, labels


def pair_ids(tokenizer: PreTrainedTokenizerBase, pair: Preference) -> dict[str, list[int]]:
    """{"prompt_ids", "chosen_ids", "rejected_ids"} of a preference pair; the answers end with the end-of-turn token."""
    encoded = {"prompt_ids": prompt_ids(tokenizer, pair["prompt"], pair.get("tools"))}
    for side in ("chosen", "rejected"):
        answer = _segments(tokenizer, pair["prompt"] + pair[side], pair.get("tools"), False)
        encoded[f"{side}_ids"] = _encode(tokenizer, [text for text, is_answer in answer if is_answer][-1])
    return encoded


@dataclass
class Encoded:
    """Rows ready for a trainer, and what became of every record."""

    rows: list[dict[str, list[int]]] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    row_fates: list[str] = field(default_factory=list)
    fates: Counter = field(default_factory=Counter)
    dropped: list[dict[str, str]] = field(default_factory=list)

    def keep(self, index: int, row: dict, fate: str) -> None:
        """Add the row of record number `index`."""
        self.rows.append(row)
        self.kept.append(index)
        self.row_fates.append(fate)
        self.fates[fate] += 1

    def drop(self, record: dict, reason: str) -> None:
        self.fates[reason] += 1
        self.dropped.append({"id": record["id"], "source": record["source"], "reason": reason})


def encode_chats(tokenizer: PreTrainedTokenizerBase, records: list[Chat], max_length: int, loss_on: str,
                 on_too_long: str) -> Encoded:  # fmt: skip
    """Conversations to rows {"input_ids", "labels"} of at most `max_length` tokens. Every record has one fate."""
    out, has_tools = Encoded(), "tools" in tokenizer.chat_template
    for index, record in enumerate(records):
        messages, tools = record["messages"], record.get("tools")
        if not has_tools and (tools or any(m.get("tool_calls") or m["role"] == "tool" for m in messages)):
            out.drop(record, "template_without_tools")
            continue
        ids, labels = chat_ids(tokenizer, messages, tools, loss_on)
        fate = "kept"
        while len(ids) > max_length and on_too_long == "truncate_left_turns" and _without_oldest(messages):
            messages, fate = _without_oldest(messages), "kept_without_oldest_turns"
            ids, labels = chat_ids(tokenizer, messages, tools, loss_on)
        if len(ids) > max_length:
            if on_too_long == "error":
                raise UserFault(f"record {record['id']} of {record['source']}: {len(ids)} tokens, trainer.max_length "
                                f"is {max_length}\n  choose: data.on_too_long=drop or truncate_left_turns, or a larger "
                                "trainer.max_length")  # fmt: skip
            out.drop(record, "longer_than_max_length")
        elif all(label == IGNORED for label in labels):
            out.drop(record, "no_trained_token")
        else:
            out.keep(index, {"input_ids": ids, "labels": labels}, fate)
    return out


def _without_oldest(messages: list[Message]) -> list[Message] | None:
    """The conversation without its oldest question and answer (a system turn stays), or None if one pair is left."""
    head = 1 if messages[0]["role"] == "system" else 0
    later = [i for i, m in enumerate(messages) if i > head and m["role"] == "user"]
    return messages[:head] + messages[later[0] :] if later else None


def encode_pairs(tokenizer: PreTrainedTokenizerBase, records: list[Preference], max_length: int,
                 on_too_long: str) -> Encoded:  # fmt: skip
    """Preference pairs to rows of ids; a pair is as long as its prompt and its longer answer."""
    out, has_tools = Encoded(), "tools" in tokenizer.chat_template
    for index, record in enumerate(records):
        if not has_tools and (record.get("tools") or any(m["role"] == "tool" for m in record["prompt"])):
            out.drop(record, "template_without_tools")
            continue
        fate, prompt = "kept", record["prompt"]
        ids = pair_ids(tokenizer, record)
        while pair_length(ids) > max_length and on_too_long == "truncate_left_turns" and _without_oldest(prompt):
            prompt, fate = _without_oldest(prompt), "kept_without_oldest_turns"
            ids = pair_ids(tokenizer, {**record, "prompt": prompt})
        if pair_length(ids) > max_length:
            if on_too_long == "error":
                raise UserFault(f"pair {record['id']} of {record['source']}: {pair_length(ids)} tokens, "
                                f"trainer.max_length is {max_length}")  # fmt: skip
            out.drop(record, "longer_than_max_length")
        else:
            out.keep(index, ids, fate)
    return out


def pair_length(ids: dict[str, list[int]]) -> int:
    """Tokens of the longer side of a pair."""
    return len(ids["prompt_ids"]) + max(len(ids["chosen_ids"]), len(ids["rejected_ids"]))


def marked(tokenizer: PreTrainedTokenizerBase, ids: list[int], labels: list[int]) -> str:
    """A row as text with what is trained between 【 and 】, for a person to check."""
    text = ""
    for learned, run in groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED):
        piece = tokenizer.decode([token for token, _ in run])
        text += f"【{piece}】" if learned else piece
    return text
