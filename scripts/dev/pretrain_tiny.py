"""Pre-trains the tiny families: LLaVA-1.5 and SAM in assets/tiny, Qwen2.5-VL and SAM 2 in assets/tiny_qwen.

Stages, each a function of its settings and the seed. Tokenizer and vision are skipped if their result exists:

    tokenizer      byte-level BPE over the texts of drawn scenes and the prompt templates
    vision         CLIP and projector: patch features name color, kind, size and texture of
                   the shape they lie on, by dot product with the language model's word
                   embeddings, and point to its center
    language       everything together: captions, questions with short answers, and finding
                   what a text means. The last layer's similarity map between [SEG] (and the
                   last prompt token) and the patches is trained to cover the target, and to
                   be empty when nothing fits. Only the LAST layer's, so that map quality
                   rises with depth, as it does in a real LLaVA
    conversations  more of the same, in conversations and with more questions about
                   relations; a middle layer's map learns to cover the shape that a relation
                   names
    sam            segment-anything's classes, small: masks of one shape from a point, a box,
                   a coarse noisy map, or a map and a point
    iou            SAM's head that predicts the IoU of its masks
    depths         another base, from a trained one (assets/tiny_depths): each kind of query
                   is grounded at a layer of its own

The real LLaVA-1.5 never saw [SEG]; ours has, because minutes of fine-tuning cannot teach a random language model what
"the shape farthest from the green square" means. The parts that UGround adds (phi, gate) are not touched here.

    python scripts/dev/pretrain_tiny.py --output assets/tiny             # two and a half hours, 2 cores
    python scripts/dev/pretrain_tiny.py --output /tmp/tiny --steps 0.01  # a look at every stage
    python scripts/dev/pretrain_tiny.py --stages depths --start assets/tiny --output assets/tiny_depths
    python scripts/dev/pretrain_tiny.py --family qwen --language assets/tiny --output assets/tiny_qwen

Qwen2.5-VL's tower has relative positions only. It learns where a shape's center is from a cell, and the language model
learns where a cell is, from its own positions, at an early layer. SAM 2 learns to predict masks' IoU in stage "sam".
assets/tiny_qwen was made on 2026-11-27 by its three stages, two at a time on two cores (--minutes vision=22,
conversations=75,sam=42), of 12 images, 8 images and 12 prompts a step. Seen:

    vision         color 0.99 after 190 steps; kind 0.56 after 394, 0.79 after 797, 0.92 after 1436,
                   0.98 at the end
    conversations  peaks on the target after 255 steps: attributes, common sense and several 0.97,
                   superlatives 0.91, relations 0.69; these 0.94 at the end. Thanks to --language the
                   loss of the text falls from 2.2 to 0.5 in 180 steps
    sam            IoU from a noisy map 0.75 after 400 steps, 0.91 at the end; points are learned
                   from step 1000 on
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import Sam2Config

from model.backbones.base import Backbone
from model.backbones.llava import LlavaLlamaForCausalLM
from model.backbones.qwen2_5_vl import UGroundQwen25VL
from model.decoders.sam2 import Sam2
from model.decoders.segment_anything import SegmentAnything
from model.losses import dice
from model.processing.processor import UGroundProcessor
from model.structures import Batch
from utils.command_line.parser import Parser
from utils.demo import tiny_model
from utils.demo.muon import Muon
from utils.demo.pretrain_batches import (
    ATTRIBUTES,
    CELL,
    MIXTURES,
    SIDE,
    language_batch,
    language_check_batch,
    sam_batch,
    stream,
    vision_batch,
)
from utils.demo.tiny_files import (
    load_llava,
    new_llava,
    new_qwen,
    save_base,
    save_sam2,
    start_language,
)

STAGE_STEPS = {"vision": 2800, "language": 3000, "conversations": 2400, "depths": 900, "sam": 4000, "iou": 600}
QWEN_STEPS = {"vision": 2727, "conversations": 2970, "sam": 5032}
FAMILIES = {"llava": STAGE_STEPS, "qwen": QWEN_STEPS}
# Stage "depths": the layer at which each kind of query is grounded.
DEPTHS = {"attribute": 4, "multi": 4, "commonsense": 6, "relation": 8, "superlative": 8}
LAST_LAYER = 8
REFERENCE_LAYER = 5  # where a relation's named shape is looked for
PLACE_LAYER = 2  # where Qwen's language model is to know where a cell is
VISION_SNAPSHOT = "work/vision.safetensors"  # below --output


class Length:
    """How long a stage is: a number of steps, or of minutes, for a machine whose speed is unknown.

    Attributes:
        steps: of the stage; with minutes, an upper bound.
    """

    def __init__(self, steps: int, minutes: float = 0.0) -> None:
        self.steps, self.seconds, self.start = 1_000_000 if minutes else steps, 60 * minutes, time.time()

    @property
    def warm_up(self) -> int:
        return 30 if self.seconds else max(1, min(200, self.steps // 10))

    def share(self, done: int) -> float:
        """The share of the stage that is over after ``done`` steps, at most 1."""
        return min(1.0, (time.time() - self.start) / self.seconds if self.seconds else done / self.steps)


class Optimizer:
    """Muon on matrices inside the networks, AdamW on the rest; linear warm-up, then down to zero."""

    def __init__(self, module: nn.Module, length: Length, muon_lr: float, adam_lr: float) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                inner = parameter.ndim == 2 and not any(key in name for key in ("embed", "lm_head", "token", "rel_pos"))
                (matrices if inner else others).append(parameter)
        self.optimizers = [
            Muon(matrices, muon_lr),
            torch.optim.AdamW(others, adam_lr, betas=(0.9, 0.98), weight_decay=0),
        ]
        self.base = [muon_lr, adam_lr]
        self.parameters, self.length, self.step_number = matrices + others, length, 0

    def step(self, loss: torch.Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        warm = min(1.0, (self.step_number + 1) / self.length.warm_up)
        scale = warm * min(1.0, 1.5 * (1 - self.length.share(self.step_number)))
        for optimizer, base in zip(self.optimizers, self.base):
            optimizer.param_groups[0]["lr"] = base * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step_number += 1


def to_device(data: dict, device: str) -> dict:
    """Moves tensors and batches; lists stay."""
    return {key: item.to(device) if isinstance(item, (torch.Tensor, Batch)) else item for key, item in data.items()}


# -------------------------------------------------------------------------------------------------------------- stages


class VisionHeads(nn.Module):
    """Heads that only the vision stage uses: embeddings of a background word, and a center."""

    def __init__(self, width: int, weights: Mapping[str, float] = MappingProxyType({})) -> None:
        super().__init__()
        self.weights = weights  # of attributes in the loss, 1 for the others
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.background_embed = nn.Parameter(torch.randn(len(ATTRIBUTES), width) * 0.1)
        self.center = nn.Linear(width, 2)

    def forward(
        self, features: torch.Tensor, words: dict[str, torch.Tensor], data: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """features [B, P, D], words per attribute [n, D] -> loss, accuracy per attribute on covered patches."""
        size = features.pow(2).mean(-1).clamp(min=1e-12).sqrt()  # 0 in the padding
        loss = 0.1 * (size - 1).pow(2).mean()  # features of another size name shapes, but drown in the residual stream
        features, accuracy = F.normalize(features, dim=-1), {"size_of_features": size.mean()}
        for a, (name, embeddings) in enumerate(words.items()):
            table = torch.cat([embeddings, self.background_embed[a : a + 1]])
            logits = 20 * self.scale * features @ F.normalize(table, dim=-1).mT
            labels = data["labels"][..., a]
            target = torch.where(labels == -1, len(embeddings), labels)
            known = target >= 0
            loss = loss + self.weights.get(name, 1.0) * F.cross_entropy(logits[known], target[known])
            shape = labels >= 0
            accuracy[name] = (logits[shape].argmax(-1) == labels[shape]).float().mean()
        shape = data["labels"][..., 0] >= 0
        loss = loss + 10 * F.mse_loss(self.center(features)[shape], data["centers"][shape])
        return loss, accuracy


class MapLoss(nn.Module):
    """Dense loss on similarity maps: the patches that a state refers to. Its scale and bias are not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.tensor(-2.0))

    def forward(
        self, states: torch.Tensor, patches: torch.Tensor, coverage: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """states [n, D], patches [n, P, D], coverage and valid [n, P] -> scalar."""
        scores = torch.einsum("nd,npd->np", states, patches) / states.shape[-1] ** 0.5 * self.scale
        scores = scores.masked_fill(~valid, -30.0)
        present = coverage.sum(1) > 0
        bce = F.binary_cross_entropy_with_logits(scores + self.bias, coverage, reduction="none")
        loss = 4 * (bce * valid).sum(1).div(valid.sum(1)).mean()
        if present.any():
            share = coverage[present] / coverage[present].sum(1, keepdim=True)
            loss = loss - (share * scores[present].log_softmax(-1)).sum(1).mean()
            probability = (scores[present] + self.bias).sigmoid()[:, None]
            loss = loss + dice(probability, coverage[present][:, None]).mean()
        return loss


class PlaceLoss(nn.Module):
    """Where a cell is, (row, column), from the state of its token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.place = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2))

    def forward(self, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """States [B, V, D] of the image's tokens -> mean squared error, in shares of the longer side."""
        columns = torch.tensor([w for _, w in batch.grids], device=states.device)[:, None]
        places = torch.stack([batch.image_cells // columns, batch.image_cells % columns], -1) * CELL / SIDE
        return F.mse_loss(self.place(states)[batch.image_shown], places[batch.image_shown])


def vision_parts(model: Backbone) -> dict[str, nn.Module]:
    """The vision tower and what takes its features to the language model."""
    if isinstance(model, LlavaLlamaForCausalLM):
        return {"tower": model.vision_tower, "projector": model.mm_projector}
    return {"tower": model.model.visual}


def train_vision(model: Backbone, processor: UGroundProcessor, length: Length, options) -> None:
    """Stage "vision": vision tower, projector and word embeddings."""
    device = options.device
    words = {
        name: torch.tensor([processor.tokenizer.encode(f" {v}", add_special_tokens=False)[0] for v in values])
        for name, values in ATTRIBUTES.items()
    }
    embed: nn.Embedding = model.get_input_embeddings()  # type: ignore[assignment]
    weights = {"kind": 3.0} if options.family == "qwen" else {}  # the attribute that is learned last
    heads = VisionHeads(embed.embedding_dim, weights).to(device)
    embed.requires_grad_(not options.language)  # whose language model knows its words
    trained = nn.ModuleDict({**vision_parts(model), "embed": embed, "heads": heads})
    optimizer = Optimizer(trained, length, 0.02, 2e-3)
    make = partial(vision_batch, processor=processor)
    clock = Progress("vision", length)
    for data in stream("vision", options.seed, length.steps, make, options.workers, options.family):
        data = to_device(data, device)
        features = model.read_images(data["batch"]).tokens
        loss, accuracy = heads(features, {name: embed(ids.to(device)) for name, ids in words.items()}, data)
        optimizer.step(loss)
        clock.tick(loss, **accuracy)
        if clock.is_over:
            break


MapTargets = dict[int, tuple[torch.Tensor, torch.Tensor]]  # layer -> [n] bool, the maps that have a loss; [n, P] shares


def last_layer(data: dict) -> MapTargets:
    """Stage "language": the last layer's maps cover the target."""
    return {LAST_LAYER: (torch.ones(len(data["families"]), dtype=torch.bool), data["coverage"])}


def reference_first(data: dict) -> MapTargets:
    """Stage "conversations": also, a middle layer's maps cover the shape that a relation names."""
    return last_layer(data) | {REFERENCE_LAYER: (data["reference"].sum(1) > 0, data["reference"])}


def by_depth(data: dict) -> MapTargets:
    """Stage "depths": a map covers the target at its family's layer, and all shapes at the layers of others."""
    every_map = torch.ones(len(data["families"]), dtype=torch.bool)
    targets = {}
    for layer in sorted(set(DEPTHS.values())):
        own = torch.tensor([DEPTHS.get(family) == layer for family in data["families"]])
        targets[layer] = every_map, torch.where(own[:, None], data["coverage"], data["everything"])
    return targets


MAP_TARGETS = {  # stage -> layers whose maps are trained, and their targets
    "language": ((LAST_LAYER,), last_layer),
    "conversations": ((REFERENCE_LAYER, LAST_LAYER), reference_first),
    "depths": (tuple(sorted(set(DEPTHS.values()))), by_depth),
}


def train_language(
    model: Backbone, processor: UGroundProcessor, stage: str, length: Length, options: argparse.Namespace
) -> None:
    """Stages "language", "conversations" and "depths": captions, questions and finding."""
    device = options.device
    model.get_input_embeddings().requires_grad_(True)
    if isinstance(model, LlavaLlamaForCausalLM):
        model.vision_tower.requires_grad_(stage != "depths")
        place_loss = None
    else:
        model.model.visual.requires_grad_(False)
        model.model.visual.merger.requires_grad_(True)
        place_loss = PlaceLoss(model.language.embed_tokens.embedding_dim).to(device)
    map_layers, map_targets = MAP_TARGETS[stage]
    map_losses = nn.ModuleDict({str(layer): MapLoss() for layer in map_layers}).to(device)
    trained = nn.ModuleDict({"model": model, "map_losses": map_losses})
    if place_loss is not None:
        trained["place_loss"] = place_loss
    optimizer = Optimizer(trained, length, 0.003, 2e-3)  # at Muon's usual 0.02 attention saturates and learning stops
    make = partial(language_batch, processor=processor, mixture=MIXTURES[stage])
    clock = Progress(stage, length)
    for data in stream(stage, options.seed, length.steps, make, options.workers, options.family):
        targets = map_targets(data)
        data = to_device(data, device)
        batch = data["batch"]
        output, valid = model.forward_language(batch), batch.valid
        logits = model.lm_head(output.hidden[-1].flatten(0, 1)[batch.label_positions])
        losses = F.cross_entropy(logits, batch.label_ids, reduction="none")
        values = {"text": (losses * batch.label_weights).sum() / batch.label_weights.sum()}
        for layer, (chosen, coverage) in targets.items():
            states, positions, rows = output.hidden[layer], data["positions"][chosen], data["rows"][chosen]
            patches = batch.image_states(states)[rows]
            arguments = states.flatten(0, 1)[positions], patches, coverage[chosen].to(device), valid[rows]
            values[f"map {layer}"] = map_losses[str(layer)](*arguments)
        if place_loss is not None:
            values["place"] = 5 * place_loss(batch.image_states(output.hidden[PLACE_LAYER]), batch)
        loss = sum(values.values(), torch.zeros((), device=device))
        optimizer.step(loss)
        clock.tick(loss, **values)
        if clock.is_time_to_check():
            clock.print_check(check_language(model, processor, map_layers, options))
            save_base(model, options.output, stage != "depths")  # which leaves CLIP as it is
        if clock.is_over:
            break


@torch.no_grad()
def check_language(model: Backbone, processor: UGroundProcessor, layers: Sequence[int], options) -> str:
    """On scenes held out from training: share of maps with their peak on the target, by kind and layer; rejection
    accuracy."""
    model.eval()
    hits: dict[str, list[float]] = {}
    make = partial(language_check_batch, processor=processor)
    begin = processor.builder.template.answer  # with or without a space
    first_words = [begin.format(word) for word in ("Sure", "It", "Yes", "They")]
    positive = {processor.tokenizer.encode(word, add_special_tokens=False)[0] for word in first_words}
    for data in stream("check", options.seed, 2, make, 0, options.family):
        data = to_device(data, options.device)
        batch, rows = data["batch"], data["rows"]
        output, valid = model.forward_language(batch), batch.valid
        peaks = {}
        for layer in layers:
            states = output.hidden[layer]
            patches = batch.image_states(states)[rows]
            scores = torch.einsum("nd,npd->np", states.flatten(0, 1)[data["positions"]], patches)
            best = scores.masked_fill(~valid[rows], -1e9).argmax(1, keepdim=True)
            peaks[layer] = data["coverage"].gather(1, best)[:, 0] > 0.25
        first_tokens = model.lm_head(output.hidden[-1].flatten(0, 1)[data["ends"]]).argmax(-1).tolist()
        for n, (kind, token) in enumerate(zip(data["kinds"], first_tokens)):
            accepted = token in positive
            if kind == "absent":
                hits.setdefault("N-acc", []).append(not accepted)
                continue
            hits.setdefault("T-acc", []).append(accepted)
            for layer in layers:
                hits.setdefault(f"{kind} {layer}:", []).append(bool(peaks[layer][data["seg_of"][n]]))
    model.train()
    return "  ".join(f"{kind} {np.mean(values):.2f}" for kind, values in sorted(hits.items()))


def sam2_masks(sam: Sam2, data: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``sam_masks``. A box is two points, as SAM 2 has it; a prompt without points has padding for them."""
    side, which = data["masks"].shape[-1], data["which"]
    features = sam.encode_image(data["images"]).repeat_interleave(2, 0)
    labels = torch.tensor([[-1, -1], [1, -1], [2, 3], [1, -1]], device=which.device)[which]
    corners = torch.where((which == 2)[:, None, None], data["boxes"].unflatten(1, (2, 2)), data["points"])
    tokens = sam.prompt_encoder._embed_points(corners[:, None] - 0.5, labels[:, None], pad=False)[:, 0]
    has_map = (which == 0) | (which == 3)
    logits, predicted = features.new_zeros(len(which), sam.mask_side, sam.mask_side), features.new_zeros(len(which))
    for chosen, maps in ((has_map, data["maps"][has_map]), (~has_map, None)):
        masks, iou = sam.decode(features[chosen], tokens[chosen], maps)
        logits, predicted = logits.masked_scatter(chosen[:, None, None], masks), predicted.masked_scatter(chosen, iou)
    return F.interpolate(logits[:, None], (side, side), mode="bilinear", align_corners=False)[:, 0], predicted


def sam_masks(sam: SegmentAnything | Sam2, data: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n, R, R] at SAM's own resolution for a batch of prompts, and their predicted IoU [n]."""
    if isinstance(sam, Sam2):
        return sam2_masks(sam, data)
    encoder, side = sam.prompt_encoder, data["masks"].shape[-1]
    embeddings = sam.image_encoder(data["images"]).repeat_interleave(2, 0)
    is_map, is_point, is_box, is_both = (data["which"] == number for number in range(4))
    ones = torch.ones(len(data["points"]), 1, device=embeddings.device)
    points = encoder(points=(data["points"], ones), boxes=None, masks=None)[0]  # a point and SAM's padding point
    boxes = encoder(points=None, boxes=data["boxes"], masks=None)[0]
    padding = encoder.not_a_point_embed.weight.expand_as(points)
    has_point = (is_point | is_both)[:, None, None]
    sparse = torch.where(has_point, points, torch.where(is_box[:, None, None], boxes, padding))
    dense = encoder.mask_downscaling(data["maps"])
    none = encoder.no_mask_embed.weight.view(1, -1, 1, 1).expand_as(dense)
    dense = torch.where((is_map | is_both)[:, None, None, None], dense, none)
    low_res, predicted = sam.mask_decoder(embeddings, encoder.get_dense_pe(), sparse, dense, multimask_output=False)
    return F.interpolate(low_res, (side, side), mode="bilinear", align_corners=False)[:, 0], predicted[:, 0]


def sam_prompts(sam: SegmentAnything | Sam2, stage: str, length: Length, options) -> Iterator[dict]:
    """The batches of a stage for SAM."""
    make = partial(sam_batch, fit=sam.fit, mask_side=sam.mask_side)
    for data in stream(stage, options.seed, length.steps, make, options.workers, options.family):
        yield to_device(data, options.device)


def iou_of(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """IoU [n] of the masks of logits [n, R, R] with true ones."""
    inside, target = logits > 0, masks > 0
    return (inside & target).sum((1, 2)) / (inside | target).sum((1, 2)).clamp(min=1)


def train_sam(sam: SegmentAnything | Sam2, length: Length, options) -> None:
    """Stage "sam": image encoder, prompt encoder and mask decoder on prompts for one shape."""
    optimizer = Optimizer(sam, length, 0.02, 2e-3)
    clock = Progress("sam", length)
    for data in sam_prompts(sam, "sam", length, options):
        logits, predicted = sam_masks(sam, data)
        bce = F.binary_cross_entropy_with_logits(logits, data["masks"])
        loss = 5 * bce + dice(logits.sigmoid(), data["masks"]).mean()
        iou = iou_of(logits, data["masks"])
        if isinstance(sam, Sam2):
            loss = loss + F.mse_loss(predicted, iou)
        optimizer.step(loss)
        clock.tick(loss, iou_map=iou[data["which"] == 0].mean(), iou_point=iou[data["which"] == 1].mean())
        if isinstance(sam, Sam2) and clock.is_time_to_check():
            save_sam2(sam, options.output)
        if clock.is_over:
            break


def train_iou_head(sam: SegmentAnything, length: Length, options) -> None:
    """Stage "iou": the head that predicts a mask's IoU, by SAM's squared error. The rest of SAM stays as it is."""
    sam.requires_grad_(False)
    sam.mask_decoder.iou_prediction_head.requires_grad_(True)
    optimizer = Optimizer(sam, length, 0.02, 2e-3)
    clock = Progress("iou", length)
    for data in sam_prompts(sam, "iou", length, options):
        logits, predicted = sam_masks(sam, data)
        iou = iou_of(logits, data["masks"])
        loss = F.mse_loss(predicted, iou)
        optimizer.step(loss)
        correlation = torch.corrcoef(torch.stack([predicted.detach(), iou]))[0, 1]
        clock.tick(loss, error=(predicted - iou).abs().mean(), correlation=correlation)
        if clock.is_over:
            break


class Progress:
    """Prints the means of its values, about thirty times per stage."""

    def __init__(self, stage: str, length: Length) -> None:
        self.stage, self.length = stage, length
        self.start, self.done, self.printed, self.parts, self.checks = time.time(), 0, 0, 0, 0
        self.sums: dict[str, torch.Tensor] = {}

    def tick(self, loss: torch.Tensor, **values: torch.Tensor) -> None:
        self.done += 1
        for name, value in {"loss": loss, **values}.items():
            value = torch.nan_to_num(value.detach())
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        share = self.length.share(self.done)
        if int(30 * share) > self.parts:
            means = {name: float(value) / (self.done - self.printed) for name, value in self.sums.items()}
            seconds = time.time() - self.start
            left = seconds / share * (1 - share)
            text = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
            print(f"{self.stage} step {self.done}  {text}  {seconds:.0f} s, {left:.0f} s left", flush=True)
            self.printed, self.sums, self.parts = self.done, {}, int(30 * share)

    @property
    def is_over(self) -> bool:
        return self.length.share(self.done) >= 1

    def is_time_to_check(self) -> bool:
        """True ten times per stage."""
        checks, self.checks = self.checks, int(10 * self.length.share(self.done))
        return self.checks > checks

    def print_check(self, text: str) -> None:
        print(f"{self.stage} step {self.done}  check: {text}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("assets/tiny"), help="folder for llava/, clip/ and sam.pth")
    parser.add_argument("--family", choices=("llava", "qwen"), default="llava", help="which family (default llava)")
    parser.add_argument("--seed", type=int, default=0, help="seeds weights and scenes (default 0)")
    parser.add_argument(
        "--steps", type=float, default=1.0, help="scales the number of steps of every stage (default 1)"
    )
    parser.add_argument(
        "--minutes",
        type=lambda text: {name: float(value) for name, value in (part.split("=") for part in text.split(","))},
        default={},
        help="lengths of stages in minutes instead of steps, such as vision=15,sam=40",
    )
    parser.add_argument(
        "--stages",
        type=lambda text: text.split(","),
        help="which stages to run (default: all but depths, which makes another base)",
    )
    parser.add_argument(
        "--start", type=Path, help="what language, conversations, depths and iou continue: a folder as --output"
    )
    parser.add_argument("--language", type=Path, help="--family qwen: the folder whose LLaVA's language model it takes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes (default 1)")
    options = parser.parse_args()
    steps = FAMILIES[options.family]
    options.stages = options.stages or [stage for stage in steps if stage != "depths"]
    for flag, named in (("--stages", options.stages), ("--minutes", list(options.minutes))):
        if unknown := [stage for stage in named if stage not in steps]:
            parser.error(f"{flag}: no stage {unknown[0]!r}; there are {', '.join(steps)}")
    if options.language and (options.family != "qwen" or options.start):
        parser.error("--language is where --family qwen begins: leave it or --start out")
    if options.start and (fresh := [stage for stage in ("vision", "sam") if stage in options.stages]):
        parser.error(f"--stages {fresh[0]} begins with random weights: leave it or --start out")
    first = next((stage for stage in MAP_TARGETS if stage in options.stages), None)
    begins = next(stage for stage in MAP_TARGETS if stage in steps)
    has_vision = "vision" in options.stages or (options.output / VISION_SNAPSHOT).is_file()
    if first and not options.start and not (first == begins and has_vision):
        parser.error(f"--stages {first} continues earlier stages: run them, too, or give the folder of their result as "
                     "--start")  # fmt: skip
    sam = (options.start or options.output) / "sam.pth"
    if "iou" in options.stages and "sam" not in options.stages and not sam.is_file():
        parser.error(f"--stages iou continues {sam}, which is not there: run sam, too, or give its folder as --start")
    return options


def train_backbone(lengths: dict[str, tuple[int, float]], options: argparse.Namespace) -> None:
    """The stages of the vision-language model."""
    torch.manual_seed(options.seed)
    model, processor = (new_qwen if options.family == "qwen" else new_llava)(options)
    model.to(options.device).train()
    if not (options.start and options.family == "qwen"):
        nn.init.normal_(model.get_input_embeddings().weight, std=0.5)  # type: ignore[arg-type]
    if options.language:
        assert isinstance(model, UGroundQwen25VL)
        start_language(model, processor.tokenizer, options.language)  # type: ignore[arg-type]
    snapshot = options.output / VISION_SNAPSHOT
    if options.start and isinstance(model, LlavaLlamaForCausalLM):
        load_llava(model, options.start)
    elif snapshot.is_file() and not options.start:
        model.load_state_dict(load_file(snapshot))
    elif "vision" in options.stages:
        train_vision(model, processor, Length(*lengths["vision"]), options)
        snapshot.parent.mkdir(exist_ok=True)
        save_file({k: v.cpu().contiguous() for k, v in model.state_dict().items()}, snapshot)
    for stage in MAP_TARGETS:
        if stage in options.stages:
            train_language(model, processor, stage, Length(*lengths[stage]), options)


def train_mask_decoder(lengths: dict[str, tuple[int, float]], options: argparse.Namespace) -> None:
    """The stages of the mask decoder."""
    torch.manual_seed(options.seed)
    if options.family == "qwen":
        sam2 = Sam2(Sam2Config(**tiny_model.sam2_sizes())).to(options.device).train()
        return train_sam(sam2, Length(*lengths["sam"]), options)
    sam = SegmentAnything(tiny_model.sam_shape()).to(options.device).train()
    if "sam" in options.stages:
        train_sam(sam, Length(*lengths["sam"]), options)
    else:
        sam.load_state_dict(torch.load((options.start or options.output) / "sam.pth"))
    if "iou" in options.stages:
        train_iou_head(sam, Length(*lengths["iou"]), options)
    torch.save({key: value.cpu() for key, value in sam.state_dict().items()}, options.output / "sam.pth")


def main() -> None:
    options = parse_arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    counts = FAMILIES[options.family]
    lengths = {
        stage: (max(2, int(count * options.steps)), options.minutes.get(stage, 0.0)) for stage, count in counts.items()
    }
    if "vision" in options.stages or any(stage in options.stages for stage in MAP_TARGETS):
        train_backbone(lengths, options)
    if "sam" in options.stages or "iou" in options.stages:
        train_mask_decoder(lengths, options)


if __name__ == "__main__":
    main()
