"""Matrix products with few rows, as decoding needs them: every weight is read once, in the format it is stored in.

One kernel does a whole projection: the norm before it, hoisted and low-rank terms, GeGLU and the residual behind it. The norm's
scale is a factor of the finished sum, so the squares are summed in the same loop as the products and no pass comes before.

  one row       multiply-adds in fp32; a program takes a few rows of the matrix and all inputs. What bounds it is memory, so
                the next tile of weights is on its way while one is used.
  2 to 64 rows  the inputs are normed and rounded to the weights' type by a small kernel first, then tensor cores.

The packed formats are those of ``zamba2.weights.formats``, byte for byte.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from zamba2.model.packed import Packed
from zamba2.weights.formats import BLOCK, GROUP

__all__ = ["dequantize", "embedding", "linear"]

MOST = 64  # rows of x
HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
FEW, MANY = 512, 4096  # columns of a result, where other tiles begin
EXPONENT = 0x4B000000  # of 2 ** 23; an argument of kernels, since one logical instruction takes no second constant beside its mask
INTERPRETED = triton.knobs.runtime.interpret  # where few large programs take the least time


@triton.jit
def _inputs(x_ptr, plus_ptr, beside_ptr, norm_ptr, k, inside):
    """norm * (x + plus) at the inputs k, and the squares that the norm's mean is taken of; fp32, 0 outside."""
    v = tl.load(x_ptr + k, mask=inside, other=0.0).to(tl.float32)
    if plus_ptr is not None:
        v += tl.load(plus_ptr + k, mask=inside, other=0.0)
    squares = v * v
    if beside_ptr is not None:
        beside = tl.load(beside_ptr + k, mask=inside, other=0.0)
        squares += beside * beside
    if norm_ptr is not None:
        v *= tl.load(norm_ptr + k, mask=inside, other=0.0)
    return v, squares


@triton.jit
def _wait(EARLY: tl.constexpr):
    """Until the kernels before this one have ended; the one behind it may begin (programmatic dependent launch)."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _scale(squares, beside_ptr, norm_ptr, eps, K: tl.constexpr):
    """The norm's scale (1,) of the squares (n,); 1 without a norm."""
    scale = tl.full((1,), 1.0, tl.float32)
    if norm_ptr is not None:
        count: tl.constexpr = K if beside_ptr is None else 2 * K
        scale = 1 / tl.sqrt(tl.sum(squares, 0, keep_dims=True) / count + eps)
    return scale


