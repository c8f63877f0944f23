"""Monte-Carlo uncertainty: mc:T against T single samples."""

from __future__ import annotations

import pytest
import torch
from conftest import drawn_sample

from model.opened import predict
from model.structures import Turn
from model.uncertainty import MonteCarlo

DRAWS, STRIDE = 6, 104_729  # sample t of mc:T is the sample of seed + t * STRIDE


def ask(model, processor, policy: str, seed: int = 5):
    images = [drawn_sample(0).image, drawn_sample(1, (64, 40)).image]
    answers = [["it is [SEG].", "[SEG] and [SEG]"], ["sure [SEG]", "no [REJ]"]]
    turns = [list(map(Turn, ("star", "circle"), row)) for row in answers]
    rows = predict(model, processor, images, turns, layer_policy=policy, seed=seed)
    return [prediction for row in rows for prediction in row]


def test_mean_variance_and_histogram_are_those_of_the_draws(make_model, tiny_processor):
    model = make_model()
    together = ask(model, tiny_processor, f"mc:{DRAWS}")
    single = [ask(model, tiny_processor, "sample", seed=5 + t * STRIDE) for t in range(DRAWS)]
    assert [len(p.uncertainty) for p in together] == [1, 2, 1, 0]
    different = 0
    for answer, found in enumerate(together):
        for k, uncertainty in enumerate(found.uncertainty):
            drawn = torch.stack([sample[answer].mask_logits[k].sigmoid() for sample in single])
            layers = [sample[answer].layers[k] for sample in single]
            different += len(set(layers)) > 1
            torch.testing.assert_close(uncertainty.probability, drawn.mean(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(uncertainty.variance, drawn.var(0, correction=0), rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(found.mask_logits[k].sigmoid(), drawn.mean(0), rtol=1e-4, atol=1e-5)
            assert uncertainty.layers.mul(DRAWS).round().int().tolist() == [layers.count(i) for i in range(5)]
            masks, whole = drawn > 0.5, drawn.mean(0) > 0.5
            union = (masks | whole).flatten(1).sum(1)
            overlap = (masks & whole).flatten(1).sum(1)
            iou = torch.where(union > 0, overlap / union.clamp(min=1), 1.0)
            assert uncertainty.score == pytest.approx(1 - float(iou.mean()), abs=0.02)
    assert different > 1


def test_one_draw_is_a_sample(make_model, tiny_processor):
    model = make_model()
    torch.nn.init.zeros_(model.ppm.gate)  # uniform
    chosen = set()
    for seed in range(4):
        for drawn, sample in zip(ask(model, tiny_processor, "mc:1", seed), ask(model, tiny_processor, "sample", seed)):
            assert drawn.layers == sample.layers
            torch.testing.assert_close(drawn.mask_logits.sigmoid(), sample.mask_logits.sigmoid(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(drawn.maps, sample.maps)
            assert all(uncertainty.score == 0 for uncertainty in drawn.uncertainty)
            chosen |= set(drawn.layers)
    assert len(chosen) > 1


def test_a_layer_is_decoded_once_however_often_it_is_drawn(make_model, tiny_processor, monkeypatch):
    """And LLaVA and SAM's encoder work once, whatever the number of draws."""
    model, decoded, encoded, read = make_model(), [], [], []
    model.model.layers[0].register_forward_hook(lambda *_: read.append("language"))
    model.vision_tower.register_forward_hook(lambda *_: read.append("vision"))
    decode, encode = model.visual_model.decode, model.visual_model.encode
    monkeypatch.setattr(model.visual_model, "decode", lambda e, *rest: decoded.append(len(e)) or decode(e, *rest))
    monkeypatch.setattr(
        model.visual_model, "encode", lambda images, *keys: encoded.append(len(images)) or encode(images, *keys)
    )
    found = ask(model, tiny_processor, "mc:64")
    assert sum(decoded) == sum(int((u.layers > 0).sum()) for p in found for u in p.uncertainty) <= 4 * 4
    assert encoded == [2]
    assert sorted(read) == ["language", "vision"]


def test_one_layer_leaves_nothing_uncertain(make_model, tiny_processor):
    model = make_model(first_candidate_layer=3, last_candidate_layer=3)
    certain, fixed = ask(model, tiny_processor, "mc:4"), ask(model, tiny_processor, "fixed:3")
    for found, alone in zip(certain, fixed):
        torch.testing.assert_close(found.mask_logits.sigmoid(), alone.mask_logits.sigmoid(), rtol=1e-4, atol=1e-5)
        assert alone.uncertainty == []
        for uncertainty in found.uncertainty:
            assert uncertainty.score == 0
            assert uncertainty.variance.max() < 1e-6


def test_the_score_is_the_disagreement():
    left, right = torch.full((2, 4), -9.0), torch.full((2, 4), -9.0)
    left[:, :2], right[:, 2:] = 9.0, 9.0
    mean = MonteCarlo(torch.tensor([0.75, 0.25]))
    mean.add(0, left, torch.zeros(2, 4))
    mean.add(1, right, torch.ones(2, 4))
    found = mean.uncertainty()
    assert found.score == pytest.approx(0.25)  # three of four draws are the mean's mask, one has nothing of it
    torch.testing.assert_close(found.variance, torch.full((2, 4), 0.75 * 0.25), rtol=1e-3, atol=0)
    torch.testing.assert_close(mean.similarity, torch.full((2, 4), 0.25))
    nowhere = MonteCarlo(torch.tensor([1.0]))
    nowhere.add(0, torch.full((2, 2), -9.0), torch.zeros(2, 2))
    assert nowhere.uncertainty().score == 0
