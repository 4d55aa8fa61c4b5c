"""Generation over any backend: one loop that reads prompts, samples tokens and yields text as it becomes certain.

Whole replies are folded streams and a single prompt is a batch of one, so there is one path to test.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from zamba2.errors import Zamba2Error, notice
from zamba2.language.sampling import Sampler, Sampling, log_softmax, top_logprobs
from zamba2.language.speculate import Guesses, Prices
from zamba2.language.tokenizer import IncrementalDecoder, Tokenizer
from zamba2.runtime.backend import Backend, Logits, Row, State

__all__ = ["Constraint", "Generation", "Piece", "Request", "Running", "TokenLogprob", "collect", "guess_all", "judge", "next_row", "run"]

Progress = Callable[[int, int], None]  # tokens read, tokens in all
Scores = npt.NDArray[np.float32]


class Constraint(Protocol):
    """Which tokens may come next in one reply. What it raises must be Zamba2Error."""

    def mask(self, scores: Scores) -> Scores:
        """The scores [V], with -inf for tokens that are not allowed; never for all."""

    def accept(self, token: int) -> None:
        """The token was sampled."""


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log of the model's own probability of a token, and of the k likeliest, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Request:
    """What to continue and how. tokens: at least one, read after ``state`` (which is left as it is), or from the start.

    constraint: of this request alone, and used up by it. history: what ``state`` has read, as far as it is known, for the
    repetition penalty and for guesses.
    """

    tokens: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    state: State | None = None
    adapter: str | None = None
    constraint: Constraint | None = None
    history: Sequence[int] = ()

    def __post_init__(self) -> None:
        if isinstance(self.max_tokens, bool) or not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise Zamba2Error(f"max_tokens is {self.max_tokens!r}; a whole number from 1 is needed.")
        if self.logprobs is not None and (type(self.logprobs) is not int or not 0 <= self.logprobs <= 100):
            raise Zamba2Error(f"logprobs is {self.logprobs!r}; a number of alternatives from 0 to 100 is needed.")
        if not all(isinstance(s, str) and s for s in self.stop):
            raise Zamba2Error(f"stop is {list(self.stop)!r}; texts that are not empty are needed.")
        try:
            tokens = np.asarray(self.tokens)
        except ValueError:  # lists of unequal lengths
            tokens = np.asarray(None)
        if tokens.size == 0:
            raise Zamba2Error("the prompt is empty; at least one token is needed.")
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer) or int(tokens.max()) >= 1 << 63:
            raise Zamba2Error("the prompt is neither a text nor a list of token ids; whole numbers from 0 are needed.")


@dataclass(frozen=True)
class Piece:
    """One step of one request: the token sampled and the text that became certain, which may be empty.

    The last piece of a request has a finish_reason ("stop": end token or stop text, "length": max_tokens).
    ``state`` has read everything but ``token``, until the next piece is asked for; where several pieces came of one call (see
    ``language.speculate``), everything but the last one's.
    """

    index: int
    text: str
    token: int
    state: State
    logprob: TokenLogprob | None = None
    finish_reason: str | None = None
    stop: str | None = None


@dataclass(frozen=True)
class Generation:
    """A finished reply. tokens: everything sampled, an end token included; text: what they add to the prompt's text, without end
    token and stop text."""

    text: str
    tokens: list[int]
    finish_reason: str
    stop: str | None
    prompt_tokens: int
    logprobs: list[TokenLogprob] | None
    prompt_seconds: float
    decode_seconds: float
    state: State | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return self.text

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens)

    @property
    def tokens_per_second(self) -> float:
        """Decoding rate; the first token comes with the prompt and does not count."""
        return (len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0


class StopText:
    """Cuts a stream of text before the stop string that is complete first, the longest of those that end together.

    Holds back what may still become one, so that the text does not depend on how it was split.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.held = ""

    def push(self, text: str, *, last: bool = False) -> tuple[str, str | None]:
        """Text that is certain, and the stop string reached, if any. With ``last``, nothing is held back."""
        self.held += text
        found = min(((i + len(s), i, s) for s in self.stops if (i := self.held.find(s)) >= 0), default=None)
        if found is not None:
            _, start, stop = found
            certain, self.held = self.held[:start], ""
            return certain, stop
        keep = 0 if last else self._open_end()
        certain, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return certain, None

    def _open_end(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(max(map(len, self.stops), default=1) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(self.held[-n:]) for s in self.stops)), 0)


