"""Panels of samples: query, masks, similarity maps, ground truth and answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from model.structures import EvalQuery
from utils.datasets.base import EvalDataset
from utils.evaluation import metrics
from utils.evaluation.benchmarks import benchmark_of
from utils.evaluation.metrics import Record
from utils.evaluation.predictions import InferenceOptions, QueryPrediction, predict_queries
from utils.evaluation.result_text import notes
from utils.plotting.overlays import Panel, evenly_spaced, sheet


def panels(
    model,
    processor,
    dataset: EvalDataset,
    records: Sequence[Record],
    count: int,
    options: InferenceOptions,
    protocol: str = "",
) -> list[tuple[Record, Panel]]:
    """Panels of ``count`` samples, evenly spaced from the worst to the best IoU: failures appear in their true share.

    Predicts these samples again, as keeping all similarity maps would take too much memory.
    """
    ranked = metrics.ranked(records, protocol)
    result, benchmark = [], benchmark_of(dataset.spec)
    for record in (ranked[index] for index in evenly_spaced(len(ranked), count)):
        sample = dataset[record.index]
        [predictions] = predict_queries(model, processor, [sample], [record.index], benchmark, options)
        query, prediction = next(
            pair for pair in zip(sample.queries, predictions, strict=True) if pair[0].query_id == record.query_id
        )
        result.append((record, _panel(sample.image, query, prediction, notes(record, protocol))))
    return result


def validation_sheet(model, processor, dataset: EvalDataset, options: InferenceOptions, count: int) -> np.ndarray:
    """A sheet of fixed validation samples, evenly spread over the split."""
    panels = []
    for index in evenly_spaced(len(dataset), count):
        sample = dataset[index]
        sample.queries = sample.queries[:1]
        [[prediction]] = predict_queries(model, processor, [sample], [index], benchmark_of(dataset.spec), options)
        panels.append(_panel(sample.image, sample.queries[0], prediction))
    return sheet(panels)


def _panel(image: np.ndarray, query: EvalQuery, prediction: QueryPrediction, notes: Sequence[str] = ()) -> Panel:
    return Panel(
        image=image,
        query=query.text,
        masks=prediction.masks,
        similarities=prediction.similarities,
        truth=metrics.merge_targets(query.masks, *image.shape[:2]),
        answer=prediction.text,
        notes=notes,
        deviations=prediction.deviations,
    )
