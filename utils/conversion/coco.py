"""COCO: JSON files with images, annotations and categories, as COCO's own, or as other tools export them.

The format is COCO's (cocodataset.org, "Data format"); what exporters write otherwise was found in the code of CVAT and
Datumaro, Label Studio's converter and Roboflow: flat and paired polygons, RLE in lists, ids as text, missing sizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.conversion.annotated import (
    Annotated,
    AnnotatedImage,
    Annotation,
    clean_ring,
    extent,
    number_pairs,
    split_name,
    split_of,
    without_wrong_guesses,
)
from utils.conversion.images import ImageFolder, files_below, image_sizes, upright_size
from utils.datasets.base import DataError, MissingDataError, read_json
from utils.datasets.coco_file import is_id
from utils.datasets.masks import decode_segmentation, encode_mask

NAMES = ("file_name", "coco_url", "flickr_url", "path")  # of an image, the likeliest first


def read_coco(
    path: Path, images: Path | None = None, label: str = "category", encoding: str | None = None
) -> Annotated:
    """Reads a COCO file, or all COCO files below a folder, such as Roboflow's with a folder per split.

    Args:
        path: the JSON, or the folder.
        images: folder of the images; default: the file's.
        label: what a label is: the name of the "category", or the annotation's own "caption".
        encoding: of files that are not UTF-8.

    Raises:
        DataError: if a file is not COCO's, has an id of an image or a category twice, or none of its images is there.
    """
    result = Annotated()
    files = files_below(path, {".json"}, result.left_out) if path.is_dir() else [path]
    for file in files:
        content = read_json(file, object, encoding)
        if path.is_dir() and not (isinstance(content, dict) and isinstance(content.get("images"), list)):
            result.left_out[f"JSON that is not a COCO file, without a list 'images': {file}"] += 1
            continue
        _File(file, content, images, label, result).read()
    if path.is_dir() and not result.images:
        raise DataError(f"{path} contains no COCO file (.json with 'images', 'annotations' and 'categories')")
    return result


class _File:
    """One file of COCO's format."""

    def __init__(self, file: Path, content: Any, images: Path | None, label: str, result: Annotated) -> None:
        self.file, self.content, self.label, self.result = file, content, label, result
        self.finder = ImageFolder(*([images] if images else []), file.parent)
        tokens = file.stem.replace("-", "_").split("_")  # instances_train.json
        self.split = split_of(Path(file.parent.name) / file.name) or next(
            (token for token in tokens if split_name(token) in ("train", "val", "test")), ""
        )

    def read(self) -> None:
        if not isinstance(self.content, dict):
            kind = type(self.content).__name__
            raise DataError(f"{self.file} holds a {kind} at its top level; COCO's files hold a dict with 'images'")
        images = self._images()
        categories = self._names() if self.label == "category" else {}
        for row in self._rows("annotations"):
            image = images.get(_key(row.get("image_id")))
            if image is None:
                self._count(f"annotation of an image that is not in the file: image_id {row.get('image_id')!r:.40}")
            elif image.path != Path():
                image.annotations.append(self._annotation(row, image, categories))
        found = [image for image in images.values() if image.path != Path()]
        self.result.images += without_wrong_guesses(found, self.result)

    def _count(self, reason: str) -> None:
        self.result.left_out[reason] += 1

    def _rows(self, key: str) -> list[dict[str, Any]]:
        rows = self.content.get(key)
        if not isinstance(rows, list):
            raise DataError(f"{self.file} has no list {key!r}; COCO's files hold images, annotations and categories")
        self.result.left_out[f"row of {key!r} that is not a dict"] += sum(not isinstance(row, dict) for row in rows)
        return [row for row in rows if isinstance(row, dict)]

    def _by_id(self, key: str, *fields: str) -> dict[str, dict[str, Any]]:
        """The rows of a list by id; ``DataError`` if rows with one id differ in ``fields``."""
        rows: dict[str, dict[str, Any]] = {}
        twice = []
        for row in self._rows(key):
            row_id = _key(row.get("id"))
            if not row_id:
                self._count(f"row of {key!r} without an id: {self.file}")
                continue
            first = rows.setdefault(row_id, row)
            if any(first.get(field) != row.get(field) for field in fields):
                twice.append(row_id)
        if twice:
            shown = ", ".join(list(dict.fromkeys(twice))[:5])
            raise DataError(
                f"{self.file}: {len(set(twice))} id(s) in {key!r} occur twice with different content: {shown}; "
                "annotations cannot be told apart. Merge the files with new ids"
            )
        return rows

    def _images(self) -> dict[str, AnnotatedImage]:
        """The images by id; one that is missing has an empty path, and is counted."""
        images, missing, problem = {}, [], MissingDataError()
        for row_id, row in self._by_id("images", *NAMES).items():
            names = [name for name in map(row.get, NAMES) if isinstance(name, str) and name.strip()]
            size = extent(row.get("height"), row.get("width"))
            try:
                path = self._find(names)
                guess = self.finder.guess(path, names, self.file.parent)
                images[row_id] = AnnotatedImage(path, size, split=self.split, guess=guess)
            except MissingDataError as error:
                problem = error
                images[row_id] = AnnotatedImage(Path(), size)
                missing.append(f"{names[0]!r:.200}" if names else f"image {row_id}, which has no file_name")
                self._count(f"image that is missing: {error}")
        if missing and len(missing) == len(images):
            raise DataError(
                f"{self.file}: {len(missing)} of {len(images)} images are missing, such as {missing[0]}; check "
                f"--images ({problem})"
            )
        return images

    def _find(self, names: list[str]) -> Path:
        problem = MissingDataError("it has no file_name")
        for name in names:
            try:
                return self.finder.find(name, beside=self.file.parent, split=self.split)
            except MissingDataError as error:
                problem = error
        raise problem

    def _names(self) -> dict[str, str]:
        """The names of the categories by id."""
        names = {}
        for row_id, row in self._by_id("categories", "name").items():
            name = row.get("name")
            names[row_id] = name.strip() if isinstance(name, str) else ""
        return names

    def _annotation(self, row: dict[str, Any], image: AnnotatedImage, categories: dict[str, str]) -> Annotation:
        if self.label == "caption":
            caption = row.get("caption")
            label = caption.strip() if isinstance(caption, str) else ""
        else:
            label = categories.get(_key(row.get("category_id")), "")
        if not label:
            value = f"category_id {row.get('category_id')!r:.40}" if self.label == "category" else "no caption"
            self._count(f"annotation without a {self.label} that the file names: {value}")
            return Annotation("", None, reason="no label")
        try:
            sizes = image_sizes(image.path)[0], upright_size(image.path)
            size = image.size if image.size in sizes else sizes[1]
        except DataError:  # the image is left out, with this reason, where images are checked
            return Annotation(label, None, reason="its image cannot be read")
        box = _box(row.get("bbox"))
        segmentation = row.get("segmentation")
        if not segmentation:
            if box is None:
                self._count("annotation without a segmentation or a box")
            return Annotation(label, None, box, "a box" if box else "no segmentation")
        try:
            mask = _mask(segmentation, size, self.result.left_out)
        except DataError as error:
            self._count(f"segmentation that cannot be used ({error})")
            return Annotation(label, None, reason=str(error))
        if row.get("iscrowd"):
            self.result.notes["crowd of objects with one mask (iscrowd)"] += 1
        if box and _is_rectangle(mask, box):
            self.result.notes["polygon that is its own bounding box: an export of boxes? Look at the pictures"] += 1
        return Annotation(label, mask)


