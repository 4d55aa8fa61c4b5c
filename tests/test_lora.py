"""Laws of run-time adapters: what peft computes, beside other sequences that have none, on files that may be anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("peft", reason="adapters are made with the extra [train]")
import torch
from native_cases import CONFIGS
from strategies import random_model

import zamba2
import zamba2.hf
from zamba2.errors import Zamba2Error
from zamba2.runtime.backend import Row
from zamba2.runtime.native import NativeBackend
from zamba2.train.adapters import add_lora
from zamba2.train.recipe import Lora
from zamba2.weights.checkpoint import save_checkpoint
from zamba2.weights.formats import format_named
from zamba2.weights.hub import RANDOM
from zamba2.weights.lora import read_lora
from zamba2.weights.packed import quantize

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
TOKENS = np.random.default_rng(0).integers(3, 60, 80).astype(np.int32)  # more than the MLP takes at once
PREFIX = "base_model.model.model."
SIZES = ["1.2b", "gqa", "7b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function of a size and targets: a folder with a checkpoint, packed copies and a random adapter, made once."""
    made: dict[object, Path] = {}

    def make(size: str, targets: tuple[str, ...] = Lora().targets) -> Path:
        if (size, targets) not in made:
            place = made[size, targets] = tmp_path_factory.mktemp("lora")
            save_checkpoint(random_model(CONFIGS[size], 0).to(torch.bfloat16), place / "base")
            base = zamba2.hf.Zamba2ForCausalLM.from_pretrained(str(place / "base"), dtype="float32")
            model = add_lora(base, Lora(rank=5, targets=targets))
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator).bfloat16().float())
            model.save_pretrained(place / "adapter")
            model.merge_and_unload().save_pretrained(place / "merged")
            for source, format in (("base", "bf16"), ("base", "q8"), ("merged", "bf16")):
                quantize(place / source, place / f"{source}-{format}", format_named(format))
        return made[size, targets]

    return make


def backend(place: Path, name: str = "base-bf16", adapter: Path | None = None) -> NativeBackend:
    loaded = NativeBackend(place / name, zamba2.Config.from_file(place / name / "config.json"), threads=2)
    if adapter is not None:
        loaded.load_adapter(adapter, "a")
    return loaded


def logits(engine: NativeBackend, adapter: str | None = None, tokens=TOKENS, step: int = 0) -> np.ndarray:
    """Logits of every position, read at once or ``step`` tokens at a time."""
    state = engine.new_state(adapter=adapter)
    parts = np.split(tokens, range(step, len(tokens), step)) if step else [tokens]
    return np.concatenate([engine.forward([Row(part, state, logits=len(part))])[0].numpy() for part in parts])


def reference(place: Path) -> np.ndarray:
    """peft's logits in fp32, over the same weights."""
    from peft import PeftModel

    base = zamba2.hf.Zamba2ForCausalLM.from_pretrained(str(place / "base"), dtype="float32")
    model = PeftModel.from_pretrained(base, str(place / "adapter")).eval()
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS[None].astype(np.int64))).logits[0].numpy()


@pytest.mark.parametrize("size", SIZES)
def test_the_engine_adds_what_peft_adds(folder, size):
    """With an adapter on every target, unmerged, the engine is as near to peft's fp32 logits as with the merged checkpoint."""
    place = folder(size)
    wanted = reference(place)
    plain, adapted = (logits(backend(place, adapter=place / "adapter"), name) for name in (None, "a"))
    merged = logits(backend(place, "merged-bf16"))
    error, merging = (np.linalg.norm(found - wanted) for found in (adapted, merged))
    assert error <= 1.2 * merging and error < 0.1 * np.linalg.norm(plain - wanted)


@pytest.mark.parametrize("target", Lora().targets)
def test_each_target_is_read(folder, target):
    """An adapter on one layer type alone: peft's logits, and not those without it."""
    place = folder("2.7b", (target,))
    wanted = reference(place)
    plain, adapted = (logits(backend(place, adapter=place / "adapter"), name) for name in (None, "a"))
    assert np.linalg.norm(adapted - wanted) < 0.3 * np.linalg.norm(plain - wanted)


