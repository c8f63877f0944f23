"""vqa: visual question answering, text answers without masks (docs/data.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from model.processing.conversation import escape
from model.processing.tokens import IMAGE
from model.structures import Sample, Turn
from utils.datasets.base import (
    DataError,
    DataOptions,
    DatasetRow,
    check_file_name,
    check_sample,
    is_text,
    parse_items,
    splitless_name,
)
from utils.datasets.images import find_image, read_image
from utils.datasets.masks import stack_masks
from utils.datasets.records import Notes, load_single_file
from utils.datasets.spec import Spec


class VqaTrain:
    """Training data of LLaVA-Instruct; a sample is an image with one conversation of several turns.

    Args:
        spec: the data set; no splits.
        row: the data set's row; ``path`` is the JSON file.
        dataset_dir: the root of all data.
        options: unused; conversations are kept whole.
    """

    def __init__(self, spec: Spec, row: DatasetRow, dataset_dir: Path, options: DataOptions) -> None:
        name = splitless_name(spec)
        self.name = name
        self.folders, self.records, self.notes = load_single_file(
            name, row, dataset_dir, "conversations", _read_conversations
        )

    def __len__(self) -> int:
        return len(self.records)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        record = self.records[index]
        image = read_image(find_image(self.name, record["file_name"], self.folders), apply_exif=True)
        conversation = tuple(Turn(question, escape(answer)) for question, answer in record["turns"])
        return check_sample(
            Sample(f"{self.name}/{record['file_name']}", image, [conversation], stack_masks([], *image.shape[:2]))
        )

    def describe(self) -> dict[str, int]:
        return {"images": len(self), "expressions": self.notes["turns"], "unusable": len(self.notes["problems"])}


def _read_conversations(name: str, path: Path) -> tuple[list[dict], Notes]:
    records, problems = parse_items(name, path, _parse_conversation_item)
    return records, {"problems": problems, "turns": sum(len(record["turns"]) for record in records)}


def _parse_conversation_item(item: Any) -> dict[str, Any]:
    """``{"file_name", "turns": [[question, answer], ...]}``."""
    if not isinstance(item, dict):
        raise DataError("expected a dict with 'image' and 'conversations'")
    file_name = check_file_name(item.get("image"), "'image' is")
    return {"file_name": file_name, "turns": read_turns(item.get("conversations"))}


def read_turns(messages: Any) -> list[tuple[str, str]]:
    """Parses LLaVA's ``[{"from": "human" | "gpt", "value": str}, ...]`` as (question, answer) pairs without <image>."""
    if not isinstance(messages, list) or not messages or len(messages) % 2:
        raise DataError("'conversations' must be pairs of a turn of 'human' and one of 'gpt'")
    turns = []
    for human, machine in zip(messages[::2], messages[1::2]):
        for turn, speaker in ((human, "human"), (machine, "gpt")):
            if not isinstance(turn, dict) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
                raise DataError(f"expected a turn of {speaker!r}, not {str(turn)[:60]}")
        question, answer = human["value"].replace(IMAGE, "").strip(), machine["value"].strip()
        if not (is_text(question) and is_text(answer)):
            raise DataError("a question or an answer is empty, or has halves of characters")
        turns.append((question, answer))
    return turns
