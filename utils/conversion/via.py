"""VGG Image Annotator (VIA) 1 and 2: project files, exported annotations as JSON, exported annotations as CSV.

The formats are those that via.js writes. JSON holds a dictionary of images, keyed by file name and size in bytes, whose
``regions`` are a list (VIA 2) or a dictionary (VIA 1) of ``shape_attributes`` in pixels and ``region_attributes``, the
annotator's own; ``theta`` of an ellipse is in radians clockwise. A CSV has a row per region, with the same attributes.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from utils.conversion.annotated import Annotated, AnnotatedImage, Box, clean_ring, ellipse_ring, rectangle_box, whole
from utils.conversion.regions import Collector, Size, add_region, add_unnamed, numbers, positive, trusted_size
from utils.datasets.base import DataError, parse_json, read_text

CSV_COLUMNS = ("filename", "file_size", "region_shape_attributes", "region_attributes")
WITHOUT_AREA = {"polyline": "a line", "point": "a point"}
Record = dict[str, Any]  # an image: filename, size, regions


def read_via(
    path: Path, images: Path | None = None, attribute: str = "", label: str = "", encoding: str | None = None
) -> Annotated:
    """Reads a project or an export; images without regions are images without annotations.

    Args:
        path: the JSON or CSV file.
        images: folder of the images; default: that of the file.
        attribute: the region attribute that holds the label; may be left out where there is only one.
        label: the label of all regions, or a whole query; then no attribute is read.
        encoding: of the file, if it is not Unicode.

    Raises:
        DataError: if the file is not of VIA 1 or 2, if several attributes may hold the label, or if an image may be one
            of several.
    """
    text = read_text(path, encoding)
    if text.lstrip()[:1] in ("{", "["):
        value = parse_json(text, path)
        records, names = _records_of_json(value, path), _option_names(value)
    else:
        records, names = _records_of_csv(text, path), {}
    if not label:
        attribute = _label_attribute(records, attribute, path)
    collector = Collector(path, *([images] if images else [path.parent]))
    for image, record in _with_images(records, collector):
        size = trusted_size(image, None, collector.annotated)
        if size is not None:
            is_sure = whole(record.get("size")) == image.stat().st_size
            annotated = AnnotatedImage(image, None, guess="" if is_sure else collector.guess(image, record["filename"]))
            for region in record["regions"]:
                _add_region(annotated, region, attribute, label, names.get(attribute, {}), size, collector)
            collector.annotated.images.append(annotated)
    return collector.result()


# -- files -------------------------------------------------------------------------------------------------------------


def _records_of_json(value: Record, path: Path) -> list[Record]:
    if isinstance(value.get("project"), dict) and isinstance(value.get("metadata"), dict):
        raise DataError(f"{path} is a project of VIA 3, which is not read; annotate with VIA 2, or export COCO there")
    images = value.get("_via_img_metadata", value)
    if not isinstance(images, dict) or not images:
        raise DataError(f"{path} holds no images of VIA; expected an export of VIA 2, 'Annotations' as JSON")
    records = []
    for key, image in images.items():
        if not isinstance(image, dict) or not isinstance(image.get("filename"), str) or "regions" not in image:
            raise DataError(f"{path} is not of VIA: {key[:80]!r} is no dictionary with 'filename' and 'regions'")
        regions = image["regions"]
        if isinstance(regions, dict):
            regions = list(regions.values())
        records.append({**image, "regions": regions if isinstance(regions, list) else []})
    return records


def _records_of_csv(text: str, path: Path) -> list[Record]:
    header = text.split("\n", 1)[0]
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # polygons of thousands of points
    try:
        lines = io.StringIO(text.lstrip("#"), newline=None)
        rows = _csv_rows(lines, ";" if header.count(";") > header.count(",") else ",")
    except csv.Error as error:
        raise DataError(f"{path} is not valid CSV ({error}); export it again") from error
    finally:
        csv.field_size_limit(limit)
    if not rows or not all(column in rows[0] for column in CSV_COLUMNS):
        raise DataError(f"{path} is not of VIA: it lacks rows or one of the columns {', '.join(CSV_COLUMNS)}")
    records: dict[tuple[str, str], Record] = {}
    for row in rows:
        name, size = row["filename"] or "", row["file_size"] or ""
        record = records.setdefault((name, size), {"filename": name, "size": size, "regions": []})
        shape, attributes = (_parsed(row[column]) for column in CSV_COLUMNS[2:])
        if shape != {}:  # an image without regions has one row with "{}"
            record["regions"].append({"shape_attributes": shape, "region_attributes": attributes})
    return list(records.values())


def _csv_rows(lines: Iterable[str], separator: str) -> list[dict[str, str]]:
    """Rows by column. VIA does not quote file names, the first column: one with separators fills several cells."""
    header, *rows = [*csv.reader(lines, delimiter=separator)] or [[]]
    surplus = [max(len(row) - len(header), 0) for row in rows]
    cells = [[separator.join(row[: extra + 1]), *row[extra + 1 :]] for row, extra in zip(rows, surplus) if row]
    return [dict(zip_longest(header, row[: len(header)], fillvalue="")) for row in cells]


def _parsed(text: str | None) -> Any:
    try:
        return json.loads(text or "")
    except (ValueError, RecursionError):
        return None


def _option_names(value: Record) -> dict[str, dict[str, str]]:
    """Attribute -> number of an option -> its name: projects may store "1" where the annotator chose "cat"."""
    attributes = value.get("_via_attributes")
    regions = attributes.get("region") if isinstance(attributes, dict) else None
    names = {}
    for attribute, description in regions.items() if isinstance(regions, dict) else ():
        options = description.get("options") if isinstance(description, dict) else None
        if isinstance(options, dict):
            named = {key: name for key, name in options.items() if isinstance(name, str) and name.strip()}
            names[attribute] = {key: name for key, name in named.items() if whole(key) is not None}
    return names


# -- labels and images -------------------------------------------------------------------------------------------------


def _label_attribute(records: list[Record], wanted: str, path: Path) -> str:
    """The attribute that holds the label: the wanted one, or the only one that any region fills in."""
    counts: Counter[str] = Counter()
    for record in records:
        for region in record["regions"]:
            attributes = region.get("region_attributes") if isinstance(region, dict) else None
            counts.update(name for name, value in _items(attributes) if _labels(value))
    known = ", ".join(f"{name!r} ({count} regions)" for name, count in counts.most_common(20))
    if wanted:
        if counts and wanted not in counts:
            raise DataError(f"{path}: no region has the attribute {wanted!r}; there are: {known}")
        return wanted
    if len(counts) > 1:
        raise DataError(f"{path}: several attributes may hold the label: {known}; name one with --attribute")
    if not counts and any(record["regions"] for record in records):
        raise DataError(f"{path}: no region has an attribute that names it; give one --query for all regions")
    return next(iter(counts), "")


def _items(attributes: Any) -> list[tuple[str, Any]]:
    return list(attributes.items()) if isinstance(attributes, dict) else []


def _labels(value: Any) -> list[str]:
    """The labels in an attribute: a text, a number, or a dictionary of checked boxes."""
    if isinstance(value, dict):
        return [name for name, checked in value.items() if name.strip() and checked in (True, "true", 1, "1")]
    return [str(value)] if isinstance(value, (str, int)) and not isinstance(value, bool) and str(value).strip() else []


def _with_images(records: list[Record], collector: Collector) -> Iterator[tuple[Path, Record]]:
    """Records with their images. Of several records of one name, the size in bytes tells which is meant."""
    found: dict[Path, list[Record]] = defaultdict(list)
    for record in records:
        if (image := collector.find(record["filename"])) is not None:
            found[image].append(record)
    for image, same in found.items():
        sizes = {whole(record.get("size")) for record in same}
        if len(sizes) > 1:
            meant = [record for record in same if whole(record.get("size")) == image.stat().st_size]
            if not meant:
                raise DataError(
                    f"{collector.file} has {len(same)} images {same[0]['filename']!r}; none has {image}'s size"
                )
            collector.missing += [record["filename"] for record in same if record not in meant]
            same = meant
        for record in same:
            yield image, record


def _add_region(
    image: AnnotatedImage,
    region: Any,
    attribute: str,
    label: str,
    names: dict[str, str],
    size: Size,
    collector: Collector,
) -> None:
    shape = region.get("shape_attributes") if isinstance(region, dict) else None
    attributes = region.get("region_attributes") if isinstance(region, dict) else None
    labels = [label] if label else _labels(dict(_items(attributes)).get(attribute))
    for name in labels:
        add_region(image.annotations, names.get(name, name), lambda: _draw(shape, size), collector.annotated.left_out)
    if not labels:
        add_unnamed(image.annotations, f"region without {attribute!r}", collector.annotated.left_out)


def _draw(shape: Any, size: Size) -> list[Any] | Box:
    """The polygon or the box of a shape; ``DataError`` with the reason if it has no area."""
    if not isinstance(shape, dict):
        raise DataError("no shape attributes")
    kind = str(shape.get("name"))[:40]
    if kind in WITHOUT_AREA:
        raise DataError(WITHOUT_AREA[kind])
    if kind == "polygon":
        xs, ys = shape.get("all_points_x"), shape.get("all_points_y")
        if not isinstance(xs, list) or not isinstance(ys, list) or len(xs) != len(ys):
            raise DataError("its points are not pairs of numbers")
        return [clean_ring([[x, y] for x, y in zip(xs, ys)], size)]
    if kind == "rect":
        x, y, width, height = numbers(shape, "x", "y", "width", "height")
        positive(width, height)
        return rectangle_box(x, y, x + width, y + height, size)
    if kind not in ("circle", "ellipse"):
        raise DataError(f"a shape {kind!r}")
    x, y = numbers(shape, "cx", "cy")
    rx, ry = numbers(shape, "r", "r") if kind == "circle" else numbers(shape, "rx", "ry")
    positive(rx, ry)
    [theta] = numbers({"theta": shape.get("theta") or 0}, "theta")
    return [clean_ring(ellipse_ring(x, y, rx, ry, math.degrees(theta)), size)]
