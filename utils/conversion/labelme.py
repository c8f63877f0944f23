"""LabelMe: a JSON file per image; also X-AnyLabeling's, and ReasonSeg's with its queries in ``text``.

The formats are those that the tools' own code writes: LabelMe 2 to 6 (labelme/_label_file.py, shape.py) and
X-AnyLabeling (label_file.py); ReasonSeg's rules are those of LISA's loader (utils/data_processing.py).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from utils.conversion.annotated import (
    Annotated,
    AnnotatedImage,
    Annotation,
    clean_ring,
    drawn_rectangle,
    ellipse_ring,
    extent,
    number_pairs,
    pasted_mask,
    rectangle_box,
    rectangle_ring,
    split_of,
    without_wrong_guesses,
)
from utils.conversion.images import ImageFolder, files_below, image_sizes, upright_size
from utils.datasets.base import DataError, MissingDataError, parse_json, read_text
from utils.datasets.images import DECODE_ERRORS

WITHOUT_AREA = {"line": "a line", "linestrip": "a line", "point": "a point", "points": "points"}
POLYGONS = {"polygon", "rectangle", "rotation", "oriented_rectangle", "quadrilateral"}


def read_labelme(
    folder: Path, images: Path | None = None, encoding: str | None = None, extract: Path | None = None
) -> Annotated:
    """Reads every LabelMe file below a folder. Shapes with the same label and group_id are parts of one object.

    If a file has queries in ``text``, as ReasonSeg's do, each refers to all its shapes but those labelled "ignore",
    which are ignored regions, and "flag", which are none.

    Args:
        folder: of the JSON files.
        images: folder of the images, where they are neither beside the files nor where ``imagePath`` says.
        encoding: of files that are not UTF-8.
        extract: folder for images that a file holds itself (``imageData``) and that are nowhere else.

    Raises:
        DataError: if there is no LabelMe file, a file is not text, or an image may be one of several.
    """
    result = Annotated()
    files = files_below(folder, {".json"}, result.left_out)
    if not files:
        raise DataError(f"{folder} contains no .json, not even in subfolders; give the folder that LabelMe wrote to")
    finder = ImageFolder(*([images] if images else []), folder)
    for file in files:
        text = read_text(file, encoding)
        try:
            content = _content(text, file)
            path = _image(file, content, finder, extract and extract / file.relative_to(folder), result)
        except MissingDataError as error:
            result.left_out[f"file without its image: {error}"] += 1
            continue
        except _NotLabelMe as error:
            result.left_out[str(error)] += 1
            result.not_negative |= _images_of_unread(file, text, finder)
            continue
        claimed = extent(content.get("imageHeight"), content.get("imageWidth"))
        is_beside = path.parent == file.parent
        guess = not is_beside and finder.guess(path, [str(content.get("imagePath") or file.stem)], file.parent)
        split = split_of(file.relative_to(folder))
        result.images.append(AnnotatedImage(path, claimed, split=split, guess=str(file) if guess else ""))
        try:
            size = claimed if claimed == image_sizes(path)[0] else upright_size(path)
        except DataError:  # the image is left out, with this reason, where images are checked
            continue
        result.images[-1].annotations = _annotations(file, content, size, result)
    result.images = without_wrong_guesses(result.images, result)
    return result


class _NotLabelMe(DataError):
    """A file is left out; the others are read."""


def _content(text: str, file: Path) -> dict[str, Any]:
    try:
        content = parse_json(text, file, object)
    except DataError as error:
        raise _NotLabelMe(f"JSON that cannot be read: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise _NotLabelMe(f"JSON that is not a LabelMe file, without a list 'shapes': {file}")
    return content


# -- images ------------------------------------------------------------------------------------------------------------


def _image(file: Path, content: dict[str, Any], finder: ImageFolder, target: Path | None, result: Annotated) -> Path:
    """The image of a file: at ``imagePath``, of the same name, or its own ``imageData``, written to ``target``."""
    name = content.get("imagePath")
    try:
        return finder.find(name if isinstance(name, str) else "", file.stem, file.parent)
    except MissingDataError as error:
        data = _embedded(content.get("imageData"))
        if data is None or target is None:
            raise MissingDataError(f"{file} has no image: {error}, nor one of the same name") from error
        path = target.with_suffix(data[1])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[0])
        result.notes[f"image that was only in the JSON itself (imageData), written to {path.parent}"] += 1
        return path


def _images_of_unread(file: Path, text: str, finder: ImageFolder) -> set[Path]:
    """The images that a file may mean that is not valid JSON, so that none of them seems to be without annotation."""
    images = {path for path in file.parent.iterdir() if path.stem == file.stem}
    for name in re.findall(r'"imagePath"\s*:\s*"([^"]+)"', text) or [""]:
        with contextlib.suppress(DataError):
            images.add(finder.find(name, file.stem, file.parent))
    return images


def _embedded(encoded: Any) -> tuple[bytes, str] | None:
    """The bytes of an image in base64, and the suffix of its format; None if it is no image."""
    if not isinstance(encoded, str):
        return None
    try:
        data = base64.b64decode(encoded.rpartition(",")[2])
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            suffix = {"JPEG": ".jpg", "PNG": ".png"}.get(str(image.format))
    except (*DECODE_ERRORS, binascii.Error):
        return None
    return (data, suffix) if suffix else None


# -- shapes ------------------------------------------------------------------------------------------------------------


def _annotations(file: Path, content: dict[str, Any], size: tuple[int, int], result: Annotated) -> list[Annotation]:
    """The annotations of a file for an image of ``size``; shapes that cannot be used are counted."""
    texts = content.get("text")
    is_reason_seg = isinstance(texts, list)
    objects: dict[tuple[str, str], list[Any]] = defaultdict(list)  # (label, group) -> polygons and RLE
    for number, shape in enumerate(content["shapes"]):
        label = shape.get("label") if isinstance(shape, dict) else None
        if not isinstance(label, str) or not label.strip():
            label = ""  # counted where annotations without a label are
        parts = objects[label.strip(), _group(shape, number)]
        if is_reason_seg and label.lower() == "flag":
            continue
        try:
            parts += [_part(shape if isinstance(shape, dict) else {}, size)]
        except DataError as error:
            result.left_out[str(error)] += 1
    annotations = []
    for (label, _), parts in objects.items():
        annotations += _annotations_of(label, parts, is_reason_seg)
    return _reason_seg(file, texts, annotations, result) if isinstance(texts, list) else annotations


def _annotations_of(label: str, parts: list[Any], is_reason_seg: bool) -> list[Annotation]:
    """The annotations of an object: its polygons as one mask, each RLE. It is a box if one rectangle is all it has."""
    if len(parts) == 1 and isinstance(parts[0], tuple) and not is_reason_seg:
        return [drawn_rectangle(label, parts[0])]
    rings = [rectangle_ring(*part) if isinstance(part, tuple) else part for part in parts if not isinstance(part, dict)]
    masks = [rings] * bool(rings) + [part for part in parts if isinstance(part, dict)]
    return [Annotation(label, mask) for mask in masks] or [Annotation(label, None, reason="no area")]


def _group(shape: Any, number: int) -> str:
    group = shape.get("group_id") if isinstance(shape, dict) else None
    return f"shape {number}" if group is None else f"group {group!r}"


def _reason_seg(file: Path, texts: list[Any], shapes: list[Annotation], result: Annotated) -> list[Annotation]:
    """The annotations of ReasonSeg: every query refers to all targets."""
    queries = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    if not queries:
        result.left_out[f"file without a query in 'text': {file}"] += 1
    annotations = []
    for shape in shapes:
        if shape.label.lower() == "flag":
            result.left_out["shape labelled 'flag'"] += 1
        elif "ignore" in shape.label.lower():
            shape.kind = "ignored"
            annotations.append(shape)
        else:
            annotations += [Annotation(query, shape.mask, is_query=True) for query in queries]
    if not any(annotation.mask and annotation.is_query for annotation in annotations):
        annotations += [Annotation(query, None, reason="no target", is_query=True) for query in queries]
        result.left_out[f"file without a target: {file}"] += 1
    return annotations


def _part(shape: dict[str, Any], size: tuple[int, int]) -> Any:
    """Converts a shape to a polygon [[x, y], ...], RLE, or a box; ``DataError`` with the reason if it is none."""
    kind = str(shape.get("shape_type") or "polygon")
    try:
        if kind == "mask":
            return _pasted(shape.get("mask"), number_pairs(shape.get("points")), size)
        if kind in WITHOUT_AREA:
            raise DataError(f"{WITHOUT_AREA[kind]} has no area")
        if kind not in (*POLYGONS, "circle", "cuboid"):
            raise DataError("a kind of shape that is not known")
        points = number_pairs(shape.get("points"))
        if kind == "rectangle" and len(points) in (2, 4):  # LabelMe writes two corners, X-AnyLabeling all four
            (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
            corners = {(x, y) for x in (x0, x1) for y in (y0, y1)}
            if len(points) == 2 or {tuple(point) for point in points.tolist()} == corners:
                return rectangle_box(x0, y0, x1, y1, size)
        elif kind == "circle":  # the center, and a point on the circle
            if len(points) != 2:
                raise DataError(f"a circle of {len(points)} points; it needs 2")
            (x, y), (radius_x, radius_y) = points[0].tolist(), (points[1] - points[0]).tolist()
            radius = math.hypot(radius_x, radius_y)
            points = np.array(ellipse_ring(x, y, radius, radius))
        elif kind == "cuboid" and len(points) > 3:  # its corners, in the image
            points = cv2.convexHull(points.astype(np.float32))[:, 0]
        return clean_ring(points.tolist(), size)
    except DataError as error:
        raise DataError(f"{kind[:40]} ({error})") from error


def _pasted(encoded: Any, points: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """LabelMe's mask as RLE: a base64 PNG whose upper left corner is the minimum of ``points``, clipped."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(encoded)), formats=("PNG",)) as picture:
            patch = np.asarray(picture.convert("L")) != 0
    except (*DECODE_ERRORS, binascii.Error, TypeError) as error:
        raise DataError("its PNG cannot be read") from error
    left, top = (int(corner) for corner in np.clip(points.min(axis=0).round(), -(10**6), 10**6))
    return pasted_mask(patch, left, top, size)
