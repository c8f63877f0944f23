"""Checks of scripts/gpu_check.py: a device computes what the CPU does, the programs run on it, and a step's memory.

All models have random weights, or are the tiny stand-ins in assets/. Nothing is downloaded.
"""

from __future__ import annotations

import copy
import gc
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.config import UGroundConfig
from model.lora import part_of
from model.settings import RECIPES
from model.structures import Prediction, Sample, Turn
from utils.config import Config, load_config
from utils.diagnostics.benchmark import EXACT, LISA_STYLE, PRESETS, UGROUND, Bench
from utils.diagnostics.findings import Finding, ok, problem, skipped, warning
from utils.diagnostics.memory_model import GB, Plan, expected, on_cuda, plan_of_preset, plan_of_shape
from utils.inference.session import ImageSession
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
TINY = "configs/tiny.yaml"
PATIENCE = 180  # seconds for a program: where one of two processes fails, the other waits for it
CONVERSATION = ("the cube", "and what is beside it?")
DRAWN = ("--train", "24", "--val", "8", "--test", "4")  # images of each drawn data set
CHECKPOINTING = ("--gradient_checkpointing", "true")
OFFLOADED = ("--deepspeed_config", str(ROOT / "configs/deepspeed/zero2_offload.json"))
STEPS: dict[str, tuple[str, ...]] = {
    "as configured": (),
    "gradient checkpointing": CHECKPOINTING,
    "offloaded optimizer": OFFLOADED,
    "checkpointing, offloaded": (*CHECKPOINTING, *OFFLOADED),
    "feature cache": ("--sam_feature_cache", "{folder}"),
}
FORMULA = (0.8, 1.1)  # measured memory / the formula's, on a GPU


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
        sessions = [ImageSession(model, bench.processor, samples[0].image) for model in (there, here)]
        found, wanted = ([session.ask(text, max_new_tokens=12) for text in CONVERSATION] for session in sessions)
        yield compare_answers(
            f"a conversation of {counted(len(CONVERSATION), 'question')}, with the CPU's", found, wanted
        )


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
    """How often a training step and an answer make the host wait for the device."""
    if not device.startswith("cuda"):
        yield skipped("synchronizations", "only CUDA counts them")
        return
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(PRESETS["tiny"], device, folder)
        step, answer = partial(bench.step, bench.batch(mixed_samples(bench))), bench.ask()
        places = synchronizations(step)
        shown = ", ".join(sorted(places)) or "none"
        text = f"a step waits for the device at {counted(len(places), 'place')}: {shown}"
        yield ok(text) if not places else warning(text, "values that Python reads stop the queue of kernels")
        places = synchronizations(answer)
        shown = ", ".join(f"{count} at {place}" for place, count in places.most_common())
        yield ok(f"an answer of 12 tokens waits for the device {counted(places.total(), 'time')}: {shown}")


def synchronizations(call: Callable[[], Any]) -> Counter[str]:
    """How often the second of two calls waits for the GPU, by file and line."""
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))


# -- programs ----------------------------------------------------------------------------------------------------------


def check_programs(device: str) -> Iterator[Finding]:
    """Trains the tiny model on drawn scenes, resumes, merges, evaluates and asks, each program in its own process."""
    has_deepspeed = find_spec("deepspeed") is not None
    if not has_deepspeed:
        yield skipped("train_ds.py: the untrained model is merged", "install deepspeed, which training needs")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, runs, train = folder / "data", folder / "runs", training_command(folder)
        merged, picture = folder / "merged", data / "reason_seg/ReasonSeg/val/val_00000.jpg"
        evaluate = ["test.py", "--version", str(merged), "--dataset_dir", str(data), "--output", str(folder / "eval")]
        trained = ("--checkpoint", str(runs / "tiny")) if has_deepspeed else ("--config", TINY)
        commands: dict[str, list[str]] = {
            "draw data": ["scripts/make_demo_data.py", "--out", str(data), *DRAWN],
            "train in fp32": [*train, "--epochs", "1"],
            "resume": [*train, "--epochs", "2", "--auto_resume", "true"],
            "train in bf16, checkpointing, offload, feature cache, compiled SAM": [
                *[*train, "--epochs", "1", "--exp_name", "bf16", "--precision", "bf16", "--compile_sam", "true"],
                *["--sam_feature_cache", str(folder / "features"), *CHECKPOINTING, *OFFLOADED],
            ],
            "merge": ["scripts/merge_lora.py", *trained, "--output", str(merged)],
            "evaluate": [*evaluate, "--val_dataset", "ReasonSeg|val_short||grefcoco|unc|val", "--mode", "generate"],
            "ask": ["chat.py", "--version", str(merged), "--image", str(picture), "--prompt", "the largest shape"],
        }
        commands["ask"] += ["--output", str(folder / "answers"), "--layer_policy", "mc:4"]
        for title, command in commands.items():
            if command[0] == train[0] and not has_deepspeed:
                continue
            finding = run_programs(title, command, [environment(device)])
            yield finding
            if finding.level == "problem":
                return


