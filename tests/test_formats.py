"""The packed formats: what rounding may cost, where each byte lies, and that the engine counts as FORMATS does."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import miniature

from zamba2 import _engine
from zamba2.config import Config
from zamba2.errors import Zamba2Error
from zamba2.runtime.native import ENGINE_KEYS
from zamba2.weights.formats import BLOCK, FORMATS, GROUP, Format, format_named, pack, quantize, round_bf16, unpack
from zamba2.weights.packed import parts

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [(1, 1), (17, 33), (37, 70), (16, 32), (40, 128), (15, 31), (3, 64)]
INTEGERS = [FORMATS["q8"], FORMATS["q4"]]
SMALLEST_NORMAL = 2.0**-14  # fp16; scales below it have fewer digits


def normal(rows: int, cols: int, *, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, cols)) * scale).astype(np.float32)


def by_the_page(data: np.ndarray, rows: int, cols: int, format: Format) -> tuple[np.ndarray, np.ndarray]:
    """Weights and their scales (1 for bf16), read value by value as the table at the head of formats.py says."""
    groups = -(-cols // GROUP)
    stride = len(data) // -(-rows // BLOCK)
    values, scales = np.zeros((rows, cols), np.float32), np.ones((rows, cols), np.float32)
    for row in range(rows):
        block, lane = data[row // BLOCK * stride :][:stride], row % BLOCK
        for col in range(cols):
            group, k = divmod(col, GROUP)
            own = block[group * format.code_bytes :][: format.code_bytes]
            if format.name == "bf16":
                at = (k // 2 * BLOCK + lane) * 4 + k % 2 * 2
                values[row, col] = (np.array([0, 0, own[at], own[at + 1]], np.uint8)).view("<f4")[0]
                continue
            if format.name == "q8":
                code = int(own[(k // 4 * BLOCK + lane) * 4 + k % 4]) - 128
            else:
                byte = int(own[(k % 16 // 4 * BLOCK + lane) * 4 + k % 4])
                code = (byte & 15 if k < 16 else byte >> 4) - 8
            at = groups * format.code_bytes + (group * BLOCK + lane) * 2
            scales[row, col] = block[at : at + 2].view("<f2")[0]
            values[row, col] = code * scales[row, col]
    return values, scales


@pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_lie_where_the_page_says(shape: tuple[int, int], format: Format) -> None:
    """``unpack`` and a reading of the page value by value give the same weights, and there are as many bytes as FORMATS counts."""
    data = pack(normal(*shape), format)
    assert data.dtype == np.uint8
    assert data.shape == (format.nbytes(*shape),)
    assert np.array_equal(unpack(data, *shape, format), by_the_page(data, *shape, format)[0])


@given(seed=st.integers(0, 1 << 16), shape=st.sampled_from(SHAPES), size=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_bf16_values_survive(seed: int, shape: tuple[int, int], size: float) -> None:
    """What bf16 can hold comes back bit for bit; anything else comes back within half a step, ties to even."""
    values = normal(*shape, scale=size, seed=seed)
    stored = unpack(pack(values, FORMATS["bf16"]), *shape, FORMATS["bf16"])
    assert (np.abs(stored - values) <= np.abs(values) * 2.0**-8).all()
    assert np.array_equal(unpack(pack(stored, FORMATS["bf16"]), *shape, FORMATS["bf16"]).view(np.uint32), stored.view(np.uint32))
    ties = np.array([0x3F808000, 0x3F818000, 0xBF808000], np.uint32).view(np.float32)
    assert round_bf16(ties).tolist() == [0x3F80, 0x3F82, 0xBF80]


@given(seed=st.integers(0, 1 << 16), shape=st.sampled_from(SHAPES), size=st.sampled_from([1e-9, 1e-6, 1e-2, 1.0, 1e3]))
@example(seed=0, shape=(37, 70), size=0.0)
def test_each_weight_is_the_nearest_code(seed: int, shape: tuple[int, int], size: float) -> None:
    """No code of the format times the group's stored scale lies nearer to a weight than the one chosen; so between the
    outermost codes the error is at most half a step."""
    values = normal(*shape, scale=size, seed=seed)
    for format in INTEGERS:
        stored, scales = by_the_page(pack(values, format), *shape, format)
        found = np.abs(values - stored)
        grid = np.arange(format.smallest, format.largest + 1, dtype=np.float64)
        nearest = np.abs(values[..., None] - grid * scales[..., None]).min(-1)
        assert (found <= nearest + 1e-6 * np.abs(values)).all()
        ends = np.sort(np.stack([format.smallest * scales, format.largest * scales]), axis=0)
        inside = (values >= ends[0]) & (values <= ends[1])
        assert (found[inside] <= np.abs(scales[inside]) * 0.500001).all()


@given(seed=st.integers(0, 1 << 16), size=st.sampled_from([1e-2, 1.0, 1e3]))
def test_q8_is_absolute_maximum(seed: int, size: float) -> None:
    """q8's scale is the group's largest magnitude / 127 in fp16, and every error is at most half a step, the largest included."""
    values = normal(24, 96, scale=size, seed=seed)
    stored, scales = by_the_page(pack(values, FORMATS["q8"]), 24, 96, FORMATS["q8"])
    peaks = np.abs(values.reshape(24, 3, GROUP)).max(-1).repeat(GROUP, axis=1)
    assert np.array_equal(scales, (peaks / np.float32(127)).astype(np.float16).astype(np.float32))
    normal_scales = scales >= SMALLEST_NORMAL
    assert normal_scales.all() or size < 1
    assert (np.abs(values - stored) <= scales * 0.500001)[normal_scales].all()


def rounded_to_nibbles(groups: np.ndarray) -> np.ndarray:
    """Plain 4-bit rounding, as llama.cpp's Q4_0: the value of largest magnitude becomes -8; fp16 scale."""
    peak = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)
    scale = (peak / np.float32(-8)).astype(np.float16).astype(np.float32)
    ratio = np.divide(groups, scale, out=np.zeros_like(groups), where=scale != 0)
    return np.clip(np.rint(ratio), -8, 7) * scale


