"""Geometry of pixels, patches and prompts: sizes of resized images, and maps on grids of patches and pixels.

Legend: n masks or maps, P cells of a map's grid h x w, H, W the image's own size. Sizes are in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from model.structures import EPSILON


def resized_size(height: int, width: int, side: int) -> tuple[int, int]:
    """SAM's rule: (height, width) after scaling the longest side to ``side``; at least one pixel each."""
    scale = side / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def cropped_size(height: int, width: int, side: int) -> tuple[int, int]:
    """CLIP's rule: (height, width) after scaling the shortest side to ``side``, before the centre crop."""
    shortest = min(height, width)
    return (side, int(side * width / shortest)) if height == shortest else (int(side * height / shortest), side)


def valid_patches(clip_sizes: Sequence[tuple[int, int]], side: int, patch: int) -> torch.Tensor:
    """Patches that show the image, not padding: their top-left pixel lies inside it.

    Args:
        clip_sizes: per row, the resized (height, width) inside the padded square.
        side: of the square; patch: side of a patch.

    Returns:
        [B, P] bool, row-major.
    """
    starts = torch.arange(0, side, patch)
    sizes = torch.tensor(clip_sizes)
    rows, columns = starts[None] < sizes[:, :1], starts[None] < sizes[:, 1:]
    return (rows[:, :, None] & columns[:, None, :]).flatten(1)


def normalise_maps(scores: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Min-max scaling of each map to [0, 1].

    Args:
        scores: [..., P] similarities.
        valid: [..., P] bool: only these define minimum and maximum, the others become 0. None = all cells, as in the
            released weights.

    Returns:
        [..., P] in [0, 1]; a constant map becomes 0.
    """
    if valid is None:
        low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
        return (scores - low) / (high - low).clamp(min=EPSILON)
    low = scores.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
    high = scores.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True)
    return ((scores - low) / (high - low).clamp(min=EPSILON)).masked_fill(~valid, 0.0)


def image_cells(valid: torch.Tensor, keep_padding: bool) -> torch.Tensor:
    """The cells whose tokens a batch holds: all that show the image, ascending.

    A row with fewer of them than another also holds padded ones, so that all rows hold the same number.

    Args:
        valid: [B, P] bool; keep_padding: hold all cells.

    Returns:
        [B, V] int64.
    """
    count = valid.shape[1] if keep_padding else int(valid.sum(1).max())
    return valid.byte().argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values


def split_maps(maps: torch.Tensor, counts: Sequence[int], grids: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Maps [N, ..., P] of a batch as [n, ..., h, w] per image: ``counts`` of them, on its own grid."""
    return [part[..., : h * w].unflatten(-1, (h, w)) for part, (h, w) in zip(maps.split(list(counts)), grids)]


def maps_at(maps: torch.Tensor, side: int, size: tuple[int, int], fit: str = "pad") -> torch.Tensor:
    """Similarity maps of one image at its own size: grid -> padded square -> padding removed -> ``size``.

    Args:
        maps: [n, h, w] in [0, 1].
        side: of the square, CLIP's input side; size: the image's (H, W).
        fit: ``crop`` where CLIP's input is a centre crop; a map is 0 outside of it.

    Returns:
        [n, H, W] float32.
    """
    full = F.interpolate(maps[:, None], (side, side), mode="bilinear", align_corners=False)
    if fit == "crop":
        full = F.pad(full, margins_cut_off(size, side))
    else:
        height, width = resized_size(*size, side)
        full = full[..., :height, :width]
    return F.interpolate(full, size, mode="bilinear", align_corners=False)[:, 0]


def margins_cut_off(size: tuple[int, int], side: int) -> tuple[int, int, int, int]:
    """Margins that CLIP's centre crop to ``side`` removes: (left, right, top, bottom), the order of ``F.pad``."""
    height, width = (length - side for length in cropped_size(*size, side))
    return width // 2, width - width // 2, height // 2, height - height // 2


def mask_prompts(maps: torch.Tensor, side: int) -> torch.Tensor:
    """SAM mask prompts [n, 1, side, side] of maps [n, H, W]: longest side scaled (antialiased), padded with zeros."""
    if not len(maps):  # CUDA's antialiased kernel fails on zero maps
        return maps.new_zeros(0, 1, side, side)
    size = resized_size(maps.shape[-2], maps.shape[-1], side)
    small = F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False, antialias=True)
    return F.pad(small, (0, side - size[1], 0, side - size[0]))


def on_grid(
    values: torch.Tensor, valid: torch.Tensor, side: int, grid: tuple[int, int], fit: str = "pad"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks at the resolution of a similarity map: scaled into the square of CLIP's input, averaged per patch.

    Args:
        values, valid: [n, H, W], masks and their valid (not ignored) pixels.
        side: of the square; grid: (h, w) of its patches.
        fit: ``crop`` where CLIP's input is a centre crop; what it cuts off does not count.

    Returns:
        [n, h, w] means over valid pixels, and [n, h, w] shares of a patch that are valid (0 in the padding).
    """
    size = values.shape[-2], values.shape[-1]
    stacked = torch.stack([values * valid, valid.expand_as(values).to(values.dtype)], 1)
    if fit == "crop":
        small = F.interpolate(stacked, cropped_size(*size, side), mode="area")
        square = F.pad(small, [-margin for margin in margins_cut_off(size, side)])
    else:
        height, width = resized_size(*size, side)
        small = F.interpolate(stacked, (height, width), mode="area")
        square = F.pad(small, (0, side - width, 0, side - height))
    pooled = F.adaptive_avg_pool2d(square, grid)
    return pooled[:, 0] / pooled[:, 1].clamp(min=EPSILON), pooled[:, 1]
