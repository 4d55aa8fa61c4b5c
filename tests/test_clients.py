"""Other people's clients against our server, and the script that measures it: what they are told is what the model says."""

from __future__ import annotations

import functools
import json
import operator
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings

import zamba2
from zamba2.language.model import LanguageModel
from zamba2.language.sampling import log_softmax
from zamba2.runtime.backend import Row
from zamba2.serve.grammar import Grammars

pytest.importorskip("httpx", reason="the clients come with the extra [test]")
pytest.importorskip("fastapi", reason="the server needs the extra [serve]")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import serve_load
from serve_load import TEXT, Heard
from test_serve import Live

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "serve_load.py"
DEMO = ROOT / "src" / "zamba2" / "demo"
# lm-eval, LangChain and schemathesis warn of each other and of what they bring.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::PendingDeprecationWarning", "ignore::UserWarning",
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning",
)  # fmt: skip
linux = pytest.mark.skipif(sys.platform != "linux", reason="the script reads Linux's /proc")


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return zamba2.load("demo", threads=1)


@pytest.fixture(scope="module")
def live(model: LanguageModel) -> Iterator[Live]:
    """A reply's length is small where nothing is said, so that what is drawn at random is answered soon."""
    with Live(model, allow={"max_tokens": 8}) as made:
        yield made


# ---- lm-eval ---------------------------------------------------------------------------------------------------------

