"""Tools: what a call may be, how it comes out of a reply, and how the official clients see it and send it back."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import zamba2
from zamba2.errors import Zamba2Error
from zamba2.language.generate import Constraint, collect
from zamba2.language.model import LanguageModel
from zamba2.language.sampling import Sampler
from zamba2.serve.tools import (
    BEGIN,
    END,
    Call,
    CallReader,
    Calls,
    Result,
    Tool,
    Toolbox,
    Turn,
    compact,
    conversation,
    described,
    unanswered_call,
)

pytest.importorskip("anthropic", reason="clients come with the extra [test]")
pytest.importorskip("openai", reason="clients come with the extra [test]")
pytest.importorskip("llguidance", reason="calls need the extra [serve]")
pytest.importorskip("uvicorn", reason="the server needs the extra [serve]")

from pydantic import BaseModel
from pydantic_core import from_json
from test_grammar import COLOR, HOSTILE, POINT, array, record, valid
from test_serve import CHAT, HELLO, MESSAGE, RESPONSE, Live, check_error

from zamba2.serve.grammar import Grammars

NOTE = {"type": "string", "maxLength": 12}
SCHEMAS: dict[str, dict[str, Any]] = {
    "weather": record(city={"enum": ["Paris", "Rome", "São Paulo"]}, days={"type": "integer", "minimum": 1, "maximum": 9}),
    "weather_2": record(at=POINT),
    "take-note": record(text=NOTE, tags=array(COLOR, 2)),
    "nest": record(name=COLOR, inner={"anyOf": [{"$ref": "#"}, {"type": "null"}]}),
    "draw": {"$defs": {"p": POINT}, **record(line=array({"$ref": "#/$defs/p"}, 2, 1))},
    "now": record(),
}
LIST = tuple(Tool(name, f"About {name}.", schema) for name, schema in SCHEMAS.items())
CHAT_TOOLS: list[Any] = [
    {"type": "function", "function": {"name": tool.name, "description": tool.description, "parameters": tool.parameters}} for tool in LIST
]
RESPONSE_TOOLS: list[Any] = [{"type": "function"} | tool["function"] for tool in CHAT_TOOLS]
ANTHROPIC_TOOLS: list[Any] = [{"name": t.name, "description": t.description, "input_schema": t.parameters} for t in LIST]
TOOLS = {CHAT: CHAT_TOOLS, RESPONSE: RESPONSE_TOOLS, MESSAGE: ANTHROPIC_TOOLS}
ASKED: dict[str, dict[str, Any]] = {CHAT: {"messages": HELLO}, RESPONSE: {"input": HELLO}, MESSAGE: {"messages": HELLO, "max_tokens": 9}}
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return zamba2.load("random", threads=1)


@pytest.fixture(scope="module")
def demo() -> LanguageModel:
    return zamba2.load("demo", threads=1)


@pytest.fixture(scope="module")
def grammars(model: LanguageModel) -> Grammars:
    return Grammars(model.tokenizer)


@pytest.fixture(scope="module")
def live(model: LanguageModel) -> Iterator[Live]:
    """Random weights, with a cache."""
    with Live(model, cached=True) as made:
        yield made


def check_call(name: str, arguments: str) -> None:
    """A call is of a tool that there is, and its arguments satisfy the tool's schema."""
    assert valid(json.loads(arguments), SCHEMAS[name], SCHEMAS[name]), (name, arguments)


def read(text: str, calls: Calls, sizes: Sequence[int] = (1,)) -> tuple[str, CallReader]:
    """What is said in a text that comes in parts of the sizes given, again and again, and the reader behind it."""
    reader, said, heard, place, turn = CallReader(calls), "", list[list[str]](), 0, 0
    while place <= len(text):
        size = sizes[turn % len(sizes)]
        more, deltas = reader.push(text[place : place + size], last=place + size > len(text))
        said, place, turn = said + more, place + size, turn + 1
        for delta in deltas:
            heard += [] if delta.name is None else [[delta.name, ""]]
            assert delta.index == len(heard) - 1
            heard[-1][1] += delta.arguments
    assert heard == [[call.name, call.arguments] for call in reader.found]
    return said, reader


def spoken(calls: Sequence[Call]) -> str:
    """Calls as a model writes them."""
    return "\n".join(map(str, calls))


# ---- texts -----------------------------------------------------------------------------------------------------------


def test_the_form() -> None:
    """Tools stand behind the system's text, a call behind what was said before it, results in one message of the user's."""
    turns = [
        Turn("system", ("Be brief.",)), Turn("user", ("Hi",)), Turn("assistant", ("Well: ",)),
        Turn("assistant", (Call("1", "f", '{"a":1}'),)), Turn("assistant", (Call("2", "f", "{}"),)), Turn("tool", (Result("1", "x"),)),
        Turn("tool", (Result("2", "y"),)), Turn("assistant", ("Yes.",)), Turn("assistant", ("No.",)),
    ]  # fmt: skip
    assert conversation(turns, [Tool("f", "Does é.", None)]) == [
        {
            "role": "system", "content": "Be brief.\n\nYou can call the functions below; each line is one, with the JSON schema of its "
            'arguments.\n{"name":"f","description":"Does é.","parameters":{"type":"object","properties":{},"additionalProperties":false}}\n'
            "To call some, end with a line like this for each call, its name and arguments filled in:\n"
            '<tool_call>{"name":"NAME","arguments":{}}</tool_call>\n'
            "What each returns follows as <tool_response>RESULT</tool_response>. Answer in words where no call is needed.",
        },
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant", "content": 'Well: <tool_call>{"name":"f","arguments":{"a":1}}</tool_call>\n'
            '<tool_call>{"name":"f","arguments":{}}</tool_call>',
        },
        {"role": "user", "content": "<tool_response>x</tool_response>\n<tool_response>y</tool_response>"},
        {"role": "assistant", "content": "Yes."}, {"role": "assistant", "content": "No."},
    ]  # fmt: skip
    assert conversation(turns[1:2], LIST)[0] == {"role": "system", "content": described(LIST)}
    assert conversation(turns[1:2]) == [{"role": "user", "content": "Hi"}]
    assert conversation([Turn("user", ("a", "", "b"))]) == [{"role": "user", "content": "a\n\nb"}]


@pytest.mark.parametrize("order", list(itertools.permutations("123")))
def test_results_stand_as_their_calls(order: Sequence[str]) -> None:
    """In whatever order results are sent back they stand in that of their calls, also where an earlier turn used the same ids."""
    calls, results = [Call(i, "f", f'{{"n":{i}}}') for i in "123"], [Result(i, f"r{i}") for i in order]
    early = [Turn("assistant", tuple(calls[::-1])), Turn("user", tuple(Result(i, f"e{i}") for i in "123"))]
    wanted = "\n".join(str(Result(i, f"r{i}")) for i in "123")
    apart = [*(Turn("assistant", (call,)) for call in calls), *(Turn("tool", (result,)) for result in results)]
    for turns in (apart, [Turn("assistant", tuple(calls)), Turn("user", (*results, "And?"))]):
        messages = conversation([*early, *turns])
        assert messages[1]["content"] == "\n".join(str(Result(i, f"e{i}")) for i in "321")
        assert [m["content"].removesuffix("\nAnd?") for m in messages[2:]] == [spoken(calls), wanted]


