"""How test.py and chat.py end: exit codes and messages as of any Unix tool."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError


def run(main: Callable[[list[str] | None], int], arguments: list[str] | None = None) -> int:
    """Calls ``main`` -> its exit code; 2 for what the user can put right, 130 for Ctrl-C. Neither shows a traceback."""
    name = Path(sys.argv[0]).name
    try:
        return main(arguments)
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except torch.OutOfMemoryError as error:
        message = f"out of memory on the GPU: lower --batch_size or use --precision bf16 ({error})"
    except (ValueError, OSError, SafetensorError) as error:
        message = str(error)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130
    print(f"{name}: error: {message}", file=sys.stderr)
    return 2


def pick_device(wanted: str) -> str:
    """``auto`` = the GPU if there is one.

    Raises:
        ValueError: if the device is not there.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"--device {wanted} cannot be used ({first}); use cpu, or cuda on a machine with a GPU"
        ) from error
    return wanted


def pick_precision(wanted: str, device: str) -> str:
    """``auto`` = bf16 on a GPU, fp32 elsewhere."""
    if wanted == "auto":
        return "bf16" if device.startswith("cuda") else "fp32"
    return wanted
