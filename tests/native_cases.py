"""Native backends over random miniatures, and the PyTorch model that computes the same: dequantized weights, rounded inputs,
keys and values.

The twin shares nothing with the engine but the packed bytes: it is the PyTorch model with some functions replaced.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from kernel_cases import TOLERANCE, q8_of, softmax_of
from op_cases import relative_error
from strategies import MINIATURES, miniature, random_model, random_tokens
from torch import Tensor
from torch.nn import functional as F

from zamba2 import _engine
from zamba2.config import Config
from zamba2.model import model as model_module
from zamba2.model.model import Zamba2
from zamba2.model.state import KVCache, ModelState
from zamba2.runtime.backend import Row
from zamba2.runtime.native import ENGINE_KEYS, SHORT, NativeBackend, NativeState
from zamba2.weights import packed
from zamba2.weights.checkpoint import save_checkpoint
from zamba2.weights.formats import FORMATS, KV_FORMATS, unpack
from zamba2.weights.packed import open_packed

__all__ = [
    "BACKBONE", "CONFIGS", "EXACT", "ISAS", "PERTURBATION", "Check", "Twin", "as_twin", "compare", "divergence", "engine_arguments",
    "error", "logits_of", "make_packed", "multiply_as", "native", "observing", "packed_from", "perturbed", "round_int8",
    "rounds_attention", "twin", "uses_units", "with_perturbed",
]  # fmt: skip

ISAS = list(_engine.available())

# The switches of the three sizes, and what sizes can do to blocks of 16 rows and groups of 32 inputs: less, just, a bit more.
CONFIGS: dict[str, Config] = {
    **MINIATURES,
    "gqa": miniature(num_attention_heads=4, num_key_value_heads=2, hidden_size=40, n_mamba_heads=5, use_mem_rope=True, num_mem_blocks=1),
    "odd": miniature(
        hidden_size=33, n_mamba_heads=3, num_attention_heads=3, num_key_value_heads=1, intermediate_size=37, adapter_rank=1,
        mamba_d_state=5, vocab_size=17, mamba_d_conv=3, num_mem_blocks=3, hybrid_layer_ids=(0, 1, 2, 4), tie_word_embeddings=False,
        rms_norm_eps=1e-3, chunk_size=5,
    ),
    "aligned": miniature(
        hidden_size=64, n_mamba_heads=8, num_attention_heads=4, intermediate_size=96, adapter_rank=32, mamba_d_state=32, vocab_size=128,
        mamba_ngroups=2, use_mem_rope=True, use_shared_attention_adapter=True,
    ),
}  # fmt: skip
# No hybrid layers: no keys and values, so nothing is rounded but the weights.
BACKBONE = miniature(hybrid_layer_ids=(), num_hidden_layers=3, mamba_ngroups=2, tie_word_embeddings=False)

_folders: list[tempfile.TemporaryDirectory[str]] = []  # kept until the end: the engine maps the files


def packed_from(model: Zamba2, format: str, embeddings: str | None = None) -> Path:
    """A packed checkpoint of a model; embeddings: the format of its table, by default the one that goes with the others'."""
    folder = tempfile.TemporaryDirectory(prefix="zamba2-native-")
    _folders.append(folder)
    save_checkpoint(model, Path(folder.name) / "hub")
    own = packed.Packing.named(format, embeddings).embeddings
    packed.quantize(Path(folder.name) / "hub", Path(folder.name) / "packed", FORMATS[format], embeddings=own)
    return Path(folder.name) / "packed"


@functools.cache
def make_packed(config: Config, format: str, seed: int = 1) -> Path:
    """A packed checkpoint of the random model of a config and seed; its folder holds the original as ``hub`` too."""
    return packed_from(random_model(config, seed), format)


@functools.cache
def native(config: Config, format: str, isa: str = "", threads: int = 1, seed: int = 1, kv: str = "bf16") -> NativeBackend:
    """The native backend over ``make_packed``."""
    return NativeBackend(make_packed(config, format, seed), config, threads=threads, isa=isa, kv=kv)


