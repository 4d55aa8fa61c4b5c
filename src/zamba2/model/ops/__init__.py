"""The five operations the model is made of besides matrix products and attention, behind one seam.

Each has a plain, differentiable definition in ``reference`` and is implemented for speed elsewhere; every
implementation passes the cases of ``tests/op_cases.py``. The model asks ``select`` once for the functions it calls.

    rms_norm         RMSNorm, optionally gated (gate first) and per group
    concat_rms_norm  RMSNorm of two vectors side by side, without writing the second half
    causal_conv      depthwise causal convolution with SiLU, from and to a state
    ssd_scan         the Mamba2 recurrence: one step or chunks, from and to a state
    geglu            GELU(gate) * up of a projection and its low-rank adapter
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

__all__ = ["Ops", "select"]


class Ops(Protocol):
    """Signatures of the five operations; see ``reference`` for their definitions."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, gate: Tensor | None = None, groups: int = 1) -> Tensor: ...

    def concat_rms_norm(self, x: Tensor, x0: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...

    def causal_conv(
        self, x: Tensor, weight: Tensor, bias: Tensor, *, state: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def ssd_scan(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, chunk_size: int,
        state: Tensor | None = None, seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    def geglu(self, projected: Tensor, adapted: Tensor) -> Tensor: ...


def select(name: str = "torch") -> Ops:
    """The implementation called ``name``: "torch" (any device) or "reference" (slow, for tests)."""
    if name == "reference":
        from zamba2.model.ops import reference

        return reference
    if name == "torch":
        from zamba2.model.ops import chunked

        return chunked
    raise ValueError(f"no implementation of the ops is called {name!r}; there are 'torch' and 'reference'")
