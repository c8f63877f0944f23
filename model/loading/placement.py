"""Placement of a loaded model: on one device, quantized, or spread over several devices.

Only the decoder layers of the language model are quantized or spread; they are nine tenths of a 7B model. CLIP, the
projector, embeddings, lm_head, phi, the gate and SAM stay together on one device, in the requested precision.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import nn

from model.backbones.base import Backbone
from model.settings import PRECISION_NAMES, QUANTIZATIONS

PRECISIONS = dict(zip(PRECISION_NAMES, (torch.float32, torch.bfloat16, torch.float16)))
USABLE = 0.8  # share of a device's free memory for weights; the rest is for activations (SAM at 1024 px) and KV cache


def pick_device(wanted: str) -> str:
    """The device to use; ``auto`` = the GPU if there is one.

    Raises:
        ValueError: if the device is unknown or unavailable.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device {wanted} cannot be used ({reason}); use cpu, cuda with an NVIDIA GPU, or mps on a Mac"
        ) from error
    return wanted


def pick_precision(wanted: str, device: str) -> str:
    """The precision to use, a key of ``PRECISIONS``; ``auto`` = bf16 on a GPU, fp32 elsewhere.

    Raises:
        ValueError: if it is not one of ``PRECISIONS``.
    """
    if wanted == "auto":
        return "bf16" if device.startswith("cuda") else "fp32"
    if wanted not in PRECISIONS:
        raise ValueError(f"--precision {wanted} is unknown; use auto, {', '.join(PRECISIONS)}")
    return wanted


def place(model: Backbone, device: str, quantize: str | None = None, device_map: str | None = None) -> None:
    """Moves a model from main memory to its device(s), in place.

    Args:
        device: of the whole model, or of all but the layers that are spread.
        quantize: one of ``QUANTIZATIONS``; None = as loaded.
        device_map: ``auto`` = spread decoder layers over all GPUs, and main memory if they are too small.

    Raises:
        ValueError: for an unknown value, if bitsandbytes is missing, the device does not support it, or memory is too
            small.
    """
    for name, value, choices in (("quantize", quantize, QUANTIZATIONS), ("device_map", device_map, ("auto",))):
        if value and value not in choices:
            raise ValueError(f"--{name}: {value!r} is not one of {', '.join(choices)}")
    if quantize and device_map:
        raise ValueError("--quantize and --device_map exclude each other: quantized layers stay on one device")
    if quantize:
        quantize_layers(model, quantize, device)
    if not device_map:
        model.to(device)  # type: ignore[arg-type]  # transformers' annotation is wrong
        return
    if torch.device(device).type != "cuda":
        raise ValueError(f"--device_map {device_map} spreads layers over GPUs; on {device} there is nothing to spread")
    from accelerate.utils import get_max_memory

    spread(model, device, plan(model, torch.device(device).index or 0, get_max_memory()))


# -- quantization ------------------------------------------------------------------------------------------------------


def quantize_layers(model: Backbone, kind: str, device: str) -> None:
    """Replaces the decoder layers' projections by bitsandbytes' 8-bit (LLM.int8) or 4-bit (NF4) ones, one by one.

    Args:
        kind: one of ``QUANTIZATIONS``.

    Raises:
        ValueError: if bitsandbytes is not installed, or does not support the device or the projections' sizes.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError("--quantize needs bitsandbytes, which is not installed: pip install bitsandbytes")
    if torch.device(device).type not in ("cuda", "cpu"):
        raise ValueError(f"--quantize: bitsandbytes has no code for {device}; use cuda or cpu, or leave --quantize out")
    from bitsandbytes import nn as bnb

    for layer in model.decoder_layers:
        for parent in layer.modules():
            for name, linear in parent.named_children():
                if type(linear) is not nn.Linear:
                    continue
                sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
                if kind == "4bit" and device == "cpu" and (sizes[0] % 64 or sizes[1] % 32):
                    raise ValueError(
                        "--quantize 4bit: on a CPU, bitsandbytes takes projections from a multiple of 64 to one of "
                        f"32; {name} is {sizes[0]} to {sizes[1]}. Use 8bit"
                    )
                if kind == "4bit":
                    dtype = linear.weight.dtype
                    quantized = bnb.Linear4bit(*sizes, bias, compute_dtype=dtype, quant_type="nf4", device="meta")
                    quantized.weight = bnb.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
                else:
                    quantized = bnb.Linear8bitLt(*sizes, bias, has_fp16_weights=False, device="meta")
                    quantized.weight = bnb.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
                quantized.bias = linear.bias
                setattr(parent, name, quantized.to(device))  # bitsandbytes quantizes when it moves weights


# -- several devices ---------------------------------------------------------------------------------------------------


def plan(model: Backbone, main: int, memory: dict[int | str, int]) -> list[int | str]:
    """A device per decoder layer. Layers fill the main GPU, then the other GPUs, then main memory (``"cpu"``).

    Args:
        main: index of the main GPU, which also holds all other modules.
        memory: free bytes per GPU index, and of ``"cpu"``.

    Raises:
        ValueError: if the main GPU is too small for the other modules, or all devices together for the layers.
    """
    needed = [sum(tensor.nbytes for tensor in layer.state_dict().values()) for layer in model.decoder_layers]
    rest = sum(tensor.nbytes for tensor in model.state_dict().values()) - sum(needed)
    free: dict[int | str, float] = {main: USABLE * memory[main] - rest}
    free |= {gpu: USABLE * size for gpu, size in memory.items() if gpu not in (main, "cpu")}
    free |= {"cpu": USABLE * memory["cpu"]}
    if free[main] < 0:
        raise ValueError(
            f"--device_map: GPU {main} has {memory[main] / 1e9:.1f} GB free, and what cannot be spread (SAM, CLIP, "
            f"embeddings) takes {rest / 1e9:.1f} GB plus room to compute; use --precision bf16, or another GPU"
        )
    layer_devices: list[int | str] = []
    devices = list(free)
    for size in needed:
        while devices and free[devices[0]] < size:
            devices.pop(0)
        if not devices:
            raise ValueError(f"--device_map: {sum(needed) / 1e9:.1f} GB of layers fit into no GPU and main memory here")
        free[devices[0]] -= size
        layer_devices.append(devices[0])
    return layer_devices


def spread(model: Backbone, device: str, layer_devices: list[int | str]) -> None:
    """Moves each decoder layer to its device (``plan``), all else to the main one, where layers return their outputs.

    Layers in main memory (``"cpu"``) are copied to the main device for each forward pass.
    """
    from accelerate import cpu_offload
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    decoder, layers = model.language, model.decoder_layers
    decoder.layers = nn.ModuleList()
    model.to(device)  # type: ignore[arg-type]
    decoder.layers = layers
    for layer, layer_device in zip(layers, layer_devices):
        if layer_device == "cpu":
            cpu_offload(layer, torch.device(device), offload_buffers=True)
        else:
            hook = AlignDevicesHook(
                layer_device, io_same_device=True, place_submodules=True, skip_keys="past_key_values"
            )
            add_hook_to_module(layer, hook)
