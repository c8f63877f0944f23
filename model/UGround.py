"""UGround: LLaVA writes an answer with [SEG] tokens, PPM turns each into prompts, SAM draws the masks.

Legend: B images (rows), T tokens, N [SEG] tokens, L hidden states, P image tokens, D hidden size, M learned tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from model.config import UGroundConfig
from model.generation import GenerationOutput, generate_answers, teacher_forced_answers
from model.geometry import maps_at, mask_prompts, normalise_maps
from model.layer_rules import LayerRule
from model.llava import LlavaLlamaForCausalLM
from model.objective import Objective, UGroundOutput
from model.points import map_points, read_points
from model.PPM import (
    Grounding,
    PolicyPromptedMasking,
    fuse_layers,
    gumbel_noise,
    similarity_of_all_layers,
)
from model.sam import SamShape, SegmentAnything
from model.structures import Batch, MaskUncertainty, Prediction, Prompts
from model.uncertainty import MonteCarlo

MASKS_AT_ONCE = 32  # that SAM decodes for the mean of several samples
Decode = Callable[[Grounding, torch.Tensor], tuple[list[torch.Tensor], list[torch.Tensor]]]  # ``draw`` of [SEG], layers
__all__ = ["Grounding", "UGroundConfig", "UGroundForCausalLM", "UGroundOutput"]


@dataclass
class LanguagePass:
    """What LLaVA said about a batch, with all that masks need: they can be drawn again and again, by other layers.

    Attributes:
        hidden: L tensors [B, T, D], of which the image tokens are read.
        valid: [B, P] patches that show the image.
        embeddings: [B, E, G, G] of SAM; None if no answer has a [SEG].
    """

    batch: Batch
    answers: GenerationOutput
    hidden: tuple[torch.Tensor, ...]
    valid: torch.Tensor
    embeddings: torch.Tensor | None


@dataclass
class MaskPrediction:
    """A [SEG] token's mask: [H, W] logits, [H, W] similarity map, the layer, and with ``mc:T`` what the draws say."""

    logits: torch.Tensor
    similarity: torch.Tensor
    layer: int
    uncertainty: MaskUncertainty | None = None


