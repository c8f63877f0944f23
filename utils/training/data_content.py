"""What the data sets of a run hold, as checksums: a resumed run notices data that have changed behind their names."""

from __future__ import annotations

import zlib
from typing import Any

from model.loading.hub import name_of, repository_of
from utils.datasets.jsonl import LineFile
from utils.datasets.reason_seg import ReasonSegSplit
from utils.datasets.records import PackedRecords, code_version
from utils.training.checkpoint_files import file_crc


def content_of(dataset: Any) -> str:
    """``VERSION:CRC,CRC``: the version of the code that reads records, and a CRC-32 per index or JSONL file.

    Annotations are covered, pixels (also of label images) are not. Contents with another version cannot be compared.
    """
    return f"{code_version()}:{','.join(f'{crc:08x}' for crc in _checksums(dataset))}"


def source_of(dataset: Any) -> dict[str, str]:
    """``source``: repository, commit and file of a data set of the hub; empty for others."""
    name = name_of(dataset.file.path) if isinstance(getattr(dataset, "file", None), LineFile) else ""
    return {"source": name} if repository_of(name) else {}


def comparable(now: str | None, before: str | None) -> bool:
    """Whether two contents were read by the same code; older checkpoints have none."""
    return bool(now and before) and str(now).partition(":")[0] == str(before).partition(":")[0]


def _checksums(value: Any) -> list[int]:
    """Of the indexes and files that a data set holds itself or through its readers, in a fixed order."""
    if isinstance(value, PackedRecords):
        return [value.checksum()]
    if isinstance(value, ReasonSegSplit):  # a file per image, whose texts and polygons are read when it is sampled
        crcs = [file_crc(value.folder / record["json"]) for record in value.records]
        return [value.records.checksum(), zlib.crc32(str(crcs).encode())]
    if isinstance(value, LineFile):
        return [file_crc(value.path)]
    if isinstance(value, list | tuple):
        return [crc for item in value for crc in _checksums(item)]
    if type(value).__module__.startswith("utils.datasets."):
        return [crc for _, item in sorted(getattr(value, "__dict__", {}).items()) for crc in _checksums(item)]
    return []
