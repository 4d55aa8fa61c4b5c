"""peft's LoRA adapters as files: which products of the model they add to, and with what. Knows no torch and no peft."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zamba2.config import Config, read_json
from zamba2.errors import Zamba2Error
from zamba2.weights.files import TensorFile

__all__ = ["LoraPart", "read_lora"]

Floats = npt.NDArray[np.float32]
KEY = re.compile(
    r"base_model\.model\.model\.((?:layers\.\d+\.(?:mamba\.(?:in|out)_proj|linear)|shared_blocks\.\d+\.(?:self_attn\.[qkvo]_proj|"
    r"feed_forward\.(?:gate_up|down)_proj)))\.lora_([AB])\.weight"
)
PLAIN = {  # settings under which an adapter is B A x times a scale, and nothing else
    "peft_type": "LORA", "bias": "none", "use_dora": False, "modules_to_save": None, "lora_bias": False, "fan_in_fan_out": False,
    "rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": None, "trainable_token_indices": None, "megatron_config": None,
    "alora_invocation_tokens": None, "use_qalora": False, "layer_replication": None, "target_parameters": None, "exclude_modules": None,
    "kasa_config": None, "monteclora_config": None, "velora_config": None, "arrow_config": None, "use_bdlora": None,
}  # fmt: skip
BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")  # of the weights, that leave the model's own as they are
WIDEST = 4096  # rank


@dataclass(frozen=True)
class LoraPart:
    """y += scale * up (down x) behind one projection. name: of its module; down: (rank, inputs); up: (outputs, rank)."""

    name: str
    down: Floats
    up: Floats
    scale: float


def read_lora(folder: Path, config: Config) -> list[LoraPart]:
    """An adapter that ``zamba2.hf`` models were trained with. Raises Zamba2Error for files that are missing or damaged, settings beyond
    plain LoRA, layers this model does not have, and sizes that do not fit it."""
    settings = _settings(folder / "adapter_config.json")
    rank, alpha = settings["r"], settings["lora_alpha"]
    file = TensorFile(folder / "adapter_model.safetensors")
    sizes = _sizes(config)
    found: dict[str, dict[str, Floats]] = {}
    for key in file.entries:
        match = KEY.fullmatch(key)
        name = match[1] if match else ""
        shape = file.entries[key].shape
        if match is None or name not in sizes:
            raise Zamba2Error(f"{folder}: {key} belongs to no layer of this model that takes adapters; train it with zamba2.hf's model.")
        outputs, inputs = sizes[name]
        wanted = (rank, inputs) if match[2] == "A" else (outputs, rank)
        if shape != wanted:
            raise Zamba2Error(f"{folder}: {key} is {list(shape)}; {list(wanted)} is needed: the adapter is for another model.")
        found.setdefault(name, {})[match[2]] = _values(file, key)
    for name, pair in found.items():
        if len(pair) != 2:
            raise Zamba2Error(f"{folder}: {name} has half an adapter; export it again.")
    if not found:
        raise Zamba2Error(f"{folder}: the adapter has no weights; export it again.")
    scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
    return [LoraPart(name, pair["A"], pair["B"], scale) for name, pair in sorted(found.items())]


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise Zamba2Error(f"{path.parent} has no adapter_config.json; a folder that peft's save_pretrained wrote is needed.")
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise Zamba2Error(f"{path} holds a {type(settings).__name__}; a JSON object of peft's settings is needed.")
    for name, plain in PLAIN.items():
        if settings.get(name, plain) not in (plain, None):
            raise Zamba2Error(f"{path}: {name} is {settings[name]!r}; plain LoRA is read at run time: merge this adapter into the model.")
    if (begun := settings.get("init_lora_weights", True)) not in BEGINNINGS:
        what = f"init_lora_weights is {begun!r}, which changes the model's own weights"
        raise Zamba2Error(f"{path}: {what}; merge this adapter into the model.")
    checks: dict[str, Callable[[Any], bool]] = {"r": lambda r: isinstance(r, int) and 0 < r <= WIDEST, "lora_alpha": _is_number}
    for name, good in checks.items():
        if isinstance(settings.get(name), bool) or not good(settings.get(name)):
            raise Zamba2Error(f"{path}: {name} is {settings.get(name)!r}; a number above 0 is needed.")
    return settings


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 < value < 1e9


def _sizes(config: Config) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every projection that takes adapters."""
    hidden, wide, inner = config.hidden_size, config.attention_hidden_size, config.intermediate_size
    sizes = {}
    for layer in config.layers:
        name = f"layers.{layer.index}"
        sizes[f"{name}.mamba.in_proj"] = (config.in_proj_dim, hidden)
        sizes[f"{name}.mamba.out_proj"] = (hidden, config.d_inner)
        if layer.is_hybrid:
            sizes[f"{name}.linear"] = (hidden, hidden)
    for b in range(config.num_shared_blocks):
        name = f"shared_blocks.{b}"
        sizes |= {f"{name}.self_attn.{part}_proj": (rows, wide) for part, rows in (("q", wide), ("k", config.kv_dim), ("v", config.kv_dim))}
        sizes[f"{name}.self_attn.o_proj"] = (hidden, wide)
        sizes[f"{name}.feed_forward.gate_up_proj"] = (2 * inner, hidden)
        sizes[f"{name}.feed_forward.down_proj"] = (hidden, inner)
    return sizes


def _values(file: TensorFile, key: str) -> Floats:
    if (dtype := file.entries[key].dtype) not in ("F32", "BF16", "F16"):
        raise Zamba2Error(f"{file.path}: {key} is {dtype}; F32, BF16 or F16 is needed.")
    values = file.floats(key)
    if not np.isfinite(values).all():
        raise Zamba2Error(f"{file.path}: {key} has values that are not finite; train or export the adapter again.")
    return values
