"""
Plain text files (.txt): documents, or lines of text and label.

A file of at most WHOLE_BYTES is one document. A larger one holds many: they stand between blank lines, or on a line
each where there is no blank line in the first MiB. A file whose first lines are each two cells with one tab between
them is a table of labels (THUCNews: title and class number; cnews: class name and article), large or small.
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from posttrain.data.jsonfiles import Fault

WHOLE_BYTES = 256 << 10
LABELLED_LINES = 20  # looked at before a file is taken for a table of labels
CLASSES = "class.txt"  # beside a table of labels: a class name per line, the number of a class is its line from 0
_NUMBER = re.compile(r"\d+")


def layout_of_text(head: bytes) -> str:
    """`labels`, `whole`, `blank_lines` or `lines`, by the first bytes of a file (over WHOLE_BYTES if it has them)."""
    lines = [line for line in head.split(b"\n") if line.strip()][:LABELLED_LINES]
    if len(lines) > 1 and all(line.strip().count(b"\t") == 1 for line in lines):
        return "labels"
    if len(head) <= WHOLE_BYTES:
        return "whole"
    inner = head.strip().split(b"\n")
    return "blank_lines" if any(not line.strip() for line in inner) else "lines"


def text_rows(stream: BinaryIO, layout: str, path: Path) -> Iterator[tuple[int, Any]]:
    """(line where it begins, row) of each document: {text}, with `folder`, the name of the directory, if the file is
    one document. Of a table of labels: {text, label, classes?} of each line, classes from a class.txt beside it."""
    chars = io.TextIOWrapper(stream, encoding="utf-8-sig")
    if layout == "labels":
        yield from _labelled(chars, _classes_beside(path))
    elif layout == "whole":
        text = chars.read().strip("\n")
        if text.strip():
            yield 1, {"text": text, "folder": path.resolve().parent.name}
    elif layout == "lines":
        yield from ((number, {"text": line.rstrip("\n")}) for number, line in enumerate(chars, 1) if line.strip())
    else:
        yield from _between_blank_lines(chars)


def _between_blank_lines(chars: io.TextIOWrapper) -> Iterator[tuple[int, Any]]:
    lines, begin, number = [], 1, 0
    for number, line in enumerate(chars, 1):
        if line.strip():
            begin = begin if lines else number
            lines.append(line)
        elif lines:
            yield begin, {"text": "".join(lines).rstrip("\n")}
            lines = []
    if lines:
        yield begin, {"text": "".join(lines).rstrip("\n")}


def _labelled(chars: io.TextIOWrapper, classes: list[str]) -> Iterator[tuple[int, Any]]:
    """The label is the last cell where that is a number, else the first."""
    shared = {"classes": classes} if classes else {}
    for number, line in enumerate(chars, 1):
        if not line.strip():
            continue
        cells = line.strip("\n").split("\t")
        if len(cells) != 2:
            yield number, Fault("wrong_cell_count", f"{len(cells)} cells where text and label are two: {line[:80]!r}")
            continue
        label_last = _NUMBER.fullmatch(cells[1].strip()) is not None
        text, label = cells if label_last else cells[::-1]
        yield number, {"text": text.strip(), "label": label.strip(), **shared}


def _classes_beside(path: Path) -> list[str]:
    file = path.parent / CLASSES
    if not file.is_file():
        return []
    return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
