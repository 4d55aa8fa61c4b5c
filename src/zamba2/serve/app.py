"""The HTTP server as an ASGI application around a scheduler.

The scheduler's thread owns the model. Texts are rendered and tokenized in worker threads, everything else happens in the event loop;
pieces cross over by ``call_soon_threadsafe``. A request whose client has gone is cancelled at the next token border.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zamba2.errors import Zamba2Error
from zamba2.language.generate import Constraint, Piece
from zamba2.language.model import LanguageModel, make_request
from zamba2.language.tokenizer import TokenTexts
from zamba2.serve.cache import StateCache
from zamba2.serve.grammar import Grammars
from zamba2.serve.protocol import (
    Ask,
    ChatBody,
    ChatStream,
    CompletionBody,
    CompletionStream,
    CountTokensBody,
    DetokenizeBody,
    MessagesBody,
    MessageStream,
    Problem,
    Reply,
    ResponseBody,
    ResponseStream,
    Said,
    Stream,
    TokenizeBody,
    anthropic_error,
    openai_error,
    problem_of,
    sampling_options,
    sse,
    token_counts,
    validation_problem,
)  # fmt: skip
from zamba2.serve.scheduler import Job, Prompt, Scheduler, TimeIsUp
from zamba2.serve.tools import Calls, Toolbox, Turn, conversation

__all__ = ["Settings", "create_app"]

COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions
MOST_SCORES = 500_000  # log-probabilities of prompts in one answer, some 20 MB
POLL = 0.25  # seconds between two looks at whether a client is still there
IDLE = 10.0  # seconds without an event after which a stream shows that it is alive
LATE = 5.0  # seconds after which a time limit that the scheduler did not keep is kept here
BODY_SECONDS = 60.0  # within which a body must have arrived
DRAINED = 1 << 26  # bytes of a body too large that are read, so that the client gets to see why it was refused
OPEN_PATHS = ("/", "/health")  # without a key
PLACEHOLDER = "x"
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Settings:
    """What is allowed and what is shown. adapters: the backend's, which clients choose as models of these names. api_keys: none leaves
    the server open. hosts: names it answers to, none for any; against web pages that have their own name resolve to this machine.
    origins: of web pages that may call it (CORS). seconds: per request."""

    model_name: str = "zamba2"
    adapters: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    max_tokens: int = 1024  # of a chat's reply where none is asked for
    most_body_bytes: int = 4 << 20
    most_n: int = 8
    most_stops: int = 16
    seconds: float = 600.0
    log: bool = True
    log_prompts: bool = False


# ---- numbers ---------------------------------------------------------------------------------------------------------


class Histogram:
    """Seconds, as Prometheus counts them: how many were at most so long."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.sum, self.count = bounds, [0] * len(bounds), 0.0, 0

    def add(self, seconds: float) -> None:
        self.sum += seconds
        self.count += 1
        for i, bound in enumerate(self.bounds):
            self.counts[i] += seconds <= bound

    def lines(self, name: str) -> Iterator[str]:
        for bound, count in zip(self.bounds, self.counts, strict=True):
            yield f'{name}_bucket{{le="{bound:g}"}} {count}'
        yield f'{name}_bucket{{le="+Inf"}} {self.count}'
        yield f"{name}_sum {self.sum:.6f}"
        yield f"{name}_count {self.count}"


