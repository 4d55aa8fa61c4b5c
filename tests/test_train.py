"""Laws of training: rows that do not leak, losses that are what they are called, and runs that can be repeated, resumed and trusted."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from copy import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("trl", reason="training needs the extra [train]")
import accelerate
import torch
import transformers
from forked import Forked
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import CONFIGS
from safetensors.numpy import load_file, save_file
from torch.nn import functional as F

import zamba2.hf
from zamba2.cli import OUR_RECIPES
from zamba2.cli import run as command
from zamba2.commands.train import demonstration, stage
from zamba2.errors import Zamba2Error
from zamba2.language.tokenizer import Tokenizer
from zamba2.model import model as model_module
from zamba2.runtime.backend import Row
from zamba2.train import run as module
from zamba2.train.adapters import add_lora, coverage, kept_by_merging
from zamba2.train.card import model_card
from zamba2.train.data import Part
from zamba2.train.demo import average, pair, train, write_base
from zamba2.train.instructions import documents, tasks
from zamba2.train.masks import mask_conversation, mask_pair
from zamba2.train.muon import Muon
from zamba2.train.packing import IGNORED, collate_packed, pack
from zamba2.train.prepare import _key, labels, pair_row, prepare
from zamba2.train.progress import Progress, read_metrics
from zamba2.train.recipe import RECIPES, Lora, Recipe, read_recipe
from zamba2.train.rounding import RoundWeights, divergence, rounded_weights
from zamba2.weights.formats import FORMATS, GROUP, format_named, unpack
from zamba2.weights.formats import pack as pack_weights
from zamba2.weights.hub import RANDOM
from zamba2.weights.packed import Packing, open_packed, parts, quantize

WORDS = ["red", "green", "blue", "old", "new", "cat", "dog", "house", "tree", "river", "one", "two", "three"]
# trl, peft and transformers warn of each other.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Prepared data goes into the test's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(RANDOM)


def some_text(generator: torch.Generator, words: int) -> str:
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=generator))


def write_chats(path: Path, count: int = 64) -> Path:
    if path.exists():  # prepared data is found again by the file's time
        return path
    g = torch.Generator().manual_seed(1)
    rows = []
    for i in range(count):
        said = [("user", f"{i} {some_text(g, 3)}"), ("assistant", some_text(g, 4))]
        said += [("user", some_text(g, 2)), ("assistant", some_text(g, 1 + i % 5))] if i % 3 == 0 else []
        rows.append({"messages": [{"role": role, "content": content} for role, content in said]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_pairs(path: Path, count: int = 48) -> Path:
    if path.exists():
        return path
    g = torch.Generator().manual_seed(2)
    rows = [{"prompt": f"{i} {some_text(g, 3)}", "chosen": some_text(g, 4), "rejected": some_text(g, 5)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(tmp_path: Path, stage: str = "sft", **fields: object) -> Recipe:
    data = f"messages:{write_chats(tmp_path / 'chats.jsonl')}" if stage == "sft" else f"preferences:{write_pairs(tmp_path / 'pairs.jsonl')}"
    base = dict(stage=stage, model=str(RANDOM), out=tmp_path / "out", data=(data,), max_tokens=96, precision="fp32", device="cpu",
                batch_size=4, device_batch_size=4, steps=4, log_every=1, learning_rate=1e-3)  # fmt: skip
    return Recipe.model_validate(base | fields)


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return zamba2.hf.Zamba2ForCausalLM.from_pretrained(str(folder), dtype="float32").state_dict()


def fresh_model(seed: int = 0) -> zamba2.hf.Zamba2ForCausalLM:
    """The default model with trained-like small noise on its zeros, in training mode."""
    torch.manual_seed(seed)
    return zamba2.hf.Zamba2ForCausalLM.from_pretrained(str(RANDOM), dtype="float32").train()


# ---- packing ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 50), st.integers(1, 40))
def test_packing_keeps_every_document_whole(lengths, size, window):
    """Each document lies in exactly one row, whole and in place; no row is too long; the first label of each is no target."""
    documents = [{"input_ids": [i] * n, "labels": [i] * n} for i, n in enumerate(lengths)]
    seen = []
    for row in pack(documents, size, window=window):
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["lengths"]) <= size
        at = 0
        for length in row["lengths"]:
            own = row["input_ids"][at : at + length]
            assert set(own) == {own[0]} and lengths[own[0]] == length
            assert row["labels"][at : at + length] == [IGNORED, *own[1:]]
            seen.append(own[0])
            at += length
    assert sorted(seen) == list(range(len(lengths)))


def test_packing_fills_rows():
    """Rows of a few hundred documents of natural lengths are 97 % full, and a document that fits no row is refused."""
    g = torch.Generator().manual_seed(0)
    lengths = (torch.rand(2000, generator=g).pow(2) * 200 + 5).int().tolist()
    rows = list(pack(({"input_ids": [1] * n, "labels": [1] * n} for n in lengths), 256))
    assert sum(lengths) / (256 * len(rows)) > 0.97
    assert len(list(pack([{"input_ids": [1] * 8, "labels": [1] * 8}], 8))) == 1
    with pytest.raises(ValueError, match="has 9 tokens and a row 8"):
        list(pack([{"input_ids": [1] * 9, "labels": [1] * 9}], 8))


def packed_batch(tokenizer, generator, size=160):
    """Conversations apart, and the same ones packed into one batch of rows."""
    apart = []
    for i in range(7):
        messages = [{"role": "user", "content": some_text(generator, 2 + i)}, {"role": "assistant", "content": some_text(generator, 3)}]
        masked = mask_conversation(tokenizer, messages)
        apart.append({"input_ids": masked.ids.tolist(), "labels": labels(masked)})
    return apart, collate_packed(list(pack(apart, size)), size=size, padding=0)


def losses_and_gradients(model, batches):
    """The summed loss over all targets, and the gradients of it."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        batch = dict(batch)
        targets = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one(document):
    return {name: torch.tensor([document[name]]) for name in ("input_ids", "labels")}


def test_packed_equals_separate(tokenizer):
    """Losses and gradients of packed rows are those of the documents read alone, to 1e-5 in fp32."""
    apart, together = packed_batch(tokenizer, torch.Generator().manual_seed(3))
    assert len(together["seq_idx"]) > 1 and int(together["seq_idx"].max()) > 2
    model = fresh_model()
    loss, gradients = losses_and_gradients(model, map(one, apart))
    packed, packed_gradients = losses_and_gradients(model, [together])
    assert abs(packed - loss) <= 1e-5 * loss
    for name, gradient in gradients.items():
        assert (packed_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def test_packing_leaks_in_transformers(tokenizer):
    """The same test, with the position_ids that transformers documents for packed rows, shows the leak of its own class."""
    apart, together = packed_batch(tokenizer, torch.Generator().manual_seed(3))
    theirs = transformers.models.zamba2.Zamba2ForCausalLM.from_pretrained(str(RANDOM), dtype=torch.float32).train()
    loss, gradients = losses_and_gradients(theirs, map(one, apart))
    seq_idx = together.pop("seq_idx")
    starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=True)
    columns = torch.arange(seq_idx.shape[1]).expand_as(seq_idx)
    together["position_ids"] = columns - (starts * columns).cummax(1).values
    packed, packed_gradients = losses_and_gradients(theirs, [together])
    assert abs(packed - loss) > 1e-3 * loss
    assert any((packed_gradients[n] - g).norm() > 0.01 * g.norm() for n, g in gradients.items())


