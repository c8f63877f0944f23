"""The demo's sets for evaluation alone, and MMR: synthetic scenes in the layouts of docs/data.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from utils.datasets.masks import encode_mask
from utils.demo import scene_texts, scenes
from utils.demo.files import Ledger, Sizes, coco_annotation, streams, write_jpeg, write_json
from utils.demo.other_sets import sample_scene_with
from utils.demo.scene_texts import Query
from utils.demo.scenes import Scene

STREAMS = {
    "GSEval": {"test": 231},
    "ReasonSeg-R": {"test": 232},
    "ReasonSeg-X": {"train": 233, "val": 234, "test": 235},
    "refcoco-m": {"val": 236},
    "HalluSegBench": {"refer_seg": 242, "reason_seg_val": 243, "reason_seg_test": 244},
    "MMR": {"train": 237, "val": 238, "test_mixed": 239, "test_obj_only": 240, "test_part_only": 241},
}
FIRST_IMAGE = {"GSEval": 940_001, "refcoco-m": 950_001, "MMR": 960_001, "HalluSegBench": 970_001}
ROWS = 2  # of a row group: a file has several
CLASS_IDS = {"multi": 3, "attribute": 4}


def write_evaluation_set(root: Path, dataset: str, sizes: Sizes, ledger: Ledger) -> None:
    """Writes all splits of a set; those in parquet files only if pyarrow is installed."""
    for split, stream in STREAMS[dataset].items():
        count = sizes.small_split(split)
        rngs = [rng for _, rng in streams(sizes.seed, stream, count)]
        EVALUATION_SETS[dataset](root, dataset, split, rngs)
        ledger.count(dataset, split, images=count)


def _image_id(dataset: str, split: str, index: int) -> int:
    return FIRST_IMAGE[dataset] + 1_000 * list(STREAMS[dataset]).index(split) + index


def _union(scene: Scene, query: Query) -> np.ndarray:
    return np.any(scene.masks[list(query.targets)], axis=0)


def _write_gseval(root: Path, dataset: str, split: str, rngs: list[np.random.Generator]) -> None:
    """A caption of one shape and one of several per image."""
    lines: list[dict[str, Any]] = []
    for index, rng in enumerate(rngs):
        while True:
            scene = scenes.sample_scene(rng)
            queries = [*scene_texts.attribute_queries(scene, rng)[:1], *scene_texts.multi_queries(scene, rng)[:1]]
            if len(queries) == 2:
                break
        name = f"{_image_id(dataset, split, index):012d}.jpg"
        write_jpeg(root / "coco/unlabeled2017" / name, scene.image)
        for query in queries:
            mask = _union(scene, query)
            ys, xs = mask.nonzero()
            row = {"idx": len(lines), "image_path": f"unlabeled2017/{name}", "class_id": CLASS_IDS[query.family]}
            row |= {
                "label": scene.shapes[query.targets[0]].kind,
                "caption": query.text,
                "segmentation": encode_mask(mask),
            }
            lines.append(row | {"box": [float(v) for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)]})
    path = root / "groundingsuite/GroundingSuite-Eval.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _write_reasoning(root: Path, dataset: str, split: str, rngs: list[np.random.Generator]) -> None:
    rows = []
    for index, rng in enumerate(rngs):
        scene, query = sample_scene_with(rng, scene_texts.reasoning_queries)
        mask = _union(scene, query)
        row = {"image": _encoded(scene.image), "text": query.text, "mask": mask.tolist()}
        row |= {"image_id": f"{split}_{index}", "ann_id": "0", "img_height": mask.shape[0], "img_width": mask.shape[1]}
        rows.append(row | ({"reasoning_type": query.family} if dataset == "ReasonSeg-X" else {}))
    _write_parquet(root / f"reason_seg/{dataset}/{split}/{split}-00000-of-00001.parquet", rows)


def _write_refcoco_m(root: Path, dataset: str, split: str, rngs: list[np.random.Generator]) -> None:
    """Up to two shapes per image, each with up to two sentences."""
    rows = []
    for index, rng in enumerate(rngs):
        scene, number = scenes.sample_scene(rng), _image_id(dataset, split, index)
        samples: dict[tuple[int, ...], dict[str, Any]] = {}
        for query in scene_texts.attribute_queries(scene, rng):
            mask, shape = _union(scene, query), scene.shapes[query.targets[0]]
            new = {"id": 10 * number + len(samples), "image_id": number, "category": shape.kind, "sentences": []}
            new |= {
                "supercategory": "shape",
                "label": shape.kind,
                "bbox": [0.0, 0.0, 1.0, 1.0],
                "mask": encode_mask(mask),
            }
            samples.setdefault(query.targets, new)["sentences"].append(query.text)
        kept = [sample | {"sentences": sample["sentences"][:2]} for sample in list(samples.values())[:2]]
        row = {"image": _encoded(scene.image), "image_id": number, "file_name": f"COCO_train2014_{number:012d}.jpg"}
        rows.append(row | {"samples": kept})
    _write_parquet(root / "refer_seg/refcoco-m/data/validation-00000-of-00001.parquet", rows)


def _write_mmr(root: Path, dataset: str, split: str, rngs: list[np.random.Generator]) -> None:
    """A question about several shapes per image, with the answer's text."""
    items = []
    for index, rng in enumerate(rngs):
        scene, query = sample_scene_with(rng, scene_texts.multi_queries)
        number, (height, width) = _image_id(dataset, split, index), scene.image.shape[:2]
        name = f"train2017/{number:012d}.jpg"
        write_jpeg(root / "coco" / name, scene.image)
        rows = [
            {**coco_annotation(8 * index + k + 1, number, 1, scene.masks[k]), "category_name": scene.shapes[k].kind}
            for k in query.targets
        ]
        for row, k in zip(rows, query.targets):
            row["segmentation"] = encode_mask(scene.masks[k])
        item = {"file_name": name, "coco_url": f"http://images.cocodataset.org/{name}", "image_id": number}
        item |= {"height": height, "width": width, "questions": [f"which shapes are meant by {query.text}?"]}
        text = " and ".join(f"the {row['category_name']} {{seg}}" for row in rows)
        items.append(item | {"answers": [rows], "text_answers": [text], "raw_answers": [text], "annotations": rows})
    write_json(root / f"multi_reason_seg/MMR/MMR_{split}.json", items)


