"""Checks of scripts/gpu_check.py: a device computes what the CPU does, the programs run on it, and a step's memory.

All models have random weights, or are the tiny stand-ins in assets/. Nothing is downloaded.
"""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.config import UGroundConfig
from model.lora import part_of
from model.settings import RECIPES
from model.structures import Prediction, Sample, Turn
from utils.config import load_config
from utils.diagnostics.benchmark import EXACT, LISA_STYLE, PRESETS, UGROUND, Bench
from utils.diagnostics.findings import Finding, ok, problem, skipped, warning
from utils.diagnostics.memory_model import GB, expected, on_cuda, plan_of_preset, plan_of_shape
from utils.wording import counted

ROOT = Path(__file__).resolve().parents[2]
PAPER = RECIPES["paper"] | UGROUND
METHODS: dict[str, dict[str, Any]] = {  # each undoes the one before
    "policy": PAPER,
    "exact gradient": PAPER | EXACT,
    "last layer, no maps": PAPER | LISA_STYLE,
    "soft fusion": PAPER | {"layer_selection": "soft"},
    "released recipe": PAPER | RECIPES["released"],
}
TOLERANCE = 1e-3  # relative, of losses and gradient norms in float32 without TF32
ROUNDING = 0.05  # the same in bf16
DRAWN = ("--train", "24", "--val", "8", "--test", "4")  # images of each drawn data set
CHECKPOINTING = ("--gradient_checkpointing", "true")
OFFLOADED = ("--deepspeed_config", str(ROOT / "configs/deepspeed/zero2_offload.json"))
STEPS = {
    "as configured": (),
    "gradient checkpointing": CHECKPOINTING,
    "offloaded optimizer": OFFLOADED,
    "checkpointing, offloaded": (*CHECKPOINTING, *OFFLOADED),
}


# -- numbers -----------------------------------------------------------------------------------------------------------


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 without TF32, which CUDA uses for convolutions by default."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def tiny_bench(folder: str) -> Bench:
    """The tiny preset on the CPU, without dropout."""
    bench = Bench(PRESETS["tiny"], "cpu", folder)
    for module in bench.wrapped.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return bench


def tiny_shape() -> UGroundConfig:
    with tempfile.TemporaryDirectory() as folder:
        return tiny_bench(folder).model.config


def mixed_samples(bench: Bench) -> list[Sample]:
    """Images of three sizes: two questions, none with a mask, and one with two masks."""
    plain, large = bench.samples(2, images=1)[0], bench.samples(1, segs=2, images=1, size=(200, 90))[0]
    absent = bench.samples(1, images=1, size=(64, 64))[0]
    absent = replace(
        absent, conversations=[(Turn("the cube", "There is no such thing: [REJ]."),)], masks=absent.masks[:0]
    )
    return [replace(sample, sample_id=number) for number, sample in enumerate((plain, absent, large))]


def loss_and_gradients(model: Any, batch: Any) -> dict[str, float]:
    """The loss, and the norm of the gradient of each part."""
    model.zero_grad()
    loss = model(batch).loss
    loss.backward()
    squares: dict[str, float] = {"loss": loss.item() ** 2}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            part = part_of(name)
            squares[part] = squares.get(part, 0.0) + float(parameter.grad.float().square().sum())
    return {part: square**0.5 for part, square in squares.items()}


def check_training_numbers(device: str) -> Iterator[Finding]:
    """Loss and gradients of a step against the CPU's, for several methods; also of a batch without masks."""
    with tempfile.TemporaryDirectory() as folder, full_precision():
        bench = tiny_bench(folder)
        bench.model.visual_model.cache = None  # SAM's encoder runs on each device
        model: Any = bench.wrapped
        samples = mixed_samples(bench)
        cases = [(name, settings, samples) for name, settings in METHODS.items()]
        cases.append(("no mask in the batch", PAPER, samples[1:2]))
        for name, settings, chosen in cases:
            bench.configure(settings)
            here = copy.deepcopy(model)  # the moving baseline is state, too
            wanted = loss_and_gradients(here, bench.processor.collate(chosen))
            for dtype, bound in ((torch.float32, TOLERANCE), (torch.bfloat16, ROUNDING)):
                there = copy.deepcopy(model).to(device, dtype)
                found = loss_and_gradients(there, bench.processor.collate(chosen).to(torch.device(device), dtype))
                parts = ["loss"] if dtype is torch.bfloat16 else list(wanted)  # another layer may be sampled in bf16
                off = {k: abs(found[k] - wanted[k]) / max(wanted[k], 1e-3) for k in parts}
                worst = max(off, key=lambda part: off[part])
                text = f"{name}, {str(dtype).removeprefix('torch.')}: {worst} differs by {off[worst]:.1e}"
                yield ok(text) if off[worst] <= bound else problem(text, f"at most {bound:g} was expected")


