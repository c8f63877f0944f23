"""Photographs and label images: lookup, decoding, and the check of their size against the annotations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from model.processing.pixels import DECODE_ERRORS, read_pixels
from utils.datasets.base import DataError, find_paths


def find_image(name: str, file_name: str, folders: Sequence[Path]) -> Path:
    """Path of the image in the first folder that contains it; ``DataError`` naming all folders if none does."""
    return find_paths(name, {f"image {file_name}": [folder / file_name for folder in folders]})[0]


def missing_images(find: Callable[[Any], Path], records: Iterable[dict[str, Any]]) -> list[str]:
    """A message for each record whose image is missing, that is, for which ``find(record)`` raises ``DataError``."""
    messages = []
    for record in records:
        try:
            find(record)
        except DataError as error:
            messages.append(str(error))
    return messages


def read_image(path: str | Path, apply_exif: bool = False) -> np.ndarray:
    """Decodes an image file as uint8 RGB [H, W, 3] with ``model.processing.pixels.read_pixels``.

    Args:
        path: the file.
        apply_exif: rotate by the EXIF orientation. True for users' photographs (chat); False for data sets,
            whose annotations refer to the stored pixels.
    """
    try:
        return read_pixels(path, apply_exif)
    except ValueError as error:
        raise DataError(str(error)) from error


def read_annotated(path: Path, source: str, height: int, width: int) -> np.ndarray:
    """Decodes the image of an annotation for ``height`` x ``width`` as uint8 RGB [H, W, 3].

    Raises:
        DataError: if it cannot be decoded, or if it has another size (starting with ``source``).
    """
    image = read_image(path)
    check_size(source, image, height, width)
    return image


def read_label_image(path: Path) -> np.ndarray:
    """Decodes an image of class indices, 8-bit gray or palette, as uint8 [H, W]."""
    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.array(image)
    except DECODE_ERRORS as error:
        raise DataError(f"label image {path} cannot be decoded ({error}); download it again") from error
    if mode not in ("L", "P"):
        raise DataError(f"label image {path} has mode {mode}; expected one 8-bit index per pixel")
    return values


def check_size(source: str, image: np.ndarray, height: int, width: int) -> None:
    """Raises ``DataError`` if an annotation was made for another image size: its masks would be silently wrong."""
    if image.shape[:2] != (height, width):
        raise DataError(
            f"{source}: the image is {image.shape[1]}x{image.shape[0]} but its annotation says {width}x{height} "
            "(width x height); this is not the image file that was annotated"
        )
