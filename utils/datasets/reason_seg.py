"""reason_seg: ReasonSeg, one target region per image, with short or long queries (docs/data.md)."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from model.processing.conversation import escape
from model.structures import IGNORE_PIXEL, EvalQuery, EvalSample, Sample, Turn
from utils.datasets.base import (
    DataError,
    DataOptions,
    DatasetRow,
    MissingDataError,
    check_sample,
    find_paths,
    is_text,
    parse_json,
    pick,
    read_json,
    read_text,
    sample_indices,
    single_split,
    unknown,
    warn_unusable,
)
from utils.datasets.coco_file import check_extent
from utils.datasets.images import check_size, read_image
from utils.datasets.masks import check_polygon, shape_polygon
from utils.datasets.records import PackedRecords
from utils.datasets.spec import Spec
from utils.datasets.templates import QUESTIONS, sample_answer, sample_question

logger = logging.getLogger(__name__)
WITHOUT_TARGET = "without_target"  # key in the meta of a query whose image has no target
QUOTES_AND_DASHES = "[‘’“”–—…]"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}


def _read_text(path: Path) -> str:
    """Text in UTF-8 or, as some published files are, in cp1252.

    Every text in another encoding is some text in cp1252. But in English, letters outside of ASCII stand alone
    ("café"); side by side they are GBK, Cyrillic or broken UTF-8. What is left is still a guess, so it is logged.
    """
    try:
        return read_text(path)
    except DataError:
        text = read_text(path, "cp1252")
        if re.search(r"[^\x00-\x7f]{2}", re.sub(QUOTES_AND_DASHES, " ", text)):
            raise
        _log_guess(str(path.parent))
        return text


@cache
def _log_guess(folder: str) -> None:
    """Once per folder and process: some published files are in cp1252."""
    logger.warning(
        "%s has files that are not UTF-8; they are read as cp1252. Save them as UTF-8 if their queries look wrong",
        folder,
    )


def read_annotation(path: Path) -> dict[str, Any]:
    """Reads a ReasonSeg JSON and validates ``text`` (blank queries are dropped), ``is_sentence`` and ``shapes``.

    The result has ``polygons`` in addition, of ``polygon_shapes``.
    """
    annotation = parse_json(_read_text(path), path)
    texts = annotation.get("text")
    if (
        not isinstance(texts, list)
        or not all(text == "" or (isinstance(text, str) and text.isspace()) or is_text(text) for text in texts)
        or not any(map(is_text, texts))
    ):
        raise DataError(f"{path}: 'text' must be a list of queries, not {str(texts)[:60]}")
    if not isinstance(annotation.get("is_sentence"), bool):
        raise DataError(f"{path}: 'is_sentence' must be true or false, not {annotation.get('is_sentence')!r}")
    shapes = annotation.get("shapes")
    if not isinstance(shapes, list) or not all(
        isinstance(shape, dict) and isinstance(shape.get("label"), str) and isinstance(shape.get("points"), list)
        for shape in shapes
    ):
        raise DataError(f"{path}: 'shapes' must be a list of dicts with 'label' and 'points'")
    try:
        polygons = polygon_shapes(annotation)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return {**annotation, "text": list(filter(is_text, texts)), "polygons": polygons}


def polygon_shapes(annotation: dict[str, Any]) -> list[dict[str, Any]]:
    """The shapes other than flags, with the polygon of each as ``points``.

    Raises:
        DataError: naming a shape that is not an area: the mask would be wrong without it.
    """
    polygons = []
    for number, shape in enumerate(annotation["shapes"]):
        if shape["label"].lower() == "flag":
            continue
        try:
            polygons.append({"label": shape["label"], "points": shape_polygon(shape)})
        except DataError as error:
            raise DataError(f"shape {number} ({shape['label']!r}) is {error}; draw polygons") from error
    return polygons


def has_target(polygons: list[dict[str, Any]]) -> bool:
    """Whether a polygon is a target; fewer than 3 points are drawn, as in LISA's code, but are no target alone."""
    return any("ignore" not in polygon["label"].lower() and len(polygon["points"]) >= 3 for polygon in polygons)


