"""Checks of scripts/doctor.py that need the libraries: settings, weights, tokens, data, gradients, overfitting."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from model.group_policy import forward_sampled
from model.loading import hub
from model.loading.placement import PRECISIONS
from model.loading.pretrained import load
from model.loading.weights import Loaded
from model.lora import base_of, part_of
from model.opened import predict
from model.processing.processor import UGroundProcessor
from model.structures import Batch, Sample, Turn
from utils.config import Config, missing_paths
from utils.datasets import get_eval_dataset
from utils.datasets.mixture import Mixture
from utils.diagnostics.findings import Finding, ok, problem, warning
from utils.diagnostics.memory_model import Plan, expected, on_cuda
from utils.training.checkpoint import checkpoint_bytes
from utils.training.engine import deepspeed_settings, parameter_groups
from utils.training.group_samples import check_room, sample_answers
from utils.training.lineage import adopt, lineage_of
from utils.wording import counted

SAMPLES = 8  # that a working configuration can overfit
GOAL = 0.8  # mean IoU of their masks
STEPS = 150  # of the optimizer, at most
MUST_FALL = 0.3  # final loss / first loss at most: a base that segments well from the start must learn, too
OF_MASKS = ("phi", "sam_prompt_encoder", "sam_mask_decoder", "mask_projector", "image_neck")  # of ``FREEZABLE``
CHEAP = 100e6  # parameters up to which a CPU overfits the samples in a minute or two


# -- settings ----------------------------------------------------------------------------------------------------------


def check_paths(config: Config) -> Iterator[Finding]:
    """Whether all files and folders of the settings exist."""
    missing = missing_paths(config)
    fix = "correct it (README, Train the 7B model on A100s)"
    yield from (problem(text, fix) for text in missing)
    if not missing:
        yield ok("all files and folders of the settings exist")


def check_start(config: Config) -> Iterator[Finding]:
    """What training starts from; a finished model's own settings replace those of ``config``."""
    adopt(config)
    models = [entry["name"] for entry in lineage_of(hub.resolve_folder(config.model.version, "--version").path)]
    yield ok(
        f"training starts from a finished model ({', '.join(models)})"
        if models
        else "training starts from base weights"
    )


def check_deepspeed(config: Config) -> Iterator[Finding]:
    """Whether DeepSpeed's JSON agrees with the settings."""
    deepspeed_settings(config, world_size=1)
    yield ok(f"{config.train.deepspeed_config} agrees with the settings")


def check_disk(config: Config, trainable: int) -> Iterator[Finding]:
    """Disk space for three checkpoints: the latest, the best and the one being written."""
    folder = config.run_folder
    while not folder.exists():
        folder = folder.parent
    needed = 3 * checkpoint_bytes(trainable, PRECISIONS[config.model.precision].itemsize)
    free = shutil.disk_usage(folder).free
    text = f"checkpoints take {needed / 1e9:.2f} GB (three of them while one is written); {config.run_folder} has "
    if not os.access(folder, os.W_OK):
        yield problem(f"{folder} cannot be written to", "set --log_base_dir to a folder that you can write to")
    elif free < needed:
        yield problem(f"{text}{free / 1e9:.2f} GB", "free disk space, or set --log_base_dir to another disk")
    else:
        yield ok(f"{text}{free / 1e9:,.0f} GB")


def check_memory(plan: Plan, device: str, room: float) -> Iterator[Finding]:
    """Expected memory of a step on one GPU (or of one process on the CPU) against the free memory."""
    parts = expected(plan)
    needed = on_cuda(parts) if device == "cuda" else parts["total"] + parts["host"]
    text = f"a step of {plan.images} images takes about {needed / 1e9:.1f} GB; {device} has {room / 1e9:.1f} GB free"
    if needed > room:
        fix = "--gradient_checkpointing true, a smaller --batch_size, more GPUs or offloading: doctor.py --memory"
        yield problem(text, fix)
    else:
        yield ok(text)


# -- weights and tokens ------------------------------------------------------------------------------------------------


def describe_weights(loaded: list[Loaded]) -> Iterator[Finding]:
    """Which weights were loaded from where."""
    for row in loaded:
        text = (
            f"{row.module}: {row.parameters:,} parameters in {row.dtype}, fingerprint {row.fingerprint}, {row.source}"
        )
        yield ok(text)


