"""How processes find each other, and how they end."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tiny_run import ROOT, environment

from utils import distributed

PROGRAM = """
import atexit
from utils import distributed
atexit.register(print, "clean-up")
print("done")
distributed.exit_process(3)
"""


@pytest.mark.parametrize(("processes", "printed"), [("1", "done\nclean-up\n"), ("2", "done\n")])
def test_one_of_several_leaves_without_clean_up(processes, printed):
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, env=environment(WORLD_SIZE=processes), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (3, printed), done.stderr


@pytest.mark.parametrize(
    ("gpu", "named", "backend"), [(False, None, "gloo"), (True, None, "nccl"), (True, "gloo", "gloo")]
)
def test_the_backend_is_the_devices_or_the_one_that_is_named(monkeypatch, gpu, named, backend):
    started = []
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    if named:
        monkeypatch.setenv("UGROUND_BACKEND", named)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: started.append(backend))
    assert distributed.init().type == ("cuda" if gpu else "cpu")
    assert started == [backend]