turns = st.lists(st.tuples(st.text("ab \n<|>é", max_size=9), st.text("ab \n<|>é", max_size=9)), min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(st.lists(turns, min_size=1, max_size=4))
def test_only_the_assistant_carries_loss_under_packing(conversations):
    """In a packed batch the targets of each document, decoded, are its answers and their end tokens, and nothing else; what pads a row is
    masked, and a document of its own."""
    tokenizer = Tokenizer.from_folder(RANDOM)
    documents, said = [], []
    for conversation in conversations:
        said_by = [said for pair in conversation for said in zip(("user", "assistant"), pair, strict=True)]
        messages = [{"role": role, "content": text} for role, text in said_by]
        masked = mask_conversation(tokenizer, messages)
        documents.append({"input_ids": masked.ids.tolist(), "labels": labels(masked)})
        said.append("".join(message["content"] + "<|im_end|>" for message in messages if message["role"] == "assistant"))
    packed = list(pack(documents, 400))
    batch = collate_packed(packed, size=400, padding=0)
    for row, mask, seq_idx in zip(packed, batch["attention_mask"].tolist(), batch["seq_idx"].tolist(), strict=True):
        padding = 400 - len(row["input_ids"])
        assert mask == [1] * (400 - padding) + [0] * padding
        assert seq_idx == [i for i, length in enumerate([*row["lengths"], padding]) for _ in range(length)]
    found = []
    for row, seq_idx in zip(batch["labels"], batch["seq_idx"], strict=True):
        for document in range(int(seq_idx.max()) + 1):
            ids = row[(seq_idx == document) & (row != IGNORED)].tolist()
            if ids:
                found.append(tokenizer.decode(ids, skip_special_tokens=False))
    assert sorted(text.lstrip(" ") for text in found) == sorted(text.lstrip(" ") for text in said)


# ---- what the trainers compute ---------------------------------------------------------------------------------------


def test_sft_loss_is_cross_entropy(tmp_path):
    """The first loss that trl reports is the mean of -log p over the assistant's tokens of the batch."""
    wanted = recipe(tmp_path, steps=1)
    module.run(wanted)
    rows = prepare(wanted, Tokenizer.from_folder(RANDOM), [], lambda n: None).train
    model = fresh_model().eval()
    batch = collate_packed([rows[i] for i in first_batch(wanted, rows)], size=wanted.max_tokens, padding=0)
    targets = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        scores = torch.log_softmax(model(**batch).logits[:, :-1], -1)
    picked = scores.gather(2, targets.clamp(min=0)[..., None])[..., 0][targets != IGNORED]
    total, count = -picked.sum().item(), picked.numel()
    assert losses(wanted.out)[0] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_held_out_loss_is_the_mean_over_targets(tmp_path, tokenizer, packing):
    """The held-out loss is the mean of -log p over all held-out targets, whatever rows they lie in and however many are read at once; the
    first token of a text, which nothing stands before, is none."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{i} red"}) + "\n" for i in range(20)))
    for rows in (1, 4):
        data = (f"messages:{write_chats(tmp_path / 'chats.jsonl')}", f"text:{texts}")
        own = recipe(tmp_path, steps=1, held_out=9, packing=packing, device_batch_size=rows, out=tmp_path / str(rows), data=data)
        folder = module.run(own)
        held_out = prepare(own, tokenizer, [RANDOM / name for name in module.TOKENIZER_FILES if (RANDOM / name).is_file()], len).held_out
        assert len(held_out) > 1
        model = zamba2.hf.Zamba2ForCausalLM.from_pretrained(str(folder), dtype="float32")
        total = count = 0.0
        for row in held_out:
            batch = collate_packed([row], padding=0)
            targets = batch.pop("labels")[:, 1:]
            with torch.no_grad():
                scores = torch.log_softmax(model(**batch).logits[:, :-1], -1)
            picked = scores.gather(2, targets.clamp(min=0)[..., None])[..., 0][targets != IGNORED]
            total, count = total - picked.sum().item(), count + picked.numel()
        lines = [json.loads(line) for line in (own.out / "metrics.jsonl").read_text().splitlines()]
        assert [line["eval_loss"] for line in lines if "eval_loss" in line] == pytest.approx([total / count], rel=1e-5)


def first_batch(wanted: Recipe, rows) -> list[int]:
    """Indices of the first batch, as the trainer's sampler draws them."""
    model = fresh_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(RANDOM))
    prepared = prepare(wanted, Tokenizer.from_folder(RANDOM), [], lambda n: None)
    numbered = prepared.train.add_column("number", list(range(len(prepared.train))))
    trainer = module.make_trainer(wanted, model, tokenizer, type(prepared)(numbered, None, prepared.report), Progress())
    collate, seen = trainer.data_collator, []
    trainer.data_collator = lambda batch: (seen.append([row["number"] for row in batch]), collate(batch))[1]
    transformers.set_seed(wanted.seed)
    next(iter(trainer.get_train_dataloader()))
    return seen[0]


def log_probability(model, prompt, answer):
    """log p(answer | prompt), by the plain formula."""
    ids = torch.tensor([prompt + answer])
    scores = torch.log_softmax(model(ids).logits[0, :-1], -1)
    return sum(scores[at - 1, ids[0, at]] for at in range(len(prompt), ids.shape[1]))


@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_dpo_loss_is_the_papers(tmp_path, tokenizer, sft_weight):
    """trl's DPO loss on our rows is -log sigmoid(beta * difference of log-ratios), answers counted up to their end token; with a weight,
    the chosen answers' mean -log p is added."""
    wanted = recipe(tmp_path, "dpo", steps=3, beta=0.3, batch_size=2, device_batch_size=2, sft_weight=sft_weight)
    prepared = prepare(wanted, tokenizer, [], lambda n: None)
    model = fresh_model()
    trainer = module.make_trainer(wanted, model, transformers.AutoTokenizer.from_pretrained(str(RANDOM)), prepared, Progress())
    trainer.train()
    rows = [trainer.train_dataset[i] for i in (0, 1)]
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    with torch.no_grad():
        loss = trainer.compute_loss(model.eval(), batch).item()
        reference, expected = fresh_model().eval(), 0.0
        for row in rows:
            chosen, rejected = (
                log_probability(model, row["prompt_ids"], row[name]) - log_probability(reference, row["prompt_ids"], row[name])
                for name in ("chosen_ids", "rejected_ids")
            )
            expected -= F.logsigmoid(0.3 * (chosen - rejected)).item() / len(rows)
        own = sum(log_probability(model, row["prompt_ids"], row["chosen_ids"]).item() for row in rows)
        expected -= sft_weight * own / sum(len(row["chosen_ids"]) for row in rows)
    assert loss == pytest.approx(expected, rel=1e-4) and abs(loss - math.log(2)) > 0.01
    assert all(row[name][-1] in tokenizer.eos_token_ids for row in rows for name in ("chosen_ids", "rejected_ids"))


def test_trl_alone_packs_and_masks_as_we_do(tmp_path, tokenizer):
    """trl's own SFTTrainer, with our model and template, packs without leaks, and trains on the very tokens that our masks name."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in write_chats(tmp_path / "chats.jsonl", 12).read_text().splitlines()]
    theirs = transformers.AutoTokenizer.from_pretrained(str(RANDOM))
    theirs.chat_template = zamba2.hf.TRAINING_TEMPLATE
    plain = theirs.apply_chat_template(rows[0]["messages"], tokenize=False, chat_template=tokenizer.chat_template)
    assert theirs.apply_chat_template(rows[0]["messages"], tokenize=False) == plain
    options = SFTConfig(
        str(tmp_path / "out"), assistant_only_loss=True, packing=True, max_length=128, use_cpu=True, bf16=False, max_steps=1, report_to=[],
        per_device_train_batch_size=2, activation_checkpointing=False, disable_tqdm=True, shuffle_dataset=False,
    )  # fmt: skip
    model = fresh_model()
    trainer = SFTTrainer(model=model, args=options, processing_class=theirs, train_dataset=Dataset.from_list(rows))
    ours = sorted((masked.ids.tolist(), labels(masked)) for masked in (mask_conversation(tokenizer, row["messages"]) for row in rows))
    found, packed = [], 0
    for row in trainer.train_dataset:
        at, packed = 0, max(packed, len(row["seq_lengths"]))
        for length in row["seq_lengths"]:
            found.append((row["input_ids"][at : at + length], row["labels"][at : at + length]))
            at += length
    assert packed > 1 and sorted(found) == ours
    batch = trainer.data_collator([trainer.train_dataset[0]])
    loss, gradients = losses_and_gradients(model, [{k: v for k, v in batch.items() if k in ("input_ids", "labels", "position_ids")}])
    apart = [dict(zip(("input_ids", "labels"), pair, strict=True)) for pair in found[: len(trainer.train_dataset[0]["seq_lengths"])]]
    alone, alone_gradients = losses_and_gradients(model, map(one, apart))
    assert loss == pytest.approx(alone, rel=1e-5)
    assert all((gradients[n] - g).norm() <= 1e-5 * g.norm() + 1e-9 for n, g in alone_gradients.items())
    assert math.isfinite(trainer.train().training_loss)


def test_trl_alone_opens_our_class(tmp_path):
    """The reference that trl's own DPOTrainer opens where it is given none is our class, so that the first loss is ln 2; and so is a model
    that a trainer of trl's is given by name."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.utils import create_model_from_path

    rows = [json.loads(line) for line in write_pairs(tmp_path / "pairs.jsonl", 4).read_text().splitlines()]
    options = DPOConfig(
        str(tmp_path / "out"), use_cpu=True, bf16=False, max_steps=1, report_to=[], per_device_train_batch_size=2, disable_tqdm=True,
        activation_checkpointing=False,
    )  # fmt: skip
    model = zamba2.hf.Zamba2ForCausalLM.from_pretrained("random", dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(RANDOM))
    trainer = DPOTrainer(model=model, args=options, processing_class=tokenizer, train_dataset=Dataset.from_list(rows))
    assert type(trainer.ref_model) is zamba2.hf.Zamba2ForCausalLM
    assert trainer.train().training_loss == pytest.approx(math.log(2), abs=1e-6)
    assert type(create_model_from_path(str(RANDOM))) is zamba2.hf.Zamba2ForCausalLM


