"""Draws the demo's data sets and writes them as a ``--dataset_dir`` in the layouts of the real ones.

    python scripts/make_demo_data.py --out data/demo --seed 0

The scenes and texts come from ``utils/scenes.py``. What is written:

- ``reason_seg/ReasonSeg/{train,val,test,heldout}``: one image, one target, one to three queries per file; half of the
  files hold short phrases, half whole questions; ``explanatory/train.json`` has text answers for some. ``heldout`` has
  short queries about pairs of color and kind that occur nowhere else.
- ``refer_seg/refcoco`` and ``refer_seg/grefcoco``: COCO-style, the latter with several, one and no targets.
- ``llava_dataset/llava_instruct_150k.json``: captions and question answering in several turns.

Every scene has its own random stream (seed, set and split, index), so no two splits share one. Stream numbers stay
below 1000; the pre-training uses others.

ReasonSeg has polygons alone, which are drawn outline and interior: the pixels on a region's border are its vertices, a
polygon for each connected part, and a target with a hole (which polygons cannot say) is not asked about. Drawn again
they are the visible region (IoU 0.99999 on average, at least 0.98: parts of one or two pixels are lost). COCO polygons
run along the outer edge of the pixels (IoU 1); every eighth COCO mask, and any with a hole, is RLE.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import pickle
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from utils import scenes  # noqa: E402
from utils.scenes import KINDS, Query, Scene  # noqa: E402

SUMMARY = "demo_data.json"
STREAMS = {
    ("ReasonSeg", "train"): 1,
    ("ReasonSeg", "val"): 2,
    ("ReasonSeg", "test"): 3,
    ("ReasonSeg", "heldout"): 4,
    ("refcoco", "train"): 11,
    ("refcoco", "val"): 12,
    ("refcoco", "testA"): 13,
    ("refcoco", "testB"): 14,
    ("grefcoco", "train"): 21,
    ("grefcoco", "val"): 22,
    ("grefcoco", "testA"): 23,
    ("grefcoco", "testB"): 24,
    ("llava_instruct_150k", "train"): 31,
}
FIRST_IMAGE = {"refcoco": 100_001, "grefcoco": 300_001, "llava_instruct_150k": 500_001}
LONG_FAMILIES = ("relation", "superlative", "commonsense")
MAX_IMAGES = 100_000


@dataclass(frozen=True)
class Sizes:
    """What decides the content, with the seed: images per training set, and queries per evaluation split."""

    seed: int
    train: int
    val: int
    test: int


# ------------------------------------------------------------------------------------------------- text-blind scores


@dataclass
class Blind:
    """What answers that ignore the text would score on one kind of query of one split.

    "all" answers with every shape; "random" with one shape, as an expectation over the shapes. Absent targets count as
    in gRefCOCO: an answer that is not empty has IoU 0 and adds its pixels to the union.
    """

    queries: int = 0
    iou: dict[str, float] = field(default_factory=lambda: {"all": 0.0, "random": 0.0})
    inter: dict[str, float] = field(default_factory=lambda: {"all": 0.0, "random": 0.0})
    union: dict[str, float] = field(default_factory=lambda: {"all": 0.0, "random": 0.0})

    def add(self, scene: Scene, targets: tuple[int, ...]) -> None:
        # The visible regions are disjoint: areas say it all.
        areas = scene.masks.sum(axis=(1, 2)).astype(np.float64)
        wanted = np.isin(np.arange(len(areas)), targets)
        goal = areas[wanted].sum()
        inter = np.where(wanted, areas, 0.0)
        union = areas + goal - inter
        self.queries += 1
        self.iou["all"] += goal / areas.sum()
        self.inter["all"] += goal
        self.union["all"] += areas.sum()
        self.iou["random"] += float((inter / union).mean())
        self.inter["random"] += float(inter.mean())
        self.union["random"] += float(union.mean())

    def scores(self) -> dict[str, dict[str, float]]:
        return {
            answer: {
                "gIoU": round(self.iou[answer] / self.queries, 4),
                "cIoU": round(self.inter[answer] / self.union[answer], 4),
            }
            for answer in ("all", "random")
        }


class Ledger:
    """Counts and text-blind scores of everything that is written."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, dict[str, int]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(int)))
        self.blind: dict[tuple[str, str, str], Blind] = defaultdict(Blind)

    def count(self, dataset: str, split: str, **numbers: int) -> None:
        for name, number in numbers.items():
            self.counts[dataset][split][name] += number

    def query(self, dataset: str, split: str, kinds: tuple[str, ...], scene: Scene, targets: tuple[int, ...]) -> None:
        for kind in kinds:
            self.blind[dataset, split, kind].add(scene, targets)

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"set": key[0], "split": key[1], "kind": key[2], "queries": blind.queries, **blind.scores()}
            for key, blind in self.blind.items()
        ]


