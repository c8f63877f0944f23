"""The memory of processes, read from /proc."""

import os
import subprocess
import sys

import pytest

from utils.diagnostics import process_memory

pytestmark = pytest.mark.skipif(not process_memory.CLEAR_REFS.exists(), reason="needs Linux")
PROGRAM = """
from utils.diagnostics.process_memory import forget_peak, peak_resident, resident
held = bytes([1]) * 50_000_000
del held
peak = peak_resident()
forget_peak()
print(resident(), peak, peak_resident())
"""


def test_a_peak_is_forgotten():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    now, peak, new_peak = map(int, run.stdout.split())
    assert peak - new_peak > 45e6
    assert abs(new_peak - now) < 5e6


def test_files_of_proc_are_read_as_bytes():
    assert process_memory.read_proc("meminfo")["MemAvailable"] > 2**20
    assert process_memory.read_proc("self/smaps_rollup")["Rss"] > 2**20
    assert process_memory.read_proc("no/such/file") == {}


def test_memory_of_another_process():
    assert process_memory.resident(os.getpid()) == pytest.approx(process_memory.resident(), rel=0.1)
    assert process_memory.resident(2**31) == 0
