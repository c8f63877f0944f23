"""The method on any backbone: it writes an answer with [SEG] tokens, PPM turns each into prompts, SAM decodes masks.

Legend: B images (rows), T tokens, N [SEG] tokens (N_b of row b), L hidden states, P cells of a map, D hidden size,
E, G width and side of SAM's image embedding, H x W an image's own size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from model.backbones.base import Backbone, LanguageOutput
from model.config import GroundingConfig
from model.decoders import DECODERS
from model.decoders.base import MASKS_AT_ONCE, MaskDecoder
from model.generation import (
    AS_IT_LIKES,
    GenerationOutput,
    codebook_positions,
    forward_questions,
    generate_answers,
    per_target,
    teacher_forced_answers,
)
from model.geometry import maps_at, mask_prompts, normalise_maps, split_maps
from model.group_policy import SampledAnswers, forward_sampled
from model.layer_rules import LayerRule
from model.objective import Objective, UGroundOutput
from model.points import sam_points
from model.PPM import (
    Grounding,
    PolicyPromptedMasking,
    fuse_layers,
    gumbel_noise,
    rows_of,
    similarity_of_all_layers,
)
from model.processing.thoughts import Opening
from model.settings import MASK_REWARDS
from model.structures import MAX_NEW_TOKENS, Batch, MaskUncertainty, Prediction, Prompts
from model.uncertainty import MonteCarlo, ambiguity

logger = logging.getLogger(__name__)


@dataclass
class LanguagePass:
    """Answers to a batch and their states: ``decode_masks`` can be called repeatedly, with other layer rules.

    Attributes:
        hidden: L tensors [B, T, D], which hold the image tokens' states.
        embeddings: [B, ...] of the mask decoder (SAM: [B, E, G, G]); None if no answer has a [SEG].
        past: the images' states with their KV cache, from which other questions go on; None if it is not kept.
    """

    batch: Batch
    answers: GenerationOutput
    hidden: tuple[torch.Tensor, ...]
    embeddings: torch.Tensor | None
    past: LanguageOutput | None = None


@dataclass
class MaskPrediction:
    """A [SEG] token's mask: [H, W] logits, [H, W] similarity map, the layer, the IoU that SAM's head predicts.

    With ``mc:T``, means over the samples, and the uncertainty.
    """

    logits: torch.Tensor
    similarity: torch.Tensor
    layer: int
    predicted_iou: float
    uncertainty: MaskUncertainty | None = None


def best_rated(masks: Iterable[tuple[int, MaskPrediction]], log_policy: torch.Tensor) -> list[MaskPrediction]:
    """Of each [SEG], the mask with the highest predicted IoU (NaN is the lowest); of equal ones the more probable
    layer's.

    Args:
        masks: ([SEG], mask), in order of the [SEG]; log_policy: [N, L].
    """
    best: dict[int, tuple[tuple[float, float], MaskPrediction]] = {}
    for n, mask in masks:  # the others are not kept
        rating = -math.inf if math.isnan(mask.predicted_iou) else mask.predicted_iou
        rank = rating, float(log_policy[n, mask.layer])
        if n not in best or rank > best[n][0]:
            best[n] = rank, mask
    return [mask for _, mask in best.values()]


class TouchAll(torch.autograd.Function):
    """A zero that depends on all tensors given, with a gradient of zero. It reads none of them."""

    @staticmethod
    def forward(ctx: Any, device: torch.device, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.shapes = [(tensor.shape, tensor.dtype) for tensor in tensors]
        return torch.zeros((), device=device)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        zeros = {dtype: torch.zeros((), dtype=dtype, device=gradient.device) for _, dtype in ctx.shapes}
        return None, *(zeros[dtype].expand(shape) for shape, dtype in ctx.shapes)


class GroundingModel(Backbone):
    """Policy-Prompted Masking in front of a mask decoder; a backbone's class comes after this one."""

    config: GroundingConfig  # type: ignore[assignment]  # transformers declares it less narrowly
    warned_of_full_training = False
    touched_modules: tuple[str, ...] = ("",)  # "" = the whole model; ZeRO-3 needs less (utils.training.zero3)

    def __init__(self, config: GroundingConfig) -> None:
        super().__init__(config)
        self.visual_model = DECODERS[config.mask_decoder].of(config)
        width = config.text.hidden_size
        phi = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.visual_model.prompt_width))
        self.text_hidden_fcs = nn.ModuleList([phi])
        self.ppm = PolicyPromptedMasking(config)
        self.objective = Objective(config, self.ppm)
        self.post_init()

    @property
    def clip_depths(self) -> tuple[int, ...]:
        return self.visual_model.clip_depths

    # ------------------------------------------------------------------ training

    def forward(
        self,
        batch: Batch | None = None,
        all_layers: bool = False,
        sampled: SampledAnswers | None = None,
        **kwargs,
    ) -> UGroundOutput:
        """One training step's forward pass; without a batch, transformers' own forward.

        Args:
            batch: packed rows with ground truth; see ``Batch``.
            all_layers: also compute the map losses of all layers (``UGroundOutput.layer_losses``).
            sampled: answers to the batch's questions, from whose rewards is learned, too, or with objective ``grpo``
                alone.
        """
        if batch is None:
            return super().forward(**kwargs)
        if self.training and not self.warned_of_full_training:
            self.warn_of_full_training()
        # A rank without masks must touch every parameter too, in the same order on all ranks: ZeRO reduces gradients
        # as they arrive. Computed first, this zero comes last in the backward pass, and completes them all.
        modules = map(self.get_submodule, self.touched_modules)
        touched = TouchAll.apply(self.device, *(p for each in modules for p in each.parameters() if p.requires_grad))
        if sampled is None:
            result, _ = self.forward_targets(batch, all_layers)
        elif sampled.settings.objective == "grpo":
            result = forward_sampled(self, sampled)
        else:
            result, embeddings = self.forward_targets(batch, all_layers)
            of_group = forward_sampled(self, sampled, embeddings)
            result.loss = result.loss + sampled.settings.grpo_weight * of_group.loss
            result.terms |= of_group.terms
        result.loss = result.loss + touched
        return result

    def forward_targets(self, batch: Batch, all_layers: bool) -> tuple[UGroundOutput, torch.Tensor]:
        """Eq. 9 of the ground truth, and the mask decoder's image embeddings."""
        output = self.forward_language(batch)
        rule = self.config.selection
        grounding = self.ground_targets(output, batch, rule)
        layers = self.choose_layers(rule, grounding, batch.sample_ids, self.config.policy_seed)
        embeddings = self.visual_model.embed_images(batch, output.clip_states)
        mask_logits, maps, predicted_iou = self.mask_as_prompt(grounding, layers, embeddings, batch)
        others = None
        if self.config.sampled_layers > 1:
            others = self.sample_others(rule, grounding, embeddings, batch)
        logits = self.lm_head(output.hidden[-1].flatten(0, 1)[batch.label_positions])
        layer_maps = None
        if all_layers or self.config.rewards_all_layers:
            layer_maps = self.layer_maps(grounding, batch)
        result = self.objective(
            batch,
            logits,
            mask_logits,
            maps,
            layers,
            grounding.log_policy,
            layer_maps,
            grounding.states,
            others,
            predicted_iou,
        )
        return result, embeddings

    def warn_of_full_training(self) -> None:
        """Logs once if the language model's own weights train, as they do without ``model.lora.add_lora``."""
        self.warned_of_full_training = True
        llama = (p for name, p in self.decoder_layers.named_parameters() if "lora_" not in name)
        if any(p.requires_grad for p in llama):
            trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
            logger.warning(
                "%s parameters train, the language model in full: call model.lora.add_lora(model, r) first to train "
                "LoRA, phi, the gate, SAM's decoder and the embeddings alone (r=0: the same without LoRA)",
                format(trained, ","),
            )

    def ground_targets(self, output: LanguageOutput, batch: Batch, rule: LayerRule) -> Grounding:
        """``ground`` of the [SEG] tokens that a batch with ground truth holds.

        Args:
            output: of ``forward_language(batch)``.
        """
        size, counts = self.config.codebook_size, [len(masks) for masks in batch.masks]
        states, codebook = per_target(output.at(codebook_positions(batch.seg_positions, size)), size)
        return self.ground(output.hidden, states, batch.seg_rows, counts, batch, rule, codebook)

    def ground(
        self,
        hidden: tuple[torch.Tensor, ...],
        states: torch.Tensor,
        seg_rows: torch.Tensor,
        counts: list[int],
        batch: Batch,
        rule: LayerRule,
        codebook: torch.Tensor | None = None,
    ) -> Grounding:
        """What PPM computes before a layer is chosen: the policy (Eq. 4) and all layers' similarities (Eq. 6).

        Args:
            hidden: L tensors [B, T, D]; states: [N, L, D] of the [SEG] tokens.
            seg_rows: [N] row of each [SEG]; counts: [SEG] tokens per row, on the host.
            batch: tells the image's tokens and their cells.
            rule: whether layers are fused, and with which weights.
            codebook: [N, K, L, D] of all of a target's tokens, if there are several; ``states`` is their mean.

        Returns:
            the [SEG] tokens with their scores, from which ``mask_as_prompt`` decodes chosen layers.

        Raises:
            ValueError: if maps depend on padded patches, and the batch lacks them.
        """
        if self.config.reads_padding and batch.image_tokens.shape != batch.valid.shape:
            raise ValueError(
                "map_normalization all reads padded patches, which the batch lacks: set keep_padding of its "
                "UGroundProcessor to True (model.load does)"
            )
        scores = similarity_of_all_layers(hidden, states, seg_rows, batch)
        log_policy, fused = self.ppm.log_policy(states), None
        if (weights := rule.weights(log_policy)) is not None:
            fused = fuse_layers(hidden, states, weights, seg_rows, batch)
        return Grounding(states, scores, log_policy, seg_rows, counts, fused, codebook, weights)

    def choose_layers(
        self, rule: LayerRule, grounding: Grounding, sample_ids: list[int], seed: int, trial: int = 0
    ) -> torch.Tensor:
        """The rule's layers [N]. Trials are independent; noise is a function of seed, trial and sample index."""
        rows, num_layers = rows_of(grounding.counts), self.ppm.num_layers
        noise = gumbel_noise(sample_ids, rows, num_layers, seed + 104_729 * trial)
        return rule.choose(grounding.log_policy, noise.to(self.device, non_blocking=True))

    @torch.no_grad()
    def sample_others(
        self,
        rule: LayerRule,
        grounding: Grounding,
        embeddings: torch.Tensor,
        batch: Batch,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The layers that leave_one_out samples beside the trained one, [N, K - 1], and the rewards of their masks.

        SAM decodes N masks at a time. A layer that is sampled twice is decoded twice: leaving it out would wait for the
        device.

        Returns:
            layers; rewards of the same shape, None if maps give the reward.
        """
        layers, rewards = [], []
        for trial in range(1, self.config.sampled_layers):
            layers.append(self.choose_layers(rule, grounding, batch.sample_ids, self.config.policy_seed, trial))
            if self.config.reward_terms in MASK_REWARDS:
                mask_logits, _, _ = self.mask_as_prompt(grounding, layers[-1], embeddings, batch)
                rewards.append(self.objective.mask_rewards(batch.masks, mask_logits))
        return torch.stack(layers, 1), torch.stack(rewards, 1) if rewards else None

    def normalised(self, scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Similarities [..., P] scaled to maps in [0, 1] (``map_normalization``); valid: [..., P] bool."""
        return normalise_maps(scores, None if self.config.reads_padding else valid)

    def layer_maps(self, grounding: Grounding, batch: Batch) -> list[torch.Tensor]:
        """The maps of all layers, detached: per row [N_b, L, h, w] in [0, 1]."""
        maps = self.normalised(grounding.scores.detach(), batch.valid[grounding.rows][:, None])
        return split_maps(maps, grounding.counts, batch.grids)

    def mask_as_prompt(
        self,
        grounding: Grounding,
        layers: torch.Tensor,
        embeddings: torch.Tensor,
        batch: Batch,
        prompts: Prompts | None = None,
        sam: MaskDecoder | None = None,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """Mask as Prompt (MasP, section 4.1): prompts SAM with the chosen layers' similarity maps and [SEG] states.

        Args:
            layers: [N]; embeddings: [B, ...] of the mask decoder.
            prompts: which prompts SAM gets; None = as in training.
            sam: the SAM that decodes; None = the model's own.

        Returns:
            Per row, [N_b, H, W] mask logits and [N_b, H, W] similarity maps, float32; the IoU [N] that SAM predicts.
        """
        config, sam, prompts = self.config, sam or self.visual_model, prompts or Prompts.of(self.config)
        states, scores = grounding.select_layers(layers)
        valid = batch.valid[grounding.rows]  # [N, P]
        maps = split_maps(self.normalised(scores, valid), grounding.counts, batch.grids)
        full_maps = [maps_at(rows, config.map_fit, size) for rows, size in zip(maps, batch.sizes)]
        tokens, dense = [], None
        if prompts.points:
            per_image = zip(maps, split_maps(valid, grounding.counts, batch.grids), batch.sizes)
            points = [sam_points(prompts, *image, config.map_fit, sam.fit) for image in per_image]
            tokens.append(sam.embed_points(*(torch.cat(part) for part in zip(*points))))
        if prompts.seg:
            tokens.append(self.seg_prompts(grounding, layers, states))
        if prompts.mask:
            dense = torch.cat([mask_prompts(rows, sam.mask_fit) for rows in full_maps])
        low_res, predicted_iou = sam.decode(embeddings[grounding.rows], torch.cat(tokens, 1) if tokens else None, dense)
        logits = [sam.postprocess(rows, size) for rows, size in zip(low_res.split(grounding.counts), batch.sizes)]
        return logits, full_maps, predicted_iou

    def seg_prompts(self, grounding: Grounding, layers: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Sparse prompts [N, S, E] of the [SEG] tokens, one for each of the decoder's scales.

        Of a codebook, phi of a scale's tokens are added with a constant weight, 1 / (their number in all scales), as in
        PixelLM.py (``multiseg_scalar``, which no checkpoint holds); PixelLM's section 3.2 has a learned layer there.

        Args:
            layers: [N]; states: [N, D] in these layers.
        """
        phi, last = self.text_hidden_fcs[0], self.config.phi_layer == "last"
        if grounding.codebook is None:
            return phi(grounding.states[:, -1] if last else states)[:, None]
        chosen = grounding.codebook[:, :, -1] if last else grounding.select_codebook(layers)  # [N, K, D]
        scales, size = self.config.num_scales, chosen.shape[1]
        by_scale = phi(chosen).unflatten(1, (scales, size // scales))  # [N, S, K / S, E]
        return by_scale.sum(2) * (1 / size if size > scales else 1.0)

    # ------------------------------------------------------------------ inference

    def predict(
        self,
        batch: Batch,
        layer_policy: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        seed: int = 0,
        on_token: Callable[[list[int]], None] | None = None,
        opening: Opening = AS_IT_LIKES,
    ) -> list[list[Prediction]]:
        """The answer to every question of every image, with a mask per [SEG]: ``answer``, then ``decode_masks``.

        Args:
            batch, max_new_tokens, on_token, opening: of ``answer``; layer_policy, seed: of ``decode_masks``.

        Returns:
            [image][question] predictions; ``text`` is left empty (the processor decodes it).

        Raises:
            ValueError: if the layer policy is unknown, or its layer does not exist.
        """
        self.config.layer_rule(layer_policy)  # fails before minutes of generation
        return self.decode_masks(self.answer(batch, max_new_tokens, on_token, opening), layer_policy, seed)

    def predict_rounds(
        self,
        batches: Sequence[Batch],
        answered: int = 0,
        layer_policy: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        seed: int = 0,
        opening: Opening = AS_IT_LIKES,
    ) -> Iterator[list[list[Prediction]]]:
        """``predict`` for several batches of questions about the same images, which are encoded once.

        The first batch is computed as ``predict`` computes it, to the last bit; the others go on from its images, so
        that their rounding may differ from that of ``predict``.

        Args:
            answered: number of batches at the start whose answers are known: they are computed as far as the later
                ones depend on them, and not yielded.
            layer_policy, max_new_tokens, seed, opening: of ``predict``.
        """
        self.config.layer_rule(layer_policy)
        earlier: LanguagePass | None = None
        for number, batch in enumerate(batches):
            known = number < answered
            length, keep = 0 if known else max_new_tokens, number + 1 < len(batches)
            earlier = self.answer(batch, length, opening=opening, earlier=earlier, keep=keep)
            if not known:
                yield self.decode_masks(earlier, layer_policy, seed)

    @torch.inference_mode()
    def answer(
        self,
        batch: Batch,
        max_new_tokens: int = MAX_NEW_TOKENS,
        on_token: Callable[[list[int]], None] | None = None,
        opening: Opening = AS_IT_LIKES,
        earlier: LanguagePass | None = None,
        keep: bool = False,
    ) -> LanguagePass:
        """Runs the language model and SAM's encoder, the parts of ``predict`` that do not depend on the layer rule.

        Answers in the batch are teacher-forced in one pass. Without answers, they are generated greedily, on one KV
        cache per image that all of its questions share.

        Args:
            batch: of ``UGroundProcessor.prompts``.
            max_new_tokens: longest answer.
            on_token: called after each step with the newest token of every question (flat, image by image).
            opening: how generated answers begin (``UGroundProcessor.opening``).
            earlier: a pass over the same images that was kept: only the questions are computed. It cannot be
                continued twice at the same time, as its cache is extended in place.
            keep: whether the result keeps its cache, for another round of questions.
        """
        given = len(batch.label_ids) > 0
        embeddings = None
        if earlier is None or earlier.past is None:
            output = images = self.forward_language(batch, use_cache=keep or not given)
        else:
            images, embeddings, seen = earlier.past, earlier.embeddings, earlier.batch.image_tokens
            batch, output = forward_questions(self, images, batch)
            batch = replace(batch, image_tokens=seen)  # they index the earlier pass's states
        if given:
            answers = teacher_forced_answers(self, batch, output)
        else:
            answers = generate_answers(self, batch, output, max_new_tokens, on_token, opening)
        if answers.seg_questions and embeddings is None:
            embeddings = self.visual_model.embed_images(batch, images.clip_states)
        return LanguagePass(batch, answers, images.hidden, embeddings, images if keep else None)

    @torch.inference_mode()
    def decode_masks(
        self,
        language_pass: LanguagePass,
        layer_policy: str | None = None,
        seed: int = 0,
        prompts: Prompts | None = None,
        sam: MaskDecoder | None = None,
    ) -> list[list[Prediction]]:
        """Runs PPM and SAM's decoder on the answers of ``answer``.

        Args:
            layer_policy: a rule of ``model.layer_rules``, such as ``argmax``, ``fixed:3``, or ``mc:16`` for the mean
                mask of 16 sampled layers with its uncertainty. None = the configuration's ``layer_policy``.
            seed: of sampled layers, together with the sample indices of the batch.
            prompts: which prompts SAM gets; None = as in training.
            sam: the SAM that decodes ``language_pass.embeddings``; None = the model's own.

        Returns:
            [image][question] predictions; ``text`` is left empty (the processor decodes it).

        Raises:
            ValueError: if the layer policy is unknown, or its layer does not exist.
        """
        rule = self.config.layer_rule(layer_policy)
        batch, answers = language_pass.batch, language_pass.answers
        counts = [sum(row == b for row, _ in answers.seg_questions) for b in range(len(batch.sizes))]
        rows = torch.tensor(rows_of(counts), dtype=torch.int64, device=self.device)
        grounding = self.ground(language_pass.hidden, answers.states, rows, counts, batch, rule, answers.codebook)
        masks: list[MaskPrediction] = []
        if language_pass.embeddings is not None:
            masks = self.decode_by_rule(rule, grounding, language_pass, seed, prompts, sam)
        policy = grounding.log_policy.exp().cpu()
        layer_maps = [maps for row in self.layer_maps(grounding, batch) for maps in row.cpu()]
        generated = len(batch.label_ids) == 0

        def prediction(row: int, question: int) -> Prediction:
            segs = [n for n, owner in enumerate(answers.seg_questions) if owner == (row, question)]
            no_masks = torch.zeros(0, *batch.sizes[row])
            no_layer_maps = torch.zeros(0, self.ppm.num_layers, *batch.grids[row])
            mask_logits = torch.stack([masks[n].logits for n in segs]).cpu() if segs else no_masks
            return Prediction(
                text="",
                token_ids=answers.token_ids[row][question],
                mask_logits=mask_logits,
                maps=torch.stack([masks[n].similarity for n in segs]).cpu() if segs else no_masks,
                layers=[masks[n].layer for n in segs],
                policy=policy[segs],
                layer_maps=torch.stack([layer_maps[n] for n in segs]) if segs else no_layer_maps,
                rejected=[answers.rejected[n] for n in segs],
                predicted_iou=[masks[n].predicted_iou for n in segs] if self.config.rates_masks else [],
                ambiguity=ambiguity(mask_logits).tolist(),
                uncertainty=[uncertainty for n in segs if (uncertainty := masks[n].uncertainty) is not None],
                cut=generated and answers.token_ids[row][question][-1:] != [self.config.eos_token_id],
            )

        return [[prediction(b, k) for k in range(count)] for b, count in enumerate(batch.questions)]

    def decode_by_rule(
        self,
        rule: LayerRule,
        grounding: Grounding,
        language_pass: LanguagePass,
        seed: int,
        prompts: Prompts | None,
        sam: MaskDecoder | None,
    ) -> list[MaskPrediction]:
        """The N masks. Of a rule with T samples (``mc:T``): the mean masks, and the layers sampled most often; of one
        that tries several layers (``best:K``): the masks that SAM rates best, of equal ones the more probable layer's.

        Args:
            language_pass: with SAM's embeddings; its sample indices and ``seed`` determine the sampled layers.
            prompts, sam: of ``decode_masks``.
        """
        batch, embeddings = language_pass.batch, language_pass.embeddings
        assert embeddings is not None

        def choose_layers(trial: int) -> torch.Tensor:
            return self.choose_layers(rule, grounding, batch.sample_ids, seed, trial)

        def decode(grounding: Grounding, layers: torch.Tensor) -> Iterator[MaskPrediction]:
            logits, maps, rated = self.mask_as_prompt(grounding, layers, embeddings, batch, prompts, sam)
            of_segs = chain.from_iterable(logits), chain.from_iterable(maps), layers.tolist(), rated.tolist()
            return (MaskPrediction(*mask) for mask in zip(*of_segs))

        def decode_pairs(chosen: torch.Tensor) -> Iterator[tuple[int, MaskPrediction]]:
            """([SEG], mask) of each layer that [N, L] ``chosen`` has for it, in order."""
            for pairs in chosen.cpu().nonzero().split(MASKS_AT_ONCE):
                segs = pairs[:, 0].tolist()
                yield from zip(segs, decode(grounding.select_tokens(segs), pairs[:, 1].to(self.device)))

        if (tried := rule.tried(grounding.log_policy)) is not None:
            return best_rated(decode_pairs(tried), grounding.log_policy.cpu())
        if not rule.samples:
            return list(decode(grounding, choose_layers(0)))
        sampled = torch.stack([choose_layers(trial) for trial in range(rule.samples)], 1)  # [N, T]
        shares = nn.functional.one_hot(sampled, self.ppm.num_layers).float().mean(1).cpu()  # [N, L]
        means = [MonteCarlo(share) for share in shares]
        for n, mask in decode_pairs(shares):  # a layer is decoded once for a [SEG], however often it was sampled
            means[n].add(mask.layer, mask.logits, mask.similarity, mask.predicted_iou)
        most = sampled.mode(1).values.tolist()
        return [
            MaskPrediction(mean.logits, mean.similarity, layer, mean.predicted_iou, mean.uncertainty())
            for mean, layer in zip(means, most)
        ]
