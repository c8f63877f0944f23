"""Resumes a tiny run on other numbers of processes, ZeRO stages and micro-batches, and compares it with a whole one.

    OMP_NUM_THREADS=1 python scripts/dev/check_resume.py                      # the tables of docs/reliability.md
    OMP_NUM_THREADS=1 python scripts/dev/check_resume.py --only zero3 --precision fp32

A row is a run on the CPU, interrupted and resumed after each two steps: ``zero2 x2`` are two steps with
configs/deepspeed/zero2.json in two processes, ``by 2`` with two micro steps each. Whenever it resumes, it writes down
what it has restored: weights, AdamW's state, learning rates and schedule must be the checkpoint's bit for bit. Losses,
gradient norms (the largest difference of any part), validation and final weights are compared with those of one process
under ZeRO-2 that nobody interrupted; the run is merged. Exit code 1 if a row exceeds its tolerance.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: F401  # slow to import: here, once for all processes, which are forked
import torch
from conftest import build_tiny_model, build_tiny_processor, make_demo_data
from programs import load_script
from tiny_run import ROOT, arguments, log_lines, write_base

import train_ds
from utils import distributed
from utils.command_line.parser import Parser
from utils.plotting import text_tables
from utils.training import checkpoint as checkpoints
from utils.training.shards import MOMENTS, WEIGHT

merge_lora = load_script("scripts/merge_lora")

IMAGES, STEPS = 4, 2  # per step; steps of a part
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}  # of losses, norms and weights: bf16 rounds each sum to 8 bits
BASELINE = "ppm.baseline"  # the reward's moving average, which advances once per micro step,
EXACT = {"policy_gradient": "exact"}  # and which this does not use
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("zero1 x2", {}),
    ("zero2 x2", {}),
    ("zero3 x2", {}),
    ("zero1 x1, zero1 x2, zero1 x1", {}),
    ("zero2 x1, zero2 x2, zero2 x1", {}),
    ("zero2_offload x1, zero2_offload x2, zero2_offload x1", {}),
    ("zero3 x1, zero3 x2, zero3 x1", {}),
    ("zero3_offload x1, zero3_offload x2, zero3_offload x1", {}),
    ("zero2 x4, zero2 x2, zero3 x1", {}),
    ("zero2 x1, zero3 x2, zero2_offload x1", {}),
    ("zero2 x1, zero2 x1 by 4, zero3 x2 by 2", EXACT),
]


@dataclass(frozen=True)
class Part:
    """Steps of a run: a file of configs/deepspeed, processes, micro steps per step."""

    zero: str
    processes: int
    accumulation: int

    @classmethod
    def parse(cls, text: str) -> Part:
        found = re.fullmatch(r"(\w+) x(\d)(?: by (\d))?", text.strip())
        assert found is not None, text
        return cls(found[1], int(found[2]), int(found[3] or 1))


# -- runs --------------------------------------------------------------------------------------------------------------


def write_settings(folder: Path) -> None:
    """DeepSpeed's files; those of ZeRO-3 shard the smallest parameter, too, and the optimizer's groups are several."""
    for path in (ROOT / "configs/deepspeed").glob("*.json"):
        settings = json.loads(path.read_text())
        zero = settings["zero_optimization"]
        if zero["stage"] == 3:
            zero |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 20_000}
        (folder / path.name).write_text(json.dumps(settings))


def train(folder: Path, name: str, part: Part, stop: int, **settings: Any) -> None:
    """Trains up to step ``stop``, in processes forked from this one, which has imported everything."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    flags = {
        "exp_name": name,
        "deepspeed_config": folder / f"{part.zero}.json",
        "batch_size": IMAGES // part.processes // part.accumulation,
        "grad_accumulation_steps": part.accumulation,
        "steps_per_epoch": STEPS,
        "epochs": 3,
        "lora_dropout": 0.0,
        "val_limit": 3,  # two images for one process, one for the other
        "val_pictures": 0,
        "auto_resume": True,
    }
    argv = arguments(folder / "base", folder / "data", folder, **flags | settings)
    children = []
    for rank in range(part.processes):
        if (child := os.fork()) == 0:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": part.processes, "MASTER_PORT": port}
            os.environ.update({key: str(value) for key, value in ranks.items()}, MASTER_ADDR="127.0.0.1")
            _train_here(folder / f"rank{rank}.out", argv, stop)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        printed = "\n".join((folder / f"rank{rank}.out").read_text()[-2000:] for rank in range(part.processes))
        raise RuntimeError(f"{part}: exit codes {codes}\n{printed}")


