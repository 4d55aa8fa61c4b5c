"""What is wrong from outside gives one line, exit code 2, no traceback and no half-written file.

CASES is one table: a name, what to prepare, the words of the message. Each case returns the command line to run.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import FakeHub
from hypothesis import given, settings
from hypothesis import strategies as st

import zamba2
from zamba2.cli import run
from zamba2.errors import Zamba2Error
from zamba2.language.conversations import Conversation
from zamba2.weights.checkpoint import StandaloneSource, load_model, save_checkpoint
from zamba2.weights.files import TensorFile, replacing, write_tensors
from zamba2.weights.hub import RANDOM

RANDOM_WEIGHTS = "zamba2: this model has random weights"
MIXER = "model.layers.0.mamba.in_proj.weight"
Stored = dict[str, tuple[str, tuple[int, ...], bytes]]  # dtype, shape, bytes of each tensor


# ---- checkpoints to spoil --------------------------------------------------------------------------------------------


def stored_tensors(path: Path) -> Stored:
    file = TensorFile(path)
    return {name: (entry.dtype, entry.shape, bytes(file.read(name))) for name, entry in file.entries.items()}


def entries(tensors: Stored) -> list[tuple[str, str, tuple[int, ...], Callable[[], list[memoryview]]]]:
    """What ``write_tensors`` takes."""

    def produce(data: bytes) -> Callable[[], list[memoryview]]:
        return lambda: [memoryview(data)]

    return [(name, dtype, shape, produce(data)) for name, (dtype, shape, data) in tensors.items()]


def store(path: Path, tensors: Stored) -> None:
    write_tensors(path, entries(tensors), {"format": "pt"})


def with_header(header: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


class Spoiled:
    """A copy of the default model, to spoil."""

    def __init__(self, home: Path) -> None:
        self.home, self.path = home, home / "model"
        shutil.copytree(RANDOM, self.path)
        self.weights = self.path / "model.safetensors"
        self.command = ["generate", "hi", "-n", "2", "--model", str(self.path)]

    def raw(self, data: bytes) -> list[str]:
        self.weights.write_bytes(data)
        return self.command

    def header(self, change: Callable[[dict[str, Any]], object]) -> list[str]:
        data = self.weights.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        return self.raw(with_header(json.dumps(header).encode(), data=data[8 + length :]))

    def tensors(self, change: Callable[[Stored], object]) -> list[str]:
        tensors = stored_tensors(self.weights)
        change(tensors)
        store(self.weights, tensors)
        return self.command

    def index(self, change: Callable[[dict[str, Any]], object] = lambda index: None) -> list[str]:
        """Two shards and their index."""
        tensors = stored_tensors(self.weights)
        self.weights.unlink()
        names = sorted(tensors)
        index: dict[str, Any] = {"weight_map": {}}
        for number, part in enumerate([names[::2], names[1::2]]):
            store(self.path / f"{number}.safetensors", {name: tensors[name] for name in part})
            index["weight_map"] |= dict.fromkeys(part, f"{number}.safetensors")
        change(index)
        (self.path / "model.safetensors.index.json").write_text(json.dumps(index))
        return self.command

    def config(self, **changes: Any) -> list[str]:
        return self.json("config.json", json.loads((RANDOM / "config.json").read_text()) | changes)

    def json(self, name: str, data: Any) -> list[str]:
        return self.text(name, json.dumps(data))

    def text(self, name: str, text: str) -> list[str]:
        (self.path / name).write_text(text)
        return self.command

    def folder(self, name: str) -> list[str]:
        (self.path / name).unlink()
        (self.path / name).mkdir()
        return self.command

    def without(self, name: str) -> list[str]:
        (self.path / name).unlink()
        return self.command

    def template(self, text: str) -> list[str]:
        return [*self.text("chat_template.jinja", text), "--chat"]

    def standalone(self, data: bytes, *, config: bool = True) -> list[str]:
        """A .pt file of these bytes."""
        folder = self.home / "standalone"
        folder.mkdir()
        if config:
            shutil.copy(RANDOM / "config.json", folder)
        (folder / "model.pt").write_bytes(data)
        return [*self.command[:-1], str(folder / "model.pt")]

    def file(self, data: bytes, *option: str) -> list[str]:
        """The embedded model, and a file to read for the last option."""
        (self.home / "input").write_bytes(data)
        return ["generate", "-n", "2", *option, str(self.home / "input")]


def all_values(value: float) -> Callable[[Stored], object]:
    """Fills one norm's weights."""
    name, half = "model.final_layernorm.weight", torch.tensor([value], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    return lambda tensors: tensors.update({name: ("BF16", tensors[name][1], half * tensors[name][1][0])})


def scaled(source: str, target: str) -> Callable[[Stored], object]:
    """Adds a copy of a tensor under another name, with one bit changed."""

    def change(tensors: Stored) -> None:
        dtype, shape, data = tensors[source]
        tensors[target] = (dtype, shape, bytes([data[0] ^ 1]) + data[1:])

    return change


def saved(data: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(data, buffer)
    return buffer.getvalue()


class Attack:
    """What unpickling this would run."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def attack(model: Spoiled) -> list[str]:
    return model.standalone(pickle.dumps({"model": Attack(f"touch {model.home / 'model' / 'ran'}")}))


def zipped_attack(model: Spoiled) -> list[str]:
    return model.standalone(saved({"model": Attack(f"touch {model.home / 'model' / 'ran'}")}))


# ---- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    name: str
    prepare: Callable[[Spoiled], list[str]]
    said: str
    stdin: bytes = b""


def options(*arguments: str) -> Callable[[Spoiled], list[str]]:
    return lambda model: ["generate", "hi", "-n", "2", "-m", "random", *arguments]


def command(*arguments: str) -> Callable[[Spoiled], list[str]]:
    return lambda model: list(arguments)


def entry(**changes: Any) -> Callable[[Spoiled], list[str]]:
    return lambda model: model.header(lambda header: header[MIXER].update(changes))


WEIGHTS = [
    Case("truncated file", lambda m: m.raw(m.weights.read_bytes()[:-1000]), "ends at byte"),
    Case("truncated header", lambda m: m.raw(m.weights.read_bytes()[:100]), "header claims"),
    Case("empty file", lambda m: m.raw(b""), "it has 0 bytes"),
    Case("seven bytes", lambda m: m.raw(b"1234567"), "it has 7 bytes"),
    Case("header of 2^63 bytes", lambda m: m.raw(with_header(b"{}", 1 << 63)), "header claims 9223372036854775808"),
    Case("header one byte too long", lambda m: m.raw(with_header(b"{}", 3)), "header claims 3"),
    Case("header of random bytes", lambda m: m.raw(with_header(b"\xff\xfe\xfd")), "header is not JSON"),
    Case("header a list", lambda m: m.raw(with_header(b"[]")), "header is not a JSON object"),
    Case("header nested", lambda m: m.raw(with_header(b"[" * 90_000)), "header is not JSON"),
    Case("metadata of numbers", lambda m: m.raw(with_header(b'{"__metadata__": {"a": 1}}')), "metadata are not strings"),
    Case("overlapping tensors", lambda m: m.header(lambda h: h.update(again=dict(h[MIXER]))), "overlaps"),
    Case("negative offset", entry(data_offsets=[-8, 0]), "malformed"),
    Case("huge offset", entry(data_offsets=[0, 1 << 62]), "malformed"),
    Case("offset behind the file", entry(shape=[1 << 40], data_offsets=[0, 2 << 40]), "ends at byte"),
    Case("offsets against the shape", entry(shape=[3, 3]), "has shape [3, 3]"),
    Case("offsets of three", entry(data_offsets=[0, 0, 0]), "malformed"),
    Case("shape of floats", entry(shape=[1.0]), "malformed"),
    Case("shape without end", entry(shape=[1 << 60] * 50_000), "malformed"),
    Case("unknown dtype", entry(dtype="F8_XYZ"), "dtype F8_XYZ"),
    Case("entry a number", lambda m: m.header(lambda h: h.update({MIXER: 3})), "malformed"),
    Case("name of two lines", lambda m: m.header(lambda h: h.update({"a\nb\x1b[31m" + "c" * 9000: 3})), "tensor a b [31mccc"),
    Case("integer weights", lambda m: m.tensors(lambda t: t.update({MIXER: ("I16", *t[MIXER][1:])})), "dtype I16"),
    Case("missing tensor", lambda m: m.tensors(lambda t: t.pop(MIXER)), f"no tensor {MIXER}"),
    Case("tensor too many", lambda m: m.tensors(lambda t: t.update(extra=("F32", (1,), b"1234"))), "such as extra"),
    Case("wrong shape", lambda m: m.tensors(lambda t: t.update({MIXER: ("F32", (1,), b"1234")})), "has shape [1]"),
    Case("NaN", lambda m: m.tensors(all_values(float("nan"))), "final_layernorm.weight has NaN"),
    Case("infinity", lambda m: m.tensors(all_values(float("inf"))), "final_layernorm.weight has NaN or infinite"),
    Case("no weights", lambda m: m.without("model.safetensors"), "no model.safetensors"),
    Case("weights a folder", lambda m: m.folder("model.safetensors"), "cannot be read"),
    Case("another lm_head", lambda m: m.tensors(scaled("model.embed_tokens.weight", "lm_head.weight")), "lm_head.weight differ"),
    Case(
        "shared block twice, different",
        lambda m: m.tensors(
            scaled(*(f"model.layers.{i}.shared_transformer.self_attn.q_proj.weight" for i in (2, 6)))
        ),
        "6.shared_transformer.self_attn.q_proj.weight differ",
    ),
]  # fmt: skip
INDEX = [
    Case("index names a missing file", lambda m: m.index(lambda i: i["weight_map"].update(x="gone.safetensors")), "does not exist"),
    Case("index goes up", lambda m: m.index(lambda i: i["weight_map"].update(x="../x.safetensors")), "plain file name"),
    Case("index names an absolute path", lambda m: m.index(lambda i: i["weight_map"].update(x="/etc/passwd")), "plain file name"),
    Case("index names nothing", lambda m: m.index(lambda i: i["weight_map"].update(x="")), "plain file name"),
    Case("index names a number", lambda m: m.index(lambda i: i["weight_map"].update(x=7)), "plain file name"),
    Case("index names NUL", lambda m: m.index(lambda i: i["weight_map"].update(x="a\0b")), "plain file name"),
    Case("index without map", lambda m: m.index(lambda i: i.clear()), "has no weight_map"),
    Case("index of a missing tensor", lambda m: m.index(lambda i: i["weight_map"].update(x="0.safetensors")), "has no tensor x"),
    Case("index not JSON", lambda m: (m.index(), m.text("model.safetensors.index.json", "{"))[1], "not valid JSON"),
    Case(
        "truncated shard",
        lambda m: (m.index(), (m.path / "1.safetensors").write_bytes((m.path / "1.safetensors").read_bytes()[:-1]), m.command)[2],
        "1.safetensors is not a complete safetensors file",
    ),
]  # fmt: skip
CONFIG = [
    Case("no config", lambda m: m.without("config.json"), "config.json does not exist"),
    Case("config not JSON", lambda m: m.text("config.json", "{hidden_size: 3}"), "not valid JSON"),
    Case("config a list", lambda m: m.json("config.json", []), "holds a JSON list"),
    Case("config nested", lambda m: m.text("config.json", '{"a":' * 90_000), "not valid JSON"),
    Case("another model's config", lambda m: m.config(model_type="llama"), "model_type is 'llama'"),
    Case("old config", lambda m: m.json("config.json", {"model_type": "zamba2", "lora_rank": 128}), "old Zamba2 format"),
    Case("config against itself", lambda m: m.config(hybrid_layer_ids=[1]), "they must agree"),
    Case("config against the weights", lambda m: m.config(vocab_size=1025), "embed_tokens.weight has shape"),
    Case("huge size", lambda m: m.config(hidden_size=10**30), "hidden_size"),
    Case("not quite as huge size", lambda m: m.config(vocab_size=1 << 24), "embed_tokens.weight has shape"),
    Case("millions of layers", lambda m: m.config(num_hidden_layers=1 << 24, layers_block_type=None, hybrid_layer_ids=[]), "layers"),
    Case("number of ten thousand digits", lambda m: m.text("config.json", '{"hidden_size": ' + "9" * 10_000 + "}"), "not valid JSON"),
]  # fmt: skip
STANDALONE = [
    Case(".pt that runs a program", attack, "not a safe PyTorch file"),
    Case(".pt that runs a program, zipped", zipped_attack, "not a safe PyTorch file"),
    Case(".pt of random bytes", lambda m: m.standalone(bytes(range(256)) * 9), "not a safe PyTorch file"),
    Case(".pt of no bytes", lambda m: m.standalone(b""), "not a safe PyTorch file"),
    Case(".pt cut off", lambda m: m.standalone(saved({"a": torch.zeros(999)})[:-600]), "not a safe PyTorch file"),
    Case(".pt without tensors", lambda m: m.standalone(saved({"a": 1})), "does not hold named tensors"),
    Case(".pt of other shapes", lambda m: m.standalone(saved({"a": torch.zeros(1)}), config=False), "none of the published shapes"),
    Case(".pt of other tensors", lambda m: m.standalone(saved(dict.fromkeys("abcdefgh", torch.zeros(1)))), "no tensor embedding.weight"),
]  # fmt: skip
TEXT = [
    Case("no tokenizer", lambda m: m.without("tokenizer.json"), "has no tokenizer.json"),
    Case("corrupt tokenizer", lambda m: m.text("tokenizer.json", "{}"), "tokenizer.json is not a tokenizer"),
    Case("template raises", lambda m: m.template("{{ raise_exception('no\nway') }}"), "refuses this conversation: no way"),
    Case("template for ever", lambda m: m.template("{% for a in range(99999) %}" * 2 + "{% endfor %}" * 2), "was stopped"),
    Case("template not Jinja", lambda m: m.template("{% for %}"), "not valid Jinja"),
    Case("empty prompt", command("generate", ""), "prompt is empty"),
    Case("empty input", command("generate"), "prompt is empty"),
    Case("empty prompt file", lambda m: m.file(b"", "--file"), "prompt is empty"),
    Case("prompt file missing", command("generate", "--file", "/nowhere/to/be"), "/nowhere/to/be cannot be read"),
    Case("prompt file a folder", command("generate", "--file", "/"), "/ cannot be read"),
    Case("prompt file not UTF-8", lambda m: m.file(b"ab\xff", "--file"), "not UTF-8 text (byte 2)"),
    Case("prompt not UTF-8", command("generate", os.fsdecode(b"\xfcben")), "a byte that is not UTF-8 (U+DCFC at character 0)"),
    Case("input not UTF-8", command("generate", "-"), "standard input is not UTF-8", stdin=b"\xff"),
    Case("file beside a prompt", lambda m: m.file(b"hi", "text", "--file"), "give one of them"),
    Case("messages beside a prompt", lambda m: m.file(b"[]", "text", "--messages"), "give one of them"),
    Case("messages missing", command("generate", "--messages", "/nowhere"), "zamba2: /nowhere cannot be read"),
    Case("messages not JSON", lambda m: m.file(b"[", "--messages"), "a list of {role, content} objects is needed"),
    Case("messages nested", lambda m: m.file(b"[" * 90_000, "--messages"), "is not valid JSON"),
    Case("messages empty", lambda m: m.file(b"[]", "--messages"), "messages is empty"),
    Case("messages an object", lambda m: m.file(b"{}", "--messages"), "a list of"),
    Case("unknown role", lambda m: m.file(b'[{"role": "pope", "content": ""}]', "--messages"), "has role 'pope'"),
    Case("content a number", lambda m: m.file(b'[{"role": "user", "content": 1}]', "--messages"), "content of type int"),
    Case("system without chat", options("--system", "x"), "--system needs a chat"),
]  # fmt: skip
OPTIONS = [
    Case("zero tokens", options("--max-tokens", "0"), "max_tokens is 0"),
    Case("negative tokens", options("--max-tokens=-1"), "max_tokens is -1"),
    Case("tokens a word", options("--max-tokens", "many"), "--max-tokens"),
    Case("temperature NaN", options("--temperature", "nan"), "temperature is nan"),
    Case("temperature infinite", options("--temperature", "inf"), "temperature is inf"),
    Case("temperature negative", options("--temperature=-1"), "temperature is -1.0"),
    Case("top-p above 1", options("--top-p", "1.5"), "top_p is 1.5"),
    Case("top-p negative", options("--top-p=-0.1"), "top_p is -0.1"),
    Case("top-k negative", options("--top-k=-1"), "top_k is -1"),
    Case("seed negative", options("--seed=-1"), "seed is -1"),
    Case("repetition penalty zero", options("--repetition-penalty", "0"), "repetition_penalty is 0.0"),
    Case("bias without number", options("--logit-bias", "5"), "--logit-bias is '5'"),
    Case("bias not a number", options("--logit-bias", "5=nan"), "logit_bias[5] is nan"),
    Case("bias of an unknown token", options("--logit-bias", "99999=1"), "logit_bias names token 99999"),
    Case("every token banned", options(*(f"--logit-bias={i}=-inf" for i in range(1024))), "bans every token"),
    Case("empty stop", options("--stop", ""), "texts that are not empty are needed"),
    Case("logprobs without JSON", options("--logprobs", "2"), "--logprobs needs --json"),
    Case("too many logprobs", options("--logprobs", "999", "--json"), "logprobs is 999"),
    Case("unknown option", options("--nonsense"), "No such option: --nonsense"),
    Case("unknown command", command("regenerate"), "No such command 'regenerate'"),
    Case("argument too many", options("more"), "unexpected extra argument"),
    Case("argument too few", command("download"), "Missing argument"),
    Case("unknown --dtype", options("--dtype", "int4"), "dtype is 'int4'"),
    Case("unknown --device", options("--device", "abacus"), "device 'abacus' cannot be used"),
    Case("device without memory", options("--device", "meta"), "device 'meta' cannot be used"),
    Case("unknown alias", options("--model", "3b"), "'3b' is no folder here"),
    Case("folder missing", options("--model", "./nowhere"), "nowhere does not exist"),
    Case("model a text file", lambda m: [*m.command[:-1], str(m.path / "config.json")], "config.json is a file"),
    Case("not downloaded", options("--model", "2.7b", "--offline"), "not fully in the download cache"),
    Case("revision of a folder", options("--revision", "v1"), "only Hub repositories have revisions"),
    Case("info of nothing", command("info", "./nowhere"), "nowhere does not exist"),
    Case("chat with a bad option", command("chat", "--top-p", "7"), "top_p is 7.0"),
]
CASES = WEIGHTS + INDEX + CONFIG + STANDALONE + TEXT + OPTIONS


def files_under(path: Path) -> set[Path]:
    return {file for file in path.rglob("*")}


def complaints(standard_error: str) -> list[str]:
    """The lines but the notice that a model with random weights gives."""
    return [line for line in standard_error.splitlines() if not line.startswith(RANDOM_WEIGHTS)]


@pytest.fixture
def spoiled(tmp_path: Path) -> Spoiled:
    return Spoiled(tmp_path)


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in CASES])
def test_one_line_and_exit_code_2(
    case: Case, spoiled: Spoiled, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad input gives one line that says what is wrong, exit code 2, nothing on standard output and no file."""
    arguments = case.prepare(spoiled)
    before = files_under(spoiled.home)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(case.stdin)))
    started = time.process_time()  # which stands still while others have the processor
    assert run(arguments) == 2
    assert time.process_time() - started < 10
    out, err = capsys.readouterr()
    lines = complaints(err)
    assert len(lines) == 1, err
    assert lines[0].startswith("zamba2: ") and case.said in lines[0] and len(lines[0]) < 1100
    assert "Traceback" not in err and out == ""
    assert files_under(spoiled.home) == before, "no program ran and nothing was left behind"


