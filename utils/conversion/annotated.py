"""What a reader of a tool's annotations returns."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class AnnotatedImage:
    """An image with its queries. Maps each query to its masks in the form of the JSONL; no mask = absent."""

    path: Path
    size: tuple[int, int] | None
    queries: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
