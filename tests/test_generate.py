"""Generation: streams, batches, stop texts, end tokens, log-probabilities, seeds, continued states and long prompts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from strategies import MINIATURES, random_model, random_tokens

import zamba2
from zamba2.errors import Zamba2Error
from zamba2.language.generate import Generation, Request, StopText, collect, run
from zamba2.language.model import LanguageModel
from zamba2.language.sampling import Sampling
from zamba2.model.model import Zamba2
from zamba2.runtime.torch import TorchBackend
from zamba2.weights.checkpoint import load_model
from zamba2.weights.hub import RANDOM

PROMPTS = ["Once upon a time", "a", "The old man and his three daughters lived in a house by the sea, and", "¿Qué? 🙂"]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 11},
    "everything": {
        "temperature": 0.9, "seed": 3, "top_k": 200, "top_p": 0.95, "min_p": 0.001, "repetition_penalty": 1.1,
        "frequency_penalty": 0.2, "presence_penalty": 0.1, "logit_bias": {5: 1.0}, "logprobs": 3,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return zamba2.load("random", dtype="float32")


@pytest.fixture(scope="module")
def plain() -> Zamba2:
    """The same weights without backend, state or chunks."""
    return load_model(RANDOM, dtype=torch.float32)


def logprobs_of(plain: Zamba2, tokens: list[int]) -> npt.NDArray[np.float64]:
    """The model's own log-probabilities after each token, (T, V), in one unchunked call."""
    with torch.inference_mode():
        return plain(torch.tensor([tokens]))[0].double().log_softmax(-1).numpy()  # type: ignore[no-any-return]


