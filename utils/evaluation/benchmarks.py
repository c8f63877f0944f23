"""How each benchmark is asked, scored and reported (evaluation.md): one row each.

A new benchmark is a row here and one in ``utils.datasets.DATASETS``. A data set without a row here is asked for one
mask per query, teacher forced, and reports gIoU and cIoU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from utils.datasets.spec import Spec

MODES = ("generate", "teacher_forced")
IOU = {"gIoU": "gIoU", "cIoU": "cIoU"}
REJECTION = IOU | {"N-acc": "N-acc", "T-acc": "T-acc"}
FALSE_PREMISES = {"See": "presence", "Segment": "cIoU"}


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables of results.

    Attributes:
        number, title: as in the paper.
        metrics: a column each, for every split.
        digits: after the point, in percent.
    """

    number: int
    title: str
    metrics: tuple[str, ...]
    digits: int = 1


@dataclass(frozen=True)
class Part:
    """A split that is a group of another one: ``breakdown[key][group]`` of ``whole`` holds its numbers."""

    whole: str
    key: str
    group: str


@dataclass(frozen=True)
class Benchmark:
    """How one benchmark is asked, scored and reported.

    Attributes:
        name: of the data set, a key of ``utils.datasets.DATASETS``.
        metrics: names that it reports -> their formulas, keys of ``utils.evaluation.metrics.METRICS``. With the layer
            policy ``mc:T``, AURC and AUSE are added.
        mode: the default way of asking, the paper's: ``generate`` or ``teacher_forced``.
        asks: ``one mask`` per query, the union of its targets; ``joint question``: the same, but teacher forced, one
            question and one answer list all queries of an image; ``instances``: one mask per target of a query,
            matched with the predicted ones.
        rejects: whether an answer may say that nothing is there.
        protocols: mode -> the protocols that apply to it, the default first.
        splits: what suites evaluate -> heading in ``table`` (empty if the benchmark is in none).
        parts: splits that need no evaluation of their own.
        table: the paper's table that reports it.
    """

    name: str
    metrics: Mapping[str, str] = field(default_factory=lambda: IOU)
    mode: str = "teacher_forced"
    asks: Literal["one mask", "joint question", "instances"] = "one mask"
    rejects: bool = False
    protocols: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    splits: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, Part] = field(default_factory=dict)
    table: PaperTable | None = None

    def spec(self, split: str) -> Spec:
        return Spec.parse(f"{self.name}|{split}")

    def is_joint(self, mode: str) -> bool:
        """Whether one question and one answer are about all queries of an image."""
        return self.asks == "joint question" and mode == "teacher_forced"

    def protocol(self, wanted: str | None = None, mode: str = "teacher_forced") -> str:
        """The protocol that applies: ``wanted``, if the mode has it, else the mode's default; empty if it has none.

        Raises:
            ValueError: if no benchmark has such a protocol.
        """
        if wanted and wanted not in PROTOCOLS:
            raise ValueError(f"unknown protocol {wanted!r}; use {' or '.join(PROTOCOLS)}")
        known = self.protocols.get(mode, ())
        return wanted if wanted and wanted in known else next(iter(known), "")


REASON_SEG = PaperTable(3, "ReasonSeg", ("gIoU", "cIoU"))
REFCOCO = PaperTable(4, "RefCOCO(+/g), cIoU", ("cIoU",))
GREFCOCO = PaperTable(5, "gRefCOCO", ("gIoU", "cIoU", "N-acc"), digits=2)
MUSE = PaperTable(12, "MUSE", ("gIoU", "cIoU"))
FP_REFCOCO = PaperTable(13, "FP-RefCOCO(+/g), val", ("See", "Segment"), digits=2)
TABLES = (REASON_SEG, REFCOCO, GREFCOCO, MUSE, FP_REFCOCO)

_UNC, _UMD = ("unc|val", "unc|testA", "unc|testB"), ("umd|val", "umd|test")

_ROWS = (
    Benchmark(
        "ReasonSeg",
        splits={
            "val": "val overall",
            "test_short": "test short query",
            "test_long": "test long query",
            "test": "test overall",
        },
        parts={"test_short": Part("test", "length", "short"), "test_long": Part("test", "length", "long")},
        table=REASON_SEG,
    ),
    *(
        Benchmark(
            f"refcoco{plus}", splits={split: f"refCOCO{plus} {split.split('|')[1]}" for split in _UNC}, table=REFCOCO
        )
        for plus in ("", "+")
    ),
    Benchmark("refcocog", splits={split: f"refCOCOg {split.split('|')[1]}(U)" for split in _UMD}, table=REFCOCO),
    Benchmark(
        "grefcoco",
        metrics=REJECTION,
        asks="joint question",
        rejects=True,
        # a written rejection holds no [SEG] whose mask could be scored all the same
        protocols={"teacher_forced": ("gsva", "grefcoco"), "generate": ("grefcoco",)},
        splits=dict(zip(_UNC, ("Validation Set", "Test Set A", "Test Set B"))),
        table=GREFCOCO,
    ),
    Benchmark(
        "MultiReasonSeg",
        mode="generate",
        asks="instances",
        splits={
            "val": "Val overall",
            "test_few": "Test few targets",
            "test_many": "Test many targets",
            "test": "Test overall",
        },
        parts={"test_few": Part("test", "part", "few"), "test_many": Part("test", "part", "many")},
        table=MUSE,
    ),
    *(
        Benchmark(
            f"fprefcoco{which}",
            metrics=FALSE_PREMISES,
            mode="generate",
            rejects=True,
            splits={"berkeley|val": f"FP-RefCOCO{which}"},
            table=FP_REFCOCO,
        )
        for which in ("", "+", "g")
    ),
    Benchmark(
        "refzom",
        metrics={"oIoU": "cIoU of targets", "mIoU": "gIoU of targets", "Acc": "N-acc"},
        asks="joint question",
        rejects=True,
        splits={"test": ""},
    ),
    *(
        Benchmark(
            f"R-refcoco{which}",
            metrics=FALSE_PREMISES | {"RR": "N-acc"},
            mode="generate",
            rejects=True,
            splits=dict.fromkeys(splits, ""),
        )
        for which, splits in (("", _UNC), ("+", _UNC), ("g", _UMD))
    ),
    Benchmark("custom", metrics=REJECTION, mode="generate", rejects=True),  # one's own data, as a user asks about them
)

BENCHMARKS = {row.name: row for row in _ROWS}
PROTOCOLS = tuple(sorted({name for row in _ROWS for names in row.protocols.values() for name in names}))


def benchmark_of(spec: Spec) -> Benchmark:
    """The row of a data set, or a plain one."""
    return BENCHMARKS.get(spec.name) or Benchmark(spec.name)


def _suite(in_table: bool) -> tuple[Spec, ...]:
    rows = (row for row in _ROWS if (row.table is not None) == in_table)
    return tuple(row.spec(split) for row in rows for split in row.splits if split not in row.parts)


SUITES = {"paper": _suite(True), "all": _suite(True) + _suite(False)}  # splits of the paper's tables, and all
