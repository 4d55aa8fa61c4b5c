"""Prompts in Triton: the kernels between a prompt's products (``ops.triton_prompt``, ``gated_scan``), and ``runtime.prompts`` as a whole.

The truth is the reference in fp64, and the model in fp64.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import triton_interpreter  # noqa: F401
from op_cases import MODEL, OPS, allowed, logits_error, relative_error
from strategies import MINIATURES, random_model, random_tokens
from torch import Tensor

pytest.importorskip("triton")

from zamba2.model.model import Attention, Zamba2, rotate
from zamba2.model.ops import reference
from zamba2.model.ops.triton_prompt import add_norm, geglu_adapted, place_heads
from zamba2.model.ops.triton_scan import gated_scan
from zamba2.model.state import ModelState
from zamba2.runtime import prompts as prompts_module
from zamba2.runtime.prompts import Prompts
from zamba2.weights.checkpoint import FP32_PARTS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS, GATED_EPS = 1e-5, 3e-5
OFTEN = [("2.7b", torch.float32, 70), ("1.2b", torch.bfloat16, 63), ("7b", torch.float32, 64)]  # the rest takes minutes in the interpreter
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def fresh_inputs() -> None:
    torch.seed()


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """The tolerance of all ops, whatever is stored in bf16 rounded once."""
    error = relative_error(found, expected)
    assert error <= allowed(dtype, "y"), f"relative error {error:.2e}"


@both_dtypes
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("parts", [None, 0, 1, 5, 80])
@pytest.mark.parametrize("width", [6, 40, 1100])
def test_sum_and_norm(width: int, parts: int | None, beside: bool, dtype: torch.dtype) -> None:
    """The stream plus what a mixer adds, divided by its root mean square if that is still to be done, and the norm of the sum as it is
    kept: of it alone, or the left half of the norm beside another vector."""
    rows, size = 5, 400
    x, other = draw(rows, width, dtype=dtype), draw(rows, width, dtype=dtype) if beside else None
    t = None if parts is None else 9 * draw(rows, width, dtype=dtype)
    weight = draw(2 * width if beside else width)
    squares = draw(rows, parts).square() * size if parts else None
    total, y, scale = add_norm(x, t, weight, EPS, squares=squares, size=size, size_eps=GATED_EPS, beside=other)
    expected = x.double()
    if t is not None:
        gain = 1.0 if squares is None else torch.rsqrt(squares.double().sum(1, keepdim=True) / size + GATED_EPS)
        expected = expected + t.double() * gain
        close(total, expected, dtype)
    else:
        assert total is x
    kept = total.double()
    if other is None:
        close(y, reference.rms_norm(kept, weight.double(), EPS), dtype)
        assert scale is None
    else:
        left, expected_scale = reference.concat_rms_norm(kept, other.double(), weight.double(), EPS)
        close(y, left, dtype)
        assert scale is not None
        close(scale, expected_scale, torch.float32)
    if t is not None:
        same, again, _ = add_norm(x, t, weight, EPS, squares=squares, size=size, size_eps=GATED_EPS, beside=other, keep=False)
        assert same is x
        assert torch.equal(again, y)


@both_dtypes
@pytest.mark.parametrize("shape", [(1, 4, 2), (70, 48, 8), (33, 130, 65), (130, 64, 128)], ids=str)
def test_geglu_with_its_adapter(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """GEGLU of a projection plus the adapter's second product equals that of the two in fp64, at any sizes."""
    rows, width, rank = shape
    projected, low, up = draw(rows, 2 * width, dtype=dtype), draw(rows, rank, dtype=dtype), (draw(2 * width, rank) / rank**0.5).to(dtype)
    expected = reference.geglu(projected.double(), low.double() @ up.double().T)
    close(geglu_adapted(projected, low, up), expected, dtype)


