"""What every layer of a model does on a split: masks with it forced, similarity maps against the truth, the policy.

LLaVA reads an image once, and SAM's encoder too; then each layer, and each way of prompting, costs a mask decode.
Questions and scores are ``utils.evaluation.predictions``': a figure here is what test.py prints with ``--layer K``.

Legend: N [SEG] tokens of a query, L hidden states (0 = embeddings), P image tokens, H x W the image's size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from model.geometry import maps_at
from model.loading.weights import load_strictly, read_sam
from model.opened import with_text
from model.sam import SegmentAnything
from model.structures import EvalQuery, EvalSample, Prediction, Prompts
from model.UGround import LanguagePass, UGroundForCausalLM
from utils.datasets.base import EvalDataset
from utils.evaluation import metrics
from utils.evaluation.benchmarks import IOU, Benchmark, benchmark_of
from utils.evaluation.metrics import Record
from utils.evaluation.predictions import InferenceOptions, QueryPrediction, by_query, score, turns_of

THRESHOLDS = (np.arange(1, 100) / 100).astype(np.float32)  # of M_IoU: 0.01 to 0.99
ROWS = ("chosen", "last")  # layers of Table 2: the policy's, and what earlier work reads
COLUMNS = ("M_prompt", "M_IoU", "SEG_prompt")  # of Table 2


@dataclass
class Token:
    """One [SEG]: [L] policy, and [L] its maps' losses against the soft truth (NaN where nothing is there)."""

    policy: np.ndarray
    map_loss: np.ndarray

    @property
    def entropy(self) -> float:
        """Of the policy, in nats."""
        likely = self.policy[self.policy > 0].astype(np.float64)
        return float(-(likely * np.log(likely)).sum())


@dataclass
class Study:
    """A checkpoint on a split.

    Attributes:
        chosen: the answers as the model gives them, in the split's order; tokens: the [SEG] of each.
        by_layer: [L] lists of answers with that layer forced.
        maps_by_layer: [L] lists of M_IoU answers, the layer's map cut at its best threshold; targets that are there.
        table: (column, row) of Table 2 -> answers; targets that are there.
    """

    benchmark: Benchmark
    chosen: list[Record] = field(default_factory=list)
    tokens: list[list[Token]] = field(default_factory=list)
    by_layer: list[list[Record]] = field(default_factory=list)
    maps_by_layer: list[list[Record]] = field(default_factory=list)
    table: dict[tuple[str, str], list[Record]] = field(default_factory=lambda: defaultdict(list))

    @property
    def num_layers(self) -> int:
        return len(self.by_layer)

    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        """gIoU and cIoU, under these names; absent where the benchmark has no such metric."""
        found = metrics.compute(records, self.benchmark)
        names = {of.removesuffix(" of targets"): name for name, of in self.benchmark.metrics.items()}
        return {ours: found[names[ours]] for ours in IOU if names.get(ours) in found}

    def map_loss(self) -> np.ndarray:
        """[L] means over the [SEG] of targets that are there (Fig. 2b)."""
        losses = np.array([token.map_loss for row in self.tokens for token in row]).reshape(-1, self.num_layers)
        losses = losses[~np.isnan(losses).any(1)]
        return losses.mean(0) if len(losses) else np.full(self.num_layers, np.nan)

    def groups(self) -> dict[tuple[str, str], list[int]]:
        """(key, group) -> places of its queries: all of them, then by every key of their meta with several values."""
        found = {("all", self.benchmark.name): list(range(len(self.chosen)))}
        for key in metrics.GROUP_KEYS:
            names = sorted({str(record.meta[key]) for record in self.chosen if key in record.meta})
            for name in names if len(names) > 1 else ():
                found[key, name] = [n for n, record in enumerate(self.chosen) if str(record.meta.get(key)) == name]
        return found

    def policy(self, places: Sequence[int]) -> dict[str, Any]:
        """What the policy does on some queries: how many ``segs``, ``shares`` [L] that were chosen, the mean
        ``probability`` [L] and ``entropy``, and how many layers are ``candidates``."""
        tokens = [token for place in places for token in self.tokens[place]]
        layers = [layer for place in places for layer in self.chosen[place].layers]
        count = max(1, len(tokens))
        probability = sum((token.policy for token in tokens), np.zeros(self.num_layers)) / count
        return {
            "segs": len(tokens),
            "candidates": np.count_nonzero(probability),
            "shares": np.bincount(np.array(layers, dtype=int), minlength=self.num_layers) / max(1, len(layers)),
            "probability": probability,
            "entropy": sum(token.entropy for token in tokens) / count,
        }

    def ranked(self) -> list[int]:
        """Places of all queries from the worst to the best IoU."""
        protocol = self.benchmark.protocol()
        key = [(metrics.iou(record, protocol), record.index, record.query_id) for record in self.chosen]
        return sorted(range(len(key)), key=key.__getitem__)


