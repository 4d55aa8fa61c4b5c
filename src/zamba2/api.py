"""From a name to a running model: the one place where a backend is chosen."""

from __future__ import annotations

import hashlib
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zamba2.config import Config
from zamba2.errors import Zamba2Error, notice
from zamba2.language.model import LanguageModel
from zamba2.language.tokenizer import Tokenizer
from zamba2.runtime.backend import Backend
from zamba2.weights.files import TensorFile
from zamba2.weights.formats import Format, format_named, kv_format_named
from zamba2.weights.hub import resolve
from zamba2.weights.packed import VERSION, is_packed, quantize

if TYPE_CHECKING:
    from zamba2.runtime.native import NativeBackend

__all__ = ["load", "read_config"]

BACKENDS = ("torch", "native")
MODEL_FILES = ("model.safetensors", "model.safetensors.index.json")


def load(
    source: str | Path, *, backend: str | Backend | None = None, device: str | None = None, dtype: str | None = None,
    format: str | None = None, kv: str | None = None, adapter: str | None = None, revision: str | None = None, offline: bool = False,
) -> LanguageModel:  # fmt: skip
    """See ``zamba2.load``."""
    if adapter is not None:
        raise Zamba2Error(f"adapter is {adapter!r}; no backend of this version has run-time adapters: leave it out.")
    if isinstance(backend, str) and backend not in BACKENDS:
        raise Zamba2Error(f"there is no backend {backend!r}; there is {', '.join(map(repr, BACKENDS))}.")
    path = checkpoint_in(resolve(source, revision=revision, offline=offline))
    config = read_config(path)
    tokenizer = tokenizer_of(path, config)
    random = is_random(path)
    if not is_packed(path):
        if format is None and backend is None and device in (None, "cpu") and find_spec("torch") is None:
            format = "bf16"  # the checkpoint's own precision
            notice("PyTorch is not installed: running on the CPU through the native engine.")
        if format is not None or backend == "native":
            if backend == "torch":
                raise Zamba2Error(f"format is {format!r}; PyTorch runs the checkpoint as it is: leave the format or the backend out.")
            refuse_torch_options(device, dtype)
            kv_format_named(kv or "bf16")
            path = packed_copy(path, format_named(format or "q8"))
    chosen: Backend
    if backend is not None and not isinstance(backend, str):
        chosen = backend
    elif is_packed(path):
        chosen = native_backend(path, config, format, kv, backend, device, dtype)
    elif kv is not None:
        raise Zamba2Error(f"kv is {kv!r}; PyTorch keeps keys and values in its dtype: add a format, such as q4, or leave kv out.")
    else:
        chosen = torch_backend()(path, config=config, device=device, dtype=dtype)
    model = LanguageModel(chosen, tokenizer, name=str(source), is_random=random)
    if model.is_random:
        notice("this model has random weights: its words are noise (load a real one with --model, such as 2.7b-instruct).")
    return model


def native_backend(
    path: Path, config: Config, format: str | None, kv: str | None, backend: str | None, device: str | None, dtype: str | None
) -> NativeBackend:
    """The native engine over a packed checkpoint. Raises Zamba2Error for what it cannot do."""
    if backend == "torch":
        raise Zamba2Error(f"{path} is packed for the native engine; load the original checkpoint with PyTorch.")
    refuse_torch_options(device, dtype)
    try:
        from zamba2.runtime.native import NativeBackend
    except ImportError as error:
        raise Zamba2Error(f"the native engine is not installed ({error}); install the package with a C++ compiler present.") from None
    native = NativeBackend(path, config, kv=kv or "bf16")
    if format is not None and native.format.name != format:
        raise Zamba2Error(f"{path} is packed as {native.format.name}, not {format}; quantize the original checkpoint.")
    return native


def refuse_torch_options(device: str | None, dtype: str | None) -> None:
    """Before anything is packed: the native engine has no devices and no dtypes. Raises Zamba2Error."""
    if device not in (None, "cpu"):
        raise Zamba2Error(f"device is {device!r}; packed checkpoints run on the CPU: leave it out.")
    if dtype is not None:
        raise Zamba2Error(f"dtype is {dtype!r}; a packed checkpoint has its format: leave it out.")


def packed_copy(path: Path, format: Format) -> Path:
    """A packed copy of a checkpoint folder in the user's cache, made on first use. Raises Zamba2Error."""
    if path.is_file():
        raise Zamba2Error(f"{path} is a standalone file; save it in the Hub's layout to pack it for the native engine.")
    files = [*sorted(path.glob("*.safetensors")), path / "config.json"]
    marks = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    name = hashlib.sha256(json.dumps([VERSION, format.name, marks]).encode()).hexdigest()[:20]
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    target = Path(base) / "zamba2" / "packed" / f"{format.name}-{name}"
    if not is_packed(target):
        notice(f"packing {path} as {format.name} into {target}, once.")
        quantize(path, target, format)
    return target


def torch_backend() -> Any:
    """``TorchBackend.load``. Raises Zamba2Error if PyTorch is missing or too old."""
    try:
        import torch
    except ImportError as error:
        raise Zamba2Error(f"PyTorch cannot be imported ({error}); install it with: pip install 'zamba2[torch]'") from None
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 8):
        raise Zamba2Error(f"PyTorch {torch.__version__} is installed; 2.8 or newer is needed: pip install 'zamba2[torch]'")
    from zamba2.runtime.torch import TorchBackend

    return TorchBackend.load


def checkpoint_in(path: Path) -> Path:
    """The folder itself, or the one standalone file in a folder that has no safetensors."""
    if path.is_file() or any((path / name).exists() for name in MODEL_FILES):
        return path
    standalone = [*path.glob("*.pt"), *path.glob("pytorch_model.bin")]
    if len(standalone) == 1:
        return standalone[0]
    raise Zamba2Error(f"{path} has no model.safetensors, no model.safetensors.index.json and no single .pt file; a checkpoint is needed.")


def read_config(path: Path) -> Config:
    """Config of a checkpoint folder or standalone file. Raises Zamba2Error."""
    beside = (path if path.is_dir() else path.parent) / "config.json"
    if path.is_dir() or beside.exists():
        return Config.from_file(beside)
    torch_backend()
    from zamba2.weights.checkpoint import read_config as by_shapes

    return by_shapes(path)


def tokenizer_of(path: Path, config: Config) -> Tokenizer | None:
    """The tokenizer of a checkpoint, or None if it has none."""
    folder = path if path.is_dir() else path.parent
    return Tokenizer.from_folder(folder, config=config) if (folder / "tokenizer.json").exists() else None


def is_random(path: Path) -> bool:
    """Whether the checkpoint says that its weights are random."""
    file = path / "model.safetensors"
    return path.is_dir() and file.exists() and TensorFile(file).metadata.get("zamba2_random") == "true"