@both_dtypes
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("shape", [(3, 2, 2, 6, True), (37, 4, 2, 20, False), (18, 3, 1, 160, True)], ids=str)
def test_heads_are_placed(shape: tuple[int, int, int, int, bool], rope: bool, dtype: torch.dtype) -> None:
    """Queries, keys and values, of the projection, what was hoisted and adapters, rotated if there are positions, each where it belongs."""
    rows, heads, kv_heads, d, adapters = shape
    width = (heads + 2 * kv_heads) * d
    projected, hoisted = draw(rows, width, dtype=dtype), draw(rows, width, dtype=dtype)
    scale, adapted = draw(rows, 1).abs(), draw(rows, width, dtype=dtype) if adapters else None
    angles = draw(rows, d // 2).repeat(1, 2)
    turns = (angles.cos(), angles.sin())
    q, kv = place_heads(projected, hoisted, scale, heads=heads, kv_heads=kv_heads, adapted=adapted, rope=turns if rope else None)
    value = projected.double() + scale.double() * hoisted.double() + (0 if adapted is None else adapted.double())
    parts = [m.unflatten(1, (-1, d)).transpose(0, 1) for m in value.split([heads * d, kv_heads * d, kv_heads * d], dim=1)]
    if rope:
        parts[:2] = [rotate(m, *(turn.double() for turn in turns)) for m in parts[:2]]
    close(q.transpose(0, 1), parts[0], dtype)
    close(kv, torch.stack(parts[1:]), dtype)


@both_dtypes
@pytest.mark.parametrize(
    "shape", [(64, 2, 3, 4, 5), (2, 70, 2, 16, 16), (1, 600, 1, 64, 64), (1, 1100, 2, 8, 8), (1, 130, 3, 20, 128)], ids=str
)
def test_scan_with_its_gate(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    """The reference's scan by gate and the norm's weight, and the sums of squares that are left of the norm; whatever lies behind the
    texts' ends, states are those at the ends. In bf16 a norm magnifies rows in which the scan and D x nearly cancel."""
    b, length, heads, P, N = shape
    x, gate = (draw(b, length, heads, P, dtype=dtype) for _ in range(2))
    B, C = (draw(b, length, 1, N, dtype=dtype) / N**0.25 for _ in range(2))
    dt, A, D, bias = draw(b, length, heads, dtype=dtype), draw(heads), draw(heads), draw(heads)
    weight, lengths = draw(heads * P), torch.randint(1, length + 1, (b,), device=DEVICE)
    y, squares, final = gated_scan(x, dt, A, B, C, D, gate, weight, dt_bias=bias, lengths=lengths)
    expected, state = reference.ssd_scan(
        x.double(), dt.double(), A.double(), B.double(), C.double(), D.double(), chunk_size=1, dt_bias=bias.double(), lengths=lengths
    )
    gated, squares = expected.flatten(2) * torch.nn.functional.silu(gate.double().flatten(2)), squares.double().sum(2, keepdim=True)
    close(y.flatten(2), gated * weight.double(), dtype)
    close(squares.sqrt(), gated.norm(dim=2, keepdim=True), dtype)
    if dtype == torch.float32:
        normed = reference.rms_norm(expected.flatten(2), weight.double(), GATED_EPS, gate=gate.double().flatten(2))
        close(y.double().flatten(2) * torch.rsqrt(squares / (heads * P) + GATED_EPS), normed, dtype)
    close(final, state, dtype)


def model_of(name: str, dtype: torch.dtype) -> Zamba2:
    """As a checkpoint is loaded: small weights that need it stay fp32."""
    model = random_model(MINIATURES[name], 3, ops="auto")
    for parameter, weight in model.named_parameters():
        weight.data = weight.data.to(torch.float32 if parameter.endswith(FP32_PARTS) else dtype)
    return model


COUNTS = ((1, 1), (2, 2), (3, 0), (63, 0), (64, 5), (70, 70), (300, 300))  # tokens, scores that are wanted
PROMPTS = [
    pytest.param(name, dtype, *count, marks=slowly, id=f"{name}-{dtype}-{count[0]}")
    for name in MINIATURES for dtype in (torch.float32, torch.bfloat16) for count in COUNTS
    for slowly in [[] if DEVICE == "cuda" or (name, dtype, count[0]) in OFTEN else [pytest.mark.slow]]
]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "count", "wanted"), PROMPTS)
def test_padded_prompt_is_the_text_alone(name: str, dtype: torch.dtype, count: int, wanted: int) -> None:
    """Padded to a graph's length, around its borders and shorter than the taps, a text gives the scores and the whole state of the model in
    fp64 over it by itself; in bf16, which miniatures magnify, about as near to those as the model's own."""
    model, tokens = model_of(name, dtype).to(DEVICE), random_tokens(MINIATURES[name], 4, count)
    wide = model_of(name, dtype).double()
    expected, own = wide.new_state(), model.new_state()
    with torch.no_grad():
        truth, own_scores = wide(tokens[None], state=expected)[0], model(tokens[None].to(DEVICE), state=own)[0]
    for module in model.modules():
        if isinstance(module, Attention):
            module.split_for_inference()
    with torch.inference_mode():
        state, scores = Prompts(model).read(tokens.numpy(), wanted, torch.clone)
    assert len(scores) == wanted
    assert (state.position, state.padding) == (count, None)
    assert [tensor.shape for tensor in state.tensors()] == [tensor.shape for tensor in expected.tensors()]
    if dtype == torch.float32:
        assert logits_error(scores.cpu(), truth[count - wanted :]) <= MODEL[dtype].output
    elif wanted == count:  # as few as one place are a lottery
        assert relative_error(scores, truth) <= (1.5 if count > 10 else 5) * relative_error(own_scores, truth)
    for found, mine, right in zip(tensors(state), tensors(own), tensors(expected), strict=True):
        limit = MODEL[dtype].output if dtype == torch.float32 else max(20 * OPS[dtype].output, 2 * relative_error(mine, right))
        assert relative_error(found, right) <= limit


