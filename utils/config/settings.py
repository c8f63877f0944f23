"""Every setting of a training run, with its default, help text and limits; a class per section of the YAML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


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
    """A field with its help text and limits.

    Args:
        low, high: smallest and largest value allowed; above: the value must be larger than this.
        required: an empty value is a problem.
        may_change: a run can be resumed with another value (it does not alter what is learned).
    """
    limits = {"choices": tuple(choices), "low": low, "high": high, "above": above}
    metadata = {"help": help, "required": required, "may_change": may_change, **limits}
    return field(default=default, metadata=metadata)


@dataclass
class ModelSettings:
    """model: base weights, LoRA, precision"""

    # the paths may change: a checkpoint knows the weights by their fingerprints
    version: str = setting("", "folder of the base LLaVA-1.5 weights", required=True, may_change=True)
    vision_tower: str = setting("", "folder of the CLIP vision tower", required=True, may_change=True)
    vision_pretrained: str = setting(
        "", "SAM: .pth, or folder of transformers' SamModel; its size is detected", required=True, may_change=True
    )
    model_max_length: int = setting(2048, "longest row in tokens: image, prompt and one conversation", low=16)
    precision: str = setting("bf16", "arithmetic of training", choices=("fp32", "bf16"))
    lora_r: int = setting(8, "rank of LoRA on the language model (paper: 8 for 7B, 64 for 13B); 0 = no LoRA", low=0)
    lora_alpha: int = setting(16, "scale of LoRA: alpha / r multiplies the adapters", low=1)
    lora_dropout: float = setting(0.05, "dropout in front of the adapters", low=0.0, high=0.99)
    lora_target_modules: str = setting("q_proj,v_proj", "projections of LLaMA's attention that LoRA adapts")
    gradient_checkpointing: bool = setting(
        False, "recompute the language model's layers in the backward pass: less memory, more time", may_change=True
    )
    compile_sam: bool = setting(
        False, "torch.compile SAM's image encoder: faster, after half a minute in the first step", may_change=True
    )


@dataclass
class PpmSettings:
    """ppm: Policy-Prompted Masking (section 4)"""

    layer_selection: str = setting(
        "policy",
        "layer that a [SEG] connects from: policy (SSC), last, uniform, fixed:K (Tables 6 and 9), or all, weighted by "
        "a gate that learns through SAM (soft) or as a classifier of the best layer (ce_soft)",
    )
    policy_gradient: str = setting(
        "reinforce",
        "from the sampled layer's reward (Eq. 5), or exact: from every layer's, at the map's own resolution",
        choices=("reinforce", "exact"),
    )
    first_candidate_layer: int = setting(
        1, "lowest layer that can be chosen; 0 adds the embeddings (as released weights have it)", low=0
    )
    last_candidate_layer: int = setting(-1, "highest layer that can be chosen; -1 = the last", low=-1)
    phi_layer: str = setting(
        "chosen",
        "layer that phi([SEG]) reads: the one chosen for the map, or always the last",
        choices=("chosen", "last"),
    )
    seg_prompt: bool = setting(True, "prompt SAM with the [SEG] token (Table 6)")
    mask_prompt: bool = setting(True, "prompt SAM with the similarity map (MasP, Table 6)")
    point_prompts: int = setting(
        0, "prompt SAM with so many points on and as many off the target, read off the similarity map (READ)", low=0
    )
    reward: str = setting(
        "seg",
        "one reward per [SEG] (Algorithm 1), or one sum per batch (as released weights)",
        choices=("seg", "batch"),
    )
    reward_terms: str = setting(
        "both",
        "what a map is rewarded for: small Gaussian BCE, dice, or both (Table 8), or its IoU with the mask",
        choices=("both", "bce", "dice", "iou"),
    )
    baseline: str = setting(
        "average",
        "what rewards are compared with: their moving average, or a critic's guess (section 4.1)",
        choices=("average", "critic"),
    )
    baseline_start: str = setting(
        "zero",
        "where the moving average starts: at zero, or at the first mean reward (the gate learns faster)",
        choices=("zero", "first"),
    )
    baseline_decay: float = setting(0.9, "alpha of the reward's moving average (Algorithm 1)", low=0.0, high=1.0)
    critic_width: int = setting(128, "hidden units of the critic", low=1)
    entropy_bonus: float = setting(0.0, "reward per nat of the policy's entropy; 0 = none (paper)", low=0.0)
    scale_advantage: bool = setting(False, "divide advantages by their root mean square in the batch, over all ranks")
    map_normalization: str = setting(
        "valid", "min-max of a map over the patches that show the image, or over all", choices=("valid", "all")
    )
    map_side: int = setting(
        0, "side of the square on which a map is enlarged first, in pixels; 0 = CLIP's input (released: 336)", low=0
    )


@dataclass
class LossSettings:
    """loss: weights of the objective (Eq. 8 and 9)"""

    text_loss_weight: float = setting(1.0, "lambda_txt, cross-entropy of the answer's tokens", low=0.0)
    mask_loss_weight: float = setting(1.0, "lambda_mask, BCE and dice of SAM's masks", low=0.0)
    map_loss_weight: float = setting(1.0, "BCE and dice of the similarity maps, beside the masks' (Eq. 8)", low=0.0)
    policy_loss_weight: float = setting(
        0.1, "lambda_policy, the gate's: REINFORCE (Eq. 5), or the classifier of ce_soft", low=0.0
    )
    critic_loss_weight: float = setting(1.0, "the critic's squared error, within lambda_policy", low=0.0)
    bce_loss_weight: float = setting(2.0, "lambda_bce, within masks and maps", low=0.0)
    dice_loss_weight: float = setting(4.0, "lambda_dice, within masks and maps", low=0.0)
    map_terms: tuple[str, ...] = setting(
        ("gaussian_bce", "gaussian_dice"),
        "what constrains the similarity maps, any of gaussian_bce, gaussian_dice (soft mask), bce, dice (hard mask); "
        "empty = no constraint (Table 7)",
        choices=("gaussian_bce", "gaussian_dice", "bce", "dice"),
    )
    gaussian_kernel: int = setting(31, "side of the Gaussian that softens a map's target, in pixels; odd", low=1)
    gaussian_sigma: float = setting(7.0, "standard deviation of that Gaussian, in pixels", above=0.0)
    positive_weight: str = setting(
        "mask", "map BCE: weight of positives per mask, or one per image (released)", choices=("mask", "image")
    )


@dataclass
class DataSettings:
    """data: the mixture"""

    dataset_dir: str = setting("", "root of all data sets", required=True, may_change=True)
    dataset: tuple[str, ...] = setting(("refer_seg", "reason_seg"), "types to mix, A||B||C")
    sample_rates: tuple[float, ...] = setting((), "how often each type is drawn, 9,3,1; empty = all equally often")
    sem_seg_data: tuple[str, ...] = setting(
        (), "sets of classes and parts; empty = ade20k, cocostuff, pascal_part, paco_lvis, mapillary"
    )
    refer_seg_data: tuple[str, ...] = setting((), "referring data sets, A||B; empty = refclef and refcoco, +, g")
    neg_refer_seg_data: tuple[str, ...] = setting(
        (), "referring data sets with false expressions; empty = R-refcoco, R-refcoco+, R-refcocog"
    )
    correct_refer_seg_data: tuple[str, ...] = setting(
        (), "the same with corrections; empty = fprefcoco, fprefcoco+, fprefcocog"
    )
    vqa_data: tuple[str, ...] = setting((), "question-answering data sets; empty = llava_instruct_150k")
    reason_seg_data: tuple[str, ...] = setting((), "reasoning data sets, NAME|split; empty = ReasonSeg|train")
    reason_seg_plus_data: tuple[str, ...] = setting(
        (), "LISA++'s data sets; empty = instance_seg, cot, conversations, caption"
    )
    multi_reason_seg_data: tuple[str, ...] = setting(
        (), "multi-target reasoning data sets, NAME|split; empty = MultiReasonSeg|train"
    )
    custom_data: tuple[str, ...] = setting((), "files of one's own data, A.jsonl||B.jsonl (docs/your_own_data.md)")
    weighting: str = setting(
        "size", "within a type, draw a data set by its size or uniformly", choices=("size", "uniform")
    )
    questions_per_image: int = setting(3, "at most so many conversations share one image (one row)", low=1)
    negative_sampling_weight: float = setting(
        0.0, "sem_seg: probability that a class which is not in the image is asked about instead", low=0.0, high=1.0
    )
    explanatory: float = setting(
        -1.0, "ReasonSeg's explanations: probability of a text-only answer; -1 = do not use them", low=-1.0, high=1.0
    )
    joint_probability: float = setting(
        0.0,
        "gRefCOCO, Ref-ZOM: probability that one question lists all expressions ('A:[SEG], B:[REJ]')",
        low=0.0,
        high=1.0,
    )
    dialogue_probability: float = setting(
        0.0,
        "probability that an image's questions follow each other in one conversation, for a model that will be chatted "
        "with (chat.py --history on)",
        low=0.0,
        high=1.0,
    )
    sam_feature_cache: str = setting(
        "", "folder for SAM's image embeddings, which a later epoch or run reads instead; empty = none", may_change=True
    )
    sam_feature_cache_gb: float = setting(
        100.0, "size of that folder; the least recently used embeddings go first", above=0.0, may_change=True
    )
    workers: int = setting(4, "data loading processes per training process; 0 = none", low=0, may_change=True)


@dataclass
class TrainSettings:
    """train: schedule, optimizer, run folder"""

    exp_name: str = setting("uground", "name of the run; its folder is log_base_dir/exp_name", may_change=True)
    log_base_dir: str = setting("runs", "folder of all runs", may_change=True)
    resume: str = setting("", "go on from this run or checkpoint folder", may_change=True)
    auto_resume: bool = setting(
        False, "go on from the newest checkpoint of exp_name, or start when there is none", may_change=True
    )
    epochs: int = setting(10, "epochs; validation and checkpoints follow each", low=1, may_change=True)
    steps_per_epoch: int = setting(500, "optimizer steps per epoch", low=1)
    batch_size: int = setting(2, "images per process and micro step", low=1)
    grad_accumulation_steps: int = setting(10, "micro steps per optimizer step", low=1)
    lr: float = setting(3e-4, "peak learning rate of AdamW", above=0.0)
    gate_lr_factor: float = setting(1.0, "the policy gate's learning rate, times lr", above=0.0)
    warmup_steps: int = setting(
        100, "steps of linear warm-up (the first two have rate 0), then linear decay to 0: WarmupDecayLR", low=2
    )
    beta1: float = setting(0.9, "AdamW's first decay", low=0.0, high=0.9999)
    beta2: float = setting(0.95, "AdamW's second decay", low=0.0, high=0.99999)
    weight_decay: float = setting(0.0, "AdamW's weight decay", low=0.0)
    gradient_clipping: float = setting(1.0, "largest norm of the gradient; 0 = no clipping", low=0.0)
    seed: int = setting(0, "of new weights, samples, sampled layers and dropout", low=0)
    deepspeed_config: str = setting(
        "configs/deepspeed/zero2.json",
        "DeepSpeed's JSON; batch sizes and precision are filled in from these settings",
        may_change=True,
    )
    save_every: int = setting(
        0, "a checkpoint also every so many optimizer steps; 0 = after each epoch alone", low=0, may_change=True
    )
    log_every: int = setting(10, "optimizer steps per log line", low=1, may_change=True)


@dataclass
class EvalSettings:
    """eval: validation after each epoch"""

    no_eval: bool = setting(False, "train without validation", may_change=True)
    val_dataset: tuple[str, ...] = setting(
        ("ReasonSeg|val",), "benchmarks, A|split||B|split; the first decides which checkpoint is best", may_change=True
    )
    val_mode: str = setting(
        "teacher_forced",
        "answers are given, or written by the model",
        choices=("teacher_forced", "generate"),
        may_change=True,
    )
    val_layer_policy: str = setting(
        "",
        "layer in validation and of the finished model: argmax, last, sample, mc:T, fixed:K, soft; empty = as "
        "layer_selection has it",
        may_change=True,
    )
    val_batch_size: int = setting(4, "images per validation batch", low=1, may_change=True)
    val_limit: int = setting(0, "validate on the first N images only; 0 = all", low=0, may_change=True)
    val_metric: str = setting("gIoU", "metric that decides which checkpoint is best", may_change=True)
    val_pictures: int = setting(4, "validation samples drawn into TensorBoard", low=0, may_change=True)
