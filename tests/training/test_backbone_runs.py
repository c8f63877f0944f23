"""Runs from base weights of other backbones: trained, resumed, exported in both ways, evaluated, asked, shown."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from backbones import OTHERS, make_backbone, write_base
from conftest import drawn_sample
from opening import load_pretrained
from pictures import upload
from PIL import Image
from tiny_run import ROOT, arguments, log_lines

import chat
import train_ds
from model.loading.adapter import plain_name
from model.lora import add_lora
from model.opened import predict
from model.structures import Turn
from scripts import analyze, doctor, merge_lora
from utils.config import load_config
from utils.dashboard.service import Dashboard
from utils.diagnostics.checks import GOAL, MUST_FALL, overfit
from utils.training.checkpoint import find_checkpoint, trained_weights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_report")]


def flags(folder: Path, data: Path, runs: Path, **settings) -> list[str]:
    own = {
        "version": folder,
        "vision_tower": "",
        "vision_pretrained": folder / "sam.pth",
        "max_image_tokens": 40,
        "model_max_length": 512,
        "train_tables": "new",
    }
    return arguments(folder, data, runs, **own | settings)


@pytest.fixture(scope="module", params=["qwen3_vl", "internvl3"])  # Qwen2.5-VL's run is Qwen3-VL's without deepstack
def trained(request, tmp_path_factory, data, no_report) -> tuple[str, Path, Path]:
    """(backbone, folder of its base weights, folder of a run of 20 steps)"""
    root = tmp_path_factory.mktemp(request.param)
    write_base(root / "base", request.param)
    run = {"epochs": 2, "steps_per_epoch": 10, "val_dataset": "ReasonSeg|val_short", "lr": 3e-2, "lora_r": 8}
    assert train_ds.main(flags(root / "base", data, root, **run)) == 0
    return request.param, root / "base", root / "run"


@pytest.fixture(scope="module")
def exported(trained) -> dict[str, Path]:
    run = trained[2]
    for kind, extra in (("merged", []), ("adapter", ["--adapter_only"])):
        assert merge_lora.main(["--checkpoint", str(run), "--output", str(run / kind), *extra]) == 0
    return {kind: run / kind for kind in ("merged", "adapter")}


def test_the_loss_falls_and_the_tower_stays(trained):
    _, _, run = trained
    lines = log_lines(run, "train")
    assert len(lines) == 20
    for term in ("text", "mask_bce"):  # the first steps warm up; a step's samples may have no mask
        values = [line[term] for line in lines if line["mask_bce"]]
        assert np.mean(values[-5:]) < np.mean(values[:3]) - 0.1, term
    [start] = log_lines(run, "start")
    parts = start["parameters"]
    expected = {"lora", "phi", "gate", "sam_prompt_encoder", "sam_mask_decoder", "embed_tokens", "lm_head"}
    assert {name for name, (_, trains) in parts.items() if trains} == expected
    assert {"vision_tower", "projector", "language_model"} <= parts.keys()
    assert not {"llama", "clip"} & parts.keys()


def test_merged_and_adapter_are_one_model(trained, exported):
    """Its weights are the base's where nothing trained."""
    backbone, _, run = trained
    states = {kind: load_pretrained(folder)[0].state_dict() for kind, folder in exported.items()}
    assert states["merged"].keys() == states["adapter"].keys()
    assert all(torch.equal(value, states["adapter"][name]) for name, value in states["merged"].items())
    held = {plain_name(name) for name in trained_weights(find_checkpoint(run, "latest"))}
    assert not [name for name in held if ".visual." in name or "vision_tower." in name]
    model, processor = load_pretrained(exported["merged"])
    assert model.config.backbone == processor.reader.backbone == backbone


def test_a_merged_model_evaluates_chats_and_is_analyzed(exported, data, tmp_path, capsys):
    merged = exported["merged"]
    where = ["--version", str(merged), "--dataset_dir", str(data), "--val_dataset", "ReasonSeg|val_short"]
    where += ["--limit", "2"]
    out = tmp_path / "results"
    assert import_module("test").main([*where, "--output", str(out)]) == 0
    assert json.loads(next(out.rglob("*.json")).read_text())
    assert analyze.main([*where, "--samples", "0", "--output", str(tmp_path / "study")]) == 0
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8)).save(photo)
    ask = ["--image", str(photo), "--prompt", "Where is it?", "--max_new_tokens", "4"]
    assert chat.main(["--version", str(merged), *ask]) == 0
    capsys.readouterr()
    assert doctor.main(["--version", str(merged)]) == 0, capsys.readouterr().out
    assert "all keys matched" in capsys.readouterr().out


