"""Bipartite matching of predicted masks and targets, for questions with several targets (MUSE).

Legend: N predicted masks, M targets, H, W the image's size.
"""

from __future__ import annotations

import numpy as np

from model.structures import IGNORE_PIXEL


def matching_cost(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Cost of matching each prediction to each target: BCE + dice over all pixels (evaluation.md).

    Args:
        logits: [N, H, W].
        targets: [M, H, W] uint8 with 0, 1 and 255 (ignored).

    Returns:
        [N, M] float64.
    """
    x, valid, true = (
        values.reshape(len(values), np.prod(values.shape[1:], dtype=int)).astype(np.float64)
        for values in (logits, targets != IGNORE_PIXEL, targets == 1)
    )
    pixels = np.maximum(valid.sum(1), 1)
    bce = (np.logaddexp(0, -x) @ true.T + np.logaddexp(0, x) @ (valid - true).T) / pixels
    inside = np.exp(-np.logaddexp(0, -x))  # sigmoid
    dice = 1 - (2 * inside @ true.T + 1) / (inside @ valid.T + true.sum(1) + 1)
    return bce + dice


def match_masks(logits: np.ndarray, targets: np.ndarray) -> list[tuple[int | None, int | None]]:
    """One-to-one matching of least total cost (Hungarian method), then the unmatched predictions and targets.

    Args:
        logits, targets: as for ``matching_cost``; N and M may differ and may be 0.

    Returns:
        pairs (prediction, target): matched ones by prediction, then ``(k, None)`` and ``(None, k)``.
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = (indices.tolist() for indices in linear_sum_assignment(matching_cost(logits, targets)))
    pairs: list[tuple[int | None, int | None]] = list(zip(rows, columns))
    pairs += [(k, None) for k in range(len(logits)) if k not in rows]
    return pairs + [(None, k) for k in range(len(targets)) if k not in columns]
