"""An evaluation on disk: a line per answer, which says what it is an answer to, and the summary that follows from them.

BENCHMARK.MODE.jsonl          every answer, in the split's order; grows while the evaluation runs
BENCHMARK.MODE.rank_K.jsonl   those of process K > 0, while it runs
BENCHMARK.MODE.json           the summary, once all answers are there
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from utils import distributed
from utils.datasets.spec import Spec
from utils.evaluation import metrics
from utils.evaluation.benchmarks import benchmark_of
from utils.evaluation.metrics import Record


@dataclass(frozen=True)
class Origin:
    """What an answer depends on besides its query; equal in all lines of a file.

    Attributes:
        benchmark: ``grefcoco|unc|val``; mode, layer_policy, max_new_tokens, seed: ``InferenceOptions``.
        protocol: of gRefCOCO, else empty. The answers do not depend on it, only the metrics.
        checkpoint: fingerprint of the weights; precision: ``float32``, ``bfloat16, 8bit``.
        images, queries: of the whole split, read or not.
    """

    benchmark: str
    mode: str
    layer_policy: str
    max_new_tokens: int
    seed: int
    protocol: str
    checkpoint: str
    precision: str
    images: int
    queries: int

    @property
    def spec(self) -> Spec:
        return Spec.parse(self.benchmark)

    def check_same(self, other: Origin, path: Path) -> None:
        """Refuses ``other``, which stands in ``path``, unless it gives the same answers."""
        ours, theirs = asdict(self), asdict(other)
        found = [f"{n}: {theirs[n]!r} there, {ours[n]!r} now" for n in ours if n != "protocol" and ours[n] != theirs[n]]
        if found:
            raise ValueError(
                f"{path} holds results of another evaluation ({'; '.join(found)}); "
                "give another --output, or leave --resume out to replace them"
            )


@dataclass
class Summary:
    """One benchmark's numbers: the JSON of a result (evaluation.md, output), with these keys in this order.

    Attributes:
        benchmark ... layers: follow from the answers alone (``summarize``); the rest is None where it is not known.
        breakdown: key of the queries' meta -> group -> metrics; layers: hidden state -> how many [SEG] used it.
        skipped, missing: records that nobody, or this copy of the data, can evaluate.
        limit: the first so many images; None = all.
        settings: batch_size, max_new_tokens, seed, processes.
        checkpoint: folder and fingerprint, or the fingerprint alone.
    """

    benchmark: str
    mode: str
    protocol: str
    layer_policy: str
    metrics: dict[str, float]
    intervals: dict[str, list[float]]
    controls: dict[str, dict[str, float]]
    breakdown: dict[str, dict[str, dict[str, float]]]
    counts: dict[str, int]
    layers: dict[str, int]
    skipped: list[str] | None = None
    missing: list[str] | None = None
    limit: int | None = None
    seconds: float | None = None
    settings: dict[str, int] | None = None
    checkpoint: dict[str, str] | str | None = None
    command: str | None = None
    precision: str | None = None
    device: str | None = None
    versions: dict[str, str] | None = None

    @property
    def spec(self) -> Spec:
        return Spec.parse(self.benchmark)

    @property
    def asked(self) -> str:
        """``teacher_forced, gsva``: the mode, and the protocol of a benchmark that has several."""
        return ", ".join(filter(None, [self.mode, self.protocol]))

    def to_dict(self) -> dict[str, Any]:
        """What is known. Whoever knows the settings knows the limit, too: None is written."""
        known = {name for name, value in vars(self).items() if value not in (None, "")}
        known |= {"limit"} if self.settings is not None else set()
        return {name: value for name, value in vars(self).items() if name in known}

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Summary:
        """What ``save`` wrote.

        Raises:
            ValueError: if the file holds anything else.
        """
        try:
            values: dict[str, Any] = {"protocol": "", **json.loads(path.read_text(encoding="utf-8"))}
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is no result of test.py ({error}); give the folder that test.py wrote") from error
        if lacking := [field.name for field in fields(cls) if field.default is MISSING and field.name not in values]:
            raise ValueError(
                f"{path} is no result of test.py (it has no {', '.join(lacking)}); give the folder that test.py wrote"
            )
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


@dataclass
class Result:
    """One benchmark's numbers: ``summary`` goes into the JSON, ``records`` into the JSONL."""

    summary: Summary
    records: list[Record]
    origin: Origin

    @property
    def metrics(self) -> dict[str, float]:
        return self.summary.metrics

    def save(self, folder: Path) -> Path:
        """Writes ``BENCHMARK.MODE.json`` and ``.jsonl``; returns the former's path."""
        path = result_path(folder, self.origin.spec, self.origin.mode)
        Journal(path).replace(self.origin, self.records)
        path = path.with_suffix(".json")
        self.summary.save(path)
        return path


def result_path(folder: Path, spec: Spec, mode: str) -> Path:
    """``ReasonSeg|val``, ``generate`` -> ``folder/ReasonSeg_val.generate.jsonl``."""
    return folder / f"{spec.slug}.{mode}.jsonl"


