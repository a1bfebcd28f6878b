"""
A corpus of any size for bench/data.py, made from the 40,000 real records of ../shared/bench by seeded recombination.

    python -m bench.data_corpus                  # 60,000 records, and the share of near duplicates among them
    python -m bench.data_corpus --size 1000000

A record takes its form from one real record (layout, number and length of turns) and its sentences from others of the
same language: questions from questions, answers from answers, in runs of about a quarter of a text, so that two records
hardly ever come out alike by chance. One in nine is a copy of an earlier one with small edits instead, of which some
have more edits than a near duplicate may have; one in two hundred an exact copy but for case and white space. Copies
stand in the same block of 1,000 records as their originals, and a block depends on its number alone: so a smaller
corpus is the beginning of a larger one, with the same share of near duplicates, and memory does not grow with the size.
"""

import argparse
import gzip
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # `python bench/data_corpus.py` works like `-m`

from posttrain.text import language  # noqa: E402
from tests import reference  # noqa: E402

SHARED = ROOT.parent / "shared" / "bench" / "sft_zh_en.jsonl.gz"
SHARED_RECORDS = 40_000
SEED, BLOCK = 7, 1000
COPIES, EXACT_COPIES, HEAVY = 0.125, 0.005, 0.15
"""Shares: edited and exact copies among the records, heavily edited ones among the edited copies."""
SHORT = 24  # characters: texts up to this length are one sentence
EDITABLE = 120  # characters: shorter records are not copied with edits, one edit may be too much for them
SENTENCE = re.compile(r"[^。！？!?\n.]{1,160}(?:[。！？!?\n]+|\.(?:\s+|$))?|[。！？!?\n.]+")


class Donors:
    """What records are made of: forms, and the sentences of all questions and all answers by language."""

    def __init__(self, rows: list[dict]):
        self.forms: list[tuple[str, list[tuple[str, int]], dict]] = []
        """(language, (role, characters) of each turn, the row without its texts)."""
        self.sentences: dict[tuple[str, str], list[str]] = {}
        """(language, user | assistant) -> sentences in the order of the corpus."""
        for row in rows:
            said = turns(row)
            if said is None:
                continue
            spoken = "zh" if language(" ".join(text for _, text in said)[:400]) == "zh" else "en"
            self.forms.append((spoken, [(role, len(text)) for role, text in said], rest_of(row)))
            for role, text in said:
                self.sentences.setdefault((spoken, role), []).extend(SENTENCE.findall(text))


def turns(row: dict) -> list[tuple[str, str]] | None:
    """(user | assistant, text) of each turn of a real row; None for rows with tools, systems or a history."""
    if "conversations" not in row:
        asked = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
        return None if row.get("history") else [("user", asked), ("assistant", row["output"])]
    roles = {"human": "user", "gpt": "assistant"}
    if not all(turn["from"] in roles for turn in row["conversations"]):
        return None
    return [(roles[turn["from"]], turn["value"]) for turn in row["conversations"]]


# ------------------------------------------------------------------ one record


def recombined(donors: Donors, dice: Random) -> dict:
    """A new record: the form of one, sentences of others."""
    spoken, form, rest = dice.choice(donors.forms)
    said = [(role, spliced(donors.sentences[spoken, role], length, dice)) for role, length in form]
    return as_row(said, rest)


def spliced(sentences: list[str], length: int, dice: Random) -> str:
    """A text of about this length: runs of sentences that followed each other, none much over a quarter of it."""
    text, run_length = "", length if length <= SHORT else length / 4
    while len(text) < length:
        place, goal = dice.randrange(len(sentences)), min(length, len(text) + run_length)
        while len(text) < goal:
            text += sentences[place % len(sentences)]
            place += 1
    return text.strip() or "。"


