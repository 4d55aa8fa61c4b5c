"""Finding and downloading checkpoints, against a Hub of our own (fake_hub.py).

Every call runs in a process of its own: huggingface_hub reads HF_ENDPOINT and HF_HOME once, at import.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub

from zamba2.errors import Zamba2Error
from zamba2.weights import hub

CALL = """
import json, sys
from zamba2.errors import Zamba2Error
from zamba2.weights.hub import resolve
assert "huggingface_hub" not in sys.modules and "torch" not in sys.modules
try:
    print(json.dumps({"path": str(resolve(sys.argv[1], **json.loads(sys.argv[2])))}))
except Zamba2Error as error:
    print(json.dumps({"error": str(error)}))
"""
MODEL = "owner/model"
WEIGHTS = os.urandom(300_000)
WANTED = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "chat_template.jinja", "model.safetensors", "model.safetensors.index.json",
}  # fmt: skip


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeHub]:
    def folder(name: str, files: dict[str, bytes]) -> Path:
        path = tmp_path / "served" / name
        path.mkdir(parents=True)
        for file, data in files.items():
            (path / file).write_bytes(data)
        return path

    model = {name: json.dumps(name).encode() for name in WANTED}
    model |= {"config.json": b'{"model_type": "zamba2"}', "model.safetensors": WEIGHTS}
    model |= {"README.md": b"not wanted", "pytorch_model.bin": b"not wanted"}
    repositories = {
        MODEL: {"main": folder("main", model), "v1": folder("v1", model | {"config.json": b'{"old": true}'})},
        "owner/no-config": {"main": folder("no-config", {"README.md": b""})},
        "owner/no-weights": {"main": folder("no-weights", {"config.json": b"{}", "pytorch_model.bin": b""})},
        "Zyphra/Zamba2-2.7B-instruct": {"main": folder("alias", model)},
    }
    with FakeHub(repositories) as server:
        yield server


class Caller:
    """Calls ``resolve`` in a fresh process with an isolated cache."""

    def __init__(self, endpoint: str, home: Path) -> None:
        self.home = home
        kept = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HUGGING", "HTTP", "ALL_PROXY"))}
        self.env = kept | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "2"}
        self.stderr = ""

    def __call__(self, source: str, env: dict[str, str] | None = None, **options: object) -> dict[str, str]:
        command = [sys.executable, "-c", CALL, source, json.dumps(options)]
        done = subprocess.run(command, env=self.env | (env or {}), capture_output=True, text=True, timeout=120)
        self.stderr = done.stderr
        assert done.returncode == 0, done.stderr
        result: dict[str, str] = json.loads(done.stdout)
        return result

    def path(self, source: str, **options: object) -> Path:
        result = self(source, **options)
        assert "path" in result, result
        return Path(result["path"])

    def error(self, source: str, env: dict[str, str] | None = None, **options: object) -> str:
        result = self(source, env, **options)
        assert "error" in result, result
        assert "\n" not in result["error"] and result["error"].endswith(".")
        return result["error"]


@pytest.fixture
def call(fake: FakeHub, tmp_path: Path) -> Caller:
    return Caller(fake.url, tmp_path / "home")


def test_download_then_offline(fake: FakeHub, call: Caller) -> None:
    """A model is fetched once, the wanted files alone; afterwards the cached copy serves, and offline nothing is asked."""
    folder = call.path(MODEL)
    assert {path.name for path in folder.iterdir()} == WANTED
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert folder.is_relative_to(call.home) and folder.name == FakeHub.sha("main")
    fetched = len([request for request in fake.requests if request.startswith("GET") and "resolve" in request])
    fake.requests.clear()
    assert call.path(MODEL) == folder and fetched == len(WANTED)
    assert not [request for request in fake.requests if "resolve" in request], "cached files are not asked for again"
    fake.requests.clear()
    assert call.path(MODEL, offline=True) == folder
    assert Path(call(MODEL, {"HF_HUB_OFFLINE": "1"})["path"]) == folder
    assert fake.requests == []


@pytest.mark.parametrize("trouble", ["down", "503", "silent"])
def test_cached_copy_serves_when_the_hub_does_not(fake: FakeHub, call: Caller, trouble: str) -> None:
    """Where the Hub is down, silent or answers with errors, the copy in the cache serves, and a line says so."""
    folder = call.path(MODEL)
    break_hub(fake, call, trouble)
    assert call.path(MODEL) == folder
    assert "using the copy downloaded earlier" in call.stderr


@pytest.mark.parametrize(("trouble", "said"), [("down", "check the network"), ("503", "HTTP 503"), ("silent", "check the network")])
def test_hub_in_trouble_and_nothing_cached(fake: FakeHub, call: Caller, trouble: str, said: str) -> None:
    """Where the Hub is in trouble and nothing is cached, one sentence says which trouble."""
    break_hub(fake, call, trouble)
    assert said in call.error(MODEL)


def break_hub(fake: FakeHub, call: Caller, trouble: str) -> None:
    if trouble == "down":
        call.env["HF_ENDPOINT"] = "http://127.0.0.1:1"
    elif trouble == "silent":
        fake.silent = True
    else:
        fake.answer = int(trouble)


def test_revision(fake: FakeHub, call: Caller) -> None:
    """A revision is that branch, tag or commit; one that does not exist is named in the error."""
    assert (call.path(MODEL, revision="v1") / "config.json").read_text() == '{"old": true}'
    assert call.path(MODEL, revision=FakeHub.sha("v1"), offline=True).name == FakeHub.sha("v1")
    assert "no revision 'v2'" in call.error(MODEL, revision="v2")


def test_small_files_only(call: Caller) -> None:
    """Without weights the small files alone are fetched, which later do not pass for the whole model."""
    folder = call.path(MODEL, weights=False)
    assert not (folder / "model.safetensors").exists()
    assert "not fully" in call.error(MODEL, offline=True), "without the weights the cached copy is not the model"
    assert call.path(MODEL) == folder and (folder / "model.safetensors").exists()


def test_broken_download_resumes(fake: FakeHub, call: Caller) -> None:
    """A download that broke off goes on where it stopped and gives the same bytes."""
    data = WEIGHTS * 80  # the library keeps what arrived in steps of 10 MB
    (fake.repositories[MODEL]["main"] / "model.safetensors").write_bytes(data)
    fake.drop = {"model.safetensors"}
    assert (call.path(MODEL) / "model.safetensors").read_bytes() == data
    assert fake.ranges == ["bytes=10485760-"]


def test_gated(fake: FakeHub, call: Caller) -> None:
    """A gated model without a valid token is one sentence; with the token it is fetched."""
    fake.gated = {MODEL}
    for env in ({}, {"HF_TOKEN": "hf_wrong"}):
        assert f"{MODEL} is gated" in call.error(MODEL, env)
    assert "path" in call(MODEL, {"HF_TOKEN": fake.token})


def test_settings_of_the_library(call: Caller) -> None:
    """A variable of the environment that the Hub's library cannot read is one sentence, and nothing on standard output."""
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        assert "HF_...) cannot be used (invalid literal for int()" in call.error(MODEL, {name: "soon"})


