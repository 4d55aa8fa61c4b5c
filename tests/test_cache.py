"""The cache of states: what is kept is found again, within the bytes allowed, and the disk keeps nobody waiting."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import zamba2
from zamba2.errors import Zamba2Error
from zamba2.language.model import LanguageModel
from zamba2.runtime.backend import Backend, Row
from zamba2.serve.cache import MOST_QUEUED, Memory, StateCache

CLOSING = "<|im_end|>\n"  # behind a reply, before the next message
PAGE = 64  # tokens
Made = tuple[list[int], Any]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return zamba2.load("demo", threads=1)


def cache_of(model: LanguageModel, **options: Any) -> StateCache:
    return StateCache(lambda adapter: model.backend.new_state(adapter=adapter), **options)


def plain(model: LanguageModel, text: str) -> list[int]:
    return model.tokenizer.encode(text, add_special_tokens=False)


def states(model: LanguageModel, lengths: list[int], seed: int = 3) -> list[Made]:
    """States that share nothing, and what they have read."""
    rng = np.random.default_rng(seed)
    return [grown(model.backend, [length], rng)[0] for length in lengths]


def grown(backend: Backend, lengths: list[int], rng: np.random.Generator, begin: Made | None = None) -> list[Made]:
    """Snapshots of one conversation after so many tokens more each."""
    tokens, state = ([], backend.new_state()) if begin is None else (begin[0], begin[1].copy())
    made = []
    for length in lengths:
        more = rng.integers(300, backend.config.vocab_size, length).astype(np.int32)
        backend.forward([Row(more, state, logits=0)])
        tokens = [*tokens, *more.tolist()]
        made.append((tokens, state.copy()))
    return made


def recounted(cache: StateCache) -> int:
    """Bytes of distinct memory, from nothing; lengths are counted again beside."""
    held: dict[int, int] = {}
    with cache._lock:
        assert sum(cache._lengths.values()) == len(cache)
        for entry in cache._entries.values():
            if entry.state is not None:
                held |= entry.state.memory()
    return sum(held.values())


def on_disk(folder: Path) -> int:
    """Bytes of the folder's files; a state's note stands beside each."""
    files = {file.name: file.stat().st_size for file in folder.iterdir()}
    assert {name.partition(".")[2] for name in files} <= {"state", "json"}
    assert {name.partition(".")[0] for name in files if name.endswith(".state")} == {name[:32] for name in files if name.endswith(".json")}
    return sum(files.values())


class Slow:
    """A state whose saving begins and then waits to be let go on."""

    def __init__(self, state: Any) -> None:
        self.state, self.begun, self.go = state, threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.state, name)

    def save(self, path: Path, *, note: str = "") -> None:
        self.begun.set()
        assert self.go.wait(30)
        self.state.save(path, note=note)


@pytest.fixture
def aside() -> Iterator[Callable[..., Any]]:
    """Runs something in another thread, and gives its result within 30 s."""
    with ThreadPoolExecutor(4) as pool:
        yield pool.submit


# ---- what is found ---------------------------------------------------------------------------------------------------


def test_least_recently_used_goes_first(model: LanguageModel) -> None:
    """Within the bytes allowed the least recently used states go; none larger than all the room is kept."""
    made = states(model, [20, 30, 40, 50])
    room = sum(state.nbytes for _, state in made[:3])
    cache = cache_of(model, most_bytes=room)
    for tokens, state in made[:3]:
        cache.put(tokens, state)
    assert cache.find([*made[0][0], 5]) is not None
    cache.put(*made[3])
    assert cache.nbytes <= room and cache.find([*made[1][0], 5]) is None
    found = cache.find([*made[0][0], 5])
    assert found is not None and found.position == 20
    again = cache_of(model, most_bytes=room)
    for number in (0, 1, 0, 2, 3):  # the first is put a second time
        again.put(*made[number])
    assert again.find([*made[0][0], 5]) is not None and again.find([*made[1][0], 5]) is None
    small = cache_of(model, most_bytes=10)
    small.put(*made[0])
    assert len(small) == 0 and small.nbytes == 0


def test_the_longest_beginning_counts(model: LanguageModel) -> None:
    """Of several states that have read a prompt's beginning the longest is given, never one that has read all of it, nor an adapter's."""
    tokens = states(model, [60])[0][0]
    cache = cache_of(model)
    for length in (10, 40, 25):
        state = model.backend.new_state()
        model.backend.forward([Row(np.array(tokens[:length], np.int32), state, logits=0)])
        cache.put(tokens[:length], state)
    found = [cache.find(tokens[:n]) for n in (60, 41, 40, 25, 11, 10, 3)]
    assert [one and one.position for one in found] == [40, 40, 25, 10, 10, None, None]
    assert (cache.hits, cache.misses, cache.cached_tokens) == (5, 2, 125)
    assert cache.find(tokens, adapter="other") is None
    other = Slow(model.backend.new_state())
    model.backend.forward([Row(np.array(tokens[:40], np.int32), other.state, logits=0)])
    other.adapter = "other"  # type: ignore[attr-defined]
    cache.put(tokens[:40], other)  # type: ignore[arg-type]
    assert len(cache) == 4 and cache.find(tokens, adapter="other") is not None
    assert cache.find([*tokens[:9], 7, 8, 9, 10]) is None
    with pytest.raises(ValueError, match="has read 5 tokens, not 6"):
        state = model.backend.new_state()
        model.backend.forward([Row(np.array(tokens[:5], np.int32), state, logits=0)])
        cache.put(tokens[:6], state)


def test_the_longest_text_gives_its_tokens(model: LanguageModel) -> None:
    """Of known texts that a text begins with the longest gives the tokens it was kept with, unless a token of the text reaches over its
    end."""
    cache, more = cache_of(model), CLOSING + "<|im_start|>user\nHi" + CLOSING
    first, second, third = states(model, [20, 30, 40])
    for (tokens, state), text in ((second, more), (first, CLOSING), (third, "Hel")):
        cache.put(tokens, state, text)
    rest = "<|im_start|>assistant\n"
    assert cache.encode(more + rest, lambda part: plain(model, part)) == [*second[0], *plain(model, rest)]
    assert cache.encode("Hello", lambda part: plain(model, part)) == plain(model, "Hello")


# ---- memory ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.dictionaries(st.integers(0, 6), st.just(None), max_size=7), max_size=8), st.data())
def test_memory_counts_each_piece_once(held: list[dict[int, None]], data: st.DataObject) -> None:
    """In whatever order holders come and go, the bytes are those of the pieces that somebody holds."""
    memory, here = Memory(), list[dict[int, int]]()
    for places in held:
        here.append({place: 10**place for place in places})
        memory.add(here[-1])
        while here and data.draw(st.booleans()):
            memory.remove(here.pop(data.draw(st.integers(0, len(here) - 1))))
        assert memory.nbytes == sum({place: nbytes for pieces in here for place, nbytes in pieces.items()}.values())


def test_a_conversations_turns_share_its_keys_and_values(model: LanguageModel) -> None:
    """Snapshots of a growing conversation count its keys and values once, and what does not grow once for each; so a budget holds many
    turns, and the first to be dropped frees what no other holds."""
    config = model.backend.config
    recurrent = config.ssm_state_bytes + config.conv_state_bytes()
    page = PAGE * 2 * 2 * config.num_key_value_heads * config.attention_head_dim * len(config.hybrid_layer_ids)  # bf16
    made = grown(model.backend, [150, 1, 70, 300, 9, 41, 64, 500, 3], np.random.default_rng(1))
    cache = cache_of(model)
    for number, (tokens, state) in enumerate(made, 1):
        cache.put(tokens, state)
        pages = -(-len(tokens) // PAGE)
        assert state.nbytes == recurrent + pages * page
        assert cache.nbytes == number * recurrent + pages * page == recounted(cache)
    assert sum(state.nbytes for _, state in made) > 2 * cache.nbytes
    cache.most_bytes = before = cache.nbytes
    (other,) = states(model, [2 * PAGE])
    cache.put(*other)  # with pages of its own; those that go first leave theirs to the others
    assert cache.dropped == 1 + -(-2 * page // recurrent) and len(cache) == 10 - cache.dropped
    assert cache.nbytes == before - (cache.dropped - 1) * recurrent + 2 * page == recounted(cache)
    assert cache.find([*made[0][0], 5]) is None
    found = cache.find([*made[-1][0], 5])
    assert found is not None and found.position == len(made[-1][0])
    cache.clear()
    assert cache.nbytes == 0 and not cache._memory._pieces


@pytest.mark.parametrize("record", [False, True])
def test_memory_adds_up_to_a_states_bytes(model: LanguageModel, record: bool) -> None:
    """The pieces that a state of the native engine names are all that it holds, a recorded call's included; a copy names the same, and
    after it went on shares what neither of the two changed."""
    state = model.backend.new_state()
    for length in (1, 63, 200, 5):
        last = record and length == 5
        model.backend.forward([Row(np.full(length, 300, np.int32), state, logits=0, record=last)])
        assert sum(state.memory().values()) == state.nbytes
    copy = state.copy()
    assert copy.memory() == state.memory()
    model.backend.forward([Row(np.full(100, 300, np.int32), copy, logits=0)])
    shared = copy.memory().keys() & state.memory().keys()
    assert len(shared) == 5 * len(model.backend.config.hybrid_layer_ids) and sum(copy.memory().values()) == copy.nbytes


def test_putting_again_holds_the_new_state_alone(model: LanguageModel) -> None:
    """A state for tokens that are known takes the place of the old one, whose memory no longer counts; a text that was known stays."""
    (tokens, first), (_, second) = (states(model, [100])[0] for _ in range(2))
    cache = cache_of(model)
    cache.put(tokens, first, CLOSING)
    cache.put(tokens, second)
    assert len(cache) == 1 and cache.nbytes == second.nbytes == recounted(cache)
    assert cache.encode(CLOSING + "<|im_start|>", lambda part: plain(model, part))[:100] == tokens


@given(data=st.data(), disk=st.booleans())
def test_any_order_of_calls(data: st.DataObject, disk: bool, model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever is put and found in whatever order, branches of conversations included, both budgets are kept, and the counts of memory
    and of files are those counted from nothing; what is found has read what the prompt begins with."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    folder = tmp_path_factory.mktemp("states") if disk else None
    cache = cache_of(model, folder=folder, most_bytes=data.draw(st.sampled_from([1, 2, 4])) << 20, disk_bytes=3 << 20)
    known = states(model, [70], data.draw(st.integers(0, 99)))
    for _ in range(data.draw(st.integers(1, 12))):
        begin = data.draw(st.sampled_from(known))
        if data.draw(st.booleans()):
            (one,) = grown(model.backend, [data.draw(st.sampled_from([1, 30, 64, 200]))], rng, data.draw(st.sampled_from([None, begin])))
            known.append(one)
            cache.put(*one)
        else:
            found = cache.find([*begin[0], 5])
            assert found is None or found.position <= len(begin[0])
        if data.draw(st.booleans()):
            cache.flush()
        assert cache.nbytes == recounted(cache) <= cache.most_bytes
    cache.flush()
    assert cache.disk_nbytes == (0 if folder is None else on_disk(folder)) <= cache.disk_bytes
    cache.clear()
    assert cache.nbytes == cache.disk_nbytes == len(cache) == 0 and (folder is None or not list(folder.iterdir()))


@pytest.mark.parametrize("length", [1, 300])
def test_states_of_the_torch_backend_share_too(length: int) -> None:
    """PyTorch's copies name the same storages; one that goes on names its own for what it replaced, and states apart share none."""
    backend = zamba2.load("random", backend="torch", dtype="float32").backend
    rng = np.random.default_rng(0)
    ((tokens, state),), ((_, other),) = (grown(backend, [length], rng) for _ in range(2))
    assert backend.new_state().memory() == {}
    assert state.memory() == state.copy().memory() and not state.memory().keys() & other.memory().keys()
    assert state.nbytes <= sum(state.memory().values())
    ((_, later),) = grown(backend, [1], rng, (tokens, state))
    shared = state.memory().keys() & later.memory().keys()
    assert len(shared) == len(backend.config.hybrid_layer_ids)
    cache = StateCache(lambda adapter: backend.new_state())
    for made in grown(backend, [1] * 5, rng, (tokens, state)):
        cache.put(*made)
    assert cache.nbytes == recounted(cache) < 5 * sum(state.memory().values())


