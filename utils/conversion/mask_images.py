"""Mask images: a PNG per image, or per image and label."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np

from utils.conversion.annotated import AnnotatedImage
from utils.conversion.lines import relative
from utils.datasets.base import DataError
from utils.datasets.custom import read_labels
from utils.datasets.masks import encode_mask
from utils.datasets.reason_seg import IMAGE_SUFFIXES


def read_masks(args: argparse.Namespace, skipped: Counter[str]) -> list[AnnotatedImage]:
    """One image per image that has a PNG. An all-black PNG means that its label is absent."""
    files = sorted(path for path in args.folder.rglob("*") if path.suffix.lower() == ".png")
    if not files:
        raise DataError(f"{args.folder} contains no .png, not even in subfolders")
    images = {path.stem: path for path in sorted(args.images.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES}
    classes = args.classes.read_text(encoding="utf-8").split("\n") if args.classes else []
    photos: dict[Path, AnnotatedImage] = {}
    for file in files:
        image = images.get(file.stem) or images.get(file.stem.removesuffix("_mask"))
        if image is None:
            raise DataError(f"{file} has no image {file.stem}.jpg (.jpeg, .png) in {args.images}")
        labels = read_labels(file)
        photo = photos.setdefault(image, AnnotatedImage(image, labels.shape))
        if classes:
            for value in np.unique(labels[labels > 0]).tolist():
                name = classes[value - 1].strip() if value <= len(classes) else ""
                if name:
                    photo.queries[args.query.replace("{label}", name)].append(encode_mask(labels == value))
                else:
                    skipped[f"value {value}, which {args.classes} does not name"] += 1
            continue
        label = "" if file.parent == args.folder else file.parent.name
        if not label and "{label}" in args.query:
            raise DataError(f"{file} has no label: give --query or --classes, or put it into a folder LABEL")
        path = relative(file, args.output.parent)
        photo.queries[args.query.replace("{label}", label)] += [path] * bool(labels.any())
    return list(photos.values())