def test_calls_without_results() -> None:
    """Of a reply's calls, in however many messages they come, either all have results or none."""
    first, second, third = (Turn("assistant", (Call(number, "f", "{}"),)) for number in "123")
    one, two = Turn("tool", (Result("1", ""),)), Turn("tool", (Result("2", ""),))
    assert unanswered_call([first, second, two]) == "1" and unanswered_call([first, second, one, third]) == "2"
    assert unanswered_call([first, second]) is None and unanswered_call([first, second, two, one, third]) is None


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["", '"', "\\", '\\"', "}", BEGIN, END, "}" + END, "é☃", "[{"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "}", '"']), inner, max_size=3), max_leaves=8,
)  # fmt: skip


@settings(max_examples=60)
@example(before="", arguments=[{"a": "\\"}, {"a": '\\"'}], sizes=[1])
@example(before="<tool_", arguments=[{"a": "}" + END}, {"a": "\n" + BEGIN}], sizes=[1])
@given(
    before=st.text("<tol_ca>x", max_size=20),
    arguments=st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 9) | st.just(999), min_size=1, max_size=5),
)  # fmt: skip
def test_reading_calls(before: str, arguments: list[dict[str, Any]], sizes: list[int]) -> None:
    """However a reply is cut into pieces, its text and its calls come out whole, whatever stands in the arguments."""
    before = before.replace(BEGIN, "")
    calls = [Call("", f"some-name_{i}", compact(found)) for i, found in enumerate(arguments)]
    for text, mode, wanted in ((before + spoken(calls), "may", before), (spoken(calls), "must", ""), (spoken(calls), "first", "")):
        said, reader = read(text, cast(Calls, mode), sizes)
        assert (said, [replace(call, id="") for call in reader.found], reader.is_done) == (wanted, calls, True)
        assert len({call.id for call in reader.found}) == len(calls)
    assert read(before, "may", sizes)[0] == before
    assert read("{" + before + spoken(calls), "first", sizes)[0] == "{" + before + spoken(calls)


def test_calls_that_are_cut() -> None:
    """Of calls that are cut anywhere a name is known from its end on, no part is taken for text, and what came of one is an object."""
    arguments = '{"a":[1.5,-2e+10,{"b":"é\\n\\""}],"c":true,"d":null}'
    text, first, begin = spoken([Call("", "f", arguments), Call("", "f", "{}")]), len(str(Call("", "f", arguments))), len(BEGIN)
    head = len('<tool_call>{"name":"f","arguments":')
    for end in range(len(text)):
        for calls in ("may", "must"):
            said, reader = read(text[:end], calls)
            assert said == ("" if calls == "must" or end >= begin else text[:end])
            assert [call.name for call in reader.found] == ["f"] * ((end >= head) + (end >= first + 1 + head))
            assert all(isinstance(from_json(call.arguments or "{}", allow_partial=True), dict) for call in reader.found)
            assert reader.is_done == (head + len(arguments) <= end < first + 1 + begin or end >= len(text) - len("}" + END))


# ---- constraints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_required_calls_satisfy_their_schemas(model: LanguageModel, grammars: Grammars, temperature: float) -> None:
    """Of random weights every reply that must call is calls of the tools allowed whose arguments satisfy their schemas, written as the
    history is; it is one where several are not wanted."""
    choices = [Toolbox(LIST, "required", only, parallel) for only in (None, ("now", "nest")) for parallel in (True, False)]
    choices += [Toolbox(LIST, "required", (tool.name,), parallel=False) for tool in LIST]
    boxes = choices * (1 if temperature == 0 else 6)
    requests = [
        model.request("Call.", max_tokens=1500, temperature=temperature, seed=i, constraint=grammars.compile_calls(box)())
        for i, box in enumerate(boxes)
    ]
    names, most = set(), 0
    for box, reply in zip(boxes, collect(model.backend, requests, model.tokenizer), strict=True):
        said, reader = read(reply.text, "must", [3])
        assert said == "" and reader.is_done and reply.finish_reason == "stop" and len(reader.found) <= box.most_calls
        for call in reader.found:
            check_call(call.name, call.arguments)
            assert box.only is None or call.name in box.only
        written = spoken([replace(call, arguments=compact(json.loads(call.arguments))) for call in reader.found])
        written, own = (re.sub(":-0(?=[,}])", ":0", text) for text in (written, reply.text))  # Python writes that number otherwise
        assert written == own
        names |= {call.name for call in reader.found} if box.only is None else set()
        most = max(most, len(reader.found))
    assert temperature == 0 or (len(names) > 1 and most > 1)


def walked(model: LanguageModel, constraint: Constraint, wanted: str, seed: int, most: int = 300) -> str:
    """A text of tokens that a constraint allows, up to an end token: those of a wanted text as long as they are allowed, then any."""
    draw, tokens, ids = np.random.default_rng(seed), list[int](), model.tokenizer.encode("a" + wanted, add_special_tokens=False)[1:]
    for _ in range(most):
        scores = constraint.mask(draw.normal(size=model.backend.config.vocab_size).astype(np.float32))
        allowed = ids and scores[ids[0]] > -np.inf
        token = ids.pop(0) if allowed else int(scores.argmax())
        ids = ids if allowed else []
        constraint.accept(token)
        if token in model.tokenizer.eos_token_ids:
            break
        tokens.append(token)
    return model.tokenizer.decode([*model.tokenizer.encode("a", add_special_tokens=False), *tokens])[1:]


@settings(max_examples=25)
@example(before="x", seed=0)
@example(before="<<tool_call", seed=1)
@given(before=st.text("<tol_ca> x{", max_size=12), seed=st.integers(0, 1000))
def test_free_texts_call_rightly(model: LanguageModel, grammars: Grammars, before: str, seed: int) -> None:
    """Where a reply may call, BEGIN in a text is followed by calls that satisfy their schemas, by one where several are not wanted, and by
    nothing; where it must not, BEGIN does not come, though it is wanted."""
    for parallel in (True, False):
        text = walked(model, grammars.compile_calls(Toolbox(LIST, parallel=parallel))(), before + BEGIN, seed, 3000)
        assert BEGIN in text
        said, reader = read(text, "may")
        assert text == said + spoken(reader.found) and reader.is_done and (parallel or len(reader.found) == 1)
        for call in reader.found:
            check_call(call.name, call.arguments)
    assert BEGIN not in walked(model, grammars.compile_calls(Toolbox(LIST, "none"))(), before + BEGIN, seed, 60)


