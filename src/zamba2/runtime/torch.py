"""The PyTorch backend: the exact model behind the waist, on a CPU or a GPU.

Rows of a call are read one after another, so a row's logits cannot depend on what shares its call. On a GPU with Triton, the rows of
one token are the exception: ``decoder`` reads them together.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zamba2.config import Config
from zamba2.errors import Zamba2Error
from zamba2.model.model import Attention, Zamba2
from zamba2.model.ops import has_triton, launching_on
from zamba2.model.packed import PackedEmbedding, PackedLinear
from zamba2.model.state import KVCache, ModelState
from zamba2.runtime.backend import Logits, Row, State, check_row, checked_best
from zamba2.runtime.state_file import open_state, write_state
from zamba2.weights.checkpoint import DTYPE_NAMES, DTYPES, entries_of, load_model, load_packed, read_config
from zamba2.weights.files import TensorFile
from zamba2.weights.packed import is_packed

if TYPE_CHECKING:
    from zamba2.runtime.decoder import Decoder, Slot, Step
    from zamba2.runtime.prompts import Prompts

__all__ = ["TorchBackend", "TorchLogits", "TorchState"]

PREFILL_CHUNKS = {"cpu": 512, "cuda": 4096}  # tokens; borders lie at multiples of it, so splitting a prompt changes no arithmetic
MOST_TOGETHER = 64  # rows of one token that the decoder reads in a call, and sequences that keep their slots
OLDEST_GPU = (8, 0)  # compute capability: bf16 in the matrix units
WORKING_BYTES = 2_000_000_000  # beside the weights: the driver's own, a prompt's activations, graphs, a few sequences
SPLIT = ("q_proj.weight", "k_proj.weight", "v_proj.weight")  # what split_for_inference replaces


class TorchLogits:
    """float32 [k, V] on the device. best: the places of the largest, int32 [k], on the host."""

    def __init__(self, tensor: Tensor, best: npt.NDArray[np.int32]) -> None:
        self.tensor, self.best = tensor, best

    def numpy(self) -> npt.NDArray[np.float32]:
        return cast("npt.NDArray[np.float32]", self.tensor.cpu().numpy())

    def likeliest(self) -> npt.NDArray[np.int32]:
        return self.best


class StepLogits:
    """float32 [k, V], k 0 or 1: a row of what the decoder computed for all rows of a call."""

    def __init__(self, decoder: Decoder, step: Step, row: int, wanted: int) -> None:
        self.decoder, self.step, self.rows = decoder, step, slice(row, row + wanted)

    def numpy(self) -> npt.NDArray[np.float32]:
        """Raises Zamba2Error where a score is NaN or +inf."""
        self._best()
        return cast("npt.NDArray[np.float32]", self.step.scores()[self.rows].numpy())

    def likeliest(self) -> npt.NDArray[np.int32]:
        self.decoder.go_ahead(self.step)  # who asks for no more than this is likely to read it next
        return self._best()

    def _best(self) -> npt.NDArray[np.int32]:
        best, values = self.step.best()
        return checked_best(best[self.rows], values[self.rows])


class TorchState:
    """One sequence's state in the PyTorch model; see ``backend.State``. While it decodes on a GPU it lives in a slot of the decoder."""

    adapter: str | None = None

    def __init__(self, backend: TorchBackend, inner: ModelState) -> None:
        self.backend, self._inner = backend, inner
        self.slot: Slot | None = None

    @property
    def inner(self) -> ModelState:
        """The state outside of the decoder, which it leaves for it."""
        self.leave()
        return self._inner

    @inner.setter
    def inner(self, inner: ModelState) -> None:
        self._inner, self.slot = inner, None

    def enter(self, decoder: Decoder) -> Slot:
        """Its slot in the decoder, where it moves unless it is there."""
        if self.slot is None:
            self.slot = decoder.admit(self._inner)
            self._inner = ModelState.empty(self.backend.config)
        return self.slot

    def leave(self) -> None:
        """Give the slot up, if there is one."""
        if self.slot is not None:
            with launching_on(self.backend.device), torch.inference_mode():
                self._inner = self.slot.decoder.export(self.slot)
            self.slot = None

    @property
    def position(self) -> int:
        return self._inner.position if self.slot is None else self.slot.position

    @property
    def nbytes(self) -> int:
        return self._inner.nbytes if self.slot is None else self.slot.decoder.nbytes(self.slot)

    def memory(self) -> dict[int, int]:
        if self.slot is not None:
            return {id(self.slot): self.nbytes}
        storages = [tensor.untyped_storage() for tensor in self._inner.tensors()]
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
        write_state(path, entries_of(tensors.items()), position=self.position, model=self.backend.fingerprint, note=note)

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
    """``Backend`` over a loaded ``Zamba2``. decode: read rows of one token with ``decoder``, and beginnings of texts with ``prompts``
    (default: on a GPU, where Triton is)."""

    def __init__(self, model: Zamba2, *, decode: bool | None = None) -> None:
        self.model, self.config = model, model.config
        self.together = 1  # of one sequence; those of several are read one after another, but for rows of one token on a GPU
        embeddings = model.embed_tokens
        self.dtype = embeddings.dtype if isinstance(embeddings, PackedEmbedding) else embeddings.weight.dtype
        self.device = model.final_layernorm.weight.device
        self.chunk = self.stretch = PREFILL_CHUNKS.get(self.device.type, PREFILL_CHUNKS["cpu"])
        self.fingerprint = fingerprint(model)
        for module in model.modules():
            if isinstance(module, Attention):
                module.split_for_inference()
        self.decoder: Decoder | None = None
        self.prompts: Prompts | None = None
        if decode if decode is not None else self.device.type == "cuda" and has_triton() and self.dtype != torch.float64:
            from zamba2.runtime.decoder import Decoder
            from zamba2.runtime.prompts import Prompts

            self.decoder = Decoder(model)
            self.prompts = Prompts(model)
        self.decoding: OrderedDict[int, weakref.ref[TorchState]] = OrderedDict()  # states in slots, the one used last at the end

    @classmethod
    def load(cls, path: Path, *, config: Config | None = None, device: str | None = None, dtype: str | None = None) -> TorchBackend:
        """Load a checkpoint. device: as torch names it (default: "cuda" where there is one, else "cpu");
        dtype: "float32", "bfloat16" or "float16" (default: the file's). A packed checkpoint needs a GPU and has its format for a
        dtype. Raises Zamba2Error."""
        packed = is_packed(path)
        chosen, config = cls.device_for(device, dtype, packed=packed), config or read_config(path)
        file_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors")) if path.is_dir() else path.stat().st_size
        check_room(chosen, file_bytes if packed or dtype is None else config.num_parameters * getattr(torch, dtype).itemsize)
        try:
            if packed:
                with launching_on(chosen):
                    return cls(load_packed(path, config, device=chosen))
            wanted = None if dtype is None else getattr(torch, dtype)
            return cls(load_model(path, config=config, device=chosen, dtype=wanted, unmapped=SPLIT))
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            raise Zamba2Error(f"the model does not fit into the memory of {chosen} ({reason}); use device='cpu'.") from None

    @staticmethod
    def device_for(device: str | None, dtype: str | None, *, packed: bool) -> torch.device:
        """The device on which ``load`` would run a checkpoint. Raises Zamba2Error where device or dtype cannot be had."""
        chosen = device_of(device)
        if dtype is not None and (packed or dtype not in ("float32", "bfloat16", "float16")):
            wanted = "a packed checkpoint has its format: leave it out" if packed else "'float32', 'bfloat16' or 'float16' is needed"
            raise Zamba2Error(f"dtype is {dtype!r}; {wanted}.")
        if packed and chosen.type != "cuda":
            reason = "PyTorch reads no packed checkpoint; leave backend and device out for the native engine"
            raise Zamba2Error(f"device is {str(chosen)!r}, where {reason}.")
        if packed and torch.version.hip is not None:
            raise Zamba2Error("packed checkpoints need an NVIDIA GPU, and this PyTorch is for AMD's; load the original one.")
        if packed and not has_triton():
            raise Zamba2Error("Triton is not installed, which packed checkpoints need on a GPU; install it with: pip install 'triton>=3.4'")
        return chosen

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
        single = [i for i, row in enumerate(rows) if self.decoder is not None and len(row.tokens) == 1 and not row.record]
        found: dict[int, Logits] = {}
        try:
            with launching_on(self.device), torch.inference_mode():
                # all rows first, then all states: an interrupted call leaves every state as it was
                done = {i: self._read(row, states[i]) for i, row in enumerate(rows) if i not in single}
                for start in range(0, len(single), MOST_TOGETHER):
                    some = single[start : start + MOST_TOGETHER]
                    found |= zip(some, self._decode([rows[i] for i in some], [states[i] for i in some]), strict=True)
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            raise Zamba2Error(f"there is not enough memory on {self.device} ({reason}); take a shorter text or packed weights.") from None
        for i, (inner, logits) in done.items():
            states[i].inner, found[i] = inner, logits
        return [found[i] for i in range(len(rows))]

    def _decode(self, rows: Sequence[Row], states: Sequence[TorchState]) -> list[StepLogits]:
        """Read one token of each sequence, all together. A sequence that has not decoded for long makes room for a new one."""
        decoder = self.decoder
        assert decoder is not None
        for state in states:
            self.decoding.pop(id(state), None)
        for other in list(self.decoding):
            waiting = self.decoding[other]()
            if waiting is None or waiting.slot is None:
                del self.decoding[other]
            elif len(self.decoding) + len(states) > MOST_TOGETHER:
                waiting.leave()
                del self.decoding[other]
        slots = [state.enter(decoder) for state in states]
        self.decoding |= {id(state): weakref.ref(state) for state in states}
        step = decoder.step([int(row.tokens[0]) for row in rows], slots)
        return [StepLogits(decoder, step, i, row.logits) for i, row in enumerate(rows)]

    def _own(self, state: State) -> TorchState:
        if not isinstance(state, TorchState) or state.backend is not self:
            raise ValueError("the state belongs to another backend")
        return state

    def _read(self, row: Row, state: TorchState) -> tuple[ModelState, TorchLogits]:
        if self.prompts is not None and state.position == 0 and not row.record and len(row.tokens) <= min(self.prompts.longest, self.chunk):
            return self.prompts.read(row.tokens, row.logits, self._checked)
        inner = state.inner.copy()
        tokens = torch.from_numpy(np.array(row.tokens, dtype=np.int64)).to(self.device)
        length = len(tokens)
        if row.record and length > self.chunk:
            raise ValueError(f"at most {self.chunk} tokens can be recorded")
        kept: list[Tensor] = []
        start = 0
        while start < length:
            end = length if row.record else min(length, start + self.chunk - (inner.position % self.chunk))
            x = self.model.hidden_states(tokens[None, start:end], state=inner, record=row.record)
            wanted = min(end - start, max(0, row.logits - (length - end)))
            if wanted:
                kept.append(self.model.logits(x[:, end - start - wanted :])[0].float())
            start = end
        logits = torch.cat(kept) if kept else torch.empty(0, self.config.vocab_size, device=self.device)
        return inner, self._checked(logits)

    def _checked(self, logits: Tensor) -> TorchLogits:
        """Scores [k, V]. Raises Zamba2Error for those that are no numbers."""
        logits = logits.float()
        found = torch.stack([torch.isfinite(logits).all(-1).to(torch.int32), logits.argmax(-1).to(torch.int32)])  # to wait for once
        finite, best = found.cpu().numpy()
        if not finite.all():
            raise Zamba2Error(f"the model computed values that are not finite{self._culprit()}.")
        return TorchLogits(logits, best)

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
        if device.type == "cuda" and torch.cuda.is_available() and (found := torch.cuda.get_device_capability(device)) < OLDEST_GPU:
            card, wanted = torch.cuda.get_device_name(device), ".".join(map(str, OLDEST_GPU))
            has = f"{card} has compute capability {found[0]}.{found[1]}"
            raise Zamba2Error(f"{has}; {wanted} is needed (Ampere or newer): use device='cpu'.")
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise Zamba2Error(f"device {name!r} cannot be used ({reason}); 'cpu' always can.") from None
    return device


