"""What a reader of a tool's annotations returns, and the shapes that all readers clean alike.

A reader takes the paths of its subcommand and returns ``Annotated``. It raises ``DataError`` only where a file as a
whole is not of its format, or where a guess could give wrong labels. A row that it cannot use is counted in
``left_out``; if the row's label is known, an ``Annotation`` without a mask stays, so that its label is never absent in
that image.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from utils.datasets.base import DataError
from utils.datasets.masks import check_polygon

Kind = Literal["target", "ignored", "background"]
IGNORED_LABELS = {"__ignore__", "_ignore_"}
BACKGROUND_LABELS = {"_background_", "__background__", "background"}
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass
class Annotation:
    """One object, or one region that carries a label.

    Attributes:
        label: what ``{label}`` stands for, or a whole query; stripped and in Unicode's NFC.
        mask: an item of the JSONL's ``masks`` (polygon rings, COCO RLE, path of a PNG); None = it has none.
        box: x0, y0, x1, y1 in pixels of the image, where that is all there is.
        reason: why there is no mask: "a box", "a line", "2 points".
        kind: of its label; labels that tools reserve (``__ignore__``, ``_background_``) are recognized here.
        is_query: whether ``label`` is a whole query, which ``--query`` leaves as it is.
    """

    label: str
    mask: Any | None
    box: tuple[float, float, float, float] | None = None
    reason: str = ""
    kind: Kind = "target"
    is_query: bool = False

    def __post_init__(self) -> None:
        self.label = unicodedata.normalize("NFC", self.label.strip())
        if self.kind == "target" and not self.is_query:
            self.kind = kind_of(self.label)


@dataclass
class AnnotatedImage:
    """An image with its annotations.

    Attributes:
        path: the image file; it exists.
        size: (height, width) that the annotations were made for; None = that of the image, upright by EXIF.
        split: the tool's own split as it is spelled there ("train", "valid", "Test"); "" = none.
    """

    path: Path
    size: tuple[int, int] | None
    annotations: list[Annotation] = field(default_factory=list)
    split: str = ""
    queries: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))


@dataclass
class Annotated:
    """What a reader returns.

    Attributes:
        images: two entries of one file are joined later, not by the reader.
        left_out: reason -> count of what could not be used: rows, files, images. A reason is a phrase that names the
            kind ("box without a mask"), and the file or value of singular things.
        notes: reason -> count of what was used in a way that the user should know of.
    """

    images: list[AnnotatedImage] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)


def kind_of(label: str) -> Kind:
    """Whether a label is one that annotation tools reserve."""
    name = label.strip().lower()
    return "ignored" if name in IGNORED_LABELS else "background" if name in BACKGROUND_LABELS else "target"


def clean_ring(points: Any, size: tuple[int, int]) -> list[list[float]]:
    """The ring of a polygon in any spelling, rounded to 1/100 pixel: [[x, y], ...].

    Args:
        points: ``[x, y, x, y, ...]``, ``[[x, y], ...]`` or ``[{"x": x, "y": y}, ...]``.
        size: (height, width) of the image.

    Raises:
        DataError: with the reason: fewer than 3 points, no numbers, or a coordinate far outside the image.
    """
    if isinstance(points, Sequence) and points and all(isinstance(point, dict) for point in points):
        points = [[point.get("x"), point.get("y")] for point in points]
    if _holds_text(points):  # numpy would parse "1"
        raise DataError("its points are not pairs of numbers")
    try:
        ring = check_polygon(points, *size)
    except DataError as error:
        far = "far outside" in str(error)
        raise DataError("a point far outside its image" if far else "its points are not pairs of numbers") from error
    except OverflowError as error:
        raise DataError("a point far outside its image") from error
    if len(ring) < 3:
        raise DataError(f"{len(ring)} points" if len(ring) != 1 else "1 point")
    return ring.round(2).tolist()


def _holds_text(points: Any) -> bool:
    if isinstance(points, (list, tuple)):
        return any(_holds_text(point) for point in points)
    return points is None or isinstance(points, (str, bool, dict))


def rectangle_ring(x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
    """The corners of a rectangle, given by two opposite ones."""
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]


def ellipse_ring(x: float, y: float, rx: float, ry: float, degrees: float = 0.0) -> list[list[float]]:
    """64 points of an ellipse around (x, y), turned clockwise as seen in an image whose y axis points down."""
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    turn = np.deg2rad(degrees)
    along, across = rx * np.cos(angles), ry * np.sin(angles)
    xs = x + along * np.cos(turn) - across * np.sin(turn)
    ys = y + along * np.sin(turn) + across * np.cos(turn)
    return np.stack([xs, ys], axis=1).round(2).tolist()
