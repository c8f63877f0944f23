"""How each benchmark is queried, scored and reported (evaluation.md): one row each.

A new benchmark is a row here and one in ``utils.datasets.DATASETS``. The default for a data set
without a row is one mask per query, teacher-forced, scored by gIoU and cIoU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from utils.datasets.spec import Spec

MODES = ("generate", "teacher_forced")
SEVERAL_SEG = ("union", "first")  # of an answer with several [SEG] to a query with one target: what is scored
# Protocols of gRefCOCO (docs/evaluation.md):
BY_TOKEN = ("published", "rela")  # only the token rejects, not a [SEG] with an empty mask
DECODED_ANYWAY = ("gsva", "published")  # a rejected target is scored by the mask that is decoded anyway
UNION_KEPT = ("grefcoco", "rela")  # a rejected target has I = 0, and U of the mask that is decoded anyway
IOU = {"gIoU": "gIoU", "cIoU": "cIoU"}
ACCURACIES = {"N-acc": "N-acc", "T-acc": "T-acc"}
REJECTION = IOU | ACCURACIES
PRECISIONS = {name: name for name in ("Pr@0.7", "Pr@0.8", "Pr@0.9")}
FALSE_PREMISES = {"See": "presence", "Segment": "cIoU"}
ROBUST = {"RR": "N-acc", "mIoU": "mIoU of refs", "oIoU": "cIoU of targets", "r": "r of refs", "rIoU": "rIoU of refs"}
HALLUCINATION = {
    "dIoU_t": "IoU difference, text",
    "dIoU_v": "IoU difference, image",
    "CMS_f": "confusion, text",
    "CMS_c": "confusion, image",
}
STRICT_OR_PUBLISHED = dict.fromkeys(MODES, ("strict", "published"))


@dataclass(frozen=True)
class PaperTable:
    """A table of results in the paper.

    Attributes:
        number, title: as in the paper.
        metrics: one column each, per split.
        digits: decimals of a percentage.
    """

    number: int
    title: str
    metrics: tuple[str, ...]
    digits: int = 1


@dataclass(frozen=True)
class Part:
    """A split that is a group of another split: ``breakdown[key][group]`` of ``whole`` holds its metrics."""

    whole: str
    key: str
    group: str


@dataclass(frozen=True)
class Benchmark:
    """How one benchmark is queried, scored and reported.

    Attributes:
        name: of the data set, a key of ``utils.datasets.DATASETS``.
        metrics: reported name -> formula, a key of ``utils.evaluation.metrics.METRICS``. The layer rule ``mc:T`` adds
            AURC and AUSE.
        mode: the paper's and the default: ``generate`` or ``teacher_forced``.
        task: ``one mask`` per query, the union of its targets; ``joint question``: the same, but when teacher-forced,
            one question and one answer list all queries of an image; ``union``: one mask, where a query may have
            several targets; ``instances``: one mask per target of a query, matched to the predicted masks.
        rejects: whether an answer may reject the query (the target is absent).
        protocols: mode -> its protocols, the default first (docs/evaluation.md).
        published: metric -> its formula under the protocol ``published``, where that differs.
        splits: split that suites evaluate -> its heading in ``table`` (empty without a table).
        parts: splits that are computed from the evaluation of another split.
        table: the paper's table that reports the benchmark.
    """

    name: str
    metrics: Mapping[str, str] = field(default_factory=lambda: IOU)
    mode: str = "teacher_forced"
    task: Literal["one mask", "joint question", "union", "instances"] = "one mask"
    rejects: bool = False
    protocols: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    published: Mapping[str, str] = field(default_factory=dict)
    splits: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, Part] = field(default_factory=dict)
    table: PaperTable | None = None

    def spec(self, split: str) -> Spec:
        return Spec.parse(f"{self.name}|{split}")

    def is_joint(self, mode: str) -> bool:
        """Whether one question and one answer list all queries of an image."""
        return self.task == "joint question" and mode == "teacher_forced"

    def scores_each(self, protocol: str) -> bool:
        """Whether each mask of an answer is scored, not one mask that all of them give."""
        return self.task == "instances" or (self.task == "union" and protocol == "published")

    def formulas(self, protocol: str) -> dict[str, str]:
        """Reported name -> formula under a protocol."""
        return {**self.metrics, **(self.published if protocol == "published" else {})}

    def protocol(self, requested: str | None = None, mode: str = "teacher_forced") -> str:
        """The protocol to score by: ``requested`` if the mode supports it, else the mode's default (or empty).

        Raises:
            ValueError: for a protocol that no benchmark has.
        """
        if requested and requested not in PROTOCOLS:
            raise ValueError(f"unknown protocol {requested!r}; use {' or '.join(PROTOCOLS)}")
        supported = self.protocols.get(mode, ("",))
        return requested if requested and requested in supported else supported[0]


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
        protocols=STRICT_OR_PUBLISHED,
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
        metrics=REJECTION | PRECISIONS,
        task="joint question",
        rejects=True,
        # A generated rejection has no [SEG], hence no mask that gsva could score.
        protocols={
            "teacher_forced": ("gsva", "grefcoco", "published", "rela"),
            "generate": ("grefcoco", "rela"),
        },
        splits=dict(zip(_UNC, ("Validation Set", "Test Set A", "Test Set B"))),
        table=GREFCOCO,
    ),
    Benchmark(
        "MultiReasonSeg",
        mode="generate",
        task="instances",
        protocols=STRICT_OR_PUBLISHED,
        published={"gIoU": "gIoU of images"},
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
        task="joint question",
        rejects=True,
        splits={"test": ""},
    ),
    *(
        Benchmark(
            f"R-refcoco{which}",
            metrics=FALSE_PREMISES | ROBUST,
            mode="generate",
            rejects=True,
            splits=dict.fromkeys(splits, ""),
        )
        for which, splits in (("", _UNC), ("+", _UNC), ("g", _UMD))
    ),
    Benchmark("ReasonSeg-R", splits={"test": ""}),
    Benchmark("ReasonSeg-X", splits={"val": "", "test": ""}),
    Benchmark("refcoco-m", splits={"val": ""}),
    Benchmark("GSEval", mode="generate", splits={"test": ""}),
    Benchmark(
        "MMR",
        mode="generate",
        task="union",
        protocols=STRICT_OR_PUBLISHED,
        splits=dict.fromkeys(("val", "test_obj_only", "test_part_only", "test_mixed"), ""),
    ),
    Benchmark(
        "HalluSegBench",
        metrics=HALLUCINATION | ACCURACIES,
        mode="generate",
        rejects=True,
        splits=dict.fromkeys(("refer_seg", "reason_seg_val", "reason_seg_test"), ""),
    ),
    Benchmark("custom", metrics=REJECTION, mode="generate", rejects=True),  # users' own data, queried as in chat
)

BENCHMARKS = {row.name: row for row in _ROWS}
PROTOCOLS = tuple(sorted({name for row in _ROWS for names in row.protocols.values() for name in names}))


def benchmark_of(spec: Spec) -> Benchmark:
    """The benchmark of a data set; the default one for a data set without a row."""
    return BENCHMARKS.get(spec.name) or Benchmark(spec.name)


def _suite(in_table: bool) -> tuple[Spec, ...]:
    rows = (row for row in _ROWS if (row.table is not None) == in_table)
    return tuple(row.spec(split) for row in rows for split in row.splits if split not in row.parts)


SUITES = {"paper": _suite(True), "all": _suite(True) + _suite(False)}  # the splits of the paper's tables; all splits
