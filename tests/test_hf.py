"""Our model behind transformers' interface, against transformers' own Zamba2 on small random fp32 checkpoints.

transformers floors dt at 0.001 in prefill; dt_bias is drawn so that no dt comes near it.
"""

from __future__ import annotations

import copy
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    StoppingCriteria,
    TextStreamer,
    Zamba2Config,
)  # fmt: skip
from transformers.models.zamba2.modeling_zamba2 import Zamba2ForCausalLM as Theirs

import zamba2.hf
from zamba2.errors import Zamba2Error
from zamba2.hf import Zamba2Cache, Zamba2ForCausalLM
from zamba2.language.messages import CHATML
from zamba2.weights.hub import RANDOM
from zamba2.weights.names import hub_names

SHARED = Path(__file__).resolve().parents[2] / "shared"
CARD = SHARED / "docs" / "model-card.md"
TOKENIZER = SHARED / "data" / "tokenizer" / "mistral_v1_tokenizer.json"
CLOSE: dict[str, float] = {"rtol": 2e-4, "atol": 2e-4}


def make_checkpoint(folder: Path, *, seed: int = 0, eos: int | list[int] = 2, **options: Any) -> Path:
    """A small random checkpoint with two shared blocks, written by transformers."""
    shape: dict[str, Any] = dict(
        vocab_size=256, hidden_size=64, num_hidden_layers=7, n_mamba_heads=4, mamba_d_state=16, num_attention_heads=4, num_mem_blocks=2,
        intermediate_size=128, adapter_rank=8, chunk_size=32, initializer_range=0.1,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid", "mamba", "hybrid", "mamba"],
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Theirs(Zamba2Config(**(shape | options)))
    blocks = [layer.shared_transformer for layer in model.model.layers if hasattr(layer, "shared_transformer")]
    for number, block in enumerate(blocks):  # tie_word_embeddings=False unties them too in transformers
        block.load_state_dict(blocks[number % model.config.num_mem_blocks].state_dict())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("dt_bias"):
                parameter.uniform_(-3, 1)
            elif name.endswith((".D", "mamba.norm.weight", "conv1d.bias")):
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=eos, pad_token_id=0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return Theirs.from_pretrained(folder)


@pytest.fixture(scope="module")
def ours(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    """Random ids that are no special token."""
    return torch.randint(3, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(*lengths: int) -> dict[str, Tensor]:
    """A left-padded batch."""
    ids = tokens(len(lengths), max(lengths))
    mask = torch.stack([(torch.arange(max(lengths)) >= max(lengths) - length).long() for length in lengths])
    return {"input_ids": ids * mask, "attention_mask": mask}


# ---- the card --------------------------------------------------------------------------------------------------------


def test_card_quick_start(tmp_path: Path) -> None:
    """The card's quick-start code runs verbatim on our model; in fp32 its tokens are those of transformers' own model."""
    if not CARD.is_file() or not TOKENIZER.is_file():
        pytest.skip(f"needs {CARD} and {TOKENIZER}")
    folder = make_checkpoint(tmp_path / "model", vocab_size=32000)
    text = TOKENIZER.read_text(encoding="utf-8").replace('"<s>"', '"<|im_start|>"').replace('"</s>"', '"<|im_end|>"')
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"chat_template": CHATML}), encoding="utf-8")
    found = re.search(r"```python\n(.*?)```", CARD.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    code = found[1].replace("Zyphra/Zamba2-2.7B-instruct", str(folder)).replace('"cuda"', '"cpu"')
    assert str(folder) in code and "torch.bfloat16" in code and "cuda" not in code
    report = tmp_path / "report.json"
    script = f"""
import json, zamba2.hf
code, found = {code!r}, []
for dtype in ("bfloat16", "float32"):
    scope = {{}}
    exec(code.replace("torch.bfloat16", "torch." + dtype), scope)
    model, sample = scope["model"], scope["input_ids"]["input_ids"]
    found.append((type(model).__module__, str(model.dtype), scope["chat_sample"], sample.tolist(), scope["outputs"].tolist()))
json.dump(found, open({str(report)!r}, "w"))
"""
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for dtype, (module, used, chat, prompt, output) in zip(("bfloat16", "float32"), json.loads(report.read_text()), strict=True):
        assert module == "zamba2.hf" and used == f"torch.{dtype}"
        assert chat.startswith("<|im_start|>user\nIn one season") and chat.count("<|im_end|>") == 3
        assert output[0][: len(prompt[0])] == prompt[0] and len(prompt[0]) < len(output[0]) <= len(prompt[0]) + 150
        assert prompt[0].count(1) == prompt[0].count(2) == 3  # the marks became single tokens
    assert done.stdout.count("How many times do the two flowers blossom") == 2
    expected = Theirs.from_pretrained(folder).generate(torch.tensor(prompt), max_new_tokens=150, do_sample=False)
    assert output == expected.tolist()


def test_short_names_and_import_registers(ours: Any) -> None:
    """Importing zamba2.hf is enough for the Auto class; ``from_pretrained`` of our class also knows short names."""
    assert type(ours) is Zamba2ForCausalLM and not ours.training
    model = Zamba2ForCausalLM.from_pretrained("random")
    tokenizer = AutoTokenizer.from_pretrained(Path(zamba2.hf.__file__).parent / "random")
    out = model.generate(**tokenizer("hello", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert out.shape[1] <= 7


def test_import_without_transformers_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without transformers the import is one sentence that says what to install, and for which Python where this one is too old."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"^zamba2.hf needs torch and transformers .*; install with `pip install 'zamba2\[hf\]'`\.$"):
        importlib.reload(zamba2.hf)
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    with pytest.raises(ImportError, match=r"; take Python 3.11 or newer \(this is 3.10\), and there `pip install 'zamba2\[hf\]'`\.$"):
        importlib.reload(zamba2.hf)


def test_other_auto_classes_stay_transformers(tmp_path: Path, folder: Path, theirs: Any) -> None:
    """Importing zamba2.hf leaves transformers' other Zamba2 classes where they were, and what is saved names the architecture as the Hub
    does, whichever config a model was made with."""
    config = AutoConfig.from_pretrained(folder)
    other = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(other).__module__.startswith("transformers.") and type(AutoModelForCausalLM.from_config(config)) is Zamba2ForCausalLM
    for model in (other, AutoModelForCausalLM.from_pretrained(folder, config=config), Theirs.from_pretrained(folder, config=config)):
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(model).__name__]
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Zamba2ForCausalLM"]
    assert type(theirs.config) is Zamba2Config and AutoConfig.from_pretrained(folder).to_dict() == config.to_dict()


# ---- forward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_mem_blocks": 1, "use_shared_attention_adapter": True, "use_mem_rope": True},
        {"mamba_ngroups": 2, "use_mem_rope": True, "num_key_value_heads": 2},
        {"tie_word_embeddings": False},
    ],
    ids=["2.7b", "1.2b", "7b", "untied"],
)
def test_logits_equal_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    """Every published kind of model gives transformers' logits, beyond one chunk, with and without left padding."""
    folder = make_checkpoint(tmp_path / "model", **options)
    theirs, ours = Theirs.from_pretrained(folder), Zamba2ForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        ids = tokens(2, 70)
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, **CLOSE)
        batch = padded(50, 21)
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(ours(**batch).logits[real], theirs(**batch).logits[real], **CLOSE)


