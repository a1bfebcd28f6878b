"""
Chat templates: ours, with {% generation %} marks around what is learned, and how the right one for a base is found.

`auto` takes the tokenizer's own if it has marks; else the one of ours that renders the same text on the probes; else
the tokenizer's own read by prompts (rendering.py). In every case what is trained is what the base's own template
serves.
"""

import hashlib
import re
from dataclasses import dataclass
from datetime import date
from os.path import commonprefix
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from posttrain.config import in_project
from posttrain.errors import UserFault
from posttrain.records import Message
from posttrain.rendering import MARK, end_of_turn, render, shows_all_answers_as_asked

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
{%- set system = (system + '\\n\\n' if system is not none else '') + '# Tools\\n\\nYou may call one or more functions
 to assist with the user query.\\n\\nYou are provided with function signatures within <tools></tools> XML
 tags:\\n<tools>' %}
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

# Alpaca's layout as its authors published it. A system turn takes the place of the preamble; further turns repeat the
# two headings; the tokenizer's end token closes every answer, and is learned.
_ALPACA = """
{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}
{%- set system = messages[0].content if messages[0].role == 'system' else 'Below is an instruction that describes a
 task. Write a response that appropriately completes the request.' %}
{{- system + '\\n\\n' if system else '' }}
{%- for turn in turns %}
{%- if turn.role == 'assistant' %}
{{- '### Response:\\n' }}{% generation %}{{- turn.content + eos_token }}{% endgeneration %}{{- '\\n\\n' }}
{%- else %}{{- '### Instruction:\\n' + turn.content + '\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '### Response:\\n' }}{%- endif %}""".replace("\n ", " ")

# The same without preamble and colons. With a system turn, that is the instruction and the questions are its inputs;
# without one, each question is an instruction.
_ALPACA_BARE = """
{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{{- '### Instruction\\n' + system + '\\n\\n' if system else '' }}
{%- for turn in turns %}
{%- if turn.role == 'assistant' %}
{{- '### Response\\n' }}{% generation %}{{- turn.content + eos_token }}{% endgeneration %}{{- '\\n\\n' }}
{%- else %}{{- ('### Input\\n' if system else '### Instruction\\n') + turn.content + '\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '### Response\\n' }}{%- endif %}"""

QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
OWN = "tokenizer"  # the name of the tokenizer's own template, where it is none of these
TEMPLATES = {
    "chatml": _chatml(None, _TURNS),
    "chatml_tools": _chatml(None, _TOOL_TURNS),  # = Qwen3-Instruct-2507
    "qwen2": _chatml("You are a helpful assistant.", _TURNS),
    "qwen2.5": _chatml(QWEN25_SYSTEM, _TOOL_TURNS),
    "qwen3_thinking_off": _QWEN3_THINKING_OFF,
    "alpaca": _ALPACA,
    "alpaca_bare": _ALPACA_BARE,
}

_USER, _ANSWER = {"role": "user", "content": "北京在哪里？"}, {"role": "assistant", "content": "在中国北方。\n\nYes."}
_SYSTEM = {"role": "system", "content": "请简短回答。"}
_CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}]}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "weather", "description": "天气", "parameters": {"type": "object"}}}
PROBES: list[list[Message]] = [
    [_USER, _ANSWER],
    [_SYSTEM, _USER, _ANSWER],
    [_USER, _ANSWER, {"role": "user", "content": " x² + 1，\t再说一遍\n"}, _ANSWER],
]
TOOL_PROBE = [_USER, _CALL, {"role": "tool", "content": '{"t": 3}'}, _ANSWER]

# What every run records the token ids of (chat.golden): whatever a template or a tokenizer could treat otherwise.
_CODE = "def f(x):\n    if x > 0:\n\t\treturn x  # 注释\n\n    return -x\n"
GOLDEN: dict[str, list[Message]] = {
    "one turn": PROBES[0],
    "system turn": PROBES[1],
    "empty system turn": [{"role": "system", "content": ""}, _USER, _ANSWER],
    "several turns": PROBES[2],
    "full-width punctuation": [{"role": "user", "content": "“你好，世界！”——他说：《三国》（第１回）？"},
                               {"role": "assistant", "content": "是的；ＡＢＣ、１２３……　对吧？"}],
    "code": [{"role": "user", "content": "```python\n" + _CODE + "```"}, {"role": "assistant", "content": _CODE}],
    "emoji": [{"role": "user", "content": "👩‍👩‍👧 和 🇨🇳？"}, {"role": "assistant", "content": "👍🏽 café, 𠮷"}],
}  # fmt: skip


@dataclass(frozen=True)
class Template:
    """The template of a run: where it comes from, its text, the token that ends an answer, what it says unasked, and
    whether it shows earlier answers otherwise than it asks for them: then only last ones are learned as served."""

    name: str
    text: str
    end: str
    injects: str | None
    last_only: bool = False


# ------------------------------------------------------------------ choosing


