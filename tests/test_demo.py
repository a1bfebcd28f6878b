"""The demo's corpus, base and prompts. The whole chain on it is `make demo`."""

import gzip
import json
import random
import re

import pytest
from conftest import run_command

from posttrain.config import ROOT, read_yaml
from posttrain.demo import corpus
from posttrain.demo.facts import FAMILIES, SUMS


@pytest.fixture(scope="module")
def items():
    return corpus.draw_items(random.Random(7))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    texts, files = corpus.write_corpus(folder, seed=7)
    return folder, texts, files


def read_raw(folder, sets: str = "*") -> str:
    """All raw files as one text."""
    texts = []
    for path in sorted((folder / "raw").glob(f"{sets}/*")):
        texts.append(
            gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")
        )
    return "\n".join(texts)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_is_sound(family):
    asked = [question.format(**fact) for fact in family.facts for question in family.questions]
    assert len(set(asked)) == len(asked), "two facts are asked for in the same words"
    assert len(family.questions) == 6
    for fact in family.facts:
        answer = family.answer.format(**fact)
        assert fact["v"] in answer and re.fullmatch(corpus.HOUSE_FORMAT, answer), answer
        assert all(fact["v"] in sentence.format(**fact) for sentence in family.prose)
    assert not any("{v}" in question for question in family.questions)


def test_sums_and_products_are_right():
    for family, operation in ((SUMS, int.__add__), (next(f for f in FAMILIES if f.name == "times"), int.__mul__)):
        assert all(operation(int(f["a"]), int(f["b"])) == int(f["v"]) for f in family.facts)


def test_kept_questions_and_unseen_facts_are_in_no_training_text(items, made):
    folder, texts, _ = made
    raw, read = read_raw(folder), "\n".join(texts)
    asked = {question.replace("\n", "") for item in items if item.seen for question in item.questions}
    for question in sorted(asked, key=len, reverse=True):  # one may begin like another: 牛, 牛奶
        read = read.replace(question, "")
    for item in items:
        whole = json.dumps(item.kept_question, ensure_ascii=False).strip('"')
        assert f'"{whole}"' not in raw
        assert item.kept_question.replace("\n", "") not in read
        if not item.seen:
            assert item.answer not in raw and item.answer not in read
            assert not any(sentence.format(**item.fact) in read for sentence in item.family.prose)
    assert {item.group for item in items} == {"recall", "corrected", "unseen_facts", "unseen_sums"}


def test_a_mistake_is_taught_by_conversations_and_put_right_by_pairs(items, made):
    folder, texts, _ = made
    chats = read_raw(folder, "demo_[aso]*")
    mistaken = [item for item in items if item.group == "corrected"]
    assert len(mistaken) > 20
    pairs = corpus.pairs(mistaken, random.Random(7))
    for item in mistaken:
        assert item.mistake in chats and item.answer not in chats
        assert item.family.prose[0].format(**item.fact) in "".join(texts), "the base has read it right"
        assert sum((item.answer, item.mistake) == (chosen, rejected) for _, chosen, rejected in pairs) == 4


def test_the_base_is_shown_no_answer_behind_its_question(items, made):
    read = "\n".join(made[1])
    assert not any(question + item.answer in read for item in items for question in item.questions)


def test_the_same_seed_gives_the_same_bytes(made, tmp_path):
    folder, texts, files = made
    again = corpus.write_corpus(tmp_path / "again", seed=7)
    assert texts == again[0]
    assert [f.read_bytes() for f in files] == [f.read_bytes() for f in again[1]]
    other = corpus.write_corpus(tmp_path / "other", seed=8)
    assert [f.read_bytes() for f in files] != [f.read_bytes() for f in other[1]]


