"""The demo's sem_seg, reason_seg_plus and multi_reason_seg sets: synthetic scenes in the layouts of docs/data.md.

ADE20K and COCO-Stuff have fixed class lists, so each kind of shape gets the class that looks most like it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from utils.datasets.base import pick
from utils.datasets.class_names import ADE20K, COCO_STUFF
from utils.datasets.templates import enumerate_words
from utils.demo import scene_texts, scenes
from utils.demo.files import Ledger, Sizes, coco_annotation, coco_segmentation, streams, write_jpeg, write_json
from utils.demo.scene_texts import Query
from utils.demo.scenes import COLORS, HELD_OUT, KINDS, Scene

STREAMS = {
    "ade20k": {"train": 201},
    "cocostuff": {"train": 202},
    "mapillary": {"train": 203},
    "pascal_part": {"train": 204},
    "paco_lvis": {"train": 205},
    "instance_seg": {"train": 211},
    "cot": {"train": 212},
    "conversations": {"train": 213},
    "caption": {"train": 214},
    "MultiReasonSeg": {"train": 221, "val": 222, "test_less": 223, "test_many": 224},
}
FIRST_IMAGE = {
    "cocostuff": 800_001,
    "paco_lvis": 820_001,
    "instance_seg": 840_001,
    "cot": 860_001,
    "conversations": 880_001,
    "caption": 900_001,
    "MultiReasonSeg": 920_001,
}
COCO_2017 = "coco/train2017"


def write_set(root: Path, dataset: str, sizes: Sizes, ledger: Ledger) -> None:
    """Writes all splits of a set."""
    for split in STREAMS[dataset]:
        count = sizes.small_split(split)
        rngs = streams(sizes.seed, STREAMS[dataset][split], count)
        WRITERS[dataset](root, dataset, split, [rng for _, rng in rngs])
        ledger.count(dataset, split, images=count)


def coco_name(dataset: str, split: str, index: int) -> str:
    first = FIRST_IMAGE[dataset] + 7_000 * list(STREAMS[dataset]).index(split)
    return f"{first + index:012d}.jpg"


# -- sem_seg: label images ---------------------------------------------------------------------------------------------

_LOOKALIKES = {  # kind -> class of ADE20K, of COCO-Stuff
    "circle": ("ball", "frisbee"),
    "square": ("box", "book"),
    "triangle": ("tent", "tent"),
    "star": ("lamp", "flower"),
    "cross": ("signboard", "scissors"),
    "diamond": ("flag", "kite"),
}


def _labels(scene: Scene, background: int, value: Callable[[int], int], frame: int | None = None) -> np.ndarray:
    """Label image uint8 [H, W]: ``value(i)`` on shape i, else the background; ``frame`` on the outermost two pixels."""
    labels = np.full(scene.masks.shape[1:], background, dtype=np.uint8)
    for index, mask in enumerate(scene.masks):
        labels[mask] = value(index)
    if frame is not None:
        inside = np.zeros_like(labels, dtype=bool)
        inside[2:-2, 2:-2] = True
        labels[~inside] = frame
    return labels


def _save_labels(path: Path, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _, data = cv2.imencode(".png", labels)
    path.write_bytes(data.tobytes())


def _write_ade20k(root: Path, dataset: str, split: str, rngs: list[np.random.Generator]) -> None:
    for index, rng in enumerate(rngs):
        scene, stem = scenes.sample_scene(rng), f"ADE_train_{index + 1:08d}"
        numbers = [1 + ADE20K.index(_LOOKALIKES[shape.kind][0]) for shape in scene.shapes]
        labels = _labels(scene, 1 + ADE20K.index("wall"), numbers.__getitem__, frame=0)
        write_jpeg(root / f"ade20k/images/training/{stem}.jpg", scene.image)
        _save_labels(root / f"ade20k/annotations/training/{stem}.png", labels)


def _write_cocostuff(root: Path, dataset: str, split: str, rngs: list[np.random.Generator]) -> None:
    for index, rng in enumerate(rngs):
        scene, name = scenes.sample_scene(rng), coco_name(dataset, split, index)
        numbers = [COCO_STUFF.index(_LOOKALIKES[shape.kind][1]) for shape in scene.shapes]
        labels = _labels(scene, COCO_STUFF.index("wall-other"), numbers.__getitem__, frame=255)
        write_jpeg(root / COCO_2017 / name, scene.image)
        _save_labels(root / "cocostuff/train2017" / Path(name).with_suffix(".png"), labels)


def _write_mapillary(root: Path, dataset: str, split: str, rngs: list[np.random.Generator]) -> None:
    """Also writes the class list: all pairs of color and kind that scenes may have."""
    pairs = [(color, kind) for color in COLORS for kind in KINDS if (color, kind) not in HELD_OUT]
    rows = [{"name": f"object--{c}-{k}", "readable": f"{c} {k}".title(), "evaluate": True} for c, k in pairs]
    rows += [
        {"name": "nature--background", "readable": "Background", "evaluate": True},
        {"name": "void--unlabeled", "readable": "Unlabeled", "evaluate": False},
    ]
    write_json(root / "mapillary/config_v2.0.json", {"version": "2.0", "labels": rows})
    for index, rng in enumerate(rngs):
        scene, stem = scenes.sample_scene(rng), f"scene_{index:05d}"
        numbers = [pairs.index((shape.color, shape.kind)) for shape in scene.shapes]
        labels = _labels(scene, len(pairs), numbers.__getitem__, frame=len(pairs) + 1)
        write_jpeg(root / f"mapillary/training/images/{stem}.jpg", scene.image)
        _save_labels(root / f"mapillary/training/v2.0/labels/{stem}.png", labels)


# -- sem_seg: parts ----------------------------------------------------------------------------------------------------

_HALVES = ("top", "bottom", "left side", "right side")


def _halves(mask: np.ndarray) -> dict[str, np.ndarray]:
    """Parts of a region [H, W]: its halves, cut at the center of its box."""
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    rows, columns = np.ogrid[: mask.shape[0], : mask.shape[1]]
    upper, left = rows < y + height // 2, columns < x + width // 2
    return dict(zip(_HALVES, (mask & upper, mask & ~upper, mask & left, mask & ~left)))


def _part_file(scene_list: list[Scene], names: list[str], categories: list[str]) -> dict[str, Any]:
    """COCO-style annotations: two parts of each shape, and the whole shape if it is in ``categories``."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    numbers = {name.replace("_(shape)", "").replace("_", " "): i + 1 for i, name in enumerate(categories)}
    for image_id, (scene, name) in enumerate(zip(scene_list, names), start=1):
        height, width = scene.image.shape[:2]
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for index, (mask, shape) in enumerate(zip(scene.masks, scene.shapes)):
            halves, first = _halves(mask), (image_id + index) % 2 * 2
            regions = {shape.kind: mask} | {f"{shape.kind}:{part}": halves[part] for part in _HALVES[first : first + 2]}
            for text, region in regions.items():
                if text in numbers and region.any():
                    annotations.append(coco_annotation(len(annotations) + 1, image_id, numbers[text], region))
    rows = [{"id": i + 1, "name": name} for i, name in enumerate(categories)]
    return {"images": images, "annotations": annotations, "categories": rows}


