"""Faults around a server: killed while it writes, no room on disk, files that vanish, clients that stall, bodies without sense."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

import zamba2
from zamba2.language.model import LanguageModel
from zamba2.serve.cache import StateCache
from zamba2.serve.scheduler import Scheduler
from zamba2.weights.hub import DEMO

httpx = pytest.importorskip("httpx", reason="the tests of the server ask with it: pip install 'zamba2[test]'")
pytest.importorskip("fastapi", reason="the server needs the extra [serve]")
pytest.importorskip("uvicorn", reason="the server needs the extra [serve]")

linux = pytest.mark.skipif(sys.platform != "linux", reason="limits of another process and /proc are Linux's")

CHAT, TEXT, RESPONSE, MESSAGE, TOKENIZE, DETOKENIZE = URLS = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize", "/detokenize",
)  # fmt: skip
HELLO = [{"role": "user", "content": "Spell the word river."}]
ASKED = ["Sort these words: pear, apple, fig", "Now in upper case."]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return zamba2.load("demo", threads=1)


class Served:
    """``zamba2 serve`` in a process of its own, on a port that it finds itself. What it says goes to a file."""

    def __init__(self, log: Path, model: object = "demo", **options: Any) -> None:
        given = {"threads": 1, "revision": None, "offline": True}
        code = (
            "import sys; from pathlib import Path; from zamba2.commands.serve import main\n"
            f"main({str(model)!r}, {given!r}, port=0, name='demo', quiet=True, grace=0.5, "
            + ", ".join(
                f"{name}=Path({str(value)!r})" if isinstance(value, Path) else f"{name}={value!r}" for name, value in options.items()
            )
            + ")"
        )
        self.log = log
        with open(log, "wb") as file:
            self.process = subprocess.Popen([sys.executable, "-c", code], stderr=file, env=os.environ.copy())

    def __enter__(self) -> Served:
        end = time.monotonic() + 120
        while not (said := [line for line in self.said.splitlines() if " at http://" in line]):
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                pytest.fail(f"the server did not start: {self.said}")
            time.sleep(0.01)
        self.url = said[0].rpartition(" ")[2]
        self.port = int(self.url.rpartition(":")[2])
        self.http = httpx.Client(base_url=self.url, timeout=120)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.http.close()
        self.process.kill()
        self.process.wait(60)

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def stop(self) -> int:
        """As a user does; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def chat(self, messages: list[dict[str, str]], **options: Any) -> tuple[str, int]:
        """A greedy reply, and how many tokens of the prompt were cached."""
        response = self.http.post(CHAT, json={"messages": messages, "temperature": 0, "max_tokens": 24, **options})
        assert response.status_code == 200, response.text
        found = response.json()
        return found["choices"][0]["message"]["content"], found["usage"]["prompt_tokens_details"]["cached_tokens"]

    def is_idle(self, seconds: float = 60.0) -> bool:
        """Whether nobody is served any more, within so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self.http.get("/health").json()
            if not any(found[place] for place in ("waiting", "reading", "decoding")):
                return True
            time.sleep(0.02)
        return False

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


def uninterrupted(model: LanguageModel, asked: list[str]) -> list[dict[str, str]]:
    """A conversation as the model alone has it."""
    own = model.conversation()
    for content in asked:
        for _ in own.say(content, max_tokens=24):
            pass
    return [dict(message) for message in own.messages]


def wait_for(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What becomes true, within so long."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.001)
    return found


def notes(folder: Path) -> set[str]:
    return {file.stem for file in folder.glob("*.json")}


def half_written(folder: Path) -> list[str]:
    """Files that only a process that was killed, or still writes, leaves."""
    names = {file.name for file in folder.iterdir()}
    return [name for name in names if name.endswith(".partial") or (name.endswith(".state") and name[:-6] + ".json" not in names)]


# ---- killed ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_killed_while_states_are_written(model: LanguageModel, tmp_path: Path, kills: int) -> None:
    """Killed again and again while states of megabytes are written, the server starts on what is left, loads nothing half-written,
    and an earlier conversation goes on, from its state, token for token as if nothing had happened."""
    folder, own, rng = tmp_path / "states", uninterrupted(model, ASKED), random.Random(7)
    hit = 0
    with Served(tmp_path / "0", cache_folder=folder) as server:
        assert server.chat(own[:1]) == (own[1]["content"], 0)
        _, kept = server.chat(own[:3])
        assert kept > 0 and server.stop() == 0
    assert len(notes(folder)) >= 2 and not half_written(folder)
    for kill in range(1, 10 * kills):  # as many as it takes for one to come while a state is written, and for another to be whole
        with Served(tmp_path / str(kill), cache_folder=folder) as server:
            assert not half_written(folder)
            assert server.chat(own[:3]) == (own[3]["content"], kept)
            client = threading.Thread(target=ask_without_end, args=(server.url, rng.randrange(10**6)))
            client.start()
            wait_for(lambda: any(name.endswith(".partial") for name in os.listdir(folder)))
            time.sleep(rng.uniform(0, 0.05 * min(kill - 1, 6)))  # longer and longer: a slow machine writes slowly
            server.process.kill()
            server.process.wait(60)
            client.join(60)
            assert not client.is_alive() and not [line for line in server.said.splitlines() if "dropped" in line or "cannot" in line]
        hit += bool(half_written(folder))
        if hit and kill >= kills and len(notes(folder)) > 2:
            break
    assert hit, "no kill came while a state was written"
    with Served(tmp_path / "last", cache_folder=folder) as server:
        assert not half_written(folder) and server.chat(own[:3]) == (own[3]["content"], kept)
        assert server.stop() == 0 and server.said.splitlines()[1:] == ["zamba2: stopped."]
    cache, texts = StateCache(lambda adapter: model.backend.new_state(adapter=adapter), folder=folder), notes(folder)
    assert len(cache) == len(texts) > 2
    for name in texts:
        tokens = json.loads((folder / f"{name}.json").read_text())["tokens"]
        found = cache.find([*tokens, 5])
        assert found is not None and found.position == len(tokens)


def ask_without_end(url: str, seed: int) -> None:
    """Long conversations, each another one, until the server is gone."""
    rng = random.Random(seed)
    with suppress(httpx.HTTPError), httpx.Client(base_url=url, timeout=120) as http:
        while True:
            text = " ".join(rng.choice(("pear", "apple", "fig", "river", "cat", "sun")) for _ in range(rng.randrange(500, 1500)))
            http.post(CHAT, json={"messages": [{"role": "user", "content": text}], "max_tokens": 2, "ignore_eos": True})


# ---- the disk --------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[Served, bool], None]]:
    """A file system of 8 MiB in memory at the folder; what is given fills it, or makes room again. Needs the right to mount."""
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", str(folder).encode(), b"tmpfs", 0, b"size=8m"):
        pytest.skip(f"a file system cannot be mounted here ({os.strerror(ctypes.get_errno())})")

    def fill(server: Served, full: bool) -> None:
        if not full:
            (folder / "others").unlink()
            return
        with open(folder / "others", "wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(1 << 16))

    try:
        yield fill
    finally:
        libc.umount2(str(folder).encode(), 2)


@contextmanager
def small_files(folder: Path) -> Iterator[Callable[[Served, bool], None]]:
    """The server may write files of a few kilobytes only, or of any size again: the same for it, and needs no rights."""
    import resource

    def fill(server: Served, full: bool) -> None:
        _, hard = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (50_000 if full else hard, hard))

    yield fill


@linux
@pytest.mark.parametrize("disk", [small_disk, small_files])
def test_no_room_on_disk(model: LanguageModel, tmp_path: Path, disk: Any) -> None:
    """While the disk is full the server goes on from memory and says so once; nothing that was saved is lost, and as soon as there is room
    states are saved again. The next process has all but those of the time between."""
    folder = tmp_path / "states"
    talks = [uninterrupted(model, asked) for asked in (ASKED, ["Name three fruits.", *ASKED[1:]], ["Spell the word river.", *ASKED[1:]])]
    before, between, after = talks
    with disk(folder) as fill:
        with Served(tmp_path / "first", cache_folder=folder) as server:
            assert server.chat(before[:1])[0] == before[1]["content"]
            saved = wait_for(lambda: notes(folder))
            fill(server, True)
            assert server.chat(between[:1])[0] == between[1]["content"]
            wait_for(lambda: server.metric("zamba2_cache_unsaved_total") == 1)
            text, cached = server.chat(between[:3])
            assert text == between[3]["content"] and cached > 0
            wait_for(lambda: server.metric("zamba2_cache_unsaved_total") >= 2)
            assert notes(folder) == saved and not half_written(folder)
            assert server.said.count("cannot be saved") == server.said.count("\n") - 1 == 1, server.said
            fill(server, False)
            assert server.chat(after[:1])[0] == after[1]["content"]
            wait_for(lambda: notes(folder) > saved)
            assert server.stop() == 0 and "Traceback" not in server.said
        with Served(tmp_path / "second", cache_folder=folder) as server:
            for own, known in ((before, True), (after, True), (between, False)):
                text, cached = server.chat(own[:3])
                assert (cached > 0) == known
                assert not known or text == own[3]["content"]
            assert "cannot" not in server.said


def test_the_folder_vanishes(model: LanguageModel, tmp_path: Path) -> None:
    """Where the cache's folder is removed, conversations go on from memory and later states are saved into it anew; where a file takes its
    place, the server says so once and goes on."""
    folder, own = tmp_path / "states", uninterrupted(model, ASKED)
    with Served(tmp_path / "first", cache_folder=folder) as server:
        assert server.chat(own[:1]) == (own[1]["content"], 0)
        wait_for(lambda: notes(folder))
        shutil.rmtree(folder)
        text, kept = server.chat(own[:3])
        assert text == own[3]["content"] and kept > 0
        wait_for(lambda: folder.exists() and notes(folder))
        shutil.rmtree(folder)
        folder.write_text("a file")
        for content in ("Name three fruits.", "Spell the word river."):
            server.chat([{"role": "user", "content": content}])
        wait_for(lambda: server.metric("zamba2_cache_unsaved_total") >= 2)
        assert server.said.count("cannot be saved") == 1 and server.chat(own[:3]) == (own[3]["content"], kept)
        assert server.stop() == 0 and "Traceback" not in server.said


# ---- the model's file ------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


@pytest.mark.parametrize("left", [-1, 4096])
def test_the_models_file_is_cut(copied: Path, tmp_path: Path, left: int) -> None:
    """A model file that becomes shorter, by a byte or by nearly all, between two calls: whoever asks for a reply is told, streams too, and
    what needs no weights is answered as before."""
    file = copied / "model.safetensors"
    with Served(tmp_path / "log", copied) as server:
        assert server.chat(HELLO)[0]
        os.truncate(file, left if left > 0 else file.stat().st_size - 1)
        for path, body in ((CHAT, {"messages": HELLO}), (MESSAGE, {"messages": HELLO, "max_tokens": 4}), (TEXT, {"prompt": "a"})):
            response = server.http.post(path, json=body)
            assert response.status_code == 503 and "shrank from" in response.json()["error"]["message"], response.text
            events = server.http.post(path, json=body | {"stream": True}).text.strip().splitlines()
            assert any("shrank from" in event for event in events), events
        assert server.http.get("/health").status_code == server.http.get("/v1/models").status_code == 200
        assert server.http.post(TOKENIZE, json={"prompt": "One day"}).json()["count"] > 0
        assert server.metric("zamba2_prompt_tokens_total") > 0
        assert server.stop() == 0 and "Traceback" not in server.said


def test_the_models_file_is_cut_in_a_call(copied: Path, tmp_path: Path) -> None:
    """Cut to nearly nothing while a reply is computed, the stream ends with what happened, or, where the call itself read what is gone,
    so does the process, with one sentence and exit code 2; no text comes from what is no longer there."""
    body = {"prompt": "One day", "max_tokens": 3500, "ignore_eos": True, "temperature": 0, "stream": True}
    with Served(tmp_path / "log", copied) as server:
        seen: list[str] = []
        with suppress(httpx.HTTPError), server.http.stream("POST", TEXT, json=body) as response:
            for line in response.iter_lines():
                if not seen:
                    os.truncate(copied / "model.safetensors", 4096)
                seen.append(line)
        assert len(seen) < 3500
        if "shrank from" in "".join(seen):
            assert server.http.get("/health").status_code == 200 and server.stop() == 0
        else:
            assert server.process.wait(60) == 2
            assert server.said.splitlines()[-1].startswith("zamba2: the weight file became shorter while it was in use")


def test_the_models_file_is_removed(copied: Path, tmp_path: Path) -> None:
    """A model whose files are removed is served as before: what is mapped stays."""
    with Served(tmp_path / "log", copied) as server:
        text, _ = server.chat(HELLO)
        shutil.rmtree(copied)
        assert server.chat(HELLO)[0] == text
        assert server.stop() == 0


# ---- clients ---------------------------------------------------------------------------------------------------------


def posted(port: int, path: str, body: dict[str, Any]) -> socket.socket:
    """A connection that has asked, and whose system buffers little of the answer."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.settimeout(120)
    made.connect(("127.0.0.1", port))
    data = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
        "Connection: close",
    ]
    made.sendall("\r\n".join([*lines, "", ""]).encode() + data)
    return made


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


