"""``zamba2 evaluate``: what a model can do, in numbers that can be repeated."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zamba2.commands import need, read_text
from zamba2.commands.bars import bar
from zamba2.errors import Zamba2Error, notice

__all__ = ["divergence", "ifeval", "mt_bench", "perplexity", "tasks"]


def perplexity(text: Path, model: str, where: Mapping[str, Any], *, context: int, out: Path | None, as_json: bool) -> None:
    """Print and write down how well a model predicts a text file. Raises Zamba2Error."""
    from zamba2.evaluate import perplexity as measure
    from zamba2.evaluate.answers import about_ours

    words, loaded = read_text(text), own_model(model, where)
    started = time.monotonic()
    with bar("reading") as progress:
        scores = measure.perplexity(loaded, words, context=context, progress=progress)
    rows = [
        ("perplexity", f"{scores['perplexity']:.4f}"), ("nats a token", f"{scores['nats']:.5f}"),
        ("nats a byte", f"{scores['nats_per_byte']:.5f}"), ("likeliest token right", f"{scores['top1']:.2%}"),
    ]  # fmt: skip
    settings = {"text": str(text), "context": context}
    finish("perplexity", about_ours(loaded, where), settings, scores, started, out, as_json, rows, "nats")


def divergence(
    text: Path, reference: str, model: str, reference_where: Mapping[str, Any], where: Mapping[str, Any], *, context: int, out: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Print and write down how far a model's predictions on a text file are from a reference's. Raises Zamba2Error."""
    from zamba2.evaluate import perplexity as measure
    from zamba2.evaluate.answers import about_ours

    words = read_text(text)
    near, loaded = own_model(reference, reference_where), own_model(model, where)
    started = time.monotonic()
    with bar("reading") as progress:
        scores = measure.divergence(near, loaded, words, context=context, progress=progress)
    rows = [
        ("mean divergence, nats", f"{scores['mean']:.6f}"),
        *((f"{float(q):.1%} of tokens below", f"{value:.6f}") for q, value in scores["quantiles"].items()),
        ("same likeliest token", f"{scores['top1_agreement']:.2%}"),
        ("nats a token: reference, model", f"{scores['reference_nats']:.5f}, {scores['nats']:.5f}"),
    ]  # fmt: skip
    about = about_ours(loaded, where) | {"reference": about_ours(near, reference_where)}
    finish("divergence", about, {"text": str(text), "context": context}, scores, started, out, as_json, rows, "divergence")


def own_model(model: str, where: Mapping[str, Any]) -> Any:
    """One of our models. Raises Zamba2Error, also for what has no probabilities to look at."""
    from zamba2.api import load

    if model.startswith(("hf:", "openai:")):
        raise Zamba2Error(f"{model} gives texts alone; a model of ours is needed, whose probabilities can be read.")
    return load(model, **where)


def finish(
    kind: str, about: Mapping[str, Any], settings: Mapping[str, Any], scores: Mapping[str, Any], started: float, out: Path | None,
    as_json: bool, rows: list[tuple[str, str]], unit: str,
) -> None:  # fmt: skip
    """Write the result's document if there is a folder for it, and print it or a table."""
    from zamba2.evaluate.results import document, write_result

    result = document(kind, about, settings, scores, time.monotonic() - started)
    place = None if out is None else write_result(out, result)
    if as_json:
        print(json.dumps(result))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from zamba2.evaluate.perplexity import shown_positions

    console = Console(highlight=False, markup=False, emoji=False)
    table = Table(box=box.SIMPLE, show_header=False, title=f"{kind} of {about['model']} ({about['format']})", title_justify="left")
    tokens = f"{scores['tokens']:,} in {scores['windows']:,} window{'s' * (scores['windows'] > 1)}"
    for row in [("tokens", tokens), *rows]:
        table.add_row(*row)
    console.print(table)
    table = Table(box=box.SIMPLE)
    for name in ("tokens before", "tokens", unit):
        table.add_column(name, justify="right")
    for cells in shown_positions(scores["by_position"]):
        table.add_row(*cells)
    console.print(table)
    if place is not None:
        console.print(f"written to {place}")


# ---- lm-eval's tasks -------------------------------------------------------------------------------------------------