def _write_pascal_part(root: Path, dataset: str, split: str, rngs: list[np.random.Generator]) -> None:
    scene_list = [scenes.sample_scene(rng) for rng in rngs]
    names = [f"2010_{index + 1:06d}.jpg" for index in range(len(scene_list))]
    for scene, name in zip(scene_list, names):
        write_jpeg(root / "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages" / name, scene.image)
    categories = [f"{kind}:{part}" for kind in KINDS for part in _HALVES]
    write_json(root / "vlpart/pascal_part/train.json", _part_file(scene_list, names, categories))


def _write_paco(root: Path, dataset: str, split: str, rngs: list[np.random.Generator]) -> None:
    """Uses LVIS names; each image lists the categories verified to be absent."""
    scene_list = [scenes.sample_scene(rng) for rng in rngs]
    names = [f"train2017/{coco_name(dataset, split, index)}" for index in range(len(scene_list))]
    for scene, name in zip(scene_list, names):
        write_jpeg(root / "coco" / name, scene.image)
    parts = [part.replace(" ", "_") for part in _HALVES]
    categories = [f"{kind}_(shape){part}" for kind in KINDS for part in ("", *(f":{part}" for part in parts))]
    content = _part_file(scene_list, names, categories)
    for scene, image in zip(scene_list, content["images"]):
        kinds = {shape.kind for shape in scene.shapes}
        absent = [row["id"] for row in content["categories"] if row["name"].split("_")[0] not in kinds]
        image["neg_category_ids"] = absent
    write_json(root / "vlpart/paco/annotations/paco_lvis_v1_train.json", content)


