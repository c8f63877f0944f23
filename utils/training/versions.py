"""Which code ran: the commit of this repository, and the versions of packages."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def git_commit() -> str:
    """The commit of this code, with ``-dirty`` when files differ from it; ``unknown`` outside of a git checkout."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def package_versions(*packages: str) -> dict[str, str]:
    """Python's version and those of installed packages."""
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