def tasks(
    names: Sequence[str], model: str, where: Mapping[str, Any], *, few_shot: int | None, limit: int | None, batch: int, chat: bool,
    include: Path | None, out: Path, as_json: bool,
) -> None:  # fmt: skip
    """Run lm-eval's tasks and print and write down the scores. Raises Zamba2Error."""
    need("this evaluation", "evaluate", "lm_eval")
    if where.get("offline"):  # before the libraries that read these are imported
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            os.environ.setdefault(name, "1")
    from zamba2.evaluate.answers import open_answers
    from zamba2.evaluate.harness import run_tasks
    from zamba2.evaluate.results import document, slug, write_result
    from zamba2.weights.hub import quiet_retries

    quiet_retries()
    answers = open_answers(model, **where)
    folder = out / slug(answers.name)
    started = time.monotonic()
    wanted = [Path(name) if name.endswith((".yaml", ".yml")) else name for name in names]
    found = run_tasks(
        answers, wanted, few_shot=few_shot, limit=limit, batch=batch, chat=chat, cache=folder / "tasks.cache", include=include,
        progress=sys.stderr.isatty(),
    )  # fmt: skip
    settings = {"tasks": list(names), **{name: value for name, value in found.items() if name != "scores"}}
    result = document("tasks", answers.about, settings, found["scores"], time.monotonic() - started)
    lines = ["| task | metric | value |", "|---|---|---|"]
    for task, scores in found["scores"].items():
        errors = {name.replace("_stderr,", ","): value for name, value in scores.items() if "_stderr," in name}
        for name, value in scores.items():
            if "_stderr," not in name:
                spread = f" ± {errors[name]:.4f}" if isinstance(errors.get(name), float) else ""
                lines.append(f"| {task} | {name.removesuffix(',none')} | {value:.4f}{spread} |")
    report(write_result(folder, result), result, "\n".join(lines) + "\n", as_json)


# ---- IFEval ----------------------------------------------------------------------------------------------------------


def ifeval(
    model: str, where: Mapping[str, Any], *, prompts: Path | None, responses: Path | None, limit: int | None, max_tokens: int | None,
    out: Path, as_json: bool, offline: bool,
) -> None:  # fmt: skip
    """Answer IFEval's prompts, or take answers that are there, and print and write down the scores. Raises Zamba2Error."""
    need("this evaluation", "evaluate", "lm_eval")
    from zamba2.evaluate import ifeval as measure
    from zamba2.evaluate.answers import open_answers
    from zamba2.evaluate.results import beside_the_card, document, slug, write_result

    asked = measure.read_prompts(prompts, offline=offline)[:limit]
    settings: dict[str, Any] = {"prompts": str(prompts or measure.HUB), "limit": limit, "seed": measure.SEED}
    started = time.monotonic()
    if responses is not None:
        about: dict[str, Any] = {"model": str(responses), "responses": str(responses)}
        folder = out
        result = measure.score(asked, measure.read_responses(responses), offline=offline)
    else:
        answers = open_answers(model, **where)
        about, folder = answers.about, out / slug(answers.name)
        settings |= {"max_tokens": max_tokens or measure.MAX_TOKENS, "temperature": 0.0}
        with bar("answering") as progress:
            result = measure.evaluate(
                answers, asked, folder / "ifeval.answers.jsonl", max_tokens=settings["max_tokens"], progress=progress, offline=offline
            )
    found = document("ifeval", about, settings, result.to_dict(), time.monotonic() - started)
    name, size = str(about["model"]), f"{about['parameters'] / 1e9:.2g}B" if about.get("parameters") else ""
    rows = beside_the_card([(name, size, None, result.metrics["mean_strict"].value)])
    report(write_result(folder, found), found, result.to_markdown() + "\n" + rows, as_json)


# ---- MT-Bench --------------------------------------------------------------------------------------------------------


