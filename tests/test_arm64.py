"""The arm64 build, cross-compiled and run under an emulator: the same kernels on the same cases, and whole models."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from kernel_cases import KERNELS, bits
from kernel_runner import Runner, build
from native_cases import BACKBONE, CONFIGS, engine_arguments, error, native
from strategies import random_tokens
from test_kernels import AFTER_FLIPS, AFTER_ROUNDING, EXACT, check

from zamba2.weights.formats import FORMATS

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [program for program in (COMPILER, EMULATOR) if not shutil.which(program)]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not found (Debian: g++-aarch64-linux-gnu, qemu-user)"),
    pytest.mark.timeout(1200),  # the first test builds the program
]

# Processors by qemu's names, and the tables they have.
PROCESSORS = {
    "cortex-a53": ["scalar", "neon"],
    "neoverse-n1": ["scalar", "neon", "neon_dotprod"],
    "max": ["scalar", "neon", "neon_dotprod", "neon_i8mm"],
}
NEON = PROCESSORS["max"][1:]


@pytest.fixture(scope="session")
def program() -> str:
    return str(build(
        "kernel-runner-arm64", f"-DCMAKE_CXX_COMPILER={COMPILER}", "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    ))  # fmt: skip


@pytest.mark.parametrize("processor", PROCESSORS)
def test_dispatch(program: str, processor: str) -> None:
    """A processor gets the tables whose instructions it has, and no others."""
    assert list(Runner(EMULATOR, "-cpu", processor, program).tables) == PROCESSORS[processor]


@pytest.mark.parametrize("tables", [pytest.param(["scalar"], marks=pytest.mark.slow, id="scalar"), pytest.param(NEON, id="neon")])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel(program: str, kernel: str, tables: list[str]) -> None:
    """A kernel gives its reference's results on all arm64 instruction sets (the plain one takes the emulator longest)."""
    check(Runner(EMULATOR, "-cpu", "max", program), kernel, tables)


@pytest.mark.parametrize("kernel", ["multiply", "multiply_many"])
def test_products_without_i8mm(program: str, kernel: str) -> None:
    """Products need no instruction that a processor without i8mm lacks."""
    check(Runner(EMULATOR, "-cpu", "neoverse-n1", program), kernel, NEON)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["1.2b", "7b", "backbone"])
def test_engine(program: str, name: str, format: str) -> None:
    """A whole model gives on arm64 the logits of the plain x86-64 table as near as rounding allows (single tokens, short calls and a
    prompt, two threads), and the same bits on every NEON table."""
    config, lengths = {**CONFIGS, "backbone": BACKBONE}[name], [1, 1, 3, 8, 1, 70, 1, 9]
    tokens = random_tokens(config, 5, sum(lengths)).numpy().astype(np.int32)
    kv = "q8" if format == "q8" else "bf16"
    engine = native(config, format, "scalar", kv=kv).engine
    state = engine.new_state()
    expected = np.concatenate([engine.forward([state], [part], [len(part)]) for part in np.split(tokens, np.cumsum(lengths)[:-1])])
    runner, arguments = Runner(EMULATOR, "-cpu", "max", program), engine_arguments(config, format, tokens, lengths, kv)
    found = {table: runner.call(table, [("engine", arguments)])[0]["logits"] for table in runner.tables}
    bound = (EXACT if name == "backbone" else AFTER_ROUNDING) if format == "bf16" else AFTER_FLIPS
    assert max(error(logits, expected) for logits in found.values()) <= bound
    assert all(np.array_equal(bits(found[table]), bits(found["neon"])) for table in ("neon_dotprod", "neon_i8mm"))
