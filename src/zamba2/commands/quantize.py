"""``zamba2 quantize``: pack a checkpoint for the native engine."""

from __future__ import annotations

import sys
from pathlib import Path

from zamba2.errors import Zamba2Error
from zamba2.weights import packed
from zamba2.weights.formats import format_named
from zamba2.weights.hub import resolve

__all__ = ["main"]


def main(source: str, target: Path, format: str, *, revision: str | None, offline: bool) -> None:
    """Pack ``source`` into ``target`` with a progress bar on a terminal. Raises Zamba2Error."""
    chosen = format_named(format)
    path = resolve(source, revision=revision, offline=offline)
    if path.is_file():
        raise Zamba2Error(f"{path} is a standalone file; a checkpoint folder in the Hub's layout is needed.")
    if packed.is_packed(path):
        raise Zamba2Error(f"{path} is packed already; give the original checkpoint.")
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn(f"packing {chosen.name}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("packing", total=None)
            packed.quantize(path, target, chosen, progress=lambda done, total: bar.update(task, completed=done, total=total))
    else:
        packed.quantize(path, target, chosen)
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{target}: {size / 1e9:.3f} GB, {chosen.bits} bits a weight")
