"""Measures thoughts and rewards on queries that need a step, on the tiny family (utils/demo/two_steps.py).

    python scripts/dev/study_thoughts.py --dataset_dir data/demo

Runs of a seed, each from the one named:

- ``supervised``: the queries and the demo's, without thoughts; ``thoughts``: the same steps, images
  and queries with them; ``half``: with half of them, so that it can answer either way
- ``supervised, grpo``, ``thoughts, grpo``, ``thoughts, both``: then by rewards, and by these and the ground truth;
  ``half, grpo``: by rewards, free to think or not

Prints gIoU in percent with greedy answers: of all queries, by family, of the demo's long queries; images per second of
training; how often thoughts name the right shapes, and what that does to the masks; and what the rewards' curves began
and ended with, which ``--figure`` draws. Finished runs are skipped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.ablate import summary_path
from scripts.dev.study_start import OTHER_SAMPLES, gious, train
from utils.command_line.parser import Parser
from utils.datasets.spec import Spec
from utils.demo.two_steps import FAMILIES, write_two_steps
from utils.evaluation.results import Summary, read_results, result_path
from utils.inference import cli
from utils.plotting import text_tables
from utils.plotting.charts import COLUMN, LINES, figure, running_mean, save_chart
from utils.training.run_log import read_log

Log = list[dict[str, float]]
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
    Run("half", "", SUPERVISED | THOUGHTS | {"thought_probability": 0.5}, "auto"),
    Run("half, grpo", "half", BY_REWARDS | {"objective": "grpo", "thought_format": "tokens"}, "auto"),
)


ENDS = ("reward", "reward_mask_iou", "tokens", "entropy", "kl")  # of ``rewards_log``
CURVES = {"reward": "reward of an answer", "tokens": "its tokens", "entropy": "entropy of a token, nats"}


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
    add("--figure", type=Path, metavar="FILE", help="also write a PNG of the rewards' curves")
    return parser.parse_args(argv)


def study(args: argparse.Namespace) -> str:
    """Trains and evaluates every run; returns the tables."""
    data = args.output / "data" / "two_steps.jsonl"
    if not data.is_file():
        write_two_steps(data.parent, **IMAGES)
    two_steps, values, logs = f"custom|{data}|val", dict[str, list[list[float]]](), dict[str, list[Log]]()
    thoughts: dict[str, list[Thought]] = {}
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
            if "thought_format" in run.settings:
                thoughts.setdefault(run.name, []).extend(read_thoughts(folder / "eval", two_steps, data))
            if run.start:
                logs.setdefault(run.name, []).append(rewards_log(folder))
    columns = ["two steps", LONG, *FAMILIES, "images/s"]
    rows = [["run", *columns]]
    rows += [[name, *(text_tables.mean_cell(column, 1) for column in zip(*seeds))] for name, seeds in values.items()]
    each = "\n".join(
        f"{name}: {[[round(value, 1) for value in seed] for seed in seeds]}" for name, seeds in values.items()
    )
    ends = [["run", "seed", *ENDS]]
    for name, seeds in logs.items():
        ends += [[name, str(seed), *(first_and_last(lines, each) for each in ENDS)] for seed, lines in enumerate(seeds)]
    if args.figure:
        draw(logs, args.figure)
    tables = (rows, thought_rows(thoughts), ends)
    return "\n\n".join((*map(text_tables.markdown, tables), each))


def by_family(results: Path, spec: str) -> Iterator[float]:
    """gIoU in percent of each of ``FAMILIES``."""
    families = Summary.load(summary_path(results, Spec.parse(spec))).breakdown["family"]
    return (100 * families[name]["gIoU"] for name in FAMILIES)


class Thought(NamedTuple):
    """A thought, if there is one, against the data's: are its first sentences right, is its last one? And the mask's
    IoU."""

    family: str
    thinks: bool
    steps: bool
    target: bool
    iou: float


def read_thoughts(results: Path, spec: str, data: Path) -> Iterator[Thought]:
    """Of each answer of a benchmark of our own data."""
    true = [json.loads(line)["thought"] for line in data.read_text().splitlines()]
    for record in read_results(result_path(results, Spec.parse(spec), "generate"))[1]:
        *steps, target = record.thought.rstrip(". ").split(". ")
        *true_steps, true_target = true[int(record.query_id) - 1].rstrip(". ").split(". ")
        right = steps == true_steps, target == true_target
        yield Thought(record.meta["family"], bool(record.thought), *right, record.I / max(1, record.U))


def thought_rows(thoughts: dict[str, list[Thought]]) -> list[list[str]]:
    """Per cent of each run and family: answers with thoughts; of these right steps, right target, gIoU where the target
    is right, and where not; gIoU of answers without."""
    rows = [["run", "family", "thinks", "steps right", "target right", "its gIoU", "gIoU otherwise", "without"]]
    for name, every in thoughts.items():
        for family in FAMILIES:
            answers = [each for each in every if each.family == family]
            own = [each for each in answers if each.thinks]
            parts: list[list[float]] = [[each.thinks for each in answers]]
            parts += [[each.steps for each in own], [each.target for each in own]]
            parts += [[each.iou for each in own if each.target is right] for right in (True, False)]
            parts.append([each.iou for each in answers if not each.thinks])
            rows.append([name, family, *(f"{100 * sum(part) / len(part):.0f}" if part else "-" for part in parts)])
    return rows


def images_per_second(folder: Path) -> float:
    """Of the logged steps but the first, which warms up."""
    speeds = [line["images_per_s"] for line in read_log(folder) if line["kind"] == "train"][1:]
    return len(speeds) / sum(1 / speed for speed in speeds)


def rewards_log(folder: Path) -> Log:
    """The logged steps of a run by rewards; of answers' values, the names are without ``grpo_``."""
    lines = [line for line in read_log(folder) if line["kind"] == "train"]
    return [{name.removeprefix("grpo_"): value for name, value in line.items()} for line in lines]


def first_and_last(lines: Log, name: str) -> str:
    """Means of the first and the last five logged steps."""
    means = [sum(line[name] for line in part) / len(part) for part in (lines[:5], lines[-5:])]
    return "{:.3f} to {:.3f}".format(*means)


def draw(logs: dict[str, list[Log]], path: Path) -> None:
    """Writes the figure: ``CURVES`` over the steps of each run, as running means; thin lines are single seeds."""
    with figure(2 * COLUMN, 2.0) as fig:
        panels = fig.subplots(1, len(CURVES))
        for axes, (name, title) in zip(panels, CURVES.items(), strict=True):
            for (run, seeds), style in zip(logs.items(), LINES):
                steps = [line["step"] for line in seeds[0]]
                table = np.array([[line[name] for line in lines] for lines in seeds])
                for values in table:
                    axes.plot(steps, running_mean(values, 5), color=style["color"], linewidth=0.4, alpha=0.5)
                axes.plot(steps, running_mean(table.mean(0), 5), label=run, **(style | {"marker": ""}))
            axes.set_title(title, loc="left")
            axes.set_xlabel("step")
        panels[1].set_ylim(bottom=0)
        fig.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(logs), handlelength=2.6
        )
        save_chart(path, fig, "Reward, length and entropy of sampled answers over training by rewards.")


if __name__ == "__main__":
    sys.exit(cli.run(main))
