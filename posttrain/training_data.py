"""The data of a training run: the records in its files, the rows made of them, and what became of every one."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain import runs
from posttrain.blocks import Training
from posttrain.config import shown
from posttrain.errors import UserFault


@dataclass
class Records:
    """What the data files hold: records to train on and to validate with; rows of no use, duplicates and repairs."""

    train: list[dict]
    val: list[dict]
    fates: Counter
    val_fates: Counter
    dropped: list[dict[str, str]]
    notes: list[str]


def read_records(cfg: Training, kind: str, read) -> Records:
    """The records of the config's files. `read` is data.sources.read_training_file: it raises UserFault for a file with
    too many unusable rows; fewer are left out, counted and said. A row that stands twice is trained once."""
    out, seen = Records([], [], Counter(), Counter(), [], []), set()
    for file in cfg.data.validation_files:
        records, reasons, faults = read(file, kind, cfg.data.max_bad_rows)
        out.val += records
        out.val_fates.update(reasons)
        out.dropped += [{"reason": "unusable", "where": fault} for fault in faults]
    validated = {_content(record) for record in out.val}
    for file in cfg.data.train_files:
        records, reasons, faults = read(file, kind, cfg.data.max_bad_rows)
        out.fates.update(reasons)
        out.dropped += [{"reason": "unusable", "where": fault} for fault in faults]
        if faults:
            out.notes.append(f"{shown(file)}: {len(faults)} unusable rows left out, the first: {faults[0]}")
        for record in records:
            content = _content(record)
            reason = "in_validation" if content in validated else "exact_duplicate" if content in seen else None
            seen.add(content)
            if reason is None:
                out.train.append(record)
            else:
                out.fates[reason] += 1
                out.dropped.append({"id": record["id"], "source": record["source"], "reason": reason})
    repairs = Counter(name for record in out.train for name in record["meta"].get("repairs", []))
    out.notes += [f"{count} records repaired: {name}" for name, count in repairs.items()]
    if out.fates["exact_duplicate"]:
        out.notes.append(f"{out.fates['exact_duplicate']} rows stand twice and are trained once")
    if out.fates["in_validation"]:
        out.notes.append(f"{out.fates['in_validation']} rows stand in the validation too and are not trained")
    return out


def _content(record: dict) -> str:
    return json.dumps([record.get(part) for part in ("messages", "prompt", "chosen", "rejected", "tools")])


@dataclass
class Rows:
    """Encoded training and validation rows with what became of every record."""

    train: list[dict]
    val: list[dict]
    fates: Counter
    val_fates: Counter
    dropped: list[dict[str, str]]
    tokens: int
    trained_tokens: int
    notes: list[str]

    def facts(self) -> dict[str, Any]:
        """As they stand in a manifest."""
        return {
            "train_rows": len(self.train), "val_rows": len(self.val), "fates": dict(self.fates),
            "val_fates": dict(self.val_fates), "tokens": self.tokens, "trained_tokens": self.trained_tokens,
            "notes": self.notes,
        }  # fmt: skip


def require_rows(rows: Rows) -> None:
    """UserFault if nothing is left to train on: saying what became of the records."""
    if not rows.train:
        fates = ", ".join(f"{reason} {count}" for reason, count in rows.fates.items()) or "the files are empty"
        raise UserFault(f"no row is left to train on ({fates})\n  choose: a larger trainer.max_length, "
                        "data.on_too_long=truncate_left_turns, prefer_chinese_ratio=null (pairs), or other "
                        "data.train_files")  # fmt: skip


def data_parents(files: list[Path], kind: str) -> dict[str, Path]:
    """The manifests of prepare_data beside the training files, if they come from there. UserFault for a file that
    prepare_data did not finish, or that was changed since."""
    manifests = []
    for file in files:
        path = file.parent / f"{kind}_manifest.json"
        manifest, status = runs.read_json(path), runs.read_json(file.parent / f"{kind}_status.json")
        if not file.name.startswith(f"{kind}_") or (manifest is None and status is None):
            continue
        if manifest is None:
            raise UserFault(f"{shown(file)}: prepare_data did not build it to the end (it is {status['state']}); run "
                            "prepare_data again")  # fmt: skip
        if runs.sha256(file) not in {entry["sha256"] for entry in manifest["outputs"]}:
            raise UserFault(f"{shown(file)}: changed since prepare_data wrote it; run prepare_data again, or train "
                            "on a copy under another name as a file of your own")  # fmt: skip
        manifests += [path] if path not in manifests else []
    return {f"data_{number}" if number > 1 else "data": path for number, path in enumerate(manifests, 1)}
