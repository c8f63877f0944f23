"""Encoded masks, polygons and COCO RLE: validation, decoding, encoding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from utils.datasets.base import DataError, EmptyMaskError

MAX_SHIFT = 40  # bits before the last digit of a run length in COCO's compression


def check_polygon(points: Any, height: int, width: int) -> np.ndarray:
    """Returns a polygon, [[x, y], ...] or [x, y, x, y, ...], as float64 [n, 2].

    Raises:
        DataError: if the points are not finite pairs of numbers, or lie outside the image by more than its longest
            side: such coordinates are annotation errors, and rasterizing them takes memory in proportion.
    """
    try:
        array = np.asarray(points, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"a polygon's points are not a list of numbers: {str(points)[:80]}") from error
    if array.ndim == 1 and array.size % 2 == 0:
        array = array.reshape(-1, 2)
    if array.ndim != 2 or array.shape[1] != 2:
        raise DataError(f"a polygon's points are not pairs of numbers: shape {array.shape}")
    if not np.isfinite(array).all():
        raise DataError("a polygon has a coordinate that is NaN or infinite")
    margin = max(height, width)
    if (array < -margin).any() or (array > np.array([width, height]) + margin).any():
        raise DataError(
            f"a polygon has a coordinate far outside its {width}x{height} image: {array.min()}..{array.max()}"
        )
    return array


def shape_polygon(shape: dict[str, Any]) -> list[list[float]]:
    """The polygon of a LabelMe shape; a rectangle or circle is given by 2 points (corners; center and a point on it).

    Raises:
        DataError: if the shape has no area (a point, a line), or is a mask.
    """
    kind, points = str(shape.get("shape_type") or "polygon")[:40], shape.get("points")
    if not isinstance(points, list) or not points:
        raise DataError(f"a {kind} without points")
    if kind == "polygon" or (kind == "rectangle" and len(points) > 2):
        return points
    if kind not in ("rectangle", "circle") or len(points) != 2:
        raise DataError(f"a {kind} of {len(points)} points")
    try:
        (x0, y0), (x1, y1) = np.asarray(points, dtype=np.float64).tolist()
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"a {kind} whose points are not pairs of numbers: {str(points)[:80]}") from error
    if kind == "rectangle":
        return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    radius = np.hypot(x1 - x0, y1 - y0)
    return ([x0, y0] + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)).tolist()


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Decodes any form of a COCO segmentation as uint8 [H, W] with 0 and 1.

    Forms: a list of polygons (those of 1 or 2 points are dropped), an RLE dict, a list of RLE dicts. RLE counts are a
    string, bytes, or a list of run lengths (crowd). The result is the union of all parts.
    """
    parts = [segmentation] if isinstance(segmentation, dict) else segmentation
    if not isinstance(parts, list) or not parts:
        raise DataError(f"a segmentation is neither polygons nor RLE: {str(segmentation)[:80]}")
    if not isinstance(parts[0], (list, dict)):  # one bare polygon
        parts = [parts]
    mask = np.zeros((height, width), dtype=np.uint8)
    rings = [check_polygon(part, height, width) for part in parts if not isinstance(part, dict)]
    polygons = [ring.ravel().tolist() for ring in rings if len(ring) >= 3]
    if polygons:
        mask |= coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)))
    for part in parts:
        if isinstance(part, dict):
            mask |= _decode_rle(part, height, width)
    if not mask.any():
        raise EmptyMaskError("a segmentation decodes to an empty mask")
    return mask


def decode_union(segmentations: Iterable[tuple[int | str, Any]], height: int, width: int, source: str) -> np.ndarray:
    """Decodes the union of the (annotation id, segmentation) pairs as uint8 [H, W] with 0 and 1.

    Raises:
        DataError: naming ``source`` and the annotation that cannot be decoded.
    """
    union = np.zeros((height, width), dtype=np.uint8)
    for annotation_id, segmentation in segmentations:
        try:
            union |= decode_segmentation(segmentation, height, width)
        except DataError as error:
            raise DataError(f"{source}, annotation {annotation_id}: {error}") from error
    return union


def _decode_rle(rle: dict, height: int, width: int) -> np.ndarray:
    counts, size = rle.get("counts"), rle.get("size")
    if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
        raise DataError(f"an RLE has size {size}; its image is {[height, width]} (height, width)")
    if isinstance(counts, str):
        counts = counts.encode("ascii", "replace")
    if isinstance(counts, bytes):
        runs = _unpack_counts(counts)
    elif isinstance(counts, list) and all(isinstance(run, int) for run in counts):
        runs = counts
    else:
        raise DataError(f"an RLE's counts are a {type(counts).__name__}; expected a string or a list of integers")
    # pycocotools does not check this; with too few pixels the rest of the mask would be uninitialized
    if any(run < 0 for run in runs) or sum(runs) != height * width:
        raise DataError(f"an RLE covers {sum(runs)} pixels; its image has {height * width}: the annotation is damaged")
    values = np.arange(len(runs), dtype=np.uint8) % 2
    return np.repeat(values, runs).reshape(width, height).T


def _unpack_counts(packed: bytes) -> list[int]:
    """Unpacks COCO's compressed RLE: 5 bits per character, sign-extended; run n > 3 as the difference to run n - 2."""
    runs: list[int] = []
    value = shift = 0
    for character in packed:
        digit = character - 48
        if not 0 <= digit < 64:
            raise DataError("an RLE's counts contain a character that COCO's compression does not use")
        if shift > MAX_SHIFT:
            raise DataError("an RLE's counts contain a number beyond any image")
        value |= (digit & 0x1F) << shift
        shift += 5
        if not digit & 0x20:
            if digit & 0x10:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise DataError("an RLE's counts end in the middle of a number")
    return runs


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encodes a bool mask [H, W] as COCO RLE with text counts, fit for JSON."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode_mask(rle: dict[str, Any]) -> np.ndarray:
    """Decodes COCO RLE as bool [H, W]."""
    return coco_mask.decode(rle).astype(bool)


def stack_masks(masks: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """Stacks N masks as uint8 [N, H, W], also for N = 0."""
    return np.stack(masks) if len(masks) else np.zeros((0, height, width), dtype=np.uint8)
