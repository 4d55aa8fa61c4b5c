"""Our model behind transformers' interface: ``import zamba2.hf``, then use the Auto classes as for any model.

    import zamba2.hf
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("Zyphra/Zamba2-2.7B-instruct", dtype="bfloat16", device_map="cuda")

``from_pretrained`` reads with our streamed loader; ``save_pretrained`` writes the Hub's layout, which transformers' own
class reads too. Parameter names are those of ``zamba2.model`` behind "model.": a shared block exists once, as
``model.shared_blocks.{b}``, not once per position. For peft, target_modules are q_proj, k_proj, v_proj, o_proj,
gate_up_proj, down_proj (shared blocks: a LoRA there acts at every position that uses the block), in_proj, out_proj
(mixers) and linear (behind each block). ``load_state_dict`` takes the Hub's names as well, so a Trainer can resume.

trl's trainers take the model as it is, ``packing=True`` included: documents of a row do not see each other. A reference
model that they open themselves, and a model that they are given by name, are this class too. For
``assistant_only_loss=True``, set ``tokenizer.chat_template = zamba2.hf.TRAINING_TEMPLATE``.
"""

# transformers is typed in parts: its base classes and decorators are not.
# mypy: disable-error-code="misc, override, no-untyped-call, no-any-return"

from __future__ import annotations

import copy
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from zamba2.errors import install

try:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F
    from torch.utils.checkpoint import checkpoint
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        GenerationConfig,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
        Zamba2Config,
    )
    from transformers import initialization as init
    from transformers.cache_utils import Cache
    from transformers.generation.configuration_utils import GenerationMode
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
except ImportError as error:
    raise ImportError(f"zamba2.hf needs torch and transformers 5.23 ({error}); {install('hf')}.") from None

from zamba2.config import Config
from zamba2.model.model import Context, Conv1d, Mamba2, SharedBlock, Zamba2
from zamba2.model.ops import Ops, has_triton
from zamba2.model.state import ModelState
from zamba2.runtime.torch import device_of
from zamba2.weights.checkpoint import SHARD_BYTES, load_model, read_config, save_checkpoint
from zamba2.weights.files import replacing
from zamba2.weights.hub import ALIASES, SMALL_FILES, WEIGHT_FILES, resolve
from zamba2.weights.names import hub_names

__all__ = ["TRAINING_TEMPLATE", "Zamba2Cache", "Zamba2ForCausalLM"]

# ChatML for trl's ``assistant_only_loss``: what is trained on, answers and their end token, stands between generation marks.
TRAINING_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# from_pretrained options of transformers that hold here whatever their value ...
ALWAYS = {"low_cpu_mem_usage", "trust_remote_code", "weights_only", "code_revision", "_from_auto", "_from_pipeline", "_commit_hash"}
# ... and those that ask for nothing when they are empty, and for something that is not here otherwise.
NOT_HERE = {
    "disable_mmap", "distributed_config", "device_mesh", "fusion_config", "gguf_file", "ignore_mismatched_sizes", "kernel_config",
    "key_mapping", "max_memory", "offload_buffers", "offload_folder", "output_loading_info", "proxies", "quantization_config",
    "state_dict", "subfolder", "tp_plan", "tp_size", "tqdm_class", "use_kernels", "variant",
}  # fmt: skip
IGNORED = -100  # a label that counts nowhere
LOSS_OPTIONS = {"num_items_in_batch", "ignore_index", "shift_labels"}
PACKED_OPTIONS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}  # repeat what position_ids or seq_idx say


