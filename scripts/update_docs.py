#!/usr/bin/env python3
"""Write what the documentation repeats: docs/commands.md from the command line itself, tables from measurements.

python scripts/update_docs.py            # write
python scripts/update_docs.py --check    # exit code 1 and the names of the files that are out of date
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import typer

sys.path.insert(0, str(Path(__file__).parent))

from gpu_report import lines_table, profile_tables

from zamba2.bench.figures import medians, read_results, verdicts
from zamba2.cli import app

ROOT = Path(__file__).resolve().parents[1]
MEASUREMENTS = ROOT / "docs" / "measurements"
MARK = "<!-- {}, by scripts/update_docs.py -->"
END = "<!-- end -->"
RIVALS = {
    "transformers": "transformers {version}, bf16", "transformers-fp32": "transformers {version}, fp32",
    "llama.cpp": "llama.cpp (llama-cpp-python {version}), Q4_0",
}  # fmt: skip
STAND_IN = (
    "llama.cpp cannot run Zamba2; it runs a dense model with as many weights per token. Mapped files count as memory on all sides: "
    "llama.cpp by default has its own mapped and a copy in another order."
)


def commands() -> str:
    """Markdown of every command, its arguments and options, in the order of ``zamba2 --help``."""
    group: Any = typer.main.get_command(app)
    parts = ["# Commands\n\nWritten by `scripts/update_docs.py` from the command line itself.\n"]
    for name, command in flat(group).items():
        parts.append(f"\n## zamba2 {name}\n\n{inspect.cleandoc(command.help).strip()}\n\n| | |\n|---|---|\n")
        for parameter in command.params:
            flags = parameter.metavar or parameter.name.upper()
            if parameter.param_type_name == "option":
                flags = " ".join([", ".join(parameter.opts), *filter(None, [parameter.metavar])])
            default = parameter.default
            shown = "" if default is None or callable(default) or default is False or parameter.required else f" Default: {default}."
            parts.append(f"| `{flags}` | {parameter.help}{shown} |\n")
    return "".join(parts)


def flat(group: Any) -> dict[str, Any]:
    """Full name -> command, those of groups too: "train preview"."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        inner = flat(command) if hasattr(command, "commands") else {}
        found |= {f"{name} {part}": c for part, c in inner.items()} or {name: command}
    return found


def native_table(data: dict[str, Any]) -> str:
    """Comparison of the native engine with others, from one run of ``zamba2 bench``."""
    sides = {f"zamba2, {data['format']}": data}
    sides |= {RIVALS[name].format(**rival): rival for name, rival in data["rivals"].items()}
    rows = {
        f"prefill of {data['prompt_tokens']} tokens, tokens/s": [f"{side['prefill_tokens_per_second']:.0f}" for side in sides.values()],
        "decode, tokens/s": [f"{side['decode_tokens_per_second']:.2f}" for side in sides.values()],
        "peak memory, GB": [f"{side['peak_rss_bytes'] / 1e9:.2f}" for side in sides.values()],
    }
    lines = [f"| {data['shape'].upper()} shape, {data['threads']} CPU cores | {' | '.join(sides)} |", "|---" * (1 + len(sides)) + "|"]
    lines += [f"| {name} | {' | '.join(values)} |" for name, values in rows.items()]
    share, best = data["decode_bandwidth_fraction"], data["read_bandwidth_bytes_per_second"]
    lines.append(
        f"\nDecode moves {data['bytes_per_token'] / 1e9:.2f} GB per token, at {share:.0%} of the fastest read of the weight file "
        f"in the same process ({best / 1e9:.0f} GB/s); prefill runs at "
        f"{data['prefill_matrix_fraction']:.0%} of the machine's {data['matrix_kind']}."
    )
    compared = "".join(f" --compare {name}" for name in data["rivals"])
    rounds = "one round" if data["repeats"] == 1 else f"medians of {data['repeats']}"
    lines.append(f"{data['machine']}, {data['isa']}; random weights; made by `zamba2 bench{compared}` in one run, {rounds}.")
    return "\n".join(lines)