def tensors(state: ModelState) -> list[Tensor]:
    """All of a state, keys and values without the room behind them."""
    return [tensor for tensor in (*state.conv, *state.ssm, *(cache.tensor() for cache in state.kv)) if tensor is not None]


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_what_cannot_be_captured_is_computed(
    kind: type[RuntimeError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prompt whose graph cannot be made is read without, when what the attempt had computed is gone; where memory was short alone, the
    next one tries again."""
    prompts, computed = Prompts(random_model(MINIATURES["2.7b"], 3)), list[weakref.ref[Tensor]]()
    prompts.eager = False

    def compute(length: int) -> Tensor:
        assert all(tensor() is None for tensor in computed)
        tensor = torch.zeros(length)
        computed.append(weakref.ref(tensor))
        return tensor

    def captured(compute: Callable[[], Tensor], *_: object, **__: object) -> None:
        outputs = compute()
        raise kind(f"no graph of {len(outputs)} tokens")

    monkeypatch.setattr(prompts, "_compute", compute)
    monkeypatch.setattr(prompts_module, "captured", captured)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    for _ in range(2):
        assert len(prompts._outputs(64)) == 64
    short = kind is torch.OutOfMemoryError
    assert (len(computed), prompts.eager) == ((4, False) if short else (3, True))
    assert ("without CUDA graphs" in capsys.readouterr().err) is not short


def test_graphs_share_the_memory_of_one_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new graph shares the memory of those before it; PyTorch refuses that of graphs which are all gone, as after memory ran short."""
    prompts, asked = Prompts(random_model(MINIATURES["2.7b"], 3)), list[object]()
    prompts.eager = False
    monkeypatch.setattr(prompts, "_compute", lambda length: length)

    def captured(compute: Callable[[], int], device: torch.device, *, memory: object) -> tuple[SimpleNamespace, int]:
        asked.append(memory)
        if len(asked) == 3:
            raise torch.OutOfMemoryError("full")
        number = memory or len(asked)
        return SimpleNamespace(pool=lambda: number, replay=lambda: None), compute()

    monkeypatch.setattr(prompts_module, "captured", captured)
    lengths = [64, 128, 256, 64, 128, 64]
    assert [prompts._outputs(length) for length in lengths] == lengths
    assert asked == [None, 1, 1, None, 4]
