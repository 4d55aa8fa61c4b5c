"""lm-eval's tasks on our backends: requests become rows, contexts that begin alike are read once, batches share calls.

A score depends on its own request alone, not on its company. Every context is read with borders at the multiples of STEP, where splitting
changes no arithmetic, and at its end; beginnings are shared up to such borders, and whole contexts (the choices of a question) at
their ends. Nothing is cut off: contexts longer than the model was trained on are read whole, with a notice.

0.4.13 of lm-eval reads no entry points: ``register()`` makes the name "zamba2" known to its own commands.
"""

# lm_eval brings no types.
# mypy: disable-error-code="import-untyped, misc"

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zamba2.errors import Zamba2Error, install, notice
from zamba2.evaluate.answers import Ours, Transformers
from zamba2.language.generate import collect
from zamba2.language.messages import brief
from zamba2.language.model import LanguageModel, make_request
from zamba2.language.sampling import log_softmax
from zamba2.language.tokenizer import Tokenizer
from zamba2.runtime.backend import Backend, Row, State

__all__ = ["BATCH", "Prefixes", "generations", "loglikelihoods", "model_class", "open_lm", "register", "run_tasks"]

STEP = 512  # tokens; splitting there changes no bit in the engine
BATCH = 8  # sequences read and continued together
POSITIONS = 1024  # of one call for which all scores are kept: 131 MB with 32,000 tokens in the vocabulary
MAX_GEN_TOKS = 256  # of lm-eval, where a task names no limit
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # what a task may set beside do_sample and lengths
Tokens = tuple[int, ...]


# ---- over the waist --------------------------------------------------------------------------------------------------


class Prefixes:
    """States behind beginnings of contexts that come in sorted order, so that what two neighbours share is read once.

    ``tokens_read``: how many were read to make them.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend, self.tokens_read = backend, 0
        self._path: list[tuple[Tokens, State]] = []  # block by block, the state behind each

    def behind(self, tokens: Tokens, following: Tokens = ()) -> tuple[int, State]:
        """The largest multiple of STEP below the length, and a new state that has read so many of the tokens.

        following: the next context; only what it shares is kept.
        """
        blocks = [tokens[i : i + STEP] for i in range(0, len(tokens) - STEP, STEP)]
        del self._path[common(blocks, [block for block, _ in self._path]) :]
        ahead = common(blocks, [following[i : i + STEP] for i in range(0, len(following) - STEP, STEP)])
        state = self._path[-1][1].copy() if self._path else self.backend.new_state()
        for depth in range(len(self._path), len(blocks)):
            self.backend.forward([Row(np.array(blocks[depth], np.int32), state, logits=0)])
            self.tokens_read += STEP
            if depth < ahead:
                self._path.append((blocks[depth], state.copy()))
        return STEP * len(blocks), state


def common(a: Sequence[Tokens], b: Sequence[Tokens]) -> int:
    """How many elements two sequences have in common at their beginnings."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


@dataclass
class Continuation:
    """One request on its way: what is scored, how much of it is, and the state that has read all before."""

    index: int
    tokens: Tokens
    state: State
    scored: int = 0
    total: float = 0.0
    greedy: bool = True

    def take(self, scores: Iterable[Any]) -> None:
        """Score the next tokens from logits [k, V]."""
        for row in scores:
            token = self.tokens[self.scored]
            logprobs = log_softmax(row)
            self.total += float(logprobs[token])
            self.greedy = self.greedy and int(logprobs.argmax()) == token
            self.scored += 1

    def piece(self) -> Tokens:
        """What to read next: at most to the next border, and never the last token, behind which nothing is scored."""
        start = self.scored - 1
        return self.tokens[start : min(start + STEP - self.state.position % STEP, len(self.tokens) - 1)]


