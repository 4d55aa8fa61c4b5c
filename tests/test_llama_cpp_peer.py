"""llama.cpp's models with random weights: which tensors each architecture has, how many parameters, and that llama.cpp runs them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from zamba2.bench import llama_cpp_peer
from zamba2.bench.llama_cpp_peer import Spec, stand_in, tensors, write
from zamba2.bench.peers import Worker, llama_cpp_python

ARCHITECTURES = ("llama", "phi2", "phi3", "stablelm", "gemma2")


def spec(
    arch: str, hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, mlp: int, vocab: int, context: int, rotary: int
) -> Spec:
    return {
        "arch": arch, "name": f"random {arch}", "hidden": hidden, "layers": layers, "heads": heads, "kv_heads": kv_heads,
        "head_dim": head_dim, "mlp": mlp, "vocab": vocab, "context": context, "rotary": rotary, "tied": arch == "gemma2",
    }  # fmt: skip


# Heads of gemma2 are wider than hidden / heads, as in the published model; those of llama are no multiple of 32.
TINY = {
    "llama": spec("llama", 96, 2, 4, 2, 24, 160, 512, 256, 24),
    "phi2": spec("phi2", 64, 2, 2, 2, 32, 128, 512, 256, 12),
    "phi3": spec("phi3", 64, 2, 2, 2, 32, 96, 512, 256, 32),
    "stablelm": spec("stablelm", 64, 2, 2, 2, 32, 160, 512, 256, 8),
    "gemma2": spec("gemma2", 64, 2, 2, 1, 64, 128, 512, 256, 64),
}
# (rows, columns) of TINY's matrices and lengths of the rest, by hand.
OUTSIDE: dict[str, dict[str, tuple[int, ...]]] = {
    "llama": {"token_embd.weight": (512, 96), "output.weight": (512, 96), "output_norm.weight": (96,)},
    "phi2": {
        "token_embd.weight": (512, 64), "output.weight": (512, 64), "output.bias": (512,),
        "output_norm.weight": (64,), "output_norm.bias": (64,),
    },
    "phi3": {"token_embd.weight": (512, 64), "output.weight": (512, 64), "output_norm.weight": (64,)},
    "stablelm": {
        "token_embd.weight": (512, 64), "output.weight": (512, 64), "output_norm.weight": (64,), "output_norm.bias": (64,),
    },
    "gemma2": {"token_embd.weight": (512, 64), "output_norm.weight": (64,)},
}  # fmt: skip
LAYER: dict[str, dict[str, tuple[int, ...]]] = {
    "llama": {
        "attn_norm.weight": (96,), "attn_q.weight": (96, 96), "attn_k.weight": (48, 96), "attn_v.weight": (48, 96),
        "attn_output.weight": (96, 96), "ffn_norm.weight": (96,), "ffn_gate.weight": (160, 96), "ffn_up.weight": (160, 96),
        "ffn_down.weight": (96, 160),
    },
    "phi2": {
        "attn_norm.weight": (64,), "attn_norm.bias": (64,), "attn_qkv.weight": (192, 64), "attn_qkv.bias": (192,),
        "attn_output.weight": (64, 64), "attn_output.bias": (64,), "ffn_up.weight": (128, 64), "ffn_up.bias": (128,),
        "ffn_down.weight": (64, 128), "ffn_down.bias": (64,),
    },
    "phi3": {
        "attn_norm.weight": (64,), "attn_qkv.weight": (192, 64), "attn_output.weight": (64, 64), "ffn_norm.weight": (64,),
        "ffn_up.weight": (192, 64), "ffn_down.weight": (64, 96),
    },
    "stablelm": {
        "attn_norm.weight": (64,), "attn_norm.bias": (64,), "attn_q.weight": (64, 64), "attn_k.weight": (64, 64),
        "attn_v.weight": (64, 64), "attn_output.weight": (64, 64), "ffn_norm.weight": (64,), "ffn_norm.bias": (64,),
        "ffn_gate.weight": (160, 64), "ffn_up.weight": (160, 64), "ffn_down.weight": (64, 160),
    },
    "gemma2": {
        "attn_norm.weight": (64,), "attn_q.weight": (128, 64), "attn_k.weight": (64, 64), "attn_v.weight": (64, 64),
        "attn_output.weight": (64, 128), "post_attention_norm.weight": (64,), "ffn_norm.weight": (64,),
        "ffn_gate.weight": (128, 64), "ffn_up.weight": (128, 64), "ffn_down.weight": (64, 128), "post_ffw_norm.weight": (64,),
    },
}  # fmt: skip
# The published models, and their parameters as counted in their checkpoints.
PUBLISHED = {
    "phi-2": (spec("phi2", 2560, 32, 32, 32, 80, 10240, 51200, 2048, 32), 2.78e9),
    "phi-3-mini": (spec("phi3", 3072, 32, 32, 32, 96, 8192, 32064, 4096, 96), 3.82e9),
    "stablelm-3b": (spec("stablelm", 2560, 32, 32, 32, 80, 6912, 50304, 4096, 20), 2.80e9),
    "gemma-2-2b": (spec("gemma2", 2304, 26, 8, 4, 256, 9216, 256000, 8192, 256), 2.61e9),
    "danube3-4b": (spec("llama", 3840, 24, 32, 8, 120, 10240, 32000, 8192, 120), 3.96e9),
    "mistral-7b": (spec("llama", 4096, 32, 32, 8, 128, 14336, 32000, 32768, 128), 7.24e9),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_file_holds_the_tensors_of_its_architecture(tmp_path: Path, arch: str) -> None:
    """Read back, a file has exactly the tensors listed by hand: matrices in Q4_0, norms of 1 and biases of 0 in fp32."""
    write(TINY[arch], str(tmp_path / "model.gguf"))
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    expected = OUTSIDE[arch] | {f"blk.{layer}.{name}": shape for layer in range(2) for name, shape in LAYER[arch].items()}
    found = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    assert found == expected == tensors(TINY[arch])
    for tensor in reader.tensors:
        if len(tensor.shape) == 2:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.Q4_0, tensor.name
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert values.std() == pytest.approx(llama_cpp_peer.SPREAD, rel=0.1) and abs(values.mean()) < 0.002, tensor.name
        else:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32, tensor.name
            assert np.all(tensor.data == (0 if tensor.name.endswith(".bias") else 1)), tensor.name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tensors_are_known_to_gguf(arch: str) -> None:
    """Every name is one that the gguf package lists for the architecture."""
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    known = {gguf.TENSOR_NAMES[tensor].format(bid=layer) for tensor in gguf.MODEL_TENSORS[kind] for layer in range(2)}
    assert {name.rpartition(".")[0] for name in tensors(TINY[arch])} <= known


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_file_says_its_shape(tmp_path: Path, arch: str) -> None:
    """The sizes, the rotary part, the right kind of norm and gemma2's and phi3's own keys stand in the metadata."""
    write(TINY[arch], str(tmp_path / "model.gguf"))
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    found = {key: field.contents() for key, field in reader.fields.items() if key.startswith((arch, "general"))}
    tiny, norm, eps = TINY[arch], "layer_norm_epsilon" if arch in ("phi2", "stablelm") else "layer_norm_rms_epsilon", 1e-5
    expected: dict[str, Any] = {
        "block_count": 2, "context_length": 256, "embedding_length": tiny["hidden"], "feed_forward_length": tiny["mlp"],
        "attention.head_count": tiny["heads"], "attention.head_count_kv": tiny["kv_heads"], "vocab_size": 512,
        "attention.key_length": tiny["head_dim"], "attention.value_length": tiny["head_dim"],
        "rope.dimension_count": tiny["rotary"], "rope.freq_base": 10000.0,
        f"attention.{norm}": pytest.approx(1e-6 if arch == "gemma2" else eps),
    }  # fmt: skip
    if arch == "gemma2":
        expected |= {"attention.sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    if arch == "phi3":
        expected |= {"attention.sliding_window": 2047, "rope.scaling.original_context_length": 256}
    assert {key.removeprefix(f"{arch}."): value for key, value in found.items() if key.startswith(f"{arch}.")} == expected
    assert found["general.architecture"] == arch and found["general.name"] == f"random {arch}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name: str) -> None:
    """A published model's shape has its parameters within 1 %."""
    shape, parameters = PUBLISHED[name]
    assert sum(int(np.prod(size)) for size in tensors(shape).values()) == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize("weights", [1_200_000_000, 3_855_000_000, 7_400_000_000])
