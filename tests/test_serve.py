"""The HTTP server, asked by the official clients and by hand: what it answers is what the model says, and nothing takes it down."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import zamba2
from zamba2.errors import Zamba2Error
from zamba2.language.generate import TokenLogprob
from zamba2.language.model import LanguageModel
from zamba2.language.tokenizer import TokenTexts
from zamba2.serve.cache import StateCache
from zamba2.serve.grammar import Unmet
from zamba2.serve.scheduler import Busy, Prompt, Scheduler, TimeIsUp
from zamba2.train.instructions import tasks

anthropic = pytest.importorskip("anthropic", reason="clients come with the extra [test]")
openai = pytest.importorskip("openai", reason="clients come with the extra [test]")
uvicorn = pytest.importorskip("uvicorn", reason="the server needs the extra [serve]")
pytest.importorskip("fastapi", reason="the server needs the extra [serve]")

from zamba2.commands.serve import bind, load_adapters, main, read_adapters, read_keys  # noqa: E402
from zamba2.serve.app import Settings, create_app  # noqa: E402
from zamba2.serve.protocol import (  # noqa: E402
    Ask,
    ChatStream,
    CompletionStream,
    LegacyLogprobs,
    MessageStream,
    Reply,
    ResponseBody,
    ResponseStream,
    Said,
    chat_logprob,
    problem_of,
    token_counts,
    validation_problem,
)

ROOT = Path(__file__).resolve().parent.parent
HELLO = [{"role": "user", "content": "Spell the word river."}]
LONG = {"prompt": "One day", "max_tokens": 3500, "ignore_eos": True, "temperature": 0}  # takes seconds
JSON = {"Content-Type": "application/json"}
URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize", "/detokenize", "/v1/messages/count_tokens")


class Live:
    """A server on a free port, in this process."""

    def __init__(self, model: LanguageModel, *, cached: bool = False, allow: dict[str, Any] | None = None, **limits: Any) -> None:
        self.cache = StateCache(lambda adapter: model.backend.new_state(adapter=adapter)) if cached else None
        self.scheduler = Scheduler(model.backend, model.tokenizer, cache=self.cache, **limits)
        app = create_app(model, self.scheduler, self.cache, Settings(**{"model_name": "demo", "log": False, **(allow or {})}))
        self.socket = bind("127.0.0.1", 0, protected=False)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", ws="none", timeout_graceful_shutdown=5,
            timeout_keep_alive=300,  # a connection that is closed while it is taken again would be a test's bad luck
        )  # fmt: skip
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})

    def __enter__(self) -> Live:
        self.thread.start()
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        self.anthropic = anthropic.Anthropic(base_url=self.url, api_key="none", max_retries=0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for client in (self.http, self.openai, self.anthropic):
            client.close()
        self.scheduler.close()
        self.server.should_exit = True
        self.thread.join(timeout=60)
        self.socket.close()

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def is_idle(self, seconds: float = 20.0) -> bool:
        """Whether nobody is served any more, within so long."""
        end = time.monotonic() + seconds
        while any(self.scheduler.counts().values()) and time.monotonic() < end:
            time.sleep(0.01)
        return not any(self.scheduler.counts().values())


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return zamba2.load("demo", threads=1)


@pytest.fixture(scope="module")
def live(model: LanguageModel) -> Iterator[Live]:
    """Without a cache: the same bits as the model alone."""
    with Live(model) as made:
        yield made


@pytest.fixture(scope="module")
def chats() -> list[list[dict[str, str]]]:
    return [[dict(m) for m in task.messages[:-1]] for task in itertools.islice(tasks("serve", split="test"), 6)]


def events(response: httpx.Response) -> list[tuple[str | None, Any]]:
    """A stream's events by name."""
    found = []
    for block in response.text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in fields:
            found.append((fields.get("event"), fields["data"] if fields["data"] == "[DONE]" else json.loads(fields["data"])))
    return found


# ---- OpenAI's client -------------------------------------------------------------------------------------------------


def test_chat_is_the_models(live: Live, model: LanguageModel, chats: list[list[dict[str, str]]]) -> None:
    """Through the client a greedy reply, whole and streamed, is word for word the model's own, with its counts and its reason to end."""
    for messages in chats:
        own = model.chat(messages, max_tokens=32)
        whole = live.openai.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=32)
        (choice,) = whole.choices
        assert (choice.message.content, choice.finish_reason) == (own.text, own.finish_reason)
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (own.prompt_tokens, own.completion_tokens)
        assert whole.usage.total_tokens == own.prompt_tokens + own.completion_tokens and whole.object == "chat.completion"
        stream = live.openai.chat.completions.create(
            model="demo", messages=messages, temperature=0, max_completion_tokens=32, stream=True, stream_options={"include_usage": True}
        )
        with stream:
            chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == own.text
        assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [own.finish_reason]
        assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == whole.usage and not chunks[-1].choices
        assert len({c.id for c in chunks}) == 1 and all(c.usage is None for c in chunks[:-1])
        assert abs(whole.created - time.time()) < 60
    one = live.openai.chat.completions.create(model="demo", messages=chats[0], temperature=0, max_completion_tokens=1)
    assert (one.usage.completion_tokens, one.choices[0].finish_reason) == (1, "length")


def test_chat_logprobs(live: Live, model: LanguageModel, chats: list[list[dict[str, str]]]) -> None:
    """Log-probabilities are the model's own, for each token with its bytes, streamed and whole; the texts join to the reply."""
    own = model.chat(chats[0], max_tokens=16, logprobs=3)
    asked: dict[str, Any] = dict(model="demo", messages=chats[0], temperature=0, max_tokens=16, logprobs=True, top_logprobs=3)
    content = live.openai.chat.completions.create(**asked).choices[0].logprobs.content
    with live.openai.chat.completions.create(**asked, stream=True) as stream:
        streamed = [entry for chunk in stream if (found := chunk.choices[0].logprobs) is not None for entry in found.content]
    assert streamed == content and own.logprobs is not None
    assert [entry.logprob for entry in content] == [entry.logprob for entry in own.logprobs]
    assert [[top.logprob for top in entry.top_logprobs] for entry in content] == [[p for _, p in entry.top] for entry in own.logprobs]
    said = content[:-1] if own.finish_reason == "stop" else content
    assert b"".join(bytes(entry.bytes) for entry in said).decode().strip() == own.text.strip()


def test_completions_are_the_models(live: Live, model: LanguageModel) -> None:
    """Texts and token ids are continued as by the model itself; several prompts and replies keep their order; 16 tokens by default."""
    texts = ["One day a little", "The cat sat on"]
    whole = live.openai.completions.create(model="demo", prompt=texts, temperature=0, n=2)
    own = [model.generate(text, max_tokens=16) for text in texts]
    assert [choice.text for choice in whole.choices] == [own[0].text, own[0].text, own[1].text, own[1].text]
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert whole.usage.prompt_tokens == sum(g.prompt_tokens for g in own)
    assert whole.usage.completion_tokens == 2 * sum(g.completion_tokens for g in own)
    ids = model.tokenizer.encode(texts[0])
    assert live.openai.completions.create(model="demo", prompt=ids, temperature=0).choices[0].text == own[0].text
    with live.openai.completions.create(model="demo", prompt=texts, temperature=0, stream=True) as stream:
        said = ["", ""]
        for chunk in stream:
            said[chunk.choices[0].index] += chunk.choices[0].text
    assert said == [g.text for g in own]


