"""The demonstration model: a small Zamba2 trained from nothing by the recipes ``demo-*``, on a subject narrow enough to be good at.

    base/       config.json, new weights, and a tokenizer learned from the generator's text
    data/       what ``zamba2.train.instructions`` generates: pretrain.jsonl, sft.jsonl, practice.jsonl; pairs.jsonl, sampled from the SFT
                model, and pairs2.jsonl, from what the first round of DPO made of it
    pretrain/, sft/, practice/, dpo/, dpo2/     the runs; practice is SFT's second part
    averaged/, averaged2/     the models between each round's first and last
    q4/                       that model for 4 bits, trained to say in them what it says
    report.json               what was measured on held-out prompts after each stage and in each format
    model/                    the result, in q8, with its card
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zamba2.api import load
from zamba2.config import Config
from zamba2.errors import Zamba2Error
from zamba2.evaluate.perplexity import log_probabilities
from zamba2.language.messages import CHATML
from zamba2.language.model import LanguageModel
from zamba2.runtime.processors import machine
from zamba2.train.instructions import KINDS, Task, documents, passes, tasks
from zamba2.train.progress import read_metrics
from zamba2.weights.files import replacing, write_text
from zamba2.weights.formats import format_named
from zamba2.weights.packed import is_packed, quantize

__all__ = ["CONFIG", "Sizes", "answers", "bootstrap", "build", "measure"]

SEED = 2024
SPECIAL = ("[PAD]", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2 as in the instruct checkpoints
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
LONGEST = 120  # tokens of an answer
WEAK = 0.3  # a kind of task below it is named
TOGETHER = 32  # prompts in a batch
FEWEST_PAIRS = 100  # of the model's own answers
TEXT = 0.04  # texts to each conversation in SFT; about a tenth of its tokens
# What each run begins with. Behind a round of DPO comes the average of its weights and those.
SOURCES = {
    "pretrain": "base", "sft": "pretrain/model", "practice": "sft/model", "dpo": "practice/model", "dpo2": "averaged/model",
    "q4": "averaged2/model",
}  # fmt: skip
AVERAGES = {"dpo": "averaged", "dpo2": "averaged2"}
# What takes more practice than the rest: in SFT, and in its second part, where tables are learned by heart.
PRACTICE = (*["arithmetic"] * 16, *["spell"] * 16)
MORE = (*["arithmetic"] * 3, *["spell"] * 2, "follow_up", "words", "sentences", "sort", "compare")
# What DPO is for: kinds with many right answers, which the checkers tell apart. Sums, counts and spelling have one, learned by heart, and
# moving others away from it only shakes it (docs/log.md).
CHOOSING = ("words", "sentences", "combined", "compare", "sort", "bullets", "story", "pick")
AVERAGE = 0.3  # of a round's weights in its result, the rest are those it began with: most of what it gains, and little of what it forgets
SAMPLES = 3  # answers sampled beside the greedy one, to make a pair of

# Everything the 2.7B has, small: two shared blocks used in turn (A B A B), adapters per position, several heads.
CONFIG = Config(
    hidden_size=128, num_hidden_layers=8, vocab_size=4096, hybrid_layer_ids=(1, 3, 5, 7), num_mem_blocks=2, mamba_d_state=32,
    n_mamba_heads=4, num_attention_heads=4, num_key_value_heads=4, intermediate_size=512, chunk_size=64, adapter_rank=16,
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """How much of everything: texts to learn the tokenizer from, documents and conversations to learn from, prompts to sample pairs for,
    prompts and texts to measure on."""

    vocabulary: int = 50_000
    documents: int = 40_000
    conversations: int = 300_000
    practice: int = 150_000
    prompts: int = 50_000  # for each round of DPO
    held_out: int = 2_000
    texts: int = 200


def build(
    folder: Path, *, sizes: Sizes | None = None, changes: Sequence[str] = (), processes: int = 1, say: Callable[[str], None] = print
) -> Path:
    """Train the demonstration model in ``folder``, or go on where an earlier try stopped. Returns the folder of the result.

    changes: to the recipes, KEY=VALUE. processes: to share each training step. Raises Zamba2Error.
    """
    from zamba2.train.recipe import read_recipe

    sizes = sizes or Sizes()
    for change in changes:
        if (field := change.partition("=")[0]) in ("data", "model", "out"):
            raise Zamba2Error(f"{field} cannot be changed: each stage has its own; name the folder first, as in zamba2 train demo FOLDER.")
    counts = {"pretrain": sizes.documents, "sft": sizes.conversations} | dict.fromkeys(AVERAGES, sizes.prompts)

    def recipe(stage: str) -> tuple[str, list[str]]:  # its name, and what differs from it
        held_out, data = counts.get(stage, sizes.practice) // 200 or 1, json.dumps(data_of(stage, folder / "data"))
        own = [f"model={folder / SOURCES[stage]}", f"out={folder / stage}", f"data={data}", f"held_out={held_out}"]
        return "demo-dpo" if stage in AVERAGES else f"demo-{stage}", [*own, *changes]

    for stage in SOURCES:
        read_recipe(*recipe(stage))  # what cannot be is said before anything is written
    write_base(folder / "base", sizes.vocabulary)
    write_data(folder / "data", sizes)
    for stage, source in SOURCES.items():
        if stage in AVERAGES:
            write_pairs(folder, stage, sizes, say, processes)
        out = folder / stage
        if not (out / "model" / "tokenizer.json").exists():
            say(f"training: {stage}")
            train(*recipe(stage), out, processes)
        if stage in AVERAGES:
            average(folder / source, out / "model", folder / AVERAGES[stage] / "model")
    report = write_report(folder, sizes, say)
    target = folder / "model"
    shutil.copytree(packed(folder, "averaged2", "q8"), target, dirs_exist_ok=True)
    write_text(target / "README.md", card(report))
    return target


def data_of(stage: str, folder: Path) -> list[str]:
    """What a stage learns from. Without some text among the conversations the language of the texts is forgotten (docs/log.md)."""
    return {
        "pretrain": [f"text:{folder}/pretrain.jsonl"],
        "sft": [f"messages:{folder}/sft.jsonl", f"text:{folder}/pretrain.jsonl={TEXT}"],
        "practice": [f"messages:{folder}/practice.jsonl", f"text:{folder}/pretrain.jsonl={TEXT}"],
        "dpo": [f"preferences:{folder}/pairs.jsonl"],
        "dpo2": [f"preferences:{folder}/pairs2.jsonl"],
        "q4": [f"messages:{folder}/practice.jsonl"],
    }[stage]


def train(name: str, changes: Sequence[str], out: Path, processes: int) -> None:
    """Run one of our recipes, or go on with it, here or in several processes. Raises Zamba2Error."""
    from zamba2.train.recipe import read_recipe
    from zamba2.train.run import checkpoints, run

    recipe, resume = read_recipe(name, changes), bool(checkpoints(out))
    if processes == 1:
        run(recipe, resume=resume)
        return
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "zamba2"]
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    command = [sys.executable, *launch, "train", recipe.stage, name, *changes, *(["--resume"] if resume else [])]
    if code := subprocess.run(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": threads}).returncode:
        raise Zamba2Error(f"training {name} in {processes} processes ended with exit code {code}; what they said stands above.")


# ---- what it learns from ---------------------------------------------------------------------------------------------


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """A file of JSON lines; one that is there already stays."""
    if not path.exists():
        with replacing(path) as place, place.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def write_data(folder: Path, sizes: Sizes) -> None:
    """pretrain.jsonl, sft.jsonl and practice.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "pretrain.jsonl", ({"text": text} for text in itertools.islice(documents(SEED, split="train"), sizes.documents)))
    for name, extra, count in (("sft", MORE, sizes.conversations), ("practice", PRACTICE, sizes.practice)):
        chats = itertools.islice(tasks(SEED if name == "sft" else f"{name} {SEED}", split="train", kinds=[*KINDS, *extra]), count)
        write_lines(folder / f"{name}.jsonl", ({"messages": task.messages} for task in chats))


