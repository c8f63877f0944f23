"""Label Studio: exports as JSON and JSON_MIN.

The formats are those of its documentation ("Label Studio JSON format of annotated tasks", "Units of image annotations")
and of its exporter (label_studio_sdk/converter). Coordinates are percent of the image's width and height. Rectangles
are turned clockwise around their upper left corner, ellipses around their center. Brush masks are RGBA values packed by
thi.ng/rle-pack, bitmasks a PNG; the mask is where their alpha is not 0.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image

from utils.conversion.annotated import (
    Annotated,
    AnnotatedImage,
    clean_ring,
    ellipse_ring,
    extent,
    pasted_mask,
    rectangle_box,
    rectangle_ring,
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
from utils.datasets.base import DataError, parse_json, read_text
from utils.datasets.images import DECODE_ERRORS

UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-")
GEOMETRY = {"rle", "imageDataURL", "points", "radiusX", "vertices", "x"}  # keys of a region's value
Result = dict[str, Any]


def read_label_studio(
    path: Path, images: Path | None = None, attribute: str = "", encoding: str | None = None
) -> Annotated:
    """Reads the tasks that have an annotation; predictions, drafts and cancelled annotations are none.

    Several annotations of a task are joined, as are rows of JSON_MIN for one image.

    Args:
        path: the JSON file.
        images: folder of the images; default: that of the file. Names may have the prefix of 8 digits that uploads get.
        attribute: name of a control for each region, such as a text area, whose value is the label; "" = the region's
            label. Only JSON holds it.
        encoding: of the file, if it is not Unicode.

    Raises:
        DataError: if the file is no export of image annotations, or if an image may be one of several.
    """
    tasks = parse_json(read_text(path, encoding), path, object)  # type: ignore[arg-type]
    tasks = [tasks] if isinstance(tasks, dict) else tasks
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, dict) for task in tasks):
        raise DataError(f"{path} is no export of Label Studio: expected a list of tasks")
    reader = _Reader(path, images, attribute)
    for task in tasks:
        reader.add_task(task)
    return reader.result()


# -- tasks -------------------------------------------------------------------------------------------------------------


class _Reader(Collector):
    """Reads tasks; ``controls`` are the names of those that describe regions."""

    def __init__(self, file: Path, images: Path | None, attribute: str) -> None:
        super().__init__(file, *([images] if images else [file.parent]))
        self.attribute = attribute
        self.controls: set[str] = set()
        self._uploads: dict[str, list[str]] | None = None

    def add_task(self, task: Result) -> None:
        """Reads a task; one without image or without annotation is left out."""
        left_out = self.annotated.left_out
        data, results = self._data_and_results(task)
        names = _image_names(data)
        if pages := _pages(data, results or []):
            left_out["task of several pages, which are not read: make a task of each image"] += 1
            self.annotated.not_negative |= {
                path for name in {*names.values(), *pages} if (path := self._find_image(name))
            }
            return
        if len(names) > 1 and "image" not in names:
            raise DataError(
                f"{self.file}: a task names several images, as {', '.join(names)[:200]}; none is called 'image'"
            )
        if not names:
            left_out["task that names no image"] += 1
            return
        name = names.get("image") or next(iter(names.values()))
        path = self._find_image(name)
        if results is None:
            left_out["task without annotation"] += 1
            self.annotated.not_negative |= {path} if path else set()
            return
        claimed = {extent(result.get("original_height"), result.get("original_width")) for result in results} - {None}
        if len(claimed) > 1:
            left_out["task whose regions were drawn on images of several sizes"] += 1
            self.annotated.not_negative |= {path} if path else set()
            return
        claim = next(iter(claimed), None)
        size = trusted_size(path, claim, self.annotated) if path else None
        if path is None or size is None:
            return
        image = AnnotatedImage(path, claim, guess=self.guess(path, name))
        regions: dict[Any, list[Result]] = defaultdict(list)
        for result in results:
            regions[result["region"]].append(result)
        for parts in regions.values():
            self._add_region(image, parts, size)
        self.annotated.images.append(image)

    def _data_and_results(self, task: Result) -> tuple[Result, list[Result] | None]:
        """A task's data, and the results of its annotations; None = nobody annotated it."""
        data, annotated = task.get("data"), self.annotated
        if not isinstance(data, dict):
            if self.attribute:
                raise DataError(f"{self.file} is JSON_MIN, which does not tell whose region a value is; export as JSON")
            return _minimal_task(task, self.file)
        annotations = task.get("annotations", task.get("completions"))
        if not isinstance(annotations, list):
            raise DataError(f"{self.file} is no export of Label Studio: a task has 'data' but no list of 'annotations'")
        entries = [entry for entry in annotations if isinstance(entry, dict) and isinstance(entry.get("result"), list)]
        valid = [entry for entry in entries if not entry.get("was_cancelled") and not entry.get("skipped")]
        if cancelled := len(annotations) - len(valid):
            annotated.left_out["cancelled annotation"] += cancelled
        if len(valid) > 1:
            annotated.notes["task with several annotations, which are joined"] += 1
        results = []
        for position, entry in enumerate(valid):
            for number_, result in enumerate(entry["result"]):
                if isinstance(result, dict) and isinstance(result.get("value"), dict):
                    results.append({**result, "region": (position, str(result.get("id", f"result {number_}")))})
                elif not isinstance(result, dict) or result.get("type") != "relation":
                    annotated.left_out["result without a value"] += 1
        return data, results if valid else None

    def _find_image(self, name: str) -> Path | None:
        """Uploads get a prefix, and lose blanks and most special characters of their names."""
        base = PurePosixPath(name).name
        if not UPLOAD_PREFIX.match(base):
            return self.find(name)
        if self._uploads is None:
            self._uploads = defaultdict(list)
            for folder in self.folders:
                for path in files_below(folder, IMAGE_SUFFIXES, Counter()):
                    self._uploads[re.sub(r"[^-\w.]", "", path.name.strip().replace(" ", "_"))].append(path.name)
        base = UPLOAD_PREFIX.sub("", base)
        return self.find(name, base, *self._uploads.get(base, []))

    def _add_region(self, image: AnnotatedImage, parts: list[Result], size: Size) -> None:
        """Adds a region from its results: one for its outline, and one for each control that describes it."""
        labels: list[str] = []
        for part in parts:
            control = str(part.get("from_name", ""))
            values, is_label = _values(part["value"])
            if values:
                self.controls.add(control)
            labels += values if (control == self.attribute if self.attribute else is_label) else []
        outline = next((part for part in parts if GEOMETRY & part["value"].keys()), None)
        left_out = self.annotated.left_out
        if outline is None:
            left_out["value of the whole image"] += 1
        elif not labels:
            what = f"a value of {self.attribute!r}" if self.attribute else "a label"
            add_unnamed(image.annotations, f"region without {what}", left_out)
        else:
            for label in dict.fromkeys(labels):
                add_region(image.annotations, label, lambda: _draw(outline, size), left_out)

    def result(self) -> Annotated:
        if self.attribute and self.attribute not in self.controls and self.annotated.images:
            known = ", ".join(sorted(self.controls)) or "none"
            raise DataError(f"{self.file}: no region has a value of the control {self.attribute!r}; there are: {known}")
        return super().result()


