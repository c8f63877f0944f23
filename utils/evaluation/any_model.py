"""Scores answers of any model, from a file or from a Python function, as ``test.py`` scores its own. Needs no weights.

result = score_file(get_eval_dataset("refcoco|unc|val", "data"), Path("answers.jsonl"))
print(result.metrics)
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from model.structures import IGNORE_PIXEL, EvalQuery, EvalSample
from utils.datasets.base import DataError, EvalDataset
from utils.evaluation import metrics
from utils.evaluation.answers import Answer, AnswerBook, decode_masks, listed, query_line, read_answers, to_line
from utils.evaluation.benchmarks import MODES, Benchmark, benchmark_of
from utils.evaluation.metrics import Record
from utils.evaluation.predictions import QueryPrediction, score
from utils.evaluation.results import NONE, Provenance, Result, check_has_logits, summarize

Answering = Callable[[np.ndarray, str], tuple[Any, str]]  # image uint8 [H, W, 3] RGB, query -> masks [N, H, W], text
CERTAIN = 20.0  # the logit that stands for a given mask's pixels


def samples_of(
    dataset: EvalDataset, limit: int | None, missing: list[str] | None = None, progress: bool = False
) -> Iterator[tuple[int, EvalSample]]:
    """Index and sample of each image, then of those without a target, which the protocol ``published`` scores.

    Args:
        limit: number of images, the first ones of the split; None = all.
        missing: where errors of unreadable images go; None = they are raised.
    """
    size = min(len(dataset), limit or len(dataset))
    others = 0 if limit else getattr(dataset, "without_target", 0)
    indices = [*range(size), *range(len(dataset), len(dataset) + others)]
    for index in tqdm(indices, desc=str(dataset.spec), unit="image", disable=not progress):
        try:
            sample = dataset[index]
        except ValueError as error:
            if missing is None:
                raise
            missing.append(str(error))
        else:
            yield index, sample


def score_file(
    dataset: EvalDataset,
    path: Path,
    protocol: str | None = None,
    several_seg: str | None = None,
    limit: int | None = None,
    allow_missing: bool = False,
    rank_by: str | None = None,
    progress: bool = False,
) -> Result:
    """Scores the answers in a file against the ground truth of a split.

    Args:
        dataset: of ``get_eval_dataset``.
        path: JSONL as in ``utils.evaluation.answers``.
        protocol, several_seg: as of ``RunOptions``; None = as ``test.py`` scored the file, else the default.
        limit: number of images, the first ones of the split; None = all.
        allow_missing: leave out queries without an answer and unreadable images, and report their number.
        rank_by: the uncertainty of ``metrics.RANKED_BY`` that AURC and AUSE rank by, if the answers have it.

    Raises:
        DataError: listing the queries without an answer, and the answers that are there twice or belong to no query;
            for a mask that does not fit its image.
        ValueError: for a protocol that needs logits.
    """
    answers, origin = read_answers(path)
    book, benchmark = AnswerBook(answers), benchmark_of(dataset.spec)
    provenance = _provenance(dataset, origin, path, limit, protocol)
    chosen = benchmark.protocol(protocol or provenance.protocol, provenance.mode)
    if protocol not in (None, chosen):
        there = ", ".join(filter(None, benchmark.protocols.get(provenance.mode, ()))) or "none"
        raise ValueError(f"--protocol {protocol}: {dataset.spec} in mode {provenance.mode} has the protocols: {there}")
    provenance = replace(provenance, protocol=chosen, several_seg=several_seg or provenance.several_seg)
    check_has_logits(replace(provenance, layer_policy=NONE), chosen)  # a file holds masks, whoever wrote it
    records, missing = list[Record](), list[str]() if allow_missing else None
    unanswered = list[str]()
    for index, sample in samples_of(dataset, limit, missing, progress):
        for query, answer in zip(sample.queries, book.of(sample), strict=True):
            if answer is not None:
                records.append(_record(index, sample, query, answer, path.parent, benchmark))
            elif index < len(dataset) or chosen == "published":
                unanswered.append(f"{sample.source}: {query.text!r} ({query.query_id})")
    unknown = book.unknown if limit is None else []
    if unanswered and not allow_missing:
        hint = "\n--allow_missing leaves them out and prints their number beside the score"
        raise DataError(f"{path}: {listed(f'queries of {dataset.spec} have no answer', unanswered)}{hint}")
    if unknown:
        raise DataError(f"{path}: {listed(f'answers are about no query of {dataset.spec}', unknown)}")
    ranked = metrics.ranked_by(records, rank_by) if rank_by else records
    summary = summarize(provenance, ranked)
    summary.skipped, summary.limit, summary.checkpoint = list(dataset.skipped), limit, provenance.checkpoint
    summary.missing = [*dataset.unusable, *(missing or []), *(f"{each}: no answer" for each in unanswered)]
    summary.counts |= {"skipped": len(dataset.skipped), "missing": len(summary.missing)}
    return Result(summary, records, provenance)


def _provenance(
    dataset: EvalDataset, origin: Provenance | None, path: Path, limit: int | None, protocol: str | None
) -> Provenance:
    """That of ``test.py``'s file, or what is known of others: generated answers, if the protocol is for such."""
    spec = str(dataset.spec)
    if origin is None:
        protocols = benchmark_of(dataset.spec).protocols
        mode = next((mode for mode in MODES if protocol in protocols.get(mode, ())), "generate")
        origin = Provenance(spec, mode, NONE, 0, 0, "", "", "", 0, 0)
    if origin.benchmark != spec:
        raise DataError(f"{path} holds answers to {origin.benchmark}, not to {spec}: give that as --benchmark")
    return replace(
        origin,
        images=len(dataset),
        queries=dataset.num_queries,
        annotations=getattr(dataset, "annotations", ""),
        without_target=0 if limit else getattr(dataset, "without_target", 0),
    )


