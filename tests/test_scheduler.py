"""The scheduler: company, arrival and cancellation change no reply, and with a cache what was read is not read again."""

from __future__ import annotations

import gc
import itertools
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import zamba2
from zamba2.errors import Zamba2Error
from zamba2.language.generate import Generation, Piece
from zamba2.language.model import LanguageModel, make_request
from zamba2.runtime.backend import Row, State
from zamba2.runtime.native import NativeState
from zamba2.serve.cache import StateCache
from zamba2.serve.scheduler import ALIGNED, SHORT, Busy, Job, Prompt, Scheduler, TimeIsUp, next_cut
from zamba2.train.instructions import tasks


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return zamba2.load("demo", threads=1)


@pytest.fixture(scope="module")
def prompts(model: LanguageModel) -> list[list[int]]:
    """Chats of the demonstration model's own kinds, and stretches of random tokens of several hundred."""
    chats = [model.tokenizer.encode_chat(task.messages[:-1]) for task in itertools.islice(tasks("serve", split="test"), 24)]
    rng = np.random.default_rng(5)
    sizes = (65, 128, 135, 136, 137, 200, 513, 700)
    return chats + [rng.integers(300, model.backend.config.vocab_size, size).tolist() for size in sizes]


@pytest.fixture(scope="module")
def alone(model: LanguageModel, prompts: list[list[int]]) -> list[Generation]:
    return [model.generate(prompt, max_tokens=24, ignore_eos=i % 5 == 0) for i, prompt in enumerate(prompts)]


@pytest.fixture
def scheduler(model: LanguageModel, request: pytest.FixtureRequest) -> Iterator[Scheduler]:
    made = Scheduler(model.backend, model.tokenizer, **getattr(request, "param", {}))
    yield made
    made.close()


class Replies:
    """Requests' pieces by number."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.received: queue.Queue[tuple[int, Piece | Zamba2Error]] = queue.Queue()
        self.pieces: dict[int, list[Piece]] = {}
        self.errors: dict[int, Zamba2Error] = {}
        self.jobs: dict[int, Job] = {}

    def submit(self, number: int, tokens: list[int], prompt: Prompt | None = None, seconds: float = 60.0, **options: Any) -> Job:
        self.pieces[number] = []
        request = make_request(tokens, options)
        self.jobs[number] = self.scheduler.submit(request, prompt or Prompt(), lambda p: self.received.put((number, p)), seconds=seconds)
        return self.jobs[number]

    def wait(self, *numbers: int) -> None:
        """Until these are over."""
        while not all(number in self.errors or self.over(number) for number in numbers):
            number, piece = self.received.get(timeout=60)
            if isinstance(piece, Zamba2Error):
                self.errors[number] = piece
            else:
                self.pieces[number].append(piece)

    def over(self, number: int) -> bool:
        return bool(self.pieces[number]) and self.pieces[number][-1].finish_reason is not None

    def tokens(self, number: int) -> list[int]:
        return [piece.token for piece in self.pieces[number]]

    def text(self, number: int) -> str:
        return "".join(piece.text for piece in self.pieces[number])


def test_those_who_wait_are_looked_at_under_the_condition(
    scheduler: Scheduler, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looks through the queue holds the condition under which others join it: a deque that grows meanwhile is an error."""
    look, held = Scheduler._jobs, list[bool]()
    monkeypatch.setattr(Scheduler, "_jobs", lambda self: held.append(self._condition._is_owned()) or look(self))
    replies = Replies(scheduler)
    replies.submit(0, prompts[0], max_tokens=4)
    replies.wait(0)
    assert scheduler.close(5) == 0 and all(held) and len(held) > 4


