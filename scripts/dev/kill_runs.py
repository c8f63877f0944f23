"""Kills training, merging, evaluation and batch chat, starts them again, and compares with what nobody killed.

    OMP_NUM_THREADS=1 python scripts/dev/kill_runs.py         # 20 trials of each program
    OMP_NUM_THREADS=1 python scripts/dev/kill_runs.py --what train --count 100 --seed 1

A trial starts a program on a tiny random model, kills it (SIGKILL) after a random time or right before a random change
of a file, and starts the same command again; that may be killed, too. At the end everything on disk must equal what an
uninterrupted run wrote: tensors and the optimizer's state bit for bit, log lines, answers, pictures, and the names of
all files. Exit code 1 if a trial differs. docs/reliability.md has the figures.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import torch
from conftest import build_tiny_model, build_tiny_processor, make_demo_data, save_model
from programs import chat, evaluation, load_script
from tiny_run import arguments, write_base

import train_ds
from utils.command_line.parser import Parser
from utils.inference import cli
from utils.training import checkpoint as checkpoints
from utils.training.checkpoint_files import plain_data

merge_lora = load_script("scripts/merge_lora")

MOST_KILLS = 3  # of one trial
CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")  # Python's audit events
TIMES = ("images_per_s", "seconds")  # values that no two runs share


@dataclass(frozen=True)
class Program:
    """A program that writes a folder.

    Attributes:
        start: called with the folder; returns the exit code.
        read: the content of the folder as a tree of plain values and tensors, without times.
    """

    start: Callable[[Path], int]
    read: Callable[[Path], Any]


# -- killing -----------------------------------------------------------------------------------------------------------


def run(start: Callable[[Path], int], folder: Path, change: int = 0, seconds: float = 0) -> tuple[int, float, int]:
    """Runs a program in a forked process, which has imported everything already.

    Args:
        change: kill it right before its change number ``change`` of a file; 0 = never.
        seconds: kill it after that time; 0 = never.

    Returns:
        exit status as of ``os.waitpid``, seconds, and the number of changes.
    """
    begun = time.monotonic()
    counted, counter = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(counted)
        _run_child(start, folder, change, counter)
    os.close(counter)
    if seconds:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    with os.fdopen(counted, "rb") as pipe:
        changes = len(pipe.read())  # until the process has ended
    _, status = os.waitpid(process, 0)
    return status, time.monotonic() - begun, changes


def _run_child(start: Callable[[Path], int], folder: Path, change: int, counter: int) -> None:
    output = os.open(folder.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    done = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal done
        if event not in CHANGES or not isinstance(args[0], (str, os.PathLike)):
            return
        path = Path(args[0])
        if path.is_absolute() and not path.is_relative_to(folder):
            return
        if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        done += 1
        os.write(counter, b".")
        if done == change:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    code = 1
    try:
        code = start(folder)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def trial(program: Program, folder: Path, rng: random.Random, whole: tuple[float, int]) -> tuple[int, str]:
    """One trial in a new folder; returns the number of kills, and how the program failed, if it did.

    Args:
        whole: seconds and changes of files of the uninterrupted run.
    """
    seconds, changes = whole
    kills = 0
    while True:
        killed = kills == 0 or (kills < MOST_KILLS and rng.random() < 0.4)
        change, after = (rng.randint(1, changes), 0.0) if rng.random() < 0.5 else (0, rng.uniform(0.02, 1) * seconds)
        status, _, _ = run(program.start, folder, *(change, after) if killed else ())
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            kills += 1
        elif status:
            return kills, f"exit code {os.waitstatus_to_exitcode(status)}: {last_line(folder.with_suffix('.out'))}"
        elif not killed:
            return kills, ""


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


# -- comparing ---------------------------------------------------------------------------------------------------------


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Places where two trees of dicts, lists, tensors and plain values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = sorted(map(str, one.keys() ^ other.keys()))
        own = [f"{where}/{name} is in one only" for name in names]
        return own + [
            text for key in one.keys() & other.keys() for text in differences(one[key], other[key], f"{where}/{key}")
        ]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [text for k, pair in enumerate(zip(one, other)) for text in differences(*pair, f"{where}/{k}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
    elif hasattr(one, "__dict__") and type(one) is type(other) and not isinstance(one, type):
        return differences(vars(one), vars(other), where)
    else:
        same = one == other
    return [] if same else [f"{where}: {str(one)[:60]} / {str(other)[:60]}"]


def without_times(value: Any, more: tuple[str, ...] = ()) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item, more) for key, item in value.items() if key not in (*TIMES, *more)}
    return [without_times(item, more) for item in value] if isinstance(value, list) else value


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_run(folder: Path) -> dict[str, Any]:
    """Log lines, tensors and optimizer of all checkpoints, pictures, and the names of files of a training run."""
    run_folder = folder / "run"
    content: dict[str, Any] = {
        "log": [without_times(line) for line in json_lines(run_folder / "log.jsonl") if line["kind"] != "start"],
        "names": names(run_folder, ("tensorboard", "lock")),
        "index": json.loads((run_folder / "checkpoints/index.json").read_text()),
        "pictures": {path.name: path.read_bytes() for path in run_folder.rglob("*.png")},
    }
    for checkpoint in sorted((run_folder / "checkpoints").glob("step_*")):
        with plain_data(checkpoint):
            content[checkpoint.name] = {
                path.name: torch.load(path, weights_only=True) for path in sorted(checkpoint.glob("*.pt"))
            }
        meta = checkpoints.read_meta(checkpoint)
        content[f"{checkpoint.name}/meta"] = {
            key: meta[key] for key in ("step", "best", "best_of", "metrics", "trained")
        }
    return content


def read_files(folder: Path) -> dict[str, Any]:
    """All files of a folder: JSON without times and the command, anything else as bytes."""
    content: dict[str, Any] = {"names": names(folder)}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            content[name] = without_times(json.loads(path.read_text()), ("command",))
        elif path.suffix == ".jsonl":
            content[name] = [without_times(line, ("settings", "image")) for line in json_lines(path)]
        elif path.is_file():
            content[name] = path.read_bytes()
    return content


def names(folder: Path, without: tuple[str, ...] = ()) -> list[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*"))
    return sorted(str(path) for path in paths if path.parts[0] not in without)


# -- the programs ------------------------------------------------------------------------------------------------------


def prepare(folder: Path) -> dict[str, Program]:
    """Writes a tiny base, model, data set, images and prompts; the programs by name."""
    processor = build_tiny_processor()
    write_base(folder / "base", build_tiny_model(processor), processor.tokenizer)
    model = save_model(folder / "model", processor, talks=True)
    data, images, prompts = folder / "data", folder / "images", folder / "prompts.txt"
    with contextlib.redirect_stdout(io.StringIO()):
        make_demo_data.main(["--out", str(data), "--train", "8", "--val", "6", "--test", "2"])
    images.mkdir()
    for path in sorted((data / "reason_seg/ReasonSeg/val").glob("*.jpg"))[:4]:
        (images / path.name).write_bytes(path.read_bytes())
    prompts.write_text("the red star\nall shapes\nthe largest shape\n")
    settings = {"save_every": 2, "steps_per_epoch": 4, "log_every": 2, "auto_resume": True}

    def train(output: Path) -> int:
        return train_ds.main(arguments(folder / "base", data, output, **settings))

    def evaluate(output: Path) -> int:
        flags = ["--val_dataset", "ReasonSeg|val", "--mode", "both", "--max_new_tokens", "3", "--save_overlays", "2"]
        flags += ["--batch_size", "1", "--version", model, "--dataset_dir", str(data), "--output", str(output)]
        return cli.run(evaluation.main, [*flags, "--resume"])

    def converse(output: Path) -> int:
        flags = ["--image", str(images), "--prompts", str(prompts), "--output", str(output), "--max_new_tokens", "3"]
        return cli.run(chat.main, ["--version", model, *flags])

    def merge(output: Path) -> int:
        return merge_lora.main(["--checkpoint", str(folder / "whole_train/run"), "--output", str(output / "merged")])

    return {
        "train": Program(train, read_run),
        "evaluate": Program(evaluate, read_files),
        "chat": Program(converse, read_files),
        "merge": Program(merge, read_files),  # of the run that "train" leaves
    }


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--what", action="append", choices=("train", "merge", "evaluate", "chat"), help="default: all")
    parser.add_argument("--count", type=int, default=20, metavar="N", help="trials of each program (default: 20)")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        programs = prepare(folder)
        wanted = args.what or list(programs)
        for name in programs:
            if name in wanted or (name == "train" and "merge" in wanted):
                failed += try_program(name, programs[name], folder, args.count if name in wanted else 0, args.seed)
    return 1 if failed else 0


def try_program(name: str, program: Program, folder: Path, count: int, seed: int) -> int:
    """Prints a line per trial that differs, and a summary; returns the number of these trials."""
    whole = folder / f"whole_{name}"
    whole.mkdir()
    status, seconds, changes = run(program.start, whole)
    if status:
        raise RuntimeError(f"{name} does not run: {last_line(whole.with_suffix('.out'))}")
    expected = program.read(whole)
    kills, failed = 0, 0
    for number in range(count):
        output = folder / f"{name}_{number}"
        output.mkdir()
        killed, problem = trial(program, output, random.Random(f"{seed} {number}"), (seconds, changes))
        found = [problem] if problem else differences(program.read(output), expected)
        kills += killed
        failed += bool(found)
        if found:
            print(
                f"{name}, seed {seed}, trial {number} ({killed} kills): {len(found)} differences: {found[:4]}",
                flush=True,
            )
    print(
        f"{name}: {count} trials, {kills} kills, {failed} differ ({seconds:.1f} s, {changes} changes of files)",
        flush=True,
    )
    return failed


if __name__ == "__main__":
    sys.exit(main())