@dataclass
class Metrics:
    """What is counted here; the scheduler and the cache count the rest."""

    requests: dict[tuple[str, str, int], int] = field(default_factory=dict)  # by endpoint, method and status
    first_token: Histogram = field(default_factory=lambda: Histogram((0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)))
    next_token: Histogram = field(default_factory=lambda: Histogram((0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)))

    def text(self, scheduler: Scheduler, cache: StateCache | None) -> str:
        """Prometheus' text format."""
        lines: list[str] = []

        def about(name: str, kind: str, what: str) -> None:
            lines.extend((f"# HELP {name} {what}", f"# TYPE {name} {kind}"))

        def one(name: str, kind: str, what: str, value: float) -> None:
            about(name, kind, what)
            lines.append(f"{name} {value}")

        about("zamba2_http_requests_total", "counter", "HTTP requests answered, by endpoint, method and status.")
        for (endpoint, method, status), count in sorted(self.requests.items()):
            lines.append(f'zamba2_http_requests_total{{endpoint="{endpoint}",method="{method}",status="{status}"}} {count}')
        about("zamba2_requests", "gauge", "Requests now, by place.")
        lines.extend(f'zamba2_requests{{place="{place}"}} {count}' for place, count in scheduler.counts().items())
        one("zamba2_replies_finished_total", "counter", "Replies that came to their end.", scheduler.finished)
        one("zamba2_replies_cancelled_total", "counter", "Replies whose client had gone.", scheduler.cancelled)
        one("zamba2_prompt_tokens_total", "counter", "Tokens of prompts read by the model.", scheduler.prompt_tokens)
        one("zamba2_generated_tokens_total", "counter", "Tokens sampled.", scheduler.generated_tokens)
        one("zamba2_guessed_tokens_total", "counter", "Tokens of replies guessed before they were sampled.", scheduler.guessed_tokens)
        one("zamba2_accepted_tokens_total", "counter", "Guessed tokens that came true.", scheduler.accepted_tokens)
        if cache is not None:
            one("zamba2_cached_tokens_total", "counter", "Tokens of prompts that were not read again.", cache.cached_tokens)
            one("zamba2_cache_hits_total", "counter", "Prompts whose beginning was known.", cache.hits)
            one("zamba2_cache_misses_total", "counter", "Prompts whose beginning was not known.", cache.misses)
            one("zamba2_cache_dropped_total", "counter", "States dropped from memory.", cache.dropped)
            one("zamba2_cache_unsaved_total", "counter", "States that the disk had no room or no time for.", cache.unsaved)
            one("zamba2_cache_bytes", "gauge", "Bytes of states in memory.", cache.nbytes)
            one("zamba2_cache_entries", "gauge", "States kept, in memory or on disk.", len(cache))
        about("zamba2_time_to_first_token_seconds", "histogram", "From a request to its first token.")
        lines.extend(self.first_token.lines("zamba2_time_to_first_token_seconds"))
        about("zamba2_time_per_token_seconds", "histogram", "From one token of a reply to the next.")
        lines.extend(self.next_token.lines("zamba2_time_per_token_seconds"))
        return "\n".join(lines) + "\n"


# ---- requests to the model -------------------------------------------------------------------------------------------


@contextmanager
def asked() -> Iterator[None]:
    """What is wrong with a request is the client's to mend."""
    try:
        yield
    except Problem:
        raise
    except Zamba2Error as error:
        raise Problem(str(error)) from None


