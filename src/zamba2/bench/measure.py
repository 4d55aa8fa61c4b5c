"""What a user's process measures of itself: the engine over a packed checkpoint, beside what the machine gives at best; or PyTorch.

Runs as a child, so that its memory is that of a user's run: ``python -m zamba2.bench.measure REQUEST``, the request in JSON.
It says one JSON line when the model is ready, then one for every line that it reads ("warm", "repeat", "limits").
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zamba2.config import Config
from zamba2.errors import Zamba2Error
from zamba2.runtime.backend import Row
from zamba2.runtime.memory import memory
from zamba2.weights.files import DTYPE_BYTES, TensorFile
from zamba2.weights.formats import KVFormat, kv_format_named
from zamba2.weights.packed import bytes_per_token, is_packed, open_packed, parts

__all__ = ["WARM_TOKENS", "decode_bytes", "gpu_limits", "gpu_memory", "kv_bytes_per_token", "prefill_operations", "random_ids"]

SEED = 1  # of the prompts
GPU_PRODUCTS = "bf16 products by torch"
WARM_TOKENS = 16  # of a prompt read to warm up: threads, kernels, pages of the weights


def random_ids(vocab_size: int, count: int, length: int) -> list[npt.NDArray[np.int32]]:
    """``count`` random prompts, int32 [length], the same ones each time; without the ids of special tokens."""
    random = np.random.default_rng(SEED)
    return [random.integers(min(3, vocab_size - 1), vocab_size, length, dtype=np.int32) for _ in range(count)]


def gpu_memory(device: str) -> dict[str, int]:
    """The most bytes of a GPU that PyTorch has held for tensors; nothing for a CPU."""
    if device == "cpu":
        return {}
    import torch

    return {"peak_gpu_bytes": torch.cuda.max_memory_allocated(device)}


def decode_bytes(file: TensorFile, config: Config, context: float, kv: KVFormat, conv_element: int = 4) -> dict[str, float]:
    """Bytes that one decode step moves: weights read (once for the whole batch); per sequence, the state read and written, and the
    keys and values of ``context`` tokens read. conv_element: bytes of one value of the convolution's state."""
    sizes = {part.name: file.entries[part.name].nbytes for part in parts(config)}
    return {"weights": bytes_per_token(config, sizes)} | state_bytes(config, context, kv, conv_element)


def state_bytes(config: Config, context: float, kv: KVFormat, conv_element: int) -> dict[str, float]:
    """Those of ``decode_bytes`` that are a sequence's own."""
    return {
        "state": 2 * (config.ssm_state_bytes + config.conv_state_bytes(conv_element)),
        "keys_and_values": kv_bytes_per_token(config, kv) * context,
    }


def kv_bytes_per_token(config: Config, kv: KVFormat) -> int:
    """Bytes of the keys and values of one token, at all hybrid positions."""
    tensors = kv.tensors(len(config.hybrid_layer_ids), config.num_key_value_heads, 1, config.attention_head_dim)
    return sum(DTYPE_BYTES[dtype] * count for _, dtype, count in tensors)


def prefill_operations(config: Config, length: int) -> float:
    """Operations of the products with weights that reading a prompt takes, two per weight; lm_head for one position. What attention
    and the scan take is not counted."""
    head = config.vocab_size * config.hidden_size
    return 2.0 * ((config.weights_per_token() - head) * length + head)


