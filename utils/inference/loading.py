"""Loading a model with its processor, and asking it: what chat, evaluation and training share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from model.loading.formats import Release, release_of
from model.loading.weights import (
    Loaded,
    fingerprint,
    format_report,
    grow_vocabulary,
    load_base,
    load_released,
    read_json,
    report,
)
from model.processing.conversation import SYSTEM_PROMPT
from model.processing.processor import UGroundProcessor
from model.processing.tokens import IMAGE, add_special_tokens, load_tokenizer, token_ids
from model.sam_cache import FeatureCache
from model.structures import Prediction, Turn
from model.UGround import UGroundForCausalLM
from utils.config import config_from
from utils.inference import adapter

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_for_training(
    version: str,
    vision_tower: str,
    vision_pretrained: str,
    precision: str = "bf16",
    settings: dict | None = None,
    max_tokens: int = 2048,
) -> tuple[UGroundForCausalLM, UGroundProcessor, list[Loaded]]:
    """UGround from base weights: a LLaVA-1.5 folder, a CLIP folder, a SAM ``.pth``.

    Args:
        precision: ``fp32``, ``bf16`` or ``fp16``.
        settings: of ``UGroundConfig`` (layer_selection, loss weights, ...).
        max_tokens: longest row of one conversation (``--model_max_length``).

    Returns:
        the model, its processor, and the rows of the loading report.

    Raises:
        ValueError: for wrong paths, weights that do not fit, or a tokenizer without the special tokens.
    """
    model, rows = load_base(version, vision_tower, vision_pretrained, PRECISIONS[precision], settings or {})
    tokenizer = load_tokenizer(version)
    known = len(tokenizer)
    add_special_tokens(tokenizer)
    grow_vocabulary(model, known, len(tokenizer))
    config, sam_side = model.config, model.visual_model.shape.image_size
    system_prompt = read_json(Path(version), "--version").get("system_prompt", SYSTEM_PROMPT)
    processor = UGroundProcessor(tokenizer, config.clip_side, config.clip_patch, sam_side, system_prompt, max_tokens)
    ids = processor.tokens
    config.seg_token_id, config.rej_token_id = ids.seg, ids.rej
    config.eos_token_id, config.pad_token_id = ids.eos, ids.pad
    return model, processor, rows


def load_pretrained(
    folder: str,
    precision: str = "fp32",
    device: str = "cpu",
    vision_tower: str = "",
    base: str = "",
    vision_pretrained: str = "",
) -> tuple[UGroundForCausalLM, UGroundProcessor]:
    """A folder that ``scripts/merge_lora.py`` (or ``save_pretrained``) wrote, an adapter, or a published checkpoint.

    Args:
        vision_tower: folder of CLIP for a published checkpoint, which holds none; others need it not.
        base, vision_tower, vision_pretrained: LLaVA, CLIP and SAM for an adapter whose base has moved.

    Raises:
        ValueError: if the folder is none of these, or its weights are not complete.
    """
    transformers_logging.disable_progress_bar()  # noise where the output is a file
    if adapter.is_adapter(folder):
        moved = {"version": base, "vision_tower": vision_tower, "vision_pretrained": vision_pretrained}
        model, processor = _load_adapter(Path(folder), {name: path for name, path in moved.items() if path})
        cast_parameters(model, precision)
        return model.to(device), processor  # type: ignore[arg-type]
    raw = read_json(Path(folder), "--version")
    if release := release_of(raw):
        released: Any
        tower = vision_tower or raw.get("mm_vision_tower", "")
        released, processor = _load_released(folder, release, tower, precision)
        return released.to(device), processor
    if raw.get("model_type") != "uground":
        raise ValueError(
            f"--version: {folder} is of type {raw.get('model_type')!r}, not a UGround model; "
            "merge a trained run with scripts/merge_lora.py first"
        )
    processor = UGroundProcessor.from_pretrained(folder)
    loaded: Any = UGroundForCausalLM.from_pretrained(
        folder,
        dtype=PRECISIONS[precision],
        output_loading_info=True,
        local_files_only=True,
        ignore_mismatched_sizes=True,  # they are named below
    )
    model, info = loaded  # a pair, which transformers' annotation does not say
    problems = {
        kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]
    }
    if problems:
        raise ValueError(f"--version: the weights in {folder} do not fit: {problems}")
    for what, ours, theirs in (
        ("[SEG]", model.config.seg_token_id, processor.tokens.seg),
        ("[REJ]", model.config.rej_token_id, processor.tokens.rej),
        ("clip_fit", model.config.clip_fit, processor.clip_fit),
    ):
        if ours != theirs:
            raise ValueError(f"--version: {folder}: {what} is {ours} in config.json, {theirs} in the processor's files")
    return model.to(device).eval(), processor


def _load_adapter(folder: Path, moved: dict[str, str]) -> tuple[UGroundForCausalLM, UGroundProcessor]:
    meta = adapter.read_meta(folder)
    config = config_from(meta["config"] | {"model": meta["config"]["model"] | moved}, str(folder / adapter.META))
    paths = (config.model.version, config.model.vision_tower, config.model.vision_pretrained)
    if absent := [path for path in paths if not Path(path).exists()]:
        raise ValueError(
            f"--version: the base of the adapter {folder} is not here: {', '.join(absent)}. {adapter.WHERE}"
        )
    model, _, rows = load_for_training(*paths, config.model.precision, config.method)
    adapter.check_base(folder, meta, rows)
    adapter.apply(model, folder, meta)
    return model.eval(), UGroundProcessor.from_pretrained(folder)


def _load_released(
    folder: str, release: Release, vision_tower: str, precision: str
) -> tuple[UGroundForCausalLM, UGroundProcessor]:
    if not vision_tower or not Path(vision_tower).is_dir():
        raise ValueError(
            f"--version: {folder} is a published checkpoint, which holds no CLIP; give --vision_tower, "
            f"the folder of the tower that it was trained with ({vision_tower or 'its configuration has no name'})"
        )
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([IMAGE], special_tokens=True)  # stands where features are put in; has no embedding
    ids = token_ids(tokenizer, f"--version: the tokenizer of {folder}")
    settings = {"seg_token_id": ids.seg, "rej_token_id": ids.rej, "eos_token_id": ids.eos, "pad_token_id": ids.pad}
    model, _ = load_released(folder, vision_tower, PRECISIONS[precision], settings)
    config = model.config
    if (largest := max(ids.seg, ids.rej or 0, ids.im_start, ids.im_end)) >= config.vocab_size:
        raise ValueError(
            f"--version: {folder}: the tokenizer has a token {largest}, the model embeds {config.vocab_size}; they are "
            "of different checkpoints"
        )
    sides = config.clip_side, config.clip_patch, model.visual_model.shape.image_size
    return model, UGroundProcessor(tokenizer, *sides, release.system_prompt, clip_fit=config.clip_fit)


def cast_parameters(model: torch.nn.Module, precision: str) -> None:
    """Parameters alone: buffers (the policy's baseline, rotary frequencies) stay in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(PRECISIONS[precision])


def cache_sam_features(model: UGroundForCausalLM, processor: UGroundProcessor, folder: str, gigabytes: float) -> None:
    """From now on SAM's image embeddings are kept in a folder (``--sam_feature_cache``)."""
    encoder = model.visual_model.image_encoder
    model.visual_model.cache = FeatureCache(folder, gigabytes, fingerprint(encoder.state_dict().values()))
    processor.hash_images = True


def describe(model: UGroundForCausalLM, source: str) -> str:
    """The loading report of a complete folder."""
    return format_report(report(model, dict.fromkeys((name for name, _ in model.named_children()), source)))


def predict(
    model: UGroundForCausalLM,
    processor: UGroundProcessor,
    images: Sequence[np.ndarray],
    turns: Sequence[Sequence[Turn]],
    numbers: Sequence[int] | None = None,
    **options,
) -> list[list[Prediction]]:
    """Asks every question about every image: [image][question] predictions with their text.

    Args:
        images, turns, numbers: of ``UGroundProcessor.prompts``.
        options: of ``UGroundForCausalLM.predict`` (layer_policy, max_new_tokens, seed, on_token).
    """
    was_training = model.training
    model.eval()
    batch = processor.prompts(images, turns, numbers).to(model.device, model.dtype)
    predictions = with_text(model.predict(batch, **options), processor)
    model.train(was_training)
    return predictions


def with_text(predictions: list[list[Prediction]], processor: UGroundProcessor) -> list[list[Prediction]]:
    """Decodes what was said into each prediction's ``text``."""
    for row in predictions:
        for prediction in row:
            prediction.text = processor.decode(prediction.token_ids)
    return predictions