def greedy(plain: Zamba2, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding that reads everything again for each token."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.inference_mode():
            tokens.append(int(plain(torch.tensor([tokens]), logits_to_keep=1)[0, -1].argmax()))
    return tokens[len(prompt) :]


# ---- one path --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_reply_is_its_folded_stream(way: str, model: LanguageModel) -> None:
    """What ``generate`` returns is what ``stream`` yields, joined; only the last piece has a finish reason."""
    for prompt in PROMPTS:
        result = model.generate(prompt, max_tokens=12, **WAYS[way])
        pieces = list(model.stream(prompt, max_tokens=12, **WAYS[way]))
        assert [piece.token for piece in pieces] == result.tokens
        assert "".join(piece.text for piece in pieces) == result.text
        logprobs: list[Any] = result.logprobs or [None] * len(pieces)
        assert [piece.logprob for piece in pieces] == logprobs
        assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [result.finish_reason]
        assert result.completion_tokens == len(result.tokens) and result.prompt_tokens == len(model.tokenizer.encode(prompt))


@pytest.mark.parametrize("seed", range(4))
def test_streamed_text_is_whole_text(seed: int, model: LanguageModel) -> None:
    """The text of a reply is what its tokens add to the text of the prompt's tokens, bytes and special tokens included."""
    prompt = model.tokenizer.encode(PROMPTS[0])
    bytes_often = {i: 2.0 for i in range(3, 259)}
    result = model.generate(prompt, max_tokens=40, temperature=1.5, seed=seed, ignore_eos=True, logit_bias=bytes_often)
    whole = model.tokenizer.decode(prompt + result.tokens)
    assert whole == model.tokenizer.decode(prompt) + result.text
    assert any(3 <= token < 259 for token in result.tokens)


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_is_its_prompts_one_by_one(way: str, model: LanguageModel) -> None:
    """Prompts of unequal length generated together give each token that they give alone."""
    together = model.generate(PROMPTS, max_tokens=10, **WAYS[way])
    alone = [model.generate(prompt, max_tokens=10, **WAYS[way]) for prompt in PROMPTS]
    assert [facts(a) for a in together] == [facts(b) for b in alone]
    assert len({tuple(a.tokens) for a in together}) == len(PROMPTS)


def test_a_batch_of_different_wishes(model: LanguageModel) -> None:
    """Requests with their own options, lengths and stop texts share a call without touching each other."""
    prompts = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
    requests = [
        Request(prompts[0], max_tokens=3),
        Request(prompts[1], Sampling(temperature=1.0, seed=1), max_tokens=15),
        Request(prompts[2], Sampling(temperature=1.0, seed=2), max_tokens=9, stop=("e", "a")),
        Request(prompts[3], Sampling(logit_bias={2: 100.0}), max_tokens=9, logprobs=1),
    ]
    together = collect(model.backend, requests, model.tokenizer)
    alone = [collect(model.backend, [request], model.tokenizer)[0] for request in requests]
    assert [facts(a) for a in together] == [facts(b) for b in alone]
    assert [a.finish_reason for a in together] == ["length", "length", "stop", "stop"]
    order = [piece.index for piece in run(model.backend, requests, model.tokenizer)]
    assert order[:7] == [0, 1, 2, 3, 0, 1, 2], "the requests advance together"


def facts(result: Generation) -> tuple[Any, ...]:
    return result.tokens, result.text, result.finish_reason, result.stop, result.prompt_tokens, result.logprobs


@pytest.mark.parametrize("name", MINIATURES)
def test_greedy_is_argmax_of_a_plain_forward(name: str) -> None:
    """Token ids without a tokenizer: greedy decoding with a state is the argmax of reading everything again."""
    plain = random_model(MINIATURES[name], seed=5)
    prompt = random_tokens(MINIATURES[name], 5, 19).tolist()
    expected = greedy(plain, prompt, 8)
    model = LanguageModel(TorchBackend(random_model(MINIATURES[name], seed=5)), None)
    result = model.generate(prompt, max_tokens=8)
    assert result.tokens == expected and result.text == "" and result.finish_reason == "length"
    assert len(set(expected)) > 1


# ---- where a reply ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7])
def test_max_tokens(count: int, model: LanguageModel) -> None:
    """A reply has max_tokens tokens unless something ends it, and longer replies begin with shorter ones."""
    result = model.generate(PROMPTS[0], max_tokens=count)
    assert len(result.tokens) == count and result.finish_reason == "length" and result.stop is None
    assert model.generate(PROMPTS[0], max_tokens=9).tokens[:count] == result.tokens


@pytest.fixture(scope="module")
def ending(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """The default model where the third token that it says to the first prompt is an end token."""
    token = model.generate(PROMPTS[0], max_tokens=3).tokens[2]
    assert token not in model.generate(PROMPTS[0], max_tokens=2).tokens
    folder = tmp_path_factory.mktemp("ending") / "model"
    shutil.copytree(RANDOM, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, token]}))
    return zamba2.load(folder, dtype="float32")


def test_end_token(ending: LanguageModel, model: LanguageModel) -> None:
    """The checkpoint's own end tokens end a reply: counted among its tokens, absent from its text; ignore_eos goes on."""
    without = model.generate(PROMPTS[0], max_tokens=6)
    ended = ending.generate(PROMPTS[0], max_tokens=6)
    assert ended.tokens == without.tokens[:3] and ended.finish_reason == "stop" and ended.stop is None
    assert ended.text == model.generate(PROMPTS[0], max_tokens=2).text
    going = ending.generate(PROMPTS[0], max_tokens=6, ignore_eos=True)
    assert (going.tokens, going.text, going.finish_reason) == (without.tokens, without.text, "length")


def test_end_token_at_once(model: LanguageModel) -> None:
    """A reply may be nothing but an end token."""
    result = model.generate(PROMPTS[0], max_tokens=6, logit_bias={2: 1000.0})
    assert (result.tokens, result.text, result.finish_reason) == ([2], "", "stop")
    assert model.generate(PROMPTS[0], max_tokens=6, logit_bias={2: 1000.0}, ignore_eos=True).tokens == [2] * 6