# ---- company ---------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_replies_are_those_of_a_request_alone(
    data: st.DataObject, model: LanguageModel, prompts: list[list[int]], alone: list[Generation]
) -> None:
    """Whatever joins, leaves and waits beside it, a greedy reply is token for token that of the request alone, without a cache."""
    most, step = data.draw(st.sampled_from([1, 2, 3, 8])), data.draw(st.sampled_from([64, 128, 512]))
    scheduler = Scheduler(model.backend, model.tokenizer, most_running=most, step=step)
    replies = Replies(scheduler)
    numbers = data.draw(st.lists(st.integers(0, len(prompts) - 1), min_size=2, max_size=14, unique=True))
    cancelled = set(data.draw(st.lists(st.sampled_from(numbers), max_size=3)))
    for number in numbers:
        job = replies.submit(number, prompts[number], max_tokens=24, ignore_eos=number % 5 == 0)
        time.sleep(data.draw(st.sampled_from([0.0, 0.0, 0.002, 0.01])))
        if number in cancelled:
            job.cancel()
    left = [number for number in numbers if number not in cancelled]
    replies.wait(*left)
    for number in left:
        assert replies.tokens(number) == alone[number].tokens and replies.text(number) == alone[number].text
        assert replies.pieces[number][-1].finish_reason == alone[number].finish_reason
    assert scheduler.close(10) == 0 and not replies.errors


@example(position=0, more=ALIGNED + SHORT, step=64, borders=[])
@given(st.integers(0, 3000), st.integers(1, 3000), st.sampled_from([64, 128, 512]), st.lists(st.integers(0, 3000), max_size=4))
def test_where_prompts_are_cut(position: int, more: int, step: int, borders: list[int]) -> None:
    """Stretches follow each other to the end, stop at each border, else at multiples of 64 and within the step, and leave no short rest."""
    length, cuts = position + more, [position]
    while cuts[-1] < length:
        cuts.append(next_cut(cuts[-1], length, step, borders))
        assert cuts[-1] > cuts[-2] and cuts[-1] - cuts[-2] <= step + ALIGNED + SHORT
    assert cuts[-1] == length
    assert {b for b in borders if position < b < length} <= set(cuts)
    for before, cut in itertools.pairwise(cuts):
        if cut not in (*borders, length):
            assert cut % ALIGNED == 0
            rest = min((b for b in borders if before < b < length), default=length) - cut
            assert rest > SHORT


def test_a_long_prompt_stalls_nobody(model: LanguageModel, scheduler: Scheduler, prompts: list[list[int]]) -> None:
    """While a prompt of thousands of tokens is read, a running reply gets a token with each stretch, and a short prompt begins first."""
    replies = Replies(scheduler)
    long = np.random.default_rng(1).integers(300, 4000, 3000).tolist()
    replies.submit(0, prompts[0], max_tokens=200, ignore_eos=True)
    replies.submit(1, long, max_tokens=1)
    replies.submit(2, prompts[1], max_tokens=2, ignore_eos=True)
    replies.wait(2)
    assert not replies.pieces[1], "the short prompt waited for the long one"
    before = len(replies.pieces[0])
    replies.wait(1)
    assert len(replies.pieces[0]) - before >= 3000 / (4 * scheduler.step)
    replies.jobs[0].cancel()


@pytest.mark.parametrize("scheduler", [{"most_running": 1, "most_waiting": 2}], indirect=True)
def test_a_full_queue_refuses(scheduler: Scheduler, prompts: list[list[int]]) -> None:
    """One too many is refused with a time to come again; there is room again as soon as one has left."""
    replies = Replies(scheduler)
    scheduler._recent.append(10.0)  # what a reply took
    replies.submit(0, prompts[0], max_tokens=100000, ignore_eos=True)
    while scheduler.counts()["waiting"]:
        time.sleep(0.001)
    replies.submit(1, prompts[1], max_tokens=3)
    replies.submit(2, prompts[2], max_tokens=3)
    with pytest.raises(Busy, match="2 requests are waiting, which is all there is room for") as error:
        replies.submit(3, prompts[3])
    assert error.value.retry_after == 30
    replies.jobs[0].cancel()
    replies.wait(1, 2)
    replies.submit(4, prompts[3], max_tokens=3)
    replies.wait(4)
    assert scheduler.cancelled == 1 and scheduler.counts() == {"waiting": 0, "reading": 0, "decoding": 0}
    assert scheduler.finished == 3 and len(scheduler._recent) == 4
    assert scheduler.prompt_tokens == sum(len(prompts[number]) for number in range(4))


