"""What a file is, told by its beginning: for messages when it was given to the reader of another format."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

from utils.datasets.base import DataError

BEGINNING = 1 << 16  # bytes of a file that are looked at
FILES = 1000  # of a folder that are listed
SOURCES = {  # source -> what all of its files hold
    "coco": (r'"images"\s*:\s*\[', r'"annotations"\s*:\s*\[|"categories"\s*:\s*\['),
    "labelme": (r'"shapes"\s*:\s*\[',),
    "via": (r'"_via_|"shape_attributes"|region_shape_attributes',),
    "label-studio": (r'"(annotations|completions)"\s*:\s*\[', r'"data"\s*:\s*\{|"from_name"'),
    "cvat": (r"<annotations>",),
}
UNREAD = {  # what no reader reads, and what to do
    r"^PK\x03\x04|^\x1f\x8b|^Rar!|^7z\xbc\xaf": "an archive; unpack it, and give what is in it",
    r"<annotation[\s>]": "XML of Pascal VOC or LabelMe 3.0, which is not read; export COCO, or CVAT for images 1.1",
    r'"segments_info"\s*:': "a panoptic COCO file, which is not read; give the instances, or the PNGs as masks",
}


def check_path(path: Path) -> None:
    """Raises ``DataError`` if a path does not exist, or is a file that no reader reads."""
    if not path.exists():
        raise DataError(f"{path} does not exist; check the path")
    if path.is_file() and (kind := _kind(path)) in UNREAD.values():
        raise DataError(f"{path} is {kind}")


def hint(path: Path, source: str) -> str:
    """A sentence that says what a file, or one in a folder, is; "" if nothing is known or ``source`` reads it."""
    files = [path] if path.is_file() else sorted(islice(path.rglob("*"), FILES))
    files = [file for file in files if file == path or file.suffix.lower() in {".json", ".csv", ".xml", ".zip"}]
    kinds = {kind: file for file in files[:8][::-1] if file.is_file() and (kind := _kind(file))}
    if not kinds or source in kinds:
        return ""
    [kind, file] = list(kinds.items())[-1]
    return f". {file} is {f'a file for: convert_data.py {kind}' if kind in SOURCES else kind}"


def _kind(file: Path) -> str:
    """A key of ``SOURCES``, a value of ``UNREAD``, or ""."""
    with file.open("rb") as stream:
        text = stream.read(BEGINNING).decode("latin-1").replace("\0", "")
    unread = (meaning for pattern, meaning in UNREAD.items() if re.search(pattern, text))
    return next(unread, "") or next(
        (name for name, parts in SOURCES.items() if all(re.search(part, text) for part in parts)), ""
    )