class Server:
    """What the endpoints share. The methods without ``async`` are for worker threads."""

    def __init__(self, model: LanguageModel, scheduler: Scheduler, cache: StateCache | None, settings: Settings) -> None:
        self.scheduler, self.cache, self.settings = scheduler, cache, settings
        self.tokenizer, self.config = model.tokenizer, model.backend.config
        self.texts = TokenTexts(self.tokenizer)
        self.metrics = Metrics()
        self.started = int(time.time())
        self._grammars: Grammars | None = None
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the model, and of itself with each adapter."""
        return (self.settings.model_name, *self.settings.adapters)

    def chosen(self, name: str) -> tuple[str, str | None]:
        """A model's own name and its adapter. Raises Problem unless it is ours."""
        if name in self.settings.adapters:
            return name, name
        if name not in (self.settings.model_name, "default"):
            message = f"there is no model {name[:200]!r} here; there is {', '.join(map(repr, self.names))}."
            raise Problem(message, status=404, code="model_not_found", param="model")
        return self.settings.model_name, None  # the backend may have one for all

    def check_sizes(self, *, n: int | None = None, stops: int = 0, prompts: int = 1) -> None:
        """Raises Problem for more than is allowed."""
        replies = (n or 1) * prompts
        for name, count, most in (
            ("n", n or 1, self.settings.most_n), ("stop", stops, self.settings.most_stops),
            ("prompt", replies, self.scheduler.most_waiting + self.scheduler.most_running),
        ):  # fmt: skip
            if count > most:
                name = "n" if name == "prompt" and prompts == 1 else name
                what = "replies to all prompts" if name == "prompt" else name
                raise Problem(f"{what}: {count} were asked for; at most {most} are possible in one request.", param=name)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def read_chat(self, messages: Sequence[dict[str, str]], prefill: str = "") -> tuple[list[int], Prompt, str]:
        """A conversation's tokens, what the cache should know of them, and their text. prefill: the beginning of the reply."""
        prompt = self.tokenizer.render_chat(messages, add_generation_prompt=True)
        text = prompt + prefill
        if self.cache is None:
            return self.encode(text), Prompt(), text
        ids = self.cache.encode(text, self.encode)
        closing, closing_text = self._closing(messages, prompt)
        return ids, Prompt(self._borders(messages, text, ids), closing, text, closing_text), text

    def _borders(self, messages: Sequence[dict[str, str]], text: str, ids: list[int]) -> tuple[int, ...]:
        """Where the last message begins, if the template writes what is before it the same without it."""
        assert self.cache is not None
        if len(messages) < 2:
            return ()
        try:
            before = self.tokenizer.render_chat(messages[:-1], add_generation_prompt=False)
        except Zamba2Error:  # templates may insist on a user's message
            return ()
        if not before or not text.startswith(before):
            return ()
        head = self.cache.encode(before, self.encode)
        return (len(head),) if 0 < len(head) < len(ids) and ids[: len(head)] == head else ()

    def _closing(self, messages: Sequence[dict[str, str]], prompt: str) -> tuple[list[int] | None, str]:
        """What the template writes behind a reply to ``prompt``, up to where the next message begins."""
        try:
            reply = {"role": "assistant", "content": PLACEHOLDER}
            whole = self.tokenizer.render_chat([*messages, reply], add_generation_prompt=False)
        except Zamba2Error:
            return None, ""
        if not whole.startswith(prompt + PLACEHOLDER):
            return None, ""
        closing_text = whole[len(prompt) + len(PLACEHOLDER) :]
        closing = self.encode(closing_text)
        return (closing, closing_text) if closing and closing[0] in self.tokenizer.eos_token_ids else (None, "")

    def most_tokens(self, prompt: int, wanted: int | None, default: int, param: str) -> int:
        """Raises Problem where prompt and reply do not fit the context. param: the prompt's field."""
        limit = self.config.max_position_embeddings
        most = max(1, min(default, limit - prompt)) if wanted is None else wanted
        if prompt + most > limit:
            message = (
                f"the model's context has {limit} tokens, but {prompt + most} are needed ({prompt} in the prompt, {most} for the reply); "
                f"shorten the prompt, or ask for fewer."
            )
            raise Problem(message, code="context_length_exceeded", param=param)
        return most

    def check_ids(self, tokens: Sequence[int], what: str, param: str) -> None:
        wrong = next((token for token in tokens if not 0 <= token < self.config.vocab_size), None)
        if wrong is not None:
            raise Problem(f"{what} {wrong} is no token; ids from 0 to {self.config.vocab_size - 1} are needed.", param=param)

    def constraint(self, form: dict[str, Any] | None, box: Toolbox | None, field: str) -> Callable[[], Constraint] | None:
        """What makes a constraint for each reply, if there is one. form: the schema of what is no call, called ``field`` in the request;
        None for text. Raises Problem."""
        if form is None and box is None:
            return None
        field = field if box is None else "tools" if form is None else f"tools and {field}"
        try:
            with self._lock:
                self._grammars = Grammars(self.tokenizer) if self._grammars is None else self._grammars
            return self._grammars.compile(form) if box is None else self._grammars.compile_calls(box, form)
        except Zamba2Error as error:
            raise Problem(f"{field}: {error}", param=field.partition(" ")[0]) from None

    def read_turns(self, turns: Sequence[Turn], box: Toolbox | None, *, goes_on: bool) -> tuple[list[int], Prompt, str]:
        """A request's conversation as ``read_chat`` gives it. goes_on: whether the last message is the beginning of the reply."""
        messages = conversation(turns, () if box is None else box.tools)
        prefill = messages.pop()["content"] if goes_on else ""
        return self.read_chat(messages, prefill)

    def chat_asks(
        self, turns: Sequence[Turn], options: dict[str, Any], wanted: int | None, *, n: int = 1, box: Toolbox | None = None,
        form: dict[str, Any] | None = None, field: str = "response_format", goes_on: bool = False,
    ) -> list[Ask]:  # fmt: skip
        """What to ask of the scheduler for a conversation; goes_on as in ``read_turns``. Raises Problem."""
        with asked():
            self.check_ids(list(options.get("logit_bias", ())), "logit_bias:", "logit_bias")
            ids, prompt, text = self.read_turns(turns, box, goes_on=goes_on)
            options = options | {"max_tokens": self.most_tokens(len(ids), wanted, self.settings.max_tokens, "messages")}
            made = self.constraint(form, box, field)
            calls: Calls = "none" if box is None else box.calls(formatted=form is not None)
            constraints = [None if made is None else made() for _ in range(n)]
            requests = [make_request(ids, with_seed(options, i) | {"constraint": c}) for i, c in enumerate(constraints)]
            return [Ask(request, prompt, text, calls=calls) for request in requests]

    def completion_asks(self, body: CompletionBody, adapter: str | None) -> list[Ask]:
        """What to ask of the scheduler for a completion. Raises Problem."""
        options = sampling_options(body) | {"stop": body.stop, "ignore_eos": body.ignore_eos}
        options |= {"logprobs": body.logprobs, "adapter": adapter}
        prompt = Prompt(logprobs=body.logprobs if body.echo else None)
        asks: list[Ask] = []
        scores = 0
        with asked():
            self.check_ids(list(options.get("logit_bias", ())), "logit_bias:", "logit_bias")
            for number, given in enumerate(body.prompt):
                if isinstance(given, str):
                    ids, text, bos = self.tokenizer.encode(given), given, self.tokenizer.bos_token
                    added = ids[:1] == [self.tokenizer.bos_token_id] and not (bos and given.startswith(bos))
                else:
                    self.check_ids(given, "prompt:", "prompt")
                    ids, text, added = given, self.tokenizer.decode(given, skip_special_tokens=False), False
                most = self.most_tokens(len(ids), body.max_tokens, COMPLETION_TOKENS, "prompt")
                scores += (len(ids) if body.echo else 0) * (body.logprobs or 0) * (body.n or 1)
                if scores > MOST_SCORES:
                    message = f"logprobs: more than {MOST_SCORES} of them for all prompts; ask for fewer, or for fewer prompts at a time."
                    raise Problem(message, param="logprobs")
                for i in range(body.n or 1):
                    request = make_request(ids, with_seed(options | {"max_tokens": max(1, most)}, i))
                    asks.append(Ask(request, prompt, text, number, added, silent=body.max_tokens == 0))
        return asks

    async def respond(
        self, http: HTTPRequest, asks: Sequence[Ask], streamed: bool | None, stream_of: Callable[[Sequence[Reply]], Stream]
    ) -> Response:
        """Submit, and answer whole or by events. Raises Problem where the scheduler takes no more."""
        talk = Talk(self, asks, streamed=bool(streamed))
        http.scope["zamba2"] = talk  # for the log
        stream = stream_of(talk.replies)
        if talk.streamed:
            return Events(talk, stream)
        await talk.finish(http)
        return await asyncio.to_thread(lambda: answer(stream.whole()))  # log-probabilities of long prompts are megabytes


