"""vqa: questions and answers in words, without masks (formats.md, E)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from utils.conversation import escape
from utils.datasets.base import (
    DataError,
    DataOptions,
    PackedRecords,
    Row,
    check_sample,
    find_paths,
    read_image,
    read_json,
    stack_masks,
)
from utils.tokens import IMAGE
from utils.types import Sample, Turn

logger = logging.getLogger(__name__)


class VqaTrain:
    """LLaVA-Instruct: an item is an image with one conversation of several turns.

    Args:
        name: the data set, a key of ``DATASETS``.
        row: its row; ``path`` is the JSON file.
        parts: nothing follows the name.
        dataset_dir: the root of all data.
        options: unused; a conversation is kept whole.
    """

    def __init__(self, name: str, row: Row, parts: list[str], dataset_dir: Path, options: DataOptions) -> None:
        if parts:
            raise DataError(f"{'|'.join([name, *parts])!r}: {name!r} has no splits")
        self.name = name
        path = find_paths(name, {"conversations": [dataset_dir / row.path]})[0]
        self.folders = [dataset_dir / images for images in row.images]
        records, self.problems = [], []
        for number, item in enumerate(read_json(path, list)):
            try:
                records.append(_parse(item))
            except DataError as error:
                self.problems.append(f"{path}, item {number}: {error}")
        if not records:
            raise DataError(f"{name}: nothing usable in {path}: {(self.problems or ['the list is empty'])[0]}")
        if self.problems:
            logger.warning("%s: %d items cannot be used, the first: %s", name, len(self.problems), self.problems[0])
        self.turns = sum(len(record["turns"]) for record in records)
        self.records = PackedRecords(records)
        self._image_path(self.records[0])  # a wrong folder shows now, not at the first step

    def __len__(self) -> int:
        return len(self.records)

    def _image_path(self, record: dict[str, Any]) -> Path:
        places = [folder / record["image"] for folder in self.folders]
        return find_paths(self.name, {f"image {record['image']}": places})[0]

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        record = self.records[index]
        image = read_image(self._image_path(record))
        talk = tuple(Turn(question, answer) for question, answer in record["turns"])
        return check_sample(Sample(f"{self.name}/{record['image']}", image, [talk], stack_masks([], *image.shape[:2])))

    def describe(self) -> dict[str, int]:
        return {"images": len(self), "expressions": self.turns, "unusable": len(self.problems)}


def _parse(item: Any) -> dict[str, Any]:
    """``{"image", "turns": [[question, answer], ...]}``; special tokens in the text are defused."""
    if not isinstance(item, dict) or not isinstance(item.get("image"), str):
        raise DataError("expected a dict with a file name in 'image'")
    if Path(item["image"]).is_absolute() or ".." in Path(item["image"]).parts:
        raise DataError(f"'image' is {item['image']!r}, which leads out of its folder")
    said = item.get("conversations")
    if not isinstance(said, list) or not said or len(said) % 2:
        raise DataError("'conversations' must hold pairs of a human's turn and gpt's")
    turns = []
    for human, machine in zip(said[::2], said[1::2]):
        for turn, speaker in ((human, "human"), (machine, "gpt")):
            if not isinstance(turn, dict) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
                raise DataError(f"a turn of {speaker!r} is due, not {str(turn)[:60]}")
        question, answer = human["value"].replace(IMAGE, "").strip(), machine["value"].strip()
        if not question or not answer:
            raise DataError("a question or an answer is empty")
        turns.append([question, escape(answer)])
    return {"image": item["image"], "turns": turns}
