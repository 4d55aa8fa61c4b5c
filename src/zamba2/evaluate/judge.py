"""Asking a chat endpoint as OpenAI's clients do: a judge, or a model elsewhere that is to be measured.

One POST to URL/chat/completions a request, with the standard library. What may pass is tried again (timeouts, broken connections,
429, 500 to 599), what cannot pass ends the run in one sentence, and what concerns one request alone is a ``Failure``, never a text.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import queue
import random
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from zamba2.errors import Zamba2Error, notice
from zamba2.language.messages import brief

__all__ = ["OPENAI", "Endpoint", "Estimate", "Failure", "Outcome", "estimate"]

OPENAI = "https://api.openai.com/v1"
CHAT = "/chat/completions"
LONGEST_BACKOFF = 60.0  # seconds between two tries of one request
LONGEST_WAIT = 600.0  # seconds; a Retry-After beyond it means that the day's share is used up
FAILURES_IN_A_ROW = 10  # then something is wrong that more requests would only pay for
LARGEST_REPLY = 1 << 24  # bytes
CHARACTERS_PER_TOKEN = 4  # OpenAI's rule of thumb for English text


@dataclass(frozen=True)
class Failure:
    """Why there is no answer."""

    reason: str


Outcome = str | Failure  # what was answered, or why nothing was
Receive = Callable[[int, Outcome], None]


class Again(Exception):
    """What may pass if it is tried again, after ``wait`` seconds where the endpoint says so."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Pace:
    """Requests start at least ``60 / per_minute`` seconds apart, and none while the endpoint wants to be left alone."""

    def __init__(self, per_minute: float | None) -> None:
        self._apart = 60 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def hold(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def wait(self, stop: threading.Event) -> bool:
        """Wait for a turn; False if ``stop`` is set before it comes."""
        while not stop.is_set():
            with self._lock:
                now = time.monotonic()
                left = self._next - now
                if left <= 0:
                    self._next = now + self._apart
                    return True
            stop.wait(left)
        return False


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The library would take the key along to wherever it is sent."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


T = TypeVar("T")

# A signal that comes just before a wait without limit does not end it: Python only looks for signals between its own steps.
TICK = 0.2  # seconds


def _wait(event: threading.Event) -> None:
    while not event.wait(TICK):
        pass


def _next(items: queue.SimpleQueue[T]) -> T:
    while True:
        with contextlib.suppress(queue.Empty):
            return items.get(timeout=TICK)


class Endpoint:
    """A model behind an OpenAI-compatible chat endpoint.

    model: its name there. url: the base, as in https://api.openai.com/v1. key_variable: the environment variable with the key, which
    endpoints on this machine may do without. what: what errors call it. timeout: seconds for one try. retries: after the first try.
    backoff: seconds before the first retry, doubled for each further one, less up to a half at random. requests_per_minute: retries
    count. parallel: requests on their way at once. options: fields of the request's JSON to add or replace, None leaves one out.
    may_be_empty: whether a reply without text is one, and no failure.

    Raises Zamba2Error for settings that cannot work and where there is no key.
    """

    def __init__(
        self, model: str, url: str = OPENAI, *, key_variable: str = "OPENAI_API_KEY", what: str = "the judge", timeout: float = 120.0,
        retries: int = 6, backoff: float = 1.0, requests_per_minute: float | None = None, parallel: int = 4,
        options: Mapping[str, Any] | None = None, may_be_empty: bool = False,
    ) -> None:  # fmt: skip
        if not model.strip():
            raise Zamba2Error(f"{what} has no name; give the model's name at the endpoint, as in gpt-4.")
        for name, value in {"timeout": timeout, "parallel": parallel, "requests_per_minute": requests_per_minute}.items():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise Zamba2Error(f"{name} is {value}; a number above 0 is needed.")
        for name, value in {"retries": retries, "backoff": backoff}.items():
            if not (math.isfinite(value) and value >= 0):
                raise Zamba2Error(f"{name} is {value}; 0 or more is needed.")
        self.model, self.what, self.key_variable = model, what, key_variable
        self.timeout, self.retries, self.backoff, self.parallel = timeout, int(retries), backoff, int(parallel)
        self.options, self.may_be_empty = dict(options or {}), may_be_empty
        self.url, local = self._address(url)
        self._key = self._read_key(local)
        self._pace = Pace(requests_per_minute)
        self._reached = False
        # A proxy cannot reach what runs on this machine.
        handlers = [_NoRedirects(), *([urllib.request.ProxyHandler({})] if local else [])]
        self._opener = urllib.request.build_opener(*handlers)

    def _address(self, url: str) -> tuple[str, bool]:
        """Where requests go, and whether that is this machine."""
        try:
            parts = urlsplit(url.strip())
            host, _ = parts.hostname, parts.port  # the port's property complains of a wrong one
        except ValueError:
            host, parts = None, urlsplit("")
        if parts.scheme not in ("http", "https") or not host or not url.isascii() or len(url.split()) != 1:
            raise Zamba2Error(f"{brief(repr(url))} is no address of {self.what}; a base URL is needed, as in {OPENAI}.")
        if parts.username is not None:
            raise Zamba2Error(f"the address of {self.what} holds a user name; put the key into {self.key_variable} and leave it out.")
        path = parts.path.rstrip("/").removesuffix(CHAT) + CHAT
        local = host in ("localhost", "::1", "0.0.0.0") or host.startswith("127.")
        return urlunsplit((parts.scheme, parts.netloc, path, parts.query, "")), local

    def _read_key(self, local: bool) -> str | None:
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            if local:
                return None
            where = f"{self.what} at {self.url} needs a key and {self.key_variable} is not set"
            raise Zamba2Error(f"{where}; set it to the key, or to any word if the endpoint wants none.")
        if not key.isascii() or not key.isprintable() or " " in key:
            raise Zamba2Error(f"{self.key_variable} holds characters that no key has; set it to the key alone.")
        return key

    # ---- one request -------------------------------------------------------------------------------------------------

    def ask(
        self, messages: Sequence[Mapping[str, str]], *, max_tokens: int, temperature: float = 0.0, seed: int | None = None,
        stop: threading.Event | None = None,
    ) -> Outcome | None:  # fmt: skip
        """The next message of a conversation; None if ``stop`` was set before there was any outcome.

        Raises Zamba2Error where asking anything more is of no use: key, model or address are wrong, or nobody is there.
        """
        stop = stop or threading.Event()
        body: dict[str, Any] = {
            "model": self.model, "messages": [dict(message) for message in messages], "max_tokens": max_tokens,
            "temperature": temperature, "seed": seed,
        }  # fmt: skip
        body = {name: value for name, value in (body | self.options).items() if value is not None}
        data = json.dumps(body).encode()
        for attempt in range(self.retries + 1):
            if not self._pace.wait(stop):
                return None
            try:
                outcome = self._attempt(data)
            except Again as again:
                if again.wait is not None:
                    if again.wait > LONGEST_WAIT:
                        asked = f"{self._name} wants to be left alone for {again.wait:.0f} seconds ({again})"
                        raise Zamba2Error(f"{asked}; run this again then, what was answered so far is kept.") from None
                    self._pace.hold(again.wait)
                if attempt == self.retries:
                    return Failure(f"{again}, {attempt + 1} times")
                pause = min(LONGEST_BACKOFF, self.backoff * 2**attempt) * random.uniform(0.5, 1)
                if stop.wait(pause if again.wait is None else max(pause, again.wait)):
                    return None
            else:
                self._reached = True
                return outcome
        raise AssertionError("unreachable")

    @property
    def _name(self) -> str:
        return f"{self.what} ({self.model} at {self.url.partition('?')[0]})"  # some put a key behind the question mark

    def _attempt(self, data: bytes) -> Outcome:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "zamba2"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, data, headers, method="POST")
        deadline = time.monotonic() + self.timeout
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                return self._read(self._body(response, deadline))
        except urllib.error.HTTPError as error:
            with error:
                return self._refused(error, deadline)
        except urllib.error.URLError as error:
            raise self._no_connection(error.reason) from None
        except (TimeoutError, http.client.HTTPException, OSError) as error:
            raise self._no_connection(error) from None

    def _no_connection(self, error: object) -> Again | Zamba2Error:
        if isinstance(error, TimeoutError):
            return Again(f"no answer within {self.timeout:g} seconds")
        if isinstance(error, ssl.SSLCertVerificationError):
            return Zamba2Error(f"{self._name} shows a certificate that is not trusted ({brief(error.verify_message)}); check the address.")
        broken = isinstance(error, (ConnectionError, http.client.HTTPException))
        if not broken or isinstance(error, (ConnectionRefusedError, socket.gaierror)):
            reason = f"cannot be reached ({brief(getattr(error, 'strerror', None) or error)})"
            # What has answered before may only be starting again.
            return Again(reason) if self._reached else Zamba2Error(f"{self._name} {reason}; check the address and the connection.")
        return Again("the connection broke off")

    def _body(self, response: Any, deadline: float) -> bytes:
        """All of a reply. Raises Again if it ends early or does not end in time."""
        length = response.headers.get("Content-Length", "")
        expected = int(length) if length.isdecimal() else None
        received = bytearray()
        while expected is None or len(received) < expected:
            piece = response.read1(1 << 16)
            if not piece:
                break
            received += piece
            if time.monotonic() > deadline:
                raise TimeoutError
            if len(received) > LARGEST_REPLY:
                break
        if expected is not None and len(received) < min(expected, LARGEST_REPLY):
            raise Again("the connection broke off")
        return bytes(received)

    def _read(self, body: bytes) -> Outcome:
        """The text of a reply with status 200."""
        try:
            reply = json.loads(body)
        except (ValueError, RecursionError):
            return Failure(f"the reply is not JSON: {self._shown(body.decode(errors='replace')) or 'it is empty'}")
        if not isinstance(reply, dict):
            return Failure("the reply is not a JSON object")
        choices = reply.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            error = _message_of(reply)
            return Failure(f"the reply is an error: {self._shown(error)}" if error else "the reply has no choices")
        message = choices[0].get("message")
        if not isinstance(message, dict):
            return Failure("the reply's first choice has no message")
        text = message.get("content")
        if isinstance(message.get("refusal"), str) and not text:
            return Failure(f"it refused: {self._shown(message['refusal'])}")
        if text is not None and not isinstance(text, str):
            return Failure(f"the reply's content is a {type(text).__name__} and no text")
        if not (text and text.strip()) and not self.may_be_empty:
            return Failure("the reply is empty")
        return text or ""

    def _refused(self, error: urllib.error.HTTPError, deadline: float) -> Failure:
        """What a status other than 200 means. Raises Again or Zamba2Error unless it concerns this request alone."""
        status, said, code = error.code, "", None
        try:
            body = self._body(error, deadline)
            said = body.decode(errors="replace")
            reply = json.loads(body)
            said = _message_of(reply) or said
            code = reply["error"].get("code") if isinstance(reply, dict) and isinstance(reply.get("error"), dict) else None
        except (Again, ValueError, RecursionError, OSError, http.client.HTTPException):
            pass  # the status says enough
        reason = f"status {status}" + (f": {self._shown(said)}" if said.strip() else "")
        if status in (401, 403):
            key = f"the key in {self.key_variable}" if self._key else f"requests without a key, and {self.key_variable} is not set"
            raise Zamba2Error(f"{self._name} refuses {key} ({reason}); check the key and what it may be used for.")
        if status == 404:
            raise Zamba2Error(f"{self._name} is not there ({reason}); check the model's name and the base URL, which often ends in /v1.")
        if 300 <= status < 400:
            place = brief(error.headers.get("Location", "elsewhere"))
            raise Zamba2Error(f"{self._name} redirects to {place}; give that base URL if it can be trusted with the key.")
        if code == "insufficient_quota":
            raise Zamba2Error(f"the account at {self._name} has no credit left ({reason}); add some and run this again.")
        if status in (408, 409, 425, 429) or status >= 500:
            self._reached = True
            raise Again(reason, _seconds(error.headers.get("Retry-After")))
        return Failure(reason)

    def _shown(self, text: str) -> str:
        """A text from outside on one short line, without the key, which some endpoints repeat."""
        return brief(text.replace(self._key, "...") if self._key else text)

    # ---- many requests -----------------------------------------------------------------------------------------------

    def ask_all(
        self, conversations: Sequence[Sequence[Mapping[str, str]]], receive: Receive, *, max_tokens: int, temperature: float = 0.0,
        seed: int | None = None,
    ) -> None:  # fmt: skip
        """Ask for the next message of each, some at a time; ``receive(index, outcome)`` is called for one after another as they come.

        It is called outside the main thread, so that Ctrl-C never falls between a reply and its being written down. On Ctrl-C nothing new
        is sent, and replies that are on their way, and will be paid for, are waited for; a second Ctrl-C leaves them.
        Raises Zamba2Error as ``ask`` does, after FAILURES_IN_A_ROW failures, and what ``receive`` raises.
        """
        stop, over, lock = threading.Event(), threading.Event(), threading.Lock()
        running = min(self.parallel, len(conversations))
        waiting = iter(range(len(conversations)))
        errors: list[BaseException] = []
        failures = 0

        def work() -> None:
            nonlocal failures, running
            try:
                while not stop.is_set():
                    with lock:
                        index = next(waiting, None)
                    if index is None:
                        return
                    outcome = self.ask(conversations[index], max_tokens=max_tokens, temperature=temperature, seed=seed, stop=stop)
                    if outcome is None:
                        return
                    with lock:
                        receive(index, outcome)
                        failures = failures + 1 if isinstance(outcome, Failure) else 0
                        if isinstance(outcome, Failure) and failures == FAILURES_IN_A_ROW:
                            last = f"{self._name} failed {failures} requests in a row, the last one with: {outcome.reason}"
                            raise Zamba2Error(f"{last}; mend that and run this again, what was answered so far is kept.")
            except BaseException as error:
                errors.append(error)
                stop.set()
            finally:
                with lock:
                    running -= 1
                    if running == 0:
                        over.set()

        if not conversations:
            return
        threads = [threading.Thread(target=work, daemon=True) for _ in range(running)]
        started = 0
        # An event and not Thread.join, which in Python 3.11 takes a thread for ended when Ctrl-C interrupts it (bpo-45274).
        try:
            for thread in threads:
                thread.start()
                started += 1
            _wait(over)
        except BaseException:
            stop.set()
            with lock:
                running -= len(threads) - started
                if running == 0:
                    over.set()
            if not over.is_set():
                notice(f"interrupted; waiting for replies on their way, {running} at most (Ctrl-C again leaves them).", once=False)
            _wait(over)
            raise
        if errors:
            raise errors[0]

    def replies(
        self, conversations: Sequence[Sequence[Mapping[str, str]]], *, max_tokens: int, temperature: float = 0.0, seed: int | None = None
    ) -> Iterator[tuple[int, str]]:
        """(index, text) as they come; nothing new is sent once the caller has left.

        Raises Zamba2Error for the first failure, after what else had come by then.
        """
        came: queue.SimpleQueue[tuple[int, Outcome] | None] = queue.SimpleQueue()
        problems: list[BaseException] = []
        left = threading.Event()

        def receive(index: int, outcome: Outcome) -> None:
            if left.is_set():
                raise GeneratorExit
            came.put((index, outcome))
            if isinstance(outcome, Failure):
                raise Zamba2Error(f"{self._name} did not answer: {outcome.reason}; run this again, what was answered so far is kept.")

        def run() -> None:
            try:
                self.ask_all(conversations, receive, max_tokens=max_tokens, temperature=temperature, seed=seed)
            except BaseException as error:
                problems.append(error)
            came.put(None)

        threading.Thread(target=run, daemon=True).start()
        try:
            while (item := _next(came)) is not None:
                if isinstance(item[1], str):
                    yield item[0], item[1]
        finally:
            left.set()
        if problems:
            raise problems[0]


