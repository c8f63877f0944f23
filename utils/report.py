"""Results for people: the table that test.py prints, and pictures of samples from the worst to the best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from utils import metrics
from utils.datasets.base import EvalDataset
from utils.evaluate import Asking, ask
from utils.metrics import Record
from utils.visualize import Panel


def panels(
    model, processor, dataset: EvalDataset, records: Sequence[Record], count: int, asking: Asking
) -> list[tuple[Record, Panel]]:
    """Pictures of ``count`` samples evenly spaced from the worst to the best IoU, failures in their true share.

    The model is asked once more about these images: keeping every similarity map would take too much memory.
    """
    ranked = sorted(records, key=lambda record: (metrics.iou(record), record.index, record.query_id))
    places = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
    result = []
    for record in (ranked[place] for place in places):
        sample = dataset[record.index]
        answers = ask(model, processor, [sample], [record.index], dataset.benchmark, asking)[0]
        number = next(n for n, query in enumerate(sample.queries) if query.query_id == record.query_id)
        answer, query = answers[number], sample.queries[number]
        result.append(
            (
                record,
                Panel(
                    image=sample.image,
                    query=query.text,
                    masks=answer.masks,
                    similarities=answer.similarities,
                    truth=metrics.merge_targets(query.masks, *sample.image.shape[:2]),
                    answer=answer.text,
                    notes=_notes(record),
                ),
            )
        )
    return result


def _notes(record: Record) -> list[str]:
    expected = ", nothing to find" if record.expected_empty else ""
    rejected = ", rejected" if record.rejected else ""
    layers = f"layer {', '.join(map(str, record.layers))}" if record.layers else "no [SEG]"
    groups = [f"{key}: {record.meta[key]}" for key in metrics.GROUP_KEYS if key in record.meta]
    return [f"IoU {metrics.iou(record):.2f}{expected}{rejected}", layers, *groups]


def format_table(summaries: Sequence[dict[str, Any]]) -> str:
    """Results as an aligned table: a line per benchmark and mode, its controls and groups indented below."""
    names = list(dict.fromkeys(name for summary in summaries for name in summary["metrics"]))
    rows = [["benchmark", "mode", "layers", "images", "masks", *names]]
    for summary in summaries:
        counts, bounds = summary["counts"], summary["intervals"]
        asked = [summary["benchmark"], summary["mode"], summary["layer_policy"], counts["images"], counts["masks"]]
        rows.append([*map(str, asked), *_cells(summary["metrics"], names, bounds)])
        for control, scores in summary["controls"].items():
            rows.append([f"  control: {control.replace('_', ' ')}", "", "", "", "", *_cells(scores, names)])
        for key, groups in summary["breakdown"].items():
            for group, scores in groups.items():
                rows.append([f"  {key}: {group}", "", "", "", str(scores["masks"]), *_cells(scores, names)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if 3 <= n <= 4 else cell.ljust(width) for n, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    rule = "-" * max(map(len, lines))
    skipped = [
        f"{s['benchmark']}: {s['counts']['skipped']} images skipped" for s in summaries if s["counts"]["skipped"]
    ]
    return "\n".join([lines[0], rule, *lines[1:], rule, *skipped, "[low, high]: 95% bootstrap interval over images"])


def _cells(scores: dict[str, float], names: Sequence[str], bounds: dict[str, list[float]] | None = None) -> list[str]:
    cells = []
    for name in names:
        text = f"{scores[name]:.3f}" if name in scores else "-"
        if bounds and name in bounds:
            text += " [{:.3f}, {:.3f}]".format(*bounds[name])
        cells.append(text)
    return cells
