"""JSONL files of user data: an image, a query or a conversation, and masks per line (docs/your_own_data.md)."""

from __future__ import annotations

import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from model.loading.hub import EXPLICIT, resolve_dataset
from model.processing.tokens import IM_END, IM_START, IMAGE, SEG
from model.structures import Turn
from utils.datasets.base import DataError, find_paths, read_object, unknown
from utils.datasets.spec import Spec
from utils.datasets.vqa import read_turns

KEYS = ("image", "query", "conversations", "masks", "ignore", "split", "size", "meta", "thought")
TRAIN = "train"  # the split of a line that names none
MAX_SHOWN = 10


@dataclass(frozen=True)
class Line:
    """A validated line; its masks are still encoded (``custom.read_mask`` decodes them).

    Attributes:
        location: file and line number, for messages.
        number: line number, from 1.
        image: path, relative to the file's folder.
        query: the expression to segment; empty for a conversation.
        turns: the turns of a conversation; empty for a query.
        ignore: encoded masks of regions that count neither as target nor as background.
        size: (height, width) of the annotated image, if given.
        meta: keys by which reports group the scores (``{"family": "scratches"}``).
        thought: reasoning before the answer to a query; empty = none.
    """

    location: str
    number: int
    image: str
    query: str
    turns: tuple[Turn, ...]
    masks: list[Any]
    ignore: list[Any]
    split: str
    size: tuple[int, int] | None
    meta: dict[str, Any]
    thought: str = ""

    @property
    def is_sentence(self) -> bool:
        return self.query.endswith(("?", ".", "!"))


def parse_line(raw: bytes, path: Path, number: int) -> Line:
    """Parses and validates one line, except the image file and the encoded masks.

    Raises:
        DataError: with a message that starts with file and line.
    """
    location = f"{path}, line {number}"
    try:
        record = _read_object(raw)
        image = os.path.normpath(_text(record, "image"))
        return Line(
            location,
            number,
            image,
            _text(record, "query") if "query" in record else "",
            turns := _turns(record["conversations"]) if "conversations" in record else (),
            _masks(record, turns, image),
            _mask_list(record, "ignore", image) if "ignore" in record else [],
            _text(record, "split") if "split" in record else TRAIN,
            _size(record.get("size")),
            _meta(record.get("meta", {})),
            _text(record, "thought") if "thought" in record else "",
        )
    except DataError as error:
        raise DataError(f"{location}: {error}") from error


