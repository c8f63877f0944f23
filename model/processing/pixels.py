"""Images of any kind (file, PIL image, array) as uint8 RGB pixels, the input of the processor."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

Picture = np.ndarray | Image.Image | str | Path  # RGB [H, W, 3], gray or RGBA; any PIL image; or a file
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # never EPS, which Pillow hands to Ghostscript as a program
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")  # of files of these formats
UNREAD_SUFFIXES = (".heic", ".heif", ".avif", ".jp2", ".dng", ".cr2", ".cr3", ".nef", ".arw")  # images, but not read
DECODE_ERRORS = (  # what Pillow's decoders raise for damaged files
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
DEPTHS = (255, 1023, 4095, 16383, 65535)  # largest values of 8, 10, 12, 14 and 16 bits
ORIENTATION = 0x0112  # EXIF tag; 1 = upright


def as_pixels(image: Picture) -> np.ndarray:
    """An image as uint8 RGB [H, W, 3]; files and PIL images are rotated by their EXIF orientation.

    Arrays are uint8, or floats in [0, 1], of shape [H, W], [H, W, 3] or [H, W, 4] (RGBA, composited onto white).

    Raises:
        ValueError: if the file cannot be read, or the image is of another type, dtype, shape or range.
    """
    if isinstance(image, (str, Path)):
        return read_pixels(image, apply_exif=True)
    if isinstance(image, Image.Image):
        return to_rgb(ImageOps.exif_transpose(image))
    expected = "give a path, a PIL image, or an array, uint8 or float in [0, 1], [H, W, 3] (RGB), [H, W] or [H, W, 4]"
    if not isinstance(image, np.ndarray):
        raise ValueError(f"the image is a {type(image).__name__}; {expected}")
    if not image.size or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
        raise ValueError(f"the image is {image.dtype} {list(image.shape)}; {expected}")
    if np.issubdtype(image.dtype, np.floating):
        low, high = float(image.min()), float(image.max())
        if not (low >= 0 and high <= 1):  # also for NaN
            raise ValueError(f"the image has floats from {low:g} to {high:g}; {expected}")
        image = np.round(image * 255).astype(np.uint8)
    if image.dtype != np.uint8:
        raise ValueError(f"the image is {image.dtype} {list(image.shape)}; {expected}")
    return image if image.ndim == 3 and image.shape[2] == 3 else to_rgb(Image.fromarray(image))


def read_pixels(path: str | Path, apply_exif: bool) -> np.ndarray:
    """Any image file as uint8 RGB [H, W, 3], of several frames the first.

    Gray becomes three equal channels, transparency is composited onto white. Values of more than 8 bits are scaled by
    the depth that they fit into (``DEPTHS``), floats up to 1 by 255: files do not tell how many of 16 bits a camera
    fills. So an image darker than a quarter of its depth becomes brighter.

    Args:
        path: the file, of one of ``FORMATS``.
        apply_exif: whether to rotate by the EXIF orientation.

    Raises:
        ValueError: if the path is not a file, or cannot be decoded.
    """
    with _opened(path) as image:
        deep = image.mode in ("RGB", "RGBA") and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
        image.load()
        pixels = to_rgb(ImageOps.exif_transpose(image) if apply_exif else image)
        if deep and 0 < pixels.max(initial=0) <= DEPTHS[-2] >> 8:  # Pillow keeps the high byte, little of 12-bit values
            pixels = _reread(Path(path), image.getexif().get(ORIENTATION, 1) if apply_exif else 1)
        return pixels


def read_orientation(path: str | Path) -> int:
    """The EXIF orientation of an image file: 1 = upright, also without the tag; ``ValueError`` as ``read_pixels``."""
    with _opened(path) as image:
        return image.getexif().get(ORIENTATION, 1)


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"image {path} {'is not a file' if path.exists() else 'does not exist'}; check the path")
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except DECODE_ERRORS as error:
        raise ValueError(
            f"image {path} cannot be decoded ({error}); replace or re-encode it ({', '.join(FORMATS)} are read)"
        ) from error


def _reread(path: Path, orientation: int) -> np.ndarray:
    """RGB of 16 bits per channel whose values fit into 14 or less, of which Pillow keeps the high bytes alone."""
    encoded = np.fromfile(path, np.uint8)
    values = cv2.imdecode(encoded, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION)
    if values is None:
        raise ValueError("its 16-bit values are 16383 at most: save it with 8 bits")
    channels = []
    for channel in np.moveaxis(values[..., ::-1], -1, 0):
        image = Image.fromarray(channel)
        image.getexif()[ORIENTATION] = orientation
        channels.append(np.asarray(ImageOps.exif_transpose(image)))
    return _scale(np.stack(channels, axis=-1))


def _scale(values: np.ndarray) -> np.ndarray:
    """Values of up to 16 bits, or floats, as uint8; the depth is the smallest of ``DEPTHS`` that holds all of them."""
    is_float = np.issubdtype(values.dtype, np.floating)
    values = np.nan_to_num(values.astype(np.float64), nan=0.0)
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    if low < 0 or high > DEPTHS[-1]:
        raise ValueError(f"its values range from {low:g} to {high:g}; 8, 12 or 16 bits, or floats in [0, 1], are read")
    if is_float and high <= 1:
        return np.round(values * 255).astype(np.uint8)
    depth = next(depth for depth in DEPTHS if high <= depth)
    return (values / ((depth + 1) / 256)).astype(np.uint8)


def to_rgb(image: Image.Image) -> np.ndarray:
    """A PIL image of any mode as uint8 RGB [H, W, 3]; ``ValueError`` if its values are out of range."""
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit gray (older Pillow: mode I); F = 32-bit TIFF
        return np.repeat(_scale(np.asarray(image))[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))
