"""custom: user data, a JSONL file with a question about an image per line (docs/your_own_data.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from model.processing.pixels import FORMATS
from model.structures import IGNORE_PIXEL, EvalQuery, EvalSample, Sample, Turn
from utils.datasets.base import DataError, DataOptions, DatasetRow, EmptyMaskError, check_sample, sample_indices
from utils.datasets.images import DECODE_ERRORS, check_size, read_image
from utils.datasets.jsonl import TRAIN, Line, LineFile, spelled_otherwise
from utils.datasets.masks import check_polygon, decode_segmentation, stack_masks
from utils.datasets.spec import Spec
from utils.datasets.templates import sample_answer, sample_question


def read_mask(mask: Any, folder: Path, height: int, width: int) -> np.ndarray:
    """Decodes one item of ``masks`` as uint8 [H, W] with 0 and 1, never empty.

    Args:
        mask: a polygon (``[[x, y], ...]`` or ``[x, y, x, y, ...]``), a list of polygons (parts of one object), a COCO
            RLE, or the path of a PNG.
        folder: the folder that the path is relative to.
        height, width: of the image, H and W.
    """
    if isinstance(mask, str):
        return read_mask_png(folder / mask, height, width)
    if isinstance(mask, list):
        mask = [mask] if _is_polygon(mask) else mask
        for part in mask:
            points = check_polygon(part, height, width)
            if len(points) < 3:
                raise DataError(f"a polygon has {len(points)} points; it needs 3")
            if max(height, width) > 2 and points.min() >= 0 and points.max() <= 1:
                raise DataError(
                    "a polygon's coordinates are all from 0 to 1; they count pixels, not fractions of the image"
                )
    return decode_segmentation(mask, height, width)


def _is_polygon(mask: list[Any]) -> bool:
    """Whether a list is one polygon, not a list of polygons: its first item is a number or a pair of numbers."""
    first = mask[0] if mask else None
    pair = isinstance(first, list) and len(first) == 2 and not any(isinstance(item, list) for item in first)
    return pair or (first is not None and not isinstance(first, (list, dict)))


def read_mask_png(path: Path, height: int, width: int) -> np.ndarray:
    """Decodes a mask PNG as uint8 [H, W]: 1 where a pixel is neither black (palette: index 0) nor transparent."""
    labels = read_labels(path)
    if labels.shape != (height, width):
        raise DataError(f"mask {path} is {labels.shape[1]}x{labels.shape[0]}; its image is {width}x{height}")
    if not labels.any():
        raise EmptyMaskError(f'mask {path} is empty; write "masks": [] for an absent target')
    return (labels != 0).astype(np.uint8)


def read_labels(path: Path) -> np.ndarray:
    """Values of a PNG [H, W]: gray levels or palette indices as stored; colors as 0 (black) and 1; 0 if transparent.

    Raises:
        DataError: if it is no PNG, or it may be black that is the target: a palette has it elsewhere than at index 0,
            or all is black or transparent.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            file_format, mode, values, palette = image.format, image.mode, np.asarray(image), image.getpalette("RGB")
            alpha = np.asarray(image.convert("RGBA"))[..., 3] if image.has_transparency_data else None
    except FileNotFoundError as error:
        raise DataError(f"mask {path} cannot be read: it does not exist{spelled_otherwise(path)}") from error
    except DECODE_ERRORS as error:
        raise DataError(f"mask {path} cannot be read ({error})") from error
    if file_format != "PNG":
        raise DataError(f"mask {path} is {file_format}; masks must be PNG (JPEG alters the values)")
    if palette and any(palette[:3]):
        used = np.unique(values if alpha is None else values[alpha > 0]).tolist()
        if black := [index for index in used if not any(palette[3 * index : 3 * index + 3])]:
            raise DataError(
                f"mask {path}: its palette has black at index {black[0]}, and another color at index 0, which is the "
                "background; save it as gray"
            )
    if values.ndim == 3:
        channels = values[..., :-1] if mode in ("LA", "RGBA") else values
        values = np.any(channels, axis=2).astype(np.uint8)
    if alpha is None:
        return values
    labels = values * (alpha > 0)
    if not labels.any() and alpha.any() and not alpha.all():
        raise DataError(f"mask {path} is black or transparent everywhere; paint the object in another color than black")
    return labels


