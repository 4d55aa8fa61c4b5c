"""The six ops: every implementation against its definition, and the laws that the definition itself obeys."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import triton_interpreter  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st
from op_cases import (
    CASES,
    HAS_GPU,
    OPS,
    OUTPUTS,
    Case,
    allowed,
    call,
    device_for,
    implementations,
    inputs,
    is_quick,
    relative_error,
    results,
    select,
    truth,
)  # fmt: skip
from torch import Tensor
from torch.nn import functional as F

from zamba2.model import ops
from zamba2.model.ops import reference

# Triton's interpreter is slow: without a GPU only some cases run there as a rule, and the rest with -m slow.
every_implementation = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "triton" and not HAS_GPU else []) for name in implementations()]
)
every_case = pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, marks=[] if is_quick(case, name) else [pytest.mark.slow], id=f"{case}-{name}")
        for name in implementations() for case in CASES
    ],
)  # fmt: skip


def close(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32, what: str = "result") -> None:
    error, bound = relative_error(found, expected), OPS[dtype].output
    assert error <= bound, f"{what}: relative error {error:.2e}, at most {bound:.0e} is allowed"


@every_case
def test_agrees_with_the_definition(case: Case, name: str) -> None:
    """Outputs, states and gradients are those of the reference in fp64."""
    expected = truth(case)
    for what, found in results(select(name), case, inputs(case, device=device_for(name))):
        error, bound = relative_error(found, expected[what]), allowed(case.dtype, what)
        assert error <= bound, f"{what}: relative error {error:.2e}, at most {bound:.0e} is allowed"


@every_case
@torch.inference_mode()
def test_agrees_without_gradients(case: Case, name: str) -> None:
    """The same where no gradients are recorded: implementations may take another way then."""
    expected = truth(case)
    for what, found in zip(OUTPUTS[case.op], call(select(name), case.op, inputs(case, device=device_for(name))), strict=True):
        close(found, expected[what], case.dtype, what)


@every_implementation
@pytest.mark.parametrize("op", ["rms_norm", "concat_rms_norm", "causal_conv", "ssd_scan", "geglu", "add_hoisted"])
def test_dtypes(op: str, name: str) -> None:
    """Outputs have the dtype of the activations; the scan's (but Triton's), its state and the norm's scale are fp32."""
    case = next(case for case in CASES if case.op == op and case.dtype == torch.bfloat16)
    scanned = torch.bfloat16 if name == "triton" else torch.float32
    expected = {"ssd_scan": [scanned, torch.float32], "concat_rms_norm": [torch.bfloat16, torch.float32]}
    found = [output.dtype for output in call(select(name), op, inputs(case, device=device_for(name)))]
    assert found == expected.get(op, [torch.bfloat16] * len(found))


def test_the_table_covers_what_it_promises() -> None:
    """Each op has fp32 and bf16 cases; the recurrent ones every length around a chunk, with and without state and documents."""
    for op in ("rms_norm", "concat_rms_norm", "causal_conv", "ssd_scan", "geglu", "add_hoisted"):
        assert {case.dtype for case in CASES if case.op == op} >= {torch.float32, torch.bfloat16}
    for op in ("causal_conv", "ssd_scan"):
        sizes = [case.sizes for case in CASES if case.op == op]
        assert {s["T"] for s in sizes} >= {1, 2, 3, 255, 256, 257, 513, 701}
        assert {(s.get("state", False), s.get("seq_idx", False)) for s in sizes} == {(a, b) for a in (False, True) for b in (False, True)}
        assert {s.get("b", 2) for s in sizes} == {1, 2, 3}
    assert len({str(case) for case in CASES}) == len(CASES)


def test_unknown_implementation() -> None:
    """A wrong name is refused with the names there are."""
    with pytest.raises(ValueError, match="'triton' and 'reference'"):
        ops.select("fast")


# ---- the definitions against formulas written another way -----------------------------------------------------------------


