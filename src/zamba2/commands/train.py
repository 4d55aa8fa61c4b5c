"""``zamba2 train``: what training data looks like once it is filtered, tokenized and masked; and the two stages."""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zamba2.commands import interrupts_raise, need, seen
from zamba2.config import Config
from zamba2.errors import Zamba2Error, install
from zamba2.language.messages import brief
from zamba2.language.tokenizer import Tokenizer
from zamba2.train.data import Example, Filters, Part, Prompts, Reader, check_parts, evaluation_prompts, mix
from zamba2.train.masks import Masked
from zamba2.weights.hub import resolve

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["demonstration", "preview", "stage"]

OPEN, CLOSE = "«", "»"  # around what is trained on, where there are no colours
# Styles in turn, so that each token is seen.
TRAINED, CONTEXT = ("black on green", "black on bright_green"), ("default", "dim")


def preview(
    sets: Sequence[str], model: str, *, count: int, rows: int, seed: int, max_tokens: int, language: str, ties: bool,
    against: Sequence[Path], as_json: bool, revision: str | None, offline: bool,
) -> None:  # fmt: skip
    """Read up to ``rows`` rows of each set (0: all); print ``count`` examples drawn by weight, what was kept, and why the rest was not.

    Raises Zamba2Error.
    """
    parts = [Part.parse(written) for written in sets]
    kind = check_parts(parts)
    for part in parts:
        if part.path is None and offline:
            raise Zamba2Error(f"{part.label} is read from the Hub; leave out --offline, or give its files as {part.label}:PATH.")
    path = resolve(model, revision=revision, offline=offline, weights=False)
    if path.is_file():
        raise Zamba2Error(f"{path} is a standalone file; a checkpoint folder with a tokenizer.json is needed.")
    config = Config.from_file(path / "config.json") if (path / "config.json").exists() else None
    tokenizer = Tokenizer.from_folder(path, config=config)
    prompts = Prompts(itertools.chain.from_iterable(map(evaluation_prompts, against)))
    filters = Filters(language=None if language == "all" else language, max_tokens=max_tokens, ties=ties)
    readers = [Reader(part, tokenizer, filters, prompts, rows or None) for part in parts]
    samples = [sample(reader, f"{seed} {i}", count) for i, reader in enumerate(readers)]
    drawn = mix([opener(examples) for examples in samples], [part.weight for part in parts], seed=seed) if count else iter(())
    examples = list(itertools.islice(drawn, count))
    if as_json:
        report = [{"set": reader.part.label, "weight": reader.part.weight, **reader.tally.to_dict()} for reader in readers]
        print(json.dumps({"kind": kind, "sets": report, "examples": [as_data(example) for example in examples]}))
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    for number, example in enumerate(examples, 1):
        print_example(console, number, example)
    print_report(console, readers)


def stage(name: str, recipe: str, changes: Sequence[str], *, resume: bool, show: bool) -> None:
    """Train by a recipe with changes. show: print it instead. Raises Zamba2Error."""
    need("training", "train", "pydantic", "yaml")
    from zamba2.train.recipe import read_recipe

    wanted = read_recipe(recipe, changes, stage=name)
    if show:
        print(wanted.to_yaml(), end="")
        return
    prepare_libraries()
    from zamba2.train.run import run

    interrupts_raise()  # what is half written is deleted, and it is said how to go on
    folder = run(wanted, resume=resume)
    if os.environ.get("RANK", "0") == "0":  # several processes are one run
        print(folder)


def demonstration(out: Path, changes: Sequence[str], *, small: float, processes: int) -> None:
    """Build the demonstration model. small: the share of everything to use; processes: for training. Raises Zamba2Error."""
    need("training", "train", "pydantic", "yaml")
    prepare_libraries()
    from zamba2.train.demo import Sizes, build

    sizes = Sizes(**{name: max(8, round(size * small)) for name, size in asdict(Sizes()).items()})
    print(build(out, sizes=sizes, changes=changes, processes=processes, say=lambda line: print(line, file=sys.stderr, flush=True)))


