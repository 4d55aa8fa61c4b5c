"""The cases that every kernel passes on every instruction set, their references in plain NumPy, and their tolerances.

A case is a function of ``struct Kernels`` (csrc/kernels.h), its arguments in the function's own order, and what must stand in them
afterwards. A ``const Matrix&`` and a ``const Activations&`` are four arguments, a ``KeysValues&`` seven, a ``const Query*`` three (see
tests/native/kernel_runner.cpp). References are written from the comments of kernels.h, in fp64, and share nothing with the kernels.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from zamba2.weights.formats import FORMATS, GROUP, KV_FORMATS, pack, round_bf16, unpack

__all__ = ["KERNELS", "TOLERANCE", "Case", "as_array", "bits", "cases", "largest_error", "q8_of", "softmax_of"]

Array = npt.NDArray[Any]

# Largest |found - expected| of an element, relative to its magnitude: the sum of the absolute values of the terms that it is
# the sum of. Whole numbers and bf16 bits must be equal. An fp32 number has 6e-8.
TOLERANCE = {
    "quantize": 0.0,
    "multiply": 1e-6,
    "multiply_many": 1e-6,
    "to_bf16": 0.0,
    "to_tiles": 0.0,
    "from_bf16": 0.0,
    "finite": 0.0,
    "sum_of_squares": 5e-7,
    "scale_by": 2e-7,
    "add_scaled": 2e-7,
    "gated_norm": 1e-6,
    "geglu": 1e-6,
    "convolve": 1e-6,
    "step": 5e-7,
    "chunk": 2e-6,
    "chunk_scores": 5e-7,
    "to_q8": 2e-7,
    "attend": 1e-6,
    "attend_many": 1e-6,
}
KERNELS = list(TOLERANCE)
SMALLEST = 1e-30  # below it magnitudes count as it: what fp32 may flush to zero


@dataclass(frozen=True)
class Near:
    """Values within the kernel's tolerance of their magnitude, by default their absolute value; NaN where NaN is expected."""

    values: Array
    magnitude: Array


@dataclass(frozen=True)
class Case:
    """expected: arguments that change (arrays: equal to the bit, masked elements apart); every other one must not, but scratch.

    in_bf16: what differs where the kernel multiplies in bf16: with matrix units, or with products of bf16 if ``pairs``. Cases with the
    same ``shares`` give the same bits for the same row of y, the first of which is ``first_row``.
    """

    kernel: str
    label: str
    arguments: dict[str, Any]
    expected: dict[str, Array | Near]
    in_bf16: dict[str, Array | Near] = field(default_factory=dict)
    pairs: bool = False
    scratch: tuple[str, ...] = ()
    shares: str = ""
    first_row: int = 0

    def __str__(self) -> str:
        return f"{self.kernel}-{self.label}"


def largest_error(case: Case, found: dict[str, Array], in_bf16: bool) -> float:
    """The largest error of a case's results, relative to their magnitude; infinite for one that must be equal and is not."""
    worst = 0.0
    for name, before in case.arguments.items():
        if name in case.scratch:
            continue
        expected = case.in_bf16[name] if in_bf16 and name in case.in_bf16 else case.expected.get(name)
        value = found[name]
        if not isinstance(expected, Near):
            wanted = np.ma.asarray(as_array(before) if expected is None else expected)
            differ = bits(value.reshape(wanted.shape)) != bits(wanted.data)
            worst = np.inf if (differ & ~np.ma.getmaskarray(wanted)).any() else worst
            continue
        value = value.reshape(expected.values.shape).astype(np.float64)
        finite = np.isfinite(expected.values)
        same = (value == expected.values) | (np.isnan(value) & np.isnan(expected.values))
        if not same[~finite].all() or not np.isfinite(value[finite]).all():
            return np.inf
        difference = np.abs(value - expected.values)[finite] / np.maximum(expected.magnitude[finite], SMALLEST)
        worst = max(worst, float(difference.max(initial=0)))
    return worst


def bits(array: Array) -> Array:
    return array.view(np.uint32) if array.dtype == np.float32 else array


def as_array(value: Any) -> Array:
    """An argument as the runner takes it: whole numbers of 64 bits, fp32."""
    return value if isinstance(value, np.ndarray) else np.array(value, dtype=np.float32 if isinstance(value, float) else np.int64)


def near(values: Array | float, magnitude: Array | float | None = None) -> Near:
    values = np.asarray(values, dtype=np.float64)
    return Near(values, np.abs(values) if magnitude is None else np.broadcast_to(np.asarray(magnitude, dtype=np.float64), values.shape))


def poison(*shape: int, dtype: Any = np.float32) -> Array:
    """What stands in a result before the call."""
    return np.full(shape, np.nan if dtype == np.float32 else 0x55, dtype=dtype)


