"""What can be followed and what is refused: keywords, formats, sizes, what would end a stack."""

from __future__ import annotations

import json
from typing import Any

import pytest

from quantd.daemon.grammar import MAX_BYTES, SeenGrammars, on_deep_stack, problem
from quantd.daemon.types import Grammar

OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}}

FOLLOWED: dict[str, Any] = {
    "$ref": {"$ref": "#/$defs/q", "$defs": {"q": {"type": "integer"}}},
    "definitions": {"$ref": "#/definitions/q", "definitions": {"q": {"type": "integer"}}},
    "type": {"type": ["integer", "null"]},
    "enum": {"enum": [1, "a", None]},
    "const": {"const": {"a": [1]}},
    "multipleOf": {"type": "integer", "multipleOf": 3},
    "maximum": {"type": "integer", "minimum": 1, "maximum": 5},
    "exclusiveMaximum": {"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 5},
    "minLength": {"type": "string", "minLength": 2, "maxLength": 3},
    "pattern": {"type": "string", "pattern": "^a+$"},
    "items": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2},
    "prefixItems": {"prefixItems": [{"type": "integer"}], "items": False},
    "properties": {**OBJECT, "required": ["a"], "additionalProperties": False},
    "patternProperties": {"patternProperties": {"^a": {"type": "integer"}}},
    "minProperties": {"type": "object", "minProperties": 1, "maxProperties": 2},
    "allOf": {"allOf": [{"type": "integer"}, {"minimum": 3}]},
    "anyOf": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
    "oneOf": {"oneOf": [{"type": "integer"}, {"type": "string"}]},
    "without meaning": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://example.org/s",
        "$anchor": "a",
        "$comment": "c",
        "title": "t",
        "description": "d",
        "default": 1,
        "examples": [1],
        "deprecated": True,
        "readOnly": True,
        "writeOnly": True,
        "contentEncoding": "base64",
        "contentMediaType": "text/plain",
        "contentSchema": {},
        "x-anything": 1,
    },
}