def check_answers(device: str) -> Iterator[Finding]:
    """Written and given answers, in a batch and alone, and sampled layers, against the CPU's in float32."""
    with tempfile.TemporaryDirectory() as folder, full_precision():
        bench = tiny_bench(folder)
        bench.model.visual_model.cache = None
        bench.wrapped.eval()
        here: Any = bench.model
        there = copy.deepcopy(here).to(device)
        samples = mixed_samples(bench)

        def ask(model: Any, chosen: list[Sample], given: bool, **options: Any) -> list[Prediction]:
            turns = [[talk[0] if given else Turn(talk[0].question) for talk in s.conversations] for s in chosen]
            batch = bench.processor.prompts([sample.image for sample in chosen], turns)
            rows = model.predict(batch.to(model.device, torch.float32), max_new_tokens=12, **options)
            return [prediction for row in rows for prediction in row]

        for name, given, rule in (
            ("written", False, "argmax"),
            ("given", True, "argmax"),
            ("given, mc:8", True, "mc:8"),
        ):
            wanted = ask(here, samples, given, layer_policy=rule)
            found = ask(there, samples, given, layer_policy=rule)
            yield compare_answers(f"{name} answers, {len(samples)} images, with the CPU's", found, wanted)
        alone = [prediction for sample in samples for prediction in ask(there, [sample], False)]
        yield compare_answers("written answers in a batch, with each image alone", ask(there, samples, False), alone)


def compare_answers(name: str, found: list[Prediction], wanted: list[Prediction]) -> Finding:
    if [p.token_ids for p in found] != [p.token_ids for p in wanted]:
        return problem(f"{name}: other tokens", "equal tokens were expected")
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if len(a.mask_logits)]
    off = max((float((a.mask_logits - b.mask_logits).abs().max()) for a, b in pairs), default=0.0)
    scale = max((float(b.mask_logits.abs().max()) for _, b in pairs), default=1.0)
    same = all(a.layers == b.layers for a, b in pairs)
    text = f"{name}: same tokens, {'same' if same else 'other'} layers, logits differ by {off:.1e} of {scale:.1e}"
    return ok(text) if same and off <= 1e-2 * scale else problem(text, "the same was expected")


def check_synchronizations(device: str) -> Iterator[Finding]:
    """How often a training step makes the host wait for the device."""
    if not device.startswith("cuda"):
        yield skipped("synchronizations", "only CUDA counts them")
        return
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(PRESETS["tiny"], device, folder)
        batch = bench.batch(mixed_samples(bench))
        bench.step(batch)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                bench.step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = sorted({f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)})
    text = f"a step waits for the device at {counted(len(places), 'place')}: {', '.join(places) or 'none'}"
    yield ok(text) if not places else warning(text, "values that Python reads stop the queue of kernels")


# -- programs ----------------------------------------------------------------------------------------------------------