@linux
def test_clients_that_do_not_read(model: LanguageModel, tmp_path: Path) -> None:
    """Streams of megabytes that nobody reads keep nobody else waiting and take no more memory than their own replies; read at last, they
    are complete."""
    count = 1500
    body = {
        "messages": HELLO,
        "max_tokens": count,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "logprobs": True,
        "top_logprobs": 20,
    }
    own = model.chat(HELLO, max_tokens=24).text
    with Served(tmp_path / "log", cache_mb=0) as server:
        assert server.chat(HELLO)[0] == own
        before = resident(server.process.pid)
        slow = [posted(server.port, CHAT, body) for _ in range(3)]
        wait_for(lambda: server.http.get("/health").json()["decoding"] == 3)
        assert server.chat(HELLO)[0] == own
        assert server.is_idle(), "the model waits for somebody who does not read"
        assert server.chat(HELLO)[0] == own
        grown = resident(server.process.pid) - before
        assert grown < 3 * count * 20_000, f"{grown} bytes"
        time.sleep(1)
        assert resident(server.process.pid) - before < grown + (8 << 20)
        answers = []
        for one in slow:
            with one, one.makefile("rb") as file:
                answers.append(file.read())
        for answer in answers:
            assert len(answer) > 1 << 20 and answer.count(b'"bytes"') >= 21 * count and b"data: [DONE]" in answer[-100:]
        assert server.http.get("/health").status_code == 200


