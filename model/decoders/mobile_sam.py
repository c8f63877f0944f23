"""MobileSAM (Zhang et al., 2023): SAM's prompts and masks on a small image encoder, TinyViT.

The encoder is that of ``mobilesam-mirror``, a package of the authors' code, which needs ``timm``; both are optional.
It knows one input side, 1024 pixels. Prompt encoder and mask decoder are segment-anything's, of the published sizes.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import nn

from model.decoders.segment_anything import SamShape, SegmentAnything

TINY_VIT: dict[str, Any] = {  # of build_sam_vit_t
    "img_size": 1024,
    "embed_dims": [64, 128, 160, 320],
    "depths": [2, 2, 6, 2],
    "num_heads": [2, 4, 5, 10],
    "window_sizes": [7, 7, 14, 7],
    "drop_path_rate": 0.0,
}
INSTALL = "--mask_decoder mobile_sam needs two packages: pip install mobilesam-mirror timm"
INDICES = "attention_bias_idxs"  # a buffer that no file holds


def tiny_vit(**sizes: Any) -> nn.Module:
    """The package's encoder, on the CPU: it reads numbers while it is built.

    Raises:
        ValueError: if a package is missing.
    """
    try:
        module: Any = import_module("mobile_sam.modeling")
    except ImportError as error:
        raise ValueError(f"{INSTALL} ({error})") from error
    with torch.device("cpu"):
        return module.TinyViT(**TINY_VIT | sizes)


class MobileSam(SegmentAnything):
    """MobileSAM's modules under its own key names. The encoder stays in evaluation mode: it has batch statistics."""

    def __init__(self, shape: SamShape) -> None:
        super().__init__(shape)
        self._indices = {
            name: module.attention_bias_idxs.clone()
            for name, module in self.image_encoder.named_modules()
            if hasattr(module, INDICES)
        }

    def new_encoder(self, shape: SamShape) -> nn.Module:
        return tiny_vit()

    def train(self, mode: bool = True) -> MobileSam:
        """Also restores what transformers leaves empty when it loads: the encoder's indices, and biases from them."""
        device = next(self.image_encoder.parameters()).device
        for name, indices in self._indices.items():
            setattr(self.image_encoder.get_submodule(name), INDICES, indices.to(device))
        super().train(mode)
        self.image_encoder.train(False)
        return self
