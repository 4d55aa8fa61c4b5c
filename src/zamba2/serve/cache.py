"""States kept for later: what a prompt begins with is not read again.

An entry is a state and the tokens it has read. A reply is kept with the tokens that were sampled; ``encode`` gives the text of a later
prompt the same tokens, although tokenizing it whole might give others. Files are written and removed by a thread of their own, and read
by whoever asks for them, without keeping others from the cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from zamba2.errors import Zamba2Error, notice
from zamba2.runtime.backend import State
from zamba2.weights.files import write_text

__all__ = ["Memory", "StateCache"]

Tokens = npt.NDArray[np.int32]

MOST_QUEUED = 16  # states that wait to be written; more, and the disk is too slow for them all
LEFTOVER = re.compile(r"\.[0-9a-f]{32}\.(state|json)\.\d+-[0-9a-f]{8}\.partial")  # of ``replacing``, in a process that was killed


class Memory:
    """Pieces of memory by where they lie, each held by any number of states and counted once."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._pieces: dict[int, tuple[int, int]] = {}  # place -> holders, bytes

    def add(self, pieces: Mapping[int, int]) -> None:
        """One more holds these; ``State.memory``."""
        for place, nbytes in pieces.items():
            holders, nbytes = self._pieces.get(place, (0, nbytes))
            self._pieces[place] = holders + 1, nbytes
            self.nbytes += 0 if holders else nbytes

    def remove(self, places: Iterable[int]) -> None:
        """One that was added holds these no longer."""
        for place in places:
            holders, nbytes = self._pieces.pop(place)
            if holders > 1:
                self._pieces[place] = holders - 1, nbytes
            else:
                self.nbytes -= nbytes


@dataclass(eq=False)
class Entry:
    """text: what the tokens say, special tokens included; None where it is not known. state: None while it is not in memory, places:
    where its memory lies. file_bytes: None while it is not on disk. writing: the state that is on its way there."""

    tokens: Tokens
    adapter: str | None
    text: str | None
    state: State | None = None
    places: tuple[int, ...] = ()
    file_bytes: int | None = None
    writing: State | None = None


