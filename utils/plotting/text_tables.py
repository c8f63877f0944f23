"""Tables as aligned text, Markdown and HTML, from rows of text; the first row is the head.

``sides`` aligns the columns, one letter each: ``l`` left, ``r`` right. The last letter holds for all further columns:
``lr`` is a column of names followed by any number of columns of figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from statistics import mean, stdev
from typing import Any

Rows = Sequence[Sequence[str]]


def from_mappings(rows: Sequence[Mapping[str, Any]], cell: Callable[[str, Any], str]) -> list[list[str]]:
    """A head, and one row of ``cell(column, value or None)`` per mapping; columns in order of first appearance.

    Without mappings, the head is empty.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [columns, *([cell(column, row.get(column)) for column in columns] for row in rows)]


def aligned(rows: Rows, sides: str) -> list[str]:
    """The lines of a table in plain text, columns two spaces apart."""
    return ["  ".join(row).rstrip() for row in _padded(rows, sides)]


def markdown(rows: Rows, sides: str = "") -> str:
    """A table in Markdown; vertical bars in cells are escaped.

    Args:
        sides: aligns the columns, also in the source; empty = compact source.
    """
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = "| " + " | ".join("---" for _ in rows[0]) + " |"
    if sides:
        cells = _padded(cells, sides)
        ends = ["-:"[_is_right(sides, column)] for column in range(len(rows[0]))]
        rule = "|" + "|".join("-" * (len(cell) + 1) + end for cell, end in zip(cells[0], ends)) + "|"
    head, *body = ("| " + " | ".join(row) + " |" for row in cells)
    return "\n".join([head, rule, *body])


def html(rows: Rows) -> str:
    """A table in HTML; cells are escaped."""
    head, *body = ([escape(cell) for cell in row] for row in rows)
    heads = "".join(f"<th>{cell}</th>" for cell in head)
    lines = ("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in body)
    return f"<table>\n<tr>{heads}</tr>\n{''.join(lines)}</table>"


def mean_cell(values: Sequence[float], digits: int) -> str:
    """``0.65 ± 0.02``: mean and, for several values, standard deviation."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def _padded(rows: Rows, sides: str) -> list[list[str]]:
    """Pads the cells of each column to the width of the widest one."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        [
            cell.rjust(width) if _is_right(sides, n) else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths))
        ]
        for row in rows
    ]


def _is_right(sides: str, column: int) -> bool:
    return sides[min(column, len(sides) - 1)] == "r"
