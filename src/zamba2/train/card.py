"""The model card of a training run, from what the run's folder holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from zamba2.train.data import Part
from zamba2.train.progress import read_metrics
from zamba2.train.recipe import Recipe
from zamba2.weights.hub import ALIASES

__all__ = ["model_card"]

STAGES = {"sft": "supervised fine-tuning", "dpo": "direct preference optimization"}
SHOWN = (
    "optimizer", "learning_rate", "schedule", "warmup", "weight_decay", "betas", "max_grad_norm", "batch_size", "epochs", "steps",
    "max_tokens", "precision", "rounding", "seed",
)  # fmt: skip
OF_STAGE = {"sft": ("packing", "distill"), "dpo": ("beta", "loss", "label_smoothing", "sft_weight")}


def model_card(recipe: Recipe, report: Mapping[str, Any], versions: Mapping[str, str], metrics: Path) -> str:
    """README.md in the Hub's form. report: of ``prepare``; versions: by library; metrics: metrics.jsonl, for the last losses."""
    hubs = [hub for hub in (Part.parse(written).source.hub for written in recipe.data if ":" not in written) if hub]
    from_config = recipe.model.endswith(".json")
    head: dict[str, Any] = {"library_name": "zamba2", "pipeline_tag": "text-generation", "tags": ["zamba2", recipe.stage, "trl"]}
    base = recipe.model if Path(recipe.model).exists() else ALIASES.get(recipe.model.lower(), recipe.model)
    head |= {} if Path(base).exists() else {"base_model": base}
    head |= {"datasets": hubs} if hubs else {}
    start = f"new weights of the shape in `{recipe.model}`" if from_config else f"`{recipe.model}`"
    fields = recipe.model_dump(mode="json")
    settings = {name: fields[name] for name in (*SHOWN, *OF_STAGE[recipe.stage])}
    settings |= {f"lora.{name}": value for name, value in (fields["lora"] or {}).items()}
    lines = read_metrics(metrics) if metrics.exists() else []
    names = ("loss", "eval_loss", "rewards/accuracies")
    last = {name: next((line[name] for line in reversed(lines) if name in line), None) for name in names}
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
            "",
            f"# {recipe.out.name}",
            "",
            f"Zamba2, {STAGES[recipe.stage]} of {start}{' with LoRA, merged' if recipe.lora else ''}, by `zamba2 train {recipe.stage}`.",
            "",
            "## Data",
            "",
            "| set | weight | rows read | dropped | examples used | tokens | trained on |",
            "|---|---|---|---|---|---|---|",
            *(
                f"| {found['set']} | {found['weight']:g} | {found['read']:,} | {found['read'] - found['kept']:,} "
                f"| {found['used']['examples']:,} | {found['used']['tokens']:,} | {found['used']['trained']:,} |"
                for found in report["sets"]
            ),
            "",
            "## Training",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in settings.items() if value is not None),
            *(f"| last {name} | {value:.4f} |" for name, value in last.items() if isinstance(value, float)),
            "",
            f"With {', '.join(f'{name} {number}' for name, number in versions.items())}.",
            "",
            "## Use",
            "",
            "    zamba2 chat --model THIS_REPOSITORY",
            "",
        ]
    )
