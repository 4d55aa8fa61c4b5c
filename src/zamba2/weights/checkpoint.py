"""Checkpoints in and out of the PyTorch model: the Hub's safetensors layout and the standalone ``.pt`` layout.

Loading is streamed: on a CPU in the file's own dtype the weights are mapped and cost no copy; otherwise one tensor at a
time is read and converted, so the peak is the model plus one tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from zamba2.config import PRESETS, Config
from zamba2.errors import Zamba2Error
from zamba2.model.model import Zamba2
from zamba2.model.packed import Packed, PackedEmbedding, PackedLinear
from zamba2.weights.files import Entries, replacing, write_tensors
from zamba2.weights.hub_files import HubFiles
from zamba2.weights.names import hub_names, parameter_shapes, standalone_names
from zamba2.weights.packed import Packing, Part, open_packed, parts

__all__ = ["entries_of", "load_model", "load_packed", "packed_model", "read_config", "save_checkpoint"]

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# fp32 whatever the model's dtype: small, and what exponents, recurrences and norms depend on
FP32_PARTS = ("A_log", "D", "dt_bias", "norm.weight", "layernorm.weight", "conv1d.weight", "conv1d.bias")
SHARD_BYTES = 5_000_000_000
M = TypeVar("M", bound=Zamba2)


Plan = dict[str, tuple[str, int | None]]  # model parameter -> stored name and part of it


class HubSource:
    """A folder in the Hub's layout."""

    def __init__(self, files: HubFiles) -> None:
        self.files = files
        self.plan: Plan = {parameter: (stored, None) for parameter, stored in files.stored.items()}

    def dtype(self, stored: str) -> torch.dtype:
        return DTYPES[self.files.entry(stored).dtype]

    def tensor(self, stored: str, *, mapped: bool) -> Tensor:
        entry, dtype = self.files.entry(stored), self.dtype(stored)
        mapped = mapped and entry.start % dtype.itemsize == 0
        data = self.files.map(stored) if mapped else self.files.read(stored)
        return torch.frombuffer(data, dtype=dtype).reshape(entry.shape)


class StandaloneSource:
    """A ``.pt`` file of the standalone PyTorch code, read without running code from it."""

    def __init__(self, path: Path) -> None:
        try:
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except FileNotFoundError:
            raise Zamba2Error(f"{path} does not exist; a standalone Zamba2 checkpoint is needed.") from None
        except Exception as error:  # a damaged pickle raises anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise Zamba2Error(f"{path} is not a safe PyTorch file of plain tensors ({reason[:200]}); download it again.") from None
        if isinstance(data, dict) and isinstance(data.get("model"), dict):
            data = data["model"]
        if not isinstance(data, dict) or not data or not all(isinstance(t, Tensor) for t in data.values()):
            raise Zamba2Error(f"{path} does not hold named tensors; a standalone Zamba2 state dict is needed.")
        self.path = path
        self.data: dict[str, Tensor] = data
        self.plan: Plan = {}

    def fits(self, config: Config) -> bool:
        """Whether the tensors' shapes are those of a config."""
        names, shapes = standalone_names(config), parameter_shapes(config)
        stored = {name: self.data.get(stored) for name, (stored, part) in names.items() if part is None}
        return all(tensor is not None and tuple(tensor.shape) == shapes[name] for name, tensor in stored.items())

    def match(self, config: Config) -> None:
        """Fill ``plan``. Raises Zamba2Error naming the tensor that is missing, misshapen or no float."""
        if "model.embed_tokens.weight" in self.data:
            raise Zamba2Error(f"{self.path} has the Hub's layout, which is read from safetensors alone; save it as model.safetensors.")
        if not config.tie_word_embeddings:
            raise Zamba2Error(f"{self.path} has no lm_head.weight: standalone checkpoints tie it, and the config must say so.")
        if len(self.data) < config.num_hidden_layers:  # before a hostile config has thousands of layers built
            raise Zamba2Error(f"{self.path} has {len(self.data)} tensors, too few for {config.num_hidden_layers} layers.")
        shapes, rows = parameter_shapes(config), config.attention_hidden_size + 2 * config.kv_dim
        for name, (stored, part) in standalone_names(config).items():
            if stored not in self.data:
                raise Zamba2Error(f"{self.path} has no tensor {stored}; a complete standalone Zamba2 checkpoint is needed.")
            shape = shapes[name] if part is None else (rows, config.attention_hidden_size)
            tensor = self.data[stored]
            if tuple(tensor.shape) != shape:
                raise Zamba2Error(f"{self.path}: tensor {stored} has shape {list(tensor.shape)}; the config needs {list(shape)}.")
            if tensor.dtype not in DTYPE_NAMES:
                raise Zamba2Error(f"{self.path}: tensor {stored} has dtype {tensor.dtype}; a floating-point one is needed.")
            self.plan[name] = (stored, part)

    def dtype(self, stored: str) -> torch.dtype:
        return self.data[stored].dtype

    def tensor(self, stored: str, *, mapped: bool) -> Tensor:
        return self.data[stored] if mapped else self.data[stored].clone()


