"""The RMSNorms, GEGLU and the sum with what was hoisted, in Triton: every tensor is read and written once, forward and backward.

Definitions, shapes and dtypes are those of ``reference``. fp64 goes to ``chunked``. A program takes ROWS rows and cuts them into
BLOCKS pieces of BLOCK elements, for widths are no powers of two and a single piece would be up to half empty.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from zamba2.model.ops import chunked

__all__ = ["add_hoisted", "concat_rms_norm", "geglu", "rms_norm"]

PIECE = 1024  # elements: eight for each thread of four warps, 16 bytes in bf16
BACKWARD_WARPS = 8  # half the registers for each thread, of which the weight's gradient takes many


@triton.jit
def _raw(ptr, row, stride, c, rows, width):
    """Elements c of some rows, (ROWS, BLOCK) as they are kept, zeros beyond the ends."""
    return tl.load(ptr + row[:, None] * stride + c[None, :], mask=(row < rows)[:, None] & (c < width)[None, :], other=0.0)


@triton.jit
def _tile(ptr, row, stride, c, rows, width):
    """The same in fp32."""
    return _raw(ptr, row, stride, c, rows, width).to(tl.float32)


@triton.jit
def _vector(ptr, c, width):
    """Elements c of a weight, (1, BLOCK) in fp32."""
    return tl.load(ptr + c[None, :], mask=(c < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _put(ptr, row, stride, c, rows, width, values):
    """Store what ``_tile`` would load."""
    tl.store(ptr + row[:, None] * stride + c[None, :], values, mask=(row < rows)[:, None] & (c < width)[None, :])


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _gated_tile(x_ptr, gate_ptr, begin, row, x_row, gate_row, c, rows, width):
    """What the norm is taken of: x, or x SiLU(gate)."""
    value = _tile(x_ptr + begin, row, x_row, c, rows, width)
    if gate_ptr is not None:
        gate = _tile(gate_ptr + begin, row, gate_row, c, rows, width)
        value *= gate * _sigmoid(gate)
    return value


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_forward(
    x_ptr, gate_ptr, weight_ptr, y_ptr, rows, x_row, gate_row, width, eps,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Part of some rows; program (rows, part)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(1) * width
    values, squares = (), tl.zeros([ROWS, BLOCK], tl.float32)
    for i in tl.static_range(BLOCKS):
        c = i * BLOCK + tl.arange(0, BLOCK)
        value = _gated_tile(x_ptr, gate_ptr, begin, row, x_row, gate_row, c, rows, width)
        values += (value,)
        squares += value * value
    scale = tl.rsqrt(tl.sum(squares, 1) / width + eps)[:, None]
    for i in tl.static_range(BLOCKS):
        c = i * BLOCK + tl.arange(0, BLOCK)
        _put(y_ptr + begin, row, GROUPS * width, c, rows, width, values[i] * scale * _vector(weight_ptr + begin, c, width))


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_backward(
    x_ptr, gate_ptr, weight_ptr, dy_ptr, dx_ptr, dgate_ptr, sums_ptr, rows, x_row, gate_row, dy_row, width, eps,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Part of every so-manyth row, and the sum over these rows of the weight's gradient; program (first rows, part).

    With v the gated input, s = 1 / rms and h = weight dy: dv = s h - v s^3 mean(v h). The inputs are read a second time, from
    the cache: to keep them would take all registers.
    """
    first, begin = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1) * width
    sums = ()
    for _ in tl.static_range(BLOCKS):
        sums += (tl.zeros([ROWS, BLOCK], tl.float32),)
    while first < rows:
        row = first + tl.arange(0, ROWS)
        squares, products = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
        for i in tl.static_range(BLOCKS):
            c = i * BLOCK + tl.arange(0, BLOCK)
            value = _gated_tile(x_ptr, gate_ptr, begin, row, x_row, gate_row, c, rows, width)
            squares += value * value
            products += value * _tile(dy_ptr + begin, row, dy_row, c, rows, width) * _vector(weight_ptr + begin, c, width)
        scale = tl.rsqrt(tl.sum(squares, 1) / width + eps)[:, None]
        shared = tl.sum(products, 1)[:, None] / width * scale * scale * scale
        added = ()
        for i in tl.static_range(BLOCKS):
            c = i * BLOCK + tl.arange(0, BLOCK)
            x = _tile(x_ptr + begin, row, x_row, c, rows, width)
            dy = _tile(dy_ptr + begin, row, dy_row, c, rows, width)
            value = x
            if gate_ptr is not None:
                gate = _tile(gate_ptr + begin, row, gate_row, c, rows, width)
                sigmoid = _sigmoid(gate)
                silu = gate * sigmoid
                value *= silu
            gradient = scale * dy * _vector(weight_ptr + begin, c, width) - value * shared
            if gate_ptr is not None:
                _put(dgate_ptr + begin, row, GROUPS * width, c, rows, width, gradient * x * (sigmoid + silu * (1 - sigmoid)))
                gradient *= silu
            _put(dx_ptr + begin, row, GROUPS * width, c, rows, width, gradient)
            added += (sums[i] + dy * value * scale,)
        sums = added
        first += tl.num_programs(0) * ROWS
    if sums_ptr is not None:
        for i in tl.static_range(BLOCKS):
            c = i * BLOCK + tl.arange(0, BLOCK)
            tl.store(sums_ptr + (tl.program_id(0) * GROUPS + tl.program_id(1)) * width + c, tl.sum(sums[i], 0), mask=c < width)