def sizes_table(runs: list[dict[str, Any]]) -> str:
    """The three published sizes in the native engine, each from a run of ``zamba2 bench`` on one machine."""
    first = runs[0]
    lines = ["| | GB moved a token | a reply, tokens/s | a prompt, tokens/s | first token, s | peak memory, GB |", "|---" * 6 + "|"]
    for data in runs:
        cells = (
            f"{data['bytes_per_token'] / 1e9:.2f}", f"{data['decode_tokens_per_second']:.1f}", f"{data['prefill_tokens_per_second']:.0f}",
            f"{data['ttft_seconds']:.1f}", f"{data['peak_rss_bytes'] / 1e9:.2f}",
        )  # fmt: skip
        lines.append(f"| {data['shape'].upper()}, {data['format']} | {' | '.join(cells)} |")
    lines.append(
        f"\n{first['machine']}, {first['isa']}, {first['threads']} threads; prompts of {first['prompt_tokens']} tokens; random weights; "
        f"by `zamba2 bench --shape`, medians of {first['repeats']}."
    )
    return "\n".join(lines)


def torch_table(data: dict[str, Any]) -> str:
    """Comparison of the PyTorch backend with transformers at the true shape."""
    speed, parity = data["speed"], data["parity"]
    ours, theirs = speed["zamba2"], speed["transformers"]
    rows = [
        ("prefill of 512 tokens, tokens/s", *(f"{side['prefill_tokens_per_second']:.0f}" for side in (ours, theirs))),
        ("decode, tokens/s", *(f"{side['decode_tokens_per_second']:.2f}" for side in (ours, theirs))),
        ("peak memory, GB", *(f"{side['peak_rss_bytes'] / 1e9:.2f}" for side in (ours, theirs))),
        (
            "bf16 error of the logits against fp32",
            *(f"{parity[side]['error_norm']:.1%}" for side in ("zamba2_bf16", "transformers_bf16")),
        ),
    ]
    lines = ["| 2.7B shape, bf16, two CPU cores, PyTorch | zamba2 | transformers 5.23 |", "|---|---|---|"]
    lines += [f"| {name} | {a} | {b} |" for name, a, b in rows]
    lines.append(f"\n{data['machine']}; random weights; made by `python scripts/true_shape.py` in one run.")
    return "\n".join(lines)


def training_table(data: dict[str, Any]) -> str:
    """Comparison of a training step with transformers."""
    sides = [data[name] for name in ("zamba2", "transformers")]
    head = f"one training step, {data['parameters'] / 1e6:.0f} M parameters, {data['tokens']:,} tokens, two CPU cores"
    lines = [f"| {head} | zamba2 | transformers {data['versions']['transformers']} |", "|---|---|---|"]
    lines.append("| tokens/s | " + " | ".join(f"{side['tokens_per_second']:.0f}" for side in sides) + " |")
    lines.append("| peak memory, GB | " + " | ".join(f"{side['peak_rss_bytes'] / 1e9:.1f}" for side in sides) + " |")
    rounds = len(sides[0]["runs"])
    lines.append(f"\n{data['machine']}; fp32 weights, bf16 autocast, AdamW; made by `python scripts/train_speed.py`, medians of {rounds}.")
    return "\n".join(lines)


def quality_table(data: dict[str, Any]) -> str:
    """What rounding costs."""
    models = data["models"]
    lines = ["| KL divergence from bf16 weights, nats (same likeliest token) |" + "".join(f" {name} weights |" for name in models)]
    lines.append("|---|" + "---|" * len(models))

    def cell(figures: dict[str, float]) -> str:
        return f" {figures['kl_mean']:.2g} ({figures['top1_agreement']:.1%}) |"

    for name in ("q8", "Q8_0", "q4 calibrated", "q4", "Q4_0", "q4, embeddings q4", "Q4_0, embeddings Q4_0"):
        shown = f"llama.cpp's {name.replace('Q4_0,', 'Q4_0 rounding,')}" if name[0] == "Q" else name
        lines.append(f"| {shown} |" + "".join(cell(model["formats"][name]["weights"]) for model in models.values()))
    for name in ("int8 activations alone", "bf16 matrix units alone"):
        lines.append(f"| {name} |" + "".join(cell(model[name]) for model in models.values()))
    engine = (cell(model["formats"]["q4 calibrated"]["engine"]) for model in models.values())
    lines.append("| q4 calibrated, the engine itself |" + "".join(engine))
    lines.append("\nWhere no embeddings are named they have 8 bits, on both sides. By `python scripts/quality.py measure`.")
    return "\n".join(lines)


