"""The shape of a Zamba2 model: one frozen dataclass, its layer plan, sizes and costs.

Read from the Hub's ``config.json``; see ``Config.from_dict`` for the spellings accepted.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zamba2.errors import Zamba2Error

__all__ = ["PRESETS", "Config", "Layer"]

# Keys of the format that circulated before the Hub's, and what replaced them.
OLD_KEYS = {
    "state_size": "mamba_d_state",
    "conv_dimension": "mamba_d_conv",
    "expansion_factor": "mamba_expand",
    "lora_rank": "adapter_rank",
    "ft_lora": "use_shared_mlp_adapter",
    "use_shared_block_lora": "use_shared_mlp_adapter",
    "use_shared_attention_lora": "use_shared_attention_adapter",
    "layer_mapping": "layers_block_type",
}
LAYER_TYPES = {"mamba": False, "linear_attention": False, "hybrid": True}
LARGEST = 1 << 24  # no dimension of a real model comes near; keeps hostile configs from asking for petabytes
LARGEST_FLOAT = 1e30
MOST_LAYERS = 4096
LONG_CONTEXT_FACTOR = 8  # NTK-aware RoPE scaling of the 7B long-context model (original fork, use_long_context)


@dataclass(frozen=True)
class Layer:
    """One layer of the plan. ``position`` counts hybrid layers from 0; ``block`` is the shared block it uses."""

    index: int
    position: int | None = None
    block: int | None = None

    @property
    def is_hybrid(self) -> bool:
        return self.position is not None


@dataclass(frozen=True)
class Config:
    """Everything that fixes a Zamba2 model's tensors and arithmetic. Names are the Hub's ``config.json`` keys."""

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    hybrid_layer_ids: tuple[int, ...]
    num_mem_blocks: int
    mamba_d_state: int
    n_mamba_heads: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    mamba_ngroups: int = 1
    mamba_expand: int = 2
    mamba_d_conv: int = 4
    chunk_size: int = 256
    adapter_rank: int = 128
    use_shared_attention_adapter: bool = False
    use_mem_rope: bool = False
    use_long_context: bool = False
    rope_theta: float = 10000.0
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                self._whole(vars(self), field.name)
            if field.type == "bool" and not isinstance(value, bool):
                raise Zamba2Error(f"config key {field.name} is {value!r}; true or false is needed.")
            if field.type == "float" and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= LARGEST_FLOAT):
                raise Zamba2Error(f"config key {field.name} is {value!r}; a positive number is needed.")
        if self.num_hidden_layers > MOST_LAYERS:
            raise Zamba2Error(f"config key num_hidden_layers is {self.num_hidden_layers}; at most {MOST_LAYERS} are possible.")
        tokens = {"bos_token_id": (self.bos_token_id,), "pad_token_id": (self.pad_token_id,), "eos_token_id": self.eos_token_ids}
        for key, values in tokens.items():
            for value in values:
                if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                    raise Zamba2Error(f"config key {key} is {value!r}; a token id, a whole number from 0, is needed.")
        ids = self.hybrid_layer_ids
        if any(isinstance(i, bool) or not isinstance(i, int) for i in ids) or list(ids) != sorted(set(ids)):
            raise Zamba2Error(f"config key hybrid_layer_ids is {list(ids)}; rising layer numbers without repeats are needed.")
        if ids and not 0 <= ids[0] <= ids[-1] < self.num_hidden_layers:
            raise Zamba2Error(
                f"config key hybrid_layer_ids is {list(ids)}; numbers from 0 to {self.num_hidden_layers - 1} "
                f"(num_hidden_layers - 1) are needed."
            )
        if ids and self.num_mem_blocks > len(ids):
            raise Zamba2Error(
                f"config key num_mem_blocks is {self.num_mem_blocks}; at most {len(ids)}, the number of hybrid layers, can be used."
            )
        self._divides("n_mamba_heads", self.n_mamba_heads, "mamba_expand * hidden_size", self.d_inner)
        self._divides("mamba_ngroups", self.mamba_ngroups, "n_mamba_heads", self.n_mamba_heads)
        self._divides("num_attention_heads", self.num_attention_heads, "2 * hidden_size", self.attention_hidden_size)
        self._divides("num_key_value_heads", self.num_key_value_heads, "num_attention_heads", self.num_attention_heads)
        if self.use_mem_rope and self.attention_head_dim % 2:
            raise Zamba2Error(f"attention_head_dim is {self.attention_head_dim}; rotary embeddings (use_mem_rope) need an even number.")
        if self.use_long_context and self.attention_head_dim < 4:
            raise Zamba2Error(f"attention_head_dim is {self.attention_head_dim}; use_long_context needs at least 4.")
        if self.mamba_d_conv < 2:
            raise Zamba2Error(f"config key mamba_d_conv is {self.mamba_d_conv}; at least 2 is needed.")
        if self.use_shared_attention_adapter and self.num_key_value_heads != self.num_attention_heads:
            raise Zamba2Error(
                f"config key num_key_value_heads is {self.num_key_value_heads} with use_shared_attention_adapter; the adapters "
                f"need it equal to num_attention_heads ({self.num_attention_heads})."
            )

    @staticmethod
    def _divides(key: str, divisor: int, what: str, value: int) -> None:
        if value % divisor:
            raise Zamba2Error(f"config key {key} is {divisor}; it must divide {what} = {value}.")

    # ---- derived sizes -------------------------------------------------------------------------------------------

    @property
    def d_inner(self) -> int:
        """Width of the Mamba2 mixer, H * expand."""
        return self.mamba_expand * self.hidden_size

    @property
    def mamba_headdim(self) -> int:
        """P, channels per Mamba2 head."""
        return self.d_inner // self.n_mamba_heads

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: x, B and C."""
        return self.d_inner + 2 * self.mamba_ngroups * self.mamba_d_state

    @property
    def in_proj_dim(self) -> int:
        """Rows of in_proj: z, x, B, C and dt."""
        return self.d_inner + self.conv_dim + self.n_mamba_heads

    @property
    def attention_hidden_size(self) -> int:
        """Width of the shared block's input, the residual stream beside the embedding: 2H."""
        return 2 * self.hidden_size

    @property
    def attention_head_dim(self) -> int:
        return self.attention_hidden_size // self.num_attention_heads

    @property
    def attention_scale(self) -> float:
        """Softmax scale, (head_dim / 2) ** -0.5: the halving is Zamba2's own."""
        return float((self.attention_head_dim / 2) ** -0.5)

    @property
    def kv_dim(self) -> int:
        """Rows of k_proj and of v_proj."""
        return self.num_key_value_heads * self.attention_head_dim

    @property
    def rope_base(self) -> float:
        """Theta of the rotary embedding, NTK-rescaled when use_long_context is set."""
        if not self.use_long_context:
            return self.rope_theta
        d = self.attention_head_dim
        return float(self.rope_theta * LONG_CONTEXT_FACTOR ** (d / (d - 2)))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layer plan; shared blocks are used in turn: ABAB..."""
        positions = {layer: j for j, layer in enumerate(self.hybrid_layer_ids)}
        return tuple(
            Layer(i, positions[i], positions[i] % self.num_mem_blocks) if i in positions else Layer(i)
            for i in range(self.num_hidden_layers)
        )

    # ---- derived costs -------------------------------------------------------------------------------------------

    @property
    def num_shared_blocks(self) -> int:
        """Shared blocks that exist: num_mem_blocks, or none without hybrid layers."""
        return min(self.num_mem_blocks, len(self.hybrid_layer_ids))

    @property
    def _mamba_parameters(self) -> int:
        projections = (self.in_proj_dim + self.d_inner) * self.hidden_size
        return projections + self.conv_dim * (self.mamba_d_conv + 1) + 3 * self.n_mamba_heads + self.d_inner + self.hidden_size

    @property
    def _block_parameters(self) -> int:
        wide, hidden = self.attention_hidden_size, self.hidden_size
        attention = wide * (wide + 2 * self.kv_dim) + wide * hidden
        return attention + 3 * self.intermediate_size * hidden + wide + hidden

    @property
    def _position_parameters(self) -> int:
        """What a hybrid layer owns besides its mixer: the adapters and the H x H linear."""
        adapters = self.adapter_rank * (self.hidden_size + 2 * self.intermediate_size)
        if self.use_shared_attention_adapter:
            adapters += self.adapter_rank * 6 * self.attention_hidden_size
        return adapters + self.hidden_size**2

    @property
    def num_parameters(self) -> int:
        """Unique parameters; embeddings tied to the head count once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return (
            embeddings
            + self.hidden_size
            + self.num_hidden_layers * self._mamba_parameters
            + self.num_shared_blocks * self._block_parameters
            + len(self.hybrid_layer_ids) * self._position_parameters
        )

    def weights_per_token(self, *, hoisted: bool = True) -> int:
        """Weights applied to decode one token, a shared block counted each time it is used.

        ``hoisted``: the embedding half of q/k/v is applied once per block instead of once per position;
        q/k/v adapters see the whole input and are not hoisted.
        """
        positions = len(self.hybrid_layer_ids)
        saved = (positions - self.num_shared_blocks) * self.hidden_size * (self.attention_hidden_size + 2 * self.kv_dim)
        return (
            self.vocab_size * self.hidden_size
            + self.hidden_size
            + self.num_hidden_layers * self._mamba_parameters
            + positions * (self._block_parameters + self._position_parameters)
            - (saved if hoisted else 0)
        )

    def kv_bytes_per_token(self, element_bytes: int = 2) -> int:
        """Bytes of keys and values that one token of context keeps (bf16 by default)."""
        return len(self.hybrid_layer_ids) * 2 * self.kv_dim * element_bytes

    @property
    def ssm_state_bytes(self) -> int:
        """Bytes of the fp32 SSM state of one sequence."""
        return self.num_hidden_layers * self.d_inner * self.mamba_d_state * 4

    def conv_state_bytes(self, element_bytes: int = 4) -> int:
        """Bytes of the convolution state of one sequence, d_conv - 1 columns (fp32 by default)."""
        return self.num_hidden_layers * self.conv_dim * (self.mamba_d_conv - 1) * element_bytes

    # ---- config.json ---------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Config:
        """Read the Hub's ``config.json``.

        Layer types may be spelled "mamba"/"hybrid" or "linear_attention"/"hybrid", or given by ``hybrid_layer_ids`` alone.
        Raises Zamba2Error naming the key, what was found and what is needed: for another model, for the old format and
        for keys that contradict each other.
        """
        if not isinstance(data, Mapping):
            raise Zamba2Error(f"config.json holds a JSON {type(data).__name__}; an object with Zamba2's settings is needed.")
        for key, new in OLD_KEYS.items():
            if key in data and new not in data:
                raise Zamba2Error(
                    f"config key {key} belongs to an old Zamba2 format; the current Hub format with {new} is needed: "
                    f"take config.json from the current revision on the Hub."
                )
        kind = data.get("model_type")
        if kind != "zamba2":
            raise Zamba2Error(f"config key model_type is {kind!r}; this program runs 'zamba2' only.")
        required = ("hidden_size", "num_hidden_layers", "vocab_size", "mamba_d_state", "n_mamba_heads", "num_attention_heads")
        missing = [key for key in required if data.get(key) is None]
        if missing:
            raise Zamba2Error(f"config key {missing[0]} is missing; a Zamba2 config.json with {', '.join(required)} is needed.")
        values: dict[str, Any] = {
            field.name: data[field.name] for field in dataclasses.fields(cls) if data.get(field.name) is not None
        }
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if key in data:
                values[key] = tuple(data[key]) if isinstance(data[key], list) else data[key]
        hidden_size = cls._whole(data, "hidden_size")
        values["hybrid_layer_ids"] = cls._hybrid_layer_ids(data)
        values.setdefault("num_mem_blocks", 1)
        values.setdefault("num_key_value_heads", data["num_attention_heads"])
        values.setdefault("intermediate_size", 4 * hidden_size)
        rope = data.get("rope_parameters") or data.get("rope_scaling")
        if rope is not None:
            if not isinstance(rope, Mapping) or rope.get("rope_type", rope.get("type", "default")) != "default":
                raise Zamba2Error(f"config key rope_parameters is {rope!r}; only rope_type 'default' exists for Zamba2.")
            values["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", 10000.0))
        config = cls(**values)
        config._check_redundant(data)
        return config

    @staticmethod
    def _whole(data: Mapping[str, Any], key: str) -> int:
        value = data[key]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LARGEST:
            raise Zamba2Error(f"config key {key} is {value!r}; a whole number from 1 to {LARGEST} is needed.")
        return value

    @classmethod
    def _hybrid_layer_ids(cls, data: Mapping[str, Any]) -> tuple[int, ...]:
        types, ids = data.get("layers_block_type") or data.get("layer_types"), data.get("hybrid_layer_ids")
        if types is None and ids is None:
            raise Zamba2Error("config key layers_block_type is missing; it, or hybrid_layer_ids, must say which layers are hybrid.")
        if ids is not None and not isinstance(ids, list):
            raise Zamba2Error(f"config key hybrid_layer_ids is {ids!r}; a list of layer numbers is needed.")
        if types is None:
            return tuple(ids or ())
        if not isinstance(types, list) or len(types) != cls._whole(data, "num_hidden_layers"):
            found = f"{len(types)} entries" if isinstance(types, list) else repr(types)
            raise Zamba2Error(
                f"config key layers_block_type has {found}; one for each of num_hidden_layers = {data['num_hidden_layers']} is needed."
            )
        for kind in types:
            if kind in ("m", "g"):
                raise Zamba2Error(
                    f"config key layers_block_type has the old mark {kind!r}; 'mamba' and 'hybrid' are needed: "
                    f"take config.json from the current revision on the Hub."
                )
            if not isinstance(kind, str) or kind not in LAYER_TYPES:
                raise Zamba2Error(
                    f"config key layers_block_type has {kind!r}; 'mamba' (or 'linear_attention') and 'hybrid' are needed."
                )
        found_ids = tuple(i for i, kind in enumerate(types) if LAYER_TYPES[kind])
        if ids is not None and tuple(ids) != found_ids:
            raise Zamba2Error(
                f"config key hybrid_layer_ids is {ids}, but layers_block_type marks {list(found_ids)} as hybrid; they must agree."
            )
        return found_ids

    @property
    def _redundant(self) -> dict[str, Any]:
        """Keys that repeat others, or switch what this implementation fixes."""
        return {
            "mamba_headdim": self.mamba_headdim,
            "attention_hidden_size": self.attention_hidden_size,
            "attention_head_dim": self.attention_head_dim,
            "kv_channels": self.hidden_size // self.num_attention_heads,
            "num_query_groups": self.num_attention_heads,
            "ffn_hidden_size": self.intermediate_size,
            "hidden_act": "gelu",
            "add_bias_linear": False,
            "use_conv_bias": True,
            "use_shared_mlp_adapter": True,
        }

    def _check_redundant(self, data: Mapping[str, Any]) -> None:
        """Such keys must agree with the others."""
        for key, value in (self._redundant | {"head_dim": self.attention_head_dim}).items():
            if data.get(key) is not None and data[key] != value:
                raise Zamba2Error(
                    f"config key {key} is {data[key]!r}; {value!r} is needed to agree with the other keys and with published models."
                )

    @classmethod
    def from_file(cls, path: Path) -> Config:
        """Read a ``config.json`` file. Raises Zamba2Error when it cannot be read, is not JSON or not a Zamba2 config."""
        data = read_json(path)
        try:
            return cls.from_dict(data)
        except Zamba2Error as error:
            raise Zamba2Error(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The Hub's ``config.json`` for this shape, as transformers reads it (derived keys included)."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)} | {
            "architectures": ["Zamba2ForCausalLM"],
            "model_type": "zamba2",
            "hybrid_layer_ids": list(self.hybrid_layer_ids),
            "layers_block_type": ["hybrid" if layer.is_hybrid else "mamba" for layer in self.layers],
            "eos_token_id": list(self.eos_token_ids) if isinstance(self.eos_token_id, tuple) else self.eos_token_id,
            **self._redundant,
            "attention_dropout": 0.0,
            "time_step_min": 0.001,
            "time_step_max": 0.1,
            "time_step_floor": 1e-4,
            "use_cache": True,
            "num_logits_to_keep": 1,
        }


