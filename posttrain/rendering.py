"""
A conversation as text in pieces: what the model is given, and what it has to produce.

A template with {% generation %} marks says itself which is which. One without is asked twice: what a server would send
at that turn (add_generation_prompt) is given; what the conversation with the answer adds to it, up to the end-of-turn
token, is the answer. So every published template can be trained on as it is served, or is refused with the reason.
"""

import re
from os.path import commonprefix

from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from posttrain.errors import UserFault
from posttrain.records import Message

MARK = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
Segment = tuple[str, bool]  # text, and whether it is an answer


def render(tokenizer: Tokenizer, template: str, messages: list[Message], tools=None, generation_prompt=False) -> str:
    """A conversation as text, thinking off. Raises jinja2.TemplateError where the template refuses it."""
    return tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=generation_prompt,
        enable_thinking=False,
    )  # fmt: skip


def segments(tokenizer: Tokenizer, template: str, messages: list[Message], tools=None,
             generation_prompt: bool = False) -> list[Segment]:  # fmt: skip
    """The rendered conversation as (text, is an answer with its end-of-turn token) pieces, in order.

    The tokenizer's eos token is the end of turn (chat.lock_template sees to it): what a mark includes behind it, often
    a line break, is no part of the answer. Raises jinja2.TemplateError where the template refuses the conversation.
    """
    end = tokenizer.eos_token
    if not MARK.search(template):
        return _by_prompts(tokenizer, template, messages, tools, generation_prompt, end)
    text, answers = _marked(tokenizer, template, messages, tools, generation_prompt)
    stops = [text.rfind(end, start, stop) if end else -1 for start, stop in answers]
    return _cut(text, [(a, at + len(end) if at >= 0 else b) for (a, b), at in zip(answers, stops, strict=True)])


def _marked(tokenizer, template, messages, tools=None, generation_prompt=False) -> tuple[str, list[tuple[int, int]]]:
    """(text, [(start, end) of what stands between the marks])."""
    texts, spans = render_jinja_template(
        [messages], tools=tools, chat_template=template, return_assistant_tokens_mask=True,
        add_generation_prompt=generation_prompt, enable_thinking=False, **tokenizer.special_tokens_map,
    )  # fmt: skip
    return texts[0], spans[0]


def _by_prompts(tokenizer, template, messages, tools, generation_prompt, end: str) -> list[Segment]:
    """Without marks. An answer that the template shows otherwise than it asks for it, or ends otherwise once more turns
    follow, is no answer here: it could not be learned as it is served."""
    whole, answers = render(tokenizer, template, messages, tools, generation_prompt), []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = render(tokenizer, template, messages[:number], tools, True)
        answered = render(tokenizer, template, messages[: number + 1], tools)
        said = message["content"].strip()
        at = answered.find(end, max(len(asked), answered.find(said, len(asked)) + len(said)))
        if at >= 0 and answered.startswith(asked) and whole.startswith(answered[: at + len(end)]):
            answers.append((len(asked), at + len(end)))
    return _cut(whole, answers)


def _cut(text: str, answers: list[tuple[int, int]]) -> list[Segment]:
    out, at = [], 0
    for start, end in answers:
        out += [(text[at:start], False), (text[start:end], True)]
        at = end
    return [piece for piece in [*out, (text[at:], False)] if piece[0]]


def end_of_turn(tokenizer: Tokenizer, template: str, what: str) -> str:
    """The token that ends an answer: the first special one behind it. `what`: the template, in a message.

    Raises UserFault where answers cannot be told from prompts, or have no end that could be learned.
    """
    question, answer = {"role": "user", "content": "北京在哪里？"}, {"role": "assistant", "content": "在中国北方。"}
    asked = render(tokenizer, template, [question], None, True)
    whole = render(tokenizer, template, [question, answer])
    if MARK.search(template):
        whole, spans = _marked(tokenizer, template, [question, answer])
        if not spans:
            raise UserFault(f"{what} marks no token of an answer as trained")
        asked, whole = whole[: spans[0][0]], whole[: spans[-1][1]]
    elif not whole.startswith(asked):
        same = len(commonprefix([asked, whole]))
        raise UserFault(f"{what} has no {{% generation %}} marks and shows an answer otherwise than it "
                        f"asks for it: a prompt ends in {asked[same:]!r}, the conversation goes on with "
                        f"{whole[same : same + 30]!r}; what is trained would not be what is served")  # fmt: skip
    found = whole.find(answer["content"], len(asked))
    if found < 0:
        raise UserFault(f"{what} does not show an answer as it was given: {whole[len(asked) :]!r} "
                        f"instead of {answer['content']!r}")  # fmt: skip
    ids = tokenizer(whole[found + len(answer["content"]) :], add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    end = next((token for token in ids if token in special), None)
    if end is None:
        where = "inside {% generation %}" if MARK.search(template) else "behind an answer"
        raise UserFault(f"{what} has no end-of-turn token {where}: an answer would be learned without "
                        "its end, and the model would not stop")  # fmt: skip
    return tokenizer.convert_ids_to_tokens(end)


def shows_all_answers_as_asked(tokenizer: Tokenizer, template: str, messages: list[Message], end: str) -> bool:
    """Whether every answer of a conversation stands behind exactly what a server sent to get it. If not, only last
    answers can be learned as they are served."""
    found = _by_prompts(tokenizer, template, messages, None, False, end)
    return sum(is_answer for _, is_answer in found) == sum(message["role"] == "assistant" for message in messages)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as a person reads it, quoted; a part of a character in the vocabulary's own spelling."""
    text = tokenizer.decode([token])
    return repr(text) if "\ufffd" not in text else f"part of a character, {tokenizer.convert_ids_to_tokens(token)!r}"