def _minimal_task(record: Result, path: Path) -> tuple[Result, list[Result]]:
    """A row of JSON_MIN: the task's data, and the list of regions of each control."""
    results = [
        {**region, "value": region, "region": (name, position), "from_name": name}
        for name, regions in record.items()
        if isinstance(regions, list)
        for position, region in enumerate(regions)
        if isinstance(region, dict)
    ]
    if "annotation_id" not in record and not any(_values(result["value"])[1] for result in results):
        raise DataError(f"{path} is no export of Label Studio: a task has neither 'data' nor regions with labels")
    return record, results


def _image_names(data: Result) -> dict[str, str]:
    """Key -> path, for the values of a task that name an image."""
    paths = {key: _path_of(value) for key, value in data.items() if isinstance(value, str) and len(value) < 4096}
    return {key: path for key, path in paths.items() if PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES}


def _pages(data: Result, results: list[Result]) -> list[str]:
    """The paths of a task's pages, if it has no other image or regions of a page beyond the first; else []."""
    paths = [
        _path_of(page) for value in data.values() if isinstance(value, list) for page in value if isinstance(page, str)
    ]
    pages = [path for path in paths if PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES]
    return pages if any(result.get("item_index") for result in results) or not _image_names(data) else []


def _path_of(address: str) -> str:
    """``/data/local-files/?d=a/b.jpg`` -> ``a/b.jpg``; addresses lose their host and what follows ``?``."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return ""
    served = parse_qs(parts.query).get("d")
    if served:
        return served[0]
    return parts.path if re.match(r"^(https?|s3|gs|azure-blob|file)$", parts.scheme) or parts.query else address


def _values(value: Result) -> tuple[list[str], bool]:
    """The labels, choices or texts of a result, and whether they are labels."""
    for key, content in value.items():
        is_label = key.endswith("labels")
        if is_label or key in ("choices", "text"):
            items = content if isinstance(content, list) else [content]
            return [item for item in items if isinstance(item, str) and item.strip()], is_label
    return [], False


# -- regions -----------------------------------------------------------------------------------------------------------


def _draw(result: Result, size: Size) -> Any:
    """The mask or the box of a region; ``DataError`` with the reason if it has neither."""
    value = result["value"]
    if result.get("image_rotation"):  # versions differ in whether its coordinates were turned back
        raise DataError("drawn while the image was turned")
    if "rle" in value:
        return pasted_mask(_brush_mask(value["rle"], size), 0, 0, size)
    if "imageDataURL" in value:
        return pasted_mask(_bitmask(value["imageDataURL"], size), 0, 0, size)
    if "vertices" in value:
        raise DataError("a path")
    height, width = size[0] / 100, size[1] / 100  # of one percent
    if "points" in value:
        points = value["points"]
        if value.get("closed") is False:
            raise DataError("an open polygon")
        if not isinstance(points, list) or not all(isinstance(point, list) and len(point) == 2 for point in points):
            raise DataError("its points are not pairs of numbers")
        return [clean_ring([[number(x) * width, number(y) * height] for x, y in points], size)]
    x, y = numbers(value, "x", "y")
    [degrees] = numbers({"rotation": value.get("rotation") or 0}, "rotation")
    if "radiusX" in value:
        rx, ry = numbers(value, "radiusX", "radiusY")
        positive(rx, ry)
        return [clean_ring(ellipse_ring(x * width, y * height, rx * width, ry * height, degrees), size)]
    if "height" not in value:
        raise DataError("a point")
    w, h = numbers(value, "width", "height")
    positive(w, h)
    left, top = x * width, y * height
    if not degrees:
        return rectangle_box(left, top, left + w * width, top + h * height, size)
    return [
        clean_ring(turned_ring(rectangle_ring(left, top, left + w * width, top + h * height), degrees, left, top), size)
    ]


def _brush_mask(rle: Any, size: Size) -> np.ndarray:
    """Decodes the bytes of rle-pack as bool [H, W]: where the alpha of the RGBA values is not 0.

    Bits: 32 for the number of values, 5 for their width - 1, four times 4 for the widths - 1 of run lengths. Then runs:
    a bit (1 = one value repeated, 0 = values one by one), 2 bits that choose the width, the length - 1, the values.
    """
    if not isinstance(rle, list) or not all(type(byte) is int and 0 <= byte < 256 for byte in rle):
        raise DataError("a brush mask that is no list of bytes")
    packed, position = bytes(rle), 0

    def read(width: int) -> int:
        nonlocal position
        start, position = position, position + width
        if position > 8 * len(packed):
            raise DataError("a brush mask that is cut off")
        touched = int.from_bytes(packed[start // 8 : -(-position // 8)], "big")
        return touched >> (-position % 8) & ((1 << width) - 1)

    if (count := read(32)) != 4 * size[0] * size[1]:
        raise DataError("a brush mask of another size than its image")
    if read(5) != 7:
        raise DataError("a brush mask whose values are not of 8 bits")
    widths = [read(4) + 1 for _ in range(4)]
    values = np.zeros(count, dtype=np.uint8)
    start = 0
    while start < count:
        repeated, length = read(1), 1 + read(widths[read(2)])
        stop = min(start + length, count)
        if repeated:
            values[start:stop] = read(8)
        else:
            single = read(8 * (stop - start)).to_bytes(stop - start, "big")
            values[start:stop] = np.frombuffer(single, dtype=np.uint8)
        start = stop
    return values.reshape(*size, 4)[..., 3] > 0


def _bitmask(address: Any, size: Size) -> np.ndarray:
    """Decodes ``data:image/png;base64,...`` as bool [H, W]: where its alpha is not 0."""
    try:
        raw = base64.b64decode(str(address).split(",", 1)[-1], validate=True)
        with Image.open(io.BytesIO(raw), formats=["PNG"]) as picture:
            if (picture.height, picture.width) != size:
                raise DataError("a bitmask of another size than its image")
            return np.asarray(picture.convert("RGBA"))[..., 3] > 0
    except DataError:
        raise
    except (*DECODE_ERRORS, binascii.Error) as error:
        raise DataError("a bitmask that is no PNG") from error
