#!/usr/bin/env python3
"""Everything that is checked and measured on an NVIDIA GPU, in one run of a few minutes.

    PYTHONPATH=src python scripts/gpu.py --out FOLDER --mamba MAMBA_SSM      # all sections; FOLDER/gpu.json after each result
    PYTHONPATH=src python scripts/gpu.py --out FOLDER --only ops scan
    PYTHONPATH=src python scripts/gpu.py --out /tmp/toy --device cpu --tiny  # the same code at toy sizes, in Triton's interpreter
    python scripts/gpu.py --table FOLDER/gpu.json                            # the results beside limits, rivals and goals

Each section (SECTIONS below) runs in a process of its own: a crash or a lack of memory ends that section alone, and memory peaks are
its own. It yields its results one by one, so that what came before a crash is kept. First all checks run side by side, and beside them
the rivals whose kernels Triton tunes, unmeasured, so that those are compiled; then what is measured, one section after another.
--kernels keeps what was compiled for the next run. MAMBA_SSM is a folder that holds the Python package mamba_ssm (an unpacked sdist):
its Triton kernels are the rival of the scan. Weights, prompts and labels are random; inputs of checks are drawn anew in each run. Exit
code 1 if a section or a check failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from zamba2.bench.measure import prefill_operations, random_ids, repeat  # noqa: E402
from zamba2.config import PRESETS, Config  # noqa: E402
from zamba2.weights.checkpoint import FP32_PARTS  # noqa: E402

Result = dict[str, Any]
BF16 = torch.bfloat16
SPREAD = 0.02  # of random weights
MODEL_ROUNDING = 0.2  # relative difference of scores; two orders of bf16 roundings leave some 0.07 of it, a mistake about 1
PROMPT, LONG_PROMPT, BATCH = 512, 2048, 32  # tokens, tokens, sequences
WORKERS = 8  # processes that check cases: Triton compiles a kernel for most of them


@dataclass(frozen=True)
class Setting:
    """What a section is run with."""

    device: str
    tiny: bool
    mamba: str | None
    seed: int

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    def pick(self, real: Any, toy: Any) -> Any:
        """A size: the real one, or the toy."""
        return toy if self.tiny else real

    @property
    def config(self) -> Config:
        """The model of all but the scan: 2.7B, or a toy with the same parts."""
        return TOY if self.tiny else PRESETS["2.7b"]


TOY = Config(
    hidden_size=32, num_hidden_layers=3, vocab_size=96, hybrid_layer_ids=(1, 2), num_mem_blocks=2, mamba_d_state=16, n_mamba_heads=4,
    num_attention_heads=4, num_key_value_heads=4, intermediate_size=64, chunk_size=8, adapter_rank=8,
)  # fmt: skip


class NotThereError(Exception):
    """Something that is measured if it exists does not."""


# ---- tools ------------------------------------------------------------------------------------------------------------------


class Clock:
    """Times of a stream's marks: CUDA events, or the processor's clock where there is no GPU."""

    def __init__(self, setting: Setting) -> None:
        self.cuda = setting.cuda
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between one mark and the next."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in pairs]
        return [b - a for a, b in pairs]


def median_seconds(setting: Setting, call: Callable[[int], object], repeats: int, warm: int = 3) -> float:
    """Median time of ``call(number)``; the calls are enqueued without waiting for one another."""
    for number in range(warm):
        call(number)
    if setting.cuda:
        torch.cuda.synchronize()
    clock = Clock(setting)
    for number in range(repeats):
        clock.mark()
        call(number)
    clock.mark()
    return statistics.median(clock.seconds())


def free_memory(setting: Setting) -> None:
    gc.collect()
    if setting.cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(setting: Setting) -> int:
    """The most that tensors took since ``free_memory``; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if setting.cuda else 0


def profiled(setting: Setting, call: Callable[[], object]) -> Result:
    """The kernels of a call: name, calls and microseconds of the 30 that take longest, and the sum of all."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if setting.cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as found:
        call()
        if setting.cuda:
            torch.cuda.synchronize()
    kind = DeviceType.CUDA if setting.cuda else DeviceType.CPU
    rows = [
        (event.key, event.count, event.self_device_time_total if setting.cuda else event.self_cpu_time_total)
        for event in found.key_averages()
        if event.device_type == kind
    ]
    rows.sort(key=lambda row: -row[2])
    return {"microseconds": sum(row[2] for row in rows), "kernels": sum(row[1] for row in rows), "longest": rows[:30]}


def attempt(setting: Setting, call: Callable[[], Result]) -> Result:
    """The call's result, or {"error": what it raised}, so that what comes after is measured all the same."""
    free_memory(setting)
    try:
        return call()
    except Exception:
        return {"error": traceback.format_exc()[-2500:]}


def relative(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, NaN if anything is."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def random_zamba2(config: Config, device: str, dtype: torch.dtype, *, trained: bool = False) -> Any:
    """Our model with random weights, made on the device: N(0, 0.02) in ``dtype``, the parts that a checkpoint keeps in fp32 in fp32;
    norms and D are 1, A_log = log(1 .. heads), dt_bias in [-4, -1], the convolution in [-1/2, 1/2]. trained: give gradients."""
    from zamba2.model.model import Zamba2

    with torch.device("meta"):
        model = Zamba2(config)
    for name, old in list(model.named_parameters()):
        wanted = torch.float32 if name.endswith(FP32_PARTS) else dtype
        weight = torch.empty(old.shape, dtype=wanted, device=device)
        if name.endswith("A_log"):
            weight.copy_(torch.log(torch.arange(1, weight.numel() + 1).float()))
        elif name.endswith("dt_bias"):
            weight.uniform_(-4.0, -1.0)
        elif name.endswith(("norm.weight", ".D")):
            weight.fill_(1.0)
        elif ".conv1d." in name:
            weight.uniform_(-0.5, 0.5)
        else:
            weight.normal_(0.0, SPREAD)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=trained))
    return model.train() if trained else model.eval()


# ---- machine ----------------------------------------------------------------------------------------------------------------


def machine(setting: Setting) -> Iterator[Result]:
    """The card, the versions, and the ceilings that fractions refer to."""
    yield {"versions": {name: version_of(name) for name in ("torch", "triton", "transformers")}, "seed": setting.seed}
    if setting.cuda:
        card = torch.cuda.get_device_properties(0)
        yield {"name": card.name, "memory_bytes": card.total_memory, "multiprocessors": card.multi_processor_count, "driver": driver()}
    size = setting.pick(1 << 30, 1 << 16)  # of fp32
    source = torch.randn(size, device=setting.device)
    target = torch.empty_like(source)
    yield {"copy_bytes_per_second": 2 * source.nbytes / median_seconds(setting, lambda _: target.copy_(source), 15)}
    yield {"read_bytes_per_second": source.nbytes / median_seconds(setting, lambda _: source.sum(), 15)}
    n = setting.pick(8192, 64)
    a, b, c = (torch.randn(n, n, device=setting.device, dtype=BF16) for _ in range(3))
    yield {"product_operations_per_second": 2 * n**3 / median_seconds(setting, lambda _: torch.mm(a, b, out=c), 20)}


