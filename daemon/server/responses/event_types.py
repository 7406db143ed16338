"""What the events of a streamed response say, for the schema; `events.py` writes them, and tests
hold it to these types."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from quantd.daemon.server.logprobs import ChatTokenLogprob
from quantd.daemon.server.responses.items import AnyItem, OutputText, ReasoningText
from quantd.daemon.server.responses.object import ResponseObject


class _Event(Struct, kw_only=True):
    sequence_number: int


class _OfItem(_Event, kw_only=True):
    item_id: str
    output_index: int


class _OfPart(_OfItem, kw_only=True):
    content_index: int


class OfResponse(_Event, kw_only=True):
    type: Literal[
        "response.created",
        "response.queued",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: ResponseObject


class ItemChanged(_Event, kw_only=True):
    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: AnyItem


class PartChanged(_OfPart, kw_only=True):
    type: Literal["response.content_part.added", "response.content_part.done"]
    part: OutputText | ReasoningText


class TextDelta(_OfPart, kw_only=True):
    type: Literal["response.output_text.delta"]
    delta: str
    logprobs: list[ChatTokenLogprob]


class TextDone(_OfPart, kw_only=True):
    type: Literal["response.output_text.done"]
    text: str
    logprobs: list[ChatTokenLogprob]


class ReasoningDelta(_OfPart, kw_only=True):
    type: Literal["response.reasoning_text.delta"]
    delta: str


class ReasoningDone(_OfPart, kw_only=True):
    type: Literal["response.reasoning_text.done"]
    text: str


class ArgumentsDelta(_OfItem, kw_only=True):
    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDone(_OfItem, kw_only=True):
    type: Literal["response.function_call_arguments.done"]
    arguments: str
    name: str


class Failed(_Event, kw_only=True):
    """In place of a response that never began."""

    type: Literal["error"]
    code: str | None
    message: str
    param: str | None