def test_pair_rows_hold_prompt_and_answers(tokenizer):
    """A pair's ids are the prompt as a model is asked, and the two answers with their end token; together, the rendered conversation."""
    prompt = [{"role": "user", "content": "Which?"}]
    masked = mask_pair(tokenizer, prompt, [{"role": "assistant", "content": "This one."}], [{"role": "assistant", "content": "That."}])
    row = pair_row(masked)
    assert row["prompt_ids"] == tokenizer.encode_chat(prompt)
    assert tokenizer.decode(row["chosen_ids"], skip_special_tokens=False).lstrip() == "This one.<|im_end|>"
    assert tokenizer.decode(row["rejected_ids"], skip_special_tokens=False).lstrip() == "That.<|im_end|>"


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_recipe_reaches_the_trainer(tmp_path, tokenizer, stage):
    """What a recipe says of steps, optimizer, schedule and loss is what trl trains with, and not trl's own default."""
    write_pairs(tmp_path / "pairs.jsonl", 4)
    own = dict(learning_rate=3e-4, weight_decay=0.03, max_grad_norm=0.4, seed=5, logging_steps=2, save_steps=3, max_steps=9)
    own |= dict(data_seed=5, adam_beta1=0.7, adam_beta2=0.8, warmup_steps=0.25, per_device_train_batch_size=2, num_train_epochs=3.0)
    own |= dict(gradient_accumulation_steps=2, lr_scheduler_type="linear", activation_checkpointing=True)
    fields: dict = dict(learning_rate=3e-4, weight_decay=0.03, max_grad_norm=0.4, seed=5, log_every=2, save_every=3, steps=9, epochs=3.0)
    fields |= dict(betas=(0.7, 0.8), warmup=0.25, device_batch_size=2, schedule="linear", checkpointing=True)
    if stage == "dpo":
        own |= dict(beta=0.3, loss_type=["robust"], label_smoothing=0.2)
        fields |= dict(beta=0.3, loss="robust", label_smoothing=0.2)
    wanted = recipe(tmp_path, stage, **fields)
    loader = transformers.AutoTokenizer.from_pretrained(str(RANDOM))
    trainer = module.make_trainer(wanted, fresh_model(), loader, prepare(wanted, tokenizer, [], lambda n: None), Progress())
    assert {name: getattr(trainer.args, name) for name in own} == own


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_weight_decay_spares_what_mamba_spares(tmp_path, tokenizer, stage):
    """AdamW's weight decay reaches matrices, convolutions and embeddings; neither norms and biases nor mamba_ssm's A_log, D and dt_bias."""
    write_pairs(tmp_path / "pairs.jsonl", 4)
    wanted, loader = recipe(tmp_path, stage, weight_decay=0.1), transformers.AutoTokenizer.from_pretrained(str(RANDOM))
    trainer = module.make_trainer(wanted, fresh_model(), loader, prepare(wanted, tokenizer, [], lambda n: None), Progress())
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    decayed = {names[p].rpartition("mamba.")[2] for group in groups if group["weight_decay"] for p in group["params"]}
    assert {name for name in decayed if "layers" not in name and "shared" not in name} == {
        "in_proj.weight", "out_proj.weight", "conv1d.weight", "model.embed_tokens.weight",
    }  # fmt: skip


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_accumulation_changes_nothing(tmp_path, stage):
    """8 rows at once and 8 times one row: the same losses and weights, step by step."""
    whole = recipe(tmp_path, stage, batch_size=8, device_batch_size=8, out=tmp_path / "whole")
    parts = recipe(tmp_path, stage, batch_size=8, device_batch_size=1, out=tmp_path / "parts")
    first, second = weights(module.run(whole)), weights(module.run(parts))
    assert losses(parts.out) == pytest.approx(losses(whole.out), rel=1e-5)
    assert all(torch.allclose(first[name], second[name], rtol=1e-4, atol=1e-5) for name in first)


@pytest.mark.parametrize(
    "fields", [{}, {"batch_size": 8, "device_batch_size": 2, "precision": "bf16-mixed"}, {"lora": {"rank": 2}}], ids=str
)
def test_graphed_steps_are_the_steps(tmp_path, fields):
    """A run whose passes are made for CUDA graphs has the losses and weights of one whose are not, several rows to a step too."""
    found = {}
    for graph in (False, True):
        own = recipe(tmp_path, "sft", packing=True, graph=graph, out=tmp_path / str(graph), **fields)
        found[graph] = (weights(module.run(own)), losses(own.out))
    assert found[True][1] == pytest.approx(found[False][1], rel=1e-6)
    assert all(torch.allclose(found[True][0][name], found[False][0][name], rtol=1e-5, atol=1e-7) for name in found[True][0])


def test_graphs_are_refused_where_they_cannot_be(tmp_path):
    """A step that is not of one fixed form is no graph: the recipe says so."""
    for fields in ({"packing": False}, {"checkpointing": True}, {"rounding": "q4"}):
        with pytest.raises(ValueError, match="graph is for stage sft with packing"):
            recipe(tmp_path, "sft", **({"packing": True, "graph": True} | fields))


WAYS = [
    ("sft", {}), ("dpo", {}), ("sft", {"optimizer": "muon"}), ("sft", {"rounding": "q4"}), ("sft", {"rounding": "q4", "distill": True}),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "fields"), WAYS, ids=str)
def test_resuming_changes_nothing(tmp_path, stage, fields):
    """A run that was cut after two of six steps and resumed has the losses and the very weights of one that was not."""
    through = recipe(tmp_path, stage, steps=6, save_every=2, keep=9, out=tmp_path / "through", **fields)
    wanted = weights(module.run(through))
    cut = recipe(tmp_path, stage, steps=6, save_every=2, keep=9, out=tmp_path / "cut", **fields)
    (tmp_path / "cut").mkdir()
    os.rename(tmp_path / "through" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    (tmp_path / "cut" / "checkpoint-4").mkdir()  # as a killed process leaves it: not complete
    found = weights(module.run(cut, resume=True))
    assert losses(cut.out) == pytest.approx(losses(through.out)[2:], rel=1e-6)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_metrics_have_each_step_once(tmp_path, stage):
    """metrics.jsonl of a run that went on from an earlier checkpoint is that of one that was never cut: each loss and evaluation once, in
    order, tokens and seconds counted from the beginning; a line that was cut in the middle is gone."""

    def lines():
        return [json.loads(line) for line in (own.out / "metrics.jsonl").read_text().splitlines()]

    own = recipe(tmp_path, stage, steps=4, save_every=2, keep=9, held_out=8, evaluate_every=2)
    module.run(own)
    whole = lines()
    shutil.rmtree(own.out / "checkpoint-4")
    with (own.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "se')
    module.run(own, resume=True)
    assert sum("eval_loss" in line for line in whole) == 2  # the last step's is not taken again
    for name in ("step", "loss", "eval_loss", "num_tokens", "learning_rate"):
        assert [line.get(name, -1) for line in lines()] == pytest.approx([line.get(name, -1) for line in whole], rel=1e-6), name
    assert [line["seconds"] for line in lines()] == sorted(line["seconds"] for line in lines())
    second, evaluated, third, fourth = lines()[1:5]  # the third is the first behind the checkpoint
    for line, before, since, near in ((third, second, evaluated, 0.05), (fourth, third, third, 0.1)):  # seconds are rounded
        rate = (line["num_tokens"] - before["num_tokens"]) / (line["seconds"] - since["seconds"])
        assert line["tokens_per_second"] == pytest.approx(rate, rel=near)
    (own.out / "recipe.yaml").unlink()
    for folder in (own.out / "model", *module.checkpoints(own.out)):
        shutil.rmtree(folder)
    module.run(own)  # nor does a run that begins anew keep lines of one that ended before its first checkpoint
    assert [line["step"] for line in lines()] == [line["step"] for line in whole]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has a Muon since 2.9")
def test_muon_is_torchs_for_matrices_and_adamw_for_the_rest(monkeypatch):
    """Where products are bf16, three steps of our Muon are torch's on the matrices inside and AdamW's on all else, also after saving."""
    monkeypatch.setattr("zamba2.train.muon.multiplies_bf16", lambda device: True)
    models = [fresh_model(), fresh_model()]
    ours = Muon(models[0].named_parameters(), 1e-2, betas=(0.8, 0.9), weight_decay=0.1)
    inside = [p for n, p in models[1].named_parameters() if p.ndim == 2 and "embed_tokens" not in n]
    rest = [p for n, p in models[1].named_parameters() if p.ndim != 2 or "embed_tokens" in n]
    assert len(inside) > 20 and len(rest) > 20
    parts = [torch.optim.Muon(inside, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
             torch.optim.AdamW(rest, lr=1e-2, betas=(0.8, 0.9), weight_decay=0.0)]  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(ours, lambda step: 1 / (step + 1))
    for step in range(3):
        for model in models:
            g = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=g)
        for part in parts:
            part.param_groups[0]["lr"] = 1e-2 / (step + 1) if step < 2 else 5e-3
            part.step()
        if step == 2:  # as after resuming
            state = ours.state_dict()
            ours = Muon(models[0].named_parameters(), 1e-2, betas=(0.8, 0.9), weight_decay=0.1)
            ours.load_state_dict(state)
            for group in ours.param_groups:
                group["lr"] = 5e-3  # as a schedule does, which is to reach the parts
        ours.step()
        schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    head, matrix = (torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
    found = Muon([("lm_head.weight", head), ("layers.0.out_proj.weight", matrix)], 1e-2).param_groups
    assert [id(weight) for group in found for weight in group["params"]] == [id(matrix), id(head)]  # a head is AdamW's too


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (64, 64), (33, 130), (200, 17)])
def test_muon_without_bf16_products_is_as_near_as_fp32_allows(shape, monkeypatch):
    """On a CPU without them a step is the definition's in fp64 to 1e-5 of its size, a hundred times nearer than in bf16."""
    coefficients, errors = (3.4445, -4.7750, 2.0315), []
    g = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    left, singular, right = torch.linalg.svd(g.double(), full_matrices=False)
    singular /= singular.norm()
    for _ in range(5):
        singular = sum(c * singular**power for c, power in zip(coefficients, (1, 3, 5), strict=True))
    wanted = -1e-2 * 0.2 * max(shape) ** 0.5 * (left * singular) @ right
    for has in (False, True):
        monkeypatch.setattr("zamba2.train.muon.multiplies_bf16", lambda device, has=has: has)
        weight = torch.nn.Parameter(torch.zeros(shape))
        weight.grad = g.clone()
        Muon([("inside", weight)], 1e-2, weight_decay=0.1).step()
        errors.append(float((weight.detach().double() - wanted).norm() / wanted.norm()))
    assert errors[0] < 1e-5 and errors[0] < errors[1] / 100


def test_muon_is_refused_where_matrices_are_spread(tmp_path, monkeypatch):
    """Under FSDP, where no process holds a whole matrix, Muon is one sentence instead of other steps."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(Zamba2Error, match="needs whole matrices"):
        module.make_trainer(recipe(tmp_path, optimizer="muon"), fresh_model(), None, None, Progress())


@settings(deadline=None)
@given(rows=st.integers(1, 40), cols=st.integers(1, 130), format=st.sampled_from(["q8", "q4"]), seed=st.integers(0, 2**31))
def test_weights_are_rounded_as_they_are_packed(rows, cols, format, seed):
    """What a step trains through is what the packed matrix stands for, zeros and ties of candidates' errors included."""
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((rows, cols)) * rng.choice([0, 1e-3, 1, 30], (rows, 1))).astype(np.float32)
    packed = unpack(pack_weights(weight, FORMATS[format]), rows, cols, FORMATS[format])
    found = rounded_weights(torch.from_numpy(weight), FORMATS[format]).numpy()
    for start in range(0, cols, GROUP):  # sums in another order may choose another scale among equals
        errors = [((value - weight)[:, start : start + GROUP].astype(np.float64) ** 2).sum(1) for value in (found, packed)]
        assert (abs(errors[0] - errors[1]) <= 1e-5 * errors[1]).all()


