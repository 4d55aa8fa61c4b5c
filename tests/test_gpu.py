"""The GPU path behind the waist: decoding in slots, packed weights, and the model's laws on them.

On a machine with a GPU the kernels run there, as CUDA graphs; elsewhere in Triton's interpreter on the CPU, on models in little.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton_interpreter  # noqa: F401
from op_cases import MODEL, logits_error
from strategies import MINIATURES, fill, random_model, random_tokens
from torch import Tensor

pytest.importorskip("triton")

from zamba2 import errors
from zamba2.config import Config
from zamba2.errors import Zamba2Error
from zamba2.language.model import LanguageModel
from zamba2.language.tokenizer import Tokenizer
from zamba2.model import ops
from zamba2.model.model import Zamba2
from zamba2.model.ops import triton_linear
from zamba2.runtime import decoder as decoder_module
from zamba2.runtime import torch as torch_runtime
from zamba2.runtime.backend import Row
from zamba2.runtime.graphs import captured
from zamba2.runtime.torch import TorchBackend, TorchState, check_room, device_of
from zamba2.train.graph import GraphedStep
from zamba2.train.instructions import tasks
from zamba2.weights.checkpoint import FP32_PARTS, load_packed, packed_model
from zamba2.weights.formats import unpack
from zamba2.weights.hub import DEMO
from zamba2.weights.packed import Packing, Part, open_packed
from zamba2.weights.synthetic import write_synthetic

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)
# Models so little magnify roundings: in bf16 the model itself is off by up to 7 % of the largest logit, the decoder by up to 6.
LOGITS = {torch.float32: MODEL[torch.float32].output, torch.bfloat16: 8e-2}
# A decoded token of a miniature takes seconds in the interpreter: the rest runs with -m slow.
interpreted_slowly = [] if DEVICE == "cuda" else [pytest.mark.slow]
slowly = pytest.mark.parametrize("_", [pytest.param(None, marks=interpreted_slowly, id="all")])
named = pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "7b" else interpreted_slowly) for name in MINIATURES])


# For what many calls are made of: one layer of each kind.
SHAPES = MINIATURES | {"little": replace(MINIATURES["7b"], num_hidden_layers=2, hybrid_layer_ids=(1,), num_mem_blocks=1)}


def model_of(name: str, dtype: torch.dtype) -> Zamba2:
    """As a checkpoint is loaded: small weights that need it stay fp32."""
    model = random_model(SHAPES[name], 3, ops="auto")
    for parameter, weight in model.named_parameters():
        weight.data = weight.data.to(torch.float32 if parameter.endswith(FP32_PARTS) else dtype)
    return model


def backend_of(name: str, dtype: torch.dtype = torch.float32) -> TorchBackend:
    return TorchBackend(model_of(name, dtype).to(DEVICE), decode=True)


def truth(name: str, dtype: torch.dtype, tokens: Tensor) -> Tensor:
    """Logits (T, V) of the reference in fp64 on the rounded weights."""
    with torch.no_grad():
        found: Tensor = model_of(name, dtype).double()(tokens[None])[0]
    return found


def read(backend: TorchBackend, state: TorchState, tokens: Tensor, *, logits: int = 1) -> Tensor:
    """One row of one call. tokens: (T,)."""
    (found,) = backend.forward([Row(tokens.numpy().astype(np.int32), state, logits)])
    return torch.from_numpy(np.array(found.numpy()))


def decoded(backend: TorchBackend, state: TorchState, tokens: Tensor) -> Tensor:
    """Scores (T, V) behind each token, read one by one."""
    return torch.cat([read(backend, state, token[None]) for token in tokens])


@named
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding_is_reading_at_once(name: str, dtype: torch.dtype) -> None:
    """T tokens decoded one by one behind a prompt, or from nothing, give the logits of the model over the whole text."""
    backend, tokens = backend_of(name, dtype), random_tokens(MINIATURES[name], 5, 9)
    expected = truth(name, dtype, tokens)
    for prompt in (0, 7) if DEVICE == "cuda" else (6,):
        state = backend.new_state()
        if prompt:
            read(backend, state, tokens[:prompt])
        found = decoded(backend, state, tokens[prompt:])
        assert logits_error(found, expected[prompt:]) <= LOGITS[dtype]
        assert state.position == len(tokens)
        assert state.slot is not None


@slowly
def test_pages_and_their_table_grow(_: None) -> None:
    """A text goes on over the borders of pages and of the pools that were made first, and nothing of it is lost."""
    backend, tokens = backend_of("2.7b"), random_tokens(MINIATURES["2.7b"], 6, 140)
    decoder = backend.decoder
    assert decoder is not None
    decoder.free_pages, decoder.table = [2, 1], decoder.table[:, :1].contiguous()
    state = backend.new_state()
    read(backend, state, tokens[:62])
    first, again = decoded(backend, state, tokens[62:67]), read(backend, state, tokens[67:125])
    found = torch.cat([first, again, decoded(backend, state, tokens[125:])])
    expected = truth("2.7b", torch.float32, tokens)[[62, 63, 64, 65, 66, 124, *range(125, 140)]]
    assert logits_error(found, expected) <= LOGITS[torch.float32]
    assert decoder.table.shape[1] > 1


@pytest.mark.parametrize("name", [pytest.param(name, marks=interpreted_slowly) for name in MINIATURES])
def test_row_of_a_batch_is_the_row_alone(name: str) -> None:
    """Sequences that join and leave a batch, each at its own length, in any order, decode to what each gives alone, bit for bit."""
    config, lengths = MINIATURES[name], [3, 1, 6, 4, 2]
    backend = backend_of(name)
    texts = [random_tokens(config, 10 + i, length + 4) for i, length in enumerate(lengths)]

    def started() -> list[TorchState]:
        states = [backend.new_state() for _ in texts]
        for state, text, length in zip(states, texts, lengths, strict=True):
            read(backend, state, text[:length])
        return states

    alone = [decoded(backend, state, text[length:]) for state, text, length in zip(started(), texts, lengths, strict=True)]
    states, found = started(), [list[Tensor]() for _ in texts]
    for turn in ([0, 1, 2], [4, 2], [3, 1, 0, 4, 2], [0, 1, 3], [4, 3], [2, 0, 1], [3, 4]):
        some = [i for i in turn if len(found[i]) < 4]
        rows = [Row(texts[i][lengths[i] + len(found[i])][None].numpy().astype(np.int32), states[i]) for i in some]
        for i, scores in zip(some, backend.forward(rows), strict=True):
            found[i].append(torch.from_numpy(np.array(scores.numpy())))
    for one, other in zip(alone, found, strict=True):
        assert logits_error(torch.cat(other), one) <= LOGITS[torch.float32]


def test_batch_of_mixed_rows() -> None:
    """Prompts and single tokens may share a call; each row gets its own scores."""
    backend, tokens = backend_of("little"), random_tokens(SHAPES["little"], 1, 9)
    expected = truth("little", torch.float32, tokens)
    one, other = backend.new_state(), backend.new_state()
    read(backend, one, tokens[:8])
    rows = [Row(tokens[:5].numpy().astype(np.int32), other, 2), Row(tokens[8:].numpy().astype(np.int32), one)]
    first, second = (torch.from_numpy(np.array(scores.numpy())) for scores in backend.forward(rows))
    assert logits_error(first, expected[3:5]) <= LOGITS[torch.float32]
    assert logits_error(second, expected[8:]) <= LOGITS[torch.float32]


@slowly
def test_states_are_copied_saved_and_go_on(tmp_path: Path, _: None) -> None:
    """A copy made while decoding is independent, a saved state continues alike, and a prompt may follow decoded tokens."""
    backend, tokens = backend_of("1.2b"), random_tokens(MINIATURES["1.2b"], 2, 24)
    expected = truth("1.2b", torch.float32, tokens)
    state = backend.new_state()
    read(backend, state, tokens[:5])
    decoded(backend, state, tokens[5:8])
    copy = state.copy()
    state.save(tmp_path / "state")
    decoded(backend, copy, random_tokens(MINIATURES["1.2b"], 9, 3))  # elsewhere
    restored = backend.new_state()
    restored.load(tmp_path / "state")
    for own in (state, restored):
        assert logits_error(decoded(backend, own, tokens[8:10]), expected[8:10]) <= LOGITS[torch.float32]
        assert logits_error(read(backend, own, tokens[10:20], logits=10), expected[10:20]) <= LOGITS[torch.float32]
        assert logits_error(decoded(backend, own, tokens[20:]), expected[20:]) <= LOGITS[torch.float32]


@slowly
def test_slots_are_given_back_and_taken(monkeypatch: pytest.MonkeyPatch, _: None) -> None:
    """More sequences than slots take turns and lose nothing; what a forgotten sequence held is free again."""
    monkeypatch.setattr(torch_runtime, "MOST_TOGETHER", 3)
    backend, config = backend_of("2.7b"), MINIATURES["2.7b"]
    decoder = backend.decoder
    assert decoder is not None
    texts = [random_tokens(config, 20 + i, 5) for i in range(5)]
    states = [backend.new_state() for _ in texts]
    found = [torch.stack([read(backend, state, text[at, None])[0] for state, text in zip(states, texts, strict=True)]) for at in range(5)]
    for i, text in enumerate(texts):
        assert logits_error(torch.stack([scores[i] for scores in found]), truth("2.7b", torch.float32, text)) <= LOGITS[torch.float32]
    assert sum(state.slot is not None for state in states) <= 3
    del states, found
    gc.collect()
    assert sorted(decoder.free_slots) == list(range(1, decoder.conv.shape[1]))
    assert sorted(decoder.free_pages) == list(range(1, decoder.pages.shape[1]))


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=interpreted_slowly)])
def test_the_next_token_is_begun_unasked(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that was begun before it was asked for gives what it would have given; if other tokens are read, others join, or a sequence is
    copied, leaves or is forgotten meanwhile, nothing of it shows."""
    monkeypatch.setattr(decoder_module, "PATIENCE", 1)
    backend, begun = backend_of("little"), list[int]()
    decoder = backend.decoder
    assert decoder is not None
    begin = decoder._begin
    monkeypatch.setattr(decoder, "_begin", lambda slots: begun.append(len(slots)) or begin(slots))
    texts = [random_tokens(SHAPES["little"], 30 + i, 3 + i).tolist() for i in range(2)]
    states = [backend.new_state() for _ in texts]

    def call(*numbers: int) -> list[int]:
        """Read the last token of some texts; what is likeliest next."""
        rows = [Row(np.array(texts[i][-1:], np.int32), states[i]) for i in numbers]
        return [int(scores.likeliest()[-1]) for scores in backend.forward(rows)]

    def check(calls: int, *numbers: int, **instead: int) -> None:
        """Go on with what is likeliest, or with a token of one's own; how many calls it begins."""
        before = len(begun)
        found = call(*numbers)
        for i, token in zip(numbers, found, strict=True):
            expected = truth("little", torch.float32, torch.tensor(texts[i]))[-1]
            assert expected.max() - expected[token] <= LOGITS[torch.float32] * expected.abs().max()
            assert states[i].position == len(texts[i])
            texts[i].append(instead.get(f"token{i}", token))
        assert len(begun) - before == calls

    for text, state in zip(texts, states, strict=True):
        read(backend, state, torch.tensor(text[:-1]))
    check(1, 0, 1)
    check(2, 0, 1)  # it reads what was likeliest: the next one is begun as well
    check(1, 0, 1, token1=7)  # begun already
    check(1, 0, 1)  # what was begun read another token
    if not whole:
        return
    check(2, 0, 1)
    check(1, 0)  # one of them alone
    check(2, 0)
    copy, kept = states[0].copy(), list(texts[0])  # what was begun stays out of it
    check(1, 0)
    check(2, 0, token0=9)
    states[0], texts[0] = copy, kept
    check(1, 0)
    check(2, 0)
    states[1] = backend.new_state()  # the other's place is another's now
    texts[1] = random_tokens(SHAPES["little"], 40, 2).tolist()
    read(backend, states[1], torch.tensor(texts[1][:-1]))
    check(1, 1, 0)
    del states[0], copy, state
    gc.collect()
    assert len(decoder.free_slots) == decoder.conv.shape[1] - 2


