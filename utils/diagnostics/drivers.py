"""Which torch an NVIDIA driver can run. Only the standard library: ``doctor.py`` imports it before torch."""

from __future__ import annotations

import re

PAGE = "docs/install.md"  # its table has the same rows, and the sources
TORCH_FOR_DRIVER = (  # lowest driver -> what to do
    (580, "install the versions of requirements.txt, built for CUDA 13"),
    (525, "install the same versions, built for CUDA 12.6 (Blackwell: torch 2.11.0, torchvision 0.26.0 for CUDA 12.8)"),
    (0, "use another machine: builds for CUDA 12 need driver 525"),
)


def torch_for(driver: str) -> str:
    """What to do with a driver such as ``550.54.15``; for another text, that a matching torch is needed."""
    number = re.match(r"\d+", driver)
    fix = "install a matching torch"
    if number:
        fix = next(fix for lowest, fix in TORCH_FOR_DRIVER if int(number.group()) >= lowest)
    return f"{fix} ({PAGE})"
