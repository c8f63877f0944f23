"""scripts/doctor.py: findings about installation, weights, data and learning; every defect is named."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from tiny_run import ROOT, arguments

from scripts import doctor
from utils.config import load_config
from utils.diagnostics import checks
from utils.diagnostics.findings import Page, ok, problem
from utils.training.engine import build_model


@pytest.fixture
def examine(base, data, tmp_path, capsys):
    """examine(config=FILE, **settings) -> (exit code, the page): the random base on drawn data, without learning."""

    def run(config: Path | str = ROOT / "configs/base.yaml", overfit: str = "off", **settings):
        settings = {"no_eval": "true"} | settings
        flags = arguments(base, data, tmp_path, **settings)
        code = doctor.main(["--config", str(config), "--overfit", overfit, *flags])
        return code, capsys.readouterr().out

    return run


def problems(page: str) -> list[str]:
    return [line.strip() for line in page.splitlines() if line.strip().startswith("problem")]


# -- findings ----------------------------------------------------------------------------------------------------------


def test_a_check_that_fails_hides_no_other(capsys):
    def breaks():
        yield ok("one")
        raise KeyError("two")

    page = Page()
    page.heading("A")
    assert not page.run(breaks)
    assert page.run(lambda: [ok("three")])
    assert page.attempt(int, "x") is None
    assert [finding.level for finding in page.findings] == ["ok", "problem", "ok", "problem"]
    out = capsys.readouterr().out
    assert "breaks: KeyError: 'two' -> unexpected" in out
    assert page.summary() == "2 problems, 0 warnings, 0 skipped"
    assert str(problem("a\n b", "c")) == "problem  a b -> c"  # one line


# -- installation ------------------------------------------------------------------------------------------------------


def test_this_installation_is_right(capsys):
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Installation\n  ok       Python ")
    assert "\n0 problems" in out
    assert "Settings" not in out


def test_broken_installations_are_named(capsys, monkeypatch):
    version, load = importlib.metadata.version, importlib.import_module

    def other_version(name):
        if name == "scipy":
            raise importlib.metadata.PackageNotFoundError
        return "4.1" if name == "transformers" else version(name)

    def fail(name, package=None):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist\nmore")
        return load(name, package)

    monkeypatch.setattr(importlib.metadata, "version", other_version)
    monkeypatch.setattr(importlib, "import_module", fail)
    assert doctor.main(["--config", "nowhere.yaml"]) == 1
    page = capsys.readouterr().out
    lines = problems(page)
    assert len(lines) == 3
    assert "transformers is 4.1, transformers<6,>=5.23 is needed" in lines[0].replace(">=5.23,<6", "<6,>=5.23")
    assert "scipy is not installed" in lines[1]
    assert "torchvision fails: RuntimeError: operator torchvision::nms does not exist -> torch and" in lines[2]
    assert "skipped  everything else -> fix the installation first" in page
    [imported] = [line for line in page.splitlines() if "imported" in line]
    assert "torch, transformers, " in imported


def test_a_gpu_that_torch_cannot_use_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    (finding,) = doctor.check_devices()
    assert finding.level == "problem"
    assert "update the driver" in finding.fix


# -- a configuration ---------------------------------------------------------------------------------------------------


def test_a_right_configuration(examine, data):
    code, page = examine(no_eval="false")
    assert code == 0, page
    for expected in (
        "all files and folders",
        "checkpoints take",
        "a step of 2 images takes about",
        "visual_model: ",
        "tokens: seg ",
        "grefcoco: 3 samples read",
        "ReasonSeg|val_short: ",
        "every part that trains receives a gradient (norms: ",
        "skipped  overfitting 8 samples -> give --overfit on",
        "0 problems, 0 warnings, 1 skipped",
    ):
        assert expected in page, expected


def test_a_corrupted_configuration(examine, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("train:\n  lr: fast\n  batchsize: 3\nmodel: [")
    code, page = examine(path)
    assert (code, len(problems(page))) == (1, 1)
    assert "is not valid YAML" in page
    path.write_text("loss:\n  gaussian_kernel: 30\ntrain:\n  batchsize: 3\n")
    code, page = examine(path)
    assert code == 1
    assert [word in page for word in ("gaussian_kernel: 30 is even", "did you mean batch_size?")] == [True, True]


def test_files_that_are_missing(examine, tmp_path):
    code, page = examine(version=tmp_path / "no_llava", vision_pretrained=tmp_path / "no.pth")
    lines = problems(page)
    assert code == 1
    assert len(lines) == 2
    assert "no_llava: no such folder" in lines[0]
    assert "no.pth: no such file" in lines[1]
    assert "grefcoco: 3 samples read" in page  # the data are checked nevertheless
    assert "skipped  weights, tokens" in page
    assert "skipped  forward and backward" in page


def test_weights_that_do_not_fit(examine, base, tmp_path):
    tower = tmp_path / "tower"
    shutil.copytree(base / "clip", tower)
    settings = json.loads((tower / "config.json").read_text())
    (tower / "config.json").write_text(json.dumps(settings | {"hidden_size": 64}))
    code, page = examine(vision_tower=tower)
    assert code == 1
    assert "has width 64, the projector of" in problems(page)[0]
    state = torch.load(base / "sam.pth", weights_only=True)
    lost = next(name for name in state if name.startswith("mask_decoder.transformer"))
    torch.save({name: value for name, value in state.items() if name != lost}, tmp_path / "sam.pth")
    code, page = examine(vision_pretrained=tmp_path / "sam.pth")
    assert code == 1
    assert lost in problems(page)[0]
    assert "an incomplete file" in page


def test_images_that_are_missing(examine, data, tmp_path):
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    for path in (broken / "coco").rglob("*.jpg"):
        path.write_bytes(b"no image")
    for path in (broken / "refer_seg").rglob("*.jpg"):
        path.write_bytes(b"no image")
    code, page = examine(dataset_dir=broken)
    assert code == 1
    assert "grefcoco: 3 of 3 samples cannot be read" in page
    assert "ReasonSeg|train: 3 samples read" in page
    code, page = examine(dataset_dir=broken, dataset="sem_seg", sem_seg_data="ade20k", refer_seg_data="")
    assert code == 1
    assert "ade20k" in problems(page)[0]


def test_no_room_on_the_disk_and_in_memory(examine, monkeypatch):
    monkeypatch.setattr(doctor, "available_memory", lambda: 1e6)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    code, page = examine()
    lines = problems(page)
    assert code == 1
    assert len(lines) == 2
    assert "checkpoints take" in lines[0]
    assert "--gradient_checkpointing true" in lines[1]


def test_a_part_without_gradient_is_named(base, data, tmp_path, examine, monkeypatch):
    def cut_off(model, batch, check=checks.check_gradients):
        phi = model.get_base_model().text_hidden_fcs[0]
        phi.register_forward_hook(lambda module, inputs, output: output.detach())
        yield from check(model, batch)

    monkeypatch.setattr(checks, "check_gradients", cut_off)
    code, page = examine()
    assert code == 1
    assert "no usable gradient for phi (norms: " in problems(page)[0]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["grpo", "both"])
def test_rewards_of_sampled_answers(examine, objective):
    """Of the ground truth's loss nothing is said where none is learned from."""
    settings = {"objective": objective, "lora_dropout": 0.0, "grpo_tokens": 12, "grpo_rewards": "length:1||format:1"}
    code, page = examine(**settings)
    assert code == 0
    answers = r"ok +\d+ answers to \d questions in .* rewards length 0\.\d\d, format .* differ in [1-9] of \d groups"
    assert re.search(answers, page)
    assert bool(re.search(r"rewards give .*phi.* no gradient", page)) == (objective == "grpo")
    assert ("every part that trains receives a gradient" in page) == (objective == "both")
    code, page = examine(**settings | {"grpo_rewards": "length:1", "grpo_tokens": 1})
    assert (code, "nothing to learn from" in page) == (0, True)
    code, page = examine(**settings | {"grpo_tokens": 200, "model_max_length": 200})
    assert (code, "--grpo_tokens 200: must be above" in problems(page)[0]) == (1, True)


