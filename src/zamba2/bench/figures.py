"""The card's efficiency figures: Zamba2-2.7B beside models of its size, at their true shapes, each measurement in its own process.

A *series* is a model in a precision under an engine; a *point* is a length of prompt and a number of sequences. Rounds go over all
points and, at each, over all series in turn, so that what the machine does meanwhile is spread over all. Random weights: they take as
long as real ones.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from zamba2 import __version__
from zamba2.bench import llama_cpp_peer
from zamba2.bench.peers import BeyondLimits, DoesNotFit, Limits, Worker, llama_cpp, llama_cpp_python
from zamba2.bench.rivals import RIVALS, parameters
from zamba2.config import PRESETS, Config
from zamba2.errors import Zamba2Error, install
from zamba2.runtime.processors import machine
from zamba2.runtime.processors import versions as installed
from zamba2.weights.files import write_text
from zamba2.weights.packed import Packing
from zamba2.weights.synthetic import packed_bytes

__all__ = ["CLAIMS", "Point", "Series", "Settings", "Verdict", "medians", "read_results", "run", "verdicts"]

VERSION = 1  # of the JSON document
OURS = "zamba2-2.7b"
ENGINES = ("zamba2", "transformers", "llama.cpp")
LEAST_SECONDS = 5.0  # a measurement is not begun in less
MORE = 1.1  # times the memory that was too little, from which on another try is worth it


@dataclass(frozen=True)
class Series:
    """precision: a format of ours, bf16, or q4_0. weight_bytes: what its weights take at least."""

    model: str
    engine: str
    precision: str
    parameters: int
    weight_bytes: int

    @property
    def name(self) -> str:
        return f"{self.model} {self.precision} ({self.engine})"

    @property
    def bits(self) -> int:
        """Those it is compared at: 16, or 4 for everything packed."""
        return 16 if self.precision == "bf16" else 4


class Point(NamedTuple):
    """prompt_tokens: of each of ``batch`` sequences."""

    prompt_tokens: int
    batch: int


@dataclass(frozen=True)
class Settings:
    """What is measured. Those of two tries into one folder must be the same.

    models: rivals' names; transformers' own Zamba2 is "zamba2-2.7b". formats: of ours. lengths: of prompts, of one sequence. batches: of
    ``batch_length`` tokens each. small: shapes shrunk to next to nothing, to try everything in minutes.
    """

    models: tuple[str, ...] = (OURS, *RIVALS)
    formats: tuple[str, ...] = ("q4", "q8", "bf16")
    engines: tuple[str, ...] = ENGINES
    lengths: tuple[int, ...] = (128, 512, 1024, 2048)
    batches: tuple[int, ...] = (1, 4, 8)
    batch_length: int = 128
    new_tokens: int = 32
    device: str = "cpu"
    threads: int = 1
    small: bool = False

    @property
    def points(self) -> list[Point]:
        """Cheapest first: what the time does not suffice for are the longest prompts and the largest batches."""
        alone = [Point(length, 1) for length in sorted(set(self.lengths))]
        together = [Point(self.batch_length, batch) for batch in sorted(set(self.batches))]
        return [*alone, *(point for point in together if point not in alone)]


# ---- the series ------------------------------------------------------------------------------------------------------


def our_config(settings: Settings) -> Config:
    return Config(**SMALL_OURS) if settings.small else PRESETS["2.7b"]


SMALL_OURS: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 512, "hybrid_layer_ids": (1, 3), "num_mem_blocks": 2, "mamba_d_state": 16,
    "n_mamba_heads": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 128, "chunk_size": 64, "adapter_rank": 8,
}  # fmt: skip


def shape_of(model: str, settings: Settings) -> dict[str, Any]:
    """A model's shape as transformers takes it."""
    if model == OURS:
        config = our_config(settings)
        own = {key: value for key, value in config.to_dict().items() if key not in ("architectures", "torch_dtype", "dtype")}
        return own | {"model_type": "zamba2", "rope_theta": config.rope_base, "use_long_context": False}
    shape = dict(RIVALS[model].shape)
    if settings.small:
        shape |= {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 512}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2 if shape["num_key_value_heads"] < shape["num_attention_heads"] else 4}
        shape |= {"head_dim": 32} if "head_dim" in shape else {}
        shape |= {"pad_token_id": 0} if "pad_token_id" in shape else {}
    return shape


