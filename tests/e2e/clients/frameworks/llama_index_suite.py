"""LlamaIndex: OpenAILike and OpenAILikeEmbedding."""

from __future__ import annotations

from typing import Any

import pytest
from harness import Server
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

SUM = [ChatMessage(role="user", content="What is 3 + 4?")]
EXTRACT = "Extract the name and city as JSON: Ana Berg moved to Oslo on 4 May 2021."


class Person(BaseModel):
    name: str
    city: str


@pytest.fixture
def model(demo_server: Server) -> OpenAILike:
    return OpenAILike(
        model="demo",
        api_base=f"{demo_server.url}/v1",
        api_key="none",
        temperature=0,
        max_tokens=200,
        max_retries=0,
        is_chat_model=True,
        is_function_calling_model=True,
        should_use_structured_outputs=True,
    )


def test_chat(model: OpenAILike) -> None:
    assert model.chat(SUM).message.content == "3 + 4 = 7"
    pieces = [each.delta or "" for each in model.stream_chat(SUM)]
    assert "".join(pieces) == "3 + 4 = 7"


def test_a_call(model: OpenAILike) -> None:
    def get_weather(city: str) -> str:
        """Get the weather"""
        return "sunny"

    tools: Any = [FunctionTool.from_defaults(get_weather)]
    made = model.chat_with_tools(tools, user_msg="What is the weather in Paris?")
    [call] = model.get_tool_calls_from_response(made)
    assert (call.tool_name, call.tool_kwargs) == ("get_weather", {"city": "Paris"})


def test_structured_output(model: OpenAILike) -> None:
    structured = model.as_structured_llm(Person)
    made = structured.chat([ChatMessage(role="user", content=EXTRACT)])
    assert made.raw == Person(name="Ana Berg", city="Oslo")


def test_text_completion(demo_server: Server, model: OpenAILike) -> None:
    ask = {"prompt": "1 + 2 =", "max_tokens": 6, "temperature": 0}
    expected = demo_server.post("/v1/completions", {"model": "demo", **ask})
    plain = model.model_copy(update={"is_chat_model": False, "max_tokens": 6})
    assert plain.complete("1 + 2 =").text == expected["choices"][0]["text"]


def test_embeddings(demo_server: Server) -> None:
    texts = ["one two", "three"]
    vectors = OpenAILikeEmbedding(
        model_name="embedder", api_base=f"{demo_server.url}/v1", api_key="none"
    )
    expected = demo_server.post("/v1/embeddings", {"model": "embedder", "input": texts})["data"]
    for ours, raw in zip(vectors.get_text_embedding_batch(texts), expected, strict=True):
        assert ours == pytest.approx(raw["embedding"], abs=1e-6)
