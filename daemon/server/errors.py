"""Errors as JSON, in the shape of the API that was called: OpenAI's, for every status, is
{"error": {"message", "type", "param", "code"}}.

Only this file turns an exception into bytes. Nothing of an unexpected exception but the request's
id reaches the caller; the rest goes to the log.
"""

from __future__ import annotations

import math

import msgspec
from aiohttp import web

from quantd.daemon.errors import (
    BodyTooLarge,
    InternalError,
    MethodNotAllowed,
    ModelRefused,
    NotFound,
    QuantdError,
    QueueFull,
    RequestError,
    StorageFull,
    StoreUnavailable,
    Unauthorized,
    Unavailable,
)
from quantd.daemon.server.anthropic import errors as anthropic
from quantd.daemon.server.context import REQUEST_ID
from quantd.daemon.server.ollama import errors as ollama

DEFAULT_RETRY_AFTER = 5.0
"""Seconds, for a 503 that does not know better."""


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    error: ErrorDetail


def encode_error(error: QuantdError) -> bytes:
    """The body of the response, or the data of an SSE event."""
    return msgspec.json.encode(error_body(error))


def error_body(error: QuantdError) -> ErrorBody:
    return ErrorBody(ErrorDetail(error.message, error.type, error.param, error.error_code))


def error_response(error: QuantdError, path: str = "", request_id: str = "") -> web.Response:
    """`path`: as requested; it says whose shape the body has."""
    headers: dict[str, str] = {}
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = 'Bearer realm="quantd"'
    if isinstance(error, ModelRefused | StoreUnavailable | StorageFull):
        # The SDKs retry every 5xx unless told not to; these cannot change by themselves.
        headers["x-should-retry"] = "false"
    elif isinstance(error, QueueFull | Unavailable):
        seconds = DEFAULT_RETRY_AFTER if error.retry_after is None else error.retry_after
        headers["Retry-After"] = str(max(1, math.ceil(seconds)))
    return web.Response(
        status=error.status,
        body=_body_for(path, error, request_id),
        content_type="application/json",
        headers=headers,
    )


def _body_for(path: str, error: QuantdError, request_id: str) -> bytes:
    if anthropic.is_below(path):
        return anthropic.encode_error(error, request_id)
    if ollama.is_below(path):
        return ollama.encode_error(error)
    return encode_error(error)


def internal_error(request_id: str) -> InternalError:
    return InternalError(f"internal error; the daemon's log has it under request {request_id}")


def http_error_response(exc: web.HTTPException, request: web.Request) -> web.Response:
    """What aiohttp itself raises: unknown URL, wrong method, body over the limit, bad encoding."""
    response = error_response(_from_http(exc, request), request.path, request[REQUEST_ID])
    response.set_status(exc.status)
    if isinstance(exc, web.HTTPMethodNotAllowed):
        response.headers["Allow"] = ", ".join(sorted(exc.allowed_methods))
    return response


def _from_http(exc: web.HTTPException, request: web.Request) -> QuantdError:
    where = f"{request.method} {request.path}"
    if isinstance(exc, web.HTTPNotFound):
        return NotFound(f"no such URL: {where}")
    if isinstance(exc, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(exc.allowed_methods))
        return MethodNotAllowed(f"{where} is not served; allowed: {allowed}")
    if isinstance(exc, web.HTTPRequestEntityTooLarge):
        return body_too_large(request.client_max_size)
    if isinstance(exc, web.HTTPExpectationFailed):
        expected = request.headers.get("Expect", "")
        return RequestError(f'Expect: {expected!r} is not known; allowed: "100-continue"')
    if 400 <= exc.status < 500:
        return RequestError(f"{where}: {exc.reason}")
    return InternalError(exc.reason or "internal error")


def body_too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the request's body is larger than the limit of {limit} bytes")
