"""One engine for every benchmark, shared by validation during training and by test.py.

Each image is encoded once for all its queries. Rank r takes images r, r + world, ... of the split, without padding or
repeats. Records are gathered, and every metric is computed from records alone (``utils.evaluation.metrics``): counting
depends neither on the batch size nor on the number of processes (the model's arithmetic does, a little).
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from model.processing.processor import UGroundProcessor
from model.structures import EvalSample
from utils import distributed
from utils.datasets.base import EvalDataset
from utils.datasets.spec import Spec
from utils.evaluation import metrics
from utils.evaluation.benchmarks import SEVERAL_SEG, benchmark_of
from utils.evaluation.controls import CONTROLS, ShuffledPrompts
from utils.evaluation.metrics import Record
from utils.evaluation.predictions import InferenceOptions, predict_queries, predict_query_rounds, score
from utils.evaluation.results import Journal, Provenance, Result, summarize
from utils.wording import counted

GPU_WORKERS = 2  # an image is read in a small part of the time that a model of full size takes to answer


@dataclass(frozen=True)
class RunOptions:
    """How an evaluation runs.

    Attributes:
        batch_size: images per forward pass.
        workers: processes that load images in the background; None = ``GPU_WORKERS`` beside a GPU, else none.
        limit: number of images, the first ones of the split; None = all.
        protocol: for benchmarks that have it (docs/evaluation.md); None = each benchmark's default.
        several_seg: ``union`` or ``first``: what is scored of an answer with several [SEG] where one mask is expected.
        controls: ``shuffled_prompts`` gives each image the queries of another one, scored against its own ground truth.
        checkpoint: fingerprint of the weights, part of the results' provenance.
        quantize: quantization of the layers, such as ``8bit``; empty = none. Part of the provenance, too.
        journal: keeps the answers on disk during the evaluation; None = off.
        resume: continue from the journal's answers.
        allow_missing: leave out images that cannot be read, and report their number.
        progress: show a progress bar (on rank 0).
    """

    batch_size: int = 4
    workers: int | None = None
    limit: int | None = None
    protocol: str | None = None
    several_seg: str = "union"
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
        if self.several_seg not in SEVERAL_SEG:
            raise ValueError(f"several_seg is {self.several_seg!r}; use {' or '.join(SEVERAL_SEG)}")
        if self.batch_size < 1 or (self.limit is not None and self.limit < 1):
            raise ValueError(f"batch_size is {self.batch_size} and limit {self.limit}; both must be at least 1")


def evaluate(
    model,
    processor,
    dataset: EvalDataset,
    options: InferenceOptions | None = None,
    run: RunOptions | None = None,
) -> Result:
    """Evaluates a model on all queries of a split. Collective: all ranks must call it; all get the whole result.

    Args:
        model, processor: of ``model.load``.
        options: how answers are predicted; None = in the benchmark's mode, with the model's own layer rule.
        run: how the evaluation runs.

    Raises:
        ValueError: listing the images that cannot be read; for an unknown layer policy or protocol; for a journal of
            another evaluation, or of other annotations.
    """
    run = run or RunOptions()
    options = options or InferenceOptions(benchmark_of(dataset.spec).mode, model.config.layer_policy)
    size = min(len(dataset), run.limit or len(dataset))
    control = None
    if "shuffled_prompts" in run.controls:
        control = ShuffledPrompts(dataset, range(size), options.seed)  # raises before hours of work rather than after
    provenance, runner = provenance_of(model, dataset, options, run), EvalRunner(model, processor, options, run)
    started = time.perf_counter()
    resumed = run.journal.read(provenance) if run.journal and run.resume else []
    distributed.raise_on_all_ranks(_annotation_change(dataset, resumed))
    indices = [*range(size), *range(len(dataset), len(dataset) + (provenance.without_target or 0))]
    together = control if len(indices) == size else None  # the same images in the same batches
    records, control_records, unreadable = runner.gather(dataset, indices, resumed, provenance, run.journal, together)
    missing = [*dataset.unusable, *unreadable]
    summary = replace(
        summarize(provenance, records),
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
    if control is not None:
        indices = sorted({record.index for record in records if record.index < len(dataset)})
        if len(indices) < size or {record.index for record in control_records} != set(indices):
            # images without an answer donate no queries: asked again, among the others
            control_records, _, _ = runner.gather(ShuffledPrompts(dataset, indices, options.seed), indices)
        control_records = metrics.select(control_records, provenance.protocol, provenance.several_seg)
        benchmark = benchmark_of(dataset.spec)
        summary.controls["shuffled_prompts"] = metrics.compute(control_records, benchmark, provenance.protocol)
    return Result(summary, records, provenance)


def provenance_of(model, dataset: EvalDataset, options: InferenceOptions, run: RunOptions) -> Provenance:
    """What the answers of an evaluation depend on."""
    precision = str(model.dtype).removeprefix("torch.")
    return Provenance(
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
        several_seg=run.several_seg,
        annotations=getattr(dataset, "annotations", ""),
        without_target=0 if run.limit else getattr(dataset, "without_target", 0),
        think=options.think if options.mode == "generate" else "auto",
    )


# -- predictions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvalRunner:
    """Model and options of an evaluation, to be run on any data. See ``evaluate``."""

    model: Any
    processor: Any
    options: InferenceOptions
    run: RunOptions

    def gather(
        self,
        dataset: EvalDataset,
        indices: Sequence[int],
        resumed: Sequence[Record] = (),
        provenance: Provenance | None = None,
        journal: Journal | None = None,
        control: ShuffledPrompts | None = None,
    ) -> tuple[list[Record], list[Record], list[str]]:
        """Records of the images at ``indices``, from all ranks, in the split's order; those of the control; errors of
        unreadable images.

        Args:
            resumed: records of an interrupted evaluation. An incomplete batch is predicted as a whole, so that the
                model computes exactly what it would have without the interruption.
            provenance, journal: keep the records on disk meanwhile.
            control: asked right after each batch, whose images are encoded once for both. Its records are incomplete
                if an image cannot be read.
        """
        done = {record.index for record in resumed}
        shares = self._batches(indices)
        pending = [[batch for batch in share if not done.issuperset(batch)] for share in shares]
        complete = set(indices) - {index for share in pending for batch in share for index in batch}
        resumed = [record for record in resumed if record.index in complete]
        if journal is not None and provenance is not None:
            journal.start(provenance, resumed)
        batches = (pending if control is None else shares)[distributed.rank()]
        records, control_records, errors = self._predict(dataset, batches, complete, journal, control)
        if journal is not None:
            journal.close()
        unreadable = dict(sorted(item for part in distributed.all_gather(errors) for item in part.items()))
        stop = unreadable and (not self.run.allow_missing or len(unreadable) == len(indices))
        distributed.raise_on_all_ranks(_unreadable(dataset.spec, list(unreadable.values())) if stop else None)
        records = _in_order(resumed, records)
        _check_complete(dataset, records, set(indices) - set(unreadable))
        return records, _in_order([], control_records), list(unreadable.values())

    def _batches(self, indices: Sequence[int]) -> list[list[list[int]]]:
        """Image indices, as [rank][batch][image]."""
        world, size = distributed.world_size(), self.run.batch_size
        shares = [indices[rank::world] for rank in range(world)]
        return [[list(share[k : k + size]) for k in range(0, len(share), size)] for share in shares]

    def _predict(
        self,
        dataset: EvalDataset,
        batches: Sequence[list[int]],
        answered: set[int],
        journal: Journal | None,
        control: ShuffledPrompts | None,
    ) -> tuple[list[Record], list[Record], dict[int, str]]:
        """This rank's records and those of the control; image index -> error of the images that cannot be read.

        Args:
            answered: images whose records are known: only the control is asked about them.
        """
        workers = self.run.workers
        if workers is None:
            workers = GPU_WORKERS if self.model.device.type == "cuda" else 0
        generator = torch.Generator()  # the loader samples a seed; it must not advance a training run's random state
        loader = DataLoader(
            _Reader(dataset, self.processor, control),
            batch_sampler=batches,
            collate_fn=list,
            num_workers=workers,
            generator=generator,
        )
        records: list[Record] = []
        control_records: list[Record] = []
        errors: dict[int, str] = {}
        interval = 0.1 if sys.stderr.isatty() else 15  # few lines in a log file
        name, hidden = f"{dataset.spec} ({self.options.mode})", not distributed.is_main() or not self.run.progress
        with tqdm(total=sum(map(len, batches)), desc=name, unit="image", mininterval=interval, disable=hidden) as bar:
            for batch, items in zip(batches, loader, strict=True):
                known = answered.issuperset(batch)
                read = {index: rounds for index, rounds in zip(batch, items) if not isinstance(rounds, ValueError)}
                if not known:
                    errors |= {index: str(item) for index, item in zip(batch, items) if isinstance(item, ValueError)}
                if len(read) < len(batch) or any(len(rounds) < 2 for rounds in read.values()):
                    control = None  # its queries go round other images, or all are only read from here on
                if read and not (known and control is None) and (not errors or self.run.allow_missing):
                    scored = self._score(dataset, read, known, control is not None)
                    if not known:
                        records += (answers := next(scored))
                        if journal is not None:
                            journal.add(answers)
                    control_records += chain.from_iterable(scored)
                bar.update(len(items))
        return records, control_records, errors

    def _score(
        self, dataset: EvalDataset, read: dict[int, list[EvalSample]], known: bool, control: bool
    ) -> Iterator[list[Record]]:
        """Predicts and scores the rounds of a batch: its queries, unless their answers are known, and the control's.

        Args:
            read: image index -> the image with its queries, and with the control's.
        """
        benchmark, indices = benchmark_of(dataset.spec), list(read)
        what = self.model, self.processor
        rounds = [list(samples) for samples in zip(*(samples[: 1 + control] for samples in read.values()))]
        if control:
            predicted = predict_query_rounds(*what, rounds, indices, benchmark, self.options, int(known))
        else:
            predicted = iter([predict_queries(*what, rounds[0], indices, benchmark, self.options)])
        for samples, predictions in zip(rounds[known:], predicted, strict=True):
            yield [
                score(index, sample, query, prediction, benchmark)
                for index, sample, row in zip(indices, samples, predictions, strict=True)
                for query, prediction in zip(sample.queries, row, strict=True)
            ]


# -- reading and checks ------------------------------------------------------------------------------------------------


class _Reader(Dataset):
    """An image with its queries, and with those of the control if they can be read.

    Returns errors instead of raising them, so that all unreadable images can be listed.
    """

    def __init__(self, dataset: EvalDataset, processor: UGroundProcessor, control: ShuffledPrompts | None) -> None:
        self.dataset, self.processor, self.control = dataset, processor, control

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> list[EvalSample] | ValueError:
        try:
            sample = self.dataset[index]
            self.processor.check_image(sample.source, sample.image)
        except ValueError as error:
            return error
        with suppress(ValueError):  # of the donor, which is listed as an image of its own
            return [sample, *([self.control.exchanged(index, sample)] if self.control else [])]
        return [sample]


def _in_order(resumed: Sequence[Record], records: list[Record]) -> list[Record]:
    """Records of all ranks by image; an image's queries keep their order."""
    gathered = [*resumed, *(record for part in distributed.all_gather(records) for record in part)]
    return sorted(gathered, key=lambda record: record.index)