@triton.jit(do_not_specialize=["rows"])
def _concat_forward(
    x_ptr, x0_ptr, weight_ptr, left_ptr, scale_ptr, rows, x_row, x0_row, width, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    xs, squares = (), tl.zeros([ROWS, BLOCK], tl.float32)
    for i in tl.static_range(BLOCKS):
        c = i * BLOCK + tl.arange(0, BLOCK)
        x, x0 = _tile(x_ptr, row, x_row, c, rows, width), _tile(x0_ptr, row, x0_row, c, rows, width)
        xs += (x,)
        squares += x * x + x0 * x0
    scale = tl.rsqrt(tl.sum(squares, 1) / (2 * width) + eps)
    tl.store(scale_ptr + row, scale, mask=row < rows)
    for i in tl.static_range(BLOCKS):
        c = i * BLOCK + tl.arange(0, BLOCK)
        _put(left_ptr, row, width, c, rows, width, xs[i] * scale[:, None] * _vector(weight_ptr, c, width))


@triton.jit(do_not_specialize=["rows"])
def _concat_backward(
    x_ptr, x0_ptr, weight_ptr, scale_ptr, dleft_ptr, dscale_ptr, dx_ptr, dx0_ptr, sums_ptr, rows, x_row, x0_row, dleft_row, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Every so-manyth row, and the sum over these rows of the gradient of the weight's left half.

    With s the scale and t = dscale + sum(weight x dleft), all that arrives at it: dx = s weight dleft - x s^3 t / 2D, and dx0
    is the second term alone.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    sums = ()
    for _ in tl.static_range(BLOCKS):
        sums += (tl.zeros([ROWS, BLOCK], tl.float32),)
    while first < rows:
        row = first + tl.arange(0, ROWS)
        products = tl.zeros([ROWS, BLOCK], tl.float32)
        for i in tl.static_range(BLOCKS):
            c = i * BLOCK + tl.arange(0, BLOCK)
            x, dleft = _tile(x_ptr, row, x_row, c, rows, width), _tile(dleft_ptr, row, dleft_row, c, rows, width)
            products += x * dleft * _vector(weight_ptr, c, width)
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)[:, None]
        arriving = tl.load(dscale_ptr + row, mask=row < rows, other=0.0)[:, None] + tl.sum(products, 1)[:, None]
        shared = arriving / (2 * width) * scale * scale * scale
        added = ()
        for i in tl.static_range(BLOCKS):
            c = i * BLOCK + tl.arange(0, BLOCK)
            x, dleft = _tile(x_ptr, row, x_row, c, rows, width), _tile(dleft_ptr, row, dleft_row, c, rows, width)
            x0 = _tile(x0_ptr, row, x0_row, c, rows, width)
            _put(dx_ptr, row, width, c, rows, width, scale * _vector(weight_ptr, c, width) * dleft - x * shared)
            _put(dx0_ptr, row, width, c, rows, width, -x0 * shared)
            added += (sums[i] + dleft * x * scale,)
        sums = added
        first += tl.num_programs(0) * ROWS
    if sums_ptr is not None:
        for i in tl.static_range(BLOCKS):
            c = i * BLOCK + tl.arange(0, BLOCK)
            tl.store(sums_ptr + tl.program_id(0) * width + c, tl.sum(sums[i], 0), mask=c < width)


@triton.jit
def _gate_and_up(projected_ptr, adapted_ptr, row, c, rows, projected_row, adapted_row, width):
    """[gate | up] = projected + adapted at some rows and columns, and the normal distribution's integral up to the gate."""
    gate = _tile(projected_ptr, row, projected_row, c, rows, width) + _tile(adapted_ptr, row, adapted_row, c, rows, width)
    up = _tile(projected_ptr + width, row, projected_row, c, rows, width) + _tile(adapted_ptr + width, row, adapted_row, c, rows, width)
    return gate, up, 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)