RETRIES = """
from huggingface_hub.utils import http_backoff
from zamba2.weights.hub import quiet_retries
for _ in range(2):
    quiet_retries()
    try:
        http_backoff("GET", "http://127.0.0.1:1", max_retries=2, base_wait_time=0)
    except Exception as error:
        print(type(error).__name__)
"""


def test_retries_are_told_of_once(call: Caller) -> None:
    """Of requests that are made again and again for half a minute one line tells as soon as the first has failed, and no other."""
    done = subprocess.run([sys.executable, "-c", RETRIES], env=call.env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "ConnectError\n" * 2
    assert done.stderr == "zamba2: the Hub does not answer as it should; it is asked again, for up to a minute.\n"


def test_not_there(call: Caller) -> None:
    """A repository, or a file in it, that is missing, and an id that cannot be one, are one sentence each."""
    for env in ({}, {"HF_TOKEN": "hf_test"}):
        assert "no repository owner/missing" in call.error("owner/missing", env)
    assert "offline was asked for" in call.error(MODEL, offline=True)
    assert "no config.json" in call.error("owner/no-config")
    assert "no *.safetensors" in call.error("owner/no-weights")
    assert "no valid Hub id" in call.error("owner/bad--name")


def test_refused(fake: FakeHub, call: Caller) -> None:
    """A refused download says which token is missing."""
    fake.answer = 403
    assert "HF_TOKEN" in call.error(MODEL)


def test_cache_cannot_be_written(call: Caller) -> None:
    """A cache that cannot be written is named."""
    call.home.mkdir()
    (call.home / "hub").write_text("a file where the cache folder belongs")
    assert str(call.home / "hub") in call.error(MODEL)


def test_disk_full(call: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is one sentence that names the variable to move the cache with."""
    import huggingface_hub

    for number in (errno.ENOSPC, errno.EDQUOT):

        def full(*args: object, number: int = number, **options: object) -> str:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
        with pytest.raises(Zamba2Error, match=r"disk is full.*HF_HOME"):
            hub.resolve(MODEL, offline=True)


def test_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where XDG_CACHE_HOME says, and in the home folder where it says nothing."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for said, folder in ((str(tmp_path / "x"), tmp_path / "x"), ("", tmp_path / ".cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", said)
        assert hub.cache_folder() == folder / "zamba2"


@pytest.mark.parametrize("name", ["2.7b-instruct", "2.7B-Instruct"])
def test_alias(call: Caller, name: str) -> None:
    """Short names stand for the published models, in any case."""
    assert "models--Zyphra--Zamba2-2.7B-instruct" in str(call.path(name))


def test_cache_written_by_an_older_library(call: Caller) -> None:
    """The layout every huggingface_hub since 0.8 shares: refs, snapshots, blobs; no list of the repository's files."""
    folder = call.path(MODEL)
    shutil.rmtree(folder.parent.parent / "trees", ignore_errors=True)
    assert call.path(MODEL, offline=True) == folder


def test_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What exists on disk wins over names and ids, and what looks like a path never becomes a download."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "model.pt").touch()
    (tmp_path / "model.safetensors").touch()
    assert hub.resolve("owner/name") == Path("owner/name"), "an existing path wins over a Hub id"
    assert hub.resolve(tmp_path / "model.pt") == tmp_path / "model.pt"
    assert hub.resolve("random") == hub.RANDOM and (hub.RANDOM / "config.json").is_file()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/owner") == tmp_path / "owner"
    (tmp_path / "7b").mkdir()
    assert hub.resolve("7b") == Path("7b")
    (tmp_path / "demo").mkdir()
    assert hub.resolve("demo") == hub.DEMO, "a folder that is no checkpoint does not hide an embedded model"
    (tmp_path / "demo" / "config.json").touch()
    assert hub.resolve("demo") == Path("demo")
    for missing in ("./x", "/x", "~/x", "a/b/c", "x/", "x.pt", "~nobody-here/x", Path("owner/x")):
        with pytest.raises(Zamba2Error, match="does not exist"):
            hub.resolve(missing)
    with pytest.raises(Zamba2Error, match=r"model\.safetensors is a file"):
        hub.resolve("model.safetensors")
    for nonsense in ("", "3b", "two words", "owner/two words", "x" * 5000, "\0"):
        with pytest.raises(Zamba2Error, match=r"2\.7b-instruct"):
            hub.resolve(nonsense)
    with pytest.raises(Zamba2Error, match="only Hub repositories have revisions"):
        hub.resolve("random", revision="main")
