"""One template and one tokenisation for training and serving."""

import json

import pytest
from conftest import PLAIN_CHATML, make_base, shared
from transformers import AutoTokenizer

from posttrain import chat, model, rendering, templates, token_view
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
    ("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}", "auto", "no end-of-turn token"),
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
            assert rendering.render(tokenizer, text, messages) == rendering.render(tokenizer, served, messages)
    assert templates.template_sha(text) == templates.template_sha(served)


@pytest.mark.parametrize("file, end, last_only", [
    ("llama3", "<|eot_id|>", False), ("phi3", "<|end|>", False), ("gemma", "<end_of_turn>", False),
    ("cohere", "<|END_OF_TURN_TOKEN|>", False), ("qwen3_6", "<|im_end|>", True), ("gptoss", "<|return|>", True),
    ("lfm2_2_5", "<|im_end|>", False), ("qwen3_training", "<|im_end|>", False),
])  # fmt: skip
def test_templates_of_other_families_are_trained_as_they_are_served(base, file, end, last_only):
    """Without marks by asking the template twice; with marks whatever they take in beyond the end of turn."""
    tokenizer = published(base, file)
    template = templates.choose_template(tokenizer, "auto")
    assert (template.name, template.end, template.last_only) == ("tokenizer", end, last_only)
    chat.lock_template(tokenizer, template)
    conversation = [USER, ANSWER, USER, {"role": "assistant", "content": "\n\n七"}]
    ids, labels = chat.chat_ids(tokenizer, conversation, loss_on=templates.learnable(template, "assistant"))
    for turns in (3,) if last_only else (1, 3):
        prompt = chat.prompt_ids(tokenizer, conversation[:turns])
        assert ids[: len(prompt)] == prompt and labels[len(prompt)] == ids[len(prompt)]
    assert tokenizer.eos_token == end and ids[-1] == labels[-1] == tokenizer.eos_token_id
    assert labels.count(tokenizer.eos_token_id) == (1 if last_only else 2)


def published(base, file):
    """The tiny tokenizer with a published template, which TRL ships, and the special tokens in it."""
    import re
    from importlib.resources import files

    tokenizer = AutoTokenizer.from_pretrained(base)
    text = files("trl").joinpath(f"chat_templates/{file}.jinja").read_text()
    special = {t for t in re.findall(r"<[|｜a-zA-Z_▁]+>", text) if t not in ("<think>", "<tool_call>", "<tools>")}
    tokenizer.add_special_tokens({"additional_special_tokens": sorted({*special, "<s>"}), "bos_token": "<s>"})
    tokenizer.chat_template = text
    return tokenizer


@pytest.mark.parametrize("file, needle", [("deepseek_r1_distill", "a prompt ends in '<think>"),
                                          ("glm4moe", "no end-of-turn token")])  # fmt: skip
def test_templates_that_cannot_be_trained_as_served_are_refused(base, file, needle):
    with pytest.raises(UserFault, match="chatml") as fault:
        templates.choose_template(published(base, file), "auto")
    assert needle in str(fault.value)


def test_a_conversation_that_the_template_refuses_is_counted(base):
    tokenizer = published(base, "gemma")
    chat.lock_template(tokenizer, templates.choose_template(tokenizer, "auto"))
    records = [record([{"role": "system", "content": "简短。"}, USER, ANSWER], 0), record([USER, ANSWER], 1)]
    assert chat.encode_chats(tokenizer, records, 99, "assistant", "drop").fates == {"refused_by_template": 1, "kept": 1}
    assert [p["name"] for p in chat.golden(tokenizer) if p["ids"] is None] == ["system turn", "empty system turn"]


