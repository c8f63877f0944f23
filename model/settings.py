"""The method's settings: each declared once, with its default, help text and limits.

They are sections of a run's YAML (``utils.config``) and fields of ``UGroundConfig``. ``value_problems`` and
``contradictions`` validate both; ``RECIPES`` names sets of values that belong together.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any

from model import layer_rules
from model.processing.thoughts import NO_THOUGHTS, THINK, THOUGHT_FORMATS

PRECISION_NAMES = ("fp32", "bf16", "fp16")
QUANTIZATIONS = ("8bit", "4bit")
PUBLISHED = "UGround, LISA, GSVA, SESAME, READ or PixelLM"  # whose checkpoints model.loading.formats.RELEASES knows
MASK_REWARDS = ("mask", "mask_iou")  # values of reward_terms that need SAM's mask of a layer, not only its map
FREEZABLE = (  # parts that train; projector with clip_resize, the last two with PixelLM's decoder
    "phi",
    "gate",
    "sam_prompt_encoder",
    "sam_mask_decoder",
    "embed_tokens",
    "lm_head",
    "projector",
    "mask_projector",
    "image_neck",
)


@dataclass(frozen=True)
class DecoderKind:
    """What settings, loading and training know of a mask decoder; ``model.decoders`` has its code.

    Attributes:
        title: its name in reports and messages.
        scales: S, the prompts that it takes per [SEG].
        weights: what ``--vision_pretrained`` names: a ``file``, or a ``folder`` of transformers; "" = nothing: it has
            no image encoder, reads CLIP's states and starts from new weights.
        example, licence: of such weights.
        input: how an image becomes its input, of ``model.processing.transforms.SAM_INPUTS``.
        takes_points: whether points can prompt it.
        parts: what trains beside its prompt encoder and mask decoder, of ``FREEZABLE``.
    """

    title: str
    scales: int = 1
    weights: str = ""
    example: str = ""
    licence: str = "Apache-2.0"
    input: str = "pad"
    takes_points: bool = True
    parts: tuple[str, ...] = ()

    @property
    def has_encoder(self) -> bool:
        """Whether it has an image encoder of its own, and so pre-trained weights, which also rate masks."""
        return bool(self.weights)


SAM = "segment_anything"  # the default, and the decoder of settings that name none
DECODER_KINDS: dict[str, DecoderKind] = {  # by the name that is a value of ``mask_decoder``
    SAM: DecoderKind("SAM", weights="file", example="sam_vit_h"),
    "sam2": DecoderKind("SAM 2.1", weights="folder", example="facebook/sam2.1-hiera-large", input="stretch"),
    "sam3_tracker": DecoderKind(
        "SAM 3's tracker", weights="folder", example="facebook/sam3", licence="SAM License", input="stretch_to_one"
    ),
    "mobile_sam": DecoderKind("MobileSAM", weights="file", example="mobile_sam.pt"),
    "pixel_decoder": DecoderKind("pixel decoder", scales=2, takes_points=False, parts=("mask_projector", "image_neck")),
}


def decoder_kind(settings: Mapping[str, Any]) -> DecoderKind:
    """The mask decoder of all method settings, or some; SAM if they name none.

    Raises:
        ValueError: if its name is unknown.
    """
    name = settings.get("mask_decoder", SAM)
    if name not in DECODER_KINDS:
        raise ValueError(f"mask_decoder: {name!r} is not one of {', '.join(DECODER_KINDS)}")
    return DECODER_KINDS[name]


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    required: bool = False,
    may_change: bool = False,
) -> Any:
    """A dataclass field with its help text and limits.

    Args:
        choices: allowed values, of each item where the value is a tuple.
        low, high: smallest and largest value allowed; above: exclusive lower bound.
        required: whether an empty value is an error.
        may_change: whether a run can be resumed with another value (it does not alter what is learned).
    """
    metadata = {
        "help": help,
        "choices": tuple(choices),
        "low": low,
        "high": high,
        "above": above,
        "required": required,
        "may_change": may_change,
    }
    return field(default=default, metadata=metadata)


@dataclass
class PpmSettings:
    """ppm: Policy-Prompted Masking (section 4)"""

    layer_selection: str = setting(
        "policy",
        f"layer whose hidden state and similarity map a [SEG] uses: {layer_rules.describe('training')}",
    )
    policy_gradient: str = setting(
        "reinforce",
        "from the sampled layer's reward (Eq. 5); exact: from every layer's map, at the map's own resolution; or "
        "leave_one_out: from policy_samples layers, each against the mean reward of the others",
        choices=("reinforce", "exact", "leave_one_out"),
    )
    policy_samples: int = setting(
        4, "layers that leave_one_out samples; where masks give the reward, SAM decodes each of them", low=2
    )
    first_candidate_layer: int = setting(
        1, "lowest layer that can be chosen; 0 adds the embeddings (as in the released weights)", low=0
    )
    phi_layer: str = setting(
        "chosen",
        "layer whose [SEG] state is the input of phi: the one chosen for the map, or always the last",
        choices=("chosen", "last"),
    )
    seg_prompt: bool = setting(True, "prompt SAM with the [SEG] token (Table 6)")
    mask_prompt: bool = setting(True, "prompt SAM with the similarity map (MasP, Table 6)")
    point_prompts: int = setting(
        0, "prompt SAM with this many foreground and as many background points of the similarity map (READ)", low=0
    )
    point_rule: str = setting(
        "extremes",
        "the point_prompts highest and as many of the lowest patches, or point_prompts in total by the thresholds of "
        "READ's two published checkpoints",
        choices=("extremes", "read_7b", "read_13b"),
    )
    clip_fit: str = setting(
        "pad",
        "CLIP's input, and so what a similarity map covers: the whole image, padded (paper), or a centre crop, as in "
        "LISA and its descendants",
        choices=("pad", "crop"),
    )
    reward: str = setting(
        "seg",
        "one reward per [SEG] (Algorithm 1), or one sum per batch (as in the released weights)",
        choices=("seg", "batch"),
    )
    reward_terms: str = setting(
        "both",
        "reward of a map: its negative Gaussian BCE, dice, or both (Table 8), or its IoU with the mask; or of the mask "
        "that SAM decodes from it: mask = the negative sum of its BCE per pixel and its dice, mask_iou = its IoU",
        choices=("both", "bce", "dice", "iou", *MASK_REWARDS),
    )
    baseline: str = setting(
        "average",
        "baseline of the reward: its moving average (Algorithm 1); state_critic: the average plus the deviation that a "
        "critic expects from the [SEG]'s own states (section 4.1); critic: a critic of the batch's mean policy, as in "
        "the release, for parity alone: it cannot tell a hard [SEG] from an easy one",
        choices=("average", "critic", "state_critic"),
    )
    # Algorithm 1 leaves the start open. As rewards are far from zero, a zero start makes the gate's first steps noisy.
    baseline_start: str = setting(
        "zero",
        "start of the moving average: zero, or the first mean reward (the gate learns faster)",
        choices=("zero", "first"),
    )
    baseline_decay: float = setting(0.9, "alpha of the reward's moving average (Algorithm 1)", low=0.0, high=1.0)
    map_normalization: str = setting(
        "valid", "min-max scaling of a map over valid patches (no padding), or over all", choices=("valid", "all")
    )
    map_side: int = setting(
        0, "side in pixels of the square that a map is first enlarged to; 0 = CLIP's input (released: 336)", low=0
    )


@dataclass
class LossSettings:
    """loss: weights of the objective (Eq. 8 and 9)"""

    text_loss_weight: float = setting(1.0, "lambda_txt, cross-entropy of the answer's tokens", low=0.0)
    mask_loss_weight: float = setting(1.0, "lambda_mask, BCE and dice of SAM's masks", low=0.0)
    iou_loss_weight: float = setting(
        0.0,
        "squared error of the IoU that SAM's head predicts for its mask, as in SAM's training; 0 = off (paper)",
        low=0.0,
    )
    map_loss_weight: float = setting(1.0, "weight of the similarity maps' BCE and dice (Eq. 8)", low=0.0)
    policy_loss_weight: float = setting(
        0.1, "lambda_policy, the gate's loss: REINFORCE (Eq. 5), or the cross-entropy of ce_soft", low=0.0
    )
    bce_loss_weight: float = setting(2.0, "lambda_bce, of masks and of maps", low=0.0)
    overlap_weight: float = setting(
        1.0,
        "weight of a pixel in a mask's BCE where the masks of a conversation overlap, PixelLM's target refinement loss "
        "(there 2); 1 = off",
        low=0.0,
    )
    dice_loss_weight: float = setting(4.0, "lambda_dice, of masks and of maps", low=0.0)
    map_terms: tuple[str, ...] = setting(
        ("gaussian_bce", "gaussian_dice"),
        "constraint terms of the similarity maps, any of gaussian_bce, gaussian_dice (soft mask), bce, dice (hard "
        "mask); empty = none (Table 7)",
        choices=("gaussian_bce", "gaussian_dice", "bce", "dice"),
    )
    gaussian_kernel: int = setting(31, "side of the Gaussian that softens a map's target, in pixels; odd", low=1)
    gaussian_sigma: float = setting(7.0, "standard deviation of that Gaussian, in pixels", above=0.0)
    positive_weight: str = setting(
        "mask", "map BCE: weight of positives per mask, or one per image (released)", choices=("mask", "image")
    )


@dataclass
class DecoderSettings:
    """decoder: what decodes masks, and how images are read; the codebook and CLIP's input: PixelLM"""

    mask_decoder: str = setting(
        SAM,
        "SAM; sam2: SAM 2.1; sam3_tracker: SAM 3's tracker; mobile_sam: MobileSAM; or pixel_decoder: PixelLM's, which "
        "reads CLIP's states and needs no SAM",
        choices=tuple(DECODER_KINDS),
    )
    decoder_width: int = setting(256, "width of a pixel decoder's prompts and image features; a multiple of 16", low=16)
    codebook_tokens: int = setting(
        1, "[SEG] tokens per target and scale, whose phi are fused into one prompt (PixelLM: 3)", low=1
    )
    clip_resize: int = setting(
        0,
        "side in pixels of CLIP's input, by interpolated position embeddings; the projector then trains, too; 0 = the "
        "side that the tower was trained with (PixelLM: 448)",
        low=0,
    )
    max_image_tokens: int = setting(
        1280,
        "most tokens of an image, where a backbone reads images at their own size (Qwen-VL) or in tiles of 256 "
        "(InternVL3)",
        low=1,
    )
    image_pool: int = setting(
        1, "side of the square of CLIP's patches that becomes one image token of the language model (PixelLM: 2)", low=1
    )


