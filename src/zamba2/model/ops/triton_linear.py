"""Matrix products with few rows, as decoding needs them: every weight is read once, in the format it is stored in.

One kernel does a whole projection: the norm before it, hoisted and low-rank terms, GeGLU and the residual behind it. The norm's
scale is a factor of the finished sum, so the squares are summed in the same loop as the products and no pass comes before.

  one row       a program takes a few rows of the matrix and all inputs. What bounds it is memory, so the next tile of weights
                is on its way while one is used. Multiply-adds in fp32; packed weights meet inputs rounded to int8 per group of
                32 and are added up in integers, four at a time, as in the native engine.
  2 to 64 rows  the inputs are normed and rounded to the weights' type by a small kernel first, then tensor cores. A matrix of few
                rows would leave processors idle: its columns are divided too, and the parts of the sums are added up by the
                small kernel of the product that reads them.

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

__all__ = ["dequantize", "embedding", "linear", "stages_for"]

MOST = 64  # rows of x
HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
FEW, MANY = 512, 4096  # columns of a result, where other tiles begin
# Arguments of kernels, since one logical instruction takes no second constant beside its mask.
EXPONENT = 0x4B000000  # of 2 ** 23
SIGNS = -0x7F7F7F80  # of four bytes
INTERPRETED = triton.knobs.runtime.interpret  # where few large programs take the least time
EMULATED = tl.constexpr(INTERPRETED)  # there is no inline assembly then
PARTS = 2 if INTERPRETED else 4  # of the columns of a matrix with at most MANY rows


@triton.jit
def _loaded(x_ptr, plus_ptr, beside_ptr, norm_ptr, k, inside):
    """x and what there is of plus, beside and norm at the inputs k, 0 outside."""
    loaded = (tl.load(x_ptr + k, mask=inside, other=0.0).to(tl.float32),)
    if plus_ptr is not None:
        loaded += (tl.load(plus_ptr + k, mask=inside, other=0.0),)  # type: ignore[assignment]
    if beside_ptr is not None:
        loaded += (tl.load(beside_ptr + k, mask=inside, other=0.0),)  # type: ignore[assignment]
    if norm_ptr is not None:
        loaded += (tl.load(norm_ptr + k, mask=inside, other=0.0),)  # type: ignore[assignment]
    return loaded


@triton.jit
def _inputs(loaded, plus_ptr, beside_ptr, norm_ptr):
    """norm * (x + plus) of what ``_loaded`` gives, and the squares that the norm's mean is taken of; fp32."""
    v = loaded[0]
    if plus_ptr is not None:
        v += loaded[1]
    squares = v * v
    if beside_ptr is not None:
        beside = loaded[1 if plus_ptr is None else 2]
        squares += beside * beside
    if norm_ptr is not None:
        v *= loaded[len(loaded) - 1]
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
        word = tl.load(w_ptr + block * (BLOCK_BYTES // 4) + group * (16 * BITS) + within // 4 * 16 + r, mask=inside, other=0)
        code = (word >> (within % 4 * 8 + k % 32 // (4 * BITS) * 4)) & ((1 << BITS) - 1)
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
        loaded = _loaded(x_ptr, plus_ptr, beside_ptr, norm_ptr, start * J + k, start * J + k < K)
        v, square = _inputs(loaded, plus_ptr, beside_ptr, norm_ptr)
        squares += square
        total += tl.sum(_halves(w, HALF) * tl.reshape(v, (WORDS, J))[None, :, :], 2, keep_dims=True)
        w = w_next
    scale = _scale(squares, beside_ptr, norm_ptr, eps, K)
    r = tl.reshape(tl.sum(total, 1), (SETS, ROWS, 1))
    low = tl.reshape(low, (SETS, ROWS, 1))
    row, inside = tl.reshape(row, (SETS, ROWS)), tl.reshape(inside, (SETS, ROWS))
    _finish(r, scale, low, row, inside, tl.arange(0, 1), 1, rows, hoisted_ptr, 0, residual_ptr, 0, out_ptr, 0)


@triton.jit
def _matvec_pointers(
    words_ptr, scales_ptr, row, K: tl.constexpr, BITS: tl.constexpr, BLOCK_BYTES: tl.constexpr, G: tl.constexpr, V: tl.constexpr
):
    """To words (V, G, sets, H, rows), vector h * V + v, and scales (V, G, sets, rows) of ``row`` (sets, rows); and the groups.

    Triton spreads the last dimension over threads first, then the first, the second and so on: a thread has all of H.
    """
    v = tl.arange(0, V)[:, None, None, None]
    g = tl.arange(0, G)[None, :, None, None]
    block, r = (row // 16).to(tl.int64)[None, None, :, :], (row % 16)[None, None, :, :]
    h = tl.arange(0, BITS // V)[None, None, None, :, None]
    words = words_ptr + (block * (BLOCK_BYTES // 4) + g * (16 * BITS) + v * 16 + r)[:, :, :, None, :] + h * (16 * V)
    scales = scales_ptr + (block * (BLOCK_BYTES // 2) + (K + 31) // 32 * (32 * BITS) + g * 16 + r + 0 * v)
    return words, scales, g


@triton.jit
def _dot4(a, b, c):
    """c + the sum of a's four int8 codes times b's."""
    if EMULATED:
        for i in tl.static_range(4):
            c += (a << (24 - 8 * i) >> 24) * (b << (24 - 8 * i) >> 24)
    else:
        c = tl.inline_asm_elementwise("dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1)
    return c


@triton.jit
def _quantized(v):
    """Groups of inputs (4, 8 / P, G, P) as int8 codes, four to a word (G, 8), and scales (G,): the largest / 127, ties to even."""
    bits = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # integers: the largest is a NaN if there is one
    largest = tl.maximum(tl.max(tl.max(tl.max(bits, 3), 0), 0), 0x0DA24260).to(tl.float32, bitcast=True)  # 1e-30, for groups of zeros
    code = v * tl.math.div_rn(127.0, largest)[None, None, :, None] + 12582912.0  # 1.5 * 2 ** 23 rounds to integers
    # The low bytes side by side: summed as numbers, each 128 too large so that none borrows from the next, the rest taken off.
    words = tl.sum(code.to(tl.int32, bitcast=True) << (8 * tl.arange(0, 4))[:, None, None, None], 0) + -0x0ABF7F80
    return tl.reshape(tl.permute(words, (1, 0, 2)), (v.shape[2], 8)) ^ -0x7F7F7F80, largest * (1 / 127)


@triton.jit
def _packed_sums(words, scales, v, signs, BITS: tl.constexpr):
    """Products (V, G, SETS, ROWS) of words (V, G, SETS, H, ROWS) and scales (V, G, SETS, ROWS) with inputs v."""
    V: tl.constexpr = words.shape[0]
    G: tl.constexpr = words.shape[1]
    H: tl.constexpr = words.shape[3]
    codes, unit = _quantized(v)
    if BITS == 4:
        low, high = tl.split(tl.permute(tl.reshape(codes, (G, 2, H, V)), (3, 0, 2, 1)))  # (V, G, H)
        sums = _dot4(((words << 4) & -0x0F0F0F10) ^ signs, low[:, :, None, :, None], tl.zeros_like(words))
        sums = _dot4((words & -0x0F0F0F10) ^ signs, high[:, :, None, :, None], sums)
        unit *= 0.0625  # the codes were taken where they are a byte's high half
    else:
        codes = tl.permute(tl.reshape(codes, (G, H, V)), (2, 0, 1))
        sums = _dot4(words ^ signs, codes[:, :, None, :, None], tl.zeros_like(words))
    sums = (tl.sum(sums, 3) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0  # exact: they lie within 2 ** 22
    return sums * (scales.to(tl.float32) * unit[None, :, None, None])


@triton.jit
def _places_in_groups(G: tl.constexpr, P: tl.constexpr):
    """The inputs (4, 8 / P, G, P) of G groups; a thread has 4 * P of a group, side by side."""
    q, g = tl.arange(0, 8 // P)[None, :, None, None], tl.arange(0, G)[None, None, :, None]
    return g * 32 + q * (4 * P) + tl.arange(0, P)[None, None, None, :] * 4 + tl.arange(0, 4)[:, None, None, None]


@triton.jit
def _chunk(word_ptrs, scale_ptrs, g, there, c, GROUPS: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr):
    """Words and scales of the groups from c * G."""
    mask = (c * G + g < GROUPS) & there
    words = tl.load(word_ptrs + c * G * (16 * BITS), mask=mask[:, :, :, None, :], other=0, eviction_policy="evict_first")
    return words, tl.load(scale_ptrs + c * G * 16, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _matvec_packed(
    x_ptr, plus_ptr, beside_ptr, norm_ptr, eps, words_ptr, scales_ptr, hoisted_ptr, a_ptr, b_ptr, b_scales_ptr, residual_ptr, out_ptr,
    rows, signs,
    K: tl.constexpr, BITS: tl.constexpr, BLOCK_BYTES: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, B_BYTES: tl.constexpr, B_BITS: tl.constexpr,
    SETS: tl.constexpr, ROWS: tl.constexpr, G: tl.constexpr, V: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row of x and a packed matrix, of which a program has ROWS rows, with GeGLU of each of the two halves.

    A thread has BITS / V words of a group and row. The next chunk of G groups is on its way while one is used.
    """
    GROUPS: tl.constexpr = (K + 31) // 32
    CHUNKS: tl.constexpr = (GROUPS + G - 1) // G
    s = tl.arange(0, SETS)
    first = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    row = first + s[:, None] * (rows // SETS)
    inside = (first < rows // SETS) & (s < SETS)[:, None]
    word_ptrs, scale_ptrs, g = _matvec_pointers(words_ptr, scales_ptr, row, K, BITS, BLOCK_BYTES, G, V)
    there = (first // 16 * 16 < rows // SETS)[None, None, :, :]  # whole blocks are, so that loads stay wide
    words, scales = _chunk(word_ptrs, scale_ptrs, g, there, 0, GROUPS, G, BITS)
    B_CODES: tl.constexpr = B_BITS == 4 or B_BITS == 8
    B_G: tl.constexpr = (RANKS + 31) // 32
    if B_CODES:
        b_ptrs, b_scale_ptrs, b_g = _matvec_pointers(b_ptr, b_scales_ptr, row, RANK, B_BITS, B_BYTES, B_G, B_BITS)
        b_words, b_scales = _chunk(b_ptrs, b_scale_ptrs, b_g, there, 0, (RANK + 31) // 32, B_G, B_BITS)
    _wait(EARLY)
    P: tl.constexpr = max(1, 32 // (V * SETS * ROWS))
    k = _places_in_groups(G, P)
    v, squares = _inputs(_loaded(x_ptr, plus_ptr, beside_ptr, norm_ptr, k, k < K), plus_ptr, beside_ptr, norm_ptr)
    low = tl.zeros((SETS, ROWS), tl.float32)
    if B_CODES:
        a_k = _places_in_groups(B_G, 1)
        a = tl.load(a_ptr + a_k, mask=a_k < RANK, other=0.0)
        low = tl.sum(tl.reshape(_packed_sums(b_words, b_scales, a, signs, B_BITS), (B_BITS * B_G, SETS, ROWS)), 0)
    elif a_ptr is not None:
        flat = tl.reshape(inside, (SETS * ROWS,))
        low = _low(a_ptr, b_ptr, b_scales_ptr, tl.reshape(row, (SETS * ROWS,)), flat, RANK, RANKS, B_BYTES, B_BITS)
    total = tl.zeros((V, G, SETS, ROWS), tl.float32)
    for c in tl.range(0, CHUNKS, loop_unroll_factor=2):  # by two: or what is on its way would be waited for, to be moved
        ahead = (c + 1) * (G * 32) + k
        words_next, scales_next = _chunk(word_ptrs, scale_ptrs, g, there, c + 1, GROUPS, G, BITS)
        loaded = _loaded(x_ptr, plus_ptr, beside_ptr, norm_ptr, ahead, ahead < K)
        total += _packed_sums(words, scales, v, signs, BITS)
        v, square = _inputs(loaded, plus_ptr, beside_ptr, norm_ptr)
        squares += square
        words, scales = words_next, scales_next
    scale = _scale(tl.reshape(squares, (G * 32,)), beside_ptr, norm_ptr, eps, K)
    sums = tl.sum(tl.reshape(total, (V * G, SETS, ROWS)), 0)[:, :, None]
    low = tl.reshape(low, (SETS, ROWS, 1))
    _finish(sums, scale, low, row, inside, tl.arange(0, 1), 1, rows, hoisted_ptr, 0, residual_ptr, 0, out_ptr, 0)


@triton.jit
def _summed(ptr, part_stride, k, inside, PARTS: tl.constexpr):
    """The sum of PARTS vectors at k, fp32."""
    v = tl.load(ptr + k, mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(1, PARTS):
        v += tl.load(ptr + i * part_stride + k, mask=inside, other=0.0)
    return v


@triton.jit
def _prepare(
    x_ptr, x_part, x_stride, plus_ptr, plus_part, plus_stride, beside_ptr, beside_stride, norm_ptr, eps, total_ptr, y_ptr, scale_ptr,
    X_PARTS: tl.constexpr, PLUS_PARTS: tl.constexpr,
    K: tl.constexpr, PADDED: tl.constexpr, BLOCK_K: tl.constexpr, BITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """norm * (x + plus), rounded, and the norm's scale, of one row; for q4 in the order of the codes. x + plus goes to total."""
    _wait(EARLY)
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    v = _summed(x_ptr + m * x_stride, x_part, k, inside, X_PARTS)
    if plus_ptr is not None:
        v += _summed(plus_ptr + m * plus_stride, plus_part, k, inside, PLUS_PARTS)
    if total_ptr is not None:
        tl.store(total_ptr + m * K + k, v, mask=inside)
    loaded = (v,)
    if beside_ptr is not None:
        loaded += (tl.load(beside_ptr + m * beside_stride + k, mask=inside, other=0.0),)  # type: ignore[assignment]
    if norm_ptr is not None:
        loaded += (tl.load(norm_ptr + k, mask=inside, other=0.0),)  # type: ignore[assignment]
    v, squares = _inputs(loaded, None, beside_ptr, norm_ptr)
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
    out_ptr, out_part, out_stride, M, rows,
    K: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, B_BYTES: tl.constexpr, B_BITS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    SETS: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """M prepared rows and a plain matrix, of whose columns a program has one of PARTS; N: M, up to 16, 32 or 64."""
    LENGTH: tl.constexpr = ((K + BLOCK_K - 1) // BLOCK_K + PARTS - 1) // PARTS * BLOCK_K
    begin = tl.program_id(1) * LENGTH
    i = tl.arange(0, SETS * ROWS)
    first = tl.program_id(0) * ROWS + i % ROWS
    inside = first < rows // SETS
    row = first + i // ROWS * (rows // SETS)
    m = tl.arange(0, N)
    k = begin + tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + row.to(tl.int64)[:, None] * K + k[None, :]
    y_ptrs = y_ptr + m[None, :] * K + k[:, None]
    _wait(EARLY)
    total = tl.zeros((SETS * ROWS, N), tl.float32)
    for start in tl.range(0, LENGTH, BLOCK_K, num_stages=STAGES):
        w = tl.load(w_ptrs + start, mask=inside[:, None] & (start + k < K)[None, :], other=0.0, eviction_policy="evict_first")
        y = tl.load(y_ptrs + start, mask=(m < M)[None, :] & (start + k < K)[:, None], other=0.0)
        total = tl.dot(w.to(DTYPE), y.to(DTYPE), total, input_precision=PRECISION)
    low = tl.zeros((SETS * ROWS, N), tl.float32)
    if a_ptr is not None:
        low = _low_dot(a_ptr, a_stride, b_ptr, b_scales_ptr, row, inside, m, M, RANK, RANKS, B_BYTES, B_BITS, DTYPE, PRECISION)
    scale = tl.load(scale_ptr + m, mask=m < M, other=0.0)
    total, low = tl.reshape(total, (SETS, ROWS, N)), tl.reshape(low, (SETS, ROWS, N))
    row, inside = tl.reshape(row, (SETS, ROWS)), tl.reshape(inside, (SETS, ROWS))
    out_ptr += tl.program_id(1).to(tl.int64) * out_part
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
    residual_stride, out_ptr, out_part, out_stride, M, rows, exponent,
    K: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr, BLOCK_BYTES: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, B_BYTES: tl.constexpr, B_BITS: tl.constexpr,
    PRECISION: tl.constexpr,
    SETS: tl.constexpr, BLOCKS: tl.constexpr, N: tl.constexpr, G: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """M prepared rows and a packed matrix, of which a program has BLOCKS blocks (for GeGLU of each of the two halves) and one of PARTS of
    their columns."""
    GROUPS: tl.constexpr = (K + 31) // 32
    LENGTH: tl.constexpr = ((GROUPS + G - 1) // G + PARTS - 1) // PARTS * G
    begin = tl.program_id(1) * LENGTH
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
    for start in tl.range(begin, begin + LENGTH, G, num_stages=STAGES):
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
    out_ptr += tl.program_id(1).to(tl.int64) * out_part
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
    geglu: bool = False, residual: Tensor | None = None, total: Tensor | None = None, split: bool = False, early: bool = False,
) -> Tensor:  # fmt: skip
    """A projection with all that surrounds it. x: (M, K) fp32, M from 1 to 64; weight: W (rows, K), bf16, fp16, fp32 or packed.

    With v = x + plus, and scale = 1 / sqrt(mean(v^2) + eps) with a norm, else 1:

        r = (W (norm * v) + hoisted) * scale + B a,    low = (a, B)
        r = gelu(first half of r) * second half        if geglu (exact, with erf)
        r = r + residual

    norm: (K,); plus, beside: (M, K); hoisted: (M, rows); a: (M, rank), B: (rows, rank), rank at most 256; residual: (M, columns of the
    result), all fp32 with contiguous rows. B: of any type W can have. With ``beside`` the mean is over the 2K values of v and beside side
    by side. For M > 1 norm * v and a are rounded to bf16 if W is bf16 or packed, and so are the weights of a packed W; a fp16 W takes
    inputs of 11 significant bits. For M = 1 a q8 or q4 W multiplies norm * v (and a q8 or q4 B beside it a) rounded to int8 per group of
    32 inputs, scale = largest / 127: an error of about 0.4 % of the product's norm, the native engine's. A packed bf16 W is unpacked
    first. Returns fp32 (M, rows), with geglu (M, rows / 2).

    split: for M > 1 the result may be parts (parts, M, rows) that have yet to be added up; of a product with at most a norm before it.
    x and plus may be such parts, for M > 1. total: for M > 1, (M, K) fp32, contiguous, where x + plus goes.

    early: kernels may begin while those before them in the stream end (programmatic dependent launch, sm_90), and so read W
    before these have ended; only for weights that no running kernel writes. Nothing waits for the host: the call can be
    captured in a CUDA graph. Raises ValueError for shapes that do not fit.
    """
    M, K = x.shape[-2:]
    rows = weight.rows if isinstance(weight, Packed) else weight.shape[0]
    cols = weight.cols if isinstance(weight, Packed) else weight.shape[1]
    if cols != K or not 1 <= M <= MOST:
        raise ValueError(f"x {tuple(x.shape)} does not fit a matrix {rows, cols}: 1 to {MOST} rows of {cols} inputs are needed")
    if split and (geglu or any(behind is not None for behind in (hoisted, low, residual))):
        raise ValueError("only a product with nothing behind it can be split")
    if M == 1 and (total is not None or _parts(x) + _parts(plus) > 2):
        raise ValueError("parts and a total are of several rows, not of one")
    if geglu and rows % 2:
        raise ValueError(f"geglu needs two halves, and the matrix has {rows} rows")
    if geglu and isinstance(weight, Packed) and rows % (2 * BLOCK):  # the halves share a block
        both = linear(x, weight, norm=norm, eps=eps, plus=plus, beside=beside, hoisted=hoisted, low=low, total=total)
        gate, up = both.chunk(2, dim=1)
        return F.gelu(gate) * up if residual is None else F.gelu(gate) * up + residual
    if isinstance(weight, Packed) and weight.format == "bf16":
        weight, early = dequantize(weight), False
    if M == 1 and K % 2 and isinstance(weight, Tensor):  # no whole words
        weight, early = weight.float(), False
    columns = rows // 2 if geglu else rows  # of the result
    parts = PARTS if split and M > 1 and columns <= MANY else 1
    out = x.new_empty(parts, M, columns) if parts > 1 else x.new_empty(M, columns)
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
            "words_ptr": weight.data.view(torch.int32), "scales_ptr": weight.data.view(torch.float16),
            "BITS": weight.bits, "BLOCK_BYTES": weight.block_bytes,
        }  # fmt: skip
    if M == 1:
        around |= {"x_ptr": x, "plus_ptr": plus, "beside_ptr": beside, "norm_ptr": norm, "eps": eps}
        if isinstance(weight, Packed):
            # Few rows: parts of blocks, or some processors had twice the work of others. A processor has 3 programs at once.
            n, vectors, least = (32 // (1 + geglu), 1, 8) if columns > MANY else (8, 2, 32) if columns > FEW else (4, 4, 64)
            n_groups = triton.cdiv(K, GROUP)
            groups = max(least, min(64, n_groups & -n_groups))  # a power of 2 that divides n_groups if there is a good one
            warps = max(1, (1 + geglu) * n * vectors * groups // 128)
            if weight.bits == 8 and warps < 8:
                warps, vectors = 2 * warps, 2 * vectors
            _matvec_packed[(triton.cdiv(columns, n),)](
                **around, **packed, **launch, signs=SIGNS, ROWS=n, G=groups, V=vectors, num_warps=warps, maxnreg=160 if warps <= 4 else 80
            )
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
        x, x.stride(0), x.stride(-2), plus, 0 if plus is None else plus.stride(0), _stride(plus), beside, _stride(beside), norm, eps, total,
        y, scale, _parts(x), _parts(plus), K, padded, max(GROUP, triton.next_power_of_2(K)),
        weight.bits if isinstance(weight, Packed) else 0, early, num_warps=8, **launch,
    )  # fmt: skip
    around |= {
        "y_ptr": y, "scale_ptr": scale, "hoisted_stride": _stride(hoisted), "a_stride": _stride(a), "residual_stride": _stride(residual),
        "out_part": out.stride(0), "out_stride": out.stride(-2), "PARTS": parts, "M": M, "N": max(16, triton.next_power_of_2(M)),
        "PRECISION": "tf32" if isinstance(weight, Tensor) and weight.dtype == torch.float16 else "ieee",
    }  # fmt: skip
    # What is on its way to all processors must be some megabytes: few rows take longer tiles, many columns of x fewer stages.
    few = columns <= MANY and parts == 1
    n = 32 if few else 64
    N = around["N"]
    if isinstance(weight, Packed):
        blocks, groups, warps = n // BLOCK // (1 + geglu), 8 if few else 4, 8 if few else 4
        of_group = n * (4 * weight.bits + 2) + GROUP * N * 2  # codes and scales of n rows, and inputs
        stages = stages_for(4 if M > 32 else 6, groups * of_group, x.device)
        around |= {"BLOCKS": blocks, "G": groups, "STAGES": stages}
        _matmul_packed[triton.cdiv(columns, blocks * BLOCK), parts](**around, **packed, exponent=EXPONENT, num_warps=warps, **launch)
    else:
        block = (256 if few else 128) if rounded else 32
        stages = stages_for(4 if few or M <= 32 else 3, block * (n + N) * dtype.itemsize, x.device)
        around |= {"ROWS": n // (1 + geglu), "BLOCK_K": block, "STAGES": stages, "DTYPE": tl.bfloat16 if rounded else tl.float32}
        _matmul[triton.cdiv(columns, around["ROWS"]), parts](**around, w_ptr=weight, num_warps=4, **launch)
    return out


def stages_for(most: int, size: int, device: torch.device) -> int:
    """How many stages of ``size`` bytes a loop has: ``most``, or as many as there is shared memory for (on most cards 99 KiB a program)."""
    if device.type != "cuda":
        return most
    there = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor - 1024  # which the driver keeps
    return max(1, min(most, there // size))


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(-2)


def _parts(t: Tensor | None) -> int:
    return 1 if t is None or t.dim() == 2 else t.shape[0]


def _views(weight: Tensor | Packed | None) -> tuple[Tensor | None, Tensor | None, int, int]:
    """What ``_entries`` reads: the data, the scales, BITS and BLOCK_BYTES."""
    if not isinstance(weight, Packed):
        return weight, None, 0, 0
    if weight.format == "bf16":
        return weight.data.view(torch.bfloat16), None, 16, weight.block_bytes
    return weight.data.view(torch.int32), weight.data.view(torch.float16), weight.bits, weight.block_bytes


def dequantize(weight: Packed, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The matrix (rows, cols) in ``dtype``: code * scale in fp32, rounded."""
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