def read_json(path: Path) -> Any:
    """Parse a JSON file of a checkpoint. Raises Zamba2Error with the file's name and what is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise Zamba2Error(f"{path} does not exist; a checkpoint folder with this file is needed.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Zamba2Error(f"{path} cannot be read ({error}); a JSON text file in UTF-8 is needed.") from None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Zamba2Error(f"{path} is not valid JSON ({error}); download the file again.") from None


def _published(hybrid: Sequence[int], **values: Any) -> Config:
    return Config(
        vocab_size=32000,
        hybrid_layer_ids=tuple(hybrid),
        num_attention_heads=32,
        num_key_value_heads=32,
        intermediate_size=4 * values["hidden_size"],
        **values,
    )


# The published shapes (Zyphra's config.json files on the Hub).
PRESETS: dict[str, Config] = {
    "1.2b": _published(
        (5, 11, 17, 23, 29, 35), hidden_size=2048, num_hidden_layers=38, mamba_d_state=128, n_mamba_heads=64,
        num_mem_blocks=1, use_shared_attention_adapter=True, use_mem_rope=True,
    ),
    "2.7b": _published(
        (6, 12, 18, 24, 30, 36, 42, 47, 51), hidden_size=2560, num_hidden_layers=54, mamba_d_state=64, n_mamba_heads=80,
        num_mem_blocks=2,
    ),
    "7b": _published(
        (6, 11, 17, 23, 29, 35, 41, 47, 53, 59, 65, 71, 77), hidden_size=3584, num_hidden_layers=81, mamba_d_state=64,
        n_mamba_heads=112, mamba_ngroups=2, num_mem_blocks=2, use_mem_rope=True,
    ),
}  # fmt: skip
