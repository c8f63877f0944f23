"""Where pixels, patches and prompts lie: the sizes of resized images, and maps on grids of patches and pixels.

Legend: n masks or maps, P = h x w image tokens, H, W the image's own size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

EPSILON = 1e-6


def resized_size(height: int, width: int, side: int) -> tuple[int, int]:
    """SAM's rule: (height, width) after scaling the longest side to ``side``; at least one pixel each."""
    scale = side / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def cropped_size(height: int, width: int, side: int) -> tuple[int, int]:
    """CLIP's rule: (height, width) after scaling the shortest side to ``side``; the middle of it is cut out."""
    shortest = min(height, width)
    return (side, int(side * width / shortest)) if height == shortest else (int(side * height / shortest), side)


def valid_patches(clip_sizes: Sequence[tuple[int, int]], side: int, patch: int) -> torch.Tensor:
    """Which patches show the image: those whose top-left pixel lies inside it, [B, P] bool, row-major.

    Args:
        clip_sizes: per row, the resized (height, width) inside the padded square.
    """
    start = torch.arange(0, side, patch)
    sizes = torch.tensor(clip_sizes)
    rows, columns = start[None] < sizes[:, :1], start[None] < sizes[:, 1:]
    return (rows[:, :, None] & columns[:, None, :]).flatten(1)


def normalise_maps(scores: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Min-max to [0, 1] per map.

    Args:
        scores: [N, P] similarity scores.
        valid: [N, P] bool: only these define minimum and maximum, the others become 0. None = all tokens, as in the
            released weights.

    Returns:
        [N, P] in [0, 1]; a flat map becomes 0.
    """
    if valid is None:
        low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
        return (scores - low) / (high - low).clamp(min=EPSILON)
    low = scores.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
    high = scores.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True)
    return ((scores - low) / (high - low).clamp(min=EPSILON)).masked_fill(~valid, 0.0)


def grid_of(tokens: int) -> tuple[int, int]:
    """(h, w) of P image tokens: CLIP's input is a square."""
    side = math.isqrt(tokens)
    return side, side


def maps_at(maps: torch.Tensor, side: int, size: tuple[int, int], fit: str = "pad") -> torch.Tensor:
    """Similarity maps of one image at its own size: grid -> padded square -> crop the padding -> ``size``.

    Args:
        maps: [n, P] in [0, 1].
        side: of the square, CLIP's input side; size: the image's (H, W).
        fit: ``crop`` where CLIP saw the middle of the image alone; a map is 0 in what was cut off.

    Returns:
        [n, H, W] float32.
    """
    full = F.interpolate(maps.view(-1, 1, *grid_of(maps.shape[1])), (side, side), mode="bilinear", align_corners=False)
    if fit == "crop":
        full = F.pad(full, margins_cut_off(size, side))
    else:
        height, width = resized_size(*size, side)
        full = full[..., :height, :width]
    return F.interpolate(full, size, mode="bilinear", align_corners=False)[:, 0]


def margins_cut_off(size: tuple[int, int], side: int) -> tuple[int, int, int, int]:
    """What CLIP's crop to a square of ``side`` leaves out: left, right, top, bottom, as ``F.pad`` takes it."""
    height, width = (length - side for length in cropped_size(*size, side))
    return width // 2, width - width // 2, height // 2, height - height // 2


def mask_prompts(maps: torch.Tensor, side: int) -> torch.Tensor:
    """[n, H, W] maps -> [n, 1, side, side] SAM mask prompts: longest side scaled (antialiased), padded with zeros."""
    size = resized_size(maps.shape[-2], maps.shape[-1], side)
    small = F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False, antialias=True)
    return F.pad(small, (0, side - size[1], 0, side - size[0]))


def on_grid(
    values: torch.Tensor, keep: torch.Tensor, side: int, grid: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks as the similarity map's patches see them: scaled into the padded square, averaged per patch.

    Args:
        values, keep: [n, H, W], a mask and which of its pixels count.
        side: of the square in pixels; grid: (h, w) of its patches.

    Returns:
        [n, h, w] means over the pixels that count, and the share of a patch that these are (0 in the padding).
    """
    height, width = resized_size(values.shape[-2], values.shape[-1], side)
    both = torch.stack([values * keep, keep.expand_as(values).to(values.dtype)], 1)
    small = F.interpolate(both, (height, width), mode="area")
    pooled = F.adaptive_avg_pool2d(F.pad(small, (0, side - width, 0, side - height)), grid)
    return pooled[:, 0] / pooled[:, 1].clamp(min=EPSILON), pooled[:, 1]
