"""The laws of the projections with few rows: each format against fp64, with every combination of what surrounds the product."""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("triton")

import numpy as np
import torch
import triton_interpreter  # noqa: F401
from torch import Tensor
from torch.nn import functional as F

from zamba2.model.ops import triton_linear
from zamba2.model.ops.triton_linear import dequantize, embedding, linear
from zamba2.model.packed import Packed
from zamba2.weights import formats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DENSE = {"fp32": torch.float32, "fp16": torch.float16, "dense bf16": torch.bfloat16}
PACKED = ["bf16", "q8", "q4"]
EPS = 1e-5


def matrix(rows: int, cols: int, name: str) -> tuple[Tensor | Packed, Tensor]:
    """A random matrix as ``linear`` takes it, and its values in fp64."""
    w = torch.randn(rows, cols) / cols**0.5
    if name in DENSE:
        w = w.to(DENSE[name]).to(DEVICE)
        return w, w.double()
    packed, values = pack(w, name)
    return packed, values.double()


def pack(w: Tensor, name: str) -> tuple[Packed, Tensor]:
    """A packed matrix and the fp32 values it stands for."""
    format = formats.format_named(name)
    data = formats.pack(w.numpy(), format)
    values = torch.from_numpy(formats.unpack(data, *w.shape, format))
    return Packed(torch.from_numpy(data).to(DEVICE), *w.shape, name), values.to(DEVICE)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def bf16(x: Tensor) -> Tensor:
    """Rounded to bf16 as kernels do."""
    return x.bfloat16().float()