def test_the_table_is_sound(spoiled: Spoiled) -> None:
    """Without the spoiling the same checkpoints load, so that each case fails for its own reason alone."""
    assert len({case.name for case in CASES}) == len(CASES) >= 45
    same = zamba2.load(spoiled.path).generate("hi", max_tokens=3).tokens
    spoiled.header(lambda header: None)
    assert zamba2.load(spoiled.path).generate("hi", max_tokens=3).tokens == same
    spoiled.tensors(lambda tensors: None)
    assert zamba2.load(spoiled.path).generate("hi", max_tokens=3).tokens == same
    spoiled.index()
    assert zamba2.load(spoiled.path).generate("hi", max_tokens=3).tokens == same


def test_attacks_would_run(tmp_path: Path) -> None:
    """The two pickles that the table holds do run a program where code from files is allowed."""
    pickle.loads(pickle.dumps({"model": Attack(f"touch {tmp_path / 'plain'}")}))
    torch.load(io.BytesIO(saved({"model": Attack(f"touch {tmp_path / 'zipped'}")})), weights_only=False)
    assert (tmp_path / "plain").exists() and (tmp_path / "zipped").exists()


def test_token_ids_need_no_tokenizer(spoiled: Spoiled) -> None:
    """Without tokenizer.json token ids still work, text is refused by one sentence, and a stop text too."""
    spoiled.without("tokenizer.json")
    model = zamba2.load(spoiled.path)
    with_tokenizer = zamba2.load("random").generate([1, 40, 41], max_tokens=3, ignore_eos=True)
    result = model.generate([1, 40, 41], max_tokens=3)
    assert result.tokens == with_tokenizer.tokens and result.text == ""
    for call in (
        lambda: model.generate("hi"),
        lambda: model.chat([{"role": "user", "content": "hi"}]),
        lambda: model.conversation(),
        lambda: model.generate([1], stop="x"),
    ):
        with pytest.raises(Zamba2Error, match="tokenizer"):
            call()