@triton.jit(do_not_specialize=["rows"])
def _geglu_forward(
    projected_ptr, adapted_ptr, y_ptr, rows, projected_row, adapted_row, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate, up, below = _gate_and_up(projected_ptr, adapted_ptr, row, c, rows, projected_row, adapted_row, width)
    _put(y_ptr, row, width, c, rows, width, gate * below * up)


@triton.jit(do_not_specialize=["rows"])
def _geglu_backward(
    projected_ptr, adapted_ptr, dy_ptr, dboth_ptr, rows, projected_row, adapted_row, dy_row, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate, up, below = _gate_and_up(projected_ptr, adapted_ptr, row, c, rows, projected_row, adapted_row, width)
    dy = _tile(dy_ptr, row, dy_row, c, rows, width)
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    _put(dboth_ptr, row, 2 * width, c, rows, width, dy * up * (below + gate * density))
    _put(dboth_ptr + width, row, 2 * width, c, rows, width, dy * gate * below)


def _rows(x: Tensor) -> Tensor:
    """x as a matrix of rows with some stride, a view where that is possible."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _pieces(width: int) -> dict[str, int]:
    """How rows of that width are cut."""
    block = min(PIECE, triton.next_power_of_2(width))
    return {"ROWS": PIECE // block, "BLOCK": block, "BLOCKS": triton.cdiv(width, block)}


def _programs(rows: int, pieces: dict[str, int]) -> int:
    """Programs that share the rows of a backward pass: as many as an H100's 132 processors have room for, four each or two of wide rows."""
    programs: int = min(528 if pieces["BLOCKS"] <= 3 else 264, triton.cdiv(rows, pieces["ROWS"]))
    return programs


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, gate: Tensor | None = None, groups: int = 1) -> Tensor:
    """See ``reference.rms_norm``; x and gate may be of different dtypes and have any stride over the rows."""
    if x.dtype == torch.float64:
        return chunked.rms_norm(x, weight, eps, gate=gate, groups=groups)
    out: Tensor = _RMSNorm.apply(x, weight, eps, gate, groups)
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, gate: Tensor | None, groups: int) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype if gate is None else gate.dtype, device=x.device)
        x, weight, gate = _rows(x), weight.contiguous(), None if gate is None else _rows(gate)
        rows, width = x.shape[0], x.shape[1] // groups
        pieces = _pieces(width)
        _rms_norm_forward[(triton.cdiv(rows, pieces["ROWS"]), groups)](
            x, gate, weight, y, rows, x.stride(0), 0 if gate is None else gate.stride(0), width, eps, GROUPS=groups, **pieces
        )
        ctx.save_for_backward(x, weight, gate)
        ctx.eps, ctx.groups = eps, groups
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate = ctx.saved_tensors
        shape, dy = dy.shape, _rows(dy)
        rows, width = x.shape[0], x.shape[1] // ctx.groups
        dx, dgate = x.new_empty(x.shape), None if gate is None else gate.new_empty(gate.shape)
        pieces = _pieces(width)
        programs = _programs(rows, pieces)
        sums = x.new_empty(programs, x.shape[1], dtype=torch.float32) if ctx.needs_input_grad[1] else None
        _rms_norm_backward[(programs, ctx.groups)](
            x, gate, weight, dy, dx, dgate, sums,
            rows, x.stride(0), 0 if gate is None else gate.stride(0), dy.stride(0), width, ctx.eps, GROUPS=ctx.groups, **pieces,
            num_warps=BACKWARD_WARPS,
        )  # fmt: skip
        return dx.view(shape), None if sums is None else sums.sum(0), None, None if dgate is None else dgate.view(shape), None


