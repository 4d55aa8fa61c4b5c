"""Zamba2 in PyTorch: the reference for every other implementation, the GPU path and the training path.

What is unusual here, beside a Mamba2 or a transformer:

  * A backbone of Mamba2 layers; at some of them ("hybrid") a transformer block first adds to the mixer's *input*.
    Its output t never enters the residual stream: x = x + Mamba2(RMSNorm(x + t)).
  * One or two transformer blocks are shared by all hybrid layers, in turn (ABAB...). What is a position's own:
    low-rank adapters on gate_up (1.2B: on q, k, v too) and the H x H ``linear`` behind the block.
  * The block reads the residual stream beside the token's own embedding, concat[x, x0], 2H wide. It has no residual
    connections inside. Softmax scale is (head_dim / 2) ** -0.5. The 2.7B model has no positions at all.
  * W RMSNorm([x, x0]) = W_left (w1 x / rms) + (W_right (w2 x0)) / rms: the second product depends on the token and the
    block alone, so it is taken once per block ("hoisted") and not once per position.

Letters: b batch, T tokens of this call, L keys in sight, V vocabulary, H hidden size; in the mixer P channels of a head,
N state size, G groups; S the SSM state. Sources: Zyphra's standalone PyTorch code, its fork of transformers, and
the Mamba2 paper (Dao & Gu 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from zamba2.config import Config, Layer
from zamba2.model import ops as _ops
from zamba2.model.ops.reference import wide
from zamba2.model.packed import Packed, PackedEmbedding, product
from zamba2.model.state import LayerRecord, ModelState

__all__ = ["Mamba2", "SharedBlock", "Zamba2"]

T = TypeVar("T")
GATED_EPS = 1e-5  # of the norm behind a mixer's scan, not rms_norm_eps
WORTH_IT = 1 << 21  # elements


class Linear(nn.Linear):
    """A projection without bias; a single bf16 token on a CPU takes the matrix-vector kernel, a third faster."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return matmul(x, self.weight)


def matmul(x: Tensor, weight: Tensor | Packed) -> Tensor:
    """x W^T. x: (..., in); weight: (out, in)."""
    if isinstance(weight, Packed):
        return product(x, weight)
    if x.numel() == x.shape[-1] and x.device.type == "cpu" and not torch.is_grad_enabled():
        return torch.mv(weight, x.reshape(-1)).reshape(*x.shape[:-1], -1)
    return F.linear(x, weight)


def again_in_backward(f: Callable[..., T], *arguments: Tensor) -> T:
    """f(*arguments); with gradients, f's inside is not kept but computed again by the backward pass: little arithmetic, much memory.

    Small arguments take little memory, but a fifth of a training step's time: there the inside is kept.
    """
    if not torch.is_grad_enabled() or sum(argument.numel() for argument in arguments) < WORTH_IT:
        return f(*arguments)
    out: T = checkpoint(f, *arguments, use_reentrant=False, preserve_rng_state=False)
    return out


class RMSNorm(nn.Module):
    """Holds the weight; the arithmetic is ``ops.rms_norm``."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class Adapter(nn.Sequential):
    """Low-rank addition to a shared projection, B(A x): in -> rank -> out."""

    def __init__(self, in_features: int, rank: int, out_features: int) -> None:
        super().__init__(Linear(in_features, rank), Linear(rank, out_features))


def adapter_of(adapters: nn.ModuleDict, position: int) -> tuple[Tensor | Packed, Tensor | Packed]:
    """A, (rank, in), and B, (out, rank), of one position's adapter."""
    down, up = (projection.weight for projection in cast("Adapter", adapters[str(position)]))
    return cast("tuple[Tensor | Packed, Tensor | Packed]", (down, up))


@dataclass
class Context:
    """What all layers of one call share."""

    x0: Tensor  # (b, T, H), the tokens' own embeddings
    mask: Tensor | None  # (b or 1, 1, T, L) bool, True = may attend (or torch's name of a causal one); None = plain causal
    rope: tuple[Tensor, Tensor] | None  # cos and sin, (b or 1, 1, T, head_dim) fp32
    real: Tensor | None  # (b, T, 1) bool, False at left padding
    seq_idx: Tensor | None  # (b, T) document numbers of a packed batch
    state: ModelState | None
    records: list[LayerRecord] | None
    right: dict[int | None, Tensor]  # block -> w2 x0, (b, T, H)
    hoisted: dict[int | None, list[Tensor]]  # block -> W_right (w2 x0), (b, T, rows), of q, k, v or of the three together


