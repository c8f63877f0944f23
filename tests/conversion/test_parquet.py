"""ReasonSeg and RefCOCO in parquet files, and data sets of the hub; a stand-in for pyarrow, which is not installed."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from loopback_hub import lay_out
from PIL import Image

from scripts import convert_data
from utils.datasets import DataError, DataOptions, get_eval_dataset, get_train_dataset
from utils.inference import cli
from utils.training.data_content import source_of

COMMIT = "d" * 40


@pytest.fixture
def tables(monkeypatch):
    """Path -> rows, which the stand-in reads as pyarrow does."""
    tables: dict[str, list[dict]] = {}

    class ParquetFile:
        def __init__(self, path):
            if Path(path).name not in tables:
                raise pyarrow.ArrowException("Parquet magic bytes not found in footer")
            self.rows = tables[Path(path).name]
            self.schema_arrow = SimpleNamespace(names=[*self.rows[0], "ann_id"])

        def iter_batches(self, batch_size, columns):
            for start in range(0, len(self.rows), batch_size):
                rows = [{name: row[name] for name in columns} for row in self.rows[start : start + batch_size]]
                yield SimpleNamespace(to_pylist=lambda rows=rows: rows)

    pyarrow, module = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    pyarrow.ArrowException = type("ArrowException", (Exception,), {})
    module.ParquetFile = ParquetFile
    pyarrow.parquet = module
    monkeypatch.setitem(sys.modules, "pyarrow", pyarrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)
    return tables


def photo(grey: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (30, 20), (grey, grey, 90)).save(file, kind)
    return file.getvalue()


def row(text: str, image_id: str = "7", grey: int = 10, left: int = 5, **changed) -> dict:
    mask = np.zeros((20, 30), dtype=bool)
    mask[4:9, left : left + 6] = True
    image = {"bytes": photo(grey), "path": None}
    return {"image": image, "text": text, "mask": mask.tolist(), "image_id": image_id, "img_height": 20,
            "img_width": 30} | changed  # fmt: skip


def convert(capsys, *arguments: object, code: int = 0) -> str:
    assert cli.run(convert_data.main, ["parquet", *map(str, arguments), "--pictures", "0"]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_rows_become_queries(tables, tmp_path, capsys):
    folder, output = tmp_path / "data", tmp_path / "own.jsonl"
    folder.mkdir()
    for name in ("test-00000-of-00001.parquet", "validation-00000-of-00001.parquet"):
        (folder / name).touch()
    tables["test-00000-of-00001.parquet"] = [
        row("What holds the tea?"),
        row("the Left-hand mug", left=15),
        row("the Left-hand mug", left=22),
        row("a cup", image_id="7", grey=99),  # another image of this name
        row("nothing", mask=np.zeros((20, 30), dtype=bool).tolist()),
        row("short", mask=[[True]]),
        row("elsewhere", image={"bytes": None, "path": "a.jpg"}),
        row(" "),
    ]
    tables["validation-00000-of-00001.parquet"] = [row("a png", image_id="a/b", image={"bytes": photo(50, "PNG")})]
    printed = convert(capsys, folder, "--output", output, "--split")
    assert re.search(r"left out: 3 x row that cannot be used: .*row 5: its mask is 1x1; the row says 30x20", printed)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["image"], line["query"], len(line["masks"]), line["split"]) for line in lines] == [
        ("own_images/7.jpg", "What holds the tea?", 1, "test"),
        ("own_images/7.jpg", "the Left-hand mug", 2, "test"),
        (lines[2]["image"], "a cup", 1, "test"),
        ("own_images/a_b.png", "a png", 1, "val"),
    ]
    assert re.fullmatch(r"own_images/7_\w{8}\.jpg", lines[2]["image"])
    assert (tmp_path / "own_images/7.jpg").read_bytes() == photo(10)  # as it was published
    dataset = get_eval_dataset(f"custom|{output}|test", tmp_path)
    [truth] = dataset[0].queries[0].masks
    assert np.array_equal(truth, np.array(row("")["mask"]))


def test_what_cannot_be_read(tables, tmp_path, capsys):
    output = tmp_path / "own.jsonl"
    assert "holds no .parquet file" in convert(capsys, tmp_path, "--output", output, code=2)
    file = tmp_path / "broken.parquet"
    file.touch()
    printed = convert(capsys, tmp_path, "--output", output, code=2)
    assert "broken.parquet cannot be read (Parquet magic bytes not found in footer); is it complete?" in printed
    tables["broken.parquet"] = [{"image": {}, "samples": []}]
    printed = convert(capsys, file, "--output", output, code=2)
    assert "has no column text, mask (its columns: image); expected are image, text, mask, image_id" in printed
    assert not output.exists()


def test_without_pyarrow_the_message_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "test.parquet").touch()
    printed = convert(capsys, tmp_path, "--output", tmp_path / "own.jsonl", code=2)
    assert "test.parquet is a parquet file, which pyarrow reads: pip install pyarrow" in printed


def test_a_data_set_of_the_hub_trains_and_evaluates(hub_cache, tmp_path):
    line = {"image": "photos/1.jpg", "query": "the mug", "masks": [[[2, 2], [9, 2], [9, 9]]]}
    files = {"own.jsonl": json.dumps(line).encode(), "photos/1.jpg": photo(1)}
    lay_out(hub_cache, "org/mugs", files, COMMIT, kind="datasets")
    train = get_train_dataset("custom|hub:org/mugs", tmp_path, DataOptions())
    assert train.sample(0, np.random.default_rng(0)).masks.any()
    assert source_of(train) == {"source": f"org/mugs@{COMMIT}:own.jsonl"}
    assert len(get_eval_dataset("custom|hub:org/mugs:own.jsonl|train", tmp_path)) == 1
    lay_out(hub_cache, "org/mugs", {"more.jsonl": b"{}"}, COMMIT, kind="datasets")
    with pytest.raises(DataError, match=r"has 2 JSONL files \(more.jsonl, own.jsonl\); name one: hub:org/mugs:FILE"):
        get_eval_dataset("custom|hub:org/mugs", tmp_path)
    with pytest.raises(DataError, match=r"--custom_data hub:org/mugs:no.jsonl: the repository has no such file"):
        get_eval_dataset("custom|hub:org/mugs:no.jsonl", tmp_path)
    with pytest.raises(DataError, match=r"--custom_data hub:org/cups: is no path here, and the cache"):
        get_eval_dataset("custom|hub:org/cups", tmp_path)
    lay_out(hub_cache, "org/reason", {"data/test-0.parquet": b""}, COMMIT, kind="datasets")
    with pytest.raises(DataError, match=r"has no JSONL file; python scripts/convert_data.py parquet hub:org/reason"):
        get_eval_dataset("custom|hub:org/reason", tmp_path)


def test_parquet_files_of_the_hub_are_converted(tables, hub_cache, tmp_path, capsys):
    lay_out(hub_cache, "org/reason", {"data/test-0.parquet": b""}, COMMIT, kind="datasets")
    tables["test-0.parquet"] = [row("What holds the tea?")]
    convert(capsys, "hub:org/reason", "--output", tmp_path / "own.jsonl")
    assert len(get_eval_dataset(f"custom|{tmp_path / 'own.jsonl'}", tmp_path)) == 1