def test_a_rounded_step_trains_through_the_packed_model(tmp_path):
    """With rounding the first loss is that of the packed file's own weights, and the full weights are what the steps change: by no more
    than the optimizer's steps, and not onto the packed grid; the second loss is the full weights' own."""
    model, plain = fresh_model(), fresh_model()
    RoundWeights(plain, plain.model.config, Packing.named("q4")).on_step_begin(None, SimpleNamespace(global_step=0), None)
    plain.save_pretrained(tmp_path / "rounded")
    for file in module.TOKENIZER_FILES:
        if (RANDOM / file).is_file():
            (tmp_path / "rounded" / file).write_bytes((RANDOM / file).read_bytes())
    quantize(RANDOM, tmp_path / "packed", FORMATS["q4"])
    file, packing, plan = open_packed(tmp_path / "packed", model.model.config)
    values = dict(plain.named_parameters())
    for part in plan:
        if part.is_matrix and part.half is None:
            data = np.frombuffer(file.map(part.name), np.uint8)
            packed = unpack(data, *part.shape, packing.of(part))
            assert np.mean(packed == values[f"model.{part.name}"].detach().numpy()) > 0.98, part.name
    through = recipe(tmp_path, steps=2, warmup=0.0, schedule="constant", rounding="q4", out=tmp_path / "through")
    after = weights(module.run(through))
    on_grid = recipe(tmp_path, steps=1, model=str(tmp_path / "rounded"), out=tmp_path / "grid")
    module.run(on_grid)
    plainly = recipe(tmp_path, steps=2, warmup=0.0, schedule="constant", out=tmp_path / "plain")
    module.run(plainly)
    assert losses(through.out)[0] == pytest.approx(losses(on_grid.out)[0], rel=1e-6)
    assert losses(through.out)[0] != pytest.approx(losses(plainly.out)[0], rel=1e-6)
    moved = {name: float((after[name] - value).abs().max()) for name, value in model.state_dict().items()}
    rounded = [moved[f"model.{part.name}"] for part in plan if part.is_matrix and part.half is None]
    assert max(moved.values()) <= 2.02e-3 and min(rounded) > 1.1e-3  # AdamW's first steps are the learning rate, and both are taken
    assert losses(through.out)[1] == pytest.approx(losses(plainly.out)[1], rel=1e-3)  # every second step goes through the full weights


def test_halves_that_are_packed_apart_are_rounded_apart():
    """Each half of the columns of a shared block's q, k and v has groups of its own, also where its width is no multiple of a group."""
    config, weights, g = CONFIGS["odd"], {}, torch.Generator().manual_seed(0)
    for part in parts(config):
        for source in part.sources if part.is_matrix else ():
            columns = part.shape[1] * (1 if part.half is None else 2)
            name = source if source.startswith("lm_head.") else f"model.{source}"
            weights[name] = torch.nn.Parameter(torch.randn(2, columns, generator=g))
    query = weights["model.shared_blocks.0.self_attn.q_proj.weight"]
    halves = query.detach().clone().split(config.hidden_size, dim=1)
    model = SimpleNamespace(named_parameters=weights.items)
    RoundWeights(model, config, Packing.named("q8")).on_step_begin(None, SimpleNamespace(global_step=0), None)
    assert torch.equal(query, torch.cat([rounded_weights(half, FORMATS["q8"]) for half in halves], dim=1))


def test_divergence_is_the_formula():
    """The sum over scored places of p (log p - log q), p the teacher's and q the model's; none, and no gradient, where both are one. A
    step's loss is the mean over all of its places, also where they are read in parts."""
    teacher, model = fresh_model().eval(), fresh_model().eval()
    RoundWeights(model, model.model.config, Packing.named("q4")).on_step_begin(None, SimpleNamespace(global_step=0), None)
    ids = torch.randint(3, 256, (2, 9))
    labels = torch.where(torch.rand(2, 9) < 0.5, ids, -100)
    found, count = divergence(model, teacher, {"input_ids": ids, "labels": labels})
    with torch.no_grad():
        p, q = (one(input_ids=ids).logits.double().softmax(-1) for one in (teacher, model))
    places = [(i, t) for i in range(2) for t in range(8) if labels[i, t + 1] != -100]
    expected = sum(float((p[place] * (p[place].log() - q[place].log())).sum()) for place in places)
    assert found.item() == pytest.approx(expected, rel=1e-3) and int(count) == len(places) and expected > 0
    machine = SimpleNamespace(autocast=nullcontext, gather=lambda value: value, num_processes=1)
    trainer = SimpleNamespace(graphed=None, teacher=teacher, accelerator=machine, _total_train_tokens=0, _metrics={"train": {}})
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    part = module.Conversations.compute_loss(trainer, model.train(), inputs, num_items_in_batch=3 * count)
    assert part.item() == pytest.approx(found.item() / (3 * int(count)), rel=1e-4) and trainer._total_train_tokens == ids.numel()
    same, _ = divergence(teacher, teacher, {"input_ids": ids, "labels": labels})
    same.backward()
    assert abs(same.item()) < 1e-5 and max(weight.grad.abs().max() for weight in teacher.parameters() if weight.grad is not None) < 1e-5


def test_what_is_distilled_comes_nearer(tmp_path):
    """The losses of a distilling run are the rounded weights' divergence from what the model was, in each step, and grow smaller."""
    model = fresh_model()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.2 if weight.ndim == 2 else 1)  # as it is, all words are equally likely to it
    model.save_pretrained(tmp_path / "loud")
    for file in module.TOKENIZER_FILES:
        if (RANDOM / file).is_file():
            (tmp_path / "loud" / file).write_bytes((RANDOM / file).read_bytes())
    own = recipe(tmp_path, model=str(tmp_path / "loud"), steps=24, warmup=0.0, learning_rate=3e-4, rounding="q4", distill=True)
    module.run(own)
    found = losses(own.out)
    assert min(found) > 0.1 and np.mean(found[-4:]) < 0.85 * np.mean(found[:4])


def test_rounding_needs_all_of_whole_weights(tmp_path, monkeypatch):
    """Rounding is refused, in a sentence, beside adapters and where matrices are spread over processes."""
    with pytest.raises(ValueError, match="adapters are never rounded"):
        recipe(tmp_path, rounding="q4", lora=Lora())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(Zamba2Error, match="needs whole matrices"):
        module.make_trainer(recipe(tmp_path, rounding="q4"), fresh_model(), None, None, Progress())


def test_checkpointing_and_bf16_train(tmp_path, monkeypatch):
    """Activation checkpointing and what is computed again inside a layer leave the trajectory as it is; bf16 products, and adapters on
    bf16 weights, stay near it."""
    plain = recipe(tmp_path, out=tmp_path / "plain")
    module.run(plain)
    with monkeypatch.context() as patch:
        patch.setattr(model_module, "WORTH_IT", 0)
        inside = recipe(tmp_path, out=tmp_path / "inside")
        module.run(inside)
    assert losses(inside.out) == pytest.approx(losses(plain.out), rel=1e-6)
    lora = {"precision": "bf16", "lora": {}}
    for name, fields, near in (
        ("again", {"checkpointing": True}, 1e-5), ("mixed", {"precision": "bf16-mixed"}, 0.02), ("lora", lora, 0.1),
        ("lora again", lora | {"checkpointing": True}, 0.1),
    ):  # fmt: skip
        other = recipe(tmp_path, out=tmp_path / name, **fields)
        module.run(other)
        assert losses(other.out) == pytest.approx(losses(plain.out), rel=near)


def test_a_cpu_without_bf16_products_does_not_wait_for_them(tmp_path, monkeypatch, capsys):
    """Where a CPU has no instructions for products of bf16, mixed precision becomes fp32, in the run's files too, and says so."""
    found = {}
    for has, precision, sentence in (
        (True, "bf16-mixed", None), (False, "fp32", None), (False, "bf16-mixed", module.SLOW_MIXED), (False, "bf16", module.SLOW_BF16),
    ):  # fmt: skip
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda has=has: has, raising=False)
        monkeypatch.setattr("zamba2.errors._said", set())
        own = recipe(tmp_path, out=tmp_path / f"{precision} {has}", precision=precision, steps=2)
        module.run(own)
        module.for_this_machine(own, Progress())  # as of a second run in this process: it is said once
        said = " ".join(capsys.readouterr().err.split())
        assert [line for line in (module.SLOW_MIXED, module.SLOW_BF16) for _ in range(said.count(line))] == [sentence] * bool(sentence)
        found[precision, has] = losses(own.out)
        assert read_recipe(own.out / "recipe.yaml").precision == ("fp32" if sentence == module.SLOW_MIXED else precision)
    assert found["bf16-mixed", False] == found["fp32", False]
    assert found["bf16-mixed", True] != found["fp32", False] != found["bf16", False]


