"""What a training run shows: a live line, a file of metrics, and a plot at the end."""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zamba2.errors import notice
from zamba2.runtime.memory import memory
from zamba2.weights.files import write_text

if TYPE_CHECKING:
    from zamba2.train.adapters import Coverage

__all__ = ["Progress", "read_metrics"]

SHOWN = ("loss", "eval_loss", "rewards/accuracies", "learning_rate", "tokens_per_second")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; without one that a killed process left half written."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def peak_memory() -> dict[str, int]:
    """Peak resident bytes of this process, and of its GPU where there is one."""
    import torch

    peaks = {"peak_rss_bytes": memory()["peak_rss_bytes"]}
    if torch.cuda.is_available():
        peaks["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    return peaks


class Progress:
    """Writes to standard error: a bar where it is a terminal, else a line now and then; nothing where it is to be quiet."""

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False, quiet=quiet)
        self._bar: Any = None
        self._task: Any = None
        self._started = self._logged = time.monotonic()
        self._tokens = 0.0
        self._text = ""

    @contextmanager
    def preparing(self) -> Iterator[None]:
        from rich.progress import Progress as Bar
        from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Bar(*columns, console=self.console, disable=not self.console.is_terminal, transient=True) as self._bar:
            self._task = self._bar.add_task("reading, tokenizing and packing the data", total=None)
            yield

    def prepared(self, examples: int) -> None:
        self._bar.update(self._task, description=f"reading, tokenizing and packing the data: {examples:,} examples")

    def say(self, line: str) -> None:
        """A line that this process says once, however many runs it makes."""
        if not self.console.quiet:
            notice(line)

    def coverage(self, rows: Sequence[Coverage]) -> None:
        """The table of what is trained."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE, title="what is trained")
        table.add_column("layer type")
        for name in ("modules", "parameters", "trained"):
            table.add_column(name, justify="right")
        table.add_column("acts at", overflow="fold")
        for row in rows:
            table.add_row(row.name, f"{row.modules}", f"{row.parameters:,}", f"{row.trained:,}" if row.trained else "-", row.where)
        self.console.print(table)

    def training(self, step: int, steps: int, tokens: int = 0) -> None:
        """Begin at a step, with so many tokens trained on before it: 0, unless a run is resumed."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
            TextColumn("of"), TimeRemainingColumn(),
        )  # fmt: skip
        self._bar = Bar(*columns, console=self.console, disable=not self.console.is_terminal)
        self._task = self._bar.add_task("", total=steps, completed=step)
        self._bar.start()
        self._started = self._logged = time.monotonic()
        self._tokens = float(tokens)

    def resume(self, folder: Path, step: int) -> None:
        """Take from metrics.jsonl what an earlier try logged behind a step or at its end, which is done again; seconds go on from what is
        left."""
        file = folder / "metrics.jsonl"
        if not file.exists():
            return
        trained = itertools.takewhile(lambda line: "train_runtime" not in line, read_metrics(file))  # the trainer's summary
        kept = [line for line in trained if line["step"] <= step]
        write_text(file, "".join(json.dumps(line) + "\n" for line in kept))
        self._started -= kept[-1]["seconds"] if kept else 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        """Give the terminal back, whatever happened."""
        self._bar.stop()

    def step(self, step: int) -> None:
        self._bar.update(self._task, completed=step, description=self._text)

    def log(self, folder: Path, step: int, numbers: Mapping[str, float]) -> None:
        """One line of metrics.jsonl: what the trainer logged, tokens per second since the last one, and memory."""
        now, tokens = time.monotonic(), numbers.get("num_tokens", self._tokens)
        line: dict[str, Any] = {"step": step, "seconds": round(now - self._started, 3), **numbers}
        if tokens > self._tokens and "loss" in numbers:
            line["tokens_per_second"] = (tokens - self._tokens) / (now - self._logged)
            self._tokens, self._logged = tokens, now
        line |= peak_memory()
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({k: v if math.isfinite(v) else str(v) for k, v in line.items()}) + "\n")
        shown = [f"{name} {line[name]:.4g}" for name in SHOWN if name in line]
        if not shown:  # the trainer's own summary
            return
        self._text = ", ".join(shown) + f", {line['peak_rss_bytes'] / 1e9:.2f} GB"
        if not self.console.is_terminal:
            print(f"step {step}: {self._text}", file=sys.stderr, flush=True)

    def plot(self, folder: Path) -> None:
        """loss.png and loss.svg from metrics.jsonl. Leaves them out where matplotlib is not installed."""
        from importlib.util import find_spec

        if find_spec("matplotlib") is None:
            return
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        lines = read_metrics(folder / "metrics.jsonl")
        figure, left = pyplot.subplots(figsize=(8, 4.5))
        for name, style in (("loss", "-"), ("eval_loss", "o-")):
            points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), (int, float))]
            if points:
                left.plot(*zip(*points, strict=True), style, label=name.replace("eval_", "held-out "), linewidth=1)
        left.set_xlabel("step")
        left.set_ylabel("loss (nats)")
        left.legend()
        left.grid(alpha=0.3)
        for suffix in ("png", "svg"):
            figure.savefig(folder / f"loss.{suffix}", dpi=150, bbox_inches="tight")
        pyplot.close(figure)
