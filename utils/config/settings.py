"""The sections of a run's YAML beside the method's (which are in ``model.settings``)."""

from __future__ import annotations

from dataclasses import dataclass

from model import layer_rules
from model.settings import FREEZABLE, setting

TRACKER_PACKAGES = ("wandb", "trackio")  # optional, of the same names as their values of report_to


@dataclass
class ModelSettings:
    """model: base weights, LoRA, precision"""

    # the paths may change: a checkpoint identifies the weights by their fingerprints
    version: str = setting(
        "",
        "base weights (LLaVA-1.5, Qwen2.5-VL, Qwen3-VL, InternVL3) or a finished model (merged, adapter, published): "
        "folder, or hub id such as org/name@revision",
        required=True,
        may_change=True,
    )
    vision_tower: str = setting(
        "", "CLIP vision tower, for LLaVA and published checkpoints: folder, or hub id", may_change=True
    )
    vision_pretrained: str = setting(
        "",
        "SAM, for base weights: .pth, folder of transformers' SamModel, hub id (org/name:file), or sam_vit_b, "
        "sam_vit_l, sam_vit_h; for another --mask_decoder, the file or folder that docs/weights.md names",
        may_change=True,
    )
    model_max_length: int = setting(2048, "longest sequence in tokens: image, prompt and one conversation", low=16)
    precision: str = setting("bf16", "floating-point format of training", choices=("fp32", "bf16"))
    lora_r: int = setting(8, "rank of LoRA on the language model (paper: 8 for 7B, 64 for 13B); 0 = no LoRA", low=0)
    lora_alpha: int = setting(16, "scale of LoRA: alpha / r multiplies the adapters", low=1)
    lora_dropout: float = setting(0.05, "dropout on the adapters' inputs", low=0.0, high=0.99)
    lora_target_modules: str = setting("q_proj,v_proj", "projections of attention that LoRA adapts")
    train_tables: str = setting(
        "full",
        "train embeddings and lm_head in full (paper), or only the rows of the added tokens: a tenth of the "
        "optimizer's state",
        choices=("full", "new"),
    )
    freeze: tuple[str, ...] = setting((), f"parts that stay as they are: {', '.join(FREEZABLE)}", choices=FREEZABLE)
    gradient_checkpointing: bool = setting(
        False, "recompute the language model's layers in the backward pass: less memory, more time", may_change=True
    )
    compile_sam: bool = setting(
        False,
        "torch.compile SAM's image encoder: faster, but the first step takes half a minute longer",
        may_change=True,
    )


@dataclass
class DataSettings:
    """data: the mixture"""

    dataset_dir: str = setting("", "root of all data sets", required=True, may_change=True)
    dataset: tuple[str, ...] = setting(("refer_seg", "reason_seg"), "types to mix, A||B||C")
    sample_rates: tuple[float, ...] = setting((), "sampling rate of each type, 9,3,1; empty = all equal")
    sem_seg_data: tuple[str, ...] = setting(
        (), "semantic segmentation data sets (and parts); empty = ade20k, cocostuff, pascal_part, paco_lvis, mapillary"
    )
    refer_seg_data: tuple[str, ...] = setting((), "referring data sets, A||B; empty = refclef and refcoco, +, g")
    neg_refer_seg_data: tuple[str, ...] = setting(
        (), "referring data sets with false expressions; empty = R-refcoco, R-refcoco+, R-refcocog"
    )
    correct_refer_seg_data: tuple[str, ...] = setting(
        (), "referring data sets with corrections of false expressions; empty = fprefcoco, fprefcoco+, fprefcocog"
    )
    vqa_data: tuple[str, ...] = setting((), "question-answering data sets; empty = llava_instruct_150k")
    reason_seg_data: tuple[str, ...] = setting((), "reasoning data sets, NAME|split; empty = ReasonSeg|train")
    reason_seg_plus_data: tuple[str, ...] = setting(
        (), "LISA++'s data sets; empty = instance_seg, cot, conversations, caption"
    )
    multi_reason_seg_data: tuple[str, ...] = setting(
        (), "multi-target reasoning data sets, NAME|split; empty = MultiReasonSeg|train"
    )
    custom_data: tuple[str, ...] = setting((), "files of your own data, A.jsonl||B.jsonl (docs/your_own_data.md)")
    weighting: str = setting(
        "size", "within a type, sample data sets by size or uniformly", choices=("size", "uniform")
    )
    questions_per_image: int = setting(3, "maximum of conversations per image, in one packed sequence", low=1)
    negative_sampling_weight: float = setting(
        0.0, "sem_seg: probability of a question about a class that is not in the image", low=0.0, high=1.0
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
        "probability that an image's questions follow each other in one conversation, for a model for multi-turn chat "
        "(chat.py --history on)",
        low=0.0,
        high=1.0,
    )
    thought_probability: float = setting(
        0.0,
        "probability that an answer comes after its thought, where the data have one (thought_format)",
        low=0.0,
        high=1.0,
    )
    sam_feature_cache: str = setting(
        "", "folder that caches SAM's image embeddings for later epochs and runs; empty = no cache", may_change=True
    )
    sam_feature_cache_gb: float = setting(
        100.0,
        "size limit of that cache; the least recently used embeddings are deleted first",
        above=0.0,
        may_change=True,
    )
    workers: int = setting(4, "data loading processes per training process; 0 = none", low=0, may_change=True)


