"""The models that Zamba2-2.7B is measured beside: their published shapes, and such a model with random weights.

Shapes are those of the config.json of each model's repository; what a shape leaves out is transformers' default for its class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from zamba2.bench.llama_cpp_peer import Spec, tensors

if TYPE_CHECKING:
    import torch

__all__ = ["RIVALS", "Rival", "parameters", "random_model"]

SPREAD = 0.02  # of random weights
TILE = 1 << 20  # random numbers, repeated: billions of new ones would take minutes, and a product takes as long with these


@dataclass(frozen=True)
class Rival:
    """name: as options take it. repository: on the Hub. parameters: as published, in billions. shape: transformers' config, by
    ``model_type``. architecture: llama.cpp's name of it."""

    name: str
    repository: str
    parameters: float
    architecture: str
    shape: Mapping[str, Any]

    @property
    def gguf(self) -> Spec:
        """The shape as ``llama_cpp_peer.py write`` takes it."""
        shape = self.shape
        head = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
        return {
            "name": self.name, "arch": self.architecture, "hidden": shape["hidden_size"], "layers": shape["num_hidden_layers"],
            "heads": shape["num_attention_heads"], "kv_heads": shape["num_key_value_heads"], "head_dim": head,
            "mlp": shape["intermediate_size"], "vocab": shape["vocab_size"], "context": shape["max_position_embeddings"],
            "rotary": int(head * shape.get("rope_parameters", {}).get("partial_rotary_factor", 1.0)),
            "tied": shape["tie_word_embeddings"],
        }  # fmt: skip


def _rival(name: str, repository: str, parameters: float, architecture: str, model_type: str, sizes: str, **rest: Any) -> Rival:
    """sizes: hidden, layers, heads, heads of keys and values, MLP, vocabulary, longest sequence."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
             "max_position_embeddings")  # fmt: skip
    shape = dict(zip(names, map(int, sizes.split()), strict=True))
    tied = {"tie_word_embeddings": False}
    return Rival(name, repository, parameters, architecture, {"model_type": model_type} | shape | tied | rest)


ROWS = (
    _rival("phi-2", "microsoft/phi-2", 2.78, "phi2", "phi", "2560 32 32 32 10240 51200 2048", hidden_act="gelu_new",
           rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4}),
    _rival("phi-3-mini", "microsoft/Phi-3-mini-4k-instruct", 3.82, "phi3", "phi3", "3072 32 32 32 8192 32064 4096",
           sliding_window=2047, pad_token_id=32000),
    _rival("stablelm-3b", "stabilityai/stablelm-zephyr-3b", 2.80, "stablelm", "stablelm", "2560 32 32 32 6912 50304 4096",
           rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}),
    _rival("gemma-2-2b", "google/gemma-2-2b-it", 2.61, "gemma2", "gemma2", "2304 26 8 4 9216 256000 8192", head_dim=256,
           tie_word_embeddings=True, query_pre_attn_scalar=256),
    _rival("danube-4b", "h2oai/h2o-danube3-4b-chat", 3.96, "llama", "llama", "3840 24 32 8 10240 32000 8192", head_dim=120),
    _rival("mistral-7b", "mistralai/Mistral-7B-Instruct-v0.2", 7.24, "llama", "mistral", "4096 32 32 8 14336 32000 32768",
           head_dim=128, sliding_window=None),
)  # fmt: skip
RIVALS = {rival.name: rival for rival in ROWS}


def parameters(spec: Spec) -> int:
    """Of a model, shared ones once."""
    return sum(int(np.prod(shape)) for shape in tensors(spec).values())


def random_model(shape: Mapping[str, Any], dtype: torch.dtype, device: str = "cpu") -> Any:
    """transformers' model of a shape with random weights, in memory alone, ready to generate.

    Weights are a tile of normal numbers over and over; norms are 1, A_log and dt_bias those of write_checkpoint.
    """
    import torch
    import transformers
    from accelerate import init_empty_weights
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    settings = dict(shape)
    kind = settings.pop("model_type")
    config = transformers.AutoConfig.for_model(kind, **settings)
    with init_empty_weights(include_buffers=False):
        # by its name and not by AutoModelForCausalLM, which gives our own Zamba2 where zamba2.hf was imported
        own: Any = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
        model = own._from_config(config, dtype=dtype)
    tile = (SPREAD * torch.randn(TILE, generator=torch.Generator().manual_seed(0))).to(device, dtype)
    new: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if id(old) not in new:
                weight = torch.empty(old.shape, dtype=dtype, device=device)
                if name == "A_log":
                    weight.copy_(torch.log(torch.arange(1, weight.numel() + 1).float()))
                elif name == "dt_bias":
                    weight.uniform_(-4.0, -1.0)
                elif name == "weight" and old.ndim == 1:
                    weight.fill_(1.0)
                else:
                    flat = weight.view(-1)
                    for start in range(0, len(flat), TILE):
                        flat[start : start + TILE] = tile[: len(flat) - start]
                new[id(old)] = torch.nn.Parameter(weight, requires_grad=False)
            setattr(module, name, new[id(old)])
    model.tie_weights()
    return model.to(device).eval()
