"""The Mamba2 recurrence and its gradients on a GPU, in Triton.

The sequence is cut into chunks and those into segments of several chunks. Forward, four kernels:

    1. ``_sum_logs``      running sums of the log decays within each chunk
    2. ``_contribution``  what each segment adds to the state, [P, N] per head
    3. ``_carry``         the state before each segment, one segment after the other
    4. ``_output``        chunk by chunk within a segment: outputs, with the state kept in registers

A short sequence is one segment and needs only the first and the last; of few segments, from nothing, the fourth does the
third's work. Backward, the first three give the states again and, from the other end, the gradients of the states; then
``_gradients`` takes each chunk by itself. Only the inputs are kept. Both directions share their launches, for a host may
take longer over those than the GPU over the work.

In a chunk a_t is the sum of the log2 decays up to and with token t, and f_t = a_t - log2(dt_t), so that 2^(a_i - f_j) is
the weight of token j's input in the state at i >= j. Sums are taken in fp64, and for fp32 inputs their differences too:
small steps survive behind huge ones. A log of FORGOTTEN is a decay of zero in fp32; so is the start of a document.
The equations are those of the Mamba2 paper (Dao & Gu 2024), section 6, and their derivatives.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from zamba2.model.ops import chunked
from zamba2.model.ops.reference import steps_and_rates

__all__ = ["gated_scan", "registers", "ssd_scan"]

LOG2_E = tl.constexpr(math.log2(math.e))
FORGOTTEN = tl.constexpr(-256.0)
SMALLEST_STEP = tl.constexpr(2.0**-100)  # a step of zero has a logarithm, and a gradient, too
SEGMENT = 512  # tokens at most
BACKWARD_SEGMENT = 128  # tokens; every chunk advances the states from the ends of its segment, so short ones
UNCARRIED = 8  # segments up to which ``_output`` adds up what those before it leave; more are carried by a kernel of its own
CARRIED = 512  # elements of a state per program of ``_carry``
WARPS = 132 * 8  # of ``_gradients`` that run at a time: its programs are no more, for each writes a dB and a dC
HEADS = tl.constexpr(16)  # per program of ``_sum_logs``


@triton.jit
def softplus(x):
    """log(1 + e^x) in fp32, also where that is tiny."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    return tl.maximum(x, 0.0) + tl.log(u) + (e - (u - 1.0)) / u  # the last term is what the sum's rounding lost


@triton.jit(do_not_specialize=["length"])
def _sum_logs(dt_ptr, A_ptr, bias_ptr, seq_ptr, lengths_ptr, sums_ptr, dt_b, dt_t, dt_h, length, heads, Q: tl.constexpr):
    """a and f of one chunk and some heads, into (2, b, H, chunks * Q). With a bias, steps and rates are still to be made of dt and A."""
    chunk, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = (chunk * Q + tl.arange(0, Q))[:, None]
    h = (tl.program_id(0) * HEADS + tl.arange(0, HEADS))[None, :]
    dt = tl.load(dt_ptr + row * dt_b + t.to(tl.int64) * dt_t + h * dt_h, mask=(t < length) & (h < heads), other=0.0).to(tl.float32)
    A = tl.load(A_ptr + h, mask=h < heads, other=0.0)
    if bias_ptr is not None:
        dt = softplus(dt + tl.load(bias_ptr + h, mask=h < heads, other=0.0).to(tl.float32))
        A = -tl.exp(A)
    if lengths_ptr is not None:
        dt = tl.where(t < tl.load(lengths_ptr + row), dt, 0.0)
    elif bias_ptr is not None:
        dt = tl.where(t < length, dt, 0.0)
    log = tl.maximum(dt.to(tl.float64) * (A.to(tl.float64) * LOG2_E), FORGOTTEN)
    if seq_ptr is not None:
        inner = (t > 0) & (t < length)
        here = tl.load(seq_ptr + row * length + t, mask=inner, other=0)
        before = tl.load(seq_ptr + row * length + t - 1, mask=inner, other=0)
        log = tl.where(here != before, FORGOTTEN, log)
    a = tl.cumsum(log, 0)
    f = a - tl.log2(tl.maximum(dt, SMALLEST_STEP)).to(tl.float64)
    padded = tl.num_programs(1).to(tl.int64) * Q
    at = (row * heads + h) * padded + t
    tl.store(sums_ptr + at, a.to(sums_ptr.dtype.element_ty), mask=h < heads)
    tl.store(sums_ptr + tl.num_programs(2) * heads * padded + at, f.to(sums_ptr.dtype.element_ty), mask=h < heads)


