"""Data sets for post-training: one table, and what happens to their rows until they can be trained on.

A row is read as it stands (``read_rows``), becomes messages or a preference by its set's own pure function (``SOURCES``), passes the
filters, which count what they drop and why (``Reader``), and is drawn by weight with a seed (``mix``).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from zamba2.errors import Zamba2Error
from zamba2.language.messages import brief
from zamba2.language.tokenizer import Tokenizer
from zamba2.train.masks import Masked, MaskedPair, mask_conversation, mask_pair, mask_text
from zamba2.weights.hub import quiet_retries

__all__ = [
    "SOURCES", "Example", "Filters", "Part", "Prompts", "Reader", "Source", "Tally", "Unusable", "check_parts", "evaluation_prompts",
    "local_files", "mix", "mixture", "read_rows", "shuffled",
]  # fmt: skip

Row = Mapping[str, Any]
Messages = list[dict[str, str]]
T = TypeVar("T")

FILE_KINDS = (".parquet", ".jsonl", ".json")
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
MARKS = ("<|im_start|>", "<|im_end|>")
# What a file of another split is called, on the Hub and off it.
OTHER_SPLIT = re.compile(r"(train|test|validation|valid|dev|eval)(_[a-z]+)?-\d+-of-\d+")
CALCULATIONS = re.compile(r"<<[^<>]*>>")  # GSM8K's notes for a calculator
WINDOW = 13  # words in a row that count as the same text: the custom since GPT-3
BATCH = 256  # rows of a parquet file in memory
BUFFER = 10_000  # rows that shuffling holds
CHARACTERS = 1_000_000  # in one example, far beyond any context here; chat templates are given less than five times that
END: Any = object()


class Unusable(Exception):
    """A row that cannot be trained on; ``str`` is the reason it is counted under."""


# ---- rows to messages: pure functions --------------------------------------------------------------------------------


def turns(value: Any, role: str = "role", content: str = "content", *, last: str = "assistant") -> Messages:
    """A list of {role, content} in any spelling of the two, as messages: a system message or none, then user and assistant in turn.

    An empty system message is left out. Raises Unusable unless the order is kept, the last is by ``last`` and all have text.
    """
    if not isinstance(value, (list, tuple)):
        raise Unusable("broken turns")
    messages = []
    for turn in value:
        if not isinstance(turn, Mapping) or not isinstance(turn.get(role), str) or turn[role] not in ROLES:
            raise Unusable("broken turns")
        messages.append({"role": ROLES[turn[role]], "content": text(turn.get(content), may_be_empty=turn[role] == "system")})
    if messages and messages[0]["role"] == "system" and not messages[0]["content"].strip():
        del messages[0]
    first = 1 if messages and messages[0]["role"] == "system" else 0
    if any(message["role"] != ("user", "assistant")[i % 2] for i, message in enumerate(messages[first:])):
        raise Unusable("broken turns")
    if len(messages) == first or messages[-1]["role"] != last:
        raise Unusable(f"last turn is not by the {last}")
    return messages


def text(value: Any, *, may_be_empty: bool = False) -> str:
    """The value, if it is text. Raises Unusable for null, other types, blank text, and text that no UTF-8 file holds."""
    if value is None and may_be_empty:
        return ""
    if value is None or (isinstance(value, str) and not value.strip() and not may_be_empty):
        raise Unusable("empty message")
    if not isinstance(value, str):
        raise Unusable("broken turns")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unusable("invalid Unicode") from None
    return value


def conversation(user: Any, assistant: Any, system: Any = None) -> Messages:
    """One question and its answer as messages. Raises Unusable."""
    said = [{"role": "system", "content": system}, {"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return turns(said)


def preference(chosen: Messages, rejected: Messages) -> dict[str, Messages]:
    """Two whole dialogues that differ in their last answer. Raises Unusable if they answer different prompts."""
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("chosen and rejected answer different prompts")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def from_messages(row: Row) -> dict[str, Messages]:
    """{messages: [{role, content}]}."""
    return {"messages": turns(row["messages"])}


def from_sharegpt(row: Row) -> dict[str, Messages]:
    """{conversations: [{from, value}]}."""
    return {"messages": turns(row["conversations"], "from", "value")}


def from_gsm8k(row: Row) -> dict[str, Messages]:
    """{question, answer}; the notes for a calculator, <<2*3=6>>, are left out."""
    return {"messages": conversation(row["question"], CALCULATIONS.sub("", text(row["answer"])))}


def from_self_instruct(row: Row) -> dict[str, Messages]:
    """{instruction, instances: [{input, output}]}, one instance a row."""
    instances = row["instances"]
    if not isinstance(instances, (list, tuple)) or len(instances) != 1 or not isinstance(instances[0], Mapping):
        raise Unusable("not one instance")
    given = text(instances[0].get("input"), may_be_empty=True)
    return {"messages": conversation("\n\n".join(filter(str.strip, (text(row["instruction"]), given))), instances[0].get("output"))}


def from_text(row: Row) -> dict[str, str]:
    """{text}: plain text, of which everything is learned."""
    return {"text": text(row["text"])}


def from_dialogues(row: Row) -> dict[str, Messages]:
    """{chosen, rejected}, each a whole dialogue [{role, content}]."""
    return preference(turns(row["chosen"]), turns(row["rejected"]))


def from_orca(row: Row) -> dict[str, Messages]:
    """{system, question, chosen, rejected}, all plain texts; the system message may be empty."""
    return preference(*(conversation(row["question"], row[answer], row["system"]) for answer in ("chosen", "rejected")))


def from_llama_factory(row: Row) -> dict[str, Messages]:
    """{conversations: [{from, value}], chosen: {from, value}, rejected: {from, value}}."""
    prompt = turns(row["conversations"], "from", "value", last="user")
    chosen, rejected = ([*prompt, *_said(row[answer], "from", "value")] for answer in ("chosen", "rejected"))
    return preference(turns(chosen), turns(rejected))


def from_preference(row: Row) -> dict[str, Messages]:
    """{prompt, chosen, rejected}: each a text or messages; what is chosen or rejected is the answer alone."""
    prompt = row["prompt"] if not isinstance(row["prompt"], str) else [{"role": "user", "content": row["prompt"]}]
    chosen, rejected = (
        [*turns(prompt, last="user"), *([{"role": "assistant", "content": answer}] if isinstance(answer, str) else _answers(answer))]
        for answer in (row["chosen"], row["rejected"])
    )
    return preference(turns(chosen), turns(rejected))


def _said(turn: Any, role: str, content: str) -> Messages:
    if not isinstance(turn, Mapping) or ROLES.get(str(turn.get(role))) != "assistant":
        raise Unusable("broken turns")
    return [{"role": "assistant", "content": text(turn.get(content))}]


def _answers(value: Any) -> Messages:
    if not isinstance(value, (list, tuple)) or len(value) != 1:
        raise Unusable("broken turns")
    return _said(value[0], "role", "content")


# ---- the table -------------------------------------------------------------------------------------------------------

TEXT, TURNS, NUMBER = (str,), (list,), (int, float)


@dataclass(frozen=True)
class Source:
    """A kind of data set: where it is, what its rows look like, and how they are read.

    kind: "sft" or "dpo". columns: every column and the types its values may have, null always among them. reads: the columns that
    ``convert`` needs; a file without them is not of this set. language: the column that holds a row's language. scores: the columns
    with the scores of chosen and rejected. hub: None for formats that are no one data set.
    """

    name: str
    kind: str
    convert: Callable[[Row], Mapping[str, Any]]
    columns: Mapping[str, tuple[type, ...]]
    reads: tuple[str, ...]
    hub: str | None = None
    config: str | None = None
    split: str = "train"
    language: str | None = None
    scores: tuple[str, str] | None = None


INFINITY = Source(
    "infinity", "sft", from_sharegpt,
    {"id": (int, str), "conversations": TURNS, "label": (dict, str), "langdetect": TEXT, "source": TEXT},
    ("conversations",), "BAAI/Infinity-Instruct", "7M", language="langdetect",
)  # fmt: skip
ROWS = (
    Source(
        "ultrachat", "sft", from_messages, {"prompt": TEXT, "prompt_id": TEXT, "messages": TURNS}, ("messages",),
        "HuggingFaceH4/ultrachat_200k", split="train_sft",
    ),
    INFINITY,
    *(replace(INFINITY, name=f"infinity-{config.lower()}", config=config) for config in ("3M", "0625", "Gen", "7M_domains")),
    Source(
        "ultrafeedback", "dpo", from_dialogues,
        {
            "prompt": TEXT, "prompt_id": TEXT, "chosen": TURNS, "rejected": TURNS, "messages": TURNS, "score_chosen": NUMBER,
            "score_rejected": NUMBER,
        },
        ("chosen", "rejected"), "HuggingFaceH4/ultrafeedback_binarized", split="train_prefs", scores=("score_chosen", "score_rejected"),
    ),
    Source(
        "orca", "dpo", from_orca, {"system": TEXT, "question": TEXT, "chosen": TEXT, "rejected": TEXT},
        ("system", "question", "chosen", "rejected"), "Intel/orca_dpo_pairs",
    ),
    Source(
        "openhermes", "dpo", from_dialogues,
        {
            "source": TEXT, "category": TEXT, "prompt": TEXT, "candidates_completions": TURNS, "candidate_policies": TURNS,
            "ranks": TURNS, "rank_str": TEXT, "chosen_policy": TEXT, "chosen": TURNS, "rejected_policy": TEXT, "rejected": TURNS,
        },
        ("chosen", "rejected"), "argilla/OpenHermesPreferences",
    ),
    Source("gsm8k", "sft", from_gsm8k, {"question": TEXT, "answer": TEXT}, ("question", "answer"), "openai/gsm8k", "main"),
    Source("self-instruct", "sft", from_self_instruct, {"instruction": TEXT, "instances": TURNS}, ("instruction", "instances")),
    Source("sharegpt", "sft", from_sharegpt, {"conversations": TURNS}, ("conversations",)),
    Source(
        "llama-factory", "dpo", from_llama_factory, {"conversations": TURNS, "chosen": (dict,), "rejected": (dict,)},
        ("conversations", "chosen", "rejected"),
    ),
    Source("text", "sft", from_text, {"text": TEXT}, ("text",)),
    Source("messages", "sft", from_messages, {"messages": TURNS}, ("messages",)),
    Source(
        "preferences", "dpo", from_preference, {name: (str, list) for name in ("prompt", "chosen", "rejected")},
        ("prompt", "chosen", "rejected"),
    ),
)  # fmt: skip
SOURCES = {source.name: source for source in ROWS}


@dataclass(frozen=True)
class Part:
    """One data set of a mixture: ``source``, a file or folder in the place of the Hub, and the weight it is drawn with."""

    source: Source
    path: Path | None = None
    weight: float = 1.0

    @classmethod
    def parse(cls, written: str) -> Part:
        """NAME, NAME:PATH, and either with =WEIGHT behind it. Raises Zamba2Error."""
        name, colon, path = written.partition(":")
        weight = "1"
        if colon and not Path(path).expanduser().exists() and "=" in path:
            path, _, weight = path.rpartition("=")
        elif not colon:
            name, equals, weight = name.partition("=")
            weight = weight if equals else "1"
        if name not in SOURCES:
            raise Zamba2Error(f"there is no data set {name!r}; there are {', '.join(SOURCES)}, each also as NAME:PATH.")
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and number > 0):
            raise Zamba2Error(f"the weight of {name} is {weight!r}; a number above 0 is needed, as in {name}=0.5.")
        source = SOURCES[name]
        if colon and not path:
            raise Zamba2Error(f"{written!r} names no file; give NAME:PATH with a {' or '.join(FILE_KINDS)} file or a folder of them.")
        if source.hub is None and not colon:
            raise Zamba2Error(f"{name} is a format and not on the Hub; give the file, as in {name}:data.jsonl.")
        return cls(source, Path(path).expanduser() if colon else None, number)

    @property
    def label(self) -> str:
        return self.source.name if self.path is None else f"{self.source.name}:{self.path}"


def check_parts(parts: Sequence[Part]) -> str:
    """The kind of training, "sft" or "dpo", that all parts are for. Raises Zamba2Error if they differ, for no part, or one given twice."""
    if not parts:
        raise Zamba2Error(f"there is no data set; give at least one of {', '.join(SOURCES)}.")
    first = parts[0]
    for part in parts:
        if part.source.kind != first.source.kind:
            sides = f"{first.label} is for {first.source.kind}, {part.label} for {part.source.kind}"
            raise Zamba2Error(f"{sides}; give the sets of one stage.")
    for label, times in Counter(part.label for part in parts).items():
        if times > 1:
            raise Zamba2Error(f"{label} is given {times} times; give it once, with a weight if it is to be drawn more often.")
    return first.source.kind


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_rows(part: Part) -> Iterator[tuple[str, Row]]:
    """The rows of a data set, one at a time, each with the place it stands in ("file.jsonl, row 7").

    Reads a file, all files of a folder that belong to the split, or the Hub, streamed. Raises Zamba2Error for what is missing,
    damaged, or has other columns than the set.
    """
    rows = _hub_rows(part.source) if part.path is None else _local_rows(part.source, part.path)
    for place, row in rows:
        yield place, _checked(part.source, place, row)


def _checked(source: Source, place: str, row: Any) -> Row:
    if not isinstance(row, Mapping):
        raise Zamba2Error(f"{place} is a {type(row).__name__}; an object with {', '.join(source.reads)} is needed for {source.name}.")
    for name in source.reads:
        if name not in row:
            found = brief(", ".join(map(str, row))) or "nothing"
            raise Zamba2Error(f"{place} has no {name}; rows of {source.name} have {', '.join(source.columns)}, found were {found}.")
    for name, types in source.columns.items():
        value = row.get(name)
        if value is not None and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
            wanted = " or ".join(kind.__name__ for kind in types)
            raise Zamba2Error(f"{place}: {name} is a {type(value).__name__}; rows of {source.name} have a {wanted} there.")
    return row


def _local_rows(source: Source, path: Path) -> Iterator[tuple[str, Any]]:
    readers = {".parquet": _parquet_rows, ".jsonl": _json_rows, ".json": _json_rows}
    for file in _files(source, path):
        yield from readers[file.suffix](file)


def local_files(part: Part) -> list[Path]:
    """The files a part is read from, [] for the Hub. Raises Zamba2Error."""
    return [] if part.path is None else _files(part.source, part.path)


def _files(source: Source, path: Path) -> list[Path]:
    """The data files that a path stands for: itself, or those of the source's config and split in a folder."""
    kinds = ", ".join(FILE_KINDS)
    if not path.exists():
        raise Zamba2Error(f"{path} does not exist; a file ({kinds}) or a folder of them is needed.")
    if path.is_file():
        if path.suffix not in FILE_KINDS:
            raise Zamba2Error(f"{path} is of no kind that is read; a file ({kinds}) or a folder of them is needed.")
        return [path]
    if source.config is not None and (path / source.config).is_dir():
        path = path / source.config
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix in FILE_KINDS and file.is_file() and not any(name.startswith(".") for name in file.relative_to(path).parts)
    )
    if not files:
        raise Zamba2Error(f"{path} holds no data; files ({kinds}) are needed.")
    own = [file for file in files if re.match(re.escape(source.split) + r"([-.]|$)", file.name)]
    if not own and any(OTHER_SPLIT.match(file.name) for file in files):
        raise Zamba2Error(f"{path} holds no files of the split {source.split}, but {brief(', '.join(f.name for f in files))}; add them.")
    return own or files


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a file with one JSON document a line, or with one list of them."""
    try:
        with path.open(encoding="utf-8-sig") as lines:
            if path.suffix == ".json" and lines.read(4096).lstrip()[:1] == "[":
                lines.seek(0)
                for number, row in enumerate(json.load(lines), 1):
                    yield f"{path}, row {number}", row
                return
            lines.seek(0)
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}, line {number}", _parsed(path, number, line)
    except UnicodeDecodeError as error:
        raise Zamba2Error(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8.") from None
    except OSError as error:
        raise Zamba2Error(f"{path} cannot be read ({error.strerror or error}).") from None
    except (ValueError, RecursionError) as error:
        raise Zamba2Error(f"{path} is not valid JSON ({brief(error)}); the file is damaged or cut off: get it again.") from None


def _parsed(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        what = f"{path}, line {number} is not valid JSON ({brief(error)})"
        raise Zamba2Error(f"{what}; the file is damaged or cut off: get it again.") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise _missing() from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(BATCH))
            for number, row in enumerate(rows, 1):
                yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise Zamba2Error(f"{path} is not a whole parquet file ({brief(error)}); get it again.") from None


def _hub_rows(source: Source) -> Iterator[tuple[str, Any]]:
    """Rows from the Hub as they are needed; nothing is kept on the disk."""
    try:
        import datasets
    except ImportError:
        raise _missing() from None
    quiet_retries()
    datasets.disable_progress_bars()
    number = 0
    try:
        for number, row in enumerate(datasets.load_dataset(source.hub, source.config, split=source.split, streaming=True), 1):
            yield f"{source.hub}, row {number}", row
    except datasets.exceptions.DatasetNotFoundError as error:
        gated = "gated" in str(error).lower()
        advice = "accept its terms on the Hub and set HF_TOKEN" if gated else "check the connection, or give files as NAME:PATH"
        raise Zamba2Error(f"the data set {source.hub} cannot be had ({brief(error)}); {advice}.") from None
    except Zamba2Error:
        raise
    except Exception as error:  # the library, and those under it, raise whatever happened
        what = f"reading {source.hub} from the Hub failed{f' behind row {number}' if number else ''}"
        reason = f"{type(error).__name__}: {brief(error)}"
        raise Zamba2Error(f"{what} ({reason}); try again, or give its files as {source.name}:PATH.") from None


def _missing() -> Zamba2Error:
    return Zamba2Error("reading this needs the datasets library; install it with: pip install datasets 'numpy>=2'")


# ---- prompts that were there before ----------------------------------------------------------------------------------


def evaluation_prompts(path: Path) -> list[str]:
    """The prompts of an evaluation's file: lines with "prompt" (IFEval) or "turns" (MT-Bench). Raises Zamba2Error."""
    if not path.is_file():
        raise Zamba2Error(f"{path} does not exist; a file of evaluation prompts is needed.")
    prompts: list[str] = []
    for place, row in _json_rows(path):
        found = row.get("turns", [row.get("prompt")]) if isinstance(row, Mapping) else []
        if not isinstance(found, list) or not found or not all(isinstance(prompt, str) for prompt in found):
            raise Zamba2Error(f'{place} holds no evaluation prompt; "prompt" with a text or "turns" with texts is needed.')
        prompts += found
    if not prompts:
        raise Zamba2Error(f"{path} is empty; evaluation prompts are needed.")
    return prompts


