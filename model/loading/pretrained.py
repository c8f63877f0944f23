"""Loading of any model folder with its processor (``load``), and of base weights for training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from model.config import UGroundConfig
from model.loading import adapter, hub
from model.loading.files import blame
from model.loading.formats import release_of
from model.loading.placement import PRECISIONS, pick_device, pick_precision, place
from model.loading.weights import (
    LLAVA_TYPES,
    Loaded,
    fingerprint,
    grow_vocabulary,
    load_base,
    load_released,
    misfits,
    read_config,
    read_folder,
    run_of,
)
from model.opened import Opened
from model.processing.conversation import SYSTEM_PROMPT
from model.processing.processor import UGroundProcessor
from model.processing.tokens import IMAGE, add_special_tokens, load_tokenizer, token_ids
from model.UGround import UGroundForCausalLM

Kind = Literal["merged", "adapter", "released", "base", "run", "unknown"]
Parts = tuple[UGroundForCausalLM, UGroundProcessor, dict[str, str]]  # model, processor, module -> source of its weights


def kind_of(folder: str | Path) -> Kind:
    """The kind of a model folder, by its files and its ``config.json``.

    Returns:
        ``merged`` (of scripts/merge_lora.py or ``save_pretrained``), ``adapter`` (of ``merge_lora.py --adapter_only``),
        ``released`` (published by the authors of a method), ``base`` (a LLaVA), ``run`` (of train_ds.py, or a
        checkpoint in its folder), or ``unknown`` (another kind of model).

    Raises:
        ValueError: if the folder does not exist, or has no readable ``config.json``.
    """
    folder = Path(folder)
    if adapter.is_adapter(folder):
        return "adapter"
    if folder.is_dir() and not (folder / "config.json").is_file() and run_of(folder):
        return "run"
    config = read_config(folder, "--version")
    if release_of(config):
        return "released"
    if config.get("model_type") == "uground":
        return "merged"
    return "base" if config.get("model_type") in LLAVA_TYPES else "unknown"


def load(
    folder: str | Path,
    precision: str = "auto",
    device: str = "auto",
    *,
    vision_tower: str = "",
    base: str = "",
    vision_pretrained: str = "",
    quantize: str | None = None,
    device_map: str | None = None,
) -> Opened:
    """Loads a merged model, an adapter or a published checkpoint for inference.

    Args:
        folder: written by ``scripts/merge_lora.py``, with or without ``--adapter_only``, or a published checkpoint of
            UGround, LISA, GSVA, SESAME or READ; a path, or a repository of the hub (``hub.resolve_folder``).
        precision: ``fp32``, ``bf16``, ``fp16``, or ``auto`` = bf16 on a GPU, fp32 elsewhere.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, or ``auto`` = the GPU if there is one.
        vision_tower: folder of CLIP for a published checkpoint, which holds none; by default, what it names.
        base, vision_tower, vision_pretrained: LLaVA, CLIP and SAM for an adapter whose base has moved.
        quantize: ``8bit`` or ``4bit``, of the language model's layers, by bitsandbytes.
        device_map: ``auto`` = spread the language model's layers over all GPUs and main memory.

    Raises:
        ValueError: if the folder is of another kind, its weights are incomplete, or the device does not support the
            request. The message names the argument as a flag of chat.py and test.py.
    """
    transformers_logging.disable_progress_bar()  # clutters output that goes to a file
    device = pick_device(device)
    precision = pick_precision(precision, device)
    folder = hub.resolve_folder(folder, "--version").path
    kind = kind_of(folder)
    if kind not in LOADERS:
        model_type = read_config(folder, "--version").get("model_type")  # raises for a run, with the fix
        raise ValueError(
            f"--version: {folder / 'config.json'} is of type {model_type!r}, not a UGround model; "
            "merge a trained run with scripts/merge_lora.py first"
        )
    paths = {"version": base, "vision_tower": vision_tower, "vision_pretrained": vision_pretrained}
    paths = {name: path for name, path in paths.items() if path}
    model, processor, sources = LOADERS[kind](folder, precision, paths)
    sources = {module: hub.name_of(source) for module, source in sources.items()}
    weights_fingerprint = fingerprint(model.state_dict().values())  # before layers are quantized or offloaded
    place(model, device, quantize, device_map)
    precision_text = ", ".join(filter(None, (precision, quantize)))
    return Opened(model.eval(), processor, device, precision_text, weights_fingerprint, hub.name_of(folder), sources)


def _load_merged(folder: Path, precision: str, paths: dict[str, str]) -> Parts:
    with blame(f"--version: {folder / 'config.json'}"):
        UGroundConfig.from_pretrained(folder)  # before the tokenizer, which reads it, too
    if (generation := folder / "generation_config.json").is_file():
        with blame(f"--version: {generation}"):
            GenerationConfig.from_pretrained(folder)
    processor = UGroundProcessor.from_pretrained(folder)
    with blame("--version"):
        read_folder(folder)  # mapped, not read: transformers' errors name no file
    with blame(f"--version: {folder / 'config.json'} does not describe a model that can be built"):
        loaded: Any = UGroundForCausalLM.from_pretrained(
            folder,
            dtype=PRECISIONS[precision],
            output_loading_info=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported below
            trust_remote_code=False,
        )
    model, info = loaded  # transformers' annotation lacks the pair
    if problems := misfits(info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"]):
        raise ValueError(f"--version: {folder / 'config.json'} and the weights do not fit: {'; '.join(problems)}")
    for name, in_config, in_processor in (
        ("[SEG]", model.config.seg_token_id, processor.tokens.seg),
        ("[REJ]", model.config.rej_token_id, processor.tokens.rej),
        ("clip_fit", model.config.clip_fit, processor.clip_fit),
    ):
        if in_config != in_processor:
            raise ValueError(
                f"--version: {folder}: {name} is {in_config} in config.json, {in_processor} in the processor's files"
            )
    return model, processor, dict.fromkeys((name for name, _ in model.named_children()), str(folder))


def _load_adapter(folder: Path, precision: str, paths: dict[str, str]) -> Parts:
    meta = adapter.read_adapter_meta(folder)
    settings = meta["config"]["model"] | meta.get("resolved", {}) | paths
    base = settings["version"], settings["vision_tower"], settings["vision_pretrained"]
    if problems := hub.base_problems(*base, version_flag="--base"):
        raise ValueError(
            f"--version: the base of the adapter {folder} is not here: {'; '.join(problems)}. {adapter.WHERE}"
        )
    model, _, rows = load_for_training(*base, settings["precision"], adapter.settings_of(folder, meta))
    adapter.check_base(folder, meta, rows)
    adapter.apply(model, folder, meta)
    cast_parameters(model, precision)
    trained = {adapter.plain_name(name).split(".")[0] for name in meta["trained"]}
    sources = {
        row.module: f"{row.source}, trained parts of {hub.name_of(folder)}" if row.module in trained else row.source
        for row in rows
    }
    sources |= {row.module: str(folder) for row in rows if row.source == "new"}
    return model, UGroundProcessor.from_pretrained(folder), sources


def _load_released(folder: Path, precision: str, paths: dict[str, str]) -> Parts:
    raw_config = read_config(folder, "--version")
    release = release_of(raw_config)
    assert release is not None
    tower = paths.get("vision_tower") or str(raw_config.get("mm_vision_tower") or "")
    try:
        if not tower:
            raise ValueError("its configuration has no name")
        vision_tower = hub.resolve_folder(tower, "--vision_tower").path
    except ValueError as error:
        raise ValueError(
            f"--version: {folder} is a published checkpoint (config.json), which holds no CLIP; give --vision_tower, "
            f"the folder of the tower that it was trained with ({error})"
        ) from error
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([IMAGE], special_tokens=True)  # placeholder of image features; it has no embedding
    ids = token_ids(tokenizer, f"--version: the tokenizer of {folder}")
    settings = {"seg_token_id": ids.seg, "rej_token_id": ids.rej, "eos_token_id": ids.eos, "pad_token_id": ids.pad}
    model, sources = load_released(folder, raw_config, release, vision_tower, PRECISIONS[precision], settings)
    config = model.config
    if (largest := max(ids.seg, ids.rej or 0, ids.im_start, ids.im_end)) >= config.vocab_size:
        raise ValueError(
            f"--version: {folder}: the tokenizer has a token {largest}, the model embeds {config.vocab_size}; they are "
            "of different checkpoints"
        )
    sides = config.clip_side, config.clip_patch, model.visual_model.shape.image_size
    processor = UGroundProcessor(tokenizer, *sides, release.system_prompt, clip_fit=config.clip_fit)
    return model, processor, sources


LOADERS: dict[Kind, Callable[[Path, str, dict[str, str]], Parts]] = {
    "merged": _load_merged,
    "adapter": _load_adapter,
    "released": _load_released,
}


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
        version, vision_tower, vision_pretrained: paths or hub ids of LLaVA, CLIP and SAM.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        settings: of ``UGroundConfig`` (layer_selection, loss weights, ...).
        max_tokens: longest conversation with its prefix, in tokens (``--model_max_length``).

    Returns:
        the model, its processor, and the rows of the loading report.

    Raises:
        ValueError: for wrong paths, weights that do not fit, or a tokenizer without the special tokens.
    """
    transformers_logging.disable_progress_bar()  # clutters output that goes to a file
    found = hub.resolve_base(version, vision_tower, vision_pretrained)
    version, vision_tower, vision_pretrained = (str(part.path) for part in found.values())
    model, rows = load_base(version, vision_tower, vision_pretrained, PRECISIONS[precision], settings or {})
    tokenizer = load_tokenizer(version)
    old_size = len(tokenizer)
    add_special_tokens(tokenizer)
    grow_vocabulary(model, old_size, len(tokenizer))
    config, sam_side = model.config, model.visual_model.shape.image_size
    system_prompt = read_config(Path(version), "--version").get("system_prompt", SYSTEM_PROMPT)
    processor = UGroundProcessor(tokenizer, config.clip_side, config.clip_patch, sam_side, system_prompt, max_tokens)
    ids = processor.tokens
    config.seg_token_id, config.rej_token_id = ids.seg, ids.rej
    config.eos_token_id, config.pad_token_id = ids.eos, ids.pad
    return model, processor, rows


def cast_parameters(model: torch.nn.Module, precision: str) -> None:
    """Casts all parameters; buffers (the reward's baseline, rotary frequencies) stay in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(PRECISIONS[precision])