def figures_table(data: dict[str, Any]) -> str:
    """The efficiency figures: every model at one length of prompt, and what became of the card's claims."""
    settings = data["settings"]
    length = sorted(settings["lengths"])[len(settings["lengths"]) // 2]
    head = f"| {length} tokens of prompt, {settings['threads']} CPU cores | first token, s | then tokens/s | peak memory, GB |"
    lines = [head, "|---|---|---|---|"]
    for series in data["series"]:
        entry = next(e for e in data["points"] if (e["series"], e["prompt_tokens"], e["batch"]) == (series["name"], length, 1))
        found = medians(entry, settings["new_tokens"])
        cells = ("–", "–", entry["status"]) if found is None else (
            f"{found['ttft_seconds']:.2f}", f"{found['tokens_per_second']:.2f}", f"{found['memory_bytes'] / 1e9:.2f}",
        )  # fmt: skip
        lines.append(f"| {series['name']} | {' | '.join(cells)} |")
    lines.append(f"\n{data['machine']}; random weights of the true shapes; made by `zamba2 figures` ([report](figures/report.html)).")
    lines.append("What is said of Zamba2-2.7B, theirs over ours by length of prompt:\n")
    for verdict in verdicts(data):
        ratios = ", ".join(f"{length}: {ratio:.2f}" for length, ratio in verdict.ratios.items())
        lines.append(f"- {verdict.claim.text} ({verdict.bits} bits): {verdict.text} ({ratios or 'nothing'}).")
    return "\n".join(lines)


def serving_table(measured: dict[str, Any]) -> str:
    """What serving and guessing are worth, from runs of ``scripts/serve_load.py`` and ``scripts/speculation.py``."""
    turns, crowd, load, guessed = (measured[name] for name in ("serve_second_turn", "serve_throughput", "serve_load", "speculation"))
    first, tokens = turns["time_to_first_token_seconds"], turns["prompt_tokens"]
    edited = guessed["cost"]["edited"]
    pairs = list(zip(*edited["tokens_per_second"], strict=True))
    rows = {
        f"first token of a second turn: {tokens['question_alone']:.0f} new tokens behind {tokens['first_turn']:.0f} known ones, s":
            f"{first['second_turn']:.2f}",
        "the same tokens alone, s": f"{first['question_alone']:.2f}",
        f"all {tokens['from_nothing']:.0f} read again, s": f"{first['from_nothing']:.1f}",
        f"after a restart, the state ({turns['state_bytes'] / 1e6:.0f} MB) from disk, s": f"{first['second_turn_from_disk']:.2f}",
        f"{crowd['settings']['clients']} clients together, tokens/s (one alone)":
            f"{crowd['all']['decode_tokens_per_second']:.0f} ({crowd['one']['decode_tokens_per_second']:.0f})",
        f"replies that copy, {guessed['cost']['tokens_per_call']:.1f} tokens a call, tokens/s with guesses (without)":
            f"{statistics.median(pairs[1]):.0f} ({statistics.median(pairs[0]):.0f})",
        "text that cannot be guessed, rate with guesses over the one without": f"{guessed['cost']['unpredictable']['ratio']:.2f}",
    }  # fmt: skip
    lines = [f"| serving the 2.7B shape in q4, {crowd['threads']} CPU cores | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    machines = " and ".join(dict.fromkeys(data["machine"] for data in (turns, crowd, load, guessed)))
    lines.append(
        f"\n{machines}; random weights; by `python scripts/serve_load.py` and `python scripts/speculation.py`. "
        f"{load['settings']['clients']} clients of the demonstration model for {load['settings']['minutes']:.0f} minutes: "
        f"{load['replies']} replies, {sum(load['errors'].values())} errors, {load['stalls']} stalled streams; first token in "
        f"{load['time_to_first_token']['p50_ms']:.0f} ms (99 %: {load['time_to_first_token']['p99_ms']:.0f}), then one each "
        f"{load['between_tokens']['p50_ms']:.0f} ms ({load['between_tokens']['p99_ms']:.0f})."
    )
    return "\n".join(lines)


def summary_table(measured: dict[str, Any]) -> str:
    """README's comparison, a line a figure: each machine's from one run on it."""
    rivals = (("transformers", "transformers-fp32"), ("llama.cpp",))  # processors without bf16 products run fp32 faster
    rows: list[tuple[str, ...]] = []
    runs = {"AVX2": measured["bench_avx2"], "AVX-512": measured["bench_avx512bf16"]}
    for units, data in runs.items():
        machine = f"{data['threads']} CPU cores with {units}, {data['format']}"
        for what, key, scale, digits in (
            ("a reply, tokens/s", "decode_tokens_per_second", 1, 1),
            (f"a prompt of {data['prompt_tokens']}, tokens/s", "prefill_tokens_per_second", 1, 0),
            ("peak memory, GB", "peak_rss_bytes", 1e9, 2),
        ):
            found = (next((data["rivals"][name] for name in names if name in data["rivals"]), None) for names in rivals)
            sides = [data, *found]
            rows.append((f"{machine}: {what}", *("–" if side is None else f"{side[key] / scale:.{digits}f}" for side in sides)))
    gpu, kernels = measured["gpu"], "transformers with mamba-ssm's Triton kernels "
    for line in gpu["table"]:
        if line["beside"].startswith(kernels):
            rows.append((f"{gpu['machine']['name']}: {line['what']}", line["measured"], line["beside"].removeprefix(kernels), "–"))
    versions = {name: data["rivals"][name]["version"] for data in runs.values() for name in data["rivals"]}
    lines = ["| 2.7B shape | zamba2 | transformers | llama.cpp |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    lines.append(
        f"\nRandom weights; one run a machine. transformers is {versions['transformers']} in bf16, "
        "with AVX2 in fp32 (bf16 is slower there), on the GPU "
        f"{gpu['machine']['versions']['transformers']} with mamba-ssm's Triton kernels; llama.cpp, from llama-cpp-python "
        f"{versions['llama.cpp']}, cannot run Zamba2: it runs a dense model with as many weights per token, in Q4_0."
    )
    return "\n".join(lines)


def generated() -> dict[Path, str]:
    """File -> what it should hold."""
    measured = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in MEASUREMENTS.glob("*.json")}
    runs = [native_table(data) for name, data in sorted(measured.items()) if name.startswith("bench_")]
    parts = {
        "README.md": {"summary": summary_table(measured)},
        "docs/performance.md": {
            "native": "\n\n".join([*runs, STAND_IN]),
            "sizes": sizes_table([measured[f"size_{size}"] for size in ("1.2b", "2.7b", "7b")]),
            "figures": figures_table(read_results(ROOT / "docs" / "figures" / "figures.json")),
            "serving": serving_table(measured),
            "quality": quality_table(measured["quality"]),
            "torch": torch_table(measured["true_shape"]),
            "training": training_table(measured["train_speed"]),
        },
        "docs/gpu.md": {"gpu": lines_table(measured["gpu"]), "profiles": profile_tables(measured["gpu"])},
    }
    documents = {ROOT / "docs" / "commands.md": commands()}
    for name, texts in parts.items():
        document = (ROOT / name).read_text(encoding="utf-8")
        for mark, text in texts.items():
            document = between(document, MARK.format(mark), text)
        documents[ROOT / name] = document
    return documents


def between(document: str, begin: str, text: str) -> str:
    """The document with what stands behind ``begin`` replaced."""
    before, rest = document.split(begin, 1)
    return f"{before}{begin}\n{text}\n{END}{rest.split(END, 1)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if something is out of date")
    check = parser.parse_args().check
    stale = [path for path, text in generated().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if check and stale:
        sys.exit(f"out of date: {', '.join(str(path.relative_to(ROOT)) for path in stale)}; run python scripts/update_docs.py")
    for path, text in generated().items() if not check else ():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
