"""The dashboard's examples: images of a folder, or synthetic scenes, with questions."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.processing.pixels import SUFFIXES
from utils.datasets.base import read_text
from utils.datasets.images import read_image
from utils.demo import scene_texts, scenes
from utils.demo.scene_texts import Query
from utils.demo.scenes import Scene
from utils.inference.folder import is_image, read_prompts
from utils.plotting.overlays import save_picture

SEEDS = (5, 1, 2, 9)  # the tiny model answers all of their questions
LONG_SIDE = 480


@dataclass(frozen=True)
class Example:
    """An image's file, and questions about it."""

    path: str
    title: str
    questions: tuple[str, ...]


def read_examples(folder: Path, copies: Path) -> list[Example]:
    """The images of a folder as examples; ``prompts.txt`` there holds their questions, one per line.

    Args:
        copies: folder that the server may read; it gets a copy of each image.

    Raises:
        ValueError: if there is no image, or one cannot be read.
    """
    prompts = folder / "prompts.txt"
    questions = tuple(read_prompts(read_text(prompts).splitlines())) if prompts.is_file() else ()
    if not folder.is_dir():
        raise ValueError(f"--examples {folder} is not a folder")
    paths = [path for path in sorted(folder.iterdir()) if is_image(path)]
    if not paths:
        raise ValueError(f"--examples {folder} holds no image ({' '.join(SUFFIXES)})")
    copies.mkdir(parents=True, exist_ok=True)
    for path in paths:
        read_image(path)
        shutil.copyfile(path, copies / path.name)
    return [Example(str(copies / path.name), path.stem, questions) for path in paths]


def example_queries(scene: Scene, rng: np.random.Generator) -> list[Query]:
    return [
        *scene_texts.attribute_queries(scene, rng)[:1],
        *scene_texts.reasoning_queries(scene, rng)[:2],
        *scene_texts.multi_queries(scene, rng)[:1],
        *scene_texts.absent_queries(scene, rng)[:1],
    ]


def draw_example(seed: int, folder: Path) -> Example:
    """Draws a scene for the tiny model, a function of the seed.

    Its questions: an attribute, two with reasoning, several targets, a false premise.
    """
    rng = np.random.default_rng(seed)
    scene = scenes.sample_scene(rng, long_side=LONG_SIDE)
    queries = example_queries(scene, rng)
    path = folder / f"scene_{seed}.png"
    save_picture(path, scene.image)
    title = ", ".join(f"{shape.color} {shape.kind}" for shape in scene.shapes)
    return Example(str(path), title, tuple(query.text for query in queries))
