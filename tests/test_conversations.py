"""Conversations: each turn reads only what is new and answers as if everything were read again."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zamba2
from zamba2.config import Config
from zamba2.errors import Zamba2Error
from zamba2.language.conversations import Conversation
from zamba2.language.generate import collect
from zamba2.language.model import LanguageModel, make_request
from zamba2.runtime.backend import Backend, Logits, Row, State

TURNS = ["Once upon a time there was a king.", "And then?", "¿Qué? 🙂", "Why\nis the sky blue?"]
OPTIONS: dict[str, Any] = {"max_tokens": 8}


class Watched:
    """A backend that counts the tokens read and raises when told to."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.config, self.together, self.stretch = backend, backend.config, backend.together, backend.stretch
        self.read = 0
        self.calls_until_error: int | None = None

    config: Config
    together: int
    stretch: int

    def new_state(self, *, adapter: str | None = None) -> State:
        return self.backend.new_state(adapter=adapter)

    def forward(self, rows: Sequence[Row]) -> list[Logits]:
        if self.calls_until_error is not None:
            self.calls_until_error -= 1
            if self.calls_until_error < 0:
                self.calls_until_error = None
                raise KeyboardInterrupt
        self.read += sum(len(row.tokens) for row in rows)
        return self.backend.forward(rows)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """In float32, so that another split of the same tokens cannot choose other ones."""
    return zamba2.load("random", dtype="float32")


@pytest.fixture
def watched(model: LanguageModel) -> Watched:
    return Watched(model.backend)


def begin(model: LanguageModel, watched: Watched, system: str | None = None) -> Conversation:
    return Conversation(watched, model.tokenizer, system=system)


def say(conversation: Conversation, text: str, **options: Any) -> tuple[list[int], str]:
    """Tokens and text of a reply."""
    pieces = list(conversation.say(text, **(OPTIONS | options)))
    return [piece.token for piece in pieces], "".join(piece.text for piece in pieces)


class Reference:
    """The same conversation, everything read again each turn: the tokens that were read, and nothing kept."""

    def __init__(self, model: LanguageModel, system: str | None = None) -> None:
        self.model = model
        self.text = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
        self.tokens = self.encode(self.text)

    def encode(self, text: str) -> list[int]:
        return self.model.tokenizer.encode(text, add_special_tokens=False)

    def say(self, text: str, **options: Any) -> tuple[list[int], str]:
        self.tokens = self.tokens + self.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
        request = make_request(self.tokens, OPTIONS | options)
        result = collect(self.model.backend, [request], self.model.tokenizer)[0]
        self.heard(result.tokens)
        return result.tokens, result.text

    def heard(self, tokens: list[int]) -> None:
        """A reply of these tokens was said; ChatML ends it with an end token and a new line."""
        ended = tokens[-1] == self.model.tokenizer.eos_token_ids[0]
        self.tokens = self.tokens + tokens + self.encode("\n" if ended else "<|im_end|>\n")