def as_row(said: list[tuple[str, str]], rest: dict) -> dict:
    """Two turns as an Alpaca row, more as a ShareGPT row."""
    if [role for role, _ in said] == ["user", "assistant"]:
        return {"instruction": said[0][1], "input": "", "output": said[1][1]} | rest
    names = {"user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[role], "value": text} for role, text in said]} | rest


def edited(row: dict, donors: Donors, dice: Random) -> dict:
    """A copy with small edits spread over its turns: a character replaced, some cut out, a few put in."""
    said = [list(turn) for turn in turns(row)]
    chars = sum(len(text) for _, text in said)
    edits = max(1, round(chars * dice.uniform(0.002, 0.012)))
    edits = edits * 4 if dice.random() < HEAVY else edits
    for _ in range(edits):
        turn = dice.choices(said, [len(text) + 1 for _, text in said])[0]
        place = dice.randrange(len(turn[1]) + 1)
        stranger = dice.choice(donors.sentences["zh", "assistant"])[:2]
        cut = dice.choice((0, 1, 1, 2))
        turn[1] = turn[1][:place] + (stranger if dice.random() < 0.7 else "") + turn[1][place + cut :]
    return as_row(said, rest_of(row))


def respaced(row: dict, dice: Random) -> dict:
    """A copy that only differs in case, white space or invisible characters."""
    change = dice.choice((str.lower, lambda text: text.replace("。", "。\u200b "), lambda text: text + "  \n"))
    return as_row([(role, change(text)) for role, text in turns(row)], rest_of(row))


def rest_of(row: dict) -> dict:
    """What a row holds beside its texts."""
    return {"source": row["source"]}


def block(donors: Donors, number: int) -> list[dict]:
    """The 1,000 records of a block."""
    dice = Random(f"{SEED}:{number}")
    rows: list[dict] = []
    for _ in range(BLOCK):
        chance = dice.random()
        original = dice.choice(rows) if rows else None
        if original and chance < EXACT_COPIES:
            rows.append(respaced(original, dice))
        elif original and chance < EXACT_COPIES + COPIES and sum(len(t) for _, t in turns(original)) >= EDITABLE:
            rows.append(edited(original, donors, dice))
        else:
            rows.append(recombined(donors, dice))
    return rows


# ------------------------------------------------------------------ the file


def lines(size: int) -> Iterator[str]:
    """The first `size` records as JSON lines."""
    donors = Donors([row for _, row in reference.rows(SHARED)])
    for number in range(-(-size // BLOCK)):
        for row in block(donors, number)[: size - number * BLOCK]:
            yield json.dumps(row, ensure_ascii=False) + "\n"


def corpus(size: int, directory: Path) -> Path:
    """The file of `size` records, made if it is not there: the real ones themselves if that is their number."""
    path = directory / ("sft_zh_en.jsonl" if size == SHARED_RECORDS else f"recombined_{size}.jsonl")
    if path.exists():
        return path
    directory.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    if size == SHARED_RECORDS:
        with gzip.open(SHARED) as packed, open(part, "wb") as out:
            shutil.copyfileobj(packed, out)
    else:
        with open(part, "w", encoding="utf-8") as out:
            out.writelines(lines(size))
    return part.rename(path)


def near_duplicate_share(path: Path) -> float:
    """Records that the reference drops as near duplicates, as a share of all."""
    result = reference.run([path])
    return result["dropped"]["near_duplicate"] / result["read"]


def main() -> None:
    """Make a corpus; print its size and, up to 100,000 records, its share of near duplicates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=60_000)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "bench")
    args = parser.parse_args()
    if not SHARED.exists():
        print(f"{SHARED}: the shared records are not beside this checkout; nothing to make a corpus of")
        return
    began = time.process_time()
    path = corpus(args.size, args.out)
    print(f"{path}: {path.stat().st_size / 1e6:.0f} MB, {time.process_time() - began:.0f} s CPU")
    if args.size <= 100_000:
        print(f"near duplicates, verified by tests/reference.py: {near_duplicate_share(path):.1%}")


if __name__ == "__main__":
    main()
