"""One engine for every benchmark, shared by validation during training and by test.py.

Each image is encoded once for all its questions. Ranks take images r, r + world, ... of the split, without padding or
repeats; their records are gathered and every metric is computed from records alone (``utils.evaluation.metrics``), so
the counting depends neither on the batch size nor on the number of processes (the model's arithmetic does, a little).
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from model.processing.conversation import escape
from model.processing.tokens import SEG
from model.structures import EvalQuery, EvalSample, MaskUncertainty, Prediction, Turn
from utils import distributed
from utils.datasets.base import EvalDataset
from utils.datasets.masks import encode_mask
from utils.datasets.spec import Spec
from utils.datasets.templates import eval_joint_turn, eval_turn
from utils.evaluation import metrics
from utils.evaluation.benchmarks import MODES, Benchmark, benchmark_of
from utils.evaluation.matching import match_masks
from utils.evaluation.metrics import Record
from utils.evaluation.results import Journal, Origin, Result, summarize
from utils.inference.loading import predict

CONTROLS = ("shuffled_prompts",)


@dataclass(frozen=True)
class Asking:
    """How the model is asked.

    Attributes:
        mode: ``generate`` = it writes its answer; ``teacher_forced`` = the answer template is given.
        layer_policy: which hidden state a [SEG] connects from: ``argmax``, ``last``, ``sample``, ``mc:T``, ``fixed:K``.
        max_new_tokens: longest written answer.
        seed: of sampled layers, together with the image's place in the split.
    """

    mode: str = "generate"
    layer_policy: str = "argmax"
    max_new_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"unknown mode {self.mode!r}; use {' or '.join(MODES)}")


@dataclass
class Answer:
    """The model's answer to one query.

    Attributes:
        question, text: what was asked and said.
        logits: [N, H, W] float32, one per [SEG]; similarities: [N, H, W] float32 in [0, 1], their maps.
        layers: the hidden state of each.
        rejected: it says that nothing is there.
        uncertainty: with ``mc:T``, of each [SEG].
    """

    question: str
    text: str
    logits: np.ndarray
    similarities: np.ndarray
    layers: list[int]
    rejected: bool
    uncertainty: Sequence[MaskUncertainty] = ()

    @property
    def masks(self) -> np.ndarray:
        """[N, H, W] bool."""
        return self.logits > 0

    @property
    def merged(self) -> np.ndarray:
        """[H, W] bool: what is scored where one mask is expected, the union of all [SEG]; none = empty."""
        return np.any(self.masks, axis=0)

    @property
    def deviations(self) -> np.ndarray | None:
        """[N, H, W] standard deviation of each mask's probability over the layers drawn by ``mc:T``, at most 0.5."""
        if not self.uncertainty:
            return None
        return np.stack([found.variance.sqrt().numpy() for found in self.uncertainty])


def evaluate(
    model,
    processor,
    dataset: EvalDataset,
    mode: str = "generate",
    layer_policy: str = "argmax",
    batch_size: int = 4,
    *,
    protocol: str | None = None,
    limit: int | None = None,
    max_new_tokens: int = 64,
    seed: int = 0,
    workers: int = 0,
    controls: Sequence[str] = (),
    checkpoint: str = "",
    quantize: str = "",
    journal: Journal | None = None,
    resume: bool = False,
    allow_missing: bool = False,
    progress: bool = False,
) -> Result:
    """Asks every query of a split and scores the answers. All ranks must call it; all get the whole result.

    Args:
        model, processor: from ``utils.inference.loading``.
        batch_size: images per call of the model.
        protocol: of gRefCOCO, teacher forced: ``grefcoco`` or ``gsva``; None = as the paper reports it.
        limit: only the first so many images.
        workers: processes that load images in the background; 0 = none.
        controls: ``shuffled_prompts`` asks each image the queries of another one, scored against its own truth.
        checkpoint: the fingerprint of the weights, to know their results by.
        quantize: how the layers were quantized, ``8bit``; empty = not. Results of the one are not gone on from as the
            other.
        journal: where answers are kept while it runs; None = nowhere.
        resume: go on from the journal's answers.
        allow_missing: leave out images that cannot be read, and say how many.
        progress: show a bar (on rank 0).

    Raises:
        ValueError: listing the images that cannot be read; for an unknown mode, layer policy, protocol or control; for
            a journal of another evaluation, or of other annotations.
    """
    asking = Asking(mode, layer_policy, max_new_tokens, seed)
    unknown = sorted(set(controls) - set(CONTROLS))
    if unknown:
        raise ValueError(f"unknown control {unknown[0]!r}; use {', '.join(CONTROLS)}")
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size is {batch_size} and limit {limit}; both must be at least 1")
    size = min(len(dataset), limit or len(dataset))
    if "shuffled_prompts" in controls:
        ShuffledPrompts(dataset, range(size), seed)  # raises, if it has to, before hours of work
    origin = origin_of(dataset, asking, protocol, checkpoint, model, quantize)
    asker = Asker(model, processor, asking, batch_size, workers, allow_missing, progress)
    started = time.perf_counter()
    kept = journal.read(origin) if journal and resume else []
    distributed.fail_together(_changed(dataset, kept))
    records, unread = gather_records(dataset, asker, range(size), kept, origin, journal)
    missing = [*dataset.unusable, *unread]
    summary = summarize(origin, records) | {
        "skipped": list(dataset.skipped),
        "missing": missing,
        "limit": limit,
        "seconds": round(time.perf_counter() - started, 2),
        "settings": {
            "batch_size": batch_size,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            "processes": distributed.world_size(),
        },
    }
    summary["counts"] |= {"skipped": len(dataset.skipped), "missing": len(missing)}
    if "shuffled_prompts" in controls:
        places = sorted({record.index for record in records})
        answers, _ = gather_records(ShuffledPrompts(dataset, places, seed), asker, places)
        summary["controls"]["shuffled_prompts"] = metrics.compute(answers, benchmark_of(dataset.spec), origin.protocol)
    return Result(summary, records, origin)


