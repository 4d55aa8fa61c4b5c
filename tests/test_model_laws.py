"""The laws of the PyTorch model and its backend: properties over random models, each also beyond 256 tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, find, given, settings
from hypothesis import strategies as st
from op_cases import DIFFERENCE_QUOTIENT, MODEL, logits_error, relative_error
from strategies import LONG, MINIATURES, Reading, configs, random_model, random_tokens, readings
from torch import Tensor, nn

from zamba2.config import Config
from zamba2.errors import Zamba2Error
from zamba2.model.model import Attention, Linear, Zamba2
from zamba2.runtime.backend import Backend, Row
from zamba2.runtime.torch import TorchBackend, TorchState

FP32 = torch.float32
reuses_folder = settings(suppress_health_check=[*settings().suppress_health_check, HealthCheck.function_scoped_fixture])


def law(*long: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test on random readings and on the long ones named (all of them by default)."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        for name in long or tuple(LONG):
            test = example(reading=LONG[name])(test)
        return given(reading=readings())(test)

    return decorate


def close(found: Tensor, expected: Tensor, what: str = "logits") -> None:
    error, bound = logits_error(found, expected), MODEL[found.dtype].output
    assert error <= bound, f"{what}: {error:.2e} of the largest logit, at most {bound:.0e} is allowed"


# ---- the strategies themselves --------------------------------------------------------------------------------------------


@given(config=configs())
def test_strategy_gives_valid_configs(config: Config) -> None:
    """Every drawn config survives its own config.json and counts its model's parameters."""
    assert Config.from_dict(config.to_dict()) == config
    with torch.device("meta"):
        assert sum(p.numel() for p in Zamba2(config).parameters()) == config.num_parameters


SWITCHES: dict[str, Callable[[Config], bool]] = {
    "two blocks": lambda c: c.num_mem_blocks == 2,
    "attention adapters": lambda c: c.use_shared_attention_adapter,
    "rope": lambda c: c.use_mem_rope,
    "two groups": lambda c: c.mamba_ngroups == 2,
}


@pytest.mark.parametrize("values", list(itertools.product([False, True], repeat=len(SWITCHES))), ids=str)
def test_strategy_reaches_every_combination(values: tuple[bool, ...]) -> None:
    """Each combination of the published sizes' switches can be drawn."""
    wanted = dict(zip(SWITCHES, values, strict=True))
    quick = settings(max_examples=2000, database=None, derandomize=True)
    find(configs(), lambda c: all(SWITCHES[name](c) == value for name, value in wanted.items()), settings=quick)


@pytest.mark.parametrize(
    "wanted", [lambda c: c.num_key_value_heads < c.num_attention_heads, lambda c: c.use_long_context, lambda c: not c.tie_word_embeddings]
)
def test_strategy_reaches_the_rest(wanted: Callable[[Config], bool]) -> None:
    """Grouped keys and values, the long context and an untied head can be drawn."""
    find(configs(), wanted, settings=settings(max_examples=2000, database=None, derandomize=True))


# ---- the model ------------------------------------------------------------------------------------------------------------


