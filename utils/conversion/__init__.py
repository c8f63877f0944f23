"""Annotations of other tools, converted to the JSONL of ``custom`` data (docs/your_own_data.md)."""
