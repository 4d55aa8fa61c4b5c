"""Checkpoints in and out of the PyTorch model: the Hub's safetensors layout and the standalone ``.pt`` layout.

Loading is streamed: on a CPU in the file's own dtype the weights are mapped and cost no copy; otherwise one tensor at a
time is read and converted, so the peak is the model plus one tensor.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from zamba2.config import PRESETS, Config, read_json
from zamba2.errors import Zamba2Error
from zamba2.model.model import Zamba2
from zamba2.weights.files import TensorFile, replacing, write_tensors
from zamba2.weights.names import hub_names, standalone_names

__all__ = ["load_model", "read_config", "save_checkpoint"]

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# fp32 whatever the model's dtype: small, and what exponents, recurrences and norms depend on (FACTS 2)
FP32_PARTS = ("A_log", "D", "dt_bias", "norm.weight", "layernorm.weight", "conv1d.weight", "conv1d.bias")
IGNORED = (".rotary_emb.inv_freq",)  # buffers that some writers store; they follow from the config
SHARD_BYTES = 5_000_000_000
SMALL_FILES = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template*")


class SafetensorsSource:
    """A folder's model.safetensors, or the shards that model.safetensors.index.json names."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        single = folder / "model.safetensors"
        self.files: dict[str, TensorFile] = {}
        if single.exists() or not index.exists():
            file = TensorFile(single)
            self.files = dict.fromkeys(file.entries, file)
            shards = [file]
        else:
            opened = self._open_shards(folder, index)
            shards = list({id(file): file for file in opened.values()}.values())
            self.files = opened
        entries = {name: file.entries[name] for name, file in self.files.items()}
        for name, entry in entries.items():
            if entry.dtype not in DTYPES and not name.endswith(IGNORED):
                raise Zamba2Error(f"{self.files[name].path}: tensor {name} has dtype {entry.dtype}; one of {', '.join(DTYPES)} is needed.")
        self.shapes = {name: entry.shape for name, entry in entries.items()}
        self.dtypes = {name: DTYPES[entry.dtype] for name, entry in entries.items() if entry.dtype in DTYPES}
        self.metadata = {key: value for file in shards for key, value in file.metadata.items()}

    @staticmethod
    def _open_shards(folder: Path, index: Path) -> dict[str, TensorFile]:
        data = read_json(index)
        weight_map = data.get("weight_map") if isinstance(data, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise Zamba2Error(f"{index} has no weight_map; the index of a sharded checkpoint maps tensor names to file names.")
        shards: dict[str, TensorFile] = {}
        for tensor, name in weight_map.items():
            if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or "\\" in name or "\0" in name:
                raise Zamba2Error(f"{index} puts tensor {tensor} into {name!r}; a plain file name in the same folder is needed.")
            if name not in shards:
                if not (folder / name).exists():
                    raise Zamba2Error(f"{folder / name} does not exist, but {index.name} names it; download the checkpoint again.")
                shards[name] = TensorFile(folder / name)
            if tensor not in shards[name].entries:
                raise Zamba2Error(f"{folder / name} has no tensor {tensor}, but {index.name} says so; download the checkpoint again.")
        return {tensor: shards[name] for tensor, name in weight_map.items()}

    def tensor(self, name: str, *, mapped: bool) -> Tensor:
        file = self.files[name]
        entry = file.entries[name]
        dtype = DTYPES[entry.dtype]
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=dtype)
        mapped = mapped and entry.start % dtype.itemsize == 0
        data = file.map(name) if mapped else file.read(name)
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
        self.shapes = {name: tuple(t.shape) for name, t in data.items()}
        self.dtypes = {name: t.dtype for name, t in data.items()}

    def tensor(self, name: str, *, mapped: bool) -> Tensor:
        return self.data[name] if mapped else self.data[name].clone()


# Named tensors read on demand; ``tensor(name, mapped=True)`` may be backed by the file and must not be written to.
Source = SafetensorsSource | StandaloneSource


