"""The cases that every implementation of the six ops passes, and every tolerance of the numerical tests.

A case is an op, its sizes and a dtype; ``inputs`` makes its arguments from a seed. The truth is ``ops.reference`` in fp64 on
the same (rounded) arguments. A new implementation adds its name to ``implementations`` and nothing else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zamba2.model import ops as _ops
from zamba2.model.ops import reference


@dataclass(frozen=True)
class Tolerance:
    """Largest relative errors, ||a - b|| / ||b|| over a whole tensor (``relative_error``)."""

    output: float
    gradient: float


# The only tolerances. Ops: by the dtype of the inputs (a bf16 output is rounded once, 2^-9 at most).
OPS = {
    torch.float64: Tolerance(output=1e-12, gradient=1e-11),
    torch.float32: Tolerance(output=1e-5, gradient=3e-5),
    torch.bfloat16: Tolerance(output=4e-3, gradient=8e-3),
}
# The model: ``logits_error``, the largest difference relative to the largest logit, and gradients by norm.
MODEL = {
    torch.float64: Tolerance(output=1e-10, gradient=1e-8),
    torch.float32: Tolerance(output=2e-4, gradient=1e-3),
}
DIFFERENCE_QUOTIENT = 1e-5  # relative error of a central difference with step 1e-6 in fp64

SMALLEST = 1e-30  # what fp32 may flush to zero


def allowed(dtype: torch.dtype, what: str) -> float:
    """The largest relative error of an output or a gradient of an op, as ``results`` names it."""
    tolerance = OPS[dtype]
    return tolerance.gradient if what.startswith("gradient") else tolerance.output


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, infinite if anything is not finite; norms below SMALLEST count as it."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    assert found.shape == expected.shape, f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    difference, size = float((found - expected).norm()), float(expected.norm())
    if not math.isfinite(difference) or not math.isfinite(size):
        return math.inf
    return difference / max(size, SMALLEST)


def logits_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected logit, infinite if anything is not finite."""
    assert found.shape == expected.shape, f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if not found.numel():
        return 0.0
    found, expected = found.detach().double(), expected.detach().double()
    error = float((found - expected).abs().max() / expected.abs().max())
    return error if math.isfinite(error) else math.inf


def implementations() -> list[str]:
    """Names for ``ops.select`` that can run here; the reference too, whose fp32 is held to its fp64. Triton's run on a GPU, or,
    slowly, in its interpreter."""
    return ["reference", "torch", *(["triton"] if _ops.has_triton() else [])]


HAS_GPU = torch.cuda.is_available()


def device_for(name: str) -> str:
    """Where an implementation is tested."""
    return "cuda" if name == "triton" and HAS_GPU else "cpu"


def is_quick(case: Case, name: str) -> bool:
    """Whether the case belongs to the normal test run: all of PyTorch's and a GPU's, few of the interpreter's."""
    if name != "triton" or HAS_GPU:
        return True
    sizes = case.sizes
    long = sizes.get("T", 0) > 64 or math.prod(sizes.get("shape", (1,))) > 1000
    return not long and case.seed == 0 and sizes.get("scale", 1.0) == 1.0 and sizes.get("dt", "usual") == "usual" and "A" not in sizes


def poison(device: torch.device) -> None:
    """Leave memory full of NaN for the next allocations on a GPU: what is not written shows."""
    if device.type == "cuda":
        held = [torch.full((size,), torch.nan, device=device) for size in (1 << 25, *[1 << 16] * 8, *[1 << 10] * 64)]
        del held


@dataclass(frozen=True)
class Case:
    """One row of the table. ``sizes`` are the keyword arguments of the op's generator below."""

    op: str
    dtype: torch.dtype = torch.float32
    sizes: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __str__(self) -> str:
        sizes = ",".join(f"{key}={value}" for key, value in self.sizes.items())
        return f"{self.op}[{sizes},{str(self.dtype).removeprefix('torch.')}]"

    def __hash__(self) -> int:
        return hash(str(self))


# ---- generators: sizes -> the op's keyword arguments; the first float tensors are in the case's dtype ----------------------


def _normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def document_numbers(generator: torch.Generator, rows: int, length: int, documents: int = 4) -> Tensor:
    """Rising numbers with gaps, (rows, length); each row has its own borders, and documents of one token occur."""
    borders = torch.randint(0, max(1, length), (rows, documents - 1), generator=generator)
    borders[:, -1] = (borders[:, 0] + 1).clamp(max=length - 1)
    steps = torch.zeros(rows, length, dtype=torch.long)
    steps.scatter_(1, borders, torch.randint(1, 4, borders.shape, generator=generator))
    return steps.cumsum(1)