def version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


# ---- ops: outputs and gradients of the kernels ------------------------------------------------------------------------------


class Check(NamedTuple):
    """A relative error and the most that is allowed; error is None where something was raised instead."""

    case: str
    op: str
    dtype: str
    what: str
    error: float | None
    bound: float
    trouble: str = ""

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.bound

    def __str__(self) -> str:
        return f"{self.case} {self.what}: {self.trouble or f'relative error {self.error:.2e}, at most {self.bound:.0e}'}"


def ops(setting: Setting) -> Iterator[Result]:
    """Triton's five operations: the table of tests/op_cases.py against its fp64 truth, and true shapes against torch in fp64."""
    import op_cases

    from zamba2.model.ops import select

    try:
        select("triton")
    except (ImportError, ValueError) as error:
        raise NotThereError(f"Triton's operations: {error}") from None
    poison()
    cases = [dataclasses.replace(case, seed=setting.seed + number) for number, case in enumerate(op_cases.CASES)]
    if setting.tiny:
        cases = [case for case in cases if case.sizes.get("T", 1) < 10]
    with pool(setting, WORKERS) as executor, pool(setting, 3) as few:  # of those with true shapes, as they need memory
        table = {executor.submit(check_case, case, setting.device): case for case in cases}
        if not setting.cuda:
            wait(table)  # the interpreter runs one kernel at a time
        large = {few.submit(large_check, *one, setting): one[0] for one in large_cases(setting)}
        for name, futures in (("true_shapes", large), ("table", table)):
            checks: list[Check] = []
            for future in as_completed(futures):
                checks += checks_of(futures[future], future)
                yield {name: summary(checks)}


def worker() -> None:
    """Of the pool. One thread each for what is computed on the processor, the truth in fp64: there are as many processes as that."""
    torch.set_num_threads(1)
    poison()


