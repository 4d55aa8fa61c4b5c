#!/usr/bin/env python3
"""How much of a model the packed formats keep, on real text: KL divergence and top-1 agreement, weights and activations apart.

    python scripts/quality.py train FOLDER --minutes 8     # a small Zamba2 trained on novels, as no trained weights are public here
    python scripts/quality.py measure --model FOLDER --out docs/measurements/quality.json

Everything is compared with the bf16 checkpoint computed in fp32 by the PyTorch model, position by position.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from zamba2.config import Config
from zamba2.model import model as model_module
from zamba2.model.model import Zamba2
from zamba2.runtime.backend import Row
from zamba2.runtime.calibrate import second_moments
from zamba2.runtime.native import NativeBackend
from zamba2.weights.calibration import Moments
from zamba2.weights.checkpoint import load_model, save_checkpoint
from zamba2.weights.packed import Packing, quantize

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from native_cases import Twin, round_int8  # noqa: E402  (the tests' PyTorch model of what the engine computes)

SHARED = ROOT.parent / "shared" / "data"
TOKENIZER = SHARED / "tokenizer" / "mistral_v1_tokenizer.json"  # the real one
SMALL_TOKENIZER = ROOT / "src" / "zamba2" / "random" / "tokenizer.json"  # for what is trained in minutes
TRAINED_ON = (
    "pg514_little_women.latin1.txt", "pg1342_pride_and_prejudice.txt", "pg1661_sherlock_holmes.latin1.txt", "pg120_treasure_island.txt",
)  # fmt: skip
CALIBRATED_ON, MEASURED_ON = "pg120_treasure_island.txt", "pg113_secret_garden.txt"

Ints = npt.NDArray[np.int32]

SMALL = Config(
    hidden_size=256, num_hidden_layers=6, vocab_size=1024, hybrid_layer_ids=(1, 3, 5), num_mem_blocks=2, mamba_d_state=32,
    n_mamba_heads=8, num_attention_heads=8, num_key_value_heads=8, intermediate_size=768, chunk_size=64, adapter_rank=16,
)  # fmt: skip


def novel(name: str) -> str:
    """A novel's own text, without Project Gutenberg's header and footer, a paragraph a line."""
    text = (SHARED / "text" / name).read_text(encoding="latin-1" if ".latin1." in name else "utf-8-sig")
    body = re.split(r"\*\*\* ?(?:START|END) OF TH[^\n]*", text)[1]
    return "\n\n".join(" ".join(part.split()) for part in body.split("\n\n") if part.strip())


def tokens_of(text: str, tokenizer: Path) -> list[int]:
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(tokenizer)).encode(text).ids
    return ids


def initialize(model: Zamba2, seed: int) -> None:
    """Weights as training starts with them: normal, small at the end of each branch, dt and A as Mamba2 sets them."""
    generator = torch.Generator().manual_seed(seed)
    depth = math.sqrt(2 * model.config.num_hidden_layers)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("A_log"):
                p.copy_(torch.log(torch.arange(1, len(p) + 1).float()))
            elif name.endswith("dt_bias"):
                dt = torch.exp(torch.empty_like(p).uniform_(math.log(1e-3), math.log(1e-1), generator=generator))
                p.copy_(torch.log(torch.expm1(dt)))
            elif name.endswith(("norm.weight", ".D")):
                p.fill_(1)
            elif name.endswith("conv1d.bias"):
                p.zero_()
            elif name.endswith("conv1d.weight"):
                p.uniform_(-0.5, 0.5, generator=generator)
            else:
                last = name.endswith(("out_proj.weight", "linear.weight", "adapter_list.1.weight"))
                scale = 0.02 if name.startswith("embed") else p[0].numel() ** -0.5 / (depth if last else 1)
                p.normal_(0, scale, generator=generator)


def train(folder: Path, minutes: float, seed: int = 1) -> None:
    """Train SMALL on novels for some minutes of wall time and save it with the tokenizer, in bf16."""
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    model = Zamba2(SMALL)
    initialize(model, seed)
    ids = torch.tensor([i for name in TRAINED_ON for i in tokens_of(novel(name), SMALL_TOKENIZER)])
    matrices, others = ([p for p in model.parameters() if (p.ndim == 2) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95))
    batch, length = 4, 128
    start, step, shown = time.monotonic(), 0, 0.0
    while (share := (time.monotonic() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * (1 - 0.95 * share)
        at = torch.randint(len(ids) - length - 1, (batch,))
        rows = torch.stack([ids[i : i + length + 1] for i in at])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        shown = loss.item() if not shown else 0.95 * shown + 0.05 * loss.item()
        if step % 10 == 0:
            print(f"step {step}, {step * batch * length} tokens, {share:.0%} of the time, loss {shown:.3f}", flush=True)
    save_checkpoint(model.requires_grad_(False).bfloat16(), folder)
    shutil.copyfile(SMALL_TOKENIZER, folder / "tokenizer.json")


SYNTHETIC = Config(
    hidden_size=256, num_hidden_layers=10, vocab_size=32000, hybrid_layer_ids=(2, 4, 6, 8), num_mem_blocks=2, mamba_d_state=32,
    n_mamba_heads=8, num_attention_heads=8, num_key_value_heads=8, intermediate_size=1024, chunk_size=64, adapter_rank=32,
)  # fmt: skip


def synthetic(config: Config, seed: int = 1) -> Zamba2:
    """Random weights that are about as hard to round as trained ones.

    Matrices are Student-t with 5 degrees of freedom. Norms have log-normal weights and one channel in 64 ten times the
    rest, so that a few inputs of each product are far larger than the others. Layers add little to the residual stream,
    or the model would be chaotic: Q8_0's KL divergence is then 0.001 as on published models, not 0.2. The final norm's
    random signs keep a token from predicting itself through the tied table; its size gives logits a standard deviation of 3.
    """
    rng = np.random.default_rng(seed)
    model = Zamba2(config)
    initialize(model, seed)

    def normalized(values: np.ndarray) -> Tensor:
        return torch.from_numpy((values / np.sqrt((values**2).mean())).astype(np.float32))

    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                weight = np.exp(0.5 * rng.standard_normal(len(p)))
                if name == "final_layernorm.weight":
                    weight *= rng.choice([-1, 1], len(p))
                else:
                    weight[rng.permutation(len(p))[: max(1, len(p) // 64)]] *= 10
                p.copy_(normalized(weight))
            elif p.ndim == 2:
                scale = 1 if name.startswith("embed") else (0.15 if name.endswith("out_proj.weight") else 1) / np.sqrt(p.shape[1])
                p.copy_(normalized(rng.standard_t(5, p.shape)) * scale)
        model.final_layernorm.weight.mul_(3 / math.sqrt(config.hidden_size))
        for p in model.parameters():
            p.copy_(p.bfloat16())
    return model.requires_grad_(False)


def log_probabilities(model: Zamba2, tokens: Tensor, multiply: Callable[[Tensor, Tensor], Tensor] = F.linear) -> Tensor:
    """Of the next token after each of ``tokens`` (T,), with products as given: (T, V)."""
    with mock.patch.object(model_module, "matmul", multiply), torch.no_grad():
        return model(tokens[None])[0].float().log_softmax(-1)


def with_codes(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T with x as int8 codes per group of 32, as the engine takes it."""
    return F.linear(round_int8(x)[1].float(), weight)