def test_tokens_that_reach_beyond(model: LanguageModel, grammars: Grammars) -> None:
    """No token may complete BEGIN and go on, in whatever way BEGIN is cut into tokens; tokens of bytes spell no letter of it."""
    marks, begin = grammars.marks, BEGIN.encode()
    unused = {model.tokenizer._backend.token_to_id(f"<0x{letter:02X}>") for letter in begin}
    assert unused and unused <= set(marks.barred(0, calls=True).tolist())
    for there in range(len(begin)):
        beyond, complete = (set(marks.barred(there, calls=calls).tolist()) - unused for calls in (True, False))
        wholes = [begin[:there] + text for text in marks.texts]
        assert complete == {token for token, whole in enumerate(wholes) if begin in whole}
        assert beyond == {token for token in complete if not wholes[token].endswith(begin)}


def test_texts_are_as_without_tools(demo: LanguageModel) -> None:
    """A reply that may call and does not is word for word that of the same prompt without the constraint."""
    grammars = Grammars(demo.tokenizer)
    for text in ("One day a little", "The cat <b>"):
        plain = demo.generate(text, max_tokens=40)
        for choice in ("auto", "none"):
            made = grammars.compile_calls(Toolbox(LIST, choice))()
            assert demo.generate(text, max_tokens=40, constraint=made).tokens == plain.tokens


@pytest.mark.parametrize("seed", range(4))
def test_formats_and_calls(model: LanguageModel, grammars: Grammars, seed: int) -> None:
    """With a format for texts, a reply that may call is JSON of the format or a call, and one that must call is a call."""
    form = record(a={"enum": [BEGIN, "é"]})
    said, reader = read(walked(model, grammars.compile_calls(Toolbox(LIST), form)(), f'{{"a":"{BEGIN}', seed), "first")
    assert json.loads(said) == {"a": BEGIN} and not reader.is_calling
    for choice in ("auto", "required"):
        said, reader = read(walked(model, grammars.compile_calls(Toolbox(LIST, choice), form)(), BEGIN, seed, 3000), "first")
        assert said == "" and reader.is_done
        for call in reader.found:
            check_call(call.name, call.arguments)
    first = grammars.compile_calls(Toolbox(LIST, "required"), form)().mask(np.zeros(grammars._tokenizer.vocab_size, np.float32))
    assert {grammars.marks.texts[token][:1] for token in np.flatnonzero(first > -np.inf)} <= {b"<", b"\xff"}  # or a token of bytes


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas(grammars: Grammars, name: str) -> None:
    """A schema that is refused for a format is refused in a tool beside good ones."""
    schema, _ = HOSTILE[name]
    with pytest.raises(Zamba2Error) as caught:
        grammars.compile_calls(Toolbox((*LIST, Tool("bad", None, record(a=schema)))))
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)


def test_many_tools(grammars: Grammars) -> None:
    """What all schemas have together is limited as one schema is."""
    wide = record(**{f"p{i}": NOTE for i in range(100)})
    grammars.compile_calls(Toolbox(tuple(Tool(f"t{i}", None, SCHEMAS["draw"]) for i in range(64))))
    with pytest.raises(Zamba2Error, match="more than 2000 values"):
        grammars.compile_calls(Toolbox(tuple(Tool(f"t{i}", None, wide) for i in range(20))))
    with pytest.raises(Zamba2Error, match="characters together"):
        grammars.compile_calls(Toolbox(tuple(Tool(f"t{i}", None, record() | {"description": "x" * 40_000}) for i in range(2))))


# ---- the clients -----------------------------------------------------------------------------------------------------


def heard_chat(live: Live, **asked: Any) -> tuple[list[tuple[str | None, list[Any], str]], Any]:
    """Content, calls and reason to end of each choice of a streamed reply, and the usage."""
    said: dict[int, tuple[list[str], list[dict[str, Any]], list[str]]] = {}
    with live.openai.chat.completions.create(stream=True, stream_options={"include_usage": True}, **asked) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                content, calls, reasons = said.setdefault(choice.index, ([], [], []))
                content += [] if choice.delta.content is None else [choice.delta.content]
                for part in choice.delta.tool_calls or ():
                    if part.index == len(calls):
                        assert part.function.arguments == "" and part.type == "function"
                        calls.append({"id": part.id, "name": part.function.name, "arguments": ""})
                    calls[part.index]["arguments"] += part.function.arguments
                reasons += [choice.finish_reason] if choice.finish_reason else []
    return [("".join(content) or None, calls, *reasons) for content, calls, reasons in said.values()], chunk.usage


@pytest.mark.parametrize("parallel", [True, False])
def test_chat_calls(live: Live, parallel: bool) -> None:
    """Through OpenAI's client each of n replies that must call is calls, the same streamed and whole but for their ids; one where several
    are not wanted."""
    asked: dict[str, Any] = dict(model="demo", messages=HELLO, tools=CHAT_TOOLS, n=4, seed=5, parallel_tool_calls=parallel)
    for choice in ("required", {"type": "function", "function": {"name": "take-note"}}):
        whole = live.openai.chat.completions.create(**asked, tool_choice=choice)
        heard, usage = heard_chat(live, **asked, tool_choice=choice)
        assert usage.completion_tokens == whole.usage.completion_tokens
        for own, (content, calls, reason) in zip(whole.choices, heard, strict=True):
            assert (own.finish_reason, own.message.content) == (reason, content) == ("tool_calls", None)
            for call, streamed in zip(own.message.tool_calls, calls, strict=True):
                check_call(call.function.name, call.function.arguments)
                assert (call.function.name, call.function.arguments) == (streamed["name"], streamed["arguments"])
                assert call.id.startswith("call_") and streamed["id"] != call.id
                assert choice == "required" or call.function.name == "take-note"
        counts, ids = zip(*((len(c.message.tool_calls), {call.id for call in c.message.tool_calls}) for c in whole.choices), strict=True)
        assert len(set.union(*ids)) == sum(counts) and (max(counts) > 1) == (parallel and choice == "required")


def test_allowed_tools(live: Live) -> None:
    """Of the tools of a request those alone are called that tool_choice allows; the prompt is that of all."""
    plain = live.post(CHAT, messages=HELLO, tools=CHAT_TOOLS, max_tokens=1).json()["usage"]["prompt_tokens"]
    names = [{"type": "function", "function": {"name": name}} for name in ("now", "weather")]
    choice: Any = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": names}}
    made = live.openai.chat.completions.create(model="demo", messages=HELLO, tools=CHAT_TOOLS, tool_choice=choice, n=8, seed=3)
    counts = [len(own.message.tool_calls) for own in made.choices]
    assert {call.function.name for own in made.choices for call in own.message.tool_calls} == {"now", "weather"} and max(counts) > 1
    assert made.usage.prompt_tokens == plain
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "now"}]}
    answer = live.openai.responses.create(model="demo", input=HELLO, tools=RESPONSE_TOOLS, tool_choice=choice)
    assert {item.name for item in answer.output} == {"now"} and answer.tool_choice.to_dict() == choice


