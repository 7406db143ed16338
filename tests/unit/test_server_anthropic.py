"""Anthropic's /v1/messages over a scripted engine: fields, errors, the order of events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from server_fakes import Answer, FakeFleet, Served, byte_text_model, fake_info, serving, spoken

from quantd.daemon.errors import QueueFull, Unavailable
from quantd.daemon.server.auth import ApiKeys

URL = "/v1/messages"
TEMPLATE = (
    "{% for tool in tools or [] %}[tool]{{ tool | tojson }}{% endfor %}"
    "{% for message in messages %}[{{ message.role }}]"
    "{% if message.reasoning %}({{ message.reasoning }}){% endif %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.arguments | tojson }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    "{% if enable_thinking %}<think>\n{% endif %}{# <tool_call> arguments </think> #}"
)
WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "Tells the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
ASK: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 200,
    "messages": [{"role": "user", "content": "hi"}],
}
CALL = 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
USE = {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Rome"}}


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving(fleet=FakeFleet(text=byte_text_model(TEMPLATE))) as served:
        yield served


async def message(served: Served, **fields: Any) -> dict[str, Any]:
    status, reply = await served.post(URL, {**ASK, **fields})
    assert status == 200, reply
    return reply  # type: ignore[no-any-return]


async def refused(served: Served, **fields: Any) -> str:
    status, reply = await served.post(URL, {**ASK, **fields})
    assert status == 400, reply
    assert reply["type"] == "error" and reply["error"]["type"] == "invalid_request_error"
    return str(reply["error"]["message"])


async def events(served: Served, **fields: Any) -> list[dict[str, Any]]:
    made = []
    for text in await served.events(URL, {**ASK, "stream": True, **fields}):
        name, data = text.split("\n")
        made.append(json.loads(data.removeprefix("data: ")))
        assert name == "event: " + made[-1]["type"]
    return made


def prompt_of(served: Served) -> str:
    return bytes(token for token in served.engine.requests[-1].prompt if token < 256).decode()


async def test_a_message(served: Served) -> None:
    reply = await message(served, system=[{"type": "text", "text": "Be brief."}])
    assert reply.pop("id").startswith("msg_")
    num_prompt = len(served.engine.requests[0].prompt)
    assert reply == {
        "type": "message",
        "role": "assistant",
        "model": "org/tiny",
        "content": [{"type": "text", "text": "ok"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": num_prompt,
            "output_tokens": 3,
            "output_tokens_details": {"thinking_tokens": 0},
            "cache_read_input_tokens": 0,
            "cache_creation_input_tokens": 0,
        },
    }
    assert prompt_of(served) == "[system]Be brief.[user]hi[assistant]"


async def test_fields_reach_the_engine(served: Served) -> None:
    await message(
        served,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        metadata={"user_id": "me"},
        service_tier="auto",
        cache_control={"type": "ephemeral"},
    )
    sampling = served.engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert sampling.max_tokens == 200


async def test_the_system_may_speak_in_the_middle(served: Served) -> None:
    said = [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]
    await message(served, messages=[*ASK["messages"], {"role": "system", "content": said}])
    assert prompt_of(served) == "[user]hi[system]Be\nbrief.[assistant]"
    image = {"role": "system", "content": [{"type": "image"}]}
    assert "content[0]: blocks" in await refused(served, messages=[*ASK["messages"], image])


async def test_how_it_ends(served: Served) -> None:
    served.engine.answer = lambda request: spoken("one two", "length")
    assert (await message(served, max_tokens=7))["stop_reason"] == "max_tokens"
    reply = await message(served, stop_sequences=[" tw"])
    assert (reply["stop_reason"], reply["stop_sequence"]) == ("stop_sequence", " tw")
    assert reply["content"] == [{"type": "text", "text": "one"}]


async def test_a_call_that_a_stop_sequence_has_cut_off_is_not_to_be_run(served: Served) -> None:
    served.engine.answer = lambda request: spoken(CALL, "stop")
    reply = await message(served, tools=[WEATHER], stop_sequences=["Rom"])
    assert (reply["stop_reason"], reply["stop_sequence"]) == ("stop_sequence", "Rom")
    assert reply["content"][-1]["input"] == {}


async def test_tools_are_shown_in_the_order_that_models_know(served: Served) -> None:
    await message(served, tools=[{"input_schema": {}, "name": "now", "description": "Tells it."}])
    shown = prompt_of(served)
    assert shown.index('"now"') < shown.index('"Tells it."') < shown.index('"parameters"')


async def test_the_contexts_end_is_no_error() -> None:
    fleet = FakeFleet(text=byte_text_model(TEMPLATE), info=fake_info(30))
    async with serving(fleet=fleet) as served:
        served.engine.answer = lambda request: spoken("x" * request.sampling.max_tokens, "length")
        reply = await message(served, max_tokens=32_000)
        assert reply["stop_reason"] == "model_context_window_exceeded"
        num_tokens = reply["usage"]["input_tokens"] + reply["usage"]["output_tokens"]
        assert num_tokens == 30 and reply["content"][0]["text"].startswith("xxx")
        *_, delta, _ = await events(served, max_tokens=32_000)
        assert delta["delta"]["stop_reason"] == "model_context_window_exceeded"


async def test_a_tool_is_called_and_its_result_read(served: Served) -> None:
    served.engine.answer = lambda request: spoken(CALL, "stop")
    reply = await message(served, tools=[WEATHER])
    assert reply["stop_reason"] == "tool_use"
    text, use = reply["content"]
    assert text == {"type": "text", "text": "I look."}
    assert use.pop("id") and use == {k: v for k, v in USE.items() if k != "id"}
    assert '"description": "Tells the weather."' in prompt_of(served)
    turn = [{"type": "thinking", "thinking": "hm", "signature": "x"}, USE]
    result = {"type": "tool_result", "tool_use_id": "c1", "content": [text]}
    messages = [
        *ASK["messages"],
        {"role": "assistant", "content": turn},
        {"role": "user", "content": [result, {"type": "text", "text": "so?"}]},
    ]
    await message(served, tools=[WEATHER], messages=messages)
    assert prompt_of(served).endswith(
        '[user]hi[assistant](hm)<tool_call>{"city": "Rome"}[tool]I look.[user]so?[assistant]'
    )


async def test_tool_choice(served: Served) -> None:
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        await message(served, tools=[WEATHER], tool_choice=choice)
        assert served.engine.requests[-1].sampling.grammar is not None
    await message(served, tools=[WEATHER], tool_choice={"type": "none"})
    assert "[tool]" not in prompt_of(served)


async def test_the_order_of_events(served: Served) -> None:
    served.engine.answer = lambda request: spoken("<think>\nhm</think>" + CALL, "stop")
    made = await events(served, tools=[WEATHER], thinking={"type": "adaptive"})
    kinds = [event["type"] for event in made if event["type"] != "content_block_delta"]
    block = ["content_block_start", "content_block_stop"]
    assert kinds == ["message_start", "ping", *block * 3, "message_delta", "message_stop"]
    blocks: list[dict[str, Any]] = []
    texts: list[str] = []
    for event in made:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(event["content_block"])
            texts.append("")
        elif event["type"] == "content_block_delta":
            assert event["index"] == len(blocks) - 1
            [text] = (v for k, v in event["delta"].items() if k != "type")
            texts[-1] += text
    assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use"]
    assert texts[:2] == ["hm", "I look."] and json.loads(texts[2]) == {"city": "Rome"}
    assert made[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert made[-2]["usage"]["output_tokens"] == len("<think>\nhm</think>" + CALL) + 1


async def test_thinking_is_shown_to_who_asks(served: Served) -> None:
    served.engine.answer = lambda request: spoken("hm</think>ok", "stop")
    thinking = {"type": "enabled", "budget_tokens": 1024}
    reply = await message(served, thinking=thinking)
    assert reply["content"][0] == {"type": "thinking", "thinking": "hm", "signature": ""}
    assert reply["usage"]["output_tokens_details"]["thinking_tokens"] == len("hm</think>")
    streamed = await events(served, thinking=thinking)
    assert streamed[-2]["usage"] == reply["usage"]
    served.engine.answer = lambda request: spoken("<think>hm</think>ok", "stop")
    for fields in ({}, {"thinking": {"type": "disabled"}}):
        assert (await message(served, **fields))["content"] == [{"type": "text", "text": "ok"}]


async def test_a_schema(served: Served) -> None:
    format = {"type": "json_schema", "schema": {"type": "object"}}
    for fields in ({"output_config": {"format": format}}, {"output_format": format}):
        await message(served, **fields)
        grammar = served.engine.requests[-1].sampling.grammar
        assert grammar is not None and '"object"' in grammar.source


async def test_a_last_turn_of_the_assistant_is_continued(served: Served) -> None:
    await message(served, messages=[*ASK["messages"], {"role": "assistant", "content": "It is"}])
    assert prompt_of(served) == "[user]hi[assistant]It is"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens must be between 1"),
        ({"messages": []}, "at least 1 message"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content[0]: blocks"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
            "content[0].tool_use_id",
        ),
        ({"messages": [{"role": "assistant", "content": [USE]}]}, "tool_result blocks behind"),
        ({"tools": [{"type": "web_search_20250305", "name": "web"}]}, "web_search_20250305"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [{**WEATHER, "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{**WEATHER, "input_schema": {"type": "array"}}]}, "tools[0].input_schema.type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"top_p": 3}, "top_p"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ],
)
async def test_bad_fields(served: Served, fields: dict[str, Any], says: str) -> None:
    assert says in await refused(served, **fields)
    assert not served.engine.requests


@pytest.mark.parametrize("kind", ["create", "continue"])
async def test_threads_are_refused_so_that_sdks_go_on_without(served: Served, kind: str) -> None:
    thread = {"type": kind, "previous_message_id": "msg_1"}
    status, reply = await served.post(URL, {**ASK, "messages": [], "thread": thread})
    assert status == 400 and "thread" in reply["error"]["message"]
    assert reply["error"]["details"] == {
        "error_code": "thread_unsupported_request",
        "unsupported": ["thread"],
    }
    await message(served, thread=None)


async def test_errors_have_its_shape(served: Served) -> None:
    async def kind(path: str, method: str = "POST", **fields: Any) -> tuple[int, str]:
        async with served.session.request(method, path, json={**ASK, **fields}) as response:
            reply = await response.json()
            assert reply["type"] == "error"
            assert reply["request_id"] == response.headers["request-id"]
            return response.status, reply["error"]["type"]

    assert await kind(URL, model="none") == (404, "not_found_error")
    assert await kind(URL + "/nothing") == (404, "not_found_error")
    assert await kind(URL, "PUT") == (405, "invalid_request_error")
    served.engine.refuse = lambda request: QueueFull("full", retry_after=1)
    assert await kind(URL) == (429, "rate_limit_error")
    served.engine.refuse = lambda request: Unavailable("gone")
    assert await kind(URL) == (503, "overloaded_error")


async def test_keys() -> None:
    async with serving(keys=ApiKeys([("me", "k")])) as served:
        status, reply = await served.post(URL, ASK)
        assert (status, reply["error"]["type"]) == (401, "authentication_error")
        status, _ = await served.post(URL, ASK, headers={"x-api-key": "k"})
        assert status == 200


async def test_an_error_after_the_first_byte_is_an_event(served: Served) -> None:
    served.engine.answer = lambda request: Answer([b"a", b"b"], "error", "the worker died")
    made = await events(served)
    assert [e["type"] for e in made][:2] == ["message_start", "ping"]
    assert made[-1]["error"] == {"type": "overloaded_error", "message": "the worker died"}


async def test_count_tokens(served: Served) -> None:
    body = {k: v for k, v in ASK.items() if k != "max_tokens"}
    status, reply = await served.post(URL + "/count_tokens", {**body, "tools": [WEATHER]})
    assert status == 200 and not served.engine.requests
    await message(served, tools=[WEATHER])
    assert reply == {"input_tokens": len(served.engine.requests[0].prompt)}
