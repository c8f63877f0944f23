"""Queries that need a step before they can be answered, with the thought that takes it, as a user's own data.

What stands where relative to the largest shape, which is the second largest, what lies between two shapes, which color
occurs most often. The thought names the shapes on the way, and the target. In the format of docs/your_own_data.md;
``scripts/dev/study_thoughts.py`` trains on them.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.datasets.masks import encode_mask
from utils.demo.files import streams, write_jpeg
from utils.demo.scene_texts import NUMBERS, by_size, extreme_distances, is_larger, plural, superlatives
from utils.demo.scenes import Scene, one_of, sample_scene, shuffled

STREAMS = {"train": 411, "val": 412, "test": 413}  # used by no other data (scripts/make_demo_data.py)
NOUNS = ("shape", "object", "thing")
MAX_QUERIES = 4  # per image


class TwoStepQuery(NamedTuple):
    """A query, the shapes that answer it, the reasoning towards them, and its family."""

    text: str
    targets: tuple[int, ...]
    thought: str
    family: str


def two_step_queries(scene: Scene, rng: np.random.Generator) -> list[TwoStepQuery]:
    """Queries of all families that the scene has a clear answer to, at most two of each, shuffled."""
    names = _names(scene)
    families = (_nested(scene, rng, names), _second(scene, rng, names), _between(scene, rng, names), _most(scene, rng))
    return shuffled(rng, [query for family in families for query in shuffled(rng, family)[:2]])


def _names(scene: Scene) -> dict[int, str]:
    """Color and kind of the shapes that these identify."""
    pairs = [f"the {shape.color} {shape.kind}" for shape in scene.shapes]
    return {i: pair for i, pair in enumerate(pairs) if pairs.count(pair) == 1}


def _nested(scene: Scene, rng: np.random.Generator, names: dict[int, str]) -> list[TwoStepQuery]:
    """The shape nearest to (or farthest from) one that a superlative tells."""
    queries = []
    for word, reference in superlatives(scene).items():
        for distance, target in extreme_distances(scene, reference).items():
            if not {reference, target} <= names.keys():
                continue
            preposition = {"nearest": "to", "farthest": "from"}[distance]
            text = f"which {one_of(rng, NOUNS)} is {distance} {preposition} the {word} {one_of(rng, NOUNS)}?"
            thought = f"the {word} is {names[reference]}. {distance} {preposition} it is {names[target]}."
            queries.append(TwoStepQuery(text, (target,), thought, distance))
    return queries


def _second(scene: Scene, rng: np.random.Generator, names: dict[int, str]) -> list[TwoStepQuery]:
    """The second largest shape, or the second from a side, where first, second and third clearly differ."""
    queries, unit = [], max(scene.image.shape) / 120
    order = by_size(scene, range(len(scene.shapes)))[::-1]
    orders = {"largest": order} if all(is_larger(scene, order[i], order[i + 1 :]) for i in (0, 1)) else {}
    for axis, direction, word in ((0, -1, "leftmost"), (0, 1, "rightmost"), (1, -1, "topmost"), (1, 1, "lowest")):
        ends = sorted(((-shape.center[axis] * direction, i) for i, shape in enumerate(scene.shapes)))
        if all(ends[i + 1][0] - ends[i][0] > 10 * unit for i in (0, 1)):
            orders[word] = [i for _, i in ends]
    for word, (first, second, *_) in orders.items():
        if {first, second} <= names.keys():
            text = f"which {one_of(rng, NOUNS)} is the second {word}?"
            thought = f"the {word} is {names[first]}. the second is {names[second]}."
            queries.append(TwoStepQuery(text, (second,), thought, "second"))
    return queries


def _between(scene: Scene, rng: np.random.Generator, names: dict[int, str]) -> list[TwoStepQuery]:
    """The only shape near the segment that joins two named ones."""
    queries, unit = [], max(scene.image.shape) / 120
    for a in names:
        for b in names:
            offsets = {i: _offset(scene, i, a, b) for i in range(len(scene.shapes)) if i not in (a, b)}
            (ax, ay), (bx, by) = scene.shapes[a].center, scene.shapes[b].center
            close = min(10 * unit, 0.25 * math.hypot(bx - ax, by - ay))
            near = [i for i, (along, across) in offsets.items() if 0.2 < along < 0.8 and across < close]
            maybe = [i for i, (along, across) in offsets.items() if 0 < along < 1 and across < 22 * unit]
            if a != b and near == maybe and len(near) == 1 and near[0] in names:
                sides = " ".join(f"{names[i]} is {_side(scene, i, near[0])}." for i in (a, b))
                thought = f"{sides} between them is {names[near[0]]}."
                text = one_of(rng, ("what is between {} and {}?", "which {noun} lies between {} and {}?"))
                text = text.format(names[a], names[b], noun=one_of(rng, NOUNS))
                queries.append(TwoStepQuery(text, (near[0],), thought, "between"))
    return queries


def _offset(scene: Scene, index: int, a: int, b: int) -> tuple[float, float]:
    """Where a shape's center lies relative to the segment a to b: share of its length, and distance from its line."""
    (x, y), (ax, ay), (bx, by) = (scene.shapes[i].center for i in (index, a, b))
    length = math.hypot(bx - ax, by - ay) or 1.0
    dx, dy = (bx - ax) / length, (by - ay) / length
    return ((x - ax) * dx + (y - ay) * dy) / length, abs((x - ax) * dy - (y - ay) * dx)


