"""Folders of SAM 2 and SAM 3 as --vision_pretrained: which are read, strictly, and what others are told."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import drawn_sample
from safetensors.torch import load_file, save_file
from stretched import make_source, sam2_config, tracker_config, write_source
from transformers import Sam2VideoConfig, Sam2VideoModel, Sam3Config, Sam3VideoConfig, Sam3VideoModel

from model.decoders.sam2 import sizes_of
from model.loading.mask_decoders import read_decoder
from model.loading.pretrained import config_of, load, load_for_training, resolve_start
from model.opened import predict
from model.settings import DECODER_KINDS
from model.structures import Turn
from utils.conversion.boxes import SamBoxes

NAMES = ("sam2", "sam3_tracker")
TURNS = [[Turn("where is the red star", "it is [SEG].")]]


def start(base, name, folder, precision="fp32", **settings):
    return load_for_training(
        str(base / "llava"), str(base / "clip"), str(folder), precision, {"mask_decoder": name, **settings}
    )


def edit(path, **changes):
    values = json.loads(path.read_text())
    for key, value in changes.items():
        *parts, last = key.split("__")
        inner = values
        for part in parts:
            inner = inner[part]
        inner[last] = value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("name", NAMES)
def test_training_starts_from_a_folder_of_transformers_and_its_model_from_its_own(base, name, tmp_path):
    folder = write_source(tmp_path / name, name)
    model, processor, rows = start(base, name, folder)
    assert {row.module: row.source for row in rows}["visual_model"] == str(folder)
    expected = make_source(name).state_dict()
    actual = model.visual_model.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in actual)
    shape = config_of(str(base / "llava"), str(base / "clip"), str(folder), settings={"mask_decoder": name})
    assert shape.sam_side == 128
    model.save_pretrained(tmp_path / "own")
    processor.save_pretrained(tmp_path / "own")
    opened = load(tmp_path / "own", "fp32", "cpu")
    ask = ([drawn_sample(0).image], TURNS)
    [[before]], [[after]] = predict(model, processor, *ask), predict(opened.model, opened.processor, *ask)
    torch.testing.assert_close(after.mask_logits, before.mask_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_precision_is_the_runs_whatever_the_folder_says(base, name, tmp_path):
    folder = write_source(tmp_path / name, name)
    config = json.loads((folder / "config.json").read_text())
    parts = {part: values | {"dtype": "float16"} for part, values in config.items() if isinstance(values, dict)}
    (folder / "config.json").write_text(json.dumps(config | parts | {"dtype": "float16"}))
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model, *_ = start(base, name, folder, precision)
        assert {p.dtype for p in model.visual_model.parameters()} == {dtype}
        assert {b.dtype for b in model.visual_model.buffers()} == {torch.float32}
        assert "dtype" not in str(model.config.decoder_config)


def video_folder(tmp_path):
    """SAM 2 as Meta publishes it for transformers: Sam2VideoModel, whose weights include the memory."""
    small = {
        "memory_attention_hidden_size": 32,
        "memory_attention_feed_forward_hidden_size": 32,
        "memory_attention_num_layers": 1,
        "memory_encoder_hidden_size": 32,
        "memory_encoder_output_channels": 16,
        "mask_downsampler_embed_dim": 32,
        "memory_fuser_embed_dim": 32,
        "memory_fuser_intermediate_dim": 32,
        "image_size": 128,
    }
    parts = {key: value for key, value in sizes_of(sam2_config()).items() if key.endswith("_config")}
    types = {"prompt_encoder_config": "sam2_video_prompt_encoder", "mask_decoder_config": "sam2_video_mask_decoder"}
    parts = {key: value | {"model_type": types.get(key, "sam2_vision_model")} for key, value in parts.items()}
    video = Sam2VideoModel(Sam2VideoConfig(**parts, **small))
    source = make_source("sam2")
    missing, unexpected = video.load_state_dict(source.state_dict(), strict=False)
    assert not unexpected
    video.save_pretrained(tmp_path / "video")
    return tmp_path / "video", source, set(missing)


def test_what_a_video_model_has_beside_the_image_model_is_left_out_by_name(tmp_path):
    folder, source, memory = video_folder(tmp_path)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "sam2_video"
    assert {key.split(".")[0] for key in memory} >= {"memory_attention", "memory_encoder", "no_object_pointer"}
    state, sizes = read_decoder("sam2", str(folder))
    assert state.keys() == source.state_dict().keys()
    assert sizes["decoder_config"]["vision_config"] == sizes_of(source.config.vision_config)


def test_a_positional_matrix_that_is_stored_once_is_read_twice(tmp_path):
    """Older transformers tied both."""
    folder = write_source(tmp_path, "sam2")
    state = load_file(folder / "model.safetensors")
    matrix = state.pop("prompt_encoder.shared_embedding.positional_embedding")
    save_file(state, folder / "model.safetensors")
    read, _ = read_decoder("sam2", str(folder))
    assert torch.equal(read["prompt_encoder.shared_embedding.positional_embedding"], matrix)


def whole_sam3(tmp_path):
    """SAM 3 as published: Sam3VideoModel, detector and tracker on one encoder."""
    tracker = tracker_config((4.0, 2.0, 1.0, 0.5))
    small = {"hidden_size": 32, "intermediate_size": 32, "num_layers": 1, "num_attention_heads": 2}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    detector = Sam3Config(
        vision_config=sizes_of(tracker.vision_config),
        text_config=text | {"model_type": "clip_text_model", "vocab_size": 99, "projection_dim": 32},
        geometry_encoder_config=small,
        detr_encoder_config=small,
        detr_decoder_config=small | {"num_queries": 4},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2},
    )
    parts = sizes_of(tracker)
    video = {
        "model_type": "sam3_tracker_video",
        "vision_config": parts["vision_config"],
        "prompt_encoder_config": parts["prompt_encoder_config"] | {"model_type": "sam3_tracker_video_prompt_encoder"},
        "mask_decoder_config": parts["mask_decoder_config"] | {"model_type": "sam3_tracker_video_mask_decoder"},
        "memory_attention_hidden_size": 32,
        "memory_attention_feed_forward_hidden_size": 32,
        "memory_attention_num_layers": 1,
        "memory_encoder_hidden_size": 32,
        "memory_encoder_output_channels": 16,
        "mask_downsampler_embed_dim": 32,
        "memory_fuser_embed_dim": 32,
        "memory_fuser_intermediate_dim": 32,
        "image_size": 128,
    }
    torch.manual_seed(0)
    model = Sam3VideoModel(Sam3VideoConfig(detector_config=detector.to_dict(), tracker_config=video))
    model.save_pretrained(tmp_path / "sam3")
    return tmp_path / "sam3", model, detector


@pytest.mark.parametrize("as_published", [True, False])
@torch.no_grad()
def test_of_a_whole_sam_3_the_tracker_is_read_with_its_neck_and_the_detectors_encoder(base, tmp_path, as_published):
    """Under the model's own names, as facebook/sam3, and under those that transformers 5 writes."""
    folder, source, _ = whole_sam3(tmp_path)
    if as_published:
        save_file({key: value.clone() for key, value in source.state_dict().items()}, folder / "model.safetensors")
    model, *_ = start(base, "sam3_tracker", folder)
    image = torch.randn(1, 3, 128, 128)
    decoder = model.visual_model
    expected, _ = source.get_vision_features_for_tracker(source.detector_model.vision_encoder(image))
    *fine, coarse = decoder.scales(decoder.encode(image))
    coarse = coarse - decoder.no_memory_embedding.view(1, -1, 1, 1)
    for actual, wanted in zip((*fine, coarse), expected, strict=True):
        torch.testing.assert_close(actual.flatten(2).permute(2, 0, 1), wanted)
    tracker = source.tracker_model.state_dict()
    for key in ("mask_decoder.iou_token.weight", "prompt_encoder.mask_embed.conv1.weight", "no_memory_embedding"):
        assert torch.equal(decoder.state_dict()[key], tracker[key])