@dataclass
class ExperimentalSettings:
    """experimental: settings of single experiments (docs/results.md), off in the paper"""

    thought_format: str = setting(
        NO_THOUGHTS,
        "how a thought stands before an answer: text = between Thought: and Answer:, tokens = between <think> and "
        "</think>, which the vocabulary gets",
        choices=THOUGHT_FORMATS,
    )
    thought_loss_weight: float = setting(
        1.0, "weight of a thought's tokens in the text loss, against 1 of the answer's", low=0.0
    )
    last_candidate_layer: int = setting(-1, "highest layer that can be chosen; -1 = the last", low=-1)
    critic_width: int = setting(128, "hidden units of the critic", low=1)
    entropy_bonus: float = setting(0.0, "reward per nat of the policy's entropy; 0 = none (paper)", low=0.0)
    scale_advantage: bool = setting(False, "divide advantages by their root mean square in the batch, over all ranks")
    critic_loss_weight: float = setting(1.0, "weight of the critic's squared error, within lambda_policy", low=0.0)


OBJECTIVES = ("supervised", "grpo", "both")


@dataclass
class GrpoSettings:
    """grpo: answers that the model samples, rewarded within their group"""

    objective: str = setting(
        "supervised",
        "supervised = the losses of the ground truth (Eq. 9); grpo = that of sampled answers, each rewarded against "
        "others to the same question; both = their sum",
        choices=OBJECTIVES,
    )
    grpo_weight: float = setting(1.0, "both: weight of the sampled answers' loss", above=0.0)
    grpo_answers: int = setting(8, "answers sampled per question, which share its image", low=2)
    grpo_tokens: int = setting(128, "longest sampled answer, in tokens", low=1)
    grpo_temperature: float = setting(1.0, "temperature of the sampled tokens", above=0.0)
    grpo_top_p: float = setting(1.0, "sample from the likeliest tokens with this probability", above=0.0, high=1.0)
    grpo_think: str = setting(
        "auto",
        "whether sampled answers begin with a thought (thought_format): as the model likes, on, off",
        choices=THINK,
    )
    grpo_rewards: tuple[str, ...] = setting(
        ("mask_iou:1", "rejection:0.5", "format:0.5"),
        "rewards with their weights, of mask_iou, map_iou, rejection, format, length (model/rewards.py)",
    )
    grpo_scale: bool = setting(True, "divide a group's advantages by the standard deviation of its rewards")
    grpo_clip: float = setting(0.2, "how far the ratio to the sampling policy may leave 1", above=0.0, high=1.0)
    grpo_updates: int = setting(1, "optimizer steps per set of sampled answers; with 1 nothing is clipped", low=1)
    grpo_kl: float = setting(
        0.0, "weight of the KL divergence from the model without LoRA, which needs its tables frozen", low=0.0
    )
    grpo_layers: str = setting(
        "joint",
        "the policy over layers: joint = a [SEG] and its layer are one action, with one ratio; apart = with a ratio of "
        "its own, weighted with policy_loss_weight; off = not trained by these rewards",
        choices=("joint", "apart", "off"),
    )