def test_a_resumed_run_is_the_uninterrupted_one(trained, data, tmp_path, monkeypatch):
    """Interrupted after its first checkpoint, it goes on to the same weights."""
    folder = trained[1]
    short = {"no_eval": "true", "steps_per_epoch": 2, "lora_r": 2}
    assert train_ds.main(flags(folder, data, tmp_path, exp_name="whole", **short)) == 0
    saved = train_ds.save_step

    def save_and_die(run, results):
        saved(run, results)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_ds, "save_step", save_and_die)
    assert train_ds.main(flags(folder, data, tmp_path, exp_name="cut", **short)) == 130
    monkeypatch.setattr(train_ds, "save_step", saved)
    assert train_ds.main(flags(folder, data, tmp_path, exp_name="cut", auto_resume="true", **short)) == 0
    whole, cut = (trained_weights(find_checkpoint(tmp_path / name, "latest")) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


def test_a_finished_model_is_trained_on(exported, data, tmp_path):
    """With learning rate 0, from the merged folder and from the adapter."""
    for kind, version in exported.items():
        own = {"vision_pretrained": "", "exp_name": kind, "epochs": 1, "lr": 0, "no_eval": "true"}
        assert train_ds.main(flags(version, data, tmp_path, **own)) == 0
        again = tmp_path / kind / "merged"
        assert merge_lora.main(["--checkpoint", str(tmp_path / kind), "--output", str(again)]) == 0
        before, after = (load_pretrained(folder)[0].state_dict() for folder in (exported["merged"], again))
        assert all(torch.equal(value, after[name]) for name, value in before.items() if name != "ppm.baseline")


def test_doctor_examines_base_weights(trained, data, tmp_path, capsys):
    config = ["--config", str(ROOT / "configs/base.yaml"), "--overfit", "off"]
    code = doctor.main([*config, *flags(trained[1], data, tmp_path, no_eval="true")])
    page = capsys.readouterr().out
    assert code == 0, page
    for expected in ("every part that trains receives a gradient", "a step of 2 images takes about", "tokens: seg "):
        assert expected in page


def test_a_merged_model_is_shown(exported, tmp_path):
    """By the dashboard: an answer, and a follow-up."""
    model, processor = load_pretrained(exported["merged"])
    board = Dashboard(model, processor, "tiny", "f00", tmp_path / "answers", capacity=2, remember=False)
    try:
        image = upload(tmp_path)
        for prompt in ("where is the red star", "and the circle?"):
            *pieces, visit = board.ask("v", image, prompt, max_new_tokens=4)
            assert visit.prediction.text == pieces[-1]
        assert len(visit.turns) == 2
    finally:
        board.close()


@pytest.mark.parametrize("backbone", OTHERS)
def test_eight_samples_are_overfit(backbone):
    """Noise with a circle each, by the doctor's loop: masks and answers are learned through every part."""
    config = load_config(["--config", str(ROOT / "configs/base.yaml"), "--lr", "1e-2"], needs=())
    model, processor = make_backbone(backbone)
    trained = add_lora(model, r=8, dropout=0.0)
    sizes = [(48, 64), (64, 48), (56, 56)]
    batch = processor.collate([drawn_sample(number, sizes[number % 3], (1,)) for number in range(8)])
    curve = []
    for loss, iou in overfit(trained, config, [batch]):
        curve.append(loss)
        if iou > GOAL and loss < MUST_FALL * curve[0]:
            break
    assert iou > GOAL
    assert loss < MUST_FALL * curve[0]


def test_predictions_of_the_adapter(exported):
    image = np.random.default_rng(0).integers(0, 255, (40, 90, 3), dtype=np.uint8)
    answers = []
    for folder in exported.values():
        model, processor = load_pretrained(folder)
        answers.append(predict(model, processor, [image], [[Turn("where is it?", "it is [SEG].")]])[0][0])
    torch.testing.assert_close(answers[0].maps, answers[1].maps)
    assert answers[0].layers == answers[1].layers