def serve(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Answers, one for each line of standard input, the first without one."""
    import zamba2

    prompt_tokens, new_tokens = request["prompt_tokens"], request["new_tokens"]
    start = time.perf_counter()
    backend: Any = zamba2.load(request["path"], backend="native", kv=request["kv_format"]).backend
    load_seconds = time.perf_counter() - start
    import zamba2._engine as _engine  # here: without it, load says what is missing

    config, threads = backend.config, backend.engine.threads
    bytes_moved = decode_bytes(backend.file, config, prompt_tokens + (new_tokens + 1) / 2, backend.kv)
    yield {
        "load_seconds": load_seconds, "isa": backend.isa, "threads": threads, "format": backend.format.name,
        "kv_format": backend.kv.name, "decode_bytes": bytes_moved,
        "prefill_operations": prefill_operations(config, prompt_tokens),
        "kind": product_kind(backend.isa, backend.format.name),
    }  # fmt: skip

    def limits() -> dict[str, Any]:
        rate, pattern, _ = _engine.read_bandwidth(np.frombuffer(backend.file.map(), dtype=np.uint8), threads, backend.isa)
        return {"read_bandwidth": rate, "read_pattern": pattern, "product_rates": dict(_engine.product_rates(threads, backend.isa))}

    yield from answers(backend, request, limits)


def serve_torch(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """As ``serve``, for our PyTorch model on a device: what a GPU runs. A checkpoint that is not packed runs in bf16."""
    import zamba2
    import zamba2.runtime.torch  # importing PyTorch is no loading

    path, prompt_tokens, new_tokens, device = Path(request["path"]), request["prompt_tokens"], request["new_tokens"], request["device"]
    start = time.perf_counter()
    dtype = None if is_packed(path) else "bfloat16"
    backend: Any = zamba2.load(path, backend="torch", device=device, dtype=dtype).backend
    load_seconds, config = time.perf_counter() - start, backend.config
    context, kv, element = prompt_tokens + (new_tokens + 1) / 2, kv_format_named("bf16"), DTYPE_BYTES["BF16"]
    if is_packed(path):
        file, packing, _ = open_packed(path, config)
        name, moved = packing.format.name, decode_bytes(file, config, context, kv, element)
    else:
        name, moved = "bf16", state_bytes(config, context, kv, element) | {"weights": 2.0 * config.weights_per_token()}
    yield {
        "load_seconds": load_seconds, "isa": device_name(device), "threads": 1, "format": name, "kv_format": kv.name,
        "decode_bytes": moved, "prefill_operations": prefill_operations(config, prompt_tokens), "kind": GPU_PRODUCTS,
    }  # fmt: skip

    def limits() -> dict[str, Any]:
        found = gpu_limits(device)
        if device != "cpu":
            import torch

            torch.cuda.reset_peak_memory_stats(device)  # what the probes held is not the model's
        return found

    yield from answers(backend, request, limits)


def answers(backend: Any, request: dict[str, Any], limits: Callable[[], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One for each line of standard input."""
    texts = random_ids(backend.config.vocab_size, request["batch"], request["prompt_tokens"])
    for line in sys.stdin:
        if line.strip() == "warm":
            repeat(backend, [text[:WARM_TOKENS] for text in texts], 1)
            yield {}
        elif line.strip() == "limits":
            yield limits()
        else:
            yield repeat(backend, texts, request["new_tokens"]) | gpu_memory(request["device"])


def device_name(device: str) -> str:
    """What a device is called by those who made it."""
    import torch

    return torch.cuda.get_device_name(device) if device != "cpu" else "PyTorch"


def gpu_limits(device: str) -> dict[str, Any]:
    """What the device gives at best, in the keys of the engine's probes: bytes per second of a copy, read and written ones counted,
    and operations per second of a product of large bf16 matrices of random numbers. Medians of several."""
    import torch

    small = device == "cpu"
    source = torch.empty(1 << (20 if small else 31), dtype=torch.uint8, device=device)
    target, size = torch.empty_like(source), 256 if small else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    copy = median_seconds(lambda: target.copy_(source), device)
    multiply = median_seconds(lambda: a @ b, device)
    found = {"read_bandwidth": 2 * source.nbytes / copy, "read_pattern": "copied from memory to memory, bytes read and written"}
    return found | {"product_rates": {GPU_PRODUCTS: 2 * size**3 / multiply}}


def median_seconds(work: Callable[[], object], device: str, *, repeats: int = 10) -> float:
    """Of a run of ``work``, which the device is waited for, behind two to warm up."""
    import torch

    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def repeat(backend: Any, texts: list[npt.NDArray[np.int32]], new_tokens: int) -> dict[str, Any]:
    """Read the prompts into new states, then decode greedily, all sequences together."""
    start = time.perf_counter()
    states = [backend.new_state() for _ in texts]
    rows = [Row(text, state) for text, state in zip(texts, states, strict=True)]
    tokens = likeliest(backend.forward(rows))
    first = time.perf_counter()
    for _ in range(new_tokens):
        tokens = likeliest(backend.forward([Row(token, state) for token, state in zip(tokens, states, strict=True)]))
    end = time.perf_counter()
    return {
        "ttft_seconds": first - start,
        "prefill_tokens_per_second": sum(map(len, texts)) / (first - start),
        "decode_tokens_per_second": len(texts) * new_tokens / (end - first),
        "state_bytes": sum(state.nbytes for state in states),
    } | memory()


def likeliest(scores: Iterable[Any]) -> list[npt.NDArray[np.int32]]:
    """The next token of each sequence, int32 [1]; a GPU is waited for."""
    return [own.likeliest()[-1:] for own in scores]


def product_kind(isa: str, format: str) -> str:
    """The kind of product, as the engine's probes name them, that long prompts go through."""
    if isa == "amx":
        return "bf16 tiles"
    if format == "bf16":
        return "bf16 dot products" if isa == "avx512bf16" else "fp32 multiply-adds"
    if isa == "neon_i8mm":
        return "int8 matrix products"
    return "4-bit dot products" if (isa, format) == ("avx2", "q4") else "int8 dot products"  # AVX2 adds those of 4 bits in 16


if __name__ == "__main__":
    try:
        asked = json.loads(sys.argv[1])
        for answer in serve(asked) if "kv_format" in asked else serve_torch(asked):
            print(json.dumps(answer), flush=True)
    except Zamba2Error as error:
        print(json.dumps({"error": str(error)}), flush=True)
