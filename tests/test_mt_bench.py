"""MT-Bench: the published judgments come to the published scores, and nothing that was answered or judged is asked for twice."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zamba2.errors import Zamba2Error
from zamba2.evaluate import judge as judge_module
from zamba2.evaluate.judge import Endpoint, Failure, Outcome, estimate
from zamba2.evaluate.lines import Lines
from zamba2.evaluate.mt_bench import (
    CATEGORIES,
    MAX_TOKENS,
    Judgment,
    Mean,
    ModelAnswers,
    aggregate,
    answer_questions,
    answers_file,
    chart,
    judge_answers,
    judge_requests,
    judgments_file,
    parse_rating,
    read_answers,
    read_judge_prompts,
    read_judgments,
    read_questions,
    table,
    unjudged,
)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "mt_bench"
PUBLISHED = SHARED / "model_judgment" / "gpt-4_single.alvarobartt.jsonl"
published = pytest.mark.skipif(not PUBLISHED.exists(), reason=f"{SHARED} is absent: FastChat's questions and judgments are read from there")

# ---- a benchmark of our own, in FastChat's layouts -------------------------------------------------------------------

QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 1, "category": "writing", "turns": ["Write of the sea.", "Shorter {please}."]},
    {"question_id": 2, "category": "math", "turns": ["What is 2 + 3?", "And its square?"], "reference": ["5", "25"]},
    {"question_id": "three", "category": "stem", "turns": ["Why is the sky blue?", "And at night?"]},
    {"question_id": 4, "category": "coding", "turns": ["Print a word in Python."]},
    {"question_id": 5, "category": "gardening", "turns": ["When to sow peas?", "And beans?"]},
]
TURNS = sum(len(question["turns"]) for question in QUESTIONS)
PROMPTS: list[dict[str, Any]] = [
    {"name": "single-v1", "system_prompt": "Judge.", "prompt_template": "Rate.\nQ: {question}\nA: {answer}"},
    {"name": "single-math-v1", "system_prompt": "Judge.", "prompt_template": "Rate.\nQ: {question}\nR: {ref_answer_1}\nA: {answer}"},
    {"name": "single-v1-multi-turn", "system_prompt": "", "prompt_template": "{question_1}/{answer_1}/{question_2}/{answer_2}"},
    {
        "name": "single-math-v1-multi-turn", "system_prompt": "Judge.",
        "prompt_template": "{ref_answer_1}/{ref_answer_2}//{question_1}/{answer_1}/{question_2}/{answer_2}",
    },
    {"name": "pair-v2", "system_prompt": "Compare.", "prompt_template": "{answer_a} {answer_b}"},
]  # fmt: skip
PROMPTS = [prompt | {"type": "single", "output_format": "[[rating]]"} for prompt in PROMPTS[:-1]] + PROMPTS[-1:]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Bench:
    """Our questions, prompts and references as files in a folder, and what is made of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.questions = read_questions(write_lines(folder / "question.jsonl", QUESTIONS))
        self.prompts = read_judge_prompts(write_lines(folder / "judge_prompts.jsonl", PROMPTS))
        references = [
            {"question_id": q["question_id"], "choices": [{"index": 0, "turns": q.get("reference", ["print('word')"])}]}
            for q in QUESTIONS if q["category"] in ("math", "coding")
        ]  # fmt: skip
        self.references = read_answers(write_lines(folder / "reference_answer" / "judge-1.jsonl", references), references=True)
        self.answers = answers_file(folder, "fake")
        self.judgments = judgments_file(folder, "judge-1")

    def requests(self) -> Any:
        return judge_requests(self.questions, read_answers(self.answers), self.prompts, self.references)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    yield Bench(tmp_path)
    for process in STARTED:
        process.kill()
        process.communicate()
    STARTED.clear()


class Fake:
    """Answers by what it was asked, last conversation first; ``asked`` is all that it finished. ``limit``: then it is interrupted."""

    def __init__(self, name: str = "fake", limit: int | None = None, **about: Any) -> None:
        self.name, self.limit, self.about = name, limit, {"sha256": "00ff", "format": "q4"} | about
        self.asked: list[tuple[str, ...]] = []
        self.settings: dict[str, tuple[int, float, int | None]] = {}

    def answer(
        self, conversations: Sequence[Sequence[Mapping[str, str]]], *, max_tokens: int, temperature: float = 0.0, seed: int | None = None
    ) -> Iterator[tuple[int, str]]:
        for index in reversed(range(len(conversations))):
            if self.limit is not None and len(self.asked) == self.limit:
                raise KeyboardInterrupt
            said = tuple(message["content"] for message in conversations[index])
            self.asked.append(said)
            self.settings[said[0]] = (max_tokens, temperature, seed)
            yield index, f"  answer {len(said)} to {said[-1]} \n"


Action = str | int | tuple[int, dict[str, str], object]
Script = Callable[[int, dict[str, Any]], Action]


def rating(number: int, body: dict[str, Any]) -> Action:
    return f"Rating: [[{number % 10 + 1}]]"


class ScriptedJudge:
    """A chat endpoint on 127.0.0.1. ``script(number, body)`` says what becomes of a request: a judgment's text, a status, or status,
    headers and body (bytes as they are, else JSON); "DROP" breaks off, "CUT" half-way through the body; "HANG" never ends, nor does
    "DRIP", which sends a byte now and then.

    ``asked``: the last message of each request; ``times``: when they came; ``answered``: those whose reply went out whole.
    """

    def __init__(self, script: Script = rating, key: str | None = None) -> None:
        self.script, self.key = script, key
        self.asked: list[str] = []
        self.answered: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"judge": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self) -> ScriptedJudge:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def endpoint(self, **settings: Any) -> Endpoint:
        return Endpoint("judge-1", self.url, **({"backoff": 0.01, "parallel": 1, "timeout": 20.0} | settings))


class _Handler(BaseHTTPRequestHandler):
    judge: ScriptedJudge

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.send(405, {}, b"")

    def do_POST(self) -> None:
        judge, body = self.judge, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions" or (judge.key and self.headers["Authorization"] != f"Bearer {judge.key}"):
            message = f"Incorrect key: {self.headers['Authorization']}"
            self.send(404 if self.path != "/v1/chat/completions" else 401, {}, {"error": {"message": message}})
            return
        text = body["messages"][-1]["content"]
        with judge.lock:
            number = len(judge.asked)
            judge.asked.append(text)
            judge.bodies.append(body)
            judge.times.append(time.monotonic())
            judge.at_once += 1
            judge.most_at_once = max(judge.most_at_once, judge.at_once)
        try:
            action = judge.script(number, body)
        finally:
            with judge.lock:
                judge.at_once -= 1
        self.close_connection = True
        if action == "DROP":
            return
        if action == "HANG":
            judge.closing.wait(60)
            return
        if action == "DRIP":
            self.send(200, {"Content-Length": "1000"}, b"")
            while not judge.closing.wait(0.02):
                try:
                    self.wfile.write(b" ")
                except OSError:
                    return
            return
        if action == "CUT":
            self.send(200, {"Content-Length": "1000"}, b'{"choices": [')
        elif isinstance(action, int):
            self.send(action, {}, {"error": {"message": "scripted"}})
        elif isinstance(action, tuple):
            self.send(*action)
        else:
            usage = {"prompt_tokens": 100, "completion_tokens": 10}
            if self.send(200, {}, {"choices": [{"index": 0, "message": {"role": "assistant", "content": action}}], "usage": usage}):
                judge.answered.append(text)

    def send(self, status: int, headers: Mapping[str, str], body: object) -> bool:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # the other side has gone
            return False
        return True


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def one(server: ScriptedJudge, **settings: Any) -> Outcome:
    outcome = server.endpoint(**settings).ask([{"role": "user", "content": "hi"}], max_tokens=5)
    assert outcome is not None
    return outcome


