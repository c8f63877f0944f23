"""The ceiling: what a policy over layers can gain at most, from the IoU of each query with each candidate layer forced.

Every way to choose a layer is a matrix of weights [Q, C], whose rows sum to 1: a fixed layer, a uniform policy, a gate,
the oracle. Its value for a query is the expected IoU. All gains are over the best fixed layer on the same queries.

A choice that is fitted to the queries it is measured on looks better than it is. Rows named "cross-fitted" are chosen
on one half of the images and measured on the other, both ways, in the mean of several halvings. Intervals are
bootstraps over images with the fitted choices held.

Legend: Q queries with a target, C candidate layers, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import rankdata

from utils.evaluation.metrics import GROUP_KEYS, percentiles, resampled_images
from utils.wording import counted

LEAST_QUERIES, LEAST_IMAGES = 8, 4
HALVINGS = 10  # random halvings of the images, of which cross-fitted rows are the mean
FOLDS = 5  # of the images of a half, to choose the gate's penalty
MOST_FITTED = 400  # queries of a half that the gate is fitted to: time grows with the cube
PENALTIES = (np.inf, *10.0 ** np.arange(3, -3, -1))  # of the ridge, times the kernel's mean eigenvalue
BLOCKS = 4  # blocks of the checkerboard along the side of a square of the target's area

LAST, FIXED, FIXED_CROSS = "last layer", "best fixed layer", "best fixed layer, cross-fitted"
UNIFORM, OWN, OWN_MODE = "uniform policy", "own policy, expected", "own policy, mode"
KIND, KIND_CROSS = "best layer per kind", "best layer per kind, cross-fitted"
GATE = "gate on states, cross-fitted"
ORACLE, CHANCE, ACROSS = "oracle", "oracle's chance level", "oracle across pixel halves"
REWARD = "best map reward, {}"
RULE = "layer rule {}"


@dataclass
class Measured:
    """IoU, rewards and states of Q queries in C candidate layers.

    Attributes:
        layers: [C] candidate layers.
        images: [Q] index of each query's image.
        kinds: [Q] kind of each query; all equal without kinds.
        mask: [Q, C] IoU of the mask with the layer forced.
        map: [Q, C] IoU of the layer's map at its best threshold (M_IoU).
        halves: [2, Q, C] IoU of the mask on either half of the pixels (``checkerboard``); NaN where a half holds
            nothing of the target.
        rewards: kind of map reward -> [Q, C]; NaN for an answer without [SEG].
        states: [Q, C, D] of the [SEG] (the mean over several), scaled to a root mean square of 1; 0 without [SEG].
        policy: [Q, C] of the checkpoint; None if its gate is untrained.
        rules: layer rule -> [2, Q], IoU of mask and map of the answers that it gives.
    """

    layers: list[int]
    images: np.ndarray
    kinds: np.ndarray
    mask: np.ndarray
    map: np.ndarray
    halves: np.ndarray
    rewards: dict[str, np.ndarray]
    states: np.ndarray
    policy: np.ndarray | None = None
    rules: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def answered(self) -> np.ndarray:
        """[Q] bool, whether the answer has a [SEG]; without one, IoU is 0 in all layers."""
        return np.any(self.states, axis=(1, 2))

    def check(self) -> None:
        """Checks that there is enough to halve.

        Raises:
            ValueError: for too few queries or images.
        """
        images = len(np.unique(self.images))
        if len(self.images) < LEAST_QUERIES or images < LEAST_IMAGES:
            raise ValueError(
                f"{counted(len(self.images), 'query', 'queries')} with a target in {counted(images, 'image')}; the "
                f"ceiling needs at least {LEAST_QUERIES} in {LEAST_IMAGES}: raise --limit or take another split"
            )


@dataclass(frozen=True)
class Row:
    """A way to choose layers, with its 95% intervals, in gIoU.

    Attributes:
        on: what is scored, ``mask`` or ``map``.
        layers: the layers that it uses most, with their shares; empty if it is no choice.
        queries: that are scored; those of ``CHANCE`` and ``ACROSS`` have a target in both halves.
        gain: over the best fixed layer, paired (for ``ACROSS``: measured on the same halves).
    """

    name: str
    on: str
    layers: str
    queries: int
    gIoU: float
    low: float
    high: float
    gain: float
    gain_low: float
    gain_high: float


@dataclass(frozen=True)
class Agreement:
    """Rank correlation (Spearman) of a map reward with the mask's IoU.

    Attributes:
        reward: its kind.
        within_queries, low, high: over the layers of a query, the mean over queries: does it find the better layer?
        left_out: queries whose IoUs or rewards are equal in all layers.
        beyond_layers, beyond_low, beyond_high: the same after subtracting each layer's mean over queries: does it find
            what a query prefers beside the layer that is best for all?
        within_layers: over the queries of a layer, the mean over layers: does it find the better query?
    """

    reward: str
    within_queries: float
    low: float
    high: float
    left_out: int
    beyond_layers: float
    beyond_low: float
    beyond_high: float
    within_layers: float


@dataclass(frozen=True)
class Ceiling:
    """What a policy over ``layers`` can gain.

    Attributes:
        rows: of the table, on masks and on maps.
        shares: [C] of the queries that each layer is best for; equally good layers share a query.
    """

    layers: list[int]
    rows: list[Row]
    agreements: list[Agreement]
    shares: np.ndarray

    def row(self, name: str, on: str = "mask") -> Row:
        return next(row for row in self.rows if (row.name, row.on) == (name, on))

    def has(self, name: str, on: str = "mask") -> bool:
        return any((row.name, row.on) == (name, on) for row in self.rows)


def ceiling_of(measured: Measured) -> Ceiling:
    """All rows of the table.

    Raises:
        ValueError: for fewer than 8 queries or 4 images.
    """
    measured.check()
    table, ious = Table(measured), measured.mask
    for on in ("mask", "map"):
        table.add_choices(on)
    gate = cross_fitted(measured.images, lambda train: gate_choice(measured, train))
    table.add(GATE, "mask", gate)
    table.add(ORACLE, "mask", best(ious))
    table.add(ORACLE, "map", best(measured.map))
    fixed = table.fixed["mask"]
    table.add_values(CHANCE, "mask", chance_level(ious, measured.halves, fixed), ious[:, fixed])
    table.add_values(ACROSS, "mask", across_halves(measured.halves), measured.halves[:, :, fixed].mean(0))
    for kind, rewards in measured.rewards.items():
        for on in ("mask", "map"):
            table.add(REWARD.format(kind), on, best(rewards))
    agreements = [agreement(kind, rewards, measured) for kind, rewards in measured.rewards.items()]
    return Ceiling(measured.layers, table.rows, agreements, best(ious).mean(0))


class Table:
    """Collects the rows."""

    def __init__(self, measured: Measured) -> None:
        self.measured, self.rows = measured, list[Row]()
        self.ious = {"mask": measured.mask, "map": measured.map}
        self.fixed = {on: int(ious.mean(0).argmax()) for on, ious in self.ious.items()}

    def add(self, name: str, on: str, weights: np.ndarray) -> None:
        """Adds a choice, given as weights [Q, C] or [1, C]."""
        ious = self.ious[on]
        values = (weights * ious).sum(1)
        self.add_values(name, on, values, ious[:, self.fixed[on]], self._shares(weights))

    def add_values(self, name: str, on: str, values: np.ndarray, reference: np.ndarray, layers: str = "") -> None:
        """Adds [Q] expected IoUs; those that are NaN are left out. reference: [Q], of the best fixed layer."""
        images, kept = self.measured.images, int(np.count_nonzero(~np.isnan(values)))
        gains = values - reference
        (low, high), (gain_low, gain_high) = interval_of(values, images), interval_of(gains, images)
        row = Row(name, on, layers, kept, _mean(values), low, high, _mean(gains), gain_low, gain_high)
        self.rows.append(row)

    def add_choices(self, on: str) -> None:
        """Adds the rows that a table of IoUs alone gives."""
        measured, ious, position = self.measured, self.ious[on], ("mask", "map").index(on)
        one_hot = np.eye(len(measured.layers))[:, None]
        reference = ious[:, self.fixed[on]]
        if "last" in measured.rules:  # the last layer is no candidate
            self.add_values(LAST, on, measured.rules["last"][position], reference)
        else:
            self.add(LAST, on, one_hot[-1])
        self.add(FIXED, on, one_hot[self.fixed[on]])
        self.add(FIXED_CROSS, on, cross_fitted(measured.images, lambda train: best(ious[train].mean(0)[None])))
        self.add(UNIFORM, on, np.full((1, len(measured.layers)), 1 / len(measured.layers)))
        if measured.policy is not None:
            self.add(OWN, on, measured.policy)
            self.add(OWN_MODE, on, best(measured.policy))
        for rule, values in measured.rules.items():
            if rule != "last":
                self.add_values(RULE.format(rule), on, values[position], reference)
        if len(set(measured.kinds)) > 1:
            self.add(KIND, on, kind_choice(ious, measured.kinds))
            self.add(
                KIND_CROSS,
                on,
                cross_fitted(measured.images, lambda train: kind_choice(ious, measured.kinds, train)),
            )

    def _shares(self, weights: np.ndarray) -> str:
        """``7``, ``7 82%, 8 12%`` or ``all``: the layers that are used most."""
        shares = weights.mean(0)
        if len(shares) > 1 and np.allclose(shares, shares[0]):
            return "all"
        order = np.argsort(-shares, kind="stable")[:3]
        if shares[order[0]] > 0.9999:
            return str(self.measured.layers[order[0]])
        return ", ".join(f"{self.measured.layers[c]} {shares[c]:.0%}" for c in order if shares[c] >= 0.005)


# -- statistics --------------------------------------------------------------------------------------------------------


def interval_of(values: np.ndarray, images: np.ndarray) -> tuple[float, float]:
    """95% bootstrap over images of the mean of [Q] values, without those that are NaN."""
    kept = ~np.isnan(values)
    names, positions = np.unique(images[kept], return_inverse=True)
    if len(names) < 2:
        return np.nan, np.nan
    sums, sizes = np.bincount(positions, values[kept]), np.bincount(positions)
    draws = resampled_images(len(names))
    low, high = percentiles((draws @ sums) / (draws @ sizes))
    return low, high


def correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """[n] Spearman correlations of the rows of two tables [n, m]; NaN where a row is constant or has a NaN."""
    known = ~np.isnan(first).any(1) & ~np.isnan(second).any(1)
    ranks = [rankdata(np.where(known[:, None], table, 0), axis=1) for table in (first, second)]
    a, b = (rank - rank.mean(1, keepdims=True) for rank in ranks)
    norm = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return np.divide((a * b).sum(1), norm, out=np.full(len(a), np.nan), where=norm > 0)


def agreement(kind: str, rewards: np.ndarray, measured: Measured) -> Agreement:
    """Rank correlation of a reward [Q, C] with the masks' IoU."""
    within = correlations(rewards, measured.mask)
    known = ~np.isnan(within)
    if not known.any():
        nan = np.nan
        return Agreement(kind, nan, nan, nan, len(known), nan, nan, nan, nan)
    rewards, ious, images, within = rewards[known], measured.mask[known], measured.images[known], within[known]
    beyond = correlations(rewards - rewards.mean(0), ious - ious.mean(0))
    by_layer = correlations(rewards.T, ious.T)
    (low, high), (beyond_low, beyond_high) = interval_of(within, images), interval_of(beyond, images)
    left_out = int(np.count_nonzero(~known))
    return Agreement(kind, _mean(within), low, high, left_out, _mean(beyond), beyond_low, beyond_high, _mean(by_layer))


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else np.nan


