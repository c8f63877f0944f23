"""The paper's tables of results, with its column names, filled with whatever has been evaluated."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.datasets.spec import Spec
from utils.evaluation.benchmarks import BENCHMARKS, TABLES, PaperTable
from utils.evaluation.results import Summary
from utils.plotting import text_tables


def columns(table: PaperTable) -> list[tuple[str, Spec, str]]:
    """(heading, benchmark with its split, metric) of each."""
    return [
        (f"{heading} {metric}" if len(table.metrics) > 1 else heading, row.spec(split), metric)
        for row in BENCHMARKS.values()
        if row.table == table
        for split, heading in row.splits.items()
        for metric in table.metrics
    ]


# Parts of a split that its own evaluation breaks down: benchmark with its split -> (whole, key, group).
PARTS = {
    row.spec(split): (row.spec(part.whole), part.key, part.group)
    for row in BENCHMARKS.values()
    for split, part in row.parts.items()
}


@dataclass
class Table:
    """One of the paper's tables with our numbers: the heading and a row per way of asking."""

    paper: PaperTable
    rows: list[list[str]]

    def markdown(self) -> str:
        title = f"Table {self.paper.number}: {self.paper.title} (percent)"
        return f"**{title}**\n\n{text_tables.markdown(self.rows)}"


def fill(method: str, summaries: Sequence[Summary]) -> list[Table]:
    """The tables in which there is a number; a dash where something was not evaluated.

    Args:
        method: what the rows are called, the model's name.
        summaries: of ``utils.evaluation.engine``; those asked in the same way share a row.
    """
    tables = []
    for paper in TABLES:
        wanted = columns(paper)
        sources = {source for _, spec, _ in wanted for source in _sources(spec)}
        found = [summary for summary in summaries if summary.spec in sources]
        rows = [["Method", "asked", *(heading for heading, _, _ in wanted)]]
        for asked in dict.fromkeys(map(how_asked, found)):
            same = [summary for summary in found if how_asked(summary) == asked]
            cells = [_cell(same, spec, metric, paper.digits) for _, spec, metric in wanted]
            if any(cell != "-" for cell in cells):
                rows.append([method, asked, *cells])
        if len(rows) > 1:
            tables.append(Table(paper, rows))
    return tables


def how_asked(summary: Summary) -> str:
    """``teacher_forced, gsva, layer argmax``; and what part of the split it is if not all."""
    limit = [f"first {summary.limit} images"] if summary.limit else []
    return ", ".join([summary.asked, f"layer {summary.layer_policy}", *limit])


def _sources(spec: Spec) -> tuple[Spec, ...]:
    return (spec, PARTS[spec][0]) if spec in PARTS else (spec,)


def _cell(summaries: Sequence[Summary], spec: Spec, metric: str, digits: int) -> str:
    for summary in summaries:
        scores = summary.metrics
        if summary.spec != spec:
            whole, key, group = PARTS.get(spec, (None, "", ""))
            scores = summary.breakdown.get(key, {}).get(group, {}) if summary.spec == whole else {}
        if metric in scores:
            return f"{100 * scores[metric]:.{digits}f}{missing_note(summary)}"
    return "-"


def missing_note(summary: Summary) -> str:
    """What stands beside every number of an evaluation that lacks something."""
    missing = summary.counts.get("missing", 0)
    return f" ({missing} missing)" if missing else ""


def write(folder: Path, tables: Iterable[Table], notes: Sequence[str] = ()) -> list[Path]:
    """``tables.md`` with all of them and the notes, and ``table_N.csv`` for each -> their paths."""
    tables = list(tables)
    path = folder / "tables.md"
    path.write_text("\n\n".join([*(table.markdown() for table in tables), *notes]) + "\n", encoding="utf-8")
    paths = [path]
    for table in tables:
        paths.append(folder / f"table_{table.paper.number}.csv")
        with paths[-1].open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(table.rows)
    return paths