def test_forward_arguments(ours: Any, theirs: Any) -> None:
    """logits_to_keep, inputs_embeds, return_dict and use_cache mean what they mean in transformers."""
    ids = tokens(2, 9)
    with torch.no_grad():
        full = ours(ids, use_cache=False)
        assert full.past_key_values is None and full.loss is None
        torch.testing.assert_close(ours(ids, logits_to_keep=2).logits, full.logits[:, -2:])
        torch.testing.assert_close(ours(ids, logits_to_keep=torch.tensor([0, 4])).logits, full.logits[:, [0, 4]])
        torch.testing.assert_close(ours(inputs_embeds=ours.get_input_embeddings()(ids)).logits, full.logits)
        first = ours(ids[:, :4])
        assert first.past_key_values.get_seq_length() == 4
        rest = ours(ids[:, 4:], past_key_values=first.past_key_values, return_dict=False)
        assert isinstance(rest, tuple) and rest[1] is first.past_key_values
        torch.testing.assert_close(rest[0], full.logits[:, 4:], **CLOSE)


def test_hidden_states_are_the_decoders(ours: Any, theirs: Any) -> None:
    """``get_decoder`` is the model without its head, as in transformers."""
    ids = tokens(1, 12)
    with torch.no_grad():
        found, wanted = (model.get_decoder()(ids).last_hidden_state for model in (ours, theirs))
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_packed_rows_do_not_leak(ours: Any) -> None:
    """Documents of a row marked by position_ids (as trl does) or seq_idx score as they do alone, beside padding too."""
    one, two, three = tokens(1, 40, 2), tokens(1, 13, 3), tokens(1, 25, 4)
    ids = torch.cat([one, two, three], dim=1)
    positions = torch.cat([torch.arange(n) for n in (40, 13, 25)])[None]
    seq_idx = torch.repeat_interleave(torch.arange(3), torch.tensor([40, 13, 25]))[None]
    with torch.no_grad():
        alone = torch.cat([ours(x).logits for x in (one, two, three)], dim=1)
        torch.testing.assert_close(ours(ids, position_ids=positions).logits, alone, **CLOSE)
        torch.testing.assert_close(ours(ids, seq_idx=seq_idx).logits, alone, **CLOSE)
        both = ours(ids.expand(2, -1), position_ids=positions, cu_seq_lens_q=torch.tensor([0, 40, 53, 78]))
        torch.testing.assert_close(both.logits, alone.expand(2, -1, -1), **CLOSE)
        assert both.past_key_values is None
        for left, right in ((6, 0), (0, 6), (3, 2)):
            wide, where, mask = (torch.nn.functional.pad(x, (left, right)) for x in (ids, positions, torch.ones_like(ids)))
            found = ours(wide, position_ids=where, attention_mask=mask).logits[:, left : left + 78]
            torch.testing.assert_close(found, alone, **CLOSE)
        plain = ours(ids, position_ids=torch.arange(78)[None]).logits
        torch.testing.assert_close(plain, ours(ids).logits)
        assert not torch.allclose(plain, alone, **CLOSE)


