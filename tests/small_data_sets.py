"""A small copy of every kind of data set that has annotation files, for the tests of damage."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
from disk import H, W, box, square, write_image, write_json
from PIL import Image

from utils.datasets import DataOptions, get_eval_dataset, get_train_dataset

IMAGE = {"id": 1, "file_name": "a.jpg", "height": H, "width": W}
INSTANCES = {
    "images": [IMAGE],
    "annotations": [
        {"id": 10, "image_id": 1, "category_id": 1, "segmentation": [box(5, 5)]},
        {"id": 11, "image_id": 1, "category_id": 1, "segmentation": {"size": [H, W], "counts": [9, 9, H * W - 18]}},
    ],
    "categories": [{"id": 1, "name": "dog:ear"}],
}
SENTENCES = [{"sent_id": 1, "sent": "the red cup", "tokens": ["the"]}, {"sent_id": 2, "sent": "a cup", "exist": False}]
REFS = [
    {"ref_id": k, "ann_id": 10 + k, "image_id": 1, "split": split, "sentences": SENTENCES}
    for k, split in enumerate(("train", "val"))
]
REASON = {
    "text": ["the cup"],
    "is_sentence": False,
    "imageHeight": H,
    "imageWidth": W,
    "shapes": [{"label": "target", "points": square(5, 5)}, {"label": "ignore", "points": square(15, 5)}],
}
COT = {
    "image_path": "coco/a.jpg",
    "English Question": "Where?",
    "English Answer": "Here: <3| cup>.",
    "info": {"3": [square(2, 2)]},
}
MUSE = {
    "coco_url": "x/train2017/a.jpg",
    "height": H,
    "width": W,
    "questions": ["Which?"],
    "answers": [[{"segmentation": [box(5, 5)]}, {"segmentation": [box(25, 5)]}]],
    "text_answers": ["{seg} and {seg}"],
}
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cup."}]

# data set, its file, the content
JSON_FILES = {
    "refcocog|google": ("refer_seg/refcocog/refs(google).json", REFS),
    "grefcoco": ("refer_seg/grefcoco/instances.json", INSTANCES),
    "R-refcoco|x": ("refer_seg/R-refcoco/refs(x).json", REFS),
    "ReasonSeg": ("reason_seg/ReasonSeg/train/a.json", REASON),
    "cot": ("reason_seg_plus/LISA_Plus_COT.json", [COT, COT]),
    "MultiReasonSeg": ("multi_reason_seg/MultiReasonSeg/MUSE_train.json", [MUSE, MUSE]),
    "llava_instruct_150k": ("llava_dataset/llava_instruct_150k.json", [{"image": "a.jpg", "conversations": TURNS}]),
    "pascal_part": ("vlpart/pascal_part/train.json", INSTANCES),
    "mapillary": ("mapillary/config_v2.0.json", {"labels": [{"readable": "bird"}, {"readable": "road"}]}),
}


def write_data_sets(root: Path) -> None:
    for folder in ("coco/train2014", "coco/train2017", "reason_seg/ReasonSeg/train", "mapillary/training/images"):
        write_image(root / folder / "a.jpg")
    write_image(root / "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages/a.jpg")
    labels = root / "mapillary/training/v2.0/labels/a.png"
    labels.parent.mkdir(parents=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 2, (H, W), dtype=np.uint8)).save(labels)
    for file, content in JSON_FILES.values():
        write_json(root / file, content)
    for name in ("refcocog", "R-refcoco", "refclef"):
        write_json(root / f"refer_seg/{name}/instances.json", INSTANCES)
    write_json(root / "refer_seg/grefcoco/grefs(unc).json", REFS)
    write_image(root / "refer_seg/images/saiapr_tc-12/a.jpg")
    (root / "refer_seg/refclef/refs(unc).p").write_bytes(pickle.dumps(REFS, protocol=2))


def read_all(name: str, root: Path) -> tuple[str, int]:
    """Reads all samples of a data set twice; returns a checksum of them, and the number of records left out."""
    digest = hashlib.sha256()
    dataset = get_train_dataset(name, root, DataOptions(questions_per_image=3))
    for index in range(2 * len(dataset)):
        sample = dataset.sample(index % len(dataset), np.random.default_rng(index))
        digest.update(
            repr(sample.conversations).encode(errors="replace") + sample.image.tobytes() + sample.masks.tobytes()
        )
    counts = dataset.describe()
    lost = sum(counts.get(kind, 0) for kind in ("unusable", "skipped", "dropped"))
    if name.startswith(("refc", "grefcoco", "R-")):
        split = get_eval_dataset(f"{name}|val", root, allow_missing=True)
        lost += sum(map(len, (split.skipped, split.unusable, split.not_found)))
        for index in range(len(split)):
            digest.update(json.dumps([query.text for query in split[index].queries], ensure_ascii=False).encode())
    return digest.hexdigest(), lost