def with_halves(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T with both sides rounded to bf16, as matrix units take it."""
    return F.linear(x.bfloat16().float(), weight.bfloat16().float())


def distance(reference: Tensor, found: Tensor) -> dict[str, float]:
    """Of log-probabilities (T, V): KL divergence of each position in nats, and how often the likeliest token is the same."""
    divergence = (reference.exp() * (reference - found)).sum(-1).double()
    at = torch.quantile(divergence, torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64))
    agreement = (reference.argmax(-1) == found.argmax(-1)).double().mean()
    values = {"kl_mean": divergence.mean(), "kl_median": at[0], "kl_p90": at[1], "kl_p99": at[2], "kl_most": divergence.max()}
    return {name: float(value) for name, value in values.items()} | {"top1_agreement": float(agreement)}


def unpacked(config: Config, folder: Path) -> Zamba2:
    """The model with the weights that a packed checkpoint holds."""
    model = Twin(folder, config)
    model.load()
    for block in model.shared_blocks:
        block.self_attn.split = tuple(half.float() for half in block.self_attn.split)
    return model.float()  # the twin computes in fp64


def rounded_by_ggml(model: Zamba2, kind: str, embeddings: str) -> Zamba2:
    """A copy of the model with each matrix rounded as llama.cpp's Q4_0 or Q8_0 does it (the gguf package's own functions)."""
    import gguf

    copy = Zamba2(model.config).requires_grad_(False)
    copy.load_state_dict(model.state_dict())
    for name, parameter in copy.named_parameters():
        if parameter.ndim == 2:
            type = gguf.GGMLQuantizationType[embeddings if name in ("embed_tokens.weight", "lm_head.weight") else kind]
            cols = parameter.shape[1]
            whole = F.pad(parameter, (0, -cols % 32)).numpy()  # of groups; an adapter's rank may be less
            stored = gguf.quants.dequantize(gguf.quants.quantize(whole, type), type)
            parameter.data.copy_(torch.from_numpy(stored[:, :cols]))
    return copy


def measure(model: Zamba2, folder: Path, tokens: Ints, calibration: Ints, *, threads: int | None = None) -> dict[str, Any]:
    """All figures of one model, whose weights are bf16 numbers, on ``tokens``. folder: an empty one for its packed checkpoints."""
    read = torch.from_numpy(tokens).long()
    reference = log_probabilities(model, read)
    save_checkpoint(model, folder / "hub", state_dict={name: weight.bfloat16() for name, weight in model.named_parameters()})

    def packed(name: str, format: str, embeddings: str | None = None, moments: dict[str, Moments] | None = None) -> Path:
        packing = Packing.named(format, embeddings)
        quantize(folder / "hub", folder / name, packing.format, embeddings=packing.embeddings, moments=moments)
        return folder / name

    files = {
        "q8": packed("q8", "q8"), "q4": packed("q4", "q4"), "q4, embeddings q4": packed("q4-q4", "q4", "q4"),
        "q4, embeddings bf16": packed("q4-bf16", "q4", "bf16"),
    }  # fmt: skip
    for format in ("q8", "q4"):
        seen = second_moments(NativeBackend(files[format], model.config, threads=threads), calibration)
        files[f"{format} calibrated"] = packed(f"{format}-calibrated", format, moments=seen)
    sides: dict[str, tuple[Zamba2, Path | None]] = {name: (unpacked(model.config, path), path) for name, path in files.items()}
    for name, kinds in {"Q8_0": ("Q8_0", "Q8_0"), "Q4_0": ("Q4_0", "Q8_0"), "Q4_0, embeddings Q4_0": ("Q4_0", "Q4_0")}.items():
        sides[name] = (rounded_by_ggml(model, *kinds), None)

    loss = -reference[:-1].gather(1, read[1:, None]).mean()
    found: dict[str, Any] = {
        "tokens": len(tokens), "entropy": float(-(reference.exp() * reference).sum(-1).mean()), "loss": float(loss),
        "int8 activations alone": distance(reference, log_probabilities(model, read, with_codes)),
        "bf16 matrix units alone": distance(reference, log_probabilities(model, read, with_halves)),
        "formats": {},
    }  # fmt: skip
    for name, (own, path) in sides.items():
        with_int8 = log_probabilities(own, read, with_codes)
        row: dict[str, Any] = {
            "weights": distance(reference, log_probabilities(own, read)), "weights and int8 activations": distance(reference, with_int8),
        }  # fmt: skip
        if path is not None:
            backend = NativeBackend(path, model.config, threads=threads)
            logits = backend.forward([Row(tokens, backend.new_state(), len(tokens))])[0].numpy()
            row["engine"] = distance(reference, torch.from_numpy(logits).log_softmax(-1))
            row["bytes"] = (path / "model.safetensors").stat().st_size
            row["between int8 and matrix units"] = distance(with_int8, log_probabilities(own, read, with_halves))
        found["formats"][name] = row
        print(f"{name:24}", *(f"{part} {row[part]['kl_mean']:.5f} " for part in row if part != "bytes"), file=sys.stderr, flush=True)
    kl = {name: row["weights"]["kl_mean"] for name, row in found["formats"].items()}
    found["ratios"] = {
        "q8 / Q8_0": kl["q8"] / kl["Q8_0"], "q4 / Q4_0": kl["q4"] / kl["Q4_0"],
        "q4 / Q4_0, embeddings in the same format": kl["q4, embeddings q4"] / kl["Q4_0, embeddings Q4_0"],
        "q4 calibrated / q4": kl["q4 calibrated"] / kl["q4"], "embeddings q8 / q4": kl["q4"] / kl["q4, embeddings q4"],
    }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train a small model on novels")
    training.add_argument("folder", type=Path)
    training.add_argument("--minutes", type=float, default=8)
    measuring = commands.add_parser("measure", help="measure the synthetic model and, with --model, others")
    measuring.add_argument("--model", type=Path, action="append", default=[], help="folder of a checkpoint with its tokenizer; repeatable")
    measuring.add_argument("--tokens", type=int, default=768)
    measuring.add_argument("--calibrate-tokens", type=int, default=4096)
    measuring.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "train":
        return train(arguments.folder, arguments.minutes)
    result: dict[str, Any] = {
        "measured_on": MEASURED_ON, "calibrated_on": CALIBRATED_ON, "calibration_tokens": arguments.calibrate_tokens, "models": {},
    }  # fmt: skip
    for source in (None, *arguments.model):
        name, tokenizer = ("synthetic", TOKENIZER) if source is None else (source.name, source / "tokenizer.json")
        model = synthetic(SYNTHETIC) if source is None else load_model(source, dtype=torch.float32)
        print(f"# {name}", file=sys.stderr)
        tokens = np.array(tokens_of(novel(MEASURED_ON), tokenizer)[: arguments.tokens], dtype=np.int32)
        calibration = np.array(tokens_of(novel(CALIBRATED_ON), tokenizer)[: arguments.calibrate_tokens], dtype=np.int32)
        with tempfile.TemporaryDirectory() as folder:
            result["models"][name] = measure(model, Path(folder), tokens, calibration)
    text = json.dumps(result, indent=1)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
