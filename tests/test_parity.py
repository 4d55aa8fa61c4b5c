"""The model against transformers 5.23.0, and checkpoints in every layout that circulates.

transformers floors dt at time_step_min in prefill alone. The models never had a floor: it is taken out of
transformers' mixers here (``hub_model``), and ``test_the_floor_of_transformers`` shows what it does. transformers has lost the
NTK rescaling of the long context: its rope_theta is set to the rescaled base instead.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from native_cases import ISAS, error
from native_cases import logits_of as native_logits
from op_cases import MODEL, logits_error, relative_error
from safetensors.torch import load_file, save_file
from strategies import MINIATURES, miniature, random_model, random_tokens
from torch import Tensor

from zamba2.config import PRESETS, Config
from zamba2.errors import Zamba2Error
from zamba2.model.model import Zamba2
from zamba2.runtime.native import NativeBackend
from zamba2.weights import packed
from zamba2.weights.checkpoint import load_model, read_config, save_checkpoint
from zamba2.weights.formats import FORMATS
from zamba2.weights.names import hub_names, standalone_names

transformers = pytest.importorskip("transformers", minversion="5.23.0")

FP32 = torch.float32
# The published sizes in little, then what each switch and each odd size does alone and together.
CONFIGS = {
    **MINIATURES,
    "1.2b-two-blocks": miniature(num_mem_blocks=2, use_shared_attention_adapter=True, use_mem_rope=True, rope_theta=500.0),
    "1.2b-no-rope": miniature(num_mem_blocks=1, use_shared_attention_adapter=True, mamba_ngroups=3),
    "1.2b-long": miniature(num_mem_blocks=1, use_shared_attention_adapter=True, use_mem_rope=True, use_long_context=True),
    "2.7b-one-block": miniature(num_mem_blocks=1, hybrid_layer_ids=(0, 1, 2, 3, 4), chunk_size=100),
    "2.7b-three-blocks": miniature(num_mem_blocks=3, hybrid_layer_ids=(0, 1, 3, 5, 6), num_hidden_layers=7),
    "7b-one-block": miniature(num_mem_blocks=1, mamba_ngroups=2, use_mem_rope=True, adapter_rank=1),
    "7b-grouped-keys": miniature(mamba_ngroups=2, use_mem_rope=True, num_key_value_heads=2),
    "grouped-keys": miniature(num_key_value_heads=1, hidden_size=30, n_mamba_heads=5, num_attention_heads=6),
    "untied": miniature(tie_word_embeddings=False, vocab_size=33, mamba_ngroups=6),
    "odd": miniature(
        hidden_size=15, n_mamba_heads=3, num_attention_heads=3, mamba_d_state=7, intermediate_size=13, chunk_size=37, rms_norm_eps=1e-3
    ),
    "wide": miniature(mamba_expand=3, n_mamba_heads=8, mamba_d_conv=3, hidden_size=16, mamba_ngroups=4, mamba_d_state=20),
    "one-layer": miniature(num_hidden_layers=1, hybrid_layer_ids=(0,), num_mem_blocks=1, mamba_d_conv=2),
    "no-hybrid": miniature(hybrid_layer_ids=(), num_mem_blocks=1, num_hidden_layers=2),
}
every_config = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """transformers logs and draws progress bars: not here."""
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(verbosity)


def without_floor(model: Any) -> Any:
    """Takes transformers' floor of dt out of every mixer; the original fork's limits are (0, inf)."""
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    return model


def hub_model(config: Config, seed: int, *, floor: bool = False) -> Any:
    """transformers' model with the weights of ``random_model(config, seed)``."""
    settings = transformers.Zamba2Config(**(config.to_dict() | {"rope_theta": config.rope_base, "use_long_context": False}))
    model = transformers.Zamba2ForCausalLM(settings).eval()
    model.model.embed_tokens.padding_idx = None  # or its pad token would learn nothing
    own, theirs = random_model(config, seed).state_dict(), dict(model.named_parameters(remove_duplicate=False))
    used = set()
    with torch.no_grad():
        for name, stored in hub_names(config).items():
            for parameter in (theirs[other] for other in stored):
                parameter.copy_(own[name])
                used.add(parameter)
    assert used == set(model.parameters()), "names do not cover transformers' parameters"
    return model if floor else without_floor(model)


