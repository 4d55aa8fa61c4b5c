"""Training through rounded weights, so that a packed model loses less of what was learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback

from zamba2.config import Config
from zamba2.hf import IGNORED
from zamba2.weights.formats import CANDIDATES, GROUP, Format
from zamba2.weights.packed import Packing, parts

__all__ = ["RoundWeights", "divergence", "rounded_weights"]


class RoundWeights(TrainerCallback):  # type: ignore[misc]
    """Every second step's loss is that of weights rounded as they are packed; its gradients change the full weights, as if nothing had been
    rounded (straight-through: Bengio et al. 2013, section 3). The steps between keep the full weights good: without them these become
    the worse of the two (docs/log.md). Evaluations and checkpoints see the full weights.

    model: a Zamba2ForCausalLM, whose matrices are whole. every: 1 rounds in each step, where nobody wants the full weights.
    """

    def __init__(self, model: nn.Module, config: Config, packing: Packing, *, every: int = 2) -> None:
        self.every = every
        found = dict(model.named_parameters())
        self.matrices: list[tuple[nn.Parameter, Format, int]] = []  # with how many pieces side by side are packed apart
        for part in parts(config):
            if part.is_matrix and part.half in (None, 0):
                pieces = 1 if part.half is None else 2
                for source in part.sources:
                    name = source if source.startswith("lm_head.") else f"model.{source}"
                    self.matrices.append((found[name], packing.of(part), pieces))
        self.full: list[Tensor] = []

    @torch.no_grad()
    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step % self.every:
            return
        self.full = [weight.detach().clone() for weight, _, _ in self.matrices]
        for weight, format, pieces in self.matrices:
            weight.copy_(torch.cat([rounded_weights(piece, format) for piece in weight.chunk(pieces, dim=1)], dim=1))

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self.full:
            for (weight, _, _), full in zip(self.matrices, self.full, strict=True):
                weight.copy_(full)
        self.full = []


def divergence(model: nn.Module, teacher: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """How far a model's predictions lie from a teacher's: KL(teacher || model) in nats, summed over the places that carry loss, and their
    number (Hinton et al. 2015, section 2, at temperature 1). inputs: of ``Zamba2ForCausalLM``, with labels (b, T)."""
    scored = inputs["labels"][:, 1:] != IGNORED
    given = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad():
        wanted = teacher(**given).logits[:, :-1][scored].float().log_softmax(-1)
    found = model(**given).logits[:, :-1][scored].float().log_softmax(-1)
    return F.kl_div(found, wanted, reduction="sum", log_target=True), scored.sum()


def rounded_weights(weight: Tensor, format: Format) -> Tensor:
    """What a packed matrix stands for: float32 (rows, cols). The twin, on any device, of ``formats.quantize``, which says how."""
    rows, cols = weight.shape
    groups = F.pad(weight.float(), (0, -cols % GROUP)).reshape(-1, GROUP)
    peak = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    if format.name == "q8":
        best = _stored(peak.abs() / 127)
    else:
        best, least = peak, torch.full_like(peak, torch.inf)
        for candidate in CANDIDATES:
            codes = _codes(groups, _stored(peak / candidate), format)
            square = codes.square().sum(1, keepdim=True)
            scales = _stored((codes * groups).sum(1, keepdim=True) / square.clamp_min(1))  # codes are whole: 0 where all are
            error = (_codes(groups, scales, format) * scales - groups).square().sum(1, keepdim=True)
            best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return (_codes(groups, best, format) * best).reshape(rows, -1)[:, :cols]


def _stored(scales: Tensor) -> Tensor:
    return scales.half().float()


def _codes(groups: Tensor, scales: Tensor, format: Format) -> Tensor:
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    return (groups * inverse).round_().clamp_(format.smallest, format.largest)
