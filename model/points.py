"""Points from similarity maps, as prompts for SAM (READ).

Legend: n [SEG] tokens of an image, h x w cells of a map.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from model.geometry import Fit, margins_cut_off, normalise_maps
from model.structures import Prompts

READ_POINTS = {"read_7b": (0.8, 2), "read_13b": (0.6, 1)}  # foreground threshold; downscaling of the map before it
READ_LOW = 0.2  # background threshold


def sam_points(
    prompts: Prompts, maps: torch.Tensor, valid: torch.Tensor, size: tuple[int, int], seen: Fit, decoded: Fit
) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of an image's maps by ``prompts.point_rule``, as ``map_points`` and ``read_points`` return them.

    Args:
        maps: [n, h, w] in [0, 1]; valid: [n, h, w] bool; size: the image's (H, W).
        seen: how the image fits the input that the maps show; decoded: that of the mask decoder, the points' frame.
    """
    if prompts.point_rule == "extremes":
        return map_points(maps, valid, prompts.points, cell_centres(maps, size, seen, decoded))
    return read_points(maps, size, prompts.points, decoded, prompts.point_rule)


def cell_centres(maps: torch.Tensor, size: tuple[int, int], seen: Fit, decoded: Fit) -> torch.Tensor:
    """Centres [h w, 2] of the cells of ``maps`` [n, h, w], (x, y) in pixels of the mask decoder's input."""
    axes = []
    for cells, start, length, out_start, out_length in zip(
        maps.shape[1:], *_spans(seen.box(size)), *_spans(decoded.box(size)), strict=True
    ):
        centres = (torch.arange(cells, device=maps.device) + 0.5) * (seen.side / cells)
        axes.append(out_start + (centres - start) * (out_length / length))
    return torch.stack(torch.meshgrid(axes[1], axes[0], indexing="xy"), -1).view(-1, 2)


def _spans(box: tuple[int, int, int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(top, left), (height, width) of a box."""
    return box[:2], box[2:]


def map_points(
    scores: torch.Tensor, valid: torch.Tensor, count: int, centres: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarity as Points (READ): the ``count`` highest patches are foreground, as many of the lowest background.

    A point is the centre of mass of its patch and the valid neighbours, weighted by the softmax of their scores (for
    the background, of the negated scores). So the masks' losses reach the map through the coordinates of its points.

    Args:
        scores: [n, h, w] in [0, 1]; valid: [n, h, w] bool, patches that may be chosen.
        count: points of each kind; where an image has fewer valid patches, the best one is repeated.
        centres: [h w, 2] (x, y) of the patches in pixels of SAM's input.

    Returns:
        [n, 2 count, 2] float32 (x, y) in pixels of SAM's input, and [n, 2 count] labels, 1 = foreground,
        0 = background.
    """
    rows, columns = (torch.arange(length, device=scores.device) for length in scores.shape[1:])
    cells = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).view(-1, 2).float()  # [P, 2], P = h w
    near = torch.cdist(cells, cells, p=torch.inf) < 1.5  # [P, P] a patch and its eight neighbours
    scores, valid = scores.flatten(1), valid.flatten(1)
    points = []
    for sign in (1.0, -1.0):
        signed = (sign * scores).masked_fill(~valid, -torch.inf)
        best = signed.detach().topk(min(count, scores.shape[1])).indices
        best = torch.where(torch.gather(valid, 1, best), best, best[:, :1])
        best = best[:, torch.arange(count, device=scores.device) % best.shape[1]]
        weights = torch.where(near[best], signed[:, None, :], -torch.inf).softmax(-1)  # [N, count, P]
        points.append(weights @ centres)
    labels = torch.cat([torch.ones_like(points[0][..., 0]), torch.zeros_like(points[1][..., 0])], 1)
    return torch.cat(points, 1), labels


def read_points(
    scores: torch.Tensor, size: tuple[int, int], count: int, decoded: Fit, rule: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarity as Points by the thresholds of READ's released code, of a map over CLIP's centre crop.

    The map is downscaled and min-max scaled again. Its cells are ordered: foreground (at least the rule's threshold)
    from the highest down, background (at most ``READ_LOW``) from the lowest up, then the unlabelled rest.

    Args:
        scores: [n, h, w] similarities; size: the image's (H, W).
        count: points in all; fewer where the map has fewer cells.
        decoded: how the image fits SAM's input, the frame of the points; rule: of ``READ_POINTS``.

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
    _, _, sam_height, sam_width = decoded.box(size)
    points = torch.stack([x * sam_width / width, y * sam_height / height], -1) + 0.5
    return points, torch.gather(labels, 1, order)
