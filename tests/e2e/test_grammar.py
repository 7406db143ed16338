"""Structured output of the real daemon: it validates, it ends, and whatever happens it goes on."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Callable
from typing import Any

import jsonschema
import openai
import pydantic
import pytest
from harness import Daemon

MESSAGES = [{"role": "user", "content": "Sort these numbers: 42, 7, 19"}]
CHAT = "/v1/chat/completions"
NUMBERS = {
    "type": "object",
    "properties": {
        "numbers": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 99},
            "maxItems": 4,
        },
        "note": {"type": "string", "maxLength": 10},
    },
    "required": ["numbers", "note"],
    "additionalProperties": False,
}


def body(schema: Any, **fields: Any) -> dict[str, Any]:
    named = {"name": "n", "schema": schema, "strict": True}
    given = {"response_format": {"type": "json_schema", "json_schema": named}}
    return {"messages": MESSAGES, "max_tokens": 200, "temperature": 1.0, "seed": 1} | given | fields


def schema_of(i: int) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            f"id{i}": {"const": i},
            "kind": {"enum": [f"kind {i + j}" for j in range(5)]},
            "size": {"type": "integer", "minimum": i, "maximum": i + 50},
        },
        "required": [f"id{i}", "kind", "size"],
        "additionalProperties": False,
    }


class Person(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    name: str = pydantic.Field(max_length=12)
    age: int = pydantic.Field(ge=0, le=150)
    pets: list[Pet] = pydantic.Field(max_length=2)


class Pet(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    kind: pydantic.constr(pattern="^(cat|dog)$")  # type: ignore[valid-type]
    tame: bool | None


def test_the_sdk_parses_a_pydantic_model(demo: Daemon) -> None:
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0) as client:
        for seed in range(4):
            reply = client.chat.completions.parse(
                model="demo",
                messages=MESSAGES,  # type: ignore[arg-type]
                response_format=Person,
                temperature=1.0,
                seed=seed,
                max_tokens=300,
            )
            assert reply.choices[0].finish_reason == "stop"
            assert isinstance(reply.choices[0].message.parsed, Person)


def test_streamed_and_whole_are_one_text(demo: Daemon) -> None:
    whole = demo.post(CHAT, body(NUMBERS, logprobs=True))["choices"][0]
    assert whole["finish_reason"] == "stop"
    jsonschema.validate(json.loads(whole["message"]["content"]), NUMBERS)
    entries = whole["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == whole["message"]["content"]
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0) as client:
        chunks = list(client.chat.completions.create(model="demo", stream=True, **body(NUMBERS)))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole["message"]["content"]
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": "[A-Z]{3}-[0-9]{2}"}, "[A-Z]{3}-[0-9]{2}"),
        ({"guided_choice": ["yes", "no (really)", "süß"]}, r"yes|no \(really\)|süß"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "a|b"),
        ({"guided_grammar": 'start: "<" /[a-c]{2}/ ">"'}, "<[a-c]{2}>"),
        ({"guided_grammar": 'root ::= "x" [0-9]{2} | "y"'}, "x[0-9]{2}|y"),
    ],
)
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_other_grammars(demo: Daemon, fields: Any, pattern: str, ignore_eos: bool) -> None:
    more = {"max_tokens": 60, "ignore_eos": ignore_eos, "n": 3, "temperature": 1.5, "seed": 3}
    for path, given in (
        (CHAT, {"messages": MESSAGES}),
        ("/v1/completions", {"prompt": "Hello"}),
    ):
        for choice in demo.post(path, {**given, **fields, **more})["choices"]:
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            assert choice["finish_reason"] == "stop"
            assert re.fullmatch(pattern, text), text


def test_what_has_no_end_ends_with_length(demo: Daemon) -> None:
    reply = demo.post(CHAT, body({"type": "string", "minLength": 500}, max_tokens=20))
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 20


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"guided_json": {"uniqueItems": True}}, "guided_json", '"uniqueItems"'),
        ({"guided_grammar": "start: <nothing>"}, "guided_grammar", "<nothing>"),
        ({"guided_json": {"$ref": "#"}}, "guided_json", ""),
        ({"guided_regex": "a(?=b)"}, "guided_regex", "look-around"),
    ],
)
def test_a_bad_one_computes_nothing(demo: Daemon, fields: Any, param: str, word: str) -> None:
    demo.wait_requests(0)
    before = demo.metric("quantd_prompt_tokens_total")
    status, _, data = demo.request("POST", CHAT, {"messages": MESSAGES, "max_tokens": 9, **fields})
    error = json.loads(data)["error"]
    assert (status, error["param"]) == (400, param), error
    assert word in error["message"]
    assert demo.metric("quantd_prompt_tokens_total") == before


def test_nothing_left_to_sample_ends_one_request_and_no_other(demo: Daemon) -> None:
    status, _, data = demo.request(
        "POST", CHAT, body(NUMBERS, allowed_token_ids=[0], response_format={"type": "json_object"})
    )
    error = json.loads(data)["error"]
    assert (status, error["code"]) == (400, "nothing_to_sample")
    assert "no token may be sampled" in error["message"]
    assert demo.post(CHAT, body(NUMBERS))["choices"][0]["finish_reason"] == "stop"


async def test_a_hundred_at_once_with_schemas_of_their_own(demo: Daemon) -> None:
    free = {"messages": MESSAGES, "max_tokens": 12, "temperature": 0, "model": "demo"}
    async with openai.AsyncOpenAI(
        base_url=f"{demo.url}/v1", api_key="none", max_retries=0, timeout=540
    ) as client:
        alone = await client.chat.completions.create(**free)
        replies = await asyncio.gather(
            *(
                client.chat.completions.create(model="demo", **body(schema_of(i), seed=i))
                for i in range(100)
            ),
            client.chat.completions.create(**free),
        )
    for i, reply in enumerate(replies[:-1]):
        assert reply.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(reply.choices[0].message.content), schema_of(i))
    assert replies[-1].choices[0].message.content == alone.choices[0].message.content
    assert demo.metric("quantd_grammar_masks_total") > 100


async def test_preemption_changes_no_token(serve: Callable[..., Daemon]) -> None:
    """A pool that holds a few of them: the same texts as one after the other."""
    small = serve("demo", "--dtype", "float32", "--threads", "1", "--kv-bytes", "2MiB")
    bodies = [body(NUMBERS | {"title": str(i)}, seed=i) for i in range(24)]
    alone = [small.post(CHAT, each)["choices"][0]["message"]["content"] for each in bodies]
    async with openai.AsyncOpenAI(
        base_url=f"{small.url}/v1", api_key="none", max_retries=0, timeout=540
    ) as client:
        with small.held():
            asking = [
                asyncio.create_task(client.chat.completions.create(model="demo", **each))
                for each in bodies
            ]
            await asyncio.to_thread(small.wait_requests, len(bodies))
        replies = await asyncio.gather(*asking)
    assert [reply.choices[0].message.content for reply in replies] == alone
    assert small.metric("quantd_preemptions_total") > 0


def test_after_a_crash_the_next_worker_knows_grammars_too(serve: Callable[..., Daemon]) -> None:
    daemon = serve("demo", "--dtype", "float32", "--threads", "1")
    first = daemon.post(CHAT, body(NUMBERS))
    (worker,) = daemon.workers()
    os.kill(worker, signal.SIGKILL)
    daemon.wait(lambda: daemon.workers() not in ([], [worker]))
    daemon.wait_ready()
    again = daemon.post(CHAT, body(NUMBERS))
    assert again["choices"] == first["choices"]
