"""Checkpoints, merged folders and adapters of earlier code load, and answer as they did (fixtures/written_before)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from opening import load_pretrained
from safetensors.torch import load_file
from tiny_run import ROOT

import train_ds
from model.opened import predict
from model.structures import Turn
from scripts import make_demo_data, merge_lora
from utils.training import checkpoint as checkpoints

WRITTEN = ROOT / "tests/fixtures/written_before"
TOLERANCE = 1e-4  # of the largest value, as in the parity tests
QUESTION, ANSWER = "where is the blue circle", "it is [SEG] and [SEG]."
BASE = {"version": "base/llava", "vision_tower": "base/clip", "vision_pretrained": "base/sam.pth"}
MOVED = [part for name, path in BASE.items() for part in (f"--{name}", str(WRITTEN / path))]
NOW_AT = {"base" if name == "version" else name: str(WRITTEN / path) for name, path in BASE.items()}


def assert_answers_as_before(folder: Path, **base: str) -> None:
    """Text, layers, policy, logits, maps and masks that a folder gives, against those of the code that wrote it."""
    model, processor = load_pretrained(str(folder), **base)
    rows, columns = np.mgrid[0:48, 0:64]
    disc = (rows - 24) ** 2 + (columns - 20) ** 2 < 150
    image = np.stack([4 * columns, 5 * rows, 255 * disc], 2).astype(np.uint8)
    [[given]] = predict(model, processor, [image], [[Turn(QUESTION, ANSWER)]])
    [[written]] = predict(model, processor, [image], [[Turn(QUESTION)]], max_new_tokens=8)
    with torch.inference_mode():
        output = model.forward_language(processor.prompts([image], [[Turn(QUESTION)]]))
        logits = model.lm_head(output.hidden[-1][0, -1])
    expected = json.loads((WRITTEN / "expected.json").read_text())
    assert (written.text, written.token_ids) == (expected["text"], expected["token_ids"])
    assert given.layers == expected["layers"]
    values = {
        "policy": given.policy,
        "logits": logits[:8],
        "mask_logits": given.mask_logits[:, ::12, ::16],
        "mask_sums": given.mask_logits.abs().sum((1, 2)),
        "map_sums": given.maps.sum((1, 2)),
    }
    for name, value in values.items():
        before = torch.tensor(expected[name])
        assert (value - before).abs().max() <= TOLERANCE * before.abs().max(), name


def test_merged_folder() -> None:
    assert_answers_as_before(WRITTEN / "merged")


def test_adapter_on_the_base_that_it_names(monkeypatch) -> None:
    monkeypatch.chdir(WRITTEN)
    assert_answers_as_before(Path("adapter"))


def test_adapter_on_a_base_that_has_moved() -> None:
    assert_answers_as_before(WRITTEN / "adapter", **NOW_AT)


@pytest.mark.parametrize("adapter", [False, True], ids=["merged", "adapter"])
def test_checkpoint_merges(tmp_path, adapter) -> None:
    output = tmp_path / "written_now"
    flags = ["--checkpoint", str(WRITTEN / "run"), "--output", str(output), *MOVED]
    assert merge_lora.main([*flags, *["--adapter_only"] * adapter]) == 0
    assert_answers_as_before(output, **(NOW_AT if adapter else {}))
    before = WRITTEN / ("adapter" if adapter else "merged")
    for path in before.glob("*.safetensors"):
        shapes = [{k: v.shape for k, v in load_file(folder / path.name).items()} for folder in (output, before)]
        assert shapes[0] == shapes[1], path.name


@pytest.mark.slow
def test_run_goes_on(tmp_path, no_report) -> None:
    """Its config.yaml is read, and its checkpoint passes as the same run's."""
    assert make_demo_data.main(["--out", str(tmp_path / "data"), "--train", "6", "--val", "2", "--test", "1"]) == 0
    shutil.copytree(WRITTEN / "run", tmp_path / "run")
    flags = ["--config", str(WRITTEN / "run/config.yaml"), "--auto_resume", "true", "--epochs", "2", *MOVED]
    flags += ["--log_base_dir", str(tmp_path), "--dataset_dir", str(tmp_path / "data"), "--val_pictures", "0"]
    zero = str(ROOT / "configs/deepspeed/zero2.json")
    assert train_ds.main([*flags, "--deepspeed_config", zero]) == 0
    assert checkpoints.read_meta(checkpoints.find_checkpoint(tmp_path / "run"))["step"] == 12
