"""The Muon optimizer in float32, for pre-training the tiny family on a CPU."""

from __future__ import annotations

import torch
from torch import nn


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalized by Newton-Schulz, in float32 and batched over matrices of the same shape.

    torch.optim.Muon iterates in bfloat16 and over one matrix at a time, which is slow on a CPU.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # takes no closure
        for group in self.param_groups:
            shapes: dict[tuple, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(tuple(parameter.shape), []).append(parameter)
            for shape, parameters in shapes.items():
                gradient = torch.stack([p.grad for p in parameters])  # type: ignore[misc]  # none is None
                state = self.state[parameters[0]]
                buffer = state.setdefault("momentum", torch.zeros_like(gradient))
                buffer.lerp_(gradient, 1 - group["momentum"])
                update = orthogonalize(gradient.lerp(buffer, group["momentum"]))
                update *= group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, change in zip(parameters, update):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change)


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Approximates the nearest (semi-)orthogonal matrices of [n, r, c] by a quintic Newton-Schulz iteration."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT
