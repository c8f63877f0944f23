"""SAM 2 and SAM 3's tracker as mask decoders: what transformers' models decode, in place, cached, saved, trained."""

from __future__ import annotations

import json
from functools import partialmethod

import numpy as np
import pytest
import torch
from conftest import drawn_sample
from stretched import CONFIGS, SIDE, make_source, make_stretched, make_stretched_processor, tracker_config, write_source
from torch import nn
from transformers import Sam2ImageProcessor, Sam2Model, Sam3TrackerModel

from model.decoders.sam2 import LARGE, Sam2
from model.decoders.sam3_tracker import Sam3Tracker
from model.geometry import mask_prompts
from model.loading.mask_decoders import read_decoder
from model.loading.pretrained import load
from model.loading.weights import load_original_sam, load_strictly
from model.lora import add_lora, parameters_by_part, set_trainable
from model.opened import cache_sam_features, predict
from model.processing.transforms import SAM_INPUTS
from model.structures import Prompts, Turn

NAMES = ("sam2", "sam3_tracker")
SIZES = ((40, 160), (150, 50), (64, 64))  # 4:1, 1:3, 1:1
MASK_SIDE = SIDE // 4
TURNS = [[Turn("where is the red star", "it is [SEG] and [SEG].")]]


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    return write_source(tmp_path_factory.mktemp(name), name)


@pytest.fixture(scope="module")
def processor(name, tiny_tokenizer):
    return make_stretched_processor(tiny_tokenizer, name)


@pytest.fixture
def build(name, folder, processor):
    """build(**settings) -> a model whose mask decoder is that of ``folder``."""
    return lambda **settings: make_stretched(processor, name, folder, **settings)


def decoder_of(name, folder):
    state, sizes = read_decoder(name, str(folder))
    kind = {"sam2": Sam2, "sam3_tracker": Sam3Tracker}[name]
    decoder = kind(kind.config_class(**sizes["decoder_config"]))
    load_strictly(decoder, state, str(folder))
    return decoder.eval()


@pytest.fixture
def decoder(name, folder):
    return decoder_of(name, folder)


def random_prompts(n, seed=0):
    """Points [n, 3, 2], labels [n, 3] and mask prompts [n, 1, side, side]."""
    generator = torch.Generator().manual_seed(seed)
    points = SIDE * torch.rand(n, 3, 2, generator=generator)
    labels = torch.tensor([[1, 0, -1], [1, 1, 0], [0, 1, 1]])[:n]
    return points, labels, torch.rand(n, 1, MASK_SIDE, MASK_SIDE, generator=generator)


def near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * max(1.0, expected.abs().max().item()))


# -- what transformers computes ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_features_and_masks_are_those_of_transformers(name, decoder):
    source = make_source(name)
    source.mask_decoder.dynamic_multimask_via_stability = False
    images = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    features, expected = decoder.encode(images), source.get_image_embeddings(images)
    for actual, wanted in zip(decoder.scales(features), expected, strict=True):
        near(actual, wanted)
    points, labels, masks = random_prompts(3)
    for given, wanted in ((masks, masks), (None, None)):
        output = source(
            image_embeddings=expected,
            input_points=points[:, None],
            input_labels=labels[:, None],
            input_masks=wanted,
            multimask_output=False,
        )
        low_res, iou = decoder.decode(features, decoder.embed_points(points + 0.5, labels.float()), given)
        near(low_res, output.pred_masks[:, 0, 0])
        near(iou, output.iou_scores[:, 0, 0])
        assert low_res.std() > 0.1


@torch.no_grad()
def test_training_and_evaluation_decode_the_same_mask(decoder):
    """transformers' default takes another mask in evaluation where the single one is unstable."""
    features = decoder.encode(torch.randn(2, 3, SIDE, SIDE))
    _, _, masks = random_prompts(2)
    evaluated, trained = decoder.decode(features, None, masks)[0], decoder.train().decode(features, None, masks)[0]
    assert torch.equal(evaluated, trained)


@torch.no_grad()
def test_prompts_of_several_images_are_decoded_as_one_at_a_time(decoder):
    features = decoder.encode(torch.randn(2, 3, SIDE, SIDE))[[0, 1, 1]]
    points, labels, masks = random_prompts(3)
    tokens = decoder.embed_points(points, labels)
    together, rated = decoder.decode(features, tokens, masks)
    for n in range(3):
        alone, iou = decoder.decode(*(part[n : n + 1] for part in (features, tokens, masks)))
        near(together[n : n + 1], alone)
        near(rated[n : n + 1], iou)
    assert (together[1] - together[2]).abs().max() > 0.1


