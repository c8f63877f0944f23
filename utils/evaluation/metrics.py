"""What the numbers mean: counts of pixels per mask, and the benchmarks' metrics from records alone.

A ``Record`` is one scored answer and one line of a result's JSONL. Metrics are ratios of two sums over records
(all but the ranking by uncertainty); integers are summed exactly and IoUs with ``math.fsum``, so that neither order,
batch size nor the number of processes can change the last bit.

Legend: H, W the image's size; P predicted, G true pixels; I = |P and G|, U = |P or G|, ignored pixels (255) left out.
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

GROUP_KEYS = ("length", "part", "family", "targets")  # of a query's meta: what a result is broken down by
RESAMPLES = 1000


@dataclass
class Record:
    """One answer and its score.

    Attributes:
        index: the image's place in the split; image: where it comes from; image_id: the data set's own name of it.
        query_id: unique within the image's queries.
        query: the expression as the data set has it; question: what the model was asked.
        answer: what it said (the given text when teacher forced).
        layers: the hidden state that each [SEG] connected from.
        rejected: the answer says that nothing is there.
        expected_empty: nothing is there.
        I, U, P, G: pixels of the drawn mask against the truth, also where the answer rejects (see ``pair``); where
            several targets are matched (MUSE), their sums over the pairs.
        masks: COCO RLE of each [SEG]; their union is what was scored, unless they were matched.
        meta: the query's, for breakdowns.
        pairs: I and U of each matched pair; empty where one mask is expected.
        uncertainty: the score of each [SEG] (``MaskUncertainty``) with ``mc:T``; else empty.
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
        """The answer's uncertainty: its most uncertain mask's; none where it rejects, whatever the layer."""
        return 0.0 if self.rejected else max(self.uncertainty, default=0.0)

    @property
    def predicted_empty(self) -> bool:
        return self.rejected or self.P == 0


# -- one mask ----------------------------------------------------------------------------------------------------------


def count_pixels(predicted: np.ndarray, target: np.ndarray) -> tuple[int, int, int, int]:
    """I, U, P and G of one mask.

    Args:
        predicted: [H, W] bool.
        target: [H, W] uint8 with 0, 1 and 255 (left out).
    """
    if predicted.shape != target.shape:
        raise ValueError(f"the predicted mask is {predicted.shape}, the true one {target.shape} (height, width)")
    keep, true = target != IGNORE_PIXEL, target == 1
    predicted = predicted & keep
    both, p, g = (int(np.count_nonzero(mask)) for mask in (predicted & true, predicted, true))
    return both, p + g - both, p, g


def merge_targets(masks: np.ndarray, height: int, width: int) -> np.ndarray:
    """All targets [N, H, W] of a query as one [H, W]; a pixel is ignored if no target has it and one ignores it."""
    merged = np.zeros((height, width), dtype=np.uint8)
    merged[(masks == IGNORE_PIXEL).any(axis=0)] = IGNORE_PIXEL
    merged[(masks == 1).any(axis=0)] = 1
    return merged


# -- all masks ---------------------------------------------------------------------------------------------------------


def pair(record: Record, protocol: str = "") -> tuple[int, int]:
    """I and U as they enter the metrics: a rejecting answer is an empty mask.

    So a rejected absent target is a perfect 0 / 0, a missed one adds its pixels to U, and a target that was rejected
    adds |G| to U with I = 0 (gRefCOCO's rule). ``gsva`` differs in the last: it scores the mask that was drawn anyway.
    """
    if record.rejected and (record.expected_empty or protocol != "gsva"):
        return 0, record.G
    return record.I, record.U


def ious(record: Record, protocol: str = "") -> list[float]:
    """I / U of each mask of an answer; an empty one for an empty target is right."""
    pairs: Sequence[Sequence[int]] = record.pairs or [pair(record, protocol)]
    return [both / either if either else 1.0 for both, either in pairs]


def iou(record: Record, protocol: str = "") -> float:
    """An answer's IoU, the mean over its masks."""
    values = ious(record, protocol)
    return math.fsum(values) / len(values)


Parts = Callable[[Record, str], tuple[float, int]]  # what a record adds to a metric's numerator and denominator


def _of_targets(parts: Parts) -> Parts:
    return lambda record, protocol: (0, 0) if record.expected_empty else parts(record, protocol)


def _giou(record: Record, protocol: str) -> tuple[float, int]:
    values = ious(record, protocol)
    return math.fsum(values), len(values)


def _n_acc(record: Record, protocol: str) -> tuple[float, int]:
    return int(record.expected_empty and record.predicted_empty), int(record.expected_empty)


def _t_acc(record: Record, protocol: str) -> tuple[float, int]:
    return int(not record.expected_empty and not record.predicted_empty), int(not record.expected_empty)


def _presence(record: Record, protocol: str) -> tuple[float, int]:
    return int(record.expected_empty == record.predicted_empty), 1