def _unreadable(spec: Spec, errors: Sequence[str], max_shown: int = 10) -> str:
    """The error message that lists the unreadable images."""
    shown = "".join(f"\n  {error}" for error in errors[:max_shown])
    more = f"\n  and {len(errors) - max_shown} more" if len(errors) > max_shown else ""
    return (
        f"{spec}: {counted(len(errors), 'image')} cannot be evaluated, which would change the result (test.py "
        f"--allow_missing leaves them out and reports their number):{shown}{more}"
    )


def _annotation_change(dataset: EvalDataset, resumed: Sequence[Record], num_checked: int = 20) -> str | None:
    """The error message if annotations changed since the interruption; checks about ``num_checked`` images."""
    answered: dict[int, list[tuple[str, str, bool]]] = {}
    for record in resumed:
        answered.setdefault(record.index, []).append((record.query_id, record.query, record.expected_empty))
    indices = sorted(answered)
    for index in indices[:: max(1, len(indices) // num_checked)]:
        try:
            sample = dataset[index]
        except ValueError:  # readable when it was answered: its records stand
            continue
        if answered[index] != [(query.query_id, query.text, len(query.masks) == 0) for query in sample.queries]:
            return (
                f"{sample.source} has other queries now than those that were answered: the annotations have changed; "
                "leave --resume out"
            )
    return None


def _check_complete(dataset: EvalDataset, records: Sequence[Record], indices: set[int]) -> None:
    """Rejects missing and duplicate records, which would silently change the result."""
    seen = Counter((record.index, record.query_id) for record in records)
    duplicates = [key for key, count in seen.items() if count > 1]
    missing = indices - {record.index for record in records}
    if duplicates or missing:
        raise ValueError(
            f"{dataset.spec}: images without a record: {sorted(missing)[:5]}; (image, query) with several: "
            f"{duplicates[:5]}. Query ids must be unique within an image"
        )
    answered = sum(record.index < len(dataset) for record in records)
    if indices.issuperset(range(len(dataset))) and answered != dataset.num_queries:
        raise ValueError(f"{dataset.spec}: {answered} records for {dataset.num_queries} queries")
