"""Words of messages."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str = "") -> str:
    """``1 image``, ``2,500 images``; ``plural`` where an s does not do."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
