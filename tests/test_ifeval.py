"""IFEval: the published figure, scores that are the same every time, runs that go on, and files that are not what they should be."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from zamba2.errors import Zamba2Error
from zamba2.evaluate import ifeval
from zamba2.evaluate.ifeval import METRICS, Prompt, check_prompts, evaluate, read_prompts, read_responses, score

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "ifeval"
PROMPTS, RESPONSES = DATA / "input_data.before_20240611.jsonl", DATA / "input_response_data_gpt4_20231107_145030.jsonl"
DRAWN = (1122, 1129)  # keys of prompts for which a checker draws a letter
# lm-eval's own imports warn of each other.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::SyntaxWarning"),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("lm_eval", "nltk", "langdetect")), reason="needs the extra [evaluate]"
    ),
]
needs_data = pytest.mark.skipif(not RESPONSES.is_file(), reason=f"{DATA} (prompts and GPT-4's answers) is not there")


@pytest.fixture(autouse=True)
def nltk_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """NLTK's data from the shared folder; its absence is a reason to skip, never to download."""
    if not (DATA / "nltk_data").is_dir():
        pytest.skip(f"{DATA / 'nltk_data'} is not there")
    monkeypatch.setenv("NLTK_DATA", str(DATA / "nltk_data"))


@dataclass
class Fake:
    """Answers by rule, last first; stops working after ``most`` of them."""

    most: int = 10**6
    name: str = "fake"
    about: dict[str, Any] = field(default_factory=lambda: {"sha256": "00ff"})
    asked: list[str] = field(default_factory=list)
    end: str = "é"

    def answer(
        self, conversations: Sequence[Sequence[Mapping[str, str]]], *, max_tokens: int, temperature: float = 0.0, seed: int | None = None
    ) -> Iterator[tuple[int, str]]:
        assert temperature == 0.0 and max_tokens > 0
        for index in reversed(range(len(conversations))):
            (message,) = conversations[index]
            if len(self.asked) == self.most:
                raise KeyboardInterrupt
            assert message["role"] == "user"
            self.asked.append(message["content"])
            yield index, f"No commas in this answer to {message['content']} {self.end}"


def prompt(key: int, *instructions: str, text: str | None = None, **arguments: Any) -> Prompt:
    return Prompt(key, text or f"question {key}", instructions, tuple(arguments if i == 0 else {} for i in range(len(instructions))))


COMMAS = [prompt(i, "punctuation:no_comma") for i in range(5)]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- scores ----------------------------------------------------------------------------------------------------------


@needs_data
@pytest.mark.timeout(600)
def test_the_published_answers_score_what_was_published() -> None:
    """GPT-4's published answers score 76.89 and 83.57 strict, 79.67 and 85.61 loose; the tables add up to that."""
    result = score(read_prompts(PROMPTS), read_responses(RESPONSES))
    found = {name: round(estimate.value, 2) for name, estimate in result.metrics.items()}
    assert found == dict(zip(METRICS, (76.89, 83.57, 79.67, 85.61), strict=True)) | {"mean_strict": 80.23}
    assert (result.prompts, result.instructions, len(result.kinds), result.unused) == (541, 834, 25, 0)
    assert all(e.value - 5 < e.low < e.value < e.high < e.value + 5 for e in result.metrics.values())
    followed = sum(k["count"] * k["strict"] for k in result.kinds.values()) / 834
    assert followed == pytest.approx(result.metrics["instruction_strict"].value)
    assert sum(all(e["strict"]) for e in result.examples) / 5.41 == pytest.approx(result.metrics["prompt_strict"].value)
    assert json.loads(json.dumps(result.to_dict()))["metrics"]["prompt_loose"]["value"] == result.metrics["prompt_loose"].value
    assert "| prompt, strict | 76.89 |" in result.to_markdown() and "| punctuation:no_comma |" in result.to_markdown()


