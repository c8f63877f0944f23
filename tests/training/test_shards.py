"""A checkpoint's shards by the names of parameters: as each ZeRO stage cuts them, for any number of processes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from forks import Program
from tiny_run import ROOT

from utils.training.checkpoint_files import CheckpointError, plain_data
from utils.training.shards import MOMENTS, WEIGHT, Shards

GROUPS = [{"a": (3, 5), "b": (7,), "c": ()}, {"gate": (2, 2)}]  # as model files list them


def values(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def whole(kind: int) -> dict[str, torch.Tensor]:
    names = [(name, shape) for group in GROUPS for name, shape in group.items()]
    return {name: values(shape, 10 * kind + k) for k, (name, shape) in enumerate(names)}


def cut_groups(tensors: dict[str, torch.Tensor], world: int, padded: bool) -> list[list[torch.Tensor]]:
    """ZeRO-1 and 2: [process][group], equal shares of all parameters of a group; weights lack the padding."""
    shards: list[list[torch.Tensor]] = [[] for _ in range(world)]
    for group in GROUPS:
        flat = torch.cat([tensors[name].flatten() for name in group])
        share = 2 * math.ceil(len(flat) / (2 * world))
        full = torch.cat([flat, torch.zeros(share * world - len(flat))]) if padded else flat
        for rank in range(world):
            shards[rank].append(full[rank * share : (rank + 1) * share].clone())
    return shards


def cut_parameters(tensors: dict[str, torch.Tensor], world: int, padded: bool) -> list[list[torch.Tensor]]:
    """ZeRO-3: every parameter in equal shares."""
    shards: list[list[torch.Tensor]] = [[] for _ in range(world)]
    for group in GROUPS:
        parts: list[list[torch.Tensor]] = [[] for _ in range(world)]
        for name in group:
            share = math.ceil(tensors[name].numel() / world)
            flat = torch.zeros(share * world)
            flat[: tensors[name].numel()] = tensors[name].flatten()
            for rank in range(world):
                parts[rank].append(flat[rank * share : (rank + 1) * share])
        for rank in range(world):
            shards[rank].append(torch.cat(parts[rank]))
    return shards


def write(folder: Path, stage: int, world: int) -> None:
    """A checkpoint as DeepSpeed writes it."""
    shapes = [{name: torch.Size(shape) for name, shape in group.items()} for group in GROUPS]
    model = {"module": {"base": torch.tensor(2.0)}, "buffer_names": ["base"], "param_shapes": shapes, "global_steps": 4}
    model["frozen"] = {"neck": torch.tensor(3.0)}
    cut, kinds = cut_parameters if stage == 3 else cut_groups, (WEIGHT, *MOMENTS)
    shards = [cut(whole(k), world, k > 0) for k in range(len(kinds))]
    for rank in range(world):
        state = {
            group: {"step": torch.tensor(4.0), **{kind: shards[k][rank][group] for k, kind in enumerate(kinds) if k}}
            for group in range(len(GROUPS))
        }
        adam = {"state": state, "param_groups": [{"lr": 0.25, "params": [0]}, {"lr": 0.5, "params": [1]}]}
        keys = ("fp32_flat_groups", "optimizer_state_dict") if stage == 3 else (
            "single_partition_of_fp32_groups", "base_optimizer_state")  # fmt: skip
        optimizer = dict(zip(keys, (shards[0][rank], adam))) | {"partition_count": world if stage == 3 else [world] * 2}
        torch.save({"optimizer_state_dict": optimizer}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        if stage == 3:
            torch.save(model, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    if stage < 3:
        torch.save(model, folder / "mp_rank_00_model_states.pt")


@pytest.mark.parametrize("world", [1, 2, 3, 11])
@pytest.mark.parametrize("stage", [2, 3])
def test_parameters_are_put_together(tmp_path, stage, world):
    write(tmp_path, stage, world)
    with plain_data(tmp_path):
        shards = Shards(tmp_path)
    for k, kind in enumerate((WEIGHT, *MOMENTS)):
        for name, value in whole(k).items():
            assert torch.equal(shards.read(name, kind), value), (name, kind)
    assert (shards.rates, shards.step, shards.fixed) == ([0.25, 0.5], 4, {"base": 2, "neck": 3})
    assert shards.model["global_steps"] == 4


@pytest.mark.parametrize("stage", [2, 3])
def test_a_missing_shard_is_an_error(tmp_path, stage):
    write(tmp_path, stage, 3)
    (tmp_path / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match="2 of 3 shards"), plain_data(tmp_path):
        Shards(tmp_path)
    for path in tmp_path.glob("*optim*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"no file .*optim_states"), plain_data(tmp_path):
        Shards(tmp_path)


def test_a_shard_that_is_too_short_is_an_error(tmp_path):
    write(tmp_path, 2, 2)
    path = tmp_path / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    state = torch.load(path)
    weights = state["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    weights[0] = weights[0][:-1].clone()
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="cannot be read"), plain_data(tmp_path):
        [shards := Shards(tmp_path), *(shards.read(name, WEIGHT) for name in shards.shapes)]


@pytest.mark.parametrize("stage", [2, 3])
def test_shapes_larger_than_the_shards_are_an_error(tmp_path, stage):
    write(tmp_path, stage, 2)
    for path in tmp_path.glob("*model_states.pt"):
        state = torch.load(path)
        state["param_shapes"][0]["a"] = torch.Size((10**9, 10**3))
        torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"group 0 has .* fewer than its parameters"), plain_data(tmp_path):
        Shards(tmp_path)


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_and_stages(tmp_path):
    """What is restored is the checkpoint bit for bit, and the run is the whole one; with uneven validation and merging.

    scripts/dev/check_resume.py has the other combinations.
    """
    row, script = "zero2 x1, zero3 x2, zero2_offload x1", ROOT / "scripts/dev/check_resume.py"
    program = Program(script, "--precision", "fp32", "--only", row, output=tmp_path / "printed.txt")
    assert program.ends() == 0, program.printed()[-4000:]
    assert f"\n{row} " in program.printed()
