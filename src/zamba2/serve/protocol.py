"""The HTTP APIs as data: what a request may hold, and what answers, streams and errors look like. Nothing here waits for anything.

OpenAI's chat completions, completions and responses, and Anthropic's messages. A field that would change the answer is obeyed or
refused; what is taken and not used (``user``, ``metadata``, ``store``, ...) changes nothing.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    model_validator,
)  # fmt: skip
from pydantic_core import CoreSchema, core_schema, from_json

from zamba2.errors import Zamba2Error
from zamba2.language.generate import Request, TokenLogprob
from zamba2.language.messages import brief
from zamba2.language.tokenizer import TokenTexts
from zamba2.serve.grammar import Unmet
from zamba2.serve.scheduler import Busy, Prompt, TimeIsUp
from zamba2.serve.tools import (
    NO_ARGUMENTS,
    Call,
    CallDelta,
    CallReader,
    Calls,
    Result,
    Tool,
    Toolbox,
    Turn,
    compact,
    conversation,
    stray_result,
    unanswered_call,
)  # fmt: skip

__all__ = [
    "Ask", "ChatBody", "ChatStream", "CompletionBody", "CompletionStream", "CountTokensBody", "DetokenizeBody", "Event", "MessageStream",
    "MessagesBody", "Problem", "Reply", "ResponseBody", "ResponseFormat", "ResponseStream", "Said", "Stream", "TokenizeBody",
    "anthropic_error", "openai_error", "problem_of", "sampling_options", "sse", "validation_problem",
]  # fmt: skip

Json = dict[str, Any]
Event = tuple["str | None", "Json | str"]  # of a stream: its name, where the API names events, and its data

MOST_TOOLS = 64
MOST_MISTAKES = 1000  # in one object; naming each of a million would keep all streams waiting
LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's own stand-in


# ---- errors ----------------------------------------------------------------------------------------------------------


class Problem(Zamba2Error):
    """An error with an HTTP status. kind: OpenAI's "type"; param: the field at fault; retry_after: seconds."""

    def __init__(
        self, message: str, *, status: int = 400, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None,
        retry_after: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.kind, self.code, self.param, self.retry_after = status, kind, code, param, retry_after


def problem_of(error: Zamba2Error) -> Problem:
    """What an error of the scheduler is to a client."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, Busy):
        return Problem(str(error), status=429, kind="rate_limit_error", code="rate_limit_exceeded", retry_after=error.retry_after)
    if isinstance(error, TimeIsUp):
        return Problem(str(error), status=504, kind="timeout_error", code="timeout")
    if isinstance(error, Unmet):
        return Problem(str(error))
    return Problem(str(error), status=503, kind="server_error", code="unavailable")


def openai_error(problem: Problem) -> Json:
    return {"error": {"message": str(problem), "type": problem.kind, "param": problem.param, "code": problem.code}}


ANTHROPIC_KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 504: "timeout_error",
}  # fmt: skip


def anthropic_error(problem: Problem) -> Json:
    kind = ANTHROPIC_KINDS.get(problem.status, "invalid_request_error" if problem.status < 500 else "api_error")
    details = {} if problem.code is None else {"details": {"error_code": problem.code}}
    return {"type": "error", "error": {"type": kind, "message": str(problem)} | details}


CODES = {"thread": "thread_unsupported_request"}  # of fields refused; upon this one Anthropic's tool runner goes on without


def validation_problem(errors: Sequence[Mapping[str, Any]]) -> Problem:
    """The first of pydantic's errors as one sentence that names the field and what is needed."""
    first = errors[0]
    names = [name for name in first["loc"][1:] if not str(name).endswith(TAG)]  # behind "body"
    where = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names).lstrip(".").removesuffix(".[key]")
    kind, found = first["type"], first.get("input")
    if kind == "json_invalid":
        return Problem(f"the body is not valid JSON ({brief(first.get('ctx', {}).get('error', ''))}); a JSON object is needed.")
    if not names:
        reason = str(first["ctx"]["error"]) if kind == "value_error" else ""
        return Problem(reason or "the body is not a JSON object; send one with Content-Type: application/json.")
    if kind == "missing":
        message = f"{where} is missing; it is needed."
    elif kind == "extra_forbidden":
        message = f"{where} is no field that this server knows; leave it out."
    elif kind == "value_error":
        message = f"{where}: {first['ctx']['error']}"
    elif kind == "string_unicode":
        message = f"{where} holds half a surrogate pair; valid Unicode text is needed."
    elif kind == "too_long" and isinstance(found, list):
        message = f"{where}: {len(found)} were given; at most {first['ctx']['max_length']} are possible in one request."
    elif kind in ("model_type", "model_attributes_type"):
        message = f"{where} is {brief(repr(found))}; an object is needed."
    else:
        needed = str(first["msg"]).replace(" after validation", "")
        message = f"{where} is {brief(repr(found))}; {needed[:1].lower()}{needed[1:]}."
    return Problem(message, param=where, code=CODES.get(where))


# ---- requests --------------------------------------------------------------------------------------------------------


MOST_MESSAGES = 2048  # of a conversation; those behind them are not looked at
Messages = Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
TAG = "#"  # at the end of the name of one of several models, which is no field's


class Only:
    """A field that is documented elsewhere and not supported here: null and the values that mean nothing are taken, others refused."""

    def __init__(self, why: str, *neutral: Any) -> None:
        self.why, self.neutral = why, neutral

    def check(self, value: Any) -> Any:
        if value is not None and value not in self.neutral:
            raise ValueError(self.why)
        return value

    def __get_pydantic_core_schema__(self, _source: Any, _handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, _schema: CoreSchema, _handler: Any) -> Json:
        return {"enum": [None, *self.neutral], "description": self.why}


def joined(value: Any) -> Any:
    """The text of a message's content: a text, or a list of parts with type text."""
    if not isinstance(value, list):
        if not isinstance(value, str):
            raise ValueError(f"it is {brief(repr(value))}; a text or a list of text parts is needed.")
        return value
    return "\n".join(part_text(part, i) for i, part in enumerate(value))


def part_text(part: Any, i: int) -> str:
    """The text of a content's i-th part."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "input_text", "output_text"):
        what = f"is of type {brief(repr(kind))}" if isinstance(part, dict) else "is no object"
        raise ValueError(f"part {i} {what}; this model reads text alone, {{type: text, text}}.")
    made = ("parsed", "parsed_output")  # by the clients, of the text
    without(part, i, "type", "text", "annotations", "logprobs", "cache_control", "citations", "prompt_cache_breakpoint", *made)
    return the_text(part, i, "text")


def without(part: dict[str, Any], i: int, *known: str) -> None:
    """Raises ValueError for other fields."""
    if stray := sorted(set(part) - set(known)):
        raise ValueError(f"part {i} has a field {brief(repr(stray[0]))}, which this server does not know; leave it out.")


def the_text(part: dict[str, Any], i: int, name: str) -> str:
    found = part.get(name)
    if not isinstance(found, str):
        raise ValueError(f"part {i} has no {name}.")
    return found


def blocks(value: Any) -> Any:
    """Anthropic's content: texts, calls and results."""
    if not isinstance(value, list):
        return [joined(value)]
    return [one_block(block, i) for i, block in enumerate(value)] or [""]


