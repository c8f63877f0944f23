"""The training step's forward pass on fake CUDA tensors, which have a shape and a device but no values.

They raise where devices are mixed, and where Python needs a value, which would synchronize with the device. The
backward pass needs a real device, as do point prompts, which segment-anything embeds by boolean indexing.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import model.UGround as uground
from model.layer_rules import StochasticSkip
from model.lora import add_lora
from model.settings import RECIPES
from model.structures import Turn

SETTINGS = {
    "policy": {},
    "exact": {"policy_gradient": "exact"},
    "critic": {"baseline": "critic", "scale_advantage": True},
    "state_critic": {"baseline": "state_critic", "scale_advantage": True},
    "leave one out": {"policy_gradient": "leave_one_out", "reward_terms": "mask", "scale_advantage": True},
    "leave one out of maps": {"policy_gradient": "leave_one_out", "reward_terms": "iou"},
    "mask reward": {"reward_terms": "mask_iou", "iou_loss_weight": 1.0},
    "soft": {"layer_selection": "soft"},
    "ce_soft": {"layer_selection": "ce_soft"},
    "lisa": {"layer_selection": "last", "mask_prompt": False, "map_terms": ()},
    "released": RECIPES["released"],
    "all terms": {"map_terms": ("bce", "dice", "gaussian_bce", "gaussian_dice"), "reward_terms": "iou"},
}


def to_fake_gpu(module: torch.nn.Module, mode: FakeTensorMode) -> torch.nn.Module:
    def fake(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            return mode.from_tensor(tensor.detach()).to("cuda")

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(fake(parameter), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = fake(buffer)
    return module


@pytest.fixture
def forward(make_model, tiny_processor, tiny_samples):
    """forward(**settings) -> the loss's device."""

    def run(**settings) -> str:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        model = to_fake_gpu(add_lora(make_model(**settings), r=2), mode).train()
        processor = copy.copy(tiny_processor)
        processor.keep_padding = model.config.reads_padding
        batch = processor.collate(tiny_samples[:2])  # neither is square
        with mode:
            return str(model(batch.to("cuda")).loss.device)

    return run


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_step_stays_on_the_gpu_and_never_synchronizes(forward, settings):
    assert forward(**settings) == "cuda:0"


def test_the_fake_gpu_detects_a_tensor_on_the_wrong_device(forward, monkeypatch):
    choose = StochasticSkip.choose
    monkeypatch.setattr(StochasticSkip, "choose", lambda self, log_policy, noise: choose(self, log_policy, noise.cpu()))
    with pytest.raises(RuntimeError, match="cuda"):
        forward()


def test_the_fake_gpu_detects_a_synchronization(forward, monkeypatch):
    normalise = uground.normalise_maps
    monkeypatch.setattr(uground, "normalise_maps", lambda scores, valid: normalise(scores, valid) * scores.max().item())
    with pytest.raises(DataDependentOutputException):
        forward()


def test_an_image_without_masks_needs_no_kernel_that_fails_on_zero_maps(
    make_model, tiny_processor, tiny_samples, monkeypatch
):
    resize, calls = F.interpolate, []

    def strict(values, *args, antialias=False, **options):
        calls.append(antialias)
        assert len(values) or not antialias, "CUDA error: invalid argument"  # as PyTorch 2.11 does
        return resize(values, *args, antialias=antialias, **options)

    monkeypatch.setattr(F, "interpolate", strict)
    answer = Turn("where is the star", "There is no such thing: [REJ]")
    absent = replace(tiny_samples[0], conversations=[(answer,)], masks=tiny_samples[0].masks[:0])
    model = add_lora(make_model(), r=2).train()
    model(tiny_processor.collate([absent, tiny_samples[1]])).loss.backward()
    assert True in calls
    model(tiny_processor.collate([absent])).loss.backward()
