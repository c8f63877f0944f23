"""COCO: one JSON with images, annotations and categories."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from utils.conversion.annotated import AnnotatedImage
from utils.datasets.base import DataError, read_json
from utils.datasets.coco_file import by_id, image_record, row_of


def read_coco(args: argparse.Namespace, skipped: Counter[str]) -> list[AnnotatedImage]:
    """One image per image of the file, one mask per annotation."""
    instances = read_json(args.file)
    folder = args.images or args.file.parent
    images = by_id(instances, "images", args.file)
    categories = by_id(instances, "categories", args.file) if args.label == "category" else {}
    photos = {}
    for key, image in images.items():
        record = image_record(image)
        photos[key] = AnnotatedImage(folder / record["file_name"], (record["height"], record["width"]))
    for annotation in by_id(instances, "annotations", args.file).values():
        photo = photos[row_of(images, annotation.get("image_id"), "image", args.file)["id"]]
        source = annotation
        if args.label == "category":
            source = row_of(categories, annotation.get("category_id"), "category", args.file)
        label = source.get("name" if args.label == "category" else "caption")
        if not isinstance(label, str) or not label.strip():
            raise DataError(
                f"{args.file}: annotation {annotation['id']} has the {args.label} {label!r}; expected a text"
            )
        masks = _coco_masks(annotation.get("segmentation"))
        if masks:
            photo.queries[args.query.replace("{label}", label.strip())] += masks
        else:
            skipped["annotation without a segmentation of 3 points"] += 1
    return list(photos.values())


def _coco_masks(segmentation: Any) -> list[Any]:
    """Converts a COCO segmentation to items of ``masks``: a list of polygons, or RLE."""
    if isinstance(segmentation, dict):
        return [segmentation]
    parts = segmentation if isinstance(segmentation, list) else []
    rings = [part for part in parts if isinstance(part, list) and len(part) >= 6]
    return [part for part in parts if isinstance(part, dict)] + [rings] * bool(rings)