@pytest.mark.parametrize("name", ["base-bf16", "base-q8"])
def test_adapters_keep_the_laws(folder, name):
    """A sequence's bits depend neither on the company it is in, with other adapters or none, nor on how many tokens come at once."""
    place = folder("2.7b")
    engine = backend(place, name, place / "adapter")
    engine.load_adapter(folder("2.7b", ("in_proj",)) / "adapter", "b")
    alone = {adapter: logits(engine, adapter, TOKENS[:24], step=1) for adapter in (None, "a", "b")}
    assert not np.array_equal(alone["a"], alone["b"]) and not np.array_equal(alone["a"], alone[None])
    states = {adapter: engine.new_state(adapter=adapter) for adapter in alone}
    for start in range(0, 24, 6):
        rows = [Row(TOKENS[start : start + 6], state, logits=6) for state in states.values()]
        for adapter, found in zip(states, engine.forward(rows), strict=True):
            assert np.array_equal(found.numpy(), alone[adapter][start : start + 6])


def test_an_observer_sees_the_models_own_products(folder):
    """Observed inputs are those of the model's matrices, in the same order with an adapter on all of them as without one."""
    place = folder("2.7b")
    engine, seen = backend(place, adapter=place / "adapter"), {None: [], "a": []}
    for adapter, names in seen.items():
        engine.engine.observe_inputs(lambda name, data, names=names: names.append(name))
        logits(engine, adapter, TOKENS[:5])
    engine.engine.observe_inputs(None)
    assert seen["a"] == seen[None] and "layers.0.mamba.in_proj.weight" in seen["a"]


def test_states_know_their_adapter(folder, tmp_path):
    """A copy keeps the adapter; a saved state continues under the same adapter with the same bits, and under no other."""
    place = folder("2.7b")
    engine = backend(place, adapter=place / "adapter")
    state = engine.new_state(adapter="a")
    engine.forward([Row(TOKENS, state)])
    state.save(tmp_path / "s")
    again = engine.new_state(adapter="a")
    again.load(tmp_path / "s")
    expected = engine.forward([Row(TOKENS[:3], state.copy())])[0].numpy()
    assert state.copy().adapter == "a" and np.array_equal(engine.forward([Row(TOKENS[:3], again)])[0].numpy(), expected)
    with pytest.raises(Zamba2Error, match="another model"):
        engine.new_state().load(tmp_path / "s")
    with pytest.raises(Zamba2Error, match="no adapter called 'c' is loaded; there is a"):
        engine.new_state(adapter="c")


@pytest.mark.parametrize(("settings", "scale"), [({}, 3 / 5), ({"use_rslora": True}, 3 / 5**0.5)])
def test_the_scale_is_alpha_over_the_rank(folder, tmp_path, settings, scale):
    """What an adapter adds is multiplied by lora_alpha / r, or by lora_alpha / sqrt(r) where it was trained so."""
    shutil.copytree(folder("2.7b") / "adapter", tmp_path / "adapter")
    edit(lora_alpha=3, **settings)(tmp_path / "adapter")
    assert {part.scale for part in read_lora(tmp_path / "adapter", CONFIGS["2.7b"])} == {scale}


def test_load_takes_an_adapter(folder):
    """`zamba2.load(adapter=FOLDER)` answers with it; PyTorch refuses."""
    place = folder("2.7b")
    model = zamba2.load(place / "base", format="bf16", adapter=place / "adapter")
    assert np.array_equal(logits(model.backend), logits(backend(place, adapter=place / "adapter"), "a"))
    with pytest.raises(Zamba2Error, match="are for the native engine"):
        zamba2.load(place / "base", dtype="float32", adapter=place / "adapter")


def test_an_evaluation_tells_adapters_apart(folder, tmp_path):
    """What decides answers names the adapter by its weights, and the format of keys and values; so does what names a cache of them."""
    from zamba2.evaluate.answers import Ours, about_ours, decisive
    from zamba2.evaluate.harness import identity

    place = folder("2.7b")
    shutil.copytree(place / "adapter", tmp_path / "same")
    options = ({}, {"kv": "q8"}, *({"adapter": adapter} for adapter in (place / "adapter", tmp_path / "same")))
    models = [zamba2.load(place / "base", format="bf16", **own) for own in options]
    plain, kv, one, same = (decisive(Ours(model, model.name, about_ours(model, {}))) for model in models)
    assert one == same and {name for name in one if one[name] != plain.get(name)} == {"adapter_sha256"}
    assert {name for name in kv if kv[name] != plain[name]} == {"kv_format"} and set(plain) > {"sha256", "format", "backend"}
    caches = [identity(model) for model in models]
    assert caches[2] == caches[3] and len(set(caches)) == 3