def write_pairs(folder: Path, stage: str, sizes: Sizes, say: Callable[[str], None], processes: int) -> None:
    """A round's pairs: a right and a wrong answer of its first model's own, the greedy one among them, to each prompt that has both.

    Answers that the model would not give itself teach it nothing here but to give up what it knows (docs/log.md). A model that gives no
    right ones at all, as after a hundredth of the training, gets the generator's.
    """
    number = stage.removeprefix("dpo")
    path, model = folder / "data" / f"pairs{number}.jsonl", Path(SOURCES[stage]).parent.name
    if path.exists():
        return
    say(f"sampling {model}; the checkers choose")
    asked = list(itertools.islice(tasks(" ".join(["pairs", *number, str(SEED)]), split="train", kinds=CHOOSING), sizes.prompts))
    rng = random.Random(SEED)
    every = list(zip(asked, sampled(packed(folder, model, "bf16"), asked, processes), strict=True))
    rows = [row for task, texts in every if (row := pair(task, texts, rng)) is not None]
    if len(rows) < FEWEST_PAIRS:
        say(f"{len(rows)} prompts have a right and a wrong answer of the model's; the generator's answers are taken as the right ones")
        rows = [row for task, texts in every if (row := pair(task, [*texts, task.messages[-1]["content"]], rng)) is not None]
    say(f"{len(rows)} pairs of answers to {len(asked)} prompts")
    write_lines(path, rows)