def response_events(seen: Sequence[Any]) -> list[Any]:
    """The items of a stream in the newer API as its events tell them, which are checked for their order and their numbers."""
    items = list[Any]()
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert [event.type for event in (*seen[:2], seen[-1])] == ["response.created", "response.in_progress", "response.completed"]
    for event in seen[2:-1]:
        if event.type == "response.output_item.added":
            said, closed = "", False
            assert (event.output_index, event.item.status) == (len(items), "in_progress")
        elif event.type in ("response.function_call_arguments.delta", "response.output_text.delta"):
            said += event.delta
        elif event.type in ("response.function_call_arguments.done", "response.output_text.done"):
            closed = said == (event.text if event.type == "response.output_text.done" else event.arguments)
        elif event.type == "response.output_item.done":
            assert closed and event.output_index == len(items) and event.item.status == "completed"
            items.append(event.item)
    assert items == seen[-1].response.output
    return items


@pytest.mark.parametrize("parallel", [True, False])
def test_responses_calls(live: Live, parallel: bool) -> None:
    """The newer API gives each call as an item of its own, whole and as events of the official names in their order."""
    asked: dict[str, Any] = dict(model="demo", input=HELLO, tools=RESPONSE_TOOLS, temperature=0, parallel_tool_calls=parallel)
    whole = live.openai.responses.create(**asked, tool_choice="required")
    assert (whole.status, whole.output_text, whole.parallel_tool_calls) == ("completed", "", parallel)
    assert (len(whole.output) > 1) == parallel and len({item.call_id for item in whole.output}) == len(whole.output)
    for item in whole.output:
        assert (item.type, item.status) == ("function_call", "completed")
        check_call(item.name, item.arguments)
    assert whole.tool_choice == "required" and [tool.name for tool in whole.tools] == list(SCHEMAS)
    with live.openai.responses.create(**asked, tool_choice="required", stream=True) as stream:
        items = response_events(list(stream))
    assert [(item.name, item.arguments) for item in items] == [(item.name, item.arguments) for item in whole.output]
    (named,) = (answer := live.openai.responses.create(**asked, tool_choice={"type": "function", "name": "weather"})).output
    assert named.name == "weather" and answer.tool_choice.name == "weather"


@pytest.mark.parametrize("parallel", [True, False])
def test_messages_calls(live: Live, parallel: bool) -> None:
    """Anthropic's client gets each call as a block of its own, whole and streamed; one where several are not wanted."""
    asked: dict[str, Any] = dict(model="demo", messages=HELLO, tools=ANTHROPIC_TOOLS, max_tokens=1000, extra_body=GREEDY)
    for choice in ({"type": "any"}, {"type": "tool", "name": "draw"}):
        choice = choice | ({} if parallel else {"disable_parallel_tool_use": True})
        whole = live.anthropic.messages.create(**asked, tool_choice=choice)
        assert whole.stop_reason == "tool_use" and (len(whole.content) > 1) == (parallel and choice["type"] == "any")
        for block in whole.content:
            assert block.type == "tool_use" and block.id.startswith("toolu_") and block.name == choice.get("name", block.name)
            check_call(block.name, json.dumps(block.input))
        with live.anthropic.messages.stream(**asked, tool_choice=choice) as stream:
            final = stream.get_final_message()
        assert [(b.type, b.name, b.input) for b in final.content] == [(b.type, b.name, b.input) for b in whole.content]
        assert (final.stop_reason, final.usage.output_tokens) == ("tool_use", whole.usage.output_tokens)


def test_counted_tokens_of_tools(live: Live) -> None:
    """Anthropic's client is told beforehand how many tokens a conversation with tools has."""
    import anthropic

    for system, tools in (("Be brief.", ANTHROPIC_TOOLS), ("Be brief.", []), (anthropic.omit, ANTHROPIC_TOOLS)):
        said: dict[str, Any] = dict(model="demo", messages=HELLO, system=system, tools=tools)
        usage = live.anthropic.messages.create(**said, max_tokens=1).usage
        counted = live.anthropic.messages.count_tokens(**said).input_tokens
        assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


class Branch(BaseModel):
    """What contains itself."""

    kind: Literal["oak", "elm"]
    below: Branch | None


def test_classes_as_formats_and_tools(live: Live) -> None:
    """The clients' own helpers make objects of a class that contains itself, as a format and as the arguments of calls."""
    asked: dict[str, Any] = dict(model="demo", messages=HELLO, max_tokens=1500)
    assert isinstance(live.openai.chat.completions.parse(**asked, response_format=Branch).choices[0].message.parsed, Branch)
    assert isinstance(live.openai.responses.parse(model="demo", input=HELLO, text_format=Branch).output_parsed, Branch)
    assert isinstance(live.anthropic.messages.parse(**asked, output_format=Branch).parsed_output, Branch)
    import openai

    with live.openai.chat.completions.stream(
        **asked, tools=[openai.pydantic_function_tool(Branch)], tool_choice="required", seed=1
    ) as stream:  # fmt: skip
        kinds = {event.type for event in stream}
        calls = stream.get_final_completion().choices[0].message.tool_calls
    assert kinds == {"chunk", "tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"}
    assert calls and all(isinstance(call.function.parsed_arguments, Branch) for call in calls)


# ---- what a model says by itself ---------------------------------------------------------------------------------------


