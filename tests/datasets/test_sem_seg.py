"""sem_seg: label images and COCO-style parts, on small files in the real layouts (docs/data.md)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from disk import H, W, box, write_image, write_json
from PIL import Image

from model.structures import Sample
from utils.datasets import DataError, DataOptions, get_train_dataset
from utils.datasets.class_names import ADE20K, COCO_STUFF, COCO_STUFF_NOT_DENIED
from utils.datasets.sem_seg import BUILTIN_LABELS, phrase, unrelated
from utils.datasets.templates import QUESTIONS

LABELS = {
    "ade20k": "ade20k/annotations/training",
    "cocostuff": "cocostuff/train2017",
    "mapillary": "mapillary/training/v2.0/labels",
}
PACO, PASCAL = "vlpart/paco/annotations/paco_lvis_v1_train.json", "vlpart/pascal_part/train.json"


def write_labels(path: Path, *values: int, height: int = H, palette: bool = False) -> None:
    """An index image with a vertical stripe per value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = np.array(values, np.uint8)[np.arange(W) * len(values) // W]
    image = Image.fromarray(np.repeat(columns[None], height, axis=0))
    if palette:
        image.putpalette(list(range(256)) * 3)
    image.save(path)


def annotation(number: int, category: int, segmentation: object, image: int = 1) -> dict:
    return {"id": number, "image_id": image, "category_id": category, "segmentation": segmentation}


def write_parts(root: Path) -> None:
    size = {"height": H, "width": W}
    whole = {"size": [H, W], "counts": [H * 50, H * 5, H * 5]}
    categories = ["dog", "dog:ear", "mouse_(computer_equipment):left_button", "traffic_light", "dog:tail", "cup"]
    write_json(
        root / PACO,
        {
            "images": [{"id": 1, "file_name": "train2017/1.jpg", "neg_category_ids": [4, 5], **size}],
            "annotations": [
                annotation(10, 1, [box(2, 2, 30)]),
                annotation(11, 2, [box(5, 5, 4)]),
                annotation(12, 2, [box(20, 20, 4)]),
                annotation(13, 3, whole),
            ],
            "categories": [{"id": i, "name": name} for i, name in enumerate(categories, start=1)],
        },
    )
    write_image(root / "refer_seg/images/mscoco/images/train2017/1.jpg")
    write_json(
        root / PASCAL,
        {
            "images": [{"id": 1, "file_name": "2008_000008.jpg", **size}],
            "annotations": [annotation(10, 1, [box(2, 2)])],
            "categories": [{"id": 1, "name": "horse:muzzle"}, {"id": 2, "name": "person:left_foot"}],
        },
    )
    write_image(root / "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages/2008_000008.jpg")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_labels(tmp_path / LABELS["ade20k"] / "a.png", 0, 1, 5)  # nothing, wall, tree
    write_image(tmp_path / "ade20k/images/training/a.jpg")
    # cat, wall-brick, potted plant, unlabeled
    write_labels(tmp_path / LABELS["cocostuff"] / "000000000001.png", 16, 170, 63, 255)
    write_image(tmp_path / "refer_seg/images/mscoco/images/train2017/000000000001.jpg")
    write_labels(tmp_path / LABELS["mapillary"] / "m.png", 1, 2, palette=True)
    write_image(tmp_path / "mapillary/training/images/m.jpg")
    rows = [{"readable": "Bird"}, {"readable": "Guard Rail", "evaluate": True}, {"readable": "Out", "evaluate": False}]
    write_json(tmp_path / "mapillary/config_v2.0.json", {"labels": rows})
    write_parts(tmp_path)
    return tmp_path


def samples_of(root: Path, name: str, number: int = 60, **options: float) -> list[Sample]:
    dataset = get_train_dataset(name, root, DataOptions(**{"questions_per_image": 9, **options}))
    return [dataset.sample(i % len(dataset), np.random.default_rng(i)) for i in range(number)]


def queried(sample: Sample, *names: str) -> list[str]:
    """For each question, the name among ``names`` that it contains."""
    return [next(name for name in names if name in turn.question) for (turn,) in sample.conversations]


def test_class_lists() -> None:
    assert (len(ADE20K), len(set(ADE20K)), len(COCO_STUFF), len(set(COCO_STUFF))) == (150, 150, 182, 182)
    known = {1: "wall", 45: "chest of drawers", 90: "television", 110: "swimming pool", 139: "ashcan", 150: "flag"}
    assert {number: ADE20K[number - 1] for number in known} == known
    known = {1: "person", 17: "cat", 91: "hair brush", 92: "banner", 93: "blanket", 178: "water-other", 182: "wood"}
    known[157] = "sky"  # "sky-other" in labels.txt; cocostuff_classes.txt of LISA, GSVA, PixelLM, SESAME has "sky"
    assert "sky" not in BUILTIN_LABELS["cocostuff"].not_asked
    assert {number: COCO_STUFF[number - 1] for number in known} == known
    assert set(COCO_STUFF) > COCO_STUFF_NOT_DENIED


@pytest.mark.parametrize(
    ("name", "classes", "ignored"),
    [
        ("ade20k", {"wall": (20, 40), "tree": (40, 60)}, slice(0, 20)),
        ("cocostuff", {"cat": (0, 15), "potted plant": (30, 45)}, slice(45, 60)),
        ("mapillary", {"guard rail": (0, 30)}, slice(30, 60)),
    ],
)
def test_label_images(root: Path, name: str, classes: dict[str, tuple[int, int]], ignored: slice) -> None:
    assert get_train_dataset(name, root).describe() == {"images": 1, "unusable": 0}
    for sample in samples_of(root, name, 5):
        names = queried(sample, *classes)
        assert sorted(names) == sorted(classes)
        for found, mask in zip(names, sample.masks):
            expected = np.zeros((H, W), np.uint8)
            expected[:, slice(*classes[found])] = 1
            expected[:, ignored] = 255
            np.testing.assert_array_equal(mask, expected)
    assert len(samples_of(root, name, 1, questions_per_image=1)[0].masks) == 1


def test_parts(root: Path) -> None:
    counts = {"images": 1, "masks": 4, "unusable": 0}
    assert get_train_dataset("paco_lvis", root).describe() == counts
    pixels = {
        "dog ear": [(7, 7), (22, 22)],  # every ear of every dog
        "the ear of the dog": [(7, 7), (22, 22)],
        "mouse left button": [(3, 52)],
        "the left button of the mouse": [(3, 52)],
        "dog": [(3, 3), (30, 30)],
    }
    present = set()
    for sample in samples_of(root, "paco_lvis"):
        names = queried(sample, *pixels)
        assert len(names) == len(sample.masks) == 3
        present.update(names)
        assert all(mask[pixel] == 1 for name, mask in zip(names, sample.masks) for pixel in pixels[name])
        assert all(mask.sum() == 32 for name, mask in zip(names, sample.masks) if "ear" in name)
    assert present == set(pixels)
    for sample in samples_of(root, "pascal_part", 4):
        assert queried(sample, "horse muzzle", "the muzzle of the horse")


def test_classes_that_are_not_there(root: Path) -> None:
    samples = samples_of(root, "cocostuff", 200, negative_sampling_weight=0.5)
    turns = [turn for sample in samples for (turn,) in sample.conversations]
    denials = [turn for turn in turns if "[REJ]" in turn.answer]
    corrections = [turn for turn in denials if "cat" in turn.answer or "potted plant" in turn.answer]
    assert len(turns) == 400
    assert 160 < len(denials) < 240
    assert 0.35 < len(corrections) / len(denials) < 0.65
    for turn in denials:
        subjects = [
            name for name in COCO_STUFF if turn.question in {q.replace("{query}", name) for q in QUESTIONS["phrase"]}
        ]
        assert len(subjects) == 1
        assert not {"cat", "plant", "wall", "brick", "potted"} & set(subjects[0].replace("-", " ").split())
        assert subjects[0] not in COCO_STUFF_NOT_DENIED
        assert "-" not in subjects[0]
    assert not any("[REJ]" in t.answer for s in samples_of(root, "cocostuff") for (t,) in s.conversations)


def test_only_what_was_looked_for_is_denied(root: Path) -> None:
    """PACO lists categories verified to be absent; the dog's tail is one, but shares a word with a present class."""
    samples = samples_of(root, "paco_lvis", 30, negative_sampling_weight=1.0)
    assert all(set(queried(sample, "traffic light")) == {"traffic light"} for sample in samples)
    content = json.loads((root / PACO).read_text())
    content["images"][0]["neg_category_ids"] = []
    write_json(root / PACO, content)
    assert all(len(sample.masks) == 3 for sample in samples_of(root, "paco_lvis", 5, negative_sampling_weight=1.0))
    samples = samples_of(
        root, "pascal_part", 30, negative_sampling_weight=1.0
    )  # without such a list all categories count
    answers = {turn.answer for sample in samples for (turn,) in sample.conversations}
    assert any("the muzzle of the horse" in answer for answer in answers)
    assert all("foot" in answer for answer in answers)


def test_phrases_and_unrelated_classes() -> None:
    rng = np.random.default_rng(0)
    assert {phrase("dog:ear", rng) for _ in range(20)} == {"dog ear", "the ear of the dog"}
    assert phrase("traffic light", rng) == "traffic light"
    assert unrelated(["table", "cat", "wall"], ["dining table", "wall-brick"]) == ["cat"]


def test_both_homes_of_coco_and_images_without_a_partner(root: Path) -> None:
    write_labels(root / LABELS["cocostuff"] / "000000000002.png", 16)
    assert get_train_dataset("cocostuff", root).describe() == {"images": 1, "unusable": 1}
    write_image(root / "coco/train2017/000000000002.jpg")
    assert get_train_dataset("cocostuff", root).describe() == {"images": 2, "unusable": 0}
    assert {sample.source for sample in samples_of(root, "cocostuff", 2)} == {
        f"cocostuff/00000000000{i}.jpg" for i in (1, 2)
    }


# -- bad input ---------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def as_rgb(path: Path) -> None:
    Image.new("RGB", (W, H)).save(path)


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (cut, r"label image .*\.png cannot be decoded"),
        (lambda path: path.write_bytes(b""), r"label image .*\.png cannot be decoded"),
        (as_rgb, "has mode RGB; expected one 8-bit index per pixel"),
        (lambda path: write_labels(path, 1, 2, height=H + 1), "the image is 60x40 but its annotation says 60x41"),
        (lambda path: write_labels(path, 1, 200), r"\.png has the values \[200\], which are not classes of"),
        (lambda path: write_labels(path, 0 if "ade20k" in str(path) else 255), "it has no class to ask about"),
    ],
)
def test_bad_label_images_are_named(root: Path, name: str, corrupt: Callable[[Path], None], message: str) -> None:
    (path,) = (root / LABELS[name]).iterdir()
    corrupt(path)
    with pytest.raises(DataError, match=message):
        samples_of(root, name, 1)