class Attention(nn.Module):
    """Causal attention over u = RMSNorm(concat[x, x0]): 2H -> 2H, and o_proj back to H."""

    def __init__(self, config: Config, positions: list[int]) -> None:
        super().__init__()
        wide = config.attention_hidden_size
        self.config = config
        self.sizes = [wide, config.kv_dim, config.kv_dim]
        self.q_proj = Linear(wide, wide)
        self.k_proj = Linear(wide, config.kv_dim)
        self.v_proj = Linear(wide, config.kv_dim)
        self.o_proj = Linear(wide, config.hidden_size)
        self.adapters = config.use_shared_attention_adapter
        if self.adapters:
            adapters = ({str(j): Adapter(wide, config.adapter_rank, wide) for j in positions} for _ in "qkv")
            self.linear_q_adapter_list, self.linear_k_adapter_list, self.linear_v_adapter_list = map(nn.ModuleDict, adapters)
        self.split: tuple[Tensor | Packed, Tensor | Packed] | None = None  # left and right half of [q; k; v], see split_for_inference

    def split_for_inference(self) -> None:
        """Keep q, k and v as two contiguous halves, which stream faster, and drop the modules (no training afterwards)."""
        if self.split is None:
            left, right = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight]).detach().chunk(2, dim=1)
            self.use_halves(left.contiguous(), right.contiguous())

    def use_halves(self, left: Tensor | Packed, right: Tensor | Packed) -> None:
        """Take the two halves of [q; k; v], (rows, H) each, in place of the modules."""
        self.split = (left, right)
        del self.q_proj, self.k_proj, self.v_proj

    def halves(self) -> Sequence[tuple[Tensor | Packed, Tensor | Packed]]:
        """Weights for x and for x0, (rows, H) each, of q, k, v or of the three together; empty if modules must be called."""
        if self.split is not None:
            return [self.split]
        projections = (self.q_proj, self.k_proj, self.v_proj)
        plain = all(type(p) is Linear for p in projections)  # unlike peft's LoRA, which sees all of u
        return [(left, right) for left, right in (p.weight.chunk(2, dim=1) for p in projections)] if plain else []

    def qkv(self, left: Tensor, scale: Tensor, right: Tensor, layer: Layer, context: Context, ops: _ops.Ops) -> Sequence[Tensor]:
        """Queries, keys and values, (b, T, rows) each, from the norm's left half, its scale and w2 * x0."""
        halves = self.halves()
        if halves:
            if layer.block not in context.hoisted:
                context.hoisted[layer.block] = [matmul(right, w) for _, w in halves]
            hoisted = context.hoisted[layer.block]
            terms = [ops.add_hoisted(matmul(left, w), h, scale) for (w, _), h in zip(halves, hoisted, strict=True)]
            projected: Sequence[Tensor] = terms if len(terms) == 3 else terms[0].split(self.sizes, dim=-1)
        if self.adapters or not halves:
            u = torch.cat([left, (wide(right) * scale).to(left.dtype)], dim=-1)
        if not halves:
            projected = [self.q_proj(u), self.k_proj(u), self.v_proj(u)]
        if self.adapters:
            lists = (self.linear_q_adapter_list, self.linear_k_adapter_list, self.linear_v_adapter_list)
            projected = [p + own[str(layer.position)](u) for p, own in zip(projected, lists, strict=True)]
        return projected

    def forward(self, left: Tensor, scale: Tensor, right: Tensor, layer: Layer, context: Context, ops: _ops.Ops) -> Tensor:
        assert layer.position is not None
        config = self.config
        q, k, v = (
            m.unflatten(-1, (-1, config.attention_head_dim)).transpose(1, 2)  # (b, heads, T, head_dim)
            for m in self.qkv(left, scale, right, layer, context, ops)
        )
        if context.rope is not None:
            q, k = rotate(q, *context.rope), rotate(k, *context.rope)
        if context.state is not None:
            k, v = context.state.kv[layer.position].append(k, v)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=context.mask, is_causal=context.mask is None and q.shape[2] > 1, scale=config.attention_scale,
            enable_gqa=config.num_key_value_heads != config.num_attention_heads,
        )  # fmt: skip
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(-2))
        return out


