"""Boxes as masks, on request: filled, or segmented by SAM with the box as its prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.decoders.segment_anything import SamShape, SegmentAnything
from model.loading.files import read_config, read_folder
from model.loading.formats import below
from model.loading.hub import resolve_file
from model.loading.mask_decoders import read_sam
from model.loading.weights import load_strictly
from model.processing.transforms import resize_and_pad
from utils.conversion.annotated import Box, rectangle_ring
from utils.datasets.images import read_image
from utils.datasets.masks import encode_mask

BATCH = 16  # boxes decoded at once; their masks have the size of the image


def filled(path: Path, boxes: list[Box]) -> list[Any]:
    """Boxes as polygons."""
    return [[rectangle_ring(*box)] for box in boxes]


class SamBoxes:
    """Masks of boxes by SAM, as its own predictor makes them with one mask per prompt.

    Args:
        path: segment-anything's ``.pth``, a folder of transformers' SamModel, or a merged UGround folder; or one of
            these on the hub.

    Raises:
        ValueError: if the path is none of these, or a merged folder without a SAM.
    """

    def __init__(self, path: str | Path) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        state, shape = _read(resolve_file(path, "--sam").path)
        self.sam = SegmentAnything(shape)
        load_strictly(self.sam, state, str(path))
        self.sam.to(self.device).float().eval()

    @torch.inference_mode()
    def __call__(self, path: Path, boxes: list[Box]) -> list[Any]:
        """COCO RLE for each box of an image, which is encoded once; an empty mask where SAM finds nothing."""
        image = read_image(path, apply_exif=True)
        size = image.shape[0], image.shape[1]
        pixels, resized = resize_and_pad(image, self.sam.shape.image_size)
        embedding = self.sam.encode(pixels[None].to(self.device))
        scale = torch.tensor([resized[1] / size[1], resized[0] / size[0]] * 2)
        prompts = self.sam.prompt_encoder._embed_boxes((torch.tensor(boxes) * scale).float().to(self.device))
        masks: list[np.ndarray] = []
        for tokens in prompts.split(BATCH):
            low_res, _ = self.sam.decode(embedding.expand(len(tokens), -1, -1, -1), tokens, None)
            masks += list((self.sam.postprocess(low_res, size) > 0).cpu().numpy())
        return [encode_mask(mask) for mask in masks]


def _read(path: Path) -> tuple[dict[str, torch.Tensor], SamShape]:
    if path.is_dir():
        inner = below(read_folder(path), "visual_model.")
        if inner:
            try:
                return inner, SamShape.from_state_dict(inner)
            except (KeyError, IndexError) as error:
                decoder = read_config(path, "--sam").get("mask_decoder")
                reason = f"a model whose masks are decoded by {decoder} has none"
                raise ValueError(f"--sam {path} holds no SAM (no {error}): {reason}") from error
    return read_sam(str(path), "--sam")
