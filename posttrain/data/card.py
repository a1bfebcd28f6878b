"""The data card: what is in a set, where it is from, what was left out and why; Markdown beside the files."""

import json
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

from posttrain.config import Loaded, in_project, shown
from posttrain.errors import UserFault

SAMPLES = 3
EXCERPT = 400


def load_tokenizer(name: str) -> Any:
    """A tokenizer that is on disk already: a directory, or a hub id in the cache. UserFault if it is not."""
    from transformers import AutoTokenizer

    path = in_project(Path(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path if path.exists() else name, local_files_only=True)
    except (OSError, ValueError) as error:
        what = "holds no tokenizer" if path.exists() else "is not on disk"
        raise UserFault(f"tokenizer: {name} {what} ({str(error).splitlines()[0]}); "
                        "give a directory, or null for characters only") from None  # fmt: skip
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # made by transformers from a config.json alone
        raise UserFault(f"tokenizer: {name} holds no tokenizer (no vocabulary); give a directory, or null for "
                        "characters only")  # fmt: skip
    return tokenizer


class Statistics:
    """Gathered while records are written and dropped: lengths, languages, and a few examples of each fate."""

    def __init__(self, tokenizer: str | None):
        self.tokenizer = load_tokenizer(tokenizer) if tokenizer else None
        self.chars, self.tokens, self.turns = [], [], []
        self.languages: Counter = Counter()
        self.kept_samples: list[dict] = []
        self.dropped_samples: dict[str, list[dict]] = {}

    def saw_kept(self, record: dict, side: str) -> dict:
        """Count a record that is written to a side, and hand it on."""
        turns = record.get("messages", record.get("prompt", []))
        self.chars.append(record["meta"]["chars"])
        self.turns.append(sum(turn["role"] == "user" for turn in turns))
        self.languages[record["meta"]["lang"]] += 1
        if self.tokenizer:
            self.tokens.append(self._token_count(record))
        if side == "train" and len(self.kept_samples) < SAMPLES:
            self.kept_samples.append(record)
        return record

    def saw_dropped(self, reason: str, detail: str, source: str, place: str, record: Any) -> None:
        """Remember the first few of each reason."""
        samples = self.dropped_samples.setdefault(reason, [])
        if len(samples) < SAMPLES:
            samples.append({"source": source, "place": place, "detail": detail, "record": record})

    def _token_count(self, record: dict) -> int:
        """Tokens of the texts of one training sequence, without the chat template's marks."""
        sides = [record["messages"]] if "messages" in record else [
            record["prompt"] + record[side] for side in ("chosen", "rejected")]  # fmt: skip
        encoded = [sum(len(self.tokenizer.encode(t["content"], add_special_tokens=False)) for t in s) for s in sides]
        return max(encoded)

    def as_json(self) -> dict:
        numbers = {"chars": spread(self.chars), "turns": spread(self.turns)}
        numbers |= {"tokens": spread(self.tokens)} if self.tokenizer else {}
        return numbers | {"languages": dict(self.languages.most_common())}


def spread(values: list[int]) -> dict[str, float]:
    """Total, mean and percentiles of a list of numbers."""
    if not values:
        return {}
    ordered = sorted(values)
    at = {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (5, 50, 95, 99)}
    return {"total": sum(values), "mean": round(mean(values), 1), "min": ordered[0], **at, "max": ordered[-1]}


def table(head: list[str], rows: list[list[Any]]) -> list[str]:
    """A Markdown table."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in cells), ""]


def excerpt(record: Any) -> str:
    """The beginning of a record, indented so that Markdown shows it as it is."""
    text = json.dumps(record, ensure_ascii=False, default=str)
    text = text if len(text) <= EXCERPT else text[:EXCERPT] + " ..."
    return "    " + text.encode("utf-8", "backslashreplace").decode()


def write_card(path: Path, loaded: Loaded, kind: str, sources: list, results: dict, statistics: Statistics) -> Path:
    """Write the card; `results` are the numbers of the manifest."""
    config = loaded.config
    name = {"sft": "Conversations for SFT", "pref": "Preference pairs"}[kind]
    lines = [f"# {name}", ""]
    lines += [f"Made by `python -m scripts.prepare_data --config {shown(loaded.path)}`, seed {config.seed}.",
              f"Text form: `{results['text_form']}` (posttrain/text.py: NFC, full-width letters and digits folded, "
              "invisible characters dropped, code blocks left as they are; Chinese punctuation kept).", ""]  # fmt: skip
    lines += ["## Sizes", ""] + table(["split", "records"], [[s, n] for s, n in results["splits"].items()])
    moved = results["prompts_moved_to_fill_a_side"]
    lines += [f"{results['prompts']} different first questions; each stands on one side only. "
              f"{moved} were moved to fill a side that would have been empty.", ""]  # fmt: skip
    lines += source_lines(sources, results)
    lines += ["## What was dropped", ""] + dropped_table(results)
    lines += ["`read` counts conversations or pairs, and rows that gave none; `read = kept + dropped` is checked. "
              f"Every dropped row, with reason, file and line, is in `{kind}_dropped.jsonl.zst`.", ""]  # fmt: skip
    lines += ["## Lengths and languages", ""]
    units = [u for u in ("chars", "tokens", "turns") if results.get(u)]
    lines += table(["", *results["chars"]], [[unit, *results[unit].values()] for unit in units])
    if "tokens" in results:
        lines += [f"Tokens of `{config.tokenizer}`, without the chat template's marks.", ""]
    lines += table(["language", "records", "share"],
                   [[k, n, f"{n / results['kept']:.1%}"] for k, n in results["languages"].items()])  # fmt: skip
    lines += ["## Samples of what was kept", ""]
    for record in statistics.kept_samples:
        lines += [excerpt(record), ""]
    lines += ["## Samples of what was dropped", ""]
    for reason, samples in sorted(statistics.dropped_samples.items()):
        lines += [f"**{reason}**", ""]
        for sample in samples:
            place = f"{sample['place']} {sample['detail'][:200]}".strip()
            lines += [place.replace("`", "'"), "", excerpt(sample["record"]), ""]
    path.write_text("\n".join(lines).encode("utf-8", "backslashreplace").decode(), encoding="utf-8")
    return path


def source_lines(sources: list, results: dict) -> list[str]:
    """The section on sources: licences and limits, the mix, and the counts of each."""
    described = []
    for source in sources:
        entry = source.entry
        facts = ["your own files", "", "", "-"]
        if entry:
            facts = [entry.licence, entry.limits, entry.language, entry.hub or "-"]
        described.append([source.key, *facts, len(source.files)])
    lines = ["## Sources", ""] + table(["key", "licence", "limits", "language", "hub", "files"], described)
    mix = [[key, m["weight"], m["asked"], m["available"], m["taken"]] for key, m in results["mix"].items()]
    lines += table(["source", "weight", "asked", "available after cleaning", "taken"], mix)
    counted = []
    for key, a in results["sources"].items():
        repairs = ", ".join(f"{name} {n}" for name, n in a["repairs"].items()) or "none"
        counted.append([key, a["rows"], a["rows_used"], a["rows_dropped"], a["read"], a["kept"], repairs])
    head = ["source", "rows", "rows used", "rows dropped", "records read", "kept", "repaired"]
    return lines + table(head, counted)


def dropped_table(results: dict) -> list[str]:
    """Reason by source."""
    keys = list(results["sources"])
    rows = [[reason, *(results["sources"][key]["dropped"].get(reason, 0) for key in keys), total]
            for reason, total in results["dropped"].items()]  # fmt: skip
    return table(["reason", *keys, "all"], rows) if rows else ["Nothing.", ""]
