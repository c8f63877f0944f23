"""The recipes of assets/tiny and assets/tiny_depths run end to end, and their output loads like published weights."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from model.backbones.llava import ClipReader
from model.loading.pretrained import load_for_training
from model.processing.processor import UGroundProcessor
from scripts.dev import pretrain_tiny
from utils.config import load_config
from utils.demo import pretrain_batches, scene_texts, tiny_model
from utils.demo.pretrain_batches import MIXTURES, first_labels, language_batch
from utils.demo.scenes import sample_scene

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "assets/tiny"


def run(monkeypatch, output: Path, *flags: str) -> None:
    """Two steps of each stage, of three scenes each."""
    monkeypatch.setattr(pretrain_batches, "BATCH", dict.fromkeys(pretrain_batches.BATCH, 3))
    command = ["pretrain_tiny.py", "--output", str(output), "--steps", "0.0006", "--device", "cpu", "--workers", "0"]
    monkeypatch.setattr(sys, "argv", [*command, *flags])
    pretrain_tiny.main()


@pytest.mark.slow
def test_every_stage_runs_and_the_result_loads(tmp_path, monkeypatch):
    corpus = scene_texts.corpus
    monkeypatch.setattr(scene_texts, "corpus", lambda rng, n: corpus(rng, n // 10))  # all words in fewer texts
    run(monkeypatch, tmp_path)
    model, processor, _ = load_for_training(
        str(tmp_path / "llava"), str(tmp_path / "clip"), str(tmp_path / "sam.pth"), "fp32"
    )
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    tokens = processor.tokenizer.tokenize(" red star")
    assert tokens == ["Ġred", "Ġstar"]  # words are single tokens


@pytest.mark.slow
def test_depths_start_from_the_tiny_family_and_keep_its_clip_and_sam(tmp_path, monkeypatch):
    run(monkeypatch, tmp_path, "--stages", "depths", "--start", str(TINY))
    assert not (tmp_path / "clip").exists()
    assert not (tmp_path / "sam.pth").exists()
    load_for_training(str(tmp_path / "llava"), str(TINY / "clip"), str(TINY / "sam.pth"), "fp32")


@pytest.mark.slow
def test_the_iou_stage_changes_the_head_alone(tmp_path, monkeypatch):
    run(monkeypatch, tmp_path, "--stages", "iou", "--start", str(TINY))
    before, after = (torch.load(folder / "sam.pth") for folder in (TINY, tmp_path))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all(key.startswith("mask_decoder.iou_prediction_head.") for key in changed)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--stages", "vision,dephts"), "no stage 'dephts'; there are vision, language, conversations, depths, sam"),
        (("--stages", "conversations"), "conversations continues earlier stages"),
        (("--stages", "language"), "language continues earlier stages"),
        (("--start", str(TINY)), "vision begins with random weights"),
        (("--stages", "depths,sam", "--start", str(TINY)), "sam begins with random weights"),
        (("--stages", "vision,iou"), "out/sam.pth, which is not there"),
        (("--stages", "depths,iou", "--start", str(TINY / "llava")), "llava/sam.pth, which is not there"),
    ],
)
def test_stages_that_cannot_begin_are_refused(tmp_path, monkeypatch, capsys, flags, message):
    """Rather than skipped, or trained from random weights."""
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "out", *flags)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_base_of_tiny_depths_loads():
    config = load_config(["--config", str(ROOT / "configs/tiny_depths.yaml")])
    paths = [ROOT / path for path in (config.model.version, config.model.vision_tower, config.model.vision_pretrained)]
    load_for_training(*map(str, paths), "fp32")


@pytest.fixture(scope="module")
def batch():
    processor = UGroundProcessor(
        PreTrainedTokenizerFast.from_pretrained(TINY / "llava"),
        ClipReader(120, 10),
        tiny_model.sam_shape().image_size,
        "",
    )
    rngs = [np.random.default_rng([7, n]) for n in range(4)]
    return language_batch([(sample_scene(rng), rng) for rng in rngs], processor, MIXTURES["conversations"])


def test_every_query_has_the_map_of_its_seg_and_of_its_last_prompt_token(batch):
    """Also those that come after others in a conversation."""
    turns = 4 * 6  # scenes, questions
    assert sum(batch["batch"].questions) < turns  # some are joined
    assert first_labels(batch["batch"]).sum() == turns
    families, segs = batch["families"], len(batch["batch"].seg_positions)
    assert len(batch["positions"]) == len(batch["rows"]) == len(families) == len(batch["coverage"])
    assert "absent" not in families[:segs]
    assert [family for family in families[segs:] if family != "absent"] == families[:segs]
    present = torch.tensor([family != "absent" for family in families])
    assert torch.equal(batch["coverage"].sum(1) > 0, present)
    assert (batch["coverage"] <= batch["everything"] + 1e-6).all()
    assert {family for family, share in zip(families, batch["reference"]) if share.sum() > 0} == {"relation"}


def test_a_family_is_grounded_at_its_depth_and_shows_all_shapes_at_the_others(batch):
    targets = pretrain_tiny.by_depth(batch)
    assert sorted(targets) == [4, 6, 8]
    for n, family in enumerate(batch["families"]):
        for layer, (chosen, coverage) in targets.items():
            own = pretrain_tiny.DEPTHS.get(family) == layer
            assert chosen[n]
            assert torch.equal(coverage[n], batch["coverage" if own else "everything"][n])
