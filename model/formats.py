"""Published checkpoints under their own names: what kind a folder is, and its keys as this project has them.

A rule is (their prefix, ours); the first that fits a key counts, and None means that the tensor has no place here.
What is known about each kind, and from where, is in docs/weights.md.
"""

from __future__ import annotations

import torch

Rules = tuple[tuple[str, str | None], ...]

# LLaVA's own code, and UGround's released checkpoints, which are built on it
LLAVA: Rules = (
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower."),  # in LLaVA-1.6 and in unmerged checkpoints
    ("model.mm_projector.", "mm_projector."),
    ("model.out_mm_projector.", None),  # UGround's second projector, which nothing uses
    ("model.decoder_modules_initialized", None),  # a flag of UGround's code
    ("model.image_newline", None),  # LLaVA-1.6: between rows of tiles, which this project does not cut
    ("model.visual_model.", "visual_model."),
    ("model.text_hidden_fcs.", "text_hidden_fcs."),
    ("ppm._layer_gate_W_similarity", "ppm.gate"),
)
MODES = {  # UGround's published configurations: where the map and phi take their layer from
    1: {"layer_selection": "last"},
    2: {"phi_layer": "last"},
    3: {},
}


def renamed(state: dict[str, torch.Tensor], rules: Rules) -> dict[str, torch.Tensor]:
    """The tensors under this project's names; rotary frequencies, which are computed, are left out."""
    result = {}
    for key, value in state.items():
        if key.endswith("rotary_emb.inv_freq"):
            continue
        theirs, ours = next((rule for rule in rules if key.startswith(rule[0])), ("", ""))
        if ours is not None:
            result[ours + key.removeprefix(theirs)] = value
    return result


def below(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of one part, without its prefix."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def is_released(config: dict) -> bool:
    """Whether a ``config.json`` is that of a UGround checkpoint as the paper's authors publish it."""
    return config.get("model_type") != "uground" and "UGroundForCausalLM" in (config.get("architectures") or [])


def released_mode(config: dict) -> dict:
    """The settings that a published configuration's ``mode`` and ``eval_legacy`` stand for.

    Raises:
        ValueError: for a mode that is not known.
    """
    mode = config.get("mode", 3)
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} of the published configuration is unknown; known: {sorted(MODES)}")
    return MODES[mode] | ({} if config.get("eval_legacy", True) else {"eval_layer_policy": "sample"})
