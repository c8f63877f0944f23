"""reason_seg_plus: LISA++'s instance segmentation, chains of thought, conversations and captions (docs/data.md)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from model.processing.conversation import escape
from model.processing.tokens import SEG
from model.structures import Conversation, Sample, Turn
from utils.datasets.base import (
    DataError,
    DataOptions,
    DatasetRow,
    check_file_name,
    check_sample,
    is_text,
    parse_items,
    sample_indices,
    splitless_name,
)
from utils.datasets.images import find_image, read_image
from utils.datasets.masks import decode_segmentation, stack_masks
from utils.datasets.records import Notes, load_single_file
from utils.datasets.spec import Spec
from utils.datasets.templates import enumerate_words, instance_turn

# -- references in the text --------------------------------------------------------------------------------------------

_SINGLE = r"[<《]\s*(?P<id1>\d+)\s*[|｜](?P<name1>[^<>《》\[\]]*)[>》]|<\s*(?P<id2>\d+)\s*>"
_ITEM = re.compile(
    r"[<《]\s*(?P<id1>\d+)\s*[|｜](?P<name1>[^<>《》]*)[>》]"  # <380| remote> and 《380|remote》
    r"|(?P<name2>[^,，、<>|]*)<\s*(?P<id2>\d+)\s*>"  # pizza <1072129>
    r"|(?P<id3>\d+)\s*[|｜](?P<name3>[^,，、<>|]*)"  # 380| remote
)
_REFERENCE = re.compile(rf"\[(?P<list>[^\[\]]*)\]|{_SINGLE}")


def replace_references(text: str, render: Callable[[list[tuple[str, str]]], str]) -> str:
    """Replaces each reference to masks, or list of references, in ``text`` by ``render([(id, name), ...])``.

    References are ``<380| remote>``, ``《380|remote》``, and lists of these, of ``380| remote`` or of ``pizza <107>``
    in square brackets. Any other content of such brackets is kept as text.
    """

    def replace(match: re.Match[str]) -> str:
        if match["list"] is None:
            return render([_parse_reference(match)])
        references = [_parse_reference(item) for item in _ITEM.finditer(match["list"])]
        rest = re.sub(r"[\s,，、]|\band\b", "", _ITEM.sub("", match["list"]))
        if not references or not rest:
            return render(references) if references else match[0]
        return f"[{_ITEM.sub(lambda item: render([_parse_reference(item)]), match['list'])}]"

    text = re.sub(r"[ \t]+", " ", _REFERENCE.sub(replace, text))
    return re.sub(r" +([,.;:!?])", r"\1", text).strip()  # spaces left by dropped references


def _parse_reference(match: re.Match[str]) -> tuple[str, str]:
    groups = match.groupdict()
    number = next(groups[key] for key in ("id1", "id2", "id3") if groups.get(key))
    name = next((groups[key] for key in ("name1", "name2", "name3") if groups.get(key)), "")
    return number, name.strip()


def _join_names(references: list[tuple[str, str]]) -> str:
    """Names of the masks, as a question refers to them."""
    return enumerate_words([name for _, name in references if name]) or "it"


_SENTENCE_END = re.compile(
    r"(?<=[a-z)\]\"'])(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bvs)(?<!\betc)[.!?](?=\s+[A-Za-z\[])\s*"
)


# -- records -----------------------------------------------------------------------------------------------------------


def _parse_instances(item: dict[str, Any]) -> dict[str, Any]:
    ids, masks = item.get("ID"), _parse_masks(item, "points")
    if not isinstance(ids, list):
        raise DataError(f"'ID' must be a list of mask ids, not {str(ids)[:60]}")
    valid = {str(number): masks[str(number)] for number in ids if str(number) in masks}
    if not valid:
        raise DataError("no id in 'ID' has a polygon in 'points'")
    dropped = len({str(number) for number in ids}) - len(valid)
    return {"turns": [[_parse_text(item, "English Question"), ""]], "masks": valid, "dropped": dropped}


def _parse_answer(item: dict[str, Any]) -> dict[str, Any]:
    return _with_masks([[_parse_text(item, "English Question"), _parse_text(item, "English Answer")]], item)


def _parse_conversation(item: dict[str, Any]) -> dict[str, Any]:
    before, *parts = re.split(r"<\s*(person|robot)\s*>\s*:?", _parse_text(item, "output"), flags=re.IGNORECASE)
    speakers, texts = [speaker.lower() for speaker in parts[::2]], [text.strip() for text in parts[1::2]]
    pairs = len(speakers) // 2
    if before.strip() or not pairs or speakers != ["person", "robot"] * pairs or not all(texts):
        raise DataError("'output' must consist of turns '<person>: ... <robot>: ...' with non-empty texts")
    return _with_masks([list(pair) for pair in zip(texts[::2], texts[1::2])], item)


def _with_masks(turns: list[list[str]], item: dict[str, Any]) -> dict[str, Any]:
    """Keeps the masks that the answers refer to; ``DataError`` if there are none."""
    masks = _parse_masks(item, "info")
    mentioned: list[str] = []

    def collect(references: list[tuple[str, str]]) -> str:
        mentioned.extend(number for number, _ in references)
        return ""

    for _, answer in turns:
        replace_references(answer, collect)
    valid = {number: polygons for number, polygons in masks.items() if number in mentioned}
    if not valid:
        raise DataError(f"none of the masks {mentioned[:5]} that the answer refers to has a polygon in 'info'")
    return {"turns": turns, "masks": valid, "dropped": len(set(mentioned)) - len(valid)}


PARSERS = {
    "instance_seg": _parse_instances,
    "cot": _parse_answer,
    "conversations": _parse_conversation,
    "caption": _parse_answer,
}


def _parse_text(item: dict[str, Any], key: str) -> str:
    value = item.get(key)
    if not is_text(value):
        raise DataError(f"{key!r} must be a non-empty string, not {str(value)[:60]}")
    return value.strip()


def _parse_masks(item: dict[str, Any], key: str) -> dict[str, Any]:
    """Maps mask ids to polygons or RLE, without empty masks."""
    content = item.get(key)
    if not isinstance(content, dict):
        raise DataError(f"{key!r} must map mask ids to polygons, not {str(content)[:60]}")
    masks = {str(number): _segmentation(value) for number, value in content.items()}
    return {number: value for number, value in masks.items() if value}


def _segmentation(value: Any) -> Any:
    """Polygons of at least 3 points, or RLE, in a value of ``points`` or ``info``; empty if there are none."""
    if isinstance(value, dict) and "counts" not in value:
        value = next((value[key] for key in ("points", "polygon", "segmentation") if value.get(key)), None)
    return value if isinstance(value, dict) else _polygons(value)


def _polygons(value: Any, levels: int = 3) -> list[list]:
    """Flattens nested lists into polygons [[x, y], ...] or [x, y, x, y, ...] (docs/data.md)."""
    if not isinstance(value, list) or not value or levels < 0:
        return []
    if not any(isinstance(part, list) for part in value):
        return [value] if len(value) >= 6 else []
    if all(isinstance(part, list) and len(part) == 2 and not any(isinstance(x, list) for x in part) for part in value):
        return [value] if len(value) >= 3 else []
    return [polygon for part in value for polygon in _polygons(part, levels - 1)]


def _parse_item(kind: str, item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise DataError(f"expected a dict, not a {type(item).__name__}")
    path = next((item[key] for key in ("img_path", "image_path", "img_pth") if item.get(key)), None)
    if not is_text(path):
        raise DataError(f"no image path in 'img_path', 'image_path' or 'img_pth': {path!r}")
    name = check_file_name(Path(path.replace("\\", "/")).name, f"the image's path {path!r} ends in")
    return {"file_name": name, **PARSERS[kind](item)}


# -- the data set ------------------------------------------------------------------------------------------------------


class ReasonSegPlusTrain:
    """Training data of LISA++, one of its four sets; a sample is an image with some of its questions or conversations.

    Each reference to a mask in an answer becomes one [SEG] (lists are joined by commas and "and"). References to masks
    without a polygon are dropped, and counted as ``dropped``; a polygon that cannot be drawn is damage.

    Args:
        spec: ``instance_seg``, ``cot``, ``conversations`` or ``caption``.
        row: the data set's row; ``path`` is the JSON file.
        dataset_dir: the root of all data.
        options: ``questions_per_image`` and ``thought_probability``.
    """

    def __init__(self, spec: Spec, row: DatasetRow, dataset_dir: Path, options: DataOptions) -> None:
        name = splitless_name(spec)
        self.name, self.options = name, options
        self.folders, self.records, self.notes = load_single_file(name, row, dataset_dir, "annotations", _read_items)

    def __len__(self) -> int:
        return len(self.records)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        record = self.records[index]
        source = f"{self.name}/{record['file_name']}"
        image = read_image(find_image(self.name, record["file_name"], self.folders), apply_exif=True)
        conversations, masks = [], []
        for i in sample_indices(self.options.questions_per_image, len(record["items"]), rng):
            try:
                conversation, conversation_masks = _build(record["items"][i], image.shape[0], image.shape[1], rng)
                if (probability := self.options.thought_probability) and rng.random() < probability:
                    conversation = tuple(map(_with_thought, conversation))
            except DataError as error:
                raise DataError(f"{source}: {error}") from error
            conversations.append(conversation)
            masks += conversation_masks
        return check_sample(Sample(source, image, conversations, stack_masks(masks, *image.shape[:2])))

    def describe(self) -> dict[str, int]:
        return {**self.notes["counts"], "unusable": len(self.notes["problems"])}


def _read_items(name: str, path: Path) -> tuple[list[dict[str, Any]], Notes]:
    """Groups the items by image: ``{"file_name", "items"}`` per image."""
    items, problems = parse_items(name, path, lambda item: _parse_item(name, item))
    by_image: dict[str, list[dict]] = {}
    for item in items:
        by_image.setdefault(item.pop("file_name"), []).append(item)
    counts = {
        "images": len(by_image),
        "expressions": sum(len(item["turns"]) for item in items),
        "masks": sum(len(item["masks"]) for item in items),
        "dropped": sum(item.pop("dropped") for item in items),
    }
    records = [{"file_name": file_name, "items": items} for file_name, items in by_image.items()]
    return records, {"problems": problems, "counts": counts}


def _build(item: dict, height: int, width: int, rng: np.random.Generator) -> tuple[Conversation, list[np.ndarray]]:
    """Builds the conversation and one mask, uint8 [H, W], per [SEG]; ``DataError`` if a mask cannot be drawn."""
    decoded = {}
    for number, segmentation in item["masks"].items():
        try:
            decoded[number] = decode_segmentation(segmentation, height, width)
        except DataError as error:
            raise DataError(f"mask {number}: {error}") from error
    if not item["turns"][0][1]:
        return (instance_turn(item["turns"][0][0], len(decoded), rng),), list(decoded.values())
    masks: list[np.ndarray] = []

    def tokens(references: list[tuple[str, str]]) -> str:
        referenced = [decoded[number] for number, _ in references if number in decoded]
        masks.extend(referenced)
        return enumerate_words([SEG] * len(referenced))

    turns = []
    for question, answer in item["turns"]:
        rendered = replace_references(escape(answer), tokens)
        if not rendered:
            raise DataError(f"the answer {answer!r} is empty without its unusable masks")
        turns.append(Turn(replace_references(question, _join_names), rendered))
    return tuple(turns), masks


def _with_thought(turn: Turn) -> Turn:
    """The sentences before the first one with a [SEG] as a thought; a turn without such sentences as it is."""
    before, seg, after = turn.answer.partition(SEG)
    ends = [match.end() for match in _SENTENCE_END.finditer(before)]
    if not seg or not ends:
        return turn
    return Turn(turn.question, before[ends[-1] :] + seg + after, before[: ends[-1]].strip())
