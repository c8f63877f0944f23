"""Measures training that starts from a finished model, on the tiny family.

    python scripts/dev/study_start.py halves --dataset_dir data/demo
    python scripts/dev/study_start.py tables --dataset_dir data/demo
    python scripts/dev/study_start.py new_shape --dataset_dir data/demo --version runs/tiny/merged

``halves``: 180 steps from base weights, or 90, merged, and 90 more from the merged folder (with samples of their own).
``tables``: 180 steps in which embeddings and ``lm_head`` train in full, or the rows of added tokens alone.
``new_shape``: a finished model learns a shape and a word that it has never seen (``utils/demo/new_shape.py``), by
configs/finetune.yaml; beside it, the same with ``train_tables: full``, the same without old data, and the same data
from base weights. Every run has ``STEPS`` steps.
Finished runs are skipped, so that a study that was interrupted continues.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.ablate import call, summary_path
from utils.command_line.parser import Parser
from utils.datasets.spec import Spec
from utils.demo.new_shape import write_new_shape
from utils.evaluation.results import Summary
from utils.inference import cli
from utils.plotting import text_tables

CONFIG = "configs/tiny.yaml"
RECIPE = "configs/finetune.yaml"
OTHER_SAMPLES = 1000  # added to the seed of a second run, which would begin with the first one's samples
NEW_IMAGES, NEW_QUERIES, STEPS = (20, 50, 200), 120, 60
# What the tiny model needs in place of values for 7B, as in configs/tiny.yaml.
TINY: dict[str, object] = {"precision": "fp32", "model_max_length": 512, "questions_per_image": 4, "workers": 1}
TINY |= {"batch_size": 8, "grad_accumulation_steps": 1, "lr": 1e-3}
MIXED: dict[str, object] = {"dataset": "custom||refer_seg||reason_seg", "sample_rates": "2,1,1"}  # as in the recipe


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    print(STUDIES[args.study](args))
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(program="scripts/dev/study_start.py", description=__doc__)
    add = parser.add_argument
    add("study", choices=sorted(STUDIES), help="which comparison")
    add("--dataset_dir", required=True, metavar="DIR", help="the demo's data")
    add("--version", metavar="DIR", help="new_shape: the finished model, merged")
    add("--seeds", type=cli.whole(1), default=3, metavar="N", help="seeds 0 to N-1 (default: 3)")
    add("--output", type=Path, default=Path("runs/start"), metavar="DIR", help="default: runs/start")
    args = parser.parse_args(argv)
    if args.study == "new_shape" and not args.version:
        parser.error("new_shape needs --version, a finished model")
    return args


def train(folder: Path, args: argparse.Namespace, **settings: object) -> Path:
    """A run of train_ds.py in ``folder`` without validation, merged; returns the merged folder."""
    merged = folder / "merged"
    if not merged.is_dir():
        flags = {"config": CONFIG, "dataset_dir": args.dataset_dir, "log_base_dir": folder.parent}
        flags |= {"exp_name": folder.name, "no_eval": "true", "auto_resume": "true"} | settings
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        call(folder, ["train_ds.py", *words])
        call(folder, ["scripts/merge_lora.py", "--checkpoint", str(folder), "--output", str(merged)])
    return merged


def gious(merged: Path, args: argparse.Namespace, specs: str, results: Path | None = None, *flags: str) -> list[float]:
    """gIoU in percent of a merged folder, per benchmark, with answers that it generates (``results``: where to)."""
    results, parsed = results or merged.parent / "eval", Spec.parse_list(specs)
    if not all(summary_path(results, spec).is_file() for spec in parsed):
        words = ["--version", str(merged), "--dataset_dir", args.dataset_dir, "--val_dataset", specs, *flags]
        call(results.parent, ["test.py", *words, "--mode", "generate", "--batch_size", "16", "--output", str(results)])
    return [100 * Summary.load(summary_path(results, spec)).metrics["gIoU"] for spec in parsed]


SPECS = "ReasonSeg|val_short||ReasonSeg|val_long"
WHOLE = {"epochs": 2, "steps_per_epoch": 90}


def halves(args: argparse.Namespace) -> str:
    """180 steps at once against 90 and 90."""
    values: dict[str, list[list[float]]] = {}
    half = WHOLE | {"epochs": 1}
    for seed in range(args.seeds):
        root, after = args.output / f"halves-{seed}", OTHER_SAMPLES + seed
        first = train(root / "first", args, seed=seed, **half)
        models = {
            "180 steps": train(root / "whole", args, seed=seed, **WHOLE),
            "90 steps": first,
            "90 steps, merged, 90 steps": train(root / "second", args, version=first, seed=after, **half),
        }
        for name, merged in models.items():
            values.setdefault(name, []).append(gious(merged, args, SPECS))
    return table(values)


def tables(args: argparse.Namespace) -> str:
    """Both settings of ``train_tables``."""
    values: dict[str, list[list[float]]] = {}
    for seed in range(args.seeds):
        for kind, folder in {"full": f"halves-{seed}/whole", "new": f"tables-{seed}/new"}.items():
            merged = train(args.output / folder, args, seed=seed, train_tables=kind, **WHOLE)
            values.setdefault(kind, []).append(gious(merged, args, SPECS))
    return table(values)


def new_shape_runs(args: argparse.Namespace, data: Path, seed: int) -> Iterator[tuple[str, Path, dict[str, object]]]:
    """Name, folder and settings (of ``train``) of each run of a seed."""
    steps: dict[str, object] = {"seed": OTHER_SAMPLES + seed, "epochs": 1, "steps_per_epoch": STEPS}
    finished: dict[str, object] = {"config": RECIPE, "version": args.version} | TINY | steps
    recipe = finished | {"refer_seg_data": "grefcoco"}
    kinds = {
        "recipe": ("the recipe", recipe),
        "full": ("the recipe, embeddings in full", recipe | {"train_tables": "full"}),
        "alone": ("the new images alone", finished | {"dataset": "custom", "sample_rates": 1}),
        "base": ("from the base", MIXED | steps),
    }
    for size in NEW_IMAGES:
        for kind, (name, settings) in kinds.items():
            images = {"custom_data": data / f"new-{size}.jsonl"}
            yield f"{name}, {size} images", args.output / "new_shape" / f"{kind}-{size}-{seed}", settings | images


def new_shape(args: argparse.Namespace) -> str:
    """Teaches a new shape with few images; gIoU on it and on two old benchmarks, one of which has absent targets."""
    data, limit = args.output / "new_shape" / "data", ("--limit", str(NEW_QUERIES))
    if not (data / "new.jsonl").is_file():
        write_new_shape(data, NEW_IMAGES, NEW_QUERIES)
    specs = f"custom|{data / 'new.jsonl'}|val||ReasonSeg|val_short||grefcoco|unc|val"
    before = gious(Path(args.version), args, specs, args.output / "new_shape" / "before" / "eval", *limit)
    values = {"before": [before]}
    for seed in range(args.seeds):
        for name, folder, settings in new_shape_runs(args, data, seed):
            merged = train(folder, args, **settings)
            values.setdefault(name, []).append(gious(merged, args, specs, folder / "eval", *limit))
    return table(values, specs)


def table(values: dict[str, list[list[float]]], specs: str = SPECS) -> str:
    """Mean and standard deviation of [seed][benchmark] values per row, and all values."""
    rows = [["run", *(f"{spec} gIoU" for spec in Spec.parse_list(specs))]]
    rows += [[name, *(text_tables.mean_cell(column, 1) for column in zip(*seeds))] for name, seeds in values.items()]
    each = "\n".join(f"{name}: {seeds}" for name, seeds in values.items())
    return f"{text_tables.markdown(rows)}\n\n{each}"


STUDIES = {"halves": halves, "tables": tables, "new_shape": new_shape}


if __name__ == "__main__":
    sys.exit(cli.run(main))