# ---- the published files ---------------------------------------------------------------------------------------------


@published
def test_published_scores() -> None:
    """The published judgments come to the published means, with one model judged twice and one judgment without a rating."""
    questions = read_questions(SHARED / "question.jsonl")
    scores = aggregate(read_judgments(PUBLISHED), questions)
    capybara = scores.of("mistral-orpo-capybara")
    assert capybara.overall.value == pytest.approx(6.81875, abs=1e-12) and capybara.overall.percent == pytest.approx(68.1875)
    assert {turn: mean.value for turn, mean in capybara.turns.items()} == {1: 7.125, 2: 6.5125}
    assert (capybara.judge, capybara.unrated, capybara.repeated, capybara.missing) == ("gpt-4", 0, 0, 0)
    twice = scores.of("mistral-orpo")
    assert (twice.unrated, twice.repeated, twice.overall.ratings) == (1, 160, 319)
    raw = [row for row in lines_of(PUBLISHED) if row["model"] == "mistral-orpo" and row["score"] != -1]
    assert twice.overall.value == pytest.approx(sum(row["score"] for row in raw) / 319, abs=1e-12)
    of = {question.id: question.category for question in questions}
    for name, category in twice.categories.items():
        for turn, mean in category.turns.items():
            ratings = [row["score"] for row in raw if of[row["question_id"]] == name and row["turn"] == turn]
            assert mean.value == pytest.approx(sum(ratings) / len(ratings)) and mean.ratings == len(ratings)
    assert tuple(capybara.categories) == CATEGORIES
    assert "| **all** | 7.12 | 6.51 | 6.82 | 68.19 |" in table(capybara)


@published
def test_published_categories_go_by_number() -> None:
    """Without its questions the published benchmark's judgments come to the same scores."""
    judgments = read_judgments(PUBLISHED)
    known = aggregate(judgments, read_questions(SHARED / "question.jsonl")).to_dict()
    guessed = aggregate(judgments).to_dict()
    assert {name: scores | {"missing": 0} for name, scores in guessed.items()} == known
    json.dumps(known, allow_nan=False)


@published
def test_published_ratings_are_parsed() -> None:
    """Our parser finds in each of the 800 published judgments the rating that FastChat found."""
    rows = lines_of(PUBLISHED)
    assert len(rows) == 800
    assert [parse_rating(row["judgment"]) for row in rows] == [row["score"] for row in rows]


@published
def test_published_judge_was_asked_the_same() -> None:
    """From published questions, references and prompts, and the answers found in them, come the very prompts that FastChat sent."""
    questions = {question.id: question for question in read_questions(SHARED / "question.jsonl")}
    prompts = read_judge_prompts(SHARED / "judge_prompts.jsonl")
    references = read_answers(SHARED / "reference_answer" / "gpt-4.jsonl", references=True)
    for row in lines_of(PUBLISHED):
        question, turn = questions[row["question_id"]], row["turn"]
        known = {"question": question.turns[0], "question_1": question.turns[0], "question_2": question.turns[1]}
        known |= {f"ref_answer_{i}": text for i, text in enumerate(references.turns.get(question.id, ()), 1)}
        pattern = re.escape(prompts[row["judge"][1]].template)
        for name, text in known.items():
            pattern = pattern.replace(re.escape(f"{{{name}}}"), re.escape(text))
        pattern = re.sub(r"\\{answer\w*\\}", "(.*)", pattern)
        found = re.fullmatch(pattern, row["user_prompt"], re.DOTALL)
        assert found, row["question_id"]
        answers = ModelAnswers(row["model"], {question.id: (*found.groups(), "")[:2]}, PUBLISHED)
        request = judge_requests([question], answers, prompts, references)[turn - 1]
        assert (request.prompt, request.messages[-1]["content"]) == (row["judge"][1], row["user_prompt"])
        assert request.messages[0] == {"role": "system", "content": prompts[request.prompt].system}


@published
def test_published_answers_are_judged(tmp_path: Path) -> None:
    """A published answer file is judged whole, 160 requests, through HTTP and several at a time."""
    answers = read_answers(SHARED / "model_answer" / "vicuna-13b-v1.3.jsonl")
    questions = read_questions(SHARED / "question.jsonl")
    references = read_answers(SHARED / "reference_answer" / "gpt-4.jsonl", references=True)
    requests = judge_requests(questions, answers, read_judge_prompts(SHARED / "judge_prompts.jsonl"), references)
    with ScriptedJudge(lambda number, body: "[[4]]") as server:
        judged = judge_answers(server.endpoint(parallel=8), requests, tmp_path / "j.jsonl")
    assert (judged.made, judged.kept, judged.failures) == (160, 0, [])
    assert sorted(server.asked) == sorted(request.messages[-1]["content"] for request in requests)
    scores = aggregate(read_judgments(tmp_path / "j.jsonl"), questions).of("vicuna-13b-v1.3")
    assert (scores.overall, scores.missing) == (Mean(4.0, 160), 0)
    assert set(lines_of(tmp_path / "j.jsonl")[0]) == set(lines_of(PUBLISHED)[0])


# ---- a whole run -----------------------------------------------------------------------------------------------------


