"""A checkpoint folder in the Hub's layout, open for reading and checked against its config. Knows no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from zamba2.config import Config, read_json
from zamba2.errors import Zamba2Error
from zamba2.weights.files import Entry, TensorFile
from zamba2.weights.names import hub_names, parameter_shapes

__all__ = ["FLOATS", "HubFiles"]

FLOATS = ("F64", "F32", "F16", "BF16")
IGNORED = (".rotary_emb.inv_freq",)  # buffers that some writers store; they follow from the config
OLD_LAYOUT = ("model.blocks.", "model.linear_layers.", "model.mamba_layers.")


class HubFiles:
    """model.safetensors, or the shards that model.safetensors.index.json names.

    ``stored`` maps each parameter of the model to the tensor that holds it. Raises Zamba2Error naming the tensor for
    missing, unexpected, misshapen or non-float ones, and for copies of shared weights that differ.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        self._files: dict[str, TensorFile]
        if single.exists() or not index.exists():
            file = TensorFile(single)
            self._files = dict.fromkeys(file.entries, file)
        else:
            self._files = _open_shards(folder, index)
        if len(self._files) < config.num_hidden_layers:  # before a hostile config has thousands of layers built
            raise Zamba2Error(f"{folder} has {len(self._files)} tensors, too few for {config.num_hidden_layers} layers.")
        self.stored = self._match()

    def entry(self, stored: str) -> Entry:
        return self._files[stored].entries[stored]

    def map(self, stored: str) -> memoryview:
        """A tensor's bytes, mapped: copied by the system only if written to."""
        return self._files[stored].map(stored)

    def read(self, stored: str) -> memoryview:
        """A copy of a tensor's bytes."""
        return self._files[stored].read(stored)

    def floats(self, parameter: str) -> npt.NDArray[np.float32]:
        """A parameter as fp32, in its shape."""
        stored = self.stored[parameter]
        return self._files[stored].floats(stored)

    def _match(self) -> dict[str, str]:
        names, folder = set(self._files), self.folder
        if any(name.startswith(OLD_LAYOUT) for name in names):
            raise Zamba2Error(f"{folder} holds tensors of an old Zamba2 layout; take the current revision of the checkpoint from the Hub.")
        if "decoder.final_layernorm.weight" in names:
            raise Zamba2Error(f"{folder} holds the standalone layout in safetensors; the Hub's layout or the .pt file itself is needed.")
        shapes = parameter_shapes(self.config)
        found: dict[str, str] = {}
        known = {"lm_head.weight"}
        for parameter, candidates in hub_names(self.config).items():
            present = [name for name in candidates if name in names]
            known.update(candidates)
            if not present:
                where = f" (or under another layer of the same shared block, {len(candidates)} in all)" if len(candidates) > 1 else ""
                raise Zamba2Error(f"{folder} has no tensor {candidates[0]}{where}; a complete checkpoint is needed.")
            self._check(present, shapes[parameter])
            found[parameter] = present[0]
        if self.config.tie_word_embeddings and "lm_head.weight" in names:
            self._check([found["embed_tokens.weight"], "lm_head.weight"], shapes["embed_tokens.weight"])
        unexpected = sorted(name for name in names - known if not name.endswith(IGNORED))
        if unexpected:
            raise Zamba2Error(
                f"{folder} has {len(unexpected)} tensors that this config does not use, such as {unexpected[0]}; "
                f"config.json and the weights must belong together."
            )
        return found

    def _check(self, copies: list[str], shape: tuple[int, ...]) -> None:
        """All copies of a weight have its shape and a floating-point dtype, and are equal."""
        for name in copies:
            entry = self.entry(name)
            if entry.shape != shape:
                raise Zamba2Error(f"{self.folder}: tensor {name} has shape {list(entry.shape)}; the config needs {list(shape)}.")
            if entry.dtype not in FLOATS:
                raise Zamba2Error(f"{self.folder}: tensor {name} has dtype {entry.dtype}; one of {', '.join(FLOATS)} is needed.")
        for name in copies[1:]:
            same = self.entry(name).dtype == self.entry(copies[0]).dtype
            if not same or not np.array_equal(np.frombuffer(self.map(copies[0]), np.uint8), np.frombuffer(self.map(name), np.uint8)):
                raise Zamba2Error(
                    f"{self.folder}: {copies[0]} and {name} differ, but the model shares one weight; "
                    f"a checkpoint with tied weights is needed."
                )


def _open_shards(folder: Path, index: Path) -> dict[str, TensorFile]:
    """Tensor name -> the shard that holds it."""
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
