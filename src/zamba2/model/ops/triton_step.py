# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""One decoded token of many sequences in Triton: the Mamba2 step, and attention over keys and values kept in pages.

Sequences come and go while the tensors stay where they are, so that a CUDA graph can be captured once and replayed: states lie
in pools, by slot; keys and values in pages, by a table; row m of a call belongs to slot ``slots[m]``, whose sequence has read
``positions[m]`` tokens. Nothing here waits for the device.

What a token changes of a slot does not touch what the token before it left: SSM states have two halves, the convolution's ring has a row to
spare, and a page's line is the token's own. So a token can be read again, or another in its place.

Slot 0 belongs to rows that only fill up a batch; any number of them may share it, and nothing is promised of its contents.
Its position is 0, so its table's first entry must be a page that nobody else uses.

Letters: M rows, P channels of a head, N state size, K taps of the convolution, L tokens.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from zamba2.model.ops.triton_linear import stages_for
from zamba2.model.ops.triton_scan import softplus

__all__ = ["PAGE", "attend", "choose", "mixer_step", "read_conv", "read_pages", "write_conv", "write_pages"]

PAGE = 64  # tokens
PROGRAMS = 256  # that a step of few rows is divided into: two for each multiprocessor of an H100
ATTENTION_PROGRAMS, MOST_SPLITS = 512, 8  # the same for attention, whose splits cost a second kernel
LARGEST_STATE = 8192  # elements that one program keeps in registers
LOWEST = tl.constexpr(-1e30)  # stands for the maximum of nothing; unlike -inf it can be subtracted from itself


@triton.jit
def _silu(x):
    e = tl.exp(-tl.abs(x))  # never overflows
    return x * tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _load_all(base, stride, columns, inside, COUNT: tl.constexpr):
    """A tuple of COUNT tensors, ``stride`` elements apart."""
    tensors = ()
    for i in tl.static_range(COUNT):
        tensors += (tl.load(base + i * stride + columns, mask=inside, other=0.0),)  # type: ignore[assignment]
    return tensors


@triton.jit
def _convolve(ring, new, weights, bias, newest, TAPS: tl.constexpr):
    """SiLU of bias + sum over k of weights[k] * the k-th input, where row ``newest`` of the ring is where the new one will be."""
    total = bias + weights[TAPS - 1] * new.to(tl.float32)
    for k in tl.static_range(TAPS - 1):
        held = ring[0]
        for r in tl.static_range(1, TAPS):
            held = tl.where(newest == (r + TAPS - 1 - k) % TAPS, ring[r], held)
        total += weights[k] * held.to(tl.float32)
    return _silu(total)


