"""llama.cpp on dense models with random weights, as a child of ``zamba2 bench``. It cannot run Zamba2.

Runs in an environment of its own (scripts/llama_cpp.py), by its path: it imports nothing of this package.

    python llama_cpp_peer.py write SPEC FILE        # a random model in Q4_0; SPEC is JSON with the keys of Spec
    python llama_cpp_peer.py run FILE REQUEST       # one JSON line when ready, and one per line read

A line "warm" is a short run answered with {}; any other line is a measurement.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

# The geometry of a 3 B Llama with a vocabulary of 32,000: keys and values of 8 heads serve 24, so that beside the same weights a
# token moves about as many other bytes as Zamba2's state and keys and values.
HIDDEN, HEADS, KV_HEADS, MLP, VOCABULARY, CONTEXT = 3072, 24, 8, 8192, 32000, 32768
SPREAD = 0.02
LAYER_NORM = ("phi2", "stablelm")  # the others have RMS norms, without biases
# What llama.cpp's loaders allow: phi2 and stablelm must have a head of their own, gemma2 cannot have one.
TIED = {"llama": (False, True), "phi2": (False,), "phi3": (False, True), "stablelm": (False,), "gemma2": (True,)}


class Spec(TypedDict):
    """The shape of a model; its layers are those of arch, a key of TIED."""

    arch: str
    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    context: int
    rotary: int  # dimensions of a head that are rotated
    tied: bool  # the embeddings are the head too


def stand_in(weights: int) -> Spec:
    """A Llama that applies so many weights to a token, embeddings apart: layers and width of the MLP follow, a multiple of 32."""
    attention, output = 2 * HIDDEN * HIDDEN * (1 + KV_HEADS / HEADS), VOCABULARY * HIDDEN
    layers = max(1, round((weights - output) / (attention + 3 * HIDDEN * MLP)))
    mlp = max(32, round(((weights - output) / layers - attention) / (3 * HIDDEN) / 32) * 32)
    head_dim = HIDDEN // HEADS
    return {
        "arch": "llama", "name": "dense stand-in, random weights", "hidden": HIDDEN, "layers": layers, "heads": HEADS,
        "kv_heads": KV_HEADS, "head_dim": head_dim, "mlp": mlp, "vocab": VOCABULARY, "context": CONTEXT, "rotary": head_dim,
        "tied": False,
    }  # fmt: skip


def tensors(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Every tensor that llama.cpp's loader of this architecture asks for, and no other: matrices (rows, columns), norms and biases
    (length,). Raises ValueError if there is no such model or a row is not a whole number of Q4_0's blocks of 32."""
    arch, hidden, mlp, vocab = spec["arch"], spec["hidden"], spec["mlp"], spec["vocab"]
    if arch not in TIED:
        raise ValueError(f"there is no architecture {arch!r}; there are {', '.join(TIED)}")
    if spec["tied"] not in TIED[arch]:
        raise ValueError(f"llama.cpp has no {arch} {'without' if spec['tied'] else 'with'} a head of its own (tied is {spec['tied']})")
    queries, keys = spec["heads"] * spec["head_dim"], spec["kv_heads"] * spec["head_dim"]
    found: dict[str, tuple[int, ...]] = {}

    def norm(name: str) -> None:
        found[f"{name}.weight"] = (hidden,)
        if arch in LAYER_NORM:
            found[f"{name}.bias"] = (hidden,)

    def matrix(name: str, rows: int, columns: int) -> None:
        if columns % 32:
            raise ValueError(f"{name} has rows of {columns}; Q4_0 needs a multiple of 32")
        found[f"{name}.weight"] = (rows, columns)
        if arch == "phi2" and name != "token_embd":
            found[f"{name}.bias"] = (rows,)

    matrix("token_embd", vocab, hidden)
    for layer in range(spec["layers"]):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm")
        if arch in ("phi2", "phi3"):
            matrix(f"{block}.attn_qkv", queries + 2 * keys, hidden)
        else:
            matrix(f"{block}.attn_q", queries, hidden)
            matrix(f"{block}.attn_k", keys, hidden)
            matrix(f"{block}.attn_v", keys, hidden)
        matrix(f"{block}.attn_output", hidden, queries)
        if arch == "gemma2":
            norm(f"{block}.post_attention_norm")
        if arch != "phi2":  # its MLP reads what its attention reads
            norm(f"{block}.ffn_norm")
        if arch in ("llama", "stablelm", "gemma2"):
            matrix(f"{block}.ffn_gate", mlp, hidden)
        matrix(f"{block}.ffn_up", 2 * mlp if arch == "phi3" else mlp, hidden)  # phi3: gate and up in one
        matrix(f"{block}.ffn_down", hidden, mlp)
        if arch == "gemma2":
            norm(f"{block}.post_ffw_norm")
    norm("output_norm")
    if not spec["tied"]:
        matrix("output", vocab, hidden)
    return found


