"""lm-eval on our backends: the scores of its own transformers model, work that is shared but changes nothing, and runs that go on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-eval's tasks need the extra [evaluate]")
pytest.importorskip("torch", reason="the PyTorch backend is compared")
pytest.importorskip("transformers", reason="transformers' Zamba2 is compared")
import torch
import transformers

import zamba2
from zamba2.errors import Zamba2Error
from zamba2.evaluate import harness
from zamba2.evaluate.harness import STEP, Prefixes, generations, loglikelihoods, model_class, open_lm, run_tasks
from zamba2.language.model import LanguageModel
from zamba2.language.sampling import log_softmax
from zamba2.runtime.backend import Row
from zamba2.weights.hub import RANDOM

# lm-eval, datasets and transformers warn of each other; its cache leaves its database to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::SyntaxWarning", "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)  # fmt: skip
FP32 = 2e-4  # between two fp32 implementations, on sums of at most some dozen log-probabilities
# Nats per token between fp32 and the engine on this model, whose random weights spend 7.3 of them: twice what 64 continuations showed.
TOLERANCE = {"bf16": 0.03, "q8": 0.3}

QUESTIONS = [
    ("The sky is", ["blue", "green and yellow", "a fish"], 0),
    ("Two and two make", ["five", "four", "four hundred and some more than that"], 1),
    ("A cat says", ["woof", "meow", "moo, as every cow does in the morning"], 1),
    ("Water is", ["wet", "dry", "W"], 0),
    ("The first letter is", ["B", "C", "A"], 2),
]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return zamba2.load("random", backend="torch", dtype="float32")


@pytest.fixture(scope="module")
def engine() -> LanguageModel:
    return zamba2.load("random", format="q8", threads=1)


@pytest.fixture(scope="module")
def reference() -> Any:
    """lm-eval's own model over transformers' Zamba2, whose time-step floor the checkpoints were not trained with."""
    from lm_eval.models.huggingface import HFLM

    theirs = transformers.Zamba2ForCausalLM.from_pretrained(RANDOM, dtype=torch.float32).eval()
    for layer in theirs.modules():
        if hasattr(layer, "time_step_limit"):
            layer.time_step_limit = (0.0, float("inf"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(RANDOM)
    return HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=1, device="cpu")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three tasks on local data: one that compares choices, one that generates (a YAML file), one that adds up a text's probability."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    choose = common | {
        "task": "choose", "output_type": "multiple_choice", "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}", "num_fewshot": 2, "fewshot_split": "test",
        "fewshot_config": {"sampler": "first_n"},
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    go_on = common | {
        "task": "go_on", "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["t", "\n"], "max_gen_toks": 12, "do_sample": False}, "num_fewshot": 0,
        "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    file = folder / "go_on.yaml"
    file.write_text(json.dumps(go_on), encoding="utf-8")  # JSON is YAML
    rolling = common | {
        "task": "rolling", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}} {{choices[answer]}}.",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    }  # fmt: skip
    return {"choose": choose, "go_on": file, "rolling": rolling}


def run(model: Any, tasks: dict[str, Any], **options: Any) -> dict[str, Any]:
    return run_tasks(model, list(tasks.values()), progress=False, resamples=10, **options)


@pytest.fixture(scope="module")
def ours(model: LanguageModel, tasks: dict[str, Any]) -> dict[str, Any]:
    return run(model, tasks)


@pytest.fixture(scope="module")
def theirs(reference: Any, tasks: dict[str, Any]) -> dict[str, Any]:
    return run(reference, tasks)


# ---- against lm-eval's own model -------------------------------------------------------------------------------------


def test_choices_as_in_transformers(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Example by example and choice by choice, log-probabilities equal those of lm-eval's model over transformers, and so do the scores."""
    for one, other in zip(ours["samples"]["choose"], theirs["samples"]["choose"], strict=True):
        assert one["arguments"] == other["arguments"] and len(one["resps"]) == 3
        for a, b in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
            assert float(a[0]) == pytest.approx(float(b[0]), abs=FP32) and a[1] == b[1]
        assert (one["acc"], one["acc_norm"]) == (other["acc"], other["acc_norm"])
    assert scores(ours, "choose") == scores(theirs, "choose") and ours["questions"]["choose"] == 5