@pytest.mark.parametrize(
    ("name", "gone", "message"),
    [
        ("ade20k", "ade20k/annotations/training", r"no label images \(looked in .*ade20k/annotations/training\)"),
        ("ade20k", "ade20k/images", r"no images \(looked in .*ade20k/images/training\)"),
        ("ade20k", "ade20k/images/training/a.jpg", r"a\.png has no image of the same name \(looked in .*training\)"),
        ("ade20k", "ade20k/annotations/training/a.png", r"nothing usable in .*a\.jpg has no label image in"),
        ("cocostuff", "refer_seg", "no images .*refer_seg/images/mscoco/images/train2017.*coco/train2017"),
        ("mapillary", "mapillary/config_v2.0.json", r"no list of classes \(looked in .*config_v2\.0\.json\)"),
        ("paco_lvis", PACO, r"no annotations \(looked in .*paco_lvis_v1_train\.json\)"),
        (
            "paco_lvis",
            "refer_seg/images/mscoco/images/train2017/1.jpg",
            r"no image train2017/1\.jpg \(looked in .*mscoco.*coco/train2017/1\.jpg\)",
        ),
        ("pascal_part", "vlpart/pascal_part/VOCdevkit", r"no image 2008_000008\.jpg"),
    ],
)
def test_what_is_missing_is_named(root: Path, name: str, gone: str, message: str) -> None:
    path = root / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataError, match=message):
        get_train_dataset(name, root)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "holds a list"),
        (b"{}", "'labels' must be a list"),
        (b'{"labels": []}', "'labels' must be a list"),
        (b'{"labels": [{"name": "bird"}]}', "with a string in 'readable'"),
        (b'{"labels": [{"readable": 3}]}', "with a string in 'readable'"),
        (json.dumps({"labels": [{"readable": "x"}] * 256}).encode(), "at most 255"),
    ],
)
def test_bad_lists_of_classes_are_named(root: Path, raw: bytes, message: str) -> None:
    (root / "mapillary/config_v2.0.json").write_bytes(raw)
    with pytest.raises(DataError, match=message):
        get_train_dataset("mapillary", root)


