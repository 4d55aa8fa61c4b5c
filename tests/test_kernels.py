"""Every kernel equals its reference on every instruction set of this machine: one table of cases, results and states."""

from __future__ import annotations

import re

import numpy as np
import pytest
from kernel_cases import KERNELS, TOLERANCE, Case, bits, cases, error
from kernel_runner import ROOT, Runner, build

from zamba2 import _engine


@pytest.fixture(scope="session")
def runner() -> Runner:
    return Runner(str(build("kernel-runner")))


def test_every_kernel_has_cases(runner: Runner) -> None:
    """No function of struct Kernels lacks cases, and no instruction set that the engine may choose here goes untested."""
    declared = re.findall(r"\(\*(\w+)\)\(", (ROOT / "csrc" / "kernels.h").read_text())
    assert sorted(declared) == sorted(KERNELS)
    assert set(_engine.available()) <= set(runner.tables)


def check(runner: Runner, kernel: str) -> None:
    """Fail, naming tables and cases, unless all results of a kernel are within its tolerance, and rows the same bits in any company."""
    table = cases(kernel)
    wrong = []
    for name, units in runner.tables.items():
        found = runner.call(name, [(case.kernel, case.arguments) for case in table])
        for case, result in zip(table, found, strict=True):
            if (worst := error(case, result, units)) > TOLERANCE[kernel]:
                wrong.append(f"{name}, {case}: {worst:.1e}")
        wrong += [f"{name}, {case}: other bits than in other company" for case in other_bits(table, found)]
    assert not wrong, "\n".join(wrong[:20])


def other_bits(table: list[Case], found: list[dict[str, np.ndarray]]) -> list[Case]:
    """Cases whose rows differ by a bit from the same rows of an earlier case that shares their weights and activations."""
    seen: dict[tuple[str, int, int], int] = {}
    differ = []
    for case, result in zip(table, found, strict=True):
        if not case.shares:
            continue
        for i, row in enumerate(bits(result["y"])):
            for column in np.flatnonzero(~np.isnan(result["y"][i])):
                if seen.setdefault((case.shares, case.arguments["row"] + i, int(column)), int(row[column])) != row[column]:
                    differ.append(case)
    return differ


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel(runner: Runner, kernel: str) -> None:
    """A kernel gives its reference's results for every case and instruction set, and touches nothing else."""
    check(runner, kernel)
