"""The PyTorch backend: the exact model behind the waist, on a CPU or a GPU.

Rows of a call are read one after another, so a row's logits cannot depend on what shares its call.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zamba2.config import Config
from zamba2.errors import Zamba2Error
from zamba2.model.model import Attention, Zamba2
from zamba2.model.state import KVCache, ModelState
from zamba2.runtime.backend import Logits, Row, State, check_row
from zamba2.runtime.state_file import open_state, write_state
from zamba2.weights.checkpoint import DTYPE_NAMES, DTYPES, load_model
from zamba2.weights.files import TensorFile

__all__ = ["TorchBackend", "TorchLogits", "TorchState"]

PREFILL_CHUNK = 512  # tokens; borders lie at multiples of it in the sequence, so splitting a prompt changes no arithmetic
SPLIT = ("q_proj.weight", "k_proj.weight", "v_proj.weight")  # what split_for_inference replaces


class TorchLogits:
    """float32 [k, V] on the device."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def numpy(self) -> npt.NDArray[np.float32]:
        return cast("npt.NDArray[np.float32]", self.tensor.cpu().numpy())


class TorchState:
    """One sequence's state in the PyTorch model; see ``backend.State``."""

    adapter: str | None = None

    def __init__(self, backend: TorchBackend, inner: ModelState) -> None:
        self.backend, self.inner = backend, inner

    @property
    def position(self) -> int:
        return self.inner.position

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    def memory(self) -> dict[int, int]:
        storages = [tensor.untyped_storage() for tensor in self.inner.tensors()]
        return {storage.data_ptr(): storage.nbytes() for storage in storages}

    def copy(self) -> TorchState:
        return TorchState(self.backend, self.inner.copy())

    def keep(self, n: int) -> None:
        with torch.inference_mode():
            self.backend.model.keep(self.inner, n)

    def save(self, path: Path, *, note: str = "") -> None:
        tensors: dict[str, Tensor] = {}
        for kind in ("conv", "ssm"):
            tensors |= {f"{kind}.{i}": t for i, t in enumerate(getattr(self.inner, kind)) if t is not None}
        tensors |= {f"kv.{j}": t for j, kv in enumerate(self.inner.kv) if (t := kv.tensor()) is not None}

        def produce(tensor: Tensor) -> list[memoryview]:
            return [tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data]

        entries = [(name, DTYPE_NAMES[t.dtype], tuple(t.shape), lambda t=t: produce(t)) for name, t in tensors.items()]
        write_state(path, entries, position=self.position, model=self.backend.fingerprint, note=note)

    def load(self, path: Path) -> str:
        file, position, note = open_state(path, self.backend.fingerprint)
        self.inner = self._read(path, file, position)
        return note

    def _read(self, path: Path, file: TensorFile, position: int) -> ModelState:
        backend, config = self.backend, self.backend.config
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if position:
            conv = (1, config.mamba_d_conv - 1, config.conv_dim)
            ssm = (1, config.n_mamba_heads, config.mamba_headdim, config.mamba_d_state)
            kv = (2, 1, config.num_key_value_heads, position, config.attention_head_dim)
            for i in range(config.num_hidden_layers):
                shapes |= {f"conv.{i}": (conv, backend.dtype), f"ssm.{i}": (ssm, torch.float32)}
            shapes |= {f"kv.{j}": (kv, backend.dtype) for j in range(len(config.hybrid_layer_ids))}
        if set(file.entries) != set(shapes):
            raise Zamba2Error(f"{path} does not hold the tensors of a state of this model.")
        state = backend.model.new_state()
        for name, (shape, dtype) in shapes.items():
            entry = file.entries[name]
            if entry.shape != shape or DTYPES.get(entry.dtype) != dtype:
                raise Zamba2Error(f"{path}: {name} is {entry.dtype} {list(entry.shape)}; {DTYPE_NAMES[dtype]} {list(shape)} is needed.")
            tensor = torch.frombuffer(file.read(name), dtype=dtype).reshape(shape).to(backend.device)
            if not bool(torch.isfinite(tensor).all()):
                raise Zamba2Error(f"{path}: {name} has values that are not finite; the file is damaged.")
            kind, number = name.split(".")
            if kind == "kv":
                cache = KVCache()
                cache.append(*tensor)
                state.kv[int(number)] = cache
            else:
                getattr(state, kind)[int(number)] = tensor
        state.position = position
        return state


