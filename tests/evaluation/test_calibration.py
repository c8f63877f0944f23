"""Predicted against actual IoU."""

from __future__ import annotations

import numpy as np
import pytest

from utils.evaluation.calibration import iou_calibration


def test_ranks_and_errors():
    actual = np.array([0.1, 0.5, 0.6, 0.9])
    same = {"rank_correlation": 1.0, "mean_absolute_error": 0.0, "bias": 0.0}
    assert iou_calibration(actual, actual) == pytest.approx(same)
    above = {"rank_correlation": 1.0, "mean_absolute_error": 0.2, "bias": 0.2}
    assert iou_calibration(actual + 0.2, actual) == pytest.approx(above)
    assert iou_calibration(-actual, actual)["rank_correlation"] == pytest.approx(-1)
    assert iou_calibration(actual[[1, 0, 2, 3]], actual)["rank_correlation"] == pytest.approx(0.8)


def test_equal_values_rank_nothing():
    assert iou_calibration(np.full(3, 0.5), np.array([0.2, 0.4, 0.6]))["rank_correlation"] == 0
    assert iou_calibration(np.array([0.5]), np.array([0.7]))["mean_absolute_error"] == pytest.approx(0.2)
