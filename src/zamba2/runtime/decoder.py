"""One token of up to 64 sequences on a GPU: the whole forward pass as one CUDA graph of a few hundred kernels.

A sequence that decodes owns a slot: its convolution and SSM states lie in tensors that never move, its keys and values in pages
of 64 tokens that a table names, so that a graph captured once serves any sequences. Everything else (prompts, copies, saved
states) goes through ``ModelState``; ``admit`` and ``export`` carry a sequence from one to the other.

The host's part of a call would leave the device idle. Where the last calls all read what was likeliest, as greedy text does, the next
one is begun before it is asked for, with the likeliest tokens: a state that a token leaves is not touched by the next one, so that
the guess costs nothing but the device's time if it was wrong.

Between the products all is fp32, the residual stream included. A norm in front of a product costs no pass of its own: the
product's kernel sums the squares while it multiplies, and divides its results.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from zamba2.config import Layer
from zamba2.errors import Zamba2Error
from zamba2.model.model import GATED_EPS, DecoderLayer, Mamba2, SharedBlock, Zamba2, adapter_of
from zamba2.model.ops import launching_on
from zamba2.model.ops.triton_linear import embedding, linear
from zamba2.model.ops.triton_step import PAGE, attend, choose, mixer_step, read_conv, read_pages, write_conv, write_pages
from zamba2.model.packed import Packed
from zamba2.model.state import KVCache, ModelState
from zamba2.runtime.graphs import captured

__all__ = ["MOST_ROWS", "Decoder", "Slot", "Step"]

MOST_ROWS = 64  # sequences of a call
BUCKETS = (1, 2, 4, 8, 16, 32, MOST_ROWS)  # a graph for each; a call takes the smallest that holds it
PATIENCE = 4  # calls in a row that read what was likeliest, before the next is begun unasked
FIRST_SLOTS, FIRST_PAGES, FIRST_WIDTH = 5, 65, 64  # of the pools, which double when they are full; number 0 is scratch

Rows = tuple[Tensor, Tensor]  # slots and positions of the rows, (count,) int32 each


@dataclass
class Stream:
    """The residual stream of some rows, fp32: (M, H), and what has yet to be added to it, (M, H) or parts of that (parts, M, H)."""

    sum: Tensor
    parts: Tensor | None = None


class Slot:
    """A sequence's place in the pools, given back when nobody holds it any longer."""

    def __init__(self, decoder: Decoder, number: int, position: int) -> None:
        self.decoder, self.number, self.position = decoder, number, position
        self.pages: list[int] = []

    def __del__(self) -> None:
        self.decoder.free_slots.append(self.number)
        self.decoder.free_pages.extend(self.pages)


