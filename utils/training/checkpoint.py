"""Checkpoints of a run: DeepSpeed's files with a ``meta.json``, and an index of the latest and the best one.

    RUN/checkpoints/index.json             {"latest": "step_00000500", "best": "step_00000400"}
    RUN/checkpoints/step_00000500/         trained parameters (with master weights and optimizer), buffers, meta.json;
                                           what stays frozen of a new mask decoder, which no file gives

A checkpoint is written under a temporary name, synced, renamed and indexed; only then are old ones deleted. So a killed
run or a full disk leaves the last complete checkpoint intact.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.loading.files import read_json
from utils import distributed
from utils.config import FIELDS, Config, config_from, to_dict
from utils.files import sync, write_atomically
from utils.training.checkpoint_files import CheckpointError, check_files, describe_files, other_ways, plain_data
from utils.training.data_content import comparable
from utils.training.lineage import lineage_of
from utils.training.step_layout import StepLayout, difference
from utils.training.versions import git_commit, package_versions

if TYPE_CHECKING:
    import torch
    from torch import nn

    from model.loading.weights import Loaded
    from model.processing.processor import UGroundProcessor
    from utils.training.shards import Shards

FOLDER, INDEX, META = "checkpoints", "index.json", "meta.json"
DECODER = "visual_model"  # the mask decoder's module
CHECKSUM = "checksum"  # in meta.json: of all else there; older checkpoints have none
PROBE = "Can you segment the left-most of 2 red mugs, please? It is [SEG]."  # tells tokenizers apart
META_KINDS = {  # what meta.json holds at least
    "step": int,
    "config": dict,
    "data": list,
    "processes": int,
    "base": dict,
    "tokens": dict,
    "trained": dict,
    "metrics": dict,
}


def step_name(step: int) -> str:
    """Name of what belongs to a step: its checkpoint, its pictures; sorted names are in the order of the steps."""
    return f"step_{step:08d}"


def step_of(name: str) -> int:
    """The step of a ``step_name``."""
    return int(name.removeprefix("step_"))


def _is_step(name: Any) -> bool:
    return isinstance(name, str) and bool(re.fullmatch(r"step_\d{8,}", name))


# -- metadata ----------------------------------------------------------------------------------------------------------


def trained_shapes(model: nn.Module, loaded: Collection[Loaded]) -> dict[str, list[int]]:
    """Shapes of all tensors that a checkpoint must hold: trainable parameters, persistent buffers, and the frozen rest
    of a mask decoder that no file gives.

    Args:
        loaded: rows of the loading report.
    """
    state = model.state_dict().keys()
    is_new = any(row.module == DECODER and row.source == "new" for row in loaded)
    named: list[tuple[str, torch.Tensor]] = [
        (name, p) for name, p in model.named_parameters() if p.requires_grad or (is_new and f"{DECODER}." in name)
    ]
    named += [(name, buffer) for name, buffer in model.named_buffers() if name in state]
    return {name: list(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in named}  # ds_: under ZeRO-3


def describe_settings(config: Config, data: list[dict]) -> dict[str, Any]:
    """Metadata of a run before its model is built: settings, what it starts from, data (``Mixture.describe``)."""
    from model.loading.pretrained import resolve_start

    found = resolve_start(**config.start)
    return {
        "lineage": lineage_of(found["version"].path),
        "config": to_dict(config),
        "resolved": {setting: part.name for setting, part in found.items()},
        "data": [{key: value for key, value in row.items() if key != "skipped"} for row in data],
        "processes": distributed.world_size(),
    }


def describe_model(model: nn.Module, processor: UGroundProcessor, loaded: Collection[Loaded]) -> dict[str, Any]:
    """Metadata of a built model: base weights, tokens, trained parameters, code versions."""
    from model.loading.weights import base_fingerprints
    from model.lora import base_of

    return {
        "backbone": base_of(model).config.backbone,
        "base": base_fingerprints(loaded),
        "tokens": vars(processor.tokens),
        "vocabulary": _vocabulary(processor),
        "probe": processor.tokenizer.encode(PROBE),
        "trained": trained_shapes(model, loaded),
        "commit": git_commit(),
        "versions": package_versions("torch", "transformers", "peft", "deepspeed", "segment-anything"),
    }


def _vocabulary(processor: UGroundProcessor) -> str:
    """Checksum of all tokens with their ids."""
    text = json.dumps(sorted(processor.tokenizer.get_vocab().items()))
    return f"{zlib.crc32(text.encode()):08x}"


# -- finding -----------------------------------------------------------------------------------------------------------


def read_index(run_folder: Path) -> dict[str, str]:
    """{"latest": folder name, "best": folder name}; empty when the run has no checkpoint.

    Raises:
        CheckpointError: if the index cannot be read, or names no checkpoint: the run's own must not be lost.
    """
    path = run_folder / FOLDER / INDEX
    if not path.is_file():
        return {}
    index = _read_json(path)
    if "latest" not in index or index.keys() - {"latest", "best"} or not all(map(_is_step, index.values())):
        kept = ", ".join(sorted(folder.name for folder in path.parent.glob("step_*"))) or "none"
        raise CheckpointError(
            f'{path} names no checkpoint; restore it, as {{"latest": "step_00000500"}} (in the folder: {kept}), or '
            "start a new run with another --exp_name"
        )
    return index


def find_checkpoint(path: str | Path, which: str = "latest") -> Path:
    """The folder of a checkpoint, given that folder or its run's.

    Raises:
        CheckpointError: if there is none, or it is incomplete.
    """
    path = Path(path)
    if (path / META).is_file():
        return path
    index = read_index(path)
    if which not in index:
        raise CheckpointError(
            f"{path} holds no checkpoint: neither {META} nor {FOLDER}/{INDEX} with {which!r} exists; give the folder "
            "of a run (runs/NAME)"
        )
    checkpoint = path / FOLDER / index[which]
    if not (checkpoint / META).is_file():
        raise CheckpointError(f"{checkpoint} is not complete (no {META}), though {path / FOLDER / INDEX} names it")
    return checkpoint


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """``meta.json`` of a checkpoint folder.

    Raises:
        CheckpointError: if it cannot be read, or lacks a part.
    """
    meta = _read_json(checkpoint / META)
    if CHECKSUM in meta and meta.pop(CHECKSUM) != _checksum(meta):
        raise CheckpointError(
            f"{checkpoint / META} has changed since it was written (CRC-32); {other_ways(checkpoint)}"
        )
    kinds = META_KINDS | ({"files": dict} if "files" in meta else {})
    wrong = [name for name, kind in kinds.items() if not isinstance(meta.get(name), kind)]
    if "data" not in wrong and not all(
        isinstance(row, dict) and isinstance(row.get("name"), str) for row in meta["data"]
    ):
        wrong.append("data")
    if wrong:
        raise CheckpointError(
            f"{checkpoint / META} lacks {', '.join(wrong)}, or holds something else there; copy it again"
        )
    return meta


def write_meta(checkpoint: Path, meta: dict[str, Any]) -> None:
    """Writes ``meta.json``, with checksums of all other files in the folder and its own."""
    meta = meta | {"files": describe_files(checkpoint)}
    (checkpoint / META).write_text(json.dumps(meta | {CHECKSUM: _checksum(meta)}, indent=1) + "\n")


def _checksum(meta: dict[str, Any]) -> str:
    """CRC-32 of metadata without their own checksum; they are the same before they are written and when read."""
    return f"{zlib.crc32(json.dumps(meta).encode()):08x}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


# -- saving ------------------------------------------------------------------------------------------------------------


def save_checkpoint(engine, run_folder: Path, meta: dict[str, Any], best: bool) -> None:
    """Writes a checkpoint. All processes must call it.

    Args:
        meta: ``describe_settings`` and ``describe_model`` with at least ``step`` added.
        best: whether validation was the best so far.

    Raises:
        CheckpointError: if the disk is full or cannot be written; earlier checkpoints stay intact.
    """
    from utils.training.shards import FROZEN

    folder = run_folder / FOLDER
    name = step_name(meta["step"])
    partial = folder / f"partial_{name}"
    distributed.raise_on_all_ranks(
        _prepare(folder, partial, engine) if distributed.is_main() else None, CheckpointError
    )
    frozen = {
        name: parameter.detach().to("cpu", copy=True)  # ZeRO-3 shards it while it writes
        for name, parameter in engine.module.named_parameters()
        if name in meta["trained"] and not parameter.requires_grad
    }
    options = {"client_state": {FROZEN: frozen}} if frozen else {}
    try:
        engine.save_checkpoint(
            str(folder), tag=partial.name, save_latest=False, exclude_frozen_parameters=True, **options
        )
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in WRITING):
            raise  # not of writing: a worker or another process has ended
        raise CheckpointError(_cannot_write(partial, error)) from error
    distributed.raise_on_all_ranks(
        _publish(folder, partial, name, meta, best) if distributed.is_main() else None, CheckpointError
    )


def checkpoint_bytes(trained: int, itemsize: int) -> int:
    """Size of a checkpoint: master weight and two moments (float32) per trainable parameter, and the weight itself."""
    return trained * (12 + itemsize)


def _prepare(folder: Path, partial: Path, engine) -> str | None:
    """Deletes partial checkpoints and checks free space; returns the problem, or None."""
    from model.lora import parameters_by_part

    trained = sum(count for _, count in parameters_by_part(engine.module).values())
    needed = checkpoint_bytes(trained, next(engine.module.parameters()).itemsize)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for partial_folder in folder.glob("partial_*"):
            shutil.rmtree(partial_folder)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return _cannot_write(partial, error)
    if free < needed * 1.02:
        return (
            f"no room for a checkpoint: it takes {needed / 1e9:.2f} GB, {folder} has {free / 1e9:.2f} GB free. Free "
            "disk space and resume with --auto_resume true; earlier checkpoints are intact"
        )
    return None


def _publish(folder: Path, partial: Path, name: str, meta: dict[str, Any], best: bool) -> str | None:
    """Syncs, renames and indexes a complete checkpoint, then deletes those that the index does not name."""
    try:
        write_meta(partial, meta)
        for path in (*partial.iterdir(), partial):
            sync(path)
        shutil.rmtree(folder / name, ignore_errors=True)  # left by a run that was killed at this point
        partial.rename(folder / name)
        index = read_index(folder.parent) | {"latest": name} | ({"best": name} if best else {})
        write_atomically(folder / INDEX, json.dumps(index) + "\n")
        for old in folder.glob("step_*"):
            if old.name not in index.values():
                shutil.rmtree(old)
    except OSError as error:
        return _cannot_write(partial, error)
    return None


WRITING = ("PytorchStreamWriter", "inline_container", "No space left")  # in messages of torch.save


def _cannot_write(path: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return (
        f"the checkpoint {path} could not be written ({reason[:200]}); is the disk full, or a quota reached? "
        "Earlier checkpoints are intact: free disk space and resume with --auto_resume true"
    )


# -- resuming ----------------------------------------------------------------------------------------------------------


def differences(run: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    """Differences between two runs' metadata that forbid resuming; ``run`` may lack the part of ``describe_model``."""
    from model.loading.weights import path_setting

    problems = []
    configs = [config_from(meta["config"], META) for meta in (run, saved)]
    now, before = (config.flat() for config in configs)
    for name in differing(now, before):
        if not FIELDS[name].metadata["may_change"]:
            problems.append(f"{name}: {before[name]!r} in the checkpoint, now {now[name]!r}")
    layouts = (StepLayout.of(config, meta["processes"]) for config, meta in zip(configs, (run, saved)))
    if problem := difference(*layouts):
        problems.append(problem)
    starts = [meta.get("resolved") or meta["config"]["model"] for meta in (saved, run)]  # older runs name paths only
    for module in differing(run["base"], saved["base"]) if "base" in run else ():
        setting = path_setting(module, starts[0].keys() & starts[1].keys())
        names = [start[setting] for start in starts]
        moved = f": {names[0]} in the checkpoint, now {names[1]}" if names[0] != names[1] else ""
        problems.append(f"--{setting}: the base weights of {module} are not the same{moved}")
    if "vocabulary" in run and run["vocabulary"] != saved.get("vocabulary", run["vocabulary"]):
        problems.append("--version: the tokenizer's vocabulary is not the same")
    elif "probe" in run and run["probe"] != saved.get("probe", run["probe"]):
        problems.append(f"--version: the tokenizer splits {PROBE!r} otherwise")
    now, before = ({row["name"]: row for row in meta["data"]} for meta in (run, saved))
    for name in now.keys() & before.keys():
        contents = [rows[name].get("content") for rows in (now, before)]
        if comparable(*contents) and contents[0] != contents[1]:
            problems.append(f"data set {name}: its annotations have changed since the checkpoint was written")
        for rows in (now, before):
            rows[name] = {key: value for key, value in rows[name].items() if key not in ("content", "source")}
    for name in differing(now, before):
        problems.append(f"data set {name}: {before.get(name)} in the checkpoint, now {now.get(name)}")
    if "trained" in run and (names := differing(run["trained"], saved["trained"])):
        problems.append(f"trainable parameters: {', '.join(names[:5])}")
    return problems