class StateCache:
    """Least recently used states within a number of bytes, and, where a folder is given, on disk.

    new_state: makes an empty state of an adapter, to load files into. model: the backend's fingerprint; what another model left gives no
    text its tokens, as their ids may mean something else. What states share counts once, and the one that is being written is held beside
    the others. What is dropped from memory stays on disk up to ``disk_bytes``; ``flush`` waits for the disk. A state that was
    dropped before its turn came, or that the disk had no room for, is gone and counted in ``unsaved``. Safe to use from several threads.
    A damaged or foreign file counts as absent, said once. Two processes cannot share a folder.
    """

    def __init__(
        self, new_state: Callable[[str | None], State], *, most_bytes: int = 1 << 30, folder: Path | None = None,
        disk_bytes: int = 1 << 33, model: str = "",
    ) -> None:  # fmt: skip
        self._new_state, self.model, self.most_bytes, self.folder, self.disk_bytes = new_state, model, most_bytes, folder, disk_bytes
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()  # least recently used first
        self._lengths: dict[tuple[str | None, int], int] = {}  # entries of so many tokens
        self._memory = Memory()
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)
        self._queue: dict[bytes, None] = {}  # entries to be written, oldest first
        self._unwanted: list[bytes] = []  # entries whose files are to be removed
        self._writer: threading.Thread | None = None  # while there is something for it to do
        self._refused = False  # the disk took the last state
        self.disk_nbytes = 0
        self.hits = self.misses = self.cached_tokens = self.dropped = self.unsaved = 0
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # conversations are nobody else's to read
            self._read_folder(folder)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Of the states in memory; what several of them share counts once."""
        return self._memory.nbytes

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

    def at_hand(self, tokens: Sequence[int], adapter: str | None = None) -> bool:
        """Whether ``find`` would read no file."""
        if self.folder is None:
            return True
        with self._lock:
            key = self._longest(np.asarray(tokens, np.int32), adapter)
            entry = None if key is None else self._entries[key]
            return entry is None or entry.state is not None or entry.writing is not None

    def find(self, tokens: Sequence[int], adapter: str | None = None) -> State | None:
        """The state that has read most of a prompt's beginning, and not all of it; a copy, so that the one here stays as it is."""
        prompt = np.asarray(tokens, np.int32)
        while True:
            with self._lock:
                key = self._longest(prompt, adapter)
                if key is None:
                    self.misses += 1
                    return None
                entry = self._entries[key]
                state = entry.writing if entry.state is None else entry.state
                if state is not None:
                    return self._found(key, entry, state)
            try:
                state = self._load(key, entry)  # the file may be removed meanwhile, the entry too
            except (OSError, Zamba2Error) as error:
                with self._lock:
                    self._cannot_load(key, entry, error)
                continue
            with self._lock:
                return self._found(key, entry, state)

    def put(self, tokens: Sequence[int], state: State, text: str | None = None) -> None:
        """Keep a state that has read ``tokens``; it must not go on afterwards. One larger than all there is room for is not kept."""
        own = np.asarray(tokens, np.int32)
        if state.position != len(own) or not len(own):
            raise ValueError(f"the state has read {state.position} tokens, not {len(own)}")
        if sum(state.memory().values()) > self.most_bytes:
            return
        key = _key(own, state.adapter)
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                entry = self._add(key, Entry(own, state.adapter, text))
            entry.text = text or entry.text
            self._entries.move_to_end(key)
            self._hold(entry, state)
            self._write_later(key, entry)
            self._trim()

    def clear(self) -> None:
        """Forget everything, files too."""
        with self._lock:
            for key in list(self._entries):
                self._forget(key)
        self.flush()

    def flush(self) -> None:
        """Wait until what is to be written is on disk, and what is to be removed is not."""
        with self._idle:
            while self._writer is not None:
                self._idle.wait(0.2)  # longer ones might lose a Ctrl-C

    # ---- entries; under the lock

    def _longest(self, prompt: Tokens, adapter: str | None) -> bytes | None:
        """The key of the longest beginning that is known."""
        for length in sorted((n for name, n in self._lengths if name == adapter and n < len(prompt)), reverse=True):
            if (key := _key(prompt[:length], adapter)) in self._entries:
                return key
        return None

    def _found(self, key: bytes, entry: Entry, state: State) -> State:
        """A copy of an entry's state, which is in memory from now on unless it was forgotten while it was read."""
        if self._entries.get(key) is entry:
            self._entries.move_to_end(key)
            if entry.state is None:
                self._hold(entry, state)
        self.hits += 1
        self.cached_tokens += len(entry.tokens)
        found = state.copy()
        self._trim()
        return found

    def _add(self, key: bytes, entry: Entry) -> Entry:
        place = entry.adapter, len(entry.tokens)
        self._lengths[place] = self._lengths.get(place, 0) + 1
        self._entries[key] = entry
        return entry

    def _forget(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        place = entry.adapter, len(entry.tokens)
        self._lengths[place] -= 1
        if not self._lengths[place]:
            del self._lengths[place]
        if key in self._queue:
            del self._queue[key]
            self.unsaved += 1
        self._release(entry)
        self._remove_later(key, entry)

    def _hold(self, entry: Entry, state: State) -> None:
        pieces = state.memory()
        self._memory.add(pieces)
        self._memory.remove(entry.places)
        entry.state, entry.places = state, tuple(pieces)

    def _release(self, entry: Entry) -> None:
        self._memory.remove(entry.places)
        entry.state, entry.places = None, ()

    def _trim(self) -> None:
        """Let go of states until the others fit: first of those that are on disk too, or nearly so."""
        if self._memory.nbytes <= self.most_bytes:
            return
        held = [(key, entry) for key, entry in self._entries.items() if entry.state is not None]
        held.sort(key=lambda item: item[1].file_bytes is None and item[1].writing is None)
        for key, entry in held:
            if self._memory.nbytes <= self.most_bytes:
                break
            self.dropped += 1
            self._release(entry)
            if entry.file_bytes is None and entry.writing is None:
                self._forget(key)

    # ---- the disk

    def _write_later(self, key: bytes, entry: Entry) -> None:
        """Under the lock. Of too many that wait the oldest are left out."""
        if self.folder is None or entry.file_bytes is not None or entry.writing is not None:
            return
        self._queue[key] = None
        while len(self._queue) > MOST_QUEUED:
            del self._queue[next(iter(self._queue))]
            self.unsaved += 1
        self._wake()

    def _remove_later(self, key: bytes, entry: Entry) -> None:
        """Under the lock."""
        if entry.file_bytes is not None:
            self.disk_nbytes -= entry.file_bytes
            entry.file_bytes = None
            self._unwanted.append(key)
            self._wake()

    def _wake(self) -> None:
        """Under the lock. The writer ends when it has nothing to do, so that a cache nobody needs any more can go."""
        if self._writer is not None:
            return
        self._writer = threading.Thread(target=self._work, name="zamba2 states", daemon=True)
        try:
            self._writer.start()
        except RuntimeError as error:  # the system has no thread to give; files that are to be removed wait for the next one
            self._writer = None
            self.unsaved += len(self._queue)
            self._queue.clear()
            self._refuse(error)

    def _work(self) -> None:
        """The writer: nobody else changes files, so none is removed while it is written, nor the other way round."""
        try:
            while (tasks := self._next()) is not None:
                unwanted, saved = tasks
                for key in unwanted:
                    self._delete(key)
                if saved is not None:
                    self._save(*saved)
        except BaseException:
            self._end()
            raise

    def _next(self) -> tuple[list[bytes], tuple[bytes, Entry, State] | None] | None:
        """Entries whose files go, and one that is written; None, and the writer is over, where there is neither."""
        with self._lock:
            unwanted, self._unwanted = self._unwanted, []
            if self._queue:
                key = next(iter(self._queue))
                del self._queue[key]
                entry = self._entries[key]
                assert entry.state is not None  # one that is dropped before it is written is forgotten
                entry.writing = entry.state
                return unwanted, (key, entry, entry.state)
            if not unwanted:
                self._end()
                return None
            return unwanted, None

    def _end(self) -> None:
        with self._idle:
            self._writer = None
            self._idle.notify_all()

    def _save(self, key: bytes, entry: Entry, state: State) -> None:
        """Write an entry, without the lock; it may be dropped or forgotten meanwhile."""
        try:
            file_bytes: int | None = self._write(key, entry, state)
        except Exception as error:  # whatever the backend's trouble is, others can be saved
            self._refuse(error)
            self._delete(key)
            file_bytes = None
        with self._lock:
            entry.writing = None
            if file_bytes is None:
                self.unsaved += 1
            else:
                self._refused = False
                entry.file_bytes = file_bytes
                self.disk_nbytes += file_bytes
            if self._entries.get(key) is not entry:
                self._remove_later(key, entry)
            elif entry.state is None and file_bytes is None:
                self._forget(key)
            self._trim_disk()

    def _write(self, key: bytes, entry: Entry, state: State) -> int:
        """State first, then the note that makes it known, each beside and renamed: a process that is killed leaves nothing half-written
        that would be looked at. That holds without syncing; a power cut may take the note, and a state without one counts as absent."""
        file = self._file(key)
        note = file.with_suffix(".json")
        state.save(file)
        about = {"tokens": entry.tokens.tolist(), "adapter": entry.adapter, "text": entry.text, "model": self.model}
        write_text(note, json.dumps(about))
        return file.stat().st_size + note.stat().st_size

    def _refuse(self, error: BaseException) -> None:
        """Say it once, until the disk takes states again."""
        if not self._refused:
            notice(f"a conversation's state cannot be saved ({error}); it and others like it are kept in memory alone.", once=False)
        self._refused = True

    def _trim_disk(self) -> None:
        """Under the lock."""
        if self.disk_nbytes <= self.disk_bytes:
            return
        for key, entry in list(self._entries.items()):
            if self.disk_nbytes <= self.disk_bytes:
                break
            self._remove_later(key, entry)
            if entry.state is None and entry.writing is None:
                self._forget(key)

    def _file(self, key: bytes) -> Path:
        assert self.folder is not None
        return self.folder / f"{key.hex()}.state"

    def _delete(self, key: bytes) -> None:
        for file in (self._file(key).with_suffix(".json"), self._file(key)):
            with suppress(OSError):  # gone already; or the folder is closed to us, and it is found again at the next start
                file.unlink()

    def _load(self, key: bytes, entry: Entry) -> State:
        """An entry's state from its file, without the lock. Raises OSError and Zamba2Error."""
        state = self._new_state(entry.adapter)
        state.load(self._file(key))
        if state.position != len(entry.tokens):
            raise Zamba2Error(f"{self._file(key)} has read {state.position} tokens instead of {len(entry.tokens)}.")
        return state

    def _cannot_load(self, key: bytes, entry: Entry, error: BaseException) -> None:
        """Under the lock. Its file is of no use; nothing needs to be said where it went because it was forgotten."""
        if self._entries.get(key) is not entry or entry.file_bytes is None:
            return
        notice(f"a saved state cannot be used and is dropped: {error}")
        self._remove_later(key, entry)
        if entry.state is None:
            self._forget(key)
        else:  # it was put again meanwhile
            self._write_later(key, entry)

    def _read_folder(self, folder: Path) -> None:
        """What an earlier process left, oldest first; files of ours that are of no use are removed."""
        found = []
        for file in folder.glob("*.json"):
            if not _is_hex(file.stem):  # another's: the folder may hold anything
                continue
            try:
                about = json.loads(file.read_text(encoding="utf-8"))
                tokens = np.asarray(about["tokens"], np.int32)
                adapter, text = about["adapter"], about["text"]
                usable = tokens.ndim == 1 and all(value is None or isinstance(value, str) for value in (adapter, text))
                if not usable or _key(tokens, adapter).hex() != file.stem:
                    raise ValueError("it is not what its name says")
                saved = os.stat(file.with_suffix(".state"))
                text = text if about.get("model") == self.model else None
                entry = Entry(tokens, adapter, text, file_bytes=saved.st_size + file.stat().st_size)
                found.append((saved.st_mtime_ns, entry))
            except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                notice(f"{file} is no saved state of ours and is dropped ({error}).")
                file.unlink(missing_ok=True)
        with self._lock:
            for _, entry in sorted(found, key=lambda item: item[0]):
                self._add(_key(entry.tokens, entry.adapter), entry)
                self.disk_nbytes += entry.file_bytes or 0
            for file in folder.iterdir():  # the process that was writing them was killed
                nameless = file.suffix == ".state" and _is_hex(file.stem) and bytes.fromhex(file.stem) not in self._entries
                if nameless or LEFTOVER.fullmatch(file.name):
                    file.unlink(missing_ok=True)
            self._trim_disk()


def _key(tokens: Tokens, adapter: str | None) -> bytes:
    return hashlib.blake2b(tokens.tobytes(), key=hashlib.sha256((adapter or "").encode()).digest(), digest_size=16).digest()


def _is_hex(text: str) -> bool:
    return len(text) == 32 and all(letter in "0123456789abcdef" for letter in text)