class UGroundForCausalLM(LlavaLlamaForCausalLM):
    """LLaVA with Policy-Prompted Masking in front of SAM's decoder."""

    config_class = UGroundConfig
    config: UGroundConfig  # type: ignore[assignment]  # transformers declares it less narrowly

    def __init__(self, config: UGroundConfig) -> None:
        super().__init__(config)
        sam = SamShape(**config.sam_config)
        self.visual_model = SegmentAnything(sam)
        width = config.hidden_size
        phi = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, sam.prompt_width))
        self.text_hidden_fcs = nn.ModuleList([phi])
        self.ppm = PolicyPromptedMasking(config)
        self.objective = Objective(config, self.ppm)
        self.post_init()

    # ------------------------------------------------------------------ training

    def forward(self, batch: Batch | None = None, all_layers: bool = False, **kwargs) -> UGroundOutput:
        """One training step's forward pass; without a batch, LLaMA's own forward.

        Args:
            batch: packed rows with ground truth; see ``Batch``.
            all_layers: also say how good the maps of all layers are (``layer_losses``).
        """
        if batch is None:
            return super().forward(**kwargs)
        # A rank without masks must touch every parameter too, and in the same order on all ranks: ZeRO adds up
        # gradients as they arrive. Made first, this sum is last in the backward pass, and completes them all.
        anchor = sum(p.sum(dtype=torch.float32) for p in self.parameters() if p.requires_grad)
        output, valid = self.forward_language(batch)
        counts = [len(masks) for masks in batch.masks]
        states = torch.stack([layer.flatten(0, 1)[batch.seg_positions] for layer in output.hidden], dim=1)
        rule = self.config.selection
        grounding = self.ground(output.hidden, states, batch.seg_rows, counts, batch.image_start, rule)
        noise = gumbel_noise(batch.sample_ids, _repeat(counts), self.ppm.num_layers, self.config.policy_seed)
        layers = rule.choose(grounding.log_policy, noise.to(self.device, non_blocking=True))
        embeddings = self.visual_model.encode(batch.sam_images, batch.image_keys)
        mask_logits, maps = self.draw(grounding, layers, embeddings, valid, batch)
        logits = self.lm_head(output.hidden[-1].flatten(0, 1)[batch.label_positions])
        layer_maps = None
        if all_layers or self.config.rewards_all_layers:
            layer_maps = self.normalised(grounding.scores.detach(), valid[grounding.rows][:, None])
        result = self.objective(batch, logits, mask_logits, maps, layers, grounding.log_policy, layer_maps)
        result.loss = result.loss + 0.0 * anchor
        return result

    def ground(
        self,
        hidden: tuple[torch.Tensor, ...],
        states: torch.Tensor,
        seg_rows: torch.Tensor,
        counts: list[int],
        image_start: int,
        rule: LayerRule,
    ) -> Grounding:
        """Everything that PPM derives from the [SEG] states [N, L, D] before a layer is chosen."""
        image = slice(image_start, image_start + self.config.num_image_tokens)
        scores = similarity_of_all_layers(hidden, states, seg_rows, image)
        log_policy, fused = self.ppm.log_policy(states), None
        if (weights := rule.weights(log_policy)) is not None:
            fused = fuse_layers(hidden, states, weights, seg_rows, image)
        return Grounding(states, scores, log_policy, seg_rows, counts, fused)

    def normalised(self, scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Similarities [..., P] as maps in [0, 1], by the configuration's ``map_normalization``; valid: [..., P]."""
        return normalise_maps(scores, valid if self.config.map_normalization == "valid" else None)

    def draw(
        self,
        grounding: Grounding,
        layers: torch.Tensor,
        embeddings: torch.Tensor,
        valid: torch.Tensor,
        batch: Batch,
        prompts: Prompts | None = None,
        sam: SegmentAnything | None = None,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Mask as Prompt: the chosen layers' maps and tokens prompt SAM.

        Args:
            layers: [N]; embeddings: [B, E, G, G] of SAM; valid: [B, P] patches that show the image.
            prompts: what SAM gets; None = as in training.
            sam: whose decoder it is; None = the model's own.

        Returns:
            Per row, [N_b, H, W] mask logits and [N_b, H, W] similarity maps, float32.
        """
        config, sam, prompts = self.config, sam or self.visual_model, prompts or Prompts.of(self.config)
        states, scores = grounding.taken(layers)
        keep = valid[grounding.rows]
        maps = self.normalised(scores, keep)
        side = config.map_side or config.clip_side
        per_image = zip(maps.split(grounding.counts), batch.sizes)
        full_maps = [maps_at(rows, side, size, config.clip_fit) for rows, size in per_image]
        tokens, dense = [], None
        if prompts.points:
            tokens.append(sam.embed_points(*self.points(prompts, maps, keep, grounding.counts, batch.sizes)))
        if prompts.seg:
            read = states if config.phi_layer == "chosen" else grounding.states[:, -1]
            tokens.append(self.text_hidden_fcs[0](read)[:, None])
        if prompts.mask:
            dense = torch.cat([mask_prompts(rows, sam.mask_side) for rows in full_maps])
        low_res = sam.decode(embeddings[grounding.rows], torch.cat(tokens, 1) if tokens else None, dense)
        logits = [
            sam.upscale(rows, resized, size)
            for rows, resized, size in zip(low_res.split(grounding.counts), batch.sam_sizes, batch.sizes)
        ]
        return logits, full_maps

    def points(
        self,
        prompts: Prompts,
        maps: torch.Tensor,
        keep: torch.Tensor,
        counts: list[int],
        sizes: list[tuple[int, int]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Similarity as points, by the prompts' rule; see ``map_points`` and ``read_points``."""
        count, rule, side = prompts.points, prompts.point_rule, self.visual_model.shape.image_size
        if rule == "extremes":
            return map_points(maps, keep, count, side)
        return read_points(maps, [sizes[row] for row in _repeat(counts)], count, side, rule)

    # ------------------------------------------------------------------ inference

    def predict(
        self,
        batch: Batch,
        layer_policy: str | None = None,
        max_new_tokens: int = 64,
        seed: int = 0,
        on_token: Callable[[list[int]], None] | None = None,
    ) -> list[list[Prediction]]:
        """Answers every question of every image; a mask per [SEG]. See ``answer`` and ``decode_masks``."""
        self.config.layer_rule(layer_policy)  # a mistake shows before minutes of writing
        return self.decode_masks(self.answer(batch, max_new_tokens, on_token), layer_policy, seed)

    @torch.inference_mode()
    def answer(
        self, batch: Batch, max_new_tokens: int = 64, on_token: Callable[[list[int]], None] | None = None
    ) -> LanguagePass:
        """LLaVA's part of ``predict``, and SAM's encoder.

        Rows with answers are read in one pass (teacher forced); rows without are continued greedily, all questions of
        an image on one cache in which the image stands once.

        Args:
            batch: from ``UGroundProcessor.prompts``.
            max_new_tokens: longest answer.
            on_token: called after each step with the newest token of every question (flat, image by image).
        """
        given = len(batch.label_ids) > 0
        output, valid = self.forward_language(batch, use_cache=not given)
        if given:
            answers = teacher_forced_answers(self, batch, output)
        else:
            answers = generate_answers(self, batch, output, max_new_tokens, on_token)
        embeddings = self.visual_model.encode(batch.sam_images, batch.image_keys) if answers.seg_questions else None
        return LanguagePass(batch, answers, output.hidden, valid, embeddings)

    @torch.inference_mode()
    def decode_masks(
        self,
        answered: LanguagePass,
        layer_policy: str | None = None,
        seed: int = 0,
        prompts: Prompts | None = None,
        sam: SegmentAnything | None = None,
    ) -> list[list[Prediction]]:
        """PPM's and SAM's part of ``predict``.

        Args:
            layer_policy: a rule of ``model.layer_rules``, such as ``argmax``, ``fixed:3``, or ``mc:16`` for the mean
                mask of 16 sampled layers with its uncertainty. None = the configuration's ``layer_policy``.
            seed: of sampled layers, together with the sample numbers of the batch.
            prompts, sam: what SAM's decoder gets, and whose it is; None = as in training, and the model's own.

        Returns:
            [image][question] predictions; ``text`` is left empty (the processor decodes it).
        """
        rule = self.config.layer_rule(layer_policy)
        batch, answers = answered.batch, answered.answers
        counts = [sum(row == b for row, _ in answers.seg_questions) for b in range(len(batch.sizes))]
        rows = torch.tensor(_repeat(counts), dtype=torch.int64, device=self.device)
        grounding = self.ground(answered.hidden, answers.states, rows, counts, batch.image_start, rule)
        drawn: list[MaskPrediction] = []
        if answered.embeddings is not None:
            embeddings, valid = answered.embeddings, answered.valid
            decode = partial(self.draw, embeddings=embeddings, valid=valid, batch=batch, prompts=prompts, sam=sam)
            drawn = self.decode_by_rule(rule, grounding, batch.sample_ids, seed, decode)
        policy = grounding.log_policy.exp().cpu()
        layer_maps = self.normalised(grounding.scores, answered.valid[rows][:, None]).cpu()

        def prediction(row: int, question: int) -> Prediction:
            mine = [n for n, place in enumerate(answers.seg_questions) if place == (row, question)]
            nothing = torch.zeros(0, *batch.sizes[row])
            return Prediction(
                text="",
                token_ids=answers.token_ids[row][question],
                mask_logits=torch.stack([drawn[n].logits for n in mine]).cpu() if mine else nothing,
                maps=torch.stack([drawn[n].similarity for n in mine]).cpu() if mine else nothing,
                layers=[drawn[n].layer for n in mine],
                policy=policy[mine],
                layer_maps=layer_maps[mine],
                rejected=[answers.rejected[n] for n in mine],
                uncertainty=[found for n in mine if (found := drawn[n].uncertainty) is not None],
            )

        return [[prediction(b, k) for k in range(count)] for b, count in enumerate(batch.questions)]

    def decode_by_rule(
        self, rule: LayerRule, grounding: Grounding, sample_ids: list[int], seed: int, decode: Decode
    ) -> list[MaskPrediction]:
        """The N masks (of a rule with several samples: their means, and the layer sampled most).

        Args:
            sample_ids: of the samples, which seed their layers together with ``seed``.
        """
        repeated = _repeat(grounding.counts)

        def layers_of(turn: int) -> torch.Tensor:
            noise = gumbel_noise(sample_ids, repeated, self.ppm.num_layers, seed + 104_729 * turn)
            return rule.choose(grounding.log_policy, noise.to(self.device, non_blocking=True))

        def each(grounding: Grounding, layers: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            logits, maps = decode(grounding, layers)
            return zip((mask for row in logits for mask in row), (mask for row in maps for mask in row))

        if not rule.samples:
            layers = layers_of(0)
            return [MaskPrediction(*both, layer) for both, layer in zip(each(grounding, layers), layers.tolist())]
        drawn = torch.stack([layers_of(t) for t in range(rule.samples)], 1)  # [N, T]
        shares = nn.functional.one_hot(drawn, self.ppm.num_layers).float().mean(1).cpu()  # [N, L]
        means = [MonteCarlo(share) for share in shares]
        pairs = shares.nonzero()  # a layer is decoded once for a [SEG], however often it was drawn
        for part in pairs.split(MASKS_AT_ONCE):
            which, layers = part[:, 0].tolist(), part[:, 1]
            for n, layer, both in zip(which, layers.tolist(), each(grounding.repeated(which), layers.to(self.device))):
                means[n].add(layer, *both)
        most = drawn.mode(1).values.tolist()
        return [
            MaskPrediction(mean.logits, mean.similarity, layer, mean.uncertainty()) for mean, layer in zip(means, most)
        ]


def _repeat(counts: list[int]) -> list[int]:
    """[2, 0, 1] -> [0, 0, 2]: the row of each [SEG]."""
    return [row for row, count in enumerate(counts) for _ in range(count)]
