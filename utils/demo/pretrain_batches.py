"""Batches of synthetic scenes for pre-training the tiny family, per stage (scripts/dev/pretrain_tiny.py).

Legend: n masks, P cells of a map (patches of CLIP's grid); of rows with different grids, the most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from model.backbones.llava import ClipReader
from model.geometry import Fit, maps_at, mask_prompts, on_grid
from model.processing.processor import UGroundProcessor
from model.processing.reader import ImageReader
from model.processing.transforms import SAM_INPUTS, squares
from model.structures import Batch, Sample, Turn
from utils.datasets.base import pick
from utils.datasets.masks import stack_masks
from utils.datasets.templates import ANSWERS, QUESTIONS, sample_answer
from utils.demo import scenes
from utils.demo.scene_texts import (
    CAPTION_REQUESTS,
    Query,
    absent_queries,
    attribute_queries,
    caption,
    multi_queries,
    questions,
    reasoning_queries,
    relation_queries,
)

STREAM = {"tokenizer": 1000, "vision": 1001, "language": 1002, "sam": 1003, "check": 1004}
STREAM |= {"conversations": 1005, "depths": 1006, "iou": 1007}
BATCH = {"vision": 32, "language": 12, "conversations": 12, "depths": 12, "sam": 16, "iou": 16, "check": 32}
QWEN_BATCH = {"vision": 12, "conversations": 8, "sam": 6, "check": 16}  # its tower reads four times as many patches
QUESTIONS_PER_SCENE = 6
SIDE, CELL = 120, 10  # of scenes (the longer one) and of a map's cells, in pixels
FIRST_TOKEN_WEIGHT = 4.0  # the first word of an answer decides between segmentation and rejection
ATTRIBUTES = {"color": tuple(scenes.COLORS), "kind": scenes.KINDS, "size": scenes.SIZES, "texture": scenes.TEXTURES}


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What a stage asks about a scene: the probability of each kind of turn, which sum to 1.

    Attributes:
        dialogues: probability that a turn continues the conversation of the turn before it.
    """

    absent: float
    attribute: float
    relation: float = 0.0
    reasoning: float
    multi: float
    vqa: float
    caption: float
    dialogues: float = 0.0

    def sample(self, rng: np.random.Generator) -> str:
        """A kind of turn."""
        kinds = {name: value for name, value in vars(self).items() if name != "dialogues"}
        return str(rng.choice(list(kinds), p=list(kinds.values())))


MIXTURES = {
    "language": Mixture(absent=0.34, attribute=0.24, reasoning=0.24, multi=0.08, vqa=0.07, caption=0.03),
    "conversations": Mixture(
        absent=0.3, attribute=0.14, relation=0.24, reasoning=0.18, multi=0.06, vqa=0.05, caption=0.03, dialogues=0.5
    ),
    "depths": Mixture(
        absent=0.25, attribute=0.2, relation=0.1, reasoning=0.3, multi=0.08, vqa=0.05, caption=0.02, dialogues=0.3
    ),
}


class SceneBatches(Dataset):
    """Batches of a stage, generated on the fly: batch i is a function of (seed, stage, i)."""

    def __init__(self, stage: str, seed: int, batches: int, make, size: int) -> None:
        self.key, self.batches, self.make, self.size = [seed, STREAM[stage]], batches, make, size

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int):
        rngs = [np.random.default_rng([*self.key, index, j]) for j in range(self.size)]
        return self.make([(scenes.sample_scene(rng), rng) for rng in rngs])


def stream(stage: str, seed: int, batches: int, make, workers: int, family: str = "llava") -> DataLoader:
    size = (QWEN_BATCH if family == "qwen" else BATCH)[stage]
    return DataLoader(
        SceneBatches(stage, seed, batches, make, size),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=8 if workers else None,
        worker_init_fn=lambda _: torch.set_num_threads(1),
    )


def cell_shares(masks: np.ndarray, reader: ImageReader, cells: int = 0) -> torch.Tensor:
    """Masks [n, H, W] of a scene -> covered share of each cell of its map [n, P]; at least ``cells`` columns."""
    fit = reader.fit if isinstance(reader, ClipReader) else Fit("stretch")
    values = torch.from_numpy(np.ascontiguousarray(masks)).float()
    means, inside = on_grid(
        values, torch.ones_like(values[:1]), fit, reader.plan([(values.shape[1], values.shape[2])]).grids[0]
    )
    shares = (means * inside).flatten(1)
    return F.pad(shares, (0, max(0, cells - shares.shape[1])))


def cell_centers(reader: ImageReader, size: tuple[int, int]) -> torch.Tensor:
    """Centers [P, 2] (x, y) in pixels of the cells of an image of this size (H, W), row-major; not of LLaVA's."""
    rows, columns = reader.plan([size]).grids[0]
    ys, xs = ((torch.arange(n) + 0.5) * length / n for n, length in zip((rows, columns), size))
    return torch.cartesian_prod(ys, xs).flip(1)


