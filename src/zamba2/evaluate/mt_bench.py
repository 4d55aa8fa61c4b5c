"""MT-Bench: 80 questions of two turns, answers rated by a judge from 1 to 10.

The benchmark is Zheng et al. 2023 (arXiv 2306.05685) as FastChat runs it (fastchat/llm_judge: gen_model_answer.py, gen_judgment.py,
common.py, show_result.py). Its questions, judge prompts and reference answers are files of FastChat (Apache-2.0) and not in this package;
answers and judgments are written in its layouts, so either program goes on with the other's files.

    questions -> answer_questions -> model_answer/MODEL.jsonl -> judge_requests, judge_answers -> model_judgment/JUDGE_single.jsonl
    -> read_judgments -> aggregate
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import string
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zamba2.errors import Zamba2Error
from zamba2.evaluate.answers import DECISIVE, decisive
from zamba2.evaluate.judge import Endpoint, Failure, Outcome
from zamba2.evaluate.lines import Lines, Row, parsed
from zamba2.evaluate.results import slug
from zamba2.language.messages import brief
from zamba2.weights.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from zamba2.evaluate.answers import Answers

__all__ = [
    "CATEGORIES", "JUDGE_TOKENS", "MAX_TOKENS", "REPLY_CHARACTERS", "TEMPERATURES", "Answered", "CategoryScores", "JudgePrompt",
    "JudgeRequest", "Judged", "Judgment", "Mean", "ModelAnswers", "ModelScores", "MtBenchScores", "Question", "aggregate",
    "answer_questions", "answers_file", "chart", "check_references", "judge_answers", "judge_requests", "judgments_file", "parse_rating",
    "read_answers", "read_judge_prompts", "read_judgments", "read_questions", "table", "unjudged",
]  # fmt: skip

# common.py, temperature_config; other categories are sampled at 0.7.
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1,
}  # fmt: skip
OTHER_TEMPERATURE = 0.7
MAX_TOKENS = 1024  # of an answer; gen_model_answer.py
JUDGE_TOKENS = 2048  # of a judgment; common.py
REFERENCE_CATEGORIES = ("math", "reasoning", "coding")  # common.py, NEED_REF_CATS
# In the order of the published questions, ten of each from number 81 on.
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
FIRST, EACH = 81, 10
RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))  # common.py: the second where there is no first
UNRATED = -1  # what FastChat writes where the judge gave no rating
LOWEST, HIGHEST = 0, 10  # the judge is asked for 1 to 10; FastChat counts a 0 that it gives all the same
FAILED = "$ERROR$"  # what FastChat writes for a text where a call failed
REPLY_CHARACTERS = 809  # mean length of 800 published judgments by GPT-4
CARD_SCALE = 10  # the card's 72.40 fits ten times the mean rating

QuestionId = int | str
Progress = Callable[[int, int], None]  # done, in all


@dataclass(frozen=True)
class Question:
    """One question: what the user says, turn by turn (two, or one)."""

    id: QuestionId
    category: str
    turns: tuple[str, ...]

    @property
    def temperature(self) -> float:
        return TEMPERATURES.get(self.category, OTHER_TEMPERATURE)


@dataclass(frozen=True)
class ModelAnswers:
    """A model's answers by question: one text a turn."""

    name: str
    turns: Mapping[QuestionId, tuple[str, ...]]
    path: Path


@dataclass(frozen=True)
class JudgePrompt:
    """How the judge is asked: ``template`` holds {question}, {answer} and the like."""

    name: str
    system: str
    template: str


@dataclass(frozen=True)
class JudgeRequest:
    """One answer to be rated: which it is, and the conversation that asks for the rating."""

    question_id: QuestionId
    turn: int
    model: str
    prompt: str
    messages: tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Judgment:
    """One rating, ``score`` from 0 to 10 or -1 where the judge gave none."""

    question_id: QuestionId
    turn: int
    model: str
    judge: str
    score: float


# ---- files of JSON lines ---------------------------------------------------------------------------------------------


