"""Evaluates a published checkpoint and compares its figures with the published ones (docs/zoo.md).

    python scripts/reproduce.py --list
    python scripts/reproduce.py uground-7b-reasonseg-val --dataset_dir dataset
    python scripts/reproduce.py uground-7b-reasonseg-val --dataset_dir dataset -- --batch_size 16

Flags after -- are those of test.py. Exit code: 0 if all figures agree, 1 if one does not, 2 for errors.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.command_line.parser import Parser
from utils.datasets import get_eval_dataset
from utils.datasets.base import MissingDataError
from utils.evaluation import zoo
from utils.evaluation.results import Summary, result_path
from utils.evaluation.zoo import Checkpoint, Figure, Obtained
from utils.files import write_atomically
from utils.inference import cli
from utils.plotting import text_tables
from utils.training.versions import git_commit

ROOT = Path(__file__).resolve().parents[1]
OWN = ("version", "vision_tower", "dataset_dir", "output", "limit", "val_dataset", "mode")  # flags that it sets
METHOD = ("protocol", "several_seg", "layer_policy", "allow_missing")  # flags that make another figure


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="of a checkpoint; --list prints all")
    add("--dataset_dir", metavar="DIR", help="folder that holds reason_seg/, refer_seg/, ...")
    add("--list", action="store_true", help="print the checkpoints, and which of their figures were obtained here")
    add("--version", default="", metavar="DIR", help="folder of the weights (default: their id on the hub)")
    add("--vision_tower", default="", metavar="DIR", help="CLIP's folder (default: its id on the hub)")
    add("--limit", type=cli.whole(1), metavar="N", help="only the first N images; the figures are then not compared")
    add("--output", type=Path, metavar="DIR", help="folder for the results (default: runs/zoo/NAME)")
    add("--record", action="store_true", help="write figures, commit and device into --zoo, and --page")
    add("--zoo", type=Path, default=ROOT / "configs/zoo.yaml", metavar="FILE", help="(default: configs/zoo.yaml)")
    add("--page", type=Path, nargs="?", const=ROOT / "docs/zoo.md", metavar="FILE", help="write the page of the zoo")
    args = parser.parse_args(words[:split])
    args.more = words[split + 1 :]
    refused = (*OWN, *METHOD) if args.record else OWN
    if wrong := [word for word in args.more if word.removeprefix("--").partition("=")[0] in refused]:
        parser.error(
            f"{', '.join(wrong)} after --: the zoo's file or a flag before -- gives it, so that a figure is what it "
            "says"
        )
    if not (args.name or args.list or args.page):
        parser.error("give the NAME of a checkpoint, or --list")
    if args.name and not (args.dataset_dir or args.list):
        parser.error("--dataset_dir is missing: the folder that holds reason_seg/, refer_seg/, ...")
    if args.record and args.limit:
        parser.error("--record with --limit: figures of a part of a split are no figures of the split")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    checkpoints = zoo.load(args.zoo)
    if args.list:
        print("\n".join(text_tables.aligned(overview(checkpoints), "l")))
    elif args.name:
        return reproduce(args, checkpoints)
    elif args.page:
        write_atomically(args.page, zoo.page(checkpoints))
        print(f"wrote {args.page}")
    return 0


def overview(checkpoints: Sequence[Checkpoint]) -> list[list[str]]:
    rows = [["name", "weights", "benchmark", "published", "obtained here"]]
    for checkpoint in checkpoints:
        start = [checkpoint.name, checkpoint.version or checkpoint.download]
        for figure in checkpoint.figures:
            published = zoo.figures_text(figure.published) or "-"
            rows.append([*start, figure.benchmark, published, str(figure.obtained or zoo.NOT_RUN)])
        if checkpoint.refused:
            rows.append([*start, "-", "-", "not supported"])
    return rows


def reproduce(args: argparse.Namespace, checkpoints: list[Checkpoint]) -> int:
    """Evaluates one checkpoint, prints the comparison, and records it if asked to."""
    checkpoint = find(args.name, checkpoints, args.zoo)
    commit = git_commit()
    if args.record and not commit.isalnum():
        raise ValueError(f"--record: this code is of no commit ({commit}); commit the changes first")
    version = args.version or checkpoint.version
    if not version:
        raise ValueError(
            f"{checkpoint.name} is not on the hub: download it from {checkpoint.download} and give --version"
        )
    figures = available(checkpoint, args.dataset_dir)
    output = args.output or Path("runs/zoo") / checkpoint.name
    obtained = evaluate(args, checkpoint, figures, version, output)
    pairs = [(figure, percent(figure, summary)) for figure, summary in obtained]
    rows, agree = zoo.compare(checkpoint, pairs)
    print("\n" + "\n".join(text_tables.aligned(rows, "lllrrrl")))
    if args.limit:
        print(f"of the first {args.limit} images: not comparable with figures of whole splits")
        return 0
    if args.record:
        for figure, summary in obtained:
            figure.obtained = describe(figure, summary, commit)
        zoo.save(args.zoo, checkpoints)
        page = args.page or ROOT / "docs/zoo.md"
        write_atomically(page, zoo.page(checkpoints))
        print(f"wrote {args.zoo}\nwrote {page}")
    return 0 if agree else 1


def find(name: str, checkpoints: Sequence[Checkpoint], path: Path) -> Checkpoint:
    """The checkpoint of a name.

    Raises:
        ValueError: for one that is unknown, that cannot be loaded, or without benchmarks.
    """
    found = next((checkpoint for checkpoint in checkpoints if checkpoint.name == name), None)
    if found is None:
        names = ", ".join(checkpoint.name for checkpoint in checkpoints)
        raise ValueError(f"no checkpoint {name!r} in {path}; there are {names}")
    if found.refused:
        raise ValueError(f"{name} is not supported: {found.refused}")
    if not found.figures:
        raise ValueError(f"{name} has no benchmark in {path} ({found.note})")
    return found


def available(checkpoint: Checkpoint, dataset_dir: str) -> list[Figure]:
    """The figures whose data are there; the others are named.

    Raises:
        ValueError: if no data are there, or if they are damaged.
    """
    figures, missing = [], []
    for figure in checkpoint.figures:
        try:
            get_eval_dataset(figure.spec, dataset_dir)
            figures.append(figure)
        except MissingDataError as error:
            missing.append(f"{figure.benchmark}: {error}")
    if not figures:
        raise ValueError("\n  ".join([f"{dataset_dir} holds no benchmark of {checkpoint.name}:", *missing]))
    print(*(f"not evaluated: {line}" for line in missing), sep="\n", end="\n" if missing else "")
    return figures


def evaluate(
    args: argparse.Namespace, checkpoint: Checkpoint, figures: Sequence[Figure], version: str, output: Path
) -> list[tuple[Figure, Summary]]:
    """Runs test.py once per mode; returns its summaries.

    Raises:
        ValueError: if test.py ends with an error.
    """
    tower = args.vision_tower or checkpoint.vision_tower
    flags = {"version": version, "vision_tower": tower, "dataset_dir": args.dataset_dir, "output": str(output)}
    flags |= checkpoint.flags | ({"limit": str(args.limit)} if args.limit else {})
    for mode in dict.fromkeys(figure.asked for figure in figures):
        specs = "||".join(figure.benchmark for figure in figures if figure.asked == mode)
        words = [f"--{name}={value}" for name, value in (flags | {"mode": mode, "val_dataset": specs}).items() if value]
        command = [sys.executable, str(ROOT / "test.py"), *words, *args.more]
        print(shlex.join(["python", "test.py", *command[2:]]), flush=True)
        code = subprocess.run(command, env=os.environ | {"PYTHONUNBUFFERED": "1"}).returncode
        if code:
            raise ValueError(f"test.py ended with exit code {code}; its message is above")
    paths = [result_path(output, figure.spec, figure.asked).with_suffix(".json") for figure in figures]
    return [(figure, Summary.load(path)) for figure, path in zip(figures, paths, strict=True)]


def percent(figure: Figure, summary: Summary) -> dict[str, float]:
    """The published metrics, or all if none is published."""
    names = figure.published or summary.metrics
    return {name: round(100 * summary.metrics[name], 2) for name in names}


def describe(figure: Figure, summary: Summary, commit: str) -> Obtained:
    device, checkpoint = summary.device or "", summary.checkpoint
    if device.startswith("cuda"):
        import torch

        device = torch.cuda.get_device_name(device)
    return Obtained(
        metrics=percent(figure, summary),
        commit=commit,
        device=device,
        precision=summary.precision or "",
        fingerprint=checkpoint["fingerprint"] if isinstance(checkpoint, dict) else str(checkpoint),
        date=datetime.now(UTC).date().isoformat(),
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