def vision_batch(scenes_and_rngs: list, processor: UGroundProcessor) -> dict:
    """Images and, per cell, attributes and center of the shape that covers most of it (-1 background, -2 mixed).

    Centers are shares of the input's side. Those of Qwen's tower, whose positions are relative, are so to the cell.
    """
    reader = processor.reader
    images = [scene.image for scene, _ in scenes_and_rngs]
    batch = processor.collate([Sample("", i, [], np.zeros((0, *i.shape[:2]), np.uint8)) for i in images])
    labels, centers, count = [], [], batch.valid.shape[1]
    for scene, _ in scenes_and_rngs:
        coverage = cell_shares(scene.masks, reader)
        share, owner = coverage.max(0)
        background = coverage.sum(0) < 0.05
        table = torch.tensor(
            [[values.index(getattr(s, name)) for name, values in ATTRIBUTES.items()] for s in scene.shapes]
        )
        label = torch.where((share >= 0.4)[:, None], table[owner], -2)
        label = torch.where(background[:, None], -1, label)
        center = torch.tensor([s.center for s in scene.shapes], dtype=torch.float32)[owner]
        if not isinstance(reader, ClipReader):
            center = center - cell_centers(reader, scene.masks.shape[1:])
        labels.append(F.pad(label, (0, 0, 0, count - len(label)), value=-2))
        centers.append(F.pad(center / SIDE, (0, 0, 0, count - len(center))))
    return {"batch": batch, "labels": torch.stack(labels), "centers": torch.stack(centers)}


def sample_turn(scene: scenes.Scene, rng: np.random.Generator, mixture: Mixture) -> tuple[Turn, Query | None]:
    """Samples a question about a scene: its turn, and the query (None = a text-only question)."""
    kind = mixture.sample(rng)
    makers = {
        "attribute": attribute_queries,
        "reasoning": reasoning_queries,
        "relation": lambda scene, rng: scenes.shuffled(rng, relation_queries(scene, rng)),
        "multi": multi_queries,
        "absent": absent_queries,
    }
    queries = makers[kind](scene, rng) if kind in makers else []
    if not queries and kind != "caption":
        pairs = questions(scene, rng)
        if pairs:
            return Turn(*pairs[0]), None
    if not queries:
        return Turn(pick(CAPTION_REQUESTS, rng), caption(scene, rng)), None
    query = queries[0]
    templates = (*QUESTIONS["sentence" if query.is_sentence else "phrase"], "{query}")  # users also type the bare query
    question = pick(templates, rng).replace("{query}", query.text)
    return Turn(question, sample_answer(len(query.targets), rng)), query


def split_turns(turns: list[Turn], rng: np.random.Generator, dialogues: float) -> list[tuple[Turn, ...]]:
    """Conversations of consecutive turns; each turn continues the one before it with probability ``dialogues``."""
    conversations: list[tuple[Turn, ...]] = []
    for turn in turns:
        if conversations and dialogues and rng.random() < dialogues:
            conversations[-1] += (turn,)
        else:
            conversations.append((turn,))
    return conversations


