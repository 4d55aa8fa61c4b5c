"""Packed checkpoints from outside: the command, ``zamba2.load``, the cache, no PyTorch at run time, and what is refused in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_hub import FakeHub

import zamba2
from zamba2 import api
from zamba2.cli import run
from zamba2.config import Config
from zamba2.errors import Zamba2Error
from zamba2.language.messages import CHATML
from zamba2.language.model import LanguageModel
from zamba2.runtime.backend import Row
from zamba2.runtime.native import NativeBackend
from zamba2.weights.files import TensorFile, write_tensors
from zamba2.weights.formats import FORMATS
from zamba2.weights.hub import RANDOM
from zamba2.weights.packed import is_packed, parts, quantize

Stored = dict[str, tuple[str, tuple[int, ...], bytes]]  # dtype, shape, bytes of each tensor
NOTICES = ("zamba2: this model has random weights", "zamba2: packing ")


def stored_tensors(path: Path) -> Stored:
    file = TensorFile(path)
    return {name: (entry.dtype, entry.shape, bytes(file.read(name))) for name, entry in file.entries.items()}


def store(path: Path, tensors: Stored, metadata: Mapping[str, str]) -> None:
    def produce(data: bytes) -> Callable[[], list[memoryview]]:
        return lambda: [memoryview(data)]

    write_tensors(path, [(name, dtype, shape, produce(data)) for name, (dtype, shape, data) in tensors.items()], dict(metadata))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is tiny: threads would only wait for each other."""
    monkeypatch.setenv("ZAMBA2_THREADS", "1")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model in q4, packed by the command."""
    target = tmp_path_factory.mktemp("packed") / "q4"
    assert run(["quantize", str(RANDOM), str(target), "--format", "q4"]) == 0
    return target


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, list[str]]:
    """Exit code, standard output and lines of standard error without notices."""
    capsys.readouterr()
    code = run(arguments)
    out, err = capsys.readouterr()
    return code, out, [line for line in err.splitlines() if not line.startswith(NOTICES)]


@pytest.mark.parametrize("format", FORMATS)
def test_command(format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``quantize`` writes a folder that ``generate`` takes: complete, with tokenizer and mark of randomness, of the size it says."""
    target = tmp_path / "out"
    code, out, err = told(capsys, "quantize", str(RANDOM), str(target), "--format", format)
    assert (code, err) == (0, [])
    size = sum(path.stat().st_size for path in target.iterdir())
    assert out.startswith(f"{target}: {size / 1e9:.3g} GB, ")
    assert out.endswith(f"{FORMATS[format].bits} bits a weight" + (", embeddings 8.5\n" if format == "q4" else "\n"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    small = {path.name for path in RANDOM.iterdir() if path.name.startswith(("tokenizer", "chat_template", "generation_config"))}
    assert {path.name for path in target.iterdir()} >= {"config.json", "model.safetensors", *small}
    model = zamba2.load(target)
    assert isinstance(model.backend, NativeBackend)
    assert model.backend.format is FORMATS[format]
    assert model.is_random
    plan, file = parts(model.backend.config), TensorFile(target / "model.safetensors")
    assert list(file.entries) == [part.name for part in plan]
    code, out, err = told(capsys, "generate", "hi", "-n", "3", "--model", str(target))
    assert (code, out) == (0, model.generate("hi", max_tokens=3).text + "\n")
    assert [line for line in err if not line.startswith("[3 prompt tokens")] == []


def test_runs_without_torch(packed: Path) -> None:
    """Loading a packed checkpoint and generating import no torch, not even where it is installed."""
    code = (
        "import sys, zamba2; sys.modules['torch'] = None\n"
        "model = zamba2.load(sys.argv[1])\n"
        "assert len(model.generate('hi', max_tokens=3).tokens) <= 3\n"
        "print(type(model.backend).__name__, sys.modules['torch'], any(name.startswith('torch.') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(packed)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["NativeBackend", "None", "False"]


def test_format_packs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """format= packs into the user's cache on first use, says so, and reuses it; another format and a changed source pack anew. The small
    files of a checkpoint come along."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, cache = tmp_path / "source", tmp_path / "cache" / "zamba2" / "packed"
    shutil.copytree(RANDOM, source)
    small = {"chat_template.jinja": CHATML, "special_tokens_map.json": "{}"}
    for name, text in small.items():
        (source / name).write_text(text)
    counts, packings = [], []
    for format in ("q8", "q8", "q4", "q8", None):
        if format is None:
            os.utime(source / "model.safetensors", (1, 1))
        model = zamba2.load(source, format=format or "q8")
        assert isinstance(model.backend, NativeBackend)
        assert model.backend.format.name == (format or "q8")
        counts.append(len(list(cache.iterdir())))
        packings.append("packing" in capsys.readouterr().err)
    assert counts == [1, 1, 2, 2, 3]
    assert packings == [True, False, True, False, True]
    assert all((copy / name).read_text() == text for copy in cache.iterdir() for name, text in small.items())


def test_default_on_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a GPU a checkpoint runs on the native engine: a small one as bf16 and without a trace, a larger one as q4, packed
    into the cache once, which a notice explains. A device or dtype, and backend="torch", give PyTorch, without packing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    small = zamba2.load(RANDOM)
    assert isinstance(small.backend, NativeBackend) and small.backend.format.name == "bf16"
    assert list(tmp_path.iterdir()) == []
    assert small.generate("hi", max_tokens=3).tokens == zamba2.load(RANDOM, format="bf16").generate("hi", max_tokens=3).tokens
    capsys.readouterr()
    monkeypatch.setattr(api, "SMALL", 1000)
    for first in (True, False):
        large = zamba2.load(RANDOM)
        assert isinstance(large.backend, NativeBackend) and large.backend.format.name == "q4"
        assert bool(re.search("packing .* as q4 .*format q8 or bf16", capsys.readouterr().err)) is first
    kept = sorted((tmp_path / "cache").rglob("*"))
    for options in ({"device": "cpu"}, {"dtype": "float32"}, {"backend": "torch"}):
        assert type(zamba2.load(RANDOM, **options).backend).__name__ == "TorchBackend"
    with pytest.raises(Zamba2Error, match="for the native engine"):
        zamba2.load(RANDOM, dtype="float32", threads=2)
    assert sorted((tmp_path / "cache").rglob("*")) == kept


def test_thread_options(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--threads and --pin change no word; a count that is none, and either for PyTorch, is refused in one line."""
    line = ["generate", "hi", "-n", "3", "--model", str(packed)]
    expected = told(capsys, *line)[1]
    for options in (["--threads", "2"], ["--threads", "1", "--pin"]):
        assert told(capsys, *line, *options)[:2] == (0, expected)
    for options in (["--threads", "0"], ["--threads", "many"], ["--threads", "1025"], ["--threads", "1", "--dtype", "float32"]):
        code, out, err = told(capsys, *line, *options)
        assert (code, out, len(err)) == (2, "", 1), err
    code, _, err = told(capsys, "generate", "hi", "--model", "random", "--threads", "2", "--dtype", "float32")
    assert code == 2 and "for the native engine" in err[0]


@pytest.mark.parametrize(("driver", "finds", "backend"), [(True, True, "torch"), (True, False, "native"), (False, True, "native")])
def test_default_with_a_gpu(driver: bool, finds: bool, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch is the default where a GPU's driver is there and PyTorch can use it; it is not asked where there is no driver."""
    import torch

    monkeypatch.setattr(api, "GPU_DRIVERS", (str(tmp_path if driver else tmp_path / "none"),))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: finds)
    assert api.backend_for(RANDOM) == backend
    assert api.backend_for(None) == backend


def test_packed_repository_on_the_hub(packed: Path, tmp_path: Path) -> None:
    """A packed folder uploaded to the Hub runs from there: its files alone are fetched, and nothing is packed."""
    upload = tmp_path / "upload"
    shutil.copytree(packed, upload)
    (upload / "README.md").write_text("a card")
    (upload / "original.pt").write_bytes(bytes(100))
    with FakeHub({"me/zamba2-q4": {"main": upload}}) as server:
        environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "zamba2", "generate", "hi", "-n", "3", "--model", "me/zamba2-q4"]
        environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)
        fetched = {line.rpartition("/")[2] for line in server.requests if line.startswith("GET") and "/resolve/" in line}
    assert (done.returncode, done.stdout) == (0, zamba2.load(packed).generate("hi", max_tokens=3).text + "\n"), done.stderr
    assert fetched == {path.name for path in packed.iterdir()}
    assert "packing" not in done.stderr and not (tmp_path / "cache").exists()


SLOWLY = """
import os, signal, sys, time
from zamba2.weights import packed
before = packed.pack
def slowly(*arguments):
    print("packing", flush=True)
    time.sleep(0.2)
    return before(*arguments)
packed.pack = slowly
from zamba2 import __main__, api
api.SMALL = 1
sys.argv = ["zamba2", *sys.argv[1:]]
__main__.main()
"""


def test_folders_beside_the_tokenizer(tmp_path: Path) -> None:
    """A folder in the checkpoint whose name begins like a tokenizer's file is left where it is, and packing goes on."""
    shutil.copytree(RANDOM, tmp_path / "model")
    (tmp_path / "model" / "tokenizer_old").mkdir()
    quantize(tmp_path / "model", tmp_path / "packed", FORMATS["q8"])
    assert {file.name for file in RANDOM.iterdir()} == {file.name for file in (tmp_path / "packed").iterdir()}


def test_no_place_for_temporary_files(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a machine where nothing can be written the sentence about it names TMPDIR, and not standard output."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/nowhere"])
    code, _, err = told(capsys, "generate", "hi", "-n", "1", "-m", "random")
    assert code == 2 and "set TMPDIR" in err[-1] and "standard output" not in err[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("command", [["quantize", "random", "TARGET"], ["generate", "hi", "-m", "random"], ["chat", "-m", "random"]])
def test_interrupted_packing_leaves_nothing(command: list[str], number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C while a checkpoint is packed, by hand or on first use, ends the program with one line and leaves no file behind; so
    does an end from outside, of which, on first use, nothing is said."""
    program = [sys.executable, "-c", SLOWLY, *[str(tmp_path / "target") if word == "TARGET" else word for word in command]]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(program, text=True, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)}, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline() == "packing\n"
        assert [path for path in tmp_path.rglob("*") if path.is_file()]
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    said = number == signal.SIGINT or (number == signal.SIGTERM and command[0] == "quantize")
    assert process.returncode == (2 if said else -number)
    assert [line for line in err.splitlines() if not line.startswith(NOTICES)] == ["zamba2: interrupted."] * said
    assert [path for path in tmp_path.rglob("*") if path.is_file() or path.name.endswith(".partial")] == []


READING = """
import sys, time
from zamba2 import __main__
from zamba2.runtime import calibrate
calibrate.second_moments = lambda *_, **__: (print("reading", flush=True), time.sleep(60))
sys.argv = ["zamba2", *sys.argv[1:]]
__main__.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_calibration_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C, or an end from outside, while the text is read: one line, and the model packed for that is gone."""
    (tmp_path / "text").write_text("word " * 1000)
    command = ["quantize", "random", str(tmp_path / "target"), "--calibrate", str(tmp_path / "text")]
    with subprocess.Popen([sys.executable, "-c", READING, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "reading\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (2, "zamba2: interrupted.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_full_disk_while_packing_leaves_nothing(tmp_path: Path) -> None:
    """A disk that is full while a checkpoint is packed on first use gives one line, exit code 2, and no file."""
    code = (
        "import resource, signal, sys; from zamba2 import api; from zamba2.cli import run; api.SMALL = 1\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "sys.exit(run(['generate', 'hi', '--model', 'random']))"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    lines = [line for line in done.stderr.splitlines() if not line.startswith(NOTICES)]
    assert done.returncode == 2 and len(lines) == 1 and "cannot be written" in lines[0], done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_format_of_keys_and_values(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kv= and --kv-format choose the format of keys and values of a packed model; without one they are bf16."""
    assert [zamba2.load(packed, kv=kv).backend.kv.name for kv in (None, "bf16", "q8")] == ["bf16", "bf16", "q8"]  # type: ignore[attr-defined]
    code, out, _ = told(capsys, "generate", "the sea", "--model", str(packed), "--kv-format", "q8", "--max-tokens", "8")
    assert (code, out) == (0, zamba2.load(packed, kv="q8").generate("the sea", max_tokens=8).text + "\n")
    code, _, err = told(capsys, "generate", "the sea", "--model", str(packed), "--kv-format", "q4")
    assert code == 2 and "no format 'q4' of keys and values" in err[0]


def test_streams_and_conversations(packed: Path, tmp_path: Path) -> None:
    """On the native backend streamed text is the whole text, a batch is its prompts alone, a conversation begins as a
    chat does, and a saved one goes on with the same words."""
    model = zamba2.load(packed)
    whole = model.generate("the sea", max_tokens=12)
    assert "".join(piece.text for piece in model.stream("the sea", max_tokens=12)) == whole.text
    batch = model.generate(["the sea", "a", "one two three four five six seven eight nine ten"], max_tokens=5)
    assert [reply.tokens for reply in batch] == [
        model.generate(prompt, max_tokens=5).tokens for prompt in ("the sea", "a", "one two three four five six seven eight nine ten")
    ]
    assert batch[0].tokens == whole.tokens[:5]
    conversation = model.conversation()
    expected = model.chat([{"role": "user", "content": "hi"}], max_tokens=4).text
    assert "".join(piece.text for piece in conversation.say("hi", max_tokens=4)) == expected
    conversation.save(tmp_path / "chat")
    second = [piece.text for piece in conversation.say("and then?", max_tokens=4)]
    loaded = model.conversation()
    loaded.load(tmp_path / "chat")
    assert [piece.text for piece in loaded.say("and then?", max_tokens=4)] == second


def test_native_stays_near_torch(packed: Path) -> None:
    """The default model's next-token distribution in q8 is the PyTorch model's within a KL divergence
    of 0.01, in bf16 of 0.001, in q4 of 0.2."""
    ids = np.arange(40, dtype=np.int32)
    def log_probabilities(model: LanguageModel) -> np.ndarray:
        logits = model.backend.forward([Row(ids, model.backend.new_state(), len(ids))])[0].numpy().astype(np.float64)
        return np.asarray(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))

    expected = log_probabilities(zamba2.load(RANDOM, dtype="float32"))
    for format, bound in (("bf16", 1e-3), ("q8", 0.01), ("q4", 0.2)):
        found = log_probabilities(zamba2.load(RANDOM, format=format))
        divergence = (np.exp(expected) * (expected - found)).sum(-1).mean()
        assert -1e-9 <= divergence <= bound, (format, divergence)


# ---- what is refused ------------------------------------------------------------------------------------------------------


def header(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    """Changes what model.safetensors says of itself."""

    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        metadata, tensors = dict(TensorFile(path).metadata), stored_tensors(path)
        about = json.loads(metadata["zamba2"])
        change(about)
        store(path, tensors, metadata | {"zamba2": json.dumps(about)})

    return spoil


def tensors(change: Callable[[Stored], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        metadata, stored = TensorFile(path).metadata, stored_tensors(path)
        change(stored)
        store(path, stored, dict(metadata))

    return spoil


def truncated(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)


def other_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 3e-5}))


def nan_vector(stored: Stored) -> None:
    dtype, shape, data = stored["final_layernorm.weight"]
    stored["final_layernorm.weight"] = (dtype, shape, b"\0\0\xc0\x7f" + data[4:])


SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncated, "model.safetensors"),
    "another config beside it": (other_config, "another config.json"),
    "a missing tensor": (tensors(lambda t: t.pop("layers.0.mamba.norm.weight")), "no tensor layers.0.mamba.norm.weight"),
    "a tensor of another size": (
        tensors(lambda t: t.update({"embed_tokens.weight": ("U8", (64,), bytes(64))})), "embed_tokens.weight is U8 [64]",
    ),
    "a tensor of another dtype": (
        tensors(lambda t: t.update({"final_layernorm.weight": ("I32", *t["final_layernorm.weight"][1:])})), "final_layernorm.weight is I32",
    ),
    "a NaN": (tensors(nan_vector), "tensor final_layernorm.weight has values that are not finite"),
    "another version": (header(lambda about: about.update(version=99)), "version 99"),
    "an unknown format": (header(lambda about: about.update(format="q3")), "no format 'q3'"),
    "an unknown format of embeddings": (header(lambda about: about.pop("embeddings")), "no format 'None'"),
    "another kind": (header(lambda about: about.update(kind="native state")), "not a packed"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_checkpoint(name: str, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A packed checkpoint that is damaged or not of a kind with its config gives one sentence and exit code 2."""
    spoil, message = SPOILED[name]
    folder = tmp_path / "model"
    shutil.copytree(packed, folder)
    spoil(folder)
    code, out, err = told(capsys, "generate", "hi", "-n", "2", "--model", str(folder))
    assert (code, out, len(err)) == (2, "", 1), err
    assert message in err[0]


def spoil_source(source: Path, value: bytes) -> Path:
    shutil.copytree(RANDOM, source)
    stored = stored_tensors(source / "model.safetensors")
    name = next(name for name in stored if name.endswith("in_proj.weight"))
    dtype, shape, data = stored[name]
    stored[name] = (dtype, shape, value * (len(data) // len(value)))
    store(source / "model.safetensors", stored, {"format": "pt"})
    return source


def test_command_refuses(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``quantize`` refuses NaN and what its format cannot hold, by name, a target in use, an unknown format, a packed source and none at
    all, in one sentence; nothing is left."""
    full, file, target = tmp_path / "full", tmp_path / "file", tmp_path / "target"
    full.mkdir()
    (full / "mine").write_text("x")
    file.write_text("x")
    source, large = spoil_source(tmp_path / "source", b"\xc0\x7f"), spoil_source(tmp_path / "large", b"\x7f\x7f")
    standalone = tmp_path / "old"
    standalone.mkdir()
    shutil.copy(RANDOM / "config.json", standalone)
    (standalone / "a.pt").touch()
    before = sorted(tmp_path.rglob("*"))
    for message, arguments in {
        "NaN": [str(source), str(target)],
        "large: tensor model.layers.0.mamba.in_proj.weight: a weight is not finite or too large for format q4; ": [str(large), str(target)],
        "not an empty folder": [str(RANDOM), str(full)],
        "not an empty folder;": [str(RANDOM), str(file)],
        "there is no format 'q5'": [str(RANDOM), str(target), "--format", "q5"],
        "packed already": [str(packed), str(target)],
        "nowhere": [str(tmp_path / "nowhere"), str(target)],
        "old/a.pt is a standalone file; save it in the Hub's layout to pack it": [str(standalone), str(target)],
        "no model.safetensors, no model.safetensors.index.json and no single .pt file": [str(full), str(target)],
    }.items():
        code, out, err = told(capsys, "quantize", *arguments)
        assert (code, out, len(err)) == (2, "", 1), err
        assert message in err[0]
        assert sorted(tmp_path.rglob("*")) == before
    assert (full / "mine").read_text() == "x"


@pytest.mark.parametrize(("variable", "value"), [("ZAMBA2_ISA", "sse"), ("ZAMBA2_THREADS", "many"), ("ZAMBA2_THREADS", "0")])
def test_bad_settings(
    variable: str, value: str, packed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """ZAMBA2_ISA and ZAMBA2_THREADS that name nothing give one sentence that names them."""
    monkeypatch.setenv(variable, value)
    code, out, err = told(capsys, "generate", "hi", "-n", "2", "--model", str(packed))
    assert (code, out, len(err)) == (2, "", 1), err
    assert variable in err[0]
    assert value in err[0]


def test_load_refuses(packed: Path) -> None:
    """Options that a packed checkpoint cannot follow raise Zamba2Error, and nothing is packed for them."""
    for message, options in {
        "cannot be used": {"device": "cuda"}, "has its format": {"dtype": "float32"}, "packed as q4, not q8": {"format": "q8"},
        "PyTorch reads no packed checkpoint": {"backend": "torch"}, "there is no backend": {"backend": "other"},
        "no format 'q3' of keys and values": {"kv": "q3"},
    }.items():  # fmt: skip
        with pytest.raises(Zamba2Error, match=message):
            zamba2.load(packed, **options)  # type: ignore[arg-type]
    with pytest.raises(Zamba2Error, match="there is no format"):
        zamba2.load(RANDOM, format="q5")
    with pytest.raises(Zamba2Error, match="PyTorch keeps keys and values in its dtype"):
        zamba2.load(RANDOM, backend="torch", kv="q8")
    for options in ({"threads": 2}, {"pin": True}):
        with pytest.raises(Zamba2Error, match="threads and pin are for the native engine"):
            zamba2.load(RANDOM, backend="torch", **options)  # type: ignore[arg-type]
    assert is_packed(packed)
    assert not is_packed(RANDOM)


def test_an_old_pytorch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions are compared as numbers."""
    torch = pytest.importorskip("torch")
    for version, good in (("2.7.1", False), ("1.13", False), ("2.8.0", True), ("2.10.0+cu128", True)):
        monkeypatch.setattr(torch, "__version__", version)
        with nullcontext() if good else pytest.raises(Zamba2Error, match=rf"PyTorch {version} is installed; 2\.8 or newer is needed"):
            api.torch_backend()


def test_the_one_standalone_file(tmp_path: Path) -> None:
    """A folder without safetensors stands for its one .pt file, which the config.json beside it describes; two are none."""
    shutil.copy(RANDOM / "config.json", tmp_path)
    (tmp_path / "a.pt").touch()
    file = api.checkpoint_in(tmp_path)
    assert file == tmp_path / "a.pt" and api.read_config(file) == Config.from_file(RANDOM / "config.json")
    (tmp_path / "b.pt").touch()
    with pytest.raises(Zamba2Error, match=r"no single \.pt file"):
        api.checkpoint_in(tmp_path)


@pytest.mark.parametrize("options", [{"device": "cuda"}, {"dtype": "float32"}, {"backend": "torch"}, {"kv": "q3"}])
def test_what_packing_cannot_serve_is_refused_first(options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that the native engine has not is refused before anything is packed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(Zamba2Error, match=next(iter(options.values())) if "backend" not in options else "packed"):
        zamba2.load("random", format="q4", **options)
    assert list(tmp_path.iterdir()) == []


def test_links_are_followed_and_devices_kept(tmp_path: Path) -> None:
    """What is written through a link goes where the link points, and neither link nor device makes way for a file."""
    from zamba2.weights.files import replacing

    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    with replacing(tmp_path / "link.json") as place:
        place.write_text("new")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real.json").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Zamba2Error, match="neither a file nor a folder"), replacing(tmp_path / "pipe"):
        raise AssertionError("nothing is begun")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    quantize(RANDOM, tmp_path / "link", FORMATS["q8"])
    assert is_packed(tmp_path / "real") and (tmp_path / "link").is_symlink()


def test_loading_at_once_packs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that need the same packed copy at the same time all get it; a damaged copy is made anew; nothing is left beside it."""
    import threading

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(zamba2.load(RANDOM, format="q4", threads=1).backend.fingerprint)
        except BaseException as error:
            found.append(error)

    for _ in range(2):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (copy,) = (tmp_path / "zamba2" / "packed").iterdir()
        (copy / "model.safetensors").write_bytes(b"damaged")
    assert len(set(found)) == 1 and len(found) == 8, found


def test_killed_packers_leave_nothing_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a packer that was killed left half written in the cache is deleted by the next one, unless somebody may be writing it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache, days = tmp_path / "zamba2" / "packed", 24 * 60 * 60
    for name, age in (("old", 2 * days), ("new", 0), ("growing", 2 * days)):
        folder = cache / f".q4-{name}.17-0123abcd.partial"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
        then = time.time() - age
        os.utime(folder / "model.safetensors", (then, then if name == "old" else time.time()))
        os.utime(folder, (then, then))
    zamba2.load(RANDOM, format="q4", threads=1)
    assert {path.name.split(".")[1] for path in cache.glob(".*")} == {"q4-new", "q4-growing"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"format": "q5"}, "no format 'q5'"), ({"kv": "q9"}, "no format 'q9'"), ({"backend": "native", "dtype": "float32"}, "dtype is"),
     ({"dtype": "float32"}, "PyTorch cannot be imported"), ({"device": "cuda"}, "PyTorch cannot be imported")],
)  # fmt: skip
def test_options_are_looked_at_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, str], sentence: str
) -> None:
    """What no checkpoint could make right is said before one is downloaded, a missing PyTorch included."""
    monkeypatch.setattr(api, "resolve", lambda *args, **kwargs: pytest.fail("a download was begun"))
    monkeypatch.setattr(api, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(Zamba2Error, match=sentence):
        zamba2.load("2.7b-instruct", **options)


def test_a_file_written_over_while_in_use_is_named(tmp_path: Path) -> None:
    """Where another model's file of the same size is copied over a mapped one, the next call is an error, not a mixture of both."""
    quantize(RANDOM, tmp_path / "model", FORMATS["q8"])
    model = zamba2.load(tmp_path / "model", threads=1)
    model.generate("hi", max_tokens=2)
    file = tmp_path / "model" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1000:] = bytes(1000)
    with file.open("r+b") as stream:
        stream.write(data)
    with pytest.raises(Zamba2Error, match="was written to while in use; load the model again"):
        model.generate("hi", max_tokens=2)