@pytest.fixture
def puppet(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes every reply say a text, token by token, and then end; a token that is not allowed fails."""
    said: dict[int, tuple[Sampler, int]] = {}
    script: list[int] = []

    def sample(self: Sampler, scores: np.ndarray) -> int:
        place = said.get(id(self), (self, 0))[1]
        said[id(self)] = self, place + 1  # kept, so that the id stays its own
        assert scores[script[place]] > -np.inf
        return script[place]

    def say(text: str) -> None:
        script[:] = [*model.tokenizer.encode("a" + text, add_special_tokens=False)[1:], model.tokenizer.eos_token_ids[0]]
        assert model.tokenizer.decode(script[:-1]).strip() == text.strip()

    monkeypatch.setattr(Sampler, "sample", sample)
    return say


SPOKEN = "\nWell <tool: "
CALLED = {"text": 'a "b}', "tags": ["red"]}


@pytest.mark.parametrize("called", [[CALLED], [CALLED, {"text": "", "tags": []}, CALLED]])
def test_text_and_calls(live: Live, puppet: Callable[[str], None], called: list[dict[str, Any]]) -> None:
    """What a model says before it calls is its text, in all three layouts, whole and streamed; no piece of the calls is."""
    written = [compact(arguments) for arguments in called]
    puppet(SPOKEN + spoken([Call("", "take-note", arguments) for arguments in written]))
    asked: dict[str, Any] = dict(model="demo", messages=HELLO, max_tokens=300)
    (choice,) = live.openai.chat.completions.create(**asked, tools=CHAT_TOOLS, logprobs=True).choices
    assert (choice.message.content, choice.finish_reason) == (SPOKEN, "tool_calls")
    assert [(c.function.name, c.function.arguments) for c in choice.message.tool_calls] == [("take-note", a) for a in written]
    assert "".join(entry.token for entry in choice.logprobs.content) == SPOKEN
    heard, _ = heard_chat(live, **asked, tools=CHAT_TOOLS)
    assert [(content, [c["arguments"] for c in calls], reason) for content, calls, reason in heard] == [(SPOKEN, written, "tool_calls")]
    answer: dict[str, Any] = dict(model="demo", input=HELLO, tools=RESPONSE_TOOLS)
    message, *items = live.openai.responses.create(**answer).output
    assert (message.content[0].text, message.status, [item.arguments for item in items]) == (SPOKEN, "completed", written)
    with live.openai.responses.create(**answer, stream=True) as stream:
        message, *items = response_events(list(stream))
    assert (message.content[0].text, message.status, [item.arguments for item in items]) == (SPOKEN, "completed", written)
    text, *uses = live.anthropic.messages.create(**asked, tools=ANTHROPIC_TOOLS).content
    with live.anthropic.messages.stream(**asked, tools=ANTHROPIC_TOOLS) as stream:
        again, *streamed = stream.get_final_message().content
    assert text.text == again.text == SPOKEN and [use.input for use in uses] == [use.input for use in streamed] == called


DUMPS: dict[str, Callable[[Any], Any]] = {
    "objects": lambda found: found, "model_dump": lambda found: found.model_dump(), "to_dict": lambda found: found.to_dict(),
}  # fmt: skip


@pytest.mark.parametrize("dump", DUMPS.values(), ids=DUMPS)
def test_replies_come_back(live: Live, puppet: Callable[[str], None], dump: Callable[[Any], Any]) -> None:
    """A reply of text and calls comes back in whatever form the clients give it, also with what they made of its arguments."""
    import openai

    puppet(SPOKEN + spoken([Call("", "Branch", compact({"kind": kind, "below": None})) for kind in ("oak", "elm")]))
    tool = openai.pydantic_function_tool(Branch)
    asked: dict[str, Any] = dict(model="demo", messages=HELLO, max_tokens=300)
    message = live.openai.chat.completions.parse(**asked, tools=[tool]).choices[0].message
    answer: dict[str, Any] = dict(model="demo", input=HELLO, tools=[{"type": "function"} | tool["function"]])
    output = live.openai.responses.parse(**answer).output
    use: Any = [{"name": "Branch", "input_schema": Branch.model_json_schema()}]
    blocks = live.anthropic.messages.create(**asked, tools=use).content
    puppet("\nYes.")
    results: list[Any] = [{"role": "tool", "tool_call_id": call.id, "content": "1"} for call in message.tool_calls]
    more = asked | {"messages": [*HELLO, dump(message), *results]}
    assert live.openai.chat.completions.create(**more, tools=[tool]).choices[0].message.content == "\nYes."
    results = [{"type": "function_call_output", "call_id": item.call_id, "output": "1"} for item in output[1:]]
    assert live.openai.responses.create(**answer | {"input": [*HELLO, *map(dump, output), *results]}).output_text == "\nYes."
    results = [{"type": "tool_result", "tool_use_id": block.id, "content": "1"} for block in blocks[1:]]
    turns = [*HELLO, {"role": "assistant", "content": [dump(block) for block in blocks]}, {"role": "user", "content": results}]
    assert live.anthropic.messages.create(**asked | {"messages": turns}, tools=use).content[0].text == "\nYes."


def test_the_tool_runner(live: Live, puppet: Callable[[str], None]) -> None:
    """Anthropic's own loop around tools calls them all, sends what they return, and gets the answer."""
    import anthropic

    @anthropic.beta_tool
    def now(place: str) -> str:
        """The time."""
        puppet("\nIt is noon.")
        return f"noon in {place}"

    puppet(spoken([Call("", "now", compact({"place": place})) for place in ("Paris", "Rome")]))
    runner = live.anthropic.beta.messages.tool_runner(model="demo", messages=HELLO, tools=[now], max_tokens=300)
    assert [[block.type for block in message.content] for message in runner] == [["tool_use", "tool_use"], ["text"]]


def test_text_alone(live: Live, puppet: Callable[[str], None]) -> None:
    """A reply that may call and does not is a text, to its last character, in all three layouts, whole and streamed."""
    for text in ("\nYes <tool_", "\n<tool_calls>", ""):
        puppet(text)
        asked: dict[str, Any] = dict(model="demo", messages=HELLO, max_tokens=300)
        (choice,) = live.openai.chat.completions.create(**asked, tools=CHAT_TOOLS).choices
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "stop")
        assert heard_chat(live, **asked, tools=CHAT_TOOLS)[0] == [(text or None, [], "stop")]
        answer: dict[str, Any] = dict(model="demo", input=HELLO, tools=RESPONSE_TOOLS)
        with live.openai.responses.create(**answer, stream=True) as stream:
            assert [event.response.output_text for event in stream if event.type == "response.completed"] == [text]
        assert live.openai.responses.create(**answer).output_text == text
        whole = live.anthropic.messages.create(**asked, tools=ANTHROPIC_TOOLS)
        with live.anthropic.messages.stream(**asked, tools=ANTHROPIC_TOOLS) as stream:
            final = stream.get_final_message()
        assert [b.text for b in whole.content] == [b.text for b in final.content] == [text] and whole.stop_reason == "end_turn"


def test_cut_by_the_length(live: Live, puppet: Callable[[str], None], model: LanguageModel) -> None:
    """Calls that the length cuts come as far as they came, say so, and are the same streamed and whole."""
    head, first = f'{BEGIN}{{"name":"take-note","arguments":{{"text":"a', str(Call("", "now", "{}"))
    for before, cut, wanted in (
        ("", BEGIN[:3], []), ("", head, ['{"text":"a']), (f"{first}\n", BEGIN, ["{}"]), (f"{first}\n", head, ["{}", '{"text":"a']),
    ):  # fmt: skip
        puppet(before + str(Call("", "take-note", compact(CALLED))))
        most = len(model.tokenizer.encode("a" + before + cut, add_special_tokens=False)) - 1
        asked: dict[str, Any] = dict(model="demo", messages=HELLO, max_tokens=most)
        (choice,) = live.openai.chat.completions.create(**asked, tools=CHAT_TOOLS, tool_choice="required").choices
        (heard,), _ = heard_chat(live, **asked, tools=CHAT_TOOLS, tool_choice="required")
        calls = [call.function.arguments for call in choice.message.tool_calls or ()]
        assert (choice.finish_reason, heard[2]) == ("length", "length") and [call["arguments"] for call in heard[1]] == calls == wanted
        answer = live.openai.responses.create(
            model="demo", input=HELLO, tools=RESPONSE_TOOLS, tool_choice="required", max_output_tokens=most
        )  # fmt: skip
        assert answer.status == "incomplete"
        assert [item.status == "completed" for item in answer.output] == ([call == "{}" for call in wanted] or [False])
        whole = live.anthropic.messages.create(**asked, tools=ANTHROPIC_TOOLS, tool_choice={"type": "any"})
        with live.anthropic.messages.stream(**asked, tools=ANTHROPIC_TOOLS, tool_choice={"type": "any"}) as stream:
            final = stream.get_final_message()
        assert whole.stop_reason == final.stop_reason == "max_tokens"
        assert [block.to_dict() | {"id": ""} for block in whole.content] == [block.to_dict() | {"id": ""} for block in final.content]


