"""Hostile annotation files take bounded time and memory, and nothing is dropped without a count."""

from __future__ import annotations

import pickle
import resource
from pathlib import Path

import pytest
from disk import H, W, write_image
from small_data_sets import write_data_sets

from utils.datasets import DataError, get_train_dataset
from utils.datasets.base import check_file_name
from utils.datasets.masks import check_polygon, decode_segmentation
from utils.datasets.safe_pickle import read_pickle


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_data_sets(root)
    return root


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