def _read(path: Path, what: str, *, growing: bool = False) -> list[tuple[str, Row]]:
    """Rows of a file of ``what``. Raises Zamba2Error, also if there are none."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise Zamba2Error(f"{path} does not exist; a file of {what} is needed.") from None
    except OSError as error:
        raise Zamba2Error(f"{path} cannot be read ({error.strerror or error}); a file of {what} is needed.") from None
    rows, _ = parsed(path, data, growing=growing)
    if not rows:
        raise Zamba2Error(f"{path} holds nothing; a file of {what} is needed.")
    return rows


def _get(row: Row, place: str, name: str, what: str, *types: type) -> Any:
    """A field of a row. Raises Zamba2Error if it is missing or of another type; True and False are no numbers."""
    if name not in row:
        found = brief(", ".join(map(str, row))) or "nothing"
        raise Zamba2Error(f"{place} has no {name}, found were {found}; a file of {what} is needed.")
    value = row[name]
    if not isinstance(value, types) or isinstance(value, bool):
        raise Zamba2Error(f"{place}: {name} is {brief(json.dumps(value))}; {what} have {' or '.join(t.__name__ for t in types)} there.")
    return value


def _turns(row: Row, place: str, what: str) -> tuple[str, ...]:
    value = _get(row, place, "turns", what, list)
    if not value or not all(isinstance(text, str) for text in value):
        raise Zamba2Error(f"{place}: turns is {brief(json.dumps(value))}; {what} have a list of texts there.")
    return tuple(value)


QUESTIONS = "questions (FastChat's data/mt_bench/question.jsonl: question_id, category, turns)"
ANSWERS = "answers (FastChat's model_answer/MODEL.jsonl: question_id, model_id, choices)"
REFERENCES = "reference answers (FastChat's data/mt_bench/reference_answer/gpt-4.jsonl: question_id, choices)"
PROMPTS = "judge prompts (FastChat's data/judge_prompts.jsonl: name, type, system_prompt, prompt_template)"
JUDGMENTS = "judgments (FastChat's model_judgment/JUDGE_single.jsonl: question_id, model, judge, score, turn)"


def read_questions(path: Path) -> list[Question]:
    """Questions in the order of the file. Raises Zamba2Error."""
    questions: dict[QuestionId, Question] = {}
    for place, row in _read(path, QUESTIONS):
        identity = _get(row, place, "question_id", QUESTIONS, int, str)
        turns = _turns(row, place, QUESTIONS)
        if len(turns) > 2:
            raise Zamba2Error(f"{place} has {len(turns)} turns; the judge's prompts are for one or two.")
        if identity in questions:
            raise Zamba2Error(f"{place} is a second question {identity}; each needs a number of its own.")
        questions[identity] = Question(identity, _get(row, place, "category", QUESTIONS, str), turns)
    return list(questions.values())


def read_answers(path: Path, *, references: bool = False) -> ModelAnswers:
    """One model's answers, or reference answers; the model is called as its file is, and of several answers to a question the last
    counts, as in FastChat. Raises Zamba2Error."""
    what = REFERENCES if references else ANSWERS
    turns = {}
    for place, row in _read(path, what, growing=not references):
        identity = _get(row, place, "question_id", what, int, str)
        turns[identity] = _first_choice(row, place, what)
    return ModelAnswers(path.name.removesuffix(".jsonl"), turns, path)


def _first_choice(row: Row, place: str, what: str) -> tuple[str, ...]:
    choices = _get(row, place, "choices", what, list)
    if not choices or not isinstance(choices[0], dict):
        raise Zamba2Error(f"{place}: choices is {brief(json.dumps(choices))}; {what} have a list of objects with turns there.")
    turns = _turns(choices[0], place, what)
    if FAILED in turns:
        raise Zamba2Error(f"{place} holds {FAILED}, FastChat's mark of a failed call; take the line out to have it answered again.")
    return turns


def answers_file(folder: Path, model: str) -> Path:
    """Where FastChat keeps a model's answers, below its folder of a benchmark."""
    return folder / "model_answer" / f"{slug(model)}.jsonl"


def judgments_file(folder: Path, judge: str) -> Path:
    """Where FastChat keeps a judge's ratings of single answers, below its folder of a benchmark."""
    return folder / "model_judgment" / f"{slug(judge)}_single.jsonl"


# ---- answers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answered:
    """What a call of ``answer_questions`` did: all answers, and how many turns of them are new."""

    answers: ModelAnswers
    made: int


