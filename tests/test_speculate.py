"""Speculation: replies are what they are without it, whatever is guessed, and guessing that does not pay ends."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_scheduler import Replies

import zamba2
from zamba2.language import generate
from zamba2.language.generate import Generation, Request, collect, run
from zamba2.language.model import LanguageModel, make_request
from zamba2.language.speculate import ALLOWED, MOST_SAVED, NGRAMS, SHARE, Guesses, Prices
from zamba2.runtime.backend import Row
from zamba2.serve.scheduler import Scheduler
from zamba2.train.instructions import tasks

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "speculation.py"
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 3},
    "penalized": {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "seed": 5},
    "stopped": {"stop": ("e",), "temperature": 0.8, "seed": 2},
    "with logprobs": {"logprobs": 2},
    "on and on": {"ignore_eos": True},
}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return zamba2.load("demo", threads=1)


@pytest.fixture(scope="module")
def prompts(model: LanguageModel) -> list[list[int]]:
    return [model.tokenizer.encode_chat(task.messages[:-1]) for task in itertools.islice(tasks("speculate", split="test"), 12)]


class Told(Guesses):
    """Guesses that know the reply and are right for a random while; none at all now and then."""

    replies: ClassVar[dict[tuple[int, ...], list[int]]] = {}
    seed = 0

    def __init__(self, tokens: Sequence[int]) -> None:
        super().__init__(tokens)
        self.prompt = len(tokens)
        self.coming = self.replies[tuple(tokens)]
        self.rng = random.Random(f"{self.seed} {tokens}")

    def guess(self, most: int) -> list[int]:
        if most < 1:
            return []
        said = len(self.tokens) - self.prompt
        right = self.coming[said : said + self.rng.randint(0, most)]
        wrong = [self.rng.randrange(300, 4000) for _ in range(self.rng.randint(0, most - len(right)))]
        return right + wrong


@pytest.fixture(params=range(3))
def told(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Told]]:
    monkeypatch.setattr(generate, "Guesses", Told)
    monkeypatch.setattr(Told, "replies", {})
    monkeypatch.setattr(Told, "seed", request.param)
    yield Told


def as_seen(reply: Generation) -> tuple[Any, ...]:
    return reply.text, reply.tokens, reply.finish_reason, reply.stop, reply.logprobs


@pytest.mark.parametrize("way", WAYS)
def test_replies_are_the_same(way: str, told: type[Told], model: LanguageModel, prompts: list[list[int]]) -> None:
    """Text, tokens, log-probabilities and the state behind a reply are those without guesses, to the bit, alone and in batches."""
    told.replies.update({tuple(prompt): [] for prompt in prompts})
    requests = [make_request(prompt, {"max_tokens": 24 + i, **WAYS[way]}) for i, prompt in enumerate(prompts)]
    plain = [collect(model.backend, [request], model.tokenizer, speculate=False)[0] for request in requests]
    told.replies.update({tuple(prompt): reply.tokens for prompt, reply in zip(prompts, plain, strict=True)})
    calls = 0
    for size in (1, 3, 12):
        for start in range(0, len(requests), size):
            found = collect(model.backend, requests[start : start + size], model.tokenizer)
            for one, expected in zip(found, plain[start : start + size], strict=True):
                assert as_seen(one) == as_seen(expected)
                assert one.state is not None and expected.state is not None and one.state.position == expected.state.position
                row = np.array(one.tokens[-1:], np.int32)
                ends = [model.backend.forward([Row(row, reply.state.copy())])[0].numpy() for reply in (one, expected) if reply.state]
                assert np.array_equal(*ends)
                calls += 1
    assert calls == 36


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_scheduler_answers_the_same(
    data: st.DataObject, told: type[Told], model: LanguageModel, prompts: list[list[int]]
) -> None:
    """Under arrivals at any time, in company, with guesses right for any while: each reply is that of a request alone."""
    way = data.draw(st.sampled_from([name for name in WAYS if name != "with logprobs"]))
    told.replies.update({tuple(prompt): [] for prompt in prompts})
    options = {"max_tokens": 24, **WAYS[way]}
    plain = [collect(model.backend, [make_request(prompt, options)], model.tokenizer, speculate=False)[0] for prompt in prompts]
    told.replies.update({tuple(prompt): reply.tokens for prompt, reply in zip(prompts, plain, strict=True)})
    scheduler = Scheduler(model.backend, model.tokenizer, most_running=data.draw(st.sampled_from([1, 3, 8])))
    try:
        replies, order = Replies(scheduler), data.draw(st.permutations(range(len(prompts))))
        for i, number in enumerate(order):
            replies.submit(number, prompts[number], **options)
            if data.draw(st.booleans()):
                replies.wait(*order[: i // 2])
        replies.wait(*order)
        for number, expected in enumerate(plain):
            assert replies.tokens(number) == expected.tokens
            assert replies.text(number) == expected.text
        assert scheduler.generated_tokens == sum(len(reply.tokens) for reply in plain)
        assert 0 < scheduler.accepted_tokens <= scheduler.guessed_tokens
    finally:
        scheduler.close()


def test_guesses_are_made_by_themselves(model: LanguageModel) -> None:
    """Without any help a reply that repeats its prompt is guessed, at least half of it, and is what it is without guesses."""
    task = next(task for task in tasks("speculate", split="test", kinds=["copy"]) if len(task.messages[-1]["content"].split()) > 5)
    prompt = model.tokenizer.encode_chat(task.messages[:-1])
    plain = collect(model.backend, [Request(prompt)], model.tokenizer, speculate=False)[0]
    scheduler = Scheduler(model.backend, model.tokenizer)
    try:
        replies = Replies(scheduler)
        replies.submit(0, prompt)
        replies.wait(0)
        assert replies.tokens(0) == plain.tokens
        assert scheduler.accepted_tokens >= len(plain.tokens) // 2
    finally:
        scheduler.close()


def test_an_interruption_among_the_pieces_of_a_call(told: type[Told], model: LanguageModel) -> None:
    """A reply that is left anywhere goes on as one that never guessed; where its state had read further, the history is read again."""
    told.replies = type("Anything", (dict,), {"__missing__": lambda self, key: []})()
    said, again = "Write the words red, green and blue in upper case.", "And again?"
    whole = [piece.token for piece in model.conversation().say(said, max_tokens=20)]
    forgotten = 0
    for stop in range(1, len(whole) + 1):
        found, options = [], {"max_tokens": 8}
        for speculated in (False, True):
            conversation = model.conversation()
            prompt = tuple(model.tokenizer.encode_chat([{"role": "user", "content": said}]))
            told.replies[prompt] = whole if speculated else []
            list(itertools.islice(pieces := conversation.say(said, max_tokens=20), stop))
            pieces.close()  # type: ignore[attr-defined]
            if speculated and conversation.state is None:
                forgotten += 1
                messages = [*conversation.messages, {"role": "user", "content": again}]
                found[0] = model.chat(messages, **options).tokens
            if speculated and conversation.state is not None and not conversation.unread:  # the very last token was read too, alone
                assert conversation.state.position == len(prompt) + stop
                found.append(found[0])
                continue
            found.append([piece.token for piece in conversation.say(again, **options)])
        assert found[0] == found[1], stop
    assert 0 < forgotten < len(whole)


def test_a_conversation_guesses_from_its_history(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reply is guessed from are all tokens of the conversation, each once, in the order in which they were read."""
    seen: list[list[int]] = []

    class Watched(Guesses):
        def __init__(self, tokens: Sequence[int]) -> None:
            super().__init__(tokens)
            seen.append(self.tokens)

    monkeypatch.setattr(generate, "Guesses", Watched)
    conversation = model.conversation("Be brief.")
    for said in ("Sort these words: pear, apple, fig.", "And in reverse?", "Thank you."):
        list(conversation.say(said, max_tokens=30))
    assert len(seen) == 3 and conversation.state is not None
    assert seen[0] == seen[1][: len(seen[0])] and seen[1] == seen[2][: len(seen[1])]
    text = model.tokenizer.decode(seen[2], skip_special_tokens=False)
    assert [text.count(said) for said in ("Be brief.", "pear, apple, fig.", "And in reverse?", "Thank you.")] == [1, 1, 1, 1]