def _side(scene: Scene, index: int, of: int) -> str:
    dx, dy = (a - b for a, b in zip(scene.shapes[index].center, scene.shapes[of].center))
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def _most(scene: Scene, rng: np.random.Generator) -> list[TwoStepQuery]:
    """All shapes of the color, or the kind, that more shapes have than any other."""
    queries = []
    for attribute in ("color", "kind"):
        counts = Counter(getattr(shape, attribute) for shape in scene.shapes).most_common()
        if len(counts) < 2 or counts[0][1] == counts[1][1]:
            continue
        word = counts[0][0]
        targets = tuple(i for i, shape in enumerate(scene.shapes) if getattr(shape, attribute) == word)
        parts = [
            f"{NUMBERS[count]} {plural(each) if attribute == 'kind' and count > 1 else each}" for each, count in counts
        ]
        query = f"all {one_of(rng, NOUNS)}s of the most frequent {'color' if attribute == 'color' else 'shape'}"
        thought = f"there are {', '.join(parts[:-1])} and {parts[-1]}. it is all {word} shapes."
        queries.append(TwoStepQuery(query, targets, thought, f"most frequent {attribute}"))
    return queries


def write_two_steps(folder: Path, train: int, val: int, test: int = 0, seed: int = 0) -> None:
    """Writes ``two_steps.jsonl``, splits train, val and test, with up to ``MAX_QUERIES`` lines per training image.

    Args:
        folder: is created; the images lie in ``images`` below it.
        train, val, test: number of images; of val and test, each has one query, all families in turn.
    """
    counts = {"train": train, "val": val, "test": test}
    lines = [line for split, count in counts.items() for line in _lines(folder, split, count, seed)]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (folder / "two_steps.jsonl").write_text(text, encoding="utf-8")


FAMILIES = ("nearest", "farthest", "second", "between", "most frequent color", "most frequent kind")


def _lines(folder: Path, split: str, count: int, seed: int) -> list[dict[str, Any]]:
    lines = []
    for index, rng in streams(seed, STREAMS[split], count):
        family = None if split == "train" else FAMILIES[index % len(FAMILIES)]
        scene, queries = _scene(rng, family)
        name = f"images/{split}-{index}.jpg"
        write_jpeg(folder / name, scene.image)
        for query in queries:
            lines.append(
                {
                    "image": name,
                    "query": query.text,
                    "masks": [encode_mask(scene.masks[target]) for target in query.targets],
                    "split": split,
                    "thought": query.thought,
                    "meta": {"family": query.family},
                }
            )
    return lines


def _scene(rng: np.random.Generator, family: str | None) -> tuple[Scene, list[TwoStepQuery]]:
    """A scene with its queries: one of the family, or up to ``MAX_QUERIES`` of any."""
    while True:
        scene = sample_scene(rng)
        queries = two_step_queries(scene, rng)
        if family is not None:
            queries = [query for query in queries if query.family == family][:1]
        if queries:
            return scene, queries[:MAX_QUERIES]
