"""From logits to the next token: penalties, temperature, truncation and one random draw.

The order is repetition penalty, frequency and presence penalties, logit bias, temperature, top-k, top-p, min-p. Wherever
transformers 5.23 has the same knob, the rule is the same one (``generation/logits_process.py``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np
import numpy.typing as npt

from zamba2.errors import Zamba2Error

__all__ = ["Sampler", "Sampling", "log_softmax", "top_logprobs"]

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.intp]

LARGEST = sys.float_info.max
NUCLEUS = 256  # most nuclei are smaller: selecting this many first spares sorting the whole vocabulary


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token. The defaults are greedy decoding, unchanged by any penalty.

    temperature: 0 takes the most probable token (the lowest id of equals); 1 samples the model's own distribution.
    top_k: keep the k most probable tokens; 0 keeps all.
    top_p: keep the smallest set of most probable tokens whose mass reaches top_p, never fewer than one.
    min_p: drop tokens less probable than min_p times the most probable one.
    repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or output (CTRL, Keskar 2019).
    frequency_penalty, presence_penalty: subtracted per occurrence, and once, for generated tokens only (OpenAI's definition).
    logit_bias: added to the logits of these token ids; -inf bans a token.
    seed: makes a run repeatable; None draws one from the operating system.

    Raises Zamba2Error naming the option that is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is the most probable token that is taken, unchanged by anything: it need not see the logits."""
        penalties = self.repetition_penalty != 1 or self.frequency_penalty or self.presence_penalty or self.logit_bias
        return self.temperature == 0 and not penalties

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, LARGEST, "a finite number from 0 (greedy)")
        _check("top_k", self.top_k, 0, LARGEST, "a whole number from 0 (off)", kind=Integral)
        _check("top_p", self.top_p, 0.0, 1.0, "a number from 0 to 1 (off)")
        _check("min_p", self.min_p, 0.0, 1.0, "a number from 0 (off) to 1")
        _check("repetition_penalty", self.repetition_penalty, 0.01, 100.0, "a number from 0.01 to 100 (1 is off)")
        _check("frequency_penalty", self.frequency_penalty, -2.0, 2.0, "a number from -2 to 2 (0 is off)")
        _check("presence_penalty", self.presence_penalty, -2.0, 2.0, "a number from -2 to 2 (0 is off)")
        if self.seed is not None:
            _check("seed", self.seed, 0, LARGEST, "a whole number from 0, or none,", kind=Integral)
        if not isinstance(self.logit_bias, Mapping):
            raise Zamba2Error(f"sampling option logit_bias is {self.logit_bias!r}; a mapping from token id to a number is needed.")
        for token, bias in self.logit_bias.items():
            _check("logit_bias", token, 0, LARGEST, "for each key a token id, a whole number from 0,", kind=Integral)
            _check(f"logit_bias[{token}]", bias, -np.inf, LARGEST, "a number, or -inf to ban the token,")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))  # the caller's mapping may change later


def _check(name: str, value: Any, low: float, high: float, needed: str, kind: type = Real) -> None:
    # NaN fails the comparison; bool is an Integral to Python but never meant. LARGEST is infinite as a NumPy float of fewer bits.
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:  # type: ignore[operator]
        raise Zamba2Error(f"sampling option {name} is {value!r}; {needed} is needed.")


class Sampler:
    """Chooses the tokens of one sequence, remembering what was said and where its random stream stands.

    ``prompt_tokens``: ids of the prompt, for the repetition penalty. Two samplers built alike and given the same logits choose the
    same tokens, whatever runs beside them. Raises Zamba2Error for a prompt token or a logit_bias id outside the vocabulary.
    """

    def __init__(self, sampling: Sampling, prompt_tokens: Iterable[int], vocab_size: int) -> None:
        self.sampling = sampling
        self._prompt: Ids = np.unique(np.fromiter(prompt_tokens, dtype=np.intp))
        if self._prompt.size and not 0 <= self._prompt[0] <= self._prompt[-1] < vocab_size:
            stray = self._prompt[0] if self._prompt[0] < 0 else self._prompt[-1]
            raise Zamba2Error(f"the prompt holds token {stray}; ids from 0 to {vocab_size - 1} are needed: use this model's tokenizer.")
        stray = max(sampling.logit_bias, default=0)
        if stray >= vocab_size:
            raise Zamba2Error(f"sampling option logit_bias names token {stray}; ids from 0 to {vocab_size - 1} are needed.")
        self._counts = np.zeros(vocab_size, dtype=np.int64)
        self._rng = np.random.Generator(np.random.PCG64(sampling.seed))

    def take(self, token: int) -> int:
        """Remember a token that was chosen elsewhere, which ``Sampling.is_plain`` allows."""
        self._counts[token] += 1
        return token

    def sample(self, logits: npt.NDArray[np.float32]) -> int:
        """Choose and remember the next token from logits float32 [V]; -inf masks a token out.

        Raises Zamba2Error when the logits hold NaN or +inf, or leave no token to choose.
        """
        ids, probabilities = _candidates(logits, self.sampling, self._prompt, self._counts)
        return self.take(int(ids[0] if ids.size == 1 else ids[_draw(probabilities, self._rng.random())]))


