"""llama.cpp on a dense model with as many weights per token, as a child of ``zamba2 bench``. It cannot run Zamba2.

Runs in an environment of its own (scripts/llama_cpp.py), by its path: it imports nothing of this package.

    python llama_cpp_peer.py write WEIGHTS FILE     # a random model of so many weights per token, in Q4_0
    python llama_cpp_peer.py run FILE REQUEST       # one JSON line when ready, and one per line read
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The geometry of a 3 B Llama with a vocabulary of 32,000: keys and values of 8 heads serve 24, so that beside the same weights a
# token moves about as many other bytes as Zamba2's state and keys and values.
HIDDEN, HEADS, KV_HEADS, MLP, VOCABULARY, CONTEXT = 3072, 24, 8, 8192, 32000, 32768
SPREAD = 0.02


def stand_in(weights: int) -> tuple[int, int]:
    """Layers and width of the MLP of a model that applies so many weights to a token, embeddings apart. Widths: multiples of 32."""
    attention, head = 2 * HIDDEN * HIDDEN * (1 + KV_HEADS / HEADS), VOCABULARY * HIDDEN
    layers = max(1, round((weights - head) / (attention + 3 * HIDDEN * MLP)))
    return layers, max(32, round(((weights - head) / layers - attention) / (3 * HIDDEN) / 32) * 32)


def write(weights: int, target: str) -> None:
    """Write the stand-in as GGUF: random Q4_0 blocks (an fp16 scale and 16 bytes of codes), norms of 1, a tokenizer of bare pieces."""
    import gguf
    import numpy as np

    layers, mlp = stand_in(weights)
    random = np.random.Generator(np.random.SFC64(0))
    writer = gguf.GGUFWriter(target, "llama", use_temp_file=False)
    writer.add_name("dense stand-in, random weights")
    writer.add_block_count(layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, *[gguf.TokenType.BYTE] * 256]
    more = VOCABULARY - len(pieces)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces + [f"▁{i}" for i in range(more)])
    writer.add_token_scores([0.0] * len(pieces) + [-float(i) for i in range(more)])
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * more)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    kv = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {name: (VOCABULARY, HIDDEN) for name in ("token_embd.weight", "output.weight")}
    shapes["output_norm.weight"] = (HIDDEN,)
    for layer in range(layers):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (HIDDEN,), f"blk.{layer}.ffn_norm.weight": (HIDDEN,),
            f"blk.{layer}.attn_q.weight": (HIDDEN, HIDDEN), f"blk.{layer}.attn_k.weight": (kv, HIDDEN),
            f"blk.{layer}.attn_v.weight": (kv, HIDDEN), f"blk.{layer}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_gate.weight": (mlp, HIDDEN), f"blk.{layer}.ffn_up.weight": (mlp, HIDDEN),
            f"blk.{layer}.ffn_down.weight": (HIDDEN, mlp),
        }  # fmt: skip
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
        else:
            size = (shape[0], shape[1] // 32 * 18)
            writer.add_tensor_info(name, size, np.dtype(np.uint8), size[0] * size[1], raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for shape in shapes.values():  # one in memory at a time
        if len(shape) == 1:
            writer.write_tensor_data(np.ones(shape, dtype=np.float32))
            continue
        blocks = shape[0] * shape[1] // 32
        out = np.empty((blocks, 18), dtype=np.uint8)
        scales = random.uniform(0.75, 1.25, blocks) * random.choice([-1.0, 1.0], blocks) * (SPREAD / 4.61)  # of codes from -8 to 7
        out[:, :2] = scales.astype(np.float16).view(np.uint8).reshape(-1, 2)
        out[:, 2:] = random.integers(0, 1 << 64, (blocks, 2), dtype=np.uint64).view(np.uint8)
        writer.write_tensor_data(out.reshape(shape[0], -1))
    writer.close()


def run(model: str, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Answers, the first when the model is loaded, then one for each line of standard input. Options are the library's defaults
    (mapped weights, repacking, flash attention chosen by itself) but for threads and the size of the context."""
    import llama_cpp
    import numpy as np

    length, new, threads = request["prompt_tokens"], request["new_tokens"], request["threads"]
    start = time.perf_counter()
    llama = llama_cpp.Llama(model, n_ctx=length + new + 1, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    load_seconds = time.perf_counter() - start
    size = llama_cpp.llama_model_size(llama.model)
    features = llama_cpp.llama_print_system_info().decode()
    yield {"load_seconds": load_seconds, "version": llama_cpp.__version__, "weight_bytes": size, "features": features}
    prompt = [int(token) for token in np.random.default_rng(1).integers(300, VOCABULARY, length)]
    for _ in sys.stdin:
        llama.reset()
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
        write(int(sys.argv[2]), sys.argv[3])
    else:
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what the library prints is no answer
        for answer in run(sys.argv[2], json.loads(sys.argv[3])):
            print(json.dumps(answer), file=answers, flush=True)
