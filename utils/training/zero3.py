"""ZeRO stage 3 and this model: which parameters stay whole on every process, and all of them while it is validated.

Stage 3 leaves each process a shard of every parameter, and gathers a module's whole when the module is called. All
processes must therefore call the same modules in the same order. LLaMA and CLIP satisfy this; SAM, phi and the gate do
not: a process whose images have no mask skips them, and ``ppm.gate`` is read without a call.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from model.lora import base_of

WHOLE = ("visual_model", "text_hidden_fcs", "ppm")  # modules that not every process calls in every step


def is_sharded(engine) -> bool:
    """Whether the engine's processes hold shards of the parameters (ZeRO stage 3)."""
    return engine.zero_optimization_stage() == 3


def shard(model: nn.Module, settings: dict[str, Any]) -> None:
    """Shards the parameters one by one, before the engine would move the whole model to the device."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import Init

    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    deepspeed.init_distributed(dist_init_required=False)  # it takes the process group that exists
    for parameter in model.parameters():  # as the engine would: peft makes adapters in float32
        parameter.data = parameter.data.to(torch.bfloat16 if settings["bf16"]["enabled"] else torch.float32)
    Init(module=model, config_dict_or_path=settings)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(get_accelerator().current_device_name())


def keep_whole(engine) -> None:
    """Keeps the parameters of ``WHOLE`` gathered: only their gradients and optimizer state are sharded.

    DeepSpeed knows such parameters (``stage3_param_persistence_threshold``), but chooses them by size. Its hooks on
    these modules go: they compare the order of calls between processes.
    """
    if not is_sharded(engine):
        return
    parameters: Iterable[Any] = [p for module in _whole_modules(engine) for p in module.parameters(recurse=False)]
    for parameter in parameters:
        if not parameter.ds_persist:
            parameter.ds_persist = True
            engine.optimizer.persistent_parameters.append(parameter)
    base_of(engine.module).touched_modules = WHOLE  # every process reaches the others, which may be sharded by then
    _hide_whole_modules(engine)


def _whole_modules(engine) -> list[nn.Module]:
    base = base_of(engine.module)
    return [module for name in WHOLE for module in base.get_submodule(name).modules()]


def _hide_whole_modules(engine) -> None:
    """Gathers the parameters that stay whole, and removes DeepSpeed's hooks from the modules of ``WHOLE``."""
    engine.optimizer.checkpoint_event_epilogue()
    for module in _whole_modules(engine):
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()


@contextlib.contextmanager
def gathered(engine) -> Iterator[None]:
    """Within it every process holds all parameters, as without stage 3: processes may call different modules.

    All processes must enter and leave it. It takes the memory of the whole model.
    """
    if not is_sharded(engine):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    offload = engine.optimizer.parameter_offload
    engine.optimizer.checkpoint_event_prologue()  # releases all, so that all are gathered in one order
    with GatheredParameters(engine.module.parameters()):
        hooks = [*offload.forward_hooks, *offload.backward_hooks]  # they would release what a module has used
        offload.forward_hooks, offload.backward_hooks = [], []
        for hook in hooks:
            hook.remove()
        yield
    offload._register_deepspeed_module(offload.module)
    _hide_whole_modules(engine)
