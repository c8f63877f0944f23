"""A random base on disk, and the arguments and environment of training runs in real processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import train_ds
from utils.demo.tiny_model import clip_config, llama_settings

ROOT = Path(__file__).resolve().parents[1]


def write_base(folder: Path, model, tokenizer) -> None:
    """Writes a base in the published formats: a LLaVA-1.5 folder, a CLIP folder, a SAM ``.pth``."""
    for part in ("llava", "clip"):
        (folder / part).mkdir(parents=True)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    own = {name: value for name, value in state.items() if name.startswith(("model.", "lm_head."))}
    own |= {f"model.{name}": value for name, value in state.items() if name.startswith("mm_projector.")}
    save_file(own, folder / "llava/model.safetensors", metadata={"format": "pt"})
    settings = llama_settings(len(tokenizer), width=32, layers=4, heads=2)
    config = {
        "model_type": "llava",
        "mm_hidden_size": clip_config(width=32).hidden_size,
        "system_prompt": "",
        **settings,
    }
    (folder / "llava/config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder / "llava")
    model.vision_tower.save_pretrained(folder / "clip")
    torch.save(model.visual_model.state_dict(), folder / "sam.pth")


def arguments(base: Path, data: Path, runs: Path, **settings) -> list[str]:
    """Flags of a run of a few steps; ``settings`` override them."""
    flags = {
        "version": base / "llava",
        "vision_tower": base / "clip",
        "vision_pretrained": base / "sam.pth",
        "dataset_dir": data,
        "log_base_dir": runs,
        "exp_name": "run",
        "deepspeed_config": ROOT / "configs/deepspeed/zero2.json",
        "dataset": "reason_seg||refer_seg||vqa",
        "refer_seg_data": "grefcoco",
        "precision": "fp32",
        "lora_r": 2,
        "epochs": 2,
        "steps_per_epoch": 3,
        "batch_size": 2,
        "grad_accumulation_steps": 1,
        "lr": 1e-2,
        "warmup_steps": 2,
        "workers": 0,
        "log_every": 1,
        "val_dataset": "ReasonSeg|val_short",
        "val_limit": 2,
        "val_pictures": 2,
    } | settings
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"} | extra


def log_lines(run: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@contextmanager
def killed_after_saving() -> Iterator[None]:
    """Inside, a run in this process is interrupted after its first checkpoint."""
    saved = train_ds.save_step

    def save_and_die(run, results):
        saved(run, results)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_ds, "save_step", save_and_die)
        yield


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(*flags: str) -> None:
    """Two processes under DeepSpeed's launcher, as a user starts them."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", free_port()]
    done = subprocess.run(
        [*launcher, str(ROOT / "train_ds.py"), *flags],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