def test_text_encodings_of_the_list_of_classes(root: Path) -> None:
    text = '{"labels": [\r\n{"readable": "x"}, {"readable": "Café"}, {"readable": "y", "evaluate": false}]}\r\n'
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (root / "mapillary/config_v2.0.json").write_bytes(text.encode(encoding))
        assert queried(samples_of(root, "mapillary", 1)[0], "café")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 7}, r"annotation 10: image 7 is not in .*train\.json"),
        ({"image_id": None}, "image None is not in"),
        ({"category_id": 9}, "category 9 is not in"),
        ({"category_id": [1]}, r"category \[1\] is not in"),
        ({"segmentation": []}, "annotation 10 has no segmentation"),
        ({"segmentation": None}, "annotation 10 has no segmentation"),
        ({"segmentation": [[1, 1]]}, "annotation 10: a segmentation decodes to an empty mask"),
        ({"segmentation": [[1, 1, 5, 5]]}, "annotation 10: a segmentation decodes to an empty mask"),
        ({"segmentation": [[1, 1, 5]]}, "annotation 10: .*not pairs of numbers"),
        ({"segmentation": "polygon"}, "annotation 10: a segmentation is neither"),
        ({"segmentation": [[1, 1, 9, 1, float("nan"), 9]]}, "annotation 10: .*NaN"),
        ({"segmentation": [[1, 1, 9, 1, 1e9, 9]]}, "annotation 10: .*far outside"),
        ({"segmentation": [[-1e9, 1, 9, 1, 9, 9]]}, "annotation 10: .*far outside"),
        ({"segmentation": {"size": [H, W + 1], "counts": [H * W]}}, "annotation 10: an RLE has size"),
        ({"segmentation": {"size": [H, W], "counts": [5, 5]}}, "annotation 10: an RLE covers 10 pixels"),
    ],
)
def test_bad_annotations_are_named(root: Path, change: dict, message: str) -> None:
    content = json.loads((root / PASCAL).read_text())
    content["annotations"][0] |= change
    write_json(root / PASCAL, content)
    with pytest.raises(DataError, match=message):
        samples_of(root, "pascal_part", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "no list 'images'"),
        ({"annotations": {}}, "no list 'annotations'"),
        ({"annotations": []}, "it has no annotations"),
        ({"categories": [{"name": "x"}]}, "no list 'categories' of dicts with an 'id'"),
        ({"categories": [{"id": 1}]}, "category 1 has name None"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "1 ids in 'categories' stand for different"),
        (
            {"categories": [{"id": 1, "name": "a:b:c"}]},
            "category 1 has name 'a:b:c'; expected 'object' or 'object:part'",
        ),
        ({"categories": [{"id": 1, "name": "_(x):ear"}]}, "category 1 has name"),
        ({"images": [{"id": 1, "file_name": "../a.jpg", "height": H, "width": W}]}, "image 1 has file_name '../a.jpg'"),
        ({"images": [{"id": 1, "file_name": "/a.jpg", "height": H, "width": W}]}, "not a file name within its folder"),
        ({"images": [{"id": 1, "file_name": "a.jpg", "height": -1, "width": W}]}, "height -1"),
        (
            {"images": [{"id": 1, "file_name": "a.jpg", "height": 10**9, "width": W}]},
            "too large for a photograph",
        ),
        (
            {"images": [{"id": 1, "file_name": "2008_000008.jpg", "height": H, "width": W + 1}]},
            "the image is 60x40 but its annotation says 61x40",
        ),
    ],
)
def test_bad_annotation_files_are_named(root: Path, change: dict, message: str) -> None:
    write_json(root / PASCAL, {**json.loads((root / PASCAL).read_text()), **change})
    with pytest.raises(DataError, match=message):
        samples_of(root, "pascal_part", 1)


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_ids_that_are_there_twice(root: Path, key: str) -> None:
    content = json.loads((root / PASCAL).read_text())
    masks = get_train_dataset("pascal_part", root).describe()
    content[key].append(dict(content[key][0]))
    write_json(root / PASCAL, content)
    assert get_train_dataset("pascal_part", root).describe() == masks  # the same row twice counts once
    content[key][-1] |= {"note": "another"}
    write_json(root / PASCAL, content)
    with pytest.raises(DataError, match=rf"train\.json: 1 ids in '{key}' stand for different rows, such as "):
        get_train_dataset("pascal_part", root)


def test_one_bad_annotation_costs_no_other(root: Path) -> None:
    content = json.loads((root / PACO).read_text())
    content["annotations"][0]["category_id"] = 99
    write_json(root / PACO, content)
    assert get_train_dataset("paco_lvis", root).describe() == {"images": 1, "masks": 3, "unusable": 1}
    (root / PACO).write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        get_train_dataset("paco_lvis", root)
    with pytest.raises(DataError, match="'ade20k' has no splits"):
        get_train_dataset("ade20k|train", root)