SYSTEMS = [None, "Answer in one sentence."]
END_AFTER: dict[str, dict[str, Any]] = {
    "length": {},
    "end token": {"temperature": 1.0, "seed": 8, "logit_bias": {2: 4.5}, "max_tokens": 40},
}


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("way", END_AFTER)
def test_replies_equal_reading_everything_again(way: str, system: str | None, model: LanguageModel, watched: Watched) -> None:
    """Turn by turn, the tokens of a conversation are those of the whole conversation read from the start."""
    conversation, reference = begin(model, watched, system), Reference(model, system)
    for text in TURNS:
        tokens, reply = say(conversation, text, **END_AFTER[way])
        assert (tokens, reply) == reference.say(text, **END_AFTER[way])
        assert (tokens[-1] == 2) == (way == "end token")
        assert conversation.messages[-2:] == [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
    assert len(conversation.messages) == 2 * len(TURNS) + (system is not None)
    assert conversation.state is not None and conversation.cached_tokens > 0


def test_first_reply_equals_chat(model: LanguageModel, watched: Watched) -> None:
    """The first reply is the one that ``chat`` gives to the same messages."""
    for system in SYSTEMS:
        messages = [] if system is None else [{"role": "system", "content": system}]
        expected = model.chat([*messages, {"role": "user", "content": TURNS[0]}], **OPTIONS)
        assert say(begin(model, watched, system), TURNS[0]) == (expected.tokens, expected.text)


def test_replies_that_tokenize_as_sampled_equal_chat(model: LanguageModel, watched: Watched) -> None:
    """Where a reply's text gives its own tokens again, each turn equals ``chat`` over all messages so far."""
    conversation = begin(model, watched)
    own: dict[str, Any] = {"logit_bias": {300: 1000.0}, "max_tokens": 1}  # one word, then the next question
    for number, text in enumerate(TURNS):
        options: dict[str, Any] = own if number % 2 == 0 else {"max_tokens": 1, "logit_bias": {2: 1000.0}}
        before = [*conversation.messages, {"role": "user", "content": text}]
        plain = model.chat(before, **options)
        tokens, reply = say(conversation, text, **options)
        assert (tokens, reply) == (plain.tokens, plain.text)
        said = model.tokenizer.encode(f"<|im_start|>assistant\n{reply}", add_special_tokens=False)
        assert said[-1] == tokens[-1] or reply == ""
    last = [*conversation.messages, {"role": "user", "content": "So?"}]
    expected = model.chat(last, max_tokens=12)
    assert conversation.state is not None
    assert say(conversation, "So?", max_tokens=12) == (expected.tokens, expected.text)


def test_only_what_is_new_is_read(model: LanguageModel, watched: Watched) -> None:
    """Each turn reads its own tokens, however long the conversation, and cached_tokens says how many it did not read."""
    conversation, reference = begin(model, watched), Reference(model)
    cached = []
    for text in TURNS:
        watched.read = 0
        before = conversation.state.position if conversation.state else 0
        say(conversation, text)
        reference.say(text)
        assert conversation.state is not None and conversation.cached_tokens == before
        assert watched.read == conversation.state.position - before
        new = len(model.tokenizer.encode(f"<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")) + 8
        assert watched.read <= new + 1
        cached.append(conversation.cached_tokens)
    assert cached[0] == 0 and cached == sorted(set(cached)), "it grows with each turn"
    assert cached[-1] > 3 * watched.read / 2


def closed_after(conversation: Conversation, text: str, count: int, **options: Any) -> list[int]:
    """Tokens of a reply that its reader stops listening to."""
    pieces = conversation.say(text, **(OPTIONS | options))
    heard = [next(pieces).token for _ in range(count)]
    pieces.close()  # type: ignore[attr-defined]
    return heard


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_reply_closed_in_the_middle(count: int, model: LanguageModel, watched: Watched) -> None:
    """After closing the stream the next turn goes on from what was said, as if it had been read from the start."""
    conversation, reference = begin(model, watched), Reference(model)
    say(conversation, TURNS[0])
    reference.say(TURNS[0])
    heard = closed_after(conversation, TURNS[1], count)
    whole, _ = reference_turn(reference, TURNS[1], heard)
    assert whole[:count] == heard
    assert conversation.messages[-1]["role"] == "assistant"
    assert say(conversation, TURNS[2]) == reference.say(TURNS[2])
    assert conversation.cached_tokens > 0


def reference_turn(reference: Reference, text: str, heard: list[int]) -> tuple[list[int], str]:
    """What the reference would say, of which only ``heard`` was said."""
    before = reference.tokens
    whole = reference.say(text)
    reference.tokens = before + reference.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
    reference.heard(heard)
    return whole


@pytest.mark.parametrize("calls", [1, 2, 4])
def test_an_interrupt_inside_the_backend(calls: int, model: LanguageModel, watched: Watched) -> None:
    """KeyboardInterrupt out of ``forward`` passes through; what was said is kept and the next turn equals the reference."""
    conversation, reference = begin(model, watched), Reference(model)
    say(conversation, TURNS[0])
    reference.say(TURNS[0])
    heard: list[int] = []
    watched.calls_until_error = calls
    with pytest.raises(KeyboardInterrupt):
        heard.extend(piece.token for piece in conversation.say(TURNS[1], **OPTIONS))
    whole, _ = reference_turn(reference, TURNS[1], heard)
    assert len(heard) == calls and whole[:calls] == heard
    assert conversation.messages[-1]["role"] == "assistant" and conversation.unread == heard[-1:]
    assert say(conversation, TURNS[2]) == reference.say(TURNS[2])
    assert conversation.cached_tokens > 0


def reference_prefix(model: LanguageModel, reference: Reference, text: str, count: int) -> list[int]:
    other = Reference(model)
    other.tokens = reference.tokens
    return other.say(text)[0][:count]


def test_an_interrupt_between_reading_and_sampling(model: LanguageModel, watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt after the last token was read, before the next was sampled, does not have it read twice."""
    from zamba2.language import generate

    conversation, reference = begin(model, watched), Reference(model)
    steps = iter(range(100))
    original = generate.Running.steps

    def step(self: Any, *rest: Any) -> Any:
        if next(steps) == 3:
            raise KeyboardInterrupt
        return original(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(generate.Running, "steps", step)
        with pytest.raises(KeyboardInterrupt):
            say(conversation, TURNS[0])
    assert conversation.unread == []
    reference_turn(reference, TURNS[0], reference_prefix(model, reference, TURNS[0], 3))
    assert say(conversation, TURNS[1]) == reference.say(TURNS[1])
    assert conversation.cached_tokens > 0


def test_an_interrupt_before_the_first_word(model: LanguageModel, watched: Watched) -> None:
    """Interrupted while the message is read: the message is forgotten and the conversation is as before it."""
    conversation, reference = begin(model, watched), Reference(model)
    say(conversation, TURNS[0])
    reference.say(TURNS[0])
    before = conversation.messages
    watched.calls_until_error = 0
    with pytest.raises(KeyboardInterrupt):
        say(conversation, TURNS[1])
    assert conversation.messages == before
    assert say(conversation, TURNS[2]) == reference.say(TURNS[2])
    assert conversation.cached_tokens > 0


def test_a_bad_turn_changes_nothing(model: LanguageModel, watched: Watched) -> None:
    """Options and texts that are refused leave the conversation as it was."""
    conversation, reference = begin(model, watched), Reference(model)
    say(conversation, TURNS[0])
    reference.say(TURNS[0])
    for text, options in (("hi", {"max_tokens": 0}), ("hi", {"nonsense": 1}), ("\ud800", {}), ("hi", {"logit_bias": {9999: 1.0}})):
        with pytest.raises(Zamba2Error):
            say(conversation, text, **options)
    assert say(conversation, TURNS[1]) == reference.say(TURNS[1])


def test_stop_texts(model: LanguageModel, watched: Watched) -> None:
    """A reply cut at a stop text is remembered as cut: the next turn equals ``chat`` over the messages."""
    _, whole = say(begin(model, watched), TURNS[0])
    conversation = begin(model, watched)
    stop = whole[5:7]
    _, reply = say(conversation, TURNS[0], stop=stop)
    assert reply == whole[: whole.find(stop)] == conversation.messages[-1]["content"]
    expected = model.chat([*conversation.messages, {"role": "user", "content": TURNS[1]}], **OPTIONS)
    assert say(conversation, TURNS[1]) == (expected.tokens, expected.text)
    assert say(conversation, TURNS[2]) and conversation.cached_tokens > 0, "and from then on the state is kept again"


def test_replies_cut_inside_a_character(model: LanguageModel, watched: Watched) -> None:
    """A reply that ends inside a character is remembered as its text."""
    conversation = begin(model, watched)
    half = {"logit_bias": {3 + 0xC3: 1000.0}, "max_tokens": 1}
    assert say(conversation, TURNS[0], **half)[1] == "\ufffd"
    expected = model.chat([*conversation.messages, {"role": "user", "content": TURNS[1]}], **OPTIONS)
    assert say(conversation, TURNS[1]) in ((expected.tokens, expected.text), kept_tokens(model, TURNS[:2], 3 + 0xC3))


def kept_tokens(model: LanguageModel, turns: list[str], token: int) -> tuple[list[int], str]:
    reference = Reference(model)
    reference_turn(reference, turns[0], [token])
    return reference.say(turns[1])


def test_reset_and_system(model: LanguageModel, watched: Watched) -> None:
    """``reset`` begins again: as a new conversation with that system message."""
    conversation = begin(model, watched, "Be brief.")
    assert conversation.system == "Be brief."
    first = say(conversation, TURNS[0])
    say(conversation, TURNS[1])
    conversation.reset(conversation.system)
    assert conversation.messages == [{"role": "system", "content": "Be brief."}] and conversation.state is None
    assert say(conversation, TURNS[0]) == first
    conversation.reset()
    assert conversation.system is None and conversation.messages == []
    other = say(conversation, TURNS[0])
    assert other == say(begin(model, watched), TURNS[0]) and other != first


def test_sampling_goes_on(model: LanguageModel, watched: Watched) -> None:
    """With a temperature and a seed per turn a conversation is repeatable."""
    talks = []
    for _ in range(2):
        conversation = begin(model, watched)
        talks.append([say(conversation, text, temperature=1.0, seed=number) for number, text in enumerate(TURNS)])
    assert talks[0] == talks[1]


CONTINUE = """
import json, sys
from pathlib import Path
import zamba2
from zamba2.language.conversations import Conversation
sys.path.insert(0, {tests!r})
from test_conversations import Watched
model = zamba2.load("random", dtype="float32")
watched = Watched(model.backend)
conversation = Conversation(watched, model.tokenizer)
conversation.load(Path({path!r}))
tokens = [piece.token for piece in conversation.say({text!r}, max_tokens=8)]
print(json.dumps([tokens, watched.read, conversation.cached_tokens, conversation.messages]))
"""


def test_places_may_be_texts(model: LanguageModel, watched: Watched, tmp_path: Path) -> None:
    """A conversation is saved to and loaded from a path that is a text, as zamba2.load takes one."""
    conversation = begin(model, watched, "Be brief.")
    conversation.save(str(tmp_path / "talk"))
    other = begin(model, watched, None)
    other.load(str(tmp_path / "talk"))
    assert other.messages == conversation.messages


def test_saved_and_loaded_in_another_process(model: LanguageModel, watched: Watched, tmp_path: Path) -> None:
    """A conversation saved here goes on in a new process with the same tokens and reads nothing of the past again."""
    conversation = begin(model, watched, "Be brief.")
    for text in TURNS[:2]:
        say(conversation, text)
    conversation.save(tmp_path / "talk")
    watched.read = 0
    expected, _ = say(conversation, TURNS[2])
    program = CONTINUE.format(tests=str(Path(__file__).parent), path=str(tmp_path / "talk"), text=TURNS[2])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stderr
    tokens, read, cached, messages = json.loads(done.stdout.splitlines()[-1])
    assert (tokens, read, cached, messages) == (expected, watched.read, conversation.cached_tokens, conversation.messages)
    assert cached > 2 * read / 3


def test_saving_at_any_moment(model: LanguageModel, watched: Watched, tmp_path: Path) -> None:
    """Empty, with a system message alone, after a reply cut at a stop text: what is loaded goes on like what was saved."""

    def nothing(conversation: Conversation) -> None:
        pass

    def cut(conversation: Conversation) -> None:
        say(conversation, TURNS[0], stop="e")

    def interrupted(conversation: Conversation) -> None:
        closed_after(conversation, TURNS[0], 3)

    moments: list[Callable[[Conversation], None]] = [nothing, cut, interrupted]
    for system in SYSTEMS:
        for moment in moments:
            conversation = begin(model, watched, system)
            moment(conversation)
            conversation.save(tmp_path / "talk")
            other = begin(model, watched, "something else")
            say(other, "hello")
            other.load(tmp_path / "talk")
            assert other.messages == conversation.messages
            assert say(other, TURNS[1]) == say(conversation, TURNS[1])
            assert other.cached_tokens == conversation.cached_tokens


def test_a_bad_file_keeps_the_present_conversation(model: LanguageModel, watched: Watched, tmp_path: Path) -> None:
    """A file that is missing, cut off or a folder is refused, and the conversation goes on without reading again."""
    conversation, reference = begin(model, watched), Reference(model)
    say(conversation, TURNS[0])
    reference.say(TURNS[0])
    conversation.save(tmp_path / "talk")
    (tmp_path / "cut").write_bytes((tmp_path / "talk").read_bytes()[:-10])
    for name in ("missing", "cut", ".", "x" * 300):
        with pytest.raises(Zamba2Error):
            conversation.load(tmp_path / name)
    assert say(conversation, TURNS[1]) == reference.say(TURNS[1])
    assert conversation.cached_tokens > 0


def test_a_state_of_another_number_format_is_refused(model: LanguageModel, tmp_path: Path) -> None:
    """What was saved in float32 does not go on in bfloat16."""
    conversation = model.conversation()
    say(conversation, TURNS[0])
    conversation.save(tmp_path / "talk")
    with pytest.raises(Zamba2Error, match="another model or number format"):
        zamba2.load("random", dtype="bfloat16").conversation().load(tmp_path / "talk")


@contextlib.contextmanager
def template(model: LanguageModel, text: str) -> Iterator[None]:
    tokenizer = model.tokenizer
    before, tokenizer.chat_template = tokenizer.chat_template, text
    try:
        yield
    finally:
        tokenizer.chat_template = before


def test_templates_that_rewrite_the_past(model: LanguageModel, watched: Watched) -> None:
    """A template that shows earlier replies differently makes the turn read everything again, correctly."""
    rewriting = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content | upper if not loop.last else m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    with template(model, rewriting):
        conversation = begin(model, watched)
        for text in TURNS:
            expected = model.chat([*conversation.messages, {"role": "user", "content": text}], **OPTIONS)
            assert say(conversation, text) == (expected.tokens, expected.text)
            assert conversation.cached_tokens == 0


def test_a_token_across_the_border_is_read_anew(model: LanguageModel, watched: Watched) -> None:
    """Where a template lets a turn's text grow together with the reply before it, the turn reads the tokens of the whole text."""
    (a,) = model.tokenizer.encode("a", add_special_tokens=False)
    with template(model, "{% for m in messages %}{{ m.content }}{% endfor %}"):
        for forgets in (False, True):
            conversation = begin(model, watched)
            assert say(conversation, "Once", max_tokens=1, logit_bias={a: 1000.0}) == ([a], " a")
            if forgets:  # as one that an older version saved does
                conversation.history = []
            expected = model.chat([*conversation.messages, {"role": "user", "content": "nd then"}], **OPTIONS)
            assert say(conversation, "nd then") == (expected.tokens, expected.text)


def test_many_turns_stay_exact(model: LanguageModel, watched: Watched) -> None:
    """After twenty short turns, a third of them interrupted, the state still equals that of one reading."""
    conversation, reference = begin(model, watched), Reference(model)
    generator = np.random.default_rng(4)
    for turn in range(20):
        text = f"{TURNS[turn % 4]} {turn}"
        if turn % 3 == 2:
            heard = closed_after(conversation, text, int(generator.integers(1, 4)))
            reference_turn(reference, text, heard)
        else:
            assert say(conversation, text) == reference.say(text)
    assert conversation.state is not None and conversation.cached_tokens > 300


def test_penalties_see_the_whole_conversation(tmp_path: Path) -> None:
    """A repetition penalty counts what earlier turns said as well, also in a conversation that was saved and loaded."""
    model = zamba2.load("random", threads=1)
    few = model.tokenizer.encode("t a s w the o b m and f c to", add_special_tokens=False)  # so that what was said would be said again
    options: dict[str, Any] = {"max_tokens": 3, "repetition_penalty": 50.0, "logit_bias": dict.fromkeys(few, 1000.0)}
    conversation = model.conversation()
    for content in ("one", "two", "three"):
        wanted = model.chat([*conversation.messages, {"role": "user", "content": content}], **options)
        reply = "".join(piece.text for piece in conversation.say(content, **options))
        assert reply == wanted.text and (conversation.cached_tokens > 0 or content == "one")
        conversation.save(tmp_path / "saved")
        conversation = model.conversation()
        conversation.load(tmp_path / "saved")


def test_a_reply_cut_at_a_stop_text_costs_its_own_tokens_alone() -> None:
    """Behind replies that ended at a stop text the next turn reads the last of them and what is new, and answers as one that reads all."""
    model = zamba2.load("random", threads=1)
    conversation, cached = model.conversation(), [0]
    for content in ("one", "two", "three"):
        whole = model.chat([*conversation.messages, {"role": "user", "content": content}], max_tokens=12).text
        reply = "".join(piece.text for piece in conversation.say(content, max_tokens=12, stop=[whole[4:7]]))
        assert reply == whole[: whole.index(whole[4:7])]
        cached.append(conversation.cached_tokens)
    assert cached[:2] == [0, 0] and cached[2] > 5 and cached[3] > cached[2] + 5
