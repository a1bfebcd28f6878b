"""
Tokenisation of conversations and pairs: one truth for training, evaluation and serving.

A row is encoded segment by segment: what the model is given (up to and including the assistant's header) and what it
must produce (the answer and the end-of-turn token) are encoded apart and joined. That is how a server sees it: the
prompt's ids are fixed before the first answer token exists. rendering.py says which is which.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from posttrain.errors import CheckFailed, UserFault
from posttrain.records import Chat, Message, Preference
from posttrain.rendering import Segment, segments, token_text
from posttrain.templates import GOLDEN, PROBES, TOOL, TOOL_PROBE, Template, called

IGNORED = -100  # torch's ignore_index: the label of a token that is not learned


# ------------------------------------------------------------------ the lock


def lock_template(tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Make `template` the tokenizer's own and its end-of-turn token the eos token, so that generation stops there.

    Raises UserFault where a row would begin otherwise than what a server sends.
    """
    tokenizer.chat_template, tokenizer.eos_token = template.text, template.end
    ids, prompt = chat_ids(tokenizer, PROBES[0])[0], prompt_ids(tokenizer, PROBES[0][:1])
    if ids[: len(prompt)] != prompt:
        raise UserFault(f"{called(template.name)} trains on {tokenizer.decode(ids[: len(prompt)])!r} where a "
                        f"server sends {tokenizer.decode(prompt)!r}: its {{% generation %}} mark begins at the wrong "
                        "place, or add_generation_prompt adds another header")  # fmt: skip