def test_the_command_line_takes_an_adapter(folder, tmp_path, capsys):
    """`zamba2 generate --adapter` answers as the library does; a folder that is no adapter is one sentence and exit code 2."""
    from zamba2.cli import run

    place = folder("2.7b")
    with pytest.raises(Zamba2Error, match="has no adapter_config"):
        zamba2.load(place / "base", format="bf16", adapter=tmp_path)
    shutil.copy(RANDOM / "tokenizer.json", tmp_path / "tokenizer.json")
    capsys.readouterr()
    assert run(["generate", "hi", "--model", str(place / "base"), "--format", "bf16", "--adapter", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("zamba2: ") and "adapter_config.json" in error


def edit(**settings: object):
    def change(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


def rewrite(change):
    def apply(adapter: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = adapter / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return apply


def without(tensors, end):
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(end)}


def cut(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:500])


BAD = {
    "no config": (lambda a: (a / "adapter_config.json").unlink(), "no adapter_config.json"),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), "cannot be opened"),
    "config is a list": (lambda a: (a / "adapter_config.json").write_text("[]"), "holds a list"),
    "config is no JSON": (lambda a: (a / "adapter_config.json").write_text("{"), "not valid JSON"),
    "truncated": (cut, "complete"),
    "dora": (edit(use_dora=True), "use_dora is True"),
    "saved modules": (edit(modules_to_save=["lm_head"]), "modules_to_save"),
    "rank zero": (edit(r=0), "r is 0"),
    "rank is true": (edit(r=True), "r is True"),
    "rank is text": (edit(r="5"), "r is '5'"),
    "other rank": (edit(r=6), "is needed: the adapter is for another model"),
    "alpha": (edit(lora_alpha=float("nan")), "lora_alpha is nan"),
    "empty": (rewrite(lambda tensors: {}), "has no weights"),
    "half": (rewrite(lambda t: without(t, "layers.0.mamba.in_proj.lora_B.weight")), "has half an adapter"),
    "unknown layer": (rewrite(lambda t: t | {f"{PREFIX}layers.99.linear.lora_A.weight": torch.zeros(5, 8)}), "no layer of this"),
    "not a number": (rewrite(lambda t: {n: v * float("nan") for n, v in t.items()}), "not finite"),
    "whole numbers": (rewrite(lambda t: {n: v.to(torch.int32) for n, v in t.items()}), "is I32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_adapters_are_named(folder, tmp_path, name):
    """What is wrong with an adapter's files is one sentence, and the engine goes on without it."""
    place = folder("2.7b")
    shutil.copytree(place / "adapter", tmp_path / "adapter")
    spoil, sentence = BAD[name]
    spoil(tmp_path / "adapter")
    engine = backend(place)
    with pytest.raises(Zamba2Error) as error:
        engine.load_adapter(tmp_path / "adapter", "a")
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert np.isfinite(logits(engine)).all()


def test_an_adapter_of_another_model_is_refused(folder):
    """Sizes that do not fit the model are an error that says so."""
    with pytest.raises(Zamba2Error, match=r"another model|no layer of this model"):
        backend(folder("2.7b")).load_adapter(folder("7b") / "adapter", "a")


BEGINNINGS = {"pissa": False, "olora": False, "loftq": False, "gaussian": True, False: True, None: True}


@pytest.mark.parametrize(("begun", "good"), BEGINNINGS.items())
def test_adapters_that_changed_the_model_are_refused(folder, tmp_path, begun, good):
    """Where an adapter's beginning took something out of the model's own weights, it is no addition to them."""
    place = folder("2.7b")
    shutil.copytree(place / "adapter", tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings | {"init_lora_weights": begun}))
    if good:
        backend(place, adapter=tmp_path / "adapter")
        return
    with pytest.raises(Zamba2Error, match="changes the model's own weights"):
        backend(place, adapter=tmp_path / "adapter")