@given(
    seed=st.integers(0, 1 << 16), size=st.sampled_from([1e-7, 1e-5, 1e-2, 1.0, 1e4]), tails=st.sampled_from([0.0, 1.0, 3.0]),
    few=st.booleans(),
)  # fmt: skip
def test_q4_is_never_worse_than_plain_rounding(seed: int, size: float, tails: float, few: bool) -> None:
    """The squared error of each group is at most that of plain rounding, whatever the distribution;
    on normal weights the sum is 8 % less."""
    groups = normal(512, GROUP, scale=1.0, seed=seed)
    groups = np.clip(np.sign(groups) * np.abs(groups) ** (1 + tails), -6, 6) * np.float32(size)
    if few:  # coefficients of a coarse grid: many ties
        groups = np.round(groups / np.float32(size) * 4) / 4 * np.float32(size)
    codes, scales = quantize(groups, FORMATS["q4"])
    found = ((groups - codes * scales[..., None].astype(np.float32)).astype(np.float64) ** 2).sum(-1)
    plain = ((groups - rounded_to_nibbles(groups)).astype(np.float64) ** 2).sum(-1)
    assert (found <= plain * (1 + 1e-5)).all(), f"{(found > plain * (1 + 1e-5)).sum()} groups, {np.nanmax(found / plain)} at most"
    if not tails and not few and size >= 1e-2:
        assert found.sum() <= 0.92 * plain.sum()


@pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))
def test_zeros_stay_zeros(format: Format) -> None:
    """A group of zeros, a matrix of zeros and zeros beside large values come back as zeros."""
    assert not unpack(pack(np.zeros((17, 33), np.float32), format), 17, 33, format).any()
    values = normal(20, 96)
    values[:, 32:64] = 0
    values[3] = 0
    stored = unpack(pack(values, format), 20, 96, format)
    assert not stored[values == 0].any()
    assert (stored != 0).sum() > 0.8 * (values != 0).sum()


@pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))
def test_padding_is_zero(format: Format) -> None:
    """Rows and inputs that only fill a block stand for zeros, so that a kernel may add them up."""
    rows, cols = 17, 33
    stored, _ = by_the_page(pack(np.full((rows, cols), 3, np.float32), format), 32, 64, format)
    assert np.array_equal(stored[:rows, :cols] != 0, np.ones((rows, cols), bool))
    assert not stored[rows:].any()
    assert not stored[:, cols:].any()


@pytest.mark.parametrize("format", INTEGERS, ids=["q8", "q4"])
def test_the_largest_weights(format: Format) -> None:
    """Weights up to what an fp16 scale reaches are kept within a step; one outlier among small weights is kept too."""
    reach = 65504.0 * abs(format.smallest) * 0.8
    values = np.linspace(-reach, reach, 64, dtype=np.float32).reshape(2, 32)
    values[1, 1:] = 1e-3
    stored = unpack(pack(values, format), 2, 32, format)
    assert (np.abs(stored[0] - values[0]) <= reach / -format.smallest * 1.01).all()
    assert abs(stored[1, 0] / values[1, 0] - 1) <= 1e-3


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.3961775e38, -3.3961775e38])
@pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))
def test_what_cannot_be_packed_is_refused(format: Format, value: float) -> None:
    """NaN, infinities and weights beyond an fp16 scale, or that bf16 rounds to an infinity, raise Zamba2Error, wherever they stand and
    without a warning."""
    for at in ((0, 0), (16, 32), (7, 5)):
        values = normal(17, 33)
        values[at] = value
        with pytest.raises(Zamba2Error, match="not finite or too large"):
            pack(values, format)