def golden(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Known conversations with their token ids: written into a run's manifest, checked by every later stage. Those that
    the template refuses (a system turn in Gemma's) are recorded without ids."""
    recorded: list[dict[str, Any]] = [{"name": name, "messages": messages} for name, messages in GOLDEN.items()]
    if "tools" in tokenizer.chat_template:
        recorded.append({"name": "tools", "messages": TOOL_PROBE, "tools": [TOOL]})
    return [probe | {"ids": _golden_ids(tokenizer, probe)} for probe in recorded]


def _golden_ids(tokenizer, probe: dict[str, Any]) -> list[int] | None:
    try:
        return chat_ids(tokenizer, probe["messages"], probe.get("tools"))[0]
    except TemplateError:
        return None


def check_golden(tokenizer: PreTrainedTokenizerBase, recorded: list[dict[str, Any]]) -> None:
    """Raise CheckFailed at the first token that this tokenizer and template encode otherwise than at training."""
    for number, probe in enumerate(recorded, 1):
        was, now = probe["ids"], _golden_ids(tokenizer, probe)
        if now == was:
            continue
        name = probe.get("name") or probe["messages"][0]["content"]
        where = f"golden conversation {number} of {len(recorded)} ({name})"
        if was is None or now is None:
            found = f"{where} was {'refused' if was is None else 'encoded'} by the template, now it is not"
        else:
            at = next((i for i, (a, b) in enumerate(zip(now, was, strict=False)) if a != b), min(len(now), len(was)))
            same = tokenizer.decode(was[max(0, at - 8) : at])
            found = (f"{where}, token {at}, after {same!r}: training had {_one(tokenizer, was, at)}, now it is "
                     f"{_one(tokenizer, now, at)}")  # fmt: skip
        raise CheckFailed(
            f"template or tokenizer differ from training: {found}\n"
            f"  the model would be asked otherwise than it was trained. Read from: {tokenizer.name_or_path}\n"
            "  put back tokenizer.json, tokenizer_config.json and chat_template.jinja as the run wrote them (its "
            "checkpoints\n  hold copies), use the versions of transformers and tokenizers of its manifest.json, or "
            "train again"
        )


def _one(tokenizer, ids: list[int], at: int) -> str:
    return f"{ids[at]} {token_text(tokenizer, ids[at])}" if at < len(ids) else "the end"


# ------------------------------------------------------------------ encoding


def _segments(tokenizer, messages: list[Message], tools, generation_prompt: bool) -> list[Segment]:
    """The rendered conversation as (text, is answer) pieces, in order."""
    return segments(tokenizer, tokenizer.chat_template, messages, tools, generation_prompt)


def _encode(tokenizer, rows: list[list[str]], known: dict[str, list[int]] | None = None) -> list[list[list[int]]]:
    """Ids of the pieces of many rows, in one call: a call for each piece takes twice as long. `known`: texts that were
    encoded before; grows.

    Sentencepiece vocabularies put a space before what they take for the beginning of a text, so a piece that stands
    behind another is encoded behind a special token there, which is cut off again.
    """
    before, known = tokenizer.eos_token if _puts_a_space(tokenizer) else "", {} if known is None else known
    texts = [[before + text if number else text for number, text in enumerate(pieces)] for pieces in rows]
    new = list(dict.fromkeys(text for pieces in texts for text in pieces if text not in known))
    if new:
        encoded = tokenizer(new[:1] if tokenizer.is_fast else new, add_special_tokens=False)["input_ids"]
        if tokenizer.is_fast:  # the call above took back truncation, padding and special tokens read as text
            batch = tokenizer.backend_tokenizer.encode_batch_fast(new[1:], add_special_tokens=False)
            encoded += [encoding.ids for encoding in batch]
        known.update(zip(new, encoded, strict=True))
    return [[known[text][1 if before and number else 0 :] for number, text in enumerate(pieces)] for pieces in texts]


@lru_cache(maxsize=8)
def _puts_a_space(tokenizer) -> bool:
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0]
    return first.startswith("▁") and tokenizer.eos_token is not None


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools=None) -> list[int]:
    """Ids of a prompt as a server sends it: ends with the assistant's header."""
    texts = [text for text, _ in _segments(tokenizer, messages, tools, True)]
    return [i for ids in _encode(tokenizer, [texts])[0] for i in ids]


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools=None,
             loss_on: Literal["assistant", "last_assistant", "all"] = "assistant",
             known: dict[str, list[int]] | None = None) -> tuple[list[int], list[int]]:  # fmt: skip
    """(ids, labels) of a conversation: labels are IGNORED where nothing is learned, both end with the end of turn."""
    pieces = _chat_pieces(tokenizer, messages, tools)
    return _labelled(pieces, _encode(tokenizer, [[text for text, _ in pieces]], known)[0], loss_on)


def _chat_pieces(tokenizer, messages: list[Message], tools) -> list[Segment]:
    pieces = _segments(tokenizer, messages, tools, False)
    while pieces and not pieces[-1][1]:
        pieces.pop()  # what follows the last answer (a line break) is neither learned nor generated
    return pieces


def _labelled(pieces: list[Segment], encoded: list[list[int]], loss_on: str) -> tuple[list[int], list[int]]:
    ids, labels = [], []
    for number, ((_, answer), part) in enumerate(zip(pieces, encoded, strict=True)):
        learned = loss_on == "all" or (answer and (loss_on == "assistant" or number == len(pieces) - 1))
        ids += part
        labels += part if learned else [IGNORED] * len(part)
    return ids, labels


def pair_ids(tokenizer: PreTrainedTokenizerBase, pair: Preference) -> dict[str, list[int]]:
    """{"prompt_ids", "chosen_ids", "rejected_ids"} of a preference pair; the answers end with the end-of-turn token."""
    return _pair_row(_encode(tokenizer, [_pair_pieces(tokenizer, pair)])[0])


def _pair_pieces(tokenizer, pair: Preference) -> list[str]:
    """The pieces of the prompt, then the chosen and the rejected answer."""
    pieces = [text for text, _ in _segments(tokenizer, pair["prompt"], pair.get("tools"), True)]
    for side in ("chosen", "rejected"):
        shown = _segments(tokenizer, pair["prompt"] + pair[side], pair.get("tools"), False)
        pieces.append([text for text, is_answer in shown if is_answer][-1])
    return pieces