def load_lines(folder: Path, lines: list[Line]) -> tuple[np.ndarray, list[list[np.ndarray]], list[np.ndarray]]:
    """Decodes the lines of an image.

    Returns:
        image [H, W, 3], rotated by EXIF; the masks of each line, uint8 [H, W]; the ignored region of each line, bool
        [H, W].
    """
    masks, ignored, line = [], [], lines[0]
    try:
        image = read_image(folder / line.image, apply_exif=True)
        for line in lines:
            masks.append([read_mask(mask, folder, *image.shape[:2]) for mask in line.masks])
            regions = [read_mask(mask, folder, *image.shape[:2]) for mask in line.ignore]
            ignored.append(stack_masks(regions, *image.shape[:2]).max(axis=0, initial=0) > 0)
    except DataError as error:
        raise DataError(f"{line.location}: {error}") from error
    for line in lines:
        check_size(line.location, image, *(line.size or image.shape[:2]))
    return image, masks, ignored


def with_ignored(mask: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """A mask [H, W] of 0 and 1 with 255 in the ignored region, except where the target covers it."""
    return np.where(ignored & (mask == 0), np.uint8(IGNORE_PIXEL), mask)


class CustomTrain:
    """Training data of a file; a sample is an image with some of its lines.

    The masks of a query form one target with one [SEG]; no mask means an absent target. A conversation has one [SEG]
    per mask.

    Args:
        spec: ``custom|FILE``, or ``custom|FILE|SPLIT`` if the split is not ``train``.
        row: unused.
        dataset_dir: candidate folder of the file.
        options: ``questions_per_image`` and ``thought_probability``.
    """

    def __init__(self, spec: Spec, row: DatasetRow, dataset_dir: Path, options: DataOptions) -> None:
        self.name, self.options = str(spec), options
        self.file = LineFile(spec, dataset_dir, TRAIN)

    def __len__(self) -> int:
        return len(self.file)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        lines = self.file.lines(index)
        lines = [lines[i] for i in sample_indices(self.options.questions_per_image, len(lines), rng)]
        image, masks, ignored = load_lines(self.file.path.parent, lines)
        conversations = [line.turns or (self._query_turn(line, rng),) for line in lines]
        flat = []
        for line, line_masks, region in zip(lines, masks, ignored):
            flat += [with_ignored(mask, region) for mask in (line_masks if line.turns else _merge(line_masks))]
        return check_sample(Sample(lines[0].location, image, conversations, stack_masks(flat, *image.shape[:2])))

    def _query_turn(self, line: Line, rng: np.random.Generator) -> Turn:
        question = sample_question("sentence" if line.is_sentence else "phrase", line.query, rng)
        answer = sample_answer(len(line.masks), rng)
        thinks = line.thought and self.options.thought_probability and rng.random() < self.options.thought_probability
        return Turn(question, answer, line.thought if thinks else "")

    def describe(self) -> dict[str, int]:
        return self.file.counts


def _merge(masks: list[np.ndarray]) -> list[np.ndarray]:
    """A list with the union of the masks; empty if there are none."""
    return [np.maximum.reduce(masks)] if masks else []


class CustomEval:
    """Evaluation data of a file: one (merged) mask per query, or none. Conversations are skipped and listed.

    Args:
        spec: ``custom|FILE|SPLIT``, or ``custom|FILE`` if the file has one split.
        row: unused.
        dataset_dir: candidate folder of the file.
    """

    def __init__(self, spec: Spec, row: DatasetRow, dataset_dir: Path) -> None:
        self.spec = spec
        self.file = LineFile(spec, dataset_dir, None)
        self.skipped = self.file.drop_conversations()
        self.unusable: list[str] = []  # LineFile rejects a file with invalid lines
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
        image, masks, ignored = load_lines(self.file.path.parent, lines)
        queries = []
        for line, line_masks, region in zip(lines, masks, ignored):
            meta = {"length": "long" if line.is_sentence else "short", "targets": len(line_masks), **line.meta}
            truth = stack_masks([with_ignored(mask, region) for mask in _merge(line_masks)], *image.shape[:2])
            queries.append(EvalQuery(str(line.number), line.query, truth, line.is_sentence, meta))
        return EvalSample(f"{self.spec}/{lines[0].image}", lines[0].image, image, queries)