@triton.jit
def _entries(w_ptr, scales_ptr, row, k, inside, K: tl.constexpr, BLOCK_BYTES: tl.constexpr, BITS: tl.constexpr):
    """Single weights at (row, k) in fp32, of any format; BITS is 0 for a plain matrix."""
    block, r, group = (row // 16).to(tl.int64), row % 16, k // 32
    if BITS == 0:
        w = tl.load(w_ptr + row.to(tl.int64) * K + k, mask=inside, other=0.0).to(tl.float32)
    elif BITS == 16:
        at = block * (BLOCK_BYTES // 2) + group * 512 + k % 32 // 2 * 32 + r * 2 + k % 2
        w = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
    else:
        within = k % (4 * BITS)
        byte = tl.load(w_ptr + block * BLOCK_BYTES + group * (64 * BITS) + within // 4 * 64 + r * 4 + within % 4, mask=inside, other=0)
        code = (byte.to(tl.int32) >> (k % 32 // (4 * BITS) * 4)) & ((1 << BITS) - 1)
        scales = block * (BLOCK_BYTES // 2) + (K + 31) // 32 * (32 * BITS) + group * 16 + r  # behind the codes
        w = (code - (1 << (BITS - 1))).to(tl.float32) * tl.load(scales_ptr + scales, mask=inside, other=0.0).to(tl.float32)
    return w


@triton.jit
def _places(BITS: tl.constexpr):
    """For the codes j of a word: how far to shift the word, and where the code lies then; in bits, all below 23."""
    j = tl.arange(0, 32 // BITS)
    high = j // (16 // BITS)
    return 12 * high, j % (16 // BITS) * BITS + 4 * high


@triton.jit
def _codes(words, exponent, BITS: tl.constexpr):
    """The codes (..., j) of words (..., 1), each times 2 ** place, in fp32.

    A code where it lies, under the exponent of 2 ** 23, is a float; the code of zero, subtracted, leaves an exact number.
    """
    shift, place = _places(BITS)
    code = (words >> shift) & (((1 << BITS) - 1) << place) | exponent
    zero: tl.constexpr = 1 << (BITS - 1)
    return code.to(tl.float32, bitcast=True) - ((zero << place) | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def _units(BITS: tl.constexpr):
    """2 ** -place."""
    _, place = _places(BITS)
    return ((127 - place) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _pointers(words_ptr, scales_ptr, block, r, K: tl.constexpr, BITS: tl.constexpr, BLOCK_BYTES: tl.constexpr, G: tl.constexpr):
    """To the words (blocks, G, vectors, rows, 1) and scales (blocks, G, 1, rows, 1) of the first G groups; and the groups.

    The last dimension is there for the codes of a word: with it from the start, they stay in the thread that loaded the word.
    """
    block = block.to(tl.int64)[:, None, None, None, None]
    r = r[None, None, None, :, None]
    g = tl.arange(0, G)[None, :, None, None, None]
    v = tl.arange(0, BITS)[None, None, :, None, None]
    words = words_ptr + block * (BLOCK_BYTES // 4) + g * (16 * BITS) + v * 16 + r
    scales = scales_ptr + block * (BLOCK_BYTES // 2) + (K + 31) // 32 * (32 * BITS) + g * 16 + r
    return words, scales, g


@triton.jit
def _in_words(v, G: tl.constexpr, BITS: tl.constexpr):
    """G groups of inputs (G * 32,) in the order of the codes: (G, vector, j)."""
    if BITS == 4:
        v = tl.permute(tl.reshape(v, (G, 2, 4, 4)), (0, 2, 3, 1))
    return tl.reshape(v, (G, BITS, 32 // BITS))


@triton.jit
def _low(a_ptr, b_ptr, b_scales_ptr, row, inside, RANK: tl.constexpr, RANKS: tl.constexpr, BLOCK_BYTES: tl.constexpr, BITS: tl.constexpr):
    """B a for the rows (n,): the low-rank term of one row of x. RANKS: RANK, up to a power of two."""
    k = tl.arange(0, RANKS)
    a = tl.load(a_ptr + k, mask=k < RANK, other=0.0)
    b = _entries(b_ptr, b_scales_ptr, row[:, None], k[None, :], inside[:, None] & (k < RANK)[None, :], RANK, BLOCK_BYTES, BITS)
    return tl.sum(b * a[None, :], 1)


@triton.jit
def _finish(
    r, scale, low, row, inside, m, M, out_rows, hoisted_ptr, hoisted_stride, residual_ptr, residual_stride, out_ptr, out_stride
):
    """What follows the products r (sets, n, N) of the matrix rows ``row`` (sets, n) with the inputs m (N,); scale: (N,)."""
    at = m[None, None, :].to(tl.int64)
    mask = inside[:, :, None] & (m < M)[None, None, :]
    if hoisted_ptr is not None:
        r += tl.load(hoisted_ptr + at * hoisted_stride + row[:, :, None], mask=mask, other=0.0)
    r = r * scale[None, None, :] + low
    if r.shape[0] == 2:
        gate, up = tl.split(tl.permute(r, (1, 2, 0)))
        r = (0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476)) * up)[None, :, :]
        row, _ = tl.split(tl.permute(row, (1, 0)))
        inside, _ = tl.split(tl.permute(inside.to(tl.int32), (1, 0)))
        row, mask = row[None, :], (inside != 0)[None, :, None] & (m < M)[None, None, :]
    if residual_ptr is not None:
        r += tl.load(residual_ptr + at * residual_stride + row[:, :, None], mask=mask, other=0.0)
    tl.store(out_ptr + at * out_stride + row[:, :, None], r, mask=mask)


@triton.jit
def _halves(words, HALF: tl.constexpr):
    """The weights (..., j) of words (..., 1) in fp32: two of the type HALF, or one of fp32 if that is None."""
    if HALF == "bf16":
        words = ((words << (16 - 16 * tl.arange(0, 2))) & -65536).to(tl.float32, bitcast=True)
    if HALF == "fp16":
        words = ((words >> (16 * tl.arange(0, 2))) & 65535).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return words


@triton.jit
def _matvec(
    x_ptr, plus_ptr, beside_ptr, norm_ptr, eps, w_ptr, hoisted_ptr, a_ptr, b_ptr, b_scales_ptr, residual_ptr, out_ptr, rows,
    K: tl.constexpr, HALF: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, B_BYTES: tl.constexpr, B_BITS: tl.constexpr,
    SETS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row of x and a plain matrix of 32-bit words; SETS is 2 for GeGLU, whose gate and up rows one program has."""
    J: tl.constexpr = 1 if HALF is None else 2
    i = tl.arange(0, SETS * ROWS)
    first = tl.program_id(0) * ROWS + i % ROWS
    inside = first < rows // SETS
    row = first + i // ROWS * (rows // SETS)
    n = tl.arange(0, WORDS)[None, :, None]
    k = tl.arange(0, WORDS * J)
    w_ptrs = w_ptr + row.to(tl.int64)[:, None, None] * (K // J) + n
    w = tl.load(w_ptrs, mask=inside[:, None, None] & (n < K // J), other=0, eviction_policy="evict_first")
    _wait(EARLY)
    low = tl.zeros((SETS * ROWS,), tl.float32)
    if a_ptr is not None:
        low = _low(a_ptr, b_ptr, b_scales_ptr, row, inside, RANK, RANKS, B_BYTES, B_BITS)
    total = tl.zeros((SETS * ROWS, WORDS, 1), tl.float32)
    squares = tl.zeros((WORDS * J,), tl.float32)
    for start in tl.range(0, K // J, WORDS, loop_unroll_factor=2):  # by two: or what is on its way would be waited for, to be moved
        following = inside[:, None, None] & (start + WORDS + n < K // J)
        w_next = tl.load(w_ptrs + (start + WORDS), mask=following, other=0, eviction_policy="evict_first")
        v, square = _inputs(x_ptr, plus_ptr, beside_ptr, norm_ptr, start * J + k, start * J + k < K)
        squares += square
        total += tl.sum(_halves(w, HALF) * tl.reshape(v, (WORDS, J))[None, :, :], 2, keep_dims=True)
        w = w_next
    scale = _scale(squares, beside_ptr, norm_ptr, eps, K)
    r = tl.reshape(tl.sum(total, 1), (SETS, ROWS, 1))
    low = tl.reshape(low, (SETS, ROWS, 1))
    row, inside = tl.reshape(row, (SETS, ROWS)), tl.reshape(inside, (SETS, ROWS))
    _finish(r, scale, low, row, inside, tl.arange(0, 1), 1, rows, hoisted_ptr, 0, residual_ptr, 0, out_ptr, 0)


@triton.jit
def _matvec_packed(
    x_ptr, plus_ptr, beside_ptr, norm_ptr, eps, words_ptr, scales_ptr, hoisted_ptr, a_ptr, b_ptr, b_scales_ptr, residual_ptr, out_ptr,
    rows, exponent,
    K: tl.constexpr, BITS: tl.constexpr, BLOCK_BYTES: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, B_BYTES: tl.constexpr, B_BITS: tl.constexpr,
    SETS: tl.constexpr, ROWS: tl.constexpr, G: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row of x and a packed matrix, of which a program has ROWS (4, 8 or 16) rows of one block, or of two with GeGLU."""
    GROUPS: tl.constexpr = (K + 31) // 32
    s = tl.arange(0, SETS)
    first = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    row = first + s[:, None] * (rows // SETS)
    inside = (first < rows // SETS) & (s < SETS)[:, None]
    block = tl.program_id(0) // (16 // ROWS) + s * (rows // SETS // 16)
    within = tl.program_id(0) % (16 // ROWS) * ROWS + tl.arange(0, ROWS)
    word_ptrs, scale_ptrs, g = _pointers(words_ptr, scales_ptr, block, within, K, BITS, BLOCK_BYTES, G)
    k = tl.arange(0, G * 32)
    words = tl.load(word_ptrs, mask=g < GROUPS, other=0, eviction_policy="evict_first")
    scales = tl.load(scale_ptrs, mask=g < GROUPS, other=0.0, eviction_policy="evict_first")
    _wait(EARLY)
    low = tl.zeros((SETS * ROWS,), tl.float32)
    if a_ptr is not None:
        flat = tl.reshape(inside, (SETS * ROWS,))
        low = _low(a_ptr, b_ptr, b_scales_ptr, tl.reshape(row, (SETS * ROWS,)), flat, RANK, RANKS, B_BYTES, B_BITS)
    total = tl.zeros((SETS, G, BITS, ROWS, 1), tl.float32)
    squares = tl.zeros((G * 32,), tl.float32)
    for start in tl.range(0, GROUPS, G, loop_unroll_factor=2):
        following = start + G + g < GROUPS
        words_next = tl.load(word_ptrs + (start + G) * (16 * BITS), mask=following, other=0, eviction_policy="evict_first")
        scales_next = tl.load(scale_ptrs + (start + G) * 16, mask=following, other=0.0, eviction_policy="evict_first")
        v, square = _inputs(x_ptr, plus_ptr, beside_ptr, norm_ptr, start * 32 + k, start * 32 + k < K)
        squares += square
        v = _in_words(v, G, BITS) * _units(BITS)[None, None, :]
        total += tl.sum(_codes(words, exponent, BITS) * v[None, :, :, None, :], 4, keep_dims=True) * scales.to(tl.float32)
        words, scales = words_next, scales_next
    scale = _scale(squares, beside_ptr, norm_ptr, eps, K)
    sums = tl.sum(tl.reshape(total, (SETS, G * BITS, ROWS)), 1)[:, :, None]
    low = tl.reshape(low, (SETS, ROWS, 1))
    _finish(sums, scale, low, row, inside, tl.arange(0, 1), 1, rows, hoisted_ptr, 0, residual_ptr, 0, out_ptr, 0)


@triton.jit
def _prepare(
    x_ptr, x_stride, plus_ptr, plus_stride, beside_ptr, beside_stride, norm_ptr, eps, y_ptr, scale_ptr,
    K: tl.constexpr, PADDED: tl.constexpr, BLOCK_K: tl.constexpr, BITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """norm * (x + plus), rounded, and the norm's scale, of one row; for q4 in the order of the codes."""
    _wait(EARLY)
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    if plus_ptr is not None:
        plus_ptr += m * plus_stride
    if beside_ptr is not None:
        beside_ptr += m * beside_stride
    v, squares = _inputs(x_ptr + m * x_stride, plus_ptr, beside_ptr, norm_ptr, k, k < K)
    tl.store(scale_ptr + m + tl.arange(0, 1), _scale(squares, beside_ptr, norm_ptr, eps, K))
    if BITS == 4:
        v = tl.reshape(_in_words(v, BLOCK_K // 32, BITS), (BLOCK_K,))
    tl.store(y_ptr + m * PADDED + k, v.to(y_ptr.dtype.element_ty), mask=k < PADDED)


@triton.jit
def _low_dot(
    a_ptr, a_stride, b_ptr, b_scales_ptr, row, inside, m, M,
    RANK: tl.constexpr, RANKS: tl.constexpr, BLOCK_BYTES: tl.constexpr, BITS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """B a^T for the rows (n,): the low-rank terms (n, N)."""
    STEP: tl.constexpr = 32 if RANKS > 32 else RANKS
    total = tl.zeros((row.shape[0], m.shape[0]), tl.float32)
    for start in range(0, RANKS, STEP):
        k = start + tl.arange(0, STEP)
        a = tl.load(a_ptr + m.to(tl.int64)[None, :] * a_stride + k[:, None], mask=(m < M)[None, :] & (k < RANK)[:, None], other=0.0)
        b = _entries(b_ptr, b_scales_ptr, row[:, None], k[None, :], inside[:, None] & (k < RANK)[None, :], RANK, BLOCK_BYTES, BITS)
        total = tl.dot(b.to(DTYPE), a.to(DTYPE), total, input_precision=PRECISION)
    return total


@triton.jit
def _matmul(
    y_ptr, scale_ptr, w_ptr, hoisted_ptr, hoisted_stride, a_ptr, a_stride, b_ptr, b_scales_ptr, residual_ptr, residual_stride,
    out_ptr, out_stride, M, rows,
    K: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, B_BYTES: tl.constexpr, B_BITS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    SETS: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """M prepared rows and a plain matrix; N: M, up to 16, 32 or 64."""
    i = tl.arange(0, SETS * ROWS)
    first = tl.program_id(0) * ROWS + i % ROWS
    inside = first < rows // SETS
    row = first + i // ROWS * (rows // SETS)
    m = tl.arange(0, N)
    k = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + row.to(tl.int64)[:, None] * K + k[None, :]
    y_ptrs = y_ptr + m[None, :] * K + k[:, None]
    _wait(EARLY)
    total = tl.zeros((SETS * ROWS, N), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        w = tl.load(w_ptrs + start, mask=inside[:, None] & (start + k < K)[None, :], other=0.0, eviction_policy="evict_first")
        y = tl.load(y_ptrs + start, mask=(m < M)[None, :] & (start + k < K)[:, None], other=0.0)
        total = tl.dot(w.to(DTYPE), y.to(DTYPE), total, input_precision=PRECISION)
    low = tl.zeros((SETS * ROWS, N), tl.float32)
    if a_ptr is not None:
        low = _low_dot(a_ptr, a_stride, b_ptr, b_scales_ptr, row, inside, m, M, RANK, RANKS, B_BYTES, B_BITS, DTYPE, PRECISION)
    scale = tl.load(scale_ptr + m, mask=m < M, other=0.0)
    total, low = tl.reshape(total, (SETS, ROWS, N)), tl.reshape(low, (SETS, ROWS, N))
    row, inside = tl.reshape(row, (SETS, ROWS)), tl.reshape(inside, (SETS, ROWS))
    _finish(
        total, scale, low, row, inside, m, M, rows, hoisted_ptr, hoisted_stride, residual_ptr, residual_stride, out_ptr, out_stride
    )


@triton.jit
def _weights(words, scales, exponent, BITS: tl.constexpr):
    """Weights (..., j) of words and scales (..., 1), in fp32."""
    return _codes(words, exponent, BITS) * (scales.to(tl.float32) * _units(BITS))


@triton.jit
def _matmul_packed(
    y_ptr, scale_ptr, words_ptr, scales_ptr, hoisted_ptr, hoisted_stride, a_ptr, a_stride, b_ptr, b_scales_ptr, residual_ptr,
    residual_stride, out_ptr, out_stride, M, rows, exponent,
    K: tl.constexpr, BITS: tl.constexpr, BLOCK_BYTES: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, B_BYTES: tl.constexpr, B_BITS: tl.constexpr,
    PRECISION: tl.constexpr,
    SETS: tl.constexpr, BLOCKS: tl.constexpr, N: tl.constexpr, G: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """M prepared rows and a packed matrix, of which a program has BLOCKS blocks (for GeGLU of each of the two halves)."""
    GROUPS: tl.constexpr = (K + 31) // 32
    i = tl.arange(0, SETS * BLOCKS)
    first = tl.program_id(0) * BLOCKS + i % BLOCKS
    there = (first * 16 < rows // SETS)[:, None, None, None, None]
    block = first + i // BLOCKS * (rows // SETS // 16)
    word_ptrs, scale_ptrs, g = _pointers(words_ptr, scales_ptr, block, tl.arange(0, 16), K, BITS, BLOCK_BYTES, G)
    m = tl.arange(0, N)
    k = tl.arange(0, G * 32)
    y_ptrs = y_ptr + m[None, :] * (GROUPS * 32) + k[:, None]
    _wait(EARLY)
    total = tl.zeros((SETS * BLOCKS * 16, N), tl.float32)
    for start in tl.range(0, GROUPS, G, num_stages=STAGES):
        mask = there & (start + g < GROUPS)
        words = tl.load(word_ptrs + start * (16 * BITS), mask=mask, other=0, eviction_policy="evict_first")
        scales = tl.load(scale_ptrs + start * 16, mask=mask, other=0.0, eviction_policy="evict_first")
        y = tl.load(y_ptrs + start * 32, mask=(m < M)[None, :] & (start * 32 + k < GROUPS * 32)[:, None], other=0.0)
        w = tl.permute(_weights(words, scales, exponent, BITS).to(tl.bfloat16), (0, 3, 1, 2, 4))
        total = tl.dot(tl.reshape(w, (SETS * BLOCKS * 16, G * 32)), y, total, input_precision=PRECISION)
    i = tl.arange(0, SETS * BLOCKS * 16)
    first = tl.program_id(0) * (BLOCKS * 16) + i % (BLOCKS * 16)
    row, inside = first + i // (BLOCKS * 16) * (rows // SETS), first < rows // SETS
    low = tl.zeros((SETS * BLOCKS * 16, N), tl.float32)
    if a_ptr is not None:
        low = _low_dot(a_ptr, a_stride, b_ptr, b_scales_ptr, row, inside, m, M, RANK, RANKS, B_BYTES, B_BITS, tl.bfloat16, PRECISION)
    scale = tl.load(scale_ptr + m, mask=m < M, other=0.0)
    total, low = tl.reshape(total, (SETS, BLOCKS * 16, N)), tl.reshape(low, (SETS, BLOCKS * 16, N))
    row, inside = tl.reshape(row, (SETS, BLOCKS * 16)), tl.reshape(inside, (SETS, BLOCKS * 16))
    _finish(
        total, scale, low, row, inside, m, M, rows, hoisted_ptr, hoisted_stride, residual_ptr, residual_stride, out_ptr, out_stride
    )


@triton.jit
def _dequantize(
    words_ptr, scales_ptr, out_ptr, rows, exponent, K: tl.constexpr, BITS: tl.constexpr, BLOCK_BYTES: tl.constexpr, G: tl.constexpr
):
    """G groups of one block, from the order of the words to that of the matrix. words_ptr: int32, or bf16 for that format."""
    GROUPS: tl.constexpr = (K + 31) // 32
    block, start = tl.program_id(0), tl.program_id(1) * G
    if BITS == 16:
        g, p = start + tl.arange(0, G)[:, None, None, None], tl.arange(0, 16)[None, :, None, None]
        r, j = tl.arange(0, 16)[None, None, :, None], tl.arange(0, 2)[None, None, None, :]
        at = block.to(tl.int64) * (BLOCK_BYTES // 2) + g * 512 + p * 32 + r * 2 + j
        w = tl.permute(tl.load(words_ptr + at, mask=g < GROUPS, other=0.0).to(tl.float32), (2, 0, 1, 3))
    else:
        word_ptrs, scale_ptrs, g = _pointers(words_ptr, scales_ptr, block + tl.arange(0, 1), tl.arange(0, 16), K, BITS, BLOCK_BYTES, G)
        words = tl.load(word_ptrs + start * (16 * BITS), mask=start + g < GROUPS, other=0)
        w = _weights(words, tl.load(scale_ptrs + start * 16, mask=start + g < GROUPS, other=0.0), exponent, BITS)  # (1, G, vector, 16, j)
        if BITS == 4:
            w = tl.permute(tl.reshape(w, (G, 4, 16, 4, 2)), (2, 0, 4, 1, 3))
        if BITS == 8:
            w = tl.permute(tl.reshape(w, (G, 8, 16, 4)), (2, 0, 1, 3))
    row, k = block.to(tl.int64) * 16 + tl.arange(0, 16)[:, None], start * 32 + tl.arange(0, G * 32)[None, :]
    w = tl.reshape(w, (16, G * 32)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * K + k, w, mask=(row < rows) & (k < K))


@triton.jit
def _embedding(ids_ptr, w_ptr, scales_ptr, out_ptr, K: tl.constexpr, BITS: tl.constexpr, BLOCK_BYTES: tl.constexpr, BLOCK_K: tl.constexpr):
    m, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = tl.load(ids_ptr + m)
    tl.store(out_ptr + m * K + k, _entries(w_ptr, scales_ptr, row, k, k < K, K, BLOCK_BYTES, BITS), mask=k < K)


def linear(
    x: Tensor, weight: Tensor | Packed, *, norm: Tensor | None = None, eps: float = 0.0, plus: Tensor | None = None,
    beside: Tensor | None = None, hoisted: Tensor | None = None, low: tuple[Tensor, Tensor | Packed] | None = None,
    geglu: bool = False, residual: Tensor | None = None, out: Tensor | None = None, early: bool = False,
) -> Tensor:  # fmt: skip
    """A projection with all that surrounds it. x: (M, K) fp32, M from 1 to 64; weight: W (rows, K), bf16, fp16, fp32 or packed.

    With v = x + plus, and scale = 1 / sqrt(mean(v^2) + eps) with a norm, else 1:

        r = (W (norm * v) + hoisted) * scale + B a,    low = (a, B)
        r = gelu(first half of r) * second half        if geglu (exact, with erf)
        r = r + residual

    norm: (K,); plus, beside: (M, K); hoisted: (M, rows); a: (M, rank), B: (rows, rank), rank at most 256; residual and out:
    (M, columns of the result), all fp32 with contiguous rows; out may be residual. B: of any type W can have. With ``beside``
    the mean is over the 2K values of v and beside side by side. For M > 1 norm * v and a are rounded to bf16 if W is bf16 or
    packed, and so are the weights of a packed W; a fp16 W takes inputs of 11 significant bits. A packed bf16 W is unpacked
    first. Returns fp32 (M, rows), with geglu (M, rows / 2).

    early: kernels may begin while those before them in the stream end (programmatic dependent launch, sm_90), and so read W
    before these have ended; only for weights that no running kernel writes. Nothing waits for the host: the call can be
    captured in a CUDA graph. Raises ValueError for shapes that do not fit.
    """
    M, K = x.shape
    rows = weight.rows if isinstance(weight, Packed) else weight.shape[0]
    cols = weight.cols if isinstance(weight, Packed) else weight.shape[1]
    if cols != K or not 1 <= M <= MOST:
        raise ValueError(f"x {tuple(x.shape)} does not fit a matrix {rows, cols}: 1 to {MOST} rows of {cols} inputs are needed")
    if geglu and rows % 2:
        raise ValueError(f"geglu needs two halves, and the matrix has {rows} rows")
    if geglu and isinstance(weight, Packed) and rows % (2 * BLOCK):  # the halves share a block
        gate, up = linear(x, weight, norm=norm, eps=eps, plus=plus, beside=beside, hoisted=hoisted, low=low).chunk(2, dim=1)
        r = F.gelu(gate) * up if residual is None else F.gelu(gate) * up + residual
        return r if out is None else out.copy_(r)
    if isinstance(weight, Packed) and weight.format == "bf16":
        weight, early = dequantize(weight), False
    if M == 1 and K % 2 and isinstance(weight, Tensor):  # no whole words
        weight, early = weight.float(), False
    columns = rows // 2 if geglu else rows  # of the result
    if out is None:
        out = x.new_empty(M, columns)
    early = early and not INTERPRETED
    launch = {"launch_pdl": True} if early else {}
    a, b = low if low is not None else (None, None)
    b_data, b_scales, b_bits, b_bytes = _views(b)
    rank = 0 if a is None else a.shape[1]
    around = {
        "hoisted_ptr": hoisted, "a_ptr": a, "b_ptr": b_data, "b_scales_ptr": b_scales, "residual_ptr": residual, "out_ptr": out,
        "rows": rows, "K": K, "RANK": rank, "RANKS": max(16, triton.next_power_of_2(rank)), "B_BYTES": b_bytes, "B_BITS": b_bits,
        "SETS": 1 + geglu, "EARLY": early,
    }  # fmt: skip
    if isinstance(weight, Packed):
        packed = {
            "words_ptr": weight.data.view(torch.int32), "scales_ptr": weight.data.view(torch.float16), "exponent": EXPONENT,
            "BITS": weight.bits, "BLOCK_BYTES": weight.block_bytes,
        }  # fmt: skip
    if M == 1:
        around |= {"x_ptr": x, "plus_ptr": plus, "beside_ptr": beside, "norm_ptr": norm, "eps": eps}
        if isinstance(weight, Packed):
            # Few rows: parts of blocks, or some processors had twice the work of others.
            n, groups, warps = (16, 16, 4) if columns > MANY else (8, 64, 8) if columns > FEW else (4, 128, 8)
            groups = groups * 4 // weight.bits // (1 + geglu)
            _matvec_packed[(triton.cdiv(columns, n),)](**around, **packed, **launch, ROWS=n, G=groups, num_warps=warps, maxnreg=80)
        else:
            half = HALVES.get(weight.dtype)
            words_of = weight if half is None else weight.view(torch.int32)
            n, words, warps = (8, 256, 4) if columns > MANY else (4, 512, 4) if columns > FEW else (1, 2048, 8)
            n = max(1, n // (1 + geglu)) if not INTERPRETED else min(128, triton.next_power_of_2(columns))
            _matvec[(triton.cdiv(columns, n),)](
                **around, w_ptr=words_of, HALF=half, ROWS=n, WORDS=words, num_warps=warps, maxnreg=96, **launch
            )
        return out
    rounded = isinstance(weight, Packed) or weight.dtype == torch.bfloat16
    dtype = torch.bfloat16 if rounded else torch.float32
    padded = triton.cdiv(K, GROUP) * GROUP if isinstance(weight, Packed) else K
    y, scale = x.new_empty(M, padded, dtype=dtype), x.new_empty(M)
    _prepare[(M,)](
        x, x.stride(0), plus, _stride(plus), beside, _stride(beside), norm, eps, y, scale,
        K, padded, max(GROUP, triton.next_power_of_2(K)), weight.bits if isinstance(weight, Packed) else 0, early, num_warps=8, **launch,
    )  # fmt: skip
    around |= {
        "y_ptr": y, "scale_ptr": scale, "hoisted_stride": _stride(hoisted), "a_stride": _stride(a), "residual_stride": _stride(residual),
        "out_stride": out.stride(0), "M": M, "N": max(16, triton.next_power_of_2(M)),
        "PRECISION": "tf32" if isinstance(weight, Tensor) and weight.dtype == torch.float16 else "ieee",
    }  # fmt: skip
    # What is on its way to all processors must be some megabytes: few rows take longer tiles, many columns of x fewer stages.
    few = columns <= MANY
    n = 32 if few else 64
    if isinstance(weight, Packed):
        blocks, stages = n // BLOCK // (1 + geglu), 4 if M > 32 else 6
        around |= {"BLOCKS": blocks, "G": 8 if few else 4, "STAGES": stages}
        _matmul_packed[(triton.cdiv(columns, blocks * BLOCK),)](**around, **packed, num_warps=8 if few else 4, **launch)
    else:
        n //= 1 + geglu
        block = (256 if few else 128) if rounded else 32
        around |= {"ROWS": n, "BLOCK_K": block, "STAGES": 4 if few or M <= 32 else 3, "DTYPE": tl.bfloat16 if rounded else tl.float32}
        _matmul[(triton.cdiv(columns, n),)](**around, w_ptr=weight, num_warps=4, **launch)
    return out


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _views(weight: Tensor | Packed | None) -> tuple[Tensor | None, Tensor | None, int, int]:
    """What ``_entries`` reads: the data, the scales, BITS and BLOCK_BYTES."""
    if not isinstance(weight, Packed):
        return weight, None, 0, 0
    if weight.format == "bf16":
        return weight.data.view(torch.bfloat16), None, 16, weight.block_bytes
    return weight.data, weight.data.view(torch.float16), weight.bits, weight.block_bytes


def dequantize(weight: Packed, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None) -> Tensor:
    """The matrix (rows, cols) in ``dtype``: code * scale in fp32, rounded. Into ``out`` (contiguous, its type) if it is given."""
    if out is None:
        out = torch.empty(weight.rows, weight.cols, dtype=dtype, device=weight.data.device)
    groups = triton.cdiv(weight.cols, GROUP)
    data = weight.data.view(torch.bfloat16 if weight.format == "bf16" else torch.int32)
    scales = weight.data.view(torch.float16)
    _dequantize[(triton.cdiv(weight.rows, BLOCK), triton.cdiv(groups, 8))](
        data, scales, out, weight.rows, EXPONENT, weight.cols, weight.bits, weight.block_bytes, 8, num_warps=4
    )
    return out


def embedding(ids: Tensor, weight: Packed) -> Tensor:
    """Rows ``ids`` (M,), int64, of a packed matrix. Returns fp32 (M, cols)."""
    out = torch.empty(ids.shape[0], weight.cols, dtype=torch.float32, device=weight.data.device)
    data, scales, bits, block_bytes = _views(weight)
    _embedding[(ids.shape[0], triton.cdiv(weight.cols, 512))](ids, data, scales, out, weight.cols, bits, block_bytes, 512)
    return out
