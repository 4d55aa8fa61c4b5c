"""The shape of a model: sizes derived from it, config.json in every spelling, and one sentence for every wrong one."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from strategies import configs

from zamba2.config import PRESETS, Config, Layer
from zamba2.errors import Zamba2Error
from zamba2.model.model import Zamba2

# Of the published shapes: parameters, weights per token and hoisted (G), KV bytes per token, SSM and conv state (MiB)
PUBLISHED = {
    "1.2b": (1_215_064_704, "1.760", "1.634", 98_304, "76.0", "1.3"),
    "2.7b": (2_662_214_560, "3.855", "3.580", 184_320, "67.5", "2.2"),
    "7b": (7_356_749_648, "11.03", "10.18", 372_736, "141.8", "4.6"),
}
MIB = 1 << 20


def same_digits(value: float, printed: str) -> bool:
    """Whether the value is the printed one, to one unit of its last digit (the table subtracts rounded figures)."""
    return abs(value - float(printed)) <= 10.0 ** -len(printed.partition(".")[2])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    """Parameters, weights per token, KV and state bytes are those of the published shapes."""
    config = PRESETS[name]
    parameters, weights, hoisted, kv_bytes, ssm, conv = PUBLISHED[name]
    assert config.num_parameters == parameters
    assert same_digits(config.weights_per_token(hoisted=False) / 1e9, weights)
    assert same_digits(config.weights_per_token() / 1e9, hoisted)
    saved = config.weights_per_token(hoisted=False) - config.weights_per_token()
    uses = len(config.hybrid_layer_ids) - config.num_shared_blocks
    assert saved == uses * config.hidden_size * 3 * config.attention_hidden_size
    assert config.kv_bytes_per_token() == kv_bytes
    assert config.kv_bytes_per_token(4) == 2 * kv_bytes
    assert same_digits(config.ssm_state_bytes / MIB, ssm)
    assert same_digits(config.conv_state_bytes(2) * 4 / 3 / MIB, conv)
    backbone = dataclasses.replace(config, hybrid_layer_ids=(), num_mem_blocks=1)
    assert backbone.weights_per_token() == backbone.num_parameters  # the table is read by the head, and nothing twice


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_model_has_its_parameters(name: str) -> None:
    """The model built from the preset has exactly the parameters the config counts."""
    with torch.device("meta"):
        assert sum(p.numel() for p in Zamba2(PRESETS[name]).parameters()) == PRESETS[name].num_parameters


def test_published_shapes() -> None:
    """The derived sizes of the 2.7B model, and the 16k context of the 7B."""
    config = PRESETS["2.7b"]
    assert (config.d_inner, config.mamba_headdim, config.conv_dim, config.in_proj_dim) == (5120, 64, 5248, 10448)
    assert (config.attention_hidden_size, config.attention_head_dim, config.kv_dim) == (5120, 160, 5120)
    assert config.attention_scale == pytest.approx(1 / math.sqrt(80))
    assert config.rope_base == 10000.0
    assert [layer.block for layer in config.layers if layer.is_hybrid] == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert config.layers[12] == Layer(12, position=1, block=1)
    assert config.layers[13] == Layer(13)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (2,), 0)
    assert config.conv_state_bytes() / MIB == pytest.approx(3.2, abs=0.05)  # fp32, three columns
    long = Config.from_dict(PRESETS["7b"].to_dict() | {"use_long_context": True})
    assert long.rope_base == pytest.approx(1e4 * 8 ** (224 / 222))


HUB_27B = {
    "architectures": ["Zamba2ForCausalLM"], "model_type": "zamba2", "transformers_version": "4.49.0.dev0",
    "hidden_size": 2560, "num_hidden_layers": 54, "vocab_size": 32000, "mamba_d_state": 64, "n_mamba_heads": 80,
    "mamba_headdim": 64, "mamba_ngroups": 1, "mamba_expand": 2, "mamba_d_conv": 4, "chunk_size": 256, "use_conv_bias": True,
    "time_step_min": 0.001, "time_step_max": 0.1, "time_step_floor": 1e-4, "time_step_limit": None,
    "num_attention_heads": 32, "num_key_value_heads": 32, "num_query_groups": 32, "kv_channels": 80,
    "attention_hidden_size": 5120, "attention_head_dim": 160, "attention_dropout": 0.0, "intermediate_size": 10240,
    "ffn_hidden_size": 10240, "hidden_act": "gelu", "add_bias_linear": False, "num_mem_blocks": 2,
    "hybrid_layer_ids": [6, 12, 18, 24, 30, 36, 42, 47, 51], "adapter_rank": 128, "use_shared_mlp_adapter": True,
    "use_shared_attention_adapter": False, "use_mem_rope": False, "rope_theta": 10000, "use_long_context": False,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "initializer_range": 0.02, "num_logits_to_keep": 1,
    "use_cache": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
HUB_27B["layers_block_type"] = ["hybrid" if i in HUB_27B["hybrid_layer_ids"] else "mamba" for i in range(54)]  # type: ignore[operator]


def changed(**values: Any) -> dict[str, Any]:
    """The Hub's config of 2.7B with some keys replaced; ``...`` removes one."""
    return {key: value for key, value in (HUB_27B | values).items() if value is not ...}


