"""``zamba2 figures``: the card's efficiency figures, made again on this machine."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zamba2.bench.figures import ENGINES, OURS, Settings, read_results, run, verdicts
from zamba2.bench.peers import llama_cpp_python
from zamba2.bench.rivals import RIVALS
from zamba2.commands import interrupts_raise
from zamba2.commands.bars import bar
from zamba2.commands.bench import ROOM, synthetic
from zamba2.errors import Zamba2Error, notice
from zamba2.runtime.processors import default_threads, free_memory
from zamba2.weights.formats import format_named
from zamba2.weights.packed import Packing

__all__ = ["main", "seconds"]


def main(
    out: Path, models: Sequence[str], formats: Sequence[str], engines: Sequence[str], lengths: Sequence[int], batches: Sequence[int],
    new_tokens: int, repeats: int, budget: str, memory: float | None, device: str, threads: int | None, small: bool, again: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure, draw, print a table of the claims and, on the last line, where everything is or one JSON document. Raises Zamba2Error."""
    from zamba2.bench.report import write_report

    if again is not None:
        results = read_results(again)
        out.mkdir(parents=True, exist_ok=True)
    else:
        settings = settings_of(models, formats, engines, lengths, batches, new_tokens, device, threads, small)
        time = seconds(budget)
        allowed = memory * 1e9 if memory is not None else free_memory() - ROOM
        if not allowed > 0:  # no number is not either
            raise Zamba2Error(f"--memory is {allowed / 1e9:.1f} GB; more than 0 is needed.")
        interrupts_raise()  # the process that measures is to be closed, and what there is drawn
        try:
            with bar("measuring") as progress:

                def say(line: str, done: int, total: int) -> None:
                    if progress is None:
                        print(f"{done} of {total}: {line}", file=sys.stderr, flush=True)
                    else:
                        progress(done, total)

                results = run(
                    settings, out, budget=time, memory=allowed, repeats=repeats, say=say,
                    synthetic=lambda config, format: synthetic("figures-small" if small else "2.7b", config, Packing.named(format)),
                )  # fmt: skip
        except KeyboardInterrupt:
            raise Zamba2Error(f"interrupted; what was measured is in {out / 'figures.json'}, the same command goes on.") from None
    drawn = find_spec("matplotlib") is not None
    if drawn:
        page = write_report(results, out)
    else:
        notice("the plots are left out, since matplotlib is not installed; install it, and the same command draws them.")
    if not as_json:
        print_verdicts(results)
        print(f"The report is {page}." if drawn else f"The figures are in {out / 'figures.json'}.")
    print(json.dumps(results))


def settings_of(
    models: Sequence[str], formats: Sequence[str], engines: Sequence[str], lengths: Sequence[int], batches: Sequence[int],
    new_tokens: int, device: str, threads: int | None, small: bool,
) -> Settings:  # fmt: skip
    """Raises Zamba2Error for what is no setting. llama.cpp is left out, said once, where it was not asked for and is not built."""
    known = (OURS, *RIVALS)
    for option, given, among in (("--models", models, known), ("--engines", engines, ENGINES)):
        for name in given:
            if name not in among:
                raise Zamba2Error(f"{option} is {name!r}; there are {', '.join(among)}.")
    for name in formats:
        format_named(name)
    threads = default_threads() if threads is None else threads
    if not engines:
        engines = [name for name in ENGINES if name != "llama.cpp" or llama_cpp_python() is not None]
        if "llama.cpp" not in engines and device == "cpu":
            notice("llama.cpp is not built and left out; build it from the repository with: python scripts/llama_cpp.py install")
    named: dict[str, Sequence[Any]] = {"models": models, "formats": formats, "engines": engines, "lengths": lengths, "batches": batches}
    own: dict[str, Any] = {name: tuple(dict.fromkeys(values)) for name, values in named.items() if values}
    return Settings(new_tokens=new_tokens, device=device, threads=threads, small=small, **own)


def seconds(text: str) -> float:
    """A time such as 90s, 30m, 2h or 1h30m, in seconds. Raises Zamba2Error."""
    found = re.fullmatch(r"(?=\d)(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip().lower())
    total = sum(int(number or 0) * size for number, size in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0
    if not total:
        raise Zamba2Error(f"--budget is {text!r}; a time is needed, such as 90s, 30m, 2h or 1h30m.")
    return float(total)


def print_verdicts(results: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("claim", "compared", "theirs / ours", "here", box=box.SIMPLE, title="What is said of Zamba2-2.7B", title_justify="left")
    for verdict in verdicts(results):
        ratios = "\n".join(f"{length}: x {ratio:.2f}" for length, ratio in verdict.ratios.items())
        table.add_row(verdict.claim.text, f"{verdict.ours}\n{verdict.theirs}", ratios, verdict.text)
    Console().print(table)
