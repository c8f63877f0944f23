"""Metrics: pixel counts per mask, and the benchmarks' metrics from records alone.

A ``Record`` is one scored answer and one line of a result's JSONL. Every metric is a ratio of two sums over records
(except the ranking by uncertainty). Integers are summed exactly and IoUs with ``math.fsum``, so that neither order,
batch size nor the number of processes changes the last bit.

Legend: H, W the image's size; P predicted, G true pixels; I = |P and G|, U = |P or G|, without ignored pixels (255).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from model.structures import IGNORE_PIXEL
from utils.evaluation.benchmarks import Benchmark
from utils.evaluation.risk_coverage import ranking

GROUP_KEYS = ("length", "part", "family", "targets")  # of a query's meta, for breakdowns
RESAMPLES = 1000


@dataclass
class Record:
    """One answer and its score.

    Attributes:
        index: of the image in the split.
        image: its path or source.
        image_id: its id in the data set.
        query_id: unique within the image's queries.
        query: the expression in the data set.
        question: the prompt that was made of it.
        answer: the generated text (the given one if teacher-forced).
        layers: the hidden state that each [SEG] used.
        rejected: whether the answer says that the target is absent.
        expected_empty: whether the target is absent.
        I, U, P, G: pixels of the decoded mask against the ground truth, also for a rejecting answer (see ``pair``);
            where several targets are matched (MUSE), sums over the pairs.
        masks: COCO RLE of each [SEG]. Their union is scored, unless masks are matched.
        meta: of the query, for breakdowns.
        pairs: I and U of each matched pair; empty where one mask is expected.
        uncertainty: of each [SEG] (``MaskUncertainty.score``) with ``mc:T``; else empty.
    """

    index: int
    image: str
    image_id: str
    query_id: str
    query: str
    question: str
    answer: str
    layers: list[int]
    rejected: bool
    expected_empty: bool
    I: int  # noqa: E741
    U: int
    P: int
    G: int
    masks: list[dict[str, Any]]
    meta: dict[str, Any] = field(default_factory=dict)
    pairs: list[list[int]] = field(default_factory=list)
    uncertainty: list[float] = field(default_factory=list)

    @property
    def max_uncertainty(self) -> float:
        """The answer's uncertainty: that of its most uncertain mask; 0 for a rejection, which no layer affects."""
        return 0.0 if self.rejected else max(self.uncertainty, default=0.0)

    @property
    def predicted_empty(self) -> bool:
        return self.rejected or self.P == 0


# -- one mask ----------------------------------------------------------------------------------------------------------


def count_pixels(predicted: np.ndarray, target: np.ndarray) -> tuple[int, int, int, int]:
    """I, U, P and G of one mask.

    Args:
        predicted: [H, W] bool.
        target: [H, W] uint8 with 0, 1 and 255 (ignored).
    """
    if predicted.shape != target.shape:
        raise ValueError(f"the predicted mask is {predicted.shape}, the true one {target.shape} (height, width)")
    valid, true = target != IGNORE_PIXEL, target == 1
    predicted = predicted & valid
    intersection, p, g = (int(np.count_nonzero(mask)) for mask in (predicted & true, predicted, true))
    return intersection, p + g - intersection, p, g


def merge_targets(masks: np.ndarray, height: int, width: int) -> np.ndarray:
    """Union [H, W] of a query's targets [N, H, W]; a pixel is ignored if it is in no target and ignored by one."""
    merged = np.zeros((height, width), dtype=np.uint8)
    merged[(masks == IGNORE_PIXEL).any(axis=0)] = IGNORE_PIXEL
    merged[(masks == 1).any(axis=0)] = 1
    return merged


# -- all masks ---------------------------------------------------------------------------------------------------------


def pair(record: Record, protocol: str = "") -> tuple[int, int]:
    """I and U as they enter the metrics: a rejecting answer counts as an empty mask.

    For an absent target, a rejection is a perfect 0 / 0, and a mask adds its pixels to U. For a present target, a
    rejection adds |G| to U with I = 0 (gRefCOCO's rule); ``gsva`` scores the mask that is decoded anyway.
    """
    if record.rejected and (record.expected_empty or protocol != "gsva"):
        return 0, record.G
    return record.I, record.U


