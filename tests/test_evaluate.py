"""``zamba2 evaluate``: whole runs of the model inside the package, what they leave behind, and one sentence for what cannot be."""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_mt_bench import QUESTIONS, SHARED, TURNS, Bench, ScriptedJudge, published

import zamba2
from zamba2.cli import run
from zamba2.commands.evaluate import agree
from zamba2.errors import Zamba2Error
from zamba2.evaluate.answers import hash_of, open_answers
from zamba2.evaluate.perplexity import log_probabilities
from zamba2.evaluate.results import CARD, beside_the_card
from zamba2.language.model import LanguageModel
from zamba2.weights.hub import DEMO, RANDOM

NLTK = SHARED.parent / "ifeval" / "nltk_data"
# lm_eval, transformers and datasets warn of each other.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::SyntaxWarning", "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)  # fmt: skip


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The one JSON document of a command that succeeds."""
    assert run(["evaluate", *arguments, "--json"]) == 0
    out = capsys.readouterr().out
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def test_our_answers_do_not_depend_on_company() -> None:
    """Eleven conversations asked together get the answers they get alone, greedily and sampled, with the index they were asked under."""
    words = ("moon", "river", "apple", "house", "bread", "fox", "sea", "door", "hat", "bell", "owl")
    asked = [[{"role": "user", "content": f"Say exactly this: {word}"}] for word in words]
    answers = open_answers("demo", threads=1)
    for options in ({"max_tokens": 12}, {"max_tokens": 12, "temperature": 3.0, "seed": 5}):
        together = dict(answers.answer(asked, **options))  # type: ignore[arg-type]
        assert sorted(together) == list(range(len(asked)))
        model = zamba2.load(threads=1)
        assert [together[index] for index in range(len(asked))] == [model.chat(messages, **options).text for messages in asked]


def test_a_result_names_the_model(tmp_path: Path) -> None:
    """What is said of a model: its name, the hash of its weights, of all their files, parameters, backend and format."""
    about = open_answers("demo").about
    assert about["model"] == "demo" and about["format"] == "q8" and about["backend"] == "NativeBackend" and about["parameters"] > 2e6
    assert about["sha256"] == hash_of(DEMO) != hash_of(RANDOM)
    for number in (1, 2):
        (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(b"x")
    before = hash_of(tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes(b"y")
        assert hash_of(tmp_path) != before
        file.write_bytes(b"x")


def test_transformers_answers() -> None:
    """hf:FOLDER answers greedily, or sampled with a seed from all tokens, with transformers' own words; options of ours are refused."""
    pytest.importorskip("transformers", reason="it is of the extra [evaluate]")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = [[{"role": "user", "content": text}] for text in ("Hello", "Write of the sea.")]
    theirs = open_answers(f"hf:{RANDOM}", dtype="float32")
    found, sampled = (dict(theirs.answer(asked, max_tokens=5, **options)) for options in ({}, {"temperature": 0.9, "seed": 3}))
    tokenizer = AutoTokenizer.from_pretrained(RANDOM)
    model = AutoModelForCausalLM.from_pretrained(RANDOM, dtype=torch.float32)
    for index, messages in enumerate(asked):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, max_new_tokens=5, do_sample=False)
        assert found[index] == tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        torch.manual_seed(3)
        out = model.generate(**ids, max_new_tokens=5, do_sample=True, temperature=0.9, top_k=0, top_p=1.0)
        assert sampled[index] == tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    with pytest.raises(Zamba2Error, match="format is 'q4'"):
        open_answers(f"hf:{RANDOM}", format="q4")
    with pytest.raises(Zamba2Error, match="transformers cannot load"):
        open_answers(f"hf:{RANDOM.parent}", offline=True)


