"""Zamba2 language models: load, generate, chat. ``zamba2.load("2.7b-instruct").generate("...")``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from zamba2.config import Config
    from zamba2.errors import Zamba2Error
    from zamba2.language.model import LanguageModel
    from zamba2.runtime.backend import Backend

__all__ = ["Config", "Zamba2Error", "__version__", "load"]
__version__ = "0.1.0"


def load(
    path_or_id: str | Path = "demo", *, backend: str | Backend | None = None, device: str | None = None, dtype: str | None = None,
    format: str | None = None, kv: str | None = None, threads: int | None = None, pin: bool | None = None,
    adapter: str | Path | None = None, revision: str | None = None, offline: bool = False,
) -> LanguageModel:  # fmt: skip
    """Load a model: a folder, a ``.pt`` file, a Hub id, an alias such as "2.7b-instruct", or "demo", the embedded one.

    backend: "native" (packed weights on the CPU), "torch", a loaded ``Backend``, or None: torch where it can use a GPU or a
    device or dtype is given, and for ``.pt`` files, else native. format: "q4", "q8" or "bf16"; a checkpoint that is not
    packed is packed into the user's cache on first use, as q4 if none is given (small models: as bf16, for this run alone).
    kv: "bf16" (the default) or "q8", for the keys and values of native. threads, pin (to processors): for native, by default
    one for each core, unpinned, or what ZAMBA2_THREADS and ZAMBA2_PIN say. device, dtype ("float32", "bfloat16", "float16"): for torch;
    with device "cuda" it runs packed checkpoints, and formats, too. adapter: folder of a LoRA adapter (peft) for the native engine, added
    at run time to every answer. revision (branch, tag or commit), offline (what is downloaded alone): of the Hub. Raises Zamba2Error.
    """
    from zamba2.api import load as load_model

    return load_model(
        path_or_id, backend=backend, device=device, dtype=dtype, format=format, kv=kv, threads=threads, pin=pin, adapter=adapter,
        revision=revision, offline=offline,
    )  # fmt: skip


def __getattr__(name: str) -> Any:
    """Config and Zamba2Error on first use: importing the package must cost nothing."""
    if name == "Config":
        from zamba2.config import Config

        return Config
    if name == "Zamba2Error":
        from zamba2.errors import Zamba2Error

        return Zamba2Error
    raise AttributeError(f"module 'zamba2' has no attribute {name!r}")
