"""IFEval: prompts whose instructions a program can check, the answers to them, and the share of instructions they follow.

The checkers are lm-eval's own (``lm_eval.tasks.ifeval``, which are Google's). They are not deterministic as they stand: langdetect samples,
and for two prompts (keys 1122 and 1129, which count "#" and "!") a checker that knows only letters draws a random one. Here both are
seeded, the letters by prompt, so that a score depends on prompts, answers and seed alone, neither on their order nor on what ran before.
Each of the two prompts may fall either way: 0.18 points at the prompt level, 0.12 at the instruction level.

Zhou et al., "Instruction-Following Evaluation for Large Language Models", 2023 (arXiv 2311.07911).
"""

# lm_eval, langdetect and nltk bring no types.
# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import io
import json
import logging
import os
import random
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from zamba2.errors import Zamba2Error, install
from zamba2.evaluate.answers import DECISIVE, decisive
from zamba2.evaluate.lines import Lines, Row
from zamba2.language.messages import brief
from zamba2.weights.hub import quiet_retries

if TYPE_CHECKING:
    from zamba2.evaluate.answers import Answers

__all__ = [
    "HUB", "MAX_TOKENS", "METRICS", "SEED", "Estimate", "IfevalResult", "Prompt", "check_prompts", "evaluate", "read_prompts",
    "read_responses", "score",
]  # fmt: skip

HUB = "google/IFEval"
MAX_TOKENS = 1280  # of an answer: lm-eval's limit for this task
SEED = 2  # with it GPT-4's published answers score 76.89 and 83.57 (strict), as in the paper; other seeds give 76.71 to 77.08
METRICS = ("prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose")
RESAMPLES = 10_000  # of the bootstrap
CONNECT_SECONDS = 30.0  # that a download may stand still
PUNKT = "tokenizers/punkt_tab"
Progress = Callable[[int, int], None]  # answers there, answers in all


@dataclass(frozen=True)
class Prompt:
    """One row of the data set. instructions: names of checkers, "group:kind"; arguments: the keyword arguments of each."""

    key: int
    text: str
    instructions: tuple[str, ...]
    arguments: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Estimate:
    """A share in percent, and the ends of its 95 % bootstrap interval: other prompts of the same kind, the same model."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class IfevalResult:
    """What ``score`` found.

    metrics: METRICS, and "mean_strict", the mean of the two strict ones. kinds: for each kind of instruction how many there are
    ("count") and the percentages followed ("strict", "loose"). examples: for each prompt its key and, instruction by instruction, whether
    it was followed. unused: responses to none of the prompts.
    """

    prompts: int
    instructions: int
    metrics: dict[str, Estimate]
    kinds: dict[str, dict[str, float]]
    examples: list[dict[str, Any]]
    unused: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; an estimate is {"value", "low", "high"} in percent."""
        metrics = {name: {"value": e.value, "low": e.low, "high": e.high} for name, e in self.metrics.items()}
        return {
            "prompts": self.prompts, "instructions": self.instructions, "metrics": metrics, "kinds": self.kinds, "examples": self.examples,
            "unused_responses": self.unused, "seed": SEED,
        }  # fmt: skip

    def to_markdown(self) -> str:
        """Two tables: the metrics with their intervals, and the kinds of instruction."""
        lines = ["| metric | % | 95 % interval |", "|---|---|---|"]
        lines += [f"| {name.replace('_', ', ')} | {e.value:.2f} | {e.low:.2f} to {e.high:.2f} |" for name, e in self.metrics.items()]
        lines += ["", "| instruction | count | strict % | loose % |", "|---|---|---|---|"]
        lines += [f"| {name} | {k['count']:.0f} | {k['strict']:.2f} | {k['loose']:.2f} |" for name, k in self.kinds.items()]
        return "\n".join(lines) + "\n"


# ---- prompts and responses -------------------------------------------------------------------------------------------


def read_prompts(path: Path | None = None, *, offline: bool = False) -> list[Prompt]:
    """The prompts in a JSON lines file (key, prompt, instruction_id_list, kwargs), or by default those on the Hub.

    Raises Zamba2Error for a missing or malformed file, and where the Hub does not answer.
    """
    rows = _lines(path, "IFEval's prompts (input_data.jsonl)") if path is not None else _hub_rows(offline)
    prompts = [_prompt(place, row) for place, row in rows]
    if not prompts:
        raise Zamba2Error(f"{path or HUB} is empty; IFEval's prompts are needed.")
    for what, values in (("key", [p.key for p in prompts]), ("prompt", [p.text for p in prompts])):
        if len(set(values)) < len(values):
            twice = next(v for i, v in enumerate(values) if v in values[:i])
            raise Zamba2Error(f"{path or HUB} has the {what} {brief(repr(twice))} twice; each prompt may stand there once.")
    return prompts