@law()
@torch.no_grad()
def test_split_is_whole(reading: Reading) -> None:
    """forward(a + b) = forward(a); forward(b), wherever the cuts are and with no state at all."""
    model, tokens = reading.model(), reading.tokens(rows=2)
    whole = model(tokens)
    for cuts in ([reading.at], sorted({1, reading.at, reading.length // 2 or 1, max(1, reading.length - 2)})):
        state = model.new_state()
        parts = [model(part, state=state) for part in torch.tensor_split(tokens, cuts, dim=1) if part.shape[1]]
        close(torch.cat(parts, dim=1), whole)
        assert state.position == reading.length


@law("1.2b", "7b")
@torch.no_grad()
def test_decoding_is_prefill(reading: Reading) -> None:
    """T calls of one token give what one call of T tokens gives."""
    model, tokens = reading.model(), reading.tokens()
    state = model.new_state()
    steps = [model(tokens[:, t : t + 1], state=state) for t in range(reading.length)]
    close(torch.cat(steps, dim=1), model(tokens))


@law()
@torch.no_grad()
def test_fast_ops_are_the_reference(reading: Reading) -> None:
    """The model on the fast ops is the model on the reference ops."""
    tokens = reading.tokens(rows=2)
    close(reading.model()(tokens), reading.model(ops="reference")(tokens))


@law()
@torch.no_grad()
def test_row_is_alone(reading: Reading) -> None:
    """A row of a batch is the same row alone, in prefill and in decoding after it."""
    model, tokens = reading.model(), reading.tokens(rows=3)
    together, alone = model.new_state(), model.new_state()
    for part in (tokens[:, : reading.at], tokens[:, reading.at : reading.at + 1]):
        close(model(part[1:2], state=alone), model(part, state=together)[1:2])


@law()
@torch.no_grad()
def test_selected_rows_continue(reading: Reading) -> None:
    """``select`` gives the states of the rows named, repeats too, padding included."""
    model, tokens = reading.model(), reading.tokens(rows=3)
    mask = torch.ones_like(tokens)
    mask[2, : reading.at - 1] = 0
    rows = torch.tensor([2, 0, 2])
    first, second = (model.new_state() for _ in range(2))
    model(tokens[:, : reading.at], state=first, attention_mask=mask[:, : reading.at])
    model(tokens[rows][:, : reading.at], state=second, attention_mask=mask[rows][:, : reading.at])
    rest = tokens[rows][:, reading.at :]
    close(model(rest, state=first.select(rows)), model(rest, state=second))


@law()
@torch.no_grad()
def test_left_padding_changes_nothing(reading: Reading) -> None:
    """A padded row gives the logits of the row alone: without a state, with one, and in what is read afterwards."""
    model, real = reading.model(), reading.tokens(rows=2)
    padding = reading.at
    short = real[1:, padding:]
    tokens = real.clone()
    mask = torch.ones_like(tokens)
    mask[1, :padding] = 0
    tokens[1, :padding] = 0
    for state in (None, model.new_state()):
        logits = model(tokens, state=state, attention_mask=mask)
        close(logits[:1], model(real[:1]), "row without padding")
        close(logits[1:, padding:], model(short), "padded row")
    more = random_tokens(reading.config, reading.seed + 1, 2, 5)
    found = [model(part, state=state) for part in more.split([1, 3, 1], dim=1)]  # one token, several, one
    expected = [model(torch.cat([real[:1], more[:1]], dim=1))[:, -5:], model(torch.cat([short, more[1:]], dim=1))[:, -5:]]
    close(torch.cat(found, dim=1), torch.cat(expected), "after the prompt")


@law("7b")
@torch.no_grad()
def test_right_padding_is_ignored(reading: Reading) -> None:
    """Zeros at the right end of the mask change nothing, nor does a mask of ones."""
    model, tokens = reading.model(), reading.tokens(rows=2)
    mask = torch.ones_like(tokens)
    assert torch.equal(model(tokens, attention_mask=mask), model(tokens))
    mask[0, reading.at :] = 0
    assert torch.equal(model(tokens, attention_mask=mask), model(tokens))


def gradients(model: Zamba2, loss: Tensor) -> dict[str, Tensor]:
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Each parameter's gradient by norm; what is nothing beside the largest counts as nothing."""
    silence = 1e-6 * max(float(g.norm()) for g in expected.values())
    for name, gradient in expected.items():
        if gradient.norm() > silence or found[name].norm() > silence:
            error, bound = relative_error(found[name], gradient), MODEL[gradient.dtype].gradient
            assert error <= bound, f"gradient of {name}: relative error {error:.2e}, at most {bound:.0e} is allowed"


def packed_documents(length: int, cut: float) -> list[int]:
    """Lengths of the documents of a packed row: one token, the part before the cut, the rest."""
    first = min(length - 2, 1 + int(cut * (length - 2))) if length > 2 else 0
    return [n for n in (1, first, length - 1 - first) if n > 0]


@law()
def test_packed_is_separate(reading: Reading) -> None:
    """Documents packed in a row (numbers may have gaps) give the logits and gradients of each read alone."""
    model, tokens = reading.model().requires_grad_(True), reading.tokens(rows=2)
    lengths = [packed_documents(reading.length, reading.cut), packed_documents(reading.length, 0.3)]
    seq_idx = torch.stack([torch.arange(1, 1 + 2 * len(n), 2).repeat_interleave(torch.tensor(n)) for n in lengths])
    packed = model(tokens, seq_idx=seq_idx)
    separate = torch.stack(
        [torch.cat([model(part[None])[0] for part in row.split(n)]) for row, n in zip(tokens, lengths, strict=True)]
    )
    close(packed, separate)
    direction = torch.randn(packed.shape, generator=torch.Generator().manual_seed(reading.seed)).to(packed.dtype)
    same_gradients(gradients(model, (packed * direction).sum()), gradients(model, (separate * direction).sum()))


@law()
@torch.no_grad()
def test_padding_before_packed_documents(reading: Reading) -> None:
    """Left padding under the first document's number changes nothing either."""
    model, tokens = reading.model(), reading.tokens(rows=2)
    padding = torch.zeros(2, 3, dtype=torch.long)
    seq_idx = (torch.arange(reading.length) >= reading.at).long().expand(2, -1)
    mask = torch.cat([padding, torch.ones_like(tokens)], dim=1)
    mask[0, 2] = 0
    found = model(torch.cat([padding, tokens], 1), seq_idx=torch.cat([padding, seq_idx], 1), attention_mask=mask)
    close(found[:, 3:], model(tokens, seq_idx=seq_idx))


@law()
@torch.no_grad()
def test_keep_is_having_read_less(reading: Reading) -> None:
    """After a recorded call, keep(n) leaves what reading its first n tokens leaves, once; a padded prompt and n = 0 too."""
    model, tokens = reading.model(), reading.tokens(rows=2)
    mask = torch.ones_like(tokens)
    mask[0, : reading.length // 3] = 0
    more = random_tokens(reading.config, reading.seed + 1, 2, 3)
    at, half = reading.at, reading.at // 2
    for before, n in ((0, at), (at, 0), (half, at - half), (at, reading.length - at)):
        recorded, expected = model.new_state(), model.new_state()
        for state, read in ((recorded, reading.length), (expected, before + n)):
            if before:
                model(tokens[:, :before], state=state, attention_mask=mask[:, :before] if mask[0, :before].any() else None)
            if read > before:
                padded = mask[:, before:] if not before else None
                model(tokens[:, before:read], state=state, attention_mask=padded, record=state is recorded)
        kept = recorded.copy()
        model.keep(recorded, n)
        assert recorded.position == expected.position == before + n
        with pytest.raises(ValueError, match="nothing was recorded"):
            model.keep(recorded, n)
        close(model(more, state=recorded), model(more, state=expected), f"after keep({n}) of {reading.length - before}")
        close(model(more, state=kept), model(more, state=read_all(model, tokens, mask, before)), "a copy taken before keep")


def read_all(model: Zamba2, tokens: Tensor, mask: Tensor, before: int) -> Any:
    """The state after all tokens, read as in the law above."""
    state = model.new_state()
    if before:
        model(tokens[:, :before], state=state, attention_mask=mask[:, :before] if mask[0, :before].any() else None)
    model(tokens[:, before:], state=state, attention_mask=None if before else mask)
    return state


@law()
@torch.no_grad()
def test_split_for_inference_changes_nothing(reading: Reading) -> None:
    """Keeping q, k and v as two halves is the same model; doing it twice is doing it once."""
    model, tokens = reading.model(), reading.tokens(rows=2)
    expected = model(tokens)
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    for attention in [*attentions, *attentions]:
        attention.split_for_inference()
    close(model(tokens), expected)
    assert all(attention.split is not None for attention in attentions)


class Wrapped(nn.Module):
    """A projection in another module, as peft wraps it, with a low-rank addition."""

    def __init__(self, inner: nn.Module, addition: Tensor) -> None:
        super().__init__()
        self.inner, self.weight, self.addition = inner, inner.weight, addition

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + nn.functional.linear(x, self.addition)


@law()
@torch.no_grad()
def test_hoisting_changes_nothing(reading: Reading) -> None:
    """The hoisted product is the module's; and what a wrapper adds to q, k or v is never bypassed."""
    tokens = reading.tokens(rows=2)
    for scale, letter in ((0.0, "q"), (0.3, "q"), (0.3, "k"), (0.3, "v")):
        merged, wrapped = reading.model(), reading.model()
        for plain, other in zip(merged.shared_blocks, wrapped.shared_blocks, strict=True):
            projection = getattr(plain.self_attn, f"{letter}_proj")
            shape = projection.weight.shape
            addition = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(reading.dtype) * scale * shape[1] ** -0.5
            projection.weight += addition
            setattr(other.self_attn, f"{letter}_proj", Wrapped(getattr(other.self_attn, f"{letter}_proj"), addition))
            assert not other.self_attn.halves()
            assert plain.self_attn.halves()
        close(wrapped(tokens), merged(tokens))


@law("2.7b")
@torch.no_grad()
def test_embeddings_in_place_of_ids(reading: Reading) -> None:
    """inputs_embeds of the tokens is input_ids; logits_to_keep gives the trailing positions of all logits."""
    model, tokens = reading.model(), reading.tokens(rows=2)
    expected = model(tokens)
    assert torch.equal(model(inputs_embeds=model.embed_tokens(tokens)), expected)
    for wanted in (0, 1, reading.at):
        close(model(tokens, logits_to_keep=wanted), expected[:, reading.length - wanted :])


@pytest.mark.parametrize(("name", "length", "chunk"), [("1.2b", 20, 7), ("2.7b", 20, 256), ("7b", 23, 5), ("7b-long", 300, 64)])
def test_gradients_are_differences(name: str, length: int, chunk: int) -> None:
    """In fp64 the gradient of each parameter, along a random direction, is the central difference quotient."""
    config = replace(MINIATURES[name], chunk_size=chunk)
    model = random_model(config, 3, dtype=torch.float64).requires_grad_(True)
    tokens = random_tokens(config, 3, 1, length)
    weights = torch.randn(1, length, config.vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def loss() -> Tensor:
        return (torch.log_softmax(model(tokens), dim=-1) * weights).mean()

    exact = gradients(model, loss())
    largest = max(float(g.norm()) for g in exact.values())
    for parameter_name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
        direction, step = direction / direction.norm(), 1e-6
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter += sign * step * direction
                values.append(float(loss()))
                parameter -= sign * step * direction
        difference, slope = (values[0] - values[1]) / (2 * step), float((exact[parameter_name] * direction).sum())
        assert exact[parameter_name].norm() > 0, f"{parameter_name} has no gradient"
        bound = DIFFERENCE_QUOTIENT * max(abs(slope), 1e-3 * largest)
        assert abs(difference - slope) <= bound, f"{parameter_name}: {slope} against {difference}"


@law("1.2b", "7b-long")
@torch.no_grad()
def test_double_is_single(reading: Reading) -> None:
    """model.double() computes the same function, more exactly: its own split law holds to fp64 precision."""
    model, tokens = reading.model(dtype=torch.float64), reading.tokens()
    whole, state = model(tokens), model.new_state()
    close(torch.cat([model(part, state=state) for part in tokens.tensor_split([reading.at], dim=1)], dim=1), whole)
    if reading.dtype == FP32:
        close(reading.model()(tokens), whole.float())


def test_refuses_what_does_not_fit() -> None:
    """Arguments that cannot be meant raise ValueError and leave the state alone."""
    model = random_model(MINIATURES["2.7b"], 0)
    tokens, state = random_tokens(model.config, 0, 1, 4), model.new_state()
    for message, arguments in {
        "either input_ids or inputs_embeds": {"input_ids": tokens, "inputs_embeds": model.embed_tokens(tokens)},
        "no tokens": {"input_ids": tokens[:, :0]},
        "seq_idx cannot be used": {"input_ids": tokens, "state": state, "seq_idx": torch.zeros_like(tokens)},
        "record needs a state": {"input_ids": tokens, "record": True},
        "without any token": {"input_ids": tokens, "attention_mask": torch.zeros_like(tokens), "state": state},
        "zeros between ones": {"input_ids": tokens, "attention_mask": torch.tensor([[1, 0, 1, 1]]), "state": state},
    }.items():
        with pytest.raises(ValueError, match=message):
            model(**arguments)
    assert state.position == 0
    assert state.padding is None
    model(tokens, state=state)
    with pytest.raises(ValueError, match="first call"):
        model(tokens, state=state, attention_mask=torch.ones_like(tokens))
    with pytest.raises(ValueError, match="nothing was recorded"):
        model.keep(state, 1)
    model(tokens, state=state, record=True)
    with pytest.raises(ValueError, match="more than were recorded"):
        model.keep(state, 5)


# ---- the backend ----------------------------------------------------------------------------------------------------------


def backend_of(reading: Reading) -> TorchBackend:
    return TorchBackend(reading.model())


def read(backend: TorchBackend, state: TorchState, tokens: Tensor, *, logits: int = 1, record: bool = False) -> np.ndarray:
    """One row of one call; tokens: (T,)."""
    (result,) = backend.forward([Row(tokens.numpy().astype(np.int32), state, logits, record)])
    return result.numpy()


def near(found: np.ndarray, expected: Tensor) -> None:
    close(torch.from_numpy(np.array(found)), expected.float())


@law()
def test_backend_is_the_model(reading: Reading) -> None:
    """Logits of as many trailing positions as wanted are the model's; none wanted reads all the same."""
    backend, tokens = backend_of(reading), reading.tokens()[0]
    with torch.no_grad():
        expected = reading.model()(tokens[None])[0]
    for wanted in {0, 1, reading.at, reading.length}:
        state = backend.new_state()
        found = read(backend, state, tokens, logits=wanted)
        assert found.shape == (wanted, reading.config.vocab_size)
        assert found.dtype == np.float32
        near(found, expected[reading.length - wanted :])
        assert state.position == reading.length
        assert state.nbytes > 0
    assert isinstance(backend, Backend)


@law()
def test_backend_row_is_alone(reading: Reading) -> None:
    """Rows of any lengths share a call, and each row's logits and state are, bit for bit, those of the row alone."""
    backend, tokens = backend_of(reading), reading.tokens(rows=3)
    cuts = [reading.length, 1, reading.at]
    together, alone = ([backend.new_state() for _ in cuts] for _ in range(2))
    for _ in range(2):
        rows = [
            Row(row[:cut].numpy().astype(np.int32), state, min(2, cut)) for row, cut, state in zip(tokens, cuts, together, strict=True)
        ]
        shared = [logits.numpy() for logits in backend.forward(rows)]
        for row, cut, state, found in zip(tokens, cuts, alone, shared, strict=True):
            assert np.array_equal(found, read(backend, state, row[:cut], logits=min(2, cut)))


@pytest.mark.parametrize("name", LONG)
def test_backend_chunks_lie_at_fixed_places(name: str) -> None:
    """Cutting a long prompt at multiples of the backend's chunk changes no bit, behind any first cut, which stays in bounds."""
    backend = backend_of(LONG[name])
    chunk = backend.chunk
    tokens = random_tokens(backend.config, 1, 2 * chunk + 40)
    with torch.no_grad():
        expected = LONG[name].model()(tokens[None], logits_to_keep=1)[0]
    for first in ([], [100]):
        found = []
        for more in ([], [chunk], [2 * chunk], [chunk, 2 * chunk]):
            state = backend.new_state()
            *parts, last = tokens.tensor_split(first + more)
            for part in parts:
                read(backend, state, part, logits=0)
            found.append(read(backend, state, last))
            near(found[-1], expected)
        assert all(np.array_equal(found[0], other) for other in found[1:])


@law()
def test_copy_isolates(reading: Reading) -> None:
    """A state and its copies go on, in any order, exactly as states that were never copied do."""
    backend, tokens = backend_of(reading), reading.tokens()[0]
    branches = [random_tokens(reading.config, reading.seed + i, 3) for i in range(3)]

    def fresh() -> TorchState:
        state = backend.new_state()
        read(backend, state, tokens, logits=0)
        return state

    expected = []
    for branch in branches:
        state = fresh()
        expected.append([read(backend, state, token[None]) for token in branch])
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        state = fresh()
        copy = state.copy()
        states = [state, copy, copy.copy()]  # a copy of a copy
        found: list[list[np.ndarray]] = [[], [], []]
        for step in range(3):
            for i in order:
                found[i].append(read(backend, states[i], branches[i][step : step + 1]))
        for i in order:
            assert all(np.array_equal(a, b) for a, b in zip(found[i], expected[i], strict=True))
            assert states[i].position == reading.length + 3


@given(seed=st.integers(0, 1 << 16), config=configs(), data=st.data())
def test_any_program_of_states(seed: int, config: Config, data: st.DataObject) -> None:
    """Reading, recording, keeping, copying, dropping, saving and loading in any order: logits depend on the history alone."""
    model = random_model(config, seed, dtype=torch.float64)
    backend = TorchBackend(random_model(config, seed, dtype=torch.float64))
    states: list[tuple[TorchState, list[int], int]] = [(backend.new_state(), [], 0)]  # with history and recorded tokens
    for _ in range(data.draw(st.integers(4, 12), "steps")):
        i = data.draw(st.integers(0, len(states) - 1), "state")
        state, history, recorded = states[i]
        action = data.draw(st.sampled_from(["read", "read", "record", "record", "keep", "copy", "drop"]), "action")
        if action in ("read", "record"):
            new = data.draw(st.lists(st.integers(0, config.vocab_size - 1), min_size=1, max_size=9), "tokens")
            if data.draw(st.integers(0, 9), "long") == 0:
                new = new * 40  # past the smallest buffer of keys and values
            history = history + new
            found = read(backend, state, torch.tensor(new), logits=len(new), record=action == "record")
            with torch.no_grad():
                near(found, model(torch.tensor([history]))[0, -len(new) :])
            states[i] = (state, history, len(new) if action == "record" else 0)
        elif action == "keep" and recorded:
            n = data.draw(st.integers(0, recorded), "n")
            state.keep(n)
            states[i] = (state, history[: len(history) - recorded + n], 0)
        elif action == "copy":
            states.append((state.copy(), history, 0))
        elif action == "drop" and len(states) > 1:
            del states[i]
        assert [s.position for s, _, _ in states] == [len(h) for _, h, _ in states]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@reuses_folder
@law()
def test_saved_state_continues(dtype: str, tmp_path: Path, reading: Reading) -> None:
    """save -> load in another process's backend -> the same continuation bit for bit; the note comes back."""
    one, other = (TorchBackend(reading.model(dtype=getattr(torch, dtype))) for _ in range(2))
    tokens, state = reading.tokens()[0], one.new_state()
    for part in (tokens[: reading.at], tokens[reading.at :]):
        state.save(tmp_path / "state")
        loaded = other.new_state()
        loaded.load(tmp_path / "state")
        assert loaded.position == state.position
        assert np.array_equal(read(other, loaded, part), read(one, state, part))
    assert list(tmp_path.iterdir()) == [tmp_path / "state"]


def test_empty_state_is_saved(tmp_path: Path) -> None:
    """A state without tokens, fresh or taken back to nothing, is saved and continues."""
    backend = backend_of(LONG["2.7b"])
    tokens = LONG["2.7b"].tokens()[0]
    expected = read(backend, backend.new_state(), tokens)
    for taken_back in (False, True):
        state = backend.new_state()
        if taken_back:
            read(backend, state, tokens[:5], record=True)
            state.keep(0)
        state.save(tmp_path / "state")
        loaded = backend.new_state()
        loaded.load(tmp_path / "state")
        assert loaded.position == 0
        assert np.array_equal(read(backend, loaded, tokens), expected)


def test_foreign_state_is_refused(tmp_path: Path) -> None:
    """The state of another model, a cut file and other files are refused in one sentence, and the state stays as it was."""
    backend, other = backend_of(LONG["2.7b"]), backend_of(replace(LONG["2.7b"], seed=8))
    tokens = LONG["2.7b"].tokens()[0]
    foreign, state = other.new_state(), backend.new_state()
    read(other, foreign, tokens)
    read(backend, state, tokens[:9])
    foreign.save(tmp_path / "foreign")
    state.save(tmp_path / "own")
    whole = (tmp_path / "own").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-100])
    (tmp_path / "text").write_text("not a state at all")
    (tmp_path / "later").write_bytes(whole.replace(b'\\"version\\": 1', b'\\"version\\": 2'))
    (tmp_path / "moved").write_bytes(whole.replace(b'\\"position\\": 9', b'\\"position\\": 8'))
    (tmp_path / "nan").write_bytes(whole[:-4] + np.float32("nan").tobytes())
    for name, words in {
        "missing": "does not exist", "foreign": "another model", "cut": "complete safetensors", "text": "safetensors",
        "later": "version 2", "moved": "is needed", "nan": "not finite",
    }.items():  # fmt: skip
        with pytest.raises(Zamba2Error, match=words) as caught:
            state.load(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert state.position == 9
    twin = backend.new_state()
    read(backend, twin, tokens[:9])
    assert np.array_equal(read(backend, state, tokens), read(backend, twin, tokens))


@pytest.mark.parametrize("where", ["causal_conv", "ssd_scan", "geglu", "rms_norm"])
@law("1.2b", "7b")
def test_interruption_changes_nothing(where: str, reading: Reading) -> None:
    """An exception anywhere in a call leaves every state of the call as it was, of rows already read too, and usable."""
    backend, tokens = backend_of(reading), reading.tokens()[0]
    states, twins = ([backend.new_state() for _ in range(2)] for _ in range(2))
    for state in (*states, *twins):
        read(backend, state, tokens[: reading.at], logits=0)
    ops, calls = backend.model.ops, 0
    rows = [Row(tokens[reading.at :].numpy().astype(np.int32), state) for state in states]
    usual = ops.__dict__ | {}

    def counting(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls -= 1
        if not calls:
            raise KeyboardInterrupt
        return usual[where](*arguments, **named)

    backend.model.ops = SimpleNamespace(**(usual | {where: counting}))
    layers = {"geglu": len(reading.config.hybrid_layer_ids)}.get(where, reading.config.num_hidden_layers)
    for last in {1, layers, 2 * layers}:  # the first row, its end, the second row
        calls = last
        with pytest.raises(KeyboardInterrupt):
            backend.forward(rows)
        assert [state.position for state in states] == [reading.at] * 2
    calls = 0
    for state, twin in zip(states, twins, strict=True):
        assert np.array_equal(read(backend, state, tokens[reading.at :]), read(backend, twin, tokens[reading.at :]))


def test_backend_refuses_what_does_not_fit() -> None:
    """Tokens out of range, no tokens, foreign and repeated states are refused before anything is read."""
    backend, other = backend_of(LONG["2.7b"]), backend_of(LONG["2.7b"])
    state, good = backend.new_state(), np.array([1, 2, 3], np.int32)
    size = backend.config.vocab_size
    above, below = np.array([0, size]), np.array([-1, 0])
    for tokens, words in ((above, f"token id {size}"), (below, "token id -1"), (good[:0], "no tokens"), (good[None], "no tokens")):
        with pytest.raises(Zamba2Error, match=words):
            backend.forward([Row(good, backend.new_state()), Row(tokens, state)])
    for rows in ([Row(good, state), Row(good, state)], [Row(good, other.new_state())], [Row(good, state, 4)], [Row(good, state, -1)]):
        with pytest.raises(ValueError, match=r"once|another backend|positions"):
            backend.forward(rows)
    with pytest.raises(Zamba2Error, match="adapter"):
        backend.new_state(adapter="none")
    assert state.position == 0
    assert backend.forward([]) == []


def test_any_integer_tokens() -> None:
    """Tokens may be of any integer type, read-only or strided; the caller's array is never written."""
    backend = backend_of(LONG["2.7b"])
    ids = np.arange(20) % backend.config.vocab_size
    expected = read(backend, backend.new_state(), torch.from_numpy(ids))
    frozen = ids.astype(np.int64)
    frozen.setflags(write=False)
    for tokens in (ids.astype(np.uint8), ids.astype(np.uint64), frozen, np.repeat(ids.astype(np.int32), 2)[::2]):
        (found,) = backend.forward([Row(tokens, backend.new_state())])
        assert np.array_equal(found.numpy(), expected)


def test_broken_weights_are_named() -> None:
    """A weight that is not finite is found by name when it reaches the logits, and the state stays empty."""
    model = random_model(MINIATURES["1.2b"], 0)
    with torch.no_grad():
        model.layers[2].mamba.out_proj.weight[0, 0] = torch.nan
    backend = TorchBackend(model)
    state = backend.new_state()
    with pytest.raises(Zamba2Error, match=r"layers\.2\.mamba\.out_proj\.weight"):
        read(backend, state, torch.tensor([1, 2]))
    assert state.position == 0


@torch.inference_mode()
def test_one_token_takes_the_vector_product() -> None:
    """The matrix-vector kernel of a single token is F.linear, with any leading shape."""
    layer = Linear(7, 5)
    nn.init.normal_(layer.weight)
    for shape in ((7,), (1, 7), (1, 1, 7), (2, 1, 7)):
        x = torch.randn(shape)
        assert relative_error(layer(x), nn.functional.linear(x, layer.weight)) < MODEL[FP32].output
        assert layer(x).shape == (*shape[:-1], 5)


@pytest.mark.parametrize("shape", [(), (3,), (1, 0)])
def test_tokens_without_rows_are_refused(shape: tuple[int, ...]) -> None:
    """Ids that are not rows of at least one token are a ValueError that says so."""
    model = random_model(MINIATURES["2.7b"], 3)
    with pytest.raises(ValueError, match="tokens"):
        model(torch.zeros(shape, dtype=torch.int64))