def answer_questions(
    answers: Answers, questions: Sequence[Question], out: Path, *, max_tokens: int = MAX_TOKENS, seed: int | None = 0,
    progress: Progress | None = None,
) -> Answered:  # fmt: skip
    """Have every turn of every question answered, the model's own first answer standing before the second turn.

    ``out`` gets a line for each question once all its turns are there; the first turns of the others wait in OUT.turns, so that what was
    generated before an interruption is not generated again. Temperatures go by category. Answers lose white space around them.
    Raises Zamba2Error, also where ``out`` was begun by another model or with other settings.
    """
    if not questions:
        raise Zamba2Error("there are no questions; at least one is needed.")
    made = 0
    with Lines(out) as whole, Lines(out.with_name(out.name + ".turns")) as single:
        about = decisive(answers)
        done, said = _begun(answers.name, about, questions, whole, single, max_tokens, seed)
        total = sum(len(question.turns) for question in questions)
        finished = sum(len(question.turns) if question.id in done else len(said.get(question.id, ())) for question in questions)
        if progress is not None:
            progress(finished, total)
        for turn in (1, 2):
            open_ones = [q for q in questions if q.id not in done and len(q.turns) >= turn and len(said.get(q.id, ())) == turn - 1]
            for temperature in sorted({question.temperature for question in open_ones}):
                group = [question for question in open_ones if question.temperature == temperature]
                conversations = [_conversation(question, said.get(question.id, ())) for question in group]
                missing = set(range(len(group)))
                for index, text in answers.answer(conversations, max_tokens=max_tokens, temperature=temperature, seed=seed):
                    question = group[index]
                    missing.discard(index)
                    spoken = (*said.get(question.id, ()), text.strip())
                    row: dict[str, Any] = {"question_id": question.id, "answer_id": uuid.uuid4().hex[:22], "model_id": answers.name}
                    row |= {"choices": [{"index": 0, "turns": list(spoken)}], "tstamp": time.time()}
                    row["generate_params"] = _settings(question, max_tokens, seed) | about
                    (whole if len(spoken) == len(question.turns) else single).append(row)
                    said[question.id] = spoken
                    made += 1
                    finished += 1
                    if progress is not None:
                        progress(finished, total)
                if missing:
                    left = ", ".join(str(group[index].id) for index in sorted(missing))
                    raise Zamba2Error(f"{answers.name} gave no answer in turn {turn} to question {brief(left)}; run this again.")
        if {row["question_id"] for _, row in single.rows} <= {question.id for question in questions}:
            single.path.unlink(missing_ok=True)
    return Answered(read_answers(out), made)


def _settings(question: Question, max_tokens: int, seed: int | None) -> dict[str, Any]:
    """What an answer depends on, in the spelling of FastChat where it has one."""
    digest = hashlib.sha256(json.dumps(question.turns).encode()).hexdigest()[:16]
    return {"max_new_token": max_tokens, "temperature": question.temperature, "seed": seed, "question_sha256": digest}


def _conversation(question: Question, said: Sequence[str]) -> list[dict[str, str]]:
    messages = []
    for user, assistant in zip(question.turns, said, strict=False):
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return [*messages, {"role": "user", "content": question.turns[len(said)]}]


def _begun(
    answering: str, about: Mapping[str, Any], questions: Sequence[Question], whole: Lines, single: Lines, max_tokens: int, seed: int | None
) -> tuple[set[QuestionId], dict[QuestionId, tuple[str, ...]]]:
    """The questions that are answered, and what was said of the others. Raises Zamba2Error for lines of another run."""
    wanted = {question.id: question for question in questions}
    done: set[QuestionId] = set()
    said: dict[QuestionId, tuple[str, ...]] = {}
    for lines in (whole, single):
        for place, row in lines.rows:
            identity = _get(row, place, "question_id", ANSWERS, int, str)
            turns = _first_choice(row, place, ANSWERS)
            model = _get(row, place, "model_id", ANSWERS, str)
            if model != answering:
                raise Zamba2Error(f"{place} is an answer of {brief(model)}, not of {answering}; give another place for these answers.")
            if identity not in wanted:
                continue  # this run may be for some of the questions only
            question, was = wanted[identity], row.get("generate_params")
            now = _settings(question, max_tokens, seed) | dict.fromkeys(DECISIVE) | dict(about)
            for name, value in now.items():
                if isinstance(was, dict) and was.get(name) != value:
                    what = "another question" if name == "question_sha256" else f"{name} {brief(was.get(name))}, not {value}"
                    raise Zamba2Error(f"{place} was made with {what}; give another place for these answers, or move that file away.")
            if len(turns) > len(question.turns) or (lines is whole and len(turns) != len(question.turns)):
                raise Zamba2Error(f"{place} has {len(turns)} turns and question {identity} has {len(question.turns)}; move that file away.")
            if lines is whole:
                done.add(identity)
            elif identity not in done:
                said[identity] = turns
    return done, said


