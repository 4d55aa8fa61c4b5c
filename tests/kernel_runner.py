"""Builds tests/native/kernel_runner.cpp with CMake, and makes it call kernels: on this machine or under an emulator."""

from __future__ import annotations

import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from kernel_cases import as_array

__all__ = ["Runner", "build", "of_the_module"]

ROOT = Path(__file__).resolve().parent.parent
Array = npt.NDArray[Any]


class Runner:
    """A built runner; ``command`` starts it: an emulator with its options, if any, and the program. What fails is an AssertionError."""

    def __init__(self, *command: str) -> None:
        self.command = command
        listed = self._start().split()
        self.tables, self.matrix_units, self.bf16_products = listed[::3], set[str](), set[str]()
        for name, units, products in zip(*(listed[i::3] for i in range(3)), strict=True):
            self.matrix_units.update({name} if units == "1" else ())
            self.bf16_products.update({name} if products == "1" else ())

    def _start(self, *arguments: str) -> str:
        ran = subprocess.run([*self.command, *arguments], capture_output=True, text=True, timeout=240)
        assert ran.returncode == 0, f"{' '.join(self.command)}: exit code {ran.returncode}\n{ran.stderr}"
        return ran.stdout

    def call(self, table: str, calls: Sequence[tuple[str, dict[str, Any]]]) -> list[dict[str, Array]]:
        """The arguments of every (function, arguments) as they are after the call."""
        parts: list[bytes] = []

        def text(value: str) -> None:
            parts.extend((struct.pack("<Q", len(value)), value.encode()))

        arrays = [{name: as_array(value) for name, value in arguments.items()} for _, arguments in calls]
        for (function, _), arguments in zip(calls, arrays, strict=True):
            text(function)
            parts.append(struct.pack("<Q", len(arguments)))
            for name, array in arguments.items():
                text(name)
                text(array.dtype.str[1:])
                parts.extend((struct.pack("<Q", array.nbytes), array.tobytes()))
        with tempfile.TemporaryDirectory(prefix="zamba2-kernels-") as folder:
            cases, results = Path(folder) / "cases", Path(folder) / "results"
            cases.write_bytes(b"".join(parts))
            self._start(table, str(cases), str(results))
            data, at = results.read_bytes(), 0
        found = []
        for arguments in arrays:
            after = {}
            for name, array in arguments.items():
                after[name] = np.frombuffer(data, array.dtype, array.size, at).reshape(array.shape)
                at += array.nbytes
            found.append(after)
        assert at == len(data)
        return found


def of_the_module() -> str:
    """CMake's option to test the very objects that the module is linked of, where they lie in this clone and no source is newer;
    to compile the same again takes minutes."""
    newest = max(file.stat().st_mtime for file in (*(ROOT / "csrc").iterdir(), ROOT / "CMakeLists.txt"))
    for folder in sorted((ROOT / "build").glob("cp*/CMakeFiles/_engine.dir")):
        objects = [folder / "csrc" / f"{file.name}.o" for file in (ROOT / "csrc").glob("*.cpp") if "neon" not in file.name]
        if all(file.exists() and file.stat().st_mtime >= newest for file in objects):
            return f"-DZAMBA2_OBJECTS={folder}"
    return "-DZAMBA2_OBJECTS="


def build(name: str, *options: str) -> Path:
    """The program, built by CMake in build/NAME, where later sessions find it; options are CMake's."""
    folder, own = ROOT / "build" / name, Path(sys.executable).parent / "cmake"
    cmake = str(own) if own.exists() else "cmake"
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(folder), "-DZAMBA2_RUNNER=ON", *options],
        [cmake, "--build", str(folder), "--parallel", "2"],
    ):
        ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert ran.returncode == 0, ran.stdout[-4000:]
    return folder / "kernel_runner"