def origin_of(
    dataset: EvalDataset, asking: Asking, protocol: str | None, checkpoint: str, model, quantize: str = ""
) -> Origin:
    """What the answers depend on."""
    precision = str(model.dtype).removeprefix("torch.")
    return Origin(
        benchmark=str(dataset.spec),
        mode=asking.mode,
        layer_policy=asking.layer_policy,
        max_new_tokens=asking.max_new_tokens,
        seed=asking.seed,
        protocol=benchmark_of(dataset.spec).protocol(protocol, asking.mode),
        checkpoint=checkpoint,
        precision=f"{precision}, {quantize}" if quantize else precision,
        images=len(dataset),
        queries=dataset.num_queries,
    )


# -- images and answers ------------------------------------------------------------------------------------------------


@dataclass
class Asker:
    """Who is asked, and how: everything about an evaluation but the data. See ``evaluate``."""

    model: Any
    processor: Any
    asking: Asking
    batch_size: int
    workers: int
    allow_missing: bool
    progress: bool

    def batches(self, places: Sequence[int]) -> list[list[list[int]]]:
        """The places of every batch of every rank."""
        world, size = distributed.world_size(), self.batch_size
        shares = [places[rank::world] for rank in range(world)]
        return [[list(share[k : k + size]) for k in range(0, len(share), size)] for share in shares]

    def answer(self, dataset: EvalDataset, places: Sequence[int], samples: Sequence[EvalSample]) -> list[Record]:
        """The records of a batch."""
        if not samples:
            return []
        benchmark = benchmark_of(dataset.spec)
        answers = ask(self.model, self.processor, samples, places, benchmark, self.asking)
        return [
            score(place, sample, query, answer, benchmark)
            for place, sample, given in zip(places, samples, answers, strict=True)
            for query, answer in zip(sample.queries, given, strict=True)
        ]