def test_whole_run(bench: Bench) -> None:
    """Answers, judge and scores in one go: temperatures by category, own first answers in the second turn, FastChat's layouts."""
    fake = Fake()
    seen: list[tuple[int, int]] = []
    answered = answer_questions(fake, bench.questions, bench.answers, progress=lambda done, total: seen.append((done, total)))
    assert answered.made == TURNS and seen == [(done, TURNS) for done in range(TURNS + 1)]
    assert fake.settings == {
        "Write of the sea.": (MAX_TOKENS, 0.7, 0), "What is 2 + 3?": (MAX_TOKENS, 0.0, 0), "Why is the sky blue?": (MAX_TOKENS, 0.1, 0),
        "Print a word in Python.": (MAX_TOKENS, 0.0, 0), "When to sow peas?": (MAX_TOKENS, 0.7, 0),
    }  # fmt: skip
    assert ("What is 2 + 3?", "answer 1 to What is 2 + 3?", "And its square?") in fake.asked
    row = next(row for row in lines_of(bench.answers) if row["question_id"] == 2)
    assert row["choices"] == [{"index": 0, "turns": ["answer 1 to What is 2 + 3?", "answer 3 to And its square?"]}]
    assert row["model_id"] == "fake" and {"answer_id", "tstamp"} <= set(row)
    assert sorted(path.name for path in bench.answers.parent.iterdir()) == ["fake.jsonl"]
    with ScriptedJudge() as server:
        judged = judge_answers(server.endpoint(), bench.requests(), bench.judgments)
    assert (judged.made, judged.failures) == (TURNS, [])
    assert all(body["temperature"] == 0 and body["max_tokens"] == 2048 and body["model"] == "judge-1" for body in server.bodies)
    assert "Rate.\nQ: What is 2 + 3?\nR: 5\nA: answer 1 to What is 2 + 3?" in server.asked
    second = "5/25//What is 2 + 3?/answer 1 to What is 2 + 3?/And its square?/answer 3 to And its square?"
    assert second in server.asked
    assert "Write of the sea./answer 1 to Write of the sea./Shorter {please}./answer 3 to Shorter {please}." in server.asked
    rows = lines_of(bench.judgments)
    assert set(rows[0]) == {"question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"}
    assert next(row["judge"] for row in rows if row["user_prompt"] == second) == ["judge-1", "single-math-v1-multi-turn"]
    assert {row["score"] for row in rows} == set(range(1, TURNS + 1)), "the script's ratings, each once"
    scores = aggregate(read_judgments(bench.judgments), bench.questions).of("fake")
    assert scores.overall == Mean(sum(range(1, TURNS + 1)) / TURNS, TURNS) and scores.missing == 0
    assert tuple(scores.categories) == ("writing", "math", "coding", "stem", "gardening")


@pytest.mark.parametrize("after", range(TURNS))
def test_interrupted_answers_are_kept(bench: Bench, after: int) -> None:
    """Ctrl-C after any number of answers: they are kept, the rest is asked once, and the file is that of a run in one go."""
    first, second, whole = Fake(limit=after), Fake(), Fake()
    with pytest.raises(KeyboardInterrupt):
        answer_questions(first, bench.questions, bench.answers)
    answer_questions(second, bench.questions, bench.answers)
    answer_questions(whole, bench.questions, bench.folder / "whole.jsonl")
    assert Counter(first.asked + second.asked) == Counter(whole.asked)
    resumed, direct = read_answers(bench.answers), read_answers(bench.folder / "whole.jsonl")
    assert resumed.turns == direct.turns
    assert answer_questions(Fake(limit=0), bench.questions, bench.answers).made == 0


