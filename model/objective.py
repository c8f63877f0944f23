"""The training objective (Eq. 5, 7, 8, 9): masks and maps against the ground truth, rewards, and the gate's loss.

Legend: N [SEG] tokens, L hidden states, P image tokens, M learned tokens, N_b masks of row b.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import distributed

from model import losses
from model.config import UGroundConfig
from model.PPM import PolicyPromptedMasking
from utils.types import Batch

EPSILON = 1e-6


@dataclass
class UGroundOutput:
    """What a training step computes.

    Attributes:
        loss: the weighted sum of Eq. 9.
        terms: named, unweighted terms (text, mask_bce, mask_dice, map_bce, map_dice, policy, critic) and figures to log
            (reward, baseline, entropy), 0-d and detached. Normalised by GLOBAL counts: the mean over
            ranks is the value.
        mask_logits, maps: per row [N_b, H, W], SAM's logits and the similarity maps in [0, 1] at the original size.
        layers: [N] chosen hidden state; policy: [N, L] distribution; rewards: [N].
    """

    loss: torch.Tensor
    terms: dict[str, torch.Tensor]
    mask_logits: list[torch.Tensor]
    maps: list[torch.Tensor]
    layers: torch.Tensor
    policy: torch.Tensor
    rewards: torch.Tensor


class Objective:
    """What ``UGroundForCausalLM`` minimises; it has the parts."""

    config: UGroundConfig
    ppm: PolicyPromptedMasking

    def objective(
        self,
        batch: Batch,
        logits: torch.Tensor,
        mask_logits: list[torch.Tensor],
        maps: list[torch.Tensor],
        layers: torch.Tensor,
        log_policy: torch.Tensor,
    ) -> UGroundOutput:
        """Eq. 9 with every term normalised by its global count, so that averaging over ranks gives the same gradient
        as one process with all samples."""
        config = self.config
        per_mask, present = self._mask_terms(batch.masks, mask_logits, maps)
        rewards = -(per_mask["map_bce"] + per_mask["map_dice"]).detach()
        if config.reward == "batch":
            rewards = (rewards * present).sum().expand(len(rewards))
        if config.baseline == "critic":
            expected = self.ppm.expected_reward(log_policy)
            per_mask["critic"] = (expected - rewards).square()
            advantage = rewards - expected.detach()
        else:
            advantage = self.ppm.advantage(rewards)  # also without [SEG]: it communicates
        if config.layer_selection == "policy":
            chosen = log_policy[torch.arange(len(layers), device=layers.device), layers]
            per_mask["policy"] = -advantage * chosen

        counts = torch.stack([batch.label_weights.sum(), present.sum()]).float()
        counts = _mean_over_ranks(counts).clamp(min=EPSILON)
        text = losses.text_loss(logits, batch.label_ids, batch.label_weights) / counts[0]
        terms = {name: (value * present).sum() / counts[1] for name, value in per_mask.items()}
        mask = config.bce_loss_weight * terms["mask_bce"] + config.dice_loss_weight * terms["mask_dice"]
        maps_term = config.bce_loss_weight * terms["map_bce"] + config.dice_loss_weight * terms["map_dice"]
        loss = config.text_loss_weight * text + config.mask_loss_weight * mask + config.map_loss_weight * maps_term
        if "policy" in terms:
            loss = loss + config.policy_loss_weight * terms["policy"]
        if "critic" in terms:
            loss = loss + config.policy_loss_weight * config.critic_loss_weight * terms["critic"]

        policy = log_policy.detach().exp()
        entropy = -(policy * log_policy.detach().clamp(min=-1e4)).sum(-1)
        figures = {"reward": (rewards * present).sum() / counts[1], "entropy": (entropy * present).sum() / counts[1]}
        terms = {"text": text, **terms, **figures, "baseline": self.ppm.baseline.clone()}
        terms = {name: value.detach() for name, value in terms.items()}
        return UGroundOutput(loss, terms, mask_logits, maps, layers, policy, rewards)

    def _mask_terms(
        self, targets: list[torch.Tensor], mask_logits: list[torch.Tensor], maps: list[torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Per-mask losses [N] by name, and [N] 1.0 for targets that are not empty (others take no loss)."""
        config = self.config
        names = ("mask_bce", "mask_dice", "map_bce", "map_dice")
        collected: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        present = []
        for target, predicted, similarity in zip(targets, mask_logits, maps):
            keep = target != losses.IGNORE
            soft = losses.soften(target, config.gaussian_kernel, config.gaussian_sigma)
            weight = losses.positive_weight(soft, shared=config.positive_weight == "image")
            collected["mask_bce"].append(losses.mask_bce(predicted, target))
            collected["mask_dice"].append(losses.mask_dice(predicted, target))
            collected["map_bce"].append(losses.map_bce(similarity, soft, weight, keep))
            collected["map_dice"].append(losses.map_dice(similarity, soft, weight, keep))
            present.append((target == 1).flatten(1).any(1).float())
        return {name: torch.cat(values) for name, values in collected.items()}, torch.cat(present)


def _mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(values)
        values = values / distributed.get_world_size()
    return values
