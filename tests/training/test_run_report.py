"""report.html: complete, self-contained, harmless; for runs that are finished, resumed or still running."""

import base64
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

import train_ds
from scripts import report as program
from utils.config import Config, to_dict
from utils.inference import cli
from utils.plotting.charts import png
from utils.training.run_log import PICTURES, RunLog
from utils.training.run_report import BUDGET, pick_steps, write_report

EVIL = '<script>alert("x")</script> $a_b$'


def start(step=0, **values):
    given = {"command": f"train_ds.py --exp_name {EVIL}", "resumed": "", "commit": "abc", "processes": 2}
    data = [{"type": "reason_seg", "name": EVIL, "share": 0.5, "images": 1500}]
    given |= {"date": "2026-11-25T12:30:00+00:00", "device": "NVIDIA H100"}
    parameters = {"gate": [1152, 1152], "phi": [16, 16], "clip": [5000, 0]}
    return (
        {"kind": "start", "step": step, "data": data, "versions": {"torch": "2.0"}, "parameters": parameters}
        | given
        | values
    )


def train_line(step, **values):
    figures = {"loss": 3.0 / step, "text": 0.5, "reward": -1.2, "baseline": -1.3, "entropy": 2.0, "lr": 1e-3}
    layers = {"layers": [0, 3, step], "map_loss_by_layer": [1.4, 1.3, 1.2]}
    figures |= {"epoch": step / 2, "seconds": 100.0 * step}
    return {"kind": "train", "step": step, **figures, **layers, "gradient": 2.0, "gradients": {"gate": 0.1}} | values


def val_line(step):
    return {"kind": "val", "step": step, "metrics": {f"ReasonSeg|{EVIL}": {"gIoU": 0.123456, "cIoU": 0.4}}}


@pytest.fixture
def make_run(tmp_path):
    """make_run(lines, torn=False) -> a run's folder."""

    def make(lines, torn=False):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "log.jsonl").write_text(text + '{"kind": "train", "st' * torn)
        config = Config()
        config.train.epochs, config.train.steps_per_epoch, config.train.exp_name = 2, 2, EVIL
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
        return tmp_path

    return make


def test_everything_is_in_one_file_and_nothing_is_executed(make_run):
    folder = make_run([start(), *map(train_line, (1, 2)), val_line(2), *map(train_line, (3, 4)), val_line(4)])
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/index.json").write_text('{"latest": "step_00000004", "best": "step_00000002"}')
    sheet = folder / PICTURES / "ReasonSeg_val" / "step_00000002.png"
    sheet.parent.mkdir(parents=True)
    sheet.write_bytes(png(np.zeros((20, 30, 3), np.uint8), EVIL))
    text = write_report(folder).read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert all(link.startswith("data:image/png;base64,") for link in re.findall(r'(?:src|href)="([^"]*)"', text))
    assert "http://" not in text
    assert "https://" not in text
    assert base64.b64encode(sheet.read_bytes()).decode() in text
    assert "Step 4 of 4 (finished), 2 processes" in text
    assert re.search(r"<td>2</td><td>0.1235</td><td>0.4</td><td>best</td>", text)
    assert "<p>started: 2026-11-25 12:30:00 UTC; time: 0:06:40; device: NVIDIA H100; commit: abc</p>" in text
    assert "<td>gate</td><td>1,152</td><td>1,152</td>" in text
    assert "<td>all</td><td>6,168</td><td>1,168</td>" in text
    assert "<td>epochs</td><td>2</td>" in text  # a difference from the defaults
    assert "<td>lr</td>" not in text
    assert text.count("<figure>") == 6  # validation, losses, policy, layers, gradients, a sheet
    assert len(text) < 3_000_000


def test_a_run_that_is_still_running(make_run):
    """Resumed, its last line half written, nothing validated yet."""
    folder = make_run([start(), train_line(1), start(1, command="train_ds.py --auto_resume true"), train_line(2)], True)
    text = write_report(folder).read_text()
    assert "Step 2 of 4 (not finished)" in text
    assert "train_ds.py --auto_resume true    # from step 1" in text
    assert "time: 0:05:00" in text  # 100 s before the interruption, 200 s after it
    assert "<h2>Validation</h2>" not in text


def test_a_run_that_has_only_started_and_one_of_text_alone(make_run):
    assert "Step 0 of 4" in write_report(make_run([start()])).read_text()
    bare = {"kind": "train", "step": 1, "loss": float("nan"), "layers": [0, 0, 0], "gradients": {}}
    assert "<h2>Losses</h2>" in write_report(make_run([start(), bare])).read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: {epochs: [", "is not valid YAML"),
        ("[]", "holds no sections of settings"),
        ("train: 3", "holds no sections of settings"),
        ("train: {steps_per_epoch: }", "train.steps_per_epoch is None, not a whole number"),
    ],
)
def test_a_damaged_configuration_is_named(make_run, content, message):
    folder = make_run([start(), train_line(1)])
    (folder / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=rf"config\.yaml:? {message}"):
        write_report(folder)


def test_a_log_of_an_older_version_has_neither_times_nor_parameters(make_run):
    lines = [start(date="", device="", parameters={}), train_line(1)]
    del lines[1]["seconds"]
    text = write_report(make_run(lines)).read_text()
    assert "<p>commit: abc</p>" in text
    assert "<h2>Parameters</h2>" not in text


def test_many_large_pictures_are_thinned_out(make_run):
    folder = make_run([start()])
    for step in range(1, 10):
        path = folder / PICTURES / "val" / f"step_{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(BUDGET // 3 + 1))
    text = write_report(folder).read_text()
    assert re.findall(r"<figcaption>val, step (\d)</figcaption>", text) == ["1", "9"]
    assert pick_steps([1, 2, 3, 4, 5], 3) == [1, 3, 5]
    assert pick_steps([], 3) == []


def test_the_program_rejects_what_is_not_a_run(make_run, tmp_path, capsys):
    assert cli.run(program.main, [str(tmp_path)]) == 2
    assert "no log.jsonl" in capsys.readouterr().err
    folder = make_run([start(), train_line(1)])
    assert cli.run(program.main, [str(folder)]) == 0
    assert "report.html" in capsys.readouterr().out


def test_a_report_that_fails_does_not_make_a_run_fail(tmp_path):
    printed = []
    run = SimpleNamespace(config=SimpleNamespace(run_folder=tmp_path), log=SimpleNamespace(print=printed.append))
    train_ds.report_run(run)
    assert "warning: no report" in printed[0]
    assert "scripts/report.py" in printed[0]


def test_pictures_of_steps_that_are_trained_again_go(tmp_path):
    log = RunLog(tmp_path, 0, 4, 2)
    for step in (2, 4):
        log.picture(step, "ReasonSeg_val", np.zeros((8, 9, 3), np.uint8))
    log.close()
    RunLog(tmp_path, 2, 4, 2).close()
    assert [path.name for path in (tmp_path / PICTURES).rglob("*.png")] == ["step_00000002.png"]