def test_zero_prompts_give_zero_masks(decoder):
    features = decoder.encode(torch.randn(1, 3, SIDE, SIDE))[[]]
    masks, iou = decoder.decode(features, features.new_zeros(0, 1, decoder.prompt_width), None)
    assert masks.shape == (0, MASK_SIDE, MASK_SIDE)
    assert iou.shape == (0,)


def test_without_a_token_the_map_alone_prompts(build, processor):
    model = build()
    batch = processor.prompts([drawn_sample(0).image], TURNS)
    language_pass = model.answer(batch)
    masks = [
        model.decode_masks(language_pass, prompts=prompts)[0][0].mask_logits
        for prompts in (Prompts(), Prompts(seg=False), Prompts(mask=False))
    ]
    assert not torch.allclose(masks[0], masks[1])
    assert not torch.allclose(masks[0], masks[2])


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_the_image_processor(size):
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    for key, means in (("stretch", {}), ("stretch_to_one", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})):
        reference = Sam2ImageProcessor(size={"height": SIDE, "width": SIDE}, **means)
        expected = reference(image, return_tensors="pt")["pixel_values"][0]
        pixels, inner = SAM_INPUTS[key](image, SIDE)
        assert inner == (SIDE, SIDE)
        level = 2.0 / 255 / (0.5 if means else 0.224)  # they round to whole levels in between
        assert (pixels - expected).abs().max() <= level


# -- places ------------------------------------------------------------------------------------------------------------