QUESTIONS = [
    ("The sky is", ["blue", "green and yellow", "a fish"], 0),
    ("A cat says", ["woof", "meow", "moo, as every cow does in the morning"], 1),
    ("Water is", ["wet", "dry", "a W"], 0),
    ("Spell the word river.", ["r-i-v-e-r", "river", "the sea"], 0),
]


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks on local data: one that compares choices, one that generates."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test", "num_fewshot": 0}
    choose = common | {
        "task": "choose", "output_type": "multiple_choice", "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    go_on = common | {
        "task": "go_on", "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 12, "do_sample": False}, "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    for task in (choose, go_on):
        (folder / f"{task['task']}.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    return folder


def test_lm_eval(live: Live, model: LanguageModel, task_folder: Path, tmp_path: Path) -> None:
    """lm-eval's own command, asking the server, finds the scores, texts and log-probabilities that are the model's own."""
    for package in ("lm_eval", "aiohttp", "tenacity", "transformers"):
        pytest.importorskip(package, reason="lm-eval's client needs the extra [test]")
    from zamba2.evaluate.harness import run_tasks

    client = {
        "model": "demo", "base_url": live.url + TEXT, "tokenizer": str(DEMO), "tokenizer_backend": "huggingface", "add_bos_token": True,
        "num_concurrent": 2, "max_retries": 1, "timeout": 60,
    }  # fmt: skip
    command = [
        sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", ",".join(f"{k}={v}" for k, v in client.items()),
        "--tasks", "choose,go_on", "--include_path", task_folder, "--output_path", tmp_path, "--log_samples", "--batch_size", "2",
    ]  # fmt: skip
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.rglob("results_*.json")
    theirs = json.loads(file.read_text(encoding="utf-8"))["results"]
    ours = run_tasks(model, [task_folder / "choose.yaml", task_folder / "go_on.yaml"], progress=False, resamples=10)
    for task, metrics in (("choose", ("acc,none", "acc_norm,none")), ("go_on", ("exact_match,none",))):
        assert {name: theirs[task][name] for name in metrics} == {name: ours["scores"][task][name] for name in metrics}
    for task in ("choose", "go_on"):
        (file,) = tmp_path.rglob(f"samples_{task}_*.jsonl")
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found = {line["doc_id"]: line["filtered_resps"] for line in lines}
        own = {sample["doc_id"]: sample["filtered_resps"] for sample in ours["samples"][task]}
        assert found.keys() == own.keys() == set(range(len(QUESTIONS)))
        if task == "go_on":
            said = {number: [text.removeprefix(" ")] for number, (text,) in found.items()}  # decoded alone, a first word has no space
            assert said == own and len({text for (text,) in own.values()}) > 1
            continue
        for number, (question, choices, _) in enumerate(QUESTIONS):
            for (total, greedy), (_, also), text in zip(found[number], own[number], choices, strict=True):
                assert float(total) == pytest.approx(in_one_call(model, f"Question: {question}\nAnswer:", f" {text}"), rel=1e-6)
                assert str(greedy) == str(also)


def in_one_call(model: LanguageModel, context: str, continuation: str) -> float:
    """The log-probability of a continuation that is read at once with its context, as the server reads it; behind it, as our own tasks
    do, the engine's arithmetic differs in the last places that its formats keep."""
    whole, length = model.tokenizer.encode(context + continuation), len(model.tokenizer.encode(context))
    row = Row(np.array(whole[:-1], np.int32), model.backend.new_state(), logits=len(whole) - length)
    scores = model.backend.forward([row])[0].numpy()
    return sum(float(log_softmax(own)[token]) for own, token in zip(scores, whole[length:], strict=True))


# ---- LangChain -------------------------------------------------------------------------------------------------------

ASKED = "Tell me about a cat."


@pytest.fixture(scope="module")
def chain(live: Live) -> Any:
    """LangChain's model over the server."""
    openai = pytest.importorskip("langchain_openai", reason="LangChain comes with the extra [test]")
    return openai.ChatOpenAI(model="demo", base_url=f"{live.url}/v1", api_key="none", temperature=0, max_tokens=24, max_retries=0)


def test_langchain(chain: Any, model: LanguageModel) -> None:
    """Through ChatOpenAI a reply, whole, streamed, several at once and by the newer API, is the model's own, with its counts."""
    messages = [("system", "Be brief."), ("human", ASKED)]
    own = model.chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": ASKED}], max_tokens=24)
    whole = chain.invoke(messages)
    assert whole.content == own.text and whole.response_metadata["finish_reason"] == own.finish_reason
    assert (whole.usage_metadata["input_tokens"], whole.usage_metadata["output_tokens"]) == (own.prompt_tokens, own.completion_tokens)
    chunks = list(chain.stream(messages, stream_usage=True))
    assert "".join(chunk.content for chunk in chunks) == own.text and len(chunks) > 2
    assert [chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata] == [own.completion_tokens]
    assert [reply.content for reply in chain.batch([messages, messages, messages])] == [own.text] * 3
    assert chain.model_copy(update={"use_responses_api": True}).invoke(messages).text == own.text


def test_langchain_structured_output(chain: Any) -> None:
    """with_structured_output gives objects of a pydantic class, and of a schema; their bounds hold, whatever the model says."""
    from pydantic import BaseModel, Field

    class Cat(BaseModel):
        """A cat."""

        color: Literal["red", "black", "white"]
        age: int = Field(ge=0, le=30)
        friends: list[Literal["Tom", "Anna"]] = Field(max_length=3)

    found = chain.with_structured_output(Cat, method="json_schema").invoke(ASKED, max_tokens=100)
    assert isinstance(found, Cat)
    schema = Cat.model_json_schema() | {"additionalProperties": False}
    plain = chain.with_structured_output(schema, method="json_schema").invoke(ASKED, max_tokens=100)
    assert Cat.model_validate(plain) == found


@pytest.mark.parametrize("newer", [False, True])
def test_langchain_tools(model: LanguageModel, newer: bool) -> None:
    """Through bind_tools a reply is calls with the arguments wanted, whole and streamed; sent back with their results they are not read
    again, though LangChain writes them in its own way."""
    openai = pytest.importorskip("langchain_openai", reason="LangChain comes with the extra [test]")
    from langchain_core.messages import HumanMessage, ToolMessage

    def pick(color: Literal["red", "black"], size: Literal[1, 2]) -> str:
        """Pick a cat."""
        return f"{color} {size}"

    with Live(model, cached=True) as live:
        address: dict[str, Any] = dict(base_url=f"{live.url}/v1", api_key="none", max_retries=0, use_responses_api=newer)
        chain = openai.ChatOpenAI(model="demo", temperature=0, **address)
        bound = chain.bind_tools([pick], tool_choice="any")
        reply = bound.invoke(ASKED)
        whole = functools.reduce(operator.add, bound.stream(ASKED))
        for calls in (reply.tool_calls, whole.tool_calls):
            assert calls and all(call["args"]["color"] in ("red", "black") and call["args"]["size"] in (1, 2) for call in calls)
        assert [call["args"] for call in whole.tool_calls] == [call["args"] for call in reply.tool_calls]
        results = [ToolMessage("done", tool_call_id=call["id"], name=call["name"]) for call in reply.tool_calls]
        answer = chain.bind_tools([pick]).invoke([HumanMessage(ASKED), reply, *results[::-1]], max_tokens=8)
    assert answer.usage_metadata["input_token_details"]["cache_read"] >= reply.usage_metadata["total_tokens"]


# ---- the OpenAPI document --------------------------------------------------------------------------------------------


def openapi(live: Live, examples: int) -> int:
    """Requests drawn from the document, valid and not, held to it; how many operations there are."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis comes with the extra [test]")
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    document = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    for operation in operations:
        modes = list(schemathesis.GenerationMode) if operation.method.upper() == "POST" else [schemathesis.GenerationMode.POSITIVE]
        for mode in modes:  # what has no body cannot be asked wrongly

            @settings(max_examples=examples)
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                if isinstance(case.body, dict):
                    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                        if type(wanted := case.body.get(name)) is int and 8 < wanted < 5000:
                            case.body[name] = 8  # what is longer than the context is refused at once
                case.call_and_validate(checks=checks, timeout=60)

            check()
    return len(operations)


def test_openapi(live: Live) -> None:
    """Whatever is drawn from the OpenAPI document, valid or not, is answered with a status, a type and a layout that stand there."""
    assert openapi(live, 4) >= 10


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_openapi_thoroughly(live: Live) -> None:
    """The same with 75 times as many requests."""
    openapi(live, 300)


# ---- the measuring script --------------------------------------------------------------------------------------------


def measured(tmp_path: Path, command: str, *options: str) -> dict[str, Any]:
    out = tmp_path / "found.json"
    arguments = [sys.executable, str(SCRIPT), command, "--out", str(out), *options]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=3500)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads(out.read_text(encoding="utf-8")) and found["machine"] and found["versions"]["zamba2"]
    return found


def check_spread(found: dict[str, Any]) -> None:
    assert found["count"] > 0 and 0 <= found["p50_ms"] <= found["p99_ms"] <= found["max_ms"]


@linux
def test_load(tmp_path: Path) -> None:
    """Several users at once for seconds: no errors, no stalls, later turns read mostly from the cache, memory seen all along."""
    found = measured(tmp_path, "load", "--small")
    assert found["goals"]["errors"]["met"] and found["goals"]["stalls"]["met"] and found["replies"] >= 4, found["errors"]
    assert 0.5 < found["cached_share_of_later_turns"] < 1 and found["cache_mib"]["end"] > 0
    assert min(found["resident_mib"].values()) > 10
    for name in ("time_to_first_token", "between_tokens"):
        check_spread(found[name])


@linux
def test_throughput(tmp_path: Path) -> None:
    """Eight clients beside one: all tokens that were asked for came, and both rates are given with their ratio."""
    found = measured(tmp_path, "throughput", "--small")
    for kind in ("decode", "whole"):
        rates = [found[name][f"{kind}_tokens_per_second"] for name in ("all", "one")]
        assert found["ratios"][kind] == pytest.approx(rates[0] / rates[1]) and min(rates) > 0
    assert len(found["all"]["runs"]) == 2 and len(found["one"]["runs"]) == 4 and found["longest_context"] <= 80
    check_spread(found["all"]["between_tokens"])


@linux
def test_second_turn(tmp_path: Path) -> None:
    """A second turn, in memory and after a restart, reads its question alone; from nothing, all of it (else the script fails)."""
    found = measured(tmp_path, "second-turn", "--small")
    counts = found["prompt_tokens"]
    assert counts["question_alone"] == 20 and 370 <= counts["from_nothing"] <= 430
    assert counts["second_turn"] - counts["first_turn"] > counts["question_alone"]
    assert found["state_bytes"] > 1000 and found["disk_bytes_per_second"] > 0
    assert all(seconds > 0 for seconds in found["time_to_first_token_seconds"].values())


def check_schemas(found: dict[str, Any]) -> None:
    goals = found["goals"]
    assert goals["finished, share"]["met"] and goals["finished and not valid"]["met"], found["failures"]
    assert goals["hostile and not refused"]["met"], found["hostile"]
    assert {answer["status"] for answer in found["catastrophic_patterns"].values()} <= {200, 400}
    answers = [*found["hostile"].values(), *found["catastrophic_patterns"].values()]
    assert max(answer["seconds"] for answer in answers) < 60 and found["longest_gap_beside_them_seconds"] < 60  # the machine may be busy
    assert all("\n" not in answer.get("message", "") for answer in answers) and found["cost"]["ms_per_token"]["without"] > 0


@linux
def test_schemas(tmp_path: Path) -> None:
    """Of random weights every reply that ends satisfies its schema, 95 % end, and hostile schemas are refused, whatever goes on beside."""
    pytest.importorskip("jsonschema", reason="jsonschema comes with the extra [test]")
    found = measured(tmp_path, "schemas", "--small")
    assert found["schemas"]["asked"] == 2 * len(serve_load.KINDS)
    check_schemas(found)


@linux
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_200_schemas(tmp_path: Path) -> None:
    """The same of 200 schemas of rising difficulty."""
    pytest.importorskip("jsonschema", reason="jsonschema comes with the extra [test]")
    found = measured(tmp_path, "schemas")
    assert found["schemas"]["asked"] == 200
    check_schemas(found)


def test_drawn_schemas() -> None:
    """Schemas are drawn the same for the same seed, of all kinds and growing; each is a schema, and one that is taken."""
    pytest.importorskip("jsonschema", reason="jsonschema comes with the extra [test]")
    drawn = serve_load.schemas(60, 0)
    assert drawn == serve_load.schemas(60, 0) != serve_load.schemas(60, 1)
    assert {kind for kind, _ in drawn} == set(serve_load.KINDS)
    lengths = [len(json.dumps(schema)) for _, schema in drawn]
    assert sum(lengths[:20]) < sum(lengths[20:40]) < sum(lengths[40:])
    grammars = Grammars(zamba2.load("random", threads=1).tokenizer)
    for _, schema in drawn:
        serve_load.checker(schema)
        grammars.compile(schema)


def test_what_jsonschema_is_asked() -> None:
    """What breaks a schema or a format, or is no JSON, is a complaint; what satisfies it is none."""
    pytest.importorskip("jsonschema", reason="jsonschema comes with the extra [test]")
    for name, good, bad in (
        ("date", "2024-02-31", "2024-13-01"), ("ipv4", "1.2.3.4", "1.2.3.400"), ("uuid", "12345678-1234-1234-1234-123456789abc", "1234"),
    ):  # fmt: skip
        validator = serve_load.checker({"type": "string", "format": name})
        assert serve_load.complaint(validator, json.dumps(good)) is None
        assert name in str(serve_load.complaint(validator, json.dumps(bad)))
        assert str(serve_load.complaint(validator, '"')).startswith("not JSON")


def heard(begin: float, gap: float, tokens: int, completion_tokens: int | None = None) -> Heard:
    times = [begin + i * gap for i in range(tokens)]
    return Heard(0.0, times, completion_tokens=tokens if completion_tokens is None else completion_tokens)


def test_decode_rate() -> None:
    """The rate is that of the time in which all decode; tokens without an event count too; without such a time it is an error."""
    assert serve_load.decode_rate([heard(1, 0.5, 11)]) == pytest.approx(2)
    assert serve_load.decode_rate([heard(0, 0.1, 101), heard(5, 0.5, 21)]) == pytest.approx(12)
    assert serve_load.decode_rate([heard(1, 0.5, 11, 22)]) == pytest.approx(4)
    with pytest.raises(zamba2.errors.Zamba2Error, match="longer replies are needed"):
        serve_load.decode_rate([heard(0, 0.1, 3), heard(5, 0.1, 3)])


def test_growth() -> None:
    """Memory's growth is the slope of the second half alone, for ten minutes, as a share of its mean."""
    chance = random.Random(0)
    flat = [(float(t), 10**6 * min(t, 300) + chance.randrange(1000)) for t in range(600)]
    assert abs(serve_load.growth(flat)) < 0.01
    rising = [(float(t), 10**9 + t * 10**5) for t in range(600)]
    assert serve_load.growth(rising) == pytest.approx(100 * 600 * 10**5 / (10**9 + 450 * 10**5), rel=1e-3)


def test_conversations(model: LanguageModel) -> None:
    """A history is read as at most so many tokens and nearly as many, and its last message is the user's; a question as just so many."""
    tokenizer = model.tokenizer
    made = serve_load.history(tokenizer, 500, "a")
    assert 480 <= len(tokenizer.encode_chat(made)) <= 500 and made[0]["content"].startswith("a:")
    assert [message["role"] for message in made] == ["user", "assistant"] * 3 + ["user"]
    assert len(tokenizer.encode_chat([serve_load.question(tokenizer, 20, "a")])) == 20


def test_a_stream_is_read_as_it_is() -> None:
    """Texts, counts, reasons and errors of both layouts of streams are taken as they stand; comments and the end mark are nothing."""
    own = Heard(0.0)
    for data in (
        {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None}], "usage": None},
        {"choices": [{"delta": {"content": "a"}, "finish_reason": None}]}, {"choices": [{"text": "b", "finish_reason": "stop"}]},
        {"choices": [{"delta": {"content": ""}, "logprobs": {"content": [{}]}, "finish_reason": None}]},
        {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 3}}},
    ):  # fmt: skip
        own.take(f"data: {json.dumps(data)}")
    for line in (": waiting", "", "data: [DONE]"):
        own.take(line)
    assert (own.text, own.finish, own.error, len(own.times)) == ("ab", "stop", None, 3)
    assert (own.prompt_tokens, own.completion_tokens, own.cached_tokens) == (5, 2, 3)
    own.take('data: {"error": {"message": "gone"}}')
    assert own.error == "in the stream: gone"


def test_a_server_that_does_not_start() -> None:
    """The script passes on what the server says before it ends."""
    with pytest.raises(zamba2.errors.Zamba2Error, match=r"the server did not start: .*no-such-model"), serve_load.Served("./no-such-model"):
        pass
