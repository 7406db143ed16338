"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from functools import partial

import msgspec
from aiohttp import web

from quantd.daemon.errors import QuantdError
from quantd.daemon.server import chat
from quantd.daemon.server.anthropic.errors import encode_error
from quantd.daemon.server.anthropic.events import MessageEvents, message_object
from quantd.daemon.server.anthropic.request import check, renamed
from quantd.daemon.server.anthropic.schemas import CountBody, MessagesBody
from quantd.daemon.server.body import read_body
from quantd.daemon.server.context import CONTEXT, REQUEST_ID, asker
from quantd.daemon.server.generate import Api, generation
from quantd.daemon.server.models import json_response
from quantd.daemon.server.retry import collect_valid
from quantd.daemon.server.stream import stream_generation

_DECODER = msgspec.json.Decoder(MessagesBody)
_COUNT = msgspec.json.Decoder(CountBody)
_API = Api("msg_", {"prompt": "messages"}, takes_parts=True)


class InputTokens(msgspec.Struct):
    input_tokens: int


async def create(request: web.Request) -> web.StreamResponse:
    sent: MessagesBody = await read_body(request, _DECODER)
    wanted = check(sent)
    body, options, shows = wanted.chat, wanted.options, wanted.shows_thinking
    source = chat.ChatPrompt(body, options)
    running = generation(asker(request), body.model, options, _API, source)
    with renamed():
        if options.stream:
            failed = partial(_failed, request[REQUEST_ID])
            events = partial(MessageEvents, shows_thinking=shows)
            return await stream_generation(request, running, events, failed)
        async with running as made:
            [result] = await collect_valid(made, request.app[CONTEXT].metrics)
            return json_response(message_object(made, result, shows_thinking=shows))


def _failed(request_id: str, error: QuantdError) -> bytes:
    return b"event: error\ndata: %b\n\n" % encode_error(error, request_id)


async def count_tokens(request: web.Request) -> web.Response:
    """How long the prompt would be; nothing is computed."""
    wanted = check(await read_body(request, _COUNT))
    with renamed():
        async with await request.app[CONTEXT].fleet.lease(wanted.chat.model) as lease:
            [prompt] = await chat.encode(wanted.chat, wanted.options, lease.text)
    return json_response(InputTokens(len(prompt.ids)))
