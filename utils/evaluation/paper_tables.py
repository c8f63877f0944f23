"""The paper's tables of results, with its column names, filled with whatever has been evaluated."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.plotting import text_tables


@dataclass(frozen=True)
class Layout:
    """One of the paper's tables.

    Attributes:
        number, title: as in the paper.
        digits: after the point, in percent.
        columns: (heading, benchmark, metric).
    """

    number: int
    title: str
    digits: int
    columns: tuple[tuple[str, str, str], ...]


def _columns(
    names: dict[str, str], metrics: Sequence[str], name_metric: bool = True
) -> tuple[tuple[str, str, str], ...]:
    """A column per benchmark and metric; ``names`` maps headings to benchmarks."""
    return tuple(
        (f"{heading} {metric}" if name_metric else heading, spec, metric)
        for heading, spec in names.items()
        for metric in metrics
    )


_REFCOCO = {
    f"refCOCO{plus} {split}": f"refcoco{plus}|unc|{split}" for plus in ("", "+") for split in ("val", "testA", "testB")
}
_REFCOCO |= {f"refCOCOg {split}(U)": f"refcocog|umd|{split}" for split in ("val", "test")}

LAYOUTS = (
    Layout(
        3,
        "ReasonSeg",
        1,
        _columns(
            {
                "val overall": "ReasonSeg|val",
                "test short query": "ReasonSeg|test_short",
                "test long query": "ReasonSeg|test_long",
                "test overall": "ReasonSeg|test",
            },
            ("gIoU", "cIoU"),
        ),
    ),
    Layout(4, "RefCOCO(+/g), cIoU", 1, _columns(_REFCOCO, ("cIoU",), name_metric=False)),
    Layout(
        5,
        "gRefCOCO",
        2,
        _columns(
            {
                "Validation Set": "grefcoco|unc|val",
                "Test Set A": "grefcoco|unc|testA",
                "Test Set B": "grefcoco|unc|testB",
            },
            ("gIoU", "cIoU", "N-acc"),
        ),
    ),
    Layout(
        12,
        "MUSE",
        1,
        _columns(
            {
                "Val overall": "MultiReasonSeg|val",
                "Test few targets": "MultiReasonSeg|test_few",
                "Test many targets": "MultiReasonSeg|test_many",
                "Test overall": "MultiReasonSeg|test",
            },
            ("gIoU", "cIoU"),
        ),
    ),
    Layout(
        13,
        "FP-RefCOCO(+/g), val",
        2,
        _columns({f"FP-RefCOCO{k}": f"fprefcoco{k}|berkeley|val" for k in ("", "+", "g")}, ("See", "Segment")),
    ),
)

# Parts of a split that its own evaluation breaks down: (split, key, group).
PARTS = {
    "ReasonSeg|test_short": ("ReasonSeg|test", "length", "short"),
    "ReasonSeg|test_long": ("ReasonSeg|test", "length", "long"),
    "MultiReasonSeg|test_few": ("MultiReasonSeg|test", "part", "few"),
    "MultiReasonSeg|test_many": ("MultiReasonSeg|test", "part", "many"),
}

_PAPER = tuple(dict.fromkeys(spec for layout in LAYOUTS for _, spec, _ in layout.columns if spec not in PARTS))
_IN_NO_TABLE = (
    "refzom|test",
    *(f"R-refcoco{plus}|unc|{split}" for plus in ("", "+") for split in ("val", "testA", "testB")),
    *(f"R-refcocog|umd|{split}" for split in ("val", "test")),
)
SUITES = {"paper": _PAPER, "all": _PAPER + _IN_NO_TABLE}


@dataclass
class Table:
    """A layout with its numbers: the heading and a row per way of asking."""

    layout: Layout
    rows: list[list[str]]

    def markdown(self) -> str:
        title = f"Table {self.layout.number}: {self.layout.title} (percent)"
        return f"**{title}**\n\n{text_tables.markdown(self.rows)}"


def fill(method: str, summaries: Sequence[dict[str, Any]]) -> list[Table]:
    """The tables in which there is a number; a dash where something was not evaluated.

    Args:
        method: what the rows are called, the model's name.
        summaries: of ``utils.evaluation.evaluate``; those asked in the same way share a row.
    """
    tables = []
    for layout in LAYOUTS:
        mine = [
            s
            for s in summaries
            if s["benchmark"] in {spec for _, column, _ in layout.columns for spec in _sources(column)}
        ]
        rows = [["Method", "asked", *(heading for heading, _, _ in layout.columns)]]
        for asked in dict.fromkeys(map(how_asked, mine)):
            row = [s for s in mine if how_asked(s) == asked]
            cells = [_cell(row, spec, metric, layout.digits) for _, spec, metric in layout.columns]
            if any(cell != "-" for cell in cells):
                rows.append([method, asked, *cells])
        if len(rows) > 1:
            tables.append(Table(layout, rows))
    return tables


def how_asked(summary: dict[str, Any]) -> str:
    """``teacher_forced, gsva, layer argmax``; and what part of the split it is if not all."""
    limit = [f"first {summary['limit']} images"] if summary.get("limit") else []
    protocol = [summary["protocol"]] if summary.get("protocol") else []
    return ", ".join([summary["mode"], *protocol, f"layer {summary['layer_policy']}", *limit])


def _sources(spec: str) -> tuple[str, ...]:
    return (spec, PARTS[spec][0]) if spec in PARTS else (spec,)


def _cell(summaries: Sequence[dict[str, Any]], spec: str, metric: str, digits: int) -> str:
    for summary in summaries:
        scores = summary["metrics"]
        if summary["benchmark"] != spec:
            whole, key, group = PARTS.get(spec, ("", "", ""))
            scores = summary["breakdown"].get(key, {}).get(group, {}) if summary["benchmark"] == whole else {}
        if metric in scores:
            return f"{100 * scores[metric]:.{digits}f}{missing_note(summary)}"
    return "-"


def missing_note(summary: dict[str, Any]) -> str:
    """What stands beside every number of an evaluation that lacks something."""
    missing = summary["counts"].get("missing", 0)
    return f" ({missing} missing)" if missing else ""


def write(folder: Path, tables: Iterable[Table], notes: Sequence[str] = ()) -> list[Path]:
    """``tables.md`` with all of them and the notes, and ``table_N.csv`` for each -> their paths."""
    tables = list(tables)
    path = folder / "tables.md"
    path.write_text("\n\n".join([*(table.markdown() for table in tables), *notes]) + "\n", encoding="utf-8")
    paths = [path]
    for table in tables:
        paths.append(folder / f"table_{table.layout.number}.csv")
        with paths[-1].open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(table.rows)
    return paths
