"""``zamba2 bench``: how fast the model runs here, as a share of what the machine can do, and beside others."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zamba2.api import checkpoint_in, packed_copy, read_config, refuse_standalone, torch_backend
from zamba2.bench.measure import kv_bytes_per_token
from zamba2.bench.peers import PEERS, Worker, need_disk, peer_bytes
from zamba2.commands import interrupts_raise
from zamba2.config import PRESETS, Config
from zamba2.errors import Zamba2Error, notice
from zamba2.language.tokenizer import Tokenizer
from zamba2.runtime.processors import default_threads, free_memory, machine
from zamba2.weights.files import write_text
from zamba2.weights.formats import format_named, kv_format_named
from zamba2.weights.hub import RANDOM, cache_folder, resolve
from zamba2.weights.packed import VERSION, Packing, is_packed, open_packed
from zamba2.weights.synthetic import packed_bytes, write_synthetic

__all__ = ["main"]

RATES = ("decode_tokens_per_second", "prefill_tokens_per_second")
MEDIANS = (*RATES, "ttft_seconds")
STARTUP_TOKENS = 20
ROOM = 1 << 30  # bytes beside the weights: buffers, state, the interpreter


def main(
    shape: str | None, model: str | None, format: str | None, kv_format: str | None, prompt_tokens: int, new_tokens: int, batch: int,
    repeats: int, threads: int | None, compare: Sequence[str], startup: bool, as_json: bool, out: Path | None, device: str = "cpu",
) -> None:  # fmt: skip
    """Measure, then print a table and, on the last line, one JSON document. Raises Zamba2Error."""
    for name in compare:
        if name not in PEERS:
            raise Zamba2Error(f"--compare is {name!r}; there are {', '.join(PEERS)}.")
    if compare and batch > 1:
        raise Zamba2Error("--compare measures one sequence; leave out --batch.")
    if shape is not None and model is not None:
        raise Zamba2Error("--shape and --model were both given; give one of them.")
    kv = kv_format_named(kv_format or "bf16")
    if device != "cpu":
        check_device(device, kv_format, startup, compare)
        format = format or "bf16"
    threads = default_threads() if threads is None else threads
    if model is None:
        shape = shape or "2.7b"
        config, original = config_of(shape), None
        path = synthetic(shape, config, Packing.named(format or "q4"))
    else:
        found = checkpoint_in(resolve(model))
        config, original = read_config(found), None if is_packed(found) else found
        as_it_is = is_packed(found) or (device != "cpu" and format == "bf16")
        if not as_it_is:
            refuse_standalone(found)
        path = found if as_it_is else packed_copy(found, format_named(format or "q4"))
        if format is not None and is_packed(path):
            check_format(path, format)
    if prompt_tokens + new_tokens > config.max_position_embeddings and config.use_mem_rope:
        notice(f"more than the {config.max_position_embeddings} tokens that the model was trained for.")
    if device == "cpu":
        caches = batch * (prompt_tokens + new_tokens) * kv_bytes_per_token(config, kv)
        rivals = sum(peer_bytes(name, config) + ROOM for name in compare)  # all are loaded before any is measured
        need_memory((path / "model.safetensors").stat().st_size + caches + ROOM + rivals)
    interrupts_raise()  # the processes that measure are to be closed
    commands = {name: PEERS[name](config, original) for name in compare}
    request = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "threads": threads, "device": device}
    own = {"path": str(path), "batch": batch} | ({"kv_format": kv.name} if device == "cpu" else {})
    result = measure(commands, request, own, repeats)
    result |= {
        "device": device, "shape": shape, "model": model, "weights": "synthetic" if model is None else "checkpoint",
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens, "batch": batch, "repeats": repeats, "machine": machine(),
    }  # fmt: skip
    if startup:
        result["startup"] = start_to_first_token(path, threads, repeats)
    if not as_json:
        print_tables(result)
    print(json.dumps(result), flush=True)
    if out is not None:  # last: where it cannot be written, minutes of measuring are not lost
        write_text(out, json.dumps(result, indent=1) + "\n")


def config_of(shape: str) -> Config:
    """A published shape, "random" (the tiny embedded one), or that of a folder with a config.json. Raises Zamba2Error."""
    if shape.lower() in PRESETS:
        return PRESETS[shape.lower()]
    folder = RANDOM if shape == "random" else Path(shape)
    if not (folder / "config.json").exists():
        raise Zamba2Error(f"there is no shape {shape!r}; there are {', '.join(PRESETS)}, random, or a folder with a config.json.")
    return Config.from_file(folder / "config.json")


def synthetic(shape: str, config: Config, packing: Packing) -> Path:
    """The packed checkpoint with random weights of a shape, in the user's cache, made on first use."""
    mark = hashlib.sha256(json.dumps([VERSION, config.to_dict()]).encode()).hexdigest()[:12]
    target = cache_folder() / "synthetic" / f"{Path(shape).name.lower()}-{packing.format.name}-{mark}"
    if is_packed(target):
        return target
    total = packed_bytes(config, packing)
    need_disk(target, total + (1 << 20))
    notice(f"writing {total / 1e9:.3g} GB of random weights into {target}, once.")
    write_synthetic(config, packing, target)
    return target


