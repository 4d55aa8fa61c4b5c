"""The kernels for GPUs as their compiler sees them, on machines that have none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton_interpreter  # noqa: F401

pytest.importorskip("triton")

from zamba2.model.ops import triton_linear, triton_scan

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "gpu_compile.py"
CARD = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("kib", "wanted", "size", "found"),
    [(228, 4, 48 << 10, 4), (100, 4, 48 << 10, 2), (100, 6, 16896, 6), (100, 3, 32 << 10, 3), (100, 3, 112 << 10, 1)],
)
def test_stages_fit_into_shared_memory(kib: int, wanted: int, size: int, found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product has the stages it is tuned to, or as many as a program's shared memory holds."""
    about = SimpleNamespace(shared_memory_per_multiprocessor=kib << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    assert triton_linear.stages_for(wanted, size, CARD) == found
    assert triton_linear.stages_for(wanted, size, torch.device("cpu")) == wanted


@pytest.mark.parametrize(("capability", "options"), [((8, 9), {}), ((9, 0), {"maxnreg": 168}), ((12, 0), {})])
def test_registers_are_held_on_hopper_alone(capability: tuple[int, int], options: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The scan's limit of registers is Hopper's: elsewhere it would put hundreds of bytes of a thread into memory."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert triton_scan.registers(SimpleNamespace(device=CARD), 168) == options  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "model", "kind"),
    [("_matmul", "2.7b", "bfloat16"), ("_matmul_packed", "2.7b", "q4"), ("_attend", "7b", "float32"), ("_output", "2.7b", "bfloat16")],
)
def test_kernels_start_on_a_consumer_card(kernel: str, model: str, kind: str) -> None:
    """At the models' shapes no variant wants more than the 99 KiB of shared memory that such cards have; Triton's own compiler says so."""
    line = [sys.executable, str(SCRIPT), "--arch", "8.9", "--model", model, "--kind", kind, "--kernel", kernel]
    run = subprocess.run(line, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (row,) = json.loads(run.stdout.splitlines()[-1])["kernels"]
    assert row["kernel"] == kernel and row["variants"] >= 3 and not row["errors"] and 0 < row["shared"] <= 99 << 10
