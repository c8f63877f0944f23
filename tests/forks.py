"""Programs in processes of their own that start at once.

An interpreter needs five seconds to import torch, DeepSpeed and peft. Here a server imports them, once in each
worker of xdist, and every process is a fork of it. What a program imports, or does at start-up, only a real one shows.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_run import ROOT, environment
from torch.multiprocessing import start_processes

SERVER = multiprocessing.get_context("forkserver")
OWN = (
    "train_ds",
    "model.UGround",
    "model.lora",
    "utils.training.engine",
    "utils.inference.cli",
    "utils.plotting.charts",
)
SLOW = ("deepspeed.runtime.zero.muon.original_muon", "torch.utils.tensorboard")  # what DeepSpeed and a run import late
SERVER.set_forkserver_preload([*OWN, *SLOW])


def called(function: Callable[..., None], *arguments: Any, processes: int = 1) -> None:
    """Calls ``function(rank, *arguments)`` of a test module in each of the processes, and waits for them."""
    with _importing():
        start_processes(function, arguments, processes, start_method="forkserver")


class Program:
    """A program of the repository in a process of its own, started in ``folder`` as ``python SCRIPT ARGUMENTS``.

    What it prints goes to the file ``output``. A terminal is the program's controlling one, and its input, too.
    """

    def __init__(
        self,
        script: Path,
        *arguments: Any,
        output: str | Path,
        env: Mapping[str, str] | None = None,
        folder: Path = ROOT,
    ) -> None:
        words = [str(script), *map(str, arguments)]
        self.output = Path(output)
        self.process = SERVER.Process(target=_run, args=(words, dict(env or environment()), str(folder), str(output)))
        with _importing():
            self.process.start()

    def ends(self, seconds: float = 300) -> int | None:
        """The exit code, once the program has ended; None if it has not by then."""
        self.process.join(seconds)
        return self.process.exitcode

    def printed(self) -> str:
        """What it has printed so far."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""


@contextmanager
def _importing() -> Iterator[None]:
    """The environment of the server, which starts with the first process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("DS_ACCELERATOR", "cpu")
        yield


def _run(words: list[str], env: dict[str, str], folder: str, output: str) -> None:
    assert "deepspeed" in sys.modules, "the server could not import it"
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell has started the tests with &
    os.setsid()  # a terminal that a leader of a session opens is its controlling one
    file = os.open(output, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    for number, stream in enumerate(("stdin", "stdout", "stderr")):
        if number or os.isatty(file):
            os.dup2(file, number)
            setattr(sys, stream, open(number, "w" if number else "r", buffering=1, closefd=False))  # noqa: SIM115
    sys.argv = words
    sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
    runpy.run_path(words[0], run_name="__main__")