METRICS: dict[str, Parts] = {  # formulas, which benchmarks report under names of their own
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
    protocol = benchmark.protocol(protocol)
    pairs = {name: [METRICS[of](record, protocol) for record in records] for name, of in benchmark.metrics.items()}
    return {name: ([n for n, _ in values], [d for _, d in values]) for name, values in pairs.items()}


def _uncertainties_and_risks(
    records: Sequence[Record], benchmark: Benchmark, protocol: str | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """[n] each of n answers: its uncertainty and 1 - IoU; None if no answer has an uncertainty (it was no ``mc:T``)."""
    if not any(record.uncertainty for record in records):
        return None
    protocol = benchmark.protocol(protocol)
    return np.array([r.max_uncertainty for r in records]), np.array([1 - iou(r, protocol) for r in records])


def compute(records: Sequence[Record], benchmark: Benchmark, protocol: str | None = None) -> dict[str, float]:
    """The benchmark's metrics as fractions; one without any sample to be measured on is absent.

    After ``mc:T`` also how well the uncertainty ranks errors (``utils.evaluation.risk_coverage``), AURC and AUSE.

    Args:
        benchmark: it decides which metrics apply, and under which names.
        protocol: ``grefcoco`` or ``gsva``, see ``pair``; None = as the paper reports it.
    """
    sums = _sums(records, benchmark, protocol)
    ratios = {name: math.fsum(above) / sum(below) for name, (above, below) in sums.items() if sum(below)}
    ranked = _uncertainties_and_risks(records, benchmark, protocol)
    return ratios | (ranking(*ranked) if ranked else {})


def resample(
    records: Sequence[Record], benchmark: Benchmark, protocol: str | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Bootstrap over images (queries of one image are not independent): metric -> its value in each of 1000 draws.

    A draw without anything to measure on gives NaN. The same images and seed give the same draws, so two models'
    values can be subtracted draw by draw (``difference``).
    """
    images = sorted({record.index for record in records})
    if len(images) < 2:
        return {}
    records = sorted(records, key=lambda record: (record.index, record.query_id))
    place = np.searchsorted(images, [record.index for record in records])
    drawn = np.random.default_rng(seed).multinomial(len(images), np.full(len(images), 1 / len(images)), RESAMPLES)
    result = {}
    for name, sums in _sums(records, benchmark, protocol).items():
        above, below = (drawn @ np.bincount(place, weights=values, minlength=len(images)) for values in sums)
        result[name] = np.divide(above, below, out=np.full(RESAMPLES, np.nan), where=below > 0)
    if ranked := _uncertainties_and_risks(records, benchmark, protocol):
        draws = [ranking(*ranked, counts[place]) for counts in drawn]
        result |= {name: np.array([draw[name] for draw in draws]) for name in draws[0]}
    return result


def _percentiles(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.percentile(values[~np.isnan(values)], [2.5, 97.5])]


def intervals(
    records: Sequence[Record], benchmark: Benchmark, protocol: str | None = None, seed: int = 0
) -> dict[str, list[float]]:
    """95% percentile bootstrap over images: metric -> [low, high]."""
    drawn = resample(records, benchmark, protocol, seed)
    return {name: _percentiles(values) for name, values in drawn.items() if not np.isnan(values).all()}


def difference(
    before: Sequence[Record], after: Sequence[Record], benchmark: Benchmark, protocol: str | None = None, seed: int = 0
) -> dict[str, tuple[float, list[float]]]:
    """What a metric gains from one model to another, with its 95% interval: paired, both models on the same images.

    Raises:
        ValueError: if the two did not answer the same queries.
    """
    asked = [
        {(record.index, record.query_id, record.query): record.image for record in part} for part in (before, after)
    ]
    if asked[0] != asked[1]:
        only = sorted(asked[0].items() ^ asked[1].items())
        raise ValueError(
            f"the two answer different queries, {len(only)} of which only one has, the first: {only[0][0][2]!r} about "
            f"{only[0][1]}; compare results of the same split"
        )
    values = [compute(part, benchmark, protocol) for part in (before, after)]
    drawn = [resample(part, benchmark, protocol, seed) for part in (before, after)]
    return {
        name: (values[1][name] - values[0][name], _percentiles(drawn[1][name] - drawn[0][name]))
        for name in drawn[0]
        if name in values[0] and name in values[1]
    }


def breakdown(
    records: Sequence[Record], benchmark: Benchmark, protocol: str | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """Metrics per group: ``{"family": {"relation": {"gIoU": ..., "masks": 40}}}``; keys with one value are left out."""
    result = {}
    for key in GROUP_KEYS:
        names = sorted({str(record.meta[key]) for record in records if key in record.meta})
        if len(names) < 2:
            continue
        groups = {name: [r for r in records if str(r.meta.get(key)) == name] for name in names}
        result[key] = {
            name: compute(group, benchmark, protocol) | {"masks": count_masks(group)} for name, group in groups.items()
        }
    return result


def count_masks(records: Iterable[Record]) -> int:
    """What gIoU is a mean over: one per answer, and one per pair where targets are matched."""
    return sum(len(record.pairs) or 1 for record in records)


def count_records(records: Sequence[Record]) -> dict[str, int]:
    """The numbers behind the metrics."""
    return {
        "masks": count_masks(records),
        "queries": len(records),
        "images": len({record.index for record in records}),
        "expected_empty": sum(record.expected_empty for record in records),
        "predicted_empty": sum(record.predicted_empty for record in records),
        "answers_without_seg": sum(not record.layers for record in records),
        "answers_with_several_seg": sum(len(record.masks) > 1 for record in records),
    }
