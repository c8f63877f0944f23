"""Measures thoughts and rewards on queries that need a step, on the tiny family (utils/demo/two_steps.py).

    python scripts/dev/study_thoughts.py --dataset_dir data/demo

Runs of a seed, each from the one named:

- ``supervised``: the queries and the demo's, without thoughts; ``thoughts``: the same steps, images
  and queries with them
- ``supervised, grpo``, ``thoughts, grpo``, ``thoughts, both``: then by rewards, and by these and the ground truth

Prints gIoU in percent with greedy answers: of all queries, by family, of the demo's long queries; images per second of
training; and what the rewards' curves began and ended with. Finished runs are skipped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model.rewards import weights_of
from model.settings import GrpoSettings
from scripts.ablate import summary_path
from scripts.dev.study_start import OTHER_SAMPLES, gious, train
from utils.command_line.parser import Parser
from utils.datasets.spec import Spec
from utils.demo.two_steps import FAMILIES, write_two_steps
from utils.evaluation.results import Summary
from utils.inference import cli
from utils.plotting import text_tables
from utils.training.run_log import read_log

IMAGES = {"train": 3000, "val": 240}
LONG = "ReasonSeg|val_long"
SUPERVISED: dict[str, object] = {
    "dataset": "custom||refer_seg||reason_seg",
    "sample_rates": "4,1,1",
    "lora_r": 64,
    "lora_target_modules": "q_proj,k_proj,v_proj,o_proj",
    "lora_dropout": 0,
    "epochs": 3,
    "steps_per_epoch": 500,
}
THOUGHTS: dict[str, object] = {"thought_format": "tokens", "thought_probability": 1}
BY_REWARDS: dict[str, object] = {
    "vision_tower": "",
    "vision_pretrained": "",
    "dataset": "custom",
    "sample_rates": "1",
    "refer_seg_data": "",
    "lora_r": 64,
    "lora_target_modules": "q_proj,k_proj,v_proj,o_proj",
    "lora_dropout": 0,
    "freeze": "embed_tokens||lm_head",
    "questions_per_image": 1,
    "lr": 5e-4,
    "warmup_steps": 5,
    "epochs": 1,
    "steps_per_epoch": 150,
    "log_every": 5,
    "grpo_answers": 8,
    "grpo_tokens": 56,
    "grpo_kl": 5e-3,
}


class Run(NamedTuple):
    """A training run: its name, the run that it starts from (none: base weights), settings, ``--think`` afterwards."""

    name: str
    start: str
    settings: dict[str, object]
    think: str


RUNS = (
    Run("supervised", "", SUPERVISED, "auto"),
    Run("thoughts", "", SUPERVISED | THOUGHTS, "on"),
    Run("supervised, grpo", "supervised", BY_REWARDS | {"objective": "grpo"}, "auto"),
    Run(
        "thoughts, grpo",
        "thoughts",
        BY_REWARDS | {"objective": "grpo", "thought_format": "tokens", "grpo_think": "on"},
        "on",
    ),
    Run("thoughts, both", "thoughts", BY_REWARDS | THOUGHTS | {"objective": "both", "grpo_think": "on"}, "on"),
)


ENDS = ("reward_mask_iou", "tokens", "entropy", "kl")  # of the log


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    print(study(args))
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(program="scripts/dev/study_thoughts.py", description=__doc__)
    add = parser.add_argument
    add("--dataset_dir", required=True, metavar="DIR", help="the demo's data")
    add("--seeds", type=cli.whole(1), default=3, metavar="N", help="seeds 0 to N-1 (default: 3)")
    add("--output", type=Path, default=Path("runs/thoughts"), metavar="DIR", help="default: runs/thoughts")
    return parser.parse_args(argv)


def study(args: argparse.Namespace) -> str:
    """Trains and evaluates every run; returns the tables."""
    data = args.output / "data" / "two_steps.jsonl"
    if not data.is_file():
        write_two_steps(data.parent, **IMAGES)
    two_steps, values = f"custom|{data}|val", dict[str, list[list[float]]]()
    curves = [["run", "seed", "reward", *ENDS]]
    for seed in range(args.seeds):
        merged: dict[str, Path] = {}
        for run in RUNS:
            folder = args.output / f"{run.name.replace(', ', '-')}-{seed}"
            settings = run.settings | {"custom_data": data, "seed": seed}
            if run.start:
                settings |= {"version": merged[run.start], "seed": OTHER_SAMPLES + seed}
            merged[run.name] = train(folder, args, **settings)
            scores = gious(merged[run.name], args, f"{two_steps}||{LONG}", folder / "eval", "--think", run.think)
            values.setdefault(run.name, []).append(
                [*scores, *by_family(folder / "eval", two_steps), images_per_second(folder)]
            )
            if run.start:
                curves.append([run.name, str(seed), *ends(folder)])
    columns = ["two steps", LONG, *FAMILIES, "images/s"]
    rows = [["run", *columns]]
    rows += [[name, *(text_tables.mean_cell(column, 1) for column in zip(*seeds))] for name, seeds in values.items()]
    each = "\n".join(
        f"{name}: {[[round(value, 1) for value in seed] for seed in seeds]}" for name, seeds in values.items()
    )
    return f"{text_tables.markdown(rows)}\n\n{text_tables.markdown(curves)}\n\n{each}"


def by_family(results: Path, spec: str) -> Iterator[float]:
    """gIoU in percent of each of ``FAMILIES``."""
    families = Summary.load(summary_path(results, Spec.parse(spec))).breakdown["family"]
    return (100 * families[name]["gIoU"] for name in FAMILIES)


def images_per_second(folder: Path) -> float:
    """Of the logged steps but the first, which warms up."""
    speeds = [line["images_per_s"] for line in read_log(folder) if line["kind"] == "train"][1:]
    return len(speeds) / sum(1 / speed for speed in speeds)


def ends(folder: Path) -> Iterator[str]:
    """Means of the first and the last five logged steps of a run by rewards."""
    lines: list[dict[str, Any]] = [line for line in read_log(folder) if line["kind"] == "train"]

    def reward(line: dict[str, Any]) -> float:
        return sum(
            weight * line[f"grpo_reward_{each}"] for each, weight in weights_of(GrpoSettings().grpo_rewards).items()
        )

    def mean(part: list[dict[str, Any]], name: str) -> float:
        return sum(reward(line) if name == "reward" else line[f"grpo_{name}"] for line in part) / len(part)

    for name in ("reward", *ENDS):
        yield f"{mean(lines[:5], name):.3f} to {mean(lines[-5:], name):.3f}"


if __name__ == "__main__":
    sys.exit(cli.run(main))
