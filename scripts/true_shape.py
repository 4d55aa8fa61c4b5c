#!/usr/bin/env python3
"""Zamba2-2.7B's true shape with random bf16 weights: this package beside transformers, each in a process of its own.

    python scripts/true_shape.py parity    # errors against transformers in fp32 on a 600-token text, peak memory of each
    python scripts/true_shape.py speed     # prefill of 512 tokens, decode, peak memory, in bf16
    python scripts/true_shape.py all --rounds 3 --out docs/measurements/true_shape.json

The checkpoint and the rival's measurement are those of ``zamba2 bench --compare transformers``. Needs the
[hf] extra, 5.3 GB of disk and 16 GB of memory. The last line of standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from zamba2.bench.peers import PEERS, Worker, random_checkpoint
from zamba2.config import PRESETS
from zamba2.runtime.processors import machine

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
CHECKPOINT = random_checkpoint(PRESETS["2.7b"])
TEXT = SHARED / "data" / "text" / "pg1342_pride_and_prejudice.txt"
TOKENIZER = SHARED / "data" / "tokenizer" / "mistral_v1_tokenizer.json"
LENGTH = 600  # tokens of text for parity: more than two chunks of 256
SCALES = {"float32": "fp32", "bfloat16": "bf16"}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def text_tokens() -> list[int]:
    """The first tokens of the novel itself, through the real tokenizer."""
    from tokenizers import Tokenizer

    text = TEXT.read_text(encoding="utf-8-sig")
    story = text[text.index("It is a truth universally acknowledged") :][: LENGTH * 8]
    ids: list[int] = Tokenizer.from_file(str(TOKENIZER)).encode(story).ids
    return ids[:LENGTH]


def transformers_model(dtype: str) -> Any:
    """The checkpoint in transformers, without its floor of dt, which is not in the model."""
    import torch
    from transformers import Zamba2ForCausalLM

    model = Zamba2ForCausalLM.from_pretrained(CHECKPOINT, dtype=getattr(torch, dtype)).eval()
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    return model


def logits_worker(implementation: str, dtype: str, target: Path) -> None:
    """Write the logits of every position, fp32 (T, V), and print the peak memory."""
    import numpy as np
    import torch

    torch.set_num_threads(2)
    tokens = text_tokens()
    if implementation == "zamba2":
        import zamba2
        from zamba2.runtime.backend import Row

        backend = zamba2.load(CHECKPOINT, dtype=dtype, device="cpu").backend
        scores = backend.forward([Row(np.array(tokens, dtype=np.int32), backend.new_state(), logits=LENGTH)])[0].numpy()
    else:
        with torch.inference_mode():
            scores = transformers_model(dtype)(torch.tensor([tokens])).logits[0].float().numpy()
    np.save(target, scores)
    print(json.dumps({"peak_rss_bytes": peak_bytes()}))


def speed_worker(prompt_tokens: int, new_tokens: int) -> None:
    """Our side of the rival's measurement: the same prompt, repeats and definitions."""
    import numpy as np
    import torch

    import zamba2
    from zamba2.runtime.backend import Row

    torch.set_num_threads(2)
    start = time.perf_counter()
    backend = zamba2.load(CHECKPOINT, device="cpu").backend
    load_seconds = time.perf_counter() - start
    prompt = torch.randint(3, 32000, (prompt_tokens,), generator=torch.Generator().manual_seed(1)).numpy().astype(np.int32)

    def timed(new: int) -> float:
        start = time.perf_counter()
        state = backend.new_state()
        row = Row(prompt, state)
        for _ in range(new):
            token = int(backend.forward([row])[0].numpy()[-1].argmax())
            row = Row(np.array([token], dtype=np.int32), state)
        return time.perf_counter() - start

    timed(1)
    first = statistics.median(timed(1) for _ in range(3))
    whole = statistics.median(timed(1 + new_tokens) for _ in range(3))
    result = {
        "implementation": "zamba2", "load_seconds": load_seconds, "ttft_seconds": first,
        "prefill_tokens_per_second": prompt_tokens / first, "decode_tokens_per_second": new_tokens / (whole - first),
        "peak_rss_bytes": peak_bytes(),
    }  # fmt: skip
    print(json.dumps(result))


