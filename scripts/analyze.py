r"""Draws and tabulates what each layer of a trained model does: the paper's Fig. 2 and 4 to 6, and Table 2.

    python scripts/analyze.py --version runs/tiny/merged --dataset_dir data/demo \
        --val_dataset 'ReasonSeg|val' --output out

Writes pictures (PNG), tables (CSV) and an index.md with a caption for each: similarity maps over all layers, cIoU by
forced layer and the loss of the maps, M_prompt, M_IoU and <SEG>_prompt, the policy's layers by kind of query, and the
worst and best answers. With --against, the same for a second checkpoint, side by side.
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
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.datasets import Spec, get_eval_dataset
from utils.datasets.base import EvalDataset
from utils.evaluation import metrics
from utils.evaluation.benchmarks import MODES
from utils.evaluation.layer_analysis import COLUMNS, ROWS, Analyst, Look, Study, original_sam
from utils.evaluation.layer_figures import animate, layer_maps
from utils.evaluation.metrics import Record
from utils.evaluation.panels import notes
from utils.evaluation.predictions import InferenceOptions
from utils.inference import cli
from utils.plotting.charts import layer_curves, policy_strips, save_chart
from utils.plotting.overlays import Panel, evenly_spaced, sheet


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    cli.add_model_flags(parser)
    add("--against", metavar="DIR", help="a second one, to be drawn beside it (a model trained on the last layer, say)")
    add("--names", metavar="A,B", help="what pictures call the two (default: the names of their folders)")
    add("--dataset_dir", required=True, metavar="DIR", help="folder that holds reason_seg/, refer_seg/, coco/, ...")
    add("--val_dataset", required=True, metavar="SPEC", help='"ReasonSeg|val_long"; several joined by "||"')
    add("--output", required=True, type=Path, metavar="DIR", help="folder for pictures and tables")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--samples",
        type=int,
        default=6,
        metavar="N",
        help="draw all layers of N queries of each split, evenly spaced from the worst to the best IoU (default: 6)",
    )
    which.add_argument(
        "--ids", metavar="ID,...", help="draw these instead: IMAGE or IMAGE/QUERY, as samples.csv has them"
    )
    add("--animate", action="store_true", help="also draw each as a GIF that slides through the layers")
    add(
        "--sam",
        metavar="FILE",
        help="SAM's published weights, for M_prompt, which is about an untrained SAM; without them the checkpoint's "
        "own trained decoder is prompted, and the table says so",
    )
    add(
        "--mode", choices=MODES, default="teacher_forced", help="default: teacher_forced, so that every query has [SEG]"
    )
    cli.add_layer_flag(parser, "what counts as the model's own answer; default: as it was trained")
    add("--limit", type=int, metavar="N", help="only the first N images of each split")
    add("--batch_size", type=int, default=4, metavar="N", help="images per step (default: 4)")
    add("--seed", type=int, default=0, metavar="S", help="of sampled layers (default: 0)")
    args = parser.parse_args(arguments)
    for name, low in (("samples", 0), ("limit", 1), ("batch_size", 1)):
        if (value := getattr(args, name)) is not None and value < low:
            parser.error(f"--{name} is {value}; it must be at least {low}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    specs = Spec.parse_list(args.val_dataset)
    datasets = [get_eval_dataset(spec, args.dataset_dir) for spec in specs]  # a typing error shows before the loading
    args.output.mkdir(parents=True, exist_ok=True)
    folders = [args.version] + [args.against] * bool(args.against)
    picked: dict[Spec, list[Record]] = {}
    checkpoints = [
        analyse(args, folder, name, datasets, picked) for folder, name in zip(folders, names_of(args, folders))
    ]
    book = Book(args.output, checkpoints, shlex.join(sys.argv))
    for dataset in datasets:
        draw_layers(book, dataset)
        draw_samples(book, dataset, args.animate)
    draw_table(book, datasets, "the SAM of --sam" if args.sam else "the checkpoint's own TRAINED decoder (no --sam)")
    draw_policy(book, datasets)
    print(f"wrote {book.close()} and {len(book.entries)} pictures and tables")
    return 0


def names_of(args: argparse.Namespace, folders: Sequence[str]) -> list[str]:
    """Short names of the checkpoints: ``runs/tiny/merged`` is tiny."""
    names = args.names.split(",") if args.names else []
    for folder in map(Path, folders[len(names) :]):
        names.append(folder.resolve().parent.name if folder.name == "merged" else folder.name)
    if len(names) != len(folders):
        raise ValueError(f"--names has {len(names)} names for {len(folders)} checkpoint(s)")
    return [f"{name} {n}" for n, name in enumerate(names, 1)] if len(set(names)) < len(names) else names


# -- numbers -----------------------------------------------------------------------------------------------------------


@dataclass
class Checkpoint:
    """What was found out about one: its studies and the queries that were looked at, by split."""

    name: str
    fingerprint: str
    studies: dict[Spec, Study] = field(default_factory=dict)
    looks: dict[Spec, list[Look]] = field(default_factory=dict)
    ends: dict[Spec, list[Look]] = field(default_factory=dict)


def analyse(
    args: argparse.Namespace, folder: str, name: str, datasets: Sequence[EvalDataset], picked: dict[Spec, list[Record]]
) -> Checkpoint:
    """Studies every split. The first checkpoint also picks the queries that all are looked at with, into ``picked``."""
    opened = cli.open_model(argparse.Namespace(**vars(args) | {"version": folder}))
    model = opened.model
    options = InferenceOptions(args.mode, args.layer_policy or model.config.layer_policy, seed=args.seed)
    sam = original_sam(args.sam, model) if args.sam else None
    analyst = Analyst(model, opened.processor, options, args.batch_size, sam)
    found = Checkpoint(name, opened.fingerprint)
    for dataset in datasets:
        study = found.studies[dataset.spec] = analyst.study(dataset, args.limit, progress=True)
        records = picked.setdefault(dataset.spec, pick_queries(study, args.samples, args.ids))
        found.looks[dataset.spec] = [analyst.look(dataset, record) for record in records]
        ranked = study.ranked()
        ends = ranked if len(ranked) <= 8 else [*ranked[:4], *ranked[-4:]]
        found.ends[dataset.spec] = [analyst.look(dataset, study.chosen[place]) for place in ends]
    return found


def pick_queries(study: Study, count: int, ids: str | None) -> list[Record]:
    """The queries to look at: by their names, or evenly spaced from the worst to the best."""
    if ids is None:
        ranked = study.ranked()
        return [study.chosen[ranked[place]] for place in evenly_spaced(len(ranked), count)]
    found = []
    for wanted in ids.split(","):
        matching = [r for r in study.chosen if wanted.strip() in (r.image_id, f"{r.image_id}/{r.query_id}")]
        if not matching:
            known = ", ".join(f"{r.image_id}/{r.query_id}" for r in study.chosen[:3])
            raise ValueError(f"--ids: no query {wanted.strip()!r} in the split; it has {known}, ...")
        found += matching
    return found


# -- pictures and tables -----------------------------------------------------------------------------------------------


@dataclass
class Book:
    """The output folder: each picture or table with its caption, and index.md, which shows all of them."""

    folder: Path
    checkpoints: list[Checkpoint]
    command: str
    entries: list[tuple[str, str]] = field(default_factory=list)

    def caption(self, text: str, spec: Spec | str) -> str:
        named = "; ".join(f"{each.name} ({each.fingerprint})" for each in self.checkpoints)
        return f"{text} Checkpoint: {named}. Split: {spec}. Command: {self.command}"

    def add(self, name: str, text: str, spec: Spec | str) -> tuple[Path, str]:
        """Announces a file -> its path and full caption."""
        caption = self.caption(text, spec)
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
            lines += [shown, "", *(f"> {line}" for line in caption.splitlines()), ""]
        path = self.folder / "index.md"
        path.write_text("\n".join(lines), encoding="utf-8")
        return path


def draw_layers(book: Book, dataset: EvalDataset) -> None:
    """Fig. 2, its figures, and every query's line."""
    spec = dataset.spec
    rows, ciou, loss, lines = [], {}, {}, []
    for each in book.checkpoints:
        study = each.studies[spec]
        losses, policy = study.map_loss(), study.policy(range(len(study.chosen)))
        scores = [study.scores(records) for records in study.by_layer]
        for layer, (score, cut) in enumerate(zip(scores, study.maps_by_layer)):
            of_map = {f"M_IoU_{name}": value for name, value in study.scores(cut).items()}
            share = {"chosen_share": policy["shares"][layer], "policy_mean": policy["probability"][layer]}
            rows.append(
                {"checkpoint": each.name, "layer": layer} | score | {"map_loss": float(losses[layer])} | of_map | share
            )
        ciou[each.name] = [score.get("cIoU", math.nan) for score in scores]
        loss[each.name] = losses.tolist()
        lines += [sample_line(each, study, place) for place in range(len(study.chosen))]
    path, caption = book.add(
        file_name(spec, "layers", "png"),
        "Fig. 2: (a) cIoU with each layer forced, (b) loss (BCE + dice) of each layer's similarity map against the "
        "soft ground truth.",
        spec,
    )
    save_chart(path, layer_curves(ciou, loss), caption)
    book.table(
        file_name(spec, "layers", "csv"),
        rows,
        "The numbers of Fig. 2, the best cut of each layer's map, the policy.",
        spec,
    )
    book.table(
        file_name(spec, "samples", "csv"), lines, "Every query: IoU, layers, entropy of the policy, best layer.", spec
    )