def summarize(origin: Origin, records: Sequence[Record]) -> Summary:
    """What the answers alone say."""
    benchmark, protocol = benchmark_of(origin.spec), origin.protocol
    layers = Counter(layer for record in records for layer in record.layers)
    return Summary(
        benchmark=origin.benchmark,
        mode=origin.mode,
        protocol=protocol,
        layer_policy=origin.layer_policy,
        metrics=metrics.compute(records, benchmark, protocol),
        intervals=metrics.intervals(records, benchmark, protocol),
        controls={},
        breakdown=metrics.breakdown(records, benchmark, protocol),
        counts=metrics.count_records(records) | {"split_images": origin.images},
        layers={str(layer): count for layer, count in sorted(layers.items())},
    )


# -- lines -------------------------------------------------------------------------------------------------------------


def to_lines(origin: Origin, records: Iterable[Record]) -> Iterator[str]:
    for record in records:
        score = {"predicted_empty": record.predicted_empty, "IoU": metrics.iou(record, origin.protocol)}
        yield json.dumps(asdict(record) | score | {"origin": asdict(origin)}, ensure_ascii=False) + "\n"


def read_results(path: Path, may_be_cut: bool = False) -> tuple[Origin, list[Record]]:
    """What ``to_lines`` made.

    Args:
        may_be_cut: leave out a last line that does not end, as in the file of an evaluation that was killed.

    Raises:
        ValueError: naming the line that is no answer, is there twice, or is of another evaluation than the first.
    """
    names = {field.name for field in fields(Record)}
    origin, records, seen = None, [], set()
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if may_be_cut and not line.endswith("\n"):
                break
            try:
                values = json.loads(line)
                record = Record(**{name: value for name, value in values.items() if name in names})
                own = Origin(**values["origin"])
            except (json.JSONDecodeError, TypeError, AttributeError, KeyError) as error:
                way_out = "evaluate again" if line.endswith("\n") else "it is cut: test.py --resume goes on from here"
                raise ValueError(f"{path}, line {number} is not a result ({error}); {way_out}") from error
            if own != (origin := origin or own):
                raise ValueError(f"{path}, line {number} is of another evaluation than line 1: {own} and {origin}")
            if (key := (record.index, record.query_id)) in seen:
                raise ValueError(f"{path}, line {number}: query {record.query_id!r} of {record.image} is there twice")
            seen.add(key)
            records.append(record)
    if origin is None:
        raise ValueError(f"{path} holds no results")
    return origin, records


# -- while it runs -----------------------------------------------------------------------------------------------------


class Journal:
    """The files of an evaluation under way: every answer is on disk as soon as its batch is done.

    Args:
        path: the result's JSONL (``result_path``).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.origin: Origin | None = None
        self.file: TextIO | None = None
        self.append = False

    def parts(self) -> list[Path]:
        """The other processes' files."""
        stem = self.path.name.removesuffix(".jsonl")
        return sorted(path for path in self.path.parent.glob("*.rank_*.jsonl") if path.name.startswith(f"{stem}.rank_"))

    def read(self, origin: Origin) -> list[Record]:
        """The answers to go on from. All processes must call it, and get the same.

        The last image of an unfinished file is left out: some of its queries may be missing.

        Raises:
            ValueError: if they are of another evaluation, or damaged elsewhere than at the end.
        """
        records, problem = [], None
        if distributed.is_main():
            try:
                records = self._read(origin)
            except (ValueError, OSError) as error:
                problem = str(error)
        distributed.raise_on_all_ranks(problem)
        return distributed.all_gather(records)[0]

    def _read(self, origin: Origin) -> list[Record]:
        found: dict[tuple[int, str], Record] = {}
        for path in [self.path, *self.parts()]:
            if not path.is_file() or b"\n" not in path.read_bytes():
                continue
            theirs, records = read_results(path, may_be_cut=True)
            origin.check_same(theirs, path)
            if len(records) < origin.queries:
                records = [record for record in records if record.index != records[-1].index]
            for record in records:  # killed while files were merged, a record is in two of them
                if found.setdefault((record.index, record.query_id), record) != record:
                    raise ValueError(f"{path}: {record.image}, {record.query!r} has another answer in another file")
        return list(found.values())

    def start(self, origin: Origin, kept: Sequence[Record]) -> None:
        """Will write after ``kept``, or in place of what is there. All processes must call it."""
        self.origin = origin
        if distributed.is_main() and kept:
            self.replace(origin, kept)
        distributed.barrier()
        self.append = distributed.is_main() and bool(kept)

    def add(self, records: Sequence[Record]) -> None:
        """Writes a batch. Files of an earlier evaluation stay until there is something to replace them."""
        assert self.origin is not None
        if not records:
            return
        if self.file is None:
            main, rank = distributed.is_main(), distributed.rank()
            path = self.path if main else self.path.with_suffix(f".rank_{rank}.jsonl")
            if main:
                path.with_suffix(".json").unlink(missing_ok=True)  # it sums up what is being replaced
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a" if self.append else "w", encoding="utf-8")
        self.file.write("".join(to_lines(self.origin, records)))
        self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def replace(self, origin: Origin, records: Sequence[Record]) -> None:
        """Puts ``records`` in place of all files: readers see the old ones or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.new")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(to_lines(origin, records))
        os.replace(temporary, self.path)
        for part in self.parts():
            part.unlink()
