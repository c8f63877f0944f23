"""One engine for every benchmark, shared by validation during training and by test.py.

Each image is encoded once for all its questions. Ranks take images r, r + world, ... of the split, without padding or
repeats; their records are gathered and every metric is computed from records alone (``utils.evaluation.metrics``), so
the counting depends neither on the batch size nor on the number of processes (the model's arithmetic does, a little).
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from model.structures import EvalSample
from utils import distributed
from utils.datasets.base import EvalDataset
from utils.datasets.spec import Spec
from utils.evaluation import metrics
from utils.evaluation.benchmarks import benchmark_of
from utils.evaluation.controls import CONTROLS, ShuffledPrompts
from utils.evaluation.metrics import Record
from utils.evaluation.predictions import InferenceOptions, predict_queries, score
from utils.evaluation.results import Journal, Origin, Result, summarize


@dataclass(frozen=True)
class RunOptions:
    """How an evaluation runs.

    Attributes:
        batch_size: images per call of the model.
        workers: processes that load images in the background; 0 = none.
        limit: only the first so many images.
        protocol: of gRefCOCO, teacher forced: ``grefcoco`` or ``gsva``; None = as the paper reports it.
        controls: ``shuffled_prompts`` asks each image the queries of another one, scored against its own truth.
        checkpoint: the fingerprint of the weights, to know their results by.
        quantize: how the layers were quantized, ``8bit``; empty = not. Results of the one are not gone on from as the
            other.
        journal: where answers are kept while it runs; None = nowhere.
        resume: go on from the journal's answers.
        allow_missing: leave out images that cannot be read, and say how many.
        progress: show a bar (on rank 0).
    """

    batch_size: int = 4
    workers: int = 0
    limit: int | None = None
    protocol: str | None = None
    controls: Sequence[str] = ()
    checkpoint: str = ""
    quantize: str = ""
    journal: Journal | None = None
    resume: bool = False
    allow_missing: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.controls) - set(CONTROLS)):
            raise ValueError(f"unknown control {unknown[0]!r}; use {', '.join(CONTROLS)}")
        if self.batch_size < 1 or (self.limit is not None and self.limit < 1):
            raise ValueError(f"batch_size is {self.batch_size} and limit {self.limit}; both must be at least 1")


def evaluate(
    model,
    processor,
    dataset: EvalDataset,
    options: InferenceOptions | None = None,
    run: RunOptions | None = None,
) -> Result:
    """Asks every query of a split and scores the answers. All ranks must call it; all get the whole result.

    Args:
        model, processor: of ``model.load``.
        options: how the model is asked; run: how the evaluation runs.

    Raises:
        ValueError: listing the images that cannot be read; for an unknown layer policy or protocol; for a journal of
            another evaluation, or of other annotations.
    """
    options, run = options or InferenceOptions(), run or RunOptions()
    size = min(len(dataset), run.limit or len(dataset))
    if "shuffled_prompts" in run.controls:
        ShuffledPrompts(dataset, range(size), options.seed)  # raises, if it has to, before hours of work
    origin, runner = origin_of(model, dataset, options, run), EvalRunner(model, processor, options, run)
    started = time.perf_counter()
    kept = run.journal.read(origin) if run.journal and run.resume else []
    distributed.raise_on_all_ranks(_changed(dataset, kept))
    records, unread = runner.gather(dataset, range(size), kept, origin, run.journal)
    missing = [*dataset.unusable, *unread]
    summary = replace(
        summarize(origin, records),
        skipped=list(dataset.skipped),
        missing=missing,
        limit=run.limit,
        seconds=round(time.perf_counter() - started, 2),
        settings={
            "batch_size": run.batch_size,
            "max_new_tokens": options.max_new_tokens,
            "seed": options.seed,
            "processes": distributed.world_size(),
        },
    )
    summary.counts |= {"skipped": len(dataset.skipped), "missing": len(missing)}
    if "shuffled_prompts" in run.controls:
        places = sorted({record.index for record in records})
        answers, _ = runner.gather(ShuffledPrompts(dataset, places, options.seed), places)
        summary.controls["shuffled_prompts"] = metrics.compute(answers, benchmark_of(dataset.spec), origin.protocol)
    return Result(summary, records, origin)


def origin_of(model, dataset: EvalDataset, options: InferenceOptions, run: RunOptions) -> Origin:
    """What the answers depend on."""
    precision = str(model.dtype).removeprefix("torch.")
    return Origin(
        benchmark=str(dataset.spec),
        mode=options.mode,
        layer_policy=options.layer_policy,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        protocol=benchmark_of(dataset.spec).protocol(run.protocol, options.mode),
        checkpoint=run.checkpoint,
        precision=f"{precision}, {run.quantize}" if run.quantize else precision,
        images=len(dataset),
        queries=dataset.num_queries,
    )


# -- images and answers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvalRunner:
    """Everything about an evaluation but the data. See ``evaluate``."""

    model: Any
    processor: Any
    options: InferenceOptions
    run: RunOptions

    def gather(
        self,
        dataset: EvalDataset,
        places: Sequence[int],
        kept: Sequence[Record] = (),
        origin: Origin | None = None,
        journal: Journal | None = None,
    ) -> tuple[list[Record], list[str]]:
        """The records of the images at ``places``, from all ranks, in the split's order; and the images without any.

        Args:
            kept: answers that are there already. A batch of which any image lacks one is asked as a whole, so that the
                model computes exactly what it would have without the interruption.
            origin, journal: keep the answers on disk meanwhile.
        """
        done = {record.index for record in kept}
        todo = [[batch for batch in own if not done.issuperset(batch)] for own in self._batches(places)]
        wanted = set(places) - {place for own in todo for batch in own for place in batch}
        kept = [record for record in kept if record.index in wanted]
        if journal is not None and origin is not None:
            journal.start(origin, kept)
        records, errors = self._ask(dataset, todo[distributed.rank()], journal)
        if journal is not None:
            journal.close()
        unread = dict(sorted((place, text) for part in distributed.all_gather(errors) for place, text in part.items()))
        stop = unread and (not self.run.allow_missing or len(unread) == len(places))
        distributed.raise_on_all_ranks(_unreadable(dataset.spec, list(unread.values())) if stop else None)
        records = [*kept, *(record for part in distributed.all_gather(records) for record in part)]
        records.sort(key=lambda record: record.index)  # stable: an image's queries keep their order
        _check_complete(dataset, records, set(places) - set(unread))
        return records, list(unread.values())

    def _batches(self, places: Sequence[int]) -> list[list[list[int]]]:
        """The places of every batch of every rank."""
        world, size = distributed.world_size(), self.run.batch_size
        shares = [places[rank::world] for rank in range(world)]
        return [[list(share[k : k + size]) for k in range(0, len(share), size)] for share in shares]

    def _ask(
        self, dataset: EvalDataset, batches: Sequence[list[int]], journal: Journal | None
    ) -> tuple[list[Record], dict[int, str]]:
        """This rank's records, and what is wrong with the images that cannot be read, by their places."""
        own = torch.Generator()  # a loader draws a number at its start: not from a training run's state
        loader = DataLoader(
            _Reader(dataset), batch_sampler=batches, collate_fn=list, num_workers=self.run.workers, generator=own
        )
        records: list[Record] = []
        errors: dict[int, str] = {}
        pace = 0.1 if sys.stderr.isatty() else 15  # a log file wants few lines
        name, hide = f"{dataset.spec} ({self.options.mode})", not distributed.is_main() or not self.run.progress
        with tqdm(total=sum(map(len, batches)), desc=name, unit="image", mininterval=pace, disable=hide) as bar:
            for batch, items in zip(batches, loader, strict=True):
                errors |= {place: str(item) for place, item in zip(batch, items) if isinstance(item, ValueError)}
                if not errors or self.run.allow_missing:  # else the others are only looked at, to list all missing ones
                    found = [place for place in batch if place not in errors]
                    fresh = self._score(dataset, found, [item for item in items if not isinstance(item, ValueError)])
                    records += fresh
                    if journal is not None:
                        journal.add(fresh)
                bar.update(len(items))
        return records, errors

    def _score(self, dataset: EvalDataset, places: Sequence[int], samples: Sequence[EvalSample]) -> list[Record]:
        """The records of a batch."""
        if not samples:
            return []
        benchmark = benchmark_of(dataset.spec)
        predictions = predict_queries(self.model, self.processor, samples, places, benchmark, self.options)
        return [
            score(place, sample, query, prediction, benchmark)
            for place, sample, row in zip(places, samples, predictions, strict=True)
            for query, prediction in zip(sample.queries, row, strict=True)
        ]