# ---- generate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "use_cache": False},
        {"num_beams": 4, "do_sample": False},
        {"num_beams": 4, "do_sample": False, "num_return_sequences": 3, "use_cache": False},
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 2},
        {"do_sample": False, "repetition_penalty": 1.3, "min_new_tokens": 5, "no_repeat_ngram_size": 2},
    ],
    ids=["greedy", "no-cache", "beams", "beams-no-cache", "sampling", "beam-sampling", "processors"],
)
@pytest.mark.parametrize("batch", [{"input_ids": tokens(1, 300)}, padded(40, 7, 33)], ids=["long", "left-padded"])
def test_generate_equals_transformers(ours: Any, theirs: Any, batch: dict[str, Tensor], options: dict[str, Any]) -> None:
    """Every way to generate gives transformers' tokens, for prompts of many chunks and left-padded batches."""
    length = 4 if batch["input_ids"].shape[1] == 300 and not options.get("use_cache", True) else 12
    found = []
    for model in (ours, theirs):
        torch.manual_seed(7)
        found.append(model.generate(**batch, **options, max_new_tokens=length, return_dict_in_generate=True, output_scores=True))
    mine, other = found
    assert mine.sequences.tolist() == other.sequences.tolist()
    for a, b in zip(mine.scores, other.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    cached = options.get("use_cache", True)
    assert isinstance(mine.past_key_values, Zamba2Cache) if cached else mine.past_key_values is None


def test_generation_goes_on(ours: Any) -> None:
    """Going on from a returned cache, or from a deep copy of a prompt's, gives the tokens of one uninterrupted call."""
    ids = tokens(2, 20)
    whole = ours.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)
    part = ours.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    rest = ours.generate(part.sequences, past_key_values=part.past_key_values, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert rest.tolist() == whole.tolist()
    prompt = Zamba2Cache(ours.model.config)
    with torch.no_grad():
        ours(ids[:, :15], past_key_values=prompt)
    for _ in range(2):
        again = ours.generate(ids, past_key_values=copy.deepcopy(prompt), max_new_tokens=10, do_sample=False, eos_token_id=None)
        assert again.tolist() == whole.tolist()
    assert prompt.get_seq_length() == 15
    chunked = ours.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None, prefill_chunk_size=7)
    assert chunked.tolist() == whole.tolist()
    prompt.batch_repeat_interleave(2)
    beams = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "num_return_sequences": 2, "num_beams": 2}
    assert ours.generate(ids, past_key_values=prompt, **beams).tolist() == ours.generate(ids, **beams).tolist()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_generation_starts_from_embeddings(ours: Any, options: dict[str, Any]) -> None:
    """A prompt given to generate as embeddings is gone on with as its tokens are."""
    batch = padded(5, 9)
    wanted = ours.generate(**batch, max_new_tokens=6, do_sample=False, **options)
    embedded = {"inputs_embeds": ours.get_input_embeddings()(batch["input_ids"]), "attention_mask": batch["attention_mask"]}
    assert ours.generate(**embedded, max_new_tokens=6, do_sample=False, **options).tolist() == wanted[:, 9:].tolist()