# ---- judging ---------------------------------------------------------------------------------------------------------

# (with a reference, turn): the name of the prompt, the fields it may have and, first, the one it must have.
KINDS: Mapping[tuple[bool, int], tuple[str, tuple[str, ...]]] = {
    (False, 1): ("single-v1", ("answer", "question")),
    (True, 1): ("single-math-v1", ("answer", "question", "ref_answer_1", "ref_answer_2")),
    (False, 2): ("single-v1-multi-turn", ("answer_2", "answer_1", "question_1", "question_2")),
    (True, 2): ("single-math-v1-multi-turn", ("answer_2", "answer_1", "question_1", "question_2", "ref_answer_1", "ref_answer_2")),
}


def read_judge_prompts(path: Path) -> dict[str, JudgePrompt]:
    """The four prompts for rating single answers, by name; others in the file are left aside. Raises Zamba2Error."""
    prompts = {}
    kinds = dict(KINDS.values())
    for place, row in _read(path, PROMPTS):
        name = _get(row, place, "name", PROMPTS, str)
        if name not in kinds:
            continue
        template = _get(row, place, "prompt_template", PROMPTS, str)
        if row.get("output_format", "[[rating]]") != "[[rating]]":
            raise Zamba2Error(f"{place}: output_format is {brief(json.dumps(row['output_format']))}; ratings are read as [[rating]].")
        try:
            fields = [(name, spec, how) for _, name, spec, how in string.Formatter().parse(template) if name is not None]
        except ValueError as error:
            raise Zamba2Error(f"{place}: prompt_template is malformed ({brief(error)}); get the file again.") from None
        names = {name for name, _, _ in fields}
        if not names <= set(kinds[name]) or kinds[name][0] not in names or any(spec or how for _, spec, how in fields):
            found, known = brief(", ".join(sorted(names))) or "nothing", ", ".join(kinds[name])
            raise Zamba2Error(f"{place}: the fields of prompt_template are {found}; {name} has {known}, and needs {kinds[name][0]}.")
        prompts[name] = JudgePrompt(name, _get(row, place, "system_prompt", PROMPTS, str), template)
    if missing := [name for name in kinds if name not in prompts]:
        raise Zamba2Error(f"{path} has no prompt {', '.join(missing)}; a file of {PROMPTS} is needed.")
    return prompts


def check_references(questions: Sequence[Question], references: ModelAnswers | None) -> None:
    """Raise Zamba2Error where questions of REFERENCE_CATEGORIES have no reference answers: before hours of answering, not behind them."""
    guided = [question for question in questions if question.category in REFERENCE_CATEGORIES]
    if references is not None:
        _check_complete(references, "a reference answer", guided)
    elif guided:
        cases = ", ".join(sorted({question.category for question in guided}))
        raise Zamba2Error(f"questions of {cases} are judged beside reference answers; give a file of {REFERENCES}.")


