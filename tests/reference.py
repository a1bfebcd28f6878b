"""
Plain reference of the data engine: what its rules mean, one record at a time, in libraries that everybody knows.

    python tests/reference.py FILE... --out ids.json
    python tests/reference.py FILE... --out ids.json --records kept.jsonl

It is the oracle of the tests and the baseline of bench/data.py; both ask the engine for the same records. The files are
JSON Lines, plain or .gz, in Alpaca or ShareGPT form, or preference pairs (one kind at a time: duplicates are looked for
among all rows). Rules in order, the first that finds something is the reason:

    empty_turn ...    turns that make no conversation (`fault_in`)
    too_short         fewer than 8 characters; of a pair: of its prompt and the longer answer
    too_long          more than 6,000
    odd_symbols       under 0.4 of what is not white space are Han characters, ASCII letters or ASCII digits
    repetition        more than 0.6 of the last answer's (of a pair: the chosen one's) 4-grams are repeats
    keywords          one of 3,005 words
    pii               what posttrain.data.pii finds: mobile numbers, identity and bank cards, e-mail addresses
    exact_duplicate   SHA-256 of the key (folded, lower case, no white space) is that of an earlier record
    near_duplicate    in a cluster of pairs whose sets of 5-character shingles have a Jaccard similarity of 0.8 or more

A text is folded by text.folded_text before anything reads it. No quota. Needs ahocorasick_rs, and datasketch
(requirements-dev.txt) for the near duplicates.
"""

import argparse
import gzip
import hashlib
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from posttrain.data.pii import find_pii
from posttrain.text import HAN, folded_text, training_text

MIN_CHARS, MAX_CHARS = 8, 6000
MIN_ORDINARY, MAX_REPETITION = 0.4, 0.6
SHINGLE, BANDS, ROWS, MIN_JACCARD = 5, 21, 6, 0.8
SPEAKERS = ("Human:", "Assistant:")
NOT_ORDINARY = re.compile(f"[^0-9A-Za-z{HAN}]+")
# fmt: off
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "function_call": "assistant",
    "system": "system", "observation": "tool", "tool": "tool",
}
# fmt: on


class Record(NamedTuple):
    """A row read: its id, its turns in order as (role, folded text), and which of them is the answer."""

    id: str
    """source:line, the source being the file's name up to its first dot."""
    turns: list[tuple[str, str]]
    """Of a pair: its prompt, then the chosen and the rejected answer."""
    answer: str
    """Of a conversation the last answer, of a pair the chosen one."""
    chars: int
    """Of all turns, joined by line ends; of a pair: of its prompt and the longer answer."""


# ------------------------------------------------------------------ rows to records


def rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(source:line, row) of a JSON Lines file; the first line is 1."""
    source = path.name.split(".")[0]
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{source}:{number}", json.loads(line)


def read(row_id: str, row: dict) -> Record | str:
    """The record of a row, or why it is none."""
    if "chosen" in row:
        return read_pair(row_id, row)
    turns = sharegpt(row["conversations"]) if "conversations" in row else alpaca(row)
    turns = [(role, text, is_call) for role, text, is_call in turns if role != "system" or text.strip()]
    while turns and turns[-1][0] in ("user", "tool") and any(role == "assistant" for role, *_ in turns):
        turns = turns[:-1]  # a question without its answer
    turns = [(role, folded_text(text), is_call) for role, text, is_call in turns]
    if fault := fault_in(turns):
        return fault
    said = [(role, text) for role, text, _ in turns]
    return Record(row_id, said, said[-1][1], sum(len(text) + 1 for _, text in said) - 1)


def alpaca(row: dict) -> list[tuple[str, str, bool]]:
    """instruction, input, output, with a history of (question, answer) pairs, as turns (role, text, is a tool call)."""
    earlier = [turn for question, answer in row.get("history") or []
               for turn in (("user", question, False), ("assistant", answer, False))]  # fmt: skip
    asked = "\n".join(part for part in (row["instruction"], row.get("input") or "") if part.strip())
    return [*earlier, ("user", asked, False), ("assistant", row["output"], False)]


def sharegpt(conversation: list[dict]) -> list[tuple[str, str, bool]]:
    """The same of from/value turns. A tool call has no text; with the words before it, it is one turn."""
    turns = []
    for turn in conversation:
        role = ROLES[turn["from"]]
        if turn["from"] != "function_call":
            turns.append((role, turn["value"], False))
        elif turns and turns[-1][0] == "assistant":
            turns[-1] = ("assistant", turns[-1][1], True)
        else:
            turns.append((role, "", True))
    return turns


def fault_in(turns: list[tuple[str, str, bool]]) -> str | None:
    """Why these turns are no conversation: perhaps a system turn, then questions and answers, ending in an answer."""
    if any(not text.strip() and not is_call for _, text, is_call in turns):
        return "empty_turn"
    roles = [role for role, *_ in turns]
    roles = roles[1:] if roles[:1] == ["system"] else roles
    if "system" in roles:
        return "system_not_first"
    if roles[:1] != ["user"]:
        return "does_not_begin_with_user"
    follows = {"user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
    if any(after not in follows[before] for before, after in zip(roles, roles[1:], strict=False)):
        return "roles_out_of_order"
    return None if roles[-1] == "assistant" else "last_turn_is_not_assistant"


def read_pair(row_id: str, row: dict) -> Record | str:
    """prompt (a question, or an hh-rlhf transcript), chosen, rejected."""
    if row["chosen"].lstrip().startswith(SPEAKERS) and row["rejected"].lstrip().startswith(SPEAKERS):
        return "not_a_transcript"
    prompt = [("user", row["prompt"], False)]
    if row["prompt"].lstrip().startswith(SPEAKERS):
        parts = re.split(r"(?:^|\n\n)(Human|Assistant): ?", row["prompt"])
        if parts[0].strip() or len(parts) < 3:
            return "not_a_transcript"
        said = zip(parts[1::2], parts[2::2], strict=True)
        prompt = [("user" if who == "Human" else "assistant", text.strip(), False) for who, text in said]
        prompt = prompt[:-1] if prompt[-1] == ("assistant", "", False) else prompt
    if prompt and prompt[-1][0] == "assistant":
        return "prompt_ends_in_assistant"
    prompt = [(role, folded_text(text), False) for role, text, _ in prompt]
    chosen, rejected = folded_text(row["chosen"]), folded_text(row["rejected"])
    for answer in (chosen, rejected):
        if fault := fault_in([*prompt, ("assistant", answer, False)]):
            return fault
    if training_text(row["chosen"]) == training_text(row["rejected"]):
        return "chosen_equals_rejected"
    turns = [(role, text) for role, text, _ in prompt] + [("assistant", chosen), ("assistant", rejected)]
    chars = sum(len(text) + 1 for _, text, _ in prompt) + max(len(chosen), len(rejected))
    return Record(row_id, turns, chosen, chars)


# ------------------------------------------------------------------ rules


def body_of(record: Record) -> str:
    """All turns, joined by line ends."""
    return "\n".join(text for _, text in record.turns)


def key_of(body: str) -> str:
    """What duplicates are found by."""
    return "".join(body.lower().split())


def odd_symbols(body: str) -> bool:
    """Whether too little of it is ordinary."""
    visible = "".join(body.split())
    return len(NOT_ORDINARY.sub("", visible)) < MIN_ORDINARY * len(visible)


def repeats(answer: str) -> bool:
    """Whether too many of its 4-grams are repeats. Under 20 characters nothing does."""
    grams = len(answer) - 3
    return len(answer) >= 20 and 1 - len({answer[i : i + 4] for i in range(grams)}) / grams > MAX_REPETITION


def keywords() -> list[str]:
    """Five phrases, and 3,000 random words of 3 to 6 Han characters: a list as long as a real one, and harmless."""
    phrases = ["加微信领取", "澳门赌场", "代开发票", "作为一个人工智能语言模型", "As an AI language model"]
    dice = random.Random(3)
    lengths = (3, 4, 5, 6)
    words = ["".join(chr(dice.randrange(0x4E00, 0x9FA5)) for _ in range(dice.choice(lengths))) for _ in range(3000)]
    return phrases + words


def keyword_search() -> Callable[[str], bool]:
    """A function that says whether a text holds one of the keywords, in any case, Latin ones as whole words."""
    import ahocorasick_rs

    automaton = ahocorasick_rs.AhoCorasick([word.lower() for word in keywords()], store_patterns=False)

    def has_keyword(body: str) -> bool:
        body = body.lower()
        hits = automaton.find_matches_as_indexes(body, overlapping=True)
        return any(not cuts_a_word(body, start) and not cuts_a_word(body, end) for _, start, end in hits)

    return has_keyword


def cuts_a_word(text: str, place: int) -> bool:
    """Whether letters or digits of a script that is written with spaces (those before U+2E80) meet there."""
    return 0 < place < len(text) and all(
        char < "\u2e80" and (char.isalnum() or char == "_") for char in text[place - 1 : place + 1]
    )


def reason_to_drop(record: Record, body: str, has_keyword: Callable[[str], bool]) -> str | None:
    """The first rule that finds something, duplicates apart."""
    if record.chars < MIN_CHARS:
        return "too_short"
    if record.chars > MAX_CHARS:
        return "too_long"
    if odd_symbols(body):
        return "odd_symbols"
    if repeats(record.answer):
        return "repetition"
    if has_keyword(body):
        return "keywords"
    return "pii" if any(find_pii(text) for _, text in record.turns) else None


# ------------------------------------------------------------------ near duplicates


def shingles(key: str) -> set[str]:
    """Every 5 characters in a row; a shorter key is one shingle."""
    return {key[i : i + SHINGLE] for i in range(len(key) - SHINGLE + 1)} or {key}


def jaccard(one: set, other: set) -> float:
    """Shared / all."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def near_duplicates(keys: list[str]) -> tuple[list[tuple[int, int]], set[int]]:
    """(verified pairs of numbers of keys, the numbers that go). The first of each cluster stays."""
    pairs, parent = [], {}
    first, first_shingles = -1, set()
    for one, other in sorted(candidates(keys)):
        if one != first:
            first, first_shingles = one, shingles(keys[one])
        if jaccard(first_shingles, shingles(keys[other])) >= MIN_JACCARD:
            pairs.append((one, other))
            one, other = root(parent, one), root(parent, other)
            if one != other:
                parent[max(one, other)] = min(one, other)
    return pairs, set(parent)


