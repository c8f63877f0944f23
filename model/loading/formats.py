"""Formats of published checkpoints: how to recognize them, their settings, and the renaming of their keys.

A renaming rule is (published prefix, this project's prefix). The first one that matches a key applies; None drops the
tensor. docs/weights.md has the sources for each format.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from model.processing.template import HUMAN_SYSTEM_PROMPT, SYSTEM_PROMPT
from model.settings import RECIPES

Rules = tuple[tuple[str, str | None], ...]

# LLaVA's own code, and the released checkpoints of UGround and related methods, which are built on it
LLAVA: Rules = (
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower."),  # in LLaVA-1.6 and in unmerged checkpoints
    ("model.mm_projector.", "mm_projector."),
    ("model.out_mm_projector.", None),  # UGround's second projector, which nothing uses
    ("model.decoder_modules_initialized", None),  # a flag of UGround's code
    ("model.image_newline", None),  # LLaVA-1.6: separates rows of image tiles, which this project does not use
    ("model.visual_model.", "visual_model."),
    ("model.text_hidden_fcs.", "text_hidden_fcs."),
    ("ppm._layer_gate_W_similarity", "ppm.gate"),
)
# PixelLM: no SAM; here its decoder and what stands before it are one module (model/PixelLM.py of MaverickRen/PixelLM)
PIXELLM: Rules = (
    *(
        (f"model.{part}.", f"visual_model.{part}.")
        for part in ("out_mm_projector", "image_feature_neck", "prompt_encoder", "mask_decoder")
    ),
    *LLAVA,
)
# LlavaForConditionalGeneration: files written before transformers 4.52, and since
LLAVA_TRANSFORMERS: Rules = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.vision_model.", "vision_tower."),
    ("multi_modal_projector.linear_1.", "mm_projector.0."),
    ("multi_modal_projector.linear_2.", "mm_projector.2."),
    ("image_newline", None),
    ("model.language_model.", "model."),
    ("model.vision_tower.vision_model.", "vision_tower."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.linear_1.", "mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "mm_projector.2."),
    ("model.image_newline", None),
)
# transformers' SamModel -> segment-anything: regular expressions, applied in this order
SAM_TRANSFORMERS = (
    (r"^vision_encoder\.layers\.(\d+)\.layer_norm", r"image_encoder.blocks.\1.norm"),
    (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
    (r"^vision_encoder\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
    (r"^vision_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
    (r"^vision_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
    (r"^vision_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
    (r"^vision_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
    (r"^vision_encoder\.", "image_encoder."),
    (
        r"^(prompt_encoder\.shared_embedding|shared_image_embedding)\.positional_embedding$",  # one matrix, two places
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
    (r"\.point_embed\.", ".point_embeddings."),
    (r"\.mask_embed\.conv1\.", ".mask_downscaling.0."),
    (r"\.mask_embed\.layer_norm1\.", ".mask_downscaling.1."),
    (r"\.mask_embed\.conv2\.", ".mask_downscaling.3."),
    (r"\.mask_embed\.layer_norm2\.", ".mask_downscaling.4."),
    (r"\.mask_embed\.conv3\.", ".mask_downscaling.6."),
    (r"\.layer_norm_final_attn\.", ".norm_final_attn."),
    (r"\.layer_norm([1-4])\.", r".norm\1."),
    (r"\.upscale_conv1\.", ".output_upscaling.0."),
    (r"\.upscale_layer_norm\.", ".output_upscaling.1."),
    (r"\.upscale_conv2\.", ".output_upscaling.3."),
    (r"(_mlps\.\d+|_head)\.layers\.0\.", r"\1.layers.1."),
    (r"(_mlps\.\d+|_head)\.proj_in\.", r"\1.layers.0."),
    (r"(_mlps\.\d+|_head)\.proj_out\.", r"\1.layers.2."),
)
# what transformers' models of SAM 2 and SAM 3 for videos have beside those for images
MEMORY = (
    "memory_attention.",
    "memory_encoder.",
    "memory_temporal_positional_encoding",
    "no_memory_positional_encoding",
    "no_object_pointer",
    "mask_downsample.",
    "object_pointer_proj.",
    "temporal_positional_encoding_projection_layer.",
    "occlusion_spatial_embedding_parameter",
)
VIDEO: Rules = tuple((name, None) for name in MEMORY)
# Sam3VideoModel, where the tracker has a neck of its own on the detector's encoder. transformers 5 writes the prefix of
# the tracker once more, also for the tracker alone.
TRACKER = ("tracker_model.tracker_model.", "tracker_model.", "")
SAM3: Rules = (
    *(
        (prefix + name, new)
        for prefix in TRACKER
        for name, new in (
            ("detector_model.vision_encoder.backbone.", "vision_encoder.backbone."),
            ("tracker_neck.", "vision_encoder.neck."),
            *VIDEO,
        )
    ),
    ("detector_model.", None),
    *((prefix, "") for prefix in TRACKER),
)
COMPUTED = ("rotary_emb.inv_freq", "vision_model.embeddings.position_ids")  # not weights, but stored in older files


@dataclass(frozen=True)
class Release:
    """A method whose published checkpoints can be loaded.

    Attributes:
        name: of the method.
        settings: of ``UGroundConfig`` that reproduce it.
        system_prompt: of its conversations.
        absent: prefixes of keys that its files may lack.
        rules: of its keys.
        shifted_positions: how CLIP's position embeddings were resized (``weights.fit_positions``).
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    system_prompt: str = HUMAN_SYSTEM_PROMPT
    absent: tuple[str, ...] = ("ppm.",)
    rules: Rules = LLAVA
    shifted_positions: bool = False


