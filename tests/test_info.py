"""``zamba2 info``: its numbers are the config's, its drawing is the layer plan, and it never needs the weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zamba2 import _engine
from zamba2.cli import run
from zamba2.commands.info import draw
from zamba2.config import PRESETS, Config
from zamba2.runtime.processors import versions
from zamba2.weights.formats import FORMATS
from zamba2.weights.hub import RANDOM
from zamba2.weights.packed import bytes_per_token, parts, quantize

PARAMETERS = {"1.2b": 1_215_064_704, "2.7b": 2_662_214_560, "7b": 7_356_749_648}  # of the published checkpoints


def info(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(["info", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    out = info(capsys, *arguments, "--json")
    assert out.count("\n") == 1 and out.endswith("\n")
    data: dict[str, Any] = json.loads(out)
    return data


@pytest.mark.parametrize("name", PRESETS)
def test_json_numbers_are_the_configs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every number of the document is computed by Config, and the document's config is that Config."""
    data, config = document(capsys, name), PRESETS[name]
    assert Config.from_dict(data.pop("config")) == config
    assert data.pop("machine").keys() == {"native_engine", "instruction_sets", "instruction_set", "threads"}
    assert data.pop("runs").keys() == {"backend", "format", "weight_bytes_per_token"}
    layers = data.pop("layers")
    assert [(layer["index"], layer["position"], layer["block"]) for layer in layers] == [
        (layer.index, layer.position, layer.block) for layer in config.layers
    ]
    assert data == {
        "parameters": config.num_parameters,
        "weights_per_token": config.weights_per_token(hoisted=False),
        "weights_per_token_hoisted": config.weights_per_token(),
        "weight_bytes_per_token_bfloat16": 2 * config.weights_per_token(),
        "kv_bytes_per_token_bfloat16": config.kv_bytes_per_token(),
        "ssm_state_bytes": config.ssm_state_bytes,
        "conv_state_bytes_float32": config.conv_state_bytes(),
    }


def test_known_figures(capsys: pytest.CaptureFixture[str]) -> None:
    """The shapes have the published checkpoints' parameters, and 2.7B the figures below."""
    assert {name: document(capsys, name)["parameters"] for name in PRESETS} == PARAMETERS
    data = document(capsys, "2.7b")
    assert round(data["weights_per_token"] / 1e9, 3) == 3.855 and round(data["weights_per_token_hoisted"] / 1e9, 2) == 3.58
    assert data["kv_bytes_per_token_bfloat16"] == 180 * 1024
    assert round((data["ssm_state_bytes"] + data["conv_state_bytes_float32"]) / 2**20, 1) == 70.7


