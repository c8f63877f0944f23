"""Backbones: the vision-language models that Policy-Prompted Masking stands on. ``BACKBONES`` names them.

Their modules are imported when they are used.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.config import GroundingConfig
    from model.grounding import GroundingModel
    from model.processing.reader import ImageReader


@dataclass(frozen=True)
class BackboneRow:
    """The classes of a backbone, each as MODULE:CLASS, and what is known of its published weights.

    The ``model_type`` of its configuration is ``uground_`` and its key in ``BACKBONES``; LLaVA's is ``uground``.

    Attributes:
        base_types: ``model_type`` of their config.json.
        title, licence: for model cards.
    """

    config_name: str
    model_name: str
    reader_name: str
    base_types: tuple[str, ...]
    title: str = "Another backbone"
    licence: str = "the licence of its authors"

    @property
    def config(self) -> type[GroundingConfig]:
        return _named(self.config_name)

    @property
    def model(self) -> type[GroundingModel]:
        return _named(self.model_name)

    @property
    def reader(self) -> type[ImageReader]:
        return _named(self.reader_name)


def _named(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


BACKBONES = {
    "llava": BackboneRow(
        "model.config:UGroundConfig",
        "model.UGround:UGroundForCausalLM",
        "model.backbones.llava:ClipReader",
        ("llava", "llava_llama", "llava_next"),
        "LLaVA",
        "LLaVA-1.5 on Vicuna the LLaMA 2 Community License, CLIP the MIT licence",
    ),
    "qwen2_5_vl": BackboneRow(
        "model.backbones.qwen2_5_vl:Config",
        "model.backbones.qwen2_5_vl:UGroundQwen25VL",
        "model.backbones.qwen2_5_vl:Reader",
        ("qwen2_5_vl",),
        "Qwen2.5-VL",
        "Qwen2.5-VL Apache-2.0 (7B and 32B; other sizes have Qwen's own)",
    ),
    "qwen3_vl": BackboneRow(
        "model.backbones.qwen3_vl:Config",
        "model.backbones.qwen3_vl:UGroundQwen3VL",
        "model.backbones.qwen3_vl:Reader",
        ("qwen3_vl",),
        "Qwen3-VL",
        "Qwen3-VL Apache-2.0",
    ),
    "internvl3": BackboneRow(
        "model.backbones.internvl3:Config",
        "model.backbones.internvl3:UGroundInternVL3",
        "model.backbones.internvl3:Reader",
        ("internvl",),
        "InternVL3",
        "InternVL3 the MIT licence, its Qwen2.5 Apache-2.0",
    ),
}


def backbone_of(model_type: object, base: bool = False) -> str | None:
    """The backbone of a config.json's ``model_type``: that of a model of this project, or of base weights."""
    for name, backbone in BACKBONES.items():
        own = "uground" if name == "llava" else f"uground_{name}"
        if model_type in (backbone.base_types if base else (own,)):
            return name
    return None
