"""A training row for a person to check: as text, and token by token."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase as Tokenizer

from posttrain.chat import IGNORED
from posttrain.rendering import token_text


def marked(tokenizer: Tokenizer, ids: list[int], labels: list[int]) -> str:
    """A row as text with what is trained between 【 and 】."""
    text = ""
    for learned, run in groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED):
        piece = tokenizer.decode([token for token, _ in run])
        text += f"【{piece}】" if learned else piece
    return text


def token_lines(tokenizer: Tokenizer, ids: list[int], labels: list[int], limit: int) -> list[str]:
    """Position, id, mark of training and text of up to `limit` tokens of a row: those nearest to where training begins
    or ends, and to both ends of the row. What lies between is counted."""
    learned = [label != IGNORED for label in labels]
    borders = [0, len(ids), *(i for i in range(1, len(ids)) if learned[i] != learned[i - 1])]
    near = sorted(range(len(ids)), key=lambda i: (min(abs(i + 0.5 - border) for border in borders), i))
    lines, following = [], 0
    for i in [*sorted(near[:limit]), len(ids)]:
        if i > following:
            lines.append(f"{'...':>6}  {i - following} tokens, {sum(learned[following:i])} of them trained")
        if i < len(ids):
            lines.append(f"{i:>6} {ids[i]:>7} {'*' if learned[i] else ' '} {token_text(tokenizer, ids[i])}")
        following = i + 1
    return lines


def answers_without_end(rows: Sequence[dict] | Dataset, end: int) -> int:
    """Conversations or pairs of a trainer's rows whose last answer does not end in the token `end`, because it is cut
    or the template leaves it out. A packed row holds several conversations."""
    table = (rows if isinstance(rows, Dataset) else Dataset.from_list(list(rows))).with_format("arrow")[:]
    if not len(table):
        return 0
    if "chosen_ids" in table.column_names:
        ends = [_lists(table, side)[0][_lists(table, side)[1] - 1] for side in ("chosen_ids", "rejected_ids")]
        return int(((ends[0] != end) | (ends[1] != end)).sum())
    labels, stops = _lists(table, "labels")
    if "seq_lengths" in table.column_names:
        stops = np.cumsum(_lists(table, "seq_lengths")[0])
    return int((labels[stops - 1] != end).sum())


def _lists(table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """(all values of a column of lists, where each list stops)."""
    lists = table[column].combine_chunks()
    return lists.flatten().to_numpy(zero_copy_only=False), np.cumsum(lists.value_lengths().to_numpy())