def local(decoder):
    """The decoder without attention: a pixel of its mask depends on what is there alone."""
    with torch.no_grad():
        for key, parameter in decoder.named_parameters():
            if ".attn.proj." in key or (".o_proj." in key and ".self_attn." not in key):
                parameter.zero_()
            elif ".neck." in key and parameter.shape[2:] == (3, 3):
                parameter[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0.0
        for module in decoder.modules():
            if isinstance(module, nn.ConvTranspose2d):  # a feature becomes four equal ones
                module.weight.copy_(module.weight[:, :, :1, :1].expand_as(module.weight))
    return decoder


def block_of(change, blocks):
    """The block (row, column) of ``blocks`` x ``blocks`` over the image that changed most; its share of the change."""
    energy = nn.functional.adaptive_avg_pool2d(change[None, None] ** 2, blocks).flatten()
    return divmod(int(energy.argmax()), blocks), float(energy.max() / energy.sum())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("blocks", [4, 8])
@torch.no_grad()
def test_what_is_planted_at_a_place_of_the_image_changes_the_mask_there(decoder, processor, size, blocks):
    """In a mask prompt, whose cells are an eighth of the square, and in pixels: the coarsest features are a quarter."""
    local(decoder)
    for place in ((blocks - 2, 1), (0, blocks - 1)):
        y, x = (slice(*(round((i + at) * n / blocks) for at in (0.2, 0.8))) for i, n in zip(place, size))
        plain, target = np.full((*size, 3), 90, np.uint8), torch.zeros(1, *size)
        planted = plain.copy()
        planted[y, x], target[0, y, x] = (250, 10, 250), 1.0

        def mask(image, prompt):
            pixels, _ = SAM_INPUTS[processor.sam_input](image, SIDE)
            low_res, _ = decoder.decode(decoder.encode(pixels[None]), None, mask_prompts(prompt, decoder.mask_fit))
            return decoder.postprocess(low_res, size)[0]

        nothing = torch.zeros_like(target)
        before, changed = mask(plain, nothing), [mask(plain, target)]
        if blocks == 4:
            changed.append(mask(planted, nothing))
        for after in changed:
            assert after.shape == size
            actual, share = block_of(after - before, blocks)
            assert actual == place
            assert share > 0.5  # half a block aside, it would be less


@pytest.mark.parametrize("size", SIZES)
def test_points_lie_in_the_square_where_the_image_shows_them(build, processor, size, monkeypatch):
    model, seen = build(point_prompts=2), []
    embed = model.visual_model.embed_points
    monkeypatch.setattr(model.visual_model, "embed_points", lambda *prompts: seen.append(prompts[0]) or embed(*prompts))
    [[prediction]] = predict(model, processor, [drawn_sample(0, size).image], TURNS)
    points = seen[0]
    assert points.min() >= 0
    assert points.max() <= SIDE
    for n, full in enumerate(prediction.maps):
        foreground = points[n, :2] / SIDE * torch.tensor([size[1], size[0]])  # (x, y) in the image
        for x, y in foreground:
            near_it = full[max(0, int(y) - 12) : int(y) + 13, max(0, int(x) - 12) : int(x) + 13]
            assert near_it.max() > full.mean()


# -- training ----------------------------------------------------------------------------------------------------------


def test_a_step_trains_what_the_masks_depend_on_and_nothing_of_the_encoder(build, processor):
    model = build(point_prompts=1, iou_loss_weight=1.0)
    set_trainable(model)
    samples = [drawn_sample(0), drawn_sample(1, (64, 40), (2,)), drawn_sample(2, segs=(0,))]
    model(processor.collate(samples)).loss.backward()
    trained = {key for key, p in model.visual_model.named_parameters() if p.requires_grad}
    learned = {key for key, p in model.visual_model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    multimask = tuple(f"mask_decoder.output_hypernetworks_mlps.{i}." for i in (1, 2, 3))
    assert {key for key in trained - learned if not key.startswith(multimask) and "k_proj.bias" not in key} == set()
    assert learned <= trained
    frozen = ("vision_encoder.", "mask_decoder.conv_s", "mask_decoder.pred_obj_score_head.", "no_memory_embedding")
    others = {key for key, _ in model.visual_model.named_parameters()} - trained
    assert {key for key in others if not key.startswith(frozen)} == {"prompt_encoder.no_mask_embed.weight"}
    assert not any(key.startswith(frozen) for key in trained)
    counts = parameters_by_part(model)
    assert counts["sam_image_encoder"][1] == 0 < counts["sam_image_encoder"][0]
    assert counts["sam_mask_decoder"][1] > 0


@pytest.mark.parametrize("prompts", [{"mask_prompt": False}, {"point_prompts": 0}])
def test_prompts_that_are_off_do_not_train(build, prompts):
    model = build(**prompts)
    set_trainable(model)
    trained = {key.split(".")[0] for key, p in model.visual_model.prompt_encoder.named_parameters() if p.requires_grad}
    assert trained == ({"no_mask_embed"} if prompts == {"mask_prompt": False} else {"mask_embed"})


def test_checkpointing_changes_no_gradient(build, processor):
    batch, gradients = processor.collate([drawn_sample(0)]), []
    for checkpointing in (False, True):
        model = build()
        adapted = add_lora(model, r=2, dropout=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        adapted(batch).loss.backward()
        gradients.append(model.text_hidden_fcs[0][0].weight.grad)
    near(gradients[1], gradients[0])
    assert gradients[0].abs().sum() > 0


def test_packed_conversations_equal_separate_ones(build, processor):
    model, sample = build(layer_selection="last"), drawn_sample(0, segs=(1, 2, 0))
    packed = model(processor.collate([sample])).mask_logits[0]
    alone = [
        type(sample)(sample.source, sample.image, [talk], masks, sample.sample_id)
        for talk, masks in sample.by_conversation()
    ]
    near(packed, torch.cat([model(processor.collate([one])).mask_logits[0] for one in alone]))


def test_masks_are_rated_from_the_start(build, processor):
    [[prediction]] = predict(build(), processor, [drawn_sample(0).image], TURNS, layer_policy="best:2")
    assert len(prediction.predicted_iou) == 2


# -- cache and compiler ------------------------------------------------------------------------------------------------


def test_cached_features_of_all_scales_give_the_same_masks(build, processor, name, tiny_tokenizer, tmp_path):
    model, cached = build(), build()
    hashing = make_stretched_processor(tiny_tokenizer, name)
    cache_sam_features(cached, hashing, str(tmp_path), 1.0)
    calls = []
    cached.visual_model.vision_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    samples = [drawn_sample(0), drawn_sample(1, (64, 40), (2,))]
    expected = model(processor.collate(samples)).mask_logits
    for damage in (False, False, True):
        if damage:
            for path in tmp_path.glob("*.sam"):
                path.write_bytes(path.read_bytes()[:-1])
        actual = cached(hashing.collate(samples)).mask_logits
        assert all(map(torch.equal, actual, expected))
    assert len(calls) == 4  # two images, again after the damage


def test_an_entry_depends_on_weights_and_settings_of_the_encoder(build, processor, tmp_path):
    def entry(change):
        model = build()
        with torch.no_grad():
            change(model.visual_model)
        cache_sam_features(model, processor, str(tmp_path), 1.0)
        return model.visual_model.cache.encoder

    def no_windows(decoder):
        backbone = decoder.shape.vision_config.backbone_config
        key = "global_attn_indexes" if hasattr(backbone, "global_attn_indexes") else "global_attention_blocks"
        setattr(backbone, key, [0])

    changes = (
        lambda decoder: None,
        lambda decoder: decoder.mask_decoder.conv_s0.weight.add_(1),
        lambda decoder: decoder.no_memory_embedding.add_(1),
        lambda decoder: next(decoder.vision_encoder.parameters()).add_(1),
        no_windows,
    )
    try:
        names = [entry(change) for change in changes]
    finally:
        processor.hash_images = False
    assert len(set(names)) == len(changes)


def test_a_compiled_encoder_has_the_same_keys_and_features(decoder, monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    images, keys = torch.randn(2, 3, SIDE, SIDE), list(decoder.state_dict())
    expected = decoder.encode(images)
    decoder.compile_encoder()
    near(decoder.encode(images), expected)
    assert list(decoder.state_dict()) == keys


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_is_loaded_from_its_own_folder_alone(build, processor, tmp_path, precision):
    model = build()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    opened = load(tmp_path, precision, "cpu")
    decoder = opened.model.visual_model
    original = dict(model.visual_model.named_buffers())
    for key, buffer in decoder.named_buffers():
        assert buffer.dtype == torch.float32, key
        assert torch.equal(buffer, original[key]), key
    assert {p.dtype for p in decoder.parameters()} == {opened.model.dtype}
    ask = ([drawn_sample(0).image], TURNS)
    [[expected]], [[actual]] = predict(model, processor, *ask), predict(opened.model, opened.processor, *ask)
    if precision == "fp32":
        assert torch.equal(actual.mask_logits, expected.mask_logits)
    assert actual.mask_logits.isfinite().all()
    settings = json.loads((tmp_path / "uground_processor.json").read_text())
    assert settings["sam_input"] == processor.sam_input
    (tmp_path / "uground_processor.json").write_text(json.dumps(settings | {"sam_input": "pad"}))
    with pytest.raises(ValueError, match=f"sam_input is {processor.sam_input} in config.json, pad in the processor"):
        load(tmp_path, precision, "cpu")


def test_the_sam_of_analyze_is_segment_anything(build):
    with pytest.raises(ValueError, match=r"sam.pth is a SAM 1, and .* decodes"):
        load_original_sam("sam.pth", build())


@pytest.mark.parametrize("scales", [(4.0, 2.0, 1.0), (4.0, 2.0, 1.0, 0.5)])
@torch.no_grad()
def test_the_trackers_image_is_the_scale_of_a_patch(scales, tmp_path):
    """SAM 3's neck has a coarser one; the embedding for no memory is added to the tracker's."""
    decoder = decoder_of("sam3_tracker", write_source(tmp_path, "sam3_tracker", tracker_config(scales)))
    image = torch.randn(1, 3, SIDE, SIDE)
    *_, coarse = decoder.scales(decoder.encode(image))
    expected = decoder.vision_encoder(image).fpn_hidden_states[2] + decoder.no_memory_embedding.view(1, -1, 1, 1)
    near(coarse, expected)
    assert decoder.no_memory_embedding.abs().max() > 0


@pytest.mark.parametrize(
    ("kind", "sizes", "model", "side", "masks", "encoder", "decoder"),
    [
        (Sam2, LARGE, Sam2Model, 1024, 256, 212_703_280, 4_215_109),
        (Sam3Tracker, {}, Sam3TrackerModel, 1008, 288, 454_038_784, 4_215_109),
    ],
    ids=NAMES,
)
def test_the_default_sizes_are_those_of_the_published_models(kind, sizes, model, side, masks, encoder, decoder):
    """SAM 2.1 Large: 224.4 million parameters with the memory for videos, by facebookresearch/sam2's README."""
    with torch.device("meta"):
        built = kind(kind.config_class(**kind.sizes(sizes)))
        whole = model(kind.config_class(**sizes))
    assert (built.image_side, built.mask_side, built.prompt_width) == (side, masks, 256)
    assert built.state_dict().keys() == whole.state_dict().keys()
    counts = {
        part: sum(p.numel() for p in getattr(built, part).parameters()) for part in ("vision_encoder", "mask_decoder")
    }
    assert counts == {"vision_encoder": encoder, "mask_decoder": decoder}


def test_every_decoder_here_has_a_tiny_configuration():
    assert tuple(CONFIGS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_points_and_image_have_the_same_positions_from_the_start(name):
    """transformers ties the two random matrices only when it loads weights."""
    decoder = {"sam2": Sam2, "sam3_tracker": Sam3Tracker}[name](CONFIGS[name]())
    image, points = decoder.shared_image_embedding, decoder.prompt_encoder.shared_embedding
    assert torch.equal(image.positional_embedding, points.positional_embedding)
