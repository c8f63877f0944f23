"""Per-layer analysis of a model on a split: masks with each layer forced, similarity maps, the policy.

Each image passes LLaVA and SAM's encoder once; each layer, and each combination of prompts, then costs one mask decode.
Questions and scores are those of ``utils.evaluation.predictions``, so numbers equal test.py's with ``--layer K``.

Legend: N [SEG] tokens of a query, L hidden states (0 = embeddings), h x w cells of a map, H x W the image's size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from model.decoders.segment_anything import SegmentAnything
from model.geometry import maps_at
from model.grounding import GroundingModel, LanguagePass
from model.objective import MAP_REWARDS
from model.opened import with_text
from model.structures import EvalQuery, EvalSample, Prediction, Prompts
from utils.datasets.base import EvalDataset
from utils.evaluation import metrics
from utils.evaluation.benchmarks import IOU, Benchmark, benchmark_of
from utils.evaluation.metrics import Record
from utils.evaluation.predictions import InferenceOptions, QueryPrediction, by_query, score, turns_of

THRESHOLDS = (np.arange(1, 100) / 100).astype(np.float32)  # for M_IoU: 0.01 to 0.99
LAYER_ROWS = ("chosen", "last")  # layers of Table 2: the policy's choice, and the last one, as in earlier work
TABLE_2_COLUMNS = ("M_prompt", "M_IoU", "SEG_prompt")


@dataclass
class SegToken:
    """One [SEG]: policy [L], and losses [L] of its maps against the soft ground truth (NaN for an absent target)."""

    policy: np.ndarray
    map_loss: np.ndarray

    @property
    def entropy(self) -> float:
        """Of the policy, in nats."""
        p = self.policy[self.policy > 0].astype(np.float64)
        return float(-(p * np.log(p)).sum())


@dataclass
class Study:
    """The analysis of a checkpoint on a split.

    Attributes:
        records: the model's own answers (layers chosen by its rule), in the split's order.
        tokens: the [SEG] tokens of each answer.
        by_layer: [L] lists of answers with that layer forced.
        maps_by_layer: [L] lists of M_IoU answers, the layer's map at its best threshold; present targets only.
        table: (column, row) of Table 2 -> answers; present targets only. No M_prompt of PixelLM's decoder.
    """

    benchmark: Benchmark
    records: list[Record] = field(default_factory=list)
    tokens: list[list[SegToken]] = field(default_factory=list)
    by_layer: list[list[Record]] = field(default_factory=list)
    maps_by_layer: list[list[Record]] = field(default_factory=list)
    table: dict[tuple[str, str], list[Record]] = field(default_factory=lambda: defaultdict(list))

    @property
    def num_layers(self) -> int:
        return len(self.by_layer)

    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        """gIoU and cIoU, under these names; absent if the benchmark has no such metric."""
        values = metrics.compute(records, self.benchmark)
        names = {formula.removesuffix(" of targets"): name for name, formula in self.benchmark.metrics.items()}
        return {formula: values[names[formula]] for formula in IOU if names.get(formula) in values}

    def map_loss(self) -> np.ndarray:
        """[L] means over the [SEG] of present targets (Fig. 2b)."""
        losses = np.array([token.map_loss for row in self.tokens for token in row]).reshape(-1, self.num_layers)
        losses = losses[~np.isnan(losses).any(1)]
        return losses.mean(0) if len(losses) else np.full(self.num_layers, np.nan)

    def groups(self) -> dict[tuple[str, str], list[int]]:
        """(key, group) -> indices of its queries: all queries, then by every key of their meta with several values."""
        groups = {("all", self.benchmark.name): list(range(len(self.records)))}
        for key, parts in metrics.groups(self.records).items():
            groups |= {(key, name): indices for name, indices in parts.items()}
        return groups

    def policy(self, indices: Sequence[int]) -> dict[str, Any]:
        """Statistics of the policy on some queries.

        Returns:
            ``segs``: number of [SEG]; ``candidates``: number of candidate layers; ``shares``: [L] of the layers that
            were chosen; ``probability``: [L] mean; ``entropy``: mean in nats.
        """
        tokens = [token for index in indices for token in self.tokens[index]]
        layers = [layer for index in indices for layer in self.records[index].layers]
        count = max(1, len(tokens))
        probability = sum((token.policy for token in tokens), np.zeros(self.num_layers)) / count
        return {
            "segs": len(tokens),
            "candidates": np.count_nonzero(probability),
            "shares": np.bincount(np.array(layers, dtype=int), minlength=self.num_layers) / max(1, len(layers)),
            "probability": probability,
            "entropy": sum(token.entropy for token in tokens) / count,
        }


@dataclass
class QueryView:
    """Everything that the figures of one query show.

    Attributes:
        maps: [L, H, W] in [0, 1], the maximum over its [SEG].
        masks: [L, H, W] bool with each layer forced, the union over its [SEG]; ious: [L] of these.
        policy: [L], the mean over its [SEG].
        record, mask, iou: of the model's own answer.
    """

    image: np.ndarray
    truth: np.ndarray
    record: Record
    maps: np.ndarray
    masks: np.ndarray
    ious: list[float]
    policy: np.ndarray
    mask: np.ndarray
    iou: float


@dataclass
class LayerAnalyzer:
    """A model to analyze, and the options of its predictions.

    Args:
        original_sam: SAM as published, for M_prompt; None = the checkpoint's own, whose decoder is trained.
    """

    model: GroundingModel
    processor: Any
    options: InferenceOptions
    batch_size: int = 4
    original_sam: SegmentAnything | None = None

    def study(self, dataset: EvalDataset, limit: int | None = None, progress: bool = False) -> Study:
        """One pass over a split (its first ``limit`` images)."""
        layers = self.model.ppm.num_layers
        study = Study(
            benchmark_of(dataset.spec),
            by_layer=[[] for _ in range(layers)],
            maps_by_layer=[[] for _ in range(layers)],
        )
        size = min(len(dataset), limit or len(dataset))
        bar = tqdm(
            total=size, desc=f"{dataset.spec}, {layers} layers", unit="image", disable=None if progress else True
        )
        for start in range(0, size, self.batch_size):
            indices = list(range(start, min(size, start + self.batch_size)))
            self._add_batch(study, indices, [dataset[index] for index in indices])
            bar.update(len(indices))
        bar.close()
        return study

    def inspect(self, dataset: EvalDataset, record: Record) -> QueryView:
        """Predicts one query of a study again, and keeps its maps and masks."""
        sample = dataset[record.index]
        k = next(k for k, query in enumerate(sample.queries) if query.query_id == record.query_id)
        query, size = sample.queries[k], sample.image.shape[:2]
        benchmark = benchmark_of(dataset.spec)
        probe = LayerProbe(self, [record.index], [sample], benchmark)
        by_layer = [probe.predict(f"fixed:{layer}")[0][k] for layer in range(self.model.ppm.num_layers)]
        answer = probe.predict(self.options.layer_policy)[0][k]
        policy, grid = probe.policy_and_maps(0, k)
        protocol = benchmark.protocol()
        records = [score(record.index, sample, query, each, benchmark) for each in (*by_layer, answer)]
        *ious, iou = [metrics.iou(each, protocol) for each in records]
        return QueryView(
            image=sample.image,
            truth=metrics.merge_targets(query.masks, *size),
            record=records[-1],
            maps=self.upsample(grid, size).amax(0).numpy() if len(grid) else np.zeros((len(by_layer), *size)),
            masks=np.stack([layer.merged for layer in by_layer]),
            ious=ious,
            iou=iou,
            policy=policy.mean(0).numpy() if len(policy) else np.zeros(len(by_layer)),
            mask=answer.merged,
        )

    def upsample(self, grid: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Upsamples maps [N, L, h, w] to their image's size: [N, L, H, W]."""
        config = self.model.config
        full = maps_at(grid.flatten(0, 1), config.map_fit, size)
        return full.view(*grid.shape[:2], *size)

    def _add_batch(self, study: Study, indices: list[int], samples: list[EvalSample]) -> None:
        """Analyzes a batch of images."""
        probe = LayerProbe(self, indices, samples, study.benchmark)
        for layer, records in enumerate(study.by_layer):
            records += probe.records_of(probe.predict(f"fixed:{layer}"))
        for row, rule in zip(LAYER_ROWS, (self.options.layer_policy, "last")):
            if self.model.config.decoder_kind.has_encoder:  # PixelLM's takes no map without a [SEG]
                by_map = probe.predict(rule, Prompts(seg=False), self.original_sam)
                study.table["M_prompt", row] += probe.records_of(by_map, present=True)
            study.table["SEG_prompt", row] += probe.records_of(probe.predict(rule, Prompts(mask=False)), present=True)
        answers = probe.predict(self.options.layer_policy)
        study.records += probe.records_of(answers)
        for b, sample in enumerate(samples):
            for k, query in enumerate(sample.queries):
                distribution, grid = probe.policy_and_maps(b, k)
                losses = self._map_losses(query, grid)
                study.tokens.append([SegToken(*pair) for pair in zip(distribution.numpy(), losses)])
                if not query.is_present:
                    continue
                m_iou = partial(threshold_map, indices[b], sample, query, answers[b][k], study.benchmark)
                full = self.upsample(grid, sample.image.shape[:2]).numpy()
                of_layers = [m_iou(full[:, layer]) for layer in range(study.num_layers)]
                for records, record in zip(study.maps_by_layer, of_layers):
                    records.append(record)
                study.table["M_IoU", "chosen"].append(m_iou(answers[b][k].similarities))
                study.table["M_IoU", "last"].append(of_layers[-1])

    def _map_losses(self, query: EvalQuery, grid: torch.Tensor) -> np.ndarray:
        """[N, L] losses of a query's maps; NaN unless each [SEG] has a target (all share a single one)."""
        return -self.map_rewards(query, grid)["both"]

    def map_rewards(self, query: EvalQuery, grid: torch.Tensor) -> dict[str, np.ndarray]:
        """Kind -> [N, L] rewards of a query's maps [N, L, h, w]; NaN unless each [SEG] has a target."""
        targets = torch.from_numpy(query.masks)
        if len(targets) == 1:
            targets = targets.expand(len(grid), -1, -1)
        if not len(grid) or len(targets) != len(grid) or not (targets == 1).flatten(1).any(1).all():
            return {kind: np.full(grid.shape[:2], np.nan) for kind in MAP_REWARDS}
        rewards = self.model.objective.map_rewards([targets], [grid])
        return {kind: values.numpy() for kind, values in rewards.items()}


