"""The native backend: packed weights on a CPU through csrc/engine, without PyTorch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import zamba2._engine as _engine
from zamba2.config import Config
from zamba2.errors import Zamba2Error
from zamba2.runtime.backend import Logits, Row, State, best_of, check_row
from zamba2.runtime.processors import MOST_THREADS, default_threads, processors_for
from zamba2.runtime.state_file import open_state, write_state
from zamba2.weights.files import TensorFile
from zamba2.weights.formats import FORMATS, KVFormat, kv_format_named, pack
from zamba2.weights.lora import read_lora
from zamba2.weights.packed import Packing, open_packed

__all__ = ["NativeBackend", "NativeState"]

PREFILL_CHUNK = 256  # tokens; borders lie at multiples of it in the sequence
SHORT = 8  # tokens of a call up to which each one's arithmetic is that of a call of its own, and together about as long (kMostRows)
ENGINE_KEYS = (
    "hidden_size", "num_hidden_layers", "vocab_size", "num_mem_blocks", "mamba_d_state", "n_mamba_heads", "mamba_headdim",
    "mamba_ngroups", "mamba_d_conv", "d_inner", "conv_dim", "in_proj_dim", "num_attention_heads", "num_key_value_heads",
    "attention_head_dim", "intermediate_size", "adapter_rank", "rms_norm_eps", "attention_scale", "rope_base", "use_mem_rope",
    "use_shared_attention_adapter", "tie_word_embeddings",
)  # fmt: skip


class NativeLogits:
    """float32 [k, V] in memory."""

    def __init__(self, values: npt.NDArray[np.float32]) -> None:
        self._values = values

    def numpy(self) -> npt.NDArray[np.float32]:
        return self._values

    def likeliest(self) -> npt.NDArray[np.int32]:
        return best_of(self._values)


class NativeState:
    """One sequence's state in the engine; see ``backend.State``. Copies share memory until one of them goes on."""

    def __init__(self, backend: NativeBackend, inner: Any, adapter: str | None = None) -> None:
        self.backend, self.inner, self.adapter = backend, inner, adapter

    @property
    def position(self) -> int:
        return int(self.inner.position)

    @property
    def nbytes(self) -> int:
        return int(self.inner.nbytes)

    def memory(self) -> dict[int, int]:
        return dict(self.inner.memory)

    def copy(self) -> NativeState:
        return NativeState(self.backend, self.inner.copy(), self.adapter)

    def keep(self, n: int) -> None:
        if n < 0:
            raise ValueError(f"cannot keep {n} tokens")
        try:
            self.backend.engine.keep(self.inner, n)
        except MemoryError as error:
            raise Zamba2Error(f"there is not enough memory for this: {error}; use a smaller model or a shorter text.") from None

    def save(self, path: Path, *, note: str = "") -> None:
        backend = self.backend
        try:
            found = backend.engine.export_state(self.inner)
        except ValueError as error:
            raise Zamba2Error(f"the state cannot be saved: {error}.") from None
        except MemoryError:
            raise Zamba2Error(f"there is not enough memory to save the state; {self.nbytes} bytes are needed.") from None
        tensors: list[tuple[str, str, int, npt.NDArray[Any]]]
        tensors = [(name, "F32", found[name].size, found[name]) for name in ("conv", "ssm") if name in found]
        tensors += [(*kind, data) for kind, data in zip(self._kv_tensors(self.position), found["parts"], strict=True)]
        entries = [
            (name, dtype, (size,), lambda data=data: [data.reshape(-1).view(np.uint8).data]) for name, dtype, size, data in tensors if size
        ]
        write_state(path, entries, position=self.position, model=backend.identity(self.adapter), note=note)

    def load(self, path: Path) -> str:
        file, position, note = open_state(path, self.backend.identity(self.adapter))
        self.inner = self._read(path, file, position)
        return note

    def _kv_tensors(self, length: int) -> Iterator[tuple[str, str, int]]:
        config = self.backend.config
        return self.backend.kv.tensors(len(config.hybrid_layer_ids), config.num_key_value_heads, length, config.attention_head_dim)

    def _read(self, path: Path, file: TensorFile, position: int) -> Any:
        engine, config = self.backend.engine, self.backend.config
        number = self.backend.adapter_number(self.adapter)
        if position == 0:
            return engine.new_state(number)
        caches = list(self._kv_tensors(position))
        sizes = [("conv", "F32", config.conv_state_bytes() // 4), ("ssm", "F32", config.ssm_state_bytes // 4), *caches]
        if set(file.entries) != {name for name, _, _ in sizes}:
            raise Zamba2Error(f"{path} does not hold the tensors of a state of this model.")
        for name, dtype, size in sizes:
            entry = file.entries[name]
            if (entry.dtype, entry.shape) != (dtype, (size,)):
                raise Zamba2Error(f"{path}: {name} is {entry.dtype} {list(entry.shape)}; {dtype} [{size}] is needed.")

        names = [name for name, _, _ in sizes]
        try:
            inner, unread, why = engine.read_state(position, file.fileno(), [file.entries[name].start for name in names], number)
        except MemoryError:
            needed = sum(file.entries[name].nbytes for name, _, _ in sizes)
            raise Zamba2Error(f"{path}: there is not enough memory for the state; {needed} bytes are needed.") from None
        except ValueError as error:
            raise Zamba2Error(f"{path}: {error}.") from None
        if inner is None:
            if why < 0:
                raise Zamba2Error(f"{path}: {names[unread]} has values that are not finite; the file is damaged.")
            raise file.unread(names[unread], why)
        return inner


class NativeBackend:
    """``Backend`` over the native engine and a packed checkpoint folder. kv: a row of KV_FORMATS, for keys and values."""

    def __init__(
        self, path: Path, config: Config, *, threads: int | None = None, pin: bool | None = None, isa: str = "", kv: str = "bf16"
    ) -> None:
        self.config = config
        self.together = SHORT
        self.stretch = 2 * PREFILL_CHUNK
        self.kv = kv_format_named(kv)
        self.file, self.packing, plan = open_packed(path, config)  # the engine reads the file's mapping
        self.format = self.packing.format  # of all matrices but, perhaps, the embeddings
        settings = {key: getattr(config, key) for key in ENGINE_KEYS} | {"hybrid_layer_ids": list(config.hybrid_layer_ids)}
        try:
            count, processors = chosen_threads(threads, pin)
            self.engine = _engine.Engine(settings, count, isa, self.kv.number, processors)
            for part in plan:
                data = np.frombuffer(self.file.map(part.name), dtype=np.uint8)
                if part.is_matrix:
                    self.engine.set_matrix(part.name, self.packing.of(part).number, data)
                    continue
                values = data.view(np.float32).copy()
                if not np.isfinite(values).all():  # int8 codes would hide it
                    raise Zamba2Error(f"{path}: tensor {part.name} has values that are not finite; quantize the checkpoint again.")
                self.engine.set_vector(part.name, values)
            self.engine.check_complete()
        except (RuntimeError, ValueError) as error:
            raise Zamba2Error(f"the native engine cannot start: {error}.") from None
        except MemoryError:
            needed = sum(4 * part.count for part in plan if not part.is_matrix)
            raise Zamba2Error(f"{path}: there is not enough memory to start; {needed} bytes are needed beside the mapped file.") from None
        self.fingerprint = fingerprint(self.file, config, self.packing, self.kv)
        self._adapters: dict[str, tuple[int, str]] = {}  # name -> number in the engine, and a hash of its weights
        self.default_adapter: str | None = None  # of states for which none is named

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return str(self.engine.isa)

    def new_state(self, *, adapter: str | None = None) -> NativeState:
        adapter = adapter or self.default_adapter
        return NativeState(self, self.engine.new_state(self.adapter_number(adapter)), adapter)

    def load_adapter(self, folder: Path, name: str) -> None:
        """Make a peft adapter available to states under a name; nothing is merged, and other states do not see it. Raises Zamba2Error."""
        if name in self._adapters:
            raise Zamba2Error(f"an adapter called {name!r} is loaded already; give another name.")
        parts, packing, digest = read_lora(folder, self.config), FORMATS["bf16"], hashlib.sha256()
        number = self.engine.add_adapter()
        for part in parts:
            (outputs, rank), inputs = part.up.shape, part.down.shape[1]
            product, column = behind(part.name, self.config)
            down, up = (aligned(pack(values, packing)) for values in (part.down, part.up))
            digest.update(part.name.encode() + down.tobytes() + up.tobytes() + np.float64(part.scale).tobytes())
            self.engine.add_part(number, product, column, rank, outputs, inputs, down, up, part.scale)
        self._adapters[name] = (number, digest.hexdigest())

    def adapter_number(self, name: str | None) -> int:
        """An adapter's number in the engine, -1 for none. Raises Zamba2Error for one that is not loaded."""
        if name is None:
            return -1
        if name not in self._adapters:
            known = ", ".join(self._adapters) or "none"
            raise Zamba2Error(f"no adapter called {name!r} is loaded; there is {known}.")
        return self._adapters[name][0]

    def identity(self, adapter: str | None) -> str:
        """Of the model and an adapter: states continue only where both are the same."""
        return self.fingerprint if adapter is None else f"{self.fingerprint}+{self._adapters[adapter][1]}"

    def forward(self, rows: Sequence[Row]) -> list[Logits]:
        states = [self._own(row.state) for row in rows]
        if len({id(state) for state in states}) != len(states):
            raise ValueError("a state may appear only once in a call")
        tokens = [check_row(row, self.config.vocab_size) for row in rows]
        if any(row.record and len(own) > SHORT for row, own in zip(rows, tokens, strict=True)):
            raise ValueError(f"at most {SHORT} tokens can be recorded")
        # updated in place; a copy where several calls follow one another
        work = [
            state.inner.copy() if not row.record and border_in(state.position, len(own)) else state.inner
            for state, own, row in zip(states, tokens, rows, strict=True)
        ]
        # a prompt's stretches first, then what is left of every row in one call
        scores = [
            (len(own), []) if row.record else self._stretches(inner, own, row.logits)
            for inner, own, row in zip(work, tokens, rows, strict=True)
        ]
        rest = [own[len(own) - left :] for own, (left, _) in zip(tokens, scores, strict=True)]
        wanted = [min(row.logits, len(own)) for row, own in zip(rows, rest, strict=True)]
        read = self._read(work, rest, wanted, [row.record for row in rows]) if rows else []
        last = np.split(read, np.cumsum(wanted)[:-1]) if rows else []
        try:
            found = [np.concatenate([*first, own]) if first else own for (_, first), own in zip(scores, last, strict=True)]
        except MemoryError:
            needed = 4 * self.config.vocab_size * sum(row.logits for row in rows)
            raise Zamba2Error(f"there is not enough memory for this; {needed} bytes of logits are needed.") from None
        for state, inner in zip(states, work, strict=True):
            state.inner = inner
        return [NativeLogits(own) for own in found]

    def _stretches(self, inner: Any, tokens: npt.NDArray[np.int32], wanted: int) -> tuple[int, list[npt.NDArray[np.float32]]]:
        """Read tokens up to the last border before their end; returns how many are left, and the logits wanted before them."""
        found = []
        while (step := PREFILL_CHUNK - inner.position % PREFILL_CHUNK) < len(tokens):
            here = max(0, wanted - (len(tokens) - step))
            scores = self._read([inner], [tokens[:step]], [here])
            if here:
                found.append(scores)
            tokens, wanted = tokens[step:], wanted - here
        return len(tokens), found

    def _read(self, states: list[Any], tokens: list[npt.NDArray[np.int32]], wanted: list[int], record: Sequence[bool] = ()) -> Any:
        """The engine's forward: logits (sum of wanted, V). Raises Zamba2Error; the states are unusable then."""
        self.file.check_size()
        try:
            scores = self.engine.forward(states, tokens, wanted, list(record))
        except MemoryError as error:
            raise Zamba2Error(f"there is not enough memory for this: {error}; use a smaller model or a shorter text.") from None
        except ArithmeticError:
            raise Zamba2Error("the model computed values that are not finite; the checkpoint is damaged: quantize it again.") from None
        except ValueError as error:
            raise Zamba2Error(f"the native engine cannot go on: {error}.") from None
        self.file.check_size()  # what lies behind the end of the file, in its last page, reads as zeros
        return scores

    def _own(self, state: State) -> NativeState:
        if not isinstance(state, NativeState) or state.backend is not self:
            raise ValueError("the state belongs to another backend")
        return state


def behind(module: str, config: Config) -> tuple[str, int]:
    """The engine's matrix behind whose product a module's adapter adds, and the first of the output's columns that it adds to."""
    owner, _, part = module.rpartition(".")
    if part in ("q_proj", "k_proj", "v_proj"):
        column = {"q": 0, "k": config.attention_hidden_size, "v": config.attention_hidden_size + config.kv_dim}[part[0]]
        return f"{owner}.qkv_proj.left.weight", column
    return f"{module}.weight", 0


def aligned(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """A copy that begins where the kernels load from, at a multiple of 64 bytes."""
    room = np.empty(data.size + 64, np.uint8)
    start = -room.ctypes.data % 64
    room[start : start + data.size] = data.reshape(-1)
    return room[start : start + data.size]


def border_in(position: int, length: int) -> bool:
    """Whether a call of ``length`` tokens behind ``position`` others goes past a border of PREFILL_CHUNK."""
    return position % PREFILL_CHUNK + length > PREFILL_CHUNK


def chosen_threads(threads: int | None, pin: bool | None) -> tuple[int, list[int]]:
    """Thread count and the processors they are pinned to, none by default. Raises Zamba2Error.

    threads: None for ``default_threads``; pin: None for what ZAMBA2_PIN says.
    """
    if threads is None:
        threads = default_threads()
    elif isinstance(threads, bool) or not isinstance(threads, int) or not 0 < threads <= MOST_THREADS:
        raise Zamba2Error(f"threads is {threads!r}; a whole number from 1 to {MOST_THREADS} is needed.")
    if pin is None:
        setting = os.environ.get("ZAMBA2_PIN", "")
        if setting not in ("", "0", "1"):
            raise Zamba2Error(f"ZAMBA2_PIN is {setting!r}; 1 pins threads to processors, 0 does not.")
        pin = setting == "1"
    return threads, processors_for(threads) if pin else []


def fingerprint(file: TensorFile, config: Config, packing: Packing, kv: KVFormat) -> str:
    """Identifies config, formats and weights: a hash over the config and a page of each tensor."""
    names = [packing.format.name, packing.embeddings.name, kv.name]
    digest = hashlib.sha256(json.dumps([config.to_dict(), *names], sort_keys=True).encode())
    for name in sorted(file.entries):
        digest.update(name.encode())
        digest.update(file.map(name)[:4096])
    return digest.hexdigest()
