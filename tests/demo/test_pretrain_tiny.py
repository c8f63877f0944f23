"""The recipes of the tiny families run end to end, and their output loads like published weights."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from model.backbones import qwen2_5_vl
from model.backbones.llava import ClipReader
from model.geometry import Fit
from model.loading.pretrained import load_for_training
from model.processing.processor import UGroundProcessor
from scripts.dev import pretrain_tiny
from utils.config import load_config
from utils.demo import pretrain_batches, scene_texts, tiny_files, tiny_model
from utils.demo.pretrain_batches import (
    MIXTURES,
    cell_shares,
    first_labels,
    language_batch,
    sam_batch,
    vision_batch,
)
from utils.demo.scenes import sample_scene

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "assets/tiny"


def run(monkeypatch, output: Path, *flags: str) -> None:
    """Two steps of each stage, of three scenes each."""
    for name in ("BATCH", "QWEN_BATCH"):
        monkeypatch.setattr(pretrain_batches, name, dict.fromkeys(pretrain_batches.BATCH, 3))
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
def test_every_stage_of_qwen_runs_and_the_result_loads(tmp_path, monkeypatch):
    """All of its own random weights, and beginning with the language model of assets/tiny."""
    corpus = scene_texts.corpus
    monkeypatch.setattr(scene_texts, "corpus", lambda rng, n: corpus(rng, n // 10))
    for flags in ((), ("--language", str(TINY))):
        output = tmp_path / str(len(flags))
        run(monkeypatch, output, "--family", "qwen", *flags)
        settings = {"mask_decoder": "sam2", "max_image_tokens": 144}
        folders = str(output / "qwen2_5_vl"), "", str(output / "sam2")
        model, processor, _ = load_for_training(*folders, "fp32", settings)
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
        assert processor.builder.prefix_text.startswith("<|im_start|>user")  # no system prompt
        assert processor.tokenizer.tokenize(" red star") == ["Ġred", "Ġstar"]
        assert model.visual_model.mask_side == 64


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
        (("--family", "qwen", "--stages", "vision,language"), "no stage 'language'; there are vision, conversations"),
        (("--family", "qwen", "--stages", "conversations"), "conversations continues earlier stages"),
        (("--language", str(TINY)), "--language is where --family qwen begins"),
        (("--minutes", "sma=3"), "--minutes: no stage 'sma'"),
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


@pytest.mark.slow
def test_the_base_of_tiny_qwen_loads_and_grounds():
    """Its last layer's maps have their peak on what new scenes' queries mean; absent targets are rejected."""
    config = load_config(["--config", str(ROOT / "configs/tiny_qwen.yaml")])
    paths = [str(ROOT / config.model.version), "", str(ROOT / config.model.vision_pretrained)]
    model, processor, _ = load_for_training(*paths, "fp32", config.method, config.model.model_max_length)
    options = argparse.Namespace(seed=1, device="cpu", family="qwen")
    found = pretrain_tiny.check_language(model, processor, (pretrain_tiny.LAST_LAYER,), options)
    scores = dict(re.findall(r"([\w-]+)(?: 8:)? ([\d.]+)", found))
    assert min(float(scores[kind]) for kind in ("attribute", "commonsense", "multi", "N-acc", "T-acc")) > 0.9, found
    assert min(float(scores[kind]) for kind in ("relation", "superlative")) > 0.7, found


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


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A random tiny Qwen2.5-VL, with the tokenizer of assets/tiny and Qwen's tokens, and its processor."""
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY / "llava")
    tokenizer.add_tokens(list(qwen2_5_vl.TEMPLATE.tokens), special_tokens=True)
    tokenizer.bos_token, tokenizer.eos_token = None, qwen2_5_vl.TEMPLATE.end
    tokenizer.save_pretrained(folder / tiny_files.QWEN)
    return tiny_files.new_qwen(argparse.Namespace(output=folder, start=None, seed=0))


def drawn(count: int) -> list:
    rngs = [np.random.default_rng([8, n]) for n in range(count)]
    return [(sample_scene(rng), rng) for rng in rngs]


