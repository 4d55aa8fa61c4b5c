"""A conversation that keeps its state: each turn reads the new tokens alone, and a saved one goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zamba2.errors import Zamba2Error
from zamba2.language.generate import Piece, Progress, Request, run
from zamba2.language.messages import check_messages
from zamba2.language.tokenizer import Tokenizer
from zamba2.runtime.backend import Backend, State

__all__ = ["Conversation"]


class Conversation:
    """Messages, and the state after reading them.

    ``state`` has read ``text`` except for the tokens ``unread`` at its end (mostly the last sampled one). A reply keeps the
    tokens that were sampled, although tokenizing its text might give others. ``history``: the tokens read, as far as they are known.
    """

    def __init__(self, backend: Backend, tokenizer: Tokenizer, *, system: str | None = None) -> None:
        self.backend, self.tokenizer = backend, tokenizer
        self.messages: list[dict[str, Any]] = []
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Forget everything; begin again with a system message, if given."""
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self._forget()

    def _forget(self) -> None:
        self.state: State | None = None
        self.text = ""
        self.unread: list[int] = []
        self.history: list[int] = []
        self.cached_tokens = 0

    @property
    def system(self) -> str | None:
        """The system message, if there is one."""
        first = self.messages[0] if self.messages else {}
        return first.get("content") if first.get("role") == "system" else None

    def say(self, content: str, *, progress: Progress | None = None, **options: Any) -> Iterator[Piece]:
        """Add a user message and stream the reply. ``cached_tokens`` says how many tokens were not read again.

        Closing the iterator, or an exception out of it such as KeyboardInterrupt, ends the reply; what was said so far
        stays in ``messages`` and the conversation goes on from there.
        """
        from zamba2.language.model import make_request

        messages = [*self.messages, {"role": "user", "content": content}]
        text = self.tokenizer.render_chat(messages, add_generation_prompt=True)
        tokens = self._continuation(text)
        request = make_request(tokens, {**options, "state": self.state, "history": self.history})
        return self._reply(messages, text, request, progress)

    def _reply(self, messages: list[dict[str, Any]], text: str, request: Request, progress: Progress | None) -> Iterator[Piece]:
        pieces: list[Piece] = []
        asked: State | None = None  # what has read the prompt alone, for a reply that is cut at a stop text
        try:
            for piece in run(self.backend, [request], self.tokenizer, progress=progress):
                if request.stop and not pieces:
                    asked = piece.state.copy()
                pieces.append(piece)
                yield piece
        finally:
            if pieces:
                reply = "".join(piece.text for piece in pieces)
                self.messages = [*messages, {"role": "assistant", "content": reply}]
                self._settle(text, reply, pieces, request, asked)

    def _settle(self, text: str, reply: str, pieces: list[Piece], request: Request, asked: State | None) -> None:
        """Keep the state if what it has read is exactly the text, or else that behind the prompt; without one the next turn reads the whole
        conversation again."""
        tokens, last = [piece.token for piece in pieces], pieces[-1]
        start = 0 if request.state is None else request.state.position
        came = [*request.tokens, *tokens]
        unread = came[last.state.position - start :]  # none if the next step was interrupted half-way
        ahead = last.state.position - start > len(came)  # interrupted among the pieces of one call
        end = [tokens.pop()] if last.token in self.tokenizer.eos_token_ids and last.finish_reason == "stop" else []
        whole = self.tokenizer.incremental(skip_special_tokens=False, after=request.tokens)
        if ahead or "".join([*map(whole.push, tokens), whole.flush()]) != reply:  # cut at a stop text or inside a character
            cached = self.cached_tokens  # of this turn, whatever becomes of its state
            self._forget()
            self.cached_tokens = cached
            if asked is not None:
                self.state, self.text, self.history = asked, text, [*request.history, *request.tokens]
            return
        said = text + reply + self.tokenizer.decode(end, skip_special_tokens=False)
        self.state, self.unread, self.text = last.state, unread, said
        self.history = [*request.history, *came[: len(came) - len(unread)]]

    def _continuation(self, text: str) -> list[int]:
        """The tokens to read for ``text``, after the state if that has read its beginning, else from the start."""
        whole = self.tokenizer.encode(text, add_special_tokens=False)
        if self.state is not None and text.startswith(self.text):
            rest = self.tokenizer.encode(text[len(self.text) :], add_special_tokens=False)
            if whole[len(whole) - len(rest) :] == rest:  # a token does not reach over the border
                self.cached_tokens = self.state.position
                return self.unread + rest
            read = len(self.history)
            if read == self.state.position and whole[:read] == self.history and read < len(whole):
                self.cached_tokens = read
                return whole[read:]
        self._forget()
        return whole

    def save(self, path: str | Path) -> None:
        """Write messages and state to one file. Raises Zamba2Error if it cannot be written."""
        about = {"messages": self.messages, "text": self.text, "unread": self.unread, "history": self.history}
        (self.state or self.backend.new_state()).save(Path(path), note=json.dumps(about))

    def load(self, path: str | Path) -> None:
        """Go on with a saved conversation of the same model. Raises Zamba2Error; the present one is kept then."""
        path, state = Path(path), self.backend.new_state()
        try:
            messages, text, unread, history = _read_note(path, state.load(path), self.backend.config.vocab_size)
        except OSError as error:
            raise Zamba2Error(f"{path} cannot be read ({error.strerror or error}); a saved conversation is needed.") from None
        self._forget()
        self.messages = messages
        if state.position:
            self.state, self.text, self.unread, self.history = state, text, unread, history


def _read_note(path: Path, note: str, vocab_size: int) -> tuple[list[dict[str, Any]], str, list[int], list[int]]:
    try:
        about = json.loads(note)
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, Mapping):
        raise Zamba2Error(f"{path} holds a state, but no conversation.")
    messages, text, unread, history = about.get("messages"), about.get("text"), about.get("unread"), about.get("history", [])
    if not isinstance(messages, list) or not isinstance(text, str) or not isinstance(unread, list) or not isinstance(history, list):
        raise Zamba2Error(f"{path} is not a complete saved conversation.")
    if not all(type(token) is int and 0 <= token < vocab_size for token in [*unread, *history]):
        raise Zamba2Error(f"{path} is not a complete saved conversation.")
    if messages:
        check_messages(messages)
    return messages, text, unread, history
