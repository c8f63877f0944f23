"""Packed records, and the cache of annotation indexes."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from disk import box, write_image, write_json

from utils.datasets import (
    get_train_dataset,
    multi_reason_seg,
    reason_seg_plus,
    records,
    refer_api,
    sem_seg,
    vqa,
)
from utils.datasets.base import DataError
from utils.datasets.records import MappedRecords, PackedRecords, load_records

RECORDS = [{"a": [1, 2.5, "é"]}, [], {"b": "x" * 100}]
NOTES = {"problems": ["one"], "counts": {"images": 3}}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, for files of any size."""
    monkeypatch.setenv(records.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(records, "MIN_CACHED_BYTES", 0)
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "annotations.json"
    path.write_text("content")
    return settled(path)


def settled(path: Path) -> Path:
    """Sets an old modification time."""
    os.utime(path, (time.time() - 100,) * 2)
    return path


def load(source: Path, settings: object = None, built: list | None = None) -> tuple[PackedRecords, dict]:
    """Loads the records of a source; ``built`` grows by one per build."""

    def build() -> tuple[list, dict]:
        (built if built is not None else []).append(1)
        return [*RECORDS, source.read_text()], NOTES

    return load_records("set|train", [source], settings, build)


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.suffix != ".lock") if cache.is_dir() else []


def test_packed_records() -> None:
    content = [{"a": [1, 2.5, "é"]}, [], {"b": b"abc", "c": np.int32(4)}]
    packed = PackedRecords(content)
    assert list(packed) == [content[0], [], {"b": "abc", "c": 4}]
    assert len(PackedRecords([])) == 0
    long = [{"segmentation": [list(range(size))], "text": "x é"} for size in (1, 100, 1000)]
    assert list(PackedRecords(long)) == long, "whether deflated or not"
    with pytest.raises(IndexError):
        packed[3]
    with pytest.raises(DataError, match="contains a set"):
        PackedRecords([{"a": {1, 2}}])


def test_a_second_start_reads_the_cache(cache: Path, source: Path) -> None:
    built: list = []
    for _ in range(3):
        loaded, notes = load(source, built=built)
        assert isinstance(loaded, MappedRecords)
        assert list(loaded) == [*RECORDS, "content"]
        assert notes == NOTES
    assert len(built) == len(entries(cache)) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda source, patch: settled(source.write_text("longer content") and source),
        lambda source, patch: settled(source.write_text("CONTENT") and source),  # of the same size
        lambda source, patch: os.utime(source, (1e9, 1e9)),
        lambda source, patch: patch.setattr(records, "_source_hash", lambda: "another version"),
    ],
)
def test_what_is_out_of_date_is_read_again(
    change: Callable, cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(source)
    change(source, monkeypatch)
    for expected in (1, 0):
        built: list = []
        assert load(source, built=built)[0][3] == source.read_text()
        assert len(built) == expected
    assert len(entries(cache)) == 1, "the old entry is replaced"


def test_a_file_that_takes_anothers_place_is_noticed(cache: Path, source: Path) -> None:
    """Same size and modification time; only the change time differs."""
    load(source)
    other = source.with_name("other")
    other.write_text("CONTENT")
    stat = source.stat()
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(source)
    assert load(source)[0][3] == "CONTENT"


def test_settings_and_names_have_entries_of_their_own(cache: Path, source: Path) -> None:
    for settings in ({"split": "train"}, {"split": "val"}, ("a", 1)):
        for expected in (1, 0):
            built: list = []
            load(source, settings, built)
            assert len(built) == expected, settings
    assert len(entries(cache)) == 3


def _edit(position: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda raw: raw[: position % len(raw)] + value + raw[position % len(raw) + len(value) :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:3],
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-1],
        lambda raw: raw + b"x",
        lambda raw: b"something else entirely, of some length",
        _edit(0, b"UGROUND0"),
        _edit(8, b"\xff" * 8),
        _edit(8, b"\0" * 8),
        _edit(40, b"\0"),
        _edit(-30, b"?"),
        _edit(-1, b"?"),
    ],
)
def test_a_damaged_entry_is_built_again(damage: Callable, cache: Path, source: Path) -> None:
    load(source)
    (entry,) = entries(cache)
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert entry.read_bytes() != whole
    built: list = []
    assert list(load(source, built=built)[0]) == [*RECORDS, "content"]
    assert built
    assert entries(cache) == [entry]
    assert entry.read_bytes() == whole


def test_what_may_still_be_written_is_not_kept(cache: Path, source: Path) -> None:
    source.write_text("just now")
    assert load(source)[0][3] == "just now"
    assert not entries(cache)
    settled(source)

    def build() -> tuple[list, dict]:
        source.write_text("changed while it was read")
        settled(source)
        return RECORDS, NOTES

    assert list(load_records("set|train", [source], None, build)[0]) == RECORDS
    assert not entries(cache)


