"""LiteLLM: as the providers openai/, hosted_vllm/ and anthropic/."""

from __future__ import annotations

import json
from typing import Any

import litellm
import pytest
from harness import Server
from pydantic import BaseModel

SUM = [{"role": "user", "content": "What is 3 + 4?"}]
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class Person(BaseModel):
    name: str
    city: str


EXTRACT = [
    {
        "role": "user",
        "content": "Extract the name and city as JSON: Ana Berg moved to Oslo on 4 May 2021.",
    }
]


@pytest.fixture(params=["openai", "hosted_vllm", "anthropic"])
def ask(request: pytest.FixtureRequest, demo_server: Server) -> dict[str, Any]:
    provider = request.param
    base = demo_server.url if provider == "anthropic" else f"{demo_server.url}/v1"
    return {
        "model": f"{provider}/demo",
        "api_base": base,
        "api_key": "none",
        "temperature": 0,
        "max_tokens": 200,
        "num_retries": 0,
    }


def test_whole_and_streamed(ask: dict[str, Any]) -> None:
    whole = litellm.completion(**ask, messages=SUM)
    choice = whole.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("3 + 4 = 7", "stop")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    streamed = list(
        litellm.completion(**ask, messages=SUM, stream=True, stream_options={"include_usage": True})
    )
    spoken = [each.choices[0].delta.content or "" for each in streamed if each.choices]
    assert len(spoken) > 2 and "".join(spoken) == "3 + 4 = 7"
    made = litellm.stream_chunk_builder(streamed, messages=SUM)
    assert made.choices[0].message.content == "3 + 4 = 7"
    assert made.choices[0].finish_reason == "stop"
    assert made.usage.prompt_tokens == whole.usage.prompt_tokens
    assert made.usage.completion_tokens == whole.usage.completion_tokens


async def test_asynchronously(ask: dict[str, Any]) -> None:
    whole = await litellm.acompletion(**ask, messages=SUM)
    assert whole.choices[0].message.content == "3 + 4 = 7"
    stream = await litellm.acompletion(**ask, messages=SUM, stream=True)
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces) == "3 + 4 = 7"


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_and_its_result(ask: dict[str, Any], stream: bool) -> None:
    first = litellm.completion(**ask, messages=WEATHER, tools=[TOOL], stream=stream)
    if stream:
        first = litellm.stream_chunk_builder(list(first), messages=WEATHER)
    assert first.choices[0].finish_reason == "tool_calls"
    [call] = first.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"weather": "sunny"}'}
    turns = [*WEATHER, first.choices[0].message.model_dump(exclude_none=True), result]
    second = litellm.completion(**ask, messages=turns, tools=[TOOL])
    assert "sunny" in second.choices[0].message.content


def test_a_call_that_is_asked_for(ask: dict[str, Any]) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        made = litellm.completion(**ask, messages=SUM, tools=[TOOL], tool_choice=choice)
        [call, *_] = made.choices[0].message.tool_calls
        assert isinstance(json.loads(call.function.arguments)["city"], str)


def test_response_format(ask: dict[str, Any]) -> None:
    made = litellm.completion(**ask, messages=EXTRACT, response_format=Person)
    assert Person.model_validate_json(made.choices[0].message.content) == Person(
        name="Ana Berg", city="Oslo"
    )


def test_errors(ask: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**{**ask, "temperature": 9}, messages=SUM)
    provider = ask["model"].split("/")[0]
    with pytest.raises(litellm.NotFoundError, match="does not exist"):
        litellm.completion(**{**ask, "model": f"{provider}/other"}, messages=SUM)


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_embedding(demo_server: Server, provider: str) -> None:
    texts = ["one two", "three"]
    made = litellm.embedding(
        model=f"{provider}/embedder",
        input=texts,
        api_base=f"{demo_server.url}/v1",
        api_key="none",
    )
    expected = demo_server.post("/v1/embeddings", {"model": "embedder", "input": texts})
    for ours, raw in zip(made.data, expected["data"], strict=True):
        assert ours["embedding"] == pytest.approx(raw["embedding"], abs=1e-6)
    assert made.usage.prompt_tokens == expected["usage"]["prompt_tokens"]


def test_rerank(demo_server: Server) -> None:
    ask = {"query": "what is a mat?", "documents": ["x", "The cat sat on the mat."]}
    made = litellm.rerank(
        **ask, model="hosted_vllm/reranker", api_base=f"{demo_server.url}/v1", api_key="none"
    )
    expected = demo_server.post("/v1/rerank", {"model": "reranker", **ask})["results"]
    for ours, raw in zip(made.results, expected, strict=True):
        assert ours["index"] == raw["index"]
        assert ours["relevance_score"] == pytest.approx(raw["relevance_score"])


def test_text_completion(demo_server: Server) -> None:
    ask = {"prompt": "1 + 2 =", "max_tokens": 6, "temperature": 0}
    made = litellm.text_completion(
        **ask, model="text-completion-openai/demo", api_base=f"{demo_server.url}/v1", api_key="none"
    )
    expected = demo_server.post("/v1/completions", {"model": "demo", **ask})
    assert made.choices[0].text == expected["choices"][0]["text"]


class TestResponses:
    """The provider openai/ speaks Responses to the server; the others are translated to chats."""

    @pytest.fixture
    def base(self, demo_server: Server) -> dict[str, Any]:
        return {
            "model": "openai/demo",
            "api_base": f"{demo_server.url}/v1",
            "api_key": "none",
            "temperature": 0,
            "max_output_tokens": 200,
        }

    def test_whole_streamed_and_chained(self, base: dict[str, Any]) -> None:
        whole = litellm.responses(**base, input="What is 3 + 4?")
        assert whole.status == "completed"
        assert whole.output[0].content[0].text == "3 + 4 = 7"
        events = list(litellm.responses(**base, input="What is 3 + 4?", stream=True))
        text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
        assert text == "3 + 4 = 7" and events[-1].type == "response.completed"
        chained = litellm.responses(**base, input="What is 5 + 4?", previous_response_id=whole.id)
        assert chained.usage.input_tokens > 2 * whole.usage.input_tokens

    def test_a_tool(self, base: dict[str, Any]) -> None:
        tool = {"type": "function", **TOOL["function"]}  # type: ignore[dict-item]
        made = litellm.responses(**base, input=WEATHER[0]["content"], tools=[tool])
        [call] = [item for item in made.output if item.type == "function_call"]
        assert json.loads(call.arguments) == {"city": "Paris"}
