"""Calibration: a text is read by the native engine, and what each matrix multiplies decides how it is rounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from zamba2.errors import Zamba2Error
from zamba2.runtime.native import PREFILL_CHUNK, NativeBackend
from zamba2.weights.calibration import Moments

__all__ = ["FEWEST_TOKENS", "second_moments"]

FEWEST_TOKENS = 256
CONTEXT = 4 * PREFILL_CHUNK  # tokens read into one state; then a new one begins


def second_moments(
    backend: NativeBackend, tokens: Sequence[int], *, progress: Callable[[int, int], None] | None = None
) -> dict[str, Moments]:
    """Sums of x x^T over the inputs x of each product while ``tokens`` are read, by the matrix's name.

    A matrix that several positions share sees the inputs of all of them. The embedding table and lm_head are not
    among them. Raises Zamba2Error if there are fewer than FEWEST_TOKENS tokens.
    """
    if len(tokens) < FEWEST_TOKENS:
        raise Zamba2Error(f"the calibration text has {len(tokens)} tokens; at least {FEWEST_TOKENS} are needed, and thousands are better.")
    found: dict[str, Moments] = {}

    def add(name: str, x: npt.NDArray[np.float32]) -> None:
        found.setdefault(name, Moments(x.shape[1])).add(x)

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
