"""The six operations as their definitions say: plain, differentiable, slow. Every other implementation is tested against these.

Letters: b batch, T length, H heads, P channels of a head, G groups, N state size, K taps of the convolution.
All arithmetic is fp32 (fp64 stays fp64); outputs have the dtype of the first argument unless stated.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["add_hoisted", "causal_conv", "concat_rms_norm", "geglu", "rms_norm", "ssd_scan", "wide"]


def wide(x: Tensor) -> Tensor:
    """x in the dtype of all arithmetic: fp32, or fp64 if it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, gate: Tensor | None = None, groups: int = 1) -> Tensor:
    """x / rms(x) * weight, the mean taken over each of ``groups`` equal parts of the last dimension.

    With ``gate``, x is first multiplied by SiLU(gate) and the output has the gate's dtype
    (Mamba2's norm with norm_before_gate=False). x, gate: (..., D); weight: (D,). Returns (..., D).
    """
    y: Tensor = wide(x)
    if gate is not None:
        y = y * F.silu(wide(gate))
    parts = y.unflatten(-1, (groups, -1))
    parts = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)
    out: Tensor = parts.flatten(-2) * wide(weight)
    return out.to(x.dtype if gate is None else gate.dtype)


def concat_rms_norm(x: Tensor, x0: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of concat[x, x0], of which only the left half and the scale are returned.

    x, x0: (..., D); weight: (2D,). Returns the left half (..., D) in x's dtype and the scale 1/rms (..., 1) in fp32;
    the right half is scale * weight[D:] * x0, whose matrix products can be taken once per token.
    """
    both = torch.cat([wide(x), wide(x0)], dim=-1)
    scale = torch.rsqrt(both.square().mean(-1, keepdim=True) + eps)
    left = both * scale * wide(weight)
    return left[..., : x.shape[-1]].to(x.dtype), scale


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, *, state: Tensor | None = None, seq_idx: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """SiLU of a depthwise causal convolution; weight[:, K-1] multiplies the newest input.

    x: (b, T, C); weight: (C, K); bias: (C,); state: (b, K-1, C), the inputs before x (zeros if None), oldest first;
    seq_idx: (b, T), taps do not reach over a change of it and the state belongs to seq_idx[:, 0]; lengths: (b,), 1 to T,
    tokens of each row that are text, with padding behind them. Returns y (b, T, C) and the new state, the inputs before the
    text's end, (b, K-1, C), in x's dtype.
    """
    taps = weight.shape[-1]
    if state is None:
        state = x.new_zeros(x.shape[0], taps - 1, x.shape[2])
    inputs = torch.cat([state.to(x.dtype), x], dim=1)
    if seq_idx is not None:
        seq_idx = torch.cat([seq_idx[:, :1].expand(-1, taps - 1), seq_idx], dim=1)
    outputs = []
    for t in range(x.shape[1]):
        window = wide(inputs[:, t : t + taps])  # (b, K, C)
        if seq_idx is not None:
            window = window * (seq_idx[:, t : t + taps] == seq_idx[:, t + taps - 1, None])[..., None]
        outputs.append(F.silu((window * wide(weight).T).sum(1) + wide(bias)))
    return torch.stack(outputs, dim=1).to(x.dtype), last_inputs(inputs, taps - 1, seq_idx, lengths)


def last_inputs(inputs: Tensor, count: int, seq_idx: Tensor | None, lengths: Tensor | None) -> Tensor:
    """What ``causal_conv`` keeps of its inputs (b, count + T, C), the old state in front; seq_idx: (b, count + T). (b, count, C)."""

    def last(m: Tensor) -> Tensor:
        if lengths is None:
            return m[:, m.shape[1] - count :]
        rows, places = torch.arange(len(m), device=m.device), torch.arange(count, device=m.device)
        return m[rows[:, None], lengths[:, None] + places]

    final = last(inputs)
    if seq_idx is None:
        return final
    documents = last(seq_idx)
    return final * (documents == documents[:, -1:])[..., None]


def ssd_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, chunk_size: int,
    dt_bias: Tensor | None = None, state: Tensor | None = None, seq_idx: Tensor | None = None, lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The state-space recurrence, token by token (Mamba2 paper, equation 2 with scalar A):

        S = exp(dt A) S + dt x B^T,    y = S C + D x

    x: (b, T, H, P); dt: (b, T, H), positive, fp32; A: (H,), negative; B, C: (b, T, G, N), head h uses group h // (H/G);
    D: (H,); state: (b, H, P, N) (zeros if None); seq_idx: (b, T), the state is reset where it changes and the given
    state belongs to seq_idx[:, 0]. chunk_size never changes the result. Returns y (b, T, H, P) and the state, in fp32.

    dt_bias: (H,); with it dt and A come as the mixer has them, and softplus(dt + dt_bias) and -exp(A) take their places.
    lengths: (b,), 1 to T, tokens of each row that are text: steps behind them are zero, which leaves the state as it is.
    """
    b, length, heads, channels = x.shape
    per_group = heads // B.shape[2]
    dt, A = steps_and_rates(dt, A, dt_bias, lengths)
    x, D = wide(x), wide(D)
    B, C = (wide(m).repeat_interleave(per_group, dim=2) for m in (B, C))  # (b, T, H, N)
    S = x.new_zeros(b, heads, channels, B.shape[-1]) if state is None else wide(state).to(x.dtype)
    outputs = []
    for t in range(length):
        if seq_idx is not None and t > 0:
            S = S * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        decay = torch.exp(dt[:, t] * A)[:, :, None, None]
        S = decay * S + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        outputs.append((S * C[:, t, :, None, :]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, dim=1), S


def steps_and_rates(dt: Tensor, A: Tensor, dt_bias: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Step sizes (b, T, H) and rates (H,) of ``ssd_scan`` from its arguments."""
    if dt_bias is None:
        dt, A = wide(dt), wide(A)
    else:
        dt, A = F.softplus(dt + wide(dt_bias)), -torch.exp(wide(A))  # the sum is in the wider dtype
    if lengths is not None:
        dt = dt * (torch.arange(dt.shape[1], device=dt.device) < lengths[:, None])[..., None]
    return dt, A


def geglu(projected: Tensor, adapted: Tensor) -> Tensor:
    """GELU(g) * u with exact erf GELU, where [g | u] = projected + adapted. Both (..., 2I); returns (..., I)."""
    gate, up = (wide(projected) + wide(adapted)).chunk(2, dim=-1)
    return (F.gelu(gate) * up).to(projected.dtype)


def add_hoisted(projected: Tensor, hoisted: Tensor, scale: Tensor) -> Tensor:
    """projected + scale * hoisted, rounded once. projected, hoisted: (..., R); scale: (..., 1), fp32. Returns (..., R)."""
    return (wide(projected) + wide(scale) * wide(hoisted)).to(projected.dtype)