def rasterize_polygons(shapes: list[dict[str, Any]], height: int, width: int) -> np.ndarray:
    """Rasterizes polygons as uint8 [H, W]: 1 = target, 255 = ignore.

    Polygons are filled from the largest to the smallest area, outline and interior; later ones overwrite earlier ones.
    Vertices are truncated to whole pixels. Of equal areas, the later shape is filled first.
    """
    vertices = [check_polygon(shape["points"], height, width).astype(np.int32) for shape in shapes]
    values = [IGNORE_PIXEL if "ignore" in shape["label"].lower() else 1 for shape in shapes]
    order = list(range(len(shapes)))
    if len(set(values)) > 1:  # otherwise the order has no effect
        areas = [int(_fill(np.zeros((height, width), np.uint8), points, 1).sum()) for points in vertices]
        order = np.argsort(areas, kind="stable")[::-1].tolist()
    mask = np.zeros((height, width), np.uint8)
    for number in order:
        _fill(mask, vertices[number], values[number])
    return mask


def _fill(canvas: np.ndarray, points: np.ndarray, value: int) -> np.ndarray:
    cv2.polylines(canvas, [points], True, value, 1)
    return cv2.fillPoly(canvas, [points], value)


class ReasonSegSplit:
    """A folder of images and JSON files with the same stems.

    Attributes:
        records: per image ``{"stem", "image", "json", "is_sentence", "queries"}``; paths relative to ``folder``.
        problems: a message for each unusable file.
        without_target: the records of images for which the data set has no target; they are in none of ``records``.
        without_polygon: a message for each of these.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        files = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
        named = defaultdict[str, list[str]](list)
        for file in files:
            if Path(file).suffix.lower() in IMAGE_SUFFIXES:
                named[Path(file).stem].append(file)
        images = {stem: same[0] for stem, same in named.items()}
        jsons = {Path(file).stem: file for file in files if Path(file).suffix.lower() == ".json"}
        self.problems = [
            f"{folder / images[stem]} has no JSON of the same name" for stem in images if stem not in jsons
        ]
        records: list[dict[str, Any]] = []
        self.without_target: list[dict[str, Any]] = []
        for stem, file in jsons.items():
            try:
                if stem not in images:
                    raise DataError(f"{folder / file} has no image of the same name (.jpg in any case, .jpeg, .png)")
                if len(named[stem]) > 1:
                    raise DataError(f"{folder / file} may be of {' or '.join(named[stem])}; keep the photograph alone")
                annotation = read_annotation(folder / file)
                is_usable = has_target(annotation["polygons"])
            except DataError as error:
                self.problems.append(str(error))
                continue
            (records if is_usable else self.without_target).append(
                {
                    "stem": stem,
                    "image": images[stem],
                    "json": file,
                    "is_sentence": annotation["is_sentence"],
                    "queries": len(annotation["text"]),
                }
            )
        self.without_polygon = [
            f"{name}/{each['image']}: no target polygon in its JSON" for each in self.without_target
        ]
        if not records:
            first = (self.problems + self.without_polygon + ["the folder contains no .json"])[0]
            raise DataError(f"{name}: nothing usable in {folder}: {first}")
        self.records = PackedRecords(records)

    def load(self, record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Reads the image [H, W, 3], upright as LISA's code reads it, the mask [H, W] and the validated annotation."""
        path = self.folder / record["json"]
        annotation = read_annotation(path)
        image = read_image(self.folder / record["image"], apply_exif=True)
        size = annotation.get("imageHeight"), annotation.get("imageWidth")
        if None not in size:
            check_size(str(path), image, *check_extent(*size, f"{path} has"))
        try:
            return image, rasterize_polygons(annotation["polygons"], *image.shape[:2]), annotation
        except DataError as error:
            raise DataError(f"{path}: {error}") from error


