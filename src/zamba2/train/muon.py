"""Muon for the matrices inside the model, AdamW for the rest, as one optimizer with one learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from zamba2.runtime.torch import multiplies_bf16

__all__ = ["Muon"]

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: singular values end between 0.7 and 1.2


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024; steps scaled to AdamW's size, Moonlight's 0.2 sqrt(max(rows, columns))) and torch's AdamW.

    parameters: named, of a model; those of two dimensions that are neither an embedding nor a head are Muon's. Weight decay is the
    matrices' alone.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, nn.Parameter]], lr: float, *, betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in parameters:
            if parameter.requires_grad:
                inside = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
                (matrices if inside else others).append(parameter)
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(Orthogonal(matrices, lr, weight_decay))
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=0.0))
        super().__init__([{"params": matrices + others}], {"lr": lr})
        self.param_groups = [group for part in self.parts for group in part.param_groups]  # shared: a schedule's changes reach the parts

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts], "param_groups": [], "state": {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


class Orthogonal(torch.optim.Optimizer):
    """Steps along the nearest orthogonal matrix of a gradient's running mean, looked ahead as Nesterov does.

    They are ``torch.optim.Muon``'s, bit for bit where products are taken in bf16 as there; where a CPU has no instructions for
    those, a matrix of 512 x 2,048 would take it 12 s, so products are fp32.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            lr, decay = group["lr"], group["weight_decay"]
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix.grad)
                mean = state["momentum_buffer"].lerp_(matrix.grad, 1 - MOMENTUM)
                dtype = torch.bfloat16 if multiplies_bf16(matrix.device) else torch.float32
                direction = orthogonalized(matrix.grad.lerp(mean, MOMENTUM).to(dtype))
                matrix.mul_(1 - lr * decay)
                matrix.add_(direction, alpha=-lr * 0.2 * math.sqrt(max(matrix.shape)))
        return loss


def orthogonalized(matrix: Tensor) -> Tensor:
    """About the U V^T of a matrix's U S V^T, by Newton and Schulz's iteration in its dtype. (rows, columns) to the same shape."""
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        squared = x @ x.T
        x = torch.addmm(x, torch.addmm(squared, squared, squared, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x