def read_config(path: Path) -> Config:
    """The config of a checkpoint folder, or of a ``.pt`` file: config.json beside it, else the preset its shapes fit."""
    if path.is_dir():
        return Config.from_file(path / "config.json")
    beside = path.parent / "config.json"
    if beside.exists():
        return Config.from_file(beside)
    return _preset_of(StandaloneSource(path))


def _preset_of(source: StandaloneSource) -> Config:
    for config in PRESETS.values():
        names = standalone_names(config)
        with torch.device("meta"):
            shapes = {name: tuple(p.shape) for name, p in Zamba2(config).named_parameters()}
        fits = (source.shapes.get(names[name][0]) == shape for name, shape in shapes.items() if names[name][1] is None)
        if all(fits):
            return config
    raise Zamba2Error(f"{source.path} fits none of the published shapes ({', '.join(PRESETS)}); put the model's config.json beside it.")


def load_model(
    path: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", config: Config | None = None,
    ops: str = "torch", unmapped: tuple[str, ...] = (),
) -> Zamba2:  # fmt: skip
    """Load a checkpoint folder in the Hub's layout, or a standalone ``.pt`` file.

    dtype: of the large weights (default: the file's); small ones that need it stay fp32. unmapped: ends of names whose
    weights the caller replaces at once, so that their mapped pages would only take memory. Raises Zamba2Error naming
    the tensor for missing, unexpected, misshapen or non-float ones, and for copies of shared weights that differ.
    """
    config = config or read_config(path)
    device = torch.device(device)
    source = StandaloneSource(path) if path.is_file() else SafetensorsSource(path)
    if len(source.shapes) < config.num_hidden_layers:  # before a hostile config has millions of layers built
        raise Zamba2Error(f"{path} has {len(source.shapes)} tensors, too few for the {config.num_hidden_layers} layers of its config.")
    with torch.device("meta"):
        model = Zamba2(config, ops=ops)
    loader = _standalone_parameters if path.is_file() else _hub_parameters
    plan = loader(path, source, config, {name: tuple(p.shape) for name, p in model.named_parameters()})
    if dtype is None:
        dtype = source.dtypes[plan["embed_tokens.weight"][0]]
    for name, (stored, part) in plan.items():
        wanted = torch.float32 if name.endswith(FP32_PARTS) and dtype.itemsize < 4 else dtype
        mapped = device.type == "cpu" and source.dtypes[stored] == wanted and not name.endswith(unmapped)
        tensor = source.tensor(stored, mapped=mapped or part is not None)
        if part is not None:
            tensor = _deinterleave(tensor, config, part)
        _assign(model, name, tensor.to(device=device, dtype=wanted))
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


Plan = dict[str, tuple[str, int | None]]  # model parameter -> stored name and part of it