def int8(x: Tensor) -> Tensor:
    """Rounded to int8 per group of 32 along the last dimension, in fp64; ties to even."""
    groups = F.pad(x, (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    largest = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return ((groups * (127 / largest)).round().double() * (largest.double() / 127)).flatten(-2)[..., : x.shape[-1]]


def truth(x: Tensor, w: Tensor, name: str, **given: Any) -> Tensor:
    """``linear`` in fp64. With several rows and weights of half width, inputs and weights are rounded before the product; one row
    meets packed weights as int8."""
    rounded = (lambda t: bf16(t).double()) if len(x) > 1 and name not in ("fp32", "fp16") else torch.Tensor.double
    inputs = int8 if len(x) == 1 and name in ("q8", "q4") else rounded
    v = x + given["plus"] if "plus" in given else x
    squares = torch.cat([v, given["beside"]] if "beside" in given else [v], dim=1).double().square()
    scale = torch.rsqrt(squares.mean(1, keepdim=True) + EPS) if "norm" in given else torch.ones(1, device=DEVICE)
    r = inputs(v * given["norm"] if "norm" in given else v) @ rounded(w.float()).T
    if "hoisted" in given:
        r = r + given["hoisted"].double()
    r = r * scale
    if "low" in given:
        a, b = given["low"]
        r = r + inputs(a) @ rounded(b.float()).T
    if given.get("geglu"):
        gate, up = r.chunk(2, dim=1)
        r = F.gelu(gate) * up
    return r + given["residual"].double() if "residual" in given else r


def check(x: Tensor, rows: int, name: str, b_name: str | None = None, **given: Any) -> None:
    """``linear`` and ``truth`` agree; a rank under "low" becomes the pair (a, B)."""
    weight, w = matrix(rows, x.shape[1], name)
    exact = dict(given)
    if "low" in given:
        a, (b, b_exact) = draw(len(x), given["low"]), matrix(rows, given["low"], b_name or name)
        given["low"], exact["low"] = (a, b), (a, b_exact)
    wanted = truth(x, w, name, **exact)
    got = linear(x, weight, eps=EPS if "norm" in given else 0.0, **given)
    assert got.dtype == torch.float32 and got.shape == wanted.shape
    bound = 2e-3 if name == "fp16" and len(x) > 1 and not INTERPRETED else 5e-6 if len(x) == 1 or INTERPRETED else 2e-5
    assert (got.double() - wanted).norm() <= bound * wanted.norm()


@pytest.mark.parametrize("name", [*DENSE, *PACKED])
@pytest.mark.parametrize("M", [1, 33])
@pytest.mark.parametrize(("rows", "K"), [(5, 128), (40, 75)])
def test_a_plain_product(M: int, rows: int, K: int, name: str) -> None:
    """Without options it is x W^T, for sizes that fill neither blocks nor groups."""
    torch.manual_seed(0)
    check(draw(M, K), rows, name)


@pytest.mark.parametrize("name", ["fp32", "dense bf16", "bf16", "q8", "q4"])
@pytest.mark.parametrize("M", [1, 3])
def test_everything_at_once(M: int, name: str) -> None:
    """Norm over two halves, sum, hoisted term, low rank, GeGLU and residual, with views as rows."""
    torch.manual_seed(1)
    rows, K = 64, 136
    wide, narrow = [draw(M, K + 8)[:, :K] for _ in range(3)], [draw(M, n + 4)[:, :n] for n in (rows, rows // 2)]
    x, plus, beside = wide
    check(x, rows, name, norm=draw(K), plus=plus, beside=beside, hoisted=narrow[0], low=24, geglu=True, residual=narrow[1], early=True)


@pytest.mark.parametrize("name", ["dense bf16", "q8", "q4"])
@pytest.mark.parametrize("M", [1, 2])
@pytest.mark.parametrize("options", [["norm"], ["norm", "plus"], ["norm", "beside", "hoisted"], ["residual"], ["low", "geglu"]])
def test_each_projection_of_the_model(M: int, options: list[str], name: str) -> None:
    """The options as the model combines them; here GeGLU's halves share a block."""
    torch.manual_seed(2)
    rows, K = 40, 96
    drawn: dict[str, Any] = {
        "norm": draw(K), "plus": draw(M, K), "beside": draw(M, K), "hoisted": draw(M, rows), "residual": draw(M, rows), "low": 8,
        "geglu": True,
    }  # fmt: skip
    check(draw(M, K), rows, name, **{option: drawn[option] for option in options})


@pytest.mark.parametrize(("few", "many"), [(8, 4096), (8, 16)])
@pytest.mark.parametrize("M", [1, 2])
@pytest.mark.parametrize("name", ["dense bf16", "q8", "q4"])
def test_other_tiles(name: str, M: int, few: int, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows choose other tiles; the values are the same."""
    torch.manual_seed(3)
    monkeypatch.setattr(triton_linear, "FEW", few)
    monkeypatch.setattr(triton_linear, "MANY", many)
    check(draw(M, 1100), 80, name, norm=draw(1100), low=8)
    check(draw(M, 64), 64, name, norm=draw(64), low=8, geglu=True)


@pytest.mark.parametrize("name", [*DENSE, *PACKED])
@pytest.mark.parametrize(("M", "rows", "K"), [(2, 40, 1300), (33, 72, 300)])
def test_parts_are_the_product_once_added_up(name: str, M: int, rows: int, K: int) -> None:
    """A split product's parts add up to it, be there fewer tiles than parts or a tail; x, plus and the total take parts as their sum."""
    torch.manual_seed(6)
    x, norm, other = draw(M, K), draw(K), draw(3, M, K)
    (weight, w), total = matrix(rows, K, name), torch.full((M, K), torch.nan, device=DEVICE)
    parts = linear(x, weight, norm=norm, eps=EPS, split=True)
    assert parts.shape == (triton_linear.PARTS, M, rows)
    bound = 2e-3 if name == "fp16" and not INTERPRETED else 2e-5
    for found, v, given in (
        (parts.sum(0), x, {"norm": norm}),
        (linear(other, weight, norm=norm, eps=EPS, plus=x, total=total), other.sum(0) + x, {"norm": norm}),
        (linear(x, weight, plus=other, split=True).sum(0), x + other.sum(0), {}),
    ):
        wanted = truth(v, w, name, **given)
        # a sum in another order is rounded to another bf16 now and then
        assert (found.double() - wanted).norm() <= max(bound, 2e-4 if v is not x else 0) * wanted.norm()
    assert (total - other.sum(0) - x).norm() <= 1e-6 * total.norm()


@pytest.mark.parametrize("name", ["q8", "q4"])
def test_inputs_of_any_size(name: str) -> None:
    """Groups of zeros, of tiny and of huge inputs are rounded each by its own scale; what is no number makes all results none."""
    torch.manual_seed(7)
    x = draw(1, 160) * torch.tensor([0.0, 1e-36, 1e-20, 1.0, 1e30], device=DEVICE).repeat_interleave(32)
    for inputs in (x, x[:, :128], x[:, :96], x[:, :32]):
        check(inputs, 24, name)
    for value in (float("nan"), float("inf")):
        x[0, 70] = value
        with np.errstate(invalid="ignore"):  # the interpreter is numpy
            assert not linear(x, matrix(24, 160, name)[0]).isfinite().any()


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("M", [1, 2])
def test_a_packed_adapter_of_a_plain_matrix(M: int, name: str) -> None:
    """Matrix and adapter may have different formats."""
    torch.manual_seed(4)
    check(draw(M, 64), 24, "dense bf16", name, low=40)


@pytest.mark.parametrize("shape", [(0, 64), (65, 64), (1, 63)])
def test_what_does_not_fit_is_refused(shape: tuple[int, int]) -> None:
    """No rows, too many rows, and another number of inputs; and an odd number of rows for GeGLU."""
    with pytest.raises(ValueError, match="does not fit"):
        linear(draw(*shape), draw(8, 64))
    with pytest.raises(ValueError, match="two halves"):
        linear(draw(1, 64), draw(7, 64), geglu=True)
    with pytest.raises(ValueError, match="nothing behind it"):
        linear(draw(2, 64), draw(8, 64), geglu=True, split=True)
    with pytest.raises(ValueError, match="of several rows"):
        linear(draw(1, 64), draw(8, 64), plus=draw(2, 1, 64))


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize(("rows", "cols"), [(5, 128), (40, 72), (16, 300)])
def test_dequantize_and_embedding_give_the_values_of_the_bytes(rows: int, cols: int, name: str) -> None:
    """Bit for bit what ``formats.unpack`` gives, all of it or the rows asked for; bf16 is rounded from that."""
    torch.manual_seed(6)
    packed, values = pack(torch.randn(rows, cols), name)
    assert torch.equal(dequantize(packed, torch.float32), values)
    assert torch.equal(dequantize(packed).float(), bf16(values))
    ids = torch.tensor([rows - 1, 0, 3], device=DEVICE)
    assert torch.equal(embedding(ids, packed), values[ids])
