"""sem_seg: classes of label images (ADE20K, COCO-Stuff, Mapillary), objects and parts (PACO, PASCAL-Part).

Formats: docs/data.md. A class is named as in the question ("dog"), a part as "dog:ear".
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from model.structures import IGNORE_PIXEL, Conversation, Sample, Turn
from utils.datasets.base import (
    DataError,
    DataOptions,
    DatasetRow,
    check_sample,
    find_paths,
    is_text,
    pick,
    read_json,
    sample_indices,
    splitless_name,
    warn_unusable,
)
from utils.datasets.class_names import ADE20K, COCO_STUFF, COCO_STUFF_NOT_DENIED
from utils.datasets.coco_file import by_id, image_record, row_of, segmentation_of
from utils.datasets.images import find_image, read_annotated, read_label_image
from utils.datasets.masks import decode_union, stack_masks
from utils.datasets.records import Notes, PackedRecords, load_single_file
from utils.datasets.spec import Spec
from utils.datasets.templates import denial, sample_answer, sample_question


@dataclass(frozen=True)
class Regions:
    """An image with its classes and their masks.

    Attributes:
        source: for messages.
        image: [H, W, 3] uint8.
        present: the classes that questions may be about, without duplicates.
        absent: returns the classes that are certainly not in the image.
        mask: class -> [H, W] uint8 with 0, 1 and 255.
    """

    source: str
    image: np.ndarray
    present: Sequence[str]
    absent: Callable[[], list[str]]
    mask: Callable[[str], np.ndarray]


class Reader(Protocol):
    """Source of regions. ``problems`` has a message for each unusable record."""

    problems: list[str]

    def __len__(self) -> int: ...

    def regions(self, index: int) -> Regions: ...

    def describe(self) -> dict[str, int]: ...


class SemSegTrain:
    """Training data of semantic and part segmentation; a sample is an image with one question per sampled class.

    All regions of a class in an image form one mask: "dog ear" refers to every ear of every dog.

    Args:
        spec: the data set; no splits.
        row: the data set's row; a ``path`` that ends in .json is COCO-style, any other a folder of label images.
        dataset_dir: the root of all data.
        options: ``questions_per_image`` (LISA's ``num_classes_per_sample``) and ``negative_sampling_weight``.
    """

    def __init__(self, spec: Spec, row: DatasetRow, dataset_dir: Path, options: DataOptions) -> None:
        name = splitless_name(spec)
        self.name, self.options = name, options
        reader = AnnotationReader if row.path.endswith(".json") else LabelReader
        self.reader: Reader = reader(name, row, dataset_dir)

    def __len__(self) -> int:
        return len(self.reader)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        regions = self.reader.regions(index)
        if not regions.present:
            raise DataError(f"{regions.source}: it has no class to ask about")
        conversations: list[Conversation] = []
        masks = []
        for i in sample_indices(self.options.questions_per_image, len(regions.present), rng):
            weight = self.options.negative_sampling_weight
            if weight and rng.random() < weight and (absent := regions.absent()):
                correction = phrase(pick(regions.present, rng), rng) if rng.random() < 0.5 else ""
                conversations.append((_class_turn(pick(absent, rng), rng, correction, present=False),))
            else:
                conversations.append((_class_turn(regions.present[i], rng),))
                masks.append(regions.mask(regions.present[i]))
        stacked = stack_masks(masks, *regions.image.shape[:2])
        return check_sample(Sample(regions.source, regions.image, conversations, stacked))

    def describe(self) -> dict[str, int]:
        return {**self.reader.describe(), "unusable": len(self.reader.problems)}


def phrase(name: str, rng: np.random.Generator) -> str:
    """Samples the wording of a class; a part has two ("dog ear", "the ear of the dog")."""
    whole, _, part = name.partition(":")
    if not part:
        return whole
    return f"{whole} {part}" if rng.random() < 0.5 else f"the {part} of the {whole}"


def _class_turn(name: str, rng: np.random.Generator, correction: str = "", present: bool = True) -> Turn:
    text = phrase(name, rng)
    question = sample_question("part" if ":" in name else "phrase", text, rng)
    return Turn(question, sample_answer(1, rng) if present else denial(text, correction, rng))


def unrelated(candidates: Iterable[str], present: Iterable[str]) -> list[str]:
    """Candidates that share no word with a class in the image.

    An image with a "dining table" may contain a "table", and one with "wall-brick" a "wall".
    """
    present_words = {word for name in present for word in re.findall(r"\w+", name)}
    return [name for name in candidates if present_words.isdisjoint(re.findall(r"\w+", name))]


# -- label images ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """Classes of the 8-bit values in a data set's label images.

    Attributes:
        names: value -> class.
        ignored: values without a class; their pixels are ignored in the loss.
        not_asked: classes that no question is about; their pixels are negatives for the other classes.
        not_denied: classes that may be in an image although no pixel has their label.
    """

    names: dict[int, str]
    ignored: frozenset[int]
    not_asked: frozenset[str] = frozenset()
    not_denied: frozenset[str] = frozenset()


BUILTIN_LABELS = {
    "ade20k": Labels(dict(enumerate(ADE20K, start=1)), frozenset({0})),
    "cocostuff": Labels(
        dict(enumerate(COCO_STUFF)),
        frozenset({IGNORE_PIXEL}),
        not_asked=frozenset(name for name in COCO_STUFF if "-" in name),  # catch-all classes ("water-other")
        not_denied=COCO_STUFF_NOT_DENIED,
    ),
}


def read_vistas(path: Path) -> Labels:
    """Reads the label list of Mapillary Vistas; labels that its evaluation excludes ("Unlabeled") are ignored."""
    rows = read_json(path).get("labels")
    if (
        not isinstance(rows, list)
        or not 0 < len(rows) <= IGNORE_PIXEL
        or not all(isinstance(row, dict) and is_text(row.get("readable")) for row in rows)
    ):
        raise DataError(f"{path}: 'labels' must be a list of dicts with a string in 'readable', at most {IGNORE_PIXEL}")
    ignored = {value for value, row in enumerate(rows) if row.get("evaluate") is False}
    names = {value: row["readable"].lower() for value, row in enumerate(rows) if value not in ignored}
    return Labels(names, frozenset({*ignored, IGNORE_PIXEL}))


class LabelReader:
    """A folder of label images (.png), and photographs with the same stems (.jpg in any case).

    Args:
        name: the data set.
        row: ``path`` is the folder of label images, ``images`` those of the photographs; ``annotations`` is the class
            list, relative to the dataset directory, if it is not built in.
        dataset_dir: the root of all data.
    """

    def __init__(self, name: str, row: DatasetRow, dataset_dir: Path) -> None:
        self.name = name
        image_folders = [dataset_dir / folder for folder in row.images]
        lists = {"list of classes": [dataset_dir / file for file in row.annotations]} if row.annotations else {}
        self.folder, _, *class_list = find_paths(
            name, {"label images": [dataset_dir / row.path], "images": image_folders, **lists}
        )
        self.labels = read_vistas(class_list[0]) if class_list else BUILTIN_LABELS[name]
        excluded = self.labels.not_asked | self.labels.not_denied
        self.askable = [name for name in dict.fromkeys(self.labels.names.values()) if name not in excluded]
        self.image_folders = [folder for folder in image_folders if folder.is_dir()]
        images: dict[str, tuple[int, str]] = {}
        for number, folder in reversed(list(enumerate(self.image_folders))):  # the first folder takes precedence
            images |= {Path(file).stem: (number, file) for file in _files(folder, (".jpg", ".jpeg"))}
        records: list[tuple[str, int, str]] = []
        self.problems: list[str] = []
        for file in _files(self.folder, (".png",)):
            if Path(file).stem in images:
                records.append((file, *images[Path(file).stem]))
            else:
                folders = ", ".join(map(str, image_folders))
                self.problems.append(f"{self.folder / file} has no image of the same name (looked in {folders})")
        if Path(row.path).parts[0] == Path(row.images[0]).parts[0]:  # the photographs are this data set's alone
            labeled = {Path(file).stem for file, *_ in records}
            self.problems += [
                f"{self.image_folders[home] / file} has no label image in {self.folder}"
                for stem, (home, file) in sorted(images.items())
                if stem not in labeled
            ]
        if not records:
            first = (self.problems or ["the folder contains no .png"])[0]
            raise DataError(f"{name}: nothing usable in {self.folder}: {first}")
        self.records = PackedRecords(records)
        warn_unusable(name, self.problems)

    def __len__(self) -> int:
        return len(self.records)

    def regions(self, index: int) -> Regions:
        file, home, image_file = self.records[index]
        labels = read_label_image(self.folder / file)
        source = f"{self.name}/{image_file}"
        image = read_annotated(self.image_folders[home] / image_file, source, *labels.shape)
        values = np.flatnonzero(np.bincount(labels.ravel(), minlength=256)).tolist()
        unknown = [value for value in values if value not in self.labels.names and value not in self.labels.ignored]
        if unknown:
            raise DataError(f"{self.folder / file} has the values {unknown[:5]}, which are not classes of {self.name}")
        present = dict.fromkeys(self.labels.names[value] for value in values if value not in self.labels.ignored)
        return Regions(
            source=source,
            image=image,
            present=[name for name in present if name not in self.labels.not_asked],
            absent=lambda: unrelated(self.askable, present),
            mask=lambda name: self.label_mask(labels, name),
        )

    def label_mask(self, labels: np.ndarray, name: str) -> np.ndarray:
        """Mask [H, W], uint8: 1 = the class, 255 = ignored, 0 = other classes."""
        table = np.zeros(256, dtype=np.uint8)
        table[list(self.labels.ignored)] = IGNORE_PIXEL
        table[[value for value, other in self.labels.names.items() if other == name]] = 1
        return table[labels]

    def describe(self) -> dict[str, int]:
        return {"images": len(self.records)}


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Names of the files with a suffix, without hidden ones (a Mac adds ``._NAME`` to archives)."""
    return sorted(file for file in os.listdir(folder) if file.lower().endswith(suffixes) and not file.startswith("."))


# -- annotations -------------------------------------------------------------------------------------------------------


class AnnotationReader:
    """A COCO-style file whose categories are ``object`` or ``object:part``.

    PACO is annotated like LVIS: each image lists the categories verified to be absent (``neg_category_ids``). Without
    such a list, all categories that are not annotated count as absent.

    Args:
        name: the data set.
        row: ``path`` is the annotation file; its file names are relative to one of the folders ``images``.
        dataset_dir: the root of all data.
    """

    def __init__(self, name: str, row: DatasetRow, dataset_dir: Path) -> None:
        self.name = name
        self.folders, self.records, notes = load_single_file(name, row, dataset_dir, "annotations", _read_annotations)
        self.problems, self.count, self.names = notes["problems"], notes["count"], notes["names"]

    def __len__(self) -> int:
        return len(self.records)

    def regions(self, index: int) -> Regions:
        record = self.records[index]
        source = f"{self.name}/{record['file_name']}"
        path = find_image(self.name, record["file_name"], self.folders)
        return Regions(
            source=source,
            image=read_annotated(path, source, record["height"], record["width"]),
            present=list(record["regions"]),
            absent=lambda: self.absent(record),
            mask=lambda name: self.mask(record, name),
        )

    def absent(self, record: dict[str, Any]) -> list[str]:
        """Classes that are absent from the image according to the file."""
        negatives = record["negatives"]
        candidates = self.names.values() if negatives is None else filter(None, map(self.names.get, negatives))
        return unrelated(dict.fromkeys(candidates), record["regions"])

    def mask(self, record: dict[str, Any], name: str) -> np.ndarray:
        """Union of the annotations of a class, uint8 [H, W] with 0 and 1."""
        source = f"{self.name}/{record['file_name']}"
        return decode_union(record["regions"][name], record["height"], record["width"], source)

    def describe(self) -> dict[str, int]:
        return {"images": len(self.records), "masks": self.count}


def _read_annotations(name: str, path: Path) -> tuple[Iterable[dict[str, Any]], Notes]:
    """A record per image: ``{..., "regions": {class: [[annotation id, segmentation], ...]}, "negatives"}``."""
    content = read_json(path)
    images, categories = (by_id(content, key, path) for key in ("images", "categories"))
    names = {category_id: class_name(row, path) for category_id, row in categories.items()}
    records: dict[Any, dict[str, Any]] = {}
    problems = []
    count = 0
    for annotation in by_id(content, "annotations", path).values():
        try:
            image = row_of(images, annotation.get("image_id"), "image", path)
            category = row_of(categories, annotation.get("category_id"), "category", path)
            segmentation = segmentation_of(annotation, image["id"])
            if image["id"] not in records:
                records[image["id"]] = {**image_record(image), "regions": {}, "negatives": _negatives(image)}
        except DataError as error:
            problems.append(f"{name}, annotation {annotation['id']}: {error}")
            continue
        regions = records[image["id"]]["regions"]
        regions.setdefault(names[category["id"]], []).append([annotation["id"], segmentation])
        count += 1
    if not records:
        raise DataError(f"{name}: nothing usable in {path}: {(problems or ['it has no annotations'])[0]}")
    by_number = {str(category_id): class_ for category_id, class_ in names.items()}
    return records.values(), {"problems": problems, "count": count, "names": by_number}


def class_name(category: dict[str, Any], path: Path) -> str:
    """``"telephone_(cellular):back_cover"`` -> ``"telephone:back cover"``.

    Raises:
        DataError: if the category has no name, or the name has more than one colon.
    """
    name = category.get("name")
    parts = name.split(":") if is_text(name) else []
    plain = [" ".join(re.sub(r"\([^)]*\)", " ", part).replace("_", " ").split()) for part in parts]
    if not 1 <= len(plain) <= 2 or not all(plain):
        raise DataError(f"{path}: category {category['id']} has name {name!r}; expected 'object' or 'object:part'")
    return ":".join(plain)


def _negatives(image: dict[str, Any]) -> list[str] | None:
    ids = image.get("neg_category_ids")
    return [str(category_id) for category_id in ids] if isinstance(ids, list) else None