# -- reason_seg_plus ---------------------------------------------------------------------------------------------------


def _outline_polygons(mask: np.ndarray) -> list[list[list[float]]]:
    """Polygons [[x, y], ...] of a region; holes, which the format cannot represent, are filled."""
    filled = mask.astype(np.uint8)
    cv2.drawContours(filled, cv2.findContours(filled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0], -1, 1, cv2.FILLED)
    polygons = coco_segmentation(filled.astype(bool), as_rle=False)
    if isinstance(polygons, dict):
        raise AssertionError("a region without a hole has polygons")
    return [np.reshape(polygon, (-1, 2)).tolist() for polygon in polygons]


def _name(scene: Scene, index: int) -> str:
    return f"{scene.shapes[index].color} {scene.shapes[index].kind}"


def sample_scene_with(
    rng: np.random.Generator, generate: Callable[[Scene, np.random.Generator], list[Query]], min_targets: int = 1
) -> tuple[Scene, Query]:
    """Samples a scene and a query with at least ``min_targets`` targets."""
    while True:
        scene = scenes.sample_scene(rng)
        for query in generate(scene, rng):
            if len(query.targets) >= min_targets:
                return scene, query


def _instance_item(rng: np.random.Generator, ids: list[int]) -> tuple[Scene, dict[str, Any]]:
    scene, query = sample_scene_with(rng, scene_texts.multi_queries)
    points: dict[str, Any] = {}
    for index, number in enumerate(ids[: len(scene.shapes)]):
        key = ("points", "polygon")[index % 2]  # the real files use both
        polygons = _outline_polygons(scene.masks[index])
        points[str(number)] = {"label name": _name(scene, index), key: polygons if len(polygons) > 1 else polygons[0]}
    question = f"which shapes are meant by {query.text}?"
    return scene, {"English Question": question, "ID": [ids[target] for target in query.targets], "points": points}


def _info(scene: Scene, ids: list[int]) -> dict[str, Any]:
    return {str(ids[index]): _outline_polygons(mask) for index, mask in enumerate(scene.masks)}


def _cot_item(rng: np.random.Generator, ids: list[int]) -> tuple[Scene, dict[str, Any]]:
    scene, query = sample_scene_with(rng, scene_texts.reasoning_queries)
    (target,) = query.targets
    answer = f"{scene_texts.explanation(scene, query)} here it is: <{ids[target]}| {_name(scene, target)}>."
    return scene, {"English Question": query.text, "English Answer": answer, "info": _info(scene, ids)}


def _conversation_item(rng: np.random.Generator, ids: list[int]) -> tuple[Scene, dict[str, Any]]:
    """A text-only turn, then a question about several shapes, whose masks are referred to as a list."""
    scene, query = sample_scene_with(rng, scene_texts.multi_queries)
    question, answer = scene_texts.questions(scene, rng)[0]
    listed = ", ".join(f"{_name(scene, target)} <{ids[target]}>" for target in query.targets)
    turns = f"<person>: {question} <robot>: {answer} <person>: where is {query.text}? <robot>: they are [{listed}]."
    return scene, {"output": turns, "info": _info(scene, ids)}


