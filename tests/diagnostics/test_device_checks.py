"""scripts/gpu_check.py on the CPU: its parts agree with themselves, and each finds what it is for."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model.UGround import UGroundForCausalLM
from scripts import bench, gpu_check
from utils.diagnostics import benchmark, costs, device_checks, memory_probe
from utils.diagnostics.findings import Finding, ok, problem


def levels(findings: list[Finding]) -> set[str]:
    return {finding.level for finding in findings}


@pytest.fixture
def one_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_checks, "METHODS", {"policy": device_checks.UGROUND})


def test_a_device_that_agrees(one_method: None) -> None:
    findings = [*device_checks.check_training_numbers("cpu"), *device_checks.check_answers("cpu")]
    assert levels(findings) == {"ok"}, findings
    assert sum("no mask in the batch" in finding.text for finding in findings) == 2


def test_a_device_that_computes_something_else(one_method: None, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = itertools.cycle([2.0, 2.2, 2.2])  # of the CPU; of the device in float32 and bf16
    monkeypatch.setattr(device_checks, "loss_and_gradients", lambda *_: {"loss": next(losses), "gate": 1.0})
    findings = list(device_checks.check_training_numbers("cpu"))
    assert levels(findings) == {"problem"}
    assert "policy, float32: loss differs by 1.0e-01" in findings[0].text


def test_other_layers_and_tokens_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    models, predict = [], UGroundForCausalLM.predict

    def wrong(self, batch, **options):
        models.append(self) if self not in models else None
        rows = predict(self, batch, **options)
        for prediction in (p for row in rows for p in row if self is not models[0]):
            prediction.layers = [0 for _ in prediction.layers]
            prediction.token_ids = prediction.token_ids if len(batch.label_ids) else [5]
        return rows

    monkeypatch.setattr(UGroundForCausalLM, "predict", wrong)
    written, given, sampled, _ = device_checks.check_answers("cpu")
    assert (written.level, given.level, sampled.level) == ("problem",) * 3
    assert "other tokens" in written.text
    assert "other layers" in given.text


def test_a_step_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"checkpointing": device_checks.STEPS["checkpointing, offloaded"]}
    monkeypatch.setattr(device_checks, "STEPS", chosen)
    monkeypatch.setattr(memory_probe, "MEASURED_STEPS", 2)
    (finding,) = device_checks.check_steps("cpu", "tiny")
    assert finding.level == "ok"
    seconds, measured, formula = re.search(
        r"checkpointing: ([\d.]+) s, .* ([\d.]+) GB m.* ([\d.]+) GB", finding.text
    ).groups()
    assert float(seconds) > 0
    assert 0 <= float(measured) < 1  # memory that an earlier test has freed is not counted
    assert 0.05 < float(formula) < 1


def test_a_program_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command, **_options) -> subprocess.CompletedProcess:
        code = int("--auto_resume" in command)
        return subprocess.CompletedProcess(command, code, stdout="", stderr="Traceback\nRuntimeError: CUDA error")

    monkeypatch.setattr(subprocess, "run", run)
    findings = list(device_checks.check_programs("cpu"))
    assert [finding.level for finding in findings] == ["ok", "ok", "problem"]
    assert findings[-1].text == "resume: exit code 1: Traceback / RuntimeError: CUDA error"


def test_a_part_that_fails_does_not_stop_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def check_training_numbers(device: str):
        raise torch.AcceleratorError("CUDA error: invalid argument") if device == "cpu" else AssertionError

    for name in ("check_answers", "check_synchronizations", "check_programs", "check_quantization", "check_steps"):
        monkeypatch.setattr(device_checks, name, lambda *_: [ok("fine")])
    monkeypatch.setattr(device_checks, "check_training_numbers", check_training_numbers)
    monkeypatch.setattr(gpu_check, "check_installation", lambda: [problem("no gradio", "install it")])
    monkeypatch.setattr(gpu_check, "run_benchmark", lambda *args: args[-1].update(ratio=1) or [ok(args[-2])])
    path = tmp_path / "figures.json"
    assert gpu_check.main(["--device", "cpu", "--preset", "tiny", "--json", str(path)]) == 1
    page = capsys.readouterr().out
    assert "AcceleratorError: CUDA error: invalid argument" in page
    assert page.count("fine") == 5
    written = json.loads(path.read_text())
    assert [finding["level"] for finding in written["findings"]] == ["problem", "problem", *["ok"] * 8]
    assert [finding["text"] for finding in written["findings"][-3:]] == ["bench", "table_10", "table_11"]
    assert written["bench"] == written["table_10"] == written["table_11"] == {"ratio": 1}


def test_the_last_part_prints_the_papers_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """bench.py runs here, not in a process of its own."""
    shape = {"width": 32, "layers": 3, "heads": 2}
    small = replace(benchmark.PRESETS["tiny"], llama=shape, size=(48, 64), batch=1, questions=1)
    monkeypatch.setitem(benchmark.PRESETS, "tiny", small)
    monkeypatch.setattr(costs, "CASES", [case for case in costs.CASES if case.name in ("UGround", "LISA")])
    monkeypatch.setattr(costs, "ANSWERING", costs.CASES)
    monkeypatch.setattr(costs, "BATCH_SIZES", (4, 8))

    def run(command: list[str]) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(command, bench.main(command[2:]))

    monkeypatch.setattr(gpu_check, "subprocess", SimpleNamespace(run=run))
    figures: dict = {"table_10": {}, "table_11": {}}
    for name, written in figures.items():
        assert levels([*gpu_check.run_benchmark("cpu", "tiny", 1, name, written)]) == {"ok"}
    assert [set(written["rows"]) for written in figures.values()] == [{"UGround", "LISA"}] * 2
    assert (figures["table_10"]["table"], figures["table_11"]["table"]) == (10, 11)
    printed = capsys.readouterr().out
    assert all(f"Table {number}, " in printed for number in (10, 11))
    fails = SimpleNamespace(run=lambda command: subprocess.CompletedProcess(command, 2))
    monkeypatch.setattr(gpu_check, "subprocess", fails)
    (finding,) = gpu_check.run_benchmark("cpu", "tiny", 1, "table_10", {})
    assert (finding.level, finding.text) == ("problem", "bench.py --table 10: exit code 2")


def test_a_large_model_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "check_installation", lambda: [])
    with pytest.raises(ValueError, match="--preset 7b needs a GPU, and this runs on cpu; use --preset tiny"):
        gpu_check.main(["--device", "cpu"])
