"""One response from its checked body to what is kept of it."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

import msgspec
import structlog

from quantd.daemon.errors import DeadlineExceeded, QuantdError, QueueFull, RequestError
from quantd.daemon.scheduler.admission import usable_context
from quantd.daemon.server import chat
from quantd.daemon.server.choice import Delta
from quantd.daemon.server.context import Asker
from quantd.daemon.server.errors import internal_error
from quantd.daemon.server.filtered import prompt_results, results_of
from quantd.daemon.server.generate import Api, Generation, generation
from quantd.daemon.server.logprobs import chat_logprobs
from quantd.daemon.server.messages import check_messages
from quantd.daemon.server.prompts import Change, Prompt, PromptSource
from quantd.daemon.server.responses.events import Writer
from quantd.daemon.server.responses.items import AnyItem, MessageItem, Reference, keep, kept, turns
from quantd.daemon.server.responses.object import (
    IncompleteDetails,
    ResponseObject,
    fail,
    new_object,
    usage_of,
)
from quantd.daemon.server.responses.request import ContextBody, Wanted, all_messages, renamed
from quantd.daemon.server.retry import collect_valid
from quantd.daemon.server.sampling import Options
from quantd.daemon.server.schemas import ChatBody
from quantd.daemon.store import Response
from quantd.daemon.store.items import size
from quantd.daemon.text.answer import joined

if TYPE_CHECKING:
    from quantd.daemon.text import TextModel

_log = structlog.get_logger("quantd.responses")

_API = Api(
    "resp_",
    MappingProxyType({"prompt": "input", "max_tokens": "max_output_tokens"}),
    takes_parts=True,
)


Begin = Callable[[Options], AbstractAsyncContextManager[Generation]]
_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}


class Run:
    """Used once: by `events`, or by `whole`. Nothing is kept of one whose client has left."""

    def __init__(self, asker: Asker, wanted: Wanted) -> None:
        """Raises ModelNotFound."""
        self._asker = asker
        self._wanted = wanted
        self._number = uuid.uuid4().hex
        self.response = new_object(
            _API.id_prefix + self._number,
            int(asker.clock.wall()),
            asker.fleet.resolve(wanted.body.model),
            wanted,
            "queued" if wanted.body.background else "in_progress",
        )
        self._writer = Writer(self.response)
        self._said: list[AnyItem] = []
        """Before this response, in its chain or conversation."""
        self._inputs: list[AnyItem] = []
        self._is_begun = False
        """There were events, so an error is one too."""
        self._sent: list[bytes] | None = None
        """All events, when they are kept as well."""
        self._has_ended = False
        """It is kept, if it is to be."""

    @property
    def _mark(self) -> str:
        """What its blocks go with: the conversation has what is said in it; empty: nothing."""
        if not self._wanted.is_kept:
            return ""
        return self._wanted.conversation or self.response.id

    async def whole(self) -> ResponseObject:
        """Raises what has ended it badly."""
        try:
            async with self._asker.state.turns.of(self._wanted.conversation):
                async with self._generation() as made:
                    [delta] = await collect_valid(made, self._asker.context.metrics)
                    delta.parts = joined(delta.parts)
                    self._take(made, delta)
                    self._complete(made, delta)
                await self._keep(b"")
        finally:
            self._leave()
        return self.response

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Encoded; the last one is sent when all is kept. Raises what ends it before the first."""
        try:
            async with self._asker.state.turns.of(self._wanted.conversation):
                async with self._generation() as made:
                    yield self._out(await self._begin(made))
                    async with aclosing(made.deltas()) as deltas:
                        async for delta in deltas:
                            data = self._take(made, delta)
                            if delta.finish_reason is not None:
                                data += self._complete(made, delta)
                            if data:
                                yield self._out(data)
                last = self._writer.finish()
                await self._keep(last)
            yield last
        except Exception as error:
            if not self._is_begun:
                raise
            yield await self._fail(error)
        finally:
            self._leave()

    async def queue(self, is_streamed: bool) -> bytes:
        """Instead of answering, it is made later; it is in the store when this returns, and these
        are its first events. Raises NotFound, RequestError."""
        await self._prepare()
        inputs = [keep(item) for item in self._inputs]
        await self._asker.state.store.responses.begin(self._row(size(inputs), None), inputs)
        self._is_begun = True
        self._sent = [] if is_streamed else None
        return self._out(self._writer.begin("created", "queued"))

    async def cancel(self) -> bytes:
        """In place of the rest of `events`."""
        data = self._out(self._writer.end("incomplete"))
        self.response.status = "cancelled"
        last = self._writer.finish()
        await self._keep(last)
        return data + last

    # --- what is kept of it ------------------------------------------------------------------

    def _out(self, data: bytes) -> bytes:
        if self._sent is not None:
            self._sent.append(data)
        return data

    def _leave(self) -> None:
        """Nobody can delete what is not kept. In the background also a cancelled one is."""
        if self._mark == self.response.id and not (self._has_ended or self.response.background):
            self._asker.fleet.unmark(self._mark)

    async def _keep(self, last: bytes) -> None:
        """All that was said, unless the caller did not want it; `last` is the last event."""
        if not self._wanted.is_kept:
            return
        state, response = self._asker.state, self.response
        inputs = [keep(item) for item in self._inputs]
        outputs = [keep(item) for item in response.output]
        stream = None if self._sent is None else b"".join([*self._sent, last])
        event = None
        if self._wanted.body.background:
            event = state.webhooks.event(f"response.{response.status}", response.id)
        await state.store.responses.finish(
            self._row(size([*inputs, *outputs]), stream),
            inputs,
            outputs,
            self._wanted.conversation,
            event,
        )
        self._has_ended = True
        state.webhooks.wake()

    def _row(self, item_bytes: int, stream: bytes | None) -> Response:
        body = msgspec.json.encode(self.response)
        return Response(
            id=self.response.id,
            owner=self._asker.caller,
            previous=self._wanted.body.previous_response_id,
            status=self.response.status,
            created_at=self.response.created_at,
            used_at=int(self._asker.clock.wall()),
            num_bytes=len(body) + item_bytes + len(stream or b""),
            body=body,
            stream=stream,
        )

    # --- making it ---------------------------------------------------------------------------

    @asynccontextmanager
    async def _generation(self) -> AsyncIterator[Generation]:
        await self._prepare()
        items = [*self._said, *self._inputs]
        body = chat_body(self._wanted, items)
        options = replace(self._wanted.options, request_id=self._number, mark=self._mark)
        source: PromptSource = chat.ChatPrompt(body, options)
        if self._wanted.may_drop:
            source = _Fitting(chat.ChatPrompt(body, options), partial(self._encode_fitting, items))
        with renamed():
            async with AsyncExitStack() as stack:
                begin = partial(generation, self._asker, body.model, api=_API, source=source)
                yield await self._enter(stack, begin, options)

    async def _enter(self, stack: AsyncExitStack, begin: Begin, options: Options) -> Generation:
        """Nobody can try again for one in the background, so it waits while the queue is full:
        behind those of its model that wait already, and with others that try again. Raises
        DeadlineExceeded."""
        if not self.response.background:
            return await stack.enter_async_context(begin(options))
        clock = self._asker.clock
        until = None if options.timeout is None else clock.monotonic() + options.timeout
        async with self._asker.state.background.queue.of(self.response.model):
            while True:
                left = None if until is None else until - clock.monotonic()
                try:
                    return await stack.enter_async_context(begin(replace(options, timeout=left)))
                except QueueFull as error:
                    assert error.retry_after is not None
                    if left is not None and left <= error.retry_after:
                        raise DeadlineExceeded(
                            f"the timeout of {options.timeout:g} s is over: the queue was full",
                            param="timeout",
                        ) from None
                    await clock.sleep(error.retry_after)

    async def _prepare(self) -> None:
        """Reads what was said before, and puts items in the place of references."""
        wanted = self._wanted
        self._said, self._inputs = await context_of(
            self._asker, wanted.body, wanted.conversation, wanted.items
        )

    async def _begin(self, made: Generation) -> bytes:
        self.response.model = made.model
        self.response.status = "in_progress"
        if self._is_begun:
            body = msgspec.json.encode(self.response)
            store = self._asker.state.store
            await store.responses.change(self.response.id, body, self.response.status)
            return self._writer.begin("in_progress")
        self._is_begun = True
        return self._writer.begin("created", "in_progress")

    def _take(self, made: Generation, delta: Delta) -> bytes:
        logprobs = chat_logprobs(made.text, made.options, delta.entries)
        return self._writer.take(delta.parts, logprobs)

    def _complete(self, made: Generation, delta: Delta) -> bytes:
        """The last item's end, and the response's own fields."""
        response = self.response
        response.model = made.model
        response.usage = usage_of(made.usage())
        response.content_filter_results = results_of(delta.filtered)
        response.prompt_filter_results = prompt_results(made)
        reason = _INCOMPLETE.get(delta.finish_reason or "stop")
        if reason is not None:
            response.status = "incomplete"
            response.incomplete_details = IncompleteDetails(reason)
            return self._writer.end("incomplete")
        response.status = "completed"
        response.completed_at = int(self._asker.clock.wall())
        return self._writer.end("completed")

    async def _fail(self, error: Exception) -> bytes:
        known = error
        if not isinstance(known, QuantdError):
            _log.error("a response failed", response=self.response.id, exc_info=error)
            known = internal_error(self.response.id)
        data = self._out(self._writer.end("incomplete"))
        fail(self.response, known)
        last = self._writer.finish()
        try:
            await self._keep(last)
        except QuantdError as other:
            _log.error("a response is not kept", response=self.response.id, reason=str(other))
        return data + last

    async def _encode_fitting(
        self, items: Sequence[AnyItem], text: TextModel, change: Change
    ) -> list[Prompt]:
        """With the fewest turns left out, the oldest ones first, that the rest fits the context;
        never instructions, system messages and the last turn."""
        room = self._room()
        prompts = await self._encode(items, text, change)
        if len(prompts[0].ids) <= room:
            return prompts
        starts = turns(items) or [0]
        low, high = 0, len(starts) - 1
        while low < high:
            middle = (low + high) // 2
            fitting = await self._encode(_from(items, starts[middle]), text, change)
            if len(fitting[0].ids) <= room:
                high = middle
            else:
                low = middle + 1
        start = starts[low]
        left = {item.id for item in _from(items, start)}
        dropped = [item.id for item in items if item.id not in left]
        if dropped:
            self.response.dropped_items = dropped
        return await self._encode(_from(items, start), text, change)

    async def _encode(
        self, items: Sequence[AnyItem], text: TextModel, change: Change
    ) -> list[Prompt]:
        prompt = chat.ChatPrompt(chat_body(self._wanted, items), self._wanted.options)
        return await prompt.mapped(change).encode(text)

    def _room(self) -> int:
        """Most tokens of the prompt, with room for the output that was asked for."""
        name = self._asker.fleet.resolve(self._wanted.body.model)
        [info] = [status.info for status in self._asker.fleet.models() if status.name == name]
        assert info is not None, "its lease is held"
        return usable_context(info) - (self._wanted.options.max_tokens or 1)


