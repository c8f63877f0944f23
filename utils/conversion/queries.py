"""From the annotations of a tool to the queries of each image: joined, checked, in the pixels of the upright image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.conversion.annotated import Annotated, AnnotatedImage, Annotation, Box, label_key, rectangle_ring, split_name
from utils.conversion.images import first_of_copies, image_sizes, upright_size
from utils.datasets.base import DataError
from utils.datasets.custom import read_mask
from utils.datasets.masks import encode_mask
from utils.wording import counted

BoxMasks = Callable[[Path, list[Box]], list[Any]]  # image, boxes -> a mask per box
TURNS = {  # EXIF orientations that swap height and width: stored -> upright
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass
class QueriedImage:
    """An image file with its queries.

    Attributes:
        path: resolved.
        size: (height, width), upright by EXIF.
        queries: query -> its masks; [] = the annotations say that it is absent.
        ignore: masks of ignored regions.
        annotated: keys (``label_key``) of all queries that are annotated here in any form.
        is_annotated: whether it has any annotation, be it background.
        has_unknown: whether an annotation has no label: then no query can be called absent.
        split: the tool's own, "" = none.
    """

    path: Path
    size: tuple[int, int]
    queries: dict[str, list[Any]] = field(default_factory=dict)
    ignore: list[Any] = field(default_factory=list)
    annotated: set[str] = field(default_factory=set)
    is_annotated: bool = False
    has_unknown: bool = False
    split: str = ""


@dataclass
class Summary:
    """What became of the annotations; printed after every conversion."""

    images: int = 0
    annotations: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    reserved: Counter[tuple[str, str]] = field(default_factory=Counter)  # (label, what became of it)
    spellings: dict[str, dict[str, None]] = field(default_factory=dict)  # key -> spellings, in order

    def lines(self) -> list[str]:
        """The summary as text; what occurs 0 times is not in it."""
        counts = {"image": self.images, "annotation": self.annotations, "label": len(self.spellings)}
        text = ["read: " + ", ".join(counted(number, noun) for noun, number in counts.items())]
        text += [f"  left out: {line}" for line in _grouped(self.left_out)]
        text += [f"  reserved: {count} x {label!r}, {fate}" for (label, fate), count in (+self.reserved).items()]
        text += [f"  note: {line}" for line in _grouped(self.notes)]
        for first, *others in self.spellings.values():
            if others:
                text.append(f"  joined: {', '.join(map(repr, others))} with {first!r}")
        return [line.encode("utf-8", "backslashreplace").decode() for line in text]  # lone surrogates cannot be printed


def _grouped(reasons: Counter[str]) -> list[str]:
    """Counts of reasons; those that differ after a colon only are one, with the first of them as an example."""
    groups: dict[str, list[tuple[str, int]]] = {}
    for reason, count in (+reasons).items():
        kind, _, detail = reason.partition(": ")
        groups.setdefault(kind, []).append((detail, count))
    return [
        f"{sum(count for _, count in members)} x {kind}"
        + (f": {members[0][0]}" if members[0][0] else "")
        + (", and others" if len(members) > 1 and members[0][0] else "")
        for kind, members in groups.items()
    ]


class Queries:
    """Turns the annotations of a tool into queries.

    Args:
        template: the query, with ``{label}``.
        box_masks: turns boxes into masks; None = boxes are left out.
        summary: receives what was left out, joined and reserved.
    """

    def __init__(self, template: str, box_masks: BoxMasks | None, summary: Summary) -> None:
        self.template, self.box_masks, self.summary = template, box_masks, summary
        self._first: dict[str, str] = {}  # key of a query -> its spelling where it was met first

    def images_of(self, annotated: Annotated) -> list[QueriedImage]:
        """The images of all entries that can be used, one per file; a copy under another name is the same image."""
        summary = self.summary
        summary.left_out += annotated.left_out
        summary.notes += annotated.notes
        files: dict[Path, list[AnnotatedImage]] = {}
        first = first_of_copies(entry.path.resolve() for entry in annotated.images)
        for copy, path in first.items():
            summary.notes[f"image that is there twice, used as one: {copy} is {path}"] += copy != path
        for entry in annotated.images:
            files.setdefault(first[entry.path.resolve()], []).append(entry)
            for annotation in entry.annotations:
                summary.annotations += bool(annotation.label or annotation.kind != "background")
                if annotation.label and annotation.kind in ("target", "absent"):
                    summary.spellings.setdefault(label_key(annotation.label), {})[annotation.label] = None
        summary.images = len(files)
        images = []
        for path, entries in files.items():
            usable = [entry for entry in entries if self._is_usable(entry)]
            if usable:
                annotations = [annotation for entry in usable for annotation in entry.annotations]
                size, split = upright_size(path), self._split(usable)
                image = QueriedImage(path, size, is_annotated=bool(annotations), split=split)
                image.has_unknown = len(usable) < len(entries)
                for entry in usable:
                    self._check_masks(entry, size)
                self._fill_boxes(image, annotations)
                self._collect(image, annotations)
                images.append(image)
        return images

    def _is_usable(self, entry: AnnotatedImage) -> bool:
        """Whether the image can be read and has the size that its annotations were made for."""
        left_out = self.summary.left_out
        try:
            upright, (stored, orientation) = upright_size(entry.path), image_sizes(entry.path)
            str(entry.path).encode()
        except DataError as error:
            left_out[f"image that cannot be read: {error}"] += 1
            return False
        except UnicodeEncodeError:
            left_out[f"image whose file name is not UTF-8: {str(entry.path)!a}"] += 1
            return False
        if entry.size in (None, upright):
            if orientation != 1 and (entry.size is None or stored == upright):
                self.summary.notes[
                    "image that its EXIF data turn or mirror, and whose size does not tell; its annotations were taken "
                    f"as made for the upright one: {entry.path}"
                ] += 1
            return True
        if entry.size == stored and orientation in TURNS:
            self.summary.notes[f"image whose annotations were turned with it, as its EXIF data say: {entry.path}"] += 1
            return True
        left_out[
            f"image of another size than its annotations were made for: {entry.path} is {_by(upright)}, they say "
            f"{_by(entry.size or upright)}"
        ] += 1
        return False

    def _split(self, entries: list[AnnotatedImage]) -> str:
        """The tool's own split of an image; of several, the one that is not for training."""
        names = {split_name(entry.split) for entry in entries} - {""}
        splits = sorted(names, key=lambda name: (name == "train", name))
        if len(splits) > 1:
            self.summary.notes[
                f"image in the splits {' and '.join(splits)}, used in {splits[0]} alone: {entries[0].path}"
            ] += 1
        return splits[0] if splits else ""

    def _check_masks(self, entry: AnnotatedImage, upright: tuple[int, int]) -> None:
        """Decodes every mask; one that fails is removed. Those made for the stored pixels are turned upright."""
        stored, orientation = image_sizes(entry.path)
        turn = TURNS[orientation] if entry.size == stored != upright else None
        for annotation in entry.annotations:
            if turn is not None and annotation.box:
                annotation.box = _turned_box(annotation.box, orientation, *stored)
            if annotation.mask is None or annotation.kind not in ("target", "ignored"):
                continue
            try:
                mask = read_mask(annotation.mask, Path(), *(upright if turn is None else stored))
            except DataError as error:
                reason = "mask outside its image, or empty" if "empty" in str(error) else f"mask that fails: {error}"
                self.summary.left_out[reason] += 1
                annotation.mask = None
                continue
            if mask.all() and annotation.kind == "target":
                self.summary.notes[f"mask that covers its whole image: {entry.path}"] += 1
            if turn is not None:
                annotation.mask = encode_mask(np.array(Image.fromarray(mask).transpose(turn)))

    def _fill_boxes(self, image: QueriedImage, annotations: list[Annotation]) -> None:
        """Gives annotations that have only a box a mask; without ``box_masks`` they are counted.

        A drawn rectangle is filled. An ignored region is its box in any case: what is in it, as background, would be
        trained as such.
        """
        boxed = []
        for annotation in annotations:
            if annotation.box is None:
                continue
            if annotation.kind == "ignored" and (box := _clipped(annotation.box, image.size)):
                annotation.mask = [rectangle_ring(*box)]
            elif annotation.kind in ("target", "ignored"):
                boxed.append(annotation)
        left_out = self.summary.left_out
        if self.box_masks is None:
            drawn = sum(annotation.mask is not None for annotation in boxed)
            left_out["box without a mask (--boxes rectangle or --boxes sam makes one of it)"] += len(boxed) - drawn
            self.summary.notes["drawn rectangle, filled (--boxes sam segments what is in it)"] += drawn
            return
        clipped = [(annotation, box) for annotation in boxed if (box := _clipped(annotation.box, image.size))]
        left_out["box outside its image"] += len(boxed) - len(clipped)
        masks = self.box_masks(image.path, [box for _, box in clipped]) if clipped else []
        for (annotation, _), mask in zip(clipped, masks, strict=True):
            try:
                read_mask(mask, Path(), *image.size)
            except DataError:
                left_out["box in which there is no mask"] += 1
                annotation.mask = None
                continue
            annotation.mask = mask
            self.summary.notes["box made into a mask by --boxes"] += 1

    def _collect(self, image: QueriedImage, annotations: list[Annotation]) -> None:
        """Fills an image's queries, ignored regions and annotated keys."""
        ignored = [
            (read_mask(annotation.mask, Path(), *image.size), number)
            for number, annotation in enumerate(annotations)
            if annotation.kind == "ignored" and annotation.mask is not None
        ]
        absent = []
        for number, annotation in enumerate(annotations):
            if annotation.kind in ("ignored", "background"):
                used = annotation.kind == "ignored" and annotation.mask is not None
                fate = "ignored region" if used else "no query"
                self.summary.reserved[annotation.label, fate] += bool(annotation.label)
                image.ignore += [annotation.mask] if used else []
            elif not (query := self._query(annotation)):
                image.has_unknown = True
            elif annotation.kind == "absent":
                absent.append(query)
            else:
                image.annotated.add(label_key(query))
                if annotation.mask is not None:
                    mask = _above_ignored(annotation.mask, number, ignored, image.size)
                    image.queries.setdefault(query, []).extend([] if mask is None else [mask])
                    self.summary.left_out["mask within a smaller ignored region"] += mask is None
        image.queries = {query: masks for query, masks in image.queries.items() if masks}
        image.queries |= {query: [] for query in absent if label_key(query) not in image.annotated}

    def _query(self, annotation: Annotation) -> str:
        """The query of an annotation, in the spelling met first; "" if there is none."""
        label = annotation.label
        if any("\ud800" <= character <= "\udfff" for character in label):
            self.summary.left_out["label with half a character (a lone surrogate)"] += 1
            return ""
        if not label:
            self.summary.left_out["annotation without a label"] += not annotation.reason
            return ""
        label = next(iter(self.summary.spellings[label_key(label)]))
        query = label if annotation.is_query else self.template.replace("{label}", label)
        return self._first.setdefault(label_key(query), query)