def _pair_row(encoded: list[list[int]]) -> dict[str, list[int]]:
    *prompt, chosen, rejected = encoded
    return {"prompt_ids": [i for ids in prompt for i in ids], "chosen_ids": chosen, "rejected_ids": rejected}


BATCH = 1000  # records encoded in one call


def _lacks_tools(tokenizer, record: dict) -> bool:
    """Whether a record calls tools, of which the template knows nothing."""
    messages = record.get("messages") or record["prompt"]
    calls = record.get("tools") or any(m.get("tool_calls") or m["role"] == "tool" for m in messages)
    return bool(calls) and "tools" not in tokenizer.chat_template


def _batches(tokenizer, records: list[dict], pieces_of: Callable[[dict], list]) -> Iterator[list[list | None]]:
    """The pieces of BATCH records at a time; None where the template refuses a record, or knows no tools."""
    for start in range(0, len(records), BATCH):
        pieces = []
        for record in records[start : start + BATCH]:
            try:
                pieces.append(None if _lacks_tools(tokenizer, record) else pieces_of(record))
            except TemplateError:  # a system turn in Gemma's template, two questions in a row in Mistral's
                pieces.append(None)
        yield pieces


def _encoded_chats(tokenizer, records: list[Chat], loss_on: str) -> Iterator[tuple[list[int], list[int]] | None]:
    """(ids, labels) of each conversation at its full length, or None where the template refuses it."""
    for batch in _batches(tokenizer, records, lambda r: _chat_pieces(tokenizer, r["messages"], r.get("tools"))):
        encoded = iter(_encode(tokenizer, [[text for text, _ in pieces] for pieces in batch if pieces is not None]))
        yield from (None if pieces is None else _labelled(pieces, next(encoded), loss_on) for pieces in batch)


def _encoded_pairs(tokenizer, records: list[Preference]) -> Iterator[dict[str, list[int]] | None]:
    """The row of each pair at its full length, or None where the template refuses it."""
    for batch in _batches(tokenizer, records, lambda r: _pair_pieces(tokenizer, r)):
        encoded = iter(_encode(tokenizer, [pieces for pieces in batch if pieces is not None]))
        yield from (None if pieces is None else _pair_row(next(encoded)) for pieces in batch)


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
    out = Encoded()
    for index, (record, row) in enumerate(zip(records, _encoded_chats(tokenizer, records, loss_on), strict=True)):
        messages, tools = record["messages"], record.get("tools")
        if _lacks_tools(tokenizer, record):
            out.drop(record, "template_without_tools")
            continue
        fate, known = "kept", {}
        try:
            while row and len(row[0]) > max_length and on_too_long == "truncate_left_turns" and (
                    shorter := _without_oldest(messages)):  # fmt: skip
                messages, fate = shorter, "kept_without_oldest_turns"
                row = chat_ids(tokenizer, messages, tools, loss_on, known)
        except TemplateError:
            row = None
        if row is None:
            out.drop(record, "refused_by_template")
            continue
        ids, labels = row
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
    out = Encoded()
    for index, (record, ids) in enumerate(zip(records, _encoded_pairs(tokenizer, records), strict=True)):
        if _lacks_tools(tokenizer, record):
            out.drop(record, "template_without_tools")
            continue
        fate, prompt = "kept", record["prompt"]
        try:
            while ids and pair_length(ids) > max_length and on_too_long == "truncate_left_turns" and (
                    shorter := _without_oldest(prompt)):  # fmt: skip
                prompt, fate = shorter, "kept_without_oldest_turns"
                ids = pair_ids(tokenizer, {**record, "prompt": prompt})
        except TemplateError:
            ids = None
        if ids is None:
            out.drop(record, "refused_by_template")
            continue
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
