"""Weights in 8 or 4 bits on a GPU: the packed files' own bytes (``weights.formats``), read by kernels that widen them in registers.

A few rows are multiplied with the bytes as they are; for more, as in a prompt, the matrix is widened once and multiplied by torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zamba2.weights.formats import format_named

__all__ = ["Packed", "PackedEmbedding", "PackedLinear", "product"]

FEW = 64  # rows up to which the packed bytes are multiplied


@dataclass(frozen=True, eq=False)
class Packed:
    """A packed matrix (rows, cols). data: uint8, one dimension, starting at a multiple of 16 bytes; format: a name in FORMATS."""

    data: Tensor
    rows: int
    cols: int
    format: str

    @property
    def bits(self) -> int:
        """Of one code; a group of 32 inputs and 16 rows has 64 * bits bytes of codes."""
        return format_named(self.format).code_bytes // 64

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of 16 rows."""
        return format_named(self.format).block_bytes(self.cols)


def product(x: Tensor, weight: Packed) -> Tensor:
    """x W^T in x's dtype. x: (..., cols)."""
    from zamba2.model.ops.triton_linear import dequantize, linear

    rows = math.prod(x.shape[:-1])
    if rows > FEW:
        return F.linear(x, dequantize(weight, x.dtype))
    return linear(x.reshape(rows, -1).float(), weight).to(x.dtype).reshape(*x.shape[:-1], -1)


class PackedLinear(nn.Module):
    """A projection without bias whose weight is packed."""

    def __init__(self, weight: Packed) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight)


class PackedEmbedding(nn.Module):
    """An embedding table whose rows are packed; gives them in ``dtype``."""

    def __init__(self, weight: Packed, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.dtype = weight, dtype

    def forward(self, ids: Tensor) -> Tensor:
        from zamba2.model.ops.triton_linear import embedding

        return embedding(ids.reshape(-1), self.weight).to(self.dtype).reshape(*ids.shape, -1)
