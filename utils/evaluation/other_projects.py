"""Answers as the evaluation scripts of other projects write them, as lines of ``utils.evaluation.answers``.

Facts are from their code, named at each reader. Their stored ground truth is never used. LISA's, GSVA's and GLaMM's
scripts write no answers: docs/scoring.md says what to add to them.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from utils.datasets.base import DataError, EvalDataset
from utils.datasets.custom import read_labels
from utils.datasets.hallu_seg_bench import SETTINGS
from utils.datasets.masks import encode_mask
from utils.evaluation.answers import listed, path_parts
from utils.evaluation.any_model import samples_of

Line = dict[str, Any]  # keys of ``utils.evaluation.answers``


class Asked:
    """The queries of a split, by what other projects call them."""

    def __init__(self, dataset: EvalDataset, limit: int | None = None) -> None:
        self.spec = str(dataset.spec)
        self.lines: list[Line] = []
        self.sizes: dict[str, tuple[int, ...]] = {}  # image_id -> (height, width)
        self._of_image: dict[str, list[Line]] = {}
        self._doubled: set[str] = set()
        self.has_refs = False
        for _, sample in samples_of(dataset, limit):
            self.has_refs |= any("ref" in query.meta for query in sample.queries)
            names = {"image": sample.source, "image_id": sample.image_id}
            self.sizes[sample.image_id] = sample.image.shape[:2]
            stem = path_parts(sample.source)[-1]
            if stem in self._of_image:
                self._doubled.add(stem)
            self._of_image[stem] = [names | {"query_id": q.query_id, "query": q.text} for q in sample.queries]
            self.lines += self._of_image[stem]
        self._by_id = {lines[0]["image_id"]: lines for lines in self._of_image.values() if lines}

    def of_image(self, name: object, count: int | None = None) -> list[Line]:
        """The queries of an image, in the order of the annotations.

        Args:
            name: its path, file name, or id.
            count: how many answers there are, one for each query.

        Raises:
            DataError: if there is no such image, or several; if it has another number of queries.
        """
        text = str(name)
        if (stem := path_parts(text)[-1]) in self._doubled:
            raise DataError(f"{self.spec} has two images called {stem}: these answers do not tell them apart")
        lines = self._of_image.get(stem, self._by_id.get(text))
        if lines is None:
            raise DataError(f"image {text} is not in {self.spec}: give the split that was answered")
        if count is not None and count != len(lines):
            raise DataError(
                f"image {text} has {count} answers and, in {self.spec}, {len(lines)} queries: it read other annotations"
            )
        return lines

    def sentence(self, name: object, ref_id: object, position: int) -> Line:
        """The sentence at a position within its ref."""
        sentences = [line for line in self.of_image(name) if line["query_id"].startswith(f"{ref_id}_")]
        if not 0 <= position < len(sentences):
            raise DataError(
                f"image {name}: ref {ref_id} has {len(sentences)} sentences in {self.spec}, not {position + 1}"
            )
        return sentences[position]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        hint = " (it is cut off: the script that wrote it failed)" if error.pos >= len(error.doc.rstrip()) - 1 else ""
        raise DataError(f"{path} is not valid JSON{hint}: {error}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def _records(path: Path, *keys: str) -> Iterator[Line]:
    """The objects of a JSON list, which all have the keys."""
    records = _json(path)
    if not isinstance(records, list):
        raise DataError(f"{path} is a {type(records).__name__}, not a list of answers")
    for number, record in enumerate(records):
        if lacking := [key for key in keys if not isinstance(record, dict) or key not in record]:
            raise DataError(f"{path}, item {number} has no {lacking[0]!r}")
        yield record


def read_sa2va(path: Path, asked: Asked) -> Iterator[Line]:
    """Sa2VA: ``ST_jsons/*.json`` of sa2va_eval/projects/ST/eval; an image each, with a mask or null per sentence."""
    for record in _records(path, "prediction_masks"):
        masks = record["prediction_masks"]
        if not isinstance(masks, list) or not all(isinstance(mask, list) or mask is None for mask in masks):
            raise DataError(f"{path}: 'prediction_masks' is no list of lists of masks: {str(masks)[:60]}")
        if "image_path" not in record:
            raise DataError(
                f"{path}: img_id counts images of their own list; image_path is needed, which ST scripts write"
            )
        for line, answer in zip(asked.of_image(record["image_path"], len(masks)), masks, strict=True):
            yield line | {"masks": answer or [], "answer": ""}


def read_sesame(path: Path, asked: Asked) -> Iterator[Line]:
    """SESAME, READ, UGround's release: ``preds_*_of_*.json`` of eval_sesame.py, test_read.py, test_ds.py, with
    ``segmentation_mask/*.npz`` beside it; an image each, with lists over its sentences."""
    records = _json(path)
    if not isinstance(records, dict):
        raise DataError(f"{path} is a {type(records).__name__}, not an object with an image each")
    for image, record in records.items():
        try:
            with np.load(path.parent / record["segmentation_path"], allow_pickle=False) as file:
                masks = file["pred"] > 0
            texts = [str(text) for text in record["pred_sent"]]
            places = [(ref, int(number)) for ref, number in zip(record["ref_ids"][0], record["sent_ids"][0])]
            if masks.ndim != 3 or len(masks) != len(texts) or (asked.has_refs and len(places) != len(texts)):
                raise ValueError(f"{masks.shape} masks, {len(texts)} answers and {len(places)} sentences do not agree")
        except (KeyError, IndexError, TypeError, OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
            raise DataError(f"{path}, {image}: {type(error).__name__}: {error}") from error
        lines = asked.of_image(image)
        for number, mask in enumerate(masks if asked.has_refs else masks[:1]):  # ReasonSeg: then a false premise
            line = asked.sentence(image, *places[number]) if asked.has_refs else lines[0]
            has_mask = mask.any() or "[SEG]" in texts[number]
            yield line | {"masks": [encode_mask(mask)] if has_mask else [], "answer": texts[number]}


def read_text4seg(path: Path, asked: Asked) -> Iterator[Line]:
    """Text4Seg: of model_refer_seg.py, infer_refer_seg.py; a folder an image, ``K_sam_mask.png`` is of sentence K."""
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir())
    for folder in folders:
        files = {file.name.removesuffix("_sam_mask.png"): file for file in folder.glob("*_sam_mask.png")}
        lines = asked.of_image(f"{folder.name}.jpg", len(files))
        for number, line in enumerate(lines):
            if str(number) not in files:
                raise DataError(f"{folder} has no {number}_sam_mask.png")
            mask = read_labels(files[str(number)]) > 127
            yield line | {"masks": [encode_mask(mask)] if mask.any() else [], "answer": ""}


def read_visionreasoner(path: Path, asked: Asked) -> Iterator[Line]:
    """Seg-Zero, VisionReasoner: ``output_K.json``; a query each, with pixels of intersection and union alone."""
    for record in _records(path, "image_id", "intersection", "union"):
        lines = asked.of_image(record["image_id"])
        if len(lines) > 1:
            raise DataError(
                f"{path}: image {record['image_id']} has {len(lines)} queries in {asked.spec}, and the file does not "
                "say which one was asked"
            )
        yield lines[0] | _counts(record["intersection"], record["union"]) | {"answer": str(record.get("think", ""))}


def read_unipixel(path: Path, asked: Asked) -> Iterator[Line]:
    """UniPixel: ``output_K.json`` of infer_seg.py; a query each (vid, qid), with pixels of intersection and union."""
    for record in _records(path, "vid", "qid", "inter", "union"):
        lines, number = asked.of_image(f"{record['vid']}.jpg"), record["qid"]
        if not asked.has_refs and number:  # ReasonSeg: they ask all texts of an image, the benchmark the first
            continue
        chosen = [line for line in lines if line["query_id"].endswith(f"_{number}")] if asked.has_refs else lines
        if len(chosen) != 1:
            raise DataError(f"{path}: image {record['vid']} has no sentence {number} in {asked.spec}")
        yield chosen[0] | _counts(record["inter"], record["union"]) | {"answer": ""}


def _counts(intersection: Any, union: Any) -> Line:
    return {"counts": [intersection, union]}


def read_hallusegbench(path: Path, asked: Asked) -> Iterator[Line]:
    """HalluSegBench: a folder with one per setting, of ``IMAGE_ANN_mask.png`` each; a pair without a file abstains."""
    for setting in SETTINGS:
        end, folder = f"_{setting}", path / setting
        lines = {
            f"{line['query_id'].removesuffix(end)}_mask.png": line
            for line in asked.lines
            if line["query_id"].endswith(end)
        }
        if not lines:
            raise DataError(f"{asked.spec} has no pairs; give the subset of HalluSegBench that was answered")
        if not folder.is_dir():
            raise DataError(f"{path} has no folder {setting}; give the one that holds {', '.join(SETTINGS)}")
        files = {file.name: file for file in folder.glob("*.png")}
        if unknown := sorted(files.keys() - lines.keys()):
            raise DataError(
                listed(f"files of {folder} belong to no pair of {asked.spec} (IMAGE_ANN_mask.png)", unknown)
            )
        if not files:
            raise DataError(f"{folder} holds no PNG, so that every pair would abstain")
        for name, line in lines.items():
            mask = read_labels(files[name]) > 0 if name in files else np.zeros((0, 0), bool)
            if name in files and mask.shape != (size := asked.sizes[line["image_id"]]):
                raise DataError(
                    f"{files[name]} is {mask.shape[1]}x{mask.shape[0]}, its image {size[1]}x{size[0]}; save masks at "
                    "the size of the image that was answered"
                )
            yield line | {"masks": [encode_mask(mask)] if mask.any() else [], "answer": ""}


READERS: dict[str, Callable[[Path, Asked], Iterator[Line]]] = {
    "hallusegbench": read_hallusegbench,
    "sa2va": read_sa2va,
    "sesame": read_sesame,
    "text4seg": read_text4seg,
    "unipixel": read_unipixel,
    "visionreasoner": read_visionreasoner,
}


def convert(source: str, paths: Sequence[Path], asked: Asked) -> list[str]:
    """The answers in all files (of all processes) of a source, as lines of JSON; equal ones once.

    Raises:
        DataError: for a file that is not of the source, or answers of another split; listing queries that have two
            different answers.
    """
    found: dict[tuple[str, str], str] = {}
    doubled = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{path} does not exist")
        for line in READERS[source](path, asked):
            key, text = (line["image_id"], line["query_id"]), json.dumps(line, ensure_ascii=False) + "\n"
            if found.setdefault(key, text) != text:  # processes repeat the first samples to be equally long
                doubled.append(f"{path}: {line['image']}, {line['query']!r}")
    if doubled:
        raise DataError(listed("queries have different answers", doubled))
    if not found:
        raise DataError(f"no answer in {', '.join(map(str, paths))}: are they files of {source}?")
    return list(found.values())