def check_device(device: str, kv_format: str | None, startup: bool, compare: Sequence[str]) -> None:
    """Raises Zamba2Error where a device cannot be used, or an option has no meaning on it."""
    if torch_backend().device_for(device, None, packed=False).type != "cuda":
        raise Zamba2Error(f"--device is {device!r}; cpu, or cuda for a GPU, is needed.")
    for option, given in (("--kv-format", kv_format), ("--startup", startup), ("--compare llama.cpp", "llama.cpp" in compare)):
        if given:
            raise Zamba2Error(f"{option} is for the CPU; leave it out, or leave --device out.")


def check_format(path: Path, format: str) -> None:
    _, found, _ = open_packed(path, read_config(path))
    if found.format.name != format_named(format).name:
        raise Zamba2Error(f"{path} is packed as {found.format.name}, not {format}; leave --format out, or give the original checkpoint.")


def need_memory(nbytes: float) -> None:
    """Raises Zamba2Error where the system says that so many bytes are not free: it would measure the disk."""
    free = free_memory()
    if free < nbytes:
        found = f"{free / 1e9:.1f} GB are free"
        raise Zamba2Error(f"this needs {nbytes / 1e9:.1f} GB of memory and {found}; close something or take a smaller shape.")


def measure(
    commands: Mapping[str, list[str | Path]], request: dict[str, Any], ours_alone: dict[str, Any], repeats: int
) -> dict[str, Any]:
    """One warm-up of each, then ``repeats`` rounds in which ours and the others take turns; medians and ratios."""
    workers: dict[str, Worker] = {}
    runs: dict[str, list[dict[str, Any]]] = {}
    limits: list[dict[str, Any]] = []
    own = json.dumps(request | ours_alone)
    try:
        say("loading zamba2")
        ours = Worker("zamba2", [sys.executable, "-m", "zamba2.bench.measure", own], {"ZAMBA2_THREADS": str(request["threads"])})
        workers["zamba2"] = ours
        for name, command in commands.items():
            say(f"loading {name}")
            workers[name] = Worker(name, [*command, json.dumps(request)])
        for turn in range(repeats + 1):
            for name, worker in workers.items():
                say(f"{name}, {f'round {turn} of {repeats}' if turn else 'warm-up'}")
                answer = worker.ask("repeat")
                if turn:
                    runs.setdefault(name, []).append(answer)
                if turn and worker is ours:
                    limits.append(ours.ask("limits"))  # at once: what the machine gives may change with its neighbours
    finally:
        for worker in workers.values():
            worker.close()
        say("")
    result = summary(ours.ready, runs["zamba2"], limits, ours_alone["batch"])
    result["rivals"] = {name: rival(workers[name].ready, runs[name], result) for name in commands}
    return result


