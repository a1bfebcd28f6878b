"""One template and one tokenisation for training and serving."""

import pytest
from conftest import PLAIN_CHATML, make_base, shared
from transformers import AutoTokenizer

from posttrain import chat, model, templates
from posttrain.errors import CheckFailed, UserFault

USER, ANSWER = {"role": "user", "content": "3加4等于多少？"}, {"role": "assistant", "content": "7。"}


@pytest.fixture
def tokenizer(base):
    return model.load_tokenizer(base)


def test_training_row_begins_with_the_served_prompt(tokenizer):
    """For every turn, what is trained is the continuation of exactly the ids that a server sends."""
    last = {"role": "assistant", "content": "\n\n七"}
    conversation = [{"role": "system", "content": "简短。"}, USER, ANSWER, USER, last]
    ids, labels = chat.chat_ids(tokenizer, conversation)
    for end in (2, 4):
        prompt = chat.prompt_ids(tokenizer, conversation[:end])
        assert ids[: len(prompt)] == prompt
        assert labels[len(prompt) - 1] == chat.IGNORED and labels[len(prompt)] == ids[len(prompt)]
    assert ids[-1] == labels[-1] == tokenizer.eos_token_id


def test_end_of_turn_is_always_trained(tokenizer):
    for loss_on, answers in (("assistant", 2), ("last_assistant", 1)):
        _, labels = chat.chat_ids(tokenizer, [USER, ANSWER, USER, ANSWER], loss_on=loss_on)
        assert labels.count(tokenizer.eos_token_id) == answers
    ids, labels = chat.chat_ids(tokenizer, [USER, ANSWER], loss_on="all")
    assert ids == labels


def test_known_templates_are_recognised_and_injections_named():
    tokenizer = AutoTokenizer.from_pretrained(shared("tokenizers/qwen2"))
    template = templates.choose_template(tokenizer, "auto")
    assert template.name == "qwen2" and "You are a helpful assistant." in template.injects
    tokenizer.chat_template = PLAIN_CHATML
    assert templates.choose_template(tokenizer, "auto").name == "chatml"


@pytest.mark.parametrize("file, name", [("qwen2_5", "qwen2.5"), ("qwen3_instruct_2507", "chatml_tools"),
                                        ("qwen3", "qwen3_thinking_off")])  # fmt: skip
def test_published_qwen_templates_are_recognised(tokenizer, file, name):
    """By what they render, tools included: TRL ships the published texts."""
    from importlib.resources import files

    tokenizer.chat_template = files("trl").joinpath(f"chat_templates/{file}.jinja").read_text()
    template = templates.choose_template(tokenizer, "auto")
    assert template.name == name
    assert (templates.learnable(template, "assistant") == "last_assistant") == (name == "qwen3_thinking_off")


@pytest.mark.parametrize("text, asked, needle", [
    ("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}", "auto", "no {% generation %} marks"),
    (None, "auto", "no chat template"), (PLAIN_CHATML, "chatglm", "not known"), (PLAIN_CHATML, "no.jinja", "not there"),
])  # fmt: skip
def test_a_template_that_cannot_be_used_names_the_choices(base, text, asked, needle):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = text
    with pytest.raises(UserFault, match="chatml") as fault:
        templates.choose_template(tokenizer, asked)
    assert needle in str(fault.value)


def test_special_tokens_must_be_in_the_vocabulary(tmp_path):
    base = make_base(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    custom = tmp_path / "t.jinja"
    custom.write_text("{% for m in messages %}<|turn|>{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    with pytest.raises(UserFault, match=r"<\|turn\|>"):
        templates.choose_template(tokenizer, str(custom))


def test_serving_template_renders_the_same_without_marks(tokenizer):
    for text in templates.TEMPLATES.values():
        served = templates.serving_template(text)
        assert "generation %}" not in served.replace("add_generation", "")
        for messages in templates.PROBES:
            assert templates._render(tokenizer, text, messages) == templates._render(tokenizer, served, messages)
    assert templates.template_sha(text) == templates.template_sha(served)


def test_golden_names_the_first_differing_token(tokenizer, base):
    recorded = chat.golden(tokenizer)
    chat.check_golden(tokenizer, recorded)
    tokenizer.chat_template = templates.TEMPLATES["qwen2"]
    with pytest.raises(CheckFailed, match="at token"):
        chat.check_golden(tokenizer, recorded)


def record(messages, number=0, **more):
    return {"id": f"r{number}", "source": "test", "messages": messages, "meta": {}, **more}


def test_every_record_has_one_fate(tokenizer):
    long = {"role": "assistant", "content": "很长" * 200}
    records = [record([USER, ANSWER], 0), record([USER, long], 1), record([USER, long, USER, ANSWER], 2),
               record([USER, ANSWER], 3, tools=[templates._TOOL])]  # fmt: skip
    encoded = chat.encode_chats(tokenizer, records, 64, "assistant", "drop")
    assert encoded.fates == {"kept": 1, "longer_than_max_length": 2, "template_without_tools": 1}
    assert [d["id"] for d in encoded.dropped] == ["r1", "r2", "r3"]
    encoded = chat.encode_chats(tokenizer, records, 64, "assistant", "truncate_left_turns")
    assert encoded.fates["kept_without_oldest_turns"] == 1 and encoded.kept[1] == 2
    assert all(len(row["input_ids"]) <= 64 for row in encoded.rows)
    with pytest.raises(UserFault, match="r1"):
        chat.encode_chats(tokenizer, records, 64, "assistant", "error")


def test_marked_shows_what_is_trained(tokenizer):
    text = chat.marked(tokenizer, *chat.chat_ids(tokenizer, [USER, ANSWER]))
    assert text.endswith("【7。<|im_end|>】") and text.count("【") == 1