def test_a_date_in_a_template_does_not_move(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "Today: {{ strftime_now('%d %b %Y') }}\n" + PLAIN_CHATML
    template = templates.choose_template(tokenizer, "auto")
    assert "Today: 26 Jul 2024" in template.injects and "strftime" not in template.text


ALPACA = """Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
问一

### Response:
答一<|im_end|>

### Instruction:
问二

### Response:
答二<|im_end|>"""
BARE = ("### Instruction\n简短。\n\n### Input\n问一\n\n### Response\n答一<|im_end|>\n\n"
        "### Input\n问二\n\n### Response\n答二<|im_end|>")  # fmt: skip


@pytest.mark.parametrize("name, system, text", [
    ("alpaca", None, ALPACA), ("alpaca", "简短。", "简短。" + ALPACA[ALPACA.index("\n\n") :]),
    ("alpaca_bare", "简短。", BARE), ("alpaca_bare", "", BARE.removeprefix("### Instruction\n简短。\n\n").replace(
        "Input", "Instruction")),
])  # fmt: skip
def test_alpaca(base, name, system, text):
    tokenizer = model.load_tokenizer(base, name)
    turns = [m | {"content": c} for m, c in zip([USER, ANSWER] * 2, ("问一", "答一", "问二", "答二"), strict=True)]
    messages = turns if system is None else [{"role": "system", "content": system}, *turns]
    ids, labels = chat.chat_ids(tokenizer, messages)
    assert tokenizer.decode(ids) == text
    assert token_view.marked(tokenizer, ids, labels).count("【答") == 2
    assert labels.count(tokenizer.eos_token_id) == 2
    injects = templates.choose_template(AutoTokenizer.from_pretrained(base), name).injects
    assert (injects or "").startswith("Below is an instruction") == (name == "alpaca")


def test_a_space_is_not_put_before_an_answer(tmp_path):
    """Sentencepiece vocabularies put one before what they take for a beginning; the answer is none."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as tokenizer_models
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(tokenizer_models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    bpe.train_from_iterator(["[INST] abc [/INST] the cat sat"] * 9, trainers.BpeTrainer(
        vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}"
                               " [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")  # fmt: skip
    chat.lock_template(tokenizer, templates.choose_template(tokenizer, "auto"))
    abc, cat = {"role": "user", "content": "abc"}, {"role": "assistant", "content": "cat"}
    ids, labels = chat.chat_ids(tokenizer, [abc, cat])
    learned = [label for label in labels if label != chat.IGNORED]
    assert "".join(tokenizer.convert_ids_to_tokens(learned)) == "▁cat</s>"
    assert tokenizer.decode(ids) == "<s>[INST] abc [/INST] cat</s>"


def test_golden_names_conversation_position_both_tokens_and_what_to_do(tokenizer):
    recorded = chat.golden(tokenizer)
    names = [probe["name"] for probe in recorded]
    assert {"system turn", "empty system turn", "several turns", "full-width punctuation", "code", "emoji"} < {*names}
    chat.check_golden(tokenizer, json.loads(json.dumps(recorded)))  # as a manifest holds them
    tokenizer.chat_template = templates.TEMPLATES["qwen2"]
    with pytest.raises(CheckFailed) as fault:
        chat.check_golden(tokenizer, recorded)
    was, now = (tokenizer.convert_tokens_to_ids(t) for t in ("user", "sy"))
    for needle in (f"conversation 1 of {len(names)} (one turn), token 1, after '<|im_start|>'", f"had {was} 'user'",
                   f"now it is {now} 'sy'", "train again", tokenizer.name_or_path):  # fmt: skip
        assert needle in str(fault.value)


def test_golden_tells_apart_what_tokenizers_get_wrong(base):
    """Full-width punctuation, indentation and emoji: each change of the tokenizer is caught by its own conversation."""
    from tokenizers import normalizers

    for normalizer, name in ((normalizers.NFKC(), "full-width punctuation"), (normalizers.Replace("\t", "  "), "code"),
                             (normalizers.Replace("\u200d", ""), "emoji")):  # fmt: skip
        tokenizer = model.load_tokenizer(base)
        recorded = [probe for probe in chat.golden(tokenizer) if probe["name"] == name]
        tokenizer.backend_tokenizer.normalizer = normalizer
        with pytest.raises(CheckFailed, match=name):
            chat.check_golden(tokenizer, recorded)


def test_golden_holds_a_tool_call_where_the_template_knows_tools(base):
    tokenizer = model.load_tokenizer(base, "qwen2.5")
    probe = next(probe for probe in chat.golden(tokenizer) if probe["name"] == "tools")
    assert '{"name": "weather", "arguments": {"city": "北京"}}' in tokenizer.decode(probe["ids"])


def record(messages, number=0, **more):
    return {"id": f"r{number}", "source": "test", "messages": messages, "meta": {}, **more}


def test_every_record_has_one_fate(tokenizer):
    long = {"role": "assistant", "content": "很长" * 200}
    records = [record([USER, ANSWER], 0), record([USER, long], 1), record([USER, long, USER, ANSWER], 2),
               record([USER, ANSWER], 3, tools=[templates.TOOL])]  # fmt: skip
    encoded = chat.encode_chats(tokenizer, records, 64, "assistant", "drop")
    assert encoded.fates == {"kept": 1, "longer_than_max_length": 2, "template_without_tools": 1}
    assert [d["id"] for d in encoded.dropped] == ["r1", "r2", "r3"]
    encoded = chat.encode_chats(tokenizer, records, 64, "assistant", "truncate_left_turns")
    assert encoded.fates["kept_without_oldest_turns"] == 1 and encoded.kept[1] == 2
    assert all(len(row["input_ids"]) <= 64 for row in encoded.rows)
    with pytest.raises(UserFault, match="r1"):
        chat.encode_chats(tokenizer, records, 64, "assistant", "error")


def test_marked_shows_what_is_trained(tokenizer):
    text = token_view.marked(tokenizer, *chat.chat_ids(tokenizer, [USER, ANSWER]))
    assert text.endswith("【7。<|im_end|>】") and text.count("【") == 1


def test_tokens_are_listed_around_the_borders_first(tokenizer):
    ids, labels = chat.chat_ids(tokenizer, [USER, ANSWER, USER, ANSWER])
    whole = token_view.token_lines(tokenizer, ids, labels, len(ids))
    assert [int(line.split()[1]) for line in whole] == ids
    assert [line[15] == "*" for line in whole] == [label != chat.IGNORED for label in labels]
    some = token_view.token_lines(tokenizer, ids, labels, 20)
    assert set(line for line in some if "..." not in line) < set(whole)
    border = next(i for i, label in enumerate(labels) if label != chat.IGNORED)
    assert {whole[border - 1], whole[border], whole[0], whole[-1]} < set(some)
    hidden = sum(int(line.split()[1]) for line in some if "..." in line)
    assert hidden == len(ids) - 20


def test_answers_without_their_end_are_counted(tokenizer):
    ids, labels = chat.chat_ids(tokenizer, [USER, ANSWER])
    whole, cut = {"input_ids": ids, "labels": labels}, {"input_ids": ids[:-1], "labels": labels[:-1]}
    packed = {"input_ids": ids + ids[:-1], "labels": labels + labels[:-1], "seq_lengths": [len(ids), len(ids) - 1]}
    end = tokenizer.eos_token_id
    assert [token_view.answers_without_end([row], end) for row in (whole, cut, packed)] == [0, 1, 1]
    pair = {"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids[:-1]}
    assert token_view.answers_without_end([pair, pair | {"rejected_ids": ids}], end) == 1
