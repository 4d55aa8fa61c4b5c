"""Cross-entropy of a linear head, a few rows of logits at a time: the logits of all tokens are never in memory together.

Gradients of a sum are known up to the factor that arrives, so the forward pass takes them too, while a chunk's logits are there.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from zamba2.model.ops import launching_on
from zamba2.model.ops.reference import wide

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # a PyTorch for CPUs may come without it
    triton = None

__all__ = ["linear_cross_entropy"]

BLOCK = 8192  # logits of a row at a time, sixteen for each thread; so few rows at a time stay in the cache for a second pass

if triton is not None:

    @triton.jit
    def _cross_entropy(
        logits_ptr, labels_ptr, losses_ptr, width, ignore_index, GRADIENTS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
    ):
        """One row's loss; with GRADIENTS its logits are overwritten by softmax - onehot."""
        row = tl.program_id(0).to(tl.int64)
        logits_ptr += row * width
        label = tl.load(labels_ptr + row)
        chosen = tl.load(logits_ptr + label, mask=(label >= 0) & (label < width), other=float("nan")).to(tl.float32)
        # one maximum and one sum for each lane, joined at the end
        maximum, total = tl.full([BLOCK], -1e30, tl.float32), tl.zeros([BLOCK], tl.float32)
        for i in range(BLOCKS):
            c = i * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + c, mask=c < width, other=-float("inf")).to(tl.float32)
            larger = tl.maximum(maximum, x)
            total = total * tl.exp(maximum - larger) + tl.exp(x - larger)
            maximum = larger
        largest = tl.max(maximum, 0)
        normalizer = largest + tl.log(tl.sum(total * tl.exp(maximum - largest), 0))
        tl.store(losses_ptr + row, tl.where(label == ignore_index, 0.0, normalizer - chosen))
        if GRADIENTS:
            for i in range(BLOCKS):
                c = i * BLOCK + tl.arange(0, BLOCK)
                x = tl.load(logits_ptr + c, mask=c < width, other=0.0).to(tl.float32)
                gradient = tl.exp(x - normalizer) - tl.where(c == label, 1.0, 0.0)
                tl.store(logits_ptr + c, tl.where(label == ignore_index, 0.0, gradient), mask=c < width)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, chunk: int = 2048
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of softmax(hidden weight^T), and the number of rows that count.

    hidden: (n, d); weight: (V, d), in hidden's dtype; labels: (n,) int64, already shifted; rows labelled ``ignore_index`` add
    nothing. chunk: rows whose logits (chunk, V) exist at a time. Logits have hidden's dtype, the softmax is fp32 (fp64 stays
    fp64). Returns the sum, a scalar in fp32 (fp64), and the count, a scalar int64 tensor on the device. A label outside
    [0, V) makes the sum NaN: a check would wait for the device. Under autocast both are cast first, as ``F.linear`` does.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    recording = torch.is_grad_enabled()
    gradients = (recording and hidden.requires_grad, recording and weight.requires_grad)
    with launching_on(hidden.device):
        total: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, ignore_index, chunk, gradients)
    return total, (labels != ignore_index).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunk: int, gradients: tuple[bool, bool]
    ) -> Tensor:  # fmt: skip
        losses = wide(hidden.new_empty(0)).new_empty(hidden.shape[0])
        dhidden = torch.empty_like(hidden) if gradients[0] else None
        dweight = torch.zeros_like(weight, dtype=losses.dtype) if gradients[1] else None  # bf16 would lose the later chunks' digits
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(hidden[rows], weight)
            losses[rows] = _losses(logits, labels[rows], ignore_index, any(gradients))  # and logits become their gradients
            if dhidden is not None:
                torch.mm(logits, weight, out=dhidden[rows])
            if dweight is not None:
                dweight += logits.T @ hidden[rows]
        ctx.save_for_backward(dhidden, dweight)
        ctx.dtype = weight.dtype
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arriving: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        return (
            None if dhidden is None else (dhidden * arriving).to(dhidden.dtype),
            None if dweight is None else (dweight * arriving).to(ctx.dtype),
            *[None] * 4,
        )


def _losses(logits: Tensor, labels: Tensor, ignore_index: int, gradients: bool) -> Tensor:
    """Cross-entropy of each row, (n,); with ``gradients`` the logits (n, V) are overwritten by softmax - onehot."""
    if triton is None or logits.dtype == torch.float64 or not (logits.is_cuda or triton.knobs.runtime.interpret):
        return _losses_in_torch(logits, labels, ignore_index, gradients)
    losses = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    rows, width = logits.shape
    block = min(BLOCK, triton.next_power_of_2(width))
    _cross_entropy[(rows,)](
        logits, labels.contiguous(), losses, width, ignore_index, GRADIENTS=gradients, BLOCK=block, BLOCKS=triton.cdiv(width, block),
        num_warps=16,
    )  # fmt: skip
    return losses


def _losses_in_torch(logits: Tensor, labels: Tensor, ignore_index: int, gradients: bool) -> Tensor:
    real = labels != ignore_index
    chosen = torch.where(real, labels, 0)[:, None]
    logs = F.log_softmax(wide(logits), dim=-1)
    losses = -logs.gather(1, chosen)[:, 0] * real
    if gradients:
        logs.exp_().scatter_add_(1, chosen, -logs.new_ones(chosen.shape))
        logits.copy_(logs.mul_(real[:, None]))
    return losses