def test_a_detector_alone_is_refused(base, tmp_path):
    _, _, detector = whole_sam3(tmp_path)
    detector.save_pretrained(tmp_path / "detector")
    with pytest.raises(
        ValueError, match=r"config\.json is SAM 3's detector alone, .* takes SAM 3's tracker .*facebook/sam3"
    ):
        start(base, "sam3_tracker", tmp_path / "detector")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("mask_decoder.iou_token.weight"), r"1 missing: mask_decoder\.iou_token\.weight"),
        (lambda s: s.update(memory=torch.zeros(1)), r"1 unexpected: .*memory"),
        (lambda s: s.update({"mask_decoder.iou_token.weight": torch.zeros(1, 3)}), "1 of another shape"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_are_read_strictly(base, tmp_path, name, change, match):
    folder = write_source(tmp_path, name)
    state = load_file(folder / "model.safetensors")
    prefix = "tracker_model." if any(key.startswith("tracker_model.") for key in state) else ""
    plain = {key.removeprefix(prefix): value for key, value in state.items()}
    change(plain)
    save_file({prefix + key: value for key, value in plain.items()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=match):
        start(base, name, folder)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"prompt_encoder_config__image_size": 64}, r"image_size is \[128, 128\].* needs \[64, 64\]"),
        ({"prompt_encoder_config__patch_size": 8}, "backbone_feature_sizes is .* needs"),
        ({"mask_decoder_config__hidden_size": 64}, "the mask decoder's hidden_size is 64, .* needs 32"),
        ({"mask_decoder_config": 5}, "mask_decoder_config"),
        ({"prompt_encoder_config__hidden_size": "wide"}, "hidden_size"),
        ({"prompt_encoder_config__image_size": None}, "image_size"),
        ({"mask_decoder_config__mlp_dim": 64}, "of another shape"),
    ],
    ids=["side", "patch", "width", "number", "text", "null", "mlp"],
)
def test_an_edited_configuration_is_named(base, tmp_path, name, change, match):
    folder = write_source(tmp_path, name)
    edit(folder / "config.json", **change)
    with pytest.raises(ValueError, match=match) as error:
        start(base, name, folder)
    assert str(folder) in str(error.value)


