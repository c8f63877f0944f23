"""A checkpoint's shards by the names of parameters: written by N processes, read by any number, at any ZeRO stage.

Each process writes its share of the float32 weights and of AdamW's moments as flat tensors, one per group of
parameters, whose names and shapes the model's file lists in order. ZeRO-1 and 2 cut a whole group into equal shares,
the last of which ends in padding; ZeRO-3 cuts every parameter. DeepSpeed itself resumes on the same number of processes
only, and its conversion of checkpoints writes each anew and reads pickles.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from utils.training.zero3 import is_sharded

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
FROZEN = "frozen"  # key of frozen weights in DeepSpeed's file of the model
MODEL_FILES, SHARD_FILES = "*mp_rank_00_model_states.pt", "*_optim_states.pt"


@dataclass(frozen=True)
class Piece:
    """``size`` values of a parameter, at ``start`` of the flat tensor of a group in the shard of process ``rank``."""

    rank: int
    group: int
    start: int
    size: int


class Shards:
    """Trained weights, optimizer state and counters of a checkpoint. Create it within ``plain_data``; files are mapped.

    Attributes:
        shapes: trained parameter -> its whole shape.
        fixed: by name, what the optimizer does not change: buffers, and frozen weights that no file gives.
        model: DeepSpeed's file of the model: ``global_steps``, ``lr_scheduler`` and so on.
        step: of AdamW, 0-d. rates: learning rate of each of the optimizer's groups.

    Raises:
        ValueError: if a file is missing, or too small. ``plain_data`` names it, and whatever else a damaged one causes.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.model = _read(_files(checkpoint, MODEL_FILES)[0])
        module, names = self.model["module"], self.model["buffer_names"]
        self.fixed: dict[str, torch.Tensor] = {name: module[name] for name in names} | self.model.get(FROZEN, {})
        self.groups: list[dict[str, torch.Size]] = self.model["param_shapes"]
        self.shapes = {name: shape for group in self.groups for name, shape in group.items()}
        paths = _files(checkpoint, SHARD_FILES)
        states = [_read(path)["optimizer_state_dict"] for path in paths]
        first = states[0]
        count = first["partition_count"]
        if (expected := max(count) if isinstance(count, list) else count) != len(paths):
            raise ValueError(f"{len(paths)} of {expected} shards ({SHARD_FILES}) are there")
        self.is_sharded = "fp32_flat_groups" in first  # of ZeRO-3
        weights, adam = "single_partition_of_fp32_groups", "base_optimizer_state"
        if self.is_sharded:
            weights, adam = "fp32_flat_groups", "optimizer_state_dict"
        self.rates = [group["lr"] for group in first[adam]["param_groups"]]
        self.step: torch.Tensor = first[adam]["state"][0]["step"]
        self._flat = {WEIGHT: [state[weights] for state in states]}
        for kind in MOMENTS:
            self._flat[kind] = [
                [state[adam]["state"][group][kind] for group in range(len(self.groups))] for state in states
            ]
        self._paddings = first.get("param_alignment_paddings") or [[0] * len(group) for group in self.groups]
        self._pieces = dict(self._find())

    def read(self, name: str, kind: str) -> torch.Tensor:
        """A parameter's whole ``kind``: WEIGHT, or one of MOMENTS. Float32."""
        flat = self._flat[kind]
        parts = [flat[p.rank][p.group].narrow(0, p.start, p.size) for p in self._pieces[name]]
        return torch.cat(parts).view(self.shapes[name])

    def _find(self) -> Iterator[tuple[str, list[Piece]]]:
        """Where each parameter is."""
        world = len(self._flat[WEIGHT])
        for group, shapes in enumerate(self.groups):
            share, offset = self._flat[MOMENTS[0]][0][group].numel(), 0  # with padding, which the weights lack
            if sum(map(math.prod, shapes.values())) > share * world:
                raise ValueError(f"group {group} has {share} x {world} values, fewer than its parameters")
            for (name, shape), padding in zip(shapes.items(), self._paddings[group], strict=True):
                size = math.prod(shape)
                if self.is_sharded:
                    part = math.ceil(size / world)
                    sizes = [max(0, min(part, size - rank * part)) for rank in range(world)]
                    yield name, [Piece(rank, group, offset, count) for rank, count in enumerate(sizes)]
                    offset += part
                else:
                    yield name, _cut(group, offset, offset + size, share)
                    offset += size + padding


