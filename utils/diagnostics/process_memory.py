"""The memory of processes in bytes, as Linux tells it. No library is needed: that would add to what is measured."""

from __future__ import annotations

from pathlib import Path

CLEAR_REFS = Path("/proc/self/clear_refs")


def read_proc(file: str) -> dict[str, int]:
    """The sizes in ``meminfo``, ``self/status`` or ``self/smaps_rollup`` by name; empty where there is no /proc."""
    path = Path("/proc", file)
    lines = (line.split() for line in path.read_text().splitlines()) if path.is_file() else ()
    return {line[0].removesuffix(":"): 1024 * int(line[1]) for line in lines if line[-1:] == ["kB"]}


def resident(process: int | str = "self") -> int:
    """What a process holds in memory; 0 where there is no /proc."""
    return read_proc(f"{process}/status").get("VmRSS", 0)


def peak_resident() -> int:
    """The largest ``resident`` of this process since ``forget_peak``. (getrusage's maximum is inherited from the
    process that started this one.)"""
    return read_proc("self/status").get("VmHWM", 0)


def forget_peak() -> None:
    """Starts ``peak_resident`` anew; an OSError where there is no ``CLEAR_REFS``."""
    CLEAR_REFS.write_text("5")