BAD_CALLS: dict[str, Callable[[Any], object]] = {
    "token below 0": lambda m: m.generate([1, -1]),
    "token beyond the vocabulary": lambda m: m.generate([1, 1024]),
    "token of 70 bits": lambda m: m.generate([1, 1 << 70]),
    "tokens of 64 bits": lambda m: m.generate([1 << 63]),
    "tokens not whole": lambda m: m.generate([1.5]),
    "tokens of nothing": lambda m: m.generate([None]),
    "tokens in lists of unequal lengths": lambda m: next(m.stream([[1], [2, 3]])),
    "a text beside a token": lambda m: m.generate(["a", 1]),
    "tokens in a square": lambda m: m.generate(torch.ones(2, 2, dtype=torch.int64).numpy()),
    "no tokens": lambda m: m.generate([]),
    "no tokens in a batch": lambda m: m.generate([[1], []]),
    "unknown option": lambda m: m.generate([1], temprature=1),
    "max_tokens a float": lambda m: m.generate([1], max_tokens=2.0),
    "stop a number": lambda m: m.generate([1], stop=5),
    "stop empty": lambda m: m.generate([1], stop=""),
    "logprobs negative": lambda m: m.generate([1], logprobs=-1),
    "logit_bias a list": lambda m: m.generate([1], logit_bias=[1]),
    "adapter": lambda m: m.generate([1], adapter="mine"),
    "half a surrogate pair": lambda m: m.generate("\ud800"),
    "messages a text": lambda m: m.chat("hi"),
    "messages empty": lambda m: m.chat([]),
    "format": lambda m: zamba2.load("random", format="q3"),
    "backend": lambda m: zamba2.load("random", backend="abacus"),
    "threads a text": lambda m: zamba2.load("random", threads="2"),
    "threads in halves": lambda m: zamba2.load("random", threads=1.5),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return zamba2.load("random")


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_from_python(name: str, model: Any) -> None:
    """From Python, too, what the caller can mend is a Zamba2Error of one sentence."""
    with pytest.raises(Zamba2Error) as caught:
        BAD_CALLS[name](model)
    assert "\n" not in str(caught.value)


# ---- saved conversations ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talk(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved conversation of two messages."""
    path = tmp_path_factory.mktemp("talk") / "talk"
    conversation = model.conversation()
    list(conversation.say("hi", max_tokens=2))
    conversation.save(path)
    return path


def write_metadata(talk: Path, text: str) -> bytes:
    """The saved conversation with another text about it."""
    target = talk.with_name("changed")
    write_tensors(target, entries(stored_tensors(talk)), {"zamba2": text})
    return target.read_bytes()


def about(talk: Path, **changes: Any) -> bytes:
    """The saved conversation with other facts about it."""
    return write_metadata(talk, json.dumps(json.loads(TensorFile(talk).metadata["zamba2"]) | changes))


def note(talk: Path, **changes: Any) -> bytes:
    facts = json.loads(json.loads(TensorFile(talk).metadata["zamba2"])["note"])
    return about(talk, note=json.dumps(facts | changes))


def with_nan(talk: Path) -> bytes:
    data = bytearray(talk.read_bytes())
    entry = TensorFile(talk).entries["ssm"]
    data[entry.start : entry.start + 4] = struct.pack("<f", float("nan"))
    return bytes(data)


BAD_STATES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "truncated": (lambda t: t.read_bytes()[:-1], "not a complete safetensors file"),
    "random bytes": (lambda t: bytes(range(200)), "not a complete safetensors file"),
    "empty": (lambda t: b"", "not a complete safetensors file"),
    "a checkpoint": (lambda t: (RANDOM / "model.safetensors").read_bytes(), "is not a saved Zamba2 state"),
    "of another version": (lambda t: about(t, version=99), "version 99"),
    "of another model": (lambda t: about(t, model="x"), "another model"),
    "nested": (lambda t: write_metadata(t, "[" * 90_000), "is not a saved Zamba2 state"),
    "NaN": (with_nan, "not finite"),
    "of another length": (lambda t: about(t, position=5), "is needed"),
    "position below 0": (lambda t: about(t, position=-1), "position as -1"),
    "no conversation": (lambda t: about(t, note=""), "no conversation"),
    "half a conversation": (lambda t: note(t, text=None), "not a complete saved conversation"),
    "unread token out of range": (lambda t: note(t, unread=[1024]), "not a complete saved conversation"),
    "read token out of range": (lambda t: note(t, history=[1024]), "not a complete saved conversation"),
    "unknown role": (lambda t: note(t, messages=[{"role": "pope", "content": ""}]), "role 'pope'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_STATES)
def test_bad_saved_conversation(name: str, model: Any, talk: Path, tmp_path: Path) -> None:
    """Loading a damaged or foreign file is refused and the present conversation goes on as if it had not been tried."""
    spoil, said = BAD_STATES[name]
    (tmp_path / "bad").write_bytes(spoil(talk))
    conversation = model.conversation("Be brief.")
    list(conversation.say("hello", max_tokens=2))
    before = (conversation.messages, conversation.text, conversation.unread, conversation.state.position)
    with pytest.raises(Zamba2Error, match=said) as caught:
        conversation.load(tmp_path / "bad")
    assert "\n" not in str(caught.value)
    assert (conversation.messages, conversation.text, conversation.unread, conversation.state.position) == before
    assert len(list(conversation.say("go on", max_tokens=2))) == 2


def test_the_unspoiled_conversation_loads(model: Any, talk: Path) -> None:
    """The file that those cases spoil is itself in order."""
    conversation = model.conversation()
    conversation.load(talk)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    (talk.parent / "same").write_bytes(about(talk))
    conversation.load(talk.parent / "same")


# ---- writing ---------------------------------------------------------------------------------------------------------

Writer = Callable[[Path], object]


@pytest.fixture(scope="module")
def writers(model: Any) -> dict[str, Writer]:
    conversation = model.conversation()
    list(conversation.say("hi", max_tokens=2))
    loaded = load_model(RANDOM)  # before a test takes away what may be read
    return {"conversation": conversation.save, "checkpoint": lambda path: save_checkpoint(loaded, path)}


@contextmanager
def full_disk() -> Iterator[None]:
    """Files end at 20 kB; Python ignores the signal and sees an error, as on a full disk.

    Only around the call under test: the limit would also hold for the file that pytest's own output may go to.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("what", ["conversation", "checkpoint"])
def test_full_disk(what: str, writers: dict[str, Writer], tmp_path: Path) -> None:
    """A disk that is full in the middle of a file leaves nothing behind, not even what was there before damaged."""
    target = tmp_path / "target"
    if what == "conversation":
        target.write_bytes(b"earlier")
    with pytest.raises(Zamba2Error, match="cannot be written"), full_disk():
        writers[what](target)
    assert files_under(tmp_path) == ({target} if what == "conversation" else set())
    assert what != "conversation" or target.read_bytes() == b"earlier"


@pytest.mark.parametrize("what", ["conversation", "checkpoint"])
def test_no_space_at_the_last_moment(what: str, writers: dict[str, Writer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one that is found full only when the file is given to the disk."""

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Zamba2Error, match="No space left on device"):
        writers[what](tmp_path / "target")
    assert files_under(tmp_path) == set()


@pytest.mark.parametrize("what", ["conversation", "checkpoint"])
def test_places_that_cannot_be_written(what: str, writers: dict[str, Writer], tmp_path: Path) -> None:
    """A path under a file, a name that is none and one too long are refused."""
    (tmp_path / "file").write_bytes(b"x")
    for place in (tmp_path / "file" / "x", Path("/"), Path("."), tmp_path / ("x" * 300)):
        with pytest.raises(Zamba2Error):
            writers[what](place)
    assert files_under(tmp_path) == {tmp_path / "file"}


@pytest.mark.parametrize("what", ["conversation", "checkpoint"])
def test_full_folder(what: str, writers: dict[str, Writer], tmp_path: Path) -> None:
    """A folder with something in it is never replaced."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    with pytest.raises(Zamba2Error):
        writers[what](tmp_path / "full")
    assert files_under(tmp_path) == {tmp_path / "full", tmp_path / "full" / "mine"}


@pytest.mark.parametrize("what", ["conversation", "checkpoint"])
def test_read_only_folder(what: str, writers: dict[str, Writer], tmp_path: Path) -> None:
    """A folder without write permission is refused."""
    place = Path("/var/tmp") / f"zamba2-{os.getpid()}-{what}"
    place.mkdir()
    place.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # nobody: permissions mean nothing to root
    try:
        with pytest.raises(Zamba2Error, match="Permission denied"):
            writers[what](place / "target")
    finally:
        if root:
            os.seteuid(0)
        place.chmod(0o755)
        left = files_under(place)
        shutil.rmtree(place)
    assert left == set()


def test_interrupted_writing(tmp_path: Path) -> None:
    """Ctrl-C while a file or folder is written leaves what was there before and nothing else."""
    target = tmp_path / "target"
    target.write_bytes(b"earlier")
    with pytest.raises(KeyboardInterrupt), replacing(target) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "file").write_bytes(b"half")
        raise KeyboardInterrupt
    assert files_under(tmp_path) == {target} and target.read_bytes() == b"earlier"


# ---- arbitrary bytes -------------------------------------------------------------------------------------------------


def read_all(path: Path) -> None:
    file = TensorFile(path)
    for name in file.entries:
        assert bytes(file.read(name)) == bytes(file.map(name))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
ENTRY = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "U8", "X"]) | JSON},
    optional={
        "shape": st.lists(st.integers(-1, 4) | st.integers(), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40) | st.integers(), min_size=2, max_size=2) | JSON,
    },
)


@settings(max_examples=300)
@given(header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRY | JSON), data=st.binary(max_size=40))
def test_any_header(header: dict[str, Any], data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever JSON a header holds, the file is read without touching bytes outside it, or refused."""
    path = tmp_path_factory.getbasetemp() / "any-header"
    path.write_bytes(with_header(json.dumps(header).encode(), data=data))
    try:
        read_all(path)
    except Zamba2Error as error:
        assert str(path) in str(error)


@settings(max_examples=300)
@given(start=st.sampled_from([b"", struct.pack("<Q", 20), struct.pack("<Q", 0)]), data=st.binary(max_size=60))
def test_any_bytes(start: bytes, data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Random bytes are refused."""
    path = tmp_path_factory.getbasetemp() / "any-bytes"
    path.write_bytes(start + data)
    with pytest.raises(Zamba2Error):
        read_all(path)


def spoil_bytes(data: bytes, edits: list[tuple[int, int]], cut: int) -> bytes:
    spoiled = bytearray(data)
    for place, value in edits:
        spoiled[place % len(spoiled)] = value
    return bytes(spoiled[: len(spoiled) - cut % len(spoiled)])


EDITS = st.lists(st.tuples(st.integers(0, 600) | st.integers(0, 1 << 30), st.integers(0, 255)), max_size=4)


@settings(max_examples=150)
@given(edits=EDITS, cut=st.just(0) | st.integers(0, 1 << 30))
def test_mutated_files(edits: list[tuple[int, int]], cut: int, talk: Path, model: Any) -> None:
    """A valid saved conversation with some bytes changed is loaded or refused, never more."""
    target = talk.with_name("mutated")
    target.write_bytes(spoil_bytes(talk.read_bytes(), edits, cut))
    conversation: Conversation = model.conversation()
    try:
        read_all(target)
        conversation.load(target)
    except Zamba2Error:
        assert not conversation.messages


@settings(max_examples=150)
@given(edits=EDITS, cut=st.just(0) | st.integers(0, 1 << 30))
def test_mutated_pickles(edits: list[tuple[int, int]], cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A .pt file with some bytes changed is read or refused, never more."""
    target = tmp_path_factory.getbasetemp() / "mutated.pt"
    target.write_bytes(spoil_bytes(PICKLED, edits, cut))
    try:
        source = StandaloneSource(target)
    except Zamba2Error as error:
        assert "\n" not in str(error)
    else:
        assert source.data


PICKLED = saved({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)})


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-m", "zamba2", *arguments], env=os.environ | environment, text=True, **pipes)


def finish(process: subprocess.Popen[str], *, feed: str | None = None) -> tuple[int, str, str]:
    with process:  # whose pipes would trouble a later test
        try:
            out, err = process.communicate(feed, timeout=30)
        finally:
            process.kill()
    return process.returncode, out, err


def check_interrupted(process: subprocess.Popen[str], *, may_be_done: bool = False) -> str:
    try:
        code, _, err = finish(process)
    except subprocess.TimeoutExpired as error:  # Python drops what is raised in a callback of its imports' locks, until we handle Ctrl-C
        assert b"Exception ignored in: <function _get_module_lock" in (error.stderr or b""), error.stderr
        return "early"
    if "Traceback" in err or code in (-signal.SIGINT, 1):  # the interpreter was still starting: nothing of ours could catch it
        assert 'zamba2/__main__.py", line' not in err, err  # a frame; an editable install's own lines name every file
        return "early"
    if code == 0 and may_be_done:
        return "done"
    assert code == 2 and complaints(err) == ["zamba2: interrupted."], (code, err)
    return "interrupted"


def test_interrupt_while_starting() -> None:
    """Ctrl-C while Python, the package, PyTorch and the model are imported: one line and exit code 2."""
    ends = []
    for delay in (0.02, 0.08, 0.15, 0.25, 0.4, 0.55, 0.7, 0.9, 1.1, 1.4):
        process = start("generate", "Once upon a time", "-n", "100000", "--ignore-eos", "--dtype", "bfloat16", "-m", "random")
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        ends.append(check_interrupted(process))
    assert ends.count("interrupted") >= 5, ends


def test_interrupt_inside_an_extension(tmp_path: Path) -> None:
    """Ctrl-C inside a module that swallows exceptions, as C++ may, still ends the program."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    pass\n__version__ = '1.0'\n"
    )
    folders = os.pathsep.join([str(tmp_path), str(Path(zamba2.__file__).parent.parent)])
    process = start("generate", "hi", "--dtype", "bfloat16", "-m", "random", PYTHONPATH=folders)
    assert check_interrupted(process) == "interrupted"


def test_interrupt_under_nohup() -> None:
    """Where Ctrl-C is ignored from outside, it stays ignored."""
    command = f"trap '' INT; exec {sys.executable} -m zamba2 generate hi -n 5 -m random"
    process = subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(5):
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 0 and out.strip() and "5 new" in err


def test_interrupt_of_help() -> None:
    """Ctrl-C while the help is made: one line, or the help was already there."""
    for delay in (0.04, 0.07, 0.1, 0.13):
        process = start("generate", "--help")
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        check_interrupted(process, may_be_done=True)


def test_interrupt_after_the_first_words() -> None:
    """Ctrl-C while text streams: what was said stays on standard output, then one line and exit code 2."""
    process = start("generate", "Once upon a time", "-n", "3000", "--ignore-eos")
    assert process.stdout is not None and process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # people press it twice
    assert check_interrupted(process) == "interrupted"


def test_interrupt_of_a_chat() -> None:
    """Ctrl-C ends a chat that reads from a pipe, in a reply and while it waits for a message."""
    process = start("chat", "-n", "3000", "-m", "random")
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdin.write("Tell me everything.\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    assert check_interrupted(process) == "interrupted"
    process = start("chat", "-n", "2")
    assert process.stdin is not None and process.stderr is not None
    process.stdin.write("hi\n")
    process.stdin.flush()
    assert any("first after" in line for line in iter(process.stderr.readline, "")), "the reply came; it waits"
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert check_interrupted(process) == "interrupted"


FIRST_REPLY = """
import sys
from zamba2.cli import run
from zamba2.commands import chat
before, raising = set(), chat.interrupts_raise
chat.interrupts_raise = lambda: (before.update(sys.modules), raising())
run(["chat", "-n", "3"])
print(sorted(name for name in set(sys.modules) - before if not name.startswith("encodings.")))
"""


def test_nothing_is_imported_where_ctrl_c_raises() -> None:
    """An import that Ctrl-C cuts short cannot be done again, so a chat's replies import nothing."""
    ours, theirs = os.openpty()
    done = subprocess.run([sys.executable, "-c", FIRST_REPLY], input=b"hi\nand\n", stdout=subprocess.PIPE, stderr=theirs, timeout=60)
    os.close(theirs)
    os.close(ours)
    assert done.stdout.splitlines()[-1] == b"[]"


def test_ignored_interrupts_of_a_chat() -> None:
    """Where Ctrl-C is ignored from outside, a chat's replies ignore it too."""
    program = ["sh", "-c", f"trap '' INT; exec {sys.executable} -m zamba2 chat -n 3 -m random"]
    process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("hi\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process, feed="go on\n")
    assert code == 0 and err.count("first after") == 2


def test_interrupt_of_a_download(tmp_path: Path) -> None:
    """Ctrl-C while a Hub is silent ends the program at once, and so does one during a transfer."""
    with FakeHub({"owner/model": {"main": RANDOM}}) as hub:
        hub.silent = True
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_HUB_ETAG_TIMEOUT": "20"}
        process = start("download", "owner/model", **environment)
        until = time.monotonic() + 20
        while not hub.requests and time.monotonic() < until:
            time.sleep(0.02)
        assert hub.requests
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert check_interrupted(process) == "interrupted"
        assert time.monotonic() - sent < 5


# ---- the ends of pipes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["info", "2.7b"], ["info", "2.7b", "--json"], ["generate", "hi", "-n", "3"]])
def test_standard_output_full(arguments: list[str]) -> None:
    """Standard output on a full disk: one line and exit code 2."""
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "zamba2", *arguments], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert complaints(done.stderr) == ["zamba2: standard output cannot be used (No space left on device)."]


@pytest.mark.parametrize(("arguments", "code"), [([""], 2), (["hi", "-n", "1"], 2), (["hi", "-n", "1", "-m", "random", "--json"], 0)])
def test_standard_error_full(arguments: list[str], code: int) -> None:
    """Standard error on a full disk: the exit code alone says what went wrong, and a notice that cannot be given ends nothing."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "zamba2", "generate", *arguments]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=full, timeout=60)
    assert done.returncode == code


def test_reader_gone() -> None:
    """A reader that leaves early, as head does, is no error."""
    process = start("generate", "hi", "-n", "500", "--ignore-eos")
    assert process.stdout is not None and process.stderr is not None and process.stdout.read(1)
    process.stdout.close()
    assert process.wait(30) == 0 and complaints(process.stderr.read()) == []
    process.stderr.close()
    assert process.stdin is not None
    process.stdin.close()


def test_closed_streams_and_ascii() -> None:
    """Closed standard streams and a terminal that knows ASCII alone do not stop the program."""
    program = f"{sys.executable} -m zamba2"
    shell: dict[str, Any] = {"shell": True, "capture_output": True, "text": True, "timeout": 60}
    closed = subprocess.run(f"{program} generate <&-", **shell)
    assert (closed.returncode, closed.stderr) == (2, "zamba2: the prompt is empty; some text is needed.\n")
    closed = subprocess.run(f"{program} info 2.7b --json >&-", **shell)
    assert (closed.returncode, closed.stderr) == (0, "")
    ascii_only = subprocess.run(f"{program} info 2.7b", env=os.environ | {"PYTHONIOENCODING": "ascii"}, **shell)
    assert ascii_only.returncode == 0 and "? ? ? ? ? ? A" in ascii_only.stdout