def one_block(block: Any, i: int) -> str | Call | Result:
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "tool_use":
        without(block, i, "type", "id", "name", "input", "cache_control", "caller", "toolset_name")
        name, given = the_text(block, i, "name"), block.get("input")
        if re.fullmatch(NAME, name) is None or not isinstance(given, dict):
            raise ValueError(f"part {i} is no call; a name of letters, digits, _ and -, at most 64, and an object as input are needed.")
        try:
            return Call(the_text(block, i, "id"), name, compact(given))
        except Zamba2Error as error:
            raise ValueError(f"part {i}: {error}") from None
    if kind == "tool_result":
        without(block, i, "type", "tool_use_id", "content", "is_error", "cache_control", "toolset_name")
        said, failed = "" if block.get("content") is None else joined(block["content"]), block.get("is_error")
        if failed not in (None, False, True):
            raise ValueError(f"part {i} has an is_error of {brief(repr(failed))}; true or false is needed.")
        return Result(the_text(block, i, "tool_use_id"), ("error: " if failed else "") + said)
    return part_text(block, i)


def several(value: Any) -> Any:
    """Stop texts: none, one or a list."""
    if value is None or isinstance(value, str):
        return () if value is None else (value,)
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise ValueError("a text or a list of texts is needed, none of them empty.")
    return tuple(value)


def prompts(value: Any) -> Any:
    """A completion's prompts as a list of texts and lists of token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if all(type(item) is int for item in value):
            return [value]
        if all(isinstance(item, list) and all(type(token) is int for token in item) for item in value):
            return value
    raise ValueError("a text, a list of texts, a list of token ids, or a list of such lists is needed.")


def one_message(value: Any) -> Any:
    """A text alone is the user's."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


PART = {
    "type": "object", "required": ["type", "text"], "additionalProperties": False,
    "properties": {"type": {"enum": ["text", "input_text", "output_text"]}, "text": {"type": "string"}},
}  # fmt: skip
IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
Text = Annotated[str, BeforeValidator(joined), WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": PART}]})]
Stops = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(several),
    WithJsonSchema({"anyOf": [{"type": "null"}, {"type": "string", "minLength": 1}, {"type": "array", "items": {"type": "string"}}]}),
]  # fmt: skip
Prompts = Annotated[
    list[Any], BeforeValidator(prompts),
    WithJsonSchema({"anyOf": [
        {"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}, IDS,
        {"type": "array", "items": IDS, "minItems": 1},
    ]}),
]  # fmt: skip
Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Count = Annotated[int, Field(ge=1, lt=1 << 31)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
Bias = dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]]
Unused = Annotated[Any, Field(description="Taken and not used.")]

NAME = "^[a-zA-Z0-9_-]{1,64}$"


def arguments_schema(value: dict[str, Any] | None) -> dict[str, Any]:
    """Of a tool; what is checked further is checked where it is compiled."""
    if not value:
        return NO_ARGUMENTS
    named, definitions = value.get("$ref"), value.get("$defs")
    if isinstance(named, str) and isinstance(definitions, dict):  # as pydantic has a class that contains itself
        value = {"type": "object"} | value if is_object(definitions.get(named.removeprefix("#/$defs/"))) else value
    if not is_object(value):
        raise ValueError(f"its type is {brief(repr(value.get('type')))}; the schema of an object of arguments is needed, type: object.")
    return value


def is_object(schema: Any) -> bool:
    return isinstance(schema, dict) and schema.get("type") == "object"


Name = Annotated[str, Field(pattern=NAME)]
Parameters = Annotated[dict[str, Any] | None, AfterValidator(arguments_schema)]
NO_REASONING = ["none", {"type": "disabled"}, {}, {"effort": None}, {"effort": "none"}, {"effort": None, "summary": None}]
OldTools = Annotated[Any, Only("functions are given as tools here; use tools and tool_choice.", [], "none", "auto")]
TextAlone = Annotated[Any, Only("this model writes text alone; leave this out.", ["text"])]
NoReasoning = Annotated[Any, Only("this model does not reason apart from its answer; leave this out.", *NO_REASONING)]
NoState = Annotated[Any, Only("this server keeps no responses; send the whole conversation and leave this out.", False)]
NoThreads = Annotated[Any, Only("this server keeps no threads; send the whole conversation and leave this out.", False)]
NoName = Annotated[Any, Only("the chat template has no place for this; leave this out.", [])]
Verbosity = Annotated[Any, Only("this model knows no verbosity; leave this out.", "medium")]
NotHere = Annotated[Any, Only("this server does not support this; leave it out.", [], {}, False, "")]
Async = Annotated[NotHere, Field(validation_alias=AliasChoices("async", "async_"))]  # the client's own dumps say the second