def ious(record: Record, protocol: str = "") -> list[float]:
    """I / U of each mask of an answer; 1 for an empty mask of an empty target."""
    pairs: Sequence[Sequence[int]] = record.pairs or [pair(record, protocol)]
    return [intersection / union if union else 1.0 for intersection, union in pairs]


def iou(record: Record, protocol: str = "") -> float:
    """An answer's IoU: the mean over its masks."""
    values = ious(record, protocol)
    return math.fsum(values) / len(values)


def ranked(records: Iterable[Record], protocol: str = "") -> list[Record]:
    """The records from the worst to the best IoU."""
    return sorted(records, key=lambda record: (iou(record, protocol), record.index, record.query_id))


# (record, protocol) -> what the record adds to a metric's numerator and denominator
Formula = Callable[[Record, str], tuple[float, int]]


def _of_targets(formula: Formula) -> Formula:
    return lambda record, protocol: (0, 0) if record.expected_empty else formula(record, protocol)


def _giou(record: Record, protocol: str) -> tuple[float, int]:
    values = ious(record, protocol)
    return math.fsum(values), len(values)


def _n_acc(record: Record, protocol: str) -> tuple[float, int]:
    return int(record.expected_empty and record.predicted_empty), int(record.expected_empty)


def _t_acc(record: Record, protocol: str) -> tuple[float, int]:
    return int(not record.expected_empty and not record.predicted_empty), int(not record.expected_empty)


def _presence(record: Record, protocol: str) -> tuple[float, int]:
    return int(record.expected_empty == record.predicted_empty), 1


METRICS: dict[str, Formula] = {  # benchmarks may report a formula under another name
    "gIoU": _giou,
    "cIoU": pair,
    "gIoU of targets": _of_targets(_giou),
    "cIoU of targets": _of_targets(pair),
    "N-acc": _n_acc,
    "T-acc": _t_acc,
    "presence": _presence,
}


def _sums(
    records: Iterable[Record], benchmark: Benchmark, protocol: str | None
) -> dict[str, tuple[list[float], list[int]]]:
    """Metric -> numerators and denominators of the records."""
    protocol = benchmark.protocol(protocol)
    pairs = {
        name: [METRICS[formula](record, protocol) for record in records] for name, formula in benchmark.metrics.items()
    }
    return {name: ([n for n, _ in values], [d for _, d in values]) for name, values in pairs.items()}


