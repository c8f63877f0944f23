"""Rewards of sampled answers, for the group-relative objective: named, pure functions, weighted in the settings.

Legend: n [SEG] tokens of an answer, m targets of its question, H x W the image's own size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # settings read the table without torch
    import torch


@dataclass
class SampledAnswer:
    """A sampled answer, as rewards see it.

    Attributes:
        thought, answer: its words.
        length: its tokens, with the end token; longest: the most that were allowed.
        ended: whether it has its end token.
        thinks: whether a thought was to be written; well_thought: whether there is a whole one, before any [SEG].
        rejects: whether it has a [REJ].
        masks: [n, H, W], SAM's logits of its [SEG] tokens; maps: [n, H, W], their similarity maps in [0, 1].
        targets: [m, H, W] uint8 with 0, 1 and 255; m = 0 where the target is absent.
    """

    thought: str
    answer: str
    length: int
    longest: int
    ended: bool
    thinks: bool
    well_thought: bool
    rejects: bool
    masks: torch.Tensor
    maps: torch.Tensor
    targets: torch.Tensor


def mask_iou(answer: SampledAnswer) -> float:
    """IoU of the masks and the targets they fit best, over the larger number of both; 1 if there are none of either."""
    from model import losses

    return _matched(answer, answer.masks, losses.mask_iou)


def map_iou(answer: SampledAnswer) -> float:
    """The same of the similarity maps, with the soft IoU: it tells layers apart where SAM mends or loses a map."""

    from model import losses
    from model.structures import IGNORE_PIXEL

    def soft(maps: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return losses.map_iou(maps, (targets == 1).float(), targets != IGNORE_PIXEL)

    return _matched(answer, answer.maps, soft)


def rejection(answer: SampledAnswer) -> float:
    """1 for a [SEG] and no [REJ] where there is a target, or a [REJ] and no [SEG] where there is none; else 0."""
    marks, present = len(answer.masks) > 0, len(answer.targets) > 0
    return float(marks == present and answer.rejects != present)


def well_formed(answer: SampledAnswer) -> float:
    """1 for an answer that ends, after a whole thought if one was to be written; else 0."""
    return float(answer.ended and (answer.well_thought or not answer.thinks))


def brevity(answer: SampledAnswer) -> float:
    """1 minus the share of the allowed tokens that it takes."""
    return 1 - answer.length / answer.longest


REWARDS: dict[str, Callable[[SampledAnswer], float]] = {
    "mask_iou": mask_iou,
    "map_iou": map_iou,
    "rejection": rejection,
    "format": well_formed,
    "length": brevity,
}


def weights_of(entries: Sequence[str]) -> dict[str, float]:
    """Weights by name of rewards written as ``mask_iou:1``.

    Raises:
        ValueError: if a name is unknown or given twice, or a weight is not a finite number other than 0.
    """
    weights: dict[str, float] = {}
    for entry in entries:
        name, _, number = entry.partition(":")
        if name not in REWARDS:
            raise ValueError(f"{name!r} is no reward; known: {', '.join(REWARDS)}")
        if name in weights:
            raise ValueError(f"{name} is given twice")
        try:
            weights[name] = float(number)
        except ValueError:
            raise ValueError(f"{entry!r} has no weight; write {name}:1, and || between several") from None
        if not abs(weights[name]) < float("inf") or not weights[name]:
            raise ValueError(f"{entry!r}: the weight must be a finite number other than 0")
    if not weights:
        raise ValueError(f"is empty; name at least one of {', '.join(REWARDS)}")
    return weights


def rewards_of(answers: Iterable[SampledAnswer], names: Sequence[str]) -> torch.Tensor:
    """Unweighted rewards [answers, names], float32, on the CPU.

    Raises:
        ValueError: if a reward is not finite: its group would silently teach nothing.
    """
    import torch

    values = [[REWARDS[name](answer) for name in names] for answer in answers]
    rewards = torch.tensor(values, dtype=torch.float32).view(-1, len(names))
    for name, column in zip(names, rewards.unbind(1)):
        if not column.isfinite().all():
            raise ValueError(f"reward {name} is not a finite number for some answers; see REWARDS in model/rewards.py")
    return rewards


def _matched(
    answer: SampledAnswer,
    predicted: torch.Tensor,
    iou: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> float:
    """Sum of the IoUs of the best one-to-one matching, over max(n, m)."""
    import torch
    from scipy.optimize import linear_sum_assignment

    n, m = len(predicted), len(answer.targets)
    if not n or not m:
        return float(n == m and answer.ended)  # an answer that is cut off may have had its [SEG] to come
    pairs = [iou(each.expand_as(answer.targets), answer.targets) for each in predicted[:, None]]
    table = torch.stack(pairs).cpu().numpy()
    return float(table[linear_sum_assignment(table, maximize=True)].sum()) / max(n, m)
