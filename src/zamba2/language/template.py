"""Chat templates: Jinja text that came with a checkpoint, rendered as transformers does, with bounds on time and memory.

A template is a program by a stranger. jinja2's sandbox keeps it from Python's internals; it does not keep it from running for ever
or asking for terabytes. Here a trace function stops it at a deadline, and since a deadline cannot interrupt C code, the values a
template makes are measured as they appear, so that no single operation in C has much to chew on.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from datetime import datetime
from types import FrameType
from typing import Any

import jinja2
import jinja2.idtracking
import jinja2.visitor
import markupsafe
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from zamba2.errors import Zamba2Error
from zamba2.language.messages import CHATML, brief

__all__ = ["render"]

SECONDS = 1.5  # of a processor for one rendering, compilation included
SOURCE = 1 << 18  # characters of template text; published ones stay under a tenth
VALUE = 4_000_000  # characters in one value: a million tokens, far beyond any context here
TOTAL = 16 * VALUE  # characters in all values of one rendering
PRODUCT = 16 * VALUE  # bound for operations whose result may be as large as the product of their operands
ITEM = 16  # characters that an element of a list or dict counts for
DEPTH = 64  # nesting of lists and dicts
INT_BITS = 4096
SURROGATES = re.compile("[\ud800-\udfff]")
# A format string that sets a field width of 1000 or more, or takes the width from an argument.
WIDE_FORMAT = re.compile(r"%(\([^()]*\))?[-+ #.\d]*?(\d{4}|\*)|\{[^{}:]*:[^{}]*?(\d{4}|\{)")
# Their loops are bounded by the source's length or by VALUE: watching their calls is enough, and twice as fast.
CALLS_ONLY = {
    __file__,
    *(module.__file__ for module in (jinja2.lexer, jinja2.parser, jinja2.nodes, jinja2.visitor, jinja2.idtracking, jinja2.compiler)),
}
FINALIZERS = {weakref.finalize.__call__.__code__.co_filename, weakref.WeakSet.add.__code__.co_filename}  # they forget what is gone
# Where the code that a template leads to lies, but for its own. What else Python runs meanwhile it was not asked for.
PLACES = tuple(os.path.dirname(file) + os.sep for file in (jinja2.__file__, markupsafe.__file__, os.path.dirname(__file__), os.__file__))
# No chat needs these; their cost follows from neither the size of what goes in nor that of what comes out.
UNWANTED_FILTERS = ("batch", "center", "filesizeformat", "pprint", "random", "slice", "sum", "urlize", "wordwrap", "xmlattr")


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    bos_token: str | None = None,
    eos_token: str | None = None,
    **variables: Any,
) -> str:
    """Render a chat template as ``transformers`` ``apply_chat_template(tokenize=False)`` does.

    Works on any thread and puts back the trace function it found. ``messages`` and ``variables`` must be plain JSON data: a
    template sees a copy and no Python objects. Raises Zamba2Error when the template is not valid Jinja, fails, refuses the
    conversation (``raise_exception``), reaches for Python's internals, takes over SECONDS or makes values larger than VALUE.
    """
    if (text := _as_chatml(template, messages, add_generation_prompt)) is not None:
        return text
    # As transformers passes them: tools and documents are none, special tokens that do not exist are undefined.
    data: dict[str, Any] = {"messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
    data |= {name: token for name, token in (("bos_token", bos_token), ("eos_token", eos_token)) if token is not None}
    data |= variables
    if len(template) > SOURCE:
        raise Zamba2Error(f"the chat template has {len(template)} characters; at most {SOURCE} are needed: check the checkpoint's files.")
    try:
        plain = json.loads(json.dumps(data, default=_as_dict))
    except (TypeError, ValueError, RecursionError) as error:
        raise Zamba2Error(f"the messages are not plain JSON data ({brief(error)}); use texts, numbers, lists and objects.") from None
    try:
        return _run(template, plain)
    except _Stop as stop:
        raise Zamba2Error(f"the chat template was stopped: {stop}; use another template or a shorter conversation.") from None
    except _Refused as error:
        raise Zamba2Error(f"the chat template refuses this conversation: {brief(error)}") from None
    except jinja2.TemplateSyntaxError as error:
        raise Zamba2Error(f"the chat template is not valid Jinja (line {error.lineno}: {brief(error.message)}); correct it.") from None
    except Exception as error:  # whatever a stranger's program may raise, RecursionError and MemoryError included
        reason = f"{type(error).__name__}: {brief(error)}"
        raise Zamba2Error(f"the chat template failed ({reason}); correct it, or use one that fits these messages.") from None


def _as_chatml(template: str, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str | None:
    """What a template that is ChatML's program writes, where nothing in the messages needs the rest of ``render``; else None.

    Training renders each conversation many times, and this takes a hundredth of the time.
    """
    if not _is_chatml(template):
        return None
    pieces = []
    for message in messages:
        if not isinstance(message, dict) or len(message) != 2:
            return None
        role, content = message.get("role"), message.get("content")
        if type(role) is not str or type(content) is not str:
            return None
        pieces += ["<|im_start|>", role, "\n", content, "<|im_end|>\n"]
    text = "".join([*pieces, "<|im_start|>assistant\n"] if add_generation_prompt else pieces)
    if len(text) > VALUE or (not text.isascii() and SURROGATES.search(text)):  # JSON joins the halves of a pair
        return None
    return text


@functools.lru_cache(maxsize=16)
def _is_chatml(template: str) -> bool:
    """Whether a template is CHATML, but for spaces inside its marks and how its texts are quoted."""
    if len(template) > 2 * len(CHATML):
        return False
    try:
        return bool(ENVIRONMENT.parse(template) == ENVIRONMENT.parse(CHATML))
    except jinja2.TemplateSyntaxError:
        return False


def _as_dict(value: Any) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not JSON data")


# ---- bounds ----------------------------------------------------------------------------------------------------------


class _Stop(BaseException):
    """A bound was hit. Not an Exception, so that no ``except Exception`` inside jinja2 swallows it."""


class _Refused(Exception):
    """The template called ``raise_exception``."""


class _Budget(threading.local):
    """What the rendering on this thread may still spend."""

    deadline = spent = 0.0
    characters = 0

    def charge(self, characters: int) -> None:
        self.check()
        self.characters -= characters
        if characters > VALUE or self.characters < 0:
            raise _Stop(f"it makes values of more than {VALUE} characters, or {TOTAL} in all")

    def check(self) -> None:
        # The second clock, which stands still while others have the processor, is slow to read.
        if time.monotonic() > self.deadline and time.thread_time() > self.spent:
            raise _Stop(f"it takes more than {SECONDS} seconds")

    def trace(self, frame: FrameType, event: str, argument: Any) -> Callable[[FrameType, str, Any], Any] | None:
        """Called by Python for every function that the template and jinja2 enter, and for every line of most."""
        # A generator may be entered to be thrown away: Python ignores what is raised there, and traces no more.
        if event == "line" or (event == "call" and not frame.f_code.co_flags & inspect.CO_GENERATOR):
            try:
                self.check()
            except _Stop:
                if not _swallowed(frame):
                    raise
        return None if frame.f_code.co_filename in CALLS_ONLY else self.trace


def _swallowed(frame: FrameType | None) -> bool:
    """Whether Python would ignore what is raised here, and trace no more: below a finalizer or a callback of the garbage collector's."""
    while frame is not None and frame.f_code is not _run.__code__:
        if frame.f_code.co_name == "__del__" or _is_elsewhere(frame.f_code.co_filename):
            return True
        frame = frame.f_back
    return False