@pytest.mark.parametrize("text", ["One day a little cat", "  Two\nlines ☃ and wörld", "<|im_start|>user\nhi"])
def test_echo_with_logprobs(live: Live, model: LanguageModel, text: str) -> None:
    """Echoed prompts come with every token's log-probability but the first's, as the model gives them, at the right characters."""
    asked: dict[str, Any] = dict(model="demo", prompt=text, temperature=0, max_tokens=4, logprobs=2, echo=True)
    (choice,) = live.openai.completions.create(**asked).choices
    own, ids = model.generate(text, max_tokens=4, logprobs=2), model.tokenizer.encode(text)
    lists = choice.logprobs
    assert choice.text == text + own.text and own.logprobs is not None
    assert len(lists.tokens) == len(lists.token_logprobs) == len(lists.top_logprobs) == len(lists.text_offset) == len(ids) + len(own.tokens)
    assert lists.token_logprobs[0] is None and lists.token_logprobs[-1] == own.logprobs[-1].logprob
    for i in (1, len(ids) - 1):
        (before,) = model.generate(ids[:i], max_tokens=1, logprobs=0, logit_bias={ids[i]: 1e6}).logprobs or [None]
        assert before is not None and before.token == ids[i] and abs(before.logprob - lists.token_logprobs[i]) < 0.05
    for token, logprob, top in list(zip(lists.tokens, lists.token_logprobs, lists.top_logprobs, strict=True))[1:]:
        assert 2 <= len(top) <= 3 and logprob <= max(top.values()) and token in top
    for token, start in zip(lists.tokens, lists.text_offset, strict=True):
        if token.strip() and not token.startswith(("bytes:", "<|")):
            assert choice.text[start:].startswith(token) or choice.text[start:].startswith(token.lstrip())
    with live.openai.completions.create(**asked, stream=True) as stream:
        chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(c.text for c in chunks) == choice.text
    assert [p for c in chunks for p in c.logprobs.token_logprobs] == lists.token_logprobs
    assert [o for c in chunks for o in c.logprobs.text_offset] == lists.text_offset
    bare = live.openai.completions.create(**asked | {"echo": False}).choices[0]
    assert bare.text == own.text and bare.logprobs.text_offset == lists.text_offset[len(ids) :]
    alone = live.openai.completions.create(**asked | {"max_tokens": 0})
    assert alone.choices[0].text == text and alone.usage.completion_tokens == 0
    assert alone.choices[0].logprobs.token_logprobs == lists.token_logprobs[: len(ids)]


def test_responses(live: Live, model: LanguageModel, chats: list[list[dict[str, str]]]) -> None:
    """The newer API gives the same words for a text and for messages, whole and as events of the official names in their order."""
    own = model.chat(HELLO, max_tokens=8)
    asked: dict[str, Any] = dict(model="demo", input=HELLO[0]["content"], temperature=0, max_output_tokens=8)
    whole = live.openai.responses.create(**asked)
    assert whole.output_text == own.text and whole.status == ("incomplete" if own.finish_reason == "length" else "completed")
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (own.prompt_tokens, own.completion_tokens)
    told = model.chat([{"role": "system", "content": "Be brief."}, *chats[0]], max_tokens=32)
    parts = [{"role": m["role"], "content": [{"type": "input_text", "text": m["content"]}]} for m in chats[0]]
    more: dict[str, Any] = dict(metadata={"a": "b"}, top_p=0.9, include=["message.output_text.logprobs"])
    again = live.openai.responses.create(
        model="demo", instructions="Be brief.", input=parts, temperature=0, max_output_tokens=32, **more
    )
    assert again.output_text == told.text and again.instructions == "Be brief."
    assert (again.metadata, again.top_p, again.max_output_tokens) == ({"a": "b"}, 0.9, 32)
    assert len(again.output[0].content[0].logprobs) == told.completion_tokens
    with live.openai.responses.create(**asked, stream=True) as stream:
        seen = list(stream)
    kinds = [event.type for event in seen]
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:-1] == ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
    assert "".join(event.delta for event in seen[4:-4]) == own.text == seen[-1].response.output_text
    assert [event.sequence_number for event in seen] == list(range(len(seen))) and seen[-1].response.usage == whole.usage
    cut = live.openai.responses.create(**asked | {"max_output_tokens": 1}, stream=True)
    with cut:
        last = list(cut)[-1]
    assert last.type == "response.incomplete" and last.response.incomplete_details.reason == "max_output_tokens"
    with live.openai.responses.stream(**asked, top_logprobs=2) as stream:
        final = stream.get_final_response()
    assert final.output_text == own.text and len(final.output[0].content[0].logprobs) == own.completion_tokens


def test_models_and_tokens(live: Live, model: LanguageModel) -> None:
    """The model is listed to both clients; texts and conversations become the tokens that the model reads, and texts again."""
    assert [m.id for m in live.openai.models.list()] == ["demo"] == [m.id for m in live.anthropic.models.list()]
    assert live.openai.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4' here; there is 'demo'"):
        live.openai.models.retrieve("gpt-4")
    tokens = live.post("/tokenize", prompt="One day ☃").json()
    assert tokens["tokens"] == model.tokenizer.encode("One day ☃") and tokens["count"] == len(tokens["tokens"])
    text = live.post("/detokenize", tokens=tokens["tokens"][1:]).json()["prompt"]
    assert text == model.tokenizer.decode(tokens["tokens"][1:], skip_special_tokens=False)
    assert live.post("/tokenize", messages=HELLO).json()["tokens"] == model.tokenizer.encode_chat(HELLO)
    assert live.post("/tokenize", prompt="One day ☃", add_special_tokens=False).json()["tokens"] == tokens["tokens"][1:]
    bare = live.post("/tokenize", messages=HELLO, add_generation_prompt=False).json()["tokens"]
    assert bare == model.tokenizer.encode_chat(HELLO, add_generation_prompt=False)


def test_n_and_seeds(live: Live) -> None:
    """A seed repeats a sampled text, whole and streamed; each of n replies has a seed of its own; without one texts differ."""
    asked: dict[str, Any] = dict(model="demo", prompt="One day", max_tokens=12, seed=-3)
    first, second = (live.openai.completions.create(**asked, n=4) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices] and len(set(texts)) == 4
    assert live.openai.completions.create(**asked | {"seed": -1}).choices[0].text == texts[2]
    chat: dict[str, Any] = dict(model="demo", messages=HELLO, temperature=2, max_tokens=12, seed=8)
    both = [choice.message.content for choice in live.openai.chat.completions.create(**chat, n=2).choices]
    assert both[0] == live.openai.chat.completions.create(**chat).choices[0].message.content != both[1]
    with live.openai.completions.create(**asked, n=4, stream=True) as stream:
        said = [""] * 4
        for chunk in stream:
            said[chunk.choices[0].index] += chunk.choices[0].text
    assert said == texts
    free = live.openai.completions.create(model="demo", prompt="One day", max_tokens=12, n=4)
    assert len({choice.text for choice in free.choices}) > 1


