"""Muon for the matrices inside the model, AdamW for the rest, as one optimizer with one learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from zamba2.errors import Zamba2Error

__all__ = ["Muon"]


class Muon(torch.optim.Optimizer):
    """torch's own Muon (Jordan et al. 2024; steps scaled to AdamW's size, Moonlight's 0.2 sqrt(max(rows, columns))) and AdamW.

    parameters: named, of a model; those of two dimensions that are neither an embedding nor a head are Muon's. Weight decay is the
    matrices' alone. Raises Zamba2Error where torch is older than 2.9, which has no Muon.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, nn.Parameter]], lr: float, *, betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        if not hasattr(torch.optim, "Muon"):
            raise Zamba2Error(f"optimizer is muon, which torch {torch.__version__} lacks; torch >= 2.9 is needed, or optimizer=adamw.")
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in parameters:
            if parameter.requires_grad:
                inside = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
                (matrices if inside else others).append(parameter)
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
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
