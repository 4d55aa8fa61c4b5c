"""Build src/zamba2/random/, the tiny Zamba2 that ships inside the package so that every command works before a download.

Its weights are random (its words are noise), its tokenizer is real: a BPE with byte fallback in the style of Mistral v0.1,
learnt from public-domain novels. Same input, same bytes. Needs numpy and tokenizers, not torch.

    python scripts/make_random_model.py [--text FOLDER] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zamba2.config import Config
from zamba2.train.demo import BYTES, SPECIAL, learn_tokenizer, tokenizer_settings
from zamba2.weights.files import write_tensors

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "src" / "zamba2" / "random"
TEXT = ROOT.parent / "shared" / "data" / "text"
SEED = 20241014
# Small, but with everything the 2.7B has: two shared blocks used in turn (A B A), adapters per position, several heads.
CONFIG = Config(
    hidden_size=64,
    num_hidden_layers=8,
    vocab_size=1024,
    hybrid_layer_ids=(2, 4, 6),
    num_mem_blocks=2,
    mamba_d_state=16,
    n_mamba_heads=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    intermediate_size=256,
    chunk_size=32,
    adapter_rank=8,
)

Array = npt.NDArray[np.float32]


def weights(config: Config, seed: int = SEED) -> dict[str, Array]:
    """Random float32 tensors under the Hub's names and shapes.

    Matrices are normal with variance 1 / inputs, wider than a fresh model's 0.02, so that the next token depends on the
    whole context rather than repeating the last one; the rest starts as Mamba2's own initialisation does.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    hidden, wide, inner = config.hidden_size, config.attention_hidden_size, config.d_inner

    def matrix(outputs: int, inputs: int) -> Array:
        return (rng.standard_normal((outputs, inputs)) / math.sqrt(inputs)).astype(np.float32)

    def ones(size: int) -> Array:
        return np.ones(size, np.float32)

    def mixer() -> dict[str, Array]:
        bound = 1 / math.sqrt(config.mamba_d_conv)
        heads = config.n_mamba_heads
        dt = np.exp(rng.uniform(math.log(1e-3), math.log(1e-1), heads))
        return {
            "in_proj.weight": matrix(config.in_proj_dim, hidden),
            "conv1d.weight": rng.uniform(-bound, bound, (config.conv_dim, 1, config.mamba_d_conv)).astype(np.float32),
            "conv1d.bias": rng.uniform(-bound, bound, config.conv_dim).astype(np.float32),
            "dt_bias": (dt + np.log(-np.expm1(-dt))).astype(np.float32),  # softplus(dt_bias) = dt
            "A_log": np.log(np.arange(1, heads + 1)).astype(np.float32),
            "D": ones(heads),
            "norm.weight": ones(inner),
            "out_proj.weight": matrix(hidden, inner),
        }

    def block(positions: range) -> dict[str, Array]:
        tensors = {
            "input_layernorm.weight": ones(wide),
            "self_attn.q_proj.weight": matrix(wide, wide),
            "self_attn.k_proj.weight": matrix(config.kv_dim, wide),
            "self_attn.v_proj.weight": matrix(config.kv_dim, wide),
            "self_attn.o_proj.weight": matrix(hidden, wide),
            "pre_ff_layernorm.weight": ones(hidden),
            "feed_forward.gate_up_proj.weight": matrix(2 * config.intermediate_size, hidden),
            "feed_forward.down_proj.weight": matrix(hidden, config.intermediate_size),
        }
        for j in positions:
            tensors[f"feed_forward.gate_up_proj_adapter_list.{j}.0.weight"] = matrix(config.adapter_rank, hidden)
            tensors[f"feed_forward.gate_up_proj_adapter_list.{j}.1.weight"] = matrix(2 * config.intermediate_size, config.adapter_rank)
        return tensors

    embeddings = matrix(config.vocab_size, hidden)
    embeddings[: len(SPECIAL) + len(BYTES)] /= 4  # tied to the head: raw bytes and stop tokens come up less often than words
    tensors = {"model.embed_tokens.weight": embeddings, "model.final_layernorm.weight": ones(hidden)}
    for layer in config.layers:
        prefix = f"model.layers.{layer.index}."
        if layer.position is not None:
            tensors[prefix + "linear.weight"] = matrix(hidden, hidden)
            if layer.position == layer.block:  # the first hybrid layer that uses a block stores it, with the adapters of all its positions
                positions = range(layer.position, len(config.hybrid_layer_ids), config.num_mem_blocks)
                tensors |= {f"{prefix}shared_transformer.{name}": value for name, value in block(positions).items()}
            prefix += "mamba_decoder."
        tensors[prefix + "input_layernorm.weight"] = ones(hidden)
        tensors |= {f"{prefix}mamba.{name}": value for name, value in mixer().items()}
    return tensors


def bfloat16(values: Array) -> bytes:
    """Little-endian bfloat16 bytes of finite float32 values, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def write_weights(path: Path, tensors: dict[str, Array]) -> None:
    """A safetensors file in bf16 that says its weights are random."""
    entries = [(name, "BF16", t.shape, lambda t=t: [memoryview(bfloat16(t))]) for name, t in sorted(tensors.items())]
    write_tensors(path, entries, {"format": "pt", "zamba2_random": "true"})


def novels(folder: Path) -> Iterator[str]:
    """Lines of the novels in ``folder`` (pg*.txt), without Project Gutenberg's header and footer."""
    paths = sorted(folder.glob("pg*.txt"))
    if not paths:
        raise SystemExit(f"{folder} holds no pg*.txt; give a folder of Project Gutenberg texts with --text.")
    for path in paths:
        text = path.read_text(encoding="latin-1" if ".latin1." in path.name else "utf-8")
        body = re.split(r"\*\*\* ?(?:START|END) OF TH[^\n]*", text)[1]
        body = re.split(r"\nEnd of (?:the )?Project Gutenberg", body)[0]
        yield from (" ".join(line.split()) for line in body.splitlines() if line.strip())


def write_model(out: Path, config: Config = CONFIG) -> None:
    """Write config.json, generation_config.json and model.safetensors into ``out``."""
    write_json(out / "config.json", config.to_dict())
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    write_json(out / "generation_config.json", ids)
    write_weights(out / "model.safetensors", weights(config))


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the tiny model that ships inside the package.")
    parser.add_argument("--text", type=Path, default=TEXT, help="folder of Project Gutenberg texts, pg*.txt (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write (%(default)s)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_model(arguments.out)
    write_json(arguments.out / "tokenizer.json", learn_tokenizer(novels(arguments.text), CONFIG.vocab_size))
    write_json(arguments.out / "tokenizer_config.json", tokenizer_settings(CONFIG))
    print(f"{arguments.out}: {sum(path.stat().st_size for path in arguments.out.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
