"""Compares ways to choose a layer on a base on which the choice pays: how much of the oracle's gain each recovers.

    python scripts/ablate.py --table choice --config configs/tiny_depths.yaml --seeds 5 --no_eval true
    python scripts/dev/study_choice.py --runs runs/ablate/choice --dataset_dir data/demo --val_dataset "ReasonSeg|val"

Reads the runs of ``scripts/ablate.py`` (folders ROW-SEED) and measures every query with each layer forced, as
``analyze.py --what ceiling`` does. What it has measured stays in ROW-SEED/choice.SPLIT.npz. Answers are teacher-forced:
every query has a [SEG]. Table ``choice_rewards`` has no fixed layer; give --runs the folders of both tables.

Prints, per row: gIoU of its own layer rule; the gain over the best row with a fixed layer, paired over images, seeds
together; the share of the oracle's gain that it recovers (the oracle takes each query's best layer in the model of the
row --oracle); the layers by kind of query; and the policy's entropy over training. --figure plots shares and entropies.

Legend: Q queries, C candidate layers.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.ablate import TABLES, slug, train_lines
from utils.command_line.parser import Parser
from utils.datasets import Spec, get_eval_dataset
from utils.evaluation.ceiling import best, interval_of
from utils.evaluation.predictions import InferenceOptions
from utils.inference import cli
from utils.plotting import text_tables

STEPS = (60, 120, 180)  # at which entropies are printed


@dataclass
class Run:
    """A trained row with one seed, measured.

    Attributes:
        images, kinds: [Q] of each query; layers: [C]; forced: [Q, C] IoU with each layer forced.
        policy: [Q, C]; uniform without a trained gate.
        own: [Q] IoU of the run's own layer rule; rule: its name, 0-d.
        entropy: step -> nats; empty without a gate.
    """

    images: np.ndarray
    kinds: np.ndarray
    layers: np.ndarray
    forced: np.ndarray
    policy: np.ndarray
    own: np.ndarray
    rule: np.ndarray
    entropy: dict[int, float]

    @property
    def fixed_layer(self) -> int | None:
        """The layer that the rule fixes, if it does."""
        rule = str(self.rule)
        if rule == "last":
            return int(self.layers[-1])
        return int(rule.partition(":")[2]) if rule.startswith("fixed:") else None


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    found = {name: folders for runs in args.runs for name, folders in folders_of(runs).items()}
    if args.oracle not in found:
        raise ValueError(f"--oracle {args.oracle!r}: no such row in --runs; it has {', '.join(found)}")
    rows = {name: [measure(folder, args) for folder in folders] for name, folders in found.items()}
    print(report(rows, args))
    if args.figure:
        draw(rows, args)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(program="scripts/dev/study_choice.py", description=__doc__)
    add = parser.add_argument
    add("--runs", required=True, type=Path, nargs="+", metavar="DIR", help="OUTPUT/TABLE of scripts/ablate.py")
    add("--dataset_dir", required=True, metavar="DIR", help="folder that holds reason_seg/, refer_seg/, ...")
    add("--val_dataset", required=True, metavar="SPEC", help='a split with several kinds of queries: "ReasonSeg|val"')
    add("--oracle", default="policy, exact gradient", metavar="ROW", help="default: %(default)s")
    add("--figure", type=Path, metavar="FILE", help="also write a PNG")
    return parser.parse_args(argv)


def folders_of(runs: Path) -> dict[str, list[Path]]:
    """Row -> its merged runs, by seed, in the order of the table.

    Raises:
        ValueError: if the folder holds no merged run of its table.
    """
    if runs.name not in TABLES:
        raise ValueError(f"--runs {runs}: the folder's name is no table of scripts/ablate.py")
    found = {}
    for row in TABLES[runs.name]:
        matched = [re.fullmatch(rf"{slug(row.name)}-(\d+)", path.name) for path in runs.iterdir()]
        seeds = sorted(int(match[1]) for match in matched if match)
        folders = [runs / f"{slug(row.name)}-{seed}" for seed in seeds]
        if folders := [folder for folder in folders if (folder / "merged").is_dir()]:
            found[row.name] = folders
    if not found:
        raise ValueError(f"--runs {runs}: no merged run of table {runs.name} there")
    return found


def measure(folder: Path, args: argparse.Namespace) -> Run:
    """Measures a run, or reads what an earlier call has measured."""
    spec = Spec.parse(args.val_dataset)
    path = folder / f"choice.{spec.slug}.npz"
    if not path.is_file():
        from model.loading.pretrained import load
        from utils.evaluation import ceiling_pass
        from utils.evaluation.layer_analysis import LayerAnalyzer

        print(f"measuring {folder}", file=sys.stderr, flush=True)
        opened = load(folder / "merged")
        rule = opened.model.config.layer_policy
        analyzer = LayerAnalyzer(opened.model, opened.processor, InferenceOptions("teacher_forced"), 16)
        measured = ceiling_pass.measure(analyzer, get_eval_dataset(spec, args.dataset_dir), [rule])
        uniform = np.full_like(measured.mask, 1 / len(measured.layers))
        np.savez(
            path,
            images=measured.images,
            kinds=measured.kinds,
            layers=np.array(measured.layers),
            forced=measured.mask,
            policy=uniform if measured.policy is None else measured.policy,
            own=measured.rules[rule][0],
            rule=np.array(rule),
        )
    arrays = dict(np.load(path))
    lines = train_lines(folder)
    entropy = {line["step"]: line["entropy"] for line in lines} if "gate" in lines[-1]["gradients"] else {}
    return Run(**arrays, entropy=entropy)


def report(rows: dict[str, list[Run]], args: argparse.Namespace) -> str:
    """Two tables: values and gains per row, and the layers by kind of query."""
    reference = best_fixed(rows)
    fixed = mean_over_seeds([run.own for run in rows[reference]])
    oracle = mean_over_seeds([run.forced.max(1) for run in rows[args.oracle]])
    images = rows[reference][0].images
    head = ["row", "gIoU", f"gain over {reference}", "share of the oracle's gain", "own best fixed", "own oracle"]
    table = [[*head, *(f"entropy, step {step}" for step in STEPS)]]
    values = {name: mean_over_seeds([run.own for run in runs]) for name, runs in rows.items()}
    values[f"oracle of {args.oracle}"] = oracle
    for name, value in values.items():
        runs, gain = rows.get(name, []), value - fixed
        low, high = interval_of(gain, images)
        cells = [text_tables.mean_cell([100 * run.own.mean() for run in runs] or [100 * value.mean()], 1)]
        cells += [f"{100 * gain.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"]
        cells += [f"{gain.mean() / (oracle - fixed).mean():.0%}"]
        cells += [
            mean_percent([run.forced.mean(0).max() for run in runs]),
            mean_percent([run.forced.max(1).mean() for run in runs]),
        ]
        cells += [mean_cell([run.entropy[step] for run in runs if step in run.entropy]) for step in STEPS]
        table.append([name, *cells])
    return f"{text_tables.markdown(table)}\n\n{layers_by_kind(rows)}"


def best_fixed(rows: dict[str, list[Run]]) -> str:
    """The row with the largest mean IoU among those that fix a layer.

    Raises:
        ValueError: if none does.
    """
    values = {
        name: np.mean([run.own.mean() for run in runs])
        for name, runs in rows.items()
        if runs[0].fixed_layer is not None
    }
    if not values:
        raise ValueError("no row fixes a layer (last, fixed:K): there is nothing to compare with")
    return max(values, key=lambda name: values[name])


def layers_by_kind(rows: dict[str, list[Run]]) -> str:
    """Per row and kind of query: gIoU, and the layers that its rule takes most, over all seeds."""
    kinds = list(dict.fromkeys(next(iter(rows.values()))[0].kinds.tolist()))
    table = [["row", *kinds]]
    for name, runs in rows.items():
        cells = []
        for kind in kinds:
            shares = np.mean([weights_of(run)[run.kinds == kind].mean(0) for run in runs], 0)
            order = [c for c in np.argsort(-shares, kind="stable")[:2] if shares[c] >= 0.05]
            taken = ", ".join(f"{runs[0].layers[c]} ({shares[c]:.0%})" for c in order)
            cells.append(f"{100 * np.mean([run.own[run.kinds == kind].mean() for run in runs]):.1f}: {taken}")
        table.append([name, *cells])
    return f"gIoU and layers by kind of query\n\n{text_tables.markdown(table)}"


def weights_of(run: Run) -> np.ndarray:
    """[Q, C] weights of the layers in the run's own rule."""
    if run.fixed_layer is not None:
        return np.repeat((run.layers == run.fixed_layer).astype(float)[None], len(run.own), 0)
    return best(run.policy) if run.rule == "argmax" else run.policy