@pytest.mark.parametrize("parallel", [1, 3])
def test_interrupted_judging_is_kept(bench: Bench, parallel: int) -> None:
    """Ctrl-C half way: what was on its way is written too, and no request is ever sent twice."""
    answer_questions(Fake(), bench.questions, bench.answers)

    def interrupt(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with ScriptedJudge() as server:
        with pytest.raises(KeyboardInterrupt):
            judge_answers(server.endpoint(parallel=parallel), bench.requests(), bench.judgments, progress=interrupt)
        written = len(lines_of(bench.judgments))
        assert 4 <= written == len(server.asked) < TURNS
        assert len(unjudged(bench.requests(), bench.judgments, "judge-1")) == TURNS - written
        judged = judge_answers(server.endpoint(parallel=parallel), bench.requests(), bench.judgments)
        assert (judged.kept, judged.made) == (written, TURNS - written)
        assert judge_answers(server.endpoint(), bench.requests(), bench.judgments).made == 0
        assert set(Counter(server.asked).values()) == {1} and len(server.asked) == TURNS
    assert aggregate(read_judgments(bench.judgments), bench.questions).of("fake").missing == 0


# What a user's process does, and is ended in the middle of.
PROGRAM = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_mt_bench import Bench, Endpoint, Fake, answer_questions, judge_answers

    bench = Bench(Path({folder!r}))
    if {step!r} == "answer":
        class Killed(Fake):
            def answer(self, conversations, **settings):
                for index, text in super().answer(conversations, **settings):
                    if len(self.asked) == 5:
                        os.kill(os.getpid(), signal.SIGKILL)
                    with open({folder!r} + "/asked", "a") as file:
                        print(repr(self.asked[-1]), file=file)
                    yield index, text
        answer_questions(Killed(), bench.questions, bench.answers)
    else:
        judge_answers(Endpoint("judge-1", {url!r}, parallel={parallel}), bench.requests(), bench.judgments)
"""


STARTED: list[subprocess.Popen[bytes]] = []  # a failed test leaves none of them running


def start(bench: Bench, step: str, url: str = "", parallel: int = 1) -> subprocess.Popen[bytes]:
    program = textwrap.dedent(PROGRAM).format(
        tests=str(Path(__file__).parent), folder=str(bench.folder), step=step, url=url, parallel=parallel
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    STARTED.append(process)
    return process


def test_killed_while_answering(bench: Bench) -> None:
    """A process that is killed while a model answers has kept every answer before."""
    process = start(bench, "answer")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == -signal.SIGKILL, output
    before = [eval(line) for line in (bench.folder / "asked").read_text().splitlines()]
    assert len(before) == 4
    after = Fake()
    answer_questions(after, bench.questions, bench.answers)
    assert len(after.asked) == TURNS - 4 and not set(before) & set(after.asked)
    assert len(read_answers(bench.answers).turns) == len(QUESTIONS)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_ended_while_judging(bench: Bench, how: signal.Signals) -> None:
    """Killed or interrupted with requests on their way: no answered one is repeated; after Ctrl-C they are waited for and written."""
    answer_questions(Fake(), bench.questions, bench.answers)
    release = threading.Event()

    def script(number: int, body: dict[str, Any]) -> Action:
        if number >= 4 and not release.wait(200):
            return "DROP"
        return rating(number, body)

    with ScriptedJudge(script) as server:
        process = start(bench, "judge", server.url, parallel=2)
        until(lambda: bench.judgments.exists() and bench.judgments.read_bytes().count(b"\n") == 4 and len(server.asked) == 6)
        process.send_signal(how)
        if how == signal.SIGKILL:
            process.wait(60)
        else:
            time.sleep(0.5)  # the signal is there before the replies are
        release.set()
        output, _ = process.communicate(timeout=60)
        assert process.returncode in (-how, 128 + how), output
        held = server.asked[4:6]
        assert len(lines_of(bench.judgments)) == (6 if how == signal.SIGINT else 4), output
        judged = judge_answers(server.endpoint(), bench.requests(), bench.judgments)
        assert judged.failures == []
        repeated = {text for text, times in Counter(server.asked).items() if times > 1}
        assert repeated == (set(held) if how == signal.SIGKILL else set()), "without a reply it could not be known"
    assert aggregate(read_judgments(bench.judgments), bench.questions).of("fake").missing == 0


def until(condition: Callable[[], bool], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_half_a_line_is_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file cut anywhere in its last line goes on with the lines before, and a whole last line without its end is kept."""
    rows = [{"a": 1, "text": "é[[3]]"}, {"a": 2, "text": "{}"}]
    data = write_lines(tmp_path / "whole.jsonl", rows).read_bytes()
    border = data.index(b"\n") + 1
    for cut in range(border, len(data) + 1):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(data[:cut])
        with Lines(path) as lines:
            kept = rows if cut >= len(data) - 1 else rows[:1]
            assert [row for _, row in lines.rows] == kept
            lines.append({"a": 3})
        assert lines_of(path) == [*kept, {"a": 3}]
        assert ("breaks off" in capsys.readouterr().err) == (border < cut < len(data) - 1)


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    """A file that begins with one, as some editors write it, is read like any other."""
    file = tmp_path / "question.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"question_id": 1, "category": "x", "turns": ["a"]}\n')
    assert [question.id for question in read_questions(file)] == [1]


def test_two_runs_do_not_share_a_file(tmp_path: Path) -> None:
    """A file that another run writes is refused; afterwards it can be had."""
    with Lines(tmp_path / "a.jsonl"), pytest.raises(Zamba2Error, match="another run is writing"):
        Lines(tmp_path / "a.jsonl")
    Lines(tmp_path / "a.jsonl").close()


def test_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk is full in the middle of a line, the line is taken back and one sentence says so."""
    with Lines(tmp_path / "a.jsonl") as lines:
        lines.append({"a": 1})
        write = os.write

        def full(fd: int, data: Any) -> int:
            monkeypatch.setattr(os, "write", lambda fd, data: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            return write(fd, bytes(data)[:3])

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(Zamba2Error, match="No space left"):
            lines.append({"a": 2})
    assert lines_of(tmp_path / "a.jsonl") == [{"a": 1}]


# ---- a judge that fails ----------------------------------------------------------------------------------------------

PASSING: dict[str, Action] = {
    "500": 500, "503 with a body that is no JSON": (503, {}, b"<html>"), "529": 529, "429": 429, "409": 409, "broken": "DROP",
    "cut short": "CUT",
    "429 with Retry-After": (429, {"Retry-After": "0.3"}, {"error": {"message": "slow down"}}),
}  # fmt: skip


@pytest.mark.parametrize("action", PASSING.values(), ids=PASSING)
def test_passing_trouble_is_tried_again(action: Action) -> None:
    """What may pass is tried again until there is an answer, or the tries are used up and there is a failure."""
    with ScriptedJudge(lambda number, body: action if number < 2 else "fine") as server:
        outcome = one(server, retries=2)
        assert outcome == "fine" and len(server.asked) == 3
        if isinstance(action, tuple) and action[1]:
            assert all(later - earlier >= 0.29 for earlier, later in zip(server.times, server.times[1:], strict=False))
    with ScriptedJudge(lambda number, body: action) as server:
        failure = one(server, retries=1)
        assert isinstance(failure, Failure) and failure.reason.endswith(", 2 times") and len(server.asked) == 2


def test_pauses_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between tries a request waits twice as long each time."""
    waits: list[float | None] = []

    class Patient(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            return False

    monkeypatch.setattr(judge_module.random, "uniform", lambda low, high: high)
    with ScriptedJudge(lambda number, body: 500) as server:
        server.endpoint(retries=3).ask([{"role": "user", "content": "hi"}], max_tokens=5, stop=Patient())
    assert waits == [0.01, 0.02, 0.04]


def test_timeouts_are_tried_again() -> None:
    """A request without an answer in time is sent again; one that stays silent is a failure."""
    with ScriptedJudge(lambda number, body: "HANG" if number < 1 else "fine") as server:
        assert one(server, timeout=0.3, retries=2) == "fine"
    with ScriptedJudge(lambda number, body: "HANG") as server:
        assert one(server, timeout=0.2, retries=1) == Failure("no answer within 0.2 seconds, 2 times")
    with ScriptedJudge(lambda number, body: "DRIP") as server:  # whose single bytes come in time
        assert one(server, timeout=0.2, retries=0) == Failure("no answer within 0.2 seconds, 1 times")


def test_retry_after_holds_everyone() -> None:
    """While the endpoint wants to be left alone, no other request is sent either; a date is understood too."""

    def script(number: int, body: dict[str, Any]) -> Action:
        return (429, {"Retry-After": "0.5"}, {}) if number == 0 else "fine"

    with ScriptedJudge(script) as server:
        outcomes: list[object] = []
        conversations = [[{"role": "user", "content": str(i)}] for i in range(4)]
        endpoint = server.endpoint(parallel=2, requests_per_minute=1200)
        endpoint.ask_all(conversations, lambda index, outcome: outcomes.append(outcome), max_tokens=5)
        assert outcomes == ["fine"] * 4
        held = [moment - server.times[0] for moment in server.times[2:]]  # the second may have been on its way
        assert min(held) >= 0.49
    assert judge_module._seconds(formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=3)
    assert [judge_module._seconds(value) for value in ("7", "nan", "soon", None, "-3")] == [7, None, None, None, 0]


MALFORMED: dict[str, tuple[object, str]] = {
    "no JSON": (b"<html>Bad gateway</html>", "not JSON"), "nothing": (b"", "not JSON"), "not UTF-8": (b"\xff\xfe", "not JSON"),
    "a list": ([], "not a JSON object"), "no choices": ({"id": "x"}, "no choices"), "empty choices": ({"choices": []}, "no choices"),
    "choices of text": ({"choices": ["[[5]]"]}, "no choices"), "no message": ({"choices": [{"text": "[[5]]"}]}, "no message"),
    "null": ({"choices": [{"message": {"content": None}}]}, "empty"), "blank": ({"choices": [{"message": {"content": " \n"}}]}, "empty"),
    "parts": ({"choices": [{"message": {"content": [{"text": "[[5]]"}]}}]}, "no text"),
    "refusal": ({"choices": [{"message": {"content": None, "refusal": "I will not."}}]}, "refused: I will not"),
    "an error": ({"error": {"message": "overloaded, [[9]]"}}, "overloaded"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "reason"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_replies_are_failures(bench: Bench, body: object, reason: str) -> None:
    """A reply without a text is recorded as a failure and never as a score; the next run asks again."""
    answer_questions(Fake(), bench.questions, bench.answers)
    with ScriptedJudge(lambda number, asked: (200, {}, body) if number == 3 else rating(number, asked)) as server:
        judged = judge_answers(server.endpoint(), bench.requests(), bench.judgments)
        assert judged.made == TURNS - 1 and len(judged.failures) == 1 and reason in judged.failures[0][1]
        [failure] = lines_of(bench.judgments.with_name("judge-1_single.failures.jsonl"))
        assert reason in failure["failure"] and "score" not in failure and failure["judge"][0] == "judge-1"
        scores = aggregate(read_judgments(bench.judgments), bench.questions).of("fake")
        assert (scores.overall.ratings, scores.unrated, scores.missing) == (TURNS - 1, 0, 1)
        assert judge_answers(server.endpoint(), bench.requests(), bench.judgments).made == 1
        assert server.asked[-1] == server.asked[3] and len(server.asked) == TURNS + 1


@pytest.mark.parametrize("content", ["", None, " \n"])
def test_an_empty_answer_of_a_model_is_one(content: str | None) -> None:
    """A model at an endpoint may answer nothing: that is its answer, and what is asked behind it is answered too."""
    from zamba2.evaluate.answers import TIMEOUT, open_answers

    empty = (200, {}, {"choices": [{"message": {"content": content}}]})
    with ScriptedJudge(lambda number, asked: empty if number < 12 else rating(number, asked)) as server:
        answers = open_answers(f"openai:{server.url}#m")
        assert answers.endpoint.timeout == TIMEOUT  # a long answer of a slow machine is waited for
        asked = [[{"role": "user", "content": str(i)}] for i in range(14)]
        found = dict(answers.answer(asked, max_tokens=5))
    assert len(found) == 14 and sum(not text.strip() for text in found.values()) == 12


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["choices", "message", "content", "error", "usage", "refusal", "prompt_tokens"]), inner, max_size=4),
    max_leaves=12,
)


@given(JSON | st.dictionaries(st.just("choices"), st.lists(st.dictionaries(st.just("message"), JSON), min_size=1)))
def test_any_reply_is_a_text_or_a_failure(reply: Any) -> None:
    """Whatever JSON is replied, the outcome is a text that is not blank, or a failure of one line."""
    outcome = Endpoint("m", "http://localhost")._read(json.dumps(reply).encode())
    if isinstance(outcome, str):
        assert outcome.strip() and outcome == reply["choices"][0]["message"]["content"]
    else:
        assert outcome.reason and "\n" not in outcome.reason


def test_a_text_beside_an_empty_refusal_is_the_answer() -> None:
    """Some endpoints send a refusal with every message, empty where there is none."""
    reply = {"choices": [{"message": {"content": "[[5]]", "refusal": ""}}]}
    assert Endpoint("m", "http://localhost")._read(json.dumps(reply).encode()) == "[[5]]"


def test_a_judgment_without_a_rating(bench: Bench) -> None:
    """A judge that gives no rating is taken at its word, as in FastChat: -1, counted, in no mean, and not asked again."""
    answer_questions(Fake(), bench.questions, bench.answers)
    with ScriptedJudge(lambda number, body: "I cannot say." if number == 0 else "[[7]]") as server:
        assert judge_answers(server.endpoint(), bench.requests(), bench.judgments).failures == []
        scores = aggregate(read_judgments(bench.judgments), bench.questions).of("fake")
        assert (scores.overall, scores.unrated, scores.missing) == (Mean(7.0, TURNS - 1), 1, 0)
        assert judge_answers(server.endpoint(), bench.requests(), bench.judgments).made == 0


def test_failed_calls_of_fastchat_are_asked_again(bench: Bench) -> None:
    """FastChat writes a failed call as a judgment of -1; it is in no mean and is asked again."""
    answer_questions(Fake(), bench.questions, bench.answers)
    with ScriptedJudge() as server:
        judge_answers(server.endpoint(), bench.requests(), bench.judgments)
        rows = lines_of(bench.judgments)
        assert len(unjudged(bench.requests(), bench.judgments, "another judge")) == TURNS  # whose ratings these are not
        write_lines(bench.judgments, [rows[0] | {"judgment": "$ERROR$", "score": -1}, *rows[1:]])
        seen: list[tuple[int, int]] = []
        again = judge_answers(server.endpoint(), bench.requests(), bench.judgments, progress=lambda *numbers: seen.append(numbers))
        assert again.made == 1 and seen == [(TURNS - 1, TURNS), (TURNS, TURNS)]
        assert server.asked[-1] == rows[0]["user_prompt"]


def test_requests_a_minute() -> None:
    """With a limit, requests start that far apart however many may be on their way; without, several are on their way at once."""
    together = threading.Barrier(3)

    def meet(number: int, body: dict[str, Any]) -> Action:
        together.wait(20)
        return "fine"

    conversations = [[{"role": "user", "content": str(i)}] for i in range(6)]
    with ScriptedJudge(meet) as server:
        server.endpoint(parallel=3).ask_all(conversations, lambda index, outcome: None, max_tokens=5)
        assert server.most_at_once == 3
    with ScriptedJudge() as server:
        started = time.monotonic()
        server.endpoint(parallel=3, requests_per_minute=600).ask_all(conversations, lambda index, outcome: None, max_tokens=5)
        assert time.monotonic() - started >= 0.5 and len(server.times) == 6


def test_replies_as_a_model() -> None:
    """The same client serves a model that is to be measured: every (index, text) once, or one sentence for a failure."""
    conversations = [[{"role": "user", "content": str(i)}] for i in range(5)]
    with ScriptedJudge(lambda number, body: "re: " + body["messages"][-1]["content"]) as server:
        assert dict(server.endpoint(parallel=2).replies(conversations, max_tokens=5)) == {i: f"re: {i}" for i in range(5)}
    with ScriptedJudge(lambda number, body: 400 if number == 2 else "fine") as server:
        came = []
        with pytest.raises(Zamba2Error, match="status 400: scripted"):
            came.extend(server.endpoint(retries=0).replies(conversations, max_tokens=5))
        assert len(server.asked) == 3


def test_replies_that_nobody_waits_for() -> None:
    """A caller that leaves half way, as on Ctrl-C, has nothing more sent but what was on its way."""
    conversations = [[{"role": "user", "content": str(i)}] for i in range(50)]
    with ScriptedJudge() as server:
        replies = server.endpoint(requests_per_minute=1200).replies(conversations, max_tokens=5)
        next(replies)
        replies.close()  # type: ignore[attr-defined]
        time.sleep(0.4)
        sent = len(server.asked)
        time.sleep(0.3)
        assert len(server.asked) == sent < 15


def test_a_second_interrupt_leaves_at_once(bench: Bench) -> None:
    """A second Ctrl-C does not wait for the judge; the file holds whole lines and goes on."""
    answer_questions(Fake(), bench.questions, bench.answers)
    with ScriptedJudge(lambda number, body: "HANG" if number >= 4 else rating(number, body)) as server:
        process = start(bench, "judge", server.url, parallel=2)
        until(lambda: len(server.asked) == 6 and bench.judgments.read_bytes().count(b"\n") == 4)
        assert process.stdout is not None
        process.send_signal(signal.SIGINT)
        assert b"waiting for replies on their way, 2 at most" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
        assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT), output
    assert len(unjudged(bench.requests(), bench.judgments, "judge-1")) == TURNS - 4


