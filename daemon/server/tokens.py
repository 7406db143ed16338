"""POST /tokenize and /detokenize, in vLLM's form."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from quantd.daemon.errors import RequestError
from quantd.daemon.server.body import read_body
from quantd.daemon.server.context import CONTEXT
from quantd.daemon.server.messages import check_messages, encode_messages, num_chars, off_loop
from quantd.daemon.server.models import json_response
from quantd.daemon.server.sampling import token_ids
from quantd.daemon.server.schemas import DetokenizeBody, TokenizeBody
from quantd.daemon.server.tools import read_tools

if TYPE_CHECKING:
    from quantd.daemon.text import TextModel

_TOKENIZE = msgspec.json.Decoder(TokenizeBody)
_DETOKENIZE = msgspec.json.Decoder(DetokenizeBody)


class TokenizeReply(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeReply(msgspec.Struct):
    prompt: str


async def tokenize(request: web.Request) -> web.Response:
    context = request.app[CONTEXT]
    body = await read_body(request, _TOKENIZE)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give either prompt or messages", param="prompt")
    tools = read_tools(body.tools)
    if body.messages is not None:
        check_messages(body, body.messages)
    async with await context.fleet.lease(body.model) as lease:
        text: TextModel = lease.text
        if tools is not None:
            tools.check(text.format)
        tokens = await off_loop(_size(body), partial(_encode, text, body))
        strings = [text.token_text(token) for token in tokens] if body.return_token_strs else None
        return json_response(TokenizeReply(len(tokens), lease.info.max_context, tokens, strings))


def _size(body: TokenizeBody) -> int:
    if body.messages is not None:
        return num_chars(body.messages, body.tools)
    return len(body.prompt or "")


def _encode(text: TextModel, body: TokenizeBody) -> list[int]:
    if body.messages is not None:
        return encode_messages(text, body, body.messages, body.tools)
    return text.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)


async def detokenize(request: web.Request) -> web.Response:
    context = request.app[CONTEXT]
    body = await read_body(request, _DETOKENIZE)
    async with await context.fleet.lease(body.model) as lease:
        text: TextModel = lease.text
        tokens = token_ids("tokens", body.tokens, text.vocab_size)
        # Special tokens are kept: the caller asked what these tokens are.
        decode = partial(text.decode, tokens, skip_special_tokens=False)
        return json_response(DetokenizeReply(await off_loop(len(tokens), decode)))
