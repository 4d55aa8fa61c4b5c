"""The demonstration model inside the package: small, whole, what every command uses, and as good as its card says."""

from __future__ import annotations

import io
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import zamba2
from zamba2.api import read_config
from zamba2.cli import run
from zamba2.language.model import LanguageModel
from zamba2.train.demo import CONFIG, answers, sampled
from zamba2.train.instructions import KINDS, passes, tasks
from zamba2.weights.hub import DEMO

CARD = (DEMO / "README.md").read_text(encoding="utf-8")
CONVERSATION = Path(__file__).resolve().parent.parent / "examples" / "demo_conversation.json"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return zamba2.load()


def claimed(row: str, column: str) -> float:
    """A share from the card's table."""
    head, found = (next(line for line in CARD.splitlines() if line.startswith(start)) for start in ("| | pretrain", f"| {row} |"))
    cells = dict(zip(head.split("|"), found.split("|"), strict=True))
    return float(cells[f" {column} "].split("%")[0]) / 100


def test_small_and_whole(model: LanguageModel) -> None:
    """At most 12 MB and 10 M parameters in q8, with all that a Zamba2 has: two shared blocks in turn, adapters, own tokenizer, ChatML."""
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 12_000_000
    config = read_config(DEMO)
    assert config == CONFIG and config.num_parameters < 10_000_000
    assert config.num_shared_blocks == 2 and len(config.hybrid_layer_ids) == 4 and config.adapter_rank > 0
    assert model.backend.format.name == "q8" and not model.is_random  # type: ignore[attr-defined]
    ids = model.tokenizer.encode_chat([{"role": "user", "content": "Hello!"}])
    assert ids[0] == model.tokenizer.encode("")[0] == 1 and (ids.count(1), ids.count(2)) == (2, 1)


def test_as_good_as_its_card(model: LanguageModel) -> None:
    """On other held-out prompts than the card's it does what the card says: the share of right answers within chance of a sample of 300."""
    asked = list(itertools.islice(tasks("other prompts", split="test"), 300))
    right = sum(passes(task.check, text) for task, text in zip(asked, answers(model, asked), strict=True)) / len(asked)
    share = claimed("**all**", "dpo q8")
    assert share > 0.7 and right > share - 4 * (share * (1 - share) / len(asked)) ** 0.5


def test_the_card_tells_of_every_kind() -> None:
    """The table has a row for each kind of task, for three stages and two formats; SFT knows each kind, DPO is better, q8 and q4 lie within
    a point of bf16; ten conversations follow."""
    assert all(0 <= claimed(kind, column) <= 1 for kind in KINDS for column in ("pretrain", "sft", "dpo", "dpo q8", "dpo q4"))
    assert all(claimed(kind, "sft") >= 0.3 for kind in KINDS) and claimed("**all**", "sft") >= 0.7
    for prompts in ("first 1000", "all 2000"):
        row = re.search(rf"\| {prompts} \|(.*)\|", CARD)
        assert row is not None
        sft, dpo, gain, *packed = (re.findall(r"[+-]?\d+\.\d+(?=%)", cell) for cell in row[1].split("|"))
        assert float(sft[0]) >= 70 and float(dpo[0]) > float(sft[0]) and float(gain[1]) > 0
        assert len(packed) == 2 and all(abs(float(mean)) <= 1.0 for mean, _, _ in packed)
    assert abs(claimed("**all**", "dpo q4") - claimed("**all**", "dpo")) <= 0.01
    assert CARD.count("**model:**") == 10 and "minutes" in CARD


def test_the_cards_conversations_are_its_own(model: LanguageModel) -> None:
    """The ten conversations are the first of the measured prompts with the words of this very model; one may differ where another
    instruction set rounds otherwise."""
    given = answers(model, list(itertools.islice(tasks("test 2024", split="test"), 10)))
    said = re.findall(r"\*\*model:\*\* (.*?)(?=\n\n---|\n\n## )", CARD, flags=re.DOTALL)
    same = sum(text.replace("\n", "\n> ") == shown for text, shown in zip(given, said, strict=True))
    assert len(said) == 10 and same >= 9


def test_what_is_used_if_none_is_named(model: LanguageModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`zamba2 chat` and `zamba2 generate` without a model use it, silently; the conversation of `make run` is answered rightly."""
    assert model.name == "demo"
    assert run(["generate", "--messages", str(CONVERSATION)]) == 0
    out, err = capsys.readouterr()
    messages: list[dict[str, Any]] = json.loads(CONVERSATION.read_text(encoding="utf-8"))
    words = messages[1]["content"].split(", ")
    assert out == "".join(f"- {word}\n" for word in words) and err.count("\n") == 1
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"My name is Anna.\nWhat is my name?\n")))
    assert run(["chat"]) == 0
    replies = capsys.readouterr().out.splitlines()
    assert len(replies) == 2 and all("Anna" in reply for reply in replies)


def test_sampling_is_shared_among_processes() -> None:
    """Answers sampled for DPO do not depend on how many processes share the prompts; the first of each is the greedy one."""
    asked = list(itertools.islice(tasks("sampled", split="train"), 40))
    one = sampled(DEMO, asked)
    assert sampled(DEMO, asked, processes=2) == one
    assert [first for first, *_ in one] == answers(zamba2.load(DEMO, threads=1), asked)
    assert {len(texts) for texts in one} == {4} and sum(len(set(texts)) > 1 for texts in one) > 5
