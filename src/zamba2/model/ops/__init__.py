"""The six operations the model is made of besides matrix products and attention, behind one seam.

Each has a plain, differentiable definition in ``reference`` and is implemented for speed elsewhere; every
implementation passes the cases of ``tests/op_cases.py``. The model asks ``select`` once for the functions it calls.

    rms_norm         RMSNorm, optionally gated (gate first) and per group
    concat_rms_norm  RMSNorm of two vectors side by side, without writing the second half
    causal_conv      depthwise causal convolution with SiLU, from and to a state
    ssd_scan         the Mamba2 recurrence: one step or chunks, from and to a state
    geglu            GELU(gate) * up of a projection and its low-rank adapter
    add_hoisted      a projection and, scaled, the part of it that was taken beforehand
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from zamba2.errors import notice

__all__ = ["Ops", "has_triton", "launching_on", "select"]


class Ops(Protocol):
    """Signatures of the six operations; see ``reference`` for their definitions."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, gate: Tensor | None = None, groups: int = 1) -> Tensor: ...

    def concat_rms_norm(self, x: Tensor, x0: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...

    def causal_conv(
        self, x: Tensor, weight: Tensor, bias: Tensor, *, state: Tensor | None = None, seq_idx: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    def ssd_scan(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, chunk_size: int,
        dt_bias: Tensor | None = None, state: Tensor | None = None, seq_idx: Tensor | None = None, lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    def geglu(self, projected: Tensor, adapted: Tensor) -> Tensor: ...

    def add_hoisted(self, projected: Tensor, hoisted: Tensor, scale: Tensor) -> Tensor: ...


class ByDevice:
    """Triton's where the first argument lies on a GPU, PyTorch's elsewhere: a model may be moved after it was made."""

    def rms_norm(self, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        return _for(x).rms_norm(x, *rest, **options)

    def concat_rms_norm(self, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return _for(x).concat_rms_norm(x, *rest)

    def causal_conv(self, x: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return _for(x).causal_conv(x, *rest, **options)

    def ssd_scan(self, x: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return _for(x).ssd_scan(x, *rest, **options)

    def geglu(self, projected: Tensor, adapted: Tensor) -> Tensor:
        return _for(projected).geglu(projected, adapted)

    def add_hoisted(self, projected: Tensor, hoisted: Tensor, scale: Tensor) -> Tensor:
        return _for(projected).add_hoisted(projected, hoisted, scale)


def select(name: str = "auto") -> Ops:
    """The implementation called ``name``: "auto" (the fastest for the device), "torch" (any device), "triton" (GPUs) or "reference"
    (slow, for tests)."""
    if name == "auto":
        return ByDevice()
    if name == "reference":
        from zamba2.model.ops import reference

        return reference
    if name == "torch":
        from zamba2.model.ops import chunked

        return chunked
    if name == "triton":
        from zamba2.model.ops import triton_ops

        return triton_ops
    raise ValueError(f"no implementation of the ops is called {name!r}; there are 'auto', 'torch', 'triton' and 'reference'")


def has_triton() -> bool:
    """Whether Triton is there, as it is beside PyTorch for NVIDIA GPUs. Its kernels here are written for those alone."""
    return torch.version.hip is None and find_spec("triton") is not None


def launching_on(device: torch.device) -> AbstractContextManager[Any]:
    """Where Triton's kernels may be launched: they go to the thread's current GPU, wherever their tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _for(x: Tensor) -> Ops:
    global _on_gpu
    if x.device.type != "cuda":
        return _on_cpu
    if _on_gpu is None:
        if torch.version.hip is not None:
            notice("the kernels for GPUs are NVIDIA's alone, so this one takes PyTorch's own operations, which are slower.")
        elif not has_triton():
            notice("Triton is not installed, so this GPU runs the model slower than it could; install it with: pip install 'triton>=3.4'")
        _on_gpu = select("triton" if has_triton() else "torch")
    return _on_gpu


_on_cpu = select("torch")
_on_gpu: Ops | None = None