def test_failed_call_leaves_the_cache(ours: Any) -> None:
    """A call that is interrupted inside the model leaves ``past_key_values`` as it was."""
    ids = tokens(1, 12)
    with torch.no_grad():
        full = ours(ids).logits[:, -1]
        cache = ours(ids[:, :8]).past_key_values
        layer = ours.model.layers[4]
        layer.forward = lambda *_: 1 / 0
        with pytest.raises(ZeroDivisionError):
            ours(ids[:, 8:], past_key_values=cache)
        del layer.forward
        assert cache.get_seq_length() == 8
        torch.testing.assert_close(ours(ids[:, 8:], past_key_values=cache).logits[:, -1], full, **CLOSE)


def test_stopping_and_streaming(tmp_path: Path) -> None:
    """Generation stops at every eos of generation_config and at stopping criteria; a streamer prints what is returned."""
    ids = tokens(1, 8)
    ours = Zamba2ForCausalLM.from_pretrained(make_checkpoint(tmp_path / "a"))
    free = ours.generate(ids, max_new_tokens=8, do_sample=False)[0, 8:].tolist()
    third = free[3]
    ours = Zamba2ForCausalLM.from_pretrained(make_checkpoint(tmp_path / "b", eos=[2, third]))
    stopped = ours.generate(ids, max_new_tokens=8, do_sample=False)[0, 8:].tolist()
    assert stopped == free[: free.index(third) + 1]

    class AfterTwo(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 10)

    assert ours.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, stopping_criteria=[AfterTwo()]).shape[1] == 10

    class Speller:
        def decode(self, ids: Any, **_: Any) -> str:
            return "".join(f"<{int(i)}>" for i in ids)

    printed = io.StringIO()
    with redirect_stdout(printed):
        ours.generate(ids, max_new_tokens=8, do_sample=False, streamer=TextStreamer(Speller(), skip_prompt=True))
    assert printed.getvalue().strip() == Speller().decode(stopped)


# ---- training --------------------------------------------------------------------------------------------------------


def gradients(model: Any) -> dict[str, Tensor]:
    """Gradients by the Hub's names."""
    found = {name: p.grad for name, p in model.named_parameters()}
    if isinstance(model, Zamba2ForCausalLM):
        return {stored[0]: found[f"model.{name}"] for name, stored in hub_names(model.model.config).items()}
    return found


def test_loss_only_is_the_loss(folder: Path) -> None:
    """loss_only gives the loss and the gradients of the whole head, without logits, and needs labels."""
    model = Zamba2ForCausalLM.from_pretrained(folder).train()
    batch = padded(40, 25)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, 30:33] = -100
    for count in (None, torch.tensor(50)):
        found = []
        for only in (False, True):
            model.zero_grad()
            out = model(**batch, labels=labels, num_items_in_batch=count, loss_only=only)
            out.loss.backward()
            found.append([out.loss, *(p.grad for p in model.parameters())])
            assert (out.logits is None) == only
        torch.testing.assert_close(found[1], found[0], **CLOSE)
    with pytest.raises(ValueError, match="without labels"):
        model(**batch, loss_only=True)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient-checkpointing"])
