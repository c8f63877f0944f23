"""scripts/gpu_check.py on the CPU: its parts agree with themselves, and each finds what it is for."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_run import ROOT, environment

from model.sam_cache import FeatureCache
from model.UGround import UGroundForCausalLM
from scripts import bench, gpu_check
from utils.config import Config, load_config
from utils.diagnostics import benchmark, costs, device_checks, memory_probe
from utils.diagnostics.findings import Finding, ok, problem
from utils.diagnostics.memory_model import Plan, expected, on_cuda

RANKS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "UGROUND_BACKEND"}


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
    written, given, sampled, _, conversation = device_checks.check_answers("cpu")
    assert (written.level, given.level, sampled.level) == ("problem",) * 3
    assert conversation.level == "ok"  # it is answered by another function
    assert "other tokens" in written.text
    assert "other layers" in given.text


def test_a_step_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen = {name: device_checks.STEPS[name] for name in ("checkpointing, offloaded", "feature cache")}
    monkeypatch.setattr(device_checks, "STEPS", chosen)
    monkeypatch.setattr(memory_probe, "MEASURED_STEPS", 2)
    caches: list[FeatureCache] = []
    monkeypatch.setattr(FeatureCache, "_evict", lambda self: caches.append(self))
    findings = list(device_checks.check_steps("cpu", "tiny"))
    assert levels(findings) == {"ok"}
    for name, finding in zip(chosen, findings, strict=True):
        pattern = rf"{name}: ([\d.]+) s, .* ([\d.]+) GB m.* ([\d.]+) GB"
        seconds, measured, formula = re.search(pattern, finding.text).groups()
        assert float(seconds) > 0
        assert 0 <= float(measured) < 1  # memory that an earlier test has freed is not counted
        assert 0.05 < float(formula) < 1
    assert (caches[0].misses, caches[0].hits) == (2, 2)  # two images: the second step reads what the first has written


def test_a_step_that_does_not_fit_and_a_formula_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([None, 0.5, 0.95, 1.2, 1.0])  # of what the formula expects; None = out of memory

    def measure_step(plan: Plan, config: Config) -> memory_probe.Measured:
        if (share := next(peaks)) is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return memory_probe.Measured(plan, share * on_cuda(expected(plan)), 0.3)

    monkeypatch.setattr(memory_probe, "measure_step", measure_step)
    findings = list(device_checks.check_steps("cuda", "tiny"))
    assert [finding.level for finding in findings] == ["warning", "warning", "ok", "warning", "ok"]
    assert re.fullmatch(r"the formula expects \d+\.\d GB", findings[0].fix)
    assert "(0.50)" in findings[1].text


def test_two_processes_share_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, str]] = []

    def run(command, env, **_options) -> subprocess.CompletedProcess:
        if "train_ds.py" in command:
            started.append({name: env[name] for name in sorted(RANKS) if name in env})
        code = int(env.get("RANK") == "1" and env.get("UGROUND_BACKEND") == "gloo")
        return subprocess.CompletedProcess(command, code, stdout="", stderr="RuntimeError: not for gloo")

    monkeypatch.setattr(subprocess, "run", run)
    for gpus, level in ((1, "warning"), (2, "ok")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        (finding,) = device_checks.check_two_processes("cuda")
        assert finding.level == level, finding
    started.sort(key=lambda ranks: (ranks.get("UGROUND_BACKEND", ""), ranks["RANK"]), reverse=True)
    assert started == [
        {"LOCAL_RANK": "0", "RANK": "1", "UGROUND_BACKEND": "gloo", "WORLD_SIZE": "2"},
        {"LOCAL_RANK": "0", "RANK": "0", "UGROUND_BACKEND": "gloo", "WORLD_SIZE": "2"},
        {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"},
        {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"},
    ]


def test_a_process_that_waits_for_another_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_checks, "PATIENCE", 0.1)
    finding = device_checks.run_programs("wait", ["-c", "import time; time.sleep(60)"], [dict(os.environ)] * 2)
    assert (finding.level, finding.text) == ("problem", "wait: exit code 1: not finished after 0.1 s")


def test_synchronizations_are_counted_by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []

    def call() -> None:
        if modes:
            for _ in range(2):
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            warnings.warn("something else", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    ((place, count),) = device_checks.synchronizations(call).items()
    assert (place.split(":")[0], count, modes) == ("test_device_checks.py", 2, ["warn", "default"])


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

    others = ("answers", "synchronizations", "programs", "two_processes", "quantization", "steps")
    for name in (f"check_{other}" for other in others):
        monkeypatch.setattr(device_checks, name, lambda *_: [ok("fine")])
    monkeypatch.setattr(device_checks, "check_training_numbers", check_training_numbers)
    monkeypatch.setattr(gpu_check, "check_installation", lambda: [problem("no gradio", "install it")])
    monkeypatch.setattr(gpu_check, "run_benchmark", lambda *args: args[-1].update(ratio=1) or [ok(args[-2])])
    path = tmp_path / "figures.json"
    assert gpu_check.main(["--device", "cpu", "--preset", "tiny", "--json", str(path)]) == 1
    page = capsys.readouterr().out
    assert "AcceleratorError: CUDA error: invalid argument" in page
    assert page.count("fine") == len(others)
    assert re.search(r"Installation \d s, Numbers \d s, .*; 0.0 minutes", page)
    written = json.loads(path.read_text())
    assert [finding["level"] for finding in written["findings"]] == ["problem", "problem", *["ok"] * 9]
    assert [finding["text"] for finding in written["findings"][-3:]] == ["bench", "table_10", "table_11"]
    assert list(written["seconds"]) == ["Installation", "Numbers", "Programs", "Steps of tiny", "Benchmark"]
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


def blocked(package: str, folder: Path) -> dict[str, str]:
    """The environment of processes that cannot import the package."""
    (folder / "sitecustomize.py").write_text(f"import sys; sys.modules[{package!r}] = None\n")
    return environment(PYTHONPATH=str(folder))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The programs that would have been started, which all succeed."""
    commands: list[list[str]] = []

    def run(command, **_options) -> subprocess.CompletedProcess:
        commands.append(command[1:])
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_without_deepspeed_the_untrained_model_is_merged(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    checks = (device_checks.check_programs, device_checks.check_two_processes)
    first, *others, last = [finding for check in checks for finding in check("cpu")]
    (steps,) = device_checks.check_steps("cpu", "tiny")
    assert {first.level, last.level, steps.level} == {"skipped"}
    assert all("install deepspeed" in finding.fix for finding in (first, last, steps))
    assert [finding.text.split(":")[0] for finding in others] == ["draw data", "merge", "evaluate", "ask"]
    assert all("train_ds.py" not in command for command in started)
    assert "--config" in started[1]


@pytest.mark.slow
def test_programs_that_run_without_deepspeed(tmp_path: Path) -> None:
    code = "from utils.diagnostics.device_checks import check_programs as c; print(*c('cpu'), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=blocked("deepspeed", tmp_path), capture_output=True, text=True
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["skipped", *["ok"] * 4], done


@pytest.mark.slow
def test_without_segment_anything_the_installation_is_the_only_part(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/gpu_check.py", "--device", "cpu", "--preset", "tiny"]
    env = blocked("segment_anything", tmp_path)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "skipped  everything else -> fix the installation first (No module named 'segment_anything" in done.stdout


def test_programs_train_with_flags_that_exist(started: list[list[str]]) -> None:
    """Trainings, resuming and two processes themselves are tests of tests/training."""
    findings = [*device_checks.check_programs("cpu"), *device_checks.check_two_processes("cpu")]
    assert {finding.level for finding in findings} == {"ok"}
    trainings = [load_config(command[1:]) for command in started if command[0] == "train_ds.py"]
    assert [(config.train.epochs, config.train.auto_resume) for config in trainings] == [
        (1, False),
        (2, True),
        (1, False),
        (1, False),  # two processes
        (1, False),
    ]


@pytest.mark.slow
def test_the_check_on_the_cpu(tmp_path: Path) -> None:
    """Every method's numbers; its other parts have tests of their own."""
    path = tmp_path / "figures.json"
    command = [sys.executable, "scripts/gpu_check.py", "--device", "cpu", "--preset", "tiny"]
    command += ["--parts", "numbers"]
    done = subprocess.run(
        [*command, "--json", str(path)], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    written = json.loads(path.read_text())
    assert {finding["level"] for finding in written["findings"]} == {"ok", "skipped"}
    assert list(written["seconds"]) == ["Installation", "Numbers"]