def start_to_first_token(path: Path, threads: int, repeats: int) -> dict[str, Any]:
    """Medians of the steps of ``zamba2 generate`` in fresh processes, after one to warm the file cache. Raises Zamba2Error."""
    if not (path / "tokenizer.json").exists():
        raise Zamba2Error(f"{path} has no tokenizer, and --startup runs zamba2 generate on a text; leave it out.")
    tokenizer = Tokenizer.from_folder(path)
    prompt = "The"
    while len(tokenizer.encode(prompt)) < STARTUP_TOKENS:
        prompt += " sea"
    runs = []
    for turn in range(repeats + 1):
        say(f"start, {f'round {turn} of {repeats}' if turn else 'warm-up'}")
        command = [sys.executable, "-m", "zamba2.bench.startup", str(time.monotonic()), prompt, "--model", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"ZAMBA2_THREADS": str(threads)})
        if done.returncode:
            raise Zamba2Error(f"zamba2 generate failed: {done.stderr.strip().removeprefix('zamba2: ')}")
        if turn:
            runs.append([json.loads(line) for line in done.stdout.splitlines()[-2:]])
    say("")
    steps = {f"{step}_seconds": statistics.median(marks[step] for _, marks in runs) for step in runs[0][1]}
    return {"prompt_tokens": runs[0][0]["usage"]["prompt_tokens"]} | steps


def say(text: str) -> None:
    """What is being done, on a terminal's last line."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"least": min(values), "median": statistics.median(values), "most": max(values)}


def medians(runs: Sequence[Mapping[str, Any]], ready: Mapping[str, Any]) -> dict[str, Any]:
    """Medians over the runs, the peak of memory, and the spreads behind them."""
    spreads = {key: spread([run[key] for run in runs]) for key in MEDIANS}
    found = {key: spreads[key]["median"] for key in MEDIANS} | {"load_seconds": ready["load_seconds"]}
    peaks = {key: max(run[key] for run in runs) for key in ("peak_rss_bytes", "peak_gpu_bytes") if key in runs[0]}
    return found | peaks | {"spreads": spreads}


def summary(ready: dict[str, Any], runs: list[dict[str, Any]], limits: list[dict[str, Any]], batch: int) -> dict[str, Any]:
    """Ours: medians, what must move and be computed, and the shares of the best that the machine gave in this process."""
    result = medians(runs, ready)
    moved = ready["decode_bytes"]
    bytes_per_token = moved["weights"] / batch + moved["state"] + moved["keys_and_values"]
    best = max(limits, key=lambda found: float(found["read_bandwidth"]))
    rates = {kind: max(found["product_rates"][kind] for found in limits) for kind in limits[0]["product_rates"]}
    operations = ready["prefill_operations"] * batch / result["ttft_seconds"]
    result["spreads"] |= {  # of each round's own limits; the fractions below are of the best of all rounds
        "read_bandwidth_bytes_per_second": spread([found["read_bandwidth"] for found in limits]),
        "decode_bandwidth_fraction": spread(
            [run["decode_tokens_per_second"] * bytes_per_token / own["read_bandwidth"] for run, own in zip(runs, limits, strict=True)]
        ),
    }
    return result | {
        "bytes_per_token": bytes_per_token,
        "weight_bytes_per_token": moved["weights"] / batch,
        "state_bytes_per_token": moved["state"],
        "kv_bytes_per_token": moved["keys_and_values"],
        "read_bandwidth_bytes_per_second": best["read_bandwidth"],
        "read_pattern": best["read_pattern"],
        "decode_bandwidth_fraction": result["decode_tokens_per_second"] * bytes_per_token / best["read_bandwidth"],
        "matrix_rate_operations_per_second": rates[ready["kind"]],
        "matrix_kind": ready["kind"],
        "product_rates": rates,
        "prefill_operations_per_second": operations,
        "prefill_matrix_fraction": operations / rates[ready["kind"]],
        "mapped_rss_bytes": runs[-1].get("mapped_rss_bytes"),
        "sequence_bytes": runs[-1]["state_bytes"] / batch,
        "isa": ready["isa"], "threads": ready["threads"], "format": ready["format"], "kv_format": ready["kv_format"],
    }  # fmt: skip


def rival(ready: dict[str, Any], runs: list[dict[str, Any]], ours: Mapping[str, Any]) -> dict[str, Any]:
    """A rival's medians, and ours over its own."""
    found = medians(runs, ready)
    ratios = {key: ours[key] / found[key] for key in (*RATES, "ttft_seconds", "peak_rss_bytes", "peak_gpu_bytes") if key in found}
    return found | {"ratios": ratios} | {key: value for key, value in ready.items() if key != "load_seconds"}


