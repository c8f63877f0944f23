"""Points from similarity maps, as prompts for SAM (READ).

Legend: n [SEG] tokens of an image, h x w cells of a map.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from model.geometry import margins_cut_off, normalise_maps, resized_size
from model.structures import Prompts

READ_POINTS = {"read_7b": (0.8, 2), "read_13b": (0.6, 1)}  # foreground threshold; downscaling of the map before it
READ_LOW = 0.2  # background threshold


def sam_points(
    prompts: Prompts, maps: torch.Tensor, valid: torch.Tensor, size: tuple[int, int], side: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of an image's maps by ``prompts.point_rule``, as ``map_points`` and ``read_points`` return them.

    Args:
        maps: [n, h, w] in [0, 1]; valid: [n, h, w] bool; size: the image's (H, W).
        side: of the decoding SAM's input, the frame of the points.
    """
    if prompts.point_rule == "extremes":
        return map_points(maps, valid, prompts.points, side)
    return read_points(maps, size, prompts.points, side, prompts.point_rule)


def map_points(scores: torch.Tensor, valid: torch.Tensor, count: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarity as Points (READ): the ``count`` highest patches are foreground, as many of the lowest background.

    A point is the centre of mass of its patch and the neighbours, weighted by the softmax of their scores (for the
    background, of the negated scores). So the masks' losses reach the map through the coordinates of its points.

    Args:
        scores: [n, h, w] in [0, 1]; valid: [n, h, w] bool, patches that may be chosen.
        count: points of each kind; where an image has fewer valid patches, the best one is repeated.
        side: of SAM's input, the frame of the points.

    Returns:
        [n, 2 count, 2] float32 (x, y) in pixels of SAM's input, and [n, 2 count] labels, 1 = foreground,
        0 = background.
    """
    cell = side / max(scores.shape[1:])
    y, x = (cell * (torch.arange(length, device=scores.device) + 0.5) for length in scores.shape[1:])
    positions = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).view(-1, 2)  # [P, 2], P = h w
    near = torch.cdist(positions, positions, p=torch.inf) < 1.5 * cell  # [P, P] a patch and its eight neighbours
    scores, valid = scores.flatten(1), valid.flatten(1)
    points = []
    for sign in (1.0, -1.0):
        signed = (sign * scores).masked_fill(~valid, -torch.inf)
        best = signed.detach().topk(min(count, scores.shape[1])).indices
        best = torch.where(torch.gather(valid, 1, best), best, best[:, :1])
        best = best[:, torch.arange(count, device=scores.device) % best.shape[1]]
        weights = torch.where(near[best], signed[:, None, :], -torch.inf).softmax(-1)  # [N, count, P]
        points.append(weights @ positions)
    labels = torch.cat([torch.ones_like(points[0][..., 0]), torch.zeros_like(points[1][..., 0])], 1)
    return torch.cat(points, 1), labels


def read_points(
    scores: torch.Tensor, size: tuple[int, int], count: int, side: int, rule: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarity as Points by the thresholds of READ's released code, of a map over CLIP's centre crop.

    The map is downscaled and min-max scaled again. Its cells are ordered: foreground (at least the rule's threshold)
    from the highest down, background (at most ``READ_LOW``) from the lowest up, then the unlabelled rest.

    Args:
        scores: [n, h, w] similarities; size: the image's (H, W).
        count: points in all; fewer where the map has fewer cells.
        side: of SAM's input, the frame of the points; rule: of ``READ_POINTS``.

    Returns:
        [n, count, 2] float32 (x, y) in pixels of SAM's input, and [n, count] labels, 1 = foreground, 0 = background,
        -1 = neither.
    """
    high, shrink = READ_POINTS[rule]
    cells = scores.shape[-1] // shrink
    small = F.interpolate(scores[:, None], (cells, cells), mode="bilinear").flatten(1)
    small = normalise_maps(small, None)
    labels = torch.where(small >= high, 1, torch.where(small <= READ_LOW, 0, -1))
    rank = torch.where(labels == 1, -small, torch.where(labels == 0, 2 + small, 4.0))  # foreground, background, rest
    order = rank.sort(stable=True).indices[:, :count]
    height, width = size
    left, _, top, _ = margins_cut_off(size, cells)
    columns, rows = cells + 2 * left, cells + 2 * top  # READ assumes equal margins on both sides
    x = ((order % cells + left + 0.5) * width / columns).floor().clamp(max=width - 1)
    y = ((order // cells + top + 0.5) * height / rows).floor().clamp(max=height - 1)
    sam_height, sam_width = resized_size(height, width, side)
    points = torch.stack([x * sam_width / width, y * sam_height / height], -1) + 0.5
    return points, torch.gather(labels, 1, order)
