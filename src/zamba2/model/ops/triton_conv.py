"""The causal convolution in Triton, for GPUs: one read of the inputs and one write of the outputs, forward and backward.

The definition, shapes and dtypes are those of ``reference.causal_conv``. fp64 goes to ``chunked``.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, var-annotated"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from zamba2.model.ops import chunked

__all__ = ["causal_conv"]

COLUMNS = 128  # channels of a program; divides the convolution's width in every Zamba2 model
STEP = 8  # times that the backward pass loads together


@triton.jit
def _inputs(x_ptr, state_ptr, t, c, length, channels, x_row, K: tl.constexpr):
    """What the convolution reads at times t: x, before it the state, zero elsewhere. fp32, in the shape of t and c together."""
    real = c < channels
    inputs = tl.load(x_ptr + t * x_row + c, mask=(t >= 0) & (t < length) & real, other=0.0)
    if state_ptr is not None:
        inputs += tl.load(state_ptr + (t + K - 1) * channels + c, mask=(t < 0) & (t > -K) & real, other=0.0)
    return inputs.to(tl.float32)


@triton.jit
def _document(seq_ptr, t, length):
    """Document numbers at times t; what lies outside belongs to the nearest document."""
    return tl.load(seq_ptr + tl.minimum(tl.maximum(t, 0), length - 1))


@triton.jit
def _end(lengths_ptr, b, length):
    """Where the text of a row ends."""
    end = length.to(tl.int64)
    if lengths_ptr is not None:
        end = tl.load(lengths_ptr + b)
    return end


@triton.jit(do_not_specialize=["length"])
def _forward(
    x_ptr, weight_ptr, bias_ptr, state_ptr, seq_ptr, lengths_ptr, y_ptr, final_ptr, length, channels, x_batch, x_row,
    K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y of ROWS times and COLUMNS channels; the programs where the text ends also write the final state."""
    b = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * ROWS
    t = first.to(tl.int64) + tl.arange(0, ROWS)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real = c < channels
    x_ptr += b * x_batch
    if state_ptr is not None:
        state_ptr += b * (K - 1) * channels
    if seq_ptr is not None:
        seq_ptr += b * length
        own = _document(seq_ptr, t, length)
    total = tl.zeros([ROWS, COLUMNS], tl.float32) + tl.load(bias_ptr + c, mask=real, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(K):
        earlier = t - (K - 1) + k
        inputs = _inputs(x_ptr, state_ptr, earlier[:, None], c[None, :], length, channels, x_row, K)
        if seq_ptr is not None:
            inputs = tl.where((_document(seq_ptr, earlier, length) == own)[:, None], inputs, 0.0)
        total += inputs * tl.load(weight_ptr + c * K + k, mask=real, other=0.0).to(tl.float32)[None, :]
    y = total / (1 + tl.exp(-total))
    tl.store(y_ptr + (b * length + t[:, None]) * channels + c[None, :], y, mask=(t < length)[:, None] & real[None, :])
    end = _end(lengths_ptr, b, length)
    if (first < end) & (first + ROWS >= end):
        for k in tl.static_range(K - 1):
            last = end - (K - 1) + k
            kept = _inputs(x_ptr, state_ptr, last, c, length, channels, x_row, K)
            if seq_ptr is not None:
                kept = tl.where(_document(seq_ptr, last, length) == _document(seq_ptr, end - 1, length), kept, 0.0)
            tl.store(final_ptr + (b * (K - 1) + k) * channels + c, kept, mask=real)


@triton.jit(do_not_specialize=["length"])
def _backward(
    x_ptr, weight_ptr, bias_ptr, state_ptr, seq_ptr, lengths_ptr, dy_ptr, dfinal_ptr, dx_ptr, dstate_ptr, sums_ptr,
    length, channels, x_batch, x_row, dy_batch, dy_row,
    K: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs at a stretch of times, of x and of the state before it, and this stretch's part of the parameters'.

    With g the gradient of the sum before SiLU, an input's is sum_k weight[K-1-k] g[t + k]. The program walks through time with
    the last K-1 inputs and g in registers; at time t it has all of the gradient of input t - (K-1).
    """
    b = tl.program_id(2).to(tl.int64)
    own = STEP * STEPS - (K - 1)  # the stretches of neighbours overlap by K-1 times
    first = tl.program_id(1).to(tl.int64) * own - (K - 1)  # the state's inputs come first
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real = c < channels
    x_ptr += b * x_batch
    dy_ptr += b * dy_batch
    if state_ptr is not None:
        state_ptr += b * (K - 1) * channels
    end = _end(lengths_ptr, b, length)
    if seq_ptr is not None:
        seq_ptr += b * length
        newest = _document(seq_ptr, end - 1, length)

    bias = tl.load(bias_ptr + c, mask=real, other=0.0).to(tl.float32)
    taps, inputs, gradients, documents, sums = (), (), (), (), (tl.zeros([COLUMNS], tl.float32),)
    for k in tl.static_range(K):
        taps += (tl.load(weight_ptr + c * K + k, mask=real, other=0.0).to(tl.float32),)
        sums += (tl.zeros([COLUMNS], tl.float32),)
    for k in tl.static_range(K - 1):
        inputs += (_inputs(x_ptr, state_ptr, first - (K - 1) + k, c, length, channels, x_row, K),)
        gradients += (tl.zeros([COLUMNS], tl.float32),)
        if seq_ptr is not None:
            documents += (_document(seq_ptr, first - (K - 1) + k, length),)

    for step in range(STEPS):
        start = first + step * STEP
        arriving = ()
        for i in tl.static_range(STEP):  # all loads before the first store, which they could not be moved over
            t = start + i
            inputs += (_inputs(x_ptr, state_ptr, t, c, length, channels, x_row, K),)
            arriving += (tl.load(dy_ptr + t * dy_row + c, mask=(t >= 0) & (t < length) & real, other=0.0).to(tl.float32),)
            if seq_ptr is not None:
                documents += (_document(seq_ptr, t, length),)
        for i in tl.static_range(STEP):
            t = start + i
            total = bias
            for k in tl.static_range(K):
                seen = inputs[i + k]
                if seq_ptr is not None:
                    seen = tl.where(documents[i + k] == documents[i + K - 1], seen, 0.0)
                total += taps[k] * seen
            sigmoid = 1 / (1 + tl.exp(-total))
            gradient = arriving[i] * sigmoid * (1 + total * (1 - sigmoid))
            gradients += (gradient,)
            if sums_ptr is not None:
                counted = tl.where(t < first + own, gradient, 0.0)
                added = (sums[0] + counted,)
                for k in tl.static_range(K):
                    seen = inputs[i + k]
                    if seq_ptr is not None:
                        seen = tl.where(documents[i + k] == documents[i + K - 1], seen, 0.0)
                    added += (sums[k + 1] + counted * seen,)
                sums = added

            earlier = t - (K - 1)
            gathered = tl.zeros([COLUMNS], tl.float32)
            for k in tl.static_range(K):
                seen = gradients[i + k]
                if seq_ptr is not None:
                    seen = tl.where(documents[i] == documents[i + k], seen, 0.0)
                gathered += taps[K - 1 - k] * seen
            if dfinal_ptr is not None:
                place = earlier - (end - (K - 1))
                after = tl.load(dfinal_ptr + (b * (K - 1) + place) * channels + c, mask=(place >= 0) & (place < K - 1) & real, other=0.0)
                if seq_ptr is not None:
                    after = tl.where(documents[i] == newest, after, 0.0)
                gathered += after.to(tl.float32)
            mine = real & (earlier >= first) & (earlier < length)
            tl.store(dx_ptr + (b * length + earlier) * channels + c, gathered, mask=mine & (earlier >= 0))
            if dstate_ptr is not None:
                tl.store(dstate_ptr + (b * (K - 1) + earlier + (K - 1)) * channels + c, gathered, mask=mine & (earlier < 0))
        inputs, gradients, documents = inputs[STEP:], gradients[STEP:], documents[STEP:]

    if sums_ptr is not None:
        sums_ptr += (b * tl.num_programs(1) + tl.program_id(1)) * (K + 1) * channels
        for k in tl.static_range(K + 1):
            tl.store(sums_ptr + k * channels + c, sums[k], mask=real)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, *, state: Tensor | None = None, seq_idx: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See ``reference.causal_conv``; x may have any strides over rows and batch. The new state is a tensor of its own."""
    if x.dtype == torch.float64:
        return chunked.causal_conv(x, weight, bias, state=state, seq_idx=seq_idx, lengths=lengths)
    y, final = _CausalConv.apply(x, weight, bias, state, seq_idx, lengths)
    return y, final


def _dense(x: Tensor) -> Tensor:
    """x, or a copy if the elements of its rows do not stand side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None, seq_idx: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        b, length, channels = x.shape
        taps = weight.shape[1]
        x, weight, bias = _dense(x), weight.contiguous(), bias.contiguous()
        state = None if state is None else state.to(x.dtype).contiguous()
        seq_idx = None if seq_idx is None else seq_idx.contiguous()
        lengths = None if lengths is None else lengths.long().contiguous()
        y, final = x.new_empty(b, length, channels), x.new_empty(b, taps - 1, channels)
        rows = 1 if length == 1 else 8 if length <= 64 else 32
        grid = (triton.cdiv(channels, COLUMNS), triton.cdiv(length, rows), b)
        _forward[grid](
            x, weight, bias, state, seq_idx, lengths, y, final, length, channels, x.stride(0), x.stride(1),
            K=taps, ROWS=rows, COLUMNS=COLUMNS, num_warps=1 if length == 1 else 4,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, state, seq_idx, lengths)
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, state, seq_idx, lengths = ctx.saved_tensors
        b, length, channels = x.shape
        taps = weight.shape[1]
        dy = x.new_zeros(x.shape) if dy is None else _dense(dy)
        dfinal = None if dfinal is None else dfinal.contiguous()
        dx, dstate = x.new_empty(x.shape), None if state is None else torch.empty_like(state)
        steps = 8 if b * length <= 4096 else 16  # enough programs for a GPU, or less overlap of their stretches
        stretches = triton.cdiv(length + taps - 1, STEP * steps - (taps - 1))
        sums = x.new_empty(b * stretches, taps + 1, channels, dtype=torch.float32) if any(ctx.needs_input_grad[1:3]) else None
        _backward[(triton.cdiv(channels, COLUMNS), stretches, b)](
            x, weight, bias, state, seq_idx, lengths, dy, dfinal, dx, dstate, sums,
            length, channels, x.stride(0), x.stride(1), dy.stride(0), dy.stride(1),
            K=taps, STEP=STEP, STEPS=steps, COLUMNS=COLUMNS, num_warps=1,
        )  # fmt: skip
        if sums is None:
            return dx, None, None, dstate, None, None
        total = sums.sum(0)
        return dx, total[1:].T, total[0], dstate, None, None
