"""An answer's parts as Anthropic's content blocks: whole, and as events.

The order of events is Anthropic's: message_start, a ping, the blocks one after the other (start,
deltas, stop), message_delta with the reason of the end and the usage, message_stop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from quantd.daemon.server.filtered import PromptResult, Results, prompt_results, results_of
from quantd.daemon.server.limits import shown_as
from quantd.daemon.server.schemas import Json
from quantd.daemon.text.answer import CallArguments, CallStart, Content, Part, Reasoning

if TYPE_CHECKING:
    from quantd.daemon.server.choice import Delta
    from quantd.daemon.server.generate import Generation

_encode = msgspec.json.encode
_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}


class OutputDetails(msgspec.Struct):
    thinking_tokens: int


class Usage(msgspec.Struct):
    input_tokens: int
    """Without those that were cached, as Anthropic counts."""
    output_tokens: int
    output_tokens_details: OutputDetails
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0
    """What Anthropic bills for; here nothing is."""


class MessageObject(msgspec.Struct):
    id: str
    model: str
    content: list[Annotated[Json, shown_as("anthropic.event_types.AnyBlock")]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: Usage
    type: str = "message"
    role: str = "assistant"
    content_filter_results: Results | msgspec.UnsetType = msgspec.UNSET
    """Not Anthropic's: what the safety filter has found in it."""
    prompt_filter_results: list[PromptResult] | msgspec.UnsetType = msgspec.UNSET


def message_object(made: Generation, result: Delta, *, shows_thinking: bool) -> MessageObject:
    reason, sequence = stop_of(made, result)
    content = list(_blocks(result.parts, shows_thinking))
    return MessageObject(
        made.id,
        made.model,
        content,
        reason,
        sequence,
        usage_of(made),
        content_filter_results=results_of(result.filtered),
        prompt_filter_results=prompt_results(made),
    )


def usage_of(made: Generation) -> Usage:
    usage = made.usage()
    num_cached = usage.prompt_tokens_details.cached_tokens
    thinking = OutputDetails(usage.completion_tokens_details.reasoning_tokens)
    return Usage(usage.prompt_tokens - num_cached, usage.completion_tokens, thinking, num_cached)


def stop_of(made: Generation, delta: Delta) -> tuple[str, str | None]:
    """stop_reason and stop_sequence of a delta that is the end."""
    if delta.finish_reason == "stop" and isinstance(delta.stop_reason, str):
        return "stop_sequence", delta.stop_reason
    wanted = made.options.max_tokens
    if delta.finish_reason == "length" and wanted is not None:
        if made.choices[0].num_tokens < wanted:
            return "model_context_window_exceeded", None
    return _REASONS[delta.finish_reason or "stop"], None


def _blocks(parts: Sequence[Part], shows_thinking: bool) -> Iterator[dict[str, Json]]:
    """Each with all that it says. A call that was cut off has what could not be read left out."""
    open: tuple[dict[str, Json], str, list[str]] | None = None
    for part in parts:
        if isinstance(part, Reasoning) and not shows_thinking:
            continue
        start = _start(part)
        if open is None or isinstance(part, CallStart) or not _goes_on(open[0], part):
            if open is not None:
                yield _closed(*open)
            open = (start, _DELTAS[start["type"]][1], [])
        if not isinstance(part, CallStart):
            open[2].append(part.text)
    if open is not None:
        yield _closed(*open)


def _closed(block: dict[str, Json], name: str, texts: list[str]) -> dict[str, Json]:
    text = "".join(texts)
    if block["type"] != "tool_use":
        return {**block, name: text}
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        value = None
    return {**block, "input": value if isinstance(value, dict) else {}}


_DELTAS = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}
"""A block's type → the type of its deltas, and the field that has the text."""


def _start(part: Part) -> dict[str, Json]:
    """The block that a part opens, as it is before any text."""
    if isinstance(part, Content):
        return {"type": "text", "text": ""}
    if isinstance(part, Reasoning):
        # Nothing is signed here; the SDKs want the field.
        return {"type": "thinking", "thinking": "", "signature": ""}
    if isinstance(part, CallStart):
        return {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}
    return {"type": "tool_use"}


def _goes_on(block: dict[str, Json], part: Part) -> bool:
    if isinstance(part, CallArguments):
        return True
    kind = "text" if isinstance(part, Content) else "thinking"
    return bool(block["type"] == kind)


class MessageEvents:
    """Deltas as events; made anew for each stream."""

    def __init__(self, made: Generation, *, shows_thinking: bool) -> None:
        self._made = made
        self._shows_thinking = shows_thinking
        self._is_begun = False
        self._open: dict[str, Json] | None = None
        self._index = -1
        self._head = b""
        """What all deltas of the open block have in common."""
        self._last: Delta | None = None

    def encode(self, delta: Delta) -> bytes:
        data = [] if self._is_begun else [self._begin()]
        for part in delta.parts:
            if self._shows_thinking or not isinstance(part, Reasoning):
                data += self._take(part)
        if delta.finish_reason is not None:
            self._last = delta
        return b"".join(data)

    def end(self) -> bytes:
        assert self._last is not None, "the one choice has ended"
        reason, sequence = stop_of(self._made, self._last)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        found = {
            "content_filter_results": results_of(self._last.filtered),
            "prompt_filter_results": prompt_results(self._made),
        }
        extra = {name: value for name, value in found.items() if value is not msgspec.UNSET}
        return b"".join(
            [
                *self._close(),
                event("message_delta", delta=delta, usage=usage_of(self._made), **extra),
                event("message_stop"),
            ]
        )

    def _begin(self) -> bytes:
        self._is_begun = True
        made = self._made
        usage = msgspec.structs.replace(
            usage_of(made), output_tokens=0, output_tokens_details=OutputDetails(0)
        )
        message = MessageObject(made.id, made.model, [], None, None, usage)
        return event("message_start", message=message) + event("ping")

    def _take(self, part: Part) -> Iterator[bytes]:
        if isinstance(part, CallStart) or self._open is None or not _goes_on(self._open, part):
            yield from self._close()
            self._index += 1
            self._open = _start(part)
            yield event("content_block_start", index=self._index, content_block=self._open)
            kind, name = _DELTAS[self._open["type"]]
            self._head = (
                b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,'
                b'"delta":{"type":"%b","%b":' % (self._index, kind.encode(), name.encode())
            )
        if not isinstance(part, CallStart):
            yield self._head + _encode(part.text) + b"}}\n\n"

    def _close(self) -> Iterator[bytes]:
        if self._open is not None:
            self._open = None
            yield event("content_block_stop", index=self._index)


def event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), _encode({"type": kind, **fields}))