def read_responses(path: Path) -> dict[str, str]:
    """Answers by prompt from a JSON lines file ("prompt", "response"), Google's layout, which ``evaluate`` writes too.

    Raises Zamba2Error for a missing or malformed file, and for two different answers to one prompt.
    """
    found: dict[str, str] = {}
    for place, row in _lines(path, 'the answers to score, lines with "prompt" and "response"'):
        prompt, response = _answer(place, row)
        if found.setdefault(prompt, response) != response:
            raise Zamba2Error(f"{place} answers a prompt that has another answer before; one answer to each is needed.")
    if not found:
        raise Zamba2Error(f'{path} is empty; lines with "prompt" and "response" are needed.')
    return found


def _lines(path: Path, purpose: str) -> Iterator[tuple[str, Any]]:
    """The lines of a file with their places, "FILE, line 7"; blank ones are left out."""
    if not path.is_file():
        raise Zamba2Error(f"{path} does not exist; it is to hold {purpose}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Zamba2Error(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8.") from None
    except OSError as error:
        raise Zamba2Error(f"{path} cannot be read ({error.strerror or error}).") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise Zamba2Error(f"{path}, line {number} is not valid JSON ({brief(error)}); it is to hold {purpose}.") from None


def _hub_rows(offline: bool) -> Iterator[tuple[str, Any]]:
    instead = "give its file, input_data.jsonl, as prompts instead"
    purpose = "the 541 prompts of IFEval that the model is to answer"
    if offline or os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        raise Zamba2Error(f"{HUB} on the Hub holds {purpose}, and downloads are off; {instead}.")
    try:
        import datasets
    except ImportError as error:
        raise Zamba2Error(f"{HUB} is read through the datasets library ({error}); {install('evaluate')}, or {instead}.") from None
    quiet_retries()
    try:
        for number, row in enumerate(datasets.load_dataset(HUB, split="train"), 1):
            yield f"{HUB}, row {number}", row
    except Exception as error:  # the library lets errors of many others through
        raise Zamba2Error(f"{HUB} on the Hub holds {purpose}, but it cannot be read ({brief(error)}); {instead}.") from error


def _prompt(place: str, row: Any) -> Prompt:
    wanted: dict[str, type] = {"key": int, "prompt": str, "instruction_id_list": list, "kwargs": list}
    if not isinstance(row, Mapping):
        raise Zamba2Error(f"{place} is a {type(row).__name__}; an object with {', '.join(wanted)} is needed.")
    for name, kind in wanted.items():
        if not isinstance(row.get(name), kind) or isinstance(row[name], bool):
            found = f"no {name}" if name not in row else f"a {type(row[name]).__name__} as {name}"
            raise Zamba2Error(f"{place} has {found}; IFEval's prompts have {', '.join(wanted)}, the last two lists of one length.")
    names, arguments = row["instruction_id_list"], row["kwargs"]
    if not names or len(names) != len(arguments) or not all(isinstance(n, str) for n in names):
        raise Zamba2Error(f"{place} names {len(names)} instructions and has arguments for {len(arguments)}; one object for each is needed.")
    if not all(isinstance(a, Mapping) for a in arguments):
        raise Zamba2Error(f"{place} has arguments of instructions that are no objects; kwargs is a list of objects.")
    if not row["prompt"].strip():
        raise Zamba2Error(f"{place} has an empty prompt; a text is needed.")
    # on the Hub every row has every argument, most of them null
    return Prompt(row["key"], row["prompt"], tuple(names), tuple({k: v for k, v in a.items() if v is not None} for a in arguments))


def _answer(place: str, row: Any) -> tuple[str, str]:
    if not isinstance(row, Mapping):
        raise Zamba2Error(f'{place} is a {type(row).__name__}; an object with "prompt" and "response" is needed.')
    for name in ("prompt", "response"):
        if not isinstance(row.get(name), str):
            found = f"no {name}" if name not in row else f"a {type(row[name]).__name__} as {name}"
            raise Zamba2Error(f'{place} has {found}; lines of answers have "prompt" and "response", both texts.')
    return row["prompt"], row["response"]


# ---- scoring ---------------------------------------------------------------------------------------------------------


