"""States kept for later: what a prompt begins with is not read again.

An entry is a state and the tokens it has read. A reply is kept with the tokens that were sampled; ``encode`` gives the text of a later
prompt the same tokens, although tokenizing it whole might give others.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from zamba2.errors import Zamba2Error, notice
from zamba2.runtime.backend import State
from zamba2.weights.files import replacing

__all__ = ["Found", "StateCache"]

Tokens = npt.NDArray[np.int32]


@dataclass
class Entry:
    """text: what the tokens say, special tokens included; None where it is not known. state: None while it is on disk alone."""

    tokens: Tokens
    adapter: str | None
    text: str | None
    state: State | None

    @property
    def nbytes(self) -> int:
        return 0 if self.state is None else self.state.nbytes


@dataclass(frozen=True)
class Found:
    """A state of one's own that has read the first tokens of a prompt."""

    state: State
    tokens: int


class StateCache:
    """Least recently used states within a number of bytes, and, where a folder is given, on disk.

    new_state: makes an empty state of an adapter, to load files into. What is dropped from memory stays on disk up to ``disk_bytes``.
    Safe to use from several threads. A damaged or foreign file counts as absent, said once.
    """

    def __init__(
        self, new_state: Callable[[str | None], State], *, most_bytes: int = 1 << 30, folder: Path | None = None, disk_bytes: int = 1 << 33
    ) -> None:
        self._new_state, self.most_bytes, self.folder, self.disk_bytes = new_state, most_bytes, folder, disk_bytes
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()  # least recently used first
        self._lengths: dict[tuple[str | None, int], int] = {}  # entries of so many tokens
        self._lock = threading.RLock()
        self.hits = self.misses = self.cached_tokens = self.dropped = 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._read_folder(folder)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Of the states in memory; what two of them share counts twice."""
        with self._lock:
            return sum(entry.nbytes for entry in self._entries.values())

    def encode(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Token ids of a text: those that were kept for its longest known beginning, and ``encode`` of the rest.

        Where a token of the whole text would reach over that border the text is encoded whole.
        """
        with self._lock:
            known = [entry for entry in self._entries.values() if entry.text and text.startswith(entry.text)]
        whole = encode(text)
        for entry in sorted(known, key=lambda entry: len(entry.text or ""), reverse=True):
            rest = encode(text[len(entry.text or "") :])
            if whole[len(whole) - len(rest) :] == rest:
                return [*entry.tokens.tolist(), *rest]
        return whole

    def find(self, tokens: Sequence[int], adapter: str | None = None) -> Found | None:
        """The state that has read most of a prompt's beginning, and not all of it; a copy, so that the one here stays as it is."""
        prompt = np.asarray(tokens, np.int32)
        with self._lock:
            lengths = sorted((n for name, n in self._lengths if name == adapter and n < len(prompt)), reverse=True)
            for length in lengths:
                key = _key(prompt[:length], adapter)
                entry = self._entries.get(key)
                if entry is None or (entry.state is None and not self._load(key, entry)):
                    continue
                self._entries.move_to_end(key)
                assert entry.state is not None
                self.hits += 1
                self.cached_tokens += length
                found = Found(entry.state.copy(), length)
                self._trim()
                return found
            self.misses += 1
            return None

    def put(self, tokens: Sequence[int], state: State, text: str | None = None) -> None:
        """Keep a state that has read ``tokens``; it must not go on afterwards. One larger than all there is room for is not kept."""
        own = np.asarray(tokens, np.int32)
        if state.position != len(own) or not len(own):
            raise ValueError(f"the state has read {state.position} tokens, not {len(own)}")
        if state.nbytes > self.most_bytes:
            return
        key = _key(own, state.adapter)
        with self._lock:
            old = self._entries.pop(key, None)
            if old is None:
                self._lengths[state.adapter, len(own)] = self._lengths.get((state.adapter, len(own)), 0) + 1
            self._entries[key] = Entry(own, state.adapter, text or (old and old.text) or None, state)
            self._save(key, self._entries[key])
            self._trim()

    def clear(self) -> None:
        """Forget everything, files too."""
        with self._lock:
            for key in list(self._entries):
                self._forget(key)

    # ---- memory and disk

    def _trim(self) -> None:
        held = self.nbytes
        for key, entry in list(self._entries.items()):
            if held <= self.most_bytes:
                break
            if entry.state is not None:
                self.dropped += 1
                held -= entry.nbytes
                entry.state = None
                if self.folder is None or not self._file(key).exists():
                    self._forget(key)
        if self.folder is None:
            return
        files = {key: self._file(key).stat().st_size for key in self._entries if self._file(key).exists()}
        held = sum(files.values())
        for key in list(self._entries):
            if held <= self.disk_bytes:
                break
            if key in files:
                held -= files[key]
                self._delete(key)
                if self._entries[key].state is None:
                    self._forget(key)

    def _forget(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        place = (entry.adapter, len(entry.tokens))
        self._lengths[place] -= 1
        if not self._lengths[place]:
            del self._lengths[place]
        self._delete(key)

    def _file(self, key: bytes) -> Path:
        assert self.folder is not None
        return self.folder / f"{key.hex()}.state"

    def _delete(self, key: bytes) -> None:
        if self.folder is not None:
            self._file(key).with_suffix(".json").unlink(missing_ok=True)
            self._file(key).unlink(missing_ok=True)

    def _save(self, key: bytes, entry: Entry) -> None:
        """State first, then what it is: a process that dies between leaves a file that is never looked at."""
        if self.folder is None or entry.state is None or self._file(key).exists():
            return
        about = {"tokens": entry.tokens.tolist(), "adapter": entry.adapter, "text": entry.text}
        try:
            entry.state.save(self._file(key))
            with replacing(self._file(key).with_suffix(".json")) as place:
                place.write_text(json.dumps(about), encoding="utf-8")
        except (OSError, Zamba2Error) as error:
            notice(f"a conversation's state cannot be saved ({error}); it is kept in memory alone.")
            self._delete(key)

    def _load(self, key: bytes, entry: Entry) -> bool:
        """Whether an entry's file could be read again."""
        state = self._new_state(entry.adapter)
        try:
            state.load(self._file(key))
            if state.position != len(entry.tokens):
                raise Zamba2Error(f"{self._file(key)} has read {state.position} tokens instead of {len(entry.tokens)}.")
        except (OSError, Zamba2Error) as error:
            notice(f"a saved state cannot be used and is dropped: {error}")
            self._forget(key)
            return False
        entry.state = state
        return True

    def _read_folder(self, folder: Path) -> None:
        """What an earlier process left, oldest first; files of no use to us are removed."""
        found = []
        for file in folder.glob("*.json"):
            try:
                about = json.loads(file.read_text(encoding="utf-8"))
                tokens = np.asarray(about["tokens"], np.int32)
                adapter, text = about["adapter"], about["text"]
                usable = tokens.ndim == 1 and all(value is None or isinstance(value, str) for value in (adapter, text))
                if not usable or _key(tokens, adapter).hex() != file.stem:
                    raise ValueError("it is not what its name says")
                found.append((os.stat(file.with_suffix(".state")).st_mtime_ns, Entry(tokens, adapter, text, None)))
            except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
                notice(f"{file} is no saved state of ours and is dropped ({error}).")
                file.unlink(missing_ok=True)
        for _, entry in sorted(found, key=lambda item: item[0]):
            self._entries[_key(entry.tokens, entry.adapter)] = entry
            place = (entry.adapter, len(entry.tokens))
            self._lengths[place] = self._lengths.get(place, 0) + 1
        for file in folder.glob("*.state"):
            if _is_hex(file.stem) and bytes.fromhex(file.stem) not in self._entries:  # its process died before it said what it is
                file.unlink(missing_ok=True)


def _key(tokens: Tokens, adapter: str | None) -> bytes:
    return hashlib.blake2b(tokens.tobytes(), key=hashlib.sha256((adapter or "").encode()).digest(), digest_size=16).digest()


def _is_hex(text: str) -> bool:
    return len(text) == 32 and all(letter in "0123456789abcdef" for letter in text)
