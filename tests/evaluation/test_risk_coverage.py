"""The ranking of errors by uncertainty against all orders written out."""

from __future__ import annotations

from itertools import pairwise, permutations

import numpy as np
import pytest

from utils.evaluation.risk_coverage import area_under_risk, ranking


def brute_force(uncertainty, risk) -> float:
    """The mean, over all orders from certain to uncertain, of the mean risk of the first 1, 2, .. n answers."""
    n = len(risk)
    areas = [
        np.mean([np.mean([risk[i] for i in order[:k]]) for k in range(1, n + 1)])
        for order in permutations(range(n))
        if all(uncertainty[a] <= uncertainty[b] for a, b in pairwise(order))
    ]
    return float(np.mean(areas))


@pytest.mark.parametrize("seed", range(8))
def test_area_is_the_mean_over_all_orders_of_ties(seed):
    rng = np.random.default_rng(seed)
    uncertainty, risk = rng.integers(0, 3, 6) / 2, rng.random(6).round(1)
    found = ranking(uncertainty, risk)
    assert found["AURC"] == pytest.approx(brute_force(uncertainty, risk))
    assert found["AUSE"] == pytest.approx(found["AURC"] - brute_force(risk, risk))
    shuffled = rng.permutation(6)
    assert ranking(uncertainty[shuffled], risk[shuffled]) == found


def test_perfect_reversed_and_silent():
    risk = np.linspace(0, 0.9, 10)
    perfect, silent, reversed_ = (ranking(u, risk) for u in (risk**2, np.zeros(10), -risk))
    assert perfect["AUSE"] == 0
    assert silent["AURC"] == pytest.approx(risk.mean())  # equal uncertainties say nothing
    assert reversed_["AUSE"] > silent["AUSE"] > 0


def test_degenerate():
    assert ranking(np.array([0.3]), np.array([0.4])) == {"AURC": pytest.approx(0.4), "AUSE": 0.0}
    assert ranking(np.array([0.1, 0.2, 0.2]), np.zeros(3)) == {"AURC": 0.0, "AUSE": 0.0}
    equal = ranking(np.array([0.1, 0.2, 0.3]), np.full(3, 0.25))
    assert (equal["AURC"], equal["AUSE"]) == pytest.approx((0.25, 0.0))


def test_counts_repeat_answers():
    rng = np.random.default_rng(0)
    uncertainty, risk = rng.random(9), rng.random(9)
    counts = np.array([0, 1, 3, 0, 2, 1, 0, 1, 1])
    repeated = area_under_risk(np.repeat(uncertainty, counts), np.repeat(risk, counts))
    assert area_under_risk(uncertainty, risk, counts) == pytest.approx(repeated)
