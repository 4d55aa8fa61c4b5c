"""Laws of sampling: what is drawn follows the stated closed form, transformers' rules and the seed."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zamba2.errors import Zamba2Error
from zamba2.language.sampling import Sampler, Sampling, _candidates, _draw, log_softmax, top_logprobs

V = 50


def logits_of(seed: int, size: int = V) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def distribution(logits: np.ndarray, sampling: Sampling, prompt=(), counts: np.ndarray | None = None) -> np.ndarray:
    """The probabilities, float64 [V], that ``Sampler.sample`` draws from, with so many of each token generated so far."""
    counts = np.zeros(logits.size, dtype=np.int64) if counts is None else counts
    ids, probabilities = _candidates(logits, sampling, np.asarray(prompt, dtype=np.intp), counts)
    full = np.zeros(logits.size)
    full[ids] = probabilities / probabilities.sum()
    return full


options = st.fixed_dictionaries(
    {},
    optional={
        "top_k": st.integers(0, V + 10),
        "top_p": st.floats(0, 1),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(0.5, 2),
        "frequency_penalty": st.floats(-2, 2),
        "presence_penalty": st.floats(-2, 2),
        "logit_bias": st.dictionaries(st.integers(0, V - 1), st.floats(-5, 5), max_size=4),
    },
)
histories = st.lists(st.integers(0, V - 1), max_size=20)


@given(st.integers(0, 2**32), options, st.floats(0.1, 3), histories, histories)
@settings(max_examples=150, deadline=None)
def test_distribution_equals_transformers(seed, option, temperature, prompt, output):
    """The distribution is that of transformers' processors in the documented order (no ties, float64 both)."""
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers.generation.logits_process")
    sampling = Sampling(temperature=temperature, **option)
    logits, counts = logits_of(seed), np.bincount(output, minlength=V).astype(np.int64)

    scores = torch.tensor(logits, dtype=torch.float64)[None]
    history = torch.tensor([prompt + output], dtype=torch.int64)
    if sampling.repetition_penalty != 1 and history.numel():
        scores = hf.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))(history, scores)
    scores = scores - torch.tensor(sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0))
    for token, bias in sampling.logit_bias.items():
        scores[0, token] += bias
    scores = hf.TemperatureLogitsWarper(float(temperature))(history, scores)
    if sampling.top_k:
        scores = hf.TopKLogitsWarper(sampling.top_k)(history, scores)
    if sampling.top_p < 1:
        scores = hf.TopPLogitsWarper(sampling.top_p)(history, scores)
    if sampling.min_p:
        scores = hf.MinPLogitsWarper(sampling.min_p)(history, scores)
    expected = torch.softmax(scores, dim=-1)[0].numpy()

    ours = distribution(logits, sampling, prompt, counts)
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "option",
    [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "logit_bias": {3: 1.5, 4: -math.inf}}],
    ids=str,
)
def test_frequencies_follow_the_distribution(option):
    """20,000 draws pass a chi-square test against the closed form; impossible tokens never appear."""
    sampling, logits, draws = Sampling(temperature=0.8, seed=11, **option), logits_of(5), 20_000
    sampler = Sampler(sampling, [], V)
    found = np.bincount([sampler.sample(logits) for _ in range(draws)], minlength=V)
    expected = draws * distribution(logits, sampling)
    assert not found[expected == 0].any()
    rare = expected < 5  # pooled, as the chi-square approximation needs
    cells = list(zip(found[~rare], expected[~rare], strict=True))
    if expected[rare].sum() > 1:
        cells.append((found[rare].sum(), expected[rare].sum()))
    statistic, freedom = sum((f - e) ** 2 / e for f, e in cells), len(cells) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 4


@given(st.integers(0, 2**32), options, st.integers(0, 2**70), histories)
@settings(max_examples=50, deadline=None)
def test_same_seed_same_tokens(seed, option, sampling_seed, prompt):
    """Two samplers built alike choose the same tokens; each stays within the distribution's support."""
    sampling = Sampling(temperature=1.0, seed=sampling_seed, **option)
    one, two = Sampler(sampling, prompt, V), Sampler(sampling, iter(prompt), V)
    counts = np.zeros(V, dtype=np.int64)
    for step in range(10):
        logits = logits_of(seed + step)
        token = one.sample(logits)
        assert token == two.sample(logits)
        assert distribution(logits, sampling, prompt, counts)[token] > 0
        counts[token] += 1


