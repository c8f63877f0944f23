"""Rounds of questions about the same images: the images are encoded once, the answers are those of ``predict``."""

from __future__ import annotations

import pytest
import torch
from backbones import OTHERS, make_backbone
from conftest import assert_same_masks, build_tiny_model, drawn_sample

from model.opened import predict, predict_rounds
from model.structures import Turn
from model.threads import SMALL_PRODUCT, fewer_threads

SAMPLES = [drawn_sample(0), drawn_sample(1, (64, 40), (2,)), drawn_sample(2, (50, 50), (0,))]
IMAGES = [sample.image for sample in SAMPLES]
FIRST = [[Turn("where is the star")], [Turn("circle"), Turn("the green square please")], [Turn("red")]]
SECOND = [[Turn("a blue circle in the image"), Turn("star")], [Turn("red")], [Turn("what is there so green")]]
ROUNDS = [FIRST, SECOND, FIRST]
ANSWERED = [[[Turn(turn.question, "sure, it is [SEG].") for turn in row] for row in turns] for turns in ROUNDS]
OPTIONS = {"layer_policy": "sample", "max_new_tokens": 6, "seed": 3}


@pytest.fixture(params=["llava", *OTHERS])
def model_and_processor(request, tiny_processor):
    if request.param == "llava":
        return build_tiny_model(tiny_processor), tiny_processor
    return make_backbone(request.param)


def check_same(found, expected):
    for row, expected_row in zip(found, expected, strict=True):
        for prediction, other in zip(row, expected_row, strict=True):
            assert (prediction.token_ids, prediction.text, prediction.layers, prediction.rejected) == (
                other.token_ids,
                other.text,
                other.layers,
                other.rejected,
            )
            assert_same_masks(prediction.mask_logits, other.mask_logits)
            torch.testing.assert_close(prediction.maps, other.maps, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rounds", [ROUNDS, ANSWERED], ids=["generated", "teacher-forced"])
def test_every_round_is_answered_as_by_itself(model_and_processor, rounds):
    model, processor = model_and_processor
    expected = [predict(model, processor, IMAGES, turns, [4, 0, 7], **OPTIONS) for turns in rounds]
    found = list(predict_rounds(model, processor, IMAGES, rounds, [4, 0, 7], **OPTIONS))
    assert len(found) == 3
    for predictions, others in zip(found, expected):
        check_same(predictions, others)
    for row, others in zip(found[0], expected[0]):  # the first one: to the last bit
        assert all(torch.equal(a.mask_logits, b.mask_logits) for a, b in zip(row, others))
    later = list(predict_rounds(model, processor, IMAGES, rounds, [4, 0, 7], answered=1, **OPTIONS))
    assert len(later) == 2  # what is known is not answered, and the others are as before, to the last bit
    for row, others in zip(later[0] + later[1], found[1] + found[2]):
        assert all(torch.equal(a.mask_logits, b.mask_logits) for a, b in zip(row, others))


@pytest.mark.parametrize("rounds", [ROUNDS, ANSWERED], ids=["generated", "teacher-forced"])
def test_images_are_encoded_once(tiny_model, tiny_processor, rounds, monkeypatch):
    counts = {"read_images": 0, "embed_images": 0}

    def counted(owner, name):
        whole = getattr(owner, name)

        def call(*args, **kwargs):
            counts[name] += 1
            return whole(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    counted(tiny_model, "read_images")
    counted(tiny_model.visual_model, "embed_images")
    list(predict_rounds(tiny_model, tiny_processor, IMAGES, rounds, **OPTIONS))
    assert counts["read_images"] == 1
    assert counts["embed_images"] <= 1


def test_a_later_batch_takes_the_pixels_of_the_first(tiny_processor):
    batch = tiny_processor.prompts(IMAGES, FIRST)
    other = tiny_processor.prompts(IMAGES, SECOND, seen=batch)
    alone = tiny_processor.prompts(IMAGES, SECOND)
    assert other.pixel_values is batch.pixel_values
    assert other.sam_images is batch.sam_images
    for name, value in vars(alone).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(other, name), value), name


def test_the_batch_without_its_prefix_has_the_same_tokens_before_answers(tiny_processor):
    batch = tiny_processor.prompts(IMAGES, ANSWERED[0])
    length = int((batch.segment_ids[0] == 0).sum())
    rest = batch.after_prefix(length)
    for name in ("label_positions", "seg_positions"):
        before = batch.input_ids.flatten()[getattr(batch, name)]
        assert torch.equal(rest.input_ids.flatten()[getattr(rest, name)], before)
    assert rest.input_ids.shape == (3, batch.input_ids.shape[1] - length)


def test_a_model_that_was_training_trains_again(tiny_model, tiny_processor):
    tiny_model.train()
    rounds = predict_rounds(tiny_model, tiny_processor, IMAGES, ROUNDS, **OPTIONS)
    next(rounds)
    assert not tiny_model.training
    assert len(list(rounds)) == 2
    assert tiny_model.training


def test_small_products_use_one_thread():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for rows, weights, threads in ((1, SMALL_PRODUCT // 16, 1), (1, SMALL_PRODUCT // 8, 2), (32, SMALL_PRODUCT, 2)):
            with fewer_threads(rows, weights):
                assert torch.get_num_threads() == threads
            assert torch.get_num_threads() == 2
        with pytest.raises(KeyError), fewer_threads(1, 1):
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_fewer_threads_change_an_answer_by_rounding_at_most(tiny_model, tiny_processor, monkeypatch):
    before, found = torch.get_num_threads(), []
    try:
        torch.set_num_threads(2)
        for small in (0, SMALL_PRODUCT):
            monkeypatch.setattr("model.threads.SMALL_PRODUCT", small)
            found.append(predict(tiny_model, tiny_processor, IMAGES, FIRST, **OPTIONS))
    finally:
        torch.set_num_threads(before)
    for row, others in zip(*found):
        for a, b in zip(row, others):
            assert_same_masks(a.mask_logits, b.mask_logits)
            assert a.token_ids == b.token_ids
