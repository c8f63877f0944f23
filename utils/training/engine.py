"""The training engine: base model with LoRA, AdamW and its parameter groups, WarmupDecayLR, DeepSpeed's ZeRO."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.config import GroundingConfig
from model.loading.files import blame, read_json
from model.loading.pretrained import load_for_training
from model.loading.weights import Loaded
from model.lora import add_lora, part_of
from model.processing.processor import UGroundProcessor
from model.settings import DECODER_KINDS
from utils import distributed
from utils.config import Config
from utils.training.zero3 import keep_whole, shard


def build_model(config: Config) -> tuple[nn.Module, UGroundProcessor, list[Loaded]]:
    """Loads the base weights, adds LoRA and marks what trains. New weights depend on the seed alone.

    Returns:
        the model (a ``PeftModel`` unless lora_r is 0), its processor, and the rows of the loading report.

    Raises:
        ValueError: as ``load_for_training`` and ``check_frozen``.
    """
    torch.manual_seed(config.train.seed)
    base, processor, loaded = load_for_training(
        config.model.version,
        config.model.vision_tower,
        config.model.vision_pretrained,
        config.model.precision,
        config.method,
        config.model.model_max_length,
    )
    check_frozen(config.model.freeze, base.config, loaded)
    part = config.model
    rows = processor.added_tokens if part.train_tables == "new" else ()
    lora = part.lora_r, part.lora_alpha, part.lora_dropout, part.lora_target_modules
    model = add_lora(base, *lora, token_rows=rows, frozen=part.freeze)
    if config.model.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, processor, loaded


MUST_TRAIN = {  # part -> its module; what a new mask decoder has beside these can stay at random values, as PixelLM's
    "phi": "text_hidden_fcs",
    "gate": "ppm",
    "sam_mask_decoder": "visual_model",
    "mask_projector": "visual_model",
}


def check_frozen(freeze: Collection[str], config: GroundingConfig, loaded: Iterable[Loaded]) -> None:
    """Checks which parts stay frozen (``--freeze``).

    Raises:
        ValueError: if a part of ``MUST_TRAIN`` is new, or a part of PixelLM does not train in this model anyway.
    """
    of_decoders = {part for kind in DECODER_KINDS.values() for part in kind.parts}
    trains = {part: part in config.decoder_kind.parts for part in of_decoders} | {"projector": bool(config.clip_resize)}
    if idle := [part for part in freeze if not trains.get(part, True)]:
        raise ValueError(
            f"--freeze {'||'.join(idle)}: has no effect, as it does not train in this model (projector: with "
            "--clip_resize; mask_projector, image_neck: with --mask_decoder pixel_decoder); leave it out"
        )
    new = {row.module for row in loaded if row.source == "new"}
    if parts := [part for part in freeze if MUST_TRAIN.get(part) in new]:
        raise ValueError(
            f"--freeze {'||'.join(parts)}: the model in --version has no such part, and a new one must train; leave it "
            "out, or start from a model that has it"
        )


def build_engine(model: nn.Module, config: Config, settings: dict[str, Any]):
    """Wraps the model in a DeepSpeed engine; ``settings`` are ``deepspeed_settings``. The process group must exist."""
    import deepspeed  # slow to import, and evaluation does not need it
    from deepspeed.runtime.lr_schedules import WarmupDecayLR

    deepspeed.utils.logger.setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        # DeepSpeed would compile its own CPU collectives (which takes a minute and a compiler); gloo has them
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if settings["zero_optimization"]["stage"] == 3:
        shard(model, settings)
    groups = parameter_groups(model, config)
    betas = config.train.beta1, config.train.beta2
    optimizer = torch.optim.AdamW(groups, betas=betas, weight_decay=config.train.weight_decay, fused=True)
    scheduler = WarmupDecayLR(
        optimizer,
        total_num_steps=config.total_steps * config.updates_per_step,
        warmup_max_lr=[group["lr"] for group in groups],
        warmup_num_steps=config.train.warmup_steps * config.updates_per_step,
        warmup_type="linear",
    )
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=settings, dist_init_required=False
    )
    keep_whole(engine)
    return engine


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """AdamW's groups of trainable parameters; the policy gate has its own learning rate."""
    parts: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts[part_of(name) == "gate"].append(parameter)
    rates = {False: config.train.lr, True: config.train.lr * config.train.gate_lr_factor}
    return [{"params": parameters, "lr": rates[gate]} for gate, parameters in parts.items() if parameters]