class TorchBackend:
    """``Backend`` over a loaded ``Zamba2``."""

    def __init__(self, model: Zamba2) -> None:
        self.model, self.config = model, model.config
        self.together = 1  # its rows are read one after another
        self.dtype = model.embed_tokens.weight.dtype
        self.device = model.embed_tokens.weight.device
        self.fingerprint = fingerprint(model)
        for module in model.modules():
            if isinstance(module, Attention):
                module.split_for_inference()

    @classmethod
    def load(cls, path: Path, *, config: Config | None = None, device: str | None = None, dtype: str | None = None) -> TorchBackend:
        """Load a checkpoint. device: as torch names it (default: "cuda" where there is one, else "cpu");
        dtype: "float32", "bfloat16" or "float16" (default: the file's). Raises Zamba2Error."""
        chosen = device_of(device)
        if dtype is not None and dtype not in ("float32", "bfloat16", "float16"):
            raise Zamba2Error(f"dtype is {dtype!r}; 'float32', 'bfloat16' or 'float16' is needed.")
        try:
            wanted = None if dtype is None else getattr(torch, dtype)
            return cls(load_model(path, config=config, device=chosen, dtype=wanted, unmapped=SPLIT))
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            raise Zamba2Error(f"the model does not fit into the memory of {chosen} ({reason}); use device='cpu'.") from None

    def new_state(self, *, adapter: str | None = None) -> TorchState:
        if adapter is not None:
            raise Zamba2Error(f"no adapter called {adapter!r} is loaded.")
        return TorchState(self, self.model.new_state())

    def forward(self, rows: Sequence[Row]) -> list[Logits]:
        states = [self._own(row.state) for row in rows]
        if len({id(state) for state in states}) != len(states):
            raise ValueError("a state may appear only once in a call")
        for row in rows:
            check_row(row, self.config.vocab_size)
        with torch.inference_mode():
            # all rows first, then all states: an interrupted call leaves every state as it was
            done = [self._read(row, state) for row, state in zip(rows, states, strict=True)]
        for state, (inner, _) in zip(states, done, strict=True):
            state.inner = inner
        return [logits for _, logits in done]

    def _own(self, state: State) -> TorchState:
        if not isinstance(state, TorchState) or state.backend is not self:
            raise ValueError("the state belongs to another backend")
        return state

    def _read(self, row: Row, state: TorchState) -> tuple[ModelState, TorchLogits]:
        inner = state.inner.copy()
        tokens = torch.from_numpy(np.array(row.tokens, dtype=np.int64)).to(self.device)
        length = len(tokens)
        if row.record and length > PREFILL_CHUNK:
            raise ValueError(f"at most {PREFILL_CHUNK} tokens can be recorded")
        kept: list[Tensor] = []
        start = 0
        while start < length:
            end = length if row.record else min(length, start + PREFILL_CHUNK - (inner.position % PREFILL_CHUNK))
            x = self.model.hidden_states(tokens[None, start:end], state=inner, record=row.record)
            wanted = min(end - start, max(0, row.logits - (length - end)))
            if wanted:
                kept.append(self.model.logits(x[:, end - start - wanted :])[0].float())
            start = end
        logits = torch.cat(kept) if kept else torch.empty(0, self.config.vocab_size, device=self.device)
        if not bool(torch.isfinite(logits).all()):
            raise Zamba2Error(f"the model computed values that are not finite{self._culprit()}.")
        return inner, TorchLogits(logits)

    def _culprit(self) -> str:
        for name, parameter in self.model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                return f": weight {name} has NaN or infinite values; download the checkpoint again"
        return ", although its weights are; use dtype float32"


def device_of(name: str | None) -> torch.device:
    """The torch device of a name, by default a CUDA GPU if there is one. Raises Zamba2Error if it cannot be used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise Zamba2Error(f"device {name!r} cannot be used ({reason}); 'cpu' always can.") from None
    return device


def fingerprint(model: Zamba2) -> str:
    """Identifies config, number format and weights: a hash over the config, the small tensors and a row of each large one."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        sample = parameter if parameter.dim() == 1 else parameter[:1]
        digest.update(f"{name} {parameter.dtype}".encode())
        digest.update(sample.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
