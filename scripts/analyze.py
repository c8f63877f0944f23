r"""Plots and tabulates what each layer of a trained model does: the paper's Fig. 2 and 4 to 6, and Table 2.

    python scripts/analyze.py --version runs/tiny/merged --dataset_dir data/demo \
        --val_dataset 'ReasonSeg|val' --output out

Writes pictures (PNG), tables (CSV) and an index.md with a caption for each: similarity maps of all layers, cIoU with
each layer forced and the loss of its maps, M_prompt, M_IoU and <SEG>_prompt, the policy's layers by kind of query, and
the worst and best answers. --against adds a second checkpoint, side by side.

--what ceiling writes instead, in minutes and also before training, what a policy over layers can gain at most.
--what phrases asks a frozen backbone, before any training: does the similarity of a phrase's last token with the image
ground anything, and at which layers? It takes base weights, too (--version Qwen/Qwen2.5-VL-7B-Instruct, or a LLaVA
with --vision_tower).
"""

from __future__ import annotations

import argparse
import csv
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.command_line.parser import Parser
from utils.datasets import Spec, get_eval_dataset
from utils.datasets.base import EvalDataset
from utils.evaluation import metrics
from utils.evaluation.benchmarks import MODES
from utils.evaluation.metrics import Record
from utils.evaluation.predictions import InferenceOptions
from utils.evaluation.result_text import notes
from utils.inference import cli
from utils.plotting import text_tables
from utils.plotting.overlays import Panel, evenly_spaced, sheet

if TYPE_CHECKING:
    from utils.evaluation.ceiling import Ceiling, Measured
    from utils.evaluation.layer_analysis import QueryView, Study