def deepspeed_settings(config: Config, world_size: int) -> dict[str, Any]:
    """DeepSpeed's JSON, completed from the configuration.

    Raises:
        ValueError: if the file cannot be read, DeepSpeed does not know a key or value, or it contradicts the
            configuration; names all contradictions.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    path, train = Path(config.train.deepspeed_config), config.train
    with blame(f"--deepspeed_config {path}: cannot be read"):
        settings = read_json(path)
    sections = [key for key in ("bf16", "fp16", "zero_optimization") if not isinstance(settings.get(key, {}), dict)]
    if sections:
        raise ValueError(f"--deepspeed_config {path}: {', '.join(sections)} must be objects")
    expected = {
        "train_micro_batch_size_per_gpu": (train.batch_size, "batch_size"),
        "gradient_accumulation_steps": (train.grad_accumulation_steps, "grad_accumulation_steps"),
        "train_batch_size": (
            config.images_per_step(world_size),
            "batch_size x grad_accumulation_steps x processes",
        ),
        "gradient_clipping": (train.gradient_clipping, "gradient_clipping"),
    }
    problems = []
    for key, (value, name) in expected.items():
        if settings.get(key, "auto") not in ("auto", value):
            problems.append(f"{key} is {settings[key]}, but {name} is {value}")
        settings[key] = value
    for kind in ("bf16", "fp16"):
        enabled, section = config.model.precision == kind, settings.get(kind, {})
        if section.get("enabled", "auto") not in ("auto", enabled):
            problems.append(f"{kind}.enabled is {section['enabled']}, but precision is {config.model.precision}")
        settings[kind] = section | {"enabled": enabled}
    for key in ("optimizer", "scheduler"):
        if key in settings:
            problems.append(f"it has a section {key!r}, which lr, beta1, warmup_steps, ... replace; remove it")
    zero = settings.get("zero_optimization", {})
    if (stage := zero.get("stage", 0)) not in (1, 2, 3):
        problems.append(f"zero_optimization.stage is {stage}; give 1, 2 or 3 (files in configs/deepspeed)")
    if stage == 3 and config.model.train_tables == "new":
        problems.append("zero_optimization.stage 3 shards the tables that train_tables new reads whole; give 1 or 2")
    if zero.get("elastic_checkpoint"):
        problems.append("zero_optimization.elastic_checkpoint is on; remove it: every checkpoint fits any processes")
    if any("nvme" in str(zero.get(key)) for key in ("offload_optimizer", "offload_param")):
        problems.append("zero_optimization offloads to nvme, which checkpoints do not cover; offload to cpu")
    if problems:
        raise ValueError(f"--deepspeed_config {path} contradicts the settings:\n  " + "\n  ".join(problems))
    with blame(f"--deepspeed_config {path}"):  # DeepSpeed's own check, before minutes of loading
        DeepSpeedConfig({key: value for key, value in settings.items() if key != "train_batch_size"})
    return settings


def gradient_norms(engine) -> dict[str, float]:
    """Norm of the averaged gradient per part of the model. All processes must call it.

    Call it between ``backward`` and ``step`` of the last micro step. Each process sums the squares of its own shard of
    the gradient, and only these sums are reduced.
    """
    from deepspeed.utils import safe_get_local_grad

    squares: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(name)
        squares.setdefault(part, torch.zeros((), device=engine.device))
        if hasattr(parameter, "ds_id"):
            squares[part] = squares[part] + safe_get_local_grad(parameter).float().square().sum()
        elif (shard := parameter._hp_mapping) is not None:
            gradient = shard.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
            if gradient.numel() == parameter.numel():  # the whole gradient, of which this process owns a shard
                gradient = gradient.narrow(0, shard.lp_fragment_address.start, shard.lp_fragment_address.numel)
            squares[part] = squares[part] + gradient.float().square().sum()
    sums = torch.stack(list(squares.values()))
    if distributed.world_size() > 1:
        torch.distributed.all_reduce(sums)
    return dict(zip(squares, sums.sqrt().tolist()))
