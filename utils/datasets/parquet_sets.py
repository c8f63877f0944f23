"""parquet: benchmarks whose images, queries and masks lie in parquet files as the hub has them (docs/data.md).

ReasonSeg-R and ReasonSeg-X (Yun et al., StAR, 2026): a row per query. RefCOCO-M (Moondream, 2025): a row per image.
Evaluation only; training takes what scripts/convert_data.py makes of such files.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from model.processing.pixels import FORMATS
from model.structures import EvalQuery, EvalSample
from utils.datasets.base import (
    DataError,
    DatasetRow,
    MissingDataError,
    find_paths,
    is_text,
    single_split,
    warn_unusable,
)
from utils.datasets.images import DECODE_ERRORS, check_size
from utils.datasets.masks import decode_segmentation
from utils.datasets.spec import Spec

SAMPLE = ("id", "sentences", "mask")
WITHOUT = ("image", "mask")  # columns of megabytes, read with a sample alone


class ParquetEval:
    """A split: all files of its folder.

    Args:
        spec: ``ReasonSeg-R|test``, ``ReasonSeg-X|val``, ``refcoco-m|val``.
        row: the data set's row; its ``path`` has a folder per split.
        dataset_dir: the root of all data.

    Raises:
        DataError: if pyarrow is not installed; for a file that is damaged, or lacks a column.
    """

    def __init__(self, spec: Spec, row: DatasetRow, dataset_dir: Path) -> None:
        self.spec = spec
        split = single_split(spec, row.annotations[0])
        if split not in row.annotations:
            raise DataError(f"{spec}: there are the splits {', '.join(row.annotations)}")
        base = dataset_dir / row.path
        whole = [base] if len(row.annotations) == 1 else []  # as the hub's folder is
        [folder] = find_paths(str(spec), {"folder": [base / split, *whole]})
        self.files = sorted(folder.rglob("*.parquet"))
        if not self.files:
            raise MissingDataError(f"{spec}: no .parquet file in {folder}; check --dataset_dir")
        self.skipped: list[str] = []
        self.unusable: list[str] = []
        self.not_found: list[str] = []
        self.rows: list[tuple[int, int, int, int]] = []  # file, row group, row in it, queries
        self._group: tuple[tuple[int, int], Any] | None = None
        for number, path in enumerate(self.files):
            for group, place, values in _light_rows(path):
                try:
                    self.rows.append((number, group, place, len(_texts(values))))
                except DataError as error:
                    self.unusable.append(f"{path}, row {place} of group {group}: {error}")
        if not self.rows:
            raise DataError(f"{spec}: nothing usable in {folder}: {(self.unusable or ['it is empty'])[0]}")
        warn_unusable(str(spec), self.unusable)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_queries(self) -> int:
        return sum(queries for *_, queries in self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_group": None}  # for the processes of a DataLoader

    def __getitem__(self, index: int) -> EvalSample:
        number, group, place, _ = self.rows[index]
        if self._group is None or self._group[0] != (number, group):
            self._group = (number, group), _read_group(self.files[number], group)
        [values] = self._group[1].slice(place, 1).to_pylist()
        try:
            return self._sample(index, values)
        except DataError as error:
            raise DataError(f"{self.files[number]}, row {place} of group {group}: {error}") from error

    def _sample(self, index: int, values: dict[str, Any]) -> EvalSample:
        image = _image(values["image"])
        name = str(values.get("file_name") or values.get("image_id") or index)
        queries = []
        if "samples" in values:
            for sample in values["samples"]:
                mask = decode_segmentation(sample["mask"], *image.shape[:2])
                ids = (f"{sample['id']}_{number}" for number in range(len(sample["sentences"])))
                queries += [EvalQuery(each, text, mask[None]) for each, text in zip(ids, sample["sentences"])]
        else:
            mask = read_rows(values).astype(np.uint8)
            check_size(name, image, *mask.shape)
            meta = {key: values[key] for key in ("reasoning_type",) if values.get(key)}
            masks = mask[None] if mask.any() else mask[None][:0]  # nothing is there: U = 0 counts as 1
            queries.append(EvalQuery(str(index), values["text"], masks, True, meta))
        image_id = values.get("image_id")
        return EvalSample(f"{self.spec}/{name}", str(index if image_id is None else image_id), image, queries)


def _texts(values: dict[str, Any]) -> list[Any]:
    """All queries of a row; raises a ``DataError`` if one is no text, or a sample lacks a part."""
    samples = values.get("samples")
    if samples is None:
        texts = [values.get("text")]
    else:
        known = isinstance(samples, list) and all(
            isinstance(each, dict) and set(SAMPLE) <= set(each) for each in samples
        )
        if not known or not all(isinstance(each["sentences"], list) for each in samples):
            raise DataError(f"its samples have not all of {', '.join(SAMPLE)}")
        if len({each["id"] for each in samples}) < len(samples):
            raise DataError("two of its samples have the same id")
        texts = [text for each in samples for text in each["sentences"]]
    if not texts or not all(map(is_text, texts)):
        raise DataError(f"no text: {str(texts)[:60]}")
    return texts


def image_bytes(value: Any) -> bytes:
    """The encoded image of a row."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise DataError("no image inside; the file refers to one elsewhere")
    return content


def _image(value: Any) -> np.ndarray:
    """uint8 RGB [H, W, 3] of an encoded image."""
    try:
        with Image.open(io.BytesIO(image_bytes(value)), formats=FORMATS) as image:
            return np.asarray(image.convert("RGB"))
    except DECODE_ERRORS as error:
        raise DataError(f"its image cannot be read ({error})") from error


def read_rows(values: dict[str, Any]) -> np.ndarray:
    """The mask of a row, bool [H, W], stored as rows of bool."""
    try:
        mask = np.asarray(values["mask"], dtype=bool)
    except (TypeError, ValueError) as error:
        raise DataError("its mask has rows of different lengths") from error
    if mask.ndim != 2 or not mask.size:
        raise DataError("its mask is no image")
    return mask


def open_parquet(path: Path) -> Any:
    """pyarrow's ``ParquetFile``.

    Raises:
        DataError: if pyarrow is not installed, or the file is damaged.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path} is a parquet file, which pyarrow reads: pip install pyarrow") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split())[:200]}); is it complete?") from error


def _read_group(path: Path, group: int) -> Any:
    return open_parquet(path).read_row_group(group)


def _light_rows(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Row group, row in it, and its values but for images and masks."""
    file = open_parquet(path)
    names = file.schema_arrow.names
    if "image" not in names or not ("samples" in names or {"text", "mask"} <= set(names)):
        raise DataError(f"{path} has the columns {', '.join(names)}; expected are image, and text and mask, or samples")
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, [name for name in names if name not in WITHOUT])
        yield from ((group, place, values) for place, values in enumerate(table.to_pylist()))
