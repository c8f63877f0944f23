"""Memory of a training step, computed from shapes alone, by arithmetic that can be checked by hand.

Legend: b bytes per number (2 in bf16), B images per GPU, T tokens per row, D hidden size, F width of LLaMA's MLP, N
[SEG] per image, P image tokens (of a square image), G side of SAM's grid, E its width in the decoder, G x G x E =
"image" of the decoder.
What autograd saves was counted in PyTorch's backward formulas and compared with measured runs (docs/scaling.md).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig

from model.backbones import BACKBONES
from model.config import GroundingConfig, UGroundConfig
from model.decoders.mobile_sam import TINY_VIT
from model.decoders.segment_anything import SamShape
from model.loading.placement import PRECISIONS
from model.loading.pretrained import config_of, resolve_start
from model.lora import add_lora
from model.losses import PIXELS_AT_ONCE
from model.settings import SAM, decoder_kind
from utils.config import Config
from utils.diagnostics.published_sizes import PUBLISHED, published
from utils.plotting import text_tables
from utils.training.zero3 import WHOLE
from utils.wording import counted

GB = 1e9
MEMORY_PARTS = ("weights", "optimizer", "gradients", "language model", "SAM")
PREFIX, PER_QUESTION, LABELS = 40, 40, 12  # tokens: of the prefix; per question with answer; per answer, as labels
PIXELS = 640 * 480  # of a COCO image
PIXEL_BYTES = 35  # per pixel of a mask: what the losses at the image's size save (measured, docs/scaling.md)
LIVE = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
CUDA_CONTEXT = 0.8 * GB  # assumed: kernels, cuBLAS, NCCL
FRAGMENTATION = 0.1  # assumed: share of the activations that the allocator loses
SAM2_SAVED, SAM2_FEATURES = 23.0, 4.0  # "images" of the decoder per mask (tests/diagnostics)
ENCODER_COPIES = {
    "sam2": 9.0,
    "sam3_tracker": 18.0,
    "mobile_sam": 13.0,
}  # of an image's finest states, at the peak of a traced full size
SHAPES: dict[str, dict[str, Any]] = {  # LLaVA-1.5 (Vicuna) with CLIP ViT-L/14 of 336 px and SAM ViT-H
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "medium": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12, "num_attention_heads": 8},
}
CLIPS: dict[str, dict[str, Any]] = {
    "large": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "small": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4},
}
# with the full decoder
SAM_SMALL = SamShape(encoder_width=192, encoder_depth=2, encoder_heads=2, global_attention=(1,))
MEDIUM_SETTINGS = ("--precision", "fp32", "--grad_accumulation_steps", "1")
CARDS = (24, 40, 80)  # GB
MARGIN = 0.1  # share of a card to leave free: the assumptions were not measured on a GPU
VOCABULARY = 32_000 + 5  # Vicuna's and this project's tokens
OF_LLAVA = ("llava", "vicuna")  # in names of weights that are planned as LLaVA-1.5
ADDED = 4  # of these five have an embedding that is used: <image> has none


@dataclass(frozen=True)
class Plan:
    """A training step.

    Attributes:
        shape: sizes of the model. parameters, trainable: their numbers.
        precision: bytes per number, b.
        token_rows: of both tables that train alone; () = the tables train in full. frozen: parts that do not train.
        images: per GPU and micro step, B. tokens: per row, T. labels: per image. masks: per image, N.
        pixels: per image. checkpointing: of LLaMA's layers. dropout: whether the adapters use it.
        gpus: over which the optimizer is sharded. offload: of the optimizer, to the host's memory.
        sharded: number of the parameters that are sharded, too; 0 but for ZeRO-3.
        bucket: numbers per message of gradients (DeepSpeed's reduce_bucket_size).
        supervised: whether the ground truth is learned from. answer_tokens: per row of sampled answers; 0 = none.
        answer_labels: their tokens, per image, at most. answers: per image.
    """

    shape: GroundingConfig
    parameters: int
    trainable: int
    token_rows: tuple[int, ...] = ()
    frozen: tuple[str, ...] = ()
    precision: int = 2
    images: int = 2
    tokens: int = 576 + PREFIX + 3 * PER_QUESTION
    labels: int = 3 * LABELS
    masks: int = 3
    pixels: int = PIXELS
    checkpointing: bool = False
    dropout: bool = True
    gpus: int = 1
    offload: bool = False
    sharded: int = 0
    bucket: int = 50_000_000
    supervised: bool = True
    answer_tokens: int = 0
    answer_labels: int = 0
    answers: int = 0

    @property
    def rows(self) -> int:
        """Tokens of a micro step, B x T."""
        return self.images * self.tokens


# -- the parts ---------------------------------------------------------------------------------------------------------


def language_model(plan: Plan) -> float:
    """Bytes that the language model saves for its backward pass.

    A frozen linear layer saves nothing (its gradient needs only the weight). So a decoder layer saves, per token:

    - the inputs of both norms in float32 (4D each), and the layer's output, which PPM uses (bD; in float32 it is the
      next norm's input)
    - q, k, v and the attention's output (4bD)
    - the inputs of LoRA's two A matrices: with dropout a copy and a mask of bytes for each (2(b + 1)D), else one (bD)
    - the inputs of SiLU and of the product in the MLP (3bF)

    With checkpointing a layer saves its input (bD), and one layer at a time is recomputed.

    PPM saves the image states of all layers in float32 (4PD per image and layer). The additive mask of attention is
    b x T x T per image.
    """
    c, b = plan.shape.text, plan.precision
    d, mlp, layers = c.hidden_size, c.intermediate_size, c.num_hidden_layers
    attention = (2 * d + 2 * d * (c.num_key_value_heads or c.num_attention_heads) / c.num_attention_heads) * b
    adapters = 2 * (b + 1) * d if plan.dropout else b * d
    layer = 8 * d + (b * d if b < 4 else 0) + attention + adapters + 3 * b * mlp
    saved = b * d * layers + layer if plan.checkpointing else layer * layers
    similarity = 4.0 * plan.shape.num_image_tokens * d * (layers + 1) * plan.images
    mask = b * plan.images * plan.tokens**2
    return plan.rows * saved + similarity + mask


def text_loss_bytes(plan: Plan) -> float:
    """Bytes of the logits at the labels: as computed (b), in float32, their log-softmax and its gradient (4 each)."""
    return plan.images * plan.labels * plan.shape.text.vocab_size * (plan.precision + 12.0)


def sampled_answers(plan: Plan) -> float:
    """Bytes of the pass that sampled answers are learned from: the language model's, with the answers' rows.

    Generation before it holds a KV cache, which is smaller and freed; masks for the rewards have no gradient.
    """
    if not plan.answer_tokens:
        return 0.0
    rows = replace(plan, tokens=plan.answer_tokens, labels=plan.answer_labels)
    return language_model(rows) + text_loss_bytes(rows) + 8.0 * plan.pixels * plan.answers * plan.images


def token_rows(plan: Plan) -> float:
    """Bytes of ``train_tables: new``: peft copies the rows into both tables, whose gradients are whole tables, too.

    The copy of the embeddings is released once they are looked up; that of ``lm_head`` stays for the backward pass.
    """
    table = plan.shape.text.vocab_size * plan.shape.text.hidden_size * plan.precision
    return 2.0 * table if plan.token_rows else 0.0


def mask_decoder(plan: Plan) -> float:
    """Bytes that SAM's decoder saves: about 26 "images" (G x G x E numbers) per mask.

    The two-way transformer saves 12 (inputs of the projections, their outputs at half the width, the inputs of the
    norms, of two blocks and the last attention), the upscaling 11 (its norm is written out, at four times the pixels
    and a quarter of the channels; two convolutions, two GELUs, the product with the mask tokens), the prompt's
    downscaling and the sum 3: counted in a run (docs/scaling.md). transformers' SAM 2 saves ``SAM2_SAVED``; a prompt's
    copy of the features, of three scales, is ``SAM2_FEATURES``.
    """
    if not plan.shape.decoder_kind.has_encoder:  # each scale but the first at twice the grid's side; no mask prompts
        assert plan.shape.decoder_config is not None
        assert isinstance(plan.shape, UGroundConfig)  # it reads CLIP's states
        grid = (plan.shape.clip_side // plan.shape.clip_patch) ** 2
        image = grid * plan.shape.decoder_config["prompt_width"] * (1 + 4 * (plan.shape.num_scales - 1))
        return 26.0 * image * plan.precision * plan.masks * plan.images
    if plan.shape.decoder_kind.weights == "folder":
        assert plan.shape.decoder_config is not None
        prompt = plan.shape.decoder_config["prompt_encoder_config"]
        image = (prompt["image_size"] // prompt["patch_size"]) ** 2 * prompt["hidden_size"]
        return (SAM2_SAVED + SAM2_FEATURES) * image * plan.precision * plan.masks * plan.images
    sam = SamShape(**plan.shape.sam_config)
    image = (sam.image_size // sam.patch_size) ** 2 * sam.prompt_width
    return 26.0 * image * plan.precision * plan.masks * plan.images


def mask_losses(plan: Plan) -> float:
    """Bytes of masks and maps at the image's size, and of what their losses save: ``PIXEL_BYTES`` per mask pixel.

    For an image beyond ``model.losses.PIXELS_AT_ONCE``, logits, map, soft target and mask stay (13), and the losses
    process a part of the masks at a time.
    """
    image = plan.pixels * plan.masks
    if image <= PIXELS_AT_ONCE:
        return float(PIXEL_BYTES) * image * plan.images
    return 13.0 * image * plan.images + PIXEL_BYTES * PIXELS_AT_ONCE


def image_encoder(plan: Plan) -> float:
    """Peak bytes of SAM's encoder, which saves nothing: a global layer's relative positions, G^2 x G^2 per head, of one
    image at a time (its attention is fused and materializes no scores). Of SAM 2 and 3: ``ENCODER_COPIES``."""
    if not plan.shape.decoder_kind.has_encoder:
        return 0.0
    if plan.shape.decoder_kind.weights == "folder":
        assert plan.shape.decoder_config is not None
        backbone = plan.shape.decoder_config["vision_config"]["backbone_config"]
        stride, width = backbone.get("patch_stride", [backbone.get("patch_size")])[0], backbone["hidden_size"]
        states = (plan.shape.sam_side // stride) ** 2 * width
        return ENCODER_COPIES[plan.shape.mask_decoder] * states * plan.precision
    if plan.shape.mask_decoder == "mobile_sam":
        states = (TINY_VIT["img_size"] // 4) ** 2 * TINY_VIT["embed_dims"][0]
        return ENCODER_COPIES["mobile_sam"] * states * plan.precision
    sam = SamShape(**plan.shape.sam_config)
    grid = (sam.image_size // sam.patch_size) ** 2
    return 1.0 * sam.encoder_heads * grid**2 * plan.precision


def optimizer(plan: Plan) -> tuple[float, float]:
    """(GPU, host) bytes of master weights, AdamW's two moments and the summed gradient: 16 per trainable parameter,
    sharded over the GPUs (ZeRO). Offloading moves them to the host."""
    share = 16.0 * plan.trainable / plan.gpus
    return (0.0, share) if plan.offload else (share, 0.0)


def weights(plan: Plan) -> float:
    """Bytes of the parameters. ZeRO-3 gathers what it has sharded for its layer, up to ``LIVE`` numbers at a time."""
    share = plan.sharded / plan.gpus
    return plan.precision * (plan.parameters - plan.sharded + min(share + LIVE, plan.sharded))


def gradients(plan: Plan) -> float:
    """Bytes of gradients waiting to be reduced, at most all, and of the bucket that they are reduced in."""
    return 1.0 * plan.precision * (plan.trainable + min(plan.bucket, plan.trainable))


# -- the sum -----------------------------------------------------------------------------------------------------------


def expected(plan: Plan) -> dict[str, float]:
    """Bytes per GPU by part, and their sum as ``total``; ``host`` is what offloading moves to the host.

    The language model's states are alive while SAM's encoder runs. The encoder's temporary memory is free again when
    the decoder and the losses run: the larger of the two counts.
    """
    on_gpu, host = optimizer(plan)
    of_truth = language_model(plan) + text_loss_bytes(plan), mask_decoder(plan) + mask_losses(plan)
    of_truth = of_truth if plan.supervised else (0.0, 0.0)
    parts = {
        "weights": weights(plan),
        "optimizer": on_gpu,
        "gradients": gradients(plan),
        "language model": of_truth[0] + sampled_answers(plan) + token_rows(plan),
        "SAM": max(image_encoder(plan), of_truth[1]),
    }
    return parts | {"total": sum(parts.values()), "host": host}


def on_cuda(parts: dict[str, float]) -> float:
    """The total plus this file's assumptions about CUDA's own memory."""
    activations = parts["language model"] + parts["SAM"]
    return parts["total"] + CUDA_CONTEXT + FRAGMENTATION * activations


def fits(total: float, card: int) -> bool:
    """Whether ``total`` bytes leave ``MARGIN`` of a card of ``card`` GB free."""
    return total <= (1 - MARGIN) * card * GB


# -- shapes ------------------------------------------------------------------------------------------------------------


def preset(name: str, **settings: Any) -> UGroundConfig:
    """The shape of UGround on LLaVA-1.5 ``7b`` or ``13b``; ``medium`` is for measurements: a CPU can train it."""
    shape, small = SHAPES[name], name == "medium"
    clip = CLIPVisionConfig(image_size=336, patch_size=14, **CLIPS["small" if small else "large"])
    settings = {"sam_config": (SAM_SMALL if small else SamShape()).to_dict()} | settings
    heads = shape["num_attention_heads"]
    return UGroundConfig(
        vision_config=clip, vocab_size=VOCABULARY, num_key_value_heads=heads, rms_norm_eps=1e-5, **shape, **settings
    )


def shape_of(config: Config) -> tuple[GroundingConfig, str]:
    """The model that a configuration trains, and the source of its sizes.

    Weights that are not on this machine yet are those that their name says (``published_sizes``), or LLaVA-1.5 of the
    size in it.

    Raises:
        ValueError: if neither the files nor the name give the size.
    """
    paths = config.model
    try:
        found = resolve_start(**config.start, download=False)
    except ValueError:
        found = {}
    if found:
        start = {name: str(part.path) for name, part in found.items()}
        return config_of(**start, settings=config.method), paths.version
    kind = decoder_kind(config.method)
    decoder = "SAM ViT-H" if config.decoder.mask_decoder == SAM else f"{kind.title} {kind.example}".rstrip()
    if known := published(paths.version):
        shape = BACKBONES[known.backbone].config(**known.sizes, **config.method)
        return shape, f"{paths.version} as published, with {decoder}, assumed: the files are not here"
    name = Path(paths.version).name.lower()
    size = next((size for size in ("13b", "7b") if size in name), None)
    if size is None or not any(family in name for family in OF_LLAVA):
        raise ValueError(
            f"--version {paths.version}: the weights are not here, and the name is neither that of a LLaVA with 7b or "
            f"13b nor one of {', '.join(PUBLISHED)}"
        )
    shape = preset(size, **config.method)
    return shape, f"LLaVA-1.5 {size.upper()} with {decoder}, assumed: the files are not here"


def count_parameters(
    shape: GroundingConfig,
    lora_r: int,
    targets: str = "q_proj,v_proj",
    token_rows: Sequence[int] = (),
    frozen: Sequence[str] = (),
) -> tuple[int, int, int]:
    """Numbers of the parameters with LoRA: all, trainable, and those that ZeRO-3 shards. Allocates no memory."""
    with torch.device("meta"):
        base = BACKBONES[shape.backbone].model(shape)
        model = add_lora(base, lora_r, targets=targets, token_rows=token_rows, frozen=frozen)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    total = sum(size for size, _ in sizes)
    whole = sum(parameter.numel() for name in WHOLE for parameter in base.get_submodule(name).parameters())
    return total, sum(size for size, trains in sizes if trains), total - whole


def plan_of(config: Config) -> tuple[Plan, str]:
    """The training step of a configuration, and the source of the model's sizes."""
    shape, source = shape_of(config)
    return plan_of_shape(shape, config), source


def plan_of_preset(name: str, config: Config) -> Plan:
    """The same with the shape of ``preset``."""
    return plan_of_shape(preset(name, **config.method), config)


def plan_of_shape(shape: GroundingConfig, config: Config) -> Plan:
    """The training step of a configuration with another shape in place of its weights."""
    part = config.model
    more = shape.codebook_size - 1  # [SEG] tokens of a target beyond one
    rows = tuple(range(ADDED + more)) if part.train_tables == "new" else ()
    total, trainable, sharded = count_parameters(shape, part.lora_r, part.lora_target_modules, rows, part.freeze)
    zero = json.loads(Path(config.train.deepspeed_config).read_text()).get("zero_optimization", {})
    questions, grpo = config.data.questions_per_image, config.grpo
    answers = 0 if grpo.objective == "supervised" else questions * grpo.grpo_answers
    asked = PER_QUESTION - LABELS
    return Plan(
        shape=shape,
        parameters=total,
        trainable=trainable,
        token_rows=rows,
        frozen=part.freeze,
        precision=PRECISIONS[part.precision].itemsize,
        images=config.train.batch_size,
        tokens=shape.num_image_tokens + PREFIX + questions * (PER_QUESTION + more),
        labels=questions * (LABELS + more),
        masks=questions,
        checkpointing=part.gradient_checkpointing,
        dropout=part.lora_dropout > 0,
        offload="offload_optimizer" in zero,
        sharded=sharded if zero.get("stage") == 3 else 0,
        bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
        supervised=grpo.objective != "grpo",
        answer_tokens=answers and shape.num_image_tokens + PREFIX + answers * (asked + grpo.grpo_tokens),
        answer_labels=answers * grpo.grpo_tokens,
        answers=answers,
    )


# -- tables ------------------------------------------------------------------------------------------------------------


def tables(name: str, plan: Plan, source: str, gpus: Sequence[int], offload: bool) -> list[str]:
    """Memory by parts as configured, with checkpointing, one image and offloading, for each number of GPUs."""
    rows = [f"{plan.tokens} tokens and {plan.masks} masks"] * plan.supervised
    rows += [f"{plan.answer_tokens} tokens with {plan.answers} sampled answers"] * (plan.answers > 0)
    per_gpu = f"{plan.images} images of {' and of '.join(rows)} per GPU, {8 * plan.precision} bits"
    lines = [f"{name}: {plan.parameters:,} parameters, {plan.trainable:,} trainable; {per_gpu}"]
    lines += [f"sizes from: {source}"] if source else []
    table = [["GB per GPU", *MEMORY_PARTS, "all", "fits on"]]
    variants: dict[str, dict[str, Any]] = {"as configured": {}, "gradient checkpointing": {"checkpointing": True}}
    variants["checkpointing, 1 image"] = {"checkpointing": True, "images": 1}
    for count in gpus:
        for offloaded in (True,) if offload or plan.offload else (False, True):
            for title, changes in variants.items():
                parts = expected(replace(plan, gpus=count, offload=offloaded, **changes))
                total = on_cuda(parts)
                cards = ", ".join(str(card) for card in CARDS if fits(total, card)) or "none"
                label = f"{counted(count, 'GPU')}, {title}{', offload' if offloaded else ''}"
                sizes = [f"{value / GB:.1f}" for value in (*(parts[part] for part in MEMORY_PARTS), total)]
                host = f" (host: {parts['host'] / GB:.1f} per GPU)" if offloaded else ""
                table.append([label, *sizes, f"{cards}{host}"])
    assumed = f"{CUDA_CONTEXT / GB:.1f} GB for CUDA and NCCL and {FRAGMENTATION:.0%} of the activations"
    return [
        *lines,
        "",
        *text_tables.aligned(table, "l" + "r" * (len(MEMORY_PARTS) + 1) + "l"),
        f"all: with {assumed}, which are assumptions, not measurements; docs/scaling.md",
        f"fits on: cards (GB) with {MARGIN:.0%} left free",
        "",
    ]