@needs_data
@pytest.mark.timeout(600)
def test_ten_runs_agree() -> None:
    """Ten runs over the prompts with any chance in their checking agree, in three processes, whatever was drawn before and in any order."""
    chance = ("language:response_language", "change_case:english_capital", "change_case:english_lowercase")
    prompts = [p for p in read_prompts(PROMPTS) if p.key in DRAWN or set(p.instructions) & set(chance)][-24:]
    prompts += [p for p in read_prompts(PROMPTS) if p.key in DRAWN and p not in prompts]
    responses = read_responses(RESPONSES)
    from langdetect import DetectorFactory

    first = score(prompts, responses).to_dict()
    for run in range(7):
        random.seed(run)
        DetectorFactory.seed = run
        state = random.getstate()
        again = score(random.Random(run).sample(prompts, len(prompts)), responses)
        assert sorted(again.examples, key=lambda e: e["key"]) == sorted(first["examples"], key=lambda e: e["key"])
        assert {name: e.value for name, e in again.metrics.items()} == {name: e["value"] for name, e in first["metrics"].items()}
        assert random.getstate() == state and DetectorFactory.seed == run  # nothing leaks out either
    DetectorFactory.seed = None
    code = f"""
import json, pathlib, sys
from zamba2.evaluate.ifeval import read_prompts, read_responses, score
keys = {[p.key for p in prompts]}
found = {{p.key: p for p in read_prompts(pathlib.Path({str(PROMPTS)!r}))}}
print(json.dumps(score([found[k] for k in keys], read_responses(pathlib.Path({str(RESPONSES)!r}))).to_dict()))
"""
    for _ in range(2):  # each with another hash seed
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
        assert json.loads(done.stdout) == first, done.stderr


@needs_data
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_whole_runs_agree() -> None:
    """Ten runs over all 541 prompts, each in a process of its own with another hash seed and other draws before, give the same bytes."""
    code = f"""
import json, pathlib, random
from zamba2.evaluate.ifeval import read_prompts, read_responses, score
random.random()
prompts, responses = (read(pathlib.Path(path)) for read, path in ((read_prompts, {str(PROMPTS)!r}), (read_responses, {str(RESPONSES)!r})))
print(json.dumps(score(prompts, responses).to_dict()))
"""
    runs = []
    for _ in range(10):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        runs.append(done.stdout)
    assert len(set(runs)) == 1 and round(json.loads(runs[0])["metrics"]["prompt_strict"]["value"], 2) == 76.89


def test_strict_and_loose() -> None:
    """Strict takes the answer as it is; loose forgives a first line, a last line and asterisks; an empty answer follows nothing."""
    prompts = [prompt(i, "startend:quotation") for i in range(4)]
    said = ['"good"', 'Sure:\n"good"', '"good', ""]
    result = score(prompts, {p.text: s for p, s in zip(prompts, said, strict=True)})
    assert [e["strict"] for e in result.examples] == [[True], [False], [False], [False]]
    assert [e["loose"] for e in result.examples] == [[True], [True], [False], [False]]
    assert {name: result.metrics[name].value for name in METRICS} == dict(zip(METRICS, (25, 25, 50, 50), strict=True))
    assert result.metrics["mean_strict"].value == 25
    assert result.kinds == {"startend:quotation": {"count": 4, "strict": 25, "loose": 50}}


def test_levels_weigh_differently() -> None:
    """At the prompt level all instructions of a prompt must be followed; at the other each counts; the mean is of the strict."""
    prompts = [prompt(0, "punctuation:no_comma", "startend:quotation"), prompt(1, "punctuation:no_comma")]
    result = score(prompts, {"question 0": "no comma", "question 1": "none", "another question": "unused"})
    values = {name: e.value for name, e in result.metrics.items()}
    assert values["prompt_strict"] == 50 and values["instruction_strict"] == pytest.approx(200 / 3)
    assert values["mean_strict"] == pytest.approx((50 + 200 / 3) / 2) and result.unused == 1


