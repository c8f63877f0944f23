"""The measured memory of a training step with random weights of given shapes, to check ``memory_model``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from model.loading.placement import PRECISIONS
from model.lora import add_lora
from model.processing.processor import UGroundProcessor
from model.structures import Batch, Sample, Turn
from model.UGround import UGroundForCausalLM
from utils import distributed
from utils.config import Config
from utils.diagnostics import process_memory
from utils.diagnostics.memory_model import GB, Plan, expected
from utils.training.engine import build_engine, deepspeed_settings

TOKENIZER = Path(__file__).resolve().parents[2] / "assets/tiny/llava"
MEASURED_STEPS = 2  # the optimizer creates its state in the first


def compare_with_plan(plan: Plan, config: Config) -> str:
    """A line with the measured and the expected memory of a step."""
    actual, measured = measure_step(plan, config)
    parts = expected(actual)
    by_part = ", ".join(f"{name} {value / GB:.2f}" for name, value in parts.items() if name not in ("total", "host"))
    return (
        f"measured {measured / GB:.2f} GB, expected {parts['total'] / GB:.2f} GB, "
        f"ratio {measured / parts['total']:.2f} ({actual.images} rows of {actual.tokens} tokens; {by_part})"
    )


def measure_step(plan: Plan, config: Config) -> tuple[Plan, float]:
    """Trains a model with random weights of the plan's shape for a few steps.

    Returns:
        the plan with the actual number of tokens, and the peak in bytes above what the process held before.
    """
    device = distributed.init()
    torch.manual_seed(0)
    batch = random_batch(plan).to(device, PRECISIONS[config.model.precision])
    before = memory_now(device)
    model: Any = UGroundForCausalLM(plan.shape)  # transformers' annotation of ``to`` is wrong
    model.to(device, PRECISIONS[config.model.precision])
    adapted = add_lora(model, config.model.lora_r, dropout=config.model.lora_dropout)
    if plan.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    engine = build_engine(adapted, config, deepspeed_settings(config, 1))
    reset_peak(device)
    for _ in range(MEASURED_STEPS):
        output = engine(batch)
        engine.backward(output.loss)
        del output
        engine.step()
    width = batch.input_ids.shape[1]
    actual = replace(plan, tokens=width, labels=len(batch.label_ids) // plan.images, gpus=1, offload=False)
    return actual, peak_memory(device) - before


def random_batch(plan: Plan) -> Batch:
    """Random images with meaningless questions, as many and as long as in the plan."""
    shape, rng = plan.shape, np.random.default_rng(0)
    processor = UGroundProcessor(
        AutoTokenizer.from_pretrained(TOKENIZER), shape.clip_side, shape.clip_patch, shape.sam_config["image_size"]
    )
    height = round((plan.pixels * 3 / 4) ** 0.5)
    size = (height, plan.pixels // height)
    question = "where is the red star " * max(1, (plan.tokens - shape.num_image_tokens) // plan.masks // 6)
    samples = []
    for number in range(plan.images):
        masks = np.zeros((plan.masks, *size), np.uint8)
        masks[:, size[0] // 3 : size[0] // 2, size[1] // 3 : size[1] // 2] = 1
        talks: list[tuple[Turn, ...]] = [(Turn(question, "Sure, it is [SEG]."),) for _ in range(plan.masks)]
        samples.append(Sample("noise", rng.integers(0, 255, (*size, 3), dtype=np.uint8), talks, masks, number))
    return processor.collate(samples)


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
