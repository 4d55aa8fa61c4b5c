"""Many requests, one model: a thread that owns the backend lets requests join and leave a running batch at token borders.

Each call of the backend decodes one token of every running reply and reads one stretch of one prompt, so that nobody's stream waits for
another's prompt. Prompts take turns, stretch by stretch. A state that lies on disk alone is fetched by a second thread meanwhile. A reply
does not depend on its company (the backend's law), nor on how its prompt was cut: stretches end at multiples of 64 tokens, and at the
borders where a state is kept.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from zamba2.errors import Zamba2Error
from zamba2.language.generate import Piece, Request, Running, TokenLogprob, guess_all, judge, next_row
from zamba2.language.sampling import log_softmax, top_logprobs
from zamba2.language.speculate import Prices
from zamba2.language.tokenizer import Tokenizer
from zamba2.runtime.backend import Backend, Logits, Row, State
from zamba2.serve.cache import StateCache

__all__ = ["Busy", "Job", "Prompt", "Scheduler", "TimeIsUp"]

ALIGNED = 64  # tokens; a prompt cut at multiples of it gives the same bits (csrc: borders of the scan)
SHORT = 8  # tokens a call up to which the engine's arithmetic is another; no stretch before the last is so short


class Busy(Zamba2Error):
    """The queue is full. retry_after: seconds after which there may be room."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests are waiting, which is all there is room for; try again in {retry_after:.0f} s.")
        self.retry_after = retry_after


class TimeIsUp(Zamba2Error):
    """A request took longer than it may."""


@dataclass(frozen=True)
class Prompt:
    """What a request's tokens are to the cache.

    borders: numbers of tokens after which a state is worth keeping, the ends of messages. closing: token ids that follow a reply that
    ended by itself or at its length, up to where the next message begins, an end token first; None keeps no state behind the reply.
    text: of the tokens, special ones included, and ``closing_text`` of the closing ones; both for ``StateCache.encode``.
    logprobs: of the prompt's own tokens too, with so many alternatives each; the cache is then left out.
    """

    borders: Sequence[int] = ()
    closing: Sequence[int] | None = None
    text: str | None = None
    closing_text: str = ""
    logprobs: int | None = None


Receive = Callable[["Piece | Zamba2Error"], None]


@dataclass(eq=False)
class Job:
    """A request on its way; ``cancel`` may be called from any thread.

    cached_tokens and prompt_logprobs (None for the first token) are there with the first piece.
    """

    request: Request
    prompt: Prompt
    receive: Receive
    end: float  # by time.monotonic()
    begun: float = field(default_factory=time.monotonic)
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    cancelled: bool = False
    fetched: Future[State | None] = field(default_factory=Future)  # what the cache has on disk
    running: Running | None = None
    read: int = 0  # of the prompt
    said: list[int] = field(default_factory=list)
    reply: list[str] = field(default_factory=list)
    text: str | None = None  # of all that the state behind the reply has read
    last: Piece | None = None  # the end of the reply, received once that state is kept: the next turn may come at once

    def cancel(self) -> None:
        """Stop at the next token border; nothing more is received."""
        self.cancelled = True


