"""How well a model predicts a text, and how far one model's predictions are from another's.

A text is cut into windows of ``context`` tokens. Each is read from a fresh state behind the begin token, so every token but those is
scored once, given what stands before it in its window. Natural logarithms throughout; sums are fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zamba2.errors import Zamba2Error
from zamba2.language.model import LanguageModel
from zamba2.runtime.backend import Row

__all__ = ["CONTEXT", "divergence", "perplexity", "windows"]

CONTEXT = 2048
PIECE = 256  # tokens of one call: 2.7B's logits of them take 33 MB
QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Progress = Callable[[int, int], None]  # tokens scored, tokens in all


def windows(model: LanguageModel, text: str, context: int) -> list[Ints]:
    """The text's tokens, int32 [at most context] each, the begin token in front of every window.

    Raises Zamba2Error for a text without tokens or a context that holds none.
    """
    if context < 2:
        raise Zamba2Error(f"context is {context}; the begin token and at least one more are needed.")
    tokenizer = model.tokenizer
    begin, *ids = tokenizer.encode(text)
    if begin != model.backend.config.bos_token_id:
        raise Zamba2Error(f"the tokenizer of {model.name} puts no begin token in front of a text; perplexity is defined with one.")
    if not ids:
        raise Zamba2Error("the text has no tokens; some text is needed.")
    step = context - 1
    return [np.array([begin, *ids[i : i + step]], np.int32) for i in range(0, len(ids), step)]


def log_probabilities(model: LanguageModel, ids: Ints) -> Iterator[tuple[Floats, Ints]]:
    """log p of every next token behind each but the last of the ids, some positions at a time, fp64 [positions, V], and the token that
    comes."""
    state = model.backend.new_state()
    for start in range(0, len(ids) - 1, PIECE):
        read = ids[start : min(start + PIECE, len(ids) - 1)]
        (logits,) = model.backend.forward([Row(read, state, logits=len(read))])
        scores = logits.numpy().astype(np.float64)
        scores -= scores.max(axis=-1, keepdims=True)
        yield scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True)), ids[start + 1 : start + 1 + len(read)]


def perplexity(model: LanguageModel, text: str, *, context: int = CONTEXT, progress: Progress | None = None) -> dict[str, Any]:
    """Negative log-likelihood of a text: "tokens", "nats" (mean per token), "perplexity", "top1" (share of tokens that were the
    likeliest), "nats_per_byte" of UTF-8, and "by_position", the mean nats behind 1, 2 to 3, 4 to 7, ... tokens of a window.

    Raises Zamba2Error as ``windows`` does.
    """
    pieces = windows(model, text, context)
    total, done = sum(len(ids) - 1 for ids in pieces), 0
    nats, right = [], []
    for ids in pieces:
        for scores, targets in log_probabilities(model, ids):
            nats.append(-scores[np.arange(len(scores)), targets])
            right.append(scores.argmax(axis=-1) == targets)
            done += len(scores)
            if progress is not None:
                progress(done, total)
    losses = np.concatenate(nats)
    mean = float(losses.mean())
    return {
        "tokens": total, "windows": len(pieces), "context": context, "nats": mean, "perplexity": math.exp(mean),
        "top1": float(np.concatenate(right).mean()), "nats_per_byte": float(losses.sum()) / len(text.encode()),
        "by_position": by_position(losses, places_in(pieces)),
    }  # fmt: skip


def divergence(
    reference: LanguageModel, model: LanguageModel, text: str, *, context: int = CONTEXT, progress: Progress | None = None
) -> dict[str, Any]:
    """Kullback-Leibler divergence of ``model`` from ``reference``, sum p_ref (log p_ref - log p), at each token of a text, in nats.

    "tokens", "mean", "quantiles", "top1_agreement" (share of positions with the same likeliest token), "reference_nats" and "nats" (of
    the text itself, per token), and "by_position". Raises Zamba2Error as ``windows`` does, and for models that read the text differently.
    """
    pieces = windows(reference, text, context)
    others = windows(model, text, context)
    if len(pieces) != len(others) or any(not np.array_equal(a, b) for a, b in zip(pieces, others, strict=True)):
        raise Zamba2Error(f"{reference.name} and {model.name} tokenize this text differently; their divergence is not defined.")
    if reference.backend.config.vocab_size != model.backend.config.vocab_size:
        sizes = (reference.backend.config.vocab_size, model.backend.config.vocab_size)
        raise Zamba2Error(f"the vocabularies have {sizes[0]} and {sizes[1]} tokens; the divergence needs one vocabulary.")
    total, done = sum(len(ids) - 1 for ids in pieces), 0
    found: dict[str, list[Any]] = {"kl": [], "same": [], "reference": [], "nats": []}
    for ids in pieces:
        for (p, targets), (q, _) in zip(log_probabilities(reference, ids), log_probabilities(model, ids), strict=True):
            rows = np.arange(len(p))
            found["kl"].append((np.exp(p) * (p - q)).sum(axis=-1))
            found["same"].append(p.argmax(axis=-1) == q.argmax(axis=-1))
            found["reference"].append(-p[rows, targets])
            found["nats"].append(-q[rows, targets])
            done += len(p)
            if progress is not None:
                progress(done, total)
    kl = np.concatenate(found["kl"])
    return {
        "tokens": total, "windows": len(pieces), "context": context, "mean": float(kl.mean()),
        "quantiles": {f"{q:g}": float(np.quantile(kl, q)) for q in QUANTILES},
        "top1_agreement": float(np.concatenate(found["same"]).mean()),
        "reference_nats": float(np.concatenate(found["reference"]).mean()), "nats": float(np.concatenate(found["nats"]).mean()),
        "by_position": by_position(kl, places_in(pieces)),
    }  # fmt: skip


def places_in(pieces: Sequence[Ints]) -> npt.NDArray[np.int64]:
    """How many tokens of its window stand before each that is scored."""
    return np.concatenate([np.arange(1, len(ids)) for ids in pieces])


def by_position(values: Floats, places: npt.NDArray[np.int64]) -> list[dict[str, float]]:
    """Means over places 1, 2 to 3, 4 to 7, ...: "from", "to", "tokens", "mean"."""
    rows: list[dict[str, float]] = []
    start = 1
    while start <= int(places.max()):
        inside = (places >= start) & (places < 2 * start)
        if inside.any():
            rows.append({"from": start, "to": 2 * start - 1, "tokens": int(inside.sum()), "mean": float(values[inside].mean())})
        start *= 2
    return rows


def shown_positions(rows: Sequence[dict[str, float]]) -> list[tuple[str, str, str]]:
    """``by_position`` as cells of a table."""
    return [(f"{row['from']:g} to {row['to']:g}", f"{row['tokens']:,.0f}", f"{row['mean']:.4f}") for row in rows]
