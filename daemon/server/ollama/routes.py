"""POST /api/chat and /api/generate, and what needs Ollama's registry and is refused."""

from __future__ import annotations

from functools import partial

import msgspec
from aiohttp import web

from quantd.daemon.errors import NotServed, QuantdError
from quantd.daemon.server.body import read_body
from quantd.daemon.server.context import CONTEXT, asker
from quantd.daemon.server.models import json_response
from quantd.daemon.server.ollama.errors import encode_error
from quantd.daemon.server.ollama.events import (
    AnswerLines,
    Shape,
    chat_shape,
    generate_shape,
    whole_answer,
    without_answer,
)
from quantd.daemon.server.ollama.options import renamed
from quantd.daemon.server.ollama.request import Wanted, read_chat, read_generate
from quantd.daemon.server.ollama.run import Watch, generating, load
from quantd.daemon.server.ollama.schemas import AnswerRequest, ChatRequest, GenerateRequest
from quantd.daemon.server.retry import collect_valid
from quantd.daemon.server.sse import NDJSON
from quantd.daemon.server.stream import stream_generation

_CHAT = msgspec.json.Decoder(ChatRequest)
_GENERATE = msgspec.json.Decoder(GenerateRequest)


async def chat(request: web.Request) -> web.StreamResponse:
    sent = await read_body(request, _CHAT)
    with renamed():
        return await _answer(request, sent, read_chat(sent), chat_shape)


async def generate(request: web.Request) -> web.StreamResponse:
    sent = await read_body(request, _GENERATE)
    with renamed():
        return await _answer(request, sent, read_generate(sent), generate_shape)


async def _answer(
    request: web.Request, sent: AnswerRequest, wanted: Wanted | None, shape: Shape
) -> web.StreamResponse:
    who = asker(request)
    clock = who.clock
    if wanted is None:
        model, reason = await load(who, sent)
        return json_response(without_answer(shape, clock, model, reason))
    watch = Watch(clock)
    running = generating(who, wanted, watch)
    if wanted.options.stream:
        lines = partial(AnswerLines, shape, watch, clock)
        return await stream_generation(request, running, lines, _failed, NDJSON)
    async with running as made:
        [result] = await collect_valid(made, request.app[CONTEXT].metrics)
        return json_response(whole_answer(shape, watch, clock, made, result))


def _failed(error: QuantdError) -> bytes:
    return encode_error(error) + b"\n"


async def refuse(request: web.Request) -> web.Response:
    """Models come from the configuration, and there is no registry to speak to."""
    raise NotServed(
        f"{request.method} {request.path} is not served: models are files on this machine, and the "
        "configuration says which there are"
    )