def _plain(text: str) -> str:
    """A text for comparison: case, white space and ways of writing the same character make no difference."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _windows(plain: str) -> Iterator[int]:
    words = re.findall(r"\w+", plain)
    return (_digest(" ".join(words[i : i + WINDOW])) for i in range(len(words) - WINDOW + 1))


class Prompts:
    """Prompts seen so far, and those of evaluations. A prompt is what the user says before the first answer trained on."""

    def __init__(self, evaluation: Iterable[str] = ()) -> None:
        self._owner: dict[int, tuple[str, int]] = {}
        self._evaluation: set[int] = set()
        self._windows: set[int] = set()
        for plain in map(_plain, evaluation):
            self._evaluation.add(_digest(plain))
            self._windows.update(_windows(plain))

    def repeated(self, data: Mapping[str, Any], owner: tuple[str, int]) -> str | None:
        """Why not to train on an example: "evaluation prompt", or whose prompt it repeats. ``owner``: its set and row.

        A prompt belongs to the first row that had it, so that reading a set again changes nothing.
        """
        if "text" in data:
            said = [_plain(data["text"])]
        else:
            messages = data["prompt"] if "prompt" in data else data["messages"]
            said = [_plain(message["content"]) for message in messages if message["role"] == "user"]
        if any(_digest(plain) in self._evaluation for plain in said):
            return "evaluation prompt"
        if self._windows and any(window in self._windows for plain in said for window in _windows(plain)):
            return f"{WINDOW} words of an evaluation prompt"
        key = _digest("\0".join(said) if "prompt" in data else said[0])
        first = self._owner.setdefault(key, owner)
        if first == owner:
            return None
        return "prompt seen before" if first[0] == owner[0] else f"prompt also in {first[0]}"


# ---- from rows to examples -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Filters:
    """language: rows of sets that name a language keep this one ("en"; also "en-us"), None keeps all. max_tokens: longest example, the
    longer side of a preference; None for any. ties: keep preferences with equal answers or scores."""

    language: str | None = "en"
    max_tokens: int | None = None
    ties: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise Zamba2Error(f"max_tokens is {self.max_tokens}; at least 1 is needed.")


@dataclass
class Tally:
    """What became of the rows of one set: ``read`` = ``kept`` + all of ``dropped``. tokens and trained count those of kept examples;
    whole: whether the set was read to its end."""

    read: int = 0
    kept: int = 0
    tokens: int = 0
    trained: int = 0
    longest: int = 0
    whole: bool = False
    dropped: Counter[str] = field(default_factory=Counter)

    def keep(self, masked: Masked | MaskedPair | None) -> None:
        """Count one more example that is kept."""
        sides = () if masked is None else (masked,) if isinstance(masked, Masked) else (masked.chosen, masked.rejected)
        self.kept += 1
        self.tokens += sum(map(len, sides))
        self.trained += sum(int(side.loss.sum()) for side in sides)
        self.longest = max([self.longest, *map(len, sides)])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, the reasons by number."""
        return {**vars(self), "dropped": dict(self.dropped.most_common())}