class Body(BaseModel):
    """Unknown fields and loose types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="wrap")
    @classmethod
    def _few_mistakes(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            if (count := error.error_count()) > MOST_MISTAKES:
                raise ValueError(f"it holds {count} mistakes, too many to name; see /openapi.json.") from None
            raise


class Sampled(Body):
    """How to choose tokens; the fields of ``zamba2.language.sampling.Sampling`` under the same names."""

    temperature: Annotated[Number, Field(ge=0)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Bias | None = None
    seed: Seed | None = None


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Unused = None


class OpenAIBody(Sampled):
    model: str = "default"
    n: Count | None = None
    stop: Stops = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = Field(False, description="Go on after an end token.")
    user: Unused = None

    @model_validator(mode="after")
    def _streams(self) -> OpenAIBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options was given without stream: true; leave it out.")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


# ---- tools


class Function(Body):
    name: Name
    description: str | None = None
    parameters: Parameters = Field(None, validate_default=True)
    strict: Unused = None  # the schema is always obeyed

    @property
    def tool(self) -> Tool:
        return Tool(self.name, self.description, self.parameters)


class ChatTool(Body):
    type: Literal["function"]
    function: Function

    @property
    def tool(self) -> Tool:
        return self.function.tool


class ResponseTool(Function):
    type: Literal["function"]
    allowed_callers: Annotated[Any, Only("functions are called directly here; leave this out.", ["direct"])] = None
    asynchronous: Async = None
    defer_loading: NotHere = None
    output_schema: NotHere = None


class AnthropicTool(Body):
    name: Name
    description: str | None = None
    input_schema: Parameters
    type: Literal["custom"] | None = None
    allowed_callers: Annotated[Any, Only("tools are called directly here; leave this out.", ["direct"])] = None
    cache_control: Unused = None
    defer_loading: NotHere = None
    eager_input_streaming: Unused = None
    input_examples: NotHere = None
    strict: Unused = None

    @property
    def tool(self) -> Tool:
        return Tool(self.name, self.description, self.input_schema)


def distinct(tools: list[Any] | None) -> list[Any] | None:
    names = [tool.tool.name for tool in tools or ()]
    if len(names) > MOST_TOOLS:
        raise ValueError(f"{len(names)} were given; at most {MOST_TOOLS} are possible.")
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"two are called {twice[0]!r}; each needs a name of its own.")
    return tools


ChatTools = Annotated[Annotated[list[ChatTool], Field(fail_fast=True)] | None, AfterValidator(distinct)]
ResponseTools = Annotated[Annotated[list[ResponseTool], Field(fail_fast=True)] | None, AfterValidator(distinct)]
AnthropicTools = Annotated[Annotated[list[AnthropicTool], Field(fail_fast=True)] | None, AfterValidator(distinct)]


class Choice(Body):
    """What a request wants of its tools, in one layout for all APIs. only: the tools that may be called, None for all. parallel: whether
    several calls may be made, which Anthropic's API says here; one is made of a tool that must be called."""

    mode: Literal["none", "auto", "required"]
    only: tuple[str, ...] | None = None
    parallel: bool = True


def chat_choice(value: Any) -> Any:
    def name(tool: Any) -> Any:
        inner = tool.get("function") if isinstance(tool, dict) and set(tool) == {"type", "function"} else None
        return inner.get("name") if isinstance(inner, dict) and set(inner) == {"name"} else None

    several = value.get("allowed_tools") if isinstance(value, dict) and set(value) == {"type", "allowed_tools"} else None
    return one_choice(value, several, name, "{type: function, function: {name: NAME}}")


def response_choice(value: Any) -> Any:
    def name(tool: Any) -> Any:
        return tool.get("name") if isinstance(tool, dict) and set(tool) == {"type", "name"} else None

    several = {key: inner for key, inner in value.items() if key != "type"} if isinstance(value, dict) else None
    return one_choice(value, several, name, "{type: function, name: NAME}")


def one_choice(value: Any, several: Any, name: Callable[[Any], Any], layout: str) -> Any:
    """What OpenAI's two layouts have in common. several: what may say which tools are allowed; name: gives the one that a layout names."""
    if value is None or value in ("none", "auto", "required"):
        return None if value is None else Choice(mode=value)
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "function" and isinstance(name(value), str):
        return Choice(mode="required", only=(name(value),), parallel=False)
    if kind == "allowed_tools" and isinstance(several, dict) and set(several) == {"mode", "tools"} and isinstance(several["tools"], list):
        names = tuple(name(tool) for tool in several["tools"])
        if names and all(isinstance(one, str) for one in names) and several["mode"] in ("auto", "required"):
            return Choice(mode=several["mode"], only=names)
    raise ValueError(f"it is {brief(repr(value))}; none, auto, required, {layout} or allowed_tools, mode auto or required, is needed.")


def anthropic_choice(value: Any) -> Any:
    modes: dict[Any, Any] = {"none": "none", "auto": "auto", "any": "required", "tool": "required"}
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    known = {"type", "disable_parallel_tool_use"} | ({"name"} if kind == "tool" else set())
    if not isinstance(kind, str) or kind not in modes or set(value) - known or isinstance(value.get("name"), str) != (kind == "tool"):
        raise ValueError(f"it is {brief(repr(value))}; {{type: auto, any or none}} or {{type: tool, name: NAME}} is needed.")
    if (single := value.get("disable_parallel_tool_use")) not in (None, False, True):
        raise ValueError(f"disable_parallel_tool_use is {brief(repr(single))}; true or false is needed.")
    return Choice(mode=modes[kind], only=(value["name"],) if kind == "tool" else None, parallel=not single and kind != "tool")


MODES = {"enum": ["none", "auto", "required"]}
ChatChoice = Annotated[
    Choice | None, BeforeValidator(chat_choice),
    WithJsonSchema({"anyOf": [MODES, {"type": "object", "required": ["type", "function"]}, {"type": "null"}]}),
]  # fmt: skip
ResponseChoice = Annotated[
    Choice | None, BeforeValidator(response_choice),
    WithJsonSchema({"anyOf": [MODES, {"type": "object", "required": ["type", "name"]}, {"type": "null"}]}),
]  # fmt: skip
AnthropicChoice = Annotated[
    Choice | None, BeforeValidator(anthropic_choice),
    WithJsonSchema({"anyOf": [{"type": "object", "required": ["type"]}, {"type": "null"}]}),
]  # fmt: skip
Parallel = Annotated[bool | None, Field(description="Whether a reply may make several calls; null is true.")]


def toolbox(
    tools: Sequence[ChatTool | ResponseTool | AnthropicTool] | None, choice: Choice | None, parallel: bool | None = None
) -> Toolbox | None:  # fmt: skip
    """The tools of a request. Raises ValueError for a choice that they do not have."""
    if not tools:
        if choice is not None and choice.mode == "required":
            raise ValueError("tool_choice asks for a call, but there are no tools; give tools, or leave it out.")
        return None
    choice = Choice(mode="auto") if choice is None else choice
    names = [tool.tool.name for tool in tools]
    if stray := [name for name in choice.only or () if name not in names]:
        raise ValueError(f"tool_choice names {brief(repr(stray[0]))}, which is none of the tools; there is {', '.join(names)}.")
    return Toolbox(tuple(tool.tool for tool in tools), choice.mode, choice.only, choice.parallel and parallel is not False)


def checked(turns: Sequence[Turn]) -> Sequence[Turn]:
    """Raises ValueError where a result belongs to no call, or to one of several of which others have none: their order tells them apart."""
    if (stray := stray_result(turns)) is not None:
        raise ValueError(f"the result of {brief(repr(stray))} belongs to no call before it; send the conversation with its calls.")
    if (left := unanswered_call(turns)) is not None:
        raise ValueError(f"the call {brief(repr(left))} has no result, but another call of the same reply has one; send all results.")
    return turns


# ---- chat completions


class ChatFunction(Body):
    name: Name
    arguments: str
    parsed_arguments: Unused = None  # what the client made of them


class ChatCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: ChatFunction
    index: Unused = None