class Running:
    """One request on its way."""

    def __init__(self, index: int, request: Request, state: State, vocab_size: int, tokenizer: Tokenizer | None) -> None:
        self.index, self.request, self.state = index, request, state
        self.sampler = Sampler(request.sampling, [*request.history, *request.tokens], vocab_size)
        self.decoder: IncrementalDecoder | None = None if tokenizer is None else tokenizer.incremental(after=request.tokens)
        ends = () if tokenizer is None or request.ignore_eos else tokenizer.eos_token_ids
        named = {} if tokenizer is None else tokenizer.special_ids(request.stop)  # special tokens have no text that could be found
        self.ends: dict[int, str | None] = dict.fromkeys(ends) | named
        self.stop_text = StopText(request.stop)
        self.plain = request.sampling.is_plain and request.logprobs is None and request.constraint is None
        self.guesses = Guesses([*request.history, *request.tokens])
        self.count = 0

    def steps(self, logits: Logits, guess: Sequence[int] = ()) -> list[Piece]:
        """Go on by the tokens of a guess that come true, and one more. logits: their last 1 + guess positions count, of a recorded call if
        there is a guess."""
        if self.plain and not guess:
            return [self.said(self.sampler.take(int(logits.likeliest()[-1])))]
        scores = logits.numpy()[-1 - len(guess) :]
        pieces = [self.step(scores[0])]
        for token, own in zip(guess, scores[1:], strict=True):
            if pieces[-1].finish_reason is not None or pieces[-1].token != token:
                break
            pieces.append(self.step(own))
        if guess:
            self.state.keep(len(pieces))
        return pieces

    def step(self, scores: Scores) -> Piece:
        """Sample from the scores (V,), and go on."""
        constraint = self.request.constraint
        token = self.sampler.sample(scores if constraint is None else constraint.mask(scores))
        if constraint is not None:
            constraint.accept(token)
        logprob = None
        if self.request.logprobs is not None:
            own = log_softmax(scores)
            logprob = TokenLogprob(token, float(own[token]), tuple(top_logprobs(scores, self.request.logprobs)))
        return self.said(token, logprob)

    def said(self, token: int, logprob: TokenLogprob | None = None) -> Piece:
        """Go on by a token, and say what became certain."""
        self.count += 1
        self.guesses.push(token)
        ended = token in self.ends
        last = ended or self.count >= self.request.max_tokens
        text = ""
        if self.decoder is not None:
            text = ("" if ended else self.decoder.push(token)) + (self.decoder.flush() if last else "")
        text, stop = self.stop_text.push(text, last=last)
        if stop is None:
            stop = self.ends.get(token)
        reason = "stop" if ended or stop is not None else "length" if last else None
        return Piece(self.index, text, token, self.state, logprob, reason, stop)


def run(
    backend: Backend, requests: Sequence[Request], tokenizer: Tokenizer | None = None, *, progress: Progress | None = None,
    speculate: bool = True,
) -> Iterator[Piece]:  # fmt: skip
    """Generate for all requests together; yields pieces as they come, each request's in order.

    Without a tokenizer texts stay empty, no end token is known, and stop strings are refused. speculate: guess what comes next where the
    backend reads several tokens at about the price of one, while that pays; the replies are the same. Raises Zamba2Error.
    """
    if tokenizer is None and any(request.stop for request in requests):
        raise Zamba2Error("stop texts need a tokenizer, and this checkpoint has none.")
    sequences = []
    for index, request in enumerate(requests):
        state = backend.new_state(adapter=request.adapter) if request.state is None else request.state.copy()
        sequences.append(Running(index, request, state, backend.config.vocab_size, tokenizer))
        _say_if_long(backend, state.position + len(request.tokens) + request.max_tokens)
    rows, prices = _read_prompts(backend, sequences, progress), Prices()
    guesses: list[list[int]] = [[] for _ in sequences]
    begun: float | None = None
    while sequences:
        scores = backend.forward(rows)
        found = [one.steps(own, guess) for one, own, guess in zip(sequences, scores, guesses, strict=True)]
        judge(prices, sequences, guesses, found, None if begun is None else time.perf_counter() - begun)
        yield from itertools.chain.from_iterable(found)
        begun = time.perf_counter()
        last = [pieces[-1] for pieces in found]
        sequences = [one for one, piece in zip(sequences, last, strict=True) if piece.finish_reason is None]
        guesses = guess_all(sequences, backend.together if speculate else 0)
        rows = [next_row(one, guess) for one, guess in zip(sequences, guesses, strict=True)]


