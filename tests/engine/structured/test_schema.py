"""Schemas: what passes is enforced whole (random answers of the grammar validate), the rest is refused by name."""

from __future__ import annotations

import json
import random
from functools import cache
from tempfile import mkdtemp
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tiny

from headrace.core.errors import InvalidRequest
from headrace.core.request import Structure
from headrace.engine.structured.grammar import GrammarCompiler, GrammarState
from headrace.engine.structured.schema import _TYPED, parse
from headrace.models.text.detokenizer import REPLACEMENT
from headrace.models.text.tokenizer import Tokenizer

OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "null"}}}

ENFORCED: dict[str, Any] = {
    "anything": True,
    "empty": {},
    "object": {"type": "object"},
    "array": {"type": "array"},
    "integer range": {"type": "integer", "minimum": -3, "maximum": 5},
    "integer multiple": {"type": "integer", "multipleOf": 7, "minimum": 10, "maximum": 90},
    "exclusive": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "implied number": {"minimum": 3},
    "implied string": {"maxLength": 2},
    "implied array": {"items": {"type": "integer"}},
    "string length": {"type": "string", "minLength": 2, "maxLength": 4},
    "pattern": {"type": "string", "pattern": "^[a-c]{2}[^x]?$"},
    "negated quote": {"type": "string", "pattern": '^[^"]{1,3}$'},
    "control range": {"type": "string", "pattern": "^[ -~]{2}$"},
    "format and length": {"type": "string", "format": "date", "maxLength": 3},
    "date": {"type": "string", "format": "date"},
    "items": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    "tuple": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string", "maxLength": 2}], "items": False},
    "old tuple": {"type": "array", "items": [{"type": "integer"}, {"type": "null"}]},
    "required": {**OBJECT, "required": ["b"]},
    "required undeclared": {**OBJECT, "required": ["z"]},
    "required only": {"type": "object", "required": ["z"]},
    "additional": {**OBJECT, "additionalProperties": {"type": "boolean"}},
    "closed": {**OBJECT, "additionalProperties": False},
    "unevaluated": {"type": "object", "unevaluatedProperties": False},
    "names": {"type": "object", "propertyNames": {"pattern": "^a+$"}},
    "name patterns": {"type": "object", "patternProperties": {"^x[0-9]$": {"type": "integer"}}, "additionalProperties": False},
    "counted": {**OBJECT, "minProperties": 1},
    "enum": {"enum": [1, "a", None, {"x": [1]}]},
    "enum of type": {"type": "string", "enum": ["a", 1, "é/\n\""]},
    "const": {"const": {"a": "é\n"}, "type": "object"},
    "several types": {"type": ["integer", "null", "string"], "minimum": 3, "maxLength": 2},
    "anyOf with type": {"type": "object", "anyOf": [{"required": ["p"]}, {"properties": {"q": {"const": 1}}}]},
    "oneOf by type": {"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 3}]},
    "oneOf by tag": {
        "oneOf": [
            {"type": "object", "properties": {"kind": {"const": k}, k: {"type": "null"}}, "required": ["kind"]} for k in "xy"
        ]
    },
    "single allOf": {"allOf": [{"$ref": "#/$defs/n"}], "$defs": {"n": {"type": "integer", "maximum": 9}}, "title": "T"},
    "recursion": {
        "$defs": {"n": {"type": "object", "properties": {"v": {"type": "null"}, "next": {"$ref": "#/$defs/n"}}, "required": ["v"]}},
        "$ref": "#/$defs/n",
    },
    "annotations": {"type": "null", "title": "x", "default": 3, "examples": [1], "x-own": {"any": 1}},
}  # fmt: skip

REFUSED: dict[str, tuple[Any, str]] = {
    "false": (False, "nothing could ever match"),
    "not": ({"not": {"type": "string"}}, '"not"'),
    "uniqueItems": ({"type": "array", "uniqueItems": True}, '"uniqueItems"'),
    "contains": ({"type": "array", "contains": {"const": 1}}, '"contains"'),
    "conditional": ({**OBJECT, "if": {}, "then": {}}, '"if"'),
    "dependent": ({**OBJECT, "dependentRequired": {"a": ["b"]}}, '"dependentRequired"'),
    "number multiple": ({"type": "number", "multipleOf": 0.5}, "integers only"),
    "draft 4": ({"type": "number", "minimum": 1, "exclusiveMinimum": True}, "exclusiveMinimum"),
    "ref sibling": ({"$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n", "maximum": 2}, '"maximum" beside "\\$ref"'),
    "missing ref": ({"$ref": "#/$defs/n"}, "does not exist"),
    "outer ref": ({"$ref": "https://example.org/x"}, "inside the schema"),
    "endless ref": ({"$ref": "#"}, "refers to itself"),
    "two combinators": ({"anyOf": [{}], "oneOf": [{}]}, "combines"),
    "overlap": ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf branches"),
    "allOf": ({"allOf": [OBJECT, {"required": ["a"]}]}, "allOf"),
    "empty enum": ({"enum": []}, "empty enum"),
    "impossible enum": ({"type": "integer", "enum": ["a"]}, "no enum value"),
    "enum and range": ({"enum": [1, 5], "minimum": 3}, '"minimum" beside "enum"'),
    "pattern and length": ({"type": "string", "pattern": "^a*$", "minLength": 2}, "length beside"),
    "look-ahead": ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    "quote": ({"type": "string", "pattern": '^"$'}, "literal quote"),
    "backslash": ({"type": "string", "pattern": r"^\\$"}, "literal quote or backslash"),
    "unknown type": ({"type": "text"}, "known types"),
    "open count": ({"type": "object", "minProperties": 2}, "closed list"),
    "patterns and properties": ({**OBJECT, "patternProperties": {"^x": {}}}, "only one"),
    "unevaluated schema": ({"type": "object", "unevaluatedProperties": {"type": "null"}}, "additionalProperties"),
    "malformed": ({"type": "object", "properties": {"a": {}}, "required": [["a"]]}, "malformed"),
    "forbidden required": ({**OBJECT, "required": ["z"], "additionalProperties": False}, "requires 'z'"),
}  # fmt: skip


@cache
def compiler() -> GrammarCompiler:
    tokenizer = Tokenizer(tiny.tokenizer(mkdtemp(prefix="headrace-")))
    return GrammarCompiler(tokenizer, tiny.VOCAB, (tiny.EOS,))


def answer(schema: Any, rng: random.Random) -> str | None:
    """A random text the grammar allows, None when it grew too long. Leans towards closing what is open."""
    tokenizer = compiler()._tokenizer
    assert isinstance(tokenizer, Tokenizer)
    state = compiler().start(compiler().compile(Structure("json_schema", json.dumps(schema))).result(60))
    ids: list[int] = []
    while len(ids) < 150:
        if state.terminated:
            break
        allowed = allowed_tokens(state)
        closing = [token for token in allowed if set(tokenizer.token_text(token)) & set('"}]')]
        token = rng.choice(closing if closing and rng.random() < 0.5 else allowed)
        if token == tiny.EOS:
            break
        assert state.accept(token)
        ids.append(token)
    else:
        return None
    return tokenizer.decode(ids)


def allowed_tokens(state: GrammarState) -> list[int]:
    words = np.full(-(-tiny.VOCAB // 32), -1, np.int32)
    state.fill(words)
    return [int(t) for t in np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")[: tiny.VOCAB])]


@pytest.mark.parametrize("name", ENFORCED)
def test_random_answers_validate(name: str) -> None:
    draft = jsonschema.Draft7Validator if name == "old tuple" else jsonschema.Draft202012Validator
    rng, ended = random.Random(name), 0
    for _ in range(25):
        text = answer(ENFORCED[name], rng)
        if text is not None and REPLACEMENT not in text:  # random bytes may spell surrogates, which no model writes
            draft(ENFORCED[name]).validate(json.loads(text))
            ended += 1
    assert ended >= 5


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_is_refused_by_name(name: str) -> None:
    schema, message = REFUSED[name]
    with pytest.raises(InvalidRequest, match=message) as caught:
        parse(json.dumps(schema), "response_format")
    assert caught.value.field == "response_format"
    assert caught.value.message.startswith("response_format: ")


def test_the_place_is_named() -> None:
    schema = {"type": "object", "properties": {"list": {"type": "array", "items": {"not": {}}}}}
    with pytest.raises(InvalidRequest, match="#/properties/list/items"):
        parse(json.dumps(schema), "response_format")


@pytest.mark.parametrize(
    ("spec", "message"), [('{"type":', "not JSON"), ("[1]", "is list"), ('"x"', "is str"), ("NaN", "NaN")]
)
def test_not_a_schema(spec: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse(spec, "response_format")


def test_nesting_is_bounded() -> None:
    for depth in (100, 100_000):
        with pytest.raises(InvalidRequest, match=r"nested|not JSON"):
            parse('{"items":' * depth + "{}" + "}" * depth, "response_format")


WORDS = [word for words in _TYPED.values() for word in words]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.sampled_from(["a", "object", "string", "^a$", "#", "#/$defs/a", "date"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*WORDS, "type", "enum", "const", "anyOf", "oneOf", "$ref", "$defs", "a"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=300)
@given(JSON)
def test_any_json_either_compiles_or_is_the_clients_mistake(schema: Any) -> None:
    future = compiler().compile(Structure("json_schema", json.dumps(schema)))
    error = future.exception(60)
    assert error is None or isinstance(error, InvalidRequest), error


def test_the_battery_would_notice_an_ignored_constraint() -> None:
    """Negative control: without the refusal, answers break the schema."""
    rng = random.Random(0)
    texts = [answer({"type": "array", "items": {"enum": [0, 1]}, "minItems": 3, "maxItems": 4}, rng) for _ in range(5)]
    answers = [json.loads(text) for text in texts if text is not None]
    unique = jsonschema.Draft202012Validator({"type": "array", "uniqueItems": True})
    assert any(not unique.is_valid(made) for made in answers)