def with_seed(options: dict[str, Any], i: int) -> dict[str, Any]:
    """The options of the i-th of several replies: each has a seed of its own."""
    return options if options.get("seed") is None else options | {"seed": options["seed"] + i}


class Talk:
    """The replies to one HTTP request on their way. Made, read and cancelled in the event loop.

    streamed: each token wakes the loop; else the ends of replies do, since the model's thread and the loop share one interpreter.
    """

    def __init__(self, server: Server, asks: Sequence[Ask], *, streamed: bool) -> None:
        self.server, self.streamed = server, streamed
        self.replies = [Reply(i, ask) for i, ask in enumerate(asks)]
        self.begun = time.monotonic()
        self._end = self.begun + server.settings.seconds
        self._last = [self.begun] * len(asks)  # when each reply said its last token
        self._loop = asyncio.get_running_loop()
        self._items: deque[Said | Zamba2Error] = deque()
        self._wake = asyncio.Event()
        self._jobs: list[Job] = []
        try:
            for i, ask in enumerate(asks):
                receive = partial(self._receive, i)
                self._jobs.append(server.scheduler.submit(ask.request, ask.prompt, receive, seconds=server.settings.seconds))
        except Zamba2Error as error:
            self.cancel()
            raise problem_of(error) from None

    def _receive(self, index: int, piece: Piece | Zamba2Error) -> None:
        """Called by the model's thread. The state stays behind: a slow reader must not keep it alive."""
        if isinstance(piece, Zamba2Error):
            self._items.append(piece)
        else:
            logprobs = () if piece.logprob is None else (piece.logprob,)
            self._items.append(Said(index, piece.text, piece.token, logprobs, piece.finish_reason, piece.stop, time.monotonic()))
            if not self.streamed and piece.finish_reason is None:
                return
        if not self._wake.is_set():  # the loop looks at the items after it has cleared this
            with suppress(RuntimeError):  # the loop may have ended before the model
                self._loop.call_soon_threadsafe(self._wake.set)

    @property
    def done(self) -> bool:
        return all(reply.finish_reason is not None for reply in self.replies)

    def cancel(self) -> None:
        """Stop what is still running."""
        for job in self._jobs:
            job.cancel()

    async def next(self, seconds: float) -> Said | None:
        """The next step of any reply, or None if there is none within so long. Raises Zamba2Error where a reply failed."""
        self._wake.clear()
        if not self._items:
            try:
                await asyncio.wait_for(self._wake.wait(), seconds)
            except asyncio.TimeoutError:
                if self.server.scheduler.failed is not None:
                    raise Zamba2Error(f"the model has failed: {self.server.scheduler.failed}") from None
                if time.monotonic() > self._end + LATE:
                    raise TimeIsUp(f"the reply took longer than the {self.server.settings.seconds:.0f} s that it may.") from None
        if not self._items:
            return None
        item = self._items.popleft()
        if isinstance(item, Zamba2Error):
            raise item
        reply, job = self.replies[item.index], self._jobs[item.index]
        if not reply.tokens:
            reply.cached_tokens, reply.prompt_logprobs = job.cached_tokens, job.prompt_logprobs
            self.server.metrics.first_token.add(item.time - self.begun)
        else:
            self.server.metrics.next_token.add(item.time - self._last[item.index])
        self._last[item.index] = item.time
        return reply.add(item)

    async def finish(self, http: HTTPRequest) -> None:
        """Wait for all replies. Raises Problem, and ClientDisconnect if the client leaves."""
        looked = time.monotonic()
        try:
            while not self.done:
                await self.next(POLL)
                if time.monotonic() - looked > POLL:
                    looked = time.monotonic()
                    if await http.is_disconnected():
                        raise ClientDisconnect
        except Zamba2Error as error:
            raise problem_of(error) from None
        finally:
            self.cancel()

    async def events(self, stream: Stream) -> AsyncIterator[bytes]:
        """A stream's bytes. What goes wrong is its last event."""
        first = stream.begin()
        try:
            if not stream.waits:
                for event in first:
                    yield sse(*event)
            while not self.done:
                said = await self.next(IDLE)
                if said is None:
                    yield stream.idle()
                    continue
                for event in (*first, *stream.said(said)):  # of the first, what is left
                    yield sse(*event)
            for event in stream.end():
                yield sse(*event)
        except Zamba2Error as error:
            for event in stream.failed(problem_of(error)):
                yield sse(*event)
        finally:
            self.cancel()


