#!/usr/bin/env python3
"""One training step of a 200 M-parameter Zamba2 on 2,048 tokens: this package beside transformers' own class, on the CPU.

    python scripts/train_speed.py                     # three rounds of each, in turn, each in a process of its own
    python scripts/train_speed.py --rounds 5 --out docs/measurements/train_speed.json

A step is forward, backward and AdamW over fp32 weights with bf16 autocast; the first two of each process are a warm-up: transformers'
second one took half as long again as its third. Same random weights (our checkpoint, read by both), same tokens. Needs the [hf] extra
and 22 GB. The last line of standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from zamba2.config import Config
from zamba2.runtime.memory import memory
from zamba2.runtime.processors import machine

SHAPE = Config(
    hidden_size=896, num_hidden_layers=28, vocab_size=32000, hybrid_layer_ids=(3, 8, 13, 18, 23), num_mem_blocks=2, mamba_d_state=64,
    n_mamba_heads=28, num_attention_heads=14, num_key_value_heads=14, intermediate_size=3584, chunk_size=256, adapter_rank=64,
)  # fmt: skip
LENGTH = 2048
WARM = 2  # steps of each process that are not measured


def worker(name: str, folder: str, steps: int) -> None:
    """Load, step, and print seconds of each step, the losses and the peak memory as one JSON line."""
    import torch

    if name == "zamba2":
        from zamba2.hf import Zamba2ForCausalLM as Model
    else:
        from transformers import Zamba2ForCausalLM as Model
    model: Any = Model.from_pretrained(folder, dtype=torch.float32)
    model.train()
    ids = torch.randint(3, SHAPE.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    seconds, losses = [], []
    for _ in range(WARM + steps):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    print(json.dumps({"seconds": seconds[WARM:], "losses": losses, "peak_rss_bytes": memory()["peak_rss_bytes"]}))


def main() -> None:
    parser = argparse.ArgumentParser(description="One training step beside transformers.")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each (%(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="measured steps a process (%(default)s)")
    parser.add_argument("--out", type=Path, help="also write the result here")
    parser.add_argument("--worker", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(*arguments.worker, arguments.steps)
        return
    found: dict[str, list[dict[str, Any]]] = {"zamba2": [], "transformers": []}
    with tempfile.TemporaryDirectory() as folder:
        write(folder)
        for number in range(arguments.rounds):
            for name in found:
                print(f"round {number + 1} of {arguments.rounds}: {name}", file=sys.stderr, flush=True)
                command = [sys.executable, __file__, "--steps", str(arguments.steps), "--worker", name, folder]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"TQDM_DISABLE": "1"})
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    result: dict[str, Any] = {
        name: {
            "tokens_per_second": LENGTH / statistics.median(s for run in runs for s in run["seconds"]),
            "peak_rss_bytes": statistics.median(run["peak_rss_bytes"] for run in runs),
            "losses": runs[0]["losses"],
            "runs": runs,
        }
        for name, runs in found.items()
    }
    ours, theirs = result["zamba2"], result["transformers"]
    result |= {
        "speed_ratio": ours["tokens_per_second"] / theirs["tokens_per_second"],
        "memory_ratio": ours["peak_rss_bytes"] / theirs["peak_rss_bytes"],
        "parameters": SHAPE.num_parameters, "tokens": LENGTH, "versions": {name: version(name) for name in ("torch", "transformers")},
        "machine": machine(),
    }  # fmt: skip
    print(f"{SHAPE.num_parameters / 1e6:.0f} M parameters, one step of {LENGTH} tokens, fp32 weights, bf16 autocast:")
    for name in found:
        print(f"  {name:12} {result[name]['tokens_per_second']:7.1f} tokens/s, {result[name]['peak_rss_bytes'] / 1e9:.2f} GB")
    print(f"  {result['speed_ratio']:.2f} x as fast in {result['memory_ratio']:.2f} x the memory")
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def write(folder: str) -> None:
    """A checkpoint of the shape with fresh weights."""
    import torch
    from transformers import Zamba2Config

    from zamba2.hf import Zamba2ForCausalLM

    torch.manual_seed(0)
    Zamba2ForCausalLM(Zamba2Config.from_dict(SHAPE.to_dict())).save_pretrained(folder)


if __name__ == "__main__":
    main()