def test_hub_config() -> None:
    """The Hub's config.json of 2.7B, key by key, is the preset."""
    assert Config.from_dict(HUB_27B) == PRESETS["2.7b"]


def test_spellings() -> None:
    """Layers may be given by either spelling of their types, or by hybrid_layer_ids alone; each says the same."""
    newer = ["hybrid" if kind == "hybrid" else "linear_attention" for kind in HUB_27B["layers_block_type"]]  # type: ignore[attr-defined]
    for data in (
        changed(layers_block_type=newer),
        changed(layers_block_type=newer, hybrid_layer_ids=...),
        changed(hybrid_layer_ids=...),
        changed(layers_block_type=...),
        changed(layers_block_type=..., hybrid_layer_ids=..., layer_types=newer),
        changed(rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
        changed(num_key_value_heads=..., intermediate_size=..., ffn_hidden_size=...),
        changed(unknown_future_key=[1, {"a": None}]),
    ):
        assert Config.from_dict(data) == PRESETS["2.7b"]
    beside = Config.from_dict(changed(rope_theta=5e5, rope_parameters={"rope_type": "default"}))
    assert beside.rope_theta == 5e5


def test_token_ids() -> None:
    """Several end tokens are kept as they are; a missing or null one is none."""
    config = Config.from_dict(changed(eos_token_id=[2, 32001], bos_token_id=None))
    assert config.eos_token_ids == (2, 32001)
    assert config.bos_token_id is None
    assert config.to_dict()["eos_token_id"] == [2, 32001]
    assert Config.from_dict(changed(eos_token_id=None)).eos_token_ids == ()


@given(config=configs())
def test_round_trip(config: Config) -> None:
    """to_dict, through JSON, gives the config back."""
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", PUBLISHED)
def test_round_trip_of_presets(name: str, tmp_path: Path) -> None:
    """A written config.json is read as the same preset."""
    (tmp_path / "config.json").write_text(json.dumps(PRESETS[name].to_dict()))
    assert Config.from_file(tmp_path / "config.json") == PRESETS[name]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    # contradictions
    "head size": (changed(mamba_headdim=32), "mamba_headdim"),
    "attention width": (changed(attention_hidden_size=2560), "attention_hidden_size"),
    "attention head": (changed(attention_head_dim=80), "attention_head_dim"),
    "other attention head": (changed(head_dim=80), "head_dim"),
    "MLP width": (changed(ffn_hidden_size=1), "ffn_hidden_size"),
    "layer lists": (changed(hybrid_layer_ids=[6, 12]), "hybrid_layer_ids"),
    "layer count": (changed(num_hidden_layers=53), "layers_block_type"),
    "layer outside": (changed(layers_block_type=..., hybrid_layer_ids=[54]), "hybrid_layer_ids"),
    "layers twice": (changed(layers_block_type=..., hybrid_layer_ids=[6, 6, 12]), "hybrid_layer_ids"),
    "layers falling": (changed(layers_block_type=..., hybrid_layer_ids=[12, 6]), "hybrid_layer_ids"),
    "more blocks than uses": (changed(num_mem_blocks=10), "num_mem_blocks"),
    "heads do not divide": (changed(n_mamba_heads=81, mamba_headdim=...), "n_mamba_heads"),
    "groups do not divide": (changed(mamba_ngroups=3), "mamba_ngroups"),
    "attention heads do not divide": (changed(num_attention_heads=33, num_key_value_heads=...), "num_attention_heads"),
    "key heads do not divide": (changed(num_key_value_heads=5), "num_key_value_heads"),
    "adapters on grouped keys": (changed(num_key_value_heads=8, use_shared_attention_adapter=True), "num_key_value_heads"),
    "odd head with rope": (
        changed(use_mem_rope=True, hidden_size=48, n_mamba_heads=96, mamba_headdim=1, intermediate_size=4, ffn_hidden_size=4,
                attention_hidden_size=96, attention_head_dim=3, kv_channels=1), "attention_head_dim"),
    # what published models do not have
    "other activation": (changed(hidden_act="silu"), "hidden_act"),
    "bias": (changed(add_bias_linear=True), "add_bias_linear"),
    "no convolution bias": (changed(use_conv_bias=False), "use_conv_bias"),
    "no MLP adapter": (changed(use_shared_mlp_adapter=False), "use_shared_mlp_adapter"),
    "one tap": (changed(mamba_d_conv=1), "mamba_d_conv"),
    "rope scaling": (changed(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope_parameters"),
    "another model": (changed(model_type="mamba2"), "model_type"),
    "no model": (changed(model_type=...), "model_type"),
    # the old format
    "old marks": (changed(layers_block_type=["m"] * 53 + ["g"]), "layers_block_type"),
    "old state size": (changed(mamba_d_state=..., state_size=64), "state_size"),
    "old convolution": (changed(mamba_d_conv=..., conv_dimension=4), "conv_dimension"),
    "old expansion": (changed(mamba_expand=..., expansion_factor=2), "expansion_factor"),
    "old rank": (changed(adapter_rank=..., lora_rank=128), "lora_rank"),
    "old adapters": (changed(use_shared_mlp_adapter=..., ft_lora=False), "ft_lora"),
    # missing, of a wrong kind, or hostile
    "no width": (changed(hidden_size=...), "hidden_size"),
    "no layers": (changed(layers_block_type=..., hybrid_layer_ids=...), "layers_block_type"),
    "null": (changed(vocab_size=None), "vocab_size"),
    "zero": (changed(hidden_size=0), "hidden_size"),
    "no heads": (changed(n_mamba_heads=0, mamba_headdim=...), "n_mamba_heads"),
    "negative": (changed(vocab_size=-32000), "vocab_size"),
    "text": (changed(hidden_size="2560"), "hidden_size"),
    "fraction": (changed(num_hidden_layers=54.0), "num_hidden_layers"),
    "petabytes": (changed(vocab_size=1 << 50), "vocab_size"),
    "true for a number": (changed(n_mamba_heads=True, mamba_headdim=...), "n_mamba_heads"),
    "number for true": (changed(use_mem_rope=1), "use_mem_rope"),
    "list for a number": (changed(num_attention_heads=[32]), "num_"),
    "infinite": (changed(rope_theta=math.inf), "rope_theta"),
    "not a number": (changed(rms_norm_eps=math.nan), "rms_norm_eps"),
    "text for a number": (changed(rms_norm_eps="1e-5"), "rms_norm_eps"),
    "negative token": (changed(eos_token_id=[2, -1]), "eos_token_id"),
    "text for a token": (changed(bos_token_id="<s>"), "bos_token_id"),
    "layers as a map": (changed(layers_block_type={"0": "mamba"}), "layers_block_type"),
    "layer of a wrong type": (changed(layers_block_type=[["mamba"]] * 54), "layers_block_type"),
    "ids as text": (changed(layers_block_type=..., hybrid_layer_ids="6,12"), "hybrid_layer_ids"),
    "ids of a wrong type": (changed(layers_block_type=..., hybrid_layer_ids=[[6], "12"]), "hybrid_layer_ids"),
    "rope of a wrong type": (changed(rope_parameters=[1]), "rope_parameters"),
}  # fmt: skip


@pytest.mark.parametrize("why", WRONG)
def test_wrong_config_is_one_sentence(why: str) -> None:
    """What contradicts, is old, missing or hostile raises one sentence naming the key, and nothing else."""
    data, key = WRONG[why]
    with pytest.raises(Zamba2Error) as caught:
        Config.from_dict(data)
    message = str(caught.value)
    assert key in message
    assert message.endswith((".", "Hub."))
    assert "\n" not in message
    assert len(message) < 600


HOSTILE = {
    "millions of layers": (changed(num_hidden_layers=1 << 22, layers_block_type=..., hybrid_layer_ids=[1, 2]), "num_hidden_layers"),
    "integer beyond any float": (changed(rope_theta=10**400), "rope_theta"),
    "true for a positive number": (changed(rms_norm_eps=True), "rms_norm_eps"),
    "rope scaling in the old spelling": (changed(rope_scaling={"type": "linear", "factor": 2.0}), "rope_"),
    "long context with heads of two": (
        changed(use_mem_rope=True, use_long_context=True, num_attention_heads=2560, num_key_value_heads=2560, num_query_groups=...,
                kv_channels=..., attention_head_dim=...), "attention_head_dim"),
}  # fmt: skip


@pytest.mark.parametrize("why", HOSTILE)
def test_hostile_config_is_one_sentence(why: str) -> None:
    """The same for values that arithmetic on them would trip over."""
    data, key = HOSTILE[why]
    with pytest.raises(Zamba2Error, match=key):
        Config.from_dict(data)


@pytest.mark.parametrize("data", [None, 3, [], "zamba2"])
def test_not_an_object(data: Any) -> None:
    """JSON that is no object is refused with what it is."""
    with pytest.raises(Zamba2Error, match="object"):
        Config.from_dict(data)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, None], ids=["empty", "cut", "binary", "deep", "missing"])
def test_unreadable_file(content: bytes | None, tmp_path: Path) -> None:
    """A config.json that is missing or no JSON is one sentence with its path."""
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Zamba2Error) as caught:
        Config.from_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_error_names_the_file(tmp_path: Path) -> None:
    """A wrong key is reported with the file it stands in."""
    (tmp_path / "config.json").write_text(json.dumps(changed(model_type="llama")))
    with pytest.raises(Zamba2Error, match=r"config\.json: .*model_type is 'llama'"):
        Config.from_file(tmp_path / "config.json")
