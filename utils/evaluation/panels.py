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
    batch_size: int = 1,
) -> list[tuple[Record, Panel]]:
    """Panels of ``count`` samples, evenly spaced from the worst to the best IoU: failures appear in their true share.

    Predicts these samples again, ``batch_size`` at a time, as keeping all similarity maps would take too much memory.
    """
    ranked = metrics.ranked(records, protocol)
    shown = [ranked[index] for index in evenly_spaced(len(ranked), count)]
    result, benchmark = [], benchmark_of(dataset.spec)
    for batch in (shown[k : k + batch_size] for k in range(0, len(shown), batch_size)):
        samples = [dataset[record.index] for record in batch]
        if not benchmark.is_joint(options.mode):  # else one question names all of an image's queries
            for record, sample in zip(batch, samples, strict=True):
                sample.queries = [query for query in sample.queries if query.query_id == record.query_id]
        indices = [record.index for record in batch]
        predictions = predict_queries(model, processor, samples, indices, benchmark, options)
        for record, sample, row in zip(batch, samples, predictions, strict=True):
            pairs = zip(sample.queries, row, strict=True)
            query, prediction = next(pair for pair in pairs if pair[0].query_id == record.query_id)
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
