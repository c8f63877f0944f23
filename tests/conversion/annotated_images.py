"""Images and comparisons that the tests of all readers share."""

from __future__ import annotations

import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from utils.conversion.annotated import Annotated, AnnotatedImage
from utils.datasets.masks import decode_segmentation

H, W = 20, 30


def photo(path: Path, height: int = H, width: int = W, grey: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (gray_of(path, grey),) * 3).save(path)
    return path


def gray_of(path: Path, grey: int) -> int:
    """A level of gray, other for another name: images of different names are no copies of each other."""
    return (grey + zlib.crc32(path.name.encode("utf-8", "surrogateescape"))) % 256


def pixels(top: int, left: int, bottom: int, right: int, height: int = H, width: int = W) -> np.ndarray:
    """A mask of the rows top to bottom - 1 and the columns left to right - 1."""
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def masks_of(image: AnnotatedImage, height: int = H, width: int = W) -> dict[str, np.ndarray]:
    """Label -> the union of its masks, decoded as for training."""
    union: dict[str, np.ndarray] = {}
    for annotation in image.annotations:
        if annotation.mask is not None:
            mask = decode_segmentation(annotation.mask, height, width)
            union[annotation.label] = union.get(annotation.label, 0) | mask
    return union


def reasons_of(image: AnnotatedImage) -> dict[str, str]:
    return {annotation.label: annotation.reason for annotation in image.annotations if annotation.mask is None}


def kinds(annotated: Annotated) -> dict[str, int]:
    """What was left out, without the examples after a colon."""
    counts: Counter[str] = Counter()
    for reason, count in annotated.left_out.items():
        counts[reason.partition(": ")[0]] += count
    return counts


def by_name(annotated: Annotated) -> dict[str, AnnotatedImage]:
    return {image.path.name: image for image in annotated.images}


def assert_masks(image: AnnotatedImage, expected: dict[str, np.ndarray]) -> None:
    found = masks_of(image)
    assert found.keys() == expected.keys()
    for label, mask in expected.items():
        np.testing.assert_array_equal(found[label], mask, err_msg=label)