class ChatMessage(Body):
    """content: needed but for an assistant's calls. tool_call_id: of role tool alone. name: that of a tool is known from its call."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | None = None
    name: str | None = None
    tool_calls: Annotated[list[ChatCall], Field(fail_fast=True)] | None = None
    function_call: OldTools = None
    tool_call_id: str | None = None
    refusal: NoName = None
    audio: TextAlone = None
    annotations: Unused = None
    parsed: Unused = None  # what the client made of the content

    @model_validator(mode="after")
    def _fits(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls are the assistant's, not of role {self.role}.")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing; a text is needed.")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("tool_call_id is needed with role tool, and with no other.")
        if self.name and self.role != "tool":
            raise ValueError("the chat template has no place for name; leave it out.")
        return self

    @property
    def turn(self) -> Turn:
        if self.tool_call_id is not None:
            return Turn("tool", (Result(self.tool_call_id, self.content or ""),))
        calls = (Call(call.id, call.function.name, call.function.arguments) for call in self.tool_calls or ())
        said = () if self.content is None else (self.content,)
        return Turn("system" if self.role == "developer" else self.role, (*said, *calls))


class JsonSchema(Body):
    name: Name
    description: Unused = None
    wanted: dict[str, Any] | None = Field(None, alias="schema", description="None is any JSON object.")
    strict: Unused = None  # the schema is always obeyed


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _fits(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is needed with type json_schema, and with no other.")
        return self

    @property
    def form(self) -> dict[str, Any] | None:
        """The schema of the reply; None for text."""
        wanted = None if self.json_schema is None else self.json_schema.wanted
        return None if self.type == "text" else {"type": "object"} if wanted is None else wanted


class ChatBody(OpenAIBody):
    """``/v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Messages]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    metadata: Unused = None
    store: Unused = None
    service_tier: Unused = None
    safety_identifier: Unused = None
    prompt_cache_key: Unused = None
    prompt_cache_options: Unused = None
    prompt_cache_retention: Unused = None
    prediction: Unused = None
    tools: ChatTools = None
    tool_choice: ChatChoice = None
    parallel_tool_calls: Parallel = None
    functions: OldTools = None
    function_call: OldTools = None
    response_format: ResponseFormat | None = None
    modalities: TextAlone = None
    audio: TextAlone = None
    reasoning_effort: NoReasoning = None
    verbosity: Verbosity = None
    moderation: NotHere = None
    web_search_options: NotHere = None

    @model_validator(mode="after")
    def _fits(self) -> ChatBody:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens were both given; give one of them.")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs was given without logprobs: true; add that, or leave it out.")
        if self.ignore_eos and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("ignore_eos goes on after the end of the JSON that response_format asks for; leave one of them out.")
        if self.ignore_eos and self.tools:
            raise ValueError("ignore_eos goes on after the end of a call of the tools; leave one of them out.")
        self.toolbox()
        checked(self.turns)
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens or self.max_completion_tokens

    def toolbox(self) -> Toolbox | None:
        return toolbox(self.tools, self.tool_choice, self.parallel_tool_calls)

    @property
    def turns(self) -> list[Turn]:
        return [message.turn for message in self.messages]


class CompletionBody(OpenAIBody):
    """``/v1/completions``. max_tokens 0: with ``echo``, the prompt's log-probabilities alone."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=100)] | None = None
    echo: bool | None = None
    best_of: Count | None = None
    suffix: NotHere = None

    @model_validator(mode="after")
    def _fits(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(f"best_of is {self.best_of}; all replies are returned, so it must be n, which is {self.n or 1}, or left out.")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0 without echo: true; there would be nothing to answer.")
        return self


class ResponseMessage(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text
    id: Unused = None
    status: Unused = None
    phase: Unused = None

    @property
    def turn(self) -> Turn:
        return Turn("system" if self.role == "developer" else self.role, (self.content,))


class ResponseCall(Body):
    type: Literal["function_call"]
    call_id: str
    name: Name
    arguments: str
    id: Unused = None
    status: Unused = None
    parsed_arguments: Unused = None
    asynchronous: Async = None
    caller: Unused = None
    namespace: NoName = None

    @property
    def turn(self) -> Turn:
        return Turn("assistant", (Call(self.call_id, self.name, self.arguments),))


class ResponseResult(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: Text
    id: Unused = None
    status: Unused = None
    caller: Unused = None
    name: Unused = None
    namespace: NoName = None

    @property
    def turn(self) -> Turn:
        return Turn("tool", (Result(self.call_id, self.output),))


def item_kind(value: Any) -> str:
    """Which model an item of the input is; one that says nothing is a message."""
    kind = value.get("type") if isinstance(value, dict) else None
    return (kind if isinstance(kind, str) and kind in ("function_call", "function_call_output") else "message") + TAG


Item = Annotated[
    Annotated[ResponseMessage, Tag("message" + TAG)] | Annotated[ResponseCall, Tag("function_call" + TAG)]
    | Annotated[ResponseResult, Tag("function_call_output" + TAG)],
    Discriminator(item_kind),
]  # fmt: skip


class ResponseTextFormat(JsonSchema):
    """As ``ResponseFormat``, all on one level."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None  # type: ignore[assignment]

    @model_validator(mode="after")
    def _fits(self) -> ResponseTextFormat:
        if (self.type == "json_schema") != (self.name is not None) or (self.type != "json_schema" and self.wanted is not None):
            raise ValueError("name, and with it schema, is needed with type json_schema, and with no other.")
        return self

    @property
    def form(self) -> dict[str, Any] | None:
        """The schema of the reply; None for text."""
        return None if self.type == "text" else {"type": "object"} if self.wanted is None else self.wanted


class ResponseText(Body):
    format: ResponseTextFormat | None = None
    verbosity: Verbosity = None


class ResponseStreamOptions(Body):
    include_obfuscation: Unused = None


