"""The pass over a split behind the ceiling: one language pass per image, one mask decode per candidate layer.

Targets that are present are scored alone, and by the decoded mask even if the answer rejects them. A forced layer is
that of all [SEG] of an answer. An answer without [SEG] has IoU 0 in all layers.

Legend: Q queries with a target, C candidate layers, R layer rules, L layers, D hidden size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.nn.functional import rms_norm
from tqdm import tqdm

from model.grounding import GroundingModel
from model.objective import MAP_REWARDS
from model.structures import IGNORE_PIXEL, EvalQuery, EvalSample
from utils.datasets.base import EvalDataset
from utils.evaluation import metrics
from utils.evaluation.benchmarks import Benchmark, benchmark_of
from utils.evaluation.ceiling import Measured, checkerboard, kinds_of
from utils.evaluation.layer_analysis import LayerAnalyzer, LayerProbe, threshold_ious
from utils.evaluation.predictions import QueryPrediction, score


@dataclass
class Measurement:
    """One query of ``Measured``.

    Attributes:
        ious: [4, C + R], rows as in ``ious_of``; with each candidate layer forced, then by each rule.
        rewards: kind -> [L]; policy: [L]; states: [L, D].
    """

    image: int
    meta: dict[str, Any]
    ious: np.ndarray
    rewards: dict[str, np.ndarray]
    policy: np.ndarray
    states: np.ndarray


def check_benchmark(benchmark: Benchmark) -> None:
    """Checks that a query has one mask.

    Raises:
        ValueError: for a benchmark that matches several masks to several targets.
    """
    if benchmark.task == "instances":
        raise ValueError(
            f"{benchmark.name} matches several masks to several targets; the ceiling compares one mask per query: "
            "take another benchmark"
        )


def rules_of(model: GroundingModel, requested: str | None) -> list[str]:
    """The layer rules to measure beside the candidate layers.

    The last layer if it is no candidate; the requested rule, or the model's own if its gate is trained, unless the
    table has it anyway.

    Raises:
        ValueError: if the requested rule is unknown, or its layer does not exist.
    """
    config = model.config
    own = str(config.layer_rule(requested))
    rules = [] if config.num_layers - 1 in config.candidates else ["last"]
    has_row = own in ("last", "argmax" if is_trained(model) else "", *(f"fixed:{layer}" for layer in config.candidates))
    return rules if has_row or not (requested or is_trained(model)) else [*rules, own]


def is_trained(model: GroundingModel) -> bool:
    """Whether the gate has learned; it starts at zero, where the policy is uniform."""
    return bool(model.ppm.gate.any())


def measure(
    analyzer: LayerAnalyzer,
    dataset: EvalDataset,
    rules: Sequence[str] = (),
    limit: int | None = None,
    progress: bool = False,
) -> Measured:
    """Measures the first ``limit`` images of a split.

    Raises:
        ValueError: for a benchmark that matches several masks to several targets.
    """
    benchmark, model, measurements = benchmark_of(dataset.spec), analyzer.model, list[Measurement]()
    check_benchmark(benchmark)
    size, layers = min(len(dataset), limit or len(dataset)), list(model.config.candidates)
    title = f"{dataset.spec}, {len(layers)} candidate layers"
    with tqdm(total=size, desc=title, unit="image", disable=None if progress else True) as bar:
        for start in range(0, size, analyzer.batch_size):
            indices = range(start, min(size, start + analyzer.batch_size))
            probe = LayerProbe(analyzer, indices, [dataset[index] for index in indices], benchmark)
            measurements += measure_batch(probe, [*(f"fixed:{layer}" for layer in layers), *rules])
            bar.update(len(indices))
    return gathered(measurements, layers, rules, is_trained(model))


def measure_batch(probe: LayerProbe, rules: Sequence[str]) -> list[Measurement]:
    """The queries of a batch that have a target."""
    ious: dict[tuple[int, int], list[np.ndarray]] = defaultdict(list)
    for rule in rules:
        for b, answers in enumerate(probe.predict(rule)):
            index, sample = probe.indices[b], probe.samples[b]
            for k, answer in enumerate(answers):
                if sample.queries[k].is_present:
                    ious[b, k].append(ious_of(index, sample, sample.queries[k], answer, probe.benchmark))
    result = []
    for (b, k), columns in ious.items():
        query, (policy, grid), states = probe.samples[b].queries[k], probe.policy_and_maps(b, k), probe.states(b, k)
        rewards = probe.analyzer.map_rewards(query, grid)
        count = max(1, len(grid))  # the mean over the [SEG]; 0 without any
        result.append(
            Measurement(
                probe.indices[b],
                query.meta,
                np.stack(columns, 1),
                {kind: values.sum(0) / (len(grid) or np.nan) for kind, values in rewards.items()},
                (policy.sum(0) / count).numpy(),
                (rms_norm(states, states.shape[-1:]).sum(0) / count).numpy(),
            )
        )
    return result


def ious_of(
    index: int, sample: EvalSample, query: EvalQuery, answer: QueryPrediction, benchmark: Benchmark
) -> np.ndarray:
    """[4] IoU: of the mask, of the map at its best threshold, of the mask on both halves of the pixels.

    On a half that holds nothing of the target it is NaN.
    """
    record = score(index, sample, query, replace(answer, rejected=False), benchmark)
    truth = metrics.merge_targets(query.masks, *sample.image.shape[:2])
    of_map = threshold_ious(answer.similarities.max(0), truth).max() if answer.layers else 0.0
    of_halves, half = [], checkerboard(truth)
    for outside in (half, ~half):
        part = np.where(outside, IGNORE_PIXEL, truth)
        intersection, union, _, true = metrics.count_pixels(answer.merged, part)
        of_halves.append(intersection / union if true else np.nan)
    return np.array([metrics.iou(record, benchmark.protocol()), of_map, *of_halves])


def gathered(
    measurements: Sequence[Measurement], layers: Sequence[int], rules: Sequence[str], trained: bool
) -> Measured:
    """The measurements of a split as arrays. trained: whether the policy is worth a row."""
    chosen = list(layers)
    ious = np.array([each.ious for each in measurements]).reshape(-1, 4, len(layers) + len(rules))
    mask, of_map, *halves = ious[..., : len(layers)].transpose(1, 0, 2)
    return Measured(
        layers=chosen,
        images=np.array([each.image for each in measurements], np.int64),
        kinds=kinds_of([each.meta for each in measurements]),
        mask=mask,
        map=of_map,
        halves=np.array(halves),
        rewards={kind: np.array([each.rewards[kind][chosen] for each in measurements]) for kind in MAP_REWARDS},
        states=np.array([each.states[chosen] for each in measurements], np.float32),
        policy=np.array([each.policy[chosen] for each in measurements]) if trained else None,
        rules={rule: ious[:, :2, len(layers) + n].T for n, rule in enumerate(rules)},
    )