class MLP(nn.Module):
    """Gated MLP with exact GELU; gate_up has a low-rank adapter of each position's own."""

    def __init__(self, config: Config, positions: list[int]) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Linear(hidden, 2 * inner)
        self.down_proj = Linear(inner, hidden)
        self.gate_up_proj_adapter_list = nn.ModuleDict(
            {str(j): Adapter(hidden, config.adapter_rank, 2 * inner) for j in positions}
        )

    def forward(self, m: Tensor, position: int, ops: _ops.Ops) -> Tensor:
        adapter = self.gate_up_proj_adapter_list[str(position)]
        out: Tensor = self.down_proj(again_in_backward(ops.geglu, self.gate_up_proj(m), adapter(m)))
        return out


class SharedBlock(nn.Module):
    """The transformer block that several hybrid layers share. (b, T, H) -> (b, T, H), no residual anywhere."""

    def __init__(self, config: Config, positions: list[int]) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.input_layernorm = RMSNorm(config.attention_hidden_size)
        self.self_attn = Attention(config, positions)
        self.pre_ff_layernorm = RMSNorm(config.hidden_size)
        self.feed_forward = MLP(config, positions)

    def forward(self, x: Tensor, layer: Layer, context: Context, ops: _ops.Ops) -> Tensor:
        assert layer.position is not None
        weight = self.input_layernorm.weight
        left, scale = ops.concat_rms_norm(x, context.x0, weight, self.eps)
        if layer.block not in context.right:
            context.right[layer.block] = (wide(weight[x.shape[-1] :]) * wide(context.x0)).to(x.dtype)
        o = self.self_attn(left, scale, context.right[layer.block], layer, context, ops)
        m = ops.rms_norm(o, self.pre_ff_layernorm.weight, self.eps)
        out: Tensor = self.feed_forward(m, layer.position, ops)
        return out


