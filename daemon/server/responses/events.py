"""An answer's parts as the events of the Responses API, and the output that they add up to.

The order is OpenAI's: each item is added, its content part too, then come its deltas, and both are
done before the next item is added. Every event has the next number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from quantd.daemon.errors import QuantdError
from quantd.daemon.server.choice import is_object
from quantd.daemon.server.logprobs import ChatLogprobs
from quantd.daemon.server.responses.items import (
    CallItem,
    MessageItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    Status,
)
from quantd.daemon.server.responses.object import ResponseObject
from quantd.daemon.server.schemas import Json
from quantd.daemon.store.rows import new_id
from quantd.daemon.text.answer import CallArguments, CallStart, Content, Part, Reasoning

_encode = msgspec.json.encode
ENDS = {
    "completed": "response.completed",
    "incomplete": "response.incomplete",
    "failed": "response.failed",
    "cancelled": "response.failed",
}
"""A status that is an end → its event."""


class Writer:
    """Fills in `response.output`; each call returns the events of what it changes, encoded."""

    def __init__(self, response: ResponseObject) -> None:
        self._response = response
        self._number = 0
        self._texts: list[str] = []
        """Of the item that is open."""
        self._head = b""
        """What all deltas of that item have in common."""

    def begin(self, *kinds: str) -> bytes:
        """Events of the response as a whole: created, queued, in_progress."""
        return b"".join(self._whole(f"response.{kind}") for kind in kinds)

    def take(self, parts: Iterable[Part], logprobs: ChatLogprobs | None = None) -> bytes:
        """`logprobs` are of all of the parts' tokens and go with the first text."""
        entries: Sequence[Json] = [] if logprobs is None else logprobs.content
        data: list[bytes] = []
        for part in parts:
            data += self._take(part, entries)
            if isinstance(part, Content):
                entries = []
        return b"".join(data)

    def end(self, status: Status) -> bytes:
        """Of the last item. A silent model has said an empty message."""
        data: list[bytes] = []
        if not self._response.output and status == "completed":
            data += self._open_message()
        return b"".join([*data, *self._close(status)])

    def finish(self) -> bytes:
        """The last event; the response has its final status."""
        return self._whole(ENDS[self._response.status])

    # --- items -------------------------------------------------------------------------------

    def _take(self, part: Part, entries: Sequence[Json]) -> Iterator[bytes]:
        if isinstance(part, CallStart):
            yield from self._close("completed")
            yield from self._open(CallItem(new_id("fc_"), part.id, part.name, "", "in_progress"))
            kind = "response.function_call_arguments.delta"
            self._head = self._delta_head(kind, has_parts=False)
        elif isinstance(part, CallArguments):
            self._texts.append(part.text)
            yield self._delta(part.text)
        elif isinstance(part, Reasoning):
            if not isinstance(self._last, ReasoningItem):
                yield from self._close("completed")
                yield from self._open_reasoning()
            self._texts.append(part.text)
            yield self._delta(part.text)
        else:
            if not isinstance(self._last, MessageItem):
                yield from self._close("completed")
                yield from self._open_message()
            self._texts.append(part.text)
            last = self._last.content[0] if isinstance(self._last, MessageItem) else None
            assert isinstance(last, OutputText)
            last.logprobs = [*last.logprobs, *entries]
            yield self._delta(part.text, entries)

    @property
    def _last(self) -> Any:
        """The open item, if one is."""
        return self._response.output[-1] if self._head else None

    def _open_message(self) -> Iterator[bytes]:
        yield from self._open(MessageItem(new_id("msg_"), "assistant", [], "in_progress"))
        yield from self._open_part(OutputText("", [], []), "response.output_text.delta")

    def _open_reasoning(self) -> Iterator[bytes]:
        yield from self._open(ReasoningItem(new_id("rs_"), [], [], "in_progress"))
        yield from self._open_part(ReasoningText(""), "response.reasoning_text.delta")

    def _open(self, item: MessageItem | CallItem | ReasoningItem) -> Iterator[bytes]:
        self._response.output.append(item)
        self._texts = []
        yield self._event("response.output_item.added", output_index=self._index, item=item)

    def _open_part(self, part: OutputText | ReasoningText, delta: str) -> Iterator[bytes]:
        item = self._response.output[-1]
        assert isinstance(item, MessageItem | ReasoningItem)
        item.content.append(part)  # type: ignore[arg-type]
        yield self._of_part("response.content_part.added", part=part)
        self._head = self._delta_head(delta, has_parts=True)

    def _close(self, status: Status) -> Iterator[bytes]:
        item = self._last
        if item is None:
            return
        text = "".join(self._texts)
        item.status = status
        if isinstance(item, CallItem):
            item.arguments = text
            if not is_object(text):
                item.status = "incomplete"
            yield self._of_item(
                "response.function_call_arguments.done", arguments=text, name=item.name
            )
        elif isinstance(item, ReasoningItem):
            item.content[0].text = text
            yield self._of_part("response.reasoning_text.done", text=text)
            yield self._of_part("response.content_part.done", part=item.content[0])
        else:
            part = item.content[0]
            part.text = text
            yield self._of_part("response.output_text.done", text=text, logprobs=part.logprobs)
            yield self._of_part("response.content_part.done", part=part)
        yield self._event("response.output_item.done", output_index=self._index, item=item)
        self._head = b""

    # --- events ------------------------------------------------------------------------------

    @property
    def _index(self) -> int:
        return len(self._response.output) - 1

    def _whole(self, kind: str) -> bytes:
        return self._event(kind, response=self._response)

    def _of_item(self, kind: str, **fields: Any) -> bytes:
        item = self._response.output[-1]
        return self._event(kind, item_id=item.id, output_index=self._index, **fields)

    def _of_part(self, kind: str, **fields: Any) -> bytes:
        return self._of_item(kind, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._next(), **fields}
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), _encode(data))

    def _delta_head(self, kind: str, has_parts: bool) -> bytes:
        """A token's event is mostly the same bytes each time."""
        index = b'"content_index":0,' if has_parts else b""
        return b'event: %b\ndata: {"type":%b,"item_id":%b,"output_index":%d,%b' % (
            kind.encode(),
            _encode(kind),
            _encode(self._response.output[-1].id),
            self._index,
            index,
        )

    def _delta(self, text: str, entries: Sequence[Json] | None = None) -> bytes:
        logprobs = b"" if entries is None else b',"logprobs":' + _encode(entries)
        return b'%b"sequence_number":%d,"delta":%b%b}\n\n' % (
            self._head,
            self._next(),
            _encode(text),
            logprobs,
        )

    def _next(self) -> int:
        number = self._number
        self._number += 1
        return number


def error_event(error: QuantdError) -> bytes:
    """In place of a response that never began."""
    data = {
        "type": "error",
        "sequence_number": 0,
        "code": error.error_code,
        "message": error.message,
        "param": error.param,
    }
    return b"event: error\ndata: %b\n\n" % _encode(data)
