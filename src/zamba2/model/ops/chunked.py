"""The five operations in PyTorch for speed on any device: the recurrence in chunks of matrix products, the rest fused by hand.

Definitions, shapes and dtypes are those of ``reference``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from zamba2.model.ops.reference import concat_rms_norm, geglu, rms_norm, wide

__all__ = ["causal_conv", "concat_rms_norm", "geglu", "rms_norm", "ssd_scan"]


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, *, state: Tensor | None = None, seq_idx: Tensor | None = None
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
    final = inputs[:, length:]
    if seq_idx is not None:
        final = final * (seq_idx[:, length:] == seq_idx[:, -1:])[..., None]
    return F.silu(total).to(x.dtype), final.clone()  # a view would keep all inputs alive


def ssd_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, chunk_size: int,
    state: Tensor | None = None, seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step for one token, else chunks (Mamba2 paper, section 6); memory O(chunk). See ``reference.ssd_scan``."""
    b, length, heads, channels = x.shape
    dt, A, D = wide(dt), wide(A), wide(D)
    if state is None:
        state = dt.new_zeros(b, heads, channels, B.shape[-1])
    if length == 1:
        y, state = _step(wide(x[:, 0]), dt[:, 0], A, wide(B[:, 0]), wide(C[:, 0]), state)
        return (y + D[:, None] * x[:, 0]).unsqueeze(1), state
    outputs = []
    previous = None if seq_idx is None else seq_idx[:, 0]  # the document that the carried state belongs to
    for start in range(0, length, chunk_size):
        piece = slice(start, start + chunk_size)
        documents = None if seq_idx is None else seq_idx[:, piece]
        xc = wide(x[:, piece])
        y, state = _chunk(xc, dt[:, piece], A, wide(B[:, piece]), wide(C[:, piece]), state, documents, previous)
        outputs.append(torch.addcmul(y, D[:, None], xc))
        previous = None if documents is None else documents[:, -1]
    return torch.cat(outputs, dim=1), state


def _step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token. x: (b, H, P); dt: (b, H); B, C: (b, G, N); state: (b, H, P, N), left as it is."""
    grouped = state.unflatten(1, (B.shape[1], -1))  # (b, G, H/G, P, N)
    decay = torch.exp(dt * A).unflatten(1, (B.shape[1], -1))[..., None, None]
    added = (dt[..., None] * x).unflatten(1, (B.shape[1], -1))[..., None]
    grouped = torch.addcmul(grouped * decay, added, B[:, :, None, None, :])
    y = grouped @ C[:, :, None, :, None]  # (b, G, H/G, P, 1)
    return y.flatten(1, 2).squeeze(-1), grouped.flatten(1, 2)


def _chunk(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, documents: Tensor | None, previous: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One chunk. x: (b, Q, H, P); dt: (b, Q, H); B, C: (b, Q, G, N); state: (b, H, P, N); documents: (b, Q); previous: (b,)."""
    length, heads = x.shape[1:3]
    per_group = heads // B.shape[2]
    # fp64 sums: differences of long fp32 sums would lose the small steps behind a large one
    total = torch.cumsum((dt * A).double().transpose(1, 2), dim=-1)  # (b, H, Q), log of the decay from the chunk's start
    later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    if documents is not None:
        later = (later | (documents[:, :, None] != documents[:, None, :]))[:, None]  # (b, 1, Q, Q)
    between = (total[..., :, None] - total[..., None, :]).to(x.dtype).masked_fill(later, -torch.inf)
    from_start, to_end = total, total[..., -1:] - total
    if documents is not None and previous is not None:
        from_start = from_start.masked_fill((documents != previous[:, None])[:, None], -torch.inf)
        to_end = to_end.masked_fill((documents != documents[:, -1:])[:, None], -torch.inf)
    from_start, to_end = from_start.to(x.dtype).exp(), to_end.to(x.dtype).exp()  # (b, H, Q)

    weighted = (x * dt[..., None]).transpose(1, 2)  # (b, H, Q, P)
    B, C = B.transpose(1, 2), C.transpose(1, 2)  # (b, G, Q, N)
    scores = (C @ B.transpose(-1, -2)).repeat_interleave(per_group, dim=1)  # (b, H, Q, Q)
    B, C = (m.repeat_interleave(per_group, dim=1) for m in (B, C))  # (b, H, Q, N)
    y = (scores * between.exp()) @ weighted  # within the chunk
    y = y + (C @ state.transpose(-1, -2)) * from_start[..., None]  # from the state before it
    state = state * from_start[..., -1, None, None] + (weighted * to_end[..., None]).transpose(-1, -2) @ B
    return y.transpose(1, 2), state
