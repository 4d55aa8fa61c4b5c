#!/usr/bin/env python3
"""Zamba2-2.7B's true shape with random bf16 weights: this package beside transformers, each in a process of its own.

    python scripts/true_shape.py parity    # errors against transformers in fp32 on a 600-token text, peak memory of each
    python scripts/true_shape.py speed     # prefill of 512 tokens, decode, peak memory, in bf16
    python scripts/true_shape.py all --rounds 3 --out docs/measurements/true_shape.json

The checkpoint and the measurements are those of ``zamba2 bench``. Needs the
[hf] extra, 5.3 GB of disk and 16 GB of memory. The last line of standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from zamba2.bench.peers import PEERS, Worker, random_checkpoint
from zamba2.config import PRESETS
from zamba2.runtime.memory import memory
from zamba2.runtime.processors import machine

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
CHECKPOINT = random_checkpoint(PRESETS["2.7b"])
TEXT = SHARED / "data" / "text" / "pg1342_pride_and_prejudice.txt"
TOKENIZER = SHARED / "data" / "tokenizer" / "mistral_v1_tokenizer.json"
LENGTH = 600  # tokens of text for parity: more than two chunks of 256
SCALES = {"float32": "fp32", "bfloat16": "bf16"}


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
    print(json.dumps({"peak_rss_bytes": memory()["peak_rss_bytes"]}))


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


def side(name: str, command: list[str | Path], request: dict[str, Any]) -> dict[str, Any]:
    """One of the two in a process of its own: medians of three after one to warm up."""
    worker = Worker(name, [*command, json.dumps(request)], {"OMP_NUM_THREADS": str(request["threads"])})
    try:
        _, *runs = [worker.ask("repeat") for _ in range(4)]
    finally:
        worker.close()
    return worker.ready | {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def speed(command: list[str | Path], rounds: int) -> dict[str, Any]:
    """Medians over interleaved rounds, the same prompt and definitions for both; ratios are ours over theirs."""
    request = {"prompt_tokens": 512, "new_tokens": 16, "threads": 2, "device": "cpu", "batch": 1, "path": str(CHECKPOINT)}
    commands = {"transformers": command, "zamba2": [sys.executable, "-m", "zamba2.bench.measure"]}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, own in commands.items():
            runs[name].append(side(name, own, request))
    keys = ("load_seconds", "prefill_tokens_per_second", "decode_tokens_per_second", "peak_rss_bytes")
    table = {name: {key: statistics.median(r[key] for r in found) for key in keys} for name, found in runs.items()}
    return table | {"ratios": {key: table["zamba2"][key] / table["transformers"][key] for key in keys}, "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["parity", "speed", "all", "logits"])
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=1, help="interleaved repeats of the speed measurement")
    parser.add_argument("--out", type=Path, help="also write the JSON document to this file")
    arguments = parser.parse_args()
    if arguments.command == "logits":
        logits_worker(arguments.rest[0], arguments.rest[1], Path(arguments.rest[2]))
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
