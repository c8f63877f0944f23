"""Optimized code computes the same as the code that it replaces, and shared work is done once."""

from __future__ import annotations

from functools import partial, partialmethod

import pytest
import torch
from answering import says_seg_often
from conftest import drawn_sample
from segment_anything.modeling import ImageEncoderViT
from torch import nn
from torchvision.transforms.functional import gaussian_blur

from model import losses
from model.decoders.segment_anything import FusedAttention, SamShape, SegmentAnything
from model.opened import predict
from model.structures import Turn


@pytest.fixture(scope="module")
def sams() -> tuple[ImageEncoderViT, SegmentAnything]:
    """The package's encoder and this project's with equal weights: padded windows, large relative positions."""
    torch.manual_seed(0)
    shape = SamShape(
        image_size=128, patch_size=8, encoder_width=48, encoder_depth=3, encoder_heads=3, global_attention=(1,),
        window_size=6, prompt_width=32,
    )  # fmt: skip
    package = ImageEncoderViT(
        img_size=128, patch_size=8, embed_dim=48, depth=3, num_heads=3, out_chans=32, use_rel_pos=True, window_size=6,
        norm_layer=partial(nn.LayerNorm, eps=1e-6), global_attn_indexes=(1,),
    )  # fmt: skip
    for name, parameter in package.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3 if "rel_pos" in name else 0.1)
    ours = SegmentAnything(shape)
    ours.image_encoder.load_state_dict(package.state_dict())
    return package, ours


def test_fused_attention_has_the_packages_keys_and_numbers(sams):
    package, ours = sams
    assert list(ours.image_encoder.state_dict()) == list(package.state_dict())
    images = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        exact = package(images)
    torch.testing.assert_close(ours.encode(images), exact, rtol=1e-4, atol=1e-5)
    assert float((exact - exact.mean()).abs().mean()) > 0.1


def test_fused_attention_in_bf16_is_as_close_to_float32_as_the_package(sams):
    package, ours = sams
    images = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact, package_bf16 = package(images), package.to(torch.bfloat16)(images.bfloat16()).float()
    package.float()
    fused_bf16 = ours.to(torch.bfloat16).encode(images.bfloat16()).float()
    ours.float()
    assert float((fused_bf16 - exact).square().mean()) < 1.1 * float((package_bf16 - exact).square().mean())


@pytest.mark.slow
def test_a_compiled_encoder_has_the_same_keys_and_numbers(monkeypatch):
    """Traced and lowered as in a run; what the C++ compiler makes of it, in half a minute, is PyTorch's affair."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager_decomp_partition"))
    torch.manual_seed(0)
    sam = SegmentAnything(SamShape(64, 8, encoder_width=16, encoder_depth=1, encoder_heads=2, global_attention=(0,)))
    images, keys = torch.randn(3, 3, 64, 64), list(sam.state_dict())
    plain = sam.encode(images)
    sam.compile_encoder()
    assert list(sam.state_dict()) == keys
    torch.testing.assert_close(sam.encode(images), plain, rtol=1e-4, atol=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedAttention, "forward", None)  # already traced: Python no longer runs it
        torch.testing.assert_close(sam.encode(images[:2]), plain[:2], rtol=1e-4, atol=1e-5)


def test_images_are_encoded_one_by_one(sams):
    _, ours = sams
    images = torch.randn(3, 3, 128, 128)
    assert torch.equal(ours.encode(images)[1:2], ours.encode(images[1:2]))


def test_an_encoded_image_can_be_part_of_a_graph(sams):
    """Embeddings are computed in inference mode, but autograd can save them."""
    embeddings = sams[1].encode(torch.randn(1, 3, 128, 128))
    weight = torch.ones((), requires_grad=True)
    (embeddings * weight).sum().backward()
    torch.testing.assert_close(weight.grad, embeddings.sum())


@pytest.mark.parametrize(("size", "side", "sigma"), [((40, 60), 31, 7.0), ((9, 33), 9, 2.0), ((1, 7), 1, 7.0)])
def test_blur_is_torchvisions(size, side, sigma):
    masks = (torch.rand(2, *size, generator=torch.Generator().manual_seed(0)) > 0.8).float()
    torch.testing.assert_close(losses.blur(masks, side, sigma), gaussian_blur(masks, [side, side], [sigma, sigma]))


@pytest.mark.parametrize("positive_weight", ["mask", "image"])
def test_masks_in_parts_have_the_same_losses_and_gradients(make_model, tiny_processor, monkeypatch, positive_weight):
    """Large photographs: one mask at a time, its losses recomputed in the backward pass."""
    settings = {"positive_weight": positive_weight, "map_terms": ("gaussian_bce", "dice"), "reward_terms": "iou"}
    batch = tiny_processor.collate([drawn_sample(0, segs=(2, 1, 0)), drawn_sample(1, segs=(0,)), drawn_sample(2)])
    results = []
    for pixels in (10**9, 48 * 64 * 2, 1):
        monkeypatch.setattr(losses, "PIXELS_AT_ONCE", pixels)
        model = make_model(**settings)
        output = model(batch)
        output.loss.backward()
        results.append((output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (whole, whole_gradients), *others = results
    for output, gradients in others:
        torch.testing.assert_close(output.terms, whole.terms, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(output.rewards, whole.rewards, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gradients, whole_gradients, rtol=1e-4, atol=1e-6)


def saved_bytes(compute) -> int:
    """Bytes that autograd saves for the backward pass of ``compute()``, each storage counted once."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        compute()
    return sum(kept.values())