def test_options_change_the_request() -> None:
    """Options replace and remove fields of the request, for endpoints that name them otherwise."""
    with ScriptedJudge() as server:
        one(server, options={"max_tokens": None, "max_completion_tokens": 9, "temperature": None})
        assert server.bodies[0] == {
            "model": "judge-1", "messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 9,
        }  # fmt: skip


# ---- one clear sentence ----------------------------------------------------------------------------------------------


def test_no_key() -> None:
    """A judge elsewhere needs a key, and what is no key is refused, before anything is sent."""
    with pytest.raises(Zamba2Error, match=r"needs a key and OPENAI_API_KEY is not set"):
        Endpoint("gpt-4")
    with pytest.raises(Zamba2Error, match=r"MY_KEY is not set"):
        Endpoint("gpt-4", "https://example.org/v1", key_variable="MY_KEY")
    with pytest.raises(Zamba2Error, match="needs a key"):
        Endpoint("gpt-4", "https://127example.org/v1")
    Endpoint("gpt-4", "http://127.0.0.2/v1")


@pytest.mark.parametrize("key", ["two words", "sch\u00f6n", "a\nb"])
def test_keys_that_are_none(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """A variable that holds more than a key is refused without its being shown."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(Zamba2Error, match="characters that no key has") as error:
        Endpoint("gpt-4")
    assert key not in str(error.value)


def test_wrong_key_is_not_shown(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused key ends the run at once, in a sentence that does not hold it even where the endpoint repeats it."""
    answer_questions(Fake(), bench.questions, bench.answers)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with ScriptedJudge(key="sk-right") as server:
        with pytest.raises(Zamba2Error, match="refuses the key in OPENAI_API_KEY") as error:
            judge_answers(server.endpoint(), bench.requests(), bench.judgments)
        assert "sk-secret" not in str(error.value) and server.asked == []
        monkeypatch.setenv("OPENAI_API_KEY", "sk-right")
        assert judge_answers(server.endpoint(), bench.requests(), bench.judgments).made == TURNS


def test_unreachable_judge() -> None:
    """A judge that was never there ends the run at once; one that answered before is waited for."""
    with ScriptedJudge() as server:
        endpoint = server.endpoint(retries=1)
        assert isinstance(endpoint.ask([{"role": "user", "content": "hi"}], max_tokens=5), str)
    assert isinstance(endpoint.ask([{"role": "user", "content": "hi"}], max_tokens=5), Failure)
    with ScriptedJudge(lambda number, body: 503) as server:
        endpoint = server.endpoint(retries=0)
        assert isinstance(endpoint.ask([{"role": "user", "content": "hi"}], max_tokens=5), Failure)
    assert isinstance(endpoint.ask([{"role": "user", "content": "hi"}], max_tokens=5), Failure)  # an error is an answer, too
    with pytest.raises(Zamba2Error, match=r"cannot be reached .*check the address"):
        one(server)


FATAL: dict[str, tuple[Action, str]] = {
    "404": ((404, {}, {"error": {"message": "no such model"}}), "no such model.*check the model's name"),
    "redirect": ((307, {"Location": "http://elsewhere.test/"}, {}), "redirects to http://elsewhere.test/"),
    "redirect of a POST": ((302, {"Location": "http://elsewhere.test/"}, {}), "redirects to http://elsewhere.test/"),
    "no credit": ((429, {}, {"error": {"message": "pay", "code": "insufficient_quota"}}), "no credit left"),
    "tomorrow": ((429, {"Retry-After": "86400"}, {}), "left alone for 86400 seconds"),
}


@pytest.mark.parametrize(("action", "sentence"), FATAL.values(), ids=FATAL)
def test_what_cannot_pass_ends_the_run(bench: Bench, action: Action, sentence: str) -> None:
    """Where asking on is of no use the run ends after one request, and what was judged before is kept."""
    answer_questions(Fake(), bench.questions, bench.answers)
    with ScriptedJudge(lambda number, body: action if number == 5 else rating(number, body)) as server:
        with pytest.raises(Zamba2Error, match=sentence):
            judge_answers(server.endpoint(), bench.requests(), bench.judgments)
        assert len(server.asked) == 6 and len(lines_of(bench.judgments)) == 5
        assert judge_answers(server.endpoint(), bench.requests(), bench.judgments).made == TURNS - 5


def test_failures_in_a_row_end_the_run() -> None:
    """An endpoint that refuses everything is not asked hundreds of times."""
    conversations = [[{"role": "user", "content": str(i)}] for i in range(50)]
    with ScriptedJudge(lambda number, body: 400) as server:
        failures: list[object] = []
        with pytest.raises(Zamba2Error, match="failed 10 requests in a row, the last one with: status 400: scripted"):
            server.endpoint().ask_all(conversations, lambda index, outcome: failures.append(outcome), max_tokens=5)
        assert len(server.asked) == len(failures) == 10
    with ScriptedJudge(lambda number, body: 400 if number % 10 < 9 else "fine") as server:  # nine in a row are none too many
        server.endpoint(parallel=1).ask_all(conversations[:30], lambda index, outcome: None, max_tokens=5)
        assert len(server.asked) == 30


SETTINGS: dict[str, dict[str, Any]] = {
    "no address": {"url": "judge"}, "another scheme": {"url": "ftp://x/v1"}, "a wrong port": {"url": "http://x:99999/"},
    "a user": {"url": "http://me:pw@localhost/v1"}, "two lines": {"url": "http://localhost/v1\nX: y"}, "no model": {"model": " "},
    "no time": {"timeout": 0}, "no parallel": {"parallel": 0}, "negative": {"retries": -1},
    "no pace": {"requests_per_minute": float("nan")},
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_settings_that_cannot_work(settings: dict[str, Any]) -> None:
    """Settings that cannot work are refused before anything is sent, without a password's being shown."""
    with pytest.raises(Zamba2Error, match=r"needed|leave it out|give the model") as error:
        Endpoint(**({"model": "m", "url": "http://localhost/v1"} | settings))
    assert "pw" not in str(error.value)


def test_estimate() -> None:
    """Tokens are a quarter of the characters, rounded up a message, and cost is linear in the prices; without prices there is none."""
    conversations = [[{"role": "system", "content": "x" * 5}, {"role": "user", "content": "x" * 8}]] * 3
    assert (found := estimate(conversations, reply_characters=10)).cost is None
    assert (found.requests, found.prompt_tokens, found.reply_tokens) == (3, 12, 9)
    assert estimate(conversations, reply_characters=10, prices=(1e6, 2e6)).cost == 12 + 18
    assert "3 requests, about 12 prompt and 9 reply tokens, no prices given (4 characters a token" in str(found)
    with pytest.raises(Zamba2Error, match="two numbers of 0 or more"):
        estimate(conversations, reply_characters=10, prices=(-1, float("nan")))


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Rating: [[5]]", 5), ("[[7.5]]", 7.5), ("[[8.]]", 8.0), ("[3] then [[4]]", 4), ("Rating: [6]", 6), ("[[6]] no, [[9]]", 6),
        ("[[rating]]", -1), ("5/10", -1), ("", -1), ("in [2023]", -1), ("[[11]]", -1), ("[[-3]]", -1), ("[[0]]", 0), ("[[10]]", 10),
        ("[[08]]", 8),
    ],
)  # fmt: skip
def test_ratings(text: str, score: float) -> None:
    """The first double brackets count, then the first single ones; what is no rating is -1."""
    assert parse_rating(text) == score