def _cut(group: int, start: int, stop: int, share: int) -> list[Piece]:
    """The values start <= i < stop of a group that is cut into equal shares."""
    pieces = []
    while start < stop:
        rank, inside = divmod(start, share)
        size = min(stop - start, share - inside)
        pieces.append(Piece(rank, group, inside, size))
        start += size
    return pieces


def _files(checkpoint: Path, pattern: str) -> list[Path]:
    """Files in the order of the processes that wrote them."""
    ranks = {path: re.search(r"zero_pp_rank_(\d+)_", path.name) for path in checkpoint.glob(pattern)}
    if not ranks:
        raise ValueError(f"no file {pattern}")
    return sorted(ranks, key=lambda path: int(found[1]) if (found := ranks[path]) else 0)


def _read(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", mmap=True)


@torch.no_grad()
def restore(engine, shards: Shards) -> None:
    """Sets an engine's weights, buffers, optimizer, schedule and counters. All processes must call it.

    Raises:
        ValueError, LookupError, RuntimeError: if the shards do not hold what the engine trains.
    """
    optimizer, whole = engine.optimizer, not is_sharded(engine)
    if not whole:
        optimizer.checkpoint_event_prologue()  # every parameter is a shard until the epilogue
    _begin_moments(optimizer, shards.step)
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            for kind in (WEIGHT, *MOMENTS):
                value = shards.read(name, kind)
                (_set_whole if whole else _set_shard)(parameter, kind, value)
        elif name in shards.fixed:
            _set_frozen(parameter, shards.fixed[name], whole)
    if whole:
        optimizer.update_lp_params()  # those of the forward pass, from the float32 ones
    else:
        optimizer.checkpoint_event_epilogue()
    for name, buffer in engine.module.named_buffers():
        if name in shards.fixed:
            buffer.copy_(shards.fixed[name])
    for group, rate in zip(optimizer.optimizer.param_groups, shards.rates, strict=True):
        group["lr"] = rate  # that of the next step; the schedule sets those after it
    engine.lr_scheduler.load_state_dict(shards.model["lr_scheduler"])
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, shards.model[name])


def _begin_moments(optimizer, step: torch.Tensor) -> None:
    """Creates AdamW's state, as its first step would."""
    flat = getattr(optimizer, "fp32_partitioned_groups_flat", None)  # of ZeRO-3, whose groups are empty between steps
    for weights in flat or [weights for group in optimizer.optimizer.param_groups for weights in group["params"]]:
        moments = {kind: torch.zeros_like(weights) for kind in MOMENTS}
        optimizer.optimizer.state[weights] = {"step": step.to(weights.device, copy=True), **moments}
    if flat is None:
        optimizer._lazy_init_hp_params_optimizer_state()


def _set_whole(parameter, kind: str, value: torch.Tensor) -> None:
    """Under ZeRO-1 and 2: sets what this process owns of it."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if kind == WEIGHT:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, kind)


def _set_shard(parameter, kind: str, value: torch.Tensor) -> None:
    """Under ZeRO-3: sets this process's part."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    own = _own_part(parameter, value)
    if kind == WEIGHT:
        safe_set_local_fp32_param(parameter, own)
        parameter.ds_tensor.copy_(own)  # that of the forward pass
    else:
        safe_set_local_optimizer_state(parameter, own, kind)


def _set_frozen(parameter, value: torch.Tensor, whole: bool) -> None:
    """Sets a parameter that the optimizer does not know, or, under ZeRO-3, this process's part of it."""
    if whole:
        parameter.copy_(value)
    else:
        parameter.ds_tensor.copy_(_own_part(parameter, value))


def _own_part(parameter, value: torch.Tensor) -> torch.Tensor:
    """This process's part of a parameter's whole value under ZeRO-3, padded to the size of all parts."""
    share, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
    own = value.flatten()[rank * share : (rank + 1) * share]
    return F.pad(own, (0, share - len(own)))