def language_batch(scenes_and_rngs: list, processor: UGroundProcessor, mixture: Mixture) -> dict:
    """Packed sequences with target maps, for each [SEG] and for the last prompt token of each query.

    Returns:
        ``batch``; ``positions``, ``rows`` and ``families`` of n states; [n, P] shares of each patch that are covered
        by the target (``coverage``), by the shape that a relation names (``reference``), and by any shape
        (``everything``); the latter two are 0 where nothing fits.
    """
    samples, queries, target_masks = [], [], []
    for number, (scene, rng) in enumerate(scenes_and_rngs):
        sampled = [sample_turn(scene, rng, mixture) for _ in range(QUESTIONS_PER_SCENE)]
        queries += [query for _, query in sampled]
        targets = []
        for query in (query for _, query in sampled if query is not None):
            named = [] if query.reference is None else [query.reference]
            all_shapes = list(range(len(scene.shapes))) if query.targets else []
            unions = np.stack([scene.masks[shapes].any(0) for shapes in (list(query.targets), named, all_shapes)])
            target_masks.append(unions)
            targets += [unions[0].astype(np.uint8)] if query.targets else []
        stacked = stack_masks(targets, *scene.image.shape[:2])
        conversations = split_turns([turn for turn, _ in sampled], rng, mixture.dialogues)
        samples.append(Sample(f"scene {number}", scene.image, conversations, stacked, number))
    batch = processor.collate(samples)
    first = first_labels(batch)
    batch.label_weights[first] = FIRST_TOKEN_WEIGHT
    ends = batch.label_positions[first][torch.tensor([query is not None for query in queries])]
    asked = [query for query in queries if query is not None]
    order = [n for n, query in enumerate(asked) if query.targets] + list(range(len(asked)))
    count = batch.valid.shape[1]
    shares = torch.stack([cell_shares(unions, processor.reader, count) for unions in target_masks])
    coverage, reference, everything = shares[order].unbind(1)
    return {
        "batch": batch,
        "positions": torch.cat([batch.seg_positions, ends]),
        "rows": torch.cat([batch.seg_rows, ends // batch.segment_ids.shape[1]]),
        "families": [asked[n].family for n in order],
        "coverage": coverage,
        "reference": reference,
        "everything": everything,
    }


def first_labels(batch: Batch) -> torch.Tensor:
    """Marks the labels [M] that are the first token of an answer: prompts lie between answers."""
    follows = batch.label_positions.diff() == 1
    return torch.cat([torch.ones(1, dtype=torch.bool), ~follows])


def in_square(mask: np.ndarray, fit: Fit) -> torch.Tensor:
    """A mask [H, W] as the mask decoder's input shows it: [side, side] of 0 and 1."""
    values = torch.from_numpy(mask).float()[None, None]
    _, _, height, width = fit.box(mask.shape)
    if (height, width) != mask.shape:
        values = F.interpolate(values, (height, width), mode="bilinear", antialias=True).round()
    return F.pad(values, (0, fit.side - width, 0, fit.side - height))[0, 0]


def sam_batch(scenes_and_rngs: list, fit: Fit, mask_side: int) -> dict[str, torch.Tensor]:
    """Two prompts per scene: the mask of one shape, a coarse noisy map of it, a point and a box in SAM's frame."""
    images, masks, maps, points, boxes, which = [], [], [], [], [], []
    for scene, rng in scenes_and_rngs:
        size = scene.image.shape[:2]
        map_fit = fit if fit.kind == "pad" else Fit("stretch")
        rows, columns = (SIDE // CELL,) * 2 if fit.kind == "pad" else (round(length / CELL) for length in size)
        for target in rng.choice(len(scene.shapes), 2, replace=False):
            mask = in_square(scene.masks[target], fit)
            whole = torch.from_numpy(scene.masks[target]).float()[None]
            share, inside = on_grid(whole, torch.ones_like(whole), map_fit, (rows, columns))
            noise = torch.from_numpy(rng.normal(size=(1, rows, columns)).astype(np.float32))
            coarse = share * inside * rng.uniform(0.5, 1.5) + noise * rng.uniform(0.02, 0.2) + rng.uniform(-0.2, 0.4)
            coarse = (coarse - coarse.amin()) / (coarse.amax() - coarse.amin())
            ys, xs = mask.nonzero(as_tuple=True)
            chosen = rng.integers(len(xs))
            jitter = torch.from_numpy(rng.uniform(-2, 2, 4))
            masks.append(mask)
            maps.append(mask_prompts(maps_at(coarse, map_fit, size), Fit(fit.kind, mask_side))[0])
            points.append(torch.tensor([[float(xs[chosen]), float(ys[chosen])]]))
            boxes.append(torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) + jitter)
            which.append(int(rng.choice(4, p=[0.6, 0.15, 0.15, 0.1])))  # map, point, box, map and point
        images.append(scene.image)
    return {
        "images": squares(images, fit.side, SAM_INPUTS[fit.kind]),
        "masks": torch.stack(masks),
        "maps": torch.stack(maps),
        "points": torch.stack(points),
        "boxes": torch.stack(boxes).float(),
        "which": torch.tensor(which),
    }


def language_check_batch(scenes_and_rngs: list, processor: UGroundProcessor) -> dict:
    """One query of each family per scene, with the evaluation templates; teacher-forced."""
    samples, kinds, seg_of = [], [], []
    targets: list[np.ndarray] = []
    for number, (scene, rng) in enumerate(scenes_and_rngs):
        queries = {q.family: q for q in attribute_queries(scene, rng)[:1] + absent_queries(scene, rng)[:1]}
        queries |= {q.family: q for q in reasoning_queries(scene, rng) + multi_queries(scene, rng)[:1]}
        conversations: list[tuple[Turn, ...]] = []
        masks = []
        for family, query in queries.items():
            template = QUESTIONS["sentence" if query.is_sentence else "phrase"][0]
            answer = ANSWERS["target" if query.targets else "absent"][0]
            conversations.append((Turn(template.replace("{query}", query.text), answer),))
            kinds.append(family)
            seg_of.append(len(targets))
            if query.targets:
                masks.append(scene.masks[list(query.targets)].any(0))
                targets.append(masks[-1])
        samples.append(Sample(f"check {number}", scene.image, conversations, np.stack(masks).astype(np.uint8), number))
    batch = processor.collate(samples)
    first = first_labels(batch)
    return {
        "batch": batch,
        "positions": batch.seg_positions,
        "rows": batch.seg_rows,
        "coverage": torch.cat([cell_shares(mask[None], processor.reader, batch.valid.shape[1]) for mask in targets]),
        "ends": batch.label_positions[first],
        "kinds": kinds,
        "seg_of": seg_of,
    }