def test_a_token_without_embedding(tiny_model, tiny_processor):
    assert [finding.level for finding in checks.check_tokens(tiny_model, tiny_processor)] == ["ok"]
    tiny_model.config.seg_token_id = 7
    (finding,) = checks.check_tokens(tiny_model, tiny_processor)
    assert (finding.level, "[SEG] 7" in finding.text) == ("problem", True)
    tiny_model.model.embed_tokens = torch.nn.Embedding(tiny_processor.tokens.seg, 32)
    (finding,) = checks.check_tokens(tiny_model, tiny_processor)
    assert "has no embedding" in finding.text


# -- overfitting -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(data, monkeypatch):
    """A configuration on the pretrained tiny family, its model, and batches of few samples to overfit."""
    monkeypatch.setattr(checks, "SAMPLES", 3)
    config = load_config(["--config", str(ROOT / "configs/tiny.yaml"), "--dataset_dir", str(data), "--workers", "0"])
    model, processor, _ = build_model(config)
    batches = checks.collate(config, processor, doctor_mixture(config), torch.device("cpu"))
    return config, model, batches


def doctor_mixture(config):
    from utils.datasets.mixture import make_mixture

    return make_mixture(config)


@pytest.mark.slow
def test_samples_are_overfit(tiny):
    config, model, batches = tiny
    assert sum(len(batch.sizes) for batch in batches) == checks.SAMPLES
    (finding,) = checks.check_overfit(model, config, batches)
    assert finding.level == "ok", finding
    assert "overfit 3 samples" in finding.text


@pytest.mark.parametrize("broken", ["lr", "frozen"])
def test_learning_that_is_broken_fails(tiny, monkeypatch, broken):
    config, model, batches = tiny
    monkeypatch.setattr(checks, "STEPS", 2)
    if broken == "lr":
        config.train.lr = 1e-9
    else:  # only a part that alone cannot do it
        model.requires_grad_(False)
        model.get_base_model().ppm.gate.requires_grad_(True)
    (finding,) = checks.check_overfit(model, config, batches)
    assert finding.level == "problem"
    assert "did not overfit 3 samples in 2 steps" in finding.text
    assert "--lr" in finding.fix


# -- a finished model --------------------------------------------------------------------------------------------------


def test_a_finished_model(tiny_model, tiny_processor, tmp_path, capsys):
    tiny_model.save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    assert doctor.main(["--version", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    assert "all keys matched" in page
    assert "a teacher-forced [SEG] has a mask of (96, 128)" in page
    (tmp_path / "uground_processor.json").unlink()
    assert doctor.main(["--version", str(tmp_path)]) == 1
    assert "it has no uground_processor.json" in capsys.readouterr().out
