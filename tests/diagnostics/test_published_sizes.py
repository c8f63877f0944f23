"""Sizes of published backbones, on the meta device: numbers of parameters, names of keys, shipped configurations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.backbones import BACKBONES
from model.loading.formats import renamed
from utils.config import load_config
from utils.diagnostics import memory_model
from utils.diagnostics.published_sizes import PUBLISHED, published

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {  # file -> backbone, side of a cell in pixels, LoRA's parameters: two matrices of rank 8 each for q and v
    "qwen2_5_vl_7b": ("Qwen2.5-VL-7B", 28, 28 * 8 * (3584 + 3584 + 3584 + 512)),
    "qwen3_vl_8b": ("Qwen3-VL-8B", 32, 36 * 8 * (4096 + 4096 + 4096 + 1024)),
    "internvl3_8b": ("InternVL3-8B", 28, 28 * 8 * (3584 + 3584 + 3584 + 512)),
}
KEYS = {  # of the files on the hub
    "Qwen2.5-VL-7B": (
        "visual.patch_embed.proj.weight",
        "visual.blocks.31.mlp.gate_proj.weight",
        "visual.merger.mlp.2.bias",
        "model.embed_tokens.weight",
        "model.layers.27.self_attn.k_proj.bias",
        "lm_head.weight",
    ),
    "Qwen3-VL-8B": (
        "model.visual.deepstack_merger_list.2.linear_fc2.weight",
        "model.visual.pos_embed.weight",
        "model.language_model.layers.35.self_attn.q_norm.weight",
        "lm_head.weight",
    ),
    "InternVL3-8B": (
        "language_model.model.layers.27.mlp.down_proj.weight",
        "language_model.lm_head.weight",
        "vision_tower.encoder.layer.23.attention.q_proj.bias",
        "vision_tower.embeddings.position_embeddings",
        "multi_modal_projector.linear_2.weight",
    ),
}


def built(name: str):
    known = PUBLISHED[name]
    with torch.device("meta"):
        return BACKBONES[known.backbone].model(BACKBONES[known.backbone].config(**known.sizes))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_backbone_has_the_published_number_of_parameters_and_keys(name):
    own = ("visual_model.", "text_hidden_fcs.", "ppm.")
    model = built(name)
    count = sum(p.numel() for key, p in model.named_parameters() if not key.startswith(own))
    assert count == PUBLISHED[name].parameters
    keys = dict.fromkeys(KEYS.get(name, ()), torch.zeros(0))
    assert set(renamed(keys, model.published_keys)) <= set(model.state_dict())


@pytest.mark.parametrize("file", CONFIGS)
def test_the_shipped_configurations_train_what_they_say(file):
    """LoRA, phi, the gate, the rows of the added tokens, and SAM 2's decoder with the mask prompt's convolutions."""
    name, cell, lora = CONFIGS[file]
    config = load_config(["--config", str(ROOT / f"configs/{file}.yaml")])
    plan, source = memory_model.plan_of(config)
    assert plan.shape.backbone == PUBLISHED[name].backbone == published(config.model.version).backbone
    assert source.endswith("as published, with SAM 2.1 facebook/sam2.1-hiera-large, assumed: the files are not here")
    width = plan.shape.text.hidden_size
    phi, gate, rows = width * (width + 1) + (width + 1) * 256, plan.shape.num_layers * width, 2 * 4 * width
    decoder = plan.trainable - lora - phi - gate - rows
    assert 4_000_000 < decoder < 4_300_000
    reader = plan.shape.new_reader()
    tokens = reader.plan([(480, 640)])
    (height, width), count = tokens.grids[0], tokens.lengths[0]
    if name == "InternVL3-8B":
        assert (tokens.cells.shape[1], height, width) == (1792, 32, 48)
    else:
        assert (height, width) == (round(480 / cell), round(640 / cell))
        assert (tokens.cells.shape[1], count) == (height * width, max(height, width))
    assert reader.plan([(3000, 4000)]).cells.shape[1] <= plan.shape.max_image_tokens


def test_other_names_are_not_taken_for_llava(capsys):
    config = load_config(["--config", str(ROOT / "configs/qwen2_5_vl_7b.yaml"), "--version", "Qwen/Qwen2.5-VL-72B"])
    with pytest.raises(ValueError, match=r"Qwen2.5-VL-72B: the weights are not here, .* one of Qwen2.5-VL-3B"):
        memory_model.plan_of(config)
