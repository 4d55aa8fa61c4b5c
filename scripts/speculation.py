#!/usr/bin/env python3
"""What guessing a reply's next tokens is worth: how often the demonstration model's come true, and what that saves at the 2.7B shape.

    python scripts/speculation.py --out docs/measurements/speculation.json

acceptance  greedy replies of the demonstration model to editing prompts, with guesses and without: the same tokens, in fewer calls
cost        the true 2.7B shape in q4, random weights: continuations forced from a list, which edits the prompt so that as many tokens
            come of a call as above; and the text of a novel, and random tokens, which cannot be guessed. With guesses and without
            by turns, a token of each, medians of ratios.

The last line of standard output is one JSON document. --small takes seconds, on a shape shrunk to nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

import zamba2
from zamba2.commands.bench import config_of, synthetic
from zamba2.errors import Zamba2Error
from zamba2.language.generate import Request, collect, run
from zamba2.language.speculate import Guesses
from zamba2.runtime.backend import Backend, Logits, Row
from zamba2.runtime.processors import machine
from zamba2.train.instructions import documents, tasks
from zamba2.weights.files import replacing
from zamba2.weights.hub import RANDOM
from zamba2.weights.packed import Packing

EDITING = ("copy", "repeat")
PROMPT, REPLY = 400, 160  # tokens at the true shape
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
NOVEL, BEGINNING = SHARED / "text" / "pg1342_pride_and_prejudice.txt", "It is a truth universally acknowledged"


class Forced:
    """A constraint that leaves one token each time: a list's next."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens, self.count = tokens, 0

    def mask(self, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        found = np.full_like(scores, -np.inf)
        found[self.tokens[self.count]] = scores[self.tokens[self.count]]
        return found

    def accept(self, token: int) -> None:
        if token != self.tokens[self.count]:
            raise Zamba2Error(f"token {token} came instead of {self.tokens[self.count]}.")
        self.count += 1


class Counting:
    """A backend that counts its calls."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.config, self.together, self.stretch, self.calls = backend, backend.config, backend.together, backend.stretch, 0
        self.new_state = backend.new_state

    def forward(self, rows: Sequence[Row]) -> list[Logits]:
        self.calls += 1
        return self.backend.forward(rows)


def acceptance(count: int) -> dict[str, Any]:
    """Tokens that come of a call of the demonstration model on editing prompts, one reply at a time, and whether they are the same."""
    model = zamba2.load("demo", threads=1)
    backend, same, tokens = Counting(model.backend), 0, 0
    for task in itertools.islice(tasks("speculation", split="test", kinds=EDITING), count):
        request = Request(model.tokenizer.encode_chat(task.messages[:-1]), max_tokens=120)
        plain = collect(model.backend, [request], model.tokenizer, speculate=False)[0].tokens
        found = collect(backend, [request], model.tokenizer)[0].tokens
        same, tokens = same + (found == plain), tokens + len(found) - 1  # the first token comes with the prompt
    calls = backend.calls - count
    return {"prompts": count, "kinds": EDITING, "identical": same, "tokens": tokens, "calls": calls, "tokens_per_call": tokens / calls}


def edited(prompt: Sequence[int], length: int, changed: float, vocab_size: int, rng: random.Random) -> list[int]:
    """The prompt's beginning again, each token another one with this probability."""
    return [rng.randrange(300, vocab_size) if rng.random() < changed else token for token in prompt[:length]]


def text_tokens(count: int, *, small: bool) -> list[int]:
    """A novel through the published tokenizer; small: made-up text through that of the tiny model."""
    if small:
        text, folder = " ".join(itertools.islice(documents("speculation", split="test"), 400)), RANDOM
    else:
        if not NOVEL.is_file():
            raise Zamba2Error(f"{NOVEL} is not there, which is the text that cannot be guessed; --small does without.")
        text = NOVEL.read_text(encoding="utf-8-sig")
        text, folder = text[text.index(BEGINNING) :], SHARED / "tokenizer"
    found: list[int] = tokenizers.Tokenizer.from_file(str(next(folder.glob("*okenizer.json")))).encode(text[: 10 * count]).ids[:count]
    if len(found) < count:
        raise Zamba2Error(f"the text has {len(found)} tokens; {count} are needed.")
    return found


def timed(backend: Any, prompt: Sequence[int], forced: Sequence[int]) -> tuple[float, float]:
    """Seconds of the forced tokens behind the first, with guesses and without: two replies by turns, a token of each, so that a machine's
    moods, which last for seconds, fall on both alike."""
    seconds, found = {True: 0.0, False: 0.0}, {True: list[int](), False: list[int]()}
    replies = {
        guessing: run(backend, [Request(prompt, max_tokens=len(forced), constraint=Forced(forced))], speculate=guessing)
        for guessing in (True, False)
    }
    for i in range(len(forced)):
        for guessing in (True, False) if i % 2 else (False, True):
            begun = time.perf_counter()
            found[guessing].append(next(replies[guessing]).token)
            seconds[guessing] += time.perf_counter() - begun if i else 0.0  # the first comes with the prompt
    if any(own != list(forced) for own in found.values()):
        raise Zamba2Error("a forced continuation came out changed.")
    return seconds[True], seconds[False]


def calls_of(prompt: Sequence[int], forced: Sequence[int], together: int) -> float:
    """Tokens of a call, if guessing costs nothing: of the guesses alone, without a model."""
    guesses, at, calls = Guesses(prompt), 1, 0
    guesses.push(forced[0])
    while at < len(forced):
        guess = guesses.guess(min(together - 1, len(forced) - at - 1))
        right = next((i for i, token in enumerate(guess) if token != forced[at + i]), len(guess))
        for token in forced[at : at + right + 1]:
            guesses.push(token)
        if guess:
            guesses.judge(len(guess), right, 0.1 * len(guess))
        at, calls = at + right + 1, calls + 1
    return (len(forced) - 1) / calls


def cost(wanted: float, repeats: int, shape: str, texts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Rates with guesses over rates without, where as many tokens come of a call as ``wanted``, and where none can be guessed."""
    config = config_of(shape)
    model = zamba2.load(str(synthetic(shape, config, Packing.named("q4"))))
    backend, rng = model.backend, random.Random(7)
    prompts = [[rng.randrange(300, config.vocab_size) for _ in range(PROMPT)] for _ in range(repeats)]
    # the share of changed tokens that leaves as many tokens a call
    shares = [i / 100 for i in range(0, 60)]
    made = {
        share: [edited(prompt, REPLY, share, config.vocab_size, random.Random(f"{share} {i}")) for i, prompt in enumerate(prompts)]
        for share in shares
    }
    per_call = {
        share: statistics.mean(calls_of(p, forced, backend.together) for p, forced in zip(prompts, made[share], strict=True))
        for share in shares
    }
    share = min(shares, key=lambda share: (per_call[share] > wanted, abs(per_call[share] - wanted)))  # not more than the model had
    cases = {
        "edited": list(zip(prompts, made[share], strict=True)),
        "unpredictable": [(text[:PROMPT], text[PROMPT : PROMPT + REPLY]) for text in texts[:repeats]],
        "random": [(prompt, [rng.randrange(300, config.vocab_size) for _ in range(REPLY)]) for prompt in prompts],
    }
    found: dict[str, Any] = {
        "shape": shape, "format": "q4", "isa": backend.isa, "threads": backend.engine.threads, "prompt_tokens": PROMPT,
        "reply_tokens": REPLY, "changed": share, "tokens_per_call": per_call[share], "wanted_tokens_per_call": wanted,
    }  # fmt: skip
    for name, pairs in cases.items():
        ratios, rates = [], []
        for i, (prompt, forced) in enumerate(pairs):
            with_guesses, without = timed(backend, prompt, forced)
            count = len(forced) - 1
            ratios.append(without / with_guesses)
            rates.append([count / without, count / with_guesses])
            said = f"{rates[-1][0]:.1f} and {rates[-1][1]:.1f} tokens/s, {ratios[-1]:.2f} x"
            print(f"{name} {i + 1} of {len(pairs)}: {said}", file=sys.stderr, flush=True)
        found[name] = {"ratio": statistics.median(ratios), "ratios": ratios, "tokens_per_second": rates}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200, help="editing prompts for the demonstration model")
    parser.add_argument("--repeats", type=int, default=6, help="continuations of each kind at the true shape")
    parser.add_argument("--out", type=Path, help="also write the JSON document here")
    parser.add_argument("--small", action="store_true", help="few prompts and a tiny shape")
    arguments = parser.parse_args()
    shape = "random" if arguments.small else "2.7b"
    found = {"machine": machine(), "version": zamba2.__version__, "acceptance": acceptance(5 if arguments.small else arguments.prompts)}
    print(json.dumps(found["acceptance"]), file=sys.stderr, flush=True)
    repeats = 2 if arguments.small else arguments.repeats
    words = text_tokens(repeats * (PROMPT + REPLY), small=arguments.small)
    texts = [words[i * (PROMPT + REPLY) : (i + 1) * (PROMPT + REPLY)] for i in range(repeats)]
    found["cost"] = cost(found["acceptance"]["tokens_per_call"], repeats, shape, texts)
    if arguments.out is not None:
        with replacing(arguments.out) as place:
            place.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
