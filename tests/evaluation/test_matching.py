"""Matching against brute force over all assignments, with a cost computed pixel by pixel."""

import itertools
import math

import numpy as np
import pytest

from utils.evaluation.matching import match_masks, matching_cost

SHAPE = (6, 7)


def random_masks(rng, predictions, targets):
    logits = rng.normal(0, 3, (predictions, *SHAPE)).astype(np.float32)
    return logits, rng.choice([0, 1, 255], (targets, *SHAPE), p=[0.6, 0.3, 0.1]).astype(np.uint8)


def reference_cost(logits, target):
    """BCE and dice of one pair as they are defined, in Python floats."""
    pixels = [(float(x), int(y)) for x, y in zip(logits.ravel(), target.ravel()) if y != 255]
    inside = [1 / (1 + math.exp(-x)) for x, _ in pixels]
    bce = -sum(math.log(p if y else 1 - p) for p, (_, y) in zip(inside, pixels)) / len(pixels)
    overlap = sum(p for p, (_, y) in zip(inside, pixels) if y)
    return bce + 1 - (2 * overlap + 1) / (sum(inside) + sum(y for _, y in pixels) + 1)


def best_by_brute_force(cost):
    if len(cost) > len(cost[0]):
        cost = cost.T
    return min(sum(cost[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(len(cost[0])), len(cost)))


@pytest.mark.parametrize(("predictions", "targets"), [(1, 1), (2, 2), (3, 5), (5, 3), (4, 4)])
def test_the_cost_is_bce_and_dice_and_the_matching_the_best(predictions, targets):
    for seed in range(5):
        logits, masks = random_masks(np.random.default_rng(seed), predictions, targets)
        cost = matching_cost(logits, masks)
        assert cost == pytest.approx(np.array([[reference_cost(x, y) for y in masks] for x in logits]), rel=1e-9)
        pairs = match_masks(logits, masks)
        matched = [pair for pair in pairs if None not in pair]
        assert len(matched) == min(predictions, targets)
        assert sum(cost[pair] for pair in matched) == pytest.approx(best_by_brute_force(cost), rel=1e-12)
        assert sorted(p for p, _ in pairs if p is not None) == list(range(predictions))
        assert sorted(t for _, t in pairs if t is not None) == list(range(targets))


def test_nothing_to_match():
    logits, masks = random_masks(np.random.default_rng(0), 2, 2)
    assert match_masks(logits[:0], masks) == [(None, 0), (None, 1)]
    assert match_masks(logits, masks[:0]) == [(0, None), (1, None)]
    assert match_masks(logits[:0], masks[:0]) == []


def test_certain_logits_and_ignored_targets_cost_finite_amounts():
    logits = np.full((2, *SHAPE), 1e4, np.float32)
    logits[1] = -1e4
    masks = np.stack([np.zeros(SHAPE, np.uint8), np.ones(SHAPE, np.uint8), np.full(SHAPE, 255, np.uint8)])
    assert np.isfinite(matching_cost(logits, masks)).all()
    assert match_masks(logits, masks)[:2] == [(0, 1), (1, 0)]
