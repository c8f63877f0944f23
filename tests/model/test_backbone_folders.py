"""Folders of backbones beside LLaVA: base weights as the hub has them, merged models, adapters, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import BACKBONES, OTHERS, base_tokenizer, make_backbone, sizes, write_base
from conftest import drawn_sample
from opening import load_pretrained
from safetensors.torch import load_file, save_file
from stretched import write_source
from transformers import Qwen3_5Config

from model.loading.pretrained import config_of, load, load_for_training
from model.opened import predict
from model.settings import RECIPES
from model.structures import Turn

TRAIN = {"precision": "fp32", "max_tokens": 400}
FEW = {"max_image_tokens": 40}


@pytest.fixture(scope="module", params=OTHERS)
def base(request, tmp_path_factory) -> tuple[str, Path, Any]:
    """(backbone, folder of base weights as the hub has them, transformers' model)"""
    folder = tmp_path_factory.mktemp(request.param) / "base"
    return request.param, folder, write_base(folder, request.param)


def opened(folder: Path, **settings: Any):
    return load_for_training(str(folder), "", str(folder / "sam.pth"), settings=FEW | settings, **TRAIN)


def copied(folder: Path, target: Path, change: Callable[[dict], dict] = dict) -> Path:
    """A copy of a folder, whose weights ``change`` replaces."""
    target.mkdir()
    for path in folder.iterdir():
        if path.name == "model.safetensors":
            state = {key: value.contiguous() for key, value in change(load_file(path)).items()}
            save_file(state, target / path.name, metadata={"format": "pt"})
        else:
            (target / path.name).write_bytes(path.read_bytes())
    return target


def configured(folder: Path, target: Path, **values: Any) -> Path:
    """A copy of a folder with other values in its config.json."""
    file = copied(folder, target) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return target


def assert_same_weights(model: Any, own: Any) -> None:
    """All of transformers' weights, the first rows of the tables that have grown."""
    state, grown = model.state_dict(), []
    for name, value in own.state_dict().items():
        if state[name].shape != value.shape:
            grown.append(name)
        assert torch.equal(state[name][: len(value)], value), name
    assert set(grown) <= {"lm_head.weight", "model.language_model.embed_tokens.weight"}


def masks_of(model: Any, processor: Any) -> torch.Tensor:
    """Logits of a teacher-forced [SEG]'s mask, relative to the largest, and its map."""
    [[answer]] = predict(
        model, processor, [drawn_sample(0).image], [[Turn("star", "it is [SEG].")]], layer_policy="last"
    )
    return torch.stack([answer.mask_logits / answer.mask_logits.abs().max(), answer.maps])


# -- base weights ------------------------------------------------------------------------------------------------------


def test_published_weights_load_strictly(base):
    backbone, folder, own = base
    model, processor, rows = opened(folder)
    assert_same_weights(model, own)
    tokens = len(base_tokenizer(backbone))
    assert len(model.lm_head.weight) == len(model.get_input_embeddings().weight) == tokens + 2  # [SEG] and [REJ]
    assert model.config.text.vocab_size == tokens + 2
    assert (processor.tokens.seg, processor.tokens.rej) in ((tokens, tokens + 1), (tokens + 1, tokens))
    mean = own.lm_head.weight.mean(0)
    torch.testing.assert_close(model.lm_head.weight[tokens:], mean.expand(2, -1))
    assert model.config.eos_token_id == processor.tokens.eos == processor.tokenizer.get_vocab()["<|im_end|>"]
    sources = {row.module: row.source for row in rows}
    assert sources == {
        "model": str(folder),
        "lm_head": str(folder),
        "visual_model": str(folder / "sam.pth"),
        "text_hidden_fcs": "new",
        "ppm": "new",
    }
    assert not any(p.isnan().any() for p in model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_runs_precision_holds_whatever_the_file_says(base, tmp_path, precision):
    """Files on the hub name one, also inside the configurations of their parts."""
    _, folder, _ = base
    raw = json.loads((folder / "config.json").read_text())
    parts = {name: raw[name] | {"dtype": "float16"} for name in ("text_config", "vision_config") if name in raw}
    changed = configured(folder, tmp_path / "typed", dtype="float16", torch_dtype="float16", **parts)
    model, processor, _ = load_for_training(
        str(changed), "", str(changed / "sam.pth"), precision, settings=FEW, max_tokens=400
    )
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert masks_of(model, processor).isfinite().all()


def test_images_that_fill_the_rows_are_refused_at_once(base, monkeypatch):
    _, folder, _ = base
    monkeypatch.setattr("model.loading.pretrained.load_base", None)  # nothing is read
    with pytest.raises(ValueError, match=r"max_image_tokens 3328 leaves no room .* rows of 2048 tokens"):
        load_for_training(str(folder), "", str(folder / "sam.pth"), settings={"max_image_tokens": 3328})


@pytest.mark.parametrize("backbone", OTHERS)
def test_tables_keep_spare_rows_and_stay_tied(backbone, tmp_path):
    """Published tables have more rows than tokens: they never shrink. Files of tied ones hold one."""
    own = write_base(tmp_path / "base", backbone, tied=True, rows=16)
    model, processor, _ = opened(tmp_path / "base")
    table = model.get_input_embeddings().weight
    assert len(table) == len(base_tokenizer(backbone)) + 16 == model.config.text.vocab_size
    assert model.lm_head.weight is table
    assert model.config.tie_word_embeddings
    known = len(base_tokenizer(backbone))
    torch.testing.assert_close(table[:known], own.lm_head.weight[:known])
    torch.testing.assert_close(table[processor.tokens.seg], table[:known].mean(0))
    config = config_of(str(tmp_path / "base"), "", str(tmp_path / "base/sam.pth"), settings=FEW)
    assert config.tie_word_embeddings


def test_untied_weights_stay_untied_whatever_the_file_says(base, tmp_path):
    """transformers' configurations default to tied, which a published file need not contradict."""
    _, folder, own = base
    other = configured(folder, tmp_path / "base", tie_word_embeddings=True)
    model, _, _ = opened(other)
    assert_same_weights(model, own)
    assert model.config.tie_word_embeddings is model.config.text.tie_word_embeddings is False
    config = config_of(str(other), "", str(other / "sam.pth"), settings=FEW)
    assert config.tie_word_embeddings is config.text.tie_word_embeddings is False


@pytest.mark.parametrize("backbone", ["qwen2_5_vl", "internvl3"])
def test_files_with_transformers_own_names_are_read(backbone, tmp_path):
    """As transformers has named modules since 4.52; the hub's files have the older names."""
    own = write_base(tmp_path / "base", backbone)
    names = {key.split(".")[0] for key in load_file(tmp_path / "base/model.safetensors")}
    assert names != {"model", "lm_head"}
    other = copied(tmp_path / "base", tmp_path / "own", lambda _: own.state_dict())
    assert_same_weights(opened(other)[0], own)


def test_keys_that_do_not_fit_are_named(base, tmp_path):
    _, folder, _ = base
    key = "model.language_model.layers.1.mlp.up_proj.weight"
    published = next(
        name for name in load_file(folder / "model.safetensors") if name.endswith("layers.1.mlp.up_proj.weight")
    )

    def without(state):
        return {name: value for name, value in state.items() if name != published}

    with pytest.raises(ValueError, match=rf"(?s)an incomplete file.*1 missing: {re.escape(key)}"):
        opened(copied(folder, tmp_path / "less", without))
    with pytest.raises(ValueError, match=r"1 unexpected: extra\.weight"):
        opened(copied(folder, tmp_path / "more", lambda state: state | {"extra.weight": torch.zeros(2)}))
    with pytest.raises(ValueError, match=rf"(?s)another size.*{re.escape(key)}: file \(2, 32\), model \(64, 32\)"):
        opened(copied(folder, tmp_path / "shape", lambda state: state | {published: torch.zeros(2, 32)}))


def test_a_variant_that_thinks_is_refused(base, tmp_path):
    _, folder, _ = base
    file = copied(folder, tmp_path / "thinking") / "chat_template.jinja"
    file.write_text(file.read_text().replace("assistant\n", "assistant\n<think>\n"))
    with pytest.raises(ValueError, match=r"(?s)^--version: .*thinking: its chat_template writes .*<think>.*Instruct"):
        opened(tmp_path / "thinking")


def test_a_published_configuration_is_flat(tmp_path):
    """Qwen2.5-VL's has the language model's settings at the top; transformers sorts them in."""
    own = write_base(tmp_path / "base", "qwen2_5_vl")
    file = tmp_path / "base/config.json"
    values = json.loads(file.read_text())
    text = values.pop("text_config")
    text = {key: value for key, value in text.items() if key not in ("model_type", "rope_parameters", "layer_types")}
    text |= {"rope_theta": 1e4, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    values["vision_config"] |= {"model_type": "qwen2_5_vl"}
    file.write_text(json.dumps(values | text))
    model, _, _ = opened(tmp_path / "base")
    assert_same_weights(model, own)
    assert model.config.model_type == "uground_qwen2_5_vl"
    assert model.config.text.num_hidden_layers == 4
    rope = model.config.text.rope_parameters
    assert (rope["rope_theta"], rope["mrope_section"]) == (1e4, [1, 1, 2])


def test_rows_beyond_dynamic_positions_are_warned_of(tmp_path, caplog):
    """InternVL3's frequencies change for a whole batch with a longer row; up to the limit they are the plain ones."""
    own = write_base(tmp_path / "base", "internvl3")
    text = own.config.text_config.to_dict()
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": text["rope_parameters"]["rope_theta"]}
    maps: list[torch.Tensor] = []
    for rope, most, warned in ((text["rope_parameters"], 100, False), (dynamic, 100, True), (dynamic, 400, False)):
        values = {"text_config": text | {"rope_parameters": rope, "max_position_embeddings": most}}
        folder = configured(tmp_path / "base", tmp_path / f"{len(maps)}", **values)
        caplog.clear()
        model, processor, _ = opened(folder)
        assert ("--model_max_length 400 is more than the 100 positions" in caplog.text) == warned
        maps.append(masks_of(model, processor)[1])
    torch.testing.assert_close(maps[2], maps[0], rtol=0, atol=1e-4)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model_type": "smolvlm"},
            r"config.json is of type 'smolvlm', not base weights of a backbone \(llava: .*qwen3_vl",
        ),
        ({"model_type": "qwen3_5"}, r"config.json is of type 'qwen3_5', not base weights .*internvl3: internvl"),
        (
            {
                "text_config": {
                    **sizes("qwen3_vl", 290)["text_config"],
                    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
                }
            },
            r"config.json.*text_config: qwen3_vl_text has 3 linear_attention among its 4 layers.*full attention",
        ),
    ],
)
def test_models_that_cannot_be_packed_are_refused(values, message, tmp_path):
    write_base(tmp_path / "base", "qwen3_vl")
    with pytest.raises(ValueError, match=message):
        opened(configured(tmp_path / "base", tmp_path / "other", **values))