def score(prompts: Sequence[Prompt], responses: Mapping[str, str], *, offline: bool = False) -> IfevalResult:
    """Check every instruction of every prompt in its response, strictly and loosely.

    responses: by the prompt's text. Loose: followed by the response, or by it without its first line, its last line, both, or its
    asterisks. A text whose language cannot be told counts as in the right one, as in lm-eval. SEED is that of the checkers' draws and of
    the bootstrap. Raises Zamba2Error for prompts without a response, unknown instructions or arguments, and missing libraries or NLTK data.
    """
    missing = [prompt for prompt in prompts if prompt.text not in responses]
    if missing or not prompts:
        which = f"; the first has key {missing[0].key}: {brief(repr(missing[0].text))[:80]}" if missing else ""
        advice = "give the prompts that were answered, or answer the rest"
        raise Zamba2Error(f"{len(missing)} of {len(prompts)} prompts have no response{which}; {advice}.")
    checkers = _checkers(offline)
    strict: list[list[bool]] = []
    loose: list[list[bool]] = []
    with _seeded():
        for prompt in prompts:
            random.seed(f"{SEED} {prompt.key}")
            strict.append(_check(checkers.test_instruction_following_strict, checkers, prompt, responses[prompt.text]))
            loose.append(_check(checkers.test_instruction_following_loose, checkers, prompt, responses[prompt.text]))
    kinds: dict[str, list[tuple[bool, bool]]] = {}
    for prompt, *both in zip(prompts, strict, loose, strict=True):
        for name, *followed in zip(prompt.instructions, *both, strict=True):
            kinds.setdefault(name, []).append((followed[0], followed[1]))
    return IfevalResult(
        prompts=len(prompts),
        instructions=sum(len(prompt.instructions) for prompt in prompts),
        metrics=_estimates(strict, loose, SEED, RESAMPLES),
        kinds={
            name: {"count": len(found), "strict": _percent([f[0] for f in found]), "loose": _percent([f[1] for f in found])}
            for name, found in sorted(kinds.items())
        },
        examples=[
            {"key": prompt.key, "instructions": list(prompt.instructions), "strict": tight, "loose": easy}
            for prompt, tight, easy in zip(prompts, strict, loose, strict=True)
        ],
        unused=len(set(responses) - {prompt.text for prompt in prompts}),
    )


def check_prompts(prompts: Sequence[Prompt], *, offline: bool = False) -> None:
    """Raise Zamba2Error unless lm-eval knows every instruction and its arguments: before hours of answering, not behind them."""
    checkers = _checkers(offline)
    with _seeded():
        for prompt in prompts:
            _check(checkers.test_instruction_following_strict, checkers, prompt, "")


def _check(test: Callable[..., Any], checkers: Any, prompt: Prompt, response: str) -> list[bool]:
    """Whether each instruction of a prompt is followed, by one of lm-eval's two tests."""
    known = checkers.instructions_registry.INSTRUCTION_DICT
    for name in prompt.instructions:
        if name not in known:
            raise Zamba2Error(f"the prompt with key {prompt.key} has the instruction {name!r}; lm-eval's IFEval knows {', '.join(known)}.")
    asked = checkers.InputExample(prompt.key, list(prompt.instructions), prompt.text, [dict(a) for a in prompt.arguments])
    try:
        return [bool(followed) for followed in test(asked, response).follow_instruction_list]
    except (TypeError, ValueError, AttributeError, KeyError) as error:  # what wrong arguments lead to
        given = brief(json.dumps([dict(a) for a in prompt.arguments], default=str))
        what = f"the prompt with key {prompt.key} has kwargs {given}"
        raise Zamba2Error(f"{what}, which its instructions do not take ({brief(error)}); correct them.") from error


def _percent(values: Sequence[bool]) -> float:
    return 100 * sum(values) / len(values)


def _estimates(strict: list[list[bool]], loose: list[list[bool]], seed: int, resamples: int) -> dict[str, Estimate]:
    """The metrics with percentile intervals over resampled prompts; a prompt's instructions stay together."""
    # per prompt: followed in all and number of prompts (1), instructions followed and their number
    columns = np.array([[all(s), sum(s), all(e), sum(e), 1, len(s)] for s, e in zip(strict, loose, strict=True)], dtype=np.float64)
    rng = np.random.default_rng(seed)
    weights = np.ones((1, len(columns)))
    (values,) = _shares(weights @ columns)
    drawn = []
    for start in range(0, resamples, 1000):  # a thousand at a time: 4 MB
        counts = rng.multinomial(len(columns), np.full(len(columns), 1 / len(columns)), size=min(1000, resamples - start))
        drawn.append(_shares(counts @ columns))
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5], axis=0)
    return {name: Estimate(float(values[i]), float(low[i]), float(high[i])) for i, name in enumerate((*METRICS, "mean_strict"))}


