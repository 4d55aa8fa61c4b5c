"""The benchmark on tiny shapes: what it prints, what it counts, what bounds it, and what it refuses in one line."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from native_cases import CONFIGS, ISAS

from zamba2 import _engine
from zamba2.bench import measure
from zamba2.bench.peers import Worker, need_disk
from zamba2.cli import run
from zamba2.commands.bench import medians, need_memory, summary
from zamba2.config import PRESETS, Config
from zamba2.errors import Zamba2Error
from zamba2.runtime.backend import Row
from zamba2.runtime.native import NativeBackend
from zamba2.weights.formats import FORMATS, KV_FORMATS, unpack
from zamba2.weights.hub import RANDOM
from zamba2.weights.packed import Packing, parts
from zamba2.weights.synthetic import packed_bytes, write_synthetic

KEYS = (
    "decode_tokens_per_second", "prefill_tokens_per_second", "ttft_seconds", "load_seconds", "peak_rss_bytes", "bytes_per_token",
    "read_bandwidth_bytes_per_second", "decode_bandwidth_fraction", "prefill_matrix_fraction",
)  # fmt: skip
QUICK = ("bench", "--shape", "random", "--prompt-tokens", "20", "--new-tokens", "2", "--repeats", "1", "--threads", "1")


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], list[str]]:
    """The JSON document of a quick run, and the lines before it."""
    assert run([*QUICK, *arguments]) == 0, capsys.readouterr().err
    *before, last = capsys.readouterr().out.splitlines()
    return json.loads(last), before


@pytest.mark.parametrize("format", FORMATS)
def test_json_alone_and_complete(capsys: pytest.CaptureFixture[str], format: str) -> None:
    """Every figure is there and finite; the fractions are what the others say they are, and lie between 0 and 1.2."""
    result, before = bench(capsys, "--json", "--format", format)
    assert before == [] and result["format"] == format and result["rivals"] == {}
    assert all(math.isfinite(result[key]) and result[key] > 0 for key in KEYS)
    read = result["decode_tokens_per_second"] * result["bytes_per_token"]
    assert result["decode_bandwidth_fraction"] == pytest.approx(read / result["read_bandwidth_bytes_per_second"])
    assert 0 < result["decode_bandwidth_fraction"] < 1.2 and 0 < result["prefill_matrix_fraction"] < 1.2
    assert result["matrix_kind"] in result["product_rates"]
    assert {"machine", "isa", "threads", "spreads"} <= set(result)


def test_table_then_json_and_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Without --json a table comes first; --out holds the same document; weights are made once; start to first token adds up."""
    result, before = bench(capsys, "--out", str(tmp_path / "bench.json"), "--startup")
    assert any("decode" in line for line in before)
    assert json.loads((tmp_path / "bench.json").read_text()) == result
    steps = result["startup"]
    assert steps["prompt_tokens"] == 20
    shares = sum(steps[f"{name}_seconds"] for name in ("interpreter", "imports", "load", "prompt"))
    assert shares == pytest.approx(steps["total_seconds"])
    assert run([*QUICK, "--json"]) == 0 and "writing" not in capsys.readouterr().err


def test_keys_and_values_in_8_bits(capsys: pytest.CaptureFixture[str]) -> None:
    """--kv-format is what the engine keeps and what is counted."""
    plain, codes = bench(capsys, "--json")[0], bench(capsys, "--json", "--kv-format", "q8")[0]
    assert (plain["kv_format"], codes["kv_format"]) == ("bf16", "q8")
    assert plain["kv_bytes_per_token"] / 2 < codes["kv_bytes_per_token"] < plain["kv_bytes_per_token"]
    assert codes["sequence_bytes"] < plain["sequence_bytes"]
    # Of the 20 tokens of the prompt, and 1 or 2 behind them: the middle of the decoding.
    assert plain["kv_bytes_per_token"] == 21.5 * measure.kv_bytes_per_token(Config.from_file(RANDOM / "config.json"), KV_FORMATS["bf16"])


def test_a_batch_shares_the_weights(capsys: pytest.CaptureFixture[str]) -> None:
    """With B sequences a token's share of the weights is a B-th; its state and keys and values are its own."""
    one, three = bench(capsys, "--json")[0], bench(capsys, "--json", "--batch", "3")[0]
    assert three["weight_bytes_per_token"] == pytest.approx(one["weight_bytes_per_token"] / 3)
    assert (three["state_bytes_per_token"], three["kv_bytes_per_token"]) == (one["state_bytes_per_token"], one["kv_bytes_per_token"])
    assert three["sequence_bytes"] == one["sequence_bytes"]


