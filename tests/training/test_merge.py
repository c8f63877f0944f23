"""From a run to a model folder: exact keys, equal outputs, nothing half written."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from opening import load_pretrained
from safetensors.torch import load_file, save_file
from tiny_run import arguments

import train_ds
from model.loading.adapter import META
from model.opened import predict
from model.processing.processor import UGroundProcessor
from model.structures import Turn
from scripts import merge_lora
from utils.config import SECTION_OF, load_config
from utils.training import checkpoint as checkpoints
from utils.training.engine import build_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def trained(request, tmp_path_factory, base, data, no_report):
    """(run folder, base folder, flags) of a short run."""
    root = tmp_path_factory.mktemp(request.param)
    flags = arguments(base, data, root, precision=request.param, grad_accumulation_steps=2,
                      val_layer_policy="fixed:2", val_pictures=0)  # fmt: skip
    assert train_ds.main(flags) == 0
    return root / "run", base, flags


def merged(trained, tmp_path, *flags: str, code: int = 0):
    assert merge_lora.main(["--checkpoint", str(trained[0]), "--output", str(tmp_path / "merged"), *flags]) == code
    return tmp_path / "merged"


def test_merged_folder_answers_as_the_trained_model(trained, tmp_path, capsys):
    """The folder, loaded as any user would, against base + LoRA with the checkpoint's master weights put in."""
    run, _, flags = trained
    folder = merged(trained, tmp_path, "--which", "latest")
    assert "merged and unmerged agree" in capsys.readouterr().out
    model, processor = load_pretrained(folder)
    assert model.config.layer_policy == "fixed:2"  # as it was validated
    config = load_config(flags)
    unmerged, own_processor, _ = build_model(config)
    weights = checkpoints.trained_weights(checkpoints.find_checkpoint(run))
    unmerged.float().load_state_dict(weights, strict=False)
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    ask = ([image], [[Turn("where is the star", "it is [SEG].")]])
    [[left]] = predict(model, processor, *ask, layer_policy="last")
    [[right]] = predict(unmerged.get_base_model(), own_processor, *ask, layer_policy="last")
    tolerance = 1e-4 if config.model.precision == "fp32" else 0.05  # merged weights are rounded to bf16 again
    for a, b in ((left.mask_logits, right.mask_logits), (left.maps, right.maps), (left.policy, right.policy)):
        assert (a - b).abs().max() <= tolerance * b.abs().max()
    assert model.ppm.baseline.item() == pytest.approx(weights["base_model.model.ppm.baseline"].item(), rel=1e-6)
    assert model.ppm.baseline != 0
    meta = json.loads((folder / META).read_text())
    assert (meta["step"], meta["config"]["model"]["lora_r"]) == (6, 2)
    assert processor.tokens == own_processor.tokens


def test_untrained_folder_is_where_training_starts(trained, tmp_path):
    flags = trained[2]
    values = dict(zip((name.removeprefix("--") for name in flags[::2]), flags[1::2]))
    sections: dict[str, dict] = {}
    for name, value in values.items():
        sections.setdefault(SECTION_OF[name], {})[name] = yaml.safe_load(value)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(sections))
    folder = tmp_path / "untrained"
    assert merge_lora.main(["--config", str(tmp_path / "run.yaml"), "--output", str(folder)]) == 0
    model, _ = load_pretrained(folder)
    start, _, _ = build_model(load_config(flags))
    start = start.merge_and_unload().float().state_dict()
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    assert json.loads((folder / META).read_text())["step"] == 0


def test_training_changed_every_part(trained):
    """What is merged is not the base: each part moved, also in bf16, where the master weights carry small steps."""
    run, _, flags = trained
    model, _, _ = build_model(load_config(flags))
    weights = checkpoints.trained_weights(checkpoints.find_checkpoint(run))
    before = model.float().state_dict()
    for part in (
        "lora_B",
        "text_hidden_fcs",
        "ppm.gate",
        "mask_decoder",
        "mask_downscaling",
        "embed_tokens",
        "lm_head",
    ):
        moved = [not torch.equal(weights[name], before[name]) for name in weights if part in name]
        assert any(moved), part


def test_best_is_the_default_and_repeating_replaces(trained, tmp_path, capsys):
    run = trained[0]
    best = checkpoints.read_meta(checkpoints.find_checkpoint(run, "best"))["step"]
    for _ in range(2):
        folder = merged(trained, tmp_path)
        assert json.loads((folder / META).read_text())["step"] == best
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_foreign_folder_is_left_alone(trained, tmp_path, capsys):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/thesis.tex").write_text("years of work")
    folder = merged(trained, tmp_path, code=2)
    assert "was not written by this script" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_another_base_is_refused(trained, tmp_path, capsys):
    _, base, _ = trained
    other = tmp_path / "sam.pth"
    state = torch.load(base / "sam.pth", weights_only=True)
    torch.save({name: value + 0.1 for name, value in state.items()}, other)
    merged(trained, tmp_path, "--vision_pretrained", str(other), code=2)
    assert "the base weights are not those" in capsys.readouterr().err
    merged(trained, tmp_path, "--version", str(tmp_path / "gone"), code=2)
    assert "gone" in capsys.readouterr().err
    merged((tmp_path, base, []), tmp_path, code=2)
    assert "holds no checkpoint" in capsys.readouterr().err


