"""Random small models for the property tests: shapes that cover every switch of the three published sizes, and odd ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from zamba2.config import Config
from zamba2.model.model import Zamba2

__all__ = ["LONG", "MINIATURES", "Reading", "configs", "fill", "miniature", "random_model", "random_tokens", "readings"]


def miniature(**values: object) -> Config:
    """A small config with the hybrid layout given; the defaults are those of a 2.7B in little."""
    defaults: dict[str, object] = {
        "hidden_size": 24, "num_hidden_layers": 5, "vocab_size": 61, "hybrid_layer_ids": (1, 2, 4), "num_mem_blocks": 2,
        "mamba_d_state": 8, "n_mamba_heads": 6, "num_attention_heads": 4, "intermediate_size": 40, "adapter_rank": 3,
    }  # fmt: skip
    values = defaults | values
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    return Config(**values)  # type: ignore[arg-type]


# The published sizes in little: their switches, with the three hybrid layers that two shared blocks need to show their turns.
MINIATURES = {
    "1.2b": miniature(num_mem_blocks=1, mamba_d_state=16, use_shared_attention_adapter=True, use_mem_rope=True),
    "2.7b": miniature(),
    "7b": miniature(mamba_ngroups=2, use_mem_rope=True),
    "7b-long": miniature(mamba_ngroups=2, use_mem_rope=True, use_long_context=True, hidden_size=20, n_mamba_heads=4, chunk_size=64),
}


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Valid configs: every combination of the switches, odd sizes, one to three shared blocks, grouped keys and values."""
    hidden = draw(st.sampled_from([6, 9, 10, 12, 15, 18, 20, 24]), "hidden_size")
    layers = draw(st.integers(1, 6), "layers")
    hybrid = sorted(draw(st.sets(st.integers(0, layers - 1), min_size=min(layers, 2), max_size=4), "hybrid"))
    expand = draw(st.integers(1, 3), "expand")
    mamba_heads = draw(st.sampled_from(divisors(expand * hidden)[:-1]), "mamba heads")
    rope = draw(st.booleans(), "rope")
    adapters = draw(st.booleans(), "attention adapters")
    fitting = [n for n in divisors(2 * hidden) if 2 * hidden // n >= 3 and not (rope and 2 * hidden // n % 2)]
    heads = draw(st.sampled_from(fitting), "attention heads")
    return Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        vocab_size=draw(st.integers(3, 70), "vocab_size"),
        hybrid_layer_ids=tuple(hybrid),
        num_mem_blocks=draw(st.integers(1, min(3, len(hybrid))), "shared blocks"),
        mamba_d_state=draw(st.integers(1, 12), "state size"),
        n_mamba_heads=mamba_heads,
        num_attention_heads=heads,
        num_key_value_heads=heads if adapters else draw(st.sampled_from(divisors(heads)), "key and value heads"),
        intermediate_size=draw(st.integers(1, 40), "intermediate size"),
        mamba_ngroups=draw(st.sampled_from(divisors(mamba_heads)), "groups"),
        mamba_expand=expand,
        mamba_d_conv=draw(st.integers(2, 5), "taps"),
        chunk_size=draw(st.sampled_from([1, 5, 32, 64, 256]), "chunk size"),
        adapter_rank=draw(st.integers(1, 5), "rank"),
        use_shared_attention_adapter=adapters,
        use_mem_rope=rope,
        use_long_context=draw(st.booleans(), "long context") if rope else False,
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-3]), "eps"),
        tie_word_embeddings=draw(st.booleans(), "tied"),
    )


def fill(model: Zamba2, seed: int) -> None:
    """Random weights that keep every part of the model audible: no branch is so small that an error in it could hide.

    Projections keep the scale of their input; dt spans 1e-3..1 and A is -1..-heads, as at the start of training; the
    convolution's bias is far from zero, so that padding that is not masked behind it shows.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size, scale: float) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = parameter.shape
            if name.endswith("A_log"):
                value = torch.log(torch.arange(1, shape[0] + 1).float())
            elif name.endswith("dt_bias"):
                dt = torch.exp(torch.empty(shape).uniform_(math.log(1e-3), 0.0, generator=generator))
                value = torch.log(torch.expm1(dt))
            elif name.endswith("norm.weight") or name.endswith(".D"):
                value = 1 + normal(shape, 0.2)
            elif name.endswith("conv1d.bias"):
                value = normal(shape, 0.5)
            elif name.startswith("embed_tokens"):
                value = normal(shape, 1.0)
            else:
                value = normal(shape, parameter[0].numel() ** -0.5)
            parameter.copy_(value)


def random_model(config: Config, seed: int, *, ops: str = "torch", dtype: torch.dtype = torch.float32) -> Zamba2:
    """A model with weights drawn from the seed (see ``fill``), without gradients."""
    model = Zamba2(config, ops=ops)
    fill(model, seed)
    return model.to(dtype).requires_grad_(False).eval()


def random_tokens(config: Config, seed: int, *shape: int) -> Tensor:
    """Token ids of the given shape."""
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed + 1))


@dataclass(frozen=True)
class Reading:
    """A model, tokens to read, and a place to cut them.

    fp32 on the miniatures, whose sizes are sound, is held to what users get. Models of random sizes, where a norm of three
    nearly cancelling numbers can magnify any rounding, run in fp64: there a law holds to ten digits or is broken.
    """

    config: Config
    seed: int
    length: int
    cut: float = 0.5
    dtype: torch.dtype = torch.float32

    @property
    def at(self) -> int:
        """Where to cut: 1 to length - 1."""
        return min(self.length - 1, 1 + int(self.cut * (self.length - 1)))

    def model(self, *, ops: str = "torch", dtype: torch.dtype | None = None) -> Zamba2:
        return random_model(self.config, self.seed, ops=ops, dtype=dtype or self.dtype)

    def tokens(self, rows: int = 1, length: int | None = None) -> Tensor:
        return random_tokens(self.config, self.seed, rows, self.length if length is None else length)


# Longer than a chunk of 256 tokens: an explicit example of every law.
LONG = {name: Reading(config, seed=7, length=300, cut=0.9) for name, config in MINIATURES.items()}


def readings(*, longest: int = 48) -> st.SearchStrategy[Reading]:
    """Random models with 2 to ``longest`` tokens, now and then 257 or 300."""
    lengths = st.one_of(st.integers(2, longest), st.integers(2, longest), st.sampled_from([257, 300]))
    rest = (st.integers(0, 1 << 16), lengths, st.floats(0, 1))
    small = st.builds(Reading, st.sampled_from(list(MINIATURES.values())), *rest)
    odd = st.builds(Reading, configs(), *rest, st.just(torch.float64))
    return st.one_of(odd, odd, small)
