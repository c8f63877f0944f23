"""Image transforms: SAM's rule (longest side to S, zero padding right and bottom) for both CLIP and SAM.

Source: paper section 5.1 (CLIP's centre crop may cut off the target); the released weights use SAM's mean and
deviation for both. LISA and its descendants use CLIP's own processor: shortest side to S, centre crop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image

from model.geometry import cropped_size, resized_size

PIXEL_MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
PIXEL_STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
CLIP_MEAN = 255 * torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
CLIP_STD = 255 * torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
HALF = torch.full((3, 1, 1), 127.5)


def resize_and_pad(
    image: np.ndarray, side: int, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Scales, normalises and pads one image, by SAM's rule.

    Args:
        image: [H, W, 3] uint8, RGB.
        side: S, the square's side in pixels.
        out: [3, S, S] float32 zeros to write into, such as a row of a batch; None = a new tensor.

    Returns:
        [3, S, S] float32 and the resized (height, width) inside it.
    """
    height, width = resized_size(image.shape[0], image.shape[1], side)
    if image.shape[:2] != (height, width):
        image = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    out = torch.zeros(3, side, side) if out is None else out
    # in place: at 1024 px, a copy is 12 MB and takes longer than the arithmetic
    source = torch.from_numpy(np.require(image, requirements=["C", "W"]))  # torch warns of arrays that are read-only
    pixels = out[:, :height, :width].copy_(source.permute(2, 0, 1))
    pixels.sub_(PIXEL_MEAN).div_(PIXEL_STD)
    return out, (height, width)


def resize_and_crop(
    image: np.ndarray, side: int, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Scales, crops and normalises one image, by CLIP's rule; arguments and results as in ``resize_and_pad``."""
    height, width = cropped_size(image.shape[0], image.shape[1], side)
    scaled = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    top, left = (height - side) // 2, (width - side) // 2
    middle = np.asarray(scaled)[top : top + side, left : left + side]
    out = torch.zeros(3, side, side) if out is None else out
    out.copy_(torch.from_numpy(middle.copy()).permute(2, 0, 1)).sub_(CLIP_MEAN).div_(CLIP_STD)
    return out, (side, side)


CLIP_FITS = {"pad": resize_and_pad, "crop": resize_and_crop}


def resize_and_stretch(
    image: np.ndarray,
    side: int,
    out: torch.Tensor | None = None,
    mean: torch.Tensor = PIXEL_MEAN,
    std: torch.Tensor = PIXEL_STD,
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Scales both sides to S and normalises one image, by SAM 2's rule; arguments and results as in ``resize_and_pad``.

    Args:
        mean, std: [3, 1, 1] in 0..255.
    """
    if image.shape[:2] != (side, side):
        image = np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
    out = torch.zeros(3, side, side) if out is None else out
    source = torch.from_numpy(np.require(image, requirements=["C", "W"]))
    out.copy_(source.permute(2, 0, 1)).sub_(mean).div_(std)
    return out, (side, side)


SAM_INPUTS: dict[str, Callable] = {  # of the mask decoder: SAM's, SAM 2's (statistics of ImageNet), SAM 3's (-1 to 1)
    "pad": resize_and_pad,
    "stretch": resize_and_stretch,
    "stretch_to_one": partial(resize_and_stretch, mean=HALF, std=HALF),
}


def squares(images: Sequence[np.ndarray], side: int, fit: Callable) -> torch.Tensor:
    """Images as [B, 3, side, side] float32; ``fit``: of this module, such as ``resize_and_pad``."""
    batch = torch.zeros(len(images), 3, side, side)
    for image, out in zip(images, batch):
        fit(image, side, out)
    return batch