def _caption_item(rng: np.random.Generator, ids: list[int]) -> tuple[Scene, dict[str, Any]]:
    scene = scenes.sample_scene(rng)
    parts = [f"a 《{ids[index]}|{_name(scene, index)}》" for index in range(len(scene.shapes))]
    request = pick(scene_texts.CAPTION_REQUESTS, rng)
    answer = f"there is {enumerate_words(parts)}."
    return scene, {"English Question": request, "English Answer": answer, "info": _info(scene, ids)}


_ITEMS = {  # data set -> part of the file name, key of the image path, function that makes an item
    "instance_seg": ("Instance_Seg", "img_path", _instance_item),
    "cot": ("COT", "image_path", _cot_item),
    "conversations": ("Conversations", "img_pth", _conversation_item),
    "caption": ("Caption", "image_path", _caption_item),
}


def _write_plus(root: Path, dataset: str, split: str, rngs: list[np.random.Generator]) -> None:
    part, key, make = _ITEMS[dataset]
    items = []
    for index, rng in enumerate(rngs):
        name = coco_name(dataset, split, index)
        ids = [int(name.split(".")[0]) * 10 + k for k in range(6)]
        scene, item = make(rng, ids)
        write_jpeg(root / COCO_2017 / name, scene.image)
        items.append({key: f"train2017/{name}", **item})
    write_json(root / f"reason_seg_plus/LISA_Plus_{part}.json", items)


# -- multi_reason_seg --------------------------------------------------------------------------------------------------


def _write_muse(root: Path, dataset: str, split: str, rngs: list[np.random.Generator]) -> None:
    """Up to two questions per image; every other answer has an annotated text."""
    min_targets = 3 if split == "test_many" else 2
    items = []
    for index, rng in enumerate(rngs):
        scene, first = sample_scene_with(rng, scene_texts.multi_queries, min_targets)
        others = [query for query in scene_texts.multi_queries(scene, rng) if len(query.targets) >= min_targets]
        queries = [first, *(query for query in others if query.targets != first.targets)][:2]
        name, (height, width) = coco_name(dataset, split, index), scene.image.shape[:2]
        rows = []
        for k, (mask, shape) in enumerate(zip(scene.masks, scene.shapes)):
            row = coco_annotation(8 * index + k + 1, index + 1, KINDS.index(shape.kind) + 1, mask)
            rows.append({**row, "category_name": shape.kind, "rephrased_name": _name(scene, k)})
        answers = [[rows[target] for target in query.targets] for query in queries]
        texts = [f"they are {enumerate_words(['{seg}'] * len(query.targets))}." for query in queries]
        write_jpeg(root / COCO_2017 / name, scene.image)
        item: dict[str, Any] = {"file_name": name, "coco_url": f"http://images.cocodataset.org/train2017/{name}"}
        item |= {"height": height, "width": width, "ann_list": rows, "answers": answers}
        item["questions"] = [f"which shapes are meant by {query.text}?" for query in queries]
        items.append({**item, "text_answers": [text if (index + k) % 2 else None for k, text in enumerate(texts)]})
    write_json(root / f"multi_reason_seg/MultiReasonSeg/MUSE_{split}.json", items)


WRITERS: dict[str, Callable[[Path, str, str, list[np.random.Generator]], None]] = {
    "ade20k": _write_ade20k,
    "cocostuff": _write_cocostuff,
    "mapillary": _write_mapillary,
    "pascal_part": _write_pascal_part,
    "paco_lvis": _write_paco,
    **dict.fromkeys(_ITEMS, _write_plus),
    "MultiReasonSeg": _write_muse,
}