def sampled(model: Path, asked: Sequence[Task], processes: int = 1) -> list[tuple[str, ...]]:
    """The greedy answer to each task, then ``SAMPLES`` others; the same however many processes share the work."""
    share = math.ceil(len(asked) / processes / TOGETHER) * TOGETHER
    starts = range(0, len(asked), share)
    given = [(model, asked[start : start + share], [i * len(asked) + start for i in range(SAMPLES)]) for start in starts]
    if processes == 1:
        return list(itertools.chain.from_iterable(itertools.starmap(_sampled, given)))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        return list(itertools.chain.from_iterable(pool.map(_sampled, *zip(*given, strict=True))))


def _sampled(folder: Path, asked: Sequence[Task], seeds: Sequence[int]) -> list[tuple[str, ...]]:
    model = load(folder, threads=1)  # more only wait for each other on so small a model
    others = (answers(model, asked, temperature=1.0, seed=seed) for seed in seeds)
    return list(zip(answers(model, asked), *others, strict=True))


def pair(task: Task, given: Sequence[str], rng: random.Random) -> dict[str, Any] | None:
    """A row of preferences out of the answers given to a task, the first of them where it can be; None if all are right or all wrong."""
    told = [(text, passes(task.check, text)) for text in dict.fromkeys(given) if text.strip()]
    sides = [[text for text, right in told if right is wanted] for wanted in (True, False)]
    if not all(sides):
        return None
    chosen, rejected = (given[0] if given[0] in side else rng.choice(side) for side in sides)
    return {"prompt": task.messages[:-1], "chosen": chosen, "rejected": rejected}


def average(before: Path, after: Path, target: Path, share: float = AVERAGE) -> None:
    """A model between two of the same shape, ``share`` of the way (Wortsman et al. 2022, Robust fine-tuning of zero-shot models, eq. 1);
    one that is there already stays."""
    from safetensors.torch import load_file, save_file

    if (target / "model.safetensors").exists():
        return
    shutil.copytree(after, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    mixed = {name: old[name].float().lerp(new[name].float(), share).to(new[name].dtype) for name in new}
    with replacing(target / "model.safetensors") as place:
        save_file(mixed, place, metadata={"format": "pt"})


def learn_tokenizer(lines: Iterable[str], vocab_size: int) -> dict[str, Any]:
    """A BPE with byte fallback in the style of Mistral v0.1, as tokenizer.json holds it: no piece spans two words, joins letters and
    punctuation, or holds three digits: numbers below 100, which sums are made of, are one token each."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # While learning only, as in SentencePiece.
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Split(Regex("▁?[0-9]{1,2}"), "isolated"),
        ]
    )
    learner.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[*SPECIAL, *BYTES],
            initial_alphabet=["▁", *map(chr, range(33, 127))],
            limit_alphabet=110,
            show_progress=False,
        ),
    )
    learnt = json.loads(learner.to_str())["model"]
    final = Tokenizer(models.BPE(byte_fallback=True))
    final.normalizer = learner.normalizer
    final.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    final.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[1]} $A",
        pair=f"{SPECIAL[1]} $A {SPECIAL[1]}:1 $B:1",
        special_tokens=[(SPECIAL[1], 1)],
    )
    document: dict[str, Any] = json.loads(final.to_str())
    document["model"] |= {"vocab": learnt["vocab"], "merges": learnt["merges"]}
    document["added_tokens"] = [
        {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for i, text in enumerate(SPECIAL)
    ]
    return document


def tokenizer_settings(config: Config) -> dict[str, Any]:
    """tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
        "chat_template": CHATML,
    }


