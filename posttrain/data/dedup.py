"""Exact duplicates: two records whose prompts and answers have the same exact text (text.exact_text)."""

import hashlib
import json

from posttrain.text import exact_text


def content_digest(record: dict) -> bytes:
    """16 bytes of SHA-256 over the exact text of every turn with its role, over tool calls and tools; source and id
    play no part. Of a pair: prompt, chosen and rejected, so that another rejected answer makes another pair."""
    parts = [json.dumps(record["tools"], ensure_ascii=False, sort_keys=True)] if "tools" in record else []
    for part in ("messages", "prompt", "chosen", "rejected"):
        for turn in record.get(part, []):
            calls = json.dumps(turn["tool_calls"], ensure_ascii=False, sort_keys=True) if turn.get("tool_calls") else ""
            parts.append(f"{turn['role']}\x1f{exact_text(turn['content'])}\x1f{calls}")
    return hashlib.sha256("\x1e".join(parts).encode("utf-8", "surrogatepass")).digest()[:16]


class ExactDuplicates:
    """Remembers the records seen: 16 bytes and an id each. The first of several equal ones stays."""

    def __init__(self):
        self.seen: dict[bytes, str] = {}

    def first_like(self, record: dict) -> str | None:
        """The id of an earlier record with the same text, or None (then this one is remembered)."""
        digest = content_digest(record)
        if digest in self.seen:
            return self.seen[digest]
        self.seen[digest] = record["id"]
        return None