def test_names_must_be_exactly_what_was_trained(trained, tmp_path, capsys, monkeypatch):
    read = checkpoints.read_meta

    def without_gate(checkpoint):
        meta = read(checkpoint)
        meta["trained"] = {name: shape for name, shape in meta["trained"].items() if "gate" not in name}
        return meta

    monkeypatch.setattr(checkpoints, "read_meta", without_gate)
    folder = merged(trained, tmp_path, code=2)
    assert "ppm.gate" in capsys.readouterr().err
    assert not folder.exists()


def test_disagreement_writes_nothing(trained, tmp_path, capsys, monkeypatch):
    answers = iter([1.0, 1.01])
    values = {"logits": 0, "masks": 0}
    monkeypatch.setattr(merge_lora, "probe", lambda *_: dict.fromkeys(values, torch.tensor([next(answers)])))
    folder = merged(trained, tmp_path, code=2)
    assert "disagree, nothing is written: logits 1.0e-02" in capsys.readouterr().err
    assert not folder.exists()


def test_full_disk_leaves_the_earlier_folder(trained, tmp_path, capsys, monkeypatch):
    folder = merged(trained, tmp_path)
    before = (folder / META).read_bytes()

    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(UGroundProcessor, "save_pretrained", no_space)
    merged(trained, tmp_path, code=2)
    assert "is the disk full?" in capsys.readouterr().err
    assert (folder / META).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def adapter_of(trained, tmp_path, *flags: str):
    folder = tmp_path / "adapter"
    arguments = ["--checkpoint", str(trained[0]), "--adapter_only", "--output", str(folder), *flags]
    assert merge_lora.main(arguments) == 0
    return folder


def test_adapter_answers_as_the_merged_folder(trained, tmp_path, tiny_samples):
    whole, small = merged(trained, tmp_path), adapter_of(trained, tmp_path)
    ask = ([tiny_samples[0].image], [[Turn("where is the star", "it is [SEG] and [SEG].")]])
    for precision in ("fp32", "bf16"):
        (model, processor), (other, own) = (load_pretrained(str(folder), precision) for folder in (whole, small))
        for name, value in model.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
        assert torch.equal(model.model.rotary_emb.inv_freq, other.model.rotary_emb.inv_freq)  # not a part of the state
        [[left]], [[right]] = predict(model, processor, *ask), predict(other, own, *ask)
        assert left.layers == right.layers == [2, 2]  # as the run was validated
        assert torch.equal(left.mask_logits, right.mask_logits)
    assert (processor.tokens, processor.max_tokens) == (own.tokens, own.max_tokens)
    names = {path.name for path in small.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "trained_parts.safetensors", "README.md"} <= names
    assert "model.safetensors" not in names


def test_incomplete_adapters_are_refused(trained, tmp_path):
    folder = adapter_of(trained, tmp_path)
    for name, part in (
        ("adapter_model", "lora_B"),
        ("trained_parts", "text_hidden_fcs"),
        ("trained_parts", "ppm.gate"),
    ):
        path = folder / f"{name}.safetensors"
        whole = path.read_bytes()
        save_file({key: value for key, value in load_file(path).items() if part not in key}, path)
        with pytest.raises(ValueError, match=rf"incomplete: .* lack \d+ of \d+ .*{part}"):
            load_pretrained(str(folder))
        path.write_bytes(whole)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"incomplete: .*lora_A"):
        load_pretrained(str(folder))


def test_adapter_of_another_base_is_refused(trained, tmp_path):
    folder, base = adapter_of(trained, tmp_path), trained[1]
    meta = folder / META
    meta.write_text(meta.read_text().replace(str(base), str(tmp_path / "gone")))  # as if the base had moved
    with pytest.raises(ValueError, match=r"the base of the adapter .* is not here: .*llava.* --base \(what it was"):
        load_pretrained(str(folder))
    paths = {"base": str(base / "llava"), "vision_tower": str(base / "clip")}
    load_pretrained(str(folder), vision_pretrained=str(base / "sam.pth"), **paths)
    state = torch.load(base / "sam.pth", weights_only=True)
    torch.save({name: value + 0.1 for name, value in state.items()}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"visual_model: .*other.pth has \w{16}, .*gone/sam.pth had \w{16}"):
        load_pretrained(str(folder), vision_pretrained=str(tmp_path / "other.pth"), **paths)


def test_model_card(trained, tmp_path):
    folder = merged(trained, tmp_path, "--license", "apache-2.0", "--name", "My UGround")
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0"
    meta = json.loads((folder / META).read_text())
    assert meta["commit"] in card.text
    assert all(value in card.text for value in meta["base"].values())
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    for spec, values in meta["metrics"].items():
        for name, value in values.items():
            assert results[spec, name] == pytest.approx(value, abs=1e-4)
    assert results
    settings = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert settings["model"]["lora_r"] == 2
