"""An evaluation on disk: one line per answer, with its provenance, and the summary of all answers.

BENCHMARK.MODE.jsonl          all answers, in the split's order; grows while the evaluation runs
BENCHMARK.MODE.rank_K.jsonl   answers of process K > 0, while the evaluation runs
BENCHMARK.MODE.json           the summary, written when all answers are complete
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, TextIO, get_args, get_origin, get_type_hints

from utils import distributed
from utils.datasets.spec import Spec
from utils.evaluation import metrics
from utils.evaluation.benchmarks import PROTOCOLS, SEVERAL_SEG, benchmark_of
from utils.evaluation.metrics import Record
from utils.files import write_atomically

NONE = "none"  # the layer rule of answers that another model gave


@dataclass(frozen=True)
class Provenance:
    """What an answer depends on besides its query; equal in all lines of a file, under the key ``origin``.

    Attributes:
        benchmark: with its split, such as ``grefcoco|unc|val``.
        mode, layer_policy, max_new_tokens, seed: see ``InferenceOptions``.
        protocol: where the benchmark has several, else empty. Only the metrics depend on it, not the answers.
        checkpoint: fingerprint of the weights.
        precision: ``float32``, ``bfloat16, 8bit``, ...
        images, queries: numbers in the whole split, readable or not.
        several_seg: ``union`` or ``first`` [SEG] of an answer with several is scored. It changes no answer either.
        annotations: the file that was read where there is a choice, relative to the dataset directory; else empty.
        without_target: number of images without a target that were answered too, for the protocol ``published``; None
            in files of older versions.
        think: whether generated answers begin with a thought, as the flag.
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
    several_seg: str = "union"
    annotations: str = ""
    without_target: int | None = None
    think: str = "auto"

    @property
    def spec(self) -> Spec:
        return Spec.parse(self.benchmark)

    def check_same(self, other: Provenance, path: Path) -> None:
        """Raises ``ValueError`` unless answers of ``other``, read from ``path``, are those of this evaluation."""
        current, saved = asdict(self), asdict(other)
        ignored = {"protocol", "several_seg", "without_target"}
        if not saved["annotations"]:  # of an older version
            ignored.add("annotations")
        names = [name for name in current if name not in ignored and current[name] != saved[name]]
        if names:
            differences = "; ".join(f"{name}: {saved[name]!r} there, {current[name]!r} now" for name in names)
            raise ValueError(
                f"{path} holds results of another evaluation ({differences}); "
                "give the same settings, another --output, or leave --resume out to replace them"
            )