def _hub_parameters(path: Path, source: Source, config: Config, shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    stored_names = set(source.shapes)
    if any(name.startswith(("model.blocks.", "model.linear_layers.", "model.mamba_layers.")) for name in stored_names):
        raise Zamba2Error(f"{path} holds tensors of an old Zamba2 layout; take the current revision of the checkpoint from the Hub.")
    if "decoder.final_layernorm.weight" in stored_names:
        raise Zamba2Error(f"{path} holds the standalone layout in safetensors; the Hub's layout or the .pt file itself is needed.")
    plan: Plan = {}
    known: set[str] = {"lm_head.weight"}
    for name, candidates in hub_names(config).items():
        present = [c for c in candidates if c in stored_names]
        known.update(candidates)
        if not present:
            where = f" (or under another layer of the same shared block, {len(candidates)} in all)" if len(candidates) > 1 else ""
            raise Zamba2Error(f"{path} has no tensor {candidates[0]}{where}; a complete checkpoint is needed.")
        for stored in present:
            _check_shape(path, source, stored, shapes[name])
        _check_copies(path, source, present)
        plan[name] = (present[0], None)
    if config.tie_word_embeddings and "lm_head.weight" in stored_names:
        _check_shape(path, source, "lm_head.weight", shapes["embed_tokens.weight"])
        _check_copies(path, source, ["model.embed_tokens.weight", "lm_head.weight"])
    unexpected = sorted(n for n in stored_names - known if not n.endswith(IGNORED))
    if unexpected:
        raise Zamba2Error(
            f"{path} has {len(unexpected)} tensors that this config does not use, such as {unexpected[0]}; "
            f"config.json and the weights must belong together."
        )
    return plan


def _standalone_parameters(path: Path, source: Source, config: Config, shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    plan: Plan = dict(standalone_names(config))
    rows = config.attention_hidden_size + 2 * config.kv_dim
    if not config.tie_word_embeddings:
        raise Zamba2Error(f"{path} has no lm_head.weight: standalone checkpoints tie it; a config with tie_word_embeddings is needed.")
    for name, (stored, part) in plan.items():
        if stored not in source.shapes:
            raise Zamba2Error(f"{path} has no tensor {stored}; a complete standalone Zamba2 checkpoint is needed.")
        shape = shapes[name] if part is None else (rows, config.attention_hidden_size)
        _check_shape(path, source, stored, shape)
    return plan


def _check_shape(path: Path, source: Source, stored: str, shape: tuple[int, ...]) -> None:
    if source.shapes[stored] != shape:
        raise Zamba2Error(f"{path}: tensor {stored} has shape {list(source.shapes[stored])}; the config needs {list(shape)}.")
    if source.dtypes.get(stored) not in DTYPE_NAMES:
        raise Zamba2Error(f"{path}: tensor {stored} has dtype {source.dtypes.get(stored)}; a floating-point one is needed.")


def _check_copies(path: Path, source: Source, names: list[str]) -> None:
    for other in names[1:]:
        if not torch.equal(source.tensor(names[0], mapped=True), source.tensor(other, mapped=True)):
            raise Zamba2Error(
                f"{path}: {names[0]} and {other} differ, but the model shares one weight; a checkpoint with tied weights is needed."
            )


def save_checkpoint(
    model: Zamba2, folder: Path, *, dtype: torch.dtype | None = None, small_files_from: Path | None = None,
    max_shard_bytes: int = SHARD_BYTES, state_dict: Mapping[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Write the Hub's layout, which transformers reads too: each weight once, tied head left out, in shards.

    dtype: of every tensor (default: each its own, so that small ones kept in fp32 lose nothing). small_files_from: a
    folder whose tokenizer, template and generation files are copied. state_dict: tensors to write in place of the model's own (training).
    The folder must not exist or be empty; it appears complete or not at all. Raises Zamba2Error.
    """
    if os.path.lexists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise Zamba2Error(f"{folder} exists and is not an empty folder; choose another place to save to.")
    tensors = dict(model.named_parameters()) if state_dict is None else state_dict
    # transformers unties the shared blocks together with the head: then every position needs its copy
    copies = 1 if model.config.tie_word_embeddings else len(model.config.layers)
    parts = [(stored, tensors[name]) for name, names in hub_names(model.config).items() for stored in names[:copies]]
    shards: list[list[tuple[str, Tensor]]] = [[]]
    size = 0
    for part in parts:
        nbytes = part[1].numel() * (dtype or part[1].dtype).itemsize
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += nbytes
    with replacing(folder) as temporary:
        temporary.mkdir()
        named = str(dtype or tensors["embed_tokens.weight"].dtype).removeprefix("torch.")
        config = model.config.to_dict() | {"torch_dtype": named}
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= {stored: name for stored, _ in shard}
            _write_shard(temporary / name, shard, dtype)
        if len(shards) > 1:
            total = sum(t.numel() * (dtype or t.dtype).itemsize for _, t in parts)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for pattern in SMALL_FILES if small_files_from is not None else ():
            assert small_files_from is not None
            for file in small_files_from.glob(pattern):
                shutil.copyfile(file, temporary / file.name)


def _write_shard(path: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None) -> None:
    def produce(tensor: Tensor) -> memoryview:
        flat = tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype).contiguous().view(-1).view(torch.uint8)
        return flat.numpy().data

    entries = [(name, DTYPE_NAMES[dtype or t.dtype], tuple(t.shape), lambda t=t: produce(t)) for name, t in tensors]
    write_tensors(path, entries, {"format": "pt"})