def multiplies_bf16(device: torch.device) -> bool:
    """False on CPUs without instructions for products of bf16, where PyTorch takes ten to eighty times as long for them as in fp32."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None) if device.type == "cpu" else None
    return supported is None or bool(supported())


def check_room(device: torch.device, nbytes: int) -> None:
    """Raises Zamba2Error unless a GPU has room for weights of so many bytes and what running them takes."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    if nbytes + WORKING_BYTES > free:
        raise Zamba2Error(
            f"the model needs {(nbytes + WORKING_BYTES) / 1e9:.1f} GB on {device}, where {free / 1e9:.1f} of {total / 1e9:.1f} GB are "
            f"free; use a packed checkpoint (zamba2 quantize --format q4), stop what else runs there, or use device='cpu'."
        )


def fingerprint(model: Zamba2) -> str:
    """Identifies config, number format and weights: a hash over the config, the small tensors and a row of each large one."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, module in model.named_modules():
        if isinstance(module, (PackedLinear, PackedEmbedding)):
            digest.update(f"{name} {module.weight.format}".encode() + module.weight.data[:4096].cpu().numpy().tobytes())
    for name, parameter in sorted(model.named_parameters()):
        sample = parameter if parameter.dim() == 1 else parameter[:1]
        digest.update(f"{name} {parameter.dtype}".encode())
        digest.update(sample.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
