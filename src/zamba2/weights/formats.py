"""Packed formats: the specification of every layout of weights, keys and values that the native engine reads. Knows no torch.

A matrix W (rows, cols) becomes blocks of 16 rows; within a block, groups of 32 inputs follow one another, zero-padded to
whole blocks and groups. The 16 rows lie side by side, so that one vector register holds the same inputs of 16 rows:

  bf16  per group 16 pairs of inputs, per pair 16 rows x 2 values           1024 bytes (one tile of a bf16 matrix unit)
  q8    per group 8 x (16 rows x 4 inputs), code + 128                       512 bytes
  q4    per group 4 x (16 rows x 4 inputs), code + 8; input 4v + i in the    256 bytes
        low, 16 + 4v + i in the high nibble of vector v

q8 and q4: behind a block's codes its fp16 scales, per group 16 rows; weight = code * scale. A block's size is rounded up
to 64 bytes. csrc/kernels.h has the twin (struct Matrix); tests/test_formats.py compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from zamba2.errors import Zamba2Error

__all__ = ["BLOCK", "FORMATS", "GROUP", "KV_FORMATS", "Format", "KVFormat", "format_named", "kv_format_named"]

BLOCK = 16  # rows side by side
GROUP = 32  # inputs that share a scale
BF16_END = np.float32(2.0**128 - 2.0**119)  # from here on bf16 rounds to infinity

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Format:
    """One row of the table. ``number`` is its value in the engine; code_bytes: of one group of one block."""

    name: str
    number: int
    code_bytes: int
    scale_bytes: int
    bits: float
    largest: int  # codes lie in [smallest, largest]; 0 for floating point
    smallest: int

    def block_bytes(self, cols: int) -> int:
        """Bytes of one block of 16 rows with ``cols`` inputs."""
        groups = -(-cols // GROUP)
        return -(-groups * (self.code_bytes + self.scale_bytes) // 64) * 64

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of a packed (rows, cols) matrix."""
        return -(-rows // BLOCK) * self.block_bytes(cols)


# Codes and fp16 scales (..., groups) of groups (..., groups, 32).
Rounding = Callable[[Floats, Format], tuple[Codes, npt.NDArray[np.float16]]]

FORMATS = {
    "bf16": Format("bf16", 0, 1024, 0, 16.0, 0, 0),
    "q8": Format("q8", 1, 512, 32, 8.5, 127, -127),
    "q4": Format("q4", 2, 256, 32, 4.5, 7, -8),
}


def format_named(name: str) -> Format:
    """A row of FORMATS. Raises Zamba2Error for an unknown name."""
    if name not in FORMATS:
        raise Zamba2Error(f"there is no format {name!r}; there are {', '.join(FORMATS)}.")
    return FORMATS[name]


@dataclass(frozen=True)
class KVFormat:
    """How keys and values are kept, and which tensors they are in a saved state: one ``{part}.{j}`` per hybrid position j and part.

    parts: name -> (dtype, whether it has a value per dimension of the head); values lie in the order (heads, tokens[, head_dim]).
    q8: per head and token head_dim int8 codes and one fp32 scale = largest magnitude / 127; value = code * scale.
    ``number`` is its value in the engine, whose struct PageLayout has the same parts.
    """

    name: str
    number: int
    parts: dict[str, tuple[str, bool]]

    def tensors(self, positions: int, heads: int, tokens: int, head_dim: int) -> Iterator[tuple[str, str, int]]:
        """Name, dtype and number of values of each tensor in a saved state."""
        for j in range(positions):
            for part, (dtype, wide) in self.parts.items():
                yield f"{part}.{j}", dtype, heads * tokens * (head_dim if wide else 1)


KV_FORMATS = {
    "bf16": KVFormat("bf16", 0, {"keys": ("BF16", True), "values": ("BF16", True)}),
    "q8": KVFormat("q8", 1, {"keys": ("I8", True), "values": ("I8", True), "key_scales": ("F32", False), "value_scales": ("F32", False)}),
}


def kv_format_named(name: str) -> KVFormat:
    """A row of KV_FORMATS. Raises Zamba2Error for an unknown name."""
    if name not in KV_FORMATS:
        raise Zamba2Error(f"there is no format {name!r} of keys and values; there are {', '.join(KV_FORMATS)}.")
    return KV_FORMATS[name]


def pack(weights: Floats, format: Format, rounding: Rounding | None = None) -> npt.NDArray[np.uint8]:
    """Pack fp32 weights (rows, cols) into bytes (nbytes,), rounding as ``quantize`` does, or in another way."""
    rows, cols = weights.shape
    blocks, groups = -(-rows // BLOCK), -(-cols // GROUP)
    padded = np.zeros((blocks * BLOCK, groups * GROUP), dtype=np.float32)
    padded[:rows, :cols] = weights
    grouped = padded.reshape(blocks, BLOCK, groups, GROUP)
    if format.number == 0:
        if not (np.abs(weights) < BF16_END).all():
            raise _too_large(format)
        pairs = round_bf16(grouped).reshape(blocks, BLOCK, groups, GROUP // 2, 2)
        return np.ascontiguousarray(pairs.transpose(0, 2, 3, 1, 4)).view(np.uint8).reshape(-1)
    codes, scales = (rounding or quantize)(grouped, format)
    shifted = (codes + (8 if format.name == "q4" else 128)).astype(np.uint8)
    fours = shifted.reshape(blocks, BLOCK, groups, GROUP // 4, 4).transpose(0, 2, 3, 1, 4)  # (blocks, groups, 8, 16, 4)
    packed = fours[:, :, :4] | (fours[:, :, 4:] << 4) if format.name == "q4" else fours
    out = np.zeros((blocks, format.block_bytes(cols)), dtype=np.uint8)
    out[:, : groups * format.code_bytes] = packed.reshape(blocks, -1)
    scale_bytes = np.ascontiguousarray(scales.transpose(0, 2, 1)).view(np.uint8).reshape(blocks, -1)
    out[:, groups * format.code_bytes : groups * (format.code_bytes + format.scale_bytes)] = scale_bytes
    return out.reshape(-1)


def unpack(data: npt.NDArray[np.uint8], rows: int, cols: int, format: Format) -> Floats:
    """The fp32 weights (rows, cols) that packed bytes stand for."""
    blocks, groups = -(-rows // BLOCK), -(-cols // GROUP)
    block = data.reshape(blocks, -1)
    if format.number == 0:
        halves = block.view(np.uint16).reshape(blocks, groups, GROUP // 2, BLOCK, 2).transpose(0, 3, 1, 2, 4)
        wide = (halves.astype(np.uint32) << 16).view(np.float32)
        return np.ascontiguousarray(wide.reshape(blocks * BLOCK, groups * GROUP)[:rows, :cols])
    codes = block[:, : groups * format.code_bytes].reshape(blocks, groups, -1, BLOCK, 4)
    fours = np.concatenate([codes & 15, codes >> 4], axis=2) if format.name == "q4" else codes
    end = groups * (format.code_bytes + format.scale_bytes)
    scales = np.ascontiguousarray(block[:, groups * format.code_bytes : end]).view(np.float16).reshape(blocks, groups, BLOCK)
    values = fours.transpose(0, 3, 1, 2, 4).reshape(blocks, BLOCK, groups, GROUP).astype(np.float32)
    values -= 8 if format.name == "q4" else 128
    values *= scales.transpose(0, 2, 1)[..., None].astype(np.float32)
    return np.ascontiguousarray(values.reshape(blocks * BLOCK, groups * GROUP)[:rows, :cols])


def round_bf16(values: Floats) -> npt.NDArray[np.uint16]:
    """bf16 bits of finite fp32 values, round to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def quantize(grouped: Floats, format: Format) -> tuple[Codes, npt.NDArray[np.float16]]:
    """Codes (..., 32) and fp16 scales (...) of groups (..., 32): the scale of least squared error among a few candidates.

    q8: the largest magnitude becomes 127. q4: the value of largest magnitude becomes -8, or a scale somewhat smaller or
    larger than that, each refitted to its codes by least squares, in fp16 as stored. Raises Zamba2Error for what fp16 scales
    cannot hold.
    """
    shape = grouped.shape[:-1]
    columns = np.ascontiguousarray(grouped.reshape(-1, GROUP).T)  # a row per input: scales lie side by side, as numpy likes them
    codes, scales = np.empty_like(columns), np.empty(columns.shape[1], dtype=np.float16)
    for start in range(0, columns.shape[1], AT_ONCE):
        some = slice(start, start + AT_ONCE)
        scales[some] = best_scales(columns[:, some], format)
        codes[:, some] = rounded(columns[:, some], widened(scales[some])[1], format)
    return codes.T.reshape(*shape, GROUP).astype(np.int32), scales.reshape(shape)


CANDIDATES = (-8.0, -7.0, -7.5, -8.6, -9.4, 7.0, 7.6)  # what the largest value is divided by
AT_ONCE = 1024  # groups, so that what is computed on the way stays in a second-level cache


def best_scales(columns: Floats, format: Format, importance: Floats | None = None) -> npt.NDArray[np.float16]:
    """``quantize``'s scales (n,) of groups that are the columns of (32, n). importance: weights of the squared errors, (32, n) or what
    broadcasts to it (default: all alike)."""
    peak = np.take_along_axis(columns, np.abs(columns).argmax(0, keepdims=True), 0)[0]
    if format.name == "q8":
        return _stored(np.abs(peak) / np.float32(127), format)
    weighted = columns if importance is None else columns * importance
    best: npt.NDArray[np.float16] | None = None
    for candidate in CANDIDATES:
        _, inverse = widened(_stored(peak / np.float32(candidate), format))
        codes = rounded(columns, inverse, format)
        along = (codes * weighted).sum(0)
        codes *= codes
        square = codes.sum(0) if importance is None else (codes * importance).sum(0)
        scales = _stored(np.divide(along, square, out=np.zeros_like(square), where=square > 0), format)
        wide, inverse = widened(scales)
        difference = rounded(columns, inverse, format)
        difference *= wide
        difference -= columns
        difference *= difference
        error = difference.sum(0) if importance is None else (difference * importance).sum(0)
        if best is None:
            best, least = scales, error
            continue
        better = error < least
        best, least = np.where(better, scales, best), np.where(better, error, least)
    assert best is not None
    return best


def widened(scales: npt.NDArray[np.float16]) -> tuple[Floats, Floats]:
    """Scales in fp32, and what dividing by them multiplies with (0 for 0)."""
    wide = scales.astype(np.float32)
    return wide, np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide != 0)


def rounded(columns: Floats, inverse: Floats, format: Format) -> Floats:
    """Codes, as floats, of columns (..., n) whose scales' inverses are (n,)."""
    codes = columns * inverse
    np.rint(codes, out=codes)
    np.clip(codes, format.smallest, format.largest, out=codes)
    return codes


def _stored(scales: Floats, format: Format) -> npt.NDArray[np.float16]:
    if not (np.abs(scales) <= 65504).all():
        raise _too_large(format)
    return scales.astype(np.float16)


def _too_large(format: Format) -> Zamba2Error:
    instead = ", or use bf16" if format.number else ""
    return Zamba2Error(f"a weight is not finite or too large for format {format.name}; the checkpoint is damaged{instead}.")