class Zamba2Cache(Cache):
    """``past_key_values``: the recurrent states, keys and values of a batch, advanced by each call it is passed to.

    ``copy.deepcopy`` keeps one for later (a shared prompt); a recurrent state cannot be cut back.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(layers=[])
        self.config, self.state = config, ModelState.empty(config)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.state.position

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # no limit

    def __len__(self) -> int:
        return self.config.num_hidden_layers

    @property
    def batch_size(self) -> int:
        conv = self.state.conv[0]
        return -1 if conv is None else conv.shape[0]

    @property
    def is_initialized(self) -> bool:
        return self.state.position > 0

    @property
    def is_croppable(self) -> bool:
        return False

    def reset(self) -> None:
        self.state = ModelState.empty(self.config)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state = self.state.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.state = self.state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        conv = self.state.conv[0]
        if conv is not None:
            self.state = self.state.select(torch.arange(conv.shape[0], device=conv.device).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("a recurrent state cannot be cut back; keep a copy.deepcopy of past_key_values at the place to return to")

    def activate_past_recording(self) -> None:
        raise ValueError("assisted generation needs a cache that can be cut back, and a recurrent state cannot; leave assistants out")


class Backbone(Zamba2):
    """Everything but the head, called as transformers calls the ``model`` inside a causal language model."""

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Zamba2Cache | None = None, inputs_embeds: Tensor | None = None, use_cache: bool | None = None,
        seq_idx: Tensor | None = None, output_attentions: bool | None = None, output_hidden_states: bool | None = None,
        return_dict: bool | None = None, **packed: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:  # fmt: skip
        """The normalized hidden states (b, T, H); arguments and errors as in ``Zamba2ForCausalLM.forward``.

        use_cache: by default, in inference and where rows are not packed.
        """
        for name, wanted in (("output_attentions", output_attentions), ("output_hidden_states", output_hidden_states)):
            if wanted:
                raise ValueError(f"{name} is not available in zamba2.hf; leave it out")
        for name in packed.keys() - PACKED_OPTIONS:
            raise TypeError(f"forward got an unexpected keyword argument {name!r}")
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give either input_ids or inputs_embeds")
        rows, length = given.shape[:2]
        if attention_mask is not None and (attention_mask.dim() != 2 or len(attention_mask) != rows):
            raise ValueError(f"attention_mask has shape {list(attention_mask.shape)}; {rows} rows of 0 and 1 are needed")
        seq_idx = _documents(seq_idx, position_ids, attention_mask, rows, length)
        if seq_idx is not None:
            if past_key_values is not None or use_cache:
                raise ValueError("rows hold several documents (position_ids start again, or seq_idx); a cache cannot be used with them")
            attention_mask = None  # padding is a document of its own
        elif any(value is not None for value in packed.values()):
            raise ValueError("cu_seq_lens were given without borders in position_ids or seq_idx; pass one of the two with them")
        if use_cache is None:
            use_cache = not self.training and seq_idx is None
        cache = past_key_values
        if cache is None and use_cache:
            cache = Zamba2Cache(self.config)
        state = None
        if cache is not None:
            attention_mask = _check_past(cache, attention_mask, rows, length)
            state = cache.state.copy()  # the cache moves on when the call has succeeded
        elif attention_mask is not None and attention_mask.shape[1] != length:
            raise ValueError(f"attention_mask has {attention_mask.shape[1]} columns and the call {length} tokens; they must agree")
        x = self.hidden_states(input_ids, inputs_embeds=inputs_embeds, state=state, attention_mask=attention_mask, seq_idx=seq_idx)
        if cache is not None and state is not None:
            cache.state = state
        output = BaseModelOutputWithPast(last_hidden_state=x, past_key_values=cache if use_cache else None)
        return output.to_tuple() if return_dict is False else output


class TiedHead(nn.Module):
    """The embedding as a head: a view that owns nothing, for those who want a head's weight (trl's losses do)."""

    bias = None

    def __init__(self, model: Zamba2) -> None:
        super().__init__()
        self.__dict__["owner"] = model

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.__dict__["owner"].embed_tokens.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Zamba2ForCausalLM(PreTrainedModel, GenerationMixin):
    """Our Zamba2 (attribute ``model``) with the methods that transformers, trl and peft expect of a causal language model."""

    config_class = Zamba2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    _is_stateful = True
    _supports_sdpa = True  # attention is always torch's scaled_dot_product_attention; "eager" is accepted and means the same
    _no_split_modules = ["DecoderLayer", "SharedBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supported_generation_modes = [  # noqa: RUF012
        GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE,
    ]  # fmt: skip

    def __init__(self, config: Zamba2Config, model: Backbone | None = None) -> None:
        super().__init__(config)
        if config.attention_dropout:
            raise ValueError(f"config.attention_dropout is {config.attention_dropout}; only 0, as in published Zamba2 models, exists here")
        self.model = Backbone(shape_of(config)) if model is None else model
        self.model.embed_tokens.padding_idx = config.pad_token_id  # as in transformers: reading padding trains nothing
        self.register_load_state_dict_pre_hook(_accept_hub_names)
        self.post_init()

    # ---- loading and saving --------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *, config: Zamba2Config | str | os.PathLike[str] | None = None,
        dtype: torch.dtype | str | None = None, torch_dtype: torch.dtype | str | None = None, device_map: Any = None,
        revision: str | None = None, token: str | bool | None = None, cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False, force_download: bool = False, use_safetensors: bool | None = None,
        generation_config: GenerationConfig | None = None, **options: Any,
    ) -> Zamba2ForCausalLM:  # fmt: skip
        """Load a checkpoint folder, short name or Hub id, in evaluation mode.

        dtype (or torch_dtype): of the large weights; "auto" or None: config.json's, else the file's. device_map: one
        device ("cuda", "cpu", 0, {"": 0}), or "auto": a GPU if there is one; default: torch's default device, a CPU.
        Keys of the config may be given by name. Raises TypeError for an option that does not exist, ValueError for one
        of transformers' that has no meaning here, Zamba2Error for anything wrong with the files or the device.
        """
        source = pretrained_model_name_or_path
        device = _device(device_map)
        if use_safetensors is False:
            raise ValueError("use_safetensors is False; only safetensors checkpoints are read")
        adapter = (options.pop("adapter_kwargs", None) or {}).get("_adapter_model_path")
        if adapter is not None:
            raise ValueError(f"{adapter} is a peft adapter; load {source}, then peft.PeftModel.from_pretrained(model, adapter)")
        path = _locate(source, revision, token, cache_dir, local_files_only, force_download)
        shape = read_config(path)  # also names what is wrong with an old or damaged config.json
        if isinstance(config, Zamba2Config):
            config = copy.deepcopy(config)
        elif path.is_file():
            config = Zamba2Config.from_dict(shape.to_dict())
        else:
            config, options = Zamba2Config.from_pretrained(path if config is None else config, return_unused_kwargs=True, **options)
        assert isinstance(config, Zamba2Config)
        if "attn_implementation" in options:
            config._attn_implementation = options.pop("attn_implementation")
        for name, value in options.items():
            if name in NOT_HERE and value:
                raise ValueError(f"from_pretrained was given {name}={value!r}; zamba2.hf has no such option: leave it out")
            if name not in NOT_HERE | ALWAYS:
                raise TypeError(f"from_pretrained got an unexpected keyword argument {name!r}")
        chosen = _dtype(dtype if dtype is not None else torch_dtype) or _dtype(config.dtype)
        config.name_or_path = str(source if os.path.exists(source) else ALIASES.get(str(source).lower(), source))
        with init.no_init_weights():
            model = cls(config, load_model(path, dtype=chosen, device=device, config=shape_of(config), kind=Backbone))
        config.dtype = model.dtype
        if generation_config is not None:
            model.generation_config = copy.deepcopy(generation_config)
        elif (path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(path)
        if device_map is not None:
            setattr(model, "hf_device_map", {"": device})  # noqa: B010
        return model.requires_grad_(True).eval()

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False, max_shard_size: int | str = SHARD_BYTES, safe_serialization: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        """Write config.json, generation_config.json and the weights in the Hub's layout, replacing those in the folder.

        state_dict: tensors to write in place of the model's own, by this class's names. With an adapter of transformers'
        own peft integration, only the adapter is written, as transformers does. Raises Zamba2Error.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            super().save_pretrained(save_directory, is_main_process, dict(state_dict) if state_dict else None, push_to_hub, **options)
            return
        if push_to_hub:
            raise ValueError("save_pretrained has no push_to_hub; call model.push_to_hub(repo_id), or upload the folder with `hf upload`")
        if not safe_serialization:
            raise ValueError("safe_serialization is False; only safetensors checkpoints are written")
        for name, value in options.items():
            if name not in ("token", "variant", "save_peft_format", "save_original_format", "distributed_checkpoint"):
                raise TypeError(f"save_pretrained got an unexpected keyword argument {name!r}")
            if name in ("variant", "distributed_checkpoint") and value:
                raise ValueError(f"save_pretrained was given {name}={value!r}; zamba2.hf has no such option: leave it out")
        if not is_main_process:
            return
        self.model.config = shape_of(self.config)  # token ids and vocabulary may have changed
        tensors = self.state_dict() if state_dict is None else state_dict
        names = {name: f"{self.base_model_prefix}.{name}" for name in hub_names(self.model.config)}
        for name in names.values():
            if name not in tensors:
                raise ValueError(f"the state dict to save has no {name}; the names of Zamba2ForCausalLM.state_dict() are needed")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial.") as temporary:
            new = Path(temporary) / "checkpoint"
            ours = {name: tensors[theirs] for name, theirs in names.items()}
            save_checkpoint(self.model, new, max_shard_bytes=_bytes(max_shard_size), state_dict=ours)
            self.generation_config.save_pretrained(new)
            files = sorted(new.iterdir())
            for file in files:
                with replacing(folder / file.name) as place:
                    os.replace(file, place)
        written = {file.name for file in files}
        for stale in (*folder.glob("model.safetensors*"), *folder.glob("model-*-of-*.safetensors")):
            if stale.name not in written:
                stale.unlink()

    # ---- what transformers asks a model for ----------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.model.embed_tokens = value

    def get_decoder(self) -> Backbone:
        return self.model

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; where it is tied, a view of the embedding."""
        return TiedHead(self.model) if self.model.lm_head is None else self.model.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        if not isinstance(new_embeddings, TiedHead):
            self.model.lm_head = new_embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """New weights, distributed as in transformers (Mamba2's dt_bias and A_log; the rest normal, 0 or 1)."""
        super()._init_weights(module)
        if isinstance(module, Conv1d):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, Mamba2):
            low, high = math.log(self.config.time_step_min), math.log(self.config.time_step_max)
            dt = torch.exp(torch.empty_like(module.dt_bias).uniform_(low, high)).clamp(min=self.config.time_step_floor)
            init.copy_(module.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
            init.copy_(module.A_log, torch.arange(1, len(dt) + 1, device=dt.device).log())
            init.ones_(module.D)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1
    ) -> None:
        """Recompute every n-th layer in the backward pass of training instead of keeping its activations."""
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError("use_reentrant is True; gradient checkpointing needs False here, as the embeddings reach every hybrid layer")
        self.gradient_checkpointing = enable
        for index, layer in enumerate(self.model.layers):
            layer.__dict__.pop("forward", None)
            if enable and index % every_n_layers == 0:
                layer.forward = partial(_recomputed, partial(gradient_checkpointing_func, use_reentrant=False), layer, layer.forward)

    # ---- running -------------------------------------------------------------------------------------------------

    def prepare_inputs_for_generation(
        self, input_ids: Any, *args: Any, inputs_embeds: Tensor | None = None, tokenizer: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As transformers has it, which looks for inputs_embeds in the signature before ``generate`` may start from them. tokenizer: of
        ``stop_strings``, which ``generate`` hands to every step, and no step needs."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        return inputs

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Zamba2Cache | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, logits_to_keep: int | Tensor = 0, seq_idx: Tensor | None = None,
        output_attentions: bool | None = None, output_hidden_states: bool | None = None, return_dict: bool | None = None,
        loss_only: bool = False, **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:  # fmt: skip
        """Scores of the next token after each position, and the loss where ``labels`` are given.

        input_ids: (b, T), or inputs_embeds: (b, T, H). attention_mask: (b, past + T), 0 at padding; on the left it counts
        in the first call of ``past_key_values``, later ones read no padding. position_ids: (b or 1, T); positions
        themselves follow from the mask, but where they start again within a row a new document starts, as seq_idx
        (b or 1, T) says with numbers: nothing leaks from one document of a row to the next. logits_to_keep: trailing
        positions wanted (0: all) or a tensor of indices. use_cache: by default the config's, and no in training, with
        labels and for packed rows. loss_only: no logits, so that only positions with a label pass the head. Other arguments
        go to the loss function (num_items_in_batch). Raises ValueError for what does not fit or does not exist here
        (output_attentions, output_hidden_states).
        """
        for name, wanted in (("output_attentions", output_attentions), ("output_hidden_states", output_hidden_states)):
            if getattr(self.config, name, False) if wanted is None else wanted:
                raise ValueError(f"{name} is not available in zamba2.hf; leave it out")
        for name in kwargs.keys() - LOSS_OPTIONS - PACKED_OPTIONS:
            raise TypeError(f"forward got an unexpected keyword argument {name!r}")
        if use_cache is None and (labels is not None or not self.config.use_cache):
            use_cache = False
        options = {name: kwargs[name] for name in kwargs.keys() & PACKED_OPTIONS}
        read = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, seq_idx, **options)
        x = read.last_hidden_state
        options = {name: value for name, value in kwargs.items() if name in LOSS_OPTIONS}
        loss = None
        if loss_only:
            if labels is None:
                raise ValueError("loss_only was given without labels")
            return CausalLMOutputWithPast(loss=self._loss(x[:, :-1], labels[:, 1:], options))
        logits = self.model.logits(x[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep])
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **options)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=read.past_key_values)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def packed_loss(self, input_ids: Tensor, labels: Tensor, seq_idx: Tensor, num_items_in_batch: Tensor) -> Tensor:
        """The loss of packed rows, divided by the number of labels given, without looking at any value: a CUDA graph can hold it.

        input_ids, labels (IGNORED where there is none), seq_idx: (b, T), document numbers that rise from token to token or stay.
        """
        x = self.model.hidden_states(input_ids, seq_idx=seq_idx)
        return self._loss(x[:, :-1], labels[:, 1:], {"num_items_in_batch": num_items_in_batch})

    def _loss(self, x: Tensor, targets: Tensor, options: dict[str, Any]) -> Tensor:
        """The loss of hidden states (b, T, H) whose next tokens are known, where they count, without logits that are ever whole."""
        if x.device.type != "cuda" or not has_triton():
            scored = targets != IGNORED
            logits = self.model.logits(x[scored])
            return self.loss_function(logits, None, vocab_size=logits.shape[-1], shift_labels=targets[scored], **options)
        from zamba2.model.ops.triton_loss import linear_cross_entropy

        head = self.model.embed_tokens if self.model.lm_head is None else self.model.lm_head
        assert isinstance(head.weight, Tensor)  # packed weights are not trained
        total, count = linear_cross_entropy(x.flatten(0, 1), head.weight, targets.flatten())
        items = options.get("num_items_in_batch")
        return total / (count if items is None else items)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], generation_mode: GenerationMode, batch_size: int,
        max_cache_length: int,
    ) -> None:  # fmt: skip
        """Called by ``generate``: an empty cache, unless there is one or none is wanted."""
        if generation_config.cache_implementation is not None:
            raise ValueError(f"cache_implementation is {generation_config.cache_implementation!r}; there is one kind here: leave it out")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = Zamba2Cache(self.model.config)


