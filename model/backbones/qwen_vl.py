"""What Qwen2.5-VL and Qwen3-VL share: images at their own size, positions of three axes.

An image is stretched to multiples of a cell, a square of merged patches; each cell is one token, row-major. A token's
position has three axes (time, row, column), equal for text; the text after an image goes on max(h, w) later.

Legend: B rows, Q new tokens, V image tokens, n patches of an image, D hidden size, L hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import Cache
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor, smart_resize

from model.backbones.base import ImageFeatures, image_processor, in_rows
from model.config import GroundingConfig
from model.grounding import GroundingModel
from model.processing.reader import ImagePlan, ImageReader, ImageTokens
from model.structures import Batch

MAX_RATIO = 200  # of an image's sides, in transformers' smart_resize
PATCHES = {"patch_size": "patch_size", "merge_size": "spatial_merge_size", "temporal_patch_size": "temporal_patch_size"}


class QwenReader(ImageReader):
    """Images as transformers' Qwen2VLImageProcessor reads them.

    Args:
        processor: with the patch sizes of the model; its limit of an image's pixels becomes that of ``max_tokens``.
        max_tokens: most tokens of an image, each a cell of its resized pixels.
    """

    file_settings = ({"max_image_tokens": int}, {})

    def __init__(self, processor: Qwen2VLImageProcessor, max_tokens: int) -> None:
        self.processor, self.most_tokens = processor, max_tokens
        self.cell = processor.patch_size * processor.merge_size  # its side in pixels
        most = max_tokens * self.cell**2
        processor.size = {"shortest_edge": min(processor.size["shortest_edge"], most), "longest_edge": most}

    def limits(self, height: int, width: int) -> dict[str, int]:
        """Limits of the resized pixels with which an image of this size has at most ``most_tokens`` cells.

        Those of the processor, but for a long strip, or where both are equal: smart_resize exceeds them there.

        Raises:
            ValueError: if the image is too long, as in smart_resize.
        """
        if max(height, width) > MAX_RATIO * min(height, width):
            raise ValueError(
                f"the image is {width} x {height} pixels (width x height): one side is more than {MAX_RATIO} times the "
                "other, which Qwen-VL cannot read; cut it into parts"
            )
        low, high = self.processor.size["shortest_edge"], self.processor.size["longest_edge"]
        while math.prod(smart_resize(height, width, self.cell, low, high)) > self.most_tokens * self.cell**2:
            low, high = low * 3 // 4, high * 3 // 4
        return {"shortest_edge": low, "longest_edge": high}

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) cells of an image of this size in pixels; errors as ``limits``."""
        limits = self.limits(height, width)
        rows, columns = smart_resize(height, width, self.cell, limits["shortest_edge"], limits["longest_edge"])
        return rows // self.cell, columns // self.cell

    def plan_of(self, height: int, width: int) -> ImagePlan:
        """Where the tokens of an image of this size in pixels lie."""
        h, w = self.grid(height, width)
        cells = torch.arange(h * w)
        return ImagePlan((h, w), cells, torch.stack([torch.zeros_like(cells), cells // w, cells % w], 1), max(h, w))

    def plan(self, sizes: Sequence[tuple[int, int]], keep_padding: bool = False) -> ImageTokens:
        return ImageTokens.of([self.plan_of(*size) for size in sizes])

    def pixels(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """Patches [n, C] of all images, in the order that the vision tower takes; C = 3 x 2 x patch x patch, as a still
        image is two equal frames."""
        parts = []
        for image in images:
            # without input_data_format, transformers takes an image 1 or 3 pixels high for channels first
            options: Any = {"input_data_format": "channels_last", "return_tensors": "pt"}
            height, width = image.shape[:2]
            parts.append(self.processor(images=[image], size=self.limits(height, width), **options)["pixel_values"])
        return torch.cat(parts)

    def settings(self) -> dict[str, Any]:
        return {"max_image_tokens": self.most_tokens}

    @classmethod
    def restored(cls, folder: Path, settings: dict[str, Any]) -> QwenReader:
        return cls(image_processor(Qwen2VLImageProcessor, folder), settings.pop("max_image_tokens"))

    def save_pretrained(self, folder: str | Path) -> None:
        self.processor.save_pretrained(folder)


class QwenConfig(GroundingConfig):
    """The part of both configurations; a subclass has its ``reader_class``."""

    reader_class: ClassVar[type[QwenReader]]

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)  # as in UGroundConfig

    def new_reader(self, folder: Path | None = None) -> QwenReader:
        vision: Any = self.vision_config  # type: ignore[attr-defined]
        expected = {ours: getattr(vision, theirs) for ours, theirs in PATCHES.items()}
        if folder is None:
            return self.reader_class(Qwen2VLImageProcessor(**expected), self.max_image_tokens)
        processor = image_processor(Qwen2VLImageProcessor, folder)
        for ours, of_model in expected.items():
            if (of_reader := getattr(processor, ours)) != of_model:
                raise ValueError(
                    f"--version: {folder}: {ours} is {of_reader} in preprocessor_config.json, {of_model} in "
                    f"config.json (vision_config.{PATCHES[ours]}); both must be of one model"
                )
        return self.reader_class(processor, self.max_image_tokens)


class QwenVL(GroundingModel):
    """The part of both models. Positions are always given: transformers' own rope_deltas, which the model object keeps
    between calls, are unused."""

    model: Any
    lora_layers = r"model\.language_model\.layers\.\d+\.self_attn"

    def read_images(self, batch: Batch) -> ImageFeatures:
        tower = self.model.visual
        merge = tower.spatial_merge_size
        sizes = torch.tensor([[1, h * merge, w * merge] for h, w in batch.grids], device=batch.pixel_values.device)
        with self.grad_if_trained(tower):
            output = tower(batch.pixel_values, grid_thw=sizes)
        added = getattr(output, "deepstack_features", None) or ()
        counts = batch.image_counts
        return ImageFeatures(in_rows(output.pooler_output, counts), tuple(in_rows(layer, counts) for layer in added))

    def run_layers(
        self,
        embeddings: torch.Tensor,
        mask: torch.Tensor,
        position_ids: torch.Tensor,
        cache: Cache | None,
        use_cache: bool,
        added: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None,
        **options: Any,
    ) -> tuple[tuple[torch.Tensor, ...], Cache | None]:
        """As ``Backbone.run_layers``; deepstack's features are part of the residual stream, from the next layer on."""
        if position_ids.dim() == 2:
            position_ids = position_ids[..., None].expand(-1, -1, 3)
        if added is not None:
            places, features = added[0].flatten(), [layer.flatten(0, 1) for layer in added[1]]
            flat = torch.zeros(position_ids[..., 0].numel(), dtype=torch.bool, device=embeddings.device)
            options["visual_pos_masks"] = flat.index_fill(0, places, True).view(position_ids.shape[:2])
            options["deepstack_visual_embeds"] = features
        states, cache = super().run_layers(embeddings, mask, position_ids, cache, use_cache, **options)
        hidden = list(states)
        if added is not None:
            for number, layer in enumerate(features[: len(hidden) - 2], start=1):  # transformers records them without
                before = hidden[number]
                layer = layer.to(before.device, before.dtype)
                hidden[number] = before.flatten(0, 1).index_add(0, places.to(before.device), layer).view_as(before)
        return tuple(hidden), cache
