"""Training data: every set's rows, filters and what they count, repeated prompts, mixing, masks, and the preview of it all."""

from __future__ import annotations

import copy
import io
import itertools
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers

pytest.importorskip("datasets", reason="training data needs the extra [train]")
import datasets
import pyarrow
import pyarrow.parquet
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from zamba2.cli import DATA_SETS, run
from zamba2.commands.train import sample
from zamba2.errors import Zamba2Error
from zamba2.language.tokenizer import Tokenizer
from zamba2.train import data
from zamba2.train.data import (
    ROWS,
    SOURCES,
    WINDOW,
    Example,
    Filters,
    Part,
    Prompts,
    Reader,
    Unusable,
    evaluation_prompts,
    mix,
    mixture,
    shuffled,
)  # fmt: skip
from zamba2.train.masks import Masked, MaskedPair, mask_conversation, mask_pair
from zamba2.weights.hub import RANDOM

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
END = "<|im_end|>"
CARD = ("ultrachat", "infinity", "ultrafeedback", "orca", "openhermes")

Messages = list[dict[str, str]]

# ---- fresh conversations, and rows of them in each set's exact schema ------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40).filter(lambda t: t.strip() and "<|im_" not in t)


@st.composite
def conversations(draw: st.DrawFn, turns: int = 3, texts: st.SearchStrategy[str] = TEXTS) -> Messages:
    """A system message or none, then user and assistant in turn, the assistant last."""
    system = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    said = draw(st.lists(texts, min_size=2, max_size=2 * turns))[: 2 * turns]
    said = said[: len(said) // 2 * 2]
    return system + [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(said)]


@st.composite
def preferences(draw: st.DrawFn) -> dict[str, Messages]:
    chosen = draw(conversations())
    other = draw(TEXTS.filter(lambda t: t.strip() != chosen[-1]["content"].strip()))
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": [{"role": "assistant", "content": other}]}


GPT = {"system": "system", "user": "human", "assistant": "gpt"}


def sharegpt(messages: Messages) -> list[dict[str, str]]:
    return [{"from": GPT[m["role"]], "value": m["content"]} for m in messages]


def scores(draw: Callable[..., Any]) -> dict[str, float]:
    low = draw(st.floats(0, 9))
    return {"score_chosen": low + draw(st.floats(0.5, 1)), "score_rejected": low}


def single(messages: Messages) -> tuple[str, str, str]:
    """System or "", question and answer of a conversation's first exchange."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    question, answer = (m["content"] for m in messages[bool(system) : bool(system) + 2])
    return system, question, answer


@st.composite
def rows(draw: st.DrawFn, name: str) -> tuple[dict[str, Any], dict[str, Messages]]:
    """A row of the set with every column it has on the Hub, and what it should become."""
    if SOURCES[name].kind == "sft":
        messages = draw(conversations())
        prompt = {"prompt": messages[0]["content"], "prompt_id": draw(st.text("0123456789abcdef", min_size=4))}
        system, question, answer = single(messages)
        exchange = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        if name == "ultrachat":
            return {**prompt, "messages": [{"content": m["content"], "role": m["role"]} for m in messages]}, {"messages": messages}
        if name.startswith("infinity"):
            label = draw(st.one_of(st.none(), st.text(), st.fixed_dictionaries({"ability_en": st.lists(st.text(), max_size=2)})))
            about = {"id": draw(st.one_of(st.integers(0, 9999), st.text())), "label": label, "langdetect": "en", "source": "self"}
            return {**about, "conversations": sharegpt(messages)}, {"messages": messages}
        if name == "sharegpt":
            return {"id": "identity_0", "conversations": sharegpt(messages)}, {"messages": messages}
        if name == "text":
            return {"text": question}, {"text": question}
        if name == "gsm8k":
            note = draw(st.sampled_from(["", "<<2*3=6>>"]))
            answer = answer.replace("<", "(")
            exchange["messages"][1] = {"role": "assistant", "content": answer}
            return {"question": question, "answer": note + answer}, exchange
        if name == "self-instruct":
            given = draw(st.sampled_from(["", system]))
            exchange["messages"][0] = {"role": "user", "content": f"{question}\n\n{given}" if given.strip() else question}
            row = {"id": "seed_task_0", "name": "x", "instruction": question, "is_classification": False}
            return {**row, "instances": [{"input": given, "output": answer}]}, exchange
        return {"messages": messages}, {"messages": messages}
    pair = draw(preferences())
    chosen, rejected = ([*pair["prompt"], *pair[side]] for side in ("chosen", "rejected"))
    if name == "ultrafeedback":
        row = {"prompt": chosen[0]["content"], "prompt_id": "00ff", "chosen": chosen, "rejected": rejected, "messages": chosen}
        return row | scores(draw), pair
    if name == "openhermes":
        return {
            "source": "x", "category": "y", "prompt": chosen[0]["content"], "candidates_completions": ["a", "b"],
            "candidate_policies": ["p", "q"], "ranks": [1, 2], "rank_str": "1 > 2", "chosen_policy": "p", "chosen": chosen,
            "rejected_policy": "q", "rejected": rejected,
        }, pair  # fmt: skip
    if name == "orca":
        system, question, answer = single(chosen)
        prompt = [m for m in chosen if m["role"] != "assistant"][: 1 + bool(system)]
        other = pair["rejected"][0]["content"]
        if answer.strip() == other.strip():
            other += "!"
        expected = {side: [{"role": "assistant", "content": said}] for side, said in (("chosen", answer), ("rejected", other))}
        return {"system": system, "question": question, "chosen": answer, "rejected": other}, {"prompt": prompt, **expected}
    if name == "llama-factory":
        return {
            "conversations": sharegpt(pair["prompt"]), "chosen": sharegpt(pair["chosen"])[0], "rejected": sharegpt(pair["rejected"])[0],
        }, pair  # fmt: skip
    if draw(st.booleans()) and len(pair["prompt"]) == 1:
        return {side: pair[side][0]["content"] for side in pair}, pair
    return copy.deepcopy(pair), pair


def write(path: Path, items: list[dict[str, Any]]) -> Path:
    """Rows as parquet, JSON lines or a JSON list, by the name's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(items), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    return path


def part(name: str, path: Path) -> Part:
    return Part(SOURCES[name], path)


def simple(question: str, answer: str = "yes") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def default() -> Tokenizer:
    return Tokenizer.from_folder(RANDOM)


# ---- the loaders -----------------------------------------------------------------------------------------------------


def test_the_table_has_the_cards_sets() -> None:
    """The card's five sets are there with their ids, and the command line names every set of the table."""
    assert [SOURCES[name].hub for name in CARD] == [
        "HuggingFaceH4/ultrachat_200k", "BAAI/Infinity-Instruct", "HuggingFaceH4/ultrafeedback_binarized", "Intel/orca_dpo_pairs",
        "argilla/OpenHermesPreferences",
    ]  # fmt: skip
    assert len(SOURCES) == len(ROWS) and sorted(re.findall(r"[\w-]{3,}", DATA_SETS)) == sorted(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
@given(made=st.data())
def test_each_function_is_pure_and_exact(name: str, made: st.DataObject) -> None:
    """A row of the exact schema becomes exactly its messages; the row stays as it was; the table's types fit it."""
    row, expected = made.draw(rows(name))
    before = copy.deepcopy(row)
    assert SOURCES[name].convert(row) == expected == SOURCES[name].convert(row)
    assert row == before and data._checked(SOURCES[name], "here", row) is row
    assert set(SOURCES[name].reads) <= set(SOURCES[name].columns) and (name not in CARD or set(row) == set(SOURCES[name].columns))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
@pytest.mark.parametrize("name", CARD)
@given(made=st.data())
def test_files_give_what_was_written(name: str, suffix: str, tmp_path_factory: pytest.TempPathFactory, made: st.DataObject) -> None:
    """Each of the card's sets reads back from parquet, JSON lines and a JSON list, in order, from one file or a folder of two."""
    pairs = made.draw(st.lists(rows(name), min_size=2, max_size=4))
    if suffix == ".parquet":  # a parquet column has one type
        for row, _ in pairs:
            row |= {"id": 7, "label": {"ability_en": ["x"]}} if name == "infinity" else {}
    items = [row for row, _ in pairs]
    folder = tmp_path_factory.mktemp("set")
    split = SOURCES[name].split
    inner = folder / (SOURCES[name].config or "data")
    write(inner / f"{split}-00000-of-00002{suffix}", items[:1])
    write(inner / f"{split}-00001-of-00002{suffix}", items[1:])
    write(inner / f"test_gen-00000-of-00001{suffix}", [{"other": 1}])
    for path in (folder, write(folder / f"all{suffix}", items)):
        assert [example.data for example in Reader(part(name, path))] == [expected for _, expected in pairs]


def test_infinity_in_all_its_types(tmp_path: Path) -> None:
    """Infinity-Instruct's id and label change their types from row to row and from file to file; other languages are counted."""
    turns = sharegpt(simple("hello")["messages"])
    varying: list[dict[str, Any]] = [
        {"id": 1, "label": {"ability_en": ["x"], "ability_zh": ["y"]}}, {"id": "two", "label": "label"}, {"id": 3, "label": None},
        {"id": "4", "label": None, "langdetect": "zh-cn"}, {"id": 5, "label": None, "langdetect": None}, {"id": 6, "label": ""},
    ]  # fmt: skip
    items = [{"conversations": turns, "langdetect": "en", "source": "self"} | about for about in varying]
    reader = Reader(part("infinity", write(tmp_path / "a.jsonl", items)))
    assert len(list(reader)) == 5 and reader.tally.dropped == {"language is not en": 1}
    assert len(list(Reader(part("infinity", tmp_path / "a.jsonl"), filters=Filters(language=None)))) == 6
    chinese = Reader(part("infinity", tmp_path / "a.jsonl"), filters=Filters("zh"))
    assert [example.place.partition(", ")[2] for example in chinese] == ["line 4", "line 5"]
    with pytest.raises(Zamba2Error, match="id is a bool; rows of infinity have a int or str there"):
        data._checked(SOURCES["infinity"], "here", items[0] | {"id": True})
    for i, item in enumerate(items[:3]):
        write(tmp_path / "7M" / f"train-{i}.parquet", [item])
    assert len(list(Reader(part("infinity", tmp_path)))) == 3


@pytest.mark.parametrize("system", ["", "  \n", None])
def test_empty_systems_are_left_out(system: str | None) -> None:
    """An empty system message is no message; the rest of the row is kept."""
    row = {"system": system, "question": "q", "chosen": "a", "rejected": "b"}
    assert SOURCES["orca"].convert(row)["prompt"] == [{"role": "user", "content": "q"}]
    said = [{"from": "system", "value": system}, *sharegpt(simple("q")["messages"])]
    assert SOURCES["infinity"].convert({"conversations": said}) == simple("q")


U, A, S = ({"role": role, "content": role[0]} for role in ("user", "assistant", "system"))


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ([], "last turn is not by the assistant"),
        ([U], "last turn is not by the assistant"),
        ([S], "last turn is not by the assistant"),
        ([U, A, U], "last turn is not by the assistant"),
        ([A], "broken turns"),
        ([A, U, A], "broken turns"),
        ([U, U, A], "broken turns"),
        ([U, A, A], "broken turns"),
        ([U, S, A], "broken turns"),
        ([S, S, U, A], "broken turns"),
        ([S, A], "broken turns"),
        (None, "broken turns"),
        ([U, None], "broken turns"),
        ([U, "text"], "broken turns"),
        ([U, {"role": "assistant"}], "empty message"),
        ([U, {"role": "assistant", "content": None}], "empty message"),
        ([U, {"role": "assistant", "content": " \n"}], "empty message"),
        ([{"role": "user", "content": ""}, A], "empty message"),
        ([U, {"role": "assistant", "content": ["text"]}], "broken turns"),
        ([U, {"role": "assistant", "content": 3}], "broken turns"),
        ([U, {"role": "tool", "content": "x"}], "broken turns"),
        ([U, {"role": None, "content": "x"}], "broken turns"),
        ([U, {"content": "x"}], "broken turns"),
        ([U, {"role": ["assistant"], "content": "x"}], "broken turns"),
        ([U, {"role": "assistant", "content": "half \ud83d"}], "invalid Unicode"),
    ],
)
def test_broken_turns_are_counted(said: Any, reason: str, tmp_path: Path) -> None:
    """Turns out of order, without text or by nobody known are dropped under one reason, wherever a set holds them."""
    items = [{"messages": said}, simple("fine")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, items)))
    reader = Reader(part("messages", tmp_path / "a.jsonl"))
    assert [example.data for example in reader] == [simple("fine")]
    assert (reader.tally.read, reader.tally.kept, dict(reader.tally.dropped)) == (2, 1, {reason: 1})
    with pytest.raises(Unusable):
        SOURCES["ultrafeedback"].convert({"chosen": [U, A], "rejected": said})


