"""What a reader of a tool's annotations returns, and the shapes that all readers clean alike.

A reader takes the paths of its subcommand and returns ``Annotated``. It raises ``DataError`` only where a file as a
whole is not of its format, or where a guess could give wrong labels. A row that it cannot use is counted in
``left_out``; if the row's label is known, an ``Annotation`` without a mask stays, so that its label is never absent in
that image.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from utils.datasets.base import DataError
from utils.datasets.masks import check_polygon, encode_mask

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels
Kind = Literal["target", "ignored", "background", "absent"]
IGNORED_LABELS = {"__ignore__", "_ignore_"}
BACKGROUND_LABELS = {"_background_", "__background__", "background"}
WRONG_GUESS = "image that was found by its name alone and may be another entry's (check --images)"
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass
class Annotation:
    """One object, or one region that carries a label.

    Attributes:
        label: what ``{label}`` stands for, or a whole query; stripped and in Unicode's NFC. "" = unknown: then nothing
            is absent in its image.
        mask: an item of the JSONL's ``masks`` (polygon rings, COCO RLE, path of a PNG); None = it has none.
        box: x0, y0, x1, y1 in pixels of the image, where that is all there is, or what was drawn. ``--boxes`` decides
            what becomes of it, so the reader does not count it in ``left_out``.
        reason: why there is no mask: "a box", "a line", "2 points".
        kind: labels that tools reserve (``__ignore__``, ``_background_``) are recognized here; "absent" = the file says
            that the image lacks it, as a black mask image does.
        is_query: whether ``label`` is a whole query, which ``--query`` leaves as it is.
    """

    label: str
    mask: Any | None
    box: Box | None = None
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
        guess: what the file calls the image, if nothing but the last part of that path led to it; "" = more did.
    """

    path: Path
    size: tuple[int, int] | None
    annotations: list[Annotation] = field(default_factory=list)
    split: str = ""
    guess: str = ""


@dataclass
class Annotated:
    """What a reader returns.

    Attributes:
        images: two entries of one file are joined later, not by the reader.
        left_out: reason -> count of what could not be used: rows, files, images. A reason is a phrase that names the
            kind ("box without a mask"); after a colon it may name a file or value, of which the first is shown.
        notes: the same for what was used in a way that the user should know of.
        not_negative: files that ``--negatives`` must not take for images without annotation: mask images, and images
            whose annotations could not be read.
    """

    images: list[AnnotatedImage] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    not_negative: set[Path] = field(default_factory=set)


def without_wrong_guesses(images: list[AnnotatedImage], result: Annotated) -> list[AnnotatedImage]:
    """The entries of a file without those whose image may be another one: train/1.jpg, as val/1.jpg is missing.

    Such are the guesses where entries that call their image by different names have the same one. They are counted.
    """
    names: dict[Path, set[str]] = defaultdict(set)
    for image in images:
        names[image.path.resolve()].add(image.guess)
    kept = []
    for image in images:
        if not image.guess or len(names[image.path.resolve()]) == 1:
            kept.append(image)
            continue
        result.left_out[f"{WRONG_GUESS}: {image.guess[:200]}"] += 1
        result.not_negative.add(image.path)
    return kept


def kind_of(label: str) -> Kind:
    """Whether a label is one that annotation tools reserve."""
    name = label.strip().lower()
    return "ignored" if name in IGNORED_LABELS else "background" if name in BACKGROUND_LABELS else "target"


def split_name(name: str) -> str:
    """A tool's split as the JSONL names it: ``valid`` is ``val``; others keep their name."""
    name = name.strip()
    return SPLITS.get(name.lower(), re.sub(r"[|/\\]", "_", name))


def split_of(path: Path) -> str:
    """The split that a path within a data set names: the last folder such as ``train`` or ``valid``; "" = none."""
    return next((part for part in reversed(path.parent.parts) if part.lower() in SPLITS), "")


def label_key(label: str) -> str:
    """What tells labels apart: all but what merely spells one otherwise.

    That is case, white space, ``_`` and ``-`` between words, full width, Unicode's normalization, invisible characters.
    """
    label = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", label).casefold())
    if not label.isascii():
        label = "".join(character for character in label if unicodedata.category(character) != "Cf")
    return " ".join(re.sub(r"(?<=\w)[_-]+(?=[^\W_])", " ", label).split())


