"""Calls of functions as text: how tools, calls and results stand in a conversation, and how a reply that may call is read.

Zamba2's chat templates know no tools, so all of it is text in plain messages. ``described`` stands behind the system's text. A call is

    <tool_call>{"name":"NAME","arguments":{...}}</tool_call>

in JSON without spaces, and ends its reply: a reply makes one call at most, behind whatever text it begins with. The grammar forces this
form and the history is written in it, so that a call which a client sends back is the text that the model wrote, whose state the cache
has. (Anthropic's clients send arguments as data: a number that the model wrote otherwise than Python would, 1e2 for 100.0, is read
again.) A result is a message of the user's, <tool_response>TEXT</tool_response>; several stand on lines of one message, and "error: "
stands before the text of what Anthropic's clients call an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from zamba2.errors import Zamba2Error

__all__ = [
    "BEGIN", "END", "NO_ARGUMENTS", "Call", "CallReader", "Calls", "Result", "Tool", "Toolbox", "Turn", "compact", "conversation",
    "described", "head", "stray_result",
]  # fmt: skip

BEGIN, END = "<tool_call>", "</tool_call>"
HEAD = re.compile(r'\{"name":"([a-zA-Z0-9_-]+)","arguments":')
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
HOW = """You can call the functions below; each line is one, with the JSON schema of its arguments.
{tools}
To call one, end with this line, its name and arguments filled in:
{call}
What it returns follows as <tool_response>RESULT</tool_response>. Answer in words where no call is needed."""

Calls = Literal["none", "may", "first", "must"]  # whether a reply calls: never, anywhere, at its beginning if at all, from its beginning


@dataclass(frozen=True)
class Tool:
    """A function that may be called. parameters: the JSON schema of its arguments, an object's."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


@dataclass(frozen=True)
class Toolbox:
    """The tools of a request and what it wants of them. named: the one that must be called, if it must be a certain one."""

    tools: tuple[Tool, ...]
    choice: Literal["none", "auto", "required"] = "auto"
    named: str | None = None

    @property
    def callable(self) -> tuple[Tool, ...]:
        return tuple(tool for tool in self.tools if self.choice != "none" and self.named in (None, tool.name))

    def calls(self, *, formatted: bool) -> Calls:
        """formatted: whether a reply that does not call is JSON of a schema, in which BEGIN is a text like any other."""
        return "none" if self.choice == "none" else "must" if self.choice == "required" else "first" if formatted else "may"


@dataclass(frozen=True)
class Call:
    """arguments: JSON text."""

    id: str
    name: str
    arguments: str

    def __str__(self) -> str:
        return f"{BEGIN}{head(self.name)}{self.arguments}}}{END}"


@dataclass(frozen=True)
class Result:
    """id: of the call."""

    id: str
    text: str

    def __str__(self) -> str:
        return f"<tool_response>{self.text}</tool_response>"


@dataclass(frozen=True)
class Turn:
    """A message, or a part of one: calls go on the assistant's message before them, and results of role "tool" stand together."""

    role: str
    parts: tuple[str | Call | Result, ...]


def head(name: str) -> str:
    """What stands between BEGIN and the arguments."""
    return f'{{"name":"{name}","arguments":'


def compact(value: Any) -> str:
    """JSON without spaces. Raises Zamba2Error where that is impossible."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except (ValueError, RecursionError):
        raise Zamba2Error("a value is nested too deep to be written as JSON; a flatter one is needed.") from None


def described(tools: Iterable[Tool]) -> str:
    """What the model is told of its tools. It does not depend on what a request wants of them: the history stays the same."""
    lines = []
    for tool in tools:
        about = {"name": tool.name} | ({} if tool.description is None else {"description": tool.description})
        lines.append(compact(about | {"parameters": tool.parameters or NO_ARGUMENTS}))
    return HOW.format(tools="\n".join(lines), call=Call("", "NAME", "{}"))


def conversation(turns: Iterable[Turn], tools: Sequence[Tool] = ()) -> list[dict[str, str]]:
    """Messages for the chat template."""
    joined: list[Turn] = []
    for turn in turns:
        before = joined[-1] if joined else None
        same = before is not None and before.role == turn.role
        if before is not None and same and (turn.role == "tool" or (turn.role == "assistant" and isinstance(turn.parts[0], Call))):
            joined[-1] = Turn(turn.role, (*before.parts, *turn.parts))
        else:
            joined.append(turn)
    messages = [{"role": "user" if turn.role == "tool" else turn.role, "content": written(turn.parts)} for turn in joined]
    if tools:
        first = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else ""
        messages.insert(0, {"role": "system", "content": f"{first}\n\n{described(tools)}" if first else described(tools)})
    return messages


def written(parts: Sequence[str | Call | Result]) -> str:
    """A message's text: its parts on lines of their own, but a call directly behind what was said before it."""
    text = ""
    for i, part in enumerate(parts):
        straight = i == 0 or (isinstance(part, Call) and isinstance(parts[i - 1], str))
        text += ("" if straight else "\n") + str(part)
    return text


def stray_result(turns: Iterable[Turn]) -> str | None:
    """The first id that a result has and no call before it."""
    known: set[str] = set()
    for turn in turns:
        for part in turn.parts:
            if isinstance(part, Call):
                known.add(part.id)
            elif isinstance(part, Result) and part.id not in known:
                return part.id
    return None


class CallReader:
    """Takes a reply's text as it comes apart into what is said and a call. What may still become a call is held back.

    name: None until a call has one. arguments: JSON text so far. is_whole: whether that is all of it.
    """

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.name: str | None = None
        self.held, self.arguments, self.is_whole = "", "", False
        self.is_calling = False  # BEGIN is behind us
        self._depth, self._in_text, self._escaped = 0, False, False

    def push(self, text: str, *, last: bool = False) -> tuple[str, str]:
        """What is certain now: text, and arguments. With ``last``, text is not held back any more."""
        self.held += text
        said = "" if self.is_calling else self._say(last)
        if self.is_calling and self.name is None and (found := HEAD.match(self.held)) is not None:
            self.name, self.held = found[1], self.held[found.end() :]
        added = ""
        if self.name is not None and not self.is_whole:
            end = self._scan(self.held)
            added, self.held = self.held[:end], self.held[end:]
            self.arguments += added
        return said, added

    def _say(self, last: bool) -> str:
        place = self.held.find(BEGIN)
        if self.calls != "none" and (place == 0 or (place > 0 and self.calls == "may")):
            said, self.held, self.is_calling = self.held[:place], self.held[place + len(BEGIN) :], True
            return said
        keep = len(self.held) if self.calls == "must" else 0 if last else self._open_end()
        said, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        if said and self.calls == "first":
            self.calls = "none"
        return said

    def _open_end(self) -> int:
        """Length of the end that may be the beginning of BEGIN."""
        if self.calls == "may":
            return next((n for n in range(min(len(self.held), len(BEGIN) - 1), 0, -1) if BEGIN.startswith(self.held[-n:])), 0)
        return len(self.held) if self.calls == "first" and BEGIN.startswith(self.held) else 0

    def _scan(self, text: str) -> int:
        """How much of a text belongs to the arguments, which end with their outermost bracket."""
        for i, letter in enumerate(text):
            if self._in_text:
                self._in_text = letter != '"' or self._escaped
                self._escaped = letter == "\\" and not self._escaped
            elif letter == '"':
                self._in_text = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if not self._depth:
                    self.is_whole = True
                    return i + 1
        return len(text)
