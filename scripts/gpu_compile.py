#!/usr/bin/env python3
"""Compiles the GPU's kernels where there is no GPU, as each architecture would, at the models' true shapes.

    python scripts/gpu_compile.py                                                   # everything: 40 minutes on two cores
    python scripts/gpu_compile.py --arch 8.9 --model 2.7b --kind q4                 # a card, a model and a format: minutes
    python scripts/gpu_compile.py --arch 8.9 --model 2.7b --kernel _output --every  # one kernel, each variant

Tensors are PyTorch's fake ones, which have shapes and no memory: kernels are noted where they would be launched, and compiled behind that
by Triton and its ptxas. For each the table has the most registers, bytes of stack (what did not fit into registers) and shared memory of
its variants. Exit code 1 where one does not compile, or wants more shared memory than the architecture has: it would not start there.
Needs g++ where PyTorch was built without CUDA. The last line of standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from zamba2.config import PRESETS, Config  # noqa: E402
from zamba2.model import model as model_module  # noqa: E402
from zamba2.model.model import Attention, Zamba2  # noqa: E402
from zamba2.model.ops import triton_conv, triton_loss, triton_norms, triton_scan  # noqa: E402
from zamba2.runtime.decoder import BUCKETS, Decoder  # noqa: E402
from zamba2.runtime.prompts import Prompts  # noqa: E402
from zamba2.weights.checkpoint import FP32_PARTS, packed_model  # noqa: E402
from zamba2.weights.packed import Packing, Part  # noqa: E402

# Shared memory of one program in KiB, by compute capability (CUDA's programming guide, "Technical Specifications per Compute Capability").
SHARED = {"8.0": 163, "8.6": 99, "8.9": 99, "9.0": 227, "10.0": 227, "12.0": 99}  # A100, RTX 30 and 40, H100 and H200, B200, RTX 50
DEVICE = torch.device("cuda", 0)
TOKENS = 2048  # of a prompt, and of a training step
PLAIN, PACKED = ("bfloat16", "float32", "float16"), ("q4", "q8")
Launch = tuple[JITFunction[Any], tuple[Any, ...], dict[str, Any]]
Found = dict[str, Any]  # kernel, registers, stack and shared bytes; or kernel and error


# ---- a GPU that is not there -----------------------------------------------------------------------------------------


class Device:
    """What Triton asks of a driver. Each architecture is a device of its own, for it keeps what it compiled by device."""

    arch = "9.0"

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(self.arch.replace(".", "")), 32)

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, device: str) -> int:
        return 0


class Mock:
    """What Triton reads of a tensor that a kernel is compiled for."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self.offset = tensor.dtype, tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self.offset % 16  # storages begin at multiples of 16

    def ptr_range(self) -> int:
        return 0


@cache
def pretend() -> Device:
    """Have PyTorch and Triton believe in a GPU, in this process for good."""
    if not torch.backends.cuda.is_built():
        with tempfile.TemporaryDirectory() as folder:
            source, library, home = Path(folder, "guard.cpp"), Path(folder, "guard.so"), Path(torch.__file__).parent
            source.write_text(
                "#include <c10/core/impl/DeviceGuardImplInterface.h>\n"
                "namespace { C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>) }\n"
            )
            compiler = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}", str(source), f"-L{home / 'lib'}", "-lc10"]
            subprocess.run([*compiler, "-o", str(library)], check=True)
            ctypes.CDLL(str(library))
    device = Device()
    driver.set_active(device)
    idle = SimpleNamespace(synchronize=lambda: None, record=lambda: None)
    for name, value in {
        "is_available": lambda: True, "is_bf16_supported": lambda *_: True, "Event": lambda **_: idle, "device": lambda *_: nullcontext(),
        "get_device_capability": lambda *_: tuple(map(int, device.arch.split("."))),
        "get_device_properties": lambda *_: SimpleNamespace(shared_memory_per_multiprocessor=1024 * (SHARED[device.arch] + 1)),
    }.items():  # fmt: skip
        setattr(torch.cuda, name, value)
    FakeTensor.numpy = lambda self, **_: np.zeros(tuple(self.shape), np.int32)
    model_module.causal_lower_right = lambda *_: None  # fake tensors cannot be its mask, and PyTorch's kernels are not asked for here
    for module in (triton_conv, triton_loss, triton_norms, triton_scan):
        for name in dir(module):
            function = getattr(module, name)
            if isinstance(function, type) and issubclass(function, torch.autograd.Function) and function.__module__ == module.__name__:
                function.apply = both_ways(function)
    return device