def test_endpoint_answers() -> None:
    """openai:URL#MODEL asks the endpoint for that model; an address without a model is refused."""
    with ScriptedJudge(script=lambda number, body: f"{body['model']} heard {body['messages'][-1]['content']}") as server:
        answers = open_answers(f"openai:{server.url}#me/mine")
        found = dict(answers.answer([[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]], max_tokens=7))
        assert found == {0: "me/mine heard a", 1: "me/mine heard b"} and {body["max_tokens"] for body in server.bodies} == {7}
        assert answers.name == "me/mine" and answers.about["backend"] == "openai"
        with pytest.raises(Zamba2Error, match="names no model"):
            open_answers(f"openai:{server.url}")
        with pytest.raises(Zamba2Error, match="threads is 2"):
            open_answers(f"openai:{server.url}#m", threads=2)


def test_mt_bench_from_answers_to_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model inside the package answers, a scripted judge rates, document, table and chart are written; a second run asks nothing."""
    pytest.importorskip("matplotlib", reason="it is of the extra [evaluate]")
    Bench(tmp_path)
    files = ["--questions", str(tmp_path / "question.jsonl"), "--judge-prompts", str(tmp_path / "judge_prompts.jsonl")]
    files += ["--references", str(tmp_path / "reference_answer" / "judge-1.jsonl"), "--out", str(tmp_path / "out"), "-n", "20"]
    with ScriptedJudge() as server:
        options = [*files, "--judge", "judge-1", "--judge-url", server.url, "--prices", "10", "30"]
        found = document(capsys, "mt-bench", *options)
        assert len(server.asked) == TURNS
        again = document(capsys, "mt-bench", *options)
        assert len(server.asked) == TURNS and again["scores"] == found["scores"]
    assert found["scores"]["demo"]["mean"] == pytest.approx(sum(range(1, TURNS + 1)) / TURNS)
    assert (found["evaluation"], found["model"], found["format"], found["settings"]["judge"]) == ("mt-bench", "demo", "q8", "judge-1")
    assert found["settings"]["max_tokens"] == 20
    folder = tmp_path / "out" / "demo"
    assert {path.name for path in folder.iterdir()} == {f"mt-bench.{suffix}" for suffix in ("json", "md", "png", "svg")}
    assert "| demo | 0.0024B | 50.00 |  | measured here |" in (folder / "mt-bench.md").read_text()
    (judged,) = (tmp_path / "out" / "model_judgment").glob("judge-1_single.jsonl")
    with judged.open("a") as file:  # which may hold several models' ratings
        file.write(json.dumps(json.loads(judged.read_text().splitlines()[0]) | {"model": "another"}) + "\n")
    few = document(capsys, "mt-bench", *options, "--limit", "2")  # what was asked and judged before is there, and only that is scored
    turns = sum(len(question["turns"]) for question in QUESTIONS[:2])
    assert few["scores"]["demo"]["ratings"] == turns < TURNS and set(few["scores"]) == {"demo"}
    alone = document(capsys, "mt-bench", "--judgments", str(judged), *files[:2], "--limit", "2", "--out", str(tmp_path / "alone"))
    assert alone["scores"]["demo"] == few["scores"]["demo"]
    assert run(["evaluate", "mt-bench", "--judgments", str(judged), "--limit", "2", "--out", str(tmp_path / "none")]) == 2
    assert "give it with --questions" in capsys.readouterr().err
    with ScriptedJudge(lambda number, body: 400 if number == 3 else "[[5]]") as server:
        assert run(["evaluate", "mt-bench", *files, "--judge", "judge-2", "--judge-url", server.url, "--prices", "1", "1"]) == 0
    said = capsys.readouterr().err
    assert " has no rating: status 400" in said and "1 turns have no rating, so the score is incomplete" in said
    assert run(["evaluate", "mt-bench", *files]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "model_answer" / "demo.jsonl")
    with ScriptedJudge() as server:
        assert run(["evaluate", "mt-bench", *files, "--judge", "other", "--judge-url", server.url + "/nowhere"]) == 2
        assert server.asked == []
    estimated, said = capsys.readouterr().err.splitlines()
    assert f"judging takes {TURNS} requests" in estimated and "is not there (status 404" in said


def test_references_are_missed_before_anything_is_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reference answers that the judge will need are asked for at once, and not behind hours of answering."""
    Bench(tmp_path)
    files = ["--questions", str(tmp_path / "question.jsonl"), "--judge-prompts", str(tmp_path / "judge_prompts.jsonl")]
    judge = ["--judge", "judge-1", "--judge-url", "http://localhost:9/v1", "--out", str(tmp_path / "out")]
    assert run(["evaluate", "mt-bench", *files, *judge]) == 2
    assert "are judged beside reference answers" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_judging_is_agreed_to(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In a terminal nothing is judged without a yes; the end of the input is none."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for typed, goes_on in (("y\n", True), ("YES\n", True), ("\n", False), ("no\n", False), ("", False)):
        monkeypatch.setattr(sys, "stdin", typing := io.StringIO(typed))
        monkeypatch.setattr(typing, "isatty", lambda: True)
        with nullcontext() if goes_on else pytest.raises(Zamba2Error, match="nothing was judged"):
            agree("a fortune", yes=False)
    agree("a fortune", yes=True)
    assert capsys.readouterr().err.count("Go on?") == 5


@published
def test_mt_bench_aggregates_published_judgments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """--judgments gives 6.8187 for mistral-orpo-capybara, 7.125 and 6.5125 by turn, from the published file."""
    (file,) = (SHARED / "model_judgment").glob("*_single*.jsonl")
    found = document(capsys, "mt-bench", "--judgments", str(file), "--out", str(tmp_path))
    own = found["scores"]["mistral-orpo-capybara"]
    assert own["mean"] == pytest.approx(6.81875) and own["of_100"] == pytest.approx(68.1875)
    assert [own["turns"][turn]["mean"] for turn in "12"] == [7.125, 6.5125]


@pytest.mark.skipif(not NLTK.is_dir(), reason=f"{NLTK} is absent: what splits sentences is read from there")
def test_ifeval_from_prompts_to_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The model inside the package answers prompts in IFEval's layout; a longer run answers only what is new; --responses scores alone."""
    pytest.importorskip("lm_eval", reason="IFEval's checkers come with the extra [evaluate]")
    monkeypatch.setenv("NLTK_DATA", str(NLTK))
    rows = [
        {"key": 1, "prompt": "Sort in lower case: MOON, APPLE", "instruction_id_list": ["change_case:english_lowercase"], "kwargs": [{}]},
        {"key": 2, "prompt": "Write about a fox.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {"key": 3, "prompt": "Write these with bullets: moon, fox",
         "instruction_id_list": ["detectable_format:number_bullet_lists"], "kwargs": [{"num_bullets": 2}]},
    ]  # fmt: skip
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["ifeval", "--prompts", str(prompts), "--offline", "--out", str(tmp_path / "out")]
    assert document(capsys, *options, "--limit", "2")["scores"]["prompts"] == 2
    file = tmp_path / "out" / "demo" / "ifeval.answers.jsonl"
    first = file.read_text()
    found = document(capsys, *options)
    assert found["scores"]["instructions"] == 3 and file.read_text().startswith(first) and file.read_text().count("\n") == 3
    document(capsys, *options[:-1], str(tmp_path / "short"), "--limit", "1", "--max-tokens", "3")
    assert json.loads((tmp_path / "short" / "demo" / "ifeval.answers.jsonl").read_text())["max_tokens"] == 3
    scored = document(capsys, *options, "--responses", str(file))
    assert scored["scores"]["metrics"] == found["scores"]["metrics"] and scored["settings"]["limit"] is None
    assert "| demo | 0.0024B |  |" in (tmp_path / "out" / "demo" / "ifeval.md").read_text()


def choice_nats(model: LanguageModel, context: str, choice: str) -> float:
    """log p of a choice behind a context and a space, token by token."""
    ids = np.array(model.tokenizer.encode(f"{context} {choice}"), np.int32)
    scores = np.concatenate([scores for scores, _ in log_probabilities(model, ids)])
    picked = scores[np.arange(len(ids) - 1), ids[1:]]
    return float(picked[len(model.tokenizer.encode(context)) - 1 :].sum())


def test_tasks_of_lm_eval(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A task in a YAML file over local data runs on the model inside the package; its scores are printed and written down. Every option
    reaches lm-eval."""
    pytest.importorskip("lm_eval", reason="tasks are lm-eval's, of the extra [evaluate]")
    data = tmp_path / "questions.jsonl"
    rows = [{"question": "A fox is", "choices": ["an animal.", "spoon seven"], "answer": 0}] * 3
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "choose", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "choose.yaml").write_text(json.dumps(task))
    found = document(capsys, "tasks", str(tmp_path / "choose.yaml"), "--out", str(tmp_path / "out"))
    likely = [choice_nats(zamba2.load(), "A fox is", choice) for choice in rows[0]["choices"]]
    assert found["scores"]["choose"]["acc,none"] == float(likely[0] > likely[1]) and found["settings"]["questions"] == {"choose": 3}
    assert "| choose | acc |" in (tmp_path / "out" / "demo" / "tasks.md").read_text()
    assert run(["evaluate", "tasks", "no_such_task_anywhere.yaml", "--out", str(tmp_path / "out")]) == 2
    assert "no_such_task_anywhere" in capsys.readouterr().err
    asked: dict[str, Any] = {}
    scores = {"choose": {"acc,none": 0.5, "acc_stderr,none": 0.25, "acc_norm,none": 1.0}}
    monkeypatch.setattr("zamba2.evaluate.harness.run_tasks", lambda *_, **options: (asked.update(options), {"scores": scores})[1])
    options = ["--few-shot", "3", "--limit", "2", "--batch", "5", "--chat", "--include", str(tmp_path), "--out", str(tmp_path)]
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    document(capsys, "tasks", "x", "--offline", *options)
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1"
    wanted = {"few_shot": 3, "limit": 2, "batch": 5, "chat": True, "include": tmp_path, "cache": tmp_path / "demo" / "tasks.cache"}
    assert asked == wanted | {"progress": False}
    shown = (tmp_path / "demo" / "tasks.md").read_text()
    assert "| choose | acc | 0.5000 ± 0.2500 |\n| choose | acc_norm | 1.0000 |\n" in shown


def test_the_cards_rows_are_marked() -> None:
    """The table holds the card's five rows as its claims, and ours as measured."""
    table = beside_the_card([("mine", "2.7B", 71.0, None)])
    assert table.count("the card's claim") == len(CARD) == 5 and "| mine | 2.7B | 71.00 |  | measured here |" in table
    assert "| Zamba2-2.7B-Instruct | 2.7B | 72.40 | 48.02 | the card's claim |" in table


BAD = {
    "no questions": (["mt-bench"], "there are no questions"),
    "no judge prompts": (["mt-bench", "--questions", "QUESTIONS", "--judge", "j", "--judge-url", "http://127.0.0.1:9/v1"], "no prompts"),
    "no key": (["mt-bench", "--questions", "QUESTIONS", "--judge", "gpt-4", "--judge-key", "NO_SUCH_KEY"], "NO_SUCH_KEY"),
    "missing judgments": (["mt-bench", "--judgments", "/nowhere"], "/nowhere"),
    "missing model": (["mt-bench", "--questions", "QUESTIONS", "--model", "./nowhere"], "does not exist"),
    "missing prompts": (["ifeval", "--prompts", "/nowhere"], "/nowhere"),
    "no tokenizer": (["mt-bench", "--questions", "QUESTIONS", "--model", "BARE"], "has no tokenizer.json"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be evaluated is one sentence and exit code 2."""
    arguments, said = BAD[name]
    if arguments[0] == "ifeval":
        pytest.importorskip("lm_eval", reason="IFEval's checkers come with the extra [evaluate]")
    (tmp_path / "QUESTIONS").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "BARE").mkdir()
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "BARE" / file).symlink_to(RANDOM / file)
    line = [str(tmp_path / word) if word in ("QUESTIONS", "BARE") else word for word in arguments]
    assert run(["evaluate", *line, "--out", str(tmp_path / "out")]) == 2
    err = [row for row in capsys.readouterr().err.splitlines() if "random weights" not in row]
    assert len(err) == 1 and said in err[0]
