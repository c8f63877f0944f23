"""The guide docs/your_own_data.md: its commands run as written, and its examples parse."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from forks import Program
from PIL import Image
from tiny_run import write_base

from utils.datasets.jsonl import KEYS, parse_line

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs/your_own_data.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL) for line in block.splitlines()]
SHORT = {  # program -> flags; a random model's answers have no end
    "train_ds.py": " --epochs 1 --steps_per_epoch 3 --warmup_steps 2 --batch_size 2 --workers 0"
    " --val_limit 1 --val_pictures 1",
    "test.py": " --max_new_tokens 8",
}


def test_examples_of_the_format_are_read():
    examples = [line.strip() for line in GUIDE.splitlines() if line.startswith('    {"image"')]
    lines = [parse_line(line.encode(), Path("guide"), number) for number, line in enumerate(examples)]
    assert [(bool(line.query), line.is_sentence, len(line.masks), line.split) for line in lines] == [
        (True, False, 1, "train"),
        (True, True, 1, "train"),
        (True, False, 0, "val"),
        (False, False, 2, "train"),
    ]
    assert set(re.findall(r"^\| `(\w+)` \|", GUIDE, re.MULTILINE)) == set(KEYS)


@pytest.fixture
def checkout(tmp_path: Path, make_model, tiny_tokenizer) -> Path:
    """A checkout of the repository with a random tiny base and six photographs annotated in LabelMe."""
    for name in ("model", "utils", "configs", "scripts", "train_ds.py", "test.py", "chat.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_base(tmp_path / "assets/tiny", make_model(), tiny_tokenizer)
    photos = tmp_path / "data/mine/photos"
    photos.mkdir(parents=True)
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.jpg")
        shape = {"label": ("mug", "plate")[number % 2], "points": [[5, 5], [30, 5], [30, 30]], "shape_type": "polygon"}
        value = {"imagePath": f"{number}.jpg", "imageHeight": 48, "imageWidth": 64, "shapes": [shape]}
        (photos / f"{number}.json").write_text(json.dumps(value))
    return tmp_path


@pytest.mark.slow
def test_commands_run_as_written(checkout: Path):
    assert len(COMMANDS) == 8
    output = {}
    for number, command in enumerate(COMMANDS):
        short = command + SHORT.get(command.split()[1], "")
        split = ["bash", "-c", f"printf '%s\\0' {short}"]  # by the shell, which knows quotes and $(find)
        words = subprocess.run(split, cwd=checkout, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
        assert words[0] == "python"
        program = Program(*words[1:], folder=checkout, output=checkout / f"{number}.txt")
        assert program.ends() == 0, f"{short}\n{program.printed()[-4000:]}"
        output[words[1] + words[2]] = program.printed()
    assert "6 images, 12 queries (6 absent; " in output["scripts/convert_data.pylabelme"]
    assert "all images and masks can be read" in output["scripts/convert_data.pycheck"]
    for name in ("own.train.png", "own.val.png"):
        assert (checkout / "data/mine" / name).is_file()
    [result] = (checkout / "runs/mine/merged/eval").glob("*.json")
    summary = json.loads(result.read_text())
    assert (summary["benchmark"], summary["mode"]) == ("custom|own.jsonl|val", "generate")
    assert {"gIoU", "cIoU", "N-acc", "T-acc"} == set(summary["metrics"])
    assert list((checkout / "runs/mine/answers").glob("*.json"))
