"""What happens around every handler: the request's id, errors to JSON, who may come in."""

from __future__ import annotations

import os
import re
import uuid

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from quantd.daemon.errors import Forbidden, QuantdError
from quantd.daemon.server.anthropic.errors import is_below
from quantd.daemon.server.auth import HostRule, may_administer, peer_of
from quantd.daemon.server.context import CALLER, CONTEXT, ORIGIN, REQUEST_ID
from quantd.daemon.server.errors import error_response, http_error_response, internal_error

_log = structlog.get_logger("quantd.server")

ADMIN_PREFIX = "/admin/"
OPEN_PATHS = frozenset(
    {"/", "/health", "/ready", "/ping", "/version", "/api/version", "/openapi.json", "/docs"}
)
"""No key needed: probes and a browser have none, and these tell nothing but names and states."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The outermost: gives the request its id, and every failure the shape of the API."""
    request[REQUEST_ID] = request_id_for(request)
    try:
        return await handler(request)
    except QuantdError as error:
        return error_response(error, request.path, request[REQUEST_ID])
    except web.HTTPException as error:
        return http_error_response(error, request)
    except Exception as error:
        if isinstance(error, ConnectionError) and has_left(request):
            raise
        return error_response(unexpected(request, error), request.path, request[REQUEST_ID])


def request_id_for(request: web.BaseRequest) -> str:
    """The caller's own, if it is valid, or a new one."""
    presented = request.headers.get("x-request-id", "")
    # A bad one is replaced and not refused: proxies set it, so the caller could not mend it.
    return presented if _REQUEST_ID.fullmatch(presented) is not None else uuid.uuid4().hex


def unexpected(request: web.Request, error: Exception) -> QuantdError:
    """Logs what should not have happened; returns what the caller may know of it."""
    request_id = request[REQUEST_ID]
    _log.error("request failed", request_id=request_id, path=request.path, exc_info=error)
    return internal_error(request_id)


def has_left(request: web.Request) -> bool:
    """The client has closed the connection: a ConnectionError is then its, and not ours."""
    return request.transport is None or request.transport.is_closing()


def tcp_guard(rule: HostRule) -> Middleware:
    """Host and Origin, CORS preflight, then the API key."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        headers = request.headers
        host, origin = headers.get("Host"), headers.get("Origin")
        rule.check_host(host)
        rule.check_origin(origin, host)
        if origin is not None:
            request[ORIGIN] = origin
            if request.method == "OPTIONS" and "Access-Control-Request-Method" in headers:
                return _preflight(request)
        request[CALLER] = ""
        if request.path not in OPEN_PATHS:
            keys = request.app[CONTEXT].keys
            request[CALLER] = keys.caller(headers.get("Authorization"), headers.get("x-api-key"))
        return await handler(request)

    return guard


def _preflight(request: web.Request) -> web.Response:
    headers = {
        "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
        "Access-Control-Allow-Headers": request.headers.get("Access-Control-Request-Headers", "*"),
        "Access-Control-Max-Age": "600",
    }
    if "Access-Control-Request-Private-Network" in request.headers:
        headers["Access-Control-Allow-Private-Network"] = "true"
    return web.Response(status=204, headers=headers)


@web.middleware
async def unix_guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The socket file's mode has let this peer in, which is enough to use the models. Admin routes
    also ask who it is, and so does everything on an abstract socket, which has no mode."""
    request[CALLER] = ""
    assert request.transport is not None
    path = request.transport.get_extra_info("sockname")
    is_abstract = not path or path[:1] in ("\0", b"\0")
    if is_abstract or request.path.startswith(ADMIN_PREFIX):
        peer = peer_of(request.transport.get_extra_info("socket"))
        if not may_administer(peer, None if is_abstract else _group_of(path)):
            raise Forbidden(f"user {peer.uid} may not use {request.path}", code="peer_not_allowed")
    return await handler(request)


def _group_of(path: str) -> int | None:
    try:
        return os.stat(path).st_gid
    except OSError:
        return None


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Signal `on_response_prepare`, because a streaming response has left before its handler
    returns."""
    request_id = request.get(REQUEST_ID)
    if request_id is not None:
        response.headers["x-request-id"] = request_id
        if is_below(request.path):
            response.headers["request-id"] = request_id
    origin = request.get(ORIGIN)
    if origin is not None:
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Expose-Headers"] = "x-request-id, retry-after"
        response.headers.add("Vary", "Origin")