def both(config: Config, seed: int, folder: Path) -> tuple[Any, Zamba2]:
    """transformers' model, and ours read by our loader from what transformers' save_pretrained wrote."""
    theirs = hub_model(config, seed)
    theirs.save_pretrained(folder)
    loaded = load_model(folder)
    if config.use_long_context:  # transformers has no such model; its stored config carries the rescaled base
        loaded = load_model(folder, config=config)
    return theirs, loaded


def close(found: Tensor, expected: Tensor, what: str = "logits") -> None:
    error, bound = logits_error(found, expected), MODEL[FP32].output
    assert error <= bound, f"{what}: {error:.2e} of the largest logit, at most {bound:.0e} is allowed"


@every_config
@torch.no_grad()
def test_prompt(name: str, tmp_path: Path) -> None:
    """Logits at every position of a prompt of 719 tokens are those of transformers."""
    theirs, ours = both(CONFIGS[name], 1, tmp_path)
    tokens = random_tokens(ours.config, 1, 1, 719)
    expected = theirs(tokens, use_cache=False).logits
    close(ours(tokens), expected)
    assert float(expected.std(dim=1).mean()) > 0.5, "logits that hardly move would agree by themselves"


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "no-hybrid"])  # its cache wants an attention layer
@torch.no_grad()
def test_cached_decoding(name: str, tmp_path: Path) -> None:
    """After a prompt longer than a chunk, token by token with transformers' DynamicCache beside our state."""
    theirs, ours = both(CONFIGS[name], 2, tmp_path)
    tokens = random_tokens(ours.config, 2, 2, 280)
    cache, state = transformers.DynamicCache(config=theirs.config), ours.new_state()
    prompt, rest = tokens[:, :261], tokens[:, 261:]
    close(ours(prompt, state=state), theirs(prompt, past_key_values=cache, use_cache=True).logits, "prompt")
    for token in rest.split(1, dim=1):
        expected = theirs(token, past_key_values=cache, use_cache=True).logits
        close(ours(token, state=state), expected, f"token {state.position}")


@pytest.mark.parametrize("name", ["1.2b", "2.7b", "7b", "grouped-keys", "untied"])
@torch.no_grad()
def test_native_engine_in_bf16(name: str, tmp_path: Path) -> None:
    """With bf16 weights the native engine is at most 1.5 times as far from fp32 as transformers is in bf16: norms of the errors
    of all logits, of a prompt of 300 tokens in one call and of 60 tokens read one by one."""
    hub_model(CONFIGS[name], 4).bfloat16().save_pretrained(tmp_path / "hub")
    theirs = without_floor(transformers.Zamba2ForCausalLM.from_pretrained(tmp_path / "hub", dtype=torch.bfloat16).eval())
    truth = load_model(tmp_path / "hub", dtype=FP32)
    packed.quantize(tmp_path / "hub", tmp_path / "packed", FORMATS["bf16"])
    tokens = random_tokens(truth.config, 4, 1, 300)
    expected, cache = truth(tokens)[0], transformers.DynamicCache(config=theirs.config)
    steps = [theirs(token, past_key_values=cache, use_cache=True).logits[0] for token in tokens[:, :60].split(1, dim=1)]
    in_one_call = 1.5 * relative_error(theirs(tokens).logits[0], expected)
    one_by_one = 1.5 * relative_error(torch.cat(steps), expected[:60])
    for isa in ISAS:
        backend = NativeBackend(tmp_path / "packed", truth.config, threads=1, isa=isa)
        state = backend.new_state()
        decoded = np.concatenate([native_logits(backend, [int(token)], state) for token in tokens[0, :60]])
        assert error(native_logits(backend, tokens[0].numpy()), expected) <= in_one_call
        assert error(decoded, expected[:60]) <= one_by_one