def _record(
    index: int, sample: EvalSample, query: EvalQuery, answer: Answer, folder: Path, benchmark: Benchmark
) -> Record:
    masks = decode_masks(answer, folder, *sample.image.shape[:2])
    logits = np.where(masks, np.float32(CERTAIN), np.float32(-CERTAIN))
    prediction = QueryPrediction(query.text, answer.text, logits, masks, [], answer.rejected)
    record = replace(score(index, sample, query, prediction, benchmark), **answer.kept)
    return record if answer.counts is None else _counted(record, query, answer, benchmark)


def _counted(record: Record, query: EvalQuery, answer: Answer, benchmark: Benchmark) -> Record:
    """A record with the counts of another project, as far as they can be of the same truth."""
    assert answer.counts is not None
    intersection, union = answer.counts
    if (query.masks == IGNORE_PIXEL).any():
        raise DataError(
            f"{answer.location}: the target has ignored regions, which other projects count as target or background: "
            "I and U do not tell; score masks instead"
        )
    if query.reference is not None:
        raise DataError(
            f"{answer.location}: {benchmark.name} compares masks with another region; give masks, not counts"
        )
    predicted = union + intersection - record.G
    if benchmark.task == "instances":
        raise DataError(f"{answer.location}: {benchmark.name} matches masks, and these are counts")
    if predicted < intersection or intersection > record.G:
        raise DataError(
            f"{answer.location}: I {intersection} and U {union} are not of this target, which has {record.G} pixels: "
            "their code read another truth (ignored regions, another size); score masks instead"
        )
    return replace(record, I=intersection, U=union, P=predicted, in_order=[])


# -- a Python function -------------------------------------------------------------------------------------------------


def load_callable(name: str) -> Answering:
    """The function of ``module:function``; the working directory is searched for the module, too.

    Raises:
        ValueError: if there is no such module or function.
    """
    module_name, separator, function_name = name.partition(":")
    if not separator or not module_name or not function_name or module_name.startswith("."):
        raise ValueError(f"--callable {name}: write module:function, such as my_model:answer")
    sys.path.insert(0, os.getcwd())  # and stays, for what the function imports later
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"--callable {name}: no module {module_name} here or among the installed packages") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"--callable {name}: {module.__file__ or module_name} has no function {function_name}")
    return function


def ask(
    dataset: EvalDataset,
    function: Answering,
    path: Path,
    limit: int | None = None,
    allow_missing: bool = False,
    progress: bool = False,
) -> None:
    """Asks a function every query of a split and appends its answers to a file, image by image.

    Queries that the file answers already are not asked again: an interrupted run goes on where it was.

    Args:
        function: gets an image, uint8 [H, W, 3] RGB, and a query; returns masks, [N, H, W] bool (or 0 and 1), and its
            text. Without masks it rejects the query.

    Raises:
        ValueError: naming the query whose masks are of another shape, or of other values than 0 and 1.
        RuntimeError: naming the query at which the function failed.
    """
    drop_cut_line(path)
    book = AnswerBook(read_answers(path)[0] if path.is_file() and path.stat().st_size else [])
    with path.open("a", encoding="utf-8") as file:
        for _, sample in samples_of(dataset, limit, [] if allow_missing else None, progress):
            open_queries = [query for query, given in zip(sample.queries, book.of(sample)) if given is None]
            lines = []
            for query in open_queries:
                try:
                    answer = function(sample.image.copy(), query.text)
                except Exception as error:
                    raise RuntimeError(f"the function failed on {sample.source}, {query.text!r}") from error
                masks, text = _checked(answer, sample, query)
                lines.append(to_line(sample, query, masks, text))
            file.write("".join(lines))
            file.flush()


def drop_cut_line(path: Path) -> None:
    """Removes what an interruption left of a last line."""
    if path.is_file() and not (content := path.read_bytes()).endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _checked(answer: Any, sample: EvalSample, query: EvalQuery) -> tuple[np.ndarray, str]:
    place, (height, width) = f"{sample.source}, {query.text!r}", sample.image.shape[:2]
    if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[1], str):
        raise ValueError(f"{place}: the function must return (masks, text), not {str(answer)[:80]}")
    masks = np.asarray(answer[0])
    if masks.size == 0 and (masks.ndim < 3 or len(masks) == 0):
        return np.zeros((0, height, width), bool), answer[1]
    if masks.shape[1:] != (height, width):
        raise ValueError(f"{place}: masks are {masks.shape}; the image needs (N, {height}, {width})")
    if masks.dtype != bool and not np.isin(masks, (0, 1)).all():
        raise ValueError(f"{place}: masks hold other values than 0 and 1; threshold them (logits > 0)")
    return masks.astype(bool), answer[1]


def write_queries(dataset: EvalDataset, path: Path, limit: int | None = None) -> int:
    """Writes what there is to answer, a line per query without masks and answer; returns the number of lines."""
    lines = [query_line(sample, query) for _, sample in samples_of(dataset, limit) for query in sample.queries]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)