def _uncertainties_and_risks(
    records: Sequence[Record], benchmark: Benchmark, protocol: str | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """[n] uncertainty and [n] risk (1 - IoU) of n answers; None if no answer has an uncertainty (not ``mc:T``)."""
    if not any(record.uncertainty for record in records):
        return None
    protocol = benchmark.protocol(protocol)
    return np.array([r.max_uncertainty for r in records]), np.array([1 - iou(r, protocol) for r in records])


def compute(records: Sequence[Record], benchmark: Benchmark, protocol: str | None = None) -> dict[str, float]:
    """The benchmark's metrics as fractions; a metric without any sample is absent.

    With ``mc:T`` also AURC and AUSE, how well the uncertainty ranks errors (``utils.evaluation.risk_coverage``).

    Args:
        benchmark: defines the metrics and their names.
        protocol: ``grefcoco`` or ``gsva``, see ``pair``; None = as the paper reports it.
    """
    sums = _sums(records, benchmark, protocol)
    ratios = {name: math.fsum(above) / sum(below) for name, (above, below) in sums.items() if sum(below)}
    uncertainties_and_risks = _uncertainties_and_risks(records, benchmark, protocol)
    return ratios | (ranking(*uncertainties_and_risks) if uncertainties_and_risks else {})


def resample(
    records: Sequence[Record], benchmark: Benchmark, protocol: str | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Bootstrap over images (queries of one image are not independent): metric -> [1000] values, one per resample.

    A resample without any sample of the metric gives NaN. The same images and seed give the same resamples, so the
    values of two models can be subtracted one by one (``difference``).
    """
    images = sorted({record.index for record in records})
    if len(images) < 2:
        return {}
    records = sorted(records, key=lambda record: (record.index, record.query_id))
    positions = np.searchsorted(images, [record.index for record in records])
    weights = np.random.default_rng(seed).multinomial(len(images), np.full(len(images), 1 / len(images)), RESAMPLES)
    result = {}
    for name, sums in _sums(records, benchmark, protocol).items():
        above, below = (weights @ np.bincount(positions, weights=values, minlength=len(images)) for values in sums)
        result[name] = np.divide(above, below, out=np.full(RESAMPLES, np.nan), where=below > 0)
    if uncertainties_and_risks := _uncertainties_and_risks(records, benchmark, protocol):
        rankings = [ranking(*uncertainties_and_risks, counts[positions]) for counts in weights]
        result |= {name: np.array([values[name] for values in rankings]) for name in rankings[0]}
    return result


def _percentiles(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.percentile(values[~np.isnan(values)], [2.5, 97.5])]


def intervals(
    records: Sequence[Record], benchmark: Benchmark, protocol: str | None = None, seed: int = 0
) -> dict[str, list[float]]:
    """95% percentile bootstrap over images: metric -> [low, high]."""
    resampled = resample(records, benchmark, protocol, seed)
    return {name: _percentiles(values) for name, values in resampled.items() if not np.isnan(values).all()}


def difference(
    before: Sequence[Record], after: Sequence[Record], benchmark: Benchmark, protocol: str | None = None, seed: int = 0
) -> dict[str, tuple[float, list[float]]]:
    """Gain of each metric from one model to another, with its paired 95% interval: the same resamples for both.

    Raises:
        ValueError: for answers to different queries.
    """
    queries = [
        {(record.index, record.query_id, record.query): record.image for record in part} for part in (before, after)
    ]
    if queries[0] != queries[1]:
        only = sorted(queries[0].items() ^ queries[1].items())
        raise ValueError(
            f"the results answer different queries: {len(only)} are in only one of them, the first: "
            f"{only[0][0][2]!r} about {only[0][1]}; compare results of the same split"
        )
    values = [compute(part, benchmark, protocol) for part in (before, after)]
    resampled = [resample(part, benchmark, protocol, seed) for part in (before, after)]
    return {
        name: (values[1][name] - values[0][name], _percentiles(resampled[1][name] - resampled[0][name]))
        for name in resampled[0]
        if name in values[0] and name in values[1]
    }


def breakdown(
    records: Sequence[Record], benchmark: Benchmark, protocol: str | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """Metrics per group: ``{"family": {"relation": {"gIoU": ..., "masks": 40}}}``; keys with one value are left out."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for key, parts in groups(records).items():
        result[key] = {}
        for name, indices in parts.items():
            group = [records[index] for index in indices]
            result[key][name] = compute(group, benchmark, protocol) | {"masks": count_masks(group)}
    return result


def groups(records: Sequence[Record]) -> dict[str, dict[str, list[int]]]:
    """Key of the queries' meta -> group -> indices of its records; keys with one group are left out."""
    result = {}
    for key in GROUP_KEYS:
        names = sorted({str(record.meta[key]) for record in records if key in record.meta})
        if len(names) > 1:
            result[key] = {
                name: [n for n, record in enumerate(records) if str(record.meta.get(key)) == name] for name in names
            }
    return result


def count_masks(records: Iterable[Record]) -> int:
    """Number of masks that gIoU averages over: one per answer, or one per pair where targets are matched."""
    return sum(len(record.pairs) or 1 for record in records)


def count_records(records: Sequence[Record]) -> dict[str, int]:
    """The ``counts`` of a summary."""
    return {
        "masks": count_masks(records),
        "queries": len(records),
        "images": len({record.index for record in records}),
        "expected_empty": sum(record.expected_empty for record in records),
        "predicted_empty": sum(record.predicted_empty for record in records),
        "answers_without_seg": sum(not record.layers for record in records),
        "answers_with_several_seg": sum(len(record.masks) > 1 for record in records),
    }