def _write_hallusegbench(root: Path, dataset: str, split: str, rngs: list[np.random.Generator]) -> None:
    """A shape per image, and its edit: the shape in a color that is not there; each second edit is larger."""
    folder, pairs = root / "hallusegbench" / split, []
    for index, rng in enumerate(rngs):
        scene, shape, color = _sample_edit(rng)
        kind, old = scene.shapes[shape].kind, scene.shapes[shape].color
        edited, mask = scene.image.astype(np.int16), scene.masks[shape]
        edited[mask] += np.subtract(scenes.COLORS[color], scenes.COLORS[old]).astype(np.int16)
        edited = edited.clip(0, 255).astype(np.uint8)
        size = (scene.image.shape[1] * (1 + index % 2), scene.image.shape[0] * (1 + index % 2))
        stem = f"COCO_train2014_{_image_id(dataset, split, index):012d}"
        files = {
            "factual_image_path": (f"factual_images/{stem}.png", scene.image),
            "factual_mask_path": (f"factual_masks/{stem}_mask.png", mask * np.uint8(255)),
            "counterfactual_image_path": (f"counterfactual_images/{stem}_edited.png", cv2.resize(edited, size)),
            "counterfactual_mask_path": (
                f"counterfactual_masks/{stem}_newmask.png",
                cv2.resize(mask * np.uint8(255), size, interpolation=cv2.INTER_NEAREST),
            ),
        }
        for name, pixels in files.values():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / name), pixels[..., ::-1] if pixels.ndim == 3 else pixels)
        names = f"{old} {kind}", f"{color} {kind}"
        pair = {"ann_id": index, "label": kind} | {key: name for key, (name, _) in files.items()}
        pair |= {"factual_label": names[0], "counterfactual_label": names[1]}
        pair |= {"gpt_instruction": f"replace the {names[0]} by a {names[1]}"}
        if split != "refer_seg":
            pair |= {"question": f"which shape is the {names[0]}?"}
            pair |= {"counterfactual_question": f"which shape is the {names[1]}?"}
        pairs.append(pair)
    write_json(folder / "data.json", pairs)


def _sample_edit(rng: np.random.Generator) -> tuple[Scene, int, str]:
    """A scene, a shape that is the only one of its color and kind, and a color that none of the shapes has."""
    while True:
        scene = scenes.sample_scene(rng)
        names = [(shape.color, shape.kind) for shape in scene.shapes]
        taken = {color for color, _ in names}
        for index, (_, kind) in enumerate(names):
            free = [c for c in scenes.COLORS if c not in taken and (c, kind) not in scenes.HELD_OUT]
            if names.count(names[index]) == 1 and free:
                return scene, index, scenes.one_of(rng, free)


def _encoded(image: np.ndarray) -> dict[str, Any]:
    _, data = cv2.imencode(".jpg", image[:, :, ::-1])
    return {"bytes": data.tobytes(), "path": None}


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        print(f"{path.name}: left out, pip install pyarrow writes it")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=ROWS)


EVALUATION_SETS: dict[str, Callable[[Path, str, str, list[np.random.Generator]], None]] = {
    "GSEval": _write_gseval,
    "ReasonSeg-R": _write_reasoning,
    "ReasonSeg-X": _write_reasoning,
    "refcoco-m": _write_refcoco_m,
    "HalluSegBench": _write_hallusegbench,
    "MMR": _write_mmr,
}