def test_published_hybrids_are_refused_by_their_layers(tmp_path):
    """Qwen3.5, as transformers writes its configuration."""
    write_base(tmp_path / "base", "qwen3_vl")
    Qwen3_5Config(text_config={"num_hidden_layers": 8}).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"config.json: qwen3_5 has 6 linear_attention among its 8 layers.*qwen3_vl"):
        opened(tmp_path / "base")


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"clip_fit": "crop"}, r"clip_fit: 'crop' is for LLaVA, which pads or crops images for CLIP; (qwen|internvl)"),
    ({"map_side": 336}, r"map_side: 336 is for LLaVA"),
    ({"map_normalization": "all"}, r"map_normalization: 'all' is for LLaVA"),
    ({"clip_resize": 448, "image_pool": 2}, r"clip_resize: 448 is for LLaVA.*image_pool: 2 is for LLaVA"),
    (RECIPES["released"], r"map_side: 336 is for LLaVA.*map_normalization: 'all' is for LLaVA"),
    ({"mask_decoder": "pixel_decoder"}, r"mask_decoder: pixel_decoder reads the states of LLaVA's CLIP, which"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_settings_of_llava_are_refused(base, settings, message):
    _, folder, _ = base
    with pytest.raises(ValueError, match=message):
        opened(folder, **settings)


# -- merged folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("backbone", OTHERS)
def test_a_model_is_saved_and_opened(backbone, tied, tmp_path):
    """Under its own names, twice: what transformers renames while loading must not be renamed back."""
    model, processor = make_backbone(backbone, tied=tied)
    model.ppm.baseline.fill_(-0.75)
    expected = masks_of(model, processor)
    own = model.state_dict().keys() - ({"lm_head.weight"} if tied else set())
    for folder in (tmp_path / "first", tmp_path / "second"):
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        assert load_file(folder / "model.safetensors").keys() == own
        model, processor = load_pretrained(str(folder))
        assert type(model) is BACKBONES[backbone].model
        assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
        assert float(model.ppm.baseline) == -0.75
        torch.testing.assert_close(masks_of(model, processor), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("backbone", OTHERS)
def test_a_folder_in_bfloat16(backbone, tmp_path):
    """Frequencies stay in float32: rounded ones would shift far positions."""
    model, processor = make_backbone(backbone)
    for name, buffer in model.named_buffers():
        if "inv_freq" in name:
            assert buffer.dtype == torch.float32
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    low = load(tmp_path, precision="bf16", device="cpu")
    full = load(tmp_path, precision="fp32", device="cpu")
    frequencies = {name: buffer for name, buffer in low.model.named_buffers() if "inv_freq" in name}
    assert frequencies
    exact = dict(full.model.named_buffers())
    for name, buffer in frequencies.items():
        assert buffer.dtype == torch.float32, name
        assert torch.equal(buffer, exact[name]), name
    assert {p.dtype for p in low.model.parameters()} >= {torch.bfloat16}
    low_masks, masks = (masks_of(each.model, each.processor) for each in (low, full))
    torch.testing.assert_close(low_masks, masks, rtol=0, atol=0.1)


def test_base_weights_in_bfloat16(base):
    _, folder, own = base
    model, _, _ = load_for_training(str(folder), "", str(folder / "sam.pth"), "bf16", FEW, max_tokens=400)
    exact = {name: buffer for name, buffer in own.named_buffers() if "inv_freq" in name}
    ours = {name: buffer for name, buffer in model.named_buffers() if "inv_freq" in name}
    assert ours.keys() == exact.keys()
    for name, buffer in exact.items():
        assert ours[name].dtype == torch.float32
        assert torch.equal(ours[name], buffer), name


def test_another_processor_is_refused(tmp_path):
    model, _ = make_backbone("qwen2_5_vl")
    model.save_pretrained(tmp_path)
    make_backbone("qwen2_5_vl", max_image_tokens=50)[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"max_image_tokens is 40 in config.json, 50 in the processor's files"):
        load_pretrained(str(tmp_path))


def test_sam_2_decodes_the_masks(base, tmp_path):
    """Base weights of a backbone with a folder of SAM 2, saved and opened."""
    _, folder, own = base
    sam = write_source(tmp_path / "sam2", "sam2")
    settings = FEW | {"mask_decoder": "sam2"}
    model, processor, _ = load_for_training(str(folder), "", str(sam), settings=settings, **TRAIN)
    assert_same_weights(model, own)
    expected = masks_of(model, processor)
    model.save_pretrained(tmp_path / "merged")
    processor.save_pretrained(tmp_path / "merged")
    again, other = load_pretrained(str(tmp_path / "merged"))
    torch.testing.assert_close(masks_of(again, other), expected, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match=r"sam.pth: is a file; --mask_decoder sam2 takes a folder"):
        load_for_training(str(folder), "", str(folder / "sam.pth"), settings=settings, **TRAIN)
