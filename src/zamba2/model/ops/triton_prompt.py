"""What lies between the products of a prompt on a GPU, in Triton: each value goes to memory and back once, where the model's own
operations would take it there twice. Inference alone; the definitions are the model's (``model.model``).

Letters: T tokens, H hidden size, I inner size of the MLP, r rank of an adapter, d head dimension.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, var-annotated"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zamba2.model.ops.triton_norms import _pieces, _put, _raw, _tile, _vector
from zamba2.model.ops.triton_scan import registers

__all__ = ["add_norm", "geglu_adapted", "place_heads"]

HALVES = 2048  # elements of half a head that a program of ``place_heads`` takes: 16 for each thread of four warps


@triton.jit(do_not_specialize=["rows"])
def _add_norm(
    x_ptr, t_ptr, squares_ptr, beside_ptr, weight_ptr, sum_ptr, y_ptr, scale_ptr, rows, width, parts, size, size_eps, eps,
    PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Some rows; see ``add_norm``. All loads come before the first sum over a row and the first store, which they could not pass."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if squares_ptr is not None:
        part = tl.arange(0, PARTS)[None, :]
        each = tl.load(squares_ptr + row[:, None] * parts + part, mask=(row < rows)[:, None] & (part < parts), other=0.0)
    sums, added, besides = (), (), ()
    for i in tl.static_range(BLOCKS):
        c = i * BLOCK + tl.arange(0, BLOCK)
        sums += (_raw(x_ptr, row, width, c, rows, width),)
        if t_ptr is not None:
            added += (_raw(t_ptr, row, width, c, rows, width),)
        if beside_ptr is not None:
            besides += (_raw(beside_ptr, row, width, c, rows, width),)
    squares, of = tl.zeros([ROWS, BLOCK], tl.float32), width
    if t_ptr is not None:
        wholes = ()
        if squares_ptr is not None:
            gain = tl.rsqrt(tl.sum(each, 1) / size + size_eps)[:, None]
        for i in tl.static_range(BLOCKS):
            t = added[i].to(tl.float32)
            if squares_ptr is not None:
                t *= gain
            wholes += ((sums[i].to(tl.float32) + t).to(x_ptr.dtype.element_ty),)  # the norm sees what the stream keeps
        sums = wholes
    for i in tl.static_range(BLOCKS):
        value = sums[i].to(tl.float32)
        squares += value * value
        if beside_ptr is not None:
            beside = besides[i].to(tl.float32)
            squares += beside * beside
    if beside_ptr is not None:
        of = 2 * width
    scale = tl.rsqrt(tl.sum(squares, 1) / of + eps)
    if beside_ptr is not None:
        tl.store(scale_ptr + row, scale, mask=row < rows)
    for i in tl.static_range(BLOCKS):
        c = i * BLOCK + tl.arange(0, BLOCK)
        if sum_ptr is not None:
            _put(sum_ptr, row, width, c, rows, width, sums[i])
        _put(y_ptr, row, width, c, rows, width, sums[i].to(tl.float32) * scale[:, None] * _vector(weight_ptr, c, width))


def add_norm(
    x: Tensor, t: Tensor | None, weight: Tensor, eps: float, *, squares: Tensor | None = None, size: int = 1, size_eps: float = 0.0,
    beside: Tensor | None = None, keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """x + t, and its RMSNorm.

    x, t: (T, H), contiguous; weight: (H,) or longer, of which the first H are used. squares: (T, parts) fp32; t is then divided by the
    root of their sum over ``size`` plus ``size_eps``: what a norm in front of the product that gave t would have done. beside: (T, H); the
    norm is then of [x + t, beside], 2H wide, of which the left half is taken (``ops.concat_rms_norm``). keep: store the sum.
    Returns the sum (x itself where there is no t or none is kept) and its norm, (T, H) in x's dtype, and with ``beside`` the scale 1/rms,
    (T, 1) fp32.
    """
    rows, width = x.shape
    y, total = torch.empty_like(x), torch.empty_like(x) if t is not None and keep else None
    scale = None if beside is None else torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    pieces, parts = _pieces(width), 1 if squares is None else squares.shape[1]
    _add_norm[(triton.cdiv(rows, pieces["ROWS"]),)](
        x, t, squares, beside, weight, total, y, scale, rows, width, parts, size, size_eps, eps,
        PARTS=triton.next_power_of_2(parts), **pieces,
    )  # fmt: skip
    return x if total is None else total, y, scale


@triton.jit(do_not_specialize=["rows"])
def _geglu_adapted(
    projected_ptr, low_ptr, up_ptr, y_ptr, rows, rank, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the result; program (rows, columns). What was projected is on its way while the adapter is multiplied."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    gate, up = _raw(projected_ptr, row, 2 * width, c, rows, width), _raw(projected_ptr + width, row, 2 * width, c, rows, width)
    of_gate, of_up = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        low = tl.load(low_ptr + row[:, None] * rank + r[None, :], mask=(row < rows)[:, None] & (r < rank)[None, :], other=0.0)
        at, inside = up_ptr + c[None, :].to(tl.int64) * rank + r[:, None], (c < width)[None, :] & (r < rank)[:, None]
        of_gate = tl.dot(low, tl.load(at, mask=inside, other=0.0), of_gate, input_precision=PRECISION)
        at += tl.cast(width, tl.int64) * rank
        of_up = tl.dot(low, tl.load(at, mask=inside, other=0.0), of_up, input_precision=PRECISION)
    value = of_gate + gate.to(tl.float32)
    value *= 0.5 + 0.5 * tl.erf(value * 0.7071067811865476)
    _put(y_ptr, row, width, c, rows, width, value * (of_up + up.to(tl.float32)))


def geglu_adapted(projected: Tensor, low: Tensor, up: Tensor) -> Tensor:
    """GELU(g) * u with exact GELU, where [g | u] = projected + low up^T: ``ops.geglu`` with its adapter's second product inside.

    projected: (T, 2I); low: (T, r); up: (2I, r), all contiguous and of one dtype. Returns (T, I).
    """
    rows, width = len(projected), projected.shape[1] // 2
    wide = projected.dtype == torch.float32
    y = projected.new_empty(rows, width)
    tile = (32, 64) if wide else (128, 64)
    _geglu_adapted[triton.cdiv(rows, tile[0]), triton.cdiv(width, tile[1])](
        projected, low, up, y, rows, low.shape[1], width, *tile, BLOCK_R=32 if wide else 64, PRECISION="ieee" if wide else "tf32",
        num_warps=8, num_stages=3, **registers(y, 128),  # two programs on a multiprocessor
    )  # fmt: skip
    return y


@triton.jit
def _half(projected_ptr, hoisted_ptr, adapted_ptr, scale, row, stride, c, rows, end):
    """Half a head of some rows."""
    value = _tile(projected_ptr, row, stride, c, rows, end) + scale * _tile(hoisted_ptr, row, stride, c, rows, end)
    if adapted_ptr is not None:
        value += _tile(adapted_ptr, row, stride, c, rows, end)
    return value


@triton.jit(do_not_specialize=["rows"])
def _place_heads(
    projected_ptr, hoisted_ptr, scale_ptr, adapted_ptr, cos_ptr, sin_ptr, q_ptr, kv_ptr, rows, heads, kv_heads,
    HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One head of some rows, a query's, key's or value's."""
    row, head = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    stride = (heads + 2 * kv_heads) * 2 * HALF
    i, begin = tl.arange(0, BLOCK), head * 2 * HALF
    scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)[:, None]
    first = _half(projected_ptr, hoisted_ptr, adapted_ptr, scale, row, stride, begin + i, rows, begin + HALF)
    second = _half(projected_ptr, hoisted_ptr, adapted_ptr, scale, row, stride, begin + HALF + i, rows, begin + 2 * HALF)
    if cos_ptr is not None:  # noqa: SIM102 (Triton's: known when it compiles)
        if head < heads + kv_heads:
            cos, sin = _tile(cos_ptr, row, 2 * HALF, i, rows, HALF), _tile(sin_ptr, row, 2 * HALF, i, rows, HALF)
            first, second = first * cos - second * sin, second * cos + first * sin
    if head < heads:
        _put(q_ptr + begin, row, heads * 2 * HALF, i, rows, HALF, first)
        _put(q_ptr + begin + HALF, row, heads * 2 * HALF, i, rows, HALF, second)
    else:
        kv_ptr += (head - heads).to(tl.int64) * rows * 2 * HALF
        _put(kv_ptr, row, 2 * HALF, i, rows, HALF, first)
        _put(kv_ptr + HALF, row, 2 * HALF, i, rows, HALF, second)


def place_heads(
    projected: Tensor, hoisted: Tensor, scale: Tensor, *, heads: int, kv_heads: int, adapted: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Queries where attention reads them, keys and values where they stay: projected + scale * hoisted + adapted, rotated.

    projected, hoisted, adapted: (T, (heads + 2 kv_heads) d), [q | k | v], contiguous; scale: (T, 1) fp32; rope: cos and sin of
    queries and keys, (T, d) fp32 each, of which the first half is used. Returns q (T, heads, d) and keys and values (2, kv_heads, T, d).
    """
    rows, d = len(projected), projected.shape[1] // (heads + 2 * kv_heads)
    q, kv = projected.new_empty(rows, heads, d), projected.new_empty(2, kv_heads, rows, d)
    cos, sin = (None, None) if rope is None else rope
    block = triton.next_power_of_2(d // 2)
    some = max(1, HALVES // block)
    _place_heads[triton.cdiv(rows, some), heads + 2 * kv_heads](
        projected, hoisted, scale, adapted, cos, sin, q, kv, rows, heads, kv_heads, HALF=d // 2, ROWS=some, BLOCK=block
    )
    return q, kv
