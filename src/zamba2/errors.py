"""The one error type that users see."""

from __future__ import annotations

import sys
from contextlib import suppress

__all__ = ["Zamba2Error", "install", "notice"]


class Zamba2Error(Exception):
    """Something the user can fix. ``str(error)`` is one sentence: what was found, what was expected, what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def install(extra: str) -> str:
    """What to do where the libraries of one of our extras are missing: the end of a sentence."""
    command = f"`pip install 'zamba2[{extra}]'`"
    if extra in ("hf", "train", "evaluate") and sys.version_info < (3, 11):  # transformers' own limit
        return f"take Python 3.11 or newer (this is {sys.version_info[0]}.{sys.version_info[1]}), and there {command}"
    return f"install with {command}"


_said: set[str] = set()


def notice(message: str, *, once: bool = True) -> None:
    """Say one line on standard error; with ``once``, only the first time in this process."""
    if once and message in _said:
        return
    _said.add(message)
    with suppress(OSError):  # what is said beside the work must not end it
        print(f"zamba2: {message}", file=sys.stderr, flush=True)
