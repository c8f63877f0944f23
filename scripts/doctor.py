"""Checks an installation, weights and data, and reports what is wrong and how to fix it:

    python scripts/doctor.py                                  the installation
    python scripts/doctor.py --config configs/tiny.yaml       ... and everything that training needs
    python scripts/doctor.py --version runs/tiny/merged       ... and a finished model
    python scripts/doctor.py --memory [--config FILE] [--gpus 8] [--offload]   computed memory

One line per finding: ok, skipped, warning, or problem -> fix. A failing check does not stop the others. With --config
(settings as for train_ds.py): files, weights, tokens, memory and disk, data sets, a forward and a backward pass, a
gradient for every trainable part, and whether training can overfit 8 samples. Exit code: 0 = no problem, 1 = problems,
2 = invalid flags.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Only the standard library at import: missing or broken libraries are what this program reports.
from utils.command_line.parser import Parser, listed
from utils.diagnostics.drivers import torch_for
from utils.diagnostics.findings import Finding, Page, ok, problem, skipped, warning
from utils.diagnostics.process_memory import read_proc

ROOT = Path(__file__).resolve().parents[1]
INSTALL = "pip install -r requirements.txt (or bash scripts/setup.sh)"
IMPORTS = ("torch", "torchvision", "transformers", "peft", "deepspeed", "segment_anything", "cv2", "pycocotools.mask")
SHARED_MEMORY = 1e9  # bytes that a few data workers need to pass batches on


def parse_arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the settings of train_ds.py; ``args.merged`` is the finished model to check, or None."""
    parser = Parser(program="train_ds.py", description=__doc__)
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML file of train_ds.py; all its settings can be given as flags, too")
    add(
        "--version",
        metavar="DIR",
        help="a finished model to check; with --config, the setting of train_ds.py",
    )
    add(
        "--vision_tower",
        metavar="DIR",
        help="CLIP for a published checkpoint; with --config, the setting of train_ds.py",
    )
    add(
        "--overfit",
        choices=("auto", "on", "off"),
        default="auto",
        help="train until 8 samples are overfit (auto: only if that is cheap)",
    )
    add("--memory", action="store_true", help="only print the expected memory per GPU")
    add("--gpus", type=int, default=0, metavar="N", help="with --memory: GPUs that share the optimizer (default: 1, 8)")
    add("--offload", action="store_true", help="with --memory: offload the optimizer to the host's memory")
    add(
        "--measure",
        action="store_true",
        help="with --memory: train a random medium-size model with the settings given as flags, and compare the "
        "measured memory",
    )
    try:
        from utils.config import make_parser
    except ImportError:  # YAML's library, which the page reports
        args, settings = parser.parse_known_args(arguments)
    else:
        args, settings = parser.parse_with_settings(make_parser(), arguments)
    args.merged = None if args.config else args.version
    if args.measure and args.config:
        parser.error("--measure trains a model of its own, without --config; settings are given as flags")
    if args.config:
        settings = ["--config", args.config, *settings]
        settings += ["--version", args.version] if args.version else []
        settings += ["--vision_tower", args.vision_tower] if args.vision_tower else []
    elif settings and not args.measure:
        flags = ", ".join(word.partition("=")[0] for word in settings if word.startswith("-"))
        parser.error(f"{flags}: a setting of train_ds.py needs --config" if flags else listed(parser.explain(settings)))
    return args, settings


def main(arguments: list[str] | None = None) -> int:
    args, settings = parse_arguments(arguments)
    if args.memory:
        return print_memory(args, settings)
    page = Page()
    page.heading("Installation")
    works = check_installation(page)
    if not works:
        page.add(skipped("everything else", "fix the installation first"))
    else:
        if args.config:
            check_configuration(page, settings, args.overfit)
        if args.merged:
            page.heading("Model")
            from model.loading.placement import pick_device, pick_precision
            from utils.diagnostics.checks import check_merged

            device = pick_device("auto")
            page.run(check_merged, args.merged, device, pick_precision("auto", device), args.vision_tower or "")
    print(f"\n{page.summary()}")
    return 1 if page.count("problem") else 0