@given(st.text() | st.from_regex(r"(a|\[{1,2}\d{1,12}\.?\d{0,3}\]{1,2})*"))
def test_any_judgment_has_a_rating_or_none(text: str) -> None:
    """Whatever a judge writes, the score is a finite number from 0 to 10, or -1."""
    assert parse_rating(text) == -1 or 0 <= parse_rating(text) <= 10


@given(st.lists(st.tuples(st.integers(81, 160), st.sampled_from([1, 2]), st.sampled_from([-1, 1, 2.5, 10])), min_size=1, max_size=30))
def test_means_are_of_valid_ratings(rows: list[tuple[int, int, float]]) -> None:
    """Every valid rating counts once in its turn, its category and the whole; -1 counts nowhere."""
    scores = aggregate(Judgment(identity, turn, "m", "j", score) for identity, turn, score in rows).of("m")
    valid = [score for _, _, score in rows if score != -1]
    assert scores.unrated == len(rows) - len(valid)
    assert scores.overall.value == (pytest.approx(sum(valid) / len(valid)) if valid else None)
    for parts in (scores.turns.values(), [category.overall for category in scores.categories.values()]):
        assert sum(part.ratings for part in parts) == len(valid)
        assert sum((part.value or 0) * part.ratings for part in parts) == pytest.approx(sum(valid))
    assert scores.repeated == len(rows) - len({(identity, turn) for identity, turn, _ in rows})