def both_ways(function: Any) -> Callable[..., Any]:
    """Its ``apply``, which runs the backward pass at once: PyTorch's own would want a device."""
    apply = function.apply

    def applied(*given: Any) -> Any:
        outputs = apply(*given)
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        made = next((output.grad_fn for output in several if output.grad_fn is not None), None)
        if made is not None:
            with torch.no_grad():
                function.backward(made, *(torch.empty_like(output) for output in several))
        return outputs

    return applied


@contextmanager
def noted() -> Iterator[list[Launch]]:
    """The launches in this context, none of which is made."""
    launches: list[Launch] = []
    run = JITFunction.run

    def note(self: JITFunction[Any], *given: Any, grid: Any, warmup: bool, **options: Any) -> None:
        mocked = {name: Mock(value) if isinstance(value, Tensor) else value for name, value in options.items()}
        launches.append((self, tuple(Mock(value) if isinstance(value, Tensor) else value for value in given), mocked))

    JITFunction.run = note
    try:
        yield launches
    finally:
        JITFunction.run = run


# ---- work ------------------------------------------------------------------------------------------------------------


def fake_model(config: Config, kind: str, *, trained: bool = False) -> Zamba2:
    """A model on the device as a checkpoint is loaded: in a dtype, or packed."""
    if kind in PACKED:
        packing = Packing.named(kind)

        def read(part: Part) -> Tensor:
            size, dtype = (packing.nbytes(part), torch.uint8) if part.is_matrix else (part.count, torch.float32)
            return torch.empty(size, dtype=dtype, device=DEVICE)

        return packed_model(config, packing, read)
    with torch.device("meta"):
        model = Zamba2(config)
    for above, module in model.named_modules():
        for name, given in module.named_parameters(recurse=False):
            small = f"{above}.{name}".endswith(FP32_PARTS)
            made = torch.empty(given.shape, dtype=torch.float32 if small else getattr(torch, kind), device=DEVICE)
            setattr(module, name, nn.Parameter(made, requires_grad=trained))
    return model


def inference(config: Config, kind: str) -> Zamba2:
    model = fake_model(config, kind)
    for module in model.modules():
        if isinstance(module, Attention):
            module.split_for_inference()
    return model


