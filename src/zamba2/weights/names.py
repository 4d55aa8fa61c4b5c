"""Where each parameter of the model lies in a checkpoint: the Hub's layout and the standalone one. Knows no torch."""

from __future__ import annotations

from zamba2.config import Config

__all__ = ["hub_names", "parameter_shapes", "standalone_names"]

MIXER = ("in_proj.weight", "conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D", "norm.weight", "out_proj.weight")


def hub_names(config: Config) -> dict[str, list[str]]:
    """Model parameter -> its possible names in the Hub's layout, the usual one first.

    A shared block may stand under any hybrid layer that uses it; one copy is enough.
    """
    names = {"embed_tokens.weight": ["model.embed_tokens.weight"], "final_layernorm.weight": ["model.final_layernorm.weight"]}
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = ["lm_head.weight"]
    for layer in config.layers:
        ours, theirs = f"layers.{layer.index}", f"model.layers.{layer.index}"
        backbone = f"{theirs}.mamba_decoder" if layer.is_hybrid else theirs
        if layer.is_hybrid:
            names[f"{ours}.linear.weight"] = [f"{theirs}.linear.weight"]
        for name in ("input_layernorm.weight", *(f"mamba.{part}" for part in MIXER)):
            names[f"{ours}.{name}"] = [f"{backbone}.{name}"]
    for block in range(config.num_shared_blocks):
        users = [layer for layer in config.layers if layer.block == block]
        for name in _block_parameters(config, [layer.position for layer in users if layer.position is not None]):
            names[f"shared_blocks.{block}.{name}"] = [f"model.layers.{layer.index}.shared_transformer.{name}" for layer in users]
    return names


def _block_parameters(config: Config, positions: list[int]) -> list[str]:
    names = ["input_layernorm.weight", "pre_ff_layernorm.weight"]
    names += [f"self_attn.{p}_proj.weight" for p in "qkvo"] + [f"feed_forward.{p}_proj.weight" for p in ("gate_up", "down")]
    lists = ["feed_forward.gate_up_proj_adapter_list"]
    if config.use_shared_attention_adapter:
        lists += [f"self_attn.linear_{p}_adapter_list" for p in "qkv"]
    return names + [f"{own}.{j}.{half}.weight" for own in lists for j in positions for half in (0, 1)]


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Model parameter -> its shape, as the model declares them."""
    hidden, wide, inner, rank = config.hidden_size, config.attention_hidden_size, config.intermediate_size, config.adapter_rank
    conv = config.conv_dim
    ends: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (config.vocab_size, hidden), "lm_head.weight": (config.vocab_size, hidden),
        "final_layernorm.weight": (hidden,), "linear.weight": (hidden, hidden), "pre_ff_layernorm.weight": (hidden,),
        "mamba.in_proj.weight": (config.in_proj_dim, hidden), "mamba.out_proj.weight": (hidden, config.d_inner),
        "mamba.conv1d.weight": (conv, 1, config.mamba_d_conv), "mamba.conv1d.bias": (conv,), "mamba.norm.weight": (config.d_inner,),
        "mamba.dt_bias": (config.n_mamba_heads,), "mamba.A_log": (config.n_mamba_heads,), "mamba.D": (config.n_mamba_heads,),
        "self_attn.q_proj.weight": (wide, wide), "self_attn.k_proj.weight": (config.kv_dim, wide),
        "self_attn.v_proj.weight": (config.kv_dim, wide), "self_attn.o_proj.weight": (hidden, wide),
        "feed_forward.gate_up_proj.weight": (2 * inner, hidden), "feed_forward.down_proj.weight": (hidden, inner),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {}
    for name in hub_names(config):
        parts = name.split(".")
        if name.endswith("input_layernorm.weight"):
            shapes[name] = (hidden,) if parts[0] == "layers" else (wide,)
        elif "_adapter_list" in name:
            inputs, outputs = (hidden, 2 * inner) if "gate_up" in name else (wide, wide)
            shapes[name] = (rank, inputs) if parts[-2] == "0" else (outputs, rank)
        else:
            shapes[name] = next(shape for end, shape in ends.items() if name.endswith(end))
    return shapes


def standalone_names(config: Config) -> dict[str, tuple[str, int | None]]:
    """Model parameter -> (name in the standalone ``.pt`` layout, part of the interleaved qkv or None).

    ``linear_qkv`` holds, per group of heads, the rows of q, k and v one behind the other; the part is 0, 1 or 2.
    """
    names: dict[str, tuple[str, int | None]] = {
        "embed_tokens.weight": ("embedding.weight", None),
        "final_layernorm.weight": ("decoder.final_layernorm.weight", None),
    }
    for layer in config.layers:
        ours, theirs = f"layers.{layer.index}", f"decoder.layers.{layer.index}"
        names[f"{ours}.input_layernorm.weight"] = (f"{theirs}.norm.weight", None)
        for part in MIXER:
            names[f"{ours}.mamba.{part}"] = (f"{theirs}.mixer.{part.replace('in_proj.', 'in_proj.0.')}", None)
        if layer.is_hybrid:
            names[f"{ours}.linear.weight"] = (f"decoder.block_map.{layer.index}.weight", None)
    for block in range(config.num_shared_blocks):
        ours, theirs = f"shared_blocks.{block}", f"decoder.blocks.{block}"
        names[f"{ours}.input_layernorm.weight"] = (f"{theirs}.sa.norm.weight", None)
        names[f"{ours}.pre_ff_layernorm.weight"] = (f"{theirs}.mlp.norm.weight", None)
        for index, letter in enumerate("qkv"):
            names[f"{ours}.self_attn.{letter}_proj.weight"] = (f"{theirs}.sa.mixer.linear_qkv.weight", index)
        names[f"{ours}.self_attn.o_proj.weight"] = (f"{theirs}.sa.mixer.linear_proj.weight", None)
        names[f"{ours}.feed_forward.gate_up_proj.weight"] = (f"{theirs}.mlp.mixer.linear_fc1.weight", None)
        names[f"{ours}.feed_forward.down_proj.weight"] = (f"{theirs}.mlp.mixer.linear_fc2.weight", None)
        for layer in config.layers:
            if layer.block != block:
                continue
            for half, letter in enumerate("AB"):
                own = f"{ours}.feed_forward.gate_up_proj_adapter_list.{layer.position}.{half}.weight"
                names[own] = (f"{theirs}.mlp.mixer.linear_fc1_lora_{letter}_list.{layer.position}.weight", None)
                for p in "qkv" if config.use_shared_attention_adapter else "":
                    own = f"{ours}.self_attn.linear_{p}_adapter_list.{layer.position}.{half}.weight"
                    names[own] = (f"{theirs}.sa.mixer.linear_{p}_lora_{letter}_list.{layer.position}.weight", None)
    return names
