"""Calibration: the algorithm against its definition, what the engine shows of its products, the command, and what is gained."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from native_cases import CONFIGS, ISAS, as_twin, native, rounds_attention, twin
from strategies import random_tokens
from torch import Tensor
from torch.nn import functional as F

from zamba2.cli import run
from zamba2.config import Config
from zamba2.model import model as model_module
from zamba2.runtime import calibrate
from zamba2.runtime.calibrate import FEWEST_TOKENS, second_moments
from zamba2.runtime.native import PREFILL_CHUNK
from zamba2.weights import calibration
from zamba2.weights.calibration import Moments, correct, factor
from zamba2.weights.files import TensorFile
from zamba2.weights.formats import FORMATS, GROUP, Format, best_scales, pack, rounded, unpack, widened
from zamba2.weights.hub import RANDOM
from zamba2.weights.packed import parts

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import quality

INTEGERS = pytest.mark.parametrize("format", [FORMATS["q8"], FORMATS["q4"]], ids=["q8", "q4"])
WORDS = Path(__file__).resolve().parents[1] / "LICENSE"  # a text that is always there


def ids(config: Config, length: int) -> np.ndarray:
    return random_tokens(config, 3, length).numpy().astype(np.int32)


def correlated(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """Inputs (rows, cols) of a few common causes, some of them far larger than the rest."""
    rng = np.random.default_rng(seed)
    causes = rng.standard_normal((rows, max(2, cols // 4))) @ rng.standard_normal((max(2, cols // 4), cols))
    return ((causes + 0.3 * rng.standard_normal((rows, cols))) * np.exp(rng.standard_normal(cols))).astype(np.float32)


# ---- the algorithm --------------------------------------------------------------------------------------------------------


@INTEGERS
def test_independent_inputs_change_nothing(format: Format) -> None:
    """With inputs that were never seen, or are independent and alike, rounding is ``quantize``'s to the bit."""
    weights = np.random.default_rng(1).standard_normal((20, 1100)).astype(np.float32)
    moments = Moments(1100)
    assert np.array_equal(pack(weights, format, moments.rounding()), pack(weights, format))
    for block in moments.blocks:
        block[np.diag_indices_from(block)] = 4
    assert np.array_equal(pack(weights, format, moments.rounding()), pack(weights, format))


