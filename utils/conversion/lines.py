"""The lines of the JSONL: splits, absent targets, paths, and writing them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from utils.conversion.annotated import AnnotatedImage


def lines_of(photos: list[AnnotatedImage], folder: Path, val: float, absent: int) -> list[dict[str, Any]]:
    """Lines of the JSONL; paths are relative to ``folder``. The choice of validation images is deterministic."""
    rng = np.random.default_rng(0)
    for_val = set(rng.permutation(len(photos))[: round(val * len(photos)) or bool(val)].tolist())
    all_queries = sorted({query for photo in photos for query in photo.queries})
    lines = []
    for number, photo in enumerate(photos):
        others = [query for query in all_queries if query not in photo.queries]
        queries = dict(photo.queries) | {others[i]: [] for i in rng.permutation(len(others))[:absent]}
        for query, masks in queries.items():
            line = {"image": relative(photo.path, folder), "query": query, "masks": masks}
            line |= {"size": list(photo.size)} if photo.size else {}
            lines.append(line | ({"split": "val" if number in for_val else "train"} if val else {}))
    return lines


def relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def write_lines(lines: list[dict[str, Any]], output: Path) -> None:
    """Writes the file atomically."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    try:
        partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
