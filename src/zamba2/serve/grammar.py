"""Replies that are JSON of a given schema, or call a tool: what is checked of a schema, and which tokens may come next (llguidance).

A schema comes from anyone, so plain code limits its size, depth, branches and counts before the library compiles it, in a thread of its
own and with the library's own limits. A keyword that would not be obeyed is refused. JSON is written without spaces.
"""

from __future__ import annotations

import json
import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from functools import cached_property
from typing import Any
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from zamba2.errors import Zamba2Error
from zamba2.language.generate import Constraint, Scores
from zamba2.language.messages import brief
from zamba2.language.tokenizer import BYTE_PIECE, Tokenizer
from zamba2.serve.tools import BEGIN, END, NO_ARGUMENTS, Toolbox, head

__all__ = ["Grammars", "Unmet", "check_schema"]

MOST_CHARACTERS = 64 << 10
MOST_NODES = 2000  # values in the schema, of any kind
MOST_DEPTH = 32  # schemas within schemas
MOST_NESTING = 3 * MOST_DEPTH  # values within values
MOST_CHOICES = 2000  # of anyOf, oneOf and enum in one place
MOST_PRODUCT = 200  # of such choices where several must be met at once
MOST_REPEATS = 10_000  # of a character, an item or a property
MOST_PATTERN = 1000  # characters
LARGEST, LEAST = 1 << 53, 1e-9  # sizes of numbers that the library keeps exactly
SECONDS = 1.0  # to compile
# Without \u: a text is then written as Python's json writes it, but for control characters, which are left out; with it a name could
# come a second time in other letters.
COMPACT = {"whitespace_flexible": False, "lenient": False, "json_allowed_escapes": 'nrbtf\\"'}
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 200_000, "step_max_items": 50_000, "max_items_in_row": 8000,
    "max_lexer_states": 250_000, "max_grammar_size": 200_000, "verbose_errors": False,
}  # fmt: skip

TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")
NOTES = {"$schema", "$comment", "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
COUNTS = {"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"}
NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
ONE, SEVERAL, NAMED = {"items", "additionalProperties"}, {"anyOf", "oneOf", "allOf", "prefixItems"}, {"properties", "patternProperties"}
DEFINED = {"$defs", "definitions"}
OTHERS = {"type", "enum", "const", "required", "pattern", "format", "$ref"}
KNOWN = NOTES | COUNTS | NUMBERS | ONE | SEVERAL | NAMED | DEFINED | OTHERS
PATTERN_PART = re.compile(r"\\[pP]\{[^}]*\}|\\[pP]\w|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(\d+)(?:,(\d*))?\}|.", re.DOTALL)


IN_CLASS = re.compile(r"(\\.)|([\[&~])", re.DOTALL)  # what stands for itself in a class of ECMA's and not in one of the library's
FROM_NUL = re.compile(r"(?:\0|\\0+|\\x00|\\u0000|\\[xu]\{0+\})-|\\P")


class Unmet(Zamba2Error):
    """A schema that cannot be obeyed, or no further."""


class Grammars:
    """Compiles schemas for one tokenizer. Raises Zamba2Error without llguidance, or for a tokenizer that cannot be used."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            import llguidance
        except ImportError:
            raise Zamba2Error("JSON replies need llguidance; install with `pip install 'zamba2[serve]'`.") from None
        if not tokenizer.eos_token_ids:
            raise Zamba2Error("JSON replies need a tokenizer with an end token, which this one lacks; leave response_format out.")
        self._library, self._texts = llguidance, tokenizer
        self._limits = llguidance.LLParserLimits(**LIMITS)
        size, ends = max(tokenizer.vocab_size, *(i + 1 for i in tokenizer.eos_token_ids)), list(tokenizer.eos_token_ids)
        text = tokenizer._backend.to_str()
        self._tokenizer = _guarded(lambda: llguidance.LLTokenizer(text, n_vocab=size, eos_token=ends), "this tokenizer cannot write JSON")
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="zamba2 grammar")

    def compile(self, schema: Any = None) -> Callable[[], Constraint]:
        """Something that makes a constraint for each reply. schema: of JSON Schema; None for any JSON object. Raises Unmet."""
        text = check_schema({"type": "object"} if schema is None else schema)
        return self._compiled(lambda: self._library.LLMatcher.grammar_from_json_schema(text, overrides=COMPACT))

    def compile_calls(self, box: Toolbox, form: Any = None) -> Callable[[], Constraint]:
        """The same for replies that may or must call tools, in the form of ``zamba2.serve.tools``. form: a schema for what is no call;
        None for any text. Raises Unmet."""
        if box.choice == "none":
            return self.compile(form) if form is not None else lambda: FreeText(self.marks, None)
        begins, free = box.choice == "required" or form is not None, box.choice == "auto" and form is None
        lark = call_grammar(box, begins=begins, form=None if box.choice == "required" else form)
        call = self._compiled(lambda: str(self._library.LLMatcher.grammar_from_lark(lark)))
        return (lambda: FreeText(self.marks, call)) if free else call

    @cached_property
    def marks(self) -> Marks:
        """What the tokens do to texts."""
        texts, unused = [], []
        for token in range(self._tokenizer.vocab_size):
            piece = self._texts._backend.id_to_token(token)
            if piece is None or piece in self._texts._special:
                texts.append(b"")
            elif self._texts._byte_level or BYTE_PIECE.fullmatch(piece) is None:
                texts.append(self._tokenizer.decode_bytes([token]))
            else:  # its text is certain later, and need not come to this letter
                texts.append(b"\xff")
                unused += [token] if int(piece[3:5], 16) in BEGIN.encode() else []
        return Marks(texts, unused)

    def _compiled(self, make: Callable[[], str]) -> Callable[[], Constraint]:
        work = self._threads.submit(self._matcher, make)
        try:
            matcher = _guarded(lambda: work.result(SECONDS), "the schema cannot be compiled")
        except TimeoutError:
            work.cancel()
            raise Unmet(f"the schema could not be compiled within {SECONDS:.0f} s; a simpler one is needed, or try again later.") from None
        return lambda: Matched(_guarded(matcher.deep_copy, "the schema cannot be followed"))

    def _matcher(self, make: Callable[[], str]) -> Any:
        matcher = self._library.LLMatcher(self._tokenizer, make(), log_level=0, limits=self._limits)
        first = matcher.deep_copy()
        if not matcher.is_error() and not any(first.compute_bitmask()) and not first.is_error():
            raise ValueError("no text satisfies it")
        error = matcher.get_error() or first.get_error()
        if "coerce_one_of" in error:
            raise ValueError("oneOf of schemas that may overlap is not supported; use anyOf")
        if error:
            raise ValueError("no text satisfies it" if error.startswith("NoExtension") else error)
        return matcher


class Matched:
    """A ``Constraint``: where one reply stands in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def mask(self, scores: Scores) -> Scores:
        bits = np.frombuffer(_guarded(self._matcher.compute_bitmask, "the reply cannot go on"), np.uint8)
        allowed = np.unpackbits(bits, count=min(8 * bits.size, scores.size), bitorder="little").astype(bool)
        masked = np.full_like(scores, -np.inf)
        np.copyto(masked[: allowed.size], scores[: allowed.size], where=allowed)
        if self._matcher.is_error() or not allowed.any():
            raise Unmet("the reply cannot go on as the schema wants it: it is too complex, or nothing satisfies it.")
        return masked

    def accept(self, token: int) -> None:
        if self._matcher.is_stopped() and not self._matcher.is_error():
            return
        if not _guarded(lambda: self._matcher.consume_token(token), "the reply cannot go on"):
            error = brief(self._matcher.get_error().partition("<non-verbose/>")[0])
            raise Unmet(f"the reply cannot go on as the schema wants it: {error or 'a token came that is not allowed'}.")


class Marks:
    """What each token does to a text that ends in the first characters of BEGIN. texts: of the tokens; unused: tokens never to take."""

    def __init__(self, texts: Sequence[bytes], unused: Sequence[int]) -> None:
        self.begin, self.texts = BEGIN.encode(), texts
        ending = [token for token, text in enumerate(texts) if self.begin[-1:] in text]
        self._beyond, self._complete = [], []  # by the number of those characters: tokens that go on behind BEGIN, and that end with it
        for there in range(len(self.begin)):
            found = [(token, self.begin[:there] + texts[token]) for token in ending]
            places = [(token, text.find(self.begin) + len(self.begin) - len(text)) for token, text in found if self.begin in text]
            beyond, complete = [token for token, rest in places if rest], [token for token, rest in places if not rest]
            self._beyond.append(np.array([*unused, *beyond], np.int64))
            self._complete.append(np.array([*unused, *beyond, *complete], np.int64))

    def barred(self, there: int, *, calls: bool) -> npt.NDArray[np.int64]:
        """Tokens that must not come. calls: whether BEGIN may be completed."""
        return self._beyond[there] if calls else self._complete[there]

    def after(self, there: int, token: int) -> int:
        """How many characters of BEGIN there are behind one more token."""
        text = self.begin[:there] + (self.texts[token] if token < len(self.texts) else b"")
        return next(n for n in range(len(self.begin), -1, -1) if text.endswith(self.begin[:n]))


class FreeText:
    """A ``Constraint``: any text, and from BEGIN on calls. call: makes what holds from there; None where no call may begin."""

    def __init__(self, marks: Marks, call: Callable[[], Constraint] | None) -> None:
        self._marks, self._call, self._there = marks, call, 0
        self._calling: Constraint | None = None

    def mask(self, scores: Scores) -> Scores:
        if self._calling is not None:
            return self._calling.mask(scores)
        masked: Scores = scores.copy()
        barred = self._marks.barred(self._there, calls=self._call is not None)
        masked[barred[barred < scores.size]] = -np.inf
        return masked

    def accept(self, token: int) -> None:
        if self._calling is not None:
            self._calling.accept(token)
            return
        self._there = self._marks.after(self._there, token)
        if self._there == len(self._marks.begin) and self._call is not None:
            self._calling = self._call()


def _guarded(work: Callable[[], Any], what: str) -> Any:
    """The library's result. Its errors and panics, which are no Exceptions, become Unmet."""
    try:
        return work()
    except (KeyboardInterrupt, SystemExit, TimeoutError, Zamba2Error):
        raise
    except BaseException as error:
        raise Unmet(f"{what}: {brief(' '.join(str(error).split()))}.") from None


# ---- what a schema may be --------------------------------------------------------------------------------------------


def call_grammar(box: Toolbox, *, begins: bool, form: Any = None) -> str:
    """Calls of the tools as a grammar for llguidance, each schema for itself, since references begin at its root. Raises Unmet.

    begins: whether BEGIN is to come first. form: a schema of JSON that may stand in the calls' place.
    """
    tools = box.callable
    parameters = [tool.parameters or NO_ARGUMENTS for tool in tools]
    _measure(parameters)
    schemas = [check_schema(schema, tool.name) for tool, schema in zip(tools, parameters, strict=True)]
    if (count := sum(map(len, schemas))) > MOST_CHARACTERS:
        raise Unmet(f"the schemas of the tools have {count} characters together; at most {MOST_CHARACTERS} are possible.")
    more = f"next{{0,{box.most_calls - 1}}}" if box.most_calls > 1 else ""
    rules = [f"start: {'' if form is None else 'form | '}{json.dumps(BEGIN) if begins else ''} call {more}"]
    rules.append(f"next: {json.dumps(chr(10) + BEGIN)} call")
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
    for i, (tool, schema) in enumerate(zip(tools, schemas, strict=True)):
        rules.append(f"call_{i}: {json.dumps(head(tool.name))} arguments_{i} {json.dumps('}' + END)}")
        rules.append(f"arguments_{i}: {_inline(schema)}")
    return "\n".join([*rules, *([] if form is None else [f"form: {_inline(check_schema(form))}"])])


def _inline(schema: str) -> str:
    return "%json " + json.dumps({"x-guidance": COMPACT} | json.loads(schema))


def check_schema(schema: Any, where: str = "schema") -> str:
    """The schema as JSON text, its patterns as the library reads them rightly. Raises Unmet naming what is wrong, too much, or not
    supported. where: its name in what is said."""
    _measure(schema)
    if not isinstance(schema, dict):
        raise Unmet(f"the schema is {brief(repr(schema))}; an object is needed.")
    try:
        text = json.dumps(schema, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise Unmet(f"the schema is no JSON ({brief(str(error))}).") from None
    if len(text) > MOST_CHARACTERS:
        raise Unmet(f"the schema has {len(text)} characters; at most {MOST_CHARACTERS} are possible.")
    schema = json.loads(text)
    _Checker(schema).check(where)
    return json.dumps(schema)


def _measure(schema: Any) -> None:
    """Without recursion: how many values there are, and how deep."""
    level, count, depth = [schema], 1, 0
    while level:
        below: list[Any] = []
        for value in level:
            if isinstance(value, (dict, list)):
                count += len(value)
                if count > MOST_NODES:
                    raise Unmet(f"the schema holds more than {MOST_NODES} values; a smaller one is needed.")
                below.extend(value.values() if isinstance(value, dict) else value)
                if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
                    raise Unmet("the schema has a key that is no text.")
            elif isinstance(value, int) and abs(value) > LARGEST:
                raise Unmet("the schema holds a whole number beyond 2**53, which JSON does not keep exactly; a smaller one is needed.")
        level, depth = below, depth + 1
        if depth > MOST_NESTING:
            raise Unmet(f"the schema is nested more than {MOST_NESTING} values deep; a flatter one is needed.")


class _Checker:
    """Walks a schema and what its references name."""

    def __init__(self, root: dict[str, Any]) -> None:
        self.root = root
        self.known: dict[int, int] = {}
        self.within: set[int] = set()
        self.inner: deque[tuple[Any, str, int]] = deque()  # schemas of items and properties, which may refer to what they are within
        self.walked: dict[int, tuple[dict[str, Any], str]] = {}

    def check(self, where: str) -> None:
        """Raises Unmet. where: the name of the schema."""
        self.inner.append((self.root, where, 0))
        while self.inner:
            self.choices(*self.inner.popleft())
        needs = {key: self._needs(schema) for key, (schema, _) in self.walked.items()}
        users: dict[int, list[int]] = {key: [] for key in needs}
        for key, ways in needs.items():
            for inner in {inner for choice in ways for way in choice for inner in way}:
                users[inner].append(key)
        ending, looked_at = set[int](), list(needs)
        while looked_at:
            key = looked_at.pop()
            if key not in ending and all(any(ending.issuperset(way) for way in choice) for choice in needs[key]):
                ending.add(key)
                looked_at += users[key]
        if endless := [place for key, (_, place) in self.walked.items() if key not in ending]:
            raise Unmet(f"{endless[0]} has no end: what it requires requires it again; let something of it be left out, or be null.")

    def _needs(self, schema: dict[str, Any]) -> list[list[list[int]]]:
        """What must have finite values so that the schema has one: of each list one list of schemas, by their ids."""

        def ids(schemas: Iterable[Any]) -> list[int]:
            return [id(inner) for inner in schemas if isinstance(inner, dict)]

        kinds, least, first = schema.get("type", TYPES), schema.get("minItems", 0), schema.get("prefixItems", [])
        named, other = schema.get("properties", {}), [] if "patternProperties" in schema else [schema.get("additionalProperties")]
        of_kinds = {
            "object": ids(inner for name in schema.get("required", ()) for inner in ([named[name]] if name in named else other)),
            "array": ids([*first[:least], *([schema.get("items")] if least > len(first) else ())]),
        }
        whole = [*schema.get("allOf", ()), *([self._target(schema["$ref"], "")] if "$ref" in schema else ())]
        choices = [[ids([inner])] for inner in whole]
        choices += [[ids([inner]) for inner in schema[name]] for name in ("anyOf", "oneOf") if name in schema]
        return [*choices, [of_kinds.get(kind, []) for kind in ([kinds] if isinstance(kinds, str) else kinds)]]

    def choices(self, schema: Any, where: str, depth: int) -> int:
        """In how many ways the schema can be met, as far as it is a choice. Raises Unmet."""
        if isinstance(schema, bool):
            return 1
        if not isinstance(schema, dict):
            raise Unmet(f"{where} is {brief(repr(schema))}; a schema is needed, an object or a truth value.")
        key = id(schema)
        if key in self.within:
            raise Unmet(f"{where} refers back to itself with nothing in between; a schema may contain itself in items or properties.")
        if depth > MOST_DEPTH:
            raise Unmet(f"the schema is nested more than {MOST_DEPTH} schemas deep, references included; a flatter one is needed.")
        if key not in self.known:
            self.within.add(key)
            self.walked[key] = schema, where
            counts = [self._keyword(name, value, where, depth) for name, value in schema.items()]
            if "pattern" in schema:
                schema["pattern"] = self._pattern(schema["pattern"], f"{where}.pattern")
            if "patternProperties" in schema:
                named = schema["patternProperties"]
                schema["patternProperties"] = {self._pattern(key, f"{where}.patternProperties"): inner for key, inner in named.items()}
            if schema.get("minProperties", 0) > max(1, len(set(schema.get("required", ())))):  # the library lets a name come again
                raise Unmet(f"{where}.minProperties above 1 is not supported beyond what is required; name the properties in required.")
            low, high = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
            least, most = max(low, schema.get("minimum", low)), min(high, schema.get("maximum", high))
            if 0 < most - least < 1 and any(border % 1 == 0 for border in (low, high)):  # the library lets the border itself through
                raise Unmet(f"{where} has borders less than 1 apart, of which a whole one is excluded; that is not supported.")
            self.within.discard(key)
            self.known[key] = self._product(counts, where)
        return self.known[key]

    def _product(self, counts: list[int], where: str) -> int:
        """Choices where all of several must be met."""
        count, most = math.prod(counts), MOST_PRODUCT if sum(c > 1 for c in counts) > 1 else MOST_CHOICES
        if count > most:
            raise Unmet(f"{where} leaves {brief(str(count))} choices by anyOf, oneOf, allOf and enum; at most {most} are possible.")
        return count

    def _keyword(self, name: str, value: Any, where: str, depth: int) -> int:
        """Checks one keyword; returns the choices it gives."""
        here = f"{where}.{brief(name)}"
        if name not in KNOWN:
            raise Unmet(f"{here} is no keyword that is supported here; leave it out.")
        if name in COUNTS:
            self._need(type(value) is int and value >= 0, here, value, "a whole number from 0")
            self._repeats(value, here)
        elif name in NUMBERS:
            good = type(value) in (int, float) and (LEAST <= abs(value) <= LARGEST or value == 0)
            above = name == "multipleOf"
            self._need(good and (value > 0 or not above), here, value, "a number above 0" if above else "0 or a number of 1e-9 to 2**53")
        elif name in ONE:
            self.inner.append((value, here, depth + 1))
        elif name in NAMED | DEFINED:
            self._need(isinstance(value, dict), here, value, "an object of schemas")
            self.inner.extend((inner, f"{here}.{brief(key)}", depth + 1) for key, inner in value.items())
        elif name in SEVERAL:
            self._need(isinstance(value, list) and len(value) > 0, here, value, "a list of schemas")
            places = [(inner, f"{here}[{i}]", depth + 1) for i, inner in enumerate(value)]
            if name == "prefixItems":
                self.inner.extend(places)
                return 1
            counts = [self.choices(*place) for place in places]
            return self._product(counts, here) if name == "allOf" else sum(counts)
        elif name == "enum":
            self._need(isinstance(value, list) and len(value) > 0, here, value, "a list of values")
            return len(value)
        elif name == "type":
            kinds = value if isinstance(value, list) and value else [value]
            self._need(all(isinstance(kind, str) and kind in TYPES for kind in kinds), here, value, f"one or several of {', '.join(TYPES)}")
        elif name == "required":
            self._need(isinstance(value, list) and all(isinstance(key, str) for key in value), here, value, "a list of names")
        elif name in ("pattern", "format"):
            self._need(isinstance(value, str) and value != "unknown", here, value, f"a {name}")
        elif name == "$ref":
            return self.choices(self._target(value, here), here, depth + 1)
        return 1

    def _need(self, good: bool, where: str, value: Any, needed: str) -> None:
        if not good:
            raise Unmet(f"{where} is {brief(repr(value))}; {needed} is needed.")

    def _repeats(self, count: int, where: str) -> None:
        if count > MOST_REPEATS:
            raise Unmet(f"{where} asks for {count}; at most {MOST_REPEATS} are possible.")

    def _pattern(self, pattern: str, where: str) -> str:
        """The pattern with its classes as the library reads them rightly. Checks its length, and what it comes to with its counted repeats
        written out."""
        if len(pattern) > MOST_PATTERN:
            raise Unmet(f"{where} has {len(pattern)} characters; at most {MOST_PATTERN} are possible.")
        sums, last, parts = [0], 0, []
        for part in PATTERN_PART.finditer(pattern):
            parts.append(self._class(part[0], where) if part[0][0] == "[" and part[0][1:] else part[0])
            if part[0].startswith("\\P"):
                parts[-1] = f"[^\\x01\\p{part[0][2:]}]"
            if part[1] is not None:
                times = max(int(part[1][:9]), int((part[2] or "0")[:9]))
                sums[-1] += last * max(0, times - 1)
                last *= max(1, times)
            elif part[0] == "(":
                sums.append(0)
                last = 0
            elif part[0] == ")" and len(sums) > 1:
                last = sums.pop()
                sums[-1] += last
            else:
                last = 1
                sums[-1] += 1
        self._repeats(sum(sums), where)
        return "".join(parts)

    def _class(self, text: str, where: str) -> str:
        """A class of characters. The library writes one that holds all characters from U+0000 on as if it held the quote and the backslash
        too, so none does: U+0001 is left out of those that name what they do not hold."""
        negated = text.startswith("[^")
        inner = IN_CLASS.sub(lambda found: found[1] or "\\" + found[2], text[2 if negated else 1 : -1])
        if not negated and FROM_NUL.search(inner):
            raise Unmet(f"{where} has the class {brief(text)}; ranges from U+0000 and \\P are not supported inside of one.")
        return ("[^\\x01" if negated else "[") + ("\\" if inner[:1] in ("]", "-") else "") + inner + "]"

    def _target(self, reference: Any, where: str) -> Any:
        good = isinstance(reference, str) and (reference == "#" or reference.startswith("#/"))
        self._need(good, where, reference, "a place in the same schema, # or #/...,")
        found: Any = self.root
        for step in reference.split("/")[1:]:
            name = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isascii() and name.isdigit() and len(name) < 6 and int(name) < len(found):
                found = found[int(name)]
            elif isinstance(found, dict) and name in found:
                found = found[name]
            else:
                raise Unmet(f"{where} refers to {brief(reference)}, which is not there.")
        return found
