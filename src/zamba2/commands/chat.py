"""``zamba2 chat``: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from zamba2.commands import complain, interrupts_raise, say
from zamba2.commands.generate import load_with_status, reading_progress
from zamba2.errors import Zamba2Error
from zamba2.language.conversations import Conversation
from zamba2.language.model import make_request

__all__ = ["main"]

HELP = """\
/help          these lines
/reset         begin again (the system message stays)
/system TEXT   set the system message and begin again; without TEXT, show it
/save FILE     write the conversation and its state to a file
/load FILE     go on with a saved conversation
/history       show what was said
/exit          leave (as Ctrl-D does)
Ctrl-C stops a reply. Several lines: end a line with \\, or press Escape then Enter.
"""


def main(model: str, where: Mapping[str, Any], system: str | None, options: Mapping[str, Any]) -> int:
    """Load a model and talk until the user leaves. Returns the exit code: 2 where a line out of a pipe was refused.

    Raises Zamba2Error before the first turn only."""
    make_request([0], options)  # complain about options before the model is loaded
    loaded = load_with_status(model, where)
    conversation = loaded.conversation(system)
    ask = line_reader()
    import_the_rest()
    interrupts_raise()  # Ctrl-C stops a reply, and /save tidies up
    interactive, code = sys.stdin.isatty(), 0
    if interactive:
        print(f"{model}: type a message, or /help.", file=sys.stderr)
    while True:
        try:
            text = ask()
        except Zamba2Error as error:
            complain(error)
            code = 2
            continue
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("(Ctrl-D or /exit leaves)", file=sys.stderr)
            continue
        except EOFError:
            break
        if text.strip() in ("/exit", "/quit"):
            break
        try:
            if text.startswith("/"):
                command(conversation, text)
            elif text.strip():
                reply(conversation, text, options)
        except Zamba2Error as error:
            complain(error)
            code = 2
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\n(stopped)", file=sys.stderr)
    return 0 if interactive else code


def import_the_rest() -> None:
    """What a first reply imports: where Ctrl-C cuts an import short, importing again does not mend it."""
    for name in ("numpy.ma", "numpy.random", "rich.progress", "zamba2.language.template"):
        import_module(name)


def command(conversation: Conversation, line: str) -> None:
    """One slash command. Raises Zamba2Error."""
    name, _, argument = line.strip().partition(" ")
    argument = argument.strip()
    if name in ("/save", "/load") and not argument:
        raise Zamba2Error(f"{name} needs a file name, as in {name} talk.zamba2")
    if name == "/help":
        print(HELP, end="", file=sys.stderr)
    elif name == "/reset":
        conversation.reset(conversation.system)
        print("(begun again)", file=sys.stderr)
    elif name == "/system" and argument:
        conversation.reset(argument)
        print("(begun again, with this system message)", file=sys.stderr)
    elif name == "/system":
        say(f"{conversation.system or '(no system message)'}\n", sys.stderr)
    elif name == "/save":
        conversation.save(Path(os.path.expanduser(argument)))
        print(f"saved to {argument}", file=sys.stderr)
    elif name == "/load":
        conversation.load(Path(os.path.expanduser(argument)))
        print(f"{len(conversation.messages)} messages loaded", file=sys.stderr)
    elif name == "/history":
        for message in conversation.messages:
            say(f"{message['role']}: {message['content']}\n", sys.stderr)
    else:
        raise Zamba2Error(f"there is no command {name}; /help lists them.")


def reply(conversation: Conversation, text: str, options: Mapping[str, Any]) -> None:
    """Stream one reply, then say how fast it was. Ctrl-C passes through after what was said is kept."""
    start = first = time.perf_counter()
    count = 0
    with reading_progress(conversation.backend.stretch) as progress:
        pieces = conversation.say(text, progress=progress, **options)
        cached = conversation.cached_tokens
        try:
            for piece in pieces:
                if not count:
                    first = time.perf_counter()
                count += 1
                say(piece.text)
        finally:
            pieces.close()  # type: ignore[attr-defined]  # a generator: keeps what was said when interrupted
    seconds = time.perf_counter() - first
    rate = f"{(count - 1) / seconds:.1f} tokens/s, " if count > 1 and seconds > 0 else ""
    tokens = f"{count} token{'s' * (count > 1)}"
    print(flush=True)
    print(f"[{tokens}, {rate}first after {first - start:.2f} s, {cached} cached]", file=sys.stderr)


def line_reader() -> Callable[[], str]:
    """How the next message is read: with editing and history on a terminal, line by line from a pipe."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return lambda: joined(read_line)
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    class Kept(FileHistory):
        """A disk that has become full costs what was typed its place in the file, and no more."""

        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):
                super().store_string(string)

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    history: History
    try:
        folder = user_folder()
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(folder / "chat_history", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))  # for the user's eyes alone
        history = Kept(folder / "chat_history")
    except (OSError, RuntimeError):  # no place to write, or no home folder
        history = InMemoryHistory()
    session: PromptSession[str] = PromptSession(history=history, key_bindings=keys)
    lines = iter(lambda: session.prompt("> ") + "\n", None)
    return lambda: joined(lambda: next(lines))


def read_line() -> str:
    try:
        line = sys.stdin.buffer.readline().decode("utf-8")
        return line[:-2] + "\n" if line.endswith("\r\n") else line
    except UnicodeDecodeError:
        raise Zamba2Error("a line was left out: it is not UTF-8 text.") from None


def joined(read: Callable[[], str]) -> str:
    """One message: lines joined while they end with a backslash. Raises EOFError at the end of the input."""
    text = read()
    if not text:
        raise EOFError
    while text.endswith("\\\n"):
        text = text[:-2] + "\n" + read()
    return text.removesuffix("\n")


def user_folder() -> Path:
    """Where the program keeps the user's own files: $ZAMBA2_HOME, else the system's place for such data."""
    if home := os.environ.get("ZAMBA2_HOME"):
        return Path(home)
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "zamba2"