@dataclass
class Summary:
    """Metrics of one benchmark: the JSON of a result (docs/scoring.md, Files), with these keys in this order.

    ``benchmark`` to ``layers`` follow from the answers alone (``summarize``); the others are None where unknown.

    Attributes:
        breakdown: key of the queries' meta -> group -> metrics.
        layers: hidden state -> number of [SEG] that used it.
        several_seg, annotations, think: of the provenance.
        skipped: records without a target or a query in the data set itself.
        missing: images that cannot be read in this copy of the data.
        limit: number of images, the first ones of the split; None = all.
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
    several_seg: str = "union"
    annotations: str = ""
    think: str = "auto"
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
    def mode_label(self) -> str:
        """The mode, and what differs from the strict protocol: ``teacher_forced, gsva``."""
        protocol = "" if self.protocol == "strict" else self.protocol
        first = "first [SEG]" if self.several_seg == "first" else ""
        think = "" if self.think == "auto" else f"think {self.think}"
        return ", ".join(filter(None, [self.mode, protocol, first, think]))

    @property
    def missing_note(self) -> str:
        """`` (3 missing)``, beside every number of an evaluation with missing images; else empty."""
        missing = self.counts.get("missing", 0)
        return f" ({missing} missing)" if missing else ""

    def to_dict(self) -> dict[str, Any]:
        """The known values. ``limit`` is known with ``settings``, and None (all images) is a value of its own."""
        known = {name for name, value in vars(self).items() if value not in (None, "")}
        known |= {"limit"} if self.settings is not None else set()
        return {name: value for name, value in vars(self).items() if name in known}

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Summary:
        """Reads what ``save`` wrote.

        Raises:
            ValueError: if the file is not a summary.
        """
        try:
            values: dict[str, Any] = {"protocol": "", **json.loads(path.read_text(encoding="utf-8"))}
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is no result of test.py ({error}); give the folder that test.py wrote") from error
        if absent := [field.name for field in fields(cls) if field.default is MISSING and field.name not in values]:
            raise ValueError(
                f"{path} is no result of test.py (it has no {', '.join(absent)}); give the folder that test.py wrote"
            )
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        if wrong := mismatched(known, cls):
            raise ValueError(f"{path} is no result of test.py ({', '.join(wrong)}: of another type); evaluate again")
        for name, choices in (("protocol", ("", *PROTOCOLS)), ("several_seg", SEVERAL_SEG)):
            if known.get(name, choices[0]) not in choices:
                raise ValueError(f"{path}: {name} {known[name]!r} is unknown; evaluate again")
        return cls(**known)


@dataclass
class Result:
    """An evaluated benchmark: ``summary`` is written as JSON, ``records`` as JSONL."""

    summary: Summary
    records: list[Record]
    provenance: Provenance

    @property
    def metrics(self) -> dict[str, float]:
        return self.summary.metrics

    def save(self, folder: Path) -> Path:
        """Writes ``BENCHMARK.MODE.json`` and ``.jsonl``; returns the path of the JSON."""
        path = result_path(folder, self.provenance.spec, self.provenance.mode)
        Journal(path).replace(self.provenance, self.records)
        path = path.with_suffix(".json")
        self.summary.save(path)
        return path


def mismatched(values: dict[str, Any], of: type) -> list[str]:
    """The names of JSON values that do not have the type of the field of their name in a dataclass."""
    hints = _hints(of)
    return [name for name, value in values.items() if not _matches(value, hints[name])]


_hints = cache(get_type_hints)


def _matches(value: Any, hint: Any) -> bool:
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind is UnionType:
        return any(_matches(value, arg) for arg in args)
    if kind in (dict, list):
        items = value.values() if isinstance(value, dict) else value
        return isinstance(value, kind) and (not args or all(_matches(item, args[-1]) for item in items))
    if kind is float:
        return type(value) in (int, float)
    return kind is Any or type(value) is kind


def result_path(folder: Path, spec: Spec, mode: str) -> Path:
    """``ReasonSeg|val``, ``generate`` -> ``folder/ReasonSeg_val.generate.jsonl``."""
    return folder / f"{spec.slug}.{mode}.jsonl"


def check_has_logits(provenance: Provenance, protocol: str) -> None:
    """Raises a ``ValueError`` if the protocol counts logits, and the answers are masks of another model."""
    if (
        protocol == "published"
        and benchmark_of(provenance.spec).task == "instances"
        and provenance.layer_policy == NONE
    ):
        raise ValueError(
            f"{provenance.benchmark}: protocol published counts logits, and these answers are masks: use strict"
        )


def summarize(provenance: Provenance, records: Sequence[Record]) -> Summary:
    """The summary, as far as it follows from the answers alone.

    Raises:
        ValueError: if the answers of an older version lack what the protocol takes.
    """
    benchmark, protocol = benchmark_of(provenance.spec), provenance.protocol
    published = protocol == "published"
    if published and provenance.without_target is None:
        raise ValueError(f"the answers to {provenance.benchmark} are of an older version, without protocol 'published'")
    records = metrics.select(records, protocol, provenance.several_seg)
    images = provenance.images + (provenance.without_target or 0 if published else 0)
    layers = Counter(layer for record in records for layer in record.layers)
    return Summary(
        benchmark=provenance.benchmark,
        mode=provenance.mode,
        protocol=protocol,
        layer_policy=provenance.layer_policy,
        metrics=metrics.compute(records, benchmark, protocol),
        intervals=metrics.intervals(records, benchmark, protocol),
        controls={},
        breakdown=metrics.breakdown(records, benchmark, protocol),
        counts=metrics.count_records(records, protocol) | {"split_images": images},
        layers={str(layer): count for layer, count in sorted(layers.items())},
        several_seg="union" if benchmark.scores_each(protocol) else provenance.several_seg,
        annotations=provenance.annotations,
        think=provenance.think,
    )


# -- lines -------------------------------------------------------------------------------------------------------------


def to_lines(provenance: Provenance, records: Iterable[Record]) -> Iterator[str]:
    """One line of JSON per record."""
    protocol = provenance.protocol
    for record in records:
        [scored] = metrics.select([record], "published", provenance.several_seg)
        score = {"predicted_empty": metrics.rejects(scored, protocol), "IoU": metrics.iou(scored, protocol)}
        yield json.dumps(asdict(record) | score | {"origin": asdict(provenance)}, ensure_ascii=False) + "\n"


def read_results(path: Path, allow_truncated: bool = False) -> tuple[Provenance, list[Record]]:
    """Reads what ``to_lines`` wrote.

    Args:
        allow_truncated: ignore an incomplete last line, as a killed evaluation leaves it.

    Raises:
        ValueError: naming the line that is no answer, a duplicate, or of another evaluation than the first line.
    """
    names = {field.name for field in fields(Record)}
    provenance, records, seen = None, [], set()
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line_number, line in enumerate(file, start=1):
            if allow_truncated and not line.endswith("\n"):
                break
            try:
                values = json.loads(line)
                row = {name: value for name, value in values.items() if name in names}
                if wrong := mismatched(row, Record) + mismatched(values["origin"], Provenance):
                    raise TypeError(f"{', '.join(wrong)}: of another type")
                record, line_provenance = Record(**row), Provenance(**values["origin"])
            except (json.JSONDecodeError, TypeError, AttributeError, KeyError) as error:
                hint = (
                    "evaluate again" if line.endswith("\n") else "it is cut off: test.py --resume continues from here"
                )
                raise ValueError(f"{path}, line {line_number} is not a result ({error}); {hint}") from error
            provenance = provenance or line_provenance
            if line_provenance != provenance:
                raise ValueError(
                    f"{path}, line {line_number} is of another evaluation than line 1: "
                    f"{line_provenance} and {provenance}"
                )
            if (key := (record.index, record.query_id)) in seen:
                raise ValueError(
                    f"{path}, line {line_number}: query {record.query_id!r} of {record.image} is a duplicate"
                )
            seen.add(key)
            records.append(record)
    if provenance is None:
        raise ValueError(f"{path} holds no results")
    return provenance, records


# -- while it runs -----------------------------------------------------------------------------------------------------


class Journal:
    """The files of a running evaluation: every answer is on disk as soon as its batch is done.

    Args:
        path: the result's JSONL (``result_path``).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.provenance: Provenance | None = None
        self.file: TextIO | None = None
        self.append = False

    def rank_files(self) -> list[Path]:
        """The files of the other processes."""
        stem = self.path.name.removesuffix(".jsonl")
        return sorted(path for path in self.path.parent.glob("*.rank_*.jsonl") if path.name.startswith(f"{stem}.rank_"))

    def read(self, provenance: Provenance) -> list[Record]:
        """The answers to resume from. Collective: all processes must call it, and get the same.

        The last image of an unfinished file is left out: some of its queries may be missing.

        Raises:
            ValueError: for answers of another evaluation, or a file that is damaged elsewhere than at its end.
        """
        records, error_message = [], None
        if distributed.is_main():
            try:
                records = self._read(provenance)
            except (ValueError, OSError) as error:
                error_message = str(error)
        distributed.raise_on_all_ranks(error_message)
        return distributed.all_gather(records)[0]

    def _read(self, provenance: Provenance) -> list[Record]:
        merged: dict[tuple[int, str], Record] = {}
        for path in [self.path, *self.rank_files()]:
            if not path.is_file() or b"\n" not in path.read_bytes():
                continue
            saved, records = read_results(path, allow_truncated=True)
            provenance.check_same(saved, path)
            if len(records) < provenance.queries:
                records = [record for record in records if record.index != records[-1].index]
            for record in records:  # a record is in two files if the evaluation was killed while merging them
                if merged.setdefault((record.index, record.query_id), record) != record:
                    raise ValueError(f"{path}: {record.image}, {record.query!r} has another answer in another file")
        return list(merged.values())

    def start(self, provenance: Provenance, resumed: Sequence[Record]) -> None:
        """Prepares to append to ``resumed``, or to replace existing files. Collective: all processes must call it."""
        self.provenance = provenance
        if distributed.is_main() and resumed:
            self.replace(provenance, resumed)
        distributed.barrier()
        self.append = distributed.is_main() and bool(resumed)

    def add(self, records: Sequence[Record]) -> None:
        """Writes a batch. Files of an earlier evaluation stay until the first record replaces them."""
        assert self.provenance is not None
        if not records:
            return
        if self.file is None:
            main, rank = distributed.is_main(), distributed.rank()
            path = self.path if main else self.path.with_suffix(f".rank_{rank}.jsonl")
            if main:
                path.with_suffix(".json").unlink(missing_ok=True)  # the summary of the answers that are being replaced
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a" if self.append else "w", encoding="utf-8")
        self.file.write("".join(to_lines(self.provenance, records)))
        self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def replace(self, provenance: Provenance, records: Sequence[Record]) -> None:
        """Replaces all files by one with ``records``, atomically: readers see the old answers or the new ones."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.new")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(to_lines(provenance, records))
        os.replace(temporary, self.path)
        for rank_file in self.rank_files():
            rank_file.unlink()