def write(spec: Spec, target: str) -> None:
    """Write a model as GGUF: random Q4_0 blocks (an fp16 scale and 16 bytes of codes), norms of 1, biases of 0, a tokenizer of bare
    pieces. Embeddings and head are Q4_0 as well, tied ones too, where llama-quantize would give a head six bits."""
    import gguf
    import numpy as np

    shapes = tensors(spec)
    random = np.random.Generator(np.random.SFC64(0))
    writer = gguf.GGUFWriter(target, spec["arch"], use_temp_file=False)
    writer.add_name(spec["name"])
    writer.add_block_count(spec["layers"])
    writer.add_context_length(spec["context"])
    writer.add_embedding_length(spec["hidden"])
    writer.add_feed_forward_length(spec["mlp"])
    writer.add_head_count(spec["heads"])
    writer.add_head_count_kv(spec["kv_heads"])
    writer.add_key_length(spec["head_dim"])
    writer.add_value_length(spec["head_dim"])
    if spec["arch"] in LAYER_NORM:
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_layer_norm_rms_eps(1e-6 if spec["arch"] == "gemma2" else 1e-5)
    writer.add_rope_dimension_count(spec["rotary"])
    writer.add_rope_freq_base(10000.0)  # of some published models larger; no time depends on it
    if spec["arch"] == "phi3":
        writer.add_rope_scaling_orig_ctx_len(spec["context"])
        writer.add_sliding_window(2047)  # that of Phi-3-mini; llama.cpp reads it and attends to everything
    if spec["arch"] == "gemma2":
        writer.add_sliding_window(4096)  # in every other layer
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)
    writer.add_vocab_size(spec["vocab"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    # llama.cpp looks the last of these up in every model whose name has "phi-3" or "phi3" in it, and fails without it.
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<|endoftext|>"]
    control = gguf.TokenType.CONTROL
    kinds = [gguf.TokenType.UNKNOWN, control, control, *[gguf.TokenType.BYTE] * 256, control]
    pieces, kinds = pieces[: spec["vocab"]], kinds[: spec["vocab"]]
    more = spec["vocab"] - len(pieces)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces + [f"▁{i}" for i in range(more)])
    writer.add_token_scores([0.0] * len(pieces) + [-float(i) for i in range(more)])
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * more)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
        else:
            size = (shape[0], shape[1] // 32 * 18)
            writer.add_tensor_info(name, size, np.dtype(np.uint8), size[0] * size[1], raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in shapes.items():  # one in memory at a time
        if len(shape) == 1:
            writer.write_tensor_data(np.full(shape, 0 if name.endswith(".bias") else 1, dtype=np.float32))
            continue
        blocks = shape[0] * shape[1] // 32
        out = np.empty((blocks, 18), dtype=np.uint8)
        draw = random.random(blocks, dtype=np.float32) - np.float32(0.5)
        scales = (draw + np.copysign(np.float32(0.75), draw)) * np.float32(SPREAD / 4.61)  # ±0.75 to ±1.25, of codes from -8 to 7
        out[:, :2] = scales.astype(np.float16).view(np.uint8).reshape(-1, 2)
        out[:, 2:] = random.integers(0, 1 << 64, (blocks, 2), dtype=np.uint64).view(np.uint8)
        writer.write_tensor_data(out.reshape(shape[0], -1))
    writer.close()


def run(model: str, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Answers, the first when the model is loaded, then one for each line of standard input: to "warm" {}, after a prompt of at most
    16 tokens and one new one, to any other a measurement. Options are the library's defaults (mapped weights, repacking, flash
    attention chosen by itself) but for threads and the size of the context."""
    import llama_cpp
    import numpy as np

    length, new, threads = request["prompt_tokens"], request["new_tokens"], request["threads"]
    start = time.perf_counter()
    llama = llama_cpp.Llama(model, n_ctx=length + new + 1, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    load_seconds = time.perf_counter() - start
    size = llama_cpp.llama_model_size(llama.model)
    features = llama_cpp.llama_print_system_info().decode()
    yield {"load_seconds": load_seconds, "version": llama_cpp.__version__, "weight_bytes": size, "features": features}
    vocabulary = llama.n_vocab()
    first = 300 if vocabulary > 300 else 3  # past the special pieces and the bytes, where there are others
    prompt = [int(token) for token in np.random.default_rng(1).integers(first, vocabulary, length)]
    for line in sys.stdin:
        llama.reset()
        if line.strip() == "warm":
            for _, _ in zip(range(2), llama.generate(prompt[:16], temp=0.0), strict=False):
                pass
            yield {}
            continue
        times = [time.perf_counter()]
        for _, _ in zip(range(1 + new), llama.generate(prompt, temp=0.0), strict=False):
            times.append(time.perf_counter())
        yield {
            "ttft_seconds": times[1] - times[0],
            "prefill_tokens_per_second": length / (times[1] - times[0]),
            "decode_tokens_per_second": new / (times[-1] - times[1]),
            "peak_rss_bytes": peak(),
        }


def peak() -> int:
    """Peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(stand_in(int(sys.argv[2])) if sys.argv[2].isdigit() else json.loads(sys.argv[2]), sys.argv[3])
    else:
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what the library prints is no answer
        for answer in run(sys.argv[2], json.loads(sys.argv[3])):
            print(json.dumps(answer), file=answers, flush=True)