@pytest.mark.parametrize("name", ["1.2b", "2.7b", "7b", "odd", "grouped-keys"])
@torch.no_grad()
def test_left_padding(name: str, tmp_path: Path) -> None:
    """A left-padded batch, and what is decoded after it, is transformers' with the same mask."""
    theirs, ours = both(CONFIGS[name], 3, tmp_path)
    tokens, mask = random_tokens(ours.config, 3, 3, 300), torch.ones(3, 300, dtype=torch.long)
    mask[0, :5], mask[1, :270] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, state = transformers.DynamicCache(config=theirs.config), ours.new_state()
    expected = theirs(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).logits
    found = ours(tokens, attention_mask=mask, state=state)
    for row, padding in enumerate((5, 270, 0)):
        close(found[row, padding:], expected[row, padding:], f"row {row}")
    for step in range(3):
        token = random_tokens(ours.config, 4 + step, 3, 1)
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
        positions = positions[:, -1:] + 1
        expected = theirs(token, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).logits
        close(ours(token, state=state), expected, f"step {step}")


@every_config
def test_gradients(name: str, tmp_path: Path) -> None:
    """The gradient of every parameter, over several chunks, is transformers'."""
    config = replace(CONFIGS[name], chunk_size=min(CONFIGS[name].chunk_size, 64))
    theirs, ours = both(config, 4, tmp_path)
    ours.requires_grad_(True)
    tokens = random_tokens(config, 4, 2, 270)
    for logits in (ours(tokens), theirs(tokens, use_cache=False).logits):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    expected = dict(theirs.named_parameters(remove_duplicate=False))
    stored = hub_names(config)
    for parameter_name, parameter in ours.named_parameters():
        copies = {expected[other] for other in stored[parameter_name]}  # one, or several where transformers ties nothing
        gradient = torch.stack([copy.grad for copy in copies if copy.grad is not None]).sum(0)
        error, bound = relative_error(parameter.grad, gradient), MODEL[FP32].gradient
        assert gradient.norm() > 0, f"{parameter_name} has no gradient"
        assert error <= bound, f"gradient of {parameter_name}: relative error {error:.2e}, at most {bound:.0e} is allowed"


@torch.no_grad()
def test_the_floor_of_transformers(tmp_path: Path) -> None:
    """With small dt, transformers' prefill and decoding disagree; ours agree with each other and with its decoding."""
    theirs, weights = hub_model(MINIATURES["2.7b"], 5, floor=True), random_model(MINIATURES["2.7b"], 5)
    for model in (theirs, weights):
        for name, parameter in model.named_parameters():
            if name.endswith("dt_bias"):
                parameter.fill_(math.log(math.expm1(1e-5)))
            elif name.endswith("in_proj.weight"):
                parameter[-MINIATURES["2.7b"].n_mamba_heads :] = 0  # dt is softplus(dt_bias) alone
            elif name.endswith(("mamba.D", ".linear.weight")):
                parameter.zero_()  # the state is all there is to see
    save_checkpoint(weights, tmp_path / "checkpoint")
    ours = load_model(tmp_path / "checkpoint")
    tokens = random_tokens(ours.config, 5, 1, 40)
    cache, state = transformers.DynamicCache(config=theirs.config), ours.new_state()
    prefilled = theirs(tokens, use_cache=False).logits
    decoded = [theirs(token, past_key_values=cache, use_cache=True).logits for token in tokens.split(1, dim=1)]
    steps = torch.cat([ours(token, state=state) for token in tokens.split(1, dim=1)], dim=1)
    close(ours(tokens), steps, "our prefill and decoding")
    assert logits_error(torch.cat(decoded, dim=1), prefilled) > 100 * MODEL[FP32].output, "transformers has lost its floor"
    assert logits_error(ours(tokens), prefilled) > 100 * MODEL[FP32].output
    close(ours(tokens), without_floor(theirs)(tokens, use_cache=False).logits, "without the floor")


@torch.no_grad()
def test_ntk_base() -> None:
    """use_long_context rescales theta as the original fork does, and the rescaling is audible."""
    config = MINIATURES["7b-long"]
    d = config.attention_head_dim
    assert config.rope_base == pytest.approx(1e4 * 8 ** (d / (d - 2)))
    tokens = random_tokens(config, 0, 1, 300)
    plain = random_model(replace(config, use_long_context=False), 0)
    assert logits_error(random_model(config, 0)(tokens), plain(tokens)) > 10 * MODEL[FP32].output


# ---- checkpoints ----------------------------------------------------------------------------------------------------------


def logits_of(model: Zamba2, seed: int = 0) -> Tensor:
    with torch.no_grad():
        return model(random_tokens(model.config, seed, 1, 20))