def test_rms_norm_is_torchs() -> None:
    """Without a gate and groups: torch.nn.functional.rms_norm."""
    x, weight = torch.randn(3, 5, 12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    close(reference.rms_norm(x, weight, 1e-5), F.rms_norm(x, (12,), weight, 1e-5), torch.float64)


def test_gated_rms_norm_by_group() -> None:
    """The gate multiplies first, then each group is normed on its own."""
    x, z, weight = torch.randn(3, 5, 12, dtype=torch.float64), torch.randn(3, 5, 12, dtype=torch.float64), torch.randn(12).double()
    y = x * z / (1 + torch.exp(-z))
    parts = [F.rms_norm(y[..., i : i + 4], (4,), weight[i : i + 4], 1e-5) for i in (0, 4, 8)]
    close(reference.rms_norm(x, weight, 1e-5, gate=z, groups=3), torch.cat(parts, dim=-1), torch.float64)


def test_concat_rms_norm_is_torchs() -> None:
    """The left half, and scale * weight * x0 as the right one, are the norm of both side by side."""
    x, x0, weight = torch.randn(3, 5, 6).double(), torch.randn(3, 5, 6).double(), torch.randn(12).double()
    left, scale = reference.concat_rms_norm(x, x0, weight, 1e-5)
    close(torch.cat([left, scale * weight[6:] * x0], dim=-1), F.rms_norm(torch.cat([x, x0], -1), (12,), weight, 1e-5), torch.float64)


def test_causal_conv_is_torchs() -> None:
    """torch.nn.functional.conv1d, depthwise, over the state and then the inputs; then x * sigmoid(x)."""
    x, state = torch.randn(2, 9, 5).double(), torch.randn(2, 3, 5).double()
    weight, bias = torch.randn(5, 4).double(), torch.randn(5).double()
    for before in (None, state):
        padded = torch.cat([torch.zeros_like(state) if before is None else before, x], dim=1)
        y = F.conv1d(padded.transpose(1, 2), weight[:, None], bias, groups=5).transpose(1, 2)
        found, after = reference.causal_conv(x, weight, bias, state=before)
        close(found, y * torch.sigmoid(y), torch.float64)
        assert torch.equal(after, padded[:, -3:])


def test_geglu_is_the_error_function() -> None:
    """x * (1 + erf(x / sqrt 2)) / 2 of the first half times the second."""
    projected, adapted = torch.randn(3, 10).double(), torch.randn(3, 10).double()
    expected = torch.empty(3, 5).double()
    for i in range(3):
        for j in range(5):
            gate, up = (float(projected[i, k] + adapted[i, k]) for k in (j, j + 5))
            expected[i, j] = gate * (1 + math.erf(gate / math.sqrt(2))) / 2 * up
    close(reference.geglu(projected, adapted), expected, torch.float64)


def test_ssd_scan_is_a_loop_over_scalars() -> None:
    """Mamba2 paper, equation 2, in numpy: head h reads group h // (heads / groups)."""
    b, T, H, P, G, N = 2, 4, 4, 2, 2, 3
    arguments = inputs(Case("ssd_scan", torch.float64, {"T": T, "b": b, "H": H, "P": P, "G": G, "N": N, "state": True}))
    x, dt, A, B, C, D, state = (arguments[name].numpy() for name in ("x", "dt", "A", "B", "C", "D", "state"))
    y, S = np.zeros((b, T, H, P)), state.copy()
    for i, t, h, p in np.ndindex(b, T, H, P):
        group = 0 if h < 2 else 1
        for n in range(N):
            S[i, h, p, n] = math.exp(dt[i, t, h] * A[h]) * S[i, h, p, n] + dt[i, t, h] * x[i, t, h, p] * B[i, t, group, n]
        y[i, t, h, p] = S[i, h, p] @ C[i, t, group] + D[h] * x[i, t, h, p]
    found, final = call(reference, "ssd_scan", arguments)
    close(found, torch.from_numpy(y), torch.float64)
    close(final, torch.from_numpy(S), torch.float64)


# ---- laws of every implementation -----------------------------------------------------------------------------------------

seeds = st.integers(0, 1 << 16)
lengths = st.one_of(st.integers(2, 40), st.sampled_from([257, 300]))
IN_TIME = {"x", "dt", "B", "C", "seq_idx"}  # arguments with a time axis, the second


def recurrent(data: st.DataObject, op: str, **sizes: object) -> Case:
    """A random case of the convolution or the scan, in fp32."""
    sizes = {"T": data.draw(lengths, "T"), "b": data.draw(st.integers(1, 3), "b"), "state": data.draw(st.booleans(), "state")} | sizes
    if op == "ssd_scan":
        groups = data.draw(st.integers(1, 3), "G")
        sizes |= {"G": groups, "H": groups * data.draw(st.integers(1, 2), "H/G"), "chunk": data.draw(st.integers(1, 64), "chunk")}
    else:
        sizes |= {"K": data.draw(st.integers(2, 5), "K"), "C": data.draw(st.integers(1, 7), "C")}
    return Case(op, torch.float32, sizes, data.draw(seeds, "seed"))


def part(arguments: dict[str, object], time: slice, row: slice = slice(None)) -> dict[str, object]:
    """The arguments of some rows and a stretch of time."""
    cut = {name: value[row, time] if name in IN_TIME else value for name, value in arguments.items()}
    if isinstance(cut.get("state"), Tensor):
        cut["state"] = cut["state"][row]
    return cut


recurrent_ops = pytest.mark.parametrize("op", ["causal_conv", "ssd_scan"])


@every_implementation
@recurrent_ops
@given(st.data())
def test_split_is_whole(name: str, op: str, data: st.DataObject) -> None:
    """Reading a prefix and then, from its state, the rest is reading the whole; within documents too."""
    case = recurrent(data, op, seq_idx=data.draw(st.booleans(), "seq_idx"))
    at = data.draw(st.integers(1, case.sizes["T"] - 1), "at")
    arguments = inputs(case, device=device_for(name))
    if "seq_idx" in arguments:  # a state belongs to the first document of what follows, so cut inside one
        arguments["seq_idx"][:, at] = arguments["seq_idx"][:, at - 1]
        arguments["seq_idx"] = arguments["seq_idx"].cummax(1).values
    y, state = call(select(name), op, arguments)
    y1, between = call(select(name), op, part(arguments, slice(at)))
    y2, final = call(select(name), op, part(arguments, slice(at, None)) | {"state": between})
    close(torch.cat([y1, y2], dim=1), y, what="outputs")
    close(final, state, what="state")


@every_implementation
@given(st.data())
def test_chunk_size_is_irrelevant(name: str, data: st.DataObject) -> None:
    """The chunk size of a scan never changes its result."""
    case = recurrent(data, "ssd_scan", seq_idx=data.draw(st.booleans(), "seq_idx"))
    arguments = inputs(case, device=device_for(name))
    one = call(select(name), "ssd_scan", arguments)
    other = call(select(name), "ssd_scan", arguments | {"chunk_size": data.draw(st.integers(1, 600), "other chunk")})
    for found, expected in zip(other, one, strict=True):
        close(found, expected)


@every_implementation
@recurrent_ops
@given(st.data())
def test_packed_is_separate(name: str, op: str, data: st.DataObject) -> None:
    """Documents of a packed row see nothing of each other; the given state belongs to the first, the returned one to the last."""
    case = recurrent(data, op, seq_idx=True)
    arguments = inputs(case, device=device_for(name))
    y, state = call(select(name), op, arguments)
    for row in range(case.sizes["b"]):
        numbers = arguments["seq_idx"][row]
        for document in numbers.unique():
            (places,) = torch.where(numbers == document)
            alone = part(arguments, slice(int(places[0]), int(places[-1]) + 1), slice(row, row + 1))
            alone |= {"seq_idx": None} | ({} if places[0] == 0 else {"state": None})
            found, final = call(select(name), op, alone)
            close(y[row : row + 1, places], found, what=f"document {document}")
        close(state[row : row + 1], final, what="state")


@every_implementation
@recurrent_ops
@given(st.data())
def test_padding_behind_lengths_is_not_there(name: str, op: str, data: st.DataObject) -> None:
    """A row's outputs up to its length, and the state behind it, are those of the row cut off there."""
    case = recurrent(data, op, lengths=True, **({"dt_bias": data.draw(st.booleans(), "dt_bias")} if op == "ssd_scan" else {}))
    arguments = inputs(case, device=device_for(name))
    y, state = call(select(name), op, arguments)
    for row, length in enumerate(arguments.pop("lengths").tolist()):
        found, final = call(select(name), op, part(arguments, slice(length), slice(row, row + 1)))
        close(y[row : row + 1, :length], found, what=f"row {row}")
        close(state[row : row + 1], final, what="state")


@every_implementation
@recurrent_ops
@given(st.data())
def test_row_is_alone(name: str, op: str, data: st.DataObject) -> None:
    """A row of a batch is the same row alone."""
    case = recurrent(data, op, b=3, seq_idx=data.draw(st.booleans(), "seq_idx"))
    arguments = inputs(case, device=device_for(name))
    both = call(select(name), op, arguments)
    row = slice(1, 2)
    for found, expected in zip(call(select(name), op, part(arguments, slice(None), row)), both, strict=True):
        close(found, expected[row])


@every_implementation
@recurrent_ops
@given(st.data())
def test_leaves_its_arguments_alone(name: str, op: str, data: st.DataObject) -> None:
    """Nothing is written into an argument (states are shared by copies), and the new state keeps no other tensor alive."""
    case = recurrent(data, op, seq_idx=data.draw(st.booleans(), "seq_idx"))
    arguments = inputs(case, device=device_for(name))
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    _, state = call(select(name), op, arguments)
    for key, value in before.items():
        assert torch.equal(arguments[key], value), f"{key} was overwritten"
    if name != "reference":
        assert state.untyped_storage().nbytes() <= 2 * state.nbytes


@every_implementation
@pytest.mark.parametrize("op", ["rms_norm", "concat_rms_norm", "geglu", "add_hoisted"])
@given(seed=seeds, rows=st.integers(1, 300), width=st.integers(1, 20), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_rows_are_independent(name: str, op: str, seed: int, rows: int, width: int, scale: float) -> None:
    """An elementwise op treats each vector alike, whatever stands beside it."""
    arguments = inputs(Case(op, torch.float32, {"shape": (rows, width), "scale": scale}, seed), device=device_for(name))
    both = call(select(name), op, arguments)
    row = seed % rows
    alone = {key: value[row] if isinstance(value, Tensor) and key != "weight" else value for key, value in arguments.items()}
    for found, expected in zip(call(select(name), op, alone), both, strict=True):
        close(found, expected[row])


@every_implementation
@given(seed=seeds, groups=st.integers(1, 4), width=st.integers(1, 9))
def test_groups_are_separate_norms(name: str, seed: int, groups: int, width: int) -> None:
    """A norm in groups is the norms of the groups side by side, gated or not."""
    case = Case("rms_norm", torch.float32, {"shape": (4, groups * width), "gate": seed % 2 == 0, "groups": groups}, seed)
    arguments = inputs(case, device=device_for(name))
    (y,) = call(select(name), "rms_norm", arguments)
    for group in range(groups):
        place = slice(group * width, (group + 1) * width)
        alone = {key: value[..., place] if isinstance(value, Tensor) else value for key, value in arguments.items()} | {"groups": 1}
        close(call(select(name), "rms_norm", alone)[0], y[..., place])
