"""LangChain: ChatOpenAI over chats and over Responses, OpenAIEmbeddings."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from harness import Server
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

SUM = "What is 3 + 4?"
WEATHER = "What is the weather in Paris?"
EXTRACT = "Extract the name and city as JSON: Ana Berg moved to Oslo on 4 May 2021."


class Person(BaseModel):
    """Extract the name and city"""

    name: str
    city: str


@tool
def get_weather(city: str) -> str:
    """Get the weather"""
    return '{"weather": "sunny"}'


@pytest.fixture(params=["chat", "responses"])
def model(request: pytest.FixtureRequest, demo_server: Server) -> ChatOpenAI:
    return chat(demo_server, use_responses_api=request.param == "responses")


def chat(server: Server, **more: Any) -> ChatOpenAI:
    common = {"model": "demo", "temperature": 0, "max_tokens": 200, "max_retries": 0}
    return ChatOpenAI(
        **common, base_url=f"{server.url}/v1", api_key="none", stream_usage=True, **more
    )


def test_invoke_stream_and_batch(model: ChatOpenAI) -> None:
    whole = model.invoke(SUM)
    assert whole.text == "3 + 4 = 7"
    assert whole.usage_metadata is not None and whole.usage_metadata["output_tokens"] > 1
    chunks = list(model.stream(SUM))
    assert len(chunks) > 2 and "".join(chunk.text for chunk in chunks) == "3 + 4 = 7"
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert total.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]
    assert [each.text for each in model.batch([SUM, SUM])] == ["3 + 4 = 7"] * 2


async def test_a_chain_asynchronously(model: ChatOpenAI) -> None:
    chain = ChatPromptTemplate.from_messages([("human", "What is {a} + {b}?")]) | model
    pieces = [piece async for piece in (chain | StrOutputParser()).astream({"a": 3, "b": 4})]
    assert "".join(pieces) == "3 + 4 = 7"


def test_a_tool_and_its_result(model: ChatOpenAI) -> None:
    bound = model.bind_tools([get_weather])
    first = bound.invoke(WEATHER)
    assert isinstance(first, AIMessage)
    [call] = first.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    streamed: Any = None
    for chunk in bound.stream(WEATHER):
        streamed = chunk if streamed is None else streamed + chunk
    [again] = streamed.tool_calls
    assert again["args"] == call["args"]
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    assert "sunny" in bound.invoke([HumanMessage(WEATHER), first, result]).text


@pytest.mark.parametrize("choice", ["any", "get_weather"])
def test_a_call_that_is_asked_for(model: ChatOpenAI, choice: str) -> None:
    made = model.bind_tools([get_weather], tool_choice=choice).invoke(WEATHER)
    assert [call["args"] for call in made.tool_calls] == [{"city": "Paris"}]  # type: ignore[attr-defined]


@pytest.mark.parametrize("strict", [None, True, False])
def test_structured_output_by_a_schema(model: ChatOpenAI, strict: bool | None) -> None:
    structured = model.with_structured_output(Person, method="json_schema", strict=strict)
    assert structured.invoke(EXTRACT) == Person(name="Ana Berg", city="Oslo")
    assert list(structured.stream(EXTRACT))[-1] == Person(name="Ana Berg", city="Oslo")


def test_structured_output_by_a_function(model: ChatOpenAI) -> None:
    structured = model.with_structured_output(Person, method="function_calling")
    made = structured.invoke(EXTRACT)
    # The model was never shown a tool that extracts: the schema holds, the values are its own.
    assert isinstance(made, Person) and made.name and made.city


def test_structured_output_in_json_mode(model: ChatOpenAI) -> None:
    structured = model.with_structured_output(Person, method="json_mode")
    assert structured.invoke(EXTRACT) == Person(name="Ana Berg", city="Oslo")


def test_log_probabilities(demo_server: Server) -> None:
    made = chat(demo_server, logprobs=True, top_logprobs=2).invoke(SUM)
    entries = made.response_metadata["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries).strip() == made.text


def test_text_completion(demo_server: Server) -> None:
    ask = {"temperature": 0, "max_tokens": 6}
    model = OpenAI(model="demo", base_url=f"{demo_server.url}/v1", api_key="none", **ask)
    expected = demo_server.post("/v1/completions", {"model": "demo", "prompt": "1 + 2 =", **ask})
    assert model.invoke("1 + 2 =") == expected["choices"][0]["text"]
    assert "".join(model.stream("1 + 2 =")) == expected["choices"][0]["text"]


def test_embeddings(demo_server: Server) -> None:
    """By text. Otherwise the client cuts with tiktoken, whose ids are those of OpenAI's models
    and whose files come from the Internet."""
    vectors = OpenAIEmbeddings(
        model="embedder",
        base_url=f"{demo_server.url}/v1",
        api_key="none",
        check_embedding_ctx_length=False,
    )
    texts = ["one two", "three"]
    expected = demo_server.post("/v1/embeddings", {"model": "embedder", "input": texts})["data"]
    for ours, raw in zip(vectors.embed_documents(texts), expected, strict=True):
        assert ours == pytest.approx(raw["embedding"], abs=1e-6)
    assert vectors.embed_query(texts[1]) == pytest.approx(expected[1]["embedding"], abs=1e-5)


def test_errors(model: ChatOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        model.bind(temperature=9).invoke(SUM)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        model.bind(model="other").invoke(SUM)
