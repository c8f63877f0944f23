"""scripts/dev/study_history.py: the same questions, in a conversation and independently."""

from __future__ import annotations

import re

import pytest
from conftest import save_model

from scripts.dev import study_history
from utils.inference.session import ImageSession


@pytest.fixture(scope="module")
def version(tmp_path_factory, tiny_processor):
    return save_model(tmp_path_factory.mktemp("model"), tiny_processor, talks=True)


def run(version, data, spec: str) -> int:
    flags = ["--version", str(version), "--dataset_dir", str(data), "--val_dataset", spec, "--limit", "2"]
    return study_history.main(flags)


def test_later_questions_are_asked_in_both_ways(version, data, capsys, monkeypatch):
    calls, ask = [], ImageSession.ask

    def remember_it(self, prompt, *, remember):
        calls.append((remember, len(self.history)))
        return ask(self, prompt, remember=remember, max_new_tokens=2)

    monkeypatch.setattr(ImageSession, "ask", remember_it)
    assert run(version, data, "grefcoco|unc|val") == 0
    out = capsys.readouterr().out
    count = int(re.search(r"grefcoco\|unc\|val, (\d+) answers", out)[1])
    assert len(calls) == 2 * (count + 2)  # two ways; the first question of each of two images is not scored
    assert {seen for remember, seen in calls if not remember} == {0}
    assert max(seen for remember, seen in calls if remember) >= 1
    assert re.search(r"gIoU +\d\.\d+ +\d\.\d+  [+-]\d\.\d+ \[", out)


def test_one_question_per_image_has_nothing_before_it(version, data):
    with pytest.raises(ValueError, match="one question per image"):
        run(version, data, "ReasonSeg|val_short")
