"""Answers of any model: JSONL with a line per query (docs/scoring.md), matched with the queries of a split.

``test.py`` writes such lines, with more keys; everything here works without a model.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from model.structures import EvalQuery, EvalSample
from utils.datasets.base import DataError, EmptyMaskError, read_object
from utils.datasets.custom import read_labels, read_mask
from utils.datasets.masks import encode_mask, stack_masks
from utils.evaluation.metrics import Record
from utils.evaluation.results import Provenance, mismatched

KEPT = (
    "question",
    "layers",
    "uncertainty",
    "predicted_iou",
    "ambiguity",
    "cut",
    "thought",
)  # keys of test.py's that reports use
SHOWN = 5  # of each kind of problem


@dataclass
class Answer:
    """A validated line; its masks are still encoded.

    Attributes:
        location: file and line number, for messages.
        image: its path, or the end of it; image_id, query_id: as ``score.py --list_queries`` writes them, or empty.
        query: the expression; empty if ``query_id`` names it.
        masks: one per object; each a COCO RLE, a polygon or a list of polygons, the path of a PNG relative to the
            file's folder, or ``{"box": [x0, y0, x1, y1]}``, in pixels of the original image.
        text: the answer; rejected: whether it says that the target is absent.
        counts: I and U, of answers whose masks are not known; they are scored by the counts of another project.
        kept: values of the keys ``KEPT``.
        used_for: source of the image whose query it was found for.
    """

    location: str
    image: str
    image_id: str
    query_id: str
    query: str
    masks: list[Any]
    text: str
    rejected: bool
    counts: tuple[int, int] | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    used_for: str | None = None


def parse_answer(line: str, location: str) -> tuple[Answer, dict[str, Any] | None]:
    """An answer, and its ``origin`` if ``test.py`` wrote it.

    Raises:
        DataError: naming the line and what is wrong with it.
    """
    try:
        values = read_object(line)
    except DataError as error:
        raise DataError(f"{location}: {error}") from error
    texts = {}
    for name in ("image", "image_id", "query_id", "query", "answer"):
        value = values.get(name, "")
        if name.endswith("_id") and type(value) is int:
            value = str(value)
        if not isinstance(value, str):
            raise DataError(f"{location}: {name!r} must be a string, not {str(value)[:60]}")
        texts[name] = value
    for names in (("image", "image_id"), ("query", "query_id")):
        if not any(texts[name].strip() for name in names):
            raise DataError(f"{location} has neither {names[0]!r} nor {names[1]!r}")
    counts = values.get("counts")
    if counts is not None:
        whole = isinstance(counts, list) and len(counts) == 2 and all(type(count) is int for count in counts)
        if not whole or not 0 <= counts[0] <= counts[1] or "masks" in values:
            raise DataError(f"{location}: 'counts' is [I, U] in place of 'masks', not {str(counts)[:60]}")
    masks = values.get("masks") if counts is None else []
    if not isinstance(masks, list) or not all(isinstance(mask, (str, list, dict)) for mask in masks):
        problem = f"not {str(masks)[:60]}" if "masks" in values else "but is missing"
        raise DataError(
            f"{location}: 'masks' must be a list of RLE, polygons, PNG paths or boxes ([] = none), {problem}"
        )
    rejected = values.get("rejected", not masks and counts is None)
    if not isinstance(rejected, bool):
        raise DataError(f"{location}: 'rejected' must be true or false, not {str(rejected)[:60]}")
    kept = {name: values[name] for name in KEPT if name in values}
    if wrong := mismatched(kept, Record):
        raise DataError(f"{location}: {', '.join(wrong)}: of another type than test.py writes; leave it out")
    for name in ("uncertainty", "predicted_iou", "ambiguity"):
        if not all(map(math.isfinite, kept.get(name, ()))):
            raise DataError(f"{location}: {name!r} holds NaN or infinity")
    image, image_id, query_id, query, text = texts.values()
    pair = None if counts is None else (counts[0], counts[1])
    return Answer(location, image, image_id, query_id, query, masks, text, rejected, pair, kept), values.get("origin")


def read_answers(path: Path) -> tuple[list[Answer], Provenance | None]:
    """All lines of a file; and how they were made, if ``test.py`` wrote it.

    Raises:
        DataError: naming the first line that is no answer, or of another evaluation than the first.
    """
    answers, first = list[Answer](), None
    with path.open(encoding="utf-8-sig", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            location = f"{path}, line {number}"
            answer, origin = parse_answer(line, location)
            first = origin if not answers else first
            if origin != first:
                raise DataError(f"{location}: its 'origin' is another than that of line 1")
            answers.append(answer)
    if not answers:
        raise DataError(f"{path} holds no answer")
    return answers, _provenance(first, path)


def _provenance(origin: Any, path: Path) -> Provenance | None:
    if origin is None:
        return None
    try:
        if wrong := mismatched(origin, Provenance):
            raise TypeError(f"{', '.join(wrong)}: of another type")
        return Provenance(**origin)
    except (TypeError, AttributeError) as error:
        raise DataError(f"{path}: 'origin' is not test.py's ({error}); leave it out") from error


def to_line(sample: EvalSample, query: EvalQuery, masks: np.ndarray, text: str) -> str:
    """The line of an answer: masks [N, H, W] bool; without any, it rejects the query."""
    values = {"masks": [encode_mask(mask) for mask in masks], "answer": text, "rejected": not len(masks)}
    return query_line(sample, query, **values)


def query_line(sample: EvalSample, query: EvalQuery, **answer: Any) -> str:
    """A query as a line, without an answer if none is given."""
    names = {"image": sample.source, "image_id": sample.image_id, "query_id": query.query_id, "query": query.text}
    return json.dumps(names | answer, ensure_ascii=False) + "\n"


def decode_masks(answer: Answer, folder: Path, height: int, width: int) -> np.ndarray:
    """Masks [N, H, W] bool of an answer about an image of this size; each may be empty.

    Raises:
        DataError: naming the line and the mask.
    """
    masks = []
    for number, mask in enumerate(answer.masks, start=1):
        try:
            if isinstance(mask, dict) and "box" in mask:
                masks.append(_box_mask(mask, height, width))
            elif isinstance(mask, str) and len(levels := np.unique(read_labels(folder / mask))) > 2:
                raise DataError(f"{mask} has {len(levels)} values; a mask has two, such as 0 and 255: threshold it")
            else:
                masks.append(read_mask(mask, folder, height, width))
        except EmptyMaskError:
            masks.append(np.zeros((height, width), np.uint8))
        except DataError as error:
            raise DataError(f"{answer.location}, mask {number}: {error}") from error
    return stack_masks(masks, height, width).astype(bool)


def _box_mask(value: dict[str, Any], height: int, width: int) -> np.ndarray:
    """The pixels whose center lies in a box, uint8 [H, W]."""
    box = value["box"]
    is_box = isinstance(box, list) and len(box) == 4 and all(type(side) in (int, float) for side in box)
    if not is_box or not all(map(math.isfinite, box)) or set(value) != {"box"}:
        raise DataError(f'a box is {{"box": [x0, y0, x1, y1]}} in pixels, not {str(value)[:60]}')
    x0, y0, x1, y1 = box
    if x1 < x0 or y1 < y0:
        raise DataError(f"the box {box} ends before it begins; write [x0, y0, x1, y1], not [x, y, width, height]")
    if max(height, width) > 2 and min(box) >= 0 and max(box) <= 1:
        raise DataError(f"the box {box} is all from 0 to 1; boxes count pixels, not fractions of the image")
    if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
        raise DataError(f"the box {box} lies outside its {width}x{height} image; boxes count pixels of the original")
    ys, xs = np.arange(height) + 0.5, np.arange(width) + 0.5
    return ((ys >= y0) & (ys <= y1))[:, None].astype(np.uint8) * ((xs >= x0) & (xs <= x1))[None]


# -- which answer belongs to which query -------------------------------------------------------------------------------


class AnswerBook:
    """The answers of a file, looked up by image and query.

    An answer belongs to the image with its ``image_id``, else to that whose path has the longest end in common with
    its ``image``, at least the file name (whatever its ending); and to the query with its ``query_id``, else to every
    query of the image with its text, whatever case, spaces and a last ``.``, ``?`` or ``!``. Equal answers count once.

    Raises:
        DataError: listing different answers to the same query.
    """

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.answers: list[Answer] = []
        self._by_id: dict[str, list[Answer]] = {}
        self._by_name: dict[str, list[Answer]] = {}
        seen: dict[tuple[str, ...], Answer] = {}
        doubled = []
        for answer in answers:
            image = ("id", answer.image_id) if answer.image_id else ("path", *path_parts(answer.image))
            query = ("id", answer.query_id) if answer.query_id else ("text", _plain(answer.query))
            first = seen.setdefault((*image, *query), answer)
            if first is not answer:
                if (answer.masks, answer.rejected, answer.counts) != (first.masks, first.rejected, first.counts):
                    line = first.location.rpartition(", ")[2]
                    doubled.append(f"{answer.location} answers the query of {line} again")
                continue
            self.answers.append(answer)
            if answer.image_id:
                self._by_id.setdefault(answer.image_id, []).append(answer)
            if answer.image:
                self._by_name.setdefault(path_parts(answer.image)[-1], []).append(answer)
        if doubled:
            raise DataError(
                listed("answers differ from others to the same query (query_id tells queries apart)", doubled)
            )

    def of(self, sample: EvalSample) -> list[Answer | None]:
        """The answer to each query of an image.

        Raises:
            DataError: if an answer could be about another image, too, or its parts contradict each other.
        """
        answers = self._by_id.get(sample.image_id) or self._of_path(path_parts(sample.source))
        by_id = {answer.query_id: answer for answer in answers if answer.query_id}
        by_text = {_plain(answer.query): answer for answer in answers if not answer.query_id}
        found = [by_id.get(query.query_id) or by_text.get(_plain(query.text)) for query in sample.queries]
        for query, answer in zip(sample.queries, found):
            if answer is None:
                continue
            if answer.query and _plain(answer.query) != _plain(query.text):
                raise DataError(
                    f"{answer.location}: query_id {query.query_id} is {query.text!r} in the data, not {answer.query!r}"
                )
            if answer.image and path_parts(answer.image)[-1] != path_parts(sample.source)[-1]:
                raise DataError(
                    f"{answer.location}: image_id {answer.image_id} is {sample.source} in the data, not {answer.image}"
                )
            if answer.used_for not in (None, sample.source):
                raise DataError(
                    f"{answer.location}: {answer.image} may be {answer.used_for} or {sample.source}; give image_id "
                    "(--list_queries)"
                )
            answer.used_for = sample.source
        return found

    def _of_path(self, path: tuple[str, ...]) -> list[Answer]:
        """The answers whose path shares the longest end with this one.

        Raises:
            DataError: if several paths do.
        """
        named: dict[tuple[str, ...], list[Answer]] = {}
        for answer in self._by_name.get(path[-1], ()):
            named.setdefault(path_parts(answer.image), []).append(answer)
        shared = {other: _shared_end(path, other) for other in named}
        best = [other for other, count in shared.items() if count == max(shared.values())]
        if len(best) > 1:
            names = " or ".join("/".join(other) for other in best)
            raise DataError(f"{'/'.join(path)} may be {names}; give image_id (--list_queries)")
        return named[best[0]] if best else []

    @property
    def unknown(self) -> list[str]:
        """Answers that belong to none of the queries that were looked up."""
        left = [answer for answer in self.answers if answer.used_for is None]
        return [f"{each.location}: {each.image_id or each.image}, {each.query or each.query_id!r}" for each in left]


def path_parts(text: str) -> tuple[str, ...]:
    """The parts of a path, its file's name without ending."""
    path = PurePosixPath(unicodedata.normalize("NFC", text.replace("\\", "/")))
    return (*path.parts[:-1], path.stem)


def _shared_end(first: Sequence[str], second: Sequence[str]) -> int:
    """How many last parts are equal."""
    pairs = zip(reversed(first), reversed(second))
    return next((count for count, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split()).rstrip(".?! ")


def listed(what: str, items: Sequence[str]) -> str:
    """A message with the number of items, and the first of them."""
    shown = [*items[:SHOWN], *([f"and {len(items) - SHOWN} more"] if len(items) > SHOWN else [])]
    return "\n  ".join([f"{len(items)} {what}:", *shown])