class Only:
    """Allows one token after the other."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def mask(self, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        masked = np.full_like(scores, -np.inf)
        masked[self.tokens[0]] = 0
        return masked

    def accept(self, token: int) -> None:
        assert token == self.tokens.pop(0)


def test_an_end_token_inside_a_character(model: LanguageModel) -> None:
    """What was held of a character that an end token cuts is in the text, as in that of all tokens decoded together."""
    half = model.tokenizer._backend.token_to_id("<0xC3>")
    result = model.generate(PROMPTS[0], constraint=Only([half, 2]))
    assert (result.tokens, result.text, result.finish_reason) == ([half, 2], "\ufffd", "stop")


def test_special_tokens_stop_by_their_names(model: LanguageModel) -> None:
    """A stop text that is a special token's name ends the reply at that token, which has no text, and is named, also where it ends replies
    anyway or end tokens are ignored; its name written out in plain text stops as any text does."""
    other, eos = (model.tokenizer._backend.id_to_token(i) for i in (0, 2))
    for token, options in ((0, {}), (2, {}), (2, {"ignore_eos": True})):
        bias = {token: 1000.0}
        result = model.generate(PROMPTS[0], max_tokens=6, logit_bias=bias, stop=["never", other, eos], **options)
        assert (result.tokens, result.text, result.finish_reason, result.stop) == ([token], "", "stop", (other, None, eos)[token])
    assert model.generate(PROMPTS[0], max_tokens=3, logit_bias={0: 1000.0}).tokens == [0] * 3
    stops = StopText([eos])
    assert stops.push(f"a{eos}b") == ("a", eos)


@pytest.fixture(scope="module")
def long_reply(model: LanguageModel) -> Generation:
    return model.generate(PROMPTS[0], max_tokens=30)


@given(start=st.integers(0, 1 << 16), length=st.integers(1, 9), other=st.text(max_size=4), data=st.data())
@settings(max_examples=25)
def test_stop_text_cuts_exactly(
    start: int, length: int, other: str, data: st.DataObject, model: LanguageModel, long_reply: Generation
) -> None:
    """A reply ends just before its stop text, wherever token borders lie, with the token that completed it."""
    full = long_reply.text
    start %= len(full) - length
    stop = full[start : start + length]
    assume(other not in full and len(other) > 0)
    result = model.generate(PROMPTS[0], max_tokens=30, stop=data.draw(st.sampled_from([stop, [stop], [other, stop], (stop, other)])))
    assert result.text == full[: full.find(stop)] and result.finish_reason == "stop" and result.stop == stop
    assert result.tokens == long_reply.tokens[: len(result.tokens)]
    before = model.generate(PROMPTS[0], max_tokens=len(result.tokens) - 1).text if len(result.tokens) > 1 else ""
    assert stop not in before, "no token was sampled beyond the one that completed the stop text"


def test_stop_text_never_reached(model: LanguageModel, long_reply: Generation) -> None:
    """A text held back as the beginning of a stop text comes out at the end."""
    for length in (1, 2, 3):
        stop = long_reply.text[-length:] + "\0"
        result = model.generate(PROMPTS[0], max_tokens=30, stop=stop)
        assert result.text == long_reply.text and result.finish_reason == "length"


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Reading character by character: the text before the first stop text to be complete, the longest at a tie."""
    for end in range(1, len(text) + 1):
        ended = max((s for s in stops if text[:end].endswith(s)), key=len, default=None)
        if ended is not None:
            return text[: end - len(ended)], ended
    return text, None


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=10),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3) | st.lists(st.text("abc", min_size=1, max_size=3), max_size=3),
)
@example(pieces=["abcd"], stops=["bc", "abcd"])
@example(pieces=["a", "b", "a", "b", "c"], stops=["ababd", "abc"])
@settings(max_examples=500)
def test_stop_texts_do_not_depend_on_the_split(pieces: list[str], stops: list[str]) -> None:
    """However a text is cut into pieces, what comes out is the text before the stop text that is complete first."""
    stop_text, given_text, out, found = StopText(stops), "", "", None
    for number, piece in enumerate([*pieces, ""]):
        certain, found = stop_text.push(piece, last=number == len(pieces))
        given_text += piece
        out += certain
        if found is not None:
            break
        assert out + stop_text.held == given_text
        assert stop_text.held == "" or any(stop.startswith(stop_text.held) for stop in stops), "nothing is held in vain"
    assert (out, found) == first_stop("".join(pieces), stops)


