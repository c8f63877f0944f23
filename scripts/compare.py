"""Compares evaluations side by side: a row per benchmark and metric, a column per model.

    python scripts/compare.py before=runs/tiny/untrained-eval after=runs/tiny/eval

Each folder holds what test.py wrote (``BENCHMARK.MODE.json``). Controls (shuffled prompts, query-agnostic baselines)
are those of the last folder. Two files of answers are compared sample by sample:

    python scripts/compare.py A.jsonl B.jsonl --dataset_dir data/demo --sheet changed.png

prints the difference of every metric with its paired 95% interval (bootstrap over images, the same resamples for
both), and the samples that changed most. All of it for any number of folders, with groups, published figures and the
answers that differ most, is a page to open in a browser:

    python scripts/compare.py A=runs/a/eval B=runs/b/eval --html page.html --dataset_dir data/demo
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.command_line.parser import Parser
from utils.datasets import get_eval_dataset
from utils.datasets.base import EvalDataset, MissingDataError
from utils.datasets.masks import decode_mask
from utils.demo.files import SUMMARY
from utils.evaluation import metrics
from utils.evaluation.benchmarks import benchmark_of
from utils.evaluation.controls import HEADINGS
from utils.evaluation.metrics import Record
from utils.evaluation.result_text import notes
from utils.evaluation.results import Summary, check_has_logits, read_results
from utils.files import write_atomically
from utils.inference import cli
from utils.plotting import text_tables
from utils.plotting.overlays import Panel, save_picture, sheet
from utils.wording import counted


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("results", nargs="+", type=named_path, metavar="NAME=PATH", help="folders, or two JSONL files")
    parser.add_argument(
        "--most", type=int, default=10, metavar="N", help="number of samples that changed most (default: 10)"
    )
    parser.add_argument(
        "--sheet", type=Path, metavar="PNG", help="write a picture of these samples; needs --dataset_dir"
    )
    parser.add_argument("--dataset_dir", metavar="DIR", help="the data that were evaluated")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page about folders, one file without a server"
    )
    parser.add_argument(
        "--samples",
        type=cli.whole(0),
        default=60,
        metavar="N",
        help="--html: answers shown per benchmark (default: 60)",
    )
    args = parser.parse_args(argv)
    args.results = with_names(args.results)
    files = [path for _, path in args.results if path.suffix == ".jsonl"]
    if files and (len(files) != 2 or len(args.results) != 2):
        raise ValueError("give two JSONL files to compare them sample by sample, or folders")
    if args.sheet and not (files and args.dataset_dir):
        raise ValueError("--sheet shows the samples of two JSONL files; it needs these and --dataset_dir")
    if args.html:
        if files:
            raise ValueError("--html compares folders; give those that hold the JSONL files")
        print(write_page(args.results, args.html, args.samples, args.dataset_dir))
    elif files:
        print(paired(args.results, args.most, args.sheet, args.dataset_dir))
    else:
        print(side_by_side({name: read_summaries(folder) for name, folder in args.results}))
    return 0


def write_page(results: Sequence[tuple[str, Path]], path: Path, samples: int, dataset_dir: str | None) -> str:
    """Writes the page about all folders; returns what to print."""
    from utils.evaluation import comparison

    models = {name: comparison.read_folder(name, folder) for name, folder in results}

    def open_dataset(spec: str) -> EvalDataset | None:
        try:
            return get_eval_dataset(spec, dataset_dir, allow_missing=True) if dataset_dir else None
        except MissingDataError as error:
            print(f"without images: {error}", file=sys.stderr)
            return None

    real = dataset_dir is not None and not (Path(dataset_dir) / SUMMARY).is_file()  # published figures are of no others
    sections = comparison.compare(models, samples, open_dataset, quote=real)
    about = "; ".join(
        f"{name}: {', '.join(sorted({each.provenance.checkpoint or 'weights unknown' for each in answers.values()}))}"
        for name, answers in models.items()
    )
    write_atomically(path, comparison.page(" and ".join(models), about, list(models), sections))
    images = "" if dataset_dir else "; --dataset_dir adds images and targets"
    return f"wrote {path}: {counted(len(sections), 'benchmark')}, {path.stat().st_size / 1e6:.1f} MB{images}"


def named_path(text: str) -> tuple[str, Path]:
    """A name, empty if none is given, and a path."""
    name, equals, path = text.partition("=")
    return (name, Path(path)) if equals else ("", Path(text))


def with_names(results: Sequence[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """Each path with the name that was given, or with the part of the path that tells the unnamed ones apart.

    ``a/eval/x.jsonl`` and ``b/eval/x.jsonl`` are ``a`` and ``b``.

    Raises:
        ValueError: if different paths have one name.
    """
    unnamed = list(dict.fromkeys(path for name, path in results if not name))
    names = {path: path.name for path in unnamed}
    ends = [path.parts for path in unnamed]
    while len(ends) > 1 and len({parts[-1:] for parts in ends}) == 1:
        ends = [parts[:-1] for parts in ends]
    for length in range(1, max(map(len, ends), default=0) + 1):
        tails = [str(Path(*parts[-length:])) for parts in ends]
        if len(set(tails)) == len(ends) > 1:
            names = dict(zip(unnamed, tails))
            break
    named = [(name or names[path], path) for name, path in results]
    if twice := [name for name, count in Counter(name for name, _ in dict.fromkeys(named)).items() if count > 1]:
        raise ValueError(f"two results are named {twice[0]!r}; name each: before=PATH after=PATH")
    return named


def read_summaries(folder: Path) -> dict[tuple[str, str], Summary]:
    """(benchmark, mode) -> summary.

    Raises:
        ValueError: if the folder holds no results, or other JSON beside them.
    """
    summaries = [Summary.load(path) for path in sorted(folder.glob("*.json"))]
    if not summaries:
        raise ValueError(f"{folder} holds no results of test.py (BENCHMARK.MODE.json)")
    return {(summary.benchmark, summary.mode): summary for summary in summaries}


def side_by_side(columns: dict[str, dict[tuple[str, str], Summary]]) -> str:
    """Results as an aligned table; a dash for what a folder lacks."""
    last = list(columns.values())[-1]
    keys = list(dict.fromkeys(key for summaries in columns.values() for key in summaries))
    controls = [name for name in HEADINGS if any(name in summary.controls for summary in last.values())]
    rows = [["benchmark", "masks", "metric", *columns, *(HEADINGS[name] for name in controls)]]
    for key in keys:
        summaries = [column[key] for column in columns.values() if key in column]
        counts = {summary.counts["masks"] for summary in summaries}
        masks = "/".join(map(str, sorted(counts)))  # more than one: evaluated on different samples
        protocols = dict.fromkeys(summary.protocol for summary in summaries if summary.protocol)
        setup = ", ".join([key[1], *protocols])
        for metric in summaries[0].metrics:
            cells = [_score_cell(column.get(key), metric) for column in columns.values()]
            cells += [_score_cell(last.get(key), metric, control) for control in controls]
            rows.append([f"{key[0]} ({setup})", masks, metric, *cells])
    layers = {
        name: "/".join(dict.fromkeys(summary.layer_policy for summary in column.values()))
        for name, column in columns.items()
    }
    layers_used = "; ".join(f"{name}: {rules}" for name, rules in layers.items())
    return f"{ruled_table(rows, 'lrlr')}\nMetrics are fractions, 0 to 1. Layers: {layers_used}"


def _score_cell(summary: Summary | None, metric: str, control: str = "") -> str:
    """``0.653 (3 missing) (first 8 images)``; a dash without a score."""
    scores = (summary.controls.get(control, {}) if control else summary.metrics) if summary else {}
    if summary is None or metric not in scores:
        return "-"
    limit = f" (first {counted(summary.limit, 'image')})" if summary.limit else ""
    return f"{scores[metric]:.3f}{summary.missing_note}{limit}"


def ruled_table(rows: list[list[str]], alignment: str) -> str:
    head, *lines = text_tables.aligned(rows, alignment)
    return "\n".join([head, "-" * len(head), *lines])


# -- sample by sample --------------------------------------------------------------------------------------------------


def paired(
    named_paths: Sequence[tuple[str, Path]], count: int, sheet_path: Path | None, dataset_dir: str | None
) -> str:
    """Metrics of two files of answers, their differences, and the samples that changed most.

    Raises:
        ValueError: if the benchmark, the queries or the mode differ.
    """
    (before_name, before_path), (after_name, after_path) = named_paths
    (before_run, before), (after_run, after) = read_results(before_path), read_results(after_path)
    if before_run.benchmark != after_run.benchmark:
        raise ValueError(
            f"{before_path} is of {before_run.benchmark}, {after_path} of {after_run.benchmark}; compare one split"
        )
    if before_run.mode != after_run.mode:
        raise ValueError(
            f"{before_path} is in mode {before_run.mode}, {after_path} in mode {after_run.mode}; compare one mode"
        )
    benchmark = benchmark_of(after_run.spec)
    check_has_logits(before_run, benchmark.protocol(after_run.protocol, after_run.mode))
    protocols = [benchmark.protocol(each.protocol, each.mode) for each in (before_run, after_run)]
    protocol, several_seg = protocols[1], after_run.several_seg
    before, after = (metrics.select(records, protocol, several_seg) for records in (before, after))
    gains = metrics.difference(before, after, benchmark, protocol)
    old, new = (metrics.compute(records, benchmark, protocol) for records in (before, after))
    rows = [["metric", before_name, after_name, "difference", "95% interval"]]
    for name, (gain, (low, high)) in gains.items():
        rows.append([name, f"{old[name]:.4f}", f"{new[name]:.4f}", f"{gain:+.4f}", f"[{low:+.4f}, {high:+.4f}]"])
    changed = most_changed(before, after, protocol, count)
    samples = [["image", before_name, after_name, "query"]]
    for before_record, after_record in changed:
        scores = [f"{metrics.iou(record, protocol):.3f}" for record in (before_record, after_record)]
        samples.append([after_record.image, *scores, after_record.query[:80]])
    counts = metrics.count_records(after, protocol)
    setup = ", ".join(filter(None, [after_run.benchmark, after_run.mode, protocol]))
    lines = [f"{setup}: {counted(counts['masks'], 'mask')} on {counted(counts['images'], 'image')}"]
    for name, each in ((before_name, before_run), (after_name, after_run)):
        lines.append(f"{name}: layer {each.layer_policy}, {each.precision}")
    if protocols[0] != protocol:
        lines.append(
            f"{before_name} was evaluated by {protocols[0]}, {after_name} by {protocol}; both are scored by {protocol}"
        )
    lines += ["", ruled_table(rows, "lr"), ""]
    lines.append(ruled_table(samples, "lrrl") if changed else "no sample changed")
    if sheet_path and dataset_dir and changed:
        dataset = get_eval_dataset(after_run.spec, dataset_dir, allow_missing=True)
        title = f"{setup}: the samples that changed most from {before_name} to {after_name}"
        names = (before_name, after_name)
        panels = [panel for pair in changed for panel in pair_panels(dataset, pair, names, protocol)]
        save_picture(sheet_path, sheet(panels, title))
        lines += ["", f"wrote {sheet_path}"]
    return "\n".join(lines)


def most_changed(
    before: Sequence[Record], after: Sequence[Record], protocol: str, count: int
) -> list[tuple[Record, Record]]:
    """At most ``count`` pairs of answers whose IoU differs, the largest change first."""
    before_by_query = {(record.index, record.query_id): record for record in before}
    pairs = [(before_by_query[record.index, record.query_id], record) for record in after]
    changes = [
        abs(metrics.iou(after_record, protocol) - metrics.iou(before_record, protocol))
        for before_record, after_record in pairs
    ]
    ranked = sorted(range(len(pairs)), key=lambda k: (-changes[k], pairs[k][1].index, pairs[k][1].query_id))
    return [pairs[k] for k in ranked[:count] if changes[k] > 0]


def pair_panels(
    dataset: EvalDataset, pair: tuple[Record, Record], names: tuple[str, str], protocol: str
) -> list[Panel]:
    """One panel for each of the two answers."""
    sample = dataset[pair[0].index]
    query = next((query for query in sample.queries if query.query_id == pair[0].query_id), None)
    if query is None or query.text != pair[0].query:
        raise ValueError(f"--dataset_dir: {sample.source} has no query {pair[0].query!r}; give the data of the results")
    truth = metrics.merge_targets(query.masks, *sample.image.shape[:2])
    no_masks = np.zeros((0, *sample.image.shape[:2]), bool)
    return [
        Panel(
            image=sample.image,
            query=query.text,
            masks=np.stack([decode_mask(mask) for mask in record.masks]) if record.masks else no_masks,
            truth=truth,
            answer=record.answer,
            notes=[name, *notes(record, protocol)],
        )
        for name, record in zip(names, pair, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(cli.run(main))
