"""Training goes on from merged folders, adapters and published checkpoints, and keeps what they were trained for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from opening import load_pretrained
from tiny_run import arguments, log_lines

import train_ds
from model.loading.adapter import META
from model.loading.pretrained import load_for_training
from model.processing import tokens
from model.processing.template import HUMAN_SYSTEM_PROMPT
from model.processing.tokens import load_tokenizer
from scripts import merge_lora
from utils.demo.tiny_model import train_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_report")]
GOLDENS = Path(__file__).resolve().parents[3] / "shared/goldens"
FINISHED = {"vision_tower": "", "vision_pretrained": ""}  # the model in --version holds them


def run(root: Path, name: str, version: Path, data: Path, code: int = 0, **settings) -> Path:
    """A run of 3 steps from ``version``; returns its folder."""
    short = {"epochs": 1, "exp_name": name, "no_eval": "true"} | FINISHED | settings
    assert train_ds.main(arguments(root, data, root, version=version, **short)) == code
    return root / name


def export(folder: Path, kind: str) -> Path:
    flags = ["--adapter_only"] if kind == "adapter" else []
    assert merge_lora.main(["--checkpoint", str(folder), "--output", str(folder / kind), *flags]) == 0
    return folder / kind


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_pretrained(folder)[0].state_dict()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two models have the same weights. The rewards' moving average goes on without learning."""
    names = a.keys() - {"ppm.baseline"}
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in names)


@pytest.fixture(scope="module")
def first(tmp_path_factory, base, data, no_report) -> Path:
    """A run from base weights, exported in both ways."""
    root = tmp_path_factory.mktemp("first")
    paths = {"vision_tower": base / "clip", "vision_pretrained": base / "sam.pth"}
    folder = run(root, "first", base / "llava", data, map_side=48, **paths)
    export(folder, "merged")
    export(folder, "adapter")
    return folder


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_learning_rate_zero_gives_the_finished_model(first, tmp_path, data, kind):
    again = run(tmp_path, "again", first / kind, data, lr=0)
    assert equal(state_of(first / "merged"), state_of(export(again, "merged")))
    assert json.loads((again / "merged/config.json").read_text())["map_side"] == 48  # kept, though no flag says so


def test_a_chain_of_adapters_is_its_merged_model(first, tmp_path, data):
    second = run(tmp_path, "second", first / "adapter", data)
    third = run(tmp_path, "third", export(second, "adapter"), data, baseline="critic")
    assert equal(state_of(export(third, "adapter")), state_of(export(third, "merged")))
    other = run(tmp_path, "other", third / "merged", data, baseline="state_critic")  # another kind of critic is new
    [start] = log_lines(other, "start")
    assert {row["module"]: row["new"] for row in start["weights"]}["ppm"] == "critic"
    [start] = log_lines(third, "start")
    assert {row["module"]: row["new"] for row in start["weights"]}["ppm"] == "critic"
    meta = json.loads((third / "merged" / META).read_text())
    assert [(entry["name"], entry["steps"]) for entry in meta["lineage"]] == [("first", 3), ("second", 3)]
    assert [entry["source"] for entry in meta["lineage"]][1] == str(first / "adapter")
    table = (third / "adapter/README.md").read_text().split("## Lineage")[1].split("\n## ")[0]
    assert [row.split()[1] for row in table.strip().splitlines()[2:]] == ["first", "second", "third"]


def test_rows_of_added_tokens_train_alone(first, tmp_path, data):
    """Tables keep all other rows; adapter and merged folder are the same model, and a run resumes."""
    options = {"train_tables": "new", "freeze": "gate||sam_mask_decoder", "lr": 0.1}
    rows = run(tmp_path, "rows", first / "merged", data, **options)
    run(tmp_path, "rows", first / "merged", data, **options, epochs=2, auto_resume="true")
    assert [line["step"] for line in log_lines(rows, "train")] == [1, 2, 3, 4, 5, 6]
    before, after = state_of(first / "merged"), state_of(export(rows, "merged"))
    assert equal(after, state_of(export(rows, "adapter")))
    added = load_pretrained(first / "merged")[1].tokens.added
    assert len(added) == 4
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        moved = (before[table] != after[table]).any(1).nonzero().flatten().tolist()
        assert moved
        assert set(moved) <= set(added)
    still = [name for name in before if name.startswith(("ppm.gate", "visual_model.mask_decoder."))]
    assert all(torch.equal(before[name], after[name]) for name in still)
    assert not torch.equal(before["text_hidden_fcs.0.0.weight"], after["text_hidden_fcs.0.0.weight"])
    [start, _] = log_lines(rows, "start")
    trained = {part: numbers[1] for part, numbers in start["parameters"].items()}
    assert trained["embed_tokens"] == trained["lm_head"] == 4 * 32
    assert trained["gate"] == trained["sam_mask_decoder"] == 0


def test_contradictions_name_both_sides(first, tmp_path, data, capsys):
    run(tmp_path, "wrong", first / "merged", data, code=2, clip_fit="crop", map_side=0)
    printed = capsys.readouterr().err
    assert f"--clip_fit: 'crop' contradicts --version {first / 'merged'}, which was trained with 'pad'" in printed
    assert "--map_side: 0 contradicts" in printed
    assert not (tmp_path / "wrong").exists()


def test_needless_paths_are_named_and_needed_ones_demanded(first, tmp_path, base, data, capsys):
    run(tmp_path, "paths", first / "merged", data, vision_pretrained=tmp_path / "gone.pth")
    assert f"not read, as --version holds these parts: --vision_pretrained {tmp_path / 'gone.pth'}" in (
        capsys.readouterr().out
    )
    run(tmp_path, "none", base / "llava", data, code=2)
    printed = capsys.readouterr().err
    assert "--vision_tower: is missing" in printed
    assert "--vision_pretrained: is missing" in printed


def test_a_merged_folder_of_other_special_tokens_is_refused(first, tmp_path):
    folder = tmp_path / "other"
    model, processor = load_pretrained(first / "merged")
    model.config.seg_token_id += 1
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"\[SEG\] is \d+ in config.json, \d+ in the processor's files"):
        load_for_training(str(folder))


@pytest.mark.skipif(not GOLDENS.is_dir(), reason="needs ../shared/goldens")
def test_the_released_checkpoint_is_trained_on(tmp_path, data, monkeypatch):
    """With learning rate 0, merged, saved and loaded, it has its old weights, and so its old masks."""
    released = tmp_path / "released"
    released.mkdir()
    for path in (GOLDENS / "checkpoint").iterdir():
        (released / path.name).symlink_to(path)
    ids = json.loads((GOLDENS / "index.json").read_text())["special_ids"]
    with monkeypatch.context() as patch:  # the goldens have no tokenizer: one of the same size
        patch.setattr(tokens, "SPECIAL_TOKENS", ("[SEG]", "[REJ]", "<im_start>", "<im_end>"))
        train_tokenizer([HUMAN_SYSTEM_PROMPT, *map(str, range(100))] * 4, vocab_size=ids["seg"]).save_pretrained(
            released
        )
    assert load_tokenizer(released).convert_tokens_to_ids(["[SEG]", "[REJ]"]) == [ids["seg"], ids["rej"]]
    options = {"vision_tower": GOLDENS / "clip", "lora_r": 2, "batch_size": 1, "dataset": "refer_seg"}
    before, _ = load_pretrained(released, vision_tower=str(GOLDENS / "clip"))
    still = export(run(tmp_path, "still", released, data, lr=0, **options), "merged")
    assert equal(before.state_dict(), state_of(still))