@dataclass(frozen=True, slots=True)
class _Fitting:
    """A chat of which turns may be left out; what changes its texts changes those of any part."""

    chat: chat.ChatPrompt
    fit: Callable[[TextModel, Change], Awaitable[list[Prompt]]]
    change: Change = lambda text, is_json: text

    is_text = True

    def mapped(self, change: Change) -> _Fitting:
        before = self.change
        return _Fitting(
            self.chat.mapped(change),
            self.fit,
            lambda text, is_json: change(before(text, is_json), is_json),
        )

    async def encode(self, text: TextModel) -> list[Prompt]:
        return await self.fit(text, self.change)


def _from(items: Sequence[AnyItem], start: int) -> list[AnyItem]:
    return [
        item
        for index, item in enumerate(items)
        if index >= start
        or (isinstance(item, MessageItem) and item.role in ("system", "developer"))
    ]


def chat_body(wanted: Wanted, items: Sequence[AnyItem]) -> ChatBody:
    """Raises RequestError."""
    messages = all_messages(wanted.body.instructions, items)
    body = msgspec.structs.replace(wanted.chat, messages=messages)
    with renamed():
        check_messages(body, messages)
    return body


async def context_of(
    asker: Asker,
    body: ContextBody,
    conversation: str | None,
    items: Sequence[AnyItem | Reference],
) -> tuple[list[AnyItem], list[AnyItem]]:
    """What was said before, and what comes now. Raises NotFound, and RequestError for an item that
    would be there twice."""
    said = await _said_before(asker, body, conversation)
    inputs = await resolved(asker, items)
    known = {item.id for item in said}
    for index, item in enumerate(inputs):
        if item.id in known:
            raise RequestError(
                f"input[{index}]: the item {item.id!r} was said before; send only what is new",
                param=f"input[{index}]",
                code="duplicate_item",
            )
    return said, inputs


async def _said_before(asker: Asker, body: ContextBody, conversation: str | None) -> list[AnyItem]:
    """Raises NotFound, RequestError."""
    store, now = asker.state.store, int(asker.clock.wall())
    if body.previous_response_id is not None:
        found = await store.responses.chain(asker.caller, body.previous_response_id, now)
    elif conversation is not None:
        found = await store.conversations.items(asker.caller, conversation, now)
    else:
        return []
    return [kept(item) for item in found]


async def resolved(asker: Asker, items: Sequence[AnyItem | Reference]) -> list[AnyItem]:
    """Raises NotFound for a reference to what is not there."""
    store = asker.state.store
    return [
        kept(await store.responses.item(asker.caller, item.id))
        if isinstance(item, Reference)
        else item
        for item in items
    ]