def replaced(before: Array, rows: Any, columns: Any, values: Near) -> Near:
    """The array before the call, with a part of it replaced."""
    new, magnitude = before.astype(np.float64), np.abs(before.astype(np.float64))
    new[rows, columns], magnitude[rows, columns] = values.values, values.magnitude
    return Near(new, magnitude)


def normal(rng: np.random.Generator, *shape: int, size: float = 1.0) -> Array:
    return (size * rng.standard_normal(shape)).astype(np.float32)


def spaced(values: Array, stride: int) -> Array:
    """Rows a stride apart, from the first value to the last: NaN between them, and nothing behind."""
    rows, cols = values.shape
    apart = np.full((rows, stride), np.nan, dtype=values.dtype)
    apart[:, :cols] = values
    return apart.reshape(-1)[: (rows - 1) * stride + cols].copy()


def wide(halves: Array) -> Array:
    """fp32 of bf16 bits."""
    return (halves.astype(np.uint32) << 16).view(np.float32)


def silu(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


def cases(kernel: str) -> list[Case]:
    """All cases of a kernel; their inputs are drawn from its name."""
    found = list(MAKERS[kernel](np.random.default_rng(zlib.crc32(kernel.encode()))))
    assert all(case.kernel == kernel for case in found)
    return found


# ---- products ---------------------------------------------------------------------------------------------------------------


def codes_of(x: Array) -> tuple[Array, Array]:
    """Codes (rows, groups, 32) and scales (rows, groups) of fp32 activations (rows, cols), every step in fp32."""
    rows, cols = x.shape
    grouped = np.zeros((rows, -(-cols // GROUP), GROUP), dtype=np.float32)
    grouped.reshape(rows, -1)[:, :cols] = x
    peak = np.abs(grouped).max(-1)
    inverse = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 0)
    return np.rint(grouped * inverse[..., None]).astype(np.int8), peak / np.float32(127)


def quantize(rng: np.random.Generator) -> Iterator[Case]:
    def case(label: str, x: Array) -> Case:
        rows = int(rng.integers(1, 9))
        row, format = int(rng.integers(rows)), FORMATS[("q4", "q8")[int(rng.integers(2))]]
        finite = np.isfinite(x)
        (codes,), (scales,) = codes_of(np.where(finite, x, 0)[None])
        groups = len(scales)
        bad = np.array([not finite[32 * g : 32 * g + 32].all() for g in range(groups)])
        arguments = {
            "x": x, "cols": x.size, "weights": format.number, "row": row, "rows": rows, "codes": poison(groups, 8, rows, 4, dtype=np.int8),
            "scales": poison(groups, rows), "starts": poison(groups, rows, dtype=np.int32),
        }  # fmt: skip
        expected = {name: np.ma.array(arguments[name]) for name in ("codes", "starts")}
        expected["codes"][:, :, row] = np.ma.array(codes.reshape(groups, 8, 4), mask=bad.repeat(32))
        # for q8 some tables take the offset off otherwise: the products show whether it is right
        expected["starts"][:, row] = np.ma.array(-8 * codes.sum(-1, dtype=np.int32), mask=bad | (format.name == "q8"))
        scale = replaced(arguments["scales"], slice(None), row, near(np.where(bad, np.nan, scales)))
        return Case("quantize", f"{label}, row {row} of {rows}", arguments, expected | {"scales": scale})

    for cols in (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 2560):
        yield case(f"cols {cols}", normal(rng, cols))
    for name, value in {"zeros": 0.0, "ones": 1.0, "negative": -1.0, "small": -1e-36, "large": 3e38}.items():
        yield case(name, np.full(70, value, dtype=np.float32))
    yield case(
        "ties", ((np.arange(254) - 127) / np.float32(2)).astype(np.float32) * np.where(np.arange(254) % 32 == 0, 2, 1).astype(np.float32)
    )
    yield case("one alone", np.eye(1, 64, 45, dtype=np.float32)[0] * np.float32(1e-20))
    for value in (np.nan, np.inf, -np.inf):
        for at in (0, 31, 40, 69):
            x = normal(rng, 70)
            x[at] = value
            yield case(f"{value} at {at}", x)


@dataclass(frozen=True)
class Product:
    """A matrix and activations that it meets, with the exact result of their rounded numbers: (rows of x, rows of w)."""

    matrix: dict[str, Any]
    x: Array
    short: Near  # as short calls round
    halves: Near  # as products of bf16 round


def product(format: str, data: Array, rows: int, cols: int, x: Array) -> Product:
    weights = unpack(data, rows, cols, FORMATS[format])

    def exact(w: Array, a: Array) -> Near:
        w, a = w.astype(np.float64), a.astype(np.float64)
        return Near(a @ w.T, np.abs(a) @ np.abs(w).T)

    codes, scales = codes_of(x)
    rounded = (codes * scales.astype(np.float64)[..., None]).reshape(len(x), -1)[:, :cols]
    matrix = {"w": data, "w.rows": rows, "w.cols": cols, "w.format": FORMATS[format].number}
    halves = exact(wide(round_bf16(weights)), wide(round_bf16(x)))
    return Product(matrix, x, exact(weights, x if format == "bf16" else rounded), halves)


def activations(x: Array) -> dict[str, Any]:
    """fp32 rows (rows, cols) as the products take them. Rows of tiles that do not exist are NaN: they may touch nobody."""
    (count, cols), groups = x.shape, -(-x.shape[1] // 32)
    padded, tiles = (
        np.zeros((count, 32 * groups), dtype=np.float32),
        np.full((-(-count // 32) * 2, groups, 16, 32), 0x7FC0, dtype=np.uint16),
    )
    padded[:, :cols] = x
    for row in range(count):
        tiles[row // 16, :, row % 16] = round_bf16(padded[row]).reshape(groups, 32)
    return {"x.rows": count, "x.cols": cols, "x.values": padded, "x.halves": tiles}


def products(rng: np.random.Generator, shapes: list[tuple[int, int, int]]) -> Iterator[tuple[str, str, Product]]:
    """For every format and shape (rows of x, rows of w, cols): random numbers, and for one shape what is extreme too."""
    for format in FORMATS:
        for count, rows, cols in shapes:
            label, x = f"{format} {count} x ({rows} x {cols})", normal(rng, count, cols)
            yield format, label, product(format, pack(normal(rng, rows, cols, size=0.02), FORMATS[format]), rows, cols, x)
            if cols != 100:
                continue
            x *= np.exp(normal(rng, count, cols, size=4))
            yield format, f"{label} heavy tails", product(format, pack(normal(rng, rows, cols) ** 5, FORMATS[format]), rows, cols, x)
            signs = {
                "ones": np.ones((rows, cols)),
                "minus ones": -np.ones((rows, cols)),
                "signs": np.sign(rng.standard_normal((rows, cols))),
            }
            for name, weights in signs.items():  # every code is a largest one
                largest = pack(weights.astype(np.float32), FORMATS[format])
                yield format, f"{label} {name}", product(format, largest, rows, cols, np.resize(weights, (count, cols)).astype(np.float32))
            zeros = np.zeros((rows, cols), dtype=np.float32)
            yield format, f"{label} zeros", product(format, pack(zeros, FORMATS[format]), rows, cols, np.zeros_like(x))
            if format != "bf16":  # any bytes are codes
                data = pack(normal(rng, rows, cols), FORMATS[format]).reshape(-(-rows // 16), -1)
                code_bytes = -(-cols // 32) * FORMATS[format].code_bytes
                data[:, :code_bytes] = rng.integers(0, 256, data[:, :code_bytes].shape)
                data[0, :code_bytes] = 0
                yield format, f"{label} any bytes", product(format, data.reshape(-1), rows, cols, x)


def multiply(rng: np.random.Generator) -> Iterator[Case]:
    shapes = [(9, 1, 1), (9, 15, 31), (9, 16, 32), (9, 17, 33), (11, 33, 64), (9, 70, 100), (10, 40, 1000)]
    for _, label, p in products(rng, shapes):
        rows, blocks, total = p.matrix["w.rows"], -(-p.matrix["w.rows"] // 16), len(p.x)
        # (rows of x in the call, the tile's first one): all counts alone, at both ends, and what is left behind a full tile
        calls = [(slice(start, start + count), 0) for count in range(1, 9) for start in sorted({0, total - count})]
        for part, row in [*calls, (slice(0, total), 8)]:
            x, count = p.x[part], part.stop - part.start - row
            first = (count + part.start) % blocks if count % 2 else 0
            last = blocks if count < 6 else max(first + 1, blocks - 1)
            columns, stride, seen = slice(16 * first, min(16 * last, rows)), rows + count % 3, slice(part.start + row, part.stop)
            before = poison(count, stride)
            y = replaced(before, slice(None), columns, Near(p.short.values[seen, columns], p.short.magnitude[seen, columns]))
            arguments = p.matrix | {"first": first, "last": last} | activations(x) | {"row": row, "y": before, "stride": stride}
            yield Case("multiply", f"{label}, {count} from {seen.start}", arguments, {"y": y}, shares=label, first_row=seen.start)


def multiply_many(rng: np.random.Generator) -> Iterator[Case]:
    small = [(9, 1, 1), (9, 16, 32), (16, 17, 33), (17, 33, 64), (32, 48, 31), (33, 70, 100), (70, 40, 200)]
    shapes = [*small, (20, 36, 1100), (40, 36, 1100), (45, 36, 1100), (9, 1024, 40)]
    for format, label, p in products(rng, shapes):
        rows, groups, blocks = p.matrix["w.rows"], -(-p.matrix["w.cols"] // 32), -(-p.matrix["w.rows"] // 16)
        for first, last in sorted({(0, blocks), (0, (blocks + 1) // 2), (blocks // 2, blocks)}):
            columns, stride = slice(16 * first, min(16 * last, rows)), rows + first
            before = poison(len(p.x), stride)
            parts = [Near(full.values[:, columns], full.magnitude[:, columns]) for full in (p.short, p.halves)]
            short, halves = (replaced(before, slice(None), columns, part) for part in parts)
            panel = np.zeros((last - first, groups, 512), dtype=np.uint16)
            arguments = p.matrix | {"first": first, "last": last} | activations(p.x) | {"y": before, "stride": stride, "panel": panel}
            place = f"{label}, blocks {first} to {last}"
            yield Case("multiply_many", place, arguments, {"y": short}, {"y": halves}, format == "bf16", scratch=("panel",))


# ---- bf16 -------------------------------------------------------------------------------------------------------------------

LENGTHS = (1, 7, 15, 16, 17, 31, 32, 33, 100, 161)


def bf16_of(x: Array) -> Array:
    """bf16 bits of any fp32 values: one kind of NaN."""
    return np.where(np.isnan(x), np.uint16(0x7FC0), round_bf16(x))


def awkward(rng: np.random.Generator, n: int) -> Array:
    """Random numbers among ties, infinities, NaN, zeros of both signs and what rounds to infinity."""
    with np.errstate(over="ignore"):
        x = normal(rng, n) * np.exp(normal(rng, n, size=20))
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 3.4e38, -3.4e38, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8], dtype=np.float32)
    special = np.concatenate([special, np.array([0x7F800001, 0xFFFFFFFF, 0x3F807FFF, 0x3F808001], dtype=np.uint32).view(np.float32)])
    at = rng.permutation(n)[: min(n, special.size)]
    x[at] = special[: at.size]
    return x


def to_bf16(rng: np.random.Generator) -> Iterator[Case]:
    for n in LENGTHS:
        for name, x in (("normal", normal(rng, n)), ("awkward", awkward(rng, n))):
            yield Case("to_bf16", f"{n} {name}", {"x": x, "n": n, "y": poison(n, dtype=np.uint16)}, {"y": bf16_of(x)})


def to_tiles(rng: np.random.Generator) -> Iterator[Case]:
    for cols in LENGTHS:
        for row in (0, 7, 15, 16, 33):
            groups = -(-cols // 32)
            x, before = awkward(rng, cols), poison(row // 16 + 1, groups, 16, 32, dtype=np.uint16)
            padded, after = np.zeros(32 * groups, dtype=np.float32), before.copy()
            padded[:cols] = x
            after[row // 16, :, row % 16] = bf16_of(padded).reshape(groups, 32)
            yield Case("to_tiles", f"{cols} to row {row}", {"x": x, "cols": cols, "row": row, "tiles": before}, {"tiles": after})


def from_bf16(rng: np.random.Generator) -> Iterator[Case]:
    for n in LENGTHS:
        x = bf16_of(awkward(rng, n))
        yield Case("from_bf16", str(n), {"x": x, "n": n, "y": poison(n)}, {"y": wide(x)})


# ---- element by element -------------------------------------------------------------------------------------------------------


def finite(rng: np.random.Generator) -> Iterator[Case]:
    for n in LENGTHS:
        for value in (1.0, 0.0, 3.4e38, -3.4e38, np.nan, np.inf, -np.inf):
            x = normal(rng, n, size=3e37 if np.isfinite(value) else 1)
            x[rng.integers(n)] = value
            result = np.array([np.isfinite(value)], dtype=np.uint8)
            yield Case("finite", f"{n} with {value}", {"x": x, "n": n, "result": poison(1, dtype=np.uint8)}, {"result": result})


def sum_of_squares(rng: np.random.Generator) -> Iterator[Case]:
    for n in (*LENGTHS, 2560):
        for size in (1e-12, 1.0, 1e15):
            x = normal(rng, n, size=size)
            yield Case(
                "sum_of_squares",
                f"{n} of {size}",
                {"x": x, "n": n, "result": poison(1)},
                {"result": near([(x.astype(np.float64) ** 2).sum()])},
            )


def scale_by(rng: np.random.Generator) -> Iterator[Case]:
    for n in LENGTHS:
        for scale in (0.0, -1.5, 1e10):
            x, weight = normal(rng, n), normal(rng, n)
            y = x.astype(np.float64) * np.float32(scale) * weight
            yield Case("scale_by", f"{n} by {scale}", {"x": x, "weight": weight, "scale": scale, "n": n, "y": poison(n)}, {"y": near(y)})


def add_scaled(rng: np.random.Generator) -> Iterator[Case]:
    for n in LENGTHS:
        for scale in (0.0, 1.0, -2.5, 1e10):
            x, y = normal(rng, n), normal(rng, n)
            added = x.astype(np.float64) * np.float32(scale)
            yield Case(
                "add_scaled", f"{n} by {scale}", {"x": x, "scale": scale, "n": n, "y": y}, {"y": near(y + added, np.abs(y) + np.abs(added))}
            )


def gated_norm(rng: np.random.Generator) -> Iterator[Case]:
    for groups in (1, 2):
        for size in LENGTHS:
            for spread in (1.0, 60.0, 0.0):
                n, eps = groups * size, 1e-5
                x, z, weight = normal(rng, n), normal(rng, n, size=spread), normal(rng, n)
                gated = (x * silu(z.astype(np.float64))).reshape(groups, size)
                y = (gated / np.sqrt((gated**2).mean(-1, keepdims=True) + np.float32(eps))).reshape(-1) * weight
                arguments = {"x": x, "z": z, "weight": weight, "n": n, "groups": groups, "eps": eps, "y": poison(n)}
                yield Case("gated_norm", f"{groups} of {size}, gates of {spread}", arguments, {"y": near(y)})


erf = np.vectorize(math.erf, otypes=[np.float64])


def geglu(rng: np.random.Generator) -> Iterator[Case]:
    for n in LENGTHS:
        for size in (1.0, 10.0, 1e4, 1e15):
            projected, adapted = normal(rng, 2 * n, size=size), normal(rng, 2 * n, size=size / 10)
            gate, up = np.split(projected.astype(np.float64) + adapted, 2)
            parts = np.split(np.abs(projected.astype(np.float64)) + np.abs(adapted), 2)  # what rounding of the sums is relative to
            y = 0.5 * gate * (1 + erf(gate / np.sqrt(2))) * up
            arguments = {"projected": projected, "adapted": adapted, "n": n, "y": poison(n)}
            yield Case("geglu", f"{n} of {size}", arguments, {"y": near(y, parts[0] * parts[1])})


# ---- mixer ------------------------------------------------------------------------------------------------------------------


def convolve(rng: np.random.Generator) -> Iterator[Case]:
    for taps, length, n in [
        (4, 1, 40),
        (4, 2, 17),
        (4, 3, 33),
        (4, 4, 16),
        (4, 9, 70),
        (4, 70, 35),
        (3, 1, 20),
        (3, 8, 5),
        (2, 5, 33),
        (1, 4, 19),
        (4, 2, 600),
    ]:
        for first, last in {(0, n), (0, (n + 1) // 2), (n // 3, n)}:
            for size in (1.0, 30.0):
                x, weight, bias = normal(rng, length, n, size=size), normal(rng, taps, n), normal(rng, n)
                state, stride = normal(rng, taps - 1, n, size=size), n + 3 * (length % 2)
                inputs = np.concatenate([state, x]).astype(np.float64)
                terms = np.stack([inputs[k : k + length] * weight[k] for k in range(taps)])
                y, magnitude = silu(terms.sum(0) + bias), np.abs(terms).sum(0) + np.abs(bias)
                columns, before, after = slice(first, last), poison(length, n), state.copy()
                after[:, columns] = inputs[length:, columns]
                arguments = {
                    "x": spaced(x, stride), "stride": stride, "length": length, "weight": weight, "bias": bias, "taps": taps, "n": n,
                    "first": first, "last": last, "state": state, "y": before,
                }  # fmt: skip
                expected = {"state": after, "y": replaced(before, slice(None), columns, Near(y[:, columns], magnitude[:, columns]))}
                yield Case("convolve", f"{length} of {taps} taps, {n}, columns {first} to {last}, of {size}", arguments, expected)


HEADS = [(1, 1), (4, 5), (16, 16), (17, 33), (64, 64), (64, 128), (20, 100)]  # P, N


def scan(x: Array, dt: Array, A: float, D: float, B: Array, C: Array, S: Array) -> tuple[Array, Array, Array, Array]:
    """Token by token: y, S, and the same of absolute values."""
    results = []
    for sign in (lambda v: v.astype(np.float64), lambda v: np.abs(v.astype(np.float64))):
        state, outputs = sign(S), []
        for t in range(len(x)):
            decay = np.exp(np.float64(dt[t]) * np.float32(A))
            state = decay * state + np.float64(dt[t]) * np.outer(sign(x[t]), sign(B[t]))
            outputs.append(state @ sign(C[t]) + sign(np.float32(D)) * sign(x[t]))
        results += [np.stack(outputs), state]
    y, state, y_magnitude, state_magnitude = results
    return y, state, y_magnitude, state_magnitude


def step(rng: np.random.Generator) -> Iterator[Case]:
    for P, N in HEADS:
        for dt, decay in ((0.05, 0.9), (3.0, 0.0), (0.0, 1.0), (1e-6, 0.999)):
            x, B, C, S, D = normal(rng, P), normal(rng, N), normal(rng, N), normal(rng, P, N), float(rng.standard_normal())
            kept, added = S.astype(np.float64) * np.float32(decay), np.outer(x.astype(np.float64) * np.float32(dt), B)
            after, sizes = kept + added, np.abs(kept) + np.abs(added)
            y = after @ C.astype(np.float64) + np.float32(D) * x.astype(np.float64)
            magnitude = sizes @ np.abs(C.astype(np.float64)) + np.abs(np.float32(D) * x.astype(np.float64))
            arguments = {"x": x, "dt": dt, "decay": decay, "B": B, "C": C, "D": D, "P": P, "N": N, "S": S, "y": poison(P)}
            yield Case("step", f"{P} x {N}, dt {dt}, decay {decay}", arguments, {"S": near(after, sizes), "y": near(y, magnitude)})


def chunk(rng: np.random.Generator) -> Iterator[Case]:
    lengths = (1, 2, 5, 15, 16, 17, 33, 63, 64)
    for index, (P, N) in enumerate(HEADS):
        for Q in lengths if P < 20 else (*lengths[index % 3 :: 3], 64):
            for A, size in ((-1.0, 1.0), (-30.0, 0.0), (-1e-4, 1.0), (-2000.0, 1.0)):
                x, B, C, S, D = (
                    normal(rng, Q, P),
                    normal(rng, Q, N),
                    normal(rng, Q, N),
                    normal(rng, P, N, size=size),
                    float(rng.standard_normal()),
                )
                dt = (0.1 * rng.random((Q, 1))).astype(np.float32)
                dt[Q // 2] = 0
                y, after, y_magnitude, after_magnitude = scan(x, dt[:, 0], A, D, B, C, S)
                scores = (C.astype(np.float64) @ B.T.astype(np.float64)).astype(np.float32)
                scores[np.triu_indices(Q, 1)] = np.nan  # nobody may look there
                x_stride, dt_stride, bc_stride, y_stride = P + 2, 3, N + 1, P + Q % 2
                arguments = {
                    "Q": Q, "x": spaced(x, x_stride), "x_stride": x_stride, "dt": spaced(dt, dt_stride), "dt_stride": dt_stride,
                    "A": A, "D": D, "scores": scores, "B": spaced(B, bc_stride), "C": spaced(C, bc_stride), "bc_stride": bc_stride,
                    "P": P, "N": N, "S": S,
                    "y": spaced(poison(Q, P), y_stride), "y_stride": y_stride, "scratch": poison(64 * 64 + 64 * (P + 1) + P * N),
                }  # fmt: skip
                expected = {"S": near(after, after_magnitude), "y": near(spaced(y, y_stride), spaced(y_magnitude, y_stride))}
                yield Case("chunk", f"{Q} of {P} x {N}, A {A}", arguments, expected, scratch=("scratch",))


def chunk_scores(rng: np.random.Generator) -> Iterator[Case]:
    for Q in (1, 2, 5, 16, 17, 63, 64):
        for N in (1, 5, 16, 33, 64, 128):
            B, C, stride = normal(rng, Q, N), normal(rng, Q, N), N + Q % 3
            exact, magnitude = C.astype(np.float64) @ B.T.astype(np.float64), np.abs(C.astype(np.float64)) @ np.abs(B.T.astype(np.float64))
            before = poison(Q, Q)
            lower = np.tril_indices(Q)
            arguments = {"Q": Q, "B": spaced(B, stride), "C": spaced(C, stride), "bc_stride": stride, "N": N, "scores": before}
            yield Case("chunk_scores", f"{Q} x {N}", arguments, {"scores": replaced(before, *lower, Near(exact[lower], magnitude[lower]))})


# ---- attention ----------------------------------------------------------------------------------------------------------------


def to_q8(rng: np.random.Generator) -> Iterator[Case]:
    for d in (1, 5, 15, 16, 17, 33, 80, 160):
        rows = {"normal": normal(rng, d), "large": normal(rng, d, size=1e37), "small": normal(rng, d, size=1e-30), "zeros": np.zeros(d)}
        rows |= {"ties": (np.arange(d) - d // 2) / 2, "not finite": np.where(np.arange(d) == d // 2, np.inf, normal(rng, d))}
        rows |= {"largest last": np.arange(d) - 1.5}
        for name, row in rows.items():
            x = row.astype(np.float32)
            codes, scale = q8_of(x) if np.isfinite(x).all() else (np.ma.masked_all(d, np.int8), np.float32(np.nan))
            arguments = {"x": x, "d": d, "codes": poison(d, dtype=np.int8), "scale": poison(1)}
            yield Case("to_q8", f"{d} {name}", arguments, {"codes": codes, "scale": near([scale])})


def q8_of(x: Array) -> tuple[Array, Array]:
    """Codes (..., d) and scales (...) of head vectors, every step in fp32."""
    peak = np.abs(x).max(-1)
    inverse = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 0)
    return np.rint(np.where(np.isfinite(x), x, 0) * inverse[..., None]).astype(np.int8), peak / np.float32(127)


PAGE = 64  # tokens


def pages_of(kv: str, k: Array, v: Array) -> tuple[dict[str, Any], Array, Array, Array]:
    """``KeysValues`` of fp32 keys and values (L, d), in pages that lie backwards, 0xff where no token is; and what they hold: keys,
    values, and the scales of the values (L), 1 for bf16."""
    L, d = k.shape
    count, width = -(-L // PAGE), 2 if kv == "bf16" else 1
    offsets = [7 * 64, 7 * 64 + PAGE * d * width + 64]  # as if other heads lay around this one
    scales = [offsets[1] + PAGE * d * width + 64, offsets[1] + PAGE * (d * width + 4) + 128]
    pages = np.full((count, scales[1] + PAGE * 4 + 64), 0xFF, dtype=np.uint8)
    held, steps = [], np.ones(L, dtype=np.float32)
    for x, at, scale_at in zip((k, v), offsets, scales, strict=True):
        rows, steps = (bf16_of(x), np.ones(L, dtype=np.float32)) if kv == "bf16" else q8_of(x)
        held.append(wide(rows) if kv == "bf16" else rows * steps[:, None].astype(np.float64))
        for page in range(count):
            own = slice(page * PAGE, min(L, (page + 1) * PAGE))
            data = np.ascontiguousarray(rows[own]).view(np.uint8).reshape(-1)
            pages[count - 1 - page, at : at + data.size] = data
            if kv == "q8":
                pages[count - 1 - page, scale_at : scale_at + 4 * len(steps[own])] = steps[own].view(np.uint8)
    arguments = {
        "kv.pages": pages, "kv.order": np.arange(count, dtype=np.int64)[::-1].copy(), "kv.format": KV_FORMATS[kv].number,
        "kv.keys": offsets[0], "kv.values": offsets[1], "kv.key_scales": scales[0], "kv.value_scales": scales[1],
    }  # fmt: skip
    return arguments, *held, steps


def softmax_of(q: Array, k: Array, v: Array, lengths: Array, scale: float, *, steps: Array | None = None, unsure: float = 0.0) -> Near:
    """Attention of queries (T, d) to the first ``lengths`` of keys and values (L, d).

    steps (L): scales of the values, where the queries and the softmax's powers of two (times these) are rounded to bf16, as bf16
    products need them. A number that lies so near a tie that fp32 sums may take it to either side makes the magnitude larger, by
    what that can do to the result. unsure: relative to their root mean square, how far off the queries may be.
    """
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    factor = float(np.float32(scale)) / math.log(2)
    size = np.maximum(np.abs(q), np.sqrt(np.nanmean(q**2)))
    doubt = np.zeros_like(q)
    if steps is not None:
        low, q, high = (wide(bf16_of((q + sign * unsure * size).astype(np.float32))).astype(np.float64) for sign in (-1, 0, 1))
        doubt = high - low
    scores = q @ k.T * factor
    scores[np.arange(len(k)) >= lengths[:, None]] = -np.inf
    weights = np.exp2(scores - np.rint(scores.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True)
    spread = 1 + (np.abs(q) @ np.abs(k).T * factor).max(-1, keepdims=True)  # a score's own rounding, which the exponential passes on
    error = TOLERANCE["attend_many"] * spread + math.log(2) * factor * (doubt @ np.abs(k).T)  # relative, of each weight
    used, slack = weights, weights * error
    if steps is not None:
        low, used, high = (wide(bf16_of((weights * steps * (1 + sign * error)).astype(np.float32))) / steps for sign in (-1, 0, 1))
        slack = slack + (high - low)
    values = used @ v / total
    mean = (slack.sum(-1, keepdims=True) / total) * np.abs(values)  # through the sum that they are divided by
    return Near(values, (slack @ np.abs(v) / total + mean) / TOLERANCE["attend_many"])


def attention(rng: np.random.Generator, kernel: str, lengths: list[tuple[int, int]], heads: Sequence[int]) -> Iterator[Case]:
    """lengths: queries, and tokens before them; the first query sees one token more."""
    for kv in KV_FORMATS:
        for count, past in lengths:
            for d in heads:
                for size in (0.0, 1.0, 30.0):
                    seen = past + 1 + np.arange(count) // (2 if count % 2 == 0 else 1)  # two heads share keys and values
                    L = int(seen[-1])
                    seen = seen[::-1].copy() if past in (60, 62) else seen  # in any order
                    q, k, v = normal(rng, count, d, size=size), normal(rng, L, d), normal(rng, L, d)
                    k[:: L // 3 + 1] *= 3  # for int8: rows of several sizes
                    yield attention_case(f"{kv}, {count} after {past}, heads of {d}, of {size}", kernel, kv, q, k, v, seen)


def awkward_attention(rng: np.random.Generator, kernel: str) -> Iterator[Case]:
    for kv in KV_FORMATS:
        for name, bad in (("query", 0), ("key", 1)):  # what is not a number shows
            q, k, v = (normal(rng, n, 33) for n in (8, 70, 70))
            (q, k)[bad][3, 32] = np.nan
            yield attention_case(f"{kv}, NaN in a {name}", kernel, kv, q, k, v, np.full(8, 70))
        # Only the last key is hidden, from some; of two panels only the second sees a second block of keys.
        for lengths in ([31, 31, 32, 32], [128] * 64 + [129] * 3):
            q, k, v = (normal(rng, n, 16) for n in (len(lengths), lengths[-1], lengths[-1]))
            if kernel == "attend_many" or len(lengths) <= 8:
                yield attention_case(f"{kv}, {len(lengths)} to {lengths[-1]} keys", kernel, kv, q, k, v, np.array(lengths))
        # Two keys, of scores 0 and x from -1 to 1 / 2: nearly 2^x / (1 + 2^x), with little else that rounds.
        q, k, v = (np.array(x, dtype=np.float32)[:, None] for x in (np.linspace(-1, 0.5, 7) * math.log(2), (0, 1), (1e-3, 1)))
        case = attention_case(f"{kv}, powers of two", kernel, kv, q, k, v, np.full(7, 2), scale=1.0)
        yield replace(case, expected={"y": near(case.expected["y"].values, case.expected["y"].values / 2)})


def attention_case(label: str, kernel: str, kv: str, q: Array, k: Array, v: Array, seen: Array, scale: float | None = None) -> Case:
    """Queries (T, d), of which each sees so many of the keys and values (L, d)."""
    (count, d), (pages, keys, values, steps) = q.shape, pages_of(kv, k, v)
    scale = float(np.float32((d / 2) ** -0.5)) if scale is None else scale
    arguments = {"q": q, "y": poison(count, d), "lengths": seen, "count": count, **pages, "d": d, "scale": scale}
    expected = {"y": softmax_of(q, keys, values, seen, scale)}
    if kernel == "attend":
        return Case(kernel, label, arguments, expected)
    arguments["scratch"] = poison(512 * (-(-d // 32) * 32) + 128 * 64 + -(-d // 32) * 32 + 2 * (128 + 64 + 128))
    return Case(kernel, label, arguments, expected, {"y": softmax_of(q, keys, values, seen, scale, steps=steps)}, True, ("scratch",))


def attend(rng: np.random.Generator) -> Iterator[Case]:
    yield from attention(rng, "attend", [(1, 0), (1, 1), (3, 62), (8, 60), (1, 128), (8, 200)], (1, 15, 16, 33, 80, 160))
    yield from attention(rng, "attend", [(2, 700)], (160, 224))
    yield from awkward_attention(rng, "attend")


def attend_many(rng: np.random.Generator) -> Iterator[Case]:
    yield from attention(rng, "attend_many", [(1, 0), (9, 0), (17, 60), (64, 64), (66, 127), (128, 0)], (1, 15, 16, 33, 80, 160))
    yield from attention(rng, "attend_many", [(40, 700)], (160, 224))
    yield from awkward_attention(rng, "attend_many")


MAKERS = {
    maker.__name__: maker
    for maker in (
        quantize, multiply, multiply_many, to_bf16, to_tiles, from_bf16, finite, sum_of_squares, scale_by, add_scaled, gated_norm, geglu,
        convolve, step, chunk, chunk_scores, to_q8, attend, attend_many,
    )
}  # fmt: skip
