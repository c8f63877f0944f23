"""``load`` recognizes kinds of folders, ``ask`` takes any image, and neither imports utils."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_run import ROOT, environment

import model as package
from model import load
from model.loading.pretrained import kind_of
from model.opened import predict
from model.processing.pixels import as_pixels
from model.structures import Turn

WRITTEN = ROOT / "tests/fixtures/written_before"
QUESTIONS = ["where is the red star", "circle"]


@pytest.fixture(scope="module")
def opened(version):
    return load(version, "fp32", "cpu")


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("merged", "merged"),
        ("adapter", "adapter"),
        ("base/llava", "base"),
        ("base/clip", "unknown"),
        ("run", "run"),
        ("run/checkpoints/step_00000006", "run"),
    ],
)
def test_kinds_of_folders_are_recognized(folder, kind):
    assert kind_of(WRITTEN / folder) == kind


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("base/llava", "is of type 'llava', not a UGround model; merge a trained run with scripts/merge_lora.py first"),
        ("base/clip", "is of type 'clip_vision_model', not a UGround model"),
        ("run/checkpoints/step_00000006", r"is of a training run, not a model\. .*--checkpoint .*/run --output"),
        ("run/nothing", "no such folder; give a path, or a repository of the hub"),
    ],
)
def test_folders_without_a_model_are_refused(folder, message):
    with pytest.raises(ValueError, match=f"--version.*{message}"):
        load(WRITTEN / folder)


def test_weights_of_a_merged_folder_that_do_not_fit_are_counted_and_some_named(tmp_path):
    shutil.copytree(WRITTEN / "merged", tmp_path / "merged")
    path = tmp_path / "merged/model.safetensors"
    state = load_file(path)
    removed = sorted(key for key in state if key.startswith("mask", len("visual_model.")))[:9]
    save_file({key: state[key] for key in state.keys() - removed}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"do not fit: 9 missing: {removed[0]}, .*, and 3 more$"):
        load(tmp_path / "merged", "fp32", "cpu")


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="--precision fp8 is unknown; use auto, fp32, bf16, fp16"):
        load(WRITTEN / "merged", "fp8")


def test_the_report_names_the_source_of_weights(monkeypatch):
    monkeypatch.chdir(WRITTEN)
    merged = {row.module: row for row in load("merged", "fp32", "cpu").report()}
    adapter = {row.module: row for row in load("adapter", "fp32", "cpu").report()}
    assert {row.source for row in merged.values()} == {"merged"}
    assert {module: row.source for module, row in adapter.items()} == {
        "model": "base/llava, trained parts of adapter",
        "lm_head": "base/llava, trained parts of adapter",
        "vision_tower": "base/clip",
        "mm_projector": "base/llava",
        "visual_model": "base/sam.pth, trained parts of adapter",
        "text_hidden_fcs": "adapter",
        "ppm": "adapter",
    }
    assert {row.fingerprint for row in merged.values()} == {row.fingerprint for row in adapter.values()}


@pytest.mark.parametrize(("section", "key"), [("ppm", "layer_dance"), ("loss", "dice_los_weight"), ("newer", "lr")])
def test_settings_of_an_adapter_that_are_unknown_are_named(tmp_path, monkeypatch, section, key):
    shutil.copytree(WRITTEN / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter/uground_run.json"
    meta = json.loads(path.read_text())
    meta["config"].setdefault(section, {})[key] = 1
    path.write_text(json.dumps(meta))
    monkeypatch.chdir(WRITTEN)
    with pytest.raises(ValueError, match=rf"uground_run.json: unknown setting {section}\.{key}"):
        load(tmp_path / "adapter")


def test_a_question_that_fails_leaves_a_model_in_training(tiny_model, tiny_processor):
    tiny_model.train()
    image = np.zeros((8, 8, 3), np.uint8)
    for turn, options in ((Turn(" "), {}), (Turn("star"), {"layer_policy": "best"})):
        with pytest.raises(ValueError, match=r"empty|unknown layer rule"):
            predict(tiny_model, tiny_processor, [image], [[turn]], **options)
        assert tiny_model.training


def test_an_adapter_uses_the_layer_rule_of_validation(tmp_path, monkeypatch):
    shutil.copytree(WRITTEN / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter/uground_run.json"
    path.write_text(path.read_text().replace('"val_layer_policy": ""', '"val_layer_policy": "last"'))
    monkeypatch.chdir(WRITTEN)
    assert load("adapter", "fp32", "cpu").model.config.layer_policy == "argmax"
    assert load(tmp_path / "adapter", "fp32", "cpu").model.config.layer_policy == "last"


def test_ask_is_predict_with_one_image(opened, photo):
    pixels = as_pixels(photo)
    [expected] = predict(opened.model, opened.processor, [pixels], [list(map(Turn, QUESTIONS))], max_new_tokens=3)
    answers = opened.ask(pixels, QUESTIONS, max_new_tokens=3)
    assert [p.text for p in answers] == [p.text for p in expected]
    for answer, prediction in zip(answers, expected):
        assert torch.equal(answer.mask_logits, prediction.mask_logits)
        assert torch.equal(answer.masks, prediction.mask_logits > 0)
    single = opened.ask(pixels, QUESTIONS[0], layer_policy="fixed:2", max_new_tokens=3)
    assert single.masks.shape == (len(single.layers), *pixels.shape[:2])
    assert single.masks.dtype == torch.bool
    assert single.layers
    assert set(single.layers) == {2}


def test_ask_takes_arrays_pictures_and_paths(opened, tmp_path):
    """Files and PIL images are rotated by their EXIF orientation: they equal the array that viewers show."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    stored = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(stored).save(path, exif=exif)
    upright = np.rot90(stored, -1)
    answers = [
        opened.ask(image, QUESTIONS[0], max_new_tokens=2) for image in (upright, Image.open(path), path, str(path))
    ]
    for answer in answers:
        assert answer.masks.shape[1:] == (60, 40)
        assert torch.equal(answer.mask_logits, answers[0].mask_logits)