def test_stop_bias_and_penalties(live: Live, model: LanguageModel) -> None:
    """Stop texts, biases and penalties do to a reply what they do to the model's own."""
    asked: dict[str, Any] = dict(model="demo", prompt="One day a little", temperature=0, max_tokens=24)
    plain = model.generate("One day a little", max_tokens=24)
    stop = plain.text[6:9]
    (cut,) = live.openai.completions.create(**asked, stop=stop).choices
    assert cut.text == plain.text[: plain.text.index(stop)] and cut.finish_reason == "stop"
    assert live.openai.completions.create(**asked, stop=["\u2603", stop]).choices[0].text == cut.text
    bias = {str(plain.tokens[0]): -100}
    own = model.generate("One day a little", max_tokens=24, logit_bias={plain.tokens[0]: -100})
    assert live.openai.completions.create(**asked, logit_bias=bias).choices[0].text == own.text != plain.text
    knobs: dict[str, Any] = {"repetition_penalty": 1.3, "min_p": 0.05, "top_k": 7}
    own = model.generate("One day a little", max_tokens=24, temperature=0.7, seed=4, top_p=0.9, frequency_penalty=0.5, **knobs)
    asked |= {"temperature": 0.7, "seed": 4, "top_p": 0.9, "frequency_penalty": 0.5, "extra_body": knobs}
    assert live.openai.completions.create(**asked).choices[0].text == own.text


# ---- Anthropic's client ----------------------------------------------------------------------------------------------


def test_messages(live: Live, model: LanguageModel) -> None:
    """Anthropic's client gets the same words, whole and streamed, with a system text or blocks, and the reason to end in its names."""
    greedy = {"temperature": 0}
    own = model.chat([{"role": "system", "content": "Be\nbrief."}, *HELLO], max_tokens=16)
    blocks = [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief.", "cache_control": {"type": "ephemeral"}}]
    for system in ("Be\nbrief.", blocks):
        reply = live.anthropic.messages.create(model="demo", max_tokens=16, messages=HELLO, system=system, extra_body=greedy)
        assert reply.content[0].text == own.text and reply.stop_reason == {"stop": "end_turn", "length": "max_tokens"}[own.finish_reason]
        assert (reply.usage.input_tokens, reply.usage.output_tokens) == (own.prompt_tokens, own.completion_tokens)
    asked: dict[str, Any] = dict(model="demo", max_tokens=16, messages=HELLO, system="Be\nbrief.", extra_body=greedy)
    with live.anthropic.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == own.text
        final = stream.get_final_message()
    assert (final.content[0].text, final.stop_reason, final.usage.output_tokens) == (own.text, reply.stop_reason, own.completion_tokens)
    with live.anthropic.messages.create(**asked, stream=True) as raw:
        kinds = [event.type for event in raw]
    assert kinds[:2] == ["message_start", "content_block_start"] and kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) <= {"content_block_delta", "ping"}
    one = live.anthropic.messages.create(**asked | {"max_tokens": 1})
    assert one.stop_reason == "max_tokens"
    stop = own.text[1:3]
    cut = live.anthropic.messages.create(**asked, stop_sequences=[stop])
    assert (cut.stop_reason, cut.stop_sequence, cut.content[0].text) == ("stop_sequence", stop, own.text[: own.text.index(stop)])