# -------------------------------------------------------------------------------------------------- masks as polygons


def _contours(mask: np.ndarray) -> tuple[list[np.ndarray], bool]:
    """Outer border pixels (x, y) [K, 2] of each connected part of a mask [H, W], and whether the mask has a hole."""
    found, tree = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    outer = [points[:, 0] for points, node in zip(found, tree[0]) if node[3] < 0]
    return outer, len(outer) < len(found)


def labelme_polygons(mask: np.ndarray) -> list[list[list[int]]] | None:
    """Polygons for ReasonSeg's rule (outline and interior are drawn), or None where they cannot say the mask."""
    outer, has_hole = _contours(mask)
    polygons = [points.tolist() for points in outer if len(points) >= 3]
    return None if has_hole or not polygons else polygons


def coco_segmentation(mask: np.ndarray, as_rle: bool) -> list[list[float]] | dict[str, Any]:
    """Polygons along the outer edge of the pixels, in COCO's continuous coordinates, or compressed RLE."""
    fine = 4
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    window = mask[y : y + height, x : x + width]
    outer, has_hole = _contours(window.repeat(fine, axis=0).repeat(fine, axis=1))
    simple = [cv2.approxPolyDP(points[:, None], fine / 3, closed=True)[:, 0] for points in outer]
    polygons = [((p + 0.5) / fine + (x, y)).round(2).ravel().tolist() for p in simple if len(p) >= 3]
    if as_rle or has_hole or not polygons:
        rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}
    return polygons


# ------------------------------------------------------------------------------------------------------ writing files


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, separators=(",", ":")), encoding="utf-8")


def write_jpeg(path: Path, image: np.ndarray) -> None:
    """Quality 95 with full color resolution: coarser color would blur shapes of 20 pixels."""
    options = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    _, data = cv2.imencode(".jpg", image[:, :, ::-1], options)
    path.write_bytes(data.tobytes())


def streams(dataset: str, split: str, seed: int, count: int) -> Iterator[tuple[int, np.random.Generator]]:
    """(index, its generator) for each image of a split."""
    for index in range(count):
        yield index, np.random.default_rng([seed, STREAMS[dataset, split], index])


# ---------------------------------------------------------------------------------------------------------- ReasonSeg


def _reason_scene(rng: np.random.Generator, family: str, held_out: bool) -> tuple[Scene, list[Query], list]:
    """A scene, up to three queries of which the first is of ``family`` and all mean one shape, and its polygons."""
    generate = scenes.attribute_queries if family == "attribute" else scenes.reasoning_queries
    while True:
        scene = scenes.draw_scene(rng, held_out)
        queries = generate(scene, rng)
        first = next((query for query in queries if query.family == family), None)
        if first is None:
            continue
        polygons = labelme_polygons(scene.masks[first.targets[0]])
        if polygons is None:
            continue
        same = [query for query in queries if query.targets == first.targets and query is not first]
        return scene, [first, *same[:2]], polygons


