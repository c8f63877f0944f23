"""LabelMe: a JSON file per image."""

from __future__ import annotations

import argparse
import base64
import binascii
import io
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.conversion.annotated import AnnotatedImage
from utils.datasets.base import DataError, read_json
from utils.datasets.images import DECODE_ERRORS
from utils.datasets.masks import encode_mask
from utils.datasets.reason_seg import IMAGE_SUFFIXES


def read_labelme(args: argparse.Namespace, skipped: Counter[str]) -> list[AnnotatedImage]:
    """One image per JSON file. Shapes with the same label and group_id are parts of one object.

    If a file has queries in ``text``, as ReasonSeg's do, each of them refers to all shapes with the label ``target``.
    """
    files = sorted(args.folder.rglob("*.json"))
    if not files:
        raise DataError(
            f"{args.folder} contains no .json, not even in subfolders; give the folder that LabelMe wrote to"
        )
    photos = []
    for file in files:
        annotation = read_json(file)
        shapes = annotation.get("shapes")
        if not isinstance(shapes, list) or not all(
            isinstance(shape, dict) and isinstance(shape.get("label"), str) and shape["label"].strip()
            for shape in shapes
        ):
            raise DataError(f"{file} is not a LabelMe file: it has no list 'shapes' of dicts with a 'label'")
        size = (annotation.get("imageHeight"), annotation.get("imageWidth"))
        photo = AnnotatedImage(
            _labelme_image(file, annotation), size if all(type(side) is int for side in size) else None
        )
        objects: dict[Any, list[Any]] = defaultdict(list)
        for number, shape in enumerate(shapes):
            try:
                parts = _labelme_shape(shape, photo)
            except DataError as error:
                skipped[f"{shape.get('shape_type')} ({error})"] += 1
                continue
            group = shape.get("group_id")
            objects[shape["label"].strip(), number if group is None else f"group {group}"] += parts
        texts = annotation.get("text")
        for (label, _), parts in objects.items():
            queries = [args.query.replace("{label}", label)]
            if isinstance(texts, list):
                queries = [str(text).strip() for text in texts if label == "target"]
            rings = [part for part in parts if isinstance(part, list)]
            for query in filter(None, queries):
                photo.queries[query] += [rings] * bool(rings) + [part for part in parts if isinstance(part, dict)]
        photos.append(photo)
    return photos


def _labelme_image(file: Path, annotation: dict[str, Any]) -> Path:
    """The image at ``imagePath`` (with backslashes on Windows), or the one of the same name beside the file."""
    image_path = str(annotation.get("imagePath") or "").replace("\\", "/")
    candidates = [file.parent / image_path] if image_path else []
    candidates += [
        path
        for path in sorted(file.parent.glob(f"{_escape_glob(file.stem)}.*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    existing = next((path for path in candidates if path.is_file()), None)
    if existing is None:
        raise DataError(f"{file} has no image: neither its imagePath {image_path!r} nor one of the same name exists")
    return existing


def _escape_glob(name: str) -> str:
    """Escapes the characters of a file name that are special in a glob pattern."""
    return "".join(f"[{character}]" if character in "[]*?" else character for character in name)


def _labelme_shape(shape: dict[str, Any], photo: AnnotatedImage) -> list[Any]:
    """Converts a shape to polygons [[[x, y], ...]] or RLE; ``DataError`` with the reason if it has no area."""
    kind = shape.get("shape_type") or "polygon"
    try:
        points = np.array(shape.get("points"), dtype=np.float64).reshape(-1, 2).round(2)
    except (TypeError, ValueError) as error:
        raise DataError("its points are not pairs of numbers") from error
    if kind == "mask":
        return [_labelme_mask(shape.get("mask"), points, photo)]
    if kind == "rectangle" and len(points) == 2:
        (x0, y0), (x1, y1) = points
        points = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    elif kind == "circle" and len(points) == 2:  # the center, and a point on the circle
        angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        radius = np.hypot(*(points[1] - points[0]))
        points = (points[0] + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)).round(2)
    elif kind not in ("polygon", "rectangle"):
        raise DataError("it has no area")
    if len(points) < 3:
        raise DataError(f"{len(points)} points")
    return [points.tolist()]


def _labelme_mask(encoded: Any, points: np.ndarray, photo: AnnotatedImage) -> dict[str, Any]:
    """Decodes LabelMe's mask, a base64 PNG whose upper left corner is the minimum of ``points``, as RLE."""
    if photo.size is None:
        raise DataError("the file lacks imageHeight and imageWidth")
    try:
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
            patch = np.asarray(picture) != 0
    except (*DECODE_ERRORS, binascii.Error, TypeError) as error:
        raise DataError("its PNG cannot be read") from error
    mask = np.zeros(photo.size, dtype=bool)
    x, y = (int(corner) for corner in points.min(axis=0)) if len(points) else (0, 0)
    if patch.ndim != 2 or x < 0 or y < 0 or mask[y : y + len(patch), x : x + patch.shape[1]].shape != patch.shape:
        raise DataError("its PNG does not fit into the image")
    mask[y : y + len(patch), x : x + patch.shape[1]] = patch
    return encode_mask(mask)