def test_a_reply_goes_on(live: Live, model: LanguageModel) -> None:
    """A last message of the assistant is the beginning of the reply."""
    text = model.tokenizer.render_chat(HELLO) + "riv"
    own = model.generate(model.tokenizer.encode(text, add_special_tokens=False), max_tokens=8)
    messages = [*HELLO, {"role": "assistant", "content": "riv"}]
    reply = live.anthropic.messages.create(model="demo", max_tokens=8, messages=messages, extra_body={"temperature": 0})
    assert reply.content[0].text == own.text


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_second_turns_are_cached(model: LanguageModel, chats: list[list[dict[str, str]]]) -> None:
    """A second turn reads what is new alone: everything up to the end of the first reply is counted as cached, in all three layouts."""
    closing = len(model.tokenizer.encode("<|im_end|>\n", add_special_tokens=False))
    with Live(model, cached=True) as live:
        for messages in chats[:3]:
            first = live.openai.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=48)
            assert first.choices[0].finish_reason == "stop"
            own, count = first.choices[0].message, first.usage.prompt_tokens + first.usage.completion_tokens - 1 + closing
            more = [*messages, own.model_dump(), {"role": "user", "content": "Say it again."}]
            second = live.openai.chat.completions.create(model="demo", messages=more, temperature=0, max_tokens=16)
            assert second.usage.prompt_tokens_details.cached_tokens == count
            third = live.anthropic.messages.create(
                model="demo", max_tokens=8, extra_body={"temperature": 0}, system="Be brief.", messages=HELLO
            )
            usage, total = third.usage, len(model.tokenizer.encode_chat([{"role": "system", "content": "Be brief."}, *HELLO]))
            assert usage.input_tokens + usage.cache_read_input_tokens == total
        turns = [*chats[0], {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
        asked: dict[str, Any] = dict(model="demo", input=turns, temperature=0, max_output_tokens=4)
        live.openai.responses.create(**asked)
        head = model.tokenizer.render_chat(turns[:-1], add_generation_prompt=False)
        again = live.openai.responses.create(**asked)
        assert again.usage.input_tokens_details.cached_tokens == len(model.tokenizer.encode(head, add_special_tokens=False))
        text = live.http.get("/metrics").text
        assert live.cache is not None and f"zamba2_cached_tokens_total {live.cache.cached_tokens}\n" in text
        assert f"zamba2_cache_hits_total {live.cache.hits}\n" in text and f"zamba2_cache_misses_total {live.cache.misses}\n" in text
        assert live.cache.hits != live.cache.misses != live.cache.cached_tokens


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of two random adapters over the random model, by name."""
    pytest.importorskip("peft", reason="adapters are made with the extra [train]")
    import torch

    import zamba2.hf
    from zamba2.train.adapters import add_lora
    from zamba2.train.recipe import Lora
    from zamba2.weights.hub import RANDOM

    made = {}
    for seed, name in enumerate(("first", "second")):
        made[name] = tmp_path_factory.mktemp(name)
        base = zamba2.hf.Zamba2ForCausalLM.from_pretrained(str(RANDOM), dtype="float32")
        tuned, generator = add_lora(base, Lora(rank=4)), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weights_name, weights in tuned.named_parameters():
                if "lora_" in weights_name:
                    weights.copy_(0.1 * torch.randn(weights.shape, generator=generator))
        tuned.save_pretrained(made[name])
    return made


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_adapters(adapters: dict[str, Path], chats: list[list[dict[str, str]]]) -> None:
    """Adapters are models by their names: side by side, in every API, each reply is that of a model loaded with that adapter alone, the
    base's is as without adapters, and a second turn finds the state of its own adapter."""
    served = zamba2.load("random", threads=1)
    load_adapters(served.backend, adapters)
    alone = {"demo": zamba2.load("random", threads=1)}  # the server's name for the model itself
    alone |= {name: zamba2.load("random", threads=1, adapter=folder) for name, folder in adapters.items()}
    options: dict[str, Any] = dict(max_tokens=24, ignore_eos=True)
    own = {(name, i): one.chat(chats[i], **options).text for name, one in alone.items() for i in range(4)}
    said: dict[tuple[str, int], str] = {}
    assert len({own[name, 0] for name in alone}) == 3
    with Live(served, allow={"adapters": tuple(adapters)}) as live:

        def ask(name: str, i: int) -> None:
            body = dict(model=name, messages=chats[i], temperature=0, max_tokens=24, ignore_eos=True)
            said[name, i] = live.post(CHAT, **body).json()["choices"][0]["message"]["content"]

        threads = [threading.Thread(target=ask, args=place) for place in own]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        assert said == own
        assert [m.id for m in live.openai.models.list()] == ["demo", *adapters] == [m.id for m in live.anthropic.models.list()]
        assert live.openai.models.retrieve("second").id == "second"
        with pytest.raises(openai.NotFoundError, match="no model 'third' here; there is 'demo', 'first', 'second'"):
            live.openai.models.retrieve("third")
        for name, one in alone.items():
            wanted = one.generate("One day", max_tokens=12, ignore_eos=True).text
            body = dict(model=name, prompt="One day", temperature=0, max_tokens=12, ignore_eos=True)
            answer = live.post(TEXT, **body).json()
            assert (answer["model"], answer["choices"][0]["text"]) == (name, wanted)
            wanted = one.chat(HELLO, max_tokens=8).text
            assert live.openai.responses.create(model=name, input=HELLO, temperature=0, max_output_tokens=8).output_text == wanted
            reply = live.anthropic.messages.create(model=name, max_tokens=8, messages=HELLO, extra_body={"temperature": 0})
            assert (reply.model, reply.content[0].text) == (name, wanted)
    with Live(served, cached=True, allow={"adapters": tuple(adapters)}) as live:
        for name in ("demo", *adapters):
            asked: dict[str, Any] = dict(model=name, temperature=0, max_tokens=8)
            first = live.openai.chat.completions.create(messages=HELLO, **asked)
            more = [*HELLO, first.choices[0].message.model_dump(), *HELLO]
            second = live.openai.chat.completions.create(messages=more, **asked)
            assert first.usage.prompt_tokens_details.cached_tokens == 0 < second.usage.prompt_tokens_details.cached_tokens


def test_names_of_adapters(model: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is the model's, or given twice, or none at all, is one sentence and exit code 2, and so is another backend."""
    from zamba2.cli import run

    for values, sentence in (
        (["demo=a"], "--adapter demo=a: demo is the model without an adapter; give the adapter another name"),
        (["default=a"], "default is the model without an adapter"),
        (["a=b", "a=c"], "--adapter a=c: a was given before, for b; each adapter needs a name of its own"),
        (["a"], "--adapter is 'a'; NAME=FOLDER is needed"), (["=a"], "NAME=FOLDER is needed"), (["a="], "NAME=FOLDER is needed"),
        (["a=/none"], "/none"),
    ):  # fmt: skip
        assert run(["serve", "--port", "0", *(word for value in values for word in ("--adapter", value))]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("zamba2: ") and sentence in line
    assert run(["serve", "--port", "0", "--name", "mine", "--adapter", "mine=a"]) == 2
    assert "mine is the model without an adapter" in capsys.readouterr().err
    assert read_adapters(["demo=a", "b=c=d"], "mine") == {"demo": Path("a"), "b": Path("c=d")}
    with pytest.raises(Zamba2Error, match="adapters are for the native engine; leave --device and --dtype out"):
        load_adapters(object(), {"a": Path("a")})  # type: ignore[arg-type]


# ---- errors ----------------------------------------------------------------------------------------------------------

CHAT, TEXT, RESPONSE, MESSAGE = URLS[:4]
ASKED = {
    CHAT: {"messages": HELLO}, TEXT: {"prompt": "a"}, RESPONSE: {"input": "a"}, MESSAGE: {"messages": HELLO, "max_tokens": 4},
}  # fmt: skip
BAD: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "another model": (CHAT, {"model": "gpt-4"}, 404, "there is no model 'gpt-4' here; there is 'demo'"),
    "no messages": (CHAT, {"messages": []}, 400, "messages is"),
    "a message without content": (CHAT, {"messages": [{"role": "user"}]}, 400, r"messages\[0\]: content is missing"),
    "another role": (CHAT, {"messages": [{"role": "critic", "content": "x"}]}, 400, r"messages\[0\]\.role is 'critic'"),
    "an image": (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "is of type 'image_url'"),
    "half a pair": (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, 400, "half a surrogate pair"),
    "half a tool": (CHAT, {"tools": [{"type": "function"}]}, 400, r"tools\[0\]\.function is missing"),
    "a format": (RESPONSE, {"text": {"format": {"type": "xml"}}}, 400, r"text\.format\.type is 'xml'"),
    "an unknown field": (CHAT, {"temprature": 1}, 400, "temprature is no field that this server knows"),
    "temperature": (CHAT, {"temperature": "hot"}, 400, "temperature is 'hot'; input should be a valid number"),
    "below zero": (CHAT, {"temperature": -1}, 400, "temperature is -1"),
    "top_p": (CHAT, {"top_p": 2}, 400, "top_p is 2"),
    "n": (CHAT, {"n": 9}, 400, "n: 9 were asked for; at most 8"),
    "stops": (CHAT, {"stop": ["a"] * 17}, 400, "stop: 17 were asked for; at most 16"),
    "an empty stop": (CHAT, {"stop": ""}, 400, "stop"),
    "a bias": (CHAT, {"logit_bias": {"4096": 1}}, 400, "logit_bias: 4096 is no token"),
    "a bias of a word": (CHAT, {"logit_bias": {"cat": 1}}, 400, "logit_bias.cat is 'cat'"),
    "both limits": (CHAT, {"max_tokens": 1, "max_completion_tokens": 1}, 400, "were both given"),
    "too long": (CHAT, {"max_tokens": 4096}, 400, "the model's context has 4096 tokens"),
    "top_logprobs": (CHAT, {"top_logprobs": 1}, 400, "top_logprobs was given without logprobs"),
    "stream_options": (CHAT, {"stream_options": {"include_usage": True}}, 400, "without stream: true"),
    "many messages": (CHAT, {"messages": HELLO * 2049}, 400, "messages: 2049 were given; at most 2048"),
    "no prompt": (TEXT, {"prompt": []}, 400, "prompt: a text, a list of texts"),
    "an empty list": (TEXT, {"prompt": [[]]}, 400, "the prompt is empty"),
    "a token": (TEXT, {"prompt": [5, 4096]}, 400, "prompt: 4096 is no token; ids from 0 to 4095"),
    "many prompts": (TEXT, {"prompt": ["a"] * 73}, 400, "replies to all prompts: 73 were asked for; at most 72"),
    "a long prompt": (TEXT, {"prompt": [5] * 4096}, 400, "the model's context has 4096 tokens, but 4097"),
    "a suffix": (TEXT, {"suffix": "b"}, 400, "suffix: this server does not support this"),
    "best_of": (TEXT, {"best_of": 2}, 400, "best_of is 2"),
    "a stored response": (RESPONSE, {"previous_response_id": "resp_1"}, 400, "keeps no responses"),
    "a tool's output": (RESPONSE, {"input": [{"type": "function_call_output", "output": "x"}]}, 400, r"input\[0\]"),
    "no limit": (MESSAGE, {"max_tokens": None}, 400, "max_tokens is None"),
    "thinking": (MESSAGE, {"thinking": {"type": "enabled", "budget_tokens": 9}}, 400, "does not reason apart"),
    "an answer alone": (MESSAGE, {"messages": [{"role": "assistant", "content": "x"}]}, 400, "no message before the beginning"),
    "many messages of the newer API": (RESPONSE, {"input": HELLO * 2049}, 400, "input: 2049 were given; at most 2048"),
    "many messages of Anthropic's": (MESSAGE, {"messages": HELLO * 2049}, 400, "messages: 2049 were given; at most 2048"),
    "stops of Anthropic's": (MESSAGE, {"stop_sequences": ["a"] * 17}, 400, "stop: 17 were asked for; at most 16"),
    "a bias of a text": (TEXT, {"logit_bias": {"4096": 1}}, 400, "logit_bias: 4096 is no token"),
    "another model of Anthropic's": (MESSAGE, {"model": "claude"}, 404, "there is no model 'claude'"),
}


def check_error(response: httpx.Response, status: int, sentence: str, path: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    if path.startswith("/v1/messages"):
        assert set(body) == {"type", "error"} and body["type"] == "error" and {"type", "message"} <= set(body["error"])
    else:
        assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert re.search(sentence, body["error"]["message"]) and "\n" not in body["error"]["message"]
    return body["error"]


@pytest.mark.parametrize(("path", "change", "status", "sentence"), BAD.values(), ids=BAD)
def test_bad_requests(live: Live, path: str, change: dict[str, Any], status: int, sentence: str) -> None:
    """What is wrong with a request is one sentence that names it, in the layout of its API."""
    response = live.http.post(path, content=json.dumps(ASKED[path] | change), headers=JSON)
    check_error(response, status, sentence, path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"5", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}"])
@pytest.mark.parametrize("path", URLS)
def test_bodies_that_are_no_objects(live: Live, path: str, content: bytes) -> None:
    """A body that is no JSON object is 400, in the layout of its API."""
    check_error(live.http.post(path, content=content, headers=JSON), 400, "JSON|is missing", path)


@pytest.mark.parametrize(
    ("path", "change", "sentence"),
    [
        (CHAT, {"messages": [1] * 5000}, r"^messages\[0\] is 1; an object is needed\.$"),
        (MESSAGE, {"messages": [1] * 5000}, r"^messages\[0\] is 1; an object is needed\.$"),
        (RESPONSE, {"input": [1] * 5000}, r"^input\[0\] is 1; an object is needed\.$"),
        (CHAT, {"tools": [1] * 5000}, r"^tools\[0\] is 1; an object is needed\.$"),
        ("/detokenize", {"tokens": [""] * 5000}, r"^tokens\[0\] is ''"),
        (CHAT, {str(i): 1 for i in range(5000)}, r"^it holds 5000 mistakes, too many to name"),
        (CHAT, {"messages": [{**HELLO[0], **{str(i): 1 for i in range(5000)}}]}, r"^messages\[0\]: it holds 5000 mistakes, too many"),
        (CHAT, {"logit_bias": {str(i): "" for i in range(5000)}}, r"^it holds 5000 mistakes, too many to name"),
    ],
)  # fmt: skip
def test_many_mistakes(live: Live, monkeypatch: pytest.MonkeyPatch, path: str, change: dict[str, Any], sentence: str) -> None:
    """However many mistakes a body holds, one is told apart: each would take time in which no stream goes on."""
    seen: list[int] = []
    monkeypatch.setattr("zamba2.serve.app.validation_problem", lambda errors: seen.append(len(errors)) or validation_problem(errors))
    check_error(live.http.post(path, json={**ASKED.get(path, {}), **change}), 400, sentence, path)
    assert seen == [1]


def test_the_field_that_is_too_long(model: LanguageModel) -> None:
    """What does not fit the context is said of the field that holds it, whatever the server's own limit of a reply is."""
    with Live(model, allow={"max_tokens": 16}) as live:
        for path in (CHAT, TEXT):
            error = check_error(live.post(path, **ASKED[path], max_tokens=5000), 400, "the model's context has 4096 tokens", path)
            assert (error["param"], error["code"]) == ({CHAT: "messages", TEXT: "prompt"}[path], "context_length_exceeded")


def test_errors_of_the_clients(live: Live) -> None:
    """The clients raise their own errors, with the sentence and the code."""
    with pytest.raises(openai.BadRequestError, match="the model's context has 4096 tokens") as error:
        live.openai.chat.completions.create(model="demo", messages=HELLO, max_tokens=5000)
    assert (error.value.code, error.value.type, error.value.param) == ("context_length_exceeded", "invalid_request_error", "messages")
    with pytest.raises(anthropic.NotFoundError, match="there is no model"):
        live.anthropic.messages.create(model="claude", max_tokens=5, messages=HELLO)


def test_places_that_are_not(live: Live) -> None:
    """Unknown paths are 404 and wrong methods 405, in the layout of OpenAI's errors."""
    check_error(live.http.get("/v1/embeddings"), 404, "there is nothing at /v1/embeddings", "")
    response = live.http.get(CHAT)
    check_error(response, 405, "does not take GET; use POST", "")
    assert response.headers["allow"] == "POST"
    check_error(live.http.get("/v1/messages"), 405, "use POST", MESSAGE)


def test_bodies_too_large(model: LanguageModel) -> None:
    """A body over the limit is 413, whether or not it says its length, and one at the limit is taken."""
    with Live(model, allow={"most_body_bytes": 5000}) as live:
        body = json.dumps({"prompt": "x"}).encode()
        assert live.http.post("/tokenize", content=body.ljust(5000), headers=JSON).status_code == 200
        check_error(live.http.post("/tokenize", content=body.ljust(5001), headers=JSON), 413, "more than the 5000 bytes", "")
        chunks = (b" " * 1000 for _ in range(1000))
        check_error(live.http.post(MESSAGE, content=chunks, headers=JSON), 413, "more than the 5000 bytes", MESSAGE)


def test_keys(model: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    """With keys every place but the page and the health needs one of them; the log has counts, and neither keys nor prompts."""
    with Live(model, allow={"api_keys": ("first", "second"), "log": True}) as live:
        response = live.post(CHAT, messages=HELLO)
        check_error(response, 401, "the API key is missing", "")
        assert response.headers["www-authenticate"] == "Bearer"
        for key in ("third", "firs", "first1", "ä"):
            headers = {"Authorization": b"Bearer " + key.encode()}
            check_error(live.http.get("/v1/models", headers=headers), 401, "is not one of this server's", "")
        assert live.http.get("/v1/models", headers={"Authorization": "Bearer second", "x-api-key": "none"}).status_code == 200
        with pytest.raises(anthropic.AuthenticationError):
            live.anthropic.messages.create(model="demo", max_tokens=5, messages=HELLO)
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key="second") as client:
            assert client.chat.completions.create(model="demo", messages=HELLO, max_tokens=2).usage.completion_tokens
        with anthropic.Anthropic(base_url=live.url, api_key="first") as client:
            assert client.messages.create(model="demo", messages=HELLO, max_tokens=2).usage.output_tokens
        assert live.http.get("/health").status_code == 200
        assert all(live.http.get(path).status_code == 401 for path in ("/metrics", "/openapi.json"))
    lines = capsys.readouterr().err
    assert re.search(r"^POST /v1/chat/completions 200 \d+ ms, tokens: \d+ prompt, \d completion, 0 cached$", lines, re.MULTILINE)
    assert not re.search("river|second|third", lines)


def test_prompts_in_the_log(model: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts are logged where that is asked for, on the request's own line; a path cannot write lines of its own."""
    with Live(model, allow={"log": True, "log_prompts": True}) as live:
        live.post(TEXT, prompt="One\nday", max_tokens=1)
        live.http.get("/a%0Ab%1b[31m")
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith('"One\\nday"') and second.startswith("GET /a?b?[31m 404")


def test_other_names_for_this_machine(model: LanguageModel) -> None:
    """Where host names are given, a request under another one is refused: a web page's name may resolve to this machine."""
    with Live(model, allow={"hosts": ("127.0.0.1", "[::1]", "localhost")}) as live:
        assert live.http.get("/health").status_code == 200
        assert all(live.http.get("/health", headers={"Host": name}).status_code == 200 for name in ("[::1]:80", "LocalHost:80"))
        check_error(live.http.get("/health", headers={"Host": "evil.example:8000"}), 403, "the name 'evil.example'", "")


def test_other_origins(model: LanguageModel) -> None:
    """Web pages of other origins are answered where theirs is named, and are otherwise not told that they may read the answer."""
    asks = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    with Live(model, allow={"origins": ("https://page.example",), "api_keys": ("k",)}) as live:
        response = live.http.options(CHAT, headers=asks)
        assert response.status_code == 200 and response.headers["access-control-allow-origin"] == "https://page.example"
        assert live.http.options(CHAT, headers=asks | {"Origin": "https://other.example"}).status_code == 400
    with Live(model) as live:
        assert live.http.options(CHAT, headers=asks).status_code == 405
        assert "access-control-allow-origin" not in live.http.get("/health", headers=asks).headers


# ---- load, time and departures ---------------------------------------------------------------------------------------


def test_a_full_queue(model: LanguageModel) -> None:
    """Where the queue is full a request is 429 with seconds to wait, and of several replies none runs."""
    with Live(model, most_running=1, most_waiting=2) as live, live.http.stream("POST", TEXT, json=LONG | {"stream": True}) as busy:
        next(reading := busy.iter_bytes())  # whose end would be the stream's
        with live.http.stream("POST", TEXT, json=LONG | {"stream": True}) as waiting:
            assert waiting.status_code == 200
            response = live.post(CHAT, messages=HELLO, n=2)
            check_error(response, 429, "requests are waiting", "")
            assert int(response.headers["retry-after"]) >= 1
            with (
                live.http.stream("POST", TEXT, json=LONG | {"stream": True}),  # the place that the two did not get
                pytest.raises(anthropic.RateLimitError),
                anthropic.Anthropic(base_url=live.url, api_key="k", max_retries=0) as client,
            ):
                client.messages.create(model="demo", max_tokens=4, messages=HELLO)
        reading.close()
        waiting.close()
        assert live.is_idle()
    with Live(model, most_running=1, most_waiting=0) as live:
        assert live.post(MESSAGE, **ASKED[MESSAGE]).status_code == 200  # nobody has to wait
        check_error(live.post(CHAT, messages=HELLO, n=2), 400, "at most 1 are possible", CHAT)
        with live.http.stream("POST", TEXT, json=LONG | {"stream": True}) as busy:
            next(reading := busy.iter_bytes())
            error = check_error(live.post(MESSAGE, **ASKED[MESSAGE]), 429, "0 requests are waiting", MESSAGE)
            assert error["type"] == "rate_limit_error"
            reading.close()


def test_too_many_log_probabilities(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be an answer of tens of megabytes is refused with the field named."""
    monkeypatch.setattr("zamba2.serve.app.MOST_SCORES", 20)
    asked: dict[str, Any] = {"prompt": ["one two three four five six"] * 2, "max_tokens": 0, "echo": True}
    for more in ({"logprobs": 5}, {"logprobs": 2}, {"logprobs": 1, "n": 2}):  # of one prompt, of both, of both twice
        check_error(live.post(TEXT, **asked, **more), 400, "log", TEXT)
    assert live.post(TEXT, **asked, logprobs=1).status_code == 200


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_clients_that_leave(live: Live, path: str) -> None:
    """A client that vanishes in the middle of a stream, or while it waits for the whole, frees its places at once."""
    body = {"ignore_eos": True, "n": 3, "max_tokens": 3500} | ASKED[path]
    with live.http.stream("POST", path, json=body | {"stream": True}) as response:
        next(reading := response.iter_bytes())
        assert sum(live.scheduler.counts().values()) == 3
        reading.close()
    assert live.is_idle(2)
    with pytest.raises(httpx.ReadTimeout):
        live.http.post(path, json=body, timeout=0.3)
    assert live.is_idle(2)
    end, line = time.monotonic() + 5, f'zamba2_http_requests_total{{endpoint="{path}",method="POST",status="499"}} '
    while line not in live.http.get("/metrics").text and time.monotonic() < end:
        time.sleep(0.01)
    assert line in live.http.get("/metrics").text


def test_streams_side_by_side(live: Live, model: LanguageModel, chats: list[list[dict[str, str]]]) -> None:
    """More streams at once than the batch has places are each the model's own words."""
    own, said = [model.chat(messages, max_tokens=24).text for messages in chats], [""] * 12

    def ask(i: int) -> None:
        for _, data in events(live.post(CHAT, messages=chats[i // 2], temperature=0, max_tokens=24, stream=True)):
            said[i] += "" if data == "[DONE]" else data["choices"][0]["delta"].get("content", "")

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(said))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert said == [text for text in own for _ in range(2)] and live.is_idle()


def test_a_model_that_failed(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model fails, requests on their way and later ones are 503 with the reason, and so is the health."""
    with Live(model) as live:
        monkeypatch.setattr(live.scheduler, "_round", lambda: (_ for _ in ()).throw(MemoryError("no room")))
        for path in ASKED:
            check_error(live.post(path, **ASKED[path]), 503, "the model has failed.*no room", path)
        check_error(live.http.get("/health"), 503, "no room", "")


def test_time_is_up(model: LanguageModel) -> None:
    """A request that takes too long is 504; a stream ends with the error as its last event, which the clients raise."""
    with Live(model, allow={"seconds": 0.3}) as live:
        check_error(live.post(TEXT, **LONG), 504, "took longer than", "")
        stream = live.openai.completions.create(model="demo", stream=True, prompt="a", max_tokens=3500, extra_body={"ignore_eos": True})
        with stream, pytest.raises(openai.APIError, match="took longer than"):
            list(stream)
        assert live.is_idle()


def test_a_model_that_hangs(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a call of the model's takes longer than a request may, the client is told so all the same."""
    monkeypatch.setattr("zamba2.serve.app.LATE", 0.1)
    go = threading.Event()
    with Live(model, allow={"seconds": 0.1}) as live:
        monkeypatch.setattr(live.scheduler, "_round", lambda: go.wait(30))
        check_error(live.post(TEXT, prompt="a"), 504, "took longer than the 0 s that it may", TEXT)
        go.set()


def test_streams_show_that_they_are_alive(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing is said yet a stream sends a comment now and then, to Anthropic's clients an event that they know."""
    monkeypatch.setattr("zamba2.serve.app.IDLE", 0.001)
    long = [{"role": "user", "content": "word " * 600}]
    assert "\n: waiting\n" in live.post(CHAT, messages=long, max_tokens=1, stream=True).text
    assert live.post(MESSAGE, messages=long, max_tokens=1, stream=True).text.startswith('event: ping\ndata: {"type":"ping"}\n\n')


def test_closing(model: LanguageModel) -> None:
    """A server that closes says so to the streams it drops, and takes no more requests."""
    with Live(model) as live:
        seen: list[tuple[str | None, Any]] = []
        thread = threading.Thread(target=lambda: seen.extend(events(live.post(TEXT, **LONG, stream=True))))
        thread.start()
        while not live.scheduler.counts()["decoding"]:
            time.sleep(0.005)
        assert live.scheduler.close(0.0) == 1
        thread.join(timeout=30)
        name, data = seen[-1]
        assert name is None and data["error"]["message"] == "the server was shut down before the reply was finished."
        for path in ASKED:
            check_error(live.post(path, **ASKED[path]), 503, "shutting down", path)


def test_what_errors_are_to_clients() -> None:
    """A schema that cannot be obeyed is the client's mistake; what has no time or room may be asked again; the rest is the server's."""
    for error, status in ((Unmet("too complex."), 400), (TimeIsUp("too late."), 504), (Busy(1, 3), 429), (Zamba2Error("gone."), 503)):
        found = problem_of(error)
        assert (str(found), found.status) == (str(error), status) and problem_of(found) is found
    assert problem_of(Busy(1, 3)).retry_after == 3


def test_what_a_failed_stream_says(model: LanguageModel) -> None:
    """A stream that fails ends with the error as its own API has it, and calls nothing complete that is not."""
    texts, problem = TokenTexts(model.tokenizer), problem_of(TimeIsUp("too late."))
    reply = Reply(0, Ask(model.request("a", max_tokens=9), Prompt(), "a"))
    said = reply.add(Said(0, "Hel", 300, (), None, None, 0.0))
    error = {"message": "too late.", "type": "timeout_error", "param": None, "code": "timeout"}
    for stream in (ChatStream("m", [reply], texts), CompletionStream("m", [reply], texts)):
        assert list(stream.failed(problem)) == [(None, {"error": error})] and stream.idle() == b": waiting\n\n"
    message = MessageStream("m", [reply], texts)
    (name, data), *more = message.failed(problem)
    assert (name, data["type"], more) == ("error", "error", [])
    assert {kind: data["error"][kind] for kind in ("type", "message")} == {"type": "timeout_error", "message": "too late."}
    response = ResponseStream("m", [reply], texts, body=ResponseBody(input=HELLO))
    list(response.begin()), list(response.said(said))
    ((name, data),) = response.failed(problem)
    found = data["response"]
    assert (name, data["type"], found["status"], found["error"]["message"]) == ("response.failed", "response.failed", "failed", "too late.")
    assert found["usage"] is None and [(item["status"], item["content"][0]["text"]) for item in found["output"]] == [("incomplete", "Hel")]


# ---- any bytes -------------------------------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers(-5, 5) | st.floats(width=32) | st.sampled_from(["", "a", "user", "\ud800", "x" * 50])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type", "text"]), inner),
    max_leaves=6,
)
FIELDS = (
    "messages", "prompt", "input", "model", "max_tokens", "n", "stop", "stream", "temperature", "top_p", "logit_bias", "logprobs", "echo",
    "system", "tokens", "stream_options", "seed", "tools", "tool_choice", "text", "other", "best_of", "metadata", "top_logprobs",
    "min_p", "suffix", "response_format", "parallel_tool_calls",
)  # fmt: skip


@settings(max_examples=120)
@example(path=TEXT, base=True, change={"seed": 1, "temperature": float("inf")})
@example(path=CHAT, base=True, change={"messages": [{"role": "user", "content": ""}], "max_tokens": 2})
@example(path=CHAT, base=True, change={"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#"}}}})
@given(path=st.sampled_from(URLS), base=st.booleans(), change=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
def test_malformed_bodies(live: Live, path: str, base: bool, change: dict[str, Any]) -> None:
    """Whatever the fields of a body hold, the answer is the model's or an error of the client's, and the server goes on."""
    body = {**(ASKED.get(path, {}) if base else {}), "max_tokens": 2, **change}
    response = live.http.post(path, content=json.dumps(body), headers=JSON)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        check_error(response, response.status_code, ".", path)


# ---- what is shown ---------------------------------------------------------------------------------------------------


def test_metrics_and_health(live: Live) -> None:
    """Metrics are in Prometheus' format, and their sums are those of what was answered; the server says that it is well."""

    def seconds(name: str) -> float:
        return float(re.findall(rf"{name}_sum (.*)", live.http.get("/metrics").text)[0])

    before, begun = seconds("zamba2_time_per_token_seconds"), time.monotonic()
    live.post(CHAT, messages=HELLO, max_tokens=50, ignore_eos=True)
    assert 0 < seconds("zamba2_time_per_token_seconds") - before < time.monotonic() - begun
    assert live.http.get("/health").json()["status"] == "ok"
    assert [(found.status_code, found.content) for found in (live.http.head("/health"), live.http.head("/"))] == [(200, b"")] * 2
    response = live.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    values: dict[str, float] = {}
    for line in response.text.splitlines():
        if not line.startswith(("# HELP zamba2_", "# TYPE zamba2_")):
            name, value = line.rsplit(" ", 1)
            assert re.fullmatch(r'[a-z0-9_]+(\{([a-z]+="[^"\n]*",?)+\})?', name)
            values[name] = float(value)
    assert values['zamba2_http_requests_total{endpoint="/v1/chat/completions",method="POST",status="200"}'] >= 1
    assert values["zamba2_generated_tokens_total"] == live.scheduler.generated_tokens
    buckets = [value for name, value in values.items() if name.startswith("zamba2_time_per_token_seconds_bucket")]
    assert buckets == sorted(buckets) and buckets[-1] == values["zamba2_time_per_token_seconds_count"] > 0


def test_openapi_document(live: Live) -> None:
    """The document names every API, its fields and its errors, and no layout that is not used."""
    found = live.http.get("/openapi.json").json()
    assert set(found["paths"]) >= {*URLS, "/v1/models", "/health", "/metrics"}
    assert "HTTPValidationError" not in json.dumps(found)
    assert {"messages", "logit_bias", "stream_options"} <= set(found["components"]["schemas"]["ChatBody"]["properties"])
    assert {"200", "400", "413", "429", "503"} <= set(found["paths"][CHAT]["post"]["responses"])


def test_page(live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page may load nothing from elsewhere; where it is not installed, that is a sentence."""
    monkeypatch.setattr("zamba2.serve.app.files", lambda package: tmp_path)
    check_error(live.http.get("/"), 404, "this installation has no page", "")
    (tmp_path / "page.html").write_text("<p>☃", encoding="utf-8")
    response = live.http.get("/")
    assert (response.status_code, response.text) == (200, "<p>☃") and response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]


def test_token_texts(model: LanguageModel) -> None:
    """The bytes of single tokens join to the bytes of the text."""
    texts = TokenTexts(model.tokenizer)
    for text in ("One day, wörld ☃!", "a\n\n  b"):
        ids = model.tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(texts(token)[1] for token in ids).decode().lstrip() == text.lstrip()
        assert texts(model.tokenizer.encode("☃", add_special_tokens=False)[-1])[0] == "\\x83"


def test_counts_and_probabilities_that_json_has(model: LanguageModel) -> None:
    """Tokens of a prompt and those cached of it count once however many replies it has; what has no chance at all is a number, too."""
    asks = [Ask(model.request([5] * size), Prompt(), "", number) for number, size in ((0, 4), (0, 4), (1, 9))]
    replies = [Reply(i, ask, tokens=10 + i, cached_tokens=3 - i) for i, ask in enumerate(asks)]
    assert token_counts(replies) == (13, 33, 4)
    texts, never = TokenTexts(model.tokenizer), TokenLogprob(300, float("-inf"), ((301, float("-inf")),))
    chat, lists = chat_logprob(texts, never), LegacyLogprobs(texts, asks[0]).of_reply([never])
    assert chat["logprob"] == chat["top_logprobs"][0]["logprob"] == lists["token_logprobs"][0] == -9999.0
    assert set(lists["top_logprobs"][0].values()) == {-9999.0} and len(lists["top_logprobs"][0]) == 2


# ---- the command -----------------------------------------------------------------------------------------------------


def test_addresses_and_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ports that are taken, addresses open to others without keys, and useless files of keys are one sentence each."""
    with bind("127.0.0.1", 0, protected=False) as taken, pytest.raises(Zamba2Error, match="choose another with --port"):
        bind("127.0.0.1", taken.getsockname()[1], protected=False)
    with pytest.raises(Zamba2Error, match="can be reached by other machines; give API keys"):
        bind("0.0.0.0", 0, protected=False)
    with pytest.raises(Zamba2Error, match="is no address"):
        bind("no such host", 0, protected=False)
    bind("localhost", 0, protected=False).close()
    monkeypatch.setenv("ZAMBA2_API_KEYS", "a, b")
    file = tmp_path / "keys"
    file.write_text("# ours\n\nc\na\n")
    assert read_keys(file) == ("a", "b", "c") and read_keys(None) == ("a", "b")
    for content, sentence in (("# none\n", "has no API key"), ("a b\n", "holds a space")):
        file.write_text(content)
        with pytest.raises(Zamba2Error, match=sentence):
            read_keys(file)
    with pytest.raises(Zamba2Error, match="cannot be read"):
        read_keys(tmp_path / "none")


def test_without_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without FastAPI or uvicorn the command names what to install."""
    monkeypatch.setattr("zamba2.commands.serve.find_spec", lambda name: None)
    with pytest.raises(Zamba2Error, match=r"needs fastapi and uvicorn; install with `pip install 'zamba2\[serve\]'`"):
        main("demo", {})


def test_options_reach_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are in mebibytes; the names by which a server of this machine alone may be called matter where there are no keys; what the
    cache holds is on the disk when the command ends, in a folder that is its user's alone; one that would hold nothing is refused."""
    made: list[tuple[Any, ...]] = []
    flushed: list[StateCache] = []
    monkeypatch.setattr("zamba2.serve.app.create_app", lambda *parts: made.append(parts))
    monkeypatch.setattr(StateCache, "flush", lambda self: flushed.append(self))
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    where = {"threads": 1, "revision": None, "offline": True}
    options: dict[str, Any] = {"host": "localhost", "port": 0, "name": "me", "max_tokens": 7, "batch": 3, "queue": 4, "seconds": 9.0}
    options |= {"cache_mb": 2, "disk_mb": 3, "body_mb": 5, "cache_folder": tmp_path / "cache", "origins": ("http://a",)}
    for keys in ("", "secret"):
        monkeypatch.setenv("ZAMBA2_API_KEYS", keys)
        main("random", where, **options)
        _, scheduler, cache, found = made.pop()
        assert (scheduler.most_running, scheduler.most_waiting, flushed.pop()) == (3, 4, cache)
        assert (cache.most_bytes, cache.disk_bytes, cache.folder) == (2 << 20, 3 << 20, tmp_path / "cache")
        assert cache.model == scheduler.backend.fingerprint
        assert (found.model_name, found.max_tokens, found.seconds, found.most_body_bytes) == ("me", 7, 9.0, 5 << 20)
        assert (found.origins, found.api_keys, found.log) == (("http://a",), (keys,) if keys else (), True)
        assert ("localhost" in found.hosts, bool(found.hosts)) == (not keys, not keys)
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0
    with pytest.raises(Zamba2Error, match="--cache-folder"):
        main("random", where, **options | {"cache_mb": 0})


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(("signals", "grace"), [((signal.SIGTERM,), 0.2), ((signal.SIGINT, signal.SIGINT), 60.0)], ids=["once", "twice"])
def test_command_stops_on_a_signal(tmp_path: Path, signals: tuple[signal.Signals, ...], grace: float) -> None:
    """The command serves at the address it prints, and on a signal drops what is left in time, on a second one at once, says so to those
    who wait, to one whose body is on its way, too, and ends well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"from zamba2.commands.serve import main; main('demo', dict(threads=1, revision=None, offline=True), port={port}, grace={grace})"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=os.environ.copy()) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            assert line == f"zamba2: demo at http://127.0.0.1:{port}\n"
            url = f"http://127.0.0.1:{port}"
            with httpx.Client(base_url=url, timeout=60) as http, http.stream("POST", TEXT, json=LONG | {"stream": True}) as response:
                first = next(lines := response.iter_lines())
                assert json.loads(first.removeprefix("data: "))["object"] == "text_completion"
                with socket.create_connection(("127.0.0.1", port), timeout=30) as half:
                    if len(signals) > 1:
                        expect = "Expect: 100-continue\r\nContent-Length: 9"
                        half.sendall(f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\n{expect}\r\n\r\n{{".encode())
                        assert b" 100 " in half.recv(100)  # taken: what a server that stops has not taken is reset by the kernel
                    sent = time.monotonic()
                    for number in signals:
                        process.send_signal(number)
                        time.sleep(0.1)
                    last = [line for line in lines if line][-1]
                    assert len(signals) == 1 or b" 503 " in half.recv(100)
            assert "the server was shut down" in last and time.monotonic() - sent > 0.19
            rest = process.stderr.read()
            assert time.monotonic() - sent < 30
            assert process.wait(timeout=30) == 0
            assert rest.splitlines()[-1] == "zamba2: stopped; 1 requests were dropped." and "Traceback" not in rest
        finally:
            process.kill()
