"""An answer's parts as OpenAI's chat messages: whole, and as deltas."""

from __future__ import annotations

import msgspec

from quantd.daemon.text.answer import CallStart, Content, Part, Reasoning, WholeAnswer

_encode = msgspec.json.encode
_NOTHING = Content("")


class CallFunction(msgspec.Struct):
    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    id: str
    function: CallFunction
    type: str = "function"


class ReplyMessage(msgspec.Struct):
    content: str | None
    role: str = "assistant"
    refusal: str | None = None
    reasoning: str | msgspec.UnsetType = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    """The same under its older name, which many clients read."""
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


def message(answer: WholeAnswer, *, hides_reasoning: bool) -> ReplyMessage:
    """Content is null where the model said something else instead."""
    reasoning = (not hides_reasoning and answer.reasoning) or msgspec.UNSET
    is_silent = not answer.content and (answer.calls or answer.reasoning)
    return ReplyMessage(
        content=None if is_silent else answer.content,
        reasoning=reasoning,
        reasoning_content=reasoning,
        tool_calls=[
            ToolCall(call.id, CallFunction(call.name, call.arguments)) for call in answer.calls
        ]
        or msgspec.UNSET,
    )


def delta_member(part: Part = _NOTHING) -> bytes:
    """One part as the `"delta":{…}` of a chunk."""
    if isinstance(part, Content):
        return b'"delta":{"content":' + _encode(part.text) + b"}"
    if isinstance(part, Reasoning):
        text = _encode(part.text)
        return b'"delta":{"reasoning":%b,"reasoning_content":%b}' % (text, text)
    if isinstance(part, CallStart):
        call = b'"id":%b,"type":"function","function":{"name":%b,"arguments":""}' % (
            _encode(part.id),
            _encode(part.name),
        )
    else:
        call = b'"function":{"arguments":' + _encode(part.text) + b"}"
    return b'"delta":{"tool_calls":[{"index":%d,%b}]}' % (part.call, call)