@dataclass
class Look:
    """All that pictures of one query show.

    Attributes:
        maps: [L, H, W] in [0, 1]; masks: [L, H, W] bool of each forced layer; ious: [L]; each over the union of [SEG].
        policy: [L], the mean of its [SEG].
        mask, layers, iou: of the model's own answer.
    """

    image: np.ndarray
    query: str
    truth: np.ndarray
    record: Record
    maps: np.ndarray
    masks: np.ndarray
    ious: list[float]
    policy: np.ndarray
    mask: np.ndarray
    iou: float

    @property
    def layers(self) -> list[int]:
        return self.record.layers


@dataclass
class Analyst:
    """A model to be analysed, and how it is asked.

    Args:
        original: SAM as published, for M_prompt; None = the checkpoint's own, whose decoder is trained.
    """

    model: UGroundForCausalLM
    processor: Any
    options: InferenceOptions
    batch_size: int = 4
    original: SegmentAnything | None = None

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
            places = list(range(start, min(size, start + self.batch_size)))
            self._add(study, places, [dataset[place] for place in places])
            bar.update(len(places))
        bar.close()
        return study

    def look(self, dataset: EvalDataset, record: Record) -> Look:
        """One query of ``study``'s once more, with its pictures."""
        sample = dataset[record.index]
        number = next(n for n, query in enumerate(sample.queries) if query.query_id == record.query_id)
        query, size = sample.queries[number], sample.image.shape[:2]
        benchmark = benchmark_of(dataset.spec)
        probe = LayerProbe(self, [record.index], [sample], benchmark)
        by_layer = [probe.predict(f"fixed:{k}")[0][number] for k in range(self.model.ppm.num_layers)]
        answer = probe.predict(self.options.layer_policy)[0][number]
        policy, grid = probe.policy_and_maps(0, number)
        protocol = benchmark.protocol()
        scored = [score(record.index, sample, query, each, benchmark) for each in (*by_layer, answer)]
        *ious, iou = [metrics.iou(each, protocol) for each in scored]
        return Look(
            image=sample.image,
            query=query.text,
            truth=metrics.merge_targets(query.masks, *size),
            record=scored[-1],
            maps=self.enlarge(grid, size).amax(0).numpy() if len(grid) else np.zeros((len(by_layer), *size)),
            masks=np.stack([layer.merged for layer in by_layer]),
            ious=ious,
            iou=iou,
            policy=policy.mean(0).numpy() if len(policy) else np.zeros(len(by_layer)),
            mask=answer.merged,
        )

    def enlarge(self, grid: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """[N, L, P] maps at their image's size: [N, L, H, W]."""
        config = self.model.config
        full = maps_at(grid.flatten(0, 1), config.map_side or config.clip_side, size, config.clip_fit)
        return full.view(*grid.shape[:2], *size)

    def _add(self, study: Study, places: list[int], samples: list[EvalSample]) -> None:
        """Asks a batch of images, and takes down everything about each of their queries."""
        probe = LayerProbe(self, places, samples, study.benchmark)
        for layer, records in enumerate(study.by_layer):
            records += probe.scored(probe.predict(f"fixed:{layer}"))
        for row, rule in zip(ROWS, (self.options.layer_policy, "last")):
            by_map = probe.predict(rule, Prompts(seg=False), self.original)
            study.table["M_prompt", row] += probe.scored(by_map, present=True)
            study.table["SEG_prompt", row] += probe.scored(probe.predict(rule, Prompts(mask=False)), present=True)
        own = probe.predict(self.options.layer_policy)
        study.chosen += probe.scored(own)
        for b, sample in enumerate(samples):
            for k, query in enumerate(sample.queries):
                distribution, grid = probe.policy_and_maps(b, k)
                losses = self._map_losses(query, grid)
                study.tokens.append([Token(*pair) for pair in zip(distribution.numpy(), losses)])
                if not query.masks.any():
                    continue

                def cut(maps: np.ndarray, b=b, sample=sample, query=query, answer=own[b][k]) -> Record:
                    return cut_map(places[b], sample, query, answer, maps, study.benchmark)

                full = self.enlarge(grid, sample.image.shape[:2]).numpy()
                of_layers = [cut(full[:, layer]) for layer in range(study.num_layers)]
                for records, record in zip(study.maps_by_layer, of_layers):
                    records.append(record)
                study.table["M_IoU", "chosen"].append(cut(own[b][k].similarities))
                study.table["M_IoU", "last"].append(of_layers[-1])

    def _map_losses(self, query: EvalQuery, grid: torch.Tensor) -> np.ndarray:
        """[N, L]; NaN where there is no target for each of the [SEG] (one target is all of theirs)."""
        targets = torch.from_numpy(query.masks)
        if len(targets) == 1:
            targets = targets.expand(len(grid), -1, -1)
        if not len(grid) or len(targets) != len(grid) or not (targets == 1).flatten(1).any(1).all():
            return np.full(grid.shape[:2], np.nan)
        return self.model.objective.map_losses([targets], grid).numpy()


class LayerProbe:
    """What LLaVA said about some images, from which masks are drawn again and again."""

    def __init__(
        self, analyst: Analyst, places: Sequence[int], samples: Sequence[EvalSample], benchmark: Benchmark
    ) -> None:
        self.analyst, self.places, self.samples, self.benchmark = analyst, places, samples, benchmark
        options, model = analyst.options, analyst.model
        self.turns = turns_of(samples, benchmark, options.mode)
        batch = analyst.processor.prompts([sample.image for sample in samples], self.turns, places)
        self.answered: LanguagePass = model.answer(batch.to(model.device, model.dtype), options.max_new_tokens)
        self.predictions: list[list[Prediction]] = []  # the last drawn

    def predict(
        self, layer_policy: str, prompts: Prompts | None = None, sam: SegmentAnything | None = None
    ) -> list[list[QueryPrediction]]:
        """[image][query], as ``utils.evaluation.predictions.predict_queries`` gives them; see ``decode_masks``."""
        options, model = self.analyst.options, self.analyst.model
        drawn = model.decode_masks(self.answered, layer_policy, options.seed, prompts, sam)
        self.predictions = with_text(drawn, self.analyst.processor)
        return by_query(self.samples, self.turns, self.predictions, self.benchmark, options.mode)

    def scored(self, answers: list[list[QueryPrediction]], present: bool = False) -> list[Record]:
        """Scores of all queries; with ``present``, of the masks of those that have a target, rejected or not."""
        found = []
        for place, sample, row in zip(self.places, self.samples, answers, strict=True):
            for query, answer in zip(sample.queries, row, strict=True):
                if not present:
                    found.append(score(place, sample, query, answer, self.benchmark))
                elif query.masks.any():
                    found.append(score(place, sample, query, replace(answer, rejected=False), self.benchmark))
        return found

    def policy_and_maps(self, image: int, query: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A query's [N, L] policy and [N, L, P] maps of all layers, which do not depend on how masks were drawn."""
        if self.benchmark.is_joint(self.analyst.options.mode):
            said = self.predictions[image][0]
            return said.policy[query : query + 1], said.layer_maps[query : query + 1]
        said = self.predictions[image][query]
        return said.policy, said.layer_maps


def original_sam(path: str, model: UGroundForCausalLM) -> SegmentAnything:
    """The SAM that a checkpoint started from.

    Raises:
        ValueError: if it is another one: its encoder is not the checkpoint's, which training never changes.
    """
    state, shape = read_sam(path)
    sam = SegmentAnything(shape)
    load_strictly(sam, state, path)
    sam = sam.to(model.device, model.dtype).eval()
    ours, theirs = (each.image_encoder.state_dict() for each in (model.visual_model, sam))
    if ours.keys() != theirs.keys() or any(not torch.equal(ours[name], theirs[name]) for name in ours):
        raise ValueError(f"--sam {path}: its image encoder is not the checkpoint's; give the SAM it was trained from")
    return sam


def best_threshold(similarity: np.ndarray, truth: np.ndarray) -> float:
    """The lowest of ``THRESHOLDS`` with the largest IoU: similarity [H, W] in [0, 1], truth [H, W] with 0, 1, 255."""
    above = np.searchsorted(THRESHOLDS, similarity.astype(np.float32))  # how many thresholds a pixel is above
    bins = len(THRESHOLDS) + 1
    true, false = (np.bincount(above[truth == value], minlength=bins)[::-1].cumsum()[::-1][1:] for value in (1, 0))
    iou = true / np.maximum(1, np.count_nonzero(truth == 1) + false)
    return float(THRESHOLDS[iou.argmax()])


def cut_map(
    place: int, sample: EvalSample, query: EvalQuery, answer: QueryPrediction, maps: np.ndarray, benchmark: Benchmark
) -> Record:
    """M_IoU of a query: its maps [N, H, W] cut at the one threshold that fits their union to the truth best."""
    threshold = 0.5
    if len(maps):
        truth = metrics.merge_targets(query.masks, *maps.shape[1:])
        threshold = best_threshold(maps.max(0), truth)
    cut = replace(answer, logits=maps.astype(np.float32) - np.float32(threshold), rejected=False)
    return score(place, sample, query, cut, benchmark)
