"""Tool calls through the official SDK, by the embedded model, which speaks Hermes.

`test_other_sdks.py` runs this file once more, with the SDK's former generation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema
import openai
import pytest
from harness import Server
from pydantic import BaseModel

pytestmark = pytest.mark.xdist_group("clients")


class get_weather(BaseModel):
    """Get the weather"""

    city: str


class start_timer(BaseModel):
    """Start the timer"""

    minutes: int
    room: Literal["kitchen", "office"]


WEATHER, TIMER = (openai.pydantic_function_tool(model) for model in (get_weather, start_timer))
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in (WEATHER, TIMER)}
QUESTION = "What is the weather in Paris?"
ASK: dict[str, Any] = {
    "model": "demo",
    "messages": [{"role": "user", "content": QUESTION}],
    "tools": [WEATHER, TIMER],
    "temperature": 0,
    "max_completion_tokens": 200,
}


@pytest.fixture(scope="module")
def client(demo_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        api_key="none", base_url=f"{demo_server.url}/v1", max_retries=0, timeout=240
    ) as client:
        yield client


def check_calls(calls: Any) -> list[tuple[str, Any]]:
    """Names and arguments, which obey the schemas."""
    made = [(call.function.name, json.loads(call.function.arguments)) for call in calls or ()]
    for name, arguments in made:
        jsonschema.validate(arguments, SCHEMAS[name])
    return made


def test_a_call_and_its_result(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(**ASK).choices[0]
    assert first.finish_reason == "tool_calls"
    assert check_calls(first.message.tool_calls) == [("get_weather", {"city": "Paris"})]
    result = {
        "role": "tool",
        "tool_call_id": first.message.tool_calls[0].id,
        "content": '{"weather": "sunny"}',
    }
    messages = [*ASK["messages"], first.message.model_dump(exclude_none=True), result]
    second = client.chat.completions.create(**{**ASK, "messages": messages}).choices[0]
    assert second.finish_reason == "stop" and not second.message.tool_calls
    assert "sunny" in (second.message.content or "")


def test_no_call_where_none_is_wanted(client: openai.OpenAI) -> None:
    ask = {**ASK, "messages": [{"role": "user", "content": "What is 3 + 4?"}]}
    choice = client.chat.completions.create(**ask).choices[0]
    assert choice.message.content == "3 + 4 = 7" and choice.finish_reason == "stop"
    none = client.chat.completions.create(**ASK, tool_choice="none").choices[0]
    assert none.message.content and not none.message.tool_calls


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_calls_that_are_asked_for(client: openai.OpenAI, temperature: float) -> None:
    """Whatever the model would say: to a question without a call, and at random."""
    ask = {**ASK, "messages": [{"role": "user", "content": "What is 3 + 4?"}]}
    ask |= {"temperature": temperature, "n": 8, "seed": 1}
    for choice in ("required", {"type": "function", "function": {"name": "start_timer"}}):
        for answer in client.chat.completions.create(**ask, tool_choice=choice).choices:
            assert not answer.message.content
            if answer.finish_reason == "length":
                continue
            assert answer.finish_reason == "tool_calls"
            made = check_calls(answer.message.tool_calls)
            assert made
            if choice != "required":
                assert {name for name, _ in made} == {"start_timer"}


def test_one_call_at_most(client: openai.OpenAI) -> None:
    ask = {**ASK, "tool_choice": "required", "extra_body": {"min_tokens": 60}}
    many = client.chat.completions.create(**ask).choices[0].message.tool_calls
    one = client.chat.completions.create(**ask, parallel_tool_calls=False).choices[0]
    # It may not end before 60 tokens, and there is nothing to say but calls.
    assert len(check_calls(many)) > 1
    assert len({call.id for call in many or ()}) == len(many or ())
    assert len(check_calls(one.message.tool_calls)) == 1


def test_strict_holds_an_automatic_call_too(client: openai.OpenAI) -> None:
    """The schema names what the sentence does not have, and the model has to go along."""
    tool = json.loads(json.dumps(WEATHER))
    schema = tool["function"]["parameters"]
    schema["properties"] = {"place": {"type": "string", "enum": ["Oslo", "Rome"]}}
    schema["required"] = ["place"]
    call = client.chat.completions.create(**{**ASK, "tools": [tool]}).choices[0].message
    assert json.loads(call.tool_calls[0].function.arguments)["place"] in ("Oslo", "Rome")


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_stream_says_the_same(client: openai.OpenAI, choice: str) -> None:
    ask = {**ASK, "tool_choice": choice, "temperature": 1.2, "seed": 4}
    whole = client.chat.completions.create(**ask).choices[0].message
    names: list[str] = []
    arguments: list[str] = []
    for chunk in client.chat.completions.create(**ask, stream=True):
        for call in chunk.choices[0].delta.tool_calls or ():
            if call.id is not None:
                assert call.index == len(names)
                names.append(call.function.name)
                arguments.append("")
            arguments[call.index] += call.function.arguments or ""
    calls = whole.tool_calls or []
    assert list(zip(names, arguments, strict=True)) == [
        (call.function.name, call.function.arguments) for call in calls
    ]


def test_the_stream_helper_parses(client: openai.OpenAI) -> None:
    pieces = ""
    with client.chat.completions.stream(**ASK) as stream:
        for event in stream:
            if event.type == "tool_calls.function.arguments.delta":
                pieces += event.arguments_delta
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    [call] = final.message.tool_calls
    assert call.function.arguments == pieces
    assert call.function.parsed_arguments == get_weather(city="Paris")


def test_parse(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(**ASK).choices[0].message.tool_calls
    assert parsed is not None
    assert [call.function.parsed_arguments for call in parsed] == [get_weather(city="Paris")]


def test_tools_beside_a_response_format(client: openai.OpenAI) -> None:
    class Sum(BaseModel):
        result: int

    ask = {**ASK, "response_format": Sum}
    parsed = client.chat.completions.parse(**ask).choices[0].message
    assert [call.function.name for call in parsed.tool_calls or ()] == ["get_weather"]
    ask["messages"] = [{"role": "user", "content": "What is 3 + 4?"}]
    answer = client.chat.completions.parse(**ask).choices[0]
    assert answer.finish_reason in ("stop", "tool_calls", "length")
    if not answer.message.tool_calls and answer.finish_reason == "stop":
        assert isinstance(answer.message.parsed, Sum)


def test_sixty_tools(client: openai.OpenAI) -> None:
    tools = [WEATHER]
    for number in range(59):
        parameters = {"type": "object", "properties": {"a": {"type": "integer"}}}
        function = {"name": f"tool_{number}", "parameters": parameters}
        tools.append({"type": "function", "function": function})
    last = {"type": "function", "function": {"name": "tool_58"}}
    reply = client.chat.completions.create(**{**ASK, "tools": tools, "tool_choice": last})
    assert {call.function.name for call in reply.choices[0].message.tool_calls} == {"tool_58"}


def test_what_is_wrong_is_named(client: openai.OpenAI) -> None:
    tool = json.loads(json.dumps(TIMER))
    tool["function"]["parameters"]["properties"]["minutes"] = {"not": {"type": "string"}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{**ASK, "tools": [WEATHER, tool]})
    assert caught.value.param == "tools[1].function.parameters"
    assert "not" in caught.value.message