def test_training_step_equals_transformers(folder: Path, theirs: Any, checkpointing: bool) -> None:
    """Loss, gradients and the parameters after a step are transformers', for a padded batch with masked labels."""
    ours, theirs = Zamba2ForCausalLM.from_pretrained(folder).train(), copy.deepcopy(theirs).train()
    before = (folder / "model.safetensors").read_bytes()
    if checkpointing:
        ours.activation_checkpointing_enable()
        assert ours.is_activation_checkpointing
    batch = padded(40, 25)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, 30:33] = -100
    losses = [model(**batch, labels=labels, num_items_in_batch=torch.tensor(50)).loss for model in (ours, theirs)]
    torch.testing.assert_close(losses[0], losses[1], **CLOSE)
    for loss in losses:
        loss.backward()
    mine, other = gradients(ours), gradients(theirs)
    assert mine.keys() == other.keys()
    for name, gradient in other.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(mine[name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, name=name: f"{name}: {m}")
    for model in (ours, theirs):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    ids = tokens(1, 20)
    ours.eval(), theirs.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(ours(ids).logits, Zamba2ForCausalLM.from_pretrained(folder)(ids).logits, **CLOSE)
    assert (folder / "model.safetensors").read_bytes() == before  # weights are mapped from it, and never written back


def test_gradient_checkpointing_can_be_left(folder: Path) -> None:
    """Checkpointing goes off again, leaves generation and states alone, and refuses use_reentrant, which would lose gradients."""
    ours = Zamba2ForCausalLM.from_pretrained(folder)
    expected = ours.generate(tokens(1, 5), max_new_tokens=4, do_sample=False).tolist()
    ours.activation_checkpointing_enable(every_n_layers=2)
    assert [("forward" in layer.__dict__) for layer in ours.model.layers] == [True, False, True, False, True, False, True]
    assert ours.train().generate(tokens(1, 5), max_new_tokens=4, do_sample=False).tolist() == expected
    read = ours(tokens(1, 5), use_cache=True)
    read.logits.sum().backward()  # for which nothing may be read a second time
    assert read.past_key_values.get_seq_length() == 5
    with torch.no_grad():
        following, whole = ours(tokens(1, 6)[:, 5:], past_key_values=read.past_key_values), ours(tokens(1, 6))
    torch.testing.assert_close(following.logits[:, 0], whole.logits[:, 5], **CLOSE)
    ours.activation_checkpointing_disable()
    assert not ours.is_activation_checkpointing and not any("forward" in layer.__dict__ for layer in ours.model.layers)
    assert ours(tokens(1, 5)).past_key_values is None  # in training a state is made for those alone who ask for one
    assert ours(tokens(1, 5), use_cache=True).past_key_values.get_seq_length() == 5
    with pytest.raises(ValueError, match="use_reentrant"):
        ours.activation_checkpointing_enable({"use_reentrant": True})


def test_new_weights_like_transformers() -> None:
    """A model from a config alone has finite weights of transformers' distribution, and trains."""
    config = Zamba2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, n_mamba_heads=64, layers_block_type=["mamba", "hybrid"], num_attention_heads=2,
        mamba_d_state=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    assert type(model) is Zamba2ForCausalLM
    spread = {name: (float(p.detach().mean()), float(p.detach().std())) for name, p in model.named_parameters()}
    reference = {name: (float(p.detach().mean()), float(p.detach().std())) for name, p in Theirs(config).named_parameters()}
    for name, stored in hub_names(model.model.config).items():
        own, other = spread[f"model.{name}"], reference[stored[0]]
        assert own == pytest.approx(other, rel=0.3, abs=0.02), name
    loss = model(tokens(1, 8) % 64, labels=tokens(1, 8) % 64).loss
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


# ---- saving ----------------------------------------------------------------------------------------------------------


def test_saved_loads_in_both(tmp_path: Path, folder: Path, ours: Any) -> None:
    """What we save, whole or in shards, over an older save too, loads in transformers' class and in ours with equal logits."""
    ids, place = tokens(1, 12), tmp_path / "saved"
    with torch.no_grad():
        expected = ours(ids).logits
    (place / "checkpoint-1").mkdir(parents=True)  # as in a Trainer's output folder
    for size in ("50KB", "5GB", 60_000):
        ours.save_pretrained(place, max_shard_size=size)
        shards = list(place.glob("*.safetensors"))
        assert (len(shards) == 1) == (size == "5GB") and (place / "model.safetensors.index.json").exists() == (len(shards) > 1)
        again, other = Zamba2ForCausalLM.from_pretrained(place), Theirs.from_pretrained(place)
        with torch.no_grad():
            assert torch.equal(again(ids).logits, expected)
            torch.testing.assert_close(other(ids).logits, expected, **CLOSE)
        assert again.generation_config.eos_token_id == other.generation_config.eos_token_id == 2
        assert sorted(p.name for p in place.iterdir() if p.name.startswith(".")) == []
    again.save_pretrained(place)  # over the very files it is mapped from
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected)
        assert torch.equal(Zamba2ForCausalLM.from_pretrained(place)(ids).logits, expected)
    ours.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


