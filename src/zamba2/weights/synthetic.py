"""Random weights of a true shape, made directly in a packed format: what a speed measurement needs, in seconds. Knows no torch.

Codes are uniform, scales differ by a quarter and in sign, so that weights have mean 0 and a spread of about 0.02 and the
activations stay of normal size through all layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from zamba2.config import Config
from zamba2.weights.formats import BLOCK, GROUP, Format, round_bf16
from zamba2.weights.hub import RANDOM
from zamba2.weights.packed import Packing, Part, parts, write_packed

__all__ = ["packed_bytes", "write_synthetic"]

SPREAD = 0.02  # of the weights: the standard deviation that the published models start from
BLOCKS_AT_ONCE = 512
Bytes = npt.NDArray[np.uint8]


def packed_bytes(config: Config, packing: Packing) -> int:
    """Bytes of all tensors of a packed checkpoint."""
    return sum(map(packing.nbytes, parts(config)))


def write_synthetic(config: Config, packing: Packing, target: Path, *, seed: int = 0) -> None:
    """Write a packed checkpoint folder with random weights, and the embedded model's tokenizer if it fits. Raises Zamba2Error.

    A_log is log(1 .. heads), dt_bias uniform in [-4, -1], norms and D are 1, convolution weights uniform, its bias 0.
    """
    random = np.random.Generator(np.random.SFC64(seed))

    def pieces(part: Part) -> Iterator[memoryview]:
        for piece in matrix(part, packing.of(part), random) if part.is_matrix else [vector(part, config, random)]:
            yield piece.data

    tokenizer = RANDOM.glob("tokenizer*") if config.vocab_size >= Config.from_file(RANDOM / "config.json").vocab_size else ()
    write_packed(target, config, packing, lambda part: partial(pieces, part), {"zamba2_random": "true"}, tokenizer)


def matrix(part: Part, format: Format, random: np.random.Generator) -> Iterator[Bytes]:
    """Packed random weights of one matrix, some blocks of rows at a time; the padding is random too, and never used."""
    rows, cols = part.shape
    blocks, groups = -(-rows // BLOCK), -(-cols // GROUP)
    for start in range(0, blocks, BLOCKS_AT_ONCE):
        count = min(BLOCKS_AT_ONCE, blocks - start)
        out = np.zeros((count, format.block_bytes(cols)), dtype=np.uint8)
        codes = out[:, : groups * format.code_bytes]
        words = random.integers(0, 1 << 64, size=(count, codes.shape[1] // 8), dtype=np.uint64, endpoint=False).view(np.uint8)
        if format.name == "bf16":
            codes[:] = NORMAL[words.view(np.uint16)].view(np.uint8)
        else:
            codes[:] = np.maximum(words, 1) if format.name == "q8" else words  # q8 has no code -128
            spread = np.arange(format.smallest, format.largest + 1).std()
            scales = random.uniform(0.75, 1.25, size=(count, groups * BLOCK)) * random.choice([-1.0, 1.0], size=(count, groups * BLOCK))
            place = out[:, codes.shape[1] : codes.shape[1] + groups * format.scale_bytes]
            place[:] = (scales * (SPREAD / spread)).astype(np.float16).view(np.uint8)
        yield out.reshape(-1)


def vector(part: Part, config: Config, random: np.random.Generator) -> Bytes:
    """Values of one vector, fp32, as bytes."""
    kind = part.name.rpartition(".")[2] if "mamba" in part.name else "norm"
    if "conv1d" in part.name:
        limit = config.mamba_d_conv**-0.5  # PyTorch's own start
        values = random.uniform(-limit, limit, part.count) if kind == "weight" else np.zeros(part.count)
    elif kind == "A_log":
        values = np.log(np.arange(1, part.count + 1))
    elif kind == "dt_bias":
        values = random.uniform(-4.0, -1.0, part.count)
    else:
        values = np.ones(part.count)
    return values.astype(np.float32).view(np.uint8)


def _normal_table() -> npt.NDArray[np.uint16]:
    """65536 draws of a normal distribution in bf16: one for every 16 random bits."""
    draws = np.random.default_rng(0).normal(0.0, SPREAD, 1 << 16).astype(np.float32)
    return round_bf16(draws)


NORMAL = _normal_table()