class ResponseBody(Sampled):
    """``/v1/responses``: text in, text out, nothing stored."""

    model: str = "default"
    input: Annotated[list[Item], Messages, BeforeValidator(one_message)] = Field(
        description="A text, or messages, calls and their results."
    )
    instructions: str | None = None
    max_output_tokens: Count | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: Annotated[list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]], Field(fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    metadata: dict[str, str] | None = None
    text: ResponseText | None = None
    store: Unused = None
    user: Unused = None
    service_tier: Unused = None
    max_tool_calls: Unused = None  # of tools that the server runs itself
    safety_identifier: Unused = None
    prompt_cache_key: Unused = None
    prompt_cache_options: Unused = None
    prompt_cache_retention: Unused = None
    tools: ResponseTools = None
    tool_choice: ResponseChoice = None
    parallel_tool_calls: Parallel = None
    reasoning: NoReasoning = None
    previous_response_id: NoState = None
    conversation: NoState = None
    background: NoState = None
    background_options: NoState = None
    prompt: NotHere = None
    moderation: NotHere = None
    context_management: NotHere = None
    access_programs: NotHere = None
    image: NotHere = None
    truncation: Annotated[Any, Only("this server never shortens a conversation; leave this out.", "disabled")] = None

    @property
    def alternatives(self) -> int | None:
        """Most likely tokens to give beside each token; None for no log-probabilities."""
        wanted = self.top_logprobs is not None or "message.output_text.logprobs" in (self.include or ())
        return (self.top_logprobs or 0) if wanted else None

    @model_validator(mode="after")
    def _fits(self) -> ResponseBody:
        self.toolbox()
        checked(self.turns)
        return self

    def toolbox(self) -> Toolbox | None:
        return toolbox(self.tools, self.tool_choice, self.parallel_tool_calls)

    @property
    def form(self) -> dict[str, Any] | None:
        """The schema of the reply; None for text."""
        return None if self.text is None or self.text.format is None else self.text.format.form

    @property
    def turns(self) -> list[Turn]:
        first = [] if self.instructions is None else [Turn("system", (self.instructions,))]
        return [*first, *(item.turn for item in self.input)]


BLOCK = {"type": "object", "required": ["type"], "properties": {"type": {"enum": ["text", "tool_use", "tool_result"]}}}
Blocks = Annotated[Any, BeforeValidator(blocks), WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": BLOCK}]})]


class AnthropicMessage(Body):
    role: Literal["user", "assistant"]
    content: Blocks

    @model_validator(mode="after")
    def _fits(self) -> AnthropicMessage:
        other, name = (Call, "tool_use") if self.role == "user" else (Result, "tool_result")
        if any(isinstance(part, other) for part in self.content):
            raise ValueError(f"a part of type {name} is not of role {self.role}; it belongs to the other.")
        return self

    @property
    def turn(self) -> Turn:
        return Turn(self.role, tuple(self.content))


class OutputFormat(Body):
    type: Literal["json_schema"]
    wanted: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    effort: Annotated[Any, Only("this model knows no effort; leave this out.", "high")] = None
    format: OutputFormat | None = None


class MessagesBody(Body):
    """``/v1/messages``. A last message of the assistant is the beginning of the reply."""

    model: str = "default"
    max_tokens: Count
    messages: Annotated[list[AnthropicMessage], Messages]
    system: Text | None = None
    stop_sequences: Stops = ()
    stream: bool | None = None
    temperature: Annotated[Number, Field(ge=0)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    metadata: Unused = None
    service_tier: Unused = None
    cache_control: Unused = None
    inference_geo: Unused = None
    user_profile_id: Unused = None
    workspace_id: Unused = None
    diagnostics: Unused = None
    speed: Unused = None
    tools: AnthropicTools = None
    tool_choice: AnthropicChoice = None
    thinking: NoReasoning = None
    output_config: OutputConfig | None = None
    container: NotHere = None
    mcp_servers: NotHere = None
    thread: NoThreads = None

    @model_validator(mode="after")
    def _fits(self) -> MessagesBody:
        box = self.toolbox()
        checked(self.turns)
        if self.messages[-1].role == "assistant":
            if len(self.messages) == 1:
                raise ValueError("messages has no message before the beginning of the reply; a user's is needed.")
            if any(not isinstance(part, str) for part in self.messages[-1].content):
                raise ValueError("the last message calls a tool; the tool's result is needed behind it.")
            if box is not None and box.choice == "required":
                raise ValueError("tool_choice asks for a call, but the last message begins the reply with a text; leave one of them out.")
            if self.form is not None:
                raise ValueError("output_config asks for JSON, but the last message begins the reply with a text; leave one of them out.")
        return self

    @property
    def form(self) -> dict[str, Any] | None:
        """The schema of the reply; None for text."""
        return None if self.output_config is None or self.output_config.format is None else self.output_config.format.wanted

    def toolbox(self) -> Toolbox | None:
        return toolbox(self.tools, self.tool_choice)

    @property
    def turns(self) -> list[Turn]:
        first = [] if self.system is None else [Turn("system", (self.system,))]
        return [*first, *(message.turn for message in self.messages)]


class CountTokensBody(MessagesBody):
    """``/v1/messages/count_tokens``: the same without a reply."""

    max_tokens: Count = 1


class TokenizeBody(Body):
    """``/tokenize``: a text, or the conversation as the model reads it."""

    model: str = "default"
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Messages] | None = None
    tools: ChatTools = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("one of prompt and messages is needed.")
        if self.tools and self.messages is None:
            raise ValueError("tools was given without messages, which it belongs to; leave it out.")
        return self

    @property
    def conversation(self) -> list[dict[str, str]]:
        return conversation([message.turn for message in self.messages or ()], [tool.tool for tool in self.tools or ()])


class DetokenizeBody(Body):
    """``/detokenize``."""

    model: str = "default"
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(fail_fast=True)]


def sampling_options(body: Sampled | MessagesBody) -> Json:
    """Options for ``make_request``; what is not given is as with OpenAI, sampled at temperature 1."""
    given = {name: getattr(body, name) for name in Sampled.model_fields if getattr(body, name, None) is not None}
    if "logit_bias" in given:
        given["logit_bias"] = {int(token): float(value) for token, value in given["logit_bias"].items()}
    if "seed" in given:
        given["seed"] %= 1 << 64
    return {"temperature": 1.0} | given


# ---- replies ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """One reply that is wanted. text: the prompt's; number: of the prompt it answers; silent: the prompt is all that is of interest;
    calls: whether the reply may call tools."""

    request: Request
    prompt: Prompt
    text: str
    number: int = 0
    added_bos: bool = False
    silent: bool = False
    calls: Calls = "none"


@dataclass(frozen=True)
class Said:
    """One step of a reply, as ``generate.Piece`` without its state. time: by time.monotonic().

    logprobs: of the tokens whose text is certain, and of none of a call.
    """

    index: int
    text: str
    token: int
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None
    stop: str | None
    time: float
    calls: Sequence[CallDelta] = ()


@dataclass
class Reply:
    """What has been said of one reply so far."""

    index: int
    ask: Ask
    parts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str | None = None  # "tool_calls" where calls came to their end
    stop: str | None = None

    def __post_init__(self) -> None:
        self.reader = None if self.ask.calls == "none" else CallReader(self.ask.calls)
        self._held: list[TokenLogprob] = []  # of text that may become a call

    def add(self, said: Said) -> Said:
        """Take a step; returns it as what it makes certain."""
        said = said if self.reader is None else self._read(said, self.reader)
        self.finish_reason, self.stop = said.finish_reason, said.stop
        if not self.ask.silent:
            self.parts.append(said.text)
            self.tokens += 1
            self.logprobs += said.logprobs
        return said

    def _read(self, said: Said, reader: CallReader) -> Said:
        text, calls = reader.push(said.text, last=said.finish_reason is not None)
        self._held += said.logprobs
        logprobs: tuple[TokenLogprob, ...] = ()
        if reader.is_calling or not reader.held:
            logprobs = () if reader.is_calling else tuple(self._held)
            self._held = []
        said = replace(said, text=text, logprobs=logprobs, calls=calls)
        return replace(said, finish_reason="tool_calls", stop=None) if said.finish_reason is not None and reader.is_done else said

    @property
    def calls(self) -> Sequence[Call]:
        """As far as they have come, each from when its tool is known."""
        return () if self.reader is None else self.reader.found

    @property
    def text(self) -> str:
        return "".join(self.parts)


def token_counts(replies: Sequence[Reply]) -> tuple[int, int, int]:
    """Tokens of prompts, each prompt once; of replies; of prompts that were not read again."""
    firsts = {reply.ask.number: reply for reply in reversed(replies)}.values()
    prompt = sum(len(reply.ask.request.tokens) for reply in firsts)
    return prompt, sum(reply.tokens for reply in replies), sum(reply.cached_tokens for reply in firsts)


def usage(replies: Sequence[Reply]) -> Json:
    prompt, completion, cached = token_counts(replies)
    return {
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }  # fmt: skip


def chat_logprob(texts: TokenTexts, entry: TokenLogprob) -> Json:
    """A token in the layout of chat completions and responses."""

    def shown(token: int, logprob: float) -> Json:
        text, data = texts(token)
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(data)}

    return shown(entry.token, entry.logprob) | {"top_logprobs": [shown(*pair) for pair in entry.top]}


class LegacyLogprobs:
    """Tokens in the layout of completions: lists side by side. offset: characters of the text before the next token."""

    def __init__(self, texts: TokenTexts, ask: Ask) -> None:
        self.texts, self.ask, self.offset = texts, ask, 0

    def of_prompt(self, entries: Sequence[TokenLogprob | None]) -> Json:
        """All of the prompt's tokens; the first has no log-probability."""
        tokens, text, widths, place = self.ask.request.tokens, self.ask.text, list[int](), 0
        for i, token in enumerate(tokens):
            own = self.texts(token)[0]
            if i == 0 and self.ask.added_bos:
                width = 0
            elif text.startswith(own, place):
                width = len(own)
            elif own.startswith(" ") and text.startswith(own[1:], place):
                width = len(own) - 1  # a space that the tokenizer writes before a first word
            else:
                width = self._width(token)
            widths.append(width)
            place += width
        return self._lists(zip(tokens, entries, widths, strict=True))

    def of_reply(self, entries: Iterable[TokenLogprob]) -> Json:
        return self._lists((e.token, e, 0 if self.texts.is_special(e.token) else self._width(e.token)) for e in entries)

    def _width(self, token: int) -> int:
        return sum(byte & 0xC0 != 0x80 for byte in self.texts(token)[1])

    def _lists(self, entries: Iterable[tuple[int, TokenLogprob | None, int]]) -> Json:
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, entry, width in entries:
            lists["tokens"].append(self._named(token))
            lists["token_logprobs"].append(None if entry is None else max(entry.logprob, LEAST_LOGPROB))
            top: dict[str, float] | None = None
            if entry is not None:
                top = {}
                for other, logprob in (*entry.top, (token, entry.logprob)):
                    top.setdefault(self._named(other), max(logprob, LEAST_LOGPROB))
            lists["top_logprobs"].append(top)
            lists["text_offset"].append(self.offset)
            self.offset += width
        return lists

    def _named(self, token: int) -> str:
        text, data = self.texts(token)
        return f"bytes:{text}" if text.encode() != data else text


def joined_lists(first: Json, second: Json) -> Json:
    return {name: [*first[name], *second[name]] for name in first}


def new_id(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4().hex}"


def sse(name: str | None, data: Json | str) -> bytes:
    """An event of a stream."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


# ---- answers ---------------------------------------------------------------------------------------------------------


class Stream:
    """One API's answer to a request, whole or as events. waits: whether the first event needs the first token."""

    waits = False

    def __init__(self, model: str, replies: Sequence[Reply], texts: TokenTexts) -> None:
        self.model, self.replies, self.texts = model, replies, texts
        self.created = int(time.time())

    def whole(self) -> Json:
        """The body, once all has been said."""
        raise NotImplementedError

    def begin(self) -> Iterator[Event]:
        yield from ()

    def said(self, said: Said) -> Iterator[Event]:
        raise NotImplementedError

    def end(self) -> Iterator[Event]:
        raise NotImplementedError

    def failed(self, problem: Problem) -> Iterator[Event]:
        yield None, openai_error(problem)

    def idle(self) -> bytes:
        """Shows proxies and clients that the connection is alive."""
        return b": waiting\n\n"


class ChatStream(Stream):
    """``/v1/chat/completions``."""

    def __init__(self, model: str, replies: Sequence[Reply], texts: TokenTexts, *, include_usage: bool = False) -> None:
        super().__init__(model, replies, texts)
        self.id, self.include_usage = new_id("chatcmpl-"), include_usage

    def _logprobs(self, reply: Reply, entries: Iterable[TokenLogprob]) -> Json | None:
        if reply.ask.request.logprobs is None:
            return None
        return {"content": [chat_logprob(self.texts, entry) for entry in entries], "refusal": None}

    def _message(self, reply: Reply) -> Json:
        message = {"role": "assistant", "content": reply.text, "refusal": None}
        if not reply.calls:
            return message
        return message | {"content": reply.text or None, "tool_calls": [self._call(call, call.arguments) for call in reply.calls]}

    def _call(self, call: Call, arguments: str) -> Json:
        return {"id": f"call_{call.id}", "type": "function", "function": {"name": call.name, "arguments": arguments}}

    def whole(self) -> Json:
        choices = [
            {
                "index": reply.index, "message": self._message(reply), "logprobs": self._logprobs(reply, reply.logprobs),
                "finish_reason": reply.finish_reason,
            }
            for reply in self.replies
        ]  # fmt: skip
        return {
            "id": self.id, "object": "chat.completion", "created": self.created, "model": self.model, "choices": choices,
            "usage": usage(self.replies),
        }  # fmt: skip

    def _chunk(self, choices: list[Json], counts: Json | None = None) -> Event:
        chunk = {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model, "choices": choices}
        return None, chunk | ({"usage": counts} if self.include_usage else {})

    def _delta(self, index: int, delta: Json, finish: str | None = None, logprobs: Json | None = None) -> Event:
        return self._chunk([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}])

    def begin(self) -> Iterator[Event]:
        for reply in self.replies:
            yield self._delta(reply.index, {"role": "assistant", "content": "" if reply.reader is None else None})

    def said(self, said: Said) -> Iterator[Event]:
        reply = self.replies[said.index]
        if said.text or said.logprobs:
            yield self._delta(said.index, {"content": said.text}, logprobs=self._logprobs(reply, said.logprobs))
        for part in said.calls:
            if part.name is not None:
                yield self._delta(said.index, {"tool_calls": [{"index": part.index} | self._call(reply.calls[part.index], "")]})
            if part.arguments:
                yield self._delta(said.index, {"tool_calls": [{"index": part.index, "function": {"arguments": part.arguments}}]})
        if said.finish_reason is not None:
            yield self._delta(said.index, {}, said.finish_reason)

    def end(self) -> Iterator[Event]:
        if self.include_usage:
            yield self._chunk([], usage(self.replies))
        yield None, "[DONE]"


