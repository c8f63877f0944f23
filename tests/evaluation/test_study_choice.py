"""The comparison of ways to choose a layer: shares of the oracle's gain, from measured runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from scripts.dev import study_choice

QUERIES = 8
KINDS = np.array(["near", "far"] * (QUERIES // 2))
FORCED = np.where(KINDS[:, None] == "near", [[0.8, 0.2, 0.4]], [[0.2, 0.4, 0.8]])  # layers 1, 2, 3


def write_log(folder: Path, rule: str) -> None:
    gate = {"gate": 1.0} if rule == "argmax" else {"phi": 1.0}
    lines = [{"kind": "train", "step": step, "entropy": 2.0 - step / 100, "gradients": gate} for step in (60, 180)]
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def write_run(folder: Path, rule: str, own: np.ndarray, policy: np.ndarray) -> None:
    (folder / "merged").mkdir(parents=True)
    write_log(folder, rule)
    np.savez(
        folder / "choice.ReasonSeg_val.npz",
        images=np.arange(QUERIES),
        kinds=KINDS,
        layers=np.array([1, 2, 3]),
        forced=FORCED,
        policy=policy,
        own=own,
        rule=np.array(rule),
    )


@pytest.fixture
def runs(tmp_path):
    """Seed 0 of three rows: last has 0.6, the oracle 0.8; the policy is right for near queries, and for half of far."""
    folder, uniform = tmp_path / "choice", np.full((QUERIES, 3), 1 / 3)
    write_run(folder / "last-0", "last", FORCED[:, 2], uniform)
    write_run(folder / "layer-4-0", "fixed:1", FORCED[:, 0], uniform)
    chosen = np.where(KINDS == "near", 0, np.where(np.arange(QUERIES) < 4, 2, 0))
    policy = np.eye(3)[chosen] * 0.8 + 0.2 / 3
    write_run(folder / "policy-exact-gradient-0", "argmax", FORCED[np.arange(QUERIES), chosen], policy)
    return folder


def test_the_share_of_the_oracle_s_gain(runs, capsys):
    figure = runs.parent / "choice.png"
    arguments = ["--runs", str(runs), "--dataset_dir", "-", "--val_dataset", "ReasonSeg|val", "--figure", str(figure)]
    assert study_choice.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| row | gIoU | gain over last | share of the oracle's gain |" in printed
    assert "| last | 60.0 | +0.0 [+0.0, +0.0] | 0% | 60.0 | 80.0 | - | - | - |" in printed
    [policy] = re.findall(r"\| policy, exact gradient \| 65.0 .*", printed)
    assert "| 25% |" in policy  # (0.65 - 0.6) / (0.8 - 0.6)
    assert policy.endswith("| 1.40 | - | 0.20 |")
    [oracle] = re.findall(r"\| oracle of policy, exact gradient \| .*", printed)
    assert "| 100% |" in oracle
    assert figure.is_file()


def test_layers_by_kind_of_query(runs, capsys):
    study_choice.main(["--runs", str(runs), "--dataset_dir", "-", "--val_dataset", "ReasonSeg|val"])
    by_kind = capsys.readouterr().out.partition("layers by kind")[2]
    assert "| policy, exact gradient | 80.0: 1 (100%) | 50.0: 1 (50%), 3 (50%) |" in by_kind
    assert "| last | 40.0: 3 (100%) | 80.0: 3 (100%) |" in by_kind


def test_a_folder_without_the_oracle_s_row_is_refused(runs):
    with pytest.raises(ValueError, match="'uniform': no such row in --runs; it has layer 4, last, policy, exact"):
        study_choice.main(
            ["--runs", str(runs), "--dataset_dir", "-", "--val_dataset", "ReasonSeg|val", "--oracle", "uniform"]
        )
    with pytest.raises(ValueError, match="no table of scripts"):
        study_choice.folders_of(runs.parent)


def test_runs_are_measured_once_for_each_split(version, val_data, tmp_path, capsys):
    """A merged model on disk; its gate is random, and its rule the policy's mode."""
    folders = [tmp_path / "choice" / name for name in ("layer-4-0", "policy-exact-gradient-0")]
    for folder, rule in zip(folders, ("fixed:4", "policy")):
        shutil.copytree(version, folder / "merged")
        write_log(folder, rule)
        config = json.loads((folder / "merged/config.json").read_text())
        (folder / "merged/config.json").write_text(json.dumps(config | {"layer_selection": rule}))
    arguments = ["--runs", str(tmp_path / "choice"), "--dataset_dir", str(val_data), "--val_dataset"]
    assert study_choice.main([*arguments, "ReasonSeg|val_short"]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("measuring") == 2
    assert "| layer 4 | " in printed.out
    fixed, policy = (dict(np.load(folder / "choice.ReasonSeg_val_short.npz")) for folder in folders)
    assert fixed["forced"].shape == policy["policy"].shape == (3, 4)
    assert (fixed["own"] == fixed["forced"][:, 3]).all()  # layers 1 to 4
    assert (policy["own"] == policy["forced"][np.arange(3), policy["policy"].argmax(1)]).all()
    study_choice.main([*arguments, "ReasonSeg|val_short"])
    assert "measuring" not in capsys.readouterr().err
    study_choice.main([*arguments, "ReasonSeg|val_long"])
    assert "measuring" in capsys.readouterr().err


def test_two_tables_are_compared_together(runs, capsys):
    other = runs.with_name("choice_rewards")
    write_run(other / "map-iou-policy-1", "argmax", FORCED.max(1), np.eye(3)[FORCED.argmax(1)])
    arguments = ["--runs", str(runs), str(other), "--dataset_dir", "-", "--val_dataset", "ReasonSeg|val"]
    assert study_choice.main(arguments) == 0
    assert re.search(r"\| map IoU, policy \| 80.0 .* \| 100% \|", capsys.readouterr().out)
