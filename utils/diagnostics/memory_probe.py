"""The measured memory of a training step with random weights of given shapes, to check ``memory_model``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from model.backbones import BACKBONES
from model.config import GroundingConfig
from model.loading.placement import PRECISIONS
from model.lora import add_lora
from model.opened import cache_sam_features
from model.processing.processor import UGroundProcessor
from model.processing.thoughts import MARKS
from model.processing.tokens import add_special_tokens
from model.structures import Batch, Sample, Turn
from utils import distributed
from utils.config import Config
from utils.diagnostics import process_memory
from utils.diagnostics.memory_model import GB, Plan, expected
from utils.training.engine import build_engine, deepspeed_settings
from utils.training.group_samples import check_room, sample_answers
from utils.training.zero3 import gathered

TOKENIZER = Path(__file__).resolve().parents[2] / "assets/tiny/llava"
MEASURED_STEPS = 4  # the optimizer creates its state in the first


def compare_with_plan(plan: Plan, config: Config) -> str:
    """A line with the measured and the expected memory of a step."""
    measured = measure_step(plan, config)
    parts = expected(measured.plan)
    by_part = ", ".join(f"{name} {value / GB:.2f}" for name, value in parts.items() if name not in ("total", "host"))
    return (
        f"measured {measured.peak / GB:.2f} GB, expected {parts['total'] / GB:.2f} GB, ratio "
        f"{measured.peak / parts['total']:.2f} ({plan.images} rows of {measured.plan.tokens} tokens; {by_part})"
    )


@dataclass(frozen=True)
class Measured:
    """A measured step.

    Attributes:
        plan: with the actual number of tokens. peak: bytes above what the process held before. seconds: of the last
            step.
    """

    plan: Plan
    peak: float
    seconds: float


def measure_step(plan: Plan, config: Config) -> Measured:
    """Trains a model with random weights of the plan's shape for a few steps, under DeepSpeed.

    With ``sam_feature_cache`` the first step fills the cache, and the others read it. Sampled answers are about as long
    as they may be: random weights seldom end one.
    """
    device, cache = distributed.init(), config.data.sam_feature_cache
    torch.manual_seed(0)
    processor = processor_of(plan.shape, config.model.model_max_length)
    check_room(config.grpo, processor)
    processor.hash_images = bool(cache)
    samples, grpo = random_samples(plan), config.grpo
    batch = processor.collate(samples).to(device, PRECISIONS[config.model.precision])
    prompts = processor.group_prompts(samples, grpo.grpo_tokens)
    count, sampled = torch.tensor(float(plan.answers * plan.images), device=device), None
    before = memory_now(device)
    with random_weights(device, PRECISIONS[config.model.precision]):
        model = BACKBONES[plan.shape.backbone].model(plan.shape)
        settings = config.model
        adapted = add_lora(
            model, settings.lora_r, dropout=settings.lora_dropout, token_rows=plan.token_rows, frozen=plan.frozen
        )
    if plan.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if cache:
        cache_sam_features(model, processor, cache, config.data.sam_feature_cache_gb)
    engine = build_engine(adapted, config, deepspeed_settings(config, 1))
    reset_peak(device)
    for _ in range(MEASURED_STEPS):
        start = time.perf_counter()
        if plan.answers:
            with gathered(engine):
                sampled = sample_answers(model, processor, batch, prompts, count, grpo, config.train.seed)
        output = engine(batch, sampled=sampled)
        engine.backward(output.loss)
        del output
        engine.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    width = batch.input_ids.shape[1]
    actual = replace(plan, tokens=width, labels=len(batch.label_ids) // plan.images, gpus=1)
    if sampled:
        labels = len(sampled.owners) // plan.images
        actual = replace(actual, answer_tokens=sampled.batch.input_ids.shape[1], answer_labels=labels)
    return Measured(actual, peak_memory(device) - before, seconds)


@contextmanager
def random_weights(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """New modules get their weights on the device and in this precision, without a copy in main memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def processor_of(shape: GroundingConfig, max_tokens: int = 2048) -> UGroundProcessor:
    """A processor for a model of this shape, with the tiny model's tokens."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_tokens(list(shape.template.tokens), special_tokens=True)
    marks = MARKS[shape.thought_format].tokens if shape.thought_format in MARKS else ()
    add_special_tokens(tokenizer, shape.codebook_size, shape.template.added, marks)
    return UGroundProcessor(tokenizer, **shape.processor_settings(), max_tokens=max_tokens)


def random_batch(plan: Plan, processor: UGroundProcessor) -> Batch:
    """``random_samples`` as a batch."""
    return processor.collate(random_samples(plan))


def random_samples(plan: Plan) -> list[Sample]:
    """Random square images (no padded patches) with meaningless questions, as many and as long as in the plan."""
    shape, rng = plan.shape, np.random.default_rng(0)
    size = (round(plan.pixels**0.5),) * 2
    question = "where is the red star " * max(1, (plan.tokens - shape.num_image_tokens) // plan.masks // 6)
    samples = []
    for number in range(plan.images):
        masks = np.zeros((plan.masks, *size), np.uint8)
        masks[:, size[0] // 3 : size[0] // 2, size[1] // 3 : size[1] // 2] = 1
        talks: list[tuple[Turn, ...]] = [(Turn(question, "Sure, it is [SEG]."),) for _ in range(plan.masks)]
        samples.append(Sample("noise", rng.integers(0, 255, (*size, 3), dtype=np.uint8), talks, masks, number))
    return samples


def memory_now(device: torch.device) -> int:
    """Bytes on the GPU, or of this process on the CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else process_memory.resident()


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        process_memory.forget_peak()


def peak_memory(device: torch.device) -> int:
    """The largest ``memory_now`` since ``reset_peak``."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_memory.peak_resident()