SAMPLES = 6  # default of --samples
CEILING_IMAGES = 200  # of each split, unless --limit says otherwise: a few minutes, and intervals of about a point
PICTURED = ("against", "samples", "ids", "animate", "sam")  # flags of --what layers alone
UNUSED = {  # --what -> flags without effect on it
    "layers": ("max_image_tokens",),
    "ceiling": (*PICTURED, "max_image_tokens"),
    "phrases": (*PICTURED, "mode", "layer_policy", "seed"),
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(program="test.py", description=__doc__)
    add = parser.add_argument
    cli.add_model_flags(parser)
    add(
        "--what",
        choices=("layers", "ceiling", "phrases"),
        default="layers",
        help="layers: pictures and tables of all layers (default). ceiling: what choosing a layer for each query can "
        "gain over the best fixed layer, and whether the map reward and the [SEG] states tell which one. phrases: the "
        "maps of each phrase's last token, without [SEG] or mask decoder; --version may also be base weights of a "
        "backbone",
    )
    add(
        "--against",
        metavar="DIR",
        help="a second checkpoint, for comparison (such as a model trained with the last layer)",
    )
    add("--names", metavar="A,B", help="names of the checkpoints in pictures (default: those of their folders)")
    add("--dataset_dir", required=True, metavar="DIR", help="folder that holds reason_seg/, refer_seg/, coco/, ...")
    add("--val_dataset", required=True, metavar="SPEC", help='"ReasonSeg|val_long"; several joined by "||"')
    add("--output", required=True, type=Path, metavar="DIR", help="folder for pictures and tables")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--samples",
        type=cli.whole(0),
        metavar="N",
        help="plot all layers of N queries of each split, evenly spaced from the worst to the best IoU "
        f"(default: {SAMPLES})",
    )
    which.add_argument(
        "--ids", metavar="ID,...", help="plot these queries instead: IMAGE or IMAGE/QUERY, as in samples.csv"
    )
    add("--animate", action="store_true", help="also write a GIF of each query, with one frame per layer")
    add(
        "--sam",
        metavar="FILE",
        help="SAM's published weights, for M_prompt, which needs an untrained SAM (default: the checkpoint's own "
        "trained decoder; the table says so)",
    )
    add(
        "--mode",
        choices=MODES,
        default="teacher_forced",
        help="default: teacher_forced, which gives every query a [SEG]",
    )
    cli.add_layer_flag(parser, "of the model's own answer; default: as it was trained")
    add(
        "--limit",
        type=cli.whole(1),
        metavar="N",
        help=f"only the first N images of each split (default: all; {CEILING_IMAGES} with --what ceiling or phrases)",
    )
    add("--batch_size", type=cli.whole(1), default=4, metavar="N", help="images per step (default: 4)")
    add("--seed", type=int, default=0, metavar="S", help="of sampled layers (default: 0)")
    add(
        "--max_image_tokens",
        type=cli.whole(1),
        metavar="N",
        help="most tokens of an image, of base weights that have such a limit (default: 1280, as in training)",
    )
    args = parser.parse_args(arguments)
    given = [f"--{name}" for name in UNUSED[args.what] if getattr(args, name) != parser.get_default(name)]
    if given:
        parser.error(f"{' and '.join(given)}: no effect with --what {args.what}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    specs = Spec.parse_list(args.val_dataset)
    datasets = [get_eval_dataset(spec, args.dataset_dir) for spec in specs]  # a typo fails before the model is loaded
    if args.what == "ceiling":
        return write_ceilings(args, datasets)
    if args.what == "phrases":
        return write_phrases(args, datasets)
    args.output.mkdir(parents=True, exist_ok=True)
    folders = [args.version] + [args.against] * bool(args.against)
    selected: dict[Spec, list[Record]] = {}
    checkpoints = [
        analyze_checkpoint(args, folder, name, datasets, selected)
        for folder, name in zip(folders, checkpoint_names(args, folders))
    ]
    report = Report(args.output, checkpoints, shlex.join(sys.argv))
    for dataset in datasets:
        write_layers(report, dataset)
        write_samples(report, dataset, args.animate)
    write_table_2(
        report, datasets, "the SAM of --sam" if args.sam else "the checkpoint's own TRAINED decoder (no --sam)"
    )
    write_policy(report, datasets)
    print(f"wrote {report.close()} and {len(report.entries)} pictures and tables")
    return 0


def checkpoint_names(args: argparse.Namespace, folders: Sequence[str]) -> list[str]:
    """Short names of the checkpoints: ``runs/tiny/merged`` is tiny."""
    names = args.names.split(",") if args.names else []
    for folder in map(Path, folders[len(names) :]):
        names.append(folder.resolve().parent.name if folder.name == "merged" else folder.name)
    if len(names) != len(folders):
        raise ValueError(f"--names has {len(names)} names for {len(folders)} checkpoint(s)")
    return [f"{name} {n}" for n, name in enumerate(names, 1)] if len(set(names)) < len(names) else names


# -- analysis ----------------------------------------------------------------------------------------------------------


@dataclass
class Checkpoint:
    """The analysis of a checkpoint, by split: its study, the selected queries, and the worst and best ones."""

    name: str
    fingerprint: str
    studies: dict[Spec, Study] = field(default_factory=dict)
    views: dict[Spec, list[QueryView]] = field(default_factory=dict)
    extremes: dict[Spec, list[QueryView]] = field(default_factory=dict)


def analyze_checkpoint(
    args: argparse.Namespace,
    folder: str,
    name: str,
    datasets: Sequence[EvalDataset],
    selected: dict[Spec, list[Record]],
) -> Checkpoint:
    """Analyzes every split. The first checkpoint also selects the queries to plot for all, into ``selected``."""
    from model.loading.weights import load_original_sam
    from utils.evaluation.layer_analysis import LayerAnalyzer

    opened = cli.open_model(argparse.Namespace(**vars(args) | {"version": folder}))
    model = opened.model
    options = InferenceOptions(args.mode, args.layer_policy or model.config.layer_policy, seed=args.seed)
    sam = load_original_sam(args.sam, model) if args.sam else None
    analyzer = LayerAnalyzer(model, opened.processor, options, args.batch_size, sam)
    checkpoint = Checkpoint(name, opened.fingerprint)
    for dataset in datasets:
        study = checkpoint.studies[dataset.spec] = analyzer.study(dataset, args.limit, progress=True)
        records = selected.setdefault(dataset.spec, select_queries(study, args.samples, args.ids))
        checkpoint.views[dataset.spec] = [analyzer.inspect(dataset, record) for record in records]
        ranked = metrics.ranked(study.records, study.benchmark.protocol())
        worst_and_best = ranked if len(ranked) <= 8 else [*ranked[:4], *ranked[-4:]]
        checkpoint.extremes[dataset.spec] = [analyzer.inspect(dataset, record) for record in worst_and_best]
    return checkpoint


def select_queries(study: Study, count: int | None, ids: str | None) -> list[Record]:
    """The queries to plot: those of the given ids, or evenly spaced from the worst to the best IoU."""
    if ids is None:
        ranked = metrics.ranked(study.records, study.benchmark.protocol())
        return [ranked[index] for index in evenly_spaced(len(ranked), SAMPLES if count is None else count)]
    records = []
    for query_id in map(str.strip, ids.split(",")):
        matching = [r for r in study.records if query_id in (r.image_id, f"{r.image_id}/{r.query_id}")]
        if not matching:
            known = ", ".join(f"{r.image_id}/{r.query_id}" for r in study.records[:3])
            raise ValueError(f"--ids: no query {query_id!r} in the split; it has {known}, ...")
        records += matching
    return records


# -- pictures and tables -----------------------------------------------------------------------------------------------


@dataclass
class Report:
    """The output folder: pictures and tables with captions, and index.md, which shows all of them."""

    folder: Path
    checkpoints: list[Checkpoint]
    command: str
    entries: list[tuple[str, str]] = field(default_factory=list)
    shown: dict[str, str] = field(default_factory=dict)  # file -> Markdown in its place

    def add(self, name: str, text: str, spec: Spec | str) -> tuple[Path, str]:
        """Adds a file to the index; returns its path and full caption."""
        named = "; ".join(f"{each.name} ({each.fingerprint})" for each in self.checkpoints)
        caption = f"{text} Checkpoint: {named}. Split: {spec}. Command: {self.command}"
        self.entries.append((name, caption))
        return self.folder / name, caption

    def table(self, name: str, rows: Sequence[dict[str, Any]], text: str, spec: Spec | str) -> None:
        path, _ = self.add(name, text, spec)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows([{key: _csv_value(value) for key, value in row.items()} for row in rows])

    def close(self) -> Path:
        lines = ["# Analysis", ""]
        for name, caption in self.entries:
            shown = f"![{name}]({name})" if name.endswith((".png", ".gif")) else f"[{name}]({name})"
            lines += [
                shown,
                "",
                *([self.shown[name], ""] if name in self.shown else []),
                *(f"> {line}" for line in caption.splitlines()),
                "",
            ]
        path = self.folder / "index.md"
        path.write_text("\n".join(lines), encoding="utf-8")
        return path


def write_layers(report: Report, dataset: EvalDataset) -> None:
    """Writes Fig. 2, its numbers, and a line per query."""
    from utils.plotting.charts import layer_curves, save_chart

    spec = dataset.spec
    rows, ciou, loss, lines = [], {}, {}, []
    for each in report.checkpoints:
        study = each.studies[spec]
        losses, policy = study.map_loss(), study.policy(range(len(study.records)))
        scores = [study.scores(records) for records in study.by_layer]
        for layer, (score, map_records) in enumerate(zip(scores, study.maps_by_layer)):
            m_iou = {f"M_IoU_{name}": value for name, value in study.scores(map_records).items()}
            share = {"chosen_share": policy["shares"][layer], "policy_mean": policy["probability"][layer]}
            map_scores = {"map_loss": float(losses[layer])} | m_iou
            rows.append({"checkpoint": each.name, "layer": layer} | score | map_scores | share)
        ciou[each.name] = [score.get("cIoU", math.nan) for score in scores]
        loss[each.name] = losses.tolist()
        lines += [sample_row(each, study, index) for index in range(len(study.records))]
    path, caption = report.add(
        file_name(spec, "layers", "png"),
        "Fig. 2: (a) cIoU with each layer forced, (b) loss (BCE + dice) of each layer's similarity map against the "
        "soft ground truth.",
        spec,
    )
    save_chart(path, layer_curves(ciou, loss), caption)
    report.table(
        file_name(spec, "layers", "csv"),
        rows,
        "The numbers of Fig. 2, M_IoU of each layer's maps, the policy.",
        spec,
    )
    report.table(
        file_name(spec, "samples", "csv"), lines, "All queries: IoU, layers, entropy of the policy, best layer.", spec
    )


def sample_row(checkpoint: Checkpoint, study: Study, index: int) -> dict[str, Any]:
    record, protocol = study.records[index], study.benchmark.protocol()
    by_layer = [metrics.iou(records[index], protocol) for records in study.by_layer]
    return {
        "checkpoint": checkpoint.name,
        "id": f"{record.image_id}/{record.query_id}",
        "query": record.query,
        "IoU": metrics.iou(record, protocol),
        "layers": " ".join(map(str, record.layers)),
        "entropy": study.policy([index])["entropy"],
        "best_layer": int(np.argmax(by_layer)),
        "best_IoU": max(by_layer),
        **{key: record.meta[key] for key in metrics.GROUP_KEYS if key in record.meta},
    }


def write_samples(report: Report, dataset: EvalDataset, animated: bool) -> None:
    """Writes Fig. 4 to 6, and the worst and best answers."""
    from utils.evaluation.layer_figures import animate, layer_maps
    from utils.plotting.charts import save_chart

    spec = dataset.spec
    for n, view in enumerate(report.checkpoints[0].views[spec]):
        views = {each.name: each.views[spec][n] for each in report.checkpoints}
        about = f'{view.record.image_id}/{view.record.query_id}, "{view.record.query}", IoU {view.iou:.2f}.'
        path, caption = report.add(
            file_name(spec, f"maps_{n + 1}", "png"),
            f"Fig. 4 to 6: similarity maps of layers 0 (embeddings) to {len(view.maps) - 1}, dark = 0, yellow = 1, and "
            f"the ground truth's outline: {about}",
            spec,
        )
        save_chart(path, layer_maps(views), caption)
        if animated:
            path, _ = report.add(
                file_name(spec, f"maps_{n + 1}", "gif"),
                f"One frame per layer that the [SEG] token can use: {about}",
                spec,
            )
            animate(view, path)
    for each in report.checkpoints:
        study, extremes = each.studies[spec], each.extremes[spec]
        text = f"{each.name}: the {len(extremes)} worst and best answers, by IoU."
        path, caption = report.add(file_name(spec, "worst_best", each.name, "png"), text, spec)
        title = f"{spec}, {each.name}: worst and best of {len(study.records)} answers"
        save_chart(path, sheet([panel(view, study.benchmark.protocol()) for view in extremes], title, 160), caption)


def panel(view: QueryView, protocol: str) -> Panel:
    record = view.record
    chosen = view.maps[record.layers].max(0, keepdims=True) if record.layers else None
    return Panel(view.image, record.query, view.mask[None], chosen, view.truth, record.answer, notes(record, protocol))


def write_table_2(report: Report, datasets: Sequence[EvalDataset], sam: str) -> None:
    """Writes Table 2 for every split."""
    from utils.evaluation.layer_analysis import LAYER_ROWS, TABLE_2_COLUMNS

    rows = []
    for dataset in datasets:
        for each in report.checkpoints:
            study = each.studies[dataset.spec]
            for row in LAYER_ROWS:
                cells = {
                    f"{column}_{name}": value
                    for column in TABLE_2_COLUMNS
                    for name, value in study.scores(study.table[column, row]).items()
                }
                count = len(study.table["M_IoU", row])
                rows.append({"split": dataset.spec, "checkpoint": each.name, "layer": row, "queries": count} | cells)
    text = (
        f"Table 2, present targets only. M_prompt: the similarity map alone prompts {sam} (not PixelLM's decoder); "
        "M_IoU: the map itself, for each query at the threshold (0.01 to 0.99) with the largest IoU; "
        "SEG_prompt: the [SEG] token alone prompts the trained decoder. Layer: the policy's choice, or the last."
    )
    report.table("table_2.csv", rows, text, " and ".join(str(dataset.spec) for dataset in datasets))


def write_policy(report: Report, datasets: Sequence[EvalDataset]) -> None:
    """Writes which layers the [SEG] tokens use, by data set and kind of query."""
    from utils.plotting.charts import policy_strips, save_chart

    rows = []
    for dataset in datasets:
        for each in report.checkpoints:
            study = each.studies[dataset.spec]
            chosen, probability = {}, {}
            for (key, group), indices in study.groups().items():
                stats = study.policy(indices)
                name = f"{group if key == 'all' else f'{key} {group}'} ({stats['segs']})"
                chosen[name], probability[name] = stats["shares"], stats["probability"]
                row = {"checkpoint": each.name, "split": dataset.spec, "key": key, "group": group}
                row |= {name: stats[name] for name in ("segs", "entropy", "candidates")}
                row |= {f"chosen_{layer}": share for layer, share in enumerate(stats["shares"])}
                rows.append(row | {f"policy_{layer}": share for layer, share in enumerate(stats["probability"])})
            path, caption = report.add(
                file_name(dataset.spec, "policy", each.name, "png"),
                f"{each.name}: layers that the [SEG] of each kind of query use (their number in brackets), "
                "and the policy's mean distribution.",
                dataset.spec,
            )
            save_chart(path, policy_strips({"chosen": chosen, "policy": probability}), caption)
    text = (
        "Layers by kind of query: shares chosen, mean policy, its mean entropy in nats (at most the logarithm of the "
        "number of candidates)."
    )
    report.table("policy.csv", rows, text, " and ".join(str(dataset.spec) for dataset in datasets))


# -- the ceiling -------------------------------------------------------------------------------------------------------


def write_ceilings(args: argparse.Namespace, datasets: Sequence[EvalDataset]) -> int:
    """Writes the ceiling of every split, and prints its sentence."""
    from utils.evaluation import ceiling_pass
    from utils.evaluation.benchmarks import benchmark_of
    from utils.evaluation.ceiling import ceiling_of
    from utils.evaluation.ceiling_text import sentence, verdict
    from utils.evaluation.layer_analysis import LayerAnalyzer

    for dataset in datasets:  # before the model is loaded
        ceiling_pass.check_benchmark(benchmark_of(dataset.spec))
    [name] = checkpoint_names(args, [args.version])
    opened = cli.open_model(args)
    rules = ceiling_pass.rules_of(opened.model, args.layer_policy)
    analyzer = LayerAnalyzer(
        opened.model, opened.processor, InferenceOptions(args.mode, seed=args.seed), args.batch_size
    )
    args.output.mkdir(parents=True, exist_ok=True)
    report = Report(args.output, [Checkpoint(name, opened.fingerprint)], shlex.join(sys.argv))
    for dataset in datasets:
        measured = ceiling_pass.measure(analyzer, dataset, rules, args.limit or CEILING_IMAGES, progress=True)
        ceiling = ceiling_of(measured)
        write_ceiling(report, dataset.spec, measured, ceiling, args.mode)
        print(f"{dataset.spec}: {sentence(ceiling)} {verdict(ceiling)}")
    print(f"wrote {report.close()} and {len(report.entries)} pictures and tables")
    return 0


def write_ceiling(report: Report, spec: Spec, measured: Measured, ceiling: Ceiling, mode: str) -> None:
    """Writes the table, the figure, and the tables of layers and rewards."""
    from utils.evaluation import ceiling_text
    from utils.plotting.charts import ceiling_chart, save_chart

    name = file_name(spec, "ceiling", "csv")
    report.shown[name] = text_tables.markdown(ceiling_text.cells(ceiling), "llr")
    report.table(name, [vars(row) for row in ceiling.rows], ceiling_text.caption(measured, ceiling, mode), spec)
    picture, caption = report.add(file_name(spec, "ceiling", "png"), ceiling_text.FIGURE, spec)
    save_chart(picture, ceiling_chart(**ceiling_text.chart(measured, ceiling)), caption)
    details = {
        "ceiling_layers": (ceiling_text.layer_rows(measured, ceiling), ceiling_text.LAYERS),
        "ceiling_rewards": ([vars(row) for row in ceiling.agreements], ceiling_text.REWARDS),
    }
    for part, (rows, text) in details.items():
        name = file_name(spec, part, "csv")
        report.shown[name] = text_tables.markdown(
            text_tables.from_mappings(rows, lambda _, v: str(_csv_value(v))), "lr"
        )
        report.table(name, rows, text, spec)


# -- phrases -----------------------------------------------------------------------------------------------------------


def write_phrases(args: argparse.Namespace, datasets: Sequence[EvalDataset]) -> int:
    """Writes what each layer's similarity with a phrase's last token grounds, and prints its sentence."""
    from model.loading.hub import resolve_folder
    from model.loading.pretrained import kind_of, load_backbone
    from utils.evaluation import phrase_maps
    from utils.plotting.charts import phrase_curves, save_chart

    [name] = checkpoint_names(args, [args.version])
    if kind_of(resolve_folder(args.version, "--version").path) in ("base", "unknown"):  # which raises, with their names
        placed = {"quantize": args.quantize, "device_map": args.device_map}
        settings = {} if args.max_image_tokens is None else {"max_image_tokens": args.max_image_tokens}
        opened = load_backbone(
            args.version, args.precision, args.device, vision_tower=args.vision_tower, settings=settings, **placed
        )
    else:
        if args.max_image_tokens is not None:
            raise ValueError(f"--max_image_tokens: {args.version} is a finished model, whose images stay as they were")
        opened = cli.open_model(args)
    args.output.mkdir(parents=True, exist_ok=True)
    report = Report(args.output, [Checkpoint(name, opened.fingerprint)], shlex.join(sys.argv))
    for dataset in datasets:
        limit = args.limit or CEILING_IMAGES
        result = phrase_maps.measure(opened.model, opened.processor, dataset, limit, args.batch_size, progress=True)
        text = (
            "Similarity of a phrase's last token with the image's tokens, without [SEG]: "
            f"{phrase_maps.sentence(result)}. hit: the target's share of the highest cell; auc: a point of the target "
            "against one outside; iou: at the best threshold of each map; control: the phrases of another image. The "
            "best layer was chosen on these phrases."
        )
        report.table(file_name(dataset.spec, "phrases", "csv"), result.rows(), text, dataset.spec)
        path, caption = report.add(file_name(dataset.spec, "phrases", "png"), text, dataset.spec)
        curves = {kind: {c: result.mean(kind, "hit", c).tolist() for c in (False, True)} for kind in phrase_maps.KINDS}
        save_chart(path, phrase_curves(curves, float(np.mean(result.areas))), caption)
        print(f"{dataset.spec}: {phrase_maps.sentence(result)}")
    print(f"wrote {report.close()} and {len(report.entries)} pictures and tables")
    return 0


def file_name(spec: Spec, *parts: str) -> str:
    return ".".join([spec.slug, *(part.replace("|", "_").replace("/", "_") for part in parts)])


def _csv_value(value: Any) -> Any:
    return f"{value:.4f}" if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(cli.run(main))