def test_a_language_model_of_llava_reads_texts_as_before(qwen):
    """Qwen's positions of text are LLaMA's, whatever its axes; its biases begin at zero."""
    model, processor = qwen
    tiny_files.start_language(model, processor.tokenizer, TINY)
    llava, _ = tiny_files.new_llava(argparse.Namespace(output=TINY, start=None, seed=0))
    tiny_files.load_llava(llava, TINY)
    ids = torch.tensor([processor.tokenizer.encode(" the large red star", add_special_tokens=False)])
    places = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        ours = model.language(input_ids=ids, position_ids=places.expand(3, -1, -1)).last_hidden_state
        theirs = llava.model(input_ids=ids, position_ids=places).last_hidden_state
        assert torch.allclose(ours, theirs, atol=1e-4)
        assert torch.allclose(model.lm_head(ours)[..., ids[0]], llava.lm_head(theirs)[..., ids[0]], atol=1e-3)


def test_shares_of_cells_are_of_padded_patches_or_of_the_whole_image(qwen):
    scene = next(scene for scene, _ in drawn(40) if scene.image.shape[:2] == (120, 96))
    padded = np.zeros((len(scene.masks), 120, 120), np.float32)
    padded[..., :96] = scene.masks
    expected = torch.nn.functional.avg_pool2d(torch.from_numpy(padded)[:, None], 10).flatten(1)
    assert torch.allclose(cell_shares(scene.masks, ClipReader(120, 10)), expected, atol=1e-6)
    shares = cell_shares(scene.masks, qwen[1].reader, cells=130)  # 12 x 10 cells, of 9.6 pixels across
    assert shares.shape == (len(scene.masks), 130)
    assert not shares[:, 120:].any()
    areas = torch.from_numpy(scene.masks).flatten(1).sum(1).float()
    assert torch.allclose(shares.sum(1) * 96, areas, rtol=0.05)  # pooled cells overlap by a pixel


def test_each_cell_of_qwen_points_to_the_center_of_its_shape(qwen):
    scenes = drawn(12)
    data = vision_batch(scenes, qwen[1])
    assert len({scene.image.shape for scene, _ in scenes}) > 1
    for n, (scene, _) in enumerate(scenes):
        rows, columns = data["batch"].grids[n]
        height, width = scene.image.shape[:2]
        seen = (data["labels"][n, :, 0] >= 0).nonzero()[:, 0]
        assert (seen < rows * columns).all()
        y, x = (seen // columns + 0.5) * height / rows, (seen % columns + 0.5) * width / columns
        found = torch.stack([x, y], 1) + data["centers"][n, seen] * 120
        centers = torch.tensor([shape.center for shape in scene.shapes])
        assert (found[:, None] - centers).norm(dim=-1).amin(1).max() < 1e-3
        assert (data["labels"][n, rows * columns :] == -2).all()  # padding has no loss


@pytest.mark.parametrize("fit", [Fit("pad", 120), Fit("stretch", 128)])
def test_prompts_of_sam_lie_on_their_shapes(fit):
    data = sam_batch(drawn(8), fit, mask_side=fit.side // 2)
    assert data["images"].shape[2:] == data["masks"].shape[1:] == (fit.side, fit.side)
    small = torch.nn.functional.avg_pool2d(data["masks"][:, None], 2)
    for n, mask in enumerate(data["masks"]):
        x, y = data["points"][n, 0].long()
        assert mask[y, x] == 1
        ys, xs = mask.nonzero(as_tuple=True)
        box = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert (data["boxes"][n] - box).abs().max() <= 2
        inside, outside = data["maps"][n, 0][small[n, 0] == 1], data["maps"][n, 0][small[n, 0] == 0]
        assert inside.mean() > outside.mean() + 0.2


def test_a_stage_ends_after_its_minutes(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(pretrain_tiny.time, "time", lambda: now[0])
    length, steps = pretrain_tiny.Length(10, minutes=2), pretrain_tiny.Length(10)
    now[0] += 30
    assert length.share(9) == 0.25
    assert steps.share(9) == 0.9
    now[0] += 200
    assert length.share(9) == 1
