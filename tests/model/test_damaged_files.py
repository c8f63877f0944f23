"""Every file of a model folder, damaged in every way that a download damages it: an error that names it, or no harm."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tiny_model, save_model
from tiny_run import ROOT, write_base

from model.loading.files import read_torch_file
from model.loading.mask_decoders import read_sam
from model.loading.pretrained import load, load_for_training
from model.opened import predict
from model.processing.tokens import load_tokenizer
from model.structures import Turn

ADAPTER = ROOT / "tests/fixtures/written_before/adapter"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0b5c\nsize 13541\n"
DAMAGES = {
    "cut off": lambda data: data[: len(data) * 2 // 3],
    "empty": lambda data: b"",
    "pointer": lambda data: POINTER,
    "page": lambda data: b"<!DOCTYPE html>\n<html><title>Sign in</title></html>",
    "zeros": lambda data: bytes(len(data)),
    "list": lambda data: b"[]",
    "object": lambda data: b"{}",
}
MERGED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "uground_processor.json")
OF_ADAPTER = (
    "adapter_model.safetensors",
    "trained_parts.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "uground_processor.json",
    "uground_run.json",
)
OF_BASE = (
    "llava/config.json",
    "llava/model.safetensors",
    "llava/tokenizer.json",
    "llava/tokenizer_config.json",
    "clip/config.json",
    "clip/model.safetensors",
    "sam.pth",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_processor):
    """A folder with ``merged``, ``base`` and ``adapter`` (on the base of the fixtures)."""
    folder = tmp_path_factory.mktemp("whole")
    save_model(folder / "merged", tiny_processor, talks=False)
    write_base(folder / "base", build_tiny_model(tiny_processor), tiny_processor.tokenizer)
    shutil.copytree(ADAPTER, folder / "adapter")
    return folder


def open_kind(folder: Path, kind: str) -> None:
    if kind == "base":
        load_for_training(str(folder / "llava"), str(folder / "clip"), str(folder / "sam.pth"), "fp32")
        return
    base = ROOT / "tests/fixtures/written_before/base"
    options = {"base": base / "llava", "vision_tower": base / "clip", "vision_pretrained": base / "sam.pth"}
    load(folder, device="cpu", **{name: str(path) for name, path in options.items()} if kind == "adapter" else {})


CASES = [
    (kind, name) for kind, names in (("merged", MERGED), ("adapter", OF_ADAPTER), ("base", OF_BASE)) for name in names
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_damaged_file_is_named(whole, tmp_path, kind, name, damage):
    folder = tmp_path / kind
    shutil.copytree(whole / kind, folder)
    (folder / name).write_bytes(DAMAGES[damage]((folder / name).read_bytes()))
    of_another_kind = Path(name).name == "config.json" and damage == "object"
    expected = "is of type None|--vision_tower" if of_another_kind else r"(?<!\w)" + Path(name).name.replace(".", r"\.")
    with pytest.raises(ValueError, match=expected) as failure:
        open_kind(folder, kind)
    assert str(folder) in str(failure.value)
    if damage in ("empty", "pointer", "page", "zeros"):
        assert "is not completely downloaded" in str(failure.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", {"num_hidden_layers": "4"}, r"/config\.json"),
        ("config.json", {"architectures": 3, "hidden_size": None}, r"/config\.json"),
        ("config.json", {"sam_config": {"side": 3}}, r"/config\.json"),
        ("config.json", {"reward": ["seg"]}, r"/config\.json: reward: \['seg'\] is a list; expected one value"),
        ("config.json", {"mm_vision_select_layer": [-2]}, r"/config\.json: mm_vision_select_layer: \[-2\] is not"),
        ("uground_processor.json", {"clip_pitch": 10}, r"uground_processor\.json: clip_pitch is unknown"),
        ("uground_processor.json", {"clip_side": "40"}, r"uground_processor\.json: clip_side is '40', not a positive"),
        ("uground_processor.json", {"clip_patch": 0}, "clip_patch is 0, not a positive whole number"),
        ("uground_processor.json", {"clip_patch": 7}, r"/uground_processor\.json .* is not a multiple of its patch 7"),
        ("tokenizer_config.json", {"model_max_length": "x"}, r"/tokenizer_config\.json"),
        ("generation_config.json", {"num_beams": "x", "cache_implementation": 3}, r"/generation_config\.json"),
    ],
)
def test_values_of_a_wrong_type_are_named(whole, tmp_path, name, change, message):
    shutil.copytree(whole / "merged", tmp_path / "merged")
    path = tmp_path / "merged" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "merged", device="cpu")


@pytest.mark.parametrize(("kind", "file"), [("merged", r"config\.json"), ("adapter", r"uground_run\.json")])
@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"sam_side": 0}, "sam_side"),  # as of a decoder without an image encoder
        ({"sam_side": 128}, "sam_side"),
        ({"clip_side": 80, "clip_patch": 20}, "clip_side"),
        ({"clip_fit": "crop"}, "clip_fit"),
    ],
)
def test_a_processor_of_another_model_is_named(whole, tmp_path, kind, file, change, name):
    shutil.copytree(whole / kind, tmp_path / kind)
    path = tmp_path / kind / "uground_processor.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"{name} is \w+ in {file}, {change[name]} in the processor's files"):
        open_kind(tmp_path / kind, kind)


@pytest.mark.parametrize("value", [{}, {"weight_map": []}, {"weight_map": {"a": 3}}])
def test_an_index_without_a_map_is_named(whole, tmp_path, value):
    shutil.copytree(whole / "merged", tmp_path / "merged")
    (tmp_path / "merged/model.safetensors.index.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json has no weight_map"):
        load(tmp_path / "merged", device="cpu")


def test_sentencepiece_that_is_a_pointer_is_named(whole, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(POINTER)
    with pytest.raises(ValueError, match=r"tokenizer\.model is not completely downloaded: it is a Git LFS pointer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(whole / "base/clip")


def test_a_tokenizer_that_is_code_is_refused_without_a_question(whole, tmp_path, monkeypatch):
    folder = tmp_path / "merged"
    shutil.copytree(whole / "merged", folder)
    (folder / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "from transformers import PreTrainedTokenizerFast\nclass EvilTokenizer(PreTrainedTokenizerFast): pass\n"
    )
    path = folder / "tokenizer_config.json"
    code = {"auto_map": {"AutoTokenizer": [None, "evil.EvilTokenizer"]}, "tokenizer_class": "EvilTokenizer"}
    path.write_text(json.dumps(json.loads(path.read_text()) | code))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: the tokenizer is code of its own \(auto_map\)"):
        load(folder, device="cpu")
    config = folder / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoTokenizer": [None, "evil.EvilTokenizer"]}})
    )
    path.write_text((whole / "merged/tokenizer_config.json").read_text())
    load(folder, device="cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("answer", ["", "it is [SEG]."])
def test_a_weight_that_is_not_a_number_ends_the_answer(tiny_model, tiny_processor, answer):
    with torch.no_grad():
        tiny_model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    image = np.full((48, 64, 3), 90, np.uint8)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is NaN or infinite \(in float32\)"):
        predict(tiny_model, tiny_processor, [image], [[Turn("where is the red star", answer)]])


# -- .pth --------------------------------------------------------------------------------------------------------------


def test_the_format_before_torch_1_6_is_read(whole, tmp_path):
    state = read_torch_file(whole / "base/sam.pth")
    torch.save(state, tmp_path / "sam.pth", _use_new_zipfile_serialization=False)
    read = read_sam(str(tmp_path / "sam.pth"))[0]
    assert all(torch.equal(read[name], value) for name, value in state.items())


def test_sam_2_is_recognized(tmp_path):
    torch.save({"model": {"sam_mask_decoder.iou_token.weight": torch.zeros(1)}}, tmp_path / "sam2.pt")
    with pytest.raises(ValueError, match=r"sam2\.pt is a SAM 2 checkpoint; give one of SAM"):
        read_sam(str(tmp_path / "sam2.pt"))


class Code:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_a_file_refers_to_is_named(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Code()}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"a\.pth is no checkpoint of plain tensors.* refers to getattr"):
        read_torch_file(tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps({"weight": Code()}))
    with pytest.raises(ValueError, match=r"b\.pth is no checkpoint of plain tensors"):
        read_torch_file(tmp_path / "b.pth")
    assert not Path("ran").exists()