@dataclass
class CheckpointSettings:
    """Settings that come with a checkpoint; no YAML section has them."""

    eval_layer_policy: str | None = setting(
        None, "default layer rule of ``predict``; None = that of the training rule (``LayerRule.at_inference``)"
    )
    policy_seed: int = setting(0, "seed of sampled layers, together with the sample index", low=0)


METHOD = (PpmSettings, LossSettings, DecoderSettings, ExperimentalSettings, CheckpointSettings)
METHOD_FIELDS: dict[str, Field] = {item.name: item for section in METHOD for item in fields(section)}

RUN_NAMES = {"eval_layer_policy": "val_layer_policy", "policy_seed": "seed"}  # field -> the run's setting that gives it

# Sets of values that belong together. ``released``: training and evaluation of the paper's published checkpoints, where
# they differ from the paper; ``recommended``: the paper's with the exact policy gradient.
_DIFFERENCES: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {
        "first_candidate_layer": 0,
        "eval_layer_policy": "last",
        "reward": "batch",
        "map_normalization": "all",
        "map_side": 336,
        "positive_weight": "image",
        "policy_loss_weight": 0.4,
    },
    "recommended": {"policy_gradient": "exact"},
}
_PAPER = {name: METHOD_FIELDS[name].default for recipe in _DIFFERENCES.values() for name in recipe}
RECIPES = {recipe: _PAPER | differences for recipe, differences in _DIFFERENCES.items()}  # each undoes the others


