"""Modelfile and serve.sh: the prompts of the serving template, the tokens to stop at, what vLLM would load."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import make_base

from posttrain import model, templates
from posttrain.export_folder import save_generation
from posttrain.export_serving import (
    _prompt,
    modelfile,
    ollama_template,
    turns_of,
    vllm_faults,
    vllm_rank,
    vllm_script,
)

TALKS = list(templates.GOLDEN.values())
LLAMA3 = (
    "{{- bos_token }}{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\\n\\n' + m['content'] | trim }}"
    "{{- '<|im_end|>' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n\\n' }}{%- endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(base):
    return model.read_tokenizer(base)


# ------------------------------------------------------------------ what Go would render


def go(template: str, messages: list[dict]) -> str:
    """A template as Ollama runs it, for the words that ours use: range over .Messages, if / else if / else / end, and,
    not, eq, ne, .Role, .Content and two variables."""
    parts = re.split(r"(\{\{.*?\}\})", template, flags=re.DOTALL)
    tree, rest = _block(parts)
    assert not rest
    return _run(tree, {"messages": messages})


def _block(parts: list[str]) -> tuple[list, list[str]]:
    """Nodes up to an else or end, and what is left from there on."""
    nodes = []
    while parts:
        head = parts[0]
        if not head.startswith("{{"):
            nodes.append(head)
            parts = parts[1:]
            continue
        words = head[2:-2].strip()
        if words == "end" or words.startswith("else"):
            return nodes, parts
        parts = parts[1:]
        if words.startswith("range"):
            inner, parts = _block(parts)
            nodes.append(("range", inner))
        elif words.startswith("if "):
            branches = [(words[3:], None)]
            while True:
                inner, parts = _block(parts)
                branches[-1] = (branches[-1][0], inner)
                closing = parts[0][2:-2].strip()
                parts = parts[1:]
                if closing == "end":
                    break
                branches.append((closing.removeprefix("else").strip().removeprefix("if ") or "true", None))
            nodes.append(("if", branches))
            continue
        else:
            nodes.append(("say", words))
            continue
        assert parts[0] == "{{ end }}"
        parts = parts[1:]
    return nodes, parts


def _run(nodes: list, scope: dict) -> str:
    out = ""
    for node in nodes:
        if isinstance(node, str):
            out += node
        elif node[0] == "range":
            for i, message in enumerate(scope["messages"]):
                last = i == len(scope["messages"]) - 1
                out += _run(node[1], {**scope, "i": i, "last": last, **message})
        elif node[0] == "if":
            taken = next((inner for test, inner in node[1] if _true(test, scope)), [])
            out += _run(taken, scope)
        elif node[1] == ".Content":
            out += scope["content"]
        else:
            assert node[1] == "$last := eq (len (slice $.Messages $i)) 1", node
    return out


def _true(test: str, scope: dict) -> bool:
    words = re.findall(r'\(|\)|"[^"]*"|[^\s()]+', test)

    def value():
        word = words.pop(0)
        if word == "(":
            found = call()
            assert words.pop(0) == ")"
            return found
        known = {"$i": "i", "$last": "last", ".Role": "role", ".Content": "content"}
        return scope[known[word]] if word in known else word.strip('"') if word[0] == '"' else int(word)

    def call():
        if words[0] not in ("and", "not", "eq", "ne"):
            return value()
        name, given = words.pop(0), []
        while words and words[0] != ")":
            given.append(value())
        return {"and": all(given), "not": not given[0], "eq": given[0] == given[-1], "ne": given[0] != given[-1]}[name]

    return bool(call())


# ------------------------------------------------------------------ TEMPLATE


@pytest.mark.parametrize("name", [name for name in templates.TEMPLATES if name != "alpaca_bare"])
def test_a_template_of_ours_gives_the_same_prompts_in_go(tokenizer, name):
    tokenizer.chat_template = templates.TEMPLATES[name]
    template, note = ollama_template(tokenizer, TALKS)
    assert template and "tools" in note
    for prompt in filter(None, (_prompt(talk, False) for talk in TALKS)):
        wanted = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        assert go(template, prompt) == wanted
    unanswered = [*TALKS[0][:1], {"role": "assistant", "content": "在"}]  # an answer that has begun is gone on with
    assert go(template, unanswered).endswith("在")


def test_a_template_that_trims_is_written_and_told(tokenizer):
    tokenizer.chat_template = LLAMA3
    template, note = ollama_template(tokenizer, TALKS)
    assert "white space" in note
    asked = [{"role": "user", "content": "你好"}]
    assert go(template, asked) == tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(("text", "says"), [
    (templates.TEMPLATES["alpaca_bare"], "another prompt"),  # its headings depend on whether there is a system turn
    ("{{ raise_exception('no system turn') if messages[0].role == 'system' }}{{ messages[0].content }}", "refuses"),
    (templates.TEMPLATES["chatml"].replace("<|im_end|>", '"""'), "three quotes"),
])  # fmt: skip
def test_a_template_that_go_cannot_hold_is_left_out_with_the_reason(tokenizer, text, says):
    tokenizer.chat_template = text
    template, note = ollama_template(tokenizer, TALKS)
    assert template is None and says in note
    written = modelfile("./x.gguf", template, note, ["<|im_end|>"], {}, None)
    assert "TEMPLATE \"\"\"" not in written and says in written


