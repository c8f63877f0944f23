"""Monte-Carlo uncertainty: mc:T against T single samples."""

from __future__ import annotations

import pytest
import torch
from conftest import drawn_sample

from model.opened import predict
from model.structures import Turn
from model.uncertainty import MonteCarlo, ambiguity

SAMPLES, STRIDE = 6, 104_729  # sample t of mc:T is the sample of seed + t * STRIDE


def ask(model, processor, policy: str, seed: int = 5):
    images = [drawn_sample(0).image, drawn_sample(1, (64, 40)).image]
    answers = [["it is [SEG].", "[SEG] and [SEG]"], ["sure [SEG]", "no [REJ]"]]
    turns = [list(map(Turn, ("star", "circle"), row)) for row in answers]
    rows = predict(model, processor, images, turns, layer_policy=policy, seed=seed)
    return [prediction for row in rows for prediction in row]


def test_mean_variance_and_histogram_are_those_of_the_samples(make_model, tiny_processor):
    model = make_model()
    together = ask(model, tiny_processor, f"mc:{SAMPLES}")
    single = [ask(model, tiny_processor, "sample", seed=5 + t * STRIDE) for t in range(SAMPLES)]
    assert [len(p.uncertainty) for p in together] == [1, 2, 1, 0]
    num_different = 0
    for answer, prediction in enumerate(together):
        for k, uncertainty in enumerate(prediction.uncertainty):
            sampled = torch.stack([sample[answer].mask_logits[k].sigmoid() for sample in single])
            layers = [sample[answer].layers[k] for sample in single]
            num_different += len(set(layers)) > 1
            torch.testing.assert_close(uncertainty.probability, sampled.mean(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(uncertainty.variance, sampled.var(0, correction=0), rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(prediction.mask_logits[k].sigmoid(), sampled.mean(0), rtol=1e-4, atol=1e-5)
            assert uncertainty.layers.mul(SAMPLES).round().int().tolist() == [layers.count(i) for i in range(5)]
            masks, mean_mask = sampled > 0.5, sampled.mean(0) > 0.5
            union = (masks | mean_mask).flatten(1).sum(1)
            overlap = (masks & mean_mask).flatten(1).sum(1)
            iou = torch.where(union > 0, overlap / union.clamp(min=1), 1.0)
            assert uncertainty.score == pytest.approx(1 - float(iou.mean()), abs=0.02)
    assert num_different > 1


def test_monte_carlo_with_one_sample_equals_that_sample(make_model, tiny_processor):
    model = make_model()
    torch.nn.init.zeros_(model.ppm.gate)  # uniform
    chosen = set()
    for seed in range(4):
        for mean, sample in zip(ask(model, tiny_processor, "mc:1", seed), ask(model, tiny_processor, "sample", seed)):
            assert mean.layers == sample.layers
            torch.testing.assert_close(mean.mask_logits.sigmoid(), sample.mask_logits.sigmoid(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(mean.maps, sample.maps)
            assert all(uncertainty.score == 0 for uncertainty in mean.uncertainty)
            chosen |= set(mean.layers)
    assert len(chosen) > 1


def test_a_layer_is_decoded_once_however_often_it_is_sampled(make_model, tiny_processor, monkeypatch):
    """LLaVA and SAM's encoder run once, whatever the number of samples."""
    model, decoded, encoded, forwarded = make_model(), [], [], []
    model.model.layers[0].register_forward_hook(lambda *_: forwarded.append("language"))
    model.vision_tower.embeddings.register_forward_hook(lambda *_: forwarded.append("vision"))
    decode, encode = model.visual_model.decode, model.visual_model.encode
    monkeypatch.setattr(model.visual_model, "decode", lambda e, *rest: decoded.append(len(e)) or decode(e, *rest))
    monkeypatch.setattr(
        model.visual_model, "encode", lambda images, *keys: encoded.append(len(images)) or encode(images, *keys)
    )
    predictions = ask(model, tiny_processor, "mc:64")
    assert sum(decoded) == sum(int((u.layers > 0).sum()) for p in predictions for u in p.uncertainty) <= 4 * 4
    assert encoded == [2]
    assert sorted(forwarded) == ["language", "vision"]


def test_a_single_candidate_layer_has_no_uncertainty(make_model, tiny_processor):
    model = make_model(first_candidate_layer=3, last_candidate_layer=3)
    for mean, fixed in zip(ask(model, tiny_processor, "mc:4"), ask(model, tiny_processor, "fixed:3")):
        torch.testing.assert_close(mean.mask_logits.sigmoid(), fixed.mask_logits.sigmoid(), rtol=1e-4, atol=1e-5)
        assert fixed.uncertainty == []
        for uncertainty in mean.uncertainty:
            assert uncertainty.score == 0
            assert uncertainty.variance.max() < 1e-6


def test_the_score_is_the_disagreement():
    left, right = torch.full((2, 4), -9.0), torch.full((2, 4), -9.0)
    left[:, :2], right[:, 2:] = 9.0, 9.0
    mean = MonteCarlo(torch.tensor([0.75, 0.25]))
    mean.add(0, left, torch.zeros(2, 4))
    mean.add(1, right, torch.ones(2, 4))
    uncertainty = mean.uncertainty()
    assert uncertainty.score == pytest.approx(0.25)  # three of four samples equal the mean's mask, one is disjoint
    torch.testing.assert_close(uncertainty.variance, torch.full((2, 4), 0.75 * 0.25), rtol=1e-3, atol=0)
    torch.testing.assert_close(mean.similarity, torch.full((2, 4), 0.25))
    empty = MonteCarlo(torch.tensor([1.0]))
    empty.add(0, torch.full((2, 2), -9.0), torch.zeros(2, 2))
    assert empty.uncertainty().score == 0


def test_ambiguity_is_the_mean_distance_from_a_decision_near_the_mask():
    p = torch.tensor([[[0.01, 0.02], [1.0, 0.5]], [[0.01, 0.01], [0.01, 0.01]], [[0.01, 0.9], [0.9, 0.9]]])
    values = ambiguity(torch.logit(p, eps=1e-7))
    torch.testing.assert_close(values, torch.tensor([0.5, 1.0, 0.2]), atol=1e-5, rtol=0)
    assert ambiguity(torch.zeros(0, 4, 4)).shape == (0,)
