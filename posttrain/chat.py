"""
Chat template and tokenisation: one truth for training, evaluation and serving.

A row is encoded segment by segment: what the model is given (up to and including the assistant's header) and what it
must produce (the answer and the end-of-turn token) are encoded apart and joined. That is how a server sees it: the
prompt's ids are fixed before the first answer token exists. `{% generation %}` marks in the template say which is which.
"""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from posttrain.config import in_project
from posttrain.errors import CheckFailed, UserFault
from posttrain.records import Chat, Message, Preference

IGNORED = -100  # torch's ignore_index: the label of a token that is not learned
MARK = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")

_TURNS = """
{%- if system is not none %}{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}{%- endif %}
{%- for turn in turns %}
{{- '<|im_start|>' + turn.role + '\\n' }}
{%- if turn.role == 'assistant' %}{% generation %}{{- turn.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{- turn.content + '<|im_end|>' }}{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# The Hermes form of tools, as Qwen2.5 and Qwen3 publish it: signatures in the system turn, calls and responses in tags.
_TOOL_TURNS = """
{%- if tools %}
{%- set system = (system + '\\n\\n' if system is not none else '') + '# Tools\\n\\nYou may call one or more functions to assist
 with the user query.\\n\\nYou are provided with function signatures within <tools></tools> XML tags:\\n<tools>' %}
{%- set lines = namespace(text='') %}
{%- for tool in tools %}{%- set lines.text = lines.text + '\\n' + (tool | tojson) %}{%- endfor %}
{%- set system = system + lines.text + '\\n</tools>\\n\\nFor each function call, return a json object with function name
 and arguments within <tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments":
 <args-json-object>}\\n</tool_call>' %}
{%- endif %}
{%- if system is not none %}{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}{%- endif %}
{%- for turn in turns %}
{%- if turn.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}{% generation %}{{- turn.content }}
{%- for call in turn.tool_calls or [] %}
{%- set call = call.function or call %}
{{- ('\\n' if turn.content or not loop.first else '') + '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
{{- (call.arguments if call.arguments is string else call.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}
{%- elif turn.role == 'tool' %}
{{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' else '' }}
{{- '\\n<tool_response>\\n' + turn.content + '\\n</tool_response>' }}
{{- '<|im_end|>\\n' if loop.last or loop.nextitem.role != 'tool' else '' }}
{%- else %}{{- '<|im_start|>' + turn.role + '\\n' + turn.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def _chatml(default_system: str | None, body: str) -> str:
    """A ChatML template; `default_system` is said where a conversation has no system turn of its own."""
    default = "none" if default_system is None else f"'{default_system}'"
    return (
        "{%- set system = messages[0].content if messages[0].role == 'system' else " + default + " %}"
        "{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}" + body.replace("\n ", " ")
    )  # fmt: skip


# Qwen3's hybrid models, thinking off: the empty think block belongs to the prompt of the turn being answered, and
# earlier answers are shown without it; so only the last answer can be learned as it is served.
_QWEN3_THINKING_OFF = _chatml(None, _TOOL_TURNS).replace(
    "{{- '<|im_start|>assistant\\n' }}{% generation %}{{- turn.content }}",
    "{{- '<|im_start|>assistant\\n' }}{%- if loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{% generation %}{{- turn.content }}",
).replace("{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}",
          "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}")  # fmt: skip

QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
TEMPLATES = {
    "chatml": _chatml(None, _TURNS),
    "chatml_tools": _chatml(None, _TOOL_TURNS),  # = Qwen3-Instruct-2507
    "qwen2": _chatml("You are a helpful assistant.", _TURNS),
    "qwen2.5": _chatml(QWEN25_SYSTEM, _TOOL_TURNS),
    "qwen3_thinking_off": _QWEN3_THINKING_OFF,
}

_USER, _ANSWER = {"role": "user", "content": "北京在哪里？"}, {"role": "assistant", "content": "在中国北方。\n\nYes."}
_SYSTEM = {"role": "system", "content": "请简短回答。"}
_CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}]}  # fmt: skip
_TOOL = {"type": "function", "function": {"name": "weather", "description": "天气", "parameters": {"type": "object"}}}
PROBES: list[list[Message]] = [
    [_USER, _ANSWER],
    [_SYSTEM, _USER, _ANSWER],
    [_USER, _ANSWER, {"role": "user", "content": " x² + 1，\t再说一遍\n"}, _ANSWER],
]
TOOL_PROBE = [_USER, _CALL, {"role": "tool", "content": '{"t": 3}'}, _ANSWER]


@dataclass(frozen=True)
class Template:
    """The template of a run: where it comes from, its text with marks, and what it says unasked."""

    name: str
    text: str
    injects: str | None


# ------------------------------------------------------------------ choosing and locking a template


def choose_template(tokenizer: PreTrainedTokenizerBase, asked: str) -> Template:
    """The training template. `auto` takes the tokenizer's own if it has marks, or ours if it renders the same text.

    Raises UserFault where no template with marks can be had, naming the choices.
    """
    own = tokenizer.chat_template
    choices = f"model.chat_template: {', '.join(TEMPLATES)}, or a .jinja file with {{% generation %}} marks"
    if asked == "auto" and own is None:
        raise UserFault(f"the tokenizer has no chat template\n  choices for {choices}")
    if asked == "auto" and MARK.search(own):
        name, text = "tokenizer", own
    elif asked == "auto":
        name = next((n for n, text in TEMPLATES.items() if _renders_alike(tokenizer, text, own)), None)
        if name is None:
            raise UserFault(
                "the tokenizer's chat template has no {% generation %} marks, so which tokens are the answer is unknown,"
                f" and it renders unlike every template known here\n  choices for {choices}\n"
                "  or put {% generation %} ... {% endgeneration %} around the answer in a copy of it (docs/troubleshooting.md)"
            )
        text = TEMPLATES[name]
    elif asked in TEMPLATES:
        name, text = asked, TEMPLATES[asked]
    elif asked.endswith(".jinja"):
        file = in_project(Path(asked))
        if not file.is_file():
            raise UserFault(f"model.chat_template: {asked} is not there\n  choices for {choices}")
        name, text = asked, file.read_text(encoding="utf-8")
        if not MARK.search(text):
            raise UserFault(f"{asked}: has no {{% generation %}} marks, so which tokens are the answer is unknown\n"
                            f"  choices for {choices}")  # fmt: skip
    else:
        raise UserFault(f"model.chat_template: {asked!r} is not known\n  choices for {choices}")
    unknown = [t for t in set(re.findall(r"<\|[a-z_]+\|>", text)) if t not in tokenizer.get_vocab()]
    if unknown:
        raise UserFault(f"the template '{name}' uses {', '.join(sorted(unknown))}, unknown to this tokenizer\n"
                        f"  choices for {choices}")  # fmt: skip
    return Template(name, text, _injected(tokenizer, text))


def _render(tokenizer, text: str, messages: list[Message], tools=None, generation_prompt=False) -> str:
    return tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=text, tokenize=False, add_generation_prompt=generation_prompt,
        enable_thinking=False,
    )  # fmt: skip


def _renders_alike(tokenizer, ours: str, theirs: str) -> bool:
    """Whether two templates give the same text on the probes: whole conversations, prompts, and tools if they know them."""
    knows_tools = "tools" in theirs
    if knows_tools != ("tools" in ours):
        return False
    try:
        for messages in PROBES:
            for given, generation_prompt in ((messages, False), (messages[:-1], True)):
                a, b = (_render(tokenizer, t, given, None, generation_prompt) for t in (ours, theirs))
                if a != b:
                    return False
        if knows_tools:
            a, b = (_render(tokenizer, t, TOOL_PROBE, [_TOOL]) for t in (ours, theirs))
            return a == b
    except Exception:  # jinja raises what the template's author chose; such a template is not alike
        return False
    return True


def _injected(tokenizer, text: str) -> str | None:
    """What a template says that nobody wrote: a default system turn, an empty think block."""
    bare = _render(tokenizer, text, [{"role": "user", "content": "@"}], None, True)
    before = bare.split("@")[0]
    found = [before.rpartition("<|im_start|>")[0] or before] if "system" in before else []
    found += ["<think></think>"] if "<think>" in bare else []
    return " and ".join(found).strip() or None


def lock_template(tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Make `template` the tokenizer's own and its end-of-turn token the eos token, so that generation stops there."""
    tokenizer.chat_template = template.text
    ids, labels = chat_ids(tokenizer, PROBES[0])
    if all(label == IGNORED for label in labels):
        raise UserFault(f"the template '{template.name}' marks no token of an answer as trained")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[-1])


def serving_template(text: str) -> str:
    """The template without marks, for servers that do not know them; renders the same text."""
    return MARK.sub(lambda m: ("{#-" if m[0].startswith("{%-") else "{#") + (" -#}" if m[0].endswith("-%}") else " #}"), text)


def template_sha(text: str) -> str:
    """SHA-256 of a template as it is served."""
    return hashlib.sha256(serving_template(text).encode()).hexdigest()


def golden(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The probes with their token ids: written into a run's manifest, checked by every later stage."""
    return [{"messages": m, "ids": chat_ids(tokenizer, m)[0]} for m in PROBES]


def learnable(template: Template, loss_on: str) -> str:
    """What can be learned as it is served: with a template that opens a think block for the turn being answered only,
    that is the last answer."""
    return "last_assistant" if "<think>" in (template.injects or "") and loss_on == "assistant" else loss_on


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
             loss_on: Literal["assistant", "last_assistant", "all"] = "assistant") -> tuple[list[int], list[int]]:  # fmt: skip
    """(ids, labels) of a conversation. Labels are IGNORED where nothing is learned; both end with the end-of-turn token."""
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
    fates: Counter = field(default_factory=Counter)
    dropped: list[dict[str, str]] = field(default_factory=list)
    shortened: list[str] = field(default_factory=list)

    def drop(self, record: dict, reason: str) -> None:
        self.fates[reason] += 1
        self.dropped.append({"id": record["id"], "source": record["source"], "reason": reason})


def encode_chats(tokenizer: PreTrainedTokenizerBase, records: list[Chat], max_length: int, loss_on: str,
                 on_too_long: str) -> Encoded:  # fmt: skip
    """Conversations to rows {"input_ids", "labels"} of at most `max_length` tokens. Every record has one fate."""
    out, has_tools = Encoded(), "tools" in tokenizer.chat_template
    for record in records:
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
                raise UserFault(f"record {record['id']} of {record['source']}: {len(ids)} tokens, trainer.max_length is "
                                f"{max_length}\n  choose: data.on_too_long=drop or truncate_left_turns, or a larger "
                                "trainer.max_length")  # fmt: skip
            out.drop(record, "longer_than_max_length")
        elif all(label == IGNORED for label in labels):
            out.drop(record, "no_trained_token")
        else:
            out.fates[fate] += 1
            out.shortened += [record["id"]] if fate != "kept" else []
            out.rows.append({"input_ids": ids, "labels": labels})
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
    for record in records:
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
            out.fates[fate] += 1
            out.shortened += [record["id"]] if fate != "kept" else []
            out.rows.append(ids)
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