# ---- what is sampled -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["greedy", "sampled", "everything"])
def test_logprobs_are_the_models_own(way: str, model: LanguageModel, plain: Zamba2) -> None:
    """Log-probabilities are those of a plain forward, whatever penalties, bias and temperature chose the token."""
    prompt = model.tokenizer.encode(PROMPTS[2])
    result = model.generate(prompt, max_tokens=10, **(WAYS[way] | {"logprobs": 5}))
    expected = logprobs_of(plain, prompt + result.tokens)[len(prompt) - 1 : -1]
    assert result.logprobs is not None and len(result.logprobs) == len(result.tokens)
    for item, token, own in zip(result.logprobs, result.tokens, expected, strict=True):
        assert item.token == token and item.logprob == pytest.approx(own[token], abs=2e-4)
        assert [t for t, _ in item.top] == list(np.argsort(-own, kind="stable")[:5])
        assert [value for _, value in item.top] == pytest.approx(np.sort(own)[::-1][:5], abs=2e-4)
        assert dict(item.top).get(token, item.logprob) == item.logprob


def test_number_of_logprobs(model: LanguageModel) -> None:
    """None gives none, 0 the token's own alone, k the k likeliest; all alternatives together are a distribution."""
    assert model.generate("a", max_tokens=2).logprobs is None
    alone = model.generate("a", max_tokens=2, logprobs=0).logprobs
    assert alone is not None and [item.top for item in alone] == [(), ()]
    hundred = model.generate("a", max_tokens=1, logprobs=100).logprobs
    assert hundred is not None and len(hundred[0].top) == 100
    assert 100 / 1024 < sum(np.exp(value) for _, value in hundred[0].top) <= 1 + 1e-9
    small = LanguageModel(TorchBackend(random_model(MINIATURES["2.7b"], seed=1)), None)
    everything = small.generate([1, 2], max_tokens=1, logprobs=61).logprobs
    assert everything is not None and sum(np.exp(value) for _, value in everything[0].top) == pytest.approx(1)


def test_seeds(model: LanguageModel) -> None:
    """The same seed gives the same text; other seeds, and no seed, give others."""
    texts = [model.generate("a", max_tokens=12, temperature=1.0, seed=seed).text for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1] and len(set(texts)) == 3
    free = {model.generate("a", max_tokens=12, temperature=1.0).text for _ in range(3)}
    assert len(free) == 3


def test_logit_bias(model: LanguageModel) -> None:
    """A large bias forces a token; -inf bans one, and the next likeliest is taken."""
    assert model.generate("a", max_tokens=3, logit_bias={300: 1e6}).tokens == [300] * 3
    first = model.generate("a", max_tokens=1, logprobs=2)
    assert first.logprobs is not None
    (best, _), (second, _) = first.logprobs[0].top
    assert first.tokens == [best]
    assert model.generate("a", max_tokens=1, logit_bias={best: float("-inf")}).tokens == [second]
    sampled = model.generate("a", max_tokens=60, temperature=2.0, seed=0, logit_bias={i: float("-inf") for i in range(0, 1024, 2)})
    assert all(token % 2 for token in sampled.tokens)


def test_unknown_option(model: LanguageModel) -> None:
    """A misspelt option is refused by a sentence that names it and the known ones."""
    with pytest.raises(Zamba2Error, match=r"no option 'temprature'; there are .*temperature"):
        model.generate("a", temprature=1.0)


# ---- states and long prompts -----------------------------------------------------------------------------------------


