"""JSON of a given schema: what a reply may be, whatever the model says, and which schemas are refused."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import zamba2
from zamba2.errors import Zamba2Error
from zamba2.language.generate import Constraint, Generation, Request, collect
from zamba2.language.model import LanguageModel
from zamba2.serve.grammar import Grammars, check_schema
from zamba2.serve.tools import Tool, Toolbox

pytest.importorskip("llguidance", reason="schemas need the extra [serve]")

from pydantic import BaseModel

MOST_TOKENS = 400
WORD = {"type": "string", "maxLength": 8}
COLOR = {"enum": ["red", "green", "blue"]}


def record(required: bool = True, **properties: Any) -> dict[str, Any]:
    found = {"type": "object", "properties": properties, "additionalProperties": False}
    return found | ({"required": list(properties)} if required else {})


def array(items: Any, most: int, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "maxItems": most, "minItems": least}


POINT = record(x={"type": "integer", "minimum": -9, "maximum": 9}, y={"type": "integer", "minimum": 0, "maximum": 1000})
SCHEMAS: dict[str, dict[str, Any]] = {
    "null": {"type": "null"},
    "truth": {"type": "boolean"},
    "constant": {"const": {"a": [1, None, "é"]}},
    "words": COLOR,
    "mixed values": {"enum": [1, "one", None, True, [1], {"a": 2.5}]},
    "long words": {"enum": [f"value number {i}" for i in range(200)]},
    "whole number": {"type": "integer", "minimum": 0, "maximum": 99},
    "open borders": {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 3},
    "multiples": {"type": "integer", "minimum": 0, "maximum": 1000, "multipleOf": 7},
    "fraction": {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "multipleOf": 0.25},
    "text": {"type": "string", "maxLength": 20},
    "text of at least": {"type": "string", "minLength": 5, "maxLength": 9},
    "no text": {"type": "string", "maxLength": 0},
    "date": {"type": "string", "format": "date"},
    "identity": {"type": "string", "format": "uuid"},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    "pattern of choices": {"type": "string", "pattern": "^(cat|dog|bird)( (and|or) (cat|dog)){0,3}$"},
    "pattern and length": {"type": "string", "pattern": "^[a-f]+$", "maxLength": 6},
    "text or null": {"type": ["string", "null"], "maxLength": 5},
    "any of": {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 5}, WORD, {"type": "null"}]},
    "one of": {"oneOf": [{"type": "boolean"}, {"type": "string", "maxLength": 3}]},
    "all of": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 12}]},
    "list": array({"type": "boolean"}, 4),
    "list of at least": array(COLOR, 5, 2),
    "list of lists": array(array({"type": "integer", "minimum": 0, "maximum": 9}, 3), 3),
    "tuple": {"type": "array", "prefixItems": [COLOR, {"type": "boolean"}, WORD], "items": False, "minItems": 3},
    "empty record": record(),
    "record": POINT,
    "optional": record(False, a={"type": "boolean"}, b=COLOR, c={"type": "null"}),
    "name with signs": record(**{'a "quoted"\n☃': {"type": "boolean"}}),
    "records in a record": record(a=POINT, b=record(c=POINT, d=record(e=WORD))),
    "list of records": array(record(name=WORD, color=COLOR), 4, 1),
    "any of records": {"anyOf": [record(kind={"const": "point"}, at=POINT), record(kind={"const": "word"}, word=WORD)]},
    "references": {"$defs": {"p": POINT}, **record(a={"$ref": "#/$defs/p"}, b=array({"$ref": "#/$defs/p"}, 2))},
    "a list by links": {"$defs": {"n": record(v=COLOR, next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/n"}]})}, "$ref": "#/$defs/n"},
    "a tree": record(name=WORD, below=array({"$ref": "#"}, 1)),
    "by turns": {
        "$defs": {"a": record(False, b={"$ref": "#/$defs/b"}), "b": {"anyOf": [COLOR, array({"$ref": "#/$defs/a"}, 2)]}},
        **record(at={"$ref": "#/$defs/a"}),
    },
    "other names": {"type": "object", "properties": {}, "patternProperties": {"^[ab]{1,2}$": COLOR}, "additionalProperties": False,
                    "maxProperties": 2},
    "deep": record(a=record(b=record(c=record(d=record(e=record(f=array({"anyOf": [COLOR, {"type": "null"}]}, 3, 3))))))),
    "many names": record(False, **{f"name {i}": {"type": "boolean"} for i in range(600)}),
    "all together": record(
        id={"type": "string", "pattern": "^[0-9a-f]{8}$"}, tags=array(COLOR, 3), at={"anyOf": [POINT, {"type": "null"}]},
        name=WORD, count={"type": "integer", "minimum": 1, "maximum": 50}, good={"type": "boolean"},
    ),
}  # fmt: skip

IS = {
    "string": lambda v: isinstance(v, str), "integer": lambda v: type(v) is int, "number": lambda v: type(v) in (int, float),
    "boolean": lambda v: isinstance(v, bool), "null": lambda v: v is None, "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
}  # fmt: skip
FORMATS = {"date": r"\d{4}-\d{2}-\d{2}", "uuid": r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"}


def equal(a: Any, b: Any) -> bool:
    """As JSON Schema has it: 1 is 1.0 and is not true."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return bool(a == b)


