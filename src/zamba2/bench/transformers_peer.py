"""transformers' own Zamba2, as a child of ``zamba2 bench``.

python -m zamba2.bench.transformers_peer write CONFIG FOLDER         # a random checkpoint by its own save_pretrained
python -m zamba2.bench.transformers_peer run FOLDER DTYPE REQUEST    # one JSON line when ready, and one per line read
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from zamba2.bench.measure import prompts
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


class Clock(BaseStreamer):
    """The times at which tokens come; the prompt itself is put first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def run(folder: str, dtype: str, request: dict[str, Any]) -> None:
    """Answer lines of standard input with measurements of ``generate``, the user's own call; dtype: of torch, by name."""
    torch.set_num_threads(request["threads"])
    start = time.perf_counter()
    model: Any = transformers.Zamba2ForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.eval()
    ready = {"load_seconds": time.perf_counter() - start, "version": transformers.__version__, "torch": torch.__version__}
    print(json.dumps(ready), flush=True)
    config = Config.from_file(Path(folder) / "config.json")
    length, new = request["prompt_tokens"], request["new_tokens"]
    prompt = torch.tensor([prompts(config, 1, length)[0].tolist()])
    for _ in sys.stdin:
        clock = Clock()
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(prompt, max_new_tokens=1 + new, min_new_tokens=1 + new, do_sample=False, pad_token_id=0, streamer=clock)
        first, last = clock.times[1], clock.times[-1]
        answer = {
            "ttft_seconds": first - start,
            "prefill_tokens_per_second": length / (first - start),
            "decode_tokens_per_second": new / (last - first),
        }
        print(json.dumps(answer | memory()), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write_checkpoint(Config.from_dict(json.loads(sys.argv[2])), Path(sys.argv[3]))
    else:
        run(sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
