"""Process group, rank and collectives of a run. The same code runs as one process without a launcher."""

from __future__ import annotations

import logging
import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch


def init(timeout_minutes: int = 60) -> torch.device:
    """Joins the launcher's process group, or creates a group of one; returns this process's device.

    The backend is NCCL on CUDA and gloo on the CPU, unless ``UGROUND_BACKEND`` names another (gloo lets processes share
    a GPU, which NCCL refuses). DeepSpeed reuses the group.
    """
    import torch
    from torch import distributed

    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not distributed.is_initialized():
        backend = os.environ.get("UGROUND_BACKEND", "nccl" if cuda else "gloo")
        timeout = timedelta(minutes=timeout_minutes)
        if "WORLD_SIZE" in os.environ:
            distributed.init_process_group(backend, timeout=timeout)
        else:  # no launcher: an in-memory store needs no port
            distributed.init_process_group(
                backend, timeout=timeout, store=distributed.HashStore(), rank=0, world_size=1
            )
    return device


def _group() -> Any:
    """torch.distributed if there is a process group, else None; imports no torch (there is no group without it)."""
    if "torch" not in sys.modules:
        return None
    from torch import distributed

    return distributed if distributed.is_initialized() else None


def rank() -> int:
    group = _group()
    return group.get_rank() if group else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    group = _group()
    return group.get_world_size() if group else 1


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def barrier() -> None:
    if world_size() > 1:
        _group().barrier()


def all_gather(item: Any) -> list[Any]:
    """Gathers a picklable object from every process, ordered by rank."""
    if world_size() == 1:
        return [item]
    items = [None] * world_size()
    _group().all_gather_object(items, item)
    return items


def mean(values: torch.Tensor) -> torch.Tensor:
    """The mean over processes. All processes must call it."""
    if world_size() > 1:
        _group().all_reduce(values)
        values /= world_size()
    return values


def raise_on_all_ranks(problem: str | None, error: type[Exception] = ValueError) -> None:
    """Raises ``error`` on every process if any has a problem: a process that fails alone leaves the others waiting."""
    problems = list(dict.fromkeys(message for message in all_gather(problem) if message))
    if problems:
        exception = error("\n".join(problems))
        exception.shared = True  # type: ignore[attr-defined]  # marks an error of any type as raised on all ranks
        raise exception


def shutdown() -> None:
    if group := _group():
        group.destroy_process_group()


def exit_process(code: int) -> NoReturn:
    """Ends the process with an exit code; call it last.

    With several processes, Python's clean-up is skipped: threads of the process group that still need the interpreter
    occasionally abort the process during it, and launchers then report a finished run as failed.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    sys.exit(code)