class Step:
    """What a call computed for its rows."""

    def __init__(self, slots: Sequence[Slot], scores: Tensor, found: Tensor, done: torch.cuda.Event | None) -> None:
        self._slots, self._scores, self._found, self._done = [weakref.ref(slot) for slot in slots], scores, found, done
        self._best: tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]] | None = None

    def best(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Number and value of each row's largest score, (rows,) each."""
        if self._best is None:
            if self._done is not None:
                self._done.synchronize()
            number, value = self._found.numpy().T
            self._best = (number.astype(np.int32), value)
        return self._best

    def scores(self) -> Tensor:
        """fp32 (rows, V) on the host, where all rows' come when the first is asked for."""
        if self._scores.device.type != "cpu":
            host = torch.empty(self._scores.shape, pin_memory=True)
            self._scores = host.copy_(self._scores)
        return self._scores

    def slots(self) -> list[Slot] | None:
        """Those of the rows; None if one was given up."""
        found = [slot for ref in self._slots if (slot := ref()) is not None]
        return found if len(found) == len(self._slots) else None

    def led_to(self, tokens: Sequence[int], slots: Sequence[Slot]) -> bool:
        """Whether a call right behind this one reads its likeliest tokens, row by row."""
        return self._best is not None and self.slots() == list(slots) and self._best[0].tolist() == list(tokens)


class Decoder:
    """See the module. On a CPU (tests, with Triton's interpreter) the same kernels run without a graph."""

    def __init__(self, model: Zamba2) -> None:
        self.model, self.config = model, model.config
        weight = model.embed_tokens.weight
        self.device = weight.data.device
        self.dtype = torch.bfloat16 if isinstance(weight, Packed) else weight.dtype
        config = self.config
        self.conv = self._new(config.num_hidden_layers, FIRST_SLOTS, config.mamba_d_conv, config.conv_dim, dtype=self.dtype)  # rings
        heads = (config.n_mamba_heads, config.mamba_headdim, config.mamba_d_state)
        self.ssm = self._new(config.num_hidden_layers, FIRST_SLOTS, 2, *heads, dtype=torch.float32)
        page = (2, config.num_key_value_heads, PAGE, config.attention_head_dim)
        self.pages = self._new(len(config.hybrid_layer_ids), FIRST_PAGES, *page, dtype=self.dtype)
        self.table = self._new(FIRST_SLOTS, FIRST_WIDTH, dtype=torch.int32)
        self.free_slots, self.free_pages = list(range(1, FIRST_SLOTS)), list(range(1, FIRST_PAGES))
        # what a call is given: tokens, slots and positions of its rows; it leaves those of the next. On the host in memory that a GPU reads
        # by itself
        self.given = self._new(3, MOST_ROWS, dtype=torch.int32)
        self.asked = torch.zeros(3, MOST_ROWS, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        self.rows = self.asked.numpy()  # the same memory
        events = [torch.cuda.Event() if self.device.type == "cuda" else None for _ in range(3)]
        self.taken, self.done = events[0], events[1:]  # what the host gave; two calls by turns
        self.last: Step | None = None
        self.ahead: Step | None = None  # the call behind the last, begun unasked
        self.right = 0  # calls in a row that read what was likeliest
        # Kernels may begin while those before them end, where the card can do that: then weights are on their way already.
        hopper = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (9, 0)
        self.early = hopper
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]] = {}
        d = torch.arange(0, config.attention_head_dim, 2, dtype=torch.float64) / config.attention_head_dim
        self.frequencies = (config.rope_base**-d).float().to(self.device) if config.use_mem_rope else None

    def _new(self, *shape: int, dtype: torch.dtype) -> Tensor:
        try:
            return torch.zeros(*shape, dtype=dtype, device=self.device)
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            raise Zamba2Error(f"there is not enough memory on {self.device} for more sequences or longer ones ({reason}).") from None

    # ---- sequences come and go -------------------------------------------------------------------------------------

    def admit(self, state: ModelState) -> Slot:
        """Copy a sequence's state into a slot of its own. Raises Zamba2Error where memory is short."""
        if not self.free_slots:
            self._double_slots()
        slot = Slot(self, self.free_slots.pop(), state.position)
        self._room(slot, state.position)
        if state.position:
            self.ssm[:, slot.number, slot.position % 2] = torch.cat([_known(ssm) for ssm in state.ssm])
            write_conv(self.conv, slot.number, slot.position, torch.cat([_known(conv) for conv in state.conv]))
        else:
            self.ssm[:, slot.number] = 0.0
            self.conv[:, slot.number] = 0.0
        if state.position:
            numbers = torch.tensor(slot.pages, device=self.device)
            for position, kv in enumerate(state.kv):
                write_pages(self.pages, position, numbers, _known(kv.tensor())[:, 0])
        return slot

    def export(self, slot: Slot) -> ModelState:
        """The state of a slot's sequence, as a copy."""
        state = ModelState.empty(self.config)
        state.position = slot.position
        if not slot.position:
            return state
        state.conv = list(read_conv(self.conv, slot.number, slot.position).split(1))
        state.ssm = list(self.ssm[:, slot.number, slot.position % 2].clone().split(1))
        numbers = torch.tensor(slot.pages, device=self.device)
        for position in range(len(self.config.hybrid_layer_ids)):
            cache = KVCache()
            cache.append(*read_pages(self.pages, position, numbers, slot.position)[:, None])
            state.kv[position] = cache
        return state

    def nbytes(self, slot: Slot) -> int:
        """Bytes that a slot's sequence holds."""
        recurrent = sum(pool[:, 0].numel() * pool.element_size() for pool in (self.conv, self.ssm))
        return recurrent + len(slot.pages) * self.pages[:, 0].numel() * self.pages.element_size()

    def _room(self, slot: Slot, length: int) -> None:
        """Pages for the tokens up to and with number ``length``, counted from 0."""
        first, wanted = len(slot.pages), length // PAGE + 1
        if wanted <= first:
            return
        while wanted > self.table.shape[1]:
            self._replace(table=_wider(self.table, 1))
        while wanted - first > len(self.free_pages):
            before = self.pages.shape[1]
            self._replace(pages=_wider(self.pages, 1))
            self.free_pages.extend(range(before, self.pages.shape[1]))
        slot.pages += [self.free_pages.pop() for _ in range(wanted - first)]
        self.table[slot.number, first:wanted] = torch.tensor(slot.pages[first:], dtype=torch.int32).to(self.device)

    def _double_slots(self) -> None:
        before = self.conv.shape[1]
        wider = {name: _wider(getattr(self, name), 1) for name in ("conv", "ssm")}
        self._replace(**wider, table=_wider(self.table, 0))
        self.free_slots.extend(range(before, self.conv.shape[1]))

    def _replace(self, **pools: Tensor) -> None:
        """Put larger pools in the place of others; graphs that knew those are captured again."""
        self.graphs.clear()
        for name, pool in pools.items():
            setattr(self, name, pool)

    # ---- one token ---------------------------------------------------------------------------------------------------

    def step(self, tokens: Sequence[int], slots: Sequence[Slot]) -> Step:
        """Read one token of each sequence, without waiting for the device. Raises Zamba2Error where memory is short."""
        ahead, self.ahead = self.ahead, None
        self.right = self.right + 1 if self.last is not None and self.last.led_to(tokens, slots) else 0
        if ahead is None or not self.right:
            for slot in slots:
                self._room(slot, slot.position)
            count, bucket = len(slots), bucket_of(len(slots))
            if self.taken is not None:
                self.taken.synchronize()
            self.rows[:, count:bucket] = 0  # those that fill a bucket work on the scratch slot
            self.rows[:, :count] = (tokens, [slot.number for slot in slots], [slot.position for slot in slots])
            self.given.copy_(self.asked, non_blocking=True)
            if self.taken is not None:
                self.taken.record()
            ahead = self._begin(slots)
        for slot in slots:
            slot.position += 1
        self.last = ahead
        return ahead

    def go_ahead(self, step: Step) -> None:
        """Begin the call that reads a step's likeliest tokens, if it is the last one and such calls have been asked for of late; before the
        step's own are waited for."""
        slots = step.slots()
        if step is not self.last or self.ahead is not None or self.right < PATIENCE or slots is None:
            return
        # who asks for the token hears of an error
        with launching_on(self.device), torch.inference_mode(), suppress(Zamba2Error, torch.OutOfMemoryError):
            for slot in slots:
                self._room(slot, slot.position)
            self.ahead = self._begin(slots)

    def _begin(self, slots: Sequence[Slot]) -> Step:
        """Read the tokens that are given."""
        count, bucket = len(slots), bucket_of(len(slots))
        logits, found = self._replayed(bucket) if self.device.type == "cuda" else self._token(bucket)
        best = torch.empty(count, 2, pin_memory=self.device.type == "cuda")
        best.copy_(found[:count], non_blocking=True)
        self.done.reverse()
        if self.done[0] is not None:
            self.done[0].record()
        return Step(slots, logits[:count].clone(), best, self.done[0])  # a copy: the graph writes to the same place next time

    def _replayed(self, bucket: int) -> tuple[Tensor, Tensor]:
        if bucket not in self.graphs:
            held = self.given.clone()
            self.given.zero_()  # the scratch slot
            self.graphs[bucket] = captured(partial(self._token, bucket), self.device)
            self.given.copy_(held)
        graph, outputs = self.graphs[bucket]
        graph.replay()
        return outputs

    def _token(self, count: int) -> tuple[Tensor, Tensor]:
        """The forward pass of the given tokens' first ``count``; model/model.py names every value. Returns the scores fp32 (count, V),
        and what ``choose`` says of them, which is given from then on."""
        model, config = self.model, self.config
        ids, slots, positions = self.given[:, :count]
        weight = model.embed_tokens.weight
        x0 = embedding(ids.long(), weight) if isinstance(weight, Packed) else F.embedding(ids.long(), weight).float()
        x, at, hoisted = Stream(x0), (slots, positions), dict[int, Tensor]()
        for layer in model.layers:
            assert isinstance(layer, DecoderLayer)
            t = None
            if layer.linear is not None:
                assert layer.layer.block is not None
                block = model.shared_blocks[layer.layer.block]
                assert isinstance(block, SharedBlock)
                t = self._linear(self._block(x, x0, block, layer.layer, at, hoisted), layer.linear.weight, split=True)
            self._mixer(x, t, layer, at)
        head = weight if model.lm_head is None else model.lm_head.weight
        logits = self._read(x, head, norm=model.final_layernorm.weight, eps=config.rms_norm_eps)
        return logits, choose(logits, ids, slots, positions)

    def _linear(self, x: Tensor, weight: Tensor | Packed, **around: Any) -> Tensor:
        return linear(x, weight, early=self.early, **around)

    def _read(self, x: Stream, weight: Tensor | Packed, **around: Any) -> Tensor:
        """A product of the residual stream, whose parts are added up on the way."""
        if x.parts is None:
            return self._linear(x.sum, weight, **around)
        before, x.sum = x.sum, torch.empty_like(x.sum)
        parts, x.parts = x.parts, None
        return self._linear(before, weight, plus=parts, total=x.sum, **around)

    def _block(self, x: Stream, x0: Tensor, block: SharedBlock, layer: Layer, at: Rows, hoisted: dict[int, Tensor]) -> Tensor:
        config, attention, mlp, (slots, positions) = self.config, block.self_attn, block.feed_forward, at
        assert attention.split is not None and layer.block is not None and layer.position is not None
        (left, right), weight = attention.split, block.input_layernorm.weight
        if layer.block not in hoisted:
            hoisted[layer.block] = self._linear(x0 * weight[config.hidden_size :], right)
        first = weight[: config.hidden_size]
        qkv = self._read(x, left, norm=first, eps=block.eps, beside=x0, hoisted=hoisted[layer.block])
        if attention.adapters:
            normed, scale = self.model.ops.concat_rms_norm(x.sum, x0, weight, block.eps)
            u = torch.cat([normed, x0 * weight[config.hidden_size :] * scale], dim=-1)
            lists = (attention.linear_q_adapter_list, attention.linear_k_adapter_list, attention.linear_v_adapter_list)
            adapters = [adapter_of(own, layer.position) for own in lists]
            qkv = qkv + torch.cat([self._linear(self._linear(u, down), up) for down, up in adapters], dim=-1)
        y = attend(
            qkv, self.pages, self.table, positions, slots, heads=config.num_attention_heads, kv_heads=config.num_key_value_heads,
            head_dim=config.attention_head_dim, scale=config.attention_scale, rope=self.frequencies, layer=layer.position,
        )  # fmt: skip
        o = self._linear(y, attention.o_proj.weight, split=True)
        (down, up), norm = adapter_of(mlp.gate_up_proj_adapter_list, layer.position), block.pre_ff_layernorm.weight
        low = (self._linear(o, down, norm=norm, eps=block.eps), up)
        f = self._linear(o, mlp.gate_up_proj.weight, norm=norm, eps=block.eps, low=low, geglu=True)
        return self._linear(f, mlp.down_proj.weight, split=True)

    def _mixer(self, x: Stream, t: Tensor | None, layer: DecoderLayer, at: Rows) -> None:
        config, mixer, i, (slots, positions) = self.config, layer.mamba, layer.layer.index, at
        assert isinstance(mixer, Mamba2)
        plus = {} if t is None else {"plus": t}  # behind a block, which has added up the stream's parts
        projected = self._read(x, mixer.in_proj.weight, norm=layer.input_layernorm.weight, eps=layer.eps, **plus)
        gated = mixer_step(
            projected, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, mixer.dt_bias, mixer.A_log, mixer.D, self.conv[i], self.ssm[i],
            slots, positions, heads=config.n_mamba_heads, head_dim=config.mamba_headdim, groups=config.mamba_ngroups,
            state_size=config.mamba_d_state, early=self.early,
        )  # fmt: skip
        norm: dict[str, Any] = {"norm": mixer.norm.weight, "eps": GATED_EPS}
        if config.mamba_ngroups > 1:
            gated, norm = self.model.ops.rms_norm(gated, mixer.norm.weight, GATED_EPS, groups=config.mamba_ngroups), {}
        if len(gated) > 1:
            x.parts = self._linear(gated, mixer.out_proj.weight, split=True, **norm)
        else:
            x.sum = self._linear(gated, mixer.out_proj.weight, residual=x.sum, **norm)


def bucket_of(count: int) -> int:
    """The rows of the smallest graph that holds so many."""
    return next(bucket for bucket in BUCKETS if bucket >= count)


def _known(tensor: Tensor | None) -> Tensor:
    """A tensor of a state that has read something."""
    assert tensor is not None
    return tensor


def _wider(pool: Tensor, dim: int) -> Tensor:
    """Twice the pool along a dimension; what is new is zero."""
    return torch.cat([pool, torch.zeros_like(pool)], dim=dim)