def method_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of ``UGroundConfig`` among those of a run.

    The layer rule of inference is that of validation: a model answers with the rule that selected the best checkpoint.

    Args:
        settings: name -> value, of all sections.
    """
    run_names = {name: RUN_NAMES.get(name, name) for name in METHOD_FIELDS}
    method = {name: settings[run_name] for name, run_name in run_names.items() if run_name in settings}
    return method | {"eval_layer_policy": method["eval_layer_policy"] or None}


def kept_settings(method: Mapping[str, Any]) -> list[str]:
    """Settings of a finished model that further training must keep: its weights were trained for them.

    Args:
        method: setting -> value, of the finished model.
    """
    kept = ["clip_fit", *(item.name for item in fields(DecoderSettings))]
    if method["mask_prompt"] or method["point_prompts"]:
        kept += ["map_side", "map_normalization"]
    if method["point_prompts"]:
        kept.append("point_rule")
    if layer_rules.parse(method["layer_selection"], use="training").gate:
        kept += ["first_candidate_layer", "last_candidate_layer"]
    if method.get("thought_format", NO_THOUGHTS) != NO_THOUGHTS:
        kept.append("thought_format")
    return kept


# -- validation --------------------------------------------------------------------------------------------------------


BOUNDS = {
    "low": (operator.ge, "is too small; at least"),
    "high": (operator.le, "is too large; at most"),
    "above": (operator.gt, "must be larger than"),
}


def value_problems(values: Mapping[str, Any], items: Mapping[str, Field]) -> Iterator[tuple[str, str]]:
    """(setting, problem) of every value outside the limits of its field.

    Args:
        values: setting -> value; items: setting -> its field, made by ``setting``.
    """
    for name, value in values.items():
        limits = items[name].metadata
        if limits["required"] and not value:
            yield name, f"is missing ({limits['help']})"
        several = isinstance(value, (tuple, list))
        if several and not str(items[name].type).startswith("tuple"):
            yield name, f"{value!r} is a list; expected one value"
            continue
        for choice in value if several else (value,):
            if limits["choices"] and choice not in limits["choices"]:
                yield name, f"{choice!r} is not one of {', '.join(limits['choices'])}"
        bounds = {bound: limits[bound] for bound in BOUNDS if limits[bound] is not None}
        if bounds and not isinstance(value, (int, float)):
            yield name, f"{value!r} is not a number"
            continue
        for bound, limit in bounds.items():
            holds, problem = BOUNDS[bound]
            if not holds(value, limit):
                yield name, f"{value} {problem} {limit:g}"
        if isinstance(value, float) and value in (float("inf"), float("-inf")):
            yield name, f"{value} is not finite"


def contradictions(method: Mapping[str, Any], num_layers: int | None = None) -> Iterator[tuple[str, str]]:
    """(setting, problem) of method settings that exclude each other.

    Args:
        method: setting -> value, all that a run can set.
        num_layers: L, hidden states of the model (decoder layers + 1); None = not known.
    """
    if not (method["seg_prompt"] or method["mask_prompt"] or method["point_prompts"]):
        yield "seg_prompt", "seg_prompt and mask_prompt are both off: SAM would have no prompt; switch one on"
    first, last = method["first_candidate_layer"], method["last_candidate_layer"]
    if -1 < last < first:
        yield "last_candidate_layer", f"{last} is below first_candidate_layer {first}"
    if num_layers is not None and not (first < num_layers and last < num_layers):
        yield (
            "first_candidate_layer" if first >= num_layers else "last_candidate_layer",
            f"{first} to {last} is no range of the layers 0 (the embeddings) to {num_layers - 1} (the last, also -1)",
        )
    candidates = None if num_layers is None else range(first, last % num_layers + 1)
    uses: dict[str, layer_rules.Use] = {"layer_selection": "training", "eval_layer_policy": "inference"}
    for name, use in uses.items():
        try:
            if method[name] is not None:
                layer_rules.parse(method[name], num_layers, candidates, use)
        except ValueError as error:
            yield name, str(error)
    gradient, reward_terms = method["policy_gradient"], method["reward_terms"]
    if gradient != "reinforce" and (method["reward"], method["baseline"]) != ("seg", "average"):
        yield (
            "policy_gradient",
            f"{gradient} uses several layers' rewards per [SEG]: it takes reward seg and baseline average",
        )
    if gradient == "exact" and reward_terms in MASK_REWARDS:
        yield (
            "policy_gradient",
            f"exact with reward_terms {reward_terms} would decode every layer's mask; use leave_one_out, which decodes "
            "those of policy_samples layers",
        )
    if method["baseline"] == "state_critic" and method["reward"] != "seg":
        yield "baseline", "state_critic expects a [SEG]'s reward from its states: it takes reward seg"
    if method["point_rule"] != "extremes" and method["clip_fit"] != "crop":
        yield "point_rule", f"{method['point_rule']} needs clip_fit crop: points lie in what a crop shows"
    yield from _decoder_contradictions(method)
    if method["gaussian_kernel"] % 2 == 0:
        yield "gaussian_kernel", f"{method['gaussian_kernel']} is even; it must be odd"


def _decoder_contradictions(method: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(setting, problem) of settings that exclude a mask decoder, or pooled image tokens."""
    if (name := method["mask_decoder"]) not in DECODER_KINDS:  # ``value_problems`` says so
        return
    kind = DECODER_KINDS[name]
    if method["point_prompts"] and not kind.takes_points:
        yield "point_prompts", f"mask_decoder {name} takes no points; set point_prompts 0"
    if not kind.has_encoder:
        if not method["seg_prompt"]:
            yield "seg_prompt", f"mask_decoder {name} has no prompt without [SEG]; set seg_prompt true"
        if method["decoder_width"] % 16:
            yield "decoder_width", f"{method['decoder_width']} is not a multiple of 16 (8 heads, of half the width)"
    if method["clip_fit"] != "pad" and not (kind.has_encoder and method["image_pool"] == 1):
        yield "clip_fit", "mask_decoder pixel_decoder and image_pool read the whole image: set clip_fit pad"


