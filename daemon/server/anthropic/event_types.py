"""What the events of a stream of Anthropic's say, for the schema. `events.py` writes them; tests
hold it to these types."""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType

from quantd.daemon.server.anthropic.errors import ErrorDetail
from quantd.daemon.server.anthropic.events import MessageObject, Usage
from quantd.daemon.server.filtered import PromptResult, Results
from quantd.daemon.server.schemas import Json


class TextBlock(Struct, tag="text"):
    text: str


class ThinkingBlock(Struct, tag="thinking"):
    thinking: str
    signature: str


class ToolUseBlock(Struct, tag="tool_use"):
    id: str
    name: str
    input: dict[str, Json]


AnyBlock = TextBlock | ThinkingBlock | ToolUseBlock


class TextDelta(Struct, tag="text_delta"):
    text: str


class ThinkingDelta(Struct, tag="thinking_delta"):
    thinking: str


class InputJsonDelta(Struct, tag="input_json_delta"):
    partial_json: str


class StopDelta(Struct):
    stop_reason: str
    stop_sequence: str | None


class MessageStart(Struct, tag="message_start"):
    message: MessageObject


class Ping(Struct, tag="ping"):
    pass


class BlockStart(Struct, tag="content_block_start"):
    index: int
    content_block: AnyBlock


class BlockDelta(Struct, tag="content_block_delta"):
    index: int
    delta: TextDelta | ThinkingDelta | InputJsonDelta


class BlockStop(Struct, tag="content_block_stop"):
    index: int


class MessageDelta(Struct, tag="message_delta"):
    delta: StopDelta
    usage: Usage
    content_filter_results: Results | UnsetType = UNSET
    prompt_filter_results: list[PromptResult] | UnsetType = UNSET


class MessageStop(Struct, tag="message_stop"):
    pass


class Failed(Struct, tag="error"):
    error: ErrorDetail
    request_id: str


AnyEvent = (
    MessageStart | Ping | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | Failed
)