def valid(value: Any, schema: Any, root: Any) -> bool:
    """Whether a value satisfies a schema of the keywords above, by their definitions."""
    if isinstance(schema, bool):
        return schema
    text, number = isinstance(value, str), type(value) in (int, float)
    items, keys = isinstance(value, list), isinstance(value, dict)
    named, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    head = schema.get("prefixItems", [])
    kinds = schema.get("type", list(IS))

    def same(other: Any) -> bool:
        return equal(value, other)

    def counted(what: str) -> bool:
        return schema.get(f"min{what}", 0) <= len(value) <= schema.get(f"max{what}", 1e9)

    def member(key: str) -> bool:
        own = [named[key]] if key in named else []
        own += [inner for pattern, inner in patterns.items() if re.search(pattern, key)]
        return all(valid(value[key], inner, root) for inner in own or [schema.get("additionalProperties", True)])

    checks: dict[str, Callable[[Any], bool]] = {
        "type": lambda _: any(IS[kind](value) for kind in ([kinds] if isinstance(kinds, str) else kinds)),
        "const": same, "enum": lambda found: any(same(other) for other in found),
        "minimum": lambda n: not number or value >= n, "maximum": lambda n: not number or value <= n,
        "exclusiveMinimum": lambda n: not number or value > n, "exclusiveMaximum": lambda n: not number or value < n,
        "multipleOf": lambda n: not number or value % n == 0,
        "pattern": lambda p: not text or re.search(p, value) is not None,
        "format": lambda f: not text or re.fullmatch(FORMATS[f], value) is not None,
        "anyOf": lambda found: any(valid(value, inner, root) for inner in found),
        "oneOf": lambda found: sum(valid(value, inner, root) for inner in found) == 1,
        "allOf": lambda found: all(valid(value, inner, root) for inner in found),
        "required": lambda names: not keys or set(names) <= set(value),
        "$ref": lambda path: valid(value, reduce(lambda found, step: found[step], path.split("/")[1:], root), root),
    }  # fmt: skip
    return (
        all(checks[name](found) for name, found in schema.items() if name in checks)
        and (not text or counted("Length"))
        and (not items or (counted("Items") and all(valid(v, s, root) for v, s in zip(value, head, strict=False))))
        and (not items or all(valid(v, schema.get("items", True), root) for v in value[len(head) :]))
        and (not keys or (counted("Properties") and all(member(key) for key in value)))
    )


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return zamba2.load("random", threads=1)


@pytest.fixture(scope="module")
def grammars(model: LanguageModel) -> Grammars:
    return Grammars(model.tokenizer)