def mt_bench(
    model: str, where: Mapping[str, Any], *, questions: Path | None, judgments: Path | None, judge: str | None, judge_url: str,
    judge_key: str, judge_prompts: Path | None, references: Path | None, rate: float | None, prices: tuple[float, float] | None, yes: bool,
    limit: int | None, max_tokens: int | None, out: Path, as_json: bool,
) -> None:  # fmt: skip
    """Answer MT-Bench's questions, have a judge rate the answers, and print and write down the scores; or only what is asked for.

    Raises Zamba2Error.
    """
    from zamba2.evaluate import mt_bench as measure
    from zamba2.evaluate.answers import open_answers
    from zamba2.evaluate.judge import Endpoint, estimate
    from zamba2.evaluate.results import slug

    known = None if questions is None else measure.read_questions(questions)
    asked = None if known is None else known[:limit]
    left_out = {question.id for question in (known or ())[limit:]} if limit is not None else set()
    started = time.monotonic()
    if judgments is not None:
        if limit is not None and known is None:
            raise Zamba2Error("--limit is for the first questions of a file, and there is none; give it with --questions.")
        scores = measure.aggregate([j for j in measure.read_judgments(judgments) if j.question_id not in left_out], asked)
        about: dict[str, Any] = {"model": str(judgments), "judgments": str(judgments)}
        conclude(out, about, {"questions": None if questions is None else str(questions)}, scores, started, as_json)
        return
    if asked is None:
        raise Zamba2Error("there are no questions; give FastChat's question.jsonl with --questions, or finished ratings with --judgments.")
    endpoint = None if judge is None else Endpoint(judge, judge_url, key_variable=judge_key, requests_per_minute=rate)
    if endpoint is not None and judge_prompts is None:
        raise Zamba2Error("the judge has no prompts; give FastChat's judge_prompts.jsonl with --judge-prompts.")
    told = None if judge_prompts is None else measure.read_judge_prompts(judge_prompts)
    given = None if references is None else measure.read_answers(references, references=True)
    if endpoint is not None:
        measure.check_references(asked, given)
    answers = open_answers(model, **where)
    limit_tokens = max_tokens or measure.MAX_TOKENS
    with bar("answering") as progress:
        answered = measure.answer_questions(
            answers, asked, measure.answers_file(out, answers.name), max_tokens=limit_tokens, progress=progress
        ).answers
    if endpoint is None or told is None:
        print(answered.path)
        return
    requests = measure.judge_requests(asked, answered, told, given)
    place = measure.judgments_file(out, endpoint.model)
    waiting = measure.unjudged(requests, place, endpoint.model)
    if waiting:
        agree(estimate([request.messages for request in waiting], reply_characters=measure.REPLY_CHARACTERS, prices=prices), yes)
    with bar("judging") as progress:
        done = measure.judge_answers(endpoint, requests, place, progress=progress)
    for request, reason in done.failures:
        notice(f"question {request.question_id}, turn {request.turn} has no rating: {reason}", once=False)
    kept = [j for j in measure.read_judgments(place) if j.model == answered.name and j.question_id not in left_out]
    scores = measure.aggregate(kept, asked)
    if missing := scores.of(answered.name).missing:
        notice(f"{missing} turns have no rating, so the score is incomplete; the same command asks for them again.")
    settings = {
        "questions": str(questions), "limit": limit, "max_tokens": limit_tokens, "judge": endpoint.model, "judge_url": endpoint.url,
        "failures": len(done.failures),
    }  # fmt: skip
    conclude(out / slug(answers.name), answers.about, settings, scores, started, as_json)


def conclude(folder: Path, about: Mapping[str, Any], settings: Mapping[str, Any], scores: Any, started: float, as_json: bool) -> None:
    """Write MT-Bench's document, table and chart, and print one of the first two."""
    from zamba2.evaluate import mt_bench as measure
    from zamba2.evaluate.results import beside_the_card, document, write_result

    found = document("mt-bench", about, settings, scores.to_dict(), time.monotonic() - started)
    size = f"{about['parameters'] / 1e9:.2g}B" if about.get("parameters") else ""
    tables = [f"{name}, judged by {own.judge}\n\n{measure.table(own)}" for name, own in scores.models.items()]
    tables.append(beside_the_card([(name, size, own.overall.percent, None) for name, own in scores.models.items()]))
    place = write_result(folder, found)
    if len(scores.models) <= measure.MOST_MODELS and find_spec("matplotlib") is not None:
        measure.chart(list(scores.models.values()), folder / "mt-bench")
    report(place, found, "\n".join(tables), as_json)


def agree(estimate: Any, yes: bool) -> None:
    """Say what judging will cost; in a terminal, ask. Raises Zamba2Error if the answer is no."""
    notice(f"judging takes {estimate}.")
    if not yes and sys.stdin.isatty() and sys.stderr.isatty():
        print("Go on? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise Zamba2Error("nothing was judged; the answers are kept, and the same command goes on from there.")


def report(place: Path, result: Mapping[str, Any], markdown: str, as_json: bool) -> None:
    """FOLDER/EVALUATION.md beside the document; print one of the two."""
    from zamba2.weights.files import write_text

    write_text(place.with_suffix(".md"), markdown, errors="backslashreplace")  # names of files may be any bytes
    if as_json:
        print(json.dumps(result))
    else:
        print(f"{markdown}\nwritten to {place}")