def test_a_real_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    """--model packs a checkpoint as the user's own load does, and measures that."""
    options = ("--prompt-tokens", "9", "--new-tokens", "1", "--repeats", "1", "--json")
    assert run(["bench", "--model", "random", "--format", "q8", *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["weights"], result["format"], result["model"]) == ("checkpoint", "q8", "random")


def test_a_standalone_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The native engine runs no .pt file, named itself or as the one in its folder: said before anything is packed."""
    shutil.copy(RANDOM / "config.json", tmp_path)
    (tmp_path / "a.pt").touch()
    for model in (tmp_path / "a.pt", tmp_path):
        assert run(["bench", "--model", str(model)]) == 2
        assert capsys.readouterr().err == f"zamba2: {tmp_path / 'a.pt'} is a standalone file; save it in the Hub's layout to pack it.\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "3b"], "there is no shape '3b'; there are 1.2b, 2.7b, 7b, random, or a folder with a config.json"),
        (["--format", "q5"], "there is no format 'q5'"),
        (["--batch", "0"], "Invalid value for '--batch': 0 is not in the range x>=1"),
        (["--repeats", "-1"], "Invalid value for '--repeats': -1 is not in the range x>=1"),
        (["--threads", "0"], "Invalid value for '--threads': 0 is not in the range 1<=x<=1024"),
        (["--compare", "ollama"], "--compare is 'ollama'; there are transformers, transformers-fp32, llama.cpp"),
        (["--compare", "llama.cpp"], "llama.cpp is not built; build it from the repository with: python scripts/llama_cpp.py install"),
        (["--compare", "llama.cpp", "--batch", "2"], "--compare measures one sequence"),
        (["--model", "random"], "--shape and --model were both given"),
        (["--device", "gpu"], "device 'gpu' cannot be used"),
        (["--device", "cpu:0"], "--device is 'cpu:0'; cpu, or cuda for a GPU, is needed"),
    ],
)
def test_bad_options_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    """What cannot be measured is refused with exit code 2, before anything runs."""
    assert run([*QUICK, *arguments]) == 2
    found = capsys.readouterr()
    assert found.out == "" and said in found.err.splitlines()[-1]


def test_too_little_room_says_how_much_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Disk and memory, the rivals' too, are asked for before anything is written or loaded."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(Zamba2Error, match=r"needs 5\.3 GB and .* has 1\.0 GB free"):
        need_disk(tmp_path / "not" / "there", 5.3e9)
    with pytest.raises(Zamba2Error, match=r"needs 1000000000\.0 GB of memory"):
        need_memory(1e18)
    asked: list[float] = []

    def need(nbytes: float) -> None:
        asked.append(nbytes)
        raise Zamba2Error("enough")

    monkeypatch.undo()
    monkeypatch.setattr("zamba2.commands.bench.need_memory", need)
    for options in (["--batch", "1"], ["--batch", "3"], ["--compare", "transformers-fp32"], ["--compare", "llama.cpp"]):
        assert run([*QUICK, *options]) == 2
    config = Config.from_file(RANDOM / "config.json")
    kv = measure.kv_bytes_per_token(config, KV_FORMATS["bf16"])
    assert asked[1] - asked[0] == 2 * 22 * kv  # each sequence has keys and values of its own
    assert asked[2] - asked[0] > 4 * config.num_parameters and asked[3] - asked[0] > config.weights_per_token(hoisted=False)


def test_what_a_gpu_is_measured_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child that measures PyTorch says, here of a CPU, all that the result of a GPU is made of."""
    monkeypatch.setattr(sys, "stdin", iter(["warm\n", "repeat\n", "limits\n"]))
    request = {"path": str(RANDOM), "device": "cpu", "prompt_tokens": 9, "new_tokens": 2, "batch": 2}
    ready, _, found, limits = measure.serve_torch(request)
    result = summary(ready, [found], [limits], 2)
    assert result["format"] == "bf16"
    for key in ("decode_tokens_per_second", "ttft_seconds", "decode_bandwidth_fraction", "prefill_matrix_fraction", "bytes_per_token"):
        assert math.isfinite(result[key]) and result[key] > 0, key
    config = Config.from_file(RANDOM / "config.json")
    kv = measure.kv_bytes_per_token(config, KV_FORMATS["bf16"])
    assert (ready["decode_bytes"]["weights"], ready["decode_bytes"]["keys_and_values"]) == (2 * config.weights_per_token(), 10.5 * kv)
    assert result["prefill_operations_per_second"] == pytest.approx(2 * ready["prefill_operations"] / result["ttft_seconds"])
    better = limits | {"read_bandwidth": 2 * limits["read_bandwidth"]}  # the best of all rounds is what counts
    assert summary(ready, [found] * 2, [better, limits], 2)["read_bandwidth_bytes_per_second"] == better["read_bandwidth"]
    clock, costs = [0.0], iter([100.0, 90.0, 3.0, 1.0, 2.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    assert measure.median_seconds(lambda: clock.append(clock.pop() + next(costs)), "cpu", repeats=3) == 2.0  # two warm up
    monkeypatch.setattr(measure, "median_seconds", lambda *_: 0.5)
    best = measure.gpu_limits("cpu")
    assert best["read_bandwidth"] == 4 * 2**20 and best["product_rates"] == {measure.GPU_PRODUCTS: 4 * 256**3}  # read and written; twice


def test_probes_are_no_part_of_a_gpus_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held to measure the limits of a GPU is not counted as the model's memory; its state is counted in the model's dtype."""
    import torch

    import zamba2

    load, held = zamba2.load, {"now": 5, "most": 7}
    monkeypatch.setattr(zamba2, "load", lambda path, **_: load(path, backend="torch", device="cpu", dtype="bfloat16"))
    monkeypatch.setattr(measure, "device_name", lambda _: "a GPU")
    monkeypatch.setattr(measure, "gpu_limits", lambda _: held.update(most=99) or {})
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: held["most"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: held.update(most=held["now"]))
    monkeypatch.setattr(sys, "stdin", iter(["repeat\n", "limits\n", "repeat\n"]))
    request = {"path": str(RANDOM), "device": "cuda", "prompt_tokens": 9, "new_tokens": 2, "batch": 1}
    ready, first, _, second = measure.serve_torch(request)
    assert (first["peak_gpu_bytes"], second["peak_gpu_bytes"]) == (7, 5)
    config = Config.from_file(RANDOM / "config.json")
    assert ready["decode_bytes"]["state"] == 2 * (config.ssm_state_bytes + config.conv_state_bytes(2))


def test_prompts_are_the_same_each_time() -> None:
    """Random prompts differ from each other, and not from run to run; special tokens are not among them."""
    first, second = measure.random_ids(10, 2, 200)
    assert set(first.tolist()) == set(second.tolist()) == set(range(3, 10)) and first.tolist() != second.tolist()
    assert [ids.tolist() for ids in measure.random_ids(10, 2, 200)] == [first.tolist(), second.tolist()]
    assert measure.random_ids(2, 1, 5)[0].tolist() == [1] * 5


def test_rates_are_of_all_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens per second are those of the whole batch, from the first token on; of several runs the largest peak of memory counts."""
    ticks = itertools.count()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(ticks)))
    token = SimpleNamespace(likeliest=lambda: np.zeros(1, np.int32))
    backend = SimpleNamespace(new_state=lambda: SimpleNamespace(nbytes=5), forward=lambda rows: [token] * len(rows))
    found = measure.repeat(backend, [np.zeros(7, np.int32)] * 3, 4)
    assert (found["ttft_seconds"], found["prefill_tokens_per_second"], found["decode_tokens_per_second"]) == (1.0, 21.0, 12.0)
    assert found["state_bytes"] == 15
    both = medians([found | {"peak_rss_bytes": size} for size in (3, 9, 4)], {"load_seconds": 0.5})
    assert both["peak_rss_bytes"] == 9 and both["load_seconds"] == 0.5


@pytest.mark.parametrize("option", ["--kv-format q8", "--startup", "--compare llama.cpp"])
def test_options_of_the_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str) -> None:
    """What has no meaning on a GPU is named as it was written."""
    gpu = SimpleNamespace(device_for=lambda *_, **__: SimpleNamespace(type="cuda"))
    monkeypatch.setattr("zamba2.commands.bench.torch_backend", lambda: gpu)
    assert run([*QUICK, "--device", "cuda", *option.split()]) == 2
    assert f"{option.removesuffix(' q8')} is for the CPU" in capsys.readouterr().err