def asked(model: LanguageModel, constraint: Constraint | None, **options: Any) -> Request:
    return model.request("Write JSON.", **{"max_tokens": MOST_TOKENS, "constraint": constraint, **options})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replies_satisfy_their_schemas(model: LanguageModel, grammars: Grammars, temperature: float) -> None:
    """Of random weights every reply that ends is JSON that satisfies its schema, and 95 % end, side by side, greedy and sampled."""
    requests = [asked(model, grammars.compile(s)(), temperature=temperature, seed=i) for i, s in enumerate(SCHEMAS.values())]
    ended = 0
    for (name, schema), reply in zip(SCHEMAS.items(), collect(model.backend, requests, model.tokenizer), strict=True):
        if reply.finish_reason == "stop":
            ended += 1
            assert valid(json.loads(reply.text), schema, schema), (name, reply.text)
    assert len(SCHEMAS) >= 30 and ended >= 0.95 * len(SCHEMAS)


def test_the_check_itself() -> None:
    """The check of replies refuses what the schemas refuse."""
    for name, value in {
        "null": 0, "words": "pink", "whole number": 100, "open borders": 3, "multiples": 8, "text": "x" * 21, "text of at least": "four",
        "pattern": "AB-123", "any of": 6, "one of": "four", "all of": 2, "list": [1], "list of at least": ["red"], "record": {"x": 1},
        "tuple": ["red", True, "a", 1], "optional": {"d": 1}, "references": {"a": {"x": 10, "y": 0}, "b": []}, "other names": {"c": "red"},
    }.items():  # fmt: skip
        assert not valid(value, SCHEMAS[name], SCHEMAS[name]), name


def said(reply: Generation) -> tuple[list[int], Any]:
    return reply.tokens, reply.logprobs


def test_company_changes_nothing(model: LanguageModel, grammars: Grammars) -> None:
    """A constrained reply has the same tokens alone and beside others, and one without a constraint is as if there were none."""
    names = ("all together", "list of records", "text")

    def requests() -> list[Request]:
        held = [asked(model, grammars.compile(SCHEMAS[n])(), temperature=1.0, seed=3, logprobs=1) for n in names]
        return [*held, asked(model, None, temperature=1.0, seed=3, logprobs=1, max_tokens=30)]

    together = collect(model.backend, requests(), model.tokenizer)
    alone = [collect(model.backend, [request], model.tokenizer)[0] for request in requests()]
    plain = model.generate("Write JSON.", temperature=1.0, seed=3, logprobs=1, max_tokens=30)
    assert [said(reply) for reply in together] == [said(reply) for reply in alone] and said(together[-1]) == said(plain)


def test_logprobs_are_the_models_own(model: LanguageModel, grammars: Grammars) -> None:
    """Log-probabilities are those of the model without the constraint: the first token's likeliest alternatives are the same."""
    held = collect(model.backend, [asked(model, grammars.compile(POINT)(), logprobs=5)], model.tokenizer)[0]
    plain = model.generate("Write JSON.", logprobs=5, max_tokens=1)
    assert held.logprobs is not None and plain.logprobs is not None
    assert held.logprobs[0].top == plain.logprobs[0].top and held.text.startswith('{"x":')


def test_masks(model: LanguageModel, grammars: Grammars) -> None:
    """A mask keeps the scores of what is allowed and is never empty, behind the end too; a token that is not allowed is an error."""
    make, end = grammars.compile({"const": True}), model.tokenizer.eos_token_ids[0]
    scores = np.arange(model.backend.config.vocab_size + 9, dtype=np.float32)
    constraint = make()
    for _ in range(12):
        masked = constraint.mask(scores)
        kept = np.flatnonzero(masked > -np.inf)
        assert masked.dtype == np.float32 and kept.size and (masked[kept] == scores[kept]).all()
        constraint.accept(int(kept[0]))
    assert kept.tolist() == [end]
    with pytest.raises(Zamba2Error, match="cannot go on as the schema wants it"):
        make().accept(end)


