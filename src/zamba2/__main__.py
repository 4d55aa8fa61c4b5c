"""``python -m zamba2`` and the ``zamba2`` command: one place that turns every error into one line and an exit code."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line. Exit codes: 0 success, 2 anything the user can mend (bad input, interrupt, full disk)."""
    try:
        from zamba2.cli import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        print("zamba2: interrupted.", file=sys.stderr)
        code = 2
    import os
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C while the interpreter closes would print a traceback
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


if __name__ == "__main__":
    main()