@dataclass
class TrainSettings:
    """train: schedule, optimizer, run folder"""

    exp_name: str = setting("uground", "name of the run; its folder is log_base_dir/exp_name", may_change=True)
    log_base_dir: str = setting("runs", "folder of all runs", may_change=True)
    resume: str = setting("", "resume this run or checkpoint folder", may_change=True)
    auto_resume: bool = setting(
        False, "resume the latest checkpoint of exp_name, or start a new run if there is none", may_change=True
    )
    epochs: int = setting(10, "epochs; validation and checkpoints follow each", low=1, may_change=True)
    steps_per_epoch: int = setting(500, "optimizer steps per epoch", low=1)
    # these two may change together with the number of processes: their product may not (utils.training.step_layout)
    batch_size: int = setting(2, "images per process and micro step", low=1, may_change=True)
    grad_accumulation_steps: int = setting(10, "micro steps per optimizer step", low=1, may_change=True)
    lr: float = setting(3e-4, "peak learning rate of AdamW; 0 changes nothing", low=0.0)
    gate_lr_factor: float = setting(1.0, "learning rate of the policy gate, as a multiple of lr", above=0.0)
    warmup_steps: int = setting(
        100, "steps of linear warm-up (the first two have rate 0), then linear decay to 0: WarmupDecayLR", low=2
    )
    beta1: float = setting(0.9, "AdamW's first decay", low=0.0, high=0.9999)
    beta2: float = setting(0.95, "AdamW's second decay", low=0.0, high=0.99999)
    weight_decay: float = setting(0.0, "AdamW's weight decay", low=0.0)
    gradient_clipping: float = setting(1.0, "largest norm of the gradient; 0 = no clipping", low=0.0)
    seed: int = setting(0, "random seed of new weights, samples, sampled layers and dropout", low=0)
    deepspeed_config: str = setting(
        "configs/deepspeed/zero2.json",
        "DeepSpeed's JSON (configs/deepspeed: ZeRO-1, 2 or 3); batch sizes and precision follow from these settings",
        may_change=True,
    )
    save_every: int = setting(
        0, "also save a checkpoint every N optimizer steps; 0 = only after each epoch", low=0, may_change=True
    )
    log_every: int = setting(10, "optimizer steps per log line", low=1, may_change=True)
    report_to: tuple[str, ...] = setting(
        ("tensorboard",),
        "where curves are shown beside log.jsonl, A,B,C: tensorboard, wandb, trackio; or none",
        choices=("tensorboard", *TRACKER_PACKAGES, "none"),
        may_change=True,
    )


@dataclass
class EvalSettings:
    """eval: validation after each epoch"""

    no_eval: bool = setting(False, "train without validation", may_change=True)
    val_dataset: tuple[str, ...] = setting(
        ("ReasonSeg|val",), "benchmarks, A|split||B|split; the first selects the best checkpoint", may_change=True
    )
    val_mode: str = setting(
        "teacher_forced",
        "answers are teacher-forced, or generated by the model",
        choices=("teacher_forced", "generate"),
        may_change=True,
    )
    val_layer_policy: str = setting(
        "",
        f"layer rule of validation and of the finished model: {layer_rules.describe('inference')}; empty = that "
        "of layer_selection",
        may_change=True,
    )
    val_batch_size: int = setting(4, "images per validation batch", low=1, may_change=True)
    val_limit: int = setting(0, "validate on the first N images only; 0 = all", low=0, may_change=True)
    val_metric: str = setting("gIoU", "metric that selects the best checkpoint", may_change=True)
    val_pictures: int = setting(4, "validation samples shown in report.html and by report_to", low=0, may_change=True)
