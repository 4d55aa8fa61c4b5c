"""Laws of perplexity and divergence: the textbook's numbers, nothing of a model against itself, and one sentence for what cannot be."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import zamba2
from zamba2.cli import run
from zamba2.errors import Zamba2Error
from zamba2.evaluate.perplexity import PIECE, by_position, divergence, perplexity, windows
from zamba2.language.model import LanguageModel
from zamba2.weights.hub import RANDOM

TEXT = "The house by the river was empty, and nobody knew why. Once a year, in spring, a light stood in its window — so they said.\n" * 12


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return zamba2.load("random", dtype="float32")


@pytest.mark.parametrize("context", [2048, 300, 64, 2])
def test_perplexity_is_transformers(model: LanguageModel, context: int) -> None:
    """Nats per token are those of a plain transformers computation over the same windows, to 1e-4 of them, and so is what is right."""
    pytest.importorskip("transformers", reason="it is what is compared")
    import torch
    from transformers import AutoTokenizer, Zamba2ForCausalLM

    theirs = Zamba2ForCausalLM.from_pretrained(RANDOM, dtype=torch.float32).eval()
    for layer in theirs.modules():
        if hasattr(layer, "time_step_limit"):
            layer.time_step_limit = (0.0, float("inf"))  # its floor of dt, which the models never had
    text = TEXT if context > 2 else TEXT[:200]
    ids = AutoTokenizer.from_pretrained(RANDOM)(text, add_special_tokens=False)["input_ids"]
    nats, right = [], []
    for start in range(0, len(ids), context - 1):
        window = torch.tensor([[1, *ids[start : start + context - 1]]])
        with torch.no_grad():
            scores = torch.log_softmax(theirs(window).logits[0, :-1].double(), -1)
        nats += (-scores.gather(1, window[0, 1:, None])[:, 0]).tolist()
        right += (scores.argmax(-1) == window[0, 1:]).tolist()
    found = perplexity(model, text, context=context)
    assert found["tokens"] == len(ids) == len(nats) and found["windows"] == math.ceil(len(ids) / (context - 1))
    assert found["nats"] == pytest.approx(np.mean(nats), rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-3)
    assert found["top1"] == pytest.approx(np.mean(right), abs=2 / len(ids))
    assert found["nats_per_byte"] == pytest.approx(sum(nats) / len(text.encode()), rel=1e-4)
    assert sum(row["tokens"] for row in found["by_position"]) == len(ids)
    assert sum(row["tokens"] * row["mean"] for row in found["by_position"]) == pytest.approx(sum(nats), rel=1e-4)


def test_a_model_does_not_diverge_from_itself(model: LanguageModel) -> None:
    """The divergence of a model from itself is 0 exactly, at every position, and all likeliest tokens agree."""
    found = divergence(model, model, TEXT, context=PIECE + 50)
    assert found["mean"] == 0 and set(found["quantiles"].values()) == {0.0} and found["top1_agreement"] == 1
    assert found["nats"] == found["reference_nats"]
    wider = replace(model.backend.config, vocab_size=model.backend.config.vocab_size + 1)
    other: Any = SimpleNamespace(name="wider", tokenizer=model.tokenizer, backend=SimpleNamespace(config=wider))
    with pytest.raises(Zamba2Error, match="needs one vocabulary"):
        divergence(model, other, TEXT)


def test_divergence_is_the_definition(model: LanguageModel) -> None:
    """Between two formats it is sum p (log p - log q) of their own logits; the engine's q8 lies nearer to fp32 than its q4."""
    from zamba2.runtime.backend import Row

    near, far = (zamba2.load("random", format=format) for format in ("q8", "q4"))
    text = TEXT[:400]
    (ids,) = windows(model, text, 2048)
    logs = []
    for one in (model, near):
        (logits,) = one.backend.forward([Row(ids[:-1], one.backend.new_state(), logits=len(ids) - 1)])
        scores = logits.numpy().astype(np.float64)
        logs.append(scores - np.log(np.exp(scores).sum(-1, keepdims=True)))
    expected = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)
    found = divergence(model, near, text)
    assert found["mean"] == pytest.approx(expected.mean(), rel=1e-6) and found["mean"] > 0
    assert found["quantiles"]["1"] == pytest.approx(expected.max(), rel=1e-6)
    assert found["quantiles"]["0.5"] == pytest.approx(np.median(expected), rel=1e-6)
    own = [-float(log[np.arange(len(log)), ids[1:]].mean()) for log in logs]
    assert (found["reference_nats"], found["nats"]) == pytest.approx(own, rel=1e-6)
    assert found["mean"] < divergence(model, far, text)["mean"]


