"""The engine's threads (csrc/threads.h), without the engine: pieces of work, and who does them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("flags", ["-O2", pytest.param("-O1 -g -fsanitize=thread", marks=pytest.mark.slow)])
def test_pieces_of_work(tmp_path: Path, flags: str) -> None:
    """Every item is done exactly once, no two threads use one index at a time, and what a slow one has left the others do; no data race."""
    program = tmp_path / "pool_check"
    compiler = [os.environ.get("CXX", "c++"), "-std=c++20", "-Wall", "-Wextra", "-Werror", "-pthread", *flags.split(), f"-I{ROOT / 'csrc'}"]
    subprocess.run([*compiler, str(ROOT / "tests/native/pool_check.cpp"), "-o", str(program)], check=True, timeout=240)
    ran = subprocess.run([str(program)], capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-4000:]