class CompletionStream(Stream):
    """``/v1/completions``."""

    def __init__(self, model: str, replies: Sequence[Reply], texts: TokenTexts, *, echo: bool = False, include_usage: bool = False) -> None:
        super().__init__(model, replies, texts)
        self.id, self.echo, self.include_usage = new_id("cmpl-"), echo, include_usage
        self._lists = [LegacyLogprobs(texts, reply.ask) for reply in replies]
        self._begun = [False] * len(replies)
        if not echo:
            for lists, reply in zip(self._lists, replies, strict=True):
                lists.offset = len(reply.ask.text)

    def _logprobs(self, reply: Reply, entries: Iterable[TokenLogprob], *, prompt: bool) -> Json | None:
        if reply.ask.request.logprobs is None:
            return None
        lists = self._lists[reply.index]
        first = lists.of_prompt(reply.prompt_logprobs) if prompt else lists.of_reply(())
        return joined_lists(first, lists.of_reply(entries))

    def _choice(self, reply: Reply, text: str, entries: Iterable[TokenLogprob], finish: str | None, *, prompt: bool) -> Json:
        """prompt: whether the echo belongs to this part."""
        return {
            "index": reply.index, "text": (reply.ask.text if prompt else "") + text,
            "logprobs": self._logprobs(reply, entries, prompt=prompt), "finish_reason": finish,
        }  # fmt: skip

    def _body(self, choices: list[Json]) -> Json:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model, "choices": choices}

    def whole(self) -> Json:
        choices = [self._choice(reply, reply.text, reply.logprobs, reply.finish_reason, prompt=self.echo) for reply in self.replies]
        return self._body(choices) | {"usage": usage(self.replies)}

    def said(self, said: Said) -> Iterator[Event]:
        reply = self.replies[said.index]
        silent = reply.ask.silent
        entries = () if silent else said.logprobs
        prompt = self.echo and not self._begun[said.index]
        self._begun[said.index] = True
        if said.text or entries or prompt or said.finish_reason is not None:
            choice = self._choice(reply, "" if silent else said.text, entries, said.finish_reason, prompt=prompt)
            yield None, self._body([choice]) | ({"usage": None} if self.include_usage else {})

    def end(self) -> Iterator[Event]:
        if self.include_usage:
            yield None, self._body([]) | {"usage": usage(self.replies)}
        yield None, "[DONE]"