def test_examples_are_those_of_lm_eval(model: LanguageModel, reference: Any, tasks: dict[str, Any]) -> None:
    """Examples that a task draws are the ones lm-eval's own command draws, as many as are asked for, whatever our seed of sampling."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    drawn = {key: value for key, value in tasks["choose"].items() if key != "fewshot_config"}
    own_alone = TaskManager(include_defaults=False)  # reading all of lm-eval's tasks takes seconds
    theirs = simple_evaluate(reference, tasks=[dict(drawn)], num_fewshot=1, limit=2, bootstrap_iters=0, task_manager=own_alone)
    for seed in (0, 5):
        ours = run(model, {"choose": dict(drawn)}, few_shot=1, limit=2, seed=seed)
        for one, other in zip(ours["samples"]["choose"], theirs["samples"]["choose"], strict=True):
            assert [asked[0] for asked in one["arguments"]] == [asked[0] for asked in other["arguments"]]
            assert one["arguments"][0][0].count("Question:") == 2
        assert ours["few_shot"] == {"choose": 1}


def test_a_stop_text_may_begin_with_a_space(model: LanguageModel) -> None:
    """Texts are cut at stop texts as they read once decoded, where the space before the first word is gone."""
    context = model.tokenizer.encode("It is")
    (whole,) = dict(generations(model.backend, model.tokenizer, [context], {"until": [], "max_gen_toks": 12})).values()
    for stop in (" ", f" {whole[:2]}", whole[3:5]):
        found = dict(generations(model.backend, model.tokenizer, [context], {"until": [stop], "max_gen_toks": 12}))
        assert found == {0: whole.split(stop)[0]}


def test_texts_as_in_transformers(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Example by example, generated texts, cut before the first stop text, equal those of lm-eval's model over transformers."""
    found = [[sample["filtered_resps"] for sample in result["samples"]["go_on"]] for result in (ours, theirs)]
    assert found[0] == found[1] and len({text for (text,) in found[0]}) > 1 and not any("t" in text for (text,) in found[0])
    assert scores(ours, "go_on") == scores(theirs, "go_on")


