"""Group-relative policy optimisation of whole answers: their words, and the layers of their [SEG] tokens.

Each question gets a group of G sampled answers. An answer's advantage is its reward relative to its group's, and holds
for every token and every layer it chose: REINFORCE of Eq. 5 and 7, extended from the layer to the answer. The
clipped ratio and the divergence follow GRPO (DeepSeekMath, arXiv:2402.03300, Eq. 3 and 4).

Legend: A answers in the order of rows and questions, M their tokens, N their [SEG], L hidden states, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from model.decoders.base import MASKS_AT_ONCE
from model.generation import codebook_positions, per_target
from model.objective import UGroundOutput
from model.PPM import Grounding, policy_entropy
from model.rewards import SampledAnswer, rewards_of, weights_of
from model.settings import GrpoSettings
from model.structures import EPSILON, Batch

if TYPE_CHECKING:
    from model.backbones.base import LanguageOutput
    from model.grounding import GroundingModel


@dataclass
class SampledAnswers:
    """Answers to a batch's questions, G per question, packed in the rows of their images.

    Attributes:
        batch: the rows; its labels are the answers, its masks are empty, one per [SEG].
        targets: per question, [m, H, W] uint8 of its targets.
        owners: [M] int64, the answer of each token; written: [M] bool, tokens that the model chose (not those that
            were given: the opening of a thought); segs: [N] int64, which tokens are [SEG] (of a codebook, the
            first).
        details: per answer, what rewards know of its tokens; masks and maps follow from the forward pass.
        count: 0-d float32, the mean number of answers per micro step and process in the optimizer step.
        settings: of the objective.
        old: what the first update found; None before.
    """

    batch: Batch
    targets: list[torch.Tensor]
    owners: torch.Tensor
    written: torch.Tensor
    segs: torch.Tensor
    details: list[dict[str, Any]]
    count: torch.Tensor
    settings: GrpoSettings
    old: FirstPass | None = None


@dataclass
class FirstPass:
    """What stays fixed while a group is learned from: all detached.

    Attributes:
        layers: [N] sampled layers; log_probs: [M] of the tokens; log_layers: [N] of the layers.
        reference: [M] log-probabilities of the tokens without LoRA; None without ``grpo_kl``.
        rewards: [A, names] unweighted; advantages: [A].
    """

    layers: torch.Tensor
    log_probs: torch.Tensor
    log_layers: torch.Tensor
    reference: torch.Tensor | None
    rewards: torch.Tensor
    advantages: torch.Tensor


def group_advantages(rewards: torch.Tensor, group: int, scale: bool) -> torch.Tensor:
    """Rewards relative to the mean of their group, over its standard deviation with ``scale``.

    Args:
        rewards: [A], the answers to a question side by side; group: G.

    Returns:
        [A]; zeros for a group whose rewards are equal.
    """
    groups = rewards.view(-1, group)
    centered = groups - groups.mean(1, keepdim=True)
    if scale:
        deviation = (centered.square().sum(1, keepdim=True) / (group - 1)).sqrt()
        centered = torch.where(deviation > EPSILON, centered / deviation.clamp(min=EPSILON), 0.0)
    return centered.flatten()


def clipped_objective(
    log_probs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """min(r A, clip(r) A) with the ratio r of new to old probability, and whether clipping took its gradient.

    Args:
        log_probs, old, advantages: [M], of each action.

    Returns:
        [M] and [M] bool.
    """
    ratio = (log_probs - old).exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return torch.minimum(plain, clipped), clipped.detach() < plain.detach()


def divergence(log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL(policy, reference) of each token, estimated without bias and never negative: [M], [M] -> [M]."""
    ratio = reference - log_probs
    return ratio.exp() - ratio - 1