LISA = {"layer_selection": "last", "mask_prompt": False, "clip_fit": "crop"}  # the [SEG] token alone prompts SAM
PIXEL = {"layer_selection": "last", "mask_prompt": False, "mask_decoder": "pixel_decoder", "image_pool": 2}
READ = LISA | {"point_prompts": 30, "point_rule": "read_7b"}
RELEASES = {  # by the architecture that config.json names; docs/weights.md says where each line comes from
    "UGroundForCausalLM": Release("UGround", RECIPES["released"], absent=("ppm.baseline",)),
    "LISAForCausalLM": Release("LISA", LISA),
    "LisaGSVAForCausalLM": Release("GSVA", LISA),
    "SESAMEForCausalLM": Release("SESAME", LISA, SYSTEM_PROMPT),
    "READForCausalLM": Release("READ", READ, SYSTEM_PROMPT),
    "PixelLMForCausalLM": Release("PixelLM", PIXEL, rules=PIXELLM, shifted_positions=True),
}
UGROUND_MODES = {  # mode in UGround's published configurations -> settings for the layers of the map and of phi's input
    1: {"layer_selection": "last"},
    2: {"phi_layer": "last"},
    3: {},
}


def renamed(state: dict[str, torch.Tensor], rules: Rules) -> dict[str, torch.Tensor]:
    """The tensors under this project's names, without computed buffers such as rotary frequencies."""
    result = {}
    for key, value in state.items():
        if key.endswith(COMPUTED):
            continue
        old_prefix, new_prefix = next((rule for rule in rules if key.startswith(rule[0])), ("", ""))
        if new_prefix is not None:
            result[new_prefix + key.removeprefix(old_prefix)] = value
    return result


def below(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of one part, without its prefix."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def sam_renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A transformers SamModel's tensors under segment-anything's names."""
    result = {}
    for key, value in state.items():
        for pattern, replacement in SAM_TRANSFORMERS:
            key = re.sub(pattern, replacement, key)
        result[key] = value
    return result


def llava_config(config: dict) -> dict:
    """A LLaVA's ``config.json`` in the flat form of LLaVA's own code, from that or from transformers' nested form."""
    if "text_config" not in config:
        return config
    vision = CLIPVisionConfig(**config["vision_config"])
    return LlamaConfig(**config["text_config"]).to_dict() | {
        "model_type": config["model_type"],
        "mm_hidden_size": vision.hidden_size,
        "mm_vision_select_layer": config.get("vision_feature_layer", -2),
        "mm_image_size": vision.image_size,
    }


def tower_side(config: dict) -> int | None:
    """Side in pixels of the images that a LLaVA was trained with; None if its flat configuration does not say."""
    if "mm_image_size" in config:
        return config["mm_image_size"]
    name = re.search(r"clip-vit-(?:base|large)-patch\d+(?:-(\d+))?/?$", str(config.get("mm_vision_tower", "")))
    return int(name[1] or 224) if name else None


def release_of(config: dict) -> Release | None:
    """The method whose published checkpoint has this ``config.json``; None for bases and folders of this project."""
    if config.get("model_type") == "uground":
        return None
    names = config.get("architectures")
    known = [RELEASES[name] for name in names if str(name) in RELEASES] if isinstance(names, list) else []
    return known[0] if known else None


def released_settings(release: Release, config: dict) -> dict[str, Any]:
    """Settings of ``UGroundConfig`` that reproduce the published checkpoint with this ``config.json``.

    Raises:
        ValueError: for LLaMA-2's prompt template, or an unknown mode of UGround.
    """
    settings = dict(release.settings)
    if release.name == "READ" and config.get("num_hidden_layers") == 40:
        settings |= {"point_prompts": 60, "point_rule": "read_13b"}
    if release.name == "PixelLM":  # on LLaMA-2, too, it was trained with this template (train_ds.py, --conv_type)
        return settings | {"clip_resize": config.get("resize_vision_tower_size", 448)}
    on_llava_1 = config.get("mm_projector_type", "linear") == "linear"
    if on_llava_1 and config.get("max_position_embeddings", 2048) > 2048:
        raise ValueError(
            f"{release.name} on LLaMA-2 (max_position_embeddings {config['max_position_embeddings']}) was trained with "
            "LLaMA-2's prompt template, which this project does not have; use a checkpoint on Vicuna"
        )
    if release.name == "UGround":
        mode = config.get("mode", 3)
        if mode not in UGROUND_MODES:
            raise ValueError(f"mode {mode!r} of the published configuration is unknown; known: {sorted(UGROUND_MODES)}")
        settings |= UGROUND_MODES[mode] | ({} if config.get("eval_legacy", True) else {"eval_layer_policy": "sample"})
    return settings