def test_saved_state_dict_and_new_vocabulary(tmp_path: Path, folder: Path) -> None:
    """``state_dict=`` replaces the weights written; a resized vocabulary and new token ids are saved with the config."""
    ours = Zamba2ForCausalLM.from_pretrained(folder)
    doubled = {name: 2 * tensor for name, tensor in ours.state_dict().items()}
    ours.save_pretrained(tmp_path / "doubled", state_dict=doubled)
    for name, tensor in Zamba2ForCausalLM.from_pretrained(tmp_path / "doubled").state_dict().items():
        assert torch.equal(tensor, doubled[name])
    ours.resize_token_embeddings(260, mean_resizing=False)
    ours.config.pad_token_id = 259
    ours.save_pretrained(tmp_path / "resized")
    again, other = Zamba2ForCausalLM.from_pretrained(tmp_path / "resized"), Theirs.from_pretrained(tmp_path / "resized")
    assert again(torch.tensor([[259]])).logits.shape[-1] == 260 == other.config.vocab_size and again.config.pad_token_id == 259
    with pytest.raises(ValueError, match="the state dict to save has no"):
        ours.save_pretrained(tmp_path / "none", state_dict={})


def test_state_dict_names(folder: Path, theirs: Any, ours: Any) -> None:
    """Parameter names end in what peft targets; ``load_state_dict`` takes our names and the Hub's, strictly."""
    names = list(ours.state_dict())
    for target in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj", "in_proj", "out_proj", "linear"):
        assert any(name.endswith(f".{target}.weight") for name in names), target
    assert "model.shared_blocks.1.self_attn.q_proj.weight" in names
    for state in (ours.state_dict(), theirs.state_dict()):
        model = Zamba2ForCausalLM(ours.config)
        model.load_state_dict(state)
        assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_dtypes(tmp_path: Path, folder: Path, ours: Any) -> None:
    """dtype is by default the checkpoint's; a wanted one holds for the large weights, small ones stay fp32."""
    assert ours.dtype == ours.config.dtype == torch.float32
    anywhere = "cpu" if torch.cuda.is_available() else "auto"
    half = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16, device_map=anywhere)
    assert half.dtype == half.config.dtype == torch.bfloat16 and half.model.layers[0].mamba.A_log.dtype == torch.float32
    half.save_pretrained(tmp_path / "half")
    for dtype, expected in ((None, torch.bfloat16), ("auto", torch.bfloat16), ("float32", torch.float32)):
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=dtype, device_map={"": "cpu"}).dtype == expected
    assert Theirs.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"no_such_option": 1}, TypeError, "no_such_option"),
        ({"no_such_option": None}, TypeError, "no_such_option"),
        ({"quantization_config": {"load_in_4bit": True}}, ValueError, "quantization_config"),
        ({"device_map": {"model.layers.0": "cpu", "model.layers.1": 0}}, ValueError, "one"),
        ({"device_map": "nowhere"}, Zamba2Error, "nowhere"),
        ({"dtype": "bfloat17"}, ValueError, "bfloat17"),
        ({"attn_implementation": "flash_attention_2"}, ValueError, "Flash Attention"),
        ({"use_safetensors": False}, ValueError, "safetensors"),
    ],
)
def test_options_are_never_dropped(folder: Path, options: dict[str, Any], error: type[Exception], says: str) -> None:
    """``from_pretrained`` refuses what it does not do, by name."""
    with pytest.raises(error, match=says):
        Zamba2ForCausalLM.from_pretrained(folder, **options)


