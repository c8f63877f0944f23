"""Images of any kind (file, PIL image, array) as uint8 RGB pixels, the input of the processor."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

Picture = np.ndarray | Image.Image | str | Path  # uint8 RGB [H, W, 3], any PIL image, or a file
DECODE_ERRORS = (OSError, SyntaxError, ValueError, struct.error, EOFError, Image.DecompressionBombError)


def as_pixels(image: Picture) -> np.ndarray:
    """An image as uint8 RGB [H, W, 3]; files and PIL images are rotated by their EXIF orientation.

    Raises:
        ValueError: if the file cannot be read, or the image is of another type, dtype or shape.
    """
    if isinstance(image, (str, Path)):
        return read_pixels(image, apply_exif=True)
    if isinstance(image, Image.Image):
        return to_rgb(ImageOps.exif_transpose(image))
    if not isinstance(image, np.ndarray):
        raise ValueError(f"the image is a {type(image).__name__}; give a path, a PIL image, or uint8 [H, W, 3], RGB")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"the image is {image.dtype} {list(image.shape)}; give uint8 [H, W, 3], RGB")
    return image


def read_pixels(path: str | Path, apply_exif: bool) -> np.ndarray:
    """Any image file as uint8 RGB [H, W, 3].

    Grey becomes three equal channels, 16 bits become 8 (the high byte), transparency is composited onto white.

    Args:
        path: the file.
        apply_exif: whether to rotate by the EXIF orientation.

    Raises:
        ValueError: if the path is not a file, or cannot be decoded.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"image {path} {'is not a file' if path.exists() else 'does not exist'}; check the path")
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image) if apply_exif else image)
    except DECODE_ERRORS as error:
        raise ValueError(
            f"image {path} cannot be decoded ({error}); replace or re-encode it (JPEG and PNG are read)"
        ) from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """A PIL image of any mode as uint8 RGB [H, W, 3]."""
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey (older Pillow: mode I); F = 32-bit TIFF
        grey = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0)
        if grey.size and grey.max() > 255:
            grey = grey / 256
        return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))