@dataclass(frozen=True)
class Example:
    """data: {"messages"}, {"text"} or {"prompt", "chosen", "rejected"}. masked: its tokens, None without a tokenizer. place: of its row."""

    part: Part
    place: str
    data: Mapping[str, Any]
    masked: Masked | MaskedPair | None = None


@dataclass
class Reader:
    """Examples of one set that pass the filters; iterate. ``tally`` counts what the latest iteration dropped and why.

    rows: most rows to read, None for all. Raises Zamba2Error, also when nothing is left.
    """

    part: Part
    tokenizer: Tokenizer | None = None
    filters: Filters = field(default_factory=Filters)
    prompts: Prompts | None = None
    rows: int | None = None
    tally: Tally = field(default_factory=Tally)

    def __iter__(self) -> Iterator[Example]:
        tally = self.tally = Tally()
        for place, row in read_rows(self.part):
            if tally.read == self.rows:
                break
            tally.read += 1
            try:
                example = self._example(place, row)
            except Unusable as reason:
                tally.dropped[str(reason)] += 1
                continue
            tally.keep(example.masked)
            yield example
        else:
            tally.whole = True
        if not tally.kept:
            why = "; ".join(f"{reason}: {count}" for reason, count in tally.dropped.most_common()) or "the set is empty"
            raise Zamba2Error(f"{self.part.label}: none of {tally.read} rows can be trained on ({why}); change the filters or the data.")

    def _example(self, place: str, row: Row) -> Example:
        source = self.part.source
        language = row.get(source.language) if source.language else None
        wanted = self.filters.language
        if wanted and isinstance(language, str) and language.lower().partition("-")[0] != wanted.lower():
            raise Unusable(f"language is not {wanted}")
        data = source.convert(row)
        if "chosen" in data and not self.filters.ties:
            self._check_tie(data, row)
        masked = None
        if self.tokenizer is not None:
            try:
                masked = self._masked(data, self.tokenizer)
            except Zamba2Error as error:
                raise Zamba2Error(f"{place}: {error}") from None
        if self.prompts is not None and (reason := self.prompts.repeated(data, (self.part.label, self.tally.read))):
            raise Unusable(reason)
        return Example(self.part, place, data, masked)

    def _check_tie(self, data: Mapping[str, Any], row: Row) -> None:
        if data["chosen"][0]["content"].strip() == data["rejected"][0]["content"].strip():
            raise Unusable("tie: equal answers")
        if self.part.source.scores is None:
            return
        better, worse = (row.get(name) for name in self.part.source.scores)
        if better is not None and worse is not None and not better > worse:
            raise Unusable("tie: equal scores" if better == worse else "rejected scores higher")

    def _masked(self, data: Mapping[str, Any], tokenizer: Tokenizer) -> Masked | MaskedPair:
        special = {*MARKS, tokenizer.bos_token, tokenizer.eos_token} - {None, ""}
        texts = [data["text"]] if "text" in data else [message["content"] for messages in data.values() for message in messages]
        if any(str(mark) in text for text in texts for mark in special):
            raise Unusable("special token in a message")
        if sum(map(len, texts)) > CHARACTERS:
            raise Unusable(f"longer than {CHARACTERS} characters")
        masked: Masked | MaskedPair
        if "chosen" in data:
            masked = mask_pair(tokenizer, **data)
        else:
            masked = mask_text(tokenizer, data["text"]) if "text" in data else mask_conversation(tokenizer, data["messages"])
        if self.filters.max_tokens is not None and len(masked) > self.filters.max_tokens:
            raise Unusable(f"longer than {self.filters.max_tokens} tokens")
        return masked