def test_time_is_up(scheduler: Scheduler, prompts: list[list[int]], alone: list[Generation]) -> None:
    """A request beyond its time ends with an error; others go on."""
    replies = Replies(scheduler)
    replies.submit(0, prompts[0], max_tokens=10**6, ignore_eos=True, seconds=0.3)
    replies.submit(1, prompts[1], max_tokens=24)
    replies.wait(0, 1)
    assert isinstance(replies.errors[0], TimeIsUp) and replies.tokens(1) == alone[1].tokens
    replies.submit(2, prompts[0], max_tokens=10**6, ignore_eos=True, seconds=-7.0)
    replies.wait(2)
    assert str(replies.errors[2]) == "the reply took longer than the -7 s that it may."


def test_bad_requests_end_alone(
    scheduler: Scheduler, prompts: list[list[int]], alone: list[Generation], model: LanguageModel
) -> None:
    """Tokens out of range and adapters that are none end their own request."""
    replies = Replies(scheduler)
    replies.submit(0, [5, model.backend.config.vocab_size])
    replies.submit(1, prompts[1], max_tokens=24)
    replies.submit(2, [5], adapter="nobody's")
    replies.wait(0, 1, 2)
    assert "token id 4096 is out of range" in str(replies.errors[0]) and "nobody's" in str(replies.errors[2])
    assert replies.tokens(1) == alone[1].tokens


def test_shut_down(model: LanguageModel, prompts: list[list[int]]) -> None:
    """Closing finishes what it can within its time, says what it dropped to its callers and to ours, and takes no more."""
    scheduler = Scheduler(model.backend, model.tokenizer)
    replies = Replies(scheduler)
    replies.submit(0, prompts[0], max_tokens=3, ignore_eos=True)
    replies.submit(1, prompts[1], max_tokens=10**6, ignore_eos=True)
    assert scheduler.close(1.0) == 1
    replies.wait(0, 1)
    assert len(replies.tokens(0)) == 3 and "shut down before the reply was finished" in str(replies.errors[1])
    with pytest.raises(Zamba2Error, match="shutting down and takes no more"):
        replies.submit(2, prompts[2])


def test_a_failing_model_is_said(model: LanguageModel, prompts: list[list[int]]) -> None:
    """A model that fails ends all requests with what happened, and later ones at once."""

    class Broken:
        config, together, stretch = model.backend.config, 8, 512

        def new_state(self, *, adapter: str | None = None) -> Any:
            return model.backend.new_state()

        def forward(self, rows: Any) -> Any:
            raise MemoryError("no memory")

    scheduler = Scheduler(Broken(), model.tokenizer)
    replies = Replies(scheduler)
    replies.submit(0, prompts[0])
    replies.wait(0)
    assert "the model has failed: no memory" in str(replies.errors[0])
    scheduler._thread.join(10)
    with pytest.raises(Zamba2Error, match="has failed"):
        replies.submit(1, prompts[1])


def test_those_who_left_hold_no_place(scheduler: Scheduler, prompts: list[list[int]], model: LanguageModel) -> None:
    """A request that waits and is cancelled, or whose time is up, gives its place in the queue to others."""
    narrow = Scheduler(model.backend, model.tokenizer, most_running=1, most_waiting=1)
    replies = Replies(narrow)
    replies.submit(0, prompts[0], max_tokens=10**6, ignore_eos=True)
    while narrow.counts()["waiting"]:
        time.sleep(0.001)
    replies.submit(1, prompts[1], max_tokens=2).cancel()
    replies.submit(2, prompts[2], max_tokens=2, seconds=0.05)
    replies.wait(2)
    assert isinstance(replies.errors[2], TimeIsUp)
    replies.submit(3, prompts[3], max_tokens=2)
    replies.jobs[0].cancel()
    replies.wait(3)
    assert narrow.close(5) == 0 and narrow.counts() == {"waiting": 0, "reading": 0, "decoding": 0} and not replies.pieces[1]
    assert narrow.cancelled == 2


