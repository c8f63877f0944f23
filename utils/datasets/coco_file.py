"""Rows of COCO-style annotation files (``images``, ``annotations``, ``categories``), each validated."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeGuard

from utils.datasets.base import DataError, check_file_name

MAX_PIXELS = 2**28  # more than any photograph has; a bogus size must not allocate all memory


def by_id(instances: dict, key: str, path: Path) -> dict[Any, dict]:
    """The rows of list ``key`` by id; rows that are there twice count once.

    Raises:
        DataError: if it is not a list, if a row has no id, or if different rows have the same id: a mask would be lost,
            or be that of another image.
    """
    rows = instances.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and is_id(row.get("id")) for row in rows):
        raise DataError(f"{path} has no list {key!r} of dicts with an 'id'")
    by_id = {row["id"]: row for row in rows}
    by_text = {str(row_id): row for row_id, row in by_id.items()}  # 7 and "7" are one id in our records
    if len(by_text) < len(rows):
        twice = list(dict.fromkeys(str(row["id"]) for row in rows if row != by_text[str(row["id"])]))
        if twice:
            raise DataError(
                f"{path}: {len(twice)} ids in {key!r} stand for different rows, such as {', '.join(twice[:5])}; files "
                "that were merged need new ids"
            )
    return by_id


def is_id(value: Any) -> TypeGuard[int | str]:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def row_of(rows: dict[Any, dict], row_id: Any, what: str, path: Path) -> dict:
    """The row with an id; ``DataError`` if there is none ("image 7 is not in instances.json")."""
    if not is_id(row_id) or row_id not in rows:
        raise DataError(f"{what} {row_id!r} is not in {path}")
    return rows[row_id]


def segmentation_of(annotation: dict[str, Any], image_id: int | str) -> Any:
    """The encoded segmentation of an annotation; ``DataError`` if it is missing or of another image."""
    if annotation.get("image_id", image_id) != image_id:
        raise DataError(f"annotation {annotation['id']} belongs to image {annotation['image_id']}, not to {image_id}")
    if not annotation.get("segmentation"):
        raise DataError(f"annotation {annotation['id']} has no segmentation")
    return annotation["segmentation"]


def image_record(image: dict[str, Any]) -> dict[str, Any]:
    """The validated fields of an image: ``{"id", "file_name", "height", "width"}``."""
    label = f"image {image['id']} has"
    file_name = check_file_name(image.get("file_name"), f"{label} file_name")
    height, width = check_extent(image.get("height"), image.get("width"), label)
    return {"id": image["id"], "file_name": file_name, "height": height, "width": width}


def check_extent(height: Any, width: Any, what: str) -> tuple[int, int]:
    """Returns a valid (height, width) of an annotation file; ``what`` starts the message ("image 3 has")."""
    if not (type(height) is type(width) is int and height > 0 and width > 0):  # True is no size
        raise DataError(f"{what} height {height!r} and width {width!r}; expected whole numbers above 0")
    if height * width > MAX_PIXELS:
        raise DataError(f"{what} height {height} and width {width}; that is too large for a photograph")
    return height, width