# ---- second turns ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_second_turns_are_cached(model: LanguageModel, puppet: Callable[[str], None], count: int) -> None:
    """Calls and their results sent back are read from behind the calls alone, in all three layouts, whatever the next turn wants."""
    closing = len(model.tokenizer.encode("<|im_end|>\n", add_special_tokens=False))
    puppet("\nWell: " + spoken([Call("", "take-note", compact(CALLED | {"text": f"é{i}"})) for i in range(count)]))
    with Live(model, cached=True) as live:
        asked: dict[str, Any] = dict(model="demo", messages=HELLO, tools=CHAT_TOOLS, max_tokens=900)
        first = live.openai.chat.completions.create(**asked)
        own = first.choices[0].message
        assert len(own.tool_calls) == count
        more = [*HELLO, own.model_dump(), *({"role": "tool", "tool_call_id": c.id, "content": "42"} for c in own.tool_calls[::-1])]
        for choice in ("auto", "none"):
            second = live.openai.chat.completions.create(**asked | {"messages": more, "max_tokens": 3}, tool_choice=choice)
            cached = second.usage.prompt_tokens_details.cached_tokens
            assert cached == first.usage.prompt_tokens + first.usage.completion_tokens - 1 + closing

        said: dict[str, Any] = dict(model="demo", tools=RESPONSE_TOOLS, instructions="Hm.")
        answer = live.openai.responses.create(**said, input=HELLO)
        results = [{"type": "function_call_output", "call_id": c.call_id, "output": "42"} for c in answer.output[1:]]
        items = [*HELLO, *answer.output, *results]
        next_one = live.openai.responses.create(**said, input=items, max_output_tokens=3)
        assert next_one.usage.input_tokens_details.cached_tokens == answer.usage.input_tokens + answer.usage.output_tokens - 1 + closing

        kept: dict[str, Any] = dict(model="demo", tools=ANTHROPIC_TOOLS, system="Well.")
        uses = live.anthropic.messages.create(**kept, messages=HELLO, max_tokens=900)
        results = [
            {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "42"}], "is_error": True}
            for use in uses.content[1:]
        ]
        messages = [*HELLO, {"role": "assistant", "content": uses.content}, {"role": "user", "content": results}]
        reply = live.anthropic.messages.create(**kept, messages=messages, max_tokens=3)
        total = uses.usage.input_tokens + uses.usage.cache_read_input_tokens + uses.usage.output_tokens
        assert len(results) == count and reply.usage.cache_read_input_tokens == total - 1 + closing


def test_tokens_of_a_conversation_with_tools(live: Live, model: LanguageModel) -> None:
    """A conversation's tokens count its tools and calls as the model reads them, in every layout the same."""
    call, number = Call("c", "now", "{}"), {"tool_call_id": "c"}
    function = {"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [function]}, {"role": "tool", "content": "noon", **number}]
    turns = [Turn("user", (HELLO[0]["content"],)), Turn("assistant", (call,)), Turn("tool", (Result("c", "noon"),))]
    ids = model.tokenizer.encode_chat(conversation(turns, LIST))
    assert live.post("/tokenize", messages=messages, tools=CHAT_TOOLS).json()["tokens"] == ids
    items = [*HELLO, {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"}]
    items.append({"type": "function_call_output", "call_id": "c", "output": "noon"})
    blocks = [
        *HELLO, {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "now", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "noon"}]},
    ]  # fmt: skip
    counts = [
        live.post(CHAT, messages=messages, tools=CHAT_TOOLS, max_tokens=1).json()["usage"]["prompt_tokens"],
        live.post(RESPONSE, input=items, tools=RESPONSE_TOOLS, max_output_tokens=1).json()["usage"]["input_tokens"],
    ]
    usage = live.post(MESSAGE, messages=blocks, tools=ANTHROPIC_TOOLS, max_tokens=1).json()["usage"]
    assert [*counts, usage["input_tokens"] + usage["cache_read_input_tokens"]] == [len(ids)] * 3


def test_spellings_of_a_history(live: Live) -> None:
    """What frameworks add to calls and results that they send back changes no token: spaces, names, nothing where nothing is."""

    def tokens(arguments: str, **more: Any) -> Any:
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
        result = {"role": "tool", "content": "", "tool_call_id": "c"} | more
        return live.post("/tokenize", messages=[*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}, result]).json()

    own = '{"a b":"x \\" : y","c":[1e2,-2],"d":{}}'
    assert tokens(own) == tokens(' {"a b": "x \\" : y",\n "c": [1e2, -2], "d": {  }}\t', name="f")
    assert tokens("{}") == tokens("") == tokens("{ }") != tokens('{" ":1}')
    left = [{"role": "assistant", "content": None, "tool_calls": [CALLING, CALLING | {"id": "d"}]}, *HELLO]  # calls that nobody answered
    again = [{"role": "assistant", "content": None, "tool_calls": [CALLING]}, {"role": "tool", "tool_call_id": "c", "content": "1"}]
    assert live.post(CHAT, messages=[*HELLO, *left, *again], max_tokens=1).status_code == 200
    counts = set()
    for content in ({}, {"content": None}, {"content": ""}, {"content": []}):
        result = {"type": "tool_result", "tool_use_id": "c"} | content
        blocks = [{"role": "assistant", "content": [USE]}, {"role": "user", "content": [result]}]
        counts.add(live.post("/v1/messages/count_tokens", messages=[*HELLO, *blocks]).json()["input_tokens"])
    assert len(counts) == 1


# ---- refusals --------------------------------------------------------------------------------------------------------


def tools(path: str, name: Any = "f", schema: Any = None, count: int = 1) -> list[Any]:
    """Tools in an API's layout."""
    parameters = {"type": "object"} if schema is None else schema
    if path == MESSAGE:
        return [{"name": name, "input_schema": parameters}] * count
    function = {"name": name, "parameters": parameters}
    return [{"type": "function", "function": function} if path == CHAT else {"type": "function"} | function] * count


