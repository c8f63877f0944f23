"""Damaged and hostile annotation files: a valid read, or a ``DataError`` that names a file; bounded time and memory."""

from __future__ import annotations

import json
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disk import H, W, box, square, write_image, write_json
from PIL import Image

from utils.datasets import DataError, DataOptions, get_eval_dataset, get_train_dataset
from utils.datasets.base import check_file_name
from utils.datasets.masks import check_polygon, decode_segmentation
from utils.datasets.safe_pickle import read_pickle

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
ODD = (
    None, True, -1, 0, 10**30, 1e308, float("inf"), float("nan"), "", " ", "x" * 300, "é" * 200, "\ud800", "a\0b",
    "../a.jpg", [], {}, [[]], [[[1]]], [None], {"counts": "x", "size": [H, W]}, {"counts": "o" * 3000, "size": [H, W]},
    [10**400] * 6, "7",
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
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
    return root


def read_all(name: str, root: Path) -> None:
    """Opens a data set, and reads all its samples twice."""
    dataset = get_train_dataset(name, root, DataOptions(questions_per_image=3))
    for index in range(2 * len(dataset)):
        dataset.sample(index % len(dataset), np.random.default_rng(index))
    if name.startswith(("refc", "grefcoco", "R-")):
        split = get_eval_dataset(f"{name}|val", root, allow_missing=True)
        for index in range(len(split)):
            assert json.dumps([query.text for query in split[index].queries], ensure_ascii=False).encode()


def flipped(raw: bytes, rng: np.random.Generator) -> bytes:
    """Bits flipped, a part cut out or repeated, or the end cut off."""
    damaged = bytearray(raw)
    kind, start = rng.integers(4), int(rng.integers(len(raw)))
    part = slice(start, start + int(rng.integers(1, 12)))
    if kind == 0:
        for _ in range(int(rng.integers(1, 4))):
            damaged[int(rng.integers(len(raw)))] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del damaged[part]
    elif kind == 2:
        damaged[start:start] = damaged[part]
    else:
        del damaged[start:]
    return bytes(damaged)


def swapped(raw: bytes, rng: np.random.Generator) -> bytes:
    """A value of the JSON is replaced by an odd one, or is gone."""
    content = json.loads(raw)
    holder = [content]
    node: Any = holder
    key: Any = 0
    while True:
        child = node[key]
        if not isinstance(child, (list, dict)) or not child or rng.random() < 0.2:
            break
        node, keys = child, list(child) if isinstance(child, dict) else range(len(child))
        key = keys[int(rng.integers(len(keys)))]
    if isinstance(node, dict) and rng.random() < 0.2:
        del node[key]
    else:
        node[key] = ODD[int(rng.integers(len(ODD)))]
    return json.dumps(holder[0]).encode()


def check_damage(
    name: str, path: Path, root: Path, damage: Callable[[bytes, np.random.Generator], bytes], tries: int
) -> int:
    """Reads the file with ``tries`` seeded damages; returns how many were noticed."""
    raw, noticed = path.read_bytes(), 0
    files = {file.name for file in root.rglob("*") if file.is_file()}
    try:
        for seed in range(tries):
            path.write_bytes(damage(raw, np.random.default_rng(seed)))
            try:
                read_all(name, root)
            except DataError as error:
                noticed += 1
                if not any(file in str(error) for file in (*files, "no image ")):  # "no image X (looked in ...)"
                    pytest.fail(f"{name}, seed {seed}: no file is named: {error}")
            except Exception as error:
                pytest.fail(f"{name}, seed {seed}: {error!r}")
    finally:
        path.write_bytes(raw)
    read_all(name, root)
    return noticed


@pytest.mark.parametrize("damage", [flipped, swapped])
@pytest.mark.parametrize("name", JSON_FILES)
def test_damaged_json(root: Path, name: str, damage: Callable) -> None:
    assert check_damage(name, root / JSON_FILES[name][0], root, damage, 40) > 4


def test_damaged_pickles(root: Path) -> None:
    assert check_damage("refclef", root / "refer_seg/refclef/refs(unc).p", root, flipped, 150) > 60


def test_damaged_label_images_and_photographs(root: Path) -> None:
    for file in ("v2.0/labels/a.png", "images/a.jpg"):
        assert check_damage("mapillary", root / "mapillary/training" / file, root, flipped, 60) > 10


# -- hostile files -----------------------------------------------------------------------------------------------------


def shared(depth: int) -> list:
    value: list = [1]
    for _ in range(depth):
        value = [value] * 10
    return value


def holds_itself() -> list:
    value: list = []
    value += [value, value]
    return value


PAIRS = b"2\x86" * 60  # a tuple that holds the last one twice, 60 times: 2^60 items


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (pickle.dumps(shared(9)), r"is rejected: it stands for more than 64 times its size"),
        (pickle.dumps(holds_itself()), "is not a readable pickle .*recursion"),
        (pickle.dumps(["x" * 10_000] * 10_000), "stands for more than 64 times its size"),
        (b"\x80\x02]r\xff\xff\xff\xff.", "nothing"),  # CPython's C code would allocate 64 GB for this memo
        (b"\x80\x04\x8f()" + PAIRS + b"\x90.", "stands for more than 64 times its size"),  # a set
        (b"\x80\x04()" + PAIRS + b"\x91.", "stands for more than 64 times its size"),  # a frozenset
        (b"\x80\x04})" + PAIRS + b"Ns.", "a key of a dict is neither a number nor a string"),
        (b"\x80\x04}()" + PAIRS + b"Nu.", "a key of a dict is neither a number nor a string"),
        (b"\x80\x04()" + PAIRS + b"Nd.", "a key of a dict is neither a number nor a string"),
        (b"\x80\x04cbuiltins\nset\n(])" + PAIRS + b"atR.", "stands for more than 64 times its size"),
        (b"\x80\x04ccollections\nOrderedDict\n(](]()" + PAIRS + b"NeetR.", "neither a number nor a string"),
        (b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".", "is rejected: it contains a bytearray"),
        (pickle.dumps([10**5000]), "contains an integer of more than 64 bits"),
    ],
)
def test_hostile_pickles_take_little_time_and_memory(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "x.p"
    path.write_bytes(raw)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if message == "nothing":
        assert read_pickle(path) == []
    else:
        with pytest.raises(DataError, match=rf"x\.p .*{message}"):
            read_pickle(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


def test_what_is_shared_is_read(tmp_path: Path) -> None:
    tokens = ["the", "red", "cup"]
    value = [{"tokens": tokens, "split": "train", "n": k} for k in range(200)]
    (tmp_path / "x.p").write_bytes(pickle.dumps(value))
    assert read_pickle(tmp_path / "x.p") == value


@pytest.mark.parametrize("value", [[10**400] * 6, [[1, 2], [3, 10**400], [5, 6]]])
def test_numbers_out_of_range(value: list) -> None:
    with pytest.raises(DataError, match="not a list of numbers"):
        check_polygon(value, H, W)


def test_a_run_length_that_never_ends() -> None:
    with pytest.raises(DataError, match="a number beyond any image"):
        decode_segmentation({"size": [H, W], "counts": "o" * 10**6}, H, W)


@pytest.mark.parametrize("name", ["é" * 200, "\ud800.jpg", " ", "a\0.jpg", "x" * 256])
def test_names_that_no_file_system_takes(name: str) -> None:
    with pytest.raises(DataError, match=r"'image' is .*, which is not a file name"):
        check_file_name(name, "'image' is")


# -- nothing is dropped without a count --------------------------------------------------------------------------------


def test_files_that_a_mac_adds_are_passed_over(root: Path) -> None:
    hidden = [
        root / "reason_seg/ReasonSeg/train/._a.json",
        root / "reason_seg/ReasonSeg/train/._a.jpg",
        root / "mapillary/training/v2.0/labels/._a.png",
        root / "mapillary/training/images/._a.jpg",
    ]
    try:
        for path in hidden:
            path.write_bytes(b"\0\5\26\7")
        for name in ("ReasonSeg", "mapillary"):
            counts = get_train_dataset(name, root).describe()
            assert (counts["images"], counts["unusable"]) == (1, 0)
    finally:
        for path in hidden:
            path.unlink()


def test_photographs_without_a_label_image_are_counted(root: Path) -> None:
    extra = root / "mapillary/training/images/b.jpg"
    write_image(extra)
    try:
        dataset = get_train_dataset("mapillary", root)
        assert dataset.describe() == {"images": 1, "unusable": 1}
        assert "b.jpg has no label image in" in dataset.reader.problems[0]  # type: ignore[attr-defined]
    finally:
        extra.unlink()
