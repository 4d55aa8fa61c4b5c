#!/usr/bin/env python3
"""The server under measurement: clients that stream over HTTP from a ``zamba2 serve`` process that is started here.

    python scripts/serve_load.py load --minutes 10 --clients 32         # many conversations at once: errors, stalls, memory
    python scripts/serve_load.py throughput --shape 2.7b --format q4    # eight clients beside one
    python scripts/serve_load.py second-turn --shape 2.7b --format q4   # what the cache saves, in memory and on disk
    python scripts/serve_load.py schemas --count 200                    # JSON of given schemas from random weights, and hostile ones

Each writes one JSON document to docs/measurements/serve_COMMAND.json (or --out), which is also the last line of standard output; progress
goes to standard error. --small takes seconds on the tiny random model and writes only where --out says. Needs the [serve] extra, httpx,
jsonschema for ``schemas``, Linux for what it reads of processes and files, and for the 2.7B shape 1.6 GB of disk and 4 GB of memory (12 GB
of each for ``second-turn``). Clients and server share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import numpy as np

from zamba2.commands.bench import config_of, synthetic
from zamba2.config import Config
from zamba2.errors import Zamba2Error
from zamba2.language.tokenizer import Tokenizer
from zamba2.runtime.processors import default_threads, machine
from zamba2.train.instructions import documents, tasks
from zamba2.weights.files import replacing
from zamba2.weights.hub import RANDOM, cache_folder
from zamba2.weights.packed import Packing

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "measurements"
TOKENIZER = ROOT.parent / "shared" / "data" / "tokenizer" / "mistral_v1_tokenizer.json"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TIMEOUT = httpx.Timeout(120, connect=30)  # a server that is alive sends something every ten seconds
STALL = 5.0  # seconds without an event, in a reply that has begun
FLAT = 5.0  # per cent that memory may grow in ten minutes, by the slope of the run's second half
MIB = 1 << 20
Json = dict[str, Any]
Message = dict[str, str]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- the server ------------------------------------------------------------------------------------------------------


class Served:
    """A ``zamba2 serve`` process on a free port. Raises Zamba2Error where it does not start, or ends otherwise than it was told to."""

    def __init__(self, model: str | Path, *options: str) -> None:
        self.command = [sys.executable, "-m", "zamba2", "serve", "--model", str(model), "--port", "0", "--quiet", *options]
        self.said: deque[str] = deque(maxlen=20)  # its last lines

    def __enter__(self) -> Served:
        say("$ zamba2 " + " ".join(self.command[3:]))
        self.process = subprocess.Popen(self.command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line.rstrip())
            if found := re.fullmatch(r"zamba2: .* at (http://\S+)", self.said[-1]):
                self.url = found[1]
                break
        else:
            self.process.wait()
            raise Zamba2Error(f"the server did not start: {' '.join(self.said) or 'it said nothing'}")
        self.listening = threading.Thread(target=self._listen, daemon=True)  # a full pipe would stop it
        self.listening.start()
        return self

    def _listen(self) -> None:
        assert self.process.stderr is not None
        self.said.extend(line.rstrip() for line in self.process.stderr)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self.process.stderr is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.listening.join(timeout=10)
        self.process.stderr.close()
        if kind is None and code != 0:
            raise Zamba2Error(f"the server ended with code {code}: {' '.join(self.said)}")

    def resident_bytes(self) -> int:
        """All pages in memory, those of mapped files included."""
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines())
        return int(fields["VmRSS"].split()[0]) * 1024

    def metrics(self) -> dict[str, float]:
        lines = httpx.get(f"{self.url}/metrics", timeout=60).raise_for_status().text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=TIMEOUT)


@contextmanager
def model_folder(shape: str, format: str, tokenizer: Path) -> Iterator[Path]:
    """The packed random weights that ``zamba2 bench`` measures, in a folder of links beside a real tokenizer: with the tiny one that comes
    with them most ids would have no text. Raises Zamba2Error."""
    path = synthetic(shape, config_of(shape), Packing.named(format))
    if not tokenizer.is_file():
        raise Zamba2Error(f"{tokenizer} does not exist; give the tokenizer.json of a Mistral v0.1 vocabulary with --tokenizer.")
    text = tokenizer.read_text(encoding="utf-8")
    for old, new in (("<s>", "<|im_start|>"), ("</s>", "<|im_end|>")):  # ids 1 and 2, which instruct checkpoints rename
        text = text.replace(json.dumps(old), json.dumps(new))
    with tempfile.TemporaryDirectory(prefix="zamba2-served-") as name:
        folder = Path(name)
        for file in ("config.json", "model.safetensors"):
            (folder / file).symlink_to(path / file)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        shutil.copy(RANDOM / "tokenizer_config.json", folder)  # ChatML, with the same two names
        yield folder


@contextmanager
def measured_model(arguments: argparse.Namespace) -> Iterator[Path]:
    """What is served: the shape that was asked for, or the tiny one."""
    if arguments.small:
        yield RANDOM
    else:
        with model_folder(arguments.shape, arguments.format, arguments.tokenizer) as folder:
            yield folder


# ---- a client --------------------------------------------------------------------------------------------------------


@dataclass
class Heard:
    """A streamed reply as its client saw it; times by time.perf_counter.

    times: of the events that bring text or a log-probability. finish: its reason. error: what went wrong, in words.
    """

    sent: float
    times: list[float] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    error: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    @property
    def first(self) -> float:
        """Seconds from the request to the first token."""
        if not self.times:
            raise Zamba2Error(f"a reply brought no text ({self.error or self.finish}).")
        return self.times[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in pairwise(self.times)]

    def take(self, line: str) -> None:
        """One line of the stream."""
        if not line.startswith("data: ") or line == "data: [DONE]":
            return
        data = json.loads(line.removeprefix("data: "))
        if "error" in data:
            self.error = f"in the stream: {data['error']['message']}"
            return
        for choice in data["choices"]:
            text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            if text or choice.get("logprobs"):
                self.times.append(time.perf_counter())
                self.text += text
            self.finish = choice["finish_reason"] or self.finish
        if usage := data.get("usage"):
            self.prompt_tokens, self.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            self.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)


async def ask(http: httpx.AsyncClient, path: str, **body: Any) -> Heard:
    """Stream one reply. Errors are in what is returned."""
    heard = Heard(time.perf_counter())
    try:
        async with http.stream("POST", path, json=body | {"stream": True, "stream_options": {"include_usage": True}}) as response:
            if response.status_code != 200:
                heard.error = f"{response.status_code}: {(await response.aread()).decode()[:300]}"
                return heard
            async for line in response.aiter_lines():
                heard.take(line)
    except httpx.HTTPError as error:
        heard.error = f"{type(error).__name__}: {error}"
    if heard.error is None and (heard.finish is None or not heard.completion_tokens):
        heard.error = "the stream ended before its reply did"
    return heard


async def answered(http: httpx.AsyncClient, path: str, **body: Any) -> Heard:
    """``ask``, where nothing may go wrong. Raises Zamba2Error."""
    heard = await ask(http, path, **body)
    if heard.error is not None:
        raise Zamba2Error(f"a request failed: {heard.error}")
    return heard


# ---- numbers ---------------------------------------------------------------------------------------------------------


def spread(seconds: Sequence[float]) -> Json:
    """Count, p50, p99 and the largest, in milliseconds; nearest rank."""
    ordered = sorted(seconds)
    if not ordered:
        return {"count": 0}

    def rank(share: float) -> float:
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return {"count": len(ordered), "p50_ms": rank(0.5), "p99_ms": rank(0.99), "max_ms": 1000 * ordered[-1]}


def latencies(replies: Sequence[Heard]) -> Json:
    return {
        "time_to_first_token": spread([heard.first for heard in replies if heard.times]),
        "between_tokens": spread([gap for heard in replies for gap in heard.gaps]),
    }


def goal(found: float, wanted: float, *, above: bool = False) -> Json:
    """Whether a number is at most, or at least, what is wanted."""
    return {"found": found, "at least" if above else "at most": wanted, "met": found >= wanted if above else found <= wanted}


def about(arguments: argparse.Namespace) -> Json:
    """What a measurement belongs to."""
    settings = {name: value for name, value in vars(arguments).items() if name not in ("run", "command", "out", "tokenizer")}
    packages = ("zamba2", "fastapi", "httpx", "llguidance", "uvicorn")
    return {
        "machine": machine(), "threads": default_threads(), "settings": settings,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }  # fmt: skip


# ---- load ------------------------------------------------------------------------------------------------------------


async def talk(number: int, served: Served, end: float, seed: int, heard: list[tuple[int, Heard]]) -> None:
    """One user: conversations of two to four turns until the time is up. heard: (turn, reply)."""
    chance, source = random.Random(f"{seed} {number}"), tasks(f"load {seed} {number}", split="test")
    async with served.client() as http:
        while time.perf_counter() < end:
            history: list[Message] = []
            for turn in range(chance.randint(2, 4)):
                messages = next(source).messages  # ..., the user's, the right answer
                if not history and messages[0]["role"] == "system":
                    history.append(messages[0])
                history.append(messages[-2])
                options = {"max_tokens": chance.randint(16, 96), "temperature": 0.7, "seed": chance.getrandbits(31)}
                reply = await ask(http, CHAT, messages=history, **options)
                heard.append((turn, reply))
                if reply.error is not None:
                    await asyncio.sleep(0.5)
                    break
                if not reply.text or time.perf_counter() > end:
                    break
                history.append({"role": "assistant", "content": reply.text})


async def watch(served: Served, begun: float, end: float, heard: list[tuple[int, Heard]], memory: list[tuple[float, int]]) -> None:
    """The server's memory each second, as (seconds, bytes)."""
    for second in itertools.count():
        await asyncio.sleep(max(0.0, begun + second - time.perf_counter()))
        if time.perf_counter() > end:
            return
        memory.append((time.perf_counter() - begun, served.resident_bytes()))
        if second % 10 == 0:
            errors = sum(reply.error is not None for _, reply in heard)
            say(f"{second:5} s: {len(heard)} replies, {errors} errors, {memory[-1][1] / MIB:.0f} MiB")


