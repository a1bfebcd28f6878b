"""
The data stage: raw files -> data_proc/{sft,pref}_{train,val,test}.jsonl, and the account of every row.

Records are cleaned one at a time and laid aside in a file; in memory remain 26 bytes of each and the digest that finds
duplicates. Quotas and split are decided at the end and the chosen records written in an order that follows from the
seed, so that the head of a file is a fair sample of it.
"""

import json
import os
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import zstandard
from tqdm import tqdm

from posttrain.config import Loaded, shown
from posttrain.data.card import Statistics, write_card
from posttrain.data.catalogue import Source, load_catalogue, sources_of
from posttrain.data.clean import clean
from posttrain.data.dedup import ExactDuplicates
from posttrain.data.hub import download_source
from posttrain.data.jsonfiles import Fault
from posttrain.data.mix import SIDES, prompt_hash, quotas, split, unit_hash
from posttrain.data.reading import Account, items_of
from posttrain.errors import UserFault
from posttrain.records import write_jsonl
from posttrain.runs import Run, describe_file
from posttrain.stages import PrepareData

TEXT_FORM = "zh_safe"


class DroppedFile:
    """{sft,pref}_dropped.jsonl.zst: a line per dropped row or record, counted in its source's account. In place under
    its name only when kept as a whole."""

    def __init__(self, path: Path, accounts: dict[str, Account], statistics: Statistics):
        self.path, self.part = path, path.with_name(f".{path.name}.part")
        self.accounts, self.statistics = accounts, statistics

    def __enter__(self):
        self.file = open(self.part, "wb")
        self.out = zstandard.ZstdCompressor(level=3).stream_writer(self.file)
        return self

    def write(self, reason: str, detail: str, source: str, file: str, line: int, record: Any) -> None:
        self.accounts[source].dropped[reason] += 1
        self.statistics.saw_dropped(reason, detail, source, f"{file}:{line}", record)
        entry = {"reason": reason, "detail": detail, "source": source, "file": file, "line": line, "record": record}
        # A lone surrogate cannot be encoded; written as \udXXX it is the JSON escape that it came from.
        self.out.write((json.dumps(entry, ensure_ascii=False, default=str) + "\n").encode("utf-8", "backslashreplace"))

    def keep(self) -> None:
        self.out.close()
        os.replace(self.part, self.path)

    def __exit__(self, *error) -> None:
        self.file.close()
        self.part.unlink(missing_ok=True)