def _read_object(raw: bytes) -> dict[str, Any]:
    if b"\0" in raw:
        raise DataError("not UTF-8 text (a NUL, as in UTF-16); save the file as UTF-8")
    if b"\r" in raw.strip():
        raise DataError("its lines end with CR alone, as on old Macs; save the file with LF")
    try:
        record = read_object(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text ({error.reason} at byte {error.start}); save the file as UTF-8") from error
    for key in record:
        if key not in KEYS:
            raise DataError(unknown("key", key, KEYS))
    if ("query" in record) == ("conversations" in record):
        raise DataError("needs either 'query' or 'conversations'")
    if "thought" in record and "query" not in record:
        raise DataError("'thought' is of a 'query'; a conversation has its texts in 'conversations'")
    return record


def _text(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{key!r} must be a non-empty string, not {str(value)[:60]!r}" if key in record else f"{key!r} is missing"
        )
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{key!r} contains half a character (a lone surrogate): {value[:60]!a}")
    return value.strip()


def _turns(conversations: Any) -> tuple[Turn, ...]:
    turns = tuple(Turn(question, answer) for question, answer in read_turns(conversations))
    for turn in turns:
        if forbidden := [token for token in (IMAGE, IM_START, IM_END) if token in turn.answer]:
            raise DataError(f"an answer contains {forbidden[0]!r}; the only special tokens allowed are [SEG] and [REJ]")
    return turns


def _masks(record: dict[str, Any], turns: tuple[Turn, ...], image: str) -> list[Any]:
    masks = [] if turns and "masks" not in record else _mask_list(record, "masks", image)
    num_seg = sum(turn.answer.count(SEG) for turn in turns)
    if turns and num_seg != len(masks):
        raise DataError(f"{num_seg} [SEG] in the answers but {len(masks)} in 'masks'")
    return masks


def _mask_list(record: dict[str, Any], key: str, image: str) -> list[Any]:
    masks = record.get(key)
    if not isinstance(masks, list) or not all(isinstance(mask, (str, list, dict)) for mask in masks):
        problem = f"not {str(masks)[:60]}" if key in record else "but is missing"
        meaning = " ([] = absent)" if key == "masks" else ""
        raise DataError(f"{key!r} must be a list of polygons, RLE or PNG paths{meaning}, {problem}")
    if any(isinstance(mask, str) and os.path.normpath(mask) == image for mask in masks):
        raise DataError(f"{image} is both the 'image' and in {key!r}; a file is one or the other")
    return masks


def _size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise DataError(f"'size' must be [height, width] in pixels, not {str(size)[:60]}")
    return size[0], size[1]


def _meta(meta: Any) -> dict[str, Any]:
    if not isinstance(meta, dict):
        raise DataError(f"'meta' must be an object, not {str(meta)[:60]}")
    return meta


# -- files -------------------------------------------------------------------------------------------------------------


def scan(path: Path) -> tuple[np.ndarray, list[str]]:
    """Validates every line of a file, except the encoded masks.

    Returns:
        int64 [lines, 6]: byte offset, line number, image index, split index, number of masks, number of turns (0 = a
        query); and the names of the splits.

    Raises:
        DataError: naming the lines that are invalid, duplicate another line, or lack their image.
    """
    rows, problems = [], []
    images, splits, seen = dict[str, int](), dict[str, int](), dict[int, int]()
    present = dict[int, tuple[bool, int]]()  # query, in any spelling -> whether it has masks, and its line
    end = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            start, end = end, end + len(raw)
            if not raw.strip():
                continue
            try:
                line = parse_line(raw, path, number)
            except DataError as error:
                problems.append(str(error))
                continue
            first = seen.setdefault(hash((line.image, line.query, line.turns)), number)
            if first != number:
                problems.append(f"{line.location}: repeats line {first} (same image, same question); join their masks")
            spelling = hash((line.image, " ".join(line.query.casefold().split()), line.turns))
            there, other = present.setdefault(spelling, (bool(line.masks), number))
            if there != bool(line.masks) and first == number:
                problems.append(
                    f"{line.location}: contradicts line {other}: one of them says that the query, but for case and "
                    "spaces the same, is absent"
                )
            if line.image not in images and not (path.parent / line.image).is_file():
                missing = path.parent / line.image
                hint = spelled_otherwise(missing) if len(problems) < MAX_SHOWN else ""
                problems.append(f"{line.location}: no image {missing}{hint}")
            image = images.setdefault(line.image, len(images))
            split = splits.setdefault(line.split, len(splits))
            rows.append((start, number, image, split, len(line.masks), len(line.turns)))
    if problems or not rows:
        omitted = [f"and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
        shown = "\n  ".join([f"{path}: {len(problems)} problem(s)", *problems[:MAX_SHOWN], *omitted])
        raise DataError(shown if problems else f"{path} has no line")
    return np.array(rows, dtype=np.int64), list(splits)


def spelled_otherwise(path: Path) -> str:
    """What to write for a file that is missing, in parentheses: its path with slashes, or as the folder has it."""
    if "\\" in str(path):
        return " (write / instead of \\)"
    plain = unicodedata.normalize("NFC", path.name).casefold()
    names = os.listdir(path.parent) if path.parent.is_dir() else []
    found = next((name for name in names if unicodedata.normalize("NFC", name).casefold() == plain), "")
    return f" (there is {found!a}: another case or Unicode normalization)" if found else ""


def hub_file(text: str) -> Path:
    """The JSONL file of a data set on the hub: ``hub:org/name``, with ``@revision`` and ``:FILE`` where needed.

    Raises:
        DataError: if it cannot be had, or the data set has another number of such files than one.
    """
    try:
        path = resolve_dataset(text, "--custom_data").path
    except ValueError as error:
        raise DataError(str(error)) from error
    files = [path] if path.is_file() else sorted(path.rglob("*.jsonl"))
    if len(files) > 1:
        names = ", ".join(file.relative_to(path).as_posix() for file in files[:MAX_SHOWN])
        raise DataError(f"{text} has {len(files)} JSONL files ({names}); name one: {text}:FILE")
    if not files:
        convert = f"; python scripts/convert_data.py parquet {text} --output own.jsonl writes one"
        raise DataError(f"{text} has no JSONL file{convert if any(path.rglob('*.parquet')) else ''}")
    return files[0]


class LineFile:
    """One split of a file, grouped by image. Only line offsets are kept in memory; lines are parsed on access.

    Args:
        spec: ``custom|FILE`` or ``custom|FILE|SPLIT``; FILE is relative to the working directory or to
            ``dataset_dir``, in this order, or a data set of the hub (``hub_file``).
        split: the default for SPLIT; None = the only split of the file.
    """

    def __init__(self, spec: Spec, dataset_dir: Path, split: str | None) -> None:
        parts = spec.parts
        if not 1 <= len(parts) <= 2 or not all(parts):
            raise DataError(f"{str(spec)!r}: write 'custom|FILE.jsonl' or 'custom|FILE.jsonl|SPLIT'")
        own, at_hub = Path(parts[0]), parts[0].startswith(EXPLICIT)
        candidates = [hub_file(parts[0])] if at_hub else [own, dataset_dir / own]
        self.path = find_paths(str(spec), {"file": candidates}, "check its path")[0]
        if not self.path.is_file():
            raise DataError(f"{spec}: {self.path} is a folder; give the JSONL file in it")
        rows, splits = scan(self.path)
        split_name = parts[1] if len(parts) == 2 else split or splits[0]
        if split_name not in splits:
            raise DataError(f"{spec}: {unknown('split', split_name, splits)} (of {self.path})")
        if split is None and len(parts) == 1 and len(splits) > 1:
            raise DataError(f"{spec}: {self.path} has the splits {', '.join(splits)}; write '{spec}|{splits[0]}'")
        rows = rows[rows[:, 3] == splits.index(split_name)]
        self._rows = rows[np.argsort(rows[:, 2], kind="stable")]  # by image; workers share an array's memory
        self._split_by_image()

    def _split_by_image(self) -> None:
        self._first = np.flatnonzero(np.diff(self._rows[:, 2], prepend=-1, append=-1))

    def drop_conversations(self) -> list[str]:
        """Drops all conversations; returns a message for each."""
        is_conversation = self._rows[:, 5] > 0
        numbers = self._rows[is_conversation, 1]
        self._rows = self._rows[~is_conversation]
        self._split_by_image()
        return [f"{self.path}, line {number}: a conversation is not scored" for number in numbers]

    @property
    def counts(self) -> dict[str, int]:
        masks, turns = self._rows[:, 4], self._rows[:, 5]
        return {
            "images": len(self),
            "expressions": int(np.maximum(turns, 1).sum()),
            "absent": int(((masks == 0) & (turns == 0)).sum()),
            "multi": int(((masks > 1) & (turns == 0)).sum()),
        }

    def __len__(self) -> int:
        return max(0, len(self._first) - 1)

    def lines(self, image: int) -> list[Line]:
        """All lines of an image."""
        with self.path.open("rb") as file:
            return [self._read(file, row) for row in self._rows[self._first[image] : self._first[image + 1]]]

    def _read(self, file: BinaryIO, row: np.ndarray) -> Line:
        file.seek(int(row[0]))
        return parse_line(file.readline(), self.path, int(row[1]))
