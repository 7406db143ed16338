"""Pydantic AI: agents over chats and over Responses."""

from __future__ import annotations

import pytest
from harness import Server
from pydantic import BaseModel
from pydantic_ai import Agent, ModelHTTPError, NativeOutput, ToolOutput
from pydantic_ai.models import Model
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

SUM = "What is 3 + 4?"
WEATHER = "What is the weather in Paris?"
EXTRACT = "Extract the name and city as JSON: Ana Berg moved to Oslo on 4 May 2021."


class Person(BaseModel):
    """Extract the name and city"""

    name: str
    city: str


@pytest.fixture(params=[OpenAIChatModel, OpenAIResponsesModel])
def model(request: pytest.FixtureRequest, demo_server: Server) -> Model:
    provider = OpenAIProvider(base_url=f"{demo_server.url}/v1", api_key="none")
    made: Model = request.param(
        "demo", provider=provider, settings={"temperature": 0, "max_tokens": 200}
    )
    return made


async def test_run_and_stream(model: Model) -> None:
    agent = Agent(model)
    whole = await agent.run(SUM)
    assert whole.output == "3 + 4 = 7" and whole.usage.output_tokens > 1
    async with agent.run_stream(SUM) as stream:
        pieces = [piece async for piece in stream.stream_text(delta=True, debounce_by=None)]
    assert len(pieces) > 1 and "".join(pieces) == "3 + 4 = 7"
    assert stream.usage.output_tokens == whole.usage.output_tokens


async def test_a_conversation(model: Model) -> None:
    agent = Agent(model, instructions="Be brief.")
    first = await agent.run(SUM)
    second = await agent.run("What is 5 + 4?", message_history=first.all_messages())
    assert "9" in second.output
    assert second.usage.input_tokens > first.usage.input_tokens


@pytest.mark.parametrize("stream", [False, True])
async def test_an_agent_with_a_tool(model: Model, stream: bool) -> None:
    agent = Agent(model)
    asked = []

    @agent.tool_plain
    def get_weather(city: str) -> dict[str, str]:
        """Get the weather"""
        asked.append(city)
        return {"weather": "sunny"}

    if stream:
        async with agent.run_stream(WEATHER) as running:
            output = await running.get_output()
    else:
        output = (await agent.run(WEATHER)).output
    assert asked == ["Paris"] and "sunny" in output


async def test_an_output_type_by_a_schema(model: Model) -> None:
    agent = Agent(model, output_type=NativeOutput(Person))
    assert (await agent.run(EXTRACT)).output == Person(name="Ana Berg", city="Oslo")
    async with agent.run_stream(EXTRACT) as stream:
        partial = [each async for each in stream.stream_output(debounce_by=None)]
    assert len(partial) > 1 and partial[-1] == Person(name="Ana Berg", city="Oslo")


async def test_an_output_type_by_a_tool(model: Model) -> None:
    agent = Agent(model, output_type=ToolOutput(Person))
    made = (await agent.run(EXTRACT)).output
    # The model was never shown a tool that extracts: the schema holds, the values are its own.
    assert isinstance(made, Person) and made.name and made.city


async def test_errors(model: Model) -> None:
    agent = Agent(model)
    with pytest.raises(ModelHTTPError, match="temperature") as caught:
        await agent.run(SUM, model_settings={"temperature": 9})
    assert caught.value.status_code == 400
