"""Every kernel equals its reference on every instruction set of this machine: one table of cases, results and states."""

from __future__ import annotations

import re
from collections.abc import Collection

import numpy as np
import pytest
from kernel_cases import KERNELS, TOLERANCE, Case, bits, cases, largest_error
from kernel_runner import ROOT, Runner, build, of_the_module
from native_cases import CONFIGS, as_twin, engine_arguments, error, rounds_attention, twin, uses_units
from strategies import random_tokens

from zamba2 import _engine
from zamba2.weights.formats import FORMATS, KV_FORMATS

# Relative error of a model's logits, by norm: where nothing is rounded on the way; where keys and values near a tie between two bf16
# numbers may go either way (measured: 1.5e-3 at most); where int8 codes, or the bf16 inputs of matrix units, may (3e-2 at most).
EXACT, AFTER_ROUNDING, AFTER_FLIPS = 1e-5, 5e-3, 0.1

pytestmark = pytest.mark.timeout(1200)  # the first test builds the program


@pytest.fixture(scope="session")
def runner() -> Runner:
    return Runner(str(build("kernel-runner", of_the_module())))


def test_every_kernel_has_cases(runner: Runner) -> None:
    """No function of struct Kernels lacks cases, and no instruction set that the engine may choose here goes untested."""
    struct = (ROOT / "csrc" / "kernels.h").read_text().split("struct Kernels {")[1].split("\n};")[0]
    declared = re.findall(r"\(\*(\w+)\)\(", struct)
    assert sorted(declared) == sorted(KERNELS)
    assert set(_engine.available()) <= set(runner.tables)


def check(runner: Runner, kernel: str, tables: Collection[str] | None = None) -> None:
    """Fail, naming tables and cases, unless all results of a kernel are within its tolerance, and rows the same bits in any company.

    tables: those alone; without, all that the runner has.
    """
    table = cases(kernel)
    wrong = []
    for name in runner.tables if tables is None else [name for name in runner.tables if name in tables]:
        found = runner.call(name, [(case.kernel, case.arguments) for case in table])
        for case, result in zip(table, found, strict=True):
            in_bf16 = name in (runner.bf16_products if case.pairs else runner.matrix_units)
            if (worst := largest_error(case, result, in_bf16)) > TOLERANCE[kernel]:
                wrong.append(f"{name}, {case}: {worst:.1e}")
        wrong += [f"{name}, {case}: other bits than in other company" for case in other_bits(table, found)]
    assert not wrong, "\n".join(wrong[:20])


def other_bits(table: list[Case], found: list[dict[str, np.ndarray]]) -> list[Case]:
    """Cases whose rows differ by a bit from the same rows of an earlier case that shares their weights and activations."""
    seen: dict[tuple[str, int], np.ndarray] = {}
    differ = []
    for case, result in zip(table, found, strict=True):
        for i, row in enumerate(result["y"] if case.shares else ()):
            earlier = seen.setdefault((case.shares, case.first_row + i), np.full(1 << 11, np.nan, dtype=np.float32))[: len(row)]
            both = ~np.isnan(row) & ~np.isnan(earlier)
            if (bits(row)[both] != bits(earlier)[both]).any():
                differ.append(case)
            np.copyto(earlier, row, where=np.isnan(earlier))
    return differ


def check_engine(runner: Runner, table: str, isa: str, format: str, kv: str) -> None:
    """Fail unless a prompt through a table's kernels gives all models' twins' logits as near as rounding allows, where the twins round
    as an instruction set does."""
    for config in CONFIGS.values():
        tokens = random_tokens(config, 3, 70)
        found = runner.call(table, [("engine", engine_arguments(config, format, tokens.numpy(), [70], kv))])[0]["logits"]
        with as_twin(format, units=uses_units(isa, format), attention=rounds_attention(isa), kv=kv):
            expected = twin(config, format)(tokens[None], state=twin(config, format).new_state())[0]
        exact = format == "bf16" and not rounds_attention(isa)
        assert error(found, expected) <= (AFTER_ROUNDING if exact else AFTER_FLIPS)


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel(runner: Runner, kernel: str) -> None:
    """A kernel gives its reference's results for every case and instruction set, and touches nothing else."""
    check(runner, kernel)


@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", ["avx512", "avx512bf16", "amx"])
def test_engine_in_software(runner: Runner, isa: str, format: str, kv: str) -> None:
    """A prompt through kernels whose instructions are in software gives the twin's logits as near as rounding allows."""
    if f"{isa}_stand_in" not in runner.tables:
        pytest.skip("this machine has no AVX2")
    check_engine(runner, f"{isa}_stand_in", isa, format, kv)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_under_sanitizers(kernel: str) -> None:
    """No case makes a kernel read or write out of bounds, overflow an integer or do else what C++ leaves undefined."""
    flags = "-DCMAKE_CXX_FLAGS=-O1 -fsanitize=address,undefined -fno-sanitize-recover=all"
    check(Runner(str(build("kernel-runner-sanitized", "-DCMAKE_BUILD_TYPE=Debug", flags))), kernel)