ANSWER = {"question_id": 1, "model_id": "fake", "choices": [{"index": 0, "turns": ["a", "b"]}]}
RATED = {"question_id": 81, "model": "m", "judge": ["j", "single-v1"], "score": 5, "turn": 1}
BAD: dict[str, tuple[Callable[[Path], object], object, str]] = {
    "questions: JSON": (read_questions, b"{broken\n{}", "line 1 is not valid JSON"),
    "questions: cut": (read_questions, b'{"question_id": 1, "category": "x", "turns": ["a"]}\n{"que', "line 2 is not valid JSON"),
    "questions: UTF-8": (read_questions, b"\xff\xfe", "line 1 is not valid JSON"),
    "questions: nothing": (read_questions, b"\n", "holds nothing"),
    "questions: a list": (read_questions, b"[1]", "is a list; one JSON object a line"),
    "questions: of IFEval": (read_questions, [{"key": 1, "prompt": "x"}], "has no question_id, found were key, prompt"),
    "questions: no category": (read_questions, [{"question_id": 1, "turns": ["a"]}], "has no category"),
    "questions: turns": (read_questions, [{"question_id": 1, "category": "x", "turns": [1]}], "turns is .1.;"),
    "questions: three turns": (read_questions, [{"question_id": 1, "category": "x", "turns": ["a"] * 3}], "has 3 turns"),
    "questions: twice": (read_questions, [{"question_id": 1, "category": "x", "turns": ["a"]}] * 2, "second question 1"),
    "questions: true": (read_questions, [{"question_id": True, "category": "x", "turns": ["a"]}], "question_id is true"),
    "answers: no choices": (read_answers, [{"question_id": 1, "response": "x"}], "has no choices"),
    "answers: empty choices": (read_answers, [ANSWER | {"choices": []}], "choices is"),
    "answers: text": (read_answers, [ANSWER | {"choices": [{"turns": "a"}]}], "turns is"),
    "answers: failed": (read_answers, [ANSWER | {"choices": [{"turns": ["a", "$ERROR$"]}]}], "failed call"),
    "prompts: too few": (read_judge_prompts, PROMPTS[:2], "has no prompt single-v1-multi-turn"),
    "prompts: a field": (read_judge_prompts, [PROMPTS[0] | {"prompt_template": "{answer} {answer.x}"}], "fields of prompt_template"),
    "prompts: no answer": (read_judge_prompts, [PROMPTS[0] | {"prompt_template": "{question}"}], "needs answer"),
    "prompts: braces": (read_judge_prompts, [PROMPTS[0] | {"prompt_template": "{answer"}], "malformed"),
    "prompts: pairs": (read_judge_prompts, [PROMPTS[0] | {"output_format": "[[A]]"}], "output_format"),
    "judgments: NaN": (read_judgments, [RATED | {"score": float("nan")}], "score is nan"),
    "judgments: 50": (read_judgments, [RATED | {"score": 50}], "score is 50"),
    "judgments: null": (read_judgments, [RATED | {"score": None}], "score is null"),
    "judgments: true": (read_judgments, [RATED | {"score": True}], "score is true"),
    "judgments: text": (read_judgments, [RATED | {"score": "5"}], "score is"),
    "judgments: turn": (read_judgments, [RATED | {"turn": 3}], "turn is 3"),
    "judgments: judge": (read_judgments, [RATED | {"judge": "gpt-4"}], "judge is"),
    "judgments: of pairs": (read_judgments, [{"question_id": 81, "model_1": "a", "model_2": "b"}], "has no model, found were"),
    "judgments: answers": (read_judgments, [ANSWER], "has no model, found were"),
}


@pytest.mark.parametrize(("read", "content", "sentence"), BAD.values(), ids=BAD)
def test_files_that_are_wrong(tmp_path: Path, read: Callable[[Path], object], content: Any, sentence: str) -> None:
    """A malformed or foreign file is one sentence that names it, and its line where it has one."""
    path = tmp_path / "file.jsonl"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_lines(path, content)
    with pytest.raises(Zamba2Error, match=sentence) as error:
        read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("read", [read_questions, read_answers, read_judge_prompts, read_judgments])
