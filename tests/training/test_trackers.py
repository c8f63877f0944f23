"""Where curves are shown beside log.jsonl: stand-ins for wandb and trackio record what they are given."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from utils.config import ConfigError, load_config, missing_paths
from utils.training.run_log import RunLog
from utils.training.trackers import REMOTE_RUN

VALUES = {
    **dict.fromkeys(("loss", "text", "mask_bce", "mask_dice", "map_bce", "map_dice"), 0.5),
    **dict.fromkeys(("reward", "baseline", "lr", "gradient", "images_per_s"), 0.25),
    "layers": [0, 2, 0, 1],
}


class StandIn(SimpleNamespace):
    """The part of wandb's and trackio's interface that both have; ``started`` and ``logged`` record the calls."""

    def __init__(self) -> None:
        super().__init__(started=[], logged=[], finished=0, broken=False)

    def init(self, *args, **options) -> StandIn:
        self.started.append({"project": args[0]} | options if args else options)
        return self

    def log(self, values, step) -> None:
        if self.broken:
            raise ConnectionError("no route to host")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1

    def Histogram(self, np_histogram):
        return np_histogram

    def Image(self, image):
        return image.shape


@pytest.fixture
def packages(monkeypatch) -> dict[str, StandIn]:
    found = {name: StandIn() for name in ("wandb", "trackio")}
    for name, package in found.items():
        monkeypatch.setitem(sys.modules, name, package)
        monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
    return found


def log_of(folder: Path, report_to: Sequence[str], start: int = 0) -> RunLog:
    folder.mkdir(exist_ok=True)
    return RunLog(folder, start, 4, 2, report_to, {"train": {"lr": 0.1}})


def report(log: RunLog, step: int) -> None:
    log.train(step, VALUES, {"gate": 0.1})
    log.picture(step, "ReasonSeg_val", np.zeros((8, 9, 3), np.uint8))
    log.validation(step, {"ReasonSeg|val": {"gIoU": 0.75}}, best=True)


def problems(*arguments: str) -> list[str]:
    return missing_paths(load_config(arguments, needs=()))


def test_wandb_and_trackio_get_the_tags_of_tensorboard(tmp_path, packages):
    log = log_of(tmp_path / "run", ("tensorboard", "wandb", "trackio"))
    report(log, 1)
    log.close()
    assert (tmp_path / "run/tensorboard").is_dir()
    run = (tmp_path / "run" / REMOTE_RUN).read_text().strip()
    assert run.startswith("run-")
    (wandb,), (trackio,) = packages["wandb"].started, packages["trackio"].started
    assert (wandb["project"], wandb["id"], wandb["name"], wandb["resume"]) == ("uground", run, "run", "allow")
    assert (trackio["project"], trackio["name"], trackio["resume"]) == ("uground", run, "allow")
    assert wandb["config"] == trackio["config"] == {"train": {"lr": 0.1}}
    assert wandb["dir"] == str(tmp_path / "run")
    for package in packages.values():
        assert {step for step, _ in package.logged} == {1}
        sent = {tag: value for _, values in package.logged for tag, value in values.items()}
        assert (sent["loss/text"], sent["gradient/gate"], sent["val/ReasonSeg_val/gIoU"]) == (0.5, 0.1, 0.75)
        assert sent["val/ReasonSeg_val"] == (8, 9, 3)
        counts, edges = sent["policy/layers"]
        assert counts.tolist() == [0, 2, 0, 1]
        assert edges.tolist() == [-0.5, 0.5, 1.5, 2.5, 3.5]
        assert package.finished == 1


def test_a_resumed_run_continues_the_same_remote_run(tmp_path, packages):
    for start in (0, 2):
        log_of(tmp_path / "run", ("wandb", "trackio"), start).close()
    log_of(tmp_path / "other", ("wandb",)).close()
    first, resumed, other = (started["id"] for started in packages["wandb"].started)
    assert first == resumed != other
    assert {started["name"] for started in packages["trackio"].started} == {first}


def test_a_tracker_that_fails_is_dropped_with_one_warning(tmp_path, packages, capsys, monkeypatch):
    def init(**_):
        raise RuntimeError("not logged in")

    monkeypatch.setattr(packages["wandb"], "init", init)
    packages["trackio"].broken = True
    log = log_of(tmp_path / "run", ("wandb", "trackio"))
    for step in (1, 2):
        report(log, step)
    log.close()
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2
    assert "wandb (RuntimeError: not logged in)" in warnings[0]
    assert "trackio (ConnectionError: no route to host)" in warnings[1]
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 1, 2, 2]


def test_a_full_disk_under_tensorboard_is_a_warning(tmp_path, capsys):
    log = log_of(tmp_path / "run", ("tensorboard",))

    def full(*_):
        raise OSError(28, "No space left on device")

    log.trackers.opened["tensorboard"].scalars = full
    report(log, 1)
    log.close()
    assert "nothing more is reported to tensorboard" in capsys.readouterr().out


def test_none_turns_tensorboard_off(tmp_path):
    log = log_of(tmp_path / "run", ("none",))
    report(log, 1)
    log.close()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["log.jsonl", "pictures"]


def test_the_setting(packages):
    assert load_config([], needs=()).train.report_to == ("tensorboard",)
    assert load_config(["--report_to", "tensorboard,wandb,trackio"], needs=()).train.report_to == (
        "tensorboard",
        "wandb",
        "trackio",
    )
    with pytest.raises(ConfigError, match=r"--report_to: 'mlflow' is not one of tensorboard, wandb, trackio, none"):
        load_config(["--report_to", "tensorboard,mlflow"], needs=())
    with pytest.raises(ConfigError, match=r"names trackers and none"):
        load_config(["--report_to", "none,wandb"], needs=())
    assert not [line for line in problems("--report_to", "wandb,trackio") if "report_to" in line]


def test_a_missing_package_is_an_error_before_training(monkeypatch, packages):
    modules = sys.modules
    monkeypatch.setitem(modules, "wandb", None)  # import raises ModuleNotFoundError
    monkeypatch.setitem(modules, "trackio", SimpleNamespace())
    wandb, trackio = (line for line in problems("--report_to", "wandb,trackio") if "report_to" in line)
    assert wandb.startswith("--report_to wandb: the package cannot be imported (ModuleNotFoundError: ")
    assert wandb.endswith("pip install wandb, or leave it out")
    assert "a folder trackio/ hides the package" in trackio