def choose_template(tokenizer: PreTrainedTokenizerBase, asked: str) -> Template:
    """The training template, by name, from a .jinja file, or with `auto` what fits the tokenizer's own.

    Raises UserFault where none can be had that is learned as it is served, naming the choices.
    """
    name, choices = asked, f"model.chat_template: {', '.join(TEMPLATES)}, or a .jinja file"
    try:
        name, text = _found(tokenizer, asked)
        unknown = [token for token in set(re.findall(r"<\|[a-z_]+\|>", text))
                   if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id)]  # fmt: skip
        if unknown and name != OWN:
            raise UserFault(f"{called(name)} uses {', '.join(sorted(unknown))}, unknown to this tokenizer")
        injected, end = _injected(tokenizer, text), end_of_turn(tokenizer, text, called(name))
        last_only = not shows_all_answers_as_asked(tokenizer, text, PROBES[2], end)
    except UserFault as fault:
        raise UserFault(f"{fault}\n  choices for {choices} (docs/troubleshooting.md)") from None
    except TemplateError as error:
        raise UserFault(f"{called(name)} cannot be rendered: {error}\n  choices for {choices}") from None
    return Template(name, text, end, injected, last_only)


def called(name: str) -> str:
    """A template in a message."""
    return "the tokenizer's own template" if name == OWN else f"the template '{name}'"


def _found(tokenizer: PreTrainedTokenizerBase, asked: str) -> tuple[str, str]:
    """(name, text) of the template asked for."""
    own = tokenizer.chat_template
    if asked in TEMPLATES:
        return asked, _with_bos(tokenizer, TEMPLATES[asked])
    if asked.endswith(".jinja"):
        file = in_project(Path(asked))
        if not file.is_file():
            raise UserFault(f"model.chat_template: {asked} is not there")
        return asked, file.read_text(encoding="utf-8")
    if asked != "auto":
        raise UserFault(f"model.chat_template: {asked!r} is not known")
    if own is None:
        raise UserFault("the tokenizer has no chat template")
    if MARK.search(own):
        return OWN, own
    own = _without_clock(own)
    for name, text in TEMPLATES.items():
        if _renders_alike(tokenizer, text, own):
            return name, text
    return OWN, own


def _with_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A template of ours for a tokenizer that begins every text with a token (Llama, DeepSeek): rows are encoded from
    the rendered text alone, so it has to stand there."""
    begins = tokenizer.bos_token and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return "{{- bos_token }}" + text if begins else text


def _without_clock(text: str) -> str:
    """Some templates write today's date into every conversation: the day of training would be learned, and every later
    day would fail the check of the golden conversations. They get Llama 3's own default date for good."""
    fixed = date(2024, 7, 26)
    return re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda call: repr(fixed.strftime(call[2])), text)


def _renders_alike(tokenizer, ours: str, theirs: str) -> bool:
    """Whether two templates give the same text on the probes: conversations, prompts, and tools if they know them."""
    knows_tools = "tools" in theirs
    if knows_tools != ("tools" in ours):
        return False
    try:
        for messages in PROBES:
            for given, generation_prompt in ((messages, False), (messages[:-1], True)):
                a, b = (render(tokenizer, t, given, None, generation_prompt) for t in (ours, theirs))
                if a != b:
                    return False
        if knows_tools:
            a, b = (render(tokenizer, t, TOOL_PROBE, [TOOL]) for t in (ours, theirs))
            return a == b
    except Exception:  # jinja raises what the template's author chose; such a template is not alike
        return False
    return True


def _injected(tokenizer, text: str) -> str | None:
    """What a template says that nobody wrote: before the first question (a default system turn, a preamble, today's
    date) and before the answer that is asked for (an empty think block). Headers that stand before every question and
    every answer are no such thing."""
    talk = [{"role": "user", "content": "@1"}, {"role": "assistant", "content": "@2"},
            {"role": "user", "content": "@3"}]  # fmt: skip
    whole = render(tokenizer, text, talk, None, True)
    before, _, rest = whole.partition("@1")
    answer_header, _, rest = rest.partition("@2")
    between, _, asked = rest.partition("@3")
    before = before.removeprefix(tokenizer.bos_token or "")
    header = commonprefix([before[::-1], between[::-1]])
    thinking = re.search(r"<think>.*", asked, re.DOTALL)
    extra = thinking[0] if thinking else asked.strip().removeprefix(answer_header.strip())
    said = [before[: len(before) - len(header)].strip(), extra.strip()]
    return " and ".join(part for part in said if part) or None


def serving_template(text: str) -> str:
    """The template without marks, for servers that do not know them; renders the same text."""

    def comment(mark: re.Match) -> str:  # keeps what the mark says about white space around it
        return ("{#-" if mark[0].startswith("{%-") else "{#") + (" -#}" if mark[0].endswith("-%}") else " #}")

    return MARK.sub(comment, text)


def template_sha(text: str) -> str:
    """SHA-256 of a template as it is served."""
    return hashlib.sha256(serving_template(text).encode()).hexdigest()


def learnable(template: Template, loss_on: str) -> str:
    """What can be learned as it is served: with a template that opens a think block for the turn being answered only,
    that is the last answer."""
    return "last_assistant" if template.last_only and loss_on == "assistant" else loss_on