def unpacked(path: Path, config: Config, dtype: torch.dtype) -> Zamba2:
    """The model over the weights that a packed checkpoint stands for, on the CPU."""
    file, packing, plan = open_packed(path, config)

    def values(part: Part) -> Tensor:
        data = np.frombuffer(file.read(part.name), dtype=np.uint8)
        if not part.is_matrix:
            return torch.from_numpy(data.view(np.float32).copy())
        return torch.from_numpy(unpack(data, part.shape[0], part.shape[1], packing.of(part)))

    model = Zamba2(config)
    for part in plan:
        tensor = values(part)
        if part.half is None:
            model.get_parameter(part.name).data = tensor.reshape(model.get_parameter(part.name).shape)
            continue
        sizes = [model.get_parameter(source).shape[0] for source in part.sources]
        for source, rows in zip(part.sources, tensor.split(sizes), strict=True):
            half = slice(part.half * part.shape[1], (part.half + 1) * part.shape[1])
            model.get_parameter(source).data[:, half] = rows
    return model.to(dtype).eval()


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU here, and the interpreter would take hours")
def test_greedy_text_is_the_cpus() -> None:
    """To 50 prompts the demonstration model gives the same greedy text on the GPU, all together, as on the CPU, both in fp32."""
    config = Config.from_file(DEMO / "config.json")
    tokenizer = Tokenizer.from_folder(DEMO, config=config)
    prompts = [tokenizer.encode_chat(task.messages[:-1]) for task in islice(tasks("gpu", split="test"), 50)]

    def texts(device: str) -> list[str]:
        backend = TorchBackend(unpacked(DEMO, config, torch.float32).to(device))
        return [answer.text for answer in LanguageModel(backend, tokenizer).generate(prompts, max_tokens=80)]

    found, expected = texts(DEVICE), texts("cpu")
    assert sum(map(bool, expected)) >= 45
    assert found == expected


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU here, and so no CUDA graph")
def test_graphed_steps_have_the_gradients() -> None:
    """Loss and gradients of a captured step are those of one that is not, on other tokens too, and add up where they are kept."""
    config = MINIATURES["2.7b"]
    models = [random_model(config, 3, ops="auto").to(DEVICE).requires_grad_() for _ in range(2)]

    def loss_of(model: Zamba2, ids: Tensor) -> Tensor:
        return model(ids).float().square().mean()

    step = GraphedStep(lambda ids: loss_of(models[0], ids), models[0].parameters())
    for number, kept in enumerate((False, True, True)):
        ids = random_tokens(config, 7 + number, 2, 40).to(DEVICE)
        expected = loss_of(models[1], ids)
        expected.backward()
        assert logits_error(step(ids=ids)[None].cpu(), expected[None].cpu()) <= LOGITS[torch.float32]
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None)
            if one.grad is not None and other.grad is not None:
                assert float((one.grad - other.grad).norm()) <= MODEL[torch.float32].gradient * float(other.grad.norm()) + 1e-9
        if not kept:
            for model in models:
                model.zero_grad(set_to_none=True)


