"""The waist: what every backend offers and all that generation, serving and evaluation see.

Two methods: ``new_state`` and ``forward``. This module knows neither torch nor the native engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from zamba2.config import Config
from zamba2.errors import Zamba2Error

__all__ = ["Backend", "Logits", "Row", "State", "best_of", "check_row", "checked_best"]


class State(Protocol):
    """What one sequence keeps between calls: SSM and convolution state, keys and values."""

    @property
    def position(self) -> int:
        """Tokens read so far."""

    @property
    def nbytes(self) -> int:
        """Bytes held, shared keys and values included."""

    def memory(self) -> Mapping[int, int]:
        """Bytes of all that is held, by where it lies: copies that share memory name the same places, and states that share none never
        do while they live. To count what many states hold together."""

    @property
    def adapter(self) -> str | None:
        """Name of the run-time adapter, or None."""

    def copy(self) -> State:
        """An independent state at the same position; keys and values are shared until one of the two appends."""

    def save(self, path: Path, *, note: str = "") -> None:
        """Write a file that ``load`` of the same model reads, with a note of the caller's; written beside and renamed.

        Raises Zamba2Error."""

    def load(self, path: Path) -> str:
        """Replace the contents by a saved state and return its note. Raises Zamba2Error for a file of another model,
        version or shape, and keeps the contents then."""

    def keep(self, n: int) -> None:
        """After a call with ``record=True``: keep only the first n of its tokens, by replaying recorded updates.

        Raises ValueError where nothing was recorded, or fewer."""


class Logits(Protocol):
    """float32 [k, V]: scores of the next token after each of the k trailing positions asked for."""

    def numpy(self) -> npt.NDArray[np.float32]:
        """The scores on the host."""

    def likeliest(self) -> npt.NDArray[np.int32]:
        """int32 [k]: the most probable next token after each position, of equals the lowest; from a device these are all that comes.

        Raises Zamba2Error where a score is NaN or +inf."""


@dataclass(frozen=True, eq=False)
class Row:
    """One sequence's part of a call. Tokens: int32 [T], T >= 1. logits: trailing positions wanted, 0 to T."""

    tokens: npt.NDArray[np.int32]
    state: State
    logits: int = 1
    record: bool = False


@runtime_checkable
class Backend(Protocol):
    """A loaded model. Rows of any lengths may share a call; each state may appear once in it.

    together: tokens, of one sequence or several, that a call reads in little more time than one; 1 where there is no such thing. So many
    can be recorded. stretch: tokens of a long prompt that a call should read; between two of them others may have their turn.
    fingerprint: of weights and number format; saved states go on where it is the same.
    """

    config: Config
    fingerprint: str
    together: int
    stretch: int

    def new_state(self, *, adapter: str | None = None) -> State:
        """An empty state at position 0. Raises Zamba2Error for an unknown adapter."""

    def forward(self, rows: Sequence[Row]) -> list[Logits]:
        """Read each row's tokens, advance its state, return its logits. Raises Zamba2Error for tokens out of range."""


def best_of(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """``Logits.likeliest`` of scores on the host, float32 [k, V]. Raises Zamba2Error."""
    best = scores.argmax(-1)  # a NaN or +inf where there is one
    return checked_best(best, np.take_along_axis(scores, best[:, None], -1))


def checked_best(best: npt.NDArray[Any], values: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """The tokens, if their scores are numbers. Raises Zamba2Error."""
    if not np.isfinite(values).all():
        raise Zamba2Error("the model produced NaN or infinite logits; the checkpoint is likely corrupt: download or convert it again.")
    return best.astype(np.int32, copy=False)


def check_row(row: Row, vocab_size: int) -> npt.NDArray[np.int32]:
    """A row's tokens, int32 [T]. Raises Zamba2Error for no tokens or ids out of range, ValueError for impossible logits."""
    tokens = np.asarray(row.tokens)
    if tokens.ndim != 1 or not tokens.size or tokens.dtype.kind not in "iu":
        raise Zamba2Error("there are no tokens to read; at least one token id is needed.")
    for token in (int(tokens[0]),) if tokens.size == 1 else (int(tokens.min()), int(tokens.max())):
        if not 0 <= token < vocab_size:
            raise Zamba2Error(f"token id {token} is out of range; the model knows ids from 0 to {vocab_size - 1}.")
    if not 0 <= row.logits <= tokens.size:
        raise ValueError(f"{row.logits} positions of logits were asked for; 0 to {tokens.size} are possible")
    return np.ascontiguousarray(tokens, dtype=np.int32)