@pytest.mark.parametrize("name", [name for name in SOURCES if SOURCES[name].kind == "dpo"])
def test_nulls_in_preferences_are_counted(name: str) -> None:
    """A null where a preference's text or turns belong makes the row unusable, never an exception of Python's."""
    for column in SOURCES[name].reads:
        row = {key: None if key == column else "x" if str in SOURCES[name].columns[key] else [U] for key in SOURCES[name].reads}
        if column != "system":
            with pytest.raises(Unusable):
                SOURCES[name].convert(row)


def test_ties_and_wrong_order(tmp_path: Path) -> None:
    """Equal answers, equal scores and scores the wrong way round are dropped and counted; --ties keeps them."""
    better, worse, other = ([U, {"role": "assistant", "content": said}] for said in ("good", "bad", " good\n"))
    table = [(worse, 8.0), (worse, 5.0), (worse, 4.0), (other, 8.0), (worse, None)]
    items = [{"chosen": better, "rejected": other, "score_chosen": score, "score_rejected": 5.0} for other, score in table]
    reader = Reader(part("ultrafeedback", write(tmp_path / "a.parquet", items)))
    assert len(list(reader)) == 2
    assert reader.tally.dropped == {"tie: equal scores": 1, "rejected scores higher": 1, "tie: equal answers": 1}
    assert len(list(Reader(reader.part, filters=Filters(ties=True)))) == 5


