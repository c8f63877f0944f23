"""A shape and a word that the tiny family has never seen, as a user's own data: what fine-tuning can teach.

Scenes with hearts among the other shapes, in the format of docs/your_own_data.md. ``scripts/dev/study_start.py`` trains
on them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from utils.datasets.masks import encode_mask
from utils.demo.files import streams, write_jpeg
from utils.demo.scene_texts import Query, attribute_queries
from utils.demo.scenes import KINDS, NEW_KINDS, Scene, sample_scene

KIND = NEW_KINDS[0]
STREAMS = {"train": 401, "val": 402}  # used by no other data (scripts/make_demo_data.py)
MAX_QUERIES = 3  # per image


def new_scene(rng: np.random.Generator) -> tuple[Scene, list[Query]]:
    """A scene with one or more new shapes, and queries that name one, for which the new word is needed.

    ("The small heart" is asked only where something else is small, too.)
    """
    while True:
        scene = sample_scene(rng, kinds=(*KINDS, KIND, KIND))
        queries = [query for query in attribute_queries(scene, rng) if _needs_new_word(scene, query)]
        if queries:
            return scene, queries


def _needs_new_word(scene: Scene, query: Query) -> bool:
    words = set(query.text.split()) - {"the", KIND}
    others = [shape for shape in scene.shapes if shape.kind != KIND]
    return KIND in query.text.split() and any(words <= set(shape.attributes) for shape in others)


def write_new_shape(folder: Path, train: tuple[int, ...], val: int, seed: int = 0) -> None:
    """Writes ``new.jsonl`` (split val, one query per image) and ``new-N.jsonl`` (the first N training images).

    Args:
        folder: is created; the images lie in ``images`` below it.
        train: the sizes N of the training sets, in images.
        val: number of validation images, and queries.
    """
    splits = {"train": _lines(folder, "train", max(train), seed), "val": _lines(folder, "val", val, seed)}
    files = {f"new-{size}.jsonl": splits["train"][:size] for size in train}
    files["new.jsonl"] = [lines[:1] for lines in splits["val"]]
    for name, images in files.items():
        text = "".join(f"{json.dumps(line)}\n" for lines in images for line in lines)
        (folder / name).write_text(text, encoding="utf-8")


def _lines(folder: Path, split: str, count: int, seed: int) -> list[list[dict[str, Any]]]:
    """Draws the images of a split; returns the lines of each."""
    images = []
    for index, rng in streams(seed, STREAMS[split], count):
        scene, queries = new_scene(rng)
        name = f"images/{split}-{index}.jpg"
        write_jpeg(folder / name, scene.image)
        masks = [[encode_mask(scene.masks[query.targets[0]])] for query in queries]
        images.append(
            [
                {"image": name, "query": query.text, "masks": mask, "split": split}
                for query, mask in zip(queries[:MAX_QUERIES], masks)
            ]
        )
    return images