def prompt(config: Config, kind: str) -> None:
    """The beginning of a text, and what comes behind it."""
    model = inference(config, kind)
    Prompts(model)._compute(TOKENS)
    state = model.new_state()
    for length in (TOKENS, TOKENS // 2):
        model.logits(model.hidden_states(torch.zeros(1, length, dtype=torch.int64, device=DEVICE), state=state)[:, -1:])


def decode(config: Config, kind: str) -> None:
    decoder = Decoder(inference(config, kind))
    for count in BUCKETS:
        decoder._token(count)


def training(config: Config, kind: str) -> None:
    """Packed rows, forward and backward, in bf16 beside fp32 weights."""
    model = fake_model(config, "float32", trained=True)
    with torch.autocast("cuda", dtype=getattr(torch, kind), enabled=kind != "float32"):
        ids = torch.zeros(2, TOKENS, dtype=torch.int64, device=DEVICE)
        x = model.hidden_states(ids, seq_idx=ids)
        head = model.embed_tokens if model.lm_head is None else model.lm_head
        triton_loss.linear_cross_entropy(x.flatten(0, 1), head.weight, ids.flatten())


WORK: dict[str, tuple[Callable[[Config, str], None], tuple[str, ...]]] = {
    "prompt": (prompt, PLAIN + PACKED), "decode": (decode, PLAIN + PACKED), "training": (training, ("bfloat16", "float32")),
}  # fmt: skip


def launches_of(arch: str, model: str, work: str, kind: str) -> list[Launch]:
    """What a model would launch. kind: a dtype or a packed format."""
    pretend().arch = arch
    with FakeTensorMode(), torch.inference_mode(work != "training"), noted() as launches:
        WORK[work][0](PRESETS[model], kind)
    return launches


# ---- compiling -------------------------------------------------------------------------------------------------------


def compiled(names: list[str] | None, arch: str, model: str, work: str, kind: str) -> list[Found]:
    """What the kernels of some work take, each variant once. names: of the kernels (None for all)."""
    found: dict[Any, Found] = {}
    for kernel, given, options in launches_of(arch, model, work, kind):
        if names is not None and kernel.fn.__name__ not in names:
            continue
        try:
            with quiet():
                made = kernel.warmup(*given, grid=(1,), **options)
        except Exception as error:  # whatever the compiler says
            found[kernel.fn.__name__, str(error)] = {"kernel": kernel.fn.__name__, "error": str(error).splitlines()[0]}
            continue
        if made.hash not in found:
            registers, stack = usage(made.asm["cubin"])
            values = {p.name: value for p, value in zip(kernel.params, given, strict=False)} | options
            chosen = ("num_warps", "num_stages", "maxnreg")
            variant = {name: str(value) for name, value in values.items() if name.isupper() or name in chosen}
            found[made.hash] = {
                "kernel": kernel.fn.__name__, "registers": registers, "stack": stack, "shared": made.metadata.shared,
                "variant": {"model": model, "work": work, "kind": kind} | variant,
            }  # fmt: skip
    return list(found.values())


@contextmanager
def quiet() -> Iterator[None]:
    """Without standard error, where the compiler writes a kernel of many thousand lines that it fails on."""
    sys.stderr.flush()
    with open(os.devnull, "w") as nowhere:
        before = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        said = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    (registers,), (stack,) = re.findall(r"REG:(\d+)", said), re.findall(r"STACK:(\d+)", said)
    return int(registers), int(stack)


def table(arch: str, found: list[Found]) -> list[Found]:
    """One row a kernel: the most that its variants take."""
    rows = []
    for name in sorted({entry["kernel"] for entry in found}):
        own = [entry for entry in found if entry["kernel"] == name]
        fine = [entry for entry in own if "error" not in entry]
        rows.append(
            {"arch": arch, "kernel": name, "variants": len(own), "errors": sorted({entry["error"] for entry in own if "error" in entry})}
            | {what: max((entry[what] for entry in fine), default=0) for what in ("registers", "stack", "shared")}
        )
    return rows


def too_much(row: Found) -> bool:
    return bool(row["errors"]) or row["shared"] > 1024 * SHARED[row["arch"]]


def show(row: Found) -> str:
    """A line of the table."""
    limit = f"{row['shared'] / 1024:.0f} of {SHARED[row['arch']]}"
    line = f"{row['arch']:>5} {row['kernel']:24} {row['variants']:8} {row['registers']:9} {row['stack']:6} {limit:>12}"
    return line + ("  does not start" if too_much(row) else "") + "".join(f"\n      {error}" for error in row["errors"])


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--arch", nargs="*", choices=SHARED, default=list(SHARED), help="compute capabilities")
    options.add_argument("--model", nargs="*", choices=PRESETS, default=list(PRESETS))
    options.add_argument("--work", nargs="*", choices=WORK, default=list(WORK))
    options.add_argument("--kind", nargs="*", choices=PLAIN + PACKED, default=list(PLAIN + PACKED), help="dtypes and packed formats")
    options.add_argument("--kernel", nargs="*", help="names of functions (default: all)")
    options.add_argument("--every", action="store_true", help="show each variant of a kernel, too")
    options.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    chosen = options.parse_args(argv)
    rows: list[Found] = []
    print(f"{'arch':>5} {'kernel':24} variants registers  stack  shared, KiB")
    with ProcessPoolExecutor(chosen.jobs, get_context("spawn")) as pool:
        for arch in chosen.arch:
            jobs = [(arch, m, w, k) for m, w, k in product(chosen.model, chosen.work, chosen.kind) if k in WORK[w][1]]
            found = [entry for part in pool.map(partial(compiled, chosen.kernel), *zip(*jobs, strict=True)) for entry in part]
            for row in table(arch, found):
                print(show(row), flush=True)
                for entry in found if chosen.every else ():
                    if entry["kernel"] == row["kernel"] and "variant" in entry:
                        print(" " * 31 + f"{entry['registers']:18} {entry['stack']:6} {entry['shared'] / 1024:5.0f}  {entry['variant']}")
                rows.append(row)
    print(json.dumps({"triton": triton.__version__, "torch": torch.__version__, "kernels": rows}))
    return int(any(map(too_much, rows)))


if __name__ == "__main__":
    sys.exit(main())
