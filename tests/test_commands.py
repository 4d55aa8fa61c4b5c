"""The commands as people use them: help, generate, chat through pipes and a real terminal, download, the README's own lines."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import pty
import re
import resource
import select
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fake_hub import FakeHub

import zamba2
import zamba2.commands
from zamba2.cli import app, run, sampling_options
from zamba2.commands import complain, need, read_text, say
from zamba2.commands.chat import reply, user_folder
from zamba2.commands.generate import load_with_status, reading_progress
from zamba2.errors import Zamba2Error, install
from zamba2.language.model import LanguageModel
from zamba2.weights.hub import RANDOM

ROOT = Path(__file__).resolve().parent.parent
CARD = ROOT / "examples" / "card_conversation.json"
NOTICE = "zamba2: this model has random weights"
GROUPS = [("", app), *((f"{group.name} ", group.typer_instance) for group in app.registered_groups)]
COMMANDS = [prefix + str(c.name or c.callback.__name__) for prefix, group in GROUPS for c in group.registered_commands if c.callback]
# With random weights a greedy reply never ends by itself.
TINY = ("--model", "random")
NLTK = ROOT.parent / "shared" / "data" / "ifeval" / "nltk_data"
GREEDY_HI = ["generate", "hi", "-n", "6", *TINY]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return zamba2.load("random")


def program(*arguments: str, stdin: str | bytes = b"", **environment: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``python -m zamba2``."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    command = [sys.executable, "-m", "zamba2", *arguments]
    done = subprocess.run(command, input=data, capture_output=True, timeout=120, env=os.environ | environment)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def without_notice(standard_error: str) -> list[str]:
    return [line for line in standard_error.splitlines() if not line.startswith(NOTICE)]


@pytest.mark.parametrize(("users", "expected"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_threads_sleep_while_they_wait(users: dict[str, str], expected: str) -> None:
    """PyTorch's threads are told to sleep while they wait, before it is loaded, unless the user says otherwise."""
    code = "import os, sys; from zamba2.__main__ import main; main(); print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | users
    done = subprocess.run([sys.executable, "-c", code, "--version"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[1:] == [f"{expected} False"], done


@pytest.fixture
def zamba(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command line in this process; gives exit code, standard output and lines of standard error."""

    def call(*arguments: str, stdin: bytes = b"") -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = run(arguments)
        out, err = capsys.readouterr()
        return code, out, without_notice(err)

    return call


# ---- help and start-up -----------------------------------------------------------------------------------------------


def test_the_commands_are_these() -> None:
    """What the tests below go through is every command there is."""
    training = ["train preview", "train sft", "train dpo", "train demo"]
    measuring = [f"evaluate {name}" for name in ("perplexity", "divergence", "tasks", "ifeval", "mt-bench")]
    assert [*COMMANDS] == ["generate", "chat", "info", "download", "quantize", "bench", "figures", "serve", *training, *measuring]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command: str, zamba: Any) -> None:
    """Each command's help has a sentence, the options and examples that begin with its own name."""
    code, out, err = zamba(*command.split(), "--help")
    assert code == 0 and err == []
    assert "Usage:" in out and "Examples" in out and "--help" in out
    assert out.count(f"zamba2 {command}") >= 2
    assert zamba(*command.split(), "-h") == (code, out, err)


def test_bare_command_is_help(zamba: Any) -> None:
    """Without arguments the program lists its commands."""
    code, out, _ = zamba()
    assert code == 0 and out == zamba("--help")[1]
    assert all(re.search(rf"\b{command.split()[0]}\b", out) for command in COMMANDS)


def test_version(zamba: Any) -> None:
    """--version prints the package's version alone."""
    assert zamba("--version") == (0, f"zamba2 {zamba2.__version__}\n", [])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("train", "Missing command. See zamba2 train --help."),
        ("train sft", "Missing argument 'RECIPE'. See zamba2 train sft --help."),
        ("generate --top-k many", ". See zamba2 generate --help."),
        ("--nonsense", "No such option: --nonsense. See zamba2 --help."),
    ],
)
def test_usage_errors_name_the_commands_own_help(arguments: str, said: str, zamba: Any) -> None:
    """Who mistook a command is sent to the help of that command."""
    code, out, err = zamba(*arguments.split())
    assert (code, out) == (2, "") and len(err) == 1 and err[0].endswith(said)


@pytest.mark.parametrize("width", ["x", "", "-3"])
def test_a_width_that_is_no_number(width: str) -> None:
    """Typer's own variable for the width of help, set to anything, takes no help away."""
    code, out, err = program("--help", TERMINAL_WIDTH=width)
    assert (code, err) == (0, "") and "quantize" in out


@pytest.mark.parametrize(("arguments", "times"), [(["--help"], 1.6), *[([*command.split(), "--help"], 7) for command in COMMANDS]])
def test_help_is_instant(arguments: list[str], times: float) -> None:
    """Help is there at once: within so many times what typer itself takes to start on this machine. The best of several runs counts, and
    waiting for the processor does not: other programs may have it meanwhile."""
    best = {"own": float("inf"), "typer": float("inf")}
    for _ in range(12):
        for name, command in (("own", ["-m", "zamba2", *arguments]), ("typer", ["-c", "import typer.rich_utils"])):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            best[name] = min(best[name], after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if best["own"] < best["typer"] * times:
            return
    pytest.fail(f"{arguments} takes {best['own']:.2f} s, {best['typer']:.2f} of which are typer's")


ALWAYS_HEAVY = {"torch", "transformers", "huggingface_hub", "prompt_toolkit"}


@pytest.mark.parametrize(
    ("what", "heavy"),
    [
        ("import zamba2", ALWAYS_HEAVY | {"numpy", "tokenizers", "jinja2", "typer", "rich"}),
        ("import zamba2.cli", ALWAYS_HEAVY | {"numpy", "tokenizers", "jinja2"}),
        ("from zamba2.cli import run; run(['info', '2.7b', '--json'])", ALWAYS_HEAVY),
    ],
)
def test_imports_are_lazy(what: str, heavy: set[str]) -> None:
    """Importing the package, its command line, and describing a shape load nothing that these do not need."""
    code = f"import sys; {what}; print(sorted({heavy!r} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


# ---- generate --------------------------------------------------------------------------------------------------------


def test_prompt_from_argument_file_and_input(zamba: Any, model: LanguageModel, tmp_path: Path) -> None:
    """The same prompt gives the same text wherever it comes from: only the last line end of standard input is left out."""
    text = "Once upon a time, there was\n\ta café"
    (tmp_path / "prompt.txt").write_text(text, encoding="utf-8")
    expected = model.generate(text, max_tokens=6).text + "\n"
    assert zamba("generate", text, "-n", "6", *TINY)[1] == expected
    assert zamba("generate", "--file", str(tmp_path / "prompt.txt"), "-n", "6", *TINY)[1] == expected
    for stdin in (text, text + "\n"):
        assert zamba("generate", "-n", "6", *TINY, stdin=stdin.encode())[1] == expected
        assert zamba("generate", "-", "-n", "6", *TINY, stdin=stdin.encode())[1] == expected
    code, out, err = program("generate", "-n", "6", *TINY, stdin=text)
    assert (code, out) == (0, expected) and len(without_notice(err)) == 1


def test_texts_of_other_systems(zamba: Any, tmp_path: Path) -> None:
    """A byte order mark and the line ends of other systems are no part of a prompt or of messages."""
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbfA cat\r\nand a dog\r\n")
    (tmp_path / "windows.json").write_bytes(b'\xef\xbb\xbf[{"role": "user",\r\n"content": "hi"}]\r\n')
    options = ("-n", "4", *TINY)
    assert zamba("generate", "--file", str(tmp_path / "windows.txt"), *options)[1] == zamba("generate", "A cat\nand a dog", *options)[1]
    assert zamba("generate", "--messages", str(tmp_path / "windows.json"), *options)[1] == zamba("generate", "--chat", "hi", *options)[1]


def test_summary_line(zamba: Any, model: LanguageModel) -> None:
    """After the text one line on standard error tells tokens, times and why it ended."""
    code, _, err = zamba(*GREEDY_HI)
    count = len(model.tokenizer.encode("hi"))
    assert code == 0 and len(err) == 1
    assert re.fullmatch(rf"\[{count} prompt tokens in [\d.]+ s \([\d.]+/s\), 6 new at [\d.]+/s, length\]", err[0])


def test_json_is_one_document(zamba: Any, model: LanguageModel) -> None:
    """--json prints exactly one line, the document, with what ``generate`` from Python gives."""
    code, out, err = zamba(*GREEDY_HI, "--json", "--logprobs", "2")
    assert code == 0 and err == [] and out.count("\n") == 1
    data = json.loads(out.splitlines()[-1])
    expected = model.generate("hi", max_tokens=6, logprobs=2)
    assert expected.logprobs is not None
    assert (data["text"], data["tokens"], data["finish_reason"], data["stop"]) == (expected.text, expected.tokens, "length", None)
    assert data["model"] == "random"
    assert data["usage"] == {
        "prompt_tokens": expected.prompt_tokens,
        "completion_tokens": 6,
        "total_tokens": expected.prompt_tokens + 6,
    }
    assert [(item["token"], item["logprob"]) for item in data["logprobs"]] == [(i.token, i.logprob) for i in expected.logprobs]
    assert "".join(item["text"] for item in data["logprobs"]) == data["text"]
    assert [[tuple(t.values()) for t in item["top"]] for item in data["logprobs"]] == [list(i.top) for i in expected.logprobs]
    assert data["time_to_first_token_seconds"] > 0 and data["decode_tokens_per_second"] > 0
    code, out, err = zamba(*GREEDY_HI, "--logprobs", "2")
    assert (code, out) == (2, "") and "--logprobs needs --json" in err[0]


def test_every_option_reaches_the_sampler(zamba: Any, model: LanguageModel) -> None:
    """The command line's options give what the same options give from Python."""
    options: dict[str, Any] = {
        "temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "frequency_penalty": 0.3,
        "presence_penalty": 0.2, "seed": 5, "max_tokens": 20,
    }  # fmt: skip
    line = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    expected = model.generate("hi", logit_bias={300: 2.0, 7: -1.5}, stop=("zz", "e"), ignore_eos=True, **options)
    assert sampling_options({"logit_bias": ["300=2", "7=-1.5"], "stop": None})["logit_bias"] == {300: 2.0, 7: -1.5}
    data = json.loads(
        zamba(
            "generate",
            "hi",
            *TINY,
            *line,
            "--logit-bias",
            "300=2",
            "--logit-bias",
            "7=-1.5",
            "--stop",
            "zz",
            "--stop",
            "e",
            "--ignore-eos",
            "--json",
        )[1]
    )
    assert (data["tokens"], data["text"], data["stop"]) == (expected.tokens, expected.text, expected.stop)
    seen = {name: model.generate("hi", **{k: v for k, v in options.items() if k != name}).tokens for name in options}
    assert any(tokens != seen["seed"] for tokens in seen.values())


def test_chat_option_and_system(zamba: Any, model: LanguageModel) -> None:
    """--chat answers the prompt as a message, --system goes before it."""
    user, system = {"role": "user", "content": "hi"}, {"role": "system", "content": "Be brief."}
    assert zamba(*GREEDY_HI, "--chat")[1] == model.chat([user], max_tokens=6).text + "\n"
    assert zamba(*GREEDY_HI, "--chat", "--system", "Be brief.")[1] == model.chat([system, user], max_tokens=6).text + "\n"


def test_card_conversation_streams(model: LanguageModel) -> None:
    """The model card's conversation is answered, and the text comes while it is made, not at the end."""
    command = [sys.executable, "-m", "zamba2", "generate", "--messages", str(CARD), "--max-tokens", "1500", "--ignore-eos", *TINY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        arrivals, pieces = [], []
        while piece := os.read(process.stdout.fileno(), 65536):
            arrivals.append(time.monotonic())
            pieces.append(piece)
        assert process.wait(60) == 0
        error = process.stderr.read().decode()
    expected = model.chat(json.loads(CARD.read_text(encoding="utf-8")), max_tokens=1500, ignore_eos=True)
    assert b"".join(pieces).decode() == expected.text + "\n"
    assert len(pieces) > 10 and arrivals[-1] - arrivals[0] > 0.01  # read as they come: the tiny model takes 0.4 s
    assert error.splitlines()[0].startswith(NOTICE) and "1500 new" in error


def test_dtype_and_name(zamba: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """--dtype chooses the numbers' format; the model may be named, in any case, or be a folder, and in a terminal keeps its name."""
    default = json.loads(zamba(*GREEDY_HI, "--json", "--logprobs", "0")[1])
    wide = json.loads(zamba(*GREEDY_HI, "--json", "--logprobs", "0", "--dtype", "float32", "--device", "cpu")[1])
    assert [i["logprob"] for i in default["logprobs"]] != [i["logprob"] for i in wide["logprobs"]]
    assert default["logprobs"][0]["logprob"] == pytest.approx(wide["logprobs"][0]["logprob"], abs=0.1)
    for name in ("RANDOM", str(RANDOM)):
        assert json.loads(zamba(*GREEDY_HI, "--json", "--model", name)[1])["text"] == default["text"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert load_with_status("random", {"revision": None, "offline": True}).name == "random"


# ---- chat through a pipe ---------------------------------------------------------------------------------------------


def test_chat_through_a_pipe(zamba: Any, model: LanguageModel) -> None:
    """Each line is a message, whatever system ended it; the replies go to standard output, everything else to standard error."""
    conversation = model.conversation()
    replies = ["".join(piece.text for piece in conversation.say(text, max_tokens=6)) for text in ("hello", "and\nthen")]
    code, out, err = zamba("chat", "-n", "6", *TINY, stdin=b"hello\r\n\n   \nand\\\r\nthen\n")
    assert code == 0 and out == "".join(reply + "\n" for reply in replies)
    assert len(err) == 2
    first, second = (re.fullmatch(r"\[6 tokens, [\d.]+ tokens/s, first after [\d.]+ s, (\d+) cached\]", line) for line in err)
    assert first is not None and second is not None, err
    assert first[1] == "0" and int(second[1]) > 6


def test_the_line_behind_a_reply(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It tells how long the first token took, and the rate of those behind it."""
    ticks = itertools.count()
    monkeypatch.setattr("zamba2.commands.chat.time.perf_counter", lambda: float(next(ticks)))
    pieces = (SimpleNamespace(text=letter) for letter in "abcdef")
    reply(cast(Any, SimpleNamespace(backend=SimpleNamespace(stretch=512), say=lambda *_, **__: pieces, cached_tokens=3)), "hi", {})
    assert capsys.readouterr() == ("abcdef\n", "[6 tokens, 5.0 tokens/s, first after 1.00 s, 3 cached]\n")


def test_complaints_are_short(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever a sentence holds, a thousand characters of it are shown, on one line."""
    complain("a\n" + "x" * 5000)
    assert capsys.readouterr().err == "zamba2: a " + "x" * 998 + "\n"


OLDER = "take Python 3.11 or newer (this is 3.10), and there "


@pytest.mark.parametrize(("version", "said"), [((3, 10, 13), OLDER), ((3, 11, 0), "install with ")])
def test_what_cannot_be_installed_is_not_advised(version: tuple[int, ...], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Extras that hold transformers ask for the Python that transformers wants, where this one is older; others never do."""
    monkeypatch.setattr(sys, "version_info", version)
    with pytest.raises(Zamba2Error) as caught:
        need("training", "train", "no_such_module")
    assert str(caught.value) == f"training needs no_such_module; {said}`pip install 'zamba2[train]'`."
    assert install("serve") == "install with `pip install 'zamba2[serve]'`"


def test_where_the_users_own_files_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ZAMBA2_HOME, else the system's place for such data, else one in the home folder."""
    for name in ("ZAMBA2_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_folder() == tmp_path / ".local" / "state" / "zamba2"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert user_folder() == tmp_path / "state" / "zamba2"
    monkeypatch.setenv("ZAMBA2_HOME", str(tmp_path / "own"))
    assert user_folder() == tmp_path / "own"


def chat(zamba: Any, *lines: str, options: tuple[str, ...] = ("-n", "4")) -> tuple[str, list[str]]:
    """Standard output, and standard error without the line after each reply; the exit code tells of complaints."""
    code, out, err = zamba("chat", *options, stdin="\n".join(lines).encode())
    assert code == (2 if any(line.startswith("zamba2: ") for line in err) else 0)
    return out, [line for line in err if "first after" not in line]


def test_commands_inside(zamba: Any, tmp_path: Path) -> None:
    """/help, /history, /reset, /system, /save, /load and /exit do what the help says; unknown ones are named."""
    alone, _ = chat(zamba, "hello")
    out, err = chat(zamba, "hello", "/reset", "hello", "/exit", "never read")
    assert (out, err) == (alone * 2, ["(begun again)"])
    _, err = chat(zamba, "/help")
    assert all(any(line.startswith(name) for line in err) for name in ("/help", "/reset", "/system", "/save", "/load", "/history", "/exit"))
    out, err = chat(zamba, "hello", "/history")
    assert err == ["user: hello", f"assistant: {out.rstrip(chr(10))}"]
    out, err = chat(zamba, "/system", "/system Be brief.", "/system", "hello", "/reset", "/system", "/history")
    begun = ["(begun again, with this system message)", "Be brief.", "(begun again)"]
    assert err == ["(no system message)", *begun, "Be brief.", "system: Be brief."]
    assert out == chat(zamba, "hello", options=("-n", "4", "--system", "Be brief."))[0] != alone
    _, err = chat(zamba, "/nonsense", "/save", "/load", "/load nowhere", "/save /", "/save ~nobody-here/\0")
    assert [line.partition(";")[0] for line in err[:3]] == [
        "zamba2: there is no command /nonsense",
        "zamba2: /save needs a file name, as in /save talk.zamba2",
        "zamba2: /load needs a file name, as in /load talk.zamba2",
    ]
    assert len(err) == 6 and all(line.startswith("zamba2: ") for line in err)
    assert chat(zamba, " /quit ", "hello") == ("", [])


def test_save_and_load_inside(zamba: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat saved in one program goes on in another as if it had not been left; ~ is the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    whole, _ = chat(zamba, "hello", "go on")
    first, err = chat(zamba, "hello", "/save ~/talk 1.zamba2")
    assert err == ["saved to ~/talk 1.zamba2"] and (tmp_path / "talk 1.zamba2").exists()
    second, err = chat(zamba, "something else", "/load ~/talk 1.zamba2", "go on")
    assert err == ["2 messages loaded"] and first + second.partition("\n")[2] == whole


def test_lines_that_are_no_text(zamba: Any) -> None:
    """A line that is not UTF-8 is left out with one line; the chat goes on, and the exit code tells of it."""
    code, out, err = zamba("chat", "-n", "4", stdin=b"\xff\xfe\nhello\n")
    assert code == 2 and out == chat(zamba, "hello")[0]
    assert err[0] == "zamba2: a line was left out: it is not UTF-8 text." and len(err) == 2


def test_a_refused_turn_does_not_end_the_chat(zamba: Any, model: LanguageModel) -> None:
    """An error in a turn is one line, and the next turn is answered."""
    out, err = chat(zamba, "hello", "hello", options=("-n", "4", "--logit-bias", "9999=1"))
    assert out == "" and len(err) == 2 and all("logit_bias names token 9999" in line for line in err)


# ---- chat in a terminal ----------------------------------------------------------------------------------------------


# The child makes the terminal its own: forking a process that has threads is frowned upon by newer Pythons.
IN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "zamba2", *sys.argv[1:]])
"""


class Terminal:
    """``python -m zamba2`` in a pseudo-terminal."""

    def __init__(self, *arguments: str, home: Path) -> None:
        self.seen, self.mark = "", 0
        self.fd, theirs = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "ZAMBA2_HOME": str(home), "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": "100"}
        command = [sys.executable, "-c", IN_TERMINAL, *arguments]
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True)
        os.close(theirs)

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def _read(self, seconds: float) -> bool:
        if not select.select([self.fd], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self.fd, 65536)
        except OSError as error:  # Linux's way to say that the program has closed the terminal
            assert error.errno == errno.EIO
            return False
        self.seen += data.decode(errors="replace")
        return bool(data)

    def expect(self, pattern: str, seconds: float = 40) -> re.Match[str]:
        """Wait until this appears behind what was expected before."""
        until = time.monotonic() + seconds
        while (found := re.compile(pattern).search(self.plain, self.mark)) is None:
            assert time.monotonic() < until and self._read(0.2), f"no {pattern!r} in {self.plain[self.mark :]!r}"
        self.mark = found.end()
        return found

    @property
    def plain(self) -> str:
        """Everything shown, without colours and movements."""
        return re.sub(r"\x1b(\[[0-?]*[ -/]*[@-~]|[=>]|\][^\x07]*\x07)", "", self.seen)

    def ended(self, seconds: float) -> bool:
        """Whether the program ends within so long, or asks for a message."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and "/exit leaves" not in self.plain:
            self._read(0.05)
            if self.process.poll() is not None:
                return True
        return False

    def wait(self, seconds: float = 30) -> int:
        """The exit code."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._read(0.05)
            if (code := self.process.poll()) is not None:
                return code
        raise AssertionError(f"still running: {self.plain[-500:]!r}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Any]:
    opened: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        opened.append(Terminal(*arguments, home=tmp_path / "home"))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


CTRL_C, CTRL_D, UP, ESCAPE = "\x03", "\x04", "\x1b[A", "\x1b"
RATE = r"\[\d+ tokens, [\d.]+ tokens/s, first after [\d.]+ s, (\d+) cached\]"


def test_chat_in_a_terminal(terminal: Any, tmp_path: Path) -> None:
    """Messages, speed, commands, several lines, history across programs and Ctrl-D, with a real terminal's keys."""
    window = terminal("chat", "-n", "5", *TINY)
    window.expect("random weights")
    window.expect(r"type a message, or /help\.\s*>")
    window.type("hello there\r")
    assert window.expect(RATE)[1] == "0"
    window.expect(">")
    window.type("one\x1b\rtwo\r")
    assert int(window.expect(RATE)[1]) > 5
    window.expect(">")
    window.type("/history\r")
    window.expect(r"user: hello there\s+assistant: [^\n]*\s+user: one\s+two\s+assistant: ")
    window.type("/nonsense\r")
    window.expect(r"there is no command /nonsense; /help lists them\.")
    window.type(f"/save {tmp_path / 'talk'}\r")
    window.expect("saved to ")
    window.type("/reset\r")
    window.type(f"/load {tmp_path / 'talk'}\r")
    window.expect(r"4 messages loaded\s*>")
    window.type(CTRL_C)
    window.expect(r"Ctrl-D or /exit leaves\)\s*>")
    window.type(CTRL_D)
    assert window.wait() == 0 and "Traceback" not in window.plain
    again = terminal("chat", "-n", "5", *TINY)
    again.expect(r"/help\.\s*>")
    again.type(UP)
    again.expect(r"/load ")
    again.type(CTRL_C)
    again.expect(r"leaves\)\s*>")
    again.type("/exit\r")
    assert again.wait() == 0


def test_ctrl_c_stops_the_reply_alone(terminal: Any) -> None:
    """Ctrl-C in a long reply stops it; the chat remembers what was said and goes on without reading it again."""
    window = terminal("chat", "-n", "100000", *TINY)
    window.expect(r"/help\.\s*>")
    window.type("Tell me everything.\r")
    window.expect(r"everything\.[\s\S]*\w{20}|(\w+ ){8}")
    time.sleep(0.3)
    window.type(CTRL_C)
    window.expect(r"\(stopped\)\s*>", 10)
    window.type("/history\r")
    said = window.expect(r"assistant: ([^\r\n]+)")[1]
    assert len(said) > 10
    window.type("Go on.\r")
    time.sleep(1.0)
    window.type(CTRL_C)
    window.expect(r"\(stopped\)\s*>", 10)
    window.type(CTRL_D)
    assert window.wait() == 0 and "Traceback" not in window.plain


def test_ctrl_c_while_loading_leaves(terminal: Any) -> None:
    """Before the first prompt Ctrl-C ends the program, with one line and exit code 2."""
    for seconds in (0.25, 0.2, 0.15, 0.3, 0.1, 0.2):  # the model may be there before the key is pressed: again, then
        window = terminal("chat")
        time.sleep(seconds)
        window.type(CTRL_C)
        if window.ended(5):
            assert window.wait() == 2
            assert window.plain.count("interrupted.") == 1 and "Traceback" not in window.plain
            return
        assert "type a message" in window.plain and "Ctrl-D or /exit leaves" in window.plain
    pytest.fail("the model was always loaded before Ctrl-C came")


def test_history_is_the_users_own(terminal: Any, tmp_path: Path) -> None:
    """What was typed is kept for the next chat, in a file that nobody else can read; where there is no room for it, the chat goes on."""
    window = terminal("chat", "-n", "3")
    window.expect(r"/help\.\s*>")
    window.type("hello\r")
    window.expect(RATE + r"\s*>")
    file = tmp_path / "home" / "chat_history"
    assert "hello" in file.read_text() and file.stat().st_mode & 0o777 == 0o600
    file.unlink()
    file.symlink_to("/dev/full")
    window.type("again\r")
    window.expect(RATE + r"\s*>")
    window.type(CTRL_D)
    assert window.wait() == 0 and "Traceback" not in window.plain


def test_history_that_cannot_be_kept(terminal: Any, tmp_path: Path) -> None:
    """Where the history file cannot be opened the chat works without it."""
    (tmp_path / "home" / "chat_history").mkdir(parents=True)
    window = terminal("chat", "-n", "3")
    window.expect(r"/help\.\s*>")
    window.type("hello\r")
    window.expect(RATE + r"\s*>")
    window.type(CTRL_D)
    assert window.wait() == 0 and "Traceback" not in window.plain


def test_generate_in_a_terminal(terminal: Any) -> None:
    """In a terminal a missing prompt is refused at once, and a long prompt shows how far its reading is."""
    window = terminal("generate")
    window.expect("there is no prompt; give a text, --file FILE, or pipe one in")
    assert window.wait() == 2
    window = terminal("generate", "word " * 1500, "-n", "2", *TINY)
    window.expect(r"reading[^\n]*/\d{4}")
    window.expect(r"2 new at")
    assert window.wait() == 0


@pytest.mark.parametrize("stretch", [512, 4096])
def test_a_reply_goes_to_standard_output(stretch: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """However many tokens a backend reads at once, the bar is gone before the reply is printed, which it would take to the terminal."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with reading_progress(stretch) as report:
        assert report is not None
        report(stretch, 3 * stretch)
        report(2 * stretch, 3 * stretch)
        print("a reply")
    assert capsys.readouterr().out == "a reply\n"


# ---- download --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[FakeHub, dict[str, str]]]:
    with FakeHub({"Zyphra/Zamba2-2.7B-instruct": {"main": RANDOM}, "me/mine": {"main": RANDOM, "v2": RANDOM}}) as server:
        yield server, {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}


def test_download_then_use(hub: tuple[FakeHub, dict[str, str]]) -> None:
    """download prints the folder alone; the model then works offline under its short name."""
    server, environment = hub
    code, out, err = program("download", "2.7b-instruct", **environment)
    assert code == 0, err
    folder = Path(out.removesuffix("\n"))
    assert (folder / "model.safetensors").read_bytes() == (RANDOM / "model.safetensors").read_bytes()
    server.requests.clear()
    code, out, err = program(*GREEDY_HI, "--model", "2.7b-instruct", "--offline", "--json", **environment)
    assert code == 0 and json.loads(out)["model"] == "2.7b-instruct" and server.requests == []
    assert json.loads(out)["text"] == zamba2.load("random").generate("hi", max_tokens=6).text


def test_download_errors_are_one_line(hub: tuple[FakeHub, dict[str, str]]) -> None:
    """What a Hub has not is one line and exit code 2, also for info, which asks for the config alone."""
    server, environment = hub
    code, out, err = program("download", "no/model", **environment)
    assert (code, out) == (2, "") and err.count("\n") == 1 and "no repository no/model" in err
    code, _, err = program("download", "me/mine", "--revision", "v9", **environment)
    assert code == 2 and err.count("\n") == 1 and "v9" in err
    code, out, err = program("info", "me/mine", "--revision", "v2", "--json", **environment)
    assert code == 0 and json.loads(out)["config"]["hidden_size"] == 64
    assert not [request for request in server.requests if "safetensors" in request and "/resolve/" in request]


# ---- the README ------------------------------------------------------------------------------------------------------


def readme_commands() -> list[str]:
    return [line.strip() for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("    zamba2 ")]


def files_to_evaluate(folder: Path) -> None:
    """One question of each evaluation, in its own layout."""
    task = {
        "task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "train.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": ["four", "five"],
        "doc_to_target": 0, "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    prompt = {"key": 1, "prompt": "Say it in lower case.", "instruction_id_list": ["change_case:english_lowercase"], "kwargs": [{}]}
    question = {"question_id": 1, "category": "writing", "turns": ["Hello.", "Again."]}
    for name, content in (("my_task.yaml", task), ("input_data.jsonl", prompt), ("question.jsonl", question)):
        (folder / name).write_text(json.dumps(content) + "\n", encoding="utf-8")


def served(line: str) -> None:
    """The line's server, with the demonstration model on a free port, answers, and Ctrl-C ends it."""
    asked = line.partition("#")[0].replace("2.7b-instruct", "demo").split()[1:]
    command = [sys.executable, "-m", "zamba2", *asked, "--port", "0", "--quiet"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            address = re.search(r"http://\S+", process.stderr.readline())
            assert address is not None
            with urllib.request.urlopen(f"{address[0]}/health", timeout=30) as answer:
                assert answer.status == 200
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
            assert process.stderr.read() == "zamba2: stopped.\n"
        finally:
            process.kill()


# lm_eval, transformers and datasets warn of each other.
@pytest.mark.filterwarnings("ignore", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.timeout(900)  # one trains a model: minutes on a slow machine
@pytest.mark.parametrize("line", readme_commands())
def test_readme_commands(line: str, zamba: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each command of the README runs as printed, with the tiny model in the place of one that must be downloaded, and small shapes in
    the place of those that take hours."""
    from zamba2.weights import hub as names

    for name in list(names.ALIASES):
        monkeypatch.setitem(names.ALIASES, name, RANDOM)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "novel.txt").write_text("It is a truth universally acknowledged. " * 400, encoding="utf-8")
    question = {"question": "How many are two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}
    (tmp_path / "train.jsonl").write_text(json.dumps(question), encoding="utf-8")
    files_to_evaluate(tmp_path)
    if line.startswith(("zamba2 figures", "zamba2 evaluate ifeval", "zamba2 evaluate tasks", "zamba2 train demo")):
        pytest.importorskip("transformers", reason="it needs the extras [train] and [evaluate]")
    if "ifeval" in line:
        if not NLTK.is_dir():
            pytest.skip(f"{NLTK} is absent: what splits sentences is read from there")
        monkeypatch.setenv("NLTK_DATA", str(NLTK))
    if line.startswith("zamba2 serve"):
        served(line)
        return
    if line.startswith("zamba2 figures"):
        line = line.replace("figures", "figures --small --repeats 1 --engines zamba2 --formats q4", 1)
    if line.startswith("zamba2 train demo"):
        line = line.partition("#")[0].replace("0.001", "1e-5") + "steps=2 batch_size=2 device_batch_size=2"
    arguments = shlex.split(line, comments=True)[1:]
    code, out, err = zamba(*arguments, stdin=b"/help\n")
    if "--device cuda" in line and not os.path.exists("/dev/nvidiactl"):
        assert (code, out, len(err)) == (2, "", 1) and "device 'cuda' cannot be used" in err[0]
        return
    assert code == 0, err
    assert out or err
    expected = ("zamba2: packing", "zamba2: writing", "zamba2: precision")  # the last where the CPU has no products of bf16
    assert not any(text.startswith("zamba2:") and not text.startswith(expected) for text in err)
    if line.startswith("zamba2 train demo"):
        check_demonstration(Path("zamba2-demo"))
        assert zamba(*arguments) == (0, out, [])  # all that a second call would do is there


def check_demonstration(folder: Path) -> None:
    """The model is packed, each stage ran so many steps, and the card holds what was measured of it."""
    report, card = json.loads((folder / "report.json").read_text()), (folder / "model" / "README.md").read_text()
    assert zamba2.load(folder / "model").backend.format.name == "q8"
    assert f"{report['stages']['dpo q8']['perplexity']:.2f}" in card and card.count("**model:**") == len(report["tasks"]) == 8
    tried = report["stages"]["sft"]
    assert len(tried["right"]) == 8 and set(tried["kinds"]) == {task["kind"] for task in report["tasks"]}
    metrics = [json.loads(line) for line in (folder / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert max(entry["step"] for entry in metrics) == 2


def test_readme_has_commands_and_python(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The README shows every command, and its Python lines run as printed."""
    from zamba2.weights import hub as names

    lines = [f"{line} " for line in readme_commands()]
    assert [command for command in COMMANDS if not any(line.startswith(f"zamba2 {command} ") for line in lines)] == []
    (source,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.setitem(names.ALIASES, "2.7b-instruct", RANDOM)
    exec(compile(source, "README.md", "exec"), {})
    model = zamba2.load("2.7b-instruct")
    answer = model.chat([{"role": "user", "content": "Why is the sky blue?"}], max_tokens=150).text
    assert answer and capsys.readouterr().out == f"{answer}\n{model.generate('Once upon a time', max_tokens=50).text}\n"


def test_a_text_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of as many bytes as may be is read whole; one byte more, or a device that gives bytes for ever, is one sentence."""
    monkeypatch.setattr(zamba2.commands, "MOST_BYTES", 3 << 20)
    file = tmp_path / "text"
    file.write_bytes(b"\xef\xbb\xbf" + b"a\r\n" * (1 << 20))
    with pytest.raises(Zamba2Error, match="text has more than 3 MiB"):
        read_text(file)
    file.write_bytes(b"a\r\n" * (1 << 20))
    assert read_text(file) == "a\n" * (1 << 20)
    with pytest.raises(Zamba2Error, match="/dev/zero has more than 3 MiB, or no end"):
        read_text(Path("/dev/zero"))


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_reply_does_not_steer_the_terminal() -> None:
    """A terminal does not get a reply's control characters, which it would obey, but all else; a file gets the reply as it is."""
    reply = "a\x1b]0;b\x07\r\x9b2J\x7f\tc\nd\N{GRINNING FACE}\N{NO-BREAK SPACE}\N{IDEOGRAPHIC SPACE}\N{ZERO WIDTH JOINER}e"
    screen, file = Screen(), io.StringIO()
    say(reply, screen)
    say(reply, file)
    assert screen.getvalue() == re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", reply) != reply
    assert file.getvalue() == reply
