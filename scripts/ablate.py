"""Trains and evaluates the rows of an ablation table over several seeds, and prints them beside the paper's numbers.

    python scripts/ablate.py --table 6 --config configs/tiny.yaml --seeds 3
    python scripts/ablate.py --table layers --config configs/tiny.yaml --curves "policy||last"

``layers`` compares layer rules, ``baselines`` ways to learn the policy, ``choice`` and ``choice_rewards`` ways and
rewards to choose a layer on a base where that pays (scripts/dev/study_choice.py), ``choice_answers`` to choose it by
the rewards of sampled answers, ``methods`` UGround and related methods (the ppm, loss and decoder sections of
configs/methods/*.yaml and what these freeze, with --config's base and data).

A row is a few settings of train_ds.py. Each row and seed is a run of its own (``OUTPUT/TABLE/ROW-SEED``): trained,
merged and evaluated by the programs that users call. Finished runs are skipped, interrupted ones are resumed. Other
flags are settings of train_ds.py for all rows. The paper's numbers are those of UGround-7B on ReasonSeg val; a tiny
model's are those of drawn scenes, so only the order of the rows is comparable.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.command_line.parser import Parser
from utils.config import Config, ConfigError, WithoutEffectError, load_config, make_parser
from utils.datasets.spec import Spec
from utils.evaluation import metrics
from utils.evaluation.benchmarks import benchmark_of
from utils.evaluation.metrics import Record
from utils.evaluation.results import Summary, read_results, result_path
from utils.inference import cli
from utils.plotting import text_tables
from utils.plotting.overlays import LINES
from utils.training.lineage import adopt
from utils.training.run_log import read_log
from utils.training.versions import git_commit

ROOT = Path(__file__).resolve().parents[1]
METRICS = ("gIoU", "cIoU")


@dataclass(frozen=True)
class AblationRow:
    """A row of a table.

    Attributes:
        settings: of train_ds.py; tiny: those that take their place on the tiny family.
        paper: its gIoU and cIoU in percent, if any.
    """

    name: str
    settings: dict[str, str]
    paper: tuple[float, float] | None = None
    tiny: dict[str, str] = field(default_factory=dict)


def ppm(layers: str, seg: bool, mask: bool) -> dict[str, str]:
    """The three switches of Table 6. The policy's term needs a policy, the map's a mask prompt."""
    off = {} if mask else {"map_loss_weight": "0"}
    return {"layer_selection": layers, "seg_prompt": str(seg).lower(), "mask_prompt": str(mask).lower(), **off}


def as_flag(value: object) -> str:
    """A setting's value in the syntax of the command line."""
    if isinstance(value, tuple):
        return "||".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def method_rows() -> tuple[AblationRow, ...]:
    """The settings of configs/methods; methods that differ only in their data share a row.

    Sizes of CLIP's input and of a pixel decoder are those of configs/tiny_METHOD.yaml on the tiny family.
    """
    paper = {"uground": (66.1, 72.1), "read": (59.8, 67.6), "lisa": (61.3, 62.9)}  # Table 3, ReasonSeg val, fine-tuned
    names: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for name in ("uground", "read", "lisa", "gsva", "sesame", "pixellm"):
        config = load_config(["--config", str(ROOT / f"configs/methods/{name}.yaml")])
        sections = vars(config.ppm) | vars(config.loss) | vars(config.decoder)
        if config.model.freeze:
            sections["freeze"] = config.model.freeze
        settings = {key: as_flag(value) for key, value in sections.items()}
        names.setdefault(tuple(settings.items()), []).append(name)
    return tuple(
        AblationRow(", ".join(methods), dict(settings), paper.get(methods[0]), tiny_sizes(methods[0]))
        for settings, methods in names.items()
    )


def tiny_sizes(method: str) -> dict[str, str]:
    """Sizes of a method on the tiny family; {} without a file for it."""
    path = ROOT / f"configs/tiny_{method}.yaml"
    decoder = load_config(["--config", str(path)]).decoder if path.is_file() else None
    return {name: as_flag(getattr(decoder, name)) for name in ("clip_resize", "decoder_width")} if decoder else {}