def test_seeds_differ():
    """Different seeds, and no seed, give different streams."""
    streams = []
    for seed in (1, 2, None, None):
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), [], 1000)
        streams.append(tuple(sampler.sample(np.zeros(1000, np.float32)) for _ in range(10)))
    assert len(set(streams)) == 4


@given(st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 2.0]), min_size=1, max_size=30).filter(lambda x: max(x) > -math.inf))
def test_ties_go_to_the_lowest_id(values):
    """Greedy takes the first maximum; top-k keeps exactly k possible tokens, the lower ids of equals."""
    logits = np.array(values, dtype=np.float32)
    assert Sampler(Sampling(), [], logits.size).sample(logits) == values.index(max(values))
    order = sorted((i for i, v in enumerate(values) if v > -math.inf), key=lambda i: (-values[i], i))
    for k in range(1, len(values) + 2):
        kept = np.flatnonzero(distribution(logits, Sampling(temperature=1.0, top_k=k)))
        assert sorted(order[:k]) == list(kept)
    assert [token for token, _ in top_logprobs(logits, len(order))] == order


def test_top_p_is_the_smallest_sufficient_set():
    """The nucleus is minimal: it reaches top_p and without its least token would not; large nuclei included."""
    for seed, size, scale in [(0, 40, 1.0), (1, 40, 0.1), (2, 3000, 0.01), (3, 30000, 0.01)]:
        probabilities = softmax(logits_of(seed, size).astype(np.float64) * scale)
        for top_p in (0.05, 0.5, 0.97):
            kept = np.flatnonzero(distribution(np.log(probabilities), Sampling(temperature=1.0, top_p=top_p)))
            mass = probabilities[kept].sum()
            assert mass >= top_p - 1e-12 and mass - probabilities[kept].min() < top_p
            assert np.delete(probabilities, kept).max(initial=0.0) <= probabilities[kept].min()
    assert np.count_nonzero(distribution(logits_of(0), Sampling(temperature=1.0, top_p=0.0))) == 1
    assert np.count_nonzero(distribution(np.zeros(4), Sampling(temperature=1.0, top_p=0.5))) == 2  # reached exactly


def test_no_draw_is_impossible():
    """The least and the largest number that the generator gives never draw a weight of 0, whatever the weights add up to."""
    rng = np.random.default_rng(0)
    for total in (1.0, 1.0 + 2.0**-52, 2.0, 2.0 - 2.0**-52, *(1 + rng.exponential(size=50))):
        weights = np.array([0.0, 1.0, total - 1, 0.0])
        assert _draw(weights, 0.0) == 1
        assert _draw(weights, 1 - 2.0**-53) in ((1, 2) if total > 1 else (1,))


def test_penalties_count_prompt_and_output_apart():
    """Repetition sees prompt and output; frequency counts and presence sees generated tokens only."""
    logits = np.array([2.0, 2.0, -2.0, 2.0], dtype=np.float32)
    sampler = Sampler(Sampling(repetition_penalty=2.0), [0, 2], 4)
    assert [sampler.sample(logits) for _ in range(3)] == [1, 3, 0]
    x = logits.astype(np.float64)
    got = distribution(logits, Sampling(temperature=1.0, repetition_penalty=2.0), [0, 2, 2], np.array([0, 0, 0, 3]))
    np.testing.assert_allclose(got, softmax(np.array([1.0, 2.0, -4.0, 1.0])))
    got = distribution(logits, Sampling(temperature=1.0, frequency_penalty=0.5, presence_penalty=0.25), [0, 1], np.array([0, 0, 1, 3]))
    np.testing.assert_allclose(got, softmax(x - [0, 0, 0.75, 1.75]))


