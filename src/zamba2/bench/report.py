"""What ``zamba2 figures`` shows: plots as PNG and SVG, and one HTML page that holds everything."""

from __future__ import annotations

import html
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zamba2.bench.figures import OURS, Verdict, medians, verdicts
from zamba2.bench.rivals import RIVALS
from zamba2.weights.files import replacing, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_report"]

INK, PAPER, QUIET = "#1f2328", "#ffffff", "#6b7280"
OUR_COLOURS = {"bf16": "#c2410c", "q4": "#c2410c", "q8": "#f59e0b"}
COLOURS = dict(zip(RIVALS, ("#2563eb", "#7c3aed", "#0d9488", "#65a30d", "#0891b2", "#6b7280"), strict=True))
MARKERS = dict(zip(RIVALS, "s^vDPX", strict=True))
SIZE, DOTS = (4.4, 4.3), 220  # inches and dots of each; legible as wide as a telephone


@dataclass(frozen=True)
class Plot:
    """x: "prompt_tokens" of one sequence, or "batch". scale: of what ``medians`` gives, to what is shown. log: both axes."""

    name: str
    title: str
    x: str
    measure: str
    unit: str
    scale: float = 1.0
    log: bool = True


PLOTS = (
    Plot("first-token", "Time to first token", "prompt_tokens", "ttft_seconds", "seconds"),
    Plot("next-token", "Each token after the first", "prompt_tokens", "token_seconds", "milliseconds", 1e3),
    Plot("memory", "Peak memory", "prompt_tokens", "memory_bytes", "GB", 1e-9, log=False),
    Plot("throughput", "Throughput, all sequences together", "batch", "tokens_per_second", "tokens/s"),
)
X_LABELS = {"prompt_tokens": "tokens of prompt, one sequence", "batch": "sequences at once"}


