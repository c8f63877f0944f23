"""Metrics: pixel counts per mask, and the benchmarks' metrics from records alone.

A ``Record`` is one scored answer and one line of a result's JSONL. Every metric is a ratio of two sums over records,
or over groups of records such as the sentences of a ref (except the ranking by uncertainty). Integers are summed
exactly and IoUs with ``math.fsum``, so that neither order, batch size nor the number of processes changes the last bit.

Legend: H, W the image's size; P predicted, G true pixels; I = |P and G|, U = |P or G|, without ignored pixels (255).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from model.structures import IGNORE_PIXEL
from utils.datasets.base import UNIT
from utils.datasets.reason_seg import WITHOUT_TARGET
from utils.evaluation.benchmarks import BY_TOKEN, DECODED_ANYWAY, UNION_KEPT, Benchmark
from utils.evaluation.risk_coverage import ranking

GROUP_KEYS = (
    "length",
    "part",
    "family",
    "targets",
    "class",
    "reasoning_type",
    "setting",
)  # of a query's meta, for breakdowns
RESAMPLES = 1000
CONFUSION_WEIGHT = 3  # alpha of HalluSegBench


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
        pairs: I and U of each matched pair, then of each surplus prediction or target; empty where one mask is
            expected.
        uncertainty: of each [SEG] (``MaskUncertainty.score``) with ``mc:T``; else empty.
        predicted_iou: of each [SEG], the IoU that SAM's own head predicts for its mask; empty in older files, and if
            that head was never trained.
        ambiguity: of each [SEG], how far its mask's probabilities are from 0 and 1; empty in older files.
        first: I, U, P and G of the first [SEG] alone, if a mask of several is expected to be one; else empty.
        surplus: of each surplus prediction in ``pairs``, the pixels whose logit lies in [0.5, 1]. The published code of
            MUSE counts these, because it does not threshold surplus predictions.
        cut: whether the generated answer reached the longest length before its end token.
        thought: the reasoning that was written before the answer; empty without.
        reference: I, U, P and G of the mask against the region that a hallucination would mark (HalluSegBench); empty
            without one. first_reference: of the first [SEG] alone, as ``first``.
        in_order: I and U of each target with the mask of the same place in the answer (MMR); else empty.
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
    predicted_iou: list[float] = field(default_factory=list)
    ambiguity: list[float] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    surplus: list[int] = field(default_factory=list)
    cut: bool = False
    thought: str = ""
    reference: list[int] = field(default_factory=list)
    first_reference: list[int] = field(default_factory=list)
    in_order: list[list[int]] = field(default_factory=list)

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


# -- protocols (docs/evaluation.md) ------------------------------------------------------------------------------------


def select(records: Iterable[Record], protocol: str = "", several_seg: str = "union") -> list[Record]:
    """The answers that a protocol counts, each with the mask that ``several_seg`` scores.

    Raises:
        ValueError: for answers of an older version, which lack the counts that this takes.
    """
    chosen = [record for record in records if protocol == "published" or not record.meta.get(WITHOUT_TARGET)]
    if protocol == "published" and (short := next(filter(_lacks_surplus, chosen), None)):
        raise ValueError(f"{short.image}, {short.query!r} was answered by an older version; evaluate again")
    return [_first_seg(record) for record in chosen] if several_seg == "first" else chosen


def _lacks_surplus(record: Record) -> bool:
    expected = max(0, len(record.masks) - int(record.meta.get("targets", len(record.masks))))
    return bool(record.pairs) and len(record.surplus) != expected


def _first_seg(record: Record) -> Record:
    if record.pairs or len(record.masks) < 2:
        return record
    if not record.first:
        raise ValueError(f"{record.image}, {record.query!r} was answered by an older version; evaluate again")
    intersection, union, predicted, true = record.first
    return replace(record, I=intersection, U=union, P=predicted, G=true, reference=record.first_reference)


def rejects(record: Record, protocol: str = "") -> bool:
    """Whether an answer says that the target is absent: by its token, or (strict protocols) by an empty mask."""
    return record.rejected if protocol in BY_TOKEN else record.predicted_empty


def pair(record: Record, protocol: str = "") -> tuple[int, int]:
    """I and U as they enter the metrics: a rejecting answer counts as an empty mask.

    For an absent target, a rejection is a perfect 0 / 0, and a mask adds its pixels to U. For a present target, a
    rejection has I = 0, and adds |G| to U. gRefCOCO's own evaluator (``grefcoco``, ``rela``) adds |P or G| with the
    mask that is decoded all the same; ``gsva`` and ``published`` score that mask.
    """
    if several := _several(record, protocol):
        intersections, unions = zip(*several)
        return sum(intersections), sum(unions)
    if record.rejected and record.expected_empty:
        return 0, 0
    if record.rejected and protocol not in DECODED_ANYWAY:
        return 0, record.U if protocol in UNION_KEPT else record.G
    return record.I, record.U


def pairs_of(record: Record, protocol: str = "") -> Sequence[Sequence[int]]:
    """I and U of each mask that is scored of an answer: its only one, or one per matched pair or target."""
    return _several(record, protocol) or [pair(record, protocol)]


def _several(record: Record, protocol: str) -> Sequence[Sequence[int]]:
    if protocol != "published":
        return record.pairs
    if record.surplus:
        return [*record.pairs[: -len(record.surplus)], *([0, pixels] for pixels in record.surplus)]
    return record.pairs or record.in_order


# -- all masks ---------------------------------------------------------------------------------------------------------


def ious(record: Record, protocol: str = "") -> list[float]:
    """I / U of each mask of an answer; 1 for an empty mask of an empty target."""
    if protocol in BY_TOKEN and record.expected_empty and not record.rejected:
        return [0.0]
    return [intersection / union if union else 1.0 for intersection, union in pairs_of(record, protocol)]


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
    return int(record.expected_empty and rejects(record, protocol)), int(record.expected_empty)


def _t_acc(record: Record, protocol: str) -> tuple[float, int]:
    return int(not record.expected_empty and not rejects(record, protocol)), int(not record.expected_empty)


def _precision(threshold: float) -> Formula:
    """The share of present targets with at least this IoU (ReLA's Pr@)."""
    return _of_targets(lambda record, protocol: (int(iou(record, protocol) >= threshold), 1))


def _presence(record: Record, protocol: str) -> tuple[float, int]:
    return int(record.expected_empty == rejects(record, protocol)), 1


@dataclass(frozen=True)
class Grouped:
    """A formula of groups of records, such as all sentences of a ref.

    Attributes:
        key: record -> its group.
        formula: (records of a group, protocol) -> what the group adds to the numerator and the denominator.
    """

    key: Callable[[Record], Hashable]
    formula: Callable[[Sequence[Record], str], tuple[float, int]]

    def values(self, records: Sequence[Record], protocol: str) -> list[tuple[float, int]]:
        """What each record adds: the first one of a group all of it."""
        groups: defaultdict[Hashable, list[int]] = defaultdict(list)
        for position, record in enumerate(records):
            groups[self.key(record)].append(position)
        values: list[tuple[float, int]] = [(0, 0)] * len(records)
        for positions in groups.values():
            values[positions[0]] = self.formula([records[position] for position in positions], protocol)
        return values


def _ref_of(record: Record) -> Hashable:
    return record.index, record.meta.get("ref", record.query_id.rpartition("_")[0])


def _giou_of_images(records: Sequence[Record], protocol: str) -> tuple[float, int]:
    """MUSE as published: the IoUs of all pairs of an image, over the larger of its predictions and targets."""
    targets = sum(len(record.pairs) - len(record.surplus) for record in records)
    values = [value for record in records for value in ious(record, protocol)]
    return math.fsum(values), max(targets, sum(len(record.masks) for record in records))


def _miou_of_refs(records: Sequence[Record], protocol: str) -> tuple[float, int]:
    values = [iou(record, protocol) for record in records if not record.expected_empty]
    return (math.fsum(values) / len(values), 1) if values else (0, 0)


def _r_of_refs(records: Sequence[Record], protocol: str) -> tuple[float, int]:
    rejected = [rejects(record, protocol) for record in records if record.expected_empty]
    return (sum(rejected) / len(rejected), 1) if rejected else (0, 0)


def _riou_of_refs(records: Sequence[Record], protocol: str) -> tuple[float, int]:
    if all(record.expected_empty for record in records):
        return 0, 0
    intersections, unions = zip(*(pair(record, protocol) for record in records))
    return sum(intersections) / sum(unions), 1


def _iou_difference(absent: str) -> Grouped:
    """HalluSegBench: by how much the IoU falls when the object is not there, but another in its place.

    Args:
        absent: the setting whose answer is compared with that of ``orgl_orgi``; a pair that lacks one is left out.
    """

    def formula(records: Sequence[Record], protocol: str) -> tuple[float, int]:
        answers = {record.meta.get("setting"): record for record in records}
        there, gone = answers.get("orgl_orgi"), answers.get(absent)
        if there is None or gone is None or not gone.reference:
            return 0, 0
        intersection, union = (0, 1) if gone.rejected else gone.reference[:2]
        return iou(there, protocol) - intersection / union, 1

    return Grouped(lambda record: record.meta.get("pair", (record.index, record.query_id)), formula)


def _confusion(setting: str) -> Formula:
    """HalluSegBench: the mask of an absent object in units of the reference region, where pixels in it count thrice."""

    def formula(record: Record, protocol: str) -> tuple[float, int]:
        if record.meta.get("setting") != setting or not record.reference:
            return 0, 0
        intersection, _, predicted, true = record.reference
        mask = 0 if record.rejected else CONFUSION_WEIGHT * intersection + predicted - intersection
        return mask / (CONFUSION_WEIGHT * true), 1

    return formula


METRICS: dict[str, Formula | Grouped] = {  # benchmarks may report a formula under another name
    "gIoU": _giou,
    "cIoU": pair,
    "gIoU of targets": _of_targets(_giou),
    "cIoU of targets": _of_targets(pair),
    "N-acc": _n_acc,
    "T-acc": _t_acc,
    "presence": _presence,
    **{f"Pr@{threshold}": _precision(threshold) for threshold in (0.7, 0.8, 0.9)},
    "gIoU of images": Grouped(lambda record: record.index, _giou_of_images),
    "mIoU of refs": Grouped(_ref_of, _miou_of_refs),  # of true sentences
    "r of refs": Grouped(_ref_of, _r_of_refs),  # share of false sentences that are rejected
    "IoU difference, text": _iou_difference("edtl_orgi"),
    "IoU difference, image": _iou_difference("orgl_edti"),
    "confusion, text": _confusion("edtl_orgi"),
    "confusion, image": _confusion("orgl_edti"),
    "rIoU of refs": Grouped(_ref_of, _riou_of_refs),  # U includes the pixels drawn for false sentences
}


def _values(formula: Formula | Grouped, records: Sequence[Record], protocol: str) -> list[tuple[float, int]]:
    if isinstance(formula, Grouped):
        return formula.values(records, protocol)
    return [formula(record, protocol) for record in records]


def _sums(
    records: Sequence[Record], benchmark: Benchmark, protocol: str | None
) -> dict[str, tuple[list[float], list[int]]]:
    """Metric -> numerators and denominators of the records."""
    protocol = benchmark.protocol(protocol)
    if benchmark.task == "union" and benchmark.scores_each(protocol):
        for record in records:
            if not record.in_order:
                raise ValueError(
                    f"{record.image}, {record.query!r} has no counts for each target, which protocol {protocol} takes: "
                    "it was answered by an older version, or is given by counts; evaluate again, or score masks"
                )
    formulas = benchmark.formulas(protocol)
    pairs = {name: _values(METRICS[formula], records, protocol) for name, formula in formulas.items()}
    return {name: ([n for n, _ in values], [d for _, d in values]) for name, values in pairs.items()}


RANKED_BY = {  # measure of uncertainty -> [SEG] values of a record
    "layers": lambda record: record.uncertainty,
    "ambiguity": lambda record: record.ambiguity,
    "predicted_iou": lambda record: [1 - value for value in record.predicted_iou],
}


def ranked_by(records: Sequence[Record], measure: str) -> list[Record]:
    """The records with another uncertainty, for AURC and AUSE: a key of ``RANKED_BY``.

    Raises:
        ValueError: if no answer has that measure (``layers``: only with ``mc:T``; older files).
    """
    values = [RANKED_BY[measure](record) for record in records]
    if not any(values):
        raise ValueError(
            f"no answer has the uncertainty {measure!r}: "
            "layers needs answers of --layer_policy mc:T, predicted_iou a mask decoder that learned to rate its masks; "
            "older files have no other measure"
        )
    return [replace(record, uncertainty=value) for record, value in zip(records, values)]


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
        protocol: a key of the benchmark's ``protocols``; None = the default.
    """
    sums = _sums(records, benchmark, protocol)
    ratios = {name: math.fsum(above) / sum(below) for name, (above, below) in sums.items() if sum(below)}
    uncertainties_and_risks = _uncertainties_and_risks(records, benchmark, protocol)
    return ratios | (ranking(*uncertainties_and_risks) if uncertainties_and_risks else {})


def resample(
    records: Sequence[Record], benchmark: Benchmark, protocol: str | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Bootstrap over images (queries of one image, or of its edits, are not independent): metric -> [1000] values.

    A resample without any sample of the metric gives NaN. The same images and seed give the same resamples, so the
    values of two models can be subtracted one by one (``difference``).
    """
    records = sorted(records, key=lambda record: (record.index, record.query_id))
    units = {unit: n for n, unit in enumerate(dict.fromkeys(map(_unit_of, records)))}
    if len(units) < 2:
        return {}
    positions = np.array([units[_unit_of(record)] for record in records])
    weights = resampled_images(len(units), seed)
    result = {}
    for name, sums in _sums(records, benchmark, protocol).items():
        above, below = (weights @ np.bincount(positions, weights=values, minlength=len(units)) for values in sums)
        result[name] = np.divide(above, below, out=np.full(RESAMPLES, np.nan), where=below > 0)
    if uncertainties_and_risks := _uncertainties_and_risks(records, benchmark, protocol):
        rankings = [ranking(*uncertainties_and_risks, counts[positions]) for counts in weights]
        result |= {name: np.array([values[name] for values in rankings]) for name in rankings[0]}
    return result


def _unit_of(record: Record) -> Hashable:
    """What a resample draws: an image, with the edits of it that a data set has."""
    return record.meta.get(UNIT, record.index)


def resampled_images(count: int, seed: int = 0) -> np.ndarray:
    """[1000, count]: how often each of ``count`` images is drawn in each resample of the bootstrap."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)


def percentiles(values: np.ndarray) -> list[float]:
    """The 95% interval, [low, high], of a metric's values in the resamples; those that are NaN are left out."""
    return [float(value) for value in np.percentile(values[~np.isnan(values)], [2.5, 97.5])]


def intervals(
    records: Sequence[Record], benchmark: Benchmark, protocol: str | None = None, seed: int = 0
) -> dict[str, list[float]]:
    """95% percentile bootstrap over images: metric -> [low, high]."""
    resampled = resample(records, benchmark, protocol, seed)
    return {name: percentiles(values) for name, values in resampled.items() if not np.isnan(values).all()}


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
        name: (values[1][name] - values[0][name], percentiles(resampled[1][name] - resampled[0][name]))
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
            result[key][name] = compute(group, benchmark, protocol) | {
                "masks": count_masks(group, benchmark.protocol(protocol))
            }
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


def count_masks(records: Iterable[Record], protocol: str = "") -> int:
    """Number of masks that gIoU averages over (``pairs_of``)."""
    return sum(len(pairs_of(record, protocol)) for record in records)


def count_records(records: Sequence[Record], protocol: str = "") -> dict[str, int]:
    """The ``counts`` of a summary."""
    return {
        "masks": count_masks(records, protocol),
        "queries": len(records),
        "images": len({record.index for record in records}),
        "expected_empty": sum(record.expected_empty for record in records),
        "predicted_empty": sum(rejects(record, protocol) for record in records),
        "answers_without_seg": sum(not record.layers for record in records),
        "answers_with_several_seg": sum(len(record.masks) > 1 for record in records),
        "answers_cut": sum(record.cut for record in records),
    }