def _train_here(output: Path, argv: list[str], stop: int) -> None:
    """The forked process: trains, checks what it resumed from, and ends."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    save_step, train_run = train_ds.save_step, train_ds.train

    def save_and_stop(run, results) -> None:
        save_step(run, results)
        if run.step == stop:
            raise KeyboardInterrupt

    def compare_and_train(run) -> None:
        if run.step:
            compare_restored(run)
        train_run(run)

    train_ds.save_step, train_ds.train = save_and_stop, compare_and_train
    train_ds.report_run = lambda run: None  # its charts take longer than the steps
    code = 1
    try:
        code = train_ds.main(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(0 if code == 130 else code)


def compare_restored(run) -> None:
    """Raises an AssertionError if the engine does not hold exactly what the checkpoint does."""
    folder = run.config.run_folder
    checkpoints.save_checkpoint(run.engine, folder / "restored", run.meta | {"step": run.step, "metrics": {}}, False)
    if not distributed.is_main():
        return
    before, after = (
        checkpoints.read_shards(path, checkpoints.read_meta(path))
        for path in map(checkpoints.find_checkpoint, (folder, folder / "restored"))
    )
    assert before.shapes == after.shapes
    for name in before.shapes:
        for kind in (WEIGHT, *MOMENTS):
            assert torch.equal(before.read(name, kind), after.read(name, kind)), f"{kind} of {name} differs"
    for name, value in before.fixed.items():
        assert torch.equal(value, after.fixed[name]), name
    assert (before.step, before.rates) == (after.step, after.rates)
    counters = ("lr_scheduler", "global_steps", "global_samples")
    assert [before.model[name] for name in counters] == [after.model[name] for name in counters]


# -- comparing ---------------------------------------------------------------------------------------------------------


def relative(value: float, expected: float) -> float:
    return abs(value - expected) / max(abs(expected), 1e-3)


def differences(run: Path, whole: Path, same_micro_steps: bool) -> dict[str, float]:
    """Largest relative differences of two runs; of the weights, those of all together."""
    lines, others = log_lines(run, "train"), log_lines(whole, "train")
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    assert [line["layers"] for line in lines] == [line["layers"] for line in others] or "bf16" in str(run)
    pairs = list(zip(lines, others))
    names = ["loss", "text", "mask_bce", "map_bce", "policy", "reward", *["baseline"] * same_micro_steps]
    losses = [relative(a[name], b[name]) for a, b in pairs for name in names]
    norms = [relative(a["gradients"][part], b["gradients"][part]) for a, b in pairs for part in b["gradients"]]
    validated = zip(log_lines(run, "val"), log_lines(whole, "val"), strict=True)
    metrics = [
        abs(a["metrics"][spec][name] - value)
        for a, b in validated
        for spec, values in b["metrics"].items()
        for name, value in values.items()
    ]
    mine, other = (checkpoints.trained_weights(checkpoints.find_checkpoint(folder)) for folder in (run, whole))
    trained = [name for name in other if same_micro_steps or not name.endswith(BASELINE)]
    squares = [sum((mine[name] - other[name]).square().sum().item() for name in trained)]
    squares.append(sum(other[name].square().sum().item() for name in trained))
    return {
        "loss": max(losses),
        "gradient norms": max(norms),
        "metrics": max(metrics),
        "weights": (squares[0] / squares[1]) ** 0.5,
    }


def merge(run: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        flags = ["--checkpoint", str(run), "--which", "latest", "--output", str(run / "merged")]
        if merge_lora.main(flags):
            raise RuntimeError(f"{run} cannot be merged")


def prepare(folder: Path) -> None:
    """Writes a tiny base, data and DeepSpeed's files."""
    processor = build_tiny_processor()
    write_base(folder / "base", build_tiny_model(processor), processor.tokenizer)
    with contextlib.redirect_stdout(io.StringIO()):
        make_demo_data.main(["--out", str(folder / "data"), "--train", "8", "--val", "4", "--test", "2"])
    write_settings(folder)


def check(folder: Path, precision: str, wanted: Callable[[str], bool]) -> bool:
    """Prints a table of the rows; returns whether all are within their tolerance."""
    table = [["run", "loss", "gradient norms", "metrics", "weights"]]
    wholes: dict[str, Path] = {}
    passed = True
    for number, (row, settings) in enumerate(ROWS):
        if not wanted(row):
            continue
        settings = settings | {"precision": precision}
        key = json.dumps(settings)
        if key not in wholes:
            wholes[key] = folder / f"{precision}_whole{len(wholes)}"
            train(folder, wholes[key].name, Part("zero2", 1, 1), 0, **settings)
        run, parts = folder / f"{precision}_{number}", [Part.parse(text) for text in row.split(",")]
        for k, part in enumerate(parts, start=1):
            train(folder, run.name, part, k * STEPS if len(parts) > k else 0, **settings)
        merge(run)
        found = differences(run, wholes[key], all(part.accumulation == 1 for part in parts))
        passed &= all(value <= TOLERANCE[precision] for value in found.values())
        table.append([row, *(f"{value:.0e}" if value else "0" for value in found.values())])
        print(f"{precision}, {row}: {found}", file=sys.stderr, flush=True)
    print(f"\n{precision}\n" + "\n".join(text_tables.aligned(table, "lr")), flush=True)
    return passed


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--only", default="", metavar="PATTERN", help="rows that match; default: all")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: both")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        prepare(Path(temporary))
        precisions = [args.precision] if args.precision else ["fp32", "bf16"]
        passed = [
            check(Path(temporary), precision, lambda row: bool(re.search(args.only, row))) for precision in precisions
        ]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
