"""The worked examples of docs/extending.md form one program that runs unchanged."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tiny_run import environment

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
SECTIONS = ("A data set", "A benchmark", "A layer rule", "A loss", "A backbone", "A setting")


def test_the_examples_run(tmp_path: Path) -> None:
    """In a process of its own, because they add rows to tables that other tests use."""
    code = "\n\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(TMPDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stderr


def test_every_extension_point_has_an_example() -> None:
    for name in SECTIONS:
        section = PAGE.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert "What must hold" in " ".join(section.split()), name
        assert "```python" in section, name
