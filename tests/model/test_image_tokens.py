"""The image's tokens in a row: where they lie, what they show, and that padded patches can be left out."""

import numpy as np
import pytest
import torch
from answering import says_seg_often
from backbones import make_backbone
from conftest import assert_same_masks, build_tiny_processor, drawn_sample

from model.backbones.llava import ClipReader
from model.lora import add_lora
from model.opened import predict
from model.processing.processor import UGroundProcessor
from model.settings import RECIPES
from model.structures import Turn
from utils.datasets.mixture import Mixture
from utils.inference.session import ImageSession

NEAR = {"rtol": 2e-4, "atol": 2e-6}
WIDE, HIGH = (30, 64), (64, 40)


@pytest.fixture(scope="module")
def keeping():
    processor = build_tiny_processor()
    processor.keep_padding = True
    return processor


def test_tokens_are_those_of_the_patches_that_show_the_image(tiny_processor, keeping):
    """30x64 pixels fill the upper 19 of CLIP's 40 pixels: two of four rows of patches."""
    whole, batch = (p.collate([drawn_sample(3, WIDE)]) for p in (keeping, tiny_processor))
    start = len(tiny_processor.builder.prefix.before)
    assert batch.image_cells.tolist() == [list(range(8))]
    assert batch.image_tokens.tolist() == [list(range(start, start + 8))]
    assert batch.valid[0].tolist() == [True] * 8 + [False] * 8
    assert (batch.grids, batch.has_padding, whole.has_padding) == ([(4, 4)], False, True)
    assert batch.input_ids.shape[1] == whole.input_ids.shape[1] - 8
    kept = [column for column in range(whole.input_ids.shape[1]) if not start + 8 <= column < start + 16]
    for name in ("input_ids", "segment_ids", "position_ids"):  # positions as if the padded patches were there
        assert torch.equal(getattr(batch, name), getattr(whole, name)[:, kept])
    assert torch.equal(batch.label_ids, whole.label_ids)
    for positions in ("label_positions", "seg_positions"):
        assert torch.equal(getattr(batch, positions), getattr(whole, positions) - 8)


def test_rows_of_a_batch_hold_equally_many(tiny_processor):
    """A row whose image has fewer patches than another also holds padded ones, the first of them."""
    batch = tiny_processor.collate([drawn_sample(3, WIDE), drawn_sample(1, HIGH)])
    width = batch.input_ids.shape[1]
    assert batch.image_cells.tolist() == [list(range(12)), [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14]]
    assert torch.equal(batch.image_tokens[1], batch.image_tokens[0] + width)
    assert batch.has_padding


def test_a_centre_crop_has_no_padded_patches(tiny_tokenizer):
    processor = UGroundProcessor(tiny_tokenizer, ClipReader(40, 10, "crop"), 64, "")
    batch = processor.collate([drawn_sample(3, WIDE), drawn_sample(1, HIGH)])
    assert batch.image_cells.tolist() == [list(range(16))] * 2
    assert not batch.has_padding


def test_image_states_are_read_at_the_tokens(tiny_processor):
    batch = tiny_processor.collate([drawn_sample(3, WIDE), drawn_sample(1, HIGH)])
    states = torch.arange(batch.input_ids.numel()).view(*batch.input_ids.shape, 1)
    assert torch.equal(batch.image_states(states)[..., 0], batch.image_tokens)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layer_selection": "soft"},
        {"policy_gradient": "exact", "map_terms": ("bce", "dice")},
        {"point_prompts": 2, "baseline": "state_critic"},
        {"layer_selection": "last", "mask_prompt": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("sizes", [(WIDE,), (HIGH, WIDE), ((48, 64), HIGH, (22, 64))], ids=str)
def test_padded_patches_change_nothing(make_model, tiny_processor, keeping, settings, sizes):
    """Losses, gradients, masks and maps are those of rows that hold all patches."""
    samples = [drawn_sample(n, size) for n, size in enumerate(sizes)]
    assert tiny_processor.collate(samples).image_tokens.shape[1] < keeping.collate(samples).image_tokens.shape[1]
    results = []
    for processor in (keeping, tiny_processor):
        model = add_lora(make_model(**settings), r=2).eval()  # dropout would draw other numbers
        output = model(processor.collate(samples))
        output.loss.backward()
        results.append((output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (whole, of_whole), (output, gradients) = results
    for name, value in whole.terms.items():
        torch.testing.assert_close(output.terms[name], value, **NEAR)
    assert torch.equal(output.layers, whole.layers)
    for actual, expected in zip(output.maps, whole.maps):
        torch.testing.assert_close(actual, expected, **NEAR)
    assert_same_masks(*(torch.cat([rows.flatten() for rows in each.mask_logits]) for each in (output, whole)))
    assert gradients.keys() == of_whole.keys()
    for name, gradient in gradients.items():
        scale = float(of_whole[name].abs().max())
        torch.testing.assert_close(gradient, of_whole[name], rtol=0, atol=1e-3 * scale + 1e-9, msg=name)


def test_answers_and_conversations_do_not_depend_on_them(make_model, tiny_processor, keeping):
    model = says_seg_often(make_model(seed=1), tiny_processor)
    image = drawn_sample(6, WIDE).image
    questions = ["where is the red star", "circle"]
    turns = [[Turn(question) for question in questions]]
    answers = [
        predict(model, processor, [image], turns, max_new_tokens=6)[0] for processor in (keeping, tiny_processor)
    ]
    for actual, expected in zip(*answers):
        assert actual.token_ids == expected.token_ids
        assert_same_masks(actual.mask_logits, expected.mask_logits)
        torch.testing.assert_close(actual.layer_maps, expected.layer_maps, **NEAR)
    assert sum(len(prediction.layers) for prediction in answers[0]) > 0
    sessions = [ImageSession(model, processor, image) for processor in (keeping, tiny_processor)]
    for question in questions:
        actual, expected = (session.ask(question, max_new_tokens=6) for session in sessions)
        assert actual.token_ids == expected.token_ids
        assert_same_masks(actual.mask_logits, expected.mask_logits)


def test_maps_that_read_padded_patches_need_them(make_model, tiny_processor, keeping):
    model, turns = make_model(**RECIPES["released"]), [[Turn("star", "it is [SEG].")]]
    image = np.full((*WIDE, 3), 90, np.uint8)
    with pytest.raises(ValueError, match=r"map_normalization all reads padded patches.* keep_padding"):
        predict(model, tiny_processor, [image], turns)
    assert predict(model, keeping, [image], turns)[0][0].layers


def test_an_image_that_the_backbone_cannot_read_is_skipped_by_name(tmp_path, data):
    """Qwen-VL reads none that is more than 200 times longer than wide: the mixture takes another one."""
    _, processor = make_backbone("qwen2_5_vl")
    with pytest.raises(ValueError, match=r"crates/7.png: the image is 400 x 1 pixels .* more than 200 times the other"):
        processor.check_image("crates/7.png", drawn_sample(1, (1, 400), (0,)).image)
    mixture = Mixture(data, types="reason_seg")
    plain = [mixture[index] for index in range(6)]
    unread = plain[0].source

    def check(source, image):
        processor.check_image(source, np.zeros((1, 400, 3), np.uint8) if source == unread else image)

    mixture.check_image = check
    assert [mixture[index].source for index in range(1, 6)] == [sample.source for sample in plain[1:]]
    assert mixture[0].source != unread
    assert int(mixture.skipped.sum()) >= 1