def read_config(path: Path) -> Config:
    """The config of a checkpoint folder, or of a ``.pt`` file: config.json beside it, else the preset its shapes fit."""
    if path.is_dir():
        return Config.from_file(path / "config.json")
    beside = path.parent / "config.json"
    if beside.exists():
        return Config.from_file(beside)
    source = StandaloneSource(path)
    for config in PRESETS.values():
        if source.fits(config):
            return config
    raise Zamba2Error(f"{path} fits none of the published shapes ({', '.join(PRESETS)}); put the model's config.json beside it.")


def load_model(
    path: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", config: Config | None = None,
    unmapped: tuple[str, ...] = (), kind: type[M] = Zamba2,  # type: ignore[assignment]
) -> M:  # fmt: skip
    """Load a checkpoint folder in the Hub's layout, or a standalone ``.pt`` file.

    dtype: of the large weights (default: the file's); small ones that need it stay fp32. unmapped: ends of names whose
    weights the caller replaces at once, so that their mapped pages would only take memory. kind: the model's class. Raises
    Zamba2Error naming the tensor for missing, unexpected, misshapen or non-float ones, and for copies of shared weights that differ.
    """
    config = config or read_config(path)
    device = torch.device(device)
    source: HubSource | StandaloneSource
    if path.is_file():
        source = StandaloneSource(path)
        source.match(config)
    else:
        source = HubSource(HubFiles(path, config))
    with torch.device("meta"):
        model = kind(config)
    if dtype is None:
        dtype = source.dtype(source.plan["embed_tokens.weight"][0])
    for name, (stored, part) in source.plan.items():
        wanted = torch.float32 if name.endswith(FP32_PARTS) and dtype.itemsize < 4 else dtype
        mapped = device.type == "cpu" and source.dtype(stored) == wanted and not name.endswith(unmapped)
        tensor = source.tensor(stored, mapped=mapped or part is not None)
        if part is not None:
            tensor = _deinterleave(tensor, config, part)
        _assign(model, name, tensor.to(device=device, dtype=wanted))
    return model.eval()


def load_packed(path: Path, config: Config, *, device: torch.device) -> Zamba2:
    """The PyTorch model over a packed checkpoint folder, for a GPU: its matrices keep their packed bytes. Raises Zamba2Error."""
    file, packing, _ = open_packed(path, config)

    def read(part: Part) -> Tensor:
        return torch.frombuffer(file.read(part.name), dtype=torch.uint8 if part.is_matrix else torch.float32).to(device)

    return packed_model(config, packing, read)


