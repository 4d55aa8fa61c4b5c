"""Random damage to packed checkpoints and saved states, through ``zamba2.load`` and the native engine; run as a program.

    python tests/fuzz_native.py FOLDER [--engine FILE] [--rounds N] [--seed N]

Each round ends in Zamba2Error or in finite numbers; anything else ends the program. --engine: the module to test, such as a
build with sanitizers, in place of the installed one. FOLDER: where files are written. Prints counts as one JSON document.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

FORMATS = ("bf16", "q8", "q4")
# What a value in a config may become: zero, negative, odd, larger than the tensors, beyond 32 and 64 bits, no number.
HOSTILE = [
    0, -1, 1, 2, 3, 5, 7, 17, 64, 1023, 1 << 16, 1 << 21, 1 << 24, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 63,
    1e308, 0.5, "8", None, True, [],
]  # fmt: skip
EXTREME = [0x0000, 0x0001, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0xFFFF]  # fp16: zero, denormal, largest, infinities, NaN


def random_config(draw: random.Random) -> dict[str, Any]:
    """A miniature's config.json with sizes of all kinds."""
    heads, kv, groups, layers = draw.choice([1, 2, 3]), 1, draw.choice([1, 2]), draw.randint(1, 4)
    hybrid = sorted(draw.sample(range(layers), draw.randint(0, layers)))
    hidden = heads * draw.choice([2, 4, 16, 20])
    return {
        "model_type": "zamba2", "hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": draw.choice([5, 16, 40]),
        "hybrid_layer_ids": hybrid, "num_mem_blocks": draw.randint(1, max(1, len(hybrid))), "mamba_d_state": draw.choice([1, 5, 16, 20]),
        "n_mamba_heads": 2, "mamba_ngroups": groups, "mamba_d_conv": draw.choice([2, 3, 4]), "num_attention_heads": heads,
        "num_key_value_heads": kv, "intermediate_size": draw.choice([3, 16, 33]), "adapter_rank": draw.choice([1, 4, 17]),
        "use_mem_rope": draw.random() < 0.5, "use_shared_attention_adapter": heads == 1 and draw.random() < 0.5,
        "tie_word_embeddings": draw.random() < 0.5,
    }  # fmt: skip