def _reason_json(queries: list[Query], polygons: list, image_name: str, size: tuple[int, int]) -> dict[str, Any]:
    shape = {"label": "target", "labels": ["target"], "shape_type": "polygon", "image_name": image_name}
    return {
        "text": [query.text for query in queries],
        "is_sentence": queries[0].is_sentence,
        "shapes": [{**shape, "points": p, "group_id": None, "group_ids": [None], "flags": {}} for p in polygons],
        "imagePath": image_name,
        "imageHeight": size[0],
        "imageWidth": size[1],
        "meta": {"family": queries[0].family},  # the real files have no such key; reports group by it
    }


def write_reason_seg(root: Path, sizes: Sizes, ledger: Ledger) -> None:
    folder = root / "reason_seg" / "ReasonSeg"
    counts = {"train": sizes.train, "val": 2 * sizes.val, "test": 2 * sizes.test, "heldout": sizes.test}
    explanations = []
    for split, count in counts.items():
        (folder / split).mkdir(parents=True)
        for index, rng in streams("ReasonSeg", split, sizes.seed, count):
            is_long = split != "heldout" and index % 2 == 1
            family = LONG_FAMILIES[index // 2 % 3] if is_long else "attribute"
            scene, queries, polygons = _reason_scene(rng, family, split == "heldout")
            name = f"{split}_{index:05d}"
            write_jpeg(folder / split / f"{name}.jpg", scene.image)
            annotation = _reason_json(queries, polygons, f"{name}.jpg", scene.image.shape[:2])
            write_json(folder / split / f"{name}.json", annotation)
            kind = "long" if is_long else "short"
            ledger.count("ReasonSeg", split, images=1, queries=len(queries), **{f"{kind}_images": 1})
            kinds = (kind, f"long: {family}") if is_long else (kind,)
            ledger.query("ReasonSeg", split, kinds, scene, queries[0].targets)
            if split == "train" and index % 4 == 3:
                outputs = scenes.explanation(scene, queries[0])
                explained = {
                    "query": queries[0].text,
                    "outputs": outputs,
                    "image": f"{name}.jpg",
                    "json": f"{name}.json",
                }
                explanations.append(explained)
    write_json(folder / "explanatory" / "train.json", explanations)
    ledger.count("ReasonSeg", "train", explanations=len(explanations))


# ------------------------------------------------------------------------------------------------- RefCOCO, gRefCOCO

Drawn = tuple[Scene, list[list[Query]]]


def _group(queries: list[Query], refs: int, sentences: int) -> list[list[Query]]:
    """Up to ``refs`` groups of up to ``sentences`` queries that mean the same shapes."""
    groups: dict[tuple[int, ...], list[Query]] = {}
    for query in queries:
        groups.setdefault(query.targets, []).append(query)
    return [group[:sentences] for group in list(groups.values())[:refs]]


def draw_refcoco(rng: np.random.Generator, training: bool) -> Drawn:
    """One target per ref: 3 refs of 2 sentences for training, else 2 of 2 (so that all splits can say their size)."""
    refs = 3 if training else 2
    while True:
        scene = scenes.draw_scene(rng)
        groups = [g for g in _group(scenes.attribute_queries(scene, rng), refs=6, sentences=2) if len(g) == 2]
        if len(groups) >= 2:
            return scene, groups[:refs]


def draw_grefcoco(rng: np.random.Generator, training: bool) -> Drawn:
    """As many refs with several targets as with one and with none: 2 each for training, else 1 each."""
    each = 2 if training else 1
    while True:
        scene = scenes.draw_scene(rng)
        multi = _group(scenes.multi_queries(scene, rng), refs=each, sentences=1)
        single = _group(scenes.attribute_queries(scene, rng), refs=each, sentences=1)
        absent = [[query] for query in scenes.absent_queries(scene, rng)[:each]]
        if len(multi) == len(single) == len(absent) == each:
            return scene, multi + single + absent


class ReferWriter:
    """Collects the images, annotations and refs of one COCO-style set."""

    def __init__(self, root: Path, dataset: str, ledger: Ledger) -> None:
        self.root, self.dataset, self.ledger = root, dataset, ledger
        self.images_folder = root / "refer_seg" / "images" / "mscoco" / "images" / "train2014"
        self.images_folder.mkdir(parents=True, exist_ok=True)
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.refs: list[dict[str, Any]] = []
        self.sentences = 0

    def add(self, split: str, scene: Scene, groups: list[list[Query]]) -> None:
        """Writes the image and records all of its shapes, then a ref for each group of queries."""
        height, width = scene.image.shape[:2]
        image_id = FIRST_IMAGE[self.dataset] + len(self.images)
        file_name = f"COCO_train2014_{image_id:012d}.jpg"
        write_jpeg(self.images_folder / file_name, scene.image)
        self.images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        first = len(self.annotations) + 1
        for mask, shape in zip(scene.masks, scene.shapes):
            self._annotate(image_id, mask, KINDS.index(shape.kind) + 1)
        for group in groups:
            self._refer(split, image_id, [first + target for target in group[0].targets], group)
            for query in group:
                kind = {"attribute": "one target", "multi": "several targets", "absent": "no target"}[query.family]
                kinds = ("all", kind) if self.dataset == "grefcoco" else ("all",)
                self.ledger.query(self.dataset, split, kinds, scene, query.targets)
                self.ledger.count(self.dataset, split, expressions=1, **{kind.replace(" ", "_"): 1})
        self.ledger.count(self.dataset, split, images=1, refs=len(groups))

    def _annotate(self, image_id: int, mask: np.ndarray, category_id: int) -> None:
        number = len(self.annotations) + 1
        self.annotations.append(
            {
                "id": number,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": [float(value) for value in cv2.boundingRect(mask.astype(np.uint8))],
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": coco_segmentation(mask, as_rle=number % 8 == 0),
            }
        )

    def _refer(self, split: str, image_id: int, ann_ids: list[int], group: list[Query]) -> None:
        sentences = []
        for query in group:
            self.sentences += 1
            tokens = query.text.split()
            sentences.append({"sent_id": self.sentences, "sent": query.text, "raw": query.text, "tokens": tokens})
        categories = [self.annotations[i - 1]["category_id"] for i in ann_ids]
        ref = {"ref_id": len(self.refs) + 1, "image_id": image_id, "split": split, "sentences": sentences}
        ref["sent_ids"] = [sentence["sent_id"] for sentence in sentences]
        ref["file_name"] = f"COCO_train2014_{image_id:012d}_{ann_ids[0] if ann_ids else 0}.jpg"
        if self.dataset == "refcoco":
            ref |= {"ann_id": ann_ids[0], "category_id": categories[0]}
        else:
            ref |= {"ann_id": ann_ids or [-1], "category_id": categories or [-1], "no_target": not ann_ids}
            for sentence in sentences:
                sentence["exist"] = bool(ann_ids)
        self.refs.append(ref)

    def save(self) -> None:
        folder = self.root / "refer_seg" / self.dataset
        categories = [{"id": i + 1, "name": kind, "supercategory": "shape"} for i, kind in enumerate(KINDS)]
        info = {"description": "drawn by scripts/make_demo_data.py"}
        instances = {"info": info, "images": self.images, "annotations": self.annotations, "categories": categories}
        write_json(folder / "instances.json", instances)
        if self.dataset == "refcoco":
            (folder / "refs(unc).p").write_bytes(pickle.dumps(self.refs, protocol=2))
        else:
            write_json(folder / "grefs(unc).json", self.refs)


def write_refer_seg(
    root: Path, sizes: Sizes, ledger: Ledger, dataset: str, draw: Callable[..., Drawn], per_image: float
) -> None:
    """Train, val, testA, testB; an image answers for ``per_image`` of the queries that ``sizes`` asks for."""
    writer = ReferWriter(root, dataset, ledger)
    val, test = math.ceil(sizes.val / per_image), math.ceil(sizes.test / per_image)
    for split, count in {"train": sizes.train, "val": val, "testA": test, "testB": test}.items():
        for _, rng in streams(dataset, split, sizes.seed, count):
            writer.add(split, *draw(rng, split == "train"))
    writer.save()


# -------------------------------------------------------------------------------------------------------------- LLaVA


def _conversation(rng: np.random.Generator, scene: Scene) -> list[tuple[str, str]]:
    """Question and answer per turn: a caption in four of ten, otherwise two to four short answers."""
    if rng.random() < 0.4:
        request = scenes.CAPTION_REQUESTS[int(rng.integers(len(scenes.CAPTION_REQUESTS)))]
        return [(request, scenes.caption(scene, rng))]
    return scenes.questions(scene, rng)[: int(rng.integers(2, 5))]


def write_llava(root: Path, sizes: Sizes, ledger: Ledger) -> None:
    dataset, folder = "llava_instruct_150k", root / "coco" / "train2017"
    folder.mkdir(parents=True)
    records = []
    for index, rng in streams(dataset, "train", sizes.seed, max(1, sizes.train * 4 // 15)):
        scene = scenes.draw_scene(rng)
        stem = f"{FIRST_IMAGE[dataset] + index:012d}"
        write_jpeg(folder / f"{stem}.jpg", scene.image)
        turns = _conversation(rng, scene)
        first = turns[0][0]
        values = [f"<image>\n{first}" if rng.random() < 0.5 else f"{first}\n<image>", *(q for q, _ in turns[1:])]
        conversation = []
        for question, (_, answer) in zip(values, turns):
            conversation += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append({"id": stem, "image": f"{stem}.jpg", "conversations": conversation})
        ledger.count(dataset, "train", images=1, turns=len(turns))
    write_json(root / "llava_dataset" / "llava_instruct_150k.json", records)


# --------------------------------------------------------------------------------------------------------------- main


def source_hash() -> str:
    """Of the two files that decide what is drawn, so that data of an older version are not taken for these."""
    return hashlib.sha256(Path(__file__).read_bytes() + Path(scenes.__file__).read_bytes()).hexdigest()[:12]


def existing_summary(out: Path, sizes: Sizes) -> dict[str, Any] | None:
    """The summary of finished data in ``out`` with the same arguments, None where there is nothing yet.

    Raises:
        ValueError: ``out`` holds something else.
    """
    if out.is_file():
        raise ValueError(f"--out {out} is a file; give a folder")
    if not out.exists() or not any(out.iterdir()):
        return None
    if not (out / SUMMARY).is_file():
        raise ValueError(f"--out {out} exists and was not written by this script; give another folder")
    try:
        summary = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
        found = {**summary["arguments"], "source": summary["source"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{out / SUMMARY} cannot be read ({error!r}); remove {out} and run again") from error
    wanted = {**asdict(sizes), "source": source_hash()}
    if found != wanted:
        differing = ", ".join(f"{k} {found.get(k)} (now {wanted[k]})" for k in wanted if found.get(k) != wanted[k])
        raise ValueError(f"{out} holds data made with other settings: {differing}; remove it or give another --out")
    return summary


def build(out: Path, sizes: Sizes) -> dict[str, Any]:
    """Writes everything beside ``out`` and renames it, so that ``out`` is complete or absent -> the summary."""
    partial = out.with_name(out.name + ".tmp")
    if partial.exists():
        if not (partial / SUMMARY).is_file():
            raise ValueError(f"{partial} is in the way and not a leftover of this script; remove it")
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    write_json(partial / SUMMARY, {"complete": False})
    ledger = Ledger()
    parts: dict[str, Callable[[], None]] = {
        "ReasonSeg": lambda: write_reason_seg(partial, sizes, ledger),
        "refcoco": lambda: write_refer_seg(partial, sizes, ledger, "refcoco", draw_refcoco, 4),
        "grefcoco": lambda: write_refer_seg(partial, sizes, ledger, "grefcoco", draw_grefcoco, 2.5),
        "llava_instruct_150k": lambda: write_llava(partial, sizes, ledger),
    }
    for name, write in parts.items():
        start = time.perf_counter()
        write()
        images = sum(split["images"] for split in ledger.counts[name].values())
        print(f"{name}: {images} images in {time.perf_counter() - start:.1f} s", flush=True)
    summary = {
        "complete": True,
        "arguments": asdict(sizes),
        "source": source_hash(),
        "counts": ledger.counts,
        "text_blind": ledger.rows(),
    }
    (partial / SUMMARY).write_text(json.dumps(summary, indent=1), encoding="utf-8")
    partial.replace(out)
    return summary


def table(summary: dict[str, Any]) -> str:
    """Counts per set and split, then the text-blind scores."""
    lines = ["", "What was drawn"]
    for dataset, splits in summary["counts"].items():
        for split, counts in splits.items():
            numbers = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in counts.items())
            lines.append(f"  {dataset:<20} {split:<8} {numbers}")
    lines += ["", "What an answer that ignores the text scores", f"  {'':48}   all objects  random object"]
    lines.append(f"  {'set':<10} {'split':<8} {'kind':<18} {'queries':>9}    gIoU  cIoU    gIoU  cIoU")
    for row in summary["text_blind"]:
        cells = [f"{row[answer][metric]:.2f}" for answer in ("all", "random") for metric in ("gIoU", "cIoU")]
        name = f"  {row['set']:<10} {row['split']:<8} {row['kind']:<18} {row['queries']:>9}"
        lines.append(f"{name}    {cells[0]}  {cells[1]}    {cells[2]}  {cells[3]}")
    return "\n".join(lines)


def _number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return value

    return parse


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draws small scenes with exact masks and writes them as a --dataset_dir in the layouts of "
        "ReasonSeg, RefCOCO, gRefCOCO and LLaVA-Instruct. The same seed and sizes give the same files. Data that are "
        "already there with the same settings are left alone; an interrupted run leaves nothing half done in --out.",
        epilog="Then: python train_ds.py --config configs/tiny.yaml --dataset_dir DIR",
    )
    size = _number(1, MAX_IMAGES)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write, the later --dataset_dir"
    )
    parser.add_argument(
        "--seed", type=_number(0, 2**32 - 1), default=0, metavar="S", help="seed of all scenes (default: %(default)s)"
    )
    parser.add_argument(
        "--train",
        type=size,
        default=1500,
        metavar="N",
        help="training images in each of ReasonSeg, RefCOCO and gRefCOCO, and 4/15 as many for LLaVA-Instruct "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--val",
        type=size,
        default=320,
        metavar="N",
        help="queries per validation split: N short and N long ones in ReasonSeg, at least N expressions in RefCOCO, "
        "1.2 N in gRefCOCO (a third each with several, one and no targets) (default: %(default)s)",
    )
    parser.add_argument(
        "--test",
        type=size,
        default=320,
        metavar="N",
        help="the same for ReasonSeg's test, testA and testB; and short queries of ReasonSeg's heldout split, about "
        "pairs of color and kind that occur nowhere else (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    sizes = Sizes(args.seed, args.train, args.val, args.test)
    out = args.out.absolute()
    try:
        summary = existing_summary(out, sizes)
        if summary:
            print(f"{args.out} already holds these data (seed {args.seed}); nothing to do")
        else:
            summary = build(out, sizes)
            print(f"wrote {args.out}")
    except (ValueError, OSError) as error:
        print(f"make_demo_data: {error}", file=sys.stderr)
        return 1
    print(table(summary))
    return 0


if __name__ == "__main__":
    cv2.setNumThreads(1)
    sys.exit(main())