# ---- mixing ----------------------------------------------------------------------------------------------------------


def shuffled(items: Iterable[T], seed: int | str, buffer: int = BUFFER) -> Iterator[T]:
    """The items in another order, the same for the same seed; none comes more than ``buffer`` places early."""
    rng, held = random.Random(seed), list[T]()
    for item in items:
        if len(held) < buffer:
            held.append(item)
            continue
        i = rng.randrange(buffer)
        yield held[i]
        held[i] = item
    rng.shuffle(held)
    yield from held


def mix(sets: Sequence[Callable[[int], Iterable[T]]], weights: Sequence[float], *, seed: int, until: str = "first") -> Iterator[T]:
    """Draw each item from one of the sets, chosen by weight; the same seed gives the same items.

    sets: functions of the round, 0 at first, that open a set. until: "first" ends where a set has no more, so that the weights hold
    throughout and nothing comes twice; "all" begins shorter sets again until each has been read once. Raises ValueError for another
    ``until``.
    """
    if until not in ("first", "all"):
        raise ValueError(f"until is {until!r}; first or all is needed")
    rng, numbers = random.Random(seed), range(len(sets))
    streams, rounds, unread = [iter(open(0)) for open in sets], [0 for _ in sets], set(numbers)
    while unread:
        (i,) = rng.choices(numbers, weights)
        item = next(streams[i], END)
        if item is END:
            unread.discard(i)
            if until == "first" or not unread:
                return
            rounds[i] += 1
            streams[i] = iter(sets[i](rounds[i]))
            item = next(streams[i], END)
            if item is END:
                raise Zamba2Error(f"data set {i + 1} of the mixture has no rows; leave it out.")
        yield item


def mixture(readers: Sequence[Reader], *, seed: int, until: str = "first", buffer: int = BUFFER) -> Iterator[Example]:
    """Examples of several sets, shuffled and drawn by their weights; ``until`` as in ``mix``. Raises Zamba2Error."""
    check_parts([reader.part for reader in readers])

    def opener(i: int) -> Callable[[int], Iterable[Example]]:
        return lambda round: shuffled(readers[i] if round == 0 else replace(readers[i]), f"{seed} {i} {round}", buffer)

    return mix([opener(i) for i in range(len(readers))], [reader.part.weight for reader in readers], seed=seed, until=until)
