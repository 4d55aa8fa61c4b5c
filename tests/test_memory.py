"""What loading and scanning may hold in memory at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zamba2.config import Config
from zamba2.model.model import Zamba2
from zamba2.model.ops import select
from zamba2.weights.checkpoint import save_checkpoint

# 38 M parameters, the largest tensor a third of them: enough to tell one copy from two.
SHAPE = Config(
    hidden_size=512, num_hidden_layers=6, vocab_size=28000, hybrid_layer_ids=(1, 3, 5), num_mem_blocks=2, mamba_d_state=16,
    n_mamba_heads=16, num_attention_heads=8, num_key_value_heads=8, intermediate_size=2048, adapter_rank=8,
)  # fmt: skip

LOAD = """
import json, resource, sys, torch
from pathlib import Path
from zamba2.weights.checkpoint import load_model
unit = 1 if sys.platform == "darwin" else 1024
torch.nn.Linear(8, 8).bfloat16()(torch.ones(1, 8).bfloat16())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
model = load_model(Path(sys.argv[1]), dtype=getattr(torch, sys.argv[2]))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
sizes = [p.nbytes for p in model.parameters()]
print(json.dumps({"grown": after - before, "model": sum(sizes), "largest": max(sizes)}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = Zamba2(SHAPE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    folder = tmp_path_factory.mktemp("memory") / "checkpoint"
    save_checkpoint(model.bfloat16(), folder, max_shard_bytes=60_000_000)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_loading_holds_the_model_and_one_tensor(checkpoint: Path, dtype: str) -> None:
    """Peak memory of loading is at most the model plus its largest tensor, converted or not."""
    command = [sys.executable, "-c", LOAD, str(checkpoint), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "MALLOC_ARENA_MAX": "1"})
    sizes = json.loads(done.stdout)
    assert sizes["model"] > 70_000_000
    assert sizes["grown"] <= sizes["model"] + sizes["largest"] + 12_000_000  # the last for Python's own objects


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return out


@pytest.mark.parametrize("documents", [False, True])
def test_the_scan_makes_nothing_larger_than_its_output(documents: bool) -> None:
    """Memory of the scan is O(chunk) beside its inputs and outputs, however long the sequence."""
    length, heads, channels, states = 5000, 4, 8, 16
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, length, heads, channels, generator=generator)
    dt = torch.rand(1, length, heads, generator=generator)
    B, C = (torch.randn(1, length, 1, states, generator=generator) for _ in range(2))
    A, D = -torch.rand(heads, generator=generator) - 0.1, torch.ones(heads)
    seq_idx = (torch.arange(length) // 700)[None] if documents else None
    with torch.inference_mode(), Largest() as largest:
        select("torch").ssd_scan(x, dt, A, B, C, D, chunk_size=256, seq_idx=seq_idx)
    assert largest.elements == x.numel()
