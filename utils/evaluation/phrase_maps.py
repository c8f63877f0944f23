"""What the layers of a model ground without a [SEG]: similarity of a phrase's last token with the image's tokens.

It takes no training, and so says what a backbone brings: whether its residual stream tells where a phrase's object is,
and at which layers. As a control, the same maps are compared with the phrases of another image.

Legend: N phrases, L hidden states, P cells of a map, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from model.geometry import on_grid
from model.grounding import GroundingModel
from model.PPM import similarity_of_all_layers
from model.processing.processor import UGroundProcessor
from model.structures import IGNORE_PIXEL, EvalSample, Turn
from utils.datasets.base import EvalDataset

KINDS = ("dot", "cosine")  # products of the states, as PPM's (Eq. 6), and of the states scaled to length 1
METRICS = ("hit", "auc", "iou")


@dataclass
class PhraseMaps:
    """Scores of a split: (kind, metric, control or not) -> one row [L] per phrase.

    Attributes:
        areas: share of each phrase's image that its target covers, what a map without information hits.
    """

    scores: dict[tuple[str, str, bool], list[np.ndarray]] = field(default_factory=dict)
    areas: list[float] = field(default_factory=list)

    def mean(self, kind: str, metric: str, control: bool = False) -> np.ndarray:
        """[L] means over the phrases."""
        return np.mean(self.scores[kind, metric, control], 0)

    def rows(self) -> list[dict[str, Any]]:
        """A row per layer and kind; ``hit_error`` is the standard error of ``hit``."""
        rows = []
        for kind in KINDS:
            hits = np.array(self.scores[kind, "hit", False])
            error = hits.std(0) / max(1, len(hits)) ** 0.5
            for layer in range(hits.shape[1]):
                row: dict[str, Any] = {"layer": layer, "similarity": kind}
                for metric in METRICS:
                    row[metric] = float(self.mean(kind, metric)[layer])
                    row[f"{metric}_control"] = float(self.mean(kind, metric, True)[layer])
                rows.append(row | {"hit_error": float(error[layer])})
        return rows


def measure(
    model: GroundingModel,
    processor: UGroundProcessor,
    dataset: EvalDataset,
    limit: int,
    batch_size: int = 4,
    progress: bool = False,
) -> PhraseMaps:
    """One pass over the present targets of a split's first ``limit`` images, which need be two at least.

    Raises:
        ValueError: if fewer than two images have a target: the control takes the phrases of another one.
    """
    result = PhraseMaps()
    indices = range(min(len(dataset), limit))
    first: list[str] = []
    bar = tqdm(total=len(indices), desc=str(dataset.spec), unit="image", disable=None if progress else True)
    samples: list[EvalSample] = []
    for index in indices:
        sample = dataset[index]
        sample.queries = [query for query in sample.queries if query.is_present]
        if sample.queries:
            samples.append(sample)
            first = first or _texts(sample)
        if len(samples) > batch_size:  # the last one's phrases are the control of the one before, whatever the batch
            *complete, following = samples
            _add(result, model, processor, complete, _texts(following))
            samples = [following]
        bar.update(1)
    bar.close()
    if len(samples) + len(result.areas) < 2:
        raise ValueError(
            f"{dataset.spec}: {len(samples)} of {len(indices)} images has a target; the control compares an image's "
            "maps with another image's phrases: give --limit 2 or more"
        )
    _add(result, model, processor, samples, first)
    return result


def _texts(sample: EvalSample) -> list[str]:
    return [query.text for query in sample.queries]


@torch.inference_mode()
def _add(
    result: PhraseMaps,
    model: GroundingModel,
    processor: UGroundProcessor,
    samples: Sequence[EvalSample],
    following: Sequence[str],
) -> None:
    """Adds the scores of a batch; ``following``: phrases of the image after it."""
    own = [_texts(sample) for sample in samples]
    others = [_as_many(texts, len(row)) for texts, row in zip([*own[1:], following], own)]
    turns = [[Turn(text) for text in (*row, *other)] for row, other in zip(own, others)]
    batch = processor.prompts([sample.image for sample in samples], turns).to(model.device, model.dtype)
    hidden = model.forward_language(batch).hidden
    positions, rows = _phrase_ends(processor, batch.segment_ids.cpu(), turns)
    flat, seg_rows = torch.tensor(positions, device=model.device), torch.tensor(rows, device=model.device)
    kinds = {"dot": hidden, "cosine": tuple(F.normalize(layer.float(), dim=-1) for layer in hidden)}
    for kind, layers in kinds.items():
        states = torch.stack([layer.flatten(0, 1)[flat] for layer in layers], 1)
        scores = similarity_of_all_layers(layers, states, seg_rows, batch).cpu()
        start = 0
        for b, sample in enumerate(samples):
            count, (h, w) = len(own[b]), batch.grids[b]
            for control in (False, True):
                maps = scores[start : start + count, :, : h * w]
                start += count
                for query, of_layers in zip(sample.queries, maps):
                    share, valid = _coverage(model, query.masks, (h, w))
                    for metric, values in cell_scores(of_layers, share, valid).items():
                        result.scores.setdefault((kind, metric, control), []).append(values)
                    if kind == "dot" and not control:
                        result.areas.append(float(share[valid].mean()))


def _as_many(texts: Sequence[str], count: int) -> list[str]:
    return [texts[number % len(texts)] for number in range(count)]


def _phrase_ends(
    processor: UGroundProcessor, segment_ids: torch.Tensor, turns: Sequence[Sequence[Turn]]
) -> tuple[list[int], list[int]]:
    """Flat position of the last token of every phrase, and its row."""
    positions, rows = [], []
    for b, row in enumerate(turns):
        for k, turn in enumerate(row, start=1):
            first = int((segment_ids[b] == k).nonzero()[0])
            positions.append(b * segment_ids.shape[1] + first + processor.builder.last_of_question(turn.question))
            rows.append(b)
    return positions, rows


def _coverage(model: GroundingModel, masks: np.ndarray, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """[P] shares of the cells that a query's targets cover, and [P] bool, the cells that show the image."""
    valid = torch.from_numpy((masks != IGNORE_PIXEL).all(0))[None]
    union = torch.from_numpy((masks == 1).any(0))[None].float()
    share, shown = on_grid(union, valid, model.config.map_fit, grid)
    return share.flatten(), shown.flatten() > 0