class ResponseStream(Stream):
    """``/v1/responses``; always one reply: a message, calls, or a message and calls."""

    def __init__(self, model: str, replies: Sequence[Reply], texts: TokenTexts, *, body: ResponseBody) -> None:
        super().__init__(model, replies, texts)
        self.id, self.item_id, self.body = new_id("resp_"), new_id("msg_"), body
        self._number = self._index = -1  # of the last event, and of the last item
        self._open: Literal["message"] | int | None = None  # a number is a call's
        (self.reply,) = replies

    def _item(self, status: str, content: list[Json]) -> Json:
        return {"id": self.item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _call_item(self, i: int) -> Json:
        call, whole = self.reply.calls[i], self.reply.reader is not None and i < self.reply.reader.whole
        return {
            "id": f"fc_{call.id}", "type": "function_call", "status": "completed" if whole else "incomplete", "call_id": f"call_{call.id}",
            "name": call.name, "arguments": call.arguments,
        }  # fmt: skip

    def _message_item(self, status: str) -> Json:
        return self._item(status, [self._part(self.reply.text, self._logprobs(self.reply.logprobs))])

    def _items(self, status: str) -> list[Json]:
        """status: of a message that nothing follows."""
        calls = [self._call_item(i) for i in range(len(self.reply.calls))]
        if not calls:
            return [self._message_item(status)]
        return [*([self._message_item("completed")] if self.reply.text else ()), *calls]

    def _part(self, text: str, logprobs: list[Json]) -> Json:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _response(self, status: str, output: list[Json], error: Json | None = None) -> Json:
        body, options, counts = self.body, self.reply.ask.request.sampling, None
        if status in ("completed", "incomplete"):
            prompt, completion, cached = token_counts(self.replies)
            counts = {
                "input_tokens": prompt, "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
                "output_tokens": completion, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": prompt + completion,
            }  # fmt: skip
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "background": False, "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "model": self.model, "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False, "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None}, "store": False, "temperature": options.temperature,
            "text": {"format": self._format()}, "tool_choice": self._choice(), "tools": [self._tool(tool) for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0, "top_p": options.top_p, "truncation": "disabled", "usage": counts,
            "metadata": body.metadata or {},
        }  # fmt: skip

    def _format(self) -> Json:
        wanted = None if self.body.text is None else self.body.text.format
        if wanted is None or wanted.type != "json_schema":
            return {"type": "text" if wanted is None else wanted.type}
        return {"type": "json_schema", "name": wanted.name, "schema": wanted.form, "strict": True}

    def _choice(self) -> str | Json:
        choice = self.body.tool_choice
        if choice is not None and choice.only is not None:
            named = [{"type": "function", "name": name} for name in choice.only]
            return {"type": "allowed_tools", "mode": choice.mode, "tools": named} if choice.parallel else named[0]
        return choice.mode if choice is not None else "auto" if self.body.tools else "none"

    def _tool(self, tool: ResponseTool) -> Json:
        return {"type": "function", "strict": True, "name": tool.name, "description": tool.description, "parameters": tool.parameters}

    def _logprobs(self, entries: Iterable[TokenLogprob]) -> list[Json]:
        return [chat_logprob(self.texts, entry) for entry in entries]

    @property
    def _status(self) -> str:
        return "incomplete" if self.reply.finish_reason == "length" else "completed"

    def whole(self) -> Json:
        return self._response(self._status, self._items(self._status))

    def _event(self, kind: str, **data: Any) -> Event:
        self._number += 1
        return kind, {"type": kind, "sequence_number": self._number} | data

    def _place(self) -> Json:
        return {"item_id": self.item_id, "output_index": self._index, "content_index": 0}

    def _begin_message(self) -> Iterator[Event]:
        self._index, self._open = self._index + 1, "message"
        yield self._event("response.output_item.added", output_index=self._index, item=self._item("in_progress", []))
        yield self._event("response.content_part.added", **self._place(), part=self._part("", []))

    def _begin_call(self, i: int) -> Iterator[Event]:
        self._index, self._open = self._index + 1, i
        item = self._call_item(i) | {"status": "in_progress", "arguments": ""}
        yield self._event("response.output_item.added", output_index=self._index, item=item)

    def _end_item(self, status: str) -> Iterator[Event]:
        """Close what is open. status: of a message."""
        if self._open == "message":
            item = self._message_item(status)
            part = item["content"][0]
            yield self._event("response.output_text.done", **self._place(), text=part["text"], logprobs=part["logprobs"])
            yield self._event("response.content_part.done", **self._place(), part=part)
        elif self._open is not None:
            item = self._call_item(self._open)
            done = {"item_id": item["id"], "output_index": self._index, "name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **done)
        else:
            return
        self._open = None
        yield self._event("response.output_item.done", output_index=self._index, item=item)

    def begin(self) -> Iterator[Event]:
        yield self._event("response.created", response=self._response("in_progress", []))
        yield self._event("response.in_progress", response=self._response("in_progress", []))
        if self.reply.reader is None:
            yield from self._begin_message()

    def said(self, said: Said) -> Iterator[Event]:
        if said.text or (said.logprobs and self._open == "message"):
            if self._open is None:
                yield from self._begin_message()
            yield self._event("response.output_text.delta", **self._place(), delta=said.text, logprobs=self._logprobs(said.logprobs))
        for part in said.calls:
            if part.name is not None:
                yield from self._end_item("completed")
                yield from self._begin_call(part.index)
            if part.arguments:
                place = {"item_id": f"fc_{self.reply.calls[part.index].id}", "output_index": self._index}
                yield self._event("response.function_call_arguments.delta", **place, delta=part.arguments)

    def end(self) -> Iterator[Event]:
        if self._index < 0:  # an empty reply is an empty message
            yield from self._begin_message()
        yield from self._end_item(self._status)
        yield self._event(f"response.{self._status}", response=self._response(self._status, self._items(self._status)))

    def failed(self, problem: Problem) -> Iterator[Event]:
        error = {"code": "server_error", "message": str(problem)}
        yield self._event("response.failed", response=self._response("failed", self._items("incomplete"), error))


class MessageStream(Stream):
    """``/v1/messages``; always one reply. The first event counts the tokens that were cached, which the first token tells."""

    waits = True

    def __init__(self, model: str, replies: Sequence[Reply], texts: TokenTexts) -> None:
        super().__init__(model, replies, texts)
        self.id, self._index = new_id("msg_"), -1  # of the last block
        self._open: Literal["text", "tool_use"] | None = None
        (self.reply,) = replies

    def _usage(self, output: int) -> Json:
        """input_tokens: those that were read; cached ones stand beside them."""
        prompt, _, cached = token_counts(self.replies)
        return {
            "input_tokens": prompt - cached, "cache_read_input_tokens": cached, "cache_creation_input_tokens": 0, "output_tokens": output,
        }  # fmt: skip

    def _stop(self) -> Json:
        reply = self.reply
        reason = {"length": "max_tokens", "tool_calls": "tool_use"}.get(reply.finish_reason or "", "end_turn")
        return {"stop_reason": "stop_sequence" if reply.stop is not None else reason, "stop_sequence": reply.stop}

    def _message(self, content: list[Json], stop: Json, output: int) -> Json:
        message = {"id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content}
        return message | stop | {"usage": self._usage(output)}

    def whole(self) -> Json:
        calls = self.reply.calls
        content: list[Json] = [] if calls and not self.reply.text else [{"type": "text", "text": self.reply.text}]
        for call in calls:  # one that was cut off as far as it came, which is what the clients make of a stream
            try:
                arguments = from_json(call.arguments, allow_partial=True) if call.arguments else {}
                json.dumps(arguments, allow_nan=False)
            except ValueError as error:  # nested too deep for a reader, or a number that no JSON reader keeps
                raise Problem(f"the arguments for {call.name} cannot be sent as JSON ({brief(str(error))}).", status=500) from None
            content.append(self._use(call) | {"input": arguments})
        return self._message(content, self._stop(), self.reply.tokens)

    def _use(self, call: Call) -> Json:
        return {"type": "tool_use", "id": f"toolu_{call.id}", "name": call.name, "input": {}}

    def _event(self, kind: str, **data: Any) -> Event:
        return kind, {"type": kind} | data

    def _begin_block(self, kind: Literal["text", "tool_use"], block: Json) -> Iterator[Event]:
        self._index, self._open = self._index + 1, kind
        yield self._event("content_block_start", index=self._index, content_block=block)

    def _begin_text(self) -> Iterator[Event]:
        yield from self._begin_block("text", {"type": "text", "text": ""})

    def _end_block(self) -> Iterator[Event]:
        if self._open is not None:
            self._open = None
            yield self._event("content_block_stop", index=self._index)

    def _added(self, **delta: str) -> Event:
        return self._event("content_block_delta", index=self._index, delta=delta)

    def begin(self) -> Iterator[Event]:
        yield self._event("message_start", message=self._message([], {"stop_reason": None, "stop_sequence": None}, 0))
        if self.reply.reader is None:
            yield from self._begin_text()
        yield self._event("ping")

    def said(self, said: Said) -> Iterator[Event]:
        if said.text:
            if self._open is None:
                yield from self._begin_text()
            yield self._added(type="text_delta", text=said.text)
        for part in said.calls:
            if part.name is not None:
                yield from self._end_block()
                yield from self._begin_block("tool_use", self._use(self.reply.calls[part.index]))
            if part.arguments:
                yield self._added(type="input_json_delta", partial_json=part.arguments)

    def end(self) -> Iterator[Event]:
        if self._index < 0:  # an empty reply is an empty text
            yield from self._begin_text()
        yield from self._end_block()
        yield self._event("message_delta", delta=self._stop(), usage=self._usage(self.reply.tokens))
        yield self._event("message_stop")

    def failed(self, problem: Problem) -> Iterator[Event]:
        yield "error", anthropic_error(problem)

    def idle(self) -> bytes:
        return sse(*self._event("ping"))
