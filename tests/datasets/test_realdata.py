"""The readers on a few real files (ADE20K, COCO, COCO-Stuff, Mapillary Vistas), if they exist beside the checkout."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from disk import REALDATA, write_json
from PIL import Image

from utils.datasets import DataOptions, get_eval_dataset, get_train_dataset
from utils.datasets.class_names import ADE20K
from utils.datasets.templates import QUESTIONS

pytestmark = pytest.mark.skipif(not REALDATA.is_dir(), reason="no real data beside the checkout")


def areas(name: str, index: int = 0) -> dict[str, int]:
    """Class -> pixels of its mask; there is a question about every class of the image."""
    dataset = get_train_dataset(name, REALDATA, DataOptions(questions_per_image=99))
    sample = dataset.sample(index, np.random.default_rng(0))
    patterns = [re.escape(question).replace(re.escape("{query}"), "(.+)") for question in QUESTIONS["phrase"]]
    pixels = {}
    for (turn,), mask in zip(sample.conversations, sample.masks, strict=True):
        (match,) = filter(None, (re.fullmatch(pattern, turn.question) for pattern in patterns))
        pixels[match[1]] = int((mask == 1).sum())
    return pixels


def test_coco_stuff() -> None:
    assert areas("cocostuff") == {"cat": 112933, "couch": 174579, "remote": 6186, "blanket": 2750}


def test_mapillary() -> None:
    assert areas("mapillary") == {"building": 9157, "street light": 731, "pole": 112}


def test_ade20k() -> None:
    dataset = get_train_dataset("ade20k", REALDATA)
    assert dataset.describe() == {"images": 3, "unusable": 0}
    stems = ["ADE_train_00016869", "ADE_train_00016900", "ADE_train_00016964"]
    for index, stem in enumerate(stems):
        labels = np.asarray(Image.open(REALDATA / f"ade20k/annotations/training/{stem}.png"))
        values, counts = np.unique(labels[labels > 0], return_counts=True)
        assert areas("ade20k", index) == {ADE20K[v - 1]: n for v, n in zip(values.tolist(), counts.tolist())}
    street = {"building", "tree", "road", "sidewalk", "person", "car", "minibike", "bicycle", "truck", "awning"}
    assert street <= set(areas("ade20k", 1))  # scooters and a bicycle on the pavement beside parked cars


def test_coco_polygons_have_the_stated_areas(tmp_path: Path) -> None:
    """COCO's annotations of a photograph, each as the target of an expression."""
    instances = json.loads((REALDATA / "coco/instances_39769.json").read_text())
    (image,) = instances["images"]
    (tmp_path / "coco/train2014").mkdir(parents=True)
    shutil.copy(REALDATA / "coco/train2017" / image["file_name"], tmp_path / "coco/train2014")
    refs = [
        {
            "ref_id": number,
            "ann_id": annotation["id"],
            "image_id": image["id"],
            "file_name": f"{Path(image['file_name']).stem}_{number}.jpg",
            "split": "val",
            "sentences": [{"sent_id": number, "sent": f"thing number {number}"}],
        }
        for number, annotation in enumerate(instances["annotations"])
    ]
    write_json(tmp_path / "refer_seg/refcoco/instances.json", instances)
    (tmp_path / "refer_seg/refcoco/refs(unc).p").write_bytes(pickle.dumps(refs))
    queries = get_eval_dataset("refcoco|unc|val", tmp_path)[0].queries
    stated = [annotation["area"] for annotation in instances["annotations"]]
    assert [int(query.masks[0].sum()) for query in queries] == pytest.approx(stated, rel=0.01)
