"""The demo's referring sets: drawn scenes in the layouts of docs/data.md."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.demo import scene_texts, scenes
from utils.demo.files import Ledger, Sizes, coco_annotation, streams, write_jpeg, write_json
from utils.demo.scene_texts import Query
from utils.demo.scenes import COLORS, HELD_OUT, KINDS, Scene

Said = tuple[Query, dict[str, Any]]  # a sentence, and what its data set adds to it
Drawn = tuple[Scene, list[list[Said]]]  # a scene and its refs


def _group(queries: list[Query], refs: int, sentences: int) -> list[list[Query]]:
    """Up to ``refs`` groups of up to ``sentences`` queries that mean the same shapes."""
    groups: dict[tuple[int, ...], list[Query]] = {}
    for query in queries:
        groups.setdefault(query.targets, []).append(query)
    return [group[:sentences] for group in list(groups.values())[:refs]]


def _without_extras(groups: list[list[Query]]) -> list[list[Said]]:
    return [[(query, {}) for query in group] for group in groups]


def draw_refcoco(rng: np.random.Generator, training: bool) -> Drawn:
    """One target per ref: 3 refs of 2 sentences for training, else 2 of 2 (so that all splits can say their size)."""
    refs = 3 if training else 2
    while True:
        scene = scenes.sample_scene(rng)
        groups = [g for g in _group(scene_texts.attribute_queries(scene, rng), refs=6, sentences=2) if len(g) == 2]
        if len(groups) >= 2:
            return scene, _without_extras(groups[:refs])


def draw_grefcoco(rng: np.random.Generator, training: bool) -> Drawn:
    """As many refs with several targets as with one and with none: 2 each for training, else 1 each."""
    each = 2 if training else 1
    while True:
        scene = scenes.sample_scene(rng)
        multi = _group(scene_texts.multi_queries(scene, rng), refs=each, sentences=1)
        single = _group(scene_texts.attribute_queries(scene, rng), refs=each, sentences=1)
        absent = [[query] for query in scene_texts.absent_queries(scene, rng)[:each]]
        if len(multi) == len(single) == len(absent) == each:
            return scene, _without_extras(multi + single + absent)


def draw_negatives(rng: np.random.Generator, training: bool) -> Drawn:
    """Two refs of a true sentence and one of which nothing fits, which says so."""
    while True:
        scene = scenes.sample_scene(rng)
        true = _group(scene_texts.attribute_queries(scene, rng), refs=2, sentences=1)
        false = scene_texts.absent_queries(scene, rng)
        if len(true) == 2 and len(false) >= 2:
            return scene, [[(t, {"exist": True}), (f, {"exist": False})] for (t,), f in zip(true, false)]


def draw_corrections(rng: np.random.Generator, training: bool) -> Drawn:
    """Two refs of a true sentence and the same one with a color that nothing in the scene has."""
    while True:
        scene = scenes.sample_scene(rng)
        refs: list[list[Said]] = []
        for (true,) in _group(scene_texts.attribute_queries(scene, rng), refs=6, sentences=1):
            if text := _recolored(scene, true, rng):
                false = Query(text, (), "absent", False)
                said = {"is_false_premise": True, "gt_sent": true.text}
                refs.append([(true, {"is_false_premise": False}), (false, said)])
        if len(refs) >= 2:
            return scene, refs[:2]


def _recolored(scene: Scene, query: Query, rng: np.random.Generator) -> str:
    """Empty where the text names no color."""
    kind = scene.shapes[query.targets[0]].kind
    taken = {shape.color for shape in scene.shapes}
    free = [color for color in COLORS if color not in taken and (color, kind) not in HELD_OUT]
    words = query.text.split()
    if not free or not any(word in COLORS for word in words):
        return ""
    other = free[int(rng.integers(len(free)))]
    return " ".join(other if word in COLORS else word for word in words)


@dataclass(frozen=True)
class ReferSet:
    """A data set's layout and content.

    Attributes:
        stream: of its first split; the others follow.
        first_image: id of its first image.
        draw: one image's scene and refs.
        files: split -> its file of refs.
        per_image: expressions per image of an evaluation split.
        images: folder of the images. image_name: of an image's id.
        lists: ``ann_id`` is a list. none: what it holds where nothing is meant.
        base: it is drawn without ``all_types`` too, and its text-blind scores are reported.
    """

    stream: int
    first_image: int
    draw: Callable[[np.random.Generator, bool], Drawn]
    files: dict[str, str]
    per_image: float = 4
    images: str = "refer_seg/images/mscoco/images/train2014"
    image_name: str = "COCO_train2014_{:012d}"
    lists: bool = False
    none: tuple[int, ...] = (-1,)
    base: bool = False

    def count(self, split: str, sizes: Sizes) -> int:
        """Images of a split."""
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
    "refcoco": ReferSet(11, 100_001, draw_refcoco, _same_file("refs(unc).p", _UNC), base=True),
    "grefcoco": ReferSet(
        21, 300_001, draw_grefcoco, _same_file("grefs(unc).json", _UNC), per_image=2.5, lists=True, base=True
    ),
    "refcoco+": ReferSet(101, 600_001, draw_refcoco, _same_file("refs(unc).p", _UNC)),
    "refcocog": ReferSet(111, 620_001, draw_refcoco, _same_file("refs(umd).p", _UMD)),
    "refclef": ReferSet(
        121, 1, draw_refcoco, _same_file("refs(unc).p", _UNC), images="refer_seg/images/saiapr_tc-12", image_name="{}"
    ),
    "refzom": ReferSet(
        131,
        760_001,
        draw_grefcoco,
        _same_file("Ref_ZOM.p", "train test"),
        images="refer_seg/refzom/trainval2014",
        lists=True,
        none=(),
    ),
    "R-refcoco": ReferSet(141, 640_001, draw_negatives, _false_premise_files("unc", "val testA testB")),
    "R-refcoco+": ReferSet(151, 660_001, draw_negatives, _false_premise_files("unc", "val testA testB")),
    "R-refcocog": ReferSet(161, 680_001, draw_negatives, _false_premise_files("umd", "val test")),
    "fprefcoco": ReferSet(171, 700_001, draw_corrections, _false_premise_files("berkeley", "val test")),
    "fprefcoco+": ReferSet(181, 720_001, draw_corrections, _false_premise_files("berkeley", "val test")),
    "fprefcocog": ReferSet(191, 740_001, draw_corrections, _false_premise_files("berkeley", "val test")),
}


class ReferWriter:
    """Collects the images, annotations and refs of one COCO-style set."""

    def __init__(self, root: Path, dataset: str, ledger: Ledger) -> None:
        self.root, self.dataset, self.ledger = root, dataset, ledger
        self.layout = REFER_SETS[dataset]
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.refs: list[dict[str, Any]] = []
        self.sentences = 0

    def add(self, split: str, scene: Scene, groups: list[list[Said]]) -> None:
        """Writes the image and records all of its shapes, then a ref for each group of sentences."""
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
            self._refer(split, image_id, [first + target for target in group[0][0].targets], group)
            for query, _ in group:
                kind = {"attribute": "one target", "multi": "several targets", "absent": "no target"}[query.family]
                kinds = ("all", kind) if self.dataset == "grefcoco" else ("all",)
                if self.layout.base:
                    self.ledger.query(self.dataset, split, kinds, scene, query.targets)
                self.ledger.count(self.dataset, split, expressions=1, **{kind.replace(" ", "_"): 1})
        self.ledger.count(self.dataset, split, images=1, refs=len(groups))

    def _refer(self, split: str, image_id: int, ann_ids: list[int], group: list[Said]) -> None:
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
    """One set with all its splits."""
    writer, layout = ReferWriter(root, dataset, ledger), REFER_SETS[dataset]
    for position, split in enumerate(layout.files):
        for _, rng in streams(sizes.seed, layout.stream + position, layout.count(split, sizes)):
            writer.add(split, *layout.draw(rng, split == "train"))
    writer.save()