class LayerProbe:
    """The language pass over a batch of images, from which masks are decoded repeatedly."""

    def __init__(
        self, analyzer: LayerAnalyzer, indices: Sequence[int], samples: Sequence[EvalSample], benchmark: Benchmark
    ) -> None:
        self.analyzer, self.indices, self.samples, self.benchmark = analyzer, indices, samples, benchmark
        options, model = analyzer.options, analyzer.model
        self.turns = turns_of(samples, benchmark, options.mode)
        batch = analyzer.processor.prompts([sample.image for sample in samples], self.turns, indices)
        self.language_pass: LanguagePass = model.answer(batch.to(model.device, model.dtype), options.max_new_tokens)
        self.predictions: list[list[Prediction]] = []  # the latest

    def predict(
        self, layer_policy: str, prompts: Prompts | None = None, sam: SegmentAnything | None = None
    ) -> list[list[QueryPrediction]]:
        """[image][query], as ``predict_queries``, for one layer rule and choice of prompts; see ``decode_masks``."""
        options, model = self.analyzer.options, self.analyzer.model
        decoded = model.decode_masks(self.language_pass, layer_policy, options.seed, prompts, sam)
        self.predictions = with_text(decoded, self.analyzer.processor)
        return by_query(self.samples, self.turns, self.predictions, self.benchmark, options.mode)

    def records_of(self, answers: list[list[QueryPrediction]], present: bool = False) -> list[Record]:
        """Records of all queries; with ``present``, of present targets only, and of their masks even if rejected."""
        records = []
        for index, sample, row in zip(self.indices, self.samples, answers, strict=True):
            for query, answer in zip(sample.queries, row, strict=True):
                if not present:
                    records.append(score(index, sample, query, answer, self.benchmark))
                elif query.is_present:
                    records.append(score(index, sample, query, replace(answer, rejected=False), self.benchmark))
        return records

    def policy_and_maps(self, image: int, query: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A query's policy [N, L] and maps of all layers [N, L, h, w], which do not depend on the layer rule."""
        if self.benchmark.is_joint(self.analyzer.options.mode):
            prediction = self.predictions[image][0]
            return prediction.policy[query : query + 1], prediction.layer_maps[query : query + 1]
        prediction = self.predictions[image][query]
        return prediction.policy, prediction.layer_maps

    def states(self, image: int, query: int) -> torch.Tensor:
        """A query's [SEG] states [N, L, D], float32."""
        answers = self.language_pass.answers
        joint = self.benchmark.is_joint(self.analyzer.options.mode)
        segs = [n for n, owner in enumerate(answers.seg_questions) if owner == (image, 0 if joint else query)]
        return answers.states[segs[query : query + 1] if joint else segs].float().cpu()


def threshold_ious(similarity: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """[99] IoU at each of ``THRESHOLDS``; similarity [H, W] in [0, 1], truth [H, W] with 0, 1 and 255 (ignored)."""
    above = np.searchsorted(THRESHOLDS, similarity.astype(np.float32))  # number of thresholds below each pixel
    bins = len(THRESHOLDS) + 1
    true, false = (np.bincount(above[truth == value], minlength=bins)[::-1].cumsum()[::-1][1:] for value in (1, 0))
    return true / np.maximum(1, np.count_nonzero(truth == 1) + false)


def best_threshold(similarity: np.ndarray, truth: np.ndarray) -> float:
    """The lowest of ``THRESHOLDS`` with the largest IoU; arguments as in ``threshold_ious``."""
    return float(THRESHOLDS[threshold_ious(similarity, truth).argmax()])


def threshold_map(
    index: int, sample: EvalSample, query: EvalQuery, answer: QueryPrediction, benchmark: Benchmark, maps: np.ndarray
) -> Record:
    """M_IoU of a query: its maps [N, H, W] at the one threshold that gives their union the largest IoU."""
    threshold = 0.5
    if len(maps):
        truth = metrics.merge_targets(query.masks, *maps.shape[1:])
        threshold = best_threshold(maps.max(0), truth)
    thresholded = replace(answer, logits=maps.astype(np.float32) - np.float32(threshold), rejected=False)
    return score(index, sample, query, thresholded, benchmark)