def test_config_keys_as_options(folder: Path) -> None:
    """Keys of the config given by name change the config, through the Auto class too; harmless options pass."""
    for load in (AutoModelForCausalLM.from_pretrained, Zamba2ForCausalLM.from_pretrained):
        model = load(folder, use_cache=False, low_cpu_mem_usage=True, trust_remote_code=False, attn_implementation="sdpa", revision="main")
        assert model.config.use_cache is False and model(tokens(1, 3)).past_key_values is None


def test_generation_settings_come_along(tmp_path: Path, folder: Path) -> None:
    """A checkpoint's generation_config.json is the model's, unless another one is given."""
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    (copied / "generation_config.json").write_text('{"eos_token_id": [2, 7], "max_new_tokens": 9}')
    assert Zamba2ForCausalLM.from_pretrained(copied).generation_config.eos_token_id == [2, 7]
    given = GenerationConfig(eos_token_id=5)
    assert Zamba2ForCausalLM.from_pretrained(copied, generation_config=given).generation_config.eos_token_id == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(folder: Path) -> None:
    """device_map="cuda" without a GPU is one sentence that says what to do."""
    for device_map in ("cuda", 0, {"": 0}):
        with pytest.raises(Zamba2Error, match=r"'cuda.*cannot be used .*'cpu' always can"):
            AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)


def test_forward_refuses(ours: Any) -> None:
    """What would silently change a result, or is not here, raises."""
    ids = tokens(2, 6)
    with torch.no_grad():
        past = ours(ids).past_key_values
        right = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
        behind = ours(**right).past_key_values
    refused: list[tuple[dict[str, Any], str]] = [
        ({"input_ids": ids, "output_attentions": True}, "output_attentions"),
        ({"input_ids": ids, "output_hidden_states": True}, "output_hidden_states"),
        ({"input_ids": ids, "inputs_embeds": torch.zeros(2, 6, 64)}, "either"),
        ({"input_ids": ids, "attention_mask": torch.ones(2, 1, 6, 6)}, "attention_mask has shape"),
        ({"input_ids": ids, "attention_mask": torch.ones(2, 9)}, "9 columns"),
        ({"input_ids": ids, "past_key_values": object()}, "past_key_values is a object"),
        ({"input_ids": ids[:1], "past_key_values": past}, "holds 2 sequences"),
        ({"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 5, 6, 7]])}, "skip"),
        ({"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "use_cache": True}, "several documents"),
        ({"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 3, 6])}, "cu_seq_lens"),
        ({"input_ids": ids[:, :1], "past_key_values": behind, "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 2 + [1]])}, "left"),
    ]
    for arguments, says in refused:
        with pytest.raises(ValueError, match=says):
            ours(**arguments)
    with pytest.raises(TypeError, match="no_such_input"):
        ours(ids, no_such_input=1)


def test_generate_refuses(ours: Any) -> None:
    """Ways to generate that need another kind of cache fail with a sentence instead of a wrong result."""
    ids = tokens(1, 6)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"assistant_model": ours}, "ASSISTED_GENERATION"),
        ({"prompt_lookup_num_tokens": 3}, "ASSISTED_GENERATION"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "trust_remote_code"),
        ({"no_such_option": 3}, "no_such_option"),
    ]
    for options, says in refused:
        with pytest.raises(ValueError, match=says):
            ours.generate(ids, max_new_tokens=3, **options)
    with pytest.raises(ValueError, match="cut back"):
        Zamba2Cache(ours.model.config).crop(1)


@pytest.mark.parametrize("beams", [1, 2])
def test_stop_strings(beams: int) -> None:
    """``generate`` stops behind a text that is asked for, as transformers' own models do; beams take the texts too."""
    model, tokenizer = Zamba2ForCausalLM.from_pretrained(RANDOM), AutoTokenizer.from_pretrained(RANDOM)
    ids = torch.tensor([[1, 40, 90, 30]])
    whole = model.generate(ids, max_new_tokens=12, num_beams=beams, do_sample=False)[0, 4:]
    third = tokenizer.decode(whole[2:3]).strip()
    stopped = model.generate(ids, max_new_tokens=12, num_beams=beams, do_sample=False, stop_strings=[third], tokenizer=tokenizer)[0, 4:]
    if beams == 1:  # of beams another one may win
        assert third in tokenizer.decode(stopped) and len(stopped) < 12 and torch.equal(stopped, whole[: len(stopped)])