def test_a_connection_that_is_reset(model: LanguageModel, tmp_path: Path) -> None:
    """A client whose connection breaks off in the middle of a stream, or of its own body, is let go, without a traceback."""
    body = {"prompt": "One day", "max_tokens": 3500, "ignore_eos": True, "stream": True}
    with Served(tmp_path / "log") as server:
        for read in (True, False):
            one = posted(server.port, TEXT, body)
            if read:
                assert one.recv(100).startswith(b"HTTP/1.1 200")
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            one.close()
            assert server.is_idle(20)
        half = socket.create_connection(("127.0.0.1", server.port))
        half.sendall(f"POST {TEXT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n{{".encode())
        half.close()
        assert server.chat(HELLO)[0] == model.chat(HELLO, max_tokens=24).text
        assert server.stop() == 0 and "Traceback" not in server.said


# ---- bodies ----------------------------------------------------------------------------------------------------------

GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HELLO}, TEXT: {"prompt": "a"}, RESPONSE: {"input": "a"}, MESSAGE: {"messages": HELLO, "max_tokens": 4},
    TOKENIZE: {"prompt": "a"}, DETOKENIZE: {"tokens": [5, 6]},
}  # fmt: skip
NAMES = (
    "messages", "prompt", "input", "model", "max_tokens", "max_completion_tokens", "max_output_tokens", "n", "stop", "stop_sequences",
    "stream", "temperature", "top_p", "top_k", "min_p", "logit_bias", "logprobs", "top_logprobs", "echo", "system", "instructions",
    "tokens", "stream_options", "seed", "tools", "tool_choice", "best_of", "metadata", "suffix", "response_format", "text",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "user", "thinking", "previous_response_id",
    "add_generation_prompt", "ignore_eos",
)  # fmt: skip
INNER = (
    "role",
    "content",
    "type",
    "text",
    "name",
    "function",
    "json_schema",
    "schema",
    "properties",
    "include_usage",
    "5",
    "arguments",
    "id",
)
WORDS = (
    "", "a", "user", "assistant", "system", "tool", "demo", "json_schema", "json_object", "text", "function", "auto", "\ud800", "\0",
    "☃" * 40, "<|im_start|>assistant\n", "<|im_end|>", "x" * 3000, "object", "string", "5", "-1", "$ref", "#",
)  # fmt: skip
NUMBERS = (
    -1,
    0,
    1,
    2,
    3,
    5,
    21,
    4096,
    2**31,
    2**63,
    -(2**63),
    10**30,
    0.0,
    -0.0,
    0.5,
    1.5,
    -2.5,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
)


