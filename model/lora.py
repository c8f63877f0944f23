"""What trains: LoRA, the rows of added tokens, and the modules that train in full; for training and merging."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from model.config import GroundingConfig
from model.grounding import GroundingModel
from model.loading.adapter import ROWS

PARTS = {  # what the name of a parameter contains -> its part
    "text_hidden_fcs.": "phi",
    "ppm.": "gate",
    "visual_model.mask_decoder.conv_s": "sam_image_encoder",  # SAM 2's run with the encoder, and are cached with it
    "visual_model.mask_decoder.": "sam_mask_decoder",
    "visual_model.prompt_encoder.": "sam_prompt_encoder",
    "visual_model.image_encoder.": "sam_image_encoder",
    "visual_model.vision_encoder.": "sam_image_encoder",
    "visual_model.no_memory_embedding": "sam_image_encoder",
    "visual_model.out_mm_projector.": "mask_projector",
    "visual_model.image_feature_neck.": "image_neck",
    ".visual.merger.": "projector",  # Qwen-VL's
    ".visual.deepstack_merger_list.": "projector",
    "multi_modal_projector.": "projector",  # InternVL3's
    "model.visual.": "vision_tower",
    "model.vision_tower.": "vision_tower",
    "vision_tower.": "clip",
    "mm_projector.": "projector",
    "embed_tokens.": "embed_tokens",
    "lm_head.": "lm_head",
    "model.language_model.": "language_model",
}


def part_of(name: str) -> str:
    """Name of the model's part that a parameter belongs to, for reports and gradient norms."""
    if "lora_" in name:
        return "lora"
    plain = name.removeprefix("base_model.model.")  # of peft; LLaVA's tower is no part of its ``model``
    return next((part for key, part in PARTS.items() if key in plain), "llama")


def trains_in_full(name: str, config: GroundingConfig) -> bool:
    """Whether a parameter trains beside LoRA: phi, SAM's prompt encoder and mask decoder, embeddings, lm_head, gate.

    With PixelLM's decoder also what stands before it, and LLaVA's projector where CLIP's input has another side.

    Parts that the settings leave unused stay frozen: parameters without a gradient are not counted as trainable.
    """
    part = part_of(name)
    if part == "phi":
        return config.seg_prompt
    if part == "gate":
        gate = config.selection.gate
        return gate == "policy" if "ppm.critic." in name else bool(gate)
    if part == "sam_prompt_encoder":
        used = [".mask_downscaling.", ".mask_embed."] if config.mask_prompt else [".no_mask_embed."]
        if config.point_prompts:
            used += [".point_embeddings.0.", ".point_embeddings.1.", ".point_embed.", ".not_a_point_embed."]
        return any(key in name for key in used)
    if part == "projector":
        return bool(config.clip_resize)  # it knows CLIP's states at the side that the tower was trained with
    if "mask_decoder.pred_obj_score_head." in name:  # SAM 2's rates frames of a video
        return False
    return part in ("sam_mask_decoder", "mask_projector", "image_neck", "embed_tokens", "lm_head")


def add_lora(
    model: PreTrainedModel,
    r: int,
    alpha: int = 16,
    dropout: float = 0.05,
    targets: str = "q_proj,v_proj",
    token_rows: Sequence[int] = (),
    frozen: Collection[str] = (),
) -> PreTrainedModel | PeftModel:
    """Wraps the model with LoRA on the language model's projections, and sets ``requires_grad`` of all parameters.

    Args:
        r: rank; 0 = no LoRA (only the parts that train in full).
        alpha, dropout: of LoRA, as in peft.
        targets: comma-separated projections of the language model's attention.
        token_rows: ids of the tokens whose rows of the embeddings and ``lm_head`` train; () = both tables in full.
        frozen: parts that do not train, of ``model.settings.FREEZABLE``.

    Returns:
        the ``PeftModel``, or ``model`` itself with r = 0.

    Raises:
        ValueError: if a target names no module of the language model, or there are ``token_rows`` and r = 0.
    """
    names = [name.strip() for name in targets.split(",") if name.strip()]
    known = {"q_proj", "k_proj", "v_proj", "o_proj"}
    if unknown := set(names) - known:
        raise ValueError(f"lora_target_modules: {sorted(unknown)} unknown; choose from {sorted(known)}")
    if token_rows and not r:
        raise ValueError("train_tables new needs LoRA, whose library trains the rows; set lora_r, or train_tables full")
    adapted: PreTrainedModel | PeftModel = model
    if r > 0:
        pattern = rf"{base_of(model).lora_layers}\.({'|'.join(names)})"
        tables = ("embed_tokens",) if model.config.tie_word_embeddings else ("embed_tokens", "lm_head")
        rows = {table: list(token_rows) for table in tables} if token_rows else None
        config = LoraConfig(
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=pattern,
            bias="none",
            trainable_token_indices=rows,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft uses a deprecated name
            adapted = get_peft_model(model, config)
    set_trainable(adapted, frozen)
    return adapted


def base_of(model: nn.Module) -> GroundingModel:
    """The model inside a ``PeftModel``, or the model itself without LoRA."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def set_trainable(model: nn.Module, frozen: Collection[str] = ()) -> None:
    """Sets ``requires_grad`` of every parameter: LoRA's, and those of ``trains_in_full``, without ``frozen`` parts.

    Of tables whose rows peft trains (``ROWS``), these alone train.
    """
    config, names = base_of(model).config, dict(model.named_parameters())
    by_rows = {part_of(name) for name in names if ROWS in name}
    for name, parameter in names.items():
        part = part_of(name)
        trains = ROWS in name if part in by_rows else part == "lora" or trains_in_full(name, config)
        parameter.requires_grad = trains and part not in frozen


def parameters_by_part(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Part -> (number of its parameters, number of its trainable parameters)."""
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        part, size = part_of(name), getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves a shard here
        total, trained = counts.get(part, (0, 0))
        counts[part] = total + size, trained + size * parameter.requires_grad
    return counts