def concat_rms_norm(x: Tensor, x0: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See ``reference.concat_rms_norm``; x and x0 may have any stride over the rows."""
    if x.dtype == torch.float64:
        return chunked.concat_rms_norm(x, x0, weight, eps)
    left, scale = _ConcatRMSNorm.apply(x, x0, weight, eps)
    return left, scale


class _ConcatRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, x0: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        left, scale = x.new_empty(x.shape), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        x, x0, weight = _rows(x), _rows(x0), weight.contiguous()
        (rows, width), pieces = x.shape, _pieces(x.shape[1])
        _concat_forward[(triton.cdiv(rows, pieces["ROWS"]),)](
            x, x0, weight, left, scale, rows, x.stride(0), x0.stride(0), width, eps, **pieces
        )
        ctx.save_for_backward(x, x0, weight, scale)
        return left, scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dleft: Tensor, dscale: Tensor) -> tuple[Tensor | None, ...]:
        x, x0, weight, scale = ctx.saved_tensors
        shape, dleft, dscale = dleft.shape, _rows(dleft), dscale.contiguous()
        dx, dx0 = x.new_empty(x.shape), x0.new_empty(x0.shape)
        (rows, width), pieces = x.shape, _pieces(x.shape[1])
        programs = _programs(rows, pieces)
        sums = x.new_empty(programs, width, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        _concat_backward[(programs,)](
            x, x0, weight, scale, dleft, dscale, dx, dx0, sums, rows, x.stride(0), x0.stride(0), dleft.stride(0), width, **pieces,
            num_warps=BACKWARD_WARPS,
        )  # fmt: skip
        dweight = None if sums is None else torch.cat([sums.sum(0), sums.new_zeros(width)])  # the right half is not used here
        return dx.view(shape), dx0.view(shape), dweight, None


def geglu(projected: Tensor, adapted: Tensor) -> Tensor:
    """See ``reference.geglu``; both may have any stride over the rows."""
    if projected.dtype == torch.float64:
        return chunked.geglu(projected, adapted)
    out: Tensor = _GEGLU.apply(projected, adapted)
    return out


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, adapted: Tensor) -> Tensor:
        width = projected.shape[-1] // 2
        y = projected.new_empty(*projected.shape[:-1], width)
        projected, adapted = _rows(projected), _rows(adapted)
        pieces, rows = _pieces(width), projected.shape[0]
        grid = (triton.cdiv(rows, pieces["ROWS"]), pieces.pop("BLOCKS"))
        _geglu_forward[grid](projected, adapted, y, rows, projected.stride(0), adapted.stride(0), width, **pieces)
        ctx.save_for_backward(projected, adapted)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        projected, adapted = ctx.saved_tensors
        shape, dy = (*dy.shape[:-1], projected.shape[1]), _rows(dy)
        rows, width = dy.shape
        dboth, pieces = projected.new_empty(projected.shape), _pieces(width)
        grid = (triton.cdiv(rows, pieces["ROWS"]), pieces.pop("BLOCKS"))
        _geglu_backward[grid](
            projected, adapted, dy, dboth, rows, projected.stride(0), adapted.stride(0), dy.stride(0), width, **pieces
        )
        dboth = dboth.view(shape)
        return dboth, dboth  # one tensor for both, as autograd itself does for a sum


@triton.jit(do_not_specialize=["rows"])
def _add_hoisted_forward(
    projected_ptr, hoisted_ptr, scale_ptr, y_ptr, rows, projected_row, hoisted_row, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """A piece of some rows; program (rows, piece)."""
    row, c = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)[:, None]
    projected, hoisted = _tile(projected_ptr, row, projected_row, c, rows, width), _tile(hoisted_ptr, row, hoisted_row, c, rows, width)
    _put(y_ptr, row, width, c, rows, width, projected + scale * hoisted)


@triton.jit(do_not_specialize=["rows"])
def _add_hoisted_backward(
    hoisted_ptr, scale_ptr, dy_ptr, dhoisted_ptr, dscale_ptr, rows, hoisted_row, dy_row, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Some rows; the gradient of what was projected is dy itself."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    scale, products = tl.load(scale_ptr + row, mask=row < rows, other=0.0)[:, None], tl.zeros([ROWS, BLOCK], tl.float32)
    for i in range(BLOCKS):
        c = i * BLOCK + tl.arange(0, BLOCK)
        dy = _tile(dy_ptr, row, dy_row, c, rows, width)
        products += dy * _tile(hoisted_ptr, row, hoisted_row, c, rows, width)
        _put(dhoisted_ptr, row, width, c, rows, width, dy * scale)
    tl.store(dscale_ptr + row, tl.sum(products, 1), mask=row < rows)


def add_hoisted(projected: Tensor, hoisted: Tensor, scale: Tensor) -> Tensor:
    """See ``reference.add_hoisted``; projected and hoisted may have any stride over the rows."""
    if projected.dtype == torch.float64:
        return chunked.add_hoisted(projected, hoisted, scale)
    out: Tensor = _AddHoisted.apply(projected, hoisted, scale)
    return out


class _AddHoisted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, hoisted: Tensor, scale: Tensor) -> Tensor:
        y = projected.new_empty(projected.shape)
        projected, hoisted, scale = _rows(projected), _rows(hoisted), scale.contiguous()
        (rows, width), pieces = projected.shape, _pieces(projected.shape[1])
        grid = (triton.cdiv(rows, pieces["ROWS"]), pieces.pop("BLOCKS"))
        _add_hoisted_forward[grid](projected, hoisted, scale, y, rows, projected.stride(0), hoisted.stride(0), width, **pieces)
        ctx.save_for_backward(hoisted, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hoisted, scale = ctx.saved_tensors
        given, (rows, width), pieces = _rows(dy), hoisted.shape, _pieces(hoisted.shape[1])
        dhoisted, dscale = hoisted.new_empty(hoisted.shape), torch.empty_like(scale)
        _add_hoisted_backward[(triton.cdiv(rows, pieces["ROWS"]),)](
            hoisted, scale, given, dhoisted, dscale, rows, hoisted.stride(0), given.stride(0), width, **pieces
        )
        return dy, dhoisted.view(dy.shape), dscale
