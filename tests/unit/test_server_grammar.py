"""The fields that constrain an output: which grammar each makes, and how a bad one is refused."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from server_fakes import FakeFleet, serving

from quantd.daemon.types import Grammar

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "hi"}]}
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {}}, "required": ["b"]}
SOURCE = '{"type":"object","properties":{"b":{"type":"integer"},"a":{}},"required":["b"]}'
JSON = Grammar("json_schema", SOURCE)
ANY_OBJECT = Grammar("json_schema", '{"type":"object"}')


def named(schema: Any = SCHEMA, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **more}}


GIVEN: list[tuple[dict[str, Any], Grammar | None]] = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": None, "structured_outputs": None, "guided_json": None}, None),
    ({"response_format": {"type": "json_object"}}, ANY_OBJECT),
    ({"response_format": named()}, JSON),
    ({"response_format": named(strict=True, description="d")}, JSON),
    ({"response_format": named(strict=False)}, JSON),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, ANY_OBJECT),
    ({"structured_outputs": {"json": SCHEMA}}, JSON),
    ({"structured_outputs": {"json": SOURCE, "regex": None}}, JSON),
    ({"structured_outputs": {"regex": "a+"}}, Grammar("regex", "a+")),
    ({"structured_outputs": {"choice": ["a.b", "c", "a.b"]}}, Grammar("regex", r"a\.b|c")),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, Grammar("lark", 'start: "a"')),
    ({"structured_outputs": {"grammar": 'root ::= "a"'}}, Grammar("gbnf", 'root ::= "a"')),
    ({"structured_outputs": {"json_object": True}}, ANY_OBJECT),
    ({"guided_json": SCHEMA}, JSON),
    ({"guided_json": SOURCE}, JSON),
    ({"guided_regex": "a|b"}, Grammar("regex", "a|b")),
    ({"guided_choice": ["<a>", "-"]}, Grammar("regex", r"<a>|\-")),
    ({"guided_grammar": 'start: "a"'}, Grammar("lark", 'start: "a"')),
    ({"guided_json": {}}, Grammar("json_schema", "{}")),
]


@pytest.mark.parametrize(("fields", "grammar"), GIVEN)
async def test_the_grammar_reaches_the_engine(
    fields: dict[str, Any], grammar: Grammar | None
) -> None:
    async with serving() as served:
        for url, body in ((CHAT, HELLO), (TEXT, {"prompt": "hi"})):
            status, reply = await served.post(url, {**body, **fields})
            assert status == 200, reply
        assert [request.sampling.grammar for request in served.engine.requests] == [grammar] * 2
        assert served.fleet.prepared == ([] if grammar is None else [grammar] * 2)


FORMAT, STRUCTURED = "response_format", "structured_outputs"
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({FORMAT: "json"}, FORMAT, "json_object"),
    ({FORMAT: {}}, FORMAT, "json_object"),
    ({FORMAT: {"type": "grammar"}}, FORMAT, "json_object"),
    ({FORMAT: {"type": "json_schema"}}, f"{FORMAT}.json_schema", "name and schema"),
    (
        {FORMAT: {"type": "json_schema", "json_schema": {}}},
        f"{FORMAT}.json_schema.name",
        "required",
    ),
    ({FORMAT: named([])}, f"{FORMAT}.json_schema.schema", "object"),
    ({FORMAT: named(True)}, f"{FORMAT}.json_schema.schema", "object"),
    ({FORMAT: named({"not": {}})}, f"{FORMAT}.json_schema.schema", '"not"'),
    ({FORMAT: named({"format": "int32"})}, f"{FORMAT}.json_schema.schema", "int32"),
    ({STRUCTURED: "a"}, STRUCTURED, "object"),
    ({STRUCTURED: {}}, STRUCTURED, "got none"),
    ({STRUCTURED: {"regex": "a", "choice": ["a"]}}, STRUCTURED, "got regex, choice"),
    ({STRUCTURED: {"regex": ""}}, f"{STRUCTURED}.regex", "not empty"),
    ({STRUCTURED: {"regex": "("}}, f"{STRUCTURED}.regex", "invalid regex"),
    ({STRUCTURED: {"json": "{"}}, f"{STRUCTURED}.json", "no JSON"),
    ({STRUCTURED: {"json": "[" * 100_000}}, f"{STRUCTURED}.json", "no JSON"),
    ({STRUCTURED: {"json": {}, "structural_tag": "x"}}, f"{STRUCTURED}.structural_tag", "support"),
    (
        {STRUCTURED: {"json": {}, "whitespace_pattern": " "}},
        f"{STRUCTURED}.whitespace_pattern",
        "support",
    ),
    ({"guided_json": 3}, "guided_json", "object"),
    ({"guided_json": {"uniqueItems": True}}, "guided_json", '"uniqueItems"'),
    ({"guided_json": {"multipleOf": 10_000_019}}, "guided_json", "1000000"),
    (
        {"guided_json": {"allOf": [{"multipleOf": 997}, {"multipleOf": 1009}]}},
        "guided_json",
        "1000000",
    ),
    ({"guided_json": {"multipleOf": 1e-300}}, "guided_json", "1000000"),
    ({"guided_regex": 3}, "guided_regex", "string"),
    ({"guided_regex": "a" * 70_000}, "guided_regex", "70000 bytes; the limit is 65536"),
    ({"guided_json": {"multipleOf": True}}, "guided_json", "multipleOf"),
    ({"guided_choice": []}, "guided_choice", "list of strings"),
    ({"guided_choice": ["a", ""]}, "guided_choice", "none of them empty"),
    ({"guided_choice": ["a", 1]}, "guided_choice", "list of strings"),
    ({"guided_choice": [str(i) for i in range(4097)]}, "guided_choice", "4097"),
    ({"guided_grammar": "x"}, "guided_grammar", "cannot be followed"),
    ({"guided_grammar": "root ::= ("}, "guided_grammar", "GBNF"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "give one of them"),
    ({FORMAT: {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", FORMAT),
    ({FORMAT: named(), STRUCTURED: {"regex": "a"}}, f"{STRUCTURED}.regex", "both"),
]


@pytest.mark.parametrize(("fields", "param", "word"), BAD)
async def test_a_bad_one_is_refused_before_a_model_is_loaded(
    fields: dict[str, Any], param: str, word: str
) -> None:
    fleet = FakeFleet()
    fleet.open.clear()  # a lease would wait for ever
    async with serving(fleet=fleet) as served:
        error = await asyncio.wait_for(served.error(CHAT, {**HELLO, **fields}), 240)
        assert error["param"] == param
        assert word in error["message"]


async def test_several_multiples_that_fit() -> None:
    multiples = [{"multipleOf": value} for value in (0.01, 5, 100, 1000, 2.5)]
    async with serving() as served:
        status, reply = await served.post(CHAT, {**HELLO, "guided_json": {"anyOf": multiples}})
        assert status == 200, reply


async def test_what_the_model_cannot_follow_names_the_field() -> None:
    async with serving() as served:
        served.fleet.grammar_error = "unknown special token"
        error = await served.error(CHAT, {**HELLO, "guided_grammar": "start: <tool>"})
        assert error["param"] == "guided_grammar"
        assert error["message"] == "guided_grammar: unknown special token"
        assert served.engine.requests == []
        assert served.fleet.num_leases == 0


async def test_a_bad_one_is_an_error_of_a_stream_too() -> None:
    async with serving() as served:
        error = await served.error(CHAT, {**HELLO, "stream": True, "guided_json": {"not": {}}})
        assert error["param"] == "guided_json"
