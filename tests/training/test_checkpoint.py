"""Checkpoint folders: complete or absent, messages by name, compared before a run resumes from them."""

from __future__ import annotations

import copy
import errno
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import ROOT

from model.loading.weights import Loaded
from model.lora import add_lora
from utils.config import SECTION_OF, Config, config_from, to_dict
from utils.datasets import DataOptions, get_train_dataset
from utils.datasets.spec import Spec
from utils.training import checkpoint as checkpoints
from utils.training.checkpoint import differences, find_checkpoint, read_index, save_checkpoint
from utils.training.checkpoint_files import CheckpointError, check_files, plain_data
from utils.training.data_content import comparable, content_of
from utils.training.run_lock import lock_run
from utils.training.run_log import truncate_log
from utils.training.step_layout import StepLayout, effects

META = {name: kind() for name, kind in checkpoints.META_KINDS.items()}


class Engine:
    """Writes a file where DeepSpeed would write its own."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.module, self.fails = torch.nn.Linear(2, 2), fails

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool, exclude_frozen_parameters: bool) -> None:
        assert exclude_frozen_parameters
        assert not save_latest
        (Path(folder) / tag).mkdir()
        (Path(folder) / tag / "states.pt").write_text("half")
        if self.fails:
            raise self.fails
        (Path(folder) / tag / "states.pt").write_text("whole")


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def test_latest_and_best_stay_and_others_go(tmp_path):
    for step, best in ((1, True), (2, False), (3, True), (4, False), (5, False)):
        save_checkpoint(Engine(), tmp_path, META | {"step": step}, best)
    assert read_index(tmp_path) == {"latest": "step_00000005", "best": "step_00000003"}
    assert names(tmp_path) == {"index.json", "step_00000003", "step_00000005"}
    assert checkpoints.read_meta(find_checkpoint(tmp_path, "best"))["step"] == 3
    assert find_checkpoint(tmp_path / "checkpoints/step_00000005").name == "step_00000005"


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")],
)
def test_a_failed_save_changes_nothing(tmp_path, failure):
    save_checkpoint(Engine(), tmp_path, META | {"step": 1}, True)
    with pytest.raises(
        CheckpointError, match=r"could not be written .*(No space|failed writing).*Earlier checkpoints are"
    ):
        save_checkpoint(Engine(failure), tmp_path, META | {"step": 2}, True)
    assert names(tmp_path) == {"index.json", "step_00000001"}
    assert read_index(tmp_path) == {"latest": "step_00000001", "best": "step_00000001"}
    assert (find_checkpoint(tmp_path) / "states.pt").read_text() == "whole"


def test_a_failure_while_publishing_keeps_the_old_index(tmp_path, monkeypatch):
    save_checkpoint(Engine(), tmp_path, META | {"step": 1}, True)
    monkeypatch.setattr(checkpoints, "write_atomically", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(Engine(), tmp_path, META | {"step": 2}, True)
    assert read_index(tmp_path)["latest"] == "step_00000001"
    assert (find_checkpoint(tmp_path) / "states.pt").read_text() == "whole"
    monkeypatch.undo()
    save_checkpoint(Engine(), tmp_path, META | {"step": 2}, True)  # what was left of step 2 is in nobody's way
    assert names(tmp_path) == {"index.json", "step_00000002"}


def test_left_overs_of_a_killed_process_go(tmp_path):
    left = tmp_path / "checkpoints/partial_step_00000007"
    left.mkdir(parents=True)
    save_checkpoint(Engine(), tmp_path, META | {"step": 1}, False)
    assert names(tmp_path) == {"index.json", "step_00000001"}
    assert read_index(tmp_path) == {"latest": "step_00000001"}


def test_what_cannot_be_found_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    save_checkpoint(Engine(), tmp_path, META | {"step": 1}, False)
    with pytest.raises(CheckpointError, match="'best'"):
        find_checkpoint(tmp_path, "best")
    (find_checkpoint(tmp_path) / "meta.json").unlink()
    with pytest.raises(CheckpointError, match="is not complete"):
        find_checkpoint(tmp_path)
    (tmp_path / "checkpoints/index.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        find_checkpoint(tmp_path)


@pytest.fixture
def meta():
    config = Config()
    config.model.version = config.model.vision_tower = config.model.vision_pretrained = config.data.dataset_dir = "x"
    return {
        "config": to_dict(config),
        "base": {"model": "aa", "visual_model": "bb"},
        "data": [{"name": "ReasonSeg|train", "images": 239, "content": "v1:0a"}],
        "vocabulary": "10",
        "probe": [3, 4],
        "trained": {"a": [2, 3], "b": [1]},
        "processes": 1,
    }


def test_the_same_run_has_no_differences(meta):
    assert differences(meta, json.loads(json.dumps(meta))) == []


def test_settings_that_do_not_matter_may_change(meta):
    other = copy.deepcopy(meta)
    other["config"]["train"] |= {"epochs": 99, "log_every": 3, "exp_name": "b", "auto_resume": True}
    other["config"]["data"] |= {"workers": 0, "dataset_dir": "moved"}
    other["config"]["model"] |= {"version": "moved"}
    assert differences(other, meta) == []


def test_what_older_checkpoints_or_other_readers_say_of_content_is_not_compared(meta):
    for change in ({"content": None}, {"content": "v2:0b"}):
        other = copy.deepcopy(meta)
        other["data"][0].update(change)
        assert differences(meta, other) == []
    del other["vocabulary"], other["probe"]
    assert differences(meta, other) == []


def test_annotations_that_change_behind_a_name_change_the_content(val_data):
    folder = val_data / "reason_seg/ReasonSeg/val"
    folder = folder.rename(folder.with_name("train"))

    def content() -> str:
        return content_of(get_train_dataset(Spec.parse("ReasonSeg|train"), val_data, DataOptions()))

    before = content()
    assert before == content()
    path = folder / "3.json"
    path.write_text(path.read_text().replace("red star", "red disc"))
    assert comparable(content(), before)
    assert content() != before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m["config"]["model"].update(lora_r=64), "lora_r: 8 in the checkpoint, now 64"),
        (lambda m: m["config"]["train"].update(batch_size=3), "images per step: 20 in the checkpoint (batch_size 2 x"),
        (
            lambda m: m["config"]["loss"].update(dice_loss_weight=1.0),
            "dice_loss_weight: 4.0 in the checkpoint, now 1.0",
        ),
        (lambda m: m["base"].update(model="cc"), "--version: the base weights of model are not the same"),
        (lambda m: m["data"][0].update(images=240), "data set ReasonSeg|train"),
        (lambda m: m["data"][0].update(content="v1:0b"), "data set ReasonSeg|train: its annotations have changed"),
        (lambda m: m.update(vocabulary="11"), "--version: the tokenizer's vocabulary"),
        (lambda m: m.update(probe=[4, 3]), "--version: the tokenizer splits 'Can you"),
        (lambda m: m.update(processes=8), "images per step: 20 in the checkpoint (batch_size 2 x"),
        (lambda m: m["trained"].update(b=[2]), "trainable parameters: b"),
    ],
)
def test_what_makes_it_another_run(meta, change, expected):
    other = copy.deepcopy(meta)
    change(other)
    messages = differences(other, meta)
    assert len(messages) == 1
    assert messages[0].startswith(expected)


def test_the_images_of_a_step_may_be_divided_otherwise(meta):
    other = copy.deepcopy(meta)
    other["config"]["train"] |= {"batch_size": 1, "grad_accumulation_steps": 5}
    other["processes"] = 4
    assert differences(other, meta) == []
    other["processes"] = 3
    [message] = differences(other, meta)
    assert message.endswith("now 15 (batch_size 1 x grad_accumulation_steps 5 x 3 processes); start a number of "
                            "processes that divides 20")  # fmt: skip


@pytest.mark.parametrize(
    ("method", "now", "expected"),
    [
        ({}, StepLayout(1, 1, 4), []),
        ({}, StepLayout(1, 4, 1), ["the reward's moving average"]),
        ({"baseline": "state_critic"}, StepLayout(1, 4, 1), ["the reward's moving average"]),
        ({"policy_gradient": "exact"}, StepLayout(1, 4, 1), []),
        ({"policy_gradient": "leave_one_out"}, StepLayout(1, 4, 1), []),
        (
            {"policy_gradient": "leave_one_out", "scale_advantage": True},
            StepLayout(1, 4, 1),
            ["advantages are scaled"],
        ),
        ({"layer_selection": "last"}, StepLayout(1, 4, 1), []),
        ({"objective": "grpo"}, StepLayout(1, 4, 1), []),
        ({"objective": "both"}, StepLayout(1, 4, 1), ["the reward's moving average"]),
        ({"reward": "batch"}, StepLayout(1, 1, 4), ["the reward of a batch"]),
        ({"baseline": "critic", "scale_advantage": True}, StepLayout(2, 2, 1), ["the critic", "advantages are scaled"]),
        ({"lora_dropout": 0.05}, StepLayout(1, 1, 4), ["dropout"]),
    ],
)
def test_what_another_division_changes(method, now, expected):
    config = Config()
    for name, value in ({"lora_dropout": 0.0} | method).items():
        setattr(getattr(config, SECTION_OF[name]), name, value)
    found = effects(config, now, StepLayout(4, 1, 1))
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected))


def test_a_configuration_of_a_newer_version_is_refused(meta):
    meta["config"]["train"]["from_the_future"] = 1
    with pytest.raises(ValueError, match=r"unknown setting train\.from_the_future"):
        config_from(meta["config"], "meta.json")


def test_trained_shapes_are_parameters_that_train_and_buffers(tiny_model):
    model = add_lora(tiny_model, r=2)
    shapes = checkpoints.trained_shapes(model, [Loaded("visual_model", "sam.pth", 1, "float32", "")])
    assert shapes["base_model.model.ppm.baseline"] == []
    assert shapes["base_model.model.lm_head.weight"] == list(tiny_model.lm_head.weight.shape)
    assert any("lora_A" in name for name in shapes)
    assert not any("vision_tower" in name for name in shapes)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert not set(frozen) & set(shapes)
    new = checkpoints.trained_shapes(model, [Loaded("visual_model", "new", 1, "float32", "")])
    assert set(new) - set(shapes) == {name for name in frozen if "visual_model." in name}  # no file gives them


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    save_checkpoint(Engine(), tmp_path, META | {"step": 1}, False)
    return find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_text("wh"), r"states\.pt has 2 bytes of 5"),
        (lambda path: path.write_text("wholf"), r"states\.pt has changed since it was written"),
        (lambda path: path.unlink(), r"states\.pt cannot be read: No such file"),
    ],
)
def test_files_that_are_not_those_written_are_named(saved, change, message):
    check_files(saved, checkpoints.read_meta(saved))
    change(saved / "states.pt")
    with pytest.raises(CheckpointError, match=message):
        check_files(saved, checkpoints.read_meta(saved))


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"latest": 3}',
        '{"latest": "../step_00000001"}',
        '{"latest": "step_00000001", "bess": "step_00000001"}',
        "\0\0",
        "{",
        "",
    ],
)
def test_an_index_that_names_no_checkpoint_is_refused(saved, content):
    """Not taken for a run that has not begun: the old one would be overwritten."""
    (saved.parent / "index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        read_index(saved.parents[1])


@pytest.mark.parametrize("content", [b"[]", b"\xff", b'{"step": 4}', b'{"step": "4"}', b""])
def test_metadata_that_lack_a_part_are_named(saved, content):
    (saved / "meta.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"meta\.json"):
        checkpoints.read_meta(saved)


@pytest.mark.parametrize("row", ["ReasonSeg|train", {"images": 3}, {"name": None}, ["name"]])
def test_data_sets_in_metadata_need_names(saved, row):
    """In checkpoints without a checksum of ``meta.json``, as older ones are."""
    meta = checkpoints.read_meta(saved)
    (saved / "meta.json").write_text(json.dumps(meta | {"data": [row]}))
    with pytest.raises(CheckpointError, match=r"meta\.json lacks data"):
        checkpoints.read_meta(saved)


def test_the_file_whose_content_deepspeed_does_not_know_is_named(tmp_path):
    torch.save({"optimizer_state": 1}, tmp_path / "states.pt")
    with pytest.raises(CheckpointError, match=r"'optimizer_state_dict'; last read: states\.pt"), plain_data(tmp_path):
        torch.load(tmp_path / "states.pt")["optimizer_state_dict"]


def test_metadata_that_have_changed_are_named(saved):
    path = saved / "meta.json"
    text = path.read_text()
    assert checkpoints.read_meta(saved)["step"] == 1
    path.write_text(text.replace('"step": 1', '"step": 3'))
    with pytest.raises(CheckpointError, match=r"meta\.json has changed since it was written"):
        checkpoints.read_meta(saved)
    meta = json.loads(text)
    del meta["checksum"]  # as in checkpoints of older code
    path.write_text(json.dumps(meta))
    assert checkpoints.read_meta(saved) == meta


def test_what_ended_a_save_is_not_blamed_on_the_disk(tmp_path):
    ended = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    with pytest.raises(RuntimeError, match="killed by signal"):
        save_checkpoint(Engine(ended), tmp_path, META | {"step": 1}, False)
    assert names(tmp_path) == set()


class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("mapped", [False, True])
def test_no_code_of_a_checkpoint_is_run(tmp_path, monkeypatch, mapped):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "states.pt"
    torch.save({"note": Code()}, path)
    with pytest.raises(CheckpointError, match=r"states\.pt refers to posix\.system: no code"), plain_data(tmp_path):
        torch.load(path, weights_only=False, mmap=mapped)
    assert not (tmp_path / "ran").exists()
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"states\.pt is damaged"), plain_data(tmp_path):
        torch.load(path, weights_only=False)
    assert torch.load.__name__ == "load"
    assert "weights_only" in inspect.signature(torch.load).parameters


@pytest.mark.parametrize("scaler", ["LossScaler", "DynamicLossScaler"])
def test_what_deepspeed_writes_is_read(tmp_path, scaler):
    from deepspeed.runtime.fp16 import loss_scaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    options = (1.0,) if scaler == "LossScaler" else (2.0**16, 2.0, 1000, 1.0, 1, False)
    torch.save({"stage": ZeroStageEnum(2), "scaler": getattr(loss_scaler, scaler)(*options)}, tmp_path / "states.pt")
    with plain_data(tmp_path):
        state = torch.load(tmp_path / "states.pt", weights_only=False)
    assert state["stage"] == 2


# -- two runs of one name ----------------------------------------------------------------------------------------------

HOLD = "import sys; from pathlib import Path; from utils.training.run_lock import lock_run\n"
HOLD += "lock = lock_run(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"


def test_a_run_is_locked_until_its_process_ends(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    with pytest.raises(CheckpointError, match=rf"is in use by process {process.pid} on .*another --exp_name"):
        lock_run(tmp_path)
    process.kill()
    process.wait()
    lock_run(tmp_path).close()


# -- small files -------------------------------------------------------------------------------------------------------


def test_a_log_that_cannot_be_written_anew_keeps_its_lines(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    monkeypatch.setattr("utils.files.sync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        truncate_log(path, 1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    monkeypatch.undo()
    truncate_log(path, 1)
    assert path.read_text() == '{"step": 1}\n'