class Scheduler:
    """See the module. most_running: replies in a batch. most_waiting: requests beside them. step: tokens of a prompt read in one call
    while others decode. speculate: guess what comes next, while that pays (``language.speculate``)."""

    def __init__(
        self, backend: Backend, tokenizer: Tokenizer | None, *, cache: StateCache | None = None, most_running: int = 8,
        most_waiting: int = 64, step: int = 128, speculate: bool = True,
    ) -> None:  # fmt: skip
        if step % ALIGNED or step < ALIGNED:
            raise Zamba2Error(f"step is {step}; a multiple of {ALIGNED} is needed.")
        self.backend, self.tokenizer, self.cache = backend, tokenizer, cache
        self.most_running, self.most_waiting, self.step, self.speculate = most_running, most_waiting, step, speculate
        self.prices = Prices()
        self._waiting: deque[Job] = deque()
        self._beginning: deque[Job] = deque()  # let in, and not yet looked at
        self._fetching: list[Job] = []  # whose states come from the disk
        self._fetcher = ThreadPoolExecutor(1, "zamba2 fetch")
        self._reading: deque[Job] = deque()
        self._decoding: list[Job] = []
        self._closing: list[tuple[Job, Row]] = []  # replies that are over: what is still read before their state is kept
        self._condition = threading.Condition()
        self._stopped = self._draining = False
        self._recent: deque[float] = deque(maxlen=32)  # seconds that requests took
        self.failed: BaseException | None = None
        self.prompt_tokens = self.generated_tokens = self.guessed_tokens = self.accepted_tokens = self.finished = self.cancelled = 0
        self._thread = threading.Thread(target=self._work, name="zamba2 model", daemon=True)
        self._thread.start()

    # ---- for the callers' threads

    def submit(self, request: Request, prompt: Prompt, receive: Receive, *, seconds: float = float("inf")) -> Job:
        """Queue a request; ``receive`` is called from the model's thread with each piece, the last of which has a finish_reason, or with
        the error that ended it. It must be quick and raise nothing. Raises Busy, and Zamba2Error where no request is taken any more."""
        job = Job(request, prompt, receive, time.monotonic() + seconds)
        with self._condition:
            if self._draining or self._stopped:
                raise Zamba2Error("the server is shutting down and takes no more requests.")
            if self.failed is not None:
                raise Zamba2Error(f"the model has failed ({self.failed}); the server must be started again.")
            waiting = len(self._waiting)
            self._waiting = deque(other for other in self._waiting if not other.cancelled)
            self.cancelled += waiting - len(self._waiting)
            if len(self._waiting) >= self.most_waiting + max(0, self._room() - len(self._beginning)):  # some begin at once
                raise Busy(len(self._waiting), self.expected_wait)
            self._waiting.append(job)
            self._condition.notify()
        return job

    @property
    def expected_wait(self) -> float:
        """Seconds until a new request might begin, from what the last ones took; at least 1."""
        mean = sum(self._recent) / len(self._recent) if self._recent else 1.0
        return max(1.0, mean * (len(self._waiting) + 1) / self.most_running)

    def counts(self) -> dict[str, int]:
        """Requests by where they are."""
        with self._condition:  # a request moves from one place to the next under it
            waiting, decoding = len(self._waiting) + len(self._beginning) + len(self._fetching), len(self._decoding) + len(self._closing)
            return {"waiting": waiting, "reading": len(self._reading), "decoding": decoding}

    def close(self, seconds: float = 0.0, hurried: Callable[[], bool] = lambda: False) -> int:
        """Take no more requests, give those that are there so many seconds, or until ``hurried``, then drop the rest. Returns how many were
        dropped."""
        end = time.monotonic() + seconds
        with self._condition:
            self._draining = True
            while self._jobs() and time.monotonic() < end and self._thread.is_alive() and not hurried():
                self._condition.wait(0.05)
            left = self._jobs()
            for job in left:
                job.cancel()
            self._stopped = True
            self._condition.notify_all()
        self._thread.join(timeout=60)
        self._fetcher.shutdown(wait=False, cancel_futures=True)
        for jobs in self._places():
            jobs.clear()
        for job in left:
            job.receive(job.last or Zamba2Error("the server was shut down before the reply was finished."))
        return sum(job.last is None for job in left)

    # ---- the model's thread

    def _places(self) -> tuple[Any, ...]:
        """Where jobs are, from first to last."""
        return self._waiting, self._beginning, self._fetching, self._reading, self._decoding, self._closing

    def _jobs(self) -> list[Job]:
        """Under the condition: a request that came meanwhile would end the look at those that wait, and the model's thread with it."""
        return [*(job for jobs in self._places()[:-1] for job in jobs), *(job for job, _ in self._closing)]

    def _at_rest(self) -> bool:
        """Whether there is nothing to do until a request or a state comes."""
        comes = (self._waiting and self._room() > 0) or any(job.fetched.done() for job in self._fetching)
        return not (comes or self._reading or self._decoding or self._closing)

    def _work(self) -> None:
        try:
            while True:
                with self._condition:
                    if not self._stopped and self._at_rest():
                        self._condition.wait(0.1 if self._fetching else None)  # those who are waited for may leave
                    if self._stopped:
                        return
                    self._beginning += [self._waiting.popleft() for _ in range(min(len(self._waiting), self._room()))]
                while self._beginning:
                    self._begin(self._beginning[0])
                for job in [job for job in self._fetching if job.fetched.done()]:
                    self._set_out(job, self._fetching, job.fetched.result())
                self._leave()
                self._round()
                with self._condition:
                    self._condition.notify_all()  # for close
        except BaseException as error:
            with self._condition:  # whoever comes later is told by submit
                self.failed, left = error, self._jobs()
                for jobs in self._places():
                    jobs.clear()
            for job in left:
                self._tell(job, job.last or Zamba2Error(f"the model has failed: {error}"))

    def _room(self) -> int:
        return self.most_running - len(self._fetching) - len(self._reading) - len(self._decoding)

    def _begin(self, job: Job) -> None:
        """Look what the cache has for a request."""
        request, found = job.request, None
        try:
            size = self.backend.config.vocab_size
            for token in (min(request.tokens), max(request.tokens)):
                if not 0 <= token < size:
                    raise Zamba2Error(f"token id {token} is out of range; the model knows ids from 0 to {size - 1}.")
            adapter = self.backend.new_state(adapter=request.adapter).adapter  # not the request's: there may be one for all
        except Zamba2Error as error:
            self._remove(job)
            self._tell(job, error)
            return
        if self.cache is not None and job.prompt.logprobs is None:
            if not self.cache.at_hand(request.tokens, adapter):
                with self._condition:
                    self._beginning.remove(job)
                    self._fetching.append(job)
                job.fetched = self._fetcher.submit(self.cache.find, request.tokens, adapter)
                job.fetched.add_done_callback(self._wake)
                return
            found = self.cache.find(request.tokens, adapter)
        self._set_out(job, self._beginning, found)

    def _wake(self, _: Future[State | None]) -> None:
        with self._condition:
            self._condition.notify_all()

    def _set_out(self, job: Job, place: Any, found: State | None) -> None:
        """A request's prompt is read from now on, behind what was found of it."""
        request = job.request
        try:
            state = self.backend.new_state(adapter=request.adapter) if found is None else found
            job.running = Running(0, request, state, self.backend.config.vocab_size, self.tokenizer)
        except Zamba2Error as error:
            self._remove(job)
            self._tell(job, error)
            return
        job.read = job.cached_tokens = 0 if found is None else found.position
        if job.prompt.logprobs is not None:
            job.prompt_logprobs.append(None)
        with self._condition:
            place.remove(job)
            self._reading.append(job)

    def _leave(self) -> None:
        """Let go of requests whose caller has gone or whose time is up."""
        now = time.monotonic()
        with self._condition:
            jobs = self._jobs()
        for job in jobs:
            if job.last is not None:
                continue
            if job.cancelled:
                self.cancelled += 1
                self._remove(job)
            elif now > job.end:
                self._remove(job)
                self._tell(job, TimeIsUp(f"the reply took longer than the {job.end - job.begun:.0f} s that it may."))

    def _remove(self, job: Job) -> None:
        with self._condition:
            for jobs in self._places()[:-1]:
                if job in jobs:
                    jobs.remove(job)

    def _tell(self, job: Job, item: Piece | Zamba2Error) -> None:
        if job.cancelled:
            return
        job.receive(item)
        if isinstance(item, Zamba2Error) or item.finish_reason is not None:  # whoever reads slowly holds the job, and shall hold no state
            job.running, job.last, job.fetched = None, None, Future()

    def _round(self) -> None:
        """One call of the backend."""
        decoding, closing = list(self._decoding), list(self._closing)
        running = [job.running for job in decoding if job.running is not None]
        others = [row for _, row in closing]
        guesses = guess_all(running, self.backend.together - sum(len(row.tokens) for row in others) if self.speculate else 0)
        rows = [*(next_row(one, guess) for one, guess in zip(running, guesses, strict=True)), *others]
        reading = self._reading[0] if self._reading else None
        if reading is not None:
            rows.append(self._stretch(reading, alone=not decoding))
        if not rows:
            return
        jobs = [*decoding, *(job for job, _ in closing), *([] if reading is None else [reading])]
        begun = time.perf_counter()
        scores = self._forward(rows)
        came: list[list[Piece]] = [[] for _ in decoding]
        for i, (job, found) in enumerate(zip(jobs, scores, strict=True)):
            try:
                if isinstance(found, Zamba2Error):
                    raise found
                if job is reading:
                    self._have_read(job, rows[i], found)
                elif i < len(decoding):
                    came[i] = running[i].steps(found, guesses[i])
                else:
                    assert self.cache is not None and job.running is not None
                    self.cache.put([*job.request.tokens, *job.said], job.running.state, job.text)
            except Zamba2Error as error:  # such as logits that are no numbers, or no memory for one more state
                if job.last is None:
                    self._remove(job)
                    self._tell(job, error)
        alone = len(rows) == len(decoding) and all(came)
        judge(self.prices, running, guesses, came, time.perf_counter() - begun if alone else None)
        self.guessed_tokens += sum(map(len, guesses))
        for job, pieces in zip(decoding, came, strict=True):
            self.accepted_tokens += max(0, len(pieces) - 1)
            self._said(job, pieces)
        for entry in closing:
            with self._condition:
                self._closing.remove(entry)
            assert entry[0].last is not None
            self._tell(entry[0], entry[0].last)

    def _forward(self, rows: list[Row]) -> Sequence[Logits | Zamba2Error]:
        """The backend's call; where it fails, one for each row, so that a request's own fault ends it alone. Of a call that
        failed midway the states are lost, and each row's own says so."""
        try:
            return self.backend.forward(rows)
        except Zamba2Error:
            found: list[Logits | Zamba2Error] = []
            for row in rows:
                try:
                    found += self.backend.forward([row])
                except Zamba2Error as error:
                    found.append(error)
            return found

    def _stretch(self, job: Job, *, alone: bool) -> Row:
        """The next part of a prompt."""
        assert job.running is not None
        tokens = np.asarray(job.request.tokens, np.int32)
        stop = next_cut(job.read, len(tokens), 4 * self.step if alone else self.step, self._borders(job))
        part = tokens[job.read : stop]
        logits = len(part) if job.prompt.logprobs is not None else int(stop == len(tokens))
        return Row(part, job.running.state, logits=logits)

    def _borders(self, job: Job) -> Sequence[int]:
        return () if self.cache is None or job.prompt.logprobs is not None else job.prompt.borders

    def _have_read(self, job: Job, row: Row, logits: Logits) -> None:
        begin, job.read = job.read, job.read + len(row.tokens)
        self.prompt_tokens += len(row.tokens)
        tokens, done = job.request.tokens, job.read == len(job.request.tokens)
        if job.prompt.logprobs is not None and row.logits:
            scores = logits.numpy()
            for i, own in enumerate(scores[: len(scores) - done]):
                token, all_of_them = int(tokens[begin + i + 1]), log_softmax(own)
                top = tuple(top_logprobs(own, job.prompt.logprobs))
                job.prompt_logprobs.append(TokenLogprob(token, float(all_of_them[token]), top))
        if self.cache is not None and job.read in self._borders(job):
            self.cache.put(tokens[: job.read], row.state.copy())
        with self._condition:
            self._reading.popleft()
            (self._decoding if done else self._reading).append(job)  # behind the others: prompts take turns
        if done:
            assert job.running is not None
            self._said(job, job.running.steps(logits))

    def _said(self, job: Job, pieces: Sequence[Piece]) -> None:
        """Tell what was sampled of a reply."""
        for piece in pieces:
            job.said.append(piece.token)
            job.reply.append(piece.text)
            self.generated_tokens += 1
            if piece.finish_reason is not None:
                self.finished += 1
                self._recent.append(time.monotonic() - job.begun)
                row = self._behind(job, piece)
                with self._condition:
                    self._decoding.remove(job)
                    if row is not None:
                        job.last = piece
                        self._closing.append((job, row))
                        return
            self._tell(job, piece)

    def _behind(self, job: Job, piece: Piece) -> Row | None:
        """What stands between a finished reply and the next message, to be read before its state is kept; None if it is not."""
        closing = job.prompt.closing
        if self.cache is None or closing is None or piece.stop is not None or job.running is None:
            return None
        ended = bool(closing) and piece.token == closing[0]
        job.text = self._text(job, job.said[:-1] if ended else job.said)
        unread = [*job.said[-1:], *(closing[1:] if ended else closing)]
        job.said += closing[1:] if ended else closing
        return Row(np.array(unread, np.int32), job.running.state, logits=0)

    def _text(self, job: Job, said: Sequence[int]) -> str | None:
        """What the state behind a reply has read; None where the reply's tokens say something else, such as half a character."""
        if job.prompt.text is None or self.tokenizer is None:
            return None
        whole, reply = self.tokenizer.incremental(skip_special_tokens=False, after=job.request.tokens), "".join(job.reply)
        if "".join([*map(whole.push, said), whole.flush()]) != reply:
            return None
        return job.prompt.text + reply + job.prompt.closing_text


def next_cut(position: int, length: int, step: int, borders: Sequence[int] = ()) -> int:
    """Where a stretch of a prompt that begins at ``position`` ends: at a border, else at a multiple of 64 (``ALIGNED``) at most ``step``
    tokens on, else at the end. What is left at the end is never as short as the engine's other arithmetic."""
    border = min((b for b in borders if position < b < length), default=length)
    stop = (position + step) // ALIGNED * ALIGNED
    if stop <= position or border - stop <= SHORT:
        stop = border
    return min(stop, border)