def check_tokens(model: Any, processor: UGroundProcessor) -> Iterator[Finding]:
    """Whether the special tokens have embeddings, and the same ids in model and tokenizer."""
    ids, settings = processor.tokens, model.config
    rows = model.get_input_embeddings().weight.shape[0]
    listed = ", ".join(f"{name} {value}" for name, value in vars(ids).items())
    largest = max(*ids.added, ids.eos)
    if largest >= rows:
        yield problem(
            f"token {largest} of the tokenizer has no embedding ({rows} rows)",
            "take tokenizer and weights from one folder",
        )
    elif (settings.seg_token_id, settings.rej_token_id) != (ids.seg, ids.rej):
        model_ids = f"[SEG] {settings.seg_token_id}, [REJ] {settings.rej_token_id}"
        yield problem(
            f"the model has {model_ids}; the tokenizer: {listed}", "take tokenizer and weights from one folder"
        )
    else:
        yield ok(f"tokens: {listed}; {rows:,} embeddings")


# -- data --------------------------------------------------------------------------------------------------------------


def describe_data(mixture: Mixture, config: Config) -> Iterator[Finding]:
    """The training data, and how many of its records cannot be used."""
    for row in mixture.describe(config.total_steps * config.images_per_step()):
        bad = row.get("unusable", 0)
        images, passes = counted(row["images"], "image"), f"{row['epochs']:.2f} passes"
        text = f"{row['name']}: {images}, {row['share']:.1%} of the samples, {passes} over them"
        fix = "scripts/inspect_data.py prints the first of them; complete or repair the data set"
        yield warning(f"{text}; {counted(bad, 'record')} cannot be used", fix) if bad else ok(text)