def candidates(keys: list[str]) -> set[tuple[int, int]]:
    """Pairs whose MinHash values agree in a whole band: of those that share one, each with the first and with the one
    before it."""
    import numpy as np
    from datasketch import MinHash

    empty = MinHash(BANDS * ROWS, seed=1)
    values = np.empty((len(keys), BANDS * ROWS), empty.hashvalues.dtype)
    for number, key in enumerate(keys):
        minhash = empty.copy()
        minhash.update_batch([shingle.encode() for shingle in shingles(key)])
        values[number] = minhash.hashvalues
    found = set()
    for band in range(0, BANDS * ROWS, ROWS):
        seen = {}
        for number in range(len(keys)):
            bucket = values[number, band : band + ROWS].tobytes()
            if bucket in seen:
                first, last = seen[bucket]
                found |= {(first, number), (last, number)}
                seen[bucket] = first, number
            else:
                seen[bucket] = number, number
    return found


def root(parent: dict[int, int], number: int) -> int:
    """The lowest number of a cluster (union-find; Tarjan 1975, with path halving)."""
    while number in parent:
        if parent[number] in parent:
            parent[number] = parent[parent[number]]
        number = parent[number]
    return number


# ------------------------------------------------------------------ the whole


def run(paths: list[Path], records: Path | None = None) -> dict:
    """Ids kept after every rule and before near_duplicate, verified pairs of near duplicates, drop counts.

    records: also write the kept records there, as messages with their folded text.
    """
    has_keyword, dropped, read_count = keyword_search(), Counter(), 0
    ids, keys, digests = [], [], set()
    lines = open(records.with_name(f".{records.name}.part"), "w+", encoding="utf-8") if records else None
    for row_id, row in (item for path in paths for item in rows(path)):
        read_count += 1
        record = read(row_id, row)
        if isinstance(record, str):
            dropped[record] += 1
            continue
        body = body_of(record)
        if reason := reason_to_drop(record, body, has_keyword):
            dropped[reason] += 1
            continue
        key = key_of(body)
        digest = hashlib.sha256(key.encode()).digest()
        if digest in digests:
            dropped["exact_duplicate"] += 1
            continue
        digests.add(digest)
        ids.append(row_id)
        keys.append(key)
        if lines:
            messages = [{"role": role, "content": text} for role, text in record.turns]
            lines.write(json.dumps({"id": row_id, "messages": messages}, ensure_ascii=False) + "\n")
    pairs, gone = near_duplicates(keys)
    dropped["near_duplicate"] = len(gone)
    if lines:
        lines.seek(0)
        with open(records, "w", encoding="utf-8") as out:
            out.writelines(line for number, line in enumerate(lines) if number not in gone)
        lines.close()
        Path(lines.name).unlink()
    return {
        "read": read_count, "dropped": dict(dropped), "before_near_duplicates": ids,
        "kept": [row_id for number, row_id in enumerate(ids) if number not in gone],
        "pairs": [[ids[one], ids[other]] for one, other in pairs],
    }  # fmt: skip


def main() -> None:
    """Write ids and counts as JSON; print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="ids kept, drop counts, CPU seconds, as JSON")
    parser.add_argument("--records", type=Path, help="write the kept records there")
    args = parser.parse_args()
    result = run(args.files, args.records) | {"cpu_s": round(time.process_time(), 3)}
    args.out.write_text(json.dumps(result), encoding="utf-8")
    counts = {name: len(found) for name, found in result.items() if isinstance(found, list)}
    print(f"read {result['read']}, {counts}, dropped {result['dropped']}, CPU {result['cpu_s']:.1f} s")


if __name__ == "__main__":
    main()
