"""``zamba2 evaluate``: what a model can do, in numbers that can be repeated."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zamba2.commands.bars import bar
from zamba2.errors import Zamba2Error

__all__ = ["divergence", "perplexity"]


def perplexity(text: Path, model: str, where: Mapping[str, Any], *, context: int, out: Path | None, as_json: bool) -> None:
    """Print and write down how well a model predicts a text file. Raises Zamba2Error."""
    from zamba2.evaluate import perplexity as measure
    from zamba2.evaluate.answers import about_ours

    words, loaded = read_text(text), own_model(model, where)
    started = time.monotonic()
    with bar("reading") as progress:
        scores = measure.perplexity(loaded, words, context=context, progress=progress)
    rows = [
        ("tokens", f"{scores['tokens']:,} in {scores['windows']:,} windows"), ("perplexity", f"{scores['perplexity']:.4f}"),
        ("nats a token", f"{scores['nats']:.5f}"), ("nats a byte", f"{scores['nats_per_byte']:.5f}"),
        ("likeliest token right", f"{scores['top1']:.2%}"),
    ]  # fmt: skip
    settings = {"text": str(text), "context": context}
    finish("perplexity", about_ours(loaded, where), settings, scores, started, out, as_json, rows, "nats")


def divergence(
    text: Path, reference: str, model: str, reference_where: Mapping[str, Any], where: Mapping[str, Any], *, context: int, out: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Print and write down how far a model's predictions on a text file are from a reference's. Raises Zamba2Error."""
    from zamba2.evaluate import perplexity as measure
    from zamba2.evaluate.answers import about_ours

    words = read_text(text)
    near, loaded = own_model(reference, reference_where), own_model(model, where)
    started = time.monotonic()
    with bar("reading") as progress:
        scores = measure.divergence(near, loaded, words, context=context, progress=progress)
    rows = [
        ("tokens", f"{scores['tokens']:,} in {scores['windows']:,} windows"), ("mean divergence, nats", f"{scores['mean']:.6f}"),
        *((f"{float(q):.1%} of tokens below", f"{value:.6f}") for q, value in scores["quantiles"].items()),
        ("same likeliest token", f"{scores['top1_agreement']:.2%}"),
        ("nats a token: reference, model", f"{scores['reference_nats']:.5f}, {scores['nats']:.5f}"),
    ]  # fmt: skip
    about = about_ours(loaded, where) | {"reference": about_ours(near, reference_where)}
    finish("divergence", about, {"text": str(text), "context": context}, scores, started, out, as_json, rows, "divergence")


def own_model(model: str, where: Mapping[str, Any]) -> Any:
    """One of our models. Raises Zamba2Error, also for what has no probabilities to look at."""
    from zamba2.api import load

    if model.startswith(("hf:", "openai:")):
        raise Zamba2Error(f"{model} gives texts alone; a model of ours is needed, whose probabilities can be read.")
    return load(model, **where)


def read_text(path: Path) -> str:
    """A text file's words. Raises Zamba2Error."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise Zamba2Error(f"{path} is not UTF-8 text; a text file is needed.") from None
    except OSError as error:
        raise Zamba2Error(f"{path} cannot be read ({error.strerror}); a text file is needed.") from None


def finish(
    kind: str, about: Mapping[str, Any], settings: Mapping[str, Any], scores: Mapping[str, Any], started: float, out: Path | None,
    as_json: bool, rows: list[tuple[str, str]], unit: str,
) -> None:  # fmt: skip
    """Write the result's document if there is a folder for it, and print it or a table."""
    from zamba2.evaluate.results import document, write_result

    result = document(kind, about, settings, scores, time.monotonic() - started)
    place = None if out is None else write_result(out, result)
    if as_json:
        print(json.dumps(result))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from zamba2.evaluate.perplexity import shown_positions

    console = Console(highlight=False, markup=False, emoji=False)
    table = Table(box=box.SIMPLE, show_header=False, title=f"{kind} of {about['model']} ({about['format']})", title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    table = Table(box=box.SIMPLE)
    for name in ("tokens before", "tokens", unit):
        table.add_column(name, justify="right")
    for cells in shown_positions(scores["by_position"]):
        table.add_row(*cells)
    console.print(table)
    if place is not None:
        console.print(f"written to {place}")
