"""Memory of processes in bytes, from Linux's /proc. Imports no library: that would add to what is measured."""

from __future__ import annotations

from pathlib import Path

CLEAR_REFS = Path("/proc/self/clear_refs")


def read_proc(file: str) -> dict[str, int]:
    """Sizes in ``meminfo``, ``self/status`` or ``self/smaps_rollup`` by name; empty without /proc."""
    path = Path("/proc", file)
    lines = (line.split() for line in path.read_text().splitlines()) if path.is_file() else ()
    return {line[0].removesuffix(":"): 1024 * int(line[1]) for line in lines if line[-1:] == ["kB"]}


def resident(process: int | str = "self") -> int:
    """Resident memory of a process; 0 without /proc."""
    return read_proc(f"{process}/status").get("VmRSS", 0)


def peak_resident() -> int:
    """The largest ``resident`` of this process since ``forget_peak``. (getrusage's maximum is inherited from the
    process that started this one.)"""
    return read_proc("self/status").get("VmHWM", 0)


def forget_peak() -> None:
    """Resets ``peak_resident``; raises an OSError without ``CLEAR_REFS``."""
    CLEAR_REFS.write_text("5")