# -- reading -----------------------------------------------------------------------------------------------------------


class _Reader(Dataset):
    """Reads images; what cannot be read comes back as its error, so that all of them can be listed."""

    def __init__(self, dataset: EvalDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> EvalSample | ValueError:
        try:
            return self.dataset[index]
        except ValueError as error:
            return error


def _unreadable(spec: Spec, errors: Sequence[str], most: int = 10) -> str:
    """The list of images that stops an evaluation."""
    shown = "".join(f"\n  {error}" for error in errors[:most])
    more = f"\n  and {len(errors) - most} more" if len(errors) > most else ""
    return (
        f"{spec}: {len(errors)} images cannot be evaluated, which would change the result (test.py --allow_missing "
        f"leaves them out and says how many):{shown}{more}"
    )


def _changed(dataset: EvalDataset, kept: Sequence[Record], most: int = 20) -> str | None:
    """What is wrong with kept answers, if annotations were changed meanwhile; looks at about ``most`` of the images."""
    found: dict[int, list[tuple[str, str, bool]]] = {}
    for record in kept:
        found.setdefault(record.index, []).append((record.query_id, record.query, record.expected_empty))
    places = sorted(found)
    for place in places[:: max(1, len(places) // most)]:
        try:
            sample = dataset[place]
        except ValueError:  # it could be read then
            continue
        if found[place] != [(query.query_id, query.text, len(query.masks) == 0) for query in sample.queries]:
            return (
                f"{sample.source} has other queries now than those that were answered; the annotations were changed: "
                "leave --resume out"
            )
    return None


def _check_complete(dataset: EvalDataset, records: Sequence[Record], places: set[int]) -> None:
    """A sample that is missing or there twice would silently change the result."""
    seen = Counter((record.index, record.query_id) for record in records)
    twice = [key for key, count in seen.items() if count > 1]
    missing = places - {record.index for record in records}
    if twice or missing:
        raise ValueError(
            f"{dataset.spec}: images without a record: {sorted(missing)[:5]}; (image, query) with several: "
            f"{twice[:5]}. Query ids must be unique within an image"
        )
    if len(places) == len(dataset) and len(records) != dataset.num_queries:
        raise ValueError(f"{dataset.spec}: {len(records)} records for {dataset.num_queries} queries")