def test_a_run_lowers_its_loss_and_says_all_about_itself(tmp_path):
    """A few dozen steps learn the data; the folder holds recipe, data report, versions, metrics, plots and a model that loads."""
    wanted = recipe(tmp_path, steps=30, held_out=8, evaluate_every=12, learning_rate=3e-3)
    folder = module.run(wanted)
    found = losses(wanted.out)
    assert found[-1] < 0.6 * found[0]
    assert read_recipe(wanted.out / "recipe.yaml") == wanted
    assert json.loads((wanted.out / "data.json").read_text())["sets"][0]["kept"] == 64
    assert {"zamba2", "torch", "trl"} <= json.loads((wanted.out / "versions.json").read_text()).keys()
    lines = [json.loads(line) for line in (wanted.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [12, 24, 30]  # the last step's too
    assert all(line["peak_rss_bytes"] > 0 for line in lines)
    assert (wanted.out / "loss.png").stat().st_size > 1000 and (wanted.out / "loss.svg").stat().st_size > 1000
    assert zamba2.load(folder, format="bf16").generate("red", max_tokens=2).completion_tokens == 2


def test_prepared_data_and_reference_are_computed_once(tmp_path, monkeypatch):
    """A second run on the same data and model reads neither the rows nor the reference again; another model's reference is its own, and so
    is that of another precision, in which the same weights give other numbers."""
    module.run(recipe(tmp_path, "dpo", out=tmp_path / "one"))
    calls = []
    original = module.Preferences.compute_ref_log_probs
    monkeypatch.setattr(module.Preferences, "compute_ref_log_probs", lambda *a: (calls.append(1), original(*a))[1])
    monkeypatch.setattr("zamba2.train.prepare._write", lambda *a: pytest.fail("the data was prepared again"))
    module.run(recipe(tmp_path, "dpo", out=tmp_path / "two"))
    assert not calls and losses(tmp_path / "one") == losses(tmp_path / "two")
    module.run(recipe(tmp_path, "dpo", out=tmp_path / "three", model=str(tmp_path / "one" / "model")))
    assert calls
    calls.clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    module.run(recipe(tmp_path, "dpo", out=tmp_path / "four", precision="bf16-mixed"))
    assert calls and losses(tmp_path / "four")[0] == pytest.approx(math.log(2), abs=1e-6)


# ---- LoRA ------------------------------------------------------------------------------------------------------------

TARGETS = Lora().targets


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_alone_learns(target):
    """An adapter on one layer type gets gradient, changes the logits, and is the only thing that can move."""
    model = add_lora(fresh_model(), Lora(rank=4, targets=(target,)))
    ids = torch.randint(3, 1000, (2, 20), generator=torch.Generator().manual_seed(0))
    before = model(ids).logits.detach()
    model(ids, labels=ids).loss.backward()
    moved = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved and all("lora_" in name and f".{target}." in name for name in moved)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter -= 0.1 * parameter.grad.sign()
    assert (model(ids).logits - before).abs().max() > 1e-3


def test_lora_run_moves_adapters_alone_and_merges(tmp_path):
    """After a LoRA run the base weights are what they were, and the merged checkpoint has the logits of base and adapter together."""
    from peft import PeftModel

    wanted = recipe(tmp_path, lora={"rank": 4, "alpha": 8}, steps=3, learning_rate=1e-2)
    folder = module.run(wanted)
    base = fresh_model().eval()
    ids = torch.randint(3, 1000, (1, 30), generator=torch.Generator().manual_seed(0))
    before, after = base.state_dict(), weights(folder)
    targeted = [name for name in before if any(f".{target}.weight" in name for target in TARGETS)]
    assert targeted and all(torch.equal(before[name], after[name]) is (name not in targeted) for name in before)
    with torch.no_grad():
        plain = base(ids).logits
        together = PeftModel.from_pretrained(base, str(wanted.out / "adapter")).eval()(ids).logits
        merged = zamba2.hf.Zamba2ForCausalLM.from_pretrained(str(folder), dtype="float32")(ids).logits
    assert (together - plain).abs().max() > 1e-3
    torch.testing.assert_close(merged, together, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "size", "expected"), [("float32", 1e-5, 1.0), ("bfloat16", 1e-8, 0.0), ("bfloat16", 1.0, 1.0)])
def test_what_merging_keeps_is_counted(dtype, size, expected):
    """Of what adapters add, what stands in the merged weights: all in fp32, nothing where it is far below the rounding of bf16."""
    model = add_lora(zamba2.hf.Zamba2ForCausalLM.from_pretrained(str(RANDOM), dtype=dtype), Lora(rank=2))
    assert kept_by_merging(model) == 1.0  # nothing is added yet
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=size)
    assert kept_by_merging(model) == pytest.approx(expected, abs=0.02)


def test_a_merge_that_loses_what_was_learned_is_said(tmp_path, capsys):
    """Adapters too small for the weights' bf16 are still in adapter/, and a line says so."""
    small = recipe(tmp_path, precision="bf16", lora=Lora(rank=2), steps=2, learning_rate=1e-7, batch_size=1, device_batch_size=1)
    module.run(small)
    said = capsys.readouterr().err
    assert "leaves 0% of what the adapters learned" in said and f"{small.out / 'adapter'} holds all of it" in said


def test_coverage_counts_every_parameter():
    """The table's parameters are the model's, its trained ones the adapters', and shared blocks are listed at each of their layers."""
    model = fresh_model()
    total = sum(p.numel() for p in model.parameters())
    adapted = add_lora(model, Lora(rank=2, targets=("q_proj", "in_proj")))
    rows = {row.name: row for row in coverage(adapted, model.model.config)}
    assert sum(row.parameters for row in rows.values()) == total
    assert sum(row.trained for row in rows.values()) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert rows["q_proj"].where == "shared block A at layers 2, 6; shared block B at layers 4" and rows["q_proj"].modules == 2
    assert rows["in_proj"].where == "all layers" and not rows["out_proj"].trained
    assert list(rows.values()) == sorted(rows.values(), key=lambda row: -row.parameters)  # largest first
    fewer = [(name, weight) for name, weight in model.named_parameters() if "layers.7." not in name]
    some = {row.name: row for row in coverage(SimpleNamespace(named_parameters=lambda: fewer), model.model.config)}
    assert some["in_proj"].where == "layers 0, 1, 2, 3, 4, 5, 6"
    with pytest.raises(Zamba2Error, match="targets names qkv_proj, which no layer is called"):
        add_lora(fresh_model(), Lora(targets=("qkv_proj",)))


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_nan_loss_stops_and_leaves_the_last_checkpoint(tmp_path):
    """A loss that is no number ends the run in one sentence before it reaches a checkpoint."""
    wanted = recipe(tmp_path, steps=40, save_every=1, keep=3, learning_rate=1e30, warmup=0.0, schedule="constant", log_every=1000)
    with pytest.raises(Zamba2Error, match="NaN or infinite by step"):
        module.run(wanted)
    last = module.checkpoints(wanted.out)[-1]
    assert json.loads((last / "trainer_state.json").read_text())["global_step"] >= 1 and (last / "model.safetensors").exists()


def test_nan_gradients_reach_no_checkpoint(tmp_path, monkeypatch):
    """A gradient that is no number, of a loss that is one, ends the run before weights that it has spoilt are saved or exported."""
    original = module.Conversations.training_step

    def spoilt(self, model, *rest):
        loss = original(self, model, *rest)
        if self.state.global_step == 2:
            next(model.parameters()).grad[0, 0] = math.nan
        return loss

    monkeypatch.setattr(module.Conversations, "training_step", spoilt)
    wanted = recipe(tmp_path, steps=3, save_every=1, log_every=1000)
    with pytest.raises(Zamba2Error, match="NaN or infinite by step 3"):
        module.run(wanted)
    assert [path.name for path in module.checkpoints(wanted.out)] == ["checkpoint-1", "checkpoint-2"]


