"""Parquet files as the field publishes ReasonSeg and RefCOCO: a row per query, with the image and the mask inside.

Columns: ``image`` (bytes), ``text``, ``mask`` (rows of bool), optionally ``image_id``, ``img_height``, ``img_width``.
So are Seg-Zero's data sets on the hub, such as ``Ricky06662/ReasonSeg_test``.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from model.processing.pixels import FORMATS
from utils.conversion.annotated import Annotated, AnnotatedImage, Annotation, extent, split_of
from utils.datasets.base import DataError
from utils.datasets.images import DECODE_ERRORS
from utils.datasets.masks import encode_mask
from utils.datasets.parquet_sets import image_bytes, open_parquet, read_rows

COLUMNS = ("image", "text", "mask")  # that are needed
OPTIONAL = ("image_id", "img_height", "img_width")
ROWS = 16  # read at once; a mask in them takes 8 bytes a pixel


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, as dictionaries of the columns that are used.

    Raises:
        DataError: if pyarrow is not installed, or the file is damaged.
    """
    file = open_parquet(path)
    import pyarrow

    try:
        columns = [name for name in file.schema_arrow.names if name in (*COLUMNS, *OPTIONAL)]
        for batch in file.iter_batches(batch_size=ROWS, columns=columns):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split())[:200]}); is it complete?") from error


def read_parquet(
    folder: Path, extract: Path, rows: Callable[[Path], Iterable[dict[str, Any]]] = parquet_rows
) -> Annotated:
    """Reads every parquet file of a folder and its subfolders, and writes their images to ``extract``.

    A split is that of a file's name or folder: ``data/test-00000-of-00003.parquet``, ``test/0.parquet``. A row without
    a target pixel is left out, as it may be a target that is absent or one that was lost.

    Args:
        folder: or one file.
        extract: folder for the images, as ``IMAGE_ID.jpg``.
        rows: what reads a file.

    Raises:
        DataError: if there is no file, or one lacks a column.
    """
    files = [folder] if folder.is_file() else sorted(folder.rglob("*.parquet"))
    if not files:
        raise DataError(f"{folder} holds no .parquet file")
    result, written = Annotated(), dict[str, Path]()
    for file in files:
        within = file.relative_to(folder.parent)
        split = split_of(within.with_name(within.name.partition("-")[0]) / "rows") or split_of(within)
        for number, row in enumerate(rows(file)):
            if missing := [name for name in COLUMNS if name not in row]:
                raise DataError(
                    f"{file} has no column {', '.join(missing)} (its columns: {', '.join(row)}); expected are "
                    f"{', '.join((*COLUMNS, *OPTIONAL))}, as Seg-Zero's ReasonSeg and RefCOCO have them"
                )
            try:
                result.images.append(_entry(row, f"{file.stem}_{number}", extract, split, written))
            except DataError as error:
                result.left_out[f"row that cannot be used: {file}, row {number}: {error}"] += 1
    return result


def _entry(row: dict[str, Any], name: str, extract: Path, split: str, written: dict[str, Path]) -> AnnotatedImage:
    """A row's image, written unless it was, with its query."""
    text, mask = row["text"], _mask(row)
    if not isinstance(text, str) or not text.strip():
        raise DataError("no text")
    content = image_bytes(row["image"])
    image_id = row.get("image_id")
    path = _write_image(content, name if image_id in (None, "") else str(image_id), extract, written)
    encoded = encode_mask(mask) if mask.any() else None
    annotation = Annotation(text, encoded, reason="" if encoded else "a mask without a pixel", is_query=True)
    return AnnotatedImage(path, (mask.shape[0], mask.shape[1]), [annotation], split)


def _mask(row: dict[str, Any]) -> np.ndarray:
    """The mask as bool [H, W], of the size that the row states."""
    mask = read_rows(row)
    stated = row.get("img_height"), row.get("img_width")
    if None not in stated and extent(*stated) != mask.shape:
        raise DataError(f"its mask is {mask.shape[1]}x{mask.shape[0]}; the row says {stated[1]}x{stated[0]}")
    return mask


def _write_image(content: bytes, name: str, extract: Path, written: dict[str, Path]) -> Path:
    """The file of an image in ``extract``. Rows of one image share a file; another image of its name gets another."""
    digest = hashlib.sha256(content).hexdigest()
    if digest not in written:
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                suffix = {"JPEG": ".jpg"}.get(image.format or "", f".{image.format}").lower()
        except DECODE_ERRORS as error:
            raise DataError(f"its image cannot be read ({error})") from error
        path = extract / (re.sub(r"[^\w.-]", "_", name)[:100] + suffix)
        if str(path) in written:
            path = path.with_stem(f"{path.stem}_{digest[:8]}")
        extract.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        written[digest] = written[str(path)] = path  # by content, and by name
    return written[digest]
