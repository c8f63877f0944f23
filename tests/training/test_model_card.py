"""The card says how this model's masks come about, and asks for no file that it does not need."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCardData
from yaml import safe_load

from model import layer_rules
from utils.config import load_config, to_dict
from utils.training.model_card import LAYERS, model_card

ROOT = Path(__file__).resolve().parents[2]
START = {"version": "bases/llava", "vision_tower": "bases/clip", "vision_pretrained": "bases/sam.pth"}


def settings(name: str) -> dict:
    """Of a configuration of ``configs/``, started from base weights."""
    config = to_dict(load_config(["--config", str(ROOT / f"configs/{name}.yaml"), "--dataset_dir", "d"]))
    has_sam = config["decoder"]["mask_decoder"] == "segment_anything"
    config["model"] |= START | {"vision_pretrained": START["vision_pretrained"] * has_sam}
    return config


def card(config: dict) -> str:
    """The card of an adapter that was trained with these settings."""
    meta = {"base": {"model": "f1", "vision_tower": "f2"}, "config": config, "data": [], "metrics": {}, "step": 1}
    return model_card("mine", meta | {"processes": 1, "commit": "c0ffee", "versions": {"torch": "2"}}, adapter=True)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("methods/uground", "the transformer layer that a policy chooses gives the similarity map that prompts SAM."),
        ("methods/lisa", "the last transformer layer gives the hidden state that prompts SAM."),
        ("methods/read", "the last transformer layer gives the similarity map that prompts SAM."),
        ("methods/pixellm", "the last transformer layer gives the hidden state that prompts PixelLM's pixel decoder."),
    ],
)
def test_a_card_describes_its_own_model(name, sentence):
    text = card(settings(name))
    has_sam = name != "methods/pixellm"
    assert f"for each of them, {sentence}" in text
    assert ("SAM" in text.replace("SAME", "")) == has_sam
    assert ("--vision_pretrained SAM" in text) == has_sam
    assert "--base BASE_FOLDER --vision_tower CLIP_FOLDER" in text
    assert ("sam" in ModelCardData(**safe_load(text.split("---")[1])).tags) == has_sam


def test_every_rule_of_training_has_its_words():
    assert LAYERS.keys() == {kind.name for kind in layer_rules.rules_for("training")}


def test_a_run_of_older_code_is_described():
    """Its settings lack what came later."""
    config = settings("methods/uground")
    del config["decoder"], config["ppm"]["point_prompts"]
    assert "gives the similarity map that prompts SAM." in card(config)