def log_softmax(logits: npt.NDArray[Any]) -> Floats:
    """Log-probabilities, float64 [V], of the model's own distribution: before penalties, bias and temperature.

    Raises Zamba2Error for logits with NaN or +inf.
    """
    _best(logits)
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def top_logprobs(logits: npt.NDArray[Any], k: int) -> list[tuple[int, float]]:
    """The k most probable tokens as (id, log-probability), most probable first, lower id first among equals."""
    logprobs = log_softmax(logits)
    return [(int(token), float(logprobs[token])) for token in _largest(logprobs, k)]


def _candidates(logits: npt.NDArray[Any], sampling: Sampling, prompt: Ids, counts: npt.NDArray[np.int64]) -> tuple[Ids, Floats]:
    """Ids that may be chosen and their probabilities up to a common factor.

    Ties: top-k and top-p keep the lower ids of equals, so exactly k tokens stay (transformers keeps every tie).
    """
    if logits.shape != counts.shape:
        raise Zamba2Error(f"logits have shape {list(logits.shape)}; {list(counts.shape)}, one per token of the vocabulary, is needed.")
    best = _best(logits)
    x = _penalize(logits, sampling, prompt, counts)
    if x is not logits:
        best = int(np.argmax(x))
        if x[best] == -np.inf:
            raise Zamba2Error("sampling option logit_bias bans every token that was left to choose; ban fewer tokens.")
    if sampling.temperature == 0:
        return np.array([best]), np.ones(1)

    ids: Ids = _largest(x, sampling.top_k) if 0 < sampling.top_k < x.size else np.arange(x.size)
    # float64 and the shift first: a tiny temperature then sends all but the best to probability 0, not to inf - inf.
    scaled = x[ids].astype(np.float64)
    scaled -= x[best]
    with np.errstate(over="ignore", under="ignore"):
        scaled /= sampling.temperature
        probabilities = np.exp(scaled, out=scaled)
    if sampling.top_p < 1:
        nucleus = _nucleus(probabilities, sampling.top_p)
        ids, probabilities = ids[nucleus], probabilities[nucleus]
    if sampling.min_p > 0:
        kept = probabilities >= sampling.min_p  # the most probable token is exp(0) = 1 here
        ids, probabilities = ids[kept], probabilities[kept]
    return ids, probabilities


def _penalize(logits: npt.NDArray[Any], sampling: Sampling, prompt: Ids, counts: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Logits after the penalties and the bias, in float64; the very same array where none applies."""
    repetition, frequency, presence = sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty
    if repetition == 1 and not frequency and not presence and not sampling.logit_bias:
        return logits
    x = logits.astype(np.float64)
    said = np.flatnonzero(counts)
    if repetition != 1:
        seen = np.union1d(prompt, said)
        x[seen] = np.where(x[seen] < 0, x[seen] * repetition, x[seen] / repetition)
    x[said] -= frequency * counts[said] + presence
    for token, bias in sampling.logit_bias.items():
        x[token] += bias
    return x


def _best(logits: npt.NDArray[Any]) -> int:
    """Id of the largest logit. argmax returns a NaN or +inf where there is one, so one look checks them all."""
    best = int(np.argmax(logits))
    if not np.isfinite(logits[best]):
        raise Zamba2Error("the model produced NaN or infinite logits; the checkpoint is likely corrupt: download or convert it again.")
    return best


def _largest(values: npt.NDArray[Any], k: int) -> Ids:
    """Indices of the k largest values, largest first; among equals the lower index first. Costs O(V + k log k)."""
    k = min(k, values.size)
    if k <= 0:
        return np.zeros(0, dtype=np.intp)
    border = np.partition(values, values.size - k)[values.size - k]
    above = np.flatnonzero(values > border)
    level = np.flatnonzero(values == border)[: k - above.size]
    return np.concatenate([above[np.argsort(-values[above], kind="stable")], level])


def _nucleus(weights: Floats, top_p: float) -> Ids:
    """Indices of the smallest set of largest weights whose share reaches top_p; at least one."""
    target, size = top_p * weights.sum(), NUCLEUS
    while True:
        order = _largest(weights, size)
        mass = np.cumsum(weights[order])
        if mass[-1] >= target or size >= weights.size:
            return order[: int(np.searchsorted(mass, target)) + 1]
        size *= 16


def _draw(weights: Floats, uniform: float) -> int:
    """Inverse CDF: the index at which the running sum first exceeds uniform * total; never one of weight 0."""
    cdf = np.cumsum(weights)  # ends at 1 or more, so that a number below 1 times it is below it
    return int(np.searchsorted(cdf, uniform * cdf[-1], side="right"))