def _check_complete(held: ModelAnswers, what: str, questions: Sequence[Question]) -> None:
    missing = [str(question.id) for question in questions if len(held.turns.get(question.id, ())) < len(question.turns)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise Zamba2Error(f"{held.path} lacks {what} to a turn of question {missing[0]}{more}; it is cut short or of other questions.")


def judge_requests(
    questions: Sequence[Question], answers: ModelAnswers, prompts: Mapping[str, JudgePrompt], references: ModelAnswers | None = None
) -> list[JudgeRequest]:
    """What the judge is to be asked about a model: one request for each turn of each question.

    The second turn shows the judge the whole conversation; questions of REFERENCE_CATEGORIES go with the reference answers.
    Raises Zamba2Error, before anything is asked, for answers or references that are missing.
    """
    check_references(questions, references)
    _check_complete(answers, "an answer", questions)
    requests = []
    for turn in (1, 2):
        for question in questions:
            if len(question.turns) >= turn:
                requests.append(_request(question, turn, answers, prompts, references))
    return requests


def _request(
    question: Question, turn: int, answers: ModelAnswers, prompts: Mapping[str, JudgePrompt], references: ModelAnswers | None
) -> JudgeRequest:
    guided = question.category in REFERENCE_CATEGORIES
    said = answers.turns[question.id]
    fields = {"question": question.turns[0], "answer": said[0]}
    fields |= {f"question_{i}": text for i, text in enumerate(question.turns, 1)} | {f"answer_{i}": text for i, text in enumerate(said, 1)}
    if guided and references is not None:
        reference = references.turns[question.id]
        fields |= {f"ref_answer_{i}": text for i, text in enumerate(reference, 1)}
    prompt = prompts[KINDS[guided, turn][0]]
    try:
        text = prompt.template.format(**fields)
    except KeyError as error:
        raise Zamba2Error(f"the prompt {prompt.name} asks for {error.args[0]}, which question {question.id} has not.") from None
    system = ({"role": "system", "content": prompt.system},) if prompt.system else ()
    return JudgeRequest(question.id, turn, answers.name, prompt.name, (*system, {"role": "user", "content": text}))


def parse_rating(judgment: str) -> float:
    """The rating in a judge's text: the first [[5]], else the first [5], else -1.

    As published, but for one thing: what is not from 0 to 10, such as a year in brackets, is no rating and -1.
    """
    for pattern in RATINGS:
        if found := pattern.search(judgment):
            rating = float(found[1])
            if not LOWEST <= rating <= HIGHEST:
                return UNRATED
            return int(rating) if rating.is_integer() and "." not in found[1] else rating
    return UNRATED


@dataclass(frozen=True)
class Judged:
    """What a call of ``judge_answers`` did. made: new judgments; kept: those that were there; failures: requests without one, and why."""

    made: int
    kept: int
    failures: Sequence[tuple[JudgeRequest, str]]


def unjudged(requests: Sequence[JudgeRequest], out: Path, judge: str) -> list[JudgeRequest]:
    """Those of the requests that ``judge_answers`` would still ask. Raises Zamba2Error."""
    rows = parsed(out, out.read_bytes(), growing=True)[0] if out.is_file() else []
    return _open(requests, rows, judge)


def _open(requests: Sequence[JudgeRequest], rows: Sequence[tuple[str, Row]], judge: str) -> list[JudgeRequest]:
    wanted = {(request.question_id, request.turn, request.model): request for request in requests}
    done = set()
    for place, row in rows:
        found = _judgment(place, row)
        key = (found.question_id, found.turn, found.model)
        if found.judge != judge or key not in wanted or row.get("judgment") == FAILED:
            continue
        asked = row.get("user_prompt")
        if asked is not None and asked != wanted[key].messages[-1]["content"]:
            what = f"{place} judges another answer of {found.model} to question {found.question_id}, or by another prompt"
            raise Zamba2Error(f"{what}; move that file away or give another place for these judgments.")
        done.add(key)
    return [request for key, request in wanted.items() if key not in done]


def judge_answers(endpoint: Endpoint, requests: Sequence[JudgeRequest], out: Path, *, progress: Progress | None = None) -> Judged:
    """Have answers rated, at temperature 0. ``out`` gets a line for each judgment as it comes, and one that is there is not asked again.

    A request that fails, after the endpoint's retries, gets a line in OUT.failures.jsonl and none in ``out``: it is no rating, and the
    next call asks again. Raises Zamba2Error where going on is of no use; then and on Ctrl-C all that came is written.
    """
    failures: list[tuple[JudgeRequest, str]] = []
    made = 0
    with Lines(out) as lines, _Failures(out.with_name(out.name.removesuffix(".jsonl") + ".failures.jsonl")) as failed:
        waiting = _open(requests, lines.rows, endpoint.model)
        kept = len(requests) - len(waiting)
        if progress is not None:
            progress(kept, len(requests))

        def receive(index: int, outcome: Outcome) -> None:
            nonlocal made
            request = waiting[index]
            about: dict[str, Any] = {"question_id": request.question_id, "model": request.model, "judge": [endpoint.model, request.prompt]}
            if isinstance(outcome, Failure):
                failures.append((request, outcome.reason))
                failed.append(about | {"turn": request.turn, "failure": outcome.reason, "tstamp": time.time()})
            else:
                about |= {"user_prompt": request.messages[-1]["content"], "judgment": outcome}
                lines.append(about | {"score": parse_rating(outcome), "turn": request.turn, "tstamp": time.time()})
                made += 1
            if progress is not None:
                progress(kept + made + len(failures), len(requests))

        endpoint.ask_all([request.messages for request in waiting], receive, max_tokens=JUDGE_TOKENS)
    return Judged(made, kept, failures)


class _Failures:
    """A file of JSON lines that is there only once something has failed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: Lines | None = None

    def append(self, row: Row) -> None:
        self._lines = self._lines or Lines(self.path)
        self._lines.append(row)

    def __enter__(self) -> _Failures:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lines is not None:
            self._lines.close()


# ---- scores ----------------------------------------------------------------------------------------------------------


def _judgment(place: str, row: Row) -> Judgment:
    identity = _get(row, place, "question_id", JUDGMENTS, int, str)
    model = _get(row, place, "model", JUDGMENTS, str)
    judge = row.get("judge")
    if not isinstance(judge, list) or not judge or not isinstance(judge[0], str):
        raise Zamba2Error(f"{place}: judge is {brief(json.dumps(judge))}; {JUDGMENTS} have a list of its name and the prompt's there.")
    turn = _get(row, place, "turn", JUDGMENTS, int)
    score = _get(row, place, "score", JUDGMENTS, int, float)
    if turn not in (1, 2):
        raise Zamba2Error(f"{place}: turn is {turn}; 1 or 2 is needed.")
    if not (score == UNRATED or LOWEST <= score <= HIGHEST):
        raise Zamba2Error(f"{place}: score is {score}; a rating of 1 to 10 is needed, or {UNRATED} where the judge gave none.")
    return Judgment(identity, turn, model, judge[0], score)


def read_judgments(path: Path) -> list[Judgment]:
    """Ratings of single answers, also of several models. Raises Zamba2Error."""
    return [_judgment(place, row) for place, row in _read(path, JUDGMENTS, growing=True)]


@dataclass(frozen=True)
class Mean:
    """Of ``ratings`` ratings, on the scale of 1 to 10; None if there are none."""

    value: float | None
    ratings: int

    @property
    def percent(self) -> float | None:
        """On the card's scale of 100: ten times the mean."""
        return None if self.value is None else CARD_SCALE * self.value

    @classmethod
    def of(cls, scores: Iterable[float]) -> Mean:
        rated = [score for score in scores if score != UNRATED]
        return cls(math.fsum(rated) / len(rated) if rated else None, len(rated))

    def to_dict(self) -> dict[str, Any]:
        return {"mean": self.value, "of_100": self.percent, "ratings": self.ratings}


@dataclass(frozen=True)
class CategoryScores:
    """One category: both turns together, and each turn."""

    overall: Mean
    turns: Mapping[int, Mean]


@dataclass(frozen=True)
class ModelScores:
    """One model's scores. unrated: judgments without a rating, which are in no mean; repeated: judgments beyond the first of the same
    turn, which are in the means as in FastChat; missing: turns without a judgment, None where the questions are not known."""

    model: str
    judge: str
    overall: Mean
    turns: Mapping[int, Mean]
    categories: Mapping[str, CategoryScores]
    unrated: int
    repeated: int
    missing: int | None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""

        def by_turn(turns: Mapping[int, Mean]) -> dict[str, Any]:
            return {str(turn): mean.to_dict() for turn, mean in turns.items()}

        return {
            "model": self.model, "judge": self.judge, **self.overall.to_dict(), "turns": by_turn(self.turns),
            "categories": {name: {**c.overall.to_dict(), "turns": by_turn(c.turns)} for name, c in self.categories.items()},
            "unrated": self.unrated, "repeated": self.repeated, "missing": self.missing,
        }  # fmt: skip


@dataclass(frozen=True)
class MtBenchScores:
    """Scores of every model in a file of judgments, in its order."""

    models: Mapping[str, ModelScores] = field(default_factory=dict)

    def of(self, model: str) -> ModelScores:
        """Raises Zamba2Error if there are no judgments of this model."""
        if model not in self.models:
            raise Zamba2Error(f"there is no judgment of {brief(model)}; there are judgments of {brief(', '.join(self.models))}.")
        return self.models[model]

    def to_dict(self) -> dict[str, Any]:
        return {name: scores.to_dict() for name, scores in self.models.items()}


def aggregate(judgments: Iterable[Judgment], questions: Sequence[Question] | None = None) -> MtBenchScores:
    """Mean ratings as FastChat's show_result.py takes them: over all judgments but those of -1, one that is there twice counted twice.

    Categories are those of the questions, or without them those of the published 80 by number. Raises Zamba2Error for judgments of
    other questions, for two judges of one model, and for ratings that are none.
    """
    judged: dict[str, list[Judgment]] = {}
    turns = None if questions is None else {question.id: len(question.turns) for question in questions}
    known: dict[QuestionId, str] = {question.id: question.category for question in questions or ()}
    if questions is None:
        known |= {FIRST + i: CATEGORIES[i // EACH] for i in range(EACH * len(CATEGORIES))}
    for judgment in judgments:
        if judgment.question_id not in known:
            advice = "give its file of questions" if questions is None else "it belongs to other questions"
            raise Zamba2Error(f"{judgment.model} was judged on question {judgment.question_id}, which is not known; {advice}.")
        if turns is not None and judgment.turn > turns[judgment.question_id]:
            raise Zamba2Error(f"{judgment.model} was judged on turn 2 of question {judgment.question_id}, which has one turn.")
        if not (judgment.score == UNRATED or LOWEST <= judgment.score <= HIGHEST):
            where = f"the score of {judgment.model} on question {judgment.question_id}"
            raise Zamba2Error(f"{where} is {judgment.score}; a rating of 1 to 10 is needed, or {UNRATED} where the judge gave none.")
        judged.setdefault(judgment.model, []).append(judgment)
    if not judged:
        raise Zamba2Error("there are no judgments; at least one is needed.")
    everything = None if turns is None else {(identity, turn) for identity, count in turns.items() for turn in range(1, count + 1)}
    return MtBenchScores({model: _model_scores(model, rows, known, everything) for model, rows in judged.items()})


def _model_scores(
    model: str, judgments: Sequence[Judgment], categories: Mapping[QuestionId, str], everything: set[tuple[QuestionId, int]] | None
) -> ModelScores:
    judges = list(dict.fromkeys(judgment.judge for judgment in judgments))
    if len(judges) > 1:
        raise Zamba2Error(f"{model} was judged by {' and '.join(judges)}, whose ratings are not comparable; give the judgments of one.")
    scores: dict[str, dict[int, list[float]]] = {}
    for judgment in judgments:
        scores.setdefault(categories[judgment.question_id], {}).setdefault(judgment.turn, []).append(judgment.score)
    found = {(judgment.question_id, judgment.turn) for judgment in judgments}
    order = [*CATEGORIES, *sorted(set(scores) - set(CATEGORIES))]
    by_category = {
        name: CategoryScores(
            Mean.of(score for turn in scores[name].values() for score in turn),
            {turn: Mean.of(scores[name][turn]) for turn in sorted(scores[name])},
        )
        for name in order
        if name in scores
    }
    return ModelScores(
        model, judges[0], Mean.of(judgment.score for judgment in judgments),
        {turn: Mean.of(j.score for j in judgments if j.turn == turn) for turn in sorted({j.turn for j in judgments})},
        by_category, sum(judgment.score == UNRATED for judgment in judgments), len(judgments) - len(found),
        None if everything is None else len(everything - found),
    )  # fmt: skip


def table(scores: ModelScores) -> str:
    """A Markdown table: mean rating of each turn and of both by category, and on the card's scale."""

    def cell(mean: Mean | None) -> str:
        return "" if mean is None or mean.value is None else f"{mean.value:.2f}"

    rows = [(name, category.turns, category.overall) for name, category in scores.categories.items()]
    rows.append(("**all**", scores.turns, scores.overall))
    lines = ["| category | turn 1 | turn 2 | both | of 100 |", "|---|---:|---:|---:|---:|"]
    for name, turns, overall in rows:
        percent = "" if overall.percent is None else f"{overall.percent:.2f}"
        lines.append(f"| {name} | {cell(turns.get(1))} | {cell(turns.get(2))} | {cell(overall)} | {percent} |")
    return "\n".join(lines) + "\n"


# ---- the chart -------------------------------------------------------------------------------------------------------

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")  # Okabe and Ito's, told apart by colour-blind readers
MOST_MODELS = len(COLOURS)


def chart(scores: Sequence[ModelScores], target: Path) -> list[Path]:
    """Bars of mean ratings per category, as TARGET.png and TARGET.svg: of each turn for one model, of each model for up to five.

    Returns the paths. Raises Zamba2Error.
    """
    if not 1 <= len(scores) <= MOST_MODELS:
        raise Zamba2Error(f"a chart of {len(scores)} models cannot be read; give 1 to {MOST_MODELS}.")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    one = scores[0] if len(scores) == 1 else None
    found_names = {name for model in scores for name in model.categories}
    names = [*(name for name in CATEGORIES if name in found_names), *sorted(found_names - set(CATEGORIES))]
    series: list[tuple[str, list[float | None], float | None]] = []
    if one is not None:
        for turn, mean in one.turns.items():
            found = [one.categories[name].turns.get(turn) for name in names]
            series.append((f"turn {turn}", [None if m is None else m.value for m in found], mean.value))
        title = f"MT-Bench of {one.model}"
    else:
        for model in scores:
            values = [model.categories[name].overall.value if name in model.categories else None for name in names]
            series.append((model.model, values, model.overall.value))
        title = "MT-Bench"
    judges = ", ".join(dict.fromkeys(s.judge for s in scores))
    with matplotlib.rc_context({"svg.hashsalt": "zamba2", "font.size": 12}):
        figure = Figure(figsize=(7, 2 + len(names) * (0.3 + 0.2 * max(3, len(series))) + 0.2 * len(series)), layout="constrained")
        FigureCanvasAgg(figure)
        _bars(figure.add_subplot(), names, series)
        total = "" if one is None or one.overall.value is None else f"{one.overall.value:.2f} of 10, {one.overall.percent:.1f} of 100, "
        figure.suptitle(f"{_short(title, 60)}\n{total}judged by {_short(judges, 40)}", fontsize=13)
        figure.legend(loc="outside lower center", ncols=2 if one is not None else 1, frameon=False)
        paths = [target.with_name(f"{target.name}.{kind}") for kind in ("png", "svg")]
        for path in paths:
            with replacing(path) as place:
                metadata = {"Date": None} if path.suffix == ".svg" else None  # the same scores give the same bytes
                figure.savefig(place, format=path.suffix[1:], dpi=150, metadata=metadata)
    return paths


def _short(text: str, length: int) -> str:
    """A name as matplotlib shows it: it reads $ as mathematics, and leaves what begins with _ out of a legend."""
    shown = text if len(text) <= length else text[: length - 1] + "…"
    return (" " if shown.startswith("_") else "") + shown.replace("$", r"\$")


def _bars(axes: Axes, names: Sequence[str], series: Sequence[tuple[str, list[float | None], float | None]]) -> None:
    """Groups of horizontal bars from top to bottom, each with its value behind it."""
    thickness = 0.8 / len(series)
    for number, (label, values, mean) in enumerate(series):
        shown = [(i + (number - (len(series) - 1) / 2) * thickness, value) for i, value in enumerate(values) if value is not None]
        told = _short(label, 45) + ("" if mean is None else f" (mean {mean:.2f})")
        axes.barh([y for y, _ in shown], [value for _, value in shown], height=thickness * 0.92, color=COLOURS[number], label=told)
        for y, value in shown:
            axes.text(value + 0.1, y, f"{value:.1f}", va="center", fontsize=11 if len(series) < 3 else 10)
    axes.set_yticks(range(len(names)), [_short(name, 20) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 10.8)
    axes.set_xticks(range(0, 11, 2))
    axes.set_xlabel("mean rating by the judge (1 to 10)")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
