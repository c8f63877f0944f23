"""CVAT: the XML of "CVAT for images 1.1" and "CVAT for video 1.1".

The format is the one that CVAT's exporter writes (cvat/apps/dataset_manager/formats/cvat.py) and its manual describes
("XML annotation format"): coordinates in pixels, rotations in degrees clockwise around the center, masks as run lengths
by rows within a box, background first. A track of a video lists a shape for every frame in which it is visible.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from utils.conversion.annotated import (
    Annotated,
    AnnotatedImage,
    Annotation,
    clean_ring,
    ellipse_ring,
    extent,
    pasted_mask,
    rectangle_box,
    rectangle_ring,
    whole,
)
from utils.conversion.images import IMAGE_SUFFIXES, files_below
from utils.conversion.regions import (
    Collector,
    Size,
    add_region,
    add_unnamed,
    number,
    numbers,
    positive,
    trusted_size,
    turned_ring,
)
from utils.datasets.base import DataError

WITHOUT_AREA = {
    "polyline": "a line",
    "points": "points",
    "cuboid": "a cuboid",
    "skeleton": "a skeleton",
    "tag": "a tag of the whole image",
}
SHAPES = {"box", "polygon", "ellipse", "mask", *WITHOUT_AREA}


def read_cvat(path: Path, images: Path | None = None, attribute: str = "", encoding: str | None = None) -> Annotated:
    """Reads the images, or the frames of videos, that are there as image files.

    Args:
        path: the XML file, or the unpacked export with its ``annotations.xml``.
        images: folder of the images; default: that of the file.
        attribute: name of a CVAT attribute whose value is the label, such as a caption; "" = CVAT's label.
        encoding: of the file, if it is not the one that it declares.

    Raises:
        DataError: if the file is not such XML, or has a document type (CVAT writes none, and its entities may expand
            without bound); if an image may be one of several; if frames are not numbered as CVAT numbers them.
    """
    file = path / "annotations.xml" if path.is_dir() else path
    reader = _Reader(file, images, attribute)
    tracks: list[ET.Element] = []
    tasks: list[ET.Element] = []
    for element in _children_of_root(file, encoding):
        if element.tag == "meta":
            tasks += [task for task in element.iter() if task.tag in ("task", "job")]
        elif element.tag == "image":
            reader.add_image(element)
        elif element.tag == "track":
            tracks.append(element)
    if tracks:
        _add_tracks(reader, tracks, tasks)
    elif not (reader.annotated.images or reader.annotated.left_out or reader.missing):
        raise DataError(f"{file} holds neither images nor tracks; export 'CVAT for images 1.1'")
    return reader.result()


# -- XML ---------------------------------------------------------------------------------------------------------------


class _Children(ET.TreeBuilder):
    """Collects the children of the root, so that a file of any size needs the memory of one child at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[ET.Element] = []
        self.complete: list[ET.Element] = []

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise DataError("it has a DOCTYPE, which CVAT does not write; remove it")

    def start(self, tag: str, attrs: dict[str, str]) -> ET.Element:  # type: ignore[override]
        element = super().start(tag, attrs)
        self.open.append(element)
        return element

    def end(self, tag: str) -> ET.Element:
        element = super().end(tag)
        self.open.pop()
        if len(self.open) == 1:
            self.complete.append(element)
            self.open[0].clear()
        return element


def _children_of_root(file: Path, encoding: str | None) -> Iterator[ET.Element]:
    builder = _Children()
    parser = ET.XMLParser(target=builder, encoding=encoding)
    try:
        with file.open("rb") as stream:
            for chunk in iter(lambda: stream.read(1 << 16), b""):
                parser.feed(chunk)
                complete, builder.complete = builder.complete, []
                yield from complete
        root = parser.close().tag
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ET.ParseError, ValueError, LookupError) as error:
        raise DataError(f"{file} is not XML as CVAT writes it: {error}; export it again") from error
    if root != "annotations":
        raise DataError(f"{file} is not XML of CVAT: its root is {root[:80]!r}; expected 'annotations'")