@functools.cache
def _is_elsewhere(file: str) -> bool:
    """Whether no template leads to a file's code. Compiled templates, and what Python has in itself, have names in brackets."""
    if file in FINALIZERS or (not file.startswith("<") and not file.startswith(PLACES)):
        return True
    return not file.startswith(PLACES[:-1]) and ("site-packages" in file or "dist-packages" in file)  # these may lie in Python's folder


_budget = _Budget()


def _run(template: str, variables: dict[str, Any]) -> str:
    _budget.deadline, _budget.spent, _budget.characters = time.monotonic() + SECONDS, time.thread_time() + SECONDS, TOTAL
    before = sys.gettrace()
    sys.settrace(_budget.trace)
    try:
        _measured(variables)
        pieces = _Buffer()
        pieces.extend(_compile(template).generate(**variables))
        _budget.check()
        return "".join(pieces)
    finally:
        sys.settrace(before)


def _weight(value: Any) -> int:
    """Characters that a value would take when written out, roughly; shared parts count each time they appear."""
    total, level = 0, [value]
    for _ in range(DEPTH):
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, (str, bytes)):
                total += len(item)
            elif isinstance(item, int) and item.bit_length() > INT_BITS:
                raise _Stop(f"it makes numbers of more than {INT_BITS} bits")
            elif isinstance(item, Mapping):
                deeper += item.keys()
                deeper += item.values()
            elif isinstance(item, (list, tuple, set, frozenset, range)):
                deeper += item
            if total + ITEM * len(deeper) > VALUE:
                _budget.charge(VALUE + 1)
        total += ITEM * len(deeper)
        if not deeper:
            return total
        level = deeper
    raise _Stop(f"it nests lists or objects more than {DEPTH} deep")