def write_report(results: Mapping[str, Any], folder: Path) -> Path:
    """The plots, by matplotlib, and report.html in ``folder``; returns the page. Raises Zamba2Error."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    pictures: dict[str, str] = {}
    for bits in (16, 4):
        for plot in PLOTS:
            name = f"{plot.name}-{bits}-bit"
            with matplotlib.rc_context({"svg.hashsalt": name, "font.size": 9, "axes.edgecolor": QUIET, "text.color": INK}):
                if (figure := draw(results, plot, bits)) is None:
                    continue
                FigureCanvasAgg(figure)
                with replacing(folder / f"{name}.png") as place:
                    figure.savefig(place, format="png", dpi=DOTS)
                svg = io.StringIO()
                figure.savefig(svg, format="svg", metadata={"Date": None})
                pictures[name] = svg.getvalue()
                write_text(folder / f"{name}.svg", svg.getvalue())
    page = folder / "report.html"
    write_text(page, page_of(results, pictures))
    return page


def lines(results: Mapping[str, Any], plot: Plot, bits: int) -> Iterator[tuple[Mapping[str, Any], list[tuple[int, float]]]]:
    """Each series of so many bits and its (x, y), those without any left out."""
    settings = results["settings"]
    fixed = ("batch", 1) if plot.x == "prompt_tokens" else ("prompt_tokens", settings["batch_length"])
    shown = set(settings["lengths"] if plot.x == "prompt_tokens" else settings["batches"])
    for series in results["series"]:
        if series["bits"] != bits:
            continue
        points = []
        for entry in results["points"]:
            if entry["series"] == series["name"] and entry[fixed[0]] == fixed[1] and entry[plot.x] in shown:
                found = medians(entry, settings["new_tokens"])
                if found is not None:
                    points.append((int(entry[plot.x]), plot.scale * found[plot.measure]))
        if points:
            yield series, sorted(points)


def draw(results: Mapping[str, Any], plot: Plot, bits: int) -> Figure | None:
    """One plot, None where nothing was measured for it, or a single number of sequences."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    found = list(lines(results, plot, bits))
    if not found or (plot.x == "batch" and max(len(points) for _, points in found) < 2):
        return None
    figure = Figure(figsize=SIZE, layout="constrained", facecolor=PAPER)
    axes = figure.add_subplot()
    for series, points in sorted(found, key=lambda item: item[0]["engine"] == "zamba2"):  # ours on top
        axes.plot(*zip(*points, strict=True), label=label(series), **style(series))
    ticks = sorted({x for _, points in found for x, _ in points})
    if plot.log:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else ""))
        axes.tick_params(axis="y", which="minor", labelsize=7)
    else:
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(X_LABELS[plot.x])
    axes.set_ylabel(plot.unit)
    others = sorted({series["engine"] for series, _ in found if series["model"] != OURS})
    kind = "bf16" if bits == 16 else "4 bits, and ours at 8"
    axes.set_title(f"{plot.title}\n{kind}{'; the others in ' * bool(others)}{' and '.join(others)}", loc="left", fontsize=10)
    axes.grid(True, which="major", color="#e5e7eb", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def label(series: Mapping[str, Any]) -> str:
    name = f"{series['model']} {series['precision']}"
    return f"{name}, {series['engine']}" if series["model"] == OURS and series["engine"] != "zamba2" else name


def style(series: Mapping[str, Any]) -> dict[str, Any]:
    if series["engine"] == "zamba2":
        return {"color": OUR_COLOURS[series["precision"]], "linewidth": 2.6, "marker": "o", "markersize": 6}
    if series["model"] == OURS:
        return {"color": OUR_COLOURS["bf16"], "linewidth": 1.4, "marker": "o", "markersize": 4, "linestyle": "--"}
    return {"color": COLOURS[series["model"]], "linewidth": 1.2, "marker": MARKERS[series["model"]], "markersize": 4.5}


# ---- the page --------------------------------------------------------------------------------------------------------

CSS = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff; margin: 0 auto; max-width: 1100px; padding: 16px; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { max-width: 70ch; } .quiet { color: #59636e; font-size: .9rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 16px; }
figure { margin: 0; } figure svg { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; margin: .5rem 0; }
th, td { padding: 4px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid #d1d9e0; }
th:first-child, td:first-child { text-align: left; } td.text { text-align: left; white-space: normal; min-width: 12em; }
@media (max-width: 640px) {
  table.claims, .claims tbody, .claims tr, .claims td { display: block; text-align: left; border: 0; padding: 1px 0; min-width: 0; }
  .claims tr { border-bottom: 1px solid #d1d9e0; padding: 8px 0; } .claims tr:first-child { display: none; }
}
.claims th { text-align: left; }
tr.own td { font-weight: 600; background: #fff7ed; } .yes { color: #116329; font-weight: 600; } .no { color: #a40e26; font-weight: 600; }
"""


def page_of(results: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """report.html: it loads nothing."""
    settings, esc = results["settings"], html.escape
    where = results.get("gpu") or f"{results['machine']}, {settings['threads']} threads"
    rounds = max((len(entry["runs"]) for entry in results["points"]), default=0)
    made = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    held = "what PyTorch held on the GPU" if results.get("gpu") else "resident, mapped weights included"
    warm = "by doing all of it once" if results.get("gpu") else "with 16 tokens"
    small = "<p><b>Shapes shrunk to next to nothing: only a trial of the command.</b></p>" if settings["small"] else ""
    plots = "".join(f'<figure role="img" aria-label="{esc(name)}">{svg[svg.index("<svg") :]}</figure>' for name, svg in pictures.items())
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Zamba2-2.7B beside models of its size</title><style>{CSS}</style></head><body>
<h1>Zamba2-2.7B beside models of its size</h1>
<p class="quiet">{esc(where)} · {esc(made)} · {results["seconds"] / 60:.0f} minutes of measuring</p>{small}
<h2>What is said of it, and what was found here</h2>
{claims_table(list(verdicts(results)))}
<p class="quiet">Ratios are theirs over ours. A reply is the time to the first token and of {settings["new_tokens"]} more. A reply's length
and the machine are not stated where the claims were made.</p>
<h2>Figures</h2>
<div class="plots">{plots}</div>
{"".join(tables(results))}
{missing_table(results)}
<h2>How it was measured</h2>
<p>Every measurement is a process of its own: it loads the model, warms up {warm}, reads random prompts and decodes
{settings["new_tokens"]} tokens greedily behind the first. Rounds go over all points and, at each, over all models in turn; shown are
the medians of up to {rounds} rounds, and the peak of memory ({held}).
Shapes are those published, weights are random: they take as long as real ones, and say nothing of quality.
q4 and q8 are this package's formats, q4_0 is llama.cpp's.</p>
</body></html>
"""


def claims_table(found: Sequence[Verdict]) -> str:
    rows = []
    for verdict in found:
        kind = {"holds here": "yes", "does not hold here": "no"}.get(verdict.text, "")
        ratios = "<br>".join(f"{length}: {ratio:.2f} x" for length, ratio in verdict.ratios.items())
        rows.append(
            f'<tr><td class="text">{html.escape(verdict.claim.text)} <span class="quiet">({html.escape(verdict.claim.source)})</span></td>'
            f'<td class="text">{html.escape(verdict.ours)} beside {html.escape(verdict.theirs)}</td><td>{ratios}</td>'
            f'<td class="text {kind}">{html.escape(verdict.text)}</td></tr>'
        )
    head = "<tr><th>Claim</th><th>Compared</th><th>Ratio by tokens of prompt</th><th>Here</th></tr>"
    return f'<div class="wide"><table class="claims">{head}{"".join(rows)}</table></div>'


def tables(results: Mapping[str, Any]) -> Iterator[str]:
    """A table of every plot: series by what stands on the x axis."""
    for plot in PLOTS:
        found = [*lines(results, plot, 16), *lines(results, plot, 4)]
        ticks = sorted({x for _, points in found for x, _ in points})
        if not found or (plot.x == "batch" and len(ticks) < 2):
            continue
        rows = []
        for series, points in found:
            at = dict(points)
            cells = "".join(f"<td>{at[x]:.3g}</td>" if x in at else "<td>–</td>" for x in ticks)
            own = ' class="own"' if series["engine"] == "zamba2" else ""
            rows.append(f"<tr{own}><td>{html.escape(series['name'])}</td>{cells}</tr>")
        head = "".join(f"<th>{x}</th>" for x in ticks)
        yield (
            f"<h2>{plot.title}, {plot.unit}</h2><div class='wide'><table><tr><th>{X_LABELS[plot.x]}</th>{head}</tr>"
            f"{''.join(rows)}</table></div>"
        )


def missing_table(results: Mapping[str, Any]) -> str:
    """What was not measured and why; points of one series and reason in one row."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for entry in results["points"]:
        if entry["status"] != "measured":
            said = f"{entry['status']}: {entry['reason']}"
            grouped.setdefault((entry["series"], said), []).append(f"{entry['batch']} x {entry['prompt_tokens']}")
    if not grouped:
        return ""
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="text">{", ".join(points)}</td><td class="text">{html.escape(said)}</td></tr>'
        for (name, said), points in grouped.items()
    )
    head = "<tr><th>Series</th><th>Sequences x tokens</th><th>Why</th></tr>"
    return f'<h2>Not measured</h2><div class="wide"><table>{head}{rows}</table></div>'
