"""How well an uncertainty ranks errors: the area under the risk-coverage curve, and its excess over the ideal one.

Answers are sorted from the most certain to the least. The curve is the mean risk (1 - IoU) of the first k answers, AURC
its mean over k = 1 .. n. The ideal order is that of the risk itself. AUSE (area under the sparsification error) is
AURC minus the ideal AURC: 0 = errors are ranked perfectly. An uninformative uncertainty has the mean risk as AURC.
"""

from __future__ import annotations

import numpy as np


def area_under_risk(uncertainty: np.ndarray, risk: np.ndarray, counts: np.ndarray | None = None) -> float:
    """AURC, averaged over all orders of answers of equal uncertainty.

    Args:
        uncertainty, risk: [n] each, n > 0.
        counts: [n] multiplicity of each answer (in a bootstrap resample), not all 0; None = 1.
    """
    counts = np.ones(len(risk), np.int64) if counts is None else counts
    order = np.lexsort((risk, uncertainty))  # ties by risk: sums do not depend on the answers' order
    uncertainty, risk, counts = uncertainty[order], risk[order], counts[order]
    starts = np.flatnonzero(np.diff(uncertainty, prepend=-np.inf))
    size = np.add.reduceat(counts, starts)
    total = np.add.reduceat(counts * risk, starts)
    before, total_before = np.cumsum(size) - size, np.cumsum(total) - total
    mean = np.divide(total, size, out=np.zeros(len(size)), where=size > 0)
    # The sum over j = 1 .. size of (total_before + j mean) / (before + j), with harmonic numbers in place of the sum
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, counts.sum() + 1))])
    area = total + (total_before - before * mean) * (harmonic[before + size] - harmonic[before])
    return float(area.sum() / counts.sum())


def ranking(uncertainty: np.ndarray, risk: np.ndarray, counts: np.ndarray | None = None) -> dict[str, float]:
    """AURC and AUSE; arguments as in ``area_under_risk``."""
    area = area_under_risk(uncertainty, risk, counts)
    return {"AURC": area, "AUSE": max(0.0, area - area_under_risk(risk, risk, counts))}