def read_samples(mixture: Mixture, seed: int) -> Iterator[Finding]:
    """Reads three samples of every data set: the first, the middle and the last."""
    for dataset in mixture.datasets:
        indices = sorted({0, len(dataset) // 2, len(dataset) - 1})
        errors = []
        for index in indices:
            try:
                dataset.sample(index, np.random.default_rng((seed, index)))
            except ValueError as error:
                errors.append(str(error))
        if errors:
            text = f"{dataset.name}: {len(errors)} of {len(indices)} samples cannot be read: {errors[0]}"
            yield problem(text, "complete the data set; training would skip such records and warn")
        else:
            yield ok(f"{dataset.name}: {counted(len(indices), 'sample')} read")


def check_benchmark(spec: str, config: Config) -> Iterator[Finding]:
    """Whether a validation benchmark is complete."""
    dataset = get_eval_dataset(spec, config.data.dataset_dir)  # raises DataError if it is incomplete
    sample = dataset[0]
    size = f"{counted(len(dataset), 'image')}, {counted(dataset.num_queries, 'query', 'queries')}"
    yield ok(f"{spec}: {size}; the first was read ({sample.source})")


def samples_with_masks(mixture: Mixture) -> list[Sample]:
    """The first ``SAMPLES`` samples of the mixture that have a mask."""
    samples = []
    for sample_id in range(20 * SAMPLES):
        sample = mixture[sample_id]
        if (sample.masks == 1).any():
            samples.append(sample)
        if len(samples) == SAMPLES:
            break
    return samples


def collate(config: Config, processor: UGroundProcessor, mixture: Mixture, device: torch.device) -> list[Batch]:
    """Batches of samples with masks, of the size that training uses."""
    samples = samples_with_masks(mixture)
    if not samples:
        raise ValueError(f"none of the first {20 * SAMPLES} samples has a mask; choose data with masks (--dataset)")
    size, dtype = config.train.batch_size, PRECISIONS[config.model.precision]
    parts = [samples[start : start + size] for start in range(0, len(samples), size)]
    return [processor.collate(part).to(device, dtype) for part in parts]


# -- gradients and overfitting -----------------------------------------------------------------------------------------


def check_gradients(model: torch.nn.Module, batch: Batch) -> Iterator[Finding]:
    """Whether one forward and backward pass gives a finite loss, and a gradient for every trainable part."""
    model.train()
    model.zero_grad(set_to_none=True)
    started = time.perf_counter()
    output = model(batch)
    output.loss.backward()
    loss, seconds = float(output.loss.detach()), time.perf_counter() - started
    terms = ", ".join(f"{name} {float(value):.3g}" for name, value in output.terms.items())
    if not np.isfinite(loss):
        yield problem(f"the loss is {loss} ({terms})", "damaged weights, or a precision that overflows?")
    else:
        yield ok(
            f"forward and backward pass of {counted(len(batch.sizes), 'image')} in {seconds:.1f} s: "
            f"loss {loss:.3f} ({terms})"
        )
    norms = norms_per_part(model)
    listed = ", ".join(f"{part} {norm:.2g}" for part, norm in norms.items())
    silent = [part for part, norm in norms.items() if not (norm > 0 and np.isfinite(norm))]
    if silent:
        fix = "a loss weight of 0, or a part that the settings do not use? Its parameters would not learn"
        yield problem(f"no usable gradient for {', '.join(silent)} (norms: {listed})", fix)
    elif not norms:
        yield problem("nothing trains", "no parameter requires a gradient; see model/lora.py")
    else:
        yield ok(f"every part that trains receives a gradient (norms: {listed})")


def check_rewards(
    model: torch.nn.Module, config: Config, processor: UGroundProcessor, mixture: Mixture, device: torch.device
) -> Iterator[Finding]:
    """Whether sampled answers to a few questions differ in reward, and which parts learn from that."""
    settings, size = config.grpo, config.train.batch_size
    check_room(settings, processor)
    samples = samples_with_masks(mixture)
    asked = [sample for sample in samples if any(processor.group_prompts([sample], settings.grpo_tokens).questions)]
    if not asked:
        fix = "raise --model_max_length, or lower --grpo_tokens; are there targets in --dataset?"
        yield problem(f"no question about the first {counted(len(samples), 'sample')} can be asked", fix)
        return
    prompts = processor.group_prompts(asked[:size], settings.grpo_tokens)
    questions = sum(map(len, prompts.questions))
    started, base = time.perf_counter(), base_of(model)
    batch = processor.collate(asked[:size]).to(device, PRECISIONS[config.model.precision])
    count = torch.tensor(float(questions * settings.grpo_answers), device=device)
    model.train()
    model.zero_grad(set_to_none=True)
    sampled = sample_answers(base, processor, batch, prompts, count, settings, config.train.seed)
    output = forward_sampled(base, sampled)
    output.loss.backward()
    loss, seconds = float(output.loss.detach()), time.perf_counter() - started
    terms = {name: float(value) for name, value in output.terms.items()}
    rewards = ", ".join(
        f"{name.removeprefix('grpo_reward_')} {value:.2f}" for name, value in terms.items() if "_reward_" in name
    )
    differ = round((1 - terms["grpo_equal"]) * questions)
    text = (
        f"{int(count)} answers to {counted(questions, 'question')} in {seconds:.1f} s, of {terms['grpo_tokens']:.0f} "
        f"tokens: rewards {rewards}; they differ in {differ} of {counted(questions, 'group')}"
    )
    norms = norms_per_part(model)
    if not np.isfinite([loss, *norms.values()]).all():
        yield problem(f"the loss is {loss}, norms of its gradient {norms} ({text})", "a precision that overflows?")
    elif not differ:
        fix = "nothing to learn from: is the model finished? Another --grpo_temperature, other --grpo_rewards?"
        yield warning(text, fix)
    else:
        yield ok(text)
        silent = [part for part, norm in norms.items() if norm == 0 and part in OF_MASKS]
        if silent and settings.objective == "grpo":
            fix = "they train words and layers alone: --freeze these parts, or --objective both"
            yield warning(f"rewards give {', '.join(silent)} no gradient", fix)


def norms_per_part(model: torch.nn.Module) -> dict[str, float]:
    """Gradient norm per trainable part."""
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            square = 0.0 if parameter.grad is None else float(parameter.grad.float().square().sum())
            squares[part_of(name)] = squares.get(part_of(name), 0.0) + square
    return {part: square**0.5 for part, square in squares.items()}


def is_cheap(model: torch.nn.Module, device: torch.device) -> bool:
    """Whether ``check_overfit`` takes only a minute or two."""
    return device.type == "cuda" or sum(parameter.numel() for parameter in model.parameters()) < CHEAP


def check_overfit(model: torch.nn.Module, config: Config, batches: list[Batch]) -> Iterator[Finding]:
    """Whether training overfits a few samples at the configuration's learning rate; if not, it learns nothing else."""
    started = time.perf_counter()
    images = sum(len(batch.sizes) for batch in batches)
    curve: list[tuple[float, float]] = []
    for point in overfit(model, config, batches):
        curve.append(point)
        if point[1] >= GOAL and point[0] <= MUST_FALL * curve[0][0]:
            break
    (first_loss, first_iou), (loss, iou) = curve[0], curve[-1]
    seconds = time.perf_counter() - started
    text = (
        f"{images} samples in {len(curve) - 1} steps ({seconds:.0f} s): IoU {first_iou:.2f} -> {iou:.2f}, "
        f"loss of text and masks {first_loss:.3f} -> {loss:.3f}"
    )
    if iou >= GOAL and loss <= MUST_FALL * first_loss:
        yield ok(f"overfit {text}")
        return
    wanted = f"(IoU {GOAL} and {MUST_FALL:.0%} of the first loss are expected)"
    fix = f"try another --lr (now {config.train.lr:g}); then look at the samples with scripts/inspect_data.py"
    yield problem(f"did not overfit {text} {wanted}", fix)


def overfit(model: torch.nn.Module, config: Config, batches: list[Batch]) -> Iterator[tuple[float, float]]:
    """Yields (loss, mask IoU) on the same batches before each step, and after the last of ``STEPS``.

    The loss is that of text and masks, which can reach 0; that of a map on a coarse grid cannot. As in training, the
    optimizer has float32 master weights, and the learning rate warms up.
    """
    groups = parameter_groups(model, config)
    master = [[p.detach().float().clone().requires_grad_() for p in group["params"]] for group in groups]
    betas = config.train.beta1, config.train.beta2
    optimizer = torch.optim.AdamW(
        [{"params": copies, "lr": group["lr"]} for copies, group in zip(master, groups)], betas=betas, weight_decay=0.0
    )
    pairs = [pair for copies, group in zip(master, groups) for pair in zip(copies, group["params"])]
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=10)
    torch.manual_seed(config.train.seed)
    model.train()
    for _ in range(STEPS + 1):
        model.zero_grad(set_to_none=True)
        losses, overlaps = [], []
        for batch in batches:
            output = model(batch)
            (output.loss / len(batches)).backward()
            losses.append(_text_and_masks(output.terms, config))
            overlaps += [iou for logits, masks in zip(output.mask_logits, batch.masks) for iou in _ious(logits, masks)]
        yield float(np.mean(losses)), float(np.mean(overlaps))
        for copy, parameter in pairs:
            copy.grad = None if parameter.grad is None else parameter.grad.float()
        if config.train.gradient_clipping:
            torch.nn.utils.clip_grad_norm_([copy for copy, _ in pairs], config.train.gradient_clipping)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for copy, parameter in pairs:
                parameter.copy_(copy)


def _text_and_masks(terms: dict[str, torch.Tensor], config: Config) -> float:
    weights = config.loss
    masks = weights.bce_loss_weight * terms["mask_bce"] + weights.dice_loss_weight * terms["mask_dice"]
    return float(weights.text_loss_weight * terms["text"] + weights.mask_loss_weight * masks)


def _ious(logits: torch.Tensor, masks: torch.Tensor) -> list[float]:
    """IoU of each mask over pixels that are not ignored (255): [n, H, W] logits, [n, H, W] uint8."""
    predicted, target = (logits > 0) & (masks != 255), masks == 1
    intersection = (predicted & target).flatten(1).sum(1)
    union = (predicted | target).flatten(1).sum(1)
    return torch.where(union > 0, intersection / union.clamp(min=1), 1.0).tolist()


# -- a finished model --------------------------------------------------------------------------------------------------


def check_merged(folder: str, device: str, precision: str, vision_tower: str) -> Iterator[Finding]:
    """Whether a model folder loads, has its tokens, and answers a question about a synthetic image."""
    opened = load(folder, precision, device, vision_tower=vision_tower)
    model, processor = opened.model, opened.processor
    count = sum(parameter.numel() for parameter in model.parameters())
    yield ok(f"{folder}: {count:,} parameters, {precision} on {device}; all keys matched")
    yield from describe_weights(opened.report())
    yield from check_tokens(model, processor)
    broken = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if broken:
        names = ", ".join(broken[:3])
        yield problem(
            f"{folder}: NaN or infinity in {counted(len(broken), 'parameter')}: {names}", "merge the checkpoint again"
        )
    image = np.full((96, 128, 3), 230, np.uint8)
    image[30:70, 40:90] = (200, 30, 30)
    question = "Where is the red square?"
    (teacher_forced,), (generated,) = (
        predict(model, processor, [image], [[Turn(question, answer)]], max_new_tokens=24)
        for answer in ("Sure, it is [SEG].", "")
    )
    if len(teacher_forced[0].mask_logits) != 1 or not teacher_forced[0].mask_logits.isfinite().all():
        yield problem(f"{folder}: a teacher-forced [SEG] has no finite mask", "the weights are damaged; merge again")
    else:
        yield ok(f"{folder}: a teacher-forced [SEG] has a mask of {tuple(teacher_forced[0].mask_logits.shape[1:])}")
    text = f"{folder}: asked {question!r} about a red square, it generated {generated[0].text!r}"
    yield (
        ok(text)
        if len(generated[0].mask_logits)
        else warning(text, "no [SEG]: is the model trained? Evaluate it with test.py")
    )
