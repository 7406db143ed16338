"""One client's connection, with errors in our shape also where there is no request yet."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, Protocol

import structlog
from aiohttp import web
from aiohttp.http import HttpProcessingError

from quantd.daemon.errors import RequestError
from quantd.daemon.server.context import REQUEST_ID
from quantd.daemon.server.errors import error_response, http_error_response
from quantd.daemon.server.middleware import request_id_for

_log = structlog.get_logger("quantd.server")

_OPTIONS: dict[str, Any] = {
    "keepalive_timeout": 120.0,  # seconds; longer than the SDKs' own pools keep a connection
    "auto_decompress": False,  # `read_body` does it, within bounds
    "access_log": None,  # a line per request would cost more than some requests
}


class MakeConnection(Protocol):
    """A protocol factory, for the event loop's `create_server`."""

    def __call__(self) -> web.RequestHandler: ...


def connections(runner: web.AppRunner) -> MakeConnection:
    """For a runner that is set up. Event loop only."""
    assert runner.server is not None
    return partial(Connection, runner.server, loop=asyncio.get_running_loop(), **_OPTIONS)


class Connection(web.RequestHandler):
    """aiohttp's own answers what is not HTTP in plain text, and writes a traceback into the log
    for each, so that every stranger with a port scanner could fill it."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Called with what did not parse, and with what a handler raised past the middleware."""
        if isinstance(exc, ConnectionError):
            raise exc  # the client has left: this ends the connection without a word
        if not isinstance(exc, HttpProcessingError):
            return super().handle_error(request, status, exc, message)
        reason = " ".join(exc.message.split())
        _log.debug("a request is not HTTP", reason=reason)
        response = error_response(RequestError(f"not valid HTTP: {reason}", code="invalid_http"))
        response.headers["x-request-id"] = request_id_for(request)
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """An HTTPException has not come by the middleware: aiohttp looks at `Expect` before."""
        if isinstance(resp, web.HTTPException) and isinstance(request, web.Request):
            request[REQUEST_ID] = request_id_for(request)
            resp = http_error_response(resp, request)
        return await super().finish_response(request, resp, start_time)

    def log_exception(self, *args: Any, **kwargs: Any) -> None:
        """A body that could not be read fails again when its rest is thrown away; by then the
        caller has the answer."""
        if not isinstance(kwargs.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **kwargs)
