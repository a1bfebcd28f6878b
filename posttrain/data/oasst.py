"""
Open Assistant: messages that reply to messages -> conversations.

The unit of the accounts is the message: each is in at least one conversation or dropped with its reason. Both exports
are read, the flat one (a row per message: message_id, parent_id, text, role) and the trees (replies inside replies).
"""

from collections import deque
from typing import Any

from posttrain.data.jsonfiles import Fault
from posttrain.data.turns import ROLE_OF, excerpt

IDS = (("message_id", "parent_id"), ("user_message_id", "parent_message_id"))


def is_message(row: Any) -> bool:
    """Whether a row is one message of the flat export (the seed files name their ids otherwise)."""
    return isinstance(row, dict) and {"text", "role"} <= row.keys() and "replies" not in row and any(
        own in row for own, _ in IDS)  # fmt: skip


def is_tree(row: Any) -> bool:
    """Whether a row is a whole tree: {message_tree_id, prompt: {..., replies}} or a root message with its replies."""
    if not isinstance(row, dict):
        return False
    root = row["prompt"] if isinstance(row.get("prompt"), dict) else row
    return isinstance(root.get("replies"), list) and "text" in root


def flat_messages(row: dict) -> list[dict]:
    """The messages of a tree as flat rows, parents before replies; replies that are not mappings as they are."""
    root = row["prompt"] if isinstance(row.get("prompt"), dict) else row
    shared = {key: row[key] for key in ("tree_state",) if key in row}
    flat, waiting = [], deque([(root, None)])
    while waiting:
        node, parent = waiting.popleft()
        if not isinstance(node, dict):
            flat.append(node)
            continue
        own = node.get("message_id") or f"{parent}/{len(flat)}"
        flat.append({key: value for key, value in node.items() if key != "replies"} | shared
                    | {"message_id": own, "parent_id": parent})  # fmt: skip
        replies = node.get("replies") or []
        waiting += [(reply, own) for reply in replies] if isinstance(replies, list) else []
    return flat


def fault_of(row: Any) -> Fault | None:
    """Why a message by itself cannot be in a conversation, or None. What it lacks in columns is not held against it."""
    if not isinstance(row, dict):
        return Fault("message_is_not_a_mapping", excerpt(row))
    if id_in(row, 0) is None:
        return Fault("missing_column", f"message_id is {excerpt(row.get('message_id'))}")
    if not isinstance(row.get("text"), str):
        return Fault("content_is_not_text", f"text is {excerpt(row.get('text'))}")
    role = row.get("role")
    if not isinstance(role, str) or ROLE_OF.get(role.lower()) not in ("user", "assistant", "system"):
        return Fault("unknown_role", f"role is {excerpt(role)}")
    if row.get("deleted"):
        return Fault("deleted", "the message is marked as deleted")
    if row.get("tree_state", "ready_for_export") != "ready_for_export":
        return Fault("tree_not_ready", f"tree_state is {excerpt(row['tree_state'])}")
    if row.get("review_result", True) is None:
        return Fault("not_reviewed", "review_result is null")
    return Fault("review_failed", "review_result is false") if row.get("review_result", True) is False else None


def conversations(rows: list[Any], paths: str = "best") -> tuple[list[list[int]], dict[int, Fault]]:
    """Group messages into conversations.

    rows: messages in file order. paths: `best` follows the best-ranked answer to every question (rank 0 is best, no
    rank comes last), `all` follows every answer; either way every follow-up question and whatever hangs below a system
    message is followed, and a conversation ends at its last answer. Returns conversations as lists of indices into
    `rows`, and the fault of each message that is in none.
    """
    trees = _Trees(rows)
    walked = (end for root in trees.roots for end in trees.walk(root, paths))
    ends = [answer for end in walked if (answer := trees.last_answer(end)) is not None]
    # A conversation that ends at an answer which another one continues is part of that one.
    found = {end: trees.path_to(end) for end in dict.fromkeys(ends)}
    inner = {index for path in found.values() for index in path[:-1]}
    found = [path for end, path in found.items() if end not in inner]
    used = {index for path in found for index in path}
    orphaned = Fault("orphaned", "its parent is not in the files, or it replies to itself in a circle")
    return found, {i: trees.faults.get(i, orphaned) for i in range(len(rows)) if i not in used}


class _Trees:
    """Messages linked to their replies, by index; `faults` names why a message is in no conversation."""

    def __init__(self, rows: list[Any]):
        self.rows, self.roots, self.parent = rows, [], {}
        self.faults = {index: fault for index, row in enumerate(rows) if (fault := fault_of(row))}
        by_id, self.replies = {}, {}
        for index, row in enumerate(rows):
            own = id_in(row, 0)
            if own is None:
                continue
            if own in by_id:
                self.faults[index] = Fault("duplicate_message_id", f"{own} is also in an earlier row")
            by_id.setdefault(own, index)
        for index in by_id.values():
            above = id_in(rows[index], 1)
            if above is None:
                self.roots.append(index)
            elif above in by_id:
                self.parent[index] = by_id[above]
                self.replies.setdefault(by_id[above], []).append(index)

    def walk(self, root: int, paths: str) -> list[int]:
        """The last answers of the conversations of one tree."""
        ends, waiting = [], [root]
        if root in self.faults:
            self.drop_below(root, Fault("below_dropped_message", f"the root is {self.faults[root].reason}"))
            return []
        while waiting:
            node = waiting.pop()
            usable = [r for r in self.replies.get(node, []) if r not in self.faults]
            for reply in self.replies.get(node, []):
                if reply in self.faults:
                    self.drop_below(reply, Fault("below_dropped_message", f"above it: {self.faults[reply].reason}"))
            role = self.role(node)
            if role == "assistant":
                ends += [] if usable else [node]
                waiting += reversed(usable)
                continue
            usable.sort(key=lambda r: (rank(self.rows[r]), r))
            followed = usable if paths == "all" or role == "system" else usable[:1]
            for reply in usable[len(followed) :]:
                self.faults[reply] = Fault("lower_ranked_answer", "another answer to the same question ranks higher")
                self.drop_below(reply, self.faults[reply])
            waiting += reversed(followed)
            ends += [] if followed else [node]
        return ends

    def role(self, index: int) -> str:
        return ROLE_OF[self.rows[index]["role"].lower()]

    def last_answer(self, end: int) -> int | None:
        """The last answer on the way to a message; the questions after it are left without one."""
        while self.role(end) != "assistant":
            self.faults[end] = Fault("question_without_answer", "no usable answer replies to it")
            if end not in self.parent:
                return None
            end = self.parent[end]
        return end

    def drop_below(self, top: int, fault: Fault) -> None:
        """Give every message below `top` this fault, unless it has one of its own."""
        waiting = list(self.replies.get(top, []))
        while waiting:
            node = waiting.pop()
            self.faults.setdefault(node, fault)
            waiting += self.replies.get(node, [])

    def path_to(self, end: int) -> list[int]:
        """Indices from the root to a message."""
        path = [end]
        while path[-1] in self.parent:
            path.append(self.parent[path[-1]])
        return path[::-1]


def id_in(row: Any, which: int) -> str | int | None:
    """The message's own id (0) or its parent's (1), under either export's name."""
    names = next((names for names in IDS if isinstance(row, dict) and names[0] in row), IDS[0])
    value = row.get(names[which]) if isinstance(row, dict) else None
    return value if isinstance(value, str | int) else None


def rank(row: dict) -> float:
    """Rank of an answer among its siblings, 0 the best; without one it comes last."""
    value = row.get("rank")
    return value if isinstance(value, int | float) and not isinstance(value, bool) else float("inf")