def test_positions_are_octaves() -> None:
    """Means over 1, 2 to 3, 4 to 7, ...; octaves without a token are left out."""
    rows = by_position(np.array([1.0, 2.0, 4.0, 9.0]), np.array([1, 2, 3, 8]))
    assert [(row["from"], row["to"], row["tokens"], row["mean"]) for row in rows] == [(1, 1, 1, 1.0), (2, 3, 2, 3.0), (8, 15, 1, 9.0)]


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both commands print a table or one JSON document, and write the same document, with all that is needed to repeat it."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:300], encoding="utf-8")
    commands: dict[str, list[str]] = {
        "perplexity": ["--model", "random"],
        "divergence": ["--reference", "random", "--reference-dtype", "float32", "--model", "random", "--format", "q8"],
    }
    for name, options in commands.items():
        assert run(["evaluate", name, str(text), *options, "--out", str(tmp_path / "out"), "--json"]) == 0
        out = capsys.readouterr().out
        result: dict[str, Any] = json.loads(out.splitlines()[-1])
        assert out.count("\n") == 1 and json.loads((tmp_path / "out" / f"{name}.json").read_text()) == result
        assert result["evaluation"] == name and result["model"] == "random" and len(result["sha256"]) == 64 and result["seconds"] > 0
        assert {"python", "zamba2", "numpy"} <= result["versions"].keys() and result["settings"]["context"] == 2048
        assert run(["evaluate", name, str(text), *options]) == 0
        shown = capsys.readouterr().out
        assert f"{result['scores']['nats']:.5f}" in shown and f"{result['scores']['tokens']:,}" in shown


BAD = {
    "missing text": (["perplexity", "/nowhere"], "/nowhere cannot be read"),
    "empty text": (["perplexity", "EMPTY"], "the text has no tokens"),
    "not a text": (["perplexity", "BYTES"], "is not UTF-8 text"),
    "missing model": (["perplexity", "TEXT", "--model", "./nowhere"], "does not exist"),
    "texts alone": (["perplexity", "TEXT", "--model", "hf:me/mine"], "gives texts alone"),
    "other vocabulary": (["divergence", "TEXT", "--reference", "random", "--model", "OTHER"], "differently"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be measured is one sentence and exit code 2."""
    arguments, said = BAD[name]
    files = {"EMPTY": b"", "BYTES": b"\xff\xfe\xff", "TEXT": TEXT.encode()}
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    line = ["demo" if word == "OTHER" else str(tmp_path / word) if word in files else word for word in arguments]
    assert run(["evaluate", *line]) == 2
    err = [row for row in capsys.readouterr().err.splitlines() if "random weights" not in row]
    assert len(err) == 1 and said in err[0]


def test_windows_need_a_begin_token_and_room(model: LanguageModel) -> None:
    """A context without room for a token is refused; windows hold every token once, each behind the begin token."""
    with pytest.raises(Zamba2Error, match="context is 1"):
        windows(model, TEXT, 1)
    pieces = windows(model, TEXT, 33)
    assert all(piece[0] == 1 and len(piece) <= 33 for piece in pieces)
    assert [int(token) for piece in pieces for token in piece[1:]] == model.tokenizer.encode(TEXT)[1:]