class Events(StreamingResponse):
    """Server-sent events; however the response ends, so do the replies."""

    def __init__(self, talk: Talk, stream: Stream) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(talk.events(stream), media_type="text/event-stream", headers=headers)
        self.talk = talk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.talk.cancel()


def answer(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(data, separators=(",", ":"), allow_nan=False), status, headers, media_type="application/json")


def refusal(problem: Problem, path: str) -> Response:
    """An error in the layout of the API that the path belongs to."""
    headers = {} if problem.retry_after is None else {"Retry-After": f"{problem.retry_after:.0f}"}
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    layout = anthropic_error if path.startswith("/v1/messages") else openai_error
    return answer(layout(problem), problem.status, headers)


# ---- before and after every request ----------------------------------------------------------------------------------


class Gate:
    """Keys, host names and body sizes before a request; counts, the log and unforeseen errors after it."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self.server = app, server
        self.keys = [key.encode() for key in server.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.monotonic(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            problem = None
            try:
                self._admit(scope)
                body = await self._body(scope, receive)
                await self.app(scope, replayed(body, receive), noting)
            except ClientDisconnect:
                pass
            except asyncio.CancelledError:  # such as a body that was on its way when the server stopped; this task is over in any case
                problem = Problem("the server was shut down before the request was answered.", status=503, kind="server_error")
            except Problem as found:
                problem = found
            except Exception as error:
                traceback.print_exc()
                problem = Problem(f"something went wrong in the server ({type(error).__name__}).", status=500, kind="server_error")
            if problem is not None and not status:
                await refusal(problem, scope["path"])(scope, receive, noting)
        finally:
            self._note(scope, status or 499, time.monotonic() - begun)  # nginx's number for a client that has gone

    def _admit(self, scope: Scope) -> None:
        """Raises Problem for a wrong host name or key."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        hosts = self.server.settings.hosts
        if hosts and (name := host_name(headers.get(b"host", b"").decode("latin-1"))) not in hosts:
            raise Problem(f"this server does not answer to the name {name[:200]!r}; use {hosts[0]}.", status=403, code="wrong_host")
        if not self.keys or scope["path"] in OPEN_PATHS:
            return
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = [one for one in (headers.get(b"x-api-key"), token.strip() if scheme.lower() == b"bearer" else b"") if one]
        if not any([hmac.compare_digest(one, key) for one in given for key in self.keys]):  # a list: all are compared
            what = "is not one of this server's" if given else "is missing; send it as Authorization: Bearer KEY, or as x-api-key"
            raise Problem(f"the API key {what}.", status=401, kind="authentication_error", code="invalid_api_key")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. Raises Problem where it is too large or too slow, and ClientDisconnect."""
        most, size, chunks = self.server.settings.most_body_bytes, 0, []
        end = time.monotonic() + BODY_SECONDS
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except asyncio.TimeoutError:
                raise Problem(f"the body did not arrive within {BODY_SECONDS:.0f} s.", status=408, code="body_timeout") from None
            if message["type"] != "http.request":
                raise ClientDisconnect
            chunk = message.get("body", b"")
            size += len(chunk)
            if size <= most:
                chunks.append(chunk)
            if not message.get("more_body", False) or size > most + DRAINED:
                break
        if size > most:
            raise Problem(f"the body has more than the {most} bytes that it may.", status=413, code="body_too_large")
        return b"".join(chunks)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        endpoint = getattr(scope.get("route"), "path", None) or "other"
        method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE") else "other"
        place = endpoint, method, status
        self.server.metrics.requests[place] = self.server.metrics.requests.get(place, 0) + 1
        if not self.server.settings.log:
            return
        line, talk = f"{scope['method']} {scope['path']} {status} {1000 * seconds:.0f} ms", scope.get("zamba2")
        if isinstance(talk, Talk):
            prompt, completion, cached = token_counts(talk.replies)
            line += f", tokens: {prompt} prompt, {completion} completion, {cached} cached"
            line += "" if talk.done else ", not finished"
            if self.server.settings.log_prompts:
                asks = {reply.ask.number: reply.ask.text for reply in talk.replies}
                line += "".join(f" {json.dumps(text, ensure_ascii=False)}" for text in asks.values())
        with suppress(OSError, ValueError):  # standard error may be gone; requests go on
            print(printable(line), file=sys.stderr, flush=True)


def printable(line: str) -> str:
    """A path may hold line ends and control characters."""
    return "".join(c if c.isprintable() else "?" for c in line)


def replayed(body: bytes, receive: Receive) -> Receive:
    """``receive`` of an application, where the body has been read already."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def host_name(header: str) -> str:
    """A Host header without its port."""
    name = header.strip().lower()
    return name[: name.find("]") + 1] if name.startswith("[") else name.partition(":")[0]