def test_going_on_from_a_state(model: LanguageModel) -> None:
    """A reply's state continues it, is left as it was by that, and may be continued several times, together too."""
    whole = model.generate(PROMPTS[2], max_tokens=9)
    first = model.generate(PROMPTS[2], max_tokens=4)
    assert first.state is not None
    position = first.state.position
    assert position == first.prompt_tokens + 3, "it has read all but the last token"
    for _ in range(2):
        assert first.tokens + model.generate(first.tokens[-1:], state=first.state, max_tokens=5).tokens == whole.tokens
        assert first.state.position == position
    twice = model.generate([first.tokens[-1:], [9]], state=first.state, max_tokens=5)
    assert first.tokens + twice[0].tokens == whole.tokens
    prompt = model.tokenizer.encode(PROMPTS[2]) + first.tokens[:-1]
    assert twice[1].tokens == model.generate([*prompt, 9], max_tokens=5).tokens


def test_pieces_carry_the_state(model: LanguageModel) -> None:
    """A piece's state has read everything before its token when the piece is yielded."""
    length = len(model.tokenizer.encode(PROMPTS[0]))
    positions = [piece.state.position for piece in model.stream(PROMPTS[0], max_tokens=5)]
    assert positions == [length + i for i in range(5)]


PREFILL_STEP = 512  # the engine's stretch


@pytest.mark.parametrize("length", [PREFILL_STEP - 1, PREFILL_STEP, PREFILL_STEP + 1, 1024, 1025, 1100])
def test_long_prompts(length: int, model: LanguageModel, plain: Zamba2) -> None:
    """A prompt read in steps gives what one unchunked forward gives, and progress rises to less than the whole."""
    tokens = np.random.default_rng(length).integers(3, 1024, length).tolist()
    seen: list[tuple[int, int]] = []
    result = model.generate(tokens, max_tokens=2, logprobs=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, length) for done in range(PREFILL_STEP, length, PREFILL_STEP)]
    expected = logprobs_of(plain, tokens + result.tokens)[length - 1 : -1]
    assert result.tokens == expected.argmax(-1).tolist()
    assert result.logprobs is not None
    for item, own in zip(result.logprobs, expected, strict=True):
        assert [value for _, value in item.top] == pytest.approx(np.sort(own)[::-1][:3], abs=2e-4)


def test_progress_of_a_batch_and_after_a_state(model: LanguageModel) -> None:
    """Progress counts all prompts together; steps end where the sequence's own position reaches a multiple of 512."""
    tokens = np.random.default_rng(0).integers(3, 1024, 1300).tolist()
    seen: list[tuple[int, int]] = []
    report = lambda done, total: seen.append((done, total))  # noqa: E731
    together = model.generate([tokens, tokens[:600]], max_tokens=2, progress=report)
    assert seen == [(512, 1900), (1024, 1900), (1536, 1900)]
    assert together[0].tokens == model.generate(tokens, max_tokens=2).tokens
    seen.clear()
    begun = model.generate(tokens[:100], max_tokens=1)
    after = model.generate(tokens[100:], state=begun.state, max_tokens=2, progress=report)
    assert seen == [(412, 1200), (924, 1200)]
    assert after.tokens == together[0].tokens


def test_a_context_beyond_the_trained_one(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: LanguageModel) -> None:
    """Beyond max_position_embeddings one notice is given, once, and generation goes on unchanged."""
    shutil.copytree(RANDOM, tmp_path / "model")
    config = json.loads((RANDOM / "config.json").read_text()) | {"max_position_embeddings": 23}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    short = zamba2.load(tmp_path / "model", dtype="float32")
    capsys.readouterr()
    tokens = model.tokenizer.encode(PROMPTS[0])
    assert short.generate(tokens, max_tokens=23 - len(tokens)).text
    assert capsys.readouterr().err == ""
    results = [short.generate(tokens, max_tokens=30) for _ in range(2)]
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "beyond the 23 tokens" in error
    assert results[0].tokens == results[1].tokens == model.generate(tokens, max_tokens=30).tokens


def test_times(model: LanguageModel) -> None:
    """Times are not negative, and the rate counts the tokens after the first."""
    result = model.generate("a", max_tokens=5)
    assert result.prompt_seconds > 0 and result.decode_seconds > 0
    assert result.tokens_per_second == pytest.approx(4 / result.decode_seconds)
    assert model.generate("a", max_tokens=1).tokens_per_second == 0
