"""Compares ways to choose a layer on a base on which the choice pays: how much of the oracle's gain each recovers.

    python scripts/ablate.py --table choice --config configs/tiny_depths.yaml --seeds 3 --no_eval true \\
        --lora_r 0 --freeze "embed_tokens||lm_head"       # and --table choice_rewards
    python scripts/dev/study_choice.py --runs runs/ablate/choice runs/ablate/choice_rewards \\
        --dataset_dir data/demo --val_dataset "ReasonSeg|val"

Reads the evaluated runs of ``scripts/ablate.py`` (folders ROW-SEED). The oracle takes each query's best layer in the
models of the row --oracle, which are measured with each layer forced (kept in ROW-SEED/SPLIT.forced.npz until the run
is evaluated with other weights). Prints, per row: gIoU; the gain over the best row with a fixed layer, paired over
images, seeds together; the share of the oracle's gain that it recovers; the layers by kind of query; and the policy's
entropy over training. --figure plots shares and entropies.

Legend: Q queries with a target, C candidate layers.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.ablate import TABLES, policy_entropies, slug, summary_path, train_lines
from utils.command_line.parser import Parser
from utils.datasets import Spec, get_eval_dataset
from utils.evaluation.benchmarks import benchmark_of
from utils.evaluation.ceiling import interval_of, kinds_of
from utils.evaluation.metrics import iou
from utils.evaluation.predictions import InferenceOptions
from utils.evaluation.results import read_results, result_path
from utils.inference import cli
from utils.plotting import text_tables

STEPS = (60, 120, 180)  # at which entropies are printed
CURVES = (  # rows whose entropy is plotted
    "policy",
    "policy, baseline from the first reward",
    "policy, critic of the release",
    "policy, critic of the state",
    "policy, exact gradient",
)


@dataclass
class Run:
    """An evaluated row with one seed.

    Attributes:
        images, kinds: [Q] of each query; iou: [Q]; layers: [Q], the first that each query used, -1 = no [SEG].
        rule: its layer rule; checkpoint: the fingerprint of its weights.
        entropy: step -> nats; empty without a gate.
    """

    images: np.ndarray
    kinds: np.ndarray
    iou: np.ndarray
    layers: np.ndarray
    rule: str
    checkpoint: str
    entropy: dict[int, float]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    folders = folders_of(args.runs, args.val_dataset)
    if args.oracle not in folders:
        raise ValueError(f"--runs: no row {args.oracle!r} there, but {', '.join(folders)}")
    rows = {name: [read_run(folder, args.val_dataset) for folder in row] for name, row in folders.items()}
    forced = [measure(folder, run.checkpoint, args) for folder, run in zip(folders[args.oracle], rows[args.oracle])]
    for name, runs in rows.items():
        for folder, run in zip(folders[name], runs):
            for measured in forced:
                check_same_queries(folder, run, measured, args.val_dataset)
    oracle = np.mean([measured["forced"].max(1) for measured in forced], 0)
    print(report(rows, oracle, args.oracle))
    if args.figure:
        draw(rows, oracle.mean(), args.figure)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(program="scripts/dev/study_choice.py", description=__doc__)
    add = parser.add_argument
    add("--runs", required=True, nargs="+", type=Path, metavar="DIR", help="folders OUTPUT/TABLE of scripts/ablate.py")
    add("--dataset_dir", required=True, metavar="DIR", help="folder that holds reason_seg/, refer_seg/, ...")
    add(
        "--val_dataset",
        required=True,
        type=Spec.parse,
        metavar="SPEC",
        help='a split with several kinds of queries: "ReasonSeg|val"',
    )
    add("--oracle", default="policy, exact gradient", metavar="ROW", help="default: %(default)s")
    add("--figure", type=Path, metavar="FILE", help="also write a PNG")
    return parser.parse_args(argv)


def folders_of(tables: Sequence[Path], spec: Spec) -> dict[str, list[Path]]:
    """Row -> its evaluated runs of seeds 0, 1, ..., in the order of the tables.

    Raises:
        ValueError: if a folder is no table, two have runs of the same row, or no run is evaluated on this split.
    """
    found: dict[str, list[Path]] = {}
    for table in tables:
        if table.name not in TABLES:
            raise ValueError(f"--runs {table}: the folder's name is no table of scripts/ablate.py")
        for row in TABLES[table.name]:
            by_seed = (table / f"{slug(row.name)}-{seed}" for seed in itertools.count())
            if folders := list(itertools.takewhile(lambda run: summary_path(run / "eval", spec).is_file(), by_seed)):
                if row.name in found:
                    raise ValueError(f"--runs: row {row.name!r} is in {found[row.name][0].parent} and in {table}")
                found[row.name] = folders
    if not found:
        raise ValueError(f"--runs {tables[0]}: no run there is evaluated on {spec}")
    return found


def read_run(folder: Path, spec: Spec) -> Run:
    """The answers of a run to queries with a target, and its log."""
    provenance, records = read_results(result_path(folder / "eval", spec, "generate"))
    records = [record for record in records if record.G]  # as ``EvalQuery.is_present``
    protocol, lines = benchmark_of(spec).protocol(), train_lines(folder)
    return Run(
        images=np.array([record.index for record in records]),
        kinds=kinds_of([record.meta for record in records]),
        iou=np.array([iou(record, protocol) for record in records]),
        layers=np.array([record.layers[0] if record.layers else -1 for record in records]),
        rule=provenance.layer_policy,
        checkpoint=provenance.checkpoint,
        entropy=policy_entropies(lines),
    )


def measure(folder: Path, checkpoint: str, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """A run's queries, and their IoU with each candidate layer forced; kept in the run's folder.

    Args:
        checkpoint: fingerprint of the evaluated weights; what is kept of others is measured again.

    Returns:
        ``forced`` [Q, C]; ``images`` and ``kinds`` [Q] as of a ``Run``; ``checkpoint``.
    """
    path = folder / f"{args.val_dataset.slug}.forced.npz"
    if not path.is_file() or np.load(path).get("checkpoint") != checkpoint:
        from model import load
        from utils.evaluation import ceiling_pass
        from utils.evaluation.layer_analysis import LayerAnalyzer

        print(f"measuring {folder}", file=sys.stderr, flush=True)
        opened = load(folder / "merged")
        analyzer = LayerAnalyzer(opened.model, opened.processor, InferenceOptions("generate"), 16)
        measured = ceiling_pass.measure(analyzer, get_eval_dataset(args.val_dataset, args.dataset_dir))
        np.savez(path, forced=measured.mask, images=measured.images, kinds=measured.kinds, checkpoint=checkpoint)
    return dict(np.load(path))


def check_same_queries(folder: Path, run: Run, measured: dict[str, np.ndarray], spec: Spec) -> None:
    """Checks that a run answers the queries that the oracle is measured on.

    Raises:
        ValueError: if it does not.
    """
    if not all(np.array_equal(getattr(run, name), measured[name]) for name in ("images", "kinds")):
        raise ValueError(
            f"{folder}: its {len(run.images)} queries of {spec} are not the {len(measured['images'])} that the oracle "
            "is measured on; evaluate all runs on the data of --dataset_dir, and delete *.forced.npz of other data"
        )


def report(rows: dict[str, list[Run]], oracle: np.ndarray, oracle_row: str) -> str:
    """Two tables: values and gains per row, and the layers by kind of query.

    Args:
        oracle: [Q] IoU of each query's best layer, mean over the seeds of ``oracle_row``.
    """
    reference = best_fixed(rows)
    values = {name: np.mean([run.iou for run in runs], 0) for name, runs in rows.items()}
    values[f"oracle of {oracle_row}"] = oracle
    fixed, images = values[reference], rows[reference][0].images
    head = ["row", "gIoU", f"gain over {reference}", "share of the oracle's gain"]
    table = [[*head, *(f"entropy, step {step}" for step in STEPS)]]
    for name, value in values.items():
        runs, gain = rows.get(name, []), value - fixed
        low, high = interval_of(gain, images)
        cells = [text_tables.mean_cell([100 * run.iou.mean() for run in runs] or [100 * value.mean()], 1)]
        cells += [f"{100 * gain.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"]
        cells += [f"{gain.mean() / (oracle - fixed).mean():.0%}"]
        cells += [mean_cell([run.entropy[step] for run in runs if step in run.entropy]) for step in STEPS]
        table.append([name, *cells])
    return f"{text_tables.markdown(table)}\n\n{layers_by_kind(rows)}"


def best_fixed(rows: dict[str, list[Run]]) -> str:
    """The row with the largest mean IoU among those that fix a layer.

    Raises:
        ValueError: if none does.
    """
    values = {
        name: np.mean([run.iou.mean() for run in runs])
        for name, runs in rows.items()
        if runs[0].rule == "last" or runs[0].rule.startswith("fixed:")
    }
    if not values:
        raise ValueError("--runs: no row fixes a layer (last, fixed:K), so that there is nothing to compare with")
    return max(values, key=lambda name: values[name])


def layers_by_kind(rows: dict[str, list[Run]]) -> str:
    """Per row and kind of query: gIoU, and the layers that it takes most (soft gating: of the largest weight)."""
    kinds = list(dict.fromkeys(next(iter(rows.values()))[0].kinds.tolist()))
    table = [["row", *kinds]]
    for name, runs in rows.items():
        cells = []
        for kind in kinds:
            layers = np.concatenate([run.layers[run.kinds == kind] for run in runs])
            taken, counts = np.unique(layers, return_counts=True)
            order = np.argsort(-counts, kind="stable")[:2]
            text = ", ".join(f"{taken[n]} ({share:.0%})" for n in order if (share := counts[n] / len(layers)) >= 0.05)
            cells.append(f"{100 * np.mean([run.iou[run.kinds == kind].mean() for run in runs]):.1f}: {text}")
        table.append([name, *cells])
    return f"gIoU and layers by kind of query\n\n{text_tables.markdown(table)}"


def mean_cell(values: Sequence[float]) -> str:
    return f"{np.mean(values):.2f}" if values else "-"


def draw(rows: dict[str, list[Run]], oracle: float, path: Path) -> None:
    """Writes the figure: the share of the oracle's gain per row, each seed a dot; the policies' entropies.

    Args:
        oracle: its mean IoU.
    """
    from utils.plotting.charts import COLUMN, LINES, figure, save_chart

    fixed = np.mean([run.iou.mean() for run in rows[best_fixed(rows)]])
    with figure(2 * COLUMN, 0.16 * len(rows) + 0.9) as fig:
        left, right = fig.subplots(1, 2, width_ratios=[1.2, 1])
        for place, runs in enumerate(rows.values()):
            shares = [100 * (run.iou.mean() - fixed) / (oracle - fixed) for run in runs]
            left.barh(place, np.mean(shares), color="0.85")
            left.plot(shares, [place] * len(shares), linestyle="", marker="o", markersize=2, color=LINES[0]["color"])
        left.set_yticks(range(len(rows)), list(rows))
        left.invert_yaxis()
        left.axvline(100, linewidth=0.6, color="0.4")
        left.set_xlabel("share of the oracle's gain, %")
        left.set_title("(a)", loc="left")
        for name, style in zip([name for name in CURVES if name in rows], LINES):
            runs = rows[name]
            steps = sorted(set.intersection(*(set(run.entropy) for run in runs)))
            mean = [np.mean([run.entropy[step] for run in runs]) for step in steps]
            right.plot(steps, mean, label=name, **(style | {"marker": ""}))
        right.set(xlabel="step", ylim=(0, None))
        right.set_title("(b) policy's entropy, nats", loc="left")
        right.legend(fontsize=5, loc="lower left")
        save_chart(path, fig, "Share of the oracle's gain per way to choose a layer; the policies' entropies.")


if __name__ == "__main__":
    sys.exit(cli.run(main))