def test_a_bench_of_a_gpu_needs_pytorch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where PyTorch is not installed the sentence says how to install it."""
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run([*QUICK, "--device", "cuda"]) == 2
    assert "pip install 'zamba2[torch]'" in capsys.readouterr().err


def test_a_rival_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The sentence says what to install."""
    monkeypatch.setattr("zamba2.bench.peers.find_spec", lambda _: None)
    assert run([*QUICK, "--compare", "transformers"]) == 2
    assert "pip install 'zamba2[hf]'" in capsys.readouterr().err


def test_transformers_beside_us(capsys: pytest.CaptureFixture[str]) -> None:
    """The rival runs the same shape in a child of its own; ratios are ours over its own."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    result, _ = bench(capsys, "--json", "--compare", "transformers")
    rival = result["rivals"]["transformers"]
    for key, ratio in rival["ratios"].items():
        assert rival[key] > 0 and ratio == pytest.approx(result[key] / rival[key])
    assert set(rival["ratios"]) == {"decode_tokens_per_second", "prefill_tokens_per_second", "ttft_seconds", "peak_rss_bytes"}


def test_a_child_that_ends_is_a_sentence() -> None:
    """A worker that fails, or says why it cannot go on, ends the run with one line."""
    with pytest.raises(Zamba2Error, match="the process that measures x ended with exit code 3"):
        Worker("x", [sys.executable, "-c", "import sys; print('noise'); sys.exit(3)"])
    with pytest.raises(Zamba2Error, match="was stopped by the system, for want of memory"):
        Worker("x", ["sh", "-c", "kill -9 $$"])
    with pytest.raises(Zamba2Error, match="no room"):
        Worker("x", [sys.executable, "-c", """print('{"error": "no room"}')"""])


@pytest.mark.parametrize("isa", ISAS)
def test_probes(isa: str) -> None:
    """Every instruction set's probes give rates above zero, and the reading one has read every byte."""
    data = np.random.default_rng(0).integers(0, 256, 3 * 256 * 40, dtype=np.uint8)
    rate, pattern, total = _engine.read_bandwidth(data, 3, isa)
    assert 0 < rate < math.inf and pattern
    assert total == int(np.bitwise_xor.reduce(data.view(np.uint64)))
    rates = dict(_engine.product_rates(1, isa))
    assert all(0 < value < math.inf for value in rates.values())
    for format in FORMATS:
        assert measure.product_kind(isa, format) in rates and measure.product_kind("amx", format) == "bf16 tiles"


