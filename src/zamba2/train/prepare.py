"""From a recipe's data sets to what a trainer reads: tokenized, masked and packed once.

Kept in the user's cache under a hash of all that decides it, 8 bytes a token (pairs: 4), until no run has used it for 30 days.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zamba2.errors import Zamba2Error
from zamba2.language.tokenizer import Tokenizer
from zamba2.train.data import Example, Filters, Part, Prompts, Reader, Tally, check_parts, evaluation_prompts, local_files, mixture
from zamba2.train.masks import Masked, MaskedPair
from zamba2.train.packing import IGNORED, pack
from zamba2.train.recipe import Recipe
from zamba2.weights.files import write_text
from zamba2.weights.hub import cache_folder

__all__ = ["Prepared", "prepare"]

KEPT_DAYS = 30  # without use
VERSION = 2  # of what is written; another one is prepared anew


@dataclass(frozen=True)
class Prepared:
    """train, held_out: datasets.Dataset of packed rows {"input_ids", "labels", "lengths"} or pairs {"prompt_ids", "chosen_ids",
    "rejected_ids"}; held_out is None where nothing is held out. report: what was read, kept and dropped, by set."""

    train: Any
    held_out: Any
    report: dict[str, Any]


def prepare(recipe: Recipe, tokenizer: Tokenizer, tokenizer_files: Iterable[Path], progress: Callable[[int], None]) -> Prepared:
    """Tokenize, filter, mix and pack a recipe's data, or take what an earlier run with the same data and settings left.

    progress: told the number of examples so far. Raises Zamba2Error for what ``Reader`` raises it for, for sets of another stage, and
    when nothing is left to train on.
    """
    parts = [Part.parse(written) for written in recipe.data]
    kind = check_parts(parts)
    if kind != recipe.stage:
        raise Zamba2Error(f"{parts[0].label} is for {kind} and the recipe for {recipe.stage}; use data of its stage.")
    key = _key(recipe, parts, tokenizer, tokenizer_files)
    folder = cache_folder() / "train" / key
    if not (folder / "report.json").is_file():
        _write(recipe, parts, tokenizer, folder, progress)
    with suppress(OSError):  # of a cache that is not ours to change
        os.utime(folder)
    _forget_unused(folder.parent)
    from datasets import Dataset

    report = json.loads((folder / "report.json").read_text())
    train, held_out = (Dataset.from_file(str(folder / f"{name}.arrow")) if report[name] else None for name in ("train", "held_out"))
    for name, dataset in (("train", train), ("held_out", held_out)):
        if dataset is not None:
            # trl keeps reference log-probabilities under this and the model's hash
            dataset._fingerprint = f"{key}-{name}-{recipe.precision}"
    return Prepared(train, held_out, report)


def _key(recipe: Recipe, parts: list[Part], tokenizer: Tokenizer, tokenizer_files: Iterable[Path]) -> str:
    """A hash of the data, the tokenizer and the settings that decide the examples."""
    settings: dict[str, Any] = recipe.model_dump(
        mode="json", include={"stage", "data", "until", "examples", "held_out", "language", "ties", "max_tokens", "packing", "seed"}
    )
    files = [file for part in parts if part.path is not None for file in local_files(part)]
    settings["files"] = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in [*files, *recipe.against]]
    settings["tokenizer"] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in tokenizer_files] + [tokenizer.chat_template]
    settings["version"] = VERSION
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _write(recipe: Recipe, parts: list[Part], tokenizer: Tokenizer, folder: Path, progress: Callable[[int], None]) -> None:
    from datasets.arrow_writer import ArrowWriter
    from datasets.features import Features, List, Value

    prompts = Prompts(itertools.chain.from_iterable(map(evaluation_prompts, recipe.against)))
    filters = Filters(language=None if recipe.language == "all" else recipe.language, max_tokens=recipe.max_tokens, ties=recipe.ties)
    readers = [Reader(part, tokenizer, filters, prompts) for part in parts]
    examples = itertools.islice(_counted(mixture(readers, seed=recipe.seed, until=recipe.until), progress), recipe.examples)
    columns = ("input_ids", "labels", "lengths") if recipe.stage == "sft" else ("prompt_ids", "chosen_ids", "rejected_ids")
    features = Features({name: List(Value("int32")) for name in columns})
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".partial.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        temporary.mkdir()  # in here: Ctrl-C may come as soon as it is there
        report: dict[str, Any] = {}
        kept: set[tuple[str, str]] = set()
        held_out = _remembered(itertools.islice(examples, recipe.held_out), kept)
        others = (example for example in examples if (example.part.label, example.place) not in kept)  # a set that is begun again has them
        used = {id(part): Tally() for part in parts}  # readers are ahead of what is drawn from them
        for name, some in (("held_out", held_out), ("train", _tallied(others, used))):
            report[name] = 0
            with ArrowWriter(path=str(temporary / f"{name}.arrow"), features=features) as writer:
                for row in _rows(recipe, some):
                    writer.write(row)
                    report[name] += 1
                if report[name]:
                    writer.finalize()
        if not report["train"]:
            raise Zamba2Error(f"nothing is left to train on: held_out is {recipe.held_out} and there are no more examples; lower it.")
        report["sets"] = [
            {"set": reader.part.label, "weight": reader.part.weight, **reader.tally.to_dict(), "used": _amounts(used[id(reader.part)])}
            for reader in readers
        ]
        write_text(temporary / "report.json", json.dumps(report, indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _forget_unused(folder: Path) -> None:
    """Delete prepared data that no run has begun with for KEPT_DAYS, and what killed ones left half written."""
    for path in folder.iterdir():
        with suppress(OSError):  # another run's, which does the same
            if time.time() - path.stat().st_mtime > KEPT_DAYS * 24 * 60 * 60:
                shutil.rmtree(path)


def _counted(examples: Iterable[Example], progress: Callable[[int], None]) -> Iterator[Example]:
    for number, example in enumerate(examples, 1):
        if number % 100 == 0:
            progress(number)
        yield example


def _remembered(examples: Iterable[Example], places: set[tuple[str, str]]) -> Iterator[Example]:
    for example in examples:
        places.add((example.part.label, example.place))
        yield example


def _tallied(examples: Iterable[Example], used: Mapping[int, Tally]) -> Iterator[Example]:
    for example in examples:
        used[id(example.part)].keep(example.masked)
        yield example


def _amounts(tally: Tally) -> dict[str, int]:
    return {"examples": tally.kept, "tokens": tally.tokens, "trained": tally.trained}


def _rows(recipe: Recipe, examples: Iterable[Example]) -> Iterator[Mapping[str, Any]]:
    if recipe.stage == "dpo":
        for example in examples:
            assert isinstance(example.masked, MaskedPair)
            yield pair_row(example.masked)
        return
    documents = ({"input_ids": m.ids.tolist(), "labels": labels(m)} for m in map(_masked, examples))
    if recipe.packing:
        yield from pack(documents, recipe.max_tokens)
    else:
        for document in documents:
            yield {**document, "lengths": [len(document["input_ids"])]}


def _masked(example: Example) -> Masked:
    assert isinstance(example.masked, Masked)
    return example.masked


def labels(masked: Masked) -> list[int]:
    """The ids where the token is a target, IGNORED elsewhere."""
    found: list[int] = np.where(masked.loss, masked.ids, IGNORED).tolist()
    return found


def pair_row(masked: MaskedPair) -> dict[str, list[int]]:
    """A preference as trl's DPO collator reads it: the prompt's ids, and the two answers' up to their end token.

    Both answers start where the two conversations part from the prompt as it is asked: a token that holds characters of both sides
    belongs to the answer. Raises Zamba2Error when an answer begins elsewhere.
    """
    prompt = masked.prompt.tolist()
    rows = {"prompt_ids": prompt}
    for name, side in (("chosen_ids", masked.chosen), ("rejected_ids", masked.rejected)):
        ids = side.ids.tolist()
        if ids[: len(prompt)] != prompt:
            raise Zamba2Error("a prompt's tokens change with its answer; the chat template must end prompts in a token of their own.")
        last = max(i for i, target in enumerate(side.loss.tolist()) if target)
        rows[name] = ids[len(prompt) : last + 1]
    return rows