def test_several_threads(model: LanguageModel, tmp_path: Path) -> None:
    """Putting and finding at once from several threads, with a writer beside them, keeps the budgets and the counts."""
    made = [*states(model, [20 + i for i in range(6)]), *grown(model.backend, [20, 30], np.random.default_rng(9))]
    cache = cache_of(model, most_bytes=3 * made[5][1].nbytes, folder=tmp_path, disk_bytes=4 * made[5][1].nbytes)
    problems: list[BaseException] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(60):
                tokens, state = made[rng.integers(len(made))]
                if rng.random() < 0.5:
                    cache.put(tokens, state)
                else:
                    found = cache.find([*tokens, 5])
                    assert found is None or found.position <= len(tokens)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache.flush()
    assert not problems and cache.nbytes == recounted(cache) <= cache.most_bytes
    assert cache.hits + cache.misses > 0
    assert cache.disk_nbytes == on_disk(tmp_path) <= cache.disk_bytes


# ---- disk ------------------------------------------------------------------------------------------------------------


def test_kept_on_disk(model: LanguageModel, tmp_path: Path) -> None:
    """A later process reuses every token of what an earlier one kept, and goes on with the same bits."""
    (tokens, state), other = states(model, [70, 30])
    first = cache_of(model, folder=tmp_path)
    first.put(tokens, state, CLOSING)
    first.put(*other)
    first.flush()
    second = cache_of(model, folder=tmp_path)
    assert len(second) == 2 and second.nbytes == 0 and second.disk_nbytes == first.disk_nbytes == on_disk(tmp_path)
    found = second.find([*tokens, 9])
    assert found is not None and found.position == 70
    more = "<|im_start|>user\nHello"
    assert second.encode(CLOSING + more, lambda part: plain(model, part)) == [*tokens, *plain(model, more)]
    assert second.encode(more, lambda part: plain(model, part)) == plain(model, more)
    row = np.array([9], np.int32)
    one, two = (model.backend.forward([Row(row, s)])[0].numpy() for s in (state.copy(), found))
    np.testing.assert_array_equal(one, two)