def test_the_stand_in_applies_so_many_weights(weights: int) -> None:
    """The stand-in's matrices, embeddings apart, hold what was asked for within 0.1 %; its spec goes through JSON unharmed."""
    found = stand_in(weights)
    assert json.loads(json.dumps(found)) == found
    matrices = {name: shape for name, shape in tensors(found).items() if len(shape) == 2 and name != "token_embd.weight"}
    assert sum(rows * columns for rows, columns in matrices.values()) == pytest.approx(weights, rel=1e-3)


@pytest.mark.parametrize(
    ("arch", "change", "said"),
    [
        ("llama", {"arch": "rwkv"}, "there is no architecture 'rwkv'; there are llama, phi2, phi3, stablelm, gemma2"),
        ("llama", {"mlp": 100}, "ffn_down has rows of 100; Q4_0 needs a multiple of 32"),
        ("llama", {"head_dim": 20}, "attn_output has rows of 80; Q4_0 needs a multiple of 32"),
        ("phi2", {"tied": True}, "llama.cpp has no phi2 without a head of its own"),
        ("gemma2", {"tied": False}, "llama.cpp has no gemma2 with a head of its own"),
    ],
)
def test_what_cannot_be_is_refused(arch: str, change: dict[str, Any], said: str) -> None:
    """A shape that llama.cpp or Q4_0 cannot have is a ValueError that says why."""
    bad: Any = {**TINY[arch], **change}
    with pytest.raises(ValueError, match=said):
        tensors(bad)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The interpreter of the user's own build: the tests' cache, another folder, has none."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    python = llama_cpp_python()
    if python is None:
        pytest.skip("llama.cpp is not built in ~/.cache/zamba2; build it with: python scripts/llama_cpp.py install")
    return python


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "tied llama", "tied phi3", "bytes alone"])
def test_llama_cpp_runs_it(built: Path, tmp_path: Path, arch: str) -> None:
    """llama.cpp loads what the peer's command wrote, all of it, answers "warm" with nothing and a measurement with positive figures."""
    tiny: Any = dict(TINY[arch.removeprefix("tied ") if arch != "bytes alone" else "llama"])
    tiny |= {"tied": True} if arch.startswith("tied") else {"vocab": 259} if arch == "bytes alone" else {}
    module, model = llama_cpp_peer.__file__, tmp_path / "model.gguf"
    subprocess.run([built, module, "write", json.dumps(tiny), model], check=True)
    request = {"prompt_tokens": 40, "new_tokens": 3, "threads": 1}
    worker = Worker("llama.cpp", [built, module, "run", model, json.dumps(request)])
    try:
        matrices = sum(rows * size[0] // 32 * 18 for rows, *size in tensors(tiny).values() if size)
        rest = sum(4 * size[0] for size in tensors(tiny).values() if len(size) == 1)
        assert worker.ready["weight_bytes"] == matrices + rest
        assert worker.ask("warm") == {}
        found = worker.ask("repeat")
    finally:
        worker.close()
    assert set(found) == {"ttft_seconds", "prefill_tokens_per_second", "decode_tokens_per_second", "peak_rss_bytes"}
    assert all(value > 0 for value in found.values())