@every_config
@torch.no_grad()
def test_transformers_reads_ours(name: str, tmp_path: Path) -> None:
    """save_checkpoint -> transformers gives equal logits with nothing missing or left over; -> load_model, equal bits."""
    config = replace(CONFIGS[name], use_long_context=False, eos_token_id=(2, 3))
    model = random_model(config, 6)
    save_checkpoint(model, tmp_path / "saved", max_shard_bytes=20_000)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    again = load_model(tmp_path / "saved")
    assert again.config == config
    assert torch.equal(logits_of(again), logits_of(model))
    theirs, info = transformers.Zamba2ForCausalLM.from_pretrained(tmp_path / "saved", dtype=FP32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tokens = random_tokens(config, 6, 1, 270)
    close(model(tokens), without_floor(theirs).eval()(tokens, use_cache=False).logits)


@pytest.mark.parametrize("name", ["1.2b", "2.7b", "untied"])
def test_sharded_by_transformers(name: str, tmp_path: Path) -> None:
    """transformers' own shards and index are read."""
    theirs = hub_model(CONFIGS[name], 7)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits_of(load_model(tmp_path)), logits_of(random_model(CONFIGS[name], 7)))


def rewritten(folder: Path, change: Any) -> None:
    """Applies ``change`` to the dict of tensors of a folder's model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")


def shared_copies(config: Config, tensors: dict[str, Tensor], *, keep_first: bool) -> None:
    """Copies each shared tensor under every layer that uses its block, or moves it under the last one."""
    for stored in hub_names(config).values():
        tensor = tensors[stored[0]]
        tensors |= dict.fromkeys(stored if keep_first else stored[-1:], tensor)
        if not keep_first and len(stored) > 1:
            del tensors[stored[0]]


@pytest.mark.parametrize("name", ["1.2b", "2.7b", "2.7b-three-blocks", "7b"])
@pytest.mark.parametrize("keep_first", [True, False], ids=["duplicates", "under the last layer"])
def test_shared_blocks_elsewhere(name: str, keep_first: bool, tmp_path: Path) -> None:
    """A shared block may stand under every hybrid layer that uses it, or under a later one alone, and its head may be stored."""
    model = random_model(CONFIGS[name], 8)
    save_checkpoint(model, tmp_path / "m")

    def change(tensors: dict[str, Tensor]) -> None:
        shared_copies(model.config, tensors, keep_first=keep_first)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.rotary_emb.inv_freq"] = torch.ones(3)

    rewritten(tmp_path / "m", change)
    assert torch.equal(logits_of(load_model(tmp_path / "m")), logits_of(model))


def interleaved(config: Config, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """linear_qkv: per group of heads, its rows of q, of k and of v; written here one head at a time."""
    d, groups = config.attention_head_dim, config.num_key_value_heads
    per_group = config.num_attention_heads // groups
    rows = []
    for group in range(groups):
        for head in range(per_group):
            start = (group * per_group + head) * d
            rows.append(q[start : start + d])
        rows += [k[group * d : (group + 1) * d], v[group * d : (group + 1) * d]]
    return torch.cat(rows)


def standalone_tensors(model: Zamba2) -> dict[str, Tensor]:
    """The model in the standalone layout, with the adapters that a block never uses, as the original files have them."""
    config, own = model.config, model.state_dict()
    tensors = {stored: own[name].clone() for name, (stored, part) in standalone_names(config).items() if part is None}
    for b in range(config.num_shared_blocks):
        attention = f"shared_blocks.{b}.self_attn"
        qkv = interleaved(config, *(own[f"{attention}.{p}_proj.weight"] for p in "qkv"))
        tensors[f"decoder.blocks.{b}.sa.mixer.linear_qkv.weight"] = qkv
        for j in range(len(config.hybrid_layer_ids)):
            for letter in "AB":
                name = f"decoder.blocks.{{}}.mlp.mixer.linear_fc1_lora_{letter}_list.{j}.weight"
                used = tensors[name.format(j % config.num_mem_blocks)]
                tensors.setdefault(name.format(b), torch.full_like(used, 1e6))
    return tensors


@pytest.mark.parametrize("name", ["1.2b", "2.7b", "2.7b-three-blocks", "7b", "7b-grouped-keys", "odd"])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "under model"])
def test_standalone_file(name: str, nested: bool, tmp_path: Path) -> None:
    """A .pt file in the standalone layout with config.json beside it gives the same bits."""
    model = random_model(CONFIGS[name], 9)
    tensors = standalone_tensors(model)
    torch.save({"model": tensors} if nested else tensors, tmp_path / "model.pt")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    loaded = load_model(tmp_path / "model.pt")
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert load_model(tmp_path / "model.pt", dtype=torch.bfloat16).embed_tokens.weight.dtype == torch.bfloat16


def test_standalone_file_without_config(tmp_path: Path) -> None:
    """Without config.json beside it a .pt file is recognized by its shapes, or refused."""
    config = PRESETS["1.2b"]
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Zamba2(config).named_parameters()}
    tensors = {stored: torch.zeros(1).expand(shapes[name]) for name, (stored, part) in standalone_names(config).items() if part is None}
    torch.save(tensors, tmp_path / "model.pt")  # expanded zeros: four bytes each
    assert read_config(tmp_path / "model.pt") == config
    torch.save(standalone_tensors(random_model(MINIATURES["2.7b"], 0)), tmp_path / "other.pt")
    with pytest.raises(Zamba2Error, match=r"none of the published shapes.*config\.json"):
        load_model(tmp_path / "other.pt")


def test_the_hubs_layout_in_a_pytorch_file_is_named(tmp_path: Path) -> None:
    """What transformers wrote as pytorch_model.bin is no standalone checkpoint, and the error says what it is."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["2.7b"].to_dict()))
    torch.save({"model.embed_tokens.weight": torch.zeros(4, 4)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Zamba2Error, match=r"has the Hub's layout, which is read from safetensors alone"):
        load_model(tmp_path / "pytorch_model.bin")


def test_untied_standalone_file_is_refused(tmp_path: Path) -> None:
    """The standalone layout has no head of its own; a config that wants one is refused, not filled with nothing."""
    model = random_model(CONFIGS["2.7b"], 9)
    torch.save(standalone_tensors(model), tmp_path / "model.pt")
    with pytest.raises(Zamba2Error, match=r"lm_head\.weight"):
        load_model(tmp_path / "model.pt", config=replace(model.config, tie_word_embeddings=False))


def test_file_that_runs_code_is_refused(tmp_path: Path) -> None:
    """A .pt file is read as plain tensors or not at all."""
    import pickle

    class Attack:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "attacked",))

    for number, content in enumerate((pickle.dumps(Attack()), b"", b"PK\x03\x04 cut")):
        path = tmp_path / f"{number}.pt"
        path.write_bytes(content)
        with pytest.raises(Zamba2Error, match="plain tensors"):
            load_model(path, config=MINIATURES["2.7b"])
    torch.save({"weights": Attack()}, tmp_path / "zip.pt")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    for name in ("zip.pt", "list.pt"):
        with pytest.raises(Zamba2Error):
            load_model(tmp_path / name, config=MINIATURES["2.7b"])
    assert not (tmp_path / "attacked").exists()


