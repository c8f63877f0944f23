"""The model's answers to the queries of a benchmark, and their scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from model.opened import predict, predict_rounds
from model.processing.tokens import SEG
from model.structures import MAX_NEW_TOKENS, EvalQuery, EvalSample, MaskUncertainty, Prediction, Turn
from utils.datasets.masks import encode_mask
from utils.datasets.templates import eval_joint_turn, eval_turn
from utils.evaluation import metrics
from utils.evaluation.benchmarks import MODES, Benchmark
from utils.evaluation.matching import match_masks
from utils.evaluation.metrics import Record


@dataclass(frozen=True)
class InferenceOptions:
    """How answers are predicted.

    Attributes:
        mode: ``generate`` = answers are generated; ``teacher_forced`` = the answer template is given.
        layer_policy: the layer whose hidden state (and similarity map) a [SEG] token uses: ``argmax``, ``last``,
            ``sample``, ``mc:T``, ``fixed:K``, ...
        max_new_tokens: longest generated answer.
        seed: of sampled layers, together with the image's index in the split.
        think: whether generated answers begin with a thought (``model.opened.predict``).
    """

    mode: str = "generate"
    layer_policy: str = "argmax"
    max_new_tokens: int = MAX_NEW_TOKENS
    seed: int = 0
    think: str = "auto"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"unknown mode {self.mode!r}; use {' or '.join(MODES)}")

    def of_model(self) -> dict[str, Any]:
        """Arguments of ``model.opened.predict``."""
        think = self.think if self.mode == "generate" else "auto"
        return {
            "layer_policy": self.layer_policy,
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
            "think": think,
        }


@dataclass
class QueryPrediction:
    """The model's answer to one query.

    Attributes:
        question, text: of the conversation turn.
        logits: [N, H, W] float32, one per [SEG].
        similarities: [N, H, W] float32 in [0, 1], their similarity maps.
        layers: [N] the hidden state that each [SEG] used.
        rejected: whether the answer says that the target is absent.
        predicted_iou, ambiguity: [N] of each mask (``model.structures.Prediction``).
        uncertainty: [N] of each [SEG] with ``mc:T``; else empty.
        cut: whether the answer was cut off before its end token (``model.structures.Prediction``).
        thought: the reasoning before the answer; empty without.
    """

    question: str
    text: str
    logits: np.ndarray
    similarities: np.ndarray
    layers: list[int]
    rejected: bool
    predicted_iou: Sequence[float] = ()
    ambiguity: Sequence[float] = ()
    uncertainty: Sequence[MaskUncertainty] = ()
    cut: bool = False
    thought: str = ""

    @property
    def masks(self) -> np.ndarray:
        """[N, H, W] bool."""
        return self.logits > 0

    @property
    def merged(self) -> np.ndarray:
        """[H, W] bool, the union over all [SEG], scored where one mask is expected; empty if N = 0."""
        return np.any(self.masks, axis=0)

    @property
    def deviations(self) -> np.ndarray | None:
        """[N, H, W] standard deviation of each mask's probability over the layers sampled by ``mc:T``, at most 0.5."""
        if not self.uncertainty:
            return None
        return np.stack([uncertainty.deviation.numpy() for uncertainty in self.uncertainty])


def predict_queries(
    model,
    processor,
    samples: Sequence[EvalSample],
    sample_ids: Sequence[int],
    benchmark: Benchmark,
    options: InferenceOptions,
) -> list[list[QueryPrediction]]:
    """[image][query] predictions, in one batch.

    Args:
        sample_ids: each image's index in the split; it seeds sampled layers, independently of the batch.
    """
    turns = turns_of(samples, benchmark, options.mode)
    predictions = predict(
        model,
        processor,
        [sample.image for sample in samples],
        turns,
        sample_ids,
        **options.of_model(),
    )
    return by_query(samples, turns, predictions, benchmark, options.mode)