@triton.jit
def _sums(sums_ptr, row, h, chunk, rows, batch, heads, chunks, Q: tl.constexpr):
    """a, f and the last a of a chunk."""
    at = ((row * heads + h) * chunks + chunk) * Q
    f_ptr = sums_ptr + tl.cast(batch, tl.int64) * heads * chunks * Q
    return tl.load(sums_ptr + at + rows), tl.load(f_ptr + at + rows), tl.load(sums_ptr + at + Q - 1)


@triton.jit
def _power(log):
    return tl.exp2(log.to(tl.float32))


@triton.jit
def _masked_power(log, visible):
    return _power(tl.where(visible, log, float("-inf")))


@triton.jit
def _tile(pointer, start, rows, columns, stride, length, WIDTH: tl.constexpr):
    """Rows of a matrix from ``start`` and its columns, zeros outside."""
    inside = (start + rows < length)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(pointer + (start + rows).to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _advance(S, values, weights, keys, end, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """The state (or its gradient) [N, P] beyond a chunk: decayed, plus the sum of weights * keys values^T."""
    weighted = (values.to(tl.float32) * weights[:, None]).to(DOT)
    return tl.dot(tl.trans(keys.to(DOT)), weighted, S * _power(end), input_precision=PRECISION)


@triton.jit
def _contribute(
    values_ptr, sums_ptr, keys_ptr, states_ptr, decays_ptr, values_t, keys_t, row, h, segment, at, length, chunks, per_segment, heads,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, P2: tl.constexpr, N2: tl.constexpr,
    REVERSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What values x and keys B of a segment add to the state; REVERSE: values dy and keys C, to the gradient of the state before it."""
    rows, p, n = tl.arange(0, Q), tl.arange(0, P2), tl.arange(0, N2)
    first = segment * per_segment
    last = tl.minimum(first + per_segment, chunks)
    S = tl.zeros((N2, P2), tl.float32)
    log = tl.zeros((), tl.float32)
    for k in tl.range(first, last, disable_licm=True):
        chunk = first + last - 1 - k if REVERSE else k
        a, f, end = _sums(sums_ptr, row, h, chunk, rows, tl.num_programs(2), heads, chunks, Q)
        values = _tile(values_ptr, chunk * Q, rows, p, values_t, length, P)
        keys = _tile(keys_ptr, chunk * Q, rows, n, keys_t, length, N)
        S = _advance(S, values, _power(a if REVERSE else end - f), keys, end, DOT, PRECISION)
        log += end.to(tl.float32)
    inside = (n < N)[:, None] & (p < P)[None, :]
    tl.store(states_ptr + at * P * N + p[None, :] * N + n[:, None], S.to(states_ptr.dtype.element_ty), mask=inside)
    tl.store(decays_ptr + at, tl.exp2(log))


@triton.jit(do_not_specialize=["segments", "length", "chunks", "per_segment"])
def _contribution(
    x_ptr, sums_ptr, B_ptr, dy_ptr, C_ptr, states_ptr, decays_ptr,
    x_b, x_t, x_h, B_b, B_t, B_g, dy_b, dy_t, dy_h, C_b, C_t, C_g,
    segments, length, chunks, per_segment, heads, per_group,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, P2: tl.constexpr, N2: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What all segments but the last add to the state, then, from the last segment back, to the gradient of the state."""
    h, k, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = h // per_group
    if k < segments - 1:
        at = (row * segments + k) * heads + h
        _contribute(
            x_ptr + row * x_b + h * x_h, sums_ptr, B_ptr + row * B_b + group * B_g, states_ptr, decays_ptr, x_t, B_t,
            row, h, k, at, length, chunks, per_segment, heads, P, N, Q, P2, N2, False, DOT, PRECISION,
        )  # fmt: skip
    elif dy_ptr is not None:
        segment = 2 * (segments - 1) - k
        at = ((tl.num_programs(2) + row) * segments + segment) * heads + h
        _contribute(
            dy_ptr + row * dy_b + h * dy_h, sums_ptr, C_ptr + row * C_b + group * C_g, states_ptr, decays_ptr, dy_t, C_t,
            row, h, segment, at, length, chunks, per_segment, heads, P, N, Q, P2, N2, True, DOT, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["segments"])
def _carry(states_ptr, decays_ptr, first_ptr, dlast_ptr, dfirst_ptr, segments, heads, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """In place: what segments add becomes the states before them and, where programs for it are, the gradients of those after."""
    h, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    PIECES: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    reverse = tl.program_id(0) // PIECES
    element = tl.program_id(0) % PIECES * BLOCK + tl.arange(0, BLOCK)
    inside = element < SIZE
    outer = (row * heads + h) * SIZE + element
    S = tl.zeros((BLOCK,), tl.float32)
    if first_ptr is not None:
        S = tl.load(first_ptr + outer, mask=inside & (reverse == 0), other=0.0)
    if dlast_ptr is not None:
        S += tl.load(dlast_ptr + outer, mask=inside & (reverse == 1), other=0.0)
    count = segments - 1
    if dfirst_ptr is not None:
        count += reverse
    row += reverse * tl.num_programs(2)
    for k in tl.range(0, count, num_stages=4):
        at = (row * segments + tl.where(reverse == 1, segments - 1 - k, k)) * heads + h
        added = tl.load(states_ptr + at * SIZE + element, mask=inside, other=0.0).to(tl.float32)
        before, S = S, S * tl.load(decays_ptr + at) + added  # what is loaded is used, so has arrived, before it is overwritten
        tl.store(states_ptr + at * SIZE + element, before.to(states_ptr.dtype.element_ty), mask=inside)
    if count < segments:
        at = (row * segments + tl.where(reverse == 1, 0, segments - 1)) * heads + h
        tl.store(states_ptr + at * SIZE + element, S.to(states_ptr.dtype.element_ty), mask=inside)
    if dfirst_ptr is not None:
        tl.store(dfirst_ptr + outer, S, mask=inside & (reverse == 1))


@triton.jit(do_not_specialize=["length", "chunks", "per_segment"])
def _output(
    x_ptr, sums_ptr, B_ptr, C_ptr, D_ptr, states_ptr, decays_ptr, gate_ptr, weight_ptr, y_ptr, squares_ptr, final_ptr,
    x_b, x_t, x_h, B_b, B_t, B_g, C_b, C_t, C_g, gate_b, gate_t, gate_h,
    length, chunks, per_segment, heads, per_group,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, P2: tl.constexpr, N2: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of one head in one segment, from the state before it, or with decays from what all segments before it add; the last
    segment also stores the final state. With a gate, outputs times SiLU(gate), their sums of squares, and what is stored is their
    product with a weight."""
    h, segment, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, p, n = tl.arange(0, Q), tl.arange(0, P2), tl.arange(0, N2)
    x_ptr += row * x_b + h * x_h
    B_ptr += row * B_b + (h // per_group) * B_g
    C_ptr += row * C_b + (h // per_group) * C_g
    y_ptr += (row * length * heads + h) * P
    D = tl.load(D_ptr + h)
    first = segment * per_segment
    last = tl.minimum(first + per_segment, chunks)
    element = p[None, :] * N + n[:, None]
    inside = (n < N)[:, None] & (p < P)[None, :]
    S = tl.zeros((N2, P2), tl.float32)
    if decays_ptr is not None:
        for k in tl.range(0, segment, disable_licm=True):
            at = (row * tl.num_programs(1) + k) * heads + h
            S = S * tl.load(decays_ptr + at) + tl.load(states_ptr + at * P * N + element, mask=inside, other=0.0)
    elif states_ptr is not None:
        at = (row * tl.num_programs(1) + segment) * heads + h
        S = tl.load(states_ptr + at * P * N + element, mask=inside, other=0.0)
    for chunk in tl.range(first, last, disable_licm=True):
        start = chunk * Q
        a, f, end = _sums(sums_ptr, row, h, chunk, rows, tl.num_programs(2), heads, chunks, Q)
        x = _tile(x_ptr, start, rows, p, x_t, length, P)
        B = _tile(B_ptr, start, rows, n, B_t, length, N)
        C = _tile(C_ptr, start, rows, n, C_t, length, N).to(DOT)
        if gate_ptr is not None:  # on its way while the products are made
            gate = _tile(gate_ptr + row * gate_b + h * gate_h, start, rows, p, gate_t, length, P)
        scores = tl.dot(C, tl.trans(B.to(DOT)), input_precision=PRECISION)
        scores *= _masked_power(a[:, None] - f[None, :], rows[:, None] >= rows[None, :])
        y = tl.dot(C, S.to(DOT), input_precision=PRECISION) * _power(a)[:, None]
        y = tl.dot(scores.to(DOT), x.to(DOT), y, input_precision=PRECISION)
        y += D * x.to(tl.float32)
        if gate_ptr is not None:
            gate = gate.to(tl.float32)
            y *= gate / (1 + tl.exp(-gate))
            place = (row * length + start + rows) * heads + h
            tl.store(squares_ptr + place, tl.sum(y * y, 1), mask=start + rows < length)
            y *= tl.load(weight_ptr + h * P + p, mask=p < P, other=0.0).to(tl.float32)[None, :]
        stored = (start + rows < length)[:, None] & (p < P)[None, :]
        line = (start + rows).to(tl.int64)[:, None] * (heads * P)
        tl.store(y_ptr + line + p[None, :], y.to(y_ptr.dtype.element_ty), mask=stored)
        S = _advance(S, x, _power(end - f), B, end, DOT, PRECISION)
    if last == chunks:
        tl.store(final_ptr + (row * heads + h) * P * N + element, S, mask=inside)


@triton.jit(do_not_specialize=["length", "chunks", "per_segment", "splits", "per_program"])
def _gradients(
    x_ptr, dt_ptr, sums_ptr, A_ptr, B_ptr, C_ptr, D_ptr, dy_ptr, states_ptr,
    dx_ptr, ddt_ptr, dAD_ptr, dBC_ptr,
    x_b, x_t, x_h, dt_b, dt_t, dt_h, B_b, B_t, B_g, C_b, C_t, C_g, dy_b, dy_t, dy_h,
    length, chunks, per_segment, splits, per_program, heads, per_group,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, P2: tl.constexpr, N2: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk for some heads of a group, whose dB and dC are summed here.

    With S the state before the chunk, G the gradient of the state after it and W_ij = 2^(a_i - f_j) for i >= j:

        dx_j = v_j + D dy_j,   v_j = sum_i W_ij (C_i B_j) dy_i + 2^(a_end - f_j) G B_j
        dC_i = sum_j W_ij (dy_i x_j) B_j + 2^(a_i) S^T dy_i
        dB_j = sum_i W_ij (dy_i x_j) C_i + 2^(a_end - f_j) G^T x_j

    The gradient of the log decay at t is the sum of all that passes it: the pairs j < t <= i, the state to i >= t, j < t to
    the end, and the state to the end. Of the pairs it is those that open before t less those that close before t: sums of
    the very same numbers, in the precision of the logs, so that they cancel.
    """
    part, chunk, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    group, split = part // splits, part % splits
    rows, p, n = tl.arange(0, Q), tl.arange(0, P2), tl.arange(0, N2)
    start = chunk * Q
    x_ptr += row * x_b
    dy_ptr += row * dy_b
    B_ptr += row * B_b + group * B_g
    C_ptr += row * C_b + group * C_g
    dt_ptr += row * dt_b + tl.cast(start, tl.int64) * dt_t
    segment = chunk // per_segment
    first = segment * per_segment
    last = tl.minimum(first + per_segment, chunks)
    segments = tl.cdiv(chunks, per_segment)
    state = (row * segments + segment) * heads
    dstate = state + tl.num_programs(2).to(tl.int64) * segments * heads
    stored = (start + rows < length)[:, None] & (p < P)[None, :]
    element = p[None, :] * N + n[:, None]
    inside = (n < N)[:, None] & (p < P)[None, :]
    B = _tile(B_ptr, start, rows, n, B_t, length, N).to(DOT)
    C = _tile(C_ptr, start, rows, n, C_t, length, N).to(DOT)
    dB, dC = tl.zeros((N2, Q), tl.float32), tl.zeros((N2, Q), tl.float32)  # transposed
    begin = group * per_group + split * per_program
    end_h = tl.minimum(begin + per_program, (group + 1) * per_group)
    for h in tl.range(begin, end_h, disable_licm=True):
        A, D = tl.load(A_ptr + h), tl.load(D_ptr + h)
        S = tl.load(states_ptr + (state + h) * P * N + element, mask=inside, other=0.0).to(tl.float32)
        for k in tl.range(first, chunk, disable_licm=True):
            a, f, end = _sums(sums_ptr, row, h, k, rows, tl.num_programs(2), heads, chunks, Q)
            values = _tile(x_ptr + h * x_h, k * Q, rows, p, x_t, length, P)
            S = _advance(S, values, _power(end - f), _tile(B_ptr, k * Q, rows, n, B_t, length, N), end, DOT, PRECISION)
        S = S.to(DOT)
        G = tl.load(states_ptr + (dstate + h) * P * N + element, mask=inside, other=0.0).to(tl.float32)
        for k in tl.range(chunk + 1, last, disable_licm=True):
            there = last + chunk - k
            a, f, end = _sums(sums_ptr, row, h, there, rows, tl.num_programs(2), heads, chunks, Q)
            values = _tile(dy_ptr + h * dy_h, there * Q, rows, p, dy_t, length, P)
            G = _advance(G, values, _power(a), _tile(C_ptr, there * Q, rows, n, C_t, length, N), end, DOT, PRECISION)

        a, f, end = _sums(sums_ptr, row, h, chunk, rows, tl.num_programs(2), heads, chunks, Q)
        dt = tl.load(dt_ptr + h * dt_h + rows * dt_t, mask=start + rows < length, other=0.0)
        past = tl.sum(S.to(tl.float32) * G) * _power(end)
        G = G.to(DOT)
        x = _tile(x_ptr + h * x_h, start, rows, p, x_t, length, P).to(DOT)
        dy = _tile(dy_ptr + h * dy_h, start, rows, p, dy_t, length, P).to(DOT)
        at = (row * length + start) * heads + h
        dB += tl.dot(G, tl.trans(x), input_precision=PRECISION) * _power(end - f)[None, :]
        dC += tl.dot(S, tl.trans(dy), input_precision=PRECISION) * _power(a)[None, :]
        weights = _masked_power(a[None, :] - f[:, None], rows[:, None] <= rows[None, :])  # [j, i], as all pairs here
        products = tl.dot(x, tl.trans(dy), input_precision=PRECISION)
        pairs = (products * weights).to(DOT)
        dC = tl.dot(tl.trans(B), pairs, dC, input_precision=PRECISION)
        dB = tl.dot(tl.trans(C), tl.trans(pairs), dB, input_precision=PRECISION)
        scores = tl.dot(B, tl.trans(C), input_precision=PRECISION) * weights
        passing = (products * scores).to(a.dtype)
        opening = tl.sum(tl.trans(passing) - passing, 0)  # the pairs that open at a token less those that close there
        scores = scores.to(DOT)

        v = tl.dot(B, G, input_precision=PRECISION) * _power(end - f)[:, None]
        to_state = tl.sum(v * x.to(tl.float32), 1)
        v = tl.dot(scores, dy, v, input_precision=PRECISION)
        direct = tl.sum(v * x.to(tl.float32), 1) / tl.maximum(dt, SMALLEST_STEP)
        v += D * dy.to(tl.float32)
        tl.store(dx_ptr + at * P + rows[:, None] * (heads * P) + p[None, :], v.to(dx_ptr.dtype.element_ty), mask=stored)
        of_state = tl.sum(tl.dot(C, S, input_precision=PRECISION) * dy.to(tl.float32), 1) * _power(a)
        passing = tl.where(rows[:, None] <= rows[None, :], of_state[None, :], (to_state + opening)[None, :])  # [t, i]
        dlog = tl.sum(passing, 1).to(tl.float32) + past
        tl.store(ddt_ptr + at + rows * heads, direct + A * dlog, mask=start + rows < length)
        at = (row * chunks + chunk) * heads + h
        tl.store(dAD_ptr + at, tl.sum(tl.reshape(dt * dlog, (Q,), can_reorder=True), 0))  # reordered, or Triton 3.7 fails on Blackwell
        dD = tl.sum(dy.to(tl.float32) * x.to(tl.float32))
        tl.store(dAD_ptr + tl.num_programs(2) * chunks * heads + at, dD)

    stored = (n < N)[:, None] & (start + rows < length)[None, :]
    size = tl.num_programs(2).to(tl.int64) * length * (heads // per_group) * N
    at = ((row * length + start) * (heads // per_group) + group) * N + rows[None, :] * (heads // per_group * N) + n[:, None]
    tl.store(dBC_ptr + split * size + at, dB, mask=stored)
    tl.store(dBC_ptr + (splits + split) * size + at, dC, mask=stored)


def ssd_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, chunk_size: int,
    dt_bias: Tensor | None = None, state: Tensor | None = None, seq_idx: Tensor | None = None, lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The state-space recurrence in chunks, differentiable in all float arguments; see ``reference.ssd_scan``.

    x: (b, T, H, P); B, C: (b, T, G, N) in x's dtype (bf16, fp16 or fp32), any strides; dt: (b, T, H), A, D, dt_bias: (H,),
    state: (b, H, P, N), fp32, but before its bias dt may be in x's dtype; seq_idx: (b, T), lengths: (b,), integers. Returns y
    (b, T, H, P) in x's dtype, rounded once, and the state (b, H, P, N) in fp32. Products have operands in x's dtype (fp16: TF32)
    and fp32 sums. The chunks are this module's own: ``chunk_size`` is ignored. One token and fp64 go to ``chunked.ssd_scan``.
    """
    if x.shape[1] == 1 or x.dtype == torch.float64:
        y, final = chunked.ssd_scan(
            x, dt, A, B, C, D, chunk_size=chunk_size, dt_bias=dt_bias, state=state, seq_idx=seq_idx, lengths=lengths
        )
        return y.to(x.dtype), final
    x, B, C = (m if m.stride(-1) == 1 else m.contiguous() for m in (x, B, C))
    D = D.float().contiguous()
    state = None if state is None else state.float().contiguous()
    seq_idx = None if seq_idx is None else seq_idx.contiguous()
    if torch.is_grad_enabled():
        dt, A = steps_and_rates(dt, A, dt_bias, lengths)
        y, final = _Scan.apply(x, dt.float(), A.float().contiguous(), B, C, D, state, seq_idx)
        return y, final
    dt_bias, lengths = (None if m is None else m.contiguous() for m in (dt_bias, lengths))
    return _scan(x, dt, A.float().contiguous(), B, C, D, state, seq_idx, dt_bias, lengths)


def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None, seq_idx: Tensor | None,
    dt_bias: Tensor | None = None, lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``ssd_scan`` on fp32 A, D and state, all contiguous but dt and, in all but the last dimension, x, B and C."""
    y, _, final = _gated(x, dt, A, B, C, D, state, seq_idx, dt_bias, lengths)
    return y, final


def gated_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, gate: Tensor, weight: Tensor, *, dt_bias: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A mixer's scan from nothing with all of its gated norm (one group) but the division by the root mean square, without gradients.

    Arguments as in ``ssd_scan``, with more than one token; dt: (b, T, H) before its bias; gate: (b, T, H, P), any strides but the
    last, 1; weight: (H P,), the norm's. Returns y SiLU(gate) weight, (b, T, H, P) in x's dtype, rounded once; the sums over P of
    (y SiLU(gate))^2, (b, T, H) fp32, whose sum over the heads is that of the norm; and the state (b, H, P, N) in fp32.
    """
    A, D = A.float().contiguous(), D.float().contiguous()
    y, squares, final = _gated(x, dt, A, B, C, D, None, None, dt_bias.contiguous(), lengths.contiguous(), gate, weight.contiguous())
    assert squares is not None
    return y, squares, final


def _gated(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None, seq_idx: Tensor | None,
    dt_bias: Tensor | None, lengths: Tensor | None, gate: Tensor | None = None, weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """``_scan``, and with gate and weight what ``gated_scan`` adds to it."""
    plan = _Plan(x, B, SEGMENT)
    sums, states, decays = plan.sums(dt, A, seq_idx, dt_bias, lengths), state, None
    if state is None and 1 < plan.segments <= UNCARRIED:
        states, decays = plan.contributions(torch.float32, x, sums, B)
    elif plan.segments > 1:
        states = plan.states(torch.float32, x, sums, B, state)
    y, final = x.new_empty(x.shape), x.new_empty(plan.state_shape, dtype=torch.float32)
    squares = None if gate is None else x.new_empty(x.shape[:3], dtype=torch.float32)
    of_gate = (0, 0, 0) if gate is None else gate.stride()[:3]
    _output[plan.heads, plan.segments, plan.rows](
        x, sums, B, C, D, states, decays, gate, weight, y, squares, final,
        *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *of_gate, *plan.sizes, **plan.constants,
        num_warps=plan.warps, num_stages=2, **(registers(x, 168) if plan.small else {}),  # three programs on a multiprocessor
    )  # fmt: skip
    return y, squares, final


class _Scan(torch.autograd.Function):
    """``_scan`` with gradients."""

    @staticmethod
    def forward(ctx: Any, *arguments: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*arguments)
        ctx.set_materialize_grads(False)
        return _scan(*arguments)  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, state, seq_idx = ctx.saved_tensors
        dy = x.new_zeros(x.shape) if dy is None else dy if dy.stride(-1) == 1 else dy.contiguous()
        dfinal = None if dfinal is None else dfinal.contiguous()
        dstate = torch.empty_like(state) if ctx.needs_input_grad[6] else None
        plan = _Plan(x, B, BACKWARD_SEGMENT)
        rows, heads, groups = plan.rows, plan.heads, B.shape[2]
        sums = plan.sums(dt, A, seq_idx)
        kept = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32  # as rounded for the products anyway
        states = plan.states(kept, x, sums, B, state, dy, C, dfinal, dstate)

        warps = 4 if plan.small else 8
        per_group = heads // groups
        splits = _ceil(per_group, _ceil(heads * plan.chunks * rows * warps, WARPS))
        dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
        dAD = dt.new_empty(2, rows, plan.chunks, heads)
        dBC = dt.new_empty(2, splits, *B.shape)
        _gradients[groups * splits, plan.chunks, rows](
            x, dt, sums, A, B, C, D, dy, states, dx, ddt, dAD, dBC,
            *x.stride()[:3], *dt.stride(), *B.stride()[:3], *C.stride()[:3], *dy.stride()[:3],
            x.shape[1], plan.chunks, plan.per_segment, splits, _ceil(per_group, splits), heads, per_group, **plan.constants,
            num_warps=warps, num_stages=1,
        )  # fmt: skip
        del sums, states  # the sums below may lie there
        dA, dD = dAD.sum((1, 2))
        dB, dC = dBC.sum(1).to(B.dtype)
        return dx, ddt, dA, dB, dC, dD, dstate, None


class _Plan:
    """Sizes of one call cut into segments of at most ``length`` tokens, and the first three kernels."""

    def __init__(self, x: Tensor, B: Tensor, length: int) -> None:
        self.rows, tokens, self.heads, channels = x.shape
        groups, size = B.shape[2:]
        ieee = x.dtype == torch.float32
        self.chunk, self.warps = 64, 4
        if x.dtype != torch.bfloat16 and x.device.type == "cuda":  # larger tiles of fp32 do not fit the registers or shared memory
            self.chunk, self.warps = 16 if ieee else 32, 8
        self.sums_dtype = torch.float64 if ieee else torch.float32  # fp32 is 2^-9 off at worst, behind 64 times FORGOTTEN
        self.chunks = _ceil(tokens, self.chunk)
        self.per_segment = _ceil(self.chunks, _ceil(tokens, length))
        self.segments = _ceil(self.chunks, self.per_segment)
        self.small = self.warps == 4 and size <= 64
        self.stages = 3 if self.small else 2  # the next chunk is on its way while one is multiplied, if there is shared memory for both
        self.state_shape = (self.rows, self.heads, channels, size)
        self.sizes = (tokens, self.chunks, self.per_segment, self.heads, self.heads // groups)
        self.constants: dict[str, Any] = {
            "P": channels, "N": size, "Q": self.chunk, "P2": _tile_size(channels), "N2": _tile_size(size),
            "DOT": tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float32, "PRECISION": "ieee" if ieee else "tf32",
        }  # fmt: skip

    def sums(
        self, dt: Tensor, A: Tensor, seq_idx: Tensor | None, dt_bias: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """a and f of all tokens, (2, b, H, T rounded up to chunks)."""
        sums = dt.new_empty(2, self.rows, self.heads, self.chunks * self.chunk, dtype=self.sums_dtype)
        _sum_logs[_ceil(self.heads, HEADS.value), self.chunks, self.rows](
            dt, A, dt_bias, seq_idx, lengths, sums, *dt.stride(), dt.shape[1], self.heads, Q=self.chunk, num_warps=4
        )
        return sums

    def states(
        self, dtype: torch.dtype, x: Tensor, sums: Tensor, B: Tensor, state: Tensor | None,
        dy: Tensor | None = None, C: Tensor | None = None, dfinal: Tensor | None = None, dstate: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The states before each segment; with dy and C the gradients of those after each, too. (1 or 2, b, segments, H, P, N).

        dstate, if given, receives the gradient of the state before all.
        """
        states, decays = self.contributions(dtype, x, sums, B, dy, C, extra=dstate is not None)
        size = self.state_shape[2] * self.state_shape[3]
        _carry[len(states) * _ceil(size, CARRIED), self.heads, self.rows](
            states, decays, state, dfinal, dstate, self.segments, self.heads, SIZE=size, BLOCK=CARRIED, num_warps=2
        )
        return states

    def contributions(
        self, dtype: torch.dtype, x: Tensor, sums: Tensor, B: Tensor, dy: Tensor | None = None, C: Tensor | None = None,
        *, extra: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What ``states`` is made of, in its shape: what each segment adds, and its decay, (1 or 2, b, segments, H). Nothing is written
        for the last segment, nor, unless ``extra``, for the gradient before the first."""
        directions = 1 if dy is None else 2
        states = x.new_empty(directions, self.rows, self.segments, *self.state_shape[1:], dtype=dtype)
        decays = x.new_empty(states.shape[:4], dtype=torch.float32)
        count = directions * (self.segments - 1) + extra
        if count:
            other = (0,) * 6 if dy is None or C is None else (*dy.stride()[:3], *C.stride()[:3])
            _contribution[self.heads, count, self.rows](
                x, sums, B, dy, C, states, decays, *x.stride()[:3], *B.stride()[:3], *other, self.segments, *self.sizes,
                **self.constants, num_warps=self.warps, num_stages=self.stages,
            )  # fmt: skip
        return states, decays


def registers(x: Tensor, most: int) -> dict[str, int]:
    """Triton's option that holds kernels on Hopper to so many registers a thread; elsewhere the compiler would spill hundreds of bytes."""
    return {"maxnreg": most} if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device)[0] == 9 else {}


def _ceil(size: int, part: int) -> int:
    """The parts that hold ``size``; Triton's functions of this kind take microseconds each."""
    return -(-size // part)


def _tile_size(width: int) -> int:
    """The power of two, at least 16, that holds ``width``: sides of tiles in products."""
    return max(16, 1 << (width - 1).bit_length())