def token_log_probs(logits: torch.Tensor, ids: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token at the sampling temperature, and the entropy there (detached).

    Args:
        logits: [M, V]; ids: [M].

    Returns:
        [M] and [M], float32.
    """
    log_policy = (logits.float() / temperature).log_softmax(-1)
    detached = log_policy.detach()
    return log_policy.gather(1, ids[:, None])[:, 0], -(detached.exp() * detached).sum(-1)


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """The language model as it was before LoRA, inside: the reference, which costs no second model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True  # enable_adapters would also switch requires_grad, which ZeRO watches
    try:
        yield
    finally:
        for layer, value in zip(layers, before):
            layer._disable_adapters = value


def forward_sampled(
    model: GroundingModel, sampled: SampledAnswers, embeddings: torch.Tensor | None = None
) -> UGroundOutput:
    """The loss of sampled answers (``group_loss``). In the first update, layers are sampled and masks rewarded.

    Args:
        embeddings: [B, ...] of the mask decoder, if they are known.
    """
    batch, settings, rule = sampled.batch, sampled.settings, model.config.selection
    reference = None
    if sampled.old is None and settings.grpo_kl:
        with torch.no_grad(), without_lora(model):
            reference, _ = answer_log_probs(model, model.forward_language(batch), batch, settings.grpo_temperature)
    output = model.forward_language(batch)
    log_probs, entropy = answer_log_probs(model, output, batch, settings.grpo_temperature)
    size = model.config.codebook_size
    states, _ = per_target(output.at(codebook_positions(batch.seg_positions, size)), size)
    log_policy = model.ppm.log_policy(states)

    def log_layers(layers: torch.Tensor) -> torch.Tensor:
        trained = rule.gate == "policy" and settings.grpo_layers != "off"
        chosen = log_policy.gather(1, layers[:, None])[:, 0]
        return chosen if trained else torch.zeros_like(chosen)

    if sampled.old is None:
        with torch.no_grad():
            grounding = model.ground_targets(output, batch, rule)
            layers = model.choose_layers(rule, grounding, batch.sample_ids, model.config.policy_seed)
            if embeddings is None:
                embeddings = model.visual_model.embed_images(batch, output.clip_states)
            masks = masks_in_parts(model, grounding, layers, embeddings, batch)
            sampled.old = first_pass(sampled, *masks, layers, log_probs, log_layers(layers), reference)
    layers = sampled.old.layers
    loss, terms = group_loss(sampled, log_probs, entropy, log_layers(layers), model.config.policy_loss_weight)
    policy = log_policy.detach().exp()
    if rule.gate == "policy":
        terms["grpo_layer_entropy"] = policy_entropy(log_policy.detach()).sum() / sampled.count.clamp(min=EPSILON)
    return UGroundOutput(loss, terms, [], [], layers, policy, policy.new_zeros(0), loss.new_zeros(()))


def answer_log_probs(
    model: GroundingModel, output: LanguageOutput, batch: Batch, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``token_log_probs`` of a batch's answers; output: of ``forward_language(batch)``."""
    logits = model.lm_head(output.hidden[-1].flatten(0, 1)[batch.label_positions])
    return token_log_probs(logits, batch.label_ids, temperature)


def masks_in_parts(
    model: GroundingModel, grounding: Grounding, layers: torch.Tensor, embeddings: torch.Tensor, batch: Batch
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Mask logits and maps of ``mask_as_prompt``, ``MASKS_AT_ONCE`` at a time: a model may sample many [SEG]."""
    if len(layers) <= MASKS_AT_ONCE or grounding.fused is not None:
        return model.mask_as_prompt(grounding, layers, embeddings, batch)[:2]
    parts = [
        model.mask_as_prompt(grounding.select_tokens(segs.tolist()), layers[segs], embeddings, batch)[:2]
        for segs in torch.arange(len(layers)).split(MASKS_AT_ONCE)
    ]
    logits, maps = ([torch.cat(rows) for rows in zip(*of_parts)] for of_parts in zip(*parts))
    return logits, maps


def first_pass(
    sampled: SampledAnswers,
    mask_logits: list[torch.Tensor],
    maps: list[torch.Tensor],
    layers: torch.Tensor,
    log_probs: torch.Tensor,
    log_layers: torch.Tensor,
    reference: torch.Tensor | None,
) -> FirstPass:
    """Rewards and advantages of the answers, from the masks of the layers that were sampled for them.

    Args:
        mask_logits, maps: per row [N_b, H, W]; the others as in ``FirstPass``.
    """
    settings = sampled.settings
    weights = weights_of(settings.grpo_rewards)
    answers = _answers(sampled, mask_logits, maps)
    rewards = rewards_of(answers, list(weights))
    total = rewards @ torch.tensor(list(weights.values()))
    advantages = group_advantages(total, settings.grpo_answers, settings.grpo_scale)
    device = log_probs.device
    detached = log_probs.detach(), log_layers.detach(), reference
    return FirstPass(layers, *detached, rewards.to(device), advantages.to(device))


def _answers(
    sampled: SampledAnswers, mask_logits: list[torch.Tensor], maps: list[torch.Tensor]
) -> Iterator[SampledAnswer]:
    """The answers with their masks, in order."""
    number = 0
    for row, answers in enumerate(sampled.batch.questions):
        start = 0
        for _ in range(answers):
            details = dict(sampled.details[number])
            end, start = start + int(details.pop("segs")), start + int(details.pop("in_thought"))
            masks = mask_logits[row][start:end], maps[row][start:end]
            target = sampled.targets[number // sampled.settings.grpo_answers]
            yield SampledAnswer(**details, masks=masks[0], maps=masks[1], targets=target)
            number, start = number + 1, end


def group_loss(
    sampled: SampledAnswers,
    log_probs: torch.Tensor,
    entropy: torch.Tensor,
    log_layers: torch.Tensor,
    policy_loss_weight: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of the sampled answers, after ``first_pass``.

    Each answer's mean over its tokens counts alike, whatever its length.

    Args:
        log_probs, entropy: [M], of ``token_log_probs``; log_layers: [N], of the sampled layers.
        policy_loss_weight: of the layers' own ratio (``grpo_layers: apart``).

    Returns:
        the loss, and terms to log, by name, 0-d and detached. Their means over the micro steps and ranks of an
        optimizer step are the step's values.
    """
    settings, old = sampled.settings, sampled.old
    assert old is not None
    owner, written, number = sampled.owners, sampled.written, len(sampled.details)
    new, before = log_probs, old.log_probs
    if settings.grpo_layers == "joint":
        new = new.index_add(0, sampled.segs, log_layers)
        before = before.index_add(0, sampled.segs, old.log_layers)
    gain, clipped = clipped_objective(new, before, old.advantages[owner], settings.grpo_clip)

    def per_answer(values: torch.Tensor, owners: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The sum over answers of the mean over their actions, by the count in the whole step."""
        shares = torch.ones_like(values) if mask is None else mask.to(values.dtype)
        sums = values.new_zeros(2, number).index_add(1, owners, torch.stack([values * shares, shares]))
        return (sums[0] / sums[1].clamp(min=1)).sum() / sampled.count.clamp(min=EPSILON)

    loss = -per_answer(gain, owner, written)
    terms = {"grpo": loss}
    if settings.grpo_layers == "apart":
        seg_owner = owner[sampled.segs]
        of_layers, _ = clipped_objective(log_layers, old.log_layers, old.advantages[seg_owner], settings.grpo_clip)
        terms["grpo_layer"] = -per_answer(of_layers, seg_owner)
        loss = loss + policy_loss_weight * terms["grpo_layer"]
    if old.reference is not None:
        terms["grpo_kl"] = per_answer(divergence(log_probs, old.reference), owner, written)
        loss = loss + settings.grpo_kl * terms["grpo_kl"]
    terms["grpo_entropy"] = per_answer(entropy, owner, written)
    terms["grpo_clipped"] = per_answer(clipped.float(), owner, written)
    each, weights = sampled.count.clamp(min=EPSILON), weights_of(settings.grpo_rewards)
    means = {name: rewards.sum() / each for name, rewards in zip(weights, old.rewards.unbind(1), strict=True)}
    terms["grpo_reward"] = torch.stack([weight * means[name] for name, weight in weights.items()]).sum()
    terms |= {f"grpo_reward_{name}": value for name, value in means.items()}
    terms |= {"grpo_tokens": len(log_probs) / each, "grpo_segs": len(sampled.segs) / each}
    groups = old.advantages.view(-1, settings.grpo_answers)
    terms["grpo_equal"] = (groups.abs() < EPSILON).all(1).float().sum() * settings.grpo_answers / each
    return loss, {name: value.detach() for name, value in terms.items()}
