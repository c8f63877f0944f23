"""How well a predicted IoU, such as that of SAM's own head, tells the actual one."""

from __future__ import annotations

import numpy as np
from scipy.stats import spearmanr


def iou_calibration(predicted: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    """Rank correlation (Spearman's, 0 where all values are equal), mean absolute error, and bias of predicted IoUs.

    Args:
        predicted, actual: [n] each, n > 0: of n masks, or of one [SEG]'s masks from n layers.

    Returns:
        ``rank_correlation`` in [-1, 1]; ``mean_absolute_error``; ``bias``, the mean of predicted - actual.
    """
    predicted, actual = np.asarray(predicted, float), np.asarray(actual, float)
    varied = np.ptp(predicted) > 0 and np.ptp(actual) > 0
    error = predicted - actual
    return {
        "rank_correlation": float(spearmanr(predicted, actual).statistic) if varied else 0.0,
        "mean_absolute_error": float(np.abs(error).mean()),
        "bias": float(error.mean()),
    }