def differing(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """The keys whose values are not the same, or that only one has, sorted."""
    return sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key))


def check_same_run(checkpoint: Path, run: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's metadata, if ``run`` may resume from it. All processes must call it.

    Raises:
        CheckpointError: naming every difference that makes it another run.
    """
    saved = read_meta(checkpoint)
    problem = None
    if "base" not in run and distributed.is_main():  # once per start, before the model is built
        try:
            check_files(checkpoint, saved)
        except CheckpointError as error:
            problem = str(error)
    if not problem and (problems := differences(run, saved)):
        problem = (
            f"{checkpoint} belongs to another run:\n  "
            + "\n  ".join(problems)
            + "\nGive the settings of the checkpoint "
            "(its run folder's config.yaml holds them), or start a new run with another --exp_name"
        )
    distributed.raise_on_all_ranks(problem, CheckpointError)
    return saved


def resume(engine, checkpoint: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Restores weights, buffers, optimizer and schedule; returns the checkpoint's metadata. All processes must call it.

    Raises:
        CheckpointError: if the checkpoint is not this run's, or cannot be loaded.
    """
    from utils.training.shards import restore

    saved, problem = check_same_run(checkpoint, run), None
    try:
        shards = read_shards(checkpoint, saved)
    except CheckpointError as error:
        problem = str(error)
    distributed.raise_on_all_ranks(problem, CheckpointError)
    with plain_data(checkpoint):
        restore(engine, shards)
    updates = saved["step"] * config_from(saved["config"], str(checkpoint)).updates_per_step
    if engine.global_steps != updates:
        raise CheckpointError(f"{checkpoint} is of update {engine.global_steps}, but {META} of {updates}")
    return saved


def read_shards(checkpoint: Path, meta: dict[str, Any]) -> Shards:
    """Weights and optimizer state of a checkpoint, by the names of parameters.

    Raises:
        CheckpointError: if a file is damaged or refers to code, or names or shapes are not exactly those that
            ``meta.json`` lists.
    """
    from utils.training.shards import Shards

    with plain_data(checkpoint):
        shards = Shards(checkpoint)
        shapes = {name: list(shape) for name, shape in shards.shapes.items()}
        shapes |= {name: list(value.shape) for name, value in shards.fixed.items()}
    if names := differing(shapes, meta["trained"]):
        raise CheckpointError(
            f"{checkpoint} does not hold exactly what {META} lists; it differs in {', '.join(names[:5])}"
        )
    return shards


def trained_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint holds beside the optimizer's state, in float32, by the names in the training model.

    Raises:
        CheckpointError: if a file is damaged or refers to code, or names or shapes are not exactly those that
            ``meta.json`` lists.
    """
    from utils.training.shards import WEIGHT

    meta = read_meta(checkpoint)
    check_files(checkpoint, meta)
    shards = read_shards(checkpoint, meta)
    with plain_data(checkpoint):
        state = {name: value.float() for name, value in shards.fixed.items()}
        return state | {name: shards.read(name, WEIGHT) for name in shards.shapes}
