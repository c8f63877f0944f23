"""A run with SAM 2: it trains, is exported in both ways, and evaluates, from a folder of transformers."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
import torch
from opening import load_pretrained
from stretched import write_source
from tiny_run import ROOT, arguments, log_lines

import train_ds
from scripts import analyze, doctor, merge_lora

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_report")]


@pytest.mark.parametrize("name", ["sam2", "sam3_tracker"])
def test_a_run_becomes_a_model_and_an_adapter_that_are_the_same(tmp_path, base, data, name, capsys):
    source = write_source(tmp_path / "source", name)
    settings = {"mask_decoder": name, "vision_pretrained": source, "sam_feature_cache": tmp_path / "cache"}
    flags = arguments(base, data, tmp_path, precision="bf16", gradient_checkpointing="true", **settings)
    assert train_ds.main(flags) == 0
    run = tmp_path / "run"
    losses = [line["text"] for line in log_lines(run, "train")]
    assert losses[-1] < losses[0]
    [start] = log_lines(run, "start")
    assert {row["module"]: row["source"] for row in start["weights"]}["visual_model"] == str(source)
    assert start["parameters"]["sam_image_encoder"][1] == 0 < start["parameters"]["sam_mask_decoder"][1]
    assert any((tmp_path / "cache").glob("*.sam"))
    states = {}
    for kind, extra in (("merged", []), ("adapter", ["--adapter_only"])):
        assert merge_lora.main(["--checkpoint", str(run), "--output", str(run / kind), *extra]) == 0
        states[kind] = load_pretrained(run / kind)[0].state_dict()
    assert states["merged"].keys() == states["adapter"].keys()
    assert all(torch.equal(value, states["adapter"][key]) for key, value in states["merged"].items())
    assert ("SAM 2.1" if name == "sam2" else "SAM 3's tracker") in (run / "merged/README.md").read_text()
    (source / "config.json").unlink()  # a merged folder needs no other
    evaluation = import_module("test")
    where = ["--version", str(run / "merged"), "--dataset_dir", str(data), "--val_dataset", "ReasonSeg|val_short"]
    out = tmp_path / "results"
    assert evaluation.main([*where, "--limit", "2", "--output", str(out)]) == 0
    assert json.loads(next(out.rglob("*.json")).read_text())
    study = tmp_path / "study"
    assert analyze.main([*where, "--limit", "2", "--samples", "0", "--output", str(study)]) == 0
    assert "M_prompt_" in (study / "table_2.csv").read_text()
    capsys.readouterr()


def test_the_doctor_checks_a_configuration_with_sam_2(tmp_path, base, data, capsys):
    source = write_source(tmp_path / "source", "sam2")
    flags = arguments(base, data, tmp_path, mask_decoder="sam2", vision_pretrained=source, no_eval="true")
    assert doctor.main(["--config", str(ROOT / "configs/base.yaml"), "--overfit", "off", *flags]) == 0
    assert "0 problems, 0 warnings" in capsys.readouterr().out