SHORT_ANSWERS = {"grpo_tokens": "16", "lora_dropout": "0"}
TABLES: dict[str, tuple[AblationRow, ...]] = {
    "6": (
        AblationRow("[SEG] prompt", ppm("last", True, False), (19.13, 15.62)),
        AblationRow("mask prompt", ppm("last", False, True), (60.30, 53.86)),
        AblationRow("both", ppm("last", True, True), (64.06, 67.05)),
        AblationRow("SSC, [SEG] prompt", ppm("policy", True, False) | {"map_loss_weight": "1"}, (31.76, 34.08)),
        AblationRow("SSC, mask prompt", ppm("policy", False, True), (52.14, 52.42)),
        AblationRow("SSC, both", ppm("policy", True, True), (66.13, 72.07)),
    ),
    "7": tuple(
        AblationRow(terms.replace("||", " and "), {"map_terms": terms}, paper)
        for terms, paper in (
            ("bce", (64.56, 71.44)),
            ("dice", (64.57, 68.63)),
            ("gaussian_bce", (63.16, 65.74)),
            ("gaussian_dice", (65.80, 73.49)),
            ("bce||dice", (63.92, 68.55)),
            ("gaussian_bce||gaussian_dice", (66.13, 72.07)),
        )
    ),
    "8": (
        AblationRow("BCE", {"reward_terms": "bce"}, (65.37, 69.53)),
        AblationRow("dice", {"reward_terms": "dice"}, (63.34, 68.33)),
        AblationRow("both", {"reward_terms": "both"}, (66.13, 72.07)),
        AblationRow("IoU", {"reward_terms": "iou"}),
        AblationRow("BCE and dice of the mask", {"reward_terms": "mask"}),
        AblationRow("IoU of the mask", {"reward_terms": "mask_iou"}),
        AblationRow("IoU of the mask, leave-one-out", {"reward_terms": "mask_iou", "policy_gradient": "leave_one_out"}),
    ),
    "9": (
        AblationRow("soft gating", {"layer_selection": "soft"}, (61.19, 65.52)),
        AblationRow("policy", {"layer_selection": "policy"}, (66.13, 72.07)),
        AblationRow("classifier, soft gating", {"layer_selection": "ce_soft"}),
    ),
    "baselines": (
        AblationRow("moving average", {"baseline": "average"}, (66.13, 72.07)),
        AblationRow("moving average from the first reward", {"baseline_start": "first"}),
        AblationRow("critic", {"baseline": "critic"}),
        AblationRow("critic of the state", {"baseline": "state_critic"}),
        AblationRow("leave-one-out", {"policy_gradient": "leave_one_out"}),
        AblationRow("exact gradient", {"policy_gradient": "exact"}),
    ),
    "layers": (
        AblationRow("policy", {"layer_selection": "policy"}, (66.13, 72.07)),
        AblationRow("last", {"layer_selection": "last"}, (64.06, 67.05)),
        AblationRow("uniform", {"layer_selection": "uniform"}),
        AblationRow("policy, exact gradient", {"policy_gradient": "exact"}),
        AblationRow("soft gating", {"layer_selection": "soft"}, (61.19, 65.52)),
        AblationRow("layer 7", {"layer_selection": "fixed:7"}),
        AblationRow("layer 6", {"layer_selection": "fixed:6"}),
        AblationRow("policy, 10 x the gate's rate", {"gate_lr_factor": "10"}),
        AblationRow("policy, baseline from the first reward", {"baseline_start": "first"}),
        AblationRow("policy, critic", {"baseline": "critic"}),
        AblationRow("policy, critic of the state", {"baseline": "state_critic"}),
        AblationRow("policy, entropy bonus", {"entropy_bonus": "0.02"}),
        AblationRow("classifier, soft gating", {"layer_selection": "ce_soft"}),
    ),
    "choice": (
        AblationRow("layer 4", {"layer_selection": "fixed:4"}),
        AblationRow("layer 5", {"layer_selection": "fixed:5"}),
        AblationRow("layer 6", {"layer_selection": "fixed:6"}),
        AblationRow("last", {"layer_selection": "last"}, (64.06, 67.05)),
        AblationRow("uniform", {"layer_selection": "uniform"}),
        AblationRow("soft gating", {"layer_selection": "soft"}, (61.19, 65.52)),
        AblationRow("classifier, soft gating", {"layer_selection": "ce_soft"}),
        AblationRow("policy", {"layer_selection": "policy"}, (66.13, 72.07)),
        AblationRow("policy, baseline from the first reward", {"baseline_start": "first"}),
        AblationRow("policy, critic of the release", {"baseline": "critic"}),
        AblationRow("policy, critic of the state", {"baseline": "state_critic", "baseline_start": "first"}),
        AblationRow("policy, 10 x the gate's rate", {"gate_lr_factor": "10"}),
        AblationRow("policy, exact gradient", {"policy_gradient": "exact"}),
        AblationRow("policy, exact gradient, 10 x the rate", {"policy_gradient": "exact", "gate_lr_factor": "10"}),
        AblationRow(
            "policy, exact gradient, best rated of 4",
            {"policy_gradient": "exact", "iou_loss_weight": "1", "val_layer_policy": "best:4"},
        ),
        AblationRow(
            "uniform, best rated of 8",
            {"layer_selection": "uniform", "iou_loss_weight": "1", "val_layer_policy": "best:8"},
        ),
    ),
    "choice_rewards": tuple(
        AblationRow(name, {"reward_terms": reward, **settings})
        for reward, name, settings in (
            ("iou", "map IoU, policy", {}),
            ("iou", "map IoU, baseline from the first reward", {"baseline_start": "first"}),
            ("iou", "map IoU, critic of the state", {"baseline": "state_critic", "baseline_start": "first"}),
            ("iou", "map IoU, exact gradient", {"policy_gradient": "exact"}),
            ("mask", "mask, baseline from the first reward", {"baseline_start": "first"}),
            ("mask_iou", "mask IoU, baseline from the first reward", {"baseline_start": "first"}),
            ("mask_iou", "mask IoU, critic of the state", {"baseline": "state_critic", "baseline_start": "first"}),
            ("both", "map, leave-one-out", {"policy_gradient": "leave_one_out"}),
            ("mask_iou", "mask IoU, leave-one-out", {"policy_gradient": "leave_one_out"}),
        )
    ),
    "choice_answers": (
        AblationRow("policy", {"layer_selection": "policy"}, (66.13, 72.07)),
        AblationRow("objective grpo", SHORT_ANSWERS | {"objective": "grpo"}),
        AblationRow("objective both", SHORT_ANSWERS | {"objective": "both", "policy_loss_weight": "0"}),
    ),
    "methods": method_rows(),
}