class Twin(Zamba2):
    """The PyTorch model in fp64 with the weights that a packed file holds; ``load`` brings some into memory, ``drop`` lets them go."""

    def __init__(self, folder: Path, config: Config) -> None:
        with torch.device("meta"):
            super().__init__(config)
        for block in self.shared_blocks:
            block.self_attn.split_for_inference()
        self.requires_grad_(False).eval()
        self.file, self.packing, self.plan = open_packed(folder, config)

    def load(self, prefix: str = "") -> None:
        """Dequantize the weights whose names start so."""
        halves: dict[str, list[Tensor]] = {}
        for part in self.plan:
            if not part.name.startswith(prefix):
                continue
            data = np.frombuffer(self.file.read(part.name), dtype=np.uint8)
            floats = unpack(data, *part.shape, self.packing.of(part)) if part.is_matrix else data.view(np.float32)
            values = torch.from_numpy(floats).double()
            if part.half is not None:
                halves.setdefault(part.name.split(".qkv_proj.")[0], []).append(values)
                continue
            owner, name = part.name.rsplit(".", 1)
            parameters = self.get_submodule(owner)._parameters
            parameters[name] = torch.nn.Parameter(values.view(parameters[name].shape), requires_grad=False)  # type: ignore[union-attr]
        for owner, (left, right) in halves.items():
            self.get_submodule(owner).split = (left, right)

    def drop(self, prefix: str) -> None:
        self.get_submodule(prefix).to("meta")

    def load_in_turn(self) -> None:
        """Load each layer when it runs and drop it behind, shared blocks once: for models of true size."""
        for prefix in ("embed_tokens.", "lm_head.", "final_layernorm."):
            self.load(prefix)
        here: set[int] = set()

        def before(layer: Any, inputs: Any) -> None:
            self.load(f"layers.{layer.layer.index}.")
            if layer.layer.block is not None and layer.layer.block not in here:
                self.load(f"shared_blocks.{layer.layer.block}.")
                here.add(layer.layer.block)

        for layer in self.layers:
            layer.register_forward_pre_hook(before)
            layer.register_forward_hook(lambda layer, inputs, output: self.drop(f"layers.{layer.layer.index}"))


@functools.cache
def twin(config: Config, format: str, seed: int = 1) -> Twin:
    """The twin of ``native``, all of it in memory."""
    model = Twin(make_packed(config, format, seed), config)
    model.load()
    return model


def engine_arguments(config: Config, format: str, tokens: np.ndarray, lengths: Sequence[int], kv: str) -> dict[str, Any]:
    """Arguments of ``engine`` in tests/native/kernel_runner.cpp: tokens in calls of these lengths, by two threads, to all their logits."""
    file, packing, plan = open_packed(make_packed(config, format), config)
    return {key: getattr(config, key) for key in ENGINE_KEYS} | {
        "hybrid_layer_ids": np.array(config.hybrid_layer_ids, dtype=np.int64), "threads": 2, "kv": KV_FORMATS[kv].number,
        "format": packing.format.number,
        "embeddings": packing.embeddings.number,
        **{part.name: np.frombuffer(file.read(part.name), np.uint8 if part.is_matrix else np.float32) for part in plan},
        "tokens": tokens.astype(np.int32), "lengths": np.array(lengths, dtype=np.int64),
        "logits": np.full((len(tokens), config.vocab_size), np.nan, dtype=np.float32),
    }  # fmt: skip


# ---- how the engine rounds: functions from values to (codes, rounded values) -----------

Rounding = Callable[[Tensor], tuple[Tensor, Tensor]]


def round_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of groups of 32 inputs: scale = largest / 127, ties to even."""
    padded = F.pad(x.float(), (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    peak = padded.abs().amax(-1, keepdim=True)
    inverse = torch.where(peak > 0, torch.full_like(peak, 127) / peak, 0)  # 127 / peak would round twice
    codes = torch.round(padded * inverse).clamp(-127, 127)
    return tuple(t.flatten(-2)[..., : x.shape[-1]] for t in (codes, codes * (peak / 127)))  # type: ignore[return-value]


def round_bf16(x: Tensor) -> tuple[Tensor, Tensor]:
    """Ties to even."""
    return x.bfloat16().view(torch.int16), x.bfloat16().to(x.dtype)


def round_q8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys or values (..., head_dim) in int8, with one scale per head and token."""
    codes, scales = (torch.from_numpy(part) for part in q8_of(x.float().numpy()))
    return codes.float(), codes * scales[..., None]


def rounding_of_kv(kv: str) -> Rounding:
    """How keys and values are kept."""
    return round_q8 if kv == "q8" else round_bf16


def rounding_of(format: str, units: bool) -> Rounding | None:
    """What the engine does to the inputs of a product: q8 and q4 round them to int8, products of bf16 (which round weights too) to bf16."""
    return round_bf16 if units else None if format == "bf16" else round_int8