def growth(memory: Sequence[tuple[float, int]]) -> float:
    """Per cent of their mean that the samples of a run's second half grow in ten minutes, by the least squares' line through them."""
    half = memory[len(memory) // 2 :]
    if len(half) < 2:
        raise Zamba2Error(f"the run gave {len(memory)} samples of memory; a longer one is needed.")
    times, sizes = np.array(half, np.float64).T
    return float(600 * np.polyfit(times, sizes, 1)[0] / sizes.mean() * 100)


async def loaded(served: Served, arguments: argparse.Namespace) -> Json:
    seconds = 60 * arguments.minutes
    async with served.client() as http:
        await answered(http, TEXT, prompt="Once", max_tokens=8)
    heard: list[tuple[int, Heard]] = []
    memory: list[tuple[float, int]] = []
    caches = [served.metrics().get("zamba2_cache_bytes", 0.0)]
    begun = time.perf_counter()
    end = begun + seconds

    async def middle() -> None:
        await asyncio.sleep(seconds / 2)
        caches.append((await asyncio.to_thread(served.metrics)).get("zamba2_cache_bytes", 0.0))

    users = [talk(number, served, end, arguments.seed, heard) for number in range(arguments.clients)]
    await asyncio.gather(*users, watch(served, begun, end, heard, memory), middle())
    wall = time.perf_counter() - begun
    caches.append(served.metrics().get("zamba2_cache_bytes", 0.0))
    good = [(turn, reply) for turn, reply in heard if reply.error is None]
    replies = [reply for _, reply in good]
    if not replies:
        raise Zamba2Error(f"no request was answered: {heard[0][1].error if heard else 'none was sent'}")
    later = [reply for turn, reply in good if turn]
    errors = Counter(str(reply.error) for _, reply in heard if reply.error is not None)
    stalls = sum(gap > STALL for _, reply in heard for gap in reply.gaps)
    thirds = [[r for r in replies if i <= 3 * (r.sent - begun) / seconds < i + 1] for i in range(3)]
    places = (0, len(memory) // 2, -1)
    slope = growth(memory)
    return {
        "seconds": wall, "replies": len(replies), "replies_per_second": len(replies) / wall,
        "tokens_per_second": sum(reply.completion_tokens for reply in replies) / wall,
        "prompt_tokens": sum(reply.prompt_tokens for reply in replies),
        "completion_tokens": sum(reply.completion_tokens for reply in replies),
        **latencies(replies),
        "thirds": {name: latencies(own) for name, own in zip(("start", "middle", "end"), thirds, strict=True)},
        "cached_share": sum(r.cached_tokens for r in replies) / sum(r.prompt_tokens for r in replies),
        "cached_share_of_later_turns": sum(r.cached_tokens for r in later) / max(1, sum(r.prompt_tokens for r in later)),
        "finish_reasons": dict(Counter(str(reply.finish) for reply in replies)),
        "errors": dict(errors.most_common(20)), "stalls": stalls, "stall_seconds": STALL,
        "resident_mib": {name: memory[i][1] / MIB for name, i in zip(("start", "middle", "end"), places, strict=True)},
        "resident_mib_every_10_seconds": [round(size / MIB, 1) for _, size in memory[::10]],
        "cache_mib": {name: size / MIB for name, size in zip(("start", "middle", "end"), caches, strict=True)},
        "goals": {
            "errors": goal(sum(errors.values()), 0), "stalls": goal(stalls, 0),
            "memory growth of the second half, per cent in 10 minutes": goal(slope, FLAT),
        },
    }  # fmt: skip


def load(arguments: argparse.Namespace) -> Json:
    """Many users at once."""
    if arguments.small:
        arguments.minutes, arguments.clients = 0.1, 4
    options = ("--batch", str(arguments.batch), "--cache-mb", str(arguments.cache_mb), "--queue", str(max(64, arguments.clients)))
    with Served(arguments.model, *options) as served:
        return asyncio.run(loaded(served, arguments))


# ---- throughput ------------------------------------------------------------------------------------------------------


def decode_rate(replies: Sequence[Heard]) -> float:
    """Tokens per second of all clients together, between the last one's first token and the first one's last. Raises Zamba2Error where
    there is no such time. Tokens without text of their own come with no event: a reply's events stand for all of its tokens."""
    begin, end = max(reply.times[0] for reply in replies), min(reply.times[-1] for reply in replies)
    if end <= begin:
        raise Zamba2Error("a reply ended before the last one began, so that all never decoded together; longer replies are needed.")
    tokens = [sum(begin < t <= end for t in reply.times) * reply.completion_tokens / len(reply.times) for reply in replies]
    return sum(tokens) / (end - begin)


async def wave(clients: Sequence[httpx.AsyncClient], bodies: Sequence[Json]) -> tuple[Json, list[Heard]]:
    """One request of each client, all at once, and what they gave."""
    begun = time.perf_counter()
    replies = await asyncio.gather(*(answered(http, TEXT, **body) for http, body in zip(clients, bodies, strict=True)))
    seconds = time.perf_counter() - begun
    for reply, body in zip(replies, bodies, strict=True):
        if (reply.prompt_tokens, reply.completion_tokens) != (len(body["prompt"]), body["max_tokens"]):
            asked = f"{len(body['prompt'])} tokens in and {body['max_tokens']} out"
            raise Zamba2Error(f"{asked} were asked for, and {reply.prompt_tokens} and {reply.completion_tokens} counted.")
    tokens = sum(reply.completion_tokens for reply in replies)
    return {"decode": decode_rate(replies), "whole": tokens / seconds}, replies


async def measured_throughput(served: Served, arguments: argparse.Namespace, vocab_size: int) -> Json:
    chance = random.Random(arguments.seed)
    prompts, replies = ((16, 48), (24, 32)) if arguments.small else ((128, 384), (64, 128))
    clients = [served.client() for _ in range(arguments.clients)]
    rates: dict[str, list[Json]] = {"one": [], "all": []}
    heard: dict[str, list[Heard]] = {"one": [], "all": []}

    def body() -> Json:
        ids = [chance.randrange(3, vocab_size) for _ in range(chance.randint(*prompts))]
        return {"prompt": ids, "max_tokens": chance.randint(*replies), "ignore_eos": True, "seed": chance.getrandbits(31)}

    try:
        await wave(clients, [body() | {"max_tokens": replies[0]} for _ in clients])  # a warm-up
        for number in range(arguments.rounds):
            bodies = [body() for _ in clients]
            for name, waves in (("one", [bodies[:1], bodies[1:2]]), ("all", [bodies])):
                for asked in waves:
                    rate, said = await wave(clients[: len(asked)], asked)
                    rates[name].append(rate)
                    heard[name] += said
                    say(f"round {number + 1} of {arguments.rounds}, {len(asked)} clients: {rate['decode']:.1f} tokens/s decoding")
    finally:
        for http in clients:
            await http.aclose()
    found: Json = {
        name: {
            "decode_tokens_per_second": statistics.median(rate["decode"] for rate in rates[name]),
            "whole_tokens_per_second": statistics.median(rate["whole"] for rate in rates[name]),
            "prompt_tokens": sum(reply.prompt_tokens for reply in heard[name]),
            "completion_tokens": sum(reply.completion_tokens for reply in heard[name]),
            **latencies(heard[name]), "runs": rates[name],
        }
        for name in rates
    }  # fmt: skip
    ratios = {kind: found["all"][f"{kind}_tokens_per_second"] / found["one"][f"{kind}_tokens_per_second"] for kind in ("decode", "whole")}
    longest = max(reply.prompt_tokens + reply.completion_tokens for own in heard.values() for reply in own)
    return found | {
        "ratios": ratios, "longest_context": longest, "goals": {"decode, all over one": goal(ratios["decode"], 3.0, above=True)},
    }  # fmt: skip


def throughput(arguments: argparse.Namespace) -> Json:
    """Several clients beside one, in turns."""
    if arguments.clients < 2:
        raise Zamba2Error(f"--clients is {arguments.clients}; at least 2 are needed to be compared with one.")
    if arguments.small:
        arguments.rounds = 2
    with measured_model(arguments) as folder, Served(folder, "--batch", str(arguments.clients), "--cache-mb", "0") as served:
        return asyncio.run(measured_throughput(served, arguments, Config.from_file(folder / "config.json").vocab_size))


# ---- second turn -----------------------------------------------------------------------------------------------------


def largest(texts: Callable[[int], Any], most: int, tokens: int, count: Callable[[Any], int]) -> Any:
    """``texts(n)`` of the largest n up to ``most`` with so many tokens at most, which grow with n."""
    return texts(bisect_right(range(most), tokens, key=lambda n: count(texts(n))) - 1)


def history(tokenizer: Tokenizer, tokens: int, seed: str, turns: int = 7) -> list[Message]:
    """Messages that begin and end with the user's and are read as about so many tokens."""
    source, words = documents(seed, split="test"), [f"{seed}:"]
    while len(words) < tokens:
        words += next(source).split()

    def messages(count: int) -> list[Message]:
        borders = [count * i // turns for i in range(turns + 1)]
        return [{"role": ("user", "assistant")[i % 2], "content": " ".join(words[a:b])} for i, (a, b) in enumerate(pairwise(borders))]

    return list(largest(messages, len(words), tokens, lambda found: len(tokenizer.encode_chat(found))))


def question(tokenizer: Tokenizer, tokens: int, seed: str) -> Message:
    """A user's message that is read as so many tokens when it is alone, what the template writes around it included. Raises Zamba2Error."""
    words = " ".join(itertools.islice(documents(seed, split="test"), 20)).split()

    def message(start: int, count: int) -> Message:
        return {"role": "user", "content": " ".join(words[start : start + count])}

    def length(found: Message) -> int:
        return len(tokenizer.encode_chat([found]))

    for start in range(len(words) - tokens):
        found: Message = largest(partial(message, start), tokens, tokens, length)
        if length(found) == tokens:
            return found
    raise Zamba2Error(f"no message of {tokens} tokens was found; the chat template alone may take more.")


def closing_tokens(tokenizer: Tokenizer, messages: Sequence[Message]) -> int:
    """What the template writes behind a reply, in tokens."""
    before = tokenizer.render_chat(messages)
    whole = tokenizer.render_chat([*messages, {"role": "assistant", "content": "x"}], add_generation_prompt=False)
    return len(tokenizer.encode(whole[len(before) + 1 :], add_special_tokens=False))


@dataclass
class Conversation:
    """messages: of the second turn. cached: tokens before its question. file: of the state behind the first reply."""

    messages: list[Message]
    cached: int
    file: Path


def drop_pages(file: Path) -> None:
    """So that the file's next reading is the disk's."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def read_seconds(file: Path) -> float:
    """How long the disk takes for the file, in pieces of 4 MiB."""
    drop_pages(file)
    piece, begun = bytearray(4 * MIB), time.perf_counter()
    with open(file, "rb", buffering=0) as source:
        while source.readinto(piece):
            pass
    return time.perf_counter() - begun


def saved(states: Path, text: str, seconds: float = 120.0) -> Path:
    """The file of the state that has read a text, once it is written, which the server does in its own time; nothing is left to be written
    then. Raises Zamba2Error where there is none within so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for note in states.glob("*.json"):
            if json.loads(note.read_text(encoding="utf-8"))["text"] == text:
                os.sync()
                return note.with_suffix(".state")
        time.sleep(0.05)
    raise Zamba2Error(f"{states} holds no state behind a reply after {seconds:.0f} s; the server's --cache-mb may be too small.")


async def first_turn(
    http: httpx.AsyncClient, tokenizer: Tokenizer, tokens: int, reply_tokens: int, seed: str
) -> tuple[Conversation, Heard]:
    """A conversation of so many tokens whose last reply is the server's. Replies that hold no whole text, such as half a character, cannot
    come back as text and are asked for anew."""
    for attempt in range(8):
        messages = history(tokenizer, tokens - reply_tokens, f"{seed} {attempt}")
        heard = await answered(http, CHAT, messages=messages, max_tokens=reply_tokens, seed=attempt, logprobs=True)
        if heard.text.strip() and "\ufffd" not in heard.text:
            break
    else:
        raise Zamba2Error("the model gave no reply that is a text, in eight attempts; another --seed is needed.")
    ended = heard.finish == "stop"  # its end token is the first of those that close a reply
    cached = heard.prompt_tokens + heard.completion_tokens + closing_tokens(tokenizer, messages) - ended
    return Conversation([*messages, {"role": "assistant", "content": heard.text}], cached, Path()), heard


def check_cached(what: str, heard: Heard, wanted: int) -> None:
    if heard.cached_tokens != wanted:
        raise Zamba2Error(f"{what}: {heard.cached_tokens} of {heard.prompt_tokens} tokens were cached; {wanted} were to be.")


async def warm_up(http: httpx.AsyncClient) -> None:
    await answered(http, TEXT, prompt="Once upon a time there was a river", max_tokens=8, ignore_eos=True)


async def in_memory(
    kept: Served, without: Served, tokenizer: Tokenizer, states: Path, arguments: argparse.Namespace, times: dict[str, list[float]]
) -> list[Conversation]:
    """The second turns of one server, the same from nothing on another, and their questions alone, in turns."""
    tokens, added, reply_tokens = (400, 20, 8) if arguments.small else (4000, 20, 16)
    asked: Json = {"max_tokens": 4, "logprobs": True, "temperature": 0}
    found = []
    async with kept.client() as http, without.client() as plain:
        for client in (http, plain):
            await warm_up(client)
        for number in range(arguments.rounds):
            conversation, first = await first_turn(http, tokenizer, tokens, reply_tokens, f"{arguments.seed} {number}")
            conversation.file = saved(states, tokenizer.render_chat(conversation.messages, add_generation_prompt=False))
            conversation.messages.append(question(tokenizer, added, f"question {arguments.seed} {number}"))
            second = await answered(http, CHAT, messages=conversation.messages, **asked)
            check_cached("second turn", second, conversation.cached)
            alone = await answered(http, CHAT, messages=conversation.messages[-1:], **asked)
            check_cached("the question alone", alone, 0)
            if second.prompt_tokens - second.cached_tokens != alone.prompt_tokens:
                raise Zamba2Error(
                    f"the question has {alone.prompt_tokens} tokens, but {second.prompt_tokens - second.cached_tokens} in turn."
                )
            nothing = await answered(plain, CHAT, messages=conversation.messages, **asked)
            check_cached("from nothing", nothing, 0)
            for name, heard in (("first_turn", first), ("second_turn", second), ("question_alone", alone), ("from_nothing", nothing)):
                times[name].append(heard.first)
                times[f"{name}_tokens"].append(heard.prompt_tokens)
            say(f"round {number + 1}: from nothing {nothing.first:.2f} s, second turn {second.first:.3f} s, alone {alone.first:.3f} s")
            found.append(conversation)
    return found


async def after_restart(served: Served, conversations: Sequence[Conversation], times: dict[str, list[float]]) -> None:
    """The same second turns of a new process, which knows the states from disk alone."""
    async with served.client() as http:
        await warm_up(http)
        for number, own in enumerate(conversations):
            times["state_bytes"].append(own.file.stat().st_size)
            times["reading_the_file"].append(read_seconds(own.file))
            drop_pages(own.file)
            heard = await answered(http, CHAT, messages=own.messages, max_tokens=4, logprobs=True, temperature=0)
            check_cached("second turn after a restart", heard, own.cached)
            times["second_turn_from_disk"].append(heard.first)
            say(f"round {number + 1}: from disk {heard.first:.3f} s, the file alone {times['reading_the_file'][-1]:.3f} s")


def second_turn(arguments: argparse.Namespace) -> Json:
    """A question behind a long conversation: with its state in memory, on disk, and without."""
    if arguments.small:
        arguments.rounds = 2
    asked = ("first_turn", "second_turn", "question_alone", "from_nothing")
    names = (*asked, *(f"{name}_tokens" for name in asked), "second_turn_from_disk", "reading_the_file", "state_bytes")
    times: dict[str, list[float]] = {name: [] for name in names}
    home = arguments.states or cache_folder()
    home.mkdir(parents=True, exist_ok=True)
    with measured_model(arguments) as folder, tempfile.TemporaryDirectory(prefix="serve-states-", dir=home) as name:
        states = Path(name)
        tokenizer = Tokenizer.from_folder(folder, config=Config.from_file(folder / "config.json"))
        keeping = ("--cache-mb", str(arguments.cache_mb), "--disk-mb", "32768", "--cache-folder", name)
        with Served(folder, *keeping) as kept, Served(folder, "--cache-mb", "0") as without:
            conversations = asyncio.run(in_memory(kept, without, tokenizer, states, arguments, times))
        with Served(folder, *keeping) as again:
            asyncio.run(after_restart(again, conversations, times))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "time_to_first_token_seconds": {
            name: medians[name] for name in (*asked, "second_turn_from_disk")
        },
        "prompt_tokens": {name: medians[f"{name}_tokens"] for name in asked},
        "cached_share_of_reusable": 1.0,  # or check_cached had raised
        "state_bytes": medians["state_bytes"], "disk_bytes_per_second": medians["state_bytes"] / medians["reading_the_file"],
        "ratios": {
            "second turn / from nothing": medians["second_turn"] / medians["from_nothing"],
            "second turn / question alone": medians["second_turn"] / medians["question_alone"],
            "second turn from disk / (second turn + reading its file)": medians["second_turn_from_disk"]
            / (medians["second_turn"] + medians["reading_the_file"]),
        },
        "runs": times,
        "goals": {
            "second turn / from nothing": goal(medians["second_turn"] / medians["from_nothing"], 1 / 20),
            "second turn / question alone": goal(medians["second_turn"] / medians["question_alone"], 2.0),
            # the same two, and the file's bytes over the disk's rate
            "second turn from disk, seconds": goal(
                medians["second_turn_from_disk"],
                min(medians["from_nothing"] / 20, medians["question_alone"] * 2) + medians["reading_the_file"],
            ),
        },
    }  # fmt: skip


# ---- schemas ---------------------------------------------------------------------------------------------------------

WORDS = ("red", "green", "blue", "cat", "dog", "river", "stone", "house", "seven", "north", "quick", "tall", "bread", "lamp")
NAMES = ("name", "kind", "size", "color", "count", "place", "owner", "price", "state", "label", "first", "last", "left", "right")
PATTERNS = (
    "^[a-z]{1,6}$", "^[A-Z]{2}-[0-9]{3}$", "^(yes|no|maybe)$", "^[0-9a-f]{8}$", "^v[0-9]{1,2}\\.[0-9]{1,2}$", "^(ab|cd){1,4}$",
    "^\\+?[0-9]{6,9}$", "^[A-Z][a-z]{1,8}( [A-Z][a-z]{1,8}){0,2}$",
)  # fmt: skip
FORMATS = ("date", "uuid", "ipv4")


class Draw:
    """Schemas that a reply satisfies in a bounded number of characters; the same for the same seed. size: from 1, how much there is."""

    def __init__(self, seed: int | str) -> None:
        self.chance = random.Random(seed)

    def names(self, count: int) -> list[str]:
        return [name + (str(i // len(NAMES)) if i >= len(NAMES) else "") for i, name in enumerate(itertools.islice(self._names(), count))]

    def _names(self) -> Iterator[str]:
        while True:
            yield from self.chance.sample(NAMES, len(NAMES))

    def integer(self) -> Json:
        low = self.chance.randint(-1000, 1000)
        high = low + self.chance.randint(5, 5000)
        below, above = self.chance.choice(("minimum", "exclusiveMinimum")), self.chance.choice(("maximum", "exclusiveMaximum"))
        return {"type": "integer", below: low, above: high} | ({"multipleOf": self.chance.choice((2, 5))} if high - low > 20 else {})

    def number(self) -> Json:
        low = self.chance.randint(-50, 50)
        return {
            "type": "number",
            "minimum": low,
            "maximum": low + self.chance.randint(1, 100),
            "multipleOf": self.chance.choice((0.5, 0.25)),
        }

    def text(self, size: int = 1) -> Json:
        low = self.chance.randint(0, 4 * size)
        return {"type": "string", "minLength": low, "maxLength": low + self.chance.randint(0, 6 * size)}

    def words(self, size: int = 1) -> Json:
        values: list[Any] = [f"{self.chance.choice(WORDS)} {i}" for i in range(self.chance.randint(2, 8 * size))]
        return {"enum": [*values, *self.chance.sample([None, True, 1, 2.5, [1, "a"], {"a": []}], self.chance.randint(0, 3))]}

    def pattern(self) -> Json:
        return {"type": "string", "pattern": self.chance.choice(PATTERNS)}

    def format(self) -> Json:
        return {"type": "string", "format": self.chance.choice(FORMATS)}

    def leaf(self) -> Json:
        simple = (
            {"type": "boolean"},
            {"type": "null"},
            {"const": self.chance.choice(WORDS)},
            {"type": ["integer", "null"], "enum": [1, 2, None]},
        )
        made = (self.integer, self.number, self.text, self.words, self.pattern, self.format, lambda: self.chance.choice(simple))
        return dict(self.chance.choice(made)())

    def record(self, fields: Json, *, optional: bool = False) -> Json:
        required = [name for name in fields if not optional or self.chance.random() < 0.5]
        return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}

    def flat(self, size: int) -> Json:
        return self.record({name: self.leaf() for name in self.names(1 + 2 * size)})

    def optional(self, size: int) -> Json:
        return self.record({name: self.leaf() for name in self.names(1 + 2 * size)}, optional=True)

    def nested(self, size: int) -> Json:
        inner = self.leaf()
        for name in self.names(1 + size):
            inner = self.record({name: inner, "about": self.leaf()})
        return inner

    def array(self, size: int) -> Json:
        low = self.chance.randint(0, 2)
        items = self.leaf() if size < 2 else self.flat(1)
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + self.chance.randint(1, 1 + size)}

    def any_of(self, size: int) -> Json:
        kinds = [self.record({"kind": {"const": word}} | {n: self.leaf() for n in self.names(size)}) for word in WORDS[: 1 + size]]
        return {"anyOf": [*kinds, self.leaf()]}

    def all_of(self, size: int) -> Json:
        low = self.chance.randint(-9, 9)
        both = {"allOf": [{"type": "integer", "minimum": low}, {"maximum": low + 10 * size}]}
        return self.record({name: dict(both) for name in self.names(size)})

    def references(self, size: int) -> Json:
        defined: Json = {"leaf": self.leaf()}
        defined |= {
            f"d{i}": self.record({"a": {"$ref": f"#/$defs/{'leaf' if not i else f'd{i - 1}'}"}, "b": self.leaf()}) for i in range(size)
        }
        own = self.record({name: {"$ref": f"#/$defs/d{self.chance.randrange(size)}"} for name in self.names(2)})
        return {"$defs": defined, **own}

    def other_names(self, size: int) -> Json:
        pattern = {"^[xyz]{1,3}$": self.leaf()}
        return {"type": "object", "patternProperties": pattern, "additionalProperties": False, "maxProperties": size}

    def additional(self, size: int) -> Json:
        """Names of any length, which end as strings of the model's own do."""
        (name,) = self.names(1)
        own = self.record({name: self.leaf()})
        return own | {"additionalProperties": self.integer(), "maxProperties": 1 + min(2, size)}

    def tuple(self, size: int) -> Json:
        items = [self.leaf() for _ in range(1 + size)]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}

    def mixed(self, size: int) -> Json:
        made = (self.flat, self.nested, self.array, self.any_of, self.tuple, self.other_names)
        return self.record({name: self.chance.choice(made)(max(1, size - 1)) for name in self.names(1 + size)})


def several(made: Callable[[Draw], Json]) -> Callable[[Draw, int], Json]:
    """A record of so many."""
    return lambda draw, size: draw.record({name: made(draw) for name in draw.names(size)})


KINDS: dict[str, Callable[[Draw, int], Json]] = {
    "flat records": Draw.flat, "optional fields": Draw.optional, "nested records": Draw.nested, "arrays": Draw.array,
    "words": Draw.words, "any of": Draw.any_of, "patterns": several(Draw.pattern), "formats": several(Draw.format),
    "references": Draw.references, "integers": several(Draw.integer), "numbers": several(Draw.number), "texts": Draw.text,
    "all of": Draw.all_of, "names by pattern": Draw.other_names, "other names": Draw.additional, "tuples": Draw.tuple, "mixed": Draw.mixed,
}  # fmt: skip


def schemas(count: int, seed: int) -> list[tuple[str, Json]]:
    """So many schemas with their kinds: all kinds in turn, first of size 1, at last of size 4."""
    names = list(KINDS)
    return [
        (name, KINDS[name](Draw(f"{seed} {i}"), 1 + 4 * i // count)) for i, name in zip(range(count), itertools.cycle(names), strict=False)
    ]


def checker(schema: Json) -> Any:
    """A validator of jsonschema's. Formats are held to; a date to the calendar's writing, as RFC 3339's grammar has it, not to its days."""
    import jsonschema

    formats = jsonschema.FormatChecker(("uuid", "ipv4"))
    formats.checks("date")(lambda value: re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])", str(value)) is not None)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema, format_checker=formats)


def fields_of_choices(fields: int, choices: int) -> Json:
    return {"type": "object", "properties": {f"p{i}": {"anyOf": [{"const": j} for j in range(choices)]} for i in range(fields)}}


DOUBLED = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(20)} | {"d20": {"type": "null"}}
WHOLE: Json = {
    "300 fields of 50 choices": fields_of_choices(300, 50),
    "20 references, each twice the next": {"$defs": DOUBLED, "$ref": "#/$defs/d0"},
    "choices multiplied": {"allOf": [{"enum": list(range(100))}] * 9},
    "1e7 characters": {"type": "string", "minLength": 10**7},
    "1e7 items": {"type": "array", "items": {"type": "null"}, "minItems": 10**7},
    "1e7 fields": {"type": "object", "maxProperties": 10**7},
    "an enum of 100,000 numbers": {"enum": list(range(100_000))},
    "an enum of long words": {"enum": ["x" * 1000 + str(i) for i in range(1000)]},
    "40 arrays deep": json.loads('{"items":' * 40 + "{}" + "}" * 40),
    "itself": {"$ref": "#"},
    "within itself": {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}},
    "elsewhere": {"$ref": "https://example.com/schema"},
    "a pattern repeated a million times": {"type": "string", "pattern": "a{1000000}"},
    "repeats of repeats of repeats": {"type": "string", "pattern": "((a{100}){100}){100}"},
    "a pattern of 5,000 words": {"type": "string", "pattern": "|".join(f"word{i}" for i in range(5000))},
    "a pattern 450 groups deep": {"type": "string", "pattern": "(" * 450 + "a" + ")" * 450},
    "a pattern that looks back": {"type": "string", "pattern": r"^(a+)\1$"},
    "the impossible": {"type": "integer", "minimum": 3, "maximum": 2},
}
HOSTILE = {name: json.dumps(schema) for name, schema in WHOLE.items()} | {
    "10,000 arrays deep": '{"items":' * 10_000 + "{}" + "}" * 10_000,
    "a number of 4,000 digits": '{"minLength":1' + "0" * 3999 + "}",
}
# What engines that try one way after another never finish; one that follows all at once may obey it or refuse it, but soon.
CATASTROPHIC = ("^(a+)+$", "^(a|aa)+$", "^(([a-z])+.)+[A-Z]([a-z])+$", "^(a|b)*a(a|b){60}$", "^(.*,){20}x$", "^(?:(?:a*)*)*b$")


async def hostile(served: Served, refused: dict[str, Json], caught: dict[str, Json]) -> float:
    """What comes of hostile schemas while somebody else's streams go on. Returns the longest gap in those, in seconds."""
    done, gaps = asyncio.Event(), [0.0]
    messages = [{"role": "user", "content": "Write."}]

    async def stream() -> None:
        async with served.client() as http:
            while not done.is_set():
                gaps.extend((await answered(http, TEXT, prompt="Once", max_tokens=500, ignore_eos=True)).gaps)

    async def post(http: httpx.AsyncClient, schema: str) -> Json:
        wanted = {"messages": messages, "max_tokens": 64, "response_format": response_format({"@": 0})}
        body = json.dumps(wanted).replace('{"@": 0}', schema)
        begun = time.perf_counter()
        response = await http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
        found = {"status": response.status_code, "seconds": time.perf_counter() - begun}
        return found if response.status_code == 200 else found | {"message": response.json()["error"]["message"]}

    beside = asyncio.create_task(stream())
    async with served.client() as http:
        for name, schema in HOSTILE.items():
            refused[name] = await post(http, schema)
        for pattern in CATASTROPHIC:
            caught[pattern] = await post(http, json.dumps({"type": "string", "pattern": pattern}))
        done.set()
        await beside
        await answered(http, CHAT, messages=messages, max_tokens=8)
    return max(gaps)


def response_format(schema: Json) -> Json:
    return {"type": "json_schema", "json_schema": {"name": "wanted", "schema": schema, "strict": True}}


async def cost(served: Served, wanted: Sequence[tuple[str, Json]], max_tokens: int) -> Json:
    """Milliseconds per token of one client alone, with a schema and without, in turns; replies of at least 8 tokens."""
    found: dict[str, list[float]] = {"with": [], "without": []}
    messages = [{"role": "user", "content": "Write JSON."}]
    async with served.client() as http:
        for number, (_, schema) in enumerate(wanted):
            held = await answered(
                http, CHAT, messages=messages, max_tokens=max_tokens, seed=number, response_format=response_format(schema)
            )
            if held.completion_tokens < 8:
                continue
            free = await answered(http, CHAT, messages=messages, max_tokens=held.completion_tokens, seed=number, ignore_eos=True)
            for name, heard in (("with", held), ("without", free)):
                found[name].append(1000 * (heard.times[-1] - heard.times[0]) / (heard.completion_tokens - 1))
    if not found["with"]:
        raise Zamba2Error("no schema was answered by 8 tokens or more; more schemas are needed.")
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {"ms_per_token": medians, "added_ms_per_token": medians["with"] - medians["without"], "replies": len(found["with"])}


async def obeyed(served: Served, arguments: argparse.Namespace) -> Json:
    wanted = schemas(arguments.count, arguments.seed)
    queue = deque(enumerate(wanted))
    kinds: dict[str, Counter[str]] = {name: Counter() for name in KINDS}
    failures: list[Json] = []
    heard: list[Heard] = []

    async def worker() -> None:
        async with served.client() as http:
            while queue:
                number, (kind, schema) = queue.popleft()
                validator = checker(schema)
                messages = [{"role": "user", "content": "Write JSON."}]
                options = {"max_tokens": arguments.max_tokens, "seed": number, "temperature": float(number // len(KINDS) % 2)}
                reply = await ask(http, CHAT, messages=messages, response_format=response_format(schema), **options)
                heard.append(reply)
                counts = kinds[kind]
                counts["asked"] += 1
                counts["tokens"] += reply.completion_tokens
                if reply.error is None and reply.finish == "stop":
                    counts["finished"] += 1
                    problem = complaint(validator, reply.text)
                    counts["valid"] += problem is None
                else:
                    problem = reply.error or f"not finished within {reply.completion_tokens} tokens"
                if problem is not None:
                    failures.append({"number": number, "kind": kind, "problem": problem, "schema": schema, "reply": reply.text[:400]})
                if len(heard) % 20 == 0:
                    say(f"{len(heard)} of {len(wanted)} schemas, {len(failures)} not satisfied")

    await asyncio.gather(*(worker() for _ in range(arguments.clients)))
    say("hostile schemas")
    refused: dict[str, Json] = {}
    caught: dict[str, Json] = {}
    gap = await hostile(served, refused, caught)
    say("what a schema costs")
    costs = await cost(served, wanted[:: max(1, len(wanted) // (4 if arguments.small else 24))], arguments.max_tokens)
    total = sum(kinds.values(), Counter[str]())
    admitted = [name for name, found in refused.items() if found["status"] != 400]
    return {
        "schemas": {name: total[name] for name in ("asked", "finished", "valid", "tokens")},
        "kinds": {name: {k: counts[k] for k in ("asked", "finished", "valid", "tokens")} for name, counts in kinds.items()},
        "failures": failures, "between_tokens": spread([g for reply in heard for g in reply.gaps]), "cost": costs,
        "hostile": refused, "catastrophic_patterns": caught, "longest_gap_beside_them_seconds": gap,
        "goals": {
            "finished, share": goal(total["finished"] / total["asked"], 0.95, above=True),
            "finished and not valid": goal(total["finished"] - total["valid"], 0), "hostile and not refused": goal(len(admitted), 0),
            "slowest refusal, seconds": goal(max(found["seconds"] for found in refused.values()), 1.0),
            "slowest answer to a catastrophic pattern, seconds": goal(max(found["seconds"] for found in caught.values()), 1.0),
        },
    }  # fmt: skip


def complaint(validator: Any, text: str) -> str | None:
    """What is wrong with a reply, if anything is."""
    try:
        value = json.loads(text)
    except ValueError as error:
        return f"not JSON: {error}"
    found = next(iter(validator.iter_errors(value)), None)
    return None if found is None else str(found.message)[:300]


def obey(arguments: argparse.Namespace) -> Json:
    """Replies that are JSON of a schema."""
    if arguments.small:
        arguments.count = 2 * len(KINDS)
    with Served(arguments.model, "--batch", str(arguments.clients), "--cache-mb", "0") as served:
        return asyncio.run(obeyed(served, arguments))


# ---- the command line ------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], Json]) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        added.set_defaults(run=run)
        added.add_argument("--out", type=Path, help=f"where to write (docs/measurements/serve_{name.replace('-', '_')}.json)")
        added.add_argument("--small", action="store_true", help="seconds, on a tiny model; writes only where --out says")
        added.add_argument("--seed", type=int, default=0, help="of all that is drawn (%(default)s)")
        return added

    loading = command("load", load)
    loading.add_argument("--model", default="demo", help="as for zamba2 serve (%(default)s)")
    loading.add_argument("--minutes", type=float, default=10.0, help="%(default)s")
    loading.add_argument("--clients", type=int, default=32, help="users at once (%(default)s)")
    loading.add_argument("--batch", type=int, default=8, help="the server's (%(default)s)")
    loading.add_argument("--cache-mb", type=int, default=256, help="the server's; full long before the second half (%(default)s)")
    for name, run in (("throughput", throughput), ("second-turn", second_turn)):
        shaped = command(name, run)
        shaped.add_argument("--shape", default="2.7b", help="a published shape, with random weights (%(default)s)")
        shaped.add_argument("--format", default="q4", help="of the weights (%(default)s)")
        shaped.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="tokenizer.json of the shape's vocabulary (%(default)s)")
        shaped.add_argument("--rounds", type=int, default=5 if run is throughput else 3, help="%(default)s")
        if run is throughput:
            shaped.add_argument("--clients", type=int, default=8, help="beside one (%(default)s)")
        else:
            shaped.add_argument("--cache-mb", type=int, default=4096, help="the server's (%(default)s)")
            shaped.add_argument("--states", type=Path, help="folder on the disk to be measured (the user's cache)")
    obeying = command("schemas", obey)
    obeying.add_argument("--model", default="random", help="as for zamba2 serve (%(default)s)")
    obeying.add_argument("--count", type=int, default=200, help="of schemas (%(default)s)")
    obeying.add_argument("--clients", type=int, default=8, help="at once (%(default)s)")
    obeying.add_argument("--max-tokens", type=int, default=3000, help="of a reply (%(default)s)")
    return made


def main() -> None:
    arguments = parser().parse_args()
    for name in ("minutes", "clients", "rounds", "count"):
        if getattr(arguments, name, 1) <= 0:
            raise SystemExit(f"--{name} is {getattr(arguments, name)}; a number above 0 is needed.")
    try:
        measured = arguments.run(arguments)
    except Zamba2Error as error:
        raise SystemExit(f"serve_load: {error}") from None
    result = about(arguments) | measured
    out = arguments.out or (None if arguments.small else OUT / f"serve_{arguments.command.replace('-', '_')}.json")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as temporary:
            temporary.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    for name, found in result["goals"].items():
        say(f"{'met' if found['met'] else 'MISSED'}: {name}: {found['found']:.4g}")
    print(json.dumps(result, default=str))


if __name__ == "__main__":
    main()
