"""Results as text, without the model: the table that test.py prints, and the notes of an answer's panel."""

from __future__ import annotations

from collections.abc import Sequence

from utils.evaluation import metrics
from utils.evaluation.benchmarks import benchmark_of
from utils.evaluation.controls import CONTROLS, HEADINGS
from utils.evaluation.metrics import Record
from utils.evaluation.results import Summary
from utils.plotting import text_tables


def format_table(summaries: Sequence[Summary]) -> str:
    """Results as an aligned table: one line per benchmark and mode, its controls and groups indented below."""
    names = list(dict.fromkeys(name for summary in summaries for name in summary.metrics))
    rows = [["benchmark", "mode", "layers", "images", "masks", *names]]
    for summary in summaries:
        rows += _rows(summary, names)
    lines = text_tables.aligned(rows, "lllrrl")
    rule = "-" * max(map(len, lines))
    remarks = [f"{summary.benchmark}: {remark}" for summary in summaries for remark in _remarks(summary)]
    remarks = list(dict.fromkeys(remarks))  # the modes of a benchmark share most of them
    return "\n".join([lines[0], rule, *lines[1:], rule, *remarks, "[low, high]: 95% bootstrap interval over images"])


def _remarks(summary: Summary) -> list[str]:
    """What a reader must know to compare the numbers with published ones."""
    remarks, counts, benchmark = [], summary.counts, benchmark_of(summary.spec)
    if counts.get("skipped"):
        published = summary.protocol == "published" and "strict" in benchmark.protocols.get(summary.mode, ())
        remarks.append(
            f"{counts['skipped']} records skipped, " + ("scored as empty targets" if published else "left out")
        )
    if cut := counts.get("answers_cut"):
        remarks.append(f"{cut} answers ({summary.mode}) were cut off before their end; raise --max_new_tokens")
    if summary.annotations:
        remarks.append(f"read from {summary.annotations}")
    if benchmark.task != "instances" and (several := counts.get("answers_with_several_seg")):
        scored = {"union": "the union of their masks", "first": "the first mask"}[summary.several_seg]
        remarks.append(f"{several} answers ({summary.mode}) have several [SEG]; {scored} is scored")
    return remarks


def _rows(summary: Summary, names: Sequence[str]) -> list[list[str]]:
    """The line of a result, followed by those of its controls and groups."""
    counts, note = summary.counts, summary.missing_note
    images = "/".join(dict.fromkeys(str(counts[key]) for key in ("images", "split_images")))
    labels = [summary.benchmark, summary.mode_label, summary.layer_policy, images, str(counts["masks"])]
    rows = [[*labels, *_cells(summary.metrics, names, note, summary.intervals)]]
    for control, scores in summary.controls.items():
        kind = "control" if control in CONTROLS else "query-agnostic"
        rows.append([f"  {kind}: {HEADINGS[control]}", "", "", "", "", *_cells(scores, names, note)])
    for key, groups in summary.breakdown.items():
        for group, scores in groups.items():
            rows.append([f"  {key}: {group}", "", "", "", str(scores["masks"]), *_cells(scores, names, note)])
    return rows


def _cells(
    scores: dict[str, float], names: Sequence[str], note: str, bounds: dict[str, list[float]] | None = None
) -> list[str]:
    """``0.653 [0.601, 0.702] (3 missing)`` for each metric."""
    cells = []
    for name in names:
        interval = " [{:.3f}, {:.3f}]".format(*bounds[name]) if bounds and name in bounds else ""
        cells.append(f"{scores[name]:.3f}{interval}{note}" if name in scores else "-")
    return cells


def notes(record: Record, protocol: str = "") -> list[str]:
    """The notes of an answer's panel: IoU, layers, uncertainty, groups."""
    expected = ", nothing to find" if record.expected_empty else ""
    rejected = ", rejected" if record.rejected else ""
    layers = f"layer {', '.join(map(str, record.layers))}" if record.layers else "no [SEG]"
    uncertainty = [f"uncertainty {record.max_uncertainty:.2f}"] if record.uncertainty else []
    groups = [f"{key}: {record.meta[key]}" for key in metrics.GROUP_KEYS if key in record.meta]
    return [f"IoU {metrics.iou(record, protocol):.2f}{expected}{rejected}", layers, *uncertainty, *groups]
