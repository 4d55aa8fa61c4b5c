"""Programs whose imports take ten seconds, begun in a moment: forked from a process that has imported them and done nothing else."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path

import huggingface_hub.constants

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["zamba2.train.run", "zamba2.commands.train", "torch.distributed.tensor"])


def begin(program: str, arguments: list[str], environment: dict[str, str], streams: tuple[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = [program, *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    importlib.reload(huggingface_hub.constants)  # the environment that was read when it was imported is another now
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


class Forked:
    """A module or file run as a program, with what it wrote in `out` and `said` when it has ended."""

    def __init__(self, program: str, arguments: list[str], **environment: str) -> None:
        folder = Path(tempfile.mkdtemp(prefix="forked-", dir=os.environ["XDG_STATE_HOME"]))
        self.streams = str(folder / "out"), str(folder / "said")
        self.process = SERVER.Process(target=begin, args=(program, arguments, {**os.environ, **environment}, self.streams))
        self.process.start()
        self.out = self.said = ""

    def running(self) -> bool:
        return self.process.is_alive()

    def send(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def ended(self, timeout: float = 240) -> int:
        """Wait for the end; the exit code."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"still running after {timeout} seconds")
        self.out, self.said = (Path(path).read_text() for path in self.streams)
        return self.process.exitcode