def test_a_failure_leaves_nothing(cache: Path, source: Path) -> None:
    def build() -> tuple[list, dict]:
        raise DataError("a record is broken")

    with pytest.raises(DataError, match="a record is broken"):
        load_records("set|train", [source], None, build)
    assert not entries(cache)
    assert list(load(source)[0]) == [*RECORDS, "content"]


def test_without_a_place_to_write(source: Path, cache: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setenv(records.CACHE_VARIABLE, str(source / "cache"))  # below a file
    with caplog.at_level(logging.WARNING):
        assert list(load(source)[0]) == [*RECORDS, "content"]
    assert "set UGROUND_CACHE to a writable folder, or to off" in caplog.text
    for setting, expected in (("off", False), ("", True)):
        monkeypatch.setenv(records.CACHE_VARIABLE, setting)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
        assert isinstance(load(source)[0], MappedRecords) is expected
    assert len(entries(tmp_path / "home/uground")) == 1


def test_small_files_are_not_kept(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MIN_CACHED_BYTES", source.stat().st_size + 1)
    load(source)
    assert not cache.exists()


def _load_in_process(source: Path, log: Path, results) -> None:
    def build() -> tuple[list, dict]:
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.3)
        return RECORDS, NOTES

    results.put(list(load_records("set|train", [source], None, build)[0]) == RECORDS)


def test_of_several_processes_one_builds(cache: Path, source: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # keeps what the fixtures have set
    results = context.Queue()
    arguments = (source, tmp_path / "log", results)
    processes = [context.Process(target=_load_in_process, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    assert all(results.get(timeout=30) for _ in processes)
    for process in processes:
        process.join()
    assert (tmp_path / "log").read_text() == "built\n"
    assert len(entries(cache)) == 1


def test_a_spawned_worker_maps_the_same_file(cache: Path, source: Path) -> None:
    loaded, _ = load(source)
    state = pickle.dumps(loaded)
    assert len(state) < 500, "the content does not travel"
    assert list(pickle.loads(state)) == list(loaded)
    settled(source.write_text("another content") and source)
    load(source)
    assert loaded[3] == "content", "what is mapped stays, although its entry was replaced"
    with pytest.raises(DataError, match="was replaced while the run started"):
        pickle.loads(state)


def _write_sets(root: Path) -> None:
    write_image(root / "coco/train2014/1.jpg")
    write_image(root / "coco/train2017/1.jpg")
    image = {"id": 1, "file_name": "1.jpg", "height": 40, "width": 60}
    annotations = [{"id": 5, "image_id": 1, "category_id": 2, "segmentation": [box(5, 5)]}]
    instances = {"images": [image], "annotations": annotations, "categories": [{"id": 2, "name": "cup:handle"}]}
    write_json(root / "refer_seg/refcoco/instances.json", instances)
    ref = {"ref_id": 1, "ann_id": 5, "image_id": 1, "split": "train", "sentences": [{"sent_id": 1, "sent": "a cup"}]}
    (root / "refer_seg/refcoco/refs(unc).p").write_bytes(pickle.dumps([ref, {**ref, "ann_id": 6}]))
    paco = {**instances, "images": [{**image, "file_name": "train2017/1.jpg"}]}
    write_json(root / "vlpart/paco/annotations/paco_lvis_v1_train.json", paco)
    turns = [{"from": "human", "value": "what? [SEG]"}, {"from": "gpt", "value": "a cup. [SEG]"}]
    write_json(root / "llava_dataset/llava_instruct_150k.json", [{"id": "1", "image": "1.jpg", "conversations": turns}])
    polygon = {"7": {"polygon": box(5, 5)}}
    item = {"image_path": "1.jpg", "English Question": "why?", "English Answer": "<7| cup>", "info": polygon}
    write_json(root / "reason_seg_plus/LISA_Plus_COT.json", [item, 3])
    target = {"segmentation": [box(2, 2)]}
    muse = {"coco_url": "train2017/1.jpg", "height": 40, "width": 60, "questions": ["q?"], "answers": [[target]]}
    write_json(root / "multi_reason_seg/MultiReasonSeg/MUSE_train.json", [muse, {**muse, "questions": []}])
    for path in root.rglob("*.*"):
        settled(path)


@pytest.mark.parametrize("name", ["refcoco", "paco_lvis", "llava_instruct_150k", "cot", "MultiReasonSeg"])
def test_every_reader_gives_the_same_from_the_cache(
    name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _write_sets(tmp_path)
    cold = get_train_dataset(name, tmp_path)
    log = caplog.text
    assert len(entries(cache)) == 1
    for module in (vqa, sem_seg, refer_api, reason_seg_plus, multi_reason_seg):
        for function in ("read_json", "read_pickle", "parse_items"):
            monkeypatch.setattr(module, function, None, raising=False)
    caplog.clear()
    warm = get_train_dataset(name, tmp_path)
    assert caplog.text == log, "records that cannot be used are named at every start"
    assert warm.describe() == cold.describe()
    first, second = (dataset.sample(0, np.random.default_rng(0)) for dataset in (cold, warm))
    assert first.conversations == second.conversations
    assert np.array_equal(first.masks, second.masks)