@pytest.mark.parametrize("name", [*PRESETS, "random"])
def test_drawing_is_the_layer_plan(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One mark per layer in order, a letter exactly at the hybrid layers, lines numbered by their first layer."""
    config = PRESETS.get(name) or Config.from_file(RANDOM / "config.json")
    lines = [line for line in info(capsys, name).splitlines() if re.fullmatch(r" +\d+(  [·A-Z]|( [·A-Z]))+", line)]
    marks: list[str] = []
    for line in lines:
        number, *rest = line.split()
        assert int(number) == len(marks)
        marks += rest
    expected = ["·"] * config.num_hidden_layers
    for position, layer in enumerate(config.hybrid_layer_ids):
        expected[layer] = "ABCD"[position % config.num_mem_blocks]
    assert marks == expected


def test_drawing_fits_a_terminal() -> None:
    """No line is wider than 80 characters, and a model without shared blocks is drawn without letters."""
    for config in PRESETS.values():
        assert max(map(len, draw(config).splitlines())) <= 80
        assert draw(config).splitlines()[-1].strip().startswith("· Mamba2 layer   A")
    alone = Config.from_dict(PRESETS["2.7b"].to_dict() | {"hybrid_layer_ids": [], "layers_block_type": ["mamba"] * 54})
    assert draw(alone).splitlines()[-1].strip() == "· Mamba2 layer"
    assert set("".join(draw(alone).splitlines()[:-1])) <= set(" ·0123456789")


def test_tables_say_what_the_document_says(capsys: pytest.CaptureFixture[str]) -> None:
    """The table rounds the document's numbers and repeats none wrongly."""
    text, config = info(capsys, "7b"), PRESETS["7b"]
    assert f"{config.num_parameters:,}" in text
    assert f"{config.weights_per_token() / 1e9:.4g} G ({config.weights_per_token(hoisted=False) / 1e9:.4g} G" in text
    assert f"{2 * config.num_parameters / 1e9:.3g} GB" in text
    for size in (config.ssm_state_bytes, config.conv_state_bytes()):
        assert f"{size / 2**20:.3g} MiB per sequence" in text
    assert f"{config.kv_bytes_per_token() / 1024:.0f} KiB per token" in text
    for words in ("81, 13 of them hybrid", "112 heads x 64, state 64, 2 group(s)", "32 heads x 224", "4096 tokens", "base 10000"):
        assert words in text


@pytest.mark.parametrize("name", ["demo", "random", "7b"])
def test_no_size_is_rounded_to_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes of models of any size have their first digits."""
    found = re.findall(r"([\d.]+) (?:G|GB|MiB|KiB)\b", info(capsys, name))
    assert len(found) >= 7 and all(float(number) > 0 for number in found)


@pytest.mark.parametrize("name", ["random", str(RANDOM)])
def test_a_checkpoint_is_described_with_its_files(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder's files and bytes are told; the default model is found by name."""
    data = document(capsys, name)
    size = (RANDOM / "model.safetensors").stat().st_size
    assert data["checkpoint"] == {"path": str(RANDOM), "files": ["model.safetensors"], "bytes": size}
    assert str(RANDOM) in "".join(info(capsys, name).split())


@pytest.mark.parametrize("left", [1000, 0])
def test_weights_are_not_read(left: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint whose weights are cut off or empty is described like a whole one."""
    folder = tmp_path / "model"
    shutil.copytree(RANDOM, folder)
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(left)
    data, whole = document(capsys, str(folder)), document(capsys, "random")
    assert data.pop("checkpoint")["bytes"] == left and whole.pop("checkpoint")["bytes"] > left
    assert data == whole


def test_a_folder_wins_over_a_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder called 2.7b here is described itself; elsewhere the name, in either case, is the published shape."""
    assert document(capsys, "2.7B") == document(capsys, "2.7b")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(RANDOM, tmp_path / "2.7b")
    assert document(capsys, "2.7b")["config"]["hidden_size"] == 64


def test_a_revision_is_not_that_of_a_shape(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With a revision a short name is its repository on the Hub, as in every other command."""
    asked: list[tuple[str, Any]] = []

    def resolve(model: str, *, revision: str | None, **_: object) -> Path:
        asked.append((model, revision))
        return RANDOM

    monkeypatch.setattr("zamba2.commands.info.resolve", resolve)
    assert document(capsys, "2.7b", "--revision", "v2")["config"]["hidden_size"] == 64
    assert asked == [("2.7b", "v2")]


def test_a_folder_of_a_standalone_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that stands for its one .pt file is described as that, which PyTorch runs."""
    shutil.copy(RANDOM / "config.json", tmp_path)
    (tmp_path / "a.pt").write_bytes(bytes(10))
    data = document(capsys, str(tmp_path))
    assert data["checkpoint"] == {"path": str(tmp_path / "a.pt"), "files": ["a.pt"], "bytes": 10}
    assert data["runs"]["backend"] == "torch"


# Weights that a token applies are at 4.5, 8.5 or 16 bits, but for vectors in fp32 and what blocks of 16 rows and 32 inputs add.
@pytest.mark.parametrize("name", PRESETS)
def test_bytes_per_token(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A published shape would run on the native engine in q4: its weights per token at 4.5 bits, but for the embeddings' 8.5."""
    runs, config = document(capsys, name)["runs"], PRESETS[name]
    assert (runs["backend"], runs["format"]) == ("native", "q4")
    expected = (config.weights_per_token() * 4.5 + config.vocab_size * config.hidden_size * 4) / 8
    assert runs["weight_bytes_per_token"] == pytest.approx(expected, rel=5e-3)
    assert "the native engine, q4" in info(capsys, name)


@pytest.mark.parametrize("tied", [True, False])
def test_every_matrix_is_counted_as_often_as_it_is_read(tied: bool) -> None:
    """With one byte a weight, bytes per token are the config's weights per token; an untied embedding is not read."""
    config = Config.from_dict(PRESETS["1.2b"].to_dict() | {"num_mem_blocks": 2, "tie_word_embeddings": tied})
    assert bytes_per_token(config, {part.name: part.count for part in parts(config)}) == config.weights_per_token()


def test_machine_is_what_the_engine_finds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Instruction sets, the one in use and threads are the engine's, ZAMBA2_ISA and ZAMBA2_THREADS included; bad ones are refused."""
    monkeypatch.setenv("ZAMBA2_ISA", "scalar")
    monkeypatch.setenv("ZAMBA2_THREADS", "3")
    machine = document(capsys, "2.7b")["machine"]
    assert machine == {
        "native_engine": "installed", "instruction_sets": _engine.available(), "instruction_set": "scalar", "threads": 3,
    }  # fmt: skip
    shown = " ".join(info(capsys, "2.7b").split())  # a narrow terminal wraps it
    assert f"scalar (here: {', '.join(_engine.available())})" in shown
    monkeypatch.setenv("ZAMBA2_ISA", "sse")
    assert run(["info", "2.7b"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "ZAMBA2_ISA is 'sse'" in err


@pytest.mark.parametrize("format", FORMATS)
def test_packed_checkpoint(format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A packed checkpoint's format and bytes per token are told, the latter from its own file."""
    quantize(RANDOM, tmp_path / "packed", FORMATS[format])
    runs = document(capsys, str(tmp_path / "packed"))["runs"]
    assert (runs["backend"], runs["format"]) == ("native", format)
    config = Config.from_file(RANDOM / "config.json")
    assert runs["weight_bytes_per_token"] == pytest.approx(config.weights_per_token() * FORMATS[format].bits / 8, rel=0.3)
    assert f"read per token in {format}" in info(capsys, str(tmp_path / "packed"))


def test_versions_of_what_is_there() -> None:
    """Results name what is installed, and leave out what is not: zamba2 itself may be a folder on the path."""
    assert versions("numpy", "no-such-distribution") == {"numpy": np.__version__}