# ---- the application -------------------------------------------------------------------------------------------------


def schema(**required: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": required}


TEXT, NUMBER, ANYTHING = {"type": "string"}, {"type": "integer"}, {"type": "array"}
OPENAI_ERROR = schema(error=schema(message=TEXT, type=TEXT, param={}, code={}))
ANTHROPIC_ERROR = schema(type={"const": "error"}, error=schema(type=TEXT, message=TEXT))  # and details, where there is a code
COMPLETION = schema(id=TEXT, object=TEXT, created=NUMBER, model=TEXT, choices=ANYTHING, usage={"type": "object"})
EVENT = {"type": "object", "required": ["data"], "properties": {"event": TEXT, "data": TEXT}}  # each of a stream's, as OpenAPI 3.1 has it
FAILURES = {
    400: "Something is wrong with the request.", 401: "The key is missing or wrong.", 403: "Another host name is needed.",
    404: "There is no such model.", 408: "The body came too slowly.", 413: "The body is too large.", 429: "The queue is full.",
    500: "An error of the server's.", 503: "The model has failed, or the server is shutting down.", 504: "The time for a request is up.",
}  # fmt: skip


def documented(good: dict[str, Any], *, stream: bool = False, error: dict[str, Any] = OPENAI_ERROR) -> dict[int | str, dict[str, Any]]:
    """What an endpoint answers, for the OpenAPI document."""
    content: dict[str, Any] = {"application/json": {"schema": good}} | ({"text/event-stream": {"schema": EVENT}} if stream else {})
    failures: dict[int | str, Any] = {
        status: {"description": what, "content": {"application/json": {"schema": error}}} for status, what in FAILURES.items()
    }
    return {200: {"description": "The answer.", "content": content}, **failures}


def create_app(model: LanguageModel, scheduler: Scheduler, cache: StateCache | None, settings: Settings) -> FastAPI:
    """The application. The scheduler stays the caller's to close. Raises Zamba2Error for a model without a tokenizer."""
    from zamba2 import __version__

    server = Server(model, scheduler, cache, settings)
    app = FastAPI(title="zamba2", version=__version__, docs_url=None, redoc_url=None, openapi_url="/openapi.json")

    @app.post("/v1/chat/completions", responses=documented(COMPLETION, stream=True), response_class=Response)
    async def chat_completions(body: ChatBody, http: HTTPRequest) -> Response:
        """A reply to a conversation."""
        name, adapter = server.chosen(body.model)
        server.check_sizes(n=body.n, stops=len(body.stop))
        options = sampling_options(body) | {"stop": body.stop, "ignore_eos": body.ignore_eos, "adapter": adapter}
        options["logprobs"] = (body.top_logprobs or 0) if body.logprobs else None
        form = None if body.response_format is None else body.response_format.form
        asks = await asyncio.to_thread(
            server.chat_asks, body.turns, options, body.most_tokens, n=body.n or 1, box=body.toolbox(), form=form
        )  # fmt: skip
        return await server.respond(
            http, asks, body.stream, lambda replies: ChatStream(name, replies, server.texts, include_usage=body.include_usage)
        )

    @app.post("/v1/completions", responses=documented(COMPLETION, stream=True), response_class=Response)
    async def completions(body: CompletionBody, http: HTTPRequest) -> Response:
        """Continuations of texts or token ids."""
        name, adapter = server.chosen(body.model)
        server.check_sizes(n=body.n, stops=len(body.stop), prompts=len(body.prompt))
        asks = await asyncio.to_thread(server.completion_asks, body, adapter)
        options = {"echo": bool(body.echo), "include_usage": body.include_usage}
        return await server.respond(http, asks, body.stream, lambda replies: CompletionStream(name, replies, server.texts, **options))

    good = schema(id=TEXT, object=TEXT, created_at=NUMBER, status=TEXT, model=TEXT, output=ANYTHING)

    @app.post("/v1/responses", responses=documented(good, stream=True), response_class=Response)
    async def responses(body: ResponseBody, http: HTTPRequest) -> Response:
        """A reply to a text or a conversation, in the layout of OpenAI's newer API; nothing is stored."""
        name, adapter = server.chosen(body.model)
        options = sampling_options(body) | {"logprobs": body.alternatives, "adapter": adapter}
        asks = await asyncio.to_thread(
            server.chat_asks, body.turns, options, body.max_output_tokens, box=body.toolbox(), form=body.form, field="text.format"
        )  # fmt: skip
        return await server.respond(http, asks, body.stream, lambda replies: ResponseStream(name, replies, server.texts, body=body))

    good = schema(id=TEXT, type=TEXT, role=TEXT, model=TEXT, content=ANYTHING, usage={"type": "object"})

    @app.post("/v1/messages", responses=documented(good, stream=True, error=ANTHROPIC_ERROR), response_class=Response)
    async def messages(body: MessagesBody, http: HTTPRequest) -> Response:
        """A reply to a conversation, in the layout of Anthropic's API."""
        name, adapter = server.chosen(body.model)
        server.check_sizes(stops=len(body.stop_sequences))
        options = sampling_options(body) | {"stop": body.stop_sequences, "adapter": adapter}
        goes_on = body.messages[-1].role == "assistant"
        asks = await asyncio.to_thread(
            server.chat_asks, body.turns, options, body.max_tokens, box=body.toolbox(), form=body.form, field="output_config.format",
            goes_on=goes_on,
        )  # fmt: skip
        return await server.respond(http, asks, body.stream, lambda replies: MessageStream(name, replies, server.texts))

    good = schema(input_tokens=NUMBER)

    @app.post("/v1/messages/count_tokens", responses=documented(good, error=ANTHROPIC_ERROR), response_class=Response)
    async def count_tokens(body: CountTokensBody) -> Response:
        """How many tokens a conversation has for the model, the mark of its reply included, in the layout of Anthropic's API."""
        server.chosen(body.model)

        def work() -> int:
            with asked():
                return len(server.read_turns(body.turns, body.toolbox(), goes_on=body.messages[-1].role == "assistant")[0])

        return answer({"input_tokens": await asyncio.to_thread(work)})

    def about_model(name: str) -> dict[str, Any]:
        """For OpenAI's clients and Anthropic's, who ask at the same address."""
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(server.started))
        return {
            "id": name, "object": "model", "created": server.started, "owned_by": "zamba2",
            "type": "model", "display_name": name, "created_at": made,
            "max_model_len": server.config.max_position_embeddings,
        }  # fmt: skip

    @app.get("/v1/models", responses=documented(schema(object=TEXT, data=ANYTHING)), response_class=Response)
    async def models() -> Response:
        """The models that can be asked for."""
        data = [about_model(name) for name in server.names]
        return answer({"object": "list", "data": data, "has_more": False, "first_id": server.names[0], "last_id": server.names[-1]})

    @app.get("/v1/models/{name:path}", responses=documented(schema(id=TEXT, object=TEXT, created=NUMBER)), response_class=Response)
    async def one_model(name: str) -> Response:
        """One model."""
        return answer(about_model(server.chosen(name)[0]))

    good = schema(tokens={"type": "array", "items": NUMBER}, count=NUMBER, max_model_len=NUMBER)

    @app.post("/tokenize", responses=documented(good), response_class=Response)
    async def tokenize(body: TokenizeBody) -> Response:
        """Token ids of a text, or of a conversation as the model reads it."""
        server.chosen(body.model)

        def work() -> Response:
            with asked():
                if body.messages is None:
                    tokens = server.tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
                else:
                    tokens = server.tokenizer.encode_chat(body.conversation, add_generation_prompt=body.add_generation_prompt)
            return answer({"tokens": tokens, "count": len(tokens), "max_model_len": server.config.max_position_embeddings})

        return await asyncio.to_thread(work)

    @app.post("/detokenize", responses=documented(schema(prompt=TEXT)), response_class=Response)
    async def detokenize(body: DetokenizeBody) -> Response:
        """The text of token ids."""
        server.chosen(body.model)
        server.check_ids(body.tokens, "tokens:", "tokens")
        return answer({"prompt": await asyncio.to_thread(server.tokenizer.decode, body.tokens, skip_special_tokens=False)})

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses=documented(schema(status=TEXT)), response_class=Response)
    async def health() -> Response:
        """Whether the model can be asked."""
        if scheduler.failed is not None:
            raise problem_of(Zamba2Error(f"the model has failed ({scheduler.failed}); the server must be started again."))
        return answer({"status": "ok", "model": settings.model_name} | scheduler.counts())

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Numbers in Prometheus' text format."""
        text = await asyncio.to_thread(server.metrics.text, scheduler, cache)  # the cache may be busy with a file
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        file = files("zamba2.serve").joinpath("page.html")
        if not file.is_file():
            raise Problem("this installation has no page; the API is under /v1, its description at /openapi.json.", status=404)
        headers = {
            "Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }  # fmt: skip
        return HTMLResponse(file.read_text(encoding="utf-8"), headers=headers)

    handle_errors(app)
    app.add_middleware(Gate, server=server)
    if settings.origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["GET", "POST"], allow_headers=["*"])
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    return app


def handle_errors(app: FastAPI) -> None:
    """Every error in the layout that clients expect. Without ``async`` each would go through a worker thread."""

    @app.exception_handler(RequestValidationError)
    async def wrong_body(http: HTTPRequest, error: RequestValidationError) -> Response:
        return refusal(validation_problem(error.errors()), http.url.path)

    @app.exception_handler(HTTPException)
    async def wrong_place(http: HTTPRequest, error: HTTPException) -> Response:
        path = http.url.path
        if error.status_code == 404:
            problem = Problem(f"there is nothing at {path[:200]}; see /openapi.json.", status=404, code="not_found")
        elif error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            problem = Problem(f"{path} does not take {http.method[:20]}; use {allowed}.", status=405, code="method_not_allowed")
        else:
            problem = Problem("the body cannot be read as JSON; a JSON object is needed.", status=error.status_code)
        response = refusal(problem, path)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Zamba2Error)
    async def known(http: HTTPRequest, error: Zamba2Error) -> Response:
        return refusal(problem_of(error), http.url.path)


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, without FastAPI's own layout of validation errors, which is not used."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in made["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            made.get("components", {}).get("schemas", {}).pop(name, None)
        app.openapi_schema = made
    return app.openapi_schema