def packed_model(config: Config, packing: Packing, read: Callable[[Part], Tensor]) -> Zamba2:
    """The model over packed tensors. read: gives a part's tensor on the device, bytes (n,) of a matrix or fp32 values (n,) of a vector.

    Matrices in bf16 become plain ones, as that is what torch multiplies.
    """
    with torch.device("meta"):
        model = Zamba2(config)
    halves: dict[str, Tensor | Packed] = {}
    for part in parts(config):
        tensor, owner = read(part), part.name.rpartition(".")[0]
        if not part.is_matrix:
            shape = model.get_parameter(part.name).shape
            _assign(model, part.name, tensor.reshape(shape))
            continue
        weight: Tensor | Packed
        weight = packed = Packed(tensor, part.shape[0], part.shape[1], packing.of(part).name)
        if packed.format == "bf16":
            from zamba2.model.ops.triton_linear import dequantize

            weight = dequantize(packed)
        if part.half is not None:
            halves[owner] = weight
        elif isinstance(weight, Tensor):
            _assign(model, part.name, weight)
        else:
            above, _, place = owner.rpartition(".")
            module = PackedEmbedding(weight, torch.bfloat16) if owner == "embed_tokens" else PackedLinear(weight)
            setattr(model.get_submodule(above), place, module)
    for block in range(config.num_shared_blocks):
        name = f"shared_blocks.{block}.self_attn"
        model.get_submodule(name).use_halves(halves[f"{name}.qkv_proj.left"], halves[f"{name}.qkv_proj.right"])  # type: ignore[operator]
    return model.eval()


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))


def _deinterleave(qkv: Tensor, config: Config, part: int) -> Tensor:
    """Rows of q, k or v out of linear_qkv, where each group of heads has its q, k and v rows one behind the other."""
    d, groups = config.attention_head_dim, config.num_key_value_heads
    queries = config.num_attention_heads // groups * d
    rows = qkv.unflatten(0, (groups, queries + 2 * d)).split([queries, d, d], dim=1)
    chosen: Tensor = rows[part].flatten(0, 1).contiguous()
    return chosen


def save_checkpoint(
    model: Zamba2, folder: Path, *, max_shard_bytes: int = SHARD_BYTES, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Write the Hub's layout, which transformers reads too: each weight once and as it is, tied head left out, in shards.

    state_dict: tensors to write in place of the model's own (training). The folder must not exist or be empty; it appears complete or not
    at all. Raises Zamba2Error.
    """
    if os.path.lexists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise Zamba2Error(f"{folder} exists and is not an empty folder; choose another place to save to.")
    if os.path.ismount(folder):
        raise Zamba2Error(f"{folder} is where a file system is mounted, which cannot be replaced; choose a folder inside of it.")
    tensors = dict(model.named_parameters()) if state_dict is None else state_dict
    # transformers unties the shared blocks together with the head: then every position needs its copy
    copies = 1 if model.config.tie_word_embeddings else len(model.config.layers)
    parts = [(stored, tensors[name]) for name, names in hub_names(model.config).items() for stored in names[:copies]]
    shards: list[list[tuple[str, Tensor]]] = [[]]
    size = 0
    for part in parts:
        if shards[-1] and size + part[1].nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += part[1].nbytes
    with replacing(folder) as temporary:
        temporary.mkdir()
        config = model.config.to_dict() | {"torch_dtype": str(tensors["embed_tokens.weight"].dtype).removeprefix("torch.")}
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= {stored: name for stored, _ in shard}
            write_tensors(temporary / name, entries_of(shard), {"format": "pt"})
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(t.nbytes for _, t in parts)}, "weight_map": weight_map}
            (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def entries_of(tensors: Iterable[tuple[str, Tensor]]) -> Entries:
    """Named tensors as ``write_tensors`` takes them; from a device they come one at a time."""

    def produce(tensor: Tensor) -> list[memoryview]:
        return [tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data]

    return [(name, DTYPE_NAMES[t.dtype], tuple(t.shape), partial(produce, t)) for name, t in tensors]