def cell_scores(maps: torch.Tensor, share: torch.Tensor, valid: torch.Tensor) -> dict[str, np.ndarray]:
    """Scores of maps against a target, on the map's own grid.

    Args:
        maps: [L, P] similarities; share: [P] in [0, 1], what of a cell the target covers; valid: [P] bool.

    Returns:
        by name, [L]: ``hit``, the target's share of the highest cell; ``auc``, the probability that a point of the
        target lies in a higher cell than one outside it (0.5 = no information); ``iou``, at the threshold that is best
        for this map.
    """
    maps, share = maps[:, valid].double(), share[valid].double()
    order = maps.argsort(1, descending=True)
    inside = share[order].cumsum(1)  # [L, V] covered area of the highest cells
    outside = (1 - share)[order].cumsum(1)
    total, rest = share.sum(), (1 - share).sum()
    steps = (1 - share)[order] * (inside - share[order] / 2)  # of a cell, half of its own target is higher
    auc = steps.sum(1) / (total * rest).clamp(min=1e-12)
    scores = {"hit": share[order[:, 0]], "auc": auc, "iou": (inside / (total + outside)).amax(1)}
    return {name: values.numpy() for name, values in scores.items()}


def sentence(result: PhraseMaps) -> str:
    """Which layer hits best, beside what its control and the area give."""
    parts = []
    for kind in KINDS:
        hit = result.mean(kind, "hit")
        layer = int(hit.argmax())
        control = float(result.mean(kind, "hit", True)[layer])
        auc, auc_control = result.mean(kind, "auc")[layer], result.mean(kind, "auc", True)[layer]
        parts.append(
            f"{kind}: best at layer {layer} of {len(hit) - 1}, hit {hit[layer]:.3f} (another image's phrases "
            f"{control:.3f}), AUC {auc:.3f} ({auc_control:.3f})"
        )
    area = float(np.mean(result.areas))
    return f"{len(result.areas)} phrases; a random cell hits {area:.3f}; " + "; ".join(parts)
