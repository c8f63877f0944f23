"""Puts evaluations side by side: a row per benchmark and metric, a column per model.

    python scripts/compare.py before=runs/tiny/untrained/eval after=runs/tiny/eval

Each folder holds what test.py wrote (``BENCHMARK.MODE.json``). Controls (shuffled prompts, answers that ignore the
text) are shown as the last folder has them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import cli

CONTROLS = {
    "shuffled_prompts": "prompts shuffled",
    "text_blind_all_objects": "all objects",
    "text_blind_random_object": "random object",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=named_folder, metavar="NAME=DIR", help="a column and its folder")
    columns = dict(parser.parse_args(argv).results)
    print(table({name: read_summaries(folder) for name, folder in columns.items()}))
    return 0


def named_folder(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    return (name, Path(folder)) if equals else (Path(text).name, Path(text))


def read_summaries(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(benchmark, mode) -> what test.py wrote.

    Raises:
        ValueError: if the folder holds no results.
    """
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise ValueError(f"{folder} holds no results of test.py (BENCHMARK.MODE.json)")
    return {(summary["benchmark"], summary["mode"]): summary for summary in found}


def table(columns: dict[str, dict[tuple[str, str], dict[str, Any]]]) -> str:
    """The results as aligned text; what a folder lacks is a dash."""
    last = list(columns.values())[-1]
    keys = list(dict.fromkeys(key for summaries in columns.values() for key in summaries))
    controls = [name for name in CONTROLS if any(name in summary["controls"] for summary in last.values())]
    rows = [["benchmark", "masks", "metric", *columns, *(CONTROLS[name] for name in controls)]]
    for key in keys:
        summaries = [found[key] for found in columns.values() if key in found]
        counts = {summary["counts"]["masks"] for summary in summaries}
        masks = "/".join(map(str, sorted(counts)))  # more than one: evaluated on different samples
        for metric in summaries[0]["metrics"]:
            values = [found.get(key, {}).get("metrics", {}).get(metric) for found in columns.values()]
            values += [last.get(key, {}).get("controls", {}).get(name, {}).get(metric) for name in controls]
            cells = ["-" if value is None else f"{value:.3f}" for value in values]
            rows.append([f"{key[0]} ({key[1]})", masks, metric, *cells])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(aligned(cell, width, n) for n, (cell, width) in enumerate(zip(row, widths))) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column in (0, 2) else cell.rjust(width)  # names left, numbers right


if __name__ == "__main__":
    sys.exit(cli.run(main))
