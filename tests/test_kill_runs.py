"""scripts/dev/kill_runs.py itself, with one trial of one program; its figures are in docs/reliability.md."""

from __future__ import annotations

import pytest

from scripts.dev import kill_runs


@pytest.mark.slow
def test_a_killed_program_ends_as_one_that_nobody_killed(capfd):
    assert kill_runs.main(["--what", "chat", "--count", "1"]) == 0
    assert "chat: 1 trials, 1 kills, 0 differ" in capfd.readouterr().out


def test_what_differs_is_found():
    import torch

    one = {"a": [torch.zeros(2), 1], "b": 2}
    assert kill_runs.differences(one, {"a": [torch.zeros(2), 1], "b": 2}) == []
    assert len(kill_runs.differences(one, {"a": [torch.ones(2), 1], "c": 2})) == 3
