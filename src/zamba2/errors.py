"""The one error type that users see."""

from __future__ import annotations

import sys

__all__ = ["Zamba2Error", "notice"]


class Zamba2Error(Exception):
    """Something the user can fix. ``str(error)`` is one sentence: what was found, what was expected, what to do.

    The command line prints it without a traceback and exits with code 2.
    """


_said: set[str] = set()


def notice(message: str, *, once: bool = True) -> None:
    """Say one line on standard error; with ``once``, only the first time in this process."""
    if once and message in _said:
        return
    _said.add(message)
    print(f"zamba2: {message}", file=sys.stderr, flush=True)
