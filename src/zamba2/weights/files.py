"""Safetensors files: a bounds-checked header, tensors read one by one or mapped, written one by one. Knows no torch.

The library's own reader maps whole files and its writer holds all bytes at once; streaming a model larger than half of
the memory needs neither. Format: 8 bytes little-endian header length, JSON header, tensor bytes.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zamba2.errors import Zamba2Error

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["DTYPE_BYTES", "Entries", "Entry", "TensorFile", "forget_leftovers", "replacing", "write_tensors", "write_text"]

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
LONGEST_HEADER = 100_000_000  # bytes; the limit of the format's own library
MOST_SIDES = 8  # of a shape; with the next, keeps hostile headers from asking for endless products
LARGEST = 1 << 62
LEFT_SECONDS = 24 * 60 * 60  # without writing, until a half-written file counts as left behind


# Tensors to write: name, dtype, shape, function giving the bytes in pieces.
Entries = Sequence[tuple[str, str, Sequence[int], Callable[[], Iterable[memoryview]]]]


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: dtype as the format spells it ("BF16"), shape, and where its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class TensorFile:
    """A safetensors file open for reading. Raises Zamba2Error for anything but a well-formed file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise Zamba2Error(f"{path} cannot be opened ({error.strerror}); a safetensors file is needed.") from None
        self._map: mmap.mmap | None = None
        self._size = 0
        try:
            self.entries, self.metadata = self._parse()
        except BaseException:
            os.close(self._fd)
            self._fd = -1
            raise

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # when Python ends, this module's names may go first
        if getattr(self, "_fd", -1) >= 0:
            close(self._fd)

    def _bad(self, what: str) -> Zamba2Error:
        return Zamba2Error(f"{self.path} is not a complete safetensors file: {what}; download or write it again.")

    def _parse(self) -> tuple[dict[str, Entry], dict[str, str]]:
        try:
            status = os.fstat(self._fd)
            size, self._modified = status.st_size, status.st_mtime_ns
            self._size = size
            prefix = os.pread(self._fd, 8, 0)
        except OSError as error:
            raise Zamba2Error(f"{self.path} cannot be read ({error.strerror}); a safetensors file is needed.") from None
        if len(prefix) < 8:
            raise self._bad(f"it has {size} bytes")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(LONGEST_HEADER, size - 8):
            raise self._bad(f"its header claims {length} bytes and the file has {size}")
        try:
            header = json.loads(os.pread(self._fd, length, 8).decode("utf-8"))
        except (ValueError, RecursionError):
            raise self._bad("its header is not JSON") from None
        if not isinstance(header, dict):
            raise self._bad("its header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._bad("its metadata are not strings")
        entries = {name: self._entry(name, value, 8 + length, size) for name, value in header.items()}
        end = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
            if entry.start < end:
                raise self._bad(f"tensor {name} overlaps another one")
            end = entry.start + entry.nbytes
        return entries, metadata

    def _entry(self, name: str, value: Any, data: int, size: int) -> Entry:
        fields: list[Any] = [value.get(k) if isinstance(value, dict) else None for k in ("dtype", "shape", "data_offsets")]
        dtype, shape, offsets = fields
        whole = [isinstance(v, list) and all(type(i) is int and 0 <= i < LARGEST for i in v) for v in (shape, offsets)]
        lists = isinstance(shape, list) and len(shape) <= MOST_SIDES and isinstance(offsets, list) and len(offsets) == 2
        if not isinstance(dtype, str) or not lists or not all(whole):
            raise self._bad(f"the header entry of tensor {name} is malformed")
        if dtype not in DTYPE_BYTES:
            raise Zamba2Error(f"{self.path}: tensor {name} has dtype {dtype}; one of {', '.join(DTYPE_BYTES)} is needed.")
        start, end = offsets
        if end - start != math.prod(shape) * DTYPE_BYTES[dtype]:
            raise self._bad(f"tensor {name} has shape {shape} of {dtype} but {end - start} bytes")
        if data + end > size:
            raise self._bad(f"tensor {name} ends at byte {data + end} and the file has {size}")
        return Entry(dtype, tuple(shape), data + start, end - start)

    def about(self, kind: str) -> dict[str, Any] | None:
        """What the metadata say of a file that this program wrote, of "weights" or a "state"; None for any other."""
        try:
            found = json.loads(self.metadata.get("zamba2", "null"))
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) and found.get("kind") == kind else None

    def check_size(self) -> None:
        """Raises Zamba2Error if the file has become shorter since it was opened, as mapped bytes may be gone, or was written to."""
        now = os.fstat(self._fd)
        if now.st_size < self._size:
            raise Zamba2Error(f"{self.path} shrank from {self._size} to {now.st_size} bytes while in use; write or download it again.")
        if now.st_mtime_ns != self._modified:
            raise Zamba2Error(f"{self.path} was written to while in use; load the model again.")

    def fileno(self) -> int:
        """The file's descriptor, open while this object lives."""
        return self._fd

    def unread(self, name: str, error: int) -> Zamba2Error:
        """What to say where a tensor's bytes cannot be read. error: the system's errno, 0 where the file has ended."""
        return Zamba2Error(f"{self.path} cannot be read ({os.strerror(error)}).") if error else self._bad(f"it ended inside tensor {name}")

    def read(self, name: str) -> memoryview:
        """A copy of one tensor's bytes, one's own to write to."""
        import numpy as np  # here, so that `zamba2 --help` does without

        entry = self.entries[name]
        try:
            target = np.empty(entry.nbytes, np.uint8).data  # not filled with zeros
        except MemoryError:
            raise Zamba2Error(f"{self.path}: there is not enough memory for tensor {name}; {entry.nbytes} bytes are needed.") from None
        done = 0
        while done < entry.nbytes:
            try:
                got = os.preadv(self._fd, [target[done : done + (1 << 30)]], entry.start + done)
            except OSError as error:
                raise self.unread(name, error.errno or errno.EIO) from None
            if got == 0:
                raise self.unread(name, 0)
            done += got
        return target

    def floats(self, name: str) -> npt.NDArray[np.float32]:
        """A floating-point tensor as fp32, in its shape; what fp32 cannot hold becomes infinite."""
        import numpy as np

        entry, data = self.entries[name], self.read(name)
        if entry.dtype == "BF16":
            values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            stored = np.frombuffer(data, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[entry.dtype])
            with np.errstate(over="ignore"):
                values = stored.astype(np.float32, copy=False)
        return values.reshape(entry.shape)

    def map(self, name: str | None = None) -> memoryview:
        """One tensor's bytes, or all of the file's, mapped: copied by the system only if written to, never written back."""
        if self._map is None:
            try:
                self._map = mmap.mmap(self._fd, self._size, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise Zamba2Error(f"{self.path} cannot be mapped, {self._size} bytes of address space are needed ({error}).") from None
        if name is None:
            return memoryview(self._map)
        entry = self.entries[name]
        return memoryview(self._map)[entry.start : entry.start + entry.nbytes]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place if the block succeeds and vanishes if it does not.

    Works for a file and for a folder (created here, when the target is missing or an empty folder). A link stays one: what it names is
    written. In the main thread Ctrl-C raises KeyboardInterrupt meanwhile, whatever it does elsewhere, so that nothing is left; signals
    that end programs (of `timeout`, of a terminal that is closed) do so once all is tidied up.
    Raises Zamba2Error when the system refuses to write (disk full, no permission), and for devices.
    """
    import shutil
    import signal
    import threading

    if not path.name or "\0" in path.name:
        raise Zamba2Error(f"{path} is not a name to write to; choose another place.")
    path = Path(os.path.realpath(path))
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):  # a device's place would be taken by a file
        raise Zamba2Error(f"{path} is neither a file nor a folder; choose another place.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.partial")  # containers that share a folder share numbers
    before: dict[signal.Signals, Any] = {}  # handlers
    ended: list[int] = []

    def end(number: int, _: object) -> None:
        ended.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        if callable(signal.getsignal(signal.SIGINT)):  # not where it is ignored
            before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise Zamba2Error(f"{path} cannot be written ({error.strerror or error}); free some space or choose another place.") from None
    finally:
        if os.path.isdir(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):
                temporary.unlink()
        for number, handler in before.items():
            signal.signal(number, handler)
        if ended:
            signal.raise_signal(ended[0])


def write_text(path: Path, text: str, *, errors: str = "strict") -> None:
    """Put a text in UTF-8 in the place of a file, as ``replacing`` does. Raises Zamba2Error."""
    with replacing(path) as place:
        place.write_text(text, encoding="utf-8", errors=errors)


def forget_leftovers(folder: Path) -> None:
    """Delete what killed writers left of ``replacing`` in a folder: what nobody has written to for a day."""
    import shutil
    import time

    for path in folder.glob(".*.partial"):
        with suppress(OSError):  # another's, or just finished
            newest = max(one.stat().st_mtime for one in (path, *path.rglob("*")))
            if time.time() - newest > LEFT_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_tensors(path: Path, tensors: Entries, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, one piece in memory at a time."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, dtype, shape, _ in tensors:
        nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % 64)  # tensors start on a 64-byte border
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name, _, _, produce in tensors:
            begin, end = header[name]["data_offsets"]
            written = 0
            for piece in produce():
                file.write(piece)
                written += piece.nbytes
            if written != end - begin:
                raise ValueError(f"tensor {name} has {written} bytes, its shape and dtype need {end - begin}")
        file.flush()
        os.fsync(file.fileno())
