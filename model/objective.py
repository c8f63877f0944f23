"""The training objective (Eq. 5, 7, 8, 9): losses of masks and maps, rewards, and the gate's loss.

Legend: N [SEG] tokens, L hidden states, h x w cells of a map, M tokens of answers, V vocabulary size, N_b masks of row
b, n masks of one image or a part of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from model import losses
from model.config import GroundingConfig
from model.geometry import on_grid
from model.PPM import LayerSamples, PolicyPromptedMasking, policy_entropy
from model.processing.thoughts import NO_THOUGHTS
from model.settings import MASK_REWARDS
from model.structures import EPSILON, IGNORE_PIXEL, Batch

SoftTarget = tuple[torch.Tensor, torch.Tensor]  # one image's M_sigma [n, H, W], and the weight [n] of its positives
MAP_LOSSES = {  # constraint of Table 7 -> name of its term
    "gaussian_bce": "map_bce",
    "gaussian_dice": "map_dice",
    "bce": "map_hard_bce",
    "dice": "map_hard_dice",
}
MAP_REWARDS = ("both", "bce", "dice", "iou")  # kinds of ``reward_terms`` that follow from a layer's map


@dataclass
class UGroundOutput:
    """Output of a training step's forward pass.

    Attributes:
        loss: the weighted sum of Eq. 9.
        terms: named, unweighted terms (text, mask_bce, mask_dice, map_bce, map_dice; map_hard_bce, map_hard_dice,
            policy, classifier, critic, mask_iou_mse where the settings have them) and metrics to log (reward,
            critic_baseline, entropy, map_iou, mask_iou; thought, the cross-entropy of a thought's tokens), 0-d and
            detached. Normalised by ``Batch.counts``: their mean over the micro steps and ranks of an optimizer step is
            the step's value. ``baseline`` is the moving average.
        mask_logits, maps: per row [N_b, H, W], SAM's logits and the similarity maps in [0, 1] at the original size.
        layers: [N] chosen hidden state; policy: [N, L] distribution; rewards: [N].
        has_masks: 0-d, 1.0 if the optimizer step has a mask; without one, all terms but text are 0 and meaningless.
        has_thoughts: 0-d, 1.0 if it has a thought; None for a model without thoughts.
        layer_losses: [L] map_bce + map_dice of every layer's map at its own resolution, normalised like the terms;
            None unless requested (``all_layers``) or needed by a gate that learns from all layers.
    """

    loss: torch.Tensor
    terms: dict[str, torch.Tensor]
    mask_logits: list[torch.Tensor]
    maps: list[torch.Tensor]
    layers: torch.Tensor
    policy: torch.Tensor
    rewards: torch.Tensor
    has_masks: torch.Tensor
    layer_losses: torch.Tensor | None = None
    has_thoughts: torch.Tensor | None = None


class Objective:
    """The loss of ``GroundingModel``. It holds no parameters of its own; the gate's are in ``ppm``."""

    def __init__(self, config: GroundingConfig, ppm: PolicyPromptedMasking) -> None:
        self.config, self.ppm = config, ppm

    def __call__(
        self,
        batch: Batch,
        logits: torch.Tensor,
        mask_logits: list[torch.Tensor],
        maps: list[torch.Tensor],
        layers: torch.Tensor,
        log_policy: torch.Tensor,
        layer_maps: list[torch.Tensor] | None = None,
        states: torch.Tensor | None = None,
        others: tuple[torch.Tensor, torch.Tensor | None] | None = None,
        predicted_iou: torch.Tensor | None = None,
    ) -> UGroundOutput:
        """Computes Eq. 9.

        Every term is divided by its count in the whole optimizer step (``Batch.counts``), so that averaging over ranks
        and micro steps gives the gradient of one process with all samples at once.

        Args:
            logits: [M, V] of the answers' tokens.
            mask_logits, maps: per row [N_b, H, W], SAM's logits and the similarity maps in [0, 1].
            layers: [N] chosen layers; log_policy: [N, L].
            layer_maps: per row [N_b, L, h, w] in [0, 1], detached: all layers' maps, for ``layer_losses`` and for gates
                that need them.
            states: [N, L, D] of the [SEG] tokens, for a critic of the state.
            others: with leave_one_out, [N, K - 1] further sampled layers, and the rewards of their masks if masks give
                the reward.
            predicted_iou: [N] of SAM's head, for its own loss.
        """
        config = self.config
        soft_targets = [self.soft_target(masks) for masks in batch.masks]
        overlaps = self.overlap_weights(batch, mask_logits)
        per_mask, present = self.mask_terms(batch.masks, mask_logits, maps, soft_targets, overlaps)
        if overlaps and config.reward_terms in MASK_REWARDS:  # of plain BCE, as the rewards of the ``others``
            rewards = self.mask_rewards(batch.masks, mask_logits)
        else:
            rewards = _reward(per_mask, config.reward_terms).detach()
        if config.reward == "batch":
            rewards = (rewards * present).sum().expand(len(rewards))
        layer_terms = None if layer_maps is None else self.layer_terms(batch.masks, soft_targets, layer_maps)
        layer_rewards = None
        if config.rewards_all_layers and layer_terms is not None:
            is_classifier = config.selection.gate == "classifier"
            layer_rewards = _reward(layer_terms, "iou" if is_classifier else config.reward_terms)
        samples = None if others is None else _samples(layers, rewards, others, layer_rewards)
        per_mask |= self.gate_terms(rewards, layers, log_policy, layer_rewards, states, samples)
        if config.iou_loss_weight and predicted_iou is not None:
            per_mask["mask_iou_mse"] = (predicted_iou.float() - per_mask["mask_iou"]).square()
        per_mask["entropy"] = policy_entropy(log_policy)

        has_masks = (batch.counts[1] > 0).float()
        counts = batch.counts.clamp(min=EPSILON)
        per_token = losses.text_losses(logits, batch.label_ids)
        text = (per_token * batch.label_weights).sum() / counts[0]
        thought: dict[str, torch.Tensor] = {}
        has_thoughts = None
        if config.thought_format != NO_THOUGHTS:
            thought["thought"] = (per_token.detach() * batch.label_thoughts).sum() / counts[2]
            has_thoughts = (batch.counts[2] > 0).float()
        terms = {name: (value * present).sum() / counts[1] for name, value in per_mask.items()}
        loss = self._weighted(text, terms)
        layer_losses = None
        if layer_terms is not None:
            layer_losses = -(_reward(layer_terms, "both") * present[:, None]).sum(0) / counts[1]

        metrics = {"reward": (rewards * present).sum() / counts[1], "baseline": self.ppm.baseline.clone()}
        terms = {name: value.detach() for name, value in {"text": text, **thought, **terms, **metrics}.items()}
        policy = log_policy.detach().exp()
        of_step = has_masks, layer_losses, has_thoughts
        return UGroundOutput(loss, terms, mask_logits, maps, layers, policy, rewards, *of_step)

    def _weighted(self, text: torch.Tensor, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        """The weighted sum of Eq. 9, 0-d, from 0-d terms."""
        config = self.config
        weights = {"bce": config.bce_loss_weight, "dice": config.dice_loss_weight}
        mask = weights["bce"] * terms["mask_bce"] + weights["dice"] * terms["mask_dice"]
        loss = config.text_loss_weight * text + config.mask_loss_weight * mask
        if config.map_terms:
            constraints = [name for name in MAP_LOSSES if name in config.map_terms]
            maps = sum(weights[name.rpartition("_")[-1]] * terms[MAP_LOSSES[name]] for name in constraints)
            loss = loss + config.map_loss_weight * maps
        for name in ("policy", "classifier"):
            if name in terms:
                loss = loss + config.policy_loss_weight * terms[name]
        if "critic" in terms:
            loss = loss + config.policy_loss_weight * config.critic_loss_weight * terms["critic"]
        if "mask_iou_mse" in terms:
            loss = loss + config.iou_loss_weight * terms["mask_iou_mse"]
        if config.entropy_bonus and "policy" in terms:
            loss = loss - config.policy_loss_weight * config.entropy_bonus * terms["entropy"]
        return loss

    def gate_terms(
        self,
        rewards: torch.Tensor,
        layers: torch.Tensor,
        log_policy: torch.Tensor,
        layer_rewards: torch.Tensor | None,
        states: torch.Tensor | None = None,
        samples: LayerSamples | None = None,
    ) -> dict[str, torch.Tensor]:
        """Losses of the gate (Eq. 5, or the classifier of appendix B.1) and of the critic.

        A collective operation: every rank must call it, also one without [SEG].

        Args:
            rewards, layers: [N]; log_policy: [N, L].
            layer_rewards: [N, L] for a gate that learns from all layers; None = from ``rewards``.
            states: [N, L, D], for a critic of the state.
            samples: with leave_one_out, all sampled layers with their rewards; they take the place of ``layers``.

        Returns:
            ``policy``, ``classifier`` and ``critic``, those that the settings have, [N] each; with a critic also
            ``critic_baseline``, its b without gradient.
        """
        config, gate, terms = self.config, self.config.selection.gate, {}
        index, advantage = torch.arange(len(layers), device=layers.device), rewards
        if config.baseline == "average":  # updated and logged even where the gate does not use it
            advantage = self.ppm.advantage(rewards)
        if layer_rewards is not None and samples is None:
            if gate == "classifier":
                best = layer_rewards.masked_fill(log_policy.isinf(), -torch.inf).argmax(-1)
                terms["classifier"] = -log_policy[index, best]
            else:
                terms["policy"] = -(log_policy.exp() * layer_rewards).sum(-1)
        elif gate == "policy":
            if samples is not None:
                advantage = samples.advantage()
            elif config.baseline == "state_critic":
                assert states is not None
                advantage, terms["critic"] = self.ppm.state_advantage(rewards, states)
                terms["critic_baseline"] = rewards - advantage
            elif config.baseline == "critic":
                expected = self.ppm.expected_reward(log_policy)
                terms["critic"] = (expected - rewards).square()
                advantage = rewards - expected.detach()
                terms["critic_baseline"] = rewards - advantage
            if config.scale_advantage:
                advantage = self.ppm.scaled(advantage)
            if samples is None:
                terms["policy"] = -advantage * log_policy[index, layers]
            else:
                terms["policy"] = -(advantage * log_policy.gather(1, samples.layers)).mean(1)
        return terms

    @torch.no_grad()
    def mask_rewards(self, targets: list[torch.Tensor], mask_logits: list[torch.Tensor]) -> torch.Tensor:
        """Rewards [N] of SAM's masks, where ``reward_terms`` takes them from masks.

        Args:
            targets: per image [N_b, H, W] uint8; mask_logits: as many, SAM's logits.
        """
        rewards = []
        for target, logits in zip(targets, mask_logits):
            count = losses.masks_at_once(target)
            for part, truth in zip(logits.split(count), target.split(count)):
                terms = {"mask_bce": losses.mask_bce(part, truth), "mask_dice": losses.mask_dice(part, truth)}
                rewards.append(_reward(terms | {"mask_iou": losses.mask_iou(part, truth)}, self.config.reward_terms))
        return torch.cat(rewards)

    def mask_terms(
        self,
        targets: list[torch.Tensor],
        mask_logits: list[torch.Tensor],
        maps: list[torch.Tensor],
        soft_targets: list[SoftTarget] | None = None,
        overlaps: list[torch.Tensor] | None = None,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Losses per mask: [N] by name, and [N] float32, 1.0 for targets that are not empty (others have no loss).

        Args:
            targets: per image [N_b, H, W] uint8; mask_logits, maps: as many, SAM's logits and the similarity maps.
            soft_targets: of ``soft_target``, per image; None = computed here.
            overlaps: per image [N_b, H, W], pixel weights of the masks' BCE; None = all 1.
        """
        soft_targets = soft_targets or [self.soft_target(target) for target in targets]
        collected: dict[str, list[torch.Tensor]] = {}
        present = []
        for b, (target, predicted, similarity, (soft, weight)) in enumerate(
            zip(targets, mask_logits, maps, soft_targets)
        ):
            hard_weight = weight
            if {"bce", "dice"} & set(self.config.map_terms):
                hard_weight = self._positive_weight((target == 1).float())
            inputs = [predicted, similarity, target, soft, weight, hard_weight]
            inputs += [overlaps[b]] if overlaps else []
            parts = list(zip(*(tensor.split(losses.masks_at_once(target)) for tensor in inputs), strict=True))
            for part in parts:
                if len(parts) == 1:
                    terms = self._terms_of(*part)
                else:  # large photographs: the backward pass recomputes a part's values
                    terms = checkpoint(self._terms_of, *part, use_reentrant=False, preserve_rng_state=False)
                for name, values in terms.items():
                    collected.setdefault(name, []).append(values)
            present.append((target == 1).flatten(1).any(1).float())
        return {name: torch.cat(values) for name, values in collected.items()}, torch.cat(present)

    def _terms_of(
        self,
        predicted: torch.Tensor,
        similarity: torch.Tensor,
        target: torch.Tensor,
        soft: torch.Tensor,
        weight: torch.Tensor,
        hard_weight: torch.Tensor,
        overlap: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Losses [n] by name of one image's masks.

        Args:
            predicted, similarity: [n, H, W] mask logits and maps; target: [n, H, W] uint8; soft: [n, H, W] M_sigma.
            weight, hard_weight: [n] weights of the positives of soft and hard targets.
            overlap: [n, H, W] pixel weights of the mask's BCE; None = all 1.
        """
        config, valid = self.config, target != IGNORE_PIXEL
        terms = {
            "mask_bce": losses.mask_bce(predicted, target, overlap),
            "mask_dice": losses.mask_dice(predicted, target),
            "map_bce": losses.map_bce(similarity, soft, weight, valid),
            "map_dice": losses.map_dice(similarity, soft, weight, valid),
        }
        if {"bce", "dice"} & set(config.map_terms):
            hard = (target == 1).float()
            terms["map_hard_bce"] = losses.map_bce(similarity, hard, hard_weight, valid)
            terms["map_hard_dice"] = losses.map_dice(similarity, hard, hard_weight, valid)
        if config.reward_terms == "mask_iou" or config.iou_loss_weight:
            terms["mask_iou"] = losses.mask_iou(predicted, target)
        if config.reward_terms == "iou":
            terms["map_iou"] = losses.map_iou(similarity.detach(), (target == 1).float(), valid)
        return terms

    def overlap_weights(self, batch: Batch, mask_logits: list[torch.Tensor]) -> list[torch.Tensor] | None:
        """Pixel weights [N_b, H, W] per image of the target refinement loss; None if it is off."""
        if (weight := self.config.overlap_weight) == 1:
            return None
        conversations = batch.segment_ids.flatten()[batch.seg_positions].split([len(logits) for logits in mask_logits])
        return [losses.overlap_weights(*image, weight) for image in zip(mask_logits, conversations)]

    def soft_target(self, target: torch.Tensor) -> SoftTarget:
        """M_sigma [n, H, W] of one image's masks, and the weight [n] of its positives."""
        soft = losses.soften(target, self.config.gaussian_kernel, self.config.gaussian_sigma)
        return soft, self._positive_weight(soft)

    def _positive_weight(self, targets: torch.Tensor) -> torch.Tensor:
        return losses.positive_weight(targets, shared=self.config.positive_weight == "image")

    def map_losses(self, targets: list[torch.Tensor], layer_maps: list[torch.Tensor]) -> torch.Tensor:
        """map_bce + map_dice of every layer's map (Fig. 2b): [N, L]; their means are the ``layer_losses``.

        Args:
            targets: per image [n, H, W] uint8; layer_maps: per image [n, L, h, w] in [0, 1].
        """
        return -self.map_rewards(targets, layer_maps)["both"]

    def map_rewards(self, targets: list[torch.Tensor], layer_maps: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The reward of every layer's map, which the exact gradient uses: kind of ``MAP_REWARDS`` -> [N, L].

        Args:
            targets, layer_maps: of ``map_losses``.
        """
        terms = self.layer_terms(targets, [self.soft_target(masks) for masks in targets], layer_maps)
        return {kind: _reward(terms, kind) for kind in MAP_REWARDS}

    @torch.no_grad()
    def layer_terms(
        self, targets: list[torch.Tensor], soft_targets: list[SoftTarget], layer_maps: list[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Terms of the reward for all layers' maps, at the map's own resolution: [N, L] by name.

        The targets are reduced to the map's grid, instead of enlarging L x N maps to the image's size: a
        few thousand values per [SEG], where one map at the image's size has hundreds of thousands.

        Args:
            targets: per image [n, H, W] uint8; soft_targets: of ``soft_target``; layer_maps: per image [n, L, h, w] in
                [0, 1].
        """
        fit = self.config.map_fit
        collected: dict[str, list[torch.Tensor]] = {}
        for target, (soft, weight), maps in zip(targets, soft_targets, layer_maps):
            num_layers, grid = maps.shape[1], (maps.shape[2], maps.shape[3])
            valid, hard = target != IGNORE_PIXEL, (target == 1).float()
            soft, share = on_grid(soft, valid, fit, grid)
            hard, _ = on_grid(hard, valid, fit, grid)
            soft, hard, share, weight = (v.repeat_interleave(num_layers, 0) for v in (soft, hard, share, weight))
            flat = maps.flatten(0, 1)
            terms = {
                "map_bce": losses.map_bce(flat, soft, weight, share),
                "map_dice": losses.map_dice(flat, soft, weight, share),
                "map_iou": losses.map_iou(flat, hard, share),
            }
            for name, values in terms.items():
                collected.setdefault(name, []).append(values.view(-1, num_layers))
        return {name: torch.cat(values) for name, values in collected.items()}


def _samples(
    layers: torch.Tensor,
    rewards: torch.Tensor,
    others: tuple[torch.Tensor, torch.Tensor | None],
    layer_rewards: torch.Tensor | None,
) -> LayerSamples:
    """The chosen layers [N] and the ``others`` [N, K - 1] with their rewards: of masks, or from those of all maps."""
    sampled = torch.cat([layers[:, None], others[0]], 1)
    if layer_rewards is not None:  # the chosen one's, too: all at the map's own resolution
        return LayerSamples(sampled, layer_rewards.gather(1, sampled))
    assert others[1] is not None
    return LayerSamples(sampled, torch.cat([rewards[:, None], others[1]], 1))


def _reward(terms: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    """The reward of maps or masks, of the shape of its terms (``reward_terms``, Table 8)."""
    if kind in ("iou", "mask_iou"):
        return terms["map_iou" if kind == "iou" else kind]
    if kind == "mask":  # unweighted, as ``both``
        return -(terms["mask_bce"] + terms["mask_dice"])
    if kind == "both":
        return -(terms["map_bce"] + terms["map_dice"])
    return -terms[f"map_{kind}"]