def whole(text: Any) -> int | None:
    """A number of at most 9 digits, as a JSON number or as text; None for anything else."""
    if isinstance(text, float) and text.is_integer():
        text = int(text)
    return int(text) if not isinstance(text, bool) and re.fullmatch(r"[0-9]{1,9}", str(text).strip()) else None


def extent(height: Any, width: Any) -> tuple[int, int] | None:
    """(height, width) as a file states them, in numbers or text; None if it states none that an image can have."""
    sides = whole(height), whole(width)
    return (sides[0], sides[1]) if sides[0] and sides[1] else None


def number_pairs(points: Any) -> np.ndarray:
    """Points in any spelling as float64 [n, 2]; ``DataError`` if they are not pairs of finite numbers.

    Args:
        points: ``[x, y, x, y, ...]``, ``[[x, y], ...]`` or ``[{"x": x, "y": y}, ...]``.
    """
    if isinstance(points, (list, tuple)) and points and all(isinstance(point, dict) for point in points):
        points = [[point.get("x"), point.get("y")] for point in points]
    try:
        pairs = np.array([] if _holds_other_than_numbers(points) else points, dtype=np.float64)
    except (ValueError, OverflowError, RecursionError):  # unequal lengths; too large for a float; lists in lists
        pairs = np.zeros(0)
    if pairs.ndim == 1 and pairs.size and pairs.size % 2 == 0:
        pairs = pairs.reshape(-1, 2)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.isfinite(pairs).all():
        raise DataError("its points are not pairs of numbers")
    if (abs(pairs) > 1e9).any():  # and arithmetic on them may overflow
        raise DataError("a point far outside its image")
    return pairs


def _holds_other_than_numbers(points: Any) -> bool:
    if isinstance(points, (list, tuple)):
        return any(map(_holds_other_than_numbers, points))
    return isinstance(points, bool) or not isinstance(points, (int, float))


def clean_ring(points: Any, size: tuple[int, int]) -> list[list[float]]:
    """The ring of a polygon, rounded to 1/100 pixel: [[x, y], ...].

    Args:
        points: as in ``number_pairs``.
        size: (height, width) of the image.

    Raises:
        DataError: with the reason: fewer than 3 points, no numbers, or a coordinate far outside the image.
    """
    ring = number_pairs(points)
    try:
        check_polygon(ring, *size)
    except DataError as error:
        raise DataError("a point far outside its image") from error
    if len(ring) < 3:
        raise DataError("1 point" if len(ring) == 1 else f"{len(ring)} points")
    return ring.round(2).tolist()


def rectangle_ring(x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
    """The corners of a rectangle, given by two opposite ones."""
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]


def rectangle_box(x0: float, y0: float, x1: float, y1: float, size: tuple[int, int]) -> Box:
    """A drawn rectangle as a box; ``DataError`` if it lies far outside the image."""
    clean_ring(rectangle_ring(x0, y0, x1, y1), size)
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


def drawn_rectangle(label: str, box: Box) -> Annotation:
    """An upright rectangle that was drawn as a region: filled, unless ``--boxes sam`` segments what is in it."""
    return Annotation(label, [rectangle_ring(*box)], box)


def ellipse_ring(x: float, y: float, rx: float, ry: float, degrees: float = 0.0) -> list[list[float]]:
    """64 points of an ellipse around (x, y), turned clockwise as seen in an image whose y axis points down."""
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    turn = np.deg2rad(degrees)
    along, across = rx * np.cos(angles), ry * np.sin(angles)
    xs = x + along * np.cos(turn) - across * np.sin(turn)
    ys = y + along * np.sin(turn) + across * np.cos(turn)
    return np.stack([xs, ys], axis=1).round(2).tolist()


def pasted_mask(patch: np.ndarray, left: int, top: int, size: tuple[int, int]) -> dict[str, Any]:
    """COCO RLE of the image whose pixels from (left, top) on are ``patch``, bool [h, w]; the overhang is clipped."""
    height, width = size
    mask = np.zeros(size, dtype=bool)
    inside = patch[max(-top, 0) : max(height - top, 0), max(-left, 0) : max(width - left, 0)]
    y, x = max(top, 0), max(left, 0)
    mask[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    if not mask.any():
        raise DataError("a mask outside its image, or empty")
    return encode_mask(mask)