def test_intervals() -> None:
    """An interval holds its value, has no width where every prompt came out alike, and shrinks with the square root of the prompts."""
    widths = []
    for n in (50, 200):
        strict = [[i % 2 == 0] for i in range(n)]
        e = ifeval._estimates(strict, [[True]] * n, 0, 4000)
        assert e["prompt_strict"].low < 50 < e["prompt_strict"].high and (e["prompt_loose"].low, e["prompt_loose"].high) == (100, 100)
        widths.append(e["prompt_strict"].high - e["prompt_strict"].low)
    assert widths[0] == pytest.approx(2 * 1.96 * 50 / 50**0.5, rel=0.1) and widths[0] / widths[1] == pytest.approx(2, rel=0.1)
    single = ifeval._estimates(strict, strict, 0, 1)["prompt_strict"]
    assert single.low == single.high  # no more are drawn than are asked for


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    """What was answered before Ctrl-C is on the disk and not asked again; the score is that of a run in one piece."""
    file, seen = tmp_path / "answers" / "a.jsonl", []
    with pytest.raises(KeyboardInterrupt):
        evaluate(Fake(most=2), COMMAS, file)
    assert len(read_responses(file)) == 2
    second = Fake()
    result = evaluate(second, COMMAS, file, progress=lambda done, total: seen.append((done, total)))
    assert len(second.asked) == 3 and seen == [(2, 5), (3, 5), (4, 5), (5, 5)]
    whole = evaluate(Fake(), COMMAS, tmp_path / "b.jsonl")
    assert result == whole == score(COMMAS, read_responses(file)) and result.metrics["prompt_strict"].value == 100
    third = Fake()
    assert evaluate(third, COMMAS, file) == result and third.asked == []
    assert {row["key"] for row in map(json.loads, file.read_text().splitlines())} == set(range(5))


def test_a_line_cut_off_is_written_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run killed inside a line loses that answer alone, and none where the line's end alone is missing."""
    file = tmp_path / "a.jsonl"
    result = evaluate(Fake(), COMMAS, file)
    data = file.read_bytes()
    last = data[:-1].rfind(b"\n") + 1
    for cut, lost in ((last + 1, 1), (len(data) - 2, 1), (len(data) - 1, 0)):
        file.write_bytes(data[:cut])
        again = Fake()
        assert evaluate(again, COMMAS, file) == result and len(again.asked) == lost and file.read_bytes() == data
        assert ("breaks off" in capsys.readouterr().err) == bool(lost)


def test_any_answer_can_be_written_down(tmp_path: Path) -> None:
    """Half a surrogate pair, which an endpoint may answer, is kept as it came."""
    file = tmp_path / "a.jsonl"
    evaluate(Fake(end="\ud800"), COMMAS, file)
    assert {answer[-1] for answer in read_responses(file).values()} == {"\ud800"}


def test_answers_of_another_model_are_refused(tmp_path: Path) -> None:
    """A file of another model, other weights or another limit is not gone on with, and stays as it is."""
    file = tmp_path / "a.jsonl"
    evaluate(Fake(), COMMAS, file)
    before = file.read_bytes()
    for other, limit, said in (
        (Fake(name="second"), ifeval.MAX_TOKENS, "model 'fake', not 'second'"),
        (Fake(about={"sha256": "other"}), ifeval.MAX_TOKENS, "sha256 '00ff', not 'other'"),
        (Fake(about={}), ifeval.MAX_TOKENS, "sha256 '00ff', not None"),
        (Fake(about={"sha256": "00ff", "adapter_sha256": "a"}), ifeval.MAX_TOKENS, "adapter_sha256 None, not 'a'"),
        (Fake(about={"sha256": "00ff", "kv_format": "q8"}), ifeval.MAX_TOKENS, "kv_format None, not 'q8'"),
        (Fake(), 7, "max_tokens 1280, not 7"),
    ):
        with pytest.raises(Zamba2Error, match=said):
            evaluate(other, COMMAS, file, max_tokens=limit)
        assert other.asked == [] and file.read_bytes() == before
    google = write(tmp_path / "g.jsonl", {"prompt": "question 0", "response": "x"})
    with pytest.raises(Zamba2Error, match=r"line 1 was answered with model None, not 'fake'"):
        evaluate(Fake(), COMMAS, google)


