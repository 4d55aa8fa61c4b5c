"""Those we are measured beside: what each needs, and the child process in which it runs."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zamba2.bench import llama_cpp_peer
from zamba2.bench.rivals import parameters
from zamba2.config import PRESETS, Config
from zamba2.errors import Zamba2Error, install, notice
from zamba2.weights.files import replacing
from zamba2.weights.hub import cache_folder

__all__ = [
    "PEERS", "BeyondLimits", "DoesNotFit", "Limits", "Worker", "llama_cpp", "llama_cpp_folder", "llama_cpp_python", "need_disk",
    "peer_bytes", "random_checkpoint", "written_checkpoint",
]  # fmt: skip

TRANSFORMERS = "5.23.0"


def need_disk(target: Path, nbytes: float) -> None:
    """Raises Zamba2Error unless the target's file system has room for so many bytes."""
    import shutil

    folder = next(parent for parent in (target, *target.parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        room = f"{folder} has {free / 1e9:.1f} GB free"
        raise Zamba2Error(f"{target} needs {nbytes / 1e9:.1f} GB and {room}; free some space or set XDG_CACHE_HOME.")


@dataclass(frozen=True)
class Limits:
    """memory: bytes that a process may hold, mapped files included. end: when it is stopped, by time.monotonic()."""

    memory: float = math.inf
    end: float = math.inf


class BeyondLimits(Zamba2Error):
    """A process was stopped at its limits."""


class DoesNotFit(BeyondLimits):
    """It took more memory than it may."""


class Worker:
    """A child process that says one line of JSON when it is ready, and one for every line it is sent.

    quiet: what it says otherwise is kept for the sentence of its failure.

    The constructor and ``ask`` raise BeyondLimits where the process was stopped at its limits, Zamba2Error where it fails.
    """

    def __init__(
        self, name: str, command: Sequence[str | Path], environment: Mapping[str, str] | None = None, *, limits: Limits | None = None,
        quiet: bool = False,
    ) -> None:  # fmt: skip
        self.name = name
        self._said = tempfile.TemporaryFile() if quiet else None  # noqa: SIM115 - closed by close()
        self._beyond: BeyondLimits | None = None
        variables = os.environ | (environment or {})
        # In a session of its own: Ctrl-C is for the parent, which closes it.
        self._process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, env=variables,
            start_new_session=True,
        )  # fmt: skip
        if limits is not None:
            threading.Thread(target=self._watch, args=(limits,), daemon=True).start()
        try:
            self.ready = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, line: str) -> dict[str, Any]:
        """Send one line; returns its answer. Raises Zamba2Error if the process fails."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: reading tells
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # a library may print something too
                answer: dict[str, Any] = json.loads(line)
                if "does not fit" in answer:
                    raise DoesNotFit(answer["does not fit"])
                if "error" in answer:
                    raise Zamba2Error(answer["error"])
                return answer
        code = self._process.wait()
        if self._beyond is not None:
            raise self._beyond
        reason = "was stopped by the system, for want of memory as a rule" if code == -9 else f"ended with exit code {code}"
        raise Zamba2Error(f"the process that measures {self.name} {reason}; {self._last_words()}")

    def _last_words(self) -> str:
        if self._said is None:
            return "what it said is above."
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return f"it said last: {lines[-1]}" if lines else "it said nothing."

    def _watch(self, limits: Limits) -> None:
        """Stop the process where it goes beyond its limits."""
        while self._process.poll() is None:
            if (held := resident(self._process.pid)) > limits.memory:
                self._beyond = DoesNotFit(f"took more than the {limits.memory / 1e9:.1f} GB that it may ({held / 1e9:.1f} GB)")
            elif time.monotonic() > limits.end:
                self._beyond = BeyondLimits("was stopped when the time was up")
            if self._beyond is not None:
                self._process.kill()
                return
            time.sleep(0.1)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            if pipe is not None:
                pipe.close()


def resident(pid: int) -> int:
    """Bytes of memory that a process holds now; 0 where it has ended."""
    status = Path(f"/proc/{pid}/status")
    try:
        if status.parent.parent.joinpath("self").exists():
            return next((int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmRSS")), 0)
        return int(subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True).stdout.strip() or 0) * 1024
    except OSError:
        return 0


def prepare_transformers(config: Config, checkpoint: Path | None, dtype: str) -> list[str | Path]:
    if find_spec("transformers") is None or find_spec("torch") is None:
        raise Zamba2Error(f"transformers {TRANSFORMERS} is not installed; {install('hf')}.")
    module = [sys.executable, "-m", "zamba2.bench.transformers_peer"]
    return [*module, "run", checkpoint or written_checkpoint(config), dtype]


def write_by(command: Sequence[str | Path]) -> None:
    """Run a child that writes weights; its memory is gone afterwards. Raises Zamba2Error."""
    code = subprocess.run(command, stdout=2).returncode  # what it prints is no result
    if code:
        raise Zamba2Error(f"a rival's random weights could not be written (exit code {code}); what went wrong is above.")


def random_checkpoint(config: Config) -> Path:
    """Where transformers' random bf16 checkpoint of a config is kept."""
    published = [name for name, preset in PRESETS.items() if preset == config]
    name = published[0] if published else hashlib.sha256(json.dumps(config.to_dict()).encode()).hexdigest()[:12]
    return cache_folder().with_name("zamba2-baselines") / f"zamba2-{name}-random-bfloat16"