def without_effect(method: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(setting, problem) of changed method settings that others switch off: a run would silently ignore them."""
    changed = {name for name, value in method.items() if value != METHOD_FIELDS[name].default}
    selection = method["layer_selection"]
    if layer_rules.parse(selection, use="training").gate != "policy":
        for name in ("policy_gradient", "baseline", "entropy_bonus", "scale_advantage"):
            if name in changed:
                reason = f"layer_selection {selection} trains no policy by rewards; leave it out, or train a policy"
                yield name, f"{method[name]} has no effect: {reason}"
    elif (gradient := method["policy_gradient"]) != "reinforce":
        for name in ("baseline_start", "baseline_decay", *["scale_advantage"] * (gradient == "exact")):
            if name in changed:
                yield name, f"{method[name]} has no effect with policy_gradient {gradient}; leave it out"
    elif method["baseline"] == "critic":
        for name in ("baseline_start", "baseline_decay"):
            if name in changed:
                yield name, f"{method[name]} has no effect: the critic replaces the moving average; leave it out"
    if "decoder_width" in changed and decoder_kind(method).has_encoder:
        yield (
            "decoder_width",
            f"{method['decoder_width']} has no effect: it is of mask_decoder pixel_decoder; leave it out",
        )
    if "thought_loss_weight" in changed and method["thought_format"] == NO_THOUGHTS:
        yield "thought_loss_weight", "has no effect without thoughts: set thought_format, or leave it out"
    if "policy_samples" in changed and method["policy_gradient"] != "leave_one_out":
        yield "policy_samples", "has no effect: set policy_gradient leave_one_out, or leave it out"
    if method["baseline"] == "average":
        for name in ("critic_width", "critic_loss_weight"):
            if name in changed:
                yield (
                    name,
                    f"{method[name]} has no effect: there is no critic; set baseline state_critic, or leave it out",
                )