def prepare_libraries() -> None:
    """Import trl and transformers, without what they tell each other, and us, of what is deprecated. Raises Zamba2Error."""
    need("training", "train", "torch", "trl", "peft", "datasets")
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        import zamba2.train.run  # noqa: F401
    except (AttributeError, ImportError) as error:  # other versions than pip would have chosen
        raise Zamba2Error(f"the installed libraries do not fit together ({brief(error)}); {install('train')}.") from None


def opener(examples: Sequence[Example]) -> Callable[[int], Iterable[Example]]:
    return lambda round: examples


def sample(examples: Iterable[Example], seed: str, count: int) -> list[Example]:
    """``count`` of the examples at random, in random order; all are read, but only so many held."""
    rng, held = random.Random(seed), list[Example]()
    for number, example in enumerate(examples):
        if len(held) < count:
            held.append(example)
        elif (i := rng.randrange(number + 1)) < count:
            held[i] = example
    rng.shuffle(held)
    return held


def sides(example: Example) -> dict[str, Masked]:
    """The tokenized conversations of an example by name."""
    masked = example.masked
    if masked is None:
        return {}
    return {"messages": masked} if isinstance(masked, Masked) else {"chosen": masked.chosen, "rejected": masked.rejected}


def as_data(example: Example) -> dict[str, Any]:
    """An example as plain JSON data: the messages, and each side's text, ids and mask."""
    tokens = {name: {"text": s.text, "ids": s.ids.tolist(), "loss": s.loss.tolist()} for name, s in sides(example).items()}
    return {"set": example.part.label, "place": example.place, **example.data, "tokens": tokens}


def pieces(masked: Masked) -> Iterator[tuple[str, bool]]:
    """The text each token stands for, and whether it is trained on; "" for all but the first of one character's tokens."""
    done = 0
    for (_, end), loss in zip(masked.offsets.tolist(), masked.loss.tolist(), strict=True):
        piece = masked.text[done : max(done, end)]
        yield seen(piece), loss
        done = max(done, end)


def print_example(console: Console, number: int, example: Example) -> None:
    from rich.text import Text

    for name, masked in sides(example).items():
        side = "" if name == "messages" else f", {name}"
        head = f"{number}{side}: {example.place}; {int(masked.loss.sum())} of {len(masked)} tokens are trained on"
        console.print(Text(head, style="bold"), soft_wrap=True)
        shown, before = Text(), False
        for turn, (piece, loss) in enumerate(pieces(masked)):
            if not console.color_system and loss != before:
                shown.append(OPEN if loss else CLOSE)
            shown.append(piece, (TRAINED if loss else CONTEXT)[turn % 2] if console.color_system else "")
            before = loss
        if before and not console.color_system:
            shown.append(CLOSE)
        console.print(shown, soft_wrap=True)


def print_report(console: Console, readers: Sequence[Reader]) -> None:
    """A table: for each set what was read and kept, and beneath it what was dropped, by reason."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    table.add_column("set", overflow="fold")
    for name in ("read", "kept", "dropped", "tokens", "trained on"):
        table.add_column(name, justify="right", no_wrap=True)
    for reader in readers:
        part, tally = reader.part, reader.tally
        label = part.source.name + ("" if part.path is None else f":{part.path.name}") + ("" if part.weight == 1 else f"={part.weight:g}")
        counts = [f"{tally.read:,}{'' if tally.whole else '+'}", *(f"{n:,}" for n in (tally.kept, tally.read - tally.kept, tally.tokens))]
        table.add_row(label, *counts, f"{tally.trained / max(tally.tokens, 1):.0%}")
        for reason, number in tally.dropped.most_common():
            table.add_row(f"  {reason}", "", "", f"{number:,}")
    console.print(table)
    if not all(reader.tally.whole for reader in readers):
        console.print("+: there is more; --rows 0 reads all.")
