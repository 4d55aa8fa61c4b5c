"""LoRA on Zamba2: which layers an adapter reaches, a check that it reaches all that were asked for, and a table that says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zamba2.config import Config
from zamba2.errors import Zamba2Error
from zamba2.train.recipe import Lora

__all__ = ["Coverage", "add_lora", "coverage", "kept_by_merging"]


@dataclass(frozen=True)
class Coverage:
    """One layer type: modules of it, its parameters and those trained, and where its modules act."""

    name: str
    modules: int
    parameters: int
    trained: int
    where: str


def add_lora(model: Any, settings: Lora) -> Any:
    """A peft model with LoRA on the layer types asked for. Raises Zamba2Error when one of them is not in the model."""
    from peft import LoraConfig, get_peft_model

    found = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for target in settings.targets:
        if target not in found:
            raise Zamba2Error(f"lora.targets names {target}, which no layer is called; there are {', '.join(sorted(found - {'0', '1'}))}.")
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout,
        target_modules=list(settings.targets), task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = get_peft_model(model, config)
    for row in coverage(adapted, model.model.config):
        if row.name in settings.targets and not row.trained:
            raise Zamba2Error(f"no trainable parameter reaches {row.name}; report this with your recipe.")
    return adapted


def coverage(model: nn.Module, config: Config) -> list[Coverage]:
    """For each layer type what there is and what of it is trained, largest first."""
    rows: dict[str, list[Any]] = {}
    trained: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        parts = [part for part in name.split(".") if part not in ("base_model", "base_layer", "default", "weight", "bias", "model")]
        lora = any(part.startswith("lora_") for part in parts)
        parts = [part for part in parts if not part.startswith("lora_")]
        kind = next((part for part in reversed(parts) if not part.isdigit()), parts[-1])
        own = rows.setdefault(kind, [set(), 0])
        if not lora:
            own[0].add(".".join(parts))
            own[1] += parameter.numel()
        trained[kind] = trained.get(kind, 0) + (parameter.numel() if parameter.requires_grad else 0)
    table = [Coverage(kind, len(names), count, trained[kind], _where(names, config)) for kind, (names, count) in rows.items()]
    return sorted(table, key=lambda row: -row.parameters)


@torch.no_grad()
def kept_by_merging(model: nn.Module) -> float:
    """The share of what adapters add that is left once it is rounded into the weights they are merged with; 1 where nothing is added."""
    kept = added = 0.0
    layers: Iterator[Any] = (module for module in model.modules() if hasattr(module, "get_delta_weight"))
    for layer in layers:
        weight, delta = layer.get_base_layer().weight, layer.get_delta_weight("default").float()
        moved = (weight.float() + delta).to(weight.dtype).float() - weight.float()
        kept, added = kept + float((moved * delta).sum()), added + float(delta.square().sum())
    return kept / added if added else 1.0


def _where(names: Sequence[str], config: Config) -> str:
    """The layers at which modules act; a shared block acts at every position that uses it."""
    blocks = {int(name.split(".")[1]) for name in names if name.startswith("shared_blocks")}
    if blocks:
        at = {b: [layer.index for layer in config.layers if layer.block == b] for b in sorted(blocks)}
        return "; ".join(f"shared block {'AB'[b] if b < 2 else b} at layers {', '.join(map(str, layers))}" for b, layers in at.items())
    layers = sorted({int(name.split(".")[1]) for name in names if name.startswith("layers")})
    if not layers:
        return ""
    return "all layers" if len(layers) == config.num_hidden_layers else f"layers {', '.join(map(str, layers))}"