def written_checkpoint(config: Config) -> Path:
    """``random_checkpoint``, made on first use. Raises Zamba2Error."""
    target = random_checkpoint(config)
    if not (target / "config.json").exists():
        need_disk(target, 2.02 * config.num_parameters)
        notice(f"writing random bf16 weights for transformers into {target}, once.")
        with replacing(target) as temporary:
            write_by([sys.executable, "-m", "zamba2.bench.transformers_peer", "write", json.dumps(config.to_dict()), temporary])
    return target


def llama_cpp_folder() -> Path:
    """Where scripts/llama_cpp.py builds llama.cpp and where its model is kept."""
    return cache_folder() / "llama.cpp"


def llama_cpp_python() -> Path | None:
    """The interpreter that has llama.cpp, or None."""
    environment = llama_cpp_folder() / "venv"
    return environment / "bin" / "python" if any(environment.glob("lib/python*/site-packages/llama_cpp/__init__.py")) else None


def prepare_llama_cpp(config: Config, checkpoint: Path | None) -> list[str | Path]:
    weights = config.weights_per_token(hoisted=False)
    return llama_cpp({**llama_cpp_peer.stand_in(weights), "name": f"dense-{weights / 1e9:.3f}G"})


def llama_cpp(spec: llama_cpp_peer.Spec) -> list[str | Path]:
    """The command that runs llama.cpp on random Q4_0 weights of a shape (``llama_cpp_peer.py write``), made on first use."""
    python = llama_cpp_python()
    if python is None:
        raise Zamba2Error("llama.cpp is not built; build it from the repository with: python scripts/llama_cpp.py install")
    weights = parameters(spec)
    mark = hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:12]
    model = llama_cpp_folder() / f"{spec['name']}-q4_0-{mark}.gguf"
    if not model.exists():
        need_disk(model, 0.6 * weights + 1e8)  # 4.5 bits each
        notice(f"writing {spec['name']}, {weights / 1e9:.2f} G random weights in Q4_0, into {model}, once.", once=False)
        with replacing(model) as temporary:
            write_by([python, llama_cpp_peer.__file__, "write", json.dumps(spec), temporary])
    return [python, llama_cpp_peer.__file__, "run", model]


# Each makes what the peer needs for a config (or for the user's own checkpoint folder) and returns the command of its worker, to which the
# request is appended. They raise Zamba2Error, saying what to install.
PEERS: dict[str, Callable[[Config, Path | None], list[str | Path]]] = {
    "transformers": partial(prepare_transformers, dtype="bfloat16"),
    "transformers-fp32": partial(prepare_transformers, dtype="float32"),  # what processors without bf16 products are served better by
    "llama.cpp": prepare_llama_cpp,  # a dense stand-in in Q4_0
}


def peer_bytes(name: str, config: Config) -> float:
    """Of memory that a peer's weights take. llama.cpp keeps its mapped file and a copy of it in another order."""
    if name == "llama.cpp":
        return 2 * 18 / 32 * config.weights_per_token(hoisted=False)
    return {"transformers": 2, "transformers-fp32": 4}[name] * config.num_parameters
