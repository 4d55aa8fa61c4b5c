"""The six operations in PyTorch for speed on any device: the recurrence in chunks of matrix products, the rest fused by hand.

Definitions, shapes and dtypes are those of ``reference``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from zamba2.model.ops import reference
from zamba2.model.ops.reference import add_hoisted, concat_rms_norm, rms_norm, wide

__all__ = ["add_hoisted", "causal_conv", "concat_rms_norm", "geglu", "rms_norm", "ssd_scan"]

LOG2_E = math.log2(math.e)
CPU_ROWS = 16
CPU_CHUNK = 64  # tokens; one chunk's decays then fit the second-level cache (measured: docs/log.md)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, *, state: Tensor | None = None, seq_idx: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One multiply-add per tap over the whole length; see ``reference.causal_conv``."""
    length, taps = x.shape[1], weight.shape[-1]
    if state is None:
        state = x.new_zeros(x.shape[0], taps - 1, x.shape[2])
    inputs = torch.cat([state.to(x.dtype), x], dim=1)  # (b, K-1+T, C)
    if seq_idx is not None:
        seq_idx = torch.cat([seq_idx[:, :1].expand(-1, taps - 1), seq_idx], dim=1)
    columns = wide(weight).unbind(-1)
    total = torch.addcmul(wide(bias), wide(x), columns[-1])
    for k in range(taps - 1):
        earlier = inputs[:, k : k + length]
        if seq_idx is not None:
            earlier = earlier * (seq_idx[:, k : k + length] == seq_idx[:, taps - 1 :])[..., None]
        total = torch.addcmul(total, wide(earlier), columns[k])
    final = reference.last_inputs(inputs, taps - 1, seq_idx, lengths)
    return F.silu(total).to(x.dtype), final.clone()  # a view would keep all inputs alive


def ssd_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, chunk_size: int,
    dt_bias: Tensor | None = None, state: Tensor | None = None, seq_idx: Tensor | None = None, lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step for one token, else chunks (Mamba2 paper, section 6); memory O(chunk). See ``reference.ssd_scan``."""
    b, length, heads, channels = x.shape
    groups, n = B.shape[2:]
    (dt, A), D = reference.steps_and_rates(dt, A, dt_bias, lengths), wide(D)
    S = dt.new_zeros(b, heads, channels, n) if state is None else state
    S = S.unflatten(1, (groups, -1))  # (b, G, H/G, P, N)
    if length == 1:
        y, S = _step(wide(x[:, 0]), dt[:, 0], A, wide(B[:, 0]), wide(C[:, 0]), S)
        return torch.addcmul(y, D[:, None], x[:, 0]).unsqueeze(1), S.flatten(1, 2)
    if x.device.type == "cpu":
        chunk_size = min(chunk_size, CPU_CHUNK)
    outputs = []
    previous = None if seq_idx is None else seq_idx[:, 0]  # the document that the carried state belongs to
    for start in range(0, length, chunk_size):
        piece = slice(start, start + chunk_size)
        documents = None if seq_idx is None else seq_idx[:, piece]
        xc = wide(x[:, piece])
        y, S = _chunk(xc, dt[:, piece], A, wide(B[:, piece]), wide(C[:, piece]), S, documents, previous)
        outputs.append(torch.addcmul(y, D[:, None], xc))
        previous = None if documents is None else documents[:, -1]
    return torch.cat(outputs, dim=1), S.flatten(1, 2)


def _step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """One token. x: (b, H, P); dt: (b, H); B, C: (b, G, N); S: (b, G, H/G, P, N), left as it is."""
    split = (B.shape[1], -1)
    decay = torch.exp(dt * A).unflatten(1, split)[..., None, None]
    added = (dt[..., None] * x).unflatten(1, split)[..., None]
    S = torch.addcmul(S * decay, added, B[:, :, None, None, :])
    y = S @ C[:, :, None, :, None]  # (b, G, H/G, P, 1)
    return y.flatten(1, 2).squeeze(-1), S


def _decay(log2: Tensor) -> Tensor:
    """2 ** log2, with decays below 1e-30 as zero: they vanish in any fp32 sum, and denormals slow a CPU down tenfold."""
    # exp2, for exp on CPUs is slow where it underflows
    decay: Tensor = F.hardshrink(torch.exp2(log2), 1e-30)
    return decay


def _chunk(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, S: Tensor, documents: Tensor | None, previous: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One chunk. x: (b, Q, H, P); dt: (b, Q, H); B, C: (b, Q, G, N); S: (b, G, H/G, P, N); documents: (b, Q); previous: (b,)."""
    length, split = x.shape[1], (B.shape[2], -1)
    # fp64 sums: differences of long fp32 sums would lose the small steps behind a large one
    total = torch.cumsum((dt * A).double().transpose(1, 2) * LOG2_E, dim=-1)  # (b, H, Q), log2 of the decay from the chunk's start
    hidden = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    if documents is not None:
        hidden = (hidden | (documents[:, :, None] != documents[:, None, :]))[:, None]  # (b, 1, Q, Q)
    between = _decay((total[..., :, None] - total[..., None, :]).to(x.dtype).masked_fill_(hidden, -torch.inf))  # (b, H, Q, Q)
    from_start, to_end = total, total[..., -1:] - total
    if documents is not None and previous is not None:
        from_start = from_start.masked_fill((documents != previous[:, None])[:, None], -torch.inf)
        to_end = to_end.masked_fill((documents != documents[:, -1:])[:, None], -torch.inf)
    from_start, to_end = _decay(from_start.to(x.dtype)), _decay(to_end.to(x.dtype))  # (b, H, Q)

    weighted = x * dt[..., None]  # (b, Q, H, P)
    B, C = B.transpose(1, 2), C.transpose(1, 2)  # (b, G, Q, N)
    scores = (C @ B.transpose(-1, -2)).unsqueeze(2)  # (b, G, 1, Q, Q), one product for all heads of a group
    within = (scores * between.unflatten(1, split)).flatten(1, 2) @ weighted.transpose(1, 2)  # (b, H, Q, P)
    before = (C @ S.flatten(2, 3).transpose(-1, -2)).transpose(1, 2).reshape(x.shape)  # (b, Q, H, P)
    y = torch.addcmul(within.transpose(1, 2), before, from_start.transpose(1, 2)[..., None])
    ending = (weighted * to_end.transpose(1, 2)[..., None]).unflatten(2, split).flatten(3, 4).permute(0, 2, 3, 1)  # (b, G, H/G P, Q)
    decay = from_start[..., -1].unflatten(1, split)[..., None, None]
    return y, torch.addcmul((ending @ B).reshape(S.shape), S, decay)


def geglu(projected: Tensor, adapted: Tensor) -> Tensor:
    """See ``reference.geglu``; without gradients a few rows at a time, whose fp32 copies stay in the cache."""
    if torch.is_grad_enabled() or projected.device.type != "cpu" or projected.dtype.itemsize > 2:
        return reference.geglu(projected, adapted)
    rows = zip(projected.flatten(0, -2).split(CPU_ROWS), adapted.flatten(0, -2).split(CPU_ROWS), strict=True)
    return torch.cat([reference.geglu(p, a) for p, a in rows]).reshape(*projected.shape[:-1], -1)
