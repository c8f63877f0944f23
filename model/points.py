"""Points from similarity maps, as prompts for SAM (READ). Legend: N [SEG] tokens, P = grid x grid image tokens."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from model.geometry import grid_of, margins_cut_off, normalise_maps, resized_size

READ_POINTS = {"read_7b": (0.8, 2), "read_13b": (0.6, 1)}  # what is high in a map; how much the map shrinks first
READ_LOW = 0.2


def map_points(scores: torch.Tensor, valid: torch.Tensor, count: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarity as points (READ): the ``count`` highest patches are foreground, as many of the lowest background.

    A point is the centre of mass of its patch and the neighbours, weighted by the softmax of their scores (for the
    background: of the negated scores), so that the masks' losses reach the map through the place of its points.

    Args:
        scores: [N, P] in [0, 1]; valid: [N, P] patches that show the image, others are never taken.
        count: of each kind; where an image has fewer patches, some are taken more than once.
        side: of SAM's input, in whose pixels points are given.

    Returns:
        [N, 2 count, 2] float32 (x, y), and [N, 2 count] labels, 1 = foreground and 0 = background.
    """
    grid, _ = grid_of(scores.shape[1])
    centres = (torch.arange(grid, device=scores.device) + 0.5) * (side / grid)
    place = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1).view(-1, 2)  # [P, 2]
    near = torch.cdist(place, place, p=torch.inf) < 1.5 * side / grid  # [P, P] a patch and its eight neighbours
    found = []
    for sign in (1.0, -1.0):
        signed = (sign * scores).masked_fill(~valid, -torch.inf)
        best = signed.detach().topk(min(count, scores.shape[1])).indices
        usable = torch.gather(valid, 1, best)
        best = torch.where(usable, best, best[:, :1])
        best = best[:, torch.arange(count, device=scores.device) % best.shape[1]]
        weights = torch.where(near[best], signed[:, None, :], -torch.inf).softmax(-1)  # [N, count, P]
        found.append(weights @ place)
    labels = torch.cat([torch.ones_like(found[0][..., 0]), torch.zeros_like(found[1][..., 0])], 1)
    return torch.cat(found, 1), labels


def read_points(
    scores: torch.Tensor, sizes: list[tuple[int, int]], count: int, side: int, rule: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarity as points, as READ's released code chooses them from the crop that CLIP saw.

    The map is shrunk and brought to [0, 1] again. Cells of at least the rule's threshold are foreground, from the
    highest down; then come those of at most ``READ_LOW`` as background, from the lowest up; then the rest, unlabelled.

    Args:
        scores: [N, P] similarities; sizes: [N] the images' (H, W).
        count: points in all; there are fewer where the map has fewer cells.
        side: of SAM's input, in whose pixels points are given; rule: of ``READ_POINTS``.

    Returns:
        [N, count, 2] float32 (x, y), and [N, count] labels, 1 = foreground, 0 = background, -1 = neither.
    """
    high, shrink = READ_POINTS[rule]
    grid, _ = grid_of(scores.shape[1])
    cells = grid // shrink
    small = F.interpolate(scores.view(-1, 1, grid, grid), (cells, cells), mode="bilinear").flatten(1)
    small = normalise_maps(small, None)
    labels = torch.where(small >= high, 1, torch.where(small <= READ_LOW, 0, -1))
    rank = torch.where(labels == 1, -small, torch.where(labels == 0, 2 + small, 4.0))  # each kind behind the one before
    order = rank.sort(stable=True).indices[:, :count]
    places = []
    for row, (height, width) in zip(order, sizes):
        left, _, top, _ = margins_cut_off((height, width), cells)
        across, down = cells + 2 * left, cells + 2 * top  # READ cuts off as much on either side
        x = ((row % cells + left + 0.5) * width / across).floor().clamp(max=width - 1)
        y = ((row // cells + top + 0.5) * height / down).floor().clamp(max=height - 1)
        tall, wide = resized_size(height, width, side)
        places.append(torch.stack([x * wide / width, y * tall / height], -1) + 0.5)
    points = torch.stack(places) if places else scores.new_zeros(0, order.shape[1], 2)
    return points, torch.gather(labels, 1, order)
