"""Those we are measured beside: what each needs, and the child process in which it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zamba2.bench import llama_cpp_peer
from zamba2.config import Config
from zamba2.errors import Zamba2Error, notice
from zamba2.weights.files import replacing
from zamba2.weights.hub import cache_folder

__all__ = ["PEERS", "Worker", "llama_cpp_folder", "llama_cpp_python", "need_disk", "random_checkpoint"]

TRANSFORMERS = "5.23.0"


def need_disk(target: Path, nbytes: float) -> None:
    """Raises Zamba2Error unless the target's file system has room for so many bytes."""
    import shutil

    folder = next(parent for parent in (target, *target.parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        room = f"{folder} has {free / 1e9:.1f} GB free"
        raise Zamba2Error(f"{target} needs {nbytes / 1e9:.1f} GB and {room}; free some space or set XDG_CACHE_HOME.")


class Worker:
    """A child process that says one line of JSON when it is ready, and one for every line it is sent."""

    def __init__(self, name: str, command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        variables = os.environ | (environment or {})
        self._process = subprocess.Popen(list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables)
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
                if "error" in answer:
                    raise Zamba2Error(answer["error"])
                return answer
        code = self._process.wait()
        reason = "was stopped by the system, for want of memory as a rule" if code == -9 else f"ended with exit code {code}"
        raise Zamba2Error(f"the process that measures {self.name} {reason}; what it said is above.")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


@dataclass(frozen=True)
class Peer:
    """prepare: makes what the peer needs for a config (and, if the user gave one, a checkpoint folder) and returns the command of
    its worker, to which the request is appended. Raises Zamba2Error, saying what to install."""

    title: str
    prepare: Callable[[Config, Path | None], list[str | Path]]


def prepare_transformers(config: Config, checkpoint: Path | None, dtype: str) -> list[str | Path]:
    if find_spec("transformers") is None or find_spec("torch") is None:
        raise Zamba2Error(f"transformers is not installed; install it with: pip install 'zamba2[hf]' (transformers {TRANSFORMERS}).")
    module = [sys.executable, "-m", "zamba2.bench.transformers_peer"]
    if checkpoint is None:
        checkpoint = random_checkpoint(config)
        if not (checkpoint / "config.json").exists():
            need_disk(checkpoint, 2.02 * config.num_parameters)
            notice(f"writing random bf16 weights for transformers into {checkpoint}, once.")
            with replacing(checkpoint) as temporary:
                write_by([*module, "write", json.dumps(config.to_dict()), temporary])
    return [*module, "run", checkpoint, dtype]


def write_by(command: Sequence[str | Path]) -> None:
    """Run a child that writes weights; its memory is gone afterwards. Raises Zamba2Error."""
    code = subprocess.run(command, stdout=2).returncode  # what it prints is no result
    if code:
        raise Zamba2Error(f"a rival's random weights could not be written (exit code {code}); what went wrong is above.")


def random_checkpoint(config: Config) -> Path:
    """Where transformers' random bf16 checkpoint of a config is kept."""
    import hashlib

    from zamba2.config import PRESETS

    published = [name for name, preset in PRESETS.items() if preset == config]
    name = published[0] if published else hashlib.sha256(json.dumps(config.to_dict()).encode()).hexdigest()[:12]
    return cache_folder().with_name("zamba2-baselines") / f"zamba2-{name}-random-bfloat16"


def llama_cpp_folder() -> Path:
    """Where scripts/llama_cpp.py builds llama.cpp and where its model is kept."""
    return cache_folder() / "llama.cpp"


def llama_cpp_python() -> Path | None:
    """The interpreter that has llama.cpp, or None."""
    environment = llama_cpp_folder() / "venv"
    return environment / "bin" / "python" if any(environment.glob("lib/python*/site-packages/llama_cpp/__init__.py")) else None


def prepare_llama_cpp(config: Config, checkpoint: Path | None) -> list[str | Path]:
    python = llama_cpp_python()
    if python is None:
        raise Zamba2Error("llama.cpp is not built; build it from the repository with: python scripts/llama_cpp.py install")
    weights = config.weights_per_token(hoisted=False)
    model = llama_cpp_folder() / f"dense-{weights / 1e9:.3f}G-q4_0.gguf"
    if not model.exists():
        need_disk(model, 0.6 * weights + 1e8)  # 4.5 bits each, and the embeddings
        notice(f"writing a dense model of {weights / 1e9:.2f} G random weights per token in Q4_0 into {model}, once.")
        with replacing(model) as temporary:
            write_by([python, llama_cpp_peer.__file__, "write", str(weights), temporary])
    return [python, llama_cpp_peer.__file__, "run", model]


PEERS = {
    "transformers": Peer("transformers, bf16", partial(prepare_transformers, dtype="bfloat16")),
    # what processors without bf16 products are served better by
    "transformers-fp32": Peer("transformers, fp32", partial(prepare_transformers, dtype="float32")),
    "llama.cpp": Peer("llama.cpp, Q4_0, dense stand-in", prepare_llama_cpp),
}
