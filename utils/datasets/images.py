"""Photographs and label images: finding, reading, and checking them against their annotations."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from utils.datasets.base import DataError, find_paths

DECODE_ERRORS = (OSError, SyntaxError, ValueError, struct.error, EOFError, Image.DecompressionBombError)


def find_image(name: str, file_name: str, folders: Sequence[Path]) -> Path:
    """The image in the first folder that has it; ``DataError`` naming all of them."""
    return find_paths(name, {f"image {file_name}": [folder / file_name for folder in folders]})[0]


def images_not_found(find: Callable[[Any], Path], records: Iterable[dict[str, Any]]) -> list[str]:
    """A message for every record whose image ``find`` does not find."""
    messages = []
    for record in records:
        try:
            find(record)
        except DataError as error:
            messages.append(str(error))
    return messages


def read_image(path: str | Path, apply_exif: bool = False) -> np.ndarray:
    """Any image file as uint8 RGB [H, W, 3].

    Grey becomes three equal channels, 16 bits become 8 (the high byte), transparency is composited onto white.

    Args:
        path: the file.
        apply_exif: rotate as the EXIF orientation says. True for a person's photograph (chat); False for data sets,
            whose annotations refer to the stored pixels.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"image {path} {'is not a file' if path.exists() else 'does not exist'}; check the path")
    try:
        with Image.open(path) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image) if apply_exif else image)
    except DECODE_ERRORS as error:
        raise DataError(
            f"image {path} cannot be decoded ({error}); replace or re-encode it (JPEG and PNG are read)"
        ) from error


def read_label_image(path: Path) -> np.ndarray:
    """An image whose 8-bit values are class indices (grey, or a palette's) as uint8 [H, W]."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P"):
                raise DataError(f"label image {path} has mode {image.mode}; expected one 8-bit index per pixel")
            return np.array(image)
    except DataError:
        raise
    except DECODE_ERRORS as error:
        raise DataError(f"label image {path} cannot be decoded ({error}); download it again") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey (older Pillow: mode I); F = 32-bit TIFF
        grey = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0)
        if grey.size and grey.max() > 255:
            grey = grey / 256
        return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def check_size(source: str, image: np.ndarray, height: int, width: int) -> None:
    """An annotation that was made for another size than the image's would be silently wrong."""
    if image.shape[:2] != (height, width):
        raise DataError(
            f"{source}: the image is {image.shape[1]}x{image.shape[0]} but its annotation says {width}x{height} "
            "(width x height); the image file is not the one that was annotated"
        )
