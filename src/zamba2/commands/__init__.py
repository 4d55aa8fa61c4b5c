"""What the commands of the command line do; each module is imported only when its command runs."""

from __future__ import annotations

import sys
from contextlib import nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

from zamba2.errors import Zamba2Error, install

__all__ = ["complain", "interrupts_raise", "need", "read_text", "say", "seen"]


MOST_BYTES = 1 << 30  # of a text; some files that are devices have no end
# Control characters but tabs and line ends: a terminal would obey them.
CONTROLS = dict.fromkeys({*range(32), *range(127, 160)} - {9, 10}, "\ufffd")


def complain(message: object) -> None:
    """One line on standard error: names out of files may hold line ends, control characters, or be as long as the file."""
    line = "".join(c if c.isprintable() else " " for c in str(message)[:1000])
    with suppress(OSError):  # a full disk, or a reader that has gone: the exit code says it as well
        print(f"zamba2: {line}", file=sys.stderr, flush=True)


def seen(text: str) -> str:
    """What a model or a file said, for a terminal: control characters do nothing there."""
    return text.translate(CONTROLS)


def say(text: str, stream: TextIO | None = None) -> None:
    """What a model or a file said, on standard output or another stream, at once: on a terminal as ``seen``, else as it is."""
    stream = stream or sys.stdout
    print(seen(text) if stream.isatty() else text, end="", file=stream, flush=True)


def interrupts_raise() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt, as there is something to tidy up; not where it is ignored from outside."""
    import signal

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def need(what: str, extra: str, *modules: str) -> None:
    """Raises Zamba2Error, which names the extra to install, unless these can be imported."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise Zamba2Error(f"{what} needs {', '.join(missing)}; {install(extra)}.")


def read_text(file: Path | None) -> str:
    """A UTF-8 text from a file or, without one, from standard input; without a byte order mark, its lines ending as in
    any text that Python reads. Raises Zamba2Error."""
    name = file or "standard input"
    try:
        with nullcontext(sys.stdin.buffer) if file is None else file.open("rb") as stream:
            data = bytearray()
            while chunk := stream.read(1 << 20):
                data += chunk
                if len(data) > MOST_BYTES:
                    raise Zamba2Error(f"{name} has more than {MOST_BYTES >> 20} MiB, or no end; give a part of it.")
        text = data.decode("utf-8-sig")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise Zamba2Error(f"{name} cannot be read ({error.strerror}); a text file is needed.") from None
    except UnicodeDecodeError as error:
        raise Zamba2Error(f"{name} is not UTF-8 text (byte {error.start}); convert it first.") from None