def _shares(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Percentages [n, 5], METRICS and the mean of the strict two, from sums [n, 6] of the columns above."""
    shares = 100 * sums[:, :4] / sums[:, [4, 5, 4, 5]]
    return np.column_stack([shares, shares[:, :2].mean(axis=1)])


@contextmanager
def _seeded() -> Iterator[None]:
    """langdetect seeded and lm-eval's complaints about languages silent inside; everything random as it was behind."""
    from langdetect import DetectorFactory

    logger = logging.getLogger("lm_eval.tasks.ifeval.instructions")
    before = random.getstate(), DetectorFactory.seed, logger.level
    DetectorFactory.seed = 0  # the library seeds a generator of its own with it, anew for each text
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        random.setstate(before[0])
        DetectorFactory.seed = before[1]
        logger.setLevel(before[2])


def _checkers(offline: bool) -> Any:
    """The module ``lm_eval.tasks.ifeval.utils``, its data in place before it is imported: it would download without a limit of time."""
    try:
        import langdetect  # noqa: F401
        import nltk
    except ImportError as error:
        raise Zamba2Error(f"IFEval's checkers need lm_eval, langdetect and nltk ({error}); {install('evaluate')}.") from None
    _find_punkt(nltk, offline or os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"))
    try:
        from lm_eval.tasks.ifeval import utils
    except ImportError as error:
        raise Zamba2Error(f"IFEval's checkers need lm_eval ({error}); {install('evaluate')}.") from None
    return utils


def _find_punkt(nltk: Any, offline: bool) -> None:
    """NLTK's data for ends of sentences, from NLTK_DATA or where NLTK keeps it, else downloaded there. Raises Zamba2Error."""
    for folder in reversed(os.environ.get("NLTK_DATA", "").split(os.pathsep)):
        if folder and folder not in nltk.data.path:  # set after nltk was imported
            nltk.data.path.insert(0, folder)
    reason = "downloads are off"
    for may_download in (not offline, False):
        try:
            nltk.data.find(PUNKT)
            return
        except LookupError:
            pass
        if may_download:
            before = socket.getdefaulttimeout()
            socket.setdefaulttimeout(CONNECT_SECONDS)
            said = io.StringIO()  # quiet is not about errors
            try:
                done = nltk.download("punkt_tab", quiet=True, print_error_to=said)
                why = " ".join(said.getvalue().replace("[nltk_data]", "").split())
                reason = "it was downloaded, but is not there" if done else f"it cannot be downloaded ({brief(why)})"
            except (OSError, ValueError) as error:
                reason = f"it cannot be downloaded ({brief(error)})"
            finally:
                socket.setdefaulttimeout(before)
    raise Zamba2Error(
        f"NLTK's {PUNKT}, with which IFEval's checkers count sentences and words, is not on this machine and {reason}; "
        f"set NLTK_DATA to a folder that holds {PUNKT}."
    )


# ---- answering -------------------------------------------------------------------------------------------------------


def evaluate(
    answers: Answers, prompts: Sequence[Prompt], file: Path, *, max_tokens: int = MAX_TOKENS, progress: Progress | None = None,
    offline: bool = False,
) -> IfevalResult:  # fmt: skip
    """Have every prompt answered greedily, through the chat template, and score the answers.

    file: JSON lines; every answer is appended as it is finished, with the model and the limit it was made with, and what a run finds
    there is not asked again. Raises Zamba2Error for answers of another model or limit in it, and as ``score`` does; the checkers and
    the prompts are looked at before the first answer.
    """
    check_prompts(prompts, offline=offline)
    origin = {"model": answers.name, **decisive(answers), "max_tokens": max_tokens}
    with Lines(file) as lines:
        done = _resumed(lines.rows, origin)
        found = {prompt.text: done[prompt.text] for prompt in prompts if prompt.text in done}
        left = [prompt for prompt in prompts if prompt.text not in found]
        if progress is not None:
            progress(len(found), len(prompts))
        asked = [[{"role": "user", "content": prompt.text}] for prompt in left]
        for index, response in answers.answer(asked, max_tokens=max_tokens, temperature=0.0):
            prompt = left[index]
            lines.append({"key": prompt.key, "prompt": prompt.text, "response": response, **origin})
            found[prompt.text] = response
            if progress is not None:
                progress(len(found), len(prompts))
    return score(prompts, found, offline=offline)


def _resumed(rows: Sequence[tuple[str, Row]], origin: Mapping[str, Any]) -> dict[str, str]:
    """The answers of an earlier run by prompt. Raises Zamba2Error for those of another model or limit."""
    found = {}
    for place, row in rows:
        prompt, response = _answer(place, row)
        for name in (*origin, *(name for name in DECISIVE if name in row and name not in origin)):
            if row.get(name) != origin.get(name):
                was, now = (brief(repr(value)) for value in (row.get(name), origin.get(name)))
                raise Zamba2Error(f"{place} was answered with {name} {was}, not {now}; choose another file for these answers.")
        found[prompt] = response
    return found
