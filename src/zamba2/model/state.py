"""What the PyTorch model keeps between calls. Tensors in it are never written in place, so copies can share them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zamba2.config import Config

__all__ = ["KVCache", "LayerRecord", "ModelState"]

SMALLEST_BUFFER = 256  # tokens


def capacity_for(length: int) -> int:
    """Tokens of room for ``length`` of them, a quarter more at each step: a function of the length alone, since the strides
    of keys and values decide the last bits of the vendor's products and copies are to go on like the original."""
    capacity = SMALLEST_BUFFER
    while capacity < length:
        capacity = -(-capacity * 5 // 4 // 64) * 64
    return capacity


class Buffer:
    """Append-only storage of keys and values, (2, b, heads, capacity, head_dim), that several caches may share.

    ``used`` tokens are written; the first ``shared`` of them may be read by another cache and stay as they are.
    """

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.used = 0
        self.shared = 0


@dataclass
class KVCache:
    """Keys and values of one hybrid layer: the first ``length`` tokens of a buffer."""

    buffer: Buffer | None = None
    length: int = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add (b, heads, T, head_dim) each; returns all keys and values, (b, heads, length, head_dim), as views."""
        end = self.length + k.shape[2]
        buffer = self.buffer
        if buffer is None or buffer.used != self.length or buffer.data.shape[3] < end:
            grown = Buffer(k.new_empty(2, *k.shape[:2], capacity_for(end), k.shape[3]))
            if buffer is not None:
                grown.data[:, :, :, : self.length] = buffer.data[:, :, :, : self.length]
            self.buffer = buffer = grown
        buffer.data[0, :, :, self.length : end] = k
        buffer.data[1, :, :, self.length : end] = v
        buffer.used = self.length = end
        keys, values = buffer.data[:, :, :, :end]
        return keys, values

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        if self.buffer is not None and self.buffer.used == self.length and length >= self.buffer.shared:
            self.buffer.used = length
        self.length = length

    def copy(self) -> KVCache:
        """Another cache of the same tokens on the same buffer; the second of the two to append moves to its own."""
        if self.buffer is not None:
            self.buffer.shared = max(self.buffer.shared, self.length)
        return replace(self)

    def tensor(self) -> Tensor | None:
        """Keys and values, (2, b, heads, length, head_dim), or None before the first token."""
        return None if self.buffer is None or not self.length else self.buffer.data[:, :, :, : self.length]


@dataclass
class LayerRecord:
    """One mixer's states before a recorded call and the inputs of its convolution and scan during it."""

    conv: Tensor | None
    ssm: Tensor | None
    xBC: Tensor  # (b, T, conv_dim)
    dt: Tensor  # (b, T, heads), before softplus
    real: Tensor | None  # (b, T, 1) bool, False at left padding

    def first(self, n: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """What the mixer needs to replay the first n tokens: xBC, dt, the states before them, and ``real``."""
        return self.xBC[:, :n], self.dt[:, :n], self.conv, self.ssm, None if self.real is None else self.real[:, :n]


@dataclass
class ModelState:
    """State of a batch of sequences of equal length. conv: (b, K-1, conv_dim); ssm: (b, heads, P, N), fp32."""

    conv: list[Tensor | None]
    ssm: list[Tensor | None]
    kv: list[KVCache]
    position: int = 0
    padding: Tensor | None = None  # (b,) columns of left padding
    records: list[LayerRecord] | None = None

    @classmethod
    def empty(cls, config: Config) -> ModelState:
        layers = config.num_hidden_layers
        return cls([None] * layers, [None] * layers, [KVCache() for _ in config.hybrid_layer_ids])

    def copy(self) -> ModelState:
        """An independent state; nothing is copied until one of the two goes on."""
        return replace(self, conv=list(self.conv), ssm=list(self.ssm), kv=[kv.copy() for kv in self.kv], records=None)

    def tensors(self) -> list[Tensor]:
        """All that is held, whole buffers of keys and values included."""
        tensors = [*self.conv, *self.ssm, *(kv.buffer.data if kv.buffer else None for kv in self.kv)]
        return [tensor for tensor in tensors if tensor is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held, whole buffers of keys and values included."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def select(self, rows: Tensor) -> ModelState:
        """The state of some rows of the batch, repeats allowed (beam search). rows: (n,) indices."""
        picked = ModelState(
            [None if t is None else t.index_select(0, rows) for t in self.conv],
            [None if t is None else t.index_select(0, rows) for t in self.ssm],
            [],
            self.position,
            None if self.padding is None else self.padding.index_select(0, rows),
        )
        for kv in self.kv:
            data = kv.tensor()
            own = KVCache()
            if data is not None:
                own.append(*torch.unbind(data.index_select(1, rows)))
            picked.kv.append(own)
        return picked
