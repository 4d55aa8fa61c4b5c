"""What an evaluation leaves behind: one JSON document, and a Markdown table beside the model card's rows."""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zamba2 import __version__
from zamba2.runtime.processors import machine, versions
from zamba2.weights.files import write_text

__all__ = ["CARD", "beside_the_card", "document", "slug", "write_result"]

# Zamba2-2.7B-Instruct's model card: aggregate MT-Bench (scale not stated; ten times a mean of 1 to 10 fits) and IFEval (metric not stated).
CARD: Mapping[str, tuple[str, float, float]] = {
    "Zamba2-2.7B-Instruct": ("2.7B", 72.40, 48.02),
    "Mistral-7B-Instruct": ("7B", 66.4, 45.3),
    "Gemma2-2B-Instruct": ("2.7B", 51.69, 42.20),
    "H2O-Danube-4B-Chat": ("4B", 52.57, 37.96),
    "StableLM-Zephyr-3B": ("3B", 66.43, 38.27),
}
LIBRARIES = ("torch", "transformers", "lm_eval", "numpy", "tokenizers")


def document(kind: str, about: Mapping[str, Any], settings: Mapping[str, Any], scores: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Everything needed to trust and repeat a result. kind: the command; about: of what was measured; seconds: of this run."""
    return {
        "evaluation": kind, **about, "scores": dict(scores), "settings": dict(settings), "seconds": round(seconds, 3),
        "machine": machine(), "versions": {"python": platform.python_version(), "zamba2": __version__, **versions(*LIBRARIES)},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def write_result(folder: Path, result: Mapping[str, Any]) -> Path:
    """FOLDER/EVALUATION.json, replaced as a whole. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{result['evaluation']}.json"
    write_text(target, json.dumps(result, indent=1) + "\n")
    return target


def slug(name: str) -> str:
    """A model's name as a file's or folder's."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def beside_the_card(rows: Sequence[tuple[str, str, float | None, float | None]]) -> str:
    """A Markdown table: the card's rows, marked as its own claims, and ours (name, size, MT-Bench of 100, IFEval of 100)."""

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    lines = ["| model | size | MT-Bench | IFEval | |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {size} | {cell(bench)} | {cell(ifeval)} | measured here |" for name, size, bench, ifeval in rows]
    lines += [f"| {name} | {size} | {bench:.2f} | {ifeval:.2f} | the card's claim |" for name, (size, bench, ifeval) in CARD.items()]
    return "\n".join(lines) + "\n"
