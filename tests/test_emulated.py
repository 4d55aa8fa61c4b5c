"""Instruction sets that this machine may lack, on processors in software with Linux: who may use which, and the same kernel cases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from emulated import Emulated, Machine, missing
from kernel_cases import KERNELS
from kernel_runner import build, of_the_module
from test_kernels import check, check_engine

from zamba2.weights.formats import FORMATS, KV_FORMATS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.timeout(1200),  # the first test builds the program
]

# Bochs's names of processors, and the tables for them. Two have AVX-512 without VNNI or bf16.
PROCESSORS = {
    "corei5_lynnfield_750": ["scalar"],
    "corei7_sandy_bridge_2600k": ["scalar"],
    "corei7_haswell_4770": ["scalar", "avx2"],
    "ryzen": ["scalar", "avx2"],
    "corei7_skylake_x": ["scalar", "avx2"],
    "corei7_icelake_u": ["scalar", "avx2", "avx512"],
    "arrow_lake": ["scalar", "avx2", "avxvnni"],
    "sapphire_rapids": ["scalar", "avx2", "avxvnni", "avx512", "avx512bf16", "amx"],
}
NEW = PROCESSORS["sapphire_rapids"][2:]


@pytest.fixture(scope="session")
def program() -> Path:
    return build("kernel-runner-static", of_the_module(), "-DCMAKE_EXE_LINKER_FLAGS=-static")


@pytest.fixture(scope="session")
def runner(program: Path) -> Iterator[Emulated]:
    machine = Machine("sapphire_rapids", program)
    yield Emulated(machine)
    machine.close()


@pytest.mark.parametrize("processor", PROCESSORS)
def test_dispatch(program: Path, processor: str) -> None:
    """A processor gets the tables whose instructions it has and Linux lets it use, no others, and they answer a prompt."""
    machine = Machine(processor, program)
    try:
        runner = Emulated(machine)
        tables = [name for name in runner.tables if not name.endswith("_stand_in")]
        assert tables == PROCESSORS[processor]
        check_engine(runner, tables[-1], tables[-1], "q4", "bf16")
    finally:
        machine.close()


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel(runner: Emulated, kernel: str) -> None:
    """A kernel gives its reference's results on every instruction set that an emulated processor has."""
    check(runner, kernel, NEW)


@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", NEW)
def test_engine(runner: Emulated, isa: str, format: str, kv: str) -> None:
    """A prompt through such kernels, in two threads of one processor, gives the twin's logits as near as rounding allows."""
    check_engine(runner, isa, isa, format, kv)
