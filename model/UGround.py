"""UGround: LLaVA writes an answer with [SEG] tokens, PPM turns each into prompts, SAM draws the masks.

Legend: B images (rows), T tokens, N [SEG] tokens, L hidden states, P image tokens, D hidden size, M learned tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import distributed, nn
from transformers import AutoConfig

from model import losses
from model.generation import read_given, write_answers
from model.llava import LlavaLlamaConfig, LlavaLlamaForCausalLM
from model.PPM import (
    PolicyPromptedMasking,
    gumbel_noise,
    maps_at,
    mask_prompts,
    normalise_maps,
    parse_layer_policy,
    similarity_of_all_layers,
)
from model.sam import SamShape, SegmentAnything
from utils.types import Batch, Prediction

EPSILON = 1e-6
CHOICES = {
    "map_normalization": ("valid", "all"),
    "phi_layer": ("chosen", "last"),
    "reward": ("seg", "batch"),
    "baseline": ("average", "critic"),
    "positive_weight": ("mask", "image"),
}
RELEASED = {  # how the paper's published checkpoints were trained and are evaluated, where that is not the paper
    "first_candidate_layer": 0,
    "eval_layer_policy": "last",
    "reward": "batch",
    "map_normalization": "all",
    "map_side": 336,
    "positive_weight": "image",
    "policy_loss_weight": 0.4,
}


class UGroundConfig(LlavaLlamaConfig):
    """Sizes of the three parts, ids of the special tokens, and the method's settings (paper's values as defaults).

    Args:
        sam_config: ``SamShape`` as a dictionary.
        seg_token_id, rej_token_id: ids of ``[SEG]`` and ``[REJ]``.
        layer_selection: the layer a [SEG] connects from in training: ``policy`` (SSC), ``last``, ``uniform``,
            ``fixed:K``.
        first_candidate_layer: 1 = the paper's layers, 0 = the embeddings too (released weights).
        phi_layer: ``chosen`` = phi reads the layer that the map is taken from, ``last`` = always the last one.
        eval_layer_policy: which layer ``predict`` takes unless told otherwise; None = the one that training taught
            (``layer_policy``).
        seg_prompt, mask_prompt: phi([SEG]) and the similarity map as SAM prompts (Table 6).
        reward: ``seg`` = one per [SEG] (Algorithm 1), ``batch`` = one sum for all of a batch (released).
        baseline: what the reward is compared with, its moving ``average`` (Algorithm 1) or a ``critic``'s guess.
        baseline_decay: alpha of the moving average; critic_width: hidden units of the critic.
        map_normalization: ``valid`` = min-max over patches that show the image, ``all`` = padded ones too (released).
        map_side: side of the padded square on which a map is enlarged first; 0 = CLIP's input side.
        gaussian_kernel, gaussian_sigma: softening of the ground truth, in pixels.
        positive_weight: of the map's loss, background over foreground of each ``mask``, or of all masks of an
            ``image`` together (released).
        *_loss_weight: lambda of Eq. 8 and 9; the critic's is a share of the policy's.
        policy_seed: seeds the sampled layers, together with the sample's number.
    """

    model_type = "uground"

    def __init__(
        self,
        sam_config: dict | None = None,
        seg_token_id: int | None = None,
        rej_token_id: int | None = None,
        layer_selection: str = "policy",
        first_candidate_layer: int = 1,
        phi_layer: str = "chosen",
        eval_layer_policy: str | None = None,
        seg_prompt: bool = True,
        mask_prompt: bool = True,
        reward: str = "seg",
        baseline: str = "average",
        baseline_decay: float = 0.9,
        critic_width: int = 128,
        map_normalization: str = "valid",
        map_side: int = 0,
        gaussian_kernel: int = 31,
        gaussian_sigma: float = 7.0,
        positive_weight: str = "mask",
        text_loss_weight: float = 1.0,
        mask_loss_weight: float = 1.0,
        map_loss_weight: float = 1.0,
        policy_loss_weight: float = 0.1,
        critic_loss_weight: float = 1.0,
        bce_loss_weight: float = 2.0,
        dice_loss_weight: float = 4.0,
        policy_seed: int = 0,
        **kwargs,
    ) -> None:
        self.sam_config = sam_config or SamShape().to_dict()
        self.seg_token_id, self.rej_token_id = seg_token_id, rej_token_id
        self.layer_selection, self.first_candidate_layer = layer_selection, first_candidate_layer
        self.phi_layer, self.eval_layer_policy = phi_layer, eval_layer_policy
        self.seg_prompt, self.mask_prompt = seg_prompt, mask_prompt
        self.reward, self.map_normalization = reward, map_normalization
        self.baseline, self.baseline_decay, self.critic_width = baseline, baseline_decay, critic_width
        self.gaussian_kernel, self.gaussian_sigma = gaussian_kernel, gaussian_sigma
        self.map_side, self.positive_weight = map_side, positive_weight
        self.text_loss_weight, self.mask_loss_weight = text_loss_weight, mask_loss_weight
        self.map_loss_weight, self.policy_loss_weight = map_loss_weight, policy_loss_weight
        self.critic_loss_weight = critic_loss_weight
        self.bce_loss_weight, self.dice_loss_weight = bce_loss_weight, dice_loss_weight
        self.policy_seed = policy_seed
        super().__init__(**kwargs)
        self.check_settings()

    @property
    def layer_policy(self) -> str:
        """How ``predict`` chooses layers: the mode of a trained policy, or as in training where that had none."""
        taught = "argmax" if self.layer_selection == "policy" else self.layer_selection
        return self.eval_layer_policy or taught

    def check_settings(self) -> None:
        """Raises ValueError if a setting has no meaning."""
        parse_layer_policy(self.layer_selection, self.num_hidden_layers + 1)
        parse_layer_policy(self.layer_policy, self.num_hidden_layers + 1)
        if not (self.seg_prompt or self.mask_prompt):
            raise ValueError("seg_prompt and mask_prompt are both off: SAM would have no prompt; switch one on")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use {' or '.join(map(repr, choices))}")


AutoConfig.register(UGroundConfig.model_type, UGroundConfig, exist_ok=True)  # AutoTokenizer asks for it


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


@dataclass
class Grounding:
    """[SEG] tokens of a batch, ready for masking.

    Attributes:
        states: [N, L, D]; scores: [N, L, P] similarities (Eq. 6); log_policy: [N, L].
        rows: [N] on the model's device; counts: [SEG] per row, on the host.
    """

    states: torch.Tensor
    scores: torch.Tensor
    log_policy: torch.Tensor
    rows: torch.Tensor
    counts: list[int]


class UGroundForCausalLM(LlavaLlamaForCausalLM):
    """LLaVA with Policy-Prompted Masking in front of SAM's decoder."""

    config_class = UGroundConfig

    def __init__(self, config: UGroundConfig) -> None:
        super().__init__(config)
        sam = SamShape(**config.sam_config)
        self.visual_model = SegmentAnything(sam)
        width = config.hidden_size
        phi = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, sam.prompt_width))
        self.text_hidden_fcs = nn.ModuleList([phi])
        self.ppm = PolicyPromptedMasking(
            config.num_hidden_layers + 1,
            width,
            config.first_candidate_layer,
            config.baseline_decay,
            config.critic_width if config.baseline == "critic" else 0,
        )
        self.post_init()

    # ------------------------------------------------------------------ training

    def forward(self, batch: Batch | None = None, **kwargs) -> UGroundOutput:
        """One training step's forward pass; without a batch, LLaMA's own forward.

        Args:
            batch: packed rows with ground truth; see ``Batch``.
        """
        if batch is None:
            return super().forward(**kwargs)
        # A rank without masks must touch every parameter too, and in the same order on all ranks: ZeRO adds up
        # gradients as they arrive. Made first, this sum is last in the backward pass, and completes them all.
        anchor = sum(p.sum(dtype=torch.float32) for p in self.parameters() if p.requires_grad)
        output, valid = self.read_batch(batch)
        counts = [len(masks) for masks in batch.masks]
        states = torch.stack([layer.flatten(0, 1)[batch.seg_positions] for layer in output.hidden], dim=1)
        grounding = self.ground(output.hidden, states, batch.seg_rows, counts, batch.image_start)
        noise = gumbel_noise(batch.numbers, _repeat(counts), self.ppm.num_layers, self.config.policy_seed)
        layers = self.ppm.choose(grounding.log_policy, self.config.layer_selection, noise.to(self.device))
        mask_logits, maps = self.draw(grounding, layers, self.visual_model.encode(batch.sam_images), valid, batch)
        logits = self.lm_head(output.hidden[-1].flatten(0, 1)[batch.label_positions])
        result = self.objective(batch, logits, mask_logits, maps, layers, grounding.log_policy)
        result.loss = result.loss + 0.0 * anchor
        return result

    def ground(
        self,
        hidden: tuple[torch.Tensor, ...],
        states: torch.Tensor,
        seg_rows: torch.Tensor,
        counts: list[int],
        image_start: int,
    ) -> Grounding:
        """Everything that PPM derives from the [SEG] states [N, L, D] before a layer is chosen."""
        image = slice(image_start, image_start + self.config.num_image_tokens)
        scores = similarity_of_all_layers(hidden, states, seg_rows, image)
        return Grounding(states, scores, self.ppm.log_policy(states), seg_rows, counts)

    def draw(
        self,
        grounding: Grounding,
        layers: torch.Tensor,
        embeddings: torch.Tensor,
        valid: torch.Tensor,
        batch: Batch,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Mask as Prompt: the chosen layers' maps and tokens prompt SAM.

        Args:
            layers: [N]; embeddings: [B, E, G, G] of SAM; valid: [B, P] patches that show the image.

        Returns:
            Per row, [N_b, H, W] mask logits and [N_b, H, W] similarity maps, float32.
        """
        each = torch.arange(len(layers), device=layers.device)
        keep = valid[grounding.rows] if self.config.map_normalization == "valid" else None
        maps = normalise_maps(grounding.scores[each, layers], keep)
        side, sam = self.config.map_side or self.config.clip_side, self.visual_model
        full_maps = [maps_at(rows, side, size) for rows, size in zip(maps.split(grounding.counts), batch.sizes)]
        tokens = prompts = None
        if self.config.seg_prompt:
            read = layers if self.config.phi_layer == "chosen" else self.config.num_hidden_layers
            tokens = self.text_hidden_fcs[0](grounding.states[each, read])[:, None]
        if self.config.mask_prompt:
            prompts = torch.cat([mask_prompts(rows, sam.mask_side) for rows in full_maps])
        low_res = sam.decode(embeddings[grounding.rows], tokens, prompts)
        logits = [
            sam.upscale(rows, tuple(resized), size)
            for rows, resized, size in zip(low_res.split(grounding.counts), batch.sam_sizes.tolist(), batch.sizes)
        ]
        return logits, full_maps

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

    # ------------------------------------------------------------------ inference

    @torch.inference_mode()
    def predict(
        self,
        batch: Batch,
        layer_policy: str | None = None,
        max_new_tokens: int = 64,
        seed: int = 0,
        on_token: Callable[[list[int]], None] | None = None,
    ) -> list[list[Prediction]]:
        """Answers every question of every image; a mask per [SEG].

        Rows with answers are read in one pass (teacher forced); rows without are continued greedily, all questions of
        an image on one cache in which the image stands once.

        Args:
            batch: from ``UGroundProcessor.prompts``.
            layer_policy: ``argmax`` (the policy's mode), ``last``, ``sample``, ``uniform``, ``fixed:K``, or ``mc:T``:
                the mean mask of T sampled layers. None = the configuration's ``layer_policy``.
            max_new_tokens: longest answer.
            seed: of sampled layers, together with the sample numbers of the batch.
            on_token: called after each step with the newest token of every question (flat, image by image).

        Returns:
            [image][question] predictions; ``text`` is left empty (the processor decodes it).
        """
        layer_policy = layer_policy or self.config.layer_policy
        parse_layer_policy(layer_policy, self.ppm.num_layers)
        given = len(batch.label_ids) > 0
        output, valid = self.read_batch(batch, use_cache=not given)
        if given:
            answers = read_given(self, batch, output)
        else:
            answers = write_answers(self, batch, output, max_new_tokens, on_token)
        counts = [sum(row == b for row, _ in answers.places) for b in range(len(batch.sizes))]
        rows = torch.tensor(_repeat(counts), dtype=torch.int64, device=self.device)
        grounding = self.ground(output.hidden, answers.states, rows, counts, batch.image_start)
        embeddings = self.visual_model.encode(batch.sam_images)
        masks, maps, layers = self.draw_by_policy(grounding, embeddings, valid, batch, layer_policy, seed)
        policy = grounding.log_policy.exp().cpu()

        def prediction(row: int, question: int) -> Prediction:
            mine = [n for n, place in enumerate(answers.places) if place == (row, question)]
            nothing = torch.zeros(0, *batch.sizes[row])
            return Prediction(
                text="",
                token_ids=answers.token_ids[row][question],
                mask_logits=torch.stack([masks[n] for n in mine]).cpu() if mine else nothing,
                maps=torch.stack([maps[n] for n in mine]).cpu() if mine else nothing,
                layers=[layers[n] for n in mine],
                policy=policy[mine],
                rejected=[answers.rejected[n] for n in mine],
            )

        return [[prediction(b, k) for k in range(count)] for b, count in enumerate(batch.questions)]

    def draw_by_policy(
        self, grounding: Grounding, embeddings: torch.Tensor, valid: torch.Tensor, batch: Batch, how: str, seed: int
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[int]]:
        """N mask logits [H, W], N similarity maps [H, W] and N layers (``mc:T``: means, and the layer drawn most)."""
        kind, samples = parse_layer_policy(how, self.ppm.num_layers)
        repeated = _repeat(grounding.counts)

        def layers_of(draw: int) -> torch.Tensor:
            noise = gumbel_noise(batch.numbers, repeated, self.ppm.num_layers, seed + 104_729 * draw)
            return self.ppm.choose(grounding.log_policy, how, noise.to(self.device))

        def draw(layers: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
            logits, maps = self.draw(grounding, layers, embeddings, valid, batch)
            return [mask for row in logits for mask in row], [mask for row in maps for mask in row]

        if kind != "mc" or not repeated:
            layers = layers_of(0)
            return *draw(layers), layers.tolist()
        drawn = torch.stack([layers_of(t) for t in range(samples)])  # [samples, N]
        nothing = torch.zeros((), device=self.device)
        probability, similarity = [nothing] * len(repeated), [nothing] * len(repeated)
        for layer in drawn.unique().tolist():  # a layer is decoded once, however often it was drawn
            share = (drawn == layer).float().mean(0).tolist()
            for n, (mask, similar) in enumerate(zip(*draw(torch.full_like(drawn[0], layer)))):
                probability[n] = probability[n] + share[n] * mask.sigmoid()
                similarity[n] = similarity[n] + share[n] * similar
        return [torch.logit(p, eps=EPSILON) for p in probability], similarity, drawn.mode(0).values.tolist()


def _repeat(counts: list[int]) -> list[int]:
    """[2, 0, 1] -> [0, 0, 2]: the row of each [SEG]."""
    return [row for row, count in enumerate(counts) for _ in range(count)]


def _mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(values)
        values = values / distributed.get_world_size()
    return values
