"""Results as text, without the model: the table that test.py prints, and the notes of an answer's panel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from model.structures import MAX_SEGS
from utils.evaluation import metrics
from utils.evaluation.benchmarks import benchmark_of
from utils.evaluation.controls import HEADINGS
from utils.evaluation.metrics import Record
from utils.evaluation.results import Summary
from utils.plotting import text_tables
from utils.wording import counted


def format_table(summaries: Sequence[Summary]) -> str:
    """Results as aligned tables: one per mode, layer rule and set of metrics, so that each fits a terminal.

    A line per benchmark, its intervals, controls and groups indented below.
    """
    tables: dict[tuple[str, ...], list[Summary]] = {}
    for summary in summaries:
        tables.setdefault((f"{summary.mode_label}, layer {summary.layer_policy}", *summary.metrics), []).append(summary)
    remarks = [f"{summary.benchmark}: {remark}" for summary in summaries for remark in _remarks(summary)]
    remarks = list(dict.fromkeys(remarks))  # the modes of a benchmark share most of them
    remarks.append("Metrics are fractions, 0 to 1. Intervals are 95% bootstraps over images.")
    return "\n".join([*(_table(setup, names, group) for (setup, *names), group in tables.items()), *remarks])


def _table(setup: str, names: Sequence[str], summaries: Sequence[Summary]) -> str:
    """The results of one setup in the same metrics, under a heading."""
    rows = [["benchmark", "images", "masks", *names]]
    for summary in summaries:
        rows += _rows(summary, names)
    head, *lines = text_tables.aligned(rows, "lr")
    return "\n".join([setup, head, "-" * max(map(len, (head, *lines))), *lines, ""])


def _remarks(summary: Summary) -> list[str]:
    """What a reader must know to compare the numbers with published ones."""
    remarks, counts, benchmark = [], summary.counts, benchmark_of(summary.spec)
    if counts.get("skipped"):
        published = summary.protocol == "published" and "strict" in benchmark.protocols.get(summary.mode, ())
        remarks.append(
            f"{counted(counts['skipped'], 'record')} skipped, "
            + ("scored as empty targets" if published else "left out")
        )
    if cut := counts.get("answers_cut"):
        remarks.append(f"cut off at --max_new_tokens or {MAX_SEGS} [SEG]: {counted(cut, 'answer')} ({summary.mode})")
    if summary.annotations:
        remarks.append(f"read from {summary.annotations}")
    if not benchmark.scores_each(summary.protocol) and (several := counts.get("answers_with_several_seg")):
        scored = {"union": "the union of their masks", "first": "the first mask"}[summary.several_seg]
        remarks.append(f"several [SEG] in {counted(several, 'answer')} ({summary.mode}); {scored} is scored")
    return remarks


def _rows(summary: Summary, names: Sequence[str]) -> list[list[str]]:
    """The line of a result, followed by those of its intervals, controls and groups."""
    counts, note = summary.counts, summary.missing_note
    images = "/".join(dict.fromkeys(str(counts[key]) for key in ("images", "split_images")))
    rows = [[f"{summary.benchmark}{note}", images, str(counts["masks"]), *_cells(summary.metrics, names)]]
    for end, position in (("from", 0), ("to", 1)) if summary.intervals else ():
        bounds = {name: interval[position] for name, interval in summary.intervals.items()}
        rows.append([f"  95% interval{note}: {end}", "", "", *_cells(bounds, names)])
    for control, scores in summary.controls.items():
        rows.append([f"  {HEADINGS[control]}{note}", "", "", *_cells(scores, names)])
    for key, groups in summary.breakdown.items():
        for group, scores in groups.items():
            rows.append([f"  {key}{note}: {group}", "", str(scores["masks"]), *_cells(scores, names)])
    return rows


def _cells(scores: Mapping[str, float], names: Sequence[str]) -> list[str]:
    return [f"{scores[name]:.3f}" if name in scores else "-" for name in names]


def notes(record: Record, protocol: str = "") -> list[str]:
    """The notes of an answer's panel: IoU, layers, uncertainty, groups."""
    expected = ", nothing to find" if record.expected_empty else ""
    rejected = ", rejected" if record.rejected else ""
    layers = f"layer {', '.join(map(str, record.layers))}" if record.layers else "no [SEG]"
    uncertainty = [f"uncertainty {record.max_uncertainty:.2f}"] if record.uncertainty else []
    groups = [f"{key}: {record.meta[key]}" for key in metrics.GROUP_KEYS if key in record.meta]
    return [f"IoU {metrics.iou(record, protocol):.2f}{expected}{rejected}", layers, *uncertainty, *groups]
