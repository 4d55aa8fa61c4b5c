"""The made-up instructions: right answers pass, wrong ones fail, what is held out stays held out, and one seed gives one stream."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zamba2.language.messages import check_messages
from zamba2.train.instructions import (
    FORMS,
    GROUPS,
    KINDS,
    LAWS,
    MARKS,
    SPLITS,
    THINGS,
    WORDS,
    Chance,
    Task,
    documents,
    passes,
    plural,
    sentence,
    split_of,
    tasks,
)  # fmt: skip

KIND = pytest.mark.parametrize("kind", KINDS)
SPLIT = pytest.mark.parametrize("split", SPLITS)
WRONG = ("", " ", ".", "no", "the sky is green.", "The sky is green and 1000 stars shine.", "[]", "{}", "- ", "0", "Sure! Here you are.")


def draw(count: int, split: str = "train", kind: str | None = None, seed: int | str = 0) -> list[Task]:
    return list(itertools.islice(tasks(seed, split=split, kinds=None if kind is None else [kind]), count))


def answer(task: Task) -> str:
    return task.messages[-1]["content"]


def held_out(*arguments: object) -> bool:
    """Whether arguments are of the test split, worked out anew from what the module promises: blake2b, one class of ten."""
    text = "|".join(" ".join(sorted(map(str, item))) if isinstance(item, list) else str(item) for item in arguments)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % 10 == 0


# ---- tasks -----------------------------------------------------------------------------------------------------------


@KIND
@SPLIT
def test_reference_answers_are_right(kind: str, split: str) -> None:
    """Every reference passes its own check, with white space around it too, and is short."""
    for task in draw(250, split, kind):
        assert passes(task.check, answer(task)), task
        assert passes(task.check, f"\n {answer(task)}  \n"), task
        assert len(answer(task).split()) <= (90 if kind == "story" else 60), task


@SPLIT
def test_tasks_are_well_formed(split: str) -> None:
    """Messages are a conversation that ends with the assistant, checks are plain JSON data of known laws, keys name their kind."""
    seen = Counter[str]()
    for task in draw(2500, split):
        check_messages(task.messages)
        seen[task.messages[0]["role"]] += 1
        said = [message["role"] for message in task.messages if message["role"] != "system"]
        assert said == ["user", "assistant"] * (len(said) // 2) and said
        assert [message["role"] for message in task.messages].count("system") == (task.messages[0]["role"] == "system")
        assert json.loads(json.dumps(task.check)) == task.check and task.check.keys() <= LAWS.keys() and task.check
        assert task.key.startswith(task.kind + ": ") and split_of(task.key) == split
        for message in task.messages:
            assert message["content"] == message["content"].strip() and not re.search(r"[{}]", message["content"].replace(answer(task), ""))
    assert 0.06 < seen["system"] / seen.total() < 0.15


def test_kinds_are_drawn_evenly() -> None:
    """All kinds come, each about as often as the others; those asked for and no others."""
    counts = Counter(task.kind for task in draw(6600))
    assert counts.keys() == KINDS.keys() and min(counts.values()) > 0.7 * 6600 / len(KINDS)
    assert {task.kind for task in itertools.islice(tasks(1, split="test", kinds={"sort", "chat"}), 100)} == {"sort", "chat"}


def test_splits_share_no_key() -> None:
    """No key of 20,000 draws is in both splits, nor the same arguments under another kind; each kind has both splits."""
    keys = {split: {task.key for task in draw(10_000, split)} for split in SPLITS}
    arguments = {split: {key.partition(": ")[2] for key in keys[split]} for split in SPLITS}
    assert not arguments["train"] & arguments["test"]
    for split in SPLITS:
        assert {key.partition(":")[0] for key in keys[split]} == set(KINDS)


def test_one_in_ten_is_held_out() -> None:
    """About a tenth of all sets of arguments are held out, whatever the kind."""
    rng = random.Random(0)
    picked = [" ".join(sorted(rng.sample(WORDS, 3))) for _ in range(5000)]
    assert 0.08 < sum(split_of(f"sort: {words}") == "test" for words in picked) / 5000 < 0.12
    assert all(split_of(f"sort: {words}") == split_of(f"upper: {words}") for words in picked)


SUM = re.compile(r"(?<![\w+x-] )\b(\d+) ([+x-]) (\d+) = (\d+)\b")
ASKED = re.compile(r"(\d+) (\+|-|x|plus|minus|times) (\d+)")
SIGN = {"plus": "+", "minus": "-", "times": "x"}


@SPLIT
def test_sums_do_not_cross_the_splits(split: str) -> None:
    """The same two numbers under one sign are of one split, in either order, in any turn of a conversation."""
    found = 0
    for task in [*draw(300, split, "arithmetic"), *draw(900, split, "follow_up")]:
        if "number" not in task.check:
            continue
        last = None
        for asked, replied in zip(*(iter(m for m in task.messages if m["role"] != "system"),) * 2, strict=True):
            said = ASKED.search(asked["content"])
            if said:
                last = int(said[1]), int(said[3]), SIGN.get(said[2], said[2])
            elif last and re.fullmatch(r"-?\d+", replied["content"]) and (more := re.search(r"\d+", asked["content"])):
                last = last[3], int(more[0]), "+-"[int(replied["content"]) < last[3]]  # type: ignore[misc]
            else:
                break
            a, b, sign = last[:3]
            assert held_out([a, b], sign) == (split == "test"), task
            assert int(replied["content"]) == {"+": a + b, "-": a - b, "x": a * b}[sign]
            last, found = (a, b, sign, int(replied["content"])), found + 1  # type: ignore[assignment]
    assert found > 300


@SPLIT
def test_lists_do_not_cross_the_splits(split: str) -> None:
    """In conversations, too, a set of words is of one split, and so is a sentence that is worked on."""
    for task in draw(600, split, "follow_up"):
        said = [message["content"] for message in task.messages if message["role"] == "assistant"]
        if said[0].endswith("."):
            assert held_out(said[0].lower().removesuffix(".")) == (split == "test"), task
        elif not said[0].isdigit():
            assert held_out(said[0].split(", ")) == (split == "test"), task


def test_the_same_seed_gives_the_same_stream() -> None:
    """Tasks and documents repeat for a seed, and differ for another seed and another split."""
    for stream in (tasks, documents):
        asked = ((3, "train"), (3, "train"), (4, "train"), (3, "test"))
        one, same, *others = (list(itertools.islice(stream(seed, split=split), 50)) for seed, split in asked)
        assert one == same and one not in others


def test_the_stream_is_the_same_in_every_process() -> None:
    """Nothing depends on hash(), whose values change from process to process: the first draws are those of today."""
    text = json.dumps([(task.kind, task.messages, task.check, task.key) for task in draw(300, seed="fixed")])
    code = (
        "import itertools, json, hashlib; from zamba2.train.instructions import tasks;"
        "print(hashlib.sha256(json.dumps([(t.kind, t.messages, t.check, t.key) for t in "
        "itertools.islice(tasks('fixed', split='train'), 300)]).encode()).hexdigest())"
    )
    env = {**os.environ, "PYTHONHASHSEED": "5"}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == hashlib.sha256(text.encode()).hexdigest()


def test_what_is_no_split_or_kind_is_refused() -> None:
    """An unknown split or kind, and no kinds at all, raise ValueError at once."""
    for bad in ({"split": "dev"}, {"split": "train", "kinds": ["sort", "fly"]}, {"split": "train", "kinds": []}):
        with pytest.raises(ValueError, match=r"split|kinds"):
            tasks(0, **bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="split"):
        documents(0, split="dev")


# ---- checks ----------------------------------------------------------------------------------------------------------


@KIND
@SPLIT
def test_trivial_answers_fail(kind: str, split: str) -> None:
    """Nothing, fixed wrong answers and the request given back fail in at least 95 of 100 draws, the empty answer in all."""
    drawn = draw(200, split, kind)
    for wrong in WRONG:
        assert sum(passes(task.check, wrong) for task in drawn) <= (0 if not wrong.strip() else 10), wrong
    asked = [[message["content"] for message in task.messages if message["role"] == "user"] for task in drawn]
    for echo in (lambda said: said[-1], lambda said: said[0], "\n".join, lambda said: said[-1].partition(": ")[2] or said[-1]):
        if kind in ("copy", "sort") and echo(["a: b"]) == "b":
            continue  # what stands behind the colon is to be copied, or in order by chance
        passed = sum(passes(task.check, echo(said)) for task, said in zip(drawn, asked, strict=True))
        assert passed <= 10, (kind, echo(asked[0]))


@KIND
def test_answers_of_other_tasks_fail(kind: str) -> None:
    """The right answer to another task of the same kind is wrong, nearly always."""
    drawn = draw(300, kind=kind)
    pairs = [(one, other) for one, other in itertools.pairwise(drawn) if one.key != other.key]
    assert len(pairs) > 200
    # Small talk and numbers have few right answers.
    few = kind in ("chat", "count", "follow_up", "arithmetic")
    assert sum(passes(one.check, answer(other)) for one, other in pairs) <= (0.15 if few else 0.05) * len(pairs)


@KIND
def test_empty_repetition_fails(kind: str) -> None:
    """Words that the task names, said over and over, are no answer."""
    for task in draw(150, kind=kind):
        for law in ("mentions", "prose"):
            if law in task.check and kind != "chat":
                named = [any_of[0] for any_of in task.check.get("mentions", [["fox"]])]
                for count in range(1, 12):
                    assert not passes(task.check, _up(" ".join((named * count)[: max(count, len(named) + 1)])) + "."), task


def _up(text: str) -> str:
    return text[:1].upper() + text[1:]


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_no_answer_raises(data: st.DataObject) -> None:
    """Every check of every kind says yes or no to any text, and to any change of its right answer."""
    answers = data.draw(st.lists(st.text() | st.text(alphabet=' \n\t.,!?-*{}[]":0123456789abcAB`'), min_size=1, max_size=3))
    for task in FUZZED:
        right, cut = answer(task), data.draw(st.integers(0, 200))
        for text in (*answers, right[:cut], right[cut:], right + answers[0], answers[0] + right):
            assert passes(task.check, text) in (True, False)


FUZZED = [task for kind in KINDS for task in draw(3, kind=kind, seed=9)]


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "9" * 10_000, '{"a":' * 50_000, ". " * 20_000, "-" * 20_000, "a " * 20_000, "\ud800", "\x00", " " * 9999],
    ids=range(9),
)
def test_monstrous_answers_are_wrong(text: str) -> None:
    """Nested, endless and broken texts fail quickly."""
    assert not any(passes(task.check, text) for task in FUZZED)


CASES: list[tuple[str, object, list[str], list[str]]] = [
    ("text", "The fox runs.", ["the FOX runs", ' "The fox  runs." '], ["The fox", "The fox runs!", "The fox runs.."]),
    ("exact", "The fox runs.", ["The fox runs.", "The fox runs", '"The fox runs."'], ["the fox runs.", "The fox ran."]),
    ("word", "fox", ["fox", "Fox.", "the fox", "A fox"], ["a red fox", "foxes", "fox owl"]),
    ("lines", ["fox", "fox"], ["fox\nfox", "Fox.\n\nfox\n"], ["fox fox", "fox", "fox\nfox\nfox", "fox\nowl"]),
    ("items", ["fox", "owl"], ["fox, owl", "fox owl", "Fox,owl.", "fox\nowl"], ["owl, fox", "fox", "fox and owl", "fox, owl, owl"]),
    ("number", 7, ["7", "7.", "3 + 4 = 7", "That is 7 foxes."], ["-7", "7.5", "seven", "1 2 3 7", "17", "7, or 8", "1,007"]),
    ("object", {"name": "Tom", "age": 1}, ['{"age": 1, "name": "Tom"}', '```json\n{"name":"Tom","age":1}\n```'],
     ['{"name": "Tom", "age": "1"}', '{"name": "Tom", "age": true}', '{"name": "Tom", "age": 1.0}', '{"name": "Tom"}',
      '{"name": "Tom", "age": 2, "age": 1}', '{"name": "Tom", "age": 1, "x": 1}', '[{"name": "Tom", "age": 1}]',
      'Here: {"name": "Tom", "age": 1}']),
    ("bullets", ["fox", "owl"], ["- fox\n- owl", "* Fox\n* owl."], ["fox\nowl", "- owl\n- fox", "- fox", "So:\n- fox\n- owl"]),
    ("bullets_of", ["animal", 2], ["- fox\n- owl", "- Foxes\n- bee"], ["- fox\n- fox", "- fox\n- foxes", "- fox", "- fox\n- pear"]),
    ("case", "upper", ["A FOX 1.", "É"], ["A Fox.", "", "123"]),
    ("case", "lower", ["a fox 1."], ["A fox.", "", "123"]),
    ("case", "title", ["The Fox's Hat, 1.", "A, B"], ["The fox", "THE FOX", ""]),
    ("sentences", [2, 3], ["One is. Two are!", "A b. C d? E f."], ["One.", "One. Two", "A. B. C. D.", "", "1.5 is. More"]),
    ("words", [2, 2], ["two words", "two, words.", "two - words"], ["one", "one two three", ""]),
    ("mentions", [["fox", "foxes"], ["owl"]], ["An owl, a FOX.", "Foxes (owl)"], ["foxy owl", "fox", ""]),
    ("avoids", ["fox"], ["an owl", "foxy", ""], ["A fox.", "FOX", '"fox"']),
    ("prose", True, ["A fox runs. It is red."], ["fox fox runs", "A fox. A fox.", "Fox. It is red.", "a b a b a"]),
]  # fmt: skip


@pytest.mark.parametrize(("law", "value", "good", "bad"), CASES)
def test_laws(law: str, value: object, good: list[str], bad: list[str]) -> None:
    """Each law takes what keeps it and trivial surroundings, and nothing else."""
    for text in good:
        assert passes({law: value}, text), text
    for text in bad:
        assert not passes({law: value}, text), text


def test_every_law_is_tried() -> None:
    """No law is without examples, none is out of use, and a law that is none is an error, not a pass."""
    assert {law for law, *_ in CASES} == set(LAWS) == {law for task in draw(3000) for law in task.check}
    with pytest.raises(KeyError):
        passes({"beauty": 1}, "x")


# ---- the language ----------------------------------------------------------------------------------------------------


def test_words_are_plain_and_unambiguous() -> None:
    """Nouns stand in one group each, all words are lower-case English letters, and plurals are right where rules fail."""
    nouns = [word for group in GROUPS for word in group.words]
    assert len(set(nouns)) == len(nouns) and len(set(WORDS)) == len(WORDS) > 550
    assert all(re.fullmatch("[a-z]+", word) for word in WORDS)
    plurals = {"fox": "foxes", "wolf": "wolves", "puppy": "puppies", "donkey": "donkeys", "sheep": "sheep", "brush": "brushes"}
    assert {word: plural(word) for word in plurals} == plurals


def test_sentences_can_have_any_length() -> None:
    """About every thing there is a sentence of 3 to 10 words, which names it, begins with a capital and ends in a full stop."""
    chance = Chance(0)
    for thing, count in itertools.product(THINGS, range(3, 11)):
        text = sentence(chance, thing, words=count)
        assert len(text.split()) == count and text[0].isupper() and text.endswith("."), text
        assert set(re.findall(r"[a-z]+", text.lower())) & set(FORMS[thing]), text


@SPLIT
def test_articles_agree(split: str) -> None:
    """Everywhere "an" stands before vowels and "a" before other letters."""
    texts = itertools.chain(itertools.islice(documents(1, split=split), 300), (m["content"] for t in draw(1500, split) for m in t.messages))
    for text in texts:
        assert not re.search(r"\ba [aeiou][a-z]+|\ban [^aeiou\W]", text.lower()), text


def test_free_text_varies() -> None:
    """Of a hundred stories or descriptions hardly two are alike."""
    for kind in ("story", "sentences", "require", "words"):
        assert len({answer(task) for task in draw(300, kind=kind)}) > 285


@SPLIT
def test_documents_are_of_middle_length(split: str) -> None:
    """Documents have 30 to 200 words, no open braces, and differ."""
    drawn = list(itertools.islice(documents(2, split=split), 700))
    assert all(30 <= len(text.split()) <= 200 for text in drawn)
    assert not any(re.search(r"\{[a-z_]+\}", text) for text in drawn)
    assert len(set(drawn)) == len(drawn)


@SPLIT
def test_documents_show_nothing_of_the_other_split(split: str) -> None:
    """Sums, spelled words and lists that something is done with in documents are all of the documents' own split."""
    found = Counter[str]()
    for name, arguments in _exercised(itertools.islice(documents(5, split=split), 1500)):
        assert held_out(*arguments) == (split == "test"), (name, arguments)
        found[name] += 1
    assert min(found.values()) > 50 and len(found) == 4, found


def _exercised(texts: Iterator[str]) -> Iterator[tuple[str, list[object]]]:
    for text in texts:
        for a, sign, b, _ in SUM.findall(text):
            yield "sum", [[a, b], sign]
        for word, spelled in re.findall(r"^(\w+)(?: ->| is spelled|:| with \w+:) ((?:\w\W{1,2})+\w)\.?$", text, re.MULTILINE):
            if re.sub(r"\W", "", spelled) == word:  # not: a list of one, and what is done with it
                (marks,) = {name for name, mark in MARKS.items() if mark.join(word) == spelled}
                yield "spelling", [word, marks]
        for words in re.findall(r"^(\w+(?:, \w+)+)(?: ->|; | = )", text, re.MULTILINE):
            yield "list", [words.split(", ")]
        for numbers in re.findall(r"^(\d+(?:, \d+)+) from", text, re.MULTILINE):
            yield "numbers", [numbers.split(", ")]