def test_greedy_is_the_limit_of_temperature():
    """Temperature 0 puts all mass on the best token, and the smallest float above 0 does the same without overflow."""
    logits = logits_of(9)
    for temperature in (0.0, 5e-324, 1e-30):
        assert distribution(logits, Sampling(temperature=temperature))[np.argmax(logits)] == 1.0


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [1.0, math.nan], [-math.inf, -math.inf], [math.inf, 0.0]], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_corrupt_logits_are_reported(bad, temperature):
    """NaN, +inf and all -inf are an error that names the likely cause; a single -inf only masks."""
    logits = np.array(bad, dtype=np.float32)
    with pytest.raises(Zamba2Error, match=r"NaN or infinite logits.*corrupt"):
        Sampler(Sampling(temperature=temperature), [], 2).sample(logits)
    with pytest.raises(Zamba2Error, match="corrupt"):
        log_softmax(logits)
    masked = Sampler(Sampling(temperature=temperature), [], 2)
    assert {masked.sample(np.array([-math.inf, 0.0], dtype=np.float32)) for _ in range(20)} == {1}


NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
BAD_OPTIONS = [(name, value) for name in NUMBERS for value in (math.nan, math.inf, -3.0, "1", None, True)] + [
    ("temperature", 10**400),
    ("temperature", np.float32(math.inf)),
    ("top_k", -1),
    ("top_k", 1.5),
    ("top_k", True),
    ("top_p", 1.1),
    ("min_p", 1.1),
    ("repetition_penalty", 0),
    ("frequency_penalty", 2.1),
    ("seed", -1),
    ("seed", 1.0),
    ("logit_bias", [1]),
    ("logit_bias", {"1": 1.0}),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {1: math.nan}),
    ("logit_bias", {1: math.inf}),
]


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS)
def test_bad_options_are_named(name, value):
    """An option out of range or of the wrong type is one sentence that names it."""
    with pytest.raises(Zamba2Error, match=rf"option {name}.* is needed\.$"):
        Sampling(**{name: value})


def test_options_may_be_numpys():
    """Numbers of NumPy's are taken as Python's are, without a warning."""
    options = {"temperature": np.float32(0.5), "top_p": np.float16(0.5), "top_k": np.int32(3), "seed": np.uint8(1)}
    assert Sampling(**options, logit_bias={np.int64(1): np.float32(2)}) == Sampling(0.5, 3, 0.5, seed=1, logit_bias={1: 2.0})


def test_bad_ids_and_shapes():
    """Ids outside the vocabulary, bans of everything and logits of another size are errors."""
    for prompt in ([4], [-1, 2]):
        with pytest.raises(Zamba2Error, match=f"token {prompt[0]};"):
            Sampler(Sampling(), prompt, 4)
    with pytest.raises(Zamba2Error, match="logit_bias names token 4"):
        Sampler(Sampling(logit_bias={4: 1.0}), [], 4)
    with pytest.raises(Zamba2Error, match="bans every token"):
        Sampler(Sampling(logit_bias={0: -math.inf, 1: -math.inf}), [], 2).sample(np.zeros(2, np.float32))
    with pytest.raises(Zamba2Error, match=r"shape \[3\]"):
        Sampler(Sampling(), [], 2).sample(np.zeros(3, np.float32))


def test_options_do_not_follow_the_callers_mapping():
    """A Sampling keeps the bias it was given, and can be replaced and compared."""
    bias = {1: 2.0}
    sampling = Sampling(logit_bias=bias)
    bias[1] = 9.0
    assert sampling.logit_bias == {1: 2.0}
    assert dataclasses.replace(sampling, seed=1) != sampling and hash(sampling) == hash(Sampling(logit_bias={1: 2.0}))


@given(st.integers(0, 2**32), st.integers(0, V + 5))
def test_logprobs_are_the_models_own(seed, k):
    """log_softmax sums to one and equals the closed form; top_logprobs are its k largest, in order."""
    logits = logits_of(seed)
    logprobs = log_softmax(logits)
    assert logprobs.dtype == np.float64
    np.testing.assert_allclose(np.exp(logprobs), softmax(logits.astype(np.float64)), rtol=1e-12)
    assert top_logprobs(logits, k) == sorted(enumerate(logprobs.tolist()), key=lambda item: -item[1])[:k]