def test_a_fault_of_one_ends_it_alone(model: LanguageModel, prompts: list[list[int]], alone: list[Generation]) -> None:
    """A call that fails for one of its rows is made for each of them: the others' replies stay what they are."""

    class Picky:
        config, together, stretch = model.backend.config, 1, 512

        def new_state(self, *, adapter: str | None = None) -> Any:
            return model.backend.new_state()

        def forward(self, rows: Any) -> Any:
            if any(7 in row.tokens[:1] and len(row.tokens) > 1 for row in rows):
                raise Zamba2Error("there is no memory for this one.")
            return model.backend.forward(rows)

    scheduler = Scheduler(Picky(), model.tokenizer)
    replies = Replies(scheduler)
    replies.submit(1, prompts[1], max_tokens=24)
    replies.submit(0, [7, 8, 9], max_tokens=24)
    replies.submit(2, prompts[2], max_tokens=24, logit_bias={i: float("-inf") for i in range(model.backend.config.vocab_size)})
    replies.submit(3, prompts[3], max_tokens=24)
    replies.wait(0, 1, 2, 3)
    assert "no memory for this one" in str(replies.errors[0]) and 2 in replies.errors
    assert replies.tokens(1) == alone[1].tokens and replies.tokens(3) == alone[3].tokens
    assert scheduler.failed is None and scheduler.close(5) == 0


def test_logprobs_of_a_prompt(model: LanguageModel, prompts: list[list[int]]) -> None:
    """The prompt's own tokens get the log-probabilities of one plain call, in stretches too, also where a cache knows its beginning."""
    tokens, cache, known = prompts[-1], cache_of(model), model.backend.new_state()
    model.backend.forward([Row(np.array(tokens[:128], np.int32), known, logits=0)])
    cache.put(tokens[:128], known)
    scheduler = Scheduler(model.backend, model.tokenizer, cache=cache)
    replies = Replies(scheduler)
    job = replies.submit(0, tokens, Prompt((192,), logprobs=2), max_tokens=1, logprobs=1)
    replies.wait(0)
    assert scheduler.close(5) == 0 and job.cached_tokens == 0 and len(cache) == 1 and scheduler.prompt_tokens == len(tokens)
    (scores,) = model.backend.forward([Row(np.array(tokens, np.int32), model.backend.new_state(), logits=len(tokens))])
    wanted = scores.numpy().astype(np.float64)
    wanted = wanted - np.log(np.exp(wanted - wanted.max(-1, keepdims=True)).sum(-1, keepdims=True)) - wanted.max(-1, keepdims=True)
    assert job.prompt_logprobs[0] is None and len(job.prompt_logprobs) == len(tokens)
    for i, found in enumerate(job.prompt_logprobs[1:]):
        assert found is not None and found.token == tokens[i + 1] and len(found.top) == 2
        assert found.logprob == pytest.approx(wanted[i, found.token], abs=1e-4)