@pytest.mark.parametrize("shape", PRESETS)
def test_bytes_of_a_token(shape: str) -> None:
    """The weights counted are those that the config's own formula says a token applies; the rest are the state's sizes."""
    config = PRESETS[shape]
    counts: Any = SimpleNamespace(entries={part.name: SimpleNamespace(nbytes=part.count) for part in parts(config)})
    found = measure.decode_bytes(counts, config, 100.0, KV_FORMATS["bf16"])
    assert found["weights"] == config.weights_per_token()
    assert found["state"] == 2 * (config.ssm_state_bytes + config.conv_state_bytes())
    assert found["keys_and_values"] == 100 * config.kv_bytes_per_token()
    head = config.vocab_size * config.hidden_size  # of a prompt, for its last token alone
    first, second = (measure.prefill_operations(config, length) for length in (1, 2))
    assert (first, second - first) == (2 * config.weights_per_token(), 2 * (config.weights_per_token() - head))
    codes = measure.decode_bytes(counts, config, 1.0, KV_FORMATS["q8"])["keys_and_values"]
    heads = 2 * len(config.hybrid_layer_ids) * config.num_key_value_heads
    assert codes == config.kv_bytes_per_token(1) + 4 * heads, "a byte each, and a scale of fp32 for every head"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["aligned", "odd"])
def test_synthetic_weights(tmp_path: Path, name: str, format: str) -> None:
    """They load by the user's own path, have mean 0 and a spread of 0.02, and give logits of normal size."""
    config = CONFIGS[name]
    write_synthetic(config, Packing.named(format), tmp_path / "packed")
    backend = NativeBackend(tmp_path / "packed", config, threads=1)
    total = sum(entry.nbytes for entry in backend.file.entries.values())
    assert total == packed_bytes(config, Packing.named(format))
    part = max((part for part in parts(config) if part.is_matrix and "layers" in part.name), key=lambda part: part.count)
    weights = unpack(np.frombuffer(backend.file.read(part.name), dtype=np.uint8), *part.shape, FORMATS[format])
    assert weights.std() == pytest.approx(0.02, rel=0.1) and abs(weights.mean()) < 0.002
    row = Row(np.arange(9, dtype=np.int32), backend.new_state(), logits=9)
    logits = backend.forward([row])[0].numpy()
    assert 0.01 < logits.std() < 10