def multiply_as(format: str, units: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """x W^T as the engine takes it, but for sums, which are exact."""
    rounding = rounding_of(format, units)

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        inputs = x if rounding is None else rounding(x)[1]
        return F.linear(inputs.double(), (weight.bfloat16() if units else weight).double()).to(x.dtype)

    return multiply


def attend_as(rounded: bool, kv: str, allowed: list[Tensor] | None = None) -> Callable[..., Tensor]:
    """Causal attention with exact sums, with the roundings of bf16 products if ``rounded`` (see ``softmax_of``). allowed gets the
    largest difference, (T, heads * head_dim), that numbers next to a tie may make."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, **others: Any) -> Tensor:
        rows, heads, length, d = q.shape
        seen = np.arange(k.shape[2] - length, k.shape[2]) + 1
        values, largest = (torch.empty(q.shape, dtype=torch.float64) for _ in range(2))
        for row in range(rows):
            for head in range(heads):
                own = row, head * k.shape[1] // heads
                steps = np.abs(v[own].numpy()).max(-1) / np.float32(127) if kv == "q8" else np.ones(k.shape[2], np.float32)
                arrays = (part.numpy() for part in (q[row, head], k[own], v[own]))
                near = softmax_of(*arrays, seen, scale, steps=steps if rounded else None, unsure=EXACT)
                values[row, head] = torch.from_numpy(near.values)
                largest[row, head] = torch.from_numpy(near.magnitude * TOLERANCE["attend_many"])
        if allowed is not None:
            allowed.append(largest[0].transpose(0, 1).reshape(length, heads * d))
        return values.to(q.dtype)

    return attend


_append = KVCache.append


@contextmanager
def as_twin(format: str, *, units: bool = False, attention: bool = False, kv: str = "bf16") -> Iterator[None]:
    """The PyTorch model rounds as the engine does: keys and values as ``rounding_of_kv``, inputs of products as ``rounding_of`` says;
    with ``attention``, queries and weights of attention too (``rounds_attention``, in calls of more than SHORT tokens)."""
    rounding = rounding_of_kv(kv)
    with (
        mock.patch.object(KVCache, "append", lambda self, k, v: _append(self, rounding(k)[1], rounding(v)[1])),
        mock.patch.object(F, "scaled_dot_product_attention", attend_as(attention, kv)),
        mock.patch.object(model_module, "matmul", multiply_as(format, units)),
        torch.no_grad(),
    ):
        yield


# ---- end to end: what a tiny change of the embeddings does ------------------------------------------------------------------

PERTURBATION = 1e-6  # relative, of every number of every embedding


def divergence(expected: np.ndarray | Tensor, found: np.ndarray | Tensor) -> Tensor:
    """KL(expected || found) of next-token distributions given as logits (..., V), in nats, (...)."""
    true, other = (torch.as_tensor(scores).double().log_softmax(-1) for scores in (expected, found))
    return (true.exp() * (true - other)).sum(-1)


def with_perturbed(x: Tensor, draws: int, seed: int) -> Tensor:
    """Embeddings (T, H) and behind them ``draws`` perturbed copies, (1 + draws, T, H)."""
    noise = torch.randn(draws, *x.shape, generator=torch.Generator().manual_seed(seed))
    return torch.cat([x[None], x * (1 + PERTURBATION * noise)])


@dataclass
class Perturbed:
    """Texts (S, T), the twin's logits (S, T, V), and the divergence that perturbing its embeddings brings, (S, T)."""

    tokens: Tensor
    logits: Tensor
    divergence: Tensor


@functools.cache
def perturbed(
    config: Config, format: str, units: bool, attention: bool = False, kv: str = "bf16", texts: int = 4, length: int = 300, draws: int = 3
) -> Perturbed:  # fmt: skip
    """The yardstick for whatever may round numbers the other way."""
    model, tokens = twin(config, format), random_tokens(config, 5, texts, length)
    logits, kl = [], []
    for seed, own in enumerate(tokens):
        with as_twin(format, units=units, attention=attention, kv=kv):
            scores = model(inputs_embeds=with_perturbed(model.embed_tokens(own), draws, seed), state=model.new_state())
        logits.append(scores[0])
        kl.append(divergence(scores[:1], scores[1:]).mean(0))
    return Perturbed(tokens, torch.stack(logits), torch.stack(kl))


# ---- block by block -----------------------------------------------------------------------------------------------------------

EXACT = 1e-5  # relative error by norm


@dataclass
class Check:
    """One thing compared: its relative error by norm; its worst element; of what was rounded, how many numbers there were and how
    many went the other way."""

    name: str
    error: float
    worst: float
    rounded: int = 0
    flipped: int = 0


def sizes(expected: Tensor) -> Tensor:
    """What the difference of each element is relative to."""
    wide = expected.double()
    return wide.abs().clamp_min(max(float(wide.square().mean().sqrt()), 1e-30))


def checked(name: str, found: Tensor, expected: Tensor) -> Check:
    """The relative error by norm, and the largest difference of an element, as ``sizes`` says; infinite if an element is not finite."""
    assert found.shape == expected.shape, f"{name}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    difference = (found.double() - expected.double()).abs()
    norm, worst = float(difference.norm() / expected.double().norm().clamp_min(1e-30)), float((difference / sizes(expected)).max())
    return Check(name, norm, worst) if math.isfinite(worst) else Check(name, math.inf, math.inf)


def flips(name: str, own: Tensor, given: Tensor, rounding: Rounding) -> int:
    """How many of the engine's numbers are rounded to others than the twin's own. Each lies as near to the twin's own number as
    that one's rounding does, but for what two correct sums may differ (twice: a group's largest may differ too); no int8 code
    differs by more than one."""
    codes, rounded = rounding(given)
    own_codes, own_rounded = rounding(own)
    different = codes != own_codes
    excess = (rounded.double() - own.double()).abs() - (own_rounded.double() - own.double()).abs()
    assert bool((excess <= 2 * EXACT * sizes(own))[different].all()), f"{name}: a number far from a tie is rounded the other way"
    assert rounding is round_bf16 or int((codes - own_codes).abs().max()) <= 1, f"{name}: codes differ by more than one"
    return int(different.sum())


@contextmanager
def observing(backend: NativeBackend, outputs: Callable[..., None], inputs: Callable[..., None]) -> Iterator[None]:
    """The engine reports every block's output and the inputs of every product."""
    backend.engine.observe(outputs)
    backend.engine.observe_inputs(inputs)
    try:
        yield
    finally:
        backend.engine.observe(None)
        backend.engine.observe_inputs(None)


def state_of(config: Config, exported: dict[str, Any], position: int, kv: str) -> ModelState:
    """The engine's state as the PyTorch model's."""
    state = ModelState.empty(config)
    if not position:
        return state
    conv = torch.from_numpy(exported["conv"]).view(config.num_hidden_layers, 1, config.mamba_d_conv - 1, config.conv_dim)
    shape = (config.num_hidden_layers, 1, config.n_mamba_heads, config.mamba_headdim, config.mamba_d_state)
    state.conv, state.ssm = list(conv.double()), list(torch.from_numpy(exported["ssm"]).view(shape).double())
    for cache, kept in zip(state.kv, keys_and_values(config, exported, position, kv), strict=True):
        _append(cache, *kept)
    state.position = position
    return state


def keys_and_values(config: Config, exported: dict[str, Any], position: int, kv: str) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each hybrid position in an engine's state, (1, heads, position, head_dim) fp64."""
    shape, count = (1, config.num_key_value_heads, position, -1), len(KV_FORMATS[kv].parts)
    parts = [torch.from_numpy(part) for part in exported["parts"]]
    found = []
    for own in (parts[at : at + count] for at in range(0, len(parts), count)):
        if kv == "bf16":
            keys, values = (part.view(torch.bfloat16).view(shape) for part in own)
        else:
            keys, values = (own[i].view(torch.int8).view(shape) * own[i + 2].view(torch.float32).view(shape) for i in (0, 1))
        found.append((keys.double(), values.double()))
    return found


def compare(backend: NativeBackend, model: Zamba2, tokens: np.ndarray, *, past: np.ndarray) -> list[Check]:
    """Follow one call of the engine with the twin: every block's output, every product's inputs, what is kept, the states.

    Both start from the engine's state after ``past``; every block of the twin, and every product in it, is then given what the
    engine's had, so nothing but the arithmetic between two observed places is compared, and a number that is rounded the other
    way, which ``flips`` permits and counts, changes nothing behind it.
    """
    config, engine, before, kv = model.config, backend.engine, len(past), backend.kv.name
    inner = engine.new_state()
    if before:
        engine.forward([inner], [past], [0])
    state = state_of(config, engine.export_state(inner), before, kv)
    events: list[tuple[str, str, Tensor]] = []
    with observing(
        backend,
        lambda name, data: events.append(("output", name, torch.from_numpy(data))),
        lambda name, data: events.append(("input", name, torch.from_numpy(data))),
    ):
        logits = torch.from_numpy(engine.forward([inner], [tokens], [len(tokens)])).double()
    after = engine.export_state(inner)
    kept = iter(keys_and_values(config, after, before + len(tokens), kv))
    units = uses_units(backend.isa, backend.format.name) and len(tokens) > SHORT
    rounding, multiply = rounding_of(backend.format.name, units), multiply_as(backend.format.name, units)
    rounds = rounds_attention(backend.isa) and len(tokens) > SHORT
    allowed: list[Tensor] = []
    checks: list[Check] = []
    hoisted: set[str] = set()

    def following(kind: str, name: str) -> tuple[str, Tensor]:
        found, place, data = events.pop(0)
        assert found == kind and place.endswith(name), f"the engine's {found} {place} came where {kind} {name} should"
        return place, data.double()

    def product(x: Tensor, weight: Tensor) -> Tensor:
        while events[0][1] in hoisted:  # with more than two blocks the engine takes it again
            events.pop(0)
        name, given = following("input", "")
        if name.endswith(".right.weight"):
            hoisted.add(name)
        own = x.reshape(given.shape)
        if name.endswith(".o_proj.weight") and rounds:
            difference = (given - own).abs() - allowed.pop()
            checks.append(Check(f"inputs of {name}", 0.0, float((difference / sizes(own)).max())))
            own = given
        checks.append(checked(f"inputs of {name}", given, own))
        if rounding is not None:
            checks[-1].rounded, checks[-1].flipped = given.numel(), flips(name, own, given, rounding)
        return multiply(own if rounding is None else given, weight).view(*x.shape[:-1], -1)

    def append(self: KVCache, *own: Tensor) -> tuple[Tensor, Tensor]:
        given = [values[:, :, before:] for values in next(kept)]
        for kind, mine, theirs in zip(("keys", "values"), own, given, strict=True):
            checks.append(Check(kind, 0.0, 0.0, mine.numel(), flips(kind, mine, theirs, rounding_of_kv(kv))))
        return _append(self, *given)

    def output(kind: str) -> Callable[..., Tensor]:
        def hook(module: Any, inputs: Any, own: Tensor) -> Tensor:
            name, given = following("output", kind)
            checks.append(checked(name, given, own[0]))
            return given[None]

        return hook

    hooks = [layer.register_forward_hook(output(f"layers.{i}")) for i, layer in enumerate(model.layers)]
    for layer in model.layers:
        hooks.append(layer.mamba.register_forward_hook(output(".mamba")))
        if layer.linear is not None:
            hooks.append(layer.linear.register_forward_hook(output(".linear")))
    for block in model.shared_blocks:
        hooks.append(block.self_attn.register_forward_hook(output(".self_attn")))
        hooks.append(block.feed_forward.register_forward_hook(output(".shared_block")))
    try:
        with (
            mock.patch.object(KVCache, "append", append),
            mock.patch.object(F, "scaled_dot_product_attention", attend_as(rounds, kv, allowed)),
            mock.patch.object(model_module, "matmul", product),
            torch.no_grad(),
        ):
            final = model.hidden_states(torch.from_numpy(tokens)[None].long(), state=state)[0]
            name, given = following("output", "final_layernorm")
            checks.append(checked(name, given, final))
            checks.append(checked("logits", logits, model.logits(given)))
    finally:
        for hook in hooks:
            hook.remove()
    assert not events and next(kept, None) is None
    mine = state_of(config, after, before + len(tokens), kv)
    for i in range(config.num_hidden_layers):
        for kind, given_state, own_state in (("conv", mine.conv[i], state.conv[i]), ("ssm", mine.ssm[i], state.ssm[i])):
            assert given_state is not None and own_state is not None
            checks.append(checked(f"{kind} state of layers.{i}", given_state, own_state))
    return checks


def uses_units(isa: str, format: str) -> bool:
    """Whether calls of more than SHORT tokens round the inputs of products to bf16: for matrix units, or for bf16 weights in pairs."""
    return isa == "amx" or (isa == "avx512bf16" and format == "bf16")


def rounds_attention(isa: str) -> bool:
    """Whether attention in calls of more than SHORT tokens rounds to bf16."""
    return isa in ("avx512bf16", "amx")


def logits_of(backend: NativeBackend, tokens: Sequence[int] | np.ndarray, state: NativeState | None = None, **options: Any) -> np.ndarray:
    """Logits of the trailing positions (``logits``, by default all) of one row read into a state, by default a new one."""
    row = Row(np.asarray(tokens, dtype=np.int32), state or backend.new_state(), **({"logits": len(tokens)} | options))
    return backend.forward([row])[0].numpy()


def error(found: np.ndarray | Tensor, expected: np.ndarray | Tensor) -> float:
    """``relative_error`` of arrays."""
    return relative_error(*(value if isinstance(value, Tensor) else torch.tensor(value) for value in (found, expected)))