def test_a_first_token_that_the_tokenizer_adds_is_not_written_twice(tokenizer):
    tokenizer.chat_template, tokenizer.bos_token = "{{ bos_token }}" + templates.TEMPLATES["chatml"], "<|endoftext|>"
    try:
        assert turns_of(tokenizer).begin == "<|endoftext|>"
        assert ollama_template(tokenizer, TALKS)[0].startswith("<|endoftext|>")
    finally:
        tokenizer.bos_token = None


# ------------------------------------------------------------------ the files


def test_modelfile_carries_stops_and_sampling():
    text = modelfile(".", "T", "note", ["<|im_end|>", 'a"b'], {"temperature": 0.6, "top_k": 20}, 2048)
    assert text.splitlines()[1:] == ["FROM .", "# TEMPLATE: note", 'TEMPLATE """T"""', 'PARAMETER stop "<|im_end|>"',
                                     'PARAMETER stop "a\\"b"', "PARAMETER temperature 0.6", "PARAMETER top_k 20",
                                     "PARAMETER num_ctx 2048"]  # fmt: skip
    assert "PARAMETER temperature 0\n" in modelfile(".", "T", "", [], {"do_sample": False, "temperature": 0.9}, None)


def test_generation_stops_at_the_trained_end_first(tmp_path):
    """A base that ends its texts with another token than the one that was trained as the end of a turn."""
    base = make_base(tmp_path / "base")
    tokenizer = model.load_tokenizer(base, "chatml")
    (base / "generation_config.json").write_text('{"eos_token_id": 0, "temperature": 0.7, "_from_model_config": true}')
    (tmp_path / "out").mkdir()
    found = save_generation(tokenizer, base, tmp_path / "out", True)
    assert found["eos_token_id"] == [tokenizer.convert_tokens_to_ids("<|im_end|>"), 0]
    from transformers import GenerationConfig

    written = GenerationConfig.from_pretrained(tmp_path / "out")
    assert written.eos_token_id == found["eos_token_id"] and written.temperature == 0.7


def served(directory: Path, script: str, *more: str, **env: str) -> list[str]:
    """What `bash serve.sh` would call, a word a line."""
    (directory / "serve.sh").write_text(script)
    (directory / "bin").mkdir(exist_ok=True)
    (directory / "bin/vllm").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (directory / "bin/vllm").chmod(0o755)
    path = f"{directory / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(["bash", directory / "serve.sh", *more], capture_output=True, text=True, cwd="/",
                          env={**os.environ, "PATH": path, **env})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_serve_sh_of_a_model_and_of_an_adapter(tmp_path):
    place = tmp_path / "a b"
    place.mkdir()
    assert served(place, vllm_script("it's", None, 0, 2048), "--port", "8001") == [
        "serve", str(place), "--served-model-name", "it's", "--max-model-len", "2048", "--port", "8001"]  # fmt: skip
    script = vllm_script("sft", "Qwen/Qwen3-4B", 24, None)
    assert served(place, script) == [
        "serve", "Qwen/Qwen3-4B", "--tokenizer", str(place), "--chat-template", f"{place}/chat_template.jinja",
        "--enable-lora", "--max-lora-rank", "32", "--lora-modules", f"sft={place}"]  # fmt: skip
    assert served(place, script, BASE="/other")[1] == "/other"


def test_the_rank_is_one_that_vllm_takes():
    assert [vllm_rank(r) for r in (1, 8, 9, 64, 300, 512, 513)] == [8, 8, 16, 64, 320, 512, None]


@pytest.mark.parametrize(("adapter", "tensors", "why"), [
    ({"r": 16, "use_rslora": True}, ["model.layers.0.self_attn.q_proj.lora_A.weight"], []),
    ({"r": 16, "use_dora": True, "bias": "all"}, [], ["DoRA", "lora.bias: all"]),
    ({"r": 16, "modules_to_save": ["lm_head"]}, ["base_model.model.lm_head.weight"], ["lm_head"]),
    ({"r": 16}, ["base_model.model.model.embed_tokens.lora_embedding_A"], ["embed_tokens"]),
    ({"r": 16, "trainable_token_indices": [5]}, [], ["trainable_token_indices"]),
    ({"r": 16, "rank_pattern": {"q_proj": 600}}, [], ["rank 600, above 512"]),
])  # fmt: skip
def test_what_vllm_would_not_load(adapter, tensors, why):
    assert vllm_faults(adapter, tensors) == why