def _measured(value: Any, *, fresh: bool = False) -> Any:
    """The value, checked against VALUE and charged for what it adds: a container of old values costs its slots, a ``fresh`` one all.

    Iterators and views become lists: what is lazy cannot be measured.
    """
    if isinstance(value, (Iterator, KeysView, ItemsView, ValuesView)) and not isinstance(value, LoopContext):
        value = [_measured(item) for item in value]
    weight = _weight(value)
    _budget.charge(ITEM * len(value) if isinstance(value, (list, tuple, dict)) and not fresh else weight)
    return value


def _check_product(subject: Any, arguments: Iterable[Any]) -> None:
    """Stop before an operation whose result may reach the product of two operands; a whole number counts as a size."""
    sizes = sorted([_weight(subject), *(abs(a) if isinstance(a, int) else _weight(a) for a in arguments)])
    if len(sizes) > 1 and sizes[-1] * sizes[-2] > PRODUCT:
        raise _Stop(f"it asks for a value of more than {PRODUCT} characters")


def _check_format(layout: Any, arguments: Any) -> None:
    """The same for ``%`` and ``format``, where numbers are values and the layout may ask for wide fields."""
    if isinstance(layout, str) and WIDE_FORMAT.search(layout):
        raise _Stop("it asks for a field width of more than 999 characters")
    _check_product(layout, [1000 + _weight(arguments)])


# ---- the environment -------------------------------------------------------------------------------------------------


class _Buffer(list[str]):
    """Where a macro or block collects its text. Generated code calls these two methods only."""

    def append(self, text: str) -> None:
        _budget.charge(len(text))
        super().append(text)

    def extend(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.append(text)


class _MeasuringGenerator(CodeGenerator):
    """Compiles literals, ``~`` and buffers, which the sandbox leaves alone, to code that measures."""

    def buffer(self, frame: Frame) -> None:
        frame.buffer = self.temporary_identifier()
        self.writeline(f"{frame.buffer} = environment.new_buffer()")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self.write("environment.measured(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx != "load":  # the targets of "for a, b in"
            return super().visit_Tuple(node, frame)
        self.write("environment.measured(")
        super().visit_Tuple(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.write("environment.measured(")
        super().visit_Dict(node, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.measured(str_join(")
        self.visit_Tuple(nodes.Tuple(node.nodes, "load"), frame)
        self.write("))")

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible  # nothing of the template runs at compile time
        return super()._output_child_to_const(node, frame, finalize)


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant said, for training masks; here it is a plain scope."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    """``namespace()`` without underscored names, which jinja2 could mistake for its own marks (as in transformers)."""

    def __init__(*args: Any, **attributes: Any) -> None:  # namespace(self=...) is allowed
        self, *rest = args
        values = dict(*rest, **attributes)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} is not allowed")


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _MeasuringGenerator
    intercepted_binops = frozenset(["+", "*", "**", "%"])
    measured = staticmethod(_measured)
    new_buffer = _Buffer

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and not (isinstance(left, (int, float)) and isinstance(right, (int, float))):
            _check_product(*((right, [left]) if isinstance(left, int) else (left, [right])))
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > INT_BITS:
            raise _Stop(f"it makes numbers of more than {INT_BITS} bits")
        return _measured(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __callable: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__callable, "__self__", None)
        makes_text = isinstance(owner, (str, bytes, int))
        if makes_text:
            _check_product(owner, [*args, *kwargs.values()])
        return _measured(super().call(__context, __callable, *args, **kwargs), fresh=makes_text)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        # jinja2 would print nothing and raise on use; a template that tries this is better stopped at once.
        raise jinja2.exceptions.SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} is unsafe")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None
        inner, text = formatted, value.__self__

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(text, [args, kwargs])
            return inner(*args, **kwargs)

        return checked


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that checks its operands and measures its result."""

    @functools.wraps(function)  # carries over jinja2's pass_context and pass_environment marks
    def guarded(*args: Any, **kwargs: Any) -> Any:
        operands = [a for a in args if not isinstance(a, (jinja2.Environment, jinja2.runtime.Context, nodes.EvalContext))]
        if name == "format":
            _check_format(operands[0], [operands[1:], kwargs])
        elif name not in ("default", "d", "truncate"):  # their numbers are no sizes of anything made
            _check_product(operands[0], [*operands[1:], *kwargs.values()])
        return _measured(function(*args, **kwargs))

    return guarded


def _raise_exception(message: object) -> None:
    raise _Refused(str(message)[:400])  # written out here, where the deadline holds


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """JSON without the HTML escapes of jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout[:200])


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    # A function, not the type: dict.update(message, ...) would get around the immutable sandbox.
    return dict(*args, **kwargs)


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    for name in UNWANTED_FILTERS:
        del environment.filters[name]
    environment.filters = {name: _guarded(name, function) for name, function in environment.filters.items()}
    del environment.globals["lipsum"]
    environment.globals |= {"dict": _dict, "namespace": _Namespace, "raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


ENVIRONMENT = _environment()


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    return ENVIRONMENT.from_string(template)