def split_folders(name: str, row: DatasetRow, split: str, dataset_dir: Path) -> list[Path]:
    """Folders of a split: ``train`` -> one, ``train_val`` -> two, unless a folder of the full name exists."""
    root = find_paths(name, {"folder": [dataset_dir / row.path]})[0]
    if (root / split).is_dir():
        return [root / split]
    folders = [root / part for part in split.split("_")]
    if not all(folder.is_dir() for folder in folders):
        known = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name != "explanatory")
        known += [f"{part}_{length}" for part in known for length in ("short", "long")]
        raise MissingDataError(f"{name}: {unknown('split', split, known)} (in {root})")
    return folders


class ReasonSegTrain:
    """Training data of ReasonSeg; a sample is an image with some of the queries for its one target.

    Args:
        spec: ``ReasonSeg``, ``ReasonSeg|train``, or several splits, ``ReasonSeg|train_val``.
        row: the data set's row.
        dataset_dir: the root of all data.
        options: ``questions_per_image``, ``explanatory`` and ``thought_probability``.
    """

    def __init__(self, spec: Spec, row: DatasetRow, dataset_dir: Path, options: DataOptions) -> None:
        name, split = spec.name, spec.split or "train"
        if len(spec.parts) > 1:
            raise DataError(f"{str(spec)!r}: write '{name}|train', or several splits as '{name}|train_val'")
        self.name, self.options = f"{name}|{split}", options
        folders = split_folders(self.name, row, split, dataset_dir)
        self.splits = [ReasonSegSplit(f"{name}|{folder.name}", folder) for folder in folders]
        self.explanations: dict[str, list[str]] = {}
        explanations = dataset_dir / row.path / "explanatory" / "train.json"
        if options.explanatory >= 0 or (options.thought_probability and explanations.is_file()):
            self.explanations = _read_explanations(self.name, explanations)
        elif options.thought_probability:
            logger.warning("%s: its answers have no thoughts, as %s is missing", self.name, explanations)
        problems = [problem for part in self.splits for problem in part.problems]
        warn_unusable(self.name, problems)

    def __len__(self) -> int:
        return sum(len(split.records) for split in self.splits)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        ends = np.cumsum([len(split.records) for split in self.splits])
        split_index = int(np.searchsorted(ends, index, side="right"))
        split = self.splits[split_index]
        record = split.records[index - int(ends[split_index - 1] if split_index else 0)]
        image, mask, annotation = split.load(record)
        texts = annotation["text"]
        kind = "sentence" if annotation["is_sentence"] else "phrase"
        turns = [
            self._turn(kind, texts[i], record["image"], rng)
            for i in sample_indices(self.options.questions_per_image, len(texts), rng)
        ]
        num_seg = sum("[SEG]" in turn.answer for turn in turns)
        masks = np.repeat(mask[None], num_seg, axis=0)
        return check_sample(Sample(f"{split.name}/{record['image']}", image, [(turn,) for turn in turns], masks))

    def _turn(self, kind: str, text: str, image_name: str, rng: np.random.Generator) -> Turn:
        """Samples a question answered by [SEG]; if the image has an explanation, by that or both, or by it as a thought
        before [SEG]."""
        question, answer = sample_question(kind, text, rng), sample_answer(1, rng)
        explanations = self.explanations.get(Path(image_name).stem)
        if explanations is None:
            return Turn(question, answer)
        explanation = escape(pick(explanations, rng))
        if self.options.thought_probability and rng.random() < self.options.thought_probability:
            return Turn(question, answer, explanation)
        if self.options.explanatory < 0:
            return Turn(question, answer)
        if rng.random() < self.options.explanatory:
            return Turn(text, explanation)
        if rng.random() < 0.5:
            return Turn(question, answer)
        return Turn(f"{question} {pick(QUESTIONS['explain'], rng)}", f"{answer} {explanation}")

    def describe(self) -> dict[str, int]:
        records = [record for split in self.splits for record in split.records]
        return {
            "images": len(records),
            "expressions": sum(record["queries"] for record in records),
            "explained": sum(record["stem"] in self.explanations for record in records),
            "unusable": sum(len(split.problems) + len(split.without_polygon) for split in self.splits),
        }


