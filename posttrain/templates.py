"""
Chat templates with {% generation %} marks around what is learned, and how the right one is found.

`auto` takes the tokenizer's own template if it has marks, or the one of ours that renders the same text on the probes:
what is trained is what the base's own template serves.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from posttrain.config import in_project
from posttrain.errors import UserFault
from posttrain.records import Message

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


# ------------------------------------------------------------------ choosing


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
                "the tokenizer's chat template has no {% generation %} marks, so which tokens are the answer is "
                f"unknown, and it renders unlike every template known here\n  choices for {choices}\n"
                "  or put {% generation %} ... {% endgeneration %} around the answer in a copy of it "
                "(docs/troubleshooting.md)"
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
    try:
        injected = _injected(tokenizer, text)
    except TemplateError as error:
        raise UserFault(f"the template '{name}' cannot be rendered: {error}\n  choices for {choices}") from None
    unknown = [t for t in set(re.findall(r"<\|[a-z_]+\|>", text)) if t not in tokenizer.get_vocab()]
    if unknown:
        raise UserFault(f"the template '{name}' uses {', '.join(sorted(unknown))}, unknown to this tokenizer\n"
                        f"  choices for {choices}")  # fmt: skip
    return Template(name, text, injected)


def _render(tokenizer, text: str, messages: list[Message], tools=None, generation_prompt=False) -> str:
    return tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=text, tokenize=False, add_generation_prompt=generation_prompt,
        enable_thinking=False,
    )  # fmt: skip


def _renders_alike(tokenizer, ours: str, theirs: str) -> bool:
    """Whether two templates give the same text on the probes: conversations, prompts, and tools if they know them."""
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
    return "last_assistant" if "<think>" in (template.injects or "") and loss_on == "assistant" else loss_on
