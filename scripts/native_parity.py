#!/usr/bin/env python3
"""The native engine at Zamba2-2.7B's true shape, random weights, on the text of a novel: is it right?

    python scripts/native_parity.py --out docs/measurements/native_parity.json

blocks  every block's output, every product's inputs and the states against the PyTorch model on the dequantized weights, element
        by element, each given the engine's own inputs; numbers rounded the other way are shown to lie next to a tie, and counted
ends    KL divergence of the logits from that model's, beside what changing its embeddings by 1e-6 does
bf16    error norm with bf16 weights against fp32, beside that of transformers in bf16

The checkpoint is that of true_shape.py; it is packed beside it in every format. The PyTorch model holds one layer and one shared
block at a time (6 GB at most). Every part runs in a process of its own. The last line of standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from true_shape import CHECKPOINT, ROOT, run, text_tokens, transformers_model

from zamba2.bench.peers import PEERS
from zamba2.config import PRESETS
from zamba2.runtime.memory import memory
from zamba2.runtime.processors import machine

sys.path.insert(0, str(ROOT / "tests"))

FORMATS = ("bf16", "q8", "q4")
CALLS = [(40, 0), (300, 0), (1, 40)]  # tokens of the call, tokens before it
LENGTH, STARTS, DRAWS = 150, (0, 300), 3  # end to end: tokens of a text, where they begin in the novel, perturbations of each
PROMPT, DECODED = 40, 40  # bf16 beside transformers: tokens in one call, tokens one by one after them


def packed(format: str) -> Path:
    """The checkpoint in a format, packed anew if it is not there or was packed by another version."""
    from zamba2.config import Config
    from zamba2.errors import Zamba2Error
    from zamba2.weights.formats import FORMATS
    from zamba2.weights.packed import open_packed, quantize

    folder = CHECKPOINT.parent / f"zamba2-2.7b-random-{format}"
    try:
        open_packed(folder, Config.from_file(folder / "config.json"))
    except Zamba2Error as error:
        print(f"packing {folder}: {error}", file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        quantize(CHECKPOINT, folder, FORMATS[format])
    return folder.resolve()


def engine_and_twin(format: str) -> tuple[Any, Any]:
    import torch
    from native_cases import Twin

    from zamba2.config import Config
    from zamba2.runtime.native import NativeBackend

    torch.set_num_threads(2)
    folder = packed(format)
    config = Config.from_file(folder / "config.json")
    model = Twin(folder, config)
    model.load_in_turn()
    print(f"weights of {folder}", file=sys.stderr, flush=True)
    return NativeBackend(folder, config, threads=2), model


def blocks(format: str) -> dict[str, Any]:
    """By call and kind of what is compared: the largest error by norm, the worst element; how many numbers were rounded, how many the
    other way."""
    import numpy as np
    from native_cases import compare

    backend, model = engine_and_twin(format)
    tokens, found = np.array(text_tokens(), dtype=np.int32), {}
    for length, past in CALLS:
        kinds: dict[str, dict[str, Any]] = {}
        for check in compare(backend, model, tokens[past : past + length], past=tokens[:past]):
            kind = next((k for k in ("inputs of", "state of", "keys", "values", "logits") if k in check.name), "outputs")
            row = kinds.setdefault(kind.removesuffix(" of"), {"compared": 0, "error": 0.0, "worst": 0.0, "rounded": 0, "flipped": 0})
            row["compared"] += 1
            row["error"] = max(row["error"], check.error)
            if check.worst >= row["worst"]:
                row["worst"], row["where"] = check.worst, check.name
            row["rounded"] += check.rounded
            row["flipped"] += check.flipped
        found[f"{length} tokens after {past}"] = kinds
        print(format, length, past, kinds, file=sys.stderr, flush=True)
    return {"isa": backend.isa, "calls": found}


def ends(format: str) -> dict[str, Any]:
    """Mean KL divergence over positions and texts, nats: perturbed embeddings; the engine in one call; token by token."""
    import numpy as np
    import torch
    from native_cases import as_twin, divergence, logits_of, uses_units, with_perturbed

    backend, model = engine_and_twin(format)
    texts = [text_tokens()[start : start + LENGTH] for start in STARTS]
    decoded = []
    for text in texts:
        state = backend.new_state()
        decoded.append(np.concatenate([logits_of(backend, [token], state) for token in text]))
    ways = {"one call": [logits_of(backend, text) for text in texts], "token by token": decoded}
    found = {}
    for way, logits in ways.items():
        if way == "one call" or uses_units(backend.isa, format):  # otherwise both round alike
            embeddings = [with_perturbed(model.embed_tokens(torch.tensor(t)), DRAWS, seed) for seed, t in enumerate(texts)]
            with as_twin(format, units=uses_units(backend.isa, format) and way == "one call"):
                scores = model(inputs_embeds=torch.cat(embeddings), state=model.new_state())
            truth = scores.unflatten(0, (len(texts), 1 + DRAWS))
        yardstick = [float(divergence(own[0], other).mean()) for own in truth for other in own[1:]]
        engine = [float(divergence(own[0], other).mean()) for own, other in zip(truth, logits, strict=True)]
        errors = [float((torch.tensor(other) - own[0]).norm() / own[0].norm()) for own, other in zip(truth, logits, strict=True)]
        found[way] = {
            "perturbed": float(np.mean(yardstick)), "perturbed_runs": yardstick, "engine": float(np.mean(engine)), "engine_runs": engine,
            "ratio": float(np.mean(engine) / np.mean(yardstick)), "engine_error_norm": float(np.mean(errors)),
        }  # fmt: skip
        print(format, way, found[way], file=sys.stderr, flush=True)
    return {"isa": backend.isa, "tokens": LENGTH, "texts": len(texts), "draws": DRAWS, **found}


def bf16_logits(side: str, target: Path) -> dict[str, Any]:
    """Write logits (PROMPT + DECODED, V): of the prompt from one call, of the rest token by token. "truth": all at once in fp32."""
    import numpy as np
    import torch

    torch.set_num_threads(2)
    tokens = text_tokens()[: PROMPT + DECODED]
    if side == "transformers":
        from transformers import DynamicCache

        model = transformers_model("bfloat16")
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            calls = [tokens[:PROMPT], *([token] for token in tokens[PROMPT:])]
            scores = [model(torch.tensor([call]), past_key_values=cache, use_cache=True).logits[0].float().numpy() for call in calls]
    else:
        backend, twin = engine_and_twin("bf16")
        if side == "truth":
            with torch.no_grad():
                scores = [twin(torch.tensor([tokens]))[0].numpy()]
        else:
            from native_cases import logits_of

            state = backend.new_state()
            scores = [logits_of(backend, tokens[:PROMPT], state)]
            scores += [logits_of(backend, [token], state) for token in tokens[PROMPT:]]
    np.save(target, np.concatenate(scores))
    return {}


def bf16() -> dict[str, Any]:
    """Error norm and KL divergence of each side against fp32, and the ratio of the norms, for prompt and decoded tokens."""
    import numpy as np
    from native_cases import divergence

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        scores = {}
        for side in ("truth", "transformers", "engine"):
            found[side] = run(sys.executable, __file__, "bf16-logits", side, Path(folder) / side)
            scores[side] = np.load(Path(folder) / f"{side}.npy").astype(np.float64)
    for way, part in (("prompt", slice(PROMPT)), ("decoded", slice(PROMPT, None))):
        truth = scores["truth"][part]
        for side in ("transformers", "engine"):
            error = float(np.linalg.norm(scores[side][part] - truth) / np.linalg.norm(truth))
            found[side][way] = {"error_norm": error, "kl_divergence": float(divergence(truth, scores[side][part]).mean())}
        found[f"{way}_error_ratio"] = found["engine"][way]["error_norm"] / found["transformers"][way]["error_norm"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", default=[], help="blocks FORMAT, ends FORMAT or bf16; without, all of them")
    parser.add_argument("--out", type=Path, help="also write the JSON document to this file")
    arguments = parser.parse_args()
    parts = {"blocks": blocks, "ends": ends, "bf16": bf16, "bf16-logits": lambda side, target: bf16_logits(side, Path(target))}
    if arguments.part:
        measured = parts[arguments.part[0]](*arguments.part[1:]) | {"peak_rss_bytes": memory()["peak_rss_bytes"]}  # type: ignore[operator]
    else:
        PEERS["transformers"](PRESETS["2.7b"], None)
        measured = {"machine": machine()}
        for name in ("blocks", "ends"):
            measured[name] = {format: run(sys.executable, __file__, name, format) for format in FORMATS}
        measured["bf16"] = run(sys.executable, __file__, "bf16")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
