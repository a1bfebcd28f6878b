"""Reading: a source's files -> every record and every fault in them, with an account in which nothing goes missing."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.config import shown
from posttrain.data import oasst
from posttrain.data.catalogue import Source
from posttrain.data.files import read_rows
from posttrain.data.jsonfiles import Fault
from posttrain.data.sources import BY_CHOICE, check_bad_rows, conversation_records, to_records
from posttrain.errors import CheckFailed

HOPELESS_ROWS = 1000  # a file without one usable row among its first thousand is not read to its end


class Item(NamedTuple):
    """What became of a raw row: a record or a Fault, with the place it came from."""

    file: Path
    line: int
    raw: Any
    result: dict | Fault


@dataclass
class Account:
    """The fate of everything read from one source. `read` counts conversations or pairs, and rows that gave none."""

    rows: int = 0
    rows_used: int = 0
    rows_dropped: int = 0
    read: int = 0
    available: int = 0
    kept: int = 0
    dropped: Counter = field(default_factory=Counter)
    repairs: Counter = field(default_factory=Counter)

    def check(self, key: str) -> None:
        """CheckFailed if anything is unaccounted for."""
        dropped = sum(self.dropped.values())
        if self.kept + dropped != self.read or self.rows_used + self.rows_dropped != self.rows:
            raise CheckFailed(
                f"{key}: the accounts do not add up: kept {self.kept} + dropped {dropped} of {self.read} read; "
                f"rows used {self.rows_used} + dropped {self.rows_dropped} of {self.rows}. Please report this."
            )

    def as_json(self) -> dict:
        return {
            "rows": self.rows, "rows_used": self.rows_used, "rows_dropped": self.rows_dropped, "read": self.read,
            "available": self.available, "kept": self.kept, "dropped": dict(self.dropped.most_common()),
            "repairs": dict(self.repairs.most_common()),
        }  # fmt: skip


def items_of(source: Source, kind: str, account: Account, max_bad_rows: float) -> Iterator[Item]:
    """Every record and every Fault of a source, file by file. UserFault for a file with too many unusable rows."""
    entry, messages, places = source.entry, [], []
    preferred, columns = (entry.format, entry.columns) if entry else ("auto", {})
    for file in source.files:
        rows, bad = 0, []
        for line, row in read_rows(file):
            rows += 1
            if kind == "sft" and (oasst.is_message(row) or oasst.is_tree(row)):
                flat = [row] if oasst.is_message(row) else oasst.flat_messages(row)
                messages += flat
                places += [(file, line)] * len(flat)
                continue
            found = to_records(row, source.key, kind, preferred, columns, source.options)
            account.rows += 1
            if all(isinstance(item, Fault) for item in found):
                account.rows_dropped += 1
                bad += [_bad_line(file, line, item) for item in found[:1] if item.reason not in BY_CHOICE]
                if len(bad) == rows == HOPELESS_ROWS:
                    check_bad_rows(file, rows, len(bad), bad, max_bad_rows)
            else:
                account.rows_used += 1
            for item in found:
                yield Item(file, line, row, item)
        check_bad_rows(file, rows, len(bad), bad, max_bad_rows)
    if messages:
        yield from _tree_items(source, messages, places, account, max_bad_rows)


def _tree_items(source: Source, messages: list, places: list, account: Account, max_bad_rows: float) -> Iterator[Item]:
    """Open Assistant messages of all files of a source together: the unit of the rows is the message."""
    items = conversation_records(messages, source.key, source.options)
    rows_in, bad_in, used = Counter(file for file, _ in places), {}, set()
    for indices, item in items:
        used.update(indices if isinstance(item, dict) else ())
        if isinstance(item, Fault) and item.reason not in BY_CHOICE:
            bad_in.setdefault(places[indices[0]][0], []).append(_bad_line(*places[indices[0]], item))
    for file, bad in bad_in.items():
        check_bad_rows(file, rows_in[file], len(bad), bad, max_bad_rows)
    account.rows += len(messages)
    account.rows_used += len(used)
    account.rows_dropped += len(messages) - len(used)
    for indices, item in items:
        yield Item(*places[indices[0]], [messages[index] for index in indices], item)


def _bad_line(file: Path, line: int, fault: Fault) -> str:
    return f"{shown(file)}:{line}: {fault.reason}: {fault.detail}"
