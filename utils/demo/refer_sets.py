"""The demo's referring sets: synthetic scenes in the layouts of docs/data.md."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.datasets.base import pick
from utils.demo import scene_texts, scenes
from utils.demo.files import Ledger, Sizes, coco_annotation, streams, write_jpeg, write_json
from utils.demo.scene_texts import Query
from utils.demo.scenes import COLORS, HELD_OUT, KINDS, Scene

Sentence = tuple[Query, dict[str, Any]]  # a query, and additional keys of its sentence
SceneRefs = tuple[Scene, list[list[Sentence]]]  # a scene and its refs


def _group(queries: list[Query], refs: int, sentences: int) -> list[list[Query]]:
    """Groups queries by their targets: up to ``refs`` groups of up to ``sentences`` queries."""
    groups: dict[tuple[int, ...], list[Query]] = {}
    for query in queries:
        groups.setdefault(query.targets, []).append(query)
    return [group[:sentences] for group in list(groups.values())[:refs]]


def _without_extras(groups: list[list[Query]]) -> list[list[Sentence]]:
    return [[(query, {}) for query in group] for group in groups]


def sample_refcoco(rng: np.random.Generator, training: bool) -> SceneRefs:
    """Refs with one target: 3 with 2 sentences each for training, otherwise 2 (so that split sizes are exact)."""
    refs = 3 if training else 2
    while True:
        scene = scenes.sample_scene(rng)
        groups = [g for g in _group(scene_texts.attribute_queries(scene, rng), refs=6, sentences=2) if len(g) == 2]
        if len(groups) >= 2:
            return scene, _without_extras(groups[:refs])


def sample_grefcoco(rng: np.random.Generator, training: bool) -> SceneRefs:
    """Equally many refs with several targets, one, and none: 2 of each for training, otherwise 1 of each."""
    each = 2 if training else 1
    while True:
        scene = scenes.sample_scene(rng)
        multi = _group(scene_texts.multi_queries(scene, rng), refs=each, sentences=1)
        single = _group(scene_texts.attribute_queries(scene, rng), refs=each, sentences=1)
        absent = [[query] for query in scene_texts.absent_queries(scene, rng)[:each]]
        if len(multi) == len(single) == len(absent) == each:
            return scene, _without_extras(multi + single + absent)


def sample_negatives(rng: np.random.Generator, training: bool) -> SceneRefs:
    """Two refs, each with a true sentence and one marked as having no target."""
    while True:
        scene = scenes.sample_scene(rng)
        true = _group(scene_texts.attribute_queries(scene, rng), refs=2, sentences=1)
        false = scene_texts.absent_queries(scene, rng)
        if len(true) == 2 and len(false) >= 2:
            return scene, [[(t, {"exist": True}), (f, {"exist": False})] for (t,), f in zip(true, false)]


def sample_corrections(rng: np.random.Generator, training: bool) -> SceneRefs:
    """Two refs, each with a true sentence and the same sentence with a color that is absent from the scene."""
    while True:
        scene = scenes.sample_scene(rng)
        refs: list[list[Sentence]] = []
        for (true,) in _group(scene_texts.attribute_queries(scene, rng), refs=6, sentences=1):
            if text := _recolored(scene, true, rng):
                false = Query(text, (), "absent", False)
                correction = {"is_false_premise": True, "gt_sent": true.text}
                refs.append([(true, {"is_false_premise": False}), (false, correction)])
        if len(refs) >= 2:
            return scene, refs[:2]


def _recolored(scene: Scene, query: Query, rng: np.random.Generator) -> str:
    """The query with an absent color; empty if it names no color."""
    kind = scene.shapes[query.targets[0]].kind
    taken = {shape.color for shape in scene.shapes}
    free = [color for color in COLORS if color not in taken and (color, kind) not in HELD_OUT]
    words = query.text.split()
    if not free or not any(word in COLORS for word in words):
        return ""
    other = pick(free, rng)
    return " ".join(other if word in COLORS else word for word in words)


@dataclass(frozen=True)
class ReferSet:
    """A data set's layout and content.

    Attributes:
        stream: random stream of the first split; the other splits use the next ones.
        first_image: id of the first image.
        sample: samples a scene and its refs.
        files: split -> file of its refs.
        per_image: expressions per image of an evaluation split.
        images: folder of the images.
        image_name: file name of an image id, without suffix.
        lists: whether ``ann_id`` is a list.
        none: value of that list for absent targets.
        base: whether it is written without ``all_types`` too, with its query-agnostic baselines.
    """

    stream: int
    first_image: int
    sample: Callable[[np.random.Generator, bool], SceneRefs]
    files: dict[str, str]
    per_image: float = 4
    images: str = "refer_seg/images/mscoco/images/train2014"
    image_name: str = "COCO_train2014_{:012d}"
    lists: bool = False
    none: tuple[int, ...] = (-1,)
    base: bool = False

    def count(self, split: str, sizes: Sizes) -> int:
        """Number of images in a split."""
        if not self.base:
            return sizes.small_split(split)
        queries = sizes.val if split == "val" else sizes.test
        return sizes.train if split == "train" else math.ceil(queries / self.per_image)


def _same_file(name: str, splits: str) -> dict[str, str]:
    return dict.fromkeys(splits.split(), name)


def _false_premise_files(split_by: str, splits: str) -> dict[str, str]:
    return {"train": f"refs({split_by}_exclude_unified).p", **_same_file(f"refs({split_by}).p", splits)}


_UNC, _UMD = "train val testA testB", "train val test"
REFER_SETS = {
    "refcoco": ReferSet(11, 100_001, sample_refcoco, _same_file("refs(unc).p", _UNC), base=True),
    "grefcoco": ReferSet(
        21, 300_001, sample_grefcoco, _same_file("grefs(unc).json", _UNC), per_image=2.5, lists=True, base=True
    ),
    "refcoco+": ReferSet(101, 600_001, sample_refcoco, _same_file("refs(unc).p", _UNC)),
    "refcocog": ReferSet(111, 620_001, sample_refcoco, _same_file("refs(umd).p", _UMD)),
    "refclef": ReferSet(
        121, 1, sample_refcoco, _same_file("refs(unc).p", _UNC), images="refer_seg/images/saiapr_tc-12", image_name="{}"
    ),
    "refzom": ReferSet(
        131,
        760_001,
        sample_grefcoco,
        _same_file("Ref_ZOM.p", "train test"),
        images="refer_seg/refzom/trainval2014",
        lists=True,
        none=(),
    ),
    "R-refcoco": ReferSet(141, 640_001, sample_negatives, _false_premise_files("unc", "val testA testB")),
    "R-refcoco+": ReferSet(151, 660_001, sample_negatives, _false_premise_files("unc", "val testA testB")),
    "R-refcocog": ReferSet(161, 680_001, sample_negatives, _false_premise_files("umd", "val test")),
    "fprefcoco": ReferSet(171, 700_001, sample_corrections, _false_premise_files("berkeley", "val test")),
    "fprefcoco+": ReferSet(181, 720_001, sample_corrections, _false_premise_files("berkeley", "val test")),
    "fprefcocog": ReferSet(191, 740_001, sample_corrections, _false_premise_files("berkeley", "val test")),
}


class ReferWriter:
    """Collects images, annotations and refs of a COCO-style set, and writes them."""

    def __init__(self, root: Path, dataset: str, ledger: Ledger) -> None:
        self.root, self.dataset, self.ledger = root, dataset, ledger
        self.layout = REFER_SETS[dataset]
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.refs: list[dict[str, Any]] = []
        self.sentences = 0

    def add(self, split: str, scene: Scene, groups: list[list[Sentence]]) -> None:
        """Writes the image; adds annotations of all its shapes, and a ref per group of sentences."""
        height, width = scene.image.shape[:2]
        image_id = self.layout.first_image + len(self.images)
        file_name = f"{self.layout.image_name.format(image_id)}.jpg"
        write_jpeg(self.root / self.layout.images / file_name, scene.image)
        self.images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        first = len(self.annotations) + 1
        for mask, shape in zip(scene.masks, scene.shapes):
            number, category = len(self.annotations) + 1, KINDS.index(shape.kind) + 1
            self.annotations.append(coco_annotation(number, image_id, category, mask))
        for group in groups:
            self._add_ref(split, image_id, [first + target for target in group[0][0].targets], group)
            for query, _ in group:
                kind = {"attribute": "one target", "multi": "several targets", "absent": "no target"}[query.family]
                kinds = ("all", kind) if self.dataset == "grefcoco" else ("all",)
                if self.layout.base:
                    self.ledger.query(self.dataset, split, kinds, scene, query.targets)
                self.ledger.count(self.dataset, split, expressions=1, **{kind.replace(" ", "_"): 1})
        self.ledger.count(self.dataset, split, images=1, refs=len(groups))

    def _add_ref(self, split: str, image_id: int, ann_ids: list[int], group: list[Sentence]) -> None:
        sentences: list[dict[str, Any]] = []
        for query, extra in group:
            self.sentences += 1
            tokens = query.text.split()
            sentence = {"sent_id": self.sentences, "sent": query.text, "raw": query.text, "tokens": tokens}
            sentences.append({**sentence, **extra})
        categories = [self.annotations[i - 1]["category_id"] for i in ann_ids]
        ref: dict[str, Any] = {"ref_id": len(self.refs) + 1, "image_id": image_id, "split": split}
        ref |= {"sentences": sentences, "sent_ids": [sentence["sent_id"] for sentence in sentences]}
        ref["file_name"] = f"{self.layout.image_name.format(image_id)}_{ann_ids[0] if ann_ids else 0}.jpg"
        if not self.layout.lists:
            ref |= {"ann_id": ann_ids[0], "category_id": categories[0]}
        else:
            none = list(self.layout.none)
            ref |= {"ann_id": ann_ids or none, "category_id": categories or none}
        if self.dataset == "grefcoco":
            ref["no_target"] = not ann_ids
            for sentence in sentences:
                sentence["exist"] = bool(ann_ids)
        self.refs.append(ref)

    def save(self) -> None:
        folder = self.root / "refer_seg" / self.dataset
        categories = [{"id": i + 1, "name": kind, "supercategory": "shape"} for i, kind in enumerate(KINDS)]
        info = {"description": "drawn by scripts/make_demo_data.py"}
        instances = {"info": info, "images": self.images, "annotations": self.annotations, "categories": categories}
        write_json(folder / "instances.json", instances)
        for file in dict.fromkeys(self.layout.files.values()):
            refs = [ref for ref in self.refs if self.layout.files[ref["split"]] == file]
            if file.endswith(".p"):
                (folder / file).write_bytes(pickle.dumps(refs, protocol=2))
            else:
                write_json(folder / file, refs)


def write_refer_set(root: Path, dataset: str, sizes: Sizes, ledger: Ledger) -> None:
    """Writes all splits of a set."""
    writer, layout = ReferWriter(root, dataset, ledger), REFER_SETS[dataset]
    for position, split in enumerate(layout.files):
        for _, rng in streams(sizes.seed, layout.stream + position, layout.count(split, sizes)):
            writer.add(split, *layout.sample(rng, split == "train"))
    writer.save()