@pytest.mark.parametrize("path", [CHAT, RESPONSE, MESSAGE])
def test_bad_tools(live: Live, path: str) -> None:
    """Tools that are none are 400, in the layout of the API, and so are choices that they do not have."""
    named = {CHAT: {"type": "function", "function": {"name": "g"}}, RESPONSE: {"type": "function", "name": "g"}}
    wants = named.get(path, {"type": "tool", "name": "g"})
    numbered = [{**t, "name": f"t{i}"} for i, t in enumerate(tools(RESPONSE, count=65))]
    many = [{"type": "function", "function": {"name": t["name"]}} for t in numbered] if path == CHAT else numbered
    many = [{"name": t["name"], "input_schema": {"type": "object"}} for t in numbered] if path == MESSAGE else many
    for listed, choice, sentence in (
        (tools(path, None), None, r"name is None"),
        (tools(path, ""), None, "name is ''"),
        (tools(path, "a b"), None, "name is 'a b'"),
        (tools(path, "a\n"), None, "name is"),
        (tools(path, "x" * 65), None, "name is 'x"),
        (tools(path, count=2), None, "tools: two are called 'f'; each needs a name of its own"),
        (many, None, "tools: 65 were given; at most 64"),
        (tools(path, schema={"type": "array"}), None, "its type is 'array'; the schema of an object"),
        (tools(path, schema={"anyOf": []}), None, "its type is None"),
        (tools(path, schema={"$ref": "#/$defs/x", "$defs": {"x": {"type": "array"}}}), None, "its type is None"),
        (tools(path, schema=[1]), None, "is \\[1\\]"),
        (tools(path, schema={"type": "object", "not": {}}), None, "tools: f.not is no keyword"),
        (tools(path, schema={"type": "object", "$ref": "#"}), None, "tools: f"),
        (tools(path), wants, "tool_choice names 'g', which is none of the tools; there is f"),
        (tools(path), "often", "tool_choice: it is 'often'"),
        (tools(path), {"type": "function"}, "tool_choice: it is"),
        (tools(path), {"type": "allowed_tools", "mode": "auto", "tools": []}, "tool_choice: it is"),
        ([], wants, "tool_choice asks for a call, but there are no tools"),
        ([{"type": "web_search"}], None, "tools"),
        ("x", None, "tools is 'x'"),
    ):  # fmt: skip
        response = live.post(path, **ASKED[path], tools=listed, **({} if choice is None else {"tool_choice": choice}))
        check_error(response, 400, sentence, path)


CALLING = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
USE = {"type": "tool_use", "id": "c", "name": "f", "input": {}}
USED = {"type": "tool_result", "tool_use_id": "c"}
BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "a result of nothing": (CHAT, {"messages": [*HELLO, {"role": "tool", "tool_call_id": "x", "content": "1"}]}, "'x' belongs to no call"),
    "a result without its call's id": (CHAT, {"messages": [{"role": "tool", "content": "1"}]}, "tool_call_id is needed with role tool"),
    "the user's call": (CHAT, {"messages": [{"role": "user", "content": "a", "tool_calls": [CALLING]}]}, "the assistant's"),
    "an answer of nothing": (CHAT, {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, "content is missing"),
    "going on": (CHAT, {"tools": tools(CHAT), "ignore_eos": True}, "ignore_eos goes on after the end of a call"),
    "a name": (CHAT, {"messages": [{"role": "user", "content": "a", "name": "bob"}]}, "no place for name"),
    "functions": (CHAT, {"functions": [{"name": "f"}]}, "use tools and tool_choice"),
    "a stray output": (RESPONSE, {"input": [{"type": "function_call_output", "call_id": "x", "output": "1"}]}, "'x' belongs to no call"),
    "a call without a name": (RESPONSE, {"input": [{"type": "function_call", "call_id": "x", "arguments": ""}]}, r"input\[0\]\.name is"),
    "another item": (RESPONSE, {"input": [{"type": "reasoning"}]}, r"input\[0\]\.type is 'reasoning'"),
    "a stray result": (MESSAGE, {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]}, "belongs to"),
    "the user's use": (MESSAGE, {"messages": [{"role": "user", "content": [USE]}]}, "tool_use is not of role user"),
    "half of the results": (CHAT, {"messages": [
        *HELLO, {"role": "assistant", "tool_calls": [CALLING, CALLING | {"id": "d"}]},
        {"role": "tool", "tool_call_id": "d", "content": "1"}, {"role": "assistant", "content": "Well."},
    ]}, "the call 'c' has no result, but another call of the same reply has one"),
    "half of the outputs": (RESPONSE, {"input": [
        *({"type": "function_call", "call_id": i, "name": "f", "arguments": "{}"} for i in "ab"),
        {"type": "function_call_output", "call_id": "a", "output": "1"},
    ]}, "the call 'b' has no result"),
    "half an error": (MESSAGE, {"messages": [
        *HELLO, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [USED | {"is_error": "no"}]},
    ]}, "part 0 has an is_error of 'no'; true or false is needed"),
    "a use at the end": (MESSAGE, {"messages": [*HELLO, {"role": "assistant", "content": [USE]}]}, "the tool's result is needed"),
    "a use of text": (MESSAGE, {"messages": [*HELLO, {"role": "assistant", "content": [USE | {"input": "x"}]}]}, "part 0 is no call"),
    "a use without an id": (MESSAGE, {"messages": [*HELLO, {"role": "assistant", "content": [USE | {"id": 1}]}]}, "part 0 has no id"),
    "a thread": (MESSAGE, {"thread": {"type": "create"}}, "keeps no threads"),
    "effort": (MESSAGE, {"output_config": {"effort": "low"}}, r"output_config\.effort: this model knows no effort"),
    "a schema": (MESSAGE, {"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "schema.not is no keyword"),
    "a beginning and a format": (MESSAGE, {
        "messages": [*HELLO, {"role": "assistant", "content": "x"}], "output_config": {"format": {"type": "json_schema", "schema": COLOR}},
    }, "begins the reply with a text"),
    "not several": (MESSAGE, {
        "tools": tools(MESSAGE), "tool_choice": {"type": "any", "disable_parallel_tool_use": "x"},
    }, "disable_parallel_tool_use is 'x'; true or false is needed"),
    "a beginning and a call": (MESSAGE, {
        "messages": [*HELLO, {"role": "assistant", "content": "x"}], "tools": tools(MESSAGE), "tool_choice": {"type": "any"},
    }, "begins the reply with a text"),
}  # fmt: skip


@pytest.mark.parametrize(("path", "change", "sentence"), BAD.values(), ids=BAD)
def test_bad_calls(live: Live, path: str, change: dict[str, Any], sentence: str) -> None:
    """Calls and results that belong to nothing are 400 with a sentence."""
    check_error(live.post(path, **ASKED[path] | change), 400, sentence, path)


@pytest.mark.parametrize("path", [CHAT, RESPONSE, MESSAGE])
def test_numbers_that_json_has_not(live: Live, path: str) -> None:
    """NaN in a tool's schema is refused also where no call is wanted, and so the schema checked by nobody."""
    choice = {"type": "none"} if path == MESSAGE else "none"
    body = {**ASKED[path], "tools": tools(path, schema={"type": "object", "default": math.nan}), "tool_choice": choice}
    response = live.http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    check_error(response, 400, "NaN or an infinite number", path)


def test_tools_without_use(live: Live) -> None:
    """No tools are as if none were named, and what is null or neutral changes nothing."""
    plain = live.post(CHAT, messages=HELLO, **GREEDY, max_tokens=8).json()["choices"]
    for change in ({"tools": []}, {"tools": None, "tool_choice": "auto"}, {"tool_choice": "none", "parallel_tool_calls": True}):
        assert live.post(CHAT, messages=HELLO, **GREEDY, max_tokens=8, **change).json()["choices"] == plain
    bare = [{"type": "function", "function": {"name": "f"}}]
    message = live.post(CHAT, messages=HELLO, tools=bare, tool_choice="required").json()["choices"][0]["message"]
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}