def _rms_norm(g: torch.Generator, shape: tuple[int, ...], gate: bool = False, groups: int = 1, scale: float = 1.0) -> dict[str, Any]:
    x = _normal(g, *shape, scale=scale)
    x.view(-1, shape[-1])[0] *= 0  # a row of zeros has a norm too
    arguments = {"x": x, "weight": 1 + _normal(g, shape[-1], scale=0.2), "eps": 1e-5, "groups": groups}
    return arguments | ({"gate": _normal(g, *shape)} if gate else {})


def _concat_rms_norm(g: torch.Generator, shape: tuple[int, ...], scale: float = 1.0) -> dict[str, Any]:
    weight = 1 + _normal(g, 2 * shape[-1], scale=0.2)
    return {"x": _normal(g, *shape, scale=scale), "x0": _normal(g, *shape), "weight": weight, "eps": 1e-5}


def _causal_conv(
    g: torch.Generator, T: int, b: int = 2, C: int = 5, K: int = 4, state: bool = False, seq_idx: bool = False, scale: float = 1.0,
    lengths: bool = False,
) -> dict[str, Any]:  # fmt: skip
    arguments: dict[str, Any] = {"x": _normal(g, b, T, C, scale=scale), "weight": _normal(g, C, K, scale=0.5), "bias": _normal(g, C)}
    if state:
        arguments["state"] = _normal(g, b, K - 1, C, scale=scale)
    if seq_idx:
        arguments["seq_idx"] = document_numbers(g, b, T)
    return arguments | ({"lengths": _lengths(g, b, T)} if lengths else {})


def _lengths(g: torch.Generator, b: int, T: int) -> Tensor:
    """How much of each row is text: all of the first, two tokens of the last."""
    lengths = torch.randint(1, T + 1, (b,), generator=g)
    lengths[:1] = T
    lengths[-1:] = min(2, T)
    return lengths


def _ssd_scan(
    g: torch.Generator, T: int, b: int = 2, H: int = 4, P: int = 3, G: int = 1, N: int = 5, chunk: int = 256, state: bool = False,
    seq_idx: bool = False, dt: str = "usual", A: float = 1.0, dt_bias: bool = False, lengths: bool = False,
) -> dict[str, Any]:  # fmt: skip
    steps = torch.exp(torch.empty(b, T, H, dtype=torch.float64).uniform_(math.log(1e-3), math.log(1e-1), generator=g))
    if dt == "tiny":
        steps = steps * 1e-6
    elif dt == "huge":
        steps = steps * 1e4
    elif dt == "spikes":  # a step that forgets everything among tiny ones: differences of long sums must keep those
        steps = steps * torch.where(torch.rand(b, T, 1, generator=g) < 0.02, 1e6, 1e-2)
    arguments = {
        "x": _normal(g, b, T, H, P),
        "dt": steps,
        "A": -torch.arange(1, H + 1, dtype=torch.float64) * A,
        "B": _normal(g, b, T, G, N),
        "C": _normal(g, b, T, G, N),
        "D": 1 + _normal(g, H, scale=0.1),
        "chunk_size": chunk,
    }
    if dt_bias:  # steps and rates before softplus and exp
        arguments["dt_bias"] = _normal(g, H)
        arguments["dt"] = steps + torch.log(-torch.expm1(-steps)) - arguments["dt_bias"]
        arguments["A"] = torch.log(-arguments["A"])
    if state:
        arguments["state"] = _normal(g, b, H, P, N)
    if seq_idx:
        arguments["seq_idx"] = document_numbers(g, b, T)
    return arguments | ({"lengths": _lengths(g, b, T)} if lengths else {})


def _geglu(g: torch.Generator, shape: tuple[int, ...], scale: float = 1.0) -> dict[str, Any]:
    wide = (*shape[:-1], 2 * shape[-1])
    return {"projected": _normal(g, *wide, scale=scale), "adapted": _normal(g, *wide, scale=0.1 * scale)}


def _add_hoisted(g: torch.Generator, shape: tuple[int, ...], scale: float = 1.0) -> dict[str, Any]:
    factor = torch.rand(*shape[:-1], 1, generator=g, dtype=torch.float64) * scale
    return {"projected": _normal(g, *shape), "hoisted": _normal(g, *shape), "scale": factor}


