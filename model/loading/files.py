"""Reads the files of a model folder; whatever is wrong with one, the error names the file and the cause."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

INCOMPLETE = "is not completely downloaded"
WEIGHT_FILES = (
    ("model*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
)
SAM_2 = ("sam_mask_decoder.", "memory_attention.", "memory_encoder.")  # prefixes that only SAM 2 has


@contextlib.contextmanager
def blame(what: str | Path) -> Iterator[None]:
    """Turns any failure of the code inside into a ValueError that begins with ``what``.

    For code of other projects, which raises what the bytes of a damaged file make it raise. Running out of memory
    stays what it is.
    """
    import torch  # here and below, as --help need not wait for it

    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:1000] or type(error).__name__
        raise ValueError(f"{what}: {reason}") from error


def check_downloaded(path: Path) -> None:
    """Raises a ValueError for a file that is missing, empty, a Git LFS pointer, an HTML page, or begins with zeros."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is no file")
    with blame(f"{path} cannot be read"), path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError(f"{path} {INCOMPLETE}: it is empty")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} {INCOMPLETE}: it is a Git LFS pointer; git lfs pull fetches the file itself")
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise ValueError(f"{path} {INCOMPLETE}: it is an HTML page; is the address right, and is a login needed?")
    if not head.strip(b"\0"):
        raise ValueError(f"{path} {INCOMPLETE}: it begins with zeros")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: if the file is missing, not completely downloaded, no JSON, or another JSON value.
    """
    check_downloaded(path)
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON ({error}); is it cut off?") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, memory-mapped.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    from safetensors.torch import load_file

    check_downloaded(path)
    with blame(f"{path} {INCOMPLETE}, or is damaged"):
        return load_file(path)


def read_torch_file(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a ``.pth`` or ``.bin``; a file that contains code is refused.

    Raises:
        ValueError: if the file is missing, truncated, or holds anything but tensors.
    """
    import torch

    check_downloaded(path)
    mapped = zipfile.is_zipfile(path)  # torch before 1.6 wrote another format, which cannot be mapped
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        code = forbidden(error)
        reason = f"it refers to {code}, which is not run" if code else str(error).splitlines()[0]
        raise ValueError(f"{path} is no checkpoint of plain tensors, or is damaged: {reason}") from error
    except Exception as error:  # of any kind: torch raises what the bytes make it raise
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is no checkpoint of plain tensors, or is damaged: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        inner = state.get("model") if isinstance(state, dict) else None
        if isinstance(inner, dict) and any(str(key).startswith(SAM_2) for key in inner):
            raise ValueError(
                f"{path} is a SAM 2 checkpoint; give one of SAM, such as sam_vit_h_4b8939.pth, or, with --mask_decoder "
                "sam2, transformers' folder of SAM 2.1, facebook/sam2.1-hiera-large"
            )
        raise ValueError(f"{path} holds no dictionary of tensors")
    return state


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a transformers-style folder: safetensors or ``.bin``, one file or shards.

    Raises:
        ValueError: if the folder has no weights, a file is damaged, or the index names a shard that is missing.
    """
    for pattern, index_name in WEIGHT_FILES:
        index = folder / index_name
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise ValueError(f"{index} has no weight_map, an object of names of files")
            files = [folder / name for name in sorted(set(weight_map.values()))]
        else:
            files = sorted(folder.glob(pattern))
        if missing := [str(path) for path in files if not path.is_file()]:
            raise ValueError(f"{index} names files that are not there: {', '.join(missing)}")
        if files:
            state: dict[str, torch.Tensor] = {}  # memory-mapped: read from disk when used
            for path in files:
                state |= read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)
            return state
    raise ValueError(
        f"{folder} holds no weights (looked for model.safetensors and pytorch_model.bin, whole or in shards)"
    )


def run_of(folder: Path) -> Path | None:
    """The training run that a folder is or belongs to, such as a checkpoint's; None if there is none."""
    candidates = (folder, *folder.absolute().parents[:2])
    return next((run for run in candidates if (run / "checkpoints/index.json").is_file()), None)


def read_config(folder: Path, what: str) -> dict:
    """``config.json`` of a folder.

    Args:
        what: the flag that gave the folder, for messages.

    Raises:
        ValueError: if there is no such folder or file, or the file is no JSON object.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(f"{what}: {folder} is no folder; give the path of one, or a hub id (org/name)")
    if not path.is_file():
        if run := run_of(folder):
            raise ValueError(
                f"{what}: {folder} is of a training run, not a model. Write the model first, with "
                f"python scripts/merge_lora.py --checkpoint {run} --output {run / 'merged'}, and give that folder"
            )
        raise ValueError(f"{what}: {folder} has no config.json")
    with blame(what):
        return read_json(path)


def forbidden(error: Exception) -> str | None:
    """The global, such as ``posix.system``, for which ``torch.load(weights_only=True)`` refused a file."""
    found = re.search(r"GLOBAL (\w[\w.]*)", str(error))
    return found[1] if found else None