def gather_records(
    dataset: EvalDataset,
    asker: Asker,
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
    batches = asker.batches(places)
    done = {record.index for record in kept}
    todo = [[batch for batch in own if not done.issuperset(batch)] for own in batches]
    wanted = set(places) - {place for own in todo for batch in own for place in batch}
    kept = [record for record in kept if record.index in wanted]
    if journal is not None and origin is not None:
        journal.start(origin, kept)
    records, errors = _ask_batches(dataset, asker, todo[distributed.rank()], journal)
    if journal is not None:
        journal.close()
    unread = dict(sorted((place, text) for part in distributed.all_gather(errors) for place, text in part.items()))
    stop = unread and (not asker.allow_missing or len(unread) == len(places))
    distributed.fail_together(_unreadable(dataset.spec, list(unread.values())) if stop else None)
    records = [*kept, *(record for part in distributed.all_gather(records) for record in part)]
    records.sort(key=lambda record: record.index)  # stable: an image's queries keep their order
    _check_complete(dataset, records, set(places) - set(unread))
    return records, list(unread.values())


def _ask_batches(
    dataset: EvalDataset, asker: Asker, batches: Sequence[list[int]], journal: Journal | None
) -> tuple[list[Record], dict[int, str]]:
    """This rank's records, and what is wrong with the images that cannot be read, by their places."""
    own = torch.Generator()  # a loader draws a number at its start: not from the state that a training run goes on with
    loader = DataLoader(
        _Reader(dataset), batch_sampler=batches, collate_fn=list, num_workers=asker.workers, generator=own
    )
    records: list[Record] = []
    errors: dict[int, str] = {}
    pace = 0.1 if sys.stderr.isatty() else 15  # a log file wants few lines
    name, hide = f"{dataset.spec} ({asker.asking.mode})", not distributed.is_main() or not asker.progress
    with tqdm(total=sum(map(len, batches)), desc=name, unit="image", mininterval=pace, disable=hide) as bar:
        for batch, items in zip(batches, loader, strict=True):
            errors |= {place: str(item) for place, item in zip(batch, items) if isinstance(item, ValueError)}
            if not errors or asker.allow_missing:  # else the others are only looked at, to list all that are missing
                found = [place for place in batch if place not in errors]
                fresh = asker.answer(dataset, found, [item for item in items if not isinstance(item, ValueError)])
                records += fresh
                if journal is not None:
                    journal.add(fresh)
            bar.update(len(items))
    return records, errors


def ask(
    model, processor, samples: Sequence[EvalSample], numbers: Sequence[int], benchmark: Benchmark, asking: Asking
) -> list[list[Answer]]:
    """Every query of every image, in one call of the model.

    Args:
        numbers: each image's place in the split; it seeds sampled layers, whatever the batch.
    """
    turns = turns_of(samples, benchmark, asking.mode)
    predictions = predict(
        model,
        processor,
        [sample.image for sample in samples],
        turns,
        numbers,
        layer_policy=asking.layer_policy,
        max_new_tokens=asking.max_new_tokens,
        seed=asking.seed,
    )
    return answers_of(samples, turns, predictions, benchmark, asking.mode)


def turns_of(samples: Sequence[EvalSample], benchmark: Benchmark, mode: str) -> list[list[Turn]]:
    """What each image is asked, a turn per query or a joint one; teacher forced, with the answer."""
    if benchmark.is_joint(mode):
        plain = [[replace(query, text=escape(query.text)) for query in sample.queries] for sample in samples]
        return [[eval_joint_turn(queries)] for queries in plain]  # the answer repeats the queries: no [SEG] of theirs
    turns = [[eval_turn(query, benchmark.asks == "instances") for query in sample.queries] for sample in samples]
    return turns if mode == "teacher_forced" else [[Turn(turn.question) for turn in row] for row in turns]


def answers_of(
    samples: Sequence[EvalSample],
    turns: Sequence[Sequence[Turn]],
    predictions: Sequence[Sequence[Prediction]],
    benchmark: Benchmark,
    mode: str,
) -> list[list[Answer]]:
    """The model's predictions for ``turns`` as an answer per query."""
    return [
        _joint_answers(sample, row[0], said[0])
        if benchmark.is_joint(mode)
        else _answers(sample, row, said, benchmark, mode)
        for sample, row, said in zip(samples, turns, predictions, strict=True)
    ]


def score(index: int, sample: EvalSample, query: EvalQuery, answer: Answer, benchmark: Benchmark) -> Record:
    """Counts the pixels of one answer.

    Raises:
        ValueError: if the query has several targets although the benchmark expects one (merged) mask; for logits that
            are NaN or infinite, which would count as an empty mask.
    """
    matched = benchmark.asks == "instances"
    if not np.isfinite(answer.logits).all():
        raise ValueError(
            f"{sample.source}, {query.text!r}: the mask's logits are NaN or infinite; the numbers overflow "
            "(use --precision fp32 or bf16), or the weights are broken (convert or train them again)"
        )
    if len(query.masks) > 1 and not matched:
        raise ValueError(
            f"{sample.source}, {query.text!r} has {len(query.masks)} targets; {benchmark.name} expects one"
        )
    counts = _count_pairs(query, answer) if matched else [_count_merged(sample, query, answer)]
    both, either, predicted, true = (sum(column) for column in zip(*counts, strict=True))
    return Record(
        index=index,
        image=sample.source,
        image_id=sample.image_id,
        query_id=query.query_id,
        query=query.text,
        question=answer.question,
        answer=answer.text,
        layers=answer.layers,
        rejected=answer.rejected,
        expected_empty=len(query.masks) == 0,
        I=both,
        U=either,
        P=predicted,
        G=true,
        masks=[encode_mask(mask) for mask in answer.masks],
        meta=query.meta,
        pairs=[list(count[:2]) for count in counts] if matched else [],
        uncertainty=[found.score for found in answer.uncertainty],
    )


def _count_merged(sample: EvalSample, query: EvalQuery, answer: Answer) -> tuple[int, int, int, int]:
    return metrics.count_pixels(answer.merged, metrics.merge_targets(query.masks, *sample.image.shape[:2]))


def _count_pairs(query: EvalQuery, answer: Answer) -> list[tuple[int, int, int, int]]:
    """I, U, P and G of each matched pair; what has no partner is paired with an empty mask (MUSE)."""
    empty, masks = np.zeros(query.masks.shape[1:], np.uint8), answer.masks
    return [
        metrics.count_pixels(
            empty.astype(bool) if predicted is None else masks[predicted],
            empty if target is None else query.masks[target],
        )
        for predicted, target in match_masks(answer.logits, query.masks)
    ]


def _answers(
    sample: EvalSample, turns: Sequence[Turn], predictions: Sequence, benchmark: Benchmark, mode: str
) -> list[Answer]:
    """A question per query. A written answer without [SEG] rejects; a given one if [REJ] was more likely, where that
    is a possible answer."""
    answers = []
    for query, turn, prediction in zip(sample.queries, turns, predictions, strict=True):
        rejected = not prediction.layers
        if mode == "teacher_forced":
            _check_fits(sample, query.text, len(prediction.layers), turn.answer.count(SEG))
            rejected = benchmark.rejects and all(prediction.rejected)
        logits, similarities = prediction.mask_logits.numpy(), prediction.maps.numpy()
        said = (turn.question, prediction.text, logits, similarities, list(prediction.layers))
        answers.append(Answer(*said, rejected=rejected, uncertainty=prediction.uncertainty))
    return answers


def _joint_answers(sample: EvalSample, turn: Turn, prediction) -> list[Answer]:
    """One question for all queries; the logits before the k-th [SEG] say whether the k-th target is there."""
    count = len(sample.queries)
    _check_fits(sample, turn.question, len(prediction.layers), count)
    logits, similarities = prediction.mask_logits.numpy(), prediction.maps.numpy()
    return [
        Answer(
            turn.question,
            prediction.text,
            logits[k : k + 1],
            similarities[k : k + 1],
            [prediction.layers[k]],
            prediction.rejected[k],
            prediction.uncertainty[k : k + 1],
        )
        for k in range(count)
    ]


def _check_fits(sample: EvalSample, question: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise ValueError(
            f"{sample.source}: {found} [SEG] instead of {wanted} are left of the given answer to {question[:60]!r}; "
            "the prompt is longer than max_tokens in uground_processor.json: raise it, or use --mode generate"
        )


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


# -- controls ----------------------------------------------------------------------------------------------------------


class ShuffledPrompts:
    """A split in which each image is asked another image's queries, with its own truth kept.

    A model that ignores the text scores here as on the split itself. Who asks whom is one cycle through all images, so
    nobody keeps its own; an image with fewer queries than needed repeats them.
    """

    def __init__(self, dataset: EvalDataset, places: Sequence[int], seed: int = 0) -> None:
        if len(places) < 2:
            raise ValueError(
                f"{dataset.spec}: shuffled_prompts needs at least 2 images to exchange queries; there is {len(places)}"
            )
        self.dataset, self.skipped = dataset, dataset.skipped
        self.spec = Spec(dataset.spec.name, (*dataset.spec.parts, "shuffled prompts"))
        self.unusable, self.not_found = dataset.unusable, dataset.not_found
        cycle = np.random.default_rng(seed).permutation(np.array(places))
        self.donor = dict(zip(cycle.tolist(), np.roll(cycle, -1).tolist()))

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def num_queries(self) -> int:
        return self.dataset.num_queries

    def __getitem__(self, index: int) -> EvalSample:
        sample, others = self.dataset[index], self.dataset[self.donor[index]].queries
        queries = [
            replace(query, text=other.text, is_sentence=other.is_sentence)
            for query, other in ((query, others[k % len(others)]) for k, query in enumerate(sample.queries))
        ]
        return replace(sample, queries=queries)


def text_blind_scores(dataset_dir: Path, spec: Spec) -> dict[str, dict[str, float]]:
    """What answers that ignore the text would score: ``{"all_objects": {"gIoU": ...}, "random_object": ...}``.

    Generated data come with these (``demo_data.json`` of scripts/make_demo_data.py); other data have none.
    """
    path = Path(dataset_dir) / "demo_data.json"
    if not path.is_file():
        return {}
    split = spec.split
    kinds: tuple[str, ...] = ("all", "short", "long")
    if split.endswith(("_short", "_long")):
        split, kind = split.rsplit("_", 1)
        kinds = (kind,)
    rows = json.loads(path.read_text(encoding="utf-8"))["text_blind"]
    rows = [row for row in rows if (row["set"], row["split"]) == (spec.name, split) and row["kind"] in kinds]
    names = {"all_objects": "all", "random_object": "random"}
    if len(rows) == 1:
        return {ours: dict(rows[0][theirs]) for ours, theirs in names.items()}
    total = sum(row["queries"] for row in rows)  # a cIoU of parts says nothing about the whole
    means = {o: sum(row[t]["gIoU"] * row["queries"] for row in rows) for o, t in names.items()}
    return {ours: {"gIoU": value / total} for ours, value in means.items()} if total else {}