def print_tables(result: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    def rate(key: str, digits: int = 2) -> str:
        found = result["spreads"][key]
        return f"{found['median']:.{digits}f} ({found['least']:.{digits}f} to {found['most']:.{digits}f})"

    batch, own, on_gpu = result["batch"], result["spreads"]["decode_bandwidth_fraction"], "peak_gpu_bytes" in result
    rows = [
        ("decode", f"{rate('decode_tokens_per_second')} tokens/s" + (f", {batch} sequences together" if batch > 1 else "")),
        ("prefill", f"{rate('prefill_tokens_per_second', 1)} tokens/s"),
        ("time to first token", f"{rate('ttft_seconds', 3)} s"),
        ("load", f"{result['load_seconds']:.2f} s from mapping to ready"),
        ("peak memory of the GPU", f"{result['peak_gpu_bytes'] / 1e9:.2f} GB") if on_gpu else
        ("peak resident memory", f"{result['peak_rss_bytes'] / 1e9:.2f} GB, pages of the mapped weights included"),
        ("a token moves", f"{result['bytes_per_token'] / 1e9:.3g} GB: weights {result['weight_bytes_per_token'] / 1e9:.3g}, "
                          f"state {result['state_bytes_per_token'] / 1e9:.3g}, keys and values {result['kv_bytes_per_token'] / 1e9:.3g}"),
        (f"best read of the {'memory' if on_gpu else 'weight file'}",
         f"{result['read_bandwidth_bytes_per_second'] / 1e9:.1f} GB/s, {result['read_pattern']}"),
        ("decode uses of that", f"{result['decode_bandwidth_fraction']:.1%}; in single rounds {own['least']:.0%} to {own['most']:.0%}"),
        ("best rate of products", f"{result['matrix_rate_operations_per_second'] / 1e12:.3f} T/s, {result['matrix_kind']}"
                                  f"{'' if on_gpu else ' in registers'}"),
        ("prefill uses of that", f"{result['prefill_matrix_fraction']:.1%}"),
    ]  # fmt: skip
    kv = [f"keys and values {result['kv_format']}"] if result["kv_format"] != "bf16" else []
    what = [result["model"] or result["shape"], result["format"], *kv, result["isa"], f"{result['threads']} threads"]
    title = ", ".join([*what, f"{result['prompt_tokens']} prompt and {result['new_tokens']} new tokens", f"medians of {result['repeats']}"])
    table = Table(box=box.SIMPLE, show_header=False, title=f"{title}\n{result['machine']}", title_justify="left")
    for name, value in rows:
        table.add_row(name, value)
    if "startup" in result:
        found = result["startup"]
        steps = ", ".join(f"{step} {found[step + '_seconds']:.2f}" for step in ("interpreter", "imports", "load", "prompt"))
        name = f"zamba2 generate, {found['prompt_tokens']} tokens"
        table.add_row(name, f"{found['total_seconds']:.2f} s from start to first token: {steps}")
    console = Console()
    console.print(table)
    if not result["rivals"]:
        return
    table = Table("", "decode, tokens/s", "prefill, tokens/s", "first token, s", "peak memory, GB", box=box.SIMPLE)
    peak = "peak_gpu_bytes" if on_gpu else "peak_rss_bytes"
    for name, side in {"zamba2": result, **result["rivals"]}.items():
        table.add_row(
            name, f"{side['decode_tokens_per_second']:.2f}", f"{side['prefill_tokens_per_second']:.1f}", f"{side['ttft_seconds']:.3f}",
            f"{side[peak] / 1e9:.2f}",
        )  # fmt: skip
        if name != "zamba2":
            keys = (*RATES, "ttft_seconds", peak)
            table.add_row("  zamba2 / " + name, *(f"x {side['ratios'][key]:.2f}" for key in keys))
    console.print(table)
