"""The weighted mixture of training sets: sample i is a pure function of (seed, i)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from model.structures import Sample
from utils.config import Config
from utils.datasets import DATASETS, TYPES, get_train_dataset, trained_types
from utils.datasets.base import DataError, DataOptions, TrainDataset, unknown
from utils.datasets.spec import Spec
from utils.plotting import text_tables
from utils.wording import counted

logger = logging.getLogger(__name__)

MAX_TRIES = 100  # records sampled in place of unusable ones
MAX_IN_A_ROW = 50  # unusable records of one data set, without a usable one between them
NUM_CHECKED = 20  # records read at the start if the first one is unusable
MAX_LOGGED = 10  # unusable records logged per process


class Mixture(Dataset):
    """Training samples of several types, sampled with replacement.

    Sample i is a deterministic function of (seed, i), the files and the settings: it depends neither on the worker or
    process nor on earlier samples. An unusable record is counted, logged once, and replaced by the next record of the
    same random stream, so that the replacement is the same in every run.

    Args:
        dataset_dir: the root of all data.
        types: the data set types, ``"reason_seg||refer_seg"`` or a list.
        rates: sampling rate of each type, ``"9,3"`` or a list; normalized. None or empty = uniform.
        data: data sets of each type, ``{"refer_seg": "refcoco||grefcoco"}``; other types use their defaults.
        options: how samples are built.
        seed: seed of the mixture.
        weighting: sampling weight of a data set within its type: its ``"size"`` in images, or ``"uniform"``.

    Attributes:
        skipped: unusable records sampled so far, per data set.
        truncated: samples that were cut off (``count_truncated``).
        left_out: questions that were not asked (``count_left_out``).

    Raises:
        DataError: listing all unknown names and all missing files at once.
    """

    def __init__(
        self,
        dataset_dir: str | Path,
        types: str | Sequence[str],
        rates: str | Sequence[float] | None = None,
        data: dict[str, str | Sequence[str]] | None = None,
        options: DataOptions | None = None,
        seed: int = 0,
        weighting: str = "size",
    ) -> None:
        names, problems = _split_names(types, "||"), []
        if weighting not in ("size", "uniform"):
            problems.append(unknown("weighting", weighting, ("size", "uniform")))
        rate_of = _parse_rates(names, rates, problems)
        self.options = options or DataOptions()
        self.datasets: list[TrainDataset] = []
        self.types: list[str] = []
        for name in names:
            for spec in _parse_specs(name, data or {}, problems):
                try:
                    self.datasets.append(get_train_dataset(spec, dataset_dir, self.options))
                    self.types.append(name)
                except DataError as error:
                    problems.append(str(error))
        if problems:
            raise DataError(f"the data are incomplete; {len(problems)} problem(s):\n  " + "\n  ".join(problems))
        self.seed = seed
        weights = np.array([len(dataset) if weighting == "size" else 1 for dataset in self.datasets], dtype=np.float64)
        totals = {name: sum(w for w, kind in zip(weights, self.types) if kind == name) for name in names}
        self.shares = np.array([rate_of[kind] * w / totals[kind] for w, kind in zip(weights, self.types)])
        # shared memory, so that the main process sees the counts of its workers
        self.skipped = torch.zeros(len(self.datasets), dtype=torch.int64).share_memory_()
        self.truncated = torch.zeros(1, dtype=torch.int64).share_memory_()
        self.left_out = torch.zeros(1, dtype=torch.int64).share_memory_()
        self.check_image: Callable[[str, np.ndarray], None] | None = None
        self._in_a_row = [0] * len(self.datasets)
        self._logged: set[str] = set()

    def check_readable(self) -> None:
        """Reads one record of each data set; if it is unusable, up to ``NUM_CHECKED``, spread over the data set.

        Raises:
            DataError: listing the data sets of which most of these cannot be used. Others would take their place.
        """
        problems = [problem for dataset in self.datasets if (problem := _unreadable(dataset))]
        if problems:
            raise DataError("these data cannot be read:\n  " + "\n  ".join(problems))

    def __len__(self) -> int:
        """Number of images in all data sets, a nominal epoch; any index >= 0 is valid."""
        return sum(map(len, self.datasets))

    def __getitem__(self, sample_index: int) -> Sample:
        rng = np.random.default_rng((self.seed, sample_index))
        problem = ""
        for _ in range(MAX_TRIES):
            dataset_index = int(rng.choice(len(self.datasets), p=self.shares))
            dataset = self.datasets[dataset_index]
            index = int(rng.integers(len(dataset)))
            try:
                # a separate generator: how many numbers a failing record consumed must not matter
                sample = dataset.sample(index, np.random.default_rng(rng.integers(2**63)))
                self._check(sample)
            except DataError as error:
                problem = str(error)
                self.skipped[dataset_index] += 1
                self._in_a_row[dataset_index] += 1
                self._log(f"{dataset.name}: skipped a record: {problem}")
                if self._in_a_row[dataset_index] == MAX_IN_A_ROW:
                    raise DataError(
                        f"{dataset.name}: {MAX_IN_A_ROW} records in a row are unusable; the last: {problem}; most of "
                        "the data set seems to be missing or damaged"
                    ) from error
                continue
            self._in_a_row[dataset_index] = 0
            sample.sample_id = sample_index
            if rng.random() < self.options.dialogue_probability:
                sample.conversations = [tuple(turn for turns in sample.conversations for turn in turns)]
            return sample
        raise DataError(
            f"sample {sample_index}: {MAX_TRIES} records in a row are unusable; the last: {problem}; "
            "most of the data seem to be missing or damaged"
        )

    def _check(self, sample: Sample) -> None:
        """Raises a DataError if the model cannot read the sample's image (``check_image``)."""
        if self.check_image is None:
            return
        try:
            self.check_image(sample.source, sample.image)
        except ValueError as error:
            raise DataError(str(error)) from error

    def count_truncated(self, sample: Sample, conversations: int, room: int) -> None:
        """Counts and logs a sample of which ``conversations`` are longer than ``room`` tokens (``collate``)."""
        self.truncated += 1
        self._log(
            f"{sample.source}: the end of {conversations} of its {len(sample.conversations)} conversations is cut off, "
            f"with its [SEG]: they are longer than the {room} tokens beside the image; raise --model_max_length"
        )

    def count_left_out(self, sample: Sample, questions: int, room: int) -> None:
        """Counts and logs questions that are longer, with their answers, than ``room`` tokens (``group_prompts``)."""
        self.left_out += questions
        self._log(
            f"{sample.source}: {counted(questions, 'question')} not asked: with an answer of --grpo_tokens longer than "
            f"the {room} tokens beside the image; lower it, or raise --model_max_length"
        )

    def _log(self, message: str) -> None:
        if message in self._logged or len(self._logged) > MAX_LOGGED:
            return
        self._logged.add(message)
        if len(self._logged) > MAX_LOGGED:
            message = f"{MAX_LOGGED} unusable or truncated records are logged; further ones are only counted"
        logger.warning("%s", message)

    def describe(self, num_samples: int | None = None) -> list[dict[str, Any]]:
        """Per data set: type, name, share of the samples, counts, and records skipped so far.

        With ``num_samples`` also its epochs, the mean number of times that each of its images is sampled.
        """
        rows = []
        for i, dataset in enumerate(self.datasets):
            row = {"type": self.types[i], "name": dataset.name, "share": float(self.shares[i]), **dataset.describe()}
            row["skipped"] = int(self.skipped[i])
            if num_samples is not None:
                row["epochs"] = num_samples * float(self.shares[i]) / len(dataset)
            rows.append(row)
        return rows

    def table(self, num_samples: int | None = None) -> str:
        """``describe`` as a text table, where ``passes`` are its epochs: those of the run are counted in steps."""
        rows = text_tables.from_mappings(self.describe(num_samples), _count_cell)
        rows[0] = ["passes" if column == "epochs" else column for column in rows[0]]
        return "\n".join(text_tables.aligned(rows, "llr"))


