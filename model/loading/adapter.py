"""Adapter folders: what a run trained, without its base; a few hundred megabytes, loaded on top of the base.

adapter_config.json, adapter_model.safetensors    LoRA, as peft writes it (float32)
trained_parts.safetensors                         all other weights that no base gives, under the model's own names
uground_run.json                                  settings, fingerprints and paths of the base
tokenizer files, uground_processor.json, README.md

scripts/merge_lora.py --adapter_only writes them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from model.loading.files import blame, read_json, read_safetensors
from model.loading.weights import NEW_PARTS, Loaded, base_fingerprints, path_setting
from model.settings import METHOD_FIELDS, method_of

META = "uground_run.json"
PARTS, LORA = "trained_parts.safetensors", "adapter_model.safetensors"
ROWS = ".token_adapter.trainable_tokens_delta"  # peft's name of a table's rows that trained
OTHER_SECTIONS = ("model", "data", "grpo", "train", "eval")  # sections of a run's settings that are not the method's
WHERE = "Say where its base is with --base (what it was trained from), --vision_tower (CLIP), --vision_pretrained (SAM)"


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder is an adapter (``merge_lora.py --adapter_only``)."""
    return (Path(folder) / PARTS).is_file()


def save(model: nn.Module, folder: Path, trained: Iterable[str], dtype: torch.dtype) -> None:
    """Writes LoRA and all other weights that no base gives to ``folder``.

    Args:
        model: as trained, in float32; a ``PeftModel`` unless LoRA's rank is 0.
        trained: names of the weights that its checkpoints hold.
        dtype: of all but LoRA, that of training.
    """
    from peft import PeftModel  # here: it is slow to import, and loading a folder does not need it

    base = model
    if isinstance(model, PeftModel):
        base = model.get_base_model()
        model.save_pretrained(str(folder), save_embedding_layers=False)
    state, parts = base.state_dict(), {}
    of_peft = ("lora_", ".token_adapter.")  # in names of what it has just written
    own = [name for name in state if not any(part in name for part in of_peft)]
    held = {plain_name(name) for name in trained}
    for name in own:
        if name in held or name.startswith(NEW_PARTS):
            parts[name] = state[name].to(dtype).contiguous()
    parts |= {name: value for name, value in base.named_buffers() if name in own}
    save_file(parts, folder / PARTS)


def settings_of(folder: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """The settings of ``UGroundConfig`` that an adapter was trained with.

    Args:
        meta: of ``read_adapter_meta``.

    Raises:
        ValueError: naming every unknown setting.
    """
    sections = {name: values for name, values in meta["config"].items() if name not in OTHER_SECTIONS}
    if unknown := [f"{name}.{key}" for name, values in sections.items() for key in values if key not in METHOD_FIELDS]:
        raise ValueError(
            f"--version: {folder / META}: unknown setting {', '.join(unknown)}; was it written by newer code?"
        )
    return method_of({key: value for values in meta["config"].values() for key, value in values.items()})


def check_base(folder: Path, meta: dict[str, Any], loaded: list[Loaded]) -> None:
    """Checks that the loaded base is the one that the adapter was trained on.

    Raises:
        ValueError: naming each module that differs, with both sources and fingerprints.
    """
    fingerprints, paths = base_fingerprints(loaded), meta.get("resolved") or meta["config"]["model"]
    sources = {row.module: row.source for row in loaded}
    differing = [name for name, trained_on in meta["base"].items() if fingerprints.get(name) != trained_on]
    if differing:
        lines = [
            f"\n  {name}: {sources.get(name)} has {fingerprints.get(name)}, {paths[path_setting(name, paths)]} had "
            f"{meta['base'][name]}"
            for name in differing
        ]
        raise ValueError(
            f"--version: the adapter {folder / META} was trained on another base:{''.join(lines)}\n{WHERE}"
        )


@torch.no_grad()
def apply(model: nn.Module, folder: Path, meta: dict[str, Any]) -> None:
    """Copies an adapter's weights into its base, and merges LoRA: added in float32, rounded once.

    Raises:
        ValueError: if a weight is unknown, of another shape, or missing.
    """
    with blame("--version"):
        parts = read_safetensors(folder / PARTS)
        lora = read_safetensors(folder / LORA) if (folder / LORA).is_file() else {}
    own = model.state_dict()
    misfits = [name for name, value in parts.items() if name not in own or own[name].shape != value.shape]
    if misfits:
        raise ValueError(f"--version: {folder / PARTS} does not fit its base: {', '.join(misfits[:5])}")
    expected = {plain_name(name) for name in meta["trained"]} | {name for name in own if name.startswith(NEW_PARTS)}
    if missing := sorted(expected - parts.keys() - {plain_name(name) for name in lora}):
        raise ValueError(
            f"--version: {folder} is incomplete: {PARTS} and {LORA} lack {len(missing)} of {len(expected)} trained "
            f"weights: {', '.join(missing[:5])}; copy it again, or write it anew with merge_lora.py --adapter_only"
        )
    model.load_state_dict(parts, strict=False)
    with blame(f"--version: {folder / LORA} does not fit its base and {META}"):
        _merge(model, lora, meta, folder)


def _merge(model: nn.Module, lora: dict[str, torch.Tensor], meta: dict[str, Any], folder: Path) -> None:
    """Adds LoRA's products, and copies the rows of added tokens, which peft numbers in its configuration."""
    tokens = (read_json(folder / "adapter_config.json") if lora else {}).get("trainable_token_indices") or {}
    settings = meta["config"]["model"]
    for key, value in lora.items():
        name = plain_name(key)
        if name.endswith(".lora_A.weight"):
            weight = model.get_parameter(name.replace(".lora_A", ""))
            product = lora[key.replace("lora_A", "lora_B")] @ value
            weight.data = (weight.float() + product * (settings["lora_alpha"] / settings["lora_r"])).to(weight.dtype)
        elif name.endswith(ROWS):
            table = name.removesuffix(ROWS)
            weight = model.get_parameter(f"{table}.weight")
            weight.data[tokens[table.rpartition(".")[2]]] = value.to(weight.dtype)


def plain_name(name: str) -> str:
    """A weight's name without peft's prefix and adapter name."""
    return name.removeprefix("base_model.model.").replace(".default.", ".").removesuffix(".default")


def recorded_base(folder: Path) -> dict[str, str]:
    """``version``, ``vision_tower`` and ``vision_pretrained`` that an adapter was trained on; of the hub, its commits.

    Raises:
        ValueError: as ``read_adapter_meta``.
    """
    meta = read_adapter_meta(folder)
    settings = meta["config"]["model"] | meta.get("resolved", {})
    return {name: settings[name] for name in ("version", "vision_tower", "vision_pretrained")}


def recorded_decoder(folder: Path) -> dict[str, Any]:
    """The section ``decoder`` of the settings that an adapter was trained with; {} of older ones, which have a SAM."""
    return read_adapter_meta(folder)["config"].get("decoder", {})


def read_adapter_meta(folder: Path) -> dict[str, Any]:
    """``uground_run.json`` of a folder that merge_lora.py wrote.

    Raises:
        ValueError: if it cannot be read, or lacks a part.
    """
    with blame("--version"):
        meta = read_json(folder / META)
    parts = {name: meta.get(name) for name in ("config", "base", "trained")}
    if isinstance(parts["config"], dict):
        parts |= {f"config.{name}": part for name, part in {"model": None, **parts["config"]}.items()}
    if lacking := [name for name, part in parts.items() if not isinstance(part, dict)]:
        raise ValueError(f"--version: {folder / META}: {', '.join(lacking)} must be objects; was it edited?")
    return meta
