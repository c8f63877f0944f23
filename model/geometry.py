"""Geometry of pixels, patches and prompts: how images fit their inputs, and maps on grids of patches and pixels.

Legend: n masks or maps, P cells of a map's grid h x w, H, W the image's own size. Sizes are in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Fit:
    """How an image fits the input of an encoder: maps, masks and points go through it to the image, and back.

    Attributes:
        kind: ``pad`` = longest side scaled to ``side``, zeros right and below; ``crop`` = shortest side scaled to it,
            and the centre cut out; ``stretch`` = both sides scaled, whatever their ratio.
        side: of the square; without a meaning for maps of a stretched image, whose grid fills it.
    """

    kind: str
    side: int = 1

    def box(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the whole image of ``size`` (H, W) in the square; a crop begins below 0."""
        if self.kind == "stretch":
            return 0, 0, self.side, self.side
        if self.kind == "pad":
            return 0, 0, *resized_size(*size, self.side)
        left, _, top, _ = margins_cut_off(size, self.side)
        return -top, -left, *cropped_size(*size, self.side)


def valid_patches(sizes: Sequence[tuple[int, int]], fit: Fit, patch: int) -> torch.Tensor:
    """Patches that show the image, not padding: their top-left pixel lies inside it.

    Args:
        sizes: (H, W) of the images; fit: how they fit the square; patch: side of a patch.

    Returns:
        [B, P] bool, row-major.
    """
    starts = torch.arange(0, fit.side, patch)
    inner = torch.tensor([fit.box(size)[2:] for size in sizes])
    rows, columns = starts[None] < inner[:, :1], starts[None] < inner[:, 1:]
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


def maps_at(maps: torch.Tensor, fit: Fit, size: tuple[int, int]) -> torch.Tensor:
    """Similarity maps of one image at its own size: grid -> input's square -> padding removed -> ``size``.

    Args:
        maps: [n, h, w] in [0, 1].
        fit: of the input that the maps show; where it is a centre crop, a map is 0 outside of it.
        size: the image's (H, W).

    Returns:
        [n, H, W] float32.
    """
    full = maps[:, None]
    if fit.kind != "stretch":
        full = F.interpolate(full, (fit.side, fit.side), mode="bilinear", align_corners=False)
    if fit.kind == "crop":
        full = F.pad(full, margins_cut_off(size, fit.side))
    elif fit.kind == "pad":
        _, _, height, width = fit.box(size)
        full = full[..., :height, :width]
    return F.interpolate(full, size, mode="bilinear", align_corners=False)[:, 0]


def margins_cut_off(size: tuple[int, int], side: int) -> tuple[int, int, int, int]:
    """Margins that CLIP's centre crop to ``side`` removes: (left, right, top, bottom), the order of ``F.pad``."""
    height, width = (length - side for length in cropped_size(*size, side))
    return width // 2, width - width // 2, height // 2, height - height // 2


def mask_prompts(maps: torch.Tensor, fit: Fit) -> torch.Tensor:
    """Mask prompts [n, 1, side, side] of maps [n, H, W]: scaled (antialiased) and padded with zeros as ``fit`` says."""
    side = fit.side
    if not len(maps):  # CUDA's antialiased kernel fails on zero maps
        return maps.new_zeros(0, 1, side, side)
    _, _, height, width = fit.box((maps.shape[-2], maps.shape[-1]))
    small = F.interpolate(maps[:, None], (height, width), mode="bilinear", align_corners=False, antialias=True)
    return F.pad(small, (0, side - width, 0, side - height))


def on_grid(
    values: torch.Tensor, valid: torch.Tensor, fit: Fit, grid: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks at the resolution of a similarity map: scaled into the input that it shows, averaged per cell.

    Args:
        values, valid: [n, H, W], masks and their valid (not ignored) pixels.
        fit: of the input; what a crop cuts off does not count. grid: (h, w) of its cells.

    Returns:
        [n, h, w] means over valid pixels, and [n, h, w] shares of a cell that are valid (0 in the padding).
    """
    stacked = torch.stack([values * valid, valid.expand_as(values).to(values.dtype)], 1)
    square = stacked
    if fit.kind != "stretch":
        top, left, height, width = fit.box((values.shape[-2], values.shape[-1]))
        small = F.interpolate(stacked, (height, width), mode="area")
        square = F.pad(small, (left, fit.side - width - left, top, fit.side - height - top))  # negative ones crop
    pooled = F.adaptive_avg_pool2d(square, grid)
    return pooled[:, 0] / pooled[:, 1].clamp(min=EPSILON), pooled[:, 1]