def mean_over_seeds(values: Sequence[np.ndarray]) -> np.ndarray:
    """[Q] means of the runs' [Q] values."""
    return np.mean(values, 0)


def mean_percent(values: Sequence[float]) -> str:
    return f"{100 * np.mean(values):.1f}" if values else "-"


def mean_cell(values: Sequence[float]) -> str:
    return f"{np.mean(values):.2f}" if values else "-"


def draw(rows: dict[str, list[Run]], args: argparse.Namespace) -> None:
    """Writes the figure: the share of the oracle's gain per row, each seed a dot; the policies' entropies."""
    from utils.plotting.charts import COLUMN, LINES, figure, save_chart

    fixed = np.mean([run.own.mean() for run in rows[best_fixed(rows)]])
    oracle = np.mean([run.forced.max(1).mean() for run in rows[args.oracle]])
    with figure(2 * COLUMN, 0.16 * len(rows) + 0.9) as fig:
        left, right = fig.subplots(1, 2, width_ratios=[1.2, 1])
        for place, runs in enumerate(rows.values()):
            shares = [100 * (run.own.mean() - fixed) / (oracle - fixed) for run in runs]
            left.barh(place, np.mean(shares), color="0.85")
            left.plot(shares, [place] * len(shares), linestyle="", marker="o", markersize=2, color=LINES[0]["color"])
        left.set_yticks(range(len(rows)), list(rows))
        left.invert_yaxis()
        left.axvline(100, linewidth=0.6, color="0.4")
        left.set_xlabel("share of the oracle's gain, %")
        left.set_title("(a)", loc="left")
        trained = {name: runs for name, runs in rows.items() if runs[0].entropy and name.startswith("policy")}
        for number, (name, runs) in enumerate(trained.items()):
            style = LINES[number % len(LINES)] | ({"marker": ""} if number < len(LINES) else {})
            steps = sorted(runs[0].entropy)
            mean = [np.mean([run.entropy[step] for run in runs]) for step in steps]
            right.plot(steps, mean, label=name, markevery=max(1, len(steps) // 6), **style)
        right.set(xlabel="step", ylim=(0, None))
        right.set_title("(b) policy's entropy, nats", loc="left")
        right.legend(fontsize=5, loc="lower left")
        folders = " ".join(map(str, args.runs))
        save_chart(args.figure, fig, f"Share of the oracle's gain per way to choose a layer; entropies. {folders}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