def test_different_prompts_are_no_preference() -> None:
    """Chosen and rejected must answer the same words."""
    for other in ([S, U, A], [{"role": "user", "content": "other"}, A]):
        with pytest.raises(Unusable, match="different prompts"):
            SOURCES["openhermes"].convert({"chosen": [U, A], "rejected": other})


def test_gsm8k_without_calculator_notes() -> None:
    """GSM8K's <<...>> are notes for a calculator; they are left out, the answer line stays."""
    row = {"question": "q", "answer": "4/2 = <<4/2=2>>2 and 2*3 = $<<2*3=6>>6\n#### 6"}
    assert SOURCES["gsm8k"].convert(row)["messages"][1]["content"] == "4/2 = 2 and 2*3 = $6\n#### 6"


@given(made=st.data(), limit=st.integers(1, 60))
def test_every_row_is_accounted_for(default: Tokenizer, tmp_path_factory: pytest.TempPathFactory, made: st.DataObject, limit: int) -> None:
    """read = kept + dropped for any rows, good and bad; the length filter drops exactly the longer ones; token counts are sums."""
    bad = st.sampled_from([{"messages": [A]}, {"messages": []}, {"messages": [U, {"role": "assistant", "content": f"x{END}"}]}])
    items = [{"messages": [U, A]}, *made.draw(st.lists(st.one_of(bad, st.builds(lambda m: {"messages": m}, conversations())), max_size=8))]
    path = write(tmp_path_factory.mktemp("set") / "a.jsonl", items)
    reader = Reader(part("messages", path), default, Filters(max_tokens=limit + 20))
    kept = list(reader)
    tally = reader.tally
    assert (tally.read, tally.kept, tally.whole) == (len(items), len(kept), True) and tally.read == tally.kept + sum(tally.dropped.values())
    lengths = [len(default.encode_chat(e.data["messages"], add_generation_prompt=False)) for e in kept]
    assert tally.tokens == sum(lengths) and tally.longest == max(lengths) <= limit + 20
    free = Reader(part("messages", path), default)
    assert sum(len(e.masked) > limit + 20 for e in free) == tally.dropped[f"longer than {limit + 20} tokens"]  # type: ignore[arg-type]
    assert len(list(Reader(part("messages", path), default, Filters(max_tokens=tally.longest)))) == len(kept)


def test_messages_with_special_tokens_are_dropped(default: Tokenizer, tmp_path: Path) -> None:
    """A message that holds the text of a chat mark, or of the tokenizer's own first and last token, would teach the model to write it;
    such rows are dropped."""
    items = [simple("a <|im_start|> b"), simple("c", f"d{END}"), simple("fine"), simple("e", "f</s>")]
    reader = Reader(part("messages", write(tmp_path / "a.jsonl", items)), default)
    assert len(list(reader)) == 2 and reader.tally.dropped == {"special token in a message": 2}
    other = copy.copy(default)
    other.eos_token = "</s>"
    assert len(list(Reader(reader.part, other))) == 1


def test_rows_come_one_at_a_time(tmp_path: Path) -> None:
    """A set is streamed: its first row is there before what is damaged behind it is read; only ``rows`` of it are read."""
    (tmp_path / "a.jsonl").write_text(json.dumps(simple("a?")) + "\n{")
    reader = Reader(part("messages", tmp_path / "a.jsonl"))
    assert next(iter(reader)).data == simple("a?")
    with pytest.raises(Zamba2Error, match="line 2 is not valid JSON"):
        list(reader)
    write(tmp_path / "b.jsonl", [simple(f"{i}?") for i in range(5)])
    reader = Reader(part("messages", tmp_path / "b.jsonl"), rows=3)
    assert len(list(reader)) == reader.tally.read == 3 and not reader.tally.whole


def test_endless_rows_and_hidden_files(tmp_path: Path, default: Tokenizer) -> None:
    """A row of millions of characters is dropped like any other that is too long; hidden files of a folder are no data."""
    long = {"messages": [message for i in range(3) for message in simple(f"{i}?", "b" * 400_000)["messages"]]}
    path = write(tmp_path / "a.jsonl", [simple("a?", "b" * 5_000_000), long, simple("c?")])
    write(tmp_path / ".cache" / "b.jsonl", [{"other": 1}])
    reader = Reader(part("messages", path.parent), default)
    assert len(list(reader)) == 1 and reader.tally.dropped == {"longer than 1000000 characters": 2}


# ---- repeated prompts ------------------------------------------------------------------------------------------------


def test_repeated_prompts_within_and_across_sets(tmp_path: Path) -> None:
    """The first row that has a prompt keeps it, in its set and in others; case and white space make no difference; it is reported."""
    first = write(tmp_path / "a.jsonl", [simple("Why?", "a"), simple("  WHY? ", "b"), simple("Why not?")])
    longer = {"messages": [*simple("When?")["messages"], U, A]}  # a prompt is what stands before the first answer trained on
    second = write(tmp_path / "b.jsonl", [simple("why\nnot?"), simple("When?"), longer])
    prompts = Prompts()
    one, two = (Reader(part("messages", path), prompts=prompts) for path in (first, second))
    assert [len(list(reader)) for reader in (one, two)] == [2, 1]
    assert one.tally.dropped == {"prompt seen before": 1}
    assert two.tally.dropped == {f"prompt also in messages:{first}": 1, "prompt seen before": 1}
    assert [len(list(reader)) for reader in (one, two)] == [2, 1]  # reading again drops nothing more


