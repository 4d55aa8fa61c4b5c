"""Native backends over random miniatures, and the PyTorch model that computes the same: dequantized weights, int8 inputs, bf16 keys.

The twin shares nothing with the engine but the packed bytes: it is the PyTorch model with three functions replaced.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from op_cases import relative_error
from strategies import MINIATURES, miniature, random_model
from torch import Tensor
from torch.nn import functional as F

from zamba2 import _engine
from zamba2.config import Config
from zamba2.model import model as model_module
from zamba2.model.model import Zamba2
from zamba2.model.state import KVCache
from zamba2.runtime.backend import Row
from zamba2.runtime.native import ENGINE_KEYS, NativeBackend, NativeState
from zamba2.weights import packed
from zamba2.weights.checkpoint import save_checkpoint
from zamba2.weights.files import TensorFile
from zamba2.weights.formats import FORMATS, unpack
from zamba2.weights.packed import open_packed

__all__ = [
    "BACKBONE", "CONFIGS", "ISAS", "as_codes", "as_twin", "engine_arguments", "error", "logits_of", "make_packed", "multiply_as",
    "native", "packed_from", "twin", "uses_units",
]  # fmt: skip

ISAS = list(_engine.available())

# The switches of the three sizes, and what sizes can do to blocks of 16 rows and groups of 32 inputs: less, just, a bit more.
CONFIGS: dict[str, Config] = {
    **MINIATURES,
    "gqa": miniature(num_attention_heads=4, num_key_value_heads=2, hidden_size=40, n_mamba_heads=5, use_mem_rope=True, num_mem_blocks=1),
    "odd": miniature(
        hidden_size=33, n_mamba_heads=3, num_attention_heads=3, num_key_value_heads=1, intermediate_size=37, adapter_rank=1,
        mamba_d_state=5, vocab_size=17, mamba_d_conv=3, num_mem_blocks=3, tie_word_embeddings=False, rms_norm_eps=1e-3, chunk_size=5,
    ),
    "aligned": miniature(
        hidden_size=64, n_mamba_heads=8, num_attention_heads=4, intermediate_size=96, adapter_rank=32, mamba_d_state=32, vocab_size=128,
        mamba_ngroups=2, use_mem_rope=True, use_shared_attention_adapter=True,
    ),
}  # fmt: skip
# No hybrid layers: no keys and values, so nothing is rounded but the weights.
BACKBONE = miniature(hybrid_layer_ids=(), num_hidden_layers=3, mamba_ngroups=2, tie_word_embeddings=False)

_folders: list[tempfile.TemporaryDirectory[str]] = []  # kept until the end: the engine maps the files


def packed_from(model: Zamba2, format: str) -> Path:
    """A packed checkpoint of a model."""
    folder = tempfile.TemporaryDirectory(prefix="zamba2-native-")
    _folders.append(folder)
    save_checkpoint(model, Path(folder.name) / "hub")
    packed.quantize(Path(folder.name) / "hub", Path(folder.name) / "packed", FORMATS[format])
    return Path(folder.name) / "packed"


@functools.cache
def make_packed(config: Config, format: str, seed: int = 1) -> Path:
    """A packed checkpoint of the random model of a config and seed; its folder holds the original as ``hub`` too."""
    return packed_from(random_model(config, seed), format)


@functools.cache
def native(config: Config, format: str, isa: str = "", threads: int = 1, seed: int = 1) -> NativeBackend:
    """The native backend over ``make_packed``."""
    return NativeBackend(make_packed(config, format, seed), config, threads=threads, isa=isa)


@functools.cache
def twin(config: Config, format: str, seed: int = 1) -> Zamba2:
    """The PyTorch model with the weights that the packed file holds."""
    file = TensorFile(make_packed(config, format, seed) / "model.safetensors")
    model = random_model(config, seed)
    with torch.no_grad():
        for part in packed.parts(config):
            data = np.frombuffer(file.read(part.name), dtype=np.uint8)
            if not part.is_matrix:
                model.get_parameter(part.name).copy_(torch.from_numpy(data.view(np.float32).copy()).view_as(model.get_parameter(part.name)))
                continue
            rows, cols = part.shape
            values = torch.from_numpy(unpack(data, rows, cols, FORMATS[format]))
            for name in part.sources:
                parameter = model.get_parameter(name)
                own, values = values[: len(parameter)], values[len(parameter) :]
                (parameter if part.half is None else parameter[:, part.half * cols : (part.half + 1) * cols]).copy_(own)
    return model


def engine_arguments(config: Config, format: str, tokens: np.ndarray, lengths: Sequence[int]) -> dict[str, Any]:
    """Arguments of ``engine`` in tests/native/kernel_runner.cpp: tokens in calls of these lengths, by two threads, to all their logits."""
    file, _, plan = open_packed(make_packed(config, format), config)
    return {key: getattr(config, key) for key in ENGINE_KEYS} | {
        "hybrid_layer_ids": np.array(config.hybrid_layer_ids, dtype=np.int64), "threads": 2, "format": FORMATS[format].number,
        **{part.name: np.frombuffer(file.read(part.name), np.uint8 if part.is_matrix else np.float32) for part in plan},
        "tokens": tokens.astype(np.int32), "lengths": np.array(lengths, dtype=np.int64),
        "logits": np.full((len(tokens), config.vocab_size), np.nan, dtype=np.float32),
    }  # fmt: skip


def as_codes(x: Tensor) -> Tensor:
    """x as its int8 codes per group of 32 inputs say: scale = largest / 127, ties to even."""
    padded = F.pad(x.float(), (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    peak = padded.abs().amax(-1, keepdim=True)
    inverse = torch.where(peak > 0, torch.full_like(peak, 127) / peak, 0)  # 127 / peak would round twice
    codes = torch.round(padded * inverse).clamp(-127, 127)
    return (codes * (peak / 127)).flatten(-2)[..., : x.shape[-1]]


def _multiply_codes(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(as_codes(x).double(), weight.double()).to(x.dtype)


def _multiply_halves(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.bfloat16().double(), weight.bfloat16().double()).to(x.dtype)


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.double(), weight.double()).to(x.dtype)


def multiply_as(format: str, units: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """x W^T as the engine takes it: q8 and q4 round x to int8, matrix units both sides to bf16; sums are exact."""
    return _multiply_halves if units else _multiply if format == "bf16" else _multiply_codes


_append = KVCache.append


def _append_bf16(self: KVCache, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _append(self, k.bfloat16().to(k.dtype), v.bfloat16().to(v.dtype))


@contextmanager
def as_twin(format: str, *, units: bool = False) -> Iterator[None]:
    """The PyTorch model rounds as the engine does: keys and values to bf16; inputs of products as ``multiply_as`` says."""
    with (
        mock.patch.object(KVCache, "append", _append_bf16),
        mock.patch.object(model_module, "matmul", multiply_as(format, units)),
        torch.no_grad(),
    ):
        yield


def uses_units(isa: str) -> bool:
    """Whether calls of more than SHORT tokens go through bf16 matrix units."""
    return isa == "amx"


def logits_of(backend: NativeBackend, tokens: Sequence[int] | np.ndarray, state: NativeState | None = None, **options: Any) -> np.ndarray:
    """Logits of the trailing positions (``logits``, by default all) of one row read into a state, by default a new one."""
    row = Row(np.asarray(tokens, dtype=np.int32), state or backend.new_state(), **({"logits": len(tokens)} | options))
    return backend.forward([row])[0].numpy()


def error(found: np.ndarray | Tensor, expected: np.ndarray | Tensor) -> float:
    """``relative_error`` of arrays."""
    return relative_error(*(value if isinstance(value, Tensor) else torch.tensor(value) for value in (found, expected)))
