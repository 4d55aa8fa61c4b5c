"""Calls of functions as text: how tools, calls and results stand in a conversation, and how a reply that may call is read.

Zamba2's chat templates know no tools, so all of it is text in plain messages. ``described`` stands behind the system's text. A call is

    <tool_call>{"name":"NAME","arguments":{...}}</tool_call>

in JSON without spaces, and ends its reply, behind whatever text that begins with; further calls follow on lines of their own. The grammar
forces this form and the history is written in it, so that calls which a client sends back are the text that the model wrote, whose state
the cache has. (Anthropic's clients send arguments as data: a number that the model wrote otherwise than Python would, 1e2 for 100.0, is
read again.) A result is a message of the user's, <tool_response>TEXT</tool_response>; several stand on lines of one message in the order
of their calls, and "error: " stands before the text of what Anthropic's clients call an error.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from zamba2.errors import Zamba2Error

__all__ = [
    "BEGIN", "END", "NO_ARGUMENTS", "Call", "CallDelta", "CallReader", "Calls", "Result", "Tool", "Toolbox", "Turn", "compact",
    "conversation", "described", "head", "stray_result", "unanswered_call",
]  # fmt: skip

BEGIN, END = "<tool_call>", "</tool_call>"
HEAD = re.compile(r'\{"name":"([a-zA-Z0-9_-]+)","arguments":')
NEXT = re.compile(re.escape(f"}}{END}\n{BEGIN}") + HEAD.pattern)  # between one call's arguments and those of the next
PIECES = re.compile(r'(?:[^"\s]+|"[^"\\]*(?:\\.[^"\\]*)*"?)+', re.DOTALL)  # of JSON between the spaces outside of its texts
MOST_CALLS = 16  # of one reply
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
HOW = """You can call the functions below; each line is one, with the JSON schema of its arguments.
{tools}
To call some, end with a line like this for each call, its name and arguments filled in:
{call}
What each returns follows as <tool_response>RESULT</tool_response>. Answer in words where no call is needed."""

Calls = Literal["none", "may", "first", "must"]  # whether a reply calls: never, anywhere, at its beginning if at all, from its beginning


@dataclass(frozen=True)
class Tool:
    """A function that may be called. parameters: the JSON schema of its arguments, an object's."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


@dataclass(frozen=True)
class Toolbox:
    """The tools of a request and what it wants of them. only: the names of those that may be called, None for all. parallel: whether a
    reply may make several calls."""

    tools: tuple[Tool, ...]
    choice: Literal["none", "auto", "required"] = "auto"
    only: tuple[str, ...] | None = None
    parallel: bool = True

    @property
    def callable(self) -> tuple[Tool, ...]:
        return tuple(tool for tool in self.tools if self.choice != "none" and (self.only is None or tool.name in self.only))

    @property
    def most_calls(self) -> int:
        """Of one reply."""
        return MOST_CALLS if self.parallel else 1

    def calls(self, *, formatted: bool) -> Calls:
        """formatted: whether a reply that does not call is JSON of a schema, in which BEGIN is a text like any other."""
        return "none" if self.choice == "none" else "must" if self.choice == "required" else "first" if formatted else "may"


@dataclass(frozen=True)
class Call:
    """arguments: JSON text. Written out it is in the grammar's form, whatever spaces a client puts in."""

    id: str
    name: str
    arguments: str

    def __str__(self) -> str:
        arguments = "".join(PIECES.findall(self.arguments))
        return f"{BEGIN}{head(self.name)}{arguments or '{}'}}}{END}"


@dataclass(frozen=True)
class CallDelta:
    """What a step adds to a reply's calls. index: which one it goes on with; name: in the step that begins it; arguments: JSON text."""

    index: int
    name: str | None
    arguments: str


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
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError:
        raise Zamba2Error("a value holds NaN or an infinite number, which JSON does not have; a finite one is needed.") from None
    except RecursionError:
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
    messages, calls = list[dict[str, str]](), list[str]()
    for turn in joined:
        calls = [part.id for part in turn.parts if isinstance(part, Call)] or calls
        role = "user" if turn.role == "tool" else turn.role
        messages.append({"role": role, "content": written(in_order(turn.parts, calls))})
    if tools:
        first = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else ""
        messages.insert(0, {"role": "system", "content": f"{first}\n\n{described(tools)}" if first else described(tools)})
    return messages


def in_order(parts: Sequence[str | Call | Result], calls: Sequence[str]) -> list[str | Call | Result]:
    """The parts with the results among them in the order of their calls, of which these are the ids: nothing else tells them apart."""
    place = {number: i for i, number in enumerate(calls)}
    results = iter(sorted((part for part in parts if isinstance(part, Result)), key=lambda result: place.get(result.id, len(place))))
    return [next(results) if isinstance(part, Result) else part for part in parts]


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


def unanswered_call(turns: Iterable[Turn]) -> str | None:
    """The first id of a call without a result, where another call of the same reply has one."""
    calls, results, role = list[str](), set[str](), ""
    for turn in (*turns, Turn("assistant", ())):
        if turn.role == "assistant" != role:
            if results and (left := [number for number in calls if number not in results]):
                return left[0]
            calls, results = [], set()
        calls += [part.id for part in turn.parts if isinstance(part, Call)]
        results |= {part.id for part in turn.parts if isinstance(part, Result)}
        role = turn.role
    return None


class CallReader:
    """Takes a reply's text as it comes apart into what is said and calls. What may still become a call is held back.

    found: the calls as far as they have come, each from its name on. whole: how many of them have come to their end.
    """

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.found: list[Call] = []
        self.whole = 0
        self.held = ""
        self.is_calling = False  # BEGIN is behind us
        self._depth, self._in_text, self._escaped = 0, False, False

    @property
    def is_done(self) -> bool:
        """Whether there are calls, and none that is cut."""
        return 0 < len(self.found) == self.whole and BEGIN not in self.held

    def push(self, text: str, *, last: bool = False) -> tuple[str, list[CallDelta]]:
        """What is certain now: text, and what is added to calls. With ``last``, text is not held back any more."""
        self.held += text
        said = "" if self.is_calling else self._say(last)
        added = []
        while self.is_calling and (delta := self._call()) is not None:
            added.append(delta)
        return said, added

    def _call(self) -> CallDelta | None:
        """What the text held back adds to the call that is open, or to the next one."""
        name = None
        if self.whole == len(self.found):
            if (head := (NEXT if self.found else HEAD).match(self.held)) is None:
                return None
            name, self.held = head[1], self.held[head.end() :]
            self.found.append(Call(uuid.uuid4().hex, name, ""))
        end = self._scan(self.held)
        added, self.held = self.held[:end], self.held[end:]
        if name is None and not added:
            return None
        self.found[-1] = replace(self.found[-1], arguments=self.found[-1].arguments + added)
        return CallDelta(len(self.found) - 1, name, added)

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
                    self.whole += 1
                    return i + 1
        return len(text)