def test_old_checkpoints_go_when_the_new_one_is_complete(tmp_path, monkeypatch):
    """Whenever a checkpoint is deleted another one is complete, also where one alone is kept; those that were never completed go too, and
    copies under names of a user's own stay."""
    left, original = [], shutil.rmtree

    def rmtree(path, **options):
        if Path(path).name.startswith("checkpoint-"):
            left.append([found.name for found in module.checkpoints(tmp_path / "out")])
        original(path, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    (tmp_path / "out" / "checkpoint-9").mkdir(parents=True)  # as a killed process leaves it
    (tmp_path / "out" / "checkpoint-best").mkdir()
    module.run(recipe(tmp_path, save_every=1, keep=1))
    assert left == [["checkpoint-1"], ["checkpoint-2"], ["checkpoint-3"], ["checkpoint-4"]]
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-best"}
    for number in (10, 9):
        (tmp_path / "out" / f"checkpoint-{number}").mkdir()
        (tmp_path / "out" / f"checkpoint-{number}" / module.COMPLETE).touch()
    assert [path.name for path in module.checkpoints(tmp_path / "out")] == ["checkpoint-4", "checkpoint-9", "checkpoint-10"]


def test_a_checkpoint_is_complete_when_every_process_has_written(tmp_path, monkeypatch):
    """Behind all its files, and before it counts, a checkpoint waits for what other processes write into it."""
    seen, folder, original = [], tmp_path / "out" / "checkpoint-1", accelerate.Accelerator.wait_for_everyone

    def wait(self):
        seen.append(((folder / "trainer_state.json").exists(), (folder / module.COMPLETE).exists()))
        original(self)

    monkeypatch.setattr(accelerate.Accelerator, "wait_for_everyone", wait)
    module.run(recipe(tmp_path, steps=1, save_every=1))
    assert (True, False) in seen and (folder / module.COMPLETE).exists()


def test_prepared_data_belongs_to_what_decides_it(tmp_path, tokenizer):
    """Another value of what decides the examples, another evaluation to keep out or another template is other data; the rest is not."""
    against, other = tmp_path / "evaluation.jsonl", copy(tokenizer)
    against.write_text('{"prompt": "red"}\n')
    other.chat_template = f"{tokenizer.chat_template} "

    def key(tokenizer=tokenizer, **fields):
        wanted = recipe(tmp_path, **fields)
        return _key(wanted, [Part.parse(written) for written in wanted.data], tokenizer, [])

    changes = [{}, {"seed": 1}, {"until": "all"}, {"examples": 3}, {"held_out": 2}, {"language": "de"}, {"max_tokens": 95}]
    changes += [{"ties": True}, {"packing": False}, {"against": (against,)}, {"tokenizer": other}]
    keys = [key(**change) for change in changes]
    against.write_text('{"prompt": "another"}\n')
    assert len({*keys, key(against=(against,))}) == len(keys) + 1
    assert key(steps=9, learning_rate=1.0, precision="bf16", out=tmp_path / "elsewhere") == keys[0]


def test_a_mixture_ends_where_the_recipe_says(tmp_path, tokenizer):
    """With the first set that has no more, or when each was read once, or after so many examples; the report counts those used."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"text": f"{i} red"}) + "\n" for i in range(4)))
    both = (f"messages:{write_chats(tmp_path / 'chats.jsonl')}", f"text:{few}")

    def used(**fields):
        prepared = prepare(recipe(tmp_path, data=both, packing=False, **fields), tokenizer, [], lambda n: None)
        counts = [one["used"]["examples"] for one in prepared.report["sets"]]
        assert sum(counts) == len(prepared.train) == prepared.report["train"]
        return counts

    assert used()[0] < 64 and used(until="all")[0] >= 64 and sum(used(examples=5)) == 5


def test_prepared_data_that_is_not_used_is_deleted(tmp_path, tokenizer):
    """Each run deletes the prepared data, and what was left half written, that no run has begun with for a month, and keeps the rest."""
    wanted, other = recipe(tmp_path), recipe(tmp_path, max_tokens=95)
    for own in (wanted, other):
        prepare(own, tokenizer, [], lambda n: None)
    cache = tmp_path / "cache" / "zamba2" / "train"
    (cache / ".partial.x").mkdir()
    (cache / ".partial.y").mkdir()
    for path in cache.iterdir():
        month_ago = time.time() - (31 if path.name != ".partial.y" else 29) * 24 * 60 * 60
        os.utime(path, (month_ago, month_ago))
    prepare(wanted, tokenizer, [], lambda n: None)
    found = sorted(path.name for path in cache.iterdir())
    assert len(found) == 2 and found[0] == ".partial.y"
    prepare(wanted, tokenizer, [], lambda n: pytest.fail("the data was prepared again"))


def test_the_card_names_the_base_model_as_the_hub_does(tmp_path):
    """A short name is written out in the card's base_model; a folder is none."""
    for name, line in (("2.7B-instruct", "base_model: Zyphra/Zamba2-2.7B-instruct\n"), ("me/mine", "base_model: me/mine\n"),
                       (str(RANDOM), None), ("random", None)):  # fmt: skip
        card = model_card(recipe(tmp_path, model=name), {"sets": []}, {}, tmp_path / "none")
        assert (line in card) if line else ("base_model" not in card)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_card_says_what_a_result_was_made_with(tmp_path, stage):
    """Whatever a recipe says of steps and loss stands in the card; what belongs to the other stage alone does not."""
    own = {"optimizer": "muon", "rounding": "q4", "schedule": "linear", "weight_decay": 0.3}
    others = {"sft": {"distill": True, "packing": False}, "dpo": {"loss": "robust", "label_smoothing": 0.2, "sft_weight": 0.5, "beta": 0.4}}
    card = model_card(recipe(tmp_path, stage, **own, **others[stage]), {"sets": []}, {}, tmp_path / "none")
    assert all(f"| {name} | {value} |" in card for name, value in (own | others[stage]).items())
    assert not any(f"| {name} |" in card for name in others["dpo" if stage == "sft" else "sft"])


def test_compiling_is_announced(tmp_path, monkeypatch, capsys):
    """What compiles says so before it begins."""
    monkeypatch.setattr("zamba2.errors._said", set())
    with pytest.raises(Zamba2Error, match="nowhere"):
        module.run(recipe(tmp_path, compile=True, model="nowhere"))
    assert module.COMPILES in capsys.readouterr().err


def test_dpo_that_stands_at_ln_2_stops(tmp_path):
    """When nothing that is trained moves the output, the run stops and says so; one that moves, or has moved, goes on."""
    still = recipe(tmp_path, "dpo", steps=60, learning_rate=1e-12, batch_size=2, device_batch_size=2)
    with pytest.raises(Zamba2Error, match="stands at ln 2 from step 7 to 27"):
        module.run(still)
    moves = recipe(tmp_path, "dpo", steps=30, learning_rate=1e-3, batch_size=2, device_batch_size=2, out=tmp_path / "moves")
    module.run(moves)
    watch = module.Watch(moves, Progress())
    for step in range(1, 4000):
        watch._check_still(SimpleNamespace(global_step=step, max_steps=4000), math.log(2) + (0.0 if step > 450 else 0.01))


def test_full_disk_is_one_sentence(tmp_path, monkeypatch):
    """A checkpoint that does not fit ends the run with the disk named, and the one before it stays complete."""
    original = module.Conversations._save_optimizer_and_scheduler

    def full(self, folder):
        if self.state.global_step > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, folder)

    monkeypatch.setattr(module.Conversations, "_save_optimizer_and_scheduler", full)
    wanted = recipe(tmp_path, save_every=1, keep=1)
    with pytest.raises(Zamba2Error, match=r"the disk of .* is full"):
        module.run(wanted)
    assert [path.name for path in module.checkpoints(wanted.out)] == ["checkpoint-1"]


