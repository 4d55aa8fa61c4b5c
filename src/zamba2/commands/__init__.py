"""What the commands of the command line do; each module is imported only when its command runs."""

from __future__ import annotations

import sys

__all__ = ["complain"]


def complain(message: object) -> None:
    """One line on standard error: names out of files may hold line ends, control characters, or be as long as the file."""
    line = "".join(c if c.isprintable() else " " for c in str(message)[:1000])
    print(f"zamba2: {line}", file=sys.stderr, flush=True)