# ---- formats of the newer API ------------------------------------------------------------------------------------------


def test_formats_of_responses(live: Live) -> None:
    """The newer API's text.format gives JSON of a schema or any object, whole and streamed, and says in the answer what was asked for."""
    schema = record(color=COLOR, at=POINT)
    form = {"type": "json_schema", "name": "place", "schema": schema, "strict": True}
    asked: dict[str, Any] = dict(model="demo", input=HELLO, text={"format": form})
    for _ in range(3):
        whole = live.openai.responses.create(**asked)
        assert whole.status == "completed" and valid(json.loads(whole.output_text), schema, schema)
    assert whole.text.format.type == "json_schema" and whole.text.format.schema_ == schema and whole.text.format.name == "place"
    with live.openai.responses.create(**asked, stream=True) as stream:
        assert valid(json.loads(list(stream)[-1].response.output_text), schema, schema)
    free = live.openai.responses.create(**asked | {"text": {"format": {"type": "json_object"}}}, max_output_tokens=16)
    assert free.output_text.startswith("{") and free.text.format.type == "json_object"
    neutral = {"text": {"format": {"type": "text"}}}
    plain, text = (live.post(RESPONSE, input="a", max_output_tokens=8, **GREEDY, **change).json() for change in ({}, neutral))
    assert plain["output"][0]["content"] == text["output"][0]["content"] and text["text"] == {"format": {"type": "text"}}
    for bad, sentence in (
        ({"type": "xml"}, r"text\.format\.type is 'xml'"), ({"type": "json_schema"}, "is needed with type json_schema"),
        ({"type": "json_object", "name": "a"}, "with no other"), (form | {"name": "a b"}, r"text\.format\.name is 'a b'"),
        (form | {"schema": {"not": {}}}, r"text\.format: schema\.not is no keyword"),
    ):  # fmt: skip
        check_error(live.post(RESPONSE, input="a", text={"format": bad}), 400, sentence, RESPONSE)


# ---- any bytes -------------------------------------------------------------------------------------------------------

PARTS = st.sampled_from(["type", "function", "name", "parameters", "object", "f", "tool_use", "tool_result", "id", "input", "content", "c"])
SHAPES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | PARTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(PARTS, inner), max_leaves=8,
)  # fmt: skip
FIELDS = st.sampled_from(["tools", "tool_choice", "messages", "input", "parallel_tool_calls", "text"])


@settings(max_examples=60)
@example(path=MESSAGE, change={"messages": [{"role": "assistant", "content": []}, *HELLO]}, valid_tools=True)
@example(path=CHAT, change={"messages": [*HELLO, {"role": "assistant", "tool_calls": [CALLING]}] * 2}, valid_tools=True)
@given(
    path=st.sampled_from([CHAT, RESPONSE, MESSAGE]), valid_tools=st.booleans(),
    change=st.dictionaries(FIELDS, SHAPES, max_size=3),
)  # fmt: skip
def test_malformed_bodies(live: Live, path: str, change: dict[str, Any], valid_tools: bool) -> None:
    """Whatever the fields of tools hold, the answer is the model's or an error of the client's."""
    most = "max_output_tokens" if path == RESPONSE else "max_tokens"
    body = {**ASKED[path], **({"tools": tools(path)} if valid_tools else {}), **change, most: 2}
    response = live.post(path, **body)
    assert response.status_code in (200, 400), response.text
    if response.status_code != 200:
        check_error(response, 400, ".", path)


def test_company(model: LanguageModel, grammars: Grammars) -> None:
    """Replies with tools and without have the same tokens together as alone."""

    def requests() -> list[Any]:
        made = [None, *(grammars.compile_calls(Toolbox(LIST, choice))() for choice in ("required", "auto", "none"))]
        return [model.request("Call.", max_tokens=60, temperature=1.0, seed=9, constraint=one) for one in made]

    together = collect(model.backend, requests(), model.tokenizer)
    assert [reply.tokens for reply in together] == [collect(model.backend, [one], model.tokenizer)[0].tokens for one in requests()]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [('{"x":1e999}', None), ('{"x":' + "[" * 300 + "]" * 300 + "}", None), ('{"x":1e9}', {"x": 1e9}), ('{"x":"a', {}),
     ('{"x":1,"y":tr', {"x": 1})],
)  # fmt: skip
def test_arguments_that_no_json_holds(arguments: str, wanted: dict[str, Any] | None) -> None:
    """Arguments that cannot be sent as an object are an error with the tool named, never a body that is no JSON; cut ones come as far as
    they are."""
    from zamba2.language.model import make_request
    from zamba2.language.tokenizer import TokenTexts
    from zamba2.serve.protocol import Ask, MessageStream, Problem, Reply, Said
    from zamba2.serve.scheduler import Prompt

    reply = Reply(0, Ask(make_request([1], {}), Prompt(), "", calls="may"))
    end = "}</tool_call>" if arguments.endswith("}") else ""
    reply.add(Said(0, f'<tool_call>{{"name":"sum","arguments":{arguments}{end}', 5, (), "stop", None, 0))
    stream = MessageStream("m", [reply], cast(TokenTexts, None))
    if wanted is None:
        with pytest.raises(Problem, match="the arguments for sum cannot be sent as JSON"):
            stream.whole()
    else:
        assert stream.whole()["content"][-1]["input"] == wanted


@pytest.mark.parametrize(("end", "wanted"), [("{}}</tool_call>", ("tool_calls", None)), ("{", ("stop", "x"))])
def test_whole_calls_are_why_a_reply_ended(end: str, wanted: tuple[str, str | None]) -> None:
    """A reply whose calls are whole ended with them, also where a stop text came behind; one that a stop text cut ended with that."""
    from zamba2.language.model import make_request
    from zamba2.serve.protocol import Ask, Reply, Said
    from zamba2.serve.scheduler import Prompt

    reply = Reply(0, Ask(make_request([1], {}), Prompt(), "", calls="may"))
    reply.add(Said(0, f'<tool_call>{{"name":"sum","arguments":{end}', 5, (), "stop", "x", 0))
    assert (reply.finish_reason, reply.stop) == wanted


def test_what_the_model_reads_of_a_history() -> None:
    """A developer's message is the system's in both of OpenAI's layouts; the result of a call that failed says so to the model."""
    from zamba2.serve.protocol import ChatBody, MessagesBody, ResponseBody

    said = [{"role": "developer", "content": "Be brief."}, *HELLO]
    for turns in (ChatBody.model_validate({"messages": said}).turns, ResponseBody.model_validate({"input": said}).turns):
        assert turns == [Turn("system", ("Be brief.",)), Turn("user", (HELLO[0]["content"],))]
    call = {"type": "tool_use", "id": "1", "name": "now", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": "no clock", "is_error": True}
    messages = [*HELLO, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    assert MessagesBody.model_validate({"max_tokens": 1, "messages": messages}).turns[-1] == Turn("user", (Result("1", "error: no clock"),))
