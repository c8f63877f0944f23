"""``--help`` fits 100 columns and is answered at once: programs import the model and the page after parsing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = [
    "train_ds.py",
    "test.py",
    "chat.py",
    "app.py",
    *sorted(f"scripts/{p.name}" for p in ROOT.glob("scripts/*.py")),
]
SLOW = {"torch", "transformers", "peft", "deepspeed", "gradio", "matplotlib", "scipy", "huggingface_hub"}
HELP = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
sys.path.insert(0, "")
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as exit:
    print("EXIT", exit.code)
print("IMPORTED", *sorted(set(sys.modules) & {slow}))
"""


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_imports_nothing_slow(program: str) -> None:
    code = HELP.replace("{slow}", repr(SLOW))
    command, environment = [sys.executable, "-c", code, program], os.environ | {"COLUMNS": "100"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True)
    *lines, code, imported = done.stdout.splitlines()
    assert lines[0].startswith("usage:")
    assert max(map(len, lines)) <= 100
    assert (code, imported) == ("EXIT 0", "IMPORTED")
