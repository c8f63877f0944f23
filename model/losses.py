"""The objective's terms (Eq. 8, 9) as pure functions. Masks are uint8 with 0, 1 and 255 = ignored.

Legend: n masks of one image, H x W its original size.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

IGNORE = 255
EPSILON = 1e-6
DICE_SCALE = 1000.0
# Of masks that are worked on together. The losses keep 35 bytes of each for the backward pass; 13 where the masks of an
# image have more and go in parts, of which one at a time is computed anew.
PIXELS_AT_ONCE = 2**22


def masks_at_once(masks: torch.Tensor) -> int:
    """How many masks of [n, H, W] to work on together: all of a small image, one of a large photograph."""
    return max(1, PIXELS_AT_ONCE // max(1, masks[0].numel() if len(masks) else 0))


def masked_mean(values: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Mean over pixels that are kept, [n, H, W] -> [n]; 0 where nothing is kept."""
    return (values * keep).flatten(1).sum(1) / keep.flatten(1).sum(1).clamp(min=1)


def mask_bce(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Per-pixel binary cross-entropy of SAM's masks: [n, H, W] logits, [n, H, W] uint8 -> [n]."""
    keep = targets != IGNORE
    values = F.binary_cross_entropy_with_logits(logits, (targets == 1).float(), reduction="none")
    return masked_mean(values, keep)


def dice(probabilities: torch.Tensor, targets: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """1 - (2 sum(pt)/s + eps) / (sum(p)/s + sum(t)/s + eps): [n, H, W] each -> [n]."""
    overlap = (probabilities * targets).flatten(1).sum(1)
    total = probabilities.flatten(1).sum(1) + targets.flatten(1).sum(1)
    return 1 - (2 * overlap / scale + EPSILON) / (total / scale + EPSILON)


def mask_dice(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Dice loss of SAM's masks: [n, H, W] logits, [n, H, W] uint8 -> [n]."""
    keep = targets != IGNORE
    return dice(logits.sigmoid() * keep, (targets == 1).float(), DICE_SCALE)


def soften(targets: torch.Tensor, kernel: int, sigma: float) -> torch.Tensor:
    """M_sigma: the mask convolved with a Gaussian, divided by its maximum (section 4.1).

    Args:
        targets: [n, H, W] uint8; ignored pixels count as background.
        kernel: side of the kernel in pixels; shrunk to an odd number that fits the mask.
        sigma: its standard deviation in pixels.

    Returns:
        [n, H, W] float32 in [0, 1].
    """
    side = min(kernel, *targets.shape[-2:])
    side -= 1 - side % 2
    found = []
    for part in targets.split(masks_at_once(targets)):
        masks = (part == 1).float()
        soft = blur(masks, side, sigma) if side > 1 and len(masks) else masks
        found.append(soft / soft.flatten(1).amax(1).clamp(min=EPSILON)[:, None, None])
    return torch.cat(found)


def blur(masks: torch.Tensor, side: int, sigma: float) -> torch.Tensor:
    """Gaussian blur with reflected borders, [n, H, W] float32 -> the same; ``side`` is odd and fits the masks.

    torchvision's values to rounding. A Gaussian is the product of its row and its column: 2 x side multiplications per
    pixel instead of side x side, and as sums of shifted images they run at the memory's speed.
    """
    half = side // 2
    weights = [math.exp(-0.5 * (place / sigma) ** 2) for place in range(-half, half + 1)]
    blurred = F.pad(masks[:, None], [half] * 4, mode="reflect")[:, 0]
    for axis in (2, 1):
        shifts = (blurred.narrow(axis, start, blurred.shape[axis] - 2 * half) for start in range(side))
        total = next(shifts) * (weights[0] / sum(weights))
        for shifted, weight in zip(shifts, weights[1:], strict=True):
            total.add_(shifted, alpha=weight / sum(weights))
        blurred = total
    return blurred


def positive_weight(soft: torch.Tensor, shared: bool = False) -> torch.Tensor:
    """Background over foreground of soft masks, [n, H, W] -> [n]; ``shared`` gives all masks one value (released)."""
    if shared:
        positive = soft.sum()
        return ((soft.numel() - positive) / positive.clamp(min=EPSILON)).expand(len(soft))
    positive = soft.flatten(1).sum(1)
    return (soft[0].numel() - positive) / positive.clamp(min=EPSILON) if len(soft) else positive


def map_bce(maps: torch.Tensor, soft: torch.Tensor, weight: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """L_bce(M, M_sigma): the [0, 1] map taken as logits, positives weighted: [n, H, W] x 2, [n], [n, H, W] -> [n]."""
    values = F.binary_cross_entropy_with_logits(maps, soft, pos_weight=weight[:, None, None], reduction="none")
    return masked_mean(values, keep)


def map_dice(maps: torch.Tensor, soft: torch.Tensor, weight: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """L_dice(M, M_sigma) of the map's sigmoid against the weighted soft mask: [n, H, W] x 2, [n], [n, H, W] -> [n]."""
    return dice(maps.sigmoid() * keep, soft * weight[:, None, None] * keep)


def map_iou(maps: torch.Tensor, targets: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """sum min / sum max of the [0, 1] map and the hard mask, which is the IoU of binary maps without a threshold:
    [n, H, W] x 3 -> [n]."""
    overlap = (torch.minimum(maps, targets) * keep).flatten(1).sum(1)
    union = (torch.maximum(maps, targets) * keep).flatten(1).sum(1)
    return overlap / union.clamp(min=EPSILON)


def text_loss(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum of next-token cross-entropies: [M, V], [M], [M] -> scalar."""
    return (F.cross_entropy(logits.float(), targets, reduction="none") * weights).sum()