def sample_line(checkpoint: Checkpoint, study: Study, place: int) -> dict[str, Any]:
    record, protocol = study.chosen[place], study.benchmark.protocol()
    by_layer = [metrics.iou(records[place], protocol) for records in study.by_layer]
    return {
        "checkpoint": checkpoint.name,
        "id": f"{record.image_id}/{record.query_id}",
        "query": record.query,
        "IoU": metrics.iou(record, protocol),
        "layers": " ".join(map(str, record.layers)),
        "entropy": study.policy([place])["entropy"],
        "best_layer": int(np.argmax(by_layer)),
        "best_IoU": max(by_layer),
        **{key: record.meta[key] for key in metrics.GROUP_KEYS if key in record.meta},
    }


def draw_samples(book: Book, dataset: EvalDataset, animated: bool) -> None:
    """Fig. 4 to 6, and the worst and best answers."""
    spec = dataset.spec
    for number, look in enumerate(book.checkpoints[0].looks[spec]):
        looks = {each.name: each.looks[spec][number] for each in book.checkpoints}
        about = f'{look.record.image_id}/{look.record.query_id}, "{look.query}", IoU {look.iou:.2f}.'
        path, caption = book.add(
            file_name(spec, f"maps_{number + 1}", "png"),
            f"Fig. 4 to 6: similarity maps of layers 0 (embeddings) to {len(look.maps) - 1}, dark = 0, yellow = 1, and "
            f"the ground truth's outline: {about}",
            spec,
        )
        save_chart(path, layer_maps(looks), caption)
        if animated:
            path, _ = book.add(
                file_name(spec, f"maps_{number + 1}", "gif"),
                f"The [SEG] token slides through the layers: {about}",
                spec,
            )
            animate(look, path)
    for each in book.checkpoints:
        study, looked = each.studies[spec], each.ends[spec]
        text = f"{each.name}: the {len(looked)} worst and best answers, by IoU."
        path, caption = book.add(file_name(spec, "worst_best", each.name, "png"), text, spec)
        title = f"{spec}, {each.name}: worst and best of {len(study.chosen)} answers"
        save_chart(path, sheet([panel(look, study.benchmark.protocol()) for look in looked], title, 160), caption)