class Conv1d(nn.Module):
    """Holds the depthwise convolution's weight (C, 1, K) and bias (C,), named and shaped as in the checkpoints."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.zeros(channels))


class Mamba2(nn.Module):
    """The Mamba2 mixer. (b, T, H) -> (b, T, H)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.in_proj = Linear(config.hidden_size, config.in_proj_dim)
        self.conv1d = Conv1d(config.conv_dim, config.mamba_d_conv)
        self.dt_bias = nn.Parameter(torch.empty(config.n_mamba_heads))
        self.A_log = nn.Parameter(torch.empty(config.n_mamba_heads))
        self.D = nn.Parameter(torch.ones(config.n_mamba_heads))
        self.norm = RMSNorm(config.d_inner)
        self.out_proj = Linear(config.d_inner, config.hidden_size)

    def recur(
        self, xBC: Tensor, dt: Tensor, conv: Tensor | None, S: Tensor | None, real: Tensor | None, ops: _ops.Ops,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Convolution and scan. xBC: (b, T, conv_dim); dt: (b, T, heads) before softplus. Returns y (b, T, d_inner), states."""
        config = self.config
        xBC, conv = ops.causal_conv(xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias, state=conv, seq_idx=seq_idx)
        if real is not None:
            xBC = xBC * real  # the convolution's bias is not zero
        x, B, C = xBC.split([config.d_inner, *[config.mamba_ngroups * config.mamba_d_state] * 2], dim=-1)
        y, S = ops.ssd_scan(
            x.unflatten(-1, (config.n_mamba_heads, -1)),
            dt,
            self.A_log,
            B.unflatten(-1, (config.mamba_ngroups, -1)),
            C.unflatten(-1, (config.mamba_ngroups, -1)),
            self.D,
            chunk_size=config.chunk_size,
            dt_bias=self.dt_bias,
            state=S,
            seq_idx=seq_idx,
        )
        return y.flatten(-2), conv, S

    def between(
        self, z: Tensor, xBC: Tensor, dt: Tensor, conv: Tensor | None, S: Tensor | None, real: Tensor | None, ops: _ops.Ops,
        seq_idx: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """All between the two projections. z: (b, T, d_inner); the rest as in ``recur``. Returns (b, T, d_inner) and the states."""
        y, conv, S = self.recur(xBC, dt, conv, S, real, ops, seq_idx)
        groups = self.config.mamba_ngroups
        return ops.rms_norm(y, self.norm.weight, GATED_EPS, gate=z, groups=groups), conv, S

    def forward(self, u: Tensor, layer: Layer, context: Context, ops: _ops.Ops) -> Tensor:
        config, state = self.config, context.state
        if context.real is not None:
            u = u * context.real
        z, xBC, dt = self.in_proj(u).split([config.d_inner, config.conv_dim, config.n_mamba_heads], dim=-1)
        before = (None, None) if state is None else (state.conv[layer.index], state.ssm[layer.index])
        between = partial(self.between, conv=before[0], S=before[1], real=context.real, ops=ops, seq_idx=context.seq_idx)
        gated, conv, S = again_in_backward(between, z, xBC, dt) if state is None else between(z, xBC, dt)
        if state is not None:
            state.conv[layer.index], state.ssm[layer.index] = conv, S
        if context.records is not None:
            context.records.append(LayerRecord(*before, xBC, dt, context.real))
        out: Tensor = self.out_proj(gated)
        return out


class DecoderLayer(nn.Module):
    """One layer of the backbone; a hybrid one also owns the ``linear`` behind its shared block."""

    def __init__(self, config: Config, layer: Layer) -> None:
        super().__init__()
        self.layer, self.eps = layer, config.rms_norm_eps
        self.linear = Linear(config.hidden_size, config.hidden_size) if layer.is_hybrid else None
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.mamba = Mamba2(config)

    def forward(self, x: Tensor, block: SharedBlock | None, context: Context, ops: _ops.Ops) -> Tensor:
        u = x if self.linear is None or block is None else x + self.linear(block(x, self.layer, context, ops))
        u = ops.rms_norm(u, self.input_layernorm.weight, self.eps)
        out: Tensor = x + self.mamba(u, self.layer, context, ops)
        return out


class Zamba2(nn.Module):
    """The whole model: token ids to logits."""

    def __init__(self, config: Config, *, ops: str = "auto") -> None:
        super().__init__()
        self.config, self.ops = config, _ops.select(ops)
        self.embed_tokens: nn.Embedding | PackedEmbedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in config.layers)
        self.shared_blocks = nn.ModuleList(
            SharedBlock(config, list(range(b, len(config.hybrid_layer_ids), config.num_mem_blocks)))
            for b in range(config.num_shared_blocks)
        )
        self.final_layernorm = RMSNorm(config.hidden_size)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)

    def new_state(self) -> ModelState:
        """An empty state, of as many sequences as its first call has rows."""
        return ModelState.empty(self.config)

    def forward(
        self, input_ids: Tensor | None = None, *, inputs_embeds: Tensor | None = None, state: ModelState | None = None,
        attention_mask: Tensor | None = None, seq_idx: Tensor | None = None, logits_to_keep: int | None = None, record: bool = False,
    ) -> Tensor:  # fmt: skip
        """Scores of the next token after each position.

        input_ids: (b, T), or inputs_embeds: (b, T, H). state: advanced by T tokens in place.
        attention_mask: (b, T), 0 at left padding (1 everywhere else; zeros at the right end change nothing and are
        allowed), only for the first call of a state. seq_idx: (b, T), rising document numbers of a packed batch,
        without a state. logits_to_keep: trailing positions wanted, None for all. record: keep what ``keep`` needs.
        Returns logits (b, logits_to_keep, V) in the model's dtype. Raises ValueError for arguments that do not fit.
        """
        x = self.hidden_states(
            input_ids, inputs_embeds=inputs_embeds, state=state, attention_mask=attention_mask, seq_idx=seq_idx, record=record
        )
        return self.logits(x if logits_to_keep is None else x[:, x.shape[1] - logits_to_keep :])

    def logits(self, x: Tensor) -> Tensor:
        """Head over hidden states. (b, T, H) -> (b, T, V)."""
        with _ops.launching_on(x.device):
            return matmul(x, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(x)

    def hidden_states(
        self, input_ids: Tensor | None = None, *, inputs_embeds: Tensor | None = None, state: ModelState | None = None,
        attention_mask: Tensor | None = None, seq_idx: Tensor | None = None, record: bool = False,
    ) -> Tensor:  # fmt: skip
        """Everything but the head; arguments as in ``forward``. Returns the normalized hidden states (b, T, H)."""
        given = inputs_embeds if input_ids is None else input_ids
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give either input_ids or inputs_embeds")
        if given.dim() < 2:
            raise ValueError(f"the tokens have shape {tuple(given.shape)}; (rows, tokens) is needed")
        if given.shape[1] == 0:
            raise ValueError("there are no tokens to read; at least one is needed")
        if state is not None and seq_idx is not None:
            raise ValueError("a state holds one document per row; seq_idx cannot be used with it")
        if record and state is None:
            raise ValueError("record needs a state")
        with _ops.launching_on(given.device):
            x: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            context = self.context(x, state, attention_mask, seq_idx, record)
            for layer in self.layers:
                assert isinstance(layer, DecoderLayer)
                shared = self.shared_blocks[layer.layer.block] if layer.layer.block is not None else None
                x = layer(x, shared, context, self.ops)
            if state is not None:
                state.position += x.shape[1]
                state.records = context.records
            return self.ops.rms_norm(x, self.final_layernorm.weight, self.config.rms_norm_eps)

    def context(
        self, x0: Tensor, state: ModelState | None, attention_mask: Tensor | None, seq_idx: Tensor | None, record: bool
    ) -> Context:
        """Masks, ends and rotary angles of one call."""
        length, past = x0.shape[1], 0 if state is None else state.position
        padding, device = None if state is None else state.padding, x0.device  # padding: (b,) columns to skip at the left
        if attention_mask is not None:
            if past:
                raise ValueError("left padding belongs to the first call of a state")
            padding = left_padding(attention_mask)
            if state is not None:
                state.padding = padding
        start = torch.zeros(1, dtype=torch.long, device=device) if padding is None else padding
        columns = torch.arange(past, past + length, device=device)
        positions = columns - start[:, None]  # (b or 1, T)
        mask: Tensor | None = None
        if past and length > 1 and padding is None and device.type == "cuda":
            mask = causal_lower_right(length, past + length)  # a mask of values would keep torch from its fastest kernel
        elif padding is not None or seq_idx is not None or (past and length > 1):
            keys = torch.arange(past + length, device=device)
            mask = (keys <= columns[:, None]) & (keys >= start[:, None, None])  # (b or 1, T, L)
            if seq_idx is not None:
                mask = mask & (seq_idx[:, :, None] == seq_idx[:, None, :])
                first = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0)) * columns
                positions = torch.minimum(positions, columns - first.cummax(dim=1).values)
            mask = (mask | (keys == columns[:, None]))[:, None]  # padding sees itself, or its softmax would be empty
        real = None if padding is None or past else (columns >= start[:, None])[..., None]
        rope = self.rotary_angles(positions) if self.config.use_mem_rope else None
        return Context(x0, mask, rope, real, seq_idx, state, [] if record else None, {}, {})

    def rotary_angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of position * base ** (-2i / d). positions: (b, T). Returns (b, 1, T, head_dim), fp32."""
        d = self.config.attention_head_dim
        home = positions.device if positions.device.type == "cuda" else "cpu"  # Apple's GPUs have no fp64
        exponents = torch.arange(0, d, 2, dtype=torch.float64, device=home) / d  # a last digit here grows with the position
        frequencies = (self.config.rope_base**-exponents).to(positions.device, torch.float32)
        angles = (positions[:, None, :, None].float() * frequencies).repeat(1, 1, 1, 2)
        return angles.cos(), angles.sin()

    def keep(self, state: ModelState, n: int) -> None:
        """Undo all but the first n tokens of the last recorded call, by replaying its convolution and scan inputs."""
        records = state.records
        if records is None or not 0 <= n <= records[0].xBC.shape[1]:
            raise ValueError(f"cannot keep {n} tokens: {'nothing was recorded' if records is None else 'more than were recorded'}")
        with _ops.launching_on(records[0].xBC.device):
            for layer, record in zip(self.layers, records, strict=True):
                assert isinstance(layer, DecoderLayer)
                _, conv, S = layer.mamba.recur(*record.first(n), self.ops) if n else (None, record.conv, record.ssm)
                state.conv[layer.layer.index], state.ssm[layer.layer.index] = conv, S
        state.position -= records[0].xBC.shape[1] - n
        for kv in state.kv:
            kv.truncate(state.position)
        state.records = None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding over the whole head dimension, first half against second. x: (b, heads, T, head_dim)."""
    first, second = wide(x).chunk(2, dim=-1)
    return (wide(x) * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def left_padding(attention_mask: Tensor) -> Tensor | None:
    """Zeros at the left end of each row of a (b, T) mask, or None if there are none. Raises ValueError for holes."""
    real = attention_mask.bool()
    ones = real.long().cumsum(1)
    padding = (ones == 0).sum(1)
    if bool((padding == real.shape[1]).any()):
        raise ValueError("attention_mask has a row without any token")
    if bool((real[:, 1:] & ~real[:, :-1] & (ones[:, 1:] > 1)).any()):
        raise ValueError("attention_mask has zeros between ones; only padding at the ends is possible")
    return padding if bool(padding.any()) else None