@pytest.mark.parametrize("how", ["its time is up", "its client leaves", "no memory", "the model fails", "shut down"])
def test_a_reply_that_has_ended_has_ended(model: LanguageModel, prompts: list[list[int]], how: str) -> None:
    """Whatever happens while a reply's end is read for its state, the reply came to its end: its caller is told that, once."""
    jobs: list[Job] = []
    calls, closing, go = itertools.count(1), threading.Event(), threading.Event()

    class Ending:
        config, together, stretch = model.backend.config, 1, 512

        def new_state(self, *, adapter: str | None = None) -> Any:
            return model.backend.new_state()

        def forward(self, rows: Any) -> Any:
            number = next(calls)
            if number == 3 and how == "its time is up":  # in the call that the last token comes of
                jobs[0].end = 0.0
            if number == 3 and how == "its client leaves":
                jobs[0].cancel()
            if number == 4 and how == "shut down":
                closing.set()
                assert go.wait(30)
            if number >= 4 and how == "no memory":
                raise Zamba2Error("there is no memory for one more state.")
            if number == 4 and how == "the model fails":
                raise MemoryError("no memory")
            return model.backend.forward(rows)

    scheduler = Scheduler(Ending(), model.tokenizer, cache=cache_of(model))
    replies = Replies(scheduler)
    with scheduler._condition:  # it begins when its job is known here
        jobs.append(replies.submit(0, prompts[0], Prompt(closing=plain(model, CLOSING)), max_tokens=3, ignore_eos=True))
    if how == "shut down":
        assert closing.wait(30)
        threading.Timer(0.05, go.set).start()
        assert scheduler.close() == 0
    if how == "its client leaves":
        while not scheduler.finished or any(scheduler.counts().values()):
            time.sleep(0.001)
        assert scheduler.close(5) == 0 and replies.received.qsize() == 2  # nothing more
    else:
        replies.wait(0)
        scheduler.close(5)
        assert len(replies.tokens(0)) == 3 and not replies.errors and replies.received.empty()
    assert (scheduler.finished, scheduler.cancelled) == (1, 0)


# ---- with a cache ----------------------------------------------------------------------------------------------------


def cache_of(model: LanguageModel) -> StateCache:
    return StateCache(lambda adapter: model.backend.new_state(adapter=adapter))


def plain(model: LanguageModel, text: str) -> list[int]:
    return model.tokenizer.encode(text, add_special_tokens=False)


CLOSING = "<|im_end|>\n"  # behind a reply, before the next message


def turn(model: LanguageModel, cache: StateCache, replies: Replies, number: int, messages: list[dict[str, str]], **options: Any) -> Job:
    """A chat request as the server makes it."""
    text = model.tokenizer.render_chat(messages)
    tokens = cache.encode(text, lambda part: plain(model, part))
    before = model.tokenizer.render_chat(messages[:-1], add_generation_prompt=False) if messages[:-1] else ""
    border = len(plain(model, before))
    borders = [border] if border and tokens[:border] == plain(model, before) else []
    prompt = Prompt(borders, plain(model, CLOSING), text, CLOSING)
    job = replies.submit(number, tokens, prompt, **options)
    replies.wait(number)
    return job


def test_a_second_turn_reads_what_is_new_alone(model: LanguageModel) -> None:
    """Everything up to the end of the last reply is cached, whatever tokens its text has by itself; the reply is a conversation's own."""
    cache = cache_of(model)
    scheduler = Scheduler(model.backend, model.tokenizer, cache=cache)
    replies = Replies(scheduler)
    asked = ["Sort these words: pear, apple, fig", "Now in upper case.", "How many words are there?"]
    own, messages, kept = model.conversation(), list[dict[str, str]](), 0
    for number, content in enumerate(asked):
        for _ in own.say(content, max_tokens=40):
            pass
        messages.append({"role": "user", "content": content})
        job = turn(model, cache, replies, number, messages, max_tokens=40)
        assert job.cached_tokens == kept
        assert replies.text(number) == own.messages[-1]["content"]
        messages.append({"role": "assistant", "content": replies.text(number)})
        kept = len(job.request.tokens) + len(replies.tokens(number)) - 1 + len(plain(model, CLOSING))  # its end token was said
        assert len(cache) == number + 1
    assert scheduler.close(5) == 0