def panel(look: Look, protocol: str) -> Panel:
    layers = look.maps[look.layers].max(0, keepdims=True) if look.layers else None
    said = notes(look.record, protocol)
    return Panel(look.image, look.query, look.mask[None], layers, look.truth, look.record.answer, said)


def draw_table(book: Book, datasets: Sequence[EvalDataset], sam: str) -> None:
    """Table 2 of every split."""
    rows = []
    for dataset in datasets:
        for each in book.checkpoints:
            study = each.studies[dataset.spec]
            for row in ROWS:
                cells = {
                    f"{column}_{name}": value
                    for column in COLUMNS
                    for name, value in study.scores(study.table[column, row]).items()
                }
                count = len(study.table["M_IoU", row])
                rows.append({"split": dataset.spec, "checkpoint": each.name, "layer": row, "queries": count} | cells)
    text = (
        "Table 2, queries whose target is there. M_prompt: the similarity map alone prompts "
        f"{sam}; M_IoU: the map itself, cut for each query at the threshold (0.01 to 0.99) with the largest IoU; "
        "SEG_prompt: the [SEG] token alone prompts the trained decoder. Layer: the policy's, or the last."
    )
    book.table("table_2.csv", rows, text, " and ".join(str(dataset.spec) for dataset in datasets))


def draw_policy(book: Book, datasets: Sequence[EvalDataset]) -> None:
    """Which layers the [SEG] tokens connect from, by data set and kind of query."""
    rows = []
    for dataset in datasets:
        for each in book.checkpoints:
            study = each.studies[dataset.spec]
            chosen, probability = {}, {}
            for (key, group), places in study.groups().items():
                found = study.policy(places)
                name = f"{group if key == 'all' else f'{key} {group}'} ({found['segs']})"
                chosen[name], probability[name] = found["shares"], found["probability"]
                row = {"checkpoint": each.name, "split": dataset.spec, "key": key, "group": group}
                row |= {"segs": found["segs"], "entropy": found["entropy"], "candidates": found["candidates"]}
                row |= {f"chosen_{layer}": share for layer, share in enumerate(found["shares"])}
                rows.append(row | {f"policy_{layer}": share for layer, share in enumerate(found["probability"])})
            path, caption = book.add(
                file_name(dataset.spec, "policy", each.name, "png"),
                f"{each.name}: layers that the [SEG] of each kind of query connect from (their number in brackets), "
                "and the policy's mean distribution.",
                dataset.spec,
            )
            save_chart(path, policy_strips({"chosen": chosen, "policy": probability}), caption)
    about = (
        "Layers by kind of query: shares chosen, mean policy, its mean entropy in nats (at most the logarithm of the "
    )
    book.table(
        "policy.csv", rows, f"{about}candidates' number).", " and ".join(str(dataset.spec) for dataset in datasets)
    )


def file_name(spec: Spec, *parts: str) -> str:
    return ".".join([spec.slug, *(part.replace("|", "_").replace("/", "_") for part in parts)])


def _csv_value(value: Any) -> Any:
    return f"{value:.4f}" if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(cli.run(main))
