"""scripts/inspect_data.py: the training data of a configuration, without a model."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from disk import box, square, write_image, write_json
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from inspect_data import main, sample_panels  # noqa: E402

from utils.datasets import DataError, get_train_dataset  # noqa: E402


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_image(tmp_path / "coco/train2017/1.jpg")
    item = {"coco_url": "train2017/1.jpg", "height": 40, "width": 60, "questions": ["Which ones?"]}
    targets = [{"segmentation": [box(2, 2)]}, {"segmentation": [box(30, 20)]}]
    write_json(tmp_path / "multi_reason_seg/MultiReasonSeg/MUSE_train.json", [{**item, "answers": [targets]}])
    folder = tmp_path / "reason_seg/ReasonSeg/train"
    write_image(folder / "a.jpg")
    shapes = [{"label": "target", "points": square(5, 5)}]
    (folder / "a.json").write_text(json.dumps({"text": ["x", "y"], "is_sentence": False, "shapes": shapes}))
    return tmp_path


def test_table_and_sheets(root: Path, capsys: pytest.CaptureFixture) -> None:
    settings = ["--dataset_dir", str(root), "--dataset", "reason_seg||multi_reason_seg", "--sample_rates", "3,1"]
    assert main([*settings, "--pictures", "2", "--output", str(root / "sheets")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["type", "name", "share"]
    assert "passes" in lines[0].split()
    assert lines[1].split()[:3] == ["reason_seg", "ReasonSeg|train", "75.0%"]
    assert lines[2].split()[:3] == ["multi_reason_seg", "MultiReasonSeg|train", "25.0%"]
    for name in ("ReasonSeg_train", "MultiReasonSeg_train"):
        with Image.open(root / "sheets" / f"{name}.png") as picture:
            assert min(picture.size) > 200
    with pytest.raises(DataError, match=r"1 problem(.|\n)*no annotations \(looked in .*train\.json"):
        main(["--dataset_dir", str(root), "--dataset", "sem_seg", "--sem_seg_data", "pascal_part"])


def test_a_bad_record_is_listed_and_the_others_are_drawn(root: Path, capsys: pytest.CaptureFixture) -> None:
    folder = root / "reason_seg/ReasonSeg/train"
    for name in ("0", "b"):
        (folder / f"{name}.json").write_bytes((folder / "a.json").read_bytes())
        (folder / f"{name}.jpg").write_bytes(b"broken")
    settings = ["--dataset_dir", str(root), "--dataset", "reason_seg", "--pictures", "3", "--output", str(root / "out")]
    assert main(settings) == 0
    out = capsys.readouterr().out
    assert "wrote" in out
    assert re.findall(r"^ReasonSeg\|train: unusable: image .*/(\w)\.jpg cannot be decoded", out, re.MULTILINE) == [
        "0",
        "b",
    ]
    (folder / "a.jpg").write_bytes(b"broken")
    assert main(settings) == 0
    assert "wrote" not in capsys.readouterr().out


def test_each_conversation_shows_its_own_masks(root: Path) -> None:
    several = get_train_dataset("MultiReasonSeg", root).sample(0, np.random.default_rng(0))
    (panel,) = sample_panels(several)
    assert panel.masks[:, [8, 25], [8, 35]].tolist() == [[True, False], [False, True]]
    assert panel.truth is not None
    assert panel.truth[:, [8, 25], [8, 35]].tolist() == [[1, 0], [0, 1]]
    panels = sample_panels(get_train_dataset("ReasonSeg|train", root).sample(0, np.random.default_rng(0)))
    assert [len(panel.masks) for panel in panels] == [1, 1]
