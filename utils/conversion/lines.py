"""The lines of the JSONL: splits, absent targets, paths, and writing them."""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from utils.conversion.annotated import label_key
from utils.conversion.queries import QueriedImage
from utils.datasets.jsonl import TRAIN, scan


def add_absent(images: list[QueriedImage], negatives: list[QueriedImage], count: int) -> None:
    """Adds up to ``count`` queries of other images to every image that has annotations, as absent targets.

    Negatives, images without annotation, get up to ``count`` of them, and at least one. The choice is deterministic. A
    query is never absent beside one that has all its words, or only some of them: "cup" and "red cup".
    """
    rng = np.random.default_rng(0)
    pool = sorted({query for image in images for query, masks in image.queries.items() if masks})
    words = {query: frozenset(label_key(query).split()) for query in pool}
    for image in [*images, *negatives]:
        taken = image.annotated | {label_key(query) for query in image.queries}
        others = [query for query in pool if label_key(query) not in taken]
        wanted = count if image.is_annotated else max(count, 1)
        if not image.has_unknown:
            there = [frozenset(key.split()) for key in image.annotated]
            drawn = (others[i] for i in rng.permutation(len(others)))
            absent = (query for query in drawn if not any(words[query] <= one or one <= words[query] for one in there))
            image.queries |= {query: [] for query in islice(absent, wanted)}


def draw_val(count: int, share: float) -> set[int]:
    """Which of ``count`` images are for validation: at least one and never all, if there are two or more."""
    wanted = min(max(round(share * count), 1), count - 1) if share else 0
    return set(np.random.default_rng(0).permutation(count)[:wanted].tolist())


def lines_of(images: list[QueriedImage], folder: Path, val: float, own_split: bool) -> list[dict[str, Any]]:
    """The lines of all images that have a query; paths are relative to ``folder``, wherever links lead.

    Args:
        val: share of the images for validation.
        own_split: whether the images' own splits are written.
    """
    images = [image for image in images if image.queries]
    for_val = draw_val(len(images), val)
    lines = []
    for number, image in enumerate(images):
        shared: dict[str, Any] = {"size": list(image.size)}
        if own_split:
            shared["split"] = image.split or TRAIN
        elif val:
            shared["split"] = "val" if number in for_val else TRAIN
        if image.ignore:
            shared["ignore"] = [_portable(mask, folder) for mask in image.ignore]
        for query, masks in image.queries.items():
            written = [_portable(mask, folder) for mask in masks]
            lines.append({"image": relative(image.path, folder), "query": query, "masks": written} | shared)
    return lines


def _portable(mask: Any, folder: Path) -> Any:
    return relative(Path(mask), folder) if isinstance(mask, str) else mask


def relative(path: Path, folder: Path) -> str:
    """A path as the JSONL in ``folder`` holds it, without links: the system follows them before ``..``."""
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def write_lines(lines: list[dict[str, Any]], output: Path) -> None:
    """Writes the file atomically, once its reader finds every line valid and every image."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    try:
        partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        scan(partial)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
