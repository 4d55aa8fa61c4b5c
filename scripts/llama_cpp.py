#!/usr/bin/env python3
"""llama.cpp beside us: builds PyPI's llama-cpp-python for this machine, in an environment of its own, and measures both.

    python scripts/llama_cpp.py install     # some ten minutes on two cores; needs a C++ compiler
    python scripts/llama_cpp.py             # installs it if need be, then: zamba2 bench --compare llama.cpp

It cannot run Zamba2. Its stand-in is a dense Llama with random weights in Q4_0, as many per token (3.855 G) as Zamba2-2.7B
applies; zamba2/bench/llama_cpp_peer.py says which. Further arguments go to zamba2 bench.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv

from zamba2.bench.peers import llama_cpp_folder, llama_cpp_python

# -march=native, but without its AMX code, which crashed when built by gcc 12. It is compiled where this macro is defined, and
# -march=native defines it whatever its own options say.
FLAGS = "-DGGML_NATIVE=ON -DCMAKE_C_FLAGS=-U__AMX_INT8__ -DCMAKE_CXX_FLAGS=-U__AMX_INT8__"


def install() -> None:
    if llama_cpp_python() is not None:
        return
    folder = llama_cpp_folder() / "venv"
    print(f"building llama-cpp-python in {folder}; this takes some minutes.", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True, clear=True)
    environment = os.environ | {"CMAKE_ARGS": FLAGS, "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
    pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--no-binary", "llama-cpp-python"]
    subprocess.run([*pip, "llama-cpp-python", "gguf"], check=True, env=environment, stdout=sys.stderr)


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    install()
    if arguments != ["install"]:
        command = [sys.executable, "-m", "zamba2", "bench", "--compare", "llama.cpp", *arguments]
        sys.exit(subprocess.run(command).returncode)


if __name__ == "__main__":
    main()