def test_what_is_measured(tmp_path: Path) -> None:
    """The measuring script runs whole on a tiny shape: the same replies in fewer calls, positive ratios."""
    out = tmp_path / "found.json"
    done = subprocess.run([sys.executable, SCRIPT, "--small", "--out", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert json.loads(out.read_text()) == found
    assert found["acceptance"]["identical"] == found["acceptance"]["prompts"] > 0 and found["acceptance"]["tokens_per_call"] > 1
    assert all(ratio > 0 for kind in ("edited", "unpredictable", "random") for ratio in found["cost"][kind]["ratios"])


# ---- guesses ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(0, 8))
def test_a_guess_follows_the_longest_end_seen_before(tokens: list[int], most: int) -> None:
    """What is guessed followed the last occurrence of the longest known end; behind the last token what repeats itself goes on."""
    guesses = Guesses(tokens[:1])
    for token in tokens[1:]:
        guesses.guess(1)
        guesses.push(token)
    guesses.single.length = guesses.several.length = 8
    guesses.single.balance = guesses.several.balance = 1.0
    found = guesses.guess(most)
    assert len(found) <= most
    for n in NGRAMS:
        end = tokens[-n:]
        places = [at for at in range(n, len(tokens)) if tokens[at - n : at] == end] if len(end) == n else []
        if places:
            longer = [*tokens, *found]
            assert found == [longer[places[-1] + i] for i in range(most)]
            return
    assert found == []


@given(st.lists(st.tuples(st.integers(1, 7), st.floats(0, 1), st.floats(0, 3)), max_size=200))
def test_guessing_costs_little(calls: list[tuple[int, float, float]]) -> None:
    """Whatever calls cost and however few guesses are right: at most the allowance, a hundredth of the tokens, and two calls are lost."""
    guesses, lost, came = Guesses([1, 2, 3, 1, 2, 3]), 0.0, 0
    for guessed, luck, extra in calls:
        right = 0
        guess = guesses.guess(guessed)
        if guess:
            right = int(luck * len(guess))
            guesses.judge(len(guess), right, extra)
            lost += extra - right
        for token in (1, 2, 3)[: 1 + min(right, 2)]:
            guesses.push(token)
            came += 1
        assert lost <= 2 * (ALLOWED + SHARE * came + max(call[2] for call in calls)) + 1e-6
        assert max(guesses.single.balance, guesses.several.balance) <= MOST_SAVED


def test_prices_are_measured() -> None:
    """Extra tokens cost what calls of so many took more than calls of one each, in tokens that were not made meanwhile."""
    prices = Prices()
    assert prices.extra(1, 3) == pytest.approx(0.3)
    prices.add(2, 1.0)
    prices.add(5, 1.5)
    assert prices.extra(2, 3) == pytest.approx(1.0)
    prices.add(5, 100.0)  # a call that was disturbed
    assert prices.extra(2, 3) < 1.7


def test_backends_that_gain_nothing_are_left_alone(model: LanguageModel, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a call of several tokens takes as long as so many calls, nothing is recorded."""
    recorded = []
    forward = model.backend.forward
    monkeypatch.setattr(model.backend, "forward", lambda rows: recorded.extend(row.record for row in rows) or forward(rows))
    for together, wanted in ((1, False), (8, True)):
        monkeypatch.setattr(model.backend, "together", together)
        recorded.clear()
        list(run(model.backend, [Request([1, 300, 301] * 20, max_tokens=30, ignore_eos=True)], model.tokenizer))
        assert any(recorded) is wanted
