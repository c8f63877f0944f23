"""Tiny random models of SAM 2 and SAM 3's tracker, and UGround models whose masks they decode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Sam2Config, Sam2Model, Sam3TrackerConfig, Sam3TrackerModel

from model.backbones.llava import ClipReader
from model.config import UGroundConfig
from model.loading.mask_decoders import read_decoder
from model.processing.processor import UGroundProcessor
from model.UGround import UGroundForCausalLM
from utils.demo.tiny_model import clip_config, llama_settings

SIDE, WIDTH = 128, 32
PROMPT = {"hidden_size": WIDTH, "image_size": SIDE, "patch_size": 16, "mask_input_channels": 8}
DECODER = {"hidden_size": WIDTH, "mlp_dim": 48, "num_attention_heads": 4, "iou_head_hidden_dim": 24}
GRIDS = [[32, 32], [16, 16], [8, 8]]


def sam2_config(**changes: Any) -> Sam2Config:
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "image_size": [SIDE, SIDE],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 24, 32],
        "num_attention_heads_per_stage": [1, 2, 2, 2],
        "window_size_per_stage": [4, 2, 4, 2],
        "global_attention_blocks": [3],
    }
    vision = {
        "model_type": "sam2_vision_model",
        "backbone_config": backbone,
        "backbone_channel_list": [32, 24, 16, 8],
        "backbone_feature_sizes": GRIDS,
        "fpn_hidden_size": WIDTH,
    }
    parts = {"vision_config": vision, "prompt_encoder_config": PROMPT, "mask_decoder_config": DECODER}
    return Sam2Config(**parts | changes)


def tracker_config(scale_factors: tuple[float, ...] = (4.0, 2.0, 1.0), **changes: Any) -> Sam3TrackerConfig:
    backbone = {
        "model_type": "sam3_vit_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 16,
        "pretrain_image_size": 32,
        "window_size": 2,
        "global_attn_indexes": [1],
    }
    vision = {
        "model_type": "sam3_vision_model",
        "backbone_config": backbone,
        "backbone_feature_sizes": GRIDS,
        "fpn_hidden_size": WIDTH,
        "scale_factors": list(scale_factors),
    }
    parts = {"vision_config": vision, "prompt_encoder_config": PROMPT, "mask_decoder_config": DECODER}
    return Sam3TrackerConfig(**parts | changes)


CONFIGS: dict[str, Callable[..., Any]] = {"sam2": sam2_config, "sam3_tracker": tracker_config}
MODELS: dict[str, Callable[[Any], PreTrainedModel]] = {"sam2": Sam2Model, "sam3_tracker": Sam3TrackerModel}


def make_source(name: str, config: Any = None, seed: int = 0) -> Any:
    """transformers' own model with random weights, of which no two scales, and no two prompts, are alike."""
    torch.manual_seed(seed)
    source: Any = MODELS[name](config or CONFIGS[name]()).eval()
    with torch.no_grad():
        for key, parameter in source.named_parameters():
            if parameter.dim() > 1 and "norm" not in key:
                parameter.normal_(std=0.3 if "mask_decoder" in key or "embed" in key else 0.1)
        matrix = torch.randn_like(source.shared_image_embedding.positional_embedding)
        source.shared_image_embedding.positional_embedding.copy_(matrix)
        source.prompt_encoder.shared_embedding.positional_embedding.copy_(matrix)
    return source


def write_source(folder: Path, name: str, config: Any = None) -> Path:
    make_source(name, config).save_pretrained(folder)
    return folder


def make_stretched_processor(tokenizer: Any, name: str) -> UGroundProcessor:
    pixels = {"sam2": "stretch", "sam3_tracker": "stretch_to_one"}[name]
    return UGroundProcessor(tokenizer, ClipReader(40, 10), SIDE, "", sam_input=pixels)


def make_stretched(
    processor: UGroundProcessor, name: str, folder: Path, seed: int = 0, **settings
) -> UGroundForCausalLM:
    """A random model whose mask decoder is the one in ``folder``."""
    state, sizes = read_decoder(name, str(folder))
    torch.manual_seed(seed)
    config = UGroundConfig(
        vision_config=clip_config(side=40, patch=10, width=32, layers=3),
        seg_token_id=processor.tokens.seg,
        rej_token_id=processor.tokens.rej,
        mask_decoder=name,
        **llama_settings(len(processor.tokenizer), width=32, layers=4, heads=2),
        **sizes,
        **settings,
    )
    model = UGroundForCausalLM(config)
    torch.nn.init.normal_(model.ppm.gate, std=0.3)
    model.visual_model.load_state_dict(state)
    return model.eval()
