"""A sample of what scripts/dev/fuzz_files.py tries: damage at random places, in files of every kind."""

from __future__ import annotations

import pytest

from scripts.dev.fuzz_files import BAD, KINDS, Fuzzer

COUNTS = {"merged": 20, "adapter": 20, "base": 20, "annotations": 20, "log": 4}  # of slower ones; the others: 40


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_harmless_or_a_file_is_named(tmp_path, name):
    fuzzer = Fuzzer(name, tmp_path)
    trials = [fuzzer.trial(0, number) for number in range(COUNTS.get(name, 40))]
    assert [(number, trial) for number, trial in enumerate(trials) if trial.way in BAD] == []
    assert any(trial.way == "named" for trial in trials)