def predict_query_rounds(
    model,
    processor,
    rounds: Sequence[Sequence[EvalSample]],
    sample_ids: Sequence[int],
    benchmark: Benchmark,
    options: InferenceOptions,
    answered: int = 0,
) -> Iterator[list[list[QueryPrediction]]]:
    """``predict_queries`` for several rounds of queries about the same images, which are encoded once.

    Args:
        rounds: [round][image], the same images in each.
        answered: number of rounds at the start whose predictions are known, and not yielded.
    """
    turns = [turns_of(samples, benchmark, options.mode) for samples in rounds]
    predicted = predict_rounds(
        model,
        processor,
        [sample.image for sample in rounds[0]],
        turns,
        sample_ids,
        answered,
        **options.of_model(),
    )
    for samples, asked, predictions in zip(rounds[answered:], turns[answered:], predicted, strict=True):
        yield by_query(samples, asked, predictions, benchmark, options.mode)


def turns_of(samples: Sequence[EvalSample], benchmark: Benchmark, mode: str) -> list[list[Turn]]:
    """[image][turn]: one turn per query or one joint turn; with the answer if teacher-forced."""
    if benchmark.is_joint(mode):
        return [[eval_joint_turn(sample.queries)] for sample in samples]
    several = benchmark.task in ("instances", "union")
    if benchmark.task == "union" and mode == "teacher_forced":
        for sample in samples:
            if lacking := [query.text for query in sample.queries if not query.answer]:
                raise ValueError(
                    f"{sample.source}, {lacking[0]!r} has no annotated answer with a {{seg}} per target, which teacher "
                    "forcing gives: use --mode generate, or download the file again"
                )
    turns = [[eval_turn(query, several) for query in sample.queries] for sample in samples]
    return turns if mode == "teacher_forced" else [[Turn(turn.question) for turn in row] for row in turns]


def by_query(
    samples: Sequence[EvalSample],
    turns: Sequence[Sequence[Turn]],
    predictions: Sequence[Sequence[Prediction]],
    benchmark: Benchmark,
    mode: str,
) -> list[list[QueryPrediction]]:
    """The predictions for ``turns`` as [image][query]."""
    return [
        _joint(sample, row[0], predicted[0])
        if benchmark.is_joint(mode)
        else _separate(sample, row, predicted, benchmark, mode)
        for sample, row, predicted in zip(samples, turns, predictions, strict=True)
    ]


def score(
    index: int, sample: EvalSample, query: EvalQuery, prediction: QueryPrediction, benchmark: Benchmark
) -> Record:
    """Scores one prediction: counts its pixels against the ground truth.

    Args:
        index: of the image in the split.

    Raises:
        ValueError: for several targets where the benchmark expects one (merged) mask; for logits that are NaN or
            infinite, which would count as an empty mask.
    """
    matched = benchmark.task == "instances"
    if not np.isfinite(prediction.logits).all():
        raise ValueError(
            f"{sample.source}, {query.text!r}: the mask's logits are NaN or infinite; the numbers overflow "
            "(use --precision fp32 or bf16), or the weights are broken (convert or train them again)"
        )
    if len(query.masks) > 1 and benchmark.task in ("one mask", "joint question"):
        raise ValueError(
            f"{sample.source}, {query.text!r} has {len(query.masks)} targets; {benchmark.name} expects one"
        )
    first: list[int] = []
    surplus: list[int] = []
    reference: list[int] = []
    first_reference: list[int] = []
    if matched:
        counts, surplus = _count_pairs(query, prediction)
    else:
        truth = metrics.merge_targets(query.masks, *sample.image.shape[:2])
        counts = [metrics.count_pixels(prediction.merged, truth)]
        several = len(prediction.masks) > 1
        if several:
            first = list(metrics.count_pixels(prediction.masks[0], truth))
        if query.reference is not None:
            reference = list(metrics.count_pixels(prediction.merged, query.reference))
            first_reference = list(metrics.count_pixels(prediction.masks[0], query.reference)) if several else []
    intersection, union, predicted, true = (sum(column) for column in zip(*counts, strict=True))
    return Record(
        index=index,
        image=sample.source,
        image_id=sample.image_id,
        query_id=query.query_id,
        query=query.text,
        question=prediction.question,
        answer=prediction.text,
        layers=prediction.layers,
        rejected=prediction.rejected,
        expected_empty=len(query.masks) == 0,
        I=intersection,
        U=union,
        P=predicted,
        G=true,
        masks=[encode_mask(mask) for mask in prediction.masks],
        meta=query.meta,
        pairs=[list(count[:2]) for count in counts] if matched else [],
        uncertainty=[uncertainty.score for uncertainty in prediction.uncertainty],
        predicted_iou=[round(value, 4) for value in prediction.predicted_iou],
        ambiguity=[round(value, 4) for value in prediction.ambiguity],
        first=first,
        surplus=surplus,
        cut=prediction.cut,
        thought=prediction.thought,
        reference=reference,
        first_reference=first_reference,
        in_order=_count_in_order(query, prediction) if benchmark.task == "union" else [],
    )