GENERATORS = {
    "rms_norm": _rms_norm,
    "concat_rms_norm": _concat_rms_norm,
    "causal_conv": _causal_conv,
    "ssd_scan": _ssd_scan,
    "geglu": _geglu,
    "add_hoisted": _add_hoisted,
}
OUTPUTS = {
    "rms_norm": ("y",),
    "concat_rms_norm": ("left", "scale"),
    "causal_conv": ("y", "state"),
    "ssd_scan": ("y", "state"),
    "geglu": ("y",),
    "add_hoisted": ("y",),
}
FP32 = {"weight", "bias", "dt", "A", "D", "dt_bias", "state", "scale"}  # stay fp32 beside bf16 activations, as in the model
POSITIONAL = {"x", "x0", "weight", "eps", "bias", "dt", "A", "B", "C", "D", "projected", "adapted", "hoisted", "scale"}


def inputs(case: Case, *, device: str = "cpu") -> dict[str, Any]:
    """The case's arguments; tensors of ``FP32`` are at least that, a convolution's state has the dtype of its input."""
    arguments = GENERATORS[case.op](torch.Generator().manual_seed(case.seed), **case.sizes)
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            projected = (case.op == "causal_conv" and name == "state") or (name == "dt" and "dt_bias" in arguments)
            keep = name in FP32 and not projected
            dtype = torch.float32 if keep and case.dtype.itemsize < 4 else case.dtype
            arguments[name] = value.to(device=device, dtype=dtype)
        elif isinstance(value, Tensor):
            arguments[name] = value.to(device)
    return arguments


