"""InternVL3 on transformers' own classes: square tiles of 448 px and a thumbnail.

An image is stretched to a canvas of rows x columns tiles, of the ratio nearest to its own (GotOcr2ImageProcessor), and
each tile is 32 x 32 patches of InternViT, of which pixel shuffle makes 16 x 16 tokens. Where there is more than one
tile, a thumbnail (the whole image as a tile) comes last.
Source: InternVL3 (arXiv 2504.10479) and transformers' ``internvl``.

Legend: B rows, V image tokens, D hidden size, T tiles, S a tile's side in pixels, g its side in tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GotOcr2ImageProcessor, InternVLConfig, InternVLForConditionalGeneration
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

from model.backbones.base import ImageFeatures, image_processor, in_rows
from model.config import GroundingConfig
from model.grounding import GroundingModel
from model.processing.reader import ImagePlan, ImageReader, ImageTokens
from model.processing.template import ChatTemplate
from model.structures import Batch

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TEMPLATE = ChatTemplate(  # of OpenGVLab/InternVL3-8B-hf, without a system prompt (OpenGVLab's own chat() writes one)
    system="<|im_start|>system\n{}<|im_end|>\n",
    user="<|im_start|>user\n",
    image=("<img>", "<IMG_CONTEXT>", "</img>\n"),
    question="{}<|im_end|>\n<|im_start|>assistant\n",
    answer="{}",
    end="<|im_end|>",
    between="\n<|im_start|>user\n",
)


class Reader(ImageReader):
    """Images as tiles, and the cells that the tiles' tokens show.

    Args:
        processor: transformers' own; tiling is switched on, which the published ``preprocessor_config.json`` leaves to
            InternVLProcessor.
        tile_tokens: g, the side of a tile in tokens.
        max_tokens: most tokens of an image, which say how many tiles it has: 640 x 480 takes up to 12 tiles with a
            thumbnail, 3328 tokens.

    Raises:
        ValueError: if ``max_tokens`` is less than a tile's, or tiles are no squares.
    """

    backbone, template = "internvl3", TEMPLATE
    file_settings = ({"tile_tokens": int, "max_image_tokens": int}, {})

    def __init__(self, processor: GotOcr2ImageProcessor, tile_tokens: int, max_tokens: int) -> None:
        if processor.size["height"] != processor.size["width"]:
            raise ValueError(f"InternVL3's tiles are squares, but preprocessor_config.json has {dict(processor.size)}")
        self.tile_tokens, self.most_tokens, self.side = tile_tokens, max_tokens, processor.size["height"]
        tiles = max_tokens // tile_tokens**2
        if not tiles:
            raise ValueError(f"max_image_tokens {max_tokens}: a tile of InternVL3 takes {tile_tokens**2}; give more")
        self.max_tiles = tiles - 1 if tiles > 1 else 1  # the last one is the thumbnail
        processor.min_patches, processor.max_patches, processor.crop_to_patches = 1, self.max_tiles, True
        self.processor = processor

    def tiles(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of tiles for an image of H x W pixels."""
        columns, rows = get_optimal_tiled_canvas((height, width), (self.side, self.side), 1, self.max_tiles)
        return rows, columns

    def plan_of(self, height: int, width: int) -> ImagePlan:
        """An image's tokens: tile by tile, row-major in a tile, the thumbnail's last and without cells."""
        g, (rows, columns) = self.tile_tokens, self.tiles(height, width)
        cells = torch.arange(rows * columns * g * g).view(rows, g, columns, g).transpose(1, 2).flatten()
        if rows * columns > 1:
            cells = torch.cat([cells, torch.arange(len(cells), len(cells) + g * g)])
        return ImagePlan((rows * g, columns * g), cells, torch.arange(len(cells))[:, None], len(cells))

    def plan(self, sizes: Sequence[tuple[int, int]], keep_padding: bool = False) -> ImageTokens:
        return ImageTokens.of([self.plan_of(*size) for size in sizes])

    def pixels(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """[T, 3, S, S] tiles; those of an image follow each other."""
        # the format is said: transformers takes [3, W, 3] for channels first
        options: Any = {"input_data_format": "channels_last", "return_tensors": "pt"}
        return torch.cat([self.processor(image, **options)["pixel_values"] for image in images])

    def settings(self) -> dict[str, Any]:
        return {"tile_tokens": self.tile_tokens, "max_image_tokens": self.most_tokens}

    @classmethod
    def restored(cls, folder: Path, settings: dict[str, Any]) -> Reader:
        processor = image_processor(GotOcr2ImageProcessor, folder)
        return cls(processor, settings.pop("tile_tokens"), settings.pop("max_image_tokens"))

    def save_pretrained(self, folder: str | Path) -> None:
        self.processor.save_pretrained(folder)


class Config(GroundingConfig, InternVLConfig):
    """The configuration of UGround on InternVL3."""

    model_type = "uground_internvl3"
    backbone = "internvl3"

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)

    @property
    def tile_tokens(self) -> int:
        """g: a tile's patches per side, halved by pixel shuffle."""
        return round(self.tower.image_size[0] / self.tower.patch_size[0] * self.downsample_ratio)

    @property
    def tower(self) -> Any:
        return self.vision_config

    def backbone_problems(self) -> Iterator[tuple[str, str]]:
        yield from super().backbone_problems()
        (height, width), (patch, patch_width) = self.tower.image_size, self.tower.patch_size
        step = round(patch / self.downsample_ratio)
        if height != width or patch != patch_width or height % step:
            yield (
                "vision_config",
                f"tiles of {height}x{width} pixels with patches of {patch}x{patch_width} do not split into square "
                f"tokens of {step} pixels: image_size and patch_size must be squares that divide",
            )

    def new_reader(self, folder: Path | None = None) -> Reader:
        side = {"height": self.tower.image_size[0], "width": self.tower.image_size[1]}
        if folder is None:  # the class's own mean and deviation are CLIP's
            processor = GotOcr2ImageProcessor(size=side, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
        else:
            processor = image_processor(GotOcr2ImageProcessor, folder)
            if dict(processor.size) != side:
                raise ValueError(
                    f"--version: {folder}: tiles are {dict(processor.size)} in preprocessor_config.json, {side} in "
                    "config.json (vision_config.image_size); both must be of one model"
                )
        return Reader(processor, self.tile_tokens, self.max_image_tokens)


class UGroundInternVL3(GroundingModel, InternVLForConditionalGeneration):
    """InternVL3 with Policy-Prompted Masking in front of a mask decoder."""

    config_class = Config
    config: Config  # type: ignore[assignment]  # transformers declares it less narrowly
    lora_layers = r"model\.language_model\.layers\.\d+\.self_attn"
    published_keys = (
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    )

    def read_images(self, batch: Batch) -> ImageFeatures:
        with self.grad_if_trained(self.model.vision_tower, self.model.multi_modal_projector):
            features = self.get_image_features(batch.pixel_values).pooler_output.flatten(0, 1)
        return ImageFeatures(in_rows(features, batch.image_counts))
