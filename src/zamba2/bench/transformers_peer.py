"""transformers' own models, as a child of ``zamba2 bench`` and ``zamba2 figures``.

python -m zamba2.bench.transformers_peer write CONFIG FOLDER         # a random Zamba2 checkpoint by its own save_pretrained
python -m zamba2.bench.transformers_peer run SOURCE DTYPE REQUEST    # one JSON line when ready, and one per line read

SOURCE is a checkpoint's folder, or a shape in JSON (``zamba2.bench.rivals``), which then gets random weights in memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from zamba2.bench.measure import WARM_TOKENS, gpu_memory, random_ids
from zamba2.bench.rivals import random_model
from zamba2.config import Config
from zamba2.runtime.memory import memory

__all__ = ["write_checkpoint"]


def write_checkpoint(config: Config, target: Path) -> None:
    """A random bf16 checkpoint in the Hub's layout: transformers' own start, with A_log = log(1 .. heads) and dt_bias in [-4, -1],
    so that decays and steps are those of a trained model."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    settings = config.to_dict() | {"rope_theta": config.rope_base, "use_long_context": False}
    model = transformers.Zamba2ForCausalLM(transformers.Zamba2Config(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.copy_(torch.log(torch.arange(1, parameter.numel() + 1).float()))
            elif name.endswith("dt_bias"):
                parameter.uniform_(-4.0, -1.0)
    model.save_pretrained(target)


class Clock(BaseStreamer):  # type: ignore[misc]
    """The times at which tokens come; the prompt itself is put first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def run(source: str, dtype: str, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Answers to lines of standard input, the first without one: measurements of ``generate``, the user's own call; dtype: of torch,
    by name."""
    torch.set_num_threads(request["threads"])
    device, batch = request.get("device", "cpu"), request.get("batch", 1)
    start = time.perf_counter()
    model: Any
    if source.startswith("{"):
        model = random_model(json.loads(source), getattr(torch, dtype), device)
    else:
        model = transformers.Zamba2ForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).to(device).eval()
    yield {
        "load_seconds": time.perf_counter() - start, "version": transformers.__version__, "torch": torch.__version__,
        "weight_bytes": sum(weight.nbytes for weight in model.parameters()),
    }  # fmt: skip
    prompt = torch.tensor([ids.tolist() for ids in random_ids(model.config.vocab_size, batch, request["prompt_tokens"])], device=device)
    for line in sys.stdin:
        if line.strip() == "warm":
            generate(model, prompt[:, :WARM_TOKENS], 1)
            yield {}
        else:
            yield generate(model, prompt, request["new_tokens"]) | memory() | gpu_memory(device)


def generate(model: Any, prompt: torch.Tensor, new: int) -> dict[str, Any]:
    """Read a prompt [batch, length], then decode ``new`` tokens behind the first."""
    clock, (batch, length) = Clock(), prompt.shape
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1 + new, min_new_tokens=1 + new, do_sample=False,
            pad_token_id=0, streamer=clock,
        )  # fmt: skip
    first, last = clock.times[1], clock.times[-1]
    return {
        "ttft_seconds": first - start,
        "prefill_tokens_per_second": batch * length / (first - start),
        "decode_tokens_per_second": batch * new / (last - first),
    }


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write_checkpoint(Config.from_dict(json.loads(sys.argv[2])), Path(sys.argv[3]))
    else:
        try:
            for answer in run(sys.argv[2], sys.argv[3], json.loads(sys.argv[4])):
                print(json.dumps(answer), flush=True)
        except torch.cuda.OutOfMemoryError as error:
            print(json.dumps({"does not fit": str(error).splitlines()[0]}), flush=True)
