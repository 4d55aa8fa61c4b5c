"""Rounding that knows what a matrix multiplies: errors of one weight are made good by those after it. Knows no torch.

A product y = W x should change little when W becomes Q: the loss of a row w is (w - q) H (w - q)^T, where H is the mean of
x x^T over the inputs of a text. Rounding weight by weight in the order of the inputs, the best that the weights not yet
rounded can do about an error e of weight j is to move by -e V_j, where V_j is row j of U divided by U_jj, and H = R R^T
with R upper triangular, U = R^-1. After that the error has cost (e / U_jj)^2. This is algorithm 1 of GPTQ (Frantar et al.
2022), with U their Cholesky factor of the inverse of H; a group's scale is chosen when its turn comes, from the weights as they
are by then, their squared errors weighed by 1 / U_jj^2. H is kept block by block along the inputs, so that all matrices' fit in memory
and none outgrows a processor's cache; between blocks nothing is made good.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from zamba2.weights.formats import GROUP, Codes, Floats, Format, Rounding, best_scales, rounded, widened

__all__ = ["Moments", "correct"]

SPAN = 512  # inputs of a block of H
DAMPING = 0.01  # of H's mean diagonal, added to it (as GPTQ does): a text shows fewer directions than there are


class Moments:
    """H of one matrix, block by block along its inputs: sums of x x^T."""

    def __init__(self, cols: int) -> None:
        self.blocks: list[Floats] = [np.zeros((size, size), np.float32) for size in _sizes(cols)]

    def add(self, x: Floats) -> None:
        """Add the inputs x (rows, cols)."""
        start = 0
        for block in self.blocks:
            some = x[:, start : start + len(block)]
            block += some.T @ some
            start += len(block)

    def rounding(self) -> Rounding:
        """How to round the matrix."""
        return partial(correct, factors=[factor(block) for block in self.blocks])


def _sizes(cols: int) -> list[int]:
    return [min(SPAN, cols - start) for start in range(0, cols, SPAN)]


def factor(block: Floats) -> npt.NDArray[np.float64]:
    """U of one block of H. Only the ratios of H's values matter."""
    damped = block.astype(np.float64)
    mean = np.trace(damped) / len(damped) or 1.0  # inputs that were always 0: as if they were independent
    damped[np.diag_indices_from(damped)] += DAMPING * mean
    upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]  # R
    inverse: npt.NDArray[np.float64] = np.linalg.inv(upper)
    return inverse


def correct(grouped: Floats, format: Format, factors: Sequence[npt.NDArray[np.float64]]) -> tuple[Codes, npt.NDArray[np.float16]]:
    """Codes and scales as ``formats.quantize`` gives them, of groups (..., groups, 32) that make up whole rows."""
    groups = grouped.shape[-2]
    columns = grouped.reshape(-1, groups * GROUP).T.copy()  # (inputs, rows); what is left to round moves
    codes, scales = np.empty_like(columns), np.empty((groups, columns.shape[1]), dtype=np.float16)
    start = 0
    for U in factors:
        moves = (U / np.diag(U)[:, None]).astype(np.float32)
        importance = (1 / np.diag(U) ** 2).astype(np.float32)
        importance /= importance.mean()
        own = columns[start : start + len(U)]  # a last block may end inside a group: what fills the group is zero and stays so
        for at in range(0, len(U), GROUP):
            some = slice(at, min(at + GROUP, len(U)))
            here = own[some]
            group = (start + at) // GROUP
            scales[group] = best_scales(here, format, importance[some, None])
            wide, inverse = widened(scales[group])
            errors = np.empty_like(here)
            for j in range(len(here)):
                code = rounded(here[j], inverse, format)
                codes[start + at + j] = code
                errors[j] = here[j] - code * wide
                here[j + 1 :] -= moves[at + j, at + j + 1 : some.stop, None] * errors[j]
            own[some.stop :] -= moves[some, some.stop :].T @ errors
        start += len(U)
    codes[start:] = 0
    shape = grouped.shape
    return codes.T.reshape(shape).astype(np.int32), scales.T.reshape(shape[:-1])
