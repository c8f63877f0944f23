"""The dashboard's examples: synthetic scenes with questions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.demo import scene_texts, scenes
from utils.plotting.overlays import save_picture

SEEDS = (5, 1, 13, 15)  # the last one has a question that the tiny model gets wrong
LONG_SIDE = 480


@dataclass(frozen=True)
class Example:
    """A picture's file, and questions about it: an attribute, two with reasoning, several targets, a false premise."""

    path: str
    title: str
    questions: tuple[str, ...]


def draw_example(seed: int, folder: Path) -> Example:
    """Draws a scene and its questions, a function of the seed."""
    rng = np.random.default_rng(seed)
    scene = scenes.sample_scene(rng, long_side=LONG_SIDE)
    queries = [
        *scene_texts.attribute_queries(scene, rng)[:1],
        *scene_texts.reasoning_queries(scene, rng)[:2],
        *scene_texts.multi_queries(scene, rng)[:1],
        *scene_texts.absent_queries(scene, rng)[:1],
    ]
    path = folder / f"scene_{seed}.png"
    save_picture(path, scene.image)
    title = ", ".join(f"{shape.color} {shape.kind}" for shape in scene.shapes)
    return Example(str(path), title, tuple(query.text for query in queries))
