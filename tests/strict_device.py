"""A GPU to test with where there is none: its tensors claim to be on ``cuda:0``, and the CPU computes their values.

As on CUDA, an operation raises if it mixes both devices, unless what is on the CPU is an index or, beside others, a
number (0-d). ``numpy`` raises, too. What makes the host wait is recorded, as by ``set_sync_debug_mode``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = Path(__file__).resolve().parents[1]
OWN = {path.parent for name in ("model", "utils", "scripts", "tests") for path in (ROOT / name).rglob("*.py")} | {ROOT}
CUDA = torch.device("cuda", 0)
HIDDEN = torch.device("lazy", 0)  # what C++ sees: a device that autograd knows, and that needs no driver
CPU = torch.device("cpu")
COPYING = {"aten::_to_copy", "aten::copy_"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
TAKING_NUMBERS = INDEXING | {"aten::fill_", "aten::index_fill", "aten::masked_fill", "aten::masked_fill_"}


@contextmanager
def strict_device() -> Iterator[list[str]]:
    """The device ``cuda`` exists inside. Yields where the host has waited for it: ``operation at file:line``."""
    waits: list[str] = []
    run_backward = torch.autograd._engine_run_backward

    def run_with_names(*args: Any, **kwargs: Any) -> Any:
        with _Names():  # a mode is off while a function runs, here Tensor.backward with all that it calls
            return run_backward(*args, **kwargs)

    with mock.patch.object(torch.autograd, "_engine_run_backward", run_with_names), _Names(), _Kernels(waits):
        yield waits


class DeviceTensor(torch.Tensor):
    """A tensor on the device. ``values``: the same on the CPU."""

    values: torch.Tensor
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = True  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> DeviceTensor:
        layout: dict[str, Any] = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        with torch.inference_mode(values.is_inference()):
            tensor = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=HIDDEN, **layout)
        tensor.values = values
        return tensor

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, new: DeviceTensor) -> None:
        torch.Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.values = new.values

    def tolist(self) -> Any:  # C++ refuses subclasses
        return self.cpu().tolist()

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values"], None  # tells Module.to to replace parameters, whose memory C++ could not

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *_: Any) -> DeviceTensor:
        return DeviceTensor(inner["values"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of strict_device")


class _Names(TorchFunctionMode):
    """Keeps the name ``cuda`` from C++, which would look for a driver."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.device:
            args, kwargs = tuple(map(_hidden, args)), {name: _hidden(value) for name, value in (kwargs or {}).items()}
        if func in (torch.tensor, torch.as_tensor):  # as on CUDA: a tensor on the host, which is then copied
            return func(*args, **kwargs | {"device": None}).to(kwargs.get("device") or CPU)
        if func is torch.Tensor.__getitem__ and isinstance(args[1], list):  # C++ would make both on the hidden device
            args = args[0], torch.tensor(args[1], dtype=torch.int64)
        elif func is torch.Tensor.__setitem__ and isinstance(args[2], (int, float)):
            args = *args[:2], torch.tensor(args[2], dtype=args[0].dtype)
        return func(*args, **kwargs or {})


def _hidden(value: Any) -> Any:
    return HIDDEN if isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda" else value


class _Kernels(TorchDispatchMode):
    """Runs an operation on the CPU, if CUDA would run it."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # autograd takes such functions apart; in inference mode they arrive whole
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        mine = any(map(_is_mine, tensors))
        target = kwargs.get("device") or (HIDDEN if mine else CPU)
        if not mine and target != HIDDEN:
            return func(*args, **kwargs)
        if mine:
            _check_devices(func, args, tensors)
        if _waits(func, args, kwargs, target):
            self.waits.append(f"{func} at {_place()}")
        plain_args, plain = tree_map_only(DeviceTensor, lambda tensor: tensor.values, (args, kwargs))
        if plain.get("device") == HIDDEN:
            plain["device"] = CPU
        result = func(*plain_args, **plain)
        if target != HIDDEN:
            return result
        given = {id(tensor.values if _is_mine(tensor) else tensor): tensor for tensor in tensors}
        return tree_map_only(
            torch.Tensor, lambda each: given[id(each)] if id(each) in given else DeviceTensor(each), result
        )


def _is_mine(tensor: Any) -> bool:
    return isinstance(tensor, DeviceTensor)


def _check_devices(func: Any, args: Any, tensors: list[torch.Tensor]) -> None:
    """Raises a RuntimeError as CUDA does, for an operation with tensors on both devices."""
    name = func._schema.name
    if name in COPYING:
        return
    indices = {id(index) for index in args[1]} if name in INDEXING and _is_mine(args[0]) else set()
    takes_numbers = torch.Tag.pointwise in func.tags or name in TAKING_NUMBERS or name.startswith("aten::_foreach_")
    for tensor in tensors:
        is_written = tensor is args[0] and name.endswith("_")
        is_number = tensor.dim() == 0 and takes_numbers and not is_written
        if not (_is_mine(tensor) or is_number or id(tensor) in indices):
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} got {list(tensor.shape)} on cpu")


def _waits(func: Any, args: Any, kwargs: Any, target: torch.device) -> bool:
    """Whether the host waits: for a copy between the devices, unless it is ``non_blocking``; for a value that Python
    reads, or that a shape depends on."""
    name = func._schema.name
    if name == "aten::copy_":
        return _is_mine(args[0]) != _is_mine(args[1]) and args[1].numel() > 0 and True not in args[2:]
    if name == "aten::_to_copy":
        moves = _is_mine(args[0]) != (target == HIDDEN)
        return moves and args[0].numel() > 0 and not kwargs.get("non_blocking")
    if name in INDEXING:
        if name != "aten::index" and args[2].dim() == 0 and not _is_mine(args[2]):
            return False  # a number in place of a mask's pixels: CUDA fills them without counting them
        return any(not _is_mine(index) or index.dtype == torch.bool for index in args[1] if index is not None)
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


def _place() -> str:
    """The innermost line of the project's own code, such as ``generation.py:125``."""
    frame = sys._getframe(2)
    while Path(frame.f_code.co_filename).parent not in OWN or frame.f_code.co_filename == __file__:
        assert frame.f_back is not None
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