@triton.jit
def _mixer_step(
    projected, conv_weight, conv_bias, dt_bias, A_log, D, conv, ssm, slots, positions, gated, projected_stride, conv_stride, ssm_stride,
    HEADS: tl.constexpr, P: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Channels tile * BLOCK_P and following of one head of one row."""
    row, head, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    INNER: tl.constexpr = HEADS * P
    CHANNELS: tl.constexpr = INNER + 2 * GROUPS * N
    group = head // (HEADS // GROUPS)
    p, n, pair = tile * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, 2)[None, :]
    of_p, in_p, in_n = head * P + p, p < P, n < N
    # Tiles two wide, of B and C and of x and nothing, are large enough for the compiler to divide them among the threads;
    # the convolution of a small vector it would repeat in each warp.
    of_x, in_x = of_p[:, None] + 0 * pair, in_p[:, None] & (pair == 0)
    of_BC, in_BC = INNER + (group * N + n)[:, None] + pair * (GROUPS * N), in_n[:, None] & (pair < 2)

    slot, position = tl.load(slots + row).to(tl.int64), tl.load(positions + row)
    projected += row.to(tl.int64) * projected_stride
    if not EARLY:
        new_x = tl.load(projected + INNER + of_x, mask=in_x, other=0.0)
        new_BC = tl.load(projected + INNER + of_BC, mask=in_BC, other=0.0)
        z = tl.load(projected + of_p, mask=in_p, other=0.0)
        dt = tl.load(projected + INNER + CHANNELS + head)
    A, skip, bias = tl.load(A_log + head), tl.load(D + head), tl.load(dt_bias + head)
    weights_x = _load_all(conv_weight, 1, of_x * TAPS, in_x, TAPS)
    weights_BC = _load_all(conv_weight, 1, of_BC * TAPS, in_BC, TAPS)
    bias_x = tl.load(conv_bias + of_x, mask=in_x, other=0.0)
    bias_BC = tl.load(conv_bias + of_BC, mask=in_BC, other=0.0)
    state = ssm + slot * ssm_stride + of_p[:, None] * N + n[None, :]
    in_state = in_p[:, None] & in_n[None, :]
    S = tl.load(state + position % 2 * (INNER * N), mask=in_state, other=0.0)
    tl.debug_barrier()  # else the compiler moves these loads, by far the most, behind what waits for others
    newest = position % TAPS
    conv += slot * conv_stride
    ring_x = _load_all(conv, CHANNELS, of_x, in_x, TAPS)
    ring_BC = _load_all(conv, CHANNELS, of_BC, in_BC, TAPS)
    if EARLY:  # all but the projection was written a token ago
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
        new_x = tl.load(projected + INNER + of_x, mask=in_x, other=0.0)
        new_BC = tl.load(projected + INNER + of_BC, mask=in_BC, other=0.0)
        z = tl.load(projected + of_p, mask=in_p, other=0.0)
        dt = tl.load(projected + INNER + CHANNELS + head)

    new_x, new_BC = new_x.to(conv.dtype.element_ty), new_BC.to(conv.dtype.element_ty)
    dt = softplus(dt + bias)
    x, _ = tl.split(_convolve(ring_x, new_x, weights_x, bias_x, newest, TAPS))
    B, C = tl.split(_convolve(ring_BC, new_BC, weights_BC, bias_BC, newest, TAPS))
    S = tl.exp(-tl.exp(A) * dt) * S + (dt * x)[:, None] * B[None, :]
    tl.store(state + (1 - position % 2) * (INNER * N), S, mask=in_state)
    y = tl.sum(S * C[None, :], axis=1) + skip * x
    tl.store(gated + row.to(tl.int64) * INNER + of_p, y * _silu(z), mask=in_p)

    # Other programs may be loading this row of the ring right now, but none uses what it finds there.
    conv += newest * CHANNELS
    tl.store(conv + of_x, new_x, mask=in_x)
    if (head % (HEADS // GROUPS) == 0) & (tile == 0):
        tl.store(conv + of_BC, new_BC, mask=in_BC)


def mixer_step(
    projected: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, conv: Tensor, ssm: Tensor,
    slots: Tensor, positions: Tensor, *, heads: int, head_dim: int, groups: int, state_size: int, early: bool = False,
) -> Tensor:  # fmt: skip
    """One token of M sequences through all that lies between a Mamba2 mixer's projections, but the norm's scale.

        [x B C] = SiLU(conv [x B C]);  dt = softplus(dt + dt_bias);  S = exp(-exp(A_log) dt) S + dt x B^T;  (S C + D x) SiLU(z)

    projected: (M, heads P | heads P + 2 groups N | heads) fp32, [z | x B C | dt], rows may be apart; conv_weight:
    (heads P + 2 groups N, K); conv_bias: (heads P + 2 groups N,); dt_bias, A_log, D: (heads,), all fp32; slots, positions: (M,) int32.
    In place, for the slots named: ssm (slots, 2, heads, P, N) fp32, whose half t % 2 holds S of a sequence that has read t tokens, and
    conv (slots, K, heads P + 2 groups N) bf16 or fp32, a ring in which row t % K holds the rounded input of token t. It has one row
    more than the convolution looks back, for all programs read the inputs of B and C, and the one that writes must not take from the
    others what they read.
    early: the kernel may begin while the one before it in the stream ends (see ``triton_linear.linear``), and reads all but
    ``projected`` before that has ended. Returns (M, heads P) fp32. Raises ValueError if slots are not contiguous or have not
    K rows and two states.
    """
    taps = conv_weight.shape[1]
    if conv.shape[1] != taps or ssm.shape[1] != 2:
        raise ValueError(f"a slot has {taps} rows of the convolution's inputs and 2 states, not {conv.shape[1]} and {ssm.shape[1]}")
    if not (conv[0].is_contiguous() and ssm[0].is_contiguous() and conv_weight.is_contiguous() and projected.stride(1) == 1):
        raise ValueError("the slots of both states, the convolution's weight and the rows of projected must be contiguous")
    rows = projected.shape[0]
    gated = torch.empty(rows, heads * head_dim, dtype=torch.float32, device=projected.device)
    block_n = triton.next_power_of_2(state_size)
    block = min(triton.next_power_of_2(head_dim), max(1, LARGEST_STATE // block_n))
    while block > 16 and rows * heads * triton.cdiv(head_dim, block) < PROGRAMS:
        block //= 2
    _mixer_step[rows, heads, triton.cdiv(head_dim, block)](
        projected, conv_weight, conv_bias, dt_bias, A_log, D, conv, ssm, slots, positions, gated,
        projected.stride(0), conv.stride(0), ssm.stride(0), heads, head_dim, groups, state_size, taps,
        BLOCK_P=block, BLOCK_N=block_n, EARLY=early, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return gated


def write_conv(conv: Tensor, slot: int, position: int, inputs: Tensor) -> None:
    """Put the last K-1 inputs of a sequence of ``position`` tokens, oldest first, into its slot of rings.

    conv: (..., slots, K, channels), as of several layers; inputs: (..., K-1, channels).
    """
    conv[..., slot, :, :].index_copy_(-2, _ring(position, conv), inputs.to(conv.dtype))


def read_conv(conv: Tensor, slot: int, position: int) -> Tensor:
    """The inverse of ``write_conv``: (..., K-1, channels), oldest first, a copy."""
    return conv[..., slot, :, :].index_select(-2, _ring(position, conv))


def _ring(position: int, conv: Tensor) -> Tensor:
    """The rows that the K-1 tokens before ``position`` have in a ring, oldest first."""
    return torch.arange(position - conv.shape[-2] + 1, position, device=conv.device) % conv.shape[-2]


@triton.jit
def _rotate(qkv, positions, frequencies, rotated, qkv_stride, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """One query or key rotated by position * frequencies, first half against second half."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    HALF: tl.constexpr = HEAD_DIM // 2
    i = tl.arange(0, BLOCK)
    inside = i < HALF
    vector = qkv + row * qkv_stride + head * HEAD_DIM
    first = tl.load(vector + i, mask=inside, other=0.0)
    second = tl.load(vector + HALF + i, mask=inside, other=0.0)
    frequency = tl.load(frequencies + i, mask=inside, other=0.0)
    angle = tl.load(positions + row).to(tl.float32) * frequency
    cos, sin = tl.cos(angle), tl.sin(angle)
    rotated += (row * tl.num_programs(1) + head) * HEAD_DIM
    tl.store(rotated + i, first * cos - second * sin, mask=inside)
    tl.store(rotated + HALF + i, second * cos + first * sin, mask=inside)


@triton.jit
def _attend(
    q, k, v, pages, table, positions, slots, out, weighted, sums, q_stride, v_stride, table_stride, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One head of one row over every SPLITS-th block of BLOCK_T old tokens; split 0 also over the new token.

    A head's columns are taken in chunks of WIDTH: a line of a chunk belongs to few threads, whose sum is soon made. Each of the
    BLOCK_T lines of a block keeps a softmax of its own (maximum, sum, weighted values); they meet at the end. A split without
    any tokens ends with a maximum so low that it counts for nothing.
    """
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_head = head // (HEADS // KV_HEADS)
    CHUNKS: tl.constexpr = HEAD_DIM // WIDTH
    HALF_PAGE: tl.constexpr = KV_HEADS * PAGE * HEAD_DIM  # the keys or the values
    lines, columns = tl.arange(0, BLOCK_T), tl.arange(0, WIDTH)
    slot, position = tl.load(slots + row).to(tl.int64), tl.load(positions + row)
    table += slot * table_stride

    q += row.to(tl.int64) * q_stride + head * HEAD_DIM
    k += row.to(tl.int64) * q_stride + kv_head * HEAD_DIM
    v += row.to(tl.int64) * v_stride + kv_head * HEAD_DIM
    queries, weighted_values = (), ()
    for c in tl.static_range(CHUNKS):
        queries += (tl.load(q + c * WIDTH + columns) * scale,)  # type: ignore[assignment]
        weighted_values += (tl.zeros((BLOCK_T, WIDTH), tl.float32),)  # type: ignore[assignment]
    maximum = tl.full((BLOCK_T,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    # In stages: two blocks, if there is room, are on their way to shared memory while one is used. Registers would be loaded one by one.
    for block in tl.range(split, tl.cdiv(position, BLOCK_T), SPLITS, num_stages=STAGES):
        page = tl.load(table + block * BLOCK_T // PAGE).to(tl.int64)
        at = pages + page * (2 * HALF_PAGE) + (kv_head * PAGE + block * BLOCK_T % PAGE) * HEAD_DIM
        at += lines[:, None] * HEAD_DIM + columns[None, :]
        old = block * BLOCK_T + lines < position
        products = tl.zeros((BLOCK_T, WIDTH), tl.float32)
        for c in tl.static_range(CHUNKS):
            products += queries[c][None, :] * tl.load(at + c * WIDTH, mask=old[:, None], other=0.0).to(tl.float32)
        scores = tl.where(old, tl.sum(products, axis=1), float("-inf"))
        higher = tl.maximum(maximum, scores)
        kept, added = tl.exp2(maximum - higher), tl.exp2(scores - higher)
        maximum, total = higher, total * kept + added
        sums_of_chunks = ()
        for c in tl.static_range(CHUNKS):
            old_v = tl.load(at + HALF_PAGE + c * WIDTH, mask=old[:, None], other=0.0).to(tl.float32)
            sums_of_chunks += (weighted_values[c] * kept[:, None] + added[:, None] * old_v,)  # type: ignore[assignment]
        weighted_values = sums_of_chunks

    place = pages + tl.load(table + position // PAGE).to(tl.int64) * (2 * HALF_PAGE) + (kv_head * PAGE + position % PAGE) * HEAD_DIM
    place += columns
    writes = (split == 0) & (head % (HEADS // KV_HEADS) == 0)
    products = tl.zeros((WIDTH,), tl.float32)
    new_values = ()
    for c in tl.static_range(CHUNKS):
        new_k = tl.load(k + c * WIDTH + columns).to(pages.dtype.element_ty)
        new_v = tl.load(v + c * WIDTH + columns).to(pages.dtype.element_ty)
        tl.store(place + c * WIDTH, new_k, mask=writes)
        tl.store(place + HALF_PAGE + c * WIDTH, new_v, mask=writes)
        products += queries[c] * new_k.to(tl.float32)
        new_values += (new_v.to(tl.float32),)  # type: ignore[assignment]
    score = tl.where(split == 0, tl.sum(products, axis=0), LOWEST)
    highest = tl.maximum(tl.max(maximum, axis=0), score)
    added, share = tl.exp2(score - highest), tl.exp2(maximum - highest)
    total = tl.sum(total * share, axis=0) + added
    part = (row.to(tl.int64) * HEADS + head) * SPLITS + split
    for c in tl.static_range(CHUNKS):
        result = tl.sum(weighted_values[c] * share[:, None], axis=0) + added * new_values[c]
        if SPLITS == 1:
            tl.store(out + part * HEAD_DIM + c * WIDTH + columns, result / total)
        else:
            tl.store(weighted + part * HEAD_DIM + c * WIDTH + columns, result)
    if SPLITS > 1:
        tl.store(sums + part * 2, highest)
        tl.store(sums + part * 2 + 1, total)


@triton.jit
def _combine(weighted, sums, out, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """The softmax of one head of one row from its splits."""
    one = tl.program_id(0).to(tl.int64)
    splits, columns = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    here, inside = splits < SPLITS, columns < HEAD_DIM
    part = one * SPLITS + splits
    maximum = tl.load(sums + part * 2, mask=here, other=LOWEST)
    total = tl.load(sums + part * 2 + 1, mask=here, other=0.0)
    values = tl.load(weighted + part[:, None] * HEAD_DIM + columns[None, :], mask=here[:, None] & inside[None, :], other=0.0)
    share = tl.exp2(maximum - tl.max(maximum, axis=0))
    result = tl.sum(values * share[:, None], axis=0) / tl.sum(total * share, axis=0)
    tl.store(out + one * HEAD_DIM + columns, result, mask=inside)


def attend(
    qkv: Tensor, pages: Tensor, table: Tensor, positions: Tensor, slots: Tensor, *, heads: int, kv_heads: int, head_dim: int,
    scale: float, layer: int, rope: Tensor | None = None, splits: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of one new token of M sequences over all before it and itself; its key and value join the pages, in place.

    qkv: (M, (heads + 2 kv_heads) head_dim) fp32, [q | k | v], rows may be apart; pages: (layers, pages, 2, kv_heads, PAGE, head_dim)
    bf16 or fp32, contiguous, keys before values; table: (slots, most pages of a slot) int32, a slot's pages in the order of
    its tokens; positions: (M,) int32, the tokens a sequence has in its pages, that is, where the new one goes; slots: (M,) int32;
    rope: (head_dim / 2,) fp32, angles per position. The softmax of scale q k is fp32; query head h reads head h // (heads / kv_heads).
    splits: programs among which each head's tokens are divided; chosen by M if None (never by the positions: a graph is captured
    once). Returns (M, heads head_dim) fp32. Raises ValueError if tensors are not contiguous where they must be.
    """
    if not (pages.is_contiguous() and qkv.stride(1) == 1 and table.stride(1) == 1):
        raise ValueError("the pages and the rows of qkv and of the table must be contiguous")
    rows, device = qkv.shape[0], qkv.device
    if splits is None:
        splits = min(MOST_SPLITS, max(1, ATTENTION_PROGRAMS // (rows * heads)))
    out = torch.empty(rows, heads * head_dim, dtype=torch.float32, device=device)
    weighted = torch.empty(rows, heads, splits, head_dim, dtype=torch.float32, device=device) if splits > 1 else out
    sums = torch.empty(rows, heads, splits, 2, dtype=torch.float32, device=device) if splits > 1 else out
    qk, v = qkv, qkv[:, (heads + kv_heads) * head_dim :]
    if rope is not None:
        qk = torch.empty(rows, (heads + kv_heads) * head_dim, dtype=torch.float32, device=device)
        block = triton.next_power_of_2(head_dim // 2)
        _rotate[rows, heads + kv_heads](qkv, positions, rope, qk, qkv.stride(0), head_dim, BLOCK=block, num_warps=1)
    _attend[rows, heads, splits](
        qk, qk[:, heads * head_dim :], v, pages[layer], table, positions, slots, out, weighted, sums,
        qk.stride(0), v.stride(0), table.stride(0), scale * math.log2(math.e),
        heads, kv_heads, head_dim, PAGE, splits, BLOCK_T=32, WIDTH=min(32, head_dim & -head_dim),
        STAGES=stages_for(3, 32 * 2 * head_dim * pages.element_size(), device),
    )  # fmt: skip
    if splits > 1:
        _combine[(rows * heads,)](
            weighted, sums, out, head_dim, splits, BLOCK_S=triton.next_power_of_2(splits), BLOCK_D=triton.next_power_of_2(head_dim)
        )
    return out


def write_pages(pages: Tensor, layer: int, page_numbers: Tensor, kv: Tensor) -> None:
    """Put a sequence's keys and values of one layer, (2, kv_heads, L, head_dim), into its pages; the last one's rest becomes zeros.

    pages: as in ``attend``; page_numbers: int64, at least as many as L tokens take.
    """
    count = -(-kv.shape[2] // PAGE)
    padded = F.pad(kv, (0, 0, 0, count * PAGE - kv.shape[2])).to(pages.dtype)
    pages[layer].index_copy_(0, page_numbers[:count], padded.unflatten(2, (count, PAGE)).movedim(2, 0))


def read_pages(pages: Tensor, layer: int, page_numbers: Tensor, length: int) -> Tensor:
    """The inverse of ``write_pages``: the first ``length`` tokens, (2, kv_heads, length, head_dim), a copy."""
    found = pages[layer].index_select(0, page_numbers[: -(-length // PAGE)])
    return found.movedim(0, 2).flatten(2, 3)[:, :, :length]


@triton.jit
def _choose(
    logits, found, tokens, slots, positions, logits_stride, V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest score of a row, of equals the first."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * logits_stride
    columns = tl.arange(0, BLOCK)
    highest, place, sick = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    for start in range(0, V, BLOCK):
        scores = tl.load(logits + start + columns, mask=start + columns < V, other=float("-inf"))
        higher = scores > highest
        highest, place = tl.where(higher, scores, highest), tl.where(higher, start + columns, place)
        sick |= (scores != scores).to(tl.int32)
    best = tl.max(highest, axis=0)
    token = tl.min(tl.where(highest == best, place, V - 1), axis=0)
    best = tl.where(tl.max(sick, axis=0) > 0, float("nan"), best)
    tl.store(found + 2 * row, token.to(tl.float32))
    tl.store(found + 2 * row + 1, best)
    tl.store(tokens + row, token)
    tl.store(positions + row, tl.load(positions + row) + (tl.load(slots + row) > 0).to(tl.int32))


def choose(logits: Tensor, tokens: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
    """The likeliest token of M rows, ready to be read next.

    logits: (M, V) fp32, rows may be apart, V below 2^24; slots: (M,) int32. In place: tokens (M,) int32 become the numbers of the largest
    scores, of equals the lowest; positions (M,) int32 one more, but for rows of slot 0. Returns (M, 2) fp32: that number, which is exact,
    and that score, which is NaN if one of the row is.
    """
    rows, vocabulary = logits.shape
    found = torch.empty(rows, 2, dtype=torch.float32, device=logits.device)
    block = min(4096, triton.next_power_of_2(vocabulary))
    _choose[(rows,)](logits, found, tokens, slots, positions, logits.stride(0), vocabulary, BLOCK=block, num_warps=8)
    return found
