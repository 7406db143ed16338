"""Events of the Responses API: their order, their numbers, and that the SDK's types take them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai._models import construct_type
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from quantd.daemon.server.responses.events import Writer
from quantd.daemon.server.responses.object import ResponseObject, new_object
from quantd.daemon.server.responses.request import ResponseBody, check
from quantd.daemon.text.answer import CallArguments, CallStart, Content, Part, Reasoning, joined

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def response() -> ResponseObject:
    return new_object("resp_1", 1, "m", check(ResponseBody(model="m", input="x")), "in_progress")


def events_of(data: bytes) -> list[dict[str, Any]]:
    """Each one is what the SDK's own types say, strictly."""
    assert data.endswith(b"\n\n")
    events = []
    for text in data[:-2].split(b"\n\n"):
        kind, _, body = text.partition(b"\n")
        event = json.loads(body.removeprefix(b"data: "))
        assert kind == b"event: " + event["type"].encode()
        EVENT.validate_python(event)
        assert construct_type(type_=ResponseStreamEvent, value=event).type == event["type"]
        events.append(event)
    return events


def write(parts: list[Part], status: Any = "completed") -> tuple[ResponseObject, list[Any]]:
    made = response()
    writer = Writer(made)
    data = writer.begin("created", "in_progress")
    for part in parts:
        data += writer.take([part])
    data += writer.end(status)
    made.status = status
    return made, events_of(data + writer.finish())


def test_text() -> None:
    made, events = write([Content("Hel"), Content("lo")])
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event["sequence_number"] for event in events] == list(range(10))
    assert events[2]["item"]["status"] == "in_progress" and events[2]["item"]["content"] == []
    assert events[-2]["item"] == events[-1]["response"]["output"][0]
    final = Response.model_validate(events[-1]["response"])
    assert final.output_text == "Hello"
    assert made.output


def test_reasoning_text_and_calls() -> None:
    _, events = write(
        [
            Reasoning("Let me "),
            Reasoning("see"),
            Content("I ask."),
            CallStart(0, "call_a", "weather"),
            CallArguments(0, '{"city":'),
            CallArguments(0, '"Oslo"}'),
            CallStart(1, "call_b", "time"),
        ]
    )
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[2:8] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
    ]
    assert kinds[-8:] == [
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    assert output[0]["content"][0]["text"] == "Let me see"
    assert (output[2]["call_id"], output[2]["arguments"]) == ("call_a", '{"city":"Oslo"}')
    assert (output[3]["name"], output[3]["arguments"]) == ("time", "")


def test_an_answer_that_was_cut_off() -> None:
    _, events = write([Content("Hel")], "incomplete")
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["output"][0]["status"] == "incomplete"


def test_a_silent_model_has_said_an_empty_message() -> None:
    _, events = write([])
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == ""


PARTS = st.lists(
    st.one_of(
        st.text(min_size=1, max_size=5).map(Content),
        st.text(min_size=1, max_size=5).map(Reasoning),
        st.lists(st.text(min_size=1, max_size=4), max_size=3),
    ),
    max_size=8,
)


@given(PARTS)
def test_deltas_add_up_and_nothing_is_out_of_order(drawn: list[Any]) -> None:
    parts: list[Part] = []
    num_calls = 0
    for part in drawn:
        if isinstance(part, list):
            parts.append(CallStart(num_calls, f"call_{num_calls}", "f"))
            parts += [CallArguments(num_calls, text) for text in part]
            num_calls += 1
        else:
            parts.append(part)
    made, events = write(parts)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    texts: dict[str, str] = {}
    open_item: str | None = None
    for event in events:
        kind = event["type"]
        if kind == "response.output_item.added":
            assert open_item is None
            open_item = event["item"]["id"]
        elif kind == "response.output_item.done":
            assert open_item == event["item"]["id"]
            open_item = None
        elif "item_id" in event:
            assert event["item_id"] == open_item
        if kind.endswith(".delta"):
            texts[event["item_id"]] = texts.get(event["item_id"], "") + event["delta"]
    assert open_item is None
    for item in events[-1]["response"]["output"]:
        if item["type"] == "function_call":
            said = item["arguments"]
        else:
            said = item["content"][0]["text"]
        assert texts.get(item["id"], "") == said
    whole, _ = write(joined(parts))
    assert [type(item) for item in whole.output] == [type(item) for item in made.output]


@pytest.mark.parametrize("status", ["completed", "incomplete", "failed"])
def test_every_end_has_its_event(status: str) -> None:
    made = response()
    writer = Writer(made)
    data = writer.begin("created")
    made.status = status
    assert events_of(data + writer.finish())[-1]["type"] == f"response.{status}"