# -- installation ------------------------------------------------------------------------------------------------------


def check_installation(page: Page) -> bool:
    """Checks Python, packages and devices; returns whether the other checks can run."""
    if not page.run(check_python):
        return False
    page.run(check_packages)
    works = page.run(check_imports)
    if works:
        page.run(check_devices)
    page.run(check_system)
    return works


def check_python() -> Iterator[Finding]:
    wanted = re.search(r'requires-python = ">=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    low = tuple(map(int, wanted.groups())) if wanted else (0, 0)
    text = f"Python {platform.python_version()} on {platform.platform()}"
    if sys.version_info[:2] < low:
        yield problem(text, f"Python {low[0]}.{low[1]} or newer is needed; create a new environment (scripts/setup.sh)")
    else:
        yield ok(text)


def check_packages() -> Iterator[Finding]:
    """Compares installed versions with the ranges of pyproject.toml."""
    import tomllib  # not in Python 3.10, which the previous check rejects

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = {}
    for text in project["dependencies"]:
        wanted = Requirement(text)
        try:
            versions[wanted.name] = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            yield problem(f"{wanted.name} is not installed ({text} is needed)", INSTALL)
            continue
        if not wanted.specifier.contains(versions[wanted.name], prereleases=True):
            yield problem(f"{wanted.name} is {versions[wanted.name]}, {text} is needed", f"pip install '{text}'")
    shown = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "deepspeed") if name in versions)
    yield ok(f"{len(versions)} of {len(project['dependencies'])} packages are installed ({shown})")


def check_imports() -> Iterator[Finding]:
    """Imports the libraries: this reveals a torchvision built for another torch, or missing system libraries."""
    imported = []
    for name in IMPORTS:
        try:
            module = importlib.import_module(name)
            if name == "torch" and not module.cuda.is_available():
                os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it detects the device itself
            imported.append(name)
        except Exception as error:  # a broken library can raise anything
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            fix = "torch and torchvision must be of one release; " if name.startswith("torch") else ""
            yield problem(f"import {name} fails: {reason}", f"{fix}{INSTALL}")
    if imported:
        yield ok(f"imported {', '.join(imported)}")


def check_devices() -> Iterator[Finding]:
    """GPUs, and whether torch can use them."""
    import torch

    driver = Path("/proc/driver/nvidia/version")
    has_gpu = driver.exists() or Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    if not torch.cuda.is_available():
        if has_gpu:
            found = re.search(r"\d+\.\d+(\.\d+)?", driver.read_text()) if driver.exists() else None
            number = found.group() if found else "unknown"
            text = f"an NVIDIA GPU is present (driver {number}), but torch cannot use it"
            yield problem(text, f"this torch is a {build} build: update the driver, or {torch_for(number)}")
        else:
            yield ok(f"no GPU; training and inference run on the CPU (torch {torch.__version__}, {build} build)")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        text = f"cuda:{index} {properties.name}, {properties.total_memory / 1e9:.0f} GB"
        try:
            ones = torch.ones(64, 64, device=f"cuda:{index}", dtype=torch.bfloat16)
            value = float((ones @ ones).float().sum())
        except RuntimeError as error:
            arch = ", ".join(torch.cuda.get_arch_list())
            yield problem(f"{text} cannot multiply: {str(error).splitlines()[0]}", f"this torch has kernels for {arch}")
            continue
        if value != 64**3:
            yield problem(f"{text} multiplies wrongly ({value} instead of {64**3})", "a damaged driver or GPU")
        elif not torch.cuda.is_bf16_supported(including_emulation=False):
            yield warning(f"{text}: no bf16 in hardware", "use --precision fp32")
        else:
            yield ok(f"{text}, bf16")


def check_system() -> Iterator[Finding]:
    """Cores, memory, and the shared memory through which data workers pass batches."""
    yield ok(f"{os.cpu_count()} cores, {available_memory() / 1e9:.1f} GB of memory free")
    shared = Path("/dev/shm")
    if shared.is_dir() and (free := shutil.disk_usage(shared).free) < SHARED_MEMORY:
        text = f"/dev/shm has {free / 1e6:.0f} MB: data workers crash when it is full"
        yield warning(text, "start the container with --shm-size 8g, or train with --workers 0")