def next_row(running: Running, guess: Sequence[int]) -> Row:
    """The last token of a reply, and a guess of those after it."""
    tokens = np.array([running.guesses.tokens[-1], *guess], np.int32)
    return Row(tokens, running.state, logits=len(tokens), record=bool(guess))


def guess_all(sequences: Sequence[Running], together: int) -> list[list[int]]:
    """A guess for each reply, none for most: one call reads at most ``together`` tokens. One that has few tokens to go gets no more."""
    found: list[list[int]] = []
    left = together - len(sequences)
    for running in sequences:
        found.append(running.guesses.guess(min(left, running.request.max_tokens - running.count - 1)))
        left -= len(found[-1])
    return found


def judge(
    prices: Prices, sequences: Sequence[Running], guesses: Sequence[Sequence[int]], found: Sequence[Sequence[Piece]],
    seconds: float | None,
) -> None:  # fmt: skip
    """Tell each reply what its guess was worth. seconds: that the call took, None if it read more than this."""
    guessed = sum(map(len, guesses))
    if seconds is not None:
        prices.add(len(sequences) + guessed, seconds)
    for running, guess, pieces in zip(sequences, guesses, found, strict=True):
        if guess and pieces:
            running.guesses.judge(len(guess), len(pieces) - 1, prices.extra(len(sequences), guessed) * len(guess) / guessed)


def _read_prompts(backend: Backend, sequences: Sequence[Running], progress: Progress | None) -> list[Row]:
    """Read all prompts but their last stretch; returns the rows of the call that gives the first scores."""
    total, done, rows = sum(len(s.request.tokens) for s in sequences), 0, []
    for sequence in sequences:
        wrong = next((t for t in sequence.request.tokens if not 0 <= t < backend.config.vocab_size), None)
        if wrong is not None:
            raise Zamba2Error(f"token id {wrong} is out of range; the model knows ids from 0 to {backend.config.vocab_size - 1}.")
        tokens = np.array(sequence.request.tokens, dtype=np.int32)
        while True:
            step = backend.stretch - sequence.state.position % backend.stretch
            if len(tokens) <= step:
                break
            backend.forward([Row(tokens[:step], sequence.state, logits=0)])
            tokens, done = tokens[step:], done + step
            if progress is not None:
                progress(done, total)
        rows.append(Row(tokens, sequence.state))
    return rows


def _say_if_long(backend: Backend, length: int) -> None:
    limit = backend.config.max_position_embeddings
    if length > limit:
        notice(f"the context may grow beyond the {limit} tokens the model was trained on; it goes on, but quality is not known there.")


def collect(
    backend: Backend, requests: Sequence[Request], tokenizer: Tokenizer | None = None, *, progress: Progress | None = None,
    on_piece: Callable[[Piece], None] | None = None, speculate: bool = True,
) -> list[Generation]:  # fmt: skip
    """Run all requests to their ends and fold the pieces into one ``Generation`` each, in the requests' order."""
    pieces: list[list[Piece]] = [[] for _ in requests]
    start = time.perf_counter()
    first: list[float] = [start] * len(requests)
    ends: list[float] = [start] * len(requests)
    for piece in run(backend, requests, tokenizer, progress=progress, speculate=speculate):
        now = time.perf_counter()
        if not pieces[piece.index]:
            first[piece.index] = now
        ends[piece.index] = now
        pieces[piece.index].append(piece)
        if on_piece is not None:
            on_piece(piece)
    return [
        Generation(
            text="".join(piece.text for piece in own),
            tokens=[piece.token for piece in own],
            finish_reason=own[-1].finish_reason or "length",
            stop=own[-1].stop,
            prompt_tokens=len(request.tokens),
            logprobs=None if request.logprobs is None else [piece.logprob for piece in own if piece.logprob is not None],
            prompt_seconds=begin - start,
            decode_seconds=end - begin,
            state=own[-1].state,
        )
        for request, own, begin, end in zip(requests, pieces, first, ends, strict=True)
    ]
