"""A sample of what scripts/dev/fuzz_files.py tries: damage at random places, in files of every kind."""

from __future__ import annotations

import os
import signal
import time

import pytest

from scripts.dev.fuzz_files import BAD, KINDS, Fuzzer, Kind

NUMBERS = {"merged": range(15), "adapter": range(10), "base": range(10)}  # of slower kinds; of the others: 30
NUMBERS["log"] = (0, 3, 5, 10)  # one is read, and its charts drawn, which takes a second


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_harmless_or_a_file_is_named(tmp_path, name):
    numbers = NUMBERS.get(name, range(30))
    trials = Fuzzer(name, tmp_path).trials(0, numbers, per_process=len(numbers))
    assert [(number, trial) for number, trial in zip(numbers, trials, strict=True) if trial.way in BAD] == []
    assert any(trial.way == "named" for trial in trials)


def test_bad_ways_are_told_apart(tmp_path, monkeypatch):
    """A trial after one that hangs or crashes finds the file as it was written."""
    path = tmp_path / "file.txt"

    def read(_folder):
        content = path.read_text()
        if content == "hang":
            time.sleep(60)
        if content == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if content == "traceback":
            raise KeyError
        if content == "unnamed":
            raise ValueError("something is wrong")
        return content

    monkeypatch.setitem(KINDS, "texts", Kind(lambda _folder: path.write_text("whole"), read))
    fuzzer = Fuzzer("texts", tmp_path, seconds=0.5)
    ways = ["hang", "same", "crash", "traceback", "changed", "unnamed", "same"]
    texts = {number: "whole" if way == "same" else way for number, way in enumerate(ways)}
    monkeypatch.setattr(fuzzer, "damage", lambda seed, number: (path, texts[number].encode()))
    assert [trial.way for trial in fuzzer.trials(0, range(len(ways)), per_process=4)] == ways
    assert path.read_text() == "whole"