def write_base(folder: Path, texts: int) -> None:
    """config.json, new weights and the tokenizer's files, which is learnt from so many texts; what is there already stays."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "tokenizer.json").exists():
        return

    def lines() -> Iterator[str]:
        for task in itertools.islice(tasks(f"tokenizer {SEED}", split="train"), texts * 4 // 5):
            for message in task.messages:
                yield from message["content"].split("\n")
        for text in itertools.islice(documents(f"tokenizer {SEED}", split="train"), texts // 5):
            yield from text.split("\n")

    ids = {"bos_token_id": CONFIG.bos_token_id, "eos_token_id": CONFIG.eos_token_id, "pad_token_id": CONFIG.pad_token_id}
    new_weights(CONFIG).save_pretrained(folder)
    files = {"config.json": CONFIG.to_dict(), "generation_config.json": ids, "tokenizer_config.json": tokenizer_settings(CONFIG)}
    for name, content in (files | {"tokenizer.json": learn_tokenizer(lines(), CONFIG.vocab_size)}).items():
        write_text(folder / name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def new_weights(config: Config) -> Any:
    """A Zamba2ForCausalLM whose every product keeps its input's variance.

    The usual 0.02 is right for 2.7B's width alone: at 128 a shared block's output, a product of two small numbers that no residual
    connection goes around, would start as nothing, and copying would be learned twice as late (docs/log.md).
    """
    import torch
    from transformers import Zamba2Config

    from zamba2.hf import Zamba2ForCausalLM

    torch.manual_seed(SEED)
    model = Zamba2ForCausalLM(Zamba2Config.from_dict(config.to_dict()))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:  # (out, in), (vocabulary, hidden) or (channels, 1, taps)
                weight.normal_(std=weight.shape[-1] ** -0.5)
    return model


# ---- what it can do --------------------------------------------------------------------------------------------------


def answers(model: LanguageModel, asked: Sequence[Task], *, temperature: float = 0.0, seed: int | None = None) -> list[str]:
    """The model's answer to each task's conversation but its last message. seed: of the first batch; each task further adds one."""
    given: list[str] = []
    for start in range(0, len(asked), TOGETHER):
        prompts = [model.tokenizer.encode_chat(task.messages[:-1]) for task in asked[start : start + TOGETHER]]
        own = None if seed is None else seed + start
        given += [answer.text for answer in model.generate(prompts, max_tokens=LONGEST, temperature=temperature, seed=own)]
    return given


def bootstrap(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean and its 95 % interval, by resampling."""
    array = np.asarray(values, np.float64)
    means = array[np.random.default_rng(0).integers(len(array), size=(2000, len(array)))].mean(1)
    return float(array.mean()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def measure(model: LanguageModel, asked: Sequence[Task], texts: Sequence[str]) -> dict[str, Any]:
    """Accuracy by kind and in all with 95 % intervals, whether each answer passes, the answers, and the perplexity per token of texts."""
    given = answers(model, asked)
    right = [passes(task.check, text) for task, text in zip(asked, given, strict=True)]
    kinds: dict[str, list[float]] = {}
    for task, good in zip(asked, right, strict=True):
        kinds.setdefault(task.kind, []).append(float(good))
    return {
        "all": bootstrap([float(good) for good in right]),
        "kinds": {kind: bootstrap(values) for kind, values in sorted(kinds.items())},
        "right": right,
        "answers": given,
        "perplexity": perplexity(model, texts),
    }


def perplexity(model: LanguageModel, texts: Sequence[str]) -> float:
    """exp of the mean negative log-probability of each text's tokens, its end token among them."""
    found = []
    for text in texts:
        ids = np.array([*model.tokenizer.encode(text), model.tokenizer.eos_token_ids[0]], np.int32)
        found += [scores[np.arange(len(targets)), targets] for scores, targets in log_probabilities(model, ids)]
    return math.exp(-float(np.concatenate(found).mean()))


def packed(folder: Path, stage: str, format: str) -> Path:
    """A stage's model in a packed format."""
    target = folder / "packed" / f"{stage}-{format}"
    if not is_packed(target):
        quantize(folder / stage / "model", target, format_named(format))
    return target


def trained(run: Path) -> dict[str, Any]:
    """What a run's folder says of it: seconds of training, steps, tokens read and processors."""
    lines = read_metrics(run / "metrics.jsonl")
    tokens = max((line.get("num_tokens", 0) for line in lines), default=0)
    versions = json.loads((run / "versions.json").read_text(encoding="utf-8"))
    return {"seconds": lines[-1]["seconds"], "steps": lines[-1]["step"], "tokens": tokens, "processors": versions["processors"]}


def write_report(folder: Path, sizes: Sizes, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure each stage, and the last one in each format, on prompts never trained on; report.json."""
    place = folder / "report.json"
    if place.exists():
        report: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        return report
    asked = list(itertools.islice(tasks(f"test {SEED}", split="test"), sizes.held_out))
    texts = list(itertools.islice(documents(f"test {SEED}", split="test"), sizes.texts))
    found: dict[str, Any] = {}
    for name, source, format in (
        ("pretrain", "pretrain", "bf16"), ("sft", "practice", "bf16"), ("dpo", "averaged2", "bf16"),
        ("dpo q8", "averaged2", "q8"), ("dpo q4", "q4", "q4"),
    ):  # fmt: skip
        found[name] = measure(load(packed(folder, source, format), threads=1), asked, texts)
        mean, low, high = found[name]["all"]
        say(f"{name}: {mean:.1%} of {len(asked)} held-out prompts ({low:.1%} to {high:.1%}), perplexity {found[name]['perplexity']:.2f}")
    report = {
        "stages": found,
        "runs": {stage: trained(folder / stage) for stage in SOURCES},
        "machine": machine(),
        "tasks": [{"kind": task.kind, "messages": task.messages, "check": task.check} for task in asked],
    }
    write_text(place, json.dumps(report))
    return report


def compared(report: dict[str, Any]) -> str:
    """A table of what DPO gained and what packing costs, on the first 1,000 prompts and on all."""
    right = {name: np.asarray(stage["right"], np.float64) for name, stage in report["stages"].items()}
    rows = ["| prompts | sft | dpo | dpo - sft | q8 - bf16 | q4 - bf16 |", "|---|---|---|---|---|---|"]
    whole = len(report["tasks"])
    for count in sorted({min(1000, whole), whole}):
        own = {name: values[:count] for name, values in right.items()}
        cells = [f"all {count}" if count == whole else f"first {count}", *(f"{own[name].mean():.1%}" for name in ("sft", "dpo"))]
        for name, other in (("dpo", "sft"), ("dpo q8", "dpo"), ("dpo q4", "dpo")):
            mean, low, high = bootstrap((own[name] - own[other]).tolist())
            cells.append(f"{mean:+.1%} ({low:+.1%} to {high:+.1%})")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def card(report: dict[str, Any]) -> str:
    """The model card, from what was measured."""
    stages, names = report["stages"], ("pretrain", "sft", "dpo", "dpo q8", "dpo q4")

    def cell(values: Sequence[float]) -> str:
        return f"{values[0]:.1%} ({values[1]:.0%} to {values[2]:.0%})"

    head = "| | " + " | ".join(names) + " |\n|---|" + "---|" * len(names)
    rows = [f"| {kind} | " + " | ".join(cell(stages[n]["kinds"][kind]) for n in names) + " |" for kind in stages["sft"]["kinds"]]
    rows.append("| **all** | " + " | ".join(cell(stages[n]["all"]) for n in names) + " |")
    rows.append("| perplexity of held-out text | " + " | ".join(f"{stages[n]['perplexity']:.2f}" for n in names) + " |")
    times = [f"{name} {run['seconds'] / 60:.0f} minutes ({run['steps']:,} steps)" for name, run in report["runs"].items()]
    talks = []
    for task, text in list(zip(report["tasks"], stages["dpo q8"]["answers"], strict=True))[:10]:
        turns = [f"> **{message['role']}:** {message['content']}" for message in task["messages"][:-1]] + [f"> **model:** {text}"]
        talks.append("\n>\n".join(turn.replace("\n", "\n> ") for turn in turns))
    weak = [f"{kind} ({own[0]:.0%})" for kind, own in stages["dpo q8"]["kinds"].items() if own[0] < WEAK]
    weakness = f" It is no good at {' and '.join(weak)}." if weak else ""
    return f"""# The demonstration model of `zamba2`

A Zamba2 of {CONFIG.num_parameters / 1e6:.1f} M parameters (two shared attention blocks in turn, adapters at each position), trained from
nothing by `zamba2 train demo`: plain text, then SFT in two parts, then DPO in two rounds, the weights of each averaged with those before
it. For 4 bits it was trained on, to say through rounded weights what it says through its own. All that it read was made by a
deterministic generator (`zamba2.train.instructions`). It follows short instructions in plain English of the kinds below, with words it
knows, and knows nothing else. It exists so that every command works before a download.

## What it can do

Greedy answers to {len(report["tasks"])} prompts whose combinations of arguments were never trained on, each held to its checker; 95 %
bootstrap intervals. It ships in q8.{weakness}

{compared(report)}

{head}
{chr(10).join(rows)}

## How long it takes

{"; ".join(times)}, on {report["machine"]}; the rest (data, sampling pairs, measuring) takes minutes.

## Ten conversations

The first ten of the held-out prompts as the q8 model answers them, unedited.

{(chr(10) * 2 + "---" + chr(10) * 2).join(talks)}

## Licence

Apache-2.0, as the rest of the package: no text of others was used.
"""