class LaidAside:
    """Cleaned records on disk, with what quota and split need of each in memory. The file goes with the block."""

    def __init__(self, path: Path):
        self.path = path
        self.source, self.order, self.prompt, self.offset = array("H"), array("Q"), array("Q"), array("Q")

    def __enter__(self):
        self.file = open(self.path, "w+b")
        return self

    def add(self, record: dict, source: int, seed: int) -> None:
        self.source.append(source)
        self.order.append(unit_hash(seed, record["id"]))
        self.prompt.append(prompt_hash(record, seed))
        self.offset.append(self.file.tell())
        self.file.write(json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")

    def read(self, number: int) -> dict:
        self.file.seek(self.offset[number])
        return json.loads(self.file.readline())

    def __exit__(self, *error) -> None:
        self.file.close()
        self.path.unlink(missing_ok=True)


# ------------------------------------------------------------------ the stage


def build(loaded: Loaded, kind: str, sources: list[Source], run: Run, inputs: dict) -> dict:
    """Make one of the two sets from its sources, whose files are there. Returns the manifest."""
    config, directory, prefix = loaded.config, run.dir, f"{kind}_"
    accounts = {source.key: Account() for source in sources}
    statistics = Statistics(config.tokenizer)
    max_samples = getattr(config, kind).max_samples
    with (
        DroppedFile(directory / f"{prefix}dropped.jsonl.zst", accounts, statistics) as dropped,
        LaidAside(directory / f".{prefix}clean.jsonl.part") as aside,
    ):
        gather(kind, sources, accounts, config, dropped, aside)
        taken = choose(aside, sources, accounts, max_samples)
        for number in sorted(set(range(len(aside.order))) - taken):
            record = aside.read(number)
            place = (record["source"], record["meta"]["file"], record["meta"]["line"])
            dropped.write("quota", "more records than the mix has room for", *place, record)
        for key, account in accounts.items():
            account.check(key)
        if not taken:
            raise UserFault(nothing_left(kind, accounts))
        sides, moved = split(sorted({aside.prompt[n] for n in taken}), config.split)
        outputs, splits = write_sides(aside, taken, sides, directory, prefix, statistics)
        dropped.keep()
    results = {
        "kind": kind, "text_form": TEXT_FORM, **totals(accounts), "prompts": len(sides), "splits": splits,
        "prompts_moved_to_fill_a_side": len(moved), "sources": {k: a.as_json() for k, a in accounts.items()},
        "mix": mix_table(sources, accounts, max_samples), **statistics.as_json(),
    }  # fmt: skip
    card = write_card(directory / f"{prefix}card.md", loaded, kind, sources, results, statistics)
    manifest = run.finish("data", inputs, [*outputs, dropped.path, card], results=results)
    print(summary(kind, results, directory), flush=True)
    return manifest


def gather(kind: str, sources: list[Source], accounts: dict[str, Account], config: PrepareData, dropped: DroppedFile,
           aside: LaidAside) -> None:  # fmt: skip
    """Read and clean every source: what is clean and new is laid aside, everything else is dropped with its reason."""
    duplicates = ExactDuplicates()
    for number, source in enumerate(sources):
        account = accounts[source.key]
        items = items_of(source, kind, account, config.max_bad_rows)
        for item in tqdm(items, desc=source.key, unit=" rows", mininterval=1, disable=None):
            account.read += 1
            place = (source.key, shown(item.file), item.line)
            if isinstance(item.result, Fault):
                dropped.write(*item.result, *place, item.raw)
                continue
            record, reason = clean(item.result, source.rules)
            record["meta"] |= {"file": place[1], "line": place[2]}
            earlier = None if reason else duplicates.first_like(record)
            if reason or earlier:
                dropped.write(reason or "exact_duplicate", f"of {earlier}" if earlier else "", *place, record)
                continue
            account.repairs.update(record["meta"].get("repairs", []))
            account.available += 1
            aside.add(record, number, config.seed)
        print(f"{kind}: {source.key}: {account.rows} rows, {account.available} clean records", flush=True)


def choose(aside: LaidAside, sources: list[Source], accounts: dict[str, Account], max_samples: int) -> set[int]:
    """The numbers of the records that the quotas take: of each source those whose hash comes first."""
    available = {key: account.available for key, account in accounts.items()}
    weights = {source.key: source.weight for source in sources}
    quota = quotas(available, weights, max_samples)
    taken = set()
    for number, source in enumerate(sources):
        own = [n for n in range(len(aside.order)) if aside.source[n] == number]
        chosen = sorted(own, key=lambda n: (aside.order[n], n))[: quota[source.key]]
        accounts[source.key].kept = len(chosen)
        taken.update(chosen)
    return taken


def write_sides(aside: LaidAside, taken: set[int], sides: dict[int, str], directory: Path, prefix: str,
                statistics: Any) -> tuple[list[Path], dict[str, int]]:  # fmt: skip
    """Write train, val and test, each in the order of the hashes. Returns the files and their counts."""
    ordered = sorted(taken, key=lambda n: (aside.order[n], n))
    outputs, counts = [], {}
    for side in SIDES:
        path = directory / f"{prefix}{side}.jsonl"
        records = (statistics.saw_kept(aside.read(n), side) for n in ordered if sides[aside.prompt[n]] == side)
        counts[side] = write_jsonl(path, tqdm(records, desc=path.name, unit=" records", mininterval=1, disable=None))
        outputs.append(path)
    return outputs, counts


def totals(accounts: dict[str, Account]) -> dict:
    """Sums over the sources."""
    dropped = sum((account.dropped for account in accounts.values()), Counter())
    sums = {name: sum(getattr(a, name) for a in accounts.values()) for name in ("rows", "read", "kept")}
    return sums | {"dropped": dict(dropped.most_common())}


def mix_table(sources: list[Source], accounts: dict[str, Account], max_samples: int) -> dict:
    """Per source: its weight, what the mix asked for, what was there after cleaning, what was taken."""
    total = sum(source.weight for source in sources)
    return {
        source.key: {
            "weight": source.weight, "asked": round(max_samples * source.weight / total),
            "available": accounts[source.key].available, "taken": accounts[source.key].kept,
        }
        for source in sources
    }  # fmt: skip


def nothing_left(kind: str, accounts: dict[str, Account]) -> str:
    """The message of a set in which no record remains."""
    lines = [f"    {key}: read {a.read}, dropped {dict(a.dropped.most_common(6))}" for key, a in accounts.items()]
    return "\n".join([f"{kind}: no record is left after cleaning", *lines,
                      "  look at the bounds (rules.*, and `rules` of the set in the catalogue), then at the rows"])


def summary(kind: str, results: dict, directory: Path) -> str:
    """The last lines of a run."""
    lines = [f"\n{kind}: read {results['read']}, kept {results['kept']}, dropped {sum(results['dropped'].values())}"]
    lines += [f"  {reason:<32}{count:>9}" for reason, count in results["dropped"].items()]
    sides = ", ".join(f"{side} {count}" for side, count in results["splits"].items())
    return "\n".join([*lines, f"  splits: {sides}", f"  card: {shown(directory / f'{kind}_card.md')}"])


# ------------------------------------------------------------------ sources on disk


def resolved_sources(loaded: Loaded, kind: str) -> list[Source]:
    """The sources of one mix, those that are missing downloaded first."""
    config = loaded.config
    catalogue = load_catalogue(config.catalogue)
    sources, faults = sources_of(loaded, kind, catalogue)
    if faults:
        raise UserFault("\n".join(faults))
    for source in sources:
        if not source.files:
            download_source(source.key, source.entry.model_dump(), config.raw_dir, config.hub)
    return sources_of(loaded, kind, catalogue)[0]


def inputs_of(sources: list[Source]) -> dict[str, dict]:
    """The raw files as they stand in the manifest: `key/file` -> path, sha256, bytes."""
    return {f"{source.key}/{file.relative_to(source.directory)}": describe_file(file)
            for source in sources for file in source.files}  # fmt: skip