BAD = {
    "unknown field": ({"colour": 1}, "there is no field colour"),
    "wrong type": ({"learning_rate": "fast"}, "learning_rate is fast"),
    "loose type": ({"steps": 1.5}, "steps is 1.5"),
    "negative": ({"max_tokens": -1}, "max_tokens is -1"),
    "not finite": ({"learning_rate": float("inf")}, "learning_rate is inf"),
    "weight without end": ({"weight_decay": float("inf")}, "weight_decay is inf"),
    "a seed that NumPy has not": ({"seed": 2**32}, "seed is 4294967296"),
    "unknown stage": ({"stage": "ppo"}, "stage is ppo"),
    "no data": ({"data": []}, "data is "),
    "unknown lora field": ({"lora": {"rnak": 2}}, "there is no field lora.rnak; there are rank"),
    "negative weight": ({"sft_weight": -1}, "sft_weight is -1"),
    "uneven batch": ({"batch_size": 3, "device_batch_size": 2}, "not a multiple"),
    "no held out": ({"evaluate_every": 5}, "set held_out"),
    "nothing to distill into": ({"distill": True}, "set rounding"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_recipes_are_named(tmp_path, name):
    """What is wrong with a recipe is one sentence with the field in it."""
    fields, sentence = BAD[name]
    good = {"stage": "sft", "model": "random", "out": "o", "data": ["messages:x.jsonl"]}
    (tmp_path / "r.yaml").write_text(json.dumps(good | fields).replace("Infinity", ".inf"))
    with pytest.raises(Zamba2Error) as error:
        read_recipe(tmp_path / "r.yaml")
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_pairs_are_the_models_own_answers():
    """A pair holds a right and a wrong answer that were given, the greedy one on its side; without both there is no pair."""
    task = next(task for task in tasks(1, split="train", kinds={"copy"}))
    right, rng = task.messages[-1]["content"], random.Random(0)
    for answers, expected in (
        (["no", right, "nor"], (right, "no")), ([right, "no", right], (right, "no")), ([right, right], None), (["no", "nor", " "], None),
    ):  # fmt: skip
        row = pair(task, answers, rng)
        assert (row if row is None else (row["chosen"], row["rejected"])) == expected
        assert row is None or row["prompt"] == task.messages[:-1]


def test_an_average_lies_between(tmp_path):
    """Each weight is so far on the way from one model's to the other's; other files are the second one's; what is there stays."""
    rng = np.random.default_rng(0)
    old, new = ({"a.weight": rng.standard_normal((3, 5)).astype(np.float32)} for _ in range(2))
    for name, tensors in (("old", old), ("new", new)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(name)
    average(tmp_path / "old", tmp_path / "new", tmp_path / "mixed", 0.25)
    found = load_file(tmp_path / "mixed" / "model.safetensors")["a.weight"]
    np.testing.assert_allclose(found, 0.75 * old["a.weight"] + 0.25 * new["a.weight"], rtol=1e-5)
    assert (tmp_path / "mixed" / "config.json").read_text() == "new"
    average(tmp_path / "new", tmp_path / "old", tmp_path / "mixed", 0.25)
    np.testing.assert_array_equal(load_file(tmp_path / "mixed" / "model.safetensors")["a.weight"], found)


def test_two_processes_train_a_stage_of_it_as_one(tmp_path, monkeypatch):
    """Started in two processes by ourselves, a recipe of the demonstration model has the losses of one process; processes that fail are
    told of."""
    texts = itertools.islice(documents(1, split="train"), 40)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_base(tmp_path / "base", 500)
    own = [f"model={tmp_path / 'base'}", f'data=["text:{tmp_path / "data.jsonl"}"]', "steps=3", "log_every=1", "precision=fp32"]
    own += ["device=cpu", "batch_size=4", "held_out=2"]
    for processes, size in ((1, 4), (2, 2)):
        out = tmp_path / str(processes)
        train("demo-pretrain", [*own, f"out={out}", f"device_batch_size={size}"], out, processes)
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-4)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(Zamba2Error, match="in 2 processes ended with exit code 1"):
        train("demo-pretrain", [*own, "device_batch_size=2"], tmp_path / "3", 2)


@pytest.mark.parametrize("content", [b"", b"- a", b"{", b"\xff\xfe", b"a: &x [*x]", b"[" * 5000, b"x" * 2_000_000])
def test_what_is_no_recipe_is_named(tmp_path, content):
    """Any bytes as a recipe give one sentence."""
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(Zamba2Error) as error:
        read_recipe(tmp_path / "r.yaml")
    assert "\n" not in str(error.value)


def test_changes_reach_every_field(tmp_path):
    """KEY=VALUE replaces a field, reaches inside lora, and a missing value or key is an error."""
    changed = read_recipe("sft-2.7b-lora", ["lora.rank=8", "out=elsewhere", "data=[gsm8k]", "device_batch_size=2"])
    assert (changed.lora.rank, changed.lora.alpha, changed.out, changed.data) == (8, 32.0, Path("elsewhere"), ("gsm8k",))
    (tmp_path / "r.yaml").write_text(recipe(tmp_path).to_yaml())  # where lora is null
    assert read_recipe(tmp_path / "r.yaml", ["lora.rank=8"]).lora == Lora(rank=8)
    for change in ("lora.rank", "=3", "steps=["):
        with pytest.raises(Zamba2Error):
            read_recipe("sft-2.7b-lora", [change])


@pytest.mark.parametrize("name", sorted(file.stem for file in RECIPES.glob("*.yaml")))
def test_our_recipes_are_valid(name):
    """Every recipe in the package is read, and what it prints is read as the same recipe."""
    import yaml

    wanted = read_recipe(name)
    assert Recipe.model_validate(yaml.safe_load(wanted.to_yaml())) == wanted


def test_our_recipes_are_in_the_help():
    """The help names those that are meant for users: all but the demonstration model's."""
    assert sorted(OUR_RECIPES.split(", ")) == sorted(file.stem for file in RECIPES.glob("*.yaml") if not file.stem.startswith("demo-"))


def test_bad_data_and_folders_are_named(tmp_path):
    """Missing files, data of the other stage, examples that are all too long, and a folder with a run in it: one sentence each."""
    for fields, sentence in (
        ({"data": ("messages:nowhere.jsonl",)}, "nowhere.jsonl does not exist"),
        ({"data": (f"preferences:{write_pairs(tmp_path / 'p.jsonl')}",)}, "is for dpo and the recipe for sft"),
        ({"max_tokens": 5}, "none of 64 rows can be trained on"),
        ({"held_out": 64}, "nothing is left to train on"),
        ({"model": "nowhere"}, "nowhere"),
    ):
        with pytest.raises(Zamba2Error, match=sentence):
            module.run(recipe(tmp_path, **fields))
    with pytest.raises(Zamba2Error, match="no complete checkpoint to resume"):
        module.run(recipe(tmp_path), resume=True)
    (tmp_path / "out" / "model").mkdir()
    with pytest.raises(Zamba2Error, match="holds a run already"):
        module.run(recipe(tmp_path))


def test_the_command_trains_and_prints_the_folder(tmp_path):
    """`zamba2 train sft` runs a recipe with changes; standard output is the model's folder, and errors exit with 2."""
    wanted = recipe(tmp_path)
    (tmp_path / "r.yaml").write_text(wanted.to_yaml())
    command = [sys.executable, "-m", "zamba2", "train", "sft", str(tmp_path / "r.yaml")]
    done = subprocess.run([*command, "steps=2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{wanted.out / 'model'}\n" and "step 2: loss" in done.stderr and "Warning" not in done.stderr
    again = Forked("zamba2", command[3:])
    assert again.ended() == 2 and again.said.count("\n") == 1 and "holds a run already" in again.said


def test_several_processes_print_one_folder(tmp_path, monkeypatch, capsys):
    """Of processes that train together the first alone prints where the result is."""
    (tmp_path / "r.yaml").write_text(recipe(tmp_path).to_yaml())
    monkeypatch.setattr(module, "run", lambda wanted, resume: tmp_path)
    monkeypatch.setattr("zamba2.commands.train.prepare_libraries", lambda: None)
    for rank, printed in (("0", f"{tmp_path}\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        stage("sft", str(tmp_path / "r.yaml"), [], resume=False, show=False)
        assert capsys.readouterr().out == printed


@pytest.mark.parametrize("arguments", [["sft", "sft-2.7b"], ["demo"]])
def test_libraries_of_other_versions_are_one_sentence(monkeypatch, capsys, arguments):
    """Where transformers or trl cannot be imported together, the end is one line that says what to install."""
    monkeypatch.setitem(sys.modules, "zamba2.train.run", None)
    assert command(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert "do not fit together (" in error and "install with `pip install 'zamba2[train]'`." in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "said"), [("out=x", "out cannot be changed"), ("stepz=1", "there is no field stepz"), ("steps=many", "be a valid integer")]
)
def test_a_demonstration_that_cannot_be_writes_nothing(tmp_path, monkeypatch, capsys, change, said):
    """What is wrong with changes to the demonstration's recipes is one sentence, before anything is written."""
    monkeypatch.chdir(tmp_path)
    assert command(["train", "demo", change]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_small_demonstration_keeps_something_of_each(tmp_path, monkeypatch, capsys):
    """However small a share is asked for, eight of everything are left; changes and processes are passed on."""
    seen = {}
    monkeypatch.setattr("zamba2.train.demo.build", lambda out, **options: (seen.update(options), out)[1])
    monkeypatch.setattr("zamba2.commands.train.prepare_libraries", lambda: None)
    demonstration(tmp_path, ["steps=1"], small=1e-9, processes=3)
    assert {*vars(seen["sizes"]).values()} == {8} and (seen["changes"], seen["processes"]) == (["steps=1"], 3)
    assert capsys.readouterr().out == f"{tmp_path}\n"
    for words, folder, changes in (
        ([], "zamba2-demo", []), (["steps=1", "seed=2"], "zamba2-demo", ["steps=1", "seed=2"]), (["a", "steps=1"], "a", ["steps=1"]),
        (["./seed=1"], "seed=1", []), (["runs/seed=1", "steps=1"], "runs/seed=1", ["steps=1"]),
    ):  # fmt: skip
        assert command(["train", "demo", *words]) == 0
        assert capsys.readouterr().out == f"{folder}\n" and seen["changes"] == changes


# ---- several processes -----------------------------------------------------------------------------------------------


def start_with_fsdp(own: Recipe, folder: Path) -> None:
    """Run a recipe in two gloo processes with spread weights; facts.0 and facts.1 in the folder say how they were spread."""
    (folder / "r.yaml").write_text(own.to_yaml())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    worker, arguments = str(Path(__file__).parent / "fsdp_worker.py"), [str(folder / "r.yaml"), str(folder / "facts")]
    both = [Forked(worker, arguments, **meeting, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    for one in both:
        assert one.ended() == 0, "\n".join(line for line in one.said.splitlines() if "rror" in line)[-3000:]


def test_two_processes_with_fsdp_train_as_one(tmp_path):
    """Two gloo processes with spread weights: losses and model of one process; transformers and the engine read the checkpoint alike."""
    alone = recipe(tmp_path, batch_size=4, device_batch_size=4, out=tmp_path / "alone")
    wanted = weights(module.run(alone))
    both = recipe(tmp_path, batch_size=4, device_batch_size=2, out=tmp_path / "both")
    start_with_fsdp(both, tmp_path)
    for rank in range(2):
        facts = json.loads((tmp_path / f"facts.{rank}").read_text())
        assert facts["world"] == 2 and facts["rank"] == rank
        assert facts["spread"] == facts["parameters"] > 50 and 0.4 < facts["share"] < 0.6
    assert losses(both.out) == pytest.approx(losses(alone.out), rel=1e-4)
    folder = both.out / "model"
    found = weights(folder)
    assert all(torch.allclose(wanted[name], found[name], rtol=1e-3, atol=1e-4) for name in wanted)
    theirs = transformers.models.zamba2.Zamba2ForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    for layer in theirs.modules():
        if hasattr(layer, "time_step_limit"):
            layer.time_step_limit = (0.0, float("inf"))  # its floor of dt, which the models never had
    ids = torch.randint(3, 1000, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids).logits[0, -1]
        ours = zamba2.hf.Zamba2ForCausalLM.from_pretrained(str(folder), dtype="float32").eval()(ids).logits[0, -1]
        rounded = zamba2.hf.Zamba2ForCausalLM.from_pretrained(str(folder), dtype="bfloat16").eval()(ids).logits[0, -1].float()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    engine = zamba2.load(folder, format="bf16").backend
    (logits,) = engine.forward([Row(ids[0].int().numpy(), engine.new_state())])
    assert (torch.from_numpy(logits.numpy()[0]) - expected).norm() <= 1.5 * (rounded - expected).norm()


def test_pairs_under_fsdp_begin_at_their_reference(tmp_path):
    """DPO of all weights, spread over two processes, begins at ln 2: its reference is the very policy, not another class's reading."""
    both = recipe(tmp_path, "dpo", steps=2, device_batch_size=2, warmup=0.0, schedule="constant")
    start_with_fsdp(both, tmp_path)
    first, second = losses(both.out)
    assert first == pytest.approx(math.log(2), abs=1e-6) and second != pytest.approx(math.log(2), abs=1e-4)


def test_training_keeps_little(monkeypatch, tokenizer):
    """What lies between projections of some size is computed again by the backward pass: gradients to the bit, about half of the bytes
    kept; what is small is kept."""

    def kept(model, ids):
        sizes: dict[int, int] = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(ids, labels=ids).loss
        model.zero_grad()
        loss.backward()
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(n for place, n in sizes.items() if place not in own), {n: p.grad.clone() for n, p in model.named_parameters()}

    ids = torch.randint(3, 1000, (1, 300), generator=torch.Generator().manual_seed(0))
    model = fresh_model()
    monkeypatch.setattr(model_module, "WORTH_IT", 1000)
    little, gradients = kept(model, ids)
    monkeypatch.undo()
    much, expected = kept(model, ids)
    assert little < 0.55 * much
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
DUMMY = "sft/fastchat_dummy_conversation.json"


@pytest.mark.parametrize(
    ("stage", "data"),
    [
        ("sft", ["gsm8k:sft/gsm8k_train.jsonl", "self-instruct:sft/self_instruct_seed_tasks.jsonl", f"sharegpt:{DUMMY}"]),
        ("dpo", ["llama-factory:pref/llamafactory_dpo_en_demo.json"]),
    ],
)
def test_real_sets_train(tmp_path, stage, data):
    """The real rows of the shared data run through both stages, and are reported by set."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there; it holds the real data sets")
    parts = [part.replace(":", f":{SHARED}/") for part in data]
    wanted = recipe(tmp_path, stage, data=parts, examples=40, until="all", max_tokens=512, steps=2, batch_size=2, device_batch_size=2)
    module.run(wanted)
    report = json.loads((wanted.out / "data.json").read_text())
    assert [found["set"] for found in report["sets"]] == parts and all(found["kept"] for found in report["sets"])
    assert len(losses(wanted.out)) == 2 and all(map(math.isfinite, losses(wanted.out)))


def test_results_are_packed_described_and_uploaded(tmp_path):
    """`pack` writes what the engine loads, the card tells of data and settings, `push_to` puts it on the Hub or says why not."""
    from fake_hub import FakeHub

    data = ["messages:" + str(write_chats(tmp_path / "chats.jsonl"))]
    wanted = recipe(tmp_path, steps=1, pack=["q8"], push_to="me/mini", private=False, data=data)
    (tmp_path / "r.yaml").write_text(wanted.to_yaml())
    command = ["train", "sft", str(tmp_path / "r.yaml")]
    with FakeHub({}) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_TOKEN": hub.token, "HF_HUB_OFFLINE": "0"}
        done = Forked("zamba2", command, **environment)
        assert done.ended() == 0 and f"uploaded to {hub.url}/me/mini" in done.said, done.said
        folder = wanted.out / "model"
        assert hub.private == {"me/mini": False}
        assert hub.uploads["me/mini"] == {path.name: path.read_bytes() for path in folder.iterdir()}
        hub.answer = 403
        done = Forked("zamba2", [*command, f"out={tmp_path / 'two'}"], **environment)
        assert done.ended() == 2 and "is complete, but was not uploaded: The Hub refused access to me/mini" in done.said
        assert (tmp_path / "two" / "model" / "model.safetensors").exists()
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: zamba2\n") and "| learning_rate | 0.001 |" in card and "| 64 | 0 | 64 |" in card
    assert zamba2.load(wanted.out / "model-q8").backend.format.name == "q8"


def test_a_killed_run_resumes_as_if_it_had_not_been(tmp_path):
    """A process killed without warning leaves complete checkpoints; resumed, it ends with the weights of a run that was left alone."""
    through = recipe(tmp_path, steps=12, save_every=1, out=tmp_path / "through")
    wanted = weights(module.run(through))
    (tmp_path / "r.yaml").write_text(recipe(tmp_path, steps=12, save_every=1, out=tmp_path / "cut").to_yaml())
    command = ["train", "sft", str(tmp_path / "r.yaml")]
    cut, deadline = Forked("zamba2", command), time.monotonic() + 120
    while not any(module.checkpoints(tmp_path / "cut")[1:]) and time.monotonic() < deadline and cut.running():
        time.sleep(0.01)
    cut.send(signal.SIGKILL)
    assert cut.ended() == -signal.SIGKILL
    last = module.checkpoints(tmp_path / "cut")[-1]
    assert not (tmp_path / "cut" / "model").exists() and 1 < int(last.name[11:]) < 12
    resumed = Forked("zamba2", [*command, "--resume"])
    assert resumed.ended() == 0, resumed.said
    found = weights(tmp_path / "cut" / "model")
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.parametrize("when", ["preparing", "training"])
def test_ctrl_c_tidies_up_and_says_how_to_go_on(tmp_path, when):
    """Ctrl-C ends a run at once with exit code 2: half prepared data is deleted, and behind a checkpoint a line says how to go on."""
    write_chats(tmp_path / "chats.jsonl", 64 if when == "training" else 40_000)
    own = recipe(tmp_path, steps=4000, save_every=2)
    (tmp_path / "r.yaml").write_text(own.to_yaml())
    run = Forked("zamba2", ["train", "sft", str(tmp_path / "r.yaml")])
    partial, deadline = tmp_path / "cache" / "zamba2" / "train", time.monotonic() + 120
    while not (module.checkpoints(own.out) if when == "training" else any(partial.glob(".partial.*"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send(signal.SIGINT)
    assert run.ended(60) == 2 and not run.out and run.said.endswith("zamba2: interrupted.\n") and "Traceback" not in run.said
    assert ("is complete; the same command with --resume goes on from there" in run.said) is (when == "training")
    assert not any(partial.glob(".partial.*"))


@pytest.mark.parametrize(("fields", "sentence"), [
    ({"stage": "dpo", "label_smoothing": 0.2}, "for loss robust"),
    ({"stage": "dpo", "lora": Lora(dropout=0.1)}, "lora.dropout is for stage sft"), ({"betas": (0.9, 1.0)}, "less than 1"),
])  # fmt: skip
def test_fields_without_effect_are_refused(tmp_path, fields, sentence):
    """A field that would change nothing in its stage, or that no optimizer takes, is an error of the recipe."""
    with pytest.raises(ValueError, match=sentence):
        recipe(tmp_path, fields.pop("stage", "sft"), **fields)


def test_small_weights_that_cannot_be_spread_are_named(tmp_path, monkeypatch):
    """Under FSDP, which wants weights of one kind, bf16 weights beside small ones in fp32 are one sentence."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(Zamba2Error, match="use precision=bf16-mixed"):
        module.make_trainer(recipe(tmp_path, precision="bf16"), fresh_model(), None, None, Progress())


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path):
    """Where a checkpoint names no token for padding, the one that ends an answer stands there."""
    shutil.copytree(RANDOM, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    file.write_text(json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name != "pad_token"}))
    assert module.load(recipe(tmp_path, model=str(tmp_path / "model")))[1].pad_token == "<|im_end|>"


def test_packed_weights_are_not_trained(tmp_path):
    """The model of the other commands, whose weights are packed, is one sentence."""
    with pytest.raises(Zamba2Error, match="packed weights, which cannot be trained"):
        module.run(recipe(tmp_path, model="demo"))


def test_a_resumed_run_packs_its_own_result(tmp_path, capsys):
    """What a run packs at its end is its result, also where an earlier end of it was packed before; another recipe is told of."""
    short = recipe(tmp_path, steps=1, save_every=1, pack=("q8",), learning_rate=1e-2)
    module.run(short)
    packed = short.out / "model-q8" / "model.safetensors"
    before = packed.read_bytes()
    capsys.readouterr()
    folder = module.run(short.model_copy(update={"steps": 3}), resume=True)
    assert "the recipe differs from the one in" in " ".join(capsys.readouterr().err.split())
    quantize(folder, tmp_path / "fresh", format_named("q8"))
    assert before != packed.read_bytes() == (tmp_path / "fresh" / "model.safetensors").read_bytes()


def test_a_run_resumed_behind_its_last_step_makes_none(tmp_path):
    """A run that was cut behind its last checkpoint, before its result was written, is finished by --resume as it would have ended, and
    its metrics hold each step and the last evaluation once."""
    own = recipe(tmp_path, steps=2, save_every=1, schedule="constant", warmup=0.0, learning_rate=1e-2, held_out=4)
    wanted = weights(module.run(own))
    metrics = [(line["step"], line.get("loss"), line.get("eval_loss")) for line in read_metrics(own.out / "metrics.jsonl")]
    shutil.rmtree(own.out / "model")
    found = weights(module.run(own, resume=True))
    assert [(line["step"], line.get("loss"), line.get("eval_loss")) for line in read_metrics(own.out / "metrics.jsonl")] == metrics
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_adapters_of_pairs_are_exported_alone(tmp_path):
    """DPO with adapters writes the trained one; what trl keeps as its reference is not there, and the first loss is ln 2."""
    run = recipe(tmp_path, "dpo", lora=Lora(rank=4), steps=2)
    module.run(run)
    assert sorted(path.name for path in (run.out / "adapter").iterdir() if path.is_dir()) == []
    assert losses(run.out)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_what_is_held_out_is_never_trained_on(tmp_path):
    """Where a shorter set is begun again, the examples held out of its first round do not come back."""
    for name, count in (("short", 12), ("long", 60)):
        turns = ([("user", f"{name} {i}"), ("assistant", f"{i} it is")] for i in range(count))
        rows = [{"messages": [{"role": role, "content": content} for role, content in own]} for own in turns]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = tuple(f"messages:{tmp_path / name}.jsonl" for name in ("short", "long"))
    wanted = recipe(tmp_path, data=sets, until="all", held_out=8, packing=False, language="all")
    tokenizer = Tokenizer.from_folder(RANDOM)
    prepared = prepare(wanted, tokenizer, [RANDOM / "tokenizer.json"], lambda count: None)
    held_out, train = ({tuple(row) for row in some["input_ids"]} for some in (prepared.held_out, prepared.train))
    assert len(held_out) == 8 and len(train) == 64 and not held_out & train and len(prepared.train) > 64
    used = [found["used"] for found in prepared.report["sets"]]
    assert sum(found["examples"] for found in used) == len(prepared.train)  # repeated ones as often as they come
    assert sum(found["tokens"] for found in used) == sum(map(len, prepared.train["input_ids"]))


def test_the_disk_may_be_full_for_torch_too(tmp_path):
    """torch.save's own word for a full disk is the same sentence; other errors pass."""
    run = recipe(tmp_path)
    with pytest.raises(Zamba2Error, match="is full; free some space"), module._sentences(run, Progress()):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 2")
    with pytest.raises(RuntimeError, match="other"), module._sentences(run, Progress()):
        raise RuntimeError("another")