# -- images ------------------------------------------------------------------------------------------------------------


class _Reader(Collector):
    def __init__(self, file: Path, images: Path | None, attribute: str) -> None:
        super().__init__(file, *([images] if images else [file.parent / "images", file.parent]))
        self.attribute = attribute
        self.attributes: set[str] = set()  # the names that occur

    def add_image(self, element: ET.Element) -> None:
        """Reads an <image>; one that is not there, or has another size than the file says, is left out."""
        name, subset = element.get("name", ""), element.get("subset", "")
        # projects have a folder per subset; frames of a video have names without a suffix
        stem = "" if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES else PurePosixPath(name).name
        names = [f"{subset}/{name}"] * bool(subset) + [name]
        path = self.find(*names, stem=stem)
        if path is None:
            return
        claimed = extent(element.get("height"), element.get("width"))
        size = trusted_size(path, claimed, self.annotated)
        if size is None:
            return
        split, guess = "" if subset.lower() == "default" else subset, "" if stem else self.guess(path, *names)
        image = AnnotatedImage(path, claimed, split=split, guess=guess)
        for shape in element:
            self.add_shape(image.annotations, shape, shape.get("label", ""), size)
        self.annotated.images.append(image)

    def add_shape(self, annotations: list[Annotation], shape: ET.Element, label: str, size: Size) -> None:
        if shape.tag not in SHAPES:
            self.annotated.left_out[f"element <{shape.tag[:40]}>, which CVAT does not write"] += 1
            return
        values = {child.get("name", ""): child.text or "" for child in shape if child.tag == "attribute"}
        self.attributes |= values.keys()
        if self.attribute:
            label = values.get(self.attribute, "")
        if label.strip():
            add_region(annotations, label, lambda: _draw(shape, size), self.annotated.left_out)
        else:
            what = f"attribute {self.attribute!r}" if self.attribute else "label"
            add_unnamed(annotations, f"shape without {what}", self.annotated.left_out)

    def result(self) -> Annotated:
        if self.attribute and self.attribute not in self.attributes and self.annotated.images:
            known = ", ".join(sorted(self.attributes)) or "none"
            raise DataError(f"{self.file}: no shape has an attribute {self.attribute!r}; there are: {known}")
        return super().result()


def _draw(shape: ET.Element, size: Size) -> Any:
    """The mask or the box of a shape; ``DataError`` with the reason if it has no area."""
    if shape.tag in WITHOUT_AREA:
        raise DataError(WITHOUT_AREA[shape.tag])
    if shape.tag == "mask":
        return _mask(shape, size)
    if shape.tag == "polygon":
        return [
            clean_ring([[number(xy) for xy in pair.split(",")] for pair in shape.get("points", "").split(";")], size)
        ]
    degrees = number(shape.get("rotation", 0))
    if shape.tag == "ellipse":
        x, y, rx, ry = numbers(shape, "cx", "cy", "rx", "ry")
        positive(rx, ry)
        return [clean_ring(ellipse_ring(x, y, rx, ry, degrees), size)]
    x0, y0, x1, y1 = numbers(shape, "xtl", "ytl", "xbr", "ybr")
    positive(abs(x1 - x0), abs(y1 - y0))
    if not degrees:
        return rectangle_box(x0, y0, x1, y1, size)
    return [clean_ring(turned_ring(rectangle_ring(x0, y0, x1, y1), degrees, (x0 + x1) / 2, (y0 + y1) / 2), size)]