def takes(grammars: Grammars, make: Any, text: str) -> bool:
    """Whether a reply may be this text and end there."""
    tokens = list(grammars._tokenizer.tokenize_bytes(text.encode()))
    return bool(make()._matcher.validate_tokens([*tokens, grammars._texts.eos_token_ids[0]]) == len(tokens) + 1)


PATTERNS = [
    '^[^"]$', r'^[^\\"]$', r'^[^\\/:*?"<>|]$', r"^[^[\]]$", '^[^&&"]$', '^[^-"]$', '^[^"-]$', r"^\S$", r'^[^\w"]$', "^[a&&b]$", "^[^[]$",
    "^[ -!#-~]$", r"^[\t -/]$", "^.$", "^(a|[^b])$",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of Python, whose classes may change one day
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_are_obeyed(grammars: Grammars, pattern: str) -> None:
    """Of all characters of ASCII a pattern lets exactly those through that it says, in values and names; control ones may be lost."""
    value = grammars.compile({"type": "string", "pattern": pattern})
    name = grammars.compile({"type": "object", "patternProperties": {pattern: {"const": 1}}, "additionalProperties": False})
    for character in map(chr, range(128)):
        wanted = re.search(pattern, character) is not None
        written = json.dumps(character, ensure_ascii=False)
        for make, text in ((value, written), (name, f"{{{written}:1}}")):
            found = takes(grammars, make, text)
            assert found == wanted or (wanted and not found and (character < " " or character == "\x7f")), (pattern, character)


@pytest.mark.parametrize("pattern", ["[\\x00-!]", "[\0-a]", r"[\u0000-\u0021]", r"[\P{L}a]"])
def test_patterns_that_would_not_be_obeyed(grammars: Grammars, pattern: str) -> None:
    """A class that the library would widen is refused."""
    with pytest.raises(Zamba2Error, match="are not supported inside of one"):
        grammars.compile({"type": "string", "pattern": pattern})


def test_a_name_has_one_spelling(grammars: Grammars) -> None:
    """A declared name cannot come a second time with its letters escaped; other escapes can."""
    make = grammars.compile({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]})
    assert takes(grammars, make, '{"a":"x\\n"}') and takes(grammars, make, '{"a":"x","b":1}')
    assert not takes(grammars, make, '{"a":"x","\\u0061":1}')


class Node(BaseModel):
    """A tree as applications declare it."""

    model_config = {"extra": "forbid"}
    kind: Literal["leaf", "branch"]
    weight: int | None = None
    below: list[Node] = []
    other: Node | None = None


def node(**optional: Any) -> st.SearchStrategy[Any]:
    drawn = st.fixed_dictionaries({"kind": st.sampled_from(["leaf", "branch"])}, optional=optional)
    return drawn.map(lambda found: {name: found[name] for name in Node.model_fields if name in found})


NODES = st.recursive(
    node(weight=st.sampled_from([0, 7, None, "x"])), lambda inner: node(below=st.lists(inner, max_size=3), other=st.none() | inner),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=100)
@given(value=NODES)
def test_trees_are_obeyed(grammars: Grammars, value: Any) -> None:
    """Of a class that contains itself exactly those values come through that it takes, however deep."""
    schema = Node.model_json_schema()
    wanted = valid(value, schema, schema)
    for _ in range(3):
        assert takes(grammars, grammars.compile(schema), json.dumps(value, separators=(",", ":"))) == wanted
        value = {"kind": "branch", "below": [{"kind": "leaf"}, value]}


def test_long_texts_are_followed_to_their_end(grammars: Grammars) -> None:
    """A text of the length that a schema allows is a reply."""
    make = grammars.compile({"type": "string", "maxLength": 9990})
    constraint, scores = make(), np.zeros(grammars._tokenizer.vocab_size, np.float32)
    for token in grammars._tokenizer.tokenize_bytes(json.dumps("ab" * 4995).encode()):
        constraint.accept(token)
    assert constraint.mask(scores).max() == 0


