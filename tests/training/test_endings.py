"""How train_ds.py and merge_lora.py end when the disk, a worker or the user ends them: one line, no traceback."""

from __future__ import annotations

import pytest
from safetensors import SafetensorError

import train_ds
from scripts import merge_lora
from utils.config import Config
from utils.training.checkpoint_files import CheckpointError


def raising(error: BaseException):
    def call(*_, **__):
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (SafetensorError("I/O error"), 2, "I/O error"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 2, "is memory too small"),
        (RuntimeError("[pair.cc:534] Connection closed by peer"), 2, "another process of the run has ended"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_training_ends_with_a_line_that_says_how_to_resume(monkeypatch, capsys, error, code, words):
    monkeypatch.setattr(train_ds, "load_config", raising(error))
    assert train_ds.main([]) == code
    printed = capsys.readouterr().err.strip()
    assert words in printed
    assert "--auto_resume true" in printed
    assert "disk" not in printed or not isinstance(error, RuntimeError)
    assert len(printed.splitlines()) == 1


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(train_ds, "load_config", raising(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes"):
        train_ds.main([])


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    config = Config()
    (tmp_path / "file").touch()
    config.train.log_base_dir, config.train.exp_name = str(tmp_path / "file"), "run"
    with pytest.raises(CheckpointError, match=r"--log_base_dir: .*file/run cannot be written: Not a directory"):
        train_ds.lock_folder(config)


@pytest.mark.parametrize(("error", "code"), [(SafetensorError("I/O error"), 2), (KeyboardInterrupt(), 130)])
def test_merging_ends_with_a_line(monkeypatch, tmp_path, capsys, error, code):
    monkeypatch.setattr(merge_lora, "trained_state", raising(error))
    assert merge_lora.main(["--checkpoint", str(tmp_path), "--output", str(tmp_path / "out")]) == code
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
