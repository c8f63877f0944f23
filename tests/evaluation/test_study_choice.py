"""The comparison of ways to choose a layer: shares of the oracle's gain, from evaluated runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from drawn_records import SHAPE, make_record

from model.structures import IGNORE_PIXEL
from scripts.dev import study_choice
from utils.datasets.spec import Spec
from utils.evaluation.results import Provenance, Result, summarize

QUERIES, LAYERS = 8, (1, 2, 3)
KINDS = np.array(["near", "far"] * (QUERIES // 2))
FORCED = np.where(KINDS[:, None] == "near", [[0.8, 0.2, 0.4]], [[0.2, 0.4, 0.8]])


def write_run(folder: Path, rule: str, layers: np.ndarray, steps: tuple[int, ...] = (60, 180)) -> None:
    """A run that finds as many of ten pixels as the given layers' IoU says; then queries without a target."""
    gate = {"gate": 1.0} if rule == "argmax" else {"phi": 1.0}
    lines = [{"kind": "train", "step": step, "entropy": 2.0 - step / 100, "gradients": gate} for step in steps]
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    target, records = np.zeros(SHAPE, np.uint8), []
    target[0, :10] = 1
    for index, layer in enumerate(layers):
        predicted = np.zeros(SHAPE, bool)
        predicted[0, : round(10 * FORCED[index, LAYERS.index(layer)])] = True
        records.append(make_record(predicted, target, index, meta={"family": str(KINDS[index])}))
        records[-1].layers = [int(layer)]
    for index, ignored in enumerate((None, np.full(SHAPE, IGNORE_PIXEL, np.uint8)), len(layers)):
        records.append(make_record(np.ones(SHAPE, bool), ignored, index, meta={"family": "absent"}))
    provenance = Provenance("ReasonSeg|val", "generate", rule, 64, 0, "", "abc", "float32", QUERIES, QUERIES)
    Result(summarize(provenance, records), records, provenance).save(folder / "eval")


@pytest.fixture
def runs(tmp_path):
    """Seed 0 of three rows: last has 0.6, the oracle 0.8; the policy is right for near queries, and for half of far."""
    folder = tmp_path / "choice"
    write_run(folder / "last-0", "last", np.full(QUERIES, 3))
    write_run(folder / "layer-4-0", "fixed:1", np.full(QUERIES, 1))
    chosen = np.where((KINDS == "near") | (np.arange(QUERIES) >= 4), 1, 3)
    write_run(folder / "policy-exact-gradient-0", "argmax", chosen)
    keep_forced(folder / "policy-exact-gradient-0")
    return folder


def keep_forced(folder: Path) -> None:
    """The oracle's measurement."""
    path = folder / "ReasonSeg_val.forced.npz"
    np.savez(path, forced=FORCED, images=np.arange(QUERIES), kinds=KINDS, checkpoint="abc")


def test_the_share_of_the_oracle_s_gain(runs, capsys):
    figure = runs.parent / "choice.png"
    arguments = ["--runs", str(runs), "--dataset_dir", "-", "--val_dataset", "ReasonSeg|val", "--figure", str(figure)]
    assert study_choice.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| row | gIoU | gain over last | share of the oracle's gain |" in printed
    assert "| last | 60.0 | +0.0 [+0.0, +0.0] | 0% | - | - | - |" in printed
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


def test_rows_of_two_tables_share_reference_and_oracle(runs, capsys):
    write_run(runs.parent / "choice_rewards" / "map-leave-one-out-0", "argmax", np.where(KINDS == "near", 1, 3))
    tables = [str(runs), str(runs.parent / "choice_rewards")]
    study_choice.main(["--runs", *tables, "--dataset_dir", "-", "--val_dataset", "ReasonSeg|val"])
    [row] = re.findall(r"\| map, leave-one-out \| 80.0 .*", capsys.readouterr().out)
    assert "| 100% |" in row


def test_the_entropies_of_seeds_are_compared_at_the_steps_of_all(runs, tmp_path):
    """A seed may have fewer."""
    write_run(runs / "policy-exact-gradient-1", "argmax", np.full(QUERIES, 3), steps=(60, 120))
    keep_forced(runs / "policy-exact-gradient-1")
    flags = ["--dataset_dir", "-", "--val_dataset", "ReasonSeg|val", "--figure", str(tmp_path / "choice.png")]
    assert study_choice.main(["--runs", str(runs), *flags]) == 0
    assert (tmp_path / "choice.png").is_file()


def test_a_run_of_other_queries_is_refused(runs):
    """Also of as many: images and kinds are compared."""
    flags = ["--runs", str(runs), "--dataset_dir", "-", "--val_dataset", "ReasonSeg|val"]
    write_run(runs / "last-1", "last", np.full(QUERIES - 1, 3))
    with pytest.raises(ValueError, match=r"last-1: its 7 queries of ReasonSeg\|val are not the 8 that the oracle"):
        study_choice.main(flags)
    shutil.rmtree(runs / "last-1")
    path = runs / "policy-exact-gradient-0" / "ReasonSeg_val.forced.npz"
    np.savez(path, **dict(np.load(path)) | {"kinds": KINDS[::-1]})
    with pytest.raises(ValueError, match=r"its 8 queries of ReasonSeg\|val are not the 8"):
        study_choice.main(flags)


def test_a_row_of_two_tables_is_refused(runs):
    """Rather than the first one's runs left out."""
    write_run(runs.parent / "layers" / "last-0", "last", np.full(QUERIES, 3))
    with pytest.raises(ValueError, match=r"row 'last' is in .*choice and in .*layers"):
        study_choice.folders_of([runs, runs.parent / "layers"], Spec.parse("ReasonSeg|val"))


def test_the_oracle_s_row_is_measured_once(version, val_data, tmp_path, capsys):
    """A merged model on disk, until it has other weights; files of older versions do not say which they had."""
    shutil.copytree(version, tmp_path / "merged")
    args = SimpleNamespace(val_dataset=Spec.parse("ReasonSeg|val_short"), dataset_dir=str(val_data))
    path = tmp_path / "ReasonSeg_val_short.forced.npz"
    np.savez(path, forced=FORCED)
    measured = study_choice.measure(tmp_path, "abc", args)
    assert measured["forced"].shape == (3, 4)
    assert "measuring" in capsys.readouterr().err
    again = study_choice.measure(tmp_path, "abc", args)
    assert "measuring" not in capsys.readouterr().err
    assert all((again[name] == measured[name]).all() for name in ("forced", "images", "kinds"))
    study_choice.measure(tmp_path, "def", args)
    assert "measuring" in capsys.readouterr().err


def test_a_folder_without_the_oracle_s_row_is_refused(runs):
    flags = ["--runs", str(runs), "--dataset_dir", "-", "--val_dataset"]
    with pytest.raises(ValueError, match="no row 'uniform' there, but layer 4, last, policy, exact gradient"):
        study_choice.main([*flags, "ReasonSeg|val", "--oracle", "uniform"])
    with pytest.raises(ValueError, match=r"no run there is evaluated on ReasonSeg\|test"):
        study_choice.main([*flags, "ReasonSeg|test"])
    with pytest.raises(ValueError, match="no table of scripts"):
        study_choice.folders_of([runs.parent], Spec.parse("ReasonSeg|val"))
