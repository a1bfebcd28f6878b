"""Data: raw public sets to clean, split JSONL. Never imports torch."""