def _key(row_id: Any) -> str:
    """An id as text, which 7, 7.0 and "7" share; "" for what is no id."""
    if isinstance(row_id, float) and row_id.is_integer():
        row_id = int(row_id)
    return str(row_id).strip() if is_id(row_id) and abs(len(str(row_id))) < 200 else ""


def _box(box: Any) -> tuple[float, float, float, float] | None:
    """COCO's [x, y, width, height] as corners; None if it is no box."""
    try:
        (x, y), (width, height) = number_pairs(box).tolist()
    except (DataError, ValueError):
        return None
    return (x, y, x + width, y + height) if width > 0 and height > 0 else None


def _is_rectangle(mask: Any, box: tuple[float, float, float, float]) -> bool:
    """Whether a mask is one polygon whose corners are those of the box."""
    if not isinstance(mask, list) or len(mask) != 1 or not 4 <= len(mask[0]) <= 5:
        return False
    x0, y0, x1, y1 = box
    corners = {(x0, y0), (x1, y0), (x1, y1), (x0, y1)}
    return all(any(abs(x - cx) < 1 and abs(y - cy) < 1 for cx, cy in corners) for x, y in mask[0]) and (
        len({(round(x), round(y)) for x, y in mask[0]}) == 4
    )


def _mask(segmentation: Any, size: tuple[int, int], left_out: Counter[str]) -> Any:
    """A COCO segmentation of any spelling as an item of ``masks``: polygons, or RLE."""
    rings, runs, problems = [], [], []
    for part in _parts(segmentation):
        if isinstance(part, dict):
            runs.append({"size": part.get("size"), "counts": part.get("counts")})
            continue
        try:
            rings.append(clean_ring(part, size))
        except DataError as error:
            problems.append(str(error))
    if not rings and not runs:
        raise DataError(problems[0] if problems else "neither polygons nor RLE")
    left_out.update(f"part of a segmentation ({problem})" for problem in problems)
    if len(runs) > 1 or (runs and rings):
        return encode_mask(decode_segmentation([*rings, *runs], *size) > 0)
    return rings or runs[0]


def _parts(segmentation: Any, depth: int = 0) -> Iterator[Any]:
    """The polygons and RLE of a segmentation: bare, in a list, or in lists of lists."""
    if isinstance(segmentation, dict) or _is_ring(segmentation) or not isinstance(segmentation, list) or depth > 4:
        yield segmentation
    else:
        for part in segmentation:
            yield from _parts(part, depth + 1)


def _is_ring(segmentation: Any) -> bool:
    """Whether a list is one polygon: numbers, pairs of numbers, or dicts of x and y."""
    if not isinstance(segmentation, list):
        return False
    return any(
        all(map(is_part, segmentation))
        for is_part in (
            lambda part: isinstance(part, (int, float)),
            lambda part: isinstance(part, list) and len(part) == 2 and not any(isinstance(xy, list) for xy in part),
            lambda part: isinstance(part, dict) and "x" in part,
        )
    )
