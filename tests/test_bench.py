"""scripts/bench.py: what it measures is there, at a size that takes seconds."""

from __future__ import annotations

import queue
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts import bench, make_demo_data
from utils.datasets import get_train_dataset, records
from utils.datasets.records import SETTING, MappedRecords

ROOT = Path(__file__).resolve().parents[1]


def test_generated_files_are_what_the_readers_read(tmp_path: Path) -> None:
    bench.write_refs(tmp_path, refs=50, annotations=80, rng=np.random.default_rng(0))
    bench.write_parts(tmp_path, annotations=80, rng=np.random.default_rng(0))
    refs, parts = get_train_dataset("refcoco", tmp_path), get_train_dataset("paco_lvis", tmp_path)
    assert refs.describe() | {"expressions": 0} == {
        "images": 20,
        "expressions": 0,
        "absent": 0,
        "multi": 0,
        "unusable": 0,
    }
    assert 100 <= refs.describe()["expressions"] <= 150
    assert parts.describe() == {"images": 8, "masks": 80, "unusable": 0}
    index = refs.split.index
    assert index.mask(index.images[0], index.refs(index.images[0])[0]).sum() > 5000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_measure_says_seconds_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTING, "")  # restored afterwards
    monkeypatch.setattr(records, "SMALLEST", 0)
    monkeypatch.setattr(records, "SETTLED", 0)
    bench.write_refs(tmp_path, refs=1300, annotations=1300, rng=np.random.default_rng(0))
    found: queue.Queue = queue.Queue()
    for _ in range(2):
        bench.measure("refcoco", str(tmp_path), str(tmp_path / "cache"), 1, False, found)
    for seconds, peak, before, after in (found.get(), found.get()):
        assert seconds > 0
        assert bench.MB < after.private < after.resident <= peak + 50 * bench.MB
        assert after.private - before.private < 20 * bench.MB
    assert isinstance(get_train_dataset("refcoco", tmp_path).split.index.images, MappedRecords)


def test_loader_tells_where_the_time_goes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = str(tmp_path / "data")
    assert make_demo_data.main(["--out", data, "--train", "4", "--val", "1", "--test", "1"]) == 0
    capsys.readouterr()
    settings = ["--dataset_dir", data, "--dataset", "reason_seg||refer_seg", "--refer_seg_data", "refcoco"]
    sizes = ["--batches", "3", "--sam_side", "64", "--clip_side", "28", "--workers", "1"]
    assert bench.main(["loader", *sizes, *settings]) == 0
    printed = capsys.readouterr().out
    rows = dict(re.findall(r"^\| (.+?) +\| +([\d.,]+) \|", printed, re.MULTILINE))
    assert float(rows["0"]) > 0
    assert float(rows["1"]) > 0
    for stage in ("decode the photograph", "masks", "tokenise", "resize, normalise, pad"):
        assert float(rows[stage]) > 0, stage
    assert sum(float(rows[stage]) for stage in [*bench.STAGES, "the rest"]) == pytest.approx(
        float(rows["all"]), abs=0.6
    )


def test_stages_name_functions_that_exist() -> None:
    for functions in bench.STAGES.values():
        for file, function in functions:
            if file == "~":  # a profile's name for what is not Python
                continue
            (path,) = [*ROOT.glob(f"utils/datasets/{file}"), *ROOT.glob(f"utils/{file}")]
            assert f"def {function}(" in path.read_text(), (file, function)