# ---- refusals --------------------------------------------------------------------------------------------------------


def nested(depth: int) -> Any:
    found: Any = {"type": "null"}
    for _ in range(depth):
        found = {"type": "array", "items": found}
    return found


DOUBLED = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"$ref": f"#/$defs/d{i + 1}"}]} for i in range(14)}
HOSTILE: dict[str, tuple[Any, str]] = {
    "many choices": (record(**{f"p{i}": {"anyOf": [{"const": j} for j in range(50)]} for i in range(300)}), "more than 2000 values"),
    "choices multiplied": ({"allOf": [{"enum": list(range(20))}] * 2}, "leaves 400 choices by anyOf, oneOf, allOf and enum"),
    "choices doubled": ({"$defs": DOUBLED | {"d14": WORD}, "$ref": "#/$defs/d0"}, "choices by anyOf"),
    "a choice of records": ({"allOf": [record(a={"anyOf": [record(**{f"b{j}{i}": {}}) for i in range(12)]}) for j in range(6)]}, "schema"),
    "long": ({"type": "string", "minLength": 10**7}, "minLength asks for 10000000; at most 10000"),
    "many": ({"type": "array", "maxItems": 10**7}, "maxItems asks for 10000000"),
    "a huge number": ({"minLength": 10**4000}, "beyond 2\\*\\*53"),
    "a huge negative number": ({"const": -(1 << 54)}, "beyond 2\\*\\*53"),
    "repeats at most": ({"pattern": "a{1,1000000}"}, "pattern asks for 1000000"),
    "repeats": ({"pattern": "a{1000000}"}, "pattern asks for 1000000"),
    "repeats of repeats": ({"pattern": "((a{100}){100}){100}"}, "pattern asks for 1000000"),
    "deep": (nested(10000), "nested more than 96 values deep"),
    "rather deep": (nested(40), "nested more than 32 schemas deep"),
    "a deep pattern": ({"pattern": "(" * 450 + "a" + ")" * 450}, "cannot be compiled"),
    "a long pattern": ({"pattern": "a" * 1001}, "has 1001 characters"),
    "a broken pattern": ({"pattern": "("}, "unclosed group"),
    "a megabyte": ({"description": "x" * 10**6}, "characters; at most 65536"),
    "a megabyte of values": ({"enum": list(range(10**5))}, "more than 2000 values"),
    "itself": ({"$ref": "#"}, "schema.\\$ref refers back to itself with nothing in between"),
    "within itself": (record(a={"$ref": "#/properties/a"}), "refers back to itself"),
    "a choice of itself": ({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, COLOR]}}, "$ref": "#/$defs/a"}, "refers back to itself"),
    "a choice behind a record": (
        {"$defs": {"x": {"anyOf": [{"$ref": "#"}, COLOR]}}, "properties": {"a": {"$ref": "#/$defs/x"}}, "anyOf": [{"$ref": "#/$defs/x"}]},
        "refers back to itself",
    ),
    "without end": (record(a={"$ref": "#"}), "^schema has no end"),
    "without end by turns": (
        record(False, a={"anyOf": [{"$ref": "#/properties/b"}]}, b=array({"$ref": "#/properties/a"}, 3, 1)), "a has no end",
    ),
    "without end by one of": (record(a={"oneOf": [{"$ref": "#"}]}), "has no end"),
    "trees met at once": (
        {"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "$defs": {n: record(c=array({"$ref": f"#/$defs/{n}"}, 2)) for n in "ab"}},
        "cannot be compiled",
    ),
    "elsewhere": ({"$ref": "https://example.com/a"}, "a place in the same schema"),
    "nowhere": ({"$ref": "#/$defs/x"}, "which is not there"),
    "behind a list": ({"anyOf": [WORD], "$ref": "#/anyOf/1"}, "which is not there"),
    "no object": ([1], "an object is needed"),
    "a text": ("x", "an object is needed"),
    "properties that are none": ({"properties": [1]}, "an object of schemas is needed"),
    "a type that is none": ({"type": "text"}, "one or several of string"),
    "a choice that is none": ({"anyOf": {}}, "a list of schemas is needed"),
    "no choice": ({"enum": []}, "a list of values is needed"),
    "a length that is none": ({"maxLength": "9"}, "a whole number from 0 is needed"),
    "a border that is none": ({"minimum": True}, "is needed"),
    "a factor that is none": ({"multipleOf": 0}, "a number above 0 is needed"),
    "no number": ({"enum": [float("nan")]}, "no JSON"),
    "half a pair": ({"const": "\ud800"}, "cannot be compiled"),
    "an unknown word": ({"uniqueItems": True}, "uniqueItems is no keyword that is supported here"),
    "the library's options": ({"x-guidance": {"lenient": True}}, "is no keyword"),
    "an unknown format": ({"type": "string", "format": "regex"}, "Unknown format"),
    "what may overlap": ({"oneOf": [WORD, {"type": "string"}]}, "use anyOf"),
    "the impossible": ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum .3. is greater"),
    "the impossible inside": (record(a=False), "unsatisfiable"),
    "names that may come twice": ({"type": "object", "minProperties": 2}, "name the properties in required"),
    "a name required twice": ({"type": "object", "minProperties": 2, "required": ["a", "a"]}, "name the properties in required"),
    "a whole border close by": ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "borders less than 1 apart"),
    "a whole border close above": ({"type": "number", "minimum": 0.5, "exclusiveMaximum": 1}, "borders less than 1 apart"),
    "the closer of borders": ({"type": "number", "minimum": 0.5, "exclusiveMaximum": 1, "maximum": 5}, "borders less than 1 apart"),
    "a large factor": ({"type": "integer", "multipleOf": 1000000007}, "cannot be compiled"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas(grammars: Grammars, name: str) -> None:
    """A schema that is too large, impossible or not supported is one sentence within 1.5 s."""
    schema, sentence = HOSTILE[name]
    begun = time.monotonic()
    with pytest.raises(Zamba2Error, match=sentence) as caught:
        grammars.compile(schema)
    assert time.monotonic() - begun < 1.5 and len(str(caught.value)) < 700 and "\n" not in str(caught.value)


def test_slow_and_panicking_compilers(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that takes too long, or panics, is an error of the request's, and what nobody waits for any more is not begun; the next
    schema is compiled."""

    class Panic(BaseException):
        pass

    grammars, go, real = Grammars(model.tokenizer), threading.Event(), Grammars._matcher
    monkeypatch.setattr("zamba2.serve.grammar.SECONDS", 0.05)
    begun: list[object] = []
    monkeypatch.setattr(Grammars, "_matcher", lambda self, text: (begun.append(text), go.wait(20)))
    for _ in range(3):
        with pytest.raises(Zamba2Error, match="could not be compiled within"):
            grammars.compile(WORD)
    go.set()
    monkeypatch.setattr("zamba2.serve.grammar.SECONDS", 5.0)
    monkeypatch.setattr(Grammars, "_matcher", lambda self, text: (_ for _ in ()).throw(Panic("at\nthe disco")))
    with pytest.raises(Zamba2Error, match="cannot be compiled: at the disco"):
        grammars.compile(WORD)
    monkeypatch.setattr(Grammars, "_matcher", real)
    grammars.compile(WORD)()
    assert len(begun) == 2  # by its two threads


def test_what_is_said_of_a_schema() -> None:
    """A good schema is passed on as it is, also one that may but need not contain itself, is rather deep, or wants one property of any
    name; a reference may name what holds its signs."""
    itself: dict[str, Any] = {"$ref": "#"}
    fine = [
        {"type": "array", "prefixItems": [itself]}, {"type": "object", "minProperties": 1},
        {"type": "object", "patternProperties": {"^a": {}}, "additionalProperties": itself, "required": ["a"]},
        {"$defs": {"~1": WORD}, "$ref": "#/$defs/~01"}, {"$defs": {"/": WORD}, "$ref": "#/$defs/~1"},
        reduce(lambda inner, _: {"type": "object", "properties": {"a": inner}}, range(30), WORD),
    ]  # fmt: skip
    for schema in (*SCHEMAS.values(), *fine):
        assert json.loads(check_schema(schema)) == schema


def test_without_llguidance(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package that is a sentence naming what to install."""
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(Zamba2Error, match=r"install with `pip install 'zamba2\[serve\]'`"):
        Grammars(model.tokenizer)


# ---- through the API -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def http() -> Iterator[Any]:
    from fastapi.testclient import TestClient

    from zamba2.serve.app import Settings, create_app
    from zamba2.serve.scheduler import Scheduler

    demo = zamba2.load("demo", threads=1)
    scheduler = Scheduler(demo.backend, demo.tokenizer)
    with TestClient(create_app(demo, scheduler, None, Settings(model_name="demo", log=False))) as client:
        yield client
    scheduler.close()


ASK_JSON = [{"role": "user", "content": "Give me a JSON object that holds the job pilot, number 31 and colour green."}]


def chat(http: Any, form: Any, **options: Any) -> Any:
    messages = [{"role": "user", "content": "Tell me about a cat."}]
    return http.post("/v1/chat/completions", json={"messages": messages, "response_format": form, "seed": 1, "max_tokens": 300, **options})


def test_formats_by_http(http: Any) -> None:
    """A reply in a schema's format satisfies it, each of several its own; any JSON object that ends parses; text is as without."""
    schema = record(name=WORD, color=COLOR, age={"type": "integer", "minimum": 0, "maximum": 30})
    form = {"type": "json_schema", "json_schema": {"name": "cat", "schema": schema, "strict": True}}
    choices = chat(http, form, n=3).json()["choices"]
    texts = [choice["message"]["content"] for choice in choices]
    assert all(valid(json.loads(text), schema, schema) for text in texts) and len(set(texts)) > 1
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    free = chat(http, {"type": "json_object"}, n=8, messages=ASK_JSON).json()["choices"]
    ended = [choice["message"]["content"] for choice in free if choice["finish_reason"] == "stop"]
    assert ended and all(isinstance(json.loads(text), dict) for text in ended)
    plain, text = (chat(http, form, temperature=0, max_tokens=20).json()["choices"] for form in (None, {"type": "text"}))
    assert plain == text


def test_bad_formats_by_http(http: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A format that cannot be obeyed is 400 with a sentence."""
    good = {"type": "json_schema", "json_schema": {"name": "a", "schema": WORD}}
    for form, options, sentence in (
        ({"type": "xml"}, {}, "response_format.type is 'xml'"),
        ({"type": "json_schema"}, {}, "json_schema is needed with type json_schema"),
        ({"type": "text", "json_schema": good["json_schema"]}, {}, "and with no other"),
        ({"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}, {}, "json_schema.name is 'a b'"),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": [1]}}, {}, "json_schema.schema is"),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}, {}, "not is no keyword"),
        (good, {"ignore_eos": True}, "leave one of them out"),
    ):  # fmt: skip
        response = chat(http, form, **options)
        assert response.status_code == 400 and sentence in response.json()["error"]["message"], response.text


def test_by_http_without_llguidance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package a format is 400 with a sentence naming what to install."""
    from zamba2.serve import app, protocol

    monkeypatch.setitem(sys.modules, "llguidance", None)
    server = app.Server(zamba2.load("demo", threads=1), None, None, app.Settings())
    for box, field in ((None, "response_format"), (Toolbox((Tool("f"),)), "tools and response_format")):
        with pytest.raises(protocol.Problem, match=rf"^{field}: .*pip install 'zamba2\[serve\]'") as caught:
            server.constraint(protocol.ResponseFormat(type="json_object").form, box, "response_format")
        assert (caught.value.status, caught.value.param) == (400, field.split()[0])