def test_files_that_are_missing(tmp_path: Path, read: Callable[[Path], object]) -> None:
    """A missing file is one sentence that says what it would be."""
    with pytest.raises(Zamba2Error, match=r"does not exist; a file of .* \(FastChat's"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(Zamba2Error, match="cannot be read"):
        read(tmp_path)


def test_answers_of_other_runs(bench: Bench) -> None:
    """Answers of another model, of other settings or to other questions are neither mixed in nor overwritten."""
    with pytest.raises(KeyboardInterrupt):
        answer_questions(Fake(limit=6), bench.questions, bench.answers)
    before = {path: path.read_bytes() for path in bench.answers.parent.iterdir()}
    other = read_questions(write_lines(bench.folder / "other.jsonl", [q | {"turns": ["x", "y"][: len(q["turns"])]} for q in QUESTIONS]))
    for fake, questions, settings, sentence in (
        (Fake("other"), bench.questions, {}, "is an answer of fake, not of other"),
        (Fake(), bench.questions, {"max_tokens": 7}, "max_new_token 1024, not 7"),
        (Fake(), bench.questions, {"seed": 1}, "seed 0, not 1"),
        (Fake(), other, {}, "another question"),
        (Fake(format="bf16"), bench.questions, {}, "format q4, not bf16"),
        (Fake(sha256="new"), bench.questions, {}, "sha256 00ff, not new"),
        (Fake(adapter_sha256="a"), bench.questions, {}, "adapter_sha256 None, not a"),
        (Fake(format=None), bench.questions, {}, "format q4, not None"),
        (Fake(), [], {}, "there are no questions"),
    ):
        with pytest.raises(Zamba2Error, match=sentence):
            answer_questions(fake, questions, bench.answers, **settings)
        assert fake.asked == []
    assert {path: path.read_bytes() for path in bench.answers.parent.iterdir()} == before
    few = Fake()
    answer_questions(few, bench.questions[:1], bench.answers)  # some of the questions first
    rest = Fake()
    answer_questions(rest, bench.questions, bench.answers)
    assert 6 + len(few.asked) + len(rest.asked) == TURNS


def test_a_model_that_leaves_answers_out(bench: Bench) -> None:
    """A model that ends without an answer to each question is an error; the answers it gave are kept."""

    class Lazy(Fake):
        def answer(self, conversations: Any, **settings: Any) -> Iterator[tuple[int, str]]:
            yield from list(super().answer(conversations[:1], **settings))

    with pytest.raises(Zamba2Error, match="gave no answer in turn 1 to question 4"):
        answer_questions(Lazy(), bench.questions, bench.answers)
    assert answer_questions(Fake(), bench.questions, bench.answers).made == TURNS - 1


def test_nothing_is_asked_where_something_is_missing(bench: Bench) -> None:
    """Missing answers and references are found before the judge is asked."""
    answer_questions(Fake(), bench.questions[:3], bench.answers)
    answers = read_answers(bench.answers)
    with pytest.raises(Zamba2Error, match=r"fake\.jsonl lacks an answer to a turn of question 4 and 1 more"):
        judge_requests(bench.questions, answers, bench.prompts, bench.references)
    with pytest.raises(Zamba2Error, match="questions of math are judged beside reference answers"):
        judge_requests(bench.questions[:3], answers, bench.prompts)
    with pytest.raises(Zamba2Error, match=r"lacks a reference answer to a turn of question 2;"):
        judge_requests(bench.questions[:3], answers, bench.prompts, ModelAnswers("r", {2: ("5",)}, Path("r.jsonl")))
    assert len(judge_requests([bench.questions[0]], answers, bench.prompts)) == 2


def test_judgments_of_other_answers(bench: Bench) -> None:
    """Judgments of other answers by a model of the same name are not taken for those of these."""
    answer_questions(Fake(), bench.questions, bench.answers)
    with ScriptedJudge() as server:
        judge_answers(server.endpoint(), bench.requests(), bench.judgments)
        before = bench.judgments.read_bytes()
        rows = lines_of(bench.answers)
        rows[0]["choices"][0]["turns"][0] = "something else"
        write_lines(bench.answers, rows)
        with pytest.raises(Zamba2Error, match="judges another answer of fake"):
            judge_answers(server.endpoint(), bench.requests(), bench.judgments)
        assert len(server.asked) == TURNS and bench.judgments.read_bytes() == before


def test_judgments_that_cannot_be_aggregated(bench: Bench) -> None:
    """Unknown models and questions, two judges, and no judgments at all are each one sentence."""
    good = Judgment(81, 1, "m", "gpt-4", 5)
    with pytest.raises(Zamba2Error, match="no judgment of you; there are judgments of m"):
        aggregate([good]).of("you")
    with pytest.raises(Zamba2Error, match="no judgments"):
        aggregate([])
    with pytest.raises(Zamba2Error, match="judged by gpt-4 and gpt-5"):
        aggregate([good, Judgment(82, 1, "m", "gpt-5", 5)])
    with pytest.raises(Zamba2Error, match="question 7, which is not known; give its file of questions"):
        aggregate([Judgment(7, 1, "m", "gpt-4", 5)])
    with pytest.raises(Zamba2Error, match="question 81, which is not known; it belongs to other questions"):
        aggregate([good], bench.questions)
    with pytest.raises(Zamba2Error, match="turn 2 of question 4, which has one turn"):
        aggregate([Judgment(4, 2, "m", "gpt-4", 5)], bench.questions)
    with pytest.raises(Zamba2Error, match="score of m on question 81 is nan"):
        aggregate([Judgment(81, 1, "m", "gpt-4", float("nan"))])


def test_file_names() -> None:
    """Any model's name is a name of one file in FastChat's folders."""
    assert answers_file(Path("d"), "hf:Zyphra/Zamba2") == Path("d/model_answer/hf-Zyphra-Zamba2.jsonl")
    assert judgments_file(Path("d"), "gpt-4") == Path("d/model_judgment/gpt-4_single.jsonl")
    assert answers_file(Path("d"), "../..") == Path("d/model_answer/model.jsonl")


# ---- the chart -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # of matplotlib and what it reads fonts with
def test_chart(tmp_path: Path) -> None:
    """The same scores give the same bytes, of one model by turn and of several by model, as a PNG and an SVG that are whole."""
    pytest.importorskip("matplotlib", reason="charts need the extra [evaluate]")
    judgments = [
        Judgment(81 + i, turn, model, "gpt-4", (i * turn + len(model)) % 10 + 1 if i != 79 else -1)
        for i in range(80) for turn in (1, 2) for model in ("a", "_another $model^$ with a rather long name " * 3)
    ]  # fmt: skip
    scores = list(aggregate(judgments).models.values())
    first, second, several = chart(scores[:1], tmp_path / "a"), chart(scores[:1], tmp_path / "b"), chart(scores, tmp_path / "c")
    assert [path.name for path in several] == ["c.png", "c.svg"]
    for one_path, other in zip(first, second, strict=True):
        assert one_path.read_bytes() == other.read_bytes()
    for png, svg in (first, several):
        assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and b"</svg>" in svg.read_bytes()
    with pytest.raises(Zamba2Error, match="a chart of 0 models"):
        chart([], tmp_path / "none")
