"""The ceiling of a policy, on tables of IoU whose truth is known."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import spearmanr

from utils.evaluation import ceiling_text
from utils.evaluation.ceiling import (
    ACROSS,
    CHANCE,
    FIXED,
    FIXED_CROSS,
    GATE,
    KIND,
    KIND_CROSS,
    LAST,
    ORACLE,
    OWN,
    OWN_MODE,
    UNIFORM,
    Measured,
    best,
    ceiling_of,
    checkerboard,
    correlations,
    cross_fitted,
    interval_of,
    kinds_of,
    ridge,
)

LAYERS = [1, 2, 3, 4]


def measured(signal, noise=0.0, states=None, seed=0, **others):
    """Queries in pairs of an image: IoU = signal [Q, C] + noise, which is independent on the halves of the pixels."""
    rng, count = np.random.default_rng(seed), len(signal)
    halves = np.clip(signal + rng.normal(0, 2**0.5 * noise, (2, *signal.shape)), 0, 1)
    mask = halves.mean(0)
    return Measured(
        layers=LAYERS,
        images=np.arange(count) // 2,
        kinds=others.pop("kinds", np.full(count, "all")),
        mask=mask,
        map=others.pop("map", mask / 2),
        halves=halves,
        rewards=others.pop("rewards", {"both": -mask}),
        states=rng.normal(size=(count, 4, 16)) if states is None else states,
        **others,
    )


def of_kinds(count=160, seed=0):
    """Odd queries are best in layer 2, even ones in layer 4, by 0.2; one coordinate of the states tells which."""
    rng, odd = np.random.default_rng(seed), np.arange(count) % 2 == 1
    signal = np.full((count, 4), 0.5)
    signal[odd, 1] += 0.2
    signal[~odd, 3] += 0.21
    states = rng.normal(size=(count, 4, 16))
    states[..., 0] = np.where(odd, 3, -3)[:, None]
    return signal, states, np.where(odd, "odd", "even")


def test_kinds_that_prefer_different_layers():
    signal, states, kinds = of_kinds()
    ceiling = ceiling_of(measured(signal, 0.03, states, kinds=kinds))
    assert (ceiling.row(FIXED).layers, ceiling.row(LAST).layers) == ("4", "4")
    assert ceiling.row(FIXED).gain == 0
    assert ceiling.row(ORACLE).gain == pytest.approx(0.1, abs=0.02)
    for name in (KIND, KIND_CROSS, GATE, ACROSS):
        assert ceiling.row(name).gain == pytest.approx(0.1, abs=0.015)
        assert 0.05 < ceiling.row(name).gain_low < ceiling.row(name).gain_high < 0.15
    assert ceiling.row(UNIFORM).layers == "all"
    assert ceiling.row(UNIFORM).gIoU == pytest.approx(0.55, abs=0.01)
    np.testing.assert_allclose(ceiling.shares, [0, 0.5, 0, 0.5], atol=0.02)
    assert ceiling_text.verdict(ceiling).startswith("There is something to choose, and it can be read")


def test_noise_looks_like_a_gain_and_the_chance_level_explains_it():
    ceiling = ceiling_of(measured(np.full((200, 4), [0.5, 0.5, 0.52, 0.5]), 0.05))
    oracle, chance, across = (ceiling.row(name) for name in (ORACLE, CHANCE, ACROSS))
    assert oracle.gain_low > 0.02
    assert chance.gain == pytest.approx(oracle.gain, rel=0.15)
    assert across.gain_low < 0.005
    assert ceiling.row(GATE).gain_low <= 0
    assert ceiling.row(FIXED_CROSS).gain <= 0
    assert ceiling_text.verdict(ceiling) == "There is nothing to choose: train with layer_selection fixed:3."
    assert "(3)" in ceiling_text.sentence(ceiling)


def test_a_choice_that_states_do_not_tell():
    signal, _, _ = of_kinds()
    ceiling = ceiling_of(measured(signal, 0.02))
    assert ceiling.row(ACROSS).gain_low > 0.05
    assert ceiling.row(GATE).gain_low <= 0
    assert "160 queries do not show" in ceiling_text.verdict(ceiling)


def test_what_holds_the_last_layer_is_advised_by_name():
    ceiling = ceiling_of(measured(np.full((40, 4), [0.2, 0.3, 0.4, 0.5])))
    assert ceiling.row(ORACLE).gain == ceiling.row(CHANCE).gain == ceiling.row(GATE).gain == 0
    assert ceiling_text.verdict(ceiling).endswith("layer_selection last.")


def test_a_last_layer_that_is_no_candidate():
    others = {"rules": {"last": np.full((2, 40), 0.9), "soft": np.full((2, 40), 0.6)}}
    ceiling = ceiling_of(measured(np.full((40, 4), [0.2, 0.3, 0.4, 0.5]), **others))
    assert ceiling.row(LAST).gain == pytest.approx(0.4)
    assert ceiling.row("layer rule soft", "map").gIoU == pytest.approx(0.6)
    assert ceiling_text.verdict(ceiling).endswith("layer_selection fixed:4.")


def test_the_best_map_reward_and_its_rank_correlation():
    rng = np.random.default_rng(0)
    ious = rng.random((40, 4))
    ious[:3] = 0.5
    by_layer = np.tile(np.argsort(np.argsort(ious.mean(0))), (40, 1)) * 1.0
    ceiling = ceiling_of(measured(ious, rewards={"dice": -ious, "iou": ious**3, "bce": by_layer}))
    opposite, same, of_layers = ceiling.agreements
    assert opposite.beyond_layers == pytest.approx(-1)
    assert same.beyond_layers > 0.8
    assert of_layers.within_queries > 0
    assert np.isnan(of_layers.beyond_layers)  # it sees nothing beside the layer
    assert (opposite.reward, opposite.left_out) == ("dice", 3)
    assert (opposite.within_queries, opposite.within_layers) == pytest.approx((-1, -1))
    assert (same.within_queries, same.low, same.high, same.within_layers) == pytest.approx((1, 1, 1, 1))
    assert ceiling.row("best map reward, dice").gIoU == pytest.approx(ious.min(1).mean())
    assert ceiling.row("best map reward, iou").gIoU == pytest.approx(ceiling.row(ORACLE).gIoU)


def test_the_checkpoints_policy():
    ious = np.tile([0.2, 0.4, 0.6, 0.8], (20, 1))
    policy = np.tile([0.4, 0.0, 0.35, 0.25], (20, 1))
    ceiling = ceiling_of(measured(ious, policy=policy))
    assert ceiling.row(OWN).gIoU == pytest.approx(0.49)
    assert ceiling.row(OWN_MODE).gIoU == pytest.approx(0.2)
    assert ceiling.row(OWN).layers == "1 40%, 3 35%, 4 25%"
    assert not ceiling_of(measured(ious)).has(OWN)


def test_answers_without_seg_lower_all_layers_alike():
    signal, states, _ = of_kinds()
    signal[:20], states[:20] = 0, 0
    data = measured(signal, 0.0, states, rewards={"both": np.where(signal > 0, signal, np.nan)})
    ceiling = ceiling_of(data)
    assert np.count_nonzero(~data.answered) == 20
    assert ceiling.row(ORACLE).gIoU == pytest.approx(ceiling.row("best map reward, both").gIoU)
    assert ceiling.row(GATE).gain > 0.07
    assert ceiling.agreements[0].left_out == 20
    assert "(20 here)" in ceiling_text.caption(data, ceiling, "generate")
    nothing = dataclasses.replace(data, mask=0 * signal, map=0 * signal, halves=0 * data.halves, states=0 * states)
    ceiling = ceiling_of(nothing)
    assert ceiling.agreements[0].left_out == 160
    assert ceiling.row(ORACLE).gIoU == 0
    assert np.isnan(ceiling_text.layer_rows(nothing, ceiling)[0]["reward_both"])


def test_a_target_in_one_half_only_has_no_chance_level():
    data = measured(np.random.default_rng(0).random((40, 4)))
    data.halves[0, :5] = np.nan
    ceiling = ceiling_of(data)
    assert [ceiling.row(name).queries for name in (ORACLE, CHANCE, ACROSS)] == [40, 35, 35]
    assert np.isfinite([ceiling.row(CHANCE).gain, ceiling.row(ACROSS).gain_high]).all()


@pytest.mark.parametrize("count", [6, 0])
def test_too_few_queries(count):
    with pytest.raises(ValueError, match=f"{count} quer.* raise --limit"):
        ceiling_of(measured(np.zeros((count, 4))))


# -- parts -------------------------------------------------------------------------------------------------------------


def test_ridge_equals_its_primal_form():
    rng = np.random.default_rng(0)
    known, new, targets = rng.normal(size=(2, 12, 3)), rng.normal(size=(2, 5, 3)), rng.normal(size=(12, 2))
    kernels = known @ known.transpose(0, 2, 1), known @ new.transpose(0, 2, 1)
    predicted = ridge(*kernels, targets, [np.inf, 0.3])
    np.testing.assert_allclose(predicted[0], np.broadcast_to(targets.mean(0), (5, 2)))
    for layer in range(2):
        centered = known[layer] - known[layer].mean(0)
        penalty = 0.3 * np.square(centered).sum() / 12
        y = targets[:, layer] - targets[:, layer].mean()
        weights = np.linalg.solve(centered.T @ centered + penalty * np.eye(3), centered.T @ y)
        expected = (new[layer] - known[layer].mean(0)) @ weights + targets[:, layer].mean()
        np.testing.assert_allclose(predicted[1, :, layer], expected)


def test_an_image_is_never_in_both_halves():
    images, seen = np.arange(30) // 3, []

    def fit(train):
        seen.append(train)
        return np.where(train[:, None], np.nan, [[1.0, 0.0]])

    assert (cross_fitted(images, fit)[:, 0] == 1).all()
    for train in seen:
        assert not set(images[train]) & set(images[~train])


def test_equally_good_layers_share():
    np.testing.assert_array_equal(best(np.array([[1.0, 3, 3], [0, 0, 0]])), [[0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3]])


def test_correlations_agree_with_scipy():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 4, (6, 9)).astype(float), rng.random((6, 9))
    first[0], second[1, 3] = 1, np.nan
    found = correlations(first, second)
    assert np.isnan(found[:2]).all()
    expected = [spearmanr(a, b).statistic for a, b in zip(first[2:], second[2:])]
    np.testing.assert_allclose(found[2:], expected)


def test_the_interval_resamples_images():
    values = np.random.default_rng(0).random(50)
    narrow, wide = interval_of(values, np.arange(50)), interval_of(np.repeat(values, 4), np.repeat(np.arange(50), 4))
    assert wide == pytest.approx(narrow)
    assert interval_of(np.array([0.5, np.nan]), np.arange(2)) == pytest.approx((np.nan, np.nan), nan_ok=True)


@pytest.mark.parametrize("side", [2, 10, 60])
def test_both_halves_see_the_target(side):
    truth = np.zeros((100, 90), np.uint8)
    truth[7 : 7 + side, 13 : 13 + side] = 1
    half = checkerboard(truth)
    assert half[truth == 1].mean() == pytest.approx(0.5, abs=0.13)
    assert np.array_equal(np.unique(np.diff(np.flatnonzero(np.diff(half[0])))), [max(1, round(side / 4))])


def test_kinds_are_families_where_there_are_any():
    metas = [{"length": "long", "family": "a", "targets": 1}, {"length": "short", "targets": 1}]
    assert kinds_of(metas).tolist() == ["a", "other"]
    assert kinds_of([meta | {"family": "a"} for meta in metas]).tolist() == ["long", "short"]
    assert kinds_of([{}, {}]).tolist() == ["all", "all"]