def test_masks_in_parts_keep_less_for_the_backward_pass(make_model, monkeypatch):
    model = make_model()
    target = (torch.rand(4, 100, 100) > 0.5).to(torch.uint8)
    logits, maps = torch.randn(4, 100, 100, requires_grad=True), torch.rand(4, 100, 100, requires_grad=True)
    kept = {}
    for pixels in (10**9, 10_000):
        monkeypatch.setattr(losses, "PIXELS_AT_ONCE", pixels)
        kept[pixels] = saved_bytes(lambda: model.objective.mask_terms([target], [logits], [maps])) / target.numel()
    assert kept[10_000] < 14  # logits, map and soft target in float32, and the target: the inputs alone
    assert kept[10**9] > 25


@pytest.mark.parametrize("mode", ["generate", "teacher_forced"])
def test_eight_questions_encode_the_image_once(make_model, tiny_processor, monkeypatch, mode):
    """Eight expressions cost little more than one: CLIP, SAM's encoder and the image's tokens are run once."""
    model = says_seg_often(make_model(seed=1), tiny_processor)
    images, widths, forward = [], [], model.forward_packed
    for encoder in (model.vision_tower.embeddings, model.visual_model.image_encoder):
        encoder.register_forward_pre_hook(lambda module, inputs: images.append(len(inputs[0])))

    def counted(embeddings, *rest, **more):
        widths.append(embeddings.shape[0] * embeddings.shape[1])
        return forward(embeddings, *rest, **more)

    monkeypatch.setattr(model, "forward_packed", counted)
    has_answers, words = mode == "teacher_forced", ("red", "green", "blue", "a", "so", "such", "it", "one")
    turns = [Turn(f"where is the {word} star", "Sure, it is [SEG]." * has_answers) for word in words]
    predictions = predict(model, tiny_processor, [drawn_sample(3).image], [turns], max_new_tokens=4)[0]
    assert sum(len(prediction.mask_logits) for prediction in predictions) > 1
    assert images == [1, 1]
    prefix = tiny_processor.prefix(drawn_sample(3).image).input_ids.shape[1]
    alone = [tiny_processor.prompts([drawn_sample(3).image], [[turn]]) for turn in turns]
    assert widths[0] == prefix + sum(batch.input_ids.shape[1] - prefix for batch in alone)
    assert len(widths) == 1 if has_answers else max(widths[1:]) < prefix
