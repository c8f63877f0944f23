"""MobileSAM as a mask decoder; most needs its two packages, which are optional."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import assert_same_masks, drawn_sample
from opening import load_pretrained

from model.decoders import mobile_sam
from model.decoders.mobile_sam import MobileSam, tiny_vit
from model.decoders.segment_anything import SamShape
from model.loading.mask_decoders import MOBILE, read_decoder, read_sam
from model.loading.pretrained import load_for_training
from model.loading.weights import load_original_sam
from model.lora import parameters_by_part, set_trainable
from model.opened import cache_sam_features, predict
from model.structures import Turn
from model.UGround import UGroundForCausalLM

SMALL = {"embed_dims": [8, 8, 8, 320], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}
TURNS = [[Turn("where is the red star", "it is [SEG].")]]


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "mobile_sam.modeling", None)
    with pytest.raises(ValueError, match="pip install mobilesam-mirror timm"):
        tiny_vit()


def test_sam_and_mobile_sam_given_for_each_other_are_named(base, tmp_path):
    with pytest.raises(ValueError, match=r"is no MobileSAM .*it is SAM: set --mask_decoder segment_anything"):
        read_decoder("mobile_sam", str(base / "sam.pth"))
    torch.save({MOBILE: torch.zeros(1)}, tmp_path / "mobile_sam.pt")
    with pytest.raises(ValueError, match=r"no segment-anything .*it is MobileSAM: set --mask_decoder mobile_sam"):
        read_sam(str(tmp_path / "mobile_sam.pt"))


@pytest.fixture
def small(monkeypatch):
    """TinyViT with few channels; its input stays 1024 pixels."""
    pytest.importorskip("mobile_sam")
    monkeypatch.setattr(mobile_sam, "TINY_VIT", mobile_sam.TINY_VIT | SMALL)


@pytest.fixture
def start(small, base, tmp_path):
    """The model, its processor and its file of MobileSAM, loaded as for training."""
    torch.manual_seed(0)
    source = MobileSam(SamShape()).eval()
    for module in source.image_encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
        if hasattr(module, "attention_biases"):
            module.attention_biases.data.normal_()
    torch.save(source.state_dict(), tmp_path / "mobile_sam.pt")
    model, processor, _ = load_for_training(
        str(base / "llava"), str(base / "clip"), str(tmp_path / "mobile_sam.pt"), "fp32", {"mask_decoder": "mobile_sam"}
    )
    return model, processor, source


@pytest.mark.slow
def test_features_and_masks_are_those_of_the_package(start):
    from mobile_sam.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    model, processor, source = start
    encoder = tiny_vit()
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    decoder = MaskDecoder(
        num_multimask_outputs=3, transformer=transformer, transformer_dim=256, iou_head_depth=3, iou_head_hidden_dim=256
    )
    package = Sam(encoder, PromptEncoder(256, (64, 64), (1024, 1024), 16), decoder)
    package.load_state_dict(source.state_dict())
    package.eval()
    batch = processor.prompts([drawn_sample(0).image], TURNS)
    with torch.no_grad():
        expected = package.image_encoder(batch.sam_images)
        for mode in (True, False):  # training uses no batch statistics
            torch.testing.assert_close(model.visual_model.train(mode).encode(batch.sam_images), expected)
        points, labels = torch.tensor([[[300.0, 200.0]]]), torch.ones(1, 1)
        sparse, dense = package.prompt_encoder((points, labels), None, None)
        wanted, rated = package.mask_decoder(expected, package.prompt_encoder.get_dense_pe(), sparse, dense, False)
        masks, iou = model.visual_model.decode(expected, model.visual_model.embed_points(points + 0.5, labels), None)
    assert_same_masks(masks, wanted[:, 0], 1e-4)
    torch.testing.assert_close(iou, rated[:, 0])


@pytest.mark.slow
def test_it_is_saved_cached_and_trained_as_sam(start, tmp_path):
    model, processor, _ = start
    ask = ([drawn_sample(0).image], TURNS)
    [[before]] = predict(model, processor, *ask)
    model.save_pretrained(tmp_path / "own")
    processor.save_pretrained(tmp_path / "own")
    own, own_processor = load_pretrained(tmp_path / "own")
    cache_sam_features(own, own_processor, str(tmp_path / "cache"), 1.0)
    for _ in range(2):
        [[after]] = predict(own, own_processor, *ask)
        torch.testing.assert_close(after.mask_logits, before.mask_logits, rtol=1e-4, atol=1e-5)
    assert own.visual_model.cache.hits == 1
    assert own.visual_model.image_encoder.layers[1].blocks[0].attn.ab.abs().max() > 0
    set_trainable(own)
    statistics = {key: value.clone() for key, value in own.visual_model.image_encoder.named_buffers()}
    own.train()(own_processor.collate([drawn_sample(1, segs=(1,))])).loss.backward()
    assert parameters_by_part(own)["sam_image_encoder"][1] == 0
    assert own.visual_model.prompt_encoder.mask_downscaling[0].weight.grad.abs().sum() > 0
    for key, value in own.visual_model.image_encoder.named_buffers():
        assert torch.equal(value, statistics[key]), key
    with pytest.raises(ValueError, match=r"sam.pth is a SAM 1, and .* decodes"):
        load_original_sam("sam.pth", own)
    assert isinstance(own, UGroundForCausalLM)


def test_the_published_encoder_has_the_papers_size():
    """5 million parameters, and a head that is never called (mobile_sam.pt has it)."""
    pytest.importorskip("mobile_sam")
    encoder = tiny_vit()
    head = sum(p.numel() for part in (encoder.head, encoder.norm_head) for p in part.parameters())
    assert sum(p.numel() for p in encoder.parameters()) - head == pytest.approx(5.8e6, rel=0.1)