def _count_in_order(query: EvalQuery, prediction: QueryPrediction) -> list[list[int]]:
    """I and U of each target and the mask of the same place, an empty one where the answer has fewer or rejects."""
    empty = np.zeros(query.masks.shape[1:], bool)
    masks = prediction.masks[: 0 if prediction.rejected else len(query.masks)]
    pairs = zip_longest(query.masks, masks, fillvalue=empty)
    return [list(metrics.count_pixels(mask, target)[:2]) for target, mask in pairs]


def _count_pairs(query: EvalQuery, prediction: QueryPrediction) -> tuple[list[tuple[int, int, int, int]], list[int]]:
    """I, U, P and G of each matched pair, where unmatched masks are paired with an empty one (MUSE).

    Also, of each unmatched prediction, the pixels whose logit lies in [0.5, 1] (``Record.surplus``).
    """
    empty, masks = np.zeros(query.masks.shape[1:], np.uint8), prediction.masks
    pairs = match_masks(prediction.logits, query.masks)
    counts = [
        metrics.count_pixels(
            empty.astype(bool) if predicted is None else masks[predicted],
            empty if target is None else query.masks[target],
        )
        for predicted, target in pairs
    ]
    unmatched = [prediction.logits[k] for k, target in pairs if target is None and k is not None]
    return counts, [int(np.count_nonzero((logits >= 0.5) & (logits <= 1))) for logits in unmatched]


def _separate(
    sample: EvalSample, turns: Sequence[Turn], predictions: Sequence[Prediction], benchmark: Benchmark, mode: str
) -> list[QueryPrediction]:
    """One turn per query. A generated answer rejects if it has no [SEG]; a teacher-forced one if [REJ] was more likely,
    on benchmarks with rejection."""
    result = []
    for query, turn, prediction in zip(sample.queries, turns, predictions, strict=True):
        rejected = not prediction.layers
        if mode == "teacher_forced":
            _check_fits(sample, query.text, len(prediction.layers), turn.answer.count(SEG))
            rejected = benchmark.rejects and all(prediction.rejected)
        result.append(_query_prediction(turn, prediction, slice(None), rejected))
    return result


def _joint(sample: EvalSample, turn: Turn, prediction: Prediction) -> list[QueryPrediction]:
    """One turn for all queries; the logits before the k-th [SEG] decide whether the k-th target is rejected."""
    count = len(sample.queries)
    _check_fits(sample, turn.question, len(prediction.layers), count)
    return [_query_prediction(turn, prediction, slice(k, k + 1), prediction.rejected[k]) for k in range(count)]


def _query_prediction(turn: Turn, prediction: Prediction, segs: slice, rejected: bool) -> QueryPrediction:
    """The part of an answer that is about one query: the [SEG] tokens ``segs``."""
    return QueryPrediction(
        question=turn.question,
        text=prediction.text,
        logits=prediction.mask_logits[segs].numpy(),
        similarities=prediction.maps[segs].numpy(),
        layers=prediction.layers[segs],
        rejected=rejected,
        predicted_iou=prediction.predicted_iou[segs],
        ambiguity=prediction.ambiguity[segs],
        uncertainty=prediction.uncertainty[segs],
        cut=prediction.cut,
        thought=prediction.thought,
    )


def _check_fits(sample: EvalSample, question: str, count: int, expected: int) -> None:
    if count != expected:
        raise ValueError(
            f"{sample.source}: {count} [SEG] instead of {expected} are left of the given answer to {question[:60]!r}; "
            "the prompt is longer than max_tokens in uground_processor.json: raise it, or use --mode generate"
        )