def main(argv: list[str] | None = None) -> int:
    args, settings = parse_arguments(argv)
    config = load_config(["--config", str(args.config), *settings])
    rows, specs = TABLES[args.table], tuple(map(Spec.parse, config.eval.val_dataset))
    if other := [spec for spec in specs if not set(METRICS) <= set(benchmark_of(spec).metrics)]:
        raise ValueError(f"--val_dataset {other[0]} has no {' and '.join(METRICS)}, which the tables report")
    rows = startable(rows, args, settings)
    results: dict[str, list[Path]] = {}
    for seed in range(args.seeds):  # one seed of the whole table before the next
        for row in rows:
            folder = args.output / args.table / f"{slug(row.name)}-{seed}"
            print(f"{row.name}, seed {seed}: {folder}", flush=True)
            results.setdefault(row.name, []).append(run_row(row, seed, folder, args, settings, specs))
    table = f"{results_table(rows, results, specs, args)}\n{differences_to_first(rows, results, specs)}"
    path = args.output / args.table / "table.md"
    path.write_text(table)
    print(f"\n{table}\nwrote {path}")
    if args.curves:
        curve_rows = [row for row in rows if row.name in args.curves]
        pictures = plot_curves(curve_rows, results, specs, config.data.dataset_dir, args.output / args.table)
        print("".join(f"wrote {path}\n" for path in pictures), end="")
    return 0


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(program="train_ds.py", description=__doc__)
    parser.add_argument(
        "--table", required=True, choices=sorted(TABLES), help="the paper's number of the table, or what is compared"
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML of train_ds.py")
    parser.add_argument(
        "--seeds", type=cli.whole(1), default=3, metavar="N", help="runs per row, of seeds 0 to N-1 (default 3)"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/ablate"), metavar="DIR", help="default: runs/ablate")
    parser.add_argument(
        "--curves",
        type=lambda text: text.split("||"),
        default=[],
        metavar="ROW||ROW",
        help=f"also plot Fig. 2 for these rows, {len(LINES)} at most: cIoU with each layer forced (evaluates every "
        "layer of every run), and the loss of its similarity maps, at the end and over training",
    )
    args, settings = parser.parse_with_settings(make_parser(), argv)
    names = [row.name for row in TABLES[args.table]]
    if unknown := [name for name in args.curves if name not in names]:
        parser.error(f"--curves: table {args.table} has no row {unknown[0]!r}; it has {'||'.join(names)}")
    for row in TABLES[args.table]:
        if row.name in args.curves and settings_of(row, args, settings)[1].grpo.objective == "grpo":
            parser.error(f"--curves: {row.name} has no losses of maps to plot (objective grpo)")
    if len(args.curves) > len(LINES):
        parser.error(f"--curves: {len(args.curves)} rows; at most {len(LINES)} lines are distinguishable")
    return args, settings


def slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def run_row(
    row: AblationRow, seed: int, folder: Path, args: argparse.Namespace, settings: list[str], specs: tuple[Spec, ...]
) -> Path:
    """Trains, merges and evaluates one row with one seed; returns the folder of its results."""
    results = folder / "eval"
    row_settings, config = settings_of(row, args, settings)
    train = ["train_ds.py", "--config", str(args.config), *row_settings, "--seed", str(seed), "--auto_resume", "true"]
    train += ["--log_base_dir", str(folder.parent), "--exp_name", folder.name]
    check_same_settings(folder / "ablate.json", train)
    if all(summary_path(results, spec).is_file() for spec in specs):
        return results
    call(folder, train)
    call(folder, ["scripts/merge_lora.py", "--checkpoint", str(folder), "--output", str(folder / "merged")])
    test = ["test.py", "--version", str(folder / "merged"), "--dataset_dir", config.data.dataset_dir]
    test += ["--mode", "generate"]
    call(folder, [*test, "--val_dataset", "||".join(map(str, specs)), "--batch_size", "16", "--output", str(results)])
    return results


def settings_of(row: AblationRow, args: argparse.Namespace, settings: list[str]) -> tuple[list[str], Config]:
    """Flags of a row, and its configuration. Settings for all rows that this one switches off are left out.

    What a row freezes is frozen beside what all rows freeze.
    """
    shared = load_config(["--config", str(args.config), *settings]).model
    is_tiny = shared.vision_tower == load_config(["--config", str(ROOT / "configs/tiny.yaml")]).model.vision_tower
    values = row.settings | (row.tiny if is_tiny else {})
    if "freeze" in values:
        values["freeze"] = as_flag(tuple(dict.fromkeys((*shared.freeze, *values["freeze"].split("||")))))
    own = [part for key, value in values.items() for part in (f"--{key}", value)]
    try:
        return [*settings, *own], load_config(["--config", str(args.config), *settings, *own])
    except WithoutEffectError as error:
        kept, keep = [], True
        for part in settings:
            keep = part[2:].partition("=")[0] not in error.names if part.startswith("--") else keep
            kept += [part] if keep else []
        if kept == settings:
            raise
        return settings_of(row, args, kept)


def startable(rows: tuple[AblationRow, ...], args: argparse.Namespace, settings: list[str]) -> tuple[AblationRow, ...]:
    """The rows that can start from the model in ``--version``; says why others are left out.

    Raises:
        ConfigError: if none can, or the first, with which the others are compared, cannot.
    """
    kept = []
    for row in rows:
        _, config = settings_of(row, args, settings)
        try:
            adopt(config)
        except ConfigError as error:
            if row is rows[0]:
                raise
            print(f"{row.name} is left out: {error}")
        else:
            kept.append(row)
    return tuple(kept)


def check_same_settings(path: Path, train: list[str]) -> None:
    """Records the command of a run, and rejects a folder with a run of other settings.

    Raises:
        ValueError: if the run in this folder was started with another command.
    """
    if path.is_file() and (before := json.loads(path.read_text())) != train:
        raise ValueError(f"{path.parent} holds a run of other settings; give another --output\n  there: "
                         f"{' '.join(before)}\n  now:   {' '.join(train)}")  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(train) + "\n")


def summary_path(results: Path, spec: Spec) -> Path:
    return result_path(results, spec, "generate").with_suffix(".json")


def call(folder: Path, command: list[str]) -> None:
    """Runs a program of this project, with its output in ``FOLDER/ablate.log``.

    Raises:
        ValueError: if it fails; quotes the last lines of the log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "ablate.log"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with log.open("a") as file:
        process = subprocess.run(
            [sys.executable, str(ROOT / command[0]), *command[1:]], stdout=file, stderr=file, env=environment
        )
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise ValueError(f"{command[0]} failed ({log}):\n{tail}")


def results_table(
    rows: tuple[AblationRow, ...], results: dict[str, list[Path]], specs: tuple[Spec, ...], args: argparse.Namespace
) -> str:
    """A line per row: mean ± standard deviation over seeds in percent, the layers chosen, the policy's final entropy,
    and the paper's numbers."""
    head = ["row", *(f"{spec} {metric}" for spec in specs for metric in METRICS)]
    head += ["layers", "entropy", "paper gIoU", "paper cIoU"]
    lines = [head]
    for row in rows:
        loaded = [[Summary.load(summary_path(folder, spec)) for spec in specs] for folder in results[row.name]]
        cells = [
            text_tables.mean_cell([100 * seed[n].metrics[metric] for seed in loaded], 1)
            for n in range(len(specs))
            for metric in METRICS
        ]
        layers = sorted({int(layer) for seed in loaded for summary in seed for layer in summary.layers})
        paper = [f"{value:.2f}" for value in row.paper] if row.paper else ["-", "-"]
        entropies = [value for folder in results[row.name] for value in final_entropy(folder.parent)]
        entropy = text_tables.mean_cell(entropies, 2) if entropies else "-"
        lines.append([row.name, *cells, ", ".join(map(str, layers)), entropy, *paper])
    title = f"`{shlex.join(['python', *sys.argv])}`, commit {git_commit()}\n\n"
    title += f"Table {args.table}, {args.config}, {args.seeds} seed(s), mean ± standard deviation in percent"
    return f"{title}; entropy of the policy at the end in nats\n\n{text_tables.markdown(lines)}\n"


def final_entropy(run: Path) -> list[float]:
    """[entropy of the policy at the last step]; empty if no gate was trained."""
    return list(policy_entropies(train_lines(run)).values())[-1:]


def differences_to_first(rows: tuple[AblationRow, ...], results: dict[str, list[Path]], specs: tuple[Spec, ...]) -> str:
    """Gain of every row over the first one, over all seeds, with paired intervals over images."""

    def records(row: AblationRow, spec: Spec) -> list[Record]:
        paths = [result_path(folder, spec, "generate") for folder in results[row.name]]
        return [record for path in paths for record in read_results(path)[1]]

    lines = [["row", *(f"{spec} {metric}" for spec in specs for metric in METRICS)]]
    for row in rows[1:]:
        cells = []
        for spec in specs:
            gains = metrics.difference(records(rows[0], spec), records(row, spec), benchmark_of(spec))
            for name in METRICS:
                gain, bounds = gains[name]
                cells.append("{:+.1f} [{:+.1f}, {:+.1f}]".format(100 * gain, *(100 * bound for bound in bounds)))
        lines.append([row.name, *cells])
    title = f"Difference to {rows[0].name}, points, 95% interval (paired, over images; not over seeds)"
    return f"{title}\n\n{text_tables.markdown(lines)}\n"


def plot_curves(
    rows: list[AblationRow], results: dict[str, list[Path]], specs: tuple[Spec, ...], dataset_dir: str, output: Path
) -> list[Path]:
    """Writes Fig. 2 of every split, and the losses over training; means over seeds. Returns the paths."""
    from utils.plotting.charts import layer_curves, save_chart, training_curves

    runs = {row.name: [folder.parent for folder in results[row.name]] for row in rows}
    for run in itertools.chain(*runs.values()):
        if not (run / "analysis" / "index.md").is_file():
            command = ["scripts/analyze.py", "--version", str(run / "merged"), "--dataset_dir", dataset_dir]
            command += ["--val_dataset", "||".join(map(str, specs)), "--mode", "generate", "--batch_size", "16"]
            call(run, [*command, "--samples", "0", "--output", str(run / "analysis")])
    seeds = f"Means over {len(results[rows[0].name])} seed(s)."
    paths = []
    for spec in specs:
        ciou, loss = (
            {name: mean_by_layer(row_runs, spec, key) for name, row_runs in runs.items()}
            for key in ("cIoU", "map_loss")
        )
        paths.append(output / f"{spec.slug}.fig2.png")
        save_chart(paths[-1], layer_curves(ciou, loss), f"Fig. 2 on {spec}: forced layer, loss of its maps. {seeds}")
    logs = {name: [train_lines(run) for run in row_runs] for name, row_runs in runs.items()}
    map_logs = {
        name: [[line for line in log if "map_loss_by_layer" in line] for log in row_runs]
        for name, row_runs in logs.items()
    }
    losses = {
        name: np.mean([[line["map_loss_by_layer"] for line in log] for log in row_runs], 0)
        for name, row_runs in map_logs.items()
    }
    entropies = {
        name: np.mean([list(policy_entropies(log).values()) for log in row_runs], 0)
        for name, row_runs in map_logs.items()
        if policy_entropies(row_runs[0])
    }
    paths.append(output / "training.png")
    steps = [line["step"] for line in map_logs[rows[0].name][0]]
    save_chart(paths[-1], training_curves(losses, entropies, steps), f"Loss of each layer's maps, training. {seeds}")
    return paths


def mean_by_layer(runs: list[Path], spec: Spec, column: str) -> list[float]:
    """[L] means over runs of a column of analyze.py's table of layers."""
    tables = []
    for run in runs:
        with (run / "analysis" / f"{spec.slug}.layers.csv").open(encoding="utf-8", newline="") as file:
            tables.append([float(row[column]) for row in csv.DictReader(file)])
    return np.mean(tables, 0).tolist()


def train_lines(run: Path) -> list[dict[str, Any]]:
    """The training steps in a run's log."""
    return [line for line in read_log(run) if line["kind"] == "train"]


def policy_entropies(lines: list[dict[str, Any]]) -> dict[int, float]:
    """Step -> entropy of the policy, of sampled answers where the log has no others; {} if no gate was trained."""
    if "gate" not in lines[-1]["gradients"]:
        return {}
    entropies = {line["step"]: line.get("entropy", line.get("grpo_layer_entropy")) for line in lines}
    return {step: entropy for step, entropy in entropies.items() if entropy is not None}


if __name__ == "__main__":
    sys.exit(cli.run(main))
