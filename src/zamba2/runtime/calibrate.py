"""Calibration: a text is read by the native engine, and what each matrix multiplies decides how it is rounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from zamba2.runtime.native import PREFILL_CHUNK, NativeBackend
from zamba2.weights.calibration import Moments

__all__ = ["FEWEST_TOKENS", "second_moments"]

FEWEST_TOKENS = 256
CONTEXT = 4 * PREFILL_CHUNK  # tokens read into one state; then a new one begins


def second_moments(
    backend: NativeBackend, tokens: Sequence[int] | npt.NDArray[np.int32], *, progress: Callable[[int, int], None] | None = None
) -> dict[str, Moments]:
    """Sums of x x^T over the inputs x of each product while ``tokens`` are read, by the matrix's name.

    A matrix that several positions share sees the inputs of all of them. The embedding table and lm_head are not
    among them. FEWEST_TOKENS is what gives sums worth using.
    """
    found: dict[str, Moments] = {}

    def add(name: str, x: npt.NDArray[np.float32]) -> None:
        if name not in found:
            found[name] = Moments(x.shape[1])
        found[name].add(x)

    ids = np.asarray(tokens, dtype=np.int32)
    backend.engine.observe_inputs(add)
    try:
        for start in range(0, len(ids), PREFILL_CHUNK):
            if start % CONTEXT == 0:
                state = backend.engine.new_state()
            backend.engine.forward([state], [ids[start : start + PREFILL_CHUNK]], [0])
            if progress is not None:
                progress(min(start + PREFILL_CHUNK, len(ids)), len(ids))
    finally:
        backend.engine.observe_inputs(None)
    return found