def test_texts_of_another_model(model: LanguageModel, tmp_path: Path) -> None:
    """What another model left on disk gives no text its tokens: its tokenizer may be another."""
    ((tokens, state),) = states(model, [40])
    more = "<|im_start|>user\nHello"
    own, ours = [*tokens, *plain(model, more)], plain(model, CLOSING + more)
    for name, known in (("one", own), ("another", ours), ("", ours), ("one", own)):
        cache = StateCache(lambda adapter: model.backend.new_state(adapter=adapter), folder=tmp_path, model=name)
        if not len(cache):
            cache.put(tokens, state, CLOSING)
            cache.flush()
        assert cache.encode(CLOSING + more, lambda part: plain(model, part)) == known


def test_memory_lets_go_what_disk_keeps(model: LanguageModel, tmp_path: Path) -> None:
    """What does not fit in memory is read from disk again; what does not fit on disk either is gone, files and all."""
    made = states(model, [20, 30, 40])
    cache = cache_of(model, folder=tmp_path, most_bytes=made[2][1].nbytes + 1)
    for tokens, state in made:
        cache.put(tokens, state)
        cache.flush()
    assert len(cache) == 3 and cache.nbytes <= cache.most_bytes and cache.unsaved == 0
    found = cache.find([*made[0][0], 5])
    assert found is not None and found.position == 20 and cache.nbytes <= cache.most_bytes
    cache.disk_bytes = 1
    cache.put(*states(model, [50])[0])
    cache.flush()
    assert not list(tmp_path.iterdir()) and cache.disk_nbytes == 0 and len(cache) <= 1


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "no state", "other tokens", "no json", "deep", "another's"])
def test_damaged_files_count_as_absent(model: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    """A file that is half-written, foreign or altered is never used: it is said and the prompt is read from the start."""
    ((tokens, state),) = states(model, [33])
    first = cache_of(model, folder=tmp_path)
    first.put(tokens, state)
    first.flush()
    (file,), (about,) = tmp_path.glob("*.state"), tmp_path.glob("*.json")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "foreign":
        file.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    elif damage == "another's":
        states(model, [20])[0][1].save(file)
    elif damage == "no state":
        file.unlink()
    elif damage == "other tokens":
        about.write_text(about.read_text().replace(str(tokens[0]), "77", 1))
    else:
        about.write_text("[" * 100_000 if damage == "deep" else "{")
    cache = cache_of(model, folder=tmp_path)
    assert cache.find([*tokens, 5]) is None and len(cache) == 0
    assert capsys.readouterr().err.startswith("zamba2: ")
    cache.put(tokens, state)
    cache.flush()
    assert cache_of(model, folder=tmp_path).find([*tokens, 5]) is not None


def test_leftovers_of_a_killed_process(model: LanguageModel, tmp_path: Path) -> None:
    """What a process was writing when it was killed is removed at the next start; files that are not ours stay."""
    key = "0123456789abcdef" * 2
    ours = [f".{key}.state.77-00ff00ff.partial", f".{key}.json.1-12345678.partial", f"{key}.state"]
    others = ["notes.txt", "config.json", "mine.state", ".mine.state.77-00ff00ff.partial", f"{key}.txt"]
    for name in (*ours, *others):
        (tmp_path / name).write_bytes(b"x")
    assert len(cache_of(model, folder=tmp_path)) == 0
    assert {file.name for file in tmp_path.iterdir()} == set(others)


def test_a_smaller_disk_at_the_next_start(model: LanguageModel, tmp_path: Path) -> None:
    """Started again with less room, the cache keeps what was written last."""
    made = states(model, [20, 30, 40])
    for oldest in range(3):  # in whatever order the folder names them
        folder = tmp_path / str(oldest)
        first = cache_of(model, folder=folder)
        for tokens, state in (made[oldest], *made):
            first.put(tokens, state)
            first.flush()
            for file in folder.glob("*.state"):
                os.utime(file, ns=(0, file.stat().st_mtime_ns - 10**9))
        cache = cache_of(model, folder=folder, disk_bytes=on_disk(folder) - 1)
        cache.flush()
        assert cache.disk_nbytes == on_disk(folder) <= cache.disk_bytes
        assert [cache.find([*tokens, 5]) is not None for tokens, _ in made] == [number != oldest for number in range(3)]


# ---- the disk keeps nobody waiting -----------------------------------------------------------------------------------


def test_writing_keeps_nobody_waiting(model: LanguageModel, tmp_path: Path, aside: Any) -> None:
    """While a state is written others are put, found and counted, and it is found itself; ``flush`` waits for it."""
    (tokens, state), other = states(model, [70, 30])
    slow, cache = Slow(state), cache_of(model, folder=tmp_path)
    cache.put(tokens, slow, CLOSING)  # type: ignore[arg-type]
    assert slow.begun.wait(30)
    cache.put(*other)
    cache.put(tokens, state, CLOSING)  # which is no reason to write it twice
    for prompt, length in (([*tokens, 5], 70), ([*other[0], 5], 30)):
        found = aside(cache.find, prompt).result(30)
        assert found is not None and found.position == length
    encoded = aside(cache.encode, CLOSING + "<|im_start|>", lambda part: plain(model, part)).result(30)
    assert encoded[:70] == tokens and cache.nbytes == recounted(cache)
    flushing = aside(cache.flush)
    assert not flushing.done() and not list(tmp_path.glob("*.json"))
    slow.go.set()
    flushing.result(30)
    assert cache.disk_nbytes == on_disk(tmp_path) and len(list(tmp_path.glob("*.json"))) == 2


def test_dropped_while_it_is_written(model: LanguageModel, tmp_path: Path) -> None:
    """A state that memory has no room for while it is written is found all the same, then from its file, and the budget is kept."""
    (tokens, state), other = states(model, [70, 30])
    slow, cache = Slow(state), cache_of(model, folder=tmp_path, most_bytes=state.nbytes)
    cache.put(tokens, slow)  # type: ignore[arg-type]
    assert slow.begun.wait(30)
    for _ in range(2):
        cache.put(*other)
        assert cache.nbytes == other[1].nbytes == recounted(cache)
        found = cache.find([*tokens, 5])
        assert found is not None and found.position == 70 and cache.nbytes <= cache.most_bytes
    slow.go.set()
    cache.flush()
    assert cache.nbytes == recounted(cache) <= cache.most_bytes and cache.disk_nbytes == on_disk(tmp_path)
    again = cache_of(model, folder=tmp_path).find([*tokens, 5])
    assert again is not None and again.position == 70


def test_dropped_while_the_disk_refuses_it(model: LanguageModel, tmp_path: Path) -> None:
    """A state that memory has no room for while it is written, and that the disk does not take in the end, is gone, and counted."""
    (tokens, state), other = states(model, [70, 30])
    slow, cache = Slow(state), cache_of(model, folder=tmp_path, most_bytes=state.nbytes)
    slow.state = None  # so that saving fails
    slow.memory, slow.position, slow.adapter = state.memory, state.position, state.adapter  # type: ignore[attr-defined]
    cache.put(tokens, slow)  # type: ignore[arg-type]
    assert slow.begun.wait(30)
    cache.put(*other)
    slow.go.set()
    cache.flush()
    assert len(cache) == 1 == cache.unsaved and cache.find([*tokens, 5]) is None and cache.disk_nbytes == on_disk(tmp_path)


def test_what_the_disk_has_leaves_memory_first(model: LanguageModel, tmp_path: Path) -> None:
    """Where memory is too small, states go first that are on disk too: the others would be lost."""
    alone, saved, more = states(model, [20, 20, 20])
    cache = cache_of(model, folder=tmp_path, most_bytes=2 * alone[1].nbytes)
    slow = Slow(alone[1])
    slow.go.set()
    slow.save = lambda path, *, note="": 1 / 0  # type: ignore[method-assign, assignment, misc]
    for tokens, state in ((alone[0], slow), saved, more):
        cache.put(tokens, state)  # type: ignore[arg-type]
        cache.flush()
    assert cache.dropped == 1 and all(cache.find([*tokens, 5]) is not None for tokens, _ in (alone, saved, more))


@pytest.mark.parametrize("again", [False, True])
def test_forgotten_while_it_is_written(model: LanguageModel, tmp_path: Path, aside: Any, again: bool) -> None:
    """An entry that is forgotten while it is written leaves no file; put again meanwhile, it is written again."""
    ((tokens, state),) = states(model, [70])
    slow, cache = Slow(state), cache_of(model, folder=tmp_path)
    cache.put(tokens, slow)  # type: ignore[arg-type]
    assert slow.begun.wait(30)
    clearing = aside(cache.clear)
    while len(cache):
        pass
    if again:
        cache.put(tokens, state)
    slow.go.set()
    clearing.result(30)
    cache.flush()
    assert len(list(tmp_path.iterdir())) == 2 * again and cache.disk_nbytes == on_disk(tmp_path)
    assert (cache_of(model, folder=tmp_path).find([*tokens, 5]) is not None) == again


def test_a_disk_too_slow(model: LanguageModel, tmp_path: Path) -> None:
    """Of more states than may wait for the disk the oldest are not written, and counted; they stay in memory."""
    first, *made = states(model, [20 + i for i in range(MOST_QUEUED + 4)])
    slow, cache = Slow(first[1]), cache_of(model, folder=tmp_path)
    cache.put(first[0], slow)  # type: ignore[arg-type]
    assert slow.begun.wait(30)
    for tokens, state in made:
        cache.put(tokens, state)
    assert cache.unsaved == 3 and len(cache) == MOST_QUEUED + 4
    slow.go.set()
    cache.flush()
    assert all(cache.find([*tokens, 5]) is not None for tokens, _ in made)
    later = cache_of(model, folder=tmp_path)
    assert [later.find([*tokens, 5]) is not None for tokens, _ in [first, *made]] == [True] + [False] * 3 + [True] * MOST_QUEUED


def test_dropped_before_its_turn(model: LanguageModel, tmp_path: Path) -> None:
    """A state that memory has no room for before the disk had time for it is gone, and counted."""
    first, second, third = states(model, [20, 20, 20])
    slow, cache = Slow(first[1]), cache_of(model, folder=tmp_path, most_bytes=first[1].nbytes)
    cache.put(first[0], slow)  # type: ignore[arg-type]
    assert slow.begun.wait(30)
    cache.put(*second)
    cache.put(*third)
    assert cache.find([*second[0], 5]) is None and cache.unsaved == 1 and len(cache) == 2
    slow.go.set()
    cache.flush()
    assert len(list(tmp_path.glob("*.json"))) == 2 and cache.unsaved == 1


@pytest.mark.parametrize("error", [Zamba2Error("the disk is full."), OSError(28, "No space left on device"), RuntimeError("no device")])
def test_a_disk_that_refuses(model: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    """While states cannot be written they are kept in memory; that is said once, and again only after the disk took one."""

    class Refused(Slow):
        def save(self, path: Path, *, note: str = "") -> None:
            path.write_bytes(b"half of it")
            raise error

    made = states(model, [20, 30, 40, 50, 60])
    cache = cache_of(model, folder=tmp_path)
    for number, (tokens, state) in enumerate(made):
        cache.put(tokens, state if number == 3 else Refused(state))  # type: ignore[arg-type]
        cache.flush()
        assert cache.disk_nbytes == on_disk(tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert lines == 2 * [f"zamba2: a conversation's state cannot be saved ({error}); it and others like it are kept in memory alone."]
    assert cache.unsaved == 4 and all(cache.find([*tokens, 5]) is not None for tokens, _ in made)
    assert len(cache_of(model, folder=tmp_path)) == 1


def test_no_thread_to_write(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the system gives no thread, states are kept in memory, which is said; the next one is written when there is one again."""
    first, second = states(model, [20, 30])
    cache = cache_of(model, folder=tmp_path)

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        cache.put(*first)
        cache.flush()
    assert cache.unsaved == 1 and "cannot be saved (can't start new thread)" in capsys.readouterr().err
    cache.put(*second)
    cache.flush()
    assert len(cache) == 2 and len(list(tmp_path.glob("*.state"))) == 1


class Reading:
    """A cache on a folder that holds one state, whose reading begins and then waits to be let go on."""

    def __init__(self, model: LanguageModel, folder: Path) -> None:
        ((self.tokens, state),) = states(model, [70])
        first = cache_of(model, folder=folder)
        first.put(self.tokens, state)
        first.flush()
        self.begun, self.go = threading.Event(), threading.Event()

        def new_state(adapter: str | None) -> Any:
            made = model.backend.new_state()
            load = made.load

            def slow(path: Path) -> str:
                self.begun.set()
                assert self.go.wait(30)
                return load(path)

            made.load = slow  # type: ignore[method-assign]
            return made

        self.cache = StateCache(new_state, folder=folder)


def test_reading_keeps_nobody_waiting(model: LanguageModel, tmp_path: Path, aside: Any) -> None:
    """While a state is read from disk others are put and found; whoever wants the same one gets it, and it counts once."""
    reading, (other,) = Reading(model, tmp_path), states(model, [30], seed=4)
    both = [aside(reading.cache.find, [*reading.tokens, 5]) for _ in range(2)]
    assert reading.begun.wait(30)
    aside(reading.cache.put, *other).result(30)
    assert aside(reading.cache.find, [*other[0], 5]).result(30) is not None
    reading.go.set()
    found = [one.result(30) for one in both]
    assert [one.position for one in found] == [70, 70] and reading.cache.nbytes == recounted(reading.cache)


@pytest.mark.parametrize("how", ["forgotten", "put again"])
def test_forgotten_while_it_is_read(model: LanguageModel, tmp_path: Path, aside: Any, capsys: pytest.CaptureFixture[str], how: str) -> None:
    """An entry that is forgotten while it is read, its file with it, is absent without a word; put again meanwhile, it is found."""
    reading = Reading(model, tmp_path)
    finding = aside(reading.cache.find, [*reading.tokens, 5])
    assert reading.begun.wait(30)
    reading.cache.clear()
    if how == "put again":
        reading.cache.put(reading.tokens, states(model, [70])[0][1])
    reading.go.set()
    assert (finding.result(30) is not None) == (how == "put again")
    assert capsys.readouterr().err == "" and reading.cache.nbytes == recounted(reading.cache)
    reading.cache.flush()


def test_put_again_while_its_file_turns_out_bad(model: LanguageModel, tmp_path: Path, aside: Any) -> None:
    """A state that is put again while its damaged file is read is found, and written again."""
    reading, (_, state) = Reading(model, tmp_path), states(model, [70])[0]
    next(tmp_path.glob("*.state")).write_bytes(b"")
    finding = aside(reading.cache.find, [*reading.tokens, 5])
    assert reading.begun.wait(30)
    reading.cache.put(reading.tokens, state)
    reading.go.set()
    assert finding.result(30) is not None
    reading.cache.flush()
    assert cache_of(model, folder=tmp_path).find([*reading.tokens, 5]) is not None


def test_a_folder_that_is_removed(model: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the folder is removed, what is in memory alone is lost to later processes only; what was on disk is absent; new states are
    written into it again."""
    import shutil

    folder = tmp_path / "states"
    made = states(model, [20, 30, 40])
    cache = cache_of(model, folder=folder, most_bytes=made[2][1].nbytes)
    for tokens, state in made[:2]:
        cache.put(tokens, state)
        cache.flush()
    shutil.rmtree(folder)
    assert cache.find([*made[1][0], 5]) is not None
    assert cache.find([*made[0][0], 5]) is None and "cannot be used and is dropped" in capsys.readouterr().err
    cache.put(*made[2])
    cache.flush()
    assert len(cache_of(model, folder=folder)) == 1


def test_sizes_are_remembered(model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Putting and finding what is in memory asks nothing of the disk."""
    made = states(model, [20, 30])
    cache = cache_of(model, folder=tmp_path)
    cache.put(*made[0])
    cache.flush()
    asked: list[Any] = []
    monkeypatch.setattr(cache, "_work", lambda: None)
    for name in ("stat", "exists", "unlink", "open"):
        monkeypatch.setattr(Path, name, lambda *arguments, **named: asked.append(arguments))
    cache.put(*made[1])
    assert all(cache.find([*tokens, 5]) is not None for tokens, _ in made) and not asked


def test_a_cache_without_a_folder_has_no_thread(model: LanguageModel) -> None:
    """Without a folder nothing is queued, and waiting for the disk is no wait."""
    cache = cache_of(model)
    cache.put(*states(model, [20])[0])
    cache.flush()
    assert cache._writer is None and not cache._queue and cache.unsaved == 0