def test_preferences_repeat_whole_prompts(tmp_path: Path) -> None:
    """A preference's prompt is all that stands before its answer: a later turn of the same talk is another prompt."""
    base = {"chosen": "a", "rejected": "b"}
    items = [base | {"prompt": [U]}, base | {"prompt": [U, A, {"role": "user", "content": "more"}]}, base | {"prompt": "U"}]
    items.append(base | {"prompt": [{"role": "user", "content": "other"}, A, {"role": "user", "content": "more"}]})
    for item in items:
        item |= {side: [{"role": "assistant", "content": item[side]}] for side in ("chosen", "rejected")}  # type: ignore[operator]
    items[2] = {"prompt": "U", "chosen": "c", "rejected": "d"}
    reader = Reader(part("preferences", write(tmp_path / "a.jsonl", items)), prompts=Prompts())
    assert len(list(reader)) == 3 and reader.tally.dropped == {"prompt seen before": 1}


@given(words=st.lists(st.text("abcdefgh", min_size=1, max_size=6), min_size=1, max_size=30), seed=st.integers())
def test_evaluation_prompts_are_kept_out(words: list[str], seed: int) -> None:
    """An evaluation prompt is found in any user turn, however it is written; so is any run of 13 of its words inside another text, and
    nothing shorter."""
    prompts = Prompts([" ".join(words), "Caf\u00e9?"])
    assert prompts.repeated(simple("CAFE\u0301?"), ("x", 1)) == "evaluation prompt"
    shouted = {"messages": [U, A, {"role": "user", "content": "  ".join(words).upper()}, A]}
    assert prompts.repeated(shouted, ("x", 1)) == "evaluation prompt"
    rng = random.Random(seed)
    length = rng.randint(1, len(words))
    start = rng.randint(0, len(words) - length)
    inside = simple(" ".join(["Zz,", *words[start : start + length], "zz!"]))
    found = prompts.repeated(inside, ("x", 2))
    assert (found == f"{WINDOW} words of an evaluation prompt") == (length >= WINDOW)


@pytest.mark.parametrize("length", range(WINDOW - 2, WINDOW + 3))
def test_thirteen_words_are_enough(length: int) -> None:
    """A text of 13 words and more is found wherever it stands in another; of 12 it is not."""
    words = [f"w{i}" for i in range(length)]
    prompts = Prompts([" ".join(words)])
    for before, behind in (([], ["z"]), (["z"], []), (["z"], ["z"])):
        found = prompts.repeated(simple(" ".join(before + words + behind)), ("x", 1))
        assert (found is not None and "evaluation" in found) == (length >= WINDOW)


def test_evaluation_files(tmp_path: Path) -> None:
    """IFEval's "prompt" and MT-Bench's "turns" are both read."""
    path = write(tmp_path / "a.jsonl", [{"key": 1, "prompt": "one"}, {"question_id": 81, "turns": ["two", "three"]}])
    assert evaluation_prompts(path) == ["one", "two", "three"]


# ---- mixing ----------------------------------------------------------------------------------------------------------


@given(items=st.lists(st.integers(), max_size=60), seed=st.integers(), buffer=st.integers(1, 20))
def test_shuffling_loses_nothing(items: list[int], seed: int, buffer: int) -> None:
    """Shuffled items are the same items, the same for the same seed, none more than ``buffer`` places early."""
    numbered = list(enumerate(items))
    out = list(shuffled(numbered, seed, buffer))
    assert sorted(out) == sorted(numbered) and out == list(shuffled(iter(numbered), seed, buffer))
    assert all(number - place <= buffer for place, (number, _) in enumerate(out))
    assert list(shuffled(items, seed, 1)) == items


def counting(name: str, length: int | None) -> Callable[[int], Iterator[tuple[str, int]]]:
    return lambda round: ((name, i) for i in (itertools.count() if length is None else range(length)))


@given(weights=st.lists(st.floats(0.05, 20), min_size=1, max_size=4), seed=st.integers(0, 1 << 60))
def test_mixing_keeps_the_weights(weights: list[float], seed: int) -> None:
    """Sets are drawn in proportion to their weights (five standard deviations), each in its own order, the same for the same seed."""
    sets = [counting(str(i), None) for i in range(len(weights))]
    drawn = list(itertools.islice(mix(sets, weights, seed=seed), 2000))
    counts = Counter(name for name, _ in drawn)
    for i, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs(counts[str(i)] - 2000 * share) <= 5 * (2000 * share * (1 - share)) ** 0.5 + 1e-9
        assert [n for name, n in drawn if name == str(i)] == list(range(counts[str(i)]))
    assert drawn == list(itertools.islice(mix(sets, weights, seed=seed), 2000))


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4), seed=st.integers())
def test_where_a_mixture_ends(lengths: list[int], seed: int) -> None:
    """"first" ends with the first set that has no more, and nothing comes twice; "all" gives everything at least once."""
    sets = [counting(str(i), length) for i, length in enumerate(lengths)]
    once = list(mix(sets, [1.0] * len(sets), seed=seed))
    counts = Counter(name for name, _ in once)
    assert len(set(once)) == len(once) and any(counts[str(i)] == length for i, length in enumerate(lengths))
    everything = list(mix(sets, [1.0] * len(sets), seed=seed, until="all"))
    assert set(everything) == {(str(i), n) for i, length in enumerate(lengths) for n in range(length)}
    rounds = [n for n in mix([lambda round: [round], lambda round: range(100, 110)], [1.0, 1.0], seed=seed, until="all") if n < 100]
    assert rounds == list(range(len(rounds)))  # each time a set is begun again is a round of its own