def test_dtypes(tmp_path: Path) -> None:
    """bf16 halves the large weights alone: what exponents and norms depend on stays fp32, whatever the file's dtype."""
    config = MINIATURES["1.2b"]
    save_checkpoint(random_model(config, 10).bfloat16(), tmp_path / "bf16")
    model = load_model(tmp_path / "bf16")
    for name, parameter in model.named_parameters():
        small = parameter.dim() == 1 or "conv1d" in name
        assert parameter.dtype == (FP32 if small else torch.bfloat16), name
        assert not parameter.requires_grad
    upcast = load_model(tmp_path / "bf16", dtype=FP32)
    assert {p.dtype for p in upcast.parameters()} == {FP32}
    rounded = random_model(config, 10).bfloat16().float()
    assert torch.equal(logits_of(upcast), logits_of(rounded))
    coarse = logits_of(model)
    assert coarse.dtype == torch.bfloat16
    assert relative_error(coarse, logits_of(upcast)) < 0.1  # sane; the format's own error is measured elsewhere
    save_checkpoint(model.bfloat16(), tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "bf16" / "model.safetensors").read_bytes()


def test_saving_keeps_every_bit(tmp_path: Path) -> None:
    """Each tensor is written as it is, so that a bf16 model's fp32 parts come back whole."""
    save_checkpoint(random_model(MINIATURES["1.2b"], 10), tmp_path / "fp32")
    model = load_model(tmp_path / "fp32", dtype=torch.bfloat16)
    save_checkpoint(model, tmp_path / "mixed")
    again = load_model(tmp_path / "mixed")
    for (name, parameter), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert parameter.dtype == other.dtype, name
        assert torch.equal(parameter, other), name