def _read_explanations(name: str, path: Path) -> dict[str, list[str]]:
    """Maps image stems to text answers."""
    find_paths(
        name, {"explanations": [path]}, "check --dataset_dir, or set explanatory to -1 to train without explanations"
    )
    explanations: defaultdict[str, list[str]] = defaultdict(list)
    for number, item in enumerate(read_json(path, list)):
        image, text = (item.get("image"), item.get("outputs")) if isinstance(item, dict) else (None, None)
        if not (is_text(image) and is_text(text)):
            raise DataError(f"{path}, item {number}: expected a dict with strings in 'image' and 'outputs'")
        explanations[Path(image).stem].append(text)
    return dict(explanations)


def split_length(split: str) -> tuple[str, str]:
    """``val_short`` -> ``val``, ``short``; no length for a split with queries of both."""
    name, _, length = split.rpartition("_")
    return (name, length) if name and length in ("short", "long") else (split, "")


class ReasonSegEval:
    """Evaluation data of ReasonSeg: one mask per image, queried by the first entry of ``text``.

    ``val_short`` and ``val_long`` are the subsets of ``val`` by ``is_sentence`` (false, true). Any folder is a split.

    Images without a target are no part of the split (``skipped``), but LISA's code scores them: indices from ``len()``
    on give them, marked in the query's meta, for the protocol ``published``.

    Args:
        spec: ``ReasonSeg|val``, ``ReasonSeg|test_long``, ``ReasonSeg|heldout``.
        row: the data set's row.
        dataset_dir: the root of all data.

    Attributes:
        without_target: number of images without a target.
    """

    def __init__(self, spec: Spec, row: DatasetRow, dataset_dir: Path) -> None:
        self.spec = spec
        root, split, length = dataset_dir / row.path, single_split(spec, "val_short"), ""
        if not (root / split).is_dir():
            split, length = split_length(split)
        folders = split_folders(str(spec), row, split, dataset_dir)
        if len(folders) > 1:
            raise DataError(f"{spec}: evaluation takes one folder, not {', '.join(map(str, folders))}")
        self.split = ReasonSegSplit(f"{spec.name}|{split}", folders[0])
        self.unusable = self.split.problems
        self.not_found: list[str] = []  # a JSON without an image counts as unusable
        lengths = {"": (True, False), "short": (False,), "long": (True,)}[length]
        self.indices = [i for i, record in enumerate(self.split.records) if record["is_sentence"] in lengths]
        left_out = [
            pair
            for pair in zip(self.split.without_target, self.split.without_polygon)
            if pair[0]["is_sentence"] in lengths
        ]
        self.left_out, self.skipped = [record for record, _ in left_out], [message for _, message in left_out]
        self.without_target = len(self.left_out)
        if not self.indices:
            raise DataError(f"{spec}: no {length} query among the {len(self.split.records)} of {folders[0]}")

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def num_queries(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> EvalSample:
        usable = index < len(self)
        record = self.split.records[self.indices[index]] if usable else self.left_out[index - len(self)]
        image, mask, annotation = self.split.load(record)
        meta: dict[str, Any] = {"length": "long" if annotation["is_sentence"] else "short"}
        if not usable:
            meta[WITHOUT_TARGET] = True
        demo_meta = annotation.get("meta")  # scripts/make_demo_data.py stores the family of the query
        if isinstance(demo_meta, dict) and isinstance(demo_meta.get("family"), str):
            meta["family"] = demo_meta["family"]
        query = EvalQuery(record["stem"], annotation["text"][0], mask[None], annotation["is_sentence"], meta)
        return EvalSample(f"{self.split.name}/{record['image']}", record["stem"], image, [query])
