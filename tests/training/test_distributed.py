"""How processes end."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tiny_run import ROOT, environment

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