def _message_of(reply: Any) -> str:
    """The message of an error in OpenAI's form, or ""."""
    error = reply.get("error") if isinstance(reply, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else ""


def _seconds(value: str | None) -> float | None:
    """Retry-After, which is a number of seconds or a date, in seconds from now; None if it is neither."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


# ---- what it will cost -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """What asking may cost. Tokens in all; cost in the currency of the prices, None without prices."""

    requests: int
    prompt_tokens: int
    reply_tokens: int
    cost: float | None
    rule: str

    def __str__(self) -> str:
        tokens = f"about {self.prompt_tokens:,} prompt and {self.reply_tokens:,} reply tokens"
        cost = "no prices given" if self.cost is None else f"about {self.cost:.2f} at the prices given"
        return f"{self.requests:,} requests, {tokens}, {cost} ({self.rule})"


def estimate(
    conversations: Sequence[Sequence[Mapping[str, str]]], *, reply_characters: int, prices: tuple[float, float] | None = None
) -> Estimate:
    """Tokens by a rule of thumb, a token for four characters begun; retries are not foreseen.

    reply_characters: of a usual reply. prices: of a million prompt tokens and of a million reply tokens. Raises Zamba2Error.
    """
    if prices is not None and not all(math.isfinite(price) and price >= 0 for price in prices):
        raise Zamba2Error(f"the prices are {prices[0]} and {prices[1]}; two numbers of 0 or more are needed, per million tokens.")
    counts = [sum(-(-len(message["content"]) // CHARACTERS_PER_TOKEN) for message in messages) for messages in conversations]
    prompt, reply = sum(counts), len(conversations) * -(-reply_characters // CHARACTERS_PER_TOKEN)
    cost = None if prices is None else (prompt * prices[0] + reply * prices[1]) / 1e6
    rule = f"{CHARACTERS_PER_TOKEN} characters a token, replies of {reply_characters} characters, no retries"
    return Estimate(len(conversations), prompt, reply, cost, rule)