# -- choices -----------------------------------------------------------------------------------------------------------


def best(scores: np.ndarray) -> np.ndarray:
    """Weights [Q, C] of the best of each row of scores [Q, C]; equal ones share. All share in a row with NaN."""
    is_best = (scores == scores.max(1, keepdims=True)) | np.isnan(scores).any(1, keepdims=True)
    return is_best / is_best.sum(1, keepdims=True)


def kind_choice(ious: np.ndarray, kinds: np.ndarray, train: np.ndarray | None = None) -> np.ndarray:
    """Weights [Q, C] of the best layer of each query's kind, chosen on the queries ``train`` [Q] (None = all).

    A kind without any query in ``train`` takes the best fixed layer.
    """
    train = np.ones(len(ious), bool) if train is None else train
    weights = np.zeros(ious.shape)
    for kind in np.unique(kinds):
        own = train & (kinds == kind)
        weights[kinds == kind] = best(ious[own if own.any() else train].mean(0)[None])
    return weights


def cross_fitted(images: np.ndarray, fit: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Weights [Q, C] chosen on one half of the images for the other, both ways; the mean over ``HALVINGS`` halvings.

    Args:
        images: [Q].
        fit: queries to choose on, bool [Q] -> weights [Q, C] or [1, C] of all queries.
    """
    names, positions = np.unique(images, return_inverse=True)
    generator, chosen = np.random.default_rng(0), []
    for _ in range(HALVINGS):
        half = (generator.permutation(len(names)) < len(names) // 2)[positions]
        chosen.append(np.where(half[:, None], fit(~half), fit(half)))
    return np.mean(chosen, axis=0)


def gate_choice(measured: Measured, train: np.ndarray) -> np.ndarray:
    """Weights [Q, C] of a gate fitted to the queries ``train`` [Q].

    The gate has the form of Eq. 4: the score of a layer is linear in the [SEG] state of this layer. It is a ridge
    regression per layer of the IoU, less the query's mean over layers. The intercept is free, so that an infinite
    penalty gives the best fixed layer. Unlike in Eq. 4, states are scaled to a root mean square of 1: the scale of
    LLaMA's states grows with depth.

    One penalty for all layers is chosen by cross-validation over images: the largest of those whose IoU is within one
    standard error of the best (Breiman et al. 1984), since a gate that follows noise loses against a fixed layer.
    """
    generator = np.random.default_rng(0)
    fitted = np.flatnonzero(train & measured.answered)
    fitted = np.sort(generator.permutation(fitted)[:MOST_FITTED])
    if not len(fitted):
        return best(measured.mask[train].mean(0)[None])
    targets = (measured.mask - measured.mask.mean(1, keepdims=True))[fitted]
    states = measured.states.transpose(1, 2, 0)  # [C, D, Q]
    kernel = states[:, :, fitted].transpose(0, 2, 1) @ states / states.shape[1]  # [C, n, Q]
    own = kernel[:, :, fitted]
    names, positions = np.unique(measured.images[fitted], return_inverse=True)
    folds = (generator.permutation(len(names)) % FOLDS)[positions]
    values = np.zeros((len(PENALTIES), len(fitted)))  # IoU of the layers that a fit to the other folds chooses
    for fold in np.unique(folds) if len(names) > 1 else ():
        inside, outside = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        scores = ridge(own[:, inside][:, :, inside], own[:, inside][:, :, outside], targets[inside])
        weights = np.stack([best(score) for score in scores])
        values[:, outside] = (weights * measured.mask[fitted[outside]]).sum(2)
    behind = values[values.mean(1).argmax()] - values  # paired
    error = behind.std(1) / len(fitted) ** 0.5
    penalty = PENALTIES[int(np.argmax(behind.mean(1) <= error))]  # the first, PENALTIES descend
    return best(ridge(own, kernel, targets, [penalty])[0])


def ridge(
    kernel: np.ndarray, others: np.ndarray, targets: np.ndarray, penalties: Sequence[float] = PENALTIES
) -> np.ndarray:
    """Kernel ridge regression with a free intercept, for all layers and penalties at once: predictions [R, m, C].

    Args:
        kernel: [C, n, n] inner products of the n fitted queries; others: [C, n, m] with those to predict.
        targets: [n, C]; penalties: [R], times the mean eigenvalue of the centered kernel.
    """
    kernel, others = kernel.astype(np.float64), others.astype(np.float64)
    means = kernel.mean(2, keepdims=True)
    others = others - means - (others - means).mean(1, keepdims=True)
    kernel = kernel - means - (kernel - means).mean(1, keepdims=True)
    values, vectors = np.linalg.eigh(kernel)  # [C, n], [C, n, n]
    values = values.clip(0)
    scale = values.mean(1, keepdims=True).clip(1e-12)
    intercept = targets.mean(0)
    rotated = np.einsum("cnk,nc->ck", vectors, targets - intercept)
    projected = vectors.transpose(0, 2, 1) @ others  # [C, n, m]
    result = [np.einsum("ck,ckm->mc", rotated / (values + penalty * scale), projected) for penalty in penalties]
    return np.stack(result) + intercept


# -- chance ------------------------------------------------------------------------------------------------------------


def checkerboard(truth: np.ndarray) -> np.ndarray:
    """[H, W] bool: one of two halves of the pixels, in blocks like a checkerboard's.

    The halves are two measurements of the same mask. Blocks grow with the target, so that both halves see its parts and
    its surroundings, whatever its size: with blocks of a fixed size a small target would lie in one half. Single pixels
    would not do: errors are patches, of which both halves would have the same share.

    Args:
        truth: [H, W], 1 = target.
    """
    side = max(1, round(np.count_nonzero(truth == 1) ** 0.5 / BLOCKS))
    rows, columns = (np.arange(length) // side for length in truth.shape)
    return (rows[:, None] + columns) % 2 == 0


def chance_level(ious: np.ndarray, halves: np.ndarray, fixed: int) -> np.ndarray:
    """[Q] what the oracle would reach if no query preferred a layer; NaN without halves.

    The IoU of a query would then be its own level, plus the layer's effect on all queries, plus noise. Half of the
    difference of the two halves has the noise's variance: a half has twice the variance of the whole. Its sign is
    arbitrary, so the mean over both is taken.

    Only the noise of pixels shows in the halves. That a layer finds another object by luck is no noise here, but
    part of the oracle's gain; whether such luck can be foreseen, the gate tells.

    Args:
        ious: [Q, C]; halves: [2, Q, C].
        fixed: position of the best fixed layer, above whose IoU chance lifts the maximum.
    """
    noise = (halves[0] - halves[1]) / 2
    noise -= noise.mean(1, keepdims=True)
    effect = ious.mean(0) - ious[:, fixed].mean()
    lift = np.mean([(effect + sign * noise).max(1) for sign in (1, -1)], axis=0)
    return ious[:, fixed] + lift


def across_halves(halves: np.ndarray) -> np.ndarray:
    """[Q] IoU, on one half of the pixels, of the layer that is best on the other; the mean of both ways.

    Args:
        halves: [2, Q, C].
    """
    values = [(best(chosen) * measured).sum(1) for chosen, measured in (halves, halves[::-1])]
    return np.mean(values, axis=0)


# -- kinds -------------------------------------------------------------------------------------------------------------


def kinds_of(metas: Sequence[dict[str, Any]]) -> np.ndarray:
    """[Q] kinds by the first key of the queries' meta that tells some apart (``family`` first); else all "all"."""
    for key in sorted(GROUP_KEYS, key=lambda key: key != "family"):
        kinds = np.array([str(meta.get(key, "other")) for meta in metas])
        if len(set(kinds)) > 1:
            return kinds
    return np.full(len(metas), "all")