def poison() -> None:
    """Have torch fill what torch.empty gives with NaN from now on, as its deterministic mode does: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)


@contextmanager
def pool(setting: Setting, workers: int) -> Iterator[Executor]:
    """Processes for the cases, which share nothing but the compiled kernels; on a CPU one thread, whose turn comes after another."""
    if setting.cuda:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=worker) as processes:
            yield processes
    else:
        with ThreadPoolExecutor(1) as thread:
            yield thread


def check_case(case: Any, device: str) -> list[Check]:
    """With gradients and, as implementations may take another way then, without."""
    from op_cases import OUTPUTS, call, inputs, results, select, truth

    arguments, expected = inputs(case, device=device), truth(case)
    found = list(results(select("triton"), case, arguments))
    with torch.inference_mode():
        outputs = zip(OUTPUTS[case.op], call(select("triton"), case.op, arguments), strict=True)
        found += [(f"{name} in inference", output) for name, output in outputs]
    return [compared(case, what, output, expected[what.removesuffix(" in inference")]) for what, output in found]


def compared(case: Any, what: str, found: Tensor, expected: Tensor) -> Check:
    from op_cases import allowed, relative_error

    bound = allowed(case.dtype, what)
    error = relative_error(found.to(expected.device), expected)
    return Check(str(case), case.op, str(case.dtype).removeprefix("torch."), what, error, bound)


def checks_of(case: Any, future: Future[list[Check]]) -> list[Check]:
    try:
        return future.result()
    except Exception:  # of the case or of its process
        return [failed_check(case, traceback.format_exc())]


def failed_check(case: Any, trouble: str) -> Check:
    said = trouble.strip().splitlines()[-1]
    return Check(str(case), case.op, str(case.dtype).removeprefix("torch."), "all", None, 0.0, f"{said}\n{trouble[-1500:]}")


def summary(checks: list[Check]) -> Result:
    """Counts, the worst error of each op and dtype beside its bound, and the failures in full."""
    worst: dict[str, Check] = {}
    for check in checks:
        name = f"{check.op} {check.dtype} {'gradients' if check.what.startswith('gradient') else 'outputs'}"
        if check.error is not None and (name not in worst or check.error > (worst[name].error or 0.0)):
            worst[name] = check
    return {
        "cases": len({check.case for check in checks}),
        "checks": len(checks),
        "worst": {name: {"error": c.error, "bound": c.bound, "case": c.case, "what": c.what} for name, c in sorted(worst.items())},
        "failures": [str(check) for check in checks if not check.passed],
    }


def large_cases(setting: Setting) -> Iterator[tuple[Any, bool]]:
    """Cases at the models' shapes, and whether their gradients are checked (in fp64 those of long sequences fit nowhere)."""
    from op_cases import Case

    seed = setting.seed
    for dtype in (BF16, torch.float32):
        for length in setting.pick((1000, 4097, 32768), (40, 130)):
            sizes = {"T": length, "b": 1, "H": setting.pick(80, 2), "P": 64, "N": 64, "state": True}
            yield Case("ssd_scan", dtype, sizes, seed := seed + 1), length <= 4097
        sizes = {"T": setting.pick(1000, 40), "b": 2, "H": setting.pick(64, 2), "P": 64, "N": 128, "state": True, "seq_idx": True}
        yield Case("ssd_scan", dtype, sizes, seed := seed + 1), True
        sizes = {"T": setting.pick(1000, 40), "b": 1, "H": setting.pick(112, 4), "P": 64, "N": 64, "G": 2}
        yield Case("ssd_scan", dtype, sizes, seed := seed + 1), True
        sizes = {"T": setting.pick(1000, 40), "b": 2, "H": setting.pick(80, 2), "P": 64, "N": 64, "dt_bias": True, "lengths": True}
        yield Case("ssd_scan", dtype, sizes, seed := seed + 1), True
        rows = setting.pick(4097, 9)
        for documents in (False, True):
            sizes = {"T": rows, "b": 1, "C": setting.pick(5248, 40), "state": True, "seq_idx": documents}
            yield Case("causal_conv", dtype, sizes, seed := seed + 1), True
        for width, gate, groups in ((2560, False, 1), (5120, True, 1), (7168, True, 2)):
            shape = (1, rows, setting.pick(width, width // 64))
            yield Case("rms_norm", dtype, {"shape": shape, "gate": gate, "groups": groups}, seed := seed + 1), True
        yield Case("concat_rms_norm", dtype, {"shape": (1, rows, setting.pick(2560, 40))}, seed := seed + 1), True
        yield Case("geglu", dtype, {"shape": (1, rows, setting.pick(10240, 160))}, seed := seed + 1), True


def large_check(case: Any, gradients: bool, setting: Setting) -> list[Check]:
    """Against torch in fp64 on the device; a second time with activations that are views of wider rows, as the model passes them."""
    from op_cases import OUTPUTS, call, inputs, results, select

    free_memory(setting)
    arguments = inputs(case, device=setting.device)
    floats = {name: value for name, value in arguments.items() if isinstance(value, Tensor) and value.is_floating_point()}
    exact = arguments | {name: value.double() for name, value in floats.items()}
    checks = []
    if gradients:
        expected = dict(results(select("torch"), case, exact))
        checks += [compared(case, what, found, expected[what]) for what, found in results(select("triton"), case, arguments)]
    with torch.inference_mode():
        if not gradients:
            expected = dict(zip(OUTPUTS[case.op], call(select("torch"), case.op, exact), strict=True))
        outputs = call(select("triton"), case.op, as_views(arguments))
    return checks + [compared(case, name, found, expected[name]) for name, found in zip(OUTPUTS[case.op], outputs, strict=True)]


def as_views(arguments: dict[str, Any]) -> dict[str, Any]:
    """The activations with a row stride that is not their width; what lies between rows is NaN."""
    views = dict(arguments)
    for name in {"x", "B", "C", "gate", "projected", "adapted"} & arguments.keys():
        value = arguments[name]
        rows = value.flatten(2)
        wider = torch.full((*rows.shape[:-1], rows.shape[-1] + 16), torch.nan, dtype=value.dtype, device=value.device)
        wider[..., : rows.shape[-1]] = rows
        views[name] = wider[..., : rows.shape[-1]].unflatten(2, value.shape[2:])
    return views


# ---- tests ------------------------------------------------------------------------------------------------------------------

TESTS_SECONDS = 200  # after which those that are left are not run
TESTS = ("test_triton_linear.py", "test_triton_step.py", "test_triton_prompt.py", "test_gpu.py")


def tests(setting: Setting) -> Iterator[Result]:
    """The test files of what runs on a GPU alone; at toy size they are collected and not run."""
    files = [f"tests/{name}" for name in TESTS if (ROOT / "tests" / name).exists()]
    if not files:
        raise NotThereError(", ".join(TESTS))
    command = [sys.executable, "-m", "pytest", "-q", *files, "-p", "no:cacheprovider", "-o", "addopts=", "-W", "default"]
    command += ["-o", "timeout=60", "-o", "timeout_method=thread", "--tb=short"]  # a thread's ends what waits for a GPU, too
    if setting.cuda and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(WORKERS)]
    if setting.tiny:
        command.append("--collect-only")
    environment = os.environ | {"OMP_NUM_THREADS": "2"}  # of each worker
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    timer = threading.Timer(TESTS_SECONDS, process.send_signal, [signal.SIGINT])  # then it says what it has found
    timer.start()
    lines = process.communicate()[0].splitlines()
    timer.cancel()
    counts = {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|errors?|skipped)", "".join(lines[-1:]))}
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if process.returncode > 1 or len(failures) < process.returncode:  # 1: tests failed
        failures.append(f"pytest ended with code {process.returncode}")
    yield {"files": files, "counts": counts, "failures": failures, "output": lines[-300:] if failures else lines[-3:]}


# ---- scan: beside mamba-ssm's kernels ---------------------------------------------------------------------------------------

SCAN_SHAPES = {"2.7b": (80, 64, 64), "1.2b": (64, 64, 128)}  # heads, channels, state size; one group
CHUNK = 256
CACHE_BYTES = 150_000_000  # of inputs that are used in turn: three times what the card caches


def scan(setting: Setting) -> Iterator[Result]:
    """Seconds, peak memory and errors of our scan and of mamba-ssm's, bf16, one sequence: forward, and forward + backward."""
    from zamba2.model.ops.triton_scan import ssd_scan

    def ours(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        return ssd_scan(x, dt, A, B, C, D, chunk_size=CHUNK)[0]

    sides: dict[str, Callable[..., Tensor]] = {"ours": ours}
    try:
        sides["mamba_ssm"] = mamba_scan(setting)
    except (ImportError, NotThereError) as error:
        yield {"mamba_ssm": {"not there": str(error)}}
    for shape, (heads, channels, states) in SCAN_SHAPES.items():
        sizes = (setting.pick(heads, 2), setting.pick(channels, 16), setting.pick(states, 16))
        for length in setting.pick((4096, 512, 2048, 16384), (20, 12)):  # kernels are tuned on the first
            times = partial(scan_times, setting, length, sizes)
            yield {f"{shape} {length}": {side: times(call) for side, call in sides.items()}}
        yield {f"{shape} errors": attempt(setting, partial(scan_errors, setting, setting.pick(512, 20), sizes, sides))}


def mamba_scan(setting: Setting) -> Callable[..., Tensor]:
    """mamba-ssm's ``mamba_chunk_scan_combined`` from its Python files alone. Raises NotThereError or ImportError."""
    stand_in_mamba(setting)
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined

    def call(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        found: Tensor = scan(x, dt, A, B, C, CHUNK, D=D)
        return found

    return call


def stand_in_mamba(setting: Setting) -> None:
    """Make mamba_ssm's modules importable without what its __init__ imports, compiled extensions."""
    folder = None if setting.mamba is None else Path(setting.mamba) / "mamba_ssm"
    if folder is None or not folder.is_dir():
        raise NotThereError("mamba-ssm's Python files; name their folder with --mamba")
    package = types.ModuleType("mamba_ssm")
    package.__path__ = [str(folder)]
    package.__spec__ = importlib.util.spec_from_loader("mamba_ssm", loader=None, is_package=True)
    sys.modules["mamba_ssm"] = package
    if setting.cuda:
        tune_together()
    else:
        do_without_gpu()


def do_without_gpu() -> None:
    """For toy sizes in Triton's interpreter: nothing is timed, and no card is chosen."""
    from triton.runtime.autotuner import Autotuner

    Autotuner.do_bench = property(lambda _: lambda call, quantiles: [0.0] * len(quantiles))
    card: Any = torch.cuda
    card.device = lambda _: nullcontext()
    card.get_device_properties = lambda _: types.SimpleNamespace(multi_processor_count=1)


def tune_together() -> None:
    """Let Triton's autotuner compile a kernel's candidates all at once, and time each for 20 ms instead of 100: mamba-ssm has some 240."""
    import triton
    from triton.runtime.autotuner import Autotuner

    prune, executor = Autotuner.prune_configs, ThreadPoolExecutor(os.cpu_count())

    def compiled(self: Any, kwargs: dict[str, Any]) -> Any:
        candidates = prune(self, kwargs)
        with triton.AsyncCompileMode(executor, ignore_errors=True):
            for config in candidates:
                rest = {name: value for name, value in kwargs.items() if name != "warmup"}
                self.fn.warmup(*self.nargs.values(), **rest, **config.all_kwargs())
        return candidates

    def quick(call: Callable[[], object], quantiles: Any) -> Any:
        return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)

    Autotuner.prune_configs = compiled
    Autotuner.do_bench = property(lambda _: quick)


def scan_inputs(setting: Setting, length: int, heads: int, channels: int, states: int) -> list[tuple[Tensor, ...]]:
    """Sets of x, dt, A, B, C, D and the direction of y's gradient. x, B and C are views of one tensor, as in the model."""
    inner = heads * channels
    bytes_of_a_set = length * (inner + 2 * states) * 2
    sets = []
    for _ in range(min(32, 1 + CACHE_BYTES // bytes_of_a_set) if setting.cuda else 1):
        xBC = torch.randn(1, length, inner + 2 * states, device=setting.device, dtype=BF16)
        x, B, C = xBC.split([inner, states, states], dim=-1)
        dt = torch.empty(1, length, heads, device=setting.device).uniform_(-6.9, -2.3).exp()  # 0.001 to 0.1
        A, D = -torch.arange(1, heads + 1, device=setting.device).float(), torch.ones(heads, device=setting.device)
        tensors = [x.unflatten(-1, (heads, channels)), dt, A, B.unsqueeze(2), C.unsqueeze(2), D]
        sets.append((*(tensor.detach().requires_grad_() for tensor in tensors), torch.randn_like(tensors[0])))
    return sets


def scan_times(setting: Setting, length: int, sizes: tuple[int, int, int], call: Callable[..., Tensor]) -> Result:
    """Median seconds and the bytes that a call takes at its peak beyond its inputs, its results included."""
    sets = scan_inputs(setting, length, *sizes)

    def forward(number: int) -> None:
        with torch.no_grad():
            call(*sets[number % len(sets)][:-1])

    def both(number: int) -> None:
        *arguments, direction = sets[number % len(sets)]
        torch.autograd.grad(call(*arguments), arguments, direction)

    def measured(run: Callable[[int], None]) -> Result:
        run(0)  # compiles, and makes what is kept
        free_memory(setting)
        before = torch.cuda.memory_allocated() if setting.cuda else 0
        run(0)
        peak = peak_bytes(setting) - before
        return {"seconds": median_seconds(setting, run, setting.pick(30, 1), setting.pick(5, 0)), "peak_bytes": peak}

    return {name: attempt(setting, partial(measured, run)) for name, run in (("forward", forward), ("forward_backward", both))}


def scan_errors(setting: Setting, length: int, sizes: tuple[int, int, int], sides: dict[str, Callable[..., Tensor]]) -> Result:
    """Errors relative to torch's scan in fp64, of the output and of the gradients, and the difference of the two sides' outputs."""
    from zamba2.model.ops import select

    *arguments, direction = scan_inputs(setting, length, *sizes)[0]
    names = ("y", "dx", "ddt", "dA", "dB", "dC", "dD")

    def values(call: Callable[..., Tensor], *arguments: Tensor, direction: Tensor) -> list[Tensor]:
        y = call(*arguments)
        return [y, *torch.autograd.grad(y, arguments, direction.to(y.dtype))]

    def exact(*arguments: Tensor) -> Tensor:
        return select("torch").ssd_scan(*arguments, chunk_size=CHUNK)[0]

    truth = values(exact, *(argument.detach().double().requires_grad_() for argument in arguments), direction=direction)
    found: Result = {}
    outputs = {}
    for side, call in sides.items():
        got = values(call, *arguments, direction=direction)
        outputs[side] = got[0]
        found[side] = {name: relative(a, b) for name, a, b in zip(names, got, truth, strict=True)}
    if len(outputs) == 2:
        found["difference"] = relative(*outputs.values())
    return found


# ---- generate: the user's path ----------------------------------------------------------------------------------------------


def generate(setting: Setting) -> Iterator[Result]:
    """Decoding and reading prompts with ``TorchBackend``: bf16, then packed weights. Kernels are compiled anew here."""
    backend = backend_of(random_zamba2(setting.config, setting.device, BF16), setting)
    parts: dict[str, Callable[[Any, Setting], Result]] = {
        "cold": cold, "prefill": prefill, "prefill_scores": prefill_scores, "decode": decode, "batch": batch,
        "prefill_profile": prefill_profile, "profile": decode_profile,
    }  # fmt: skip
    for name, part in parts.items():
        yield {name: attempt(setting, partial(part, backend, setting))}
    del backend
    for format in ("q4", "q8"):
        yield {format: attempt(setting, partial(packed_generation, setting, format))}


def packed_generation(setting: Setting, format: str) -> Result:
    """One sequence decoded, and a prompt read."""
    backend = packed_backend(setting, format)
    return decode(backend, setting) | prefill(backend, setting)


def backend_of(model: Any, setting: Setting) -> Any:
    """What ``zamba2.load`` gives; at toy size on a CPU its decoder too, in Triton's interpreter."""
    from zamba2.runtime.torch import TorchBackend

    return TorchBackend(model) if setting.cuda else TorchBackend(model, decode=True)


def packed_backend(setting: Setting, format: str) -> Any:
    """A backend over random packed weights: one block of rows of each matrix is packed, and repeated."""
    import numpy as np

    from zamba2.weights.checkpoint import packed_model
    from zamba2.weights.formats import BLOCK, pack
    from zamba2.weights.packed import Packing

    random, packing = np.random.default_rng(setting.seed), Packing.named(format)

    def read(part: Any) -> Tensor:
        if part.is_matrix:
            rows, cols = part.shape
            block = torch.from_numpy(pack(random.normal(0, SPREAD, (BLOCK, cols)).astype(np.float32), packing.of(part)))
            return block.to(setting.device).repeat(-(-rows // BLOCK))
        if part.name.endswith("A_log"):
            return torch.log(torch.arange(1, part.count + 1, device=setting.device).float())
        if part.name.endswith(("norm.weight", ".D")):
            return torch.ones(part.count, device=setting.device)
        low, high = (-4.0, -1.0) if part.name.endswith("dt_bias") else (-0.5, 0.5)
        return torch.empty(part.count, device=setting.device).uniform_(low, high)

    return backend_of(packed_model(setting.config, packing, read), setting)


def prompts(setting: Setting, count: int, length: int) -> list[Any]:
    return random_ids(setting.config.vocab_size, count, setting.pick(length, max(2, length // 128)))


def cold(backend: Any, setting: Setting) -> Result:
    """Seconds of the very first prompt and of the first tokens: compilation and capture are in them."""
    from zamba2.bench.measure import likeliest
    from zamba2.runtime.backend import Row

    state, (tokens,) = backend.new_state(), prompts(setting, 1, PROMPT)
    seconds = []
    for _ in range(setting.pick(4, 2)):
        start = time.perf_counter()
        (tokens,) = likeliest(backend.forward([Row(tokens, state)]))
        seconds.append(time.perf_counter() - start)
    return {"first_prompt_seconds": seconds[0], "first_tokens_seconds": seconds[1:]}


def decode(backend: Any, setting: Setting) -> Result:
    """One sequence."""
    return generation(backend, setting, 1, setting.pick(64, 1))


def batch(backend: Any, setting: Setting) -> Result:
    """Many sequences together."""
    return generation(backend, setting, setting.pick(BATCH, 3), setting.pick(96, 1))


def generation(backend: Any, setting: Setting, sequences: int, new: int) -> Result:
    """Greedy decoding behind 512-token prompts; the median of three runs, after one to warm up."""
    texts = prompts(setting, sequences, PROMPT)
    runs = [repeat(backend, texts, new) for _ in range(setting.pick(4, 2))][1:]
    rates = [run["decode_tokens_per_second"] for run in runs]
    context = len(texts[0]) + (new + 1) / 2  # mean while decoding
    return {
        "sequences": sequences, "context": context, "tokens_per_second": statistics.median(rates), "runs": rates,
        "peak_bytes": peak_bytes(setting),
    }  # fmt: skip


def prefill(backend: Any, setting: Setting) -> Result:
    """Seconds until the scores behind a 2,048-token prompt are on the host."""
    texts = prompts(setting, 1, LONG_PROMPT)
    seconds = [repeat(backend, texts, 0)["ttft_seconds"] for _ in range(setting.pick(8, 2))]
    return {"prompt_tokens": len(texts[0]), "first_seconds": seconds[0], "ttft_seconds": statistics.median(seconds[2:] or seconds)}


def prefill_profile(backend: Any, setting: Setting) -> Result:
    """The kernels of a 2,048-token prompt."""
    texts = prompts(setting, 1, LONG_PROMPT)
    repeat(backend, texts, 0)
    return profiled(setting, lambda: repeat(backend, texts, 0)) | {"prompt_tokens": len(texts[0])}


def prefill_scores(backend: Any, setting: Setting) -> Result:
    """How far a 2,048-token prompt's scores are from those of the model's own operations."""
    (tokens,) = prompts(setting, 1, LONG_PROMPT)
    with torch.inference_mode():
        expected = backend.model(torch.from_numpy(tokens).long().to(setting.device)[None])[0]
        difference = relative(backend.prompts.read(tokens, len(tokens), torch.clone)[1], expected)
    if not difference <= MODEL_ROUNDING:
        raise ArithmeticError(f"scores of prompts differ by {difference:.1e} from the model's; {MODEL_ROUNDING} is allowed")
    return {"difference": difference}


def decode_profile(backend: Any, setting: Setting) -> Result:
    """The kernels of one decoded token; without early launches, whose waiting would count as theirs."""
    from zamba2.bench.measure import likeliest
    from zamba2.runtime.backend import Row

    state, (tokens,) = backend.new_state(), prompts(setting, 1, PROMPT)

    def step() -> None:
        nonlocal tokens
        (tokens,) = likeliest(backend.forward([Row(tokens, state)]))

    early, backend.decoder.early = backend.decoder.early, False
    backend.decoder.graphs.clear()
    for _ in range(setting.pick(3, 1)):
        step()
    found = profiled(setting, step)
    backend.decoder.early = early
    backend.decoder.graphs.clear()
    return found


# ---- rival: transformers' own class -----------------------------------------------------------------------------------------


def rival(setting: Setting) -> Iterator[Result]:
    """transformers' own Zamba2ForCausalLM as it comes: its PyTorch path."""
    yield from rival_speed(setting)


def rival_kernels(setting: Setting) -> Iterator[Result]:
    """The same with mamba-ssm's Triton kernels for the scan and the step; causal_conv1d is a compiled extension, so that stays torch's."""
    yield use_mamba_kernels(setting)
    yield from rival_speed(setting)


def use_mamba_kernels(setting: Setting) -> Result:
    """Before transformers is imported, which takes single functions of mamba_ssm where they can be imported."""
    stand_in_mamba(setting)
    combined: Any = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    combined.mamba_split_conv1d_scan_combined = None  # would call causal_conv1d's extension
    importlib.import_module("mamba_ssm.ops.triton.selective_state_update")
    return {"path": "mamba-ssm's Triton kernels (scan, step), torch's convolution"}


def rival_model(setting: Setting) -> Any:
    """Random bf16 weights of our shape in transformers' class."""
    from zamba2.bench.rivals import random_model

    return random_model(setting.config.to_dict(), BF16, setting.device)


def rival_speed(setting: Setting) -> Iterator[Result]:
    """Its ``generate``, the user's own call."""
    from zamba2.bench.transformers_peer import generate

    model = rival_model(setting)

    def asked(length: int) -> Tensor:
        return torch.from_numpy(prompts(setting, 1, length)[0]).long().to(setting.device)[None]

    new = setting.pick(32, 3)
    # the processor that launches its kernels decides: 11 and 20 tokens/s in two runs
    runs = [generate(model, asked(PROMPT), new)["decode_tokens_per_second"] for _ in range(setting.pick(6, 2))]
    yield {"decode": {"tokens_per_second": statistics.median(runs[1:]), "runs": runs}}
    free_memory(setting)
    seconds = [generate(model, asked(LONG_PROMPT), 1)["ttft_seconds"] for _ in range(setting.pick(4, 2))]
    yield {"prefill": {"ttft_seconds": statistics.median(seconds[1:]), "runs": seconds, "peak_bytes": peak_bytes(setting)}}


# ---- documents: packed batches ----------------------------------------------------------------------------------------------

# Of hidden states, of all gradients together, of each. fp32, which decides: tests/op_cases.MODEL. bf16: documents are cut into chunks at
# other places in a row than alone, and so are rounded otherwise (6.6e-2 of all gradients on an H200); this only catches what is broken.
DOCUMENT_BOUNDS = {torch.float32: (2e-4, 1e-3, 1e-3), BF16: (3e-2, 1e-1, 0.5)}


def documents(setting: Setting) -> Iterator[Result]:
    """A packed row of four documents gives the hidden states and the gradients that they give one by one; true width, nine layers."""
    config = dataclasses.replace(setting.config, num_hidden_layers=9, hybrid_layer_ids=(2, 5, 8)) if not setting.tiny else TOY
    lengths = setting.pick((700, 1, 900, 447), (9, 1, 12, 6))
    for dtype, bounds in DOCUMENT_BOUNDS.items():
        compare = partial(packed_and_separate, setting, config, dtype, lengths, bounds)
        yield {str(dtype).removeprefix("torch."): attempt(setting, compare)}


def packed_and_separate(
    setting: Setting, config: Config, dtype: torch.dtype, lengths: tuple[int, ...], bounds: tuple[float, float, float]
) -> Result:  # fmt: skip
    """Errors of a packed row relative to its documents read one by one."""
    model = random_zamba2(config, setting.device, dtype, trained=True)
    ids = torch.randint(3, config.vocab_size, (1, sum(lengths)), device=setting.device)
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(setting.device)[None]
    direction = torch.randn(1, sum(lengths), config.hidden_size, device=setting.device, dtype=dtype)
    packed = model.hidden_states(ids, seq_idx=numbers)
    packed.backward(direction)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    hidden = []
    for part, towards, found in zip(ids.split(lengths, 1), direction.split(lengths, 1), packed.split(lengths, 1), strict=True):
        alone = model.hidden_states(part)
        alone.backward(towards)
        hidden.append(relative(found, alone))
    own = {name: parameter.grad for name, parameter in model.named_parameters()}
    errors = {name: relative(gradients[name], own[name]) for name in own}
    sizes = {name: float(own[name].double().norm()) for name in own}
    together = math.hypot(*(errors[name] * sizes[name] for name in own)) / math.hypot(*sizes.values())
    worst = max(errors, key=lambda name: errors[name])
    bad = [f"document {number}: {error:.1e}" for number, error in enumerate(hidden) if not error <= bounds[0]]
    bad += [] if together <= bounds[1] else [f"all gradients together: {together:.1e}"]
    bad += [f"gradient of {name}: {error:.1e}" for name, error in errors.items() if not error <= bounds[2]]
    return {"hidden_states": hidden, "gradients": together, "worst_gradient": (worst, errors[worst]), "bounds": bounds, "failures": bad}


# ---- train: one step of supervised fine-tuning ------------------------------------------------------------------------------


def train(setting: Setting) -> Iterator[Result]:
    """Ours: batch 1 x 2,048 tokens, bf16 weights and optimizer states, gradients of all weights; the two passes as a recipe with
    ``graph: true`` has them, one CUDA graph, then without."""
    from zamba2.train.graph import GraphedStep

    model = random_zamba2(setting.config, setting.device, BF16, trained=True)
    ids, labels = training_batch(setting)

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        return mean_loss(model, model.hidden_states(ids)[0], labels[0])

    yield train_operations(setting)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    both = GraphedStep(loss, model.parameters())

    def graphed(clock: Clock) -> None:
        clock.mark()
        both(ids=ids, labels=labels)
        clock.mark()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.mark()

    graph = attempt(setting, lambda: step_times(setting, graphed) | {"profile": profiled(setting, lambda: graphed(Clock(setting)))})
    yield graph if "error" not in graph else {"graph": graph}
    both.captured.clear()
    step = training_step(setting, optimizer, lambda: loss(ids, labels))
    eager = step_times(setting, step, 3)
    yield {"without_graph": eager} if "error" not in graph else eager


def mean_loss(model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """Of next tokens. hidden: (T, H); labels: (T,)."""
    from zamba2.model.ops.triton_loss import linear_cross_entropy

    total, count = linear_cross_entropy(hidden[:-1], model.embed_tokens.weight, labels[1:])
    found: Tensor = total / count
    return found


def training_batch(setting: Setting) -> tuple[Tensor, Tensor]:
    """Random tokens and labels, (1, T)."""
    generator = torch.Generator().manual_seed(setting.seed)
    shape = (1, setting.pick(LONG_PROMPT, 16))
    ids, labels = (torch.randint(3, setting.config.vocab_size, shape, generator=generator).to(setting.device) for _ in range(2))
    return ids, labels


def train_operations(setting: Setting) -> Result:
    """Of a step: six per weight and token, and those of causal attention (forward 2 T^2 width per layer, backward twice that)."""
    config, length = setting.config, setting.pick(LONG_PROMPT, 16)
    weights = 6.0 * config.weights_per_token() * length
    return {"operations": weights, "attention_operations": 6.0 * length**2 * config.attention_hidden_size * len(config.hybrid_layer_ids)}


def training_step(setting: Setting, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Callable[[Clock], None]:
    """A step that marks the ends of forward, backward and update."""

    def step(clock: Clock) -> None:
        clock.mark()
        value = loss()
        clock.mark()
        value.backward()
        clock.mark()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.mark()

    return step


def step_times(setting: Setting, step: Callable[[Clock], None], repeats: int = 6) -> Result:
    """Medians after two steps to warm up; seconds of forward, backward and update are of the same steps."""
    free_memory(setting)
    start = time.perf_counter()
    step(Clock(setting))
    step(Clock(setting))
    if setting.cuda:
        torch.cuda.synchronize()
    warm_seconds, runs = time.perf_counter() - start, []
    for _ in range(setting.pick(repeats, 1)):
        clock = Clock(setting)
        step(clock)
        runs.append(clock.seconds())
    medians = [statistics.median(part) for part in zip(*runs, strict=True)]
    return {
        "seconds": statistics.median(map(sum, runs)), "parts_seconds": medians, "warm_up_seconds": warm_seconds,
        "peak_bytes": peak_bytes(setting), "tokens": setting.pick(LONG_PROMPT, 16),
    }  # fmt: skip


def rival_train(setting: Setting) -> Iterator[Result]:
    """transformers' own class, its PyTorch path, the same step; with gradient checkpointing if it does not fit without."""
    yield from rival_step(setting)


def rival_train_kernels(setting: Setting) -> Iterator[Result]:
    """The same with mamba-ssm's Triton kernel for the scan."""
    yield use_mamba_kernels(setting)
    yield from rival_step(setting)


def rival_step(setting: Setting) -> Iterator[Result]:
    model = rival_model(setting).train().requires_grad_(True)
    ids, labels = training_batch(setting)

    def loss() -> Tensor:
        found: Tensor = model(input_ids=ids, labels=labels, use_cache=False).loss
        return found

    step = training_step(setting, torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True), loss)
    try:
        yield step_times(setting, step, 3) | {"checkpointing": False}
        return
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
    yield {"without checkpointing": reason}
    model.zero_grad(set_to_none=True)
    model.gradient_checkpointing_enable()
    yield step_times(setting, step, 3) | {"checkpointing": True}


# ---- the table --------------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A line of the table. ratio: measured over limit or rival, of times and bytes the other way round; goal: the least of it."""

    what: str
    measured: str
    beside: str
    ratio: float
    goal: float | None

    def __str__(self) -> str:
        reached = "" if self.goal is None else "yes" if self.ratio >= self.goal else "no"
        goal = "" if self.goal is None else f"{self.goal:g}"
        return f"| {self.what} | {self.measured} | {self.beside} | {self.ratio:.2f} | {goal} | {reached} |"


def lines(results: Result) -> list[Line]:
    """What the results say beside limits, rivals and goals; what was not measured is left out."""
    config = Config.from_dict(results["config"])
    found: list[Line] = []
    for part in (inference_lines, scan_lines, train_lines):
        found += part(results, config)
    return found


def reach(results: Result, *path: str) -> Any:
    """A value deep in the results, or None."""
    for key in path:
        results = results.get(key) if isinstance(results, dict) else None  # type: ignore[assignment]
    return results


def inference_lines(results: Result, config: Config) -> Iterator[Line]:
    """Fractions of bytes over the measured copy rate, and of operations over the measured product rate."""
    copy, product = (reach(results, "machine", key) for key in ("copy_bytes_per_second", "product_operations_per_second"))
    weights = 2.0 * config.weights_per_token()
    decode, read = reach(results, "generate", "decode", "tokens_per_second"), reach(results, "generate", "prefill", "ttft_seconds")
    if decode and copy:
        limit = copy / weights
        yield Line("decode, one sequence, bf16", f"{decode:.1f} tokens/s", f"limit by bytes {limit:.1f}", decode / limit, 0.65)
    tokens = reach(results, "generate", "prefill", "prompt_tokens")
    if read and product:
        limit = prefill_operations(config, tokens) / product
        yield Line(f"prompt of {tokens} tokens, bf16", milliseconds(read), f"limit by operations {milliseconds(limit)}", limit / read, 0.45)
    for section, name in (("rival", "transformers"), ("rival_kernels", "transformers with mamba-ssm's Triton kernels")):
        theirs, their_read = reach(results, section, "decode", "tokens_per_second"), reach(results, section, "prefill", "ttft_seconds")
        if decode and theirs:
            yield Line("decode, one sequence, bf16", f"{decode:.1f} tokens/s", f"{name} {theirs:.1f}", decode / theirs, 10)
        if read and their_read:
            yield Line(f"prompt of {tokens} tokens, bf16", milliseconds(read), f"{name} {milliseconds(their_read)}", their_read / read, 3)
    batch = reach(results, "generate", "batch")
    if batch and copy and "error" not in batch:
        state = 2 * (config.ssm_state_bytes + config.conv_state_bytes(2))
        bytes_of_step = weights + batch["sequences"] * (state + config.kv_bytes_per_token() * batch["context"])
        limit, rate = copy / bytes_of_step * batch["sequences"], batch["tokens_per_second"]
        what = f"decode, {batch['sequences']} sequences, bf16"
        yield Line(what, f"{rate:.0f} tokens/s", f"limit by bytes {limit:.0f}", rate / limit, 0.6)
    for format, goal in (("q8", None), ("q4", 1.8)):
        packed = reach(results, "generate", format, "tokens_per_second")
        if packed and decode:
            yield Line(f"decode, one sequence, {format}", f"{packed:.1f} tokens/s", f"bf16 {decode:.1f}", packed / decode, goal)


def scan_lines(results: Result, config: Config) -> Iterator[Line]:
    for name in results.get("scan", {}):
        for run, title in (("forward", "forward"), ("forward_backward", "forward + backward")):
            ours, theirs = (reach(results, "scan", name, side, run) for side in ("ours", "mamba_ssm"))
            if not ours or not theirs or "error" in ours or "error" in theirs:
                continue
            speed, memory = theirs["seconds"] / ours["seconds"], theirs["peak_bytes"] / max(1, ours["peak_bytes"])
            yield Line(f"scan {name}, {title}", milliseconds(ours["seconds"]), f"mamba-ssm {milliseconds(theirs['seconds'])}", speed, 1.0)
            beside = f"mamba-ssm {theirs['peak_bytes'] / 1e6:.0f} MB"
            yield Line(f"scan {name}, {title}, memory", f"{ours['peak_bytes'] / 1e6:.0f} MB", beside, memory, 1.0)


def train_lines(results: Result, config: Config) -> Iterator[Line]:
    ours, product = reach(results, "train", "seconds"), reach(results, "machine", "product_operations_per_second")
    if not ours:
        return
    # a graph keeps what passes launched one by one allocate, but PyTorch counts it only while it is captured
    memory = max(results["train"]["peak_bytes"], reach(results, "train", "without_graph", "peak_bytes") or 0)
    operations = results["train"]["operations"]
    if product:
        limit = operations / product
        yield Line("training step", milliseconds(ours), f"limit by operations {milliseconds(limit)}", limit / ours, 0.35)
    for section, name in (("rival_train", "transformers"), ("rival_train_kernels", "transformers with mamba-ssm's Triton kernels")):
        theirs = results.get(section, {})
        if not theirs.get("seconds"):
            continue
        name += ", checkpointing" if theirs["checkpointing"] else ""
        yield Line("training step", milliseconds(ours), f"{name} {milliseconds(theirs['seconds'])}", theirs["seconds"] / ours, 2.0)
        beside = f"{name} {theirs['peak_bytes'] / 1e9:.1f} GB"
        yield Line("training step, memory", f"{memory / 1e9:.1f} GB", beside, theirs["peak_bytes"] / max(1, memory), 1.0)


def milliseconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def table(results: Result) -> str:
    """In Markdown."""
    head = ["| what | measured | limit or rival | ratio | goal | reached |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *map(str, lines(results))])


# ---- running ----------------------------------------------------------------------------------------------------------------


class Section(NamedTuple):
    """run: yields results; seconds: after which it is ended; check: it may run beside others, as nothing is timed; rehearsed: it runs
    beside the checks too, unmeasured, so that kernels are compiled; imports: modules that may be there before it begins."""

    run: Callable[[Setting], Iterator[Result]]
    seconds: int
    check: bool = False
    rehearsed: bool = False
    imports: tuple[str, ...] = ("zamba2.runtime.torch",)


THEIRS = ("zamba2.bench.transformers_peer", "transformers.models.zamba2.modeling_zamba2")
SECTIONS = {
    "ops": Section(ops, 240, check=True, imports=()),
    "tests": Section(tests, 240, check=True, imports=()),
    "documents": Section(documents, 240, check=True),
    "machine": Section(machine, 60, imports=()),
    "generate": Section(generate, 150),
    "rival_kernels": Section(rival_kernels, 90, rehearsed=True, imports=()),  # what transformers finds is decided first
    "train": Section(train, 90, imports=("zamba2.model.model", "zamba2.model.ops.triton_loss", "zamba2.train.graph")),
    "rival_train_kernels": Section(rival_train_kernels, 90, imports=()),
    "scan": Section(scan, 150, rehearsed=True, imports=("zamba2.model.ops.triton_scan",)),
    "rival": Section(rival, 90, imports=THEIRS),
    "rival_train": Section(rival_train, 90, imports=THEIRS),
}
OWN_KERNELS = "generate"  # this section compiles anew, to time it


def child(name: str, setting: Setting) -> None:
    """Run a section, once standard input says so; results go as JSON lines to standard output, all else that is printed to standard
    error."""
    records = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.manual_seed(setting.seed)
    if not setting.cuda:
        importlib.import_module("triton_interpreter")  # of the tests
    for module in SECTIONS[name].imports:
        with suppress(ImportError):  # the section says what is not there
            importlib.import_module(module)
    if not sys.stdin.readline():
        return
    try:
        for result in SECTIONS[name].run(setting):
            print(json.dumps(result), file=records, flush=True)
    except (NotThereError, ModuleNotFoundError) as error:
        print(json.dumps({"not there": str(error)}), file=records, flush=True)


class Child:
    """A section in a process that has what it imports and waits; ``run`` lets it begin."""

    def __init__(self, name: str, setting: Setting, kernels: Path) -> None:
        self.own = tempfile.mkdtemp(prefix="zamba2-gpu-") if name == OWN_KERNELS else None
        environment = os.environ | {"TRITON_CACHE_DIR": self.own or str(kernels), "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
        if not setting.cuda:
            environment["TRITON_INTERPRET"] = "1"
        self.over = False
        # open as long as the process is
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--section", name, "--setting", json.dumps(asdict(setting))], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment, start_new_session=True,
        )  # fmt: skip

    def run(self, limit: float, keep: Callable[[Result], None]) -> Result:
        """The section's results, ``keep`` being called for each that comes. A failure is a result: "error"."""
        start, found, process = time.perf_counter(), Result(), self.process
        ended = threading.Event()

        def end() -> None:
            ended.set()
            self.end()

        timer = threading.Timer(limit, end)
        timer.start()
        assert process.stdin is not None and process.stdout is not None
        try:
            with suppress(BrokenPipeError):  # it ended early, and its code says so
                process.stdin.write("begin\n")
                process.stdin.close()
            for line in process.stdout:
                with suppress(json.JSONDecodeError):  # cut off, where it was ended
                    found |= json.loads(line)
                keep(found)
            code = process.wait()
        finally:
            timer.cancel()
            self.end()
        self.log.seek(0)
        said = self.log.read()[-4000:]
        if notices := [line for line in said.splitlines() if line.startswith("zamba2: ")]:
            found["failures"] = found.get("failures", []) + notices  # something ran in another way than the one to be measured
        if ended.is_set():
            found["error"] = f"{said}\nended after {limit:.0f} seconds"
        elif code:
            found["error"] = f"ended with code {code}\n{said}"
        return found | {"duration_seconds": time.perf_counter() - start}

    def end(self) -> None:
        """At once, with all that it began; a second time nothing, as its number may be another's then."""
        if self.over:
            return
        self.over = True
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.own is not None:
            shutil.rmtree(self.own, ignore_errors=True)


def outcome(found: Result) -> str:
    """In a few words."""
    if "error" in found:
        return f"failed: {found['error'].strip().splitlines()[-1][:200]}"
    bad = len(failures(found))
    return f"{bad} failures" if bad else f"not there: {found['not there']}" if "not there" in found else "done"


def failures(results: Any, name: str = "") -> list[str]:
    """All that failed, with where: "error" and the entries of "failures", at any depth."""
    found: list[str] = []
    if isinstance(results, dict):
        for key, value in results.items():
            if key == "error" and isinstance(value, str):
                found.append(f"{name}: {value.strip().splitlines()[-1] if value.strip() else 'ended without a word'}")
            elif key == "failures":
                found += [f"{name}: {one.splitlines()[0]}" for one in value]
            else:
                found += failures(value, f"{name} {key}".strip())
    return found


class Run:
    """All chosen sections, within a time; gpu.json is written behind each result."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        seed = time.time_ns() % 1_000_000_007
        mamba = None if arguments.mamba is None else str(arguments.mamba.resolve())
        self.setting = Setting(arguments.device, arguments.tiny, mamba, seed)
        self.names = [name for name in SECTIONS if name in (arguments.only or SECTIONS)]
        self.budget, self.start = arguments.budget, time.perf_counter()
        self.target = arguments.out / "gpu.json"
        self.results: Result = {"config": self.setting.config.to_dict(), "setting": asdict(self.setting)}
        self.lock = threading.Lock()
        self.kept = arguments.kernels is not None
        self.kernels = arguments.kernels.resolve() if self.kept else Path(tempfile.mkdtemp(prefix="zamba2-gpu-"))
        self.kernels.mkdir(parents=True, exist_ok=True)
        self.children: list[Child] = []
        print(f"seed {seed}", flush=True)

    def keep(self, name: str, found: Result) -> None:
        with self.lock:
            self.results[name] = dict(found)
            self.write()

    def write(self) -> None:
        """The results so far, whole at any moment: whoever ends this run asks nothing before."""
        beside = self.target.with_suffix(".part")
        beside.write_text(json.dumps(self.results, indent=1) + "\n")
        beside.replace(self.target)

    def ready(self, name: str) -> Child:
        self.children.append(Child(name, self.setting, self.kernels))
        return self.children[-1]

    def section(self, name: str, one: Child, keep: bool = True) -> None:
        left = self.budget - (time.perf_counter() - self.start)
        if left < 5:
            one.end()
            found: Result = {"error": "not begun: the time was used up"}
        else:
            limit = left if self.setting.tiny else min(left, SECTIONS[name].seconds)
            found = one.run(limit, partial(self.keep, name) if keep else lambda _: None)
        if keep:
            self.keep(name, found)
        so_far, title = time.perf_counter() - self.start, name if keep else f"{name}, unmeasured"
        print(f"{so_far:5.0f} s  {title}: {found.get('duration_seconds', 0):.1f} s, {outcome(found)}", flush=True)

    def all(self) -> None:
        try:
            checks = [name for name in self.names if SECTIONS[name].check]
            measured = [name for name in self.names if not SECTIONS[name].check]
            with ThreadPoolExecutor(len(SECTIONS)) as together:
                futures = [together.submit(self.section, name, self.ready(name)) for name in checks]
                if checks and self.setting.mamba is not None:
                    rehearsed = [name for name in measured if SECTIONS[name].rehearsed]
                    futures += [together.submit(self.section, name, self.ready(name), False) for name in rehearsed]
                try:
                    for future in futures:
                        future.result()
                finally:  # interrupted, threads wait for their sections
                    self.end()
            waiting = [self.ready(name) for name in measured[:1]]
            for number, name in enumerate(measured):
                waiting += [self.ready(after) for after in measured[number + 1 : number + 2]]  # imports meanwhile
                self.section(name, waiting[number])
        finally:
            self.end()
            if not self.kept:
                shutil.rmtree(self.kernels, ignore_errors=True)

    def end(self) -> None:
        for one in self.children:
            one.end()

    def report(self) -> int:
        """Prints what came of it; returns the exit code."""
        results, seconds = self.results, time.perf_counter() - self.start
        results |= {"duration_seconds": seconds, "table": [line._asdict() for line in lines(results)]}
        self.write()
        bad = failures(results)
        print("\n".join([*(f"FAILED {one[:300]}" for one in bad[:20]), table(results)]))
        print(f"{len(bad)} failures, {seconds:.0f} s", flush=True)
        return 1 if bad else 0


def run(arguments: argparse.Namespace) -> int:
    """All chosen sections; returns the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a child in the making is ended too
    arguments.out.mkdir(parents=True, exist_ok=True)
    running = Run(arguments)
    running.all()
    return running.report()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder for gpu.json (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--mamba", type=Path, help="folder that holds the package mamba_ssm")
    parser.add_argument("--kernels", type=Path, metavar="FOLDER", help="keep what Triton compiles here, for the next run")
    parser.add_argument("--budget", type=float, default=480, help="seconds after which no section goes on (%(default)s)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try this script")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of an earlier run's gpu.json")
    parser.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(json.loads(arguments.table.read_text())))
        return 0
    if arguments.section is not None:
        child(arguments.section, Setting(**json.loads(arguments.setting)))
        return 0
    try:
        return run(arguments)
    except KeyboardInterrupt:
        print(f"interrupted; {arguments.out / 'gpu.json'} has what was found before", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
