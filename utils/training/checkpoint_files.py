"""The files of a checkpoint: whether they are those that were written, and reading them without running code."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from model.loading.files import forbidden

CHUNK = 1 << 24  # bytes read at once for a checksum


class CheckpointError(ValueError):
    """A checkpoint cannot be written, found or resumed; the message names the reason and the fix."""


def describe_files(folder: Path) -> dict[str, list[int]]:
    """Name -> [size in bytes, CRC-32] of all files in a folder."""
    return {path.name: [path.stat().st_size, file_crc(path)] for path in sorted(folder.iterdir())}


def check_files(checkpoint: Path, meta: dict[str, Any]) -> None:
    """Checks that a checkpoint holds what was written. Older checkpoints do not say, and pass.

    Args:
        meta: of ``read_meta``.

    Raises:
        CheckpointError: naming the file that is missing, or of another size or content.
    """
    for name, (size, crc) in meta.get("files", {}).items():
        path = checkpoint / name
        try:
            found = path.stat().st_size
            problem = f"has {found} bytes of {size}" if found != size else ""
            problem = problem or ("has changed since it was written (CRC-32)" if file_crc(path) != crc else "")
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
        if problem:
            raise CheckpointError(f"{path} {problem}; {other_ways(checkpoint)}")


def other_ways(checkpoint: Path) -> str:
    """What to do about a checkpoint that is damaged."""
    others = sorted(path.name for path in checkpoint.parent.glob("step_*") if path.name != checkpoint.name)
    resume = f"resume from another one with --resume {checkpoint.parent / others[-1]}, or " if others else ""
    return f"copy the checkpoint again, {resume}start a new run with another --exp_name"


@contextlib.contextmanager
def plain_data(checkpoint: Path) -> Iterator[None]:
    """Reads checkpoints as plain data: within it no ``torch.load`` runs code, whoever calls it.

    Every load is one with ``weights_only=True``, where only the classes that DeepSpeed writes are known.

    Raises:
        CheckpointError: naming a file that refers to anything else, or is damaged.
    """
    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    original, last_read = torch.load, "no file"

    def load(file: Any, *args: Any, **options: Any) -> Any:
        nonlocal last_read
        last_read = str(file)
        try:
            return original(file, *args, **(options | {"weights_only": True}))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any kind: torch raises what the bytes make it raise
            if code := forbidden(error):
                raise CheckpointError(
                    f"{file} refers to {code}: no code of a checkpoint is run. Is it of a run of this project?"
                ) from error
            reason = str(error).split("\n")[0] or type(error).__name__
            raise CheckpointError(f"{file} is damaged ({reason}); {other_ways(checkpoint)}") from error

    known = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    with torch.serialization.safe_globals(known), patch.object(torch, "load", load):
        try:
            yield
        except CheckpointError:
            raise
        except (OSError, ValueError, LookupError, ArithmeticError, TypeError, AttributeError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise CheckpointError(
                f"{checkpoint} cannot be read ({reason}; last read: {Path(last_read).name}); {other_ways(checkpoint)}"
            ) from error


def file_crc(path: Path) -> int:
    """CRC-32 of a file's content."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc
