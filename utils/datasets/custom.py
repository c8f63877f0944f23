"""custom: one's own data, a JSONL file with a question about an image per line (docs/your_own_data.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from model.structures import EvalQuery, EvalSample, Sample, Turn
from utils.datasets.base import DataError, DataOptions, DatasetRow, check_sample, draw, pick
from utils.datasets.images import DECODE_ERRORS, check_size, read_image
from utils.datasets.jsonl import TRAIN, Line, LineFile
from utils.datasets.masks import check_polygon, decode_segmentation, stack_masks
from utils.datasets.spec import Spec
from utils.datasets.templates import ANSWERS, QUESTIONS


def read_mask(mask: Any, folder: Path, height: int, width: int) -> np.ndarray:
    """One item of ``masks`` as uint8 [H, W] with 0 and 1, never empty.

    Args:
        mask: a polygon (``[[x, y], ...]`` or ``[x, y, x, y, ...]``), a list of polygons (parts of one object), a COCO
            RLE, or the path of a PNG.
        folder: what the path is relative to.
        height, width: of the image, H and W.
    """
    if isinstance(mask, str):
        return read_png(folder / mask, height, width)
    if isinstance(mask, list):
        mask = [mask] if _is_polygon(mask) else mask
        for part in mask:
            points = check_polygon(part, height, width)
            if len(points) < 3:
                raise DataError(f"a polygon has {len(points)} points; it needs 3")
    return decode_segmentation(mask, height, width)


def _is_polygon(mask: list[Any]) -> bool:
    """Not a list of polygons: its first item is a number or a pair of them."""
    first = mask[0] if mask else None
    pair = isinstance(first, list) and len(first) == 2 and not any(isinstance(item, list) for item in first)
    return pair or (first is not None and not isinstance(first, (list, dict)))


def read_png(path: Path, height: int, width: int) -> np.ndarray:
    """A mask picture as uint8 [H, W]: 1 where a pixel is not black (palette: not 0) and not transparent."""
    labels = read_labels(path)
    if labels.shape != (height, width):
        raise DataError(f"mask {path} is {labels.shape[1]}x{labels.shape[0]}; its image is {width}x{height}")
    if not labels.any():
        raise DataError(f'mask {path} is empty; write "masks": [] for what is not there')
    return (labels != 0).astype(np.uint8)


def read_labels(path: Path) -> np.ndarray:
    """A PNG's values [H, W]: grey levels or palette indices as they are stored; colors become 0 (black) and 1."""
    try:
        with Image.open(path) as image:
            kind, mode, values = image.format, image.mode, np.asarray(image)
    except DECODE_ERRORS as error:
        raise DataError(f"mask {path} cannot be read ({error})") from error
    if kind != "PNG":
        raise DataError(f"mask {path} is {kind}; masks must be PNG (JPEG alters the values)")
    if values.ndim == 2:
        return values
    if mode in ("LA", "RGBA"):
        values = values[..., :-1] * (values[..., -1:] > 0)
    return np.any(values, axis=2).astype(np.uint8)


def load(folder: Path, lines: list[Line]) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """Image [H, W, 3], upright as its EXIF data say, and per line its masks, uint8 [H, W]."""
    masks, line = [], lines[0]
    try:
        image = read_image(folder / line.image, apply_exif=True)
        for line in lines:
            masks.append([read_mask(mask, folder, *image.shape[:2]) for mask in line.masks])
    except DataError as error:
        raise DataError(f"{line.where}: {error}") from error
    for line in lines:
        check_size(line.where, image, *(line.size or image.shape[:2]))
    return image, masks


class CustomTrain:
    """A file to train on; an item is an image with some of its lines.

    Several masks of a query are one target with one [SEG], no mask is an absent one; a conversation has one [SEG] per
    mask.

    Args:
        spec: ``custom|FILE``, or ``custom|FILE|SPLIT`` if the split is not ``train``.
        row: unused, the file says it all.
        dataset_dir: where the file may lie.
        options: ``questions_per_image``.
    """

    def __init__(self, spec: Spec, row: DatasetRow, dataset_dir: Path, options: DataOptions) -> None:
        self.name, self.options = str(spec), options
        self.file = LineFile(spec, dataset_dir, TRAIN)

    def __len__(self) -> int:
        return len(self.file)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        lines = self.file.lines(index)
        lines = [lines[i] for i in draw(self.options.questions_per_image, len(lines), rng)]
        image, masks = load(self.file.path.parent, lines)
        talks = [line.turns or (_query_turn(line, rng),) for line in lines]
        flat = [mask for line, own in zip(lines, masks) for mask in (own if line.turns else _merge(own))]
        return check_sample(Sample(lines[0].where, image, talks, stack_masks(flat, *image.shape[:2])))

    def describe(self) -> dict[str, int]:
        return self.file.counts


def _merge(masks: list[np.ndarray]) -> list[np.ndarray]:
    """Their union; nothing where there is none."""
    return [np.maximum.reduce(masks)] if masks else []


def _query_turn(line: Line, rng: np.random.Generator) -> Turn:
    question = pick(QUESTIONS["sentence" if line.is_sentence else "phrase"], rng).replace("{query}", line.query)
    return Turn(question, pick(ANSWERS[("absent", "target", "merged")[min(len(line.masks), 2)]], rng))


class CustomEval:
    """A split of a file to score: one (merged) mask per query, or none. Conversations are left out and named.

    Args:
        spec: ``custom|FILE|SPLIT``, or ``custom|FILE`` where the file has one split.
        row: unused.
        dataset_dir: where the file may lie.
    """

    def __init__(self, spec: Spec, row: DatasetRow, dataset_dir: Path) -> None:
        self.spec = spec
        self.file = LineFile(spec, dataset_dir, None)
        self.skipped = self.file.drop_conversations()
        self.unusable: list[str] = []  # opening the file has checked it
        self.not_found: list[str] = []
        if not len(self.file):
            raise DataError(f"{spec}: no query to score in {self.file.path}, conversations only")

    def __len__(self) -> int:
        return len(self.file)

    @property
    def num_queries(self) -> int:
        return self.file.counts["expressions"]

    def __getitem__(self, index: int) -> EvalSample:
        lines = self.file.lines(index)
        image, masks = load(self.file.path.parent, lines)
        queries = []
        for line, own in zip(lines, masks):
            meta = {"length": "long" if line.is_sentence else "short", "targets": len(own), **line.meta}
            truth = stack_masks(_merge(own), *image.shape[:2])
            queries.append(EvalQuery(str(line.number), line.query, truth, line.is_sentence, meta))
        return EvalSample(f"{self.spec}/{lines[0].image}", lines[0].image, image, queries)