def test_other_endings_reuse_the_border(model: LanguageModel) -> None:
    """A message asked anew or otherwise reuses all messages before it; a sampled reply is found again by its text."""
    cache = cache_of(model)
    scheduler = Scheduler(model.backend, model.tokenizer, cache=cache)
    replies = Replies(scheduler)
    messages = [{"role": "user", "content": "Name three fruits."}]
    turn(model, cache, replies, 0, messages, max_tokens=30, temperature=1.5, seed=7)
    assert len(cache) == 1
    messages.append({"role": "assistant", "content": replies.text(0)})
    for number, content in enumerate(("Sort them.", "Reverse the order.", "Sort them."), 1):
        job = turn(model, cache, replies, number, [*messages, {"role": "user", "content": content}], max_tokens=30)
        assert job.cached_tokens == len(replies.jobs[0].request.tokens) + len(replies.tokens(0)) - 1 + len(plain(model, CLOSING))
    assert scheduler.close(5) == 0


def test_a_state_kept_on_the_way_stays_as_it_was(model: LanguageModel) -> None:
    """What is kept where the last message begins is apart from the reply that goes on from there: asked again, the same is said."""
    cache = cache_of(model)
    scheduler = Scheduler(model.backend, model.tokenizer, cache=cache)
    replies = Replies(scheduler)
    messages = [{"role": "user", "content": "Name three fruits."}, {"role": "assistant", "content": "Pear, fig, apple."}]
    jobs = [turn(model, cache, replies, i, [*messages, {"role": "user", "content": "Sort them."}], max_tokens=30) for i in range(2)]
    assert [job.cached_tokens for job in jobs] == [0, *jobs[0].prompt.borders]
    assert replies.tokens(1) == replies.tokens(0) and scheduler.close(5) == 0


def test_what_a_state_has_read_beside_the_text_is_not_kept_as_the_text(model: LanguageModel) -> None:
    """Behind a stop text no state is kept; one that has read tokens which the reply does not show is none of the reply's text."""
    cache = cache_of(model)
    scheduler = Scheduler(model.backend, model.tokenizer, cache=cache)
    replies = Replies(scheduler)
    messages = [{"role": "user", "content": "Spell the word river."}]
    turn(model, cache, replies, 0, messages, max_tokens=40, ignore_eos=True)
    assert set(replies.tokens(0)[:-1]) & set(model.tokenizer.eos_token_ids)
    turn(model, cache, replies, 1, messages, max_tokens=40, stop=(replies.text(0)[2:4],))
    assert replies.pieces[1][-1].stop is not None and len(cache) == 1
    more = [*messages, {"role": "assistant", "content": replies.text(0)}, {"role": "user", "content": "Again."}]
    job = turn(model, cache, replies, 2, more, max_tokens=1)
    assert list(job.request.tokens) == plain(model, model.tokenizer.render_chat(more)) and scheduler.close(5) == 0


Left = tuple[Path, list[int], list[int]]


class Slow(StateCache):
    """Its disk waits until it may go on."""

    def __init__(self, model: LanguageModel, folder: Path) -> None:
        super().__init__(lambda adapter: model.backend.new_state(adapter=adapter), folder=folder)
        self.asked, self.may = threading.Event(), threading.Event()

    def _load(self, *args: Any) -> State:
        self.asked.set()
        assert self.may.wait(60)
        return super()._load(*args)


@pytest.fixture
def left(model: LanguageModel, tmp_path: Path) -> Left:
    """A folder an earlier server left, the tokens a state in it has read and some more, and the reply to them."""
    cache = StateCache(lambda adapter: model.backend.new_state(adapter=adapter), folder=tmp_path)
    scheduler = Scheduler(model.backend, model.tokenizer, cache=cache)
    replies = Replies(scheduler)
    messages = [{"role": "user", "content": "Name three fruits."}]
    turn(model, cache, replies, 0, messages, max_tokens=30)
    messages += [{"role": "assistant", "content": replies.text(0)}, {"role": "user", "content": "Sort them."}]
    job = turn(model, cache, replies, 1, messages, max_tokens=30)
    assert scheduler.close(5) == 0
    cache.flush()
    return tmp_path, list(job.request.tokens), replies.tokens(1)


