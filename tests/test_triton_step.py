"""One decoded token in Triton (``ops.triton_step``): the laws of the step, of attention over pages and of what lies around them.

The truth is the reference in fp64. What no sequence has written is NaN everywhere, so that a result shows if it was read.
"""

from __future__ import annotations

import math

import pytest
import torch
import triton_interpreter  # noqa: F401
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from op_cases import OPS, relative_error

from zamba2.model.ops import reference
from zamba2.model.ops.triton_step import PAGE, attend, choose, mixer_step, read_conv, read_pages, write_conv, write_pages

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32 = OPS[torch.float32].output

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def fresh_inputs() -> None:
    torch.seed()


def advance(positions: Tensor, slots: Tensor) -> None:
    """Between two tokens, as the decoder does it: slot 0 stays at 0."""
    positions.index_add_(0, slots.long(), (slots != 0).to(positions.dtype))


def randn(*sizes: int) -> Tensor:
    return torch.randn(*sizes, device=DEVICE)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as a kernel rounds it."""
    return x.to(dtype)


def close(found: Tensor, expected: Tensor, tolerance: float = FP32) -> None:
    error = relative_error(found, expected)
    assert error <= tolerance, f"relative error {error:.2e}, at most {tolerance:.0e} is allowed"


def unchanged(found: Tensor, before: Tensor) -> None:
    assert torch.equal(found.nan_to_num(7e7), before.nan_to_num(7e7))


# ---- the Mamba2 step ------------------------------------------------------------------------------------------------------


class Mixer:
    """Random parameters of one mixer and its definition."""

    def __init__(self, heads: int, P: int, groups: int, N: int, taps: int) -> None:
        self.sizes = {"heads": heads, "head_dim": P, "groups": groups, "state_size": N}
        self.inner, self.channels, self.taps = heads * P, heads * P + 2 * groups * N, taps
        self.weight, self.bias = randn(self.channels, taps) / 2, randn(self.channels) / 4
        self.dt_bias, self.A_log, self.D = randn(heads) - 2, torch.rand(heads, device=DEVICE) * 2.5, randn(heads)

    def step(self, projected: Tensor, conv: Tensor, ssm: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """positions: of all slots."""
        parameters = (self.weight, self.bias, self.dt_bias, self.A_log, self.D)
        return mixer_step(projected, *parameters, conv, ssm, slots, positions[slots.long()], **self.sizes)

    def truth(self, projected: Tensor, conv: Tensor, ssm: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Many tokens of one sequence, projected: (T, rows of the in-projection), in fp64 but for the inputs' rounding."""
        heads, groups = self.sizes["heads"], self.sizes["groups"]
        weight, bias, dt_bias, A_log, D = (p.double() for p in (self.weight, self.bias, self.dt_bias, self.A_log, self.D))
        z, xBC, dt = projected[None].split([self.inner, self.channels, heads], dim=-1)
        rounded = stored(xBC, dtype).double()
        xBC, conv = reference.causal_conv(rounded, weight, bias, state=conv[None].double())
        x, B, C = xBC.split([self.inner, *[groups * self.sizes["state_size"]] * 2], dim=-1)
        y, ssm = reference.ssd_scan(
            x.unflatten(-1, (heads, -1)), F.softplus(dt.double() + dt_bias, threshold=100), -A_log.exp(),
            B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1)), D, chunk_size=1, state=ssm[None].double(),
        )  # fmt: skip
        return (y.flatten(-2) * F.silu(z.double()))[0], conv[0], ssm[0]


SHAPES = [(3, 5, 1, 6, 4), (4, 16, 2, 16, 4), (4, 3, 2, 5, 3), (1, 64, 1, 64, 4), (2, 33, 1, 128, 2), (2, 4, 1, 3, 5)]


@both_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_are_convolution_scan_and_gate(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    """Token by token, in any slots and order, from any position, a step is the reference's convolution, scan and gate; read again, or
    another in its place, so too: what the token before it left is there still."""
    mixer, (heads, P, _, N, taps), tokens = Mixer(*shape), shape, 3
    slots, starts = [3, 1, 4], [0, 5, taps]
    conv = torch.full((6, taps, mixer.channels), math.nan, dtype=dtype, device=DEVICE)
    ssm = torch.full((6, 2, heads, P, N), math.nan, device=DEVICE)
    positions = integers(0, 0, 0, 0, 0, 0)
    before = {}
    for slot, start in zip(slots, starts, strict=True):
        inputs = randn(taps - 1, mixer.channels).to(dtype)
        write_conv(conv, slot, start, inputs)
        ssm[slot, start % 2], positions[slot] = randn(heads, P, N), start
        before[slot] = inputs, ssm[slot, start % 2].clone()
    projected = {slot: randn(tokens, mixer.inner + mixer.channels + heads) for slot in slots}
    found: dict[int, list[Tensor]] = {slot: [] for slot in slots}
    for t in range(tokens):
        order = torch.randperm(3).tolist()
        chosen = [slots[i] for i in order]
        rows = torch.stack([projected[slot][t] for slot in chosen])
        mixer.step(randn(*rows.shape), conv, ssm, integers(*chosen), positions)  # others, for nothing
        out = mixer.step(rows, conv, ssm, integers(*chosen), positions)
        advance(positions, integers(*chosen))
        for slot, row in zip(chosen, out, strict=True):
            found[slot].append(row)
    for slot, start in zip(slots, starts, strict=True):
        y, inputs, S = mixer.truth(projected[slot], *before[slot], dtype)
        close(torch.stack(found[slot]), y)
        close(ssm[slot, (start + tokens) % 2], S)
        assert torch.equal(read_conv(conv, slot, start + tokens).double(), inputs)
    for slot in (0, 2, 5):
        assert conv[slot].isnan().all() and ssm[slot].isnan().all()


def test_step_reads_a_view_and_any_pool() -> None:
    """Rows of the projection and slots of the pools may be apart; what lies between is neither read nor written."""
    mixer = Mixer(2, 4, 1, 4, 4)
    width = mixer.inner + mixer.channels + 2
    wide = torch.full((3, width + 5), math.nan, device=DEVICE)
    wide[:, :width] = randn(3, width)
    conv, ssm = randn(4, 2, 4, mixer.channels), randn(4, 2, 2, 2, 4, 4)  # slots, then layers
    others = conv[:, 0].clone(), ssm[:, 0].clone()
    packed = conv[:, 1].clone(), ssm[:, 1].clone()
    slots, positions = integers(2, 3, 1), integers(0, 9, 4, 3)
    found = mixer.step(wide[:, :width], conv[:, 1], ssm[:, 1], slots, positions)
    expected = mixer.step(wide[:, :width].contiguous(), *packed, slots, positions)
    assert torch.equal(found, expected)
    assert torch.equal(conv[:, 1], packed[0]) and torch.equal(ssm[:, 1], packed[1])
    assert torch.equal(conv[:, 0], others[0]) and torch.equal(ssm[:, 0], others[1])


def test_step_of_extreme_inputs() -> None:
    """Far from zero the softplus is dt itself or its exponential, the gate z or 0; nothing overflows."""
    mixer = Mixer(2, 4, 1, 4, 4)
    conv, ssm = torch.zeros(7, 4, mixer.channels, device=DEVICE), randn(7, 2, 2, 4, 4)
    before, projected = ssm.clone(), randn(6, mixer.inner + mixer.channels + 2)
    projected[:, -2:] = torch.tensor([-80.0, -15, 0, 15, 40, 200], device=DEVICE)[:, None]
    projected[:, : mixer.inner : 2], projected[:, 1 : mixer.inner : 2] = 200, -200
    found = mixer.step(projected, conv, ssm, integers(*range(1, 7)), integers(*[0] * 7))
    for row in range(6):
        y, _, S = mixer.truth(projected[row, None], conv[0, 1:], before[row + 1, 0], torch.float32)
        close(found[row], y[0])
        close(ssm[row + 1, 1], S)
    assert torch.equal(ssm[:, 0], before[:, 0])


def test_small_steps_are_exact() -> None:
    """A small dt keeps its relative accuracy: from a state of zeros, S is dt x B^T."""
    mixer = Mixer(4, 4, 1, 4, 4)
    conv, ssm = torch.zeros(2, 4, mixer.channels, device=DEVICE), torch.zeros(2, 2, 4, 4, 4, device=DEVICE)
    mixer.dt_bias[:] = torch.tensor([-3.0, -9, -20, -60], device=DEVICE)
    projected = randn(1, mixer.inner + mixer.channels + 4)
    _, _, S = mixer.truth(projected, conv[0, 1:], ssm[0, 0], torch.float32)
    mixer.step(projected, conv, ssm, integers(1), integers(0, 0))
    for head in range(4):
        close(ssm[1, 1, head] * 2**40, S[head] * 2**40)


def test_rows_that_only_fill_up_share_slot_0() -> None:
    """Any number of rows on slot 0 leave the others' results as they are, and it stays finite."""
    mixer = Mixer(3, 5, 1, 6, 4)
    conv, ssm, projected = randn(3, 4, mixer.channels), randn(3, 2, 3, 5, 6), randn(5, mixer.inner + mixer.channels + 3)
    alone = conv.clone(), ssm.clone()
    positions = integers(0, 7, 2)
    found = mixer.step(projected, conv, ssm, integers(0, 2, 0, 1, 0), positions)
    expected = mixer.step(projected[[1, 3]], *alone, integers(2, 1), positions)
    assert torch.equal(found[[1, 3]], expected) and found.isfinite().all()
    assert torch.equal(conv[1:], alone[0][1:]) and torch.equal(ssm[1:], alone[1][1:])
    assert conv[0].isfinite().all() and ssm[0].isfinite().all()


@both_dtypes
def test_the_ring_is_its_own_inverse(dtype: torch.dtype) -> None:
    """What was written for a position is read for it, oldest first, whatever the position; other slots keep theirs."""
    for taps in (2, 3, 4, 5):
        for position in range(2 * taps):
            conv, inputs = torch.full((3, taps, 7), math.nan, dtype=dtype, device=DEVICE), randn(taps - 1, 7).to(dtype)
            write_conv(conv, 1, position, inputs)
            assert torch.equal(read_conv(conv, 1, position), inputs)
            assert conv[0].isnan().all() and conv[2].isnan().all() and conv[1].isnan().sum() == 7


# ---- attention over pages -------------------------------------------------------------------------------------------------


class Paged:
    """Sequences with random keys and values in shuffled pages; everything else is NaN but page 0, the scratch slot's."""

    def __init__(self, lengths: dict[int, int], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, layers: int = 2) -> None:
        self.sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        counts = {slot: (length + 4) // PAGE + 1 for slot, length in lengths.items()}
        numbers = (torch.randperm(sum(counts.values()) + 2) + 1).tolist()
        self.pages = torch.full((layers, len(numbers) + 1, 2, kv_heads, PAGE, head_dim), math.nan, dtype=dtype, device=DEVICE)
        self.pages[:, 0] = 0
        self.table = torch.full((max(lengths) + 2, max(counts.values()) + 1), -(10**6), dtype=torch.int32, device=DEVICE)
        self.table[0] = 0
        self.positions = integers(*[0] * (max(lengths) + 2))
        self.kv: dict[int, list[Tensor]] = {}  # of each layer (2, kv_heads, L, head_dim)
        self.numbers: dict[int, Tensor] = {}
        for slot, length in lengths.items():
            own, numbers = numbers[: counts[slot]], numbers[counts[slot] :]
            self.numbers[slot] = torch.tensor(own, device=DEVICE)
            self.table[slot, : len(own)], self.positions[slot] = self.numbers[slot].int(), length
            self.kv[slot] = [randn(2, kv_heads, length, head_dim).to(dtype) for _ in range(layers)]
            for layer, kv in enumerate(self.kv[slot]):
                write_pages(self.pages, layer, self.numbers[slot], kv)
                if length % PAGE:
                    self.pages[layer, own[length // PAGE], :, :, length % PAGE :] = math.nan

    def attend(self, qkv: Tensor, slots: Tensor, layer: int, scale: float, rope: Tensor | None = None, splits: int | None = None) -> Tensor:
        positions = self.positions[slots.long()]
        return attend(qkv, self.pages, self.table, positions, slots, scale=scale, layer=layer, rope=rope, splits=splits, **self.sizes)

    def truth(self, qkv: Tensor, slot: int, layer: int, scale: float, rope: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Of one row: the output (heads * head_dim,) and the new key and value (2, kv_heads, head_dim), rounded as in the pages."""
        heads, kv_heads, head_dim = self.sizes.values()
        q, k, v = qkv.double().unflatten(0, (-1, head_dim)).split([heads, kv_heads, kv_heads])
        if rope is not None:
            angles = (self.positions[slot].float() * rope).double()  # the product is fp32 by definition
            q, k = (self.rotate(x, angles) for x in (q, k))
        new = stored(torch.stack([k, v]), self.pages.dtype)
        keys, values = torch.cat([self.kv[slot][layer], new[:, :, None]], dim=2).double().repeat_interleave(heads // kv_heads, dim=1)
        weights = torch.einsum("hd,hld->hl", q * scale, keys).softmax(-1)
        return torch.einsum("hl,hld->hd", weights, values).flatten(), new

    @staticmethod
    def rotate(x: Tensor, angles: Tensor) -> Tensor:
        pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag], dim=-1)


ATTENTIONS = [((2, 2, 5), 3), ((4, 2, 8), 1), ((1, 1, 64), 8), ((2, 1, 160), 2)]  # (heads, kv_heads, head_dim), splits


@both_dtypes
@pytest.mark.parametrize(("sizes", "splits"), ATTENTIONS, ids=str)
def test_attention_over_pages(sizes: tuple[int, int, int], splits: int | None, dtype: torch.dtype) -> None:
    """Over shuffled pages, at and around their borders, it is plain attention with the rounded new token; NaNs do not leak."""
    lengths = {5: 0, 2: 1, 7: PAGE - 1, 1: PAGE, 3: PAGE + 1, 6: 2 * PAGE + 37}
    heads, kv_heads, head_dim = sizes
    case, slots = Paged(lengths, *sizes, dtype), [6, 2, 1, 7, 3, 5]
    before, qkv = case.pages.clone(), randn(len(slots), (heads + 2 * kv_heads) * head_dim)
    scale = (head_dim / 2) ** -0.5
    found = case.attend(qkv, integers(*slots), 1, scale, splits=splits)
    for row, slot in enumerate(slots):
        expected, new = case.truth(qkv[row], slot, 1, scale)
        close(found[row], expected)
        page, place = case.numbers[slot][lengths[slot] // PAGE], lengths[slot] % PAGE
        assert torch.equal(case.pages[1, page, :, :, place], new)
        before[1, page, :, :, place] = new
    unchanged(case.pages, before)


@both_dtypes
@pytest.mark.parametrize("splits", [1, 4], ids="splits {}".format)
def test_attention_token_by_token(splits: int, dtype: torch.dtype) -> None:
    """Over a page's border, each token sees all that were written before it, in the order of any rows, beside scratch rows."""
    case, slots = Paged({1: PAGE - 2, 3: 3}, 2, 1, 6, dtype, layers=1), [3, 0, 1, 0]
    for _ in range(3):
        qkv = randn(4, 4 * 6)
        found = case.attend(qkv, integers(*slots), 0, 0.5, splits=splits)
        assert found.isfinite().all()
        for slot in (1, 3):
            expected, new = case.truth(qkv[slots.index(slot)], slot, 0, 0.5)
            close(found[slots.index(slot)], expected)
            case.kv[slot][0] = torch.cat([case.kv[slot][0], new[:, :, None]], dim=2)
        advance(case.positions, integers(*slots))
        slots = slots[1:] + slots[:1]
    assert case.positions.tolist() == [0, PAGE + 1, 0, 6, 0]
    for slot, kv in case.kv.items():
        assert torch.equal(read_pages(case.pages, 0, case.numbers[slot], kv[0].shape[2]), kv[0])


@both_dtypes
@pytest.mark.parametrize("head_dim", [6, 128])
def test_attention_with_rotary_positions(head_dim: int, dtype: torch.dtype) -> None:
    """With frequencies, queries and keys are rotated as complex numbers, first half with second; also far from the start."""
    rope = (10000 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)).to(DEVICE, torch.float32)
    case, slots = Paged({1: 3, 2: 0, 4: 70}, 2, 2, head_dim, dtype), [4, 2, 1]
    qkv = randn(3, 6 * head_dim)
    found = case.attend(qkv, integers(*slots), 0, 0.3, rope)
    for row, slot in enumerate(slots):
        expected, new = case.truth(qkv[row], slot, 0, 0.3, rope)
        length = case.kv[slot][0].shape[2]
        key, value = case.pages[0, case.numbers[slot][length // PAGE], :, :, length % PAGE]
        close(key, new[0], FP32 if dtype == torch.float32 else 4e-3)  # an angle's last digit may round a key otherwise
        assert torch.equal(value, new[1])
        close(found[row], expected, FP32 if dtype == torch.float32 else 4e-3)


def test_rotations_far_from_the_start() -> None:
    """At position 4001 the angle is still that of the fp32 product, not of an approximation that lost it."""
    case = Paged({1: 0}, 1, 1, 4, torch.float32)
    case.positions[1] = 4001
    case.table = case.table.new_full((2, 4001 // PAGE + 1), 1)
    qkv, rope = randn(1, 12), torch.tensor([1.0, 0.37], device=DEVICE)
    case.pages.nan_to_num_(0.0)
    case.attend(qkv, integers(1), 0, 0.5, rope, splits=2)
    _, new = case.truth(qkv[0], 1, 0, 0.5, rope)
    close(case.pages[0, 1, 0, :, 4001 % PAGE], new[0])


def test_a_sharp_softmax() -> None:
    """Scores in the thousands neither overflow nor forget: the greatest takes all, in whatever split it lies."""
    case = Paged({1: 150}, 1, 1, 4, torch.float32, layers=1)
    qkv, place = randn(1, 12), int(torch.randint(150, (1,)))
    key = case.kv[1][0][0, 0, place]
    key.copy_(qkv[0, :4] * 30)
    write_pages(case.pages, 0, case.numbers[1], case.kv[1][0])
    expected, _ = case.truth(qkv[0], 1, 0, 100.0)
    close(case.attend(qkv, integers(1), 0, 100.0, splits=4)[0], expected)


def test_rows_of_qkv_may_be_apart() -> None:
    """The rows of a wider tensor give what their copy gives."""
    case, other = Paged({1: 5, 2: 9}, 2, 1, 4, torch.float32), randn(2, 40)
    found = case.attend(other[:, 8:24], integers(2, 1), 0, 0.5)
    assert torch.equal(found, case.attend(other[:, 8:24].contiguous(), integers(2, 1), 0, 0.5))


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU here")
def test_a_graph_follows_positions_and_slots() -> None:
    """Captured once, attention and the advance are replayed for other tokens, slots and lengths, over a page's border."""
    case = Paged({1: PAGE - 2, 2: 5, 3: 3 * PAGE - 1}, 2, 2, 64, torch.bfloat16, layers=1)
    qkv, slots = randn(2, 6 * 64), integers(0, 0)
    case.attend(qkv, slots, 0, 0.1)
    advance(case.positions, slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = case.attend(qkv, slots, 0, 0.1)
        advance(case.positions, slots)
    for chosen in ([1, 2], [3, 1], [1, 3], [2, 0], [0, 1]):
        qkv.copy_(randn(2, 6 * 64))
        slots.copy_(integers(*chosen))
        graph.replay()
        for row, slot in enumerate(chosen):
            if slot:
                expected, new = case.truth(qkv[row], slot, 0, 0.1)
                close(found[row], expected)
                case.kv[slot][0] = torch.cat([case.kv[slot][0], new[:, :, None]], dim=2)
    assert case.positions.tolist() == [0, PAGE + 2, 7, 3 * PAGE + 1, 0]


@pytest.mark.parametrize("vocabulary", [1, 7, 4096, 4097, 32000])
def test_the_likeliest_token(vocabulary: int) -> None:
    """The largest score's number, of equals the lowest, is given to the next token at the next position; a NaN shows; slot 0 stays."""
    wide = randn(6, vocabulary + 3)
    logits, slots, positions, tokens = wide[:, :vocabulary], integers(3, 1, 0, 2, 4, 5), integers(5, 0, 0, 9, 63, 64), integers(*[-1] * 6)
    logits[1] = -math.inf
    logits[3] = logits[3].round()
    logits[4, vocabulary // 2] = math.nan
    logits[5, vocabulary - 1] = math.inf
    wide[:, vocabulary:] = 1e9
    found = choose(logits, tokens, slots, positions)
    wanted = torch.stack([(row == row.nan_to_num(-math.inf, math.inf).max()).int().argmax() for row in logits.cpu()])
    healthy = [0, 1, 2, 3, 5]
    assert found[healthy, 0].tolist() == tokens[healthy].tolist() == wanted[healthy].tolist()
    assert torch.equal(found[healthy, 1].cpu(), logits.cpu()[healthy, wanted[healthy]])
    assert found[4, 1].isnan() and 0 <= tokens[4] < vocabulary
    assert positions.tolist() == [6, 1, 0, 10, 64, 65]


# ---- positions and pages --------------------------------------------------------------------------------------------------



@both_dtypes
@pytest.mark.parametrize("length", [0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE])
def test_pages_are_their_own_inverse(length: int, dtype: torch.dtype) -> None:
    """Keys and values come back from their pages as they went in; other pages and layers keep theirs."""
    pages = torch.full((2, 7, 2, 3, PAGE, 5), math.nan, dtype=dtype, device=DEVICE)
    kv, numbers = randn(2, 3, length, 5).to(dtype), torch.randperm(7, device=DEVICE)[: length // PAGE + 1]
    write_pages(pages, 1, numbers, kv)
    assert torch.equal(read_pages(pages, 1, numbers, length), kv)
    used = numbers[: -(-length // PAGE)]
    assert pages[0].isnan().all() and not pages[1, used].isnan().any()
    assert pages[1].isnan().all(dim=(1, 2, 3, 4)).sum() == 7 - len(used)


def test_tensors_that_are_not_as_they_must_be() -> None:
    """Layouts that a kernel would misread are refused in a sentence."""
    case, mixer = Paged({1: 5}, 1, 1, 4, torch.float32), Mixer(2, 4, 1, 4, 4)
    with pytest.raises(ValueError, match="must be contiguous"):
        case.attend(randn(12, 2).T, integers(1, 1), 0, 0.5)
    conv, ssm = randn(2, mixer.channels, 4).transpose(1, 2), randn(2, 2, 2, 4, 4)
    with pytest.raises(ValueError, match="must be contiguous"):
        mixer.step(randn(1, mixer.inner + mixer.channels + 2), conv, ssm, integers(1), integers(0, 0))
    for rows, states in ((3, 2), (4, 1)):
        conv, ssm = randn(2, rows, mixer.channels), randn(2, states, 2, 4, 4)
        with pytest.raises(ValueError, match=f"4 rows of the convolution's inputs and 2 states, not {rows} and {states}"):
            mixer.step(randn(1, mixer.inner + mixer.channels + 2), conv, ssm, integers(1), integers(0, 0))