def shape_of(config: PreTrainedConfig) -> Config:
    """Our config of transformers' one. Raises Zamba2Error where it is not a Zamba2 that exists here."""
    return Config.from_dict(config.to_dict())


def _device(device_map: Any) -> torch.device:
    """The one device of a device map. Raises Zamba2Error if it cannot be used, ValueError for several."""
    wanted = list(dict.fromkeys(device_map.values())) if isinstance(device_map, Mapping) else [device_map]
    if len(wanted) != 1:
        raise ValueError(f"device_map names {len(wanted)} devices; the model lies on one: give a single device or 'auto'")
    (name,) = wanted
    if name is None:
        return torch.get_default_device()
    if name in ("auto", "balanced", "balanced_low_0", "sequential"):
        return device_of(None)
    return device_of(f"cuda:{name}" if isinstance(name, int) else str(name))


def _dtype(wanted: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype or its name; None for None and "auto"."""
    if wanted is None or isinstance(wanted, torch.dtype):
        return wanted
    dtype = getattr(torch, wanted.removeprefix("torch."), None) if isinstance(wanted, str) else None
    if wanted != "auto" and not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype is {wanted!r}; a torch dtype, its name such as 'bfloat16', or 'auto' is needed")
    return dtype


def _bytes(size: int | str) -> int:
    """Bytes of a size such as "5GB"."""
    from transformers.utils.hub import convert_file_size_to_int

    return int(convert_file_size_to_int(size))


def _locate(
    source: str | os.PathLike[str], revision: str | None, token: str | bool | None, cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool, force_download: bool,
) -> Path:  # fmt: skip
    """The local folder of a checkpoint. As in transformers, a revision is of no meaning for one that is local already."""
    name = source if isinstance(source, str) else Path(source)
    if os.path.exists(name):
        return resolve(name)
    if token is None and cache_dir is None and not force_download:
        return resolve(name, revision=revision, offline=local_files_only)
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            str(name), revision=revision, token=token, cache_dir=None if cache_dir is None else str(cache_dir),
            local_files_only=local_files_only, force_download=force_download, allow_patterns=["config.json", *SMALL_FILES, *WEIGHT_FILES],
        )
    )  # fmt: skip


def _accept_hub_names(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before ``load_state_dict``: give tensors that have the Hub's names ours."""
    assert isinstance(model, Zamba2ForCausalLM)
    config = model.model.config
    for ours, candidates in hub_names(config).items():
        for stored in candidates:
            if prefix + stored in state_dict and stored != f"model.{ours}":
                state_dict[f"{prefix}model.{ours}"] = state_dict.pop(prefix + stored)
    if config.tie_word_embeddings:
        state_dict.pop(f"{prefix}lm_head.weight", None)


def _recomputed(
    recompute: Any, layer: nn.Module, forward: Callable[..., Tensor], x: Tensor, block: SharedBlock | None, context: Context, ops: Ops
) -> Tensor:
    """A layer's forward under gradient checkpointing. Each run hoists for itself: it must repeat exactly."""
    if not layer.training or context.state is not None:
        return forward(x, block, context, ops)
    out: Tensor = recompute(lambda x: forward(x, block, replace(context, right={}, hoisted={}), ops), x)
    return out


def _documents(seq_idx: Tensor | None, position_ids: Tensor | None, mask: Tensor | None, rows: int, length: int) -> Tensor | None:
    """Document numbers (b, T) of a packed batch, padding counted as a document; None if every row is one document."""
    source, name = (position_ids, "position_ids") if seq_idx is None else (seq_idx, "seq_idx")
    if source is None or length == 1:
        return None
    if source.dim() != 2 or source.shape[1] != length or len(source) not in (1, rows):
        raise ValueError(f"{name} has shape {list(source.shape)}; [{rows}, {length}] is needed")
    step = source[:, 1:] - source[:, :-1]
    if mask is not None and mask.shape[1] >= length:  # numbers at padding mean nothing
        real = mask[:, -length:].bool()
        both, changes = real[:, 1:] & real[:, :-1], real[:, 1:] != real[:, :-1]
    else:
        both, changes = torch.ones_like(step, dtype=torch.bool), torch.zeros_like(step, dtype=torch.bool)
    starts = both & (step != (0 if seq_idx is not None else 1))
    if not bool(starts.any()):
        return None
    if seq_idx is None and bool((starts & (step > 1)).any()):
        raise ValueError("position_ids skip numbers; within a document they must count up by one")
    return F.pad((starts | changes).cumsum(1), (1, 0)).expand(rows, -1)


def _check_past(cache: Zamba2Cache, mask: Tensor | None, rows: int, length: int) -> Tensor | None:
    """Check that a call fits the cache it continues. Returns the mask that the model needs: that of the first call."""
    if not isinstance(cache, Zamba2Cache):
        raise ValueError(f"past_key_values is a {type(cache).__name__}; pass None, or what an earlier call returned")
    if cache.batch_size not in (-1, rows):
        raise ValueError(
            f"past_key_values holds {cache.batch_size} sequences and the call {rows}; its batch_repeat_interleave or "
            f"batch_select_indices adapts it"
        )
    past = cache.get_seq_length()
    if mask is None:
        return None
    if mask.shape[1] != past + length and not (past and mask.shape[1] == length):
        raise ValueError(f"attention_mask has {mask.shape[1]} columns; {past} for past_key_values and {length} for this call are needed")
    if past and not bool(mask[:, -length - 1 :].all()):
        raise ValueError("attention_mask has zeros at the end of past_key_values or behind it; pad on the left, in the first call")
    return None if past else mask


class NamedConfig(Zamba2Config):
    """A Zamba2Config as AutoConfig reads it, whose architecture is ours by name.

    trl looks for that name in transformers, which has a class of the same one, and asks AutoModelForCausalLM for any other: so a
    trainer's reference model, and a model given to a trainer by name, are ours too.
    """

    auto_map: ClassVar[dict[str, str]] = {}  # no code comes with a checkpoint; trl wants to read so

    def __post_init__(self, **options: Any) -> None:
        super().__post_init__(**options)
        ours = {Zamba2ForCausalLM.__name__: f"{__name__}.{Zamba2ForCausalLM.__name__}"}
        self.architectures = [ours.get(name, name) for name in self.architectures or ()]  # type: ignore[has-type]

    def to_dict(self) -> dict[str, Any]:
        """What a config.json holds: the architecture's name as others know it."""
        fields: dict[str, Any] = super().to_dict()
        return fields | {"architectures": [name.rpartition(".")[2] for name in self.architectures or ()]}


NamedConfig.__name__ = Zamba2Config.__name__  # by which transformers finds the other Auto classes of a config
AutoConfig.register("zamba2", NamedConfig, exist_ok=True)
for kind in (Zamba2Config, NamedConfig):
    AutoModelForCausalLM.register(kind, Zamba2ForCausalLM, exist_ok=True)
