"""``python -m zamba2`` and the ``zamba2`` command: one place that turns every error into one line and an exit code."""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # signal itself first makes enums, milliseconds in which Ctrl-C prints a traceback
import os
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line. Exit codes: 0 success, 2 anything the user can mend (bad input, interrupt, full disk)."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as under nohup
        signal.signal(signal.SIGINT, leave)
    open_streams()
    # PyTorch's threads sleep while they wait for one another. Spinning, they take the processors from those that they wait for as soon
    # as other programs want them too; left alone they are no faster for it (docs/log.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from zamba2.cli import run

    code = run(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C while the interpreter closes would print a traceback
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if code == 0 and not isinstance(error, BrokenPipeError):
            print(f"zamba2: standard output cannot be used ({error.strerror}).", file=sys.stderr)
            code = 2
    if code:
        os._exit(code)  # at once: a download's threads may wait for a silent server


def leave(*_: object) -> None:
    """What Ctrl-C does, until a command has something to tidy up and takes KeyboardInterrupt back.

    Raised inside the imports of PyTorch, KeyboardInterrupt now and then aborts the program or is lost.
    """
    try:  # noqa: SIM105 - contextlib, too, would have to be imported first
        os.write(2, b"\x1b[?25hzamba2: interrupted.\n" if os.isatty(2) else b"zamba2: interrupted.\n")  # and show the cursor
    except OSError:
        pass
    os._exit(2)


def open_streams() -> None:
    """Give closed streams (``zamba2 ... <&-``) something to read and write; print "?" for what the terminal cannot show."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - lives as long as the process
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


if __name__ == "__main__":
    main()