def test_the_disk_stalls_nobody(model: LanguageModel, left: Left, alone: list[Generation], prompts: list[list[int]]) -> None:
    """While a state is fetched from disk other replies go on from first to last; the one that waits says what it would without a disk."""
    folder, tokens, reply = left
    cache = Slow(model, folder)
    scheduler = Scheduler(model.backend, model.tokenizer, cache=cache)
    replies = Replies(scheduler)
    waits = replies.submit(0, tokens, max_tokens=30)
    assert cache.asked.wait(60)
    for number in (1, 2):
        replies.submit(number, prompts[number], max_tokens=24)
        replies.wait(number)
        assert replies.tokens(number) == alone[number].tokens
    assert not replies.pieces[0] and scheduler.counts() == {"waiting": 1, "reading": 0, "decoding": 0}
    cache.may.set()
    replies.wait(0)
    assert replies.tokens(0) == reply and waits.cached_tokens > len(tokens) // 2
    assert scheduler.close(10) == 0


def states() -> set[int]:
    """Those that there are, by where they lie."""
    gc.collect()
    return {id(thing) for thing in gc.get_objects() if isinstance(thing, NativeState)}


@pytest.mark.parametrize("how", ["alone", "kept", "from disk", "time"])
def test_a_job_that_is_over_holds_no_state(model: LanguageModel, left: Left, how: str) -> None:
    """A client that reads its reply slowly has its job held for as long, but no state: of those there would be as many as such clients."""
    folder, tokens, _ = left
    others = states()
    cache = None if how in ("alone", "time") else StateCache(
        lambda adapter: model.backend.new_state(adapter=adapter), folder=folder if how == "from disk" else None
    )  # fmt: skip
    scheduler = Scheduler(model.backend, model.tokenizer, cache=cache)
    over = threading.Event()

    def receive(piece: Piece | Zamba2Error) -> None:
        if isinstance(piece, Zamba2Error) or piece.finish_reason is not None:
            over.set()

    options = {"max_tokens": 3500 if how == "time" else 4, "ignore_eos": True}
    prompt = Prompt(closing=plain(model, "<|im_end|>\n")) if how == "kept" else Prompt()
    job = scheduler.submit(make_request(tokens, options), prompt, receive, seconds=0.05 if how == "time" else 60.0)
    assert over.wait(60) and scheduler.close(5) == 0
    assert (job.cached_tokens > 0) == (how == "from disk") and (cache is None or len(cache) > 0)
    cache = scheduler = None  # type: ignore[assignment]
    assert states() <= others


@pytest.mark.parametrize("how", ["cancelled", "time", "shut down", "broken"])
def test_leaving_the_disk(model: LanguageModel, left: Left, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for the disk can leave, run out of time or be shut down, and the next one is served; a failure nobody foresaw is said."""
    folder, tokens, reply = left
    cache = Slow(model, folder)
    scheduler = Scheduler(model.backend, model.tokenizer, cache=cache, most_running=1)
    replies = Replies(scheduler)
    job = replies.submit(0, tokens, max_tokens=30, seconds=0.2 if how == "time" else 60.0)
    replies.submit(1, tokens, max_tokens=30)  # for which there is no room yet
    assert cache.asked.wait(60)
    time.sleep(0.05)
    assert len(scheduler._fetching) == 1
    if how == "shut down":
        assert scheduler.close() == 2
        cache.may.set()
        replies.wait(0, 1)
        assert all("shut down" in str(replies.errors[number]) for number in (0, 1))
        return
    if how == "broken":
        monkeypatch.setattr(StateCache, "_load", lambda *args: 1 / 0)
        cache.may.set()
        replies.wait(0, 1)
        assert all("division" in str(replies.errors[number]) for number in (0, 1))
        scheduler.close()
        return
    if how == "time":
        replies.wait(0)
        assert isinstance(replies.errors[0], TimeIsUp)
    else:
        job.cancel()
    cache.may.set()
    replies.wait(1)
    assert replies.tokens(1) == reply and not replies.pieces[0]
    assert scheduler.close(10) == 0