def available_memory() -> float:
    """Bytes that can be allocated without swapping."""
    return float(read_proc("meminfo").get("MemAvailable") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


# -- memory ------------------------------------------------------------------------------------------------------------


def print_memory(args: argparse.Namespace, settings: list[str]) -> int:
    """Prints tables of the expected memory for the configuration, or for the paper's 7B and 13B."""
    from utils.config import load_config
    from utils.diagnostics import memory_model

    if args.measure:
        from utils.diagnostics.memory_probe import compare_with_plan

        config = load_config([*memory_model.MEDIUM_SETTINGS, *settings], needs=())
        print(compare_with_plan(memory_model.plan_of_preset("medium", config), config))
        return 0
    if args.config:
        plans = {"this configuration": memory_model.plan_of(load_config(settings, needs=("model",)))}
    else:
        ranks = {"7b": "8", "13b": "64"}
        configs = {name: load_config(["--lora_r", rank], needs=()) for name, rank in ranks.items()}
        plans = {name.upper(): (memory_model.plan_of_preset(name, config), "") for name, config in configs.items()}
    for name, (plan, source) in plans.items():
        print("\n".join(memory_model.tables(name, plan, source, [args.gpus] if args.gpus else [1, 8], args.offload)))
    return 0


# -- a configuration ---------------------------------------------------------------------------------------------------


def check_configuration(page: Page, settings: list[str], overfit: str) -> None:
    """Checks everything that training with these settings needs."""
    import torch

    from model.lora import base_of
    from utils.config import load_config
    from utils.datasets.mixture import make_mixture
    from utils.diagnostics import checks
    from utils.diagnostics.memory_model import plan_of
    from utils.training.engine import build_model

    page.heading("Settings")
    config = page.attempt(load_config, settings)
    if config is None:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    paths = page.run(checks.check_paths, config) and page.run(checks.check_start, config)
    fits = paths and page.run(checks.check_deepspeed, config)
    planned = page.attempt(plan_of, config) if fits else None
    if planned:
        plan, _ = planned
        page.run(checks.check_disk, config, plan.trainable)
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
        fits = page.run(checks.check_memory, plan, device.type, free)

    page.heading("Weights")
    built = page.attempt(build_model, config) if planned and fits else None
    if built is None:
        page.add(skipped("weights, tokens", "fix the problems above first"))
    else:
        page.run(checks.describe_weights, built[2])
        page.run(checks.check_tokens, base_of(built[0]), built[1])

    page.heading("Data")
    unchecked = partial(make_mixture, check=False)  # ``read_samples`` checks it
    is_there = Path(config.data.dataset_dir).is_dir()
    mixture = page.attempt(unchecked, config, name="make_mixture") if is_there else None
    if mixture is not None:
        page.run(checks.describe_data, mixture, config)
        page.run(checks.read_samples, mixture, config.train.seed)
    for spec in () if config.eval.no_eval or not Path(config.data.dataset_dir).is_dir() else config.eval.val_dataset:
        page.run(checks.check_benchmark, spec, config)

    page.heading("Learning")
    batches = page.attempt(checks.collate, config, built[1], mixture, device) if built and mixture else None
    if built is None or batches is None:
        page.add(skipped("forward and backward pass, overfitting", "they need the weights and the data"))
        return
    model = built[0].to(device)
    if config.grpo.objective != "supervised":
        page.run(checks.check_rewards, model, config, built[1], mixture, device)
    if config.grpo.objective == "grpo":
        page.add(skipped("gradients and overfitting on the ground truth", "objective grpo does not learn from it"))
        return
    if page.run(checks.check_gradients, model, batches[0]):
        if overfit == "on" or (overfit == "auto" and checks.is_cheap(model, device)):
            page.run(checks.check_overfit, model, config, batches)
        else:
            page.add(
                skipped(f"overfitting {checks.SAMPLES} samples", f"give --overfit on; {checks.STEPS} steps at most")
            )


if __name__ == "__main__":
    from utils.inference.cli import run

    sys.exit(run(main))