def test_loss_without_logits_is_the_loss() -> None:
    """In zamba2.hf the loss of packed rows as training takes it, from hidden states and in one graph, has the value and the gradients of
    logits' cross-entropy, with positions that count nowhere."""
    pytest.importorskip("transformers")
    from transformers import Zamba2Config

    from zamba2.hf import Zamba2ForCausalLM

    model = Zamba2ForCausalLM(Zamba2Config.from_dict(MINIATURES["2.7b"].to_dict()))
    fill(model.model, 3)
    model.to(DEVICE).train()
    ids, labels = (random_tokens(MINIATURES["2.7b"], 5 + number, 2, 30) for number in range(2))
    labels[:, 7:12] = -100
    seq_idx, items = (torch.arange(30) // 11).expand(2, -1), torch.tensor(31)
    tensors = {"input_ids": ids, "labels": labels, "seq_idx": seq_idx, "num_items_in_batch": items}
    batch = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    model(**batch).loss.backward()
    expected = [parameter.grad for parameter in model.parameters()]
    loss = model(**batch).loss.detach()
    for graphed in (False, True):
        model.zero_grad(set_to_none=True)
        step = GraphedStep(model.packed_loss, model.parameters()) if graphed else None
        found = model.packed_loss(**batch) if step is None else step(**batch)
        if step is None:
            found.backward()
        assert logits_error(found.detach()[None], loss[None]) <= MODEL[torch.float32].output
        for one, other in zip(model.parameters(), expected, strict=True):
            assert one.grad is not None and other is not None
            assert float((one.grad - other).norm()) <= MODEL[torch.float32].gradient * float(other.norm()) + 1e-9


def test_failed_capture_leaves_the_stream_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows a capture that failed runs on the stream from before, where other threads wait for it; torch leaves another."""
    current = ["first"]

    @contextmanager
    def stream(name: str) -> Iterator[None]:
        before, current[0] = current[0], name
        try:
            yield
        finally:
            current[0] = before

    @contextmanager
    def graph(*_: object, **__: object) -> Iterator[None]:
        current[0] = "capturing"
        yield
        raise RuntimeError("not permitted when stream is capturing")

    stand_in = SimpleNamespace(wait_stream=lambda _: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: stand_in)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stand_in)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(RuntimeError, match="not permitted"):
        captured(lambda: current[0], torch.device("cuda"))
    assert current == ["first"]


@pytest.mark.parametrize("format", [pytest.param("q8", marks=interpreted_slowly), "q4", "bf16"])
@pytest.mark.parametrize("name", ["little", *(pytest.param(name, marks=interpreted_slowly) for name in ("2.7b", "1.2b"))])
def test_packed_weights(name: str, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed checkpoint on the GPU gives, for prompts and decoded tokens, what the weights in it give in fp64."""
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_linear, "MANY", 0)  # the shape for many rows: 32 in a program, not 4
    config = MINIATURES["2.7b" if name == "little" else name]
    if name == "little":
        config = replace(config, num_hidden_layers=2, hybrid_layer_ids=(1,), num_mem_blocks=1)
    config = replace(config, hidden_size=64, intermediate_size=96, vocab_size=80, n_mamba_heads=4, num_attention_heads=4)
    write_synthetic(config, Packing.named(format), tmp_path / "packed", seed=1)
    model = unpacked(tmp_path / "packed", config, torch.float64)
    tokens = random_tokens(config, 4, 77 if name == "little" else 80)
    with torch.no_grad():
        expected = model(tokens[None])[0]
    backend = TorchBackend(load_packed(tmp_path / "packed", config, device=torch.device(DEVICE)), decode=True)
    state = backend.new_state()
    first = read(backend, state, tokens[:76], logits=3)
    found = torch.cat([first, decoded(backend, state, tokens[76:])])
    assert logits_error(found, expected[73:]) <= LOGITS[torch.bfloat16]