def test_invalid_images_are_refused(opened, tmp_path):
    for image in (np.zeros((4, 5), np.int32), np.full((4, 5, 3), 9.0), np.zeros((3, 4, 5), np.uint8)):
        with pytest.raises(ValueError, match=r"give a path, a PIL image, or an array, uint8 or float in \[0, 1\]"):
            opened.ask(image, "star")
    with pytest.raises(ValueError, match=r"gone\.jpg does not exist; check the path"):
        opened.ask(tmp_path / "gone.jpg", "star")
    with pytest.raises(ValueError, match="empty"):
        opened.ask(np.zeros((4, 5, 3), np.uint8), " ")


def test_the_package_shows_its_names():
    assert {name: getattr(package, name).__name__ for name in package.__all__} == {
        name: name for name in package.__all__
    }
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = package.lode


ALONE = """
import sys
import model
assert "torch" not in sys.modules, "import model is not cheap"
import numpy as np
for folder in sys.argv[1:]:
    opened = model.load(folder, "fp32", "cpu")
    opened.ask(np.zeros((40, 60, 3), np.uint8), "where is the star", max_new_tokens=1)
imported = sorted(name for name in sys.modules if name.partition(".")[0] in ("utils", "deepspeed", "peft", "gradio"))
assert not imported, imported
"""


def test_loading_and_asking_import_no_package_called_utils():
    command = [sys.executable, "-c", ALONE, "adapter", str(WRITTEN / "merged")]
    run = {"env": environment(PYTHONPATH=str(ROOT)), "cwd": WRITTEN, "capture_output": True, "text": True}
    done = subprocess.run(command, **run)
    assert done.returncode == 0, done.stderr[-2000:]
