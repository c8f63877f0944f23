"""Parts that the readers of YOLO, Label Studio, VIA and CVAT share: numbers as these tools write them, and regions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from utils.conversion.annotated import Annotated, Annotation, drawn_rectangle, without_wrong_guesses
from utils.conversion.images import ImageFolder, upright_size
from utils.datasets.base import DataError, MissingDataError

Size = tuple[int, int]  # (height, width)


class Collector:
    """Collects what one annotation file says of its images.

    Args:
        file: the annotation file.
        folders: folders of the images, the likeliest first.
    """

    def __init__(self, file: Path, *folders: Path) -> None:
        self.file, self.folders = file, folders
        self.finder = ImageFolder(*folders)
        self.annotated = Annotated()
        self.found = 0
        self.missing: list[str] = []  # names of images that are not there

    def find(self, *names: str, stem: str = "") -> Path | None:
        """The image that the first possible name leads to, or else the ``stem``; None = counted as missing.

        Raises:
            DataError: if no name leads to one image, and one of them to several.
        """
        ambiguous: DataError | None = None
        for name in names:
            try:
                path = self.finder.find(name, stem, self.file.parent)
                self.found += 1
                return path
            except MissingDataError:
                continue
            except DataError as error:
                ambiguous = error
        if ambiguous:
            raise DataError(f"{self.file}: {ambiguous}") from ambiguous
        self.missing.append(names[0])
        return None

    def guess(self, path: Path, *names: str) -> str:
        """See ``AnnotatedImage.guess``; the names are those of ``find``."""
        return self.finder.guess(path, names, self.file.parent)

    def result(self) -> Annotated:
        """All that was collected; ``DataError`` if the images of the file are elsewhere."""
        if self.missing and not self.found:
            raise DataError(
                f"{self.file}: none of its images is in {' or '.join(map(str, self.folders))}, such as "
                f"{self.missing[0][:200]!r}; give their folder with --images"
            )
        if self.missing:
            self.annotated.left_out += Counter(f"image that is missing: {name[:200]}" for name in self.missing)
        self.annotated.images = without_wrong_guesses(self.annotated.images, self.annotated)
        return self.annotated


def add_region(annotations: list[Annotation], label: str, draw: Callable[[], Any], left_out: Counter[str]) -> None:
    """Appends a region with the mask, or the rectangle (a tuple), that ``draw`` returns.

    If it raises ``DataError``, the region has no mask and is counted.
    """
    try:
        drawn = draw()
        annotations.append(drawn_rectangle(label, drawn) if isinstance(drawn, tuple) else Annotation(label, drawn))
    except DataError as error:
        annotations.append(Annotation(label, None, reason=str(error)))
        left_out[f"region without a mask ({error})"] += 1


def add_unnamed(annotations: list[Annotation], reason: str, left_out: Counter[str]) -> None:
    """Appends an object of which nobody can tell what it is: then nothing is absent in its image."""
    annotations.append(Annotation("", None, reason=reason))
    left_out[reason] += 1


def number(value: Any) -> float:
    """A finite number, or the text of one; ``DataError`` for anything else."""
    try:
        parsed = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        parsed = math.nan
    if not math.isfinite(parsed):
        raise DataError("its points are not pairs of numbers")
    return parsed


def numbers(record: Any, *names: str) -> list[float]:
    """The values of a shape's keys or XML attributes as finite numbers."""
    return [number(record.get(name)) for name in names]


def trusted_size(path: Path, claimed: Size | None, annotated: Annotated) -> Size | None:
    """The size for which an image's annotations are read: the claimed one, or else that of the image itself.

    None if the image cannot be read, or neither its stored nor its upright pixels have the claimed size: then its masks
    would be wrong, and of any size that a file may claim. The image is counted as left out.
    """
    try:
        size = upright_size(path)
        if claimed in (None, size, size[::-1]):
            return claimed or size
        problem = f"image of another size than its annotations were made for: {path}"
    except DataError as error:
        problem = f"image that cannot be read: {error}"
    annotated.left_out[problem] += 1
    annotated.not_negative.add(path)
    return None


def positive(*sides: float) -> None:
    """Raises ``DataError`` if a side or a radius is not above 0: the shape has no area."""
    if min(sides) <= 0:
        raise DataError("no area")


def turned_ring(ring: Sequence[Sequence[float]], degrees: float, x: float, y: float) -> list[list[float]]:
    """A ring, [[x, y], ...], turned clockwise as seen in the image around the point (x, y)."""
    if not degrees:
        return [list(point) for point in ring]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [[x + (px - x) * cos - (py - y) * sin, y + (px - x) * sin + (py - y) * cos] for px, py in ring]