def test_formats_have_fingerprints_of_their_own(tmp_path: Path) -> None:
    """A state of one packing is refused by the other: each says who it is."""
    config = MINIATURES["2.7b"]
    found = set()
    for format in ("q8", "q4"):
        write_synthetic(config, Packing.named(format), tmp_path / format)
        found.add(TorchBackend(load_packed(tmp_path / format, config, device=torch.device(DEVICE)), decode=False).fingerprint)
    assert len(found) == 2


def test_values_that_are_not_finite() -> None:
    """A weight that is NaN gives one sentence and no scores, when decoding too."""
    model = random_model(MINIATURES["2.7b"], 3, ops="auto").to(DEVICE)
    model.layers[0].mamba.norm.weight.data[0] = torch.nan
    backend = TorchBackend(model, decode=True)
    with pytest.raises(Zamba2Error, match="NaN or infinite"):
        read(backend, backend.new_state(), torch.tensor([5]))


def test_what_a_gpu_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too old a card and too little memory give one sentence with the numbers; no GPU and a wrong driver name the way out."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(Zamba2Error, match=r"Tesla T4 has compute capability 7\.5; 8\.0 is needed"):
        device_of("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3_000_000_000, 8_000_000_000))
    with pytest.raises(Zamba2Error, match=r"needs 7\.3 GB on cuda, where 3\.0 of 8\.0 GB are free"):
        check_room(torch.device("cuda"), 5_300_000_000)
    check_room(torch.device("cuda"), 900_000_000)


def test_other_makers_gpus_take_pytorchs_operations(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where PyTorch is AMD's, kernels, which are NVIDIA's alone, are not taken, and one sentence says so; packed weights are refused."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(ops, "_on_gpu", None)
    monkeypatch.setattr(errors, "_said", set[str]())
    assert not ops.has_triton()
    elsewhere: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    assert ops._for(elsewhere) is ops.select("torch")
    assert "NVIDIA's alone" in capsys.readouterr().err
    monkeypatch.setattr(torch_runtime, "device_of", lambda name: torch.device("cuda"))
    with pytest.raises(Zamba2Error, match="this PyTorch is for AMD's; load the original one"):
        TorchBackend.device_for(None, None, packed=True)


def test_memory_that_runs_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the memory of a GPU runs out in a call, one sentence says so, and the state is what it was."""
    backend = backend_of("2.7b")
    state = backend.new_state()
    read(backend, state, torch.tensor([3, 4]))

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

    monkeypatch.setattr(backend.model, "hidden_states", full)
    with pytest.raises(Zamba2Error, match=r"not enough memory on .* \(CUDA out of memory\. Tried to allocate 20\.00 GiB\.\)"):
        read(backend, state, torch.tensor([5, 6]))
    assert state.position == 2


def test_packed_model_reads_each_part_once() -> None:
    """Every tensor of a packed checkpoint is asked for once, so that a download can be streamed."""
    config, asked = MINIATURES["2.7b"], list[str]()

    def read_part(part: Part) -> Tensor:
        asked.append(part.name)
        size = Packing.named("q8").of(part).nbytes(*part.shape) if part.is_matrix else part.count
        return torch.zeros(size, dtype=torch.uint8 if part.is_matrix else torch.float32)

    packed_model(config, Packing.named("q8"), read_part)
    assert len(asked) == len(set(asked)) > 20


def test_kernels_are_launched_on_the_models_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the thread's current GPU: every way into a model makes the model's own the current one, on cuda:1 as well."""
    entered: list[torch.device] = []

    class Current:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *_: object) -> None:
            pass

    second = torch.device("cuda", 1)
    with monkeypatch.context() as there:
        there.setattr(torch.cuda, "device", Current)
        with ops.launching_on(second), ops.launching_on(torch.device("cpu")):
            assert entered == [second]
    for module in (ops, torch_runtime, decoder_module):
        monkeypatch.setattr(module, "launching_on", Current)
    backend = backend_of("little")
    tokens = random_tokens(backend.config, 3, 1, 4)
    hidden = torch.zeros(1, 1, backend.config.hidden_size, device=DEVICE)
    state = backend.new_state()
    steps: list[Any] = [
        lambda: backend.model.hidden_states(tokens.to(DEVICE)), lambda: backend.model.logits(hidden),
        lambda: read(backend, state, tokens[0]), lambda: read(backend, state, tokens[0, :1]), lambda: state.inner,
    ]  # fmt: skip
    for step in steps:
        entered.clear()
        step()
        assert entered and all(device.type == DEVICE for device in entered)