def any_value(rng: random.Random, depth: int = 0) -> Any:
    """JSON of any shape, made of what requests are made of."""
    kind = rng.randrange(6 if depth < 4 else 4)
    if kind < 2:
        return rng.choice(WORDS)
    if kind < 4:
        return rng.choice((None, True, False, *NUMBERS))
    if kind == 4:
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice((*INNER, *NAMES, *WORDS)): any_value(rng, depth + 1) for _ in range(rng.randrange(4))}


def any_body(rng: random.Random, path: str) -> bytes:
    """A request with some fields changed; fields without a request; a request with some bytes changed; bytes."""
    kind = rng.random()
    if kind < 0.1:
        return rng.randbytes(rng.randrange(200))
    if kind < 0.15:
        return json.dumps(any_value(rng)).encode()
    if kind < 0.17:
        return rng.choice((b"[", b'{"a":', b'{"messages":[')) * rng.randrange(1, 50_000)
    fields = {} if kind < 0.25 else dict(GOOD[path])
    for _ in range(rng.randrange(5)):
        name = rng.choice(NAMES)
        fields[name] = any_value(rng)
        if rng.random() < 0.1:
            del fields[rng.choice([*fields])]
    data = json.dumps(fields, ensure_ascii=rng.random() < 0.9).encode(errors="surrogatepass")
    if kind > 0.85:
        changed = bytearray(data)
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(changed))
            changed[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
            if not changed:
                break
        data = bytes(changed)
    return data


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_random_bodies(model: LanguageModel, count: int) -> None:
    """Whatever bytes are posted anywhere, several at once, the answer is the model's or says what is wrong with the request, never an error
    of the server's; and the next request is answered as ever."""
    from zamba2.serve.app import Settings, create_app

    cache = StateCache(lambda adapter: model.backend.new_state(adapter=adapter), most_bytes=32 << 20)
    scheduler = Scheduler(model.backend, model.tokenizer, cache=cache)
    app = create_app(model, scheduler, cache, Settings(model_name="demo", log=False, max_tokens=4))
    rng = random.Random(count)
    kinds = ("application/json",) * 8 + ("text/plain", "application/json; charset=utf-16", "multipart/form-data; boundary=x", "\xff")
    statuses: dict[int, int] = {}

    async def post(http: Any, path: str, body: bytes, kind: str) -> None:
        response = await http.post(path, content=body, headers={"Content-Type": kind.encode("latin-1")})
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        shown = f"{path} {kind!r} {body[:3000]!r}: {response.status_code} {response.text[:500]}"
        assert response.status_code < 500, shown
        if response.status_code != 200:
            assert response.json()["error"]["message"], shown
        assert "went wrong in the server" not in response.text, shown

    async def all_of_them() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://demo", timeout=None) as http:
            for _ in range(-(-count // 8)):
                asked = [(path, any_body(rng, path), rng.choice(kinds)) for path in rng.choices(URLS, k=8)]
                await asyncio.gather(*(post(http, *one) for one in asked))
            assert (await http.get("/health")).status_code == 200
            response = await http.post(CHAT, json={"messages": HELLO, "temperature": 0, "max_tokens": 24})
            assert response.json()["choices"][0]["message"]["content"] == model.chat(HELLO, max_tokens=24).text

    try:
        asyncio.run(all_of_them())
        wait_for(lambda: not any(scheduler.counts().values()))
        assert statuses[200] > count / 20 and statuses[400] > count / 20, statuses
    finally:
        scheduler.close()