# ---- what is wrong with files ----------------------------------------------------------------------------------------

GOOD = {"key": 1, "prompt": "q", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": None}]}
BAD_PROMPTS = {
    "no object": ([[1]], "line 1 is a list; an object with key, prompt"),
    "no JSON": ([GOOD, '{"key"'], "line 2 is not valid JSON"),
    "wrong keys": ([{"question": "x"}], "line 1 has no key; IFEval's prompts have key, prompt, instruction_id_list, kwargs"),
    "type": ([GOOD | {"kwargs": {}}], "line 1 has a dict as kwargs"),
    "key": ([GOOD | {"key": True}], "line 1 has a bool as key"),
    "lengths": ([GOOD | {"kwargs": [{}, {}]}], "names 1 instructions and has arguments for 2"),
    "no instruction": ([GOOD | {"kwargs": [], "instruction_id_list": []}], "names 0 instructions"),
    "arguments": ([GOOD | {"kwargs": [1]}], "arguments of instructions that are no objects"),
    "blank": ([GOOD | {"prompt": " "}], "an empty prompt"),
    "twice": ([GOOD, GOOD | {"prompt": "other"}], "has the key 1 twice"),
    "again": ([GOOD, GOOD | {"key": 2}], "has the prompt 'q' twice"),
    "empty": ([""], "is empty; IFEval's prompts are needed"),
}
BAD_RESPONSES = {
    "no object": (["1"], 'line 1 is a int; an object with "prompt" and "response"'),
    "no JSON": ([{"prompt": "q", "response": "a"}, "{"], "line 2 is not valid JSON"),
    "wrong keys": ([{"prompt": "q", "answer": "a"}], "line 1 has no response"),
    "type": ([{"prompt": "q", "response": ["a"]}], "line 1 has a list as response"),
    "two answers": ([{"prompt": "q", "response": "a"}, {"prompt": "q", "response": "b"}], "line 2 answers a prompt that has another"),
    "empty": ([], "is empty; lines with"),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_bad_prompts_are_one_sentence(case: str, tmp_path: Path) -> None:
    """Whatever is wrong with a file of prompts, one sentence names the file and the place."""
    rows, said = BAD_PROMPTS[case]
    with pytest.raises(Zamba2Error) as error:
        read_prompts(write(tmp_path / "p.jsonl", *rows))
    assert said in str(error.value) and "p.jsonl" in str(error.value)


@pytest.mark.parametrize("case", BAD_RESPONSES)
def test_bad_responses_are_one_sentence(case: str, tmp_path: Path) -> None:
    """Whatever is wrong with a file of responses, one sentence names the file and the place."""
    rows, said = BAD_RESPONSES[case]
    with pytest.raises(Zamba2Error) as error:
        read_responses(write(tmp_path / "r.jsonl", *rows))
    assert said in str(error.value) and "r.jsonl" in str(error.value)


def test_missing_files_say_what_for(tmp_path: Path) -> None:
    """A file that is not there, or the Hub when it may not be asked: the sentence says what it holds and what to give instead."""
    with pytest.raises(Zamba2Error, match=r"none\.jsonl does not exist; it is to hold IFEval's prompts"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(Zamba2Error, match=r"none\.jsonl does not exist; it is to hold the answers to score"):
        read_responses(tmp_path / "none.jsonl")
    with pytest.raises(Zamba2Error, match=r"google/IFEval on the Hub holds the 541 prompts .* downloads are off; give its file"):
        read_prompts(offline=True)
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(Zamba2Error, match="is not UTF-8 text"):
        read_responses(tmp_path / "latin.jsonl")


def test_a_prompt_without_response_is_an_error() -> None:
    """Prompts without a response are counted in one sentence, never scored as wrong or left out."""
    with pytest.raises(Zamba2Error, match=r"4 of 5 prompts have no response; the first has key 1: 'question 1'"):
        score(COMMAS, {"question 0": "x"})
    with pytest.raises(Zamba2Error, match="0 of 0 prompts"):
        score([], {})


def test_unknown_instructions_are_found_before_the_first_answer(tmp_path: Path) -> None:
    """A prompt whose instructions or arguments lm-eval does not know stops the run before anything is asked."""
    for bad, said in (
        (prompt(9, "punctuation:no_semicolon"), "key 9 has the instruction 'punctuation:no_semicolon'"),
        (prompt(9, "punctuation:no_comma", many=3), r'key 9 has kwargs \[{"many": 3}\], which its instructions do not take'),
        (prompt(9, "length_constraints:number_words", relation="about", num_words=3), "which its instructions do not take"),
    ):
        fake = Fake()
        with pytest.raises(Zamba2Error, match=said):
            evaluate(fake, [*COMMAS, bad], tmp_path / "a.jsonl")
        assert fake.asked == [] and not (tmp_path / "a.jsonl").exists()


@needs_data
def test_both_files_of_prompts_are_whole() -> None:
    """The prompts of before and after June 2024 are read and known to the checkers; the one text that differs is named as unanswered."""
    for path in (PROMPTS, DATA / "input_data.jsonl"):
        prompts = read_prompts(path)
        assert len(prompts) == 541
        check_prompts(prompts)
    with pytest.raises(Zamba2Error, match="1 of 541 prompts have no response"):
        score(prompts, read_responses(RESPONSES))


def test_nltk_data_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without NLTK's data and without a network the sentence names it and where to put it; nothing is downloaded."""
    import nltk

    def refuse(*_: Any, **__: Any) -> bool:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk, "download", refuse)
    monkeypatch.delenv("NLTK_DATA")
    with pytest.raises(Zamba2Error, match=r"punkt_tab, with which .* downloads are off; set NLTK_DATA"):
        check_prompts(COMMAS, offline=True)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def fail(*_: Any, print_error_to: Any, **__: Any) -> bool:
        print("[nltk_data] Error loading punkt_tab:\n[nltk_data]     no such host", file=print_error_to)
        return False

    monkeypatch.setattr(nltk, "download", fail)
    with pytest.raises(Zamba2Error, match=r"it cannot be downloaded \(Error loading punkt_tab: no such host\); set NLTK_DATA"):
        check_prompts(COMMAS)


def test_a_hub_out_of_reach_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's libraries are quiet about their tries, and what comes of them is one sentence that names the file to give instead."""
    import datasets
    from huggingface_hub.utils import logging

    heard = []

    def refuse(*_: Any, **__: Any) -> Any:
        heard.append(logging.get_verbosity())  # type: ignore[no-untyped-call]
        raise ConnectionError("no such host")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    before = logging.get_verbosity()  # type: ignore[no-untyped-call]
    try:
        with pytest.raises(Zamba2Error, match=r"cannot be read \(no such host\); give its file, input_data.jsonl"):
            read_prompts()
    finally:
        logging.set_verbosity(before)
    assert heard == [logging.ERROR]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra's libraries the sentence says what to install."""
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(Zamba2Error, match=r"pip install 'zamba2\[evaluate\]'"):
        check_prompts(COMMAS)


def test_import_is_cheap() -> None:
    """Importing the module loads none of the libraries behind it."""
    code = "import sys, zamba2.evaluate.ifeval\nprint({'lm_eval', 'nltk', 'langdetect', 'datasets', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("set()\n", "")