def test_a_mixture_of_sets(tmp_path: Path, default: Tokenizer) -> None:
    """Sets of one stage are read, filtered and mixed in one stream; other seeds give other orders; a set begun again loses nothing."""
    paths = [write(tmp_path / f"{name}.jsonl", [simple(f"{name} {i}?") for i in range(n)]) for name, n in (("a", 40), ("b", 10))]
    once = set()
    for until, seeds in (("first", (1, 2)), ("all", (1, 2))):
        orders = []
        for seed in (*seeds, seeds[0]):
            prompts = Prompts()
            parts = [Part(SOURCES["messages"], path, weight) for path, weight in zip(paths, (1, 2), strict=True)]
            readers = [Reader(each, default, prompts=prompts) for each in parts]
            orders.append([])
            whole = False
            for example in mixture(readers, seed=seed, until=until, buffer=8):
                orders[-1].append(example.data["messages"][0]["content"])
                assert readers[1].tally.whole >= whole  # its first round is what a reader counts
                whole = readers[1].tally.whole
        assert orders[0] == orders[2] != orders[1]
        once = set(orders[0])
    assert len(once) == 50
    twins = [Reader(part("messages", write(tmp_path / f"{name}.jsonl", [simple(f"{name}{i}?") for i in range(10)]))) for name in "cd"]
    said = dict.fromkeys(example.data["messages"][0]["content"] for example in mixture(twins, seed=1, until="all"))
    assert [text[1:] for text in said if text[0] == "c"] != [text[1:] for text in said if text[0] == "d"]  # each set has its own order


# ---- masks -----------------------------------------------------------------------------------------------------------

# Anything at all: empty, white space, marks, characters outside the vocabulary.
BITS = ["\n", "\n\n", " ", "a", "é", "漢", "😀", "<|im_start|>", END, "assistant\n", "</s>"]
WILD = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=20),
    st.lists(st.sampled_from(BITS), max_size=8).map("".join),
)
ANY = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": WILD}), min_size=1, max_size=6
)


def byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE whose merges reach over the header's line end and cut characters in two."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("ĊĊ", "Ċ"), ("Ġ", "a"), ("ð", "Ł"), ("Ã", "©"), (">", "Ċ")]
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", END])
    return tokenizer


def trimming() -> tokenizers.Tokenizer:
    """The same, with white space left out of the offsets."""
    tokenizer = byte_level()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def plain() -> tokenizers.Tokenizer:
    """The same without marks of its own: the end token is ordinary text, and merges with the line end behind it."""
    tokenizer = tokenizers.Tokenizer(byte_level().model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, default: Tokenizer) -> dict[str, Tokenizer]:
    """Tokenizers of several families; Mistral's, renamed as the instruct checkpoints have it, where the shared data is present."""
    made = {"default": default}
    texts = {"byte level": byte_level().to_str(), "trimming": trimming().to_str(), "plain": plain().to_str()}
    mistral = SHARED / "tokenizer" / "mistral_v1_tokenizer.json"
    if mistral.exists():
        texts["base"] = mistral.read_text(encoding="utf-8")
        found = json.loads(texts["base"])
        for old, new in (("<s>", "<|im_start|>"), ("</s>", END)):
            found["model"]["vocab"][new] = found["model"]["vocab"].pop(old)
            next(token for token in found["added_tokens"] if token["content"] == old)["content"] = new
        texts["instruct"] = json.dumps(found)
    for name, text in texts.items():
        folder = tmp_path_factory.mktemp("tokenizer")
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        made[name] = Tokenizer.from_folder(folder)
    return made


KINDS = ["default", "byte level", "trimming", "base", "instruct"]


def pick(folders: dict[str, Tokenizer], kind: str) -> Tokenizer:
    if kind not in folders:
        pytest.skip("the shared tokenizer is not here")
    return folders[kind]