def call(ops: Any, op: str, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """The op's outputs as a tuple, arguments passed as the model passes them."""
    first = [value for name, value in arguments.items() if name in POSITIONAL]
    rest = {name: value for name, value in arguments.items() if name not in POSITIONAL}
    poison(first[0].device)
    outputs = getattr(ops, op)(*first, **rest)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def results(ops: Any, case: Case, arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Named outputs, then named gradients of a random linear function of all outputs."""
    arguments = {
        name: value.detach().clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    outputs = call(ops, case.op, arguments)
    loss = torch.zeros((), dtype=torch.float64)
    for number, output in enumerate(outputs):
        direction = _normal(torch.Generator().manual_seed(number + 1), *output.shape).bfloat16().double()  # exact in any dtype
        loss = loss + (output.double() * direction.to(output.device)).sum().cpu()
        yield OUTPUTS[case.op][number], output.detach()
    wanted = {name: value for name, value in arguments.items() if isinstance(value, Tensor) and value.requires_grad}
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    yield from ((f"gradient of {name}", gradient) for name, gradient in zip(wanted, gradients, strict=True))


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments on the host in fp64."""
    return {
        name: (value.cpu().double() if value.is_floating_point() else value.cpu()) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


@functools.cache
def truth(case: Case) -> dict[str, Tensor]:
    """What the definition gives in fp64 for the case's rounded inputs."""
    with torch.inference_mode(False), torch.enable_grad():
        return dict(results(reference, case, widened(inputs(case))))


def select(name: str) -> _ops.Ops:
    """The implementation to test."""
    return _ops.select(name)


# ---- the table -----------------------------------------------------------------------------------------------------------

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16

CASES = [
    *(Case("rms_norm", d, {"shape": s}) for d in (F32, BF16) for s in ((1, 1), (3, 7), (2, 5, 64), (1, 513, 33))),
    *(Case("rms_norm", d, {"shape": (2, 9, 34), "gate": True, "groups": g}) for d in (F32, BF16) for g in (1, 2)),
    Case("rms_norm", F32, {"shape": (2, 257, 60), "gate": True, "groups": 3}),
    *(Case("rms_norm", F32, {"shape": (2, 5, 12), "gate": gate, "scale": s}) for gate in (False, True) for s in (1e-4, 1e4)),
    *(Case("concat_rms_norm", d, {"shape": s}) for d in (F32, BF16) for s in ((1, 1), (2, 1, 7), (3, 257, 20))),
    *(Case("concat_rms_norm", F32, {"shape": (2, 5, 12), "scale": s}) for s in (1e-4, 1e4)),
    *(Case("geglu", d, {"shape": s}) for d in (F32, BF16) for s in ((1, 1), (2, 3, 7), (1, 257, 48))),
    *(Case("geglu", F32, {"shape": (2, 3, 12), "scale": s}) for s in (1e-3, 1e2)),
    *(Case("add_hoisted", d, {"shape": s}) for d in (F32, BF16) for s in ((1, 1), (2, 3, 7), (1, 257, 48))),
    *(Case("add_hoisted", F32, {"shape": (2, 3, 12), "scale": s}) for s in (1e-3, 1e3)),
    # convolution: lengths below and above the taps, every combination of state and documents
    *(Case("causal_conv", F32, {"T": T, "state": s, "seq_idx": q}) for T in (1, 2, 3, 64) for s in (False, True) for q in (False, True)),
    *(Case("causal_conv", F32, {"T": T, "b": 1, "C": 3, "state": True}) for T in (255, 256, 257, 513, 701)),
    *(Case("causal_conv", F32, {"T": 9, "K": K, "b": 3, "state": True, "seq_idx": True}) for K in (2, 3, 5)),
    *(Case("causal_conv", BF16, {"T": T, "C": 33, "state": s}) for T in (1, 5, 257) for s in (False, True)),
    *(Case("causal_conv", F32, {"T": 9, "scale": s, "state": True}) for s in (1e-4, 1e3)),
    # scan: one step, short, the borders of a chunk of 256, several chunks
    *(Case("ssd_scan", F32, {"T": T, "state": s, "G": G}) for T in (1, 2, 3) for s in (False, True) for G in (1, 2)),
    *(Case("ssd_scan", F32, {"T": T, "b": 1, "G": 2, "state": True}) for T in (255, 256, 257)),
    Case("ssd_scan", F32, {"T": 513, "b": 1, "H": 6, "P": 2, "G": 3, "N": 7}),
    Case("ssd_scan", F32, {"T": 701, "b": 3, "H": 2, "G": 2, "state": True, "seq_idx": True}),
    Case("ssd_scan", F32, {"T": 701, "b": 1, "H": 2, "chunk": 64, "state": True}),
    *(Case("ssd_scan", F32, {"T": 37, "chunk": c, "state": True, "seq_idx": q}) for c in (1, 5, 36, 37, 256) for q in (False, True)),
    *(Case("ssd_scan", F32, {"T": 3, "b": 3, "state": True, "seq_idx": True, "chunk": c}) for c in (1, 2, 256)),
    *(Case("ssd_scan", F32, {"T": 300, "b": 1, "H": 3, "dt": dt, "state": True}) for dt in ("tiny", "huge", "spikes")),
    *(Case("ssd_scan", F32, {"T": 300, "b": 1, "H": 3, "A": A, "state": True}) for A in (1e-6, 1e3, 1e6)),
    Case("ssd_scan", F32, {"T": 300, "b": 2, "H": 2, "dt": "spikes", "A": 1e2, "seq_idx": True}),
    *(Case("ssd_scan", BF16, {"T": T, "b": 1, "H": 4, "P": 8, "G": 2, "N": 16, "state": True}) for T in (1, 3, 257)),
    # as the mixer calls them: dt and A before softplus and exp; and padding behind the texts, from a state and from none
    *(Case("causal_conv", F32, {"T": T, "b": 3, "state": s, "lengths": True}) for T in (1, 5, 257) for s in (False, True)),
    Case("causal_conv", BF16, {"T": 5, "b": 3, "C": 33, "lengths": True}),
    Case("causal_conv", F32, {"T": 37, "b": 3, "state": True, "seq_idx": True, "lengths": True}),
    *(Case("ssd_scan", d, {"T": T, "dt_bias": True, "state": s}) for d in (F32, BF16) for T in (1, 3, 257) for s in (False, True)),
    *(Case("ssd_scan", F32, {"T": 300, "b": 1, "H": 3, "dt": dt, "dt_bias": True, "state": True}) for dt in ("tiny", "huge", "spikes")),
    *(Case("ssd_scan", F32, {"T": T, "b": 3, "dt_bias": r, "state": True, "lengths": True}) for T in (1, 37, 257) for r in (False, True)),
    Case("ssd_scan", BF16, {"T": 65, "b": 3, "P": 8, "N": 16, "dt_bias": True, "lengths": True}),
    Case("ssd_scan", F32, {"T": 37, "b": 3, "dt_bias": True, "state": True, "seq_idx": True, "lengths": True}),
    # fp64 stays fp64
    Case("rms_norm", F64, {"shape": (2, 5, 12), "gate": True, "groups": 2}),
    Case("concat_rms_norm", F64, {"shape": (2, 5, 12)}),
    Case("geglu", F64, {"shape": (2, 5, 12)}),
    Case("add_hoisted", F64, {"shape": (2, 5, 12)}),
    *(Case("causal_conv", F64, {"T": 9, "state": s}) for s in (False, True)),
    *(Case("ssd_scan", F64, {"T": T, "state": s, "chunk": 4}) for T in (1, 9) for s in (False, True)),
    # the shapes of a real head: P = 64 with the N of 2.7B and of 1.2B
    Case("ssd_scan", F32, {"T": 257, "b": 1, "H": 2, "P": 64, "N": 64, "state": True}),
    Case("ssd_scan", BF16, {"T": 300, "b": 1, "H": 2, "P": 64, "N": 128, "state": True}),
]  # fmt: skip
