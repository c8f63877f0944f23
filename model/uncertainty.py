"""Uncertainty of a [SEG] token's mask: over several sampled layers (sections 4.1, B.3), or from the mask alone."""

from __future__ import annotations

import torch

from model.structures import EPSILON, MaskUncertainty


class MonteCarlo:
    """Mean and variance of one mask over T sampled layers, each weighted by how often it was sampled.

    Args:
        shares: [L] float32, the share of the T samples that each layer has; they sum to 1.
    """

    def __init__(self, shares: torch.Tensor) -> None:
        self.shares = shares
        self.mean = self.square = self.similarity = torch.zeros(())  # on the CPU: a 0-d tensor adds to any device's
        self.predicted_iou = 0.0
        self.masks: list[tuple[float, torch.Tensor]] = []

    def add(self, layer: int, logits: torch.Tensor, similarity: torch.Tensor, predicted_iou: float = 0.0) -> None:
        """Adds a layer's [H, W] logits, similarity map and rating; once for each layer whose share is not 0."""
        share, probability = float(self.shares[layer]), logits.sigmoid()
        self.mean = self.mean + share * probability
        self.square = self.square + share * probability.square()
        self.similarity = self.similarity + share * similarity
        self.predicted_iou += share * predicted_iou
        self.masks.append((share, probability > 0.5))

    @property
    def logits(self) -> torch.Tensor:
        """[H, W] logits of the mean probability."""
        return torch.logit(self.mean, eps=EPSILON)

    def uncertainty(self) -> MaskUncertainty:
        """Mean, variance and the score: 1 - the mean IoU of the samples' masks with the mean's mask."""
        mean_mask = self.mean > 0.5
        counts = [torch.stack([(mask & mean_mask).sum(), (mask | mean_mask).sum()]) for _, mask in self.masks]
        pairs = torch.stack(counts).tolist()  # at once: every read waits for the device
        ious = [both / either if either else 1.0 for both, either in pairs]  # two empty masks agree
        agreement = sum(share * iou for (share, _), iou in zip(self.masks, ious))
        variance = (self.square - self.mean.square()).clamp(min=0)
        return MaskUncertainty(self.mean.cpu(), variance.cpu(), self.shares, max(0.0, 1.0 - agreement))


def ambiguity(logits: torch.Tensor) -> torch.Tensor:
    """How far a mask's probabilities p are from 0 and 1: the mean of 1 - 2 |p - 0.5| over the pixels with p > 0.05.

    The background, which nearly every mask is sure of, is left out: with it, the number would measure the mask's size.

    Args:
        logits: [N, H, W].

    Returns:
        [N] float32 in [0, 1]; 1 for a mask without such a pixel.
    """
    probability = logits.float().sigmoid().flatten(1)
    near = probability > 0.05
    total = ((1 - 2 * (probability - 0.5).abs()) * near).sum(1)
    return torch.where(near.any(1), total / near.sum(1).clamp(min=1), 1.0)