REFUSED: dict[str, Any] = {
    "$dynamicRef": {"$dynamicRef": "#a"},
    "$dynamicAnchor": {"$dynamicAnchor": "a"},
    "$recursiveRef": {"$recursiveRef": "#"},
    "contains": {"contains": {"type": "integer"}},
    "minContains": {"minContains": 1},
    "maxContains": {"maxContains": 1},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "unevaluatedItems": {"unevaluatedItems": False},
    "unevaluatedProperties": {"unevaluatedProperties": False},
    "propertyNames": {"propertyNames": {"pattern": "^a"}},
    "dependentRequired": {"dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {"dependentSchemas": {"a": {"required": ["b"]}}},
    "dependencies": {"dependencies": {"a": ["b"]}},
    "not": {"not": {"type": "integer"}},
    "if": {"if": {"type": "integer"}},
    "then": {"then": {"type": "integer"}},
    "else": {"else": {"type": "integer"}},
}
FORMATS = "date date-time duration email hostname ipv4 ipv6 time uri uuid".split()
OTHER_FORMATS = (
    "idn-email idn-hostname iri iri-reference json-pointer regex relative-json-pointer "
    "uri-reference uri-template int32 made-up"
).split()


def of(schema: object) -> Grammar:
    return Grammar("json_schema", json.dumps(schema))


@pytest.mark.parametrize("keyword", FOLLOWED)
def test_keywords_that_are_followed(keyword: str) -> None:
    assert problem(of(FOLLOWED[keyword])) is None


@pytest.mark.parametrize("keyword", REFUSED)
def test_a_keyword_that_is_not_followed_is_named_and_never_passed_over(keyword: str) -> None:
    schema = REFUSED[keyword]
    for place in (
        schema,
        {"type": "object", "properties": {"p": schema}},
        {"type": "array", "items": schema},
        {"anyOf": [{"type": "null"}, schema]},
        {"$ref": "#/$defs/d", "$defs": {"d": schema}},
        {**schema, "x-guidance": {"lenient": True}},
    ):
        assert f'"{keyword}"' in (problem(of(place)) or ""), place


@pytest.mark.parametrize("name", FORMATS)
def test_formats_that_are_followed(name: str) -> None:
    assert problem(of({"type": "string", "format": name})) is None


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_formats_that_are_not(name: str) -> None:
    assert name in (problem(of({"type": "string", "format": name})) or "")


@pytest.mark.parametrize(
    ("grammar", "word"),
    [
        (Grammar("json_schema", "{"), "EOF while parsing"),
        (of({"type": "strin"}), "strin"),
        (of({"type": "object", "required": ["b"], "additionalProperties": False}), "'b'"),
        (of({"type": "integer", "minimum": 3, "maximum": 1}), "minimum"),
        (of({"$ref": "https://example.org/s"}), "https://example.org/s"),
        (of({"$ref": "#/$defs/gone"}), "gone"),
        (of({"type": "string", "pattern": "a("}), "regex"),
        (of({"type": "string", "pattern": "a(?=b)"}), "regex"),
        (of({"oneOf": [{"minimum": 1}, {"maximum": 5}]}), "oneOf"),
        (Grammar("regex", "a("), "regex"),
        (Grammar("regex", r"(a)\1"), "regex"),
        (Grammar("lark", "start: nothing"), "nothing"),
        (Grammar("lark", '{"grammars": []}'), "JSON"),
        (Grammar("lark", 'start: %json {"not": {}, "x-guidance": {"lenient": true}}'), "not"),
        (Grammar("lark", 'start: "a"' + "\n" * 400), "401 lines; the limit is 400"),
        (Grammar("gbnf", "root ::= ("), "GBNF"),
        (Grammar("gbnf", "root ::= " + "(" * 2000), "GBNF"),
    ],
)
def test_what_is_wrong_is_said(grammar: Grammar, word: str) -> None:
    assert word in (problem(grammar) or "")


def test_special_tokens_are_left_to_the_worker() -> None:
    assert problem(Grammar("lark", 'start: "a" <tool>')) is None


@pytest.mark.parametrize("kind", MAX_BYTES)
def test_the_number_of_bytes_is_bounded(kind: Any) -> None:
    most = MAX_BYTES[kind]
    assert f"{most + 2} bytes; the limit is {most}" in (
        problem(Grammar(kind, "é" * (most // 2 + 1))) or ""
    )


def _chain(levels: int) -> str:
    """Objects that each hold the next, by reference."""
    defs = {
        str(i): {"type": "object", "properties": {"a": {"$ref": f"#/$defs/{i + 1}"}}}
        for i in range(levels)
    }
    return json.dumps({"$ref": "#/$defs/0", "$defs": {**defs, str(levels): {"const": 1}}})


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_schema", _chain(3000)),
        Grammar("json_schema", '{"items":' * 10_000 + "1" + "}" * 10_000),
        Grammar("lark", "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(390))),
        Grammar("lark", "start: A0\n" + "".join(f"A{i}: A{i + 1}\n" for i in range(390))),
        Grammar("lark", "start: " + "(" * 100_000),
        Grammar("regex", "(" * 60_000),
        Grammar("regex", "a{1,2}" + "{1,2}" * 10_000),
    ],
)
def test_depth_ends_no_process(grammar: Grammar) -> None:
    """Found or not found to be wrong: here it matters that there is an answer."""
    assert len(grammar.source) <= MAX_BYTES[grammar.kind]
    on_deep_stack(lambda: problem(grammar))


def test_the_deep_stack_gives_results_and_errors() -> None:
    assert on_deep_stack(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        on_deep_stack(lambda: 1 // 0)


def test_seen_grammars_forget_the_oldest() -> None:
    seen = SeenGrammars(limit=2)
    a, b, c = (Grammar("regex", source) for source in "abc")
    seen.add(a)
    seen.add(b)
    assert a in seen  # and is now younger than b
    seen.add(c)
    assert a in seen and c in seen and b not in seen
    assert Grammar("lark", "a") not in seen
