"""PixelLM from MUSE to masks: it trains, is exported in both ways, evaluates and chats, without a SAM."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from opening import load_pretrained
from PIL import Image
from tiny_run import ROOT, arguments, log_lines

import chat
import train_ds
from model.decoders.pixel_decoder import PixelDecoder
from model.loading.adapter import plain_name
from model.opened import predict
from model.structures import Turn
from scripts import analyze, make_demo_data, merge_lora
from utils.training.checkpoint import find_checkpoint, trained_weights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_report")]
PIXELLM = {
    "vision_pretrained": "",
    "layer_selection": "last",
    "mask_prompt": "false",
    "map_terms": "",
    "mask_decoder": "pixel_decoder",
    "decoder_width": 16,
    "codebook_tokens": 3,
    "clip_resize": 80,
    "image_pool": 2,
    "overlap_weight": 2,
    "freeze": "image_neck||sam_prompt_encoder",  # as the authors
    "dataset": "multi_reason_seg||vqa",
    "refer_seg_data": "",
    "val_dataset": "MultiReasonSeg|val",
    "model_max_length": 512,
}


@pytest.fixture(scope="module")
def muse(tmp_path_factory) -> Path:
    """Demo data of all types, MUSE among them."""
    folder = tmp_path_factory.mktemp("muse")
    assert make_demo_data.main(["--out", str(folder), "--train", "8", "--val", "4", "--test", "2", "--all_types"]) == 0
    return folder


@pytest.fixture
def draw_otherwise(monkeypatch):
    """A call, after which new decoders get other weights, as from another version of torch."""

    def change() -> None:
        reset = PixelDecoder.reset_parameters

        def otherwise(decoder: PixelDecoder) -> None:
            torch.manual_seed(99)
            reset(decoder)

        monkeypatch.setattr(PixelDecoder, "reset_parameters", otherwise)

    return change


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_becomes_a_model_that_evaluates_and_chats(tmp_path, base, muse, capsys, precision, draw_otherwise):
    flags = arguments(base, muse, tmp_path, precision=precision, **PIXELLM)
    assert train_ds.main(flags) == 0
    run = tmp_path / "run"
    texts = [line["text"] for line in log_lines(run, "train")]
    assert len(texts) == 6
    assert texts[-1] < texts[0]
    [start] = log_lines(run, "start")
    parts = {name: trained for name, (_, trained) in start["parameters"].items() if trained}
    assert parts.keys() == {"lora", "phi", "projector", "mask_projector", "sam_mask_decoder", "embed_tokens", "lm_head"}

    held = {plain_name(name): value for name, value in trained_weights(find_checkpoint(run, "latest")).items()}
    states = {}
    draw_otherwise()
    for kind, extra in (("merged", []), ("adapter", ["--adapter_only"])):
        assert merge_lora.main(["--checkpoint", str(run), "--output", str(run / kind), *extra]) == 0
        states[kind] = load_pretrained(run / kind)[0].state_dict()
    assert states["merged"].keys() == states["adapter"].keys()
    assert all(torch.equal(value, states["adapter"][name]) for name, value in states["merged"].items())
    of_decoder = [name for name in states["merged"] if name.startswith("visual_model.")]
    assert held.keys() >= set(of_decoder)  # frozen parts and buffers, too

    model, processor = load_pretrained(run / "merged")
    image = Image.open(next((muse / "reason_seg").rglob("*.jpg")))
    photo = tmp_path / "photo.png"
    image.save(photo)
    [[prediction]] = predict(model, processor, [np.asarray(image)], [[Turn("a?", "[SEG], [SEG].")]])
    assert prediction.mask_logits.shape == (2, image.height, image.width)
    evaluation = import_module("test")
    where = ["--version", str(run / "merged"), "--dataset_dir", str(muse)]
    out = tmp_path / "results"
    assert evaluation.main([*where, "--val_dataset", "MultiReasonSeg|val", "--limit", "2", "--output", str(out)]) == 0
    assert json.loads(next(out.rglob("*.json")).read_text())
    study = [
        "--val_dataset",
        "MultiReasonSeg|val",
        "--limit",
        "2",
        "--samples",
        "0",
        "--output",
        str(tmp_path / "study"),
    ]
    assert analyze.main([*where, *study]) == 0
    assert "SEG_prompt_" in (table := (tmp_path / "study/table_2.csv").read_text())
    assert "M_prompt_" not in table
    capsys.readouterr()
    ask = ["--image", str(photo), "--prompt", "Where is it?", "--max_new_tokens", "4"]
    assert chat.main(["--version", str(run / "merged"), *ask]) == 0
    assert "[SEG0]" not in capsys.readouterr().out


@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_run_keeps_the_frozen_weights_that_it_drew(tmp_path, base, muse, draw_otherwise, stage):
    zero = ROOT / f"configs/deepspeed/zero{stage}.json"
    settings = PIXELLM | {"deepspeed_config": zero, "no_eval": "true"}
    assert train_ds.main(arguments(base, muse, tmp_path, epochs=1, **settings)) == 0
    before = trained_weights(find_checkpoint(tmp_path / "run"))
    draw_otherwise()
    assert train_ds.main(arguments(base, muse, tmp_path, epochs=2, auto_resume="true", **settings)) == 0
    after = trained_weights(find_checkpoint(tmp_path / "run"))
    for part in ("image_feature_neck.0.weight", "prompt_encoder.no_mask_embed.weight", "mask_decoder.pe1."):
        [name] = [name for name in after if f"visual_model.{part}" in name]
        assert torch.equal(after[name], before[name]), name


def test_a_finished_model_is_trained_on(tmp_path, base, muse, capsys):
    first = arguments(base, muse, tmp_path, exp_name="first", epochs=1, no_eval="true", **PIXELLM)
    assert train_ds.main(first) == 0
    merged = tmp_path / "first/merged"
    assert merge_lora.main(["--checkpoint", str(tmp_path / "first"), "--output", str(merged)]) == 0
    again = {"version": merged, "vision_tower": "", "vision_pretrained": "", "exp_name": "again", "no_eval": "true"}
    settings = PIXELLM | again | {"epochs": 1, "lr": 0}
    kept = ("mask_decoder", "decoder_width", "codebook_tokens", "clip_resize", "image_pool")
    flags = {name: value for name, value in settings.items() if name not in kept}
    assert train_ds.main(arguments(base, muse, tmp_path, **flags)) == 0  # what it was trained for needs no flag
    again_merged = tmp_path / "again/merged"
    assert merge_lora.main(["--checkpoint", str(tmp_path / "again"), "--output", str(again_merged)]) == 0
    before, after = (load_pretrained(folder)[0].state_dict() for folder in (merged, again_merged))
    assert all(torch.equal(value, after[name]) for name, value in before.items() if name != "ppm.baseline")
    wrong = arguments(base, muse, tmp_path, **(flags | {"exp_name": "wrong", "image_pool": 4}))
    assert train_ds.main(wrong) == 2
    assert "--image_pool: 4 contradicts" in capsys.readouterr().err
