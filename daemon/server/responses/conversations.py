"""/v1/conversations: items that responses go on from, and are appended to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec
from aiohttp import web

from quantd.daemon.errors import RequestError
from quantd.daemon.server import query
from quantd.daemon.server.body import read_body
from quantd.daemon.server.context import CALLER, CONTEXT, asker
from quantd.daemon.server.files import Deleted
from quantd.daemon.server.limits import METADATA, PAGE, Length, shown_as
from quantd.daemon.server.metadata import check_metadata
from quantd.daemon.server.models import json_response
from quantd.daemon.server.responses.items import InputItem, keep, read_items
from quantd.daemon.server.responses.routes import ItemList, item_list
from quantd.daemon.server.responses.run import resolved
from quantd.daemon.store import Conversation, Item
from quantd.daemon.store.rows import Page, new_id

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantd.daemon.server.responses.turns import Turns
    from quantd.daemon.store import Conversations

AT_ONCE = Length(0, 20)
"""OpenAI's."""


class CreateBody(msgspec.Struct):
    items: Annotated[list[InputItem], AT_ONCE.items] | None = None
    metadata: Annotated[dict[str, str], METADATA] | None = None


class UpdateBody(msgspec.Struct):
    metadata: Annotated[dict[str, str], METADATA] | None


class ItemsBody(msgspec.Struct):
    items: Annotated[list[InputItem], AT_ONCE.items]


class ConversationObject(msgspec.Struct):
    id: str
    created_at: int
    metadata: Annotated[msgspec.Raw, shown_as("schemas.Metadata")]
    object: str = "conversation"


_CREATE = msgspec.json.Decoder(CreateBody)
_UPDATE = msgspec.json.Decoder(UpdateBody)
_ITEMS = msgspec.json.Decoder(ItemsBody)


def _shown(conversation: Conversation) -> web.Response:
    metadata = msgspec.Raw(conversation.metadata)
    return json_response(ConversationObject(conversation.id, conversation.created_at, metadata))


async def create(request: web.Request) -> web.Response:
    body = await read_body(request, _CREATE)
    check_metadata(body.metadata)
    items = await _read(request, body.items or ())
    now = _now(request)
    metadata = msgspec.json.encode(body.metadata or {})
    conversation = Conversation(new_id("conv_"), request[CALLER], now, now, len(metadata), metadata)
    await _conversations(request).add(conversation, items)
    return _shown(conversation)


async def get(request: web.Request) -> web.Response:
    return _shown(await _conversations(request).get(*_which(request)))


async def update(request: web.Request) -> web.Response:
    body = await read_body(request, _UPDATE)
    check_metadata(body.metadata)
    owner, id, now = _which(request)
    metadata = msgspec.json.encode(body.metadata or {})
    return _shown(await _conversations(request).update(owner, id, metadata, now))


async def delete(request: web.Request) -> web.Response:
    """With its items; responses that were made in it keep what was said in them."""
    owner, id, now = _which(request)
    await _conversations(request).delete(owner, id, now)
    return json_response(Deleted(id, "conversation.deleted"))


async def create_items(request: web.Request) -> web.Response:
    """Behind all that is there, and behind a response that is being made in it."""
    body = await read_body(request, _ITEMS)
    items = await _read(request, body.items)
    owner, id, now = _which(request)
    async with _turns(request).of(id):
        await _conversations(request).append(owner, id, items, now)
    return json_response(item_list(Page(items, False)))


async def list_items(request: web.Request) -> web.Response:
    owner, id, now = _which(request)
    page = await _conversations(request).page(
        owner,
        id,
        now,
        after=query.after(request),
        limit=query.page_limit(request, 20, PAGE),
        descending=query.is_descending(request),
    )
    made: ItemList = item_list(page)
    return json_response(made)


async def get_item(request: web.Request) -> web.Response:
    owner, id, now = _which(request)
    item = await _conversations(request).item(owner, id, request.match_info["item"], now)
    return web.Response(body=item.body, content_type="application/json")


async def delete_item(request: web.Request) -> web.Response:
    owner, id, now = _which(request)
    async with _turns(request).of(id):
        conversation = await _conversations(request).delete_item(
            owner, id, request.match_info["item"], now
        )
    return _shown(conversation)


async def _read(request: web.Request, raw: Sequence[msgspec.Raw]) -> list[Item]:
    most = AT_ONCE.high
    if len(raw) > most:
        raise RequestError(f"items has {len(raw)} entries; the limit is {most}", param="items")
    items = read_items(raw, "items")
    return [keep(item) for item in await resolved(asker(request), items)]


def _which(request: web.Request) -> tuple[str, str, int]:
    return request[CALLER], request.match_info["id"], _now(request)


def _conversations(request: web.Request) -> Conversations:
    return request.app[CONTEXT].state.store.conversations


def _turns(request: web.Request) -> Turns:
    return request.app[CONTEXT].state.turns


def _now(request: web.Request) -> int:
    return int(request.app[CONTEXT].clock.wall())