def loglikelihoods(
    backend: Backend, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch: int = BATCH
) -> Iterator[tuple[int, float, bool]]:
    """For each pair of context and continuation (token ids, at least one each): its index, the natural log of the continuation's
    probability, and whether each of its tokens is the likeliest; as they are finished. Sums are fp64. Raises Zamba2Error."""
    choices: dict[Tokens, list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        if not len(context) or not len(continuation):
            raise Zamba2Error("a continuation to be scored or its context has no tokens; at least one each is needed.")
        choices.setdefault(tuple(context), []).append(index)
    order, prefixes = sorted(choices), Prefixes(backend)
    for start in range(0, len(order), batch):
        rows = []
        for place in range(start, min(start + batch, len(order))):
            done, state = prefixes.behind(order[place], order[place + 1] if place + 1 < len(order) else ())
            rows.append(Row(np.array(order[place][done:], np.int32), state))
        waiting: deque[Continuation] = deque()
        for context, row, logits in zip(order[start : start + batch], rows, backend.forward(rows), strict=True):
            scores = logits.numpy()[-1:]
            for index in choices[context]:
                one = Continuation(index, tuple(pairs[index][1]), row.state)
                one.take(scores)
                if len(one.tokens) == 1:
                    yield index, one.total, one.greedy
                else:
                    waiting.append(one)
        yield from continued(backend, waiting, batch)


def continued(backend: Backend, waiting: deque[Continuation], batch: int) -> Iterator[tuple[int, float, bool]]:
    """Score the rest of continuations whose first tokens are scored, several together."""
    while waiting:
        taken: list[tuple[Continuation, Row]] = []
        room = POSITIONS
        while waiting and len(taken) < batch and (not taken or len(waiting[0].piece()) <= room):
            one = waiting.popleft()
            if one.scored == 1:
                one.state = one.state.copy()  # other continuations start from it too
            piece = one.piece()
            room -= len(piece)
            taken.append((one, Row(np.array(piece, np.int32), one.state, logits=len(piece))))
        for (one, _), logits in zip(taken, backend.forward([row for _, row in taken]), strict=True):
            one.take(logits.numpy())
            if one.scored == len(one.tokens):
                yield one.index, one.total, one.greedy
            else:
                waiting.appendleft(one)


def generations(
    backend: Backend, tokenizer: Tokenizer, contexts: Sequence[Sequence[int]], options: Mapping[str, Any], *, seed: int = 0,
    batch: int = BATCH,
) -> Iterator[tuple[int, str]]:  # fmt: skip
    """For each context (token ids): its index and the text that continues it, as they are finished.

    options: lm-eval's generation_kwargs. The text is the new tokens decoded alone, as lm-eval's own models do: where the tokenizer's
    decoder strips a first space, it is gone. seed: of sampling; with it a text depends on its context, and on how many equal ones
    stand before it. Raises Zamba2Error.
    """
    until, limit, sampling = generation_options(options)
    special = {ids[0]: text for text in until if (ids := special_token(tokenizer, text))}
    stops = [text for text in until if text not in special.values()]
    streamed = [text for text in stops if text[0] != " "]  # the others would also stop at a first space that is gone once all is decoded
    shared = float(sampling.get("repetition_penalty", 1.0)) == 1.0  # which looks at all of a prompt
    equal: Counter[Tokens] = Counter()
    seeds = [seed_of(seed, tuple(context), equal) for context in contexts]
    order, prefixes = sorted(range(len(contexts)), key=lambda i: (tuple(contexts[i]), i)), Prefixes(backend)
    for start in range(0, len(order), batch):
        group, requests = order[start : start + batch], []
        for place, index in enumerate(group, start):
            tokens, done, state = tuple(contexts[index]), 0, None
            if shared:
                done, state = prefixes.behind(tokens, tuple(contexts[order[place + 1]]) if place + 1 < len(order) else ())
            chosen = {"max_tokens": limit, "stop": streamed, "state": state, "seed": seeds[index], **sampling}
            requests.append(make_request(tokens[done:], chosen))
        for index, generation in zip(group, collect(backend, requests, tokenizer), strict=True):
            tokens = tuple(itertools.takewhile(lambda token: token not in special, generation.tokens))
            text = tokenizer.decode(tokens)
            for stop in stops:
                text = text.split(stop)[0]
            yield index, text


def seed_of(seed: int, context: Tokens, equal: Counter[Tokens]) -> int:
    """A seed for a context's text, another one for each repetition of it, which ``equal`` counts."""
    equal[context] += 1
    return int.from_bytes(hashlib.sha256(repr((seed, context, equal[context])).encode()).digest()[:6], "little")


def generation_options(options: Mapping[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
    """Stop texts, most new tokens and sampling options of generation_kwargs. Raises Zamba2Error for what is not known here."""
    from lm_eval.models.utils import normalize_gen_kwargs

    chosen = dict(normalize_gen_kwargs(dict(options), MAX_GEN_TOKS))
    until, limit = chosen.pop("until", None) or [], chosen.pop("max_gen_toks")
    until = [until] if isinstance(until, str) else [text for text in until if text]
    if not all(isinstance(text, str) for text in until):
        raise Zamba2Error(f"the task's until is {brief(until)}; texts are needed.")
    sampled = chosen.pop("do_sample", False)
    unknown = [name for name, value in chosen.items() if name not in SAMPLING and not (name == "num_beams" and value == 1)]
    if unknown:
        known = ", ".join(("until", "max_gen_toks", "do_sample", *SAMPLING))
        raise Zamba2Error(f"the task's generation_kwargs have {unknown[0]}={chosen[unknown[0]]!r}; known here are {known}.")
    sampling = {name: chosen[name] for name in SAMPLING if chosen.get(name) is not None}
    if sampled and "temperature" not in sampling:
        sampling["temperature"] = 1.0  # transformers' default, for tasks that ask to sample and say no more
    return until, int(limit), sampling if sampled else {k: v for k, v in sampling.items() if k == "repetition_penalty"}


def special_token(tokenizer: Tokenizer, text: str) -> list[int]:
    """[id] of a special token written out, which texts of answers do not show; [] for any other text."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids if len(ids) == 1 and tokenizer.decode(ids) == "" and tokenizer.decode(ids, skip_special_tokens=False) == text else []


# ---- lm-eval's interface ---------------------------------------------------------------------------------------------


@functools.cache
def model_class() -> Any:
    """``Zamba2LM``, a subclass of lm_eval's TemplateLM: made on first use, since lm_eval is slow to import.

    Raises Zamba2Error if lm_eval is missing.
    """
    need_lm_eval()
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from tqdm import tqdm

    class Zamba2LM(TemplateLM):
        """A model of ours for lm-eval. pretrained: a loaded model, or what ``zamba2.load`` takes, with its options.

        batch_size: sequences that share a call. seed: of tasks that sample.
        """

        def __init__(
            self, pretrained: LanguageModel | str = "demo", *, batch_size: int | str = BATCH, max_batch_size: int | None = None,
            device: str | None = None, seed: int = 0, progress: bool = True, **options: Any,
        ) -> None:  # fmt: skip
            super().__init__()
            if not str(batch_size).isdigit() or int(batch_size) < 1:
                raise Zamba2Error(f"batch_size is {batch_size!r}; a whole number from 1 is needed.")
            if not isinstance(pretrained, LanguageModel):
                from zamba2.api import load

                pretrained = load(str(pretrained), device=device, **options)
            self.model, self.batch_size, self.seed, self.progress = pretrained, int(batch_size), seed, progress
            self.tokenizer = pretrained.tokenizer  # complains here, before anything is computed, if there is none
            if not self.tokenizer.eos_token_ids:
                raise Zamba2Error(f"{pretrained.name} names no end token; lm-eval needs one: add eos_token_id to generation_config.json.")

        @property
        def eot_token_id(self) -> int:
            return self.tokenizer.eos_token_ids[0]

        @property
        def prefix_token_id(self) -> int:
            bos = self.tokenizer.bos_token_id
            return self.eot_token_id if bos is None else bos

        @property
        def max_length(self) -> int:
            """Tokens of a window of ``loglikelihood_rolling``; everything else has no limit."""
            return self.model.backend.config.max_position_embeddings

        @property
        def tokenizer_name(self) -> str:
            return self.model.name.replace("/", "__")

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            if isinstance(chat_template, str):
                raise Zamba2Error(f"the chat template {chat_template!r} is asked for by name; {self.model.name} has one, without a name.")
            return self.tokenizer.chat_template if chat_template else None

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            text = self.tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt)
            if add_generation_prompt:
                return text
            # the last message is to be gone on with: nothing may stand behind it, as in transformers' continue_final_message
            last, bare = chat_history[-1]["content"].lstrip(), chat_history[-1]["content"].strip()
            begin = text.rindex(bare)
            return text[: begin + len(last if text.startswith(last, begin) else bare)]

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return self.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            for request in requests:
                if not request.args[1]:
                    raise Zamba2Error(f"a task scores an empty text behind {brief(repr(request.args[0]))}; correct its choices.")
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not self.progress)  # type: ignore[no-any-return]

        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
        ) -> list[tuple[float, bool]]:
            found: list[Any] = [None] * len(requests)
            for _, context, continuation in requests:
                self._say_if_long(len(context) + len(continuation))
            with self._bar(len(requests), "loglikelihood", disable_tqdm) as bar:
                pairs = [(context, continuation) for _, context, continuation in requests]
                for index, total, greedy in loglikelihoods(self.model.backend, pairs, batch=self.batch_size):
                    found[index] = (total, greedy)
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], found[index])
                    bar.update()
            return found

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            windows: list[tuple[int, tuple[list[int], list[int]]]] = []
            for index, request in enumerate(requests):
                ids = self.tok_encode(request.args[0])
                cut = utils.get_rolling_token_windows(ids, self.prefix_token_id, max_seq_len=self.max_length, context_len=1)
                windows += [(index, utils.make_disjoint_window(window)) for window in cut]
            totals, left = [0.0] * len(requests), [0] * len(requests)
            for index, _ in windows:
                left[index] += 1
            with self._bar(len(windows), "loglikelihood_rolling", disable_tqdm) as bar:
                for place, total, _ in loglikelihoods(self.model.backend, [w for _, w in windows], batch=self.batch_size):
                    index = windows[place][0]
                    totals[index] += total
                    left[index] -= 1
                    if not left[index]:
                        self.cache_hook.add_partial("loglikelihood_rolling", requests[index].args, totals[index])
                    bar.update()
            return totals

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            found: list[Any] = [None] * len(requests)
            groups = alike(requests)
            for options, _ in groups:
                generation_options(options)  # complains before anything is computed
            with self._bar(len(requests), "generate_until", disable_tqdm) as bar:
                for options, members in groups:
                    contexts = [self.tok_encode(requests[index].args[0]) for index in members]
                    backend = self.model.backend
                    for place, text in generations(backend, self.tokenizer, contexts, options, seed=self.seed, batch=self.batch_size):
                        found[members[place]] = text
                        self.cache_hook.add_partial("generate_until", requests[members[place]].args, text)
                        bar.update()
            return found

        def _say_if_long(self, length: int) -> None:
            if length > self.max_length:
                notice(f"some requests are longer than the {self.max_length} tokens {self.model.name} was trained on; they are read whole.")

        def _bar(self, total: int, name: str, disable: bool) -> Any:
            return tqdm(total=total, desc=name, disable=disable or not self.progress)

        def get_model_info(self) -> dict[str, Any]:
            return {"model": self.model.name, "identity": identity(self.model)}

    return Zamba2LM


@functools.cache
def chat_class() -> Any:
    """A subclass of lm_eval's LM over ``Answers``: conversations in, texts out, no probabilities."""
    need_lm_eval()
    from lm_eval.api.model import LM
    from tqdm import tqdm

    class AnswersLM(LM):
        """For endpoints that answer chats; tasks must generate, and the chat template is the endpoint's own."""

        def __init__(self, answers: Any, *, progress: bool = True, seed: int = 0) -> None:
            super().__init__()
            self.answers, self.progress, self.seed = answers, progress, seed

        @property
        def tokenizer_name(self) -> str:
            return str(self.answers.name)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            if not add_generation_prompt:
                raise Zamba2Error(f"{self.answers.name} answers whole messages; the task begins an answer for it: take another task.")
            return json.dumps(chat_history)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            found: list[Any] = [None] * len(requests)
            groups = []
            for options, members in alike(requests):
                until, limit, sampling = generation_options(options)
                groups.append((until, limit, float(sampling.get("temperature", 0.0)), members))
                if set(sampling) - {"temperature"}:
                    raise Zamba2Error(f"the task asks to sample by {', '.join(sampling)}; {self.answers.name} takes temperature alone.")
            with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm or not self.progress) as bar:
                for until, limit, temperature, members in groups:
                    asked = [messages(requests[index].args[0]) for index in members]
                    for place, text in self.answers.answer(asked, max_tokens=limit, temperature=temperature, seed=self.seed):
                        for stop in until:
                            text = text.split(stop)[0]
                        found[members[place]] = text
                        self.cache_hook.add_partial("generate_until", requests[members[place]].args, text)
                        bar.update()
            return found

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            raise Zamba2Error(f"{self.answers.name} gives no probabilities, which this task compares; take a task that generates.")

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            raise Zamba2Error(f"{self.answers.name} gives no probabilities, which this task adds up; take a task that generates.")

    return AnswersLM


def alike(requests: Sequence[Any]) -> list[tuple[Mapping[str, Any], list[int]]]:
    """The generation_kwargs of lm-eval's requests, each with the numbers of those that have it."""
    groups: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
    return [(requests[members[0]].args[1], members) for members in groups.values()]


def messages(context: str) -> list[dict[str, str]]:
    """The conversation in a context: the JSON list that ``apply_chat_template`` above made of it, or the text as one question."""
    try:
        found = json.loads(context)
    except ValueError:
        found = None
    if isinstance(found, list) and found and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in found):
        return found
    return [{"role": "user", "content": context}]


def __getattr__(name: str) -> Any:
    if name == "Zamba2LM":  # what the entry point names
        return model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def need_lm_eval() -> None:
    """Raises Zamba2Error unless lm_eval can be imported."""
    try:
        import lm_eval  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as error:
        raise Zamba2Error(f"these tasks are lm-eval's, which cannot be imported ({error}); {install('evaluate')}.") from None


def register() -> None:
    """Make ``zamba2`` a model name of lm-eval in this process, for its own commands. Raises Zamba2Error."""
    model = model_class()
    from lm_eval.api.registry import register_model

    register_model("zamba2")(model)


def identity(model: Any) -> str:
    """Of weights, format and adapter, or of what is known of other models: what is cached belongs to one. Raises Zamba2Error."""
    model = model.model if isinstance(model, Ours) else model
    if isinstance(model, LanguageModel):
        backend: Any = model.backend
        adapter = getattr(backend, "default_adapter", None)
        known = backend.identity(adapter) if adapter is not None else backend.fingerprint
    elif hasattr(model, "about"):
        known = json.dumps([model.name, model.about], sort_keys=True, default=str)
    else:
        raise Zamba2Error(f"answers of a {type(model).__name__} cannot be cached, as nothing tells it from others; leave cache out.")
    return hashlib.sha256(str(known).encode()).hexdigest()[:32]


def open_lm(model: Any, *, batch: int = BATCH, seed: int = 0, progress: bool = True) -> Any:
    """An lm-eval model over a ``LanguageModel``, what ``open_answers`` returns, or an lm-eval model, which is taken as it is.

    Raises Zamba2Error.
    """
    if isinstance(model, Ours):
        model = model.model
    if isinstance(model, LanguageModel):
        return model_class()(model, batch_size=batch, seed=seed, progress=progress)
    need_lm_eval()
    if isinstance(model, Transformers):
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=batch, device=str(model.model.device))
    return chat_class()(model, progress=progress, seed=seed) if hasattr(model, "answer") else model