class Checkpoint:
    """The parts of a packed folder, to be changed before they are written."""

    def __init__(self, draw: random.Random) -> None:
        from zamba2.config import Config
        from zamba2.weights.formats import FORMATS as TABLE
        from zamba2.weights.formats import pack
        from zamba2.weights.packed import VERSION, parts

        config = Config.from_dict(random_config(draw))
        rng = np.random.default_rng(draw.getrandbits(32))
        format = TABLE[draw.choice(FORMATS)]
        self.config = config.to_dict()
        self.about: Any = {
            "kind": "weights", "version": VERSION, "format": format.name, "embeddings": format.name, "config": dict(self.config),
        }  # fmt: skip
        self.tensors: dict[str, tuple[str, list[int], bytes]] = {}
        self.scales: dict[str, tuple[int, int, int]] = {}  # of a matrix: bytes of a block, where its scales begin, how many bytes
        for part in parts(config):
            values = rng.normal(0, 0.1, part.shape).astype(np.float32)
            data = pack(values, format).tobytes() if part.is_matrix else values.tobytes()
            shape = [len(data)] if part.is_matrix else list(part.shape)
            self.tensors[part.name] = ("U8" if part.is_matrix else "F32", shape, data)
            if part.is_matrix and format.scale_bytes:
                groups = -(-part.shape[1] // 32)
                self.scales[part.name] = (format.block_bytes(part.shape[1]), groups * format.code_bytes, groups * format.scale_bytes)

    def write(self, folder: Path) -> None:
        from zamba2.weights.files import write_tensors

        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        entries = [(name, dtype, shape, lambda data=data: [memoryview(data)]) for name, (dtype, shape, data) in self.tensors.items()]
        write_tensors(folder / "model.safetensors", entries, {"zamba2": json.dumps(self.about)})


def change_config(draw: random.Random, checkpoint: Checkpoint) -> None:
    """A key of config.json becomes hostile, mostly in the weight file too."""
    key, value = draw.choice(sorted(checkpoint.config)), draw.choice(HOSTILE)
    checkpoint.config[key] = value
    if draw.random() < 0.8:
        checkpoint.about["config"][key] = value


def change_about(draw: random.Random, checkpoint: Checkpoint) -> None:
    checkpoint.about[draw.choice(sorted(checkpoint.about))] = draw.choice([*HOSTILE, *FORMATS, {}])


def change_tensor(draw: random.Random, checkpoint: Checkpoint) -> None:
    """A tensor is lost, renamed, resized or filled anew with any bytes."""
    name = draw.choice(sorted(checkpoint.tensors))
    dtype, shape, data = checkpoint.tensors.pop(name)
    kind = draw.choice(["lost", "renamed", "shorter", "longer", "dtype", "noise"])
    if kind == "renamed":
        checkpoint.tensors[name + "x"] = (dtype, shape, data)
    elif kind == "shorter" and dtype == "U8" and len(data) > 64:
        checkpoint.tensors[name] = (dtype, [len(data) - 64], data[:-64])
    elif kind == "longer" and dtype == "U8":
        checkpoint.tensors[name] = (dtype, [len(data) + 64], data + bytes(64))
    elif kind == "dtype":
        checkpoint.tensors[name] = ("I8" if dtype == "U8" else "I32", shape, data)
    elif kind == "noise":
        checkpoint.tensors[name] = (dtype, shape, draw.randbytes(len(data)))


def change_scales(draw: random.Random, checkpoint: Checkpoint) -> None:
    """The scales of some matrices become infinite, NaN, or as large or small as fp16 goes."""
    for name in draw.sample(sorted(checkpoint.scales), min(len(checkpoint.scales), draw.choice([1, 3, 100]))):
        block, start, length = checkpoint.scales[name]
        dtype, shape, data = checkpoint.tensors[name]
        blocks = np.frombuffer(data, np.uint8).reshape(-1, block).copy()
        scales = blocks[:, start : start + length].copy().view(np.uint16)
        scales[np.random.default_rng(draw.getrandbits(32)).random(scales.shape) < draw.choice([0.01, 0.3, 1])] = draw.choice(EXTREME)
        blocks[:, start : start + length] = scales.view(np.uint8)
        checkpoint.tensors[name] = (dtype, shape, blocks.tobytes())


def all_noise(draw: random.Random, checkpoint: Checkpoint) -> None:
    for name, (dtype, shape, data) in checkpoint.tensors.items():
        checkpoint.tensors[name] = (dtype, shape, draw.randbytes(len(data)) if dtype == "U8" else data)


def damage(draw: random.Random, path: Path) -> None:
    """Bytes of a file change, in its header or behind it, or it is cut or extended."""
    data = bytearray(path.read_bytes())
    header = min(len(data), 8 + int.from_bytes(data[:8], "little"))
    kind = draw.choice(["header", "header", "length", "data", "cut", "extended", "shifted"])
    if kind in ("header", "data"):
        span = (8, header) if kind == "header" else (header, len(data))
        for _ in range(draw.choice([1, 2, 30])):
            if span[0] < span[1]:
                data[draw.randrange(*span)] = draw.choice([draw.randrange(256), *b'0123456789-"[]{}'])
    elif kind == "length":
        data[draw.randrange(8)] = draw.randrange(256)
    elif kind == "cut":
        del data[draw.randrange(len(data)) :]
    elif kind == "extended":
        data += draw.randbytes(draw.randrange(1, 100))
    else:
        at = draw.randrange(len(data))
        data[at : at + draw.randrange(9)] = draw.randbytes(draw.randrange(9))
    path.write_bytes(data)


def read(model: Any, draw: random.Random, state: Any = None) -> Any:
    """Calls of every kind: a single token, a short call, a long one, a batch. Returns a state."""
    from zamba2.runtime.backend import Row

    backend = model.backend
    state = state or backend.new_state()
    other = backend.new_state()

    def tokens(length: int) -> Any:
        return np.array([draw.randrange(backend.config.vocab_size) for _ in range(length)], np.int32)

    short, long = [Row(tokens(5), state, 2)], [Row(tokens(70), state)]
    for rows in ([Row(tokens(1), state)], short, long, [Row(tokens(3), state), Row(tokens(9), other, 9)]):
        for logits in backend.forward(rows):
            assert np.isfinite(logits.numpy()).all()
    return state


def weights_round(draw: random.Random, folder: Path) -> None:
    import zamba2

    checkpoint = Checkpoint(draw)
    changes: list[Callable[[random.Random, Checkpoint], None]] = [change_config, change_about, change_tensor, change_scales, all_noise]
    if draw.random() < 0.7:
        draw.choice(changes)(draw, checkpoint)
        checkpoint.write(folder)
    else:
        checkpoint.write(folder)
        damage(draw, folder / draw.choice(["model.safetensors", "model.safetensors", "config.json"]))
    read(zamba2.load(folder, threads=draw.choice([1, 2])), draw)


def state_round(draw: random.Random, folder: Path) -> None:
    import zamba2
    from zamba2.errors import Zamba2Error
    from zamba2.runtime.state_file import write_state
    from zamba2.weights.files import TensorFile

    Checkpoint(draw).write(folder)
    model = zamba2.load(folder, threads=1)
    state, path = read(model, draw), folder / "state"
    for position in (None, None, (1 << 30) - 1, 1 << 30, (1 << 31) - 1, 1 << 31, 0, -1):
        state.save(path)
        if position is None:
            damage(draw, path)
        else:
            file = TensorFile(path)
            data = {name: memoryview(file.read(name)) for name in file.entries}
            entries = [(name, e.dtype, e.shape, lambda data=data[name]: [data]) for name, e in file.entries.items()]
            write_state(path, entries, position=position, model=model.backend.fingerprint, note="")
        loaded = model.backend.new_state()
        try:
            loaded.load(path)
        except Zamba2Error:
            assert loaded.position == 0
            continue
        with suppress(Zamba2Error):  # a position too near the last possible, or numbers that overflow
            read(model, draw, loaded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--engine", type=Path)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    if given.engine is not None:
        spec = importlib.util.spec_from_file_location("zamba2._engine", given.engine)
        assert spec is not None and spec.loader is not None
        module = sys.modules["zamba2._engine"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

    from zamba2 import _engine
    from zamba2.errors import Zamba2Error

    counts: Counter[str] = Counter()
    for i in range(given.rounds):
        draw = random.Random(given.seed * 1_000_003 + i)
        os.environ["ZAMBA2_ISA"] = draw.choice(_engine.available())
        name, run = ("state", state_round) if i % 5 == 4 else ("weights", weights_round)
        print(f"round {i}", file=sys.stderr, flush=True)
        try:
            run(draw, given.folder / "model")
        except Zamba2Error as error:
            assert str(error).endswith(".") and "\n" not in str(error), error
            counts[f"{name} refused"] += 1
        else:
            counts[f"{name} read"] += 1
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
