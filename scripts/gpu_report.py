"""What scripts/gpu.py measured, as Markdown: the lines beside limits and rivals, and where the time of a token, a prompt and a step goes.

Used by scripts/update_docs.py. A floor is what a kernel's bytes take at the measured copy rate, or its operations at the measured
product rate, whichever bounds it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from zamba2.bench.measure import prefill_operations
from zamba2.config import Config

__all__ = ["lines_table", "profile_tables"]

BF16, FP32 = 2, 4  # bytes


class Kind(NamedTuple):
    """Kernels whose names match ``pattern``. seconds: their floor, None where there is none to name."""

    title: str
    pattern: str
    seconds: float | None


def lines_table(results: Mapping[str, Any]) -> str:
    """Measured figures beside limits, rivals and goals, and what they were measured on."""
    rows = ["| one NVIDIA GPU, 2.7B shape | measured | beside | ratio | goal | reached |", "|---|---|---|---|---|---|"]
    for line in results["table"]:
        goal = "" if line["goal"] is None else f"{line['goal']:g}"
        reached = "" if line["goal"] is None else "yes" if line["ratio"] >= line["goal"] else "no"
        rows.append(f"| {line['what']} | {line['measured']} | {line['beside']} | {line['ratio']:.2f} | {goal} | {reached} |")
    machine, versions = results["machine"], results["machine"]["versions"]
    rows.append(
        f"\n{machine['name']}: {machine['copy_bytes_per_second'] / 1e12:.2f} TB/s copied (bytes read and written), "
        f"{machine['product_operations_per_second'] / 1e12:.0f} TFLOP/s in bf16 products, both in the same run; random weights; torch "
        f"{versions['torch']}, Triton {versions['triton']}, transformers {versions['transformers']}; by `python scripts/gpu.py`. Ratios of "
        f"times and of memory are theirs over ours, others ours over theirs."
    )
    return "\n".join(rows)


def profile_tables(results: Mapping[str, Any]) -> str:
    """The kernels of a decoded token, of a prompt and of a training step, by kind, beside their floors."""
    config = Config.from_dict(results["config"])
    copy, product = results["machine"]["copy_bytes_per_second"], results["machine"]["product_operations_per_second"]
    parts = []
    token = results.get("generate", {}).get("profile", {})
    if "longest" in token:
        context = results["generate"]["decode"]["context"]
        title = f"One decoded token, one sequence of {context:.0f} tokens, bf16"
        parts.append(profile(title, token, token_kinds(config, context, copy)))
    prompt = results.get("generate", {}).get("prefill_profile", {})
    if "longest" in prompt:
        tokens = prompt["prompt_tokens"]
        parts.append(profile(f"A prompt of {tokens:,} tokens, bf16", prompt, prompt_kinds(config, tokens, copy, product)))
    step = results.get("train", {}).get("profile", {})
    if "longest" in step:
        tokens = results["train"]["tokens"]
        parts.append(profile(f"One SFT step of {tokens:,} tokens, bf16, AdamW", step, step_kinds(config, results["train"], copy, product)))
    return "\n\n".join(parts)


def profile(title: str, found: Mapping[str, Any], kinds: Sequence[Kind]) -> str:
    rows = [f"| {title} | kernels | us | floor, us | share |", "|---|---|---|---|---|"]
    total, seen = found["microseconds"], 0.0
    left = [entry for entry in found["longest"] if not entry[0].startswith("Optimizer.step")]
    total -= sum(entry[2] for entry in found["longest"] if entry[0].startswith("Optimizer.step"))  # a span, not a kernel
    for kind in kinds:
        own = [entry for entry in left if re.search(kind.pattern, entry[0])]
        left = [entry for entry in left if entry not in own]
        if own:
            time = sum(entry[2] for entry in own)
            seen += time
            floor = "" if kind.seconds is None else f"{kind.seconds * 1e6:,.0f}"
            share = "" if kind.seconds is None else f"{kind.seconds * 1e6 / time:.0%}"
            rows.append(f"| {kind.title} | {sum(entry[1] for entry in own)} | {time:,.0f} | {floor} | {share} |")
    rows.append(f"| all others | | {total - seen:,.0f} | | |")
    rows.append(f"| together | {found['kernels']} | {total:,.0f} | | |")
    return "\n".join(rows)


def token_kinds(config: Config, context: float, copy: float) -> list[Kind]:
    state = 2 * (config.ssm_state_bytes + config.conv_state_bytes(BF16))
    return [
        Kind("products with weights", "^_matvec", BF16 * config.weights_per_token() / copy),
        Kind("convolution, scan step and gate", "^_mixer_step", state / copy),
        Kind("attention", "^_(attend|combine|rotate)", config.kv_bytes_per_token() * context / copy),
    ]


def prompt_kinds(config: Config, tokens: int, copy: float, product: float) -> list[Kind]:
    layers, hybrids = config.num_hidden_layers, len(config.hybrid_layer_ids)

    def moved(values: float) -> float:
        """Seconds for values of bf16 per token."""
        return BF16 * values * tokens / copy

    qkv, hidden, inner = config.attention_hidden_size + 2 * config.kv_dim, config.hidden_size, config.d_inner
    attention = 2.0 * tokens**2 * config.attention_hidden_size * hybrids
    return [
        Kind("attention", "sdpa|flash|fmha", attention / product),
        Kind("products with weights", "nvjet|gemm|cutlass|xmma|splitK", prefill_operations(config, tokens) / product),
        Kind("scan and gate", "^_(output|contribution|carry|sum_logs)", moved(3 * inner * layers)),
        Kind("convolution", "^_forward$", moved(2 * config.conv_dim * layers)),
        Kind("sums and norms", "^_(add_norm|rms_norm|concat)", moved(4 * hidden * layers + 6 * hidden * hybrids)),
        Kind("GEGLU and its adapter", "^_geglu", moved(3 * config.intermediate_size * hybrids)),
        Kind("queries, keys and values in their places", "^_place_heads", moved(3 * qkv * hybrids)),
        Kind("torch: copies and the like", "at::native", None),
    ]


def step_kinds(config: Config, train: Mapping[str, Any], copy: float, product: float) -> list[Kind]:
    """Of a training step whose backward pass computes the mixers' insides again."""
    tokens, layers, hybrids = train["tokens"], config.num_hidden_layers, len(config.hybrid_layer_ids)

    def moved(values: float, kernels: int) -> float:
        """Seconds for values of bf16 per token in each of some kernels."""
        return BF16 * values * tokens * kernels / copy

    inner, hidden, up = config.d_inner, config.hidden_size, config.intermediate_size
    gated, plain = moved(3 * inner, 2 * layers) + moved(5 * inner, layers), moved(5 * hidden, layers)
    return [
        Kind("products with weights", "nvjet|gemm|cutlass|xmma", train["operations"] / product),
        Kind("attention", "sdpa|flash|fmha", train["attention_operations"] / product),
        Kind("AdamW", "FusedOptimizer|multi_tensor", config.num_parameters * 7 * BF16 / copy),
        Kind("scan", "^_(output|contribution|carry|sum_logs|gradients)", moved(2 * inner, 2 * layers) + moved(3 * inner, layers)),
        Kind("norms", "^_(rms_norm|concat)", gated + plain),
        Kind("convolution", "^_(forward|backward)$", moved(2 * config.conv_dim, 2 * layers) + moved(3 * config.conv_dim, layers)),
        Kind("GEGLU", "^_geglu", moved(5 * up, 2 * hybrids) + moved(7 * up, hybrids)),
        Kind("hoisted sums", "^_add_hoisted", None),
        Kind("loss", "^_cross_entropy", moved(3 * config.vocab_size, 1)),
        Kind("torch: sums of gradients, copies, concatenations", "at::native", None),
    ]