def run_tasks(
    model: Any, tasks: Sequence[str | Path | Mapping[str, Any]], *, few_shot: int | None = None, limit: int | None = None,
    batch: int = BATCH, chat: bool = False, system: str | None = None, options: Mapping[str, Any] | None = None, seed: int = 0,
    resamples: int = 1000, cache: Path | None = None, include: Path | None = None, progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Run lm-eval's tasks through ``simple_evaluate``. Returns plain JSON data.

    model: as for ``open_lm``. tasks: names, patterns, YAML files or configurations. few_shot: examples before each question, in place
    of the task's own number. limit: only so many questions of each task. chat: questions go through the chat template, with the
    system message ``system``. options: generation_kwargs in place of the tasks' own. seed: of tasks that sample; examples and the order
    of questions are drawn with lm-eval's own seeds, as its published results are. resamples: of bootstrapped standard errors.
    cache: a folder where every answer is kept as it is found, each model's apart; a run finds there what an earlier one computed, also
    an interrupted one. include: a folder of YAML files that adds tasks.

    "scores": for each task and group its metrics under lm-eval's names ("acc,none"). "samples": for each task and example what was asked
    and answered. "questions": for each task how many. "versions": of tasks. "settings": what was asked for.
    Raises Zamba2Error for unknown tasks, data that cannot be read, and a model without a tokenizer.
    """
    if limit is not None and limit < 1:
        raise Zamba2Error(f"limit is {limit}; at least 1 question is needed.")
    lm = open_lm(model, batch=batch, seed=seed, progress=progress)
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.utils import handle_non_serializable

    wanted, manager = find_tasks(tasks, include)
    store = None
    if cache is not None:
        store = str(cache / f"{identity(model)}-{seed}")
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Zamba2Error(f"{cache} cannot be written to ({error.strerror or error}); choose another folder.") from None
    try:
        found = simple_evaluate(
            lm, tasks=wanted, num_fewshot=few_shot, limit=limit, batch_size=batch, use_cache=store, apply_chat_template=chat,
            system_instruction=system, gen_kwargs=dict(options) if options else None, task_manager=manager, bootstrap_iters=resamples,
        )  # fmt: skip
    except (ValueError, NotImplementedError) as error:
        if str(error).startswith("Attempted to run task") or isinstance(error, NotImplementedError):
            raise Zamba2Error(f"lm-eval cannot run this here: {brief(error)}") from error
        raise
    plain: dict[str, Any] = json.loads(json.dumps(found, default=handle_non_serializable))
    scores = {**plain["results"], **plain.get("groups", {})}
    return {
        "scores": {task: {k: v for k, v in own.items() if "," in k and isinstance(v, (int, float))} for task, own in scores.items()},
        "questions": {task: len({sample["doc_id"] for sample in own}) for task, own in plain["samples"].items()},
        "versions": plain.get("versions", {}),
        "few_shot": plain.get("n-shot", {}),
        "samples": plain["samples"],
        "settings": {
            "tasks": [str(task) if isinstance(task, (str, Path)) else str(task.get("task")) for task in tasks], "few_shot": few_shot,
            "limit": limit, "batch": batch, "chat": chat, "system": system, "options": dict(options) if options else None, "seed": seed,
            "resamples": resamples,
        },
    }  # fmt: skip


def find_tasks(tasks: Sequence[str | Path | Mapping[str, Any]], include: Path | None) -> tuple[list[Any], Any]:
    """Tasks as lm-eval takes them, and the manager that loads them. Raises Zamba2Error for unknown names and missing files."""
    from lm_eval.tasks import TaskManager

    class Manager(TaskManager):
        def load(self, task_list: Any) -> Any:
            try:
                return super().load(task_list)
            except Exception as error:  # of YAML, of the datasets library, of a task's own code
                names = brief(", ".join(str(t) if isinstance(t, str) else str(t.get("task")) for t in task_list))
                what = f"{type(error).__name__}: {brief(error)}"
                raise Zamba2Error(f"lm-eval cannot load {names} ({what}); its data may have to be downloaded first.") from error

    if not tasks:
        raise Zamba2Error("there is no task; give names of lm-eval's tasks, or YAML files.")
    if include is not None and not include.is_dir():
        raise Zamba2Error(f"{include} is no folder; a folder with tasks in YAML files is needed.")
    files = {str(task) for task in tasks if not isinstance(task, Mapping) and Path(task).suffix in (".yaml", ".yml")}
    for file in sorted(files):
        if not Path(file).is_file():
            raise Zamba2Error(f"{file} does not exist; a YAML file with a task of lm-eval's is needed.")
    named = [task for task in tasks if not isinstance(task, Mapping) and str(task) not in files]
    # looking through all of lm-eval's own takes seconds
    manager = Manager(include_path=None if include is None else str(include), include_defaults=bool(named))
    wanted: list[Any] = []
    for task in tasks:
        if isinstance(task, Mapping):
            wanted.append(dict(task))
        elif str(task) in files:
            wanted.append(str(task))
        else:
            matching = [str(task)] if str(task) in manager.all_tasks else manager.match_tasks([str(task)])
            if not matching:
                near = difflib.get_close_matches(str(task), manager.all_tasks, 3)
                hint = f"; did you mean {', '.join(near)}?" if near else "; `lm-eval ls tasks` lists them."
                raise Zamba2Error(f"lm-eval has no task {str(task)!r}{hint}")
            wanted += matching
    return wanted, manager