def check_two_processes(device: str) -> Iterator[Finding]:
    """Trains the tiny model in two processes, each on its own GPU, or both on the one that there is.

    NCCL refuses two processes on a GPU. gloo does not: it copies what it reduces to the host.
    """
    if find_spec("deepspeed") is None:
        yield skipped("two processes", "install deepspeed, which training needs")
        return
    shared = device.startswith("cuda") and torch.cuda.device_count() < 2
    with tempfile.TemporaryDirectory() as name, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()  # and hope that it stays free
        drawn = ["scripts/make_demo_data.py", "--out", str(Path(name) / "data"), *DRAWN]
        if (finding := run_programs("draw data", drawn, [environment(device)])).level == "problem":
            yield finding
            return
        group = environment(device) | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        group |= {"UGROUND_BACKEND": "gloo"} if shared else {}
        ranks = [group | {"RANK": str(rank), "LOCAL_RANK": "0" if shared else str(rank)} for rank in range(2)]
        where = "one GPU, with gloo" if shared else "two GPUs" if device.startswith("cuda") else "the CPU"
        finding = run_programs(
            f"train in two processes on {where}", [*training_command(Path(name)), "--epochs", "1"], ranks
        )
        yield replace(finding, level="warning") if shared and finding.level == "problem" else finding


def training_command(folder: Path) -> list[str]:
    """train_ds.py of the tiny model on the data in ``folder``, three steps an epoch."""
    paths = ["--dataset_dir", str(folder / "data"), "--log_base_dir", str(folder / "runs")]
    short = ["--steps_per_epoch", "3", "--workers", "1", "--val_limit", "4", "--log_every", "1", "--warmup_steps", "2"]
    return ["train_ds.py", "--config", TINY, *paths, *short]


def environment(device: str) -> dict[str, str]:
    """The environment of a program that must run on the device."""
    return os.environ | ({} if device.startswith("cuda") else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"})


def run_programs(title: str, command: list[str], environments: list[dict[str, str]]) -> Finding:
    """Runs a program of the project, in one process per environment at the same time."""

    def run(env: dict[str, str]) -> tuple[int, str]:
        call = [sys.executable, *command]
        try:
            done = subprocess.run(call, cwd=ROOT, env=env, timeout=PATIENCE, capture_output=True, text=True)
        except subprocess.TimeoutExpired:
            return 1, f"not finished after {PATIENCE} s"
        return done.returncode, " / ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-3:])

    start = time.perf_counter()
    with ThreadPoolExecutor(len(environments)) as pool:
        failed = [end for end in pool.map(run, environments) if end[0]]
    if failed:
        code, last = failed[0]
        return problem(f"{title}: exit code {code}: {last}", f"run: python {' '.join(command[:3])} ...")
    return ok(f"{title}: {time.perf_counter() - start:.0f} s")


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
    shape = tiny_shape() if preset == "tiny" else None
    for title, flags in STEPS.items():
        with tempfile.TemporaryDirectory() as folder:
            settings = [
                "--precision",
                "bf16" if device.startswith("cuda") else "fp32",
                "--grad_accumulation_steps",
                "1",
            ]
            settings += ["--lora_r", "64" if preset == "13b" else "8", *(flag.format(folder=folder) for flag in flags)]
            config = load_config(settings, needs=())
            plan = plan_of_shape(shape, config) if shape else plan_of_preset(preset, config)
            yield measured_step(title, device, plan, config)
        gc.collect()  # the engine has cycles
        torch.cuda.empty_cache()


def measured_step(title: str, device: str, plan: Plan, config: Config) -> Finding:
    """Seconds and memory of a step. A card that is too small is no fault of the code."""
    from utils.diagnostics.memory_probe import measure_step

    on_gpu = device.startswith("cuda")

    def formula(plan: Plan) -> float:
        parts = expected(plan)
        return (on_cuda(parts) if on_gpu else parts["total"] + parts["host"]) / GB

    try:
        measured = measure_step(plan, config)
    except torch.OutOfMemoryError:
        return warning(f"{title}: out of memory", f"the formula expects {formula(plan):.1f} GB")
    peak, size = measured.peak / GB, f"{measured.plan.images} images of {measured.plan.tokens} tokens"
    ratio = peak / formula(measured.plan)
    memory = f"{peak:.1f} GB measured, {formula(measured.plan):.1f} GB by the formula ({ratio:.2f})"
    text = f"{title}: {measured.seconds:.3f} s, {size}, {memory}"
    if on_gpu and not FORMULA[0] <= ratio <= FORMULA[1]:
        return warning(text, f"{FORMULA[0]} to {FORMULA[1]} was expected: doctor.py --memory is wrong about this card")
    return ok(text)