def all_series(settings: Settings) -> list[Series]:
    """Ours first. On a GPU ours is PyTorch's model, and llama.cpp, built for CPUs here, is left out."""
    config, found = our_config(settings), list[Series]()
    if "zamba2" in settings.engines:
        for name in settings.formats:
            size = packed_bytes(config, Packing.named(name))
            found.append(Series(OURS, "zamba2", name, config.num_parameters, size))
    for model in settings.models:
        count = config.num_parameters if model == OURS else parameters(gguf_of(model, settings))
        if "transformers" in settings.engines:
            found.append(Series(model, "transformers", "bf16", count, 2 * count))
        if "llama.cpp" in settings.engines and model != OURS and settings.device == "cpu":
            found.append(Series(model, "llama.cpp", "q4_0", count, count * 18 // 32))
    return found


def gguf_of(model: str, settings: Settings) -> llama_cpp_peer.Spec:
    name = f"{model}-small" if settings.small else model
    return replace(RIVALS[model], name=name, shape=shape_of(model, settings)).gguf


def command_of(series: Series, settings: Settings) -> list[str | Path]:
    """What measures a series, to which the request is appended; writes llama.cpp's weights. Raises Zamba2Error."""
    if series.engine == "zamba2":
        return [sys.executable, "-m", "zamba2.bench.measure"]
    if series.engine == "llama.cpp":
        return llama_cpp(gguf_of(series.model, settings))
    if find_spec("transformers") is None or find_spec("torch") is None or find_spec("accelerate") is None:
        raise Zamba2Error(f"transformers is not installed; {install('hf')}.")
    shape = json.dumps(shape_of(series.model, settings))
    return [sys.executable, "-m", "zamba2.bench.transformers_peer", "run", shape, "bfloat16"]


def request_of(series: Series, point: Point, settings: Settings, synthetic: Callable[[Config, str], Path]) -> dict[str, Any]:
    """What the process is asked to measure. synthetic: makes our packed checkpoint of a config in a format."""
    request = asdict(settings) | point._asdict()
    found = {key: request[key] for key in ("prompt_tokens", "batch", "new_tokens", "threads", "device")}
    if series.engine != "zamba2":
        return found
    path = {"path": str(synthetic(our_config(settings), series.precision))}
    return found | path | ({"kv_format": "bf16"} if settings.device == "cpu" else {})


# ---- measuring -------------------------------------------------------------------------------------------------------


def run(
    settings: Settings, out: Path, *, budget: float, memory: float, repeats: int, synthetic: Callable[[Config, str], Path],
    say: Callable[[str, int, int], None],
) -> dict[str, Any]:  # fmt: skip
    """Measure into ``out/figures.json``, which is whole after each measurement; what an earlier try left there is kept.

    budget: seconds of this try. memory: bytes a process may hold. say: told what was found, and how many measurements of how many are
    done. Raises Zamba2Error where the file holds other settings; what a single measurement fails of is written down as its status.
    """
    file, end = out / "figures.json", time.monotonic() + budget
    series, points = all_series(settings), settings.points
    results = start_results(file, settings, series)
    status = {(entry["series"], entry["prompt_tokens"], entry["batch"]): entry for entry in results["points"]}
    commands: dict[str, list[str | Path] | str] = {}
    begun = time.monotonic()
    for done, (turn, point, one) in enumerate(itertools.product(range(repeats), points, series), 1):
        key = (one.name, *point)
        entry = status[key]  # mypy on Python 3.10 takes a star within the brackets for syntax of 3.11
        too_large = entry["status"] == "does not fit" and memory <= MORE * entry.get("allowed_bytes", math.inf)
        if len(entry["runs"]) > turn or too_large:
            continue
        if one.name not in commands:
            try:
                commands[one.name] = command_of(one, settings)
            except Zamba2Error as error:
                commands[one.name] = str(error)
        command = commands[one.name]
        before = (entry["status"], entry["reason"], len(entry["runs"]))
        if isinstance(command, str):
            entry |= {"status": "not measured", "reason": command}
        else:
            measure_once(entry, one, point, settings, command, synthetic, Limits(memory, end), expected(results, one, point))
        if entry["runs"]:
            entry |= {"status": "measured", "reason": None}
        if entry["status"] == "does not fit":
            entry["allowed_bytes"] = int(memory)
        results["seconds"] += time.monotonic() - begun
        begun = time.monotonic()
        write_text(file, json.dumps(results, indent=1) + "\n")
        if before != (entry["status"], entry["reason"], len(entry["runs"])):
            what = f"{one.name}, {point.batch} x {point.prompt_tokens} tokens: {sentence(entry)}"
            say(what, done, repeats * len(points) * len(series))
    return results


def measure_once(
    entry: dict[str, Any], series: Series, point: Point, settings: Settings, command: Sequence[str | Path],
    synthetic: Callable[[Config, str], Path], limits: Limits, seconds: float,
) -> None:  # fmt: skip
    """One measurement in a process of its own, into ``entry``; or why there is none. seconds: what it is expected to take."""
    left = limits.end - time.monotonic()
    if series.engine == "llama.cpp" and point.batch > 1:
        entry |= {"status": "not measured", "reason": "llama-cpp-python reads one sequence at a time"}
    elif series.weight_bytes > limits.memory:
        said = f"its weights alone take {series.weight_bytes / 1e9:.1f} GB and {limits.memory / 1e9:.1f} GB are allowed"
        entry |= {"status": "does not fit", "reason": said}
    elif left < max(seconds, LEAST_SECONDS):
        takes = f"it would take about {seconds:.0f} s and " if seconds else ""
        entry |= {"status": "not measured", "reason": f"{takes}{max(left, 0):.0f} s of the time were left"}
    else:
        start = time.monotonic()
        try:
            request = json.dumps(request_of(series, point, settings, synthetic))
            worker = Worker(series.name, [*command, request], {"ZAMBA2_THREADS": str(settings.threads)}, limits=limits, quiet=True)
            try:
                # kernels of a GPU are compiled, and their graphs captured, for a length and a number of sequences
                worker.ask("warm" if settings.device == "cpu" else "repeat")
                found = worker.ask("repeat")
            finally:
                worker.close()
            kept = ("ttft_seconds", "decode_tokens_per_second", "peak_rss_bytes", "peak_gpu_bytes")
            run = {key: found[key] for key in kept if key in found} | {"load_seconds": worker.ready["load_seconds"]}
            entry["runs"].append(run | {"seconds": time.monotonic() - start})
        except DoesNotFit as error:
            entry |= {"status": "does not fit", "reason": str(error)}
        except BeyondLimits as error:
            entry |= {"status": "not measured", "reason": f"{error}, after {time.monotonic() - start:.0f} s"}
        except Zamba2Error as error:
            entry |= {"status": "failed", "reason": str(error)}


def expected(results: Mapping[str, Any], series: Series, point: Point) -> float:
    """Seconds that a measurement will take, from the nearest smaller one of its series; 0 where there is none.

    What is read grows with tokens and sequences; the rest is counted in full, and a quarter more.
    """
    tokens, best = point.prompt_tokens * point.batch, 0.0
    size = 0
    for entry in results["points"]:
        own = entry["prompt_tokens"] * entry["batch"]
        if entry["series"] == series.name and entry["runs"] and size < own <= tokens:
            size = own
            best = max(run["seconds"] + run["ttft_seconds"] * (tokens / own - 1) for run in entry["runs"])
    return 1.25 * best


def start_results(file: Path, settings: Settings, series: Sequence[Series]) -> dict[str, Any]:
    """The document to go on with: an earlier try's, or a new one. Raises Zamba2Error."""
    wanted, gpu, now = json.loads(json.dumps(asdict(settings))), gpu_name(settings.device), versions(settings)
    if file.exists():
        found = read_results(file)
        points = [(one.name, *point) for point in settings.points for one in series]
        known = [(entry["series"], entry["prompt_tokens"], entry["batch"]) for entry in found["points"]]
        other = [key for key in wanted | found["settings"] if found["settings"].get(key) != wanted.get(key)]
        older = [f"{name} {number}" for name, number in found["versions"].items() if now.get(name, number) != number]
        if other:
            what = f"other settings ({', '.join(other)})"
        elif (found["machine"], found.get("gpu"), known) != (machine(), gpu, points):
            what = f"other points, or another machine ({found.get('gpu') or found['machine']})"
        elif older:
            what = f"other versions ({', '.join(older)})"
        else:
            return found | {"versions": found["versions"] | now}
        raise Zamba2Error(f"{file} holds figures of {what}; give another --out, or delete it.")
    file.parent.mkdir(parents=True, exist_ok=True)
    return {
        "version": VERSION, "machine": machine(), "gpu": gpu, "versions": now, "settings": wanted,
        "seconds": 0.0, "series": [asdict(one) | {"name": one.name, "bits": one.bits} for one in series],
        "points": [
            {"series": one.name, **point._asdict(), "status": "not measured", "reason": "not begun", "runs": []}
            for point in settings.points for one in series
        ],
    }  # fmt: skip


def gpu_name(device: str) -> str | None:
    if device == "cpu":
        return None
    import torch

    if not torch.cuda.is_available():
        raise Zamba2Error(f"--device is {device!r} and PyTorch finds no GPU here; leave it out to measure the CPU.")
    return torch.cuda.get_device_name(device)


def versions(settings: Settings) -> dict[str, str]:
    found = {"zamba2": __version__} | installed("torch", "transformers")
    python = llama_cpp_python() if "llama.cpp" in settings.engines else None
    if python is not None:
        for info in python.parents[1].glob("lib/python*/site-packages/llama_cpp_python-*.dist-info"):
            found["llama-cpp-python"] = info.name.removesuffix(".dist-info").split("-")[1]
    return found


def read_results(file: Path) -> dict[str, Any]:
    """A document that ``run`` wrote. Raises Zamba2Error."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise Zamba2Error(f"{file} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise Zamba2Error(f"{file} is no JSON document ({error}).") from None
    keys = {"version", "machine", "versions", "settings", "seconds", "series", "points"}
    if not isinstance(found, dict) or not keys <= found.keys() or found["version"] != VERSION:
        raise Zamba2Error(f"{file} is no document of zamba2 figures, version {VERSION}.")
    try:  # what is made of it later
        known = {one["name"]: (one["model"], one["engine"], one["precision"], one["bits"]) for one in found["series"]}
        numbers = [medians(entry, found["settings"]["new_tokens"]) for entry in found["points"]]
        ratios = [verdict.ratios for verdict in verdicts(found)]
        whole = all(model in (OURS, *RIVALS) and engine in ENGINES and bits in (4, 16) for model, engine, _, bits in known.values())
        whole &= all(entry["series"] in known and {"status", "reason", "prompt_tokens"} <= entry.keys() for entry in found["points"])
        whole &= {"lengths", "batches", "batch_length", "threads", "small"} <= found["settings"].keys() and found["seconds"] >= 0
        whole &= all(isinstance(number, str) for number in found["versions"].values())
        whole &= all(value > 0 for some in numbers if some is not None for value in some.values())
        whole &= all(ratio > 0 for some in ratios for ratio in some.values())
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise Zamba2Error(f"{file} is damaged ({type(error).__name__}: {error}); make it anew.") from None
    if not whole:
        raise Zamba2Error(f"{file} is damaged: it names what there is not, or has numbers that cannot be; make it anew.")
    return found


def sentence(entry: Mapping[str, Any]) -> str:
    """What was found at a point, in one line."""
    if entry["status"] != "measured":
        return f"{entry['status']}: {entry['reason']}"
    run = entry["runs"][-1]
    memory = run.get("peak_gpu_bytes", run["peak_rss_bytes"])
    return f"first token {run['ttft_seconds']:.2f} s, then {run['decode_tokens_per_second']:.2f} tokens/s, {memory / 1e9:.2f} GB"


# ---- what it says ----------------------------------------------------------------------------------------------------


def medians(entry: Mapping[str, Any], new_tokens: int) -> dict[str, float] | None:
    """Of a point's runs, None where there are none: seconds to the first token, seconds for each one after it, seconds of a whole reply,
    tokens per second of all sequences after the first, and the peak of memory in bytes."""
    runs = entry["runs"]
    if not runs:
        return None
    first = statistics.median(run["ttft_seconds"] for run in runs)
    rate = statistics.median(run["decode_tokens_per_second"] for run in runs)
    each = entry["batch"] / rate
    return {
        "ttft_seconds": first, "token_seconds": each, "reply_seconds": first + new_tokens * each, "tokens_per_second": rate,
        "memory_bytes": max(run.get("peak_gpu_bytes", run["peak_rss_bytes"]) for run in runs),
    }  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """What is said in public of Zamba2 beside a rival: theirs over ours is at least ``least`` (or ``most`` at most)."""

    text: str
    source: str
    rival: str
    measure: str
    least: float | None = None
    most: float | None = None

    def holds(self, ratio: float) -> bool:
        return (self.least is None or ratio >= self.least) and (self.most is None or ratio < self.most)


BLOG = "Zyphra's announcement"
CLAIMS = (
    Claim("twice as fast to the first token as Phi-3-mini", BLOG, "phi-3-mini", "ttft_seconds", least=2.0),
    Claim("27 % less memory than Phi-3-mini", BLOG, "phi-3-mini", "memory_bytes", least=1 / 0.73),
    Claim("generation latency 1.29 times lower than Phi-3-mini's", BLOG, "phi-3-mini", "reply_seconds", least=1.29),
    Claim("slower to the first token than Phi-2", "transformers_zamba2, issue 10", "phi-2", "ttft_seconds", most=1.0),
)


@dataclass(frozen=True)
class Verdict:
    """A claim at a number of bits: theirs over ours by length of prompt, at the lengths where both were measured."""

    claim: Claim
    bits: int
    ours: str
    theirs: str
    ratios: dict[int, float]

    @property
    def text(self) -> str:
        held = [length for length, ratio in self.ratios.items() if self.claim.holds(ratio)]
        if not self.ratios:
            return "not measured"
        if len(held) in (0, len(self.ratios)):
            return "holds here" if held else "does not hold here"
        return f"holds at {', '.join(map(str, held))} tokens, not at {', '.join(str(n) for n in self.ratios if n not in held)}"


def verdicts(results: Mapping[str, Any]) -> Iterator[Verdict]:
    """Each claim of the card at 16 bits and, where there are such series, at 4."""
    new = results["settings"]["new_tokens"]
    found = {(entry["series"], entry["prompt_tokens"]): medians(entry, new) for entry in results["points"] if entry["batch"] == 1}
    names = {one["name"]: one for one in results["series"]}
    for claim in CLAIMS:
        for bits, precision in ((16, "bf16"), (4, "q4")):
            ours = [n for n, one in names.items() if (one["engine"], one["precision"]) == ("zamba2", precision)]
            theirs = [n for n, one in names.items() if (one["model"], one["bits"]) == (claim.rival, bits)]
            if not ours or not theirs:
                continue
            ratios = {}
            for length in sorted(results["settings"]["lengths"]):
                one, other = found.get((ours[0], length)), found.get((theirs[0], length))
                if one is not None and other is not None:
                    ratios[length] = other[claim.measure] / one[claim.measure]
            yield Verdict(claim, bits, ours[0], theirs[0], ratios)