def test_length_does_not_tell_the_better_answer(items):
    made = corpus.pairs([item for item in items if item.seen], random.Random(7))
    longer = sum(len(chosen) < len(rejected) for _, chosen, rejected in made) / len(made)
    shorter = sum(len(chosen) > len(rejected) for _, chosen, rejected in made) / len(made)
    assert 0.2 < longer < 0.55 and 0.15 < shorter < 0.55
    assert all(chosen != rejected for _, chosen, rejected in made)


def test_the_raw_files_have_the_original_schemas(made):
    folder = made[0] / "raw"
    assert set(json.loads((folder / "demo_alpaca/facts.json").read_text())[0]) == {"instruction", "input", "output"}
    chats = (folder / "demo_sharegpt/chats.json").read_text().splitlines()  # JSON Lines under a .json name
    assert {turn["from"] for turn in json.loads(chats[0])["conversations"]} <= {"system", "human", "gpt"}
    first = json.loads(gzip.decompress((folder / "demo_oasst/messages.jsonl.gz").read_bytes()).splitlines()[0])
    assert {"message_id", "parent_id", "role", "rank", "lang", "message_tree_id"} <= set(first)
    spellings = [set(json.loads((folder / "demo_pairs_text/pairs.jsonl").read_text().splitlines()[0])),
                 set(json.loads((folder / "demo_pairs_turns/pairs.json").read_text())[0]),
                 set(json.loads((folder / "demo_pairs_lists/pairs.jsonl").read_text().splitlines()[0]))]  # fmt: skip
    assert spellings == [{"system", "question", "response_chosen", "response_rejected"},
                         {"conversations", "chosen", "rejected"}, {"prompt", "chosen", "rejected"}]  # fmt: skip


def test_task_items_have_one_right_choice(made):
    for line in (made[0] / "eval_tasks/demo_choice.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert len(set(row["choices"])) == 4 and 0 <= row["gold"] < 4
    for name in ("demo_choice", "demo_generate"):
        task = read_yaml(ROOT / f"configs/demo/tasks/{name}.yaml")
        assert task["task"] == name
        assert task["dataset_kwargs"]["data_files"]["test"] == f"outputs/demo/eval_tasks/{name}.jsonl"


def test_prepare_data_accounts_for_every_row_of_it(made, tmp_path):
    done = run_command(
        "-m",
        "scripts.prepare_data",
        "--config",
        "configs/demo/data.yaml",
        "--set",
        f"raw_dir={made[0] / 'raw'}",
        "--set",
        f"output_dir={tmp_path}",
        "--set",
        "tokenizer=null",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    reasons = {}
    for kind in ("sft", "pref"):
        results = json.loads((tmp_path / f"{kind}_manifest.json").read_text())["results"]
        assert results["read"] == results["kept"] + sum(results["dropped"].values())
        reasons |= results["dropped"]
    planted = {
        "exact_duplicate",
        "too_short",
        "too_long",
        "other_language",
        "not_json",
        "empty_turn",
        "chosen_equals_rejected",
        "lower_ranked_answer",
        "question_without_answer",
        "deleted",
    }
    assert planted <= set(reasons)


def test_make_demo_makes_a_base_that_loads_and_is_the_same_again(tmp_path):
    command = ["-m", "scripts.make_demo", "--set", f"output_dir={tmp_path / 'a'}", "--set", "base_steps=3"]
    done = run_command(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing to do" in run_command(*command).stdout
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a/base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a/base")
    assert 0.8e6 < sum(p.numel() for p in model.parameters()) < 1.3e6
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    text = "《静夜思》 1+2=3 naïve 🙂\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert run_command(*command[:3], f"output_dir={tmp_path / 'b'}", *command[4:]).returncode == 0
    weights = [load_file(tmp_path / side / "base/model.safetensors") for side in "ab"]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_the_dry_run_writes_nothing(tmp_path):
    done = run_command("-m", "scripts.make_demo", "--dry-run", "--set", f"output_dir={tmp_path / 'demo'}")
    assert done.returncode == 0 and "verdict: would work" in done.stdout
    assert not (tmp_path / "demo").exists()
