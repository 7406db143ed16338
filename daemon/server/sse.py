"""One streamed response, of server-sent events or of lines of JSON: its keep-alive comments and its
back-pressure.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from aiohttp import web

from quantd.daemon.server.context import Clock

if TYPE_CHECKING:
    from aiohttp.abc import AbstractStreamWriter

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


class Form(NamedTuple):
    """What a stream consists of."""

    content_type: str
    keep_alive: bytes
    """What says nothing; empty: the form has no such thing, and a silent stream stays silent."""


SSE = Form("text/event-stream; charset=utf-8", KEEP_ALIVE)
NDJSON = Form("application/x-ndjson", b"")
_HEADERS = {
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold the events back to fill its buffer
}


_SEPARATORS = {b"\xc2\x85": rb"\u0085", b"\xe2\x80\xa8": rb"\u2028", b"\xe2\x80\xa9": rb"\u2029"}


def one_line(json: bytes) -> bytes:
    """JSON, or whole events, in which nothing but its line feeds ends a line: many clients split
    text at Unicode's separators too (httpx does, and Ollama's client with it), which JSON has as
    they are in strings."""
    if json.isascii():
        return json
    for raw, escaped in _SEPARATORS.items():
        json = json.replace(raw, escaped)
    return json


def event(data: bytes) -> bytes:
    """`data` must be one line, as JSON is."""
    return b"data: " + data + b"\n\n"


class EventStream:
    """The response of one streaming request; an async context manager around its making.

    The status line goes out with the first bytes, so that an error before them is still an HTTP
    status. Whenever nothing was sent for `interval` seconds, a comment is, if the form has any:
    proxies and clients give up on a silent connection, and loading a model or a long prompt takes
    minutes.

    `write` returns when the transport's buffer is below its bound. That is the back-pressure: who
    writes does not read its TokenStream meanwhile, which merges what comes.
    """

    def __init__(
        self, request: web.Request, clock: Clock, interval: float, form: Form = SSE
    ) -> None:
        self._request = request
        self._clock = clock
        self._interval = interval
        self._keep_alive = form.keep_alive
        self._response = web.StreamResponse(headers={"Content-Type": form.content_type, **_HEADERS})
        self._writer: AbstractStreamWriter | None = None
        self._last_write = clock.monotonic()
        self._heartbeat: asyncio.Task[None] | None = None

    @property
    def started(self) -> bool:
        """The status has been sent; errors are events from here on."""
        return self._writer is not None

    async def __aenter__(self) -> Self:
        if self._keep_alive:
            self._heartbeat = asyncio.create_task(self._beat())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stop_heartbeat()

    async def write(self, data: bytes) -> None:
        """`data` is whole events: what is written is never split by a comment. Raises
        ConnectionError when the client has left."""
        writer = self._writer
        if writer is None:
            writer = await self._start()
        self._last_write = self._clock.monotonic()
        await writer.write(one_line(data))
        await writer.drain()

    async def finish(self) -> web.StreamResponse:
        """No write after it."""
        self._stop_heartbeat()  # a comment after the last chunk would break the connection
        await self._response.write_eof()
        return self._response

    async def _start(self) -> AbstractStreamWriter:
        writer = await self._response.prepare(self._request)
        assert writer is not None
        self._writer = writer
        return writer

    def _stop_heartbeat(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.cancel()

    async def _beat(self) -> None:
        with suppress(ConnectionError):  # the handler finds out by itself
            while True:
                silent = self._clock.monotonic() - self._last_write
                if silent < self._interval:
                    await self._clock.sleep(self._interval - silent)
                else:
                    await self.write(self._keep_alive)
