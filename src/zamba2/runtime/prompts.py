"""The beginning of a text on a GPU: up to 4,096 tokens read as one CUDA graph, for launching hundreds of kernels takes longer than they do.

A graph has one length, so texts are padded to the next of a few: on the right, where no token sees padding and attention needs no mask.
Between the products few kernels are left. A mixer's gated norm is the scan's last step, but for the division by the root mean
square, which stands behind out_proj as well: the kernel that adds to the residual stream makes it, and the next layer's norm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from zamba2.errors import notice
from zamba2.model.model import GATED_EPS, DecoderLayer, Mamba2, SharedBlock, Zamba2, adapter_of, matmul
from zamba2.model.ops.triton_conv import causal_conv
from zamba2.model.ops.triton_linear import dequantize
from zamba2.model.ops.triton_norms import rms_norm
from zamba2.model.ops.triton_prompt import add_norm, geglu_adapted, place_heads
from zamba2.model.ops.triton_scan import gated_scan, ssd_scan
from zamba2.model.packed import Packed
from zamba2.model.state import KVCache, ModelState
from zamba2.runtime.graphs import captured

__all__ = ["Prompts"]

LENGTHS = (64, 128, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096)  # a graph for each that is used
MOST_GRAPHS = 6  # that are kept, each with its outputs: at 4,096 tokens of the 2.7B close to 1 GB
Outputs = tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]  # hidden states, last scores; conv, ssm, keys and values by layer
T = TypeVar("T")
Hoisted = dict[int, tuple[Tensor, Tensor]]  # block -> w2 x0, (T, H), and its product with the right half of [q; k; v]


@dataclass
class Stream:
    """The residual stream, (T, H), and what a mixer has yet to add to it: (T, H), to be divided by a root mean square if there are sums
    of ``squares``, (T, heads) over ``size`` elements (``gated_scan``)."""

    sum: Tensor
    size: int
    added: Tensor | None = None
    squares: Tensor | None = None

    def norm(self, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm of the whole sum, (T, H)."""
        return self._norm(weight, eps, None)[0]

    def norm_beside(self, x0: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """``ops.concat_rms_norm`` of the whole sum and x0."""
        left, scale = self._norm(weight, eps, x0)
        assert scale is not None
        return left, scale

    def _norm(self, weight: Tensor, eps: float, beside: Tensor | None) -> tuple[Tensor, Tensor | None]:
        self.sum, normed, scale = add_norm(
            self.sum, self.added, weight, eps, squares=self.squares, size=self.size, size_eps=GATED_EPS, beside=beside
        )
        self.added = self.squares = None
        return normed, scale


class Prompts:
    """Reads texts into new states. On a CPU (tests, with Triton's interpreter) the same kernels run without a graph."""

    longest = LENGTHS[-1]  # tokens

    def __init__(self, model: Zamba2) -> None:
        self.model, self.config = model, model.config
        self.device = model.final_layernorm.weight.device
        self.ids = torch.zeros(self.longest, dtype=torch.int64, device=self.device)
        self.count = torch.ones(1, dtype=torch.int64, device=self.device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Outputs]] = {}
        self.eager = self.device.type != "cuda"

    def read(self, tokens: npt.NDArray[np.int32], wanted: int, checked: Callable[[Tensor], T]) -> tuple[ModelState, T]:
        """The state behind a text of 1 to ``longest`` tokens, and what ``checked`` makes of the scores at its last ``wanted`` places,
        (wanted, V): so they are known before the state is copied."""
        count = len(tokens)
        length = next(length for length in LENGTHS if length >= count)
        self.ids[:length] = torch.from_numpy(np.pad(np.asarray(tokens, np.int64), (0, length - count)))
        self.count.fill_(count)
        x, last, conv, ssm, kv = self._outputs(length)
        scores = checked(self.model.logits(x[count - wanted : count]) if wanted > 1 else last[1 - wanted :].clone())
        state = ModelState.empty(self.config)  # of copies: the graph writes to the same places next time
        state.position = count
        state.conv, state.ssm = list(torch.cat(conv).split(1)), list(torch.cat(ssm).split(1))
        for position, tensor in enumerate(kv):
            cache = KVCache()
            cache.append(*tensor[:, None, :, :count])
            state.kv[position] = cache
        return state, scores

    def _outputs(self, length: int) -> Outputs:
        if not (length in self.graphs or self._capture(length)):
            return self._compute(length)
        self.graphs[length] = graph, outputs = self.graphs.pop(length)
        graph.replay()
        return outputs

    def _capture(self, length: int) -> bool:
        """Make the graph of a length, and say whether it is there. What a failed one computed lives until its exception is handled, which
        it is when this returns."""
        if self.eager:
            return False
        if len(self.graphs) == MOST_GRAPHS:
            del self.graphs[next(iter(self.graphs))]  # the one that was used longest ago
        memory = next((graph.pool() for graph, _ in self.graphs.values()), None)  # of all, as one runs at a time; of none, new
        try:
            self.graphs[length] = captured(partial(self._compute, length), self.device, memory=memory)
        except torch.OutOfMemoryError:
            self.graphs.clear()
        except RuntimeError as error:  # what a driver or a version of PyTorch cannot capture, it can still compute
            notice(f"prompts are read without CUDA graphs, which is slower ({str(error).splitlines()[0]}).")
            torch.cuda.synchronize(self.device)
            self.eager = True
            self.graphs.clear()
        return length in self.graphs

    def _compute(self, length: int) -> Outputs:
        """The forward pass of the first ``length`` ids. T tokens, all in rows: (T, ...)."""
        model = self.model
        x0: Tensor = model.embed_tokens(self.ids[:length])
        stream, hoisted = Stream(x0, self.config.d_inner), Hoisted()
        rope = model.rotary_angles(torch.arange(length, device=self.device)[None]) if self.config.use_mem_rope else None
        angles = None if rope is None else (rope[0][0, 0], rope[1][0, 0])
        conv, ssm, kv = [], [], []
        for layer in model.layers:
            assert isinstance(layer, DecoderLayer)
            t = None
            if layer.linear is not None:
                t, cache = self._block(stream, x0, layer, hoisted, angles)
                t = layer.linear(t)
                kv.append(cache)
            norm = layer.input_layernorm.weight
            u = stream.norm(norm, layer.eps) if t is None else add_norm(stream.sum, t, norm, layer.eps, keep=False)[1]
            tail, state = self._mixer(u, stream, layer)
            conv.append(tail)
            ssm.append(state)
        x = stream.norm(model.final_layernorm.weight, self.config.rms_norm_eps)
        return x, model.logits(x[self.count - 1]), conv, ssm, kv

    def _block(
        self, stream: Stream, x0: Tensor, layer: DecoderLayer, hoisted: Hoisted, angles: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """A shared block's output, (T, H), and its keys and values, (2, kv heads, T, d)."""
        model, config, at = self.model, self.config, layer.layer
        assert at.block is not None and at.position is not None
        block = model.shared_blocks[at.block]
        assert isinstance(block, SharedBlock)
        attention, mlp, weight = block.self_attn, block.feed_forward, block.input_layernorm.weight
        assert attention.split is not None
        left, scale = stream.norm_beside(x0, weight, block.eps)
        if at.block not in hoisted:
            right = (weight[config.hidden_size :].float() * x0.float()).to(x0.dtype)
            hoisted[at.block] = right, matmul(right, attention.split[1])
        right, hoist = hoisted[at.block]
        adapted = None
        if attention.adapters:
            u = torch.cat([left, (right.float() * scale).to(left.dtype)], dim=-1)
            lists = (attention.linear_q_adapter_list, attention.linear_k_adapter_list, attention.linear_v_adapter_list)
            adapted = torch.cat([own[str(at.position)](u) for own in lists], dim=-1)
        q, kv = place_heads(
            matmul(left, attention.split[0]), hoist, scale, heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads, adapted=adapted, rope=angles,
        )  # fmt: skip
        y = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], kv[0][None], kv[1][None], is_causal=True, scale=config.attention_scale,
            enable_gqa=config.num_key_value_heads != config.num_attention_heads,
        )  # fmt: skip
        o = attention.o_proj(y[0].transpose(0, 1).flatten(1))
        _, m, _ = add_norm(o, None, block.pre_ff_layernorm.weight, block.eps)
        down, up = adapter_of(mlp.gate_up_proj_adapter_list, at.position)
        up = dequantize(up, m.dtype) if isinstance(up, Packed) else up
        return mlp.down_proj(geglu_adapted(mlp.gate_up_proj(m), matmul(m, down), up)), kv

    def _mixer(self, u: Tensor, stream: Stream, layer: DecoderLayer) -> tuple[Tensor, Tensor]:
        """Reads u, (T, H), and leaves its output to be added to the stream. Returns the states."""
        config, mixer = self.config, layer.mamba
        assert isinstance(mixer, Mamba2)
        z, xBC, dt = mixer.in_proj(u).split([config.d_inner, config.conv_dim, config.n_mamba_heads], dim=-1)
        xBC, conv = causal_conv(xBC[None], mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, lengths=self.count)
        x, B, C = xBC.split([config.d_inner, *[config.mamba_ngroups * config.mamba_d_state] * 2], dim=-1)
        x, z = (m.unflatten(-1, (config.n_mamba_heads, -1)) for m in (x, z[None]))
        B, C = (m.unflatten(-1, (config.mamba_ngroups, -1)) for m in (B, C))
        if config.mamba_ngroups == 1 and u.dtype != torch.float16:  # products of what is not divided yet may exceed fp16
            y, squares, S = gated_scan(
                x, dt[None], mixer.A_log, B, C, mixer.D, z, mixer.norm.weight, dt_bias=mixer.dt_bias, lengths=self.count
            )
            gated, stream.squares = y.flatten(2)[0], squares[0]
        else:
            y, S = ssd_scan(
                x, dt[None], mixer.A_log, B, C, mixer.D, chunk_size=config.chunk_size, dt_bias=mixer.dt_bias, lengths=self.count
            )
            z = z.flatten(2)[0]
            gated = rms_norm(y.flatten(2)[0], mixer.norm.weight, GATED_EPS, gate=z, groups=config.mamba_ngroups)
        stream.added = mixer.out_proj(gated)
        return conv, S