def test_rolling_as_in_transformers(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Perplexities equal those of lm-eval's model over transformers."""
    mine, other = scores(ours, "rolling"), scores(theirs, "rolling")
    assert set(mine) == {"word_perplexity,none", "byte_perplexity,none"} and mine == pytest.approx(other, rel=FP32)


def test_long_texts_as_in_transformers(model: LanguageModel, reference: Any) -> None:
    """Texts of several borders and several windows, and long contexts: the same sums as lm-eval's model over transformers."""
    from lm_eval.api.instance import Instance

    text = " ".join(f"The {i}th sentence of this text is short." for i in range(90))
    own, other = model_class()(model, progress=False), reference
    length = len(own.tok_encode(text))
    assert length > 2 * STEP
    requests = [Instance("loglikelihood_rolling", {}, (text[:n],), i) for i, n in enumerate((len(text), 300))]
    for a, b in zip(own.loglikelihood_rolling(requests), other.loglikelihood_rolling(requests, disable_tqdm=True), strict=True):
        assert a == pytest.approx(b, rel=2e-5)
    pairs = [Instance("loglikelihood", {}, (text, " and more"), 0), Instance("loglikelihood", {}, (text + " So", " then"), 1)]
    for (a, same), (b, also) in zip(own.loglikelihood(pairs), other.loglikelihood(pairs, disable_tqdm=True), strict=True):
        assert a == pytest.approx(b, abs=FP32) and same == also


@pytest.mark.parametrize("format", TOLERANCE)
def test_the_engine_is_near(format: str, tasks: dict[str, Any], ours: dict[str, Any]) -> None:
    """The engine in its formats is what is scored: within 0.03 (bf16) and 0.3 (q8) nats per token of fp32, perplexity within 2 %."""
    engine = zamba2.load("random", format=format, threads=1)
    quantized = run(engine, {name: tasks[name] for name in ("choose", "rolling")})
    lm, worst = open_lm(engine, progress=False), 0.0
    for one, other in zip(quantized["samples"]["choose"], ours["samples"]["choose"], strict=True):
        for a, b, (_, choice) in zip(one["filtered_resps"], other["filtered_resps"], one["arguments"], strict=True):
            worst = max(worst, abs(float(a[0]) - float(b[0])) / len(lm.tok_encode(choice, add_special_tokens=False)))
    assert 0 < worst < TOLERANCE[format]
    assert scores(quantized, "rolling")["byte_perplexity,none"] == pytest.approx(scores(ours, "rolling")["byte_perplexity,none"], rel=0.02)


def scores(result: dict[str, Any], task: str) -> dict[str, float]:
    return {name: value for name, value in result["scores"][task].items() if "stderr" not in name and "," in name}


# ---- sharing and batches ---------------------------------------------------------------------------------------------


class Counting:
    """A backend that counts the tokens it reads and fails after ``most`` calls."""

    def __init__(self, backend: Any, most: int = 10**9) -> None:
        self.backend, self.config, self.most, self.together, self.stretch = backend, backend.config, most, 1, backend.stretch
        self.calls = self.tokens = 0
        self.scored: list[int] = []  # positions with scores, by call
        self.fingerprint = backend.fingerprint

    def new_state(self, *, adapter: str | None = None) -> Any:
        return self.backend.new_state(adapter=adapter)

    def forward(self, rows: Sequence[Row]) -> Any:
        self.calls += 1
        if self.calls > self.most:
            raise KeyboardInterrupt
        self.tokens += sum(len(row.tokens) for row in rows)
        self.scored.append(sum(row.logits for row in rows))
        return self.backend.forward(rows)


def plain(backend: Any, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """One request on its own, in one call behind the context: the definition."""
    state = backend.new_state()
    (first,) = backend.forward([Row(np.array(context, np.int32), state)])
    rows = list(first.numpy())
    if len(continuation) > 1:
        (rest,) = backend.forward([Row(np.array(continuation[:-1], np.int32), state, logits=len(continuation) - 1)])
        rows += list(rest.numpy())
    found = [log_softmax(row) for row in rows]
    total = 0.0
    for row, token in zip(found, continuation, strict=True):  # sum() rounds otherwise from Python 3.12 on
        total += float(row[token])
    return total, all(int(row.argmax()) == token for row, token in zip(found, continuation, strict=True))


@pytest.fixture(scope="module")
def pairs() -> list[tuple[list[int], list[int]]]:
    """Contexts with a beginning of two borders in common, others with none, choices of every length, one request twice."""
    rng = np.random.default_rng(0)
    start = rng.integers(3, 1000, 2 * STEP + 7).tolist()
    contexts = [[1, *start], [1, *start[:-3], 5, 6], [1, *start[:STEP], 9], [1, 4], [1], [1, *start[: STEP - 1]], [1, *start[:STEP]]]
    found = [(context, rng.integers(3, 1000, n).tolist()) for context in contexts for n in (1, 2, 9)]
    return [*found, found[0], ([1], rng.integers(3, 1000, STEP + 40).tolist())]


@pytest.mark.parametrize("which", ["model", "engine"])
def test_sharing_changes_nothing(which: str, pairs: Any, request: pytest.FixtureRequest) -> None:
    """Whatever shares a batch, its size and the order: every score has the same bits as alone, and is that of the plain computation, in the
    engine to the bit."""
    backend = request.getfixturevalue(which).backend
    alone = [next(iter(loglikelihoods(backend, [pair])))[1:] for pair in pairs]
    for batch, order in ((8, range(len(pairs))), (3, reversed(range(len(pairs))))):
        places = list(order)
        found = {places[i]: result for i, *result in loglikelihoods(backend, [pairs[i] for i in places], batch=batch)}
        assert [tuple(found[i]) for i in range(len(pairs))] == alone
    for (total, greedy), pair in zip(alone, pairs, strict=True):
        expected = plain(backend, *pair)
        assert total == (pytest.approx(expected[0], rel=1e-4) if which == "model" else expected[0]) and greedy == expected[1]


def test_common_beginnings_are_read_once(model: LanguageModel, pairs: Any) -> None:
    """The choices of a question read it once, and contexts that begin alike read their common blocks once."""
    counting: Any = Counting(model.backend)
    context, other = pairs[0][0], pairs[3][0]
    list(loglikelihoods(counting, [(context, [5]), (context, [6, 7]), (context, [8, 9, 10])]))
    assert counting.tokens == len(context) + 1 + 2
    counting.tokens = 0
    list(loglikelihoods(counting, [(context, [5]), (other, [6])]))
    assert counting.tokens == len(context) + len(other) - 2 * STEP
    prefixes = Prefixes(counting)
    states = [prefixes.behind(tuple(c), tuple(n)) for c, n in ((context, other), (other, ()))]
    assert [(at, state.position) for at, state in states] == [(2 * STEP, 2 * STEP)] * 2 and prefixes.tokens_read == 2 * STEP
    lonely = Prefixes(counting)
    lonely.behind(tuple(context))
    assert len(prefixes._path) == 2 and lonely._path == []  # what nobody else begins with is not kept


def test_what_one_call_scores_is_bounded(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Continuations share calls as far as the scores kept of one have room; a longer one has a call of its own."""
    monkeypatch.setattr(harness, "POSITIONS", 8)
    counting: Any = Counting(model.backend)
    list(loglikelihoods(counting, [([1], [5] * n) for n in (5, 4, 3, 21)]))
    assert counting.scored == [1, 7, 2, 20]


def test_greedy_is_every_token() -> None:
    """A continuation is greedy if each of its tokens is the likeliest, not the last alone."""
    for likeliest, greedy in (((1, 2), True), ((3, 2), False), ((1, 3), False)):
        one = harness.Continuation(0, (1, 2), cast(Any, None))
        one.take(np.eye(4)[list(likeliest)])
        assert one.greedy is greedy


@pytest.mark.parametrize("which", ["model", "engine"])
def test_generation_shares_and_stays_the_same(which: str, pairs: Any, request: pytest.FixtureRequest) -> None:
    """Generated texts do not depend on company, batch or order, begin from shared states, and equal ``generate``'s tokens."""
    model = request.getfixturevalue(which)
    contexts = [pairs[i][0] for i in (0, 3, 6, 9)]
    options = {"until": [], "max_gen_toks": 6}
    counting: Any = Counting(model.backend)
    found = dict(generations(counting, model.tokenizer, contexts, options, batch=3))
    assert counting.tokens == sum(map(len, contexts)) - 3 * STEP + sum(
        len(model.generate(c, max_tokens=6).tokens) - 1 for c in contexts
    )  # the third context shares one block, the second two
    for index, context in enumerate(contexts):
        assert found[index] == model.tokenizer.decode(model.generate(context, max_tokens=6).tokens)
        assert dict(generations(model.backend, model.tokenizer, [context], options)) == {0: found[index]}
    penalty = {"repetition_penalty": 3.0}  # which looks at all of a prompt
    expected = model.generate(contexts[2], max_tokens=6, **penalty).tokens
    assert dict(generations(model.backend, model.tokenizer, [contexts[2]], options | penalty)) == {0: model.tokenizer.decode(expected)}
    assert expected != model.generate(contexts[2], max_tokens=6).tokens


def test_stop_texts_and_special_tokens(model: LanguageModel) -> None:
    """A text is cut before the first of the stop texts; a special token among them ends it too, although no text shows it."""
    tokenizer = model.tokenizer
    context = tokenizer.encode("The sky is")
    whole = model.generate(context, max_tokens=20, ignore_eos=True)
    text = tokenizer.decode(whole.tokens)
    stop = text[4:6]
    cut = dict(generations(model.backend, tokenizer, [context], {"until": stop, "max_gen_toks": 20}))[0]
    assert cut == text.split(stop)[0]
    assert harness.generation_options({"until": ["", "x"]})[0] == ["x"]  # an empty text stops nothing
    assert harness.special_token(tokenizer, "<|im_end|>") == [2] and harness.special_token(tokenizer, "\n") == []
    banned: Any = Counting(model.backend)
    assert dict(generations(banned, tokenizer, [context], {"until": ["<|im_end|>", "[PAD]"], "max_gen_toks": 3}))[0] in text


def test_sampling_is_seeded(model: LanguageModel) -> None:
    """Tasks that sample give the same texts with the same seed, in any batch, and others with another."""
    contexts = [model.tokenizer.encode(f"Question {i}") for i in range(3)]
    options = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8}
    first = dict(generations(model.backend, model.tokenizer, contexts, options, seed=1))
    assert first == dict(generations(model.backend, model.tokenizer, contexts, options, seed=1, batch=1))
    assert first == dict(generations(model.backend, model.tokenizer, contexts, {"do_sample": True, "max_gen_toks": 8}, seed=1))
    assert first[1] == dict(generations(model.backend, model.tokenizer, contexts[1:], options, seed=1))[0]
    greedy = dict(generations(model.backend, model.tokenizer, contexts, {"max_gen_toks": 8}))
    assert greedy == dict(generations(model.backend, model.tokenizer, contexts, options | {"temperature": 0.0}, seed=1)) != first
    assert first != dict(generations(model.backend, model.tokenizer, contexts, options, seed=2))
    twice = dict(generations(model.backend, model.tokenizer, [contexts[0]] * 2, options, seed=1))
    assert twice[0] == first[0] != twice[1]  # repetitions of a question are drawn anew
    assert open_lm(model, seed=7, progress=False).seed == 7


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(model: LanguageModel, tasks: dict[str, Any], ours: dict[str, Any], tmp_path: Path) -> None:
    """With a cache, what was computed before Ctrl-C is not computed again, and the results are those of a run in one piece; what another
    model computed is not used."""
    wanted = {name: tasks[name] for name in ("choose", "go_on")}
    broken: Any = Counting(model.backend, most=3)
    with pytest.raises(KeyboardInterrupt):
        run(LanguageModel(broken, model.tokenizer), wanted, cache=tmp_path, batch=1)
    second: Any = Counting(model.backend)
    result = run(LanguageModel(second, model.tokenizer), wanted, cache=tmp_path, batch=1)
    whole: Any = Counting(model.backend)
    run(LanguageModel(whole, model.tokenizer), wanted, batch=1)
    assert 0 < second.tokens < whole.tokens
    assert result["scores"]["choose"] == pytest.approx(ours["scores"]["choose"]) and result["scores"]["go_on"] == ours["scores"]["go_on"]
    third: Any = Counting(model.backend)
    assert run(LanguageModel(third, model.tokenizer), wanted, cache=tmp_path)["scores"] == result["scores"] and third.calls == 0
    run(LanguageModel(third, model.tokenizer), {"go_on": tasks["go_on"]}, cache=tmp_path, limit=1, seed=5)
    assert third.calls > 0  # which another seed might answer otherwise
    third.calls, third.fingerprint = 0, "another model's"
    run(LanguageModel(third, model.tokenizer), {"go_on": tasks["go_on"]}, cache=tmp_path, limit=1)
    assert third.calls > 0


def test_answers_are_kept_when_they_are_whole(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each answer goes into the cache as it is found, that of a text of several windows once all of them are added up. What is longer than
    the model was trained on is read whole, and said."""
    from lm_eval.api.instance import Instance

    own, kept = model_class()(model, progress=False), list[Any]()
    monkeypatch.setattr(type(own), "max_length", 4)
    own.cache_hook = SimpleNamespace(add_partial=lambda *found: kept.append(found))
    rolling, asked = ("The sky is blue.",), ("The sky is", {"max_gen_toks": 2})
    (total,) = own.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, rolling, 0)])
    (text,) = own.generate_until([Instance("generate_until", {}, asked, 0)])
    assert kept == [("loglikelihood_rolling", rolling, total), ("generate_until", asked, text)]
    ids = own.tok_encode(rolling[0])
    assert len(ids) == 9
    windows = [([1], ids[:4]), ([ids[3]], ids[4:8]), (ids[4:8], ids[8:])]
    assert total == pytest.approx(sum(plain(model.backend, *window)[0] for window in windows), rel=1e-4)
    said = "some requests are longer than the 4 tokens random was trained on"
    assert said not in capsys.readouterr().err
    own.loglikelihood([Instance("loglikelihood", {}, ("The sky is", " blue"), 0)])
    assert said in " ".join(capsys.readouterr().err.split())


def test_chat_template(model: LanguageModel, reference: Any, tasks: dict[str, Any]) -> None:
    """With chat, questions go through the checkpoint's template, as transformers renders it, and the begin token stands there once."""
    wanted = {"go_on": tasks["go_on"]}
    ours, theirs = (run(lm, wanted, chat=True, system="Be brief.", limit=2) for lm in (model, reference))
    for one, other in zip(ours["samples"]["go_on"], theirs["samples"]["go_on"], strict=True):
        assert one["arguments"] == other["arguments"] and one["filtered_resps"] == other["filtered_resps"]
        rendered = one["arguments"][0][0]
        assert rendered.startswith("<|im_start|>system\nBe brief.") and rendered.endswith("<|im_start|>assistant\n")
        assert open_lm(model, progress=False).tok_encode(rendered)[:2].count(1) == 1
    own, other = open_lm(model, progress=False), reference
    for begun in ("The answer is", "The answer is ", "\n```python\n", " def f():\n    \n", "Begin."):
        history = [{"role": "user", "content": "Begin."}, {"role": "assistant", "content": begun}]
        assert own.apply_chat_template(history, False) == other.apply_chat_template(history, add_generation_prompt=False)
    assert ours["questions"] == {"go_on": 2} and ours["settings"]["chat"] is True


@dataclass
class Endpoint:
    """Something that answers conversations and tells no probabilities."""

    name: str = "endpoint"
    about: dict[str, Any] = field(default_factory=dict)
    limits: set[tuple[int, int | None]] = field(default_factory=set)

    def answer(
        self, conversations: Sequence[Sequence[Mapping[str, str]]], *, max_tokens: int, temperature: float = 0.0, seed: int | None = None
    ) -> Iterator[tuple[int, str]]:
        self.limits.add((max_tokens, seed))
        for index in reversed(range(len(conversations))):
            yield index, f"{conversations[index][-1]['content']}!\nmore"


def test_endpoints_generate_alone(tasks: dict[str, Any]) -> None:
    """A chat endpoint answers tasks that generate, cut at their stop texts and as long as the options say; questions are counted once,
    however many filters read the answers. For other tasks the sentence says what it lacks."""
    endpoint, go_on = Endpoint(), json.loads(Path(tasks["go_on"]).read_text())
    go_on["filter_list"] = [{"name": name, "filter": [{"function": "take_first"}]} for name in ("one", "two")]
    result = run(endpoint, {"go_on": go_on}, chat=True, options={"max_gen_toks": 7}, seed=3)
    assert [one["filtered_resps"] for one in result["samples"]["go_on"] if one["doc_id"] == 1] == [["Two and "]] * 2
    assert result["scores"]["go_on"]["exact_match,one"] == result["scores"]["go_on"]["exact_match,two"] == 0
    assert result["questions"] == {"go_on": 5} and endpoint.limits == {(7, 3)} and result["settings"]["options"] == {"max_gen_toks": 7}
    sampled = go_on | {"generation_kwargs": {"do_sample": True, "top_p": 0.5}}
    with pytest.raises(Zamba2Error, match="endpoint takes temperature alone"):
        run(Endpoint(), {"go_on": sampled}, chat=True)
    with pytest.raises(Zamba2Error, match="endpoint gives no probabilities"):
        run(Endpoint(), {"choose": tasks["choose"]}, chat=True)
    with pytest.raises(Zamba2Error, match="answers whole messages"):
        open_lm(endpoint, progress=False).apply_chat_template([{"role": "assistant", "content": "It"}], add_generation_prompt=False)


# ---- what cannot work ------------------------------------------------------------------------------------------------


def test_bad_requests_are_one_sentence(model: LanguageModel, tasks: dict[str, Any], tmp_path: Path) -> None:
    """Unknown tasks, missing files, broken configurations and impossible settings end in one sentence each, before anything is computed."""
    counting: Any = Counting(model.backend)
    lm = LanguageModel(counting, model.tokenizer, name="small")
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: x\ndataset_path: json\ndataset_kwargs: {data_files: {test: none.jsonl}}\noutput_type: generate_until\n")
    odd = json.loads(Path(tasks["go_on"]).read_text()) | {"generation_kwargs": {"num_beams": 4}}
    for wanted, options, said in (
        (["helaswag"], {}, "lm-eval has no task 'helaswag'; did you mean hellaswag"),
        ([tmp_path / "none.yaml"], {}, "none.yaml does not exist"),
        ([broken], {}, "lm-eval cannot load .*broken.yaml"),
        ([], {}, "there is no task"),
        ([odd], {}, "generation_kwargs have num_beams=4; known here are until"),
        ([tasks["go_on"]], {"limit": 0}, "limit is 0"),
        ([tasks["go_on"]], {"include": tmp_path / "no"}, "is no folder"),
        ([tasks["go_on"]], {"batch": 0}, "batch_size is 0"),
    ):
        with pytest.raises(Zamba2Error, match=said):
            run_tasks(lm, wanted, progress=False, **options)
    assert counting.calls == 0


def test_empty_choices_are_one_sentence(model: LanguageModel) -> None:
    """A choice without text or tokens has no probability to compare; the sentence says so before anything is computed."""
    from lm_eval.api.instance import Instance

    counting: Any = Counting(model.backend)
    lm = model_class()(LanguageModel(counting, model.tokenizer), progress=False)
    for context in ("Question", ""):
        with pytest.raises(Zamba2Error, match="scores an empty text"):
            lm.loglikelihood([Instance("loglikelihood", {}, ("Question", " yes"), 0), Instance("loglikelihood", {}, (context, ""), 1)])
    with pytest.raises(Zamba2Error, match="has no tokens"):
        next(loglikelihoods(counting, [([1], [])]))
    assert counting.calls == 0


def test_a_checkpoint_without_tokenizer(model: LanguageModel, tasks: dict[str, Any]) -> None:
    """Without a tokenizer the sentence says which file is missing; nothing is computed."""
    with pytest.raises(Zamba2Error, match=r"small has no tokenizer\.json"):
        run(LanguageModel(model.backend, None, name="small"), tasks)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lm-eval the sentence says what to install."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(Zamba2Error, match=r"pip install 'zamba2\[evaluate\]'"):
        harness.need_lm_eval()


def test_lm_evals_own_ways_in(tasks: dict[str, Any]) -> None:
    """By its registered name and argument string lm-eval makes the model itself; the entry point's name is the same class."""
    from importlib.metadata import EntryPoint

    from lm_eval.api.registry import get_model

    harness.register()
    harness.register()
    arguments = "pretrained=random,format=q8,threads=1,progress=False"
    lm = get_model("zamba2").create_from_arg_string(arguments, {"batch_size": 1, "device": None})
    assert lm.model.backend.format.name == "q8" and lm.prefix_token_id == 1 and lm.eot_token_id == 2
    assert EntryPoint("zamba2", "zamba2.evaluate.harness:Zamba2LM", "lm_eval.models").load() is model_class()


def test_import_is_cheap() -> None:
    """Importing the module loads none of the libraries behind it."""
    code = "import sys, zamba2.evaluate.harness\nprint({'lm_eval', 'datasets', 'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("set()\n", "")
