"""From a name to a running model: the one place where a backend is chosen."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zamba2.config import Config
from zamba2.errors import Zamba2Error, notice
from zamba2.language.model import LanguageModel
from zamba2.language.tokenizer import Tokenizer
from zamba2.runtime.backend import Backend
from zamba2.weights.files import forget_leftovers
from zamba2.weights.formats import Format, format_named, kv_format_named
from zamba2.weights.hub import cache_folder, resolve
from zamba2.weights.hub_files import HubFiles
from zamba2.weights.packed import VERSION, is_packed, is_random, open_packed, quantize

if TYPE_CHECKING:
    from zamba2.runtime.native import NativeBackend

__all__ = ["load", "read_config"]

BACKENDS = ("torch", "native")
MODEL_FILES = ("model.safetensors", "model.safetensors.index.json")
SMALL = 1 << 25  # parameters; 64 MB in bf16
GPU_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # NVIDIA's, Windows' for its Linux, AMD's


def load(
    source: str | Path, *, backend: str | Backend | None = None, device: str | None = None, dtype: str | None = None,
    format: str | None = None, kv: str | None = None, threads: int | None = None, pin: bool | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None, offline: bool = False,
) -> LanguageModel:  # fmt: skip
    """See ``zamba2.load``."""
    if isinstance(backend, str) and backend not in BACKENDS:
        raise Zamba2Error(f"there is no backend {backend!r}; there is {', '.join(map(repr, BACKENDS))}.")
    check_options(backend=backend, device=device, dtype=dtype, format=format, kv=kv)
    path = checkpoint_in(resolve(source, revision=revision, offline=offline))
    config = read_config(path)
    tokenizer = tokenizer_of(path, config)
    random = is_random(path)
    chosen: Backend
    if backend is not None and not isinstance(backend, str):
        chosen = backend
    elif (backend or backend_for(path, device=device, dtype=dtype, format=format)) == "native":
        refuse_torch_options(device, dtype)
        with packed_folder(path, config, format) as packed:
            chosen = native_backend(packed, config, kv, threads, pin)
        if adapter is not None:
            chosen.load_adapter(Path(adapter), str(adapter))
            chosen.default_adapter = str(adapter)
    else:
        if adapter is not None:
            raise Zamba2Error(f"adapter is {str(adapter)!r}; run-time adapters are for the native engine: leave device and dtype out.")
        if kv is not None:
            raise Zamba2Error(f"kv is {kv!r}; PyTorch keeps keys and values in its dtype: leave kv, or device and dtype, out.")
        if threads is not None or pin:
            raise Zamba2Error("threads and pin are for the native engine; for PyTorch set OMP_NUM_THREADS, or leave device and dtype out.")
        kind, packed_wanted = torch_backend(), format is not None or is_packed(path)
        kind.device_for(device, dtype, packed=packed_wanted)  # before anything is packed
        with packed_folder(path, config, format) if packed_wanted else nullcontext(path) as place:
            chosen = kind.load(place, config=config, device=device, dtype=dtype)
    model = LanguageModel(chosen, tokenizer, name=str(source), is_random=random)
    if model.is_random:
        notice("this model has random weights: its words are noise (load a real one with --model, such as 2.7b-instruct).")
    return model


def check_options(
    *, backend: str | Backend | None = None, device: str | None = None, dtype: str | None = None, format: str | None = None,
    kv: str | None = None, **_: Any,
) -> None:  # fmt: skip
    """What can be said of options before there is a checkpoint, which may take an hour to fetch. Raises Zamba2Error."""
    if format is not None:
        format_named(format)
    if kv is not None:
        kv_format_named(kv)
    if backend == "native":
        refuse_torch_options(device, dtype)
    elif find_spec("torch") is None and (backend == "torch" or (device or "").startswith("cuda") or dtype is not None):
        torch_backend()


def backend_for(path: Path | None, *, device: str | None = None, dtype: str | None = None, format: str | None = None) -> str:
    """The backend that runs a checkpoint if none is asked for.

    The native engine for packed checkpoints, for a format, and on machines without a GPU that PyTorch can use; PyTorch
    where there is one, for a device or dtype, and for standalone files, which it alone reads. path: None for any checkpoint
    that is not packed. On a GPU that is asked for by name PyTorch runs packed ones too.
    """
    if device is not None and device.startswith("cuda"):
        return "torch"
    if format is not None or (path is not None and is_packed(path)):
        return "native"
    standalone = path is not None and path.is_file()
    return "torch" if standalone or device is not None or dtype is not None or has_gpu() else "native"


def has_gpu() -> bool:
    """Whether PyTorch is installed and finds a CUDA or ROCm GPU; it is imported only where a driver is present."""
    if find_spec("torch") is None or not any(os.path.exists(driver) for driver in GPU_DRIVERS):
        return False
    import torch

    return torch.cuda.is_available()


def default_format(config: Config) -> str:
    """The packed format if none is asked for: bf16, exact, for small models; else q4, the fastest and smallest."""
    return "bf16" if config.num_parameters <= SMALL else "q4"


def refuse_torch_options(device: str | None, dtype: str | None) -> None:
    """Before anything is packed: the native engine has no devices and no dtypes. Raises Zamba2Error."""
    if device not in (None, "cpu"):
        raise Zamba2Error(f"device is {device!r}; the native engine runs on the CPU: leave it out, or say device='cuda'.")
    if dtype is not None:
        raise Zamba2Error(f"dtype is {dtype!r}; a packed checkpoint has its format: leave it out.")


def packed_folder(path: Path, config: Config, format: str | None) -> AbstractContextManager[Path]:
    """The checkpoint packed: itself, a small model's own for this run alone, or a copy in the user's cache. Raises Zamba2Error."""
    if is_packed(path):
        found = open_packed(path, config)[1].format.name
        if format not in (None, found):
            raise Zamba2Error(f"{path} is packed as {found}, not {format}; quantize the original checkpoint.")
        return nullcontext(path)
    refuse_standalone(path)
    if format is None and default_format(config) == "bf16":
        return packed_for_now(path)
    chosen = format_named(format or default_format(config))
    HubFiles(path, config)  # complain about what is missing before anything is said or written
    return nullcontext(packed_copy(path, chosen, explain=format is None))


def refuse_standalone(path: Path) -> None:
    """Raises Zamba2Error for what cannot be packed."""
    if path.is_file():
        raise Zamba2Error(f"{path} is a standalone file; save it in the Hub's layout to pack it.")


@contextmanager
def packed_for_now(path: Path) -> Iterator[Path]:
    """A small checkpoint packed as bf16 in a folder that is gone behind the block: what is mapped by then stays."""
    try:
        temporary = tempfile.TemporaryDirectory(prefix="zamba2-")
    except OSError as error:
        raise Zamba2Error(f"there is no place for temporary files ({error.strerror}); set TMPDIR to a folder that can be used.") from None
    with temporary as folder:
        quantize(path, Path(folder) / "packed", format_named("bf16"))
        yield Path(folder) / "packed"


def native_backend(path: Path, config: Config, kv: str | None, threads: int | None, pin: bool | None) -> NativeBackend:
    """The native engine over a packed checkpoint. Raises Zamba2Error for what it cannot do."""
    try:
        from zamba2.runtime.native import NativeBackend
    except ImportError as error:
        raise Zamba2Error(f"the native engine is not installed ({error}); install the package with a C++ compiler present.") from None
    return NativeBackend(path, config, threads=threads, pin=pin, kv=kv or "bf16")


def packed_copy(path: Path, format: Format, *, explain: bool = False) -> Path:
    """A packed copy of a checkpoint folder in the user's cache, made on first use. Raises Zamba2Error."""
    files = [*sorted(path.glob("*.safetensors")), path / "config.json"]
    marks = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    name = hashlib.sha256(json.dumps([VERSION, format.name, marks]).encode()).hexdigest()[:20]
    target = cache_folder() / "packed" / f"{format.name}-{name}"
    if not is_packed(target):
        why = " (the fastest on a CPU; format q8 or bf16 is nearer to the original)" if explain else ""
        if target.exists() and not is_packed(target):  # looked at again: another program may just have made it
            notice(f"{target} is damaged, so it is made anew.")
            shutil.rmtree(target, ignore_errors=True)
        forget_leftovers(target.parent)
        notice(f"packing {path} as {format.name}{why} into {target}, once.")
        try:
            quantize(path, target, format)
        except Zamba2Error:
            if not is_packed(target):  # another program that packed the same was faster
                raise
    return target


def torch_backend() -> Any:
    """``TorchBackend``. Raises Zamba2Error if PyTorch is missing or too old."""
    try:
        import torch
    except ImportError as error:
        raise Zamba2Error(f"PyTorch cannot be imported ({error}); install it with: pip install 'zamba2[torch]'") from None
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 8):
        raise Zamba2Error(f"PyTorch {torch.__version__} is installed; 2.8 or newer is needed: pip install 'zamba2[torch]'")
    from zamba2.runtime.torch import TorchBackend

    return TorchBackend


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
