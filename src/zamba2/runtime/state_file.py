"""Files of saved states, the same for every backend: safetensors whose metadata say which model they belong to."""

from __future__ import annotations

import json
from pathlib import Path

from zamba2.errors import Zamba2Error
from zamba2.weights.files import Entries, TensorFile, replacing, write_tensors

__all__ = ["open_state", "write_state"]

VERSION = 1


def write_state(path: Path, entries: Entries, *, position: int, model: str, note: str) -> None:
    """Write a state beside ``path`` and rename it. model: the backend's fingerprint. Raises Zamba2Error."""
    about = {"kind": "state", "version": VERSION, "position": position, "model": model, "note": note}
    with replacing(path) as temporary:
        write_tensors(temporary, entries, {"zamba2": json.dumps(about)})


def open_state(path: Path, model: str) -> tuple[TensorFile, int, str]:
    """The file, position and note of a saved state. Raises Zamba2Error unless it is one of this model and version."""
    if not path.exists():
        raise Zamba2Error(f"{path} does not exist; a saved state is needed.")
    file = TensorFile(path)
    about = file.about("state")
    if about is None:
        raise Zamba2Error(f"{path} is not a saved Zamba2 state.")
    if about.get("version") != VERSION:
        raise Zamba2Error(f"{path} is a saved state of version {about.get('version')}; this program reads version {VERSION}.")
    if about.get("model") != model:
        raise Zamba2Error(f"{path} is the state of another model or number format; it continues only where it was made.")
    position = about.get("position")
    if not isinstance(position, int) or isinstance(position, bool) or not 0 <= position < 1 << 31:
        raise Zamba2Error(f"{path} gives its position as {position!r}; a whole number from 0 is needed.")
    return file, position, str(about.get("note", ""))