def _mask(shape: ET.Element, size: Size) -> dict[str, Any]:
    """Decodes run lengths, by rows within a box, as COCO RLE of the whole image."""
    left, top, width, height = (int(side) for side in numbers(shape, "left", "top", "width", "height"))
    if not (0 < height <= 2 * size[0] and 0 < width <= 2 * size[1]):
        raise DataError("a mask far larger than its image")
    try:
        runs = np.array(shape.get("rle", "").split(","), dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise DataError("a mask whose run lengths are no numbers") from error
    if (runs < 0).any() or (runs > height * width).any() or runs.sum() != height * width:
        raise DataError("a mask whose run lengths do not fill its box")
    patch = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
    return pasted_mask(patch, left, top, size)


# -- videos ------------------------------------------------------------------------------------------------------------


def _add_tracks(reader: _Reader, tracks: list[ET.Element], tasks: list[ET.Element]) -> None:
    """Reads the frames of a video that are there as images, with the shapes of all tracks.

    CVAT names frames by their number, from 0: ``frame_000000.PNG``. A frame between the shapes of a track, or after its
    last one, has an annotation without mask: the object is there, until a shape that is ``outside``.
    """
    if len({track.get("task_id") for track in tracks}) > 1:
        raise DataError(
            f"{reader.file} has tracks of several tasks, whose frames have the same numbers; export each task"
        )
    frames = _frames(reader, tasks)
    claimed = (
        extent(tasks[0].findtext("original_size/height"), tasks[0].findtext("original_size/width")) if tasks else None
    )
    images: dict[int, tuple[AnnotatedImage, Size]] = {}
    for frame, path in sorted(frames.items()):
        if size := trusted_size(path, claimed, reader.annotated):
            images[frame] = (AnnotatedImage(path, claimed), size)
    for track in tracks:
        _add_track(reader, track, images)
    reader.annotated.images += [image for image, _ in images.values()]


def _frames(reader: _Reader, tasks: list[ET.Element]) -> dict[int, Path]:
    """Number of a frame -> its image."""
    frames: dict[int, Path] = {}
    for path in files_below(reader.folders[-1], IMAGE_SUFFIXES, reader.annotated.left_out):
        if match := re.fullmatch(r"frame_(\d{6,})", path.stem):
            other = frames.setdefault(int(match[1]), path)
            if other != path:
                raise DataError(f"{reader.file}: {other} and {path} are the same frame; give --images one folder")
    if not frames:
        raise DataError(
            f"{reader.file} has tracks of a video, but no frame_000000.png or the like is below {reader.folders[-1]}; "
            "export it with images, or extract its frames: ffmpeg -i VIDEO -start_number 0 frame_%06d.png"
        )
    stops = [stop for task in tasks if (stop := whole(task.findtext("stop_frame"))) is not None]
    if stops and max(frames) > max(stops):
        raise DataError(
            f"{frames[max(frames)]} is beyond the last frame, {max(stops)}, of {reader.file}; CVAT counts from 0: "
            "extract frames with ffmpeg -start_number 0"
        )
    return frames


def _add_track(reader: _Reader, track: ET.Element, images: dict[int, tuple[AnnotatedImage, Size]]) -> None:
    label, left_out = track.get("label", ""), reader.annotated.left_out
    shapes = {frame: shape for shape in track if (frame := whole(shape.get("frame"))) is not None}
    if unnumbered := sum(whole(shape.get("frame")) is None for shape in track):
        left_out["shape without the number of its frame"] += unnumbered
    numbers_of_shapes = sorted(shapes)
    for frame, (image, size) in images.items():
        position = bisect_right(numbers_of_shapes, frame) - 1
        latest = numbers_of_shapes[position] if position >= 0 else None
        if latest is None or shapes[latest].get("outside") == "1":
            continue
        if latest == frame:
            reader.add_shape(image.annotations, shapes[frame], label, size)
        else:
            hidden = Annotation("" if reader.attribute else label, None, reason="between two keyframes")
            image.annotations.append(hidden)
            left_out["shape between two keyframes"] += 1
    if unseen := sum(frame not in images and shape.get("outside") != "1" for frame, shape in shapes.items()):
        left_out["shape in a frame that is not there as an image"] += unseen
