"""LLaVA on transformers' CLIP and LLaMA: projector and image splice.

Legend: B rows, T tokens, P patches of CLIP's input, V of them that are encoded, D hidden size, L hidden states (decoder
layers + 1), C CLIP's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from model.backbones.base import Backbone, ImageFeatures
from model.geometry import Fit, image_cells, valid_patches
from model.processing.reader import ImageReader, ImageTokens
from model.processing.template import VICUNA
from model.processing.transforms import CLIP_FITS, squares
from model.structures import Batch


class LlavaLlamaConfig(LlamaConfig):
    """LLaMA's configuration with the vision tower's.

    Args:
        vision_config: CLIPVisionConfig or its dictionary.
        mm_vision_select_layer: which CLIP hidden state feeds the projector (LLaVA-1.5: -2, no final norm).
        mm_projector_type: ``mlp2x_gelu`` (LLaVA-1.5) or ``linear`` (LLaVA-1).
        padded_patches_attend: whether padded patches, as queries, attend to earlier tokens, as with SDPA and eager
            attention; flash attention excludes them and adds nothing to their states. No token attends to them: only
            the min-max over all patches (``map_normalization`` all) depends on them.
        mm_projector_width: hidden units of ``mlp2x_gelu``; 0 = the hidden size (PixelLM: twice that).
    """

    model_type = "uground_llava"
    image_pool = 1  # a setting of UGroundConfig

    def __init__(
        self,
        vision_config=None,
        mm_vision_select_layer: int = -2,
        mm_projector_type: str = "mlp2x_gelu",
        padded_patches_attend: bool = True,
        mm_projector_width: int = 0,
        **kwargs,
    ) -> None:
        if isinstance(vision_config, CLIPVisionConfig):
            vision_config = vision_config.to_dict()
        self.vision_config = vision_config or CLIPVisionConfig().to_dict()
        self.mm_vision_select_layer, self.mm_projector_type = mm_vision_select_layer, mm_projector_type
        self.padded_patches_attend, self.mm_projector_width = padded_patches_attend, mm_projector_width
        super().__init__(**kwargs)

    @property
    def clip_config(self) -> CLIPVisionConfig:
        return CLIPVisionConfig(**{k: v for k, v in self.vision_config.items() if k != "model_type"})

    @property
    def clip_side(self) -> int:
        """Side of CLIP's square input in pixels."""
        return self.vision_config["image_size"]

    @property
    def clip_patch(self) -> int:
        """Side of CLIP's patches in pixels."""
        return self.vision_config["patch_size"]

    @property
    def cell_side(self) -> int:
        """Side in pixels of what an image token shows of CLIP's input: a patch, or ``image_pool`` x ``image_pool``."""
        return self.clip_patch * self.image_pool

    @property
    def num_image_tokens(self) -> int:
        """P, the cells of CLIP's input."""
        return (self.clip_side // self.cell_side) ** 2


class ClipReader(ImageReader):
    """CLIP's square input, of which each image token shows a cell.

    Args:
        side: of the input in pixels, a multiple of ``cell``.
        cell: side in pixels of what an image token shows: of CLIP's patches, or of a square of several.
        fit: ``pad`` = the input is the whole image, padded (paper); ``crop`` = a centre crop, for checkpoints that were
            trained so (LISA and its descendants).

    Raises:
        ValueError: if ``side`` is not a multiple of ``cell``, or ``fit`` is unknown.
    """

    backbone, template = "llava", VICUNA
    file_settings = ({"clip_side": int, "clip_patch": int}, {"clip_fit": str})

    def __init__(self, side: int, cell: int, fit: str = "pad") -> None:
        if side % cell:
            raise ValueError(f"CLIP's side {side} is not a multiple of its patch {cell}")
        if fit not in CLIP_FITS:
            raise ValueError(f"clip_fit {fit!r} is unknown; use {' or '.join(CLIP_FITS)}")
        self.side, self.cell, self.fit = side, cell, Fit(fit, side)
        self.most_tokens = (side // cell) ** 2

    def plan(self, sizes: Sequence[tuple[int, int]], keep_padding: bool = False) -> ImageTokens:
        """Padded patches count in the positions, but get no tokens, which nothing would attend to; only where the
        images of a batch differ in how many they have (``image_cells``)."""
        valid = valid_patches(sizes, self.fit, self.cell)
        cells = image_cells(valid, keep_padding)
        count, grid = valid.shape[1], self.side // self.cell
        shown = valid.gather(1, cells)
        return ImageTokens(cells, cells[..., None], shown, valid, [(grid, grid)] * len(valid), [count] * len(valid))

    def pixels(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """[B, 3, side, side], normalised."""
        return squares(images, self.side, CLIP_FITS[self.fit.kind])

    def settings(self) -> dict[str, Any]:
        return {"clip_side": self.side, "clip_patch": self.cell, "clip_fit": self.fit.kind}

    @classmethod
    def restored(cls, folder: Path, settings: dict[str, Any]) -> ClipReader:
        return cls(settings.pop("clip_side"), settings.pop("clip_patch"), settings.pop("clip_fit", "pad"))


class LlavaLlamaForCausalLM(Backbone, LlamaForCausalLM):
    """LLaVA: LLaMA with projected CLIP features in place of the image placeholders."""

    config_class: type[LlavaLlamaConfig] = LlavaLlamaConfig
    config: LlavaLlamaConfig  # type: ignore[assignment]  # transformers declares it less narrowly
    lora_layers = r"model\.layers\.\d+\.self_attn"  # never CLIP's q_proj and v_proj

    def __init__(self, config: LlavaLlamaConfig) -> None:
        super().__init__(config)
        clip = config.clip_config
        clip._attn_implementation = config._attn_implementation
        self.vision_tower = CLIPVisionModel(clip)
        linear = config.mm_projector_type == "linear"
        width = config.hidden_size if linear else config.mm_projector_width or config.hidden_size
        first = nn.Linear(clip.hidden_size, width)
        self.mm_projector = first if linear else nn.Sequential(first, nn.GELU(), nn.Linear(width, config.hidden_size))
        self.post_init()

    @property
    def clip_layers(self) -> nn.ModuleList:
        """CLIP's layers up to the one that is read (``mm_vision_select_layer``); later ones are not computed."""
        layers: Any = self.vision_tower.encoder.layers
        return layers[: range(len(layers) + 1)[self.config.mm_vision_select_layer]]

    def read_images(self, batch: Batch) -> ImageFeatures:
        if self.clip_depths or self.config.image_pool > 1:
            return self.encode_whole_images(batch, self.clip_depths)
        shown = batch.image_shown if batch.has_padding else None
        return ImageFeatures(self.encode_images(batch.pixel_values, batch.image_cells, shown))

    def encode_images(
        self, clip_images: torch.Tensor, cells: torch.Tensor, valid: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B, V, D] CLIP features after the projector, of some of the patches.

        Args:
            clip_images: [B, 3, S, S], normalised and padded.
            cells: [B, V] the patches, row-major.
            valid: [B, V] bool, patches that are keys of CLIP's attention; None = all.
        """
        return self.mm_projector(self._clip_states(clip_images, cells, valid)[-1])

    def encode_whole_images(self, batch: Batch, depths: tuple[int, ...]) -> ImageFeatures:
        """What ``encode_images`` returns, pooled to the image's tokens, with CLIP's states of all patches.

        As in PixelLM (encode_images and prepare_inputs_labels_for_multimodal of llava_arch.py): states are resized to
        the grid of image tokens before the projector; padded patches are no keys, but have states.

        Args:
            depths: indices of CLIP's hidden states.

        Returns:
            features of ``batch.image_cells``, and the states of ``depths``.
        """
        config = self.config
        grid = config.clip_side // config.clip_patch
        valid = valid_patches(batch.sizes, Fit("pad", config.clip_side), config.clip_patch)
        keys = None if valid.all() else valid.to(self.device, non_blocking=True)
        every = torch.arange(grid**2, device=self.device).expand(len(valid), -1)
        states = self._clip_states(batch.pixel_values, every, keys, depths)
        features = states[-1]
        if config.image_pool > 1:
            square = features.transpose(1, 2).unflatten(2, (grid, grid)).float()
            small = nn.functional.interpolate(square, (grid // config.image_pool,) * 2, mode="bilinear")
            features = small.flatten(2).transpose(1, 2).to(features.dtype)
        cells = batch.image_cells[..., None].expand(-1, -1, features.shape[-1])
        return ImageFeatures(self.mm_projector(features.gather(1, cells)), clip_states=states[:-1])

    def _clip_states(
        self,
        clip_images: torch.Tensor,
        cells: torch.Tensor,
        valid: torch.Tensor | None,
        depths: tuple[int, ...] = (),
    ) -> tuple[torch.Tensor, ...]:
        """[B, V, C] hidden states of CLIP, one tensor for each of ``depths``, and the one that LLaVA reads."""
        with self.grad_if_trained(self.vision_tower):
            return self._run_clip(clip_images, cells, valid, depths)

    def _run_clip(
        self, clip_images: torch.Tensor, cells: torch.Tensor, valid: torch.Tensor | None, depths: tuple[int, ...]
    ) -> tuple[torch.Tensor, ...]:
        tower = self.vision_tower
        tokens = nn.functional.pad(cells + 1, (1, 0))  # the class token comes first
        states = tower.embeddings(clip_images)
        states = tower.pre_layrnorm(states.gather(1, tokens[..., None].expand(-1, -1, states.shape[-1])))
        mask = None
        if valid is not None:
            keys = nn.functional.pad(valid, (1, 0), value=True)
            mask = states.new_zeros(keys.shape).masked_fill_(~keys, torch.finfo(states.dtype).min)
            mask = mask[:, None, None, :].expand(-1, 1, keys.shape[1], -1)
        count = len(tower.encoder.layers) + 1
        wanted, read = {range(count)[depth] for depth in depths}, {}
        for index, layer in enumerate(self.clip_layers):
            if index in wanted:
                read[index] = states[:, 1:]
            states = layer(states, mask)
        read[len(self.clip_layers)] = states[:, 1:]
        return *(read[range(count)[depth]] for depth in depths), states[:, 1:]
