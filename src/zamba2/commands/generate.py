"""``zamba2 generate``: continue a text or answer messages, streaming, or as one JSON document."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zamba2
from zamba2.commands import read_text, say
from zamba2.errors import Zamba2Error
from zamba2.language.generate import Generation, Piece, Progress, Request, collect
from zamba2.language.messages import check_messages
from zamba2.language.model import LanguageModel, make_request
from zamba2.language.tokenizer import TokenTexts

__all__ = ["load_with_status", "main", "reading_progress", "summary"]


def main(
    model: str, where: Mapping[str, Any], prompt: str | None, file: Path | None, messages: Path | None, chat: bool,
    system: str | None, options: Mapping[str, Any], as_json: bool,
) -> None:  # fmt: skip
    """Read the prompt, load the model, generate. Raises Zamba2Error."""
    make_request([0], options)  # complain about options before the model is loaded
    if options.get("logprobs") is not None and not as_json:
        raise Zamba2Error("--logprobs needs --json, which has a place for them.")
    conversation = read_messages(messages, prompt, file)
    if conversation is None:
        text = read_prompt(prompt, file)
        conversation = [{"role": "user", "content": text}] if chat else None
    if system is not None:
        if conversation is None:
            raise Zamba2Error("--system needs a chat: add --chat, or give --messages.")
        conversation = [{"role": "system", "content": system}, *conversation]
    loaded = load_with_status(model, where)
    if conversation is None:
        request = loaded.request(text, **options)
    else:
        request = loaded.request(loaded.tokenizer.encode_chat(conversation, add_generation_prompt=True), **options)
    with reading_progress(loaded.backend.stretch) as progress:
        result = generate(loaded, request, progress, echo=not as_json)
    if as_json:
        print(json.dumps(document(loaded, result), ensure_ascii=False))
    else:
        print(flush=True)
        print(summary(result), file=sys.stderr)


def read_messages(messages: Path | None, prompt: str | None, file: Path | None) -> list[dict[str, Any]] | None:
    if messages is None:
        return None
    if prompt is not None or file is not None:
        raise Zamba2Error("--messages was given beside a prompt; give one of them.")
    text = read_text(messages)
    try:
        data = json.loads(text)
        check_messages(data)
    except (ValueError, RecursionError) as error:
        raise Zamba2Error(f"{messages} is not valid JSON ({error}); a list of {{role, content}} objects is needed.") from None
    except Zamba2Error as error:
        raise Zamba2Error(f"{messages}: {error}") from None
    return list(data)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from the argument, a file or standard input. Raises Zamba2Error if it is empty or unreadable."""
    if prompt is not None and prompt != "-" and file is not None:
        raise Zamba2Error("--file was given beside a prompt; give one of them.")
    if file is not None:
        text = read_text(file).removesuffix("\n")
    elif prompt is None and sys.stdin.isatty():
        raise Zamba2Error("there is no prompt; give a text, --file FILE, or pipe one in.")
    else:
        text = read_text(None).removesuffix("\n") if prompt in (None, "-") else str(prompt)
    if not text:
        raise Zamba2Error("the prompt is empty; some text is needed.")
    return text


def load_with_status(model: str, where: Mapping[str, Any]) -> LanguageModel:
    """Load a model while a terminal shows that something happens."""
    if not sys.stderr.isatty():
        return zamba2.load(model, **where)
    from rich.console import Console

    from zamba2.api import check_options
    from zamba2.weights.hub import resolve

    check_options(**where)
    path = resolve(model, revision=where["revision"], offline=where["offline"])  # shows its own progress
    with Console(stderr=True).status("loading"):
        loaded = zamba2.load(path, **{name: value for name, value in where.items() if name not in ("revision", "offline")})
    loaded.name = model
    return loaded


@contextmanager
def reading_progress(stretch: int) -> Iterator[Progress | None]:
    """A progress bar on a terminal while a long prompt is read, ``Backend.stretch`` tokens at once; gone when the first token comes."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    bar = Bar(TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    task = bar.add_task("reading", total=None)

    def report(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)
        if total - done <= stretch:  # the last; what is printed while a bar stands goes where the bar is, not to standard output
            bar.stop()

    try:
        yield report
    finally:
        bar.stop()


def generate(loaded: LanguageModel, request: Request, progress: Progress | None, *, echo: bool) -> Generation:
    """Run one request; with ``echo`` its text goes to standard output as it comes."""

    def show(piece: Piece) -> None:
        if echo and piece.text:
            say(piece.text)

    tokenizer = loaded.tokenizer
    return collect(loaded.backend, [request], tokenizer, progress=progress, on_piece=show)[0]


def summary(result: Generation) -> str:
    """One line: token counts, times and rates."""
    prompt_rate = result.prompt_tokens / result.prompt_seconds if result.prompt_seconds > 0 else 0.0
    return (
        f"[{result.prompt_tokens} prompt tokens in {result.prompt_seconds:.2f} s ({prompt_rate:.1f}/s), "
        f"{result.completion_tokens} new at {result.tokens_per_second:.1f}/s, {result.finish_reason}]"
    )


def document(loaded: LanguageModel, result: Generation) -> dict[str, Any]:
    """The JSON form of a reply."""
    data: dict[str, Any] = {
        "model": loaded.name,
        "text": result.text,
        "finish_reason": result.finish_reason,
        "stop": result.stop,
        "usage": {
            "prompt_tokens": result.prompt_tokens,
            "completion_tokens": result.completion_tokens,
            "total_tokens": result.prompt_tokens + result.completion_tokens,
        },
        "tokens": result.tokens,
        "time_to_first_token_seconds": result.prompt_seconds,
        "decode_tokens_per_second": result.tokens_per_second,
    }
    if result.logprobs is not None:
        texts = TokenTexts(loaded.tokenizer)
        data["logprobs"] = [
            {
                "token": item.token,
                "text": texts(item.token)[0],
                "logprob": item.logprob,
                "top": [{"token": token, "logprob": value} for token, value in item.top],
            }
            for item in result.logprobs
        ]
    return data
