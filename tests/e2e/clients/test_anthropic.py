"""Anthropic's official SDK against the daemon, by the embedded model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from harness import Server

pytestmark = pytest.mark.xdist_group("clients")

WEATHER: Any = {
    "name": "get_weather",
    "description": "Get the weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
# The SDK itself has no temperature any more.
ASK: dict[str, Any] = {"model": "demo", "max_tokens": 200, "extra_body": {"temperature": 0}}
QUESTION: Any = {"role": "user", "content": "What is the weather in Paris?"}
SUM: Any = {"role": "user", "content": "What is 3 + 4?"}


def client_of(server: Server, key: str = "none") -> anthropic.Anthropic:
    return anthropic.Anthropic(api_key=key, base_url=server.url, max_retries=0, timeout=240)


@pytest.fixture(scope="module")
def client(demo_server: Server) -> Iterator[anthropic.Anthropic]:
    with client_of(demo_server) as client:
        yield client


def test_whole_and_streamed_are_the_same(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(**ASK, messages=[SUM])
    assert [block.to_dict() for block in whole.content] == [{"type": "text", "text": "3 + 4 = 7"}]
    assert (whole.stop_reason, whole.role, whole.model) == ("end_turn", "assistant", "demo")
    assert whole._request_id
    with client.messages.stream(**ASK, messages=[SUM]) as stream:
        assert "".join(stream.text_stream) == "3 + 4 = 7"
        final = stream.get_final_message()
    assert final.content[0].text == "3 + 4 = 7" and final.stop_reason == "end_turn"  # type: ignore[union-attr]
    for message in (whole, final):
        usage = message.usage
        assert usage.cache_read_input_tokens is not None and usage.output_tokens > 1
    count = client.messages.count_tokens(model="demo", messages=[SUM]).input_tokens
    assert count == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    assert count == final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0)


def test_a_tool_and_its_result(client: anthropic.Anthropic) -> None:
    ask: dict[str, Any] = {**ASK, "tools": [WEATHER]}
    first = client.messages.create(**ask, messages=[QUESTION])
    assert first.stop_reason == "tool_use"
    [use] = [block for block in first.content if block.type == "tool_use"]
    assert (use.name, use.input) == ("get_weather", {"city": "Paris"})
    with client.messages.stream(**ask, messages=[QUESTION]) as stream:
        final = stream.get_final_message()
    [streamed] = [block for block in final.content if block.type == "tool_use"]
    assert streamed.input == use.input and final.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": use.id, "content": '{"weather": "sunny"}'}
    turns: Any = [
        QUESTION,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]
    second = client.messages.create(**ask, messages=turns)
    assert second.stop_reason == "end_turn" and "sunny" in second.content[0].text  # type: ignore[union-attr]


def test_a_call_that_is_asked_for(client: anthropic.Anthropic) -> None:
    choice: Any = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
    made = client.messages.create(**ASK, messages=[SUM], tools=[WEATHER], tool_choice=choice)
    [use] = made.content
    assert use.type == "tool_use" and isinstance(use.input["city"], str)


@pytest.mark.parametrize("stream", [False, True])
def test_the_sdks_own_loop_with_a_tool(client: anthropic.Anthropic, stream: bool) -> None:
    asked = []

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """Get the weather"""
        asked.append(city)
        return '{"weather": "sunny"}'

    runner: Any = client.beta.messages.tool_runner(
        **ASK, messages=[QUESTION], tools=[get_weather], stream=stream
    )
    final = runner.until_done()
    assert asked == ["Paris"] and "sunny" in final.content[0].text
    with pytest.raises(anthropic.BadRequestError, match="thread"):
        client.beta.messages.thread(model="demo", max_tokens=9).send(SUM)


def test_a_schema(client: anthropic.Anthropic) -> None:
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer"}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    format: Any = {"format": {"type": "json_schema", "schema": schema}}
    made = client.messages.create(**ASK, messages=[SUM], output_config=format)
    assert isinstance(json.loads(made.content[0].text)["sum"], int)  # type: ignore[union-attr]


def test_ends(client: anthropic.Anthropic) -> None:
    cut = client.messages.create(**{**ASK, "max_tokens": 2}, messages=[SUM])
    assert cut.stop_reason == "max_tokens" and cut.usage.output_tokens == 2
    stopped = client.messages.create(**ASK, messages=[SUM], stop_sequences=[" ="])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " =")
    assert stopped.content[0].text == "3 + 4"  # type: ignore[union-attr]


def test_errors(client: anthropic.Anthropic, strict_server: Server, api_key: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(**{**ASK, "max_tokens": 0}, messages=[SUM])
    with pytest.raises(anthropic.NotFoundError, match="does not exist") as caught:
        client.messages.create(**{**ASK, "model": "claude"}, messages=[SUM])
    assert caught.value.type == "not_found_error" and caught.value.request_id
    hosted: Any = {"type": "web_search_20250305", "name": "web_search"}
    with pytest.raises(anthropic.BadRequestError, match="web_search_20250305"):
        client.messages.create(**ASK, messages=[SUM], tools=[hosted])
    with client_of(strict_server) as stranger, pytest.raises(anthropic.AuthenticationError):
        stranger.messages.create(**ASK, messages=[SUM])
    with client_of(strict_server, api_key) as known:
        assert known.messages.create(**ASK, messages=[SUM]).content
        with pytest.raises(anthropic.RequestTooLargeError):
            known.messages.create(**ASK, messages=[{"role": "user", "content": "x" * 30000}])
