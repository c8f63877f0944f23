"""Exports a training run as a model folder: the checkpoint merged into its base, checked, in safetensors.

    python scripts/merge_lora.py --checkpoint runs/tiny --output runs/tiny/merged
    python scripts/merge_lora.py --config configs/tiny.yaml --output runs/tiny/untrained    # before training
    python scripts/merge_lora.py --checkpoint runs/tiny --adapter_only --output runs/tiny/adapter    # without base
    python scripts/merge_lora.py --checkpoint runs/tiny --output runs/tiny/merged --push org/name    # and share it

The folder loads with ``model.load`` and in test.py and chat.py (``--version``); an adapter
only in the latter two, on top of its base. It contains a model card (README.md).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
from safetensors import SafetensorError

from model.structures import Turn
from utils.command_line.parser import Parser
from utils.config import Config, config_from, load_config
from utils.training import checkpoint as checkpoints
from utils.training.checkpoint import CheckpointError
from utils.training.lineage import adopt
from utils.training.model_card import model_card
from utils.training.push import check_push, push

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from model.grounding import GroundingModel
    from model.processing.processor import UGroundProcessor

TOLERANCE = 1e-4  # relative to the largest value; rounding errors of a merge are about 1e-6


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)

    from model.loading import adapter
    from model.loading.placement import PRECISIONS
    from model.loading.pretrained import cast_parameters

    try:
        check_output(args.output)
        if args.push:
            check_push(args.push)
        elif args.private:
            raise ValueError("--private is for the repository of --push; give both, or neither")
        model, processor, config, meta = initial_state(args) if args.config else trained_state(args)
        if args.adapter_only:
            save = partial(adapter.save, model, trained=meta["trained"], dtype=PRECISIONS[config.model.precision])
        else:
            merged, difference = merge(model, processor)
            print(f"merged and unmerged agree: largest difference {difference:.1e} of the largest value")
            cast_parameters(merged, config.model.precision)
            save, meta = partial(save_merged, merged), meta | {"merge_difference": difference}
        card = model_card(args.name or config.train.exp_name, meta, args.adapter_only, args.license)
        write_folder(save, processor, args.output, meta, card)
        print(f"wrote {args.output}")
        if args.push:
            print(f"pushed to {push(args.output, args.push, args.private)}")
    except (ValueError, OSError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; what was not announced as written is not there", file=sys.stderr)
        return 130
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        program="scripts/merge_lora.py",
        description="Merges the trained parts of a run into its base weights and writes a folder for from_pretrained, "
        "test.py and chat.py. Nothing is written unless the merged and the unmerged model agree on a sample.",
        epilog="By default, base weights are loaded from the paths of the run; the last three flags override them.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, metavar="DIR", help="a run's folder, or a checkpoint's")
    source.add_argument("--config", type=Path, metavar="FILE", help="a YAML of train_ds.py: the model before training")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder to write; an earlier result is replaced"
    )
    parser.add_argument(
        "--which",
        choices=("best", "latest"),
        help="which checkpoint of a run (default: best, or latest without validation)",
    )
    parser.add_argument(
        "--adapter_only",
        action="store_true",
        help="write LoRA and the parts that trained in full, without the base: hundreds of megabytes instead of 15 GB",
    )
    parser.add_argument("--name", help="name of the model in its card (default: the run's exp_name)")
    parser.add_argument(
        "--license",
        default="other",
        metavar="ID",
        help="license of the weights, as an identifier of the Hub (default: other)",
    )
    parser.add_argument(
        "--push",
        metavar="ORG/NAME",
        help="then upload the folder to this repository of the Hugging Face hub, in one commit; it is created if it "
        "does not exist",
    )
    parser.add_argument("--private", action="store_true", help="create the repository of --push as private")
    parser.add_argument("--version", metavar="DIR", help="base weights, folder or hub id, if they have moved")
    parser.add_argument("--vision_tower", metavar="DIR", help="CLIP, folder or hub id, if it has moved")
    parser.add_argument("--vision_pretrained", metavar="PATH", help="mask decoder, path or hub id, if it has moved")
    return parser.parse_args(argv)


def initial_state(args: argparse.Namespace) -> tuple[nn.Module, UGroundProcessor, Config, dict[str, Any]]:
    """The state before training: base weights, and the new parts as the seed initializes them."""
    from utils.training.engine import build_model

    flags = [part for name, path in moved_paths(args).items() for part in (f"--{name}", path)]
    config = load_config(["--config", str(args.config), *flags])
    adopt(config)
    model, processor, loaded = build_model(config)
    meta = checkpoints.describe_settings(config, []) | checkpoints.describe_model(model, processor, loaded)
    return model.float().eval(), processor, config, meta | {"step": 0, "metrics": {}, "checkpoint": ""}


def trained_state(args: argparse.Namespace) -> tuple[nn.Module, UGroundProcessor, Config, dict[str, Any]]:
    """The trained state of a run, with LoRA not yet merged."""
    checkpoint = choose_checkpoint(args.checkpoint, args.which)
    meta = checkpoints.read_meta(checkpoint)
    meta.pop("files", None)  # of the checkpoint, not of the folder that is written
    print(f"{checkpoint}: step {meta['step']}, {metrics_text(meta['metrics'])}")
    moved = moved_paths(args)
    meta["config"]["model"] |= moved  # the written folder names them too
    config = config_from(meta["config"], checkpoints.META)
    # a branch of the hub may have moved on since the run: its commit is loaded
    loading = replace(config, model=replace(config.model, **(meta.get("resolved", {}) | moved)))
    model, processor = load_trained(checkpoint, meta, loading)
    meta["resolved"] = checkpoints.describe_settings(loading, [])["resolved"]
    return model, processor, config, meta | {"checkpoint": str(checkpoint)}


def choose_checkpoint(path: Path, which: str | None) -> Path:
    """The requested checkpoint; by default the best, or the latest if the run has no best."""
    return checkpoints.find_checkpoint(path, which or ("best" if "best" in checkpoints.read_index(path) else "latest"))


def metrics_text(metrics: dict[str, dict[str, float]]) -> str:
    texts = (f"{spec} {name} {value:.3f}" for spec, values in metrics.items() for name, value in values.items())
    return ", ".join(texts) or "not validated"


def check_output(output: Path) -> None:
    """Raises a ValueError if the folder exists and was not written by this script."""
    from model.loading.adapter import META

    if output.exists() and not (output / META).is_file() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(
            f"--output {output} exists and was not written by this script; give another folder, or remove it"
        )


def moved_paths(args: argparse.Namespace) -> dict[str, str]:
    """Setting -> new path, of base weights that have moved."""
    return {name: path for name in ("version", "vision_tower", "vision_pretrained") if (path := getattr(args, name))}


def load_trained(checkpoint: Path, meta: dict[str, Any], config: Config) -> tuple[nn.Module, UGroundProcessor]:
    """Base with LoRA as in training, in float32, with the trained weights loaded.

    Raises:
        CheckpointError: if base weights, tokens or trainable parameters differ from the run's.
    """
    from model.loading.weights import base_fingerprints
    from utils.training.engine import build_model

    model, processor, loaded = build_model(config)
    for part, now, before in (
        ("the base weights", base_fingerprints(loaded), meta["base"]),
        ("the special tokens", vars(processor.tokens), meta["tokens"]),
        ("the trainable parameters", checkpoints.trained_shapes(model, loaded), meta["trained"]),
    ):
        if names := checkpoints.differing(now, before):
            raise CheckpointError(
                f"{part} are not those that {checkpoint} was trained with: {', '.join(names[:5])} differ"
            )
    model.float().load_state_dict(checkpoints.trained_weights(checkpoint), strict=False)  # its names were checked
    return model.eval(), processor


def merge(model: nn.Module, processor: UGroundProcessor) -> tuple[GroundingModel, float]:
    """The merged model, and its largest difference to the unmerged one, relative to the largest value.

    Raises:
        ValueError: if logits, masks, maps or policy differ by more than ``TOLERANCE``.
    """
    from peft import PeftModel

    from model.lora import base_of

    before = probe(base_of(model), processor)
    merged: Any = model.merge_and_unload(safe_merge=True) if isinstance(model, PeftModel) else model
    after = probe(merged, processor)
    differences = {
        name: ((after[name] - value).abs().max() / value.abs().max().clamp(min=1e-12)).item()
        for name, value in before.items()
    }
    worst = max(differences.values())
    if not worst <= TOLERANCE:  # NaN fails, too
        shown = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
        raise ValueError(f"merged and unmerged model disagree, nothing is written: {shown} (allowed {TOLERANCE})")
    return merged, worst


def probe(model: GroundingModel, processor: UGroundProcessor) -> dict[str, torch.Tensor]:
    """Text logits, mask logits, maps and policy for a synthetic image and a teacher-forced answer with two [SEG].

    The layer is fixed: otherwise rounding could choose between two equally likely layers.
    """
    import torch

    rows, columns = np.mgrid[0:48, 0:64]
    image = np.stack([4 * columns, 5 * rows, 255 * ((rows - 24) ** 2 + (columns - 20) ** 2 < 150)], 2).astype(np.uint8)
    batch = processor.prompts([image], [[Turn("Where is the blue disc?", "Here it is: [SEG] and [SEG].")]])
    batch = batch.to(model.device)
    with torch.inference_mode():
        output = model.forward_language(batch)
        [[prediction]] = model.predict(batch, layer_policy="last")
        logits = model.lm_head(output.hidden[-1])
    return {"logits": logits, "masks": prediction.mask_logits, "maps": prediction.maps, "policy": prediction.policy}


def save_merged(model: PreTrainedModel, folder: Path) -> None:
    """Writes the model, reads it back and compares.

    Raises:
        ValueError: if the files do not hold the model's tensors.
    """
    import torch

    from model.loading.files import read_folder

    model.save_pretrained(folder)
    saved, state = read_folder(folder), model.state_dict()
    for key in model.all_tied_weights_keys:  # second names of tensors that are written once
        del state[key]
    wrong = [
        name for name in state.keys() | saved.keys() if name not in saved or not torch.equal(saved[name], state[name])
    ]
    if wrong:
        raise ValueError(f"{folder} does not hold what was written: {', '.join(sorted(wrong)[:5])}")


def write_folder(
    save: Callable[[Path], None], processor: UGroundProcessor, output: Path, meta: dict[str, Any], card: str
) -> None:
    """Writes weights, processor, ``uground_run.json`` and README.md to a temporary folder, then renames it."""
    from safetensors import SafetensorError

    from model.loading.adapter import META

    unfinished, old = output.with_name(f".{output.name}.partial"), output.with_name(f".{output.name}.old")
    for leftover in (unfinished, old):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        save(unfinished)
        processor.save_pretrained(unfinished)
        (unfinished / META).write_text(json.dumps(meta, indent=1) + "\n")
        (unfinished / "README.md").write_text(card)
        if output.exists():
            output.rename(old)
        unfinished.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{output} could not be written ({error}); is the disk full?") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