def _by(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def _clipped(box: Box | None, size: tuple[int, int]) -> Box | None:
    """The part of a box within the image; None if there is none."""
    x0, y0, x1, y1 = box or (0, 0, 0, 0)
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, size[1]), min(y1, size[0])
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def _turned_box(box: Box, orientation: int, height: int, width: int) -> Box:
    """A box of the stored image, of ``height`` and ``width``, in the upright one (``TURNS``)."""
    x0, y0, x1, y1 = box
    return {
        5: (y0, x0, y1, x1),
        6: (height - y1, x0, height - y0, x1),
        7: (height - y1, width - x1, height - y0, width - x0),
        8: (y0, width - x1, y1, width - x0),
    }[orientation]


def _above_ignored(mask: Any, number: int, ignored: list[tuple[np.ndarray, int]], size: tuple[int, int]) -> Any | None:
    """A target's mask without the smaller ignored regions, as if all were drawn from the largest to the smallest.

    So does ReasonSeg; of equal areas, the one that comes first in the file is drawn last. None = nothing is left.
    """
    if not ignored:
        return mask
    target = read_mask(mask, Path(), *size)
    smaller = [region for region, other in ignored if (int(region.sum()), other) < (int(target.sum()), number)]
    cut = target.astype(bool) & ~np.any(smaller, axis=0) if smaller else target.astype(bool)
    if cut.sum() == target.sum():
        return mask
    return encode_mask(cut) if cut.any() else None