def test_unknown_format_is_refused() -> None:
    """A format's name is one of the table."""
    assert format_named("q4") is FORMATS["q4"]
    for name in ("q5", "", "Q4", "None"):
        with pytest.raises(Zamba2Error, match="there are bf16, q8, q4"):
            format_named(name)


# ---- the twin in csrc -----------------------------------------------------------------------------------------------------


def test_numbers_are_the_engine_s() -> None:
    """FORMATS' numbers are the enum of csrc/kernels.h, name by name."""
    (body,) = re.findall(r"enum class Format : int \{([^}]*)\}", (ROOT / "csrc" / "kernels.h").read_text())
    enum = {name: int(number) for name, number in re.findall(r"(\w+) = (\d+)", body)}
    assert enum == {name: format.number for name, format in FORMATS.items()}
    assert all(name == format.name for name, format in FORMATS.items())


def engine(config: Config) -> _engine.Engine:
    return _engine.Engine({key: getattr(config, key) for key in ENGINE_KEYS} | {"hybrid_layer_ids": list(config.hybrid_layer_ids)}, 1)


@pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))
@pytest.mark.parametrize("hidden", [1, 6, 31, 32, 33, 70, 96])
def test_sizes_are_the_engine_s(hidden: int, format: Format) -> None:
    """The engine takes each matrix in exactly FORMATS' number of bytes; one more, one less or none is refused with that number."""
    config = miniature(
        hidden_size=hidden, n_mamba_heads=1, num_attention_heads=1, num_key_value_heads=1, vocab_size=hidden + 15, adapter_rank=5,
        use_shared_attention_adapter=True,
    )  # fmt: skip
    own = engine(config)
    for part in (part for part in parts(config) if part.is_matrix):
        wanted = format.nbytes(*part.shape)
        for wrong in (wanted - 1, wanted + 1, 0):
            with pytest.raises(ValueError, match=rf"{re.escape(part.name)} has {wrong} bytes; .* need {wanted}$"):
                own.set_matrix(part.name, format.number, np.zeros(wrong, np.uint8))
        own.set_matrix(part.name, format.number, np.zeros(wanted, np.uint8))


@pytest.mark.parametrize("config", [miniature(), miniature(hybrid_layer_ids=(), tie_word_embeddings=False)], ids=["hybrid", "backbone"])
def test_parts_are_the_engine_s(config: Config) -> None:
    """The engine misses each part that was not set, by name, is complete with all of them, and knows no other."""
    plan = parts(config)
    for missing in plan:
        own = engine(config)
        for part in plan:
            if part is not missing and part.is_matrix:
                own.set_matrix(part.name, 1, np.zeros(FORMATS["q8"].nbytes(*part.shape), np.uint8))
            elif part is not missing:
                own.set_vector(part.name, np.zeros(part.count, np.float32))
        with pytest.raises(ValueError, match=re.escape(f"{missing.name} is missing")):
            own.check_complete()
        for count in (missing.count - 1, missing.count + 1) if not missing.is_matrix else ():
            with pytest.raises(ValueError, match=re.escape(missing.name)):
                own.set_vector(missing.name, np.zeros(count, np.float32))
    if missing.is_matrix:
        own.set_matrix(missing.name, 1, np.zeros(FORMATS["q8"].nbytes(*missing.shape), np.uint8))
    else:
        own.set_vector(missing.name, np.zeros(missing.count, np.float32))
    own.check_complete()
    for call in (lambda: own.set_matrix("layers.0.other", 1, np.zeros(1, np.uint8)), lambda: own.set_vector("x", np.zeros(1, np.float32))):
        with pytest.raises(ValueError, match="the model has no"):
            call()
    with pytest.raises(ValueError, match="no such format"):
        own.set_matrix("embed_tokens.weight", 3, np.zeros(1, np.uint8))


def test_a_format_is_a_row() -> None:
    """The bits of each format are its bytes per weight, scales included."""
    for format in FORMATS.values():
        assert format.bits == 8 * (format.code_bytes + format.scale_bytes) / (BLOCK * GROUP)
        assert format.nbytes(160, 4096) * 8 == format.bits * 160 * 4096
