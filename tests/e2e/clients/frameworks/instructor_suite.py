"""Instructor: its modes of tools and of schemas, whole, partial and as a list."""

from __future__ import annotations

from typing import Any

import instructor
import openai
import pytest
from harness import Server
from pydantic import BaseModel

EXTRACT = "Extract the name and city as JSON: Ana Berg moved to Oslo on 4 May 2021."
ASK: dict[str, Any] = {
    "model": "demo",
    "temperature": 0,
    "max_tokens": 200,
    "max_retries": 0,
    "messages": [{"role": "user", "content": EXTRACT}],
}
ANA = {"name": "Ana Berg", "city": "Oslo"}


class Person(BaseModel):
    """Extract the name and city"""

    name: str
    city: str


@pytest.fixture(params=["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA", "JSON"])
def mode(request: pytest.FixtureRequest) -> instructor.Mode:
    return instructor.Mode[request.param]


@pytest.fixture
def client(demo_server: Server, mode: instructor.Mode) -> instructor.Instructor:
    raw = openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0)
    return instructor.from_openai(raw, mode=mode)


def check(made: Any, mode: instructor.Mode) -> None:
    """By a schema the model says what it has learnt; tools and prompts that extract are new to
    it, so there the type is what holds."""
    assert isinstance(made, Person) and made.name and made.city
    if mode is instructor.Mode.JSON_SCHEMA:
        assert made.model_dump() == ANA


def test_create(client: instructor.Instructor, mode: instructor.Mode) -> None:
    made, raw = client.create_with_completion(**ASK, response_model=Person)
    check(made, mode)
    assert raw.usage.completion_tokens > 1


def test_partial(client: instructor.Instructor, mode: instructor.Mode) -> None:
    partial = list(client.create_partial(**ASK, response_model=Person))
    assert len(partial) > 2 and partial[0].city is None
    last = Person.model_validate(partial[-1].model_dump())
    check(last, mode)