def run(*command: str | Path) -> dict[str, Any]:
    """Run a child; its last line is one JSON document."""
    print("$", " ".join(map(str, command)), file=sys.stderr, flush=True)
    output = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return result


def versions() -> str:
    return f"torch {version('torch')}, transformers {version('transformers')}"


def parity() -> dict[str, Any]:
    """Error norm, mean KL divergence and worst relative logit of each side against transformers in fp32."""
    import numpy as np

    def log_softmax(scores: Any) -> Any:
        return scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True)

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for implementation, dtype in [(i, d) for d in SCALES for i in ("transformers", "zamba2")]:
            name = f"{implementation}_{SCALES[dtype]}"
            target = Path(folder) / f"{name}.npy"
            results[name] = run(sys.executable, __file__, "logits", implementation, dtype, target)
        truth = np.load(Path(folder) / "transformers_fp32.npy").astype(np.float64)
        true_log = log_softmax(truth)
        for name in ("zamba2_fp32", "transformers_bf16", "zamba2_bf16"):
            scores = np.load(Path(folder) / f"{name}.npy").astype(np.float64)
            kl = (np.exp(true_log) * (true_log - log_softmax(scores))).sum(-1)
            results[name] |= {
                "error_norm": float(np.linalg.norm(scores - truth) / np.linalg.norm(truth)),
                "worst_over_largest": float(np.abs(scores - truth).max() / np.abs(truth).max()),
                "kl_divergence": float(kl.mean()),
            }
    ours, theirs = results["zamba2_bf16"], results["transformers_bf16"]
    results["bf16_error_ratio"] = ours["error_norm"] / theirs["error_norm"]
    results["bf16_kl_ratio"] = ours["kl_divergence"] / theirs["kl_divergence"]
    return results


def rival(command: list[str | Path], prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """transformers in a process of its own: medians of three after one to warm up."""
    request = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "threads": 2}
    worker = Worker("transformers", [*command, json.dumps(request)])
    try:
        _, *runs = [worker.ask("repeat") for _ in range(4)]
    finally:
        worker.close()
    return worker.ready | {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def speed(command: list[str | Path], rounds: int) -> dict[str, Any]:
    """Medians over interleaved rounds; ratios are ours over theirs."""
    ours, theirs = [], []
    for _ in range(rounds):
        theirs.append(rival(command, 512, 16))
        ours.append(run(sys.executable, __file__, "speed-worker", "512", "16"))
    keys = ("load_seconds", "prefill_tokens_per_second", "decode_tokens_per_second", "peak_rss_bytes")
    sides = {"zamba2": ours, "transformers": theirs}
    table = {side: {key: statistics.median(r[key] for r in runs) for key in keys} for side, runs in sides.items()}
    return table | {"ratios": {key: table["zamba2"][key] / table["transformers"][key] for key in keys}, "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["parity", "speed", "all", "logits", "speed-worker"])
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=1, help="interleaved repeats of the speed measurement")
    parser.add_argument("--out", type=Path, help="also write the JSON document to this file")
    arguments = parser.parse_args()
    if arguments.command == "logits":
        logits_worker(arguments.rest[0], arguments.rest[1], Path(arguments.rest[2]))
        return
    if arguments.command == "speed-worker":
        speed_worker(*map(int, arguments.rest))
        return
    command = PEERS["transformers"](PRESETS["2.7b"], None)
    measured: dict[str, Any] = {"machine": f"{machine()}, {versions()}"}
    if arguments.command in ("parity", "all"):
        measured["parity"] = parity()
    if arguments.command in ("speed", "all"):
        measured["speed"] = speed(command, arguments.rounds)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