def test_training_never_writes_the_file(tmp_path: Path) -> None:
    """Loaded weights are mapped; changing them changes the model and not the checkpoint."""
    save_checkpoint(random_model(MINIATURES["2.7b"], 0), tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    model = load_model(tmp_path / "m")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert torch.equal(logits_of(load_model(tmp_path / "m")), logits_of(random_model(MINIATURES["2.7b"], 0)))


def without(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: Tensor) -> Any:
    return lambda tensors: tensors.__setitem__(name, tensor)


EMBEDDING = "model.embed_tokens.weight"
MIXER = "model.layers.0.mamba.A_log"
SHARED = "model.layers.1.shared_transformer.self_attn.q_proj.weight"
LATER = "model.layers.4.shared_transformer.self_attn.q_proj.weight"  # the third hybrid layer uses the first block again
BROKEN = {
    "missing": (without(MIXER), MIXER),
    "shared missing": (without(SHARED), r"q_proj\.weight \(or under another layer.*2 in all"),
    "shape": (put(MIXER, torch.ones(5)), r"A_log has shape \[5\]; the config needs \[6\]"),
    "integers": (put(MIXER, torch.ones(6, dtype=torch.int64)), "A_log has dtype I64"),
    "left over": (put("model.layers.0.bias", torch.ones(3)), r"model\.layers\.0\.bias"),
    "copies differ": (put(LATER, torch.ones(48, 48)), "q_proj.*differ"),
    "head differs": (put("lm_head.weight", torch.ones(61, 24)), r"lm_head\.weight.*differ"),
    "old layout": (put("model.blocks.0.weight", torch.ones(1)), "old Zamba2 layout"),
    "standalone layout": (put("decoder.final_layernorm.weight", torch.ones(24)), "standalone layout"),
}


@pytest.mark.parametrize("why", BROKEN)
def test_broken_checkpoint_is_one_sentence(why: str, tmp_path: Path) -> None:
    """A missing, misshapen, unexpected or contradictory tensor is named in one sentence with the folder."""
    change, words = BROKEN[why]
    save_checkpoint(random_model(MINIATURES["2.7b"], 0), tmp_path / "m")
    rewritten(tmp_path / "m", change)
    with pytest.raises(Zamba2Error, match=words) as caught:
        load_model(tmp_path / "m")
    assert str(tmp_path / "m") in str(caught.value)
    assert "\n" not in str(caught.value)


SHARDS = ["../secret.safetensors", "/etc/passwd", "", 7, "missing.safetensors", "model-00001-of-00002.safetensors"]


@pytest.mark.parametrize("shard", SHARDS)
def test_broken_index_is_one_sentence(shard: object, tmp_path: Path) -> None:
    """An index that leads out of the folder, to a missing shard or to one without the tensor is refused."""
    folder = tmp_path / "m"
    save_checkpoint(random_model(MINIATURES["2.7b"], 0), folder, max_shard_bytes=60_000)
    files = sorted(folder.glob("*.safetensors"))
    shutil.move(files[0], folder / "model-00001-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"] = {k: "model-00001-of-00002.safetensors" if v == files[0].name else v for k, v in data["weight_map"].items()}
    data["weight_map"][list(data["weight_map"])[-1]] = shard
    index.write_text(json.dumps(data))
    with pytest.raises(Zamba2Error) as caught:
        load_model(folder)
    assert ("a plain file name" in str(caught.value)) == (shard in SHARDS[:4])
    assert "\n" not in str(caught.value)


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in use is never written to, and a writer that fails leaves nothing behind."""
    model = random_model(MINIATURES["2.7b"], 0)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("keep")
    with pytest.raises(Zamba2Error, match="not an empty folder"):
        save_checkpoint(model, tmp_path / "used")
    broken = model.state_dict() | {"final_layernorm.weight": None}
    with pytest.raises((AttributeError, TypeError)):
        save_checkpoint(model, tmp_path / "half", state_dict=broken)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["used"]
