"""/v1/responses: made at once, streamed, or in the background; kept, looked at, deleted."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from quantd.daemon.errors import QuantdError, RequestError
from quantd.daemon.server import chat, query
from quantd.daemon.server.body import decode, read_body
from quantd.daemon.server.context import CALLER, CONTEXT, Asker, asker
from quantd.daemon.server.files import Deleted
from quantd.daemon.server.limits import PAGE
from quantd.daemon.server.messages import check_messages
from quantd.daemon.server.middleware import has_left, unexpected
from quantd.daemon.server.models import json_response
from quantd.daemon.server.responses.background import decode_object, events_after
from quantd.daemon.server.responses.events import error_event
from quantd.daemon.server.responses.items import ShownItem, read_items
from quantd.daemon.server.responses.object import ResponseObject
from quantd.daemon.server.responses.request import (
    ContextBody,
    ResponseBody,
    all_messages,
    chat_of,
    check,
    check_context,
    renamed,
)
from quantd.daemon.server.responses.run import Run, context_of
from quantd.daemon.server.sampling import out_of_range
from quantd.daemon.server.sse import EventStream

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from quantd.daemon.store import Item, Response
    from quantd.daemon.store.rows import Page

_DECODER = msgspec.json.Decoder(ResponseBody)
_COUNT = msgspec.json.Decoder(ContextBody)


class InputTokens(msgspec.Struct):
    input_tokens: int
    object: str = "response.input_tokens"


class ItemList(msgspec.Struct):
    data: list[ShownItem]
    has_more: bool
    first_id: str
    last_id: str
    object: str = "list"


async def create(request: web.Request) -> web.StreamResponse:
    wanted = check(await read_body(request, _DECODER))
    run = Run(asker(request), wanted)
    is_streamed = wanted.options.stream
    if wanted.body.background:
        background = request.app[CONTEXT].state.background
        shown = json_response(run.response)
        await background.start(run, is_streamed)
        events = background.follow(run.response.id, -1)
        return shown if events is None else await _stream(request, events)
    if is_streamed:
        return await _stream(request, run.events())
    return json_response(await run.whole())


async def answer(raw: bytes, asker: Asker) -> ResponseObject:
    """The whole answer to a body that does not come with an HTTP request of its own."""
    wanted = check(decode(raw, _DECODER))
    if wanted.body.background:
        raise RequestError("background cannot be true in a batch", param="background")
    return await Run(asker, wanted).whole()


async def _stream(request: web.Request, events: AsyncGenerator[bytes, None]) -> web.StreamResponse:
    context = request.app[CONTEXT]
    seconds = context.settings.keepalive_seconds
    async with EventStream(request, context.clock, seconds) as out, aclosing(events):
        try:
            async for data in events:
                await out.write(data)
        except Exception as error:  # before the first event; later ones are events themselves
            if not out.started or has_left(request):
                raise
            known = error if isinstance(error, QuantdError) else unexpected(request, error)
            await out.write(error_event(known))
        return await out.finish()


async def get(request: web.Request) -> web.StreamResponse:
    row = await _row(request)
    is_streamed, after = query.flag(request, "stream"), _starting_after(request)
    if not is_streamed:
        return _shown(row)
    events = request.app[CONTEXT].state.background.follow(row.id, after)
    if events is not None:
        return await _stream(request, events)
    row = await _row(request)  # it may have ended meanwhile
    if row.stream is None:
        raise RequestError(
            f"The response '{row.id}' cannot be streamed: it was not made with background and "
            "stream, or its maker was stopped.",
            param="stream",
        )
    return await _stream(request, _replay(row.stream, after))


async def _replay(stream: bytes, after: int) -> AsyncGenerator[bytes, None]:
    yield events_after(stream, after)


def _starting_after(request: web.Request) -> int:
    text = request.query.get("starting_after", "")
    if not text:
        return -1
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise out_of_range("starting_after", text[:20], "the number of an event")
    return int(text)


async def cancel(request: web.Request) -> web.Response:
    """No effect on one that has ended."""
    row = await _row(request)
    if not decode_object(row.body).background:
        raise RequestError(
            "Only a response that was made with background=true can be cancelled.",
            param="response_id",
        )
    await request.app[CONTEXT].state.background.cancel(row.id)
    return _shown(await _row(request))


async def delete(request: web.Request) -> web.Response:
    """With what was said in it; one that is being made is cancelled first."""
    row, state = await _row(request), request.app[CONTEXT].state
    await state.background.cancel(row.id)
    await state.store.responses.delete(request[CALLER], row.id, _now(request))
    return json_response(Deleted(row.id, "response"))


async def input_items(request: web.Request) -> web.Response:
    page = await request.app[CONTEXT].state.store.responses.inputs(
        request[CALLER],
        request.match_info["id"],
        _now(request),
        after=query.after(request),
        limit=query.page_limit(request, 20, PAGE),
        descending=query.is_descending(request),
    )
    return json_response(item_list(page))


async def input_tokens(request: web.Request) -> web.Response:
    """How long the prompt would be; nothing is computed or kept."""
    body = await read_body(request, _COUNT)
    conversation = check_context(body)
    items = read_items(body.input)
    who = asker(request)
    said, inputs = await context_of(who, body, conversation, items)
    messages = all_messages(body.instructions, [*said, *inputs])
    with renamed():
        made = chat_of(body, messages)
        check_messages(made, messages)
        options = chat.read_options_of(made)
        async with await who.fleet.lease(body.model) as lease:
            [prompt] = await chat.encode(made, options, lease.text)
    return json_response(InputTokens(len(prompt.ids)))


def item_list(page: Page[Item]) -> ItemList:
    ids = [item.id for item in page.items]
    return ItemList(
        [msgspec.Raw(item.body) for item in page.items],
        page.has_more,
        ids[0] if ids else "",
        ids[-1] if ids else "",
    )


async def _row(request: web.Request) -> Response:
    responses = request.app[CONTEXT].state.store.responses
    return await responses.get(request[CALLER], request.match_info["id"], _now(request))


def _shown(row: Response) -> web.Response:
    return web.Response(body=row.body, content_type="application/json")


def _now(request: web.Request) -> int:
    return int(request.app[CONTEXT].clock.wall())
