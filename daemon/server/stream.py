"""A generation as a stream of OpenAI's chunks.

A chunk is mostly the same bytes each time, so those are made once per stream, and a token costs
the encoding of its text and one write.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import TYPE_CHECKING, Protocol

import msgspec
from aiohttp import web

from quantd.daemon.errors import QuantdError
from quantd.daemon.server.context import CONTEXT
from quantd.daemon.server.errors import encode_error
from quantd.daemon.server.filtered import members_of, prompt_results
from quantd.daemon.server.generate import Generation
from quantd.daemon.server.middleware import has_left, unexpected
from quantd.daemon.server.sampling import Options
from quantd.daemon.server.sse import DONE, SSE, EventStream, Form, event

if TYPE_CHECKING:
    from quantd.daemon.server.choice import Delta


class Chunks(Protocol):
    """How one API writes deltas down."""

    def encode(self, delta: Delta) -> bytes:
        """Whole events, maybe none."""
        ...

    def end(self) -> bytes: ...


def _failed(error: QuantdError) -> bytes:
    return event(encode_error(error)) + DONE


async def stream_generation(
    request: web.Request,
    running: AbstractAsyncContextManager[Generation],
    chunks_of: Callable[[Generation], Chunks],
    failed: Callable[[QuantdError], bytes] = _failed,
    form: Form = SSE,
) -> web.StreamResponse:
    """Before the first byte an error is raised and becomes a status; after it, an event, which
    `failed` writes."""
    context = request.app[CONTEXT]
    seconds = context.settings.keepalive_seconds
    async with EventStream(request, context.clock, seconds, form) as events:
        try:
            async with running as made, aclosing(made.deltas()) as deltas:
                chunks, num_running = chunks_of(made), len(made.choices)
                async for delta in deltas:
                    data = chunks.encode(delta)
                    if delta.finish_reason is not None:
                        num_running -= 1
                        if not num_running:  # in one write with the last chunk
                            data += chunks.end()
                    if data:
                        await events.write(data)
        except Exception as error:
            if not events.started or has_left(request):
                raise
            known = error if isinstance(error, QuantdError) else unexpected(request, error)
            await events.write(failed(known))
        return await events.finish()


def token_ids(options: Options, delta: Delta) -> list[int] | msgspec.UnsetType:
    """The ids behind the text, with the stop token's; for who asked for them."""
    if not options.return_token_ids:
        return msgspec.UNSET
    return [entry.token for entry in delta.entries]


class ChunkTemplate:
    """The constant bytes around what changes from chunk to chunk."""

    def __init__(self, made: Generation, kind: str) -> None:
        encode = msgspec.json.encode
        self._made = made
        self._head = b'data: {"id":%b,"object":%b,"created":%d,"model":%b' % (
            encode(made.id),
            encode(kind),
            made.created,
            encode(made.model),
        )
        if made.options.service_tier is not None:
            self._head += b',"service_tier":' + encode(made.options.service_tier)
        self._head += b',"choices":['
        self._starts = [self._head + b'{"index":%d,' % i for i in range(len(made.choices))]
        self._tail = b'],"usage":null}\n\n' if made.options.include_usage else b"]}\n\n"
        self._plain = b',"logprobs":null,"finish_reason":null}' + self._tail

    def chunk(
        self, index: int, content: bytes, logprobs: bytes = b"null", extra: bytes = b""
    ) -> bytes:
        """`content` and `extra` are members of the choice; `extra` begins with its comma."""
        if logprobs == b"null" and not extra:
            return self._starts[index] + content + self._plain
        return b'%b%b,"logprobs":%b,"finish_reason":null%b}%b' % (
            self._starts[index],
            content,
            logprobs,
            extra,
            self._tail,
        )

    def finish(self, content: bytes, delta: Delta) -> bytes:
        tail, results = self._tail, prompt_results(self._made)
        if results is not msgspec.UNSET:
            tail = b'],"prompt_filter_results":' + msgspec.json.encode(results) + tail[1:]
        return b'%b%b,"logprobs":null,"finish_reason":"%b","stop_reason":%b%b}%b' % (
            self._starts[delta.index],
            content,
            (delta.finish_reason or "").encode(),
            msgspec.json.encode(delta.stop_reason),
            members_of(delta.filtered),
            tail,
        )

    def token_ids(self, delta: Delta) -> bytes:
        """For `extra`: empty unless the caller asked for ids."""
        ids = token_ids(self._made.options, delta)
        return b"" if ids is msgspec.UNSET else b',"token_ids":' + msgspec.json.encode(ids)

    def prompt_ids(self, index: int) -> bytes:
        """The same of the prompt that a choice goes on from; in its first chunk."""
        if not self._made.options.return_token_ids:
            return b""
        return b',"prompt_token_ids":' + msgspec.json.encode(self._made.prompt_of(index).ids)

    def end(self) -> bytes:
        if not self._made.options.include_usage:
            return DONE
        usage = msgspec.json.encode(self._made.usage())
        return self._head + b'],"usage":' + usage + b"}\n\n" + DONE