def _unreadable(dataset: TrainDataset) -> str:
    """The message that most of a data set cannot be used; empty if it can."""
    problems: list[str] = []
    indices = sorted({len(dataset) * k // NUM_CHECKED for k in range(NUM_CHECKED)})
    for index in indices:
        try:
            dataset.sample(index, np.random.default_rng(0))
        except DataError as error:
            problems.append(str(error))
        if not problems:
            return ""  # the first one is usable
    if 2 * len(problems) <= len(indices):
        return ""
    return f"{dataset.name}: {len(problems)} of {len(indices)} records cannot be used; the first: {problems[0]}"


def _count_cell(column: str, value: Any) -> str:
    if column in ("share", "epochs"):
        return f"{value:.1%}" if column == "share" else f"{value:.2f}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else value


def _split_names(names: str | Sequence[str], separator: str) -> list[str]:
    parts = names.split(separator) if isinstance(names, str) else names
    return [part.strip() for part in parts if part.strip()]


def _parse_rates(names: list[str], rates: str | Sequence[float] | None, problems: list[str]) -> dict[str, float]:
    """Sampling probability of each known type; appends all errors to ``problems``."""
    known = [name for name in names if name in trained_types()]
    problems += [unknown("data set type", name, trained_types()) for name in names if name not in trained_types()]
    if not names or len(set(names)) < len(names):
        problems.append(f"the types {names} must be one or more, without duplicates")
    parts = _split_names(rates, ",") if isinstance(rates, str) else rates
    try:
        values = [1.0] * len(names) if parts is None or len(parts) == 0 else [float(rate) for rate in parts]
    except (TypeError, ValueError):
        values = []
    if len(values) != len(names) or not all(0 <= value < float("inf") for value in values) or sum(values) <= 0:
        problems.append(f"sample_rates {rates!r} must be {len(names)} numbers >= 0, not all 0: one for each of {names}")
        values = [1.0] * len(names)
    return {name: value / sum(values) for name, value in zip(names, values) if name in known}


def _parse_specs(name: str, data: dict[str, str | Sequence[str]], problems: list[str]) -> list[Spec]:
    """Specs of the data sets of a type; appends all errors to ``problems``."""
    if name not in trained_types():
        return []
    specs = _split_names(data.get(name) or TYPES[name].default, "||")
    if not TYPES[name].default:  # the user names files; the data set's name is implied
        specs = [f"{name}|{spec.removeprefix(f'{name}|')}" for spec in specs]
    if not specs:
        problems.append(f"{name}: no file is given; add --{name}_data A.jsonl||B.jsonl")
    if len(set(specs)) < len(specs):
        problems.append(f"{name}: a data set is named twice in {specs}")
    of_type = [other for other, row in DATASETS.items() if row.type == name]
    parsed = [Spec.parse(spec) for spec in specs]
    problems += [unknown(f"{name} data set", spec.name, of_type) for spec in parsed if spec.name not in of_type]
    return [spec for spec in parsed if spec.name in of_type]


class MixtureSampler(Sampler[list[int]]):
    """Batches of sample indices for one rank, for ``DataLoader(mixture, batch_sampler=...)``.

    ``index = (micro_step * world_size + rank) * batch_size + j``: together the ranks visit 0, 1, 2, ... whatever their
    number, and a run resumes at any micro step from that step alone.

    Args:
        batch_size: samples per rank and micro step.
        start, stop: micro steps ``start <= step < stop``.
        rank, world_size: of this process.
    """

    def __init__(self, batch_size: int, start: int, stop: int, rank: int = 0, world_size: int = 1) -> None:
        if batch_size < 1 or not 0 <= rank < world_size or not 0 <= start <= stop:
            raise ValueError(
                f"batch_size {batch_size}, rank {rank} of {world_size}, steps {start} to {stop}: out of range"
            )
        self.batch_size, self.rank, self.world_size, self.start, self.stop = batch_size, rank, world_size, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            first = (step * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))


def make_mixture(config: Config, check: bool = True) -> Mixture:
    """The mixture of a configuration's data settings.

    Args:
        check: read a record of each data set (``Mixture.check_readable``).

    Raises:
        DataError: listing all that is missing, or cannot be read.
    """
    data = config.data
    sets = {kind: getattr(data, f"{kind}_data") for kind in trained_types()}
    options = DataOptions(**{option.name: getattr(data, option.name) for option in fields(DataOptions)})
    rates = data.sample_rates or None
    mixture = Mixture(data.dataset_dir, data.dataset, rates, sets, options, config.train.seed, data.weighting)
    if check:
        mixture.check_readable()
    return mixture