def test_each_kind_of_sam_given_as_another_is_told_both(base, tmp_path):
    folders = {name: write_source(tmp_path / name, name) for name in NAMES}
    for name, title in (("sam2", "SAM 2"), ("sam3_tracker", "SAM 3")):
        with pytest.raises(
            ValueError, match=rf"is {title}, but --mask_decoder segment_anything takes SAM .*--mask_decoder {name}, or"
        ):
            start(base, "segment_anything", folders[name])
    with pytest.raises(ValueError, match=r"is SAM 3, but --mask_decoder sam2 takes SAM 2\.1 .*sam2\.1-hiera-large"):
        start(base, "sam2", folders["sam3_tracker"])
    (tmp_path / "sam").mkdir()
    (tmp_path / "sam/config.json").write_text('{"model_type": "sam"}')
    with pytest.raises(
        ValueError, match=r"is SAM, but .*sam2 takes SAM 2\.1 .*set --mask_decoder segment_anything, or"
    ):
        start(base, "sam2", tmp_path / "sam")
    with pytest.raises(ValueError, match=r"is of type 'llava', but --mask_decoder sam2 takes"):
        start(base, "sam2", base / "llava")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_where_a_folder_is_expected_is_told_what_to_give(base, name, tmp_path):
    torch.save({"model": {"sam_mask_decoder.x": torch.zeros(1)}}, tmp_path / "sam2.1_hiera_large.pt")
    example = DECODER_KINDS[name].example
    with pytest.raises(ValueError, match=rf"is a file; --mask_decoder {name} takes a folder .*{example}"):
        start(base, name, tmp_path / "sam2.1_hiera_large.pt")
    with pytest.raises(ValueError, match="names a file; this takes a whole repository"):
        resolve_start(str(base / "llava"), str(base / "clip"), "org/name:sam.pth", download=False, mask_decoder=name)


def test_metas_file_of_sam_2_is_told_what_to_give(base, tmp_path):
    torch.save({"model": {"sam_mask_decoder.x": torch.zeros(1)}}, tmp_path / "sam2.1_hiera_large.pt")
    with pytest.raises(
        ValueError, match=r"is a SAM 2 checkpoint; .*--mask_decoder sam2, .*facebook/sam2\.1-hiera-large"
    ):
        start(base, "segment_anything", tmp_path / "sam2.1_hiera_large.pt")


def test_a_finished_model_keeps_its_decoder(base, tmp_path):
    model, processor, _ = start(base, "sam2", write_source(tmp_path / "sam2", "sam2"))
    model.save_pretrained(tmp_path / "own")
    processor.save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match=r"mask_decoder is sam3_tracker, .* was trained with sam2"):
        load_for_training(str(tmp_path / "own"), "", "", "fp32", {"mask_decoder": "sam3_tracker"})


def test_what_takes_a_sam_alone_refuses_its_successors(base, tmp_path):
    """--sam of the conversion of boxes and of analyze.py."""
    folder = write_source(tmp_path / "sam2", "sam2")
    with pytest.raises(ValueError, match=r"^--sam: .* is SAM 2, but --sam takes SAM \(.*\); give sam_vit_h$"):
        SamBoxes(folder)
    model, _, _ = start(base, "sam2", folder)
    model.save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match=r"--sam .* holds no SAM .* decoded by sam2 has none"):
        SamBoxes(tmp_path / "own")
