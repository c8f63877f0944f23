"""Processes: starting, naming, meeting. The same code runs as one process without a launcher."""

from __future__ import annotations

import logging
import os
import sys
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import distributed


def init(timeout_minutes: int = 60) -> torch.device:
    """Joins the processes that a launcher started, or makes a group of one; returns this process's device.

    NCCL on CUDA, gloo on the CPU. DeepSpeed finds the group and uses it.
    """
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not distributed.is_initialized():
        backend, timeout = ("nccl" if cuda else "gloo"), timedelta(minutes=timeout_minutes)
        if "WORLD_SIZE" in os.environ:
            distributed.init_process_group(backend, timeout=timeout)
        else:  # no launcher: a store in memory needs no port that could be taken
            distributed.init_process_group(
                backend, timeout=timeout, store=distributed.HashStore(), rank=0, world_size=1
            )
    return device


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and talks to the user."""
    return rank() == 0


def barrier() -> None:
    if world_size() > 1:
        distributed.barrier()


def all_gather(item: Any) -> list[Any]:
    """Any Python object from every process, in the order of their ranks."""
    if world_size() == 1:
        return [item]
    items = [None] * world_size()
    distributed.all_gather_object(items, item)
    return items


def mean(values: torch.Tensor) -> torch.Tensor:
    """The mean over processes; every one must call it."""
    if world_size() > 1:
        distributed.all_reduce(values)
        values /= world_size()
    return values


def raise_on_all_ranks(problem: str | None, error: type[Exception] = ValueError) -> None:
    """Raises ``error`` on every process if any has a problem: one that fails alone lets the others wait forever."""
    problems = list(dict.fromkeys(found for found in all_gather(problem) if found))
    if problems:
        raised = error("\n".join(problems))
        raised.shared = True  # type: ignore[attr-defined]  # a mark on an error of any type
        raise raised


def shutdown() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def exit_process(code: int) -> NoReturn:
    """Ends the process with an exit code; call it last.

    One of several processes goes without Python's clean-up. In it, threads of the process group that still want the
    interpreter abort the process, now and then, and launchers take a finished run for a failed one.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    sys.exit(code)