def check_programs(device: str) -> Iterator[Finding]:
    """Trains the tiny model on drawn scenes, resumes, merges, evaluates and asks, each program in its own process."""
    if find_spec("deepspeed") is None:
        yield skipped("train_ds.py, merge_lora.py, test.py, chat.py", "install deepspeed, which training needs")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, runs, train = folder / "data", folder / "runs", ["train_ds.py", "--config", "configs/tiny.yaml"]
        train += ["--dataset_dir", str(data), "--log_base_dir", str(runs), "--steps_per_epoch", "3", "--workers", "1"]
        train += ["--val_limit", "4", "--log_every", "1", "--warmup_steps", "2"]
        merged, picture = runs / "tiny/merged", data / "reason_seg/ReasonSeg/val/val_00000.jpg"
        evaluate = ["test.py", "--version", str(merged), "--dataset_dir", str(data), "--output", str(folder / "eval")]
        commands: dict[str, list[str]] = {
            "draw data": ["scripts/make_demo_data.py", "--out", str(data), *DRAWN],
            "train in fp32": [*train, "--epochs", "1"],
            "resume": [*train, "--epochs", "2", "--auto_resume", "true"],
            "train in bf16, checkpointing, offload, feature cache, compiled SAM": [
                *[*train, "--epochs", "1", "--exp_name", "bf16", "--precision", "bf16", "--compile_sam", "true"],
                *["--sam_feature_cache", str(folder / "features"), *CHECKPOINTING, *OFFLOADED],
            ],
            "merge": ["scripts/merge_lora.py", "--checkpoint", str(runs / "tiny"), "--output", str(merged)],
            "evaluate": [*evaluate, "--val_dataset", "ReasonSeg|val_short||grefcoco|unc|val", "--mode", "generate"],
            "ask": ["chat.py", "--version", str(merged), "--image", str(picture), "--prompt", "the largest shape"],
        }
        commands["ask"] += ["--output", str(folder / "answers"), "--layer_policy", "mc:4"]
        hidden = {} if device.startswith("cuda") else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        for title, command in commands.items():
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, *command], cwd=ROOT, env=os.environ | hidden, capture_output=True, text=True
            )
            if done.returncode:
                last = " / ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-3:])
                yield problem(
                    f"{title}: exit code {done.returncode}: {last}", f"run: python {' '.join(command[:3])} ..."
                )
                return
            yield ok(f"{title}: {time.perf_counter() - start:.0f} s")
    if not device.startswith("cuda") or torch.cuda.device_count() < 2:
        yield skipped("two processes", "NCCL wants a GPU for each; tests/training runs two on a CPU")


def check_quantization(device: str) -> Iterator[Finding]:
    """A pass through 8-bit and 4-bit layers, if bitsandbytes is installed."""
    if find_spec("bitsandbytes") is None:
        yield skipped("quantized layers", "pip install bitsandbytes")
        return
    from model.loading.placement import quantize_layers

    for kind in ("8bit", "4bit"):
        with tempfile.TemporaryDirectory() as folder:
            bench = tiny_bench(folder)
            quantize_layers(bench.model, kind, device)
            bench.model.to(device)  # type: ignore[arg-type]
            prompt = bench.processor.prompts([bench.samples(1)[0].image], [[Turn("the cube")]])
            bench.model.eval().predict(prompt.to(bench.model.device, torch.float32), max_new_tokens=4)
        yield ok(f"an answer through {kind} layers")


# -- a step of full size -----------------------------------------------------------------------------------------------


def check_steps(device: str, preset: str) -> Iterator[Finding]:
    """Steps of the preset under DeepSpeed: seconds, and peak memory beside the formula of ``memory_model``."""
    if find_spec("deepspeed") is None:
        yield skipped("steps under DeepSpeed", "install deepspeed, which training needs")
        return
    from utils.diagnostics.memory_probe import measure_step

    for title, flags in STEPS.items():
        settings = ["--precision", "bf16" if device.startswith("cuda") else "fp32", "--grad_accumulation_steps", "1"]
        config = load_config([*settings, "--lora_r", "64" if preset == "13b" else "8", *flags], needs=())
        plan = plan_of_shape(tiny_shape(), config) if preset == "tiny" else plan_of_preset(preset, config)
        measured = measure_step(plan, config)
        gc.collect()
        torch.cuda.empty_cache()
        parts = expected(measured.plan)
        formula = (on_cuda(parts) if device.startswith("cuda") else parts["total"] + parts["host"]) / GB
        peak, size = measured.peak / GB, f"{measured.plan.images} images of {measured.plan.tokens} tokens"
        memory = f"{peak:.1f} GB measured, {formula:.1f} GB by the formula ({peak / formula:.2f})"
        yield ok(f"{title}: {measured.seconds:.3f} s, {size}, {memory}")
