"""hallu_seg_bench: HalluSegBench, pairs of an image and its edit, in which another object took a place (docs/data.md).

Source: PLAN-Lab/HalluSegBench (Li et al., arXiv 2506.21546). Evaluation only.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from model.structures import EvalQuery, EvalSample
from utils.datasets.base import (
    UNIT,
    DataError,
    DatasetRow,
    check_file_name,
    find_paths,
    is_text,
    parse_items,
    single_split,
    unknown,
    warn_unusable,
)
from utils.datasets.custom import read_labels
from utils.datasets.images import find_image, missing_images, read_image
from utils.datasets.spec import Spec

SPLITS = ("refer_seg", "reason_seg_val", "reason_seg_test")
ABBREVIATIONS = {"factual": "org", "counterfactual": "edt"}  # the authors' names: label and image, as in orgl_edti
SETTINGS = [f"{label}l_{image}i" for label in ABBREVIATIONS.values() for image in ABBREVIATIONS.values()]
MAX_STRETCH = 0.01  # by which the sides' ratio of a mask and its image may differ


class HalluSegBench:
    """A subset: two images per pair; each is asked for the object that it shows, and for the one of the other image.

    Args:
        spec: ``HalluSegBench|refer_seg``, or another of ``SPLITS``.
        row: the data set's row.
        dataset_dir: the root of all data.
    """

    def __init__(self, spec: Spec, row: DatasetRow, dataset_dir: Path) -> None:
        self.spec = spec
        if (split := single_split(spec, SPLITS[0])) not in SPLITS:
            raise DataError(f"{spec}: {unknown('split', split, SPLITS)}")
        base = dataset_dir / row.path
        [path] = find_paths(str(spec), {"data.json": [base / split / "data.json", base / "test" / split / "data.json"]})
        self.folder = path.parent
        self.is_sentence = split != "refer_seg"
        self.pairs, self.unusable = parse_items(str(spec), path, lambda item: _parse(item, self.is_sentence))
        warn_unusable(str(spec), self.unusable)
        if doubled := [name for name, count in Counter(pair["id"] for pair in self.pairs).items() if count > 1]:
            raise DataError(f"{spec}: {path} has two pairs called {doubled[0]}: give each an 'ann_id' of its own")
        self.skipped: list[str] = []
        shown: dict[str, list[tuple[int, str]]] = {}  # image -> the pairs it belongs to, and as which of their images
        for number, pair in enumerate(self.pairs):
            for side in ABBREVIATIONS:
                shown.setdefault(pair[side]["image"], []).append((number, side))
        self.images = list(shown.items())
        files = [
            {"path": pair[side][kind]} for pair in self.pairs for side in ABBREVIATIONS for kind in ("image", "mask")
        ]
        self.not_found = missing_images(lambda file: find_image(str(spec), file["path"], [self.folder]), files)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_queries(self) -> int:
        return 4 * len(self.pairs)

    def __getitem__(self, index: int) -> EvalSample:
        name, shown = self.images[index]
        image = read_image(self.folder / name)
        queries = []
        for number, side in shown:
            pair, mask = self.pairs[number], self._mask(self.pairs[number][side]["mask"], *image.shape[:2])
            for label in ABBREVIATIONS:
                setting = f"{ABBREVIATIONS[label]}l_{ABBREVIATIONS[side]}i"
                targets, reference = (mask[None], None) if label == side else (mask[None][:0], mask)
                meta = {"pair": pair["id"], "setting": setting, UNIT: pair["factual"]["image"]}
                text = pair[label]["text"]
                queries.append(
                    EvalQuery(f"{pair['id']}_{setting}", text, targets, self.is_sentence, meta, reference=reference)
                )
        return EvalSample(f"{self.spec}/{name}", str(Path(name).with_suffix("")), image, queries)

    def _mask(self, name: str, height: int, width: int) -> np.ndarray:
        """uint8 [H, W]. One of another size is resized by nearest neighbor, as the authors' code resizes."""
        path = self.folder / name
        mask = (read_labels(path) != 0).astype(np.uint8)
        if not mask.any():
            raise DataError(
                f"{self.spec}: the mask {path} is empty: download it again, or take the pair out of data.json"
            )
        if abs(mask.shape[1] * height / (mask.shape[0] * width) - 1) > MAX_STRETCH:
            raise DataError(
                f"{self.spec}: the mask {path} is {mask.shape[1]}x{mask.shape[0]}, its image {width}x{height}: "
                "not the same sides; download both again"
            )
        return cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)


def _parse(item: Any, is_sentence: bool) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise DataError(f"a {type(item).__name__}; each pair must be an object")
    pair: dict[str, Any] = {}
    texts = ("question", "counterfactual_question") if is_sentence else ("factual_label", "counterfactual_label")
    for side, text in zip(ABBREVIATIONS, texts, strict=True):
        if not is_text(item.get(text)):
            raise DataError(f"{text!r} must be a non-empty string, not {str(item.get(text))[:60]!r}")
        mask = item.get(f"{side}_mask_path") or item.get(f"{side}_mask")  # their files have both names
        pair[side] = {
            "image": check_file_name(item.get(f"{side}_image_path"), f"'{side}_image_path' is"),
            "mask": check_file_name(mask, f"'{side}_mask_path' is"),
            "text": item[text].strip(),
        }
    if pair["factual"]["text"].casefold() == pair["counterfactual"]["text"].casefold():
        raise DataError(f"both texts are {pair['factual']['text'][:60]!r}: that cannot be present and absent")
    number = item.get("ann_id", "")
    if type(number) not in (int, str) or not re.fullmatch(r"[\w-]*", str(number)):
        raise DataError(f"'ann_id' is {str(number)[:60]!r}; it must be a number, or letters and digits")
    name = Path(pair["factual"]["image"]).stem
    return pair | {"id": f"{name}_{number}" if number != "" else name}  # the authors name the files of answers by it
