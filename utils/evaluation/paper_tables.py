"""The paper's tables of results, with its column names, filled with the benchmarks that were evaluated."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.datasets.spec import Spec
from utils.evaluation.benchmarks import BENCHMARKS, TABLES, PaperTable
from utils.evaluation.results import Summary
from utils.plotting import text_tables
from utils.wording import counted


def columns(table: PaperTable) -> list[tuple[str, Spec, str]]:
    """(heading, benchmark with its split, metric) of each column."""
    return [
        (f"{heading} {metric}" if len(table.metrics) > 1 else heading, row.spec(split), metric)
        for row in BENCHMARKS.values()
        if row.table == table
        for split, heading in row.splits.items()
        for metric in table.metrics
    ]


# Splits that are groups of another split: spec -> (spec of the whole, key, group) of its breakdown.
PARTS = {
    row.spec(split): (row.spec(part.whole), part.key, part.group)
    for row in BENCHMARKS.values()
    for split, part in row.parts.items()
}


@dataclass
class Table:
    """One of the paper's tables with our numbers: a head, and one row per evaluation setup (mode, protocol, layer)."""

    paper: PaperTable
    rows: list[list[str]]

    @property
    def title(self) -> str:
        return f"Table {self.paper.number}: {self.paper.title} (percent)"

    def markdown(self) -> str:
        """The table as the paper has it: a row per setup."""
        return f"**{self.title}**\n\n{text_tables.markdown(self.rows)}"

    def text(self) -> str:
        """The table for a terminal: a line per column of the paper, a column per setup; no method."""
        (_, _, *headings), *setups = self.rows
        head = ["", *(setup for _, setup, *_ in setups)]
        cells = zip(headings, *(values for _, _, *values in setups), strict=True)
        return "\n".join([self.title, *text_tables.aligned([head, *map(list, cells)], "lr")])


def fill(method: str, summaries: Sequence[Summary]) -> list[Table]:
    """The tables that have any number; a dash where something was not evaluated.

    Args:
        method: name of the model, in the first column.
        summaries: of ``utils.evaluation.evaluate``; those of the same setup share a row.
    """
    tables = []
    for paper in TABLES:
        headed_columns = columns(paper)
        relevant = [each for each in summaries if any(_scores(each, spec) for _, spec, _ in headed_columns)]
        rows = [["Method", "asked", *(heading for heading, _, _ in headed_columns)]]
        for setup in dict.fromkeys(map(setup_of, relevant)):
            matching = [summary for summary in relevant if setup_of(summary) == setup]
            cells = [_cell(matching, spec, metric, paper.digits) for _, spec, metric in headed_columns]
            if any(cell != "-" for cell in cells):
                rows.append([method, setup, *cells])
        if len(rows) > 1:
            tables.append(Table(paper, rows))
    return tables


def setup_of(summary: Summary) -> str:
    """``teacher_forced, gsva, layer argmax``, and the limit if only a part of the split was evaluated."""
    limit = [f"first {counted(summary.limit, 'image')}"] if summary.limit else []
    return ", ".join([summary.mode_label, f"layer {summary.layer_policy}", *limit])


def _scores(summary: Summary, spec: Spec) -> dict[str, float]:
    """The metrics of ``spec`` in a summary of it, or of the split that it is a part of; empty in any other."""
    if summary.spec == spec:
        return summary.metrics
    whole, key, group = PARTS.get(spec, (None, "", ""))
    return summary.breakdown.get(key, {}).get(group, {}) if summary.spec == whole else {}


def _cell(summaries: Sequence[Summary], spec: Spec, metric: str, digits: int) -> str:
    for summary in summaries:
        scores = _scores(summary, spec)
        if metric in scores:
            return f"{100 * scores[metric]:.{digits}f}{summary.missing_note}"
    return "-"


def write(folder: Path, tables: Iterable[Table], notes: Sequence[str] = ()) -> list[Path]:
    """Writes ``tables.md`` with all tables and notes, and a ``table_N.csv`` each; returns the paths."""
    tables = list(tables)
    path = folder / "tables.md"
    path.write_text("\n\n".join([*(table.markdown() for table in tables), *notes]) + "\n", encoding="utf-8")
    paths = [path]
    for table in tables:
        paths.append(folder / f"table_{table.paper.number}.csv")
        with paths[-1].open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(table.rows)
    return paths
