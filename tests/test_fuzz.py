"""Mutated input: no traceback, nothing lost, every refusal names the file. `make test-all` runs it."""

import copy
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from conftest import chats, pairs

from posttrain.data.jsonfiles import Fault
from posttrain.data.sources import read_training_file, to_records
from posttrain.errors import PosttrainError
from posttrain.records import fault_in

SEEDS = {
    "sft": [
        {"instruction": "介绍北京", "input": "", "output": "是首都。", "history": [["你好", "你好！"]], "system": "短"},
        {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}], "tools": "[]"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "问"}]},
                      {"role": "assistant", "content": "答"}]},
        {"prompt": "问", "completion": "答"},
        {"conversation": [{"human": "问", "assistant": "答"}]},
        {"message_id": "a", "parent_id": None, "text": "问", "role": "prompter", "lang": "zh", "message_tree_id": "a"},
    ],
    "pref": [
        {"prompt": "问", "chosen": "好", "rejected": "坏"},
        {"conversations": [{"from": "human", "value": "问"}], "chosen": {"from": "gpt", "value": "好"},
         "rejected": {"from": "gpt", "value": "坏"}},
        {"question": "问", "response_chosen": "好", "response_rejected": "坏", "system": "", "history": []},
        {"chosen": "\n\nHuman: 问\n\nAssistant: 好", "rejected": "\n\nHuman: 问\n\nAssistant: 坏"},
        {"prompt": "问", "response_0": "a", "response_1": "b", "better_response_id": 0, "safer_response_id": 1},
        {"instruction": "问", "output": ["好", "中", "坏"]},
    ],
}  # fmt: skip
STRANGE = [None, "", " ", "\x00", "\ud800", 0, -1.5, True, [], {}, [[]], [None], {"a": {"b": []}}, "长" * 5000, "​﻿",
           [{"role": "user"}], [{"from": "human", "value": None}], 10**400]  # fmt: skip


def mutated(row, draw: random.Random):
    """A copy of a row with one to three things put somewhere strange, at any depth."""
    row = copy.deepcopy(row)
    for _ in range(draw.randint(1, 3)):
        node = row
        while draw.random() < 0.6 and (children := _containers(node)):
            node = draw.choice(children)
        if isinstance(node, dict) and node:
            key = draw.choice(list(node))
            change = draw.randrange(3)
            if change == 0:
                del node[key]
            else:
                node[key if change == 1 else key + "x"] = copy.deepcopy(draw.choice(STRANGE))
        elif isinstance(node, list):
            node.insert(draw.randint(0, len(node)), copy.deepcopy(draw.choice(STRANGE)))
    return row


def _containers(node) -> list:
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
    return [child for child in children if isinstance(child, dict | list)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "pref"])
def test_mutated_rows_end_as_a_record_or_a_reason(kind):
    """10,000 mutated rows: each gives records that are sound, or faults with a reason."""
    draw, fates = random.Random(kind), Counter()
    for _ in range(10_000):
        row = mutated(draw.choice(SEEDS[kind]), draw)
        found = to_records(row, "fuzz", kind)
        assert found
        for item in found:
            assert isinstance(item, Fault) or fault_in(item) is None, row
            fates[item.reason if isinstance(item, Fault) else "record"] += 1
    assert fates["record"] > 500 and len(fates) > 5, fates


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "pref"])
def test_damaged_files_are_refused_by_name(kind, tmp_path):
    """1,000 files with bytes cut, overwritten, doubled or moved: read, or refused with the file's name."""
    draw, endings = random.Random(kind), Counter()
    rows = SEEDS[kind] + (chats(10) if kind == "sft" else pairs(10))
    forms = [json.dumps(rows, ensure_ascii=False).encode(), json.dumps(rows, indent=1).encode(),
             "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()]  # fmt: skip
    for number in range(1000):
        content = bytearray(draw.choice(forms))
        for _ in range(draw.randint(1, 4)):
            at, length = draw.randrange(len(content) or 1), draw.randint(1, 40)
            change = draw.randrange(4)
            part = bytes(content[at : at + length])
            content[at : at + length] = [b"", draw.randbytes(length), part + part, part[::-1]][change]
        path = Path(tmp_path / f"f{number % 7}.{draw.choice(['json', 'jsonl', 'txt', 'json.gz', 'csv'])}")
        path.write_bytes(bytes(content))
        try:
            records, reasons, faults = read_training_file(path, kind, max_bad_rows=1.0)
        except PosttrainError as error:
            assert path.name in str(error)
            endings["refused"] += 1
        else:
            assert sum(reasons.values()) == len(faults)
            assert all(fault_in(record) is None for record in records)
            endings["read"] += 1
        path.unlink()
    assert endings["refused"] > 20 and endings["read"] > 20, endings
