"""The objective's terms (Eq. 8, 9) as pure functions. Target masks are uint8 with 0, 1 and 255 = ignored.

Legend: n masks of one image, H x W its original size, M tokens of answers, V vocabulary size.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from model.structures import EPSILON, IGNORE_PIXEL

DICE_SCALE = 1000.0
# Pixels of masks processed together. The losses save 35 bytes per pixel for the backward pass, and 13 where an image's
# masks have more pixels: they are then split, and the backward pass recomputes one part at a time.
PIXELS_AT_ONCE = 2**22


def masks_at_once(masks: torch.Tensor) -> int:
    """How many masks of [n, H, W] to process together: all of a small image, one of a large photograph."""
    return max(1, PIXELS_AT_ONCE // max(1, masks[0].numel() if len(masks) else 0))


def masked_mean(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean over valid pixels: [n, H, W] values, [n, H, W] bool or weights -> [n]; 0 where none is valid."""
    return (values * valid).flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)


def mask_bce(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Per-pixel binary cross-entropy of masks: [n, H, W] logits, [n, H, W] uint8 -> [n]; weights: [n, H, W] of pixels,
    which do not change the denominator."""
    valid = targets != IGNORE_PIXEL
    values = F.binary_cross_entropy_with_logits(logits, (targets == 1).float(), weights, reduction="none")
    return masked_mean(values, valid)


@torch.no_grad()
def overlap_weights(logits: torch.Tensor, conversations: torch.Tensor, weight: float) -> torch.Tensor:
    """Pixel weights of PixelLM's target refinement loss (its section 3.3).

    Args:
        logits: [n, H, W] of one image's masks; conversations: [n] the conversation that each belongs to.
        weight: alpha.

    Returns:
        [n, H, W], alpha where at least two predicted masks of the same conversation overlap, 1 elsewhere.
    """
    same = (conversations[:, None] == conversations).to(logits.dtype)
    others = torch.einsum("nm,mhw->nhw", same, (logits > 0).to(logits.dtype))
    return torch.where(others >= 2, weight, 1.0)


def dice(probabilities: torch.Tensor, targets: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """1 - (2 sum(pt)/s + eps) / (sum(p)/s + sum(t)/s + eps): [n, H, W] each -> [n]."""
    overlap = (probabilities * targets).flatten(1).sum(1)
    total = probabilities.flatten(1).sum(1) + targets.flatten(1).sum(1)
    return 1 - (2 * overlap / scale + EPSILON) / (total / scale + EPSILON)


def mask_dice(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Dice loss of SAM's masks: [n, H, W] logits, [n, H, W] uint8 -> [n]."""
    valid = targets != IGNORE_PIXEL
    return dice(logits.sigmoid() * valid, (targets == 1).float(), DICE_SCALE)


def mask_iou(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """IoU of SAM's masks (logits > 0) over valid pixels, without gradient: [n, H, W], [n, H, W] uint8 -> [n]."""
    predicted, true = (logits > 0) & (targets != IGNORE_PIXEL), targets == 1
    overlap, union = (masks.flatten(1).sum(1) for masks in (predicted & true, predicted | true))
    return overlap / union.clamp(min=1)


def soften(targets: torch.Tensor, kernel: int, sigma: float) -> torch.Tensor:
    """M_sigma: the mask convolved with a Gaussian, divided by its maximum (section 4.1).

    Args:
        targets: [n, H, W] uint8; ignored pixels count as background.
        kernel: side of the kernel in pixels; shrunk to an odd number that fits the mask.
        sigma: the Gaussian's standard deviation in pixels.

    Returns:
        [n, H, W] float32 in [0, 1].
    """
    side = min(kernel, *targets.shape[-2:])
    side -= 1 - side % 2
    parts = []
    for part in targets.split(masks_at_once(targets)):
        masks = (part == 1).float()
        blurred = blur(masks, side, sigma) if side > 1 and len(masks) else masks
        parts.append(blurred / blurred.flatten(1).amax(1).clamp(min=EPSILON)[:, None, None])
    return torch.cat(parts)


def blur(masks: torch.Tensor, side: int, sigma: float) -> torch.Tensor:
    """Gaussian blur with reflected borders, [n, H, W] float32 -> the same; ``side`` is odd and fits the masks.

    Equals torchvision's ``gaussian_blur`` up to rounding. The kernel is separable: 2 x side multiplications per pixel
    instead of side x side, as sums of shifted images, which only memory bandwidth limits.
    """
    half = side // 2
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-half, half + 1)]
    blurred = F.pad(masks[:, None], [half] * 4, mode="reflect")[:, 0]
    for axis in (2, 1):
        shifts = (blurred.narrow(axis, start, blurred.shape[axis] - 2 * half) for start in range(side))
        total = next(shifts) * (weights[0] / sum(weights))
        for shifted, weight in zip(shifts, weights[1:], strict=True):
            total.add_(shifted, alpha=weight / sum(weights))
        blurred = total
    return blurred


def positive_weight(targets: torch.Tensor, shared: bool = False) -> torch.Tensor:
    """Background over foreground of (soft) target masks, [n, H, W] -> [n]; ``shared``: one value for all (released)."""
    if shared:
        positive = targets.sum()
        return ((targets.numel() - positive) / positive.clamp(min=EPSILON)).expand(len(targets))
    positive = targets.flatten(1).sum(1)
    return (targets[0].numel() - positive) / positive.clamp(min=EPSILON) if len(targets) else positive


def map_bce(maps: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """L_bce(M, M_sigma), the [0, 1] map taken as logits, positives weighted: [n, H, W] x 2, [n], [n, H, W] -> [n]."""
    values = F.binary_cross_entropy_with_logits(maps, targets, pos_weight=weight[:, None, None], reduction="none")
    return masked_mean(values, valid)


def map_dice(maps: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """L_dice(M, M_sigma) of the map's sigmoid and the weighted target: [n, H, W] x 2, [n], [n, H, W] -> [n]."""
    return dice(maps.sigmoid() * valid, targets * weight[:, None, None] * valid)


def map_iou(maps: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Soft IoU of the [0, 1] map and the hard mask, sum min / sum max, the IoU of binary maps: [n, H, W] x 3 -> [n]."""
    overlap = (torch.minimum(maps, targets) * valid).flatten(1).sum(1)
    union = (torch.maximum(maps, targets) * valid).flatten(1).sum(1)
    return overlap / union.clamp(min=EPSILON)


def text_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropies: [M, V], [M] -> [M]."""
    return F.cross_entropy(logits.float(), targets, reduction="none")
