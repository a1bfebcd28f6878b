"""Which items of a benchmark stand in the files that an adapter was trained on: decontamination, asked afterwards."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from posttrain.data import benchmarks, decontaminate
from posttrain.data.files import read_rows
from posttrain.text import folded_text

RECORDS = 2000  # looked at together
NO_TEXT = ("id", "source", "meta", "role", "from")  # keys whose values are never trained on


def items_in_files(rows: dict[str, list[Any]], files: list[Path], min_coverage: float = 0.5) -> dict[str, set[int]]:
    """Task -> the places of its rows that a record of the files leaks, in the words of data/decontaminate.py.

    rows: task -> rows of a benchmark in any published layout. files: as they were trained on, in any layout.
    """
    index, owners = _index(rows)
    found: dict[str, set[int]] = {task: set() for task in rows}
    for file in files:
        reading = (row for _, row in read_rows(file))
        while some := list(islice(reading, RECORDS)):
            texts = [[folded_text(text) for text in _texts(row)] for row in some]
            for _, item, _ in decontaminate.items_in(index, texts, min_coverage):
                for task, place in owners[item]:
                    found[task].add(place)
    return found


def _index(rows: dict[str, list[Any]]) -> tuple[decontaminate.Benchmarks, list[list[tuple[str, int]]]]:
    """The index, and for each of its items the rows that it stands for: one text may stand in several."""
    owners: dict[Any, list[tuple[str, int]]] = {}
    for task, some in rows.items():
        for place, row in enumerate(some):
            for texts in benchmarks.texts_of(row):
                owners.setdefault(texts, []).append((task, place))
    items = [benchmarks.Item("", str(number), question, options) for number, (question, options) in enumerate(owners)]
    index = decontaminate.index_of(items)
    # index_of keeps one of the items that are equal once folded, under its first name
    kept = {int(name): number for number, name in enumerate(index.names)}
    by_item: list[list[tuple[str, int]]] = [[] for _ in index.names]
    folded: dict[Any, int] = {}
    for number, (question, options) in enumerate(owners):
        key = tuple(map(folded_text, question)), frozenset(map(folded_text, options))
        by_item[folded.setdefault(key, kept.get(number, 0))] += owners[question, options]
    return index, by_item


def _texts(row: Any) -> Iterator[str]:
    """Every text of a row of any layout that can be trained on: Alpaca, ShareGPT, records, plain text."""
    if isinstance(row, str):
        yield row
    elif isinstance(row, list):
        for part in row:
            yield from _texts(part)
    elif isinstance(row, dict):
        for name, value in row.items():
            if name not in NO_TEXT:
                yield from _texts(value)