def flags(messages: Messages, last_only: bool = False) -> list[bool]:
    """For each character of the ChatML text, written out here, whether it is the assistant's or part of its end token."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
    out: list[bool] = []
    for i, message in enumerate(messages):
        trained = message["role"] == "assistant" and (i == last or not last_only)
        out += [False] * len(f"<|im_start|>{message['role']}\n") + [trained] * len(message["content"] + END) + [False]
    return out


def check_mask(tokenizer: Tokenizer, messages: Messages, masked: Masked, last_only: bool = False) -> None:
    assert masked.ids.dtype == "int32" and masked.loss.dtype == "bool" and masked.ids.shape == masked.loss.shape
    assert masked.ids.tolist() == tokenizer.encode_chat(messages, add_generation_prompt=False)
    wanted = flags(messages, last_only)
    assert len(wanted) == len(masked.text)
    for (start, end), loss in zip(masked.offsets.tolist(), masked.loss.tolist(), strict=True):
        assert loss == (start < end and all(wanted[start:end]))


@pytest.mark.parametrize("kind", [*KINDS, "plain"])
@given(messages=ANY)
def test_exactly_answers_and_their_ends_carry_loss(folders: dict[str, Tokenizer], kind: str, messages: Messages) -> None:
    """For any conversation: the ids are the chat template's, and a token carries loss if and only if all of it is the assistant's."""
    tokenizer = pick(folders, kind)
    check_mask(tokenizer, messages, mask_conversation(tokenizer, messages))


@pytest.mark.parametrize("kind", KINDS)
@given(messages=conversations(texts=TEXTS.map(str.strip).filter(bool)))
def test_what_carries_loss_reads_as_the_answers(folders: dict[str, Tokenizer], kind: str, messages: Messages) -> None:
    """Without offsets: each run of tokens with loss, decoded behind what stands before it, is one answer and its end token."""
    tokenizer = pick(folders, kind)
    masked = mask_conversation(tokenizer, messages)
    said, place = [], 0
    for trained, run_of in itertools.groupby(masked.loss.tolist()):
        end = place + len(list(run_of))
        if trained:
            before, upto = (tokenizer.decode(masked.ids[:n].tolist(), skip_special_tokens=False) for n in (place, end))
            said.append(upto[len(before) :])
        place = end
    assert said == [m["content"] + END for m in messages if m["role"] == "assistant"]


@pytest.mark.parametrize("kind", KINDS)
@given(pair=preferences(), wild=WILD)
def test_preferences_are_masked_to_the_last_answer(folders: dict[str, Tokenizer], kind: str, pair: dict[str, Messages], wild: str) -> None:
    """Of a preference the last answer alone carries loss on each side; the prompt is what a model is asked with."""
    tokenizer = pick(folders, kind)
    pair["rejected"][0]["content"] = wild
    masked = mask_pair(tokenizer, **pair)
    assert masked.prompt.tolist() == tokenizer.encode_chat(pair["prompt"]) and masked.prompt.dtype == "int32"
    for side, name in ((masked.chosen, "chosen"), (masked.rejected, "rejected")):
        check_mask(tokenizer, [*pair["prompt"], *pair[name]], side, last_only=True)
        if not pair[name][0]["content"].startswith("\n"):
            n = len(masked.prompt)
            assert side.ids[:n].tolist() == masked.prompt.tolist() and not side.loss[:n].any() and side.loss[n]
    assert len(masked) == max(len(masked.chosen), len(masked.rejected))


def with_template(template: str, folder: Path) -> Tokenizer:
    (folder / "tokenizer.json").write_bytes((RANDOM / "tokenizer.json").read_bytes())
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return Tokenizer.from_folder(folder)


PROMPT = "{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
TURN = "{%% for m in messages %%}<|im_start|>{{ m.role }}\n%s{%% endfor %%}" + PROMPT


def test_other_templates(tmp_path: Path) -> None:
    """Templates that trim, or begin with a system message of their own, are masked where the answer really stands."""
    tokenizer = with_template("<|im_start|>system\nBe kind.<|im_end|>\n" + TURN % "{{ m.content | trim }}<|im_end|>\n", tmp_path)
    masked = mask_conversation(tokenizer, [U, {"role": "assistant", "content": "  said \n"}, U])
    where = masked.offsets[masked.loss]
    assert masked.text[where.min() : where.max()] == "said" + END


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (TURN % "{{ m.content }}\n", "no end token"),
        (TURN % "{{ m.content | upper }}<|im_end|>\n", "changes what the assistant says"),
        (TURN % "{{ m.content }}{% if loop.last %}<|im_end|>{% endif %}\n", "beginning otherwise"),
        ("{{ raise_exception('not this') }}", "not this"),
    ],
)
def test_templates_that_cannot_be_masked(template: str, said: str, tmp_path: Path) -> None:
    """Where it cannot be told what the assistant says, one sentence does."""
    with pytest.raises(Zamba2Error, match=said):
        mask_conversation(with_template(template, tmp_path), [U, {"role": "assistant", "content": "said"}, U])


def test_a_refusing_template_names_the_row(tmp_path: Path) -> None:
    """Where a template refuses a conversation, the sentence says in which row."""
    path = write(tmp_path / "a.jsonl", [simple("a?")])
    with pytest.raises(Zamba2Error, match=r"a\.jsonl, line 1: the chat template refuses .* not this"):
        list(Reader(part("messages", path), with_template("{{ raise_exception('not this') }}", tmp_path)))


def test_malformed_preferences(default: Tokenizer) -> None:
    """A side of a preference is one assistant message."""
    for wrong in ([U], [U, A], [A, A]):
        with pytest.raises(Zamba2Error, match="one assistant message is needed"):
            mask_pair(default, [U], wrong, [A])
    with pytest.raises(Zamba2Error, match="half a surrogate pair"):
        mask_conversation(default, [{"role": "user", "content": "\ud83d"}, A])


# ---- real files ------------------------------------------------------------------------------------------------------

REAL = {
    "gsm8k:sft/gsm8k_train.jsonl": (7473, 7473), "gsm8k:sft/gsm8k_test.jsonl": (1319, 1319),
    "self-instruct:sft/self_instruct_seed_tasks.jsonl": (175, None),
    "self-instruct:sft/self_instruct_user_oriented_instructions.jsonl": (252, None),
    "sharegpt:sft/fastchat_dummy_conversation.json": (500, 500), "llama-factory:pref": (299, None),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_files(name: str, default: Tokenizer) -> None:
    """Published files are read to the end; what is dropped is accounted for; answers come out of the masks as they went in."""
    if not SHARED.exists():
        pytest.skip("the shared data is not here")
    source, _, path = name.partition(":")
    reader = Reader(part(source, SHARED / path))
    examples = list(reader)
    read, kept = REAL[name]
    assert reader.tally.read == read and len(examples) == (read - sum(reader.tally.dropped.values()) if kept is None else kept)
    assert len(examples) > 0.9 * read
    for example in random.Random(read).sample(examples, 25):
        if "messages" in example.data:
            check_mask(default, example.data["messages"], mask_conversation(default, example.data["messages"]))
        else:
            masked = mask_pair(default, **example.data)
            check_mask(default, [*example.data["prompt"], *example.data["chosen"]], masked.chosen, last_only=True)


# ---- the Hub, as far as it goes without one --------------------------------------------------------------------------


@pytest.mark.parametrize("name", CARD)
@given(made=st.data())
def test_hub_rows_are_streamed(name: str, tmp_path_factory: pytest.TempPathFactory, made: st.DataObject) -> None:
    """The library streams the named split of a repository laid out as on the Hub (here a folder) to the same examples."""
    pairs = made.draw(st.lists(rows(name), min_size=1, max_size=3))
    for row, _ in pairs:
        row |= {"id": 7, "label": {"ability_en": ["x"]}} if name.startswith("infinity") else {}
    folder = tmp_path_factory.mktemp("hub")
    source = SOURCES[name]
    write(folder / "data" / f"{source.split}-00000-of-00001.parquet", [row for row, _ in pairs])
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {source.config or 'default'}\n  data_files:\n"
        f"  - split: {source.split}\n    path: data/{source.split}-*\n---\n"
    )
    local = data.replace(source, hub=str(folder))
    assert [example.data for example in Reader(Part(local))] == [expected for _, expected in pairs]


def test_what_the_hub_may_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gated set, one that is not there, and a connection that breaks half-way are one sentence each; what is asked for is the split."""
    asked: list[Any] = []

    def load(*arguments: Any, **options: Any) -> Iterator[dict[str, Any]]:
        asked.append((arguments, options))
        if "Infinity" in arguments[0]:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{arguments[0]}' is a gated dataset on the Hub. Visit it.")
        if "orca" in arguments[0]:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{arguments[0]}' doesn't exist on the Hub.")
        yield simple("a?") | {"prompt": "a?", "prompt_id": "0"}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", load)
    wanted = {"infinity": "accept its terms on the Hub and set HF_TOKEN", "orca": "doesn't exist", "ultrachat": "behind row 1 "}
    for name, said in wanted.items():
        with pytest.raises(Zamba2Error, match=said):
            list(Reader(Part(SOURCES[name])))
    assert asked == [
        (("BAAI/Infinity-Instruct", "7M"), {"split": "train", "streaming": True}),
        (("Intel/orca_dpo_pairs", None), {"split": "train", "streaming": True}),
        (("HuggingFaceH4/ultrachat_200k", None), {"split": "train_sft", "streaming": True}),
    ]


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def preview(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs ``zamba2 train preview``; gives exit code, standard output and lines of standard error."""

    def call(*arguments: str) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        code = run(["train", "preview", *arguments])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return call


def test_preview_as_json(preview: Any, tmp_path: Path, default: Tokenizer) -> None:
    """--json prints one line: the report, and examples whose ids and masks are the library's; the same seed, the same document."""
    path = write(tmp_path / "a.jsonl", [simple(f"{i}?", f"It is {i}.") for i in range(30)] + [simple("3?"), {"messages": [A]}])
    questions = write(tmp_path / "q.jsonl", [{"prompt": "7?"}])
    line = (f"messages:{path}", "--count", "4", "--seed", "5", "--json", "--against", str(questions), "--model", "random")
    code, out, err = preview(*line)
    assert (code, err, out.count("\n")) == (0, [], 1) and preview(*line)[1] == out
    assert preview(*line, "--seed", "6")[1] != out
    document = json.loads(out)
    (report,) = document["sets"]
    assert document["kind"] == "sft" and (report["read"], report["kept"], report["whole"]) == (32, 29, True)
    assert report["dropped"] == {"evaluation prompt": 1, "prompt seen before": 1, "broken turns": 1}
    assert len(document["examples"]) == 4
    for example in document["examples"]:
        masked = mask_conversation(default, example["messages"])
        tokens = example["tokens"]["messages"]
        assert (tokens["ids"], tokens["loss"], tokens["text"]) == (masked.ids.tolist(), masked.loss.tolist(), masked.text)


def test_preview_shows_what_is_trained_on(preview: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without colours marks enclose exactly what is trained on; with them, the green parts are the same; no control code gets out."""
    row = {"prompt": "Ask \x1b[31m me", "chosen": "Good\nanswer 漢😀", "rejected": "bad"}
    path = write(tmp_path / "a.jsonl", [row])
    code, out, err = preview(f"preferences:{path}", "--count", "1")
    assert (code, err) == (0, []) and re.findall("«(.*?)»", out, re.DOTALL) == [f"Good\nanswer 漢😀{END}", f"bad{END}"]
    assert "\x1b" not in out and "Ask \ufffd[31m me" in out
    assert "«One day.»\n" in preview(f"text:{write(tmp_path / 't.jsonl', [{'text': 'One day.'}])}", "--count", "1")[1]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = preview(f"preferences:{path}", "--count", "1")[1]
    green = re.findall(r"\x1b\[30;(?:42|102)m([^\x1b]*)\x1b\[0m", out)
    assert "".join(green).replace("\n", "") == f"Goodanswer 漢😀{END}bad{END}"


def test_samples_are_even() -> None:
    """Each of a set's examples is as likely to be shown as any other."""
    counts = Counter(shown for seed in range(400) for shown in sample(range(4), str(seed), 2))  # type: ignore[arg-type, misc]
    assert sum(counts.values()) == 800 and len(counts) == 4 and min(counts.values()) > 150


def test_preview_report(preview: Any, tmp_path: Path) -> None:
    """The table tells for each set what was read, kept and dropped, and by reason; + where there is more to read. English alone is kept
    where a set names languages, unless all are asked for."""
    one = write(tmp_path / "one.jsonl", [simple("a?"), simple("b?"), simple("a?")])
    two = write(tmp_path / "two.jsonl", [simple("b?"), *(simple(f"{i}?") for i in range(9))])
    code, out, _ = preview(f"messages:{one}", f"messages:{two}=2", "--rows", "5", "--count", "0")
    assert code == 0
    assert re.search(r"messages:one\.jsonl +3 +2 +1 ", out) and re.search(r"messages:two\.jsonl=2 +5\+ +4 +1 ", out)
    assert re.search(r"prompt seen before +1 *\n", out) and "prompt also in" in out and "--rows 0 reads all" in out
    code, out, _ = preview(f"messages:{two}", "--rows", "0", "--count", "0")
    assert code == 0 and re.search(r"messages:two\.jsonl +10 +10 +0 ", out) and "reads all" not in out
    said = ((language, sharegpt(simple(f"{language}?")["messages"])) for language in ("en", "zh"))
    items = [{"conversations": turns, "langdetect": language} for language, turns in said]
    both = write(tmp_path / "both.jsonl", items)
    for options, numbers in (((), "2 +1 +1"), (("--language", "all"), "2 +2 +0")):
        assert re.search(rf"infinity:both\.jsonl +{numbers} ", preview(f"infinity:{both}", "--count", "0", *options)[1])


# Command lines that cannot work, and what the sentence must hold.
BAD = {
    "missing file": (["messages:FOLDER/none.jsonl"], "none.jsonl does not exist"),
    "no data": (["messages:FOLDER/nodata"], "holds no data"),
    "kind": (["messages:FOLDER/notes.txt"], "is of no kind that is read"),
    "split": (["ultrachat:FOLDER/tests"], "no files of the split train_sft"),
    "cut parquet": (["messages:FOLDER/cut.parquet"], "cut.parquet is not a whole parquet file"),
    "empty parquet": (["messages:FOLDER/nothing.parquet"], "is not a whole parquet file"),
    "parquet with a hole": (["messages:FOLDER/middle.parquet"], "is not a whole parquet file"),
    "cut jsonl": (["messages:FOLDER/cut.jsonl"], "cut.jsonl, line 2 is not valid JSON"),
    "cut json": (["messages:FOLDER/cut.json"], "cut.json is not valid JSON"),
    "no UTF-8": (["messages:FOLDER/latin.jsonl"], "is not UTF-8"),
    "deep": (["messages:FOLDER/deep.jsonl"], "is not valid JSON"),
    "empty": (["messages:FOLDER/empty.jsonl"], "the set is empty"),
    "no objects": (["messages:FOLDER/list.jsonl"], "is a list; an object with messages is needed"),
    "columns": (["messages:FOLDER/columns.jsonl"], "line 2 has no messages"),
    "another set": (["orca:FOLDER/good.jsonl"], "has no system; rows of orca have system, question, chosen, rejected"),
    "type": (["messages:FOLDER/types.jsonl"], "messages is a str; rows of messages have a list there"),
    "type of a text": (["gsm8k:FOLDER/number.jsonl"], "question is a int; rows of gsm8k have a str there"),
    "nothing left": (["messages:FOLDER/broken.jsonl"], "none of 2 rows can be trained on"),
    "too long": (["messages:FOLDER/good.jsonl", "--max-tokens", "3"], "longer than 3 tokens: 1"),
    "unknown set": (["ultrachat2"], "there is no data set 'ultrachat2'; there are ultrachat, infinity,"),
    "no file": (["messages"], "messages is a format and not on the Hub"),
    "empty path": (["messages:"], "names no file"),
    "weight": (["ultrachat=much"], "the weight of ultrachat is 'much'"),
    "negative": (["messages:FOLDER/good.jsonl=-1"], "the weight of messages is '-1'"),
    "infinite": (["ultrachat=inf"], "a number above 0 is needed"),
    "stages": (["ultrachat", "orca"], "ultrachat is for sft, orca for dpo"),
    "evaluation": (["messages:FOLDER/good.jsonl", "--against", "FOLDER/none.jsonl"], "none.jsonl does not exist; a file of evaluation"),
    "evaluation's rows": (["messages:FOLDER/good.jsonl", "--against", "FOLDER/bad_evaluation.jsonl"], "holds no evaluation prompt"),
    "evaluation empty": (["messages:FOLDER/good.jsonl", "--against", "FOLDER/empty.jsonl"], "empty.jsonl is empty"),
    "twice": (["messages:FOLDER/good.jsonl", "messages:FOLDER/good.jsonl=2"], "good.jsonl is given 2 times"),
    "offline": (["gsm8k", "--offline"], "gsm8k is read from the Hub"),
    "count": (["messages:FOLDER/good.jsonl", "--count", "-1"], "-1 is not in the range x>=0"),
    "model": (["messages:FOLDER/good.jsonl", "--model", "FOLDER/nodata"], "has no tokenizer.json"),
    "no set": ([], "NAME"),
    "no network": (["ultrachat"], "HuggingFaceH4/ultrachat_200k"),
}  # fmt: skip


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files with something wrong."""
    folder = tmp_path_factory.mktemp("damaged")
    good = write(folder / "good.jsonl", [simple("a?")])
    whole = write(folder / "whole.parquet", [simple(f"{i}?") for i in range(100)]).read_bytes()
    (folder / "cut.parquet").write_bytes(whole[:-10])
    (folder / "nothing.parquet").write_bytes(b"")
    middle = bytearray(whole)
    middle[4:200] = bytes(196)
    (folder / "middle.parquet").write_bytes(bytes(middle))
    line = good.read_text()
    (folder / "cut.jsonl").write_text(line + line[:30])
    (folder / "cut.json").write_text(json.dumps([simple("a?")])[:-5])
    (folder / "latin.jsonl").write_bytes(line.encode() + '{"messages": "é"}\n'.encode("latin-1"))
    (folder / "deep.jsonl").write_text("[" * 100_000)
    (folder / "empty.jsonl").write_text("\n")
    (folder / "list.jsonl").write_text("[1, 2]\n")
    (folder / "nodata").mkdir()
    (folder / "notes.txt").write_text("x")
    write(folder / "tests" / "test_sft-00000-of-00001.jsonl", [simple("a?")])
    write(folder / "columns.jsonl", [simple("a?"), {"question": "a", "answer": "b"}])
    write(folder / "types.jsonl", [{"messages": "text"}])
    write(folder / "number.jsonl", [{"question": 3, "answer": "b"}])
    write(folder / "broken.jsonl", [{"messages": [A]}, {"messages": []}])
    write(folder / "bad_evaluation.jsonl", [{"question": "x"}])
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_one_sentence(case: str, preview: Any, damaged: Path) -> None:
    """Whatever is wrong with the data or the request ends in one line that names it, and exit code 2."""
    arguments, said = BAD[case]
    code, out, err = preview(*(argument.replace("FOLDER", str(damaged)) for argument in arguments))
    assert (code, out, len(err)) == (2, "", 1) and err[0].startswith("zamba2: ") and said in err[0], err


@pytest.mark.parametrize(("module", "argument"), [("datasets", "ultrachat"), ("pyarrow", "messages:a.parquet")])
def test_missing_library(module: str, argument: str, preview: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the library the sentence says what to install; JSON lines are read without it."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.parquet", [simple("a?")])
    write(tmp_path / "a.jsonl", [simple("a?")])
    monkeypatch.setitem(sys.modules, module, None)
    code, _, err = preview(argument)
    assert (code, len(err)) == (2, 1) and "pip install datasets" in err[0]
    assert preview("messages:a.jsonl")[0] == 0


def test_weights_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NAME, NAME=WEIGHT, NAME:PATH and NAME:PATH=WEIGHT; a file whose name ends like a weight is a file."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "odd=3", [])
    read = {text: Part.parse(text) for text in ("orca", "orca=.5", "orca:a.jsonl", "orca:a.jsonl=2", "orca:odd=3", "orca:odd=3=2")}
    assert [(p.path and str(p.path), p.weight) for p in read.values()] == [
        (None, 1), (None, 0.5), ("a.jsonl", 1), ("a.jsonl", 2), ("odd=3", 1), ("odd=3", 2),
    ]  # fmt: skip


def test_a_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    """A byte order mark and blank lines are no data, in JSON lines and in a list."""
    row = json.dumps(simple("a?"))
    for name, body in (("a.jsonl", f"\n{row}\n\n"), ("b.json", f"[{row}]"), ("c.json", row)):
        (tmp_path / name).write_text(body, encoding="utf-8-sig")
        assert [e.data for e in Reader(part("messages", tmp_path / name))] == [simple("a?")]


def test_examples_carry_their_tokens(tmp_path: Path, default: Tokenizer) -> None:
    """With a tokenizer an example has its masks, without one it has none; its place names file and row."""
    path = write(tmp_path / "a.jsonl", [simple("a?")])
    (with_tokens,) = Reader(part("messages", path), default)
    (without,) = Reader(part("messages", path))
    assert isinstance(with_tokens, Example) and isinstance(with_tokens.masked, Masked) and without.masked is None
    assert without.place == f"{path}, line 1"
    reader = Reader(part("preferences", write(tmp_path / "b.jsonl", [{"prompt": "p", "chosen": "c", "rejected": "d e"}])), default)
    (pair,) = reader
    assert isinstance(pair.masked, MaskedPair) and reader.tally.longest == len(pair.masked.rejected) == len(pair.masked)
    assert reader.tally.tokens == len(pair.masked.chosen) + len(pair.masked.rejected)


def test_texts_are_targets_throughout(default: Tokenizer, tmp_path: Path) -> None:
    """A plain text becomes the ids of a base model's prompt and an end token, all of them targets; the same text twice is dropped once."""
    file = write(tmp_path / "t.jsonl", [{"text": "One day."}, {"text": "one  DAY."}, {"text": "<|im_end|>"}])
    reader = Reader(part("text", file), default, Filters(), Prompts())
    (example,) = list(reader)
    assert isinstance(example.masked, Masked) and example.data == {"text": "One day."}
    assert example.masked.ids.tolist() == [*default.encode("One day."), default.eos_token_ids[0]] and example.masked.loss.all()
    assert reader.tally.dropped == {"prompt seen before": 1, "special token in a message": 1}
