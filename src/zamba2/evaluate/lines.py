"""Files of JSON lines that an interrupted run leaves behind and the next one goes on with."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zamba2.errors import Zamba2Error, notice
from zamba2.language.messages import brief

__all__ = ["Lines", "Row", "parsed"]

Row = Mapping[str, Any]


def parsed(path: Path, data: bytes, *, growing: bool) -> tuple[list[tuple[str, Row]], int]:
    """The objects in a file, each with its place, and the bytes they take. growing: half a line at the end is left out.

    A line is half if it lacks the line's end and is no JSON object: no beginning of an object is one.
    """
    rows, size = list[tuple[str, Row]](), 0
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        place, last = f"{path}, line {number}", number == len(lines)
        if line.strip():
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                if last and growing:
                    notice(f"{place} breaks off and is left out; it was being written when its process ended.", once=False)
                    return rows, size
                what = f"{place} is not valid JSON ({brief(error)})"
                raise Zamba2Error(f"{what}; the file is damaged or of another kind: one JSON object a line is needed.") from None
            if not isinstance(row, dict):
                raise Zamba2Error(f"{place} is a {type(row).__name__}; one JSON object a line is needed.")
            rows.append((place, row))
        size += len(line) + (not last)
    return rows, size


class Lines:
    """A file of JSON lines that is gone on with: ``rows`` were there, ``append`` writes one more at once.

    Half a line at the end, of a process that was killed, is taken off. Only one process at a time may have it open.
    Use as a context manager. Raises Zamba2Error.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            self._lock()
            data = path.read_bytes()
            self.rows, size = parsed(path, data, growing=True)
            if size < len(data):
                os.ftruncate(self._fd, size)
            elif data and not data.endswith(b"\n"):
                self._write(b"\n")
        except OSError as error:
            self.close()
            raise self._bad(error) from None
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Zamba2Error(f"another run is writing {self.path}; wait for it to end, or give another place.") from None
        except OSError:  # some network file systems have no locks
            pass

    def _bad(self, error: OSError) -> Zamba2Error:
        return Zamba2Error(f"{self.path} cannot be written ({error.strerror or error}); free some space or choose another place.")

    def _write(self, data: bytes) -> None:
        before = os.fstat(self._fd).st_size
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError:
            os.ftruncate(self._fd, before)
            raise

    def append(self, row: Row) -> None:
        try:
            self._write(json.dumps(row).encode() + b"\n")
        except OSError as error:
            raise self._bad(error) from None

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