def surgeon(weights: np.ndarray, H: np.ndarray, scales: np.ndarray, format: Format) -> np.ndarray:
    """Codes by the definition (optimal brain surgeon in a fixed order, fp64): after each weight the rest moves to the least of
    the loss, and the inverse of H loses its row and column by one step of elimination."""
    w, inverse = weights.astype(np.float64).copy(), np.linalg.inv(H)
    codes = np.zeros_like(w)
    for j in range(w.shape[1]):
        scale = scales[:, j // GROUP].astype(np.float64)
        ratio = np.divide(w[:, j], scale, out=np.zeros_like(scale), where=scale != 0)
        codes[:, j] = np.clip(np.rint(ratio), format.smallest, format.largest)
        w -= np.outer((w[:, j] - codes[:, j] * scale) / inverse[j, j], inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@INTEGERS
@pytest.mark.parametrize("cols", [32, 96, 200])
def test_equals_its_definition(cols: int, format: Format) -> None:
    """Given the scales, codes are those of the optimal brain surgeon, but for numbers so near a tie that fp32 and fp64 disagree."""
    weights, x = np.random.default_rng(2).standard_normal((64, cols)).astype(np.float32), correlated(500, cols)
    H = (x.T @ x).astype(np.float64)
    padded = np.zeros((64, -(-cols // GROUP) * GROUP), np.float32)
    padded[:, :cols] = weights
    codes, scales = correct(padded.reshape(64, -1, GROUP), format, [factor(x.T @ x)])
    H[np.diag_indices(cols)] += calibration.DAMPING * np.trace(H) / cols
    expected = surgeon(weights, H, scales, format)
    found = codes.reshape(64, -1)
    assert not found[:, cols:].any()
    rows = (found[:, :cols] != expected).any(1)  # one tie changes what follows it
    assert rows.mean() <= (0.1 if format.name == "q4" else 0.5), rows.mean()
    assert np.abs(found[:, :cols] - expected)[~rows].max() == 0


@INTEGERS
@pytest.mark.parametrize("cols", [33, 100, calibration.SPAN, calibration.SPAN + 40])
def test_outputs_suffer_less(cols: int, format: Format) -> None:
    """On correlated inputs the squared error of the products is at most half of that after plain rounding, also for inputs
    that calibration did not see."""
    weights, seen, unseen = (np.random.default_rng(3).standard_normal((48, cols)).astype(np.float32), *np.split(correlated(6000, cols), 2))
    moments = Moments(cols)
    for part in np.array_split(seen, 3):
        moments.add(part)
    own = unpack(pack(weights, format, moments.rounding()), 48, cols, format)
    plain = unpack(pack(weights, format), 48, cols, format)
    for x in (seen, unseen):
        assert (((own - weights) @ x.T) ** 2).sum() <= 0.5 * (((plain - weights) @ x.T) ** 2).sum()


def test_moments_are_kept_block_by_block() -> None:
    """Of inputs wider than two blocks each block has its own columns' products, of all rows, and the last one what is left."""
    x, moments = correlated(40, 2 * calibration.SPAN + 33), Moments(2 * calibration.SPAN + 33)
    for part in np.array_split(x, 2):
        moments.add(part)
    spans = np.split(x, [calibration.SPAN, 2 * calibration.SPAN], axis=1)
    for block, own in zip(moments.blocks, spans, strict=True):
        np.testing.assert_allclose(block, own.T @ own, rtol=1e-3, atol=1e-5 * np.abs(block).max())


def test_importance_chooses_scales() -> None:
    """By scales of least weighed error no group has more of it than by those of least error, and all together less than half."""
    rng, q4 = np.random.default_rng(4), FORMATS["q4"]
    columns = rng.standard_normal((GROUP, 400)).astype(np.float32)
    importance = np.exp(2 * rng.standard_normal((GROUP, 1))).astype(np.float32)

    def errors(scales: np.ndarray) -> np.ndarray:
        wide, inverse = widened(scales)
        return (importance * (columns - rounded(columns, inverse, q4) * wide) ** 2).sum(0)

    weighed, plain = errors(best_scales(columns, q4, importance)), errors(best_scales(columns, q4))
    assert (weighed <= plain).mean() >= 0.95 and weighed.sum() <= 0.5 * plain.sum()


# ---- what the engine shows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["1.2b", "2.7b", "gqa", "odd"])
def test_moments_are_of_the_models_own_inputs(name: str) -> None:
    """Each matrix but the embeddings is seen once for each of its products, with the inputs that the PyTorch model's has."""
    config, tokens = CONFIGS[name], ids(CONFIGS[name], 300)
    exact = [isa for isa in ISAS if not rounds_attention(isa)][-1]  # the PyTorch model here does not round
    found = second_moments(native(config, "bf16", exact), tokens)
    plan = {part.name: part for part in parts(config) if part.is_matrix and part.name not in ("embed_tokens.weight", "lm_head.weight")}
    assert set(found) == set(plan)
    model = twin(config, "bf16")
    inputs: dict[int, list[Tensor]] = {}

    def record(x: Tensor, weight: Tensor) -> Tensor:
        inputs.setdefault(weight.data_ptr(), []).append(x[0])
        return F.linear(x, weight)

    with as_twin("bf16"), mock.patch.object(model_module, "matmul", record):
        model.hidden_states(torch.from_numpy(tokens)[None].long(), state=model.new_state())
    for part in plan.values():
        block, halves = part.name.partition(".self_attn.qkv_proj.")[0], part.half is not None
        weight = model.get_submodule(block).self_attn.split[part.half] if halves else model.get_parameter(part.name)
        x = torch.cat(inputs[weight.data_ptr()])
        (moment,) = found[part.name].blocks
        expected = (x.T @ x).numpy()
        assert np.abs(moment - expected).max() <= 2e-3 * np.abs(expected).max(), part.name


def test_a_long_text_is_read_in_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a context's tokens a new state begins, so the sums are those of its parts read alone; progress ends at the text's length."""
    config = CONFIGS["2.7b"]
    backend, tokens = native(config, "q8"), ids(config, PREFILL_CHUNK + 20)
    progress: list[tuple[int, int]] = []
    monkeypatch.setattr(calibrate, "CONTEXT", PREFILL_CHUNK)
    whole = second_moments(backend, tokens, progress=lambda *now: progress.append(now))
    apart = [second_moments(backend, part) for part in (tokens[:PREFILL_CHUNK], tokens[PREFILL_CHUNK:])]
    assert progress == [(PREFILL_CHUNK, len(tokens)), (len(tokens), len(tokens))]
    for name, moments in whole.items():
        for block, one, other in zip(moments.blocks, *(part[name].blocks for part in apart), strict=True):
            np.testing.assert_allclose(block, one + other, rtol=1e-4, atol=1e-5 * np.abs(block).max())


def test_observing_ends() -> None:
    """Reading a text for its moments leaves the backend as it was; an exception while observing comes out, and ends it too."""
    config = CONFIGS["2.7b"]
    backend, tokens = native(config, "q4"), ids(config, 300)
    found = second_moments(backend, tokens)
    again = second_moments(backend, tokens)
    assert all(np.array_equal(a, b) for name in found for a, b in zip(found[name].blocks, again[name].blocks, strict=True))
    with mock.patch.object(Moments, "add", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        second_moments(backend, tokens)
    with mock.patch.object(Moments, "add", side_effect=AssertionError("still observed")):
        backend.engine.forward([backend.engine.new_state()], [ids(config, 20)], [1])


# ---- the command ----------------------------------------------------------------------------------------------------------


def about(folder: Path) -> dict[str, object]:
    result: dict[str, object] = json.loads(TensorFile(folder / "model.safetensors").metadata["zamba2"])
    return result


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--calibrate gives another file of the same size and layout that says so and runs; --embeddings is recorded; nothing else is left."""
    sizes = {}
    for name, options in {
        "plain": [], "calibrated": ["--calibrate", str(WORDS)], "q4": ["--embeddings", "q4"], "bf16": ["--embeddings", "bf16"],
    }.items():  # fmt: skip
        assert run(["quantize", str(RANDOM), str(tmp_path / name), *options]) == 0, capsys.readouterr().err
        assert run(["generate", "hi", "-n", "2", "--model", str(tmp_path / name)]) == 0
        found = about(tmp_path / name)
        assert (found["format"], found["embeddings"]) == ("q4", name if name in FORMATS else "q8")
        assert found["calibrated"] == (name == "calibrated")
        sizes[name] = (tmp_path / name / "model.safetensors").stat().st_size
    assert abs(sizes["plain"] - sizes["calibrated"]) <= 64  # the header says "true" in place of "false"
    assert sizes["q4"] < sizes["plain"] < sizes["bf16"]
    plain, calibrated = (TensorFile(tmp_path / name / "model.safetensors") for name in ("plain", "calibrated"))
    config = Config.from_file(RANDOM / "config.json")
    for part in parts(config):
        same = bytes(plain.read(part.name)) == bytes(calibrated.read(part.name))
        assert same != (part.is_matrix and part.name != "embed_tokens.weight"), part.name
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(sizes)


def test_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that is too short, missing or no text, no tokenizer, bf16, an unknown format and Ctrl-C: one sentence, nothing left."""
    short, noise, bare, target = (tmp_path / name for name in ("short", "noise", "bare", "target"))
    short.write_text("one two three")
    noise.write_bytes(bytes(range(128, 256)))
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(RANDOM / name)
    before = sorted(tmp_path.rglob("*"))

    def refused(message: str, *arguments: str) -> None:
        capsys.readouterr()
        assert run(["quantize", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and message in err, err
        assert sorted(tmp_path.rglob("*")) == before

    plain, text = [str(RANDOM), str(target)], ["--calibrate", str(WORDS)]
    refused(f"at least {FEWEST_TOKENS} are needed", *plain, "--calibrate", str(short))
    refused(f"at least {FEWEST_TOKENS} are needed", *plain, *text, "--calibrate-tokens", "100")
    refused("not UTF-8", *plain, "--calibrate", str(noise))
    refused("nothing", *plain, "--calibrate", str(tmp_path / "nothing"))
    refused("no tokenizer.json", str(bare), str(target), *text)
    refused("hardly rounded", *plain, *text, "--format", "bf16")
    refused("there is no format 'q3'", *plain, "--embeddings", "q3")
    monkeypatch.setattr(Moments, "add", mock.Mock(side_effect=KeyboardInterrupt))
    refused("interrupted", *plain, *text)


# ---- what is gained -------------------------------------------------------------------------------------------------------


def check_ratios(ratios: dict[str, float]) -> None:
    """KL divergences of q8 and q4 are at most 1.05 of llama.cpp's Q8_0 and Q4_0 rounding at the same bits, calibrated q4 has at most
    0.7 of plain q4's, and q8 embeddings at most 0.8 of q4 embeddings'."""
    assert ratios["q8 / Q8_0"] <= 1.05
    assert ratios["q4 / Q4_0"] <= 1.05
    assert ratios["q4 / Q4_0, embeddings in the same format"] <= 1.05
    assert ratios["q4 calibrated / q4"] <= 0.7
    assert ratios["embeddings q8 / q4"] <= 0.8


def test_quality(tmp_path: Path) -> None:
    """The claims (``check_ratios``) hold on heavy-tailed weights of a small shape, on random tokens."""
    small = replace(
        quality.SYNTHETIC, hidden_size=128, n_mamba_heads=4, num_attention_heads=4, num_key_value_heads=4, intermediate_size=256,
        vocab_size=1024, num_hidden_layers=6, hybrid_layer_ids=(1, 3, 5),
    )  # fmt: skip
    tokens = np.random.default_rng(5).integers(3, 1024, 1700).astype(np.int32)
    check_ratios(quality.measure(quality.synthetic(small), tmp_path, tokens[:200], tokens[200:], threads=1)["ratios"])


@pytest.mark.slow
@pytest.mark.skipif(not quality.SHARED.exists(), reason=f"{quality.SHARED} (novels and the real tokenizer) is absent")
def test_quality_on_a_novel(tmp_path: Path) -> None:
    """The claims (``check_ratios``) hold on the script's own heavy-tailed model, which reads a novel through the real tokenizer."""
    read, seen = (
        np.array(quality.tokens_of(quality.novel(name), quality.TOKENIZER)[:count], dtype=np.int32)
        for name, count in ((quality.MEASURED_ON, 400), (quality.CALIBRATED_ON, 3000))
    )
    check_ratios(quality.measure(quality.synthetic(quality.SYNTHETIC), tmp_path, read, seen)["ratios"])
